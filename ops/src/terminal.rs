//! The terminal of `exec -it`: raw while the command has it, and as it was before on every way out.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tidepool_proto::api::Resize;

use crate::failure::Failure;

/// What stdin's terminal was set to before it was made raw. Global so that a panic can restore it before its message
/// is printed.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Keeps stdin's terminal raw; dropping it restores what was.
pub(crate) struct RawMode(());

impl RawMode {
    /// Makes the terminal raw; `None` if stdin is not one.
    pub(crate) fn enter() -> Result<Option<Self>, Failure> {
        let stdin = rustix::stdio::stdin();
        if !std::io::stdin().is_terminal() {
            return Ok(None);
        }
        let failed = |e| {
            Failure::failed(format!(
                "cannot set the terminal: {}",
                std::io::Error::from(e)
            ))
        };
        let before = tcgetattr(stdin).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let guard = Self(());
        tcsetattr(stdin, OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Some(guard))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal before a panic's message, so that it can be read.
pub(crate) fn restore_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        report(info);
    }));
}

fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        // There is nothing left to try if this fails.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &before);
    }
}

/// The size of the terminal at hand, or that of a classic one where there is none.
pub(crate) fn size() -> Resize {
    let (stdin, stdout, stderr) = (
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    );
    [stdout, stdin, stderr]
        .into_iter()
        .filter_map(|fd| tcgetwinsize(fd).ok())
        .find(|size| size.ws_col > 0 && size.ws_row > 0)
        .map_or(Resize { cols: 80, rows: 24 }, |size| Resize {
            cols: size.ws_col,
            rows: size.ws_row,
        })
}
