//! Messages between store nodes and their clients: QUIC with mutual TLS, one bidirectional stream a request.
//!
//! A frame is the length of a message (u32, little-endian) and the message, in protobuf encoding; the client sends one
//! [`Request`] and ends its side, the node answers with one [`Response`]. A stream's own order and end do the rest: no
//! request numbers, no head-of-line blocking between requests.
//!
//! Requests carry no repeated messages: lists of names are concatenated, bodies stand in one piece beside their lengths.
//! So a frame never costs much more memory decoded than on the wire, whatever it holds.
//!
//! Every request may be sent again: its effect is that of sending it once.

use bytes::{Bytes, BytesMut};
use prost::Message;

use crate::error::ErrorKind;
use crate::ids::ChunkName;

/// The protocol and its version, negotiated by ALPN.
pub const ALPN: &[u8] = b"tidepool/1";
/// The protocol between store nodes and its version.
pub const PEER_ALPN: &[u8] = b"tidepool-peer/1";
/// The name in every store node's certificate.
pub const SERVER_NAME: &str = "tidepool-store";
/// The most bytes of one message.
pub const MAX_FRAME: usize = (16 << 20) + (64 << 10);
/// The most body bytes a client puts into one request.
pub const MAX_PUT_BYTES: usize = 8 << 20;
/// The most bodies in one request.
pub const MAX_PUT_BODIES: usize = 4096;
/// The most names in one request.
pub const MAX_NAMES: usize = 8192;
/// Body or record bytes after which a node ends an answer early; the client asks for the rest.
pub const ANSWER_BYTES: usize = 4 << 20;
/// The longest sandbox or image name, in bytes.
pub const MAX_RECORD_NAME: usize = 256;
/// The most bytes of a sandbox's metadata or of an image's record.
pub const MAX_RECORD: usize = 256 << 10;
/// The longest a session lives without being renewed, in milliseconds.
pub const MAX_SESSION_TTL_MS: u64 = 24 * 3600 * 1000;

/// Instead of a number of links: the chunk is not there.
pub const ABSENT: u32 = u32::MAX;

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than [`MAX_FRAME`].
    #[error("a frame of {len} bytes is over the bound of {MAX_FRAME}")]
    TooLong { len: u64 },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// Not a message of this protocol.
    #[error("not a message of this protocol: {0}")]
    Message(String),
    /// A field is not what it should be.
    #[error("{0}")]
    Field(&'static str),
}

/// What a client asks of a store node.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    #[prost(
        oneof = "request::Op",
        tags = "1, 40, 41, 42, 43, 44, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 50, 51"
    )]
    pub op: Option<request::Op>,
}

/// The operations of a [`Request`].
pub mod request {
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
}

/// What a store node answers.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    #[prost(
        oneof = "response::Op",
        tags = "1, 40, 41, 42, 43, 44, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 50"
    )]
    pub op: Option<response::Op>,
}

/// The answers of a [`Response`].
pub mod response {
    use bytes::Bytes;

    pub use crate::cluster::{Joined, NotLeader, Topology};

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Op {
        #[prost(message, tag = "1")]
        Error(Error),
        #[prost(message, tag = "40")]
        Topology(Topology),
        /// Ask somebody else.
        #[prost(message, tag = "41")]
        NotLeader(NotLeader),
        #[prost(message, tag = "42")]
        Joined(Joined),
        #[prost(string, tag = "43")]
        Token(String),
        /// What a proposed command came to: an encoded reply of the store's core.
        #[prost(bytes = "bytes", tag = "44")]
        Reply(Bytes),
        #[prost(message, tag = "2")]
        Done(Done),
        #[prost(message, tag = "3")]
        Status(Status),
        #[prost(message, tag = "5")]
        Put(Put),
        #[prost(message, tag = "6")]
        Bodies(Bodies),
        #[prost(uint64, tag = "7")]
        Epoch(u64),
        #[prost(message, tag = "8")]
        Sandboxes(Sandboxes),
        #[prost(message, tag = "9")]
        Records(Records),
        /// One record; `Error` with `NotFound` where there is none.
        #[prost(bytes = "bytes", tag = "10")]
        Record(Bytes),
        #[prost(message, tag = "11")]
        Pinned(Pinned),
        #[prost(message, tag = "12")]
        Found(Found),
        #[prost(message, tag = "13")]
        GcRoots(GcNames),
        #[prost(message, tag = "14")]
        GcLinks(GcLinks),
        #[prost(message, tag = "15")]
        GcOld(GcNames),
        /// An account of a collection, as JSON.
        #[prost(bytes = "bytes", tag = "16")]
        GcReport(Bytes),
        /// The account of a scrub, in JSON.
        #[prost(bytes = "bytes", tag = "50")]
        ScrubReport(Bytes),
    }

    /// What was pinned.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Pinned {
        /// The names not in the store, concatenated.
        #[prost(bytes = "bytes", tag = "1")]
        pub missing: Bytes,
        /// The lowest round that the others carry now.
        #[prost(uint64, tag = "2")]
        pub round: u64,
    }

    /// A record that others may rest on.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Found {
        #[prost(bytes = "bytes", tag = "1")]
        pub record: Bytes,
        /// The round in which it was there.
        #[prost(uint64, tag = "2")]
        pub round: u64,
    }

    /// A page of names.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct GcNames {
        /// Concatenated.
        #[prost(bytes = "bytes", tag = "1")]
        pub names: Bytes,
        /// Where the next page begins; empty where this is the last.
        #[prost(bytes = "bytes", tag = "2")]
        pub next: Bytes,
        /// A command that clears up what this page met and no round needs any more; empty for none.
        #[prost(bytes = "bytes", tag = "3")]
        pub purge: Bytes,
        /// Lengths of the bodies of these names, where that was asked: one u32, little-endian, for each.
        #[prost(bytes = "bytes", tag = "4")]
        pub lens: Bytes,
        /// Checkpoints and images on this page.
        #[prost(uint64, tag = "6")]
        pub items: u64,
    }

    /// The links of chunks.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct GcLinks {
        /// How many of the names asked for this answers: one u32, little-endian, each. [`super::ABSENT`] for a chunk that is not there.
        #[prost(bytes = "bytes", tag = "1")]
        pub counts: Bytes,
        /// The links of all, concatenated.
        #[prost(bytes = "bytes", tag = "2")]
        pub links: Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Error {
        /// As [`super::kind_code`].
        #[prost(uint32, tag = "1")]
        pub kind: u32,
        #[prost(string, tag = "2")]
        pub text: String,
        /// Sending the request again soon may succeed.
        #[prost(bool, tag = "3")]
        pub again: bool,
        /// What the request rests on may have been collected: pinning and uploading again makes it good.
        #[prost(bool, tag = "4")]
        pub upload_again: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Done {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Status {
        #[prost(uint64, tag = "1")]
        pub chunks: u64,
        #[prost(uint64, tag = "2")]
        pub chunk_bytes: u64,
        #[prost(bool, tag = "3")]
        pub ready: bool,
        /// Writes are refused for want of room.
        #[prost(bool, tag = "4")]
        pub full: bool,
        #[prost(uint64, tag = "5")]
        pub free_bytes: u64,
        /// Damaged bodies and records met since the node started.
        #[prost(uint64, tag = "6")]
        pub corruptions: u64,
        #[prost(uint64, tag = "7")]
        pub refused: u64,
        #[prost(string, tag = "8")]
        pub version: String,
        #[prost(string, tag = "9")]
        pub cluster: String,
        #[prost(uint32, tag = "10")]
        pub shards: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Put {
        /// Bodies stored by this request.
        #[prost(uint64, tag = "1")]
        pub stored: u64,
        #[prost(uint64, tag = "2")]
        pub stored_bytes: u64,
        /// Bodies that were there already.
        #[prost(uint64, tag = "3")]
        pub present: u64,
        /// The lowest round that these chunks carry now.
        #[prost(uint64, tag = "4")]
        pub round: u64,
    }

    /// The first bodies of those asked for: at least one where any was.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Bodies {
        #[prost(bytes = "bytes", tag = "1")]
        pub lens: Bytes,
        #[prost(bytes = "bytes", tag = "2")]
        pub bodies: Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Sandbox {
        #[prost(bytes = "bytes", tag = "1")]
        pub id: Bytes,
        #[prost(string, tag = "2")]
        pub name: String,
        #[prost(uint64, tag = "3")]
        pub epoch: u64,
        /// Committed turns; they are numbered from the first one on without a gap.
        #[prost(uint64, tag = "4")]
        pub turns: u64,
        #[prost(uint64, tag = "5")]
        pub last_turn: u64,
        /// Empty where nothing is committed.
        #[prost(bytes = "bytes", tag = "6")]
        pub head: Bytes,
        #[prost(uint64, tag = "7")]
        pub version: u64,
        #[prost(bytes = "bytes", tag = "8")]
        pub meta: Bytes,
        /// The count of changes of its history.
        #[prost(uint64, tag = "9")]
        pub changes: u64,
        /// As the store's core encodes them; empty for none.
        #[prost(bytes = "bytes", tag = "10")]
        pub labels: Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Sandboxes {
        #[prost(message, repeated, tag = "1")]
        pub items: Vec<Sandbox>,
        /// Where the next page begins; empty where this is the last.
        #[prost(bytes = "bytes", tag = "2")]
        pub next: Bytes,
        /// How many were left out because their records are damaged.
        #[prost(uint32, tag = "3")]
        pub damaged: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Record {
        /// A turn, where the list is by turn.
        #[prost(uint64, tag = "1")]
        pub turn: u64,
        /// A name or an id.
        #[prost(bytes = "bytes", tag = "2")]
        pub key: Bytes,
        #[prost(bytes = "bytes", tag = "3")]
        pub bytes: Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Records {
        #[prost(message, repeated, tag = "1")]
        pub items: Vec<Record>,
        /// More follows the last of these.
        #[prost(bool, tag = "2")]
        pub more: bool,
        /// How many were left out because they are damaged.
        #[prost(uint32, tag = "3")]
        pub damaged: u32,
        /// The round in which all of these were there.
        #[prost(uint64, tag = "4")]
        pub round: u64,
    }
}

impl From<request::Op> for Request {
    fn from(op: request::Op) -> Self {
        Self { op: Some(op) }
    }
}

impl From<response::Op> for Response {
    fn from(op: response::Op) -> Self {
        Self { op: Some(op) }
    }
}

/// The frame of a message.
pub fn frame(message: &impl Message) -> Result<Bytes, WireError> {
    let len = message.encoded_len();
    if len > MAX_FRAME {
        return Err(WireError::TooLong { len: len as u64 });
    }
    let mut buf = BytesMut::with_capacity(4 + len);
    buf.extend_from_slice(&(len as u32).to_le_bytes());
    message
        .encode(&mut buf)
        .map_err(|e| WireError::Message(e.to_string()))?;
    Ok(buf.freeze())
}

/// The frame of an answer with these bodies ([`response::Bodies`]) in pieces: what [`frame`] gives, without a copy of any body.
pub fn frame_bodies(bodies: Vec<Bytes>) -> Result<Vec<Bytes>, WireError> {
    use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
    /// Of [`response::Op::Bodies`], [`response::Bodies::lens`] and [`response::Bodies::bodies`].
    const TAGS: [u32; 3] = [6, 1, 2];
    let total: u64 = bodies.iter().map(|b| b.len() as u64).sum();
    let mut lens = BytesMut::with_capacity(bodies.len() * 4);
    for body in &bodies {
        lens.extend_from_slice(&(body.len() as u32).to_le_bytes());
    }
    // The tags are below 16: a byte each. A field that is empty is left out.
    let field = |len: u64| match len {
        0 => 0,
        len => 1 + encoded_len_varint(len) as u64 + len,
    };
    let inner = field(lens.len() as u64) + field(total);
    let outer = 1 + encoded_len_varint(inner) as u64 + inner;
    if outer > MAX_FRAME as u64 {
        return Err(WireError::TooLong { len: outer });
    }
    let mut head = BytesMut::with_capacity(32 + lens.len());
    head.extend_from_slice(&(outer as u32).to_le_bytes());
    let mut open = |tag: u32, len: u64, bytes: &[u8]| {
        encode_key(tag, WireType::LengthDelimited, &mut head);
        encode_varint(len, &mut head);
        head.extend_from_slice(bytes);
    };
    open(TAGS[0], inner, &[]);
    if !lens.is_empty() {
        open(TAGS[1], lens.len() as u64, &lens);
    }
    if total > 0 {
        open(TAGS[2], total, &[]);
    }
    let mut pieces = Vec::with_capacity(1 + bodies.len());
    pieces.push(head.freeze());
    pieces.extend(bodies);
    Ok(pieces)
}

/// The length that a frame opens with, checked.
pub fn frame_len(head: [u8; 4]) -> Result<usize, WireError> {
    let len = u32::from_le_bytes(head) as usize;
    if len > MAX_FRAME {
        return Err(WireError::TooLong { len: len as u64 });
    }
    Ok(len)
}

/// The message in a frame's bytes, without its length.
pub fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, WireError> {
    M::decode(bytes).map_err(|e| WireError::Message(e.to_string()))
}

/// Fixed-length bytes of a field.
pub fn array<const N: usize>(bytes: &[u8], what: &'static str) -> Result<[u8; N], WireError> {
    bytes.try_into().map_err(|_| WireError::Field(what))
}

/// Names, concatenated.
pub fn join_names<'a>(names: impl IntoIterator<Item = &'a ChunkName>) -> Bytes {
    let mut out = BytesMut::new();
    for name in names {
        out.extend_from_slice(&name.0);
    }
    out.freeze()
}

/// What [`join_names`] joined.
pub fn split_names(bytes: &[u8]) -> Result<Vec<ChunkName>, WireError> {
    let (names, rest) = bytes.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(WireError::Field(
            "a list of names is not a whole number of them",
        ));
    }
    if names.len() > MAX_NAMES {
        return Err(WireError::Field("too many names in one request"));
    }
    Ok(names.iter().map(|n| ChunkName(*n)).collect())
}

/// Bodies in one piece, beside their lengths. One alone is not copied.
pub fn join_bodies<'a>(bodies: impl Iterator<Item = &'a Bytes> + Clone) -> (Bytes, Bytes) {
    let mut first = bodies.clone();
    if let (Some(body), None) = (first.next(), first.next()) {
        let lens = Bytes::copy_from_slice(&(body.len() as u32).to_le_bytes());
        return (lens, body.clone());
    }
    let (mut lens, mut all) = (
        BytesMut::new(),
        BytesMut::with_capacity(bodies.clone().map(Bytes::len).sum()),
    );
    for body in bodies {
        lens.extend_from_slice(&(body.len() as u32).to_le_bytes());
        all.extend_from_slice(body);
    }
    (lens.freeze(), all.freeze())
}

/// What [`join_bodies`] joined; the bodies share the memory of `all`.
pub fn split_bodies(lens: &[u8], mut all: Bytes) -> Result<Vec<Bytes>, WireError> {
    let (lens, rest) = lens.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(WireError::Field(
            "a list of lengths is not a whole number of them",
        ));
    }
    if lens.len() > MAX_NAMES {
        return Err(WireError::Field("too many bodies in one message"));
    }
    let mut bodies = Vec::with_capacity(lens.len());
    for len in lens {
        let len = u32::from_le_bytes(*len) as usize;
        if len > all.len() {
            return Err(WireError::Field(
                "the bodies are shorter than their lengths say",
            ));
        }
        bodies.push(all.split_to(len));
    }
    if !all.is_empty() {
        return Err(WireError::Field(
            "the bodies are longer than their lengths say",
        ));
    }
    Ok(bodies)
}

const KINDS: [ErrorKind; 8] = [
    ErrorKind::Failed,
    ErrorKind::Invalid,
    ErrorKind::NotFound,
    ErrorKind::Conflict,
    ErrorKind::Fenced,
    ErrorKind::Unavailable,
    ErrorKind::Corruption,
    ErrorKind::Denied,
];

/// An error kind's number on the wire.
pub fn kind_code(kind: ErrorKind) -> u32 {
    KINDS.iter().position(|k| *k == kind).unwrap_or(0) as u32
}

/// The kind of a number; a number of a newer peer is `Failed`.
pub fn kind_of(code: u32) -> ErrorKind {
    KINDS
        .get(code as usize)
        .copied()
        .unwrap_or(ErrorKind::Failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_join_and_split() {
        let bodies = [
            Bytes::from_static(b"ab"),
            Bytes::new(),
            Bytes::from_static(b"c"),
        ];
        let (lens, all) = join_bodies(bodies.iter());
        assert_eq!(split_bodies(&lens, all.clone()).unwrap(), bodies);
        assert!(split_bodies(&lens[..11], all.clone()).is_err());
        assert!(split_bodies(&lens[..8], all.clone()).is_err());
        assert!(split_bodies(&lens, all.slice(..2)).is_err());
    }

    #[test]
    fn frames_are_bounded() {
        let request = Request::from(request::Op::PutImage(request::PutImage {
            name: "x".into(),
            record: vec![0; MAX_FRAME].into(),
            ..request::PutImage::default()
        }));
        assert!(matches!(frame(&request), Err(WireError::TooLong { .. })));
        assert!(frame_len((MAX_FRAME as u32 + 1).to_le_bytes()).is_err());
        let ok = Request::from(request::Op::Status(request::Status {}));
        let bytes = frame(&ok).unwrap();
        assert_eq!(
            frame_len(bytes[..4].try_into().unwrap()).unwrap(),
            bytes.len() - 4
        );
        assert_eq!(decode::<Request>(bytes.slice(4..)).unwrap(), ok);
        assert!(decode::<Request>(Bytes::from_static(b"\xff\xff\xff")).is_err());
    }

    #[test]
    fn bodies_in_pieces_are_the_same_frame() {
        for bodies in [
            vec![],
            vec![Bytes::new()],
            vec![
                Bytes::from_static(b"a"),
                Bytes::new(),
                Bytes::from(vec![7; 70_000]),
            ],
            vec![Bytes::from(vec![1; 1 << 20]); 9],
        ] {
            let (lens, all) = join_bodies(bodies.iter());
            let whole = response::Op::Bodies(response::Bodies { lens, bodies: all });
            let whole = frame(&Response::from(whole)).unwrap();
            assert!(frame_bodies(bodies).unwrap().concat() == whole);
        }
        let much = vec![Bytes::from(vec![1; 1 << 20]); 17];
        assert!(matches!(frame_bodies(much), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn kinds_keep_their_numbers() {
        for kind in KINDS {
            assert_eq!(kind_of(kind_code(kind)), kind);
        }
        assert_eq!(kind_of(99), ErrorKind::Failed);
    }
}
