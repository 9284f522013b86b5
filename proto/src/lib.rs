//! What every part of Tidepool agrees on: ids, storage formats, wire messages, API types and error kinds.
//!
//! Everything here is pure: no IO, no clock, no ambient randomness. Each stored format opens with a version byte, is
//! decoded with bounds checked before any allocation, and has a golden file under `proto/tests/golden`.
//!
//! Elsewhere on purpose: cutting and diffing (`scheduler/core`), walking file systems (`scheduler/fs`), who may commit
//! what (`store/core`).

pub mod api;
pub mod body;
pub mod cluster;
pub mod codec;
pub mod error;
pub mod ids;
pub mod manifest;
pub mod recipe;
pub mod tree;
pub mod turn;
pub mod wire;

pub use body::{DomainKey, MAX_CHUNK_LEN};
pub use codec::FormatError;
pub use error::ErrorKind;
pub use ids::{CheckpointId, ChunkName, DomainId, Epoch, SandboxId, SessionId, TreeId, TurnNo};
