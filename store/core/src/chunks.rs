//! Chunks, and the sessions of uploads.
//!
//! A pin stamps a chunk with its shard's round, and so does adding it: a collection spares what carries its own round or a later one, and
//! a commit that rests on an earlier one is refused (see [`crate::gc`]). So nothing has to be remembered of who pinned what.
//! A session's record only tells a collection that somebody is still uploading.

use std::collections::BTreeMap;

use tidepool_proto::wire::split_names;
use tidepool_proto::{ChunkName, ErrorKind, SessionId};

use crate::apply::{Applied, Refusal, Reply, session_id};
use crate::bugs::command_time;
use crate::command::op;
use crate::gc::{gc_of, stats_of};
use crate::keys;
use crate::kv::{KvRead, Write};
use crate::records::{ChunkState, SessionState};

/// Opens or renews a session.
fn touch(
    state: &dyn KvRead,
    id: &SessionId,
    expires_ms: u64,
    round: u64,
    writes: &mut Vec<Write>,
) -> Result<(), Refusal> {
    let key = keys::session(id);
    let old = match state.get(&key)? {
        Some(value) => Some(SessionState::decode(&value)?),
        None => None,
    };
    // A renewal never shortens: a delayed copy of an old request must not end a session early.
    if old.is_none_or(|s| s.expires_ms < expires_ms) {
        let round = old.map_or(round, |s| s.round);
        let value = SessionState { expires_ms, round }.encode();
        writes.push(Write::Put { key, value });
    }
    Ok(())
}

fn chunk(state: &dyn KvRead, key: &[u8]) -> Result<Option<ChunkState>, Refusal> {
    Ok(match state.get(key)? {
        Some(value) => Some(ChunkState::decode(&value)?),
        None => None,
    })
}

pub(crate) fn pin(state: &dyn KvRead, c: &op::Pin) -> Applied {
    let session = session_id(&c.session)?;
    let names = split_names(&c.names)?;
    let round = gc_of(state)?.round;
    let mut writes = Vec::new();
    touch(state, &session, c.expires_ms, round, &mut writes)?;
    let mut missing = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let key = keys::chunk(name);
        match chunk(state, &key)? {
            None => missing.push(i as u32),
            Some(old) if old.stamp < round => {
                let stamp = round;
                let value = ChunkState { stamp, ..old }.encode();
                writes.push(Write::Put { key, value });
            }
            Some(_) => {}
        }
    }
    Ok((
        Reply::Missing {
            names: missing,
            round,
        },
        writes,
    ))
}

pub(crate) fn add(state: &dyn KvRead, c: &op::AddChunks) -> Applied {
    let session = session_id(&c.session)?;
    let names = split_names(&c.names)?;
    let (lens, rest) = c.lens.as_chunks::<4>();
    if lens.len() != names.len() || c.kinds.len() != names.len() || !rest.is_empty() {
        return Err(Refusal::new(
            ErrorKind::Invalid,
            "the chunks have not one length and one kind each",
        ));
    }
    let mut chunks: BTreeMap<ChunkName, (u32, u8)> = BTreeMap::new();
    for ((name, len), kind) in names.into_iter().zip(lens).zip(&c.kinds) {
        if kind & !(op::BROUGHT | op::LINKED) != 0 {
            return Err(Refusal::new(ErrorKind::Invalid, "an unknown kind of chunk"));
        }
        let entry = chunks.entry(name).or_insert((u32::from_le_bytes(*len), 0));
        entry.1 |= kind;
    }
    let round = gc_of(state)?.round;
    let mut writes = Vec::new();
    touch(state, &session, c.expires_ms, round, &mut writes)?;
    let (mut added, mut bytes) = (0u64, 0u64);
    for (name, (len, kind)) in &chunks {
        let key = keys::chunk(name);
        let old = chunk(state, &key)?;
        let new = match old {
            Some(old) => ChunkState {
                stamp: round.max(old.stamp),
                ..old
            },
            None if kind & op::BROUGHT == 0 => {
                return Err(Refusal::again(format!(
                    "chunk {name} was collected meanwhile"
                )));
            }
            None => {
                added += 1;
                bytes += u64::from(*len);
                ChunkState {
                    len: *len,
                    stamp: round,
                    linked: kind & op::LINKED != 0,
                }
            }
        };
        if old != Some(new) {
            let value = new.encode();
            writes.push(Write::Put { key, value });
        }
    }
    if added > 0 {
        let mut stats = stats_of(state)?;
        stats.chunks = stats.chunks.saturating_add(added);
        stats.chunk_bytes = stats.chunk_bytes.saturating_add(bytes);
        writes.push(Write::Put {
            key: keys::stats(),
            value: stats.encode(),
        });
    }
    Ok((
        Reply::Added {
            chunks: added,
            bytes,
            round,
        },
        writes,
    ))
}

pub(crate) fn end_session(state: &dyn KvRead, c: &op::EndSession) -> Applied {
    let key = keys::session(&session_id(&c.session)?);
    let writes = match state.get(&key)? {
        Some(_) => vec![Write::Delete { key }],
        None => Vec::new(),
    };
    Ok((Reply::Done, writes))
}

pub(crate) fn expire_sessions(state: &dyn KvRead, c: &op::ExpireSessions, now_ms: u64) -> Applied {
    let (ids, rest) = c.sessions.as_chunks::<16>();
    if !rest.is_empty() {
        return Err(Refusal::new(
            ErrorKind::Invalid,
            "a list of sessions is not a whole number of them",
        ));
    }
    let now_ms = command_time(now_ms);
    let mut writes = Vec::new();
    for id in ids {
        let key = keys::session(&SessionId(*id));
        if let Some(value) = state.get(&key)?
            && SessionState::decode(&value)?.expires_ms <= now_ms
        {
            writes.push(Write::Delete { key });
        }
    }
    Ok((Reply::Done, writes))
}
