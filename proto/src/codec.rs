//! The byte codec under every stored format: little-endian, LEB128 varints, length-prefixed bytes.
//!
//! The reader never allocates more than the input could hold: a count is checked against the bytes that are left before
//! anything is reserved, and a decoder that finishes with bytes left over is an error.

use crate::ids::ChunkName;

/// Why bytes are not the format they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The input ended inside a value.
    #[error("{format}: truncated at byte {at}")]
    Truncated { format: &'static str, at: usize },
    /// The version byte is not one this build reads.
    #[error("{format}: version {found} is not supported")]
    Version { format: &'static str, found: u8 },
    /// A value is outside what the format allows.
    #[error("{format}: {what}")]
    Invalid { format: &'static str, what: String },
    /// The checksum or the authentication tag does not fit the bytes.
    #[error("{format}: checksum does not match: the bytes were damaged")]
    Damaged { format: &'static str },
    /// The bytes decode, but are not those the name stands for.
    #[error("chunk {name}: the content does not match its name")]
    WrongName { name: ChunkName },
}

/// Appends values to a buffer.
#[derive(Debug, Default)]
pub struct Writer {
    buf: Vec<u8>,
    links: Vec<(usize, ChunkName)>,
}

impl Writer {
    /// A writer that opens with the version byte `version`.
    pub fn versioned(version: u8) -> Self {
        Self {
            buf: vec![version],
            links: Vec::new(),
        }
    }

    /// The bytes written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.buf
    }

    /// The bytes written, and where in them which chunks are named.
    pub fn into_linked(self) -> Linked {
        Linked {
            bytes: self.buf,
            links: self.links,
        }
    }

    /// The name of a chunk that what is written here needs.
    pub fn link(&mut self, name: &ChunkName) {
        self.links.push((self.buf.len(), *name));
        self.raw(&name.0);
    }

    pub fn u8(&mut self, v: u8) {
        self.buf.push(v);
    }

    pub fn u32_le(&mut self, v: u32) {
        self.buf.extend_from_slice(&v.to_le_bytes());
    }

    /// LEB128.
    pub fn varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.buf.push((v as u8 & 0x7f) | 0x80);
            v >>= 7;
        }
        self.buf.push(v as u8);
    }

    /// Zigzag, then LEB128.
    pub fn signed(&mut self, v: i64) {
        self.varint(((v << 1) ^ (v >> 63)) as u64);
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// Length-prefixed bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.raw(bytes);
    }

    /// One presence byte, then the value where there is one.
    pub fn option<T>(&mut self, v: Option<T>, write: impl FnOnce(&mut Self, T)) {
        match v {
            None => self.u8(0),
            Some(v) => {
                self.u8(1);
                write(self, v);
            }
        }
    }
}

/// An encoded value that names chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linked {
    pub bytes: Vec<u8>,
    /// Where in the bytes a name begins, and the name; in order.
    pub links: Vec<(usize, ChunkName)>,
}

impl Linked {
    /// The names that begin in `range`, each once.
    pub fn within(&self, range: std::ops::Range<usize>) -> Vec<ChunkName> {
        let from = self.links.partition_point(|(at, _)| *at < range.start);
        let mut seen = std::collections::BTreeSet::new();
        self.links[from..]
            .iter()
            .take_while(|(at, _)| *at < range.end)
            .filter(|(_, name)| seen.insert(*name))
            .map(|(_, name)| *name)
            .collect()
    }
}

/// Reads values from a buffer, with every length checked against what is left.
#[derive(Debug)]
pub struct Reader<'a> {
    format: &'static str,
    all: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// A reader over `all`; `format` names the format in errors.
    pub fn new(format: &'static str, all: &'a [u8]) -> Self {
        Self { format, all, at: 0 }
    }

    /// A reader past a version byte that must be `version`.
    pub fn versioned(
        format: &'static str,
        all: &'a [u8],
        version: u8,
    ) -> Result<Self, FormatError> {
        let mut r = Self::new(format, all);
        match r.u8()? {
            v if v == version => Ok(r),
            found => Err(FormatError::Version { format, found }),
        }
    }

    /// An error of this format.
    pub fn invalid(&self, what: impl Into<String>) -> FormatError {
        FormatError::Invalid {
            format: self.format,
            what: what.into(),
        }
    }

    /// Bytes not read yet.
    pub fn left(&self) -> usize {
        self.all.len() - self.at
    }

    pub fn raw(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        if n > self.left() {
            return Err(FormatError::Truncated {
                format: self.format,
                at: self.all.len(),
            });
        }
        let out = &self.all[self.at..self.at + n];
        self.at += n;
        Ok(out)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut out = [0u8; N];
        out.copy_from_slice(self.raw(N)?);
        Ok(out)
    }

    pub fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u32_le(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// LEB128; only the shortest form is taken, so that equal values have equal bytes.
    pub fn varint(&mut self) -> Result<u64, FormatError> {
        let mut v = 0u64;
        for shift in (0..64).step_by(7) {
            let b = self.u8()?;
            let part = u64::from(b & 0x7f);
            if shift == 63 && part > 1 {
                return Err(self.invalid("a varint is larger than 64 bits"));
            }
            v |= part << shift;
            if b & 0x80 == 0 {
                if b == 0 && shift != 0 {
                    return Err(self.invalid("a varint is longer than it has to be"));
                }
                return Ok(v);
            }
        }
        Err(self.invalid("a varint is larger than 64 bits"))
    }

    pub fn varint_u32(&mut self) -> Result<u32, FormatError> {
        let v = self.varint()?;
        u32::try_from(v).map_err(|_| self.invalid(format!("{v} does not fit 32 bits")))
    }

    pub fn signed(&mut self) -> Result<i64, FormatError> {
        let v = self.varint()?;
        Ok((v >> 1) as i64 ^ -((v & 1) as i64))
    }

    /// Length-prefixed bytes of at most `max`.
    pub fn bytes(&mut self, max: usize) -> Result<&'a [u8], FormatError> {
        let n = self.varint()?;
        if n > max as u64 {
            return Err(self.invalid(format!("a value of {n} bytes is over its bound of {max}")));
        }
        self.raw(n as usize)
    }

    /// Length-prefixed UTF-8 of at most `max` bytes.
    pub fn text(&mut self, max: usize) -> Result<String, FormatError> {
        let bytes = self.bytes(max)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.invalid("a text is not UTF-8"))
    }

    /// A count of items of at least `min_item` bytes each: never more than the bytes left could hold.
    pub fn count(&mut self, max: usize, min_item: usize) -> Result<usize, FormatError> {
        let n = self.varint()?;
        let fits = (self.left() / min_item.max(1)).min(max);
        if n > fits as u64 {
            return Err(self.invalid(format!("a count of {n} is over its bound of {fits}")));
        }
        Ok(n as usize)
    }

    pub fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, FormatError>,
    ) -> Result<Option<T>, FormatError> {
        match self.u8()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            v => Err(self.invalid(format!("{v} is not a presence byte"))),
        }
    }

    pub fn chunk_name(&mut self) -> Result<ChunkName, FormatError> {
        Ok(ChunkName(self.array()?))
    }

    /// Fails if anything is left.
    pub fn finish(self) -> Result<(), FormatError> {
        match self.left() {
            0 => Ok(()),
            n => Err(self.invalid(format!("{n} bytes follow the end"))),
        }
    }
}
