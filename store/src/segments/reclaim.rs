//! How deleted space comes back, on a thread of its own.
//!
//! Names leave the index first. When that is durable, the blocks within their records are punched out, segments without a body are removed, and of
//! sparse segments (small bodies leave no whole blocks) the bodies that are left are written again at a set pace and the file is removed.
//! What a crash forgets of this only costs space until the next look: a start looks at every segment.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tidepool_proto::ChunkName;

use super::format::{Head, Place, RECORD_HEADER, SEGMENT_HEADER};
use super::index::{self, IndexBatch};
use super::{Inner, Put, Verify, files, lock};
use crate::db::DbError;

/// Bodies written again at once, in bytes.
const MOVE: usize = 4 << 20;
/// Deletes that come close together are waited for, so that they share a sync.
const GATHER: Duration = Duration::from_millis(50);
/// A segment that could not be written again (no room, a damaged body) is tried again after this.
const RETRY: Duration = Duration::from_secs(60);

enum Order {
    Freed(Vec<Place>),
    /// Answered when all before it is done.
    Drain(Sender<()>),
    Stop,
}

/// The way to the thread, which ends with this.
pub(super) struct Reclaimer {
    orders: Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

impl Reclaimer {
    pub(super) fn start(inner: Arc<Inner>) -> std::io::Result<Self> {
        let (orders, queue) = channel();
        let thread = std::thread::Builder::new()
            .name("store-reclaim".into())
            .spawn(move || {
                let mut work = Work {
                    inner: &inner,
                    queue: &queue,
                    look: lock(&inner.rows).keys().copied().collect(),
                    waiting: Vec::new(),
                    again: Instant::now() + RETRY,
                    later: BTreeSet::new(),
                    stopping: false,
                };
                if let Err(e) = work.run() {
                    tracing::error!(error = %e, "deleted space could not be given back");
                    // The next put fails with it, and so the node.
                    inner.fail(e);
                }
            })?;
        Ok(Self {
            orders,
            thread: Some(thread),
        })
    }

    pub(super) fn freed(&self, places: Vec<Place>) {
        if !places.is_empty() {
            let _ = self.orders.send(Order::Freed(places));
        }
    }

    pub(super) fn drain(&self) {
        let (done, wait) = channel();
        let _ = self.orders.send(Order::Drain(done));
        let _ = wait.recv();
    }
}

impl Drop for Reclaimer {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Work<'a> {
    inner: &'a Inner,
    queue: &'a Receiver<Order>,
    /// Segments in which something changed.
    look: BTreeSet<u32>,
    waiting: Vec<Sender<()>>,
    /// When those that could not be done are looked at again.
    again: Instant,
    later: BTreeSet<u32>,
    stopping: bool,
}

impl Work<'_> {
    fn run(&mut self) -> Result<(), DbError> {
        loop {
            let mut freed = Vec::new();
            let wait = if self.look.is_empty() && self.waiting.is_empty() {
                RETRY
            } else {
                Duration::ZERO
            };
            match self.queue.recv_timeout(wait) {
                Ok(order) => self.take(order, &mut freed),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            let end = Instant::now() + GATHER;
            while !freed.is_empty() && !self.stopping && self.waiting.is_empty() {
                let left = end.saturating_duration_since(Instant::now());
                match self.queue.recv_timeout(left) {
                    Ok(order) => self.take(order, &mut freed),
                    Err(_) => break,
                }
            }
            if self.stopping {
                return Ok(());
            }
            if !freed.is_empty() {
                self.punch(freed)?;
            }
            if Instant::now() >= self.again {
                self.look.append(&mut self.later);
                self.again = Instant::now() + RETRY;
            }
            if let Some(segment) = self.look.pop_first() {
                self.one(segment)?;
            }
            if self.look.is_empty() {
                for done in self.waiting.drain(..) {
                    let _ = done.send(());
                }
            }
        }
    }

    fn take(&mut self, order: Order, freed: &mut Vec<Place>) {
        match order {
            Order::Freed(mut places) => freed.append(&mut places),
            Order::Drain(done) => {
                self.look.append(&mut self.later);
                self.waiting.push(done);
            }
            Order::Stop => self.stopping = true,
        }
    }

    /// Gives back the blocks within records that nothing leads to any more.
    fn punch(&mut self, mut freed: Vec<Place>) -> Result<(), DbError> {
        self.inner.at("before deletes are synced")?;
        self.inner.db.sync_log()?;
        self.inner.at("before holes are punched")?;
        freed.sort_unstable();
        for place in &freed {
            let from = u64::from(place.offset) + RECORD_HEADER as u64;
            // Where the file is gone already there is nothing left to give back.
            if let Err(e) = self.inner.files.punch(place.segment, from, place.end())
                && e.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(segment = place.segment, error = %e, "a hole could not be punched");
            }
            self.look.insert(place.segment);
        }
        Ok(())
    }

    /// Removes a segment that holds nothing, or writes its bodies again where it is sparse.
    fn one(&mut self, segment: u32) -> Result<(), DbError> {
        let Some(row) = lock(&self.inner.rows).get(&segment).copied() else {
            return Ok(());
        };
        if !row.sealed {
            return Ok(());
        }
        if row.live == 0 {
            return self.remove(segment);
        }
        let Ok(allocated) = self.inner.files.allocated(segment) else {
            return Ok(());
        };
        // A fifth of it is waste.
        if row.live.saturating_mul(5) >= allocated.saturating_mul(4) {
            return Ok(());
        }
        match self.rewrite(segment, row.indexed) {
            Ok(true) => self.remove(segment),
            Ok(false) => {
                self.later.insert(segment);
                Ok(())
            }
            Err(DbError::Full(_)) => {
                self.later.insert(segment);
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    fn remove(&mut self, segment: u32) -> Result<(), DbError> {
        let failed = |e| DbError::Failed(format!("removing segment {segment}: {e}"));
        self.inner.at("before moves are synced")?;
        self.inner.db.sync_log()?;
        self.inner.at("before a segment is removed")?;
        self.inner.files.remove(segment).map_err(failed)?;
        self.inner.at("before a row is removed")?;
        let mut rows = lock(&self.inner.rows);
        let mut batch = IndexBatch::new(&self.inner.db);
        batch.delete_row(segment)?;
        batch.write(false)?;
        rows.remove(&segment);
        Ok(())
    }

    /// Writes the bodies of a segment again, at the end of the newest. False: not all could be moved.
    fn rewrite(&mut self, segment: u32, end: u64) -> Result<bool, DbError> {
        let inner = self.inner;
        let damaged = |why: &str| {
            tracing::error!(segment, why, "a sparse segment stays: it is damaged");
            Ok(false)
        };
        let file = match inner.files.get(segment) {
            Ok(file) => file,
            Err(e) => return damaged(&e.to_string()),
        };
        let mut at = SEGMENT_HEADER as u64;
        let mut moved: Vec<(ChunkName, Bytes)> = Vec::new();
        let mut places: Vec<Place> = Vec::new();
        let mut bytes = 0;
        while at < end {
            let head = match files::read(&file, at, RECORD_HEADER) {
                Ok(Some(head)) => head,
                Ok(None) => return damaged("it is too short"),
                Err(e) => return damaged(&e.to_string()),
            };
            let (Some(head), Ok(offset)) = (Head::decode(&head), u32::try_from(at)) else {
                return damaged("a record's header is damaged");
            };
            let place = Place {
                segment,
                offset,
                len: head.len,
            };
            at = place.end();
            if index::place(&inner.db, &head.name)? == Some(place) {
                match inner.read(&head.name, place, Verify::All) {
                    Ok(body) => {
                        bytes += body.len();
                        moved.push((head.name, body));
                        places.push(place);
                    }
                    Err(why) => {
                        let name = head.name;
                        return damaged(&format!("chunk {name}: {why}"));
                    }
                }
            }
            if bytes >= MOVE || (at >= end && !moved.is_empty()) {
                let bodies: Vec<_> = moved.iter().map(|(n, b)| (*n, &**b)).collect();
                inner.append(&bodies, &Put::Moved(&places))?;
                moved.clear();
                places.clear();
                if !self.rest(bytes) {
                    return Ok(false);
                }
                bytes = 0;
            }
        }
        let left = lock(&inner.rows).get(&segment).map_or(0, |row| row.live);
        if left > 0 {
            return damaged("the index leads to records that are not in it");
        }
        Ok(true)
    }

    /// Keeps the pace. False: it is time to stop.
    fn rest(&mut self, bytes: usize) -> bool {
        let pace = self.inner.options.rewrite_bytes_per_s.max(1);
        let end = Instant::now() + Duration::from_secs_f64(bytes as f64 / pace as f64);
        let mut freed = Vec::new();
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            match self.queue.recv_timeout(left) {
                Ok(order) => self.take(order, &mut freed),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
            if self.stopping {
                return false;
            }
        }
        if freed.is_empty() {
            return true;
        }
        self.punch(freed).is_ok()
    }
}
