//! What a sandbox reaches, and what the host offers it.

mod common;

use common::{Host, KEY, exec, output, unique};
use tidepool_sandbox::{ExitStatus, Network, SandboxSpec};

/// A place outside: a namespace that the host reaches over its own link, with a server in it.
struct Outside {
    name: String,
    server: std::process::Child,
}

impl Outside {
    fn new() -> Self {
        let name = unique("out").to_string();
        let link = format!("tpx{}", std::process::id());
        common::sh(&format!(
            "ip netns add {name} && ip link add {link} type veth peer name eth0 netns {name} \
             && ip addr add 198.51.100.1/30 dev {link} && ip link set {link} up \
             && ip -n {name} addr add 198.51.100.2/30 dev eth0 && ip -n {name} link set eth0 up && ip -n {name} link set lo up"
        ));
        let server = "import socket
s = socket.create_server((\"198.51.100.2\", 8000))
while True:
    peer, where = s.accept()
    peer.sendall(where[0].encode()); peer.close()";
        let server = std::process::Command::new("ip")
            .args(["netns", "exec", &name, "/usr/bin/python3", "-c", server])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("a server");
        Self { name, server }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = std::process::Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_reaches_the_outside_and_nothing_else() {
    let host = Host::new().await;
    let _outside = Outside::new();
    let own = std::net::TcpListener::bind("198.51.100.1:0").expect("a service of the host");
    let port = own.local_addr().expect("an address").port();
    let spec = SandboxSpec {
        network: Network::Nat,
        ..common::spec()
    };
    let (one, client) = host.sandbox_with("nat", &spec).await;
    let (two, other) = host.sandbox_with("nat", &spec).await;
    for client in [&client, &other] {
        common::eventually(
            client,
            "[ \"$(cat < /dev/tcp/198.51.100.2/8000)\" = 198.51.100.1 ]",
        )
        .await;
    }
    // The host's own services and other sandboxes stay out of reach.
    let reach = |address: &str| {
        format!(
            "python3 -c 'import socket; socket.create_connection((\"{address}\", {port}), timeout=1)'"
        )
    };
    for address in ["198.51.100.1", "10.77.0.1"] {
        assert_ne!(
            exec(&client, &reach(address)).await.status,
            ExitStatus::Code(0),
            "{address}"
        );
    }
    // A restored one has the same address and reaches the outside again.
    let images = host.dir.path().join("images");
    host.runtime.pause(&one).await.expect("paused");
    host.runtime
        .checkpoint(&one, &images)
        .await
        .expect("checkpointed");
    let copy = unique("nat");
    let layers = host.layers_with(&copy, &host.runtime.layers(&one).expect("layers").upper);
    host.runtime.destroy(&one).await.expect("destroyed");
    host.runtime
        .restore(&copy, &spec, &layers, &images)
        .await
        .expect("restored");
    let client = host.runtime.connect(&copy, &KEY).await.expect("connected");
    assert_eq!(
        output(&client, "cat < /dev/tcp/198.51.100.2/8000").await,
        "198.51.100.1"
    );
    let own_address = "python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((\"198.51.100.2\", 9)); print(s.getsockname()[0])'";
    assert_eq!(output(&client, own_address).await, "10.77.0.2");
    for name in [&copy, &two] {
        host.runtime.destroy(name).await.expect("destroyed");
    }
    assert_eq!(host.leftovers(), Vec::<String>::new());
    let left = common::sh("nft list tables; ip -br link; ls /run/tidepool-nat");
    assert!(
        !left.contains("tidepool_") && !left.contains("tpo"),
        "{left}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_can_offer_services_inside() {
    let host = Host::new().await;
    let (name, client) = host.sandbox("service").await;
    let listener = host
        .runtime
        .listen_inside(&name, 9000)
        .await
        .expect("listening");
    let serve = tokio::spawn(async move {
        let (mut peer, from) = listener.accept().await.expect("a connection");
        tokio::io::AsyncWriteExt::write_all(&mut peer, b"hello\n")
            .await
            .expect("sent");
        from
    });
    assert_eq!(
        output(&client, "cat < /dev/tcp/127.0.0.1/9000").await,
        "hello"
    );
    assert!(serve.await.expect("joined").ip().is_loopback());
    // There is nothing else to reach.
    assert_ne!(
        exec(&client, "exec 3<>/dev/tcp/192.0.2.1/80").await.status,
        ExitStatus::Code(0)
    );
}
