//! The values of a group's state. Each opens with a version byte.

use tidepool_proto::codec::{Reader, Writer};
use tidepool_proto::{CheckpointId, Epoch, FormatError, SandboxId, TurnNo};

use crate::kv::ReadError;

const VERSION: u8 = 1;
const MAX_NAME: usize = tidepool_proto::wire::MAX_RECORD_NAME;

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
        };
        r.finish()?;
        Ok(state)
    }
}

/// An upload's session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionState {
    /// When it ends by itself, by the leader's clock.
    pub expires_ms: u64,
    /// It did: its pins are gone, and whoever still uses it has to begin again.
    pub expired: bool,
}

impl SessionState {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.varint(self.expires_ms);
        w.u8(u8::from(self.expired));
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("session", bytes, VERSION)?;
        let state = Self {
            expires_ms: r.varint()?,
            expired: match r.u8()? {
                0 => false,
                1 => true,
                v => return Err(r.invalid(format!("{v} is not a boolean")).into()),
            },
        };
        r.finish()?;
        Ok(state)
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

pub(crate) fn encode_manifest(id: &CheckpointId, manifest: &[u8]) -> Vec<u8> {
    let mut w = Writer::versioned(VERSION);
    w.raw(&id.0);
    w.raw(manifest);
    w.into_bytes()
}

/// A checkpoint's id and its manifest, whose hash is checked.
pub fn decode_manifest(bytes: &[u8]) -> Result<(CheckpointId, &[u8]), ReadError> {
    let mut r = Reader::versioned("manifest row", bytes, VERSION)?;
    let id = CheckpointId(r.array()?);
    let manifest = r.raw(r.left())?;
    if tidepool_proto::manifest::Manifest::id_of(manifest) != id {
        return Err(ReadError(format!(
            "the manifest of checkpoint {id} is damaged"
        )));
    }
    Ok((id, manifest))
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
        };
        let bytes = state.encode();
        assert_eq!(SandboxState::decode(&bytes), Ok(state));
        for cut in 0..bytes.len() {
            assert!(SandboxState::decode(&bytes[..cut]).is_err());
        }
        let session = SessionState {
            expires_ms: 77,
            expired: true,
        };
        assert_eq!(SessionState::decode(&session.encode()), Ok(session));
        let row = encode_manifest(&tidepool_proto::manifest::Manifest::id_of(b"m"), b"m");
        assert_eq!(decode_manifest(&row).unwrap().1, b"m");
        let mut bad = row.clone();
        *bad.last_mut().unwrap() ^= 1;
        assert!(decode_manifest(&bad).is_err());
    }
}
