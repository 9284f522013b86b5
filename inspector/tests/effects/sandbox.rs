//! A sandbox, seen from outside: made, commanded, watched, mapped back to paths, and always removed.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tempfile::TempDir;
use tidepool_inspector::{
    Effects, FileEffects, Inspector, InspectorOptions, SandboxSlot, Target, TaskTable,
    pid_ns_inode,
    rearm::{self, Moment},
    supports,
};

use crate::cases::CASES;

/// First argument of this binary when it is to be a sandbox.
pub(crate) const FLAG: &str = "--tp-sandbox";

/// First argument when it is to be a process that holds things and sleeps.
pub(crate) const HOLD: &str = "--tp-hold";

/// Far more than any step takes; only to end a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A sandbox whose first process waits for commands.
pub(crate) struct Sandbox {
    stage: Child,
    commands: ChildStdin,
    replies: BufReader<ChildStdout>,
    init: u32,
    // Dropped last: after the processes and with them the mounts are gone.
    dir: TempDir,
}

impl Sandbox {
    pub(crate) fn start() -> Result<Self> {
        let dir = scratch()?;
        for name in ["upper", "work", "merged"] {
            fs::create_dir(dir.path().join(name))?;
        }
        for case in CASES {
            let lower = dir.path().join("lower").join(case.name);
            fs::create_dir_all(lower.join("lowdir"))?;
            fs::write(lower.join("low"), vec![b'l'; 8192])?;
            fs::write(lower.join("low2"), b"second")?;
            fs::write(lower.join("lowdir/a"), b"a")?;
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
        let line = sandbox.reply()?;
        sandbox.init = line.strip_prefix("init ").context(line.clone())?.parse()?;
        Ok(sandbox)
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.dir.path().join("upper")
    }

    /// Where the overlay is mounted, inside.
    pub(crate) fn merged(&self) -> PathBuf {
        self.dir.path().join("merged")
    }

    pub(crate) fn init(&self) -> u32 {
        self.init
    }

    pub(crate) fn target(&self) -> Result<Target> {
        Ok(Target {
            pid_ns_inode: pid_ns_inode(self.init)?,
            upper_dir: self.upper(),
        })
    }

    /// Has the sandbox do something and waits until it is done.
    pub(crate) fn run(&mut self, command: &str) -> Result<()> {
        self.send(command)?;
        self.finish(command)
    }

    pub(crate) fn send(&mut self, command: &str) -> Result<()> {
        writeln!(self.commands, "{command}")?;
        Ok(())
    }

    pub(crate) fn finish(&mut self, command: &str) -> Result<()> {
        let answer = self.reply()?;
        ensure!(answer == "ok", "{command}: {answer}");
        Ok(())
    }

    /// Has the sandbox start a process that holds these; answers its number inside.
    pub(crate) fn hold(&mut self, what: &str) -> Result<u32> {
        self.send(&format!("hold {what}"))?;
        let line = self.reply()?;
        let pid = line
            .strip_prefix("holding ")
            .context(line.clone())?
            .parse()?;
        self.finish("hold")?;
        Ok(pid)
    }

    /// Waits for a line other than a command's answer.
    pub(crate) fn expect(&mut self, line: &str) -> Result<()> {
        let got = self.reply()?;
        ensure!(got == line, "{got} instead of {line}");
        Ok(())
    }

    /// Whether the sandbox has answered.
    pub(crate) fn answered(&self) -> Result<bool> {
        self.readable(Duration::ZERO)
    }

    fn reply(&mut self) -> Result<String> {
        ensure!(self.readable(PATIENCE)?, "the sandbox does not answer");
        let mut line = String::new();
        ensure!(
            self.replies.read_line(&mut line)? > 0,
            "the sandbox ended (is this root?)"
        );
        Ok(line.trim_end().to_owned())
    }

    fn readable(&self, limit: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(self.replies.get_ref(), PollFlags::IN)];
        Ok(!self.replies.buffer().is_empty() || poll(&mut fds, Some(&limit.try_into()?))? > 0)
    }

    /// Paths of the upper, relative to it, by inode. Whiteouts are left out: all share one inode.
    pub(crate) fn paths(&self) -> Result<HashMap<u64, Vec<String>>> {
        let root = self.upper();
        let mut found: HashMap<u64, Vec<String>> = HashMap::new();
        let mut todo = vec![root.clone()];
        while let Some(path) = todo.pop() {
            let meta = fs::symlink_metadata(&path)?;
            if meta.file_type().is_char_device() && meta.rdev() == 0 {
                continue;
            }
            let name = path
                .strip_prefix(&root)?
                .to_str()
                .context("name")?
                .to_owned();
            found.entry(meta.ino()).or_default().push(name);
            if meta.is_dir() {
                for entry in fs::read_dir(&path)? {
                    todo.push(entry?.path());
                }
            }
        }
        Ok(found)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let init = i32::try_from(self.init).ok().and_then(Pid::from_raw);
        let init = init.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let _ = self.stage.kill(); // the first process of the namespace dies with it, and all others with that
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
pub(crate) fn scratch() -> Result<TempDir> {
    let mut reasons = Vec::new();
    for base in [std::env::temp_dir(), PathBuf::from("/var/tmp")] {
        match supports(&base) {
            Ok(()) => {
                return Ok(tempfile::Builder::new()
                    .prefix("tp-inspector-")
                    .tempdir_in(base)?);
            }
            Err(reason) => reasons.push(reason),
        }
    }
    bail!(
        "these tests need a temporary directory on ext4: {}",
        reasons.join("; ")
    )
}

/// A sandbox under an inspector of its own.
pub(crate) struct Watched {
    pub(crate) sandbox: Sandbox,
    pub(crate) inspector: Inspector,
    pub(crate) slot: SandboxSlot,
}

impl Watched {
    pub(crate) fn start(options: &InspectorOptions) -> Result<Self> {
        let sandbox = Sandbox::start()?;
        let inspector = Inspector::load(options)?;
        let slot = inspector.register(&sandbox.target()?)?;
        let first = inspector.take(slot)?;
        ensure!(
            matches!(&first.files, FileEffects::Everything { reason } if reason.contains("first")),
            "the first reading has to be in doubt: {:?}",
            first.files
        );
        Ok(Self {
            sandbox,
            inspector,
            slot,
        })
    }

    pub(crate) fn take(&self) -> Result<Effects> {
        Ok(self.inspector.take(self.slot)?)
    }

    /// The end of a turn as the scheduler does it: take, then re-arm what was dirty.
    pub(crate) fn end_turn(&self) -> Result<()> {
        let dirty = self.dirty_paths(&self.take()?)?;
        let failed = rearm::paths(&self.sandbox.upper(), &dirty)?;
        ensure!(failed.is_empty(), "{failed:?}");
        // For what has no path yet, and so was not looked at; and for kernels whose time stamps move with the tick only.
        Moment::now().outlast();
        Ok(())
    }

    /// What a host does after re-arming on kernels whose time stamps move with the tick only.
    pub(crate) fn wait_if_coarse(&self) {
        if !multigrain() {
            Moment::now().outlast();
        }
    }

    /// Dirty paths of the upper; dirty inodes elsewhere (the work directory) have none.
    pub(crate) fn dirty_paths(&self, effects: &Effects) -> Result<BTreeSet<String>> {
        let FileEffects::Inodes(inodes) = &effects.files else {
            bail!("unexpected doubt: {:?}", effects.files);
        };
        let dev = fs::metadata(self.sandbox.upper())?.dev();
        let paths = self.sandbox.paths()?;
        let mut dirty = BTreeSet::new();
        for inode in inodes {
            ensure!(inode.dev == dev, "device {} instead of {dev}", inode.dev);
            dirty.extend(paths.get(&inode.ino).into_iter().flatten().cloned());
        }
        Ok(dirty)
    }

    /// A reading of the tasks after all of them have come to rest.
    pub(crate) fn settled(&self) -> Result<TaskTable> {
        let start = Instant::now();
        let mut before = self.inspector.tasks(self.slot)?;
        while start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
            let now = self.inspector.tasks(self.slot)?;
            if now.ran_since(&before).is_empty() {
                return Ok(now);
            }
            before = now;
        }
        bail!("the sandbox does not come to rest: {before:?}")
    }
}

/// Whether the kernel has multigrain time stamps (6.13).
fn multigrain() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release.split('.').map_while(|p| p.parse::<u32>().ok());
    (parts.next(), parts.next()) >= (Some(6), Some(13))
}

/// Inode of a path, without following.
pub(crate) fn inode(path: &Path) -> Result<u64> {
    Ok(fs::symlink_metadata(path)?.ino())
}
