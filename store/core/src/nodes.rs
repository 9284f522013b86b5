//! The members of the cluster, and the tokens with which new ones join: one record in the meta group, which every node applies.
//!
//! A node's number is never given twice: what a lost node promised under it must not be taken for a new one's word. A token is
//! known by its id only; what proves its possession is a certificate that the token holds.

use tidepool_proto::ErrorKind;
use tidepool_proto::cluster::{MAX_ADDR, MAX_NODES, MAX_ZONE, NodeState};
use tidepool_proto::codec::{Reader, Writer};
use tidepool_proto::wire::array;

use crate::apply::{Applied, Refusal, Reply, check_len};
use crate::command::op;
use crate::kv::{KvRead, ReadError, Write};
use crate::{ShardMap, keys};

const VERSION: u8 = 1;
/// Tokens that are valid at one time.
const MAX_TOKENS: usize = 256;

/// A member of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// Never 0.
    pub id: u64,
    /// Where the others reach it.
    pub addr: String,
    /// Its failure domain; empty for one of its own.
    pub zone: String,
    pub state: NodeState,
    /// The hash of the key with which it joined: the same request again gets the same number.
    pub key: [u8; 32],
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRecord {
    pub id: [u8; 16],
    /// How many nodes may still join with it.
    pub uses: u32,
    /// When it ends, by the leader's clock.
    pub expires_ms: u64,
}

/// The cluster, as the meta group knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterState {
    pub shards: u32,
    /// The number of the next node.
    pub next_node: u64,
    /// In the order they came, removed ones too.
    pub nodes: Vec<NodeRecord>,
    pub tokens: Vec<TokenRecord>,
}

impl ClusterState {
    /// A node's record.
    pub fn node(&self, id: u64) -> Option<&NodeRecord> {
        self.nodes.iter().find(|n| n.id == id)
    }

    /// The record of the meta group's state; none before the first node has written it.
    pub fn load(state: &dyn KvRead) -> Result<Option<Self>, ReadError> {
        state
            .get(&keys::cluster())?
            .map(|b| Self::decode(&b))
            .transpose()
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.varint(u64::from(self.shards));
        w.varint(self.next_node);
        w.varint(self.nodes.len() as u64);
        for node in &self.nodes {
            w.varint(node.id);
            w.bytes(node.addr.as_bytes());
            w.bytes(node.zone.as_bytes());
            w.u8(node.state.code() as u8);
            w.raw(&node.key);
        }
        w.varint(self.tokens.len() as u64);
        for token in &self.tokens {
            w.raw(&token.id);
            w.varint(u64::from(token.uses));
            w.varint(token.expires_ms);
        }
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("cluster", bytes, VERSION)?;
        let damaged = |what: &str| ReadError(format!("the cluster's record is damaged: {what}"));
        let number = |n: u64| u32::try_from(n).map_err(|_| damaged("a number"));
        let mut state = Self {
            shards: number(r.varint()?)?,
            next_node: r.varint()?,
            ..Self::default()
        };
        let nodes = r.varint()?;
        if nodes > MAX_NODES as u64 {
            return Err(damaged("too many nodes"));
        }
        for _ in 0..nodes {
            state.nodes.push(NodeRecord {
                id: r.varint()?,
                addr: r.text(MAX_ADDR)?,
                zone: r.text(MAX_ZONE)?,
                state: NodeState::of(u32::from(r.u8()?)).ok_or_else(|| damaged("a state"))?,
                key: r.array()?,
            });
        }
        let tokens = r.varint()?;
        if tokens > MAX_TOKENS as u64 {
            return Err(damaged("too many tokens"));
        }
        for _ in 0..tokens {
            state.tokens.push(TokenRecord {
                id: r.array()?,
                uses: number(r.varint()?)?,
                expires_ms: r.varint()?,
            });
        }
        r.finish()?;
        Ok(state)
    }
}

fn refuse<T>(kind: ErrorKind, text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(kind, text))
}

fn check_place(addr: &str, zone: &str) -> Result<(), Refusal> {
    check_len(addr.len(), MAX_ADDR, "an address")?;
    check_len(zone.len(), MAX_ZONE, "a zone")?;
    if addr.parse::<std::net::SocketAddr>().is_err() {
        return refuse(ErrorKind::Invalid, format!("{addr:?} is no address"));
    }
    if !zone
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    {
        return refuse(ErrorKind::Invalid, format!("{zone:?} cannot name a zone"));
    }
    Ok(())
}

fn must_load(state: &dyn KvRead) -> Result<ClusterState, Refusal> {
    match ClusterState::load(state)? {
        Some(cluster) => Ok(cluster),
        None => refuse(ErrorKind::Unavailable, "the cluster is not made yet"),
    }
}

fn saved(reply: Reply, cluster: &ClusterState) -> Applied {
    let put = Write::Put {
        key: keys::cluster(),
        value: cluster.encode(),
    };
    Ok((reply, vec![put]))
}

/// The first node's first command. Again: nothing.
pub(crate) fn init(state: &dyn KvRead, c: &op::InitCluster) -> Applied {
    if ClusterState::load(state)?.is_some() {
        return Ok((Reply::Done, Vec::new()));
    }
    check_place(&c.addr, &c.zone)?;
    if ShardMap::new(c.shards).is_none() || c.node == 0 {
        return refuse(ErrorKind::Invalid, "impossible numbers");
    }
    let cluster = ClusterState {
        shards: c.shards,
        next_node: c.node + 1,
        nodes: vec![NodeRecord {
            id: c.node,
            addr: c.addr.clone(),
            zone: c.zone.clone(),
            state: NodeState::Active,
            key: [0; 32],
        }],
        tokens: Vec::new(),
    };
    saved(Reply::Done, &cluster)
}

pub(crate) fn add_token(state: &dyn KvRead, c: &op::AddToken, now_ms: u64) -> Applied {
    let mut cluster = must_load(state)?;
    let id = array::<16>(&c.id, "a token id has 16 bytes")?;
    if cluster.tokens.iter().any(|t| t.id == id) {
        return Ok((Reply::Done, Vec::new()));
    }
    cluster
        .tokens
        .retain(|t| t.expires_ms > now_ms && t.uses > 0);
    if cluster.tokens.len() >= MAX_TOKENS {
        return refuse(ErrorKind::Conflict, "too many join tokens are valid now");
    }
    if c.uses == 0 || c.uses > MAX_NODES as u32 {
        return refuse(ErrorKind::Invalid, "a token has 1 to 1024 uses");
    }
    cluster.tokens.push(TokenRecord {
        id,
        uses: c.uses,
        expires_ms: c.expires_ms,
    });
    saved(Reply::Done, &cluster)
}

pub(crate) fn add(state: &dyn KvRead, c: &op::AddNode, now_ms: u64) -> Applied {
    let mut cluster = must_load(state)?;
    let key = array::<32>(&c.key, "a key's hash has 32 bytes")?;
    check_place(&c.addr, &c.zone)?;
    if let Some(node) = cluster.nodes.iter().find(|n| n.key == key) {
        return Ok((Reply::Node(node.id), Vec::new()));
    }
    let id = array::<16>(&c.token, "a token id has 16 bytes")?;
    let token = cluster.tokens.iter_mut().find(|t| t.id == id);
    let Some(token) = token.filter(|t| t.uses > 0 && t.expires_ms > now_ms) else {
        return refuse(ErrorKind::Denied, "the join token is used up or expired");
    };
    token.uses -= 1;
    if cluster.nodes.len() >= MAX_NODES {
        return refuse(ErrorKind::Conflict, "the cluster has too many nodes");
    }
    let taken = |n: &&NodeRecord| n.state != NodeState::Removed && n.addr == c.addr;
    if let Some(other) = cluster.nodes.iter().find(taken) {
        let text = format!("{} is the address of node {}", c.addr, other.id);
        return refuse(ErrorKind::Conflict, text);
    }
    let node = cluster.next_node;
    cluster.next_node += 1;
    cluster.nodes.push(NodeRecord {
        id: node,
        addr: c.addr.clone(),
        zone: c.zone.clone(),
        state: NodeState::Joining,
        key,
    });
    saved(Reply::Node(node), &cluster)
}

/// Changes a node's address or state. Removed is for ever.
pub(crate) fn set(state: &dyn KvRead, c: &op::SetNode) -> Applied {
    let mut cluster = must_load(state)?;
    let others = cluster
        .nodes
        .iter()
        .any(|n| n.id != c.node && n.state == NodeState::Active);
    let Some(node) = cluster.nodes.iter_mut().find(|n| n.id == c.node) else {
        return refuse(ErrorKind::NotFound, format!("there is no node {}", c.node));
    };
    let before = node.clone();
    if !c.addr.is_empty() {
        check_place(&c.addr, &node.zone)?;
        node.addr = c.addr.clone();
    }
    if c.state != 0 {
        let Some(new) = NodeState::of(c.state) else {
            return refuse(ErrorKind::Invalid, "there is no such state of a node");
        };
        let leaves = matches!(new, NodeState::Draining | NodeState::Removed);
        if leaves && before.state == NodeState::Active && !others {
            let text = format!("node {} is the only active one", c.node);
            return refuse(ErrorKind::Conflict, text);
        }
        node.state = match (before.state, new) {
            (a, b) if a == b => a,
            (NodeState::Removed, _) => {
                let text = format!("node {} was removed: join it as a new one", c.node);
                return refuse(ErrorKind::Conflict, text);
            }
            // What a node says of itself when it starts does not undo an order.
            (NodeState::Draining, NodeState::Active) if c.only_joining => NodeState::Draining,
            (_, NodeState::Joining) => {
                return refuse(ErrorKind::Invalid, "a node joins only once");
            }
            (_, new) => new,
        };
    } else if before.state == NodeState::Removed {
        let text = format!("node {} was removed", c.node);
        return refuse(ErrorKind::Conflict, text);
    }
    if *node == before {
        return Ok((Reply::Done, Vec::new()));
    }
    saved(Reply::Done, &cluster)
}
