//! Raft logs in the database: `group, tag` and for entries the index. What a core writes goes there as a batch, see [`put`].

use raft::eraftpb::{ConfState, Entry, HardState};
use raft_prost::Message;
use tidepool_store_core::Write;
use tidepool_store_raft::{DiskOp, LoadedLog};

use crate::db::{Batch, Db, DbError};

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

/// Adds one write of a core to a batch.
pub(crate) fn put(batch: &mut Batch<'_>, op: &DiskOp) {
    match op {
        DiskOp::Entry { group, entry } => {
            batch.put_raft(&entry_key(*group, entry.index), &entry.encode_to_vec());
        }
        DiskOp::DropEntries { group, from, to } => {
            if from < to {
                batch.delete_raft(&entry_key(*group, *from), &entry_key(*group, *to));
            }
        }
        DiskOp::Hard { group, hard } => {
            batch.put_raft(&key(*group, HARD), &hard.encode_to_vec());
        }
        DiskOp::Conf { group, conf } => {
            batch.put_raft(&key(*group, CONF), &conf.encode_to_vec());
        }
        DiskOp::Cut { group, index, term } => {
            let mut value = index.to_be_bytes().to_vec();
            value.extend_from_slice(&term.to_be_bytes());
            batch.put_raft(&key(*group, CUT), &value);
        }
        DiskOp::Applied { group, index } => {
            batch.put_raft(&key(*group, APPLIED), &index.to_be_bytes());
        }
        DiskOp::State { group, write } => match write {
            Write::Put { key, value } => batch.put_state(*group, key, value),
            Write::Delete { key } => batch.delete_state(*group, key),
            Write::DeletePrefix { prefix } => batch.delete_state_prefix(*group, prefix),
        },
        DiskOp::ClearStage { group } => batch.clear_stage(*group),
        DiskOp::Stage { group, key, value } => batch.put_stage(*group, key, value),
        DiskOp::Install { group } => batch.flip(*group),
        DiskOp::Destroy { group } => {
            batch.delete_state_prefix(*group, &[]);
            batch.clear_stage(*group);
            batch.delete_raft(&entry_key(*group, 0), &entry_key(*group, u64::MAX));
            for tag in [CONF, CUT, APPLIED] {
                batch.delete_raft_key(&key(*group, tag));
            }
        }
    }
}

fn number(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

/// The last index of a group whose effects are in its state here; none where the group is not here.
pub(crate) fn applied(db: &Db, group: u32) -> Result<Option<u64>, DbError> {
    let value = db.raft(&key(group, APPLIED))?;
    let damaged = || DbError::Corruption(format!("group {group}: the applied index is damaged"));
    value.map(|v| number(&v).ok_or_else(damaged)).transpose()
}

/// Whether the group is here.
pub(crate) fn is_here(db: &Db, group: u32) -> Result<bool, DbError> {
    Ok(db.raft(&key(group, CONF))?.is_some())
}

/// Reads a group's log. Of a group that is not here only the vote may be set.
pub(crate) fn load(db: &Db, group: u32) -> Result<LoadedLog, DbError> {
    let damaged = |what: &str| DbError::Corruption(format!("group {group}: {what} is damaged"));
    let get = |tag| db.raft(&key(group, tag));
    let conf = match get(CONF)? {
        Some(bytes) => ConfState::decode(&*bytes).map_err(|_| damaged("the list of members"))?,
        None => ConfState::default(),
    };
    let hard = match get(HARD)? {
        Some(bytes) => HardState::decode(&*bytes).map_err(|_| damaged("the vote"))?,
        None => HardState::default(),
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
    })?;
    if let Some(e) = bad {
        return Err(damaged(&format!("a log entry ({e})")));
    }
    Ok(LoadedLog {
        hard,
        conf,
        cut,
        entries,
        applied: applied(db, group)?.unwrap_or(0),
    })
}

/// What a log needs that was begun before groups had other members: its beginning is cut off, so that a new member starts from a raft
/// snapshot, which names the members, and not from entries that do not.
pub(crate) fn cut_beginning(db: &Db, group: u32) -> Result<Vec<DiskOp>, DbError> {
    let log = load(db, group)?;
    let at_applied = |e: &&Entry| e.index == log.applied;
    if log.cut != (0, 0) || log.conf == ConfState::default() {
        return Ok(Vec::new());
    }
    let Some(entry) = log.entries.iter().find(at_applied) else {
        return Ok(Vec::new());
    };
    let (index, term) = (entry.index, entry.term);
    Ok(vec![
        DiskOp::DropEntries {
            group,
            from: 0,
            to: index + 1,
        },
        DiskOp::Cut { group, index, term },
    ])
}
