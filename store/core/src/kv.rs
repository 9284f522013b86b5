//! The seam to storage: reads by key, and writes as data.

/// A stored value could not be read as what it was written as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ReadError(pub String);

/// Reads a group's state. Keys are those of [`crate::keys`].
pub trait KvRead {
    /// The value of `key`, or an error where it is damaged.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError>;
}

/// One change of a group's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    Put {
        key: Vec<u8>,
        value: Vec<u8>,
    },
    Delete {
        key: Vec<u8>,
    },
    /// Every key that opens with `prefix`.
    DeletePrefix {
        prefix: Vec<u8>,
    },
}

/// The first key after all that open with `prefix`; none where there is no such key.
pub fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::prefix_end;

    #[test]
    fn a_prefix_ends_before_the_next() {
        assert_eq!(prefix_end(b"ab"), Some(b"ac".to_vec()));
        assert_eq!(prefix_end(&[1, 0xff]), Some(vec![2]));
        assert_eq!(prefix_end(&[0xff, 0xff]), None);
    }
}
