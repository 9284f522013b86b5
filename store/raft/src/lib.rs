//! The raft core of a store node: every group replica it holds, as one sans-IO state machine.
//!
//! [`Core`] takes inputs (messages, ticks, proposals, what was fetched), writes through the one seam [`Disk`], and yields actions (send, answer,
//! fetch). The store executes it over RocksDB and QUIC, the simulation over maps and an invented network: both run this very code.
//!
//! Invariants:
//! - nothing is sent, answered or applied before the batch it rests on is durable;
//! - a follower acknowledges an entry only when every body it names is durable here (the log carries names, never bodies);
//! - the state, its applied index and its members change in one batch; a raft snapshot is taken over in one batch, when all its bodies are here;
//! - members change by learner, catching up, explicit joint consensus, in that order;
//! - a vote outlives the replica it was given by.
//!
//! Elsewhere on purpose: commands and their meaning (`store/core`), bytes on disk and on the wire (`store`), who should be where (meta's records).

pub mod api;
mod calls;
pub mod disk;
pub mod envelope;
mod fetches;
pub mod group;
mod install;
pub mod log;
mod machine;
mod messages;
pub mod page;
mod parked;
pub mod plan;
mod report;
mod room;
mod turn;
mod view;

pub use api::{Action, CoreError, GroupStatus, Input, Order, Rejection, Target};
pub use disk::{Disk, DiskError, DiskOp, StagedRow};
pub use envelope::{Body, Envelope, EnvelopeError, MAX_ENVELOPE};
pub use group::LogBounds;
pub use log::LoadedLog;
pub use machine::{Core, CoreConfig, FIRST, TICK_MS, bootstrap};
pub use page::{MAX_PAGE, PAGE_BYTES, Page, PageRequest, Row};
