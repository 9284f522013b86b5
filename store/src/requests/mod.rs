//! Requests: checked, turned into commands and reads, and answered.

mod chunks;
pub(crate) mod gc;
mod images;
mod retention;
mod sandboxes;

use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use tidepool_proto::cluster::Node as Seed;
use tidepool_proto::wire::{self, Request, Response, WireError, request, request::Op, response};
use tidepool_proto::{ErrorKind, SandboxId};
use tidepool_store_client::{Client, ClientError};
use tidepool_store_core::{
    Command, GcState, ReadError, Refusal, Reply, ShardMap, ShardStats, keys, op,
};
use tokio::sync::Semaphore;

use crate::bodies::{BodyStore, BodyWriter, Damaged};
use crate::db::{Db, DbError};
use crate::driver::{DriverError, Handle, received};
use crate::gc::Collector;
use crate::holds::Holds;
use crate::peers::Peers;
use crate::pki::{Caller, Pki};
use crate::scrub::Scrubber;
use crate::space::Space;
use crate::stats::{Counters, NodeStats};
use crate::{cluster, join};

/// What every request works with.
pub(crate) struct Shared {
    pub(crate) db: Db,
    pub(crate) map: ShardMap,
    pub(crate) cluster: String,
    /// This node's number.
    pub(crate) node: u64,
    /// The members this node was told of when it joined.
    pub(crate) seeds: Vec<Seed>,
    pub(crate) pki: Pki,
    pub(crate) peers: Peers,
    /// This node as a client of all nodes, itself too: for what another one has to decide.
    pub(crate) client: Client,
    pub(crate) driver: Handle,
    pub(crate) bodies: Arc<dyn BodyStore>,
    pub(crate) writer: BodyWriter,
    pub(crate) damaged: Arc<Damaged>,
    pub(crate) space: Arc<Space>,
    pub(crate) holds: Holds,
    pub(crate) collector: Collector,
    pub(crate) scrubber: Scrubber,
    /// Ends of sessions that are being told to other nodes.
    pub(crate) ends: Arc<Semaphore>,
    pub(crate) counters: Arc<Counters>,
}

/// Why a request is answered with an error.
#[derive(Debug)]
pub(crate) struct Failure {
    kind: ErrorKind,
    text: String,
    /// Asking again soon may help.
    again: bool,
    /// What the request rests on may have been collected.
    upload_again: bool,
    /// Another node decides this.
    moved: Option<response::NotLeader>,
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
            again: false,
            upload_again: false,
            moved: None,
        }
    }

    pub(crate) fn again(text: impl Into<String>) -> Self {
        Self {
            again: true,
            ..Self::new(ErrorKind::Unavailable, text)
        }
    }

    /// Whether another node decides this.
    pub(crate) fn is_moved(&self) -> bool {
        self.moved.is_some()
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    fn full() -> Self {
        Self::new(
            ErrorKind::Unavailable,
            "the store's disk is full: it takes no writes until there is room",
        )
    }
}

impl From<WireError> for Failure {
    fn from(e: WireError) -> Self {
        Self::new(ErrorKind::Invalid, e.to_string())
    }
}

impl From<Refusal> for Failure {
    fn from(e: Refusal) -> Self {
        Self {
            again: e.again,
            upload_again: e.upload_again,
            ..Self::new(e.kind, e.text)
        }
    }
}

impl From<ReadError> for Failure {
    fn from(e: ReadError) -> Self {
        Self::new(ErrorKind::Corruption, e.0)
    }
}

impl From<DbError> for Failure {
    fn from(e: DbError) -> Self {
        match e {
            DbError::Corruption(text) => Self::new(ErrorKind::Corruption, text),
            DbError::Full(_) => Self::full(),
            DbError::Failed(text) => Self::new(ErrorKind::Failed, text),
        }
    }
}

impl From<ClientError> for Failure {
    fn from(e: ClientError) -> Self {
        Self {
            again: e.kind() == ErrorKind::Unavailable,
            ..Self::new(e.kind(), e.to_string())
        }
    }
}

impl From<DriverError> for Failure {
    fn from(e: DriverError) -> Self {
        match e {
            DriverError::Refused(refusal) => refusal.into(),
            DriverError::Again(why) => Self::again(why),
            DriverError::NotLeader { group, leader } => Self {
                moved: Some(response::NotLeader { group, leader }),
                ..Self::again(format!("group {group} is led elsewhere"))
            },
            DriverError::Full => Self::full(),
        }
    }
}

pub(crate) type Answer = Result<response::Op, Failure>;

/// What a request is answered with.
pub(crate) enum Answered {
    Message(Response),
    /// Bodies, which are sent as they were read.
    Bodies(Vec<Bytes>),
}

impl From<Response> for Answered {
    fn from(message: Response) -> Self {
        Self::Message(message)
    }
}

impl Answered {
    /// The answer's frame in pieces.
    pub(crate) fn frame(self) -> Result<Vec<Bytes>, WireError> {
        match self {
            Self::Message(message) => Ok(vec![wire::frame(&message)?]),
            Self::Bodies(bodies) => wire::frame_bodies(bodies),
        }
    }
}

/// Answers one request.
pub(crate) async fn answer(shared: &Arc<Shared>, caller: &Caller, request: Request) -> Answered {
    let answer = dispatch(shared, caller, request).await;
    answer.unwrap_or_else(|failure| failed(shared, failure).into())
}

fn failed(shared: &Shared, failure: Failure) -> Response {
    if failure.kind == ErrorKind::Corruption {
        shared.counters.corruption();
        tracing::error!(error = %failure.text, "stored data is damaged");
    }
    if let Some(moved) = failure.moved {
        return response::Op::NotLeader(moved).into();
    }
    response::Op::Error(response::Error {
        kind: wire::kind_code(failure.kind),
        text: failure.text,
        again: failure.again,
        upload_again: failure.upload_again,
    })
    .into()
}

async fn dispatch(
    shared: &Arc<Shared>,
    caller: &Caller,
    request: Request,
) -> Result<Answered, Failure> {
    let Some(op) = request.op else {
        return Err(Failure::new(
            ErrorKind::Invalid,
            "the request is not one that this version knows",
        ));
    };
    let answer = match op {
        Op::Status(_) => Ok(status(shared).await),
        Op::Topology(_) => shared.blocking(cluster::topology).await,
        Op::Join(r) => join::join(shared, caller, r).await,
        Op::IssueToken(r) => join::issue_token(shared, r).await,
        Op::ChangeNode(r) => cluster::change(shared, r).await,
        Op::Propose(r) => {
            let command =
                Command::decode(r.command).map_err(|e| WireError::Message(e.to_string()))?;
            let reply = received(shared.driver.propose(r.group, command)).await?;
            Ok(response::Op::Reply(reply.encode().into()))
        }
        Op::Pin(r) => chunks::pin(shared, r).await,
        Op::Put(r) => chunks::put(shared, r).await,
        Op::EndSession(r) => chunks::end_session(shared, r).await,
        Op::Get(r) => return Ok(Answered::Bodies(chunks::get(shared, r).await?)),
        Op::CreateSandbox(r) => sandboxes::create(shared, r).await,
        Op::TakeSandbox(r) => {
            let id = sandbox_id(&r.id)?;
            shared.write_sandbox(id, op::Op::TakeSandbox(r)).await
        }
        Op::UpdateSandboxMeta(r) => {
            let id = sandbox_id(&r.id)?;
            shared.write_sandbox(id, op::Op::UpdateSandboxMeta(r)).await
        }
        Op::RemoveSandbox(r) => sandboxes::remove(shared, r).await,
        Op::Sandbox(r) => sandboxes::one(shared, r).await,
        Op::Sandboxes(r) => sandboxes::list(shared, r).await,
        Op::Commit(r) => {
            let id = sandbox_id(&r.sandbox)?;
            shared.write_sandbox(id, op::Op::Commit(r)).await
        }
        Op::Manifest(r) => sandboxes::manifest(shared, r).await,
        Op::Manifests(r) => sandboxes::manifests(shared, r).await,
        Op::TurnByKey(r) => sandboxes::turn_by_key(shared, r).await,
        Op::Turns(r) => sandboxes::turns(shared, r).await,
        Op::PutImage(r) => images::put(shared, r).await,
        Op::Image(r) => images::one(shared, r).await,
        Op::Images(r) => images::list(shared, r).await,
        Op::RemoveImage(r) => images::remove(shared, r).await,
        Op::GcRoots(r) => gc::roots(shared, r).await,
        Op::GcLinks(r) => gc::links(shared, r).await,
        Op::GcOld(r) => gc::old(shared, r).await,
        Op::GcRun(r) => crate::gc::run(shared, r).await,
        Op::GcStatus(_) => crate::gc::status(shared).await,
        Op::ScrubStart(r) => crate::scrub::start(shared, &r),
        Op::ScrubStatus(_) => crate::scrub::status(shared),
        Op::KeepCheckpoint(r) => retention::keep(shared, r).await,
        Op::Kept(r) => retention::kept(shared, r).await,
        Op::RemoveCheckpoints(r) => retention::remove(shared, r).await,
        Op::SetPolicies(r) => retention::set_policies(shared, r).await,
        Op::Policies(_) => retention::policies(shared).await,
        Op::LabelSandbox(r) => retention::label(shared, r).await,
    };
    Ok(Answered::Message(answer?.into()))
}

/// Whether the answer may be long.
pub(crate) fn is_long(request: &Request) -> bool {
    matches!(
        request.op,
        Some(
            Op::Get(_)
                | Op::Sandboxes(_)
                | Op::Manifests(_)
                | Op::Turns(_)
                | Op::Images(_)
                | Op::GcRoots(_)
                | Op::GcLinks(_)
                | Op::GcOld(_)
        )
    )
}

fn sandbox_id(bytes: &Bytes) -> Result<SandboxId, WireError> {
    Ok(SandboxId(tidepool_proto::wire::array(
        bytes,
        "a sandbox id has 16 bytes",
    )?))
}

fn done() -> response::Op {
    response::Op::Done(response::Done {})
}

async fn status(shared: &Arc<Shared>) -> response::Op {
    let shared = shared.clone();
    let (stats, shards) = (shared.clone(), shared.map.shards());
    let s = tokio::task::spawn_blocking(move || stats.stats())
        .await
        .unwrap_or_default();
    response::Op::Status(response::Status {
        chunks: s.chunks,
        chunk_bytes: s.chunk_bytes,
        ready: s.ready,
        full: s.full,
        free_bytes: s.free_bytes,
        corruptions: s.corruptions,
        refused: s.refused,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cluster: shared.cluster.clone(),
        shards,
    })
}

impl Shared {
    pub(crate) fn stats(&self) -> NodeStats {
        let mut stats = NodeStats {
            ready: self.counters.ready(),
            full: self.counters.stalled() || self.space.is_full(),
            free_bytes: self.space.free(),
            corruptions: self.counters.corruptions(),
            refused: self.counters.refused(),
            requests: self.counters.requests(),
            messages_dropped: self.peers.dropped(),
            bodies_pushed: self.counters.brought().0,
            bodies_fetched: self.counters.brought().1,
            ..NodeStats::default()
        };
        for group in self.map.shard_groups() {
            // A damaged count is no reason to have no answer: everything else still counts.
            if let Ok(Some(bytes)) = self.db.state(group, &keys::stats())
                && let Ok(shard) = ShardStats::decode(&bytes)
            {
                stats.chunks = stats.chunks.saturating_add(shard.chunks);
                stats.chunk_bytes = stats.chunk_bytes.saturating_add(shard.chunk_bytes);
            }
        }
        stats
    }

    /// An item of a list, if it is whole. A damaged one is left out, counted and reported: it must not hide all others, and
    /// asking for it by its own key says what is wrong.
    fn whole<T, E: Into<Failure>>(&self, item: Result<T, E>, damaged: &mut u32) -> Option<T> {
        item.map_err(|e| {
            let failure: Failure = e.into();
            *damaged += 1;
            self.counters.corruption();
            tracing::error!(error = %failure.text, "a damaged record was left out of a list");
        })
        .ok()
    }

    /// A group's round of collection. Whoever reads something that others may come to rest on reads this first.
    pub(crate) fn round(&self, group: u32) -> Result<u64, Failure> {
        Ok(match self.db.state(group, &keys::gc())? {
            Some(value) => GcState::decode(&value)?.round,
            None => GcState::default().round,
        })
    }

    /// Runs something that reads the disk where it holds nobody up.
    pub(crate) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        f: impl FnOnce(&Self) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let shared = self.clone();
        tokio::task::spawn_blocking(move || f(&shared))
            .await
            .unwrap_or_else(|e| Err(Failure::new(ErrorKind::Failed, format!("a read died: {e}"))))
    }

    /// Reads from a group's state, which shows everything acknowledged before.
    pub(crate) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        group: u32,
        f: impl FnOnce(&Self) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        self.driver.read(group).await?;
        self.blocking(f).await
    }

    /// Proposes a command that adds something, if there is room.
    async fn write(&self, group: u32, op: op::Op) -> Result<Reply, Failure> {
        if self.space.is_full() {
            self.led_elsewhere(group)?;
        }
        self.propose(group, op).await
    }

    /// Why there is no room for a write to some groups that are led here: others take it, or soon will, or nobody can.
    fn no_room(&self, groups: impl IntoIterator<Item = u32>) -> Failure {
        let statuses = self.driver.status();
        for group in groups {
            let Some(status) = statuses.iter().find(|s| s.group == group) else {
                return DriverError::NotLeader { group, leader: 0 }.into();
            };
            let me = self.node;
            let conf = &status.conf;
            if conf.voters == [me] && conf.voters_outgoing.is_empty() {
                continue;
            }
            if !status.leads && status.leader != Some(me) {
                let leader = status.leader.unwrap_or(0);
                return DriverError::NotLeader { group, leader }.into();
            }
            // Told a moment ago, or not yet.
            if status.yields || !status.leads || !self.counters.no_room() {
                return Failure::again(format!(
                    "the store's disk is full: another node takes over group {group}"
                ));
            }
        }
        Failure::full()
    }

    /// Nothing where a group that there is no room for here is led by another node.
    fn led_elsewhere(&self, group: u32) -> Result<(), Failure> {
        let why = self.no_room([group]);
        if why.is_moved() { Ok(()) } else { Err(why) }
    }

    /// Proposes a command that frees something, if there is room for its record.
    pub(crate) async fn write_freeing(&self, group: u32, op: op::Op) -> Result<Reply, Failure> {
        if !self.space.may_free() {
            self.led_elsewhere(group)?;
        }
        self.propose(group, op).await
    }

    /// Proposes a command to a group wherever it is led, for a part of a request that belongs elsewhere.
    pub(crate) async fn propose(&self, group: u32, op: op::Op) -> Result<Reply, Failure> {
        let command = Command::new(0, op);
        match self.propose_here(group, command.clone()).await {
            Err(Failure { moved: Some(_), .. }) => {}
            other => return other,
        }
        let command = command.encode_to_vec().into();
        let op = request::Op::Propose(request::Propose { group, command });
        match self.client.call_group(group, op).await? {
            response::Op::Reply(bytes) => Ok(Reply::decode(&bytes)?),
            _ => Err(Failure::new(
                ErrorKind::Failed,
                "a node answered with something that was not asked for",
            )),
        }
    }

    /// Proposes a command to a group that this node leads. The driver sets the time.
    async fn propose_here(&self, group: u32, command: Command) -> Result<Reply, Failure> {
        Ok(received(self.driver.propose(group, command)).await?)
    }

    /// What a client asks of a sandbox's own shard: one that is led elsewhere is asked for there.
    async fn write_sandbox(&self, id: SandboxId, op: op::Op) -> Answer {
        let group = self.map.of_sandbox(&id);
        if self.space.is_full() {
            return Err(self.no_room([group]));
        }
        match self.propose_here(group, Command::new(0, op)).await? {
            Reply::Epoch(e) => Ok(response::Op::Epoch(e.0)),
            _ => Ok(done()),
        }
    }
}
