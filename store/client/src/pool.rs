//! Connections to nodes, one for each address, made when they are needed and made again when they broke; and one request on one of them.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream, TokioRuntime};
use tidepool_proto::ErrorKind;
use tidepool_proto::wire::{self, Response, response};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::error::ClientError;
use crate::frame::{self, FrameError};
use crate::silence::{LOOK, Silence};
use crate::{ClientConfig, transport};

/// A node that does not even shake hands in this time is not there.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The same, where there are other nodes to go to.
const HANDSHAKE_OF_MANY: Duration = Duration::from_millis(1500);
/// The same of a node that did not answer a moment ago.
const HANDSHAKE_OF_LOST: Duration = Duration::from_millis(500);
/// How long one node of several that is heard may take to answer when it has the request, or between two parts of its answer.
const ANSWER: Duration = Duration::from_secs(6);

/// How long a node is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// There is nobody else: until the connection times out.
    Alone,
    /// Others could answer.
    Many,
    /// Others could, and this one did not a moment ago.
    Lost,
}

/// Why an attempt failed.
pub(crate) enum Attempt {
    /// Another may succeed, anywhere.
    Again(ClientError),
    /// The node did not answer: another one may.
    Lost(ClientError),
    /// None will.
    Over(ClientError),
}

/// One address's connection. Callers that come while it is made wait for the same, and fail with it.
#[derive(Default)]
struct Place {
    connection: Option<Connection>,
    /// When making it failed last, and why.
    failed: Option<(Instant, ClientError)>,
}

type Slot = Arc<Mutex<Place>>;

pub(crate) struct Pool {
    endpoint: Endpoint,
    tls: quinn::ClientConfig,
    server_name: String,
    slots: StdMutex<HashMap<SocketAddr, Slot>>,
}

impl Pool {
    pub(crate) fn new(cfg: &ClientConfig) -> Result<Self, ClientError> {
        let invalid = |text: String| ClientError::new(ErrorKind::Invalid, text);
        let Some(first) = cfg.addrs.first() else {
            return Err(invalid("no store address is given".into()));
        };
        let any: SocketAddr = if first.is_ipv4() {
            (Ipv4Addr::UNSPECIFIED, 0).into()
        } else {
            (Ipv6Addr::UNSPECIFIED, 0).into()
        };
        let failed =
            |e: std::io::Error| ClientError::new(ErrorKind::Failed, format!("UDP socket: {e}"));
        let socket = transport::socket(any).map_err(failed)?;
        let endpoint = Endpoint::new(transport::endpoint(), None, socket, Arc::new(TokioRuntime))
            .map_err(failed)?;
        let mut tls = tls_config(&cfg.identity, wire::ALPN).map_err(invalid)?;
        tls.transport_config(transport::connection(transport::all_loopback(&cfg.addrs)));
        Ok(Self {
            endpoint,
            tls,
            server_name: cfg.server_name.clone(),
            slots: StdMutex::default(),
        })
    }

    /// The round trip to an address, where there is a connection.
    pub(crate) fn rtt(&self, addr: SocketAddr) -> Option<Duration> {
        let slot = self.slot(addr);
        let place = slot.try_lock().ok()?;
        let connection = place.connection.as_ref();
        connection
            .filter(|c| c.close_reason().is_none())
            .map(Connection::rtt)
    }

    fn slot(&self, addr: SocketAddr) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.entry(addr).or_default().clone()
    }

    /// Sends a request to an address and waits for the answer.
    pub(crate) async fn exchange(
        &self,
        addr: SocketAddr,
        frame: Bytes,
        patience: Patience,
    ) -> Result<response::Op, Attempt> {
        let slot = self.slot(addr);
        let connection = self.connection(&slot, addr, patience).await?;
        let answer = exchange(&connection, addr, frame, patience).await;
        if let Err(Attempt::Lost(_)) = &answer
            && connection.close_reason().is_some()
        {
            let mut place = slot.lock().await;
            let same = |c: &Connection| c.stable_id() == connection.stable_id();
            if place.connection.as_ref().is_some_and(same) {
                place.connection = None;
            }
        }
        answer
    }

    async fn connection(
        &self,
        slot: &Slot,
        addr: SocketAddr,
        patience: Patience,
    ) -> Result<Connection, Attempt> {
        let came = Instant::now();
        let mut place = slot.lock().await;
        if let Some(connection) = &place.connection
            && connection.close_reason().is_none()
        {
            return Ok(connection.clone());
        }
        // One after the other they would wait as many times as there are of them.
        if let Some((at, why)) = &place.failed
            && *at >= came
        {
            return Err(Attempt::Lost(why.clone()));
        }
        let connecting = self
            .endpoint
            .connect_with(self.tls.clone(), addr, &self.server_name)
            .map_err(|e| {
                Attempt::Over(ClientError::new(
                    ErrorKind::Invalid,
                    format!("connecting to {addr}: {e}"),
                ))
            })?;
        let limit = match patience {
            Patience::Alone => HANDSHAKE,
            Patience::Many => HANDSHAKE_OF_MANY,
            Patience::Lost => HANDSHAKE_OF_LOST,
        };
        let connection = match tokio::time::timeout(limit, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(e)) => {
                let failed = connection_failed(&e);
                if let Attempt::Lost(why) = &failed {
                    place.failed = Some((Instant::now(), why.clone()));
                }
                return Err(failed);
            }
            Err(_) => {
                let why =
                    ClientError::new(ErrorKind::Unavailable, format!("{addr} does not answer"));
                place.failed = Some((Instant::now(), why.clone()));
                return Err(Attempt::Lost(why));
            }
        };
        place.connection = Some(connection.clone());
        Ok(connection)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.endpoint.close(0u32.into(), b"done");
    }
}

/// One request on a connection. Where others could answer, a node of which nothing is heard is given up, and so is one that has the
/// request and does not answer; not one to which, or from which, bytes are still on their way.
async fn exchange(
    connection: &Connection,
    addr: SocketAddr,
    frame: Bytes,
    patience: Patience,
) -> Result<response::Op, Attempt> {
    let (send, recv) = connection
        .open_bi()
        .await
        .map_err(|e| connection_failed(&e))?;
    let parts = AtomicU32::new(0);
    let mut delivered = pin!(send.stopped());
    let mut talk = pin!(talk(send, recv, frame, &parts));
    if patience == Patience::Alone {
        return talk.await;
    }
    let lost = |what: &str| {
        let text = format!("{addr} {what}");
        Err(Attempt::Lost(ClientError::new(
            ErrorKind::Unavailable,
            text,
        )))
    };
    let mut silence = Silence::new(connection);
    let (mut there, mut seen, mut still) = (false, 0, Duration::ZERO);
    loop {
        tokio::select! {
            answer = &mut talk => return answer,
            _ = &mut delivered, if !there => there = true,
            () = tokio::time::sleep(LOOK) => {
                if silence.look(connection) {
                    // Whoever else waits for it need not find out alone.
                    connection.close(0u32.into(), b"silence");
                    return lost("is silent");
                }
                let now = parts.load(Relaxed);
                if !there || now != seen {
                    (seen, still) = (now, Duration::ZERO);
                }
                still += LOOK;
                if still > ANSWER {
                    return lost("does not answer in time");
                }
            }
        }
    }
}

/// The request out, and the answer in. `parts` counts what came.
async fn talk(
    mut send: SendStream,
    mut recv: RecvStream,
    frame: Bytes,
    parts: &AtomicU32,
) -> Result<response::Op, Attempt> {
    let _ = send.set_priority(transport::priority(frame.len()));
    // The node may answer (and stop reading) before it has read all: its answer is what counts.
    let sent = send.write_chunk(frame).await;
    let _ = send.finish();
    let came = || {
        parts.fetch_add(1, Relaxed);
    };
    let bytes = match frame::read_noting(&mut recv, came).await {
        Ok(bytes) => bytes,
        Err(FrameError::Read(quinn::ReadError::ConnectionLost(e))) => {
            return Err(connection_failed(&e));
        }
        Err(e) => {
            let why = match sent {
                Err(sent) => format!("{e}; {sent}"),
                Ok(()) => e.to_string(),
            };
            return Err(Attempt::Lost(ClientError::new(
                ErrorKind::Unavailable,
                format!("the store's answer broke off: {why}"),
            )));
        }
    };
    let response: Response = wire::decode(bytes).map_err(|e| Attempt::Over(e.into()))?;
    match response.op {
        Some(response::Op::Error(e)) => {
            let error =
                ClientError::new(wire::kind_of(e.kind), e.text).with_upload_again(e.upload_again);
            Err(if e.again {
                Attempt::Again(error)
            } else {
                Attempt::Over(error)
            })
        }
        Some(op) => Ok(op),
        None => Err(Attempt::Over(ClientError::unexpected())),
    }
}

/// What a broken connection means: a refused certificate stays refused, all else may pass.
fn connection_failed(e: &ConnectionError) -> Attempt {
    let code = match e {
        ConnectionError::TransportError(e) => Some(u64::from(e.code)),
        ConnectionError::ConnectionClosed(c) => Some(u64::from(c.error_code)),
        ConnectionError::ApplicationClosed(c) if c.error_code == transport::DENIED.into() => {
            return Attempt::Over(ClientError::new(
                ErrorKind::Denied,
                format!(
                    "the store refuses this client: {}",
                    String::from_utf8_lossy(&c.reason)
                ),
            ));
        }
        ConnectionError::VersionMismatch => {
            return Attempt::Over(ClientError::new(
                ErrorKind::Failed,
                "the node speaks another version of QUIC",
            ));
        }
        _ => None,
    };
    // TLS alerts are transport errors 0x100 to 0x1ff.
    if code.is_some_and(|c| (0x100..0x200).contains(&c)) {
        return Attempt::Over(ClientError::new(
            ErrorKind::Denied,
            format!("the store and this client do not trust each other: {e}"),
        ));
    }
    Attempt::Lost(ClientError::new(
        ErrorKind::Unavailable,
        format!("connection to the store: {e}"),
    ))
}

/// The TLS side of connections made with an identity, for one protocol.
pub fn tls_config(
    identity: &crate::ClientIdentity,
    alpn: &[u8],
) -> Result<quinn::ClientConfig, String> {
    let identity = identity.parse().map_err(|e| e.to_string())?;
    let mut roots = rustls::RootCertStore::empty();
    for ca in identity.ca {
        roots
            .add(ca)
            .map_err(|e| format!("the authority's certificate: {e}"))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_client_auth_cert(identity.cert, identity.key)
        .map_err(|e| format!("the client's certificate: {e}"))?;
    tls.alpn_protocols = vec![alpn.to_vec()];
    let quic = QuicClientConfig::try_from(tls).map_err(|e| e.to_string())?;
    Ok(quinn::ClientConfig::new(Arc::new(quic)))
}
