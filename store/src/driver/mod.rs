//! Executes the groups of a node on one thread: takes what happened, lets the core ([`tidepool_store_raft::Core`]) persist and apply what is
//! ready, and does what the core asks for outside: messages, fetches, answers.
//!
//! A write that fails stops the node: what is on disk is then unknown, and only a restart can tell. The exception is a full
//! disk, which fails before anything is promised: the core keeps the batch, it is tried again until there is room, writes are refused
//! meanwhile and reads are answered where that is safe. Before it comes to that the core is told that there is no room, so that
//! others lead.
//!
//! Elsewhere on purpose: all decisions (`store/raft`), storage ([`crate::disk`]), the network (the [`Net`] that is handed in).

mod handle;
mod views;

pub(crate) use handle::{DriverError, Handle, Inputs, now_ms, received};

use std::collections::HashMap;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tidepool_proto::ChunkName;
use tidepool_store_core::Reply;
use tidepool_store_raft::{
    Action, Core, Disk as _, Envelope, Input as CoreInput, Page, PageRequest, Rejection, TICK_MS,
};
use tokio::sync::oneshot;

use crate::db::{Db, DbError};
use crate::disk::NodeDisk;
use crate::error::StoreError;
use crate::space::Space;
use crate::stats::Counters;
use handle::{Answer, Input};
use views::Views;

const TICK: Duration = Duration::from_millis(TICK_MS);
const DRAIN: usize = 1024;
/// Ticks that are made up for after the thread was held up; more than this the clock just goes on.
const CATCH_UP: u32 = 3;

/// The other nodes. Nothing here may block; what cannot be sent is dropped.
pub(crate) trait Net: Send {
    /// Sends these in this order.
    fn send(&self, to: u64, envelopes: Vec<Envelope>);
    /// Gets bodies, stores them, and tells the driver.
    fn fetch_bodies(&self, fetch: u64, from: u64, group: u32, index: u64, names: Vec<ChunkName>);
    /// Gets a page of a raft snapshot, and tells the driver.
    fn fetch_page(&self, fetch: u64, from: u64, request: PageRequest);
}

pub(crate) struct Driver<N> {
    core: Core<NodeDisk>,
    db: Db,
    net: N,
    views: Views,
    inputs: Inputs,
    proposals: HashMap<u64, Answer<Reply>>,
    reads: HashMap<u64, Answer<()>>,
    next_token: u64,
    counters: Arc<Counters>,
    space: Arc<Space>,
    /// The core was told that there is room.
    room: bool,
    stalled: bool,
    stopping: bool,
    failure: Option<DbError>,
}

impl<N: Net + 'static> Driver<N> {
    /// Starts the thread. It ends on [`Handle::stop`] with Ok, or after a failed write with the reason, which also goes to `failed`.
    pub(crate) fn start(
        core: Core<NodeDisk>,
        net: N,
        inputs: Inputs,
        counters: Arc<Counters>,
        space: Arc<Space>,
        failed: tokio::sync::watch::Sender<Option<String>>,
    ) -> Result<JoinHandle<()>, std::io::Error> {
        let db = core.disk().db.clone();
        let mut driver = Driver {
            core,
            views: Views::new(db.clone(), rand::random()),
            db,
            net,
            inputs,
            proposals: HashMap::new(),
            reads: HashMap::new(),
            next_token: 0,
            counters,
            space,
            room: true,
            stalled: false,
            stopping: false,
            failure: None,
        };
        driver.publish();
        std::thread::Builder::new()
            .name("store-driver".into())
            .spawn(move || {
                if let Err(e) = driver.run() {
                    tracing::error!(error = %e, "the node stops: a write failed or its data is damaged");
                    let why = match e {
                        StoreError::Stopped(why) => why,
                        other => other.to_string(),
                    };
                    failed.send_replace(Some(why));
                }
            })
    }

    fn run(&mut self) -> Result<(), StoreError> {
        let mut next_tick = Instant::now() + TICK;
        self.turn()?;
        while !self.stopping {
            let wait = next_tick.saturating_duration_since(Instant::now());
            match self.inputs.inputs.recv_timeout(wait) {
                Ok(input) => {
                    self.take(input)?;
                    for _ in 0..DRAIN {
                        match self.inputs.inputs.try_recv() {
                            Ok(input) => self.take(input)?,
                            Err(_) => break,
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            if let Some(why) = self.failure.take() {
                return Err(StoreError::Stopped(why.to_string()));
            }
            let now = Instant::now();
            let due = now >= next_tick;
            if due {
                next_tick += TICK;
                if next_tick + TICK * CATCH_UP < now {
                    next_tick = now + TICK;
                }
                self.look_for_room()?;
                self.core.handle(now_ms(), CoreInput::Tick)?;
            }
            // What waits for room on the disk is tried again once a tick.
            if due || !self.core.stalled() {
                self.turn()?;
            }
            self.act();
            if due {
                self.publish();
            }
        }
        // What was taken before the stop is decided before it, where that is possible.
        self.turn()?;
        self.act();
        match self.db.flush_all() {
            Ok(()) => Ok(()),
            Err(DbError::Full(_)) => Ok(()),
            Err(e) => Err(StoreError::Stopped(e.to_string())),
        }
    }

    fn look_for_room(&mut self) -> Result<(), StoreError> {
        let room = self.space.may_lead(self.room);
        if room != self.room {
            self.room = room;
            self.core.handle(now_ms(), CoreInput::Room(room))?;
            self.counters.set_no_room(!room);
            if room {
                tracing::info!("there is room on the disk again: this node may lead");
            } else {
                tracing::warn!("the disk is nearly full: others lead where they have room");
            }
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<(), StoreError> {
        // What need not wait for the disk goes before it is waited for.
        self.core.prepare();
        self.act();
        self.core.turn()?;
        let stalled = self.core.stalled();
        if stalled != self.stalled {
            self.stalled = stalled;
            self.counters.set_stalled(stalled);
            if stalled {
                tracing::error!("the disk is full: the store refuses writes until there is room");
            } else {
                tracing::warn!("there is room again: the store takes writes");
            }
        }
        Ok(())
    }

    fn take(&mut self, input: Input) -> Result<(), StoreError> {
        let now = now_ms();
        match input {
            Input::Propose {
                group,
                command,
                answer,
            } => {
                let token = self.token();
                self.proposals.insert(token, answer);
                let propose = CoreInput::Propose {
                    group,
                    token,
                    command,
                };
                self.core.handle(now, propose)?;
            }
            Input::Read { group, answer } => {
                let token = self.token();
                self.reads.insert(token, answer);
                self.core.handle(now, CoreInput::Read { group, token })?;
            }
            Input::Core(input) => self.core.handle(now, input)?,
            Input::Messages { from, envelopes } => {
                for envelope in envelopes {
                    let message = CoreInput::Message { from, envelope };
                    self.core.handle(now, message)?;
                }
            }
            Input::Page { request, answer } => self.page(request, answer),
            Input::DeleteOrphans { group, names, done } => {
                let free = self.core.unneeded(group, &names);
                self.core
                    .disk_mut()
                    .delete_bodies(group, &free)
                    .map_err(|e| StoreError::Stopped(e.to_string()))?;
                let _ = done.send(free.len() as u64);
            }
            Input::Fail(why) => self.failure = Some(why),
            Input::Stop => self.stopping = true,
        }
        Ok(())
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    fn page(&mut self, request: PageRequest, answer: oneshot::Sender<Result<Page, String>>) {
        let view = match request.view {
            0 => self.open(request.group),
            view => Ok(view),
        };
        match view {
            Ok(view) => self.views.page(view, request.after, answer),
            Err(why) => {
                let _ = answer.send(Err(why));
            }
        }
    }

    fn open(&mut self, group: u32) -> Result<u64, String> {
        let (index, term, conf) = self
            .core
            .view_point(group)
            .ok_or_else(|| format!("there is no raft snapshot of group {group} here now"))?;
        let head = Page {
            index,
            term,
            conf: Page::encode_members(&conf),
            ..Page::default()
        };
        self.views.open(group, head)
    }

    /// Does what the core wants outside.
    fn act(&mut self) {
        let mut changed = false;
        while let Some(action) = self.core.poll_action() {
            match action {
                Action::Send { to, envelopes } => self.net.send(to, envelopes),
                Action::Answer { token, result } => {
                    if let Some(answer) = self.proposals.remove(&token) {
                        let _ = answer.send(result.map_err(|e: Rejection| e.into()));
                    }
                }
                Action::ReadReady { token, result } => {
                    if let Some(answer) = self.reads.remove(&token) {
                        let _ = answer.send(result.map_err(|e: Rejection| e.into()));
                    }
                }
                Action::FetchBodies {
                    fetch,
                    from,
                    group,
                    index,
                    names,
                } => self.net.fetch_bodies(fetch, from, group, index, names),
                Action::FetchPage {
                    fetch,
                    from,
                    request,
                } => self.net.fetch_page(fetch, from, request),
                Action::Changed { .. } => changed = true,
            }
        }
        if changed {
            self.publish();
        }
    }

    /// Shows others the replicas as they are.
    fn publish(&mut self) {
        let numbers: Vec<u32> = self.core.group_numbers().collect();
        let list: Vec<_> = numbers
            .into_iter()
            .filter_map(|n| self.core.status(n))
            .collect();
        let ready = list.iter().all(|s| s.leader.is_some());
        self.counters.set_ready(ready);
        let statuses = &self.inputs.statuses;
        *statuses.write().unwrap_or_else(PoisonError::into_inner) = list;
    }
}
