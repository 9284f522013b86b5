//! Chunk bodies in append-only segment files, with their index in the database.
//!
//! A batch of bodies is one write at the end of the newest segment, one sync of it, and then one unsynced write of the index: the
//! segment is the truth, and what the index misses after a crash is read again from the tails of the segments. A body costs its own
//! bytes and some 120 more on the disk, whatever its size, and one read gives it back.
//!
//! Invariants:
//! - the index leads to a record only after the record is durable;
//! - a segment's row tells how far its records have been in the index (`indexed`), in the batch that put them there. The database's log
//!   keeps the order of writes, so an entry of a raft log that names a body is never durable without the index entry before it: records up to
//!   `indexed` were promised, and damage there is an error that names the chunk; what follows was not, so there a torn record is cut off;
//! - an index entry is durably gone before its record's bytes are punched out or its file is removed, and a file is durably gone before its row;
//! - a failed sync or an unclear write ends it: nothing is written any more, and the node stops.
//!
//! Elsewhere: the layout ([`format`]), what a start finds ([`recover`]), how deleted space comes back ([`reclaim`]).

mod files;
mod format;
mod index;
mod reclaim;
mod recover;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::IoSlice;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tidepool_proto::ChunkName;
use tidepool_proto::body::MAX_BODY_LEN;

use crate::bodies::{BodyStore, Page};
use crate::db::{Db, DbError};
use crate::error::StoreError;
use files::Files;
use format::{Head, RECORD_HEADER, Row, SEGMENT_HEADER};
use index::IndexBatch;
use reclaim::Reclaimer;

pub use format::Place;

/// A batch of bodies this small on average is copied together: that costs less than handing the kernel many small pieces.
const COPY_BELOW: usize = 2 << 10;
/// How often a read looks again when the body moved under it.
const MOVES: usize = 4;

/// How segments are kept.
#[derive(Clone)]
pub struct SegmentOptions {
    /// A segment that has this many bytes takes no more. At most 1 GiB.
    pub segment_bytes: u64,
    /// Files open at a time.
    pub max_open: usize,
    /// What is written again a second to give back the space of sparse segments, in bytes.
    pub rewrite_bytes_per_s: u64,
    /// Called at the points named in [`Segments`]' code between two steps that a crash may separate; false stops there for good, as a crash would.
    pub at: Option<Arc<dyn Fn(&'static str) -> bool + Send + Sync>>,
}

impl Default for SegmentOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 256 << 20,
            max_open: 256,
            rewrite_bytes_per_s: 64 << 20,
            at: None,
        }
    }
}

/// Bodies in segment files. Writes from several threads take turns.
pub struct Segments {
    inner: Arc<Inner>,
    reclaimer: Reclaimer,
}

struct Inner {
    db: Db,
    files: Files,
    options: SegmentOptions,
    /// Held while a batch is written, until it is in the index. Taken before `rows`.
    tail: Mutex<Option<Tail>>,
    /// Held while the index changes.
    rows: Mutex<BTreeMap<u32, Row>>,
    /// Names that have a row of quarantine.
    quarantined: Mutex<HashSet<ChunkName>>,
    failed: OnceLock<DbError>,
}

/// The segment that is written to.
struct Tail {
    segment: u32,
    file: Arc<File>,
    len: u64,
    /// The segment before, until its row says that it ended.
    ended: Option<u32>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Segments {
    /// Opens the bodies in `dir`, whose index is in `db`. Cuts torn tails and indexes what a crash left out of the index.
    pub fn open(db: Db, dir: &Path, options: SegmentOptions) -> Result<Self, StoreError> {
        let files = Files::new(dir, options.max_open).map_err(|e| StoreError::io(dir, e))?;
        let options = SegmentOptions {
            segment_bytes: options.segment_bytes.min(1 << 30),
            ..options
        };
        let inner = Arc::new(Inner {
            db,
            files,
            options,
            tail: Mutex::new(None),
            rows: Mutex::default(),
            quarantined: Mutex::default(),
            failed: OnceLock::new(),
        });
        recover::recover(&inner)?;
        let reclaimer = Reclaimer::start(inner.clone()).map_err(|e| StoreError::io("thread", e))?;
        Ok(Self { inner, reclaimer })
    }

    /// What the segments take on the disk, and what of that are stored bodies, in bytes.
    pub fn usage(&self) -> (u64, u64) {
        let rows = lock(&self.inner.rows).clone();
        let taken = |segment: &u32| self.inner.files.allocated(*segment).unwrap_or(0);
        let live = rows.values().map(|row| row.live).sum();
        (rows.keys().map(taken).sum(), live)
    }

    /// Waits until what was deleted so far has given its space back.
    pub fn reclaim_now(&self) -> Result<(), DbError> {
        self.reclaimer.drain();
        self.inner.alive()
    }
}

impl BodyStore for Segments {
    fn put(&self, bodies: &[(ChunkName, Bytes)]) -> Result<(), DbError> {
        self.inner.put(bodies)
    }

    fn get(&self, name: &ChunkName) -> Result<Option<Bytes>, DbError> {
        self.inner.get(name, Verify::All)
    }

    fn get_unverified(&self, name: &ChunkName) -> Result<Option<Bytes>, DbError> {
        self.inner.get(name, Verify::Record)
    }

    fn has(&self, names: &[ChunkName]) -> Result<Vec<bool>, DbError> {
        let places = index::places(&self.inner.db, names)?;
        places.into_iter().map(|p| Ok(p?.is_some())).collect()
    }

    fn delete(&self, names: &[ChunkName]) -> Result<(), DbError> {
        let freed = self.inner.delete(names)?;
        self.reclaimer.freed(freed);
        Ok(())
    }

    fn place(&self, name: &ChunkName) -> Result<Option<Place>, DbError> {
        match index::place(&self.inner.db, name) {
            Err(DbError::Corruption(_)) => Ok(None),
            other => other,
        }
    }

    fn page(&self, after: Option<&ChunkName>, max: usize) -> Result<Page, DbError> {
        index::page(&self.inner.db, after, max)
    }

    fn quarantine(&self, name: &ChunkName, why: &str) -> Result<(), DbError> {
        let _rows = lock(&self.inner.rows);
        let mut batch = IndexBatch::new(&self.inner.db);
        batch.quarantine(name, why)?;
        batch.write(true)?;
        lock(&self.inner.quarantined).insert(*name);
        Ok(())
    }

    fn quarantined(&self, max: usize) -> Result<Vec<(ChunkName, String)>, DbError> {
        index::quarantined(&self.inner.db, max)
    }
}

/// What an append is for.
enum Put<'a> {
    /// New bodies: the index leads to them afterwards.
    New,
    /// Bodies that were at these places: the index leads to them only if it led there until now.
    Moved(&'a [Place]),
}

/// What a read makes sure of.
#[derive(Clone, Copy)]
enum Verify {
    /// Every byte.
    All,
    /// That it is the record which was written there under this name, and ends as it did. A bit may have turned in its body.
    Record,
}

impl Inner {
    fn alive(&self) -> Result<(), DbError> {
        match self.failed.get() {
            Some(why) => Err(why.clone()),
            None => Ok(()),
        }
    }

    fn fail(&self, why: DbError) -> DbError {
        let _ = self.failed.set(why.clone());
        why
    }

    /// A point at which a test may stop everything.
    fn at(&self, point: &'static str) -> Result<(), DbError> {
        match &self.options.at {
            Some(at) if !at(point) => Err(self.fail(DbError::Failed(format!("stopped {point}")))),
            _ => Ok(()),
        }
    }

    fn put(&self, bodies: &[(ChunkName, Bytes)]) -> Result<(), DbError> {
        // Two uploads may bring the same chunk at once.
        let mut seen = HashSet::with_capacity(bodies.len());
        let bodies: Vec<(ChunkName, &[u8])> = bodies
            .iter()
            .filter(|(name, _)| seen.insert(*name))
            .map(|(name, body)| (*name, &**body))
            .collect();
        self.append(&bodies, &Put::New)
    }

    /// Writes records at the end, makes them durable, and puts them into the index.
    fn append(&self, bodies: &[(ChunkName, &[u8])], what: &Put<'_>) -> Result<(), DbError> {
        if bodies.is_empty() {
            return self.alive();
        }
        if let Some((name, body)) = bodies.iter().find(|(_, b)| b.len() > MAX_BODY_LEN) {
            let text = format!("the body of chunk {name} has {} bytes", body.len());
            return Err(DbError::Failed(text));
        }
        let mut tail = lock(&self.tail);
        self.alive()?;
        let full = tail
            .as_ref()
            .is_none_or(|t| t.len >= self.options.segment_bytes);
        if full {
            self.roll(&mut tail)?;
        }
        let Some(tail) = tail.as_mut() else {
            return Err(DbError::Failed("there is no segment to write to".into()));
        };
        let mut end = tail.len;
        let mut places = Vec::with_capacity(bodies.len());
        for (_, body) in bodies {
            let place = Place {
                segment: tail.segment,
                offset: end as u32,
                len: body.len() as u32,
            };
            end = place.end();
            places.push(place);
        }
        self.at("before a batch is written")?;
        if let Err(e) = write_records(&tail.file, tail.len, bodies, &places) {
            return Err(self.unwritten(tail, &e));
        }
        self.at("before a batch is synced")?;
        if let Err(e) = rustix::fs::fdatasync(&*tail.file) {
            // Pages may have been dropped that count as written from now on.
            let text = format!("syncing segment {}: {e}", tail.segment);
            return Err(self.fail(DbError::Failed(text)));
        }
        self.at("before a batch is indexed")?;
        let names: Vec<ChunkName> = bodies.iter().map(|(name, _)| *name).collect();
        match self.index(&names, &places, what, tail.ended) {
            Ok(()) => {
                tail.len = end;
                tail.ended = None;
                Ok(())
            }
            Err(DbError::Full(why)) => {
                // Not in the index, so not there: the room goes back.
                self.cut(tail)?;
                Err(DbError::Full(why))
            }
            Err(e) => Err(self.fail(e)),
        }
    }

    /// Begins the next segment.
    fn roll(&self, tail: &mut Option<Tail>) -> Result<(), DbError> {
        let last = lock(&self.rows).keys().next_back().copied();
        let last = last.max(tail.as_ref().map(|t| t.segment));
        let segment = last.unwrap_or(0) + 1;
        let file = self.files.create(segment).map_err(|e| {
            let text = format!("making segment {segment}: {e}");
            if e.raw_os_error() == Some(rustix::io::Errno::NOSPC.raw_os_error()) {
                DbError::Full(text)
            } else {
                self.fail(DbError::Failed(text))
            }
        })?;
        let ended = tail.as_ref().map(|t| t.segment);
        *tail = Some(Tail {
            segment,
            file,
            len: SEGMENT_HEADER as u64,
            ended,
        });
        Ok(())
    }

    /// What a write that failed means: no room, or the end.
    fn unwritten(&self, tail: &Tail, e: &std::io::Error) -> DbError {
        let text = format!("writing segment {}: {e}", tail.segment);
        if e.raw_os_error() != Some(rustix::io::Errno::NOSPC.raw_os_error()) {
            return self.fail(DbError::Failed(text));
        }
        match self.cut(tail) {
            Ok(()) => DbError::Full(text),
            Err(e) => e,
        }
    }

    /// Takes back what stands behind the last batch.
    fn cut(&self, tail: &Tail) -> Result<(), DbError> {
        tail.file.set_len(tail.len).map_err(|e| {
            let text = format!("cutting segment {}: {e}", tail.segment);
            self.fail(DbError::Failed(text))
        })
    }

    /// Makes the index lead to durable records. `sealed` is a segment that ended with them.
    fn index(
        &self,
        names: &[ChunkName],
        places: &[Place],
        what: &Put<'_>,
        sealed: Option<u32>,
    ) -> Result<(), DbError> {
        let mut rows = lock(&self.rows);
        let mut changed: HashMap<u32, Row> = HashMap::new();
        let row = |changed: &mut HashMap<u32, Row>, segment: u32, f: &dyn Fn(&mut Row)| {
            let old = rows.get(&segment).copied().unwrap_or(Row::NEW);
            f(changed.entry(segment).or_insert(old));
        };
        let mut batch = IndexBatch::new(&self.db);
        if let Some(segment) = sealed {
            row(&mut changed, segment, &|r| r.sealed = true);
        }
        let olds = index::places(&self.db, names)?;
        for (i, ((name, place), old)) in names.iter().zip(places).zip(olds).enumerate() {
            row(&mut changed, place.segment, &|r| {
                r.indexed = r.indexed.max(place.end());
            });
            let old = match old {
                Ok(old) => old,
                // It is replaced now. Its segment counts too much as stored until it is rewritten.
                Err(DbError::Corruption(why)) => {
                    tracing::error!(%why, "a damaged index entry is replaced");
                    None
                }
                Err(e) => return Err(e),
            };
            if let Put::Moved(from) = what
                && old != Some(from[i])
            {
                continue;
            }
            if let Some(old) = old {
                row(&mut changed, old.segment, &|r| {
                    r.live = r.live.saturating_sub(old.bytes());
                });
            }
            row(&mut changed, place.segment, &|r| r.live += place.bytes());
            batch.put(name, *place)?;
            if matches!(what, Put::New) && lock(&self.quarantined).remove(name) {
                batch.release(name)?;
            }
        }
        for (segment, row) in &changed {
            batch.put_row(*segment, row)?;
        }
        batch.write(false)?;
        rows.extend(changed);
        Ok(())
    }

    fn get(&self, name: &ChunkName, verify: Verify) -> Result<Option<Bytes>, DbError> {
        let mut before = None;
        for _ in 0..MOVES {
            let Some(place) = index::place(&self.db, name)? else {
                return Ok(None);
            };
            match self.read(name, place, verify) {
                Ok(body) => return Ok(Some(body)),
                // Moved or deleted under the read, unless the index still says the same.
                Err(why) if before == Some(place) => {
                    return Err(DbError::Corruption(format!(
                        "chunk {name} is damaged (segment {}, offset {}): {why}",
                        place.segment, place.offset
                    )));
                }
                Err(_) => before = Some(place),
            }
        }
        Err(DbError::Failed(format!("chunk {name} moves all the time")))
    }

    /// The body of the record at a place.
    fn read(&self, name: &ChunkName, place: Place, verify: Verify) -> Result<Bytes, String> {
        let file = self.files.get(place.segment).map_err(|e| e.to_string())?;
        let (at, len) = (u64::from(place.offset), RECORD_HEADER + place.len as usize);
        let record = files::read(&file, at, len).map_err(|e| e.to_string())?;
        let record = Bytes::from(record.ok_or("the segment ends before it")?);
        let body = record.slice(RECORD_HEADER..);
        match Head::decode(&record[..RECORD_HEADER]) {
            Some(head) if head.name == *name && head.len == place.len => {
                match verify {
                    Verify::All => head.verify(place.segment, place.offset, &body)?,
                    Verify::Record => head.verify_record(place.segment, place.offset, &body)?,
                }
                Ok(body)
            }
            Some(_) => Err("another record is in its place".into()),
            None => Err("no record is in its place".into()),
        }
    }

    /// Takes names out of the index, durable with the next sync of the database's log. Returns the places that are free then.
    fn delete(&self, names: &[ChunkName]) -> Result<Vec<Place>, DbError> {
        self.alive()?;
        let mut rows = lock(&self.rows);
        let mut changed: HashMap<u32, Row> = HashMap::new();
        let mut batch = IndexBatch::new(&self.db);
        let mut freed = Vec::new();
        let names: BTreeSet<ChunkName> = names.iter().copied().collect();
        let names: Vec<ChunkName> = names.into_iter().collect();
        for (name, place) in names.iter().zip(index::places(&self.db, &names)?) {
            match place {
                Ok(Some(place)) => {
                    let old = rows.get(&place.segment).copied().unwrap_or(Row::NEW);
                    let row = changed.entry(place.segment).or_insert(old);
                    row.live = row.live.saturating_sub(place.bytes());
                    freed.push(place);
                }
                Ok(None) => continue,
                Err(DbError::Corruption(why)) => {
                    tracing::error!(%why, "a damaged index entry is deleted");
                }
                Err(e) => return Err(e),
            }
            batch.delete(name)?;
            if lock(&self.quarantined).remove(name) {
                batch.release(name)?;
            }
        }
        for (segment, row) in &changed {
            batch.put_row(*segment, row)?;
        }
        batch.write(false)?;
        rows.extend(changed);
        Ok(freed)
    }
}

fn write_records(
    file: &File,
    at: u64,
    bodies: &[(ChunkName, &[u8])],
    places: &[Place],
) -> std::io::Result<()> {
    let heads = bodies
        .iter()
        .zip(places)
        .map(|((name, body), place)| Head::new(place.segment, place.offset, name, body).encode());
    let bytes: usize = bodies.iter().map(|(_, b)| b.len()).sum();
    if bytes < COPY_BELOW * bodies.len() {
        let mut buffer = Vec::with_capacity(bytes + bodies.len() * RECORD_HEADER);
        for (head, (_, body)) in heads.zip(bodies) {
            buffer.extend_from_slice(&head);
            buffer.extend_from_slice(body);
        }
        return files::write_all(file, &mut [IoSlice::new(&buffer)], at);
    }
    let heads: Vec<_> = heads.collect();
    let mut slices: Vec<IoSlice<'_>> = heads
        .iter()
        .zip(bodies)
        .flat_map(|(head, (_, body))| [IoSlice::new(head), IoSlice::new(body)])
        .collect();
    files::write_all(file, &mut slices, at)
}
