//! A sandbox, seen from outside: made, commanded, and always removed.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tempfile::TempDir;
use tidepool_inspector::supports;

use crate::script::{LOWER_DIRS, NAMES};

/// First argument of the binary when it is to be a sandbox.
pub const FLAG: &str = "--tp-sandbox";

/// Far more than any turn takes; only to end a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// A sandbox whose first process waits for commands: own pid, mount and IPC namespaces, an overlay on ext4, a `/dev/shm` of its own.
#[derive(Debug)]
pub struct Sandbox {
    stage: Child,
    commands: ChildStdin,
    replies: BufReader<ChildStdout>,
    init: u32,
    // Dropped last: after the processes and with them the mounts are gone.
    dir: TempDir,
}

impl Sandbox {
    /// Starts one; this very program is its first process.
    pub fn start() -> Result<Self> {
        let dir = scratch()?;
        for name in ["upper", "work", "merged"] {
            fs::create_dir(dir.path().join(name))?;
        }
        for (i, lower) in LOWER_DIRS.iter().enumerate() {
            let at = dir.path().join("lower").join(lower);
            fs::create_dir_all(&at)?;
            for (j, name) in NAMES.iter().enumerate() {
                fs::write(at.join(name), vec![b'A' + (i + j) as u8; 10 + 3000 * j])?;
            }
        }
        let mut stage = Command::new(std::env::current_exe()?)
            .arg(FLAG)
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the sandbox side")?;
        let commands = stage.stdin.take().context("no stdin")?;
        let replies = BufReader::new(stage.stdout.take().context("no stdout")?);
        let mut sandbox = Self {
            stage,
            commands,
            replies,
            init: 0,
            dir,
        };
        // From the stage and from its child, in either order.
        let mut ready = false;
        while sandbox.init == 0 || !ready {
            let line = sandbox.reply()?;
            match line.strip_prefix("init ") {
                Some(init) => sandbox.init = init.parse()?,
                None => ready = line == "ready",
            }
        }
        Ok(sandbox)
    }

    #[must_use]
    pub fn upper(&self) -> PathBuf {
        self.dir.path().join("upper")
    }

    /// Where the overlay is mounted, inside: the root of the paths that mappings show.
    #[must_use]
    pub fn merged(&self) -> PathBuf {
        self.dir.path().join("merged")
    }

    /// Host process id of its first process.
    #[must_use]
    pub fn init(&self) -> u32 {
        self.init
    }

    /// Has the sandbox run a turn's lines; answers the outcome of each, `ok` or a sentence.
    pub fn run(&mut self, lines: &[String]) -> Result<Vec<String>> {
        let mut text = format!("{}\n", lines.len());
        for line in lines {
            text.push_str(line);
            text.push('\n');
        }
        self.commands.write_all(text.as_bytes())?;
        let mut outcomes = Vec::new();
        for _ in lines {
            outcomes.push(self.reply()?);
        }
        let end = self.reply()?;
        ensure!(end == "end", "{end} instead of the end of a turn");
        Ok(outcomes)
    }

    fn reply(&mut self) -> Result<String> {
        let mut fds = [PollFd::new(self.replies.get_ref(), PollFlags::IN)];
        if self.replies.buffer().is_empty() {
            ensure!(
                poll(&mut fds, Some(&PATIENCE.try_into()?))? > 0,
                "the sandbox does not answer"
            );
        }
        let mut line = String::new();
        ensure!(
            self.replies.read_line(&mut line)? > 0,
            "the sandbox ended (is this root?)"
        );
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let init = i32::try_from(self.init).ok().and_then(Pid::from_raw);
        let init = init.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        // The first process of the namespace dies with it, and all others with that.
        let _ = self.stage.kill();
        let _ = self.stage.wait();
        if let Some(init) = init {
            let mut fds = [PollFd::new(&init, PollFlags::IN)];
            if let Ok(limit) = PATIENCE.try_into() {
                let _ = poll(&mut fds, Some(&limit));
            }
        }
    }
}

/// A directory on ext4, or an error that says that there is none.
fn scratch() -> Result<TempDir> {
    let mut reasons = Vec::new();
    for base in [Path::new("/var/tmp").to_owned(), std::env::temp_dir()] {
        match supports(&base) {
            Ok(()) => {
                return Ok(tempfile::Builder::new()
                    .prefix("tp-effect-fuzz-")
                    .tempdir_in(base)?);
            }
            Err(reason) => reasons.push(reason),
        }
    }
    bail!("a directory on ext4 is needed: {}", reasons.join("; "))
}
