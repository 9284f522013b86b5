//! Several nodes in this process, over real QUIC and real disks: a store grows from one node, loses one, gets another for it, and shrinks again.
//! Death by signal, cut networks and full disks are in `cluster-tests`.

mod common;

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{DAY, chunk, commit, fast, sandbox_id, session};
use tidepool_proto::cluster::{NodeState, TopologyRequest};
use tidepool_proto::wire::{request, response};
use tidepool_proto::{ChunkName, Epoch, ErrorKind, TurnNo};
use tidepool_store::{Node, NodeConfig, Role};
use tidepool_store_client::{Client, ClientConfig};

/// Of an embedded store.
const SHARDS: u32 = 4;
const HOUR: Duration = Duration::from_secs(3600);
/// Nothing here should take this long, on any machine.
const LONG: Duration = Duration::from_secs(120);

fn free_port() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap()
}

fn config(dir: &Path, n: u64, listen: SocketAddr) -> NodeConfig {
    NodeConfig {
        listen,
        zone: format!("z{n}"),
        ..NodeConfig::embedded(dir.join(format!("node{n}")))
    }
}

async fn operator(node: &Node) -> Client {
    let identity = node.issue(Role::Operator, DAY).unwrap();
    Client::connect(fast(node.local_addr(), identity))
        .await
        .unwrap()
}

/// A host's client that knows all these nodes.
async fn host(nodes: &BTreeMap<u64, Node>) -> Client {
    let identity = nodes.values().next().unwrap().client_identity();
    let addrs = nodes.values().map(Node::local_addr).collect();
    Client::connect(ClientConfig {
        deadline: Duration::from_secs(30),
        ..ClientConfig::new(addrs, identity)
    })
    .await
    .unwrap()
}

async fn join(dir: &Path, n: u64, through: &Node) -> Node {
    let token = operator(through).await.issue_token(HOUR, 1).await.unwrap();
    let cfg = config(dir, n, free_port());
    assert_eq!(Node::join(&cfg, &token).await.unwrap(), n);
    Node::start(cfg).await.unwrap()
}

/// Waits until every group's leader is the preferred one and counts exactly its target as its members, and each of these knows it.
async fn settled(nodes: &BTreeMap<u64, Node>, replicas: usize) {
    let began = Instant::now();
    let client = operator(nodes.values().next().unwrap()).await;
    loop {
        let mut all = Vec::new();
        for node in nodes.keys() {
            let ask = request::Op::Topology(TopologyRequest {});
            match client.call_node(*node, ask).await {
                Ok(response::Op::Topology(t)) => {
                    all.extend(t.groups.into_iter().filter(|g| g.here).map(|g| (t.node, g)));
                }
                other => eprintln!("node {node}: {other:?}"),
            }
        }
        let done = |group: u32| {
            let of: Vec<_> = all.iter().filter(|(_, g)| g.group == group).collect();
            let Some((_, led)) = of.iter().find(|(node, g)| g.leader == *node) else {
                return false;
            };
            let preferred = led.targets.first() == Some(&led.leader);
            let mut targets = led.targets.clone();
            targets.sort_unstable();
            preferred
                && led.voters == targets
                && (group == 0 || led.voters.len() == replicas && of.len() == replicas)
                && of
                    .iter()
                    .all(|(_, g)| !g.changing && g.voters == targets && g.applied >= led.committed)
        };
        if (0..=SHARDS).all(done) {
            return;
        }
        assert!(began.elapsed() < LONG, "not settled: {all:#?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// What a sandbox committed so far.
struct Worker {
    n: u8,
    epoch: Epoch,
    turns: u64,
}

impl Worker {
    async fn new(client: &Client, n: u8) -> Self {
        let name = format!("sandbox{n}");
        let epoch = client
            .create_sandbox(sandbox_id(n), &name, b"{}".to_vec())
            .await
            .unwrap();
        let turns = 0;
        Self { n, epoch, turns }
    }

    fn chunks(&self, turn: u64) -> Vec<(ChunkName, Bytes)> {
        let seed = u64::from(self.n) * 1000 + turn;
        vec![chunk(seed, 40_000), chunk(seed + 500_000, 3_000)]
    }

    /// Puts chunks and commits a turn.
    async fn work(&mut self, client: &Client, turns: u64) {
        for _ in 0..turns {
            let turn = self.turns + 1;
            client.put(session(200), self.chunks(turn)).await.unwrap();
            let commit = commit(sandbox_id(self.n), self.epoch, turn);
            client.commit(commit).await.unwrap();
            self.turns = turn;
        }
    }

    /// Everything that was acknowledged is there.
    async fn check(&self, client: &Client) {
        let id = sandbox_id(self.n);
        let record = client.sandbox(id).await.unwrap().unwrap();
        assert_eq!(record.last_turn, TurnNo(self.turns));
        let turns = client.turns(id, TurnNo(1), u32::MAX).await.unwrap();
        assert_eq!(turns.len() as u64, self.turns);
        for turn in 1..=self.turns {
            let want = self.chunks(turn);
            let names: Vec<_> = want.iter().map(|(n, _)| *n).collect();
            let got = client.get(&names).await.unwrap();
            assert!(got.iter().eq(want.iter().map(|(_, b)| b)), "turn {turn}");
            let (checkpoint, bytes) = common::manifest(id, self.epoch, TurnNo(turn));
            assert_eq!(client.manifest(id, checkpoint).await.unwrap(), bytes);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_grows_loses_a_node_gets_another_and_shrinks() {
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .try_init();
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = BTreeMap::new();
    let first = config(dir.path(), 1, free_port());
    nodes.insert(1, Node::start(first).await.unwrap());
    let client = host(&nodes).await;
    let mut one = Worker::new(&client, 1).await;
    one.work(&client, 20).await;

    // Grows from an embedded store, under load.
    let second = join(dir.path(), 2, &nodes[&1]).await;
    nodes.insert(2, second);
    one.work(&client, 10).await;
    let third = join(dir.path(), 3, &nodes[&1]).await;
    nodes.insert(3, third);
    let mut two = Worker::new(&client, 2).await;
    two.work(&client, 10).await;
    settled(&nodes, 3).await;
    let client = host(&nodes).await;
    one.check(&client).await;
    two.check(&client).await;
    // Each node has a copy of everything.
    for node in nodes.values() {
        let s = node.stats();
        assert_eq!((s.chunks, s.corruptions), (80, 0));
    }

    // Loses its first node, and goes on.
    nodes.remove(&1).unwrap().shutdown().await;
    one.work(&client, 10).await;
    one.check(&client).await;
    two.check(&client).await;

    // Another one in its place.
    let fourth = join(dir.path(), 4, &nodes[&2]).await;
    nodes.insert(4, fourth);
    let chief = operator(&nodes[&2]).await;
    let e = chief.change_node(1, NodeState::Removed, false).await;
    assert_eq!(e.unwrap_err().kind(), ErrorKind::Conflict);
    chief
        .change_node(1, NodeState::Removed, true)
        .await
        .unwrap();
    two.work(&client, 5).await;
    settled(&nodes, 3).await;
    nodes.remove(&2).unwrap().shutdown().await;
    let client = host(&nodes).await;
    one.check(&client).await;
    two.check(&client).await;

    // A fifth, so that one may go in peace: what it had is deleted there.
    let second = NodeConfig {
        listen: free_port(),
        ..config(dir.path(), 2, free_port())
    };
    nodes.insert(2, Node::start(second).await.unwrap());
    let fifth = join(dir.path(), 5, &nodes[&3]).await;
    nodes.insert(5, fifth);
    let chief = operator(&nodes[&3]).await;
    chief
        .change_node(4, NodeState::Draining, false)
        .await
        .unwrap();
    one.work(&client, 5).await;
    settled(&nodes, 3).await;
    let began = Instant::now();
    loop {
        match chief.change_node(4, NodeState::Removed, false).await {
            Ok(()) => break,
            Err(e) => assert!(
                e.kind() == ErrorKind::Conflict && began.elapsed() < LONG,
                "{e}"
            ),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    nodes.remove(&4).unwrap().shutdown().await;
    one.work(&client, 5).await;
    settled(&nodes, 3).await;
    let client = host(&nodes).await;
    one.check(&client).await;
    two.check(&client).await;
    for (_, node) in nodes {
        assert_eq!(node.stats().corruptions, 0);
        node.shutdown().await;
    }
}
