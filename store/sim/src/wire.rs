//! What nodes and clients send each other here, where it is not the core's own.

use tidepool_proto::{CheckpointId, ChunkName, SandboxId, TurnNo};
use tidepool_store_core::{Refusal, Reply, SandboxState, SessionState, op};
use tidepool_store_raft::{Page, PageRequest, Rejection};

/// Between nodes. A fetch is known by its number and the run of the node that asked.
#[derive(Debug, Clone)]
pub(crate) enum Packet {
    /// Encoded, as they are on the wire.
    Envelopes(Vec<Vec<u8>>),
    AskBodies {
        run: u64,
        fetch: u64,
        group: u32,
        index: u64,
        names: Vec<ChunkName>,
    },
    Bodies {
        run: u64,
        fetch: u64,
        whole: Vec<ChunkName>,
        gone: Vec<ChunkName>,
    },
    AskPage {
        run: u64,
        fetch: u64,
        request: PageRequest,
    },
    Page {
        run: u64,
        fetch: u64,
        page: Page,
    },
    Refused {
        run: u64,
        fetch: u64,
    },
    /// A scrub wants good copies.
    AskRepair {
        names: Vec<ChunkName>,
    },
    Repair {
        names: Vec<ChunkName>,
    },
}

/// What a client asks of a node.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    Propose {
        group: u32,
        op: Box<op::Op>,
    },
    /// Bodies of one shard.
    Put {
        group: u32,
        session: [u8; 16],
        ttl_ms: u64,
        names: Vec<ChunkName>,
    },
    Read {
        group: u32,
        /// What was applied anywhere when the client asked, for the checker.
        floor: u64,
        query: Query,
    },
    /// A body; any replica answers.
    Get {
        name: ChunkName,
    },
}

/// What is read from a group's state at a point that shows everything acknowledged before.
#[derive(Debug, Clone)]
pub(crate) enum Query {
    Row(Vec<u8>),
    Manifest {
        sandbox: SandboxId,
        checkpoint: CheckpointId,
    },
    History(SandboxId),
    Roots {
        round: u64,
        after: Vec<u8>,
    },
    Links(Vec<ChunkName>),
    Old {
        round: u64,
        after: Vec<u8>,
    },
    Sessions,
}

/// What a node answers.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Reply(Reply),
    Put {
        round: u64,
    },
    Row(Option<Vec<u8>>),
    /// The group's round before the manifest was read, and the manifest.
    Manifest(u64, Option<Vec<u8>>),
    History(Option<History>),
    Roots {
        names: Vec<ChunkName>,
        purge: Option<Box<op::Op>>,
        next: Vec<u8>,
    },
    /// Of each name its links; none where there is no such chunk.
    Links(Vec<Option<Vec<ChunkName>>>),
    Old {
        names: Vec<ChunkName>,
        next: Vec<u8>,
    },
    Sessions(Vec<([u8; 16], SessionState)>),
    Body(Vec<u8>),
}

/// A sandbox and its checkpoints.
#[derive(Debug, Clone)]
pub(crate) struct History {
    pub(crate) sandbox: SandboxState,
    pub(crate) checkpoints: Vec<(TurnNo, CheckpointId)>,
}

/// Why a client has no answer.
#[derive(Debug, Clone)]
pub(crate) enum Fail {
    NotLeader(Option<u64>),
    /// It may be done or not.
    Again,
    Full,
    Refused(Refusal),
    /// There is no such body here, or it is damaged.
    NoBody,
    /// The state is not what is asked about.
    Conflict,
    Timeout,
    /// Tried often enough.
    GaveUp,
}

impl From<Rejection> for Fail {
    fn from(r: Rejection) -> Self {
        match r {
            Rejection::Refused(refusal) => Fail::Refused(refusal),
            Rejection::NotLeader { leader, .. } => Fail::NotLeader(leader),
            Rejection::Again(_) => Fail::Again,
            Rejection::Full => Fail::Full,
        }
    }
}

/// An answer or none.
pub(crate) type Result<T> = std::result::Result<T, Fail>;
