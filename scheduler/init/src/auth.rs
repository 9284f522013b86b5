//! Proof of the shared key, and sealed frames.
//!
//! The server opens with a version and a nonce; the client answers with its own nonce and a keyed hash over both; the
//! server answers with another. Each direction then has its own key, derived from the shared one and both nonces, and a
//! counter that is hashed with every frame, so frames cannot be replayed, reordered, reflected or carried over from
//! another connection.

use crate::{MAX_FRAME, PROTOCOL_VERSION};
use std::fmt;

/// The key both ends hold.
pub type Key = [u8; 32];
/// Bytes of [`ServerHello::encode`].
pub const SERVER_HELLO: usize = MAGIC.len() + 1 + 32;
/// Bytes of the client's proof.
pub const CLIENT_PROOF: usize = 64;
/// Bytes of the server's proof.
pub const SERVER_PROOF: usize = 32;

const MAGIC: &[u8; 7] = b"TPINIT\0";
const MAC: usize = 16;
const HEADER: usize = 4;

/// Why a peer or a frame was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthError {
    /// The peer does not speak this protocol.
    NotInit,
    /// The peer speaks another version of it.
    Version(u8),
    /// The peer does not hold the key, or bytes were changed on the way.
    Forged,
    /// A frame is longer than [`MAX_FRAME`].
    TooLong,
}

impl fmt::Display for AuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInit => f.write_str("the peer is not tidepool-init"),
            Self::Version(v) => write!(
                f,
                "the peer speaks protocol version {v}, not {PROTOCOL_VERSION}"
            ),
            Self::Forged => f.write_str("the peer does not hold the sandbox's key"),
            Self::TooLong => f.write_str("a frame is too long"),
        }
    }
}

impl std::error::Error for AuthError {}

fn mac(key: &Key, label: &str, parts: [&[u8; 32]; 2]) -> blake3::Hash {
    let mut h = blake3::Hasher::new_keyed(key);
    h.update(label.as_bytes());
    h.update(&[PROTOCOL_VERSION]);
    for p in parts {
        h.update(p);
    }
    h.finalize()
}

/// The two nonces of a connection.
#[derive(Clone, Copy)]
pub struct Handshake {
    server: [u8; 32],
    client: [u8; 32],
}

impl Handshake {
    /// The server's first bytes.
    pub fn server_hello(nonce: &[u8; 32]) -> [u8; SERVER_HELLO] {
        let mut out = [0; SERVER_HELLO];
        out[..7].copy_from_slice(MAGIC);
        out[7] = PROTOCOL_VERSION;
        out[8..].copy_from_slice(nonce);
        out
    }

    /// The client's answer to the server's first bytes.
    pub fn client(
        key: &Key,
        hello: &[u8; SERVER_HELLO],
        nonce: [u8; 32],
    ) -> Result<(Self, [u8; 64]), AuthError> {
        if &hello[..7] != MAGIC {
            return Err(AuthError::NotInit);
        }
        if hello[7] != PROTOCOL_VERSION {
            return Err(AuthError::Version(hello[7]));
        }
        let server = hello[8..].try_into().map_err(|_| AuthError::NotInit)?;
        let this = Self {
            server,
            client: nonce,
        };
        let mut out = [0; CLIENT_PROOF];
        out[..32].copy_from_slice(&nonce);
        out[32..].copy_from_slice(mac(key, "client", [&this.server, &this.client]).as_bytes());
        Ok((this, out))
    }

    /// Checks the client's proof; the result is the server's.
    pub fn server(
        key: &Key,
        nonce: [u8; 32],
        proof: &[u8; CLIENT_PROOF],
    ) -> Result<(Self, [u8; SERVER_PROOF]), AuthError> {
        let (client, tag) = proof.split_at(32);
        let client = client.try_into().map_err(|_| AuthError::Forged)?;
        let this = Self {
            server: nonce,
            client,
        };
        // `Hash` compares in constant time.
        if mac(key, "client", [&this.server, &this.client]) != *tag {
            return Err(AuthError::Forged);
        }
        Ok((
            this,
            *mac(key, "server", [&this.server, &this.client]).as_bytes(),
        ))
    }

    /// Checks the server's proof.
    pub fn check_server(&self, key: &Key, proof: &[u8; SERVER_PROOF]) -> Result<(), AuthError> {
        if mac(key, "server", [&self.server, &self.client]) == *proof {
            Ok(())
        } else {
            Err(AuthError::Forged)
        }
    }

    /// The seal of frames to the server and the one of frames to the client.
    pub fn seals(&self, key: &Key) -> (Seal, Seal) {
        let derive = |label| Seal {
            key: *mac(key, label, [&self.server, &self.client]).as_bytes(),
            counter: 0,
        };
        (derive("to server"), derive("to client"))
    }
}

/// One direction of a connection: its key and the number of frames so far.
pub struct Seal {
    key: Key,
    counter: u64,
}

impl Seal {
    fn tag(&mut self, payload: &[u8]) -> blake3::Hash {
        let mut h = blake3::Hasher::new_keyed(&self.key);
        h.update(&self.counter.to_le_bytes());
        h.update(payload);
        self.counter += 1;
        h.finalize()
    }

    /// Appends a frame with this payload to `out`.
    ///
    /// Fails only if the payload is longer than [`MAX_FRAME`].
    pub fn seal(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), AuthError> {
        let len = u32::try_from(payload.len()).map_err(|_| AuthError::TooLong)?;
        if payload.len() > MAX_FRAME {
            return Err(AuthError::TooLong);
        }
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(payload);
        out.extend_from_slice(&self.tag(payload).as_bytes()[..MAC]);
        Ok(())
    }

    /// The payload length of the frame that starts with `header`.
    pub fn payload_len(header: [u8; HEADER]) -> Result<usize, AuthError> {
        let len = u32::from_le_bytes(header) as usize;
        if len > MAX_FRAME {
            Err(AuthError::TooLong)
        } else {
            Ok(len)
        }
    }

    /// Bytes that follow a frame's header for a payload of this length.
    pub fn body_len(payload_len: usize) -> usize {
        payload_len + MAC
    }

    /// Checks what followed a frame's header and gives the payload.
    pub fn open<'a>(&mut self, body: &'a [u8]) -> Result<&'a [u8], AuthError> {
        let at = body.len().checked_sub(MAC).ok_or(AuthError::Forged)?;
        let (payload, tag) = body.split_at(at);
        let expected = self.tag(payload);
        // Compared without an early exit, so that timing tells nothing of how far a forged tag is right.
        let differ = expected.as_bytes()[..MAC]
            .iter()
            .zip(tag)
            .fold(0u8, |d, (a, b)| d | (a ^ b));
        if std::hint::black_box(differ) == 0 {
            Ok(payload)
        } else {
            Err(AuthError::Forged)
        }
    }

    /// Takes one whole frame from the front of `buffer` if it is there, without its framing.
    pub fn take(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Vec<u8>>, AuthError> {
        let Some(header) = buffer.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let end = HEADER + Self::body_len(Self::payload_len(*header)?);
        if buffer.len() < end {
            return Ok(None);
        }
        let payload = self.open(&buffer[HEADER..end])?.to_vec();
        buffer.drain(..end);
        Ok(Some(payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(client_key: Key, server_key: Key) -> Result<(Seal, Seal, Seal, Seal), AuthError> {
        let hello = Handshake::server_hello(&[1; 32]);
        let (c, proof) = Handshake::client(&client_key, &hello, [2; 32])?;
        let (s, answer) = Handshake::server(&server_key, [1; 32], &proof)?;
        c.check_server(&client_key, &answer)?;
        let (a, b) = c.seals(&client_key);
        let (x, y) = s.seals(&server_key);
        Ok((a, b, x, y))
    }

    #[test]
    fn both_ends_need_the_same_key() {
        assert!(pair([7; 32], [7; 32]).is_ok());
        assert_eq!(pair([7; 32], [8; 32]).err(), Some(AuthError::Forged));
        let hello = Handshake::server_hello(&[1; 32]);
        let (c, proof) = Handshake::client(&[7; 32], &hello, [2; 32]).expect("a hello");
        assert_eq!(c.check_server(&[7; 32], &[0; 32]), Err(AuthError::Forged));
        // The client's own proof, sent back, is not the server's.
        let reflected = proof[32..].try_into().expect("32 bytes");
        assert_eq!(c.check_server(&[7; 32], &reflected), Err(AuthError::Forged));
    }

    #[test]
    fn frames_cannot_be_changed_replayed_or_reflected() {
        let (mut send, mut client_in, mut recv, _) = pair([7; 32], [7; 32]).expect("the same key");
        let mut wire = Vec::new();
        send.seal(b"one", &mut wire).expect("short");
        let first = wire.clone();
        send.seal(b"two", &mut wire).expect("short");
        assert_eq!(
            client_in.take(&mut first.clone()),
            Err(AuthError::Forged),
            "reflected"
        );
        assert_eq!(
            recv.take(&mut wire).expect("genuine").as_deref(),
            Some(&b"one"[..])
        );
        assert_eq!(
            recv.take(&mut wire).expect("genuine").as_deref(),
            Some(&b"two"[..])
        );
        assert_eq!(recv.take(&mut wire), Ok(None));
        assert_eq!(
            recv.take(&mut first.clone()),
            Err(AuthError::Forged),
            "replayed"
        );
        let (mut send, _, mut recv, _) = pair([7; 32], [7; 32]).expect("the same key");
        let mut wire = Vec::new();
        send.seal(b"three", &mut wire).expect("short");
        wire[5] ^= 1;
        assert_eq!(recv.take(&mut wire), Err(AuthError::Forged));
        assert_eq!(recv.take(&mut vec![0xff; 8]), Err(AuthError::TooLong));
    }
}
