//! Capture of a directory of CRIU image files: memory pages by name, the rest as any files.
//!
//! `pages-*.img` go through the page packer, with an index shared by all dumps of a domain on this host; everything else (small protobufs) is cut as usual.
//! Each file is read once. The result is a tree like any other: [`crate::restore::materialise`] makes the directory again. Its id depends on what the index knew, so
//! that a dump is not checked by capturing it again; every chunk of it is checked against its name when it is fetched.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use tidepool_proto::TreeId;
use tidepool_proto::tree::Kind;
use tidepool_proto::{ChunkName, DomainKey};
use tidepool_scheduler_core::cut::{CutError, content_of};
use tidepool_scheduler_core::pages::{PackStats, PageIndex, PagePacker};

use crate::capture::{
    CaptureError, CaptureOptions, Ctx, cut_error, emitter, finish_index, io, open_root, shown,
    walk_root,
};
use crate::chunks::{ChunkSink, SinkError};
use crate::index::{Leaf, Name, TreeIndex};
use crate::sys::{self, Stat, Stretch};

const READ: usize = 1 << 20;

/// A captured dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturedDump {
    pub tree: TreeId,
    /// Logical bytes of all image files.
    pub bytes: u64,
    pub files: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// What became of the memory pages.
    pub pages: PackStats,
    /// All packs the images refer to, those found in the index among them: they have to be in the store too.
    pub packs: BTreeSet<ChunkName>,
}

/// Captures the image files in `dir`. Where this fails, or the chunks given to `sink` are not stored after all, tell
/// `pages` by [`PageIndex::forget_packs`] which packs are missing.
pub fn capture(
    dir: &Path,
    key: &DomainKey,
    pages: &mut PageIndex,
    sink: &mut dyn ChunkSink,
) -> Result<CapturedDump, CaptureError> {
    let root = open_root(dir)?;
    let mut ctx = Ctx::new(key, CaptureOptions::default(), sink);
    ctx.defer = Some(Vec::new());
    let mut index = walk_root(&mut ctx, root.as_fd())?;
    let deferred = ctx.defer.take().unwrap_or_default();
    let (stats, packs) = pack(&mut ctx, &mut index, root.as_fd(), deferred, pages)?;
    let captured = finish_index(&mut ctx, index, None)?;
    Ok(CapturedDump {
        tree: captured.tree,
        bytes: captured.bytes,
        files: captured.files,
        read_bytes: captured.read_bytes,
        pages: stats,
        packs,
    })
}

/// Whether a file of a dump holds raw memory pages.
pub(crate) fn is_pages(name: &[u8]) -> bool {
    name.starts_with(b"pages-") && name.ends_with(b".img")
}

fn pack(
    ctx: &mut Ctx<'_>,
    index: &mut TreeIndex,
    root: std::os::fd::BorrowedFd<'_>,
    files: Vec<Vec<u8>>,
    pages: &mut PageIndex,
) -> Result<(PackStats, BTreeSet<ChunkName>), CaptureError> {
    let mut packer = PagePacker::new(ctx.key, pages);
    let mut metas = Vec::new();
    for name in &files {
        let fd = sys::open_file(root, name).map_err(|e| io("open", name, e))?;
        let stat = sys::stat_fd(fd.as_fd()).map_err(|e| io("stat", name, e))?;
        metas.push((stat.ino, ctx.meta(fd.as_fd(), &stat, name)?));
        let mut emit = emitter(ctx.sink);
        packer.begin(&mut emit).map_err(|e| cut_error(name, e))?;
        feed(&mut packer, &mut ctx.buf, fd.as_fd(), &stat, &mut emit).map_err(|e| match e {
            Feed::Io(e) => io("read", name, e),
            Feed::Cut(e) => cut_error(name, e),
            Feed::Short => CaptureError::Changed { path: shown(name) },
        })?;
        ctx.read_bytes += stat.size;
        ctx.read_files += 1;
    }
    let mut emit = emitter(ctx.sink);
    let (recipes, stats) = packer.finish(&mut emit).map_err(|e| cut_error(b"", e))?;
    let packs = recipes.iter().flat_map(|r| r.chunks()).collect();
    for ((name, (ino, meta)), recipe) in files.into_iter().zip(metas).zip(recipes) {
        let content = content_of(ctx.key, recipe, &mut emit).map_err(|e| cut_error(&name, e))?;
        let link_group = None;
        let kind = Kind::File {
            content,
            link_group,
        };
        let root = index.root;
        index.put_leaf(root, Name::from(name), Arc::new(Leaf { ino, meta, kind }));
    }
    Ok((stats, packs))
}

enum Feed {
    Io(Errno),
    Cut(CutError<SinkError>),
    Short,
}

impl From<Errno> for Feed {
    fn from(e: Errno) -> Self {
        Feed::Io(e)
    }
}

fn feed(
    packer: &mut PagePacker<'_>,
    buf: &mut Vec<u8>,
    fd: std::os::fd::BorrowedFd<'_>,
    stat: &Stat,
    emit: &mut tidepool_scheduler_core::cut::Emit<'_, SinkError>,
) -> Result<(), Feed> {
    sys::stretches(fd, stat, |part| {
        match part {
            Stretch::Hole { len } => packer.hole(len, emit).map_err(Feed::Cut)?,
            Stretch::Data { mut at, len } => {
                let end = at + len;
                while at < end {
                    let n = ((end - at) as usize).min(READ);
                    buf.resize(buf.len().max(n), 0);
                    if !sys::read_exact_at(fd, &mut buf[..n], at)? {
                        return Err(Feed::Short);
                    }
                    packer.push(&buf[..n], emit).map_err(Feed::Cut)?;
                    at += n as u64;
                }
            }
        }
        Ok(())
    })
}
