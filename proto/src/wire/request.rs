//! The operations of a [`super::Request`].

use bytes::Bytes;

pub use crate::cluster::{ChangeNode, IssueToken, Join, Propose, TopologyRequest};

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Op {
    #[prost(message, tag = "1")]
    Status(Status),
    #[prost(message, tag = "40")]
    Topology(TopologyRequest),
    #[prost(message, tag = "41")]
    Join(Join),
    #[prost(message, tag = "42")]
    IssueToken(IssueToken),
    #[prost(message, tag = "43")]
    ChangeNode(ChangeNode),
    /// Between nodes only.
    #[prost(message, tag = "44")]
    Propose(Propose),
    #[prost(message, tag = "2")]
    Pin(Pin),
    #[prost(message, tag = "3")]
    Put(Put),
    #[prost(message, tag = "4")]
    EndSession(EndSession),
    #[prost(message, tag = "5")]
    Get(Get),
    #[prost(message, tag = "6")]
    CreateSandbox(CreateSandbox),
    #[prost(message, tag = "7")]
    TakeSandbox(TakeSandbox),
    #[prost(message, tag = "8")]
    UpdateSandboxMeta(UpdateSandboxMeta),
    #[prost(message, tag = "9")]
    RemoveSandbox(RemoveSandbox),
    #[prost(message, tag = "10")]
    Sandbox(Sandbox),
    #[prost(message, tag = "11")]
    Sandboxes(After),
    #[prost(message, tag = "12")]
    Commit(Commit),
    #[prost(message, tag = "13")]
    Manifest(Manifest),
    #[prost(message, tag = "14")]
    Manifests(FromTurn),
    #[prost(message, tag = "15")]
    TurnByKey(TurnByKey),
    #[prost(message, tag = "16")]
    Turns(FromTurn),
    #[prost(message, tag = "17")]
    PutImage(PutImage),
    #[prost(message, tag = "18")]
    Image(Image),
    #[prost(message, tag = "19")]
    Images(After),
    #[prost(message, tag = "20")]
    RemoveImage(Image),
    #[prost(message, tag = "22")]
    GcRoots(GcPage),
    #[prost(message, tag = "23")]
    GcLinks(GcLinks),
    #[prost(message, tag = "24")]
    GcOld(GcPage),
    #[prost(message, tag = "25")]
    GcRun(GcRun),
    #[prost(message, tag = "26")]
    GcStatus(GcStatus),
    #[prost(message, tag = "50")]
    ScrubStart(ScrubStart),
    #[prost(message, tag = "51")]
    ScrubStatus(ScrubStatus),
    #[prost(message, tag = "27")]
    KeepCheckpoint(KeepCheckpoint),
    #[prost(message, tag = "28")]
    RemoveCheckpoints(RemoveCheckpoints),
    #[prost(message, tag = "29")]
    SetPolicies(SetPolicies),
    #[prost(message, tag = "30")]
    Policies(Policies),
    #[prost(message, tag = "31")]
    LabelSandbox(LabelSandbox),
    /// The checkpoints of a sandbox that are kept on request.
    #[prost(message, tag = "32")]
    Kept(Sandbox),
}

/// A page of what a group knows, for the collection of a round.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GcPage {
    #[prost(uint32, tag = "1")]
    pub group: u32,
    /// 0 where nothing is going to be swept: the group is looked at as it is.
    #[prost(uint64, tag = "2")]
    pub round: u64,
    /// Where the page begins; empty for the first.
    #[prost(bytes = "bytes", tag = "3")]
    pub after: Bytes,
    /// Checkpoints that count as removed, concatenated and sorted; in a round that is only tried.
    #[prost(bytes = "bytes", tag = "4")]
    pub without: Bytes,
}

/// What these chunks of one group refer to.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GcLinks {
    #[prost(uint32, tag = "1")]
    pub group: u32,
    /// Concatenated.
    #[prost(bytes = "bytes", tag = "2")]
    pub names: Bytes,
}

/// Begins a collection, unless one runs.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GcRun {
    /// How long it waits for uploads that are under way; those that take longer have to pin again.
    #[prost(uint64, tag = "1")]
    pub grace_ms: u64,
    /// Marks and counts, but begins no round and sweeps nothing.
    #[prost(bool, tag = "2")]
    pub dry: bool,
    /// Checkpoints that count as removed where it is dry, concatenated and sorted.
    #[prost(bytes = "bytes", tag = "3")]
    pub without: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct GcStatus {}

/// Begins a scrub of the node that is asked.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ScrubStart {
    /// The pace; 0 for the node's own.
    #[prost(uint64, tag = "1")]
    pub bytes_per_s: u64,
    /// How long a body that nothing names is left alone after a pass saw it first; none for the node's own.
    #[prost(uint64, optional, tag = "2")]
    pub orphan_grace_ms: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ScrubStatus {}

/// Has a checkpoint kept whatever the policies say, or lets it go again.
#[derive(Clone, PartialEq, prost::Message)]
pub struct KeepCheckpoint {
    #[prost(bytes = "bytes", tag = "1")]
    pub sandbox: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub checkpoint: Bytes,
    #[prost(bool, tag = "3")]
    pub keep: bool,
}

/// Removes checkpoints of a sandbox, if its history is still what it was when that was decided.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RemoveCheckpoints {
    #[prost(bytes = "bytes", tag = "1")]
    pub sandbox: Bytes,
    /// The count of changes of the sandbox's history.
    #[prost(uint64, tag = "2")]
    pub changes: u64,
    /// Concatenated.
    #[prost(bytes = "bytes", tag = "3")]
    pub checkpoints: Bytes,
}

/// Replaces the policies of retention.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SetPolicies {
    /// As the store's core encodes them, with the version that they replace.
    #[prost(bytes = "bytes", tag = "1")]
    pub policies: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Policies {}

/// Replaces the labels of a sandbox.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LabelSandbox {
    #[prost(bytes = "bytes", tag = "1")]
    pub sandbox: Bytes,
    /// As the store's core encodes them.
    #[prost(bytes = "bytes", tag = "2")]
    pub labels: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {}

/// Pins names for a session, present or not.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Pin {
    #[prost(bytes = "bytes", tag = "1")]
    pub session: Bytes,
    /// How long the session lives from now without being renewed.
    #[prost(uint64, tag = "2")]
    pub ttl_ms: u64,
    /// Concatenated.
    #[prost(bytes = "bytes", tag = "3")]
    pub names: Bytes,
}

/// Stores bodies and pins their names.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Put {
    #[prost(bytes = "bytes", tag = "1")]
    pub session: Bytes,
    #[prost(uint64, tag = "2")]
    pub ttl_ms: u64,
    #[prost(bytes = "bytes", tag = "3")]
    pub names: Bytes,
    /// One u32, little-endian, for each name.
    #[prost(bytes = "bytes", tag = "4")]
    pub lens: Bytes,
    /// Concatenated.
    #[prost(bytes = "bytes", tag = "5")]
    pub bodies: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EndSession {
    #[prost(bytes = "bytes", tag = "1")]
    pub session: Bytes,
}

/// Reads bodies. The answer may hold only the first ones.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Get {
    #[prost(bytes = "bytes", tag = "1")]
    pub names: Bytes,
    /// The node computes the bodies' checksums itself. Else only the reader does, who has to anyway; one that finds a body damaged asks again
    /// so, for the node to know of it.
    #[prost(bool, tag = "2")]
    pub verify: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateSandbox {
    #[prost(bytes = "bytes", tag = "1")]
    pub id: Bytes,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(bytes = "bytes", tag = "3")]
    pub meta: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TakeSandbox {
    #[prost(bytes = "bytes", tag = "1")]
    pub id: Bytes,
    /// 16 random bytes, the same when the request is sent again: one taking is one new epoch.
    #[prost(bytes = "bytes", tag = "2")]
    pub token: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateSandboxMeta {
    #[prost(bytes = "bytes", tag = "1")]
    pub id: Bytes,
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// The version this replaces; another one is a conflict.
    #[prost(uint64, tag = "3")]
    pub version: u64,
    #[prost(bytes = "bytes", tag = "4")]
    pub meta: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RemoveSandbox {
    #[prost(bytes = "bytes", tag = "1")]
    pub id: Bytes,
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Sandbox {
    #[prost(bytes = "bytes", tag = "1")]
    pub id: Bytes,
}

/// A page of a list: what comes after a key.
#[derive(Clone, PartialEq, prost::Message)]
pub struct After {
    /// Empty for the first page.
    #[prost(bytes = "bytes", tag = "1")]
    pub after: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Commit {
    #[prost(bytes = "bytes", tag = "1")]
    pub sandbox: Bytes,
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    #[prost(uint64, tag = "3")]
    pub turn: u64,
    /// The turn's idempotency key; empty for none.
    #[prost(string, tag = "4")]
    pub key: String,
    #[prost(bytes = "bytes", tag = "5")]
    pub record: Bytes,
    /// Empty where the turn commits no new checkpoint.
    #[prost(bytes = "bytes", tag = "6")]
    pub checkpoint: Bytes,
    #[prost(bytes = "bytes", tag = "7")]
    pub manifest: Bytes,
    /// The upload that brought the checkpoint's chunks; empty for none.
    #[prost(bytes = "bytes", tag = "8")]
    pub session: Bytes,
    /// The lowest round of all answers that this rests on; 0 where it rests on none.
    #[prost(uint64, tag = "9")]
    pub round: u64,
    /// A checkpoint of this sandbox whose chunks were taken over unseen; empty for none.
    #[prost(bytes = "bytes", tag = "10")]
    pub base: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Manifest {
    #[prost(bytes = "bytes", tag = "1")]
    pub sandbox: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub checkpoint: Bytes,
}

/// A page of a sandbox's history, from a turn on.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FromTurn {
    #[prost(bytes = "bytes", tag = "1")]
    pub sandbox: Bytes,
    #[prost(uint64, tag = "2")]
    pub from: u64,
    #[prost(uint32, tag = "3")]
    pub limit: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TurnByKey {
    #[prost(bytes = "bytes", tag = "1")]
    pub sandbox: Bytes,
    #[prost(string, tag = "2")]
    pub key: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct PutImage {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub record: Bytes,
    /// The lowest round of all answers that this rests on.
    #[prost(uint64, tag = "3")]
    pub round: u64,
    /// The chunks from which all of the image's are reached, concatenated.
    #[prost(bytes = "bytes", tag = "4")]
    pub roots: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Image {
    #[prost(string, tag = "1")]
    pub name: String,
}
