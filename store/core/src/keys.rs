//! The keys of a group's state: one tag byte for the table, then the key in it. All sort as they are listed to people.

use tidepool_proto::{CheckpointId, ChunkName, SandboxId, SessionId, TurnNo};

/// The tables of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Table {
    /// Chunk name: length of its body.
    Chunk = b'c',
    /// Removed or never-to-be sandboxes: nothing.
    Tombstone = b'd',
    /// Session: [`crate::SessionState`].
    Session = b'e',
    /// Image name: its record.
    Image = b'g',
    /// Sandbox and checkpoint: the turn that committed it.
    Checkpoint = b'i',
    /// Sandbox and idempotency key: turn.
    Key = b'k',
    /// Sandbox and turn: checkpoint id and manifest.
    Manifest = b'm',
    /// Sandbox name: sandbox id.
    Name = b'n',
    /// [`crate::ClusterState`].
    Cluster = b'o',
    /// Session and chunk name: nothing.
    Pin = b'p',
    /// Sandbox: [`crate::SandboxState`].
    Sandbox = b's',
    /// Sandbox and turn: the turn's record.
    Turn = b't',
    /// Sandbox: its opaque metadata.
    Meta = b'v',
    /// [`crate::ShardStats`].
    Stats = b'x',
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

pub fn pin(id: &SessionId, name: &ChunkName) -> Vec<u8> {
    key(Table::Pin, &[&id.0, &name.0])
}

/// What the keys of a session's pins open with.
pub fn pins(id: &SessionId) -> Vec<u8> {
    key(Table::Pin, &[&id.0])
}

pub fn sandbox(id: &SandboxId) -> Vec<u8> {
    key(Table::Sandbox, &[&id.0])
}

pub fn meta(id: &SandboxId) -> Vec<u8> {
    key(Table::Meta, &[&id.0])
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

pub fn cluster() -> Vec<u8> {
    key(Table::Cluster, &[])
}

pub fn stats() -> Vec<u8> {
    key(Table::Stats, &[])
}

/// The turn at the end of a turn's or manifest's key.
pub fn turn_of(key: &[u8]) -> Option<TurnNo> {
    let tail = key.last_chunk::<8>()?;
    Some(TurnNo(u64::from_be_bytes(*tail)))
}
