//! Chunks to the store and back.
//!
//! Up: whoever cuts (blocking code) hands chunks to an [`Upload`] through a bounded channel; a task pins names in batches, encodes the bodies the store
//! lacks and puts them. A chunk is offered once an upload, whatever how often it is cut. Down: [`Fetcher`] gets bodies in batches and
//! opens each with the domain's key, so that nothing unverified reaches a disk.
//!
//! Invariant: [`Upload::finish`] returns only when every offered name is pinned and its body acknowledged as durable; a manifest is committed after that, never before, and
//! names the lowest round of all those answers, so that a collection which began meanwhile is found out ([`Transfer::pin_again`]).

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tidepool_fs::{ChunkSink, ChunkSource, SinkError, SourceError};
use tidepool_proto::{ChunkName, DomainKey, ErrorKind, SessionId};
use tidepool_store_client::{Client, lower_round};
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
/// How often a commit that collections cut off is sent again.
pub(crate) const PIN_AGAIN: usize = 3;

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
    /// The lowest round of the store's answers: what the commit of this rests on. 0 where nothing was asked.
    pub round: u64,
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
            pinned: Mutex::default(),
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

    /// Pins everything that a commit rests on anew, after a collection cut it off: what is still there, as nearly all is, is kept by that, and the commit can be sent
    /// again with the new session and round. What is not there any more has to be captured again, which the error says.
    pub async fn pin_again(&self, names: &HashSet<ChunkName>) -> Result<(SessionId, u64)> {
        let session = SessionId(rand::random());
        let names: Vec<ChunkName> = names.iter().copied().collect();
        let pinned = self.client.pin(session, &names).await?;
        match pinned.missing.first() {
            None => Ok((session, pinned.round)),
            Some(gone) => Err(HostError::new(
                ErrorKind::Unavailable,
                format!(
                    "{} chunks, {gone} among them, were collected before they were committed: they have to be captured again",
                    pinned.missing.len()
                ),
            )),
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
    /// Pinned past the sinks, and the lowest round of that.
    pinned: Mutex<(HashSet<ChunkName>, u64)>,
    tx: mpsc::Sender<Offer>,
    task: JoinHandle<Result<Sent>>,
}

/// A chunk on its way to the store.
struct Offer {
    name: ChunkName,
    plain: Bytes,
    links: Vec<ChunkName>,
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

    /// Says that the commit rests on chunks that were pinned past the sinks, and on the round of that answer.
    pub fn rests_on(&self, names: &[ChunkName], round: u64) {
        let mut pinned = lock(&self.pinned);
        pinned.0.extend(names);
        pinned.1 = lower_round(pinned.1, round);
    }

    /// The names offered so far.
    pub fn offered(&self) -> HashSet<ChunkName> {
        lock(&self.offered).clone()
    }

    /// Says that the session is used by other than sinks.
    pub fn mark_used(&self) {
        self.used.store(true, Ordering::Relaxed);
    }

    /// Waits until everything offered is durable in the store. All sinks must have been dropped.
    pub async fn finish(self) -> Result<Uploaded> {
        drop(self.tx);
        let mut sent = self.task.await??;
        let mut names = std::mem::take(&mut *lock(&self.offered));
        let (pinned, round) = std::mem::take(&mut *lock(&self.pinned));
        names.extend(pinned);
        sent.round = lower_round(sent.round, round);
        let session = self.used.load(Ordering::Relaxed).then_some(self.session);
        Ok(Uploaded {
            session,
            sent,
            names,
        })
    }
}

/// An upload that is complete.
#[derive(Debug)]
pub struct Uploaded {
    /// None where nothing was offered.
    pub session: Option<SessionId>,
    pub sent: Sent,
    /// Every name that a commit of this may rest on.
    pub names: HashSet<ChunkName>,
}

/// The cutting side of an upload.
pub struct UploadSink {
    tx: mpsc::Sender<Offer>,
    offered: Arc<Mutex<HashSet<ChunkName>>>,
}

impl ChunkSink for UploadSink {
    fn chunk(
        &mut self,
        name: ChunkName,
        plain: &[u8],
        links: &[ChunkName],
    ) -> Result<(), SinkError> {
        let fresh = lock(&self.offered).insert(name);
        if fresh {
            let offer = Offer {
                name,
                plain: Bytes::copy_from_slice(plain),
                links: links.to_vec(),
            };
            self.tx
                .blocking_send(offer)
                // The sender stopped at an error of its own, which `finish` reports.
                .map_err(|_| SinkError::new(name, "the upload was cut short"))?;
        }
        Ok(())
    }
}

async fn send_all(
    transfer: Transfer,
    session: SessionId,
    mut rx: mpsc::Receiver<Offer>,
    used: Arc<AtomicBool>,
) -> Result<Sent> {
    let mut sent = Sent::default();
    while let Some(first) = rx.recv().await {
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(offer) = next.take() {
            bytes += offer.plain.len();
            batch.push(offer);
            if batch.len() < BATCH_NAMES && bytes < BATCH_BYTES {
                next = rx.try_recv().ok();
            }
        }
        used.store(true, Ordering::Relaxed);
        let names: Vec<ChunkName> = batch.iter().map(|o| o.name).collect();
        let pinned = transfer.client.pin(session, &names).await?;
        sent.round = lower_round(sent.round, pinned.round);
        let missing: HashSet<ChunkName> = pinned.missing.into_iter().collect();
        if missing.is_empty() {
            continue;
        }
        batch.retain(|o| missing.contains(&o.name));
        let sealing = transfer.clone();
        let bodies: Vec<(ChunkName, Bytes)> = tokio::task::spawn_blocking(move || {
            batch
                .into_iter()
                .map(|o| {
                    let nonce = sealing.seal_nonce();
                    let body = sealing.key.encode(&o.name, &o.plain, &o.links, nonce);
                    (o.name, body.into())
                })
                .collect()
        })
        .await?;
        sent.bytes += bodies.iter().map(|(_, b)| b.len() as u64).sum::<u64>();
        sent.chunks += bodies.len() as u64;
        let put = transfer.client.put(session, bodies).await?;
        sent.round = lower_round(sent.round, put.round);
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
