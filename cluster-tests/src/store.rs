//! A store in a process of its own, and the command line's way to it.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{Said, program};

/// A `tidepool-store` process; killed when dropped.
pub struct StoreProcess {
    child: Child,
    /// Where it serves.
    pub addr: String,
}

impl StoreProcess {
    /// Starts one and waits until it serves. Port 0 takes a free one.
    ///
    /// # Panics
    /// Where it does not start.
    pub fn run(data: &Path, listen: &str) -> Self {
        let mut child = Command::new(program("tidepool-store"))
            .arg("run")
            .arg("--data")
            .arg(data)
            .args(["--listen", listen])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the store starts");
        let mut line = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out)
            .read_line(&mut line)
            .expect("it says where it listens");
        let addr = line
            .trim()
            .rsplit(' ')
            .next()
            .unwrap_or_default()
            .to_owned();
        let process = Self { child, addr };
        assert!(process.addr.contains(':'), "{line:?}");
        process
    }

    /// SIGKILL, and its end.
    ///
    /// # Panics
    /// Where it had ended already.
    pub fn kill(mut self) {
        assert!(
            matches!(self.child.try_wait(), Ok(None)),
            "it ended by itself"
        );
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    /// Runs the command line with `--json` against it, as the holder of an identity.
    ///
    /// # Panics
    /// Where it cannot be run.
    pub fn cli<S: AsRef<OsStr>>(&self, identity: &Path, args: impl IntoIterator<Item = S>) -> Said {
        let mut command = Command::new(program("tidepool"));
        command.args(args).arg("--json");
        command.args(["--store", &self.addr]).arg("--identity");
        command
            .arg(identity)
            .stdin(Stdio::null())
            .output()
            .expect("the command line runs")
            .into()
    }
}

impl Drop for StoreProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has the authority in a data directory sign an identity; gives its directory.
///
/// # Panics
/// Where it does not.
pub fn issue(data: &Path, role: &str, out: &Path) -> PathBuf {
    let issued = Command::new(program("tidepool-store"))
        .args(["issue-client", "--role", role, "--data"])
        .arg(data)
        .arg("--out")
        .arg(out)
        .output()
        .expect("the store's program runs");
    assert!(issued.status.success(), "{issued:?}");
    out.to_owned()
}
