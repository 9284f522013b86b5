//! This node in its cluster: who the others are, what this one says of itself, and what is to be kept where.
//!
//! Every node applies the meta group, so that the list of nodes is read from this node's own state. It may be a little old; a node
//! that has none yet goes by the addresses it was given when it joined.
//!
//! Elsewhere on purpose: what the list means (`store/core`), moving replicas (`store/raft`), the task that drives it ([`crate::member`]).

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tidepool_proto::ErrorKind;
use tidepool_proto::cluster::{self, NodeState};
use tidepool_proto::wire::{request, response};
use tidepool_store_core::{ClusterState, META_GROUP, keys, op, placement};

use crate::error::StoreError;
use crate::files;
use crate::pki::Caller;
use crate::requests::{Failure, Shared};

const SEEDS: &str = "seeds.json";

/// The list of nodes as this node has applied it; none before it has.
pub(crate) fn state(shared: &Shared) -> Result<Option<ClusterState>, Failure> {
    let row = shared.db.state(META_GROUP, &keys::cluster())?;
    Ok(row.map(|bytes| ClusterState::decode(&bytes)).transpose()?)
}

/// The members, for others to read.
pub(crate) fn nodes(shared: &Shared) -> Result<Vec<cluster::Node>, Failure> {
    let Some(state) = state(shared)? else {
        return Ok(shared.seeds.clone());
    };
    let nodes = state.nodes.into_iter();
    Ok(nodes
        .filter(|n| n.state != NodeState::Removed)
        .map(|n| cluster::Node {
            id: n.id,
            addr: n.addr,
            zone: n.zone,
            state: n.state.code(),
        })
        .collect())
}

/// The addresses of the other members.
pub(crate) fn others(shared: &Shared) -> Result<Vec<(u64, SocketAddr)>, Failure> {
    let all = nodes(shared)?.into_iter();
    Ok(all
        .filter(|n| n.id != shared.node)
        .filter_map(|n| Some((n.id, n.addr.parse().ok()?)))
        .collect())
}

/// Whether a store node may talk to this one, and its number.
pub(crate) fn admit(shared: &Shared, caller: &Caller) -> Result<u64, String> {
    let Some(node) = caller.node() else {
        return Err(format!("{} is no store node", caller.name));
    };
    let Ok(Some(state)) = state(shared) else {
        // Signed by the authority: that it was removed since only a list can tell.
        return Ok(node);
    };
    match state.node(node) {
        Some(n) if n.state == NodeState::Removed => {
            Err(format!("node {node} was removed from the cluster"))
        }
        Some(_) => Ok(node),
        // Newer than this node's list.
        None if node >= state.next_node => Ok(node),
        None => Err(format!("node {node} is not of this cluster")),
    }
}

fn sorted<'a>(ids: impl Iterator<Item = &'a u64>) -> Vec<u64> {
    let mut ids: Vec<u64> = ids.copied().collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// What this node knows.
pub(crate) fn topology(shared: &Shared) -> Result<response::Op, Failure> {
    let state = state(shared)?;
    let statuses = shared.driver.status();
    let mut groups = Vec::with_capacity(shared.map.groups().len());
    let mut all = state.iter().flat_map(placement::targets);
    for group in shared.map.groups() {
        let targets = all.next().unwrap_or_default().voters;
        let mut out = cluster::Group {
            group,
            targets,
            ..Default::default()
        };
        if let Some(status) = statuses.iter().find(|s| s.group == group) {
            out.here = true;
            out.leader = status.leader.unwrap_or(0);
            out.term = status.term;
            let conf = &status.conf;
            out.voters = sorted(conf.voters.iter().chain(&conf.voters_outgoing));
            out.learners = sorted(conf.learners.iter().chain(&conf.learners_next));
            out.changing = !conf.voters_outgoing.is_empty();
            out.applied = status.applied;
            out.committed = status.commit;
        }
        groups.push(out);
    }
    Ok(response::Op::Topology(cluster::Topology {
        cluster: shared.cluster.clone(),
        shards: shared.map.shards(),
        node: shared.node,
        nodes: nodes(shared)?,
        groups,
    }))
}

/// Changes what a node is. One that still has replicas is only removed when it is said to be lost.
pub(crate) async fn change(
    shared: &Arc<Shared>,
    r: request::ChangeNode,
) -> Result<response::Op, Failure> {
    let state = NodeState::of(r.state)
        .ok_or_else(|| Failure::new(ErrorKind::Invalid, "there is no such state of a node"))?;
    if state == NodeState::Removed && !r.dead {
        let holds = holds(shared, r.node).await?;
        if !holds.is_empty() {
            let text = format!(
                "node {} still has replicas of {} groups: drain it first, or say that it is dead",
                r.node,
                holds.len()
            );
            return Err(Failure::new(ErrorKind::Conflict, text));
        }
    }
    let set = op::Op::SetNode(op::SetNode {
        node: r.node,
        state: r.state,
        ..Default::default()
    });
    shared.propose(META_GROUP, set).await?;
    Ok(response::Op::Done(response::Done {}))
}

/// The shards that still count a node as a member, or of which nobody could be asked.
async fn holds(shared: &Arc<Shared>, node: u64) -> Result<Vec<u32>, Failure> {
    let mut open: Vec<u32> = shared.map.shard_groups().collect();
    let mut held = Vec::new();
    for other in nodes(shared)? {
        let answer = if other.id == shared.node {
            topology(shared)
        } else {
            let ask = request::Op::Topology(request::TopologyRequest {});
            shared
                .client
                .call_node(other.id, ask)
                .await
                .map_err(Failure::from)
        };
        let Ok(response::Op::Topology(t)) = answer else {
            continue;
        };
        for group in t.groups {
            // The leader's word counts.
            if group.here && group.leader == t.node {
                open.retain(|g| *g != group.group);
                if group.voters.contains(&node) || group.learners.contains(&node) {
                    held.push(group.group);
                }
            }
        }
    }
    held.retain(|g| *g != META_GROUP);
    held.extend(open);
    Ok(held)
}

/// Keeps the addresses a new node was given.
pub(crate) fn save_seeds(data: &Path, nodes: &[cluster::Node]) -> Result<(), StoreError> {
    let list: Vec<(u64, &str)> = nodes.iter().map(|n| (n.id, n.addr.as_str())).collect();
    let text = serde_json::to_vec(&list).map_err(|e| StoreError::Config(e.to_string()))?;
    files::write_atomic(&data.join(SEEDS), &text, 0o600)
}

/// The addresses a node was given when it joined; none for a first node.
pub(crate) fn load_seeds(data: &Path) -> Result<Vec<cluster::Node>, StoreError> {
    let path = data.join(SEEDS);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(StoreError::io(path, e)),
    };
    let list: Vec<(u64, String)> = serde_json::from_slice(&bytes)
        .map_err(|e| StoreError::Damaged(format!("{} is damaged: {e}", path.display())))?;
    let node = |(id, addr)| cluster::Node {
        id,
        addr,
        zone: String::new(),
        state: NodeState::Active.code(),
    };
    Ok(list.into_iter().map(node).collect())
}
