//! This process's stdin as a stream of bytes.
//!
//! Read by a thread of its own, straight from the descriptor: a read cannot be called off, so nothing may wait for it
//! when the command ends first.

use bytes::Bytes;
use futures::Stream;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};

use crate::failure::Failure;

const PIECE: usize = 64 << 10;
/// Pieces read ahead of the daemon.
const QUEUED: usize = 4;
/// Ctrl-], as in other tools that hand over a terminal.
const ESCAPE: u8 = 0x1d;
/// That many in a row give up waiting.
const ESCAPES: u8 = 3;

/// Starts reading stdin. `escape` is told when Ctrl-] came three times in a row.
pub(super) fn stream(
    escape: Option<oneshot::Sender<()>>,
) -> Result<impl Stream<Item = Bytes> + Send + 'static, Failure> {
    let (pieces, queue) = mpsc::channel(QUEUED);
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || read(&pieces, escape))
        .map_err(|e| Failure::failed(format!("cannot start a thread: {e}")))?;
    Ok(futures::stream::unfold(queue, |mut queue| async move {
        queue.recv().await.map(|piece| (piece, queue))
    }))
}

fn read(pieces: &mpsc::Sender<Bytes>, mut escape: Option<oneshot::Sender<()>>) {
    let stdin = rustix::stdio::stdin();
    let mut buffer = vec![0u8; PIECE];
    let mut escapes = Escapes::default();
    loop {
        let n = match rustix::io::read(stdin, &mut buffer) {
            Ok(0) => return,
            Ok(n) => n,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => {
                let mut polled = [PollFd::from_borrowed_fd(stdin, PollFlags::IN)];
                match rustix::event::poll(&mut polled, None) {
                    Ok(_) | Err(Errno::INTR) => continue,
                    Err(_) => return,
                }
            }
            // A terminal that hung up, a directory as stdin: for the command this is the end of its input.
            Err(_) => return,
        };
        let piece = buffer.get(..n).unwrap_or_default();
        if escape.is_some() && escapes.saw(piece) {
            if let Some(escape) = escape.take() {
                let _ = escape.send(());
            }
            return;
        }
        if pieces.blocking_send(Bytes::copy_from_slice(piece)).is_err() {
            return;
        }
    }
}

/// Counts Ctrl-] in a row.
#[derive(Default)]
struct Escapes(u8);

impl Escapes {
    /// Whether the third in a row is among these bytes.
    fn saw(&mut self, bytes: &[u8]) -> bool {
        for b in bytes {
            self.0 = if *b == ESCAPE { self.0 + 1 } else { 0 };
            if self.0 == ESCAPES {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_escapes_in_a_row_count_over_pieces() {
        let mut e = Escapes::default();
        assert!(!e.saw(b"a\x1d\x1db\x1d"));
        assert!(!e.saw(b"\x1d"));
        assert!(e.saw(b"\x1d"));
    }
}
