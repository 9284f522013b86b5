//! Single system calls on directory entries, by file descriptor and name: what an inode is, its attributes, flags and generation.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, IFlags, Mode, OFlags, RawDir, ResolveFlags, Statx, StatxFlags, XattrFlags,
};
use rustix::io::Errno;
use tidepool_proto::tree::{MAX_ENTRIES, Meta};

/// Inode flags (`FS_IOC_GETFLAGS`) that belong to a tree. Others say how the file system keeps the file, not what it is.
const KEPT_FLAGS: IFlags = IFlags::IMMUTABLE
    .union(IFlags::APPEND)
    .union(IFlags::NODUMP)
    .union(IFlags::NOATIME)
    .union(IFlags::SYNC)
    .union(IFlags::DIRSYNC);
const MAX_XATTR_LIST: usize = 1 << 16;
const MAX_XATTR_VALUE: usize = 1 << 16;

/// What `statx` says about an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    pub(crate) kind: FileType,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) nlink: u32,
    pub(crate) size: u64,
    pub(crate) blocks: u64,
    pub(crate) mtime: (i64, u32),
    pub(crate) ctime: (i64, u32),
    pub(crate) rdev: (u32, u32),
}

impl Stat {
    fn of(s: &Statx) -> Self {
        Self {
            dev: rustix::fs::makedev(s.stx_dev_major, s.stx_dev_minor),
            ino: s.stx_ino,
            kind: FileType::from_raw_mode(s.stx_mode.into()),
            mode: u32::from(s.stx_mode) & 0o7777,
            uid: s.stx_uid,
            gid: s.stx_gid,
            nlink: s.stx_nlink,
            size: s.stx_size,
            blocks: s.stx_blocks,
            mtime: (s.stx_mtime.tv_sec, s.stx_mtime.tv_nsec),
            ctime: (s.stx_ctime.tv_sec, s.stx_ctime.tv_nsec),
            rdev: (s.stx_rdev_major, s.stx_rdev_minor),
        }
    }

    /// An overlay's mark of a removed name.
    pub(crate) fn is_whiteout(&self) -> bool {
        self.kind == FileType::CharacterDevice && self.rdev == (0, 0)
    }

    /// Metadata without extended attributes and flags.
    pub(crate) fn meta(&self) -> Meta {
        Meta {
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            mtime_s: self.mtime.0,
            mtime_ns: self.mtime.1,
            xattrs: Vec::new(),
            flags: 0,
        }
    }
}

/// What the entry `name` of `dir` is; a symbolic link is not followed.
pub(crate) fn stat_at(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Stat, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS).map(|s| Stat::of(&s))
}

/// What an open file is.
pub(crate) fn stat_fd(fd: BorrowedFd<'_>) -> Result<Stat, Errno> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).map(|s| Stat::of(&s))
}

fn open_noatime(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::RDONLY;
    match rustix::fs::openat(dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        // Not our file, and no CAP_FOWNER.
        Err(Errno::PERM) => rustix::fs::openat(dir, name, flags, Mode::empty()),
        result => result,
    }
}

/// Opens a directory for reading; a symbolic link is refused.
pub(crate) fn open_dir(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    open_noatime(dir, name, OFlags::DIRECTORY)
}

/// Opens a file for reading; a symbolic link is refused, a fifo does not block.
pub(crate) fn open_file(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    open_noatime(dir, name, OFlags::NONBLOCK | OFlags::NOCTTY)
}

/// Opens the root directory of a walk. Links in `path` itself are the caller's and are followed.
pub(crate) fn open_root(path: &std::path::Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
    rustix::fs::open(path, flags, Mode::empty())
}

/// Opens the directory at `path`, relative to `root`, through real directories only. Any length: long paths are taken in pieces.
pub(crate) fn open_beneath(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    let mut at = rustix::io::fcntl_dupfd_cloexec(root, 3)?;
    let mut rest = path;
    while !rest.is_empty() {
        let take = match rest.len() {
            n if n <= 3000 => n,
            _ => match rest[..3000].iter().rposition(|b| *b == b'/') {
                Some(n) => n,
                None => return Err(Errno::NAMETOOLONG),
            },
        };
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        at = rustix::fs::openat2(at.as_fd(), &rest[..take], flags, Mode::empty(), resolve)?;
        rest = rest[take..].strip_prefix(b"/").unwrap_or(&rest[take..]);
    }
    Ok(at)
}

/// The modification and change time of the entry at `path`, relative to `root`; none where it cannot be told.
pub(crate) fn times_beneath(root: BorrowedFd<'_>, path: &[u8]) -> Option<((i64, u32), (i64, u32))> {
    let (dir, name) = match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&b""[..], path),
    };
    let dir = open_beneath(root, dir).ok()?;
    let stat = stat_at(dir.as_fd(), name).ok()?;
    Some((stat.mtime, stat.ctime))
}

/// The names in a directory, sorted, without `.` and `..`. Reads from the beginning.
pub(crate) fn names(
    dir: BorrowedFd<'_>,
    buf: &mut Vec<MaybeUninit<u8>>,
) -> Result<Vec<Vec<u8>>, Errno> {
    rustix::fs::seek(dir, rustix::fs::SeekFrom::Start(0))?;
    buf.resize(1 << 16, MaybeUninit::uninit());
    let mut out = Vec::new();
    let mut entries = RawDir::new(dir, buf.as_mut_slice());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            if out.len() >= MAX_ENTRIES {
                return Err(Errno::OVERFLOW);
            }
            out.push(name.to_vec());
        }
    }
    out.sort_unstable();
    Ok(out)
}

/// The flags of an open file that belong to a tree; 0 where the file system has none.
pub(crate) fn flags(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    match rustix::fs::ioctl_getflags(fd) {
        Ok(flags) => Ok((flags & KEPT_FLAGS).bits()),
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => Ok(0),
        Err(e) => Err(e),
    }
}

/// Sets the kept flags of an open file to exactly `flags`; the others stay as the file system has them.
pub(crate) fn set_flags(fd: BorrowedFd<'_>, flags: u32) -> Result<(), Errno> {
    let now = match rustix::fs::ioctl_getflags(fd) {
        Ok(now) => now,
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) if flags == 0 => {
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let want = (now - KEPT_FLAGS) | (IFlags::from_bits_retain(flags) & KEPT_FLAGS);
    match want == now {
        true => Ok(()),
        false => rustix::fs::ioctl_setflags(fd, want),
    }
}

const FS_IOC_GETVERSION: rustix::ioctl::Opcode =
    rustix::ioctl::opcode::read::<libc::c_long>(b'v', 1);

/// The generation of an open file's inode: another file that gets the same inode number later has another one. None where the file system does not tell.
pub(crate) fn generation(fd: BorrowedFd<'_>) -> Option<u32> {
    // The kernel writes an int, though the request's number says long: room for a long is enough for both.
    // SAFETY: FS_IOC_GETVERSION writes at most a long through the pointer, which `Getter` provides room for.
    let value = unsafe {
        let get = rustix::ioctl::Getter::<FS_IOC_GETVERSION, [u32; 2]>::new();
        rustix::ioctl::ioctl(fd, get)
    };
    value.ok().map(|v| v[0])
}

/// A path by which the calls that take no descriptor reach the entry `name` of `dir` itself, links not followed.
fn proc_path(dir: BorrowedFd<'_>, name: &[u8]) -> Result<CString, Errno> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    CString::new(path).map_err(|_| Errno::INVAL)
}

/// Extended attributes, name and value.
pub(crate) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Where to find extended attributes.
#[derive(Clone, Copy)]
pub(crate) enum XattrOf<'a> {
    Open(BorrowedFd<'a>),
    /// For what must not be opened: symbolic links, devices, fifos, sockets.
    Entry(BorrowedFd<'a>, &'a [u8]),
}

/// All extended attributes whose names `keep` accepts, sorted by name.
pub(crate) fn xattrs(of: XattrOf<'_>, keep: impl Fn(&[u8]) -> bool) -> Result<Xattrs, Errno> {
    let mut small = [0u8; 1024];
    let path = match of {
        XattrOf::Open(_) => CString::default(),
        XattrOf::Entry(dir, name) => proc_path(dir, name)?,
    };
    let list = |buf: &mut [u8]| match of {
        XattrOf::Open(fd) => rustix::fs::flistxattr(fd, buf),
        XattrOf::Entry(..) => rustix::fs::llistxattr(&path, buf),
    };
    let mut large;
    let listed: &[u8] = match list(&mut small) {
        Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Ok(n) => &small[..n],
        Err(Errno::RANGE) => {
            large = vec![0u8; MAX_XATTR_LIST];
            let n = list(&mut large)?;
            &large[..n]
        }
        Err(e) => return Err(e),
    };
    let mut out = Vec::new();
    let mut value = Vec::new();
    for name in listed.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        if !keep(name) {
            continue;
        }
        value.resize(MAX_XATTR_VALUE, 0u8);
        let got = match of {
            XattrOf::Open(fd) => rustix::fs::fgetxattr(fd, name, &mut value[..]),
            XattrOf::Entry(..) => rustix::fs::lgetxattr(&path, name, &mut value[..]),
        };
        match got {
            Ok(n) => out.push((name.to_vec(), value[..n].to_vec())),
            // Gone since it was listed, or listed but not readable here.
            Err(Errno::NODATA) => {}
            Err(e) => return Err(e),
        }
    }
    out.sort_unstable();
    Ok(out)
}

/// Sets one extended attribute.
pub(crate) fn set_xattr(of: XattrOf<'_>, name: &[u8], value: &[u8]) -> Result<(), Errno> {
    match of {
        XattrOf::Open(fd) => rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()),
        XattrOf::Entry(dir, entry) => {
            let path = proc_path(dir, entry)?;
            rustix::fs::lsetxattr(&path, name, value, XattrFlags::empty())
        }
    }
}

/// Removes one extended attribute of an open file.
pub(crate) fn remove_xattr(fd: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::fremovexattr(fd, name) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        result => result,
    }
}

/// Reads exactly `buf` at `at`; false where the file ends before.
pub(crate) fn read_exact_at(
    fd: BorrowedFd<'_>,
    mut buf: &mut [u8],
    mut at: u64,
) -> Result<bool, Errno> {
    while !buf.is_empty() {
        match rustix::io::pread(fd, &mut *buf, at) {
            Ok(0) => return Ok(false),
            Ok(n) => {
                buf = &mut buf[n..];
                at += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

/// Writes all of `buf` at `at`.
pub(crate) fn write_all_at(fd: BorrowedFd<'_>, mut buf: &[u8], mut at: u64) -> Result<(), Errno> {
    while !buf.is_empty() {
        match rustix::io::pwrite(fd, buf, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => {
                buf = &buf[n..];
                at += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Calls `data` for each stretch of the first `size` bytes that may hold data, and `hole` for each that does not, in order.
pub(crate) fn stretches<E: From<Errno>>(
    fd: BorrowedFd<'_>,
    stat: &Stat,
    mut each: impl FnMut(Stretch) -> Result<(), E>,
) -> Result<(), E> {
    use rustix::fs::{SeekFrom, seek};
    let size = stat.size;
    // As many blocks as bytes: no hole worth looking for.
    if stat.blocks.saturating_mul(512) >= size {
        return match size {
            0 => Ok(()),
            _ => each(Stretch::Data { at: 0, len: size }),
        };
    }
    let mut at = 0;
    while at < size {
        let data = match seek(fd, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            Err(Errno::NXIO) => size,
            // The file system knows no holes: all is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                let len = size - at;
                return each(Stretch::Data { at, len });
            }
            Err(e) => return Err(e.into()),
        };
        if data > at {
            each(Stretch::Hole { len: data - at })?;
        }
        if data >= size {
            break;
        }
        let end = seek(fd, SeekFrom::Hole(data))?.min(size);
        // A hole that begins where the data does would never end: take the rest as data.
        let end = if end <= data { size } else { end };
        each(Stretch::Data {
            at: data,
            len: end - data,
        })?;
        at = end;
    }
    Ok(())
}

/// A part of a file.
pub(crate) enum Stretch {
    Data { at: u64, len: u64 },
    Hole { len: u64 },
}
