//! One connection of a host, or of something that pretends to be one.

use crate::job::{Job, Phase};
use crate::sys;
use std::io::{ErrorKind as Io, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use tidepool_init::auth::{CLIENT_PROOF, Handshake, Key, Seal};
use tidepool_init::message::{ErrorKind, Event, Request};
use tidepool_init::{MAX_DATA, MAX_FRAME};

/// How long a peer may take to prove itself.
const AUTH_TIME: Duration = Duration::from_secs(5);
/// Bytes waiting to be sent before job output is held back.
const OUT_WAITING: usize = 256 * 1024;
/// Bytes waiting to be sent before requests are held back; their answers may be as large as a frame.
const ANSWERS_WAITING: usize = 4 * MAX_FRAME;

enum Auth {
    Pending { nonce: [u8; 32], until: Instant },
    Done { receive: Seal, send: Seal },
}

/// What a connection still needs of the job it is attached to.
pub(crate) struct Attached {
    pub(crate) job: String,
    pub(crate) stdout_at: u64,
    pub(crate) stderr_at: u64,
    /// Whether [`Event::Started`] has been sent, and what it says.
    pub(crate) announced: bool,
    pub(crate) new: bool,
}

pub(crate) struct Conn {
    pub(crate) stream: TcpStream,
    auth: Auth,
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    pub(crate) attached: Option<Attached>,
    /// The peer sends no more; what it sent before still counts.
    pub(crate) closed: bool,
    /// Requests may wait in `input` because they could not be answered yet.
    pub(crate) held_back: bool,
    pub(crate) dead: bool,
}

impl Conn {
    /// Takes a connection and greets the peer.
    pub(crate) fn accept(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let nonce = sys::random()?;
        Ok(Self {
            stream,
            auth: Auth::Pending {
                nonce,
                until: Instant::now() + AUTH_TIME,
            },
            input: Vec::new(),
            output: Handshake::server_hello(&nonce).to_vec(),
            sent: 0,
            attached: None,
            closed: false,
            held_back: false,
            dead: false,
        })
    }

    /// When the peer must have proved itself; absent once it has.
    pub(crate) fn auth_until(&self) -> Option<Instant> {
        match self.auth {
            Auth::Pending { until, .. } => Some(until),
            Auth::Done { .. } => None,
        }
    }

    pub(crate) fn waiting(&self) -> usize {
        self.output.len() - self.sent
    }

    /// Whether requests may be read and answered now.
    pub(crate) fn takes_requests(&self) -> bool {
        self.waiting() < ANSWERS_WAITING
    }

    /// Reads what came, up to one frame more than fits.
    pub(crate) fn receive(&mut self, scratch: &mut [u8]) {
        let limit = match self.auth {
            Auth::Pending { .. } => CLIENT_PROOF,
            Auth::Done { .. } => MAX_FRAME + MAX_DATA,
        };
        while self.input.len() < limit && !self.closed {
            let want = scratch.len().min(limit - self.input.len());
            match self.stream.read(&mut scratch[..want]) {
                Ok(0) => self.closed = true,
                Ok(n) => self.input.extend_from_slice(&scratch[..n]),
                Err(e) if e.kind() == Io::WouldBlock => return,
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(_) => return self.dead = true,
            }
            // A short proof must be answered before frames can be read.
            if self.auth_until().is_some() {
                return;
            }
        }
    }

    /// The next request, if a whole one is here. Anything not genuine ends the connection without effect.
    pub(crate) fn next(&mut self, key: &Key) -> Option<Request> {
        if let Auth::Pending { nonce, .. } = &self.auth {
            let proof = self.input.first_chunk::<CLIENT_PROOF>()?;
            let Ok((handshake, answer)) = Handshake::server(key, *nonce, proof) else {
                self.dead = true;
                return None;
            };
            self.input.clear();
            self.output.extend_from_slice(&answer);
            let (receive, send) = handshake.seals(key);
            self.auth = Auth::Done { receive, send };
        }
        let Auth::Done { receive, .. } = &mut self.auth else {
            return None;
        };
        match receive.take(&mut self.input) {
            Ok(Some(payload)) => match Request::decode(&payload) {
                Ok(request) => return Some(request),
                Err(e) => self.error(ErrorKind::Invalid, &e.to_string()),
            },
            Ok(None) => {}
            Err(_) => self.dead = true,
        }
        None
    }

    pub(crate) fn send(&mut self, event: &Event) {
        let Auth::Done { send, .. } = &mut self.auth else {
            return;
        };
        if self.sent > OUT_WAITING {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        if send.seal(&event.encode(), &mut self.output).is_err() {
            self.dead = true;
        }
    }

    pub(crate) fn error(&mut self, kind: ErrorKind, text: &str) {
        self.send(&Event::Error {
            kind,
            text: text.into(),
        });
    }

    /// Tells the peer what the attached job has to say, as far as the peer takes it.
    pub(crate) fn follow(&mut self, job: &Job) {
        while self.attached.is_some() && !self.dead {
            self.queue(job);
            if self.waiting() == 0 {
                return;
            }
            self.flush();
            if self.waiting() > 0 {
                return;
            }
        }
    }

    fn queue(&mut self, job: &Job) {
        let Some(mut at) = self.attached.take() else {
            return;
        };
        if job.phase == Phase::Starting {
            self.attached = Some(at);
            return;
        }
        if !at.announced {
            at.announced = true;
            let (pid, stdin_received) = (job.pid.unsigned_abs(), job.stdin.received);
            self.send(&Event::Started {
                pid,
                new: at.new,
                stdin_received,
            });
        }
        for stderr in [false, true] {
            let (ring, cursor) = match stderr {
                false => (&job.stdout.ring, &mut at.stdout_at),
                true => (&job.stderr.ring, &mut at.stderr_at),
            };
            if *cursor < ring.start() {
                self.send(&Event::Lost {
                    stderr,
                    from: *cursor,
                    to: ring.start(),
                });
                *cursor = ring.start();
            }
            while self.waiting() < OUT_WAITING {
                let data = ring.read(*cursor, MAX_DATA);
                if data.is_empty() {
                    break;
                }
                let offset = *cursor;
                *cursor += data.len() as u64;
                self.send(&match stderr {
                    false => Event::Stdout { offset, data },
                    true => Event::Stderr { offset, data },
                });
            }
        }
        let (stdout_len, stderr_len) = (job.stdout.ring.end(), job.stderr.ring.end());
        match job.phase {
            Phase::Finished(status) if at.stdout_at >= stdout_len && at.stderr_at >= stderr_len => {
                self.send(&Event::Exited {
                    status,
                    timed_out: job.timed_out,
                    stdout_len,
                    stderr_len,
                });
            }
            _ => self.attached = Some(at),
        }
    }

    /// Sends what waits, as far as the peer takes it.
    pub(crate) fn flush(&mut self) {
        while self.waiting() > 0 {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == Io::WouldBlock => return,
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(_) => return self.dead = true,
            }
        }
        self.output = Vec::new();
        self.sent = 0;
    }
}
