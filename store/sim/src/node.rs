//! One node: the production core over a simulated disk, and the little of a store around it that executes its actions and answers clients.
//!
//! What comes in waits in an inbox; a run takes all of it, gives it to the core, has the core take its turn, and does what that
//! asks for. The node is then busy for as long as its disk took, and what it sends leaves when that is over.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use tidepool_proto::ChunkName;
use tidepool_proto::cluster::NodeState;
use tidepool_proto::wire::join_names;
use tidepool_store_core::{
    ClusterState, Command, META_GROUP, Reply, ShardMap, bugs, keys, op, placement,
};
use tidepool_store_raft::{
    Action, Core, CoreConfig, CoreError, Disk, Envelope, Input, LogBounds, MAX_ENVELOPE, Order,
    Page, PageRequest, Rejection, Row, Target,
};

use crate::check::Checker;
use crate::content::Content;
use crate::disk::{Body, SimDisk};
use crate::rng::Rng;
use crate::serve;
use crate::wire::{Answer, Fail, Packet, Query, Request, Result};

/// How often a put brings bodies that a collection took from under it.
const PUT_ROUNDS: u32 = 3;
/// Views of raft snapshots that are kept.
const VIEWS: usize = 4;
/// The wall clock at the start of a world, in milliseconds.
const EPOCH_MS: u64 = 1_800_000_000_000;

/// What every node knows of its world.
#[derive(Clone)]
pub(crate) struct Env {
    pub(crate) content: Rc<Content>,
    pub(crate) shards: ShardMap,
    pub(crate) checker: Rc<RefCell<Checker>>,
    pub(crate) bounds: LogBounds,
}

/// What comes in.
pub(crate) enum Inbound {
    Packet {
        from: u64,
        packet: Packet,
    },
    Ask {
        client: u32,
        call: u64,
        request: Request,
    },
    Tick,
    FetchTimeout(u64),
    Transfer {
        group: u32,
        to: u64,
    },
    Scrub,
}

/// What goes out.
pub(crate) enum Out {
    Peer {
        to: u64,
        packet: Packet,
    },
    Answer {
        client: u32,
        call: u64,
        result: Result<Answer>,
    },
    FetchTimer(u64),
    /// To the node itself, once its run is over.
    Again(Inbound),
}

/// A node's clock: faster or slower than time, and wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    pub(crate) rate_ppm: u64,
    pub(crate) offset_ms: i64,
}

impl Clock {
    pub(crate) fn wall_ms(&self, now_us: u64) -> u64 {
        let own = now_us / 1000 * self.rate_ppm / 1_000_000;
        (EPOCH_MS + own).saturating_add_signed(self.offset_ms)
    }
}

enum Waiter {
    Client { client: u32, call: u64 },
    Put(u64),
}

struct Put {
    client: u32,
    call: u64,
    group: u32,
    session: [u8; 16],
    expires_ms: u64,
    names: Vec<ChunkName>,
    stored: BTreeSet<ChunkName>,
    rounds: u32,
}

struct Asked {
    client: u32,
    call: u64,
    group: u32,
    floor: u64,
    query: Query,
}

struct View {
    index: u64,
    term: u64,
    conf: bytes::Bytes,
    rows: Vec<Row>,
}

/// A node whose process runs.
pub(crate) struct Node {
    pub(crate) id: u64,
    /// Which run of its process this is.
    pub(crate) run: u64,
    pub(crate) election_ticks: usize,
    pub(crate) clock: Clock,
    pub(crate) core: Core<SimDisk>,
    env: Env,
    rng: Rng,
    inbox: VecDeque<Inbound>,
    /// A run is due.
    pub(crate) queued: bool,
    pub(crate) busy_until: u64,
    waiters: BTreeMap<u64, Waiter>,
    asked: BTreeMap<u64, Asked>,
    puts: BTreeMap<u64, Put>,
    views: BTreeMap<u64, View>,
    next: u64,
    cluster: Option<Vec<u8>>,
    removed: BTreeSet<u64>,
    ticks: u64,
    pub(crate) out: Vec<Out>,
    /// How much of it goes before the disk is waited for.
    pub(crate) early: usize,
}

/// How a node starts.
pub(crate) struct Start {
    pub(crate) id: u64,
    pub(crate) run: u64,
    pub(crate) clock: Clock,
    pub(crate) election_ticks: usize,
    pub(crate) now_us: u64,
}

impl Node {
    pub(crate) fn open(
        start: Start,
        disk: SimDisk,
        env: Env,
        rng: Rng,
    ) -> std::result::Result<Self, CoreError> {
        let cfg = CoreConfig {
            node: start.id,
            run: start.run,
            election_ticks: Some(start.election_ticks),
        };
        bugs::set_clock(start.clock.wall_ms(start.now_us));
        let mut core = Core::open(cfg, disk, slog::Logger::root(slog::Discard, slog::o!()))?;
        core.set_log_bounds(env.bounds);
        Ok(Self {
            id: start.id,
            run: start.run,
            election_ticks: start.election_ticks,
            clock: start.clock,
            core,
            env,
            rng,
            inbox: VecDeque::new(),
            queued: false,
            busy_until: start.now_us,
            waiters: BTreeMap::new(),
            asked: BTreeMap::new(),
            puts: BTreeMap::new(),
            views: BTreeMap::new(),
            next: 1,
            cluster: None,
            removed: BTreeSet::new(),
            ticks: 0,
            out: Vec::new(),
            early: 0,
        })
    }

    pub(crate) fn push(&mut self, inbound: Inbound) {
        self.inbox.push_back(inbound);
    }

    fn token(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn answer(&mut self, client: u32, call: u64, result: Result<Answer>) {
        self.out.push(Out::Answer {
            client,
            call,
            result,
        });
    }

    /// Takes everything that waits, and has the core take its turn.
    pub(crate) fn process(&mut self, now_us: u64) -> std::result::Result<(), CoreError> {
        self.early = 0;
        let now_ms = self.clock.wall_ms(now_us);
        bugs::set_clock(now_ms);
        self.core.disk_mut().spent_us = 0;
        while let Some(inbound) = self.inbox.pop_front() {
            self.take(now_ms, inbound)?;
        }
        // What goes before the disk is waited for goes even if the node dies of its write.
        self.core.prepare();
        while let Some(action) = self.core.poll_action() {
            self.act(now_ms, action)?;
        }
        self.early = self.out.len();
        self.core.turn()?;
        while let Some(action) = self.core.poll_action() {
            self.act(now_ms, action)?;
        }
        let touched = std::mem::take(&mut self.core.disk_mut().touched);
        self.env
            .checker
            .borrow_mut()
            .check_bodies(self.id, self.core.disk(), touched.into_iter());
        self.look_at_cluster(now_ms)?;
        self.busy_until = now_us + self.core.disk().spent_us + 30;
        Ok(())
    }

    fn take(&mut self, now_ms: u64, inbound: Inbound) -> std::result::Result<(), CoreError> {
        match inbound {
            Inbound::Tick => {
                self.ticks += 1;
                // What should be where is said again now and then.
                if self.ticks.is_multiple_of(40) {
                    self.cluster = None;
                }
                let room = !self.core.disk().full;
                self.core.handle(now_ms, Input::Room(room))?;
                self.core.handle(now_ms, Input::Tick)
            }
            Inbound::Packet { from, packet } => match self.removed.contains(&from) {
                true => Ok(()),
                false => self.packet(now_ms, from, packet),
            },
            Inbound::Ask {
                client,
                call,
                request,
            } => self.ask(now_ms, client, call, request),
            Inbound::FetchTimeout(fetch) => self.core.handle(now_ms, Input::FetchFailed { fetch }),
            Inbound::Transfer { group, to } => {
                let order = Input::Order(Order::Transfer { group, to });
                self.core.handle(now_ms, order)
            }
            Inbound::Scrub => {
                self.scrub();
                Ok(())
            }
        }
    }

    fn packet(
        &mut self,
        now_ms: u64,
        from: u64,
        packet: Packet,
    ) -> std::result::Result<(), CoreError> {
        match packet {
            Packet::Envelopes(list) => {
                for bytes in list {
                    match Envelope::decode(&bytes) {
                        Ok(envelope) => self
                            .core
                            .handle(now_ms, Input::Message { from, envelope })?,
                        Err(e) => self.env.checker.borrow_mut().fail(format!(
                            "node {from} sent what node {} cannot read: {e}",
                            self.id
                        )),
                    }
                }
                Ok(())
            }
            Packet::AskBodies {
                run,
                fetch,
                group,
                index,
                names,
            } => {
                let (whole, gone) = self.bodies(group, index, &names);
                let packet = Packet::Bodies {
                    run,
                    fetch,
                    whole,
                    gone,
                };
                self.out.push(Out::Peer { to: from, packet });
                Ok(())
            }
            Packet::Bodies {
                run,
                fetch,
                whole,
                gone,
            } => {
                if run != self.run {
                    return Ok(());
                }
                for name in whole {
                    if self.core.disk_mut().put_body(name).is_err() {
                        return self.core.handle(now_ms, Input::FetchFailed { fetch });
                    }
                }
                self.core
                    .handle(now_ms, Input::BodiesFetched { fetch, gone })
            }
            Packet::AskPage {
                run,
                fetch,
                request,
            } => {
                let packet = match self.page(&request) {
                    Some(page) => Packet::Page { run, fetch, page },
                    None => Packet::Refused { run, fetch },
                };
                self.out.push(Out::Peer { to: from, packet });
                Ok(())
            }
            Packet::Page { run, fetch, page } if run == self.run => {
                self.core.handle(now_ms, Input::PageFetched { fetch, page })
            }
            Packet::Refused { run, fetch } if run == self.run => {
                self.core.handle(now_ms, Input::FetchFailed { fetch })
            }
            Packet::Page { .. } | Packet::Refused { .. } => Ok(()),
            Packet::AskRepair { names } => {
                let disk = self.core.disk_mut();
                let names: Vec<_> = names
                    .into_iter()
                    .filter(|n| disk.read_body(n) == Some(Body::Whole))
                    .collect();
                if !names.is_empty() {
                    let packet = Packet::Repair { names };
                    self.out.push(Out::Peer { to: from, packet });
                }
                Ok(())
            }
            Packet::Repair { names } => {
                for name in names {
                    let group = self.env.shards.of_chunk(&name);
                    let disk = self.core.disk_mut();
                    // What was collected meanwhile is not brought back.
                    if let Ok(Some(_)) = disk.get(group, &keys::chunk(&name)) {
                        let _ = disk.put_body(name);
                    }
                }
                Ok(())
            }
        }
    }

    /// Which of these bodies are whole here, and which were collected.
    fn bodies(
        &mut self,
        group: u32,
        index: u64,
        names: &[ChunkName],
    ) -> (Vec<ChunkName>, Vec<ChunkName>) {
        let applied = self.core.status(group).map(|s| s.applied);
        let most = self.rng.between(1, 8) as usize;
        let (mut whole, mut gone) = (Vec::new(), Vec::new());
        for name in names {
            let disk = self.core.disk_mut();
            match disk.read_body(name) {
                Some(Body::Whole) => whole.push(*name),
                Some(Body::Rotten) => {}
                None => {
                    let row = disk.get(group, &keys::chunk(name));
                    if matches!(row, Ok(None)) && applied.is_some_and(|a| a >= index) {
                        gone.push(*name);
                    }
                }
            }
        }
        whole.truncate(most);
        (whole, gone)
    }

    fn page(&mut self, request: &PageRequest) -> Option<Page> {
        let mut view = request.view;
        if view == 0 {
            let (index, term, conf) = self.core.view_point(request.group)?;
            let state = &self.core.disk().group(request.group)?.state;
            let rows = state.iter().map(|(k, v)| Row {
                key: k.clone().into(),
                value: v.clone().into(),
            });
            let new = View {
                index,
                term,
                conf: Page::encode_members(&conf),
                rows: rows.collect(),
            };
            view = self.token();
            self.views.insert(view, new);
            while self.views.len() > VIEWS {
                self.views.pop_first();
            }
        }
        let most = self.rng.between(3, 40) as usize;
        let from = self.views.get(&view)?;
        let mut rows = from.rows.iter().filter(|r| *r.key > *request.after);
        let page: Vec<Row> = rows.by_ref().take(most).cloned().collect();
        Some(Page {
            view,
            index: from.index,
            term: from.term,
            conf: from.conf.clone(),
            rows: page,
            last: rows.next().is_none(),
        })
    }

    /// Reads some bodies, and asks another member for good copies of the damaged ones.
    fn scrub(&mut self) {
        let names: Vec<ChunkName> = self.core.disk().body_names().copied().collect();
        for name in names {
            self.core.disk_mut().read_body(&name);
        }
        let mut bad: BTreeMap<u32, Vec<ChunkName>> = BTreeMap::new();
        for group in self.env.shards.shard_groups() {
            let Some(stored) = self.core.disk().group(group) else {
                continue;
            };
            for (key, _) in stored.with_prefix(&keys::table(keys::Table::Chunk)) {
                if let Ok(name) = <[u8; 32]>::try_from(&key[1..]) {
                    let name = ChunkName(name);
                    if !matches!(self.core.disk().has_body(&name), Ok(true)) {
                        bad.entry(group).or_default().push(name);
                    }
                }
            }
        }
        for (group, names) in bad {
            let conf = self.core.status(group).map(|s| s.conf).unwrap_or_default();
            let lists = [conf.voters, conf.voters_outgoing, conf.learners];
            let others: Vec<u64> = (lists.into_iter().flatten())
                .filter(|v| *v != self.id)
                .collect();
            if let Some(to) = self.rng.pick(&others) {
                let packet = Packet::AskRepair { names };
                self.out.push(Out::Peer { to: *to, packet });
            }
        }
    }

    fn ask(
        &mut self,
        now_ms: u64,
        client: u32,
        call: u64,
        request: Request,
    ) -> std::result::Result<(), CoreError> {
        match request {
            Request::Propose { group, op } => {
                let token = self.token();
                self.waiters.insert(token, Waiter::Client { client, call });
                self.propose(now_ms, group, token, *op)
            }
            Request::Put {
                group,
                session,
                ttl_ms,
                names,
            } => {
                let id = self.token();
                self.core.disk_mut().hold(&names);
                let put = Put {
                    client,
                    call,
                    group,
                    session,
                    expires_ms: now_ms + ttl_ms,
                    names,
                    stored: BTreeSet::new(),
                    rounds: 0,
                };
                self.puts.insert(id, put);
                self.put(now_ms, id)
            }
            Request::Read {
                group,
                floor,
                query,
            } => {
                let token = self.token();
                let asked = Asked {
                    client,
                    call,
                    group,
                    floor,
                    query,
                };
                self.asked.insert(token, asked);
                self.core.handle(now_ms, Input::Read { group, token })
            }
            Request::Get { name } => {
                let result = match self.core.disk_mut().read_body(&name) {
                    Some(Body::Whole) => Ok(Answer::Body(self.env.content.body(&name).to_vec())),
                    _ => Err(Fail::NoBody),
                };
                self.answer(client, call, result);
                Ok(())
            }
        }
    }

    fn propose(
        &mut self,
        now_ms: u64,
        group: u32,
        token: u64,
        op: op::Op,
    ) -> std::result::Result<(), CoreError> {
        let command = Box::new(Command::new(0, op));
        let input = Input::Propose {
            group,
            token,
            command,
        };
        self.core.handle(now_ms, input)
    }

    /// Stores what is new of a put, and proposes the entry that names all of it.
    fn put(&mut self, now_ms: u64, id: u64) -> std::result::Result<(), CoreError> {
        let Some(mut put) = self.puts.remove(&id) else {
            return Ok(());
        };
        put.rounds += 1;
        let again = put.rounds > 1;
        let disk = self.core.disk_mut();
        for name in &put.names {
            let known = !again
                && matches!(disk.get(put.group, &keys::chunk(name)), Ok(Some(_)))
                && !disk.damaged.contains(name);
            if known || put.stored.contains(name) {
                continue;
            }
            if disk.put_body(*name).is_err() {
                disk.release(&put.names);
                self.answer(put.client, put.call, Err(Fail::Full));
                return Ok(());
            }
            put.stored.insert(*name);
        }
        let (mut lens, mut kinds) = (Vec::new(), Vec::new());
        for name in &put.names {
            lens.extend((self.env.content.body(name).len() as u32).to_le_bytes());
            let brought = [0, op::BROUGHT][usize::from(put.stored.contains(name))];
            let linked = [0, op::LINKED][usize::from(self.env.content.is_linked(name))];
            kinds.push(brought | linked);
        }
        let add = op::Op::AddChunks(op::AddChunks {
            session: put.session.to_vec().into(),
            expires_ms: put.expires_ms,
            names: join_names(&put.names),
            lens: lens.into(),
            kinds: kinds.into(),
        });
        let group = put.group;
        self.puts.insert(id, put);
        let token = self.token();
        self.waiters.insert(token, Waiter::Put(id));
        self.propose(now_ms, group, token, add)
    }

    fn act(&mut self, now_ms: u64, action: Action) -> std::result::Result<(), CoreError> {
        match action {
            Action::Send { to, envelopes } => {
                let mut list = Vec::with_capacity(envelopes.len());
                for envelope in envelopes {
                    if let tidepool_store_raft::Body::Raft(message) = &envelope.body {
                        let mut checker = self.env.checker.borrow_mut();
                        checker.sent(self.id, envelope.group, message);
                    }
                    let bytes = envelope.encode();
                    debug_assert!(bytes.len() <= MAX_ENVELOPE);
                    list.push(bytes);
                }
                let packet = Packet::Envelopes(list);
                self.out.push(Out::Peer { to, packet });
            }
            Action::Answer { token, result } => match self.waiters.remove(&token) {
                Some(Waiter::Client { client, call }) => {
                    let result = result.map(Answer::Reply).map_err(Fail::from);
                    self.answer(client, call, result);
                }
                Some(Waiter::Put(id)) => self.put_decided(now_ms, id, result)?,
                None => self.env.checker.borrow_mut().fail(format!(
                    "node {} answers proposal {token}, which nobody waits for",
                    self.id
                )),
            },
            Action::ReadReady { token, result } => {
                let Some(asked) = self.asked.remove(&token) else {
                    self.env.checker.borrow_mut().fail(format!(
                        "node {} answers read {token}, which nobody waits for",
                        self.id
                    ));
                    return Ok(());
                };
                let result = match result {
                    Ok(()) => self.read(&asked),
                    Err(e) => Err(e.into()),
                };
                self.answer(asked.client, asked.call, result);
            }
            Action::FetchBodies {
                fetch,
                from,
                group,
                index,
                names,
            } => {
                let packet = Packet::AskBodies {
                    run: self.run,
                    fetch,
                    group,
                    index,
                    names,
                };
                self.out.push(Out::Peer { to: from, packet });
                self.out.push(Out::FetchTimer(fetch));
            }
            Action::FetchPage {
                fetch,
                from,
                request,
            } => {
                let packet = Packet::AskPage {
                    run: self.run,
                    fetch,
                    request,
                };
                self.out.push(Out::Peer { to: from, packet });
                self.out.push(Out::FetchTimer(fetch));
            }
            Action::Changed { group } => {
                if let Some(status) = self.core.status(group).filter(|s| s.leads) {
                    let mut checker = self.env.checker.borrow_mut();
                    checker.leads(self.id, group, status.term);
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, asked: &Asked) -> Result<Answer> {
        let disk = self.core.disk_mut();
        let applied = disk.group(asked.group).map_or(0, |g| g.applied);
        let mut checker = self.env.checker.borrow_mut();
        checker.served(self.id, asked.group, applied, asked.floor);
        serve::answer(&self.env.content, disk, asked.group, &asked.query)
    }

    fn put_decided(
        &mut self,
        now_ms: u64,
        id: u64,
        result: std::result::Result<Reply, Rejection>,
    ) -> std::result::Result<(), CoreError> {
        let again = matches!(&result, Err(Rejection::Refused(r)) if r.again);
        if again && self.puts.get(&id).is_some_and(|p| p.rounds < PUT_ROUNDS) {
            self.put(now_ms, id)?;
            // The core has something to do again.
            self.out.push(Out::Again(Inbound::FetchTimeout(0)));
            return Ok(());
        }
        let Some(put) = self.puts.remove(&id) else {
            return Ok(());
        };
        self.core.disk_mut().release(&put.names);
        let result = match result {
            Ok(Reply::Added { round, .. }) => Ok(Answer::Put { round }),
            Ok(_) => Err(Fail::Again),
            Err(_) if again => Err(Fail::Again),
            Err(e) => Err(e.into()),
        };
        self.answer(put.client, put.call, result);
        Ok(())
    }

    /// Says what should be where, from the list of nodes as it is applied here.
    fn look_at_cluster(&mut self, now_ms: u64) -> std::result::Result<(), CoreError> {
        let Some(meta) = self.core.disk().group(META_GROUP) else {
            return Ok(());
        };
        let row = meta.state.get(&keys::cluster());
        if row.is_none() || self.cluster.as_ref() == row {
            return Ok(());
        }
        self.cluster = row.cloned();
        let Some(Ok(state)) = row.map(|r| ClusterState::decode(r)) else {
            return Ok(());
        };
        let removed = state.nodes.iter().filter(|n| n.state == NodeState::Removed);
        self.removed = removed.map(|n| n.id).collect();
        for (group, target) in self.env.shards.groups().zip(placement::targets(&state)) {
            let order = Order::Target(Target {
                group,
                voters: target.voters,
                learners: target.learners,
            });
            self.core.handle(now_ms, Input::Order(order))?;
        }
        Ok(())
    }
}
