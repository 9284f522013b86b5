//! The less common system calls of the cases, and what a case keeps open between its two halves.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};

/// What a case holds on to from its preparation to its act.
#[derive(Default)]
pub(crate) struct Cx {
    pub(crate) file: Option<File>,
    map: Option<*mut u8>,
    stored: u8,
}

impl Cx {
    pub(crate) fn held(&mut self) -> Result<&mut File> {
        self.file.as_mut().context("nothing held")
    }

    /// Maps a new, clean file of two pages shared and writable. The mapping lives as long as the process.
    pub(crate) fn map_new(&mut self, path: &str) -> Result<()> {
        std::fs::write(path, [1u8; 8192])?;
        let file = rw(path)?;
        file.sync_all()?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                8192,
                protection,
                flags,
                file.as_raw_fd(),
                0,
            )
        };
        ensure!(
            at != libc::MAP_FAILED,
            "mmap: {}",
            io::Error::last_os_error()
        );
        self.map = Some(at.cast());
        Ok(())
    }

    /// Changes what may be done with the mapping.
    pub(crate) fn protect(&mut self, protection: i32) -> Result<()> {
        let at = self.map.context("nothing mapped")?;
        // SAFETY: the mapping is 8192 bytes; it is not stored to before it is writable again.
        let answer = unsafe { libc::mprotect(at.cast(), 8192, protection) };
        ensure!(answer == 0, "mprotect: {}", io::Error::last_os_error());
        Ok(())
    }

    /// Stores another value into the first page of the mapping.
    pub(crate) fn store(&mut self) -> Result<()> {
        let at = self.map.context("nothing mapped")?;
        self.stored = self.stored.wrapping_add(1);
        // SAFETY: the mapping is 8192 writable bytes and is never unmapped; nothing else here refers to it.
        unsafe { at.write_volatile(self.stored) };
        Ok(())
    }
}

pub(crate) fn rw(path: &str) -> Result<File> {
    Ok(OpenOptions::new().read(true).write(true).open(path)?)
}

pub(crate) fn append(path: &str) -> Result<File> {
    Ok(OpenOptions::new().append(true).open(path)?)
}

pub(crate) fn sendfile(from: &str, to: &str) -> Result<()> {
    let (from, to) = (File::open(from)?, rw(to)?);
    let sent = rustix::fs::sendfile(&to, &from, None, 100)?;
    ensure!(sent == 100, "{sent} bytes sent");
    Ok(())
}

pub(crate) fn copy_file_range(from: &str, to: &str) -> Result<()> {
    let (from, to) = (File::open(from)?, rw(to)?);
    let copied = rustix::fs::copy_file_range(&from, None, &to, None, 4096)?;
    ensure!(copied == 4096, "{copied} bytes copied");
    Ok(())
}

pub(crate) fn splice(to: &str) -> Result<()> {
    let (mut reader, mut writer) = io::pipe()?;
    io::Write::write_all(&mut writer, b"through a pipe")?;
    let to = rw(to)?;
    let no_offset = std::ptr::null_mut();
    // SAFETY: both descriptors are open; no offsets are given.
    let moved = unsafe {
        libc::splice(
            reader.as_raw_fd(),
            no_offset,
            to.as_raw_fd(),
            no_offset,
            14,
            0,
        )
    };
    ensure!(
        moved == 14,
        "splice moved {moved}: {}",
        io::Error::last_os_error()
    );
    io::Read::read(&mut reader, &mut []).map(drop)?;
    Ok(())
}

pub(crate) fn fallocate(path: &str, mode: i32, at: i64, length: i64) -> Result<()> {
    let file = rw(path)?;
    // SAFETY: no pointers.
    let answer = unsafe { libc::fallocate(file.as_raw_fd(), mode, at, length) };
    ensure!(answer == 0, "fallocate: {}", io::Error::last_os_error());
    Ok(())
}

pub(crate) fn direct_write(path: &str) -> Result<()> {
    #[repr(align(4096))]
    struct Block([u8; 4096]);
    let block = Block([b'd'; 4096]);
    let mut file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    Ok(io::Write::write_all(&mut file, &block.0)?)
}

pub(crate) fn sparse_write(path: &str) -> Result<()> {
    let mut file = rw(path)?;
    file.seek(SeekFrom::Start(1 << 20))?;
    Ok(io::Write::write_all(&mut file, b"far out")?)
}

pub(crate) fn vectored_write(path: &str) -> Result<()> {
    let parts = [io::IoSlice::new(b"ab"), io::IoSlice::new(b"cd")];
    let written = rustix::io::pwritev(rw(path)?, &parts, 3)?;
    ensure!(written == 4, "{written} bytes written");
    Ok(())
}

pub(crate) fn times(path: &str, flags: AtFlags) -> Result<()> {
    let at = |tv_sec| rustix::fs::Timespec { tv_sec, tv_nsec: 5 };
    let times = rustix::fs::Timestamps {
        last_access: at(1_000_000),
        last_modification: at(2_000_000),
    };
    Ok(rustix::fs::utimensat(CWD, path, &times, flags)?)
}

pub(crate) fn set_acl(path: &str) -> Result<()> {
    // posix_acl_xattr: version 2, then tag, permissions, id of owner, user 1000, group, mask and others.
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 4, 1000),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 4, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    set_xattr(path, "system.posix_acl_access", &acl)
}

pub(crate) fn set_xattr(path: &str, name: &str, value: &[u8]) -> Result<()> {
    Ok(rustix::fs::lsetxattr(
        path,
        name,
        value,
        rustix::fs::XattrFlags::empty(),
    )?)
}

pub(crate) fn set_flags(path: &str) -> Result<()> {
    let file = File::open(path)?;
    let flags = rustix::fs::ioctl_getflags(&file)?;
    Ok(rustix::fs::ioctl_setflags(
        &file,
        flags | rustix::fs::IFlags::NODUMP,
    )?)
}

pub(crate) fn tmpfile() -> Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = File::from(rustix::fs::open(".", flags, Mode::from_raw_mode(0o644))?);
    io::Write::write_all(&mut &file, b"nameless so far")?;
    Ok(file)
}

pub(crate) fn link_open_file(file: &File, to: &str) -> Result<()> {
    Ok(rustix::fs::linkat(file, "", CWD, to, AtFlags::EMPTY_PATH)?)
}

pub(crate) fn mknod(path: &str, kind: libc::mode_t) -> Result<()> {
    let path = CString::new(Path::new(path).as_os_str().as_bytes())?;
    // SAFETY: a terminated string that outlives the call.
    let answer = unsafe { libc::mknod(path.as_ptr(), kind | 0o644, 0) };
    ensure!(answer == 0, "mknod: {}", io::Error::last_os_error());
    Ok(())
}

pub(crate) fn exchange(a: &str, b: &str) -> Result<()> {
    Ok(rustix::fs::renameat_with(
        CWD,
        a,
        CWD,
        b,
        rustix::fs::RenameFlags::EXCHANGE,
    )?)
}

/// Runs `work` in a child process, in a pid namespace of its own when `nested`.
pub(crate) fn in_child(nested: bool, work: fn() -> Result<()>) -> Result<()> {
    // SAFETY: this process has one thread, so the child is a whole one.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error().into()),
        0 => {
            let outcome = if nested {
                // SAFETY: no pointers; one thread.
                let answer = unsafe { libc::unshare(libc::CLONE_NEWPID) };
                if answer == 0 {
                    in_child(false, work)
                } else {
                    Err(io::Error::last_os_error().into())
                }
            } else {
                work()
            };
            // SAFETY: ends the child without running what its parent registered for its own end.
            unsafe { libc::_exit(i32::from(outcome.is_err())) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
            ensure!(waited == pid && status == 0, "the child failed: {status}");
            Ok(())
        }
    }
}

/// Writes through a descriptor received over a unix socket, as brokers do.
pub(crate) fn write_received_descriptor(path: &str) -> Result<()> {
    // Duplicating is what receiving does to the file; the sending process is this one.
    let file = rw(path)?;
    // SAFETY: no pointers; the new descriptor is owned by nothing else.
    let copy = unsafe { libc::dup(file.as_raw_fd()) };
    ensure!(copy >= 0, "dup: {}", io::Error::last_os_error());
    drop(file);
    // SAFETY: just made, owned by nothing else.
    let mut copy = unsafe { File::from_raw_fd(copy) };
    Ok(io::Write::write_all(&mut copy, b"by way of a copy")?)
}
