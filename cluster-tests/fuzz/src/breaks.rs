//! Inspectors that are broken on purpose, to show that the fuzzer sees it.
//!
//! `WOnly`, `NoJournal` and `PagesOnly` leave real hooks unattached. The others spoil what was read, each in the way of a plausible error.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tidepool_inspector::{FileEffects, ProbeSet};

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Break {
    /// Of the `ext4` set, only `writeback_mark_inode_dirty` is attached.
    WOnly,
    /// Of the `ext4` set, `ext4_journal_start_inode` is not attached.
    NoJournal,
    /// Of the `ctime` set, only `writeback_dirty_folio` is attached.
    PagesOnly,
    /// A map of dirty inodes that forgets the oldest when it is full, at eight.
    Lru,
    /// Files mapped shared and writable are not armed again.
    NoRearm,
    /// Only those that are writable now, and by the name they are mapped under, which may be gone while the file has another.
    RearmByName,
    /// A second change of a file within a second of the first is not seen, as where time stamps are coarse and nothing makes the kernel take finer ones.
    NoTickGuard,
    /// The memory file system is not looked at.
    NoTmpfs,
    /// Dirty directories are dropped.
    NoDirectories,
    /// The tasks are not compared, nor what the kernel keeps for them.
    NoProcesses,
    /// What the kernel keeps for processes, and mounts, are not compared: only processes that ran count.
    NoSurroundings,
    /// What others write into the memory of a process that does not run is not seen.
    NoPokes,
    /// What the host does to the upper is not seen.
    NoOutside,
}

impl Break {
    /// Tracepoints that are not to be attached, and the probe set that has them; none where any set will do.
    #[must_use]
    pub fn leave_out(self) -> Option<(ProbeSet, &'static [&'static str])> {
        Some(match self {
            Break::WOnly => (
                ProbeSet::Ext4,
                &["ext4_mark_inode_dirty", "ext4_journal_start_inode"],
            ),
            Break::NoJournal => (ProbeSet::Ext4, &["ext4_journal_start_inode"]),
            Break::PagesOnly => (ProbeSet::Ctime, &["ctime_ns_xchg"]),
            _ => return None,
        })
    }
}

/// How coarse, in nanoseconds: far longer than a turn takes, also where the machine is busy, so that it does not depend on that whether the error shows.
const TICK_NS: i64 = 1_000_000_000;

/// Spoils readings.
pub(crate) struct Broken {
    what: Option<Break>,
    /// Change times of files at the last boundary at which each was dirty.
    changed: HashMap<u64, i64>,
}

impl Broken {
    pub(crate) fn new(what: Option<Break>) -> Self {
        Self {
            what,
            changed: HashMap::new(),
        }
    }

    pub(crate) fn files(&mut self, files: &mut FileEffects, upper: &Path) {
        let FileEffects::Inodes(inodes) = files else {
            return;
        };
        match self.what {
            Some(Break::Lru) => {
                let many = inodes.len().saturating_sub(8);
                inodes.drain(..many);
            }
            Some(Break::NoDirectories) => {
                let all = inodes_of(upper);
                inodes.retain(|i| all.get(&i.ino).is_none_or(|(dir, _)| !dir));
            }
            Some(Break::NoTickGuard) => {
                let all = inodes_of(upper);
                inodes.retain(|i| {
                    let Some((false, now)) = all.get(&i.ino) else {
                        return true;
                    };
                    match self.changed.get(&i.ino) {
                        Some(before) if before / TICK_NS == now / TICK_NS => false,
                        _ => {
                            self.changed.insert(i.ino, *now);
                            true
                        }
                    }
                });
            }
            _ => {}
        }
    }
}

/// Of every inode: whether it is a directory, and its change time in nanoseconds.
fn inodes_of(upper: &Path) -> HashMap<u64, (bool, i64)> {
    let mut found = HashMap::new();
    let mut todo = vec![upper.to_owned()];
    while let Some(path) = todo.pop() {
        let Ok(meta) = std::fs::symlink_metadata(&path) else {
            continue;
        };
        let changed = meta.ctime() * 1_000_000_000 + meta.ctime_nsec();
        found.insert(meta.ino(), (meta.is_dir(), changed));
        if meta.is_dir()
            && let Ok(entries) = std::fs::read_dir(&path)
        {
            todo.extend(entries.flatten().map(|e| e.path()));
        }
    }
    found
}
