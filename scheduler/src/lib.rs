//! `tidepool-host`: the daemon of one host. It runs sandboxes, watches what each turn changes, checkpoints what a recovery would miss, and restores.
//!
//! | module | what it is for |
//! |---|---|
//! | [`config`], [`keys`], [`state_dir`] | start: options, the domain's key, a state directory the inspector can watch |
//! | [`error`] | the one error type of the daemon, with its [`tidepool_proto::ErrorKind`] |
//! | [`transfer`] | chunks to the store and back: names first, bodies only where they are missing |
//! | [`images`] | images: imported once, unpacked once a host |
//! | [`record`] | what is kept about a sandbox in the store and on the host's disk |
//! | [`host`] | the daemon's state, its start and end |
//! | [`life`], [`adopt`] | sandboxes made, paused and removed; those that ran on without the daemon |
//! | [`history`] | turns and checkpoints in the store |
//! | [`sandbox`], [`exec`] | one sandbox here; its commands |
//! | [`boundary`] | a turn's end: look, decide, capture, commit |
//! | [`look`], [`capture`] | its steps: what is seen; files and processes as chunks |
//! | [`restore`] | from a checkpoint to a running sandbox: restore, rollback, fork |
//! | [`http`] | the API |
//!
//! Invariants: an exec's `exit` is sent only when its turn is committed in the store; a sandbox's turns are taken one at a time; whatever
//! is unknown makes the next capture larger, never smaller.
//!
//! Elsewhere on purpose: rules and formats (`scheduler/core`, `proto`), walking file systems (`scheduler/fs`), runc and CRIU (`scheduler/sandbox`).

pub mod adopt;
pub mod boundary;
pub mod capture;
pub mod config;
pub mod error;
pub mod exec;
pub mod history;
pub mod host;
pub mod http;
pub mod images;
pub mod keys;
pub mod life;
pub mod look;
pub mod record;
pub mod restore;
pub mod sandbox;
pub mod state_dir;
pub mod transfer;
