//! Lines of JSON out of a streamed HTTP body, bounded.

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;

/// The longest line accepted from the daemon.
pub(crate) const MAX_LINE: usize = 16 << 20;

/// Why there is no next line.
#[derive(Debug)]
pub(crate) enum LineError {
    /// The connection ended in the middle.
    Lost(String),
    /// A line is over [`MAX_LINE`].
    TooLong,
}

/// Splits what arrives at newlines; holds no clock and no socket.
#[derive(Debug, Default)]
struct Splitter {
    buffer: BytesMut,
    /// How much of `buffer` is known to hold no newline.
    scanned: usize,
}

impl Splitter {
    fn push(&mut self, data: &[u8]) {
        self.buffer.extend_from_slice(data);
    }

    /// The next whole line without its newline; empty lines are passed over.
    fn next(&mut self) -> Result<Option<Bytes>, LineError> {
        loop {
            let unseen = self.buffer.get(self.scanned..).unwrap_or_default();
            let Some(at) = unseen.iter().position(|b| *b == b'\n') else {
                self.scanned = self.buffer.len();
                return if self.scanned > MAX_LINE {
                    Err(LineError::TooLong)
                } else {
                    Ok(None)
                };
            };
            let line = self.buffer.split_to(self.scanned + at).freeze();
            self.buffer.advance(1);
            self.scanned = 0;
            if line.len() > MAX_LINE {
                return Err(LineError::TooLong);
            }
            if !line.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(line));
            }
        }
    }

    /// What stands after the last newline once nothing more will come.
    fn rest(&mut self) -> Option<Bytes> {
        self.scanned = 0;
        let rest = self.buffer.split().freeze();
        (!rest.iter().all(u8::is_ascii_whitespace)).then_some(rest)
    }
}

/// The lines of one answer.
#[derive(Debug)]
pub(crate) struct Lines {
    body: Incoming,
    splitter: Splitter,
    ended: bool,
}

impl Lines {
    pub(crate) fn new(body: Incoming) -> Self {
        Self {
            body,
            splitter: Splitter::default(),
            ended: false,
        }
    }

    /// The next line; `None` at the proper end of the answer.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, LineError> {
        loop {
            if let Some(line) = self.splitter.next()? {
                return Ok(Some(line));
            }
            if self.ended {
                return Ok(None);
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.splitter.push(data);
                    }
                }
                Some(Err(e)) => return Err(LineError::Lost(e.to_string())),
                None => {
                    self.ended = true;
                    return Ok(self.splitter.rest());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(s: &mut Splitter) -> Vec<String> {
        std::iter::from_fn(|| s.next().unwrap())
            .map(|b| String::from_utf8(b.to_vec()).unwrap())
            .collect()
    }

    #[test]
    fn lines_are_whole_whatever_the_pieces() {
        let text = b"one\n\ntwo\r\nthree";
        for size in 1..text.len() {
            let mut s = Splitter::default();
            let mut seen = Vec::new();
            for piece in text.chunks(size) {
                s.push(piece);
                seen.extend(all(&mut s));
            }
            assert_eq!(seen, ["one", "two\r"]);
            assert_eq!(s.rest().as_deref(), Some(&b"three"[..]));
            assert_eq!(s.rest(), None);
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut s = Splitter::default();
        let piece = vec![b'x'; 1 << 20];
        for _ in 0..16 {
            s.push(&piece);
            assert!(matches!(s.next(), Ok(None)));
        }
        s.push(b"x");
        assert!(matches!(s.next(), Err(LineError::TooLong)));
    }
}
