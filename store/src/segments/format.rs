//! How segment files and the index over them are written.
//!
//! A segment file is a header and records, nothing between them: `magic (8), version (1), zeros (3), segment number (u32), checksum (16)`, then for
//! each body `magic (4), length (u32), name (32), checksum (16), body`. Numbers are little endian.
//!
//! A record's checksum covers its place, its name, its length and the last bytes of its body. Those are the body's own checksum (see
//! `tidepool_proto::body`), so that together they cover every byte once, and a record that stands anywhere else than where it was
//! written, or holds another body, is damage. Headers are never overwritten or punched out while the file lives: a segment can always be walked.
//!
//! In the index a name leads to a place: `version (1), segment (u32), offset (u32), body length (u32)`. Each segment has a row:
//! `version (1), flags (1), indexed (u64), live (u64)`.

use tidepool_proto::ChunkName;
use tidepool_proto::body::{MAX_BODY_LEN, check};

/// Bytes before the first record.
pub(super) const SEGMENT_HEADER: usize = 32;
/// Bytes before each body.
pub(super) const RECORD_HEADER: usize = 56;

const SEGMENT_MAGIC: &[u8; 8] = b"tidepseg";
const RECORD_MAGIC: &[u8; 4] = b"\xb0dyR";
const SEGMENT_VERSION: u8 = 1;
const INDEX_VERSION: u8 = 1;
const ROW_VERSION: u8 = 1;
const SEALED: u8 = 1;
const SUM: usize = 16;

/// Where a body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub segment: u32,
    /// Of the record's header.
    pub offset: u32,
    /// Of the body, in bytes.
    pub len: u32,
}

impl Place {
    /// What the record takes in its file.
    pub(super) fn bytes(&self) -> u64 {
        RECORD_HEADER as u64 + u64::from(self.len)
    }

    /// Where the record ends in its file.
    pub(super) fn end(&self) -> u64 {
        u64::from(self.offset) + self.bytes()
    }

    /// The index's value.
    pub(super) fn encode(&self) -> [u8; 13] {
        let mut out = [INDEX_VERSION; 13];
        out[1..5].copy_from_slice(&self.segment.to_le_bytes());
        out[5..9].copy_from_slice(&self.offset.to_le_bytes());
        out[9..].copy_from_slice(&self.len.to_le_bytes());
        out
    }

    /// None: not a place that this version knows.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 13] = bytes.try_into().ok()?;
        let place = Place {
            segment: number(&bytes[1..5]),
            offset: number(&bytes[5..9]),
            len: number(&bytes[9..]),
        };
        let fits = place.len as usize <= MAX_BODY_LEN && place.offset as usize >= SEGMENT_HEADER;
        (bytes[0] == INDEX_VERSION && fits).then_some(place)
    }
}

/// What is known of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    /// Nothing is appended any more.
    pub(super) sealed: bool,
    /// Every record before this offset has been in the index: it was promised.
    pub(super) indexed: u64,
    /// Bytes of the records that the index leads to.
    pub(super) live: u64,
}

impl Row {
    pub(super) const NEW: Row = Row {
        sealed: false,
        indexed: SEGMENT_HEADER as u64,
        live: 0,
    };

    pub(super) fn encode(&self) -> [u8; 18] {
        let mut out = [0; 18];
        out[0] = ROW_VERSION;
        out[1] = if self.sealed { SEALED } else { 0 };
        out[2..10].copy_from_slice(&self.indexed.to_le_bytes());
        out[10..].copy_from_slice(&self.live.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 18] = bytes.try_into().ok()?;
        if bytes[0] != ROW_VERSION || bytes[1] & !SEALED != 0 {
            return None;
        }
        let long = |at: usize| {
            let mut out = [0; 8];
            out.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(out)
        };
        Some(Row {
            sealed: bytes[1] & SEALED != 0,
            indexed: long(2),
            live: long(10),
        })
    }
}

fn number(bytes: &[u8]) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(bytes);
    u32::from_le_bytes(out)
}

pub(super) fn segment_header(segment: u32) -> [u8; SEGMENT_HEADER] {
    let mut out = [0; SEGMENT_HEADER];
    out[..8].copy_from_slice(SEGMENT_MAGIC);
    out[8] = SEGMENT_VERSION;
    out[12..16].copy_from_slice(&segment.to_le_bytes());
    let sum = blake3::hash(&out[..16]);
    out[16..].copy_from_slice(&sum.as_bytes()[..SUM]);
    out
}

/// Whether these bytes open segment `segment`, or what is wrong.
pub(super) fn check_segment_header(segment: u32, bytes: &[u8]) -> Result<(), &'static str> {
    let wanted = segment_header(segment);
    if bytes == wanted {
        return Ok(());
    }
    // A later version says so with a right checksum.
    if bytes.len() == SEGMENT_HEADER
        && bytes[..8] == *SEGMENT_MAGIC
        && bytes[8] != SEGMENT_VERSION
        && blake3::hash(&bytes[..16]).as_bytes()[..SUM] == bytes[16..]
    {
        return Err("it has a version that this build does not know");
    }
    Err("its header is damaged")
}

/// A record's header as it was read, unverified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) name: ChunkName,
    pub(super) len: u32,
    sum: [u8; SUM],
}

impl Head {
    pub(super) fn new(segment: u32, offset: u32, name: &ChunkName, body: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&segment.to_le_bytes());
        hasher.update(&offset.to_le_bytes());
        hasher.update(&(body.len() as u32).to_le_bytes());
        hasher.update(&name.0);
        hasher.update(&body[body.len().saturating_sub(SUM)..]);
        let mut sum = [0; SUM];
        sum.copy_from_slice(&hasher.finalize().as_bytes()[..SUM]);
        Head {
            name: *name,
            len: body.len() as u32,
            sum,
        }
    }

    pub(super) fn encode(&self) -> [u8; RECORD_HEADER] {
        let mut out = [0; RECORD_HEADER];
        out[..4].copy_from_slice(RECORD_MAGIC);
        out[4..8].copy_from_slice(&self.len.to_le_bytes());
        out[8..40].copy_from_slice(&self.name.0);
        out[40..].copy_from_slice(&self.sum);
        out
    }

    /// None: no header begins here.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; RECORD_HEADER] = bytes.try_into().ok()?;
        let len = number(&bytes[4..8]);
        if bytes[..4] != *RECORD_MAGIC || len as usize > MAX_BODY_LEN {
            return None;
        }
        let (mut name, mut sum) = ([0; 32], [0; SUM]);
        name.copy_from_slice(&bytes[8..40]);
        sum.copy_from_slice(&bytes[40..]);
        Some(Head {
            name: ChunkName(name),
            len,
            sum,
        })
    }

    /// Whether this header and `body` are what was written at this place, or what is wrong.
    pub(super) fn verify(&self, segment: u32, offset: u32, body: &[u8]) -> Result<(), String> {
        check(body).map_err(|e| e.to_string())?;
        self.verify_record(segment, offset, body)
    }

    /// The same without the body's own checksum, which costs by far the most.
    pub(super) fn verify_record(
        &self,
        segment: u32,
        offset: u32,
        body: &[u8],
    ) -> Result<(), String> {
        if *self != Head::new(segment, offset, &self.name, body) {
            return Err("the record's checksum does not fit".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidepool_proto::DomainKey;

    /// Fixed by the build that made the format: a change here breaks every store.
    const GOLDEN: &str = include_str!("../../tests/golden/segment.hex");

    fn body() -> (ChunkName, Vec<u8>) {
        let key = DomainKey::new([7; 32]);
        let name = key.name(b"golden");
        (name, key.encode(&name, b"golden", &[], None))
    }

    #[test]
    fn the_format_is_what_it_was() {
        let (name, _) = body();
        // The bytes of a body are another format's: here they are fixed.
        let body = [9; 40];
        let mut bytes = segment_header(3).to_vec();
        bytes.extend(Head::new(3, 32, &name, &body).encode());
        let place = Place {
            segment: 3,
            offset: 32,
            len: 40,
        };
        bytes.extend(place.encode());
        let row = Row {
            sealed: true,
            indexed: place.end(),
            live: place.bytes(),
        };
        bytes.extend(row.encode());
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, GOLDEN.trim());
        assert_eq!(Place::decode(&place.encode()), Some(place));
        assert_eq!(Row::decode(&row.encode()), Some(row));
    }

    #[test]
    fn every_flipped_bit_of_a_record_is_seen() {
        let (name, body) = body();
        let head = Head::new(1, 32, &name, &body);
        let mut record = head.encode().to_vec();
        record.extend_from_slice(&body);
        let whole = |record: &[u8], segment: u32, offset: u32| {
            Head::decode(&record[..RECORD_HEADER])
                .filter(|h| h.len as usize == record.len() - RECORD_HEADER)
                .is_some_and(|h| h.verify(segment, offset, &record[RECORD_HEADER..]).is_ok())
        };
        assert!(whole(&record, 1, 32));
        assert!(!whole(&record, 2, 32) && !whole(&record, 1, 33));
        for bit in 0..record.len() * 8 {
            let mut bad = record.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(!whole(&bad, 1, 32), "bit {bit}");
        }
        for bit in 0..SEGMENT_HEADER * 8 {
            let mut bad = segment_header(1);
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(check_segment_header(1, &bad).is_err(), "bit {bit}");
        }
        assert!(check_segment_header(2, &segment_header(1)).is_err());
    }
}
