//! What a node counts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// A node's account of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct NodeStats {
    pub chunks: u64,
    /// Bytes of their bodies.
    pub chunk_bytes: u64,
    /// Every group has a leader.
    pub ready: bool,
    /// Writes are refused for want of room.
    pub full: bool,
    /// What the disk has left, in bytes.
    pub free_bytes: u64,
    /// Damaged bodies and records met.
    pub corruptions: u64,
    /// Connections and requests that were refused: certificates, frames, garbage.
    pub refused: u64,
    /// Requests answered, errors included.
    pub requests: u64,
    /// Messages for other nodes that were dropped: not connected, or too many waiting.
    pub messages_dropped: u64,
    /// Bodies that leaders sent here before an entry needed them.
    pub bodies_pushed: u64,
    /// Bodies that were asked for because an entry or a raft snapshot needed them.
    pub bodies_fetched: u64,
}

/// The counters, shared by everything in a node.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    ready: AtomicBool,
    stalled: AtomicBool,
    no_room: AtomicBool,
    corruptions: AtomicU64,
    refused: AtomicU64,
    requests: AtomicU64,
    pushed: AtomicU64,
    fetched: AtomicU64,
}

impl Counters {
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Relaxed);
    }

    pub(crate) fn ready(&self) -> bool {
        self.ready.load(Relaxed)
    }

    pub(crate) fn set_stalled(&self, stalled: bool) {
        self.stalled.store(stalled, Relaxed);
    }

    pub(crate) fn stalled(&self) -> bool {
        self.stalled.load(Relaxed)
    }

    pub(crate) fn set_no_room(&self, no_room: bool) {
        self.no_room.store(no_room, Relaxed);
    }

    /// Whether the groups here were told that there is no room.
    pub(crate) fn no_room(&self) -> bool {
        self.no_room.load(Relaxed)
    }

    pub(crate) fn corruption(&self) {
        self.corruptions.fetch_add(1, Relaxed);
    }

    pub(crate) fn corruptions(&self) -> u64 {
        self.corruptions.load(Relaxed)
    }

    pub(crate) fn refuse(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    pub(crate) fn request(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    pub(crate) fn pushed(&self, bodies: usize) {
        self.pushed.fetch_add(bodies as u64, Relaxed);
    }

    pub(crate) fn fetched(&self, bodies: usize) {
        self.fetched.fetch_add(bodies as u64, Relaxed);
    }

    /// Bodies that were pushed here, and that were fetched.
    pub(crate) fn brought(&self) -> (u64, u64) {
        (self.pushed.load(Relaxed), self.fetched.load(Relaxed))
    }

    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }
}
