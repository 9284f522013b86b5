//! A node's disk: what was written, and what of it survives.
//!
//! Batches are kept in order until a sync; a crash keeps those that were synced and a random number of the first others. A batch that was being
//! written when the node died is there wholly or not at all. Bodies become durable with the next sync; of what was stored or
//! deleted since the last one a crash keeps or loses each by itself. A body may rot: it still counts as here until somebody reads it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use raft::eraftpb::{ConfState, Entry, HardState};
use tidepool_proto::ChunkName;
use tidepool_store_core::{KvRead, ReadError, Write, keys};
use tidepool_store_raft::{Disk, DiskError, DiskOp, LoadedLog, StagedRow};

use crate::check::Checker;
use crate::rng::{Rng, hash};

/// One group on a disk.
#[derive(Clone, Default)]
pub(crate) struct Stored {
    pub(crate) hard: HardState,
    pub(crate) conf: Option<ConfState>,
    pub(crate) cut: (u64, u64),
    pub(crate) applied: u64,
    pub(crate) entries: BTreeMap<u64, Entry>,
    pub(crate) state: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The sum of the hashes of all rows of the state.
    pub(crate) hash: u64,
    stage: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// The fingerprint of one row.
pub(crate) fn row_hash(key: &[u8], value: &[u8]) -> u64 {
    hash(hash(1, key), value)
}

impl KvRead for Stored {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        Ok(self.state.get(key).cloned())
    }
}

impl Stored {
    /// Makes a change of the state.
    pub(crate) fn change(&mut self, write: &Write) {
        match write {
            Write::Put { key, value } => {
                self.hash = self.hash.wrapping_add(row_hash(key, value));
                if let Some(old) = self.state.insert(key.clone(), value.clone()) {
                    self.hash = self.hash.wrapping_sub(row_hash(key, &old));
                }
            }
            Write::Delete { key } => self.forget(key),
            Write::DeletePrefix { prefix } => {
                let keys = self.with_prefix(prefix).map(|(k, _)| k.clone());
                for key in keys.collect::<Vec<_>>() {
                    self.forget(&key);
                }
            }
        }
    }

    /// Rows whose keys open with a prefix.
    pub(crate) fn with_prefix<'a>(
        &'a self,
        prefix: &'a [u8],
    ) -> impl Iterator<Item = (&'a Vec<u8>, &'a Vec<u8>)> {
        self.state
            .range(prefix.to_vec()..)
            .take_while(move |(k, _)| k.starts_with(prefix))
    }

    fn forget(&mut self, key: &[u8]) {
        if let Some(old) = self.state.remove(key) {
            self.hash = self.hash.wrapping_sub(row_hash(key, &old));
        }
    }

    fn last_index(&self) -> u64 {
        self.entries.keys().next_back().map_or(self.cut.0, |i| *i)
    }
}

type Groups = BTreeMap<u32, Stored>;

/// What a crash keeps in order.
enum Written {
    Batch(Vec<DiskOp>),
    /// Bodies deleted.
    Deleted(Vec<ChunkName>),
}

fn perform(groups: &mut Groups, op: &DiskOp) {
    match op {
        DiskOp::Entry { group, entry } => {
            let entries = &mut groups.entry(*group).or_default().entries;
            entries.insert(entry.index, entry.clone());
        }
        DiskOp::DropEntries { group, from, to } => {
            let g = groups.entry(*group).or_default();
            g.entries.retain(|i, _| i < from || i >= to);
        }
        DiskOp::Hard { group, hard } => groups.entry(*group).or_default().hard = hard.clone(),
        DiskOp::Conf { group, conf } => {
            groups.entry(*group).or_default().conf = Some(conf.clone());
        }
        DiskOp::Cut { group, index, term } => {
            groups.entry(*group).or_default().cut = (*index, *term);
        }
        DiskOp::Applied { group, index } => groups.entry(*group).or_default().applied = *index,
        DiskOp::State { group, write } => groups.entry(*group).or_default().change(write),
        DiskOp::ClearStage { group } => groups.entry(*group).or_default().stage.clear(),
        DiskOp::Stage { group, key, value } => {
            let stage = &mut groups.entry(*group).or_default().stage;
            stage.insert(key.clone(), value.clone());
        }
        DiskOp::Install { group } => {
            let g = groups.entry(*group).or_default();
            g.state = std::mem::take(&mut g.stage);
            let rows = g.state.iter().map(|(k, v)| row_hash(k, v));
            g.hash = rows.fold(0, u64::wrapping_add);
        }
        DiskOp::Destroy { group } => {
            if let Some(old) = groups.remove(group) {
                groups.entry(*group).or_default().hard = old.hard;
            }
        }
    }
}

/// A stored body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Body {
    Whole,
    /// Its checksum does not fit any more.
    Rotten,
}

/// What survives, in numbers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DiskStats {
    pub(crate) batches_lost: u64,
    pub(crate) bodies_lost: u64,
}

/// The disk of one node.
pub(crate) struct SimDisk {
    node: u64,
    checker: Rc<RefCell<Checker>>,
    rng: Rng,
    now: Groups,
    durable: Groups,
    unsynced: Vec<Written>,
    /// The batch that was being written when the disk failed, and whether it was to be synced.
    in_flight: Option<(Vec<DiskOp>, bool)>,
    bodies: BTreeMap<ChunkName, Body>,
    durable_bodies: BTreeMap<ChunkName, Body>,
    /// Bodies stored since the last sync and not deleted since.
    dirty: BTreeSet<ChunkName>,
    /// Bodies that were read and found rotten.
    pub(crate) damaged: BTreeSet<ChunkName>,
    /// Names that a put here is about to name.
    held: BTreeMap<ChunkName, u32>,
    pub(crate) full: bool,
    /// The disk fails at the write after so many.
    pub(crate) fail_in: Option<u32>,
    /// Microseconds of a sync.
    pub(crate) sync_us: u64,
    /// Time that writes took since this was last reset.
    pub(crate) spent_us: u64,
    /// Groups whose chunk rows or bodies changed since this was last taken.
    pub(crate) touched: BTreeSet<u32>,
    pub(crate) stats: DiskStats,
}

impl SimDisk {
    pub(crate) fn new(node: u64, checker: Rc<RefCell<Checker>>, rng: Rng) -> Self {
        Self {
            node,
            checker,
            rng,
            now: Groups::new(),
            durable: Groups::new(),
            unsynced: Vec::new(),
            in_flight: None,
            bodies: BTreeMap::new(),
            durable_bodies: BTreeMap::new(),
            dirty: BTreeSet::new(),
            damaged: BTreeSet::new(),
            held: BTreeMap::new(),
            full: false,
            fail_in: None,
            sync_us: 500,
            spent_us: 0,
            touched: BTreeSet::new(),
            stats: DiskStats::default(),
        }
    }

    /// A group as it is now.
    pub(crate) fn group(&self, group: u32) -> Option<&Stored> {
        self.now.get(&group)
    }

    /// The groups of which something is here.
    pub(crate) fn stored(&self) -> impl Iterator<Item = (u32, &Stored)> {
        self.now.iter().map(|(n, g)| (*n, g))
    }

    /// A body, as one who reads it finds it.
    pub(crate) fn read_body(&mut self, name: &ChunkName) -> Option<Body> {
        let body = self.bodies.get(name).copied();
        if body == Some(Body::Rotten) {
            self.damaged.insert(*name);
        }
        body
    }

    /// A body, as nobody but the simulation can see it.
    pub(crate) fn body(&self, name: &ChunkName) -> Option<Body> {
        self.bodies.get(name).copied()
    }

    /// The bodies here.
    pub(crate) fn body_names(&self) -> impl Iterator<Item = &ChunkName> {
        self.bodies.keys()
    }

    /// Stores a body; the next sync makes it durable.
    pub(crate) fn put_body(&mut self, name: ChunkName) -> Result<(), DiskError> {
        if self.full {
            return Err(DiskError::Full("no room for a body".into()));
        }
        if self.bodies.get(&name) == Some(&Body::Whole) && !self.dirty.contains(&name) {
            return Ok(());
        }
        self.bodies.insert(name, Body::Whole);
        self.damaged.remove(&name);
        self.dirty.insert(name);
        Ok(())
    }

    /// Lets a body rot.
    pub(crate) fn rot(&mut self, name: &ChunkName) {
        for bodies in [&mut self.bodies, &mut self.durable_bodies] {
            if let Some(body) = bodies.get_mut(name) {
                *body = Body::Rotten;
            }
        }
    }

    pub(crate) fn hold(&mut self, names: &[ChunkName]) {
        for name in names {
            *self.held.entry(*name).or_default() += 1;
        }
    }

    pub(crate) fn release(&mut self, names: &[ChunkName]) {
        for name in names {
            if let Some(n) = self.held.get_mut(name) {
                *n -= 1;
                if *n == 0 {
                    self.held.remove(name);
                }
            }
        }
    }

    fn flush(&mut self) {
        for written in std::mem::take(&mut self.unsynced) {
            self.keep(written);
        }
        for name in std::mem::take(&mut self.dirty) {
            self.keep_body(name);
        }
    }

    /// Makes durable what was written.
    fn keep(&mut self, written: Written) {
        match written {
            Written::Batch(ops) => ops.iter().for_each(|op| perform(&mut self.durable, op)),
            Written::Deleted(names) => names.iter().for_each(|n| {
                self.durable_bodies.remove(n);
            }),
        }
    }

    /// Makes a stored body durable.
    fn keep_body(&mut self, name: ChunkName) {
        if let Some(body) = self.bodies.get(&name) {
            self.durable_bodies.insert(name, *body);
        }
    }

    /// The process or the machine died.
    pub(crate) fn crash(mut self) -> Self {
        let mut written = std::mem::take(&mut self.unsynced);
        let mut synced_at = None;
        if let Some((batch, sync)) = self.in_flight.take() {
            written.push(Written::Batch(batch));
            synced_at = sync.then_some(written.len());
        }
        let kept = self.rng.below(written.len() as u64 + 1) as usize;
        self.stats.batches_lost += (written.len() - kept) as u64;
        // A batch with a sync is written behind the bodies.
        let with_bodies = synced_at.is_some_and(|at| at <= kept);
        for written in written.into_iter().take(kept) {
            self.keep(written);
        }
        for name in std::mem::take(&mut self.dirty) {
            match with_bodies || self.rng.chance(50) {
                true => self.keep_body(name),
                false => self.stats.bodies_lost += 1,
            }
        }
        self.now = self.durable.clone();
        self.bodies = self.durable_bodies.clone();
        self.damaged
            .retain(|n| self.bodies.get(n) == Some(&Body::Rotten));
        self.held.clear();
        self.fail_in = None;
        self.touched = self.now.keys().copied().collect();
        self
    }

    /// What raft's own rules say of every log, whoever wrote it.
    fn check_log(&self, group: u32, batch: &[DiskOp]) {
        let Some(g) = self.now.get(&group) else {
            return;
        };
        let written = batch.iter().filter_map(|op| match op {
            DiskOp::Entry { group: of, entry } if *of == group => Some(entry),
            _ => None,
        });
        for entry in written {
            let next = g.entries.get(&(entry.index + 1));
            if let Some(next) = next.filter(|n| n.term < entry.term) {
                let node = self.node;
                self.checker.borrow_mut().fail(format!(
                    "the log of group {group} on node {node} has entry {} of term {} before one of term {}",
                    entry.index, entry.term, next.term
                ));
            }
        }
        if g.entries.len() as u64 != g.last_index().saturating_sub(g.cut.0)
            && g.cut.0 > 0
            && g.conf.is_some()
        {
            let node = self.node;
            self.checker.borrow_mut().fail(format!(
                "the log of group {group} on node {node} has a gap: {} entries behind {} up to {}",
                g.entries.len(),
                g.cut.0,
                g.last_index()
            ));
        }
    }
}

fn group_of(op: &DiskOp) -> u32 {
    match op {
        DiskOp::Entry { group, .. }
        | DiskOp::DropEntries { group, .. }
        | DiskOp::Hard { group, .. }
        | DiskOp::Conf { group, .. }
        | DiskOp::Cut { group, .. }
        | DiskOp::Applied { group, .. }
        | DiskOp::State { group, .. }
        | DiskOp::ClearStage { group }
        | DiskOp::Stage { group, .. }
        | DiskOp::Install { group }
        | DiskOp::Destroy { group } => *group,
    }
}

impl Disk for SimDisk {
    fn write(&mut self, batch: &[DiskOp], sync: bool) -> Result<(), DiskError> {
        if self.full {
            return Err(DiskError::Full("no room".into()));
        }
        if let Some(left) = &mut self.fail_in {
            if *left == 0 {
                self.in_flight = Some((batch.to_vec(), sync));
                return Err(DiskError::Failed("the disk failed".into()));
            }
            *left -= 1;
        }
        self.spent_us += if sync { self.sync_us } else { 20 };
        let mut before = BTreeMap::new();
        let mut installed = BTreeSet::new();
        for op in batch {
            match op {
                DiskOp::Applied { group, .. } => {
                    let applied = self.now.get(group).map_or(0, |g| g.applied);
                    before.entry(*group).or_insert(applied);
                }
                DiskOp::Install { group } => {
                    installed.insert(*group);
                }
                _ => {}
            }
            if matches!(op, DiskOp::State { .. } | DiskOp::Install { .. }) {
                self.touched.insert(group_of(op));
            }
            perform(&mut self.now, op);
        }
        self.unsynced.push(Written::Batch(batch.to_vec()));
        // The system writes back now and then by itself.
        if sync || self.rng.chance(2) {
            self.flush();
        }
        let logs: BTreeSet<u32> = batch
            .iter()
            .filter(|op| matches!(op, DiskOp::Entry { .. } | DiskOp::DropEntries { .. }))
            .map(group_of)
            .collect();
        for group in logs {
            self.check_log(group, batch);
        }
        for (group, applied) in before {
            if let Some(stored) = self.now.get(&group) {
                let mut checker = self.checker.borrow_mut();
                let from = (!installed.contains(&group)).then_some(applied);
                checker.applied(self.node, group, from, stored);
            }
        }
        Ok(())
    }

    fn groups(&self) -> Result<Vec<u32>, DiskError> {
        let here = self.now.iter().filter(|(_, g)| g.conf.is_some());
        Ok(here.map(|(n, _)| *n).collect())
    }

    fn load(&self, group: u32) -> Result<LoadedLog, DiskError> {
        let g = self.now.get(&group).cloned().unwrap_or_default();
        Ok(LoadedLog {
            hard: g.hard,
            conf: g.conf.unwrap_or_default(),
            cut: g.cut,
            entries: g.entries.into_values().collect(),
            applied: g.applied,
        })
    }

    fn get(&self, group: u32, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(self.now.get(&group).and_then(|g| g.state.get(key).cloned()))
    }

    fn staged(
        &self,
        group: u32,
        prefix: &[u8],
        after: &[u8],
        limit: usize,
    ) -> Result<Vec<StagedRow>, DiskError> {
        let Some(g) = self.now.get(&group) else {
            return Ok(Vec::new());
        };
        let rows = g
            .stage
            .iter()
            .filter(|(k, _)| k.starts_with(prefix) && k.as_slice() > after);
        let rows = rows.take(limit).map(|(k, v)| (k.clone(), v.clone()));
        Ok(rows.collect())
    }

    fn has_body(&self, name: &ChunkName) -> Result<bool, DiskError> {
        Ok(self.bodies.contains_key(name) && !self.damaged.contains(name))
    }

    fn delete_bodies(&mut self, group: u32, names: &[ChunkName]) -> Result<(), DiskError> {
        let mut gone = Vec::new();
        for name in names {
            if self.get(group, &keys::chunk(name))?.is_none()
                && !self.held.contains_key(name)
                && self.bodies.remove(name).is_some()
            {
                gone.push(*name);
                self.dirty.remove(name);
                self.damaged.remove(name);
                self.touched.insert(group);
            }
        }
        if !gone.is_empty() {
            self.unsynced.push(Written::Deleted(gone));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tidepool_store_core::ShardMap;

    use super::*;
    use crate::content::Content;

    const NAME: ChunkName = ChunkName([7; 32]);

    fn disk(seed: u64) -> SimDisk {
        let content = Rc::new(Content::new(&mut Rng::new(1, 1), 1, 1));
        let shards = ShardMap::new(1).unwrap();
        let checker = Checker::new(content, shards, Stored::default(), 0);
        SimDisk::new(1, Rc::new(RefCell::new(checker)), Rng::new(seed, 2))
    }

    fn row(change: impl FnOnce(Vec<u8>) -> Write) -> [DiskOp; 1] {
        let write = change(keys::chunk(&NAME));
        [DiskOp::State { group: 1, write }]
    }

    /// What a crash keeps of a row, a body, and their sweep: in that order.
    #[test]
    fn no_crash_keeps_a_deletion_and_not_the_sweep_before_it() {
        let mut met = BTreeSet::new();
        for seed in 0..200 {
            let mut disk = disk(seed);
            disk.put_body(NAME).unwrap();
            let value = vec![1];
            let put = row(|key| Write::Put { key, value });
            disk.write(&put, true).unwrap();
            disk.write(&row(|key| Write::Delete { key }), false)
                .unwrap();
            disk.delete_bodies(1, &[NAME]).unwrap();
            assert_eq!(disk.body(&NAME), None);
            let disk = disk.crash();
            let has_row = disk.get(1, &keys::chunk(&NAME)).unwrap().is_some();
            met.insert((has_row, disk.has_body(&NAME).unwrap()));
        }
        // Both, the body only, neither; never the row only.
        let all = [(true, true), (false, true), (false, false)];
        assert_eq!(met, all.into());
    }

    #[test]
    fn what_was_synced_survives_a_crash_and_a_body_stored_again_is_there() {
        for seed in 0..50 {
            let mut disk = disk(seed);
            disk.put_body(NAME).unwrap();
            disk.delete_bodies(1, &[NAME]).unwrap();
            disk.put_body(NAME).unwrap();
            disk.write(&[], true).unwrap();
            let disk = disk.crash();
            assert_eq!(disk.body(&NAME), Some(Body::Whole));
        }
    }
}
