//! What a reading says. Plain data, no kernel.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A registered sandbox. Never given out twice by one [`Inspector`](crate::Inspector).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxSlot(pub(crate) u32);

impl fmt::Display for SandboxSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

/// What to watch.
#[derive(Clone, Debug)]
pub struct Target {
    /// Inode of the sandbox's pid namespace (see [`pid_ns_inode`](crate::pid_ns_inode)). Namespaces made inside it belong to it.
    pub pid_ns_inode: u64,
    /// The sandbox's own overlay upper directory.
    pub upper_dir: PathBuf,
}

/// What happened in a sandbox since the reading before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effects {
    /// Files.
    pub files: FileEffects,
    /// Tasks born (processes, and threads: see [`ProcessEvent::is_thread`]), in order.
    pub born: Vec<ProcessEvent>,
    /// Programs started, in order.
    pub execs: Vec<ExecEvent>,
    /// Tasks that ended, in order.
    pub exited: Vec<ExitEvent>,
    /// Some of the files were changed by a task that is in no sandbox.
    pub from_outside: bool,
    /// The three lists are incomplete: compare task tables instead.
    pub process_events_lost: bool,
    /// Where this reading ended, for [`Inspector::activity_since`](crate::Inspector::activity_since).
    pub mark: Mark,
}

/// Which files of the upper may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileEffects {
    /// Nothing can be ruled out: walk the whole upper.
    Everything {
        /// Why, for the user.
        reason: String,
    },
    /// These inodes, sorted, and nothing else. An inode may be touched without a net change; a removed name shows as its dirty
    /// parent directory; a moved directory's children do not show by themselves; an inode unknown to the
    /// caller's index is either new (its parent is here too) or outside the upper.
    Inodes(Vec<DirtyInode>),
}

impl FileEffects {
    /// Whether nothing at all was dirtied.
    #[must_use]
    pub fn is_none(&self) -> bool {
        matches!(self, Self::Inodes(inodes) if inodes.is_empty())
    }
}

/// An inode that was dirtied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DirtyInode {
    /// Inode number.
    pub ino: u64,
    /// Device as in `stat` (`st_dev`).
    pub dev: u64,
    /// Generation: another file that gets the same inode number later has another one.
    pub generation: u32,
}

/// A task, as seen when something happened to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEvent {
    /// Thread id on the host.
    pub tid: u32,
    /// Process id on the host.
    pub tgid: u32,
    /// Thread id in the sandbox's pid namespace.
    pub ns_tid: u32,
    /// Process id in the sandbox's pid namespace.
    pub ns_tgid: u32,
    /// Process id of the parent, on the host.
    pub parent_tgid: u32,
    /// Start, in nanoseconds since boot; with the thread id an identity that is not reused.
    pub start_boottime_ns: u64,
    /// Name of the task at that moment, at most 15 bytes.
    pub comm: String,
}

impl ProcessEvent {
    /// Whether this is a thread other than its process's first.
    #[must_use]
    pub fn is_thread(&self) -> bool {
        self.tid != self.tgid
    }
}

/// A program started in an existing process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecEvent {
    /// The process.
    pub process: ProcessEvent,
    /// The program's path as given, at most 127 bytes.
    pub path: String,
}

/// The end of a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitEvent {
    /// The task.
    pub process: ProcessEvent,
    /// Wait status: exit code times 256, plus the signal that ended it.
    pub status: i32,
}

/// A position in what a sandbox did. Comparable for equality only: a different mark means that something happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// What was counted about files.
    pub(crate) files: (u64, u64, u64),
    pub(crate) events: u64,
}
