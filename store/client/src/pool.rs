//! Connections to nodes, one for each address, made when they are needed and made again when they broke; and one request on one of them.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, ConnectionError, Endpoint, TokioRuntime};
use tidepool_proto::ErrorKind;
use tidepool_proto::wire::{self, Response, response};
use tokio::sync::Mutex;

use crate::error::ClientError;
use crate::frame::{self, FrameError};
use crate::{ClientConfig, transport};

/// A node that does not even shake hands in this time is not there.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The same, where there are other nodes to go to.
const HANDSHAKE_OF_MANY: Duration = Duration::from_secs(2);

/// Why an attempt failed.
pub(crate) enum Attempt {
    /// Another may succeed, anywhere.
    Again(ClientError),
    /// The node did not answer: another one may.
    Lost(ClientError),
    /// None will.
    Over(ClientError),
}

/// One address's connection. Callers that come while it is made wait for the same.
type Slot = Arc<Mutex<Option<Connection>>>;

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
        let connection = slot.try_lock().ok()?;
        connection
            .as_ref()
            .filter(|c| c.close_reason().is_none())
            .map(Connection::rtt)
    }

    fn slot(&self, addr: SocketAddr) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.entry(addr).or_default().clone()
    }

    /// Sends a request to an address and waits for the answer. `many`: there are others that could answer.
    pub(crate) async fn exchange(
        &self,
        addr: SocketAddr,
        frame: Bytes,
        many: bool,
    ) -> Result<response::Op, Attempt> {
        let slot = self.slot(addr);
        let connection = self.connection(&slot, addr, many).await?;
        let answer = exchange(&connection, frame).await;
        if let Err(Attempt::Lost(_)) = &answer
            && connection.close_reason().is_some()
        {
            let mut current = slot.lock().await;
            let same = |c: &Connection| c.stable_id() == connection.stable_id();
            if current.as_ref().is_some_and(same) {
                *current = None;
            }
        }
        answer
    }

    async fn connection(
        &self,
        slot: &Slot,
        addr: SocketAddr,
        many: bool,
    ) -> Result<Connection, Attempt> {
        let mut current = slot.lock().await;
        if let Some(connection) = &*current
            && connection.close_reason().is_none()
        {
            return Ok(connection.clone());
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
        let limit = if many { HANDSHAKE_OF_MANY } else { HANDSHAKE };
        let connection = match tokio::time::timeout(limit, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(e)) => return Err(connection_failed(&e)),
            Err(_) => {
                return Err(Attempt::Lost(ClientError::new(
                    ErrorKind::Unavailable,
                    format!("{addr} does not answer"),
                )));
            }
        };
        *current = Some(connection.clone());
        Ok(connection)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.endpoint.close(0u32.into(), b"done");
    }
}

async fn exchange(connection: &Connection, frame: Bytes) -> Result<response::Op, Attempt> {
    let (mut send, mut recv) = connection
        .open_bi()
        .await
        .map_err(|e| connection_failed(&e))?;
    let _ = send.set_priority(transport::priority(frame.len()));
    // The node may answer (and stop reading) before it has read all: its answer is what counts.
    let sent = send.write_chunk(frame).await;
    let _ = send.finish();
    let bytes = match frame::read(&mut recv).await {
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
