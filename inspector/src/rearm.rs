//! Re-arming files, so that their next change is seen.
//!
//! Two kinds of change come without an event. A page of a shared mapping that is dirty is
//! also writable, so further stores raise nothing; starting its writeback write-protects it again. And a file that was
//! written in the current clock tick has its time stamps set, so another write in the same tick changes no inode;
//! reading its change time with statx makes kernels with multigrain time stamps (6.13 and newer) take a
//! finer stamp at the next write. Older kernels need a pause of one tick between the reading and the thaw; see [`Moment`].
//! With the `ctime` probe set that pause also has changes seen of an inode that was not looked at.
//!
//! Order: freeze, [`take`](crate::Inspector::take), re-arm every upper file that is dirty or mapped shared and writable,
//! capture, thaw. Re-arming dirties nothing by itself: writeback of a frozen sandbox's file is this process's doing.
//!
//! What is mapped cannot always be found by the name it was mapped under: that name may be gone while the file has another (a second link,
//! a nameless file linked later), or be another file's where something is mounted over it. Nor is it enough to look at mappings that are writable
//! now: what `mprotect` takes it gives back, and a dirty page is then writable again without a fault. So [`mapped`] looks at all shared mappings themselves.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags};

use crate::mappings::{Mapped, shared_mappings};

/// At least one clock tick on every kernel (the longest is 10 ms).
const TICK: Duration = Duration::from_millis(11);

/// Between two looks at the clock.
const STEP: Duration = Duration::from_micros(300);

/// The moment of a reading, by the clock that stamps are taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment(i64, i64);

impl Moment {
    /// As it is now; taken after the reading.
    #[must_use]
    pub fn now() -> Self {
        // It moves with the clock of the stamps, and nobody sets it.
        let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
        Self(now.tv_sec, now.tv_nsec)
    }

    /// Waits until a stamp set from now on is another one than any that was set before: for the rest of a tick. Whoever lets a sandbox go on only after that
    /// sees its next change of an inode also where nobody has looked at that one.
    pub fn outlast(self) {
        let began = Instant::now();
        while self == Self::now() && began.elapsed() < TICK {
            std::thread::sleep(STEP);
        }
    }
}

/// Re-arms one open file of the upper (opened for reading at least; `O_PATH` will not do).
///
/// # Errors
/// What the kernel answers; the file must then be treated as dirty at the next turn.
pub fn file(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd();
    query_change_time(fd)?;
    write_back(fd)
}

/// Re-arms files of an upper directory, by paths relative to it; what is gone is fine. Answers the paths that
/// could not be re-armed, with the reason: treat them as dirty at the next turn.
///
/// Symbolic links are not followed and no path leaves the directory, whatever the sandbox put there.
///
/// # Errors
/// If the upper directory itself cannot be opened.
pub fn paths<P: AsRef<Path>>(
    upper: &Path,
    relative: impl IntoIterator<Item = P>,
) -> io::Result<Vec<(PathBuf, io::Error)>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(upper, flags, Mode::empty())?;
    let mut failed = Vec::new();
    for path in relative {
        let path = path.as_ref();
        match beneath(root.as_fd(), path) {
            Ok(()) => {}
            // Gone, or something else is where a directory of its path was.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) => {}
            Err(e) => failed.push((path.to_owned(), e)),
        }
    }
    Ok(failed)
}

/// Re-arms every file that these processes have mapped shared, under whatever name, or none, and whether it can be stored to now or only after an `mprotect`. `root` is how the mappings name
/// the directory over which the sandbox's overlay is mounted: `/` where that is the root of its mount namespace.
///
/// A file that is found under its name in the upper costs as much as in [`paths`]; any other is synced through its mapping, which waits for the
/// device. Answers what could not be re-armed, with the reason: treat every file as dirty at the next turn. Processes that are gone are fine.
///
/// # Errors
/// If the upper directory cannot be opened, or the mappings of a process cannot be read.
pub fn mapped(
    upper: &Path,
    root: &Path,
    pids: impl IntoIterator<Item = u32>,
) -> io::Result<Vec<(PathBuf, io::Error)>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let upper = rustix::fs::open(upper, flags, Mode::empty())?;
    let mut failed = Vec::new();
    let mut done = HashSet::new();
    for pid in pids {
        for mapped in shared_mappings(pid)? {
            match one_mapping(upper.as_fd(), root, &mapped, &mut done) {
                Ok(()) => {}
                // Unmapped meanwhile, or the process is gone.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => failed.push((mapped.mapping.path, e)),
            }
        }
    }
    Ok(failed)
}

fn one_mapping(
    upper: BorrowedFd<'_>,
    root: &Path,
    mapped: &Mapped,
    done: &mut HashSet<(u64, u64)>,
) -> io::Result<()> {
    let mapping = &mapped.mapping;
    let link = format!("/proc/{}/map_files/{}", mapping.pid, mapped.range);
    let place = rustix::fs::open(link, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let stat = rustix::fs::fstat(&place)?;
    // What is no regular file has no pages of an upper; opening it could act.
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
        || !done.insert((stat.st_dev, stat.st_ino))
    {
        return Ok(());
    }
    let name = mapping.path.strip_prefix(root).ok();
    if let Some(name) = name.filter(|_| !mapping.deleted) {
        match open_beneath(upper, name) {
            // The same number on another device is taken for the same file only where the name is the same too. A file that was
            // copied up shows another number through the overlay than in the upper, and takes the long way.
            Ok(found) if rustix::fs::fstat(&found)?.st_ino == stat.st_ino => {
                return arm(found.as_fd());
            }
            _ => {}
        }
    }
    let open = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(
        format!("/proc/self/fd/{}", place.as_raw_fd()),
        open,
        Mode::empty(),
    )?;
    // Starting writeback of an overlay's file does nothing to the file below; syncing it does.
    Ok(rustix::fs::fdatasync(&file)?)
}

fn open_beneath(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    openat2(root, path, OFlags::PATH | OFlags::NOFOLLOW, resolve)
}

fn beneath(root: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    arm(open_beneath(root, path)?.as_fd())
}

/// Re-arms what an `O_PATH` descriptor stands for.
fn arm(place: BorrowedFd<'_>) -> io::Result<()> {
    let mode = query_change_time(place)?;
    if FileType::from_raw_mode(mode) != FileType::RegularFile {
        // Only regular files have pages to write back; opening a pipe or a device could block or act.
        return Ok(());
    }
    let open = OFlags::RDONLY | OFlags::NOATIME | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(
        format!("/proc/self/fd/{}", place.as_raw_fd()),
        open,
        Mode::empty(),
    )?;
    write_back(file.as_fd())
}

fn openat2(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> io::Result<OwnedFd> {
    // EAGAIN: something was renamed during the walk and the kernel could not rule out an escape.
    for _ in 0..64 {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            // A component became a symbolic link: the name is not the one that was dirty.
            other => return other.map_err(io::Error::from),
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// Marks the change time as seen. Answers the file's mode.
fn query_change_time(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    let wanted = StatxFlags::TYPE | StatxFlags::CTIME | StatxFlags::MTIME;
    let stat = rustix::fs::statx(fd, "", flags, wanted)?;
    Ok(u32::from(stat.stx_mode))
}

/// Starts writeback of all dirty pages, after waiting for such as is under way: a page that is dirtied
/// again while it is being written would otherwise be passed over and stay writable.
fn write_back(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: no pointers; `fd` is open for the duration of the call.
    let answer = unsafe { libc::sync_file_range(fd.as_raw_fd(), 0, 0, flags) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
