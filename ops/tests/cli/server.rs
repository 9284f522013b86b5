//! A daemon made of canned answers: HTTP/1.1 on a unix socket in a temporary directory.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::{Run, tidepool};

/// How long anything may take before the test is given up. No test asserts on time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A part of an answer's body.
#[derive(Clone)]
pub(crate) enum Step {
    /// A line of JSON.
    Line(Value),
    /// Bytes as they are.
    Raw(Bytes),
    /// Waits for a request whose path ends so and whose body has these bytes in it.
    Until(&'static str, Vec<u8>),
    /// Breaks the connection.
    Cut,
    /// Says nothing more, and keeps the connection.
    Hang,
}

/// A canned answer.
#[derive(Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) steps: Vec<Step>,
}

impl Reply {
    pub(crate) fn json(value: Value) -> Self {
        Self::lines([value])
    }

    pub(crate) fn failed(status: u16, kind: &str, message: &str) -> Self {
        Self {
            status,
            steps: vec![Step::Line(json!({"kind": kind, "message": message}))],
        }
    }

    pub(crate) fn lines(lines: impl IntoIterator<Item = Value>) -> Self {
        Self::steps(lines.into_iter().map(Step::Line))
    }

    pub(crate) fn done(result: Value) -> Self {
        Self::lines([
            json!({"type": "progress", "stage": "working hard", "done": 1, "total": null}),
            json!({"type": "progress", "stage": "working hard", "done": 5, "total": 10}),
            json!({"type": "done", "result": result}),
        ])
    }

    pub(crate) fn steps(steps: impl IntoIterator<Item = Step>) -> Self {
        Self {
            status: 200,
            steps: steps.into_iter().collect(),
        }
    }
}

/// A request that came.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// Method, path and query.
    pub(crate) what: String,
    pub(crate) body: Vec<u8>,
    /// The whole body came.
    pub(crate) complete: bool,
}

impl Asked {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

type Log = Arc<Mutex<Vec<Asked>>>;

struct State {
    replies: HashMap<String, Reply>,
    log: Log,
    changed: watch::Sender<()>,
}

/// Answers by `METHOD /v1/path?query`; without a match by the path alone, then with 404 and no body. Requests for an
/// exec's stdin, size and signals are answered with `{}` unless canned.
pub(crate) struct Server {
    dir: tempfile::TempDir,
    log: Log,
    changed: watch::Receiver<()>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Server {
    pub(crate) fn new<'a>(replies: impl IntoIterator<Item = (&'a str, Reply)>) -> Self {
        let dir = tempfile::Builder::new().prefix("tp").tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let log = Log::default();
        let (tx, changed) = watch::channel(());
        let state = Arc::new(State {
            replies: replies
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v))
                .collect(),
            log: log.clone(),
            changed: tx,
        });
        let listener = {
            let _context = runtime.enter();
            UnixListener::bind(dir.path().join("host.sock")).unwrap()
        };
        runtime.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = state.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(state.clone(), request));
                    let connection = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service);
                    // Broken connections are part of the tests.
                    let _ = connection.await;
                });
            }
        });
        Self {
            dir,
            log,
            changed,
            runtime: Some(runtime),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("host.sock")
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn command(&self, line: &str) -> Command {
        tidepool(&self.socket(), line.split(' '))
    }

    /// Runs `tidepool LINE`, split at blanks.
    pub(crate) fn run(&self, line: &str) -> Run {
        self.command(line).output().unwrap().into()
    }

    /// All requests so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }

    /// The only request whose path ends so.
    pub(crate) fn asked_for(&self, end: &str) -> Asked {
        let mut found = self.asked();
        found.retain(|a| a.what.ends_with(end));
        assert_eq!(found.len(), 1, "{end}: {:?}", self.asked());
        found.remove(0)
    }

    /// Waits for a request whose path ends so and has these bytes in its body.
    pub(crate) fn wait_for(&self, end: &str, bytes: &[u8]) {
        let arrived = arrived(self.log.clone(), self.changed.clone(), end, bytes);
        let runtime = self.runtime.as_ref().unwrap();
        let result = runtime.block_on(async { tokio::time::timeout(PATIENCE, arrived).await });
        assert!(result.is_ok(), "{end} did not come: {:?}", self.asked());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn answer(
    state: Arc<State>,
    request: Request<Incoming>,
) -> Result<Response<UnsyncBoxBody<Bytes, io::Error>>, io::Error> {
    let path = request.uri().to_string();
    let what = format!("{} {path}", request.method());
    let index = {
        let mut log = state.log.lock().unwrap();
        log.push(Asked {
            what: what.clone(),
            body: Vec::new(),
            complete: false,
        });
        log.len() - 1
    };
    let mut body = request.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(io::Error::other)?;
        if let Some(data) = frame.data_ref() {
            state.log.lock().unwrap()[index]
                .body
                .extend_from_slice(data);
            state.changed.send_replace(());
        }
    }
    state.log.lock().unwrap()[index].complete = true;
    state.changed.send_replace(());

    let reply = state
        .replies
        .get(&what)
        .or_else(|| state.replies.get(&path))
        .cloned();
    let reply = reply.unwrap_or_else(|| match path.contains("/execs/") {
        true => Reply::json(json!({})),
        false => Reply {
            status: 404,
            steps: Vec::new(),
        },
    });
    let log = state.log.clone();
    let changed = state.changed.subscribe();
    let steps = futures::stream::unfold(reply.steps.into_iter(), move |mut steps| {
        let (log, changed) = (log.clone(), changed.clone());
        async move {
            loop {
                return match steps.next()? {
                    Step::Line(value) => {
                        Some((Ok(Frame::data(format!("{value}\n").into())), steps))
                    }
                    Step::Raw(bytes) => Some((Ok(Frame::data(bytes)), steps)),
                    Step::Until(end, bytes) => {
                        arrived(log.clone(), changed.clone(), end, &bytes).await;
                        continue;
                    }
                    Step::Cut => {
                        // What was said before must leave first: a cut does not wait for it.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        Some((Err(io::Error::other("cut")), steps))
                    }
                    Step::Hang => std::future::pending().await,
                };
            }
        }
    });
    Ok(Response::builder()
        .status(reply.status)
        .body(StreamBody::new(steps).boxed_unsync())
        .unwrap())
}

/// Waits until such a request is in the log; an empty `bytes` waits for its end.
async fn arrived(log: Log, mut changed: watch::Receiver<()>, end: &str, bytes: &[u8]) {
    let there = || {
        log.lock().unwrap().iter().any(|a| {
            let holds = match bytes.is_empty() {
                true => a.complete,
                false => a.body.windows(bytes.len()).any(|w| w == bytes),
            };
            a.what.ends_with(end) && holds
        })
    };
    while !there() {
        let mut next = pin!(changed.changed());
        if next.as_mut().await.is_err() {
            return;
        }
    }
}

/// A process that is killed should the test fail before its end.
pub(crate) struct Running(pub(crate) Option<Child>);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(Some(command.spawn().unwrap()))
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let child = self.0.as_ref().unwrap();
        let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    /// Reads one line of its stdout, so that it is known to have come this far.
    pub(crate) fn read_line(&mut self) {
        let stdout = self.0.as_mut().unwrap().stdout.as_mut().unwrap();
        let mut byte = [0u8];
        while byte != *b"\n" {
            stdout.read_exact(&mut byte).unwrap();
        }
    }

    /// Waits for its end while its stdin stays open.
    pub(crate) fn finish_with_open_stdin(mut self) -> Run {
        let stdin = self.0.as_mut().unwrap().stdin.take();
        let run = self.finish();
        drop(stdin);
        run
    }

    /// Waits for its end and takes its output.
    pub(crate) fn finish(mut self) -> Run {
        let child = self.0.take().unwrap();
        let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        std::thread::spawn(move || tx.send(child.wait_with_output()));
        match rx.recv_timeout(PATIENCE) {
            Ok(out) => out.unwrap().into(),
            Err(_) => {
                // Not yet waited for, so the id is still its own.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                panic!("it did not end: {:?}", rx.recv());
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
