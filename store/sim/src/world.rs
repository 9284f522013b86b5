//! A world: nodes, clients, a network and time, all driven by one queue of events from one seed.
//!
//! Nothing here reads a clock or draws chance from anywhere but its seed, and every list that is walked is sorted, so that a seed is a history. Its fingerprint is the trace
//! hash: every event goes into it in order.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::rc::Rc;
use std::task::{Context, Waker};

use tidepool_proto::cluster::NodeState;
use tidepool_store_core::{ClusterState, META_GROUP, NodeRecord, ShardMap, Write, keys};
use tidepool_store_raft::{Disk, DiskOp, FIRST, LogBounds, TICK_MS, bootstrap};

use crate::check::{Checker, Stats};
use crate::client::{self, Ctx, Directory, Effect, Shared, Task};
use crate::content::Content;
use crate::disk::{SimDisk, Stored};
use crate::faults::Faults;
use crate::net::Net;
use crate::node::{Clock, Env, Inbound, Node, Out, Start};
use crate::rng::{Rng, hash};
use crate::wire::{Answer, Fail, Packet, Request, Result};

/// How a world is made.
#[derive(Debug, Clone)]
pub struct Config {
    pub seed: u64,
    /// Nodes at the start.
    pub nodes: u64,
    /// Events before everything is healed and brought to an end.
    pub steps: u64,
    /// Print every event.
    pub trace: bool,
}

/// What happens.
pub(crate) enum Event {
    Tick {
        node: u64,
        run: u64,
    },
    Run {
        node: u64,
        run: u64,
    },
    Packet {
        from: u64,
        to: u64,
        packet: Packet,
    },
    Ask {
        to: u64,
        client: u32,
        call: u64,
        request: Request,
    },
    Answer {
        client: u32,
        call: u64,
        result: Result<Answer>,
    },
    FetchTimeout {
        node: u64,
        run: u64,
        fetch: u64,
    },
    Again {
        node: u64,
        run: u64,
        inbound: Inbound,
    },
    Restart(u64),
    /// The next fault.
    Strike,
    /// The end of the fault of this number.
    Heal(u64),
    /// A look at everything.
    Look,
}

/// An event and when it happens; of those at one time the first that was made comes first.
struct Due {
    at: u64,
    seq: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.seq == other.seq
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}

/// Whether a machine's process runs.
pub(crate) enum Process {
    Up(Box<Node>),
    Down(Box<SimDisk>),
    /// Gone for good, with its disk.
    Dead,
}

/// A machine.
pub(crate) struct Machine {
    pub(crate) process: Process,
    pub(crate) clock: Clock,
    pub(crate) paused_until: u64,
    runs: u64,
}

impl Machine {
    pub(crate) fn node(&self) -> Option<&Node> {
        match &self.process {
            Process::Up(node) => Some(node),
            _ => None,
        }
    }

    pub(crate) fn node_mut(&mut self) -> Option<&mut Node> {
        match &mut self.process {
            Process::Up(node) => Some(node),
            _ => None,
        }
    }

    pub(crate) fn disk(&self) -> Option<&SimDisk> {
        match &self.process {
            Process::Up(node) => Some(node.core.disk()),
            Process::Down(disk) => Some(disk),
            Process::Dead => None,
        }
    }

    pub(crate) fn disk_mut(&mut self) -> Option<&mut SimDisk> {
        match &mut self.process {
            Process::Up(node) => Some(node.core.disk_mut()),
            Process::Down(disk) => Some(disk),
            Process::Dead => None,
        }
    }
}

/// What a seed came to.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Outcome {
    pub seed: u64,
    pub steps: u64,
    /// Milliseconds of its time.
    pub time_ms: u64,
    pub violation: Option<String>,
    pub trace_hash: u64,
    pub stats: Stats,
    pub faults: BTreeMap<&'static str, u64>,
    /// Operations of clients that came to an end as they should.
    pub done: u64,
}

/// Everything.
pub struct World {
    pub(crate) cfg: Config,
    pub(crate) rng: Rng,
    pub(crate) now_us: u64,
    seq: u64,
    queue: BinaryHeap<Reverse<Due>>,
    pub(crate) machines: BTreeMap<u64, Machine>,
    pub(crate) net: Net,
    pub(crate) env: Env,
    pub(crate) shared: Rc<Shared>,
    tasks: BTreeMap<u32, Task>,
    /// The clients that keep the cluster in order at the end.
    admins: BTreeSet<u32>,
    open: BTreeMap<u64, u32>,
    pub(crate) faults: Faults,
    pub(crate) steps: u64,
    trace_hash: u64,
}

impl World {
    /// A new cluster with its clients.
    pub fn new(cfg: Config) -> Self {
        let seed = cfg.seed;
        let mut rng = Rng::new(seed, 1);
        let shards = match ShardMap::new(rng.between(1, 3) as u32) {
            Some(map) => map,
            None => unreachable!("one to three shards"),
        };
        let content = Rc::new(Content::new(&mut Rng::new(seed, 2), 24, 12));
        let ids: Vec<u64> = (1..=cfg.nodes).collect();
        let cluster = ClusterState {
            shards: shards.shards(),
            next_node: cfg.nodes + 1,
            nodes: ids.iter().map(|id| record(*id, rng.chance(30))).collect(),
            tokens: Vec::new(),
        };
        let row = Write::Put {
            key: keys::cluster(),
            value: cluster.encode(),
        };
        let mut initial = Stored::default();
        initial.change(&row);
        let checker = Checker::new(content.clone(), shards, initial, FIRST.0);
        let checker = Rc::new(RefCell::new(checker));
        // Short logs, so that members fall behind them.
        let bounds = LogBounds {
            keep: rng.between(2, 40),
            cut_at: rng.between(30, 160) as usize,
        };
        let env = Env {
            content: content.clone(),
            shards,
            checker: checker.clone(),
            bounds,
        };
        let shared = Rc::new(Shared {
            now_us: Cell::new(0),
            effects: RefCell::default(),
            answers: RefCell::default(),
            next: Cell::new(0),
            checker,
            content,
            shards,
            dir: RefCell::new(Directory {
                nodes: ids.clone(),
                ..Directory::default()
            }),
            ending: Cell::new(false),
        });
        let faults = Faults::new(&mut Rng::new(seed, 3));
        let mut world = Self {
            cfg,
            rng,
            now_us: 0,
            seq: 0,
            queue: BinaryHeap::new(),
            machines: BTreeMap::new(),
            net: Net::new(Rng::new(seed, 4)),
            env,
            shared,
            tasks: BTreeMap::new(),
            admins: BTreeSet::new(),
            open: BTreeMap::new(),
            faults,
            steps: 0,
            trace_hash: seed,
        };
        for id in &ids {
            let mut disk = world.new_disk(*id);
            let op = DiskOp::State {
                group: META_GROUP,
                write: row.clone(),
            };
            let mut made = disk.write(&[op], true);
            for group in shards.groups() {
                let target = tidepool_store_core::placement::target(&cluster, group);
                if target.voters.contains(id) {
                    made = made.and_then(|()| disk.write(&bootstrap(group, &target.voters), true));
                }
            }
            if made.is_err() {
                world.fail("a new disk refuses to be written".into());
            }
            world.add_machine(*id, disk);
        }
        world.add_clients();
        world.after(500_000, Event::Look);
        world.after(1_500_000, Event::Strike);
        world
    }

    fn new_disk(&mut self, id: u64) -> SimDisk {
        let rng = Rng::new(self.rng.word(), id);
        let mut disk = SimDisk::new(id, self.env.checker.clone(), rng);
        disk.sync_us = self.rng.between(100, 3000);
        disk
    }

    fn add_machine(&mut self, id: u64, disk: SimDisk) {
        let clock = Clock {
            rate_ppm: match self.faults.clocks && self.rng.chance(40) {
                true => self.rng.between(600_000, 1_600_000),
                false => self.rng.between(970_000, 1_030_000),
            },
            offset_ms: self.rng.between(0, 2000) as i64 - 1000,
        };
        let machine = Machine {
            process: Process::Down(Box::new(disk)),
            clock,
            paused_until: 0,
            runs: 0,
        };
        self.machines.insert(id, machine);
        self.start(id);
    }

    fn add_clients(&mut self) {
        let mut number = 0;
        let mut ctx = |world: &World| {
            number += 1;
            Ctx {
                id: number,
                shared: world.shared.clone(),
                rng: RefCell::new(Rng::new(world.cfg.seed, 100 + u64::from(number))),
            }
        };
        let mut tasks: Vec<(u32, Task)> = Vec::new();
        let mut add = |c: Ctx, make: fn(Ctx) -> Task| tasks.push((c.id, make(c)));
        for _ in 0..self.rng.between(2, 4) {
            add(ctx(self), client::host);
        }
        for _ in 0..2 {
            add(ctx(self), client::reader);
        }
        add(ctx(self), client::remover);
        add(ctx(self), client::expirer);
        for _ in 0..self.rng.between(1, 2) {
            add(ctx(self), client::collector);
        }
        let c = ctx(self);
        self.admins.insert(c.id);
        tasks.push((c.id, client::admin(c, self.faults.membership)));
        for (id, task) in tasks {
            self.tasks.insert(id, task);
            self.poll(id);
        }
    }

    pub(crate) fn fail(&self, reason: String) {
        self.env.checker.borrow_mut().fail(reason);
    }

    pub(crate) fn after(&mut self, us: u64, event: Event) {
        self.at(self.now_us + us, event);
    }

    pub(crate) fn at(&mut self, at: u64, event: Event) {
        self.seq += 1;
        let seq = self.seq;
        self.queue.push(Reverse(Due { at, seq, event }));
    }

    pub(crate) fn say(&self, text: impl FnOnce() -> String) {
        if self.cfg.trace {
            println!(
                "{:>8} {:>10.3}ms {}",
                self.steps,
                self.now_us as f64 / 1000.0,
                text()
            );
        }
    }

    fn note(&mut self, kind: u8, a: u64, b: u64) {
        let mut bytes = [0; 25];
        bytes[0] = kind;
        bytes[1..9].copy_from_slice(&self.now_us.to_le_bytes());
        bytes[9..17].copy_from_slice(&a.to_le_bytes());
        bytes[17..].copy_from_slice(&b.to_le_bytes());
        self.trace_hash = hash(self.trace_hash, &bytes);
    }

    /// Starts a machine's process, if it is down.
    pub(crate) fn start(&mut self, id: u64) {
        let taken: BTreeSet<usize> = (self.machines.values())
            .filter_map(|m| m.node().map(|n| n.election_ticks))
            .collect();
        // Distinct on every node, and another at every start: raft's own would come from a generator that nobody can seed.
        let free: Vec<usize> = (10..20).filter(|t| !taken.contains(t)).collect();
        let election_ticks = self.rng.pick(&free).copied().unwrap_or(10);
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let disk = match std::mem::replace(&mut machine.process, Process::Dead) {
            Process::Down(disk) => *disk,
            other => {
                machine.process = other;
                return;
            }
        };
        machine.runs += 1;
        machine.paused_until = 0;
        let start = Start {
            id,
            run: id * 1_000_000 + machine.runs,
            clock: machine.clock,
            election_ticks,
            now_us: self.now_us,
        };
        let rng = Rng::new(self.rng.word(), id);
        match Node::open(start, disk, self.env.clone(), rng) {
            Ok(mut node) => {
                let run = node.run;
                node.queued = true;
                machine.process = Process::Up(Box::new(node));
                self.after(50, Event::Run { node: id, run });
                let first = self.rng.below(TICK_MS * 1000);
                self.after(first, Event::Tick { node: id, run });
            }
            Err(e) => self.fail(format!("node {id} does not start: {e}")),
        }
    }

    /// A machine's process dies, and what it had not synced is in doubt.
    pub(crate) fn crash(&mut self, id: u64) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        machine.process = match std::mem::replace(&mut machine.process, Process::Dead) {
            Process::Up(node) => Process::Down(Box::new(node.core.into_disk().crash())),
            other => other,
        };
    }

    /// Runs the seed to its end.
    pub fn run(mut self) -> Outcome {
        while self.steps < self.cfg.steps && !self.is_over() {
            self.step();
        }
        if !self.is_over() {
            self.end();
        }
        let checker = self.env.checker.borrow();
        let dir = self.shared.dir.borrow();
        Outcome {
            seed: self.cfg.seed,
            steps: self.steps,
            time_ms: self.now_us / 1000,
            violation: checker.violation.clone(),
            trace_hash: hash(self.trace_hash, &checker.fingerprint().to_le_bytes()),
            stats: checker.stats,
            faults: self.faults.counts.clone(),
            done: dir.done,
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.env.checker.borrow().violation.is_some()
    }

    /// No client does anything any more but those that keep the cluster in order.
    pub(crate) fn stop_clients(&mut self) {
        self.tasks.retain(|id, _| self.admins.contains(id));
    }

    /// The next event.
    pub(crate) fn step(&mut self) {
        let Some(Reverse(due)) = self.queue.pop() else {
            return self.fail("nothing happens any more".into());
        };
        self.now_us = due.at;
        self.shared.now_us.set(due.at);
        self.net.set_clock(due.at);
        self.steps += 1;
        self.happen(due.event);
        self.effects();
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick { node, run } => {
                self.note(1, node, run);
                let now = self.now_us;
                let Some(machine) = self.machines.get_mut(&node) else {
                    return;
                };
                let rate = machine.clock.rate_ppm;
                let paused = machine.paused_until > now;
                let Some(up) = machine.node_mut().filter(|n| n.run == run) else {
                    return;
                };
                if !paused {
                    up.push(Inbound::Tick);
                    self.queue_run(node);
                }
                let period = TICK_MS * 1000 * 1_000_000 / rate;
                self.after(period, Event::Tick { node, run });
            }
            Event::Run { node, run } => self.run_node(node, run),
            Event::Packet { from, to, packet } => {
                let content = match &packet {
                    Packet::Envelopes(list) => list.iter().fold(0, |h, b| hash(h, b)),
                    _ => 1,
                };
                self.note(2, from << 32 | to, content);
                self.say(|| format!("{from} -> {to} {}", describe(&packet)));
                self.give(to, Inbound::Packet { from, packet });
            }
            Event::Ask {
                to,
                client,
                call,
                request,
            } => {
                self.note(3, to << 32 | u64::from(client), call);
                self.say(|| format!("client {client} asks {to}: {request:.200?}"));
                self.give(
                    to,
                    Inbound::Ask {
                        client,
                        call,
                        request,
                    },
                );
            }
            Event::Answer {
                client,
                call,
                result,
            } => {
                self.note(4, u64::from(client), call << 1 | u64::from(result.is_ok()));
                // Later copies, and answers that were waited for too long, go nowhere.
                if self.open.remove(&call).is_some() {
                    self.say(|| format!("client {client} hears {result:.200?}"));
                    self.shared.answers.borrow_mut().insert(call, result);
                    self.poll(client);
                }
            }
            Event::FetchTimeout { node, run, fetch } => {
                self.note(5, node, fetch);
                self.give_run(node, run, Inbound::FetchTimeout(fetch));
            }
            Event::Again { node, run, inbound } => {
                self.note(6, node, run);
                self.give_run(node, run, inbound);
            }
            Event::Restart(node) => {
                self.note(7, node, 0);
                self.say(|| format!("node {node} starts"));
                self.start(node);
            }
            Event::Strike => {
                self.note(8, 0, 0);
                self.strike();
            }
            Event::Heal(fault) => {
                self.note(9, fault, 0);
                self.heal(fault);
            }
            Event::Look => {
                let fingerprint = self.env.checker.borrow().fingerprint();
                self.note(10, fingerprint, 0);
                self.look();
                self.after(400_000, Event::Look);
            }
        }
    }

    fn give(&mut self, to: u64, inbound: Inbound) {
        let node = self.machines.get_mut(&to).and_then(Machine::node_mut);
        if let Some(node) = node {
            node.push(inbound);
            self.queue_run(to);
        }
    }

    fn give_run(&mut self, to: u64, run: u64, inbound: Inbound) {
        let node = self.machines.get(&to).and_then(Machine::node);
        if node.is_some_and(|n| n.run == run) {
            self.give(to, inbound);
        }
    }

    /// Has a node take what came, soon.
    fn queue_run(&mut self, id: u64) {
        let wait = self.rng.below(400);
        let now = self.now_us;
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let paused_until = machine.paused_until;
        let Some(node) = machine.node_mut().filter(|n| !n.queued) else {
            return;
        };
        node.queued = true;
        let run = node.run;
        let at = (now + wait).max(node.busy_until).max(paused_until);
        self.at(at, Event::Run { node: id, run });
    }

    fn run_node(&mut self, id: u64, run: u64) {
        self.note(11, id, run);
        let now = self.now_us;
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let (clock, paused_until) = (machine.clock, machine.paused_until);
        let Some(node) = machine.node_mut().filter(|n| n.run == run) else {
            return;
        };
        if paused_until > now {
            return self.at(paused_until, Event::Run { node: id, run });
        }
        node.queued = false;
        node.clock = clock;
        let result = node.process(now);
        let at = node.busy_until;
        let mut out = std::mem::take(&mut node.out);
        let late = out.split_off(node.early);
        self.send_out(id, run, now, out);
        if let Err(e) = result {
            // Nothing else that it was about to say is said.
            let expected = matches!(
                &e,
                tidepool_store_raft::CoreError::Disk(tidepool_store_raft::DiskError::Failed(_))
            );
            if !expected {
                self.fail(format!("node {id} stops: {e}"));
            }
            self.say(|| format!("node {id} dies of {e}"));
            self.crash(id);
            let rest = self.rng.between(50_000, 3_000_000);
            return self.after(rest, Event::Restart(id));
        }
        self.send_out(id, run, at, late);
    }

    /// Sends what a node said, at a time.
    fn send_out(&mut self, id: u64, run: u64, at: u64, out: Vec<Out>) {
        for out in out {
            match out {
                Out::Peer { to, packet } => {
                    for (delay, packet) in self.net.send(id, to, packet) {
                        let event = Event::Packet {
                            from: id,
                            to,
                            packet,
                        };
                        self.at(at + delay, event);
                    }
                }
                Out::Answer {
                    client,
                    call,
                    result,
                } => {
                    for delay in self.net.answer() {
                        let result = result.clone();
                        let event = Event::Answer {
                            client,
                            call,
                            result,
                        };
                        self.at(at + delay, event);
                    }
                }
                Out::FetchTimer(fetch) => {
                    let node = id;
                    self.at(at + 1_500_000, Event::FetchTimeout { node, run, fetch });
                }
                Out::Again(inbound) => {
                    let node = id;
                    self.at(at + 10, Event::Again { node, run, inbound });
                }
            }
        }
    }

    fn poll(&mut self, client: u32) {
        let Some(mut task) = self.tasks.remove(&client) else {
            return;
        };
        let mut cx = Context::from_waker(Waker::noop());
        if task.as_mut().poll(&mut cx).is_pending() {
            self.tasks.insert(client, task);
        }
    }

    /// What clients asked for.
    fn effects(&mut self) {
        let effects = std::mem::take(&mut *self.shared.effects.borrow_mut());
        for effect in effects {
            match effect {
                Effect::Call {
                    client,
                    call,
                    to,
                    request,
                    timeout_us,
                } => {
                    self.open.insert(call, client);
                    for delay in self.net.answer() {
                        let request = request.clone();
                        let event = Event::Ask {
                            to,
                            client,
                            call,
                            request,
                        };
                        self.after(delay, event);
                    }
                    let result = Err(Fail::Timeout);
                    let event = Event::Answer {
                        client,
                        call,
                        result,
                    };
                    self.after(timeout_us, event);
                }
                Effect::Sleep { client, call, us } => {
                    self.open.insert(call, client);
                    let result = Err(Fail::Timeout);
                    let event = Event::Answer {
                        client,
                        call,
                        result,
                    };
                    self.after(us, event);
                }
                Effect::Start(id) => {
                    if !self.machines.contains_key(&id) {
                        self.say(|| format!("node {id} joins"));
                        let disk = self.new_disk(id);
                        self.add_machine(id, disk);
                    }
                }
                Effect::Stop(id) => {
                    self.say(|| format!("node {id} is taken away"));
                    if let Some(machine) = self.machines.get_mut(&id) {
                        machine.process = Process::Dead;
                    }
                }
            }
        }
    }

    /// What an operator sees, and what must hold over all nodes together.
    fn look(&mut self) {
        let mut members: BTreeMap<u32, BTreeSet<u64>> = BTreeMap::new();
        let mut nodes = Vec::new();
        for (id, machine) in &self.machines {
            let Some(disk) = machine.disk() else { continue };
            nodes.push(*id);
            for (group, stored) in disk.stored() {
                let Some(conf) = &stored.conf else { continue };
                let all = members.entry(group).or_default();
                all.extend(conf.voters.iter().chain(&conf.voters_outgoing));
                if group != META_GROUP {
                    all.extend(conf.learners.iter().chain(&conf.learners_next));
                }
            }
        }
        let mut dir = self.shared.dir.borrow_mut();
        dir.nodes = nodes;
        dir.members = members
            .into_iter()
            .map(|(g, m)| (g, m.into_iter().collect()))
            .collect();
        drop(dir);
        let mut checker = self.env.checker.borrow_mut();
        let lost = checker.needed().find(|name| {
            // Whoever keeps the group: the entry may be in a log only.
            let group = self.env.shards.of_chunk(name);
            let mut disks = self.machines.values().filter_map(Machine::disk);
            let keeps = |d: &SimDisk| d.group(group).is_some_and(|g| g.conf.is_some());
            !disks.any(|d| keeps(d) && d.body(name) == Some(crate::disk::Body::Whole))
        });
        if let Some(name) = lost.copied() {
            let group = self.env.shards.of_chunk(&name);
            let has = |(id, m): (&u64, &Machine)| {
                let disk = m.disk()?;
                let applied = disk.group(group).map(|g| g.applied);
                Some(format!("node {id} at {applied:?} {:?}", disk.body(&name)))
            };
            let all: Vec<_> = self.machines.iter().filter_map(has).collect();
            checker.fail(format!(
                "no node has chunk {name} whole any more: {}",
                all.join(", ")
            ));
        }
    }
}

fn record(id: u64, zoned: bool) -> NodeRecord {
    let zone = match zoned {
        true => format!("z{}", id % 2),
        false => String::new(),
    };
    NodeRecord {
        id,
        addr: format!("10.0.0.{id}:1"),
        zone,
        state: NodeState::Active,
        key: [id as u8; 32],
    }
}

fn describe(packet: &Packet) -> String {
    match packet {
        Packet::Envelopes(list) => {
            let all = list
                .iter()
                .map(|b| match tidepool_store_raft::Envelope::decode(b) {
                    Ok(e) => match e.body {
                        tidepool_store_raft::Body::Raft(m) => format!(
                            "g{} {:?} t{} i{} lt{} c{} n{}{}",
                            e.group,
                            m.msg_type(),
                            m.term,
                            m.index,
                            m.log_term,
                            m.commit,
                            m.entries.len(),
                            if m.reject { " no" } else { "" }
                        ),
                        other => format!("g{} {other:?}", e.group),
                    },
                    Err(e) => e.to_string(),
                });
            all.collect::<Vec<_>>().join(", ")
        }
        other => format!("{other:.160?}"),
    }
}
