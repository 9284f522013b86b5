//! Room on the disk: writes are refused while there is still enough left for what was already promised, for the database's own
//! housekeeping, and for removing things.
//!
//! A node of several that refuses writes must not lead ([`Space::may_lead`]); so that leadership does not go to and fro with each body
//! that comes or goes, it takes some more room to lead again than to go on leading.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Watches the file system of a directory.
#[derive(Debug)]
pub(crate) struct Space {
    dir: PathBuf,
    reserve: u64,
    /// Bytes of bodies taken in and not yet on disk.
    pending: AtomicU64,
    /// The most bytes that were refused since there was room last.
    refused: AtomicU64,
}

/// Bytes that are on their way to the disk, while this lives.
#[derive(Debug)]
pub(crate) struct Pending<'a> {
    space: &'a Space,
    bytes: u64,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.space.pending.fetch_sub(self.bytes, Relaxed);
    }
}

impl Space {
    pub(crate) fn new(dir: &Path, reserve: u64) -> Self {
        Self {
            dir: dir.to_owned(),
            reserve,
            pending: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// What an unprivileged writer could still use. Unknown counts as none.
    pub(crate) fn free(&self) -> u64 {
        match rustix::fs::statvfs(&self.dir) {
            Ok(s) => s.f_bavail.saturating_mul(s.f_frsize),
            Err(e) => {
                tracing::error!(dir = %self.dir.display(), error = %e, "free space is unknown");
                0
            }
        }
    }

    /// Whether writes are refused.
    pub(crate) fn is_full(&self) -> bool {
        self.free().saturating_sub(self.pending.load(Relaxed)) < self.reserve
    }

    /// Room for `bytes`, or none.
    pub(crate) fn take(&self, bytes: u64) -> Option<Pending<'_>> {
        let pending = self.pending.fetch_add(bytes, Relaxed).saturating_add(bytes);
        let taken = Pending { space: self, bytes };
        let fits = self.free() >= pending.saturating_add(self.reserve);
        if !fits {
            self.refused.fetch_max(bytes, Relaxed);
        }
        fits.then_some(taken)
    }

    /// Whether this node may lead where others could too: `leads` is what was said last.
    pub(crate) fn may_lead(&self, leads: bool) -> bool {
        let left = self.free().saturating_sub(self.pending.load(Relaxed));
        let refused = self.refused.load(Relaxed);
        if leads && refused == 0 {
            return left >= self.reserve;
        }
        let enough = left >= (self.reserve + self.reserve / 4).saturating_add(refused);
        if enough {
            self.refused.store(0, Relaxed);
        }
        enough
    }

    /// Whether something that frees room may still write its small record.
    pub(crate) fn may_free(&self) -> bool {
        self.free() >= self.reserve / 2
    }
}
