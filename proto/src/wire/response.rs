//! The answers of a [`super::Response`].

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
