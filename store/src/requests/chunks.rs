//! Chunks: pin, put, get.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tidepool_proto::body::check;
use tidepool_proto::wire::{
    ANSWER_BYTES, MAX_SESSION_TTL_MS, array, join_names, request, response, split_bodies,
    split_names,
};
use tidepool_proto::{ChunkName, ErrorKind};
use tidepool_store_core::{Command, Reply, keys, op};
use tokio::sync::oneshot;

use super::{Answer, Failure, Shared, done};
use crate::db::DbError;
use crate::driver::{DriverError, now_ms, received};

/// Something for each of a shard's names.
type ByShard<T> = BTreeMap<u32, Vec<T>>;

fn expires(ttl_ms: u64) -> u64 {
    now_ms().saturating_add(ttl_ms.min(MAX_SESSION_TTL_MS))
}

fn check_session(session: &Bytes) -> Result<(), Failure> {
    array::<16>(session, "a session id has 16 bytes")?;
    Ok(())
}

fn propose_all(
    shared: &Shared,
    commands: impl Iterator<Item = (u32, op::Op)>,
) -> Vec<(u32, oneshot::Receiver<Result<Reply, DriverError>>)> {
    commands
        .map(|(group, op)| (group, shared.driver.propose(group, Command::new(0, op))))
        .collect()
}

pub(super) async fn pin(shared: &Arc<Shared>, r: request::Pin) -> Answer {
    check_session(&r.session)?;
    let names = split_names(&r.names)?;
    if shared.space.is_full() {
        return Err(Failure::full());
    }
    let expires_ms = expires(r.ttl_ms);
    let mut shards: ByShard<u32> = BTreeMap::new();
    for (i, name) in names.iter().enumerate() {
        shards
            .entry(shared.map.of_chunk(name))
            .or_default()
            .push(i as u32);
    }
    let commands = shards.iter().map(|(group, at)| {
        let names = join_names(at.iter().map(|i| &names[*i as usize]));
        let session = r.session.clone();
        let op = op::Op::Pin(op::Pin {
            session,
            expires_ms,
            names,
        });
        (*group, op)
    });
    let mut missing = vec![false; names.len()];
    for (group, result) in propose_all(shared, commands) {
        let at = &shards[&group];
        if let Reply::Missing(list) = received(result).await? {
            for i in list {
                if let Some(i) = at.get(i as usize) {
                    missing[*i as usize] = true;
                }
            }
        }
    }
    let missing = names
        .iter()
        .zip(missing)
        .filter(|(name, missing)| *missing || shared.damaged.contains(name))
        .map(|(name, _)| name);
    Ok(response::Op::Missing(join_names(missing)))
}

pub(super) async fn put(shared: &Arc<Shared>, r: request::Put) -> Answer {
    check_session(&r.session)?;
    let names = split_names(&r.names)?;
    let bodies = split_bodies(&r.lens, r.bodies)?;
    if names.len() != bodies.len() {
        return Err(Failure::new(
            ErrorKind::Invalid,
            "the bodies have not one name each",
        ));
    }
    let bytes = bodies.iter().map(|b| b.len() as u64).sum();
    let Some(_pending) = shared.space.take(bytes) else {
        return Err(Failure::full());
    };
    let all: BTreeMap<ChunkName, Bytes> = names.into_iter().zip(bodies).collect();
    let (all, new) = shared.blocking(move |shared| sift(shared, all)).await?;
    let mut answer = response::Put {
        stored: new.len() as u64,
        stored_bytes: new.iter().map(|(_, b)| b.len() as u64).sum(),
        present: (all.len() - new.len()) as u64,
    };
    if !new.is_empty() {
        let names: Vec<ChunkName> = new.iter().map(|(n, _)| *n).collect();
        shared.writer.put(new).await?;
        shared.damaged.healed(&names);
    }
    let mut shards: ByShard<(ChunkName, u32)> = BTreeMap::new();
    for (name, body) in &all {
        shards
            .entry(shared.map.of_chunk(name))
            .or_default()
            .push((*name, body.len() as u32));
    }
    let expires_ms = expires(r.ttl_ms);
    let commands = shards.iter().map(|(group, chunks)| {
        let mut lens = BytesMut::with_capacity(chunks.len() * 4);
        for (_, len) in chunks {
            lens.extend_from_slice(&len.to_le_bytes());
        }
        let op = op::Op::AddChunks(op::AddChunks {
            session: r.session.clone(),
            expires_ms,
            names: join_names(chunks.iter().map(|(n, _)| n)),
            lens: lens.freeze(),
        });
        (*group, op)
    });
    for (_, result) in propose_all(shared, commands) {
        received(result).await?;
    }
    answer.stored = answer.stored.min(all.len() as u64);
    Ok(response::Op::Put(answer))
}

type Bodies = (BTreeMap<ChunkName, Bytes>, Vec<(ChunkName, Bytes)>);

/// Checks bodies, and tells those that are not stored yet.
fn sift(shared: &Shared, all: BTreeMap<ChunkName, Bytes>) -> Result<Bodies, Failure> {
    let mut new = Vec::new();
    for (name, body) in &all {
        if let Err(e) = check(body) {
            return Err(Failure::new(
                ErrorKind::Invalid,
                format!("the body of chunk {name} arrived damaged: {e}"),
            ));
        }
        let group = shared.map.of_chunk(name);
        let known = shared.db.state(group, &keys::chunk(name))?.is_some();
        if !known || shared.damaged.contains(name) {
            new.push((*name, body.clone()));
        }
    }
    Ok((all, new))
}

pub(super) async fn end_session(shared: &Arc<Shared>, r: request::EndSession) -> Answer {
    check_session(&r.session)?;
    if !shared.space.may_free() {
        return Err(Failure::full());
    }
    let commands = shared.map.shard_groups().map(|group| {
        let session = r.session.clone();
        (group, op::Op::EndSession(op::EndSession { session }))
    });
    for (_, result) in propose_all(shared, commands) {
        received(result).await?;
    }
    Ok(done())
}

/// Bodies never change, so that a read needs no leader.
pub(super) async fn get(shared: &Arc<Shared>, r: request::Get) -> Answer {
    let names = split_names(&r.names)?;
    shared
        .blocking(move |shared| {
            let (mut lens, mut bodies) = (BytesMut::new(), BytesMut::new());
            for (i, name) in names.iter().enumerate() {
                match read_body(shared, name) {
                    Ok(body) => {
                        lens.extend_from_slice(&(body.len() as u32).to_le_bytes());
                        bodies.extend_from_slice(&body);
                    }
                    // What comes before is good; the next request opens with the bad one.
                    Err(_) if i > 0 => break,
                    Err(e) => return Err(e),
                }
                if bodies.len() >= ANSWER_BYTES {
                    break;
                }
            }
            Ok(response::Op::Bodies(response::Bodies {
                lens: lens.freeze(),
                bodies: bodies.freeze(),
            }))
        })
        .await
}

fn read_body(shared: &Shared, name: &ChunkName) -> Result<Vec<u8>, Failure> {
    match shared.bodies.get(name) {
        Ok(Some(body)) => Ok(body),
        Ok(None) => {
            // A name in the state whose body is gone is damage, not absence.
            let group = shared.map.of_chunk(name);
            if shared.db.state(group, &keys::chunk(name))?.is_some() {
                shared.damaged.add(*name);
                return Err(Failure::new(
                    ErrorKind::Corruption,
                    format!("the body of chunk {name} is gone"),
                ));
            }
            Err(Failure::new(
                ErrorKind::NotFound,
                format!("there is no chunk {name}"),
            ))
        }
        Err(e) => {
            if let DbError::Corruption(_) = e {
                shared.damaged.add(*name);
            }
            let failure = Failure::from(e);
            Err(Failure {
                text: format!("chunk {name}: {}", failure.text),
                ..failure
            })
        }
    }
}
