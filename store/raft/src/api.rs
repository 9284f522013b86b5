//! What goes into a [`crate::Core`] and what comes out of it.
//!
//! Everything is plain data. Ids named `fetch` are the core's, those named `token` are the caller's.

use raft::eraftpb::ConfState;
use tidepool_proto::ChunkName;
use tidepool_store_core::{Command, Refusal, Reply};

use crate::disk::DiskError;
use crate::envelope::Envelope;
use crate::page::{Page, PageRequest};

/// Something happened.
#[derive(Debug)]
pub enum Input {
    /// An envelope from another node, which the transport has authenticated as `from`.
    Message { from: u64, envelope: Envelope },
    /// Another [`crate::TICK_MS`] have passed.
    Tick,
    /// Proposes a command; its time is set by the core. Answered by [`Action::Answer`], once.
    Propose {
        group: u32,
        token: u64,
        command: Box<Command>,
    },
    /// Asks for a point from which the state here shows all that was acknowledged before. Answered by [`Action::ReadReady`], once.
    Read { group: u32, token: u64 },
    /// The answer to [`Action::FetchBodies`]: what came is stored with the promise of [`crate::Disk::has_body`]; `gone` are those of
    /// which the sender said that they were collected. Names in neither list are asked for again.
    BodiesFetched { fetch: u64, gone: Vec<ChunkName> },
    /// The answer to [`Action::FetchPage`].
    PageFetched { fetch: u64, page: Page },
    /// A fetch came to nothing: another source is tried.
    FetchFailed { fetch: u64 },
    /// Whether this node's disk has room for new writes, as far as the caller can tell; there is until it says otherwise. A node without
    /// hands its leadership to members that have.
    Room(bool),
    /// An order of the caller.
    Order(Order),
}

/// What the caller wants of a group's replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Where the group should live. Idempotent; given to every node that has the group, or should have it, at every change and
    /// now and then. The leader walks there step by step, see [`crate::plan`].
    Target(Target),
    /// Hand leadership to this voter, if this node leads.
    Transfer { group: u32, to: u64 },
}

/// The members a group should have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Target {
    pub group: u32,
    /// The first is the preferred leader. Empty: no opinion, nothing moves.
    pub voters: Vec<u64>,
    pub learners: Vec<u64>,
}

impl Target {
    /// Whether this node belongs to the group.
    pub fn has(&self, node: u64) -> bool {
        self.voters.contains(&node) || self.learners.contains(&node)
    }
}

/// What the caller has to do. None of it may be done before the `turn` that queued it has returned, and all of it is best effort
/// except `Answer` and `ReadReady`.
#[derive(Debug)]
pub enum Action {
    /// Send these to a node, in this order, in one frame or several; they may be lost, duplicated, delayed and reordered.
    Send { to: u64, envelopes: Vec<Envelope> },
    /// A proposal is decided, or never will be here.
    Answer {
        token: u64,
        result: Result<Reply, Rejection>,
    },
    /// A read may be answered from the state as it is now or later.
    ReadReady {
        token: u64,
        result: Result<(), Rejection>,
    },
    /// Get these bodies of `group` from node `from`, store them durably, and say so with [`Input::BodiesFetched`] or
    /// [`Input::FetchFailed`]. The source may call a name *gone* only if it has neither body nor chunk row and has applied the
    /// group's log to `index` at least.
    FetchBodies {
        fetch: u64,
        from: u64,
        group: u32,
        index: u64,
        names: Vec<ChunkName>,
    },
    /// Get one page of a raft snapshot from node `from`: [`Input::PageFetched`] or [`Input::FetchFailed`].
    FetchPage {
        fetch: u64,
        from: u64,
        request: PageRequest,
    },
    /// The group's [`GroupStatus`] changed, or the group came or went: ask [`crate::Core::status`].
    Changed { group: u32 },
}

/// Why a proposal or a read has no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The command was applied and refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// This node does not lead the group. Nothing was proposed.
    #[error("this node does not lead group {group}")]
    NotLeader { group: u32, leader: Option<u64> },
    /// Not decided here and now: it may be done or not; asking again may help.
    #[error("{0}")]
    Again(&'static str),
    /// No room: writes are refused.
    #[error("the store's disk is full")]
    Full,
}

/// The node has to stop.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// A write failed: what is on disk is unknown, only a restart can tell.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// What is stored does not fit together.
    #[error("group {group}: {what}")]
    Damaged { group: u32, what: String },
    #[error("consensus of group {group}: {source}")]
    Raft { group: u32, source: raft::Error },
}

/// A group's replica on this node, for topology and metrics.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GroupStatus {
    pub group: u32,
    pub term: u64,
    /// The leader, where it is known.
    pub leader: Option<u64>,
    /// This node leads, and everything of earlier terms is committed.
    pub leads: bool,
    pub conf: ConfState,
    pub applied: u64,
    pub commit: u64,
    /// Entries kept in the log.
    pub log_entries: u64,
    /// A raft snapshot is being fetched.
    pub installing: bool,
    /// Of a leader: members that are not up to date, with how many entries they lack.
    pub behind: Vec<(u64, u64)>,
    /// Of a leader without room to write: a member that has takes over soon.
    pub yields: bool,
}
