//! Raft logs in the database: `group, tag` and for entries the index. One batch carries what all groups have to write.

use raft::eraftpb::{ConfState, Entry, HardState};
use raft_prost::Message;

use crate::db::{Batch, Db};
use crate::error::StoreError;
use crate::raft::{LoadedLog, Persist};

const HARD: u8 = b'h';
const CONF: u8 = b'c';
const CUT: u8 = b'k';
const APPLIED: u8 = b'a';
const ENTRY: u8 = b'e';

fn key(group: u32, tag: u8) -> Vec<u8> {
    let mut key = group.to_be_bytes().to_vec();
    key.push(tag);
    key
}

fn entry_key(group: u32, index: u64) -> Vec<u8> {
    let mut key = key(group, ENTRY);
    key.extend_from_slice(&index.to_be_bytes());
    key
}

/// Writes what a group wants persisted. `last` is the last index that was written before.
pub(crate) fn persist(batch: &mut Batch<'_>, group: u32, what: &Persist, last: u64) {
    if let (Some(first), Some(end)) = (what.entries.first(), what.entries.last()) {
        for entry in &what.entries {
            batch.put_raft(&entry_key(group, entry.index), &entry.encode_to_vec());
        }
        debug_assert!(first.index <= last + 1);
        // A conflicting suffix that was longer than what replaces it.
        if last > end.index {
            batch.delete_raft(
                &entry_key(group, end.index + 1),
                &entry_key(group, last + 1),
            );
        }
    }
    if let Some(hard) = &what.hard {
        batch.put_raft(&key(group, HARD), &hard.encode_to_vec());
    }
}

pub(crate) fn set_applied(batch: &mut Batch<'_>, group: u32, index: u64) {
    batch.put_raft(&key(group, APPLIED), &index.to_be_bytes());
}

pub(crate) fn set_members(batch: &mut Batch<'_>, group: u32, conf: &ConfState) {
    batch.put_raft(&key(group, CONF), &conf.encode_to_vec());
}

/// Forgets the entries `from..to`.
pub(crate) fn cut(batch: &mut Batch<'_>, group: u32, from: u64, to: u64, cut: (u64, u64)) {
    batch.delete_raft(&entry_key(group, from), &entry_key(group, to));
    let mut value = cut.0.to_be_bytes().to_vec();
    value.extend_from_slice(&cut.1.to_be_bytes());
    batch.put_raft(&key(group, CUT), &value);
}

fn number(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

/// Reads a group's log; none where the group was never made here.
pub(crate) fn load(db: &Db, group: u32) -> Result<Option<LoadedLog>, StoreError> {
    let damaged = |what: &str| StoreError::Damaged(format!("group {group}: {what} is damaged"));
    let get = |tag| {
        db.raft(&key(group, tag))
            .map_err(|e| StoreError::Damaged(format!("group {group}: {e}")))
    };
    let Some(conf) = get(CONF)? else {
        return Ok(None);
    };
    let conf = ConfState::decode(&*conf).map_err(|_| damaged("the list of members"))?;
    let hard = match get(HARD)? {
        Some(bytes) => HardState::decode(&*bytes).map_err(|_| damaged("the vote"))?,
        None => HardState::default(),
    };
    let applied = match get(APPLIED)? {
        Some(bytes) => number(&bytes).ok_or_else(|| damaged("the applied index"))?,
        None => 0,
    };
    let cut = match get(CUT)? {
        Some(bytes) => {
            let (index, term) = bytes
                .split_at_checked(8)
                .ok_or_else(|| damaged("the cut"))?;
            let both = number(index).zip(number(term));
            both.ok_or_else(|| damaged("the cut"))?
        }
        None => (0, 0),
    };
    let mut entries = Vec::new();
    let mut bad = None;
    db.scan_raft(&key(group, ENTRY), |_, value| {
        let entry = value
            .map_err(|e| e.to_string())
            .and_then(|v| Entry::decode(&*v).map_err(|e| e.to_string()));
        match entry {
            Ok(entry) => entries.push(entry),
            Err(e) => bad = Some(e),
        }
        bad.is_none()
    })
    .map_err(|e| StoreError::Damaged(format!("group {group}: {e}")))?;
    if let Some(e) = bad {
        return Err(damaged(&format!("a log entry ({e})")));
    }
    Ok(Some(LoadedLog {
        hard,
        conf,
        cut,
        entries,
        applied,
    }))
}
