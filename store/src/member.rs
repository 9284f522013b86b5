//! The task that makes this node a member: it tells the cluster where it is, keeps connections to the others, and tells the groups who is
//! to keep them. The groups' leaders walk there by themselves (`store/raft`), leadership included.
//!
//! Everything is looked at again and again from the list of nodes: nothing here has to be remembered over a restart.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tidepool_proto::cluster::NodeState;
use tidepool_store_core::{ClusterState, Command, META_GROUP, op, placement};
use tidepool_store_raft::{Order, Target};

use crate::cluster;
use crate::driver::received;
use crate::requests::{Failure, Shared};

const EVERY: Duration = Duration::from_millis(300);
/// Looks after which all targets are told again.
const TELL_AGAIN: u32 = 20;

/// What this node says of itself.
pub(crate) struct Member {
    pub(crate) addr: SocketAddr,
    pub(crate) zone: String,
    /// It made the cluster.
    pub(crate) first: bool,
}

#[derive(Default)]
struct Memory {
    said_removed: bool,
    /// The list of nodes from which the groups were told last.
    told: Option<ClusterState>,
    looks: u32,
}

/// Runs until it is aborted.
pub(crate) async fn run(shared: Arc<Shared>, member: Member) {
    let mut memory = Memory::default();
    loop {
        if let Err(e) = look(&shared, &member, &mut memory).await {
            tracing::debug!(error = ?e, "the membership could not be looked at");
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn look(shared: &Arc<Shared>, member: &Member, memory: &mut Memory) -> Result<(), Failure> {
    let state = cluster::state(shared)?;
    shared.peers.set_nodes(&cluster::others(shared)?);
    let Some(state) = state else {
        if member.first {
            init(shared, member).await?;
        }
        return Ok(());
    };
    match state.node(shared.node) {
        // This node's list is older than itself.
        None => return Ok(()),
        Some(me) if me.state == NodeState::Removed => {
            if !memory.said_removed {
                memory.said_removed = true;
                tracing::error!(
                    "this node was removed from its cluster; its data is not needed any more"
                );
            }
            return Ok(());
        }
        Some(me) => {
            let addr = member.addr.to_string();
            if me.addr != addr || me.state == NodeState::Joining {
                let set = op::Op::SetNode(op::SetNode {
                    node: shared.node,
                    addr,
                    state: NodeState::Active.code(),
                    only_joining: true,
                });
                shared.propose(META_GROUP, set).await?;
            }
        }
    }
    tell(shared, state, memory);
    Ok(())
}

/// Tells the groups where they are to live, when that may have changed and now and then.
fn tell(shared: &Shared, state: ClusterState, memory: &mut Memory) {
    memory.looks += 1;
    if memory.looks % TELL_AGAIN != 1 && memory.told.as_ref() == Some(&state) {
        return;
    }
    for (group, target) in shared.map.groups().zip(placement::targets(&state)) {
        let placement::Target { voters, learners } = target;
        shared.driver.order(Order::Target(Target {
            group,
            voters,
            learners,
        }));
    }
    memory.told = Some(state);
}

async fn init(shared: &Arc<Shared>, member: &Member) -> Result<(), Failure> {
    let init = op::Op::InitCluster(op::InitCluster {
        shards: shared.map.shards(),
        node: shared.node,
        addr: member.addr.to_string(),
        zone: member.zone.clone(),
    });
    let proposed = shared.driver.propose(META_GROUP, Command::new(0, init));
    received(proposed).await?;
    Ok(())
}
