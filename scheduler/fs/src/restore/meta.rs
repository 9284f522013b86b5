//! Setting an inode's metadata. The order matters: a change of owner clears set-id bits and capabilities, and anything later would move the mtime.

use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid};
use tidepool_proto::tree::Meta;

use super::{RestoreError, io};
use crate::capture::{TreeKind, keeps, shown};
use crate::sys::{self, XattrOf};

fn times(meta: &Meta) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: meta.mtime_s,
            tv_nsec: meta.mtime_ns.into(),
        },
    }
}

fn xattrs(of: XattrOf<'_>, meta: &Meta, kind: TreeKind, path: &[u8]) -> Result<(), RestoreError> {
    for (name, value) in &meta.xattrs {
        let shown_name = String::from_utf8_lossy(name);
        if !keeps(kind, name) || name.as_slice() == b"trusted.overlay.metacopy" {
            return Err(RestoreError::Unsupported {
                path: shown(path),
                why: format!("the extended attribute {shown_name}"),
            });
        }
        sys::set_xattr(of, name, value)
            .map_err(|e| io(format!("set extended attribute {shown_name} of"), path, e))?;
    }
    Ok(())
}

/// Of an open file or directory.
pub(crate) fn set_open(
    fd: BorrowedFd<'_>,
    meta: &Meta,
    kind: TreeKind,
    path: &[u8],
) -> Result<(), RestoreError> {
    let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
    rustix::fs::fchown(fd, Some(uid), Some(gid)).map_err(|e| io("set owner of", path, e))?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(meta.mode))
        .map_err(|e| io("set mode of", path, e))?;
    xattrs(XattrOf::Open(fd), meta, kind, path)?;
    rustix::fs::futimens(fd, &times(meta)).map_err(|e| io("set times of", path, e))
}

/// Of an entry that must not be opened.
pub(crate) fn set_entry(
    dir: BorrowedFd<'_>,
    name: &[u8],
    is_link: bool,
    meta: &Meta,
    kind: TreeKind,
    path: &[u8],
) -> Result<(), RestoreError> {
    let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(dir, name, Some(uid), Some(gid), nofollow)
        .map_err(|e| io("set owner of", path, e))?;
    if !is_link {
        rustix::fs::chmodat(dir, name, Mode::from_raw_mode(meta.mode), AtFlags::empty())
            .map_err(|e| io("set mode of", path, e))?;
    }
    xattrs(XattrOf::Entry(dir, name), meta, kind, path)?;
    rustix::fs::utimensat(dir, name, &times(meta), nofollow)
        .map_err(|e| io("set times of", path, e))
}
