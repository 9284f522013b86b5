//! The cluster itself: its nodes and their states, join tokens, and requests to the leader of a group.

use std::time::Duration;

use tidepool_proto::ErrorKind;
use tidepool_proto::cluster::{ChangeNode, IssueToken, NodeState, Topology, TopologyRequest};
use tidepool_proto::wire::{request, response};

use crate::link::Link;
use crate::route::Route;
use crate::types::StoreStatus;
use crate::{Client, ClientError};

/// A node, as the cluster and it itself see it.
#[derive(Debug, Clone)]
pub struct NodeStatus {
    pub id: u64,
    pub addr: String,
    /// Its failure domain; empty for one of its own.
    pub zone: String,
    pub state: NodeState,
    /// What it said when it was asked just now.
    pub answer: Result<(StoreStatus, Topology), ClientError>,
}

impl Client {
    /// What the node that answers first knows of the cluster.
    pub async fn topology(&self) -> Result<Topology, ClientError> {
        let op = request::Op::Topology(TopologyRequest {});
        topology(self.link.call(op).await?)
    }

    /// Every node that is not removed, each asked how it is.
    pub async fn nodes(&self) -> Result<Vec<NodeStatus>, ClientError> {
        let known = self.topology().await?;
        self.link.refresh(self.link.deadline()).await;
        let mut out = Vec::new();
        for node in known.nodes {
            let state = NodeState::of(node.state).ok_or_else(ClientError::unexpected)?;
            if state == NodeState::Removed {
                continue;
            }
            let client = self.clone();
            let id = node.id;
            let asked = tokio::spawn(async move { client.ask(id).await });
            out.push((node, state, asked));
        }
        let mut list = Vec::with_capacity(out.len());
        for (node, state, asked) in out {
            let answer = asked
                .await
                .unwrap_or_else(|_| Err(ClientError::unexpected()));
            list.push(NodeStatus {
                id: node.id,
                addr: node.addr,
                zone: node.zone,
                state,
                answer,
            });
        }
        Ok(list)
    }

    async fn ask(&self, node: u64) -> Result<(StoreStatus, Topology), ClientError> {
        let status = self
            .link
            .once(node, request::Op::Status(request::Status {}));
        let status = crate::types::status(status.await?)?;
        let op = request::Op::Topology(TopologyRequest {});
        Ok((status, topology(self.link.once(node, op).await?)?))
    }

    /// A token with which `uses` nodes may join within `ttl`.
    pub async fn issue_token(&self, ttl: Duration, uses: u32) -> Result<String, ClientError> {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        let op = request::Op::IssueToken(IssueToken { ttl_ms, uses });
        match self.link.call(op).await? {
            response::Op::Token(token) => Ok(token),
            _ => Err(ClientError::unexpected()),
        }
    }

    /// Changes what a node is to the cluster. `dead`: it is removed although it still has replicas, for it is lost.
    pub async fn change_node(
        &self,
        node: u64,
        state: NodeState,
        dead: bool,
    ) -> Result<(), ClientError> {
        let state = state.code();
        self.done(request::Op::ChangeNode(ChangeNode { node, state, dead }))
            .await
    }

    /// Sends any request to the leader of a group. For nodes.
    pub async fn call_group(
        &self,
        group: u32,
        op: request::Op,
    ) -> Result<response::Op, ClientError> {
        let link: &Link = &self.link;
        link.send(op, Route::Leader(group), link.deadline()).await
    }

    /// Sends any request to one node, once. For nodes.
    pub async fn call_node(&self, node: u64, op: request::Op) -> Result<response::Op, ClientError> {
        self.link.once(node, op).await
    }

    /// Sends any request wherever it belongs. For what has no call of its own.
    pub async fn call(&self, op: request::Op) -> Result<response::Op, ClientError> {
        self.link.call(op).await
    }
}

fn topology(op: response::Op) -> Result<Topology, ClientError> {
    match op {
        response::Op::Topology(t) => Ok(t),
        response::Op::NotLeader(_) => Err(ClientError::new(
            ErrorKind::Unavailable,
            "the node is not ready",
        )),
        _ => Err(ClientError::unexpected()),
    }
}
