//! Every kind of effect through the daemon: what a turn is judged to be, what its evidence says, and, for every probe set, that a restore brings it back.
//!
//! The operations on files one by one, and what the probes say of each, are the inspector's own tests; see docs/effects.md.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tidepool_cluster_tests::TestHost;

fn with_probes(set: &str) -> TestHost {
    TestHost::with_options(["--probes".into(), OsString::from(set)])
}

fn verdict(exec: &Value) -> &str {
    exec["turn"]["verdict"]
        .as_str()
        .unwrap_or_else(|| panic!("no verdict in {exec}"))
}

/// Runs a command that has to succeed, and its turn to be judged so.
fn turn(host: &TestHost, script: &str, expected: &[&str]) -> Value {
    let done = host.exec("a", script);
    assert_eq!(done["status"]["code"], 0, "{script}: {done}");
    assert!(
        expected.contains(&verdict(&done)),
        "{script}: not {expected:?}: {done}\n{}",
        host.log()
    );
    done
}

fn evidence(exec: &Value, list: &str) -> String {
    exec["turn"]["evidence"][list].to_string()
}

/// A process that sleeps, with a fifo open and a port to listen on, in whose state others can meddle.
const SLEEPER: &str = r#"
import ctypes, mmap, os, signal, socket
os.mkfifo("/root/fifo")
fifo = os.open("/root/fifo", os.O_RDWR)
s = socket.socket(); s.bind(("127.0.0.1", 9100)); s.listen(8)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
held = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held[:5] = b"still"
open("/root/at", "w").write(str(ctypes.addressof(ctypes.c_char.from_buffer(held))))
open("/root/ready", "w").write(str(os.getpid()))
while True:
    signal.pause()
"#;

fn start_sleeper(host: &TestHost) {
    let start = format!(
        "cat > /root/sleeper.py <<'X'\n{SLEEPER}X\nsetsid python3 /root/sleeper.py </dev/null >/dev/null 2>&1 &\n\
         for i in $(seq 200); do test -s /root/ready && exit 0; sleep 0.05; done; exit 1"
    );
    turn(host, &start, &["full"]);
}

/// The same for each probe set that can be loaded.
fn effects_come_back(set: &str) {
    let mut host = with_probes(set);
    let shown = host.cli(["host", "show"]).json();
    assert_eq!(shown["probe_set"], set, "{shown}");
    let created = host.create("a");
    let id = created["id"].as_str().expect("an id").to_owned();

    turn(&host, "cat /etc/hostname; ls / >/dev/null", &["clean"]);
    let made = "mkdir -p /root/d/e /root/links && echo data > /root/d/e/f && ln /root/d/e/f /root/links/g && ln -s nowhere /root/s && mkfifo /root/p";
    turn(&host, made, &["files"]);
    turn(
        &host,
        "mv /root/d /root/moved && rm -rf /usr/share/doc /etc/hostname; mkdir -p /opt/x && rm -rf /opt && mkdir /opt",
        &["files"],
    );
    let stamps = "chmod 751 /root/moved/e && chown 12:34 /root/s -h && touch -d 2001-02-03T04:05:06 /root/links/g && truncate -s 1M /root/sparse";
    turn(&host, stamps, &["files"]);
    let xattr = "python3 -c 'import os; os.setxattr(\"/root/links/g\", \"user.k\", b\"v\")'";
    turn(&host, xattr, &["files"]);
    let mapped = "python3 -c 'import mmap; f = open(\"/root/sparse\", \"r+b\"); m = mmap.mmap(f.fileno(), 0); m[5000:5003] = b\"map\"'";
    turn(&host, mapped, &["files"]);
    turn(&host, "head -c 3 /dev/zero >> /root/links/g", &["files"]);
    // Net effects.
    for nothing in [
        "touch /root/x && rm /root/x",
        "mkdir /root/y && rmdir /root/y",
        "cp -p /root/links/g /root/keep && rm /root/keep",
        "cat /root/links/g > /dev/null; sh -c 'exit 0'; sleep 0.01",
        "mv /root/s /root/t && mv /root/t /root/s",
    ] {
        turn(&host, nothing, &["clean"]);
    }
    // With a process and a memory file.
    start_sleeper(&host);
    turn(&host, "echo shared > /dev/shm/m", &["processes", "full"]);
    let state = "cd /root && find . -printf '%p %y %m %U:%G %s %T@ %l\n' | grep -v '^\\. ' | sort; cat moved/e/f links/g; od -An -c -j 5000 -N 3 sparse; cat /dev/shm/m; kill -0 $(cat ready) && echo alive; ls -A /opt /etc/hostname /usr/share/doc 2>&1; python3 -c 'import os; print(os.getxattr(\"/root/links/g\", \"user.k\"))'";
    let before = host.exec("a", state);
    host.kill();
    host.kill_sandbox(&id);
    std::thread::sleep(std::time::Duration::from_millis(200));
    remove(&host.sandbox_dir(&id));
    host.start();
    let restored = host.cli(["restore", "a"]).json();
    assert_eq!(restored["verified"], true, "{restored}");
    assert_eq!(restored["processes_restored"], 1, "{restored}");
    let after = host.exec("a", state);
    assert_eq!(
        before["stdout_base64"], after["stdout_base64"],
        "{before}\n{after}"
    );
    assert!(
        before["stdout_base64"]
            .as_str()
            .is_some_and(|s| s.len() > 400),
        "{before}"
    );
}

fn remove(dir: &Path) {
    let _ = Command::new("umount")
        .arg("-l")
        .arg(dir.join("merged"))
        .output();
    std::fs::remove_dir_all(dir).expect("the directory can be removed");
}

#[test]
fn effects_come_back_with_ctime() {
    effects_come_back("ctime");
}

#[test]
fn effects_come_back_with_ext4() {
    effects_come_back("ext4");
}

#[test]
fn effects_come_back_with_syscalls() {
    effects_come_back("syscalls");
}

#[test]
fn effects_come_back_with_a_walk() {
    effects_come_back("walk");
}

#[test]
fn a_set_that_cannot_be_loaded_is_refused_and_fallen_back_from() {
    let host = with_probes("auto");
    let shown = host.cli(["host", "show"]).json();
    assert_eq!(shown["probe_set"], "ctime", "{shown}");
    let refused = Command::new(tidepool_cluster_tests::program("tidepool-host"))
        .args(["--check", "--probes", "walk"])
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(said.contains("inspector: walk"), "{said}");
}

#[test]
fn what_happens_to_a_process_that_does_not_run_is_seen() {
    let host = TestHost::new();
    let created = host.create("a");
    let id = created["id"].as_str().expect("an id");
    start_sleeper(&host);
    // It sleeps on, also after it was dumped: nothing is asked for.
    for _ in 0..3 {
        turn(&host, "true", &["clean"]);
    }
    for (meddle, what) in [
        (
            "python3 -c 'import os; f = os.open(\"/root/fifo\", os.O_RDWR); os.write(f, b\"left behind\")'",
            "fifo",
        ),
        (
            "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 9100))'",
            "socket:",
        ),
        ("kill -USR1 $(cat /root/ready)", "signals"),
        (
            "python3 -c 'import resource; resource.prlimit(int(open(\"/root/ready\").read()), resource.RLIMIT_NOFILE, (77, 77))'",
            "limits",
        ),
        (
            "python3 -c 'import os; at = int(open(\"/root/at\").read()); os.pwrite(os.open(\"/proc/%s/mem\" % open(\"/root/ready\").read(), os.O_RDWR), b\"poked\", at)'",
            "memory of process",
        ),
    ] {
        let seen = turn(&host, meddle, &["processes", "full"]);
        let said = evidence(&seen, "processes");
        assert!(
            said.contains("process ") && said.contains(what),
            "{meddle}: {seen}"
        );
        turn(&host, "true", &["clean"]);
    }
    // Stopped it is dumped as stopped. Whether it may rest after that depends on where it was stopped: outside a system call it is
    // dumped at each boundary.
    let state =
        |state: &str| format!("read -r a b s c < /proc/$(cat /root/ready)/stat; [ $s = {state} ]");
    turn(
        &host,
        "kill -STOP $(cat /root/ready)",
        &["processes", "full"],
    );
    for _ in 0..3 {
        turn(&host, &state("T"), &["clean", "processes"]);
    }
    host.kill_sandbox(id);
    std::thread::sleep(std::time::Duration::from_millis(200));
    let restored = host.cli(["restore", "a"]).json();
    assert_eq!(restored["processes_restored"], 1, "{restored}");
    host.exec("a", &state("T"));
    let peek = "python3 -c 'import os; at = int(open(\"/root/at\").read()); print(os.pread(os.open(\"/proc/%s/mem\" % open(\"/root/ready\").read(), os.O_RDONLY), 5, at) == b\"poked\")' | grep True";
    let peeked = host.exec("a", peek);
    assert_eq!(peeked["status"]["code"], 0, "{peeked}");
    turn(&host, &state("T"), &["clean", "processes"]);
    turn(
        &host,
        "kill -CONT $(cat /root/ready)",
        &["processes", "full"],
    );
    turn(&host, &state("S"), &["clean"]);
    turn(
        &host,
        "kill -9 $(cat /root/ready); sleep 0.1",
        &["processes", "full"],
    );
    turn(&host, "true", &["clean"]);
}

#[test]
fn memory_and_ipc_are_seen() {
    let host = TestHost::new();
    host.create("a");
    turn(&host, "echo x > /dev/shm/x", &["processes", "full"]);
    turn(&host, "cat /dev/shm/x", &["clean"]);
    turn(&host, "echo y > /dev/shm/x", &["processes", "full"]);
    turn(&host, "rm /dev/shm/x", &["processes", "full"]);
    turn(&host, "true", &["clean"]);
    // Objects without a process: their contents cannot be read from outside, so they count at every turn.
    let shm = "python3 -c 'import ctypes; print(ctypes.CDLL(None).shmget(77, 4096, 0o1600))'";
    for _ in 0..2 {
        turn(&host, shm, &["processes", "full"]);
    }
    let gone = "python3 -c 'import ctypes; c = ctypes.CDLL(None); assert c.shmctl(c.shmget(77, 0, 0), 0, None) == 0'";
    turn(&host, gone, &["processes", "full"]);
    turn(&host, "true", &["clean"]);
}

#[test]
fn what_a_sandbox_may_not_change_is_refused() {
    let host = TestHost::new();
    host.create("a");
    for refused in [
        "mount -t tmpfs none /mnt",
        "unshare -m true",
        "unshare -r true",
        "ip link add x type dummy",
        "hostname other",
        "python3 -c 'import os; os.open(\"/proc/sys/kernel/hostname\", os.O_WRONLY)'",
        "test -w /sys/fs/cgroup/memory.max || test -w /sys/fs/cgroup/memory/memory.limit_in_bytes",
        "mkdir /sys/fs/cgroup/x",
        "python3 -c 'import ctypes, os, sys; c = ctypes.CDLL(None, use_errno=True); c.process_vm_writev(os.getpid(), 0, 0, 0, 0, 0); sys.exit(ctypes.get_errno() == 1)'",
    ] {
        let done = host.exec("a", refused);
        assert_ne!(done["status"]["code"], 0, "{refused}: {done}");
        // The command's own lock file, at most.
        assert!(
            matches!(verdict(&done), "clean" | "files"),
            "{refused}: {done}"
        );
        let named = evidence(&done, "not_covered");
        assert_eq!(named, "[]", "{refused}: {done}");
    }
}

#[test]
fn what_is_not_covered_is_named() {
    let host = TestHost::new();
    let dir = tempfile::tempdir().expect("a directory");
    let mount = format!("{}:/host", dir.path().display());
    let args = [
        "sandbox", "create", "a", "--image", "small", "--mount", &mount,
    ];
    let created = host.cli(args).json();
    assert!(
        created["not_covered"].to_string().contains("/host"),
        "{created}"
    );
    let seen = turn(&host, "echo x > /host/f", &["clean"]);
    assert!(evidence(&seen, "not_covered").contains("/host"), "{seen}");
    assert_eq!(
        std::fs::read(dir.path().join("f")).expect("written"),
        b"x\n"
    );
}

#[test]
fn ignored_paths_and_rewritten_files_ask_for_no_checkpoint() {
    let host = TestHost::with_options(["--ignore".into(), "*.pyc".into()]);
    let args = [
        "sandbox",
        "create",
        "a",
        "--image",
        "small",
        "--ignore",
        "/root/.cache/",
        "--agent",
        "claude",
    ];
    let created = host.cli(args).json();
    let rules = created["ignore"].to_string();
    assert!(
        ["*.pyc", "/root/.cache/", "**/.claude/projects/"]
            .iter()
            .all(|r| rules.contains(r)),
        "{created}"
    );
    assert_eq!(created["agent"], "claude", "{created}");
    let shown = host.cli(["sandbox", "show", "a"]).json();
    assert_eq!(shown["ignore"], created["ignore"]);

    turn(
        &host,
        "mkdir -p /root/.cache /root/.claude && echo one > /root/f && echo 1 > /root/.claude/settings.json",
        &["files"],
    );
    let ignored = turn(
        &host,
        "echo x > /root/.cache/x; mkdir -p /srv; echo x > /root/m.pyc",
        &["files", "clean"],
    );
    if verdict(&ignored) == "clean" {
        assert!(
            evidence(&ignored, "reasons").contains("ignored"),
            "{ignored}"
        );
    }
    let ignored = turn(
        &host,
        "mkdir -p /root/.claude/projects/p && echo l >> /root/.claude/projects/p/1.jsonl; echo y > /root/.cache/y; echo z > /root/m.pyc",
        &["clean"],
    );
    let said = evidence(&ignored, "reasons");
    assert!(
        said.contains("ignored") && said.contains(".claude/projects"),
        "{ignored}"
    );
    turn(&host, "echo 2 > /root/.claude/settings.json", &["files"]);

    // The same bytes again; a stamp set by hand; an empty file, of which the stamp is all.
    let rewritten = turn(&host, "sleep 0.02; echo one > /root/f", &["clean"]);
    assert!(
        evidence(&rewritten, "reasons").contains("same contents"),
        "{rewritten}"
    );
    turn(&host, "touch -d 2001-02-03T04:05:06 /root/f", &["files"]);
    turn(&host, ": > /root/stamp", &["files"]);
    turn(&host, "sleep 0.02; touch /root/stamp", &["files"]);
    // What was passed over comes with the next checkpoint.
    turn(&host, "echo two > /root/f", &["files"]);
    let id = created["id"].as_str().expect("an id");
    host.kill_sandbox(id);
    std::thread::sleep(std::time::Duration::from_millis(200));
    host.cli(["restore", "a"]).json();
    let there = host.exec(
        "a",
        "cat /root/.cache/y /root/f /root/.claude/projects/p/1.jsonl",
    );
    assert_eq!(there["status"]["code"], 0, "{there}");

    for (option, value, why) in [
        ("--ignore", "[z-a]", "cannot be understood"),
        ("--agent", "nobody", "is known"),
    ] {
        let refused = host.cli(["sandbox", "create", "b", "--image", "small", option, value]);
        assert_eq!(refused.code, 2, "{refused:?}");
        assert!(format!("{refused:?}").contains(why), "{refused:?}");
    }
}
