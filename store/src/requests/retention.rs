//! What retention reads and changes: policies, labels, kept and removed checkpoints. Which ones go is decided by who asks ([`tidepool_store_core::retention`]).

use std::sync::Arc;

use tidepool_proto::wire::{request, response};
use tidepool_store_core::keys::{self, Table};
use tidepool_store_core::{META_GROUP, op};

use super::{Answer, Shared, done, sandbox_id};

pub(super) async fn keep(shared: &Arc<Shared>, r: request::KeepCheckpoint) -> Answer {
    let group = shared.map.of_sandbox(&sandbox_id(&r.sandbox)?);
    shared.write(group, op::Op::KeepCheckpoint(r)).await?;
    Ok(done())
}

/// The kept checkpoints, concatenated.
pub(super) async fn kept(shared: &Arc<Shared>, r: request::Sandbox) -> Answer {
    let id = sandbox_id(&r.id)?;
    let group = shared.map.of_sandbox(&id);
    shared
        .read(group, move |shared| {
            let prefix = keys::of_sandbox(Table::Keep, &id);
            let mut out = Vec::new();
            shared.db.scan_state(group, &prefix, &prefix, |key, _| {
                out.extend_from_slice(&key[prefix.len()..]);
                true
            })?;
            Ok(response::Op::Record(out.into()))
        })
        .await
}

pub(super) async fn remove(shared: &Arc<Shared>, r: request::RemoveCheckpoints) -> Answer {
    let group = shared.map.of_sandbox(&sandbox_id(&r.sandbox)?);
    shared
        .write_freeing(group, op::Op::RemoveCheckpoints(r))
        .await?;
    Ok(done())
}

pub(super) async fn label(shared: &Arc<Shared>, r: request::LabelSandbox) -> Answer {
    let group = shared.map.of_sandbox(&sandbox_id(&r.sandbox)?);
    shared.write(group, op::Op::LabelSandbox(r)).await?;
    Ok(done())
}

pub(super) async fn set_policies(shared: &Arc<Shared>, r: request::SetPolicies) -> Answer {
    shared.write(META_GROUP, op::Op::SetPolicies(r)).await?;
    Ok(done())
}

pub(super) async fn policies(shared: &Arc<Shared>) -> Answer {
    shared
        .read(META_GROUP, |shared| {
            let policies = shared.db.state(META_GROUP, &keys::policies())?;
            Ok(response::Op::Record(policies.unwrap_or_default().into()))
        })
        .await
}
