//! Watching a thaw after real dumps: runc, CRIU, the freezer, and processes that wait or run in every way.
//!
//! Needs root, eBPF, runc and CRIU, and fails where they are missing. Thaws without a dump are in the other test.

#[path = "../../scheduler/sandbox/tests/common/mod.rs"]
mod common;

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{Host, eventually, exec};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tidepool_inspector::{
    Inspector, InspectorOptions, SandboxSlot, Target, TaskTable, Thaw, ThawBecause, ThawWatch,
};
use tidepool_sandbox::{InitClient, SandboxName, State};

/// Far more than threads need to find back to where they waited; only to end a hang.
const PATIENCE: Duration = Duration::from_secs(30);

/// A sandbox under an inspector.
struct Watched {
    inspector: Inspector,
    slot: SandboxSlot,
    init: u32,
    name: SandboxName,
    client: InitClient,
    // Dropped last.
    host: Host,
}

impl Watched {
    async fn new(what: &str) -> Self {
        let host = Host::new().await;
        let (name, client) = host.sandbox(what).await;
        let state = host.runtime.state(&name).await.expect("a state");
        let State::Running(created) = state else {
            panic!("{state:?}");
        };
        let inspector = Inspector::load(&InspectorOptions::default()).expect("loaded");
        let target = Target {
            pid_ns_inode: created.pid_ns_inode,
            upper_dir: host.runtime.layers(&name).expect("layers").upper,
        };
        let slot = inspector.register(&target).expect("registered");
        Self {
            inspector,
            slot,
            init: created.init_pid.cast_unsigned(),
            name,
            client,
            host,
        }
    }

    /// A file of the sandbox.
    fn file(&self, path: &str) -> PathBuf {
        let layers = self.host.runtime.layers(&self.name).expect("layers");
        layers.merged.join(path)
    }

    /// Starts a Python program in the background, and waits until it says that it is about to do what it is for.
    async fn start(&self, name: &str, python: &str) {
        let program = format!(
            "import os, select, signal, socket, threading, time\n\
             ready = lambda: open('/tmp/{name}.ready', 'w').close()\n{python}\n"
        );
        fs::write(self.file(&format!("tmp/{name}.py")), program).expect("written");
        let start = format!("python3 /tmp/{name}.py </dev/null >/tmp/{name}.log 2>&1 &");
        exec(&self.client, &start).await;
        eventually(&self.client, &format!("test -e /tmp/{name}.ready")).await;
    }

    /// Threads of the sandbox, without those of its init.
    fn tasks(&self) -> TaskTable {
        let mut tasks = self.inspector.tasks(self.slot).expect("tasks");
        tasks.tasks.retain(|t| t.tgid != self.init);
        tasks
    }

    /// Waits until all threads have come to rest, for good as far as a tenth of a second can tell.
    fn settle(&self) {
        let start = Instant::now();
        let mut before = self.tasks();
        while start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(100));
            let now = self.tasks();
            if now.ran_since(&before).is_empty() {
                return;
            }
            before = now;
        }
        panic!("no rest: {before:?}");
    }

    /// The number on the host of the process with this name.
    fn pid(&self, comm: &str) -> Pid {
        let tasks = self.tasks();
        let task = tasks.tasks.iter().find(|t| t.comm == comm);
        let pid = task.unwrap_or_else(|| panic!("no {comm}: {tasks:?}")).tgid;
        Pid::from_raw(pid.cast_signed()).expect("a number")
    }

    /// Freezes and dumps, and begins to watch.
    async fn dump(&self) -> ThawWatch {
        let images = self.host.dir.path().join("images");
        let runtime = &self.host.runtime;
        runtime.pause(&self.name).await.expect("paused");
        let dumped = runtime.checkpoint(&self.name, &images).await;
        dumped.expect("dumped");
        fs::remove_dir_all(images).expect("removed");
        self.inspector.watch_thaw(self.slot).expect("watched")
    }

    async fn thaw(&self) {
        let thawed = self.host.runtime.resume(&self.name).await;
        thawed.expect("resumed");
    }

    /// The final answer; pending if there is none.
    fn answer(&self, watch: &ThawWatch) -> Thaw {
        let start = Instant::now();
        loop {
            let thaw = watch.poll(self.init).expect("polled");
            if thaw != Thaw::Pending || start.elapsed() > PATIENCE {
                return thaw;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A dump and a thaw after which something must have run, for one of these reasons.
    async fn must_have_run(&self, because: &[ThawBecause]) {
        let watch = self.dump().await;
        self.thaw().await;
        self.ran(&watch, because);
    }

    /// Waits until a comparison with this reading shows the program as having run.
    fn seen_later(&self, before: &TaskTable) {
        let start = Instant::now();
        let ran = || {
            let ran = self.tasks().ran_since(before);
            ran.iter().any(|r| r.task.comm == "python3")
        };
        while !ran() {
            assert!(start.elapsed() < PATIENCE, "it never ran");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn ran(&self, watch: &ThawWatch, because: &[ThawBecause]) {
        let Thaw::Ran(ran) = self.answer(watch) else {
            panic!("{:?}", watch.poll(self.init));
        };
        assert!(
            ran.iter().any(|r| because.contains(&r.because)),
            "{because:?}: {ran:?}"
        );
    }
}

/// Ways to wait, and whether the call comes back with `EINTR` after a dump.
const IDLE: &[(&str, &str, bool)] = &[
    (
        "accept",
        "s = socket.socket(); s.bind(('127.0.0.1', 8000)); s.listen(); ready(); s.accept()",
        false,
    ),
    // The shell in wait4, and the other one asleep with a time limit.
    (
        "shell",
        "ready(); os.execvp('bash', ['bash', '-c', 'sleep 100000; true'])",
        true,
    ),
    (
        "poll",
        "p = select.poll(); p.register(os.pipe()[0]); ready(); p.poll()",
        true,
    ),
    (
        "poll-limit",
        "p = select.poll(); p.register(os.pipe()[0]); ready(); p.poll(100000000)",
        true,
    ),
    (
        "epoll",
        "p = select.epoll(); p.register(os.pipe()[0]); ready(); p.poll()",
        true,
    ),
    (
        "epoll-limit",
        "p = select.epoll(); p.register(os.pipe()[0]); ready(); p.poll(100000)",
        true,
    ),
    (
        "select",
        "ready(); select.select([os.pipe()[0]], [], [])",
        false,
    ),
    (
        "select-limit",
        "ready(); select.select([os.pipe()[0]], [], [], 100000)",
        false,
    ),
    ("pause", "ready(); signal.pause()", false),
    ("sleep", "ready(); time.sleep(100000)", false),
    ("sigwait", "ready(); signal.sigwait([signal.SIGUSR1])", true),
    ("pipe", "r, w = os.pipe(); ready(); os.read(r, 1)", false),
    ("tty", "a, b = os.openpty(); ready(); os.read(b, 100)", false),
    (
        "recv",
        "a, b = socket.socketpair(); ready(); a.recv(100)",
        false,
    ),
    (
        "zombie",
        "os.posix_spawn('/bin/true', ['true'], {}); ready(); signal.pause()",
        false,
    ),
    (
        "threads",
        "a, b = socket.socketpair()
held = threading.Lock(); held.acquire()
for wait in [held.acquire, threading.Event().wait, lambda: threading.Event().wait(100000), lambda: a.recv(10)]:
    threading.Thread(target=wait).start()
ready(); threading.Event().wait()",
        true,
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn idle_processes_have_not_run_after_many_dumps() {
    let watched = Watched::new("idle").await;
    for (name, python, _) in IDLE {
        watched.start(name, python).await;
    }
    watched.settle();
    let threads = watched.tasks().tasks.len();
    assert!(threads >= IDLE.len() + 5, "{threads}");
    for round in 0..20 {
        let watch = watched.dump().await;
        // Nothing may be said of what has not been thawed.
        assert_eq!(watch.poll(watched.init).expect("polled"), Thaw::Pending);
        watched.thaw().await;
        let Thaw::Quiet { tasks, resumed } = watched.answer(&watch) else {
            panic!("round {round}: {:?}", watch.poll(watched.init));
        };
        drop(watch);
        assert_eq!(resumed.len(), IDLE.iter().filter(|i| i.2).count());
        // The reading is one to compare with: nothing moves any more.
        std::thread::sleep(Duration::from_millis(20));
        let mut ran = watched
            .inspector
            .tasks(watched.slot)
            .expect("tasks")
            .ran_since(&tasks);
        ran.retain(|r| r.task.tgid != watched.init);
        assert!(ran.is_empty(), "round {round}: {ran:?}");
        assert_eq!(tasks.tasks.len(), threads + 1);
    }
    // And what then runs is seen against it.
    let watch = watched.dump().await;
    watched.thaw().await;
    let Thaw::Quiet { tasks, .. } = watched.answer(&watch) else {
        panic!("{:?}", watch.poll(watched.init));
    };
    drop(watch);
    exec(&watched.client, "exec 3<>/dev/tcp/127.0.0.1/8000").await;
    assert!(
        watched
            .tasks()
            .ran_since(&tasks)
            .iter()
            .any(|r| r.task.comm == "python3")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timer_loop_has_run() {
    let watched = Watched::new("timer").await;
    watched
        .start("timer", "ready()\nwhile True: time.sleep(0.005)")
        .await;
    for _ in 0..20 {
        let watch = watched.dump().await;
        watched.thaw().await;
        // Its sleep may not be over yet; then a later look sees it.
        if let Thaw::Quiet { tasks, .. } = watched.answer(&watch) {
            watched.seen_later(&tasks);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_during_the_freeze_has_run() {
    let watched = Watched::new("connection").await;
    let server = "s = socket.socket(); s.bind(('127.0.0.1', 8000)); s.listen(); ready(); kept = []\n\
                  while True:\n c = s.accept(); kept.append(c); c[0].send(b'!')";
    watched.start("server", server).await;
    watched.settle();
    let watch = watched.dump().await;
    // From the host, inside the sandbox's network: nothing that is frozen takes part.
    let init = watched.init;
    let connecting = std::thread::spawn(move || {
        let network = fs::File::open(format!("/proc/{init}/ns/net")).expect("a network");
        move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&network),
            Some(LinkNameSpaceType::Network),
        )
        .expect("entered");
        TcpStream::connect("127.0.0.1:8000").expect("connected")
    });
    let mut peer = connecting.join().expect("connected");
    watched.thaw().await;
    watched.ran(&watch, &[ThawBecause::Called]);
    let mut byte = [0];
    peer.read_exact(&mut byte).expect("answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_in_user_mode_has_run() {
    let watched = Watched::new("user").await;
    watched.start("busy", "ready()\nwhile True: pass").await;
    watched.must_have_run(&[ThawBecause::UserMode]).await;
    kill_process(watched.pid("python3"), Signal::KILL).expect("killed");
    while !watched.tasks().tasks.is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }

    // Busy at the freeze; afterwards it goes to sleep with a single system call.
    watched
        .start(
            "until",
            "import mmap
f = open('/tmp/flag', 'w+b'); f.write(b'0' * 4096); f.flush()
m = mmap.mmap(f.fileno(), 4096)
ready()
while m[0] == 48: pass
signal.pause()",
        )
        .await;
    let watch = watched.dump().await;
    fs::write(watched.file("tmp/flag"), "1").expect("written");
    watched.thaw().await;
    watched.settle();
    watched.ran(&watch, &[ThawBecause::UserMode]);
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_births_and_ends_have_run() {
    let watched = Watched::new("signals").await;
    watched
        .start(
            "handler",
            "signal.signal(signal.SIGUSR1, lambda *a: None); ready()\nwhile True: signal.pause()",
        )
        .await;
    watched.settle();
    let watch = watched.dump().await;
    kill_process(watched.pid("python3"), Signal::USR1).expect("signalled");
    watched.thaw().await;
    watched.ran(&watch, &[ThawBecause::Signal]);
    drop(watch);

    // A process that is gone again when the question is asked.
    watched.settle();
    let watch = watched.dump().await;
    watched.thaw().await;
    exec(&watched.client, "true").await;
    watched.ran(&watch, &[ThawBecause::New]);
    drop(watch);

    watched.settle();
    let watch = watched.dump().await;
    kill_process(watched.pid("python3"), Signal::KILL).expect("killed");
    watched.thaw().await;
    while !watched.tasks().tasks.is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    watched.ran(&watch, &[ThawBecause::Gone]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_with_effects_has_run() {
    let watched = Watched::new("write").await;
    watched
        .start(
            "full",
            "r, w = os.pipe(); ready(); os.write(w, b'x' * 65536); os.write(w, b'x')",
        )
        .await;
    watched.settle();
    watched.must_have_run(&[ThawBecause::MayAct]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_running_thread_among_idle_ones_has_run() {
    let watched = Watched::new("one").await;
    watched
        .start(
            "threads",
            "def tick(event):
    while True: event.set(); time.sleep(0.0001)
event = threading.Event()
threading.Thread(target=tick, args=[event]).start()
ready()
while True: event.wait(); event.clear()",
        )
        .await;
    for _ in 0..5 {
        let watch = watched.dump().await;
        watched.thaw().await;
        // Either at once, or by a later look.
        if let Thaw::Quiet { tasks, .. } = watched.answer(&watch) {
            watched.seen_later(&tasks);
        }
    }
}
