//! What can go wrong, in sentences a user can act on.

use std::io;
use std::path::PathBuf;

use crate::{ProbeSet, SandboxSlot};

/// Errors of the inspector.
#[derive(Debug, thiserror::Error)]
pub enum InspectorError {
    /// The kernel lacks something the programs need, or the caller may not load them.
    #[error("the eBPF inspector cannot be used here: {what}")]
    Unsupported {
        /// What is missing, as a sentence.
        what: String,
        /// The loader's own error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The embedded object does not have the shape this library expects.
    #[error("the embedded eBPF object lacks {0}")]
    Object(String),
    /// A call into the kernel failed after loading.
    #[error("{what}")]
    Kernel {
        /// What was being done.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The upper directory of a target cannot be looked at.
    #[error("cannot look at the upper directory {path}")]
    Upper {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The namespace named cannot be that of a sandbox.
    #[error("pid namespace {pid_ns_inode} cannot be watched: {why}")]
    Namespace {
        /// What was named.
        pid_ns_inode: u64,
        /// Why not.
        why: &'static str,
    },
    /// All places for sandboxes are taken.
    #[error("{limit} sandboxes are registered, which is the limit given at load")]
    TooManySandboxes {
        /// The limit.
        limit: u32,
    },
    /// The probe set in use cannot do that.
    #[error("the {set} probes cannot tell {what}")]
    NotInSet {
        /// What was asked.
        what: &'static str,
        /// The set in use.
        set: ProbeSet,
    },
    /// The slot was never given out, or its sandbox is no longer registered.
    #[error("no sandbox is registered under {0}")]
    UnknownSlot(SandboxSlot),
}
