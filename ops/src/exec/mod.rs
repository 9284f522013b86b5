//! `tidepool exec`: a command in a sandbox as one turn.
//!
//! The client chooses the idempotency key before it asks, so that it can address the running command (stdin, signals,
//! the terminal's size) and so that the user can ask again after a broken connection. One task follows the daemon's
//! events; the others (stdin, sizes, signals) only ever add requests and never decide how the command ends.

mod sink;
mod stdin;

use std::pin::pin;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use tidepool_proto::api::{ExecEvent, ExecRequest, SendSignal, TurnInfo};
use tidepool_proto::turn::ExitStatus;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};

use crate::cli::ExecArgs;
use crate::client::{Client, parse, path, too_long};
use crate::failure::{Cause, Failure};
use crate::human;
use crate::lines::{LineError, Lines};
use crate::signals::{self, Caught, Signals};
use crate::terminal::{self, RawMode};
use crate::ui::Ui;
use sink::{Collected, Sink, Target, Writing};

const SIGINT: u8 = 2;
const SIGPIPE: u8 = 13;
/// A second Ctrl-C within this time ends the client.
const SECOND_INTERRUPT: Duration = Duration::from_secs(2);
/// How long a last request may take before the client leaves.
const LAST_WORD: Duration = Duration::from_secs(2);

/// What the daemon said when it took the command.
struct Started {
    replayed: bool,
}

/// How the turn ended.
struct Ended {
    status: ExitStatus,
    turn: Box<TurnInfo>,
    replayed: bool,
}

/// The result with `--json`.
#[derive(Serialize)]
struct Document<'a> {
    status: ExitStatus,
    turn: &'a TurnInfo,
    replayed: bool,
    stdout_base64: String,
    stderr_base64: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stdout_truncated: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stderr_truncated: bool,
}

/// Runs the command and returns the code to leave with.
pub(crate) async fn run(client: &Client, ui: Ui, args: ExecArgs) -> Result<u8, Failure> {
    let exec = Exec::new(client, ui, args)?;
    let (sink, writing) = if ui.json {
        Sink::collect()
    } else {
        Sink::stream()?
    };
    let result = exec.follow(sink, writing).await;
    if let Err(failure) = &result
        && matches!(failure.cause, Cause::BrokenPipe(_))
    {
        // As in a pipeline of the shell: a command whose reader has gone is told so, else it would write for ever.
        let _ = tokio::time::timeout(LAST_WORD, exec.signal(SIGPIPE)).await;
    }
    result
}

struct Exec {
    client: Client,
    ui: Ui,
    sandbox: String,
    request: ExecRequest,
}

impl Exec {
    fn new(client: &Client, ui: Ui, args: ExecArgs) -> Result<Self, Failure> {
        let key = match args.key {
            Some(key) => key,
            None => random_key()?,
        };
        let mut env = args.env;
        if args.tty
            && !env.iter().any(|v| v.starts_with("TERM="))
            && let Ok(term) = std::env::var("TERM")
        {
            env.push(format!("TERM={term}"));
        }
        let request = ExecRequest {
            argv: args.command,
            env,
            cwd: args.workdir,
            user: args.user,
            tty: args.tty.then(terminal::size),
            stdin: args.stdin,
            timeout_ms: args
                .timeout
                .map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
            key,
        };
        Ok(Self {
            client: client.clone(),
            ui,
            sandbox: args.sandbox.sandbox,
            request,
        })
    }

    /// Asks, and follows the command to its end.
    async fn follow(&self, mut sink: Sink, mut writing: Writing) -> Result<u8, Failure> {
        let mut signals = Signals::new()?;
        let mut resized = match self.request.tty {
            Some(_) => signal(SignalKind::window_change()).ok(),
            None => None,
        };
        let (size_tx, size_rx) = watch::channel(self.request.tty);
        let mut size_rx = Some(size_rx);
        let (started_tx, mut started_rx) = oneshot::channel();
        let (escape_tx, mut escape_rx) = oneshot::channel();
        let mut escape_tx = Some(escape_tx);
        let mut raw = None;
        let mut started = false;
        let mut last_interrupt: Option<Instant> = None;

        let ended = {
            let mut events = pin!(self.events(&mut sink, started_tx));
            loop {
                tokio::select! {
                    // Events last, so that a flood of output cannot keep Ctrl-C waiting.
                    biased;
                    Ok(now) = &mut started_rx, if !started => {
                        started = true;
                        if now.replayed {
                            continue;
                        }
                        if self.request.stdin {
                            if self.request.tty.is_some() {
                                raw = RawMode::enter()?;
                            }
                            self.send_stdin(if raw.is_some() { escape_tx.take() } else { None })?;
                        }
                        if let Some(sizes) = size_rx.take() {
                            self.send_sizes(sizes);
                        }
                    }
                    caught = signals.next() => {
                        let second = last_interrupt.is_some_and(|t| t.elapsed() < SECOND_INTERRUPT);
                        if caught == Caught::Terminate || second || !started {
                            break Err(self.cancelled());
                        }
                        last_interrupt = Some(Instant::now());
                        self.send_signal(SIGINT);
                        self.ui.note("sent SIGINT to the command; Ctrl-C again within 2 seconds stops waiting for it");
                    }
                    Ok(()) = &mut escape_rx, if raw.is_some() => break Err(self.cancelled()),
                    () = signals::next(&mut resized) => {
                        let _ = size_tx.send(Some(terminal::size()));
                    }
                    failure = writing.failed() => break Err(self.unwritten(failure)),
                    ended = &mut events => break ended,
                }
            }
        };
        drop(raw);
        // What came before the end is printed before anything is said about the end, unless there is nobody to read it.
        let given_up = matches!(&ended, Err(f) if !matches!(f.cause, Cause::Kind(_)));
        let written = if given_up {
            Ok(None)
        } else {
            tokio::select! {
                written = writing.finish(sink) => written.map_err(|f| self.unwritten(f)),
                _ = signals.next() => Err(self.cancelled()),
            }
        };
        let (ended, collected) = (ended?, written?);
        self.report(&ended, collected)
    }

    /// Sends the request and handles its events; ends with the turn.
    async fn events(
        &self,
        sink: &mut Sink,
        started: oneshot::Sender<Started>,
    ) -> Result<Ended, Failure> {
        let path = path(&["sandboxes", &self.sandbox, "exec"]);
        let mut lines = match self.client.post_lines(&path, Some(&self.request)).await {
            Ok(lines) => lines,
            Err(f) if f.in_doubt => return Err(self.lost(&f.message)),
            Err(f) => return Err(f),
        };
        let mut started = Some(started);
        let mut replayed = false;
        loop {
            match self.next_event(&mut lines).await? {
                ExecEvent::Started { replayed: r, .. } => {
                    replayed = r;
                    if let Some(started) = started.take() {
                        let _ = started.send(Started { replayed });
                    }
                }
                ExecEvent::Stdout { data } => self.output(sink, Target::Stdout, &data).await?,
                ExecEvent::Stderr { data } => self.output(sink, Target::Stderr, &data).await?,
                ExecEvent::Exit { status, turn } => {
                    return Ok(Ended {
                        status,
                        turn,
                        replayed,
                    });
                }
                // Refused before it was started, or the record of an earlier run: nothing ran.
                ExecEvent::Error { error } if started.is_some() || replayed => {
                    return Err(error.into());
                }
                ExecEvent::Error { error } => {
                    let failure = Failure::from(error)
                        .hint("the command may have run, but its turn is not committed");
                    return Err(self.repeatable(failure));
                }
            }
        }
    }

    async fn next_event(&self, lines: &mut Lines) -> Result<ExecEvent, Failure> {
        match lines.next().await {
            Ok(Some(line)) => match parse(&line) {
                Ok(event) => Ok(event),
                // A line cut short by the end of the connection is a lost connection and nothing else.
                Err(failure) => match lines.next().await {
                    Ok(Some(_)) => Err(self.repeatable(failure)),
                    _ => Err(self.lost("the daemon stopped in the middle of an answer")),
                },
            },
            Ok(None) => Err(self.lost("the daemon stopped before the command's end")),
            Err(LineError::Lost(why)) => Err(self.lost(&why)),
            Err(LineError::TooLong) => Err(self.repeatable(too_long())),
        }
    }

    async fn output(&self, sink: &mut Sink, target: Target, data: &str) -> Result<(), Failure> {
        let bytes = BASE64.decode(data).map_err(|e| {
            self.repeatable(Failure::failed(format!(
                "the host daemon's answer is not understood: output that is not base64: {e}"
            )))
        })?;
        sink.put(target, bytes).await;
        Ok(())
    }

    /// The output cannot be written; the recorded result still has it.
    fn unwritten(&self, failure: Failure) -> Failure {
        if failure.is_quiet() {
            return failure;
        }
        self.repeatable(failure)
    }

    /// Prints what is left to print and tells the code to leave with.
    fn report(&self, ended: &Ended, collected: Option<Collected>) -> Result<u8, Failure> {
        let turn = &ended.turn;
        if ended.replayed {
            self.ui.note(&format!(
                "this is the recorded result of turn {} (key {}); nothing ran again",
                turn.turn,
                human::clean(&turn.key)
            ));
        }
        if ended.status == ExitStatus::TimedOut {
            let after = self.request.timeout_ms.map_or(String::new(), |ms| {
                format!(
                    " after {}",
                    humantime::format_duration(Duration::from_millis(ms))
                )
            });
            self.ui
                .note(&format!("the command was killed{after}: its time was over"));
        }
        self.ui.detail(&format!(
            "turn {}: {}; {}; captured {}, sent {}, frozen {}, waited {}",
            turn.turn,
            human::verdict(turn.verdict),
            human::evidence(&turn.evidence),
            human::size(turn.stats.captured_bytes),
            human::size(turn.stats.sent_bytes),
            human::micros(turn.stats.frozen_us),
            human::micros(turn.stats.exposed_us),
        ));
        if let Some(out) = collected {
            let document = Document {
                status: ended.status,
                turn,
                replayed: ended.replayed,
                stdout_base64: BASE64.encode(&out.stdout.bytes),
                stderr_base64: BASE64.encode(&out.stderr.bytes),
                stdout_truncated: out.stdout.truncated,
                stderr_truncated: out.stderr.truncated,
            };
            self.ui.result(&document, String::new)?;
        }
        Ok(ended.status.shell_code())
    }

    fn endpoint(&self, name: &str) -> String {
        path(&["sandboxes", &self.sandbox, "execs", &self.request.key, name])
    }

    /// Starts sending stdin; its end ends the command's.
    fn send_stdin(&self, escape: Option<oneshot::Sender<()>>) -> Result<(), Failure> {
        let stream = stdin::stream(escape)?;
        let (client, ui, endpoint) = (self.client.clone(), self.ui, self.endpoint("stdin"));
        tokio::spawn(async move {
            if let Err(e) = client.post_stream(&endpoint, stream).await {
                // Mostly a command that ended before its input did. A lost daemon shows in the events too.
                ui.detail(&format!("stdin is no longer sent: {}", e.message));
            }
        });
        Ok(())
    }

    /// Sends each new size of the terminal; of several that come fast only the newest.
    fn send_sizes(&self, mut sizes: watch::Receiver<Option<tidepool_proto::api::Resize>>) {
        let (client, ui, endpoint) = (self.client.clone(), self.ui, self.endpoint("resize"));
        tokio::spawn(async move {
            while sizes.changed().await.is_ok() {
                let Some(size) = *sizes.borrow_and_update() else {
                    continue;
                };
                let sent: Result<serde_json::Value, _> = client.post(&endpoint, Some(&size)).await;
                if let Err(e) = sent {
                    ui.detail(&format!(
                        "the terminal's new size was not taken: {}",
                        e.message
                    ));
                }
            }
        });
    }

    fn send_signal(&self, signal: u8) {
        let (client, ui, endpoint) = (self.client.clone(), self.ui, self.endpoint("signal"));
        tokio::spawn(async move {
            let body = SendSignal { signal };
            let sent: Result<serde_json::Value, _> = client.post(&endpoint, Some(&body)).await;
            if let Err(e) = sent {
                ui.note(&format!("signal {signal} was not taken: {}", e.message));
            }
        });
    }

    async fn signal(&self, signal: u8) -> Result<(), Failure> {
        let body = SendSignal { signal };
        let endpoint = self.endpoint("signal");
        self.client
            .post::<_, serde_json::Value>(&endpoint, Some(&body))
            .await
            .map(drop)
    }

    fn lost(&self, why: &str) -> Failure {
        self.repeatable(Failure::unavailable(format!(
            "the connection to the host daemon was lost: {why}; the command may have run"
        )))
    }

    fn cancelled(&self) -> Failure {
        self.repeatable(Failure::cancelled(
            "no longer waiting for the command; it may still run in the sandbox",
        ))
    }

    /// Says how the exec can be asked for again.
    fn repeatable(&self, failure: Failure) -> Failure {
        let key = &self.request.key;
        failure
            .hint(format!(
                "the same command with `--key {}` is safe to repeat: a turn that was committed returns its recorded result and does not run again",
                quoted(key)
            ))
            .with_key(key)
    }
}

/// A key as a shell takes it.
fn quoted(key: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:/@%+=,".contains(&b);
    if key.bytes().all(plain) {
        key.to_owned()
    } else {
        format!("'{}'", key.replace('\'', r"'\''"))
    }
}

/// 16 random bytes in hex.
fn random_key() -> Result<String, Failure> {
    let mut bytes = [0u8; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        let rest = bytes.get_mut(filled..).unwrap_or_default();
        match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                let e = std::io::Error::from(e);
                return Err(Failure::failed(format!(
                    "cannot get random bytes for a key: {e}"
                )));
            }
        }
    }
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_random_hex_and_shells_take_them() {
        let (a, b) = (random_key().unwrap(), random_key().unwrap());
        assert_ne!(a, b);
        assert_eq!(a.len(), 32);
        assert!(a.bytes().all(|b| b.is_ascii_hexdigit()));
        assert_eq!(quoted(&a), a);
        assert_eq!(quoted("it's $x"), r"'it'\''s $x'");
    }
}
