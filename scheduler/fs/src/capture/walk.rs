//! Reading a whole directory into an index, without recursion.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::FileType;

use super::{CaptureError, Ctx, io};
use crate::index::{Dir, DirId, Name, TreeIndex, join};
use crate::stack::DirStack;
use crate::sys;

/// A directory whose subdirectories are still to be walked.
struct Level {
    id: DirId,
    path: Vec<u8>,
    subdirs: Vec<Vec<u8>>,
}

/// Reads the directory `fd`, which is `name` in `parent`, and all below it, into the index.
pub(super) fn walk(
    ctx: &mut Ctx<'_>,
    index: &mut TreeIndex,
    fd: OwnedFd,
    parent: Option<DirId>,
    name: Name,
    path: Vec<u8>,
) -> Result<DirId, CaptureError> {
    let mut stack = DirStack::new(fd).map_err(|e| io("stat", &path, e))?;
    let top = enter(ctx, index, &stack, parent, name, path)?;
    let id = top.id;
    let mut levels = vec![top];
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.subdirs.pop() else {
            let done = levels.pop();
            if !levels.is_empty() {
                let path = done.map(|l| l.path).unwrap_or_default();
                stack.pop().map_err(|e| io("leave", &path, e))?;
            }
            continue;
        };
        let (parent, path) = (level.id, join(&level.path, &name));
        let up = stack.top().map_err(|e| io("open", &path, e))?;
        let fd = sys::open_dir(up, &name).map_err(|e| io("open", &path, e))?;
        stack.push(fd).map_err(|e| io("stat", &path, e))?;
        let name = Name::from(name);
        levels.push(enter(ctx, index, &stack, Some(parent), name, path)?);
    }
    Ok(id)
}

/// Reads the top directory's own metadata and leaves, and lists its subdirectories.
fn enter(
    ctx: &mut Ctx<'_>,
    index: &mut TreeIndex,
    stack: &DirStack,
    parent: Option<DirId>,
    name: Name,
    path: Vec<u8>,
) -> Result<Level, CaptureError> {
    let fd = stack.top().map_err(|e| io("open", &path, e))?;
    let stat = sys::stat_fd(fd).map_err(|e| io("stat", &path, e))?;
    let id = index.add_dir(Dir {
        parent,
        name,
        ino: stat.ino,
        generation: sys::generation(fd),
        meta: ctx.meta(fd, &stat, &path)?,
        mtime: stat.mtime,
        children: Default::default(),
        node: None,
        files: 0,
        bytes: 0,
        stale: true,
    });
    let mut subdirs = Vec::new();
    if stat.dev != index.dev {
        ctx.note(&path, "a mount point, captured as an empty directory");
        return Ok(Level { id, path, subdirs });
    }
    let names = sys::names(fd, &mut ctx.dir_buf).map_err(|e| io("list", &path, e))?;
    for name in names {
        let at = join(&path, &name);
        let stat = sys::stat_at(fd, &name).map_err(|e| io("stat", &at, e))?;
        if stat.kind == FileType::Directory {
            subdirs.push(name);
        } else if stat.dev != index.dev {
            ctx.note(&at, "a mounted file, left out");
        } else if let (true, true, Some(deferred)) = (
            path.is_empty(),
            crate::dump::is_pages(&name),
            &mut ctx.defer,
        ) {
            deferred.push(name);
        } else {
            let leaf = ctx.leaf(fd, &name, &stat, &at)?;
            index.put_leaf(id, Name::from(name), leaf);
        }
    }
    // Taken from the end: in order.
    subdirs.reverse();
    Ok(Level { id, path, subdirs })
}

/// Opens the directory of an index by its path and makes sure that it is the one the index means. None where something else is there now.
pub(super) fn open_indexed(
    root: std::os::fd::BorrowedFd<'_>,
    index: &TreeIndex,
    id: DirId,
) -> Result<Option<(OwnedFd, Vec<u8>)>, CaptureError> {
    use rustix::io::Errno;
    let (Some(path), Some(dir)) = (index.path(id), index.dirs.get(&id)) else {
        return Ok(None);
    };
    let fd = match sys::open_beneath(root, &path) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => return Ok(None),
        Err(e) => return Err(io("open", &path, e)),
    };
    let stat = sys::stat_fd(fd.as_fd()).map_err(|e| io("stat", &path, e))?;
    let same = stat.ino == dir.ino
        && stat.dev == index.dev
        && sys::generation(fd.as_fd()) == dir.generation;
    Ok(same.then_some((fd, path)))
}
