//! All group replicas of a node, as one state machine: [`Core::handle`] takes what happened, [`Core::turn`] persists and applies what is ready,
//! [`Core::poll_action`] gives what has to be done outside.
//!
//! A turn writes what all groups have ready in one batch with one sync, sends what may be sent then, applies what is committed in
//! a second batch (the next sync makes it durable; the log already is), and queues the answers. Nothing leaves before the batch it rests on
//! is durable. A full disk keeps the batch: it is tried again at the next turn, writes are refused meanwhile and reads go on
//! where no other voter can know better; where there are others, they are said to lead, see [`crate::room`]. Any other failed write ends the core: what is on disk is then unknown.
//!
//! The parts: [`crate::group`] one group's raft, [`crate::parked`] appends that wait for bodies, [`crate::install`] raft snapshots,
//! [`crate::plan`] the walk between memberships, [`crate::turn`] persisting and applying. Time, ids and randomness are the caller's.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use prost::Message as _;
use raft::eraftpb::{ConfState, HardState, Message, MessageType};

use tidepool_store_core::META_GROUP;

use crate::api::{Action, CoreError, GroupStatus, Input, Order, Rejection, Target};
use crate::disk::{Disk, DiskError, DiskOp};
use crate::envelope::{Body, Envelope};
use crate::group::{Group, GroupConfig, LogBounds};
use crate::install::{self, Install};
use crate::parked::{self, Parked};
use crate::plan::{Known, Step, heir, next_step};
use crate::room::{Room, SAY_TICKS};
use crate::turn::Pending;

/// Milliseconds between two [`Input::Tick`]s.
pub const TICK_MS: u64 = 100;
/// Index and term behind which the log of a new group begins.
pub const FIRST: (u64, u64) = (5, 1);
/// Ticks between two looks at whether a group's members are as they should be.
const PLAN_TICKS: u64 = 5;
/// Ticks without a message after which a replica asks whether it is still a member, again and again.
const LONELY_TICKS: u32 = 50;
/// A member that lacks no more entries than this has caught up.
const CAUGHT_UP: u64 = 64;

/// What makes a group with these voters, where there is none, before [`Core::open`]: only for a new cluster, on its first node.
/// Everything else is created by a leader's message. The log begins behind [`FIRST`], so that a new replica, whose log begins at
/// nothing, always starts from a raft snapshot and never has to make changes of members it does not know.
pub fn bootstrap(group: u32, voters: &[u64]) -> [DiskOp; 4] {
    let (index, term) = FIRST;
    let conf = ConfState {
        voters: voters.to_vec(),
        ..ConfState::default()
    };
    let hard = HardState {
        term,
        commit: index,
        ..HardState::default()
    };
    [
        DiskOp::Cut { group, index, term },
        DiskOp::Applied { group, index },
        DiskOp::Hard { group, hard },
        DiskOp::Conf { group, conf },
    ]
}

/// Who this node is.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// Its id, never 0.
    pub node: u64,
    /// Tells this run's proposals from those of earlier runs; random.
    pub run: u64,
    /// See [`GroupConfig::election_ticks`].
    pub election_ticks: Option<usize>,
}

pub(crate) struct Replica {
    pub(crate) group: Group,
    pub(crate) parked: Parked,
    pub(crate) install: Option<Install>,
    /// Leader and members as last reported by [`Action::Changed`].
    pub(crate) reported: (Option<u64>, bool, ConfState),
    lonely: u32,
}

#[derive(Clone, Copy)]
enum Fetch {
    Parked(u32),
    Install(u32),
}

/// The state machine.
pub struct Core<D> {
    pub(crate) cfg: CoreConfig,
    pub(crate) disk: D,
    logger: slog::Logger,
    pub(crate) groups: BTreeMap<u32, Replica>,
    targets: BTreeMap<u32, Target>,
    /// Who waits, by token: the group. Sorted: the same inputs give the same actions in the same order.
    pub(crate) proposals: BTreeMap<u64, u32>,
    pub(crate) reads: BTreeMap<u64, u32>,
    pub(crate) outbox: BTreeMap<u64, Vec<Envelope>>,
    pub(crate) actions: VecDeque<Action>,
    pub(crate) pending: Option<Pending>,
    /// The disk had no room for it.
    pub(crate) full: bool,
    fetches: BTreeMap<u64, Fetch>,
    next_fetch: u64,
    ticks: u64,
    room: Room,
    bounds: LogBounds,
    /// The last time given to a command: a clock that is set back does not show in the log.
    last_ms: u64,
}

impl<D: Disk> Core<D> {
    /// Opens every group that is on the disk. `logger` gets raft's own lines.
    pub fn open(cfg: CoreConfig, disk: D, logger: slog::Logger) -> Result<Self, CoreError> {
        let mut core = Self {
            cfg,
            disk,
            logger,
            groups: BTreeMap::new(),
            targets: BTreeMap::new(),
            proposals: BTreeMap::new(),
            reads: BTreeMap::new(),
            outbox: BTreeMap::new(),
            actions: VecDeque::new(),
            pending: None,
            full: false,
            fetches: BTreeMap::new(),
            next_fetch: 1,
            ticks: 0,
            room: Room::default(),
            bounds: LogBounds::default(),
            last_ms: 0,
        };
        for group in core.disk.groups()? {
            core.add(group)?;
        }
        Ok(core)
    }

    fn add(&mut self, number: u32) -> Result<(), CoreError> {
        let cfg = GroupConfig {
            group: number,
            node: self.cfg.node,
            run: self.cfg.run,
            election_ticks: self.cfg.election_ticks,
        };
        let mut group = Group::new(cfg, self.disk.load(number)?, &self.logger)?;
        group.bounds = self.bounds;
        let replica = Replica {
            group,
            parked: Parked::default(),
            install: None,
            reported: (None, false, ConfState::default()),
            lonely: 0,
        };
        self.groups.insert(number, replica);
        Ok(())
    }

    /// Lets logs grow otherwise than by default: a simulation is too short for long ones.
    pub fn set_log_bounds(&mut self, bounds: LogBounds) {
        self.bounds = bounds;
        for replica in self.groups.values_mut() {
            replica.group.bounds = bounds;
        }
    }

    /// Its storage.
    pub fn disk(&self) -> &D {
        &self.disk
    }

    /// Its storage, to serve what others fetch. The core's own records must not be written through it.
    pub fn disk_mut(&mut self) -> &mut D {
        &mut self.disk
    }

    /// Gives the storage back.
    pub fn into_disk(self) -> D {
        self.disk
    }

    /// Whether a batch waits for room on the disk.
    pub fn stalled(&self) -> bool {
        self.full
    }

    /// What is due outside.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Numbers of the groups that are here.
    pub fn group_numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.groups.keys().copied()
    }

    /// Whether there are groups here, and this node is the only voter of each.
    pub fn is_alone(&self) -> bool {
        !self.groups.is_empty() && self.groups.values().all(|r| r.group.is_alone())
    }

    /// A group's state of affairs; none where it is not here.
    pub fn status(&self, group: u32) -> Option<GroupStatus> {
        let replica = self.groups.get(&group)?;
        let g = &replica.group;
        let conf = g.conf().clone();
        let behind = if g.is_leader() {
            let all = conf.voters.iter().chain(&conf.learners);
            all.map(|id| (*id, g.lag(*id).unwrap_or(u64::MAX)))
                .filter(|(_, lag)| *lag > CAUGHT_UP)
                .collect()
        } else {
            Vec::new()
        };
        // One that waits for room is heard by nobody: whoever has room leads soon.
        let mute = self.stalled() && !g.is_alone();
        let me = self.cfg.node;
        Some(GroupStatus {
            group,
            term: g.term(),
            leader: g.leader().filter(|l| *l != me || !mute),
            leads: g.is_ready() && !mute,
            conf,
            applied: g.applied_at().0,
            commit: g.commit(),
            log_entries: g.log_entries(),
            installing: replica.install.is_some(),
            behind,
            yields: g.is_ready() && (mute || self.heir(group).is_some()),
        })
    }

    /// Whether new writes may be taken here.
    fn has_room(&self) -> bool {
        self.room.is_here() && !self.stalled()
    }

    /// Who takes a group that this node leads and has no room for.
    fn heir(&self, number: u32) -> Option<u64> {
        let (group, target) = (&self.groups.get(&number)?.group, self.targets.get(&number)?);
        let known = Known {
            caught_up: &|id| group.lag(id).is_some_and(|lag| lag <= CAUGHT_UP),
            room: &|id| self.room_at(id),
        };
        heir(self.cfg.node, group.conf(), target, &known)
    }

    fn room_at(&self, node: u64) -> bool {
        if node == self.cfg.node {
            self.has_room()
        } else {
            self.room.is_at(node)
        }
    }

    /// Says to all who may lead that this node must not.
    fn say_no_room(&mut self) {
        let confs = self.groups.values().map(|r| r.group.conf());
        let members = confs.flat_map(|c| c.voters.iter().chain(&c.learners));
        let others: BTreeSet<u64> = members.copied().filter(|n| *n != self.cfg.node).collect();
        for to in others {
            self.post(to, META_GROUP, Body::NoRoom);
        }
    }

    /// Applied index and term of a group, for a page of a raft snapshot whose view is opened in the same moment. Commands that are
    /// applied but wait for room on the disk are not in the state yet: there is no view then.
    pub fn view_point(&self, group: u32) -> Option<(u64, u64, ConfState)> {
        let replica = self.groups.get(&group).filter(|_| !self.stalled())?;
        let (index, term) = replica.group.applied_at();
        (term > 0).then(|| (index, term, replica.group.conf().clone()))
    }

    /// Whether an entry that is not applied yet, or not in the log yet, brings this chunk: its body must stay.
    pub fn is_named(&self, names: &[tidepool_proto::ChunkName]) -> Vec<bool> {
        let mut waiting = std::collections::BTreeSet::new();
        for replica in self.groups.values() {
            for entry in replica.group.unapplied() {
                waiting.extend(parked::names_of(entry));
            }
            waiting.extend(replica.parked.names().copied());
        }
        names.iter().map(|n| waiting.contains(n)).collect()
    }

    /// Those of some bodies of a group that nothing under way here needs, whether the group is here or not. What the state names and
    /// what is held by a put is for [`Disk::delete_bodies`] to spare.
    pub fn unneeded(
        &self,
        group: u32,
        names: &[tidepool_proto::ChunkName],
    ) -> Vec<tidepool_proto::ChunkName> {
        if self.groups.get(&group).is_some_and(|r| r.install.is_some()) {
            return Vec::new();
        }
        let named = self.is_named(names);
        let free = names.iter().zip(named).filter(|(_, named)| !named);
        free.map(|(n, _)| *n).collect()
    }

    /// Takes what happened. `now_ms`: milliseconds since the Unix epoch. Call [`Core::turn`] after one or several of these.
    pub fn handle(&mut self, now_ms: u64, input: Input) -> Result<(), CoreError> {
        self.last_ms = self.last_ms.max(now_ms);
        match input {
            Input::Message { from, envelope } => self.message(from, envelope)?,
            Input::Tick => self.tick()?,
            Input::Propose {
                group,
                token,
                command,
            } => self.propose(group, token, *command),
            Input::Read { group, token } => self.read(group, token),
            Input::BodiesFetched { fetch, gone } => match self.take_fetch(fetch) {
                Some(Fetch::Parked(group)) => {
                    self.with(group, |r| r.parked.fetched(gone));
                    self.advance(group)?;
                }
                Some(Fetch::Install(group)) => {
                    self.with(group, |r| {
                        r.install.iter_mut().for_each(|i| i.bodies(gone.clone()))
                    });
                    self.advance(group)?;
                }
                None => {}
            },
            Input::PageFetched { fetch, page } => {
                if let Some(Fetch::Install(group)) = self.take_fetch(fetch) {
                    self.page(group, page)?;
                    self.advance(group)?;
                }
            }
            Input::FetchFailed { fetch } => match self.take_fetch(fetch) {
                Some(Fetch::Parked(group)) => self.with(group, |r| r.parked.failed()),
                Some(Fetch::Install(group)) => {
                    self.with(group, |r| r.install.iter_mut().for_each(Install::failed));
                }
                None => {}
            },
            Input::Room(room) => {
                let had = self.room.is_here();
                self.room.set_here(room);
                // At once, so that nobody hands back what is handed over now.
                if had && !room {
                    self.say_no_room();
                }
            }
            Input::Order(Order::Target(target)) => {
                self.targets.insert(target.group, target);
            }
            Input::Order(Order::Transfer { group, to }) => {
                self.with(group, |r| {
                    if r.group.conf().voters.contains(&to) {
                        r.group.transfer(to);
                    }
                });
            }
        }
        Ok(())
    }

    fn with(&mut self, group: u32, f: impl FnOnce(&mut Replica)) {
        if let Some(replica) = self.groups.get_mut(&group) {
            f(replica);
        }
    }

    fn propose(&mut self, number: u32, token: u64, mut command: tidepool_store_core::Command) {
        let refuse = |why| Action::Answer {
            token,
            result: Err(why),
        };
        if self.stalled() {
            let why = self.why_stalled(number);
            return self.actions.push_back(refuse(why));
        }
        command.now_ms = self.last_ms;
        let Some(replica) = self.groups.get_mut(&number) else {
            let not_here = Rejection::NotLeader {
                group: number,
                leader: None,
            };
            return self.actions.push_back(refuse(not_here));
        };
        if !replica.group.is_leader() {
            let leader = replica.group.leader();
            let elsewhere = Rejection::NotLeader {
                group: number,
                leader,
            };
            return self.actions.push_back(refuse(elsewhere));
        }
        match replica.group.propose(token, command.encode_to_vec()) {
            Ok(()) => {
                self.proposals.insert(token, number);
            }
            Err(_) => self.actions.push_back(refuse(Rejection::Again(
                "the group has too much to do, or its leader is about to change",
            ))),
        }
    }

    /// Why nothing can be had of a group while a batch waits for room: nobody else can do it, or others are asked, who have a leader soon.
    fn why_stalled(&self, number: u32) -> Rejection {
        match self.groups.get(&number) {
            Some(r) if r.group.is_alone() => Rejection::Full,
            replica => {
                let me = self.cfg.node;
                let leader = replica.and_then(|r| r.group.leader());
                Rejection::NotLeader {
                    group: number,
                    leader: leader.filter(|l| *l != me),
                }
            }
        }
    }

    fn read(&mut self, number: u32, token: u64) {
        let stalled = self.stalled();
        let answer = |result| Action::ReadReady { token, result };
        let elsewhere = |leader| {
            Err(Rejection::NotLeader {
                group: number,
                leader,
            })
        };
        let Some(replica) = self.groups.get_mut(&number) else {
            return self.actions.push_back(answer(elsewhere(None)));
        };
        if stalled {
            // Nothing newer was acknowledged by a group that has no other voter.
            let result = if replica.group.is_alone() {
                Ok(())
            } else {
                Err(self.why_stalled(number))
            };
            return self.actions.push_back(answer(result));
        }
        match replica.group.read(token) {
            Ok(()) => {
                self.reads.insert(token, number);
            }
            Err(_) => {
                let leader = replica.group.leader();
                self.actions.push_back(answer(elsewhere(leader)));
            }
        }
    }

    fn message(&mut self, from: u64, envelope: Envelope) -> Result<(), CoreError> {
        if envelope.body == Body::NoRoom {
            self.room.none_at(from, self.ticks);
            return Ok(());
        }
        // While a batch waits for room nothing can be stepped; raft sends again.
        if self.stalled() || from == self.cfg.node {
            return Ok(());
        }
        let number = envelope.group;
        match envelope.body {
            Body::Raft(message) => {
                if message.from != from || message.to != self.cfg.node {
                    return Ok(());
                }
                if !self.groups.contains_key(&number) && !self.create(number, &message)? {
                    return Ok(());
                }
                let Some(replica) = self.groups.get_mut(&number) else {
                    return Ok(());
                };
                // What others refuse it says nothing of: one that was removed asks for votes, and is answered, for ever.
                if is_from_leader(&message) {
                    replica.lonely = 0;
                }
                // A replica that knows no members has no vote: one that was deleted and made again, its log forgotten, could
                // otherwise help members of long ago to a quorum. One that was removed, and has its log, votes on: those who do
                // not know of it yet may need it.
                let asks_for_vote = matches!(
                    message.msg_type(),
                    MessageType::MsgRequestVote | MessageType::MsgRequestPreVote
                );
                if asks_for_vote && knows_nobody(replica.group.conf()) {
                    return Ok(());
                }
                match message.msg_type() {
                    MessageType::MsgAppend if !message.entries.is_empty() => {
                        replica.parked.push(from, *message);
                    }
                    MessageType::MsgSnapshot => {
                        let known = |i: &Install| i.is(from, message.term);
                        if message.term >= replica.group.term()
                            && !replica.install.as_ref().is_some_and(known)
                        {
                            replica.install = Some(Install::new(number, from, *message));
                        }
                    }
                    _ => replica.group.step(*message),
                }
                self.advance(number)
            }
            Body::Member { last } => {
                if let Some(replica) = self.groups.get(&number)
                    && replica.group.is_ready()
                    && !is_member(replica.group.conf(), from)
                    && last <= replica.group.applied_at().0
                {
                    let index = replica.group.applied_at().0;
                    let body = Body::NotMember { index };
                    self.post(from, number, body);
                }
                Ok(())
            }
            Body::NotMember { index } => {
                // What is not below this log cannot be an older list of members than the one here.
                let ours = self.groups.get(&number);
                if ours.is_some_and(|r| r.group.last_index() <= index && !r.group.is_alone()) {
                    self.destroy(number)?;
                }
                Ok(())
            }
            Body::NoRoom => Ok(()),
        }
    }

    pub(crate) fn post(&mut self, to: u64, group: u32, body: Body) {
        self.outbox
            .entry(to)
            .or_default()
            .push(Envelope { group, body });
    }

    /// Makes an empty replica where a leader wants one here.
    fn create(&mut self, number: u32, message: &Message) -> Result<bool, CoreError> {
        let unwanted = self
            .targets
            .get(&number)
            .is_some_and(|t| !t.voters.is_empty() && !t.has(self.cfg.node));
        if !is_from_leader(message) || unwanted {
            return Ok(false);
        }
        // Term and vote outlived the replica that was here before; what it knew to be committed went with its log.
        let mut hard = self.disk.load(number)?.hard;
        hard.commit = 0;
        let ops = [
            DiskOp::Hard {
                group: number,
                hard,
            },
            DiskOp::Conf {
                group: number,
                conf: ConfState::default(),
            },
        ];
        match self.disk.write(&ops, false) {
            Ok(()) => {}
            Err(DiskError::Full(_)) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        self.add(number)?;
        self.actions.push_back(Action::Changed { group: number });
        Ok(true)
    }

    fn destroy(&mut self, number: u32) -> Result<(), CoreError> {
        let ops = [
            DiskOp::ClearStage { group: number },
            DiskOp::Destroy { group: number },
        ];
        match self.disk.write(&ops, true) {
            Ok(()) => {}
            Err(DiskError::Full(_)) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        self.groups.remove(&number);
        self.reject_all(number);
        self.actions.push_back(Action::Changed { group: number });
        Ok(())
    }

    /// Nobody here will decide these any more.
    fn reject_all(&mut self, number: u32) {
        let why = Rejection::NotLeader {
            group: number,
            leader: None,
        };
        for token in waiting(&mut self.proposals, number) {
            let result = Err(why.clone());
            self.actions.push_back(Action::Answer { token, result });
        }
        for token in waiting(&mut self.reads, number) {
            let result = Err(why.clone());
            self.actions.push_back(Action::ReadReady { token, result });
        }
    }

    fn tick(&mut self) -> Result<(), CoreError> {
        self.ticks += 1;
        self.room.tick(self.ticks);
        if !self.has_room() && self.ticks.is_multiple_of(SAY_TICKS) {
            self.say_no_room();
        }
        if self.stalled() {
            return Ok(());
        }
        let numbers: Vec<u32> = self.groups.keys().copied().collect();
        for number in numbers {
            let Some(replica) = self.groups.get_mut(&number) else {
                continue;
            };
            replica.group.tick();
            replica.parked.tick();
            replica.install.iter_mut().for_each(Install::tick);
            let caught_up = |i: &Install| i.index() > 0 && i.index() <= replica.group.commit();
            if replica.install.as_ref().is_some_and(caught_up) {
                replica.install = None;
            }
            // Not all groups in the same tick.
            if (self.ticks + u64::from(number)).is_multiple_of(PLAN_TICKS) {
                self.plan(number);
            }
            self.ask_lonely(number);
            self.advance(number)?;
        }
        Ok(())
    }

    fn plan(&mut self, number: u32) {
        let (Some(replica), Some(target)) = (self.groups.get(&number), self.targets.get(&number))
        else {
            return;
        };
        let group = &replica.group;
        if !group.is_ready() {
            return;
        }
        let known = Known {
            caught_up: &|id| group.lag(id).is_some_and(|lag| lag <= CAUGHT_UP),
            room: &|id| self.room_at(id),
        };
        let step = next_step(self.cfg.node, group.conf(), target, &known);
        let Some(group) = self.groups.get_mut(&number).map(|r| &mut r.group) else {
            return;
        };
        match step {
            Step::Nothing => {}
            // One that cannot be taken now is found again at the next look.
            Step::Change(change) => {
                let _ = group.propose_members(change);
            }
            Step::Transfer(to) => group.transfer(to),
        }
    }

    fn ask_lonely(&mut self, number: u32) {
        let Some(replica) = self.groups.get_mut(&number) else {
            return;
        };
        // One that was removed remembers its last leader for ever: what counts is whether anything is heard.
        if replica.group.is_leader() {
            replica.lonely = 0;
            return;
        }
        replica.lonely += 1;
        if !replica.lonely.is_multiple_of(LONELY_TICKS) {
            return;
        }
        let last = replica.group.last_index();
        let conf = replica.group.conf().clone();
        let target = self.targets.get(&number);
        let mut asked: Vec<u64> = conf.voters.iter().chain(&conf.learners).copied().collect();
        asked.extend(target.iter().flat_map(|t| &t.voters));
        asked.sort_unstable();
        asked.dedup();
        let me = self.cfg.node;
        for to in asked.into_iter().filter(|id| *id != me) {
            self.post(to, number, Body::Member { last });
        }
    }

    /// What an answered fetch was for; none where that is not waited for any more: another snapshot took the place of the one it was
    /// for, or the group went and came again. A page of one view must never pass for one of another.
    fn take_fetch(&mut self, fetch: u64) -> Option<Fetch> {
        let what = self.fetches.remove(&fetch)?;
        let (Fetch::Parked(group) | Fetch::Install(group)) = what;
        let replica = self.groups.get(&group)?;
        let awaited = match what {
            Fetch::Parked(_) => replica.parked.fetch,
            Fetch::Install(_) => replica.install.as_ref()?.fetch,
        };
        (awaited == Some(fetch)).then_some(what)
    }

    fn fetch(&mut self, what: Fetch) -> u64 {
        let fetch = self.next_fetch;
        self.next_fetch += 1;
        self.fetches.insert(fetch, what);
        fetch
    }

    /// Steps what waits no more, and asks for what is missing.
    fn advance(&mut self, number: u32) -> Result<(), CoreError> {
        while let Some(replica) = self.groups.get_mut(&number) {
            match replica.parked.next(&self.disk)? {
                parked::Next::Step(message) => replica.group.step(*message),
                parked::Next::Fetch { from, index, names } => {
                    let from = source(
                        replica.group.conf(),
                        self.cfg.node,
                        from,
                        replica.parked.in_vain,
                    );
                    let fetch = self.fetch(Fetch::Parked(number));
                    self.with(number, |r| r.parked.fetch = Some(fetch));
                    self.actions.push_back(Action::FetchBodies {
                        fetch,
                        from,
                        group: number,
                        index,
                        names,
                    });
                }
                parked::Next::Wait => break,
            }
        }
        let Some(replica) = self.groups.get_mut(&number) else {
            return Ok(());
        };
        let Some(install) = &mut replica.install else {
            return Ok(());
        };
        let from = install.from;
        match install.next(&self.disk)? {
            install::Next::Wait => {}
            install::Next::Done(message) => {
                replica.install = None;
                replica.group.step(*message);
            }
            install::Next::Page(request) => {
                let fetch = self.fetch(Fetch::Install(number));
                self.with(number, |r| {
                    r.install.iter_mut().for_each(|i| i.fetch = Some(fetch))
                });
                self.actions.push_back(Action::FetchPage {
                    fetch,
                    from,
                    request,
                });
            }
            install::Next::Bodies(names) => {
                let index = install.index();
                let from = source(replica.group.conf(), self.cfg.node, from, install.in_vain);
                let fetch = self.fetch(Fetch::Install(number));
                self.with(number, |r| {
                    r.install.iter_mut().for_each(|i| i.fetch = Some(fetch))
                });
                self.actions.push_back(Action::FetchBodies {
                    fetch,
                    from,
                    group: number,
                    index,
                    names,
                });
            }
        }
        Ok(())
    }

    fn page(&mut self, number: u32, page: crate::page::Page) -> Result<(), CoreError> {
        let Some(replica) = self.groups.get_mut(&number) else {
            return Ok(());
        };
        let Some(install) = &mut replica.install else {
            return Ok(());
        };
        if let Some(ops) = install.page(page) {
            match self.disk.write(&ops, false) {
                Ok(()) => {}
                // The rows are not there: from the beginning, when there is room.
                Err(DiskError::Full(_)) => replica.install = None,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Whom to ask for bodies: the sender of what names them, who should have them, and after fetches in vain the other members in turn.
fn source(conf: &ConfState, me: u64, sender: u64, in_vain: usize) -> u64 {
    let all = conf.voters.iter().chain(&conf.voters_outgoing);
    let all = all.chain(&conf.learners).chain(&conf.learners_next);
    let mut others: Vec<u64> = all
        .copied()
        .filter(|id| ![me, sender].contains(id))
        .collect();
    others.sort_unstable();
    others.dedup();
    match in_vain % (others.len() + 1) {
        0 => sender,
        n => others[n - 1],
    }
}

/// Whether only a leader sends this.
fn is_from_leader(message: &Message) -> bool {
    matches!(
        message.msg_type(),
        MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot
    )
}

/// Takes out those that wait for a group, in the order of their tokens.
pub(crate) fn waiting(all: &mut BTreeMap<u64, u32>, group: u32) -> Vec<u64> {
    let of_group = all.iter().filter(|(_, of)| **of == group);
    let tokens: Vec<u64> = of_group.map(|(token, _)| *token).collect();
    for token in &tokens {
        all.remove(token);
    }
    tokens
}

/// Whether this is the list of members of a replica that was just made.
fn knows_nobody(conf: &ConfState) -> bool {
    conf.voters.is_empty() && conf.learners.is_empty()
}

/// Whether a node belongs to a group in any way.
fn is_member(conf: &ConfState, node: u64) -> bool {
    [
        &conf.voters,
        &conf.learners,
        &conf.voters_outgoing,
        &conf.learners_next,
    ]
    .iter()
    .any(|list| list.contains(&node))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_asked_for_of_the_sender_first_and_of_the_others_in_turn() {
        let conf = ConfState {
            voters: vec![3, 1, 2],
            learners: vec![4],
            ..ConfState::default()
        };
        let asked: Vec<u64> = (0..5).map(|n| source(&conf, 2, 3, n)).collect();
        assert_eq!(asked, [3, 1, 4, 3, 1]);
        // A new replica knows no members yet.
        assert_eq!(source(&ConfState::default(), 2, 3, 7), 3);
    }
}
