//! One entry of a directory: its metadata and, for a file, its content.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;
use tidepool_proto::tree::{Content, Kind, MAX_TARGET, Meta};
use tidepool_scheduler_core::cut::Cutter;

use super::{CaptureError, Ctx, TreeKind, cut_error, emitter, io, shown};
use crate::index::Leaf;
use crate::sys::{self, Stat, Stretch, XattrOf};

/// How much of a file is read at once.
const READ: usize = 1 << 20;

/// Whether an extended attribute belongs to a tree.
pub(crate) fn keeps(kind: TreeKind, name: &[u8]) -> bool {
    if let Some(overlay) = name.strip_prefix(b"trusted.overlay.".as_slice()) {
        // `overlay.*` below the prefix is a nested overlay's, which belongs to its user.
        return match kind {
            TreeKind::Image => false,
            TreeKind::Upper => {
                matches!(overlay, b"opaque" | b"redirect" | b"whiteout" | b"metacopy")
                    || overlay.starts_with(b"overlay.")
            }
        };
    }
    let host = [
        b"security.selinux".as_slice(),
        b"security.ima",
        b"security.evm",
    ];
    !host.contains(&name) && !name.starts_with(b"security.SMACK64")
}

impl Ctx<'_> {
    fn xattrs(&mut self, of: XattrOf<'_>, path: &[u8]) -> Result<sys::Xattrs, CaptureError> {
        let kind = self.opts.kind;
        let found = sys::xattrs(of, |name| keeps(kind, name))
            .map_err(|e| io("read extended attributes of", path, e))?;
        if found.iter().any(|(k, _)| k == b"trusted.overlay.metacopy") {
            return Err(CaptureError::Unsupported {
                path: shown(path),
                why: "its data is in the lower layer (overlay mounted with metacopy=on)".into(),
            });
        }
        Ok(found)
    }

    /// The metadata of an open directory or file.
    pub(crate) fn meta(
        &mut self,
        fd: BorrowedFd<'_>,
        stat: &Stat,
        path: &[u8],
    ) -> Result<Meta, CaptureError> {
        Ok(Meta {
            xattrs: self.xattrs(XattrOf::Open(fd), path)?,
            flags: sys::flags(fd).map_err(|e| io("read flags of", path, e))?,
            ..stat.meta()
        })
    }

    /// Captures one entry that is no directory.
    pub(super) fn leaf(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        stat: &Stat,
        path: &[u8],
    ) -> Result<Arc<Leaf>, CaptureError> {
        let shared = stat.nlink > 1 && !stat.is_whiteout();
        if shared && let Some(leaf) = self.leaves.get(&stat.ino) {
            return Ok(leaf.clone());
        }
        let (meta, kind) = match stat.kind {
            FileType::RegularFile => self.file(dir, name, stat, path)?,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())
                    .map_err(|e| io("read link", path, e))?
                    .into_bytes();
                if target.is_empty() || target.len() > MAX_TARGET {
                    return Err(CaptureError::Unsupported {
                        path: shown(path),
                        why: format!("a link target of {} bytes", target.len()),
                    });
                }
                (
                    self.entry_meta(dir, name, stat, path)?,
                    Kind::Symlink { target },
                )
            }
            other => {
                let (major, minor) = stat.rdev;
                let kind = match other {
                    FileType::CharacterDevice => Kind::CharDevice { major, minor },
                    FileType::BlockDevice => Kind::BlockDevice { major, minor },
                    FileType::Fifo => Kind::Fifo,
                    FileType::Socket => Kind::Socket,
                    _ => {
                        return Err(CaptureError::Unsupported {
                            path: shown(path),
                            why: "an unknown kind of file".into(),
                        });
                    }
                };
                (self.entry_meta(dir, name, stat, path)?, kind)
            }
        };
        let leaf = Arc::new(Leaf {
            ino: stat.ino,
            meta,
            kind,
        });
        if shared {
            self.leaves.insert(stat.ino, leaf.clone());
        }
        Ok(leaf)
    }

    /// The metadata of what must not be opened.
    fn entry_meta(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        stat: &Stat,
        path: &[u8],
    ) -> Result<Meta, CaptureError> {
        // All whiteouts of a mount are one inode, of which only its being there means anything.
        if stat.is_whiteout() {
            return Ok(Meta::default());
        }
        let xattrs = self.xattrs(XattrOf::Entry(dir, name), path)?;
        Ok(Meta {
            xattrs,
            // A link's permission bits mean nothing, and can't be set.
            mode: match stat.kind {
                FileType::Symlink => 0o777,
                _ => stat.mode,
            },
            ..stat.meta()
        })
    }

    fn file(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        stat: &Stat,
        path: &[u8],
    ) -> Result<(Meta, Kind), CaptureError> {
        let fd = sys::open_file(dir, name).map_err(|e| io("open", path, e))?;
        let changed = || CaptureError::Changed { path: shown(path) };
        let same = |now: Stat| {
            // The link count is left out: a name elsewhere changes nothing here, and its directory tells.
            (now.dev, now.ino, now.kind, now.size, now.mtime)
                == (stat.dev, stat.ino, stat.kind, stat.size, stat.mtime)
                && (now.mode, now.uid, now.gid, now.ctime)
                    == (stat.mode, stat.uid, stat.gid, stat.ctime)
        };
        // Not read before it is known to be the regular file that was seen.
        if !same(sys::stat_fd(fd.as_fd()).map_err(|e| io("stat", path, e))?) {
            return Err(changed());
        }
        let meta = self.meta(fd.as_fd(), stat, path)?;
        let content = self.content(fd.as_fd(), stat, path)?;
        if !same(sys::stat_fd(fd.as_fd()).map_err(|e| io("stat", path, e))?) {
            return Err(changed());
        }
        let link_group = None;
        Ok((
            meta,
            Kind::File {
                content,
                link_group,
            },
        ))
    }

    /// Cuts an open regular file.
    pub(crate) fn content(
        &mut self,
        fd: BorrowedFd<'_>,
        stat: &Stat,
        path: &[u8],
    ) -> Result<Content, CaptureError> {
        let mut cutter = Cutter::new(self.key);
        let mut emit = emitter(self.sink);
        let (buf, read_bytes) = (&mut self.buf, &mut self.read_bytes);
        let fail = |e: Errno| io("read", path, e);
        sys::stretches(fd, stat, |part| -> Result<(), ReadError> {
            match part {
                Stretch::Hole { len } => cutter.hole(len, &mut emit)?,
                Stretch::Data { mut at, len } => {
                    let end = at + len;
                    while at < end {
                        let n = ((end - at) as usize).min(READ);
                        buf.resize(buf.len().max(n), 0);
                        if !sys::read_exact_at(fd, &mut buf[..n], at)? {
                            return Err(ReadError::Short);
                        }
                        cutter.push(&buf[..n], &mut emit)?;
                        *read_bytes += n as u64;
                        at += n as u64;
                    }
                }
            }
            Ok(())
        })
        .map_err(|e| match e {
            ReadError::Io(e) => fail(e),
            ReadError::Cut(e) => cut_error(path, e),
            ReadError::Short => CaptureError::Changed { path: shown(path) },
        })?;
        self.read_files += 1;
        cutter
            .finish_content(&mut emit)
            .map_err(|e| cut_error(path, e))
    }
}

enum ReadError {
    Io(Errno),
    Cut(tidepool_scheduler_core::cut::CutError<crate::SinkError>),
    Short,
}

impl From<Errno> for ReadError {
    fn from(e: Errno) -> Self {
        ReadError::Io(e)
    }
}

impl From<tidepool_scheduler_core::cut::CutError<crate::SinkError>> for ReadError {
    fn from(e: tidepool_scheduler_core::cut::CutError<crate::SinkError>) -> Self {
        ReadError::Cut(e)
    }
}
