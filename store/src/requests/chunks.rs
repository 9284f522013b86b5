//! Chunks: pin, put, get.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tidepool_proto::body::{check, is_linked};
use tidepool_proto::wire::{
    ANSWER_BYTES, MAX_SESSION_TTL_MS, array, join_names, request, response, split_bodies,
    split_names,
};
use tidepool_proto::{ChunkName, ErrorKind};
use tidepool_store_client::lower_round;
use tidepool_store_core::{Command, Reply, keys, op};
use tokio::sync::oneshot;

use super::{Answer, Failure, Shared, done};
use crate::db::DbError;
use crate::driver::{DriverError, now_ms, received};

/// How often a put brings bodies that a collection took from under it.
const PUT_ROUNDS: usize = 3;
/// Bodies of at most this many bytes are checked where they arrive: that takes less than handing them to another thread and back.
const SIFT_HERE: u64 = 256 << 10;

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
    let expires_ms = expires(r.ttl_ms);
    let mut shards: ByShard<u32> = BTreeMap::new();
    for (i, name) in names.iter().enumerate() {
        shards
            .entry(shared.map.of_chunk(name))
            .or_default()
            .push(i as u32);
    }
    if shared.space.is_full() {
        return Err(shared.no_room(shards.keys().copied()));
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
    let mut lowest = 0;
    for (group, result) in propose_all(shared, commands) {
        let at = &shards[&group];
        if let Reply::Missing { names, round } = received(result).await? {
            lowest = lower_round(lowest, round);
            for i in names {
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
    Ok(response::Op::Pinned(response::Pinned {
        missing: join_names(missing),
        round: lowest,
    }))
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
    let bytes: u64 = bodies.iter().map(|b| b.len() as u64).sum();
    let Some(_pending) = shared.space.take(bytes) else {
        let groups = names.iter().map(|n| shared.map.of_chunk(n));
        return Err(shared.no_room(groups));
    };
    let all: BTreeMap<ChunkName, Bytes> = names.into_iter().zip(bodies).collect();
    // Until the entries that name them are decided, no body of these is deleted here.
    let _held = shared.holds.hold(all.keys().copied());
    let (all, mut new) = if bytes <= SIFT_HERE {
        sift(shared, all)?
    } else {
        shared.blocking(move |shared| sift(shared, all)).await?
    };
    let expires_ms = expires(r.ttl_ms);
    let mut answer = response::Put::default();
    let mut stored = BTreeSet::new();
    let mut open: BTreeMap<u32, Vec<ChunkName>> = BTreeMap::new();
    for name in all.keys() {
        let shard = open.entry(shared.map.of_chunk(name)).or_default();
        shard.push(*name);
    }
    for _ in 0..PUT_ROUNDS {
        if !new.is_empty() {
            let names: Vec<ChunkName> = new.iter().map(|(n, _)| *n).collect();
            push(shared, &new);
            answer.stored_bytes += new.iter().map(|(_, b)| b.len() as u64).sum::<u64>();
            shared.writer.put(std::mem::take(&mut new)).await?;
            stored.extend(names);
        }
        let commands = open.iter().map(|(group, names)| {
            (
                *group,
                add_chunks(&r.session, expires_ms, names, &all, &stored),
            )
        });
        let mut collected = Vec::new();
        for (group, result) in propose_all(shared, commands) {
            match received(result).await {
                Ok(Reply::Added { round, .. }) => {
                    answer.round = lower_round(answer.round, round);
                }
                Ok(_) => {}
                // A chunk that was there when we looked was collected: its body is in hand.
                Err(DriverError::Refused(refusal)) if refusal.again => collected.push(group),
                Err(e) => return Err(e.into()),
            }
        }
        if collected.is_empty() {
            answer.stored = stored.len() as u64;
            answer.present = (all.len() - stored.len()) as u64;
            return Ok(response::Op::Put(answer));
        }
        open.retain(|group, _| collected.contains(group));
        let again = open.values().flatten().filter(|n| !stored.contains(*n));
        new = again.map(|n| (*n, all[n].clone())).collect();
    }
    Err(Failure::again(
        "these chunks are being collected: send them again",
    ))
}

/// Sends bodies to the other members of their groups, who write them while this node does.
fn push(shared: &Shared, bodies: &[(ChunkName, Bytes)]) {
    let mut followers: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for (name, body) in bodies {
        let group = shared.map.of_chunk(name);
        let others = followers.entry(group);
        for to in others.or_insert_with(|| shared.driver.followers(group)) {
            shared.peers.push(*to, *name, body);
        }
    }
}

/// The entry that names these chunks of one shard.
fn add_chunks(
    session: &Bytes,
    expires_ms: u64,
    names: &[ChunkName],
    all: &BTreeMap<ChunkName, Bytes>,
    stored: &BTreeSet<ChunkName>,
) -> op::Op {
    let mut lens = BytesMut::with_capacity(names.len() * 4);
    let mut kinds = BytesMut::with_capacity(names.len());
    for name in names {
        let body = &all[name];
        lens.extend_from_slice(&(body.len() as u32).to_le_bytes());
        let brought = if stored.contains(name) {
            op::BROUGHT
        } else {
            0
        };
        let linked = if is_linked(body) { op::LINKED } else { 0 };
        kinds.extend_from_slice(&[brought | linked]);
    }
    op::Op::AddChunks(op::AddChunks {
        session: session.clone(),
        expires_ms,
        names: join_names(names),
        lens: lens.freeze(),
        kinds: kinds.freeze(),
    })
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
    // What others lead they have room for.
    if !shared.space.may_free() && shared.driver.status().iter().any(|s| s.leads) {
        return Err(Failure::full());
    }
    let end = |session: &Bytes| {
        op::Op::EndSession(op::EndSession {
            session: session.clone(),
        })
    };
    let commands = shared.map.shard_groups().map(|g| (g, end(&r.session)));
    let mut elsewhere = Vec::new();
    for (group, result) in propose_all(shared, commands) {
        match received(result).await {
            Err(DriverError::NotLeader { .. }) => elsewhere.push(group),
            other => {
                other?;
            }
        }
    }
    // A session's end is a courtesy to collections, which do not depend on it: shards that are led elsewhere are told while nobody
    // waits, and not at all where too many are being told.
    if !elsewhere.is_empty()
        && let Ok(permit) = shared.ends.clone().try_acquire_owned()
    {
        let (shared, op) = (shared.clone(), end(&r.session));
        tokio::spawn(async move {
            for group in elsewhere {
                let _ = shared.propose(group, op.clone()).await;
            }
            drop(permit);
        });
    }
    Ok(done())
}

/// Bodies never change, so that a read needs no leader.
pub(super) async fn get(shared: &Arc<Shared>, r: request::Get) -> Result<Vec<Bytes>, Failure> {
    let names = split_names(&r.names)?;
    shared
        .blocking(move |shared| {
            let (mut bodies, mut bytes) = (Vec::with_capacity(names.len()), 0);
            for (i, name) in names.iter().enumerate() {
                match read_body(shared, name, r.verify) {
                    Ok(body) => {
                        bytes += body.len();
                        bodies.push(body);
                    }
                    // What comes before is good; the next request opens with the bad one.
                    Err(_) if i > 0 => break,
                    Err(e) => return Err(e),
                }
                if bytes >= ANSWER_BYTES {
                    break;
                }
            }
            Ok(bodies)
        })
        .await
}

fn read_body(shared: &Shared, name: &ChunkName, verify: bool) -> Result<Bytes, Failure> {
    let read = if verify {
        shared.bodies.get(name)
    } else {
        shared.bodies.get_unverified(name)
    };
    match read {
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
