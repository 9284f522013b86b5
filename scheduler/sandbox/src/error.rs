//! What can go wrong with a sandbox, in words an operator can act on.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why an operation on a sandbox failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// A name, path or setting is not acceptable.
    #[error("{0}")]
    Invalid(String),
    /// A sandbox of this name exists on this host.
    #[error("a sandbox named {0} exists already")]
    Exists(String),
    /// No sandbox of this name exists on this host.
    #[error("no sandbox named {0} on this host")]
    NotFound(String),
    /// The sandbox is there but does not run.
    #[error("sandbox {0} is not running")]
    NotRunning(String),
    /// The OCI runtime cannot be used.
    #[error("the OCI runtime {path} cannot be used: {reason}")]
    MissingRuntime {
        /// Where it was looked for.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// CRIU cannot be used; only checkpoints and restores of processes need it.
    #[error("processes cannot be checkpointed or restored: CRIU at {path}: {reason}")]
    MissingCriu {
        /// Where it was looked for.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A checkpoint was made with an init program that this host does not have.
    #[error("this host does not have the init program {0} that the sandbox was started with")]
    MissingInit(String),
    /// Processes could not be checkpointed. The sandbox goes on.
    #[error("the processes cannot be checkpointed: {reason}")]
    Dump {
        /// CRIU's reason in words.
        reason: String,
        /// The end of CRIU's log.
        log: String,
    },
    /// Processes could not be restored.
    #[error("the processes cannot be restored: {reason}")]
    Restore {
        /// CRIU's reason in words.
        reason: String,
        /// The end of CRIU's log.
        log: String,
    },
    /// A program failed.
    #[error("{what} failed ({status}): {stderr}")]
    Command {
        /// The program and what it was to do.
        what: String,
        /// How it ended.
        status: String,
        /// The end of what it had to say.
        stderr: String,
    },
    /// A program did not end in time and was killed.
    #[error("{what} did not end within {} s and was killed", .after.as_secs())]
    TimedOut {
        /// The program and what it was to do.
        what: String,
        /// How long it had.
        after: Duration,
    },
    /// The sandbox did not freeze in time.
    #[error("sandbox {0} could not be frozen")]
    Freeze(String),
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// Init could not be reached or is not what it should be.
    #[error("the sandbox's init: {0}")]
    Init(String),
    /// Init refused a request.
    #[error("{text}")]
    Refused {
        /// Why, for programs.
        kind: tidepool_init::message::ErrorKind,
        /// Why, for people.
        text: String,
    },
}

/// The result of an operation on a sandbox.
pub type Result<T, E = SandboxError> = std::result::Result<T, E>;

/// Adds what was tried to an error of the operating system.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| SandboxError::Io {
            what: what(),
            source: e.into(),
        })
    }
}

/// Runs blocking work on a thread made for that.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(SandboxError::Io {
            what: "a background task".into(),
            source: io::Error::other(e),
        }),
    }
}
