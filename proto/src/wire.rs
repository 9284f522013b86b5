//! Messages between store nodes and their clients: QUIC with mutual TLS, one bidirectional stream a request.
//!
//! A frame is the length of a message (u32, little-endian) and the message, in protobuf encoding; the client sends one
//! [`Request`] and ends its side, the node answers with one [`Response`]. A stream's own order and end do the rest: no
//! request numbers, no head-of-line blocking between requests.
//!
//! Requests carry no repeated messages: lists of names are concatenated, bodies stand in one piece beside their lengths.
//! So a frame never costs much more memory decoded than on the wire, whatever it holds.
//!
//! Every request may be sent again: its effect is that of sending it once.

mod frames;
pub mod request;
pub mod response;

pub use frames::{
    array, decode, frame, frame_bodies, frame_len, join_bodies, join_names, split_bodies,
    split_names,
};

use prost::Message;

use crate::error::ErrorKind;

/// The protocol and its version, negotiated by ALPN.
pub const ALPN: &[u8] = b"tidepool/1";
/// The protocol between store nodes and its version.
pub const PEER_ALPN: &[u8] = b"tidepool-peer/1";
/// The name in every store node's certificate.
pub const SERVER_NAME: &str = "tidepool-store";
/// The most bytes of one message.
pub const MAX_FRAME: usize = (16 << 20) + (64 << 10);
/// The most body bytes a client puts into one request.
pub const MAX_PUT_BYTES: usize = 8 << 20;
/// The most bodies in one request.
pub const MAX_PUT_BODIES: usize = 4096;
/// The most names in one request.
pub const MAX_NAMES: usize = 8192;
/// Body or record bytes after which a node ends an answer early; the client asks for the rest.
pub const ANSWER_BYTES: usize = 4 << 20;
/// The longest sandbox or image name, in bytes.
pub const MAX_RECORD_NAME: usize = 256;
/// The most bytes of a sandbox's metadata or of an image's record.
pub const MAX_RECORD: usize = 256 << 10;
/// The longest a session lives without being renewed, in milliseconds.
pub const MAX_SESSION_TTL_MS: u64 = 24 * 3600 * 1000;

/// Instead of a number of links: the chunk is not there.
pub const ABSENT: u32 = u32::MAX;

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than [`MAX_FRAME`].
    #[error("a frame of {len} bytes is over the bound of {MAX_FRAME}")]
    TooLong { len: u64 },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// Not a message of this protocol.
    #[error("not a message of this protocol: {0}")]
    Message(String),
    /// A field is not what it should be.
    #[error("{0}")]
    Field(&'static str),
}

/// What a client asks of a store node.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    #[prost(
        oneof = "request::Op",
        tags = "1, 40, 41, 42, 43, 44, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 50, 51"
    )]
    pub op: Option<request::Op>,
}

/// What a store node answers.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    #[prost(
        oneof = "response::Op",
        tags = "1, 40, 41, 42, 43, 44, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 50"
    )]
    pub op: Option<response::Op>,
}

impl From<request::Op> for Request {
    fn from(op: request::Op) -> Self {
        Self { op: Some(op) }
    }
}

impl From<response::Op> for Response {
    fn from(op: response::Op) -> Self {
        Self { op: Some(op) }
    }
}

const KINDS: [ErrorKind; 8] = [
    ErrorKind::Failed,
    ErrorKind::Invalid,
    ErrorKind::NotFound,
    ErrorKind::Conflict,
    ErrorKind::Fenced,
    ErrorKind::Unavailable,
    ErrorKind::Corruption,
    ErrorKind::Denied,
];

/// An error kind's number on the wire.
pub fn kind_code(kind: ErrorKind) -> u32 {
    KINDS.iter().position(|k| *k == kind).unwrap_or(0) as u32
}

/// The kind of a number; a number of a newer peer is `Failed`.
pub fn kind_of(code: u32) -> ErrorKind {
    KINDS
        .get(code as usize)
        .copied()
        .unwrap_or(ErrorKind::Failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_keep_their_numbers() {
        for kind in KINDS {
            assert_eq!(kind_of(kind_code(kind)), kind);
        }
        assert_eq!(kind_of(99), ErrorKind::Failed);
    }
}
