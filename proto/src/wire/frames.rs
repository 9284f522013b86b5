//! Messages as frames, and lists of names and bodies as the bytes that stand for them.

use bytes::{Bytes, BytesMut};
use prost::Message;

use super::{MAX_FRAME, MAX_NAMES, WireError};
use crate::ids::ChunkName;

/// The frame of a message.
pub fn frame(message: &impl Message) -> Result<Bytes, WireError> {
    let len = message.encoded_len();
    if len > MAX_FRAME {
        return Err(WireError::TooLong { len: len as u64 });
    }
    let mut buf = BytesMut::with_capacity(4 + len);
    buf.extend_from_slice(&(len as u32).to_le_bytes());
    message
        .encode(&mut buf)
        .map_err(|e| WireError::Message(e.to_string()))?;
    Ok(buf.freeze())
}

/// The frame of an answer with these bodies ([`response::Bodies`]) in pieces: what [`frame`] gives, without a copy of any body.
pub fn frame_bodies(bodies: Vec<Bytes>) -> Result<Vec<Bytes>, WireError> {
    use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
    /// Of [`response::Op::Bodies`], [`response::Bodies::lens`] and [`response::Bodies::bodies`].
    const TAGS: [u32; 3] = [6, 1, 2];
    let total: u64 = bodies.iter().map(|b| b.len() as u64).sum();
    let mut lens = BytesMut::with_capacity(bodies.len() * 4);
    for body in &bodies {
        lens.extend_from_slice(&(body.len() as u32).to_le_bytes());
    }
    // The tags are below 16: a byte each. A field that is empty is left out.
    let field = |len: u64| match len {
        0 => 0,
        len => 1 + encoded_len_varint(len) as u64 + len,
    };
    let inner = field(lens.len() as u64) + field(total);
    let outer = 1 + encoded_len_varint(inner) as u64 + inner;
    if outer > MAX_FRAME as u64 {
        return Err(WireError::TooLong { len: outer });
    }
    let mut head = BytesMut::with_capacity(32 + lens.len());
    head.extend_from_slice(&(outer as u32).to_le_bytes());
    let mut open = |tag: u32, len: u64, bytes: &[u8]| {
        encode_key(tag, WireType::LengthDelimited, &mut head);
        encode_varint(len, &mut head);
        head.extend_from_slice(bytes);
    };
    open(TAGS[0], inner, &[]);
    if !lens.is_empty() {
        open(TAGS[1], lens.len() as u64, &lens);
    }
    if total > 0 {
        open(TAGS[2], total, &[]);
    }
    let mut pieces = Vec::with_capacity(1 + bodies.len());
    pieces.push(head.freeze());
    pieces.extend(bodies);
    Ok(pieces)
}

/// The length that a frame opens with, checked.
pub fn frame_len(head: [u8; 4]) -> Result<usize, WireError> {
    let len = u32::from_le_bytes(head) as usize;
    if len > MAX_FRAME {
        return Err(WireError::TooLong { len: len as u64 });
    }
    Ok(len)
}

/// The message in a frame's bytes, without its length.
pub fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, WireError> {
    M::decode(bytes).map_err(|e| WireError::Message(e.to_string()))
}

/// Fixed-length bytes of a field.
pub fn array<const N: usize>(bytes: &[u8], what: &'static str) -> Result<[u8; N], WireError> {
    bytes.try_into().map_err(|_| WireError::Field(what))
}

/// Names, concatenated.
pub fn join_names<'a>(names: impl IntoIterator<Item = &'a ChunkName>) -> Bytes {
    let mut out = BytesMut::new();
    for name in names {
        out.extend_from_slice(&name.0);
    }
    out.freeze()
}

/// What [`join_names`] joined.
pub fn split_names(bytes: &[u8]) -> Result<Vec<ChunkName>, WireError> {
    let (names, rest) = bytes.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(WireError::Field(
            "a list of names is not a whole number of them",
        ));
    }
    if names.len() > MAX_NAMES {
        return Err(WireError::Field("too many names in one request"));
    }
    Ok(names.iter().map(|n| ChunkName(*n)).collect())
}

/// Bodies in one piece, beside their lengths. One alone is not copied.
pub fn join_bodies<'a>(bodies: impl Iterator<Item = &'a Bytes> + Clone) -> (Bytes, Bytes) {
    let mut first = bodies.clone();
    if let (Some(body), None) = (first.next(), first.next()) {
        let lens = Bytes::copy_from_slice(&(body.len() as u32).to_le_bytes());
        return (lens, body.clone());
    }
    let (mut lens, mut all) = (
        BytesMut::new(),
        BytesMut::with_capacity(bodies.clone().map(Bytes::len).sum()),
    );
    for body in bodies {
        lens.extend_from_slice(&(body.len() as u32).to_le_bytes());
        all.extend_from_slice(body);
    }
    (lens.freeze(), all.freeze())
}

/// What [`join_bodies`] joined; the bodies share the memory of `all`.
pub fn split_bodies(lens: &[u8], mut all: Bytes) -> Result<Vec<Bytes>, WireError> {
    let (lens, rest) = lens.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(WireError::Field(
            "a list of lengths is not a whole number of them",
        ));
    }
    if lens.len() > MAX_NAMES {
        return Err(WireError::Field("too many bodies in one message"));
    }
    let mut bodies = Vec::with_capacity(lens.len());
    for len in lens {
        let len = u32::from_le_bytes(*len) as usize;
        if len > all.len() {
            return Err(WireError::Field(
                "the bodies are shorter than their lengths say",
            ));
        }
        bodies.push(all.split_to(len));
    }
    if !all.is_empty() {
        return Err(WireError::Field(
            "the bodies are longer than their lengths say",
        ));
    }
    Ok(bodies)
}

#[cfg(test)]
mod tests {
    use super::super::{Request, Response, request, response};
    use super::*;

    #[test]
    fn bodies_join_and_split() {
        let bodies = [
            Bytes::from_static(b"ab"),
            Bytes::new(),
            Bytes::from_static(b"c"),
        ];
        let (lens, all) = join_bodies(bodies.iter());
        assert_eq!(split_bodies(&lens, all.clone()).unwrap(), bodies);
        assert!(split_bodies(&lens[..11], all.clone()).is_err());
        assert!(split_bodies(&lens[..8], all.clone()).is_err());
        assert!(split_bodies(&lens, all.slice(..2)).is_err());
    }

    #[test]
    fn frames_are_bounded() {
        let request = Request::from(request::Op::PutImage(request::PutImage {
            name: "x".into(),
            record: vec![0; MAX_FRAME].into(),
            ..request::PutImage::default()
        }));
        assert!(matches!(frame(&request), Err(WireError::TooLong { .. })));
        assert!(frame_len((MAX_FRAME as u32 + 1).to_le_bytes()).is_err());
        let ok = Request::from(request::Op::Status(request::Status {}));
        let bytes = frame(&ok).unwrap();
        assert_eq!(
            frame_len(bytes[..4].try_into().unwrap()).unwrap(),
            bytes.len() - 4
        );
        assert_eq!(decode::<Request>(bytes.slice(4..)).unwrap(), ok);
        assert!(decode::<Request>(Bytes::from_static(b"\xff\xff\xff")).is_err());
    }

    #[test]
    fn bodies_in_pieces_are_the_same_frame() {
        for bodies in [
            vec![],
            vec![Bytes::new()],
            vec![
                Bytes::from_static(b"a"),
                Bytes::new(),
                Bytes::from(vec![7; 70_000]),
            ],
            vec![Bytes::from(vec![1; 1 << 20]); 9],
        ] {
            let (lens, all) = join_bodies(bodies.iter());
            let whole = response::Op::Bodies(response::Bodies { lens, bodies: all });
            let whole = frame(&Response::from(whole)).unwrap();
            assert!(frame_bodies(bodies).unwrap().concat() == whole);
        }
        let much = vec![Bytes::from(vec![1; 1 << 20]); 17];
        assert!(matches!(frame_bodies(much), Err(WireError::TooLong { .. })));
    }
}
