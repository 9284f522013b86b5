//! Bringing an index up to date from a list of dirty inodes.
//!
//! First the structure: every dirty directory is listed again, parents before children. One that can't be found at its path waits until the directories that
//! moved above it are done; one that is gone by then was deleted. A directory that turns up at a new place is taken over as it is
//! known if it is the same inode of the same generation (then nothing in it changed but what is dirty itself), else it is read as new.
//! Then the content: every dirty file is cut again at each of its places.
//!
//! Matching is by inode number alone where that means reading more, and by generation too where it would mean reading less.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::walk::{open_indexed, walk};
use super::{CaptureError, Ctx, DirtyInode, io};
use crate::index::{Child, DirId, Leaf, Name, TreeIndex, join};
use crate::sys::{self, Stat};

/// Why the index can't be relied on.
type Doubt = String;

/// The index as it is now, or why only a full walk can tell.
pub(super) fn refresh(
    ctx: &mut Ctx<'_>,
    root: BorrowedFd<'_>,
    previous: &TreeIndex,
    dirty: &[DirtyInode],
) -> Result<Result<TreeIndex, Doubt>, CaptureError> {
    let stat = sys::stat_fd(root).map_err(|e| io("stat", b"", e))?;
    let known = previous.dirs.get(&previous.root);
    if stat.dev != previous.dev || known.is_none_or(|d| d.ino != stat.ino) {
        return Ok(Err("the directory is not the one that was captured".into()));
    }
    let mut fresh = Refresh {
        ctx,
        root,
        index: previous.clone(),
        dirty: dirty
            .iter()
            .filter(|d| d.dev == previous.dev)
            .map(|d| d.ino)
            .collect(),
        put: BTreeSet::new(),
    };
    if let Err(doubt) = fresh.structure()? {
        return Ok(Err(doubt));
    }
    if let Err(doubt) = fresh.content()? {
        return Ok(Err(doubt));
    }
    Ok(Ok(fresh.index))
}

struct Refresh<'r, 'c> {
    ctx: &'r mut Ctx<'c>,
    root: BorrowedFd<'r>,
    index: TreeIndex,
    dirty: BTreeSet<u64>,
    /// Places whose leaf was read in this capture.
    put: BTreeSet<(DirId, Name)>,
}

impl Refresh<'_, '_> {
    fn structure(&mut self) -> Result<Result<(), Doubt>, CaptureError> {
        let mut queue: Vec<(usize, DirId)> = self
            .dirty
            .iter()
            .filter_map(|ino| self.index.by_ino.get(*ino))
            .filter_map(|id| Some((self.index.depth(*id)?, *id)))
            .collect();
        queue.sort_unstable();
        let mut queue: Vec<DirId> = queue.into_iter().map(|(_, id)| id).collect();
        loop {
            let mut later = Vec::new();
            let before = queue.len();
            for id in queue {
                match open_indexed(self.root, &self.index, id)? {
                    Some((fd, path)) => {
                        if let Err(doubt) = self.list_again(id, fd.as_fd(), &path)? {
                            return Ok(Err(doubt));
                        }
                    }
                    None if self.index.dirs.contains_key(&id) => later.push(id),
                    None => {}
                }
            }
            if later.is_empty() {
                break;
            }
            if later.len() == before {
                // No move is left to be found. What has no place was deleted.
                for id in later {
                    if let Some(path) = self.index.path(id) {
                        let path = super::shown(&path);
                        return Ok(Err(format!("{path} is not where the index has it")));
                    }
                }
                break;
            }
            queue = later;
        }
        self.index.drop_orphans();
        Ok(Ok(()))
    }

    /// Lists a dirty directory again and brings its entries up to date.
    fn list_again(
        &mut self,
        id: DirId,
        fd: BorrowedFd<'_>,
        path: &[u8],
    ) -> Result<Result<(), Doubt>, CaptureError> {
        let stat = sys::stat_fd(fd).map_err(|e| io("stat", path, e))?;
        let meta = self.ctx.meta(fd, &stat, path)?;
        let names = sys::names(fd, &mut self.ctx.dir_buf).map_err(|e| io("list", path, e))?;
        let Some(dir) = self.index.change(id) else {
            return Ok(Err("a directory is not in the index".into()));
        };
        dir.meta = meta;
        dir.mtime = stat.mtime;
        let known: HashMap<Name, Child> = dir
            .children
            .iter()
            .map(|(n, c)| (n.clone(), c.clone()))
            .collect();
        let present: BTreeSet<&[u8]> = names.iter().map(Vec::as_slice).collect();
        for name in known.keys().filter(|n| !present.contains(n.as_ref())) {
            self.index.take_child(id, name);
        }
        for name in &names {
            let at = join(path, name);
            let stat = sys::stat_at(fd, name).map_err(|e| io("stat", &at, e))?;
            let child = known.get(name.as_slice());
            if stat.kind == FileType::Directory {
                let known_dir = match child {
                    Some(Child::Dir(d)) => Some(*d),
                    _ => None,
                };
                if let Err(doubt) = self.subdir(id, fd, name, &stat, known_dir, &at)? {
                    return Ok(Err(doubt));
                }
            } else if stat.dev != self.index.dev {
                self.ctx.note(&at, "a mounted file, left out");
                self.index.take_child(id, name);
            } else {
                match child {
                    Some(Child::Leaf(leaf)) if !self.is_dirty(leaf, &stat) => {}
                    _ => {
                        let leaf = self.ctx.leaf(fd, name, &stat, &at)?;
                        self.put(id, Name::from(name.as_slice()), leaf);
                    }
                }
            }
        }
        Ok(Ok(()))
    }

    /// Whether a known leaf has to be read again, given what is at its place now.
    fn is_dirty(&self, leaf: &Leaf, now: &Stat) -> bool {
        if now.is_whiteout() || leaf.is_whiteout() {
            return now.is_whiteout() != leaf.is_whiteout();
        }
        let seen = now.meta();
        // Nothing but an inode in the list can differ; looking costs nothing, as the status was read anyway.
        self.dirty.contains(&now.ino)
            || leaf.ino != now.ino
            || (seen.uid, seen.gid, seen.mtime_s, seen.mtime_ns)
                != (
                    leaf.meta.uid,
                    leaf.meta.gid,
                    leaf.meta.mtime_s,
                    leaf.meta.mtime_ns,
                )
    }

    fn put(&mut self, dir: DirId, name: Name, leaf: Arc<Leaf>) {
        self.put.insert((dir, name.clone()));
        self.index.put_leaf(dir, name, leaf);
    }

    /// Brings one subdirectory of a dirty directory up to date.
    fn subdir(
        &mut self,
        parent: DirId,
        parent_fd: BorrowedFd<'_>,
        name: &[u8],
        stat: &Stat,
        known: Option<DirId>,
        path: &[u8],
    ) -> Result<Result<(), Doubt>, CaptureError> {
        let same_ino = |d: DirId| self.index.dirs.get(&d).is_some_and(|d| d.ino == stat.ino);
        let in_place = known.filter(|d| same_ino(*d) && self.index.by_ino.get(stat.ino) == Some(d));
        if in_place.is_some() && !self.dirty.contains(&stat.ino) {
            return Ok(Ok(()));
        }
        let fd = sys::open_dir(parent_fd, name).map_err(|e| io("open", path, e))?;
        let generation = sys::generation(fd.as_fd());
        let same = |d: DirId| {
            let dir = self.index.dirs.get(&d);
            generation.is_some() && dir.is_some_and(|d| d.generation == generation)
        };
        if in_place.is_some_and(same) {
            // It is in the list itself and is looked at on its own.
            return Ok(Ok(()));
        }
        let moved = self.index.by_ino.get(stat.ino).copied();
        let moved = moved.filter(|d| same(*d) && stat.dev == self.index.dev);
        self.index.take_child(parent, name);
        let name = Name::from(name);
        match moved {
            Some(dir) => {
                let old = self.index.dirs.get(&dir).and_then(|d| d.parent);
                let old_ino = old.and_then(|p| self.index.dirs.get(&p)).map(|p| p.ino);
                if old_ino.is_some_and(|ino| !self.dirty.contains(&ino)) {
                    let path = super::shown(path);
                    return Ok(Err(format!(
                        "{path} was moved, but the directory it left is not dirty"
                    )));
                }
                if self.is_above(dir, parent) {
                    let path = super::shown(path);
                    return Ok(Err(format!("{path} was moved into itself, by the index")));
                }
                self.index.move_dir(dir, parent, name);
            }
            None => {
                walk(
                    self.ctx,
                    &mut self.index,
                    fd,
                    Some(parent),
                    name,
                    path.to_vec(),
                )?;
            }
        }
        Ok(Ok(()))
    }

    fn is_above(&self, dir: DirId, below: DirId) -> bool {
        let mut at = Some(below);
        while let Some(id) = at {
            if id == dir {
                return true;
            }
            at = self.index.dirs.get(&id).and_then(|d| d.parent);
        }
        false
    }

    /// Reads dirty files again at places whose directory may not have changed.
    fn content(&mut self) -> Result<Result<(), Doubt>, CaptureError> {
        let mut by_dir: HashMap<DirId, Vec<(Name, u64)>> = HashMap::new();
        for ino in &self.dirty {
            for (dir, name) in self.index.places.get(*ino).into_iter().flatten() {
                if !self.put.contains(&(*dir, name.clone())) {
                    by_dir.entry(*dir).or_default().push((name.clone(), *ino));
                }
            }
        }
        // In the order of ids, so that equal captures read in equal order.
        let mut by_dir: Vec<_> = by_dir.into_iter().collect();
        by_dir.sort_unstable_by_key(|(dir, _)| *dir);
        for (dir, names) in by_dir {
            let Some((fd, path)) = open_indexed(self.root, &self.index, dir)? else {
                let path = super::shown(&self.index.path(dir).unwrap_or_default());
                return Ok(Err(format!("{path} is not where the index has it")));
            };
            for (name, ino) in names {
                let at = join(&path, &name);
                let stat = match sys::stat_at(fd.as_fd(), &name) {
                    Ok(stat) => stat,
                    Err(Errno::NOENT) => return Ok(Err(gone(&at))),
                    Err(e) => return Err(io("stat", &at, e)),
                };
                if stat.ino != ino || stat.kind == FileType::Directory {
                    return Ok(Err(gone(&at)));
                }
                let leaf = self.ctx.leaf(fd.as_fd(), &name, &stat, &at)?;
                self.put(dir, name, leaf);
            }
        }
        Ok(Ok(()))
    }
}

fn gone(path: &[u8]) -> Doubt {
    format!(
        "{} is another file now, but its directory is not dirty",
        super::shown(path)
    )
}
