//! The effect fuzzer: random programs of system calls in a sandbox, and at every turn boundary the question whether anything was missed.
//!
//! - [`script`] chooses what happens, from a seed; [`child`] does it, in processes of an own pid, mount and IPC namespace on an overlay;
//! - `boundary` takes the turns' ends as the daemon does, [`run`] compares at some of them;
//! - [`outside`] is the host, which changes files of the upper in some seeds;
//! - [`truth`] is what is compared with: a walk with content hashes, the memory file system, IPC objects, mounts, processes with their memory;
//! - [`breaks`] are errors made on purpose, each of which has to be caught.
//!
//! A missed change is one of: a capture of the dirty inodes whose tree is not that of a full capture; a change in the truth at a boundary that
//! reported none; a process that changed and was not among those that ran. A turn without any change that was reported as one is counted.
//!
//! Some processes work on through the turns and are stopped at each boundary, as the freezer would stop them.
//!
//! What is not here: thaws and dumps (the inspector tests its watches on them), contents of IPC objects (their existence alone counts), and memory that one process writes
//! in another one by `process_vm_writev`, which nothing sees and sandboxes are refused.

mod boundary;
pub mod breaks;
pub mod child;
mod ops;
pub mod outside;
pub mod rng;
pub mod run;
pub mod sandbox;
pub mod script;
pub mod truth;
