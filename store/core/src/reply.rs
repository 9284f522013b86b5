//! Replies as bytes, for a node that proposes to another one's group.

use tidepool_proto::codec::{Reader, Writer};
use tidepool_proto::{ChunkName, Epoch, SandboxId};

use crate::apply::Reply;
use crate::kv::ReadError;

const VERSION: u8 = 1;
const MAX_TEXT: usize = tidepool_proto::wire::MAX_RECORD_NAME;

impl Reply {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        match self {
            Reply::Done => w.u8(0),
            Reply::Missing { names, round } => {
                w.u8(1);
                w.varint(*round);
                w.varint(names.len() as u64);
                for i in names {
                    w.varint(u64::from(*i));
                }
            }
            Reply::Added {
                chunks,
                bytes,
                round,
            } => {
                w.u8(2);
                w.varint(*chunks);
                w.varint(*bytes);
                w.varint(*round);
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
            Reply::Gc { round, fence } => {
                w.u8(8);
                w.varint(*round);
                w.varint(*fence);
            }
            Reply::Swept { names, bytes } => {
                w.u8(9);
                w.varint(*bytes);
                w.varint(names.len() as u64);
                for name in names {
                    w.raw(&name.0);
                }
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
                let round = r.varint()?;
                let n = r.varint()?;
                if n > tidepool_proto::wire::MAX_NAMES as u64 {
                    return Err(bad("too many names"));
                }
                let mut list = Vec::with_capacity(n as usize);
                for _ in 0..n {
                    list.push(u32::try_from(r.varint()?).map_err(|_| bad("a position"))?);
                }
                Reply::Missing { names: list, round }
            }
            2 => Reply::Added {
                chunks: r.varint()?,
                bytes: r.varint()?,
                round: r.varint()?,
            },
            3 => Reply::Epoch(Epoch(r.varint()?)),
            4 => Reply::Exists(r.u8()? != 0),
            5 => Reply::TakenBy(SandboxId(r.array()?)),
            6 => Reply::Removed {
                name: r.text(MAX_TEXT)?,
            },
            7 => Reply::Node(r.varint()?),
            8 => Reply::Gc {
                round: r.varint()?,
                fence: r.varint()?,
            },
            9 => {
                let bytes = r.varint()?;
                let n = r.count(tidepool_proto::wire::MAX_NAMES, ChunkName::LEN)?;
                let names = (0..n).map(|_| r.chunk_name()).collect::<Result<_, _>>()?;
                Reply::Swept { names, bytes }
            }
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
            Reply::Missing {
                names: vec![0, 7, 300],
                round: 4,
            },
            Reply::Added {
                chunks: 3,
                bytes: 1 << 40,
                round: 5,
            },
            Reply::Gc { round: 7, fence: 6 },
            Reply::Swept {
                names: vec![ChunkName([1; 32]), ChunkName([2; 32])],
                bytes: 9,
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
