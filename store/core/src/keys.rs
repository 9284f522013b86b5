//! The keys of a group's state: one tag byte for the table, then the key in it. All sort as they are listed to people.

use tidepool_proto::{CheckpointId, ChunkName, SandboxId, SessionId, TurnNo};

/// The tables of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Table {
    /// Chunk name: [`crate::ChunkState`].
    Chunk = b'c',
    /// Removed or never-to-be sandboxes: [`crate::Tombstone`].
    Tombstone = b'd',
    /// Session: [`crate::SessionState`].
    Session = b'e',
    /// Image name: [`crate::ImageState`].
    Image = b'g',
    /// Round and name of a removed image: [`crate::ImageState`].
    ImageGrave = b'h',
    /// Sandbox and checkpoint: the turn that committed it.
    Checkpoint = b'i',
    /// Sandbox and idempotency key: turn.
    Key = b'k',
    /// Sandbox and checkpoint that people want kept: nothing.
    Keep = b'l',
    /// Sandbox and turn: [`crate::ManifestRow`].
    Manifest = b'm',
    /// Sandbox name: sandbox id.
    Name = b'n',
    /// [`crate::ClusterState`].
    Cluster = b'o',
    /// The cluster's policies of retention.
    Policies = b'p',
    /// Sandbox: [`crate::SandboxState`].
    Sandbox = b's',
    /// Sandbox and turn: the turn's record.
    Turn = b't',
    /// Sandbox: its opaque metadata.
    Meta = b'v',
    /// Sandbox: its labels.
    Labels = b'w',
    /// [`crate::ShardStats`].
    Stats = b'x',
    /// [`crate::GcState`].
    Gc = b'y',
    /// What is known of the last collection, in the meta group.
    GcReport = b'z',
}

fn key(table: Table, parts: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + parts.iter().map(|p| p.len()).sum::<usize>());
    out.push(table as u8);
    for part in parts {
        out.extend_from_slice(part);
    }
    out
}

/// What every key of a table opens with.
pub fn table(table: Table) -> Vec<u8> {
    vec![table as u8]
}

pub fn chunk(name: &ChunkName) -> Vec<u8> {
    key(Table::Chunk, &[&name.0])
}

pub fn session(id: &SessionId) -> Vec<u8> {
    key(Table::Session, &[&id.0])
}

pub fn sandbox(id: &SandboxId) -> Vec<u8> {
    key(Table::Sandbox, &[&id.0])
}

pub fn meta(id: &SandboxId) -> Vec<u8> {
    key(Table::Meta, &[&id.0])
}

pub fn labels(id: &SandboxId) -> Vec<u8> {
    key(Table::Labels, &[&id.0])
}

pub fn tombstone(id: &SandboxId) -> Vec<u8> {
    key(Table::Tombstone, &[&id.0])
}

pub fn turn(id: &SandboxId, turn: TurnNo) -> Vec<u8> {
    key(Table::Turn, &[&id.0, &turn.0.to_be_bytes()])
}

pub fn manifest(id: &SandboxId, turn: TurnNo) -> Vec<u8> {
    key(Table::Manifest, &[&id.0, &turn.0.to_be_bytes()])
}

pub fn checkpoint(id: &SandboxId, checkpoint: &CheckpointId) -> Vec<u8> {
    key(Table::Checkpoint, &[&id.0, &checkpoint.0])
}

pub fn idempotency(id: &SandboxId, text: &str) -> Vec<u8> {
    key(Table::Key, &[&id.0, text.as_bytes()])
}

/// What the keys of a sandbox's rows in `table` open with.
pub fn of_sandbox(table: Table, id: &SandboxId) -> Vec<u8> {
    key(table, &[&id.0])
}

pub fn name(name: &str) -> Vec<u8> {
    key(Table::Name, &[name.as_bytes()])
}

pub fn image(name: &str) -> Vec<u8> {
    key(Table::Image, &[name.as_bytes()])
}

/// `tail` is what [`image_grave_tail`] makes.
pub fn image_grave(tail: &[u8]) -> Vec<u8> {
    key(Table::ImageGrave, &[tail])
}

/// The key of a removed image within its table: the round it was removed in, then its name.
pub fn image_grave_tail(round: u64, name: &str) -> Vec<u8> {
    let mut out = round.to_be_bytes().to_vec();
    out.extend_from_slice(name.as_bytes());
    out
}

pub fn keep(id: &SandboxId, checkpoint: &CheckpointId) -> Vec<u8> {
    key(Table::Keep, &[&id.0, &checkpoint.0])
}

pub fn policies() -> Vec<u8> {
    key(Table::Policies, &[])
}

pub fn cluster() -> Vec<u8> {
    key(Table::Cluster, &[])
}

pub fn stats() -> Vec<u8> {
    key(Table::Stats, &[])
}

pub fn gc() -> Vec<u8> {
    key(Table::Gc, &[])
}

pub fn gc_report() -> Vec<u8> {
    key(Table::GcReport, &[])
}

/// The turn at the end of a turn's or manifest's key.
pub fn turn_of(key: &[u8]) -> Option<TurnNo> {
    let tail = key.last_chunk::<8>()?;
    Some(TurnNo(u64::from_be_bytes(*tail)))
}
