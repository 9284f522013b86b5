//! The newest bytes of a job's output, addressed by their offset from the start of the stream.

use std::collections::VecDeque;

/// Keeps up to `capacity` of the newest bytes.
pub(crate) struct Ring {
    bytes: VecDeque<u8>,
    start: u64,
    capacity: usize,
}

impl Ring {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            start: 0,
            capacity,
        }
    }

    /// The offset of the oldest byte that is still here.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// The offset after the newest byte: the length of the stream so far.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Bytes held.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// How many bytes fit without losing any from `keep` on.
    pub(crate) fn room(&self, keep: u64) -> usize {
        let kept = self.end().saturating_sub(keep.max(self.start));
        self.capacity
            .saturating_sub(usize::try_from(kept).unwrap_or(usize::MAX))
    }

    /// Appends; the oldest bytes go when there are too many.
    pub(crate) fn push(&mut self, data: &[u8]) {
        self.bytes.extend(data);
        self.drop_front(self.bytes.len().saturating_sub(self.capacity));
    }

    /// Forgets the oldest `n` bytes.
    pub(crate) fn drop_front(&mut self, n: usize) {
        let n = n.min(self.bytes.len());
        self.bytes.drain(..n);
        self.start += n as u64;
    }

    /// Up to `max` bytes from `from` on, which must not be below [`Self::start`].
    pub(crate) fn read(&self, from: u64, max: usize) -> Vec<u8> {
        let Ok(skip) = usize::try_from(from.saturating_sub(self.start)) else {
            return Vec::new();
        };
        let begin = skip.min(self.bytes.len());
        let end = begin.saturating_add(max).min(self.bytes.len());
        self.bytes.range(begin..end).copied().collect()
    }

    /// Gives unused memory back.
    pub(crate) fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_stay_true_while_old_bytes_go() {
        let mut ring = Ring::new(4);
        ring.push(b"abc");
        assert_eq!((ring.start(), ring.end()), (0, 3));
        assert_eq!(ring.room(0), 1);
        assert_eq!(ring.room(2), 3);
        assert_eq!(ring.room(3), 4);
        ring.push(b"defg");
        assert_eq!((ring.start(), ring.end()), (3, 7));
        assert_eq!(ring.read(3, 100), b"defg");
        assert_eq!(ring.read(5, 1), b"f");
        assert_eq!(ring.read(7, 1), b"");
        assert_eq!(ring.read(100, 1), b"");
        ring.drop_front(3);
        assert_eq!(ring.read(6, 9), b"g");
    }
}
