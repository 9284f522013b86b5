//! The reference of one group: its state at the furthest index that was applied anywhere, and what it was before.

use std::collections::BTreeMap;

use prost::Message as _;
use raft::eraftpb::{Entry, EntryType};
use tidepool_proto::{ChunkName, SandboxId};
use tidepool_store_core::keys::{self, Table};
use tidepool_store_core::{
    Command, GcState, Group as Kind, META_GROUP, SandboxState, Write, apply, op,
};

use super::Stats;
use crate::disk::Stored;
use crate::rng::hash;

/// One row that an entry changed.
pub(super) struct Change {
    pub(super) key: Vec<u8>,
    pub(super) old: Option<Vec<u8>>,
    pub(super) new: Option<Vec<u8>>,
}

pub(super) struct Ghost {
    group: u32,
    pub(super) state: Stored,
    /// Of every index, the entry's hash and the state's.
    pub(super) entries: BTreeMap<u64, u64>,
    pub(super) hashes: BTreeMap<u64, u64>,
    /// Where the row of a chunk that is there now came from nothing.
    pub(super) added: BTreeMap<ChunkName, u64>,
    /// What the rows that clients read have been, by index.
    rows: BTreeMap<Vec<u8>, Vec<(u64, Option<u64>)>>,
}

pub(super) fn entry_hash(entry: &Entry) -> u64 {
    let head = entry.term ^ (entry.entry_type as u64) << 60;
    hash(head, &entry.data)
}

fn value_hash(value: Option<&[u8]>) -> Option<u64> {
    value.map(|v| hash(2, v))
}

/// Rows of which clients' reads are compared with what they have been.
fn is_register(key: &[u8]) -> bool {
    let tables = [
        Table::Sandbox,
        Table::Cluster,
        Table::Checkpoint,
        Table::Image,
    ];
    key.first()
        .is_some_and(|t| tables.iter().any(|k| *k as u8 == *t))
}

impl Ghost {
    pub(super) fn new(group: u32, state: Stored) -> Self {
        let hashes = [(state.applied, state.hash)].into();
        let mut rows = BTreeMap::new();
        for (key, value) in state.state.iter().filter(|(k, _)| is_register(k)) {
            rows.insert(key.clone(), vec![(state.applied, value_hash(Some(value)))]);
        }
        Self {
            group,
            state,
            entries: BTreeMap::new(),
            hashes,
            added: BTreeMap::new(),
            rows,
        }
    }

    /// Applies the next entry, and gives what it changed.
    pub(super) fn step(&mut self, entry: &Entry, stats: &mut Stats) -> Result<Vec<Change>, String> {
        let index = entry.index;
        let mut changes = Vec::new();
        if entry.entry_type() == EntryType::EntryNormal && !entry.data.is_empty() {
            let command =
                Command::decode(&*entry.data).map_err(|e| format!("it is no command: {e}"))?;
            let kind = match self.group {
                META_GROUP => Kind::Meta,
                _ => Kind::Shard,
            };
            let outcome = apply(kind, &self.state, &command);
            if let Some(op::Op::Commit(c)) = &command.op {
                stats.refused_commits += u64::from(outcome.result.is_err());
                self.check_commit(c, !outcome.writes.is_empty())?;
            }
            if let Some(op::Op::Cut(_)) = &command.op {
                stats.rounds += u64::from(!outcome.writes.is_empty());
            }
            for write in &outcome.writes {
                self.note(write, &mut changes);
                self.state.change(write);
            }
            for change in &mut changes {
                change.new = self.state.state.get(&change.key).cloned();
            }
            changes.retain(|c| c.old != c.new);
        }
        self.state.applied = index;
        for change in &changes {
            self.check(change)?;
            if let Some(name) = chunk_of(&change.key) {
                match change.old {
                    None => self.added.insert(name, index),
                    Some(_) if change.new.is_none() => self.added.remove(&name),
                    Some(_) => None,
                };
            }
            if is_register(&change.key) {
                let was = self.rows.entry(change.key.clone()).or_default();
                was.push((index, value_hash(change.new.as_deref())));
            }
        }
        self.entries.insert(index, entry_hash(entry));
        self.hashes.insert(index, self.state.hash);
        Ok(changes)
    }

    /// Remembers what rows were before a write.
    fn note(&self, write: &Write, changes: &mut Vec<Change>) {
        let keys: Vec<Vec<u8>> = match write {
            Write::Put { key, .. } | Write::Delete { key } => vec![key.clone()],
            Write::DeletePrefix { prefix } => {
                let rows = self.state.with_prefix(prefix);
                rows.map(|(k, _)| k.clone()).collect()
            }
        };
        for key in keys {
            if !changes.iter().any(|c| c.key == key) {
                let old = self.state.state.get(&key).cloned();
                let new = None;
                changes.push(Change { key, old, new });
            }
        }
    }

    fn check_commit(
        &self,
        c: &tidepool_proto::wire::request::Commit,
        taken: bool,
    ) -> Result<(), String> {
        let Ok(id) = <[u8; 16]>::try_from(&c.sandbox[..]) else {
            return Ok(());
        };
        let Some(row) = self.state.state.get(&keys::sandbox(&SandboxId(id))) else {
            return match taken {
                true => Err("a commit to a sandbox that is not there was taken".into()),
                false => Ok(()),
            };
        };
        let held = SandboxState::decode(row).map_err(|e| e.to_string())?;
        if taken && held.epoch.0 != c.epoch {
            return Err(format!(
                "a commit of epoch {} was taken in epoch {}",
                c.epoch, held.epoch
            ));
        }
        Ok(())
    }

    /// What holds of a row and what it becomes.
    fn check(&self, change: &Change) -> Result<(), String> {
        let table = change.key.first().copied().unwrap_or_default();
        let both = change.old.as_deref().zip(change.new.as_deref());
        if table == Table::Sandbox as u8 {
            if let Some((old, new)) = both {
                let old = SandboxState::decode(old).map_err(|e| e.to_string())?;
                let new = SandboxState::decode(new).map_err(|e| e.to_string())?;
                if new.epoch < old.epoch || new.turns < old.turns || new.changes < old.changes {
                    return Err(format!("a sandbox goes back from {old:?} to {new:?}"));
                }
            } else if change.new.is_some() {
                let mut stone = change.key.clone();
                stone[0] = Table::Tombstone as u8;
                if self.state.state.contains_key(&stone) {
                    return Err("a removed sandbox comes back".into());
                }
            }
        } else if table == Table::Turn as u8 && both.is_some() {
            return Err("a recorded turn changes".into());
        } else if table == Table::Tombstone as u8 && change.new.is_none() {
            return Err("a tombstone goes".into());
        } else if table == Table::Gc as u8
            && let Some((old, new)) = both
        {
            let old = GcState::decode(old).map_err(|e| e.to_string())?;
            let new = GcState::decode(new).map_err(|e| e.to_string())?;
            if new.round < old.round || new.fence < old.fence || new.fence > new.round {
                return Err(format!("a round goes back from {old:?} to {new:?}"));
            }
        }
        Ok(())
    }

    /// Whether a row had this value at `floor` or later.
    pub(super) fn was(&self, key: &[u8], value: Option<&[u8]>, floor: u64) -> bool {
        let value = value_hash(value);
        let Some(was) = self.rows.get(key) else {
            return value.is_none();
        };
        let before = was.iter().rev().find(|(at, _)| *at <= floor);
        let at_floor = before.and_then(|(_, v)| *v);
        at_floor == value || was.iter().any(|(at, v)| *at > floor && *v == value)
    }

    /// Where a state differs, for people.
    pub(super) fn difference(&self, stored: &Stored) -> String {
        if stored.applied != self.state.applied {
            return String::new();
        }
        let mut out = String::new();
        let (ours, theirs) = (&self.state.state, &stored.state);
        for key in ours.keys().chain(theirs.keys()) {
            if ours.get(key) != theirs.get(key) && out.len() < 300 {
                let has = |map: &BTreeMap<Vec<u8>, Vec<u8>>| map.contains_key(key);
                out += &format!(
                    "; key {:?} here {} there {}",
                    String::from_utf8_lossy(key),
                    has(ours),
                    has(theirs)
                );
            }
        }
        out
    }
}

/// The chunk whose row a key is.
pub(super) fn chunk_of(key: &[u8]) -> Option<ChunkName> {
    let (table, name) = key.split_first()?;
    let name = <[u8; 32]>::try_from(name).ok()?;
    (*table == Table::Chunk as u8).then_some(ChunkName(name))
}
