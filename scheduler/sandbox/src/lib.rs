//! The sandboxes of a host: everything that drives the OCI runtime, CRIU, overlay mounts, network namespaces and cgroups.
//!
//! A sandbox is an OCI container whose root is an overlay and whose PID 1 is `tidepool-init` ([`INIT_BINARY`]), which starts
//! what the host asks for, so that every process belongs to one tree that CRIU dumps and restores whole. [`Runtime`]
//! makes, freezes, checkpoints, restores and removes sandboxes; [`InitClient`] runs jobs in them.
//!
//! Invariants: what a sandbox is made of is written down before it is made, so [`Runtime::destroy`] finds all of it after
//! any crash; every program run from here has a time limit; a failed checkpoint leaves the sandbox as it was.
//!
//! Deliberately elsewhere: what a checkpoint contains and where it goes (the scheduler), filesystem trees, and whose turn it
//! is. This crate knows nothing else of Tidepool.

mod cgroup;
mod checkpoint;
mod client;
mod command;
mod config;
mod criulog;
mod destroy;
mod error;
mod inspect;
mod locks;
mod mounts;
mod nat;
mod netns;
mod oci;
mod programs;
mod record;
mod remaps;
mod runtime;
mod seccomp;
mod seizing;
mod tracing_stop;
mod watches;

pub use checkpoint::CheckpointStats;
pub use client::{Finished, InitClient, Job, JobControl, JobEvent, JobRequest};
pub use config::{HostMount, Layers, Network, RuntimeConfig, SandboxName, SandboxSpec};
pub use error::{Result, SandboxError};
pub use inspect::{HeldFile, Hold, Process, open_files};
pub use runtime::{Capabilities, Created, Runtime, State};
pub use tidepool_init::auth::Key;
pub use tidepool_init::message::{ErrorKind, ExitStatus, JobInfo, SignalScope};

/// The init program of sandboxes: static, built with this crate.
pub static INIT_BINARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tidepool-init"));
