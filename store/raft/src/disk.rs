//! The one seam to storage. RocksDB and the body store implement it in a node, maps that crash and tear in the simulation.
//!
//! What an implementation owes:
//! - a batch is atomic, and batches are durable in the order they were written: one with `sync` makes all before it durable too;
//! - what a batch wrote is seen by reads at once;
//! - [`Disk::has_body`] is true only of a body that is whole and durable *no later than the next synced batch*: one that is still
//!   being written does not count;
//! - a deletion of bodies has its place in that order too: it is never durable before the batches that were written before it. Else a crash
//!   could take back the sweep and not the deletion, and where no other member has applied the sweep either, its entry and the one
//!   that brought the body are in every log, the body is nowhere, and nobody can say that it is gone;
//! - [`DiskError::Full`] means that nothing of the batch was written and the same batch may be tried again;
//! - after [`DiskError::Failed`] nothing is known: the core stops.

use raft::eraftpb::{ConfState, Entry, HardState};
use tidepool_proto::ChunkName;
use tidepool_store_core::Write;

use crate::log::LoadedLog;

/// A failed read or write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// No room; nothing was written.
    #[error("the disk is full: {0}")]
    Full(String),
    /// A record is not what was written.
    #[error("{0}")]
    Corruption(String),
    /// The disk failed; what was being written may or may not be there.
    #[error("{0}")]
    Failed(String),
}

/// One write of a batch. Later ones win over earlier ones.
#[derive(Debug, Clone)]
pub enum DiskOp {
    /// A log entry of the group.
    Entry { group: u32, entry: Entry },
    /// Forgets the log entries `from..to`.
    DropEntries { group: u32, from: u64, to: u64 },
    /// Term, vote and commit index. Outlives [`DiskOp::Destroy`]: a vote is never forgotten.
    Hard { group: u32, hard: HardState },
    /// The members; makes the group where it is not there.
    Conf { group: u32, conf: ConfState },
    /// The last index that is not in the log any more, and its term.
    Cut { group: u32, index: u64, term: u64 },
    /// The last index whose effects are in the state.
    Applied { group: u32, index: u64 },
    /// A change of the group's state.
    State { group: u32, write: Write },
    /// Empties the group's staging area, where a raft snapshot is collected beside the state.
    ClearStage { group: u32 },
    /// A row of the staging area.
    Stage {
        group: u32,
        key: Vec<u8>,
        value: Vec<u8>,
    },
    /// The staging area becomes the state; the old state goes.
    Install { group: u32 },
    /// Everything of the group goes but its [`DiskOp::Hard`].
    Destroy { group: u32 },
}

/// Key and value of a row of the staging area.
pub type StagedRow = (Vec<u8>, Vec<u8>);

/// Storage of a node.
pub trait Disk {
    /// Writes a batch; with `sync` it and all before it are durable on return.
    fn write(&mut self, batch: &[DiskOp], sync: bool) -> Result<(), DiskError>;

    /// The groups that are here: those that were given members.
    fn groups(&self) -> Result<Vec<u32>, DiskError>;

    /// A group's log. Of a group that is not here only the hard state may be set.
    fn load(&self, group: u32) -> Result<LoadedLog, DiskError>;

    /// A value of a group's state.
    fn get(&self, group: u32, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError>;

    /// Up to `limit` rows of the group's staging area whose keys open with `prefix`, in order, after `after` (empty: from the first).
    fn staged(
        &self,
        group: u32,
        prefix: &[u8],
        after: &[u8],
        limit: usize,
    ) -> Result<Vec<StagedRow>, DiskError>;

    /// Whether the body is here, see above.
    fn has_body(&self, name: &ChunkName) -> Result<bool, DiskError>;

    /// Deletes the bodies of a sweep of `group`, except those which by now have a chunk row again or are held by a put in flight.
    fn delete_bodies(&mut self, group: u32, names: &[ChunkName]) -> Result<(), DiskError>;
}
