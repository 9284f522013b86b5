//! The daemon's error: a kind for whoever asked, a sentence for whoever reads, and the source where there is one.

use std::fmt::Display;

use tidepool_proto::ErrorKind;
use tidepool_proto::api::ApiError;

/// A failed operation of the daemon.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct HostError {
    pub kind: ErrorKind,
    pub message: String,
}

/// The daemon's result.
pub type Result<T, E = HostError> = std::result::Result<T, E>;

impl HostError {
    /// An error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Conflict, message)
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    /// The same error with what was being done before it.
    pub fn context(self, doing: impl Display) -> Self {
        Self::new(self.kind, format!("{doing}: {}", self.message))
    }

    /// As the API answers it.
    pub fn to_api(&self) -> ApiError {
        ApiError {
            kind: self.kind,
            message: self.message.clone(),
        }
    }
}

/// An error and all its sources, in one line.
pub fn chain(e: &(dyn std::error::Error + 'static)) -> String {
    let mut text = e.to_string();
    let mut at = e.source();
    while let Some(source) = at {
        let more = source.to_string();
        // Many errors already print their source.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        at = source.source();
    }
    text
}

/// Says what was being done when something failed.
pub trait Context<T> {
    /// Wraps the error with `doing`.
    fn context(self, doing: impl Display) -> Result<T>;
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, doing: impl Display) -> Result<T> {
        self.map_err(|e| {
            let kind = match e.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    ErrorKind::Unavailable
                }
                _ => ErrorKind::Failed,
            };
            HostError::new(kind, format!("{doing}: {e}"))
        })
    }
}

impl<T> Context<T> for Result<T, rustix::io::Errno> {
    fn context(self, doing: impl Display) -> Result<T> {
        self.map_err(std::io::Error::from).context(doing)
    }
}

impl<T> Context<T> for Result<T, HostError> {
    fn context(self, doing: impl Display) -> Result<T> {
        self.map_err(|e| e.context(doing))
    }
}

impl From<tidepool_proto::FormatError> for HostError {
    fn from(e: tidepool_proto::FormatError) -> Self {
        Self::new(ErrorKind::Corruption, e.to_string())
    }
}

impl From<tokio::task::JoinError> for HostError {
    fn from(e: tokio::task::JoinError) -> Self {
        Self::failed(format!("a task of the daemon failed: {e}"))
    }
}
