//! What is asked of the daemon and how the answers are printed, as tables and as JSON.

use serde_json::{Value, json};
use tidepool_proto::api::{CheckpointInfo, SandboxInfo, TurnInfo};

use crate::server::{Reply, Server};

const ID: &str = "00112233445566778899aabbccddeeff";

fn hash(digit: char) -> String {
    std::iter::repeat_n(digit, 64).collect()
}

pub(crate) fn sandbox(name: &str, state: &str) -> Value {
    let value = json!({
        "id": ID, "name": name, "image": "debian", "domain": "default", "state": state, "epoch": 2, "turn": 7,
        "checkpoint": hash('c'), "created_ms": 1_767_225_600_000u64, "capture_error": null, "not_covered": [],
    });
    assert!(serde_json::from_value::<SandboxInfo>(value.clone()).is_ok());
    value
}

pub(crate) fn turn(n: u64, verdict: &str) -> Value {
    let value = json!({
        "turn": n, "key": format!("key-{n}"), "command": "make test", "started_ms": 1_767_225_600_000u64,
        "ended_ms": 1_767_225_601_500u64, "verdict": verdict, "checkpoint": hash('c'),
        "evidence": {"paths": ["root/a", "root/b"], "paths_total": 5, "processes": ["12 sh: ended"],
            "processes_total": 1, "reasons": ["first capture"], "not_covered": []},
        "stats": {"captured_bytes": 4096, "sent_bytes": 1536, "sent_chunks": 1, "full_bytes": 1 << 20,
            "frozen_us": 850, "exposed_us": 12_340},
        "record_bytes": 300, "status": {"code": 0},
    });
    assert!(serde_json::from_value::<TurnInfo>(value.clone()).is_ok());
    value
}

fn checkpoint(digit: char, turn: u64) -> Value {
    let value = json!({
        "id": hash(digit), "sandbox": ID, "turn": turn, "epoch": 2, "parent": null, "created_ms": 1_767_225_600_000u64,
        "verdict": "full", "image": "debian", "image_tree": hash('1'), "upper_tree": hash('2'), "upper_bytes": 2048,
        "process_tree": hash('3'), "process_bytes": 3 << 20, "process_count": 2,
    });
    assert!(serde_json::from_value::<CheckpointInfo>(value.clone()).is_ok());
    value
}

fn image() -> Value {
    json!({"name": "debian", "tree": hash('1'), "domain": "default", "bytes": 5 << 20, "files": 1, "sent_bytes": 0,
        "created_ms": 0, "env": [], "cwd": "/"})
}

fn restored() -> Value {
    json!({"sandbox": sandbox("web", "running"), "checkpoint": hash('c'), "turn": 7, "verified": true,
        "processes_restored": 1, "fetched_bytes": 2048, "duration_ms": 350})
}

fn diff() -> Value {
    json!({"from": hash('b'), "to": hash('c'), "truncated": true, "processes_differ": true, "paths": [
        {"path": "root/new", "change": "added", "bytes_before": 0, "bytes_after": 10},
        {"path": "root/\u{1b}[2J", "change": "removed", "bytes_before": 2048, "bytes_after": 0},
    ]})
}

#[test]
fn lists_are_plain_tables() {
    let mut odd = sandbox("evil\u{1b}]0;x\u{7}", "dead");
    odd["checkpoint"] = Value::Null;
    odd["capture_error"] = json!("disk full");
    odd["not_covered"] = json!(["host directory /data at /mnt"]);
    let server = Server::new([
        (
            "/v1/sandboxes",
            Reply::json(json!([sandbox("web", "running"), odd])),
        ),
        ("/v1/images", Reply::json(json!([image()]))),
        (
            "/v1/sandboxes/web/checkpoints",
            Reply::json(json!([checkpoint('c', 7)])),
        ),
        ("/v1/sandboxes/web/diff?from=@2", Reply::json(diff())),
    ]);
    let run = server.run("sandbox list");
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert_eq!(
        run.stdout,
        "NAME                 ID        STATE    IMAGE   TURN  CHECKPOINT  CREATED               NOTES\n\
         web                  00112233  running  debian     7  cccccccc    2026-01-01T00:00:00Z\n\
         evil\\u{1b}]0;x\\u{7}  00112233  dead     debian     7  -           2026-01-01T00:00:00Z  last capture failed, not covered: 1\n"
    );
    let run = server.run("image list");
    assert_eq!(
        run.stdout,
        "NAME    TREE      DOMAIN   FILES  SIZE     CREATED\n\
         debian  11111111  default      1  5.0 MiB  1970-01-01T00:00:00Z\n"
            .replace("SIZE     CREATED", "   SIZE  CREATED")
    );
    let run = server.run("checkpoint list web");
    assert_eq!(
        run.stdout,
        "ID        TURN  VERDICT    FILES   MEMORY  PROCESSES  PARENT  CREATED\n\
         cccccccc     7  full     2.0 KiB  3.0 MiB          2  -       2026-01-01T00:00:00Z\n"
    );
    let run = server.run("checkpoint diff web @2");
    assert_eq!(
        run.stdout,
        "CHANGE    BEFORE  AFTER  PATH\n\
         added          -   10 B  root/new\n\
         removed  2.0 KiB      -  root/\\u{1b}[2J\n"
    );
    assert!(
        run.stderr.contains("more paths differ") && run.stderr.contains("processes differ too")
    );
}

#[test]
fn json_is_what_the_daemon_said() {
    let list = json!([sandbox("web", "running"), sandbox("api", "paused")]);
    let status = json!({"version": "0.1.0", "host": "h", "uptime_s": 61, "state_dir": "/s", "probe_set": "ext4",
        "runc": "1.1", "criu": null, "kernel": "6.1", "warnings": ["no CRIU"], "sandboxes_running": 1,
        "sandboxes_total": 2, "store": {"endpoint": "embedded", "chunks": 3, "chunk_bytes": 4096, "ready": true}});
    let server = Server::new([
        ("GET /v1/sandboxes", Reply::json(list.clone())),
        ("POST /v1/sandboxes", Reply::done(sandbox("web", "running"))),
        ("/v1/sandboxes/web", Reply::json(sandbox("web", "running"))),
        (
            "/v1/sandboxes/web/pause",
            Reply::json(sandbox("web", "paused")),
        ),
        (
            "/v1/sandboxes/web/resume",
            Reply::json(sandbox("web", "running")),
        ),
        ("GET /v1/images", Reply::json(json!([image()]))),
        ("POST /v1/images", Reply::done(image())),
        (
            "GET /v1/sandboxes/web/checkpoints",
            Reply::json(json!([checkpoint('c', 7)])),
        ),
        (
            "POST /v1/sandboxes/web/checkpoints",
            Reply::done(turn(8, "files")),
        ),
        (
            "/v1/sandboxes/web/checkpoints/@7",
            Reply::json(checkpoint('c', 7)),
        ),
        ("/v1/sandboxes/web/diff?from=@2&to=@5", Reply::json(diff())),
        ("/v1/sandboxes/web/restore", Reply::done(restored())),
        ("/v1/sandboxes/web/rollback", Reply::done(restored())),
        ("/v1/sandboxes/web/fork", Reply::done(restored())),
        ("/v1/status", Reply::json(status.clone())),
    ]);
    for (line, expected) in [
        ("sandbox list", list),
        ("sandbox create web debian", sandbox("web", "running")),
        ("sandbox show web", sandbox("web", "running")),
        ("sandbox pause web", sandbox("web", "paused")),
        ("sandbox resume web", sandbox("web", "running")),
        ("image list", json!([image()])),
        ("image import debian /r.tar", image()),
        ("checkpoint list web", json!([checkpoint('c', 7)])),
        ("checkpoint create web", turn(8, "files")),
        ("checkpoint show web @7", checkpoint('c', 7)),
        ("checkpoint diff web @2 @5", diff()),
        ("restore web", restored()),
        ("rollback web --to @3", restored()),
        ("fork web copy", restored()),
        ("status", status),
    ] {
        let run = server.run(&format!("{line} --json"));
        assert_eq!(run.code, 0, "{line}: {run:?}");
        assert_eq!(run.json(), expected, "{line}");
        // The same in words: something for people, nothing on stderr but warnings, no bar where there is no terminal.
        let run = server.run(&format!("-q {line}"));
        assert_eq!(run.code, 0, "{line}: {run:?}");
        assert!(
            !run.stdout.is_empty() && !run.stdout.starts_with('{'),
            "{line}: {run:?}"
        );
        assert!(
            run.stderr.is_empty() || line.starts_with("checkpoint diff"),
            "{line}: {run:?}"
        );
    }
}

#[test]
fn requests_carry_what_was_asked() {
    let server = Server::new([
        ("POST /v1/sandboxes", Reply::done(sandbox("web", "running"))),
        ("POST /v1/images", Reply::done(image())),
        ("/v1/sandboxes/web/restore", Reply::done(restored())),
        ("/v1/sandboxes/web/rollback", Reply::done(restored())),
        ("/v1/sandboxes/web/fork", Reply::done(restored())),
    ]);
    let create = "sandbox create web --image debian -e A=1 --env B=2=3 -w /src -u 1000:1000 --memory 1.5g --pids 64 \
                  --network --mount /data:/mnt:ro";
    assert_eq!(server.run(create).code, 0);
    assert_eq!(
        server.asked_for("POST /v1/sandboxes").json(),
        json!({"name": "web", "image": "debian", "env": ["A=1", "B=2=3"], "cwd": "/src", "user": "1000:1000",
            "memory_bytes": 3u64 << 29, "pids": 64, "network": true,
            "mounts": [{"source": "/data", "target": "/mnt", "read_only": true}],
            "agent": null, "ignore": []})
    );
    // The daemon has another working directory, so paths are made absolute here.
    let mut command = server.command("image import debian rootfs.tar --kind oci-layout");
    let status = command.current_dir(server.dir()).output().unwrap().status;
    assert!(status.success());
    let source = server.dir().join("rootfs.tar");
    assert_eq!(
        server.asked_for("POST /v1/images").json(),
        json!({"name": "debian", "source": source.to_str().unwrap(), "kind": "oci_layout"})
    );
    assert_eq!(server.run("restore web --checkpoint @3 --force").code, 0);
    assert_eq!(
        server.asked_for("/restore").json(),
        json!({"checkpoint": "@3", "force": true})
    );
    assert_eq!(server.run("rollback web --to abcd").code, 0);
    assert_eq!(
        server.asked_for("/rollback").json(),
        json!({"checkpoint": "abcd", "force": true})
    );
    assert_eq!(server.run("fork web copy").code, 0);
    assert_eq!(
        server.asked_for("/fork").json(),
        json!({"name": "copy", "checkpoint": null})
    );
}

#[test]
fn turns_are_fetched_page_by_page() {
    let all: Vec<Value> = (0..600).map(|n| turn(n, "clean")).collect();
    let server = Server::new([
        ("/v1/sandboxes/web", Reply::json(sandbox("web", "running"))),
        (
            "/v1/sandboxes/web/turns?from=0&limit=500",
            Reply::json(json!(all[..500])),
        ),
        (
            "/v1/sandboxes/web/turns?from=500&limit=500",
            Reply::json(json!(all[500..])),
        ),
        (
            "/v1/sandboxes/web/turns?from=600&limit=500",
            Reply::json(json!([])),
        ),
        (
            "/v1/sandboxes/web/turns?from=3&limit=2",
            Reply::json(json!(all[3..5])),
        ),
        (
            "/v1/sandboxes/web/turns?from=6&limit=500",
            Reply::json(json!(all[6..8])),
        ),
        (
            "/v1/sandboxes/web/turns?from=8&limit=500",
            Reply::json(json!([])),
        ),
    ]);
    for (line, range) in [
        ("turn list web", 0..600),
        ("turn list web --from 3 --limit 2", 3..5),
        ("turn list web --last 2", 6..8),
    ] {
        let run = server.run(&format!("{line} --json"));
        assert_eq!(run.code, 0, "{run:?}");
        assert_eq!(run.json(), json!(all[range]), "{line}");
    }
}

#[test]
fn turns_show_verdicts_and_evidence() {
    let mut creation = turn(0, "full");
    creation["status"] = Value::Null;
    let mut killed = turn(1, "clean");
    killed["status"] = json!({"signal": 9});
    killed["evidence"] = json!({"paths": [], "paths_total": 0, "processes": [], "processes_total": 0, "reasons": [],
        "not_covered": []});
    let page = json!([creation, killed]);
    let server = Server::new([
        (
            "/v1/sandboxes/web/turns?from=0&limit=500",
            Reply::json(page),
        ),
        (
            "/v1/sandboxes/web/turns?from=2&limit=500",
            Reply::json(json!([])),
        ),
    ]);
    let run = server.run("turn list web");
    assert_eq!(
        run.stdout,
        "TURN  VERDICT  CAPTURED     SENT  FROZEN   WAITED  EXIT      CHECKPOINT  EVIDENCE                                         COMMAND\n\
         \x20  0  full      4.0 KiB  1.5 KiB  850 us  12.3 ms  -         cccccccc    5 paths (root/a, ...); 1 process; first capture  make test\n\
         \x20  1  clean     4.0 KiB  1.5 KiB  850 us  12.3 ms  signal 9  cccccccc    -                                                make test\n"
    );
    let run = server.run("turn list web --evidence");
    let expected = format!(
        "turn        0\n\
         command     make test\n\
         exit        -\n\
         started     2026-01-01T00:00:00Z, took 1.5 s\n\
         verdict     full\n\
         paths       root/a\n\
         \x20           root/b\n\
         \x20           and 3 more\n\
         processes   12 sh: ended\n\
         reasons     first capture\n\
         captured    4.0 KiB; everything would be 1.0 MiB\n\
         sent        1.5 KiB in 1 chunk, and a record of 300 B\n\
         frozen      850 us\n\
         waited      12.3 ms\n\
         checkpoint  {}\n\
         key         key-0\n\n",
        hash('c')
    );
    assert!(run.stdout.starts_with(&expected), "{}", run.stdout);
}

#[test]
fn removing_keeps_checkpoints_unless_told_to_forget() {
    let server = Server::new([
        (
            "DELETE /v1/sandboxes/web?forget=false",
            Reply::json(json!({})),
        ),
        (
            "DELETE /v1/sandboxes/web?forget=true",
            Reply::json(json!({})),
        ),
        (
            "DELETE /v1/sandboxes/gone?forget=false",
            Reply::failed(404, "not_found", "no sandbox gone"),
        ),
        (
            "GET /v1/sandboxes/web",
            Reply::json(sandbox("web", "running")),
        ),
    ]);
    let run = server.run("sandbox rm web --dry-run");
    assert_eq!(run.code, 0);
    assert!(
        run.stdout
            .contains("since turn 7 would be lost, checkpoint cccccccc kept"),
        "{run:?}"
    );
    let run = server.run("sandbox rm web --dry-run --forget");
    assert!(run.stdout.contains("nothing could be restored"), "{run:?}");
    assert!(
        server.asked().iter().all(|a| a.what.starts_with("GET ")),
        "{:?}",
        server.asked()
    );

    let run = server.run("sandbox rm web");
    assert_eq!(run.code, 0);
    assert_eq!(
        run.stdout,
        "removed web; its checkpoints are kept, `tidepool restore web` brings it back\n"
    );
    let run = server.run("sandbox rm web --forget");
    assert_eq!(run.stdout, "removed web and its checkpoints\n");

    let run = server.run("sandbox rm gone");
    assert_eq!((run.code, run.stdout.as_str()), (10, ""));
    let run = server.run("sandbox rm gone web --json");
    assert_eq!(run.code, 3, "{run:?}");
    assert_eq!(
        run.json(),
        json!({"dry_run": false, "forget": false, "removed": [{"sandbox": "web", "restorable": true}],
            "failed": [{"sandbox": "gone", "kind": "not_found", "message": "no sandbox gone"}]})
    );
    assert!(run.stderr.contains("1 of 2 not removed"), "{run:?}");
}

#[test]
fn dry_runs_print_the_request_and_send_nothing() {
    let newest = format!("/v1/sandboxes/{ID}/checkpoints/{}", hash('c'));
    let older = format!("/v1/sandboxes/{ID}/checkpoints/@3");
    let between = format!("/v1/sandboxes/{ID}/diff?from={}", hash('b'));
    let server = Server::new([
        ("/v1/sandboxes/web", Reply::json(sandbox("web", "running"))),
        (newest.as_str(), Reply::json(checkpoint('c', 7))),
        (older.as_str(), Reply::json(checkpoint('b', 3))),
        (between.as_str(), Reply::json(diff())),
    ]);
    let run = server.run("restore web --dry-run");
    assert_eq!((run.code, run.stdout.as_str()), (11, ""), "{run:?}");
    assert!(
        run.stderr.contains("web is running here") && run.stderr.contains("--force"),
        "{run:?}"
    );

    let run = server.run("restore web --force --dry-run --json");
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(
        run.json()["request"],
        json!({"checkpoint": null, "force": true})
    );
    assert_eq!(run.json()["checkpoint"]["id"], json!(hash('c')));

    let run = server.run("rollback web --to @3 --dry-run");
    assert_eq!(run.code, 0, "{run:?}");
    for text in [
        "would stop web, which is running; what happened since turn 7 would be lost\n",
        "would roll back web to turn 3, checkpoint bbbbbbbb",
        "4 turns after it would be undone\n",
        "added          -   10 B  root/new\n",
    ] {
        assert!(run.stdout.contains(text), "{text}: {run:?}");
    }
    let run = server.run("rollback web --to @3 --dry-run --json");
    assert_eq!(run.json()["undone"], diff());
    assert!(
        server.asked().iter().all(|a| a.what.starts_with("GET ")),
        "{:?}",
        server.asked()
    );
}

#[test]
fn what_is_not_safe_is_told_even_when_quiet() {
    let mut info = sandbox("web", "running");
    info["not_covered"] = json!(["host directory /data at /mnt"]);
    let mut unverified = restored();
    unverified["verified"] = json!(false);
    let server = Server::new([
        ("POST /v1/sandboxes", Reply::done(info)),
        ("/v1/sandboxes/web/restore", Reply::done(unverified)),
    ]);
    let run = server.run("-q sandbox create web debian");
    assert_eq!(
        run.stderr,
        "tidepool: warning: no checkpoint of web covers host directory /data at /mnt\n"
    );
    let run = server.run("-q restore web");
    assert!(
        run.stderr
            .contains("warning: the restored files were not compared"),
        "{run:?}"
    );
}

#[test]
fn status_tells_warnings_and_fails_without_a_store() {
    let status = json!({"version": "0.1.0", "host": "h", "uptime_s": 3661, "state_dir": "/s", "probe_set": "walk",
        "runc": "1.1", "criu": null, "kernel": "6.1", "warnings": ["no CRIU", "no eBPF"], "sandboxes_running": 1,
        "sandboxes_total": 2, "store": {"endpoint": "embedded", "chunks": 3, "chunk_bytes": 4096, "ready": false}});
    let server = Server::new([("/v1/status", Reply::json(status))]);
    let run = server.run("status");
    assert_eq!(run.code, 12, "{run:?}");
    for text in [
        "daemon     0.1.0, up 1h 1m 1s\n",
        "criu       missing\n",
        "store      embedded, not ready; 3 chunks, 4.0 KiB\n",
        "sandboxes  1 running of 2\n",
        "warnings   no CRIU\n           no eBPF\n",
    ] {
        assert!(run.stdout.contains(text), "{text}: {run:?}");
    }
    let run = server.run("status --json");
    assert_eq!(
        (run.code, run.json()["store"]["ready"].clone()),
        (12, json!(false))
    );
}
