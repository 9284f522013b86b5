//! Chunk bodies. They are written once, before the log entry that names them is proposed, and never change.
//!
//! The promise of [`BodyStore::put`]: when it returns, the bodies are durable *no later than the next synced write of the log*. So an
//! entry that names them, written after, is never durable without them. Small batches go through RocksDB's write-ahead log and share
//! that sync; large ones skip it and are flushed, which writes them once instead of twice.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use tidepool_proto::ChunkName;
use tidepool_proto::body::check;
use tokio::sync::oneshot;

use crate::db::{Db, DbError};
use crate::driver::Handle;

/// From this many bytes on a batch is flushed.
const FLUSH_AT: usize = 1 << 20;
/// The most bytes of one batch.
const BATCH: usize = 32 << 20;
/// Flushing one column family leaves a piece of write-ahead log behind, until the others are flushed too.
const FLUSHES_PER_CLEANUP: u64 = 64;
const MAX_DAMAGED: usize = 1 << 16;

/// Where bodies are kept.
pub trait BodyStore: Send + Sync + 'static {
    /// Stores bodies: durable no later than the next synced write of the log.
    fn put(&self, bodies: &[(ChunkName, Bytes)]) -> Result<(), DbError>;
    /// A body as it was stored, or `Corruption` where it is not that any more.
    fn get(&self, name: &ChunkName) -> Result<Option<Vec<u8>>, DbError>;
    /// Deletes bodies, whose space comes back before long. Names that are not there are no error. Durable like a put.
    fn delete(&self, names: &[ChunkName]) -> Result<(), DbError>;
}

/// Bodies in RocksDB's blob files.
pub struct RocksBodies {
    db: Db,
    flushes: AtomicU64,
}

impl RocksBodies {
    /// Bodies in this database.
    pub fn new(db: Db) -> Self {
        Self {
            db,
            flushes: AtomicU64::new(0),
        }
    }
}

impl BodyStore for RocksBodies {
    fn put(&self, bodies: &[(ChunkName, Bytes)]) -> Result<(), DbError> {
        let mut batch = self.db.batch()?;
        let mut bytes = 0;
        for (name, body) in bodies {
            bytes += body.len();
            batch.put_body(&name.0, body);
        }
        if bytes < FLUSH_AT {
            return self.db.write(batch.finish(), false);
        }
        self.db.write_bodies_flushed(batch.finish())?;
        if self.flushes.fetch_add(1, Relaxed) % FLUSHES_PER_CLEANUP == FLUSHES_PER_CLEANUP - 1 {
            self.db.flush_all()?;
        }
        Ok(())
    }

    fn get(&self, name: &ChunkName) -> Result<Option<Vec<u8>>, DbError> {
        let Some(body) = self.db.body(&name.0)? else {
            return Ok(None);
        };
        match check(&body) {
            Ok(_) => Ok(Some(body)),
            Err(e) => Err(DbError::Corruption(format!("chunk {name} is damaged: {e}"))),
        }
    }

    fn delete(&self, names: &[ChunkName]) -> Result<(), DbError> {
        let mut batch = self.db.batch()?;
        for name in names {
            batch.delete_body(&name.0);
        }
        self.db.write(batch.finish(), false)
    }
}

struct Job {
    bodies: Vec<(ChunkName, Bytes)>,
    answer: oneshot::Sender<Result<(), DbError>>,
}

/// Writes bodies on a thread of its own: what arrives while one batch is written makes the next.
#[derive(Clone)]
pub(crate) struct BodyWriter {
    jobs: SyncSender<Job>,
}

impl BodyWriter {
    /// A write that fails ends the node.
    pub(crate) fn start(
        store: Arc<dyn BodyStore>,
        driver: Handle,
    ) -> Result<(Self, JoinHandle<()>), std::io::Error> {
        let (jobs, queue) = sync_channel(64);
        let thread = std::thread::Builder::new()
            .name("store-bodies".into())
            .spawn(move || write_all(&*store, &queue, &driver))?;
        Ok((Self { jobs }, thread))
    }

    /// Stores bodies with the promise of [`BodyStore::put`].
    pub(crate) async fn put(&self, bodies: Vec<(ChunkName, Bytes)>) -> Result<(), DbError> {
        let (answer, result) = oneshot::channel();
        let jobs = self.jobs.clone();
        let gone = || DbError::Failed("the node is stopping".into());
        tokio::task::spawn_blocking(move || jobs.send(Job { bodies, answer }))
            .await
            .map_err(|_| gone())?
            .map_err(|_| gone())?;
        result.await.unwrap_or_else(|_| Err(gone()))
    }
}

fn write_all(store: &dyn BodyStore, queue: &Receiver<Job>, driver: &Handle) {
    while let Ok(first) = queue.recv() {
        let mut answers = vec![first.answer];
        let mut bodies = first.bodies;
        let mut bytes: usize = bodies.iter().map(|(_, b)| b.len()).sum();
        while bytes < BATCH
            && let Ok(next) = queue.try_recv()
        {
            bytes += next.bodies.iter().map(|(_, b)| b.len()).sum::<usize>();
            bodies.extend(next.bodies);
            answers.push(next.answer);
        }
        let result = store.put(&bodies);
        drop(bodies);
        // What is on disk is unknown then: nothing may be promised any more.
        if let Err(e) = &result
            && !matches!(e, DbError::Full(_))
        {
            driver.fail(e.clone());
        }
        for answer in answers {
            let _ = answer.send(result.clone());
        }
    }
}

/// Names whose bodies were found damaged since the node started. They count as missing, so that the next upload heals them.
#[derive(Debug, Default)]
pub(crate) struct Damaged {
    names: Mutex<HashSet<ChunkName>>,
}

impl Damaged {
    fn with<T>(&self, f: impl FnOnce(&mut HashSet<ChunkName>) -> T) -> T {
        f(&mut self.names.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn add(&self, name: ChunkName) {
        self.with(|names| {
            if names.len() < MAX_DAMAGED {
                names.insert(name);
            }
        });
    }

    pub(crate) fn contains(&self, name: &ChunkName) -> bool {
        self.with(|names| names.contains(name))
    }

    pub(crate) fn healed(&self, bodies: &[ChunkName]) {
        self.with(|names| {
            if !names.is_empty() {
                for name in bodies {
                    names.remove(name);
                }
            }
        });
    }
}
