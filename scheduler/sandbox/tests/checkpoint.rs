//! Processes survive the death of everything around them.

mod common;

use common::{Host, KEY, eventually, exec, output, script, unique};
use tidepool_sandbox::{ExitStatus, SandboxError, State};

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
