//! QUIC alone: a plain pair of endpoints with the store's own transport settings, the server a process of its own as the store is.
//!
//! It answers a stream's eight bytes, a length, with so many bytes. What it can carry bounds what any store over it can.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, TokioRuntime};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tidepool_store_client::transport;

use crate::process::Process;

/// First argument of this binary when it is to be the server.
pub(crate) const FLAG: &str = "--tp-quic-server";
const NAME: &str = "bench";
const PIECE: usize = 64 << 10;

/// A connection to a server that lives as long as this.
pub(crate) struct Quic {
    connection: Connection,
    _endpoint: Endpoint,
    _server: Process,
}

impl Quic {
    pub(crate) async fn start() -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg(FLAG)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut server = Process::start(&mut command)?;
        let out = server.child().stdout.take().context("no stdout")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        let (addr, cert) = line
            .trim()
            .split_once(' ')
            .context("the server did not start")?;
        let addr: SocketAddr = addr.parse()?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from(hex::decode(cert)?))?;
        let tls = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut cfg = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        cfg.transport_config(transport::connection(true));
        let socket = transport::socket("127.0.0.1:0".parse()?)?;
        let endpoint = Endpoint::new(transport::endpoint(), None, socket, Arc::new(TokioRuntime))?;
        let connection = endpoint.connect_with(cfg, addr, NAME)?.await?;
        Ok(Self {
            connection,
            _endpoint: endpoint,
            _server: server,
        })
    }

    /// Fetches so many bytes over each of so many streams at once.
    pub(crate) async fn fetch(&self, streams: usize, each: u64) -> Result<Duration> {
        let begun = Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..streams {
            tasks.spawn(one(self.connection.clone(), each));
        }
        while let Some(done) = tasks.join_next().await {
            ensure!(
                done?? == each,
                "QUIC brought something else than was asked for"
            );
        }
        Ok(begun.elapsed())
    }

    /// A request and an answer of a few bytes on a stream of their own.
    pub(crate) async fn round_trip(&self) -> Result<Duration> {
        let begun = Instant::now();
        one(self.connection.clone(), 8).await?;
        Ok(begun.elapsed())
    }
}

async fn one(connection: Connection, len: u64) -> Result<u64> {
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(&len.to_le_bytes()).await?;
    send.finish()?;
    let mut got = 0;
    while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
        got += chunk.bytes.len() as u64;
    }
    Ok(got)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The other side; ends with who started it.
pub(crate) fn serve() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let result = runtime
        .map_err(Into::into)
        .and_then(|r| r.block_on(listen()));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the QUIC server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn listen() -> Result<()> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let cert = made.cert.der().clone();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der())
        .map_err(|e| anyhow::anyhow!("{e}"))?;
    let tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![cert.clone()], key)?;
    let mut cfg = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    cfg.transport_config(transport::connection(true));
    let socket = transport::socket("127.0.0.1:0".parse()?)?;
    let runtime = Arc::new(TokioRuntime);
    let endpoint = Endpoint::new(transport::endpoint(), Some(cfg), socket, runtime)?;
    println!("{} {}", endpoint.local_addr()?, hex::encode(&cert));
    let piece = Bytes::from(vec![0x5a; PIECE]);
    while let Some(incoming) = endpoint.accept().await {
        let connection = incoming.await?;
        while let Ok((send, recv)) = connection.accept_bi().await {
            let piece = piece.clone();
            tokio::spawn(async move {
                // A stream that breaks is the client's to notice.
                let _ = answer(send, recv, piece).await;
            });
        }
    }
    Ok(())
}

async fn answer(
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
    piece: Bytes,
) -> Result<()> {
    let mut len = [0; 8];
    recv.read_exact(&mut len).await?;
    let mut left = u64::from_le_bytes(len);
    while left > 0 {
        let now = left.min(PIECE as u64);
        send.write_chunk(piece.slice(..now as usize)).await?;
        left -= now;
    }
    send.finish()?;
    Ok(())
}
