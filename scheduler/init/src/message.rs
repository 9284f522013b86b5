//! What a host asks of init, and what init tells it.
//!
//! Arguments and environment are bytes, as the kernel sees them. Job output is addressed by its offset from the start of
//! the stream, so that a client which comes back says what it already has.

use crate::auth::Key;
use crate::wire::{DecodeError, Decoder, Encoder};
use crate::{MAX_DATA, MAX_FRAME, MAX_JOBS, MAX_STRINGS};

/// The longest text that is neither argument nor environment: user names, errors, versions.
const MAX_TEXT: usize = 4096;

/// What the host writes to init's standard input before it starts.
#[derive(Clone, PartialEq, Eq)]
pub struct Setup {
    /// Proves the host, see [`crate::auth`].
    pub key: Key,
    /// Who jobs run as unless they say otherwise: `name`, `uid`, either with `:group`.
    pub user: Option<String>,
    /// Where jobs start unless they say otherwise.
    pub cwd: Option<Vec<u8>>,
    /// The sandbox's own variables, as `NAME=value`.
    pub env: Vec<Vec<u8>>,
}

impl Setup {
    /// The most bytes of an encoded set-up; less than a pipe holds, so that the host never waits for init to read.
    pub const MAX: usize = 48 * 1024;

    /// What goes through the pipe.
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.bytes(&self.key);
        e.option(self.user.as_deref(), Encoder::text);
        e.option(self.cwd.as_deref(), Encoder::bytes);
        strings(&mut e, &self.env);
        e.0
    }

    /// Reads what came through the pipe.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut d = Decoder::new(bytes);
        let this = Self {
            key: d.bytes(32)?.try_into().map_err(|_| DecodeError::Short)?,
            user: d.option(|d| d.text(MAX_TEXT))?,
            cwd: d.option(|d| d.bytes(MAX_TEXT))?,
            env: read_strings(&mut d)?,
        };
        d.finish()?;
        Ok(this)
    }
}

/// What to start as a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpawnRequest {
    /// The idempotency key: a second spawn with the same id attaches to the job that is there.
    pub job: String,
    /// The program and its arguments; the program is looked up in the job's `PATH`.
    pub argv: Vec<Vec<u8>>,
    /// Variables set over the sandbox's own, as `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// The working directory; the sandbox's default where absent.
    pub cwd: Option<Vec<u8>>,
    /// `name`, `uid`, either with `:group`; the sandbox's default where absent.
    pub user: Option<String>,
    /// Run on a new pseudo-terminal of this many columns and rows; output is then one stream, stdout.
    pub tty: Option<(u16, u16)>,
    /// Whether the job gets an input stream; otherwise it reads from `/dev/null`.
    pub stdin: bool,
    /// End the job's session after this many milliseconds: SIGTERM, and SIGKILL two seconds later.
    pub timeout_ms: Option<u64>,
}

/// Who receives a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalScope {
    /// The process that was spawned.
    Process,
    /// Its process group.
    Group,
    /// Every process of its session.
    Session,
}

/// A question of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Answered by [`Event::Pong`].
    Ping,
    /// Start a job, or attach to it if it exists. Answered by [`Event::Started`] and then its output.
    Spawn(SpawnRequest),
    /// Attach to a job and get its output from these offsets on.
    Attach {
        job: String,
        stdout_from: u64,
        stderr_from: u64,
    },
    /// Input for the attached job; bytes below what init already has are ignored.
    Stdin { offset: u64, data: Vec<u8> },
    /// The end of the attached job's input; on a terminal, the end-of-file character.
    StdinClose,
    /// A new size of the attached job's terminal.
    Resize { cols: u16, rows: u16 },
    /// Send a signal to a running job. Answered by [`Event::Done`].
    Signal {
        job: String,
        signal: i32,
        scope: SignalScope,
    },
    /// Answered by [`Event::Jobs`].
    List,
    /// Drop a finished job's status and output. Answered by [`Event::Done`], also if there is no such job.
    Forget { job: String },
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

/// A job as [`Event::Jobs`] shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobInfo {
    /// The id it was spawned with.
    pub job: String,
    /// Its process id inside the sandbox.
    pub pid: u32,
    /// Whether it has a terminal.
    pub tty: bool,
    /// How it ended; absent while it runs.
    pub status: Option<ExitStatus>,
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request makes no sense here.
    Invalid,
    /// No such job.
    NotFound,
    /// The job is not running.
    NotRunning,
    /// The program could not be started.
    SpawnFailed,
    /// Too many jobs are kept.
    TooMany,
}

/// An answer or a notice of init.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The answer to a ping: init's version.
    Pong { version: String },
    /// The connection is attached to a job. `new` is false if it existed before.
    Started {
        pid: u32,
        new: bool,
        stdin_received: u64,
    },
    /// Output of the job.
    Stdout { offset: u64, data: Vec<u8> },
    /// Error output of the job.
    Stderr { offset: u64, data: Vec<u8> },
    /// Output that init no longer has: the bytes from `from` up to, not including, `to`.
    Lost { stderr: bool, from: u64, to: u64 },
    /// The job ended; all its output up to then has been sent. The connection is no longer attached.
    Exited {
        status: ExitStatus,
        timed_out: bool,
        stdout_len: u64,
        stderr_len: u64,
    },
    /// The jobs init knows.
    Jobs(Vec<JobInfo>),
    /// A request without further answer was carried out.
    Done,
    /// A request was refused.
    Error { kind: ErrorKind, text: String },
}

fn strings(e: &mut Encoder, list: &[Vec<u8>]) {
    e.u32(u32::try_from(list.len()).unwrap_or(u32::MAX));
    for s in list {
        e.bytes(s);
    }
}

fn read_strings(d: &mut Decoder<'_>) -> Result<Vec<Vec<u8>>, DecodeError> {
    let n = d.count(MAX_STRINGS, 4)?;
    (0..n).map(|_| d.bytes(MAX_FRAME)).collect()
}

impl Request {
    /// The payload of a frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        match self {
            Self::Ping => e.u8(0),
            Self::Spawn(s) => {
                e.u8(1);
                e.text(&s.job);
                strings(&mut e, &s.argv);
                strings(&mut e, &s.env);
                e.option(s.cwd.as_deref(), Encoder::bytes);
                e.option(s.user.as_deref(), Encoder::text);
                e.option(s.tty, |e, (cols, rows)| {
                    e.u16(cols);
                    e.u16(rows);
                });
                e.bool(s.stdin);
                e.option(s.timeout_ms, Encoder::u64);
            }
            Self::Attach {
                job,
                stdout_from,
                stderr_from,
            } => {
                e.u8(2);
                e.text(job);
                e.u64(*stdout_from);
                e.u64(*stderr_from);
            }
            Self::Stdin { offset, data } => {
                e.u8(3);
                e.u64(*offset);
                e.bytes(data);
            }
            Self::StdinClose => e.u8(4),
            Self::Resize { cols, rows } => {
                e.u8(5);
                e.u16(*cols);
                e.u16(*rows);
            }
            Self::Signal { job, signal, scope } => {
                e.u8(6);
                e.text(job);
                e.u32(*signal as u32);
                e.u8(match scope {
                    SignalScope::Process => 0,
                    SignalScope::Group => 1,
                    SignalScope::Session => 2,
                });
            }
            Self::List => e.u8(7),
            Self::Forget { job } => {
                e.u8(8);
                e.text(job);
            }
        }
        e.0
    }

    /// Reads the payload of a frame.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut d = Decoder::new(bytes);
        let request = match d.u8()? {
            0 => Self::Ping,
            1 => Self::Spawn(SpawnRequest {
                job: d.job()?,
                argv: read_strings(&mut d)?,
                env: read_strings(&mut d)?,
                cwd: d.option(|d| d.bytes(MAX_TEXT))?,
                user: d.option(|d| d.text(MAX_TEXT))?,
                tty: d.option(|d| Ok((d.u16()?, d.u16()?)))?,
                stdin: d.bool()?,
                timeout_ms: d.option(Decoder::u64)?,
            }),
            2 => Self::Attach {
                job: d.job()?,
                stdout_from: d.u64()?,
                stderr_from: d.u64()?,
            },
            3 => Self::Stdin {
                offset: d.u64()?,
                data: d.bytes(MAX_DATA)?,
            },
            4 => Self::StdinClose,
            5 => Self::Resize {
                cols: d.u16()?,
                rows: d.u16()?,
            },
            6 => Self::Signal {
                job: d.job()?,
                signal: d.u32()? as i32,
                scope: match d.u8()? {
                    0 => SignalScope::Process,
                    1 => SignalScope::Group,
                    2 => SignalScope::Session,
                    _ => return Err(DecodeError::BadTag),
                },
            },
            7 => Self::List,
            8 => Self::Forget { job: d.job()? },
            _ => return Err(DecodeError::BadTag),
        };
        d.finish()?;
        Ok(request)
    }
}

fn status(e: &mut Encoder, s: ExitStatus) {
    let (tag, value) = match s {
        ExitStatus::Code(c) => (0, c),
        ExitStatus::Signal(s) => (1, s),
    };
    e.u8(tag);
    e.u32(value as u32);
}

fn read_status(d: &mut Decoder<'_>) -> Result<ExitStatus, DecodeError> {
    let tag = d.u8()?;
    let value = d.u32()? as i32;
    match tag {
        0 => Ok(ExitStatus::Code(value)),
        1 => Ok(ExitStatus::Signal(value)),
        _ => Err(DecodeError::BadTag),
    }
}

impl Event {
    /// The payload of a frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        match self {
            Self::Pong { version } => {
                e.u8(0);
                e.text(version);
            }
            Self::Started {
                pid,
                new,
                stdin_received,
            } => {
                e.u8(1);
                e.u32(*pid);
                e.bool(*new);
                e.u64(*stdin_received);
            }
            Self::Stdout { offset, data } => {
                e.u8(2);
                e.u64(*offset);
                e.bytes(data);
            }
            Self::Stderr { offset, data } => {
                e.u8(3);
                e.u64(*offset);
                e.bytes(data);
            }
            Self::Lost { stderr, from, to } => {
                e.u8(4);
                e.bool(*stderr);
                e.u64(*from);
                e.u64(*to);
            }
            Self::Exited {
                status: s,
                timed_out,
                stdout_len,
                stderr_len,
            } => {
                e.u8(5);
                status(&mut e, *s);
                e.bool(*timed_out);
                e.u64(*stdout_len);
                e.u64(*stderr_len);
            }
            Self::Jobs(jobs) => {
                e.u8(6);
                e.u32(u32::try_from(jobs.len()).unwrap_or(u32::MAX));
                for j in jobs {
                    e.text(&j.job);
                    e.u32(j.pid);
                    e.bool(j.tty);
                    e.option(j.status, status);
                }
            }
            Self::Done => e.u8(7),
            Self::Error { kind, text } => {
                e.u8(8);
                e.u8(*kind as u8);
                let end = text.floor_char_boundary_at(MAX_TEXT);
                e.text(&text[..end]);
            }
        }
        e.0
    }

    /// Reads the payload of a frame.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut d = Decoder::new(bytes);
        let event = match d.u8()? {
            0 => Self::Pong {
                version: d.text(MAX_TEXT)?,
            },
            1 => Self::Started {
                pid: d.u32()?,
                new: d.bool()?,
                stdin_received: d.u64()?,
            },
            2 => Self::Stdout {
                offset: d.u64()?,
                data: d.bytes(MAX_DATA)?,
            },
            3 => Self::Stderr {
                offset: d.u64()?,
                data: d.bytes(MAX_DATA)?,
            },
            4 => Self::Lost {
                stderr: d.bool()?,
                from: d.u64()?,
                to: d.u64()?,
            },
            5 => Self::Exited {
                status: read_status(&mut d)?,
                timed_out: d.bool()?,
                stdout_len: d.u64()?,
                stderr_len: d.u64()?,
            },
            6 => {
                let n = d.count(MAX_JOBS, 11)?;
                let jobs: Result<_, _> = (0..n)
                    .map(|_| {
                        Ok(JobInfo {
                            job: d.job()?,
                            pid: d.u32()?,
                            tty: d.bool()?,
                            status: d.option(read_status)?,
                        })
                    })
                    .collect();
                Self::Jobs(jobs?)
            }
            7 => Self::Done,
            8 => Self::Error {
                kind: match d.u8()? {
                    0 => ErrorKind::Invalid,
                    1 => ErrorKind::NotFound,
                    2 => ErrorKind::NotRunning,
                    3 => ErrorKind::SpawnFailed,
                    4 => ErrorKind::TooMany,
                    _ => return Err(DecodeError::BadTag),
                },
                text: d.text(MAX_TEXT)?,
            },
            _ => return Err(DecodeError::BadTag),
        };
        d.finish()?;
        Ok(event)
    }
}

trait FloorCharBoundary {
    fn floor_char_boundary_at(&self, max: usize) -> usize;
}

impl FloorCharBoundary for str {
    /// The longest prefix of at most `max` bytes that ends between characters.
    fn floor_char_boundary_at(&self, max: usize) -> usize {
        let mut end = self.len().min(max);
        while !self.is_char_boundary(end) {
            end -= 1;
        }
        end
    }
}

#[cfg(test)]
mod tests;
