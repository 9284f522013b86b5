//! One host, end to end, through the command line only.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tidepool_cluster_tests::{TestHost, rootfs};

fn verdict(exec: &Value) -> &str {
    exec["turn"]["verdict"]
        .as_str()
        .unwrap_or_else(|| panic!("no verdict in {exec}"))
}

fn text(exec: &Value) -> String {
    let data = exec["stdout_base64"].as_str().unwrap_or_default();
    let out = Command::new("base64")
        .arg("-d")
        .stdin(feed(data))
        .output()
        .expect("base64 runs");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn feed(text: &str) -> std::process::Stdio {
    let mut child = Command::new("printf")
        .args(["%s", text])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("printf runs");
    let out = child.stdout.take().expect("piped");
    // Small: it fits the pipe.
    child.wait().expect("printf ends");
    out.into()
}

fn id(sandbox: &Value) -> String {
    sandbox["id"].as_str().expect("an id").to_owned()
}

/// A counter in memory, asked over a socket; it answers one more each time.
const COUNTER: &str = r#"
import socket, sys
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", 9000)); s.listen(8)
n = 0
while True:
    c, _ = s.accept(); n += 1
    c.sendall(str(n).encode()); c.close()
"#;

const ASK: &str = r#"python3 -c 'import socket
s = socket.create_connection(("127.0.0.1", 9000)); print(s.recv(64).decode())'"#;

fn start_counter(host: &TestHost, sandbox: &str) {
    let script = format!(
        "mkdir -p /srv && cat > /srv/counter.py <<'X'\n{COUNTER}X\nsetsid python3 /srv/counter.py </dev/null >/dev/null 2>&1 &\n\
         for i in $(seq 100); do python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 9000))' 2>/dev/null && exit 0; sleep 0.05; done; exit 1"
    );
    let started = host.exec(sandbox, &script);
    assert_eq!(started["status"]["code"], 0, "{started}");
    assert_eq!(verdict(&started), "full", "{started}");
}

#[test]
fn turns_get_the_verdict_they_ask_for() {
    let host = TestHost::new();
    host.create("a");
    let files = host.exec("a", "echo hello > /root/f");
    assert_eq!(verdict(&files), "files", "{files}");
    let paths = files["turn"]["evidence"]["paths"].to_string();
    assert!(paths.contains("root/f"), "{paths}");

    let clean = host.exec("a", "cat /root/f; ls / > /dev/null");
    assert_eq!(verdict(&clean), "clean", "{clean}");
    assert_eq!(text(&clean), "hello\n");
    assert_eq!(clean["turn"]["checkpoint"], files["turn"]["checkpoint"]);
    let stats = &clean["turn"]["stats"];
    assert_eq!(
        (stats["sent_bytes"].as_u64(), stats["frozen_us"].as_u64()),
        (Some(0), Some(0)),
        "{stats}"
    );
    assert!(
        clean["turn"]["record_bytes"].as_u64() < Some(1024),
        "{clean}"
    );

    // Made and deleted again is no change.
    let nothing = host.exec("a", "touch /root/x && rm /root/x");
    assert_eq!(verdict(&nothing), "clean", "{nothing}");

    // A failing command is a turn like any other.
    let failed = host.exec("a", "exit 3");
    assert_eq!(failed["status"]["code"], 3);
    assert_eq!(verdict(&failed), "clean");

    start_counter(&host, "a");
    let asked = host.exec("a", ASK);
    assert!(matches!(verdict(&asked), "processes" | "full"), "{asked}");
}

#[test]
fn a_sandbox_survives_the_death_of_everything_around_it() {
    let mut host = TestHost::new();
    let id = id(&host.create("a"));
    start_counter(&host, "a");
    let before: u64 = text(&host.exec("a", ASK)).trim().parse().unwrap();
    host.exec("a", "echo kept > /root/kept; rm /etc/hostname");

    host.kill();
    host.kill_sandbox(&id);
    std::thread::sleep(std::time::Duration::from_millis(200));
    remove(&host.sandbox_dir(&id));
    host.start();
    let shown = host.cli(["sandbox", "show", "a"]).json();
    assert_eq!(shown["state"], "dead", "{shown}");
    let refused = host.cli(["exec", "a", "--", "true"]);
    assert_eq!(refused.code, 12, "{refused:?}");

    let restored = host.cli(["restore", "a"]).json();
    assert_eq!(restored["verified"], true, "{restored}");
    assert_eq!(restored["sandbox"]["epoch"], 2);
    let after: u64 = text(&host.exec("a", ASK)).trim().parse().unwrap();
    assert_eq!(
        after,
        before + 1,
        "the counter in memory went on where it was"
    );
    let kept = host.exec("a", "cat /root/kept; test ! -e /etc/hostname && echo gone");
    assert_eq!(text(&kept), "kept\ngone\n");
}

/// The sandbox's directory, as a lost disk would take it.
fn remove(dir: &Path) {
    let merged = dir.join("merged");
    let _ = Command::new("umount").arg("-l").arg(&merged).output();
    std::fs::remove_dir_all(dir).expect("the directory can be removed");
}

#[test]
fn a_restarted_daemon_adopts_what_runs() {
    let mut host = TestHost::new();
    host.create("a");
    start_counter(&host, "a");
    let before: u64 = text(&host.exec("a", ASK)).trim().parse().unwrap();
    host.kill();
    host.start();
    let shown = host.cli(["sandbox", "show", "a"]).json();
    assert_eq!(
        (&shown["state"], &shown["epoch"]),
        (&"running".into(), &1.into()),
        "{shown}"
    );
    let after: u64 = text(&host.exec("a", ASK)).trim().parse().unwrap();
    assert_eq!(after, before + 1);
    // What the dead daemon did not see is not lost: the first look after it is a full one.
    host.exec("a", "echo 1 > /root/one");
    host.stop();
    host.start();
    let seen = host.exec("a", "cat /root/one");
    assert_eq!(text(&seen), "1\n");
}

#[test]
fn a_key_runs_once_whoever_asks_again() {
    let mut host = TestHost::new();
    host.create("a");
    let args = [
        "exec",
        "a",
        "--key",
        "k1",
        "--",
        "sh",
        "-c",
        "echo x >> /root/log; wc -l < /root/log",
    ];
    let first = host.cli(args).json();
    let again = host.cli(args).json();
    assert_eq!(text(&first), "1\n");
    assert_eq!(text(&again), "1\n");
    assert_eq!(
        (&first["replayed"], &again["replayed"]),
        (&false.into(), &true.into())
    );
    assert_eq!(first["turn"]["turn"], again["turn"]["turn"]);
    // Long output is kept too.
    let long = ["exec", "a", "--key", "k2", "--", "seq", "20000"];
    let (one, two) = (host.cli(long).json(), host.cli(long).json());
    assert_eq!(one["stdout_base64"], two["stdout_base64"]);

    // The daemon dies while a command runs: asking again finds the running job, not a second one.
    let slow = [
        "exec",
        "a",
        "--key",
        "k3",
        "--",
        "sh",
        "-c",
        "echo y >> /root/slow; sleep 2; wc -l < /root/slow",
    ];
    let child = host
        .command(slow)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(800));
    host.kill();
    let cut = child.wait_with_output().unwrap();
    assert_eq!(
        cut.status.code(),
        Some(12),
        "the client is told that the daemon is gone"
    );
    host.start();
    assert_eq!(text(&host.cli(slow).json()), "1\n");
}

#[test]
fn rollback_and_fork_are_restores() {
    let host = TestHost::new();
    host.create("a");
    let one = host.exec("a", "echo one > /root/f");
    host.exec("a", "echo two > /root/f; touch /root/g");
    let to = one["turn"]["checkpoint"].as_str().unwrap();

    let diff = host.cli(["checkpoint", "diff", "a", to]).json();
    let paths = diff["paths"].to_string();
    assert!(
        paths.contains("root/f") && paths.contains("root/g"),
        "{diff}"
    );

    let forked = host.cli(["fork", "a", "b", "--checkpoint", to]).json();
    assert_eq!(forked["verified"], true);
    assert_eq!(
        text(&host.exec("b", "cat /root/f; ls /root/g 2>/dev/null")),
        "one\n"
    );

    let back = host.cli(["rollback", "a", "--to", to]).json();
    assert_eq!(back["checkpoint"], to);
    assert_eq!(
        text(&host.exec("a", "cat /root/f; ls /root/g 2>/dev/null")),
        "one\n"
    );
    host.exec("a", "echo three > /root/f");
    assert_eq!(text(&host.exec("b", "cat /root/f")), "one\n");
    // A restore after a rollback goes to what followed it, not to what was undone.
    host.kill_sandbox(
        host.cli(["sandbox", "show", "a"]).json()["id"]
            .as_str()
            .unwrap(),
    );
    std::thread::sleep(std::time::Duration::from_millis(200));
    host.cli(["restore", "a"]).json();
    assert_eq!(text(&host.exec("a", "cat /root/f")), "three\n");
}

#[test]
fn a_fork_carries_living_processes() {
    let host = TestHost::new();
    host.create("a");
    start_counter(&host, "a");
    let before: u64 = text(&host.exec("a", ASK)).trim().parse().unwrap();
    let forked = host.cli(["fork", "a", "b"]).json();
    assert!(forked["processes_restored"].as_u64() >= Some(1), "{forked}");
    for sandbox in ["a", "b"] {
        let after: u64 = text(&host.exec(sandbox, ASK)).trim().parse().unwrap();
        assert_eq!(after, before + 1, "{sandbox}");
    }
}

#[test]
fn two_sandboxes_of_one_image_share_their_chunks() {
    let host = TestHost::empty();
    let image = host
        .cli([
            OsStr::new("image"),
            OsStr::new("import"),
            OsStr::new("small"),
            rootfs().as_os_str(),
        ])
        .json();
    let sent = |name: &str| -> u64 {
        let turns = host.cli(["turn", "list", name]).json();
        turns
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["stats"]["sent_bytes"].as_u64().unwrap())
            .sum()
    };
    // Contents are shared; directory nodes are not where they carry the times of files each sandbox made itself.
    let files = "for i in $(seq 20); do seq $i 90000 | sha256sum -b - > /dev/null; seq $i 7 90000 | tr -d 1 > /root/$i; done; cp -r /usr/lib/python3* /root/";
    let task = |name: &str| {
        host.create(name);
        host.exec(name, files);
        let of_files = sent(name);
        start_counter(&host, name);
        host.exec(name, ASK);
        (of_files, sent(name))
    };
    let image = image["sent_bytes"].as_u64().unwrap();
    let ((files_a, all_a), (files_b, all_b)) = (task("a"), task("b"));
    let all_a = image + all_a;
    println!(
        "files: first {files_a} bytes, second {files_b}: {:.4}",
        files_b as f64 / files_a as f64
    );
    println!(
        "image, files, server: first {all_a} bytes, second {all_b}: {:.4}",
        all_b as f64 / all_a as f64
    );
    assert!(
        files_b < files_a,
        "the second sent {files_b} bytes, the first {files_a}"
    );
    assert!(
        all_b * 20 < all_a,
        "the second sent {all_b} bytes, the first {all_a}"
    );
}

#[test]
fn nothing_is_left_of_a_removed_sandbox() {
    let host = TestHost::new();
    let ids = vec![id(&host.create("a")), id(&host.create("b"))];
    start_counter(&host, "a");
    host.exec("b", "mkdir -p /x/y && chattr +i /x/y || true");
    assert!(
        !host.left_behind(&ids).is_empty(),
        "the look itself sees what runs"
    );
    host.cli(["sandbox", "rm", "a"]).json();
    host.cli(["sandbox", "rm", "--forget", "b"]).json();
    assert_eq!(host.left_behind(&ids), Vec::<String>::new());
    // Without --forget the checkpoints stay, and with them the sandbox.
    host.cli(["restore", "a"]).json();
    assert_eq!(text(&host.exec("a", ASK)).trim(), "2");
    assert_eq!(host.cli(["restore", "b"]).code, 10);
    host.cli(["sandbox", "rm", "--forget", "a"]).json();
    assert_eq!(host.left_behind(&ids), Vec::<String>::new());
}

#[test]
fn what_is_wrong_is_said_with_the_right_exit_code() {
    let host = TestHost::new();
    host.create("a");
    let code = |args: &[&str]| {
        let said = host.cli(args);
        assert!(
            said.stderr.contains("error") || said.stdout.contains("error"),
            "{args:?}: {said:?}"
        );
        said.code
    };
    assert_eq!(code(&["sandbox", "create", "x", "--image", "nope"]), 10);
    assert_eq!(code(&["sandbox", "create", "a", "--image", "small"]), 11);
    assert_eq!(code(&["sandbox", "create", "../a", "--image", "small"]), 2);
    assert_eq!(code(&["exec", "nobody", "--", "true"]), 10);
    assert_eq!(code(&["restore", "a"]), 11, "it runs");
    assert_eq!(
        code(&["restore", "a", "--force", "--checkpoint", "ffffffff"]),
        10
    );
    assert_eq!(code(&["rollback", "a", "--to", "@99"]), 10);
    assert_eq!(code(&["image", "import", "y", "/does/not/exist"]), 10);
    assert_eq!(code(&["image", "import", "bad/name", "/tmp"]), 2);
    // Refused requests left the sandbox as it was.
    assert_eq!(text(&host.exec("a", "echo fine")), "fine\n");
    let missing = host.cli(["exec", "a", "--", "/no/such/program"]);
    assert_ne!(missing.code, 0);
    assert_eq!(text(&host.exec("a", "echo fine")), "fine\n");
}

#[test]
fn a_paused_sandbox_stands_still_and_goes_on() {
    let mut host = TestHost::new();
    host.create("a");
    host.exec(
        "a",
        "setsid sh -c 'while :; do date +%s%N > /root/new; mv /root/new /root/now; sleep 0.02; done' >/dev/null 2>&1 &",
    );
    host.cli(["sandbox", "pause", "a"]).json();
    assert_eq!(host.cli(["exec", "a", "--", "true"]).code, 11);
    let taken = host.cli(["checkpoint", "create", "a"]).json();
    assert_eq!(taken["verdict"], "full", "{taken}");
    // A user's pause outlives the daemon.
    host.kill();
    host.start();
    assert_eq!(host.cli(["sandbox", "show", "a"]).json()["state"], "paused");
    host.cli(["sandbox", "resume", "a"]).json();
    let moved = host.exec(
        "a",
        "for i in $(seq 50); do a=$(cat /root/now); sleep 0.1; test \"$a\" != \"$(cat /root/now)\" && echo moves && exit; done",
    );
    assert_eq!(text(&moved), "moves\n");
}

#[test]
fn a_client_that_dies_with_its_input_does_not_block_the_sandbox() {
    let host = TestHost::new();
    host.create("a");
    let mut child = host
        .command(["exec", "-i", "a", "--", "sh", "-c", "cat > /root/typed"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // Wait until the command runs: the sandbox has a second process.
    let id = id(&host.cli(["sandbox", "show", "a"]).json());
    while host.processes(&id).len() < 2 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let after = host.exec("a", "echo fine");
    assert_eq!(text(&after), "fine\n");
    let turns = host.cli(["turn", "list", "a"]).json();
    let hung_up = turns
        .as_array()
        .unwrap()
        .iter()
        .find(|t| t["command"].as_str().unwrap_or_default().contains("typed"));
    assert_eq!(
        hung_up.expect("its turn is journaled")["status"]["signal"],
        1
    );
}
