//! What nodes send each other about their groups, and its bytes: a version, then a protobuf message.

use bytes::Bytes;
use prost::Message as _;
use raft::eraftpb::{Message, MessageType};
use raft_prost::Message as _;

const VERSION: u8 = 1;
/// The most bytes of an envelope that are accepted.
pub const MAX_ENVELOPE: usize = 32 << 20;

/// A message about one group.
#[derive(Debug, Clone, PartialEq)]
pub struct Envelope {
    pub group: u32,
    pub body: Body,
}

/// The kinds of messages.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// Raft's own.
    Raft(Box<Message>),
    /// A member that hears from no leader asks whether it still is one. `last` is the last index of its log.
    Member { last: u64 },
    /// A leader's answer: its members at `index`, which is above the asker's log, do not include the asker.
    NotMember { index: u64 },
    /// The sender has no room to write: it must not be made the leader of any group for now.
    NoRoom,
}

/// Bytes that are no envelope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an envelope of a raft group: {0}")]
pub struct EnvelopeError(pub String);

#[derive(Clone, PartialEq, prost::Message)]
struct Wire {
    #[prost(uint32, tag = "1")]
    group: u32,
    #[prost(oneof = "WireBody", tags = "2, 3, 4, 5")]
    body: Option<WireBody>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum WireBody {
    #[prost(bytes = "bytes", tag = "2")]
    Raft(Bytes),
    #[prost(uint64, tag = "3")]
    Member(u64),
    #[prost(uint64, tag = "4")]
    NotMember(u64),
    #[prost(bool, tag = "5")]
    NoRoom(bool),
}

impl Envelope {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let body = match &self.body {
            Body::Raft(message) => WireBody::Raft(message.encode_to_vec().into()),
            Body::Member { last } => WireBody::Member(*last),
            Body::NotMember { index } => WireBody::NotMember(*index),
            Body::NoRoom => WireBody::NoRoom(true),
        };
        let wire = Wire {
            group: self.group,
            body: Some(body),
        };
        let mut out = Vec::with_capacity(1 + wire.encoded_len());
        out.push(VERSION);
        // A Vec takes any length.
        let _ = wire.encode(&mut out);
        out
    }

    /// Reads one. Raft messages that only a node may give itself are refused.
    pub fn decode(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let bad = |what: &str| EnvelopeError(what.to_owned());
        if bytes.len() > MAX_ENVELOPE {
            return Err(EnvelopeError(format!(
                "{} bytes are over the bound of {MAX_ENVELOPE}",
                bytes.len()
            )));
        }
        let (version, rest) = bytes.split_first().ok_or_else(|| bad("it is empty"))?;
        if *version != VERSION {
            return Err(EnvelopeError(format!("version {version} is not known")));
        }
        let wire = Wire::decode(rest).map_err(|e| EnvelopeError(e.to_string()))?;
        let body = match wire.body.ok_or_else(|| bad("it has no content"))? {
            WireBody::Raft(bytes) => {
                let message = Message::decode(&*bytes).map_err(|e| EnvelopeError(e.to_string()))?;
                if MessageType::from_i32(message.msg_type).is_none_or(raft::raw_node::is_local_msg)
                {
                    return Err(bad("a message of this kind is never sent"));
                }
                Body::Raft(Box::new(message))
            }
            WireBody::Member(last) => Body::Member { last },
            WireBody::NotMember(index) => Body::NotMember { index },
            WireBody::NoRoom(_) => Body::NoRoom,
        };
        Ok(Self {
            group: wire.group,
            body,
        })
    }

    /// About how many bytes it takes, for bounds on queues.
    pub fn weight(&self) -> usize {
        match &self.body {
            Body::Raft(m) => {
                64 + m.context.len()
                    + m.entries
                        .iter()
                        .map(|e| e.data.len() + e.context.len() + 32)
                        .sum::<usize>()
            }
            Body::Member { .. } | Body::NotMember { .. } | Body::NoRoom => 16,
        }
    }
}
