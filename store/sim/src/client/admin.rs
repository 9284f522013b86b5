//! An operator: nodes join, drain, are removed, and dead ones are replaced.

use std::time::Duration;

use bytes::Bytes;
use tidepool_proto::cluster::NodeState;
use tidepool_store_core::{ClusterState, META_GROUP, Reply, keys, op};

use super::{Ctx, Effect, Task};
use crate::wire::{Fail, Result};

/// The most nodes that a cluster is grown to.
const MOST: usize = 7;

/// Runs for ever. `changes`: whether nodes come and go, or only dead ones are replaced.
pub(crate) fn admin(ctx: Ctx, changes: bool) -> Task {
    Box::pin(async move {
        loop {
            match ctx.shared.ending.get() {
                true => ctx.pause(100, 500).await,
                false => ctx.pause(2000, 9000).await,
            }
            let _ = ctx.administer(changes).await;
        }
    })
}

impl Ctx {
    async fn nodes(&self) -> Result<ClusterState> {
        let row = self.row(META_GROUP, keys::cluster()).await?;
        let row = row.ok_or(Fail::Conflict)?;
        ClusterState::decode(&row).map_err(|_| Fail::NoBody)
    }

    async fn administer(&self, changes: bool) -> Result<()> {
        let state = self.nodes().await?;
        let of = |s: NodeState| state.nodes.iter().filter(move |n| n.state == s);
        let dead = self.shared.dir.borrow().dead.clone();
        for node in of(NodeState::Joining) {
            self.shared
                .effects
                .borrow_mut()
                .push(Effect::Start(node.id));
        }
        if let Some(node) = state.nodes.iter().find(|n| dead.contains(&n.id)) {
            if node.state != NodeState::Removed {
                // First its replacement, if there is to be one.
                if !self.shared.ending.get() && self.chance(60) {
                    self.join().await?;
                }
                self.set(node.id, NodeState::Removed, false).await?;
            }
            let mut dir = self.shared.dir.borrow_mut();
            dir.dead.retain(|n| *n != node.id);
            dir.done += 1;
            return Ok(());
        }
        if let Some(node) = of(NodeState::Joining).find(|n| !dead.contains(&n.id)) {
            return self.set(node.id, NodeState::Active, true).await;
        }
        // One that is drained goes when nothing names it any more.
        if let Some(node) = of(NodeState::Draining).next() {
            if self.shared.ending.get() || self.chance(30) {
                self.set(node.id, NodeState::Active, false).await?;
            } else if !self.is_named(node.id) {
                self.set(node.id, NodeState::Removed, false).await?;
                self.shared.effects.borrow_mut().push(Effect::Stop(node.id));
            }
            return Ok(());
        }
        if self.shared.ending.get() || !changes {
            return Ok(());
        }
        let active = of(NodeState::Active).count();
        if active < MOST && self.chance(50) {
            self.join().await?;
        } else if active > 3 {
            let ids: Vec<u64> = of(NodeState::Active).map(|n| n.id).collect();
            if let Some(id) = self.pick(&ids) {
                self.set(id, NodeState::Draining, false).await?;
            }
        }
        self.done();
        Ok(())
    }

    /// Whether a shard counts a node as a member, as far as anybody knows.
    fn is_named(&self, node: u64) -> bool {
        let dir = self.shared.dir.borrow();
        dir.members
            .iter()
            .any(|(group, members)| *group != META_GROUP && members.contains(&node))
    }

    async fn set(&self, node: u64, state: NodeState, only_joining: bool) -> Result<()> {
        let set = op::Op::SetNode(op::SetNode {
            node,
            addr: String::new(),
            state: state.code(),
            only_joining,
        });
        self.propose(META_GROUP, set).await?;
        Ok(())
    }

    async fn join(&self) -> Result<()> {
        let token = Bytes::copy_from_slice(&self.bytes::<16>());
        let far = Duration::from_secs(1 << 40).as_millis() as u64;
        let add = op::Op::AddToken(op::AddToken {
            id: token.clone(),
            uses: 1,
            expires_ms: far,
        });
        self.propose(META_GROUP, add).await?;
        let key: [u8; 32] = self.bytes();
        let add = op::Op::AddNode(op::AddNode {
            token,
            key: Bytes::copy_from_slice(&key),
            addr: format!("10.{}.{}.{}:1", key[0], key[1], key[2]),
            zone: String::new(),
        });
        let Reply::Node(id) = self.propose(META_GROUP, add).await? else {
            return Err(Fail::Conflict);
        };
        self.shared.effects.borrow_mut().push(Effect::Start(id));
        Ok(())
    }
}
