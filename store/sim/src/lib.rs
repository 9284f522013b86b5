//! A simulated store cluster: the production raft core and state machine of every node, over an invented network, clock and disk.
//!
//! A [`world::World`] is one seed. Its nodes run [`tidepool_store_raft::Core`] as a store does; its clients upload, commit, read, remove, collect and
//! administer as hosts and operators do; its faults are those of networks, disks, clocks and machines; and a `Checker` looks at every
//! step. At the end everything is healed and has to come together.
//!
//! Invariants: a seed decides everything (same seed, same trace hash); the checker knows nothing that the nodes told it of themselves but what they wrote and said.
//!
//! Elsewhere on purpose: the rules themselves (`store/core`, `store/raft`), bytes on real disks and wires (`store`, and `cluster-tests` with real processes).

mod check;
mod client;
mod content;
mod disk;
mod end;
mod faults;
mod net;
mod node;
pub mod rng;
pub mod runner;
mod serve;
mod wire;
pub mod world;

pub use check::Stats;
pub use runner::{Plan, Summary, run, run_seed};
pub use world::{Config, Outcome};
