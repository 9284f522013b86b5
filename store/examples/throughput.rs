//! Measures one embedded node over loopback: durable puts, reads and commits. `cargo run -p tidepool-store --example throughput [DIR]`.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, TurnRecord, TurnStats, Verdict};
use tidepool_proto::{ChunkName, DomainKey, Epoch, SandboxId, SessionId, TurnNo};
use tidepool_store::{Node, NodeConfig};
use tidepool_store_client::{Client, ClientConfig, Commit};

const CHUNK: usize = 32 << 10;
const CHUNKS: usize = 16 << 10;

fn chunk(seed: usize) -> (ChunkName, Bytes) {
    let mut plain = vec![0; CHUNK];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut plain);
    let key = DomainKey::new([1; 32]);
    let name = key.name(&plain);
    (name, key.encode(&name, &plain, &[], None).into())
}

fn commit(sandbox: SandboxId, turn: u64) -> Commit {
    let manifest = vec![turn as u8; 600];
    let checkpoint = Manifest::id_of(&manifest);
    let turn = TurnNo(turn);
    let record = TurnRecord {
        turn,
        key: String::new(),
        command: "true".into(),
        started_ms: 0,
        ended_ms: 0,
        verdict: Verdict::Files,
        checkpoint,
        evidence: Evidence::default(),
        stats: TurnStats::default(),
        result: None,
    };
    Commit {
        sandbox,
        epoch: Epoch(1),
        turn,
        key: String::new(),
        record: record.encode(),
        manifest: Some((checkpoint, manifest)),
        session: None,
        round: 1,
        base: None,
    }
}

fn rate(what: &str, bytes: usize, took: Duration) {
    let mb = bytes as f64 / 1e6 / took.as_secs_f64();
    println!("{what}: {mb:.0} MB/s");
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let temp = tempfile::tempdir()?;
    let dir = std::env::args_os()
        .nth(1)
        .map_or(temp.path().to_owned(), Into::into);
    let node = Node::start(NodeConfig::embedded(dir.join("throughput"))).await?;
    let client = Client::connect(ClientConfig::new(
        vec![node.local_addr()],
        node.client_identity(),
    ))
    .await?;
    let session = SessionId([1; 16]);
    let mut names = Vec::new();
    let mut took = Duration::ZERO;
    for part in 0..CHUNKS / 1024 {
        let bodies: Vec<_> = (0..1024).map(|i| chunk(part * 1024 + i)).collect();
        names.extend(bodies.iter().map(|(n, _)| *n));
        let start = Instant::now();
        client.put(session, bodies).await?;
        took += start.elapsed();
    }
    rate("put, 32 MiB a call", CHUNK * CHUNKS, took);
    let start = Instant::now();
    let missing = client.pin(session, &names).await?.missing;
    println!(
        "pin of {} known names: {:?}, {} missing",
        names.len(),
        start.elapsed(),
        missing.len()
    );
    let start = Instant::now();
    for part in names.chunks(2048) {
        client.get(part).await?;
    }
    rate("get, 64 MiB a call, warm", CHUNK * CHUNKS, start.elapsed());
    let start = Instant::now();
    client.end_session(session).await?;
    println!("end of session: {:?}", start.elapsed());

    let sandbox = SandboxId([1; 16]);
    client.create_sandbox(sandbox, "bench", vec![]).await?;
    let mut times = Vec::new();
    for turn in 1..=2000 {
        let one = commit(sandbox, turn);
        let start = Instant::now();
        client.commit(one).await?;
        times.push(start.elapsed());
    }
    times.sort();
    println!(
        "commit: p50 {:?}, p99 {:?}",
        times[times.len() / 2],
        times[times.len() * 99 / 100]
    );
    node.shutdown().await;
    Ok(())
}
