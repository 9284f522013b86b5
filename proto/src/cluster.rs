//! Messages about the cluster itself: its nodes, who leads what, joining and leaving. They are operations of [`crate::wire`]'s
//! requests and answers and are framed and bounded like all others.

use bytes::Bytes;

/// The longest failure domain's name, in bytes.
pub const MAX_ZONE: usize = 64;
/// The longest address, in bytes.
pub const MAX_ADDR: usize = 64;
/// The most nodes a cluster has at once or remembers.
pub const MAX_NODES: usize = 1024;

/// What a node is to the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NodeState {
    /// Has a certificate and follows the meta group; keeps no shard yet.
    Joining,
    /// Keeps shards.
    Active,
    /// Gives its shards away.
    Draining,
    /// Is no member any more and never will be again under this number.
    Removed,
}

impl NodeState {
    /// Its number in messages and records.
    pub fn code(self) -> u32 {
        match self {
            NodeState::Joining => 1,
            NodeState::Active => 2,
            NodeState::Draining => 3,
            NodeState::Removed => 4,
        }
    }

    /// The state of a number.
    pub fn of(code: u32) -> Option<Self> {
        Some(match code {
            1 => NodeState::Joining,
            2 => NodeState::Active,
            3 => NodeState::Draining,
            4 => NodeState::Removed,
            _ => return None,
        })
    }

    /// As people read it.
    pub fn name(self) -> &'static str {
        match self {
            NodeState::Joining => "joining",
            NodeState::Active => "active",
            NodeState::Draining => "draining",
            NodeState::Removed => "removed",
        }
    }
}

/// Asks a node what it knows of the cluster.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TopologyRequest {}

/// The cluster, as one node knows it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Topology {
    #[prost(string, tag = "1")]
    pub cluster: String,
    #[prost(uint32, tag = "2")]
    pub shards: u32,
    /// The node that answers.
    #[prost(uint64, tag = "3")]
    pub node: u64,
    #[prost(message, repeated, tag = "4")]
    pub nodes: Vec<Node>,
    /// Groups of which the node has a replica, and the targets of those it has not.
    #[prost(message, repeated, tag = "5")]
    pub groups: Vec<Group>,
}

/// A node.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Node {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(string, tag = "2")]
    pub addr: String,
    /// Its failure domain; empty for none.
    #[prost(string, tag = "3")]
    pub zone: String,
    /// As [`NodeState::code`].
    #[prost(uint32, tag = "4")]
    pub state: u32,
}

/// A group, as one node knows it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Group {
    #[prost(uint32, tag = "1")]
    pub group: u32,
    /// 0 where it is not known.
    #[prost(uint64, tag = "2")]
    pub leader: u64,
    #[prost(uint64, tag = "3")]
    pub term: u64,
    /// Members with a vote, both sets while the members change; empty where the node has no replica.
    #[prost(uint64, repeated, tag = "4")]
    pub voters: Vec<u64>,
    #[prost(uint64, repeated, tag = "5")]
    pub learners: Vec<u64>,
    /// Who is to have a replica, the preferred leader first.
    #[prost(uint64, repeated, tag = "6")]
    pub targets: Vec<u64>,
    /// The node has a replica.
    #[prost(bool, tag = "7")]
    pub here: bool,
    #[prost(uint64, tag = "8")]
    pub applied: u64,
    #[prost(uint64, tag = "9")]
    pub committed: u64,
    /// In the middle of a change of members: what is decided needs a majority of the old ones and of the new ones.
    #[prost(bool, tag = "10")]
    pub changing: bool,
}

/// The answer of a node that cannot decide something for a group.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NotLeader {
    #[prost(uint32, tag = "1")]
    pub group: u32,
    /// Who leads it, as far as the node knows; 0 for nobody.
    #[prost(uint64, tag = "2")]
    pub leader: u64,
}

/// Asks for a node's certificate and a number. Only who holds a join token may.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Join {
    /// A certificate signing request (DER), of which only the key counts.
    #[prost(bytes = "bytes", tag = "1")]
    pub csr: Bytes,
    /// Where the others reach the new node.
    #[prost(string, tag = "2")]
    pub addr: String,
    #[prost(string, tag = "3")]
    pub zone: String,
}

/// What makes a node a member.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Joined {
    #[prost(uint64, tag = "1")]
    pub node: u64,
    #[prost(string, tag = "2")]
    pub cluster: String,
    #[prost(uint32, tag = "3")]
    pub shards: u32,
    /// The authority: every node can sign, so that no node is the only one that can.
    #[prost(string, tag = "4")]
    pub ca_cert: String,
    #[prost(string, tag = "5")]
    pub ca_key: String,
    #[prost(string, tag = "6")]
    pub node_cert: String,
    #[prost(message, repeated, tag = "7")]
    pub nodes: Vec<Node>,
}

/// Asks for a join token.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IssueToken {
    #[prost(uint64, tag = "1")]
    pub ttl_ms: u64,
    /// How many nodes may join with it.
    #[prost(uint32, tag = "2")]
    pub uses: u32,
}

/// Changes what a node is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ChangeNode {
    #[prost(uint64, tag = "1")]
    pub node: u64,
    /// The new state, as [`NodeState::code`].
    #[prost(uint32, tag = "2")]
    pub state: u32,
    /// Removes a node that still has replicas: it is lost and does not come back.
    #[prost(bool, tag = "3")]
    pub dead: bool,
}

/// A command for a group, of a node that does not lead it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Propose {
    #[prost(uint32, tag = "1")]
    pub group: u32,
    /// An encoded command of the store's core.
    #[prost(bytes = "bytes", tag = "2")]
    pub command: Bytes,
}
