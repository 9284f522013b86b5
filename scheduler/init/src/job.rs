//! One job: its process, its streams and how far they have been read.

use crate::ring::Ring;
use crate::spawn::Spawned;
use crate::sys;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use tidepool_init::message::{ExitStatus, JobInfo};
use tidepool_init::{MAX_DATA, RING_BYTES};

/// How much input waits for a job before its client is made to wait.
pub(crate) const STDIN_WAITING: usize = 256 * 1024;
/// How long a job that ran out of time has between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// How much is still read from a terminal after its job ended; background processes may write for ever.
const TTY_REST: u64 = 256 * 1024;

/// Where a job is in its life.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Forked, but not yet the asked-for program.
    Starting,
    Running,
    /// Its process ended; what it wrote is still being read.
    Draining(ExitStatus),
    Finished(ExitStatus),
}

/// One output stream.
pub(crate) struct Output {
    pub(crate) fd: Option<OwnedFd>,
    pub(crate) ring: Ring,
    /// Once the job's process ended: how many bytes still count as the job's.
    left: Option<u64>,
}

impl Output {
    fn new(fd: Option<OwnedFd>) -> Self {
        Self {
            fd,
            ring: Ring::new(RING_BYTES),
            left: None,
        }
    }

    /// How much may be read now, given the oldest offset an attached client still needs.
    pub(crate) fn wanted(&self, needed_from: Option<u64>) -> usize {
        if self.fd.is_none() || self.left == Some(0) {
            return 0;
        }
        let room = needed_from.map_or(MAX_DATA, |from| self.ring.room(from).min(MAX_DATA));
        let left = self
            .left
            .map_or(usize::MAX, |l| usize::try_from(l).unwrap_or(usize::MAX));
        room.min(left)
    }

    /// Reads what is there, as far as wanted.
    fn fill(&mut self, needed_from: Option<u64>, scratch: &mut [u8]) {
        // A few rounds at most, so that one loud job does not keep the others waiting.
        for _ in 0..4 {
            let want = self.wanted(needed_from).min(scratch.len());
            let Some(fd) = self.fd.as_ref().filter(|_| want > 0) else {
                return;
            };
            match sys::read(fd.as_raw_fd(), &mut scratch[..want]) {
                Ok(0) => self.fd = None,
                Ok(n) => {
                    self.ring.push(&scratch[..n]);
                    if let Some(left) = &mut self.left {
                        *left = left.saturating_sub(n as u64);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // Whatever the ended process wrote would have been here.
                    if self.left.is_some() {
                        self.left = Some(0);
                    }
                    return;
                }
                Err(_) => return,
            }
        }
    }

    fn drained(&self) -> bool {
        self.fd.is_none() || self.left == Some(0)
    }
}

/// Input on its way to a job.
pub(crate) struct Input {
    pub(crate) fd: Option<OwnedFd>,
    waiting: VecDeque<u8>,
    pub(crate) received: u64,
    closing: bool,
}

impl Input {
    pub(crate) fn backlog(&self) -> usize {
        self.waiting.len()
    }

    /// Takes input at `offset`; what is already here is skipped. False if bytes before it are missing.
    pub(crate) fn take(&mut self, offset: u64, data: &[u8]) -> bool {
        let Some(known) = self.received.checked_sub(offset) else {
            return false;
        };
        let fresh = data
            .get(usize::try_from(known).unwrap_or(usize::MAX)..)
            .unwrap_or(&[]);
        self.received += fresh.len() as u64;
        if self.fd.is_some() && !self.closing {
            self.waiting.extend(fresh);
        }
        true
    }

    fn flush(&mut self) {
        while !self.waiting.is_empty() {
            let Some(fd) = &self.fd else {
                return self.waiting.clear();
            };
            match sys::write(fd.as_fd(), self.waiting.as_slices().0) {
                Ok(n) => drop(self.waiting.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // The job does not read any more.
                Err(_) => self.fd = None,
            }
        }
        if self.closing {
            self.fd = None;
        }
    }
}

pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) program: Vec<u8>,
    pub(crate) pid: libc::pid_t,
    pub(crate) phase: Phase,
    pub(crate) exec: Option<OwnedFd>,
    pub(crate) tty: bool,
    pub(crate) stdin: Input,
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
    pub(crate) timed_out: bool,
    /// When the next time-out signal is due.
    pub(crate) due: Option<Instant>,
}

impl Job {
    pub(crate) fn new(
        id: String,
        program: Vec<u8>,
        tty: bool,
        timeout_ms: Option<u64>,
        s: Spawned,
    ) -> Self {
        Self {
            id,
            program,
            pid: s.pid,
            phase: Phase::Starting,
            exec: Some(s.exec),
            tty,
            stdin: Input {
                fd: s.stdin,
                waiting: VecDeque::new(),
                received: 0,
                closing: false,
            },
            stdout: Output::new(Some(s.stdout)),
            stderr: Output::new(s.stderr),
            timed_out: false,
            due: timeout_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms))),
        }
    }

    pub(crate) fn alive(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Running)
    }

    pub(crate) fn info(&self) -> JobInfo {
        JobInfo {
            job: self.id.clone(),
            pid: self.pid.unsigned_abs(),
            tty: self.tty,
            status: match self.phase {
                Phase::Starting | Phase::Running => None,
                Phase::Draining(s) | Phase::Finished(s) => Some(s),
            },
        }
    }

    /// The end of input: the pipe closes once it has all, a terminal gets its end-of-file character.
    pub(crate) fn close_stdin(&mut self) {
        if self.tty {
            self.stdin.waiting.push_back(4);
        } else {
            self.stdin.closing = true;
        }
    }

    /// Moves input and output along. `needed` are the oldest offsets attached clients still need.
    pub(crate) fn pump(&mut self, needed: (Option<u64>, Option<u64>), scratch: &mut [u8]) {
        self.stdin.flush();
        if matches!(self.phase, Phase::Finished(_)) {
            return;
        }
        self.stdout.fill(needed.0, scratch);
        self.stderr.fill(needed.1, scratch);
        if let Phase::Draining(status) = self.phase
            && self.stdout.drained()
            && self.stderr.drained()
        {
            self.phase = Phase::Finished(status);
            self.stdin.fd = None;
            self.stdin.waiting = VecDeque::new();
            self.stdout.ring.shrink();
            self.stderr.ring.shrink();
        }
    }

    /// The job's process ended. What it wrote is in the pipes by now; what others write later is not its output.
    pub(crate) fn ended(&mut self, status: ExitStatus) {
        self.phase = Phase::Draining(status);
        self.due = None;
        for output in [&mut self.stdout, &mut self.stderr] {
            output.left = output
                .fd
                .as_ref()
                .map(|fd| if self.tty { TTY_REST } else { sys::waiting(fd) });
        }
    }

    /// Sends the signal that is due.
    pub(crate) fn time_out(&mut self) {
        let signal = if self.timed_out {
            libc::SIGKILL
        } else {
            libc::SIGTERM
        };
        sys::kill_session(self.pid, signal);
        self.due = if self.timed_out {
            None
        } else {
            Instant::now().checked_add(GRACE)
        };
        self.timed_out = true;
    }

    /// Ends of pipes and terminals that background processes may still hold.
    pub(crate) fn take_outputs(&mut self) -> impl Iterator<Item = OwnedFd> {
        [self.stdout.fd.take(), self.stderr.fd.take()]
            .into_iter()
            .flatten()
    }
}
