//! Why a call failed.

use tidepool_proto::ErrorKind;
use tidepool_proto::wire::WireError;

/// A failed call: its kind says what the caller can do, its text what happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct ClientError {
    kind: ErrorKind,
    text: String,
    /// The request was sent more than once: an earlier copy may have done what this one found done.
    resent: bool,
    /// What the request rests on may have been collected.
    upload_again: bool,
}

impl ClientError {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
            resent: false,
            upload_again: false,
        }
    }

    /// Whether what the request rests on may have been collected: pinning it, and uploading what is missing, makes it good again.
    pub fn upload_again(&self) -> bool {
        self.upload_again
    }

    pub(crate) fn with_upload_again(mut self, upload_again: bool) -> Self {
        self.upload_again = upload_again;
        self
    }

    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub(crate) fn sent(mut self, times: u32) -> Self {
        self.resent = times > 1;
        self
    }

    /// Whether this says that what was to be removed is not there, and an earlier copy of the request may have removed it.
    pub(crate) fn is_own_removal(&self) -> bool {
        self.resent && self.kind == ErrorKind::NotFound
    }

    pub(crate) fn unexpected() -> Self {
        Self::new(
            ErrorKind::Failed,
            "the store answered with something that was not asked for",
        )
    }
}

impl From<WireError> for ClientError {
    fn from(e: WireError) -> Self {
        let kind = match e {
            WireError::TooLong { .. } => ErrorKind::Invalid,
            _ => ErrorKind::Failed,
        };
        Self::new(kind, e.to_string())
    }
}
