//! How a command of `tidepool` fails: one sentence, what to do about it, and an exit code.
//!
//! Every failure ends in exactly one [`Failure`]; `main` prints it and leaves with its code. The codes are the
//! design's and are printed in the top-level help.

use serde::Serialize;
use tidepool_proto::api::ApiError;
use tidepool_proto::error::ErrorKind;

/// Some of what was asked for was done.
const PARTIAL: u8 = 3;
/// The user (or a signal) ended the client.
const CANCELLED: u8 = 130;

/// What kind of end this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// What the daemon says, or what the client found out in the same terms.
    Kind(ErrorKind),
    /// Several things were asked for and only some were done.
    Partial,
    /// Ctrl-C or a signal.
    Cancelled,
    /// Whoever reads stdout has gone: nothing is printed. The code to leave with is within.
    BrokenPipe(u8),
}

/// A failed command.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) cause: Cause,
    pub(crate) message: String,
    /// What the user can do, one sentence each.
    pub(crate) hints: Vec<String>,
    /// The idempotency key of an exec whose end is unknown.
    pub(crate) key: Option<String>,
    /// The request was sent and no answer came: it may or may not have been carried out.
    pub(crate) in_doubt: bool,
    /// The result that says so is already on stdout: no second JSON document follows.
    pub(crate) told: bool,
}

/// The JSON form, printed on stdout with `--json` so that there is one document in every case.
#[derive(Serialize)]
struct Document<'a> {
    error: Body<'a>,
}

#[derive(Serialize)]
struct Body<'a> {
    kind: String,
    message: &'a str,
    exit_code: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::of(Cause::Kind(kind), message)
    }

    /// A wrong request that the argument parser could not see.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    pub(crate) fn cancelled(message: impl Into<String>) -> Self {
        Self::of(Cause::Cancelled, message)
    }

    pub(crate) fn partial(message: impl Into<String>) -> Self {
        Self::of(Cause::Partial, message)
    }

    /// The reader of stdout has gone; leave quietly with `code`.
    pub(crate) fn broken_pipe(code: u8) -> Self {
        Self::of(Cause::BrokenPipe(code), "the reader of the output has gone")
    }

    fn of(cause: Cause, message: impl Into<String>) -> Self {
        Self {
            cause,
            message: message.into(),
            hints: Vec::new(),
            key: None,
            in_doubt: false,
            told: false,
        }
    }

    /// Adds something the user can do.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Marks that the request may have been carried out.
    pub(crate) fn doubtful(mut self) -> Self {
        self.in_doubt = true;
        self
    }

    /// Marks that stdout already has the command's document.
    pub(crate) fn told(mut self) -> Self {
        self.told = true;
        self
    }

    /// Names the exec this is about.
    pub(crate) fn with_key(mut self, key: &str) -> Self {
        self.key = Some(key.to_owned());
        self
    }

    /// The error kind, where it has one.
    pub(crate) fn kind(&self) -> Option<ErrorKind> {
        match self.cause {
            Cause::Kind(kind) => Some(kind),
            _ => None,
        }
    }

    /// What the process leaves with.
    pub(crate) fn exit_code(&self) -> u8 {
        match self.cause {
            Cause::Kind(kind) => kind.exit_code(),
            Cause::Partial => PARTIAL,
            Cause::Cancelled => CANCELLED,
            Cause::BrokenPipe(code) => code,
        }
    }

    /// Whether nothing is to be printed.
    pub(crate) fn is_quiet(&self) -> bool {
        matches!(self.cause, Cause::BrokenPipe(_))
    }

    /// One line of JSON.
    pub(crate) fn to_json(&self) -> String {
        let kind = match self.cause {
            Cause::Kind(kind) => kind_name(kind),
            Cause::Partial => "partial".to_owned(),
            Cause::Cancelled => "cancelled".to_owned(),
            Cause::BrokenPipe(_) => "broken_pipe".to_owned(),
        };
        let document = Document {
            error: Body {
                kind,
                message: &self.message,
                exit_code: self.exit_code(),
                key: self.key.as_deref(),
            },
        };
        serde_json::to_string(&document).unwrap_or_default()
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::new(error.kind, error.message)
    }
}

/// The name of a kind as the API spells it.
pub(crate) fn kind_name(kind: ErrorKind) -> String {
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(name)) => name,
        _ => "failed".to_owned(),
    }
}
