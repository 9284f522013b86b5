//! The loop: connections on one side, jobs on the other.

use crate::conn::{Attached, Conn};
use crate::job::{Job, Phase, STDIN_WAITING};
use crate::spawn::{self, Defaults, Failure};
use crate::sys;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use tidepool_init::auth::Key;
use tidepool_init::message::{ErrorKind, Event, Request, Setup, SignalScope};
use tidepool_init::{MAX_JOBS, PORT};

/// Connections that have proved themselves.
const MAX_CONNS: usize = 256;
/// Connections that have not: when one more comes, the oldest of them goes.
const MAX_STRANGERS: usize = 128;
/// Output kept for all jobs together before the largest holders lose their oldest part.
const MAX_OUTPUT: usize = 64 * 1024 * 1024;

pub(crate) struct Server {
    key: Key,
    defaults: Defaults,
    listener: TcpListener,
    conns: Vec<Conn>,
    jobs: Vec<Job>,
    /// Streams of ended jobs that background processes still hold: read and thrown away, so that these never block.
    drains: Vec<OwnedFd>,
    scratch: Vec<u8>,
}

enum Reply {
    Event(Event),
    Attach(Attached),
    None,
}

fn refuse(kind: ErrorKind, text: impl Into<String>) -> Reply {
    Reply::Event(Event::Error {
        kind,
        text: text.into(),
    })
}

impl Server {
    /// Listens for the host.
    pub(crate) fn bind(setup: Setup) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            key: setup.key,
            defaults: Defaults {
                user: setup.user,
                cwd: setup.cwd,
                env: setup.env,
            },
            listener,
            conns: Vec::new(),
            jobs: Vec::new(),
            drains: Vec::new(),
            scratch: vec![0; tidepool_init::MAX_DATA],
        })
    }

    /// Does everything that can be done now, then waits for more.
    pub(crate) fn step(&mut self) -> io::Result<()> {
        self.reap();
        self.accept();
        self.drain();
        self.jobs_forward();
        self.serve();
        self.jobs_forward();
        for conn in &mut self.conns {
            let job = conn
                .attached
                .as_ref()
                .and_then(|a| self.jobs.iter().find(|j| j.id == a.job));
            if let Some(job) = job {
                conn.follow(job);
            }
            conn.flush();
        }
        let now = Instant::now();
        self.conns
            .retain(|c| !c.dead && c.auth_until().is_none_or(|t| t > now));
        self.bound_output();
        self.wait()
    }

    fn reap(&mut self) {
        while let Some(pid) = sys::peek_exited() {
            let index = self.jobs.iter().position(|j| j.pid == pid && j.alive());
            if let Some(i) = index
                && self.jobs[i].timed_out
            {
                // While the process is not reaped its number cannot mean another session.
                sys::kill_session(pid, libc::SIGKILL);
            }
            let status = sys::reap(pid);
            if let Some(i) = index {
                self.settle_start(i);
                // A job that never started is gone by now.
                if let Some(job) = self.jobs.iter_mut().find(|j| j.pid == pid && j.alive()) {
                    job.ended(status);
                }
            }
        }
    }

    /// Looks whether a starting job became its program. True if the job is gone.
    fn settle_start(&mut self, index: usize) -> bool {
        let job = &mut self.jobs[index];
        let Some(exec) = &job.exec else { return false };
        let mut report = [0; 8];
        match sys::read(exec.as_raw_fd(), &mut report) {
            Err(_) => false,
            Ok(n) => {
                job.exec = None;
                let Some(failure) = Failure::decode(&report[..n]) else {
                    job.phase = Phase::Running;
                    return false;
                };
                let text = failure.text(&job.program);
                let job = self.jobs.remove(index);
                for conn in &mut self.conns {
                    if conn.attached.as_ref().is_some_and(|a| a.job == job.id) {
                        conn.attached = None;
                        conn.error(ErrorKind::SpawnFailed, &text);
                    }
                }
                true
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let strangers = self
                .conns
                .iter()
                .filter(|c| c.auth_until().is_some())
                .count();
            if strangers >= MAX_STRANGERS
                && let Some(oldest) = self.conns.iter().position(|c| c.auth_until().is_some())
            {
                self.conns.remove(oldest);
            }
            if self.conns.len() < MAX_CONNS + MAX_STRANGERS
                && let Ok(conn) = Conn::accept(stream)
            {
                self.conns.push(conn);
            }
        }
    }

    fn drain(&mut self) {
        let scratch = &mut self.scratch;
        self.drains.retain(|fd| {
            // A few reads each, so that a process which writes for ever does not keep the loop.
            for _ in 0..4 {
                match sys::read(fd.as_raw_fd(), scratch) {
                    Ok(0) => return false,
                    Ok(_) => {}
                    Err(_) => return true,
                }
            }
            true
        });
    }

    /// The oldest output offsets that attached connections still need of a job.
    fn needed(&self, job: &str) -> (Option<u64>, Option<u64>) {
        let followers = || {
            self.conns
                .iter()
                .filter_map(|c| c.attached.as_ref())
                .filter(|a| a.job == job)
        };
        (
            followers().map(|a| a.stdout_at).min(),
            followers().map(|a| a.stderr_at).min(),
        )
    }

    fn jobs_forward(&mut self) {
        let now = Instant::now();
        let mut i = 0;
        while i < self.jobs.len() {
            if self.settle_start(i) {
                continue;
            }
            let needed = self.needed(&self.jobs[i].id);
            let job = &mut self.jobs[i];
            if job.alive() && job.due.is_some_and(|d| d <= now) {
                job.time_out();
            }
            job.pump(needed, &mut self.scratch);
            if matches!(job.phase, Phase::Finished(_)) {
                self.drains.extend(job.take_outputs());
            }
            i += 1;
        }
    }

    fn serve(&mut self) {
        for i in 0..self.conns.len() {
            self.conns[i].held_back = false;
            while !self.conns[i].dead {
                if !self.may_read(i) {
                    self.conns[i].held_back = true;
                    break;
                }
                let before = self.conns[i].attached.is_some();
                self.conns[i].receive(&mut self.scratch);
                let Some(request) = self.conns[i].next(&self.key) else {
                    self.conns[i].dead |= self.conns[i].closed;
                    break;
                };
                match self.answer(request, before, i) {
                    Reply::Event(event) => self.conns[i].send(&event),
                    Reply::Attach(attached) => self.conns[i].attached = Some(attached),
                    Reply::None => {}
                }
            }
        }
    }

    /// Requests wait while answers do, and while the attached job does not take its input.
    fn may_read(&self, conn: usize) -> bool {
        let conn = &self.conns[conn];
        let backlog = conn
            .attached
            .as_ref()
            .and_then(|a| self.jobs.iter().find(|j| j.id == a.job));
        conn.takes_requests() && backlog.is_none_or(|j| j.stdin.backlog() < STDIN_WAITING)
    }

    fn answer(&mut self, request: Request, is_attached: bool, conn: usize) -> Reply {
        let attached = self.conns[conn].attached.as_ref().map(|a| a.job.clone());
        let find = |jobs: &[Job], id: &str| jobs.iter().position(|j| j.id == id);
        match request {
            Request::Ping => Reply::Event(Event::Pong {
                version: env!("CARGO_PKG_VERSION").into(),
            }),
            Request::List => Reply::Event(Event::Jobs(self.jobs.iter().map(Job::info).collect())),
            Request::Spawn(_) | Request::Attach { .. } if is_attached => refuse(
                ErrorKind::Invalid,
                "this connection is attached to a job already",
            ),
            Request::Spawn(request) => self.spawn(request),
            Request::Attach {
                job,
                stdout_from,
                stderr_from,
            } => match find(&self.jobs, &job) {
                None => refuse(ErrorKind::NotFound, format!("no job {job:?}")),
                Some(i) => {
                    let at = &self.jobs[i];
                    if stdout_from > at.stdout.ring.end() || stderr_from > at.stderr.ring.end() {
                        return refuse(ErrorKind::Invalid, "an offset is beyond the job's output");
                    }
                    let (stdout_at, stderr_at) = (stdout_from, stderr_from);
                    Reply::Attach(Attached {
                        job,
                        stdout_at,
                        stderr_at,
                        announced: false,
                        new: false,
                    })
                }
            },
            Request::Stdin { .. } | Request::StdinClose | Request::Resize { .. } => {
                // Input for a job that just ended is no mistake of the client.
                let Some(i) = attached.and_then(|id| find(&self.jobs, &id)) else {
                    return Reply::None;
                };
                self.control(i, &request)
            }
            Request::Signal { job, signal, scope } => match find(&self.jobs, &job) {
                None => refuse(ErrorKind::NotFound, format!("no job {job:?}")),
                Some(i) if !self.jobs[i].alive() => {
                    refuse(ErrorKind::NotRunning, format!("job {job:?} has ended"))
                }
                Some(i) => self.signal(i, signal, scope),
            },
            Request::Forget { job } => match find(&self.jobs, &job) {
                Some(i) if !matches!(self.jobs[i].phase, Phase::Finished(_)) => {
                    refuse(ErrorKind::Invalid, format!("job {job:?} has not ended"))
                }
                Some(i) => {
                    let mut gone = self.jobs.remove(i);
                    self.drains.extend(gone.take_outputs());
                    for conn in &mut self.conns {
                        if conn.attached.as_ref().is_some_and(|a| a.job == gone.id) {
                            conn.attached = None;
                            conn.error(ErrorKind::NotFound, "the job was forgotten");
                        }
                    }
                    Reply::Event(Event::Done)
                }
                None => Reply::Event(Event::Done),
            },
        }
    }

    fn spawn(&mut self, request: tidepool_init::message::SpawnRequest) -> Reply {
        let mut new = false;
        if !self.jobs.iter().any(|j| j.id == request.job) {
            if self.jobs.len() >= MAX_JOBS {
                return refuse(
                    ErrorKind::TooMany,
                    format!("{MAX_JOBS} jobs are kept; forget some"),
                );
            }
            let spawned = match spawn::spawn(&request, &self.defaults) {
                Ok(spawned) => spawned,
                Err((kind, text)) => return refuse(kind, text),
            };
            let program = request.argv.first().cloned().unwrap_or_default();
            let job = request.job.clone();
            self.jobs.push(Job::new(
                job,
                program,
                request.tty.is_some(),
                request.timeout_ms,
                spawned,
            ));
            new = true;
        }
        Reply::Attach(Attached {
            job: request.job,
            stdout_at: 0,
            stderr_at: 0,
            announced: false,
            new,
        })
    }

    fn control(&mut self, index: usize, request: &Request) -> Reply {
        let job = &mut self.jobs[index];
        match request {
            Request::Stdin { offset, data } if !job.stdin.take(*offset, data) => {
                return refuse(ErrorKind::Invalid, "input before this is missing");
            }
            Request::StdinClose => job.close_stdin(),
            Request::Resize { cols, rows } => match job.stdout.fd.as_ref().filter(|_| job.tty) {
                Some(fd) => {
                    if let Err(e) = sys::resize_pty(fd, *cols, *rows) {
                        return refuse(
                            ErrorKind::Invalid,
                            format!("the terminal cannot be resized: {e}"),
                        );
                    }
                }
                None => return refuse(ErrorKind::Invalid, "the job has no terminal"),
            },
            _ => {}
        }
        Reply::None
    }

    fn signal(&mut self, index: usize, signal: i32, scope: SignalScope) -> Reply {
        let pid = self.jobs[index].pid;
        if !(1..=64).contains(&signal) {
            return refuse(
                ErrorKind::Invalid,
                format!("no signal has the number {signal}"),
            );
        }
        let sent = match scope {
            SignalScope::Process => sys::kill(pid, signal),
            SignalScope::Group => sys::kill(-pid, signal),
            SignalScope::Session => {
                sys::kill_session(pid, signal);
                Ok(())
            }
        };
        match sent {
            Ok(()) => Reply::Event(Event::Done),
            Err(e) => refuse(
                ErrorKind::NotRunning,
                format!("the signal was not sent: {e}"),
            ),
        }
    }

    /// Keeps the memory for output bounded: it is part of every process image.
    fn bound_output(&mut self) {
        let mut held: usize = self
            .jobs
            .iter()
            .map(|j| j.stdout.ring.len() + j.stderr.ring.len())
            .sum();
        while held > MAX_OUTPUT {
            let mut best = (0, 0, false);
            for (i, job) in self.jobs.iter().enumerate() {
                let needed = self.needed(&job.id);
                for (ring, from, stderr) in [
                    (&job.stdout.ring, needed.0, false),
                    (&job.stderr.ring, needed.1, true),
                ] {
                    let spare = from.unwrap_or(ring.end()).saturating_sub(ring.start());
                    let spare = usize::try_from(spare).unwrap_or(usize::MAX).min(ring.len());
                    if spare > best.0 {
                        best = (spare, i, stderr);
                    }
                }
            }
            let (spare, i, stderr) = best;
            if spare == 0 {
                return;
            }
            let job = &mut self.jobs[i];
            let ring = if stderr {
                &mut job.stderr.ring
            } else {
                &mut job.stdout.ring
            };
            let drop = spare.div_ceil(2);
            ring.drop_front(drop);
            ring.shrink();
            held -= drop;
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut fds = Vec::new();
        let mut watch = |fd: RawFd, events: i16| {
            fds.push(libc::pollfd {
                fd,
                events,
                revents: 0,
            })
        };
        watch(self.listener.as_raw_fd(), libc::POLLIN);
        // Work that no descriptor will announce.
        let mut more = false;
        for (i, conn) in self.conns.iter().enumerate() {
            let may_read = self.may_read(i);
            more |= may_read && conn.held_back;
            let mut events = if may_read && !conn.closed {
                libc::POLLIN
            } else {
                0
            };
            if conn.waiting() > 0 {
                events |= libc::POLLOUT;
            }
            watch(conn.stream.as_raw_fd(), events);
        }
        for job in &self.jobs {
            let needed = self.needed(&job.id);
            if let Some(exec) = &job.exec {
                watch(exec.as_raw_fd(), libc::POLLIN);
            }
            if !matches!(job.phase, Phase::Finished(_)) {
                for (output, from) in [(&job.stdout, needed.0), (&job.stderr, needed.1)] {
                    // A descriptor that is not wanted now must not be watched: a hang-up is always reported.
                    if let Some(fd) = output.fd.as_ref().filter(|_| output.wanted(from) > 0) {
                        watch(fd.as_raw_fd(), libc::POLLIN);
                        more |= !job.alive();
                    }
                }
            }
            if let Some(fd) = job.stdin.fd.as_ref().filter(|_| job.stdin.backlog() > 0) {
                watch(fd.as_raw_fd(), libc::POLLOUT);
            }
        }
        for fd in &self.drains {
            watch(fd.as_raw_fd(), libc::POLLIN);
        }
        let now = Instant::now();
        let due = self.jobs.iter().filter(|j| j.alive()).filter_map(|j| j.due);
        let due = due
            .chain(self.conns.iter().filter_map(Conn::auth_until))
            .min();
        let due = due.map(|d| d.saturating_duration_since(now) + Duration::from_millis(1));
        sys::wait_ready(&mut fds, if more { Some(Duration::ZERO) } else { due })?;
        // A peer that is gone for good shows at once; where nothing is read now, nothing else would notice.
        for (i, fd) in (0..self.conns.len()).zip(&fds[1..]) {
            let gone = fd.revents & (libc::POLLERR | libc::POLLHUP) != 0;
            if gone && (self.conns[i].closed || !self.may_read(i)) {
                self.conns[i].dead = true;
            }
        }
        Ok(())
    }
}
