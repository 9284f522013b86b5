//! Fetching content in batches and writing it where it belongs.
//!
//! The segments of one file are grouped by chunk, so that a pack of pages is fetched once for an image however its pages are scattered.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use tidepool_proto::ChunkName;
use tidepool_proto::recipe::{Recipe, Segment};
use tidepool_proto::tree::Meta;

use super::{RestoreError, io, meta};
use crate::capture::{TreeKind, shown};
use crate::chunks::{ChunkSource, SourceError, wrong_count};
use crate::sys;

/// A batch is fetched when it is expected to have so many bytes,
const BATCH_BYTES: usize = 8 << 20;
/// or so many chunks,
const BATCH_CHUNKS: usize = 512;
/// or so many files, which stay open until then.
const BATCH_FILES: usize = 256;

/// A file that was made and sized; its content and metadata follow.
pub(super) struct Pending {
    pub(super) fd: OwnedFd,
    pub(super) meta: Meta,
    pub(super) path: Vec<u8>,
}

struct Write {
    file: usize,
    at: u64,
    offset: u32,
    len: u32,
}

pub(super) struct Batch<'a> {
    pub(super) source: &'a mut dyn ChunkSource,
    pub(super) fetched: u64,
    kind: TreeKind,
    files: Vec<Pending>,
    order: Vec<ChunkName>,
    writes: HashMap<ChunkName, Vec<Write>>,
    expected: usize,
}

impl<'a> Batch<'a> {
    pub(super) fn new(source: &'a mut dyn ChunkSource, kind: TreeKind) -> Self {
        Self {
            source,
            fetched: 0,
            kind,
            files: Vec::new(),
            order: Vec::new(),
            writes: HashMap::new(),
            expected: 0,
        }
    }

    /// Adds a file. It is complete, metadata included, after the next flush that keeps none.
    pub(super) fn add(&mut self, file: Pending, recipe: Recipe) -> Result<(), RestoreError> {
        let mut order = Vec::new();
        let mut parts: HashMap<ChunkName, Vec<(u64, u32, u32)>> = HashMap::new();
        let mut at = 0;
        for segment in recipe.segments {
            if let Segment::Data { chunk, offset, len } = segment {
                let part = parts.entry(chunk).or_insert_with(|| {
                    order.push(chunk);
                    Vec::new()
                });
                part.push((at, offset, len));
            }
            at += segment.len();
        }
        self.files.push(file);
        for chunk in order {
            let file = self.files.len() - 1;
            let parts = parts.remove(&chunk).unwrap_or_default();
            let reach = parts.iter().map(|(_, o, l)| (o + l) as usize).max();
            let writes = self.writes.entry(chunk).or_insert_with(|| {
                self.order.push(chunk);
                self.expected += reach.unwrap_or(0);
                Vec::new()
            });
            writes.extend(parts.into_iter().map(|(at, offset, len)| Write {
                file,
                at,
                offset,
                len,
            }));
            if self.expected >= BATCH_BYTES || self.order.len() >= BATCH_CHUNKS {
                self.flush(1)?;
            }
        }
        match self.files.len() >= BATCH_FILES {
            true => self.flush(0),
            false => Ok(()),
        }
    }

    /// Fetches and writes what was added, and completes all files but the last `keep`.
    pub(super) fn flush(&mut self, keep: usize) -> Result<(), RestoreError> {
        let order = std::mem::take(&mut self.order);
        let mut writes = std::mem::take(&mut self.writes);
        self.expected = 0;
        if !order.is_empty() {
            let chunks = self.source.get(&order);
            let chunks = chunks.and_then(|c| match c.len() == order.len() {
                true => Ok(c),
                false => Err(wrong_count(order[0])),
            });
            let chunks = chunks.map_err(|source| self.failed(&writes, source))?;
            for (name, plain) in order.iter().zip(chunks) {
                self.fetched += plain.len() as u64;
                for w in writes.remove(name).unwrap_or_default() {
                    let file = &self.files[w.file];
                    let (from, to) = (w.offset as usize, w.offset as usize + w.len as usize);
                    let Some(part) = plain.get(from..to) else {
                        return Err(RestoreError::Source {
                            path: shown(&file.path),
                            source: SourceError::Damaged {
                                name: *name,
                                reason: format!("it has {} bytes, {to} are needed", plain.len()),
                            },
                        });
                    };
                    sys::write_all_at(file.fd.as_fd(), part, w.at)
                        .map_err(|e| io("write", &file.path, e))?;
                }
            }
        }
        let complete = self.files.len().saturating_sub(keep);
        for file in self.files.drain(..complete) {
            meta::set_open(file.fd.as_fd(), &file.meta, self.kind, &file.path)?;
        }
        Ok(())
    }

    /// A failed fetch, with the path that needed the chunk.
    fn failed(&self, writes: &HashMap<ChunkName, Vec<Write>>, source: SourceError) -> RestoreError {
        let name = match &source {
            SourceError::Missing { name }
            | SourceError::Damaged { name, .. }
            | SourceError::Failed { name, .. } => *name,
            SourceError::Format { first, .. } => *first,
        };
        let file = writes.get(&name).and_then(|w| w.first()).map(|w| w.file);
        let path = file.and_then(|f| self.files.get(f)).map(|f| shown(&f.path));
        RestoreError::Source {
            path: path.unwrap_or_else(|| "a batch of files".into()),
            source,
        }
    }
}
