//! Chunk bodies. They are written once, before the log entry that names them is proposed, and never change.
//!
//! The promise of [`BodyStore::put`]: when it returns, the bodies are durable, and promised *no later than the next synced write of the
//! database's log*: an entry of a raft log that names them, written after, is never durable without them. How they are kept is
//! [`crate::segments`]'.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use tidepool_proto::ChunkName;
use tokio::sync::oneshot;

use crate::db::DbError;
use crate::driver::Handle;
use crate::segments::Place;

/// The most bytes of one batch.
const BATCH: usize = 32 << 20;
/// The most damaged bodies that are remembered.
pub(crate) const MAX_DAMAGED: usize = 1 << 16;

/// Names and where their bodies are.
pub type Page = Vec<(ChunkName, Option<Place>)>;

/// Where bodies are kept.
pub trait BodyStore: Send + Sync + 'static {
    /// Stores bodies that were checked, in place of what was stored under their names: durable on return, promised with the next
    /// synced write of the database's log. `Full` promises nothing and may be tried again.
    fn put(&self, bodies: &[(ChunkName, Bytes)]) -> Result<(), DbError>;
    /// A body as it was stored, or `Corruption` where it is not that any more.
    fn get(&self, name: &ChunkName) -> Result<Option<Bytes>, DbError>;
    /// The same for less: the body's own checksum is not computed. For those who hand it to somebody that does.
    fn get_unverified(&self, name: &ChunkName) -> Result<Option<Bytes>, DbError>;
    /// Which of these are stored, unread: one that is damaged counts as stored until someone reads it.
    fn has(&self, names: &[ChunkName]) -> Result<Vec<bool>, DbError>;
    /// Deletes bodies, durable with the next synced write of the database's log; their space comes back soon after. Names that are
    /// not there are no error.
    fn delete(&self, names: &[ChunkName]) -> Result<(), DbError>;
    /// Where a body is, if it is stored: a body that is put again is at another place.
    fn place(&self, name: &ChunkName) -> Result<Option<Place>, DbError>;
    /// What is stored under the names after `after`, in their order, at most `max`. No place: the index entry is damaged.
    fn page(&self, after: Option<&ChunkName>, max: usize) -> Result<Page, DbError>;
    /// Remembers that a stored body is damaged and that no copy was found; a later put or delete of it ends that.
    fn quarantine(&self, name: &ChunkName, why: &str) -> Result<(), DbError>;
    /// What is in quarantine and why, at most `max`.
    fn quarantined(&self, max: usize) -> Result<Vec<(ChunkName, String)>, DbError>;
}

struct Job {
    bodies: Vec<(ChunkName, Bytes)>,
    answer: oneshot::Sender<Result<(), DbError>>,
}

/// Writes bodies on a thread of its own: what arrives while one batch is written makes the next. What waits is bounded by those who
/// bring it: requests, fetches and pushes are each taken in up to a number of bytes.
#[derive(Clone)]
pub(crate) struct BodyWriter {
    jobs: Sender<Job>,
}

impl BodyWriter {
    /// A write that fails ends the node. What is written is damaged no more.
    pub(crate) fn start(
        store: Arc<dyn BodyStore>,
        damaged: Arc<Damaged>,
        driver: Handle,
    ) -> Result<(Self, JoinHandle<()>), std::io::Error> {
        let (jobs, queue) = channel();
        let thread = std::thread::Builder::new()
            .name("store-bodies".into())
            .spawn(move || write_all(&*store, &damaged, &queue, &driver))?;
        Ok((Self { jobs }, thread))
    }

    /// Stores bodies with the promise of [`BodyStore::put`].
    pub(crate) async fn put(&self, bodies: Vec<(ChunkName, Bytes)>) -> Result<(), DbError> {
        let (answer, result) = oneshot::channel();
        let gone = || DbError::Failed("the node is stopping".into());
        self.jobs.send(Job { bodies, answer }).map_err(|_| gone())?;
        result.await.unwrap_or_else(|_| Err(gone()))
    }
}

fn write_all(store: &dyn BodyStore, damaged: &Damaged, queue: &Receiver<Job>, driver: &Handle) {
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
        if result.is_ok() {
            damaged.healed(bodies.iter().map(|(name, _)| name));
        }
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

/// Which of these need not be brought: they are stored, and not known to be damaged.
pub(crate) fn sound(
    store: &dyn BodyStore,
    damaged: &Damaged,
    names: &[ChunkName],
) -> Result<Vec<bool>, DbError> {
    let stored = store.has(names)?;
    let all = stored.into_iter().zip(names);
    Ok(all
        .map(|(is, name)| is && !damaged.contains(name))
        .collect())
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

    fn healed<'a>(&self, written: impl Iterator<Item = &'a ChunkName>) {
        self.with(|names| {
            if !names.is_empty() {
                for name in written {
                    names.remove(name);
                }
            }
        });
    }
}
