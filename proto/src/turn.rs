//! Turn records: what one turn did, what was decided about it and why, and the journaled result.
//!
//! A record is small (a Clean turn's stays under 1 KiB): evidence is a bounded sample with totals, output beyond a few hundred bytes is kept as chunks.

use serde::{Deserialize, Serialize};

use crate::codec::{FormatError, Reader, Writer};
use crate::ids::{CheckpointId, ChunkName, TurnNo};
use crate::recipe::BlobRef;

const FORMAT: &str = "turn record";
const VERSION: u8 = 1;
/// The most bytes an encoded record may have.
pub const MAX_TURN_LEN: usize = 1 << 16;
/// The longest idempotency key, in bytes.
pub const MAX_KEY: usize = 128;
/// Output up to this many bytes stands inside the record.
pub const MAX_INLINE_OUTPUT: usize = 256;
const MAX_SAMPLES: usize = 64;
const MAX_TEXT: usize = 4096;

/// What a turn's effects ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing a recovery would miss: the previous checkpoint stands.
    Clean,
    /// Files only.
    Files,
    /// Processes only.
    Processes,
    /// Both.
    Full,
}

impl Verdict {
    /// From what has to be captured.
    pub fn of(files: bool, processes: bool) -> Self {
        match (files, processes) {
            (false, false) => Verdict::Clean,
            (true, false) => Verdict::Files,
            (false, true) => Verdict::Processes,
            (true, true) => Verdict::Full,
        }
    }

    /// Whether files are captured.
    pub fn files(self) -> bool {
        matches!(self, Verdict::Files | Verdict::Full)
    }

    /// Whether processes are captured.
    pub fn processes(self) -> bool {
        matches!(self, Verdict::Processes | Verdict::Full)
    }

    pub(crate) fn to_byte(self) -> u8 {
        self as u8
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        Ok(match r.u8()? {
            0 => Verdict::Clean,
            1 => Verdict::Files,
            2 => Verdict::Processes,
            3 => Verdict::Full,
            v => return Err(r.invalid(format!("unknown verdict {v}"))),
        })
    }
}

/// Why a verdict was given: a bounded sample of what was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Changed paths, relative to the sandbox's root; a sample.
    pub paths: Vec<String>,
    /// How many paths changed in all.
    pub paths_total: u64,
    /// Processes that were born, ended or ran, as `pid comm: what`; a sample.
    pub processes: Vec<String>,
    pub processes_total: u64,
    /// Why more was captured than was seen to change (overflow, first capture, a file held open, ...).
    pub reasons: Vec<String>,
    /// What no checkpoint covers and this turn touched or could have (host mounts, connections to outside).
    pub not_covered: Vec<String>,
}

/// How a turn's command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecResult {
    pub status: ExitStatus,
    pub stdout: Output,
    pub stderr: Output,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    Code(u8),
    Signal(u8),
    /// Killed by us at the end of its time.
    TimedOut,
}

impl ExitStatus {
    /// As a shell would report it: the code, 128 + signal, or 124 for a time-out.
    pub fn shell_code(self) -> u8 {
        match self {
            ExitStatus::Code(c) => c,
            ExitStatus::Signal(s) => 128u8.saturating_add(s),
            ExitStatus::TimedOut => 124,
        }
    }
}

/// One output stream of a command, journaled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// At most [`MAX_INLINE_OUTPUT`] bytes.
    Inline(Vec<u8>),
    Stored(BlobRef),
}

/// Sizes and times of one turn's capture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TurnStats {
    /// Bytes read and cut for the capture.
    pub captured_bytes: u64,
    /// Bytes of chunk bodies and manifest sent to the store, without this record.
    pub sent_bytes: u64,
    pub sent_chunks: u64,
    /// Logical bytes that checkpointing everything at this boundary would have taken.
    pub full_bytes: u64,
    /// How long the sandbox stood still, in microseconds.
    pub frozen_us: u64,
    /// From the end of the command to the commit, in microseconds: what the turn waited for.
    pub exposed_us: u64,
}

/// One turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnRecord {
    pub turn: TurnNo,
    /// The idempotency key of the exec that was this turn.
    pub key: String,
    /// What ran, for people.
    pub command: String,
    /// Milliseconds since the Unix epoch, by the host's clock; for people.
    pub started_ms: u64,
    pub ended_ms: u64,
    pub verdict: Verdict,
    /// The checkpoint that holds the state at this turn's end: a new one, or the previous for a Clean turn.
    pub checkpoint: CheckpointId,
    pub evidence: Evidence,
    pub stats: TurnStats,
    /// None for a boundary without a command (the creation, a checkpoint asked for by hand).
    pub result: Option<ExecResult>,
}

impl TurnRecord {
    /// The chunks of journaled output, which have no links of their own.
    pub fn links(&self) -> impl Iterator<Item = ChunkName> + '_ {
        let outputs = self.result.iter().flat_map(|r| [&r.stdout, &r.stderr]);
        outputs
            .flat_map(|out| match out {
                Output::Stored(blob) => blob.chunks.as_slice(),
                Output::Inline(_) => &[],
            })
            .copied()
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.varint(self.turn.0);
        w.bytes(self.key.as_bytes());
        w.bytes(self.command.as_bytes());
        w.varint(self.started_ms);
        w.varint(self.ended_ms);
        w.u8(self.verdict.to_byte());
        w.raw(&self.checkpoint.0);
        let e = &self.evidence;
        for list in [&e.paths, &e.processes, &e.reasons, &e.not_covered] {
            w.varint(list.len() as u64);
            for text in list {
                w.bytes(text.as_bytes());
            }
        }
        w.varint(e.paths_total);
        w.varint(e.processes_total);
        let s = &self.stats;
        for v in [
            s.captured_bytes,
            s.sent_bytes,
            s.sent_chunks,
            s.full_bytes,
            s.frozen_us,
            s.exposed_us,
        ] {
            w.varint(v);
        }
        w.option(self.result.as_ref(), |w, result| {
            let (tag, value) = match result.status {
                ExitStatus::Code(c) => (0, c),
                ExitStatus::Signal(s) => (1, s),
                ExitStatus::TimedOut => (2, 0),
            };
            w.u8(tag);
            w.u8(value);
            for out in [&result.stdout, &result.stderr] {
                match out {
                    Output::Inline(bytes) => {
                        w.u8(0);
                        w.bytes(bytes);
                    }
                    Output::Stored(blob) => {
                        w.u8(1);
                        blob.write(w);
                    }
                }
            }
        });
        w.into_bytes()
    }

    /// Reads what [`TurnRecord::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > MAX_TURN_LEN {
            return Err(FormatError::Invalid {
                format: FORMAT,
                what: format!("{} bytes are over the bound", bytes.len()),
            });
        }
        let mut r = Reader::versioned(FORMAT, bytes, VERSION)?;
        let (turn, key, command) = (TurnNo(r.varint()?), r.text(MAX_KEY)?, r.text(MAX_TEXT)?);
        let (started_ms, ended_ms) = (r.varint()?, r.varint()?);
        let verdict = Verdict::read(&mut r)?;
        let checkpoint = CheckpointId(r.array()?);
        let mut list = || -> Result<Vec<String>, FormatError> {
            let n = r.count(MAX_SAMPLES, 1)?;
            (0..n).map(|_| r.text(MAX_TEXT)).collect()
        };
        let (paths, processes, reasons, not_covered) = (list()?, list()?, list()?, list()?);
        let evidence = Evidence {
            paths,
            processes,
            reasons,
            not_covered,
            paths_total: r.varint()?,
            processes_total: r.varint()?,
        };
        let stats = TurnStats {
            captured_bytes: r.varint()?,
            sent_bytes: r.varint()?,
            sent_chunks: r.varint()?,
            full_bytes: r.varint()?,
            frozen_us: r.varint()?,
            exposed_us: r.varint()?,
        };
        let result = r.option(|r| {
            let status = match (r.u8()?, r.u8()?) {
                (0, c) => ExitStatus::Code(c),
                (1, s) => ExitStatus::Signal(s),
                (2, 0) => ExitStatus::TimedOut,
                (tag, _) => return Err(r.invalid(format!("unknown exit status {tag}"))),
            };
            Ok(ExecResult {
                status,
                stdout: Output::read(r)?,
                stderr: Output::read(r)?,
            })
        })?;
        r.finish()?;
        Ok(Self {
            turn,
            key,
            command,
            started_ms,
            ended_ms,
            verdict,
            checkpoint,
            evidence,
            stats,
            result,
        })
    }
}

impl Output {
    fn read(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        match r.u8()? {
            0 => Ok(Output::Inline(r.bytes(MAX_INLINE_OUTPUT)?.to_vec())),
            1 => Ok(Output::Stored(BlobRef::read(r)?)),
            tag => Err(r.invalid(format!("unknown output tag {tag}"))),
        }
    }
}
