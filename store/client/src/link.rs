//! One connection, made again when it breaks, and requests sent again until their time is over.
//!
//! Sending again is always safe: every request is idempotent. Errors that will not go away (a refused certificate, a wrong
//! request, a full disk) end the call at once.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, ConnectionError, Endpoint, TokioRuntime};
use tidepool_proto::ErrorKind;
use tidepool_proto::wire::{self, Request, Response, request, response};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::error::ClientError;
use crate::frame::{self, FrameError};
use crate::{ClientConfig, transport};

const MAX_IN_FLIGHT: usize = 48;
const FIRST_WAIT: Duration = Duration::from_millis(10);
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// A node that does not even shake hands in this time is not there.
const HANDSHAKE: Duration = Duration::from_secs(5);

pub(crate) struct Link {
    endpoint: Endpoint,
    tls: quinn::ClientConfig,
    pub(crate) cfg: ClientConfig,
    current: Mutex<Current>,
    in_flight: Semaphore,
}

#[derive(Default)]
struct Current {
    connection: Option<Connection>,
    /// Which address to try next.
    next: usize,
}

/// Why an attempt failed.
enum Attempt {
    /// Another may succeed.
    Again(ClientError),
    /// None will.
    Over(ClientError),
}

impl Link {
    pub(crate) fn new(cfg: ClientConfig) -> Result<Self, ClientError> {
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
        let tls = tls(&cfg).map_err(invalid)?;
        Ok(Self {
            endpoint,
            tls,
            cfg,
            current: Mutex::default(),
            in_flight: Semaphore::new(MAX_IN_FLIGHT),
        })
    }

    pub(crate) fn addrs(&self) -> &[SocketAddr] {
        &self.cfg.addrs
    }

    /// Sends a request until it is answered.
    pub(crate) async fn call(&self, op: request::Op) -> Result<response::Op, ClientError> {
        let frame = wire::frame(&Request::from(op))?;
        let deadline = Instant::now() + self.cfg.deadline;
        let mut last = ClientError::new(ErrorKind::Unavailable, "the store did not answer in time");
        let mut wait = FIRST_WAIT;
        let mut attempts = 0;
        loop {
            attempts += 1;
            match timeout_at(deadline, self.attempt(&frame)).await {
                Ok(Ok(op)) => return Ok(op),
                Ok(Err(Attempt::Over(e))) => return Err(e.sent(attempts)),
                Ok(Err(Attempt::Again(e))) => last = e,
                Err(_) => return Err(last),
            }
            tracing::debug!(error = %last, attempts, "store request failed, trying again");
            if timeout_at(deadline, tokio::time::sleep(wait))
                .await
                .is_err()
            {
                return Err(last);
            }
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    async fn attempt(&self, frame: &Bytes) -> Result<response::Op, Attempt> {
        let _permit = self.in_flight.acquire().await.map_err(|_| {
            Attempt::Over(ClientError::new(
                ErrorKind::Unavailable,
                "the client is closed",
            ))
        })?;
        let connection = self.connection().await?;
        let answer = exchange(&connection, frame.clone()).await;
        if let Err(Attempt::Again(_)) = &answer {
            self.drop_if_closed(&connection).await;
        }
        answer
    }

    async fn drop_if_closed(&self, connection: &Connection) {
        if connection.close_reason().is_none() {
            return;
        }
        let mut current = self.current.lock().await;
        if current
            .connection
            .as_ref()
            .is_some_and(|c| c.stable_id() == connection.stable_id())
        {
            current.connection = None;
        }
    }

    /// The connection, or a new one. Callers that come meanwhile wait for the same.
    async fn connection(&self) -> Result<Connection, Attempt> {
        let mut current = self.current.lock().await;
        if let Some(connection) = &current.connection
            && connection.close_reason().is_none()
        {
            return Ok(connection.clone());
        }
        let addr = self.cfg.addrs[current.next % self.cfg.addrs.len()];
        current.next = current.next.wrapping_add(1);
        let connecting = self
            .endpoint
            .connect_with(self.tls.clone(), addr, &self.cfg.server_name)
            .map_err(|e| {
                Attempt::Over(ClientError::new(
                    ErrorKind::Invalid,
                    format!("connecting to {addr}: {e}"),
                ))
            })?;
        let connection = match tokio::time::timeout(HANDSHAKE, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(e)) => return Err(connection_failed(&e)),
            Err(_) => {
                return Err(Attempt::Again(ClientError::new(
                    ErrorKind::Unavailable,
                    format!("{addr} does not answer"),
                )));
            }
        };
        current.connection = Some(connection.clone());
        Ok(connection)
    }
}

impl Drop for Link {
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
            return Err(Attempt::Again(ClientError::new(
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
    Attempt::Again(ClientError::new(
        ErrorKind::Unavailable,
        format!("connection to the store: {e}"),
    ))
}

fn tls(cfg: &ClientConfig) -> Result<quinn::ClientConfig, String> {
    let identity = cfg.identity.parse().map_err(|e| e.to_string())?;
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
    tls.alpn_protocols = vec![wire::ALPN.to_vec()];
    let quic = QuicClientConfig::try_from(tls).map_err(|e| e.to_string())?;
    let mut config = quinn::ClientConfig::new(Arc::new(quic));
    config.transport_config(transport::connection(transport::all_loopback(&cfg.addrs)));
    Ok(config)
}
