//! The way to the driver's thread.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use tidepool_proto::ChunkName;
use tidepool_store_core::{Command, Refusal, Reply};
use tidepool_store_raft::{
    Envelope, GroupStatus, Input as CoreInput, Order, Page, PageRequest, Rejection,
};
use tokio::sync::oneshot;

use crate::db::DbError;

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

impl From<Rejection> for DriverError {
    fn from(why: Rejection) -> Self {
        match why {
            Rejection::Refused(refusal) => DriverError::Refused(refusal),
            Rejection::NotLeader { group, leader } => DriverError::NotLeader {
                group,
                leader: leader.unwrap_or(0),
            },
            Rejection::Again(why) => DriverError::Again(why),
            Rejection::Full => DriverError::Full,
        }
    }
}

pub(super) type Answer<T> = oneshot::Sender<Result<T, DriverError>>;

/// What the driver's thread is told.
pub(super) enum Input {
    Propose {
        group: u32,
        command: Box<Command>,
        answer: Answer<Reply>,
    },
    Read {
        group: u32,
        answer: Answer<()>,
    },
    Core(CoreInput),
    Messages {
        from: u64,
        envelopes: Vec<Envelope>,
    },
    Page {
        request: PageRequest,
        answer: oneshot::Sender<Result<Page, String>>,
    },
    /// Bodies of a group, whether it is here or not, that nothing names any more.
    DeleteOrphans {
        group: u32,
        names: Vec<ChunkName>,
        done: oneshot::Sender<u64>,
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

/// The driver's end of it.
pub(crate) struct Inputs {
    pub(super) inputs: Receiver<Input>,
    pub(super) statuses: Arc<RwLock<Vec<GroupStatus>>>,
}

impl Handle {
    /// Both ends; what is said before the driver runs waits.
    pub(crate) fn new() -> (Handle, Inputs) {
        let (tx, rx) = channel();
        let statuses = Arc::new(RwLock::new(Vec::new()));
        let handle = Handle {
            inputs: tx,
            statuses: statuses.clone(),
        };
        let inputs = Inputs {
            inputs: rx,
            statuses,
        };
        (handle, inputs)
    }

    // A driver that is gone drops what it is told, with the answer's sender, which its receiver sees.
    fn tell(&self, input: Input) {
        let _ = self.inputs.send(input);
    }

    /// Proposes a command; the result comes when it is applied.
    pub(crate) fn propose(
        &self,
        group: u32,
        command: Command,
    ) -> oneshot::Receiver<Result<Reply, DriverError>> {
        let (answer, result) = oneshot::channel();
        let command = Box::new(command);
        self.tell(Input::Propose {
            group,
            command,
            answer,
        });
        result
    }

    /// Waits until the state shows everything that was acknowledged before.
    pub(crate) async fn read(&self, group: u32) -> Result<(), DriverError> {
        let (answer, result) = oneshot::channel();
        self.tell(Input::Read { group, answer });
        received(result).await
    }

    /// Messages of another node.
    pub(crate) fn deliver(&self, from: u64, envelopes: Vec<Envelope>) {
        self.tell(Input::Messages { from, envelopes });
    }

    /// These bodies were stored; those are gone at their source.
    pub(crate) fn bodies_fetched(&self, fetch: u64, gone: Vec<ChunkName>) {
        self.tell(Input::Core(CoreInput::BodiesFetched { fetch, gone }));
    }

    pub(crate) fn page_fetched(&self, fetch: u64, page: Page) {
        self.tell(Input::Core(CoreInput::PageFetched { fetch, page }));
    }

    pub(crate) fn fetch_failed(&self, fetch: u64) {
        self.tell(Input::Core(CoreInput::FetchFailed { fetch }));
    }

    pub(crate) fn order(&self, order: Order) {
        self.tell(Input::Core(CoreInput::Order(order)));
    }

    /// A page of a raft snapshot of a group that is here.
    pub(crate) async fn page(&self, request: PageRequest) -> Result<Page, String> {
        let (answer, result) = oneshot::channel();
        self.tell(Input::Page { request, answer });
        result
            .await
            .unwrap_or_else(|_| Err("the node is stopping".into()))
    }

    /// Deletes those of a group's bodies that no record names and nothing under way needs; how many were looked at in vain is not told,
    /// only how many may be gone now.
    pub(crate) async fn delete_orphans(&self, group: u32, names: Vec<ChunkName>) -> u64 {
        let (done, result) = oneshot::channel();
        self.tell(Input::DeleteOrphans { group, names, done });
        result.await.unwrap_or(0)
    }

    /// The replicas here, as they were a moment ago.
    pub(crate) fn status(&self) -> Vec<GroupStatus> {
        let statuses = self.statuses.read().unwrap_or_else(PoisonError::into_inner);
        statuses.clone()
    }

    /// Whether a replica of the group is here.
    pub(crate) fn is_here(&self, group: u32) -> bool {
        let statuses = self.statuses.read().unwrap_or_else(PoisonError::into_inner);
        statuses.iter().any(|s| s.group == group)
    }

    /// The other members of a group that is led from here; nobody where it is not.
    pub(crate) fn followers(&self, group: u32) -> Vec<u64> {
        let statuses = self.statuses.read().unwrap_or_else(PoisonError::into_inner);
        let Some(led) = statuses.iter().find(|s| s.group == group && s.leads) else {
            return Vec::new();
        };
        let conf = &led.conf;
        let all = conf.voters.iter().chain(&conf.voters_outgoing);
        let all: BTreeSet<u64> = all.chain(&conf.learners).copied().collect();
        all.into_iter().filter(|n| Some(*n) != led.leader).collect()
    }

    pub(crate) fn fail(&self, why: DbError) {
        self.tell(Input::Fail(why));
    }

    pub(crate) fn stop(&self) {
        self.tell(Input::Stop);
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
