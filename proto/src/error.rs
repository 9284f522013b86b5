//! The kinds of error that cross a process boundary. Each names what the other side can do about it; the text beside
//! it says what happened.

use serde::{Deserialize, Serialize};

/// What a failed request means to its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request is wrong and will be wrong again.
    Invalid,
    /// What it names does not exist.
    NotFound,
    /// It clashes with what exists (a name taken, a turn already recorded otherwise).
    Conflict,
    /// The caller's epoch is no longer the sandbox's: another holder took over.
    Fenced,
    /// Not now: no leader, no room, starting, stopping. Trying again later may work.
    Unavailable,
    /// Stored bytes are not what they should be.
    Corruption,
    /// The caller may not do this.
    Denied,
    /// Everything else: the text says what happened.
    Failed,
}

impl ErrorKind {
    /// The exit code of `tidepool` for this kind.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorKind::Invalid => 2,
            ErrorKind::NotFound => 10,
            ErrorKind::Conflict | ErrorKind::Fenced => 11,
            ErrorKind::Unavailable => 12,
            ErrorKind::Corruption => 13,
            ErrorKind::Denied | ErrorKind::Failed => 1,
        }
    }

    /// The HTTP status the host's API answers with for this kind.
    pub fn http_status(self) -> u16 {
        match self {
            ErrorKind::Invalid => 400,
            ErrorKind::Denied => 403,
            ErrorKind::NotFound => 404,
            ErrorKind::Conflict | ErrorKind::Fenced => 409,
            ErrorKind::Unavailable => 503,
            ErrorKind::Corruption | ErrorKind::Failed => 500,
        }
    }
}
