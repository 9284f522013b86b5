//! Chunks to the store and back.
//!
//! Up: whoever cuts (blocking code) hands chunks to an [`Upload`] through a bounded channel; a task pins names in batches, encodes the bodies the store
//! lacks and puts them. A chunk is offered once an upload, whatever how often it is cut. Down: [`Fetcher`] gets bodies in batches and
//! opens each with the domain's key, so that nothing unverified reaches a disk.
//!
//! Invariant: [`Upload::finish`] returns only when every offered name is pinned and its body acknowledged as durable; a manifest is committed after that, never before.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tidepool_fs::{ChunkSink, ChunkSource, SinkError, SourceError};
use tidepool_proto::{ChunkName, DomainKey, ErrorKind, SessionId};
use tidepool_store_client::Client;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::error::{HostError, Result, chain};
use crate::host::lock;

/// Names pinned in one request at the most.
const BATCH_NAMES: usize = 512;
/// Plaintext gathered for one batch at the most, in bytes.
const BATCH_BYTES: usize = 4 << 20;
/// Chunks that may wait between the cutter and the sender; with chunks of at most 1 MiB this bounds memory.
const QUEUE: usize = 64;

impl From<tidepool_store_client::ClientError> for HostError {
    fn from(e: tidepool_store_client::ClientError) -> Self {
        HostError::new(e.kind(), format!("store: {}", chain(&e)))
    }
}

/// How chunks of a domain are read and written.
#[derive(Clone)]
pub struct Transfer {
    pub client: Client,
    pub key: DomainKey,
    /// Whether bodies are sealed.
    pub seal: bool,
}

/// What an upload did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of bodies sent.
    pub bytes: u64,
    /// Chunks sent.
    pub chunks: u64,
}

impl Transfer {
    /// Opens an upload session.
    pub fn upload(&self) -> Upload {
        let session = SessionId(rand::random());
        let (tx, rx) = mpsc::channel(QUEUE);
        let used = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(send_all(self.clone(), session, rx, used.clone()));
        Upload {
            session,
            used,
            offered: Arc::default(),
            tx,
            task,
        }
    }

    /// A source of plaintexts for blocking code.
    pub fn fetcher(&self) -> Fetcher {
        Fetcher {
            transfer: self.clone(),
            runtime: Handle::current(),
            fetched: Arc::default(),
        }
    }

    fn seal_nonce(&self) -> Option<[u8; 12]> {
        self.seal.then(rand::random)
    }
}

/// One upload: a session of the store.
pub struct Upload {
    session: SessionId,
    /// Whether the store has heard of the session.
    used: Arc<AtomicBool>,
    offered: Arc<Mutex<HashSet<ChunkName>>>,
    tx: mpsc::Sender<(ChunkName, Bytes)>,
    task: JoinHandle<Result<Sent>>,
}

impl Upload {
    /// A sink for blocking code; several may be used after each other.
    pub fn sink(&self) -> UploadSink {
        UploadSink {
            tx: self.tx.clone(),
            offered: self.offered.clone(),
        }
    }

    /// The session, for pins of chunks that are not offered.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// The names offered so far.
    pub fn offered(&self) -> HashSet<ChunkName> {
        lock(&self.offered).clone()
    }

    /// Says that the session is used by other than sinks.
    pub fn mark_used(&self) {
        self.used.store(true, Ordering::Relaxed);
    }

    /// Waits until everything offered is durable in the store. All sinks must have been dropped. No session where nothing was offered.
    pub async fn finish(self) -> Result<(Option<SessionId>, Sent)> {
        drop(self.tx);
        let sent = self.task.await??;
        Ok((
            self.used.load(Ordering::Relaxed).then_some(self.session),
            sent,
        ))
    }
}

/// The cutting side of an upload.
pub struct UploadSink {
    tx: mpsc::Sender<(ChunkName, Bytes)>,
    offered: Arc<Mutex<HashSet<ChunkName>>>,
}

impl ChunkSink for UploadSink {
    fn chunk(&mut self, name: ChunkName, plain: &[u8]) -> Result<(), SinkError> {
        let fresh = lock(&self.offered).insert(name);
        if fresh {
            self.tx
                .blocking_send((name, Bytes::copy_from_slice(plain)))
                // The sender stopped at an error of its own, which `finish` reports.
                .map_err(|_| SinkError::new(name, "the upload was cut short"))?;
        }
        Ok(())
    }
}

async fn send_all(
    transfer: Transfer,
    session: SessionId,
    mut rx: mpsc::Receiver<(ChunkName, Bytes)>,
    used: Arc<AtomicBool>,
) -> Result<Sent> {
    let mut sent = Sent::default();
    while let Some(first) = rx.recv().await {
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some((name, plain)) = next.take() {
            bytes += plain.len();
            batch.push((name, plain));
            if batch.len() < BATCH_NAMES && bytes < BATCH_BYTES {
                next = rx.try_recv().ok();
            }
        }
        used.store(true, Ordering::Relaxed);
        let names: Vec<ChunkName> = batch.iter().map(|(n, _)| *n).collect();
        let missing: HashSet<ChunkName> = transfer
            .client
            .pin(session, &names)
            .await?
            .into_iter()
            .collect();
        if missing.is_empty() {
            continue;
        }
        batch.retain(|(n, _)| missing.contains(n));
        let sealing = transfer.clone();
        let bodies: Vec<(ChunkName, Bytes)> = tokio::task::spawn_blocking(move || {
            batch
                .into_iter()
                .map(|(n, plain)| {
                    (
                        n,
                        sealing.key.encode(&n, &plain, sealing.seal_nonce()).into(),
                    )
                })
                .collect()
        })
        .await?;
        sent.bytes += bodies.iter().map(|(_, b)| b.len() as u64).sum::<u64>();
        sent.chunks += bodies.len() as u64;
        transfer.client.put(session, bodies).await?;
    }
    Ok(sent)
}

/// Gets chunks from the store for blocking code.
pub struct Fetcher {
    transfer: Transfer,
    runtime: Handle,
    fetched: Arc<AtomicU64>,
}

impl Fetcher {
    /// A counter of the bytes of bodies fetched so far.
    pub fn fetched(&self) -> Arc<AtomicU64> {
        self.fetched.clone()
    }
}

impl ChunkSource for Fetcher {
    fn get(&mut self, names: &[ChunkName]) -> Result<Vec<Vec<u8>>, SourceError> {
        let first = names.first().copied().unwrap_or(ChunkName([0; 32]));
        let bodies = self
            .runtime
            .block_on(self.transfer.client.get(names))
            .map_err(|e| SourceError::Failed {
                name: first,
                reason: chain(&e),
                source: Some(Box::new(HostError::from(e))),
            })?;
        names
            .iter()
            .zip(bodies)
            .map(|(name, body)| {
                self.fetched.fetch_add(body.len() as u64, Ordering::Relaxed);
                self.transfer
                    .key
                    .open(name, &body)
                    .map_err(|e| SourceError::Damaged {
                        name: *name,
                        reason: e.to_string(),
                    })
            })
            .collect()
    }
}

/// What a failed source means to whoever asked.
pub(crate) fn source_error(e: &SourceError) -> HostError {
    let kind = match e {
        SourceError::Missing { .. } | SourceError::Damaged { .. } | SourceError::Format { .. } => {
            ErrorKind::Corruption
        }
        SourceError::Failed { source, .. } => {
            let host = source
                .as_deref()
                .and_then(|s| s.downcast_ref::<HostError>());
            // A chunk that a manifest names and the store lacks is lost.
            match host.map_or(ErrorKind::Failed, |h| h.kind) {
                ErrorKind::NotFound => ErrorKind::Corruption,
                kind => kind,
            }
        }
    };
    HostError::new(kind, chain(e))
}
