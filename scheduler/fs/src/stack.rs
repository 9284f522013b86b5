//! A stack of open directories for walks of any depth with few descriptors.
//!
//! Only the deepest directories stay open. A shallower one is opened again through `..` of its child, and taken only if it is still the same inode: a
//! directory moved meanwhile can't lead a walk elsewhere.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use crate::sys;

/// How many directories stay open at once.
const OPEN: usize = 64;

#[derive(Debug)]
pub(crate) struct DirStack {
    /// (device, inode) of every level.
    ids: Vec<(u64, u64)>,
    /// The deepest levels, the last one last.
    open: VecDeque<OwnedFd>,
}

impl DirStack {
    /// A stack on its root.
    pub(crate) fn new(root: OwnedFd) -> Result<Self, Errno> {
        let stat = sys::stat_fd(root.as_fd())?;
        Ok(Self {
            ids: vec![(stat.dev, stat.ino)],
            open: VecDeque::from([root]),
        })
    }

    /// The deepest directory.
    pub(crate) fn top(&self) -> Result<BorrowedFd<'_>, Errno> {
        self.open.back().map(AsFd::as_fd).ok_or(Errno::BADF)
    }

    /// Goes down into a directory that was opened from the top.
    pub(crate) fn push(&mut self, child: OwnedFd) -> Result<(), Errno> {
        let stat = sys::stat_fd(child.as_fd())?;
        self.ids.push((stat.dev, stat.ino));
        self.open.push_back(child);
        if self.open.len() > OPEN {
            self.open.pop_front();
        }
        Ok(())
    }

    /// Goes up one level and gives the directory left. [`Errno::STALE`] where its parent is not the one it was entered from.
    pub(crate) fn pop(&mut self) -> Result<OwnedFd, Errno> {
        let left = self.open.pop_back().ok_or(Errno::BADF)?;
        self.ids.pop();
        if let (true, Some(want)) = (self.open.is_empty(), self.ids.last()) {
            let up = sys::open_dir(left.as_fd(), b"..")?;
            let stat = sys::stat_fd(up.as_fd())?;
            if (stat.dev, stat.ino) != *want {
                return Err(Errno::STALE);
            }
            self.open.push_back(up);
        }
        Ok(left)
    }
}
