//! Sandboxes, their turns and checkpoints, in the shard their id hashes to; their names in the meta group.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use tidepool_proto::turn::MAX_KEY;
use tidepool_proto::wire::{ANSWER_BYTES, WireError, array, request, response};
use tidepool_proto::{CheckpointId, ErrorKind, SandboxId, TurnNo};
use tidepool_store_core::keys::{self, Table};
use tidepool_store_core::{META_GROUP, ManifestRow, Reply, SandboxState, decode_number, op};

use super::{Answer, Failure, Shared, done, sandbox_id};
use crate::db::Value;

/// How often a name may change hands under a creator before it gives up.
const NAME_ROUNDS: usize = 8;

/// Reserves the name, then creates. A name that someone reserved and never used is taken from them (see the core's `names`).
pub(super) async fn create(shared: &Arc<Shared>, r: request::CreateSandbox) -> Answer {
    let id = sandbox_id(&r.id)?;
    let taken = |by: SandboxId| {
        Failure::new(
            ErrorKind::Conflict,
            format!("the name {:.80} is that of sandbox {by}", r.name),
        )
    };
    let mut replacing = Bytes::new();
    for _ in 0..NAME_ROUNDS {
        let reserve = op::Op::ReserveName(op::ReserveName {
            name: r.name.clone(),
            id: r.id.clone(),
            replacing: replacing.clone(),
        });
        match shared.write(META_GROUP, reserve).await? {
            Reply::Done => {
                let create = op::Op::CreateSandbox(r.clone());
                return shared.write_sandbox(id, create).await;
            }
            Reply::TakenBy(other) => {
                let other_id = Bytes::copy_from_slice(&other.0);
                let fence = op::Op::FenceUnborn(op::FenceUnborn {
                    id: other_id.clone(),
                });
                match shared.write(shared.map.of_sandbox(&other), fence).await? {
                    Reply::Exists(false) => replacing = other_id,
                    _ => return Err(taken(other)),
                }
            }
            _ => break,
        }
    }
    Err(Failure::new(
        ErrorKind::Conflict,
        format!("others are creating {:.80} at the same time", r.name),
    ))
}

pub(super) async fn remove(shared: &Arc<Shared>, r: request::RemoveSandbox) -> Answer {
    let id = sandbox_id(&r.id)?;
    let bytes = r.id.clone();
    let group = shared.map.of_sandbox(&id);
    let reply = shared
        .write_freeing(group, op::Op::RemoveSandbox(r))
        .await?;
    if let Reply::Removed { name } = reply
        && !name.is_empty()
    {
        let release = op::Op::ReleaseName(op::ReleaseName { name, id: bytes });
        shared.write_freeing(META_GROUP, release).await?;
    }
    Ok(done())
}

fn load(
    shared: &Shared,
    group: u32,
    id: SandboxId,
    state: &[u8],
) -> Result<response::Sandbox, Failure> {
    let state = SandboxState::decode(state)?;
    let Some(meta) = shared.db.state(group, &keys::meta(&id))? else {
        return Err(Failure::new(
            ErrorKind::Corruption,
            format!("the metadata of sandbox {id} is gone"),
        ));
    };
    Ok(response::Sandbox {
        id: Bytes::copy_from_slice(&id.0),
        name: state.name,
        epoch: state.epoch.0,
        turns: state.turns,
        last_turn: state.last_turn.0,
        head: state
            .head
            .map(|h| Bytes::copy_from_slice(&h.0))
            .unwrap_or_default(),
        version: state.meta_version,
        meta: meta.into(),
        changes: state.changes,
        labels: shared
            .db
            .state(group, &keys::labels(&id))?
            .unwrap_or_default()
            .into(),
    })
}

pub(super) async fn one(shared: &Arc<Shared>, r: request::Sandbox) -> Answer {
    let id = sandbox_id(&r.id)?;
    let group = shared.map.of_sandbox(&id);
    shared
        .read(group, move |shared| {
            let mut page = response::Sandboxes::default();
            if let Some(state) = shared.db.state(group, &keys::sandbox(&id))? {
                page.items.push(load(shared, group, id, &state)?);
            }
            Ok(response::Op::Sandboxes(page))
        })
        .await
}

/// The cursor is a group and the id before the next: pages go shard by shard.
pub(super) async fn list(shared: &Arc<Shared>, r: request::After) -> Answer {
    let first = shared.map.shard_groups().start;
    let (group, after) = match &r.after[..] {
        [] => (first, None),
        cursor => {
            let (group, id) = cursor
                .split_first_chunk::<4>()
                .ok_or(WireError::Field("not a place in the list"))?;
            let after = match id {
                [] => None,
                id => Some(SandboxId(array(id, "not a place in the list")?)),
            };
            (u32::from_be_bytes(*group), after)
        }
    };
    if !shared.map.shard_groups().contains(&group) {
        return Err(WireError::Field("not a place in the list").into());
    }
    shared
        .read(group, move |shared| {
            let mut page = response::Sandboxes::default();
            let (mut bytes, mut last, mut more) = (0, None, false);
            let mut states: Vec<(SandboxId, Value)> = Vec::new();
            let prefix = keys::table(Table::Sandbox);
            let from = after.map_or(prefix.clone(), |id| keys::sandbox(&id));
            shared.db.scan_state(group, &prefix, &from, |key, value| {
                let Ok(id) = <[u8; 16]>::try_from(&key[1..]) else {
                    return true;
                };
                if Some(SandboxId(id)) == after {
                    return true;
                }
                more = states.len() >= 256;
                if !more {
                    states.push((SandboxId(id), value));
                }
                !more
            })?;
            for (id, state) in states {
                if bytes >= ANSWER_BYTES {
                    more = true;
                    break;
                }
                last = Some(id);
                let item = state
                    .map_err(Failure::from)
                    .and_then(|state| load(shared, group, id, &state));
                if let Some(item) = shared.whole(item, &mut page.damaged) {
                    bytes += item.meta.len() + item.name.len() + 64;
                    page.items.push(item);
                }
            }
            let mut next = BytesMut::new();
            if let (true, Some(last)) = (more, last) {
                next.put_u32(group);
                next.put_slice(&last.0);
            } else if shared.map.shard_groups().contains(&(group + 1)) {
                next.put_u32(group + 1);
            }
            page.next = next.freeze();
            Ok(response::Op::Sandboxes(page))
        })
        .await
}

pub(super) async fn manifest(shared: &Arc<Shared>, r: request::Manifest) -> Answer {
    let id = sandbox_id(&r.sandbox)?;
    let checkpoint = CheckpointId(array(&r.checkpoint, "a checkpoint id has 32 bytes")?);
    let group = shared.map.of_sandbox(&id);
    shared
        .read(group, move |shared| {
            // Before the manifest: a round that begins between the two only makes what rests on this older.
            let round = shared.round(group)?;
            let gone = |what: &str| {
                Failure::new(
                    ErrorKind::Corruption,
                    format!("checkpoint {checkpoint} of sandbox {id}: {what}"),
                )
            };
            let Some(turn) = shared
                .db
                .state(group, &keys::checkpoint(&id, &checkpoint))?
            else {
                return Err(Failure::new(
                    ErrorKind::NotFound,
                    format!("sandbox {id} has no checkpoint {checkpoint}"),
                ));
            };
            let turn = TurnNo(decode_number(&turn)?);
            let Some(row) = shared.db.state(group, &keys::manifest(&id, turn))? else {
                return Err(gone("its manifest is gone"));
            };
            let row = ManifestRow::decode(&row)?;
            if row.id != checkpoint || row.removed.is_some() {
                return Err(gone("another manifest is in its place"));
            }
            Ok(response::Op::Found(response::Found {
                record: Bytes::copy_from_slice(row.manifest),
                round,
            }))
        })
        .await
}

pub(super) async fn manifests(shared: &Arc<Shared>, r: request::FromTurn) -> Answer {
    by_turn(shared, r, Table::Manifest, |turn, value| {
        let row = ManifestRow::decode(&value)?;
        Ok(row.removed.is_none().then(|| response::Record {
            turn,
            key: Bytes::copy_from_slice(&row.id.0),
            bytes: Bytes::copy_from_slice(row.manifest),
        }))
    })
    .await
}

pub(super) async fn turns(shared: &Arc<Shared>, r: request::FromTurn) -> Answer {
    by_turn(shared, r, Table::Turn, |turn, value| {
        Ok(Some(response::Record {
            turn,
            key: Bytes::new(),
            bytes: value.into(),
        }))
    })
    .await
}

async fn by_turn(
    shared: &Arc<Shared>,
    r: request::FromTurn,
    table: Table,
    item: impl Fn(u64, Vec<u8>) -> Result<Option<response::Record>, Failure> + Send + 'static,
) -> Answer {
    let id = sandbox_id(&r.sandbox)?;
    let group = shared.map.of_sandbox(&id);
    shared
        .read(group, move |shared| {
            let prefix = keys::of_sandbox(table, &id);
            let mut from = prefix.clone();
            from.extend_from_slice(&r.from.to_be_bytes());
            let mut page = response::Records {
                round: shared.round(group)?,
                ..response::Records::default()
            };
            // What is left of a removed sandbox is nobody's to see.
            if shared.db.state(group, &keys::sandbox(&id))?.is_none() {
                return Ok(response::Op::Records(page));
            }
            let mut bytes = 0;
            shared.db.scan_state(group, &prefix, &from, |key, value| {
                if bytes >= ANSWER_BYTES || page.items.len() >= r.limit as usize {
                    page.more = true;
                    return false;
                }
                let turn = keys::turn_of(key).map_or(0, |t| t.0);
                let record = value.map_err(Failure::from).and_then(|v| item(turn, v));
                if let Some(Some(record)) = shared.whole(record, &mut page.damaged) {
                    bytes += record.bytes.len() + 64;
                    page.items.push(record);
                }
                true
            })?;
            Ok(response::Op::Records(page))
        })
        .await
}

pub(super) async fn turn_by_key(shared: &Arc<Shared>, r: request::TurnByKey) -> Answer {
    let id = sandbox_id(&r.sandbox)?;
    if r.key.len() > MAX_KEY {
        return Err(WireError::Field("an idempotency key is too long").into());
    }
    let group = shared.map.of_sandbox(&id);
    shared
        .read(group, move |shared| {
            let Some(turn) = shared.db.state(group, &keys::idempotency(&id, &r.key))? else {
                return Err(Failure::new(
                    ErrorKind::NotFound,
                    format!("sandbox {id} has no turn with key {:?}", r.key),
                ));
            };
            let turn = TurnNo(decode_number(&turn)?);
            match shared.db.state(group, &keys::turn(&id, turn))? {
                Some(record) => Ok(response::Op::Record(record.into())),
                None => Err(Failure::new(
                    ErrorKind::Corruption,
                    format!("turn {turn} of sandbox {id} is gone"),
                )),
            }
        })
        .await
}
