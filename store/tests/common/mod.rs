//! What the tests of a real node share: data, clients, and a child process that never outlives its test.
#![allow(dead_code, unreachable_pub, reason = "every test file uses a part")]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, TurnRecord, TurnStats, Verdict};
use tidepool_proto::{
    CheckpointId, ChunkName, DomainKey, Epoch, SandboxId, SessionId, TreeId, TurnNo,
};
use tidepool_store::{Node, NodeConfig, Role};
use tidepool_store_client::{Client, ClientConfig, ClientIdentity, Commit};

pub const DAY: Duration = Duration::from_secs(24 * 3600);

pub fn key() -> DomainKey {
    DomainKey::new([7; 32])
}

pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut out);
    out
}

/// A chunk of bytes that do not compress, the same for the same seed.
pub fn chunk(seed: u64, len: usize) -> (ChunkName, Bytes) {
    let plain = noise(seed, len);
    let name = key().name(&plain);
    (name, key().encode(&name, &plain, &[], None).into())
}

pub fn sandbox_id(n: u8) -> SandboxId {
    SandboxId([n; 16])
}

pub fn session(n: u8) -> SessionId {
    SessionId([n; 16])
}

pub fn manifest(sandbox: SandboxId, epoch: Epoch, turn: TurnNo) -> (CheckpointId, Vec<u8>) {
    let bytes = Manifest {
        sandbox,
        epoch,
        turn,
        parent: None,
        created_ms: 0,
        verdict: Verdict::Files,
        domain: "d".parse().unwrap(),
        image_name: "image".into(),
        image: TreeId([1; 32]),
        upper: TreeId([turn.0 as u8; 32]),
        processes: None,
        spec: b"{}".to_vec(),
        init_nonce: [0; 32],
        upper_bytes: 0,
    }
    .encode();
    (Manifest::id_of(&bytes), bytes)
}

pub fn record(turn: TurnNo, key: &str, checkpoint: CheckpointId) -> Vec<u8> {
    TurnRecord {
        turn,
        key: key.into(),
        command: format!("command {turn}"),
        started_ms: 0,
        ended_ms: 0,
        verdict: Verdict::Files,
        checkpoint,
        evidence: Evidence::default(),
        stats: TurnStats::default(),
        result: None,
    }
    .encode()
}

/// A turn with a new checkpoint and the key `key-N`.
pub fn commit(sandbox: SandboxId, epoch: Epoch, turn: u64) -> Commit {
    let turn = TurnNo(turn);
    let manifest = manifest(sandbox, epoch, turn);
    let key = format!("key-{turn}");
    Commit {
        sandbox,
        epoch,
        turn,
        record: record(turn, &key, manifest.0),
        key,
        manifest: Some(manifest),
        session: None,
        round: 1,
        base: None,
    }
}

/// A node in this process, which writes until its disk is really full.
pub async fn start(dir: &Path) -> Node {
    Node::start(NodeConfig::embedded(dir)).await.unwrap()
}

pub async fn client(node: &Node) -> Client {
    connect(node.local_addr(), node.client_identity()).await
}

/// A client that may administer.
pub async fn operator(node: &Node) -> Client {
    let identity = node.issue(Role::Operator, Duration::from_secs(600));
    connect(node.local_addr(), identity.unwrap()).await
}

pub async fn connect(addr: SocketAddr, identity: ClientIdentity) -> Client {
    Client::connect(ClientConfig::new(vec![addr], identity))
        .await
        .unwrap()
}

/// A `tidepool-store` process; killed when dropped.
pub struct Process {
    child: Child,
    pub addr: SocketAddr,
}

impl Process {
    /// Starts one on a port of its choice and waits until it serves.
    pub fn start(data: &Path, reserve_mib: u64) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_tidepool-store"))
            .args(["run", "--listen", "127.0.0.1:0", "--data"])
            .arg(data)
            .args(["--reserve-mib", &reserve_mib.to_string()])
            .env("RUST_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let addr = line
            .trim()
            .strip_prefix("listening on ")
            .unwrap_or_else(|| panic!("the store did not start: {line:?}, {:?}", child.wait()))
            .parse()
            .unwrap();
        Self { child, addr }
    }

    pub fn kill(&mut self) {
        // SIGKILL.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().unwrap()
    }

    /// SIGTERM, and whether it ended well.
    pub fn terminate(mut self) -> bool {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().success()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

pub fn fast(addr: SocketAddr, identity: ClientIdentity) -> ClientConfig {
    ClientConfig {
        deadline: Duration::from_secs(5),
        ..ClientConfig::new(vec![addr], identity)
    }
}
