//! Processes survive the death of everything around them.

mod common;

use common::{Host, KEY, eventually, exec, output, script, unique};
use tidepool_sandbox::{
    ExitStatus, HostMount, JobEvent, JobRequest, Runtime, RuntimeConfig, SandboxError, State,
};

/// Counts in memory; tells and raises its count for each connection.
const COUNTER: &str = r#"
cat > /tmp/counter.py <<'END'
import socket
count = 0
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("127.0.0.1", 8000))
server.listen()
while True:
    peer, _ = server.accept()
    count += 1
    peer.sendall(str(count).encode())
    peer.close()
END
python3 /tmp/counter.py >/tmp/counter.log 2>&1 &
"#;

const ASK: &str = "python3 -c '
import socket
s = socket.create_connection((\"127.0.0.1\", 8000))
print(s.recv(100).decode())'";

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_in_memory_goes_on_in_a_sandbox_of_another_name() {
    let host = Host::new().await;
    let (name, client) = host.sandbox("counter").await;
    exec(&client, COUNTER).await;
    eventually(&client, "exec 3<>/dev/tcp/127.0.0.1/8000").await;
    let before: u32 = output(&client, ASK).await.parse().expect("a number");
    // A job whose end is still to come, and whose output is half read.
    let waiting = client
        .spawn(script(
            "waiting",
            "echo early; read -r x < /tmp/go; echo late; exit 5",
        ))
        .await;
    exec(
        &client,
        "rm -f /tmp/go; python3 -c 'import os; os.mkfifo(\"/tmp/go\")'",
    )
    .await;
    drop(waiting);
    let waiting = client
        .spawn(script(
            "waiting-2",
            "echo early; read -r x < /tmp/go; echo \"late $x\"; exit 5",
        ))
        .await;
    let waiting = waiting.expect("spawned");

    let images = host.dir.path().join("images");
    host.runtime.pause(&name).await.expect("paused");
    let stats = host
        .runtime
        .checkpoint(&name, &images)
        .await
        .expect("checkpointed");
    assert!(stats.image_bytes > 0 && stats.image_files > 0);
    assert!(
        matches!(host.runtime.state(&name).await, Ok(State::Paused(_))),
        "paused before, paused after"
    );
    let copy = unique("copy");
    let layers = host.layers_with(&copy, &host.runtime.layers(&name).expect("layers").upper);
    host.runtime.resume(&name).await.expect("resumed");
    // The original goes on, with its connections.
    let next: u32 = output(&client, ASK).await.parse().expect("a number");
    assert_eq!(next, before + 1);
    drop(waiting);
    host.runtime.destroy(&name).await.expect("destroyed");
    assert_eq!(host.leftovers(), Vec::<String>::new());

    let created = host
        .runtime
        .restore(&copy, &common::spec(), &layers, &images)
        .await
        .expect("restored");
    assert_eq!(
        host.runtime.state(&copy).await.expect("a state"),
        State::Running(created)
    );
    let client = host.runtime.connect(&copy, &KEY).await.expect("connected");
    let next: u32 = output(&client, ASK).await.parse().expect("a number");
    assert_eq!(next, before + 1, "no gap and no repeat");
    let waiting = client
        .attach("waiting-2", 0, 0)
        .await
        .expect("the job is still there");
    exec(&client, "echo now > /tmp/go").await;
    let done = waiting.wait(1000).await.expect("it ends");
    assert_eq!(
        (done.status, done.stdout.as_slice()),
        (ExitStatus::Code(5), &b"early\nlate now\n"[..])
    );

    // And once more, from what was restored.
    let images = host.dir.path().join("images-2");
    host.runtime
        .checkpoint(&copy, &images)
        .await
        .expect("checkpointed");
    let third = unique("third");
    let layers = host.layers_with(&third, &layers.upper);
    host.runtime.destroy(&copy).await.expect("destroyed");
    host.runtime
        .restore(&third, &common::spec(), &layers, &images)
        .await
        .expect("restored");
    let client = host.runtime.connect(&third, &KEY).await.expect("connected");
    let next: u32 = output(&client, ASK).await.parse().expect("a number");
    assert_eq!(next, before + 2);
    host.runtime.destroy(&third).await.expect("destroyed");
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

/// Starts something, checkpoints it, restores it under another name and gives clients for both.
async fn through(host: &Host, what: &str, start: &str, ready: &str, after: &str) -> String {
    let (name, client) = host.sandbox(what).await;
    exec(&client, start).await;
    eventually(&client, ready).await;
    let images = host.dir.path().join(format!("images-{what}"));
    host.runtime.pause(&name).await.expect("paused");
    host.runtime
        .checkpoint(&name, &images)
        .await
        .unwrap_or_else(|e| panic!("{what}: {e:?}"));
    let copy = unique(what);
    let layers = host.layers_with(&copy, &host.runtime.layers(&name).expect("layers").upper);
    host.runtime.destroy(&name).await.expect("destroyed");
    host.runtime
        .restore(&copy, &common::spec(), &layers, &images)
        .await
        .unwrap_or_else(|e| panic!("{what}: {e:?}"));
    let client = host.runtime.connect(&copy, &KEY).await.expect("connected");
    let seen = output(&client, after).await;
    host.runtime.destroy(&copy).await.expect("destroyed");
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn databases_clocks_and_locks_go_on() {
    let host = Host::new().await;
    let start = r#"cat > /tmp/db.py <<'END'
import fcntl, sqlite3, time
lock = open("/tmp/lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
db = sqlite3.connect("/tmp/x.db", isolation_level=None)
db.execute("pragma journal_mode=wal"); db.execute("create table t(n integer primary key, at real)")
n, last = 0, time.monotonic()
while True:
    now = time.monotonic(); assert now >= last; last = now
    db.execute("insert into t values (?, ?)", (n, now)); n += 1
    time.sleep(0.02)
END
python3 /tmp/db.py > /tmp/log 2>&1 &"#;
    let count = "python3 -c '
import sqlite3
db = sqlite3.connect(\"/tmp/x.db\")
n, top = db.execute(\"select count(*), max(n) from t\").fetchone()
assert n == top + 1 and db.execute(\"pragma integrity_check\").fetchone() == (\"ok\",)
";
    // It grows again, however busy this machine is; whatever the writer had to say is a failure.
    let more = format!(
        "before=$({count}print(n)') || exit 1
for i in $(seq 1 60); do
    [ -s /tmp/log ] && break
    after=$({count}print(n)') && [ $after -gt $before ] && break
    sleep 0.5
done
[ $after -gt $before ] || ps -e -o stat,wchan,args
cat /tmp/log
python3 -c '
import fcntl
try: fcntl.flock(open(\"/tmp/lock\"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: print(\"locked\")'"
    );
    let ready = format!("{count}assert n > 5'");
    assert_eq!(through(&host, "db", start, &ready, &more).await, "locked");
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_and_files_without_a_name_go_on() {
    let host = Host::new().await;
    let start = r#"mkdir -p "/tmp/w/deep er"; cat > /tmp/held.py <<'END'
import ctypes, os
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(os.O_NONBLOCK)
for path in (b"/tmp/w", b"/tmp/w/deep er", b"/etc", b"/usr/bin", b"/dev/shm"):
    assert libc.inotify_add_watch(fd, path, 0x100) > 0
gone = open("/tmp/gone", "w+b"); gone.write(b"x" * 3000000); gone.flush(); os.unlink("/tmp/gone")
lower = open("/etc/group", "rb"); os.unlink("/etc/group")
open("/tmp/one", "w").write("linked"); os.link("/tmp/one", "/tmp/two")
linked = open("/tmp/one", "r+"); os.unlink("/tmp/one")
open("/tmp/ready", "w").close()
open("/tmp/go").read()
gone.seek(0); lower.seek(0); linked.write("changed"); linked.flush()
print(len(gone.read()), len(lower.read()) > 10, open("/tmp/two").read(), os.read(fd, 4096).count(b"seen"))
END
python3 -c 'import os; os.mkfifo("/tmp/go")'; python3 /tmp/held.py > /tmp/log 2>&1 &"#;
    let after = "touch /tmp/w/seen '/tmp/w/deep er/seen' /etc/seen /usr/bin/seen /dev/shm/seen; echo > /tmp/go; sleep 0.5; cat /tmp/log";
    assert_eq!(
        through(&host, "held", start, "test -e /tmp/ready", after).await,
        "3000000 True changed 5"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn open_connections_end_and_terminals_stay() {
    let host = Host::new().await;
    let (name, client) = host.sandbox("terminal").await;
    let shell = JobRequest {
        tty: Some((80, 24)),
        stdin: true,
        ..common::job("shell", &["bash", "--norc", "--noprofile", "-i"])
    };
    let mut shell = client.spawn(shell).await.expect("spawned");
    shell
        .control
        .stdin(b"X=42; sleep 1000 &\ntouch /tmp/ready\n")
        .await
        .expect("typed");
    eventually(&client, "test -e /tmp/ready").await;
    exec(
        &client,
        "python3 -c '
import socket
server = socket.create_server((\"127.0.0.1\", 9001))
client = socket.create_connection((\"127.0.0.1\", 9001))
open(\"/tmp/up\", \"w\").close()
print(\"got\", client.recv(10), flush=True)
' > /tmp/log 2>&1 &",
    )
    .await;
    eventually(&client, "test -e /tmp/up").await;
    let images = host.dir.path().join("images");
    // Not paused before, so running after; the client's connection to its terminal lives on.
    host.runtime
        .checkpoint(&name, &images)
        .await
        .expect("checkpointed");
    shell
        .control
        .stdin(b"echo orig\"inal\"\n")
        .await
        .expect("typed");
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("original") {
        let event =
            tokio::time::timeout(std::time::Duration::from_secs(30), shell.events.recv()).await;
        let Ok(Some(JobEvent::Stdout { data, .. })) = event else {
            panic!("the terminal lives on")
        };
        seen.extend_from_slice(&data);
    }
    let copy = unique("terminal");
    let layers = host.layers_with(&copy, &host.runtime.layers(&name).expect("layers").upper);
    host.runtime.destroy(&name).await.expect("destroyed");
    host.runtime
        .restore(&copy, &common::spec(), &layers, &images)
        .await
        .expect("restored");
    let client = host.runtime.connect(&copy, &KEY).await.expect("connected");
    eventually(&client, "[ \"$(cat /tmp/log)\" = \"got b''\" ]").await;
    let shell = client.attach("shell", 0, 0).await.expect("attached");
    shell
        .control
        .stdin(b"echo value $X; jobs; exit 3\n")
        .await
        .expect("typed");
    let done = shell.wait(1 << 20).await.expect("its end");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert_eq!(done.status, ExitStatus::Code(3));
    assert!(
        text.contains("value 42") && text.contains("Running") && !text.contains("original"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_dumped_is_told_in_words_and_goes_on() {
    let host = Host::new().await;
    let shared = host.dir.path().join("shared");
    std::fs::create_dir(&shared).expect("made");
    let listener =
        std::os::unix::net::UnixListener::bind(shared.join("socket")).expect("listening");
    let mut spec = common::spec();
    spec.mounts = vec![HostMount {
        source: shared,
        target: "/mnt/shared".into(),
        read_only: false,
    }];
    let (name, client) = host.sandbox_with("undumpable", &spec).await;
    let holder = "python3 -c '
import socket, time
s = socket.socket(socket.AF_UNIX); s.connect(\"/mnt/shared/socket\"); open(\"/tmp/up\", \"w\").close(); time.sleep(1000)' &";
    exec(&client, holder).await;
    eventually(&client, "test -e /tmp/up").await;
    let _peer = listener.accept().expect("connected");
    for frozen in [true, false] {
        if frozen {
            host.runtime.pause(&name).await.expect("paused");
        }
        let images = host.dir.path().join(format!("images-{frozen}"));
        let failed = host.runtime.checkpoint(&name, &images).await;
        let Err(SandboxError::Dump { reason, log }) = failed else {
            panic!("{failed:?}")
        };
        assert!(
            reason.contains("unix socket") && reason.contains("python3"),
            "{reason}"
        );
        assert!(log.contains("Error"), "{log}");
        let state = host.runtime.state(&name).await.expect("a state");
        assert_eq!(matches!(state, State::Paused(_)), frozen, "{state:?}");
        if frozen {
            host.runtime.resume(&name).await.expect("resumed");
        }
        assert_eq!(output(&client, "echo alive").await, "alive");
    }
    let traced = "python3 -c '
import ctypes, os, time
child = os.fork()
if child == 0: time.sleep(1000)
assert ctypes.CDLL(None).ptrace(16, child, 0, 0) == 0
open(\"/tmp/traced\", \"w\").close(); time.sleep(1000)' &";
    exec(&client, traced).await;
    eventually(&client, "test -e /tmp/traced").await;
    let failed = host
        .runtime
        .checkpoint(&name, &host.dir.path().join("images-traced"))
        .await;
    assert!(
        matches!(&failed, Err(SandboxError::Dump { reason, .. }) if reason.contains("traced by")),
        "{failed:?}"
    );
    assert_eq!(output(&client, "echo alive").await, "alive");
    // A checkpoint of what does not run, and a restore of what is broken or not there.
    let images = host.dir.path().join("images-good");
    let (good, _) = host.sandbox("good").await;
    host.runtime
        .checkpoint(&good, &images)
        .await
        .expect("checkpointed");
    let upper = host.runtime.layers(&good).expect("layers").upper;
    host.runtime.destroy(&good).await.expect("destroyed");
    assert!(matches!(
        host.runtime.checkpoint(&good, &images).await,
        Err(SandboxError::NotFound(_))
    ));
    let copy = unique("broken");
    let layers = host.layers_with(&copy, &upper);
    let nowhere = host.dir.path().join("nowhere");
    assert!(matches!(
        host.runtime
            .restore(&copy, &common::spec(), &layers, &nowhere)
            .await,
        Err(SandboxError::Invalid(_))
    ));
    let mut other = common::spec();
    other.init = Some("0".repeat(64));
    assert!(matches!(
        host.runtime.restore(&copy, &other, &layers, &images).await,
        Err(SandboxError::MissingInit(_))
    ));
    for entry in std::fs::read_dir(&images).expect("images").flatten() {
        if entry.file_name().to_string_lossy().starts_with("core-") {
            std::fs::write(entry.path(), b"broken").expect("written");
        }
    }
    let failed = host
        .runtime
        .restore(&copy, &common::spec(), &layers, &images)
        .await;
    assert!(
        matches!(&failed, Err(SandboxError::Restore { reason, .. }) if !reason.is_empty()),
        "{failed:?}"
    );
    host.runtime.destroy(&name).await.expect("destroyed");
    assert_eq!(host.runtime.list().await.expect("a list"), vec![]);
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_criu_everything_else_works() {
    let host = Host::new().await;
    let mut cfg = RuntimeConfig::new(host.dir.path().join("run"), host.dir.path().join("state"));
    cfg.cgroup_parent = host.cgroup_parent.clone();
    cfg.criu = "/nowhere/criu".into();
    let runtime = Runtime::new(cfg.clone())
        .await
        .expect("it need not be there");
    assert!(runtime.capabilities().criu.is_err());
    let (name, client) = host.sandbox("plain").await;
    let images = host.dir.path().join("images");
    let missing = runtime.checkpoint(&name, &images).await;
    assert!(
        matches!(missing, Err(SandboxError::MissingCriu { .. })),
        "{missing:?}"
    );
    let missing = runtime
        .restore(
            &unique("x"),
            &common::spec(),
            &host.layers(&name),
            host.dir.path(),
        )
        .await;
    assert!(
        matches!(missing, Err(SandboxError::MissingCriu { .. })),
        "{missing:?}"
    );
    assert_eq!(output(&client, "echo alive").await, "alive");
    // Another daemon over the same directories finds and removes what this one made.
    assert_eq!(runtime.list().await.expect("a list").len(), 1);
    runtime.destroy(&name).await.expect("destroyed");
    assert_eq!(host.leftovers(), Vec::<String>::new());
    cfg.runc = "/nowhere/runc".into();
    assert!(matches!(
        Runtime::new(cfg).await,
        Err(SandboxError::MissingRuntime { .. })
    ));
}

/// Two processes stopped by signals, one of them with threads and a lock, beside one that goes on.
const STOPPED: &str = r#"cat > /tmp/threads.py <<'END'
import fcntl, os, threading, time
lock = open("/tmp/lock", "w"); fcntl.lockf(lock, fcntl.LOCK_EX)
n = 0
def count():
    global n
    while True:
        n += 1; open("/tmp/count", "w").write(str(n)); time.sleep(0.01)
threads = [threading.Thread(target=time.sleep, args=(1000,)) for _ in range(3)] + [threading.Thread(target=count)]
for t in threads: t.start()
END
python3 /tmp/threads.py >/tmp/log 2>&1 & echo $! > /tmp/threads
sleep 1000 & echo $! > /tmp/sleep
sleep 1001 & echo $! > /tmp/goes-on
for i in $(seq 200); do [ -s /tmp/count ] && break; sleep 0.05; done
kill -STOP $(cat /tmp/threads) $(cat /tmp/sleep)"#;

#[tokio::test(flavor = "multi_thread")]
async fn stopped_processes_stay_stopped() {
    let host = Host::new().await;
    let (name, client) = host.sandbox("stopped").await;
    exec(&client, STOPPED).await;
    let states = "for f in threads sleep goes-on; do cat /proc/$(cat /tmp/$f)/task/*/stat; done | while read -r a b state c; do echo -n \"$state \"; done";
    let as_before = format!("[ \"$({states})\" = 'T T T T T T S ' ]");
    eventually(&client, &as_before).await;
    let images = host.dir.path().join("images-stopped");
    // Twice: what CRIU has stopped again is stopped as before.
    for round in ["first", "second"] {
        let images = images.with_extension(round);
        let dumped = host.runtime.checkpoint(&name, &images).await;
        dumped.unwrap_or_else(|e| panic!("the {round}: {e:?}"));
        eventually(&client, &as_before).await;
    }
    let copy = unique("stopped");
    let layers = host.layers_with(&copy, &host.runtime.layers(&name).expect("layers").upper);
    exec(&client, "kill -CONT $(cat /tmp/threads)").await;
    let moves = "n=$(cat /tmp/count); for i in $(seq 200); do m=$(cat /tmp/count); [ \"$m\" ] && [ \"$m\" != $n ] && exit 0; sleep 0.02; done; exit 1";
    eventually(&client, moves).await;
    host.runtime.destroy(&name).await.expect("destroyed");

    let images = images.with_extension("second");
    let restored = host
        .runtime
        .restore(&copy, &common::spec(), &layers, &images)
        .await;
    restored.unwrap_or_else(|e| panic!("{e:?}"));
    let client = host.runtime.connect(&copy, &KEY).await.expect("connected");
    eventually(&client, &as_before).await;
    exec(&client, "kill -CONT $(cat /tmp/threads) $(cat /tmp/sleep)").await;
    eventually(&client, moves).await;
    let locked = "python3 -c '
import fcntl
try: fcntl.lockf(open(\"/tmp/lock\", \"r+\"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: print(\"locked\")'";
    assert_eq!(output(&client, locked).await, "locked");
    host.runtime.destroy(&copy).await.expect("destroyed");
    assert_eq!(host.leftovers(), Vec::<String>::new());
}
