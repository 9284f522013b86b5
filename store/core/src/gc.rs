//! Collection of chunks nobody needs, in rounds.
//!
//! Every group has a *round* and a *fence*. Whoever is about to commit something carries the lowest round it met in all answers that its
//! commit rests on (pins, puts, reads of a manifest or of an image). One round R of collection goes:
//!
//! 1. **begin** R in every group: what is pinned, added or removed from now on carries R;
//! 2. when all have begun, **cut** R in every group: commits that rest on an older round are refused from now on;
//! 3. when all have cut, everything committed is a root, and so is what was removed in R or later (someone may have read it meanwhile); the **mark**
//!    walks from the roots and must find every chunk;
//! 4. **sweep** R in every shard: chunks that are not marked and carry an older round go, which is looked at again when the sweep is applied;
//! 5. **purge**: records of what was removed before the cut go.
//!
//! Why nothing needed is lost: a commit applied before its group's cut is a root. One applied after it rests on answers that all carry R or more: its
//! chunks were stamped R or later, and what it read of others' was committed then, or removed in R or later, and so is a root.
//!
//! Invariants: rounds and fences only grow, no fence is beyond its round; a command that comes late or twice changes nothing that is newer, so that a
//! collector may die at any step and two of them do no harm. The exhaustive model of this is in `store/model`.
//!
//! Elsewhere on purpose: walking and driving (the store's `gc`), deleting bodies (whoever applies a sweep).

use tidepool_proto::wire::{array, split_names};
use tidepool_proto::{ErrorKind, SandboxId, TurnNo};

use crate::apply::{Applied, Refusal, Reply, check_len};
use crate::bugs::{Bug, is_armed};
use crate::command::op;
use crate::keys::{self, Table};
use crate::kv::{KvRead, ReadError, Write};
use crate::records::{ChunkState, GcState, ManifestRow, ShardStats, Tombstone};

/// The most bytes of a round's account.
pub const MAX_REPORT: usize = 64 << 10;

/// How far collections have come in this group.
pub fn gc_of(state: &dyn KvRead) -> Result<GcState, ReadError> {
    match state.get(&keys::gc())? {
        Some(value) => GcState::decode(&value),
        None => Ok(GcState::default()),
    }
}

/// Refuses what rests on answers from before the last cut.
pub(crate) fn check_fence(gc: &GcState, round: u64) -> Result<(), Refusal> {
    // It may be beyond this group's: the others may have begun a round of which this one has not heard.
    if round < gc.fence && !is_armed(Bug::NoFence) {
        return Err(Refusal::upload_again(format!(
            "a collection has begun since round {round}: what was pinned may be gone, upload again"
        )));
    }
    Ok(())
}

fn answer(gc: &GcState) -> Reply {
    Reply::Gc {
        round: gc.round,
        fence: gc.fence,
    }
}

fn changed(gc: &GcState) -> Applied {
    let write = Write::Put {
        key: keys::gc(),
        value: gc.encode(),
    };
    Ok((answer(gc), vec![write]))
}

pub(crate) fn start(state: &dyn KvRead, c: &op::StartRound) -> Applied {
    let token = array::<16>(&c.token, "a token has 16 bytes")?;
    if token == [0; 16] {
        return Err(Refusal::new(ErrorKind::Invalid, "the token is zero"));
    }
    let mut gc = gc_of(state)?;
    if gc.token == token {
        return Ok((answer(&gc), Vec::new()));
    }
    let Some(next) = gc.round.checked_add(1) else {
        return Err(Refusal::new(ErrorKind::Failed, "no rounds are left"));
    };
    gc.round = next;
    gc.token = token;
    changed(&gc)
}

pub(crate) fn begin(state: &dyn KvRead, c: &op::Round) -> Applied {
    let mut gc = gc_of(state)?;
    if c.round <= gc.round {
        return Ok((answer(&gc), Vec::new()));
    }
    gc.round = c.round;
    changed(&gc)
}

pub(crate) fn cut(state: &dyn KvRead, c: &op::Round) -> Applied {
    let mut gc = gc_of(state)?;
    if c.round > gc.round {
        return Err(Refusal::new(
            ErrorKind::Invalid,
            format!("round {} has not begun here", c.round),
        ));
    }
    if c.round <= gc.fence {
        return Ok((answer(&gc), Vec::new()));
    }
    gc.fence = c.round;
    changed(&gc)
}

pub(crate) fn sweep(state: &dyn KvRead, c: &op::Sweep) -> Applied {
    let gc = gc_of(state)?;
    if c.round != gc.round || c.round != gc.fence {
        return Err(Refusal::new(
            ErrorKind::Conflict,
            format!(
                "a sweep of round {} where the round is {} and the fence {}",
                c.round, gc.round, gc.fence
            ),
        ));
    }
    let mut names = split_names(&c.names)?;
    names.sort_unstable();
    names.dedup();
    let (mut writes, mut swept, mut bytes) = (Vec::new(), Vec::new(), 0u64);
    for name in names {
        let key = keys::chunk(&name);
        let Some(value) = state.get(&key)? else {
            continue;
        };
        let chunk = ChunkState::decode(&value)?;
        if chunk.stamp < c.round {
            bytes += u64::from(chunk.len);
            swept.push(name);
            writes.push(Write::Delete { key });
        }
    }
    if !swept.is_empty() {
        let mut stats = stats_of(state)?;
        stats.chunks = stats.chunks.saturating_sub(swept.len() as u64);
        stats.chunk_bytes = stats.chunk_bytes.saturating_sub(bytes);
        writes.push(Write::Put {
            key: keys::stats(),
            value: stats.encode(),
        });
    }
    let reply = Reply::Swept {
        names: swept,
        bytes,
    };
    Ok((reply, writes))
}

pub(crate) fn stats_of(state: &dyn KvRead) -> Result<ShardStats, Refusal> {
    Ok(match state.get(&keys::stats())? {
        Some(value) => ShardStats::decode(&value)?,
        None => ShardStats::default(),
    })
}

pub(crate) fn purge(state: &dyn KvRead, c: &op::Purge) -> Applied {
    let fence = gc_of(state)?.fence;
    let mut writes = Vec::new();
    let not_whole = |what: &str| {
        Refusal::new(
            ErrorKind::Invalid,
            format!("a list of {what} is not a whole number of them"),
        )
    };
    let (sandboxes, rest) = c.sandboxes.as_chunks::<16>();
    if !rest.is_empty() {
        return Err(not_whole("sandboxes"));
    }
    for id in sandboxes.iter().map(|id| SandboxId(*id)) {
        let Some(value) = state.get(&keys::tombstone(&id))? else {
            continue;
        };
        if Tombstone::decode(&value)?.removed < fence {
            for table in [Table::Manifest, Table::Turn] {
                writes.push(Write::DeletePrefix {
                    prefix: keys::of_sandbox(table, &id),
                });
            }
        }
    }
    let (checkpoints, rest) = c.checkpoints.as_chunks::<24>();
    if !rest.is_empty() {
        return Err(not_whole("checkpoints"));
    }
    for place in checkpoints {
        let (id, turn) = place.split_at(16);
        let id = SandboxId(array(id, "a sandbox id has 16 bytes")?);
        let turn = TurnNo(u64::from_be_bytes(array(turn, "a turn has 8 bytes")?));
        let key = keys::manifest(&id, turn);
        let Some(value) = state.get(&key)? else {
            continue;
        };
        if ManifestRow::decode(&value)?
            .removed
            .is_some_and(|removed| removed < fence)
        {
            writes.push(Write::Delete { key });
        }
    }
    for tail in &c.images {
        let Some(round) = tail.first_chunk::<8>() else {
            return Err(Refusal::new(ErrorKind::Invalid, "not a removed image"));
        };
        check_len(
            tail.len(),
            8 + tidepool_proto::wire::MAX_RECORD_NAME,
            "the name of a removed image",
        )?;
        let key = keys::image_grave(tail);
        if u64::from_be_bytes(*round) < fence && state.get(&key)?.is_some() {
            writes.push(Write::Delete { key });
        }
    }
    Ok((Reply::Done, writes))
}

pub(crate) fn report(state: &dyn KvRead, c: &op::ReportGc) -> Applied {
    check_len(c.report.len(), MAX_REPORT, "the account of a round")?;
    let gc = gc_of(state)?;
    if c.round != gc.round {
        return Err(Refusal::new(
            ErrorKind::Conflict,
            format!("round {} is not the newest", c.round),
        ));
    }
    let write = Write::Put {
        key: keys::gc_report(),
        value: c.report.to_vec(),
    };
    Ok((Reply::Done, vec![write]))
}
