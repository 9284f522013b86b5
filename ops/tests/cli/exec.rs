//! `tidepool exec`: streams, exit codes, keys, stdin, signals, and a daemon that dies.

use std::io::Write;
use std::process::{Command, Stdio};

use bytes::Bytes;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::output::turn;
use crate::server::{Reply, Running, Server, Step, base64};

const EXEC: &str = "/v1/sandboxes/web/exec";

pub(crate) fn started(replayed: bool) -> Step {
    Step::Line(json!({"type": "started", "key": "k", "turn": 8, "replayed": replayed}))
}

pub(crate) fn stdout(bytes: &[u8]) -> Step {
    Step::Line(json!({"type": "stdout", "data": base64(bytes)}))
}

fn stderr(bytes: &[u8]) -> Step {
    Step::Line(json!({"type": "stderr", "data": base64(bytes)}))
}

pub(crate) fn exit(status: Value) -> Step {
    let mut turn = turn(8, "files");
    turn["status"] = status.clone();
    Step::Line(json!({"type": "exit", "status": status, "turn": turn}))
}

pub(crate) fn server(steps: impl IntoIterator<Item = Step>) -> Server {
    Server::new([(EXEC, Reply::steps(steps))])
}

/// Both outputs into pipes.
fn piped(command: &mut Command) -> Running {
    Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
}

#[test]
fn output_and_exit_code_are_the_commands() {
    for (status, code) in [
        (json!({"code": 0}), 0),
        (json!({"code": 7}), 7),
        (json!({"signal": 9}), 137),
        (json!("timed_out"), 124),
    ] {
        let server = server([
            started(false),
            stdout(b"one\n"),
            stderr(b"two\n"),
            stdout(b"three"),
            exit(status),
        ]);
        let run = server.run("exec -q web --timeout 90s -- sh -c x");
        assert_eq!(run.code, code, "{run:?}");
        assert_eq!(run.stdout, "one\nthree");
        assert!(run.stderr.starts_with("two\n"), "{run:?}");
        assert!(!run.stderr.contains("error:"), "{run:?}");
    }
}

#[test]
fn the_request_carries_everything() {
    let server = server([started(false), exit(json!({"code": 0}))]);
    let run = server.run("exec web -e A=1 -w /src -u nobody --timeout 1m30s -- ls -la --json -i");
    assert_eq!(
        (run.code, run.stdout.as_str(), run.stderr.as_str()),
        (0, "", ""),
        "{run:?}"
    );
    let mut body = server.asked_for("/exec").json();
    let key = body["key"].take();
    let key = key.as_str().unwrap();
    assert!(
        key.len() == 32 && key.bytes().all(|b| b.is_ascii_hexdigit()),
        "{key}"
    );
    assert_eq!(
        body,
        json!({"argv": ["ls", "-la", "--json", "-i"], "env": ["A=1"], "cwd": "/src", "user": "nobody", "tty": null,
            "stdin": false, "timeout_ms": 90_000, "key": null})
    );
    // Closed stdin is not sent.
    assert_eq!(server.asked().len(), 1, "{:?}", server.asked());
}

#[test]
fn json_is_one_document_at_the_end() {
    let raw = [0u8, 255, b'\n'];
    let server = server([
        started(false),
        stdout(&raw),
        stderr(b"e"),
        stdout(b"x"),
        exit(json!({"code": 3})),
    ]);
    let run = server.run("exec --json web -- x");
    assert_eq!(run.code, 3);
    let mut expected = turn(8, "files");
    expected["status"] = json!({"code": 3});
    assert_eq!(
        run.json(),
        json!({"status": {"code": 3}, "turn": expected, "replayed": false, "stdout_base64": base64(&[0, 255, b'\n', b'x']),
            "stderr_base64": base64(b"e")})
    );
}

#[test]
fn a_key_seen_before_gives_the_recorded_result() {
    let server = server([
        started(true),
        stdout(b"recorded\n"),
        exit(json!({"code": 4})),
    ]);
    let run = server.run("exec -i web --key build/42 -- make");
    assert_eq!(
        (run.code, run.stdout.as_str()),
        (4, "recorded\n"),
        "{run:?}"
    );
    assert!(
        run.stderr.contains("recorded result of turn 8")
            && run.stderr.contains("nothing ran again")
    );
    assert_eq!(server.asked_for("/exec").json()["key"], "build/42");
    // There is nothing to send stdin to.
    assert_eq!(server.asked().len(), 1, "{:?}", server.asked());
    let run = server.run("exec web --key build/42 --json -- make");
    assert_eq!(run.json()["replayed"], true);
}

#[test]
fn stdin_is_streamed_to_its_end() {
    let end = "POST /v1/sandboxes/web/execs/in%2Fput/stdin";
    let server = server([
        started(false),
        Step::Until(end, b"first".to_vec()),
        stdout(b"got it\n"),
        Step::Until(end, Vec::new()),
        exit(json!({"code": 0})),
    ]);
    let mut command = server.command("exec -i --key in/put web -- cat");
    let mut running = piped(command.stdin(Stdio::piped()));
    let mut stdin = running.0.as_mut().unwrap().stdin.take().unwrap();
    // More is only written once the first bytes have arrived: it is a stream and not one body.
    stdin.write_all(b"first").unwrap();
    server.wait_for(end, b"first");
    let rest = vec![b'r'; 1 << 20];
    stdin.write_all(&rest).unwrap();
    drop(stdin);
    let run = running.finish();
    assert_eq!((run.code, run.stdout.as_str()), (0, "got it\n"), "{run:?}");
    let sent = server.asked_for("/stdin");
    assert!(sent.complete);
    assert_eq!(sent.body.len(), 5 + rest.len());
    assert_eq!(server.asked_for("/exec").json()["stdin"], true);
}

#[test]
fn a_command_that_ends_before_its_input_is_no_error() {
    let server = server([started(false), stdout(b"head\n"), exit(json!({"code": 0}))]);
    let mut command = server.command("exec -i web -- head -1");
    let running = piped(command.stdin(Stdio::piped()));
    // Stdin stays open: the client must not wait for its end.
    let run = running.finish_with_open_stdin();
    assert_eq!(
        (run.code, run.stdout.as_str(), run.stderr.as_str()),
        (0, "head\n", ""),
        "{run:?}"
    );
}

#[test]
fn ctrl_c_is_sent_to_the_command() {
    let server = server([
        started(false),
        stdout(b"running\n"),
        Step::Until("/execs/k/signal", b"2".to_vec()),
        exit(json!({"signal": 2})),
    ]);
    let mut command = server.command("exec --key k web -- sleep 100");
    let mut running = piped(&mut command);
    running.read_line();
    running.signal(Signal::INT);
    let run = running.finish();
    assert_eq!(run.code, 130, "{run:?}");
    assert_eq!(server.asked_for("/signal").json(), json!({"signal": 2}));
    assert!(!run.stderr.contains("error:"), "{run:?}");
}

#[test]
fn a_second_ctrl_c_stops_waiting() {
    let server = server([started(false), stdout(b"running\n"), Step::Hang]);
    let mut command = server.command("exec --key k web -- sleep 100");
    let mut running = piped(&mut command);
    running.read_line();
    running.signal(Signal::INT);
    server.wait_for("/execs/k/signal", b"2");
    // However slow this machine is, two in a row come within the time at some point.
    while !running.has_ended() {
        running.signal(Signal::INT);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let run = running.finish();
    assert_eq!(run.code, 130, "{run:?}");
    assert!(
        run.stderr.contains("error: no longer waiting") && run.stderr.contains("--key k"),
        "{run:?}"
    );
}

#[test]
fn sigterm_stops_waiting_at_once() {
    let server = server([started(false), stdout(b"running\n"), Step::Hang]);
    let mut command = server.command("exec --key k web -- sleep 100");
    let mut running = piped(&mut command);
    running.read_line();
    running.signal(Signal::TERM);
    assert_eq!(running.finish().code, 130);
}

#[test]
fn a_daemon_that_dies_leaves_a_key_to_repeat_with() {
    let half = || Step::Raw(Bytes::from_static(b"{\"type\":\"std"));
    let scripts: [Vec<Step>; 5] = [
        vec![Step::Cut],
        vec![started(false), stdout(b"partial\n"), Step::Cut],
        vec![started(false), stdout(b"partial\n")],
        vec![started(false), stdout(b"partial\n"), half(), Step::Cut],
        vec![started(false), stdout(b"partial\n"), half()],
    ];
    for (i, steps) in scripts.into_iter().enumerate() {
        let server = server(steps);
        let run = server.run("exec web -- x");
        assert_eq!(run.code, 12, "{i}: {run:?}");
        assert_eq!(run.stdout, if i == 0 { "" } else { "partial\n" });
        let key = server.asked_for("/exec").json()["key"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(
            run.stderr.contains("the command may have run"),
            "{i}: {run:?}"
        );
        assert!(run.stderr.contains(&format!("--key {key}")), "{i}: {run:?}");

        let run = server.run("exec web --key 'mine' --json -- x");
        let error = &run.json()["error"];
        assert_eq!(
            (error["kind"].as_str(), error["key"].as_str()),
            (Some("unavailable"), Some("'mine'"))
        );
        assert!(run.stderr.contains(r"--key ''\''mine'\'''"), "{i}: {run:?}");
    }
}

#[test]
fn a_turn_that_was_not_committed_is_an_error_of_its_kind() {
    let error =
        json!({"type": "error", "error": {"kind": "fenced", "message": "another host has it"}});
    let server = server([started(false), stdout(b"ran\n"), Step::Line(error)]);
    let run = server.run("exec --key k web -- x");
    assert_eq!((run.code, run.stdout.as_str()), (11, "ran\n"), "{run:?}");
    assert!(
        run.stderr
            .starts_with("tidepool: error: another host has it\n"),
        "{run:?}"
    );
    assert!(
        run.stderr.contains("not committed") && run.stderr.contains("--key k"),
        "{run:?}"
    );
}

#[test]
fn a_refused_exec_did_not_run() {
    let event = || {
        Step::Line(
            json!({"type": "error", "error": {"kind": "not_found", "message": "no such thing"}}),
        )
    };
    for reply in [
        Reply::failed(404, "not_found", "no such thing"),
        Reply::steps([event()]),
        Reply::steps([started(true), event()]),
    ] {
        let server = Server::new([(EXEC, reply)]);
        let run = server.run("exec web -- x");
        assert_eq!(run.code, 10, "{run:?}");
        assert_eq!(run.stderr, "tidepool: error: no such thing\n");
    }
}

#[test]
fn output_that_is_not_base64_is_not_printed() {
    let server = server([
        started(false),
        Step::Line(json!({"type": "stdout", "data": "*"})),
    ]);
    let run = server.run("exec web -- x");
    assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{run:?}");
    assert!(run.stderr.contains("not base64"), "{run:?}");
}

#[test]
fn a_reader_that_has_gone_ends_the_command_as_in_a_pipeline() {
    let server = server([
        started(false),
        stdout(b"x\n"),
        Step::Until("/execs/k/signal", b"13".to_vec()),
        Step::Hang,
    ]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    // More output is needed to see that the pipe is closed once the first piece was handed to the writing thread.
    let mut command = server.command("exec --key k web -- yes");
    let running = Running::start(command.stdout(writer).stderr(Stdio::piped()));
    let run = running.finish();
    assert_eq!((run.code, run.stderr.as_str()), (141, ""), "{run:?}");
    assert_eq!(server.asked_for("/signal").json(), json!({"signal": 13}));
}

#[test]
fn verbose_tells_what_the_turn_cost() {
    let server = server([started(false), exit(json!({"code": 0}))]);
    let run = server.run("exec -v web -- x");
    assert!(
        run.stderr.contains("POST /v1/sandboxes/web/exec: 200"),
        "{run:?}"
    );
    assert!(
        run.stderr.contains("turn 8: files; 5 paths (root/a, ...)"),
        "{run:?}"
    );
}
