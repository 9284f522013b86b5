//! What a node reads from its state for clients: rows, histories, and the pages of a collection as the store's `requests::gc` gives them.
//!
//! The pages here are short, so that things happen between them.

use bytes::Bytes;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::TurnRecord;
use tidepool_proto::{ChunkName, SandboxId, body};
use tidepool_store_core::keys::{self, Table};
use tidepool_store_core::{
    ChunkState, ImageState, META_GROUP, ManifestRow, SandboxState, SessionState, Tombstone, gc, op,
};

use crate::content::Content;
use crate::disk::{Body, SimDisk, Stored};
use crate::wire::{Answer, Fail, History, Query, Result};

/// Rows of a page.
const ROWS: usize = 12;

fn damaged<E>(_: E) -> Fail {
    Fail::NoBody
}

/// Answers a query from a group's state as it is now.
pub(crate) fn answer(
    content: &Content,
    disk: &mut SimDisk,
    group: u32,
    query: &Query,
) -> Result<Answer> {
    if let Query::Links(names) = query {
        return links(content, disk, group, names);
    }
    let state = disk.group(group).ok_or(Fail::NotLeader(None))?;
    match query {
        Query::Row(key) => Ok(Answer::Row(state.state.get(key).cloned())),
        Query::Manifest {
            sandbox,
            checkpoint,
        } => {
            let round = gc::gc_of(state).map_err(damaged)?.round;
            let rows = &state.state;
            let turn = rows.get(&keys::checkpoint(sandbox, checkpoint));
            let row = match turn {
                Some(turn) => {
                    let turn = tidepool_store_core::decode_number(turn).map_err(damaged)?;
                    rows.get(&keys::manifest(sandbox, tidepool_proto::TurnNo(turn)))
                }
                None => None,
            };
            let manifest = row.map(|r| ManifestRow::decode(r).map(|r| r.manifest.to_vec()));
            Ok(Answer::Manifest(
                round,
                manifest.transpose().map_err(damaged)?,
            ))
        }
        Query::History(id) => history(state, id).map(Answer::History),
        Query::Roots { round, after } => roots(state, group, *round, after),
        Query::Old { round, after } => old(state, *round, after),
        Query::Sessions => {
            let mut out = Vec::new();
            for (key, value) in state.with_prefix(&keys::table(Table::Session)) {
                if let (Ok(id), Ok(session)) =
                    (<[u8; 16]>::try_from(&key[1..]), SessionState::decode(value))
                {
                    out.push((id, session));
                }
            }
            Ok(Answer::Sessions(out))
        }
        Query::Links(_) => Err(Fail::Conflict),
    }
}

fn history(state: &Stored, id: &SandboxId) -> Result<Option<History>> {
    let Some(row) = state.state.get(&keys::sandbox(id)) else {
        return Ok(None);
    };
    let mut checkpoints = Vec::new();
    for (key, value) in state.with_prefix(&keys::of_sandbox(Table::Manifest, id)) {
        let row = ManifestRow::decode(value).map_err(damaged)?;
        if let Some(turn) = keys::turn_of(key)
            && row.removed.is_none()
        {
            checkpoints.push((turn, row.id));
        }
    }
    Ok(Some(History {
        sandbox: SandboxState::decode(row).map_err(damaged)?,
        checkpoints,
    }))
}

fn at_cut(state: &Stored, round: u64) -> Result<()> {
    match gc::gc_of(state).map_err(damaged)?.fence == round {
        true => Ok(()),
        false => Err(Fail::Conflict),
    }
}

/// A page of what is reached first, and what may be cleared up of what was removed before the round.
fn roots(state: &Stored, group: u32, round: u64, after: &[u8]) -> Result<Answer> {
    at_cut(state, round)?;
    let tables = match group {
        META_GROUP => [Table::Image, Table::ImageGrave],
        _ => [Table::Manifest, Table::Turn],
    };
    let live = |removed: Option<u64>| removed.is_none_or(|at| at >= round);
    let (mut names, mut purge) = (Vec::new(), op::Purge::default());
    let (mut sandboxes, mut checkpoints) = (Vec::new(), Vec::new());
    let (mut rows, mut next) = (0, Vec::new());
    'tables: for table in tables {
        let prefix = keys::table(table);
        if !after.is_empty() && after[0] > prefix[0] {
            continue;
        }
        for (key, value) in state
            .with_prefix(&prefix)
            .filter(|(k, _)| k.as_slice() > after)
        {
            match table {
                Table::Image => names.extend(ImageState::decode(value).map_err(damaged)?.roots),
                Table::ImageGrave => {
                    let tail = &key[1..];
                    let at = tail.first_chunk::<8>().map(|r| u64::from_be_bytes(*r));
                    match live(at) {
                        true => names.extend(ImageState::decode(value).map_err(damaged)?.roots),
                        false => purge.images.push(Bytes::copy_from_slice(tail)),
                    }
                }
                _ => {
                    let Some((id, turn)) = key[1..].split_first_chunk::<16>() else {
                        return Err(Fail::NoBody);
                    };
                    let stone = state.state.get(&keys::tombstone(&SandboxId(*id)));
                    let stone = stone.map(|s| Tombstone::decode(s)).transpose();
                    let removed = stone.map_err(damaged)?.map(|s| s.removed);
                    if removed.is_some_and(|at| at < round) {
                        sandboxes.extend_from_slice(id);
                    } else if live(removed) && table == Table::Turn {
                        let record = TurnRecord::decode(value).map_err(damaged)?;
                        names.extend(record.links());
                    } else if live(removed) {
                        let row = ManifestRow::decode(value).map_err(damaged)?;
                        if live(row.removed) {
                            let manifest = Manifest::decode(row.manifest).map_err(damaged)?;
                            names.extend(manifest.links());
                        } else {
                            checkpoints.extend_from_slice(id);
                            checkpoints.extend_from_slice(turn);
                        }
                    }
                }
            }
            rows += 1;
            if rows >= ROWS {
                next = key.clone();
                break 'tables;
            }
        }
    }
    purge.sandboxes = sandboxes.into();
    purge.checkpoints = checkpoints.into();
    let purge = (purge != op::Purge::default()).then(|| Box::new(op::Op::Purge(purge)));
    Ok(Answer::Roots { names, purge, next })
}

/// What chunks refer to, from their stored bodies.
fn links(content: &Content, disk: &mut SimDisk, group: u32, names: &[ChunkName]) -> Result<Answer> {
    let mut out = Vec::new();
    for name in names.iter().take(ROWS) {
        let state = disk.group(group).ok_or(Fail::NotLeader(None))?;
        let Some(row) = state.state.get(&keys::chunk(name)) else {
            out.push(None);
            continue;
        };
        if !ChunkState::decode(row).map_err(damaged)?.linked {
            out.push(Some(Vec::new()));
            continue;
        }
        match disk.read_body(name) {
            Some(Body::Whole) => {
                let of = body::links(content.body(name)).map_err(damaged)?;
                out.push(Some(of));
            }
            _ => return Err(Fail::NoBody),
        }
    }
    Ok(Answer::Links(out))
}

/// A page of the chunks that were neither added nor pinned since the round began.
fn old(state: &Stored, round: u64, after: &[u8]) -> Result<Answer> {
    at_cut(state, round)?;
    let (mut names, mut next) = (Vec::new(), Vec::new());
    let prefix = keys::table(Table::Chunk);
    let rows = state
        .with_prefix(&prefix)
        .filter(|(k, _)| k.as_slice() > after);
    for (at, (key, value)) in rows.enumerate() {
        if ChunkState::decode(value).map_err(damaged)?.stamp < round
            && let Ok(name) = <[u8; 32]>::try_from(&key[1..])
        {
            names.push(ChunkName(name));
        }
        if at + 1 >= ROWS {
            next = key.clone();
            break;
        }
    }
    Ok(Answer::Old { names, next })
}
