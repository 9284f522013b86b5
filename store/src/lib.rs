//! A store node: raft groups on one driver, chunk bodies and tables in RocksDB, and a QUIC server with mutual TLS.
//!
//! [`Node::start`] runs one inside any process; the binary `tidepool-store` runs one alone. Both are reached through
//! [`tidepool_store_client`] only. A new data directory becomes a cluster of one voter, which is the cluster's code, not another.
//!
//! How a write goes: the server checks it and, for chunks, has the bodies written ([`bodies`]); then the command is proposed, the driver
//! makes the log durable with one sync for all groups ([`driver`]), applies what is committed through the pure core, and answers.
//!
//! Invariants:
//! - nothing is acknowledged before the sync that makes it durable; bodies are durable no later than the entry that names them;
//! - the applied index is written in the batch of the state it belongs to;
//! - every body and record is verified when read: damage is an error and is counted;
//! - a failed write or sync stops the node; a full disk refuses writes and nothing else.
//!
//! Elsewhere on purpose: what commands mean (`store/core`), how bodies are named, compressed and sealed (`proto`).

pub mod bodies;
mod cluster;
mod config;
pub mod db;
mod disk;
mod driver;
mod error;
mod files;
pub mod gc;
mod holds;
mod join;
mod logs;
mod member;
mod node;
mod orphans;
mod peers;
mod pki;
mod requests;
mod roles;
mod scrub;
pub mod segments;
mod server;
mod sessions;
mod space;
mod stats;

pub use config::NodeConfig;
pub use error::StoreError;
pub use holds::{Held, Holds};
pub use node::Node;
pub use roles::Role;
pub use scrub::{NoPeers, PeerBodies, ScrubReport};
pub use stats::NodeStats;
pub use tidepool_store_client::ClientIdentity;
