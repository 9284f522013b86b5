//! Copying a directory.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::FileType;
use rustix::io::Errno;
use tidepool_proto::tree::Meta;

use super::unpack::{Unpacker, fail};
use super::{ImageError, io_error};
use crate::capture::{TreeKind, keeps};
use crate::index::join;
use crate::restore::meta as set;
use crate::stack::DirStack;
use crate::sys::{self, Stat, Stretch, XattrOf};

struct Level {
    path: Vec<u8>,
    subdirs: Vec<Vec<u8>>,
}

/// Copies everything below `source`, but for what is mounted there, sockets and devices.
pub(super) fn copy(source: &Path, out: &mut Unpacker<'_, '_>) -> Result<(), ImageError> {
    let root = sys::open_root(source)
        .map_err(|e| io_error(format!("opening {}", source.display()))(e.into()))?;
    let dev = sys::stat_fd(root.as_fd())
        .map_err(|e| fail("stat", b"", e))?
        .dev;
    let mut copy = Copy {
        out,
        dev,
        links: HashMap::new(),
        buf: vec![0; 1 << 20],
        dir_buf: Vec::new(),
    };
    let mut stack = DirStack::new(root).map_err(|e| fail("stat", b"", e))?;
    let mut levels = vec![copy.enter(&stack, Vec::new())?];
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.subdirs.pop() else {
            let done = levels.pop();
            if !levels.is_empty() {
                let path = done.map(|l| l.path).unwrap_or_default();
                stack.pop().map_err(|e| fail("leave", &path, e))?;
            }
            continue;
        };
        let path = join(&level.path, &name);
        let up = stack.top().map_err(|e| fail("open", &path, e))?;
        let fd = sys::open_dir(up, &name).map_err(|e| fail("open", &path, e))?;
        stack.push(fd).map_err(|e| fail("open", &path, e))?;
        levels.push(copy.enter(&stack, path)?);
    }
    Ok(())
}

struct Copy<'o, 'a, 'p> {
    out: &'o mut Unpacker<'a, 'p>,
    dev: u64,
    links: HashMap<u64, Vec<u8>>,
    buf: Vec<u8>,
    dir_buf: Vec<std::mem::MaybeUninit<u8>>,
}

impl Copy<'_, '_, '_> {
    fn meta(&self, of: XattrOf<'_>, stat: &Stat, path: &[u8]) -> Result<Meta, ImageError> {
        let mut meta = stat.meta();
        meta.xattrs = sys::xattrs(of, |name| keeps(TreeKind::Image, name))
            .map_err(|e| fail("read extended attributes of", path, e))?;
        Ok(meta)
    }

    fn enter(&mut self, stack: &DirStack, path: Vec<u8>) -> Result<Level, ImageError> {
        let fd = stack.top().map_err(|e| fail("open", &path, e))?;
        let stat = sys::stat_fd(fd).map_err(|e| fail("stat", &path, e))?;
        self.out.count_entry()?;
        let meta = self.meta(XattrOf::Open(fd), &stat, &path)?;
        self.out.dir(&path, meta)?;
        let mut subdirs = Vec::new();
        if stat.dev != self.dev {
            self.out
                .note(&path, "a mount point, imported as an empty directory");
            return Ok(Level { path, subdirs });
        }
        for name in sys::names(fd, &mut self.dir_buf).map_err(|e| fail("list", &path, e))? {
            let at = join(&path, &name);
            let stat = sys::stat_at(fd, &name).map_err(|e| fail("stat", &at, e))?;
            if stat.kind == FileType::Directory {
                subdirs.push(name);
            } else if stat.dev != self.dev {
                self.out.note(&at, "a mounted file, left out");
            } else {
                self.out.count_entry()?;
                self.entry(fd, &name, &stat, &at)?;
            }
        }
        subdirs.reverse();
        Ok(Level { path, subdirs })
    }

    fn entry(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        stat: &Stat,
        path: &[u8],
    ) -> Result<(), ImageError> {
        match stat.kind {
            FileType::RegularFile => {
                if stat.nlink > 1 {
                    if let Some(first) = self.links.get(&stat.ino) {
                        return self.out.hard_link(path, first);
                    }
                    self.links.insert(stat.ino, path.to_vec());
                }
                self.file(dir, name, path)
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())
                    .map_err(|e| fail("read link", path, e))?;
                let meta = self.meta(XattrOf::Entry(dir, name), stat, path)?;
                self.out.symlink(path, target.as_bytes(), &meta)
            }
            FileType::Fifo => {
                let meta = self.meta(XattrOf::Entry(dir, name), stat, path)?;
                self.out.fifo(path, &meta)
            }
            FileType::Socket => {
                self.out.note(path, "a socket, left out");
                Ok(())
            }
            _ => {
                self.out.note(path, "a device, left out");
                Ok(())
            }
        }
    }

    fn file(&mut self, dir: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<(), ImageError> {
        let fd = sys::open_file(dir, name).map_err(|e| fail("open", path, e))?;
        let stat = sys::stat_fd(fd.as_fd()).map_err(|e| fail("stat", path, e))?;
        if stat.kind != FileType::RegularFile {
            return Err(fail("open", path, Errno::STALE));
        }
        let meta = self.meta(XattrOf::Open(fd.as_fd()), &stat, path)?;
        let to = self.out.create(path)?;
        if rustix::fs::ioctl_ficlone(&to, &fd).is_ok() {
            self.out.count_bytes(stat.size)?;
        } else {
            rustix::fs::ftruncate(&to, stat.size).map_err(|e| fail("size", path, e))?;
            let (out, buf) = (&mut *self.out, &mut self.buf);
            sys::stretches(fd.as_fd(), &stat, |part| -> Result<(), CopyError> {
                let Stretch::Data { mut at, len } = part else {
                    return Ok(());
                };
                let end = at + len;
                while at < end {
                    let n = ((end - at) as usize).min(buf.len());
                    if !sys::read_exact_at(fd.as_fd(), &mut buf[..n], at)? {
                        return Err(CopyError::Io(Errno::STALE));
                    }
                    sys::write_all_at(to.as_fd(), &buf[..n], at)?;
                    out.count_bytes(n as u64).map_err(CopyError::Image)?;
                    at += n as u64;
                }
                Ok(())
            })
            .map_err(|e| match e {
                CopyError::Io(e) => fail("copy", path, e),
                CopyError::Image(e) => e,
            })?;
        }
        set::set_open(to.as_fd(), &meta, TreeKind::Image, path).map_err(ImageError::Dest)
    }
}

enum CopyError {
    Io(Errno),
    Image(ImageError),
}

impl From<Errno> for CopyError {
    fn from(e: Errno) -> Self {
        CopyError::Io(e)
    }
}
