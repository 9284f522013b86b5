//! Sandboxes in their shard: who holds them, and the turns they committed.

use tidepool_proto::manifest::{MAX_MANIFEST_LEN, Manifest};
use tidepool_proto::turn::{MAX_KEY, TurnRecord};
use tidepool_proto::wire::{MAX_RECORD, array, request};
use tidepool_proto::{CheckpointId, Epoch, ErrorKind, SandboxId, TurnNo};

use crate::apply::{Applied, Refusal, Reply, check_len, check_name, sandbox_id};
use crate::command::op;
use crate::gc::{check_fence, gc_of};
use crate::keys::{self, Table};
use crate::kv::{KvRead, Write};
use crate::records::{self, ManifestRow, SandboxState, Tombstone};

pub(crate) fn load(state: &dyn KvRead, id: &SandboxId) -> Result<Option<SandboxState>, Refusal> {
    Ok(match state.get(&keys::sandbox(id))? {
        Some(value) => Some(SandboxState::decode(&value)?),
        None => None,
    })
}

/// The sandbox, as its holder of `epoch` sees it.
pub(crate) fn held(
    state: &dyn KvRead,
    id: &SandboxId,
    epoch: u64,
) -> Result<SandboxState, Refusal> {
    let Some(sandbox) = load(state, id)? else {
        return Err(if state.get(&keys::tombstone(id))?.is_some() {
            Refusal::new(ErrorKind::Fenced, format!("sandbox {id} was removed"))
        } else {
            Refusal::new(ErrorKind::NotFound, format!("there is no sandbox {id}"))
        });
    };
    if sandbox.epoch.0 != epoch {
        return Err(Refusal::new(
            ErrorKind::Fenced,
            format!(
                "sandbox {id} is held with epoch {}, not {epoch}",
                sandbox.epoch
            ),
        ));
    }
    Ok(sandbox)
}

pub(crate) fn put(id: &SandboxId, sandbox: &SandboxState) -> Write {
    Write::Put {
        key: keys::sandbox(id),
        value: sandbox.encode(),
    }
}

pub(crate) fn create(state: &dyn KvRead, c: &request::CreateSandbox) -> Applied {
    let id = sandbox_id(&c.id)?;
    check_name(&c.name, "a sandbox")?;
    check_len(c.meta.len(), MAX_RECORD, "a sandbox's metadata")?;
    if state.get(&keys::tombstone(&id))?.is_some() {
        return Err(Refusal::new(
            ErrorKind::Conflict,
            format!(
                "sandbox {id} was removed, or its name {} went to another",
                c.name
            ),
        ));
    }
    if let Some(old) = load(state, &id)? {
        // The same request again, and nothing happened since.
        if old.name == c.name && old.epoch == Epoch(1) {
            return Ok((Reply::Epoch(old.epoch), Vec::new()));
        }
        return Err(Refusal::new(
            ErrorKind::Conflict,
            format!("sandbox {id} exists"),
        ));
    }
    let sandbox = SandboxState {
        name: c.name.clone(),
        epoch: Epoch(1),
        token: [0; 16],
        turns: 0,
        last_turn: TurnNo(0),
        head: None,
        meta_version: 1,
        changes: 0,
    };
    let writes = vec![
        put(&id, &sandbox),
        Write::Put {
            key: keys::meta(&id),
            value: c.meta.to_vec(),
        },
    ];
    Ok((Reply::Epoch(Epoch(1)), writes))
}

pub(crate) fn fence_unborn(state: &dyn KvRead, c: &op::FenceUnborn) -> Applied {
    let id = sandbox_id(&c.id)?;
    if load(state, &id)?.is_some() {
        return Ok((Reply::Exists(true), Vec::new()));
    }
    let key = keys::tombstone(&id);
    if state.get(&key)?.is_some() {
        return Ok((Reply::Exists(false), Vec::new()));
    }
    let value = Tombstone {
        removed: gc_of(state)?.round,
        name: String::new(),
    }
    .encode();
    Ok((Reply::Exists(false), vec![Write::Put { key, value }]))
}

pub(crate) fn take(state: &dyn KvRead, c: &request::TakeSandbox) -> Applied {
    let id = sandbox_id(&c.id)?;
    let token = array::<16>(&c.token, "a token has 16 bytes")?;
    if token == [0; 16] {
        return Err(Refusal::new(ErrorKind::Invalid, "the token is zero"));
    }
    let Some(mut sandbox) = load(state, &id)? else {
        return Err(Refusal::new(
            ErrorKind::NotFound,
            format!("there is no sandbox {id}"),
        ));
    };
    if sandbox.token == token {
        return Ok((Reply::Epoch(sandbox.epoch), Vec::new()));
    }
    let Some(next) = sandbox.epoch.0.checked_add(1) else {
        return Err(Refusal::new(ErrorKind::Failed, "no epochs are left"));
    };
    sandbox.epoch = Epoch(next);
    sandbox.token = token;
    Ok((Reply::Epoch(sandbox.epoch), vec![put(&id, &sandbox)]))
}

pub(crate) fn update_meta(state: &dyn KvRead, c: &request::UpdateSandboxMeta) -> Applied {
    let id = sandbox_id(&c.id)?;
    check_len(c.meta.len(), MAX_RECORD, "a sandbox's metadata")?;
    let mut sandbox = held(state, &id, c.epoch)?;
    let key = keys::meta(&id);
    if sandbox.meta_version != c.version {
        let again = sandbox.meta_version.checked_sub(1) == Some(c.version)
            && state.get(&key)?.is_some_and(|old| old == c.meta);
        return if again {
            Ok((Reply::Done, Vec::new()))
        } else {
            Err(Refusal::new(
                ErrorKind::Conflict,
                format!("the metadata of sandbox {id} changed meanwhile"),
            ))
        };
    }
    sandbox.meta_version = sandbox.meta_version.saturating_add(1);
    let writes = vec![
        put(&id, &sandbox),
        Write::Put {
            key,
            value: c.meta.to_vec(),
        },
    ];
    Ok((Reply::Done, writes))
}

pub(crate) fn remove(state: &dyn KvRead, c: &request::RemoveSandbox) -> Applied {
    let id = sandbox_id(&c.id)?;
    if let (None, Some(stone)) = (load(state, &id)?, state.get(&keys::tombstone(&id))?) {
        // Again: the name may still have to be released.
        let name = Tombstone::decode(&stone)?.name;
        return Ok((Reply::Removed { name }, Vec::new()));
    }
    let sandbox = held(state, &id, c.epoch)?;
    let mut writes = vec![
        Write::Delete {
            key: keys::sandbox(&id),
        },
        Write::Delete {
            key: keys::meta(&id),
        },
        Write::Delete {
            key: keys::labels(&id),
        },
        Write::Put {
            key: keys::tombstone(&id),
            value: Tombstone {
                removed: gc_of(state)?.round,
                name: sandbox.name.clone(),
            }
            .encode(),
        },
    ];
    // Its manifests and turns stay until a collection has seen that it is gone: someone may be forking it.
    for table in [Table::Checkpoint, Table::Key, Table::Keep] {
        writes.push(Write::DeletePrefix {
            prefix: keys::of_sandbox(table, &id),
        });
    }
    let name = sandbox.name;
    Ok((Reply::Removed { name }, writes))
}

pub(crate) fn commit(state: &dyn KvRead, c: &request::Commit) -> Applied {
    let invalid = |text: String| Err(Refusal::new(ErrorKind::Invalid, text));
    let id = sandbox_id(&c.sandbox)?;
    let turn = TurnNo(c.turn);
    check_len(c.manifest.len(), MAX_MANIFEST_LEN, "a manifest")?;
    check_len(c.key.len(), MAX_KEY, "an idempotency key")?;
    let record = match TurnRecord::decode(&c.record) {
        Ok(record) => record,
        Err(e) => return invalid(e.to_string()),
    };
    if record.turn != turn || record.key != c.key {
        return invalid(format!("the record is not that of turn {turn}"));
    }
    let new = if c.checkpoint.is_empty() {
        None
    } else {
        Some(CheckpointId(array(
            &c.checkpoint,
            "a checkpoint id has 32 bytes",
        )?))
    };
    match new {
        None if !c.manifest.is_empty() => return invalid("a manifest without its id".into()),
        Some(id) if Manifest::id_of(&c.manifest) != id => {
            return invalid(format!("the manifest is not that of checkpoint {id}"));
        }
        _ => {}
    }

    let mut sandbox = held(state, &id, c.epoch)?;
    if sandbox.turns > 0 && turn <= sandbox.last_turn {
        // The same commit again is answered as it was; anything else came too late.
        let same_record = state
            .get(&keys::turn(&id, turn))?
            .is_some_and(|old| old == c.record);
        let same_manifest = match (state.get(&keys::manifest(&id, turn))?, new) {
            (Some(row), new) => Some(ManifestRow::decode(&row)?.id) == new,
            (None, None) => true,
            // The same bytes were committed by an earlier turn, which keeps them.
            (None, Some(new)) => state.get(&keys::checkpoint(&id, &new))?.is_some(),
        };
        return if same_record && same_manifest {
            Ok((Reply::Done, Vec::new()))
        } else {
            Err(Refusal::new(
                ErrorKind::Conflict,
                format!("turn {turn} of sandbox {id} is recorded otherwise"),
            ))
        };
    }
    // The first turn may be 0, the state at creation, or 1.
    let follows = match sandbox.turns {
        0 => turn.0 <= 1,
        _ => Some(turn.0) == sandbox.last_turn.0.checked_add(1),
    };
    if !follows {
        return Err(Refusal::new(
            ErrorKind::Conflict,
            format!(
                "turn {turn} of sandbox {id} does not follow turn {}",
                sandbox.last_turn
            ),
        ));
    }
    let names_chunks = new.is_some() || record.links().next().is_some();
    rests_on_what_is_there(state, &id, c, names_chunks)?;
    if new != Some(record.checkpoint)
        && state
            .get(&keys::checkpoint(&id, &record.checkpoint))?
            .is_none()
    {
        return invalid(format!(
            "turn {turn} points at checkpoint {}, which sandbox {id} does not have",
            record.checkpoint
        ));
    }
    let mut writes = Vec::new();
    if !c.key.is_empty() {
        let key = keys::idempotency(&id, &c.key);
        if let Some(value) = state.get(&key)? {
            let other = records::decode_number(&value)?;
            return Err(Refusal::new(
                ErrorKind::Conflict,
                format!("the key {:?} of sandbox {id} is turn {other}'s", c.key),
            ));
        }
        let value = records::encode_number(turn.0);
        writes.push(Write::Put { key, value });
    }
    if let Some(checkpoint) = new {
        // The first turn that committed these bytes keeps them.
        let key = keys::checkpoint(&id, &checkpoint);
        if state.get(&key)?.is_none() {
            let value = records::encode_number(turn.0);
            writes.push(Write::Put { key, value });
            let row = ManifestRow {
                removed: None,
                id: checkpoint,
                manifest: &c.manifest,
            };
            writes.push(Write::Put {
                key: keys::manifest(&id, turn),
                value: row.encode(),
            });
        }
    }
    writes.push(Write::Put {
        key: keys::turn(&id, turn),
        value: c.record.to_vec(),
    });
    sandbox.turns += 1;
    sandbox.changes = sandbox.changes.saturating_add(1);
    sandbox.last_turn = turn;
    sandbox.head = Some(record.checkpoint);
    writes.push(put(&id, &sandbox));
    Ok((Reply::Done, writes))
}

/// A commit that names chunks says what it rests on: the lowest round of all answers that it used, or a checkpoint of the same sandbox that has all
/// those chunks, or both where some come from here and some from there.
fn rests_on_what_is_there(
    state: &dyn KvRead,
    id: &SandboxId,
    c: &request::Commit,
    names_chunks: bool,
) -> Result<(), Refusal> {
    if c.round != 0 {
        check_fence(&gc_of(state)?, c.round)?;
    }
    if !c.base.is_empty() {
        let base = CheckpointId(array(&c.base, "a checkpoint id has 32 bytes")?);
        if state.get(&keys::checkpoint(id, &base))?.is_none() {
            return Err(Refusal::upload_again(format!(
                "checkpoint {base} of sandbox {id}, on which turn {} rests, was removed",
                c.turn
            )));
        }
    }
    if names_chunks && c.round == 0 && c.base.is_empty() {
        return Err(Refusal::new(
            ErrorKind::Invalid,
            format!("turn {} does not say what it rests on", c.turn),
        ));
    }
    Ok(())
}
