//! Restore: a tree becomes a directory, and the directory is checked to be that tree.
//!
//! Everything is made by descriptor and single name, so that no tree, however made, reaches outside its destination. Content is fetched in
//! batches of some MiB; a directory's metadata is set when all in it exists, so that times stick; immutable and append-only flags come last of all.
//! Holes are never written. Memory is bounded by one batch, one path's directories and the recipe at hand.
//!
//! A restore that fails leaves what it made; [`remove_tree`] takes it away, whatever flags and depth it has.

mod batch;
pub(crate) mod meta;
mod remove;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use tidepool_proto::recipe::Recipe;
use tidepool_proto::tree::{Content, Entry, Kind, Meta, Node};
use tidepool_proto::{DomainKey, TreeId};

use crate::capture::{self, CaptureError, CaptureOptions, Captured, TreeKind, shown};
use crate::chunks::{ChunkSource, NullSink, SourceError, load_node, load_recipe, load_root};
use crate::index::join;
use crate::stack::DirStack;
use crate::sys;

pub(crate) use remove::remove_below;
pub use remove::remove_tree;

/// How to restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoreOptions {
    /// What the tree is: decides which of an overlay's own extended attributes may be in it.
    pub kind: TreeKind,
    /// Whether devices other than whiteouts are made; an error where not.
    pub devices: bool,
    /// Write everything to the disk before returning.
    pub sync: bool,
}

impl Default for RestoreOptions {
    /// An upper directory, devices allowed, not synced.
    fn default() -> Self {
        Self {
            kind: TreeKind::Upper,
            devices: true,
            sync: false,
        }
    }
}

/// What was restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restored {
    /// Logical bytes of the files made, each inode once.
    pub bytes: u64,
    /// Names made that are no directories.
    pub files: u64,
    /// Bytes of chunks fetched, as plaintext, nodes left out.
    pub fetched_bytes: u64,
}

/// Why a tree could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A system call failed.
    #[error("{op} {path}: {source}")]
    Io {
        op: String,
        path: String,
        #[source]
        source: std::io::Error,
    },
    /// The destination has something in it.
    #[error("{path} is not empty")]
    NotEmpty { path: String },
    /// A chunk is missing, damaged or could not be had.
    #[error("{path}: {source}")]
    Source {
        path: String,
        #[source]
        source: SourceError,
    },
    /// The tree holds what is not restored.
    #[error("{path} can't be restored: {why}")]
    Unsupported { path: String, why: String },
    /// The restored directory is not the tree.
    #[error("the restored directory is tree {found}, not {expected}")]
    Mismatch { expected: TreeId, found: TreeId },
    /// The restored directory could not be read again.
    #[error("checking the restored directory: {0}")]
    Check(#[from] CaptureError),
}

impl RestoreError {
    /// Whether stored bytes were not what they should be.
    pub fn is_corruption(&self) -> bool {
        matches!(
            self,
            RestoreError::Mismatch { .. }
                | RestoreError::Source {
                    source: SourceError::Damaged { .. } | SourceError::Format { .. },
                    ..
                }
        )
    }
}

pub(crate) fn io(op: impl Into<String>, path: &[u8], e: Errno) -> RestoreError {
    RestoreError::Io {
        op: op.into(),
        path: shown(path),
        source: e.into(),
    }
}

fn at(path: &[u8]) -> impl FnOnce(SourceError) -> RestoreError + '_ {
    move |source| RestoreError::Source {
        path: shown(path),
        source,
    }
}

/// Makes `dest` the directory that `tree` describes. `dest` is made if it does not exist, and must be empty.
pub fn materialise(
    tree: TreeId,
    dest: &Path,
    source: &mut dyn ChunkSource,
    opts: RestoreOptions,
) -> Result<Restored, RestoreError> {
    let whole = |op: &str, e: Errno| RestoreError::Io {
        op: op.into(),
        path: dest.display().to_string(),
        source: e.into(),
    };
    match rustix::fs::mkdir(dest, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(whole("make", e)),
    }
    let root = sys::open_root(dest).map_err(|e| whole("open", e))?;
    let listed = sys::names(root.as_fd(), &mut Vec::new()).map_err(|e| whole("list", e))?;
    if !listed.is_empty() {
        return Err(RestoreError::NotEmpty {
            path: dest.display().to_string(),
        });
    }
    // Nothing of the destination is to be inherited.
    sys::set_flags(root.as_fd(), 0).map_err(|e| whole("clear flags of", e))?;
    for acl in [
        b"system.posix_acl_default".as_slice(),
        b"system.posix_acl_access",
    ] {
        sys::remove_xattr(root.as_fd(), acl).map_err(|e| whole("clear ACLs of", e))?;
    }
    let node = load_root(source, tree).map_err(at(b""))?;
    let dup = rustix::io::fcntl_dupfd_cloexec(&root, 3).map_err(|e| whole("open", e))?;
    let mut run = Run {
        root: root.as_fd(),
        stack: DirStack::new(dup).map_err(|e| whole("stat", e))?,
        batch: batch::Batch::new(source, opts.kind),
        opts,
        links: HashMap::new(),
        flags: Vec::new(),
        done: Restored::default(),
    };
    run.tree(node)?;
    let mut done = run.done;
    done.fetched_bytes = run.batch.fetched;
    let flags = std::mem::take(&mut run.flags);
    drop(run);
    // Innermost first: what is immutable keeps the rest from being opened for a change, not from being reached.
    for (path, is_dir, flags) in flags.into_iter().rev() {
        set_flags(root.as_fd(), &path, is_dir, flags)?;
    }
    if opts.sync {
        rustix::fs::syncfs(&root).map_err(|e| whole("sync", e))?;
    }
    Ok(done)
}

/// Reads `dest` again and makes sure that it is `expected`. The capture that did so carries the index for what follows.
pub fn verify(
    dest: &Path,
    key: &DomainKey,
    kind: TreeKind,
    expected: TreeId,
) -> Result<Captured, RestoreError> {
    let captured = capture::full(dest, key, CaptureOptions { kind }, None, &mut NullSink)?;
    match captured.tree == expected {
        true => Ok(captured),
        false => Err(RestoreError::Mismatch {
            expected,
            found: captured.tree,
        }),
    }
}

/// A directory being made.
struct Level {
    path: Vec<u8>,
    meta: Meta,
    entries: std::vec::IntoIter<Entry>,
}

struct Run<'a> {
    root: BorrowedFd<'a>,
    stack: DirStack,
    batch: batch::Batch<'a>,
    opts: RestoreOptions,
    /// Link groups with the first path made: its directory and name.
    links: HashMap<u64, (Vec<u8>, Vec<u8>)>,
    /// What gets flags at the end: path, whether a directory, flags.
    flags: Vec<(Vec<u8>, bool, u32)>,
    done: Restored,
}

impl Run<'_> {
    fn tree(&mut self, root: Node) -> Result<(), RestoreError> {
        let Some(entry) = root.entries.into_iter().next() else {
            return Ok(());
        };
        let top = self.level(Vec::new(), entry)?;
        let mut levels = vec![top];
        while let Some(level) = levels.last_mut() {
            let Some(entry) = level.entries.next() else {
                if let Some(done) = levels.pop() {
                    self.leave(done, levels.is_empty())?;
                }
                continue;
            };
            let path = join(&level.path, &entry.name);
            if let Kind::Dir { .. } = entry.kind {
                let up = self.stack.top().map_err(|e| io("open", &path, e))?;
                rustix::fs::mkdirat(up, entry.name.as_slice(), Mode::RWXU)
                    .map_err(|e| io("make directory", &path, e))?;
                let fd = sys::open_dir(up, &entry.name).map_err(|e| io("open", &path, e))?;
                self.stack.push(fd).map_err(|e| io("open", &path, e))?;
                levels.push(self.level(path, entry)?);
            } else {
                let dir = level.path.clone();
                self.leaf(dir, path, entry)?;
            }
        }
        self.batch.flush(0)
    }

    fn level(&mut self, path: Vec<u8>, entry: Entry) -> Result<Level, RestoreError> {
        let children = match entry.kind {
            Kind::Dir { children } => children,
            _ => None,
        };
        let entries = match children {
            Some(blob) => {
                load_node(self.batch.source, &blob)
                    .map_err(at(&path))?
                    .entries
            }
            None => Vec::new(),
        };
        Ok(Level {
            path,
            meta: entry.meta,
            entries: entries.into_iter(),
        })
    }

    /// Everything in a directory exists: its own metadata, then up.
    fn leave(&mut self, level: Level, is_root: bool) -> Result<(), RestoreError> {
        let top = self.stack.top().map_err(|e| io("open", &level.path, e))?;
        meta::set_open(top, &level.meta, self.opts.kind, &level.path)?;
        if level.meta.flags != 0 {
            self.flags
                .push((level.path.clone(), true, level.meta.flags));
        }
        if !is_root {
            self.stack.pop().map_err(|e| io("leave", &level.path, e))?;
        }
        Ok(())
    }

    fn leaf(&mut self, dir: Vec<u8>, path: Vec<u8>, entry: Entry) -> Result<(), RestoreError> {
        self.done.files += 1;
        let up = self.stack.top().map_err(|e| io("open", &path, e))?;
        let name = entry.name.as_slice();
        let node = |kind, major, minor| {
            let dev = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(up, name, kind, Mode::RUSR | Mode::WUSR, dev)
                .map_err(|e| io("make device", &path, e))
        };
        match &entry.kind {
            Kind::Dir { .. } => return Ok(()),
            Kind::File { .. } => return self.file(dir, path, entry),
            Kind::Symlink { target } => rustix::fs::symlinkat(target.as_slice(), up, name)
                .map_err(|e| io("make link", &path, e))?,
            Kind::CharDevice { major: 0, minor: 0 } => node(FileType::CharacterDevice, 0, 0)?,
            Kind::CharDevice { .. } | Kind::BlockDevice { .. } if !self.opts.devices => {
                return Err(RestoreError::Unsupported {
                    path: shown(&path),
                    why: "a device".into(),
                });
            }
            Kind::CharDevice { major, minor } => node(FileType::CharacterDevice, *major, *minor)?,
            Kind::BlockDevice { major, minor } => node(FileType::BlockDevice, *major, *minor)?,
            Kind::Fifo => node(FileType::Fifo, 0, 0)?,
            Kind::Socket => node(FileType::Socket, 0, 0)?,
        }
        let is_link = matches!(entry.kind, Kind::Symlink { .. });
        meta::set_entry(up, name, is_link, &entry.meta, self.opts.kind, &path)
    }

    fn file(&mut self, dir: Vec<u8>, path: Vec<u8>, entry: Entry) -> Result<(), RestoreError> {
        let Kind::File {
            content,
            link_group,
        } = entry.kind
        else {
            return Ok(());
        };
        let up = self.stack.top().map_err(|e| io("open", &path, e))?;
        if let Some(group) = link_group {
            if let Some((first_dir, first)) = self.links.get(&group) {
                let from = sys::open_beneath(self.root, first_dir);
                return from
                    .and_then(|from| {
                        let (from, first) = (from.as_fd(), first.as_slice());
                        rustix::fs::linkat(from, first, up, &entry.name, AtFlags::empty())
                    })
                    .map_err(|e| io("make hard link", &path, e));
            }
            self.links.insert(group, (dir, entry.name.clone()));
        }
        self.done.bytes += content.len();
        let fd = create(up, &entry.name).map_err(|e| io("make", &path, e))?;
        if entry.meta.flags != 0 {
            self.flags.push((path.clone(), false, entry.meta.flags));
        }
        let recipe = match content {
            Content::Inline(bytes) => {
                sys::write_all_at(fd.as_fd(), &bytes, 0).map_err(|e| io("write", &path, e))?;
                return meta::set_open(fd.as_fd(), &entry.meta, self.opts.kind, &path);
            }
            Content::Recipe(recipe) => recipe,
            Content::Stored { len, recipe } => {
                load_recipe(self.batch.source, &recipe, len).map_err(at(&path))?
            }
        };
        self.recipe(fd, path, entry.meta, recipe)
    }

    fn recipe(
        &mut self,
        fd: OwnedFd,
        path: Vec<u8>,
        meta: Meta,
        recipe: Recipe,
    ) -> Result<(), RestoreError> {
        rustix::fs::ftruncate(&fd, recipe.len()).map_err(|e| io("size", &path, e))?;
        self.batch.add(batch::Pending { fd, meta, path }, recipe)
    }
}

fn create(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY
        | OFlags::CREATE
        | OFlags::EXCL
        | OFlags::NOFOLLOW
        | OFlags::CLOEXEC
        | OFlags::NONBLOCK;
    rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)
}

fn set_flags(
    root: BorrowedFd<'_>,
    path: &[u8],
    is_dir: bool,
    flags: u32,
) -> Result<(), RestoreError> {
    let set = || {
        if is_dir {
            return sys::set_flags(sys::open_beneath(root, path)?.as_fd(), flags);
        }
        let (dir, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(n) => (&path[..n], &path[n + 1..]),
            None => (&b""[..], path),
        };
        let dir = sys::open_beneath(root, dir)?;
        sys::set_flags(sys::open_file(dir.as_fd(), name)?.as_fd(), flags)
    };
    set().map_err(|e| io(format!("set flags {flags:#x} of"), path, e))
}
