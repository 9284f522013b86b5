//! What goes wrong outside: processes that cannot be dumped, a missing CRIU, damaged and full disks, death in the middle of an import.
//!
//! In each: a clear error with the right exit code, the sandbox still running or declared dead, every committed checkpoint still restorable.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tidepool_cluster_tests::{TestHost, rootfs};

fn code(exec: &Value) -> Option<u64> {
    exec["status"]["code"].as_u64()
}

/// A process that nobody may look at: its parent traces it.
const TRACED: &str = r#"setsid python3 -c '
import ctypes, os, time
child = os.fork()
if child == 0:
    time.sleep(1000)
assert ctypes.CDLL(None).ptrace(16, child, 0, 0) == 0
open("/tmp/traced", "w").close(); time.sleep(1000)' >/dev/null 2>&1 & echo $! > /tmp/pid
for i in $(seq 100); do test -e /tmp/traced && exit; sleep 0.05; done; exit 9"#;

#[test]
fn a_process_that_cannot_be_dumped_is_told_and_the_sandbox_runs_on() {
    let host = TestHost::new();
    host.create("a");
    let good = host.exec("a", "echo kept > /root/kept");
    let failed = host.cli(["exec", "a", "--key", "k", "--", "sh", "-c", TRACED]);
    assert_eq!(failed.code, 1, "{failed:?}");
    assert!(
        failed.stdout.contains("traced") && failed.stdout.contains("status 0"),
        "{failed:?}"
    );
    let shown = host.cli(["sandbox", "show", "a"]).json();
    assert_eq!(shown["state"], "running");
    assert!(
        shown["capture_error"]
            .as_str()
            .unwrap_or_default()
            .contains("traced"),
        "{shown}"
    );
    assert_eq!(
        shown["checkpoint"], good["turn"]["checkpoint"],
        "the last checkpoint stands"
    );
    // With the cause gone, asking again with the same key commits the turn; nothing runs twice.
    let id = shown["id"].as_str().unwrap();
    for pid in host.processes(id) {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if line.starts_with(b"python3") {
            Command::new("kill")
                .args(["-9", &pid.to_string()])
                .status()
                .unwrap();
        }
    }
    let again = host
        .cli(["exec", "a", "--key", "k", "--", "sh", "-c", TRACED])
        .json();
    assert_eq!(code(&again), Some(0), "{again}");
    assert_eq!(
        host.cli(["sandbox", "show", "a"]).json()["capture_error"],
        Value::Null
    );
    host.kill_sandbox(id);
    std::thread::sleep(Duration::from_millis(200));
    host.cli(["restore", "a"]).json();
    assert_eq!(
        code(&host.exec("a", "test -e /root/kept -a -e /tmp/traced")),
        Some(0)
    );
}

#[test]
fn without_criu_files_are_safe_and_processes_are_refused() {
    let host = TestHost::with_criu(Path::new("/nonexistent/criu"));
    let status = host.cli(["status"]).json();
    assert!(
        status["warnings"].to_string().contains("/nonexistent/criu"),
        "{status}"
    );
    host.create("a");
    let files = host.exec("a", "echo 1 > /root/f");
    assert_eq!(files["turn"]["verdict"], "files");
    let refused = host.cli([
        "exec",
        "a",
        "--",
        "sh",
        "-c",
        "setsid sleep 1000 >/dev/null 2>&1 &",
    ]);
    assert_eq!(refused.code, 12, "{refused:?}");
    assert!(refused.stdout.contains("CRIU"), "{refused:?}");
    assert_eq!(
        host.cli(["sandbox", "show", "a"]).json()["state"],
        "running"
    );
    // Without the process, turns are committed again.
    let after = host.exec(
        "a",
        "pkill -x sleep; while pgrep -x sleep; do :; done; echo 2 > /root/f",
    );
    assert_eq!(after["turn"]["verdict"], "files", "{after}");
    host.cli(["restore", "--force", "a"]).json();
    assert_eq!(code(&host.exec("a", "grep -q 2 /root/f")), Some(0));
}

fn segment_files(store: &Path) -> Vec<PathBuf> {
    let dir = fs::read_dir(store.join("bodies")).expect("the store's bodies");
    let paths = dir.flatten().map(|entry| entry.path());
    paths.filter(|path| path.is_file()).collect()
}

#[test]
fn damaged_chunks_are_reported_and_never_restored() {
    let mut host = TestHost::new();
    host.create("a");
    host.create("b");
    host.exec("a", "head -c 3000000 /dev/urandom > /root/noise");
    let id = host.cli(["sandbox", "show", "a"]).json()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    host.stop();
    let files = segment_files(&host.state().join("store"));
    assert!(!files.is_empty(), "bodies lie in segment files");
    for path in &files {
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let len = file.metadata().unwrap().len();
        // One bit in every 8 KiB, past the head and before the foot of the file.
        for at in (4096..len.saturating_sub(4096)).step_by(8192) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        }
    }
    host.start();
    let failed = host.cli(["restore", "--force", "a"]);
    assert_eq!(failed.code, 13, "{failed:?}");
    let shown = host.cli(["sandbox", "show", "a"]).json();
    assert_eq!(shown["state"], "dead", "{shown}");
    let mut left = host.left_behind(std::slice::from_ref(&id));
    left.retain(|l| l.contains(&id));
    assert_eq!(left, Vec::<String>::new());
    // What needs no damaged chunk goes on.
    assert_eq!(code(&host.exec("b", "true")), Some(0));
}

#[test]
fn a_full_disk_refuses_turns_and_recovers() {
    let host = TestHost::with_disk(700);
    host.create("a");
    host.exec("a", "echo kept > /root/kept");
    let filled = host.cli([
        "exec",
        "a",
        "--",
        "sh",
        "-c",
        "head -c 1000000000 /dev/urandom > /root/big; true",
    ]);
    assert_eq!(filled.code, 12, "{filled:?}");
    let shown = host.cli(["sandbox", "show", "a"]).json();
    assert_eq!(shown["state"], "running", "{shown}");
    // With room again turns are committed again, and what was committed before is all there.
    let freed = host.cli([
        "exec",
        "a",
        "--",
        "sh",
        "-c",
        "rm /root/big; echo more > /root/more",
    ]);
    assert_eq!(freed.code, 0, "{freed:?}\n{}", host.log());
    host.cli(["restore", "--force", "a"]).json();
    assert_eq!(
        code(&host.exec(
            "a",
            "grep -q kept /root/kept && grep -q more /root/more && test ! -e /root/big"
        )),
        Some(0)
    );
}

#[test]
fn death_in_an_import_leaves_nothing_half_done() {
    let mut host = TestHost::empty();
    for delay in [50, 400, 1200] {
        let args = ["image", "import", "small"].map(OsStr::new);
        let mut child = host
            .command(args.into_iter().chain([rootfs().as_os_str()]))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        host.kill();
        child.wait().unwrap();
        host.start();
        let images = fs::read_dir(host.state().join("fs/images"))
            .unwrap()
            .count();
        let known = host.cli(["image", "list"]).json().as_array().unwrap().len();
        assert!(
            images <= known.max(1),
            "{images} directories, {known} images"
        );
    }
    let args = ["image", "import", "small"].map(OsStr::new);
    host.cli(args.into_iter().chain([rootfs().as_os_str()]))
        .json();
    host.create("a");
    assert_eq!(code(&host.exec("a", "true")), Some(0));
}

#[test]
fn a_hostile_archive_is_refused_by_name() {
    let host = TestHost::empty();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "x").unwrap();
    let tar = |name: &str, args: &[&str]| {
        let path = dir.path().join(name);
        let done = Command::new("tar")
            .arg("-C")
            .arg(dir.path())
            .args(["-P", "-cf"])
            .arg(&path)
            .args(args)
            .status()
            .unwrap();
        assert!(done.success());
        path
    };
    let hostile = [
        tar("dots.tar", &["--transform=s,^f$,../../escaped,", "f"]),
        tar("absolute.tar", &["--transform=s,^f$,/escaped,", "f"]),
        tar("device.tar", &["/dev/null"]),
    ];
    for path in &hostile {
        let said = host.cli([
            "image".as_ref(),
            "import".as_ref(),
            "x".as_ref(),
            path.as_os_str(),
        ]);
        assert_eq!(said.code, 2, "{}: {said:?}", path.display());
    }
    // Cut short in the middle of a file.
    let whole = fs::read(tar("cut.tar", &["f", "cut.tar", "dots.tar"])).unwrap();
    fs::write(dir.path().join("cut.tar"), &whole[..whole.len() / 3]).unwrap();
    let said = host.cli([
        "image".as_ref(),
        "import".as_ref(),
        "x".as_ref(),
        dir.path().join("cut.tar").as_os_str(),
    ]);
    assert_eq!(said.code, 2, "{said:?}");
    assert_eq!(host.cli(["image", "list"]).json(), Value::Array(Vec::new()));
    assert_eq!(
        fs::read_dir(host.state().join("fs/images"))
            .unwrap()
            .count(),
        0
    );
    assert!(!Path::new("/escaped").exists());
}
