//! Appends that wait for bodies: a follower acknowledges entries only when every body they name is durable here.
//!
//! Messages wait in the order they came; the first one's missing bodies are fetched, some at a time, which bounds memory on both
//! sides. What finds no room is dropped: raft sends it again. What an earlier leader sent is dropped when a later one sends something: it
//! would be refused, and its bodies may be waited for until the connection to one that died times out.
//!
//! The sender is asked first, and after fetches in vain the other members in turn: the sender's own copy may be damaged. A body that
//! a collection took is nowhere any more, and an entry that brings it must not wait for ever. So a source may call a name *gone*, if it has
//! neither body nor row and has applied the log up to the last entry here that brings one of the names asked for. That is safe, whoever
//! says it, leader or not, ahead or behind: what is applied is committed, so something is committed at that entry's index. Either
//! it is this entry: then it was refused, or what it added was swept at a later index, which is committed too, so that every later leader
//! has the sweep and every replica that takes the entry comes to it. Or it is another: then this one can never be committed, nor can a node
//! whose log has it there lead. An index below that of the entry would prove nothing (the leader may have lost the entry, and with
//! it the body, and this node may win an election with it), and one above it could be out of reach for want of this node's
//! acknowledgement: hence the index goes by the names that are missing, not by the message.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use prost::Message as _;
use raft::eraftpb::{Entry, Message};
use tidepool_proto::ChunkName;
use tidepool_proto::wire::split_names;
use tidepool_store_core::bugs::{Bug, is_armed};
use tidepool_store_core::{Command, op};

use crate::disk::{Disk, DiskError};

/// The most messages, and bytes of their entries, that wait in one group.
const MAX_PARKED: (usize, usize) = (256, 16 << 20);
/// The most bodies of one fetch.
pub(crate) const FETCH_NAMES: usize = 256;
/// Ticks after a failed fetch.
pub(crate) const RETRY_TICKS: u32 = 3;

/// The names of chunks whose bodies an entry brings. What it thinks to be there already was brought by an entry before it, or it is
/// refused when it is applied.
pub(crate) fn names_of(entry: &Entry) -> Vec<ChunkName> {
    match Command::decode(&*entry.data).map(|c| c.op) {
        Ok(Some(op::Op::AddChunks(c))) => {
            let names = split_names(&c.names).unwrap_or_default();
            // Without a kind it counts as brought: doubt waits.
            let brought = |i: usize| c.kinds.get(i).is_none_or(|k| k & op::BROUGHT != 0);
            let all = names.into_iter().enumerate();
            all.filter(|(i, _)| brought(*i)).map(|(_, n)| n).collect()
        }
        _ => Vec::new(),
    }
}

struct Waiting {
    from: u64,
    message: Message,
    /// All that its entries bring, and the last entry that does: their bodies must stay while this waits.
    names: BTreeMap<ChunkName, u64>,
    bytes: usize,
}

/// What a group's messages wait for.
pub(crate) enum Next {
    /// Nothing: this one may be stepped.
    Step(Box<Message>),
    /// These bodies, which entries up to `index` bring.
    Fetch {
        from: u64,
        index: u64,
        names: Vec<ChunkName>,
    },
    /// A fetch that is under way, or time; or there is none.
    Wait,
}

/// The waiting appends of one group.
#[derive(Default)]
pub(crate) struct Parked {
    queue: VecDeque<Waiting>,
    bytes: usize,
    /// Names of the first message that were collected meanwhile.
    gone: BTreeSet<ChunkName>,
    pub(crate) fetch: Option<u64>,
    pub(crate) wait: u32,
    /// How many bodies were missing when they were last asked for.
    asked: usize,
    /// Fetches that came to nothing since the last append that was taken: each next one goes to another member.
    pub(crate) in_vain: usize,
}

impl Parked {
    /// Takes a message in.
    pub(crate) fn push(&mut self, from: u64, message: Message) {
        let brought = |e: &Entry| {
            names_of(e)
                .into_iter()
                .map(|n| (n, e.index))
                .collect::<Vec<_>>()
        };
        let names: BTreeMap<ChunkName, u64> = message.entries.iter().flat_map(brought).collect();
        let bytes = message.entries.iter().map(|e| e.data.len() + 64).sum();
        if (self.queue.front()).is_some_and(|w| w.message.term < message.term) {
            *self = Self::default();
        }
        if self.queue.len() >= MAX_PARKED.0 || self.bytes + bytes > MAX_PARKED.1.max(bytes) {
            return;
        }
        self.bytes += bytes;
        self.queue.push_back(Waiting {
            from,
            message,
            names,
            bytes,
        });
    }

    /// What the waiting messages bring.
    pub(crate) fn names(&self) -> impl Iterator<Item = &ChunkName> {
        self.queue.iter().flat_map(|w| w.names.keys())
    }

    /// What comes next.
    pub(crate) fn next<D: Disk>(&mut self, disk: &D) -> Result<Next, DiskError> {
        let hasty = is_armed(Bug::AppendBeforeBodies)
            && self.queue.front().is_some_and(|w| w.names.is_empty());
        if (self.fetch.is_some() || self.wait > 0) && !hasty {
            return Ok(Next::Wait);
        }
        let Some(first) = self.queue.front_mut() else {
            return Ok(Next::Wait);
        };
        let mut missing = Vec::new();
        for (name, index) in &first.names {
            if !self.gone.contains(name) && !disk.has_body(name)? {
                missing.push((*index, *name));
            }
        }
        if missing.is_empty() {
            self.gone.clear();
            self.asked = 0;
            self.in_vain = 0;
            let Some(first) = self.queue.pop_front() else {
                return Ok(Next::Wait);
            };
            self.bytes -= first.bytes;
            return Ok(Next::Step(Box::new(first.message)));
        }
        // Nothing came: asking again at once would go on as fast as the network can, and what is behind would wait for ever for a
        // sender that has not got it.
        if missing.len() == self.asked {
            self.failed();
            return Ok(Next::Wait);
        }
        self.asked = missing.len();
        if is_armed(Bug::AppendBeforeBodies) {
            first.names.clear();
        }
        // In the order of the log: what is asked for first can be applied first.
        missing.sort_unstable();
        missing.truncate(FETCH_NAMES);
        Ok(Next::Fetch {
            from: first.from,
            index: missing.last().map_or(0, |(index, _)| *index),
            names: missing.into_iter().map(|(_, name)| name).collect(),
        })
    }

    /// The fetch ended; these were collected.
    pub(crate) fn fetched(&mut self, gone: Vec<ChunkName>) {
        self.fetch = None;
        self.gone.extend(gone);
    }

    /// The fetch failed.
    pub(crate) fn failed(&mut self) {
        self.fetch = None;
        self.asked = 0;
        self.in_vain += 1;
        self.wait = RETRY_TICKS;
        // The leader may have changed or died: what it sent is worth nothing if it cannot be completed.
        if let Some(first) = self.queue.pop_front() {
            self.bytes -= first.bytes;
        }
        self.gone.clear();
    }

    pub(crate) fn tick(&mut self) {
        self.wait = self.wait.saturating_sub(1);
    }
}
