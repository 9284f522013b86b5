//! The host's end of the protocol with a sandbox's init.
//!
//! Every job has its own connection, so a client that reads slowly slows only its own job, and signals or questions never
//! wait behind output. [`InitClient`] therefore keeps no connection: it knows how to make one.

use crate::error::{Context, Result, SandboxError, blocking};
use crate::netns;
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidepool_init::auth::{
    AuthError, CLIENT_PROOF, Handshake, Key, SERVER_HELLO, SERVER_PROOF, Seal,
};
use tidepool_init::message::{Event, ExitStatus, JobInfo, Request, SignalScope, SpawnRequest};
use tidepool_init::{MAX_DATA, PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, mpsc};

/// How long one connection attempt and its handshake may take.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long init may take to answer a question.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// Events a job's reader may be ahead of whoever takes them.
const EVENTS_AHEAD: usize = 16;

/// What a connection ends with before it is proved.
const CLOSED: &str = "it closed the connection at the handshake";

/// Where a sandbox's init is and what proves the host to it.
struct Address {
    netns: PathBuf,
    key: Key,
}

/// Commands the init of one sandbox. Cheap to clone.
#[derive(Clone)]
pub struct InitClient(Arc<Address>);

/// What to run; see [`tidepool_init::message::SpawnRequest`].
pub type JobRequest = SpawnRequest;

/// What a job does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEvent {
    /// Output, with its offset from the start of the stream in bytes.
    Stdout {
        /// Where it starts.
        offset: u64,
        /// What it is.
        data: Bytes,
    },
    /// Error output.
    Stderr {
        /// Where it starts.
        offset: u64,
        /// What it is.
        data: Bytes,
    },
    /// Output that nobody took in time and that is gone.
    Lost {
        /// Whether it was error output.
        stderr: bool,
        /// Where the gap starts.
        from: u64,
        /// Where output goes on.
        to: u64,
    },
    /// The job ended; nothing follows.
    Exited {
        /// How.
        status: ExitStatus,
        /// Whether it ran out of time.
        timed_out: bool,
        /// The length of its output in bytes.
        stdout_len: u64,
        /// The length of its error output in bytes.
        stderr_len: u64,
    },
    /// Init refused something that was asked of the job. The job goes on.
    Refused(String),
    /// The connection ended while the job did not; attach again. Nothing follows.
    Disconnected(String),
}

/// A job this client is attached to.
pub struct Job {
    /// Its process id inside the sandbox.
    pub pid: u32,
    /// False if a job of this id was there before.
    pub new: bool,
    /// Bytes of input that init has; go on from here.
    pub stdin_received: u64,
    /// What it does, in order. Dropping this detaches; the job goes on.
    pub events: mpsc::Receiver<JobEvent>,
    /// Commands to it.
    pub control: JobControl,
}

/// Commands to one job. Cheap to clone.
#[derive(Clone)]
pub struct JobControl {
    job: Arc<str>,
    client: InitClient,
    writer: Arc<Mutex<Writer>>,
}

struct Writer {
    to: OwnedWriteHalf,
    seal: Seal,
    stdin_at: u64,
}

fn init_error(e: impl ToString) -> SandboxError {
    SandboxError::Init(e.to_string())
}

struct Connection {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    send: Seal,
    receive: Seal,
}

impl Connection {
    async fn ask(&mut self, request: &Request) -> Result<()> {
        send(&mut self.to, &mut self.send, request).await
    }

    async fn answer(&mut self) -> Result<Event> {
        match receive(&mut self.from, &mut self.receive).await? {
            Event::Error { kind, text } => Err(SandboxError::Refused { kind, text }),
            event => Ok(event),
        }
    }
}

async fn send(to: &mut OwnedWriteHalf, seal: &mut Seal, request: &Request) -> Result<()> {
    let mut frame = Vec::new();
    seal.seal(&request.encode(), &mut frame)
        .map_err(|e| match e {
            AuthError::TooLong => SandboxError::Invalid("the request is too long".into()),
            e => init_error(e),
        })?;
    to.write_all(&frame).await.map_err(init_error)
}

async fn receive(from: &mut OwnedReadHalf, seal: &mut Seal) -> Result<Event> {
    let mut header = [0; 4];
    from.read_exact(&mut header).await.map_err(init_error)?;
    let mut body = vec![0; Seal::body_len(Seal::payload_len(header).map_err(init_error)?)];
    from.read_exact(&mut body).await.map_err(init_error)?;
    let payload = seal.open(&body).map_err(init_error)?;
    Event::decode(payload).map_err(init_error)
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(SandboxError::TimedOut {
            what: "an answer of the sandbox's init".into(),
            after: limit,
        }),
    }
}

impl InitClient {
    pub(crate) fn new(netns: PathBuf, key: Key) -> Self {
        Self(Arc::new(Address { netns, key }))
    }

    /// Makes a connection. Init closes one that has not proved itself when too many are in that state, be it by chance or
    /// because something inside floods the port; so one closed at that point is tried again.
    async fn open(&self) -> Result<Connection> {
        for _ in 0..4 {
            match self.open_once().await {
                Err(SandboxError::Init(why)) if why == CLOSED => {
                    tokio::time::sleep(Duration::from_millis(rand::random_range(5..50))).await;
                }
                other => return other,
            }
        }
        Err(init_error(AuthError::Forged))
    }

    async fn open_once(&self) -> Result<Connection> {
        let netns = self.0.netns.clone();
        let stream = blocking(move || netns::connect(&netns, PORT, CONNECT_TIME)).await?;
        let stream = TcpStream::from_std(stream).context(|| "a connection to init".into())?;
        let (mut from, mut to) = stream.into_split();
        within(CONNECT_TIME, async {
            let mut hello = [0; SERVER_HELLO];
            from.read_exact(&mut hello)
                .await
                .map_err(|_| init_error(CLOSED))?;
            let (handshake, proof): (_, [u8; CLIENT_PROOF]) =
                Handshake::client(&self.0.key, &hello, rand::random()).map_err(init_error)?;
            to.write_all(&proof).await.map_err(|_| init_error(CLOSED))?;
            let mut answer = [0; SERVER_PROOF];
            // A server that does not accept the proof just closes.
            from.read_exact(&mut answer)
                .await
                .map_err(|_| init_error(CLOSED))?;
            handshake
                .check_server(&self.0.key, &answer)
                .map_err(init_error)?;
            let (send, receive) = handshake.seals(&self.0.key);
            Ok(Connection {
                from,
                to,
                send,
                receive,
            })
        })
        .await
    }

    async fn ask(&self, request: Request) -> Result<Event> {
        let mut connection = self.open().await?;
        within(ANSWER_TIME, async {
            connection.ask(&request).await?;
            connection.answer().await
        })
        .await
    }

    /// Asks for init's version.
    pub async fn ping(&self) -> Result<String> {
        match self.ask(Request::Ping).await? {
            Event::Pong { version } => Ok(version),
            other => Err(init_error(format!("an unexpected answer: {other:?}"))),
        }
    }

    /// Starts a job, or attaches to the one that has its id and sends its output from the start.
    pub async fn spawn(&self, request: JobRequest) -> Result<Job> {
        let job = request.job.clone();
        self.attached(job, Request::Spawn(request)).await
    }

    /// Attaches to a job and sends its output from these offsets on.
    pub async fn attach(&self, job: &str, stdout_from: u64, stderr_from: u64) -> Result<Job> {
        let request = Request::Attach {
            job: job.to_owned(),
            stdout_from,
            stderr_from,
        };
        self.attached(job.to_owned(), request).await
    }

    async fn attached(&self, job: String, request: Request) -> Result<Job> {
        let mut connection = self.open().await?;
        let answer = within(ANSWER_TIME, async {
            connection.ask(&request).await?;
            connection.answer().await
        });
        let Event::Started {
            pid,
            new,
            stdin_received,
        } = answer.await?
        else {
            return Err(init_error("an unexpected answer to a spawn"));
        };
        let Connection {
            from,
            to,
            send,
            receive,
        } = connection;
        let (sender, events) = mpsc::channel(EVENTS_AHEAD);
        let writer = Arc::new(Mutex::new(Writer {
            to,
            seal: send,
            stdin_at: stdin_received,
        }));
        tokio::spawn(read_events(from, receive, sender, Arc::clone(&writer)));
        let control = JobControl {
            job: job.into(),
            client: self.clone(),
            writer,
        };
        Ok(Job {
            pid,
            new,
            stdin_received,
            events,
            control,
        })
    }

    /// The jobs init keeps.
    pub async fn list(&self) -> Result<Vec<JobInfo>> {
        match self.ask(Request::List).await? {
            Event::Jobs(jobs) => Ok(jobs),
            other => Err(init_error(format!("an unexpected answer: {other:?}"))),
        }
    }

    /// Drops what init keeps of an ended job; one it does not know is no error.
    pub async fn forget(&self, job: &str) -> Result<()> {
        self.ask(Request::Forget {
            job: job.to_owned(),
        })
        .await
        .map(drop)
    }

    /// Sends a signal to a running job.
    pub async fn signal(&self, job: &str, signal: i32, scope: SignalScope) -> Result<()> {
        self.ask(Request::Signal {
            job: job.to_owned(),
            signal,
            scope,
        })
        .await
        .map(drop)
    }
}

async fn read_events(
    mut from: OwnedReadHalf,
    mut seal: Seal,
    events: mpsc::Sender<JobEvent>,
    writer: Arc<Mutex<Writer>>,
) {
    loop {
        let received = tokio::select! {
            received = receive(&mut from, &mut seal) => received,
            () = events.closed() => {
                // Init holds output back for who is attached: tell it that nobody is.
                let _ = writer.lock().await.to.shutdown().await;
                return;
            }
        };
        let event = match received {
            Ok(Event::Stdout { offset, data }) => JobEvent::Stdout {
                offset,
                data: data.into(),
            },
            Ok(Event::Stderr { offset, data }) => JobEvent::Stderr {
                offset,
                data: data.into(),
            },
            Ok(Event::Lost { stderr, from, to }) => JobEvent::Lost { stderr, from, to },
            Ok(Event::Exited {
                status,
                timed_out,
                stdout_len,
                stderr_len,
            }) => JobEvent::Exited {
                status,
                timed_out,
                stdout_len,
                stderr_len,
            },
            Ok(Event::Error { text, .. }) => JobEvent::Refused(text),
            Ok(_) => continue,
            Err(e) => JobEvent::Disconnected(e.to_string()),
        };
        let last = matches!(event, JobEvent::Exited { .. } | JobEvent::Disconnected(_));
        if events.send(event).await.is_err() || last {
            return;
        }
    }
}

impl JobControl {
    /// Sends input. Waits while the job does not take what it has.
    pub async fn stdin(&self, data: &[u8]) -> Result<()> {
        let mut writer = self.writer.lock().await;
        for piece in data.chunks(MAX_DATA) {
            let Writer { to, seal, stdin_at } = &mut *writer;
            send(
                to,
                seal,
                &Request::Stdin {
                    offset: *stdin_at,
                    data: piece.to_vec(),
                },
            )
            .await?;
            *stdin_at += piece.len() as u64;
        }
        Ok(())
    }

    async fn tell(&self, request: Request) -> Result<()> {
        let mut writer = self.writer.lock().await;
        let Writer { to, seal, .. } = &mut *writer;
        send(to, seal, &request).await
    }

    /// Ends the input; on a terminal, types the end-of-file character.
    pub async fn close_stdin(&self) -> Result<()> {
        self.tell(Request::StdinClose).await
    }

    /// Changes the size of the job's terminal.
    pub async fn resize(&self, cols: u16, rows: u16) -> Result<()> {
        self.tell(Request::Resize { cols, rows }).await
    }

    /// Sends a signal, past all input that waits.
    pub async fn signal(&self, signal: i32, scope: SignalScope) -> Result<()> {
        self.client.signal(&self.job, signal, scope).await
    }
}

/// What a job left behind, for callers who want it whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Whether it ran out of time.
    pub timed_out: bool,
    /// The start of its output, up to the limit asked for.
    pub stdout: Vec<u8>,
    /// The start of its error output.
    pub stderr: Vec<u8>,
    /// Whether output is missing, because of the limit or because nobody took it in time.
    pub truncated: bool,
}

impl Job {
    /// Waits for the end and collects up to `limit` bytes of each stream.
    pub async fn wait(mut self, limit: usize) -> Result<Finished> {
        let (mut stdout, mut stderr, mut truncated) = (Vec::new(), Vec::new(), false);
        while let Some(event) = self.events.recv().await {
            let (kept, data) = match event {
                JobEvent::Stdout { data, .. } => (&mut stdout, data),
                JobEvent::Stderr { data, .. } => (&mut stderr, data),
                JobEvent::Lost { .. } => {
                    truncated = true;
                    continue;
                }
                JobEvent::Refused(text) => return Err(init_error(text)),
                JobEvent::Exited {
                    status, timed_out, ..
                } => {
                    return Ok(Finished {
                        status,
                        timed_out,
                        stdout,
                        stderr,
                        truncated,
                    });
                }
                JobEvent::Disconnected(why) => return Err(init_error(why)),
            };
            let room = limit.saturating_sub(kept.len()).min(data.len());
            kept.extend_from_slice(&data[..room]);
            truncated |= room < data.len();
        }
        Err(init_error("the connection ended"))
    }
}
