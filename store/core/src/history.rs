//! A sandbox's checkpoints after they were committed: kept on request, removed by retention.
//!
//! A removal names the count of changes that it was planned on: where the history has moved since, nothing is removed. The checkpoint that
//! the sandbox stands on is never removed, nor is one that people want kept.

use tidepool_proto::wire::{MAX_NAMES, array, request};
use tidepool_proto::{CheckpointId, ErrorKind, SandboxId, TurnNo};

use crate::apply::{Applied, Refusal, Reply, sandbox_id};
use crate::gc::gc_of;
use crate::keys;
use crate::kv::{KvRead, Write};
use crate::records::{ManifestRow, SandboxState, decode_number};
use crate::retention::{decode_labels, encode_labels};
use crate::sandboxes::{load, put};

fn existing(state: &dyn KvRead, id: &SandboxId) -> Result<SandboxState, Refusal> {
    load(state, id)?
        .ok_or_else(|| Refusal::new(ErrorKind::NotFound, format!("there is no sandbox {id}")))
}

fn no_checkpoint(id: &SandboxId, checkpoint: &CheckpointId) -> Refusal {
    Refusal::new(
        ErrorKind::NotFound,
        format!("sandbox {id} has no checkpoint {checkpoint}"),
    )
}

pub(crate) fn keep(state: &dyn KvRead, c: &request::KeepCheckpoint) -> Applied {
    let id = sandbox_id(&c.sandbox)?;
    let checkpoint = CheckpointId(array(&c.checkpoint, "a checkpoint id has 32 bytes")?);
    let mut sandbox = existing(state, &id)?;
    if state.get(&keys::checkpoint(&id, &checkpoint))?.is_none() {
        return Err(no_checkpoint(&id, &checkpoint));
    }
    let key = keys::keep(&id, &checkpoint);
    if state.get(&key)?.is_some() == c.keep {
        return Ok((Reply::Done, Vec::new()));
    }
    sandbox.changes = sandbox.changes.saturating_add(1);
    let write = match c.keep {
        true => Write::Put {
            key,
            value: Vec::new(),
        },
        false => Write::Delete { key },
    };
    Ok((Reply::Done, vec![put(&id, &sandbox), write]))
}

pub(crate) fn remove(state: &dyn KvRead, c: &request::RemoveCheckpoints) -> Applied {
    let id = sandbox_id(&c.sandbox)?;
    let (checkpoints, rest) = c.checkpoints.as_chunks::<32>();
    if !rest.is_empty() || checkpoints.len() > MAX_NAMES {
        return Err(Refusal::new(
            ErrorKind::Invalid,
            "a list of checkpoints is too long or not a whole number of them",
        ));
    }
    let mut sandbox = existing(state, &id)?;
    let mut found = Vec::new();
    for checkpoint in checkpoints.iter().map(|c| CheckpointId(*c)) {
        if let Some(turn) = state.get(&keys::checkpoint(&id, &checkpoint))? {
            found.push((checkpoint, TurnNo(decode_number(&turn)?)));
        }
    }
    if sandbox.changes != c.changes {
        // The same removal again finds what it left behind.
        return if c.changes.checked_add(1) == Some(sandbox.changes) && found.is_empty() {
            Ok((Reply::Done, Vec::new()))
        } else {
            Err(Refusal::new(
                ErrorKind::Conflict,
                format!("the history of sandbox {id} has changed since the removal was planned"),
            ))
        };
    }
    if found.len() != checkpoints.len() {
        return Err(Refusal::new(
            ErrorKind::NotFound,
            format!("sandbox {id} has not all of these checkpoints"),
        ));
    }
    let round = gc_of(state)?.round;
    let mut writes = Vec::new();
    for (checkpoint, turn) in found {
        if sandbox.head == Some(checkpoint) {
            return Err(Refusal::new(
                ErrorKind::Invalid,
                format!("sandbox {id} stands on checkpoint {checkpoint}"),
            ));
        }
        if state.get(&keys::keep(&id, &checkpoint))?.is_some() {
            return Err(Refusal::new(
                ErrorKind::Invalid,
                format!("checkpoint {checkpoint} of sandbox {id} is to be kept"),
            ));
        }
        let key = keys::manifest(&id, turn);
        let Some(row) = state.get(&key)? else {
            return Err(Refusal::new(
                ErrorKind::Corruption,
                format!("the manifest of checkpoint {checkpoint} of sandbox {id} is gone"),
            ));
        };
        // The record stays until a collection has seen that it is gone: someone may be forking it.
        let value = ManifestRow {
            removed: Some(round),
            ..ManifestRow::decode(&row)?
        }
        .encode();
        writes.push(Write::Put { key, value });
        writes.push(Write::Delete {
            key: keys::checkpoint(&id, &checkpoint),
        });
    }
    if writes.is_empty() {
        return Ok((Reply::Done, writes));
    }
    sandbox.changes = sandbox.changes.saturating_add(1);
    writes.push(put(&id, &sandbox));
    Ok((Reply::Done, writes))
}

pub(crate) fn label(state: &dyn KvRead, c: &request::LabelSandbox) -> Applied {
    let id = sandbox_id(&c.sandbox)?;
    let mut sandbox = existing(state, &id)?;
    let labels =
        decode_labels(&c.labels).map_err(|e| Refusal::new(ErrorKind::Invalid, e.to_string()))?;
    let key = keys::labels(&id);
    let value = encode_labels(&labels);
    if state.get(&key)?.as_ref() == Some(&value) {
        return Ok((Reply::Done, Vec::new()));
    }
    // Another rule may decide now.
    sandbox.changes = sandbox.changes.saturating_add(1);
    Ok((
        Reply::Done,
        vec![put(&id, &sandbox), Write::Put { key, value }],
    ))
}
