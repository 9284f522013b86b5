//! What goes wrong. Every seed has a choice of kinds of faults and how often they come, so that some seeds are full of crashes and others of cuts.
//!
//! The fault model, that is, all that a store has to bear, together and at any moment:
//! - messages between nodes, and between clients and nodes, are lost, delayed, doubled, reordered and cut off, one way or both;
//! - processes and machines crash, one or all of them, in the midst of a write, and lose what was not synced, as [`crate::disk`] says;
//! - disks are full or slow for a while; processes stand still for a while; clocks are wrong, jump, and go at different rates;
//! - bodies rot, but not the second copy of one before the first is repaired: only while two other nodes hold it whole;
//! - machines die for good, but only one at a time (the next when the operator has removed the last), only while every group keeps a majority of
//!   its voters, two at least, and only while every recorded chunk has a whole copy elsewhere.
//!
//! Outside of it: the last whole copy of a body goes, a majority of a group's voters dies, a disk takes back what it said was synced.

use std::collections::BTreeMap;

use tidepool_proto::ChunkName;

use crate::node::Inbound;
use crate::rng::Rng;
use crate::world::{Event, Machine, Process, World};

/// The kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Crash,
    TornWrite,
    CrashAll,
    Partition,
    OneWay,
    CutLeader,
    Loss,
    Full,
    Slow,
    Rot,
    ClockJump,
    Pause,
    Transfer,
    Death,
}

const KINDS: [Kind; 14] = [
    Kind::Crash,
    Kind::TornWrite,
    Kind::CrashAll,
    Kind::Partition,
    Kind::OneWay,
    Kind::CutLeader,
    Kind::Loss,
    Kind::Full,
    Kind::Slow,
    Kind::Rot,
    Kind::ClockJump,
    Kind::Pause,
    Kind::Transfer,
    Kind::Death,
];

/// What ends when a fault is healed.
enum Mend {
    Cut(Vec<(u64, u64)>),
    Loss(u64),
    Full(u64),
    Slow(u64, u64),
}

/// The faults of a seed.
pub(crate) struct Faults {
    kinds: Vec<Kind>,
    /// The longest time between two, in milliseconds.
    pace_ms: u64,
    next: u64,
    mends: BTreeMap<u64, Mend>,
    /// Clocks go at different rates.
    pub(crate) clocks: bool,
    /// Nodes come and go.
    pub(crate) membership: bool,
    pub(crate) counts: BTreeMap<&'static str, u64>,
}

impl Faults {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let kinds = KINDS.into_iter().filter(|_| rng.chance(60)).collect();
        Self {
            kinds,
            pace_ms: [600, 2000, 5000][rng.below(3) as usize],
            next: 0,
            mends: BTreeMap::new(),
            clocks: rng.chance(50),
            membership: rng.chance(60),
            counts: BTreeMap::new(),
        }
    }
}

impl World {
    /// The next fault.
    pub(crate) fn strike(&mut self) {
        if self.shared.ending.get() {
            return;
        }
        let wait = self.rng.between(100, self.faults.pace_ms) * 1000;
        self.after(wait, Event::Strike);
        let Some(kind) = self.rng.pick(&self.faults.kinds).copied() else {
            return;
        };
        let up: Vec<u64> = (self.machines.iter())
            .filter(|(_, m)| m.node().is_some())
            .map(|(id, _)| *id)
            .collect();
        let Some(node) = self.rng.pick(&up).copied() else {
            return;
        };
        let name = match kind {
            Kind::Crash => {
                self.crash(node);
                let rest = self.rng.between(20_000, 6_000_000);
                self.after(rest, Event::Restart(node));
                "crash"
            }
            Kind::TornWrite => {
                let writes = self.rng.below(6) as u32;
                if let Some(disk) = self.machines.get_mut(&node).and_then(Machine::disk_mut) {
                    disk.fail_in = Some(writes);
                }
                "torn write"
            }
            Kind::CrashAll => {
                for id in &up {
                    self.crash(*id);
                    let rest = self.rng.between(20_000, 2_000_000);
                    self.after(rest, Event::Restart(*id));
                }
                "crash of all"
            }
            Kind::Partition => {
                let side: Vec<bool> = up.iter().map(|_| self.rng.chance(50)).collect();
                let mut cut = Vec::new();
                for (a, left) in up.iter().zip(&side) {
                    for (b, right) in up.iter().zip(&side) {
                        if left != right {
                            cut.push((*a, *b));
                        }
                    }
                }
                self.cut(cut);
                "partition"
            }
            Kind::OneWay => {
                let to = self.rng.pick(&up).copied();
                let all = self.rng.chance(40);
                let outward = self.rng.chance(50);
                let others = up
                    .iter()
                    .filter(|o| **o != node && (all || Some(**o) == to));
                let cut = others.map(|o| if outward { (node, *o) } else { (*o, node) });
                let cut = cut.collect();
                self.cut(cut);
                "one-way cut"
            }
            Kind::CutLeader => {
                let group = self.rng.below(u64::from(self.env.shards.shards()) + 1) as u32;
                let leads = |m: &Machine| {
                    let status = m.node().and_then(|n| n.core.status(group));
                    status.is_some_and(|s| s.leads)
                };
                let leader = self
                    .machines
                    .iter()
                    .find(|(_, m)| leads(m))
                    .map(|(id, _)| *id);
                let leader = leader.unwrap_or(node);
                let others = up.iter().filter(|o| **o != leader);
                let cut = others.flat_map(|o| [(leader, *o), (*o, leader)]).collect();
                self.cut(cut);
                "leader cut off"
            }
            Kind::Loss => {
                let before = self.net.loss;
                self.net.loss = self.rng.between(5, 40);
                self.mend_later(Mend::Loss(before));
                "loss"
            }
            Kind::Full => {
                if let Some(disk) = self.machines.get_mut(&node).and_then(Machine::disk_mut) {
                    disk.full = true;
                }
                self.mend_later(Mend::Full(node));
                "full disk"
            }
            Kind::Slow => {
                let slow = self.rng.between(20_000, 400_000);
                if let Some(disk) = self.machines.get_mut(&node).and_then(Machine::disk_mut) {
                    let before = disk.sync_us.min(3000);
                    disk.sync_us = slow;
                    self.mend_later(Mend::Slow(node, before));
                }
                "slow disk"
            }
            Kind::Rot => {
                self.rot(node);
                "bit rot"
            }
            Kind::ClockJump => {
                let jump = self.rng.between(0, 240_000) as i64 - 120_000;
                if let Some(machine) = self.machines.get_mut(&node) {
                    machine.clock.offset_ms += jump;
                }
                "clock jump"
            }
            Kind::Pause => {
                let pause = self.rng.between(100_000, 6_000_000);
                let until = self.now_us + pause;
                if let Some(machine) = self.machines.get_mut(&node) {
                    machine.paused_until = until;
                }
                "pause"
            }
            Kind::Transfer => {
                let group = self.rng.below(u64::from(self.env.shards.shards()) + 1) as u32;
                for id in &up {
                    let node = self.machines.get_mut(id).and_then(Machine::node_mut);
                    if let Some(up) = node {
                        up.push(Inbound::Transfer {
                            group,
                            to: node_of(
                                &mut self.rng,
                                self.shared.dir.borrow().members.get(&group),
                                *id,
                            ),
                        });
                    }
                }
                "leader moved"
            }
            Kind::Death => {
                if !self.can_lose(node) {
                    return;
                }
                if let Some(machine) = self.machines.get_mut(&node) {
                    machine.process = Process::Dead;
                }
                self.shared.dir.borrow_mut().dead.push(node);
                "death"
            }
        };
        self.say(|| format!("fault: {name} {node}"));
        *self.faults.counts.entry(name).or_default() += 1;
        if self.rng.chance(20) {
            self.scrub(node);
        }
    }

    pub(crate) fn scrub(&mut self, id: u64) {
        if let Some(node) = self.machines.get_mut(&id).and_then(Machine::node_mut) {
            node.push(Inbound::Scrub);
        }
    }

    fn mend_later(&mut self, mend: Mend) {
        self.faults.next += 1;
        let number = self.faults.next;
        self.faults.mends.insert(number, mend);
        let rest = self.rng.between(200_000, 8_000_000);
        self.after(rest, Event::Heal(number));
    }

    fn cut(&mut self, links: Vec<(u64, u64)>) {
        self.net.cut.extend(links.iter().copied());
        self.mend_later(Mend::Cut(links));
    }

    /// A fault ends.
    pub(crate) fn heal(&mut self, number: u64) {
        match self.faults.mends.remove(&number) {
            Some(Mend::Cut(links)) => {
                for link in links {
                    self.net.cut.remove(&link);
                }
            }
            Some(Mend::Loss(before)) => self.net.loss = before,
            Some(Mend::Full(node)) => {
                if let Some(disk) = self.machines.get_mut(&node).and_then(Machine::disk_mut) {
                    disk.full = false;
                }
            }
            Some(Mend::Slow(node, before)) => {
                if let Some(disk) = self.machines.get_mut(&node).and_then(Machine::disk_mut) {
                    disk.sync_us = before;
                }
            }
            None => {}
        }
    }

    /// All faults end, and all machines run.
    pub(crate) fn heal_all(&mut self) {
        let open: Vec<u64> = self.faults.mends.keys().copied().collect();
        open.into_iter().for_each(|number| self.heal(number));
        self.net.heal();
        let ids: Vec<u64> = self.machines.keys().copied().collect();
        for id in ids {
            if let Some(machine) = self.machines.get_mut(&id) {
                machine.paused_until = 0;
                if let Some(disk) = machine.disk_mut() {
                    disk.full = false;
                    disk.fail_in = None;
                    disk.sync_us = disk.sync_us.min(3000);
                }
            }
            self.start(id);
        }
    }

    /// Lets one body rot, if two others are whole: a store promises nothing where all copies rot.
    fn rot(&mut self, node: u64) {
        let Some(disk) = self.machines.get(&node).and_then(Machine::disk) else {
            return;
        };
        let names: Vec<ChunkName> = disk.body_names().copied().collect();
        let Some(name) = self.rng.pick(&names).copied() else {
            return;
        };
        let checker = self.env.checker.clone();
        let whole = self.machines.iter().filter(|(id, m)| {
            **id != node && m.disk().is_some_and(|d| checker.borrow().holds(&name, d))
        });
        if whole.count() >= 2
            && let Some(disk) = self.machines.get_mut(&node).and_then(Machine::disk_mut)
        {
            disk.rot(&name);
        }
    }

    /// Whether a cluster may lose this node for good: every group keeps a quorum of living members, whoever's list of them is
    /// asked, and every recorded chunk a whole copy on another.
    fn can_lose(&self, node: u64) -> bool {
        if !self.shared.dir.borrow().dead.is_empty() {
            return false;
        }
        let lives = |id: &u64| {
            let machine = self.machines.get(id);
            *id != node && machine.is_some_and(|m| !matches!(m.process, Process::Dead))
        };
        for machine in self.machines.values() {
            let Some(disk) = machine.disk() else { continue };
            for (group, stored) in disk.stored() {
                let Some(conf) = &stored.conf else { continue };
                for voters in [&conf.voters, &conf.voters_outgoing] {
                    let alive = voters.iter().filter(|v| lives(v)).count();
                    if !voters.is_empty() && (alive <= voters.len() / 2 || alive < 2) {
                        return false;
                    }
                }
                let _ = group;
            }
        }
        let checker = self.env.checker.borrow();
        checker.recorded().all(|name| {
            let others = self.machines.iter().filter(|(id, _)| **id != node);
            let whole = others.filter(|(_, m)| m.disk().is_some_and(|d| checker.holds(name, d)));
            whole.count() >= 1
        })
    }
}

/// One of a group's members other than this one, or this one.
fn node_of(rng: &mut Rng, members: Option<&Vec<u64>>, not: u64) -> u64 {
    let others: Vec<u64> = members
        .into_iter()
        .flatten()
        .copied()
        .filter(|m| *m != not)
        .collect();
    rng.pick(&others).copied().unwrap_or(not)
}
