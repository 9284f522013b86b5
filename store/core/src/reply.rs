//! Replies as bytes, for a node that proposes to another one's group.

use tidepool_proto::codec::{Reader, Writer};
use tidepool_proto::{Epoch, SandboxId};

use crate::apply::Reply;
use crate::kv::ReadError;

const VERSION: u8 = 1;
const MAX_TEXT: usize = tidepool_proto::wire::MAX_RECORD_NAME;

impl Reply {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        match self {
            Reply::Done => w.u8(0),
            Reply::Missing(list) => {
                w.u8(1);
                w.varint(list.len() as u64);
                for i in list {
                    w.varint(u64::from(*i));
                }
            }
            Reply::Added { chunks, bytes } => {
                w.u8(2);
                w.varint(*chunks);
                w.varint(*bytes);
            }
            Reply::Epoch(epoch) => {
                w.u8(3);
                w.varint(epoch.0);
            }
            Reply::Exists(exists) => {
                w.u8(4);
                w.u8(u8::from(*exists));
            }
            Reply::TakenBy(id) => {
                w.u8(5);
                w.raw(&id.0);
            }
            Reply::Removed { name } => {
                w.u8(6);
                w.bytes(name.as_bytes());
            }
            Reply::Node(id) => {
                w.u8(7);
                w.varint(*id);
            }
        }
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("reply", bytes, VERSION)?;
        let bad = |what: &str| ReadError(format!("not a reply: {what}"));
        let reply = match r.u8()? {
            0 => Reply::Done,
            1 => {
                let n = r.varint()?;
                if n > tidepool_proto::wire::MAX_NAMES as u64 {
                    return Err(bad("too many names"));
                }
                let mut list = Vec::with_capacity(n as usize);
                for _ in 0..n {
                    list.push(u32::try_from(r.varint()?).map_err(|_| bad("a position"))?);
                }
                Reply::Missing(list)
            }
            2 => Reply::Added {
                chunks: r.varint()?,
                bytes: r.varint()?,
            },
            3 => Reply::Epoch(Epoch(r.varint()?)),
            4 => Reply::Exists(r.u8()? != 0),
            5 => Reply::TakenBy(SandboxId(r.array()?)),
            6 => Reply::Removed {
                name: r.text(MAX_TEXT)?,
            },
            7 => Reply::Node(r.varint()?),
            _ => return Err(bad("an unknown kind")),
        };
        r.finish()?;
        Ok(reply)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_read_back() {
        for reply in [
            Reply::Done,
            Reply::Missing(vec![0, 7, 300]),
            Reply::Added {
                chunks: 3,
                bytes: 1 << 40,
            },
            Reply::Epoch(Epoch(9)),
            Reply::Exists(true),
            Reply::TakenBy(SandboxId([3; 16])),
            Reply::Removed { name: "x".into() },
            Reply::Node(12),
        ] {
            let bytes = reply.encode();
            assert_eq!(Reply::decode(&bytes).unwrap(), reply);
            for cut in 0..bytes.len() {
                assert!(Reply::decode(&bytes[..cut]).is_err());
            }
        }
    }
}
