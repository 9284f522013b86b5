//! Durable replicated puts: the store's nodes against as many of etcd's, by turns in the same run.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use crate::Options;
use crate::cluster::Cluster;
use crate::etcd::Etcd;
use crate::load::{Putter, Round, body, round as put_round};
use crate::process::{Cost, Process};
use crate::stats::{at, median, rate, ratios, round};

const CLIENTS: usize = 8;
/// What the servers still write of a round after its end: the store's index, etcd's database.
const SETTLE: Duration = Duration::from_secs(2);

/// One side's rounds.
#[derive(Default)]
struct Side {
    rates: Vec<f64>,
    latencies: Vec<f64>,
    bytes: u64,
    cost: Cost,
}

impl Side {
    fn add(&mut self, done: Round, cost: Cost) {
        self.rates.push(rate(done.bytes, done.took));
        self.latencies.extend(done.latencies);
        self.bytes += done.bytes;
        self.cost.add(cost);
    }

    fn disk(&self, replicas: usize) -> f64 {
        self.cost.written as f64 / (self.bytes * replicas as u64) as f64
    }

    fn json(&self, replicas: usize) -> Value {
        json!({
            "mb_s": round(median(&self.rates)),
            "rounds_mb_s": self.rates.iter().map(|r| round(*r)).collect::<Vec<_>>(),
            "puts": self.latencies.len(),
            "p50_ms": round(at(&self.latencies, 0.5)),
            "p99_ms": round(at(&self.latencies, 0.99)),
            "cpu_s_per_gb": round(self.cost.cpu_s / (self.bytes as f64 / 1e9)),
            "disk_bytes_per_replica_byte": round(self.disk(replicas)),
        })
    }
}

/// What came out for one size of bodies.
pub(crate) struct Replicated {
    pub(crate) value: Value,
    pub(crate) ratio: Option<f64>,
    /// Disk bytes of the store for a byte of a replica.
    pub(crate) disk: f64,
}

async fn one(putters: &mut Vec<Putter>, nodes: &[Process], o: &Options) -> Result<(Round, Cost)> {
    let before = Cost::of(nodes)?;
    let done = put_round(putters, o.round_time(), o.round_bytes() / CLIENTS as u64).await?;
    tokio::time::sleep(SETTLE).await;
    Ok((done, Cost::of(nodes)?.since(before)))
}

/// Bodies of `len` bytes before they are framed. Without `etcd` the store alone.
pub(crate) async fn measure(
    cluster: &Cluster,
    etcd: Option<&Path>,
    dir: &Path,
    len: usize,
    o: &Options,
) -> Result<Replicated> {
    let bytes = body(len);
    let mut ours = Vec::new();
    for _ in 0..CLIENTS {
        ours.push(Putter::store(cluster.client().await?, bytes.clone()));
    }
    let peer = match etcd {
        Some(binary) => Some(Etcd::start(binary, dir, cluster.nodes.len()).await?),
        None => None,
    };
    let mut theirs = Vec::new();
    if let Some(peer) = &peer {
        for _ in 0..CLIENTS {
            theirs.push(Putter::etcd(peer.client().await?, bytes.clone()));
        }
    }
    // Connections open, files exist, caches know what comes.
    let warm = Duration::from_millis(500);
    put_round(&mut ours, warm, u64::MAX).await?;
    put_round(&mut theirs, warm, u64::MAX).await?;
    let (mut store, mut other) = (Side::default(), Side::default());
    for turn in 0..o.rounds {
        // Each side goes first in turn.
        for side in [turn % 2, (turn + 1) % 2] {
            match (side, &peer) {
                (0, _) => {
                    let (done, cost) = one(&mut ours, &cluster.nodes, o).await?;
                    store.add(done, cost);
                }
                (_, Some(peer)) => {
                    let (done, cost) = one(&mut theirs, &peer.nodes, o).await?;
                    other.add(done, cost);
                }
                _ => {}
            }
        }
    }
    let replicas = cluster.nodes.len();
    let ratio = peer
        .is_some()
        .then(|| median(&ratios(&store.rates, &other.rates)));
    let mut value = json!({"body_bytes": len, "clients": CLIENTS, "nodes": replicas, "store": store.json(replicas)});
    if let Some(ratio) = ratio {
        value["etcd"] = other.json(replicas);
        value["ratio"] = json!(round(ratio));
    }
    Ok(Replicated {
        value,
        ratio,
        disk: store.disk(replicas),
    })
}
