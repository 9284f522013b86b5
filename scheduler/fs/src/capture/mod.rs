//! Capture: a directory becomes a tree.
//!
//! [`full`] reads everything; [`dirty`] reads only the directories and files whose inodes were dirtied since the index was made, and gives the same tree.
//! Both end in the same step, which finds hard links, encodes the nodes that changed and names the root.
//!
//! Rules:
//! - Nothing follows a link or crosses a mount. A directory that is a mount point is captured empty, with a note.
//! - What changes while it is read is an error ([`CaptureError::Changed`]), never a guess: the caller freezes and tries again.
//! - *Net effects*: a directory whose own entries and metadata equal the previous tree's but for its mtime keeps the previous mtime, so that a file made and
//!   deleted is no change, nor is that shown when something else changed. A restored directory then has the mtime of before. For a *file* an mtime alone is a change: a
//!   `touch` can't be told from a rewrite with the same bytes, and tools such as make depend on it. It costs one tree node.
//! - Not part of a tree: inode numbers, ctime, atime, preallocated space, extended attributes that belong to the host (`security.selinux`, `ima`, `evm`)
//!   or to the overlay's own book-keeping, hard links between what are no regular files.
//! - Doubt means more: an index that does not fit what is found leads to a full walk, and the result says why.

mod dirty;
mod finish;
mod inode;
mod walk;

pub(crate) use inode::keeps;

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tidepool_proto::{ChunkName, DomainKey, TreeId};
use tidepool_scheduler_core::cut::CutError;
use tidepool_scheduler_core::diff::printable;

use crate::chunks::{ChunkSink, SinkError};
use crate::index::{Leaf, TreeIndex};
use crate::sys;

/// What a directory is, which decides about the overlay's own extended attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TreeKind {
    /// The upper directory of an overlay: marks of opaque and redirected directories are kept.
    #[default]
    Upper,
    /// An image, to be a lower layer by itself: none is kept.
    Image,
}

/// How to capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CaptureOptions {
    pub kind: TreeKind,
}

/// An inode that was dirtied, as the inspector reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DirtyInode {
    /// Inode number.
    pub ino: u64,
    /// Device as in `stat` (`st_dev`). Another device than the captured directory's is ignored: it is outside.
    pub dev: u64,
    /// Generation. Only for the record: whatever has the number is read again.
    pub generation: u32,
}

/// A captured directory.
#[derive(Debug)]
pub struct Captured {
    /// Equal to the previous one where nothing changed.
    pub tree: TreeId,
    /// For the next [`dirty`].
    pub index: TreeIndex,
    /// Logical bytes of all files of the tree.
    pub bytes: u64,
    /// Bytes read from files for this capture.
    pub read_bytes: u64,
    /// How many names of the tree are no directories.
    pub files: u64,
    /// How many files were read for this capture.
    pub read_files: u64,
    /// Why all was walked although only dirty parts were asked for.
    pub full_walk: Option<String>,
    /// What was left out, one sentence each; at most a few dozen.
    pub notes: Vec<String>,
}

/// Why a directory could not be captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A system call failed.
    #[error("{op} {path}: {source}")]
    Io {
        op: &'static str,
        path: String,
        #[source]
        source: std::io::Error,
    },
    /// It changed while it was read: freeze what writes there, and try again.
    #[error("{path} changed while it was captured")]
    Changed { path: String },
    /// It can't be kept in a tree.
    #[error("{path} can't be captured: {why}")]
    Unsupported { path: String, why: String },
    /// A chunk was not taken.
    #[error(transparent)]
    Sink(#[from] SinkError),
}

/// Captures a whole directory. `previous` is the index of the last capture of the same directory, for net effects; without one the tree has all times as they are.
pub fn full(
    root: &Path,
    key: &DomainKey,
    opts: CaptureOptions,
    previous: Option<&TreeIndex>,
    sink: &mut dyn ChunkSink,
) -> Result<Captured, CaptureError> {
    let fd = open_root(root)?;
    let mut ctx = Ctx::new(key, opts, sink);
    full_at(&mut ctx, fd.as_fd(), previous)
}

/// Captures a directory, reading only what `dirty` names. `previous` must be the index of the directory's last capture, and `dirty` must hold every inode
/// dirtied since. The result is what [`full`] with the same `previous` would give.
pub fn dirty(
    root: &Path,
    key: &DomainKey,
    opts: CaptureOptions,
    previous: &TreeIndex,
    dirty: &[DirtyInode],
    sink: &mut dyn ChunkSink,
) -> Result<Captured, CaptureError> {
    let fd = open_root(root)?;
    let mut ctx = Ctx::new(key, opts, sink);
    match dirty::refresh(&mut ctx, fd.as_fd(), previous, dirty)? {
        Ok(index) => finish_index(&mut ctx, index, Some(previous)),
        Err(doubt) => {
            ctx.leaves.clear();
            let mut captured = full_at(&mut ctx, fd.as_fd(), Some(previous))?;
            captured.full_walk = Some(doubt);
            Ok(captured)
        }
    }
}

pub(crate) fn open_root(root: &Path) -> Result<std::os::fd::OwnedFd, CaptureError> {
    sys::open_root(root).map_err(|e| CaptureError::Io {
        op: "open",
        path: root.display().to_string(),
        source: e.into(),
    })
}

fn full_at(
    ctx: &mut Ctx<'_>,
    root: BorrowedFd<'_>,
    previous: Option<&TreeIndex>,
) -> Result<Captured, CaptureError> {
    let index = walk_root(ctx, root)?;
    finish_index(ctx, index, previous)
}

/// Reads everything below `root`.
pub(crate) fn walk_root(
    ctx: &mut Ctx<'_>,
    root: BorrowedFd<'_>,
) -> Result<TreeIndex, CaptureError> {
    let dup = rustix::io::fcntl_dupfd_cloexec(root, 3).map_err(|e| io("dup", b"", e))?;
    let stat = sys::stat_fd(root).map_err(|e| io("stat", b"", e))?;
    let mut index = TreeIndex::new(stat.dev);
    walk::walk(
        ctx,
        &mut index,
        dup,
        None,
        b"".as_slice().into(),
        Vec::new(),
    )?;
    Ok(index)
}

/// Makes the tree of an index that is up to date.
pub(crate) fn finish_index(
    ctx: &mut Ctx<'_>,
    mut index: TreeIndex,
    previous: Option<&TreeIndex>,
) -> Result<Captured, CaptureError> {
    finish::finish(ctx, &mut index, previous)?;
    Ok(Captured {
        tree: index.tree,
        bytes: index.bytes,
        files: index.files,
        read_bytes: ctx.read_bytes,
        read_files: ctx.read_files,
        full_walk: None,
        notes: std::mem::take(&mut ctx.notes),
        index,
    })
}

/// What one capture carries along.
pub(crate) struct Ctx<'a> {
    pub(crate) key: &'a DomainKey,
    pub(crate) opts: CaptureOptions,
    pub(crate) sink: &'a mut dyn ChunkSink,
    pub(crate) buf: Vec<u8>,
    pub(crate) dir_buf: Vec<MaybeUninit<u8>>,
    /// Leaves of this capture with more than one name, so that each inode is read once and all its names agree.
    pub(crate) leaves: HashMap<u64, Arc<Leaf>>,
    pub(crate) read_bytes: u64,
    pub(crate) read_files: u64,
    pub(crate) notes: Vec<String>,
    /// Where set, files of memory pages in the root are listed here and not read.
    pub(crate) defer: Option<Vec<Vec<u8>>>,
}

impl<'a> Ctx<'a> {
    pub(crate) fn new(
        key: &'a DomainKey,
        opts: CaptureOptions,
        sink: &'a mut dyn ChunkSink,
    ) -> Self {
        Self {
            key,
            opts,
            sink,
            buf: Vec::new(),
            dir_buf: Vec::new(),
            leaves: HashMap::new(),
            read_bytes: 0,
            read_files: 0,
            notes: Vec::new(),
            defer: None,
        }
    }

    pub(crate) fn note(&mut self, path: &[u8], what: &str) {
        if self.notes.len() < 32 {
            self.notes.push(format!("{}: {what}", shown(path)));
        }
    }
}

/// A path for messages.
pub(crate) fn shown(path: &[u8]) -> String {
    match path.is_empty() {
        true => ".".into(),
        false => printable(path),
    }
}

/// An error of a system call on a path.
pub(crate) fn io(op: &'static str, path: &[u8], e: Errno) -> CaptureError {
    let path = shown(path);
    match e {
        // Seen a moment ago and gone, or another kind of file now.
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE => CaptureError::Changed { path },
        Errno::OVERFLOW if op == "list" => CaptureError::Unsupported {
            path,
            why: "too many entries in one directory".into(),
        },
        e => CaptureError::Io {
            op,
            path,
            source: e.into(),
        },
    }
}

pub(crate) fn cut_error(path: &[u8], e: CutError<SinkError>) -> CaptureError {
    match e {
        CutError::Sink(e) => CaptureError::Sink(e),
        e => CaptureError::Unsupported {
            path: shown(path),
            why: e.to_string(),
        },
    }
}

/// The sink as the cutter wants it.
pub(crate) fn emitter(
    sink: &mut dyn ChunkSink,
) -> impl FnMut(ChunkName, &[u8], &[ChunkName]) -> Result<(), SinkError> + '_ {
    |name, plain, links| sink.chunk(name, plain, links)
}
