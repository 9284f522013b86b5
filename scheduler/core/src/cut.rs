//! Cutting: bytes become content-defined chunks, named by their domain's key; zero blocks become holes.
//!
//! FastCDC with 4 KiB / 16 KiB / 64 KiB (minimum, average, maximum), fed piece by piece, so that a file of any size takes bounded memory.
//!
//! Invariants: a recipe depends on the bytes alone, never on how they were fed or on where the file system kept real holes. So every 4 KiB block
//! (at a multiple of 4 KiB in the file, the last may be shorter) that is all zeros is a hole, and each stretch between holes is cut
//! by itself. A tree that was restored and is captured again therefore has the same root, whatever the file system made of its holes.

use fastcdc::v2020::{FastCDC, Normalization};
use tidepool_proto::codec::Linked;
use tidepool_proto::recipe::{BlobRef, MAX_RECIPE_LEN, MAX_SEGMENTS, Recipe, Segment};
use tidepool_proto::tree::{Content, MAX_INLINE, MAX_INLINE_SEGMENTS};
use tidepool_proto::{ChunkName, DomainKey};

/// The smallest chunk of a stretch but its last, in bytes.
pub const MIN_CHUNK: usize = 4 * 1024;
/// The average aimed at, in bytes.
pub const AVG_CHUNK: usize = 16 * 1024;
/// The largest chunk of file content, in bytes.
pub const MAX_CHUNK: usize = 64 * 1024;
/// The block in which zeros are looked for, in bytes.
pub const BLOCK: usize = 4 * 1024;
/// The most chunks a blob may have, as its format allows.
const MAX_BLOB_CHUNKS: usize = 1 << 16;
const ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Why bytes cannot be cut into what the formats allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CutError<E> {
    /// The receiver of chunks failed.
    #[error(transparent)]
    Sink(E),
    /// More pieces than a recipe may have.
    #[error("the content needs {0} segments, more than a recipe may have")]
    TooManySegments(usize),
    /// A blob (a tree node or a recipe) is longer than its format allows.
    #[error("a blob of {0} bytes is more than one may have")]
    BlobTooLong(usize),
}

/// Receives each chunk: its name, its plaintext and the names it refers to. The same chunk may come more than once.
pub type Emit<'a, E> = dyn FnMut(ChunkName, &[u8], &[ChunkName]) -> Result<(), E> + 'a;

/// Whether every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Whole blocks compare as memory; the compiler makes a vector loop of the rest.
    bytes.chunks(BLOCK).all(|b| b == &ZEROS[..b.len()])
}

/// Where the next chunk of `data` ends. `data` must hold [`MAX_CHUNK`] bytes or all that is left.
fn next_cut(data: &[u8]) -> usize {
    FastCDC::with_level(data, MIN_CHUNK, AVG_CHUNK, MAX_CHUNK, Normalization::Level1)
        .cut(0, data.len())
        .1
}

/// Cuts one file, fed in order.
pub struct Cutter<'k> {
    key: &'k DomainKey,
    recipe: Recipe,
    /// Bytes of the current stretch that are not cut yet, from `start` on.
    stretch: Vec<u8>,
    start: usize,
    /// The beginning of a block that is not complete yet.
    partial: Vec<u8>,
    /// Bytes fed so far.
    len: u64,
    /// The first bytes, for content that stays within its node.
    head: Vec<u8>,
}

impl<'k> Cutter<'k> {
    /// A cutter that names chunks with `key`.
    pub fn new(key: &'k DomainKey) -> Self {
        Self {
            key,
            recipe: Recipe::default(),
            stretch: Vec::new(),
            start: 0,
            partial: Vec::new(),
            len: 0,
            head: Vec::new(),
        }
    }

    /// Bytes fed so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing was fed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Feeds the next bytes.
    pub fn push<E>(&mut self, mut data: &[u8], emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        if self.len < (MAX_INLINE + 1) as u64 {
            let room = MAX_INLINE + 1 - self.len as usize;
            self.head.extend_from_slice(&data[..data.len().min(room)]);
        }
        self.len += data.len() as u64;
        if !self.partial.is_empty() {
            let take = data.len().min(BLOCK - self.partial.len());
            self.partial.extend_from_slice(&data[..take]);
            data = &data[take..];
            if self.partial.len() < BLOCK {
                return Ok(());
            }
            let block = std::mem::take(&mut self.partial);
            self.blocks(&block, emit)?;
            self.partial = block;
            self.partial.clear();
        }
        let whole = data.len() - data.len() % BLOCK;
        self.blocks(&data[..whole], emit)?;
        self.partial.extend_from_slice(&data[whole..]);
        Ok(())
    }

    /// Feeds `len` zeros that the file system reports as a hole, without having read them.
    pub fn hole<E>(&mut self, mut len: u64, emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        while len > 0 {
            let in_block = self.len % BLOCK as u64;
            if in_block == 0 && len >= BLOCK as u64 && self.len > MAX_INLINE as u64 {
                let whole = len - len % BLOCK as u64;
                self.len += whole;
                len -= whole;
                self.gap(whole, emit)?;
            } else {
                let n = len.min(BLOCK as u64 - in_block);
                self.push(&ZEROS[..n as usize], emit)?;
                len -= n;
            }
        }
        Ok(())
    }

    /// Ends the file and gives its recipe.
    pub fn finish<E>(mut self, emit: &mut Emit<'_, E>) -> Result<Recipe, CutError<E>> {
        self.end(emit)?;
        Ok(self.recipe)
    }

    /// Ends the file and gives its content: inline where it is short, a recipe where that is short, else a recipe kept as chunks.
    pub fn finish_content<E>(mut self, emit: &mut Emit<'_, E>) -> Result<Content, CutError<E>> {
        if self.len <= MAX_INLINE as u64 {
            return Ok(Content::Inline(self.head));
        }
        self.end(emit)?;
        content_of(self.key, self.recipe, emit)
    }

    fn end<E>(&mut self, emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        let last = std::mem::take(&mut self.partial);
        if is_zero(&last) {
            self.gap(last.len() as u64, emit)?;
        } else {
            self.stretch.extend_from_slice(&last);
        }
        self.drain(true, emit)
    }

    /// Feeds whole blocks.
    fn blocks<E>(&mut self, data: &[u8], emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        let mut at = 0;
        while at < data.len() {
            let zero = is_zero(&data[at..at + BLOCK]);
            let mut end = at + BLOCK;
            while end < data.len() && is_zero(&data[end..end + BLOCK]) == zero {
                end += BLOCK;
            }
            if zero {
                self.gap((end - at) as u64, emit)?;
            } else {
                self.stretch.extend_from_slice(&data[at..end]);
                self.drain(false, emit)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Ends the current stretch and appends a hole.
    fn gap<E>(&mut self, len: u64, emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        if len == 0 {
            return Ok(());
        }
        self.drain(true, emit)?;
        self.segment(Segment::Hole { len })
    }

    /// Cuts what is certain; all of it at the end of a stretch.
    fn drain<E>(&mut self, all: bool, emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        loop {
            let left = self.stretch.len() - self.start;
            if left == 0 || (left < MAX_CHUNK && !all) {
                break;
            }
            let data = &self.stretch[self.start..];
            let n = next_cut(data);
            let name = self.key.name(&data[..n]);
            emit(name, &data[..n], &[]).map_err(CutError::Sink)?;
            self.start += n;
            self.segment(Segment::Data {
                chunk: name,
                offset: 0,
                len: n as u32,
            })?;
        }
        self.stretch.drain(..self.start);
        self.start = 0;
        Ok(())
    }

    fn segment<E>(&mut self, s: Segment) -> Result<(), CutError<E>> {
        self.recipe.push(s);
        match self.recipe.segments.len() {
            n if n > MAX_SEGMENTS => Err(CutError::TooManySegments(n)),
            _ => Ok(()),
        }
    }
}

/// A file's content from its recipe: in its node where the recipe is short, else kept as chunks.
pub fn content_of<E>(
    key: &DomainKey,
    recipe: Recipe,
    emit: &mut Emit<'_, E>,
) -> Result<Content, CutError<E>> {
    match recipe.segments.len() {
        n if n > MAX_SEGMENTS => Err(CutError::TooManySegments(n)),
        n if n > MAX_INLINE_SEGMENTS => Ok(Content::Stored {
            len: recipe.len(),
            recipe: store_blob(key, &recipe.encode_linked(), emit)?,
        }),
        _ => Ok(Content::Recipe(recipe)),
    }
}

/// Cuts a value that is kept as whole chunks: a tree node, a recipe. No holes. Each chunk links to the names that begin in it, which depend on
/// its own bytes and a few that follow: unchanged stretches of a value stay the same chunks.
pub fn store_blob<E>(
    key: &DomainKey,
    value: &Linked,
    emit: &mut Emit<'_, E>,
) -> Result<BlobRef, CutError<E>> {
    let bytes = &value.bytes;
    if bytes.len() > MAX_RECIPE_LEN {
        return Err(CutError::BlobTooLong(bytes.len()));
    }
    let mut chunks = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let n = next_cut(&bytes[at..]);
        let plain = &bytes[at..at + n];
        let links = value.within(at..at + n);
        let name = key.name_linked(plain, &links);
        emit(name, plain, &links).map_err(CutError::Sink)?;
        chunks.push(name);
        at += n;
    }
    if chunks.len() > MAX_BLOB_CHUNKS {
        return Err(CutError::BlobTooLong(bytes.len()));
    }
    Ok(BlobRef {
        len: bytes.len() as u64,
        chunks,
    })
}
