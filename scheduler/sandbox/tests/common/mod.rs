//! What the tests of this crate share: a small root file system made from this machine's own programs, and sandboxes that
//! are gone when their test ends, however it ends.
//!
//! These tests need root, runc and CRIU, and fail where they are missing.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "not every test file uses everything"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tidepool_sandbox::{
    Finished, InitClient, JobRequest, Layers, Runtime, RuntimeConfig, SandboxName, SandboxSpec,
};

pub const KEY: [u8; 32] = [7; 32];

const PROGRAMS: &[&str] = &[
    "bash",
    "cat",
    "chmod",
    "cp",
    "date",
    "dd",
    "echo",
    "env",
    "false",
    "head",
    "id",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mv",
    "ps",
    "python3",
    "pwd",
    "readlink",
    "rm",
    "seq",
    "sha256sum",
    "sleep",
    "stat",
    "stty",
    "tail",
    "tee",
    "touch",
    "tr",
    "true",
    "tty",
    "uname",
    "wc",
    "yes",
];

pub fn sh(script: &str) -> String {
    let out = Command::new("bash")
        .args(["-c", script])
        .output()
        .expect("bash runs");
    assert!(
        out.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).expect("text")
}

fn copy_into(root: &Path, file: &Path) {
    let target = root.join(file.strip_prefix("/").expect("absolute"));
    fs::create_dir_all(target.parent().expect("a parent")).expect("a directory");
    if !target.exists() {
        fs::copy(file, &target).unwrap_or_else(|e| panic!("copying {}: {e}", file.display()));
    }
}

/// The libraries a program is linked with, and its loader.
fn libraries(file: &Path) -> BTreeSet<PathBuf> {
    let out = Command::new("ldd").arg(file).output().expect("ldd runs");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.split_whitespace()
        .filter(|w| w.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

fn build_rootfs(root: &Path) {
    for dir in [
        "usr/bin",
        "usr/lib",
        "usr/lib64",
        "etc",
        "tmp",
        "root",
        "home/ann",
        "var",
        "proc",
        "sys",
        "dev",
    ] {
        fs::create_dir_all(root.join(dir)).expect("a directory");
    }
    for (link, to) in [
        ("bin", "usr/bin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
        ("sbin", "usr/bin"),
    ] {
        std::os::unix::fs::symlink(to, root.join(link)).expect("a link");
    }
    let mut libs = BTreeSet::new();
    for program in PROGRAMS {
        let file = Path::new("/usr/bin").join(program);
        let real = fs::canonicalize(&file)
            .unwrap_or_else(|e| panic!("these tests need {}: {e}", file.display()));
        libs.extend(libraries(&real));
        fs::copy(&real, root.join("usr/bin").join(program)).expect("copied");
    }
    fs::copy(root.join("usr/bin/bash"), root.join("usr/bin/sh")).expect("copied");
    let stdlib = sh("/usr/bin/python3 -c 'import os; print(os.path.dirname(os.__file__))'");
    let stdlib = Path::new(stdlib.trim());
    let into = root.join(stdlib.strip_prefix("/").expect("absolute"));
    fs::create_dir_all(&into).expect("a directory");
    sh(&format!(
        "cd {} && tar -c --exclude=__pycache__ --exclude=test --exclude=idlelib --exclude=tkinter --exclude=dist-packages . \
         | tar -x -C {}",
        stdlib.display(),
        into.display()
    ));
    for module in sh(&format!("ls {}/lib-dynload/*.so", stdlib.display())).lines() {
        libs.extend(libraries(Path::new(module)));
    }
    for lib in libs {
        copy_into(root, &lib);
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/bash\nann:x:1000:100:Ann:/home/ann:/bin/bash\n",
    )
    .expect("written");
    fs::write(
        root.join("etc/group"),
        "root:x:0:\nwheel:x:10:ann\nusers:x:100:\n",
    )
    .expect("written");
    std::os::unix::fs::chown(root.join("home/ann"), Some(1000), Some(100)).expect("given");
    sh(&format!("chmod 1777 {}", root.join("tmp").display()));
}

/// A root file system with a shell, the usual tools and Python. Built once and kept.
pub fn rootfs() -> PathBuf {
    let home = std::env::var_os("HOME").expect("HOME is set");
    let cache = Path::new(&home).join(".cache/tidepool/test-rootfs");
    fs::create_dir_all(&cache).expect("a cache directory");
    let lock = fs::File::create(cache.join("sandbox.lock")).expect("a lock file");
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).expect("the lock");
    let list = PROGRAMS.join(" ");
    let sum = list.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    let root = cache.join(format!("sandbox-{sum:016x}"));
    if !root.exists() {
        let part = cache.join(format!("part-{}", std::process::id()));
        let _ = fs::remove_dir_all(&part);
        build_rootfs(&part);
        fs::rename(&part, &root).expect("moved into place");
    }
    root
}

/// A host of its own: directories, a cgroup, and sandboxes that are removed at the end.
pub struct Host {
    pub runtime: Runtime,
    pub dir: tempfile::TempDir,
    pub cgroup_parent: String,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A name that no other test uses.
pub fn unique(what: &str) -> SandboxName {
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    SandboxName::new(&format!("tp-{what}-{}-{n}", std::process::id())).expect("a name")
}

pub fn spec() -> SandboxSpec {
    SandboxSpec {
        memory_bytes: Some(1 << 30),
        pids: Some(256),
        ..SandboxSpec::default()
    }
}

impl Host {
    pub async fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("tp-sandbox-")
            .tempdir()
            .expect("a directory");
        let mut cfg = RuntimeConfig::new(dir.path().join("run"), dir.path().join("state"));
        cfg.cgroup_parent = format!(
            "tp-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let cgroup_parent = cfg.cgroup_parent.clone();
        let runtime = Runtime::new(cfg).await.expect("runc is there");
        if let Err(e) = &runtime.capabilities().criu {
            panic!("these tests need CRIU: {e}");
        }
        Self {
            runtime,
            dir,
            cgroup_parent,
        }
    }

    /// Fresh layers over the test root file system.
    pub fn layers(&self, name: &SandboxName) -> Layers {
        let base = self.dir.path().join("layers").join(name.as_str());
        let at = |what: &str| {
            let dir = base.join(what);
            fs::create_dir_all(&dir).expect("a directory");
            dir
        };
        Layers {
            lower: vec![rootfs()],
            upper: at("upper"),
            work: at("work"),
            merged: base.join("merged"),
        }
    }

    /// Layers with a copy of another sandbox's changes.
    pub fn layers_with(&self, name: &SandboxName, upper: &Path) -> Layers {
        let layers = self.layers(name);
        sh(&format!(
            "cp -a {}/. {}/",
            upper.display(),
            layers.upper.display()
        ));
        layers
    }

    /// A running sandbox and a client for it.
    pub async fn sandbox(&self, what: &str) -> (SandboxName, InitClient) {
        self.sandbox_with(what, &spec()).await
    }

    pub async fn sandbox_with(&self, what: &str, spec: &SandboxSpec) -> (SandboxName, InitClient) {
        let name = unique(what);
        self.runtime
            .create(&name, spec, &self.layers(&name), &KEY)
            .await
            .expect("created");
        self.runtime.start(&name).await.expect("started");
        let client = self.runtime.connect(&name, &KEY).await.expect("connected");
        (name, client)
    }

    /// What is left of this host's sandboxes in the kernel. Ended processes may take this machine's own init a moment to
    /// reap.
    pub fn leftovers(&self) -> Vec<String> {
        for _ in 0..500 {
            let left = self.leftovers_now();
            if left.is_empty() || left.iter().any(|l| !l.starts_with("process")) {
                return left;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.leftovers_now()
    }

    fn leftovers_now(&self) -> Vec<String> {
        let own = self.dir.path().to_string_lossy().into_owned();
        let table = fs::read_to_string("/proc/self/mountinfo").expect("a mount table");
        let mut left: Vec<String> = table
            .lines()
            .filter(|l| l.contains(&own))
            .map(str::to_owned)
            .collect();
        let cgroups = sh(&format!(
            "find /sys/fs/cgroup -path '*/{}/*' -type d 2>/dev/null || true",
            self.cgroup_parent
        ));
        left.extend(cgroups.lines().map(str::to_owned));
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
                continue;
            };
            let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            if groups.contains(&format!("/{}/", self.cgroup_parent)) {
                left.push(format!("process {pid}"));
            }
        }
        left
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let runtime = self.runtime.clone();
        let clean = std::thread::spawn(move || {
            let tokio = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            tokio.block_on(async {
                for (name, _) in runtime.list().await.unwrap_or_default() {
                    if let Err(e) = runtime.destroy(&name).await {
                        eprintln!("cannot remove {name}: {e}");
                    }
                }
            });
        });
        let _ = clean.join();
        let parent = &self.cgroup_parent;
        let _ = Command::new("bash")
            .args([
                "-c",
                &format!("find /sys/fs/cgroup -depth -name '{parent}' -type d -exec rmdir {{}} +"),
            ])
            .output();
    }
}

pub fn job(id: &str, argv: &[&str]) -> JobRequest {
    let argv = argv.iter().map(|a| a.as_bytes().to_vec()).collect();
    JobRequest {
        job: id.to_owned(),
        argv,
        ..JobRequest::default()
    }
}

pub fn script(id: &str, script: &str) -> JobRequest {
    job(id, &["bash", "-c", script])
}

static JOBS: AtomicU32 = AtomicU32::new(0);

/// Runs a script in a sandbox and waits for it.
pub async fn exec(client: &InitClient, text: &str) -> Finished {
    let id = format!("job-{}", JOBS.fetch_add(1, Ordering::Relaxed));
    let running = client.spawn(script(&id, text)).await.expect("spawned");
    let done = tokio::time::timeout(Duration::from_secs(60), running.wait(1 << 20))
        .await
        .expect("it ends");
    done.expect("its end")
}

/// Runs a script that must succeed and gives its output.
pub async fn output(client: &InitClient, text: &str) -> String {
    let done = exec(client, text).await;
    let (out, err) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    assert_eq!(
        done.status,
        tidepool_sandbox::ExitStatus::Code(0),
        "{text}: {out}{err}"
    );
    out.trim().to_owned()
}

/// Waits until a script succeeds.
pub async fn eventually(client: &InitClient, text: &str) {
    for _ in 0..400 {
        if exec(client, text).await.status == tidepool_sandbox::ExitStatus::Code(0) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("never became true: {text}");
}
