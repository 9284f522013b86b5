//! The network between nodes: one QUIC connection for each pair, on the same port as clients, told apart by its protocol's name.
//!
//! The node with the higher number connects, so that a pair never has two connections for long, and goes on trying with growing waits.
//! Each side sends its control messages on one stream of its own, all that is waiting in one frame; requests (bodies, pages of a
//! raft snapshot) have a stream each and less priority, so that control never waits behind bodies. A leader's new bodies are pushed
//! ([`push`]).
//!
//! Control messages may be lost (no connection, or too many waiting): raft sends again what matters. What comes in is bounded before it
//! is read, and only from connections whose certificate says which node this is.
//!
//! Elsewhere on purpose: what messages mean (the driver), who may connect ([`crate::server`]).

mod inbox;
mod link;
mod net;
mod push;
mod stream;

#[cfg(test)]
mod tests;

pub(crate) use inbox::PeerInbox;
pub(crate) use net::{OtherCopies, PeerNet};
pub(crate) use push::Arrivals;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, Endpoint};
use tidepool_proto::ChunkName;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

/// Bytes of control messages that may wait for one peer.
const MAX_WAITING: u64 = 32 << 20;
/// How long a request to a peer may take.
const REQUEST: Duration = Duration::from_secs(30);

/// Why a peer did not answer.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum PeerError {
    #[error("node {0} is not connected")]
    NotConnected(u64),
    #[error("node {0}: {1}")]
    Failed(u64, String),
    /// It answered that it will not.
    #[error("node {0} refused: {1}")]
    Refused(u64, String),
}

/// What a node does with what comes from others.
pub(crate) trait Inbox: Send + Sync + 'static {
    /// Control messages of a peer, in order.
    fn deliver(&self, from: u64, messages: Vec<Bytes>);
    /// Answers a request.
    fn answer(
        &self,
        from: u64,
        request: Bytes,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send + '_>>;
    /// Bodies are about to arrive. None: they are not wanted now. An error ends the connection.
    fn coming(&self, from: u64, head: Bytes) -> Result<Option<push::Coming>, String>;
    /// Stores bodies that arrived, if they are good.
    fn store(
        &self,
        from: u64,
        coming: push::Coming,
        bodies: Bytes,
    ) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + '_>>;
    /// Something came that is not of this protocol.
    fn refused(&self);
}

/// What is sent to one peer.
struct Peer {
    connection: Connection,
    queue: UnboundedSender<Bytes>,
    waiting: Arc<AtomicU64>,
    pushes: UnboundedSender<push::Pushed>,
    pushing: Arc<AtomicU64>,
}

struct Dialer {
    addr: SocketAddr,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    peers: HashMap<u64, Peer>,
    dialers: HashMap<u64, Dialer>,
    closed: bool,
}

pub(crate) struct Inner {
    me: u64,
    endpoint: Endpoint,
    tls: quinn::ClientConfig,
    inbox: Arc<dyn Inbox>,
    state: Mutex<State>,
    dropped: AtomicU64,
}

/// The way to all other nodes. Clones share it.
#[derive(Clone)]
pub(crate) struct Peers {
    inner: Arc<Inner>,
}

impl Peers {
    /// `tls`: how this node proves itself and whom it trusts.
    pub(crate) fn new(
        me: u64,
        endpoint: Endpoint,
        tls: quinn::ClientConfig,
        inbox: Arc<dyn Inbox>,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                me,
                endpoint,
                tls,
                inbox,
                state: Mutex::default(),
                dropped: AtomicU64::new(0),
            }),
        }
    }

    /// This node's number.
    pub(crate) fn me(&self) -> u64 {
        self.inner.me
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells who the other members are. Connections to those with lower numbers are made and kept; others are closed when they
    /// are none any more.
    pub(crate) fn set_nodes(&self, nodes: &[(u64, SocketAddr)]) {
        let mut state = self.state();
        if state.closed {
            return;
        }
        state.dialers.retain(|id, dialer| {
            let keep = nodes.contains(&(*id, dialer.addr)) && !dialer.task.is_finished();
            if !keep {
                dialer.task.abort();
            }
            keep
        });
        state.peers.retain(|id, peer| {
            let keep = nodes.iter().any(|(n, _)| n == id);
            if !keep {
                peer.connection.close(0u32.into(), b"not a member");
            }
            keep
        });
        for (id, addr) in nodes {
            if *id < self.inner.me && !state.dialers.contains_key(id) {
                let task = tokio::spawn(link::dial(self.clone(), *id, *addr));
                state.dialers.insert(*id, Dialer { addr: *addr, task });
            }
        }
    }

    /// Uses a connection of a peer, whoever made it, until it ends. It replaces an older one.
    pub(crate) async fn run(&self, from: u64, connection: Connection) {
        let (queue, waiting_messages) = unbounded_channel();
        let (pushes, waiting_bodies) = unbounded_channel();
        let (waiting, pushing) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        {
            let mut state = self.state();
            if state.closed {
                return connection.close(0u32.into(), b"stopping");
            }
            let peer = Peer {
                connection: connection.clone(),
                queue,
                waiting: waiting.clone(),
                pushes,
                pushing: pushing.clone(),
            };
            if let Some(old) = state.peers.insert(from, peer) {
                old.connection.close(0u32.into(), b"replaced");
            }
        }
        tracing::info!(peer = from, addr = %connection.remote_address(), "connected to a node");
        let sending = stream::send_control(connection.clone(), waiting_messages, waiting);
        let pushing = push::send_all(connection.clone(), waiting_bodies, pushing);
        let taking = stream::take_all(&connection, from, &self.inner.inbox);
        let why = tokio::select! {
            why = sending => why,
            why = pushing => why,
            why = taking => why,
        };
        connection.close(0u32.into(), b"done");
        tracing::info!(peer = from, %why, "connection to a node ended");
        let mut state = self.state();
        let same = |p: &Peer| p.connection.stable_id() == connection.stable_id();
        if state.peers.get(&from).is_some_and(same) {
            state.peers.remove(&from);
        }
    }

    /// Sends control messages, if there is a connection and room.
    pub(crate) fn send(&self, to: u64, message: Bytes) {
        let state = self.state();
        let sent = state.peers.get(&to).is_some_and(|peer| {
            let len = message.len() as u64 + 64;
            if peer.waiting.fetch_add(len, Relaxed) + len > MAX_WAITING {
                peer.waiting.fetch_sub(len, Relaxed);
                return false;
            }
            peer.queue.send(message).is_ok()
        });
        if !sent {
            self.inner.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Sends a body that the peer will come to need, if there is a connection and room.
    pub(crate) fn push(&self, to: u64, name: ChunkName, body: &Bytes) {
        let state = self.state();
        let Some(peer) = state.peers.get(&to) else {
            return;
        };
        let len = body.len() as u64;
        if peer.pushing.fetch_add(len, Relaxed) + len > push::MAX_PUSHING
            || peer.pushes.send((name, body.clone())).is_err()
        {
            peer.pushing.fetch_sub(len, Relaxed);
        }
    }

    /// Asks a peer for something, once.
    pub(crate) async fn request(&self, to: u64, request: Bytes) -> Result<Bytes, PeerError> {
        let connection = {
            let state = self.state();
            let peer = state.peers.get(&to).ok_or(PeerError::NotConnected(to))?;
            peer.connection.clone()
        };
        match tokio::time::timeout(REQUEST, stream::ask(&connection, request)).await {
            Ok(Ok(answer)) => answer.map_err(|why| PeerError::Refused(to, why)),
            Ok(Err(why)) => Err(PeerError::Failed(to, why)),
            Err(_) => Err(PeerError::Failed(to, "no answer in time".into())),
        }
    }

    /// Peers that are connected now.
    pub(crate) fn connected(&self) -> Vec<u64> {
        self.state().peers.keys().copied().collect()
    }

    /// Control messages that were not sent.
    pub(crate) fn dropped(&self) -> u64 {
        self.inner.dropped.load(Relaxed)
    }

    /// Ends everything.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        for (_, dialer) in state.dialers.drain() {
            dialer.task.abort();
        }
        for (_, peer) in state.peers.drain() {
            peer.connection.close(0u32.into(), b"stopping");
        }
    }
}
