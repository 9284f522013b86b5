//! A Tidepool host under test: the real daemon in a process of its own, the real command line, a real root filesystem.
//!
//! A [`TestHost`] owns everything it starts; dropping it removes every sandbox, ends the daemon and deletes its state, also when the test
//! failed or the daemon was killed. Nothing is shared between two of them but the machine.

pub mod cluster;
pub mod load;
mod store;

pub use store::{StoreProcess, issue};

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long the daemon may take to start.
const START_TIME: Duration = Duration::from_secs(60);

/// A program of this workspace, built beside the tests.
///
/// # Panics
/// Where it was not built: `cargo build --workspace` comes first.
pub fn program(name: &str) -> PathBuf {
    let me = std::env::current_exe().expect("the path of the test program");
    let dir = me
        .parent()
        .and_then(Path::parent)
        .expect("tests lie in target/debug/deps");
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} is not there: run `cargo build --workspace` first",
        path.display()
    );
    path
}

/// The small root filesystem, built once a machine and only read.
///
/// # Panics
/// Where it cannot be built.
pub fn rootfs() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        if let Some(path) = std::env::var_os("TIDEPOOL_TEST_ROOTFS") {
            return path.into();
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ops/rootfs");
        let out = Command::new(script)
            .arg("small")
            .stderr(Stdio::inherit())
            .output()
            .expect("ops/rootfs runs");
        assert!(out.status.success(), "ops/rootfs small failed");
        PathBuf::from(String::from_utf8(out.stdout).expect("a path").trim())
    })
}

/// A daemon with a state directory of its own.
pub struct TestHost {
    dir: tempfile::TempDir,
    daemon: Option<Child>,
    /// Used instead of the CRIU that is installed.
    criu: Option<PathBuf>,
    /// More of the daemon's options.
    options: Vec<OsString>,
    /// A file system of its own for the state, in MiB.
    disk: Option<u64>,
}

/// What a command of the command line said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Said {
    fn from(o: Output) -> Self {
        Self {
            code: o.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&o.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&o.stderr).into_owned(),
        }
    }
}

impl Said {
    /// Its JSON document.
    ///
    /// # Panics
    /// Where it failed or said none.
    pub fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl TestHost {
    /// Starts a daemon on an empty state directory, with the small root filesystem imported as `small`.
    pub fn new() -> Self {
        let host = Self::empty();
        host.import_small();
        host
    }

    /// Starts a daemon on an empty state directory.
    pub fn empty() -> Self {
        let mut host = Self::idle();
        host.start();
        host
    }

    /// Starts a daemon with the small image and another CRIU.
    pub fn with_criu(criu: &Path) -> Self {
        let mut host = Self::idle();
        host.criu = Some(criu.to_owned());
        host.start();
        host.import_small();
        host
    }

    /// Starts a daemon with the small image and these options.
    pub fn with_options(options: impl IntoIterator<Item = OsString>) -> Self {
        let mut host = Self::idle();
        host.options = options.into_iter().collect();
        host.start();
        host.import_small();
        host
    }

    /// Starts a daemon with the small image and its state on an ext4 of this many MiB.
    pub fn with_disk(mib: u64) -> Self {
        let mut host = Self::idle();
        let image = host.dir.path().join("disk.img");
        File::create(&image)
            .and_then(|f| f.set_len(mib << 20))
            .expect("a disk image");
        run(
            "mkfs.ext4",
            &["-q".as_ref(), "-F".as_ref(), image.as_os_str()],
        );
        std::fs::create_dir(host.state()).expect("a mount point");
        host.disk = Some(mib);
        run(
            "mount",
            &[
                "-o".as_ref(),
                "loop".as_ref(),
                image.as_os_str(),
                host.state().as_os_str(),
            ],
        );
        host.start();
        host.import_small();
        host
    }

    fn idle() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("tp-host-")
            .tempdir_in("/var/tmp")
            .expect("a directory for the state");
        Self {
            dir,
            daemon: None,
            criu: None,
            options: Vec::new(),
            disk: None,
        }
    }

    fn import_small(&self) {
        let args = ["image", "import", "small"].map(OsStr::new);
        self.cli(args.into_iter().chain([rootfs().as_os_str()]))
            .json();
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("host.sock")
    }

    /// What the daemons logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Starts the daemon and waits until it answers.
    pub fn start(&mut self) {
        assert!(self.daemon.is_none(), "the daemon runs already");
        self.spawn();
        let since = Instant::now();
        loop {
            if self.cli(["status"]).code == 0 {
                return;
            }
            let daemon = self.daemon.as_mut().expect("just started");
            if let Some(status) = daemon.try_wait().expect("its status can be asked") {
                panic!("the daemon ended with {status}:\n{}", self.log());
            }
            assert!(
                since.elapsed() < START_TIME,
                "the daemon does not answer:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts the daemon and waits for nothing.
    pub fn spawn(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .expect("a log file");
        let mut command = Command::new(program("tidepool-host"));
        command
            .arg("--state-dir")
            .arg(self.state())
            .arg("--socket")
            .arg(self.socket());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        command.args(&self.options);
        if let Some(criu) = self.criu.clone().or_else(criu) {
            command.arg("--criu").arg(criu);
        }
        self.daemon = Some(command.spawn().expect("the daemon starts"));
    }

    /// SIGKILL to the daemon; its sandboxes live on.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().expect("it can be killed");
            daemon.wait().expect("it ends");
        }
    }

    /// SIGTERM to the daemon, and its end.
    pub fn stop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let pid = daemon.id().to_string();
            Command::new("kill").arg(&pid).status().expect("kill runs");
            daemon.wait().expect("it ends");
        }
    }

    /// Runs the command line with `--json`.
    pub fn cli<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Said {
        self.command(args)
            .output()
            .expect("the command line runs")
            .into()
    }

    /// The command line with `--json`, to be run.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(program("tidepool"));
        command
            .arg("--socket")
            .arg(self.socket())
            .arg("--json")
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// Runs a shell command in a sandbox as one turn; answers the document of its exit.
    ///
    /// # Panics
    /// Where Tidepool failed; a command's own failure is in the answer.
    pub fn exec(&self, sandbox: &str, script: &str) -> Value {
        let said = self.cli(["exec", sandbox, "--", "sh", "-c", script]);
        serde_json::from_str(&said.stdout)
            .unwrap_or_else(|e| panic!("{e}: {said:?}\n{}", self.log()))
    }

    /// Creates a sandbox of the small image.
    pub fn create(&self, name: &str) -> Value {
        self.cli(["sandbox", "create", name, "--image", "small"])
            .json()
    }

    /// SIGKILL to every process of a sandbox, as a dying machine would.
    pub fn kill_sandbox(&self, id: &str) {
        for pid in self.processes(id) {
            let _ = Command::new("kill")
                .arg("-9")
                .arg(pid.to_string())
                .stderr(Stdio::null())
                .status();
        }
    }

    /// The host's process ids of a sandbox: those whose root lies in its directory.
    pub fn processes(&self, id: &str) -> Vec<u32> {
        let merged = self.merged(id);
        let mut pids = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<u32>().ok())
            else {
                continue;
            };
            let info =
                std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
            // The root mount of its namespace is the sandbox's overlay.
            let root = info.lines().find(|l| l.split(' ').nth(4) == Some("/"));
            if root.is_some_and(|l| {
                l.contains(&format!(
                    "upperdir={}",
                    merged.with_file_name("upper").display()
                ))
            }) {
                pids.push(pid);
            }
        }
        pids
    }

    /// A sandbox's directory on this host.
    pub fn sandbox_dir(&self, id: &str) -> PathBuf {
        self.state().join("fs/sandboxes").join(id)
    }

    fn merged(&self, id: &str) -> PathBuf {
        self.sandbox_dir(id).join("merged")
    }

    /// Mounts, namespaces and control groups that name this host's state or its sandboxes.
    pub fn left_behind(&self, ids: &[String]) -> Vec<String> {
        let mut left = Vec::new();
        let state = self.state().display().to_string();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        left.extend(
            mounts
                .lines()
                .filter(|l| l.contains(&state))
                .map(|l| format!("mount {l}")),
        );
        for id in ids {
            left.extend(
                self.processes(id)
                    .iter()
                    .map(|pid| format!("process {pid} of {id}")),
            );
            let found = Command::new("find")
                .args(["/sys/fs/cgroup", "/run/netns", "-name"])
                .arg(format!("*{id}*"))
                .stderr(Stdio::null())
                .output()
                .expect("find runs");
            left.extend(
                String::from_utf8_lossy(&found.stdout)
                    .lines()
                    .map(|l| format!("left {l}")),
            );
        }
        left
    }
}

impl Default for TestHost {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
        self.kill();
        self.criu = None;
        // A daemon on the same state ends what its predecessors left running.
        self.spawn();
        let mut answered = false;
        for _ in 0..200 {
            let said = self.cli(["sandbox", "list"]);
            if said.code == 0 {
                answered = true;
                let list: Value = serde_json::from_str(&said.stdout).unwrap_or_default();
                for sandbox in list.as_array().into_iter().flatten() {
                    if let Some(id) = sandbox["id"].as_str() {
                        self.cli(["sandbox", "rm", "--forget", id]);
                    }
                }
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        if !answered {
            eprintln!(
                "--- the daemon did not come back to clean up\n{}",
                self.log()
            );
        }
        self.stop();
        if self.disk.is_some() {
            let _ = Command::new("umount").arg(self.state()).status();
        }
    }
}

fn run(program: &str, args: &[&OsStr]) {
    let status = Command::new(program).args(args).status().expect("it runs");
    assert!(status.success(), "{program} {args:?}");
}

/// CRIU as the scripts install it, where the environment does not name it.
fn criu() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("TIDEPOOL_CRIU") {
        return Some(path.into());
    }
    let home = std::env::var_os("HOME")?;
    let path = Path::new(&home).join(".cache/tidepool/criu/criu");
    path.exists().then_some(path)
}
