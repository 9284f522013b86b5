//! Removing a directory with everything in it, whatever its depth and flags.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;

use super::{RestoreError, io};
use crate::index::join;
use crate::stack::DirStack;
use crate::sys;

/// Removes `path` and all below it: immutable and append-only files too, and any depth. Links are removed, not followed; another file system mounted in it is an
/// error. Nothing there is no error.
pub fn remove_tree(path: &Path) -> Result<(), RestoreError> {
    let whole = |op: &str, e: std::io::Error| RestoreError::Io {
        op: op.into(),
        path: path.display().to_string(),
        source: e,
    };
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(whole("stat", e)),
    };
    if !meta.is_dir() {
        return std::fs::remove_file(path).map_err(|e| whole("remove", e));
    }
    let root = sys::open_root(path).map_err(|e| whole("open", e.into()))?;
    remove_below(root)?;
    std::fs::remove_dir(path).map_err(|e| whole("remove", e))
}

/// A directory that is emptied.
struct Level {
    path: Vec<u8>,
    name: Vec<u8>,
    /// Subdirectories still to go.
    subdirs: Vec<Vec<u8>>,
}

/// Removes all that is in an open directory.
pub(crate) fn remove_below(root: std::os::fd::OwnedFd) -> Result<(), RestoreError> {
    let dev = sys::stat_fd(root.as_fd())
        .map_err(|e| io("stat", b"", e))?
        .dev;
    let mut stack = DirStack::new(root).map_err(|e| io("stat", b"", e))?;
    let mut buf = Vec::new();
    let mut levels: Vec<Level> = Vec::new();
    let mut enter = Some((Vec::new(), Vec::new()));
    loop {
        if let Some((path, name)) = enter.take() {
            let fd = stack.top().map_err(|e| io("open", &path, e))?;
            let stat = sys::stat_fd(fd).map_err(|e| io("stat", &path, e))?;
            if stat.dev != dev {
                return Err(io("remove mount point", &path, Errno::XDEV));
            }
            sys::set_flags(fd, 0).map_err(|e| io("clear flags of", &path, e))?;
            let mut subdirs = Vec::new();
            for name in sys::names(fd, &mut buf).map_err(|e| io("list", &path, e))? {
                let at = join(&path, &name);
                match sys::stat_at(fd, &name) {
                    Ok(s) if s.kind == FileType::Directory => {
                        subdirs.push(name);
                        continue;
                    }
                    Ok(_) => {}
                    Err(Errno::NOENT) => continue,
                    Err(e) => return Err(io("stat", &at, e)),
                }
                let unlink = || rustix::fs::unlinkat(fd, name.as_slice(), AtFlags::empty());
                let removed = unlink().or_else(|e| match e {
                    Errno::PERM => {
                        sys::set_flags(sys::open_file(fd, &name)?.as_fd(), 0)?;
                        unlink()
                    }
                    Errno::NOENT => Ok(()),
                    e => Err(e),
                });
                removed.map_err(|e| io("remove", &at, e))?;
            }
            levels.push(Level {
                path,
                name,
                subdirs,
            });
        }
        let Some(Level { path, subdirs, .. }) = levels.last_mut() else {
            return Ok(());
        };
        if let Some(name) = subdirs.pop() {
            let at = join(path, &name);
            let up = stack.top().map_err(|e| io("open", &at, e))?;
            let fd = sys::open_dir(up, &name).map_err(|e| io("open", &at, e))?;
            stack.push(fd).map_err(|e| io("open", &at, e))?;
            enter = Some((at, name));
            continue;
        }
        if let Some(Level { path, name, .. }) = levels.pop()
            && !levels.is_empty()
        {
            stack.pop().map_err(|e| io("leave", &path, e))?;
            let up = stack.top().map_err(|e| io("open", &path, e))?;
            rustix::fs::unlinkat(up, name.as_slice(), AtFlags::REMOVEDIR)
                .map_err(|e| io("remove directory", &path, e))?;
        }
    }
}
