//! Where a request goes: a chunk's or sandbox's shard, the meta group, or any node.

use tidepool_proto::wire::request::Op;
use tidepool_proto::{ChunkName, SandboxId};
use tidepool_store_core::{META_GROUP, ShardMap};

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// Every node can answer it, or has it answered.
    Any,
    /// The leader of a group.
    Leader(u32),
}

/// The route of a request. Pins, puts and gets are split before.
pub(crate) fn of(op: &Op, shards: ShardMap) -> Route {
    let sandbox = |id: &[u8]| match id.try_into() {
        Ok(id) => Route::Leader(shards.of_sandbox(&SandboxId(id))),
        // Refused wherever it comes.
        Err(_) => Route::Any,
    };
    match op {
        Op::CreateSandbox(r) => sandbox(&r.id),
        Op::TakeSandbox(r) => sandbox(&r.id),
        Op::UpdateSandboxMeta(r) => sandbox(&r.id),
        Op::RemoveSandbox(r) => sandbox(&r.id),
        Op::Sandbox(r) => sandbox(&r.id),
        Op::Commit(r) => sandbox(&r.sandbox),
        Op::Manifest(r) => sandbox(&r.sandbox),
        Op::Manifests(r) => sandbox(&r.sandbox),
        Op::TurnByKey(r) => sandbox(&r.sandbox),
        Op::Turns(r) => sandbox(&r.sandbox),
        // The cursor opens with the group that comes next.
        Op::Sandboxes(r) => match r.after.first_chunk::<4>() {
            Some(group) => Route::Leader(u32::from_be_bytes(*group)),
            None => Route::Leader(shards.shard_groups().start),
        },
        Op::KeepCheckpoint(r) => sandbox(&r.sandbox),
        Op::RemoveCheckpoints(r) => sandbox(&r.sandbox),
        Op::LabelSandbox(r) => sandbox(&r.sandbox),
        Op::Kept(r) => sandbox(&r.id),
        Op::PutImage(_)
        | Op::Image(_)
        | Op::Images(_)
        | Op::RemoveImage(_)
        | Op::GcRun(_)
        | Op::GcStatus(_)
        | Op::SetPolicies(_)
        | Op::Policies(_) => Route::Leader(META_GROUP),
        Op::GcRoots(r) | Op::GcOld(r) => Route::Leader(r.group),
        Op::GcLinks(r) => Route::Leader(r.group),
        Op::Propose(r) => Route::Leader(r.group),
        Op::Pin(r) => first_of(&r.names, shards),
        Op::Put(r) => first_of(&r.names, shards),
        Op::Get(r) => first_of(&r.names, shards),
        _ => Route::Any,
    }
}

fn first_of(names: &[u8], shards: ShardMap) -> Route {
    match names.first_chunk::<32>() {
        Some(name) => Route::Leader(shards.of_chunk(&ChunkName(*name))),
        None => Route::Any,
    }
}
