//! The checker: a reference that applies every committed entry once, and what must hold of all replicas and clients.
//!
//! The first replica that applies an index decides what was committed there: its entry goes through the reference, and every other replica
//! must have the same entry and come to the same state. The reference never goes back, so that whatever was acknowledged and is then
//! forgotten, by however many nodes, shows as a replica that disagrees.
//!
//! What holds at every step:
//! - one entry at an index, one state at an applied index, on every replica, whether it applied entries or took over a raft snapshot;
//! - what is acknowledged is in the reference; a read shows at least all that was applied anywhere when it was asked for;
//! - a committed checkpoint's chunks are there when it is committed and until it is removed: no sweep takes them, and a
//!   replica that has the row has the body ([`reach`]);
//! - what a client was told is pinned, no round up to that one takes;
//! - epochs, rounds and fences never fall, turns never change, removed sandboxes never return ([`ghost`]);
//! - one leader in a term, one vote in a term, terms that survive crashes.

mod ghost;
mod reach;

use std::collections::BTreeMap;
use std::rc::Rc;

use raft::eraftpb::{Message, MessageType};
use tidepool_proto::{ChunkName, SandboxId, TurnNo};
use tidepool_store_core::{ClusterState, META_GROUP, ShardMap, gc, keys};

use crate::content::Content;
use crate::disk::{Body, SimDisk, Stored};
use crate::rng::hash;
use ghost::{Ghost, entry_hash};
use reach::Reach;

/// A commit that a client was told is done.
struct Ack {
    sandbox: SandboxId,
    turn: TurnNo,
    record: Vec<u8>,
}

/// Everything that is known to be true.
pub(crate) struct Checker {
    /// The first thing that was found wrong.
    pub(crate) violation: Option<String>,
    shards: ShardMap,
    groups: BTreeMap<u32, Ghost>,
    reach: Reach,
    leaders: BTreeMap<(u32, u64), u64>,
    votes: BTreeMap<(u64, u32, u64), u64>,
    /// The highest term in a message from a node to another in a group.
    terms: BTreeMap<(u64, u64, u32), u64>,
    acks: Vec<Ack>,
    pub(crate) stats: Stats,
}

/// What was checked, in numbers: a run in which nothing happens proves nothing.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Stats {
    pub entries: u64,
    pub states: u64,
    pub snapshots: u64,
    pub commits: u64,
    pub refused_commits: u64,
    pub reads: u64,
    pub swept: u64,
    pub removed: u64,
    pub rounds: u64,
    pub bodies: u64,
}

impl Checker {
    /// `initial` is the state of the meta group in a new cluster, `first` the index behind which logs begin.
    pub(crate) fn new(content: Rc<Content>, shards: ShardMap, initial: Stored, first: u64) -> Self {
        let mut groups = BTreeMap::new();
        for group in shards.groups() {
            let mut state = match group {
                META_GROUP => initial.clone(),
                _ => Stored::default(),
            };
            state.applied = first;
            groups.insert(group, Ghost::new(group, state));
        }
        Self {
            violation: None,
            shards,
            groups,
            reach: Reach::new(content, shards),
            leaders: BTreeMap::new(),
            votes: BTreeMap::new(),
            terms: BTreeMap::new(),
            acks: Vec::new(),
            stats: Stats::default(),
        }
    }

    /// Something is wrong. The first reason counts.
    pub(crate) fn fail(&mut self, reason: String) {
        self.violation.get_or_insert(reason);
    }

    /// A replica's state is now that of a new applied index: it applied the entries behind `from`, or took over a raft snapshot.
    pub(crate) fn applied(&mut self, node: u64, group: u32, from: Option<u64>, stored: &Stored) {
        let index = stored.applied;
        let Some(ghost) = self.groups.get(&group) else {
            return self.fail(format!("node {node} has a group {group}"));
        };
        if index < from.unwrap_or(0) {
            return self.fail(format!(
                "node {node} applies index {index} of group {group} after {from:?}"
            ));
        }
        for next in ghost.state.applied + 1..=index {
            let Some(entry) = stored.entries.get(&next).filter(|_| from.is_some()) else {
                return self.fail(format!(
                    "node {node} has a state of group {group} at {index}, where entry {next} was applied nowhere"
                ));
            };
            self.stats.entries += 1;
            if let Err(why) = self.step(group, entry) {
                self.fail(format!("entry {next} of group {group}: {why}"));
            }
        }
        let Some(ghost) = self.groups.get(&group) else {
            return;
        };
        let mut wrong = None;
        for at in from.unwrap_or(index) + 1..=index {
            if let (Some(entry), Some(known)) = (stored.entries.get(&at), ghost.entries.get(&at))
                && entry_hash(entry) != *known
            {
                wrong = Some(format!(
                    "node {node} applies another entry {at} of group {group}, of term {}, than was applied elsewhere",
                    entry.term
                ));
            }
        }
        match ghost.hashes.get(&index) {
            Some(known) if *known != stored.hash => {
                wrong.get_or_insert(format!(
                    "the state of group {group} at {index} on node {node} is not the reference's{}",
                    ghost.difference(stored)
                ));
            }
            _ => {}
        }
        self.stats.states += 1;
        self.stats.snapshots += u64::from(from.is_none());
        if let Some(wrong) = wrong {
            self.fail(wrong);
        }
    }

    /// Applies the next entry of a group to the reference.
    fn step(&mut self, group: u32, entry: &raft::eraftpb::Entry) -> Result<(), String> {
        let Some(ghost) = self.groups.get_mut(&group) else {
            return Ok(());
        };
        let changes = ghost.step(entry, &mut self.stats)?;
        let round = gc::gc_of(&ghost.state).map_or(0, |gc| gc.round);
        for change in &changes {
            self.reach.change(group, change, round, &mut self.stats)?;
        }
        // What is new must be whole: looked at when all of the entry is in.
        for name in self.reach.take_new() {
            let home = self.shards.of_chunk(&name);
            let there = |g: &Ghost| g.state.state.contains_key(&keys::chunk(&name));
            if !self.groups.get(&home).is_some_and(there) {
                return Err(format!(
                    "a checkpoint is committed that needs chunk {name}, which is not there"
                ));
            }
        }
        Ok(())
    }

    /// How far a group is applied anywhere: what a read that begins now must show.
    pub(crate) fn floor(&self, group: u32) -> u64 {
        self.groups.get(&group).map_or(0, |g| g.state.applied)
    }

    /// A node answers a read that was asked for when `floor` was applied.
    pub(crate) fn served(&mut self, node: u64, group: u32, applied: u64, floor: u64) {
        self.stats.reads += 1;
        if applied < floor {
            self.fail(format!(
                "node {node} answers a read of group {group} from index {applied}, although {floor} was applied when it was asked for"
            ));
        }
    }

    /// A client read a row: it must be one that the row was at some time since it asked.
    pub(crate) fn read_row(&mut self, group: u32, key: &[u8], value: Option<&[u8]>, floor: u64) {
        let Some(ghost) = self.groups.get(&group) else {
            return;
        };
        if !ghost.was(key, value, floor) {
            self.fail(format!(
                "a read of key {:?} of group {group} gave a value that it did not have at {floor} or later",
                String::from_utf8_lossy(key)
            ));
        }
    }

    /// A client was told that its commit is done.
    pub(crate) fn acked(&mut self, sandbox: SandboxId, turn: TurnNo, record: &[u8]) {
        self.stats.commits += 1;
        self.acks.push(Ack {
            sandbox,
            turn,
            record: record.to_vec(),
        });
        if let Err(why) = self.is_there(&self.acks[self.acks.len() - 1]) {
            self.fail(why);
        }
    }

    fn is_there(&self, ack: &Ack) -> Result<(), String> {
        let group = self.shards.of_sandbox(&ack.sandbox);
        let rows = self.groups.get(&group).map(|g| &g.state.state);
        let row = |key: Vec<u8>| rows.and_then(|r| r.get(&key));
        let there = row(keys::turn(&ack.sandbox, ack.turn)).is_some_and(|r| *r == ack.record);
        if there || row(keys::tombstone(&ack.sandbox)).is_some() {
            return Ok(());
        }
        Err(format!(
            "turn {} of sandbox {} was acknowledged and is not there",
            ack.turn, ack.sandbox
        ))
    }

    /// A client was told that these chunks are pinned, and carry this round.
    pub(crate) fn pinned<'a>(
        &mut self,
        names: impl IntoIterator<Item = &'a ChunkName>,
        round: u64,
    ) {
        for name in names {
            self.reach.pin(name, round);
        }
    }

    /// A node says of itself that it leads.
    pub(crate) fn leads(&mut self, node: u64, group: u32, term: u64) {
        let first = *self.leaders.entry((group, term)).or_insert(node);
        if first != node {
            self.fail(format!(
                "nodes {first} and {node} both lead group {group} in term {term}"
            ));
        }
    }

    /// A node sends a message of raft's.
    pub(crate) fn sent(&mut self, node: u64, group: u32, message: &Message) {
        // Votes that are only asked about are of terms that may never be.
        let asked = matches!(
            message.msg_type(),
            MessageType::MsgRequestPreVote | MessageType::MsgRequestPreVoteResponse
        );
        if asked || message.term == 0 {
            return;
        }
        let term = self.terms.entry((node, message.to, group)).or_default();
        if message.term < *term {
            let known = *term;
            return self.fail(format!(
                "node {node} sends a message of term {} in group {group} after one of term {known}",
                message.term
            ));
        }
        *term = message.term;
        let voted = match message.msg_type() {
            MessageType::MsgRequestVoteResponse if !message.reject => message.to,
            MessageType::MsgRequestVote => node,
            _ => return,
        };
        let vote = self
            .votes
            .entry((node, group, message.term))
            .or_insert(voted);
        if *vote != voted {
            let other = *vote;
            self.fail(format!(
                "node {node} votes for {voted} and for {other} in term {} of group {group}",
                message.term
            ));
        }
    }

    /// Every chunk that is needed and of which a replica has the row, it has the body of.
    pub(crate) fn check_bodies(
        &mut self,
        node: u64,
        disk: &SimDisk,
        groups: impl Iterator<Item = u32>,
    ) {
        for group in groups {
            let (Some(stored), Some(ghost)) = (disk.group(group), self.groups.get(&group)) else {
                continue;
            };
            let prefix = keys::table(keys::Table::Chunk);
            let mut wrong = None;
            for (key, _) in stored.with_prefix(&prefix) {
                let Ok(name) = <[u8; 32]>::try_from(&key[1..]) else {
                    continue;
                };
                let name = ChunkName(name);
                self.stats.bodies += 1;
                // A row from before the chunk went and came again may be without: what brings it again is still to come.
                let newest = ghost
                    .added
                    .get(&name)
                    .is_some_and(|at| stored.applied >= *at);
                if newest && self.reach.is_needed(&name) && disk.body(&name).is_none() {
                    wrong = Some(format!(
                        "node {node} has the row of chunk {name} at index {} of group {group} and a checkpoint needs it, but its body is not there",
                        stored.applied
                    ));
                }
            }
            if let Some(wrong) = wrong {
                self.fail(wrong);
            }
        }
    }

    /// The chunks that live checkpoints need.
    pub(crate) fn needed(&self) -> impl Iterator<Item = &ChunkName> {
        self.reach.needed()
    }

    /// The chunks that are recorded, needed or not: a replica that is behind waits for the bodies of all of them.
    pub(crate) fn recorded(&self) -> impl Iterator<Item = &ChunkName> {
        self.groups.values().flat_map(|g| g.added.keys())
    }

    /// Whether a disk has whole bodies of everything needed in a group, and the group's newest state.
    pub(crate) fn holds_all(&self, group: u32, disk: &SimDisk) -> Result<(), String> {
        let Some(ghost) = self.groups.get(&group) else {
            return Ok(());
        };
        let Some(stored) = disk.group(group) else {
            return Err("it has nothing of it".into());
        };
        if stored.applied < ghost.state.applied {
            return Err(format!(
                "it has applied {} of {}",
                stored.applied, ghost.state.applied
            ));
        }
        for name in self.reach.needed() {
            if self.shards.of_chunk(name) == group && disk.body(name) != Some(Body::Whole) {
                return Err(format!("the body of chunk {name} is {:?}", disk.body(name)));
            }
        }
        Ok(())
    }

    /// Whether a disk has a whole body of a chunk, and its newest row.
    pub(crate) fn holds(&self, name: &ChunkName, disk: &SimDisk) -> bool {
        let group = self.shards.of_chunk(name);
        let (Some(stored), Some(ghost)) = (disk.group(group), self.groups.get(&group)) else {
            return false;
        };
        let newest = ghost
            .added
            .get(name)
            .is_some_and(|at| stored.applied >= *at);
        newest && disk.body(name) == Some(Body::Whole)
    }

    /// The nodes of the cluster as last decided.
    pub(crate) fn cluster(&self) -> Option<ClusterState> {
        let meta = self.groups.get(&META_GROUP)?;
        ClusterState::load(&meta.state).ok().flatten()
    }

    /// At the end: everything acknowledged is in the reference, which all replicas are equal to by then.
    pub(crate) fn check_acks(&mut self) {
        let wrong = self.acks.iter().find_map(|ack| self.is_there(ack).err());
        if let Some(why) = wrong {
            self.fail(why);
        }
    }

    /// A fingerprint of everything committed.
    pub(crate) fn fingerprint(&self) -> u64 {
        self.groups.iter().fold(0, |h, (group, ghost)| {
            let mut bytes = group.to_le_bytes().to_vec();
            bytes.extend(ghost.state.applied.to_le_bytes());
            bytes.extend(ghost.state.hash.to_le_bytes());
            hash(h, &bytes)
        })
    }
}
