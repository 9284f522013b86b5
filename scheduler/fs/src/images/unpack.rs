//! Making entries in the directory that is unpacked into, safely: by descriptors, through real directories only.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use tidepool_proto::tree::{MAX_NAME, Meta};
use tidepool_scheduler_core::cut::is_zero;

use super::{ImageError, ImportLimits, OnProgress};
use crate::capture::{TreeKind, shown};
use crate::index::join;
use crate::restore::{RestoreError, meta as set, remove_below};
use crate::sys;

const MAX_NOTES: usize = 32;
const PROGRESS_EVERY: u64 = 16 << 20;

/// Opens the destination, which must be empty.
pub(super) fn prepare(dest: &Path) -> Result<OwnedFd, ImageError> {
    let whole = |op: &str, e: Errno| {
        ImageError::Dest(RestoreError::Io {
            op: op.into(),
            path: dest.display().to_string(),
            source: e.into(),
        })
    };
    match rustix::fs::mkdir(dest, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(whole("make", e)),
    }
    let root = sys::open_root(dest).map_err(|e| whole("open", e))?;
    match sys::names(root.as_fd(), &mut Vec::new()) {
        Ok(names) if names.is_empty() => Ok(root),
        Ok(_) => Err(ImageError::Dest(RestoreError::NotEmpty {
            path: dest.display().to_string(),
        })),
        Err(e) => Err(whole("list", e)),
    }
}

/// Makes entries below a root.
pub(super) struct Unpacker<'a, 'p> {
    root: OwnedFd,
    limits: ImportLimits,
    entries: u64,
    pub(super) bytes: u64,
    told: u64,
    progress: &'a mut OnProgress<'p>,
    /// Directories made, with the metadata they get when everything is in place.
    dirs: BTreeMap<Vec<u8>, Meta>,
    notes: Vec<String>,
}

impl<'a, 'p> Unpacker<'a, 'p> {
    pub(super) fn new(
        root: OwnedFd,
        limits: ImportLimits,
        progress: &'a mut OnProgress<'p>,
    ) -> Self {
        let mut dirs = BTreeMap::new();
        dirs.insert(Vec::new(), implied());
        Self {
            root,
            limits,
            entries: 0,
            bytes: 0,
            told: 0,
            progress,
            dirs,
            notes: Vec::new(),
        }
    }

    pub(super) fn limits(&self) -> ImportLimits {
        self.limits
    }

    pub(super) fn note(&mut self, path: &[u8], what: &str) {
        if self.notes.len() < MAX_NOTES {
            self.notes.push(format!("{}: {what}", shown(path)));
        }
    }

    /// Counts an entry against the limit.
    pub(super) fn count_entry(&mut self) -> Result<(), ImageError> {
        self.entries += 1;
        match self.entries > self.limits.entries {
            true => Err(ImageError::TooLarge {
                why: format!("more than {} entries", self.limits.entries),
            }),
            false => Ok(()),
        }
    }

    /// Counts bytes against the limit.
    pub(super) fn count_bytes(&mut self, n: u64) -> Result<(), ImageError> {
        self.bytes = self.bytes.saturating_add(n);
        if self.bytes > self.limits.bytes {
            return Err(ImageError::TooLarge {
                why: format!("more than {} bytes of files", self.limits.bytes),
            });
        }
        if self.bytes - self.told >= PROGRESS_EVERY {
            self.told = self.bytes;
            (self.progress)("unpacking", self.bytes, None);
        }
        Ok(())
    }

    /// A directory, made or already there; it gets `meta` at the end.
    pub(super) fn dir(&mut self, path: &[u8], meta: Meta) -> Result<(), ImageError> {
        if !path.is_empty() {
            let (up, name) = self.parent(path)?;
            match sys::stat_at(up.as_fd(), name) {
                Ok(s) if s.kind == FileType::Directory => {}
                Ok(_) => {
                    self.remove(path)?;
                    mkdir(&up, name, path)?;
                }
                Err(Errno::NOENT) => mkdir(&up, name, path)?,
                Err(e) => return Err(fail("stat", path, e)),
            }
        }
        self.dirs.insert(path.to_vec(), meta);
        Ok(())
    }

    /// A regular file with what `content` gives, `len` bytes.
    pub(super) fn file(
        &mut self,
        path: &[u8],
        meta: &Meta,
        len: u64,
        content: &mut dyn Read,
    ) -> Result<(), ImageError> {
        let fd = self.create(path)?;
        rustix::fs::ftruncate(&fd, len).map_err(|e| fail("size", path, e))?;
        let mut buf = vec![0; (len as usize).clamp(1, 1 << 18)];
        let mut at = 0;
        while at < len {
            let n = ((len - at) as usize).min(buf.len());
            content
                .read_exact(&mut buf[..n])
                .map_err(|e| ImageError::Damaged {
                    why: format!("{}: {e}", shown(path)),
                })?;
            self.count_bytes(n as u64)?;
            if !is_zero(&buf[..n]) {
                sys::write_all_at(fd.as_fd(), &buf[..n], at).map_err(|e| fail("write", path, e))?;
            }
            at += n as u64;
        }
        set::set_open(fd.as_fd(), meta, TreeKind::Image, path).map_err(ImageError::Dest)
    }

    /// A new, empty regular file instead of what was there.
    pub(super) fn create(&mut self, path: &[u8]) -> Result<OwnedFd, ImageError> {
        self.remove(path)?;
        let (up, name) = self.parent(path)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&up, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| fail("make", path, e))
    }

    pub(super) fn symlink(
        &mut self,
        path: &[u8],
        target: &[u8],
        meta: &Meta,
    ) -> Result<(), ImageError> {
        self.remove(path)?;
        let (up, name) = self.parent(path)?;
        rustix::fs::symlinkat(target, &up, name).map_err(|e| fail("make link", path, e))?;
        set::set_entry(up.as_fd(), name, true, meta, TreeKind::Image, path)
            .map_err(ImageError::Dest)
    }

    pub(super) fn fifo(&mut self, path: &[u8], meta: &Meta) -> Result<(), ImageError> {
        self.remove(path)?;
        let (up, name) = self.parent(path)?;
        rustix::fs::mknodat(&up, name, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .map_err(|e| fail("make fifo", path, e))?;
        set::set_entry(up.as_fd(), name, false, meta, TreeKind::Image, path)
            .map_err(ImageError::Dest)
    }

    /// Another name for `target`, which must have been unpacked before.
    pub(super) fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<(), ImageError> {
        let (from, first) = self.parent(target)?;
        match sys::stat_at(from.as_fd(), first) {
            Ok(s) if s.kind != FileType::Directory => {}
            Ok(_) => return Err(refused(path, "a hard link to a directory")),
            Err(Errno::NOENT) => {
                let why = format!(
                    "a hard link to {}, which is not in the archive",
                    shown(target)
                );
                return Err(refused(path, why));
            }
            Err(e) => return Err(fail("stat", target, e)),
        }
        if path == target {
            return Ok(());
        }
        self.remove(path)?;
        let (up, name) = self.parent(path)?;
        rustix::fs::linkat(&from, first, &up, name, AtFlags::empty())
            .map_err(|e| fail("make hard link", path, e))
    }

    /// Removes what is at a path, a directory with all in it. Nothing there is no error.
    pub(super) fn remove(&mut self, path: &[u8]) -> Result<(), ImageError> {
        let (up, name) = self.parent(path)?;
        match sys::stat_at(up.as_fd(), name) {
            Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(fail("stat", path, e)),
            Ok(s) if s.kind == FileType::Directory => {
                let fd = sys::open_dir(up.as_fd(), name).map_err(|e| fail("open", path, e))?;
                remove_below(fd).map_err(ImageError::Dest)?;
                self.forget(path);
                rustix::fs::unlinkat(&up, name, AtFlags::REMOVEDIR)
                    .map_err(|e| fail("remove", path, e))
            }
            Ok(_) => rustix::fs::unlinkat(&up, name, AtFlags::empty())
                .map_err(|e| fail("remove", path, e)),
        }
    }

    /// Removes all that is in a directory, where there is one.
    pub(super) fn clear(&mut self, path: &[u8]) -> Result<(), ImageError> {
        match sys::open_beneath(self.root.as_fd(), path) {
            Ok(fd) => {
                remove_below(fd).map_err(ImageError::Dest)?;
                let meta = self.dirs.get(path).cloned();
                self.forget(path);
                self.dirs
                    .insert(path.to_vec(), meta.unwrap_or_else(implied));
                Ok(())
            }
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            Err(e) => Err(fail("open", path, e)),
        }
    }

    fn forget(&mut self, path: &[u8]) {
        self.dirs.remove(path);
        let below = join(path, b"");
        let inside: Vec<Vec<u8>> = self
            .dirs
            .range(below.clone()..)
            .map(|(p, _)| p)
            .take_while(|p| p.starts_with(&below))
            .filter(|p| !p.is_empty())
            .cloned()
            .collect();
        for path in inside {
            self.dirs.remove(&path);
        }
    }

    /// The directory of a path and its last name. Directories on the way are made; a symbolic link on the way is refused.
    fn parent<'n>(&mut self, path: &'n [u8]) -> Result<(OwnedFd, &'n [u8]), ImageError> {
        let (dir, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(n) => (&path[..n], &path[n + 1..]),
            None => (&b""[..], path),
        };
        match sys::open_beneath(self.root.as_fd(), dir) {
            Ok(fd) => return Ok((fd, name)),
            Err(Errno::NOENT) => {}
            Err(Errno::LOOP | Errno::NOTDIR | Errno::XDEV) => {
                return Err(refused(path, "its path goes through what is no directory"));
            }
            Err(e) => return Err(fail("open", dir, e)),
        }
        let mut at = sys::open_beneath(self.root.as_fd(), b"").map_err(|e| fail("open", b"", e))?;
        let mut made: Vec<u8> = Vec::new();
        for part in dir.split(|b| *b == b'/') {
            made = join(&made, part);
            match rustix::fs::mkdirat(&at, part, Mode::RWXU) {
                Ok(()) => {
                    self.count_entry()?;
                    self.dirs.insert(made.clone(), implied());
                }
                Err(Errno::EXIST) => {}
                Err(e) => return Err(fail("make directory", &made, e)),
            }
            at = sys::open_dir(at.as_fd(), part).map_err(|e| match e {
                Errno::LOOP | Errno::NOTDIR => {
                    refused(path, "its path goes through what is no directory")
                }
                e => fail("open", &made, e),
            })?;
        }
        Ok((at, name))
    }

    /// Gives directories their metadata, innermost first.
    pub(super) fn finish(self) -> Result<Vec<String>, ImageError> {
        for (path, meta) in self.dirs.iter().rev() {
            let fd =
                sys::open_beneath(self.root.as_fd(), path).map_err(|e| fail("open", path, e))?;
            set::set_open(fd.as_fd(), meta, TreeKind::Image, path).map_err(ImageError::Dest)?;
        }
        Ok(self.notes)
    }
}

/// The metadata of a directory nothing is said about.
fn implied() -> Meta {
    Meta {
        mode: 0o755,
        ..Meta::default()
    }
}

fn mkdir(up: &OwnedFd, name: &[u8], path: &[u8]) -> Result<(), ImageError> {
    rustix::fs::mkdirat(up, name, Mode::RWXU).map_err(|e| fail("make directory", path, e))
}

pub(super) fn fail(op: &str, path: &[u8], e: Errno) -> ImageError {
    ImageError::Io {
        what: format!("{op} {}", shown(path)),
        source: e.into(),
    }
}

pub(super) fn refused(path: &[u8], why: impl Into<String>) -> ImageError {
    ImageError::Unsafe {
        entry: shown(path),
        why: why.into(),
    }
}

/// A path of an archive as names below the root, or why it is refused. `./` and slashes at the end are left out; the root itself is empty.
pub(super) fn clean(path: &[u8]) -> Result<Vec<u8>, ImageError> {
    if path.starts_with(b"/") {
        return Err(refused(path, "an absolute path"));
    }
    let mut out = Vec::with_capacity(path.len());
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(refused(path, "a path with `..`")),
            part if part.len() > MAX_NAME || part.contains(&0) => {
                return Err(refused(path, "a name that is too long or holds NUL"));
            }
            part => out = join(&out, part),
        }
    }
    Ok(out)
}
