//! Jobs: streams, ends, time-outs, terminals, idempotency, and what outlives them.

mod common;

use common::{Host, eventually, exec, job, output, script};
use std::time::Duration;
use tidepool_sandbox::{
    ErrorKind, ExitStatus, Job, JobEvent, JobRequest, SandboxError, SandboxSpec, SignalScope,
};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Reads a job's output until it contains `what`, and gives all of it.
async fn read_until(job: &mut Job, what: &str) -> String {
    let mut seen = Vec::new();
    while !text(&seen).contains(what) {
        let event = tokio::time::timeout(Duration::from_secs(30), job.events.recv()).await;
        match event.unwrap_or_else(|_| panic!("never saw {what:?} in {:?}", text(&seen))) {
            Some(JobEvent::Stdout { data, .. }) => seen.extend_from_slice(&data),
            other => panic!("{other:?} before {what:?}; seen {:?}", text(&seen)),
        }
    }
    text(&seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_apart_and_ends_are_told() {
    let host = Host::new().await;
    let (_, client) = host.sandbox("streams").await;
    let done = exec(&client, "echo out; echo err >&2; exit 7").await;
    assert_eq!(
        (text(&done.stdout), text(&done.stderr)),
        ("out\n".into(), "err\n".into())
    );
    assert_eq!(
        (done.status, done.timed_out, done.truncated),
        (ExitStatus::Code(7), false, false)
    );
    assert_eq!(
        exec(&client, "kill -SEGV $$").await.status,
        ExitStatus::Signal(11)
    );
    // Output of several times what any buffer holds, whole and in order.
    let done = client
        .spawn(script("long", "seq 1 400000"))
        .await
        .expect("spawned")
        .wait(1 << 24)
        .await
        .expect("its end");
    let expected: String = (1..=400_000).map(|n| format!("{n}\n")).collect();
    assert!(!done.truncated && text(&done.stdout) == expected);
    // What cannot run says why, and can be tried again under the same id.
    for (argv, why) in [
        (&["/nope"][..], "No such file"),
        (&["nope"], "No such file"),
        (&["/etc/passwd"], "Permission"),
    ] {
        match client.spawn(job("bad", argv)).await.map(|j| j.pid) {
            Err(SandboxError::Refused {
                kind: ErrorKind::SpawnFailed,
                text,
            }) => assert!(text.contains(why), "{text}"),
            other => panic!("{other:?}"),
        }
    }
    let none = client.spawn(job("none", &[])).await.map(|j| j.pid);
    assert!(matches!(
        none,
        Err(SandboxError::Refused {
            kind: ErrorKind::Invalid,
            ..
        })
    ));
    // A script without an interpreter line runs as a shell would run it.
    assert_eq!(
        output(&client, "echo 'echo plain $1' > /tmp/s; chmod +x /tmp/s").await,
        ""
    );
    let plain = client
        .spawn(job("plain", &["/tmp/s", "arg"]))
        .await
        .expect("spawned")
        .wait(100)
        .await
        .expect("its end");
    assert_eq!(text(&plain.stdout), "plain arg\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn users_environment_and_directory_are_as_asked() {
    let host = Host::new().await;
    let spec = SandboxSpec {
        env: vec!["A=sandbox".into(), "B=sandbox".into()],
        cwd: "/tmp".into(),
        hostname: "tidebox".into(),
        ..common::spec()
    };
    let (_, client) = host.sandbox_with("users", &spec).await;
    assert_eq!(
        output(&client, "echo $A $B $PWD $HOME $USER; id -u").await,
        "sandbox sandbox /tmp /root root\n0"
    );
    let ann = JobRequest {
        env: vec![b"A=job".to_vec()],
        cwd: Some(b"/home/ann".to_vec()),
        user: Some("ann".into()),
        ..script(
            "ann",
            "echo $A $B $PWD $HOME; id -u; id -g; id -G; touch made; stat -c %U made; echo again > /dev/stdout",
        )
    };
    let done = client
        .spawn(ann)
        .await
        .expect("spawned")
        .wait(1000)
        .await
        .expect("its end");
    let expected = "job sandbox /home/ann /home/ann\n1000\n100\n100 10\nann\nagain\n";
    assert_eq!(
        (text(&done.stdout), text(&done.stderr)),
        (expected.into(), String::new())
    );
    let nobody = JobRequest {
        user: Some("eve".into()),
        ..script("eve", "true")
    };
    assert!(matches!(
        client.spawn(nobody).await.map(|j| j.pid),
        Err(SandboxError::Refused { .. })
    ));
    assert_eq!(
        output(&client, "cat /etc/hostname; uname -n").await,
        "tidebox\ntidebox"
    );
    assert!(
        output(&client, "cat /etc/hosts")
            .await
            .contains("localhost tidebox")
    );
    // A trap for whoever reads the user database: it must not be waited for.
    exec(
        &client,
        "rm /etc/passwd; python3 -c 'import os; os.mkfifo(\"/etc/passwd\")'",
    )
    .await;
    let done = client
        .spawn(job("trap", &["echo", "ok"]))
        .await
        .expect("spawned");
    assert_eq!(text(&done.wait(100).await.expect("its end").stdout), "ok\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn input_arrives_whole_and_ends() {
    let host = Host::new().await;
    let (_, client) = host.sandbox("input").await;
    let sum = client
        .spawn(JobRequest {
            stdin: true,
            ..job("sum", &["sha256sum"])
        })
        .await
        .expect("spawned");
    let data: Vec<u8> = (0..3_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let control = sum.control.clone();
    let sender = tokio::spawn(async move {
        control.stdin(&data).await.expect("sent");
        control.close_stdin().await.expect("closed");
        data
    });
    let done = sum.wait(1000).await.expect("its end");
    let data = sender.await.expect("sent");
    let here = host.dir.path().join("data");
    std::fs::write(&here, data).expect("written");
    let out = std::process::Command::new("sha256sum")
        .arg(here)
        .output()
        .expect("runs");
    assert_eq!(text(&done.stdout)[..64], text(&out.stdout)[..64]);
    // Input that nobody reads does not stop its job from being signalled or ending.
    let deaf = client
        .spawn(JobRequest {
            stdin: true,
            ..job("deaf", &["sleep", "1000"])
        })
        .await
        .expect("spawned");
    let control = deaf.control.clone();
    let stuck = tokio::spawn(async move { control.stdin(&vec![0; 8 << 20]).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    deaf.control
        .signal(9, SignalScope::Process)
        .await
        .expect("signalled");
    assert_eq!(
        deaf.wait(10).await.expect("its end").status,
        ExitStatus::Signal(9)
    );
    stuck.abort();
    assert_eq!(output(&client, "cat; echo empty").await, "empty");
}

#[tokio::test(flavor = "multi_thread")]
async fn time_outs_end_the_whole_session() {
    let host = Host::new().await;
    let (_, client) = host.sandbox("timeouts").await;
    let slow = JobRequest {
        timeout_ms: Some(300),
        ..script("slow", "echo begun; sleep 1000 & sleep 1000")
    };
    let done = client
        .spawn(slow)
        .await
        .expect("spawned")
        .wait(1000)
        .await
        .expect("its end");
    assert_eq!(
        (done.status, done.timed_out),
        (ExitStatus::Signal(15), true)
    );
    assert_eq!(text(&done.stdout), "begun\n");
    // One that does not want to.
    let deaf = JobRequest {
        timeout_ms: Some(300),
        ..script(
            "deaf",
            "trap '' TERM; set -m; (while :; do sleep 1000; done) & while :; do sleep 1000; done",
        )
    };
    let done = client
        .spawn(deaf)
        .await
        .expect("spawned")
        .wait(1000)
        .await
        .expect("its end");
    assert_eq!((done.status, done.timed_out), (ExitStatus::Signal(9), true));
    let left = output(&client, "ps -e -o args=").await;
    assert!(!left.contains("sleep 1000"), "{left}");
}

#[tokio::test(flavor = "multi_thread")]
async fn terminals_are_terminals() {
    let host = Host::new().await;
    let (_, client) = host.sandbox("terminal").await;
    let shell = JobRequest {
        tty: Some((81, 25)),
        stdin: true,
        env: vec![b"PS1=ready> ".to_vec()],
        ..job("shell", &["bash", "--norc", "--noprofile", "-i"])
    };
    let mut shell = client.spawn(shell).await.expect("spawned");
    read_until(&mut shell, "ready> ").await;
    let control = shell.control.clone();
    control
        .stdin(b"tty; stty size; echo $TERM\n")
        .await
        .expect("typed");
    let seen = read_until(&mut shell, "xterm-256color\r\n").await;
    assert!(
        seen.contains("/dev/pts/") && seen.contains("25 81"),
        "{seen}"
    );
    control.resize(132, 43).await.expect("resized");
    control.stdin(b"stty size\n").await.expect("typed");
    read_until(&mut shell, "43 132").await;
    // The interrupt character reaches what runs in the foreground.
    control.stdin(b"sleep 1000\n").await.expect("typed");
    eventually(&client, "ps -e -o args= | while read -r a; do [ \"$a\" = 'sleep 1000' ] && exit 9; done; [ $? = 9 ]").await;
    control.stdin(b"\x03echo code $?\n").await.expect("typed");
    read_until(&mut shell, "code 130").await;
    // A terminal outlives its client: attach again and go on.
    let at = shell.pid;
    drop(shell);
    let mut again = client.attach("shell", 0, 0).await.expect("attached");
    assert_eq!((again.pid, again.new), (at, false));
    read_until(&mut again, "code 130").await;
    again
        .control
        .stdin(b"echo still here\n")
        .await
        .expect("typed");
    read_until(&mut again, "still here\r\n").await;
    again.control.stdin(b"\n").await.expect("typed");
    // A shell that is just taking the terminal back loses an end of file typed in that moment, as it does a person's: type it again.
    let control = again.control.clone();
    let ended = again.wait(1 << 20);
    tokio::pin!(ended);
    let mut tries = 0;
    let ended = loop {
        // It may have ended meanwhile.
        let _ = control.close_stdin().await;
        tokio::select! {
            ended = &mut ended => break ended.expect("its end"),
            () = tokio::time::sleep(Duration::from_millis(200)) => tries += 1,
        }
        assert!(tries < 150, "the shell does not end at an end of file");
    };
    assert_eq!(ended.status, ExitStatus::Code(0));
    let mut plain = client
        .spawn(job("plain", &["sleep", "1000"]))
        .await
        .expect("spawned");
    plain.control.resize(1, 1).await.expect("sent");
    assert!(
        matches!(plain.events.recv().await, Some(JobEvent::Refused(_))),
        "it has no terminal"
    );
    let user = JobRequest {
        tty: Some((80, 24)),
        user: Some("ann".into()),
        ..script("ann", "echo hi > $(tty); stat -c %U $(tty)")
    };
    let done = client
        .spawn(user)
        .await
        .expect("spawned")
        .wait(1000)
        .await
        .expect("its end");
    assert_eq!(text(&done.stdout), "hi\r\nann\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_one_id_runs_once() {
    let host = Host::new().await;
    let (_, client) = host.sandbox("once").await;
    let request = script("turn-1", "echo ran >> /tmp/runs; cat /tmp/runs; exit 3");
    let first = client.spawn(request.clone()).await.expect("spawned");
    assert!(first.new);
    let first = first.wait(1000).await.expect("its end");
    for _ in 0..3 {
        let again = client.spawn(request.clone()).await.expect("attached");
        assert!(!again.new);
        assert_eq!(again.wait(1000).await.expect("its end"), first);
    }
    assert_eq!(output(&client, "cat /tmp/runs").await, "ran");
    // From an offset only the rest comes; beyond the end is a mistake.
    let rest = client
        .attach("turn-1", 2, 0)
        .await
        .expect("attached")
        .wait(1000)
        .await
        .expect("its end");
    assert_eq!(rest.stdout, b"n\n");
    assert!(client.attach("turn-1", 5, 0).await.is_err());
    let listed = client.list().await.expect("a list");
    let entry = listed.iter().find(|j| j.job == "turn-1").expect("listed");
    assert_eq!(entry.status, Some(ExitStatus::Code(3)));
    client.forget("turn-1").await.expect("forgotten");
    client
        .forget("turn-1")
        .await
        .expect("forgetting twice is fine");
    assert!(matches!(
        client.attach("turn-1", 0, 0).await.map(|j| j.pid),
        Err(SandboxError::Refused {
            kind: ErrorKind::NotFound,
            ..
        })
    ));
    assert!(client.spawn(request).await.expect("spawned").new);
    assert!(
        client.spawn(script("a b", "true")).await.is_err(),
        "not a job id"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn background_processes_outlive_their_job_and_never_block() {
    let host = Host::new().await;
    let (_, client) = host.sandbox("background").await;
    // It holds the job's output and writes far more than a pipe holds.
    let noisy = "(for i in $(seq 1 200); do head -c 10000 /dev/zero; done; touch /tmp/wrote; sleep 1000) & echo started";
    let done = exec(&client, noisy).await;
    assert_eq!(done.status, ExitStatus::Code(0));
    assert!(text(&done.stdout).contains("started"));
    eventually(&client, "test -e /tmp/wrote").await;
    // Forgetting the job does not end it either.
    let holder = client
        .spawn(script(
            "holder",
            "(sleep 0.5; echo late && touch /tmp/alive; sleep 1000) & exit 0",
        ))
        .await;
    assert_eq!(
        holder
            .expect("spawned")
            .wait(100)
            .await
            .expect("its end")
            .stdout,
        b""
    );
    client.forget("holder").await.expect("forgotten");
    eventually(&client, "test -e /tmp/alive").await;
    // Orphans are reaped.
    eventually(
        &client,
        "! ps -e -o stat= | while read -r s; do case $s in Z*) exit 9;; esac; done; [ $? != 9 ]",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_listening_loses_only_the_oldest_output() {
    let host = Host::new().await;
    let (_, client) = host.sandbox("ring").await;
    let running = client
        .spawn(script("big", "seq 1 1000000; touch /tmp/done; sleep 0.1"))
        .await
        .expect("spawned");
    drop(running);
    eventually(&client, "test -e /tmp/done").await;
    let mut again = client.attach("big", 0, 0).await.expect("attached");
    let Some(JobEvent::Lost {
        stderr: false,
        from: 0,
        to,
    }) = again.events.recv().await
    else {
        panic!("a gap is told")
    };
    let rest = again.wait(1 << 24).await.expect("its end");
    let whole: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(
        text(&rest.stdout),
        whole[usize::try_from(to).expect("small")..]
    );
    assert!(rest.stdout.len() >= 512 * 1024);
    // Many at once, over as many connections.
    let all: Vec<_> = (0..64)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move {
                let done = client
                    .spawn(script(
                        &format!("many-{n}"),
                        &format!("sleep 0.05; echo {n}"),
                    ))
                    .await?;
                done.wait(100).await
            })
        })
        .collect();
    for (n, one) in all.into_iter().enumerate() {
        assert_eq!(
            one.await.expect("joined").expect("its end").stdout,
            format!("{n}\n").into_bytes()
        );
    }
}
