//! A group's log as raft-rs reads it: wholly in memory, a copy of what the driver keeps on disk.
//!
//! Entries name chunks and never hold bodies, and the log is cut soon after entries are applied, so this is small. A follower
//! that needs what was cut gets a raft snapshot.

use std::collections::VecDeque;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

/// A log, as it was read from disk.
#[derive(Debug, Clone, Default)]
pub struct LoadedLog {
    pub hard: HardState,
    pub conf: ConfState,
    /// The last index that was cut off, and its term.
    pub cut: (u64, u64),
    /// Everything after it, without a gap.
    pub entries: Vec<Entry>,
    /// The last index whose effects are in the state.
    pub applied: u64,
}

/// The log in memory.
#[derive(Debug)]
pub struct RaftLog {
    hard: HardState,
    conf: ConfState,
    cut: (u64, u64),
    entries: VecDeque<Entry>,
    bytes: usize,
    /// What a raft snapshot would hold now: applied index, its term, the members as of it.
    applied: SnapshotMetadata,
}

fn weight(e: &Entry) -> usize {
    e.data.len() + e.context.len() + 64
}

impl RaftLog {
    /// Checks that a loaded log has no gap, and takes it.
    pub fn new(loaded: LoadedLog) -> Result<Self, String> {
        let LoadedLog {
            mut hard,
            conf,
            cut,
            entries,
            applied,
        } = loaded;
        let mut next = cut.0 + 1;
        for e in &entries {
            if e.index != next {
                return Err(format!(
                    "the log has entry {} where {next} should be",
                    e.index
                ));
            }
            next += 1;
        }
        // What was applied was committed, also where the last commit index did not reach the disk.
        hard.commit = hard.commit.max(applied);
        if hard.commit >= next || applied < cut.0 {
            return Err(format!(
                "the log reaches from {} to {}, but {} are committed and {applied} applied",
                cut.0 + 1,
                next - 1,
                hard.commit
            ));
        }
        let bytes = entries.iter().map(weight).sum();
        let mut log = Self {
            hard,
            conf,
            cut,
            entries: entries.into(),
            bytes,
            applied: SnapshotMetadata::default(),
        };
        log.set_applied(applied);
        Ok(log)
    }

    /// Everything up to `index` is in the state, under the members that are set.
    pub(super) fn set_applied(&mut self, index: u64) {
        self.applied = SnapshotMetadata {
            conf_state: Some(self.conf.clone()),
            index,
            term: self.term(index).unwrap_or(0),
        };
    }

    /// Begins anew behind a raft snapshot.
    pub(super) fn restart(&mut self, meta: &SnapshotMetadata) {
        self.cut = (meta.index, meta.term);
        self.entries.clear();
        self.bytes = 0;
        self.conf = meta.conf_state.clone().unwrap_or_default();
        self.hard.commit = self.hard.commit.max(meta.index);
        self.applied = meta.clone();
    }

    /// Entries behind `index`.
    pub(super) fn after(&self, index: u64) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |e| e.index > index)
    }

    pub(super) fn append(&mut self, new: &[Entry]) {
        let Some(first) = new.first() else { return };
        // A conflicting suffix goes.
        while self.last() >= first.index && !self.entries.is_empty() {
            if let Some(old) = self.entries.pop_back() {
                self.bytes -= weight(&old);
            }
        }
        self.bytes += new.iter().map(weight).sum::<usize>();
        self.entries.extend(new.iter().cloned());
    }

    pub(super) fn set_hard(&mut self, hard: HardState) {
        self.hard = hard;
    }

    pub(super) fn set_commit(&mut self, commit: u64) {
        self.hard.commit = self.hard.commit.max(commit);
    }

    pub(super) fn set_conf(&mut self, conf: ConfState) {
        self.conf = conf;
    }

    pub(super) fn conf(&self) -> &ConfState {
        &self.conf
    }

    pub(super) fn cut(&self) -> (u64, u64) {
        self.cut
    }

    /// How many entries and bytes are kept.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.entries.len(), self.bytes)
    }

    /// Cuts off everything up to `index`, which must have been applied.
    pub(super) fn cut_to(&mut self, index: u64) {
        while let Some(first) = self.entries.front()
            && first.index <= index
        {
            self.cut = (first.index, first.term);
            self.bytes -= weight(first);
            self.entries.pop_front();
        }
    }

    fn last(&self) -> u64 {
        self.cut.0 + self.entries.len() as u64
    }
}

impl Storage for RaftLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard.clone(), self.conf.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.cut.0 {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        let (from, to) = (low - self.cut.0 - 1, high - self.cut.0 - 1);
        let max = max_size.into().unwrap_or(u64::MAX);
        let mut size = 0u64;
        let mut out = Vec::new();
        for e in self.entries.range(from as usize..to as usize) {
            size = size.saturating_add(weight(e) as u64);
            // At least one, whatever its size.
            if size > max && !out.is_empty() {
                break;
            }
            out.push(e.clone());
        }
        Ok(out)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.cut.0 {
            return Ok(self.cut.1);
        }
        if index < self.cut.0 {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        match self.entries.get((index - self.cut.0 - 1) as usize) {
            Some(e) => Ok(e.term),
            None => Err(raft::Error::Store(StorageError::Unavailable)),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.cut.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, wanted: u64, _: u64) -> raft::Result<Snapshot> {
        // It announces what is there; the member fetches the rows itself, see `crate::install`.
        if self.applied.index < wanted || self.applied.index == 0 || self.applied.term == 0 {
            return Err(raft::Error::Store(
                StorageError::SnapshotTemporarilyUnavailable,
            ));
        }
        Ok(Snapshot {
            metadata: Some(self.applied.clone()),
            ..Snapshot::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        Entry {
            index,
            term,
            data: vec![0; 10],
            ..Entry::default()
        }
    }

    fn log(n: u64) -> RaftLog {
        RaftLog::new(LoadedLog {
            entries: (1..=n).map(|i| entry(i, 1)).collect(),
            ..LoadedLog::default()
        })
        .unwrap()
    }

    #[test]
    fn a_conflicting_suffix_is_replaced() {
        let mut log = log(5);
        log.append(&[entry(3, 2), entry(4, 2)]);
        assert_eq!(log.last_index().unwrap(), 4);
        assert_eq!(log.term(2).unwrap(), 1);
        assert_eq!(log.term(3).unwrap(), 2);
        assert_eq!(log.size(), (4, 4 * 74));
    }

    #[test]
    fn cutting_keeps_the_term_before() {
        let mut log = log(5);
        log.cut_to(3);
        assert_eq!(log.first_index().unwrap(), 4);
        assert_eq!(log.term(3).unwrap(), 1);
        assert!(log.term(2).is_err());
        assert!(
            log.entries(3, 5, None, GetEntriesContext::empty(false))
                .is_err()
        );
        let got = log
            .entries(4, 6, 1, GetEntriesContext::empty(false))
            .unwrap();
        assert_eq!(got.len(), 1);
    }

    #[test]
    fn gaps_and_lost_ends_are_seen() {
        let with = |entries, commit, applied| {
            RaftLog::new(LoadedLog {
                entries,
                hard: HardState {
                    commit,
                    ..HardState::default()
                },
                applied,
                ..LoadedLog::default()
            })
        };
        assert!(with(vec![entry(1, 1), entry(3, 1)], 0, 0).is_err());
        assert!(with(vec![entry(2, 1)], 0, 0).is_err());
        assert!(with(vec![entry(1, 1)], 2, 0).is_err());
        assert!(with(vec![entry(1, 1)], 0, 2).is_err());
        assert!(with(vec![entry(1, 1)], 1, 1).is_ok());
    }
}
