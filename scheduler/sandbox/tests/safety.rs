//! What processes inside cannot do, and what nothing leaves behind.

mod common;

use common::{Host, KEY, exec, output, script, unique};
use std::fs;
use tidepool_sandbox::{
    ExitStatus, Hold, HostMount, Layers, SandboxError, SandboxSpec, State, open_files,
};

/// Makes raw system calls and prints their errno.
const CALLS: &str = r#"python3 -c '
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    r = libc.syscall(*args)
    return 0 if r >= 0 else ctypes.get_errno()
import socket
def family(n):
    try: socket.socket(n, socket.SOCK_SEQPACKET); return 0
    except OSError as e: return e.errno
print(call(425, 4, 0), call(426, 0, 0, 0, 0, 0), call(427, 0, 0, 0, 0), call(435, 0, 0), family(38), family(40))
print(libc.unshare(0x10000000), ctypes.get_errno(), libc.mount(b"x", b"/tmp", b"tmpfs", 0, None), ctypes.get_errno())
'"#;

#[tokio::test(flavor = "multi_thread")]
async fn dangerous_calls_are_refused_and_io_uring_is_not_there() {
    let host = Host::new().await;
    let (_, client) = host.sandbox("calls").await;
    let (nosys, noaf, perm) = (libc::ENOSYS, libc::EAFNOSUPPORT, libc::EPERM);
    let expected = format!("{nosys} {nosys} {nosys} {nosys} {noaf} {noaf}\n-1 {perm} -1 {perm}");
    assert_eq!(output(&client, CALLS).await, expected);
    let status = output(&client, "while read -r k v; do case $k in NoNewPrivs:|CapEff:|Seccomp:) echo $k $v;; esac; done < /proc/self/status").await;
    assert_eq!(
        status,
        "CapEff: 00000000a80425fb\nNoNewPrivs: 1\nSeccomp: 2"
    );
    for path in [
        "/proc/sys/kernel/hostname",
        "/proc/sysrq-trigger",
        "/sys/kernel/x",
    ] {
        assert_ne!(
            exec(&client, &format!("echo x > {path}")).await.status,
            ExitStatus::Code(0),
            "{path}"
        );
    }
    assert_eq!(
        output(
            &client,
            "head -c 10 /proc/kcore | wc -c; ls /sys/fs/cgroup /sys/firmware | wc -w"
        )
        .await,
        "0\n2"
    );
    assert_ne!(
        exec(&client, "echo x > /.tidepool/init").await.status,
        ExitStatus::Code(0)
    );
    // Limits hold.
    let fork = "python3 -c '
import os, sys, time
n = 0
try:
    while n < 1000:
        if os.fork() == 0: time.sleep(30); os._exit(0)
        n += 1
except OSError: pass
print(n < 256)
sys.stdout.flush()
os.system(\"kill -9 -1\")'";
    assert!(String::from_utf8_lossy(&exec(&client, fork).await.stdout).contains("True"));
    assert_eq!(output(&client, "echo alive").await, "alive");
    let eat = "python3 -c 'x = bytearray(2 << 30)'";
    assert_ne!(
        exec(&client, eat).await.status,
        ExitStatus::Code(0),
        "it may have 1 GiB"
    );
    assert_eq!(output(&client, "echo alive").await, "alive");
}

#[tokio::test(flavor = "multi_thread")]
async fn init_obeys_only_the_holder_of_the_key() {
    let host = Host::new().await;
    let (name, client) = host.sandbox("key").await;
    let wrong = host.runtime.connect(&name, &[8; 32]).await;
    assert!(matches!(wrong, Err(SandboxError::Init(_))));
    let witness = client
        .spawn(script("witness", "read -r x < <(sleep 3; echo x); echo $x"))
        .await
        .expect("spawned");
    // From inside: connect and leave, garbage, floods, a reflected greeting, many at once.
    let attack = r#"python3 -c '
import os, socket
held = []
for i in range(600):
    try:
        s = socket.create_connection(("127.0.0.1", 7421), timeout=2)
        if i % 5 == 0: s.close(); continue
        hello = s.recv(100)
        if i % 5 == 1: s.sendall(os.urandom(5000))
        if i % 5 == 2: s.sendall(hello[8:] + hello[8:])
        if i % 5 == 3: s.sendall(b"\x00" * 64 + b"\xff" * 1000)
        held.append(s)
    except OSError as e: pass
for s in held:
    try:
        s.settimeout(6)
        while (got := s.recv(100)): assert len(got) < 40, got
    except ConnectionError: pass
print("done")'"#;
    assert_eq!(output(&client, attack).await, "done");
    assert_eq!(witness.wait(100).await.expect("its end").stdout, b"x\n");
    // Its memory and its descriptors are out of reach, for root inside too.
    let peek = "python3 -c '
for f in (\"mem\", \"environ\"):
    try: open(\"/proc/1/\" + f, \"rb\").read(1); print(\"read\", f)
    except OSError as e: print(e.errno)'; ls /proc/1/fd 2>&1 | wc -l; kill -9 1; kill -TERM 1; echo $$ > /dev/null";
    let seen = output(&client, peek).await;
    assert!(!seen.contains("read"), "{seen}");
    assert_eq!(output(&client, "echo alive").await, "alive");
    let ends = client.list().await.expect("a list");
    assert!(
        ends.iter()
            .all(|j| j.job.starts_with("job-") || j.job == "witness"),
        "{ends:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn states_processes_and_held_files_are_seen() {
    let host = Host::new().await;
    let name = unique("states");
    assert_eq!(
        host.runtime.state(&name).await.expect("a state"),
        State::Absent
    );
    let mut spec = common::spec();
    let shared = host.dir.path().join("shared");
    fs::create_dir(&shared).expect("made");
    fs::write(shared.join("file"), "from the host").expect("written");
    spec.mounts = vec![HostMount {
        source: shared.clone(),
        target: "/mnt/shared".into(),
        read_only: true,
    }];
    let layers = host.layers(&name);
    let created = host
        .runtime
        .create(&name, &spec, &layers, &KEY)
        .await
        .expect("created");
    assert_eq!(
        host.runtime.state(&name).await.expect("a state"),
        State::Created(created)
    );
    let twice = host.runtime.create(&name, &spec, &layers, &KEY).await;
    assert!(matches!(twice, Err(SandboxError::Exists(_))));
    assert!(
        !host
            .runtime
            .processes(&name)
            .await
            .expect("processes")
            .is_empty(),
        "the first is not disturbed"
    );
    host.runtime.start(&name).await.expect("started");
    assert_eq!(
        host.runtime.state(&name).await.expect("a state"),
        State::Running(created)
    );
    assert_eq!(
        host.runtime.list().await.expect("a list"),
        vec![(name.clone(), State::Running(created))]
    );
    let client = host.runtime.connect(&name, &KEY).await.expect("connected");
    assert_eq!(
        output(&client, "cat /mnt/shared/file").await,
        "from the host"
    );
    assert_ne!(
        exec(&client, "touch /mnt/shared/x").await.status,
        ExitStatus::Code(0)
    );
    let held = client.spawn(script(
        "held",
        "exec 5>/tmp/kept 6>/tmp/gone 7</etc/group; rm /tmp/gone; cd /var; exec sleep 1000",
    ));
    let held = held.await.expect("spawned");
    common::eventually(
        &client,
        "for p in /proc/[0-9]*; do [ \"$(cat $p/comm)\" = sleep ] && exit 0; done; exit 1",
    )
    .await;
    let processes = host.runtime.processes(&name).await.expect("processes");
    let sleeper = processes.iter().find(|p| p.comm == "sleep").expect("found");
    assert_eq!(
        (
            sleeper.inside_pid.unsigned_abs(),
            sleeper.cmdline.join(" ").as_str()
        ),
        (held.pid, "sleep 1000")
    );
    assert!(
        processes
            .iter()
            .any(|p| p.inside_pid == 1 && p.pid == created.init_pid)
    );
    let files = open_files(sleeper.pid).expect("its files");
    let has = |path: &str, deleted: bool, hold: fn(&Hold) -> bool| {
        files
            .iter()
            .any(|f| f.path.to_str() == Some(path) && f.deleted == deleted && hold(&f.hold))
    };
    assert!(
        has("/tmp/kept", false, |h| matches!(
            h,
            Hold::Open {
                fd: 5,
                writable: true
            }
        )),
        "{files:?}"
    );
    assert!(
        has("/tmp/gone", true, |h| matches!(
            h,
            Hold::Open {
                fd: 6,
                writable: true
            }
        )),
        "{files:?}"
    );
    assert!(
        has("/etc/group", false, |h| matches!(
            h,
            Hold::Open {
                fd: 7,
                writable: false
            }
        )),
        "{files:?}"
    );
    assert!(
        has("/usr/bin/sleep", false, |h| matches!(h, Hold::Program)),
        "{files:?}"
    );
    assert!(
        has("/usr/bin/sleep", false, |h| matches!(
            h,
            Hold::Mapped { .. }
        )),
        "{files:?}"
    );
    assert!(
        has("/var", false, |h| matches!(h, Hold::WorkingDirectory)),
        "{files:?}"
    );

    // Frozen means frozen, and a second freeze changes nothing.
    host.runtime.pause(&name).await.expect("paused");
    host.runtime.pause(&name).await.expect("paused");
    assert_eq!(
        host.runtime.state(&name).await.expect("a state"),
        State::Paused(created)
    );
    host.runtime.resume(&name).await.expect("resumed");
    assert_eq!(output(&client, "echo alive").await, "alive");
    // A killed sandbox is seen as such, and a frozen one can be removed.
    host.runtime.pause(&name).await.expect("paused");
    host.runtime.destroy(&name).await.expect("destroyed");
    assert_eq!(
        host.runtime.state(&name).await.expect("a state"),
        State::Absent
    );
    assert!(matches!(
        host.runtime.pause(&name).await,
        Err(SandboxError::NotFound(_))
    ));
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert!(shared.join("file").exists(), "what is mounted in stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_sandboxes_that_fail_or_are_killed() {
    let host = Host::new().await;
    let namespaces = || {
        fs::read_dir("/run/netns").map(|d| d.flatten().map(|e| e.file_name()).collect::<Vec<_>>())
    };
    // A mount whose source is missing fails late, in the runtime itself.
    let name = unique("fails");
    let spec = SandboxSpec {
        mounts: vec![HostMount {
            source: "/nowhere/at/all".into(),
            target: "/mnt".into(),
            read_only: true,
        }],
        ..common::spec()
    };
    let failed = host
        .runtime
        .create(&name, &spec, &host.layers(&name), &KEY)
        .await;
    assert!(
        matches!(&failed, Err(e @ SandboxError::Command { .. }) if e.to_string().contains("/nowhere/at/all")),
        "{failed:?}"
    );
    assert_eq!(
        host.runtime.state(&name).await.expect("a state"),
        State::Absent
    );
    let name = unique("missing");
    let layers = Layers {
        lower: vec!["/nowhere/at/all".into()],
        ..host.layers(&name)
    };
    assert!(
        host.runtime
            .create(&name, &common::spec(), &layers, &KEY)
            .await
            .is_err()
    );
    assert_eq!(host.leftovers(), Vec::<String>::new());

    let (name, client) = host.sandbox("killed").await;
    exec(
        &client,
        "setsid sleep 1000 >/dev/null 2>&1 & setsid sleep 1001 > /tmp/x 2>&1 &",
    )
    .await;
    let (State::Running(created), record) = (
        host.runtime.state(&name).await.expect("a state"),
        host.runtime.layers(&name).expect("layers"),
    ) else {
        panic!("it runs")
    };
    // SAFETY: no pointers; the number is that of this test's own sandbox.
    assert_eq!(unsafe { libc::kill(created.init_pid, libc::SIGKILL) }, 0);
    for _ in 0..400 {
        if host.runtime.state(&name).await.expect("a state") == State::Stopped {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    assert_eq!(
        host.runtime.list().await.expect("a list"),
        vec![(name.clone(), State::Stopped)]
    );
    assert!(client.ping().await.is_err());
    let before = namespaces().expect("namespaces");
    host.runtime.destroy(&name).await.expect("destroyed");
    host.runtime
        .destroy(&name)
        .await
        .expect("destroying nothing is fine");
    let after = namespaces().expect("namespaces");
    assert!(after.len() < before.len());
    assert!(!record.merged.exists() && record.upper.exists());
    assert_eq!(host.leftovers(), Vec::<String>::new());
    // Its name and its layers can be used again.
    let layers = host.layers(&name);
    host.runtime
        .create(&name, &common::spec(), &layers, &KEY)
        .await
        .expect("created");
    // Removed before it ever ran, and with mounts in its directory as a killed restore leaves them.
    let stray = host
        .dir
        .path()
        .join("run/sandboxes")
        .join(name.as_str())
        .join("restore/stray");
    let precious = host.dir.path().join("precious");
    fs::create_dir_all(&stray).expect("made");
    fs::create_dir(&precious).expect("made");
    fs::write(precious.join("file"), "of the host").expect("written");
    common::sh(&format!(
        "mount --bind {0} {1} && mount --bind {0} {1}",
        precious.display(),
        stray.display()
    ));
    host.runtime.destroy(&name).await.expect("destroyed");
    assert!(precious.join("file").exists());
    assert_eq!(
        common::sh(&format!(
            "find /sys/fs/cgroup -name {} -type d",
            host.cgroup_parent
        )),
        "",
        "the parent goes with the last sandbox"
    );
    assert_eq!(host.leftovers(), Vec::<String>::new());
}
