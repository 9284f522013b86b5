//! Whether what changed between two captures of a directory is worth a checkpoint.
//!
//! Two kinds of change are not, by themselves:
//! - those of paths that the caller ignores;
//! - a file with the bytes and everything else it had, whose mtime was merely renewed: it was written anew with the same contents. That an mtime was set by hand is
//!   told by its change time, which the kernel sets alone; of an empty file the mtime is all there is to it, so there it counts.
//!
//! They are still in the later capture, so the next checkpoint that is made for another reason has them. A directory's mtime never counts by itself:
//! capture keeps the old one where its entries are the same, and where they are not the entries count.
//!
//! Invariant: the first change of any other kind ends the comparison; equal subtrees are never looked into.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use tidepool_proto::tree::{Kind, Meta};
use tidepool_scheduler_core::diff::printable;

use crate::index::{Child, Leaf, TreeIndex, join};
use crate::sys;

/// Changes of which none is worth a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Light {
    /// Paths that the caller ignores, some of them; a directory stands for all in it.
    pub ignored: Vec<String>,
    /// How many there are.
    pub ignored_total: u64,
    /// Files written anew with the same contents.
    pub renewed: u64,
}

/// Paths kept of those ignored.
const SAMPLES: usize = 8;

/// Compares two captures of the directory `root`. None where anything changed that is worth a checkpoint, or may be. `ignores` is asked for paths relative to the root.
pub fn weigh(
    root: &Path,
    before: &TreeIndex,
    after: &TreeIndex,
    ignores: &dyn Fn(&[u8], bool) -> bool,
) -> Option<Light> {
    let root = sys::open_root(root).ok()?;
    let mut scale = Scale {
        root: root.as_fd(),
        ignores,
        light: Light::default(),
    };
    let (a, b) = (before.dirs.get(&before.root)?, after.dirs.get(&after.root)?);
    if !but_for_mtime(&a.meta, &b.meta) {
        return None;
    }
    let mut todo = vec![(a, b, Vec::new())];
    while let Some((a, b, path)) = todo.pop() {
        if Arc::ptr_eq(a, b) || a.node == b.node {
            continue;
        }
        let names = a.children.keys().chain(b.children.keys());
        let names: std::collections::BTreeSet<_> = names.collect();
        for name in names {
            let at = join(&path, name);
            match (a.children.get(name), b.children.get(name)) {
                (Some(Child::Dir(x)), Some(Child::Dir(y))) => {
                    let (x, y) = (before.dirs.get(x)?, after.dirs.get(y)?);
                    if !but_for_mtime(&x.meta, &y.meta) {
                        scale.ignored(&at, true)?;
                    }
                    todo.push((x, y, at));
                }
                (Some(Child::Leaf(x)), Some(Child::Leaf(y))) => scale.leaves(x, y, &at)?,
                (x, y) => {
                    for child in [x, y] {
                        match child {
                            // A directory counts even where all in it is ignored: it was not there.
                            Some(Child::Dir(_)) => scale.ignored(&at, true)?,
                            Some(Child::Leaf(_)) => scale.ignored(&at, false)?,
                            None => {}
                        }
                    }
                }
            }
        }
    }
    Some(scale.light)
}

struct Scale<'a> {
    root: BorrowedFd<'a>,
    ignores: &'a dyn Fn(&[u8], bool) -> bool,
    light: Light,
}

impl Scale<'_> {
    /// A change of this path counts, unless it is ignored.
    fn ignored(&mut self, path: &[u8], is_dir: bool) -> Option<()> {
        if !(self.ignores)(path, is_dir) {
            return None;
        }
        if self.light.ignored.len() < SAMPLES {
            self.light.ignored.push(printable(path));
        }
        self.light.ignored_total += 1;
        Some(())
    }

    fn leaves(&mut self, before: &Arc<Leaf>, after: &Arc<Leaf>, path: &[u8]) -> Option<()> {
        if Arc::ptr_eq(before, after) || before.meta == after.meta && before.kind == after.kind {
            return Some(());
        }
        if (self.ignores)(path, false) {
            return self.ignored(path, false);
        }
        let Kind::File { content, .. } = &after.kind else {
            return None;
        };
        let same = before.kind == after.kind && but_for_mtime(&before.meta, &after.meta);
        if !same || content.is_empty() || !self.renewed(path, &after.meta) {
            return None;
        }
        self.light.renewed += 1;
        Some(())
    }

    /// Whether the kernel has set the file's mtime: together with its change time.
    fn renewed(&self, path: &[u8], meta: &Meta) -> bool {
        let Some((mtime, ctime)) = sys::times_beneath(self.root, path) else {
            return false;
        };
        mtime == ctime && mtime == (meta.mtime_s, meta.mtime_ns)
    }
}

/// Whether two differ in nothing but the mtime.
fn but_for_mtime(a: &Meta, b: &Meta) -> bool {
    let b = Meta {
        mtime_s: a.mtime_s,
        mtime_ns: a.mtime_ns,
        ..b.clone()
    };
    *a == b
}
