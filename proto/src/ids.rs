//! Newtype ids. None can be mistaken for another, all print as hex or decimal, all parse back from what they print.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text that is not the id it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {kind}: {text:?}")]
pub struct ParseIdError {
    kind: &'static str,
    text: String,
}

impl ParseIdError {
    fn new(kind: &'static str, text: &str) -> Self {
        Self {
            kind,
            text: text.chars().take(80).collect(),
        }
    }
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $len:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Length in bytes.
            pub const LEN: usize = $len;

            /// The first eight hex digits, for people.
            pub fn short(&self) -> String {
                hex::encode(&self.0[..4])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), hex::encode(&self.0[..4]))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(s: &str) -> Result<Self, ParseIdError> {
                let mut out = [0u8; $len];
                hex::decode_to_slice(s, &mut out).map_err(|_| ParseIdError::new(stringify!($name), s))?;
                Ok(Self(out))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

hex_id!(
    /// The name of a chunk: BLAKE3 of its plaintext, keyed by the key of its dedup domain.
    ChunkName,
    32
);
hex_id!(
    /// The name of the chunk that holds a tree's root entry. Equal ids mean equal trees, metadata included.
    TreeId,
    32
);
hex_id!(
    /// The BLAKE3 hash of a committed manifest's bytes.
    CheckpointId,
    32
);
hex_id!(
    /// A sandbox's identity, random, kept over restores and moves; a fork gets a new one.
    SandboxId,
    16
);
hex_id!(
    /// One upload, whose pins keep chunks alive until it ends. Random, chosen by the client.
    SessionId,
    16
);
number_id!(
    /// The monotonic number of a sandbox's holder. A commit with a lower one is refused.
    Epoch
);
number_id!(
    /// A sandbox's turns, counted from 1, which is its creation; 0 stands for none.
    TurnNo
);

/// A dedup domain: sandboxes of one domain share chunks, domains share nothing.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainId(String);

impl DomainId {
    /// The text of the id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DomainId {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, ParseIdError> {
        if valid_label(s, 64) {
            Ok(Self(s.to_owned()))
        } else {
            Err(ParseIdError::new("domain", s))
        }
    }
}

impl TryFrom<String> for DomainId {
    type Error = ParseIdError;

    fn try_from(s: String) -> Result<Self, ParseIdError> {
        s.parse()
    }
}

impl From<DomainId> for String {
    fn from(d: DomainId) -> String {
        d.0
    }
}

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether `s` may name a sandbox, an image or a domain: 1 to `max` of `a-z A-Z 0-9 . _ -`, opening with a letter or digit.
/// Images may also carry one `:tag`; that is split off by the caller.
pub fn valid_label(s: &str, max: usize) -> bool {
    let first_fits = s.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    first_fits
        && s.len() <= max
        && s.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_and_parse_back() {
        let id = SandboxId([0xab; 16]);
        assert_eq!(id.to_string().parse::<SandboxId>().unwrap(), id);
        assert!("ab".parse::<SandboxId>().is_err());
        assert!("zz".repeat(16).parse::<SandboxId>().is_err());
    }

    #[test]
    fn labels_are_bounded() {
        assert!(valid_label("a-b_c.9", 64));
        for bad in ["", "-a", "../x", "a/b", "a b", "é"] {
            assert!(!valid_label(bad, 64), "{bad:?}");
        }
        assert!(!valid_label(&"a".repeat(65), 64));
        assert!("a".repeat(65).parse::<DomainId>().is_err());
    }
}
