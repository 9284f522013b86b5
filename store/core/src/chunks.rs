//! Chunks, and the sessions that pin them.
//!
//! A session opens with the first names it pins in a shard. When its time is over its pins go, and it is remembered as expired: an upload
//! that slept through it is told so, instead of committing what may have been collected meanwhile.

use std::collections::BTreeMap;

use tidepool_proto::wire::split_names;
use tidepool_proto::{ChunkName, ErrorKind, SessionId};

use crate::apply::{Applied, Refusal, Reply, session_id};
use crate::command::op;
use crate::kv::{KvRead, Write};
use crate::records::{SessionState, ShardStats};
use crate::{keys, records};

pub(crate) fn session_expired(id: &SessionId) -> Refusal {
    Refusal::new(
        ErrorKind::Conflict,
        format!("session {id} has expired: what it pinned may be gone, begin a new one"),
    )
}

/// Whether a shard knows that this session has expired.
pub(crate) fn is_expired(state: &dyn KvRead, id: &SessionId) -> Result<bool, Refusal> {
    Ok(match state.get(&keys::session(id))? {
        Some(value) => SessionState::decode(&value)?.expired,
        None => false,
    })
}

/// Opens or renews a session.
fn touch(
    state: &dyn KvRead,
    id: &SessionId,
    expires_ms: u64,
    writes: &mut Vec<Write>,
) -> Result<(), Refusal> {
    let key = keys::session(id);
    let old = match state.get(&key)? {
        Some(value) => Some(SessionState::decode(&value)?),
        None => None,
    };
    if old.is_some_and(|s| s.expired) {
        return Err(session_expired(id));
    }
    // A renewal never shortens: a delayed copy of an old request must not end a session early.
    if old.is_none_or(|s| s.expires_ms < expires_ms) {
        let value = SessionState {
            expires_ms,
            expired: false,
        }
        .encode();
        writes.push(Write::Put { key, value });
    }
    Ok(())
}

fn pin_one(
    state: &dyn KvRead,
    id: &SessionId,
    name: &ChunkName,
    writes: &mut Vec<Write>,
) -> Result<(), Refusal> {
    let key = keys::pin(id, name);
    if state.get(&key)?.is_none() {
        writes.push(Write::Put {
            key,
            value: Vec::new(),
        });
    }
    Ok(())
}

pub(crate) fn pin(state: &dyn KvRead, c: &op::Pin) -> Applied {
    let session = session_id(&c.session)?;
    let names = split_names(&c.names)?;
    let mut writes = Vec::new();
    touch(state, &session, c.expires_ms, &mut writes)?;
    let mut missing = Vec::new();
    for (i, name) in names.iter().enumerate() {
        if state.get(&keys::chunk(name))?.is_none() {
            missing.push(i as u32);
        }
        pin_one(state, &session, name, &mut writes)?;
    }
    Ok((Reply::Missing(missing), writes))
}

pub(crate) fn add(state: &dyn KvRead, c: &op::AddChunks) -> Applied {
    let session = session_id(&c.session)?;
    let names = split_names(&c.names)?;
    let (lens, rest) = c.lens.as_chunks::<4>();
    if lens.len() != names.len() || !rest.is_empty() {
        return Err(Refusal::new(
            ErrorKind::Invalid,
            "the chunks have not one length each",
        ));
    }
    let chunks: BTreeMap<ChunkName, u32> = names
        .into_iter()
        .zip(lens.iter().map(|l| u32::from_le_bytes(*l)))
        .collect();
    let mut writes = Vec::new();
    touch(state, &session, c.expires_ms, &mut writes)?;
    let (mut added, mut bytes) = (0u64, 0u64);
    for (name, len) in &chunks {
        let key = keys::chunk(name);
        if state.get(&key)?.is_none() {
            added += 1;
            bytes += u64::from(*len);
            let value = records::encode_number(u64::from(*len));
            writes.push(Write::Put { key, value });
        }
        pin_one(state, &session, name, &mut writes)?;
    }
    if added > 0 {
        let key = keys::stats();
        let mut stats = match state.get(&key)? {
            Some(value) => ShardStats::decode(&value)?,
            None => ShardStats::default(),
        };
        stats.chunks = stats.chunks.saturating_add(added);
        stats.chunk_bytes = stats.chunk_bytes.saturating_add(bytes);
        let value = stats.encode();
        writes.push(Write::Put { key, value });
    }
    Ok((
        Reply::Added {
            chunks: added,
            bytes,
        },
        writes,
    ))
}

pub(crate) fn end_session(state: &dyn KvRead, c: &op::EndSession) -> Applied {
    let session = session_id(&c.session)?;
    let key = keys::session(&session);
    if state.get(&key)?.is_none() {
        return Ok((Reply::Done, Vec::new()));
    }
    let writes = vec![
        Write::Delete { key },
        Write::DeletePrefix {
            prefix: keys::pins(&session),
        },
    ];
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
    let mut writes = Vec::new();
    for id in ids {
        let session = SessionId(*id);
        let key = keys::session(&session);
        let Some(value) = state.get(&key)? else {
            continue;
        };
        let old = SessionState::decode(&value)?;
        if old.expires_ms > now_ms {
            continue;
        }
        if old.expired {
            // Remembered for a day, so that no sleeper misses it, and then forgotten.
            writes.push(Write::Delete { key });
            continue;
        }
        let value = SessionState {
            expires_ms: now_ms.saturating_add(tidepool_proto::wire::MAX_SESSION_TTL_MS),
            expired: true,
        }
        .encode();
        writes.push(Write::Put { key, value });
        writes.push(Write::DeletePrefix {
            prefix: keys::pins(&session),
        });
    }
    Ok((Reply::Done, writes))
}
