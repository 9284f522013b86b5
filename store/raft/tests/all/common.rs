//! Nodes with disks in memory, and a network that a test controls.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, HardState};
use tidepool_proto::{ChunkName, SessionId};
use tidepool_store_core::{Command, Reply, Write, keys, op};
use tidepool_store_raft::{
    Action, Core, CoreConfig, Disk, DiskError, DiskOp, Envelope, Input, LoadedLog, Order, Page,
    PageRequest, Rejection, Row, StagedRow, Target, bootstrap,
};

#[derive(Clone, Default)]
struct Stored {
    hard: HardState,
    conf: Option<ConfState>,
    cut: (u64, u64),
    applied: u64,
    entries: BTreeMap<u64, Entry>,
    state: BTreeMap<Vec<u8>, Vec<u8>>,
    stage: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A disk: what was written, and what of it survives a crash.
#[derive(Clone, Default)]
pub(crate) struct MemDisk {
    now: BTreeMap<u32, Stored>,
    durable: BTreeMap<u32, Stored>,
    pub(crate) bodies: BTreeSet<ChunkName>,
    pub(crate) full: bool,
}

impl MemDisk {
    /// Loses what was not synced.
    pub(crate) fn crash(mut self) -> Self {
        self.now = self.durable.clone();
        self
    }

    pub(crate) fn rows(&self, group: u32) -> BTreeMap<Vec<u8>, Vec<u8>> {
        self.now
            .get(&group)
            .map(|g| g.state.clone())
            .unwrap_or_default()
    }
}

impl Disk for MemDisk {
    fn write(&mut self, batch: &[DiskOp], sync: bool) -> Result<(), DiskError> {
        if self.full {
            return Err(DiskError::Full("a test's disk".into()));
        }
        for op in batch {
            match op.clone() {
                DiskOp::Entry { group, entry } => {
                    self.now
                        .entry(group)
                        .or_default()
                        .entries
                        .insert(entry.index, entry);
                }
                DiskOp::DropEntries { group, from, to } => {
                    let g = self.now.entry(group).or_default();
                    g.entries.retain(|i, _| *i < from || *i >= to);
                }
                DiskOp::Hard { group, hard } => self.now.entry(group).or_default().hard = hard,
                DiskOp::Conf { group, conf } => {
                    self.now.entry(group).or_default().conf = Some(conf);
                }
                DiskOp::Cut { group, index, term } => {
                    self.now.entry(group).or_default().cut = (index, term);
                }
                DiskOp::Applied { group, index } => {
                    self.now.entry(group).or_default().applied = index;
                }
                DiskOp::State { group, write } => {
                    let state = &mut self.now.entry(group).or_default().state;
                    match write {
                        Write::Put { key, value } => {
                            state.insert(key, value);
                        }
                        Write::Delete { key } => {
                            state.remove(&key);
                        }
                        Write::DeletePrefix { prefix } => {
                            state.retain(|k, _| !k.starts_with(&prefix));
                        }
                    }
                }
                DiskOp::ClearStage { group } => self.now.entry(group).or_default().stage.clear(),
                DiskOp::Stage { group, key, value } => {
                    self.now.entry(group).or_default().stage.insert(key, value);
                }
                DiskOp::Install { group } => {
                    let g = self.now.entry(group).or_default();
                    g.state = std::mem::take(&mut g.stage);
                }
                DiskOp::Destroy { group } => {
                    if let Some(old) = self.now.remove(&group) {
                        self.now.entry(group).or_default().hard = old.hard;
                    }
                }
            }
        }
        if sync {
            self.durable = self.now.clone();
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
        Ok(rows
            .take(limit)
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect())
    }

    fn has_body(&self, name: &ChunkName) -> Result<bool, DiskError> {
        Ok(self.bodies.contains(name))
    }

    fn delete_bodies(&mut self, group: u32, names: &[ChunkName]) -> Result<(), DiskError> {
        for name in names {
            if self.get(group, &keys::chunk(name))?.is_none() {
                self.bodies.remove(name);
            }
        }
        Ok(())
    }
}

/// Several nodes.
pub(crate) struct Cluster {
    pub(crate) nodes: BTreeMap<u64, Core<MemDisk>>,
    mail: VecDeque<(u64, u64, Envelope)>,
    /// Nothing goes from the first to the second.
    pub(crate) cut: BTreeSet<(u64, u64)>,
    /// Bodies asked of this node never come, and nobody says so.
    pub(crate) hangs: Option<u64>,
    /// Views of raft snapshots, frozen when their first page was asked for.
    views: BTreeMap<u64, Vec<Row>>,
    next: u64,
    pub(crate) answers: BTreeMap<u64, Result<Reply, Rejection>>,
    pub(crate) reads: BTreeMap<u64, Result<(), Rejection>>,
    /// Pages and bodies that were fetched.
    pub(crate) fetched: (usize, usize),
    /// Rows of a page.
    pub(crate) page_rows: usize,
    /// Every ask for bodies.
    pub(crate) asked: Vec<Ask>,
    /// If there is a list, fetches wait in it, see [`Cluster::release`].
    pub(crate) held: Option<Vec<(u64, Action)>>,
}

/// An ask for bodies, by `node` of `from`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ask {
    pub(crate) node: u64,
    pub(crate) from: u64,
    pub(crate) index: u64,
    pub(crate) names: Vec<ChunkName>,
}

fn config(node: u64, run: u64) -> CoreConfig {
    CoreConfig {
        node,
        run,
        election_ticks: Some(10 + node as usize),
    }
}

pub(crate) fn logger() -> slog::Logger {
    slog::Logger::root(slog::Discard, slog::o!())
}

impl Cluster {
    /// `voters` hold the groups from the start, `empty` are nodes without any.
    pub(crate) fn new(groups: &[u32], voters: &[u64], empty: &[u64]) -> Self {
        let mut nodes = BTreeMap::new();
        for node in voters.iter().chain(empty) {
            let mut disk = MemDisk::default();
            if voters.contains(node) {
                for group in groups {
                    disk.write(&bootstrap(*group, voters), true).unwrap();
                }
            }
            nodes.insert(
                *node,
                Core::open(config(*node, *node), disk, logger()).unwrap(),
            );
        }
        Self {
            nodes,
            mail: VecDeque::new(),
            cut: BTreeSet::new(),
            hangs: None,
            views: BTreeMap::new(),
            next: 1000,
            answers: BTreeMap::new(),
            reads: BTreeMap::new(),
            fetched: (0, 0),
            page_rows: 3,
            asked: Vec::new(),
            held: None,
        }
    }

    fn input(&mut self, node: u64, input: Input) {
        self.nodes.get_mut(&node).unwrap().handle(1, input).unwrap();
    }

    /// Delivers until nothing moves.
    pub(crate) fn settle(&mut self) {
        for _ in 0..10_000 {
            let numbers: Vec<u64> = self.nodes.keys().copied().collect();
            let mut moved = false;
            for node in numbers {
                self.nodes.get_mut(&node).unwrap().turn().unwrap();
                while let Some(action) = self.nodes.get_mut(&node).unwrap().poll_action() {
                    moved = true;
                    self.act(node, action);
                }
            }
            while let Some((from, to, envelope)) = self.mail.pop_front() {
                // Over the wire and back.
                let envelope = Envelope::decode(&envelope.encode()).unwrap();
                if !self.cut.contains(&(from, to)) && self.nodes.contains_key(&to) {
                    moved = true;
                    self.input(to, Input::Message { from, envelope });
                }
            }
            if !moved {
                return;
            }
        }
        panic!("the cluster does not come to rest");
    }

    fn act(&mut self, node: u64, action: Action) {
        let is_fetch = matches!(
            action,
            Action::FetchBodies { .. } | Action::FetchPage { .. }
        );
        if let Some(held) = self.held.as_mut().filter(|_| is_fetch) {
            return held.push((node, action));
        }
        match action {
            Action::Send { to, envelopes } => {
                self.mail
                    .extend(envelopes.into_iter().map(|e| (node, to, e)));
            }
            Action::Answer { token, result } => {
                assert!(
                    self.answers.insert(token, result).is_none(),
                    "answered twice"
                );
            }
            Action::ReadReady { token, result } => {
                assert!(self.reads.insert(token, result).is_none(), "answered twice");
            }
            Action::FetchBodies { from, .. } if self.hangs == Some(from) => {}
            Action::FetchBodies {
                fetch,
                from,
                group,
                index,
                names,
            } => {
                assert!(
                    self.asked.len() < 5000,
                    "bodies are asked for again and again"
                );
                self.asked.push(Ask {
                    node,
                    from,
                    index,
                    names: names.clone(),
                });
                if self.cut.contains(&(from, node)) || !self.nodes.contains_key(&from) {
                    return self.input(node, Input::FetchFailed { fetch });
                }
                let source = &self.nodes[&from];
                let applied = source.status(group).map_or(0, |s| s.applied);
                let rows = source.disk().rows(group);
                let (here, absent): (Vec<_>, Vec<_>) = names
                    .into_iter()
                    .partition(|n| source.disk().bodies.contains(n));
                let may_be_gone = applied >= index;
                let is_gone = |n: &ChunkName| may_be_gone && !rows.contains_key(&keys::chunk(n));
                let gone = absent.into_iter().filter(is_gone).collect();
                let disk = self.nodes.get_mut(&node).unwrap().disk_mut();
                let before = disk.bodies.len();
                disk.bodies.extend(here);
                self.fetched.1 += disk.bodies.len() - before;
                self.input(node, Input::BodiesFetched { fetch, gone });
            }
            Action::FetchPage {
                fetch,
                from,
                request,
            } => match self.serve(from, &request) {
                Some(page) if !self.cut.contains(&(from, node)) => {
                    self.fetched.0 += 1;
                    self.input(node, Input::PageFetched { fetch, page });
                }
                _ => self.input(node, Input::FetchFailed { fetch }),
            },
            Action::Changed { .. } => {}
        }
    }

    /// Lets one of the fetches that wait be answered, and others wait still.
    pub(crate) fn release(&mut self, at: usize) {
        let (node, action) = self.held.as_mut().unwrap().remove(at);
        let held = self.held.take();
        self.act(node, action);
        self.held = held;
        self.settle();
    }

    /// Nothing goes between these and all others.
    pub(crate) fn part(&mut self, nodes: &[u64]) {
        for other in self.nodes.keys().filter(|n| !nodes.contains(n)) {
            for node in nodes {
                self.cut.extend([(*node, *other), (*other, *node)]);
            }
        }
    }

    fn serve(&mut self, from: u64, request: &PageRequest) -> Option<Page> {
        let core = self.nodes.get(&from)?;
        let (index, term, conf) = core.view_point(request.group)?;
        let mut view = request.view;
        if view == 0 {
            // The tests let nothing be applied between two pages, so that index and term of later ones are the same.
            self.next += 1;
            view = self.next;
            let rows = core.disk().rows(request.group).into_iter();
            let rows = rows.map(|(k, v)| Row {
                key: k.into(),
                value: v.into(),
            });
            self.views.insert(view, rows.collect());
        }
        let mut rows: Vec<Row> = self.views.get(&view)?.clone();
        rows.retain(|r| *r.key > *request.after);
        let last = rows.len() <= self.page_rows;
        rows.truncate(self.page_rows);
        Some(Page {
            view,
            index,
            term,
            conf: Page::encode_members(&conf),
            rows,
            last,
        })
    }

    pub(crate) fn ticks(&mut self, n: usize) {
        for _ in 0..n {
            let numbers: Vec<u64> = self.nodes.keys().copied().collect();
            for node in numbers {
                self.input(node, Input::Tick);
            }
            self.settle();
        }
    }

    pub(crate) fn leader(&self, group: u32) -> Option<u64> {
        let leading = self
            .nodes
            .iter()
            .filter(|(_, n)| n.status(group).is_some_and(|s| s.leads));
        leading
            .max_by_key(|(_, n)| n.status(group).map(|s| s.term))
            .map(|(id, _)| *id)
    }

    /// Lets time pass until the group has a leader outside `but`.
    pub(crate) fn elect(&mut self, group: u32, but: Option<u64>) -> u64 {
        for _ in 0..300 {
            self.ticks(1);
            if let Some(leader) = self.leader(group).filter(|l| Some(*l) != but) {
                return leader;
            }
        }
        panic!("nobody leads group {group}");
    }

    pub(crate) fn propose(&mut self, node: u64, group: u32, command: Command) -> u64 {
        self.next += 1;
        let token = self.next;
        let command = Box::new(command);
        self.input(
            node,
            Input::Propose {
                group,
                token,
                command,
            },
        );
        token
    }

    /// Stores a body on the leader and proposes its chunk.
    pub(crate) fn add(&mut self, node: u64, group: u32, number: u8) -> u64 {
        let name = chunk(number);
        self.nodes
            .get_mut(&node)
            .unwrap()
            .disk_mut()
            .bodies
            .insert(name);
        self.propose(node, group, add_chunk(number))
    }

    pub(crate) fn read(&mut self, node: u64, group: u32) -> u64 {
        self.next += 1;
        let token = self.next;
        self.input(node, Input::Read { group, token });
        token
    }

    pub(crate) fn room(&mut self, node: u64, room: bool) {
        self.input(node, Input::Room(room));
    }

    pub(crate) fn target(&mut self, group: u32, voters: &[u64], learners: &[u64]) {
        let target = Target {
            group,
            voters: voters.to_vec(),
            learners: learners.to_vec(),
        };
        let numbers: Vec<u64> = self.nodes.keys().copied().collect();
        for node in numbers {
            self.input(node, Input::Order(Order::Target(target.clone())));
        }
    }

    /// The process dies and comes back; what was not synced is gone.
    pub(crate) fn crash(&mut self, node: u64) {
        let disk = self.nodes.remove(&node).unwrap().into_disk().crash();
        self.next += 1;
        let core = Core::open(config(node, self.next), disk, logger()).unwrap();
        self.nodes.insert(node, core);
    }

    pub(crate) fn rows(&self, node: u64, group: u32) -> BTreeMap<Vec<u8>, Vec<u8>> {
        self.nodes[&node].disk().rows(group)
    }
}

pub(crate) fn chunk(number: u8) -> ChunkName {
    ChunkName([number; 32])
}

pub(crate) fn collect(round: u64) -> [Command; 2] {
    let begin = op::Op::BeginRound(op::Round { round });
    let cut = op::Op::Cut(op::Round { round });
    [Command::new(0, begin), Command::new(0, cut)]
}

pub(crate) fn sweep(round: u64, number: u8) -> Command {
    let names = Bytes::copy_from_slice(&[number; 32]);
    Command::new(0, op::Op::Sweep(op::Sweep { round, names }))
}

pub(crate) fn add_chunk(number: u8) -> Command {
    add_chunks(&[number])
}

pub(crate) fn add_chunks(numbers: &[u8]) -> Command {
    let names: Vec<u8> = numbers.iter().flat_map(|n| [*n; 32]).collect();
    let lens: Vec<u8> = numbers.iter().flat_map(|_| 100u32.to_le_bytes()).collect();
    Command::new(
        0,
        op::Op::AddChunks(op::AddChunks {
            session: Bytes::copy_from_slice(&SessionId([1; 16]).0),
            expires_ms: 1 << 40,
            names: names.into(),
            lens: lens.into(),
            kinds: vec![op::BROUGHT; numbers.len()].into(),
        }),
    )
}
