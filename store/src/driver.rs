//! Executes the groups of a node on one thread: everything that is ready goes to disk in one batch with one sync, then what that
//! committed is applied in a second batch (which the next sync makes durable; the log already is), then callers are answered.
//!
//! A write that fails stops the node: what is on disk is then unknown, and only a restart can tell. The exception is a full
//! disk, which fails before anything is promised: the driver keeps the batch and tries again until there is room, refuses
//! writes meanwhile and goes on answering reads.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prost::Message as _;
use tidepool_proto::ErrorKind;
use tidepool_store_core::{Command, Group as Kind, META_GROUP, Outcome, Refusal, Reply, apply};
use tokio::sync::oneshot;

use crate::db::{Db, DbError};
use crate::error::StoreError;
use crate::logs;
use crate::raft::{Committed, Group};
use crate::state::StateView;
use crate::stats::Counters;

const TICK: Duration = Duration::from_millis(100);
const DRAIN: usize = 1024;
const FULL_RETRY: Duration = Duration::from_millis(250);

/// Why a proposal or a read has no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DriverError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Not decided here and now; asking again may help.
    #[error("{0}")]
    Again(&'static str),
    /// Another node leads the group; 0: nobody known.
    #[error("group {group} is led elsewhere")]
    NotLeader { group: u32, leader: u64 },
    /// No room.
    #[error("the store's disk is full")]
    Full,
}

/// A group's replica on this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct GroupStatus {
    pub(crate) group: u32,
    pub(crate) term: u64,
    /// 0 where it is not known.
    pub(crate) leader: u64,
    pub(crate) voters: Vec<u64>,
    pub(crate) learners: Vec<u64>,
    pub(crate) applied: u64,
    pub(crate) committed: u64,
}

type Answer<T> = oneshot::Sender<Result<T, DriverError>>;

enum Input {
    Propose {
        group: u32,
        command: Box<Command>,
        answer: Answer<Reply>,
    },
    Read {
        group: u32,
        answer: Answer<()>,
    },
    /// Bodies could not be written: the node ends as if the log could not.
    Fail(DbError),
    Stop,
}

/// The way to the driver. Clones share it.
#[derive(Clone)]
pub(crate) struct Handle {
    inputs: Sender<Input>,
    statuses: Arc<RwLock<Vec<GroupStatus>>>,
}

impl Handle {
    /// Proposes a command; the result comes when it is applied.
    pub(crate) fn propose(
        &self,
        group: u32,
        command: Command,
    ) -> oneshot::Receiver<Result<Reply, DriverError>> {
        let (answer, result) = oneshot::channel();
        let command = Box::new(command);
        // A driver that is gone drops the answer, which the receiver sees.
        let _ = self.inputs.send(Input::Propose {
            group,
            command,
            answer,
        });
        result
    }

    /// Waits until the state shows everything that was acknowledged before.
    pub(crate) async fn read(&self, group: u32) -> Result<(), DriverError> {
        let (answer, result) = oneshot::channel();
        let _ = self.inputs.send(Input::Read { group, answer });
        received(result).await
    }

    /// The replicas here, as they were a moment ago.
    pub(crate) fn status(&self) -> Vec<GroupStatus> {
        let statuses = self.statuses.read().unwrap_or_else(PoisonError::into_inner);
        statuses.clone()
    }

    pub(crate) fn fail(&self, why: DbError) {
        let _ = self.inputs.send(Input::Fail(why));
    }

    pub(crate) fn stop(&self) {
        let _ = self.inputs.send(Input::Stop);
    }
}

/// The driver's answer, or that there is none any more.
pub(crate) async fn received<T>(
    result: oneshot::Receiver<Result<T, DriverError>>,
) -> Result<T, DriverError> {
    result
        .await
        .unwrap_or(Err(DriverError::Again("the node is stopping")))
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

pub(crate) struct Driver {
    db: Db,
    groups: Vec<Group>,
    inputs: Receiver<Input>,
    /// By token: the group, and who waits.
    proposals: HashMap<u64, (u32, Answer<Reply>)>,
    reads: HashMap<u64, Answer<()>>,
    next_token: u64,
    /// The last time given to a command: a clock that is set back does not show in the log.
    last_ms: u64,
    counters: Arc<Counters>,
    statuses: Arc<RwLock<Vec<GroupStatus>>>,
    stopping: bool,
    failure: Option<DbError>,
}

impl Driver {
    /// Starts the thread. It ends on [`Handle::stop`] with Ok, or after a failed write with the reason, which also goes to `failed`.
    pub(crate) fn start(
        db: Db,
        groups: Vec<Group>,
        counters: Arc<Counters>,
        failed: tokio::sync::watch::Sender<Option<String>>,
    ) -> Result<(Handle, JoinHandle<()>), std::io::Error> {
        let (tx, rx) = channel();
        let statuses = Arc::new(RwLock::new(Vec::new()));
        let mut driver = Driver {
            db,
            groups,
            inputs: rx,
            proposals: HashMap::new(),
            reads: HashMap::new(),
            next_token: 0,
            last_ms: 0,
            counters,
            statuses: statuses.clone(),
            stopping: false,
            failure: None,
        };
        let thread = std::thread::Builder::new()
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
            })?;
        let handle = Handle {
            inputs: tx,
            statuses,
        };
        Ok((handle, thread))
    }

    fn run(&mut self) -> Result<(), StoreError> {
        let mut next_tick = Instant::now() + TICK;
        while !self.stopping {
            self.turn()?;
            let wait = next_tick.saturating_duration_since(Instant::now());
            match self.inputs.recv_timeout(wait) {
                Ok(input) => {
                    self.take(input);
                    for _ in 0..DRAIN {
                        match self.inputs.try_recv() {
                            Ok(input) => self.take(input),
                            Err(_) => break,
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            if let Some(why) = self.failure.take() {
                return Err(stopped(why));
            }
            if Instant::now() >= next_tick {
                next_tick = Instant::now() + TICK;
                self.groups.iter_mut().for_each(Group::tick);
                let statuses = self.groups.iter().map(Group::status).collect();
                *self
                    .statuses
                    .write()
                    .unwrap_or_else(PoisonError::into_inner) = statuses;
            }
        }
        // What was taken before the stop is decided before it.
        self.turn()?;
        match self.db.flush_all() {
            Ok(()) => Ok(()),
            Err(DbError::Full(_)) => Ok(()),
            Err(e) => Err(StoreError::Stopped(e.to_string())),
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Propose {
                group,
                mut command,
                answer,
            } => {
                self.last_ms = self.last_ms.max(now_ms());
                command.now_ms = self.last_ms;
                let token = self.token();
                let Some(group) = self.groups.get_mut(group as usize) else {
                    return refuse(answer, "there is no such group");
                };
                match group.propose(token, command.encode_to_vec()) {
                    Ok(()) => {
                        let number = group.number();
                        self.proposals.insert(token, (number, answer));
                    }
                    Err(_) => refuse_now(answer, group, "the group has too much to do"),
                }
            }
            Input::Read { group, answer } => {
                let token = self.token();
                let Some(group) = self.groups.get_mut(group as usize) else {
                    return refuse(answer, "there is no such group");
                };
                match group.read(token) {
                    Ok(()) => {
                        self.reads.insert(token, answer);
                    }
                    Err(_) => refuse_now(answer, group, "the group is not ready yet"),
                }
            }
            Input::Fail(why) => self.failure = Some(why),
            Input::Stop => self.stopping = true,
        }
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Persists and applies until nothing is ready.
    fn turn(&mut self) -> Result<(), StoreError> {
        loop {
            let mut any = false;
            let mut sync = false;
            let db = self.db.clone();
            let mut batch = db.batch().map_err(stopped)?;
            for group in &mut self.groups {
                let last = group.last_index();
                if let Some(persist) = group.ready() {
                    any = true;
                    sync |= persist.sync;
                    logs::persist(&mut batch, group.number(), &persist, last);
                    // A group of one voter sends nothing. Members are added together with the transport.
                    debug_assert!(persist.messages.is_empty() && persist.messages_after.is_empty());
                }
            }
            if !any {
                break;
            }
            if !batch.is_empty() {
                self.write(batch.finish(), sync)?;
            }
            self.apply_all()?;
        }
        for group in &mut self.groups {
            if !group.is_leader() {
                // Whether these are committed the next leader decides; sent again they do no harm.
                let number = group.number();
                for (_, (_, answer)) in self.proposals.extract_if(|_, (of, _)| *of == number) {
                    refuse(answer, "the group's leader changed");
                }
            }
            let (done, lost) = group.reads();
            for token in done {
                if let Some(answer) = self.reads.remove(&token) {
                    let _ = answer.send(Ok(()));
                }
            }
            for token in lost {
                if let Some(answer) = self.reads.remove(&token) {
                    refuse(answer, "the group's leader changed");
                }
            }
        }
        self.counters
            .set_ready(self.groups.iter().all(Group::is_ready));
        Ok(())
    }

    fn apply_all(&mut self) -> Result<(), StoreError> {
        let db = self.db.clone();
        let mut batch = db.batch().map_err(stopped)?;
        let mut applied: Vec<(usize, u64)> = Vec::new();
        let mut answers = Vec::new();
        for (at, group) in self.groups.iter_mut().enumerate() {
            let committed = group.persisted()?;
            let Some(last) = committed.last().map(index_of) else {
                continue;
            };
            let number = group.number();
            let mut view = StateView::new(&db, number);
            for entry in committed {
                match entry {
                    Committed::Empty { .. } => {}
                    Committed::Members { conf, .. } => {
                        logs::set_members(&mut batch, number, &conf);
                    }
                    Committed::Command { index, data, token } => {
                        let outcome = run_command(number, &view, &data);
                        if let Some(e) = view.failure() {
                            return Err(stopped(e));
                        }
                        if let Err(refusal) = &outcome.result
                            && refusal.kind == ErrorKind::Corruption
                        {
                            tracing::error!(group = number, index, %refusal, "a damaged record");
                            // One that has followers must not go its own way: they would apply this.
                            if !group.is_alone() {
                                return Err(StoreError::Damaged(refusal.to_string()));
                            }
                        }
                        view.write(outcome.writes, &mut batch);
                        if let Some(token) = token {
                            answers.push((token, outcome.result));
                        }
                    }
                }
            }
            logs::set_applied(&mut batch, number, last);
            applied.push((at, last));
        }
        if !batch.is_empty() {
            self.write(batch.finish(), false)?;
        }
        let mut cuts = db.batch().map_err(stopped)?;
        for (at, last) in applied {
            let group = &mut self.groups[at];
            group.applied(last);
            if let Some((from, to, cut)) = group.cut() {
                logs::cut(&mut cuts, group.number(), from, to, cut);
            }
        }
        if !cuts.is_empty() {
            self.write(cuts.finish(), false)?;
        }
        for (token, result) in answers {
            if let Some((_, answer)) = self.proposals.remove(&token) {
                let _ = answer.send(result.map_err(DriverError::from));
            }
        }
        Ok(())
    }

    /// Writes a batch. A full disk is waited for; any other failure is the node's end.
    fn write(&mut self, batch: rocksdb::WriteBatch, sync: bool) -> Result<(), StoreError> {
        let data = batch.data().to_vec();
        let mut result = self.db.write(batch, sync);
        let mut said = false;
        loop {
            match result {
                Ok(()) => {
                    if said {
                        tracing::warn!("there is room again: the store takes writes");
                        self.counters.set_stalled(false);
                    }
                    return Ok(());
                }
                Err(DbError::Full(why)) => {
                    if !said {
                        tracing::error!(%why, "the disk is full: the store refuses writes until there is room");
                        self.counters.set_stalled(true);
                        said = true;
                    }
                    self.wait_for_room();
                    if self.stopping {
                        return Err(StoreError::Stopped(
                            "stopped while the disk was full".into(),
                        ));
                    }
                }
                Err(e) => return Err(stopped(e)),
            }
            result = self.db.write(rocksdb::WriteBatch::from_data(&data), sync);
        }
    }

    /// Some time without writes: proposals are refused, reads of groups with no other voter answered from the state as it is,
    /// for nothing newer was acknowledged.
    fn wait_for_room(&mut self) {
        let end = Instant::now() + FULL_RETRY;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            match self.inputs.recv_timeout(left) {
                Ok(Input::Propose { answer, .. }) => {
                    let _ = answer.send(Err(DriverError::Full));
                }
                Ok(Input::Read { group, answer }) => {
                    let alone = self.groups.get(group as usize).is_some_and(Group::is_alone);
                    let _ = answer.send(if alone {
                        Ok(())
                    } else {
                        Err(DriverError::Full)
                    });
                }
                Ok(Input::Fail(why)) => self.failure = Some(why),
                Ok(Input::Stop) => {
                    self.stopping = true;
                    return;
                }
                Err(_) => return,
            }
        }
    }
}

fn refuse<T>(answer: Answer<T>, why: &'static str) {
    let _ = answer.send(Err(DriverError::Again(why)));
}

/// Refuses what a group cannot take now: another node may lead it.
fn refuse_now<T>(answer: Answer<T>, group: &Group, why: &'static str) {
    if group.is_leader() {
        return refuse(answer, why);
    }
    let status = group.status();
    let _ = answer.send(Err(DriverError::NotLeader {
        group: status.group,
        leader: status.leader,
    }));
}

fn stopped(e: DbError) -> StoreError {
    StoreError::Stopped(e.to_string())
}

fn index_of(entry: &Committed) -> u64 {
    match entry {
        Committed::Command { index, .. }
        | Committed::Members { index, .. }
        | Committed::Empty { index } => *index,
    }
}

fn run_command(group: u32, view: &StateView<'_>, data: &[u8]) -> Outcome {
    let kind = if group == META_GROUP {
        Kind::Meta
    } else {
        Kind::Shard
    };
    match Command::decode(data) {
        Ok(command) => apply(kind, view, &command),
        Err(e) => Outcome {
            result: Err(Refusal::new(
                ErrorKind::Corruption,
                format!("a log entry is not a command: {e}"),
            )),
            writes: Vec::new(),
        },
    }
}
