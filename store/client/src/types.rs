//! What calls take and give.

use bytes::Bytes;
use tidepool_proto::wire::{self, WireError, response};
use tidepool_proto::{CheckpointId, ChunkName, Epoch, SandboxId, SessionId, TurnNo};

use crate::ClientError;

/// One turn, to be committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    pub sandbox: SandboxId,
    /// The epoch with which the caller holds the sandbox.
    pub epoch: Epoch,
    /// One more than the last; the first may be 0 or 1.
    pub turn: TurnNo,
    /// The turn's idempotency key, as in the record; empty for none.
    pub key: String,
    /// An encoded [`tidepool_proto::turn::TurnRecord`]: its checkpoint is `manifest`'s or an earlier one of this sandbox.
    pub record: Vec<u8>,
    /// The new checkpoint and its encoded manifest; none where the turn made no new one.
    pub manifest: Option<(CheckpointId, Vec<u8>)>,
    /// The session that uploaded the chunks.
    pub session: Option<SessionId>,
    /// The lowest round of all answers that this rests on: of pins and puts, of what was read of other sandboxes and of images. 0 where it rests on none.
    pub round: u64,
    /// The checkpoint of this sandbox whose chunks were taken over without pinning them. It must still be there.
    pub base: Option<CheckpointId>,
}

/// What was pinned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pinned {
    /// The names the store does not have.
    pub missing: Vec<ChunkName>,
    /// The lowest round that the others carry now: what rests on them says so when it commits. 0 where nothing was asked.
    pub round: u64,
}

/// The lower of two rounds, where 0 stands for none.
pub fn lower_round(a: u64, b: u64) -> u64 {
    match (a, b) {
        (0, other) | (other, 0) => other,
        (a, b) => a.min(b),
    }
}

/// What a put did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PutStats {
    /// Bodies stored, and their bytes.
    pub stored: u64,
    pub stored_bytes: u64,
    /// Bodies that were there already.
    pub present: u64,
    /// The lowest round that all of these carry now, as in [`Pinned`].
    pub round: u64,
}

/// A sandbox, as the store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxRecord {
    pub id: SandboxId,
    pub name: String,
    pub epoch: Epoch,
    /// How many turns are committed.
    pub turns: u64,
    /// The number of the last one; 0 also where there is none.
    pub last_turn: TurnNo,
    /// The checkpoint that the last turn points at.
    pub head: Option<CheckpointId>,
    pub meta: Vec<u8>,
    /// Counts the changes of its history: turns, removals, marks, labels.
    pub changes: u64,
    /// As the store's core encodes them; empty for none.
    pub labels: Vec<u8>,
}

/// A node's account of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreStatus {
    pub chunks: u64,
    /// Bytes of their bodies.
    pub chunk_bytes: u64,
    /// Every group has a leader.
    pub ready: bool,
    /// Writes are refused for want of room.
    pub full: bool,
    pub free_bytes: u64,
    /// Damaged bodies and records met since the node started.
    pub corruptions: u64,
    /// Connections and requests refused since the node started.
    pub refused: u64,
    pub version: String,
    /// The cluster's id.
    pub cluster: String,
    pub shards: u32,
}

pub(crate) fn status(op: response::Op) -> Result<StoreStatus, ClientError> {
    match op {
        response::Op::Status(s) => Ok(StoreStatus {
            chunks: s.chunks,
            chunk_bytes: s.chunk_bytes,
            ready: s.ready,
            full: s.full,
            free_bytes: s.free_bytes,
            corruptions: s.corruptions,
            refused: s.refused,
            version: s.version,
            cluster: s.cluster,
            shards: s.shards,
        }),
        _ => Err(ClientError::unexpected()),
    }
}

pub(crate) fn sandbox_record(s: response::Sandbox) -> Result<SandboxRecord, WireError> {
    Ok(SandboxRecord {
        id: SandboxId(wire::array(&s.id, "a sandbox id has 16 bytes")?),
        name: s.name,
        epoch: Epoch(s.epoch),
        turns: s.turns,
        last_turn: TurnNo(s.last_turn),
        head: checkpoint(&s.head)?,
        meta: s.meta.to_vec(),
        changes: s.changes,
        labels: s.labels.to_vec(),
    })
}

fn checkpoint(bytes: &Bytes) -> Result<Option<CheckpointId>, WireError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    Ok(Some(CheckpointId(wire::array(
        bytes,
        "a checkpoint id has 32 bytes",
    )?)))
}
