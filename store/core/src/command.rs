//! The commands of the raft log. Those that a client asks for have the client's message as their body.

use bytes::Bytes;
use tidepool_proto::wire::request;

/// One entry of a group's log.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The leader's time when it proposed this, in milliseconds since the Unix epoch.
    #[prost(uint64, tag = "1")]
    pub now_ms: u64,
    #[prost(
        oneof = "op::Op",
        tags = "60, 61, 62, 63, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29"
    )]
    pub op: Option<op::Op>,
}

impl Command {
    /// A command proposed at `now_ms`.
    pub fn new(now_ms: u64, op: op::Op) -> Self {
        Self {
            now_ms,
            op: Some(op),
        }
    }
}

/// The operations of a [`Command`].
pub mod op {
    use super::{Bytes, request};

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Op {
        /// Meta.
        #[prost(message, tag = "60")]
        InitCluster(InitCluster),
        /// Meta.
        #[prost(message, tag = "61")]
        AddToken(AddToken),
        /// Meta.
        #[prost(message, tag = "62")]
        AddNode(AddNode),
        /// Meta.
        #[prost(message, tag = "63")]
        SetNode(SetNode),
        /// Shard.
        #[prost(message, tag = "2")]
        Pin(Pin),
        /// Shard.
        #[prost(message, tag = "3")]
        AddChunks(AddChunks),
        /// Shard.
        #[prost(message, tag = "4")]
        EndSession(EndSession),
        /// Shard.
        #[prost(message, tag = "5")]
        ExpireSessions(ExpireSessions),
        /// Shard.
        #[prost(message, tag = "6")]
        CreateSandbox(request::CreateSandbox),
        /// Shard.
        #[prost(message, tag = "7")]
        FenceUnborn(FenceUnborn),
        /// Shard.
        #[prost(message, tag = "8")]
        TakeSandbox(request::TakeSandbox),
        /// Shard.
        #[prost(message, tag = "9")]
        UpdateSandboxMeta(request::UpdateSandboxMeta),
        /// Shard.
        #[prost(message, tag = "10")]
        RemoveSandbox(request::RemoveSandbox),
        /// Shard.
        #[prost(message, tag = "11")]
        Commit(request::Commit),
        /// Meta.
        #[prost(message, tag = "12")]
        ReserveName(ReserveName),
        /// Meta.
        #[prost(message, tag = "13")]
        ReleaseName(ReleaseName),
        /// Meta.
        #[prost(message, tag = "14")]
        PutImage(request::PutImage),
        /// Meta.
        #[prost(message, tag = "15")]
        RemoveImage(request::Image),
        /// Meta.
        #[prost(message, tag = "20")]
        StartRound(StartRound),
        /// Any group.
        #[prost(message, tag = "21")]
        BeginRound(Round),
        /// Any group.
        #[prost(message, tag = "22")]
        Cut(Round),
        /// Shard.
        #[prost(message, tag = "23")]
        Sweep(Sweep),
        /// Any group.
        #[prost(message, tag = "24")]
        Purge(Purge),
        /// Meta.
        #[prost(message, tag = "25")]
        ReportGc(ReportGc),
        /// Shard.
        #[prost(message, tag = "26")]
        KeepCheckpoint(request::KeepCheckpoint),
        /// Shard.
        #[prost(message, tag = "27")]
        RemoveCheckpoints(request::RemoveCheckpoints),
        /// Meta.
        #[prost(message, tag = "28")]
        SetPolicies(request::SetPolicies),
        /// Shard.
        #[prost(message, tag = "29")]
        LabelSandbox(request::LabelSandbox),
    }

    /// Writes the cluster's record with its first node.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct InitCluster {
        #[prost(uint32, tag = "1")]
        pub shards: u32,
        #[prost(uint64, tag = "2")]
        pub node: u64,
        #[prost(string, tag = "3")]
        pub addr: String,
        #[prost(string, tag = "4")]
        pub zone: String,
    }

    /// Makes a join token valid.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct AddToken {
        #[prost(bytes = "bytes", tag = "1")]
        pub id: Bytes,
        #[prost(uint32, tag = "2")]
        pub uses: u32,
        #[prost(uint64, tag = "3")]
        pub expires_ms: u64,
    }

    /// Gives a new node its number, for one use of a token.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct AddNode {
        #[prost(bytes = "bytes", tag = "1")]
        pub token: Bytes,
        /// The hash of the node's public key.
        #[prost(bytes = "bytes", tag = "2")]
        pub key: Bytes,
        #[prost(string, tag = "3")]
        pub addr: String,
        #[prost(string, tag = "4")]
        pub zone: String,
    }

    /// Changes a node's address (unless empty) and state (unless 0).
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct SetNode {
        #[prost(uint64, tag = "1")]
        pub node: u64,
        #[prost(string, tag = "2")]
        pub addr: String,
        #[prost(uint32, tag = "3")]
        pub state: u32,
        /// Said by the node itself: it becomes active if it was joining, and stays what it is otherwise.
        #[prost(bool, tag = "4")]
        pub only_joining: bool,
    }

    /// Stamps those of the names that are chunks with the shard's round; opens the session where it is new.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Pin {
        #[prost(bytes = "bytes", tag = "1")]
        pub session: Bytes,
        #[prost(uint64, tag = "2")]
        pub expires_ms: u64,
        /// Concatenated.
        #[prost(bytes = "bytes", tag = "3")]
        pub names: Bytes,
    }

    /// Records chunks whose bodies are stored wherever this entry is, and stamps them.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct AddChunks {
        #[prost(bytes = "bytes", tag = "1")]
        pub session: Bytes,
        #[prost(uint64, tag = "2")]
        pub expires_ms: u64,
        #[prost(bytes = "bytes", tag = "3")]
        pub names: Bytes,
        /// Lengths of the bodies: one u32, little-endian, for each name.
        #[prost(bytes = "bytes", tag = "4")]
        pub lens: Bytes,
        /// One byte for each name: [`BROUGHT`] and [`LINKED`].
        #[prost(bytes = "bytes", tag = "5")]
        pub kinds: Bytes,
    }

    /// The body came with this entry. Without this bit it is thought to be there already, which is found out when the entry is applied.
    pub const BROUGHT: u8 = 1;
    /// The body carries links.
    pub const LINKED: u8 = 2;

    /// Asks for a new round of collection.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct StartRound {
        /// 16 random bytes, the same when this is sent again: one asking is one round.
        #[prost(bytes = "bytes", tag = "1")]
        pub token: Bytes,
    }

    /// A step of a round of collection.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Round {
        #[prost(uint64, tag = "1")]
        pub round: u64,
    }

    /// Deletes those of these chunks that were neither added nor pinned since the round began.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Sweep {
        #[prost(uint64, tag = "1")]
        pub round: u64,
        /// Concatenated.
        #[prost(bytes = "bytes", tag = "2")]
        pub names: Bytes,
    }

    /// Deletes what is left of things that were removed before the last cut.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Purge {
        /// Removed sandboxes, concatenated.
        #[prost(bytes = "bytes", tag = "1")]
        pub sandboxes: Bytes,
        /// Removed checkpoints: a sandbox and a turn (u64, big-endian) each, concatenated.
        #[prost(bytes = "bytes", tag = "2")]
        pub checkpoints: Bytes,
        /// Removed images, as [`crate::keys::image_grave_tail`].
        #[prost(bytes = "bytes", repeated, tag = "3")]
        pub images: Vec<Bytes>,
    }

    /// Keeps the account of a round.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ReportGc {
        #[prost(uint64, tag = "1")]
        pub round: u64,
        #[prost(bytes = "bytes", tag = "2")]
        pub report: Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct EndSession {
        #[prost(bytes = "bytes", tag = "1")]
        pub session: Bytes,
    }

    /// Ends those of these sessions whose time is over at the command's time.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ExpireSessions {
        /// Concatenated.
        #[prost(bytes = "bytes", tag = "1")]
        pub sessions: Bytes,
    }

    /// Makes sure that a sandbox which does not exist never will: the name it reserved can then be given to another.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct FenceUnborn {
        #[prost(bytes = "bytes", tag = "1")]
        pub id: Bytes,
    }

    /// Gives a name to a sandbox.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ReserveName {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(bytes = "bytes", tag = "2")]
        pub id: Bytes,
        /// A sandbox that is known to be fenced, whose name may be taken away; empty for none.
        #[prost(bytes = "bytes", tag = "3")]
        pub replacing: Bytes,
    }

    /// Frees a name, if it is this sandbox's.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ReleaseName {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(bytes = "bytes", tag = "2")]
        pub id: Bytes,
    }
}
