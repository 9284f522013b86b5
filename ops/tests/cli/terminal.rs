//! What only shows on a terminal: raw mode and its end, sizes, progress bars, narrow tables.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcgetwinsize, tcsetwinsize};
use serde_json::json;

use crate::exec::{exit, server, started, stdout};
use crate::output::sandbox;
use crate::server::{Reply, Running, Server, Step};

/// A pseudo-terminal. What is written to it is read all the time, so that nobody blocks.
struct Pty {
    master: Arc<OwnedFd>,
    device: File,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Pty {
    fn new(cols: u16, rows: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let fd = rustix::fs::open(
            name,
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        let pty = Self {
            master: Arc::new(master),
            device: fd.into(),
            seen: Arc::default(),
        };
        pty.resize(cols, rows);
        let mut reader = File::from(pty.master.try_clone().unwrap());
        let seen = pty.seen.clone();
        std::thread::spawn(move || {
            let mut buffer = [0u8; 4096];
            // Ends with EIO when the last holder of the device closes it.
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                seen.lock().unwrap().extend_from_slice(&buffer[..n]);
            }
        });
        pty
    }

    fn resize(&self, cols: u16, rows: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.device, size).unwrap();
        assert_eq!(tcgetwinsize(&self.device).unwrap().ws_col, cols);
    }

    fn type_in(&self, bytes: &[u8]) {
        assert_eq!(
            rustix::io::write(&*self.master, bytes).unwrap(),
            bytes.len()
        );
    }

    fn end(&self) -> Stdio {
        self.device.try_clone().unwrap().into()
    }

    /// The settings that raw mode changes.
    fn modes(&self) -> String {
        let t = tcgetattr(&self.device).unwrap();
        format!(
            "{:?} {:?} {:?} {:?}",
            t.local_modes, t.input_modes, t.output_modes, t.control_modes
        )
    }

    /// Waits until this was shown; gives all that was.
    fn wait_for(&self, text: &str) -> String {
        for _ in 0..6000 {
            let seen = String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned();
            if seen.contains(text) {
                return seen;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!(
            "{text:?} was not shown: {:?}",
            String::from_utf8_lossy(&self.seen.lock().unwrap())
        );
    }

    fn exec(&self, server: &Server) -> Running {
        let mut command = server.command("exec -it --key k web -- bash");
        Running::start(
            command
                .stdin(self.end())
                .stdout(self.end())
                .stderr(self.end()),
        )
    }
}

const STDIN: &str = "/execs/k/stdin";

#[test]
fn the_command_gets_the_terminal_and_it_is_given_back() {
    let pty = Pty::new(101, 41);
    let before = pty.modes();
    let server = server([
        started(false),
        // One key without a newline, and a carriage return that stays one: the terminal is raw.
        Step::Until(STDIN, b"a\r\x03".to_vec()),
        stdout(b"shown\r\n"),
        Step::Until("/execs/k/resize", br#"{"cols":77,"rows":33}"#.to_vec()),
        exit(json!({"code": 5})),
    ]);
    let running = pty.exec(&server);
    server.wait_for("/exec", b"bash");
    // Raw mode comes with the start of the command; typed before that, Ctrl-C would be the client's.
    while pty.modes() == before {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    pty.type_in(b"a\r\x03");
    pty.wait_for("shown");
    pty.resize(77, 33);
    running.signal(Signal::WINCH);
    let run = running.finish();
    assert_eq!(run.code, 5);
    assert_eq!(pty.modes(), before);
    let body = server.asked_for("/exec").json();
    assert_eq!(body["tty"], json!({"cols": 101, "rows": 41}));
    assert_eq!(body["env"], json!(["TERM=xterm-test"]));
    assert!(
        server.asked().iter().all(|a| !a.what.ends_with("/signal")),
        "{:?}",
        server.asked()
    );
}

#[test]
fn the_terminal_is_given_back_when_the_daemon_dies() {
    let pty = Pty::new(80, 24);
    let before = pty.modes();
    let server = server([started(false), Step::Until(STDIN, b"x".to_vec()), Step::Cut]);
    let running = pty.exec(&server);
    pty.type_in(b"x");
    assert_eq!(running.finish().code, 12);
    assert_eq!(pty.modes(), before);
    // The message starts at the left: the terminal was given back before it was printed.
    pty.wait_for("tidepool: error: the connection to the host daemon was lost");
    pty.wait_for("\r\ntidepool: ");
}

#[test]
fn the_terminal_is_given_back_on_signals_and_on_escape() {
    for escape in [true, false] {
        let pty = Pty::new(80, 24);
        let before = pty.modes();
        let server = server([
            started(false),
            Step::Until(STDIN, b"x".to_vec()),
            stdout(b"up"),
            Step::Hang,
        ]);
        let running = pty.exec(&server);
        pty.type_in(b"x");
        pty.wait_for("up");
        assert_ne!(pty.modes(), before);
        if escape {
            pty.type_in(b"\x1d\x1d\x1d");
        } else {
            running.signal(Signal::TERM);
        }
        assert_eq!(running.finish().code, 130);
        assert_eq!(pty.modes(), before);
    }
}

#[test]
fn progress_is_drawn_on_a_terminal_only() {
    let server = Server::new([("/v1/sandboxes", Reply::done(sandbox("web", "running")))]);
    let pty = Pty::new(100, 24);
    let mut command = server.command("sandbox create web debian");
    let run = Running::start(command.stdout(Stdio::piped()).stderr(pty.end())).finish();
    assert_eq!(
        (run.code, run.stdout.as_str()),
        (0, "created web (00112233) from debian: running\n")
    );
    pty.wait_for("working hard");
    pty.wait_for("5 B of 10 B");

    let pty = Pty::new(100, 24);
    let mut command = server.command("-q sandbox create web debian");
    let run = Running::start(command.stdout(Stdio::piped()).stderr(pty.end())).finish();
    assert_eq!(run.code, 0);
    assert_eq!(*pty.seen.lock().unwrap(), b"");

    let run = server.run("sandbox create web debian");
    assert_eq!(run.stderr, "");
    let run = server.run("-v sandbox create web debian");
    assert_eq!(
        run.stderr.matches("tidepool: working hard\n").count(),
        1,
        "{run:?}"
    );
}

#[test]
fn tables_fit_a_terminal() {
    let mut long = sandbox("web", "running");
    long["capture_error"] = json!("x");
    long["name"] = json!("n".repeat(120));
    let server = Server::new([("/v1/sandboxes", Reply::json(json!([long])))]);
    let pty = Pty::new(120, 24);
    let mut command = server.command("sandbox list");
    let run = Running::start(command.stdout(pty.end()).stderr(Stdio::piped())).finish();
    assert_eq!(run.code, 0);
    let seen = pty.wait_for("last ");
    let row = seen.lines().nth(1).unwrap();
    assert!(row.len() <= 120 && row.contains("nn.."), "{seen:?}");
}
