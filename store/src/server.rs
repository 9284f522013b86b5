//! The QUIC server: connections, frames and their bounds. What a request means is in [`crate::requests`].
//!
//! Memory is bounded by the bytes of requests that are taken in at once, over all connections; a client that is slow to send or to
//! read loses its request after a while.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use tidepool_proto::ErrorKind;
use tidepool_proto::wire::{self, MAX_FRAME, Request, Response, WireError, response};
use tidepool_store_client::frame::{self, FrameError};
use tidepool_store_client::transport;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::cluster;
use crate::pki::Caller;
use crate::requests::{self, Answered, Shared};
use crate::roles::{self, Role};

const MAX_CONNECTIONS: usize = 1024;
/// Requests being read or worked on, in bytes: 128 MiB, in units of [`UNIT`].
const TAKEN: usize = 128 << 20;
const UNIT: usize = 4096;
/// Long answers at once, of a little more than [`wire::ANSWER_BYTES`] each.
const LONG: usize = 32;
const HANDSHAKE: Duration = Duration::from_secs(10);
/// The longest a frame may take to arrive or to be taken.
const FRAME: Duration = Duration::from_secs(60);

/// What all connections share.
struct Limits {
    taken: Semaphore,
    /// Answers that may be long, from their making until they are sent.
    long: Semaphore,
}

/// Serves until the endpoint is closed.
pub(crate) async fn run(endpoint: Endpoint, shared: Arc<Shared>) {
    let limits = Arc::new(Limits {
        taken: Semaphore::new(TAKEN / UNIT),
        long: Semaphore::new(LONG),
    });
    let mut connections = JoinSet::new();
    while let Some(incoming) = endpoint.accept().await {
        while connections.try_join_next().is_some() {}
        if connections.len() >= MAX_CONNECTIONS {
            shared.counters.refuse();
            incoming.refuse();
            continue;
        }
        connections.spawn(connection(incoming, shared.clone(), limits.clone()));
    }
}

async fn connection(incoming: Incoming, shared: Arc<Shared>, limits: Arc<Limits>) {
    let peer = incoming.remote_address();
    let connection = match timeout(HANDSHAKE, incoming).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(e)) => {
            shared.counters.refuse();
            tracing::warn!(%peer, error = %e, "connection refused");
            return;
        }
        Err(_) => {
            shared.counters.refuse();
            tracing::warn!(%peer, "connection refused: the handshake takes too long");
            return;
        }
    };
    let refuse = |why: &str| {
        shared.counters.refuse();
        tracing::warn!(%peer, %why, "connection refused");
        connection.close(transport::DENIED.into(), why.as_bytes());
    };
    let caller = match Caller::of(&connection) {
        Ok(caller) => Arc::new(caller),
        Err(e) => return refuse(&e.to_string()),
    };
    if protocol(&connection).as_deref() == Some(wire::PEER_ALPN) {
        return match cluster::admit(&shared, &caller) {
            Ok(node) => shared.peers.run(node, connection).await,
            Err(why) => refuse(&why),
        };
    }
    // A node that was removed is no client either.
    if caller.role == Role::Store
        && let Err(why) = cluster::admit(&shared, &caller)
    {
        return refuse(&why);
    }
    // Requests end with their connection: whoever sent them sends them again.
    let mut requests = JoinSet::new();
    loop {
        match connection.accept_bi().await {
            Ok((send, recv)) => {
                while requests.try_join_next().is_some() {}
                let (shared, limits) = (shared.clone(), limits.clone());
                let (connection, caller) = (connection.clone(), caller.clone());
                requests.spawn(request(connection, caller, send, recv, shared, limits));
            }
            Err(e) => {
                tracing::debug!(%peer, reason = %e, "connection ended");
                return;
            }
        }
    }
}

/// The protocol that was agreed on.
fn protocol(connection: &Connection) -> Option<Vec<u8>> {
    let data = connection.handshake_data()?;
    let data = data
        .downcast::<quinn::crypto::rustls::HandshakeData>()
        .ok()?;
    data.protocol
}

async fn request(
    connection: Connection,
    caller: Arc<Caller>,
    mut send: SendStream,
    mut recv: RecvStream,
    shared: Arc<Shared>,
    limits: Arc<Limits>,
) {
    let peer = connection.remote_address();
    let mut _long = None;
    let answer = match timeout(FRAME, take(&mut recv, &limits)).await {
        Ok(Ok((bytes, _taken))) => match wire::decode::<Request>(bytes) {
            Ok(Request { op: Some(op) }) if !roles::allowed(caller.role, &op) => {
                denied(&shared, peer, &caller).into()
            }
            Ok(request) => {
                if requests::is_long(&request) {
                    _long = limits.long.acquire().await.ok();
                }
                requests::answer(&shared, &caller, request).await
            }
            Err(e) => bad(&shared, peer, &e).into(),
        },
        Ok(Err(FrameError::Wire(e))) => bad(&shared, peer, &e).into(),
        Ok(Err(FrameError::Read(e))) => {
            tracing::debug!(%peer, error = %e, "a request broke off");
            return;
        }
        Err(_) => {
            shared.counters.refuse();
            tracing::warn!(%peer, "a request takes too long to arrive");
            return;
        }
    };
    shared.counters.request();
    let _ = recv.stop(0u32.into());
    let frame = answer.frame().or_else(|e| {
        tracing::error!(%peer, error = %e, "an answer does not fit a frame");
        Answered::from(error(ErrorKind::Failed, e.to_string(), false)).frame()
    });
    let Ok(mut frame) = frame else { return };
    let len = frame.iter().map(Bytes::len).sum();
    let _ = send.set_priority(transport::priority(len));
    if let Ok(Err(e)) = timeout(FRAME, send.write_all_chunks(&mut frame)).await {
        tracing::debug!(%peer, error = %e, "an answer was not taken");
    }
    let _ = send.finish();
}

/// Reads a frame when there is room for it.
async fn take<'a>(
    recv: &mut RecvStream,
    limits: &'a Limits,
) -> Result<(Bytes, tokio::sync::SemaphorePermit<'a>), FrameError> {
    let len = frame::read_len(recv).await?;
    let units = len.min(MAX_FRAME).div_ceil(UNIT) as u32;
    // The semaphore is never closed.
    let Ok(taken) = limits.taken.acquire_many(units).await else {
        return Err(WireError::Truncated.into());
    };
    Ok((frame::read_body(recv, len).await?, taken))
}

fn bad(shared: &Shared, peer: std::net::SocketAddr, e: &WireError) -> Response {
    shared.counters.refuse();
    tracing::warn!(%peer, error = %e, "a request was refused");
    error(ErrorKind::Invalid, e.to_string(), false)
}

fn denied(shared: &Shared, peer: std::net::SocketAddr, caller: &Caller) -> Response {
    shared.counters.refuse();
    let role = caller.role.name();
    tracing::warn!(%peer, role, name = %caller.name, "a request was refused: the role may not do this");
    let text = format!("a certificate of role {role} may not ask for this");
    error(ErrorKind::Denied, text, false)
}

pub(crate) fn error(kind: ErrorKind, text: String, again: bool) -> Response {
    response::Op::Error(response::Error {
        kind: wire::kind_code(kind),
        text,
        again,
        upload_again: false,
    })
    .into()
}

/// raft-rs logs by slog: its warnings and errors go the way of all others.
pub(crate) fn raft_logger() -> slog::Logger {
    struct ToTracing;
    impl slog::Drain for ToTracing {
        type Ok = ();
        type Err = slog::Never;

        fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
            match record.level() {
                slog::Level::Critical | slog::Level::Error => {
                    tracing::error!(target: "raft", "{}", record.msg());
                }
                slog::Level::Warning => tracing::warn!(target: "raft", "{}", record.msg()),
                slog::Level::Info => tracing::debug!(target: "raft", "{}", record.msg()),
                _ => tracing::trace!(target: "raft", "{}", record.msg()),
            }
            Ok(())
        }
    }
    slog::Logger::root(ToTracing, slog::o!())
}
