//! Where a command's output goes: to this process's own stdout and stderr as it comes, or into memory for `--json`.
//!
//! A thread does the writing, so that a reader that does not read holds back the command and not Ctrl-C.

use std::io;

use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};

use crate::failure::Failure;
use crate::ui::write_all;

/// The most bytes of each output kept for `--json`.
const MAX_COLLECTED: usize = 64 << 20;
/// Pieces of output on their way to the writing thread.
const QUEUED: usize = 64;
/// What a shell reports of a process that wrote to a closed pipe.
const CLOSED_PIPE_CODE: u8 = 141;

/// One of the two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Stdout,
    Stderr,
}

/// One output kept in memory.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) bytes: Vec<u8>,
    pub(super) truncated: bool,
}

/// Both outputs kept in memory.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) stdout: Kept,
    pub(super) stderr: Kept,
}

/// Takes a command's output.
pub(super) enum Sink {
    Stream(mpsc::Sender<(Target, Vec<u8>)>),
    Collect(Box<Collected>),
}

/// How the writing of a [`Sink`] goes; apart from it, so that a failure is seen while nothing is put.
pub(super) struct Writing(Option<oneshot::Receiver<Result<(), Errno>>>);

impl Sink {
    /// Keeps the output.
    pub(super) fn collect() -> (Self, Writing) {
        (Sink::Collect(Box::default()), Writing(None))
    }

    /// Writes the output.
    pub(super) fn stream() -> Result<(Self, Writing), Failure> {
        let (queue, mut pieces) = mpsc::channel::<(Target, Vec<u8>)>(QUEUED);
        let (ended, result) = oneshot::channel();
        std::thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || {
                while let Some((target, bytes)) = pieces.blocking_recv() {
                    let written = match target {
                        Target::Stdout => write_all(rustix::stdio::stdout(), &bytes),
                        // A closed stderr does not end anything: the result is still of use.
                        Target::Stderr => match write_all(rustix::stdio::stderr(), &bytes) {
                            Err(Errno::PIPE | Errno::BADF) => Ok(()),
                            written => written,
                        },
                    };
                    if let Err(e) = written {
                        let _ = ended.send(Err(e));
                        return;
                    }
                }
                let _ = ended.send(Ok(()));
            })
            .map_err(|e| Failure::failed(format!("cannot start a thread: {e}")))?;
        Ok((Sink::Stream(queue), Writing(Some(result))))
    }

    /// Takes a piece. Waits while the reader of the output is behind, and for ever once writing has failed: that is
    /// told by [`Writing::failed`].
    pub(super) async fn put(&mut self, target: Target, bytes: Vec<u8>) {
        match self {
            Sink::Stream(queue) => {
                if queue.send((target, bytes)).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            Sink::Collect(kept) => {
                let kept = match target {
                    Target::Stdout => &mut kept.stdout,
                    Target::Stderr => &mut kept.stderr,
                };
                let room = MAX_COLLECTED - kept.bytes.len();
                kept.truncated |= bytes.len() > room;
                kept.bytes
                    .extend_from_slice(bytes.get(..room).unwrap_or(&bytes));
            }
        }
    }
}

impl Writing {
    /// Waits until writing has failed. Safe to drop and ask again.
    pub(super) async fn failed(&mut self) -> Failure {
        match &mut self.0 {
            Some(result) => {
                let ended = result.await;
                self.0 = None;
                why(ended)
            }
            None => std::future::pending().await,
        }
    }

    /// Waits until all is written, or gives what was kept.
    pub(super) async fn finish(self, sink: Sink) -> Result<Option<Collected>, Failure> {
        match sink {
            Sink::Stream(queue) => drop(queue),
            Sink::Collect(kept) => return Ok(Some(*kept)),
        }
        match self.0 {
            Some(result) => match result.await {
                Ok(Ok(())) => Ok(None),
                ended => Err(why(ended)),
            },
            None => Ok(None),
        }
    }
}

fn why(ended: Result<Result<(), Errno>, oneshot::error::RecvError>) -> Failure {
    match ended {
        Ok(Err(Errno::PIPE)) => Failure::broken_pipe(CLOSED_PIPE_CODE),
        Ok(Err(e)) => Failure::failed(format!(
            "cannot write the command's output: {}",
            io::Error::from(e)
        )),
        Ok(Ok(())) | Err(_) => Failure::failed("the command's output can no longer be written"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn kept_output_is_bounded_and_says_so() {
        let (mut sink, writing) = Sink::collect();
        sink.put(Target::Stderr, vec![1; 10]).await;
        sink.put(Target::Stdout, vec![2; MAX_COLLECTED - 1]).await;
        sink.put(Target::Stdout, vec![3; 2]).await;
        sink.put(Target::Stdout, vec![4; 2]).await;
        let kept = writing.finish(sink).await.unwrap().unwrap();
        assert_eq!(kept.stdout.bytes.len(), MAX_COLLECTED);
        assert!(kept.stdout.truncated && !kept.stderr.truncated);
        assert_eq!(kept.stdout.bytes.last(), Some(&3));
        assert_eq!(kept.stderr.bytes, [1; 10]);
    }
}
