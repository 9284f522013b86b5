//! Execs: one command as one turn, exactly once.
//!
//! The idempotency key is the id of the job inside. A key that is journaled is answered from the journal; one that is not, but whose job still exists inside (the daemon died before the
//! commit), is attached to; only otherwise does anything run. The job is forgotten after the commit, never before.
//!
//! Elsewhere on purpose: the boundary ([`crate::boundary`]).

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use tidepool_proto::api::*;
use tidepool_proto::turn::{ExitStatus, MAX_KEY, Output, TurnRecord};
use tidepool_proto::{ErrorKind, TurnNo};
use tidepool_sandbox::{ExitStatus as JobStatus, JobEvent, JobRequest, SignalScope};
use tokio::sync::mpsc;

use crate::boundary::Cause;
use crate::error::{HostError, Result};
use crate::history::turn_info;
use crate::host::{Host, lock, now_ms};
use crate::sandbox::{Sandbox, shorten};

/// Bytes of each output stream that are journaled; the rest is cut off, with a note.
const MAX_JOURNALED: usize = 8 << 20;
/// Arguments and environment of an exec at the most, in bytes.
const MAX_ARGUMENTS: usize = 1 << 20;

/// An exec request with its bounds checked and its key made up where it had none.
pub fn checked(mut request: ExecRequest) -> Result<ExecRequest> {
    if request.argv.is_empty() || request.argv[0].is_empty() {
        return Err(HostError::invalid("there is no command to run"));
    }
    if request.key.is_empty() {
        request.key = format!("exec-{}", hex::encode(rand::random::<[u8; 12]>()));
    }
    if request.key.len() > MAX_KEY || !request.key.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(HostError::invalid(format!(
            "an idempotency key is at most {MAX_KEY} printable characters without spaces"
        )));
    }
    let bytes: usize = request
        .argv
        .iter()
        .chain(&request.env)
        .map(|s| s.len() + 1)
        .sum();
    if bytes > MAX_ARGUMENTS {
        return Err(HostError::invalid(format!(
            "arguments and environment are over {MAX_ARGUMENTS} bytes"
        )));
    }
    if request
        .argv
        .iter()
        .chain(&request.env)
        .any(|s| s.contains('\0'))
    {
        return Err(HostError::invalid(
            "arguments and environment may not hold NUL",
        ));
    }
    if let Some(bad) = request
        .env
        .iter()
        .find(|e| e.find('=').is_none_or(|at| at == 0))
    {
        return Err(HostError::invalid(format!("{bad:?} is not KEY=VALUE")));
    }
    Ok(request)
}

impl Sandbox {
    /// Runs a command as one turn and sends what comes of it. Goes on to the commit even if nobody listens any more.
    pub async fn exec(
        self: Arc<Self>,
        host: Arc<Host>,
        request: ExecRequest,
        tx: mpsc::Sender<ExecEvent>,
    ) {
        let done = tokio::spawn(Arc::clone(&self).exec_turn(host, request, tx.clone())).await;
        let last = match done.map_err(HostError::from).and_then(|done| done) {
            Ok(last) => last,
            Err(e) => ExecEvent::Error { error: e.to_api() },
        };
        let _ = tx.send(last).await;
    }

    async fn exec_turn(
        self: Arc<Self>,
        host: Arc<Host>,
        request: ExecRequest,
        tx: mpsc::Sender<ExecEvent>,
    ) -> Result<ExecEvent> {
        let mut inner = self.inner.lock().await;
        if let Some(bytes) = host
            .transfer
            .client
            .turn_by_key(self.id, &request.key)
            .await?
        {
            return self.replay(&host, &bytes, &tx).await;
        }
        let name = &self.record.name;
        match self.info().state {
            SandboxState::Running => {}
            SandboxState::Paused => {
                return Err(HostError::conflict(format!(
                    "{name} is paused; `tidepool sandbox resume {name}`"
                )));
            }
            SandboxState::Dead | SandboxState::Starting => {
                return Err(HostError::new(
                    ErrorKind::Unavailable,
                    format!("{name} does not run here; `tidepool restore {name}` brings it back"),
                ));
            }
        }
        self.refresh(&host, &mut inner).await?;
        let started_ms = now_ms();
        let command = shorten(&request.argv.join(" "), 200);
        let turn = TurnNo(inner.turn.0 + 1);
        let live = inner
            .live
            .as_mut()
            .ok_or_else(|| HostError::failed("the sandbox has no init"))?;
        let init = live.init.clone();
        let mut job = init
            .spawn(job_request(&request))
            .await
            .map_err(|e| HostError::from(e).context("starting the command"))?;
        *lock(&self.running) = Some((request.key.clone(), job.control.clone()));
        let _clear = Clear(&self);
        let started = ExecEvent::Started {
            key: request.key.clone(),
            turn,
            replayed: false,
        };
        let _ = tx.send(started).await;
        let (mut out, mut err) = (Journal::default(), Journal::default());
        let mut hung_up = false;
        let status = loop {
            let event = tokio::select! {
                event = job.events.recv() => event,
                () = tx.closed(), if request.stdin && !hung_up => {
                    // Whoever was to type is gone: as when a terminal hangs up, or the command would wait, and every later exec behind it.
                    hung_up = true;
                    for done in [
                        job.control.signal(libc::SIGHUP, SignalScope::Session).await,
                        job.control.close_stdin().await,
                    ] {
                        done.unwrap_or_else(|e| tracing::debug!(error = %e, "a command could not be hung up"));
                    }
                    continue;
                }
            };
            match event {
                Some(JobEvent::Stdout { offset, data }) => {
                    out.push(offset, &data);
                    let _ = tx
                        .send(ExecEvent::Stdout {
                            data: STANDARD.encode(&data),
                        })
                        .await;
                }
                Some(JobEvent::Stderr { offset, data }) => {
                    err.push(offset, &data);
                    let _ = tx
                        .send(ExecEvent::Stderr {
                            data: STANDARD.encode(&data),
                        })
                        .await;
                }
                Some(JobEvent::Lost { .. }) => {}
                Some(JobEvent::Refused(why)) => {
                    tracing::debug!(sandbox = %self.record.name, why, "init refused a request of a running job");
                }
                Some(JobEvent::Exited {
                    timed_out: true, ..
                }) => break ExitStatus::TimedOut,
                Some(JobEvent::Exited { status, .. }) => {
                    break match status {
                        JobStatus::Code(code) => ExitStatus::Code(code as u8),
                        JobStatus::Signal(signal) => ExitStatus::Signal(signal as u8),
                    };
                }
                Some(JobEvent::Disconnected(_)) | None => {
                    if self.info().state == SandboxState::Dead {
                        return Err(HostError::new(
                            ErrorKind::Unavailable,
                            format!(
                                "{name} ended while the command ran; its last checkpoint can be restored"
                            ),
                        ));
                    }
                    // The job goes on whatever becomes of a connection.
                    job = init
                        .attach(&request.key, out.end, err.end)
                        .await
                        .map_err(|e| {
                            HostError::from(e).context("attaching to the command again")
                        })?;
                    *lock(&self.running) = Some((request.key.clone(), job.control.clone()));
                }
            }
        };
        *lock(&self.running) = None;
        let cause = Cause {
            key: request.key.clone(),
            command,
            started_ms,
            result: Some((status, out.into_bytes(), err.into_bytes())),
        };
        let info = self.boundary(&host, &mut inner, cause).await.map_err(|e| {
            e.context(format!(
                "the command ended with status {}, but its turn could not be committed",
                status.shell_code()
            ))
        })?;
        if let Err(e) = init.forget(&request.key).await {
            // It only holds memory inside; the journal answers for the key from now on.
            tracing::debug!(key = request.key, error = %e, "a finished job stays with init");
        }
        Ok(ExecEvent::Exit {
            status,
            turn: Box::new(info),
        })
    }

    /// Answers a journaled key as it was answered first.
    async fn replay(
        &self,
        host: &Host,
        bytes: &[u8],
        tx: &mpsc::Sender<ExecEvent>,
    ) -> Result<ExecEvent> {
        let record = TurnRecord::decode(bytes)?;
        let info = turn_info(bytes)?;
        let started = ExecEvent::Started {
            key: record.key.clone(),
            turn: record.turn,
            replayed: true,
        };
        let _ = tx.send(started).await;
        let result = record.result.ok_or_else(|| {
            HostError::conflict(format!(
                "key {} is that of turn {}, which ran no command",
                record.key, record.turn
            ))
        })?;
        for (output, is_stdout) in [(&result.stdout, true), (&result.stderr, false)] {
            let data = match output {
                Output::Inline(bytes) => bytes.clone(),
                Output::Stored(blob) => {
                    let bodies = host.transfer.client.get(&blob.chunks).await?;
                    let mut all = Vec::with_capacity(blob.len.min(MAX_JOURNALED as u64) as usize);
                    for (name, body) in blob.chunks.iter().zip(bodies) {
                        all.extend(host.transfer.key.open(name, &body)?);
                    }
                    all
                }
            };
            for piece in data.chunks(256 << 10) {
                let data = STANDARD.encode(piece);
                let event = if is_stdout {
                    ExecEvent::Stdout { data }
                } else {
                    ExecEvent::Stderr { data }
                };
                let _ = tx.send(event).await;
            }
        }
        Ok(ExecEvent::Exit {
            status: result.status,
            turn: Box::new(info),
        })
    }
}

/// Takes the running exec's controls back, also when its turn fails.
struct Clear<'a>(&'a Sandbox);

impl Drop for Clear<'_> {
    fn drop(&mut self) {
        *lock(&self.0.running) = None;
    }
}

/// Output kept for the journal: its first [`MAX_JOURNALED`] bytes.
#[derive(Default)]
struct Journal {
    bytes: Vec<u8>,
    /// How far into the stream the last event reached.
    end: u64,
    cut: u64,
}

impl Journal {
    fn push(&mut self, offset: u64, data: &Bytes) {
        let lost = offset.saturating_sub(self.end);
        if lost > 0 {
            let note = format!("\n[tidepool: {lost} bytes were lost: nobody read them in time]\n");
            self.bytes.extend_from_slice(note.as_bytes());
        }
        let room = MAX_JOURNALED.saturating_sub(self.bytes.len());
        let take = room.min(data.len());
        self.bytes.extend_from_slice(&data[..take]);
        self.cut += (data.len() - take) as u64;
        self.end = offset + data.len() as u64;
    }

    fn into_bytes(mut self) -> Vec<u8> {
        if self.cut > 0 {
            let note = format!("\n[tidepool: {} more bytes were not journaled]\n", self.cut);
            self.bytes.extend_from_slice(note.as_bytes());
        }
        self.bytes
    }
}

fn job_request(r: &ExecRequest) -> JobRequest {
    let bytes = |list: &[String]| list.iter().map(|s| s.clone().into_bytes()).collect();
    JobRequest {
        job: r.key.clone(),
        argv: bytes(&r.argv),
        env: bytes(&r.env),
        cwd: r.cwd.clone().map(String::into_bytes),
        user: r.user.clone(),
        tty: r.tty.map(|t| (t.cols, t.rows)),
        stdin: r.stdin,
        timeout_ms: r.timeout_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(argv: &[&str]) -> ExecRequest {
        ExecRequest {
            argv: argv.iter().map(|s| (*s).to_owned()).collect(),
            ..ExecRequest::default()
        }
    }

    #[test]
    fn requests_are_checked() {
        let good = checked(request(&["ls"])).unwrap();
        assert!(good.key.starts_with("exec-"));
        assert!(checked(request(&[])).is_err());
        assert!(checked(request(&["a\0b"])).is_err());
        for env in ["", "X", "=x"] {
            let r = ExecRequest {
                env: vec![env.into()],
                ..request(&["ls"])
            };
            assert!(checked(r).is_err(), "{env:?}");
        }
        let long = ExecRequest {
            key: "k".repeat(MAX_KEY + 1),
            ..request(&["ls"])
        };
        assert_eq!(checked(long).unwrap_err().kind, ErrorKind::Invalid);
        assert!(checked(request(&["x", &"a".repeat(MAX_ARGUMENTS)])).is_err());
    }

    #[test]
    fn journaled_output_is_bounded_and_says_so() {
        let mut j = Journal::default();
        j.push(0, &Bytes::from(vec![b'x'; MAX_JOURNALED - 1]));
        j.push(MAX_JOURNALED as u64 - 1, &Bytes::from_static(b"yz"));
        let bytes = j.into_bytes();
        assert!(bytes.ends_with(b"1 more bytes were not journaled]\n"));
    }
}
