//! What operations on files are made of. No state.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{AtFlags, CWD, RenameFlags, Timespec, Timestamps};

use crate::child::last;

pub(super) fn rw(path: &str) -> Result<File> {
    // Not blocking: a name may be that of a pipe.
    Ok(OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?)
}

pub(super) fn ro(path: &str) -> Result<File> {
    let mut options = OpenOptions::new();
    Ok(options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?)
}

/// Makes a file or replaces its content.
pub(super) fn write_all(path: &str, bytes: &[u8]) -> Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    let mut file = options.custom_flags(libc::O_NONBLOCK).open(path)?;
    Ok(file.write_all(bytes)?)
}

pub(super) fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while (bytes.len() as u64) < len {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.extend(word.to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

pub(super) fn shm(name: &str) -> String {
    format!("/dev/shm/{name}")
}

pub(super) fn direct(path: &str, byte: u8) -> Result<()> {
    #[repr(align(4096))]
    struct Block([u8; 4096]);
    let block = Block([byte; 4096]);
    let flags = libc::O_DIRECT | libc::O_NONBLOCK;
    let mut options = OpenOptions::new();
    let mut file = options
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file.write_all(&block.0)?)
}

pub(super) fn splice(path: &str) -> Result<()> {
    let (reader, mut writer) = std::io::pipe()?;
    writer.write_all(b"through a pipe")?;
    let to = rw(path)?;
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are open; no offsets are given.
    let moved = unsafe { libc::splice(reader.as_raw_fd(), none, to.as_raw_fd(), none, 14, 0) };
    ensure!(moved == 14, "{}", last());
    Ok(())
}

pub(super) fn renameat(from: &str, to: &str, flags: RenameFlags) -> Result<()> {
    Ok(rustix::fs::renameat_with(CWD, from, CWD, to, flags)?)
}

pub(super) fn utimes(path: &str, when: &str) -> Result<()> {
    match when {
        "now" => {
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: libc::UTIME_NOW,
            };
            let times = Timestamps {
                last_access: now,
                last_modification: now,
            };
            Ok(rustix::fs::utimensat(
                CWD,
                path,
                &times,
                AtFlags::SYMLINK_NOFOLLOW,
            )?)
        }
        seconds => set_times(path, seconds.parse()?, 5),
    }
}

pub(super) fn set_times(path: &str, tv_sec: i64, tv_nsec: i64) -> Result<()> {
    let at = Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: at,
        last_modification: at,
    };
    Ok(rustix::fs::utimensat(
        CWD,
        path,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

pub(super) fn set_xattr(path: &str, name: &str, value: &[u8]) -> Result<()> {
    let flags = rustix::fs::XattrFlags::empty();
    Ok(rustix::fs::lsetxattr(path, name, value, flags)?)
}

pub(super) fn acl(path: &str, user: u32) -> Result<()> {
    // posix_acl_xattr: version 2, then tag, permissions, id of owner, user, group, mask and others.
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 4, user),
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

/// Looks at everything in ways that change nothing.
pub(super) fn read_all(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let meta = fs::symlink_metadata(&path)?;
        if meta.is_dir() {
            read_all(&path)?;
        } else if meta.is_file() {
            File::open(&path)?.read_to_end(&mut Vec::new())?;
        } else if meta.is_symlink() {
            fs::read_link(&path)?;
        }
    }
    Ok(())
}

/// Writes what is there already, and leaves the times as they were: nothing has changed.
pub(super) fn same_bytes(path: &str) -> Result<()> {
    let file = rw(path)?;
    let meta = file.metadata()?;
    let mut bytes = vec![0; meta.len().min(1 << 20) as usize];
    file.read_exact_at(&mut bytes, 0)?;
    file.write_all_at(&bytes, 0)?;
    set_times(path, meta.mtime(), meta.mtime_nsec())
}

/// Changes a file's bytes and sets its time back, as tools do that hide their work or keep caches valid.
pub(super) fn behind_times(path: &str, byte: u8) -> Result<()> {
    let file = rw(path)?;
    let meta = file.metadata()?;
    ensure!(meta.len() > 0, "empty");
    file.write_all_at(&[byte], u64::from(byte) % meta.len())?;
    set_times(path, meta.mtime(), meta.mtime_nsec())
}

/// Something, and then its opposite.
pub(super) fn there_and_back(what: &str, path: &str, dir: &str) -> Result<()> {
    let other = format!("{dir}/there-and-back");
    match what {
        "rename" => {
            fs::rename(path, &other)?;
            fs::rename(&other, path)?;
        }
        "link" => {
            fs::hard_link(path, &other)?;
            fs::remove_file(&other)?;
        }
        "xattr" => {
            set_xattr(path, "user.passing", b"1")?;
            rustix::fs::lremovexattr(path, "user.passing")?;
        }
        "mkdir" => {
            fs::create_dir(&other)?;
            fs::remove_dir(&other)?;
        }
        "symlink" => {
            std::os::unix::fs::symlink(path, &other)?;
            fs::remove_file(&other)?;
        }
        "fifo" => {
            fifo(&other)?;
            fs::remove_file(&other)?;
        }
        "chmod" => {
            let meta = fs::metadata(path)?;
            fs::set_permissions(path, PermissionsExt::from_mode(0o711))?;
            fs::set_permissions(path, meta.permissions())?;
        }
        "times" => {
            let meta = fs::symlink_metadata(path)?;
            utimes(path, "77")?;
            set_times(path, meta.mtime(), meta.mtime_nsec())?;
        }
        "truncate" => {
            let file = rw(path)?;
            let meta = file.metadata()?;
            file.set_len(meta.len() + 10_000)?;
            file.set_len(meta.len())?;
            set_times(path, meta.mtime(), meta.mtime_nsec())?;
        }
        "file" => {
            fs::write(&other, b"for a moment")?;
            fs::remove_file(&other)?;
        }
        _ => anyhow::bail!("no such way: {what}"),
    }
    Ok(())
}

pub(super) fn fifo(path: &str) -> Result<()> {
    let path = CString::new(path)?;
    // SAFETY: a terminated string that outlives the call.
    let answer = unsafe { libc::mkfifo(path.as_ptr(), 0o644) };
    ensure!(answer == 0, "{}", last());
    Ok(())
}
