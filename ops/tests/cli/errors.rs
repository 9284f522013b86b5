//! Every way to fail: the exit code, one sentence on stderr, and nothing else on stdout.

use std::os::unix::net::UnixListener;
use std::process::Stdio;

use bytes::Bytes;
use rustix::process::Signal;
use serde_json::json;
use tidepool_proto::error::ErrorKind;

use crate::output::sandbox;
use crate::server::{Reply, Running, Server, Step};
use crate::{Run, tidepool};

#[test]
fn each_kind_of_error_has_its_exit_code() {
    for (kind, code) in [
        (ErrorKind::Invalid, 2),
        (ErrorKind::NotFound, 10),
        (ErrorKind::Conflict, 11),
        (ErrorKind::Fenced, 11),
        (ErrorKind::Unavailable, 12),
        (ErrorKind::Corruption, 13),
        (ErrorKind::Denied, 1),
        (ErrorKind::Failed, 1),
    ] {
        let name = json!(kind).as_str().unwrap().to_owned();
        let message = format!("it is {name} today");
        let event = json!({"type": "error", "error": {"kind": name, "message": message}});
        let progress = json!({"type": "progress", "stage": "s", "done": 0, "total": null});
        let server = Server::new([
            (
                "/v1/sandboxes/web",
                Reply::failed(kind.http_status(), &name, &message),
            ),
            ("/v1/sandboxes/web/restore", Reply::lines([progress, event])),
        ]);
        for line in ["sandbox show web", "restore web"] {
            let run = server.run(line);
            assert_eq!(run.code, code, "{run:?}");
            assert_eq!(run.stdout, "", "{run:?}");
            assert_eq!(run.stderr, format!("tidepool: error: {message}\n"));

            let run = server.run(&format!("--json {line}"));
            assert_eq!(run.code, code, "{run:?}");
            let error = json!({"kind": name, "message": message, "exit_code": code});
            assert_eq!(run.json(), json!({"error": error}));
        }
    }
}

#[test]
fn a_missing_daemon_is_unavailable_and_says_how_to_start_it() {
    let dir = tempfile::Builder::new().prefix("tp").tempdir().unwrap();
    let socket = dir.path().join("host.sock");
    let missing: Run = tidepool(&socket, ["status"]).output().unwrap().into();
    // A socket that nobody listens on any more, as a killed daemon leaves it.
    drop(UnixListener::bind(&socket).unwrap());
    let refused: Run = tidepool(&socket, ["exec", "web", "--", "true"])
        .output()
        .unwrap()
        .into();
    for run in [missing, refused] {
        assert_eq!(run.code, 12, "{run:?}");
        assert_eq!(run.stdout, "");
        assert!(
            run.stderr
                .starts_with("tidepool: error: no host daemon answers at"),
            "{run:?}"
        );
        assert!(run.stderr.contains("tidepool-host --state-dir"), "{run:?}");
        // Nothing was asked, so nothing may have run.
        assert!(!run.stderr.contains("--key"), "{run:?}");
    }
}

#[test]
fn the_socket_may_come_from_the_environment() {
    let server = Server::new([("/v1/sandboxes/web", Reply::json(sandbox("web", "running")))]);
    let run: Run = std::process::Command::new(env!("CARGO_BIN_EXE_tidepool"))
        .env("TIDEPOOL_SOCKET", server.socket())
        .args(["sandbox", "show", "web", "--json"])
        .output()
        .unwrap()
        .into();
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.json(), sandbox("web", "running"));
}

#[test]
fn answers_that_are_not_understood_say_so() {
    let garbage = Reply::steps([Step::Raw(Bytes::from_static(b"<html>\x1b[31m"))]);
    let mut teapot = Reply::steps([Step::Raw(Bytes::from_static(b"short and stout\n"))]);
    teapot.status = 418;
    let server = Server::new([
        ("/v1/sandboxes/garbage", garbage.clone()),
        ("/v1/sandboxes/garbage/restore", garbage),
        ("/v1/sandboxes/teapot", teapot),
    ]);
    for (line, code, text) in [
        ("sandbox show garbage", 1, "answer is not understood"),
        ("restore garbage", 1, "answer is not understood"),
        ("sandbox show teapot", 1, "HTTP status 418: short and stout"),
        ("sandbox show nobody", 10, "HTTP status 404"),
    ] {
        let run = server.run(line);
        assert_eq!((run.code, run.stdout.as_str()), (code, ""), "{run:?}");
        assert!(run.stderr.contains(text), "{run:?}");
        assert!(!run.stderr.contains('\x1b'), "{run:?}");
    }
}

#[test]
fn an_endless_line_and_an_endless_document_are_refused() {
    let piece = Step::Raw(Bytes::from(vec![b' '; 1 << 20]));
    let endless = |pieces| Reply::steps(std::iter::repeat_n(piece.clone(), pieces));
    let server = Server::new([
        ("/v1/sandboxes/web/restore", endless(17)),
        ("/v1/sandboxes", endless(65)),
    ]);
    for line in ["restore web", "sandbox list"] {
        let run = server.run(line);
        assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{run:?}");
        assert!(run.stderr.contains("not understood"), "{run:?}");
    }
}

#[test]
fn a_daemon_that_dies_in_the_middle_is_unavailable() {
    let progress = json!({"type": "progress", "stage": "reading files", "done": 1, "total": null});
    let server = Server::new([
        (
            "/v1/sandboxes/cut/restore",
            Reply::steps([Step::Line(progress.clone()), Step::Cut]),
        ),
        (
            "/v1/sandboxes/end/restore",
            Reply::steps([Step::Line(progress)]),
        ),
        (
            "/v1/sandboxes/cut",
            Reply::steps([Step::Raw(Bytes::from_static(b"{")), Step::Cut]),
        ),
    ]);
    for line in ["restore cut", "restore end", "sandbox show cut"] {
        let run = server.run(line);
        assert_eq!((run.code, run.stdout.as_str()), (12, ""), "{run:?}");
        if line.starts_with("restore") {
            assert!(run.stderr.contains("lost while reading files"), "{run:?}");
        }
    }
}

#[test]
fn wrong_usage_is_2_and_asks_nothing() {
    let server = Server::new([]);
    for line in [
        "",
        "bogus",
        "image",
        "image import onlyname",
        "sandbox create web",
        "sandbox create web img --image img",
        "sandbox create web img --env NOVALUE",
        "sandbox create web img --memory lots",
        "sandbox create web img --pids 0",
        "sandbox create web img --mount /data",
        "sandbox rm",
        "sandbox show ",
        "exec web",
        "exec web --timeout soon -- true",
        "exec web --timeout 0s -- true",
        "exec web -e =x -- true",
        "exec web --key  -- true",
        "turn list web --limit 0",
        "turn list web --last 1 --from 2",
        "rollback web",
        "status -q -v",
        "completions tcl",
    ] {
        let run = server.run(line);
        assert_eq!(
            (run.code, run.stdout.as_str()),
            (2, ""),
            "{line:?}: {run:?}"
        );
        assert!(!run.stderr.is_empty());
    }
    assert!(server.asked().is_empty(), "{:?}", server.asked());
}

#[test]
fn help_version_and_completions_need_no_daemon() {
    let server = Server::new([]);
    for (line, text) in [
        ("--help", "A first session"),
        ("exec --help", "Exit codes"),
        ("sandbox rm --help", "checkpoints and turns are kept"),
        ("--version", "tidepool 0."),
        ("completions bash", "_tidepool()"),
        ("completions zsh", "#compdef tidepool"),
        ("completions fish", "complete -c tidepool"),
    ] {
        let run = server.run(line);
        assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:?}");
        assert!(run.stdout.contains(text), "{line}: {run:?}");
    }
    assert!(server.asked().is_empty());
}

#[test]
fn every_command_has_an_example() {
    let server = Server::new([]);
    for command in [
        "image import",
        "image list",
        "sandbox create",
        "sandbox list",
        "sandbox show",
        "sandbox rm",
        "sandbox pause",
        "sandbox resume",
        "exec",
        "turn list",
        "checkpoint create",
        "checkpoint list",
        "checkpoint show",
        "checkpoint diff",
        "restore",
        "rollback",
        "fork",
        "status",
        "completions",
    ] {
        let run = server.run(&format!("{command} --help"));
        assert_eq!(run.code, 0);
        assert!(
            run.stdout.contains(&format!("  tidepool {command}")),
            "{command}: {run:?}"
        );
    }
}

#[test]
fn a_reader_that_has_gone_ends_the_command_quietly() {
    let server = Server::new([(
        "/v1/sandboxes",
        Reply::json(json!([sandbox("web", "running")])),
    )]);
    for line in [
        "sandbox list",
        "--json sandbox list",
        "--help",
        "completions bash",
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = server.command(line);
        let run = Running::start(command.stdout(writer).stderr(Stdio::piped())).finish();
        assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{line}: {run:?}");
    }
}

#[test]
fn a_full_disk_behind_stdout_is_an_error() {
    let server = Server::new([(
        "/v1/sandboxes",
        Reply::json(json!([sandbox("web", "running")])),
    )]);
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut command = server.command("sandbox list");
    let run = Running::start(command.stdout(full).stderr(Stdio::piped())).finish();
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.stderr.contains("cannot write to stdout"), "{run:?}");
}

#[test]
fn signals_cancel_with_130() {
    for signal in [Signal::INT, Signal::TERM] {
        let server = Server::new([("/v1/images", Reply::steps([Step::Hang]))]);
        let mut command = server.command("image import a /nowhere");
        let running = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        server.wait_for("POST /v1/images", b"/nowhere");
        running.signal(signal);
        let run = running.finish();
        assert_eq!((run.code, run.stdout.as_str()), (130, ""), "{run:?}");
        assert!(
            run.stderr.starts_with("tidepool: error: cancelled"),
            "{run:?}"
        );
    }
}
