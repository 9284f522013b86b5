//! The one door: a command and a view of the state in, a result and writes out.

use tidepool_proto::wire::WireError;
use tidepool_proto::{ChunkName, Epoch, ErrorKind, SandboxId, SessionId};

use crate::command::{Command, op::Op};
use crate::kv::{KvRead, ReadError, Write};
use crate::{chunks, gc, history, images, names, nodes, policies, sandboxes};

/// Which of the two kinds of state machine a group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    Meta,
    Shard,
}

/// What a command that was not refused answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Done,
    /// Pin: which of the names, by position, are no chunks yet; the round that the others carry now.
    Missing {
        names: Vec<u32>,
        round: u64,
    },
    /// AddChunks: how many were new; the round that all carry now.
    Added {
        chunks: u64,
        bytes: u64,
        round: u64,
    },
    Epoch(Epoch),
    /// FenceUnborn: whether the sandbox exists after all.
    Exists(bool),
    /// ReserveName: the name is that sandbox's.
    TakenBy(SandboxId),
    /// RemoveSandbox: the name it had.
    Removed {
        name: String,
    },
    /// Steps of a collection: how far the group is.
    Gc {
        round: u64,
        fence: u64,
    },
    /// Sweep: the chunks whose records are gone, whose bodies may go now, and how many bytes those have.
    Swept {
        names: Vec<ChunkName>,
        bytes: u64,
    },
    /// AddNode: the node's number.
    Node(u64),
}

/// Why a command changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    pub kind: ErrorKind,
    pub text: String,
    /// The same command may be taken when the bodies it thought were there are sent with it.
    pub again: bool,
    /// What the command rests on may have been collected: pinning, and uploading what is missing, makes it good again.
    pub upload_again: bool,
}

impl Refusal {
    /// A refusal of this kind.
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
            again: false,
            upload_again: false,
        }
    }

    pub(crate) fn again(text: impl Into<String>) -> Self {
        Self {
            again: true,
            ..Self::new(ErrorKind::Unavailable, text)
        }
    }

    pub(crate) fn upload_again(text: impl Into<String>) -> Self {
        Self {
            upload_again: true,
            ..Self::new(ErrorKind::Conflict, text)
        }
    }
}

impl From<ReadError> for Refusal {
    fn from(e: ReadError) -> Self {
        Self::new(ErrorKind::Corruption, e.to_string())
    }
}

impl From<WireError> for Refusal {
    fn from(e: WireError) -> Self {
        Self::new(ErrorKind::Invalid, e.to_string())
    }
}

/// What applying a command comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub result: Result<Reply, Refusal>,
    /// Empty where the command was refused.
    pub writes: Vec<Write>,
}

pub(crate) type Applied = Result<(Reply, Vec<Write>), Refusal>;

/// Applies one command to a group's state. Of the writes, later ones win over earlier ones.
pub fn apply(group: Group, state: &dyn KvRead, command: &Command) -> Outcome {
    match dispatch(group, state, command) {
        Ok((reply, writes)) => Outcome {
            result: Ok(reply),
            writes,
        },
        Err(refusal) => Outcome {
            result: Err(refusal),
            writes: Vec::new(),
        },
    }
}

fn dispatch(group: Group, state: &dyn KvRead, command: &Command) -> Applied {
    let Some(op) = &command.op else {
        return Err(Refusal::new(
            ErrorKind::Invalid,
            "the command is not one that this version knows",
        ));
    };
    match (group, op) {
        (Group::Shard, Op::Pin(c)) => chunks::pin(state, c),
        (Group::Shard, Op::AddChunks(c)) => chunks::add(state, c),
        (Group::Shard, Op::EndSession(c)) => chunks::end_session(state, c),
        (Group::Shard, Op::ExpireSessions(c)) => chunks::expire_sessions(state, c, command.now_ms),
        (Group::Shard, Op::CreateSandbox(c)) => sandboxes::create(state, c),
        (Group::Shard, Op::FenceUnborn(c)) => sandboxes::fence_unborn(state, c),
        (Group::Shard, Op::TakeSandbox(c)) => sandboxes::take(state, c),
        (Group::Shard, Op::UpdateSandboxMeta(c)) => sandboxes::update_meta(state, c),
        (Group::Shard, Op::RemoveSandbox(c)) => sandboxes::remove(state, c),
        (Group::Shard, Op::Commit(c)) => sandboxes::commit(state, c),
        (Group::Shard, Op::KeepCheckpoint(c)) => history::keep(state, c),
        (Group::Shard, Op::RemoveCheckpoints(c)) => history::remove(state, c),
        (Group::Shard, Op::LabelSandbox(c)) => history::label(state, c),
        (Group::Shard, Op::Sweep(c)) => gc::sweep(state, c),
        (Group::Meta, Op::StartRound(c)) => gc::start(state, c),
        (Group::Meta, Op::ReportGc(c)) => gc::report(state, c),
        (_, Op::BeginRound(c)) => gc::begin(state, c),
        (_, Op::Cut(c)) => gc::cut(state, c),
        (_, Op::Purge(c)) => gc::purge(state, c),
        (Group::Meta, Op::SetPolicies(c)) => policies::set(state, c),
        (Group::Meta, Op::InitCluster(c)) => nodes::init(state, c),
        (Group::Meta, Op::AddToken(c)) => nodes::add_token(state, c, command.now_ms),
        (Group::Meta, Op::AddNode(c)) => nodes::add(state, c, command.now_ms),
        (Group::Meta, Op::SetNode(c)) => nodes::set(state, c),
        (Group::Meta, Op::ReserveName(c)) => names::reserve(state, c),
        (Group::Meta, Op::ReleaseName(c)) => names::release(state, c),
        (Group::Meta, Op::PutImage(c)) => images::put(state, c),
        (Group::Meta, Op::RemoveImage(c)) => images::remove(state, c),
        _ => Err(Refusal::new(
            ErrorKind::Invalid,
            "the command does not belong to this kind of group",
        )),
    }
}

pub(crate) fn sandbox_id(bytes: &[u8]) -> Result<SandboxId, Refusal> {
    Ok(SandboxId(tidepool_proto::wire::array(
        bytes,
        "a sandbox id has 16 bytes",
    )?))
}

pub(crate) fn session_id(bytes: &[u8]) -> Result<SessionId, Refusal> {
    Ok(SessionId(tidepool_proto::wire::array(
        bytes,
        "a session id has 16 bytes",
    )?))
}

pub(crate) fn check_name(name: &str, what: &str) -> Result<(), Refusal> {
    if name.is_empty()
        || name.len() > tidepool_proto::wire::MAX_RECORD_NAME
        || name.chars().any(char::is_control)
    {
        return Err(Refusal::new(
            ErrorKind::Invalid,
            format!("{name:.80?} cannot name {what}"),
        ));
    }
    Ok(())
}

pub(crate) fn check_len(len: usize, max: usize, what: &str) -> Result<(), Refusal> {
    if len > max {
        return Err(Refusal::new(
            ErrorKind::Invalid,
            format!("{what} of {len} bytes is over the bound of {max}"),
        ));
    }
    Ok(())
}
