//! What a store cluster remembers, as deterministic state machines: commands in, results and key/value writes out.
//!
//! There are two kinds of raft group. The one **meta** group keeps what is cluster-wide and changes rarely: the names of
//! sandboxes, the records of images, the nodes of the cluster and the policies of retention. Each of the S **shards** keeps the chunks whose
//! names hash to it (with the sessions that upload them) and the sandboxes whose ids do (epoch, turns, manifests, idempotency keys). Chunks that
//! nothing needs any more are collected in rounds over all groups ([`gc`]).
//!
//! [`apply`] is the whole interface: it reads through [`KvRead`], and gives back [`Write`]s that the caller makes durable in one
//! batch with the applied index. It never writes, and never reads what it is about to write.
//!
//! Invariants:
//! - equal states and equal commands give equal results and writes: no clock, no randomness, no iteration order of a hash map;
//! - a refused command writes nothing;
//! - every command may be applied again at once: the second time changes nothing. A copy that comes late, after others, undoes nothing
//!   newer in a sandbox; it can bring a removed image's record back, and a late taking is one more taking;
//! - epochs of a sandbox only grow; a commit with another epoch than the current is refused;
//! - the turns of a sandbox have no gaps, and a recorded turn never changes.
//!
//! Elsewhere on purpose: bodies (the store keeps them beside the log), leaders, replication and time (the raft driver).

mod apply;
pub mod bugs;
mod chunks;
mod command;
pub mod gc;
mod history;
mod images;
pub mod keys;
mod kv;
mod names;
mod nodes;
pub mod placement;
mod policies;
mod records;
mod reply;
pub mod retention;
mod sandboxes;
mod shard;

pub use apply::{Group, Outcome, Refusal, Reply, apply};
pub use command::{Command, op};
pub use kv::{KvRead, ReadError, Write, prefix_end};
pub use nodes::{ClusterState, NodeRecord, TokenRecord};
pub use records::{
    ChunkState, GcState, ImageState, ManifestRow, SandboxState, SessionState, ShardStats,
    Tombstone, decode_number,
};
pub use shard::{META_GROUP, ShardMap};
