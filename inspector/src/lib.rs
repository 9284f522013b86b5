//! What a sandbox changed: dirtied inodes of its overlay upper, processes that came and went, tasks that ran, also across a dump
//! and a thaw ([`ThawWatch`]).
//!
//! The scheduler asks at every turn boundary what a recovery from the last checkpoint would miss. The
//! answer comes from eBPF programs (`bpf/`, C) that this crate compiles at build time, loads with aya and reads.
//!
//! Rules that everything here keeps:
//! - **Doubt means more.** An overflow, a lost event, a skipped hook, a filesystem the hooks do not see, the
//!   first reading after a registration: each turns into "everything may have changed", with its reason, and never into silence.
//! - **Nothing is lost between two readings.** Kernel-side counters only grow and are compared, never
//!   reset; the set of dirty inodes is drained bucket by bucket under the kernel's own lock. See [`Inspector::take`].
//! - **Filter first.** Every program drops tasks of other pid namespaces before anything else.
//!
//! What is deliberately elsewhere: turning inodes into paths (the scheduler's tree index knows them), verdicts
//! (`scheduler/core`), memory filesystems such as `/dev/shm` (the hooks do not see them; the scheduler walks them),
//! freezing and capture.

mod calls;
mod cells;
mod effects;
mod error;
#[cfg(test)]
mod harmless;
mod inspector;
mod load;
pub mod look;
mod mappings;
pub mod memory;
mod objects;
mod outside;
mod pending;
mod probes;
mod procfs;
mod programs;
mod raw;
pub mod rearm;
mod state;
mod support;
mod surroundings;
mod sys;
mod tasks;
mod thaw;
mod watch;
mod written;

pub use effects::{
    DirtyInode, Effects, ExecEvent, ExitEvent, FileEffects, Mark, ProcessEvent, SandboxSlot, Target,
};
pub use error::InspectorError;
pub use inspector::{Activity, Inspector, InspectorOptions};
pub use mappings::{SharedMapping, shared_writable_mappings, shared_writable_mappings_of};
pub use probes::ProbeSet;
pub use procfs::tasks_from_proc;
pub use support::{pid_ns_inode, supports};
pub use surroundings::Surroundings;
pub use tasks::{RanBecause, TaskInfo, TaskRan, TaskTable};
pub use thaw::{Thaw, ThawBecause, ThawRan};
pub use watch::ThawWatch;
