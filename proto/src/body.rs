//! Chunk bodies: how a chunk's plaintext is named, compressed, sealed and checked.
//!
//! A body is what the store keeps: `version, flags, plaintext length (u32), [number of links (u32), links (32 each)], [nonce (12)], payload, checksum (16)`.
//! The checksum is unkeyed, so that a store node can tell damage without being able to read; the name is keyed by the domain and
//! covers the plaintext and the links, so that the host that reads it trusts nobody.
//!
//! *Links* are the names that the plaintext refers to (a piece of a tree node or of a recipe), in clear, so that a store node can walk from a checkpoint to
//! everything it needs without being able to read anything. They tell an observer no more than which chunks are fetched after which. A chunk with
//! links is named otherwise than one with the same plaintext and none: a file whose bytes look like a tree node never stands in for it.
//! The payload is compressed with the links as dictionary, so that a name that stands in both costs little more than once.
//!
//! Invariants: a name stands for exactly one plaintext and one list of links in one domain; `open` returns bytes only when they and the links hash to the name.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use crate::codec::{FormatError, Reader, Writer};
use crate::ids::ChunkName;

/// The most plaintext one chunk may hold, in bytes.
pub const MAX_CHUNK_LEN: usize = 1 << 20;
/// The most links one chunk may have: as many as its plaintext can name.
pub const MAX_LINKS: usize = MAX_CHUNK_LEN / ChunkName::LEN;
/// The most bytes one body may have: plaintext that did not compress, links, and the frame around them.
pub const MAX_BODY_LEN: usize = MAX_CHUNK_LEN + MAX_LINKS * ChunkName::LEN + 64;

const FORMAT: &str = "chunk body";
const VERSION: u8 = 2;
const ZSTD: u8 = 1;
const SEALED: u8 = 2;
const LINKED: u8 = 4;
const CHECKSUM_LEN: usize = 16;
const TAG_LEN: usize = 16;
const ZSTD_LEVEL: i32 = 1;

/// The secret of a dedup domain. It names chunks and, where the domain is sealed, derives the key of each.
#[derive(Clone, PartialEq, Eq)]
pub struct DomainKey([u8; 32]);

impl std::fmt::Debug for DomainKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DomainKey(..)")
    }
}

impl DomainKey {
    /// Wraps 32 secret random bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for the key file of a host.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The name of the chunk with this plaintext and no links.
    pub fn name(&self, plain: &[u8]) -> ChunkName {
        ChunkName(*blake3::keyed_hash(&self.0, plain).as_bytes())
    }

    /// The name of the chunk with this plaintext and these links.
    pub fn name_linked(&self, plain: &[u8], links: &[ChunkName]) -> ChunkName {
        if links.is_empty() {
            return self.name(plain);
        }
        let mut hasher = blake3::Hasher::new_keyed(&self.derive("tidepool v1 linked chunk", &[]));
        hasher.update(&(links.len() as u64).to_le_bytes());
        for link in links {
            hasher.update(&link.0);
        }
        hasher.update(plain);
        ChunkName(*hasher.finalize().as_bytes())
    }

    /// A key derived for a purpose and a context, such as the key that speaks to one sandbox's init.
    pub fn derive(&self, purpose: &str, context: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key(purpose);
        hasher.update(&self.0);
        hasher.update(context);
        *hasher.finalize().as_bytes()
    }

    fn cipher(&self, name: &ChunkName) -> LessSafeKey {
        let key = self.derive("tidepool v1 chunk sealing", &name.0);
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).expect("a 32-byte key fits AES-256"))
    }

    /// Makes the body of `plain`. `seal_nonce` seals it: 12 fresh random bytes.
    ///
    /// # Panics
    /// Where `plain` is longer than [`MAX_CHUNK_LEN`] or has more than [`MAX_LINKS`]: a cutter that makes such chunks is wrong.
    pub fn encode(
        &self,
        name: &ChunkName,
        plain: &[u8],
        links: &[ChunkName],
        seal_nonce: Option<[u8; 12]>,
    ) -> Vec<u8> {
        assert!(
            plain.len() <= MAX_CHUNK_LEN && links.len() <= MAX_LINKS,
            "chunk of {} bytes and {} links",
            plain.len(),
            links.len()
        );
        let listed: Vec<u8> = links.iter().flat_map(|l| l.0).collect();
        let mut flags = 0;
        let mut payload = match compress(plain, &listed) {
            // An eighth saved pays for the decompression of every later read.
            Ok(packed) if packed.len() < plain.len() - plain.len() / 8 => {
                flags |= ZSTD;
                packed
            }
            _ => plain.to_vec(),
        };
        if seal_nonce.is_some() {
            flags |= SEALED;
        }
        if !links.is_empty() {
            flags |= LINKED;
        }
        let mut w = Writer::versioned(VERSION);
        w.u8(flags);
        w.u32_le(plain.len() as u32);
        if !links.is_empty() {
            w.u32_le(links.len() as u32);
            w.raw(&listed);
        }
        if let Some(nonce) = seal_nonce {
            let aad = sealing_aad(name, flags, plain.len() as u32);
            self.cipher(name)
                .seal_in_place_append_tag(
                    Nonce::assume_unique_for_key(nonce),
                    Aad::from(aad),
                    &mut payload,
                )
                .expect("a chunk is far below the cipher's limit");
            w.raw(&nonce);
        }
        w.raw(&payload);
        let mut body = w.into_bytes();
        let sum = blake3::hash(&body);
        body.extend_from_slice(&sum.as_bytes()[..CHECKSUM_LEN]);
        body
    }

    /// The plaintext of `body`, which must be that of `name`.
    pub fn open(&self, name: &ChunkName, body: &[u8]) -> Result<Vec<u8>, FormatError> {
        let frame = check(body)?;
        let (
            mut r,
            Head {
                flags,
                plain_len,
                listed,
            },
        ) = head(frame)?;
        let nonce = if flags & SEALED != 0 {
            Some(r.array::<12>()?)
        } else {
            None
        };
        let mut payload = r.raw(r.left())?.to_vec();
        if let Some(nonce) = nonce {
            let aad = sealing_aad(name, flags, plain_len);
            self.cipher(name)
                .open_in_place(
                    Nonce::assume_unique_for_key(nonce),
                    Aad::from(aad),
                    &mut payload,
                )
                .map_err(|_| FormatError::Damaged { format: FORMAT })?;
            payload.truncate(payload.len() - TAG_LEN);
        }
        if flags & ZSTD != 0 {
            payload = decompress(&payload, listed, plain_len as usize)
                .map_err(|_| FormatError::Damaged { format: FORMAT })?;
        }
        if payload.len() != plain_len as usize
            || self.name_linked(&payload, &names(listed)) != *name
        {
            return Err(FormatError::WrongName { name: *name });
        }
        Ok(payload)
    }
}

fn sealing_aad(name: &ChunkName, flags: u8, plain_len: u32) -> Vec<u8> {
    let mut aad = name.0.to_vec();
    aad.push(VERSION);
    aad.push(flags);
    aad.extend_from_slice(&plain_len.to_le_bytes());
    aad
}

/// With the links as dictionary: what stands there already is only referred to.
fn compress(plain: &[u8], listed: &[u8]) -> std::io::Result<Vec<u8>> {
    match listed {
        [] => zstd::bulk::compress(plain, ZSTD_LEVEL),
        _ => zstd::bulk::Compressor::with_dictionary(ZSTD_LEVEL, listed)?.compress(plain),
    }
}

fn decompress(payload: &[u8], listed: &[u8], len: usize) -> std::io::Result<Vec<u8>> {
    match listed {
        [] => zstd::bulk::decompress(payload, len),
        _ => zstd::bulk::Decompressor::with_dictionary(listed)?.decompress(payload, len),
    }
}

fn names(listed: &[u8]) -> Vec<ChunkName> {
    let (names, _) = listed.as_chunks::<{ ChunkName::LEN }>();
    names.iter().map(|n| ChunkName(*n)).collect()
}

/// What stands before nonce and payload.
struct Head<'a> {
    flags: u8,
    plain_len: u32,
    /// Links, concatenated.
    listed: &'a [u8],
}

/// Reads the head of a body without its checksum.
fn head(frame: &[u8]) -> Result<(Reader<'_>, Head<'_>), FormatError> {
    let mut r = Reader::versioned(FORMAT, frame, VERSION)?;
    let flags = r.u8()?;
    let plain_len = r.u32_le()?;
    if flags & !(ZSTD | SEALED | LINKED) != 0 {
        return Err(r.invalid(format!("unknown flags {flags:#x}")));
    }
    if plain_len as usize > MAX_CHUNK_LEN {
        return Err(r.invalid(format!(
            "a plaintext of {plain_len} bytes is over the bound"
        )));
    }
    let listed = match flags & LINKED {
        0 => &[][..],
        _ => {
            let n = r.u32_le()? as usize;
            if n == 0 || n > MAX_LINKS {
                return Err(r.invalid(format!("{n} links are out of bounds")));
            }
            r.raw(n * ChunkName::LEN)?
        }
    };
    Ok((
        r,
        Head {
            flags,
            plain_len,
            listed,
        },
    ))
}

/// The names that a chunk refers to, from its body, whose checksum is checked: for who marks without being able to read.
pub fn links(body: &[u8]) -> Result<Vec<ChunkName>, FormatError> {
    let (_, head) = head(check(body)?)?;
    Ok(names(head.listed))
}

/// Whether a body that was checked carries links.
pub fn is_linked(body: &[u8]) -> bool {
    body.get(1).is_some_and(|flags| flags & LINKED != 0)
}

/// Checks a body's checksum, version, head and bounds without being able to read it, as a store node does. Returns the bytes before the checksum.
pub fn check(body: &[u8]) -> Result<&[u8], FormatError> {
    if body.len() > MAX_BODY_LEN {
        return Err(FormatError::Invalid {
            format: FORMAT,
            what: format!("{} bytes are over the bound of {MAX_BODY_LEN}", body.len()),
        });
    }
    let Some(at) = body.len().checked_sub(CHECKSUM_LEN) else {
        return Err(FormatError::Truncated {
            format: FORMAT,
            at: body.len(),
        });
    };
    let (frame, sum) = body.split_at(at);
    if blake3::hash(frame).as_bytes()[..CHECKSUM_LEN] != *sum {
        return Err(FormatError::Damaged { format: FORMAT });
    }
    head(frame)?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> DomainKey {
        DomainKey::new([7; 32])
    }

    #[test]
    fn bodies_open_to_their_plaintext() {
        let noise: Vec<u8> = (0..5000u32)
            .flat_map(|i| blake3::hash(&i.to_le_bytes()).as_bytes()[..4].to_vec())
            .collect();
        for plain in [&b""[..], b"x", &[0; 70_000], &noise] {
            let name = key().name(plain);
            for nonce in [None, Some([9; 12])] {
                let body = key().encode(&name, plain, &[], nonce);
                assert!(body.len() <= plain.len() + 64);
                assert_eq!(key().open(&name, &body).unwrap(), plain);
                check(&body).unwrap();
            }
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        let plain = b"some plaintext that is long enough to be interesting";
        let name = key().name(plain);
        for nonce in [None, Some([1; 12])] {
            let body = key().encode(&name, plain, &[], nonce);
            for bit in 0..body.len() * 8 {
                let mut bad = body.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(key().open(&name, &bad).is_err(), "bit {bit}");
                assert!(check(&bad).is_err(), "bit {bit}");
            }
            for cut in 0..body.len() {
                assert!(key().open(&name, &body[..cut]).is_err());
            }
        }
    }

    #[test]
    fn another_name_or_domain_does_not_open() {
        let name = key().name(b"a");
        let body = key().encode(&name, b"a", &[], None);
        let other = key().name(b"b");
        assert_eq!(
            key().open(&other, &body),
            Err(FormatError::WrongName { name: other })
        );
        let sealed = key().encode(&name, b"a", &[], Some([2; 12]));
        assert!(DomainKey::new([8; 32]).open(&name, &sealed).is_err());
        assert_ne!(DomainKey::new([8; 32]).name(b"a"), name);
    }
    #[test]
    fn links_are_read_without_the_key_and_are_part_of_the_name() {
        let links: Vec<ChunkName> = (0..100u8).map(|i| key().name(&[i])).collect();
        let mut plain = b"a tree node that names ".to_vec();
        plain.extend(links.iter().flat_map(|l| l.0));
        let name = key().name_linked(&plain, &links);
        assert_ne!(name, key().name(&plain));
        assert_ne!(name, key().name_linked(&plain, &links[1..]));
        for nonce in [None, Some([3; 12])] {
            let body = key().encode(&name, &plain, &links, nonce);
            assert_eq!(super::links(&body).unwrap(), links);
            assert!(is_linked(&body));
            assert_eq!(key().open(&name, &body).unwrap(), plain);
            // What stands in both costs little more than once.
            assert!(body.len() < plain.len() + plain.len() / 4, "{}", body.len());
            for bit in 0..body.len() * 8 {
                let mut bad = body.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(super::links(&bad).is_err(), "bit {bit}");
                assert!(key().open(&name, &bad).is_err(), "bit {bit}");
            }
        }
        // Other links under the same name, with a checksum that fits: the name tells.
        let forged = key().encode(&name, &plain, &links[1..], None);
        assert_eq!(
            key().open(&name, &forged),
            Err(FormatError::WrongName { name })
        );
        let plain_one = key().encode(&name, &plain, &[], None);
        assert!(!is_linked(&plain_one));
        assert!(super::links(&plain_one).unwrap().is_empty());
        assert!(key().open(&name, &plain_one).is_err());
    }
}
