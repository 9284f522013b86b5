//! Recipes: the ordered chunks and holes of one file or memory image, and references to blobs kept as chunks.
//!
//! A segment may take a *slice* of a chunk, so that a memory image can name single pages inside packs of many pages. Segments carry
//! their chunk's name in full (or "the same as before"), not an index into a table: a recipe too large to stand inside its tree node is itself
//! cut by content, and unchanged stretches of it must have unchanged bytes.

use crate::body::MAX_CHUNK_LEN;
use crate::codec::{FormatError, Linked, Reader, Writer};
use crate::ids::ChunkName;

const FORMAT: &str = "recipe";
const VERSION: u8 = 1;
/// The most segments one recipe may have.
pub const MAX_SEGMENTS: usize = 1 << 24;
/// The most bytes an encoded recipe may have.
pub const MAX_RECIPE_LEN: usize = 1 << 30;

/// A stretch of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    /// `len` bytes of `chunk`'s plaintext from `offset`.
    Data {
        chunk: ChunkName,
        offset: u32,
        len: u32,
    },
    /// `len` zero bytes that take no space.
    Hole { len: u64 },
}

impl Segment {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Segment::Data { len, .. } => u64::from(*len),
            Segment::Hole { len } => *len,
        }
    }

    /// Never true of a segment that was decoded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The ordered segments of one file or memory image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recipe {
    pub segments: Vec<Segment>,
}

impl Recipe {
    /// The length of what it describes, in bytes.
    pub fn len(&self) -> u64 {
        self.segments.iter().map(Segment::len).sum()
    }

    /// Whether it describes no byte.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Appends a segment, joining it to the last where they continue each other.
    pub fn push(&mut self, next: Segment) {
        match (self.segments.last_mut(), next) {
            (_, s) if s.is_empty() => {}
            (Some(Segment::Hole { len }), Segment::Hole { len: more }) => *len += more,
            (
                Some(Segment::Data { chunk, offset, len }),
                Segment::Data {
                    chunk: c,
                    offset: o,
                    len: l,
                },
            ) if *chunk == c && *offset + *len == o => *len += l,
            (_, s) => self.segments.push(s),
        }
    }

    /// The names it needs, in order, repeats of a neighbour left out.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkName> + '_ {
        let mut last = None;
        self.segments.iter().filter_map(move |s| match s {
            Segment::Data { chunk, .. } if last != Some(*chunk) => {
                last = Some(*chunk);
                last
            }
            _ => None,
        })
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        self.write(&mut w);
        w.into_bytes()
    }

    /// Its bytes, and where they name chunks.
    pub fn encode_linked(&self) -> Linked {
        let mut w = Writer::versioned(VERSION);
        self.write(&mut w);
        w.into_linked()
    }

    pub(crate) fn write(&self, w: &mut Writer) {
        w.varint(self.segments.len() as u64);
        let mut last = None;
        for s in &self.segments {
            match s {
                Segment::Hole { len } => {
                    w.u8(0);
                    w.varint(*len);
                }
                Segment::Data { chunk, offset, len } => {
                    if last == Some(chunk) {
                        w.u8(2);
                    } else {
                        w.u8(1);
                        w.link(chunk);
                    }
                    w.varint(u64::from(*offset));
                    w.varint(u64::from(*len));
                    last = Some(chunk);
                }
            }
        }
    }

    /// Reads what [`Recipe::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::versioned(FORMAT, bytes, VERSION)?;
        let recipe = Self::read(&mut r, MAX_SEGMENTS)?;
        r.finish()?;
        Ok(recipe)
    }

    /// Reads a recipe of at most `max` segments.
    pub(crate) fn read(r: &mut Reader<'_>, max: usize) -> Result<Self, FormatError> {
        let n = r.count(max, 2)?;
        let mut segments = Vec::with_capacity(n);
        let mut last: Option<ChunkName> = None;
        let mut total = 0u64;
        for _ in 0..n {
            let segment = match r.u8()? {
                0 => Segment::Hole { len: r.varint()? },
                tag @ (1 | 2) => {
                    let chunk = match (tag, last) {
                        (1, _) => r.chunk_name()?,
                        (_, Some(chunk)) => chunk,
                        (_, None) => return Err(r.invalid("the first segment names no chunk")),
                    };
                    last = Some(chunk);
                    let (offset, len) = (r.varint_u32()?, r.varint_u32()?);
                    if u64::from(offset) + u64::from(len) > MAX_CHUNK_LEN as u64 {
                        return Err(r.invalid("a segment reaches past the end of any chunk"));
                    }
                    Segment::Data { chunk, offset, len }
                }
                tag => return Err(r.invalid(format!("unknown segment tag {tag}"))),
            };
            if segment.is_empty() {
                return Err(r.invalid("an empty segment"));
            }
            total = total
                .checked_add(segment.len())
                .filter(|t| *t <= i64::MAX as u64)
                .ok_or_else(|| r.invalid("the length is larger than a file can be"))?;
            segments.push(segment);
        }
        Ok(Self { segments })
    }
}

/// A byte string kept as whole chunks in order: a tree node, or a recipe too large to stand in its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobRef {
    /// Length in bytes.
    pub len: u64,
    pub chunks: Vec<ChunkName>,
}

impl BlobRef {
    pub(crate) fn write(&self, w: &mut Writer) {
        w.varint(self.len);
        w.varint(self.chunks.len() as u64);
        for c in &self.chunks {
            w.link(c);
        }
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        let len = r.varint()?;
        let n = r.count(1 << 16, ChunkName::LEN)?;
        if len > MAX_RECIPE_LEN as u64 || len > (n * MAX_CHUNK_LEN) as u64 || len < n as u64 {
            return Err(r.invalid(format!("a blob of {len} bytes does not fit {n} chunks")));
        }
        let chunks = (0..n).map(|_| r.chunk_name()).collect::<Result<_, _>>()?;
        Ok(Self { len, chunks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pushing_joins_neighbours() {
        let chunk = ChunkName([1; 32]);
        let mut r = Recipe::default();
        r.push(Segment::Hole { len: 4096 });
        r.push(Segment::Hole { len: 4096 });
        r.push(Segment::Data {
            chunk,
            offset: 0,
            len: 4096,
        });
        r.push(Segment::Data {
            chunk,
            offset: 4096,
            len: 4096,
        });
        r.push(Segment::Data {
            chunk,
            offset: 0,
            len: 4096,
        });
        assert_eq!(r.segments.len(), 3);
        assert_eq!(r.len(), 5 * 4096);
        assert_eq!(Recipe::decode(&r.encode()).unwrap(), r);
        assert_eq!(r.chunks().count(), 1);
    }
}
