//! All group replicas of a node, as one state machine: [`Core::handle`] takes what happened, [`Core::turn`] persists and applies what is ready,
//! [`Core::poll_action`] gives what has to be done outside.
//!
//! A turn writes what all groups have ready in one batch with one sync, sends what may be sent then, applies what is committed in
//! a second batch (the next sync makes it durable; the log already is), and queues the answers. Nothing leaves before the batch it rests on
//! is durable. A full disk keeps the batch: it is tried again at the next turn, writes are refused meanwhile and reads go on
//! where no other voter can know better; where there are others, they are said to lead, see [`crate::room`]. Any other failed write ends the core: what is on disk is then unknown.
//!
//! The parts: [`crate::group`] one group's raft, [`crate::parked`] appends that wait for bodies, [`crate::install`] raft snapshots,
//! [`crate::plan`] the walk between memberships, [`crate::turn`] persisting and applying; and of this same machine [`crate::calls`] what callers
//! ask, [`crate::messages`] what members say, [`crate::fetches`] what is fetched, [`crate::room`] who has room, [`crate::report`] what others
//! may know of it. Time, ids and randomness are the caller's.

use std::collections::{BTreeMap, VecDeque};

use raft::eraftpb::{ConfState, HardState};

use crate::api::{Action, CoreError, Input, Order, Target};
use crate::disk::{Disk, DiskOp};
use crate::envelope::Envelope;
use crate::fetches::Fetch;
use crate::group::{Group, GroupConfig, LogBounds};
use crate::install::Install;
use crate::parked::Parked;
use crate::plan::{Known, Step, next_step};
use crate::room::{Room, SAY_TICKS};
use crate::turn::Pending;

/// Milliseconds between two [`Input::Tick`]s.
pub const TICK_MS: u64 = 100;
/// Index and term behind which the log of a new group begins.
pub const FIRST: (u64, u64) = (5, 1);
/// Ticks between two looks at whether a group's members are as they should be.
const PLAN_TICKS: u64 = 5;
/// A member that lacks no more entries than this has caught up.
pub(crate) const CAUGHT_UP: u64 = 64;

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
    pub(crate) lonely: u32,
}

/// The state machine.
pub struct Core<D> {
    pub(crate) cfg: CoreConfig,
    pub(crate) disk: D,
    logger: slog::Logger,
    pub(crate) groups: BTreeMap<u32, Replica>,
    pub(crate) targets: BTreeMap<u32, Target>,
    /// Who waits, by token: the group. Sorted: the same inputs give the same actions in the same order.
    pub(crate) proposals: BTreeMap<u64, u32>,
    pub(crate) reads: BTreeMap<u64, u32>,
    pub(crate) outbox: BTreeMap<u64, Vec<Envelope>>,
    pub(crate) actions: VecDeque<Action>,
    pub(crate) pending: Option<Pending>,
    /// The disk had no room for it.
    pub(crate) full: bool,
    pub(crate) fetches: BTreeMap<u64, Fetch>,
    pub(crate) next_fetch: u64,
    pub(crate) ticks: u64,
    pub(crate) room: Room,
    bounds: LogBounds,
    /// The last time given to a command: a clock that is set back does not show in the log.
    pub(crate) last_ms: u64,
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

    pub(crate) fn add(&mut self, number: u32) -> Result<(), CoreError> {
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

    pub(crate) fn with(&mut self, group: u32, f: impl FnOnce(&mut Replica)) {
        if let Some(replica) = self.groups.get_mut(&group) {
            f(replica);
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
}
