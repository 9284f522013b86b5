//! The signals that end or steer the client.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// A signal that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caught {
    /// Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
}

/// Ctrl-C and SIGTERM.
///
/// A signal that was ignored when this process started stays ignored, as shells expect of what they start in the
/// background. SIGHUP keeps its default, so that `nohup` works.
pub(crate) struct Signals {
    interrupt: Option<Signal>,
    terminate: Option<Signal>,
}

impl Signals {
    pub(crate) fn new() -> Result<Self, Failure> {
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// The next one. Safe to drop and ask again.
    pub(crate) async fn next(&mut self) -> Caught {
        let Self {
            interrupt,
            terminate,
        } = self;
        tokio::select! {
            () = next(interrupt) => Caught::Interrupt,
            () = next(terminate) => Caught::Terminate,
        }
    }
}

/// Waits for a signal; for ever where it is not listened for.
pub(crate) async fn next(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            // None: it will never come again.
            if signal.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
        }
        None => std::future::pending().await,
    }
}

fn listen(kind: SignalKind) -> Result<Option<Signal>, Failure> {
    if ignored(kind.as_raw_value()) {
        return Ok(None);
    }
    signal(kind)
        .map(Some)
        .map_err(|e| Failure::failed(format!("cannot listen for signals: {e}")))
}

/// Whether a signal is ignored by this process, by what the kernel says.
fn ignored(number: i32) -> bool {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else {
        return false;
    };
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    (1..=64).contains(&number) && mask & (1 << (number - 1)) != 0
}
