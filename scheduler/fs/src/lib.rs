//! The IO side of trees: directories become trees of chunks, trees become directories again.
//!
//! - [`capture`] reads a directory (whole, or only what is known to be dirty) and cuts it;
//! - [`restore`] makes a directory from a tree and checks that it is that tree;
//! - [`dump`] captures a directory of CRIU image files, memory pages by name;
//! - [`images`] unpacks directories, tars and OCI layouts into a lower layer.
//!
//! Where chunks go and come from is the caller's: [`ChunkSink`] and [`ChunkSource`]. All of it is synchronous and works by directory file descriptors, never by
//! joined paths: nothing inside a directory, link or tree can lead out of its root, and depth is not bounded by `PATH_MAX`.
//!
//! Elsewhere: how bytes are cut (`scheduler/core`), when to capture (the daemon), compression and sealing (`proto::body`), sending (the store's client).

pub mod capture;
mod chunks;
pub mod dump;
pub mod images;
mod index;
pub mod restore;
mod shards;
mod stack;
mod sys;
mod weigh;

pub use capture::{CaptureError, CaptureOptions, Captured, DirtyInode, TreeKind};
pub use chunks::{
    ChunkSink, ChunkSource, NullSink, SinkError, SourceError, load_blob, load_node, load_root,
    walk_chunks,
};
pub use index::TreeIndex;
pub use weigh::{Light, weigh};
