//! The values of a group's state. Each opens with a version byte.

use tidepool_proto::codec::{Reader, Writer};
use tidepool_proto::{CheckpointId, ChunkName, Epoch, FormatError, SandboxId, TurnNo};

use crate::kv::ReadError;

const VERSION: u8 = 2;
const MAX_NAME: usize = tidepool_proto::wire::MAX_RECORD_NAME;
/// The most roots an image may have.
pub(crate) const MAX_IMAGE_ROOTS: usize = 16;

impl From<FormatError> for ReadError {
    fn from(e: FormatError) -> Self {
        ReadError(e.to_string())
    }
}

/// A sandbox, but for its metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxState {
    pub name: String,
    pub epoch: Epoch,
    /// What the holder of this epoch took it with; zero for the creator.
    pub token: [u8; 16],
    /// Committed turns.
    pub turns: u64,
    /// The number of the last; 0 where there is none.
    pub last_turn: TurnNo,
    /// The checkpoint that the last turn's record points at.
    pub head: Option<CheckpointId>,
    /// Counts the changes of the metadata.
    pub meta_version: u64,
    /// Counts the changes of its history: turns committed, checkpoints removed, kept or released. A plan of removals is good for one count.
    pub changes: u64,
}

impl SandboxState {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.bytes(self.name.as_bytes());
        w.varint(self.epoch.0);
        w.raw(&self.token);
        w.varint(self.turns);
        w.varint(self.last_turn.0);
        w.option(self.head, |w, h| w.raw(&h.0));
        w.varint(self.meta_version);
        w.varint(self.changes);
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("sandbox state", bytes, VERSION)?;
        let state = Self {
            name: r.text(MAX_NAME)?,
            epoch: Epoch(r.varint()?),
            token: r.array()?,
            turns: r.varint()?,
            last_turn: TurnNo(r.varint()?),
            head: r.option(|r| Ok(CheckpointId(r.array()?)))?,
            meta_version: r.varint()?,
            changes: r.varint()?,
        };
        r.finish()?;
        Ok(state)
    }
}

/// An upload's session: nothing depends on it, but a collection waits a while for those that are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionState {
    /// When it ends by itself, by the leader's clock.
    pub expires_ms: u64,
    /// The group's round when the session opened here.
    pub round: u64,
}

impl SessionState {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.varint(self.expires_ms);
        w.varint(self.round);
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("session", bytes, VERSION)?;
        let state = Self {
            expires_ms: r.varint()?,
            round: r.varint()?,
        };
        r.finish()?;
        Ok(state)
    }
}

/// A chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkState {
    /// Bytes of its body.
    pub len: u32,
    /// The group's round when it was last added or pinned.
    pub stamp: u64,
    /// Its body carries links to other chunks.
    pub linked: bool,
}

impl ChunkState {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.varint(u64::from(self.len));
        w.varint(self.stamp);
        w.u8(u8::from(self.linked));
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("chunk", bytes, VERSION)?;
        let state = Self {
            len: r.varint_u32()?,
            stamp: r.varint()?,
            linked: match r.u8()? {
                0 => false,
                1 => true,
                v => return Err(r.invalid(format!("{v} is not a boolean")).into()),
            },
        };
        r.finish()?;
        Ok(state)
    }
}

/// How far collections have come in a group. See [`crate::gc`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GcState {
    /// The newest round that this group was told of; what is pinned, read or removed now carries it.
    pub round: u64,
    /// The round of the last cut: what rests on an older one is not committed any more.
    pub fence: u64,
    /// Who asked for the newest round, in the meta group; zero elsewhere.
    pub token: [u8; 16],
}

impl Default for GcState {
    fn default() -> Self {
        Self {
            round: 1,
            fence: 1,
            token: [0; 16],
        }
    }
}

impl GcState {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.varint(self.round);
        w.varint(self.fence);
        w.raw(&self.token);
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("collection state", bytes, VERSION)?;
        let state = Self {
            round: r.varint()?,
            fence: r.varint()?,
            token: r.array()?,
        };
        if state.fence == 0 || state.fence > state.round {
            return Err(r.invalid("a fence beyond the round").into());
        }
        r.finish()?;
        Ok(state)
    }
}

/// A sandbox that was removed, or that never will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tombstone {
    /// The shard's round at its removal: what it had counts as live in rounds up to that one.
    pub removed: u64,
    /// The name it had; empty where it never was.
    pub name: String,
}

impl Tombstone {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.varint(self.removed);
        w.bytes(self.name.as_bytes());
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("tombstone", bytes, VERSION)?;
        let state = Self {
            removed: r.varint()?,
            name: r.text(MAX_NAME)?,
        };
        r.finish()?;
        Ok(state)
    }
}

/// An image: what it rests on, and what its hosts wrote down about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageState {
    /// The chunks from which everything in it is reached.
    pub roots: Vec<ChunkName>,
    pub record: Vec<u8>,
}

impl ImageState {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.varint(self.roots.len() as u64);
        for root in &self.roots {
            w.raw(&root.0);
        }
        w.raw(&self.record);
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("image", bytes, VERSION)?;
        let n = r.count(MAX_IMAGE_ROOTS, ChunkName::LEN)?;
        let roots = (0..n).map(|_| r.chunk_name()).collect::<Result<_, _>>()?;
        let record = r.raw(r.left())?.to_vec();
        Ok(Self { roots, record })
    }
}

/// What a shard holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ShardStats {
    pub chunks: u64,
    /// Bytes of their bodies.
    pub chunk_bytes: u64,
}

impl ShardStats {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.varint(self.chunks);
        w.varint(self.chunk_bytes);
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("shard statistics", bytes, VERSION)?;
        let state = Self {
            chunks: r.varint()?,
            chunk_bytes: r.varint()?,
        };
        r.finish()?;
        Ok(state)
    }
}

pub(crate) fn encode_number(n: u64) -> Vec<u8> {
    let mut w = Writer::versioned(VERSION);
    w.varint(n);
    w.into_bytes()
}

/// A turn or a length.
pub fn decode_number(bytes: &[u8]) -> Result<u64, ReadError> {
    let mut r = Reader::versioned("number", bytes, VERSION)?;
    let n = r.varint()?;
    r.finish()?;
    Ok(n)
}

pub(crate) fn encode_sandbox_id(id: &SandboxId) -> Vec<u8> {
    let mut w = Writer::versioned(VERSION);
    w.raw(&id.0);
    w.into_bytes()
}

pub(crate) fn decode_sandbox_id(bytes: &[u8]) -> Result<SandboxId, ReadError> {
    let mut r = Reader::versioned("sandbox id", bytes, VERSION)?;
    let id = SandboxId(r.array()?);
    r.finish()?;
    Ok(id)
}

/// A checkpoint in its sandbox's shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestRow<'a> {
    /// The shard's round at the checkpoint's removal, up to which it counts as live; none while it is.
    pub removed: Option<u64>,
    pub id: CheckpointId,
    pub manifest: &'a [u8],
}

impl<'a> ManifestRow<'a> {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.option(self.removed, |w, round| w.varint(round));
        w.raw(&self.id.0);
        w.raw(self.manifest);
        w.into_bytes()
    }

    /// Reads a row, and checks the manifest's hash.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("manifest row", bytes, VERSION)?;
        let removed = r.option(|r| r.varint())?;
        let id = CheckpointId(r.array()?);
        let manifest = r.raw(r.left())?;
        if tidepool_proto::manifest::Manifest::id_of(manifest) != id {
            return Err(ReadError(format!(
                "the manifest of checkpoint {id} is damaged"
            )));
        }
        Ok(Self {
            removed,
            id,
            manifest,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_read_back_and_cuts_are_seen() {
        let state = SandboxState {
            name: "a".into(),
            epoch: Epoch(3),
            token: [1; 16],
            turns: 9,
            last_turn: TurnNo(8),
            head: Some(CheckpointId([2; 32])),
            meta_version: 1,
            changes: 4,
        };
        let bytes = state.encode();
        assert_eq!(SandboxState::decode(&bytes), Ok(state));
        for cut in 0..bytes.len() {
            assert!(SandboxState::decode(&bytes[..cut]).is_err());
        }
        let session = SessionState {
            expires_ms: 77,
            round: 3,
        };
        assert_eq!(SessionState::decode(&session.encode()), Ok(session));
        let chunk = ChunkState {
            len: 70_000,
            stamp: 9,
            linked: true,
        };
        assert_eq!(ChunkState::decode(&chunk.encode()), Ok(chunk));
        let gc = GcState {
            round: 5,
            fence: 4,
            token: [7; 16],
        };
        assert_eq!(GcState::decode(&gc.encode()), Ok(gc));
        let ahead = GcState { fence: 6, ..gc };
        assert!(GcState::decode(&ahead.encode()).is_err());
        let stone = Tombstone {
            removed: 4,
            name: "a".into(),
        };
        assert_eq!(Tombstone::decode(&stone.encode()), Ok(stone));
        let image = ImageState {
            roots: vec![ChunkName([1; 32])],
            record: b"r".to_vec(),
        };
        assert_eq!(ImageState::decode(&image.encode()), Ok(image));
        for removed in [None, Some(300)] {
            let row = ManifestRow {
                removed,
                id: tidepool_proto::manifest::Manifest::id_of(b"m"),
                manifest: b"m",
            };
            let bytes = row.encode();
            assert_eq!(ManifestRow::decode(&bytes), Ok(row));
            let mut bad = bytes.clone();
            *bad.last_mut().unwrap() ^= 1;
            assert!(ManifestRow::decode(&bad).is_err());
        }
    }
}
