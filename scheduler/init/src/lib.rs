//! The wire protocol between a Tidepool host and `tidepool-init`, the PID 1 of a sandbox.
//!
//! The host reaches init over TCP on the loopback address of the sandbox's own network namespace. Everything inside the
//! sandbox can connect to that port too, and with raw sockets can read and inject segments, so nothing here trusts the
//! transport: both ends prove that they hold a 32-byte key which never travels ([`auth`]), and every frame after that
//! carries a keyed checksum over a counter and its bytes. A peer without the key can at worst break its own connection.
//! Contents are authenticated, not hidden: they only pass processes of the same sandbox.
//!
//! One connection is attached to at most one job, so that TCP's flow control is the job's flow control.
//! [`message`] defines requests and events, [`wire`] their bounded encoding. The program itself lives in the binary.

pub mod auth;
pub mod message;
pub mod wire;

/// The version of this protocol. Both sides must agree; a restored sandbox brings its own init with it.
pub const PROTOCOL_VERSION: u8 = 1;
/// The port init listens on, on 127.0.0.1 inside the sandbox.
pub const PORT: u16 = 7421;
/// The longest payload of one frame in bytes.
pub const MAX_FRAME: usize = 2 * 1024 * 1024;
/// The longest piece of job output or input in one frame in bytes.
pub const MAX_DATA: usize = 64 * 1024;
/// The longest job id in bytes.
pub const MAX_JOB_ID: usize = 128;
/// The most jobs init keeps, finished ones included, until they are forgotten.
pub const MAX_JOBS: usize = 1024;
/// The most arguments plus environment variables of one job.
pub const MAX_STRINGS: usize = 16 * 1024;
/// How much of each output stream of a job init keeps for a client that attaches again, in bytes.
pub const RING_BYTES: usize = 1024 * 1024;

/// Whether `id` can name a job: 1 to [`MAX_JOB_ID`] printable ASCII characters without spaces.
pub fn valid_job_id(id: &str) -> bool {
    (1..=MAX_JOB_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}
