//! The real `tidepool` binary against canned answers on a unix socket.
//!
//! What is tested here is the client alone: what it asks, prints and leaves with. The answers' shapes are made of the API's
//! own types where they matter, so that they cannot drift apart. Against a real daemon it runs in `cluster-tests`.

mod errors;
mod exec;
mod output;
mod server;
mod terminal;

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The binary, with nothing of this process's environment that could change what it does.
fn tidepool<I: AsRef<OsStr>>(
    socket: &std::path::Path,
    args: impl IntoIterator<Item = I>,
) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidepool"));
    command
        .env_remove("TIDEPOOL_SOCKET")
        .env("TERM", "xterm-test")
        .arg("--socket")
        .arg(socket)
        .args(args)
        .stdin(Stdio::null());
    // Whoever runs the tests in the background may have them ignored, and the program keeps what it is given.
    // SAFETY: signal() is safe between fork and exec, and touches nothing of this process.
    unsafe {
        command.pre_exec(|| {
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        });
    }
    command
}

/// What a run left behind.
#[derive(Debug)]
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Run {
    /// The one JSON document on stdout.
    fn json(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "not one line: {self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl From<Output> for Run {
    fn from(out: Output) -> Self {
        Self {
            code: out
                .status
                .code()
                .unwrap_or_else(|| panic!("killed: {out:?}")),
            stdout: String::from_utf8(out.stdout).unwrap(),
            stderr: String::from_utf8(out.stderr).unwrap(),
        }
    }
}
