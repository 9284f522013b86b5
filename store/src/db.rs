//! The database: one RocksDB with a column family for raft logs, one for the groups' states, and two for the index of bodies, which
//! are in files of their own (see [`crate::segments`]).
//!
//! One write-ahead log orders everything, so a batch written without a sync is durable no later than the next batch with one.
//!
//! Memory is bounded: one cache for all families, which also holds the indexes and filters of tables; a bounded size of unflushed
//! tables; a bounded number of open files.
//!
//! A group's state has two slots: one is what everybody reads, in the other a raft snapshot is collected; installing it flips them in one batch.
//! The second slot's keys are those of a group whose number has its highest bit set.
//!
//! Values of states carry a checksum over key and value beside RocksDB's own: a value that is damaged anywhere on its way, or stands at
//! another key, is an error and never an answer. A damaged write-ahead log stops the start; only a record cut off at its very end
//! (the write that was under way when the process or the machine died) is dropped.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor,
    DBCompressionType, DBRecoveryMode, DBWithThreadMode, Direction, IteratorMode, MultiThreaded,
    Options, ReadOptions, SnapshotWithThreadMode, WriteBatch, WriteOptions,
};

use crate::error::StoreError;

const STATE: &str = "state";
const RAFT: &str = "raft";
/// Names of bodies to their places.
pub(crate) const BODIES: &str = "bodies";
/// Rows of segments.
pub(crate) const SEGMENTS: &str = "segments";
const SUM: usize = 4;
/// Rows of the raft family that say which groups' states are in their second slots; no group has this number.
const SLOTS: &[u8] = b"\xff\xff\xff\xfeslot";
/// Of a group's number in keys of its state: the second slot.
const SECOND: u32 = 1 << 31;
/// Bytes of the cache of all families.
const CACHE: usize = 192 << 20;

/// A failed read or write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DbError {
    /// The bytes are not those that were written.
    #[error("{0}")]
    Corruption(String),
    /// No room on the disk; nothing was promised.
    #[error("the disk is full: {0}")]
    Full(String),
    /// The disk failed. What was being written may or may not be there.
    #[error("{0}")]
    Failed(String),
}

impl From<rocksdb::Error> for DbError {
    fn from(e: rocksdb::Error) -> Self {
        let text = e.to_string();
        // A sync that failed for want of room may have dropped pages that were thought written: that is a failure.
        if text.contains("No space left on device") && !text.contains("sync") {
            return DbError::Full(text);
        }
        match e.kind() {
            rocksdb::ErrorKind::Corruption => DbError::Corruption(text),
            _ => DbError::Failed(text),
        }
    }
}

/// A value met in a scan, or that it is damaged: the scan goes on if its caller wants it to.
pub type Value = Result<Vec<u8>, DbError>;

/// The node's database. Clones share it.
#[derive(Clone)]
pub struct Db {
    pub(crate) inner: Arc<DBWithThreadMode<MultiThreaded>>,
    path: Arc<PathBuf>,
    /// Groups whose states are in their second slots. Readers hold it while they begin a read, so that no flip comes between
    /// choosing the slot and seeing its rows; never while they call anything.
    second: Arc<RwLock<BTreeSet<u32>>>,
}

/// The database, whatever its threads are.
type Inner = DBWithThreadMode<MultiThreaded>;

fn table_options(cache: &Cache) -> Options {
    let mut block = BlockBasedOptions::default();
    block.set_block_cache(cache);
    // Without this the filters and indexes of a large store are outside of every bound. In partitions: those of a whole table are larger than
    // a shard of the cache, and would be read again for every key.
    block.set_cache_index_and_filter_blocks(true);
    block.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    block.set_partition_filters(true);
    block.set_pin_top_level_index_and_filter(true);
    block.set_pin_l0_filter_and_index_blocks_in_cache(true);
    block.set_bloom_filter(10.0, false);
    block.set_format_version(5);
    let mut options = Options::default();
    options.set_block_based_table_factory(&block);
    options.set_compression_type(DBCompressionType::None);
    options.set_write_buffer_size(32 << 20);
    options
}

impl Db {
    /// Opens the database in `path`, or makes it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let cache = Cache::new_lru_cache(CACHE);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_paranoid_checks(true);
        options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
        options.set_max_total_wal_size(128 << 20);
        options.set_max_background_jobs(2);
        options.set_max_open_files(512);
        options.set_db_write_buffer_size(96 << 20);
        options.set_keep_log_file_num(4);
        options.set_max_log_file_size(4 << 20);
        let families = [
            ColumnFamilyDescriptor::new("default", table_options(&cache)),
            ColumnFamilyDescriptor::new(RAFT, table_options(&cache)),
            ColumnFamilyDescriptor::new(STATE, table_options(&cache)),
            ColumnFamilyDescriptor::new(BODIES, table_options(&cache)),
            ColumnFamilyDescriptor::new(SEGMENTS, table_options(&cache)),
        ];
        let inner =
            DBWithThreadMode::open_cf_descriptors(&options, path, families).map_err(|source| {
                StoreError::Database {
                    path: path.to_owned(),
                    source,
                }
            })?;
        let db = Self {
            inner: Arc::new(inner),
            path: Arc::new(path.to_owned()),
            second: Arc::default(),
        };
        let second = db.load_slots().map_err(|e| {
            StoreError::Damaged(format!("which slots are used cannot be read: {e}"))
        })?;
        *db.second.write().unwrap_or_else(PoisonError::into_inner) = second;
        Ok(db)
    }

    fn load_slots(&self) -> Result<BTreeSet<u32>, DbError> {
        let mut second = BTreeSet::new();
        let mut bad = None;
        self.scan_raft(SLOTS, |key, value| {
            match (key[SLOTS.len()..].try_into(), value.as_deref()) {
                (Ok(group), Ok([1])) => {
                    second.insert(u32::from_be_bytes(group));
                }
                (Ok(_), Ok([0])) => {}
                _ => bad = Some(DbError::Corruption("a slot's record is damaged".into())),
            }
            bad.is_none()
        })?;
        bad.map_or(Ok(second), Err)
    }

    fn second(&self) -> RwLockReadGuard<'_, BTreeSet<u32>> {
        self.second.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn family(&self, name: &str) -> Result<Arc<BoundColumnFamily<'_>>, DbError> {
        self.inner
            .cf_handle(name)
            .ok_or_else(|| DbError::Failed(format!("the database has no column family {name}")))
    }

    /// Starts a batch.
    pub fn batch(&self) -> Result<Batch<'_>, DbError> {
        Ok(Batch {
            raft: self.family(RAFT)?,
            state: self.family(STATE)?,
            inner: WriteBatch::default(),
            second: self.second().clone(),
            flipped: false,
        })
    }

    /// Writes a batch that flips no slots, or one that does; see [`Db::write`]. Only one thread may build batches that flip.
    pub fn commit(&self, batch: Batch<'_>, sync: bool) -> Result<(), DbError> {
        if !batch.flipped {
            return self.write(batch.inner, sync);
        }
        let mut second = self.second.write().unwrap_or_else(PoisonError::into_inner);
        self.write(batch.inner, sync)?;
        *second = batch.second;
        Ok(())
    }

    /// Writes a batch; with `sync` it and all before it are durable on return.
    pub fn write(&self, batch: WriteBatch, sync: bool) -> Result<(), DbError> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        Ok(self.inner.write_opt(batch, &options)?)
    }

    /// Makes everything that was written durable.
    pub fn sync_log(&self) -> Result<(), DbError> {
        Ok(self.inner.flush_wal(true)?)
    }

    /// A value of the raft family.
    pub fn raft(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DbError> {
        let key_value = self.inner.get_cf(&self.family(RAFT)?, key)?;
        key_value.map(|v| unseal(key, v)).transpose()
    }

    /// A value of a group's state.
    pub fn state(&self, group: u32, key: &[u8]) -> Result<Option<Vec<u8>>, DbError> {
        let family = self.family(STATE)?;
        let second = self.second();
        let full = group_key(slot(group, second.contains(&group)), key);
        let value = self.inner.get_cf(&family, &full)?;
        drop(second);
        value.map(|v| unseal(&full, v)).transpose()
    }

    /// Calls `each` with keys (of the group) and values in order, from `from` on, while keys open with `prefix` and `each` says true.
    pub fn scan_state(
        &self,
        group: u32,
        prefix: &[u8],
        from: &[u8],
        mut each: impl FnMut(&[u8], Value) -> bool,
    ) -> Result<(), DbError> {
        let second = self.second();
        let at = slot(group, second.contains(&group));
        let (prefix, from) = (group_key(at, prefix), group_key(at, from));
        self.scan(STATE, &prefix, &from, Some(second), |key, value| {
            each(&key[4..], value)
        })
    }

    /// The same over the group's staging area: the slot that is not its state.
    pub fn scan_stage(
        &self,
        group: u32,
        prefix: &[u8],
        from: &[u8],
        mut each: impl FnMut(&[u8], Value) -> bool,
    ) -> Result<(), DbError> {
        let at = slot(group, !self.second().contains(&group));
        let (prefix, from) = (group_key(at, prefix), group_key(at, from));
        self.scan(STATE, &prefix, &from, None, |key, value| {
            each(&key[4..], value)
        })
    }

    /// A group's state as it is now, whatever is written later.
    pub fn snapshot(&self, group: u32) -> StateSnapshot<'_> {
        let second = self.second();
        StateSnapshot {
            db: self,
            at: slot(group, second.contains(&group)),
            inner: self.inner.snapshot(),
        }
    }

    /// The same over the raft family.
    pub fn scan_raft(
        &self,
        prefix: &[u8],
        each: impl FnMut(&[u8], Value) -> bool,
    ) -> Result<(), DbError> {
        self.scan(RAFT, prefix, prefix, None, each)
    }

    fn scan(
        &self,
        family: &str,
        prefix: &[u8],
        from: &[u8],
        begin: Option<RwLockReadGuard<'_, BTreeSet<u32>>>,
        mut each: impl FnMut(&[u8], Value) -> bool,
    ) -> Result<(), DbError> {
        let family = self.family(family)?;
        let mut options = ReadOptions::default();
        if let Some(end) = tidepool_store_core::prefix_end(prefix) {
            options.set_iterate_upper_bound(end);
        }
        let start = prefix.max(from);
        let mode = IteratorMode::From(start, Direction::Forward);
        let items = self.inner.iterator_cf_opt(&family, options, mode);
        // The iterator sees the database as it was when it was made.
        drop(begin);
        for item in items {
            let (key, value) = item?;
            if !key.starts_with(prefix) {
                break;
            }
            if !each(&key, unseal(&key, value.into_vec())) {
                break;
            }
        }
        Ok(())
    }

    /// Writes everything in memory to disk.
    pub fn flush_all(&self) -> Result<(), DbError> {
        for name in [RAFT, STATE, BODIES, SEGMENTS] {
            self.inner.flush_cf(&self.family(name)?)?;
        }
        Ok(self.inner.flush_wal(true)?)
    }
}

/// A group's state as it was at one moment.
pub struct StateSnapshot<'a> {
    db: &'a Db,
    at: u32,
    inner: SnapshotWithThreadMode<'a, Inner>,
}

impl StateSnapshot<'_> {
    /// Calls `each` with keys and values in order, behind `after`, while it says true.
    pub fn scan(
        &self,
        after: &[u8],
        mut each: impl FnMut(&[u8], Value) -> bool,
    ) -> Result<(), DbError> {
        let family = self.db.family(STATE)?;
        let (prefix, from) = (self.at.to_be_bytes(), group_key(self.at, after));
        let mut options = ReadOptions::default();
        if let Some(end) = tidepool_store_core::prefix_end(&prefix) {
            options.set_iterate_upper_bound(end);
        }
        options.fill_cache(false);
        let mode = IteratorMode::From(&from, Direction::Forward);
        for item in self.inner.iterator_cf_opt(&family, options, mode) {
            let (key, value) = item?;
            if *key == *from && !after.is_empty() {
                continue;
            }
            if !key.starts_with(&prefix) || !each(&key[4..], unseal(&key, value.into_vec())) {
                break;
            }
        }
        Ok(())
    }
}

/// Writes that become visible and durable together.
pub struct Batch<'a> {
    raft: Arc<BoundColumnFamily<'a>>,
    state: Arc<BoundColumnFamily<'a>>,
    inner: WriteBatch,
    /// Which groups' states will be in their second slots.
    second: BTreeSet<u32>,
    flipped: bool,
}

impl Batch<'_> {
    pub fn put_raft(&mut self, key: &[u8], value: &[u8]) {
        self.inner.put_cf(&self.raft, key, seal(key, value));
    }

    /// Deletes `from..to` of the raft family.
    pub fn delete_raft(&mut self, from: &[u8], to: &[u8]) {
        self.inner.delete_range_cf(&self.raft, from, to);
    }

    /// Deletes one key of the raft family.
    pub fn delete_raft_key(&mut self, key: &[u8]) {
        self.inner.delete_cf(&self.raft, key);
    }

    fn at(&self, group: u32) -> u32 {
        slot(group, self.second.contains(&group))
    }

    fn put_at(&mut self, at: u32, key: &[u8], value: &[u8]) {
        let key = group_key(at, key);
        self.inner.put_cf(&self.state, &key, seal(&key, value));
    }

    pub fn put_state(&mut self, group: u32, key: &[u8], value: &[u8]) {
        self.put_at(self.at(group), key, value);
    }

    pub fn delete_state(&mut self, group: u32, key: &[u8]) {
        self.inner
            .delete_cf(&self.state, group_key(self.at(group), key));
    }

    /// Deletes every key of the group that opens with `prefix`.
    pub fn delete_state_prefix(&mut self, group: u32, prefix: &[u8]) {
        self.delete_at(self.at(group), prefix);
    }

    /// Adds a row to the group's staging area.
    pub fn put_stage(&mut self, group: u32, key: &[u8], value: &[u8]) {
        self.put_at(self.at(group) ^ SECOND, key, value);
    }

    /// Empties the group's staging area.
    pub fn clear_stage(&mut self, group: u32) {
        self.delete_at(self.at(group) ^ SECOND, &[]);
    }

    /// What is staged becomes the group's state; what was its state goes.
    pub fn flip(&mut self, group: u32) {
        self.delete_at(self.at(group), &[]);
        if !self.second.remove(&group) {
            self.second.insert(group);
        }
        self.flipped = true;
        let mut key = SLOTS.to_vec();
        key.extend_from_slice(&group.to_be_bytes());
        let second = u8::from(self.second.contains(&group));
        self.put_raft(&key, &[second]);
    }

    fn delete_at(&mut self, at: u32, prefix: &[u8]) {
        let from = group_key(at, prefix);
        let to = tidepool_store_core::prefix_end(&from).unwrap_or_else(|| vec![0xff; 64]);
        self.inner.delete_range_cf(&self.state, from, to);
    }

    pub fn is_empty(&self) -> bool {
        self.inner.is_empty()
    }
}

fn slot(group: u32, second: bool) -> u32 {
    if second { group | SECOND } else { group }
}

fn group_key(group: u32, key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + key.len());
    out.extend_from_slice(&group.to_be_bytes());
    out.extend_from_slice(key);
    out
}

fn sum(key: &[u8], value: &[u8]) -> [u8; SUM] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update(value);
    let mut out = [0; SUM];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..SUM]);
    out
}

pub(crate) fn seal(key: &[u8], value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len() + SUM);
    out.extend_from_slice(value);
    out.extend_from_slice(&sum(key, value));
    out
}

pub(crate) fn unseal(key: &[u8], mut value: Vec<u8>) -> Result<Vec<u8>, DbError> {
    let at = value.len().checked_sub(SUM);
    match at {
        Some(at) if sum(key, &value[..at]) == value[at..] => {
            value.truncate(at);
            Ok(value)
        }
        _ => Err(DbError::Corruption(format!(
            "the record at key {} is damaged",
            hex_start(key)
        ))),
    }
}

fn hex_start(key: &[u8]) -> String {
    key.iter().take(24).map(|b| format!("{b:02x}")).collect()
}
