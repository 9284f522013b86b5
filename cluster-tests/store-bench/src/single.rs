//! Against the limits of the machine, each measured by turns with the store: the raw disk, QUIC alone, and the latency of one sync and one round trip.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::net::UdpSocket;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bytes::Bytes;
use serde_json::{Value, json};
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, TurnRecord, TurnStats, Verdict};
use tidepool_proto::{ChunkName, Epoch, SandboxId, SessionId, TurnNo};
use tidepool_store_client::{Client, Commit};

use crate::Options;
use crate::cluster::Cluster;
use crate::load::{body, fresh};
use crate::process::Cost;
use crate::quic::Quic;
use crate::stats::{at, median, ms, rate, ratios, round};

const BATCH: usize = 16 << 20;
const CHUNK: usize = 64 << 10;
/// Batches under way at once, so that one arrives while another is synced.
const UNDER_WAY: usize = 2;
/// Streams and calls that read at once.
const READERS: usize = 4;
/// Small operations of each kind in a round.
const SMALL: usize = 100;
/// Bytes of a log record with a commit in it, about.
const RECORD: usize = 4096;

/// Writing: batches of 16 MiB to one node, and the same bytes to a plain file on the same file system.
pub(crate) struct Disk {
    pub(crate) value: Value,
    pub(crate) ratio: f64,
    /// What was written, to be read.
    pub(crate) names: Vec<ChunkName>,
}

pub(crate) async fn disk(cluster: &Cluster, dir: &Path, o: &Options) -> Result<Disk> {
    let client = cluster.client().await?;
    let path = dir.join("plain");
    let mut file = File::create(&path)?;
    let bodies: Vec<Bytes> = (0..BATCH / CHUNK).map(|_| body(CHUNK - 64)).collect();
    let plain = bodies.concat();
    let batches = (o.round_bytes() / BATCH as u64).max(4) as usize;
    let (mut raw, mut one, mut some) = (Vec::new(), Vec::new(), Vec::new());
    let mut names = Vec::new();
    let (mut cost, mut bytes) = (Cost::default(), 0);
    // The first is for the caches.
    puts(&client, &bodies, 1, 1).await?;
    for _ in 0..o.rounds {
        let begun = Instant::now();
        for _ in 0..batches {
            file.write_all(&plain)?;
            rustix::fs::fdatasync(&file)?;
        }
        raw.push(rate((batches * plain.len()) as u64, begun.elapsed()));
        let before = Cost::of(&cluster.nodes)?;
        for (under_way, rates) in [(1, &mut one), (UNDER_WAY, &mut some)] {
            let (put, took) = puts(&client, &bodies, batches, under_way).await?;
            rates.push(rate((batches * plain.len()) as u64, took));
            names.extend(put);
            bytes += (batches * plain.len()) as u64;
        }
        cost.add(Cost::of(&cluster.nodes)?.since(before));
    }
    drop(file);
    std::fs::remove_file(path)?;
    let ratio = median(&ratios(&some, &raw));
    let value = json!({
        "batch_bytes": plain.len(), "raw_mb_s": round(median(&raw)), "store_mb_s": round(median(&some)),
        "ratio": round(ratio), "under_way": UNDER_WAY,
        "store_one_under_way_mb_s": round(median(&one)), "ratio_one_under_way": round(median(&ratios(&one, &raw))),
        "cpu_s_per_gb": round(cost.cpu_s / (bytes as f64 / 1e9)),
        "disk_bytes_per_byte": round(cost.written as f64 / bytes as f64),
    });
    Ok(Disk {
        value,
        ratio,
        names,
    })
}

/// Puts what reads need, without measuring it.
pub(crate) async fn fill(cluster: &Cluster, o: &Options) -> Result<Vec<ChunkName>> {
    let client = cluster.client().await?;
    let bodies: Vec<Bytes> = (0..BATCH / CHUNK).map(|_| body(CHUNK - 64)).collect();
    let batches = o.round_bytes() as usize / BATCH;
    Ok(puts(&client, &bodies, batches, 1).await?.0)
}

async fn puts(
    client: &Client,
    bodies: &[Bytes],
    batches: usize,
    under_way: usize,
) -> Result<(Vec<ChunkName>, Duration)> {
    let session = SessionId(rand::random());
    let mut all = Vec::with_capacity(batches * bodies.len());
    let mut running = VecDeque::new();
    let begun = Instant::now();
    for _ in 0..batches {
        if running.len() == under_way
            && let Some(oldest) = running.pop_front()
        {
            stored(oldest, bodies.len()).await?;
        }
        let batch: Vec<_> = bodies.iter().map(|b| (fresh(), b.clone())).collect();
        all.extend(batch.iter().map(|(n, _)| *n));
        let client = client.clone();
        running.push_back(tokio::spawn(
            async move { client.put(session, batch).await },
        ));
    }
    for one in running {
        stored(one, bodies.len()).await?;
    }
    let took = begun.elapsed();
    client.end_session(session).await?;
    Ok((all, took))
}

type Put = tokio::task::JoinHandle<
    Result<tidepool_store_client::PutStats, tidepool_store_client::ClientError>,
>;

async fn stored(put: Put, count: usize) -> Result<()> {
    ensure!(put.await??.stored == count as u64, "not all were stored");
    Ok(())
}

/// Reading what lies in memory, against QUIC alone.
pub(crate) async fn reads(
    cluster: &Cluster,
    quic: &Quic,
    names: &[ChunkName],
    o: &Options,
) -> Result<(Value, f64)> {
    let client = cluster.client().await?;
    let each = (o.round_bytes() as usize / CHUNK / READERS).min(names.len() / READERS);
    // The newest, which are in memory still.
    let names = &names[names.len() - each * READERS..];
    let (mut alone, mut ours) = (Vec::new(), Vec::new());
    let (mut cost, mut total) = (Cost::default(), 0);
    get(&client, names, each).await?;
    quic.fetch(READERS, 1 << 20).await?;
    for turn in 0..o.rounds {
        for side in [turn % 2, (turn + 1) % 2] {
            if side == 0 {
                let before = Cost::of(&cluster.nodes)?;
                let (bytes, took) = get(&client, names, each).await?;
                cost.add(Cost::of(&cluster.nodes)?.since(before));
                total += bytes;
                ours.push(rate(bytes, took));
            } else {
                let bytes = (each * CHUNK) as u64;
                let took = quic.fetch(READERS, bytes).await?;
                alone.push(rate(bytes * READERS as u64, took));
            }
        }
    }
    let ratio = median(&ratios(&ours, &alone));
    let value = json!({
        "store_mb_s": round(median(&ours)), "quic_mb_s": round(median(&alone)), "ratio": round(ratio), "readers": READERS,
        "cpu_s_per_gb": round(cost.cpu_s / (total as f64 / 1e9)),
    });
    Ok((value, ratio))
}

async fn get(client: &Client, names: &[ChunkName], each: usize) -> Result<(u64, Duration)> {
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for part in names.chunks(each) {
        let (client, part) = (client.clone(), part.to_vec());
        tasks.spawn(async move {
            let mut bytes = 0;
            // As much as a restore holds at once.
            for some in part.chunks(256) {
                let bodies = client.get(some).await?;
                bytes += bodies.iter().map(|b| b.len() as u64).sum::<u64>();
            }
            anyhow::Ok(bytes)
        });
    }
    let mut bytes = 0;
    while let Some(done) = tasks.join_next().await {
        bytes += done??;
    }
    Ok((bytes, begun.elapsed()))
}

/// Commits of one sandbox after another, against one sync and one round trip.
pub(crate) struct Commits {
    pub(crate) value: Value,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

pub(crate) async fn commits(
    cluster: &Cluster,
    quic: &Quic,
    dir: &Path,
    o: &Options,
) -> Result<Commits> {
    let client = cluster.client().await?;
    let sandbox = SandboxId(rand::random());
    client.create_sandbox(sandbox, "bench", vec![]).await?;
    let path = dir.join("log");
    let mut file = File::create(&path)?;
    let echo = Echo::start()?;
    let (mut syncs, mut trips, mut plain_trips, mut ours) = (vec![], vec![], vec![], vec![]);
    let mut turn = 0;
    for _ in 0..=o.rounds {
        for _ in 0..SMALL {
            turn += 1;
            let one = commit(sandbox, turn);
            let begun = Instant::now();
            client.commit(one).await?;
            ours.push(ms(begun.elapsed()));
            let begun = Instant::now();
            file.write_all(&[turn as u8; RECORD])?;
            rustix::fs::fdatasync(&file)?;
            syncs.push(ms(begun.elapsed()));
            trips.push(ms(quic.round_trip().await?));
            plain_trips.push(ms(echo.round_trip()?));
        }
        if turn == SMALL as u64 {
            // The first round is for the caches.
            for list in [&mut ours, &mut syncs, &mut trips, &mut plain_trips] {
                list.clear();
            }
        }
    }
    drop(file);
    std::fs::remove_file(path)?;
    let (sync, trip, plain) = (median(&syncs), median(&trips), median(&plain_trips));
    let (p50, p99) = (at(&ours, 0.5), at(&ours, 0.99));
    let value = json!({
        "nodes": cluster.nodes.len(), "commits": ours.len(), "p50_ms": round(p50), "p99_ms": round(p99),
        "fdatasync_ms": round(sync), "quic_round_trip_ms": round(trip), "udp_round_trip_ms": round(plain),
        "p50_vs_sync_and_quic_trip": round(p50 / (sync + trip)), "p50_vs_sync_and_udp_trip": round(p50 / (sync + plain)),
    });
    Ok(Commits { value, p50, p99 })
}

/// A turn with a new checkpoint that names no chunk: what a commit alone costs.
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

/// A thread that sends back every datagram.
struct Echo {
    socket: UdpSocket,
    stop: std::net::SocketAddr,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Echo {
    fn start() -> Result<Self> {
        let far = UdpSocket::bind("127.0.0.1:0")?;
        let stop = far.local_addr()?;
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(stop)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        let thread = std::thread::spawn(move || {
            let mut buf = [0; 2048];
            // An empty one ends it.
            while let Ok((len @ 1.., from)) = far.recv_from(&mut buf) {
                let _ = far.send_to(&buf[..len], from);
            }
        });
        Ok(Self {
            socket,
            stop,
            thread: Some(thread),
        })
    }

    fn round_trip(&self) -> Result<Duration> {
        let mut buf = [0; 1024];
        let begun = Instant::now();
        self.socket.send(&buf)?;
        self.socket.recv(&mut buf)?;
        Ok(begun.elapsed())
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let sent = self.socket.send_to(&[], self.stop);
        if sent.is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}
