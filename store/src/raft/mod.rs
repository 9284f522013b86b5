//! The raft driver, without IO: groups take proposals, messages and ticks, and give what has to be written, sent and applied.
//! [`crate::driver`] executes it on RocksDB; a simulation can execute it on anything.

mod group;
mod log;

pub use group::{Committed, Group, GroupConfig, NotNow, Persist};
pub use log::{LoadedLog, RaftLog};
