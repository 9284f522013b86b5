//! `tidepool-store-bench`: what the store does, beside what the machine and etcd do in the same run.
//!
//! The machine is shared and noisy, so every figure that counts is a ratio: what is compared runs by turns, a ratio is that of a round, and the middle one is
//! reported. Servers are real processes on loopback with their data on one file system; clients are native on both sides and live in this process. The store speaks QUIC with
//! mutual TLS, etcd HTTP/2 without TLS, to its leader directly: what is left out favours etcd.
//!
//! [`replicated`] is about several nodes, [`single`] about one and about latency. Everything is in a temporary directory, and gone at the end.

mod cluster;
mod etcd;
mod load;
mod process;
mod quic;
mod replicated;
mod single;
mod stats;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::cluster::Cluster;
use crate::quic::Quic;
use crate::stats::round;

/// Measures the store: replicated puts beside etcd, one node beside the raw disk and QUIC, commits beside one sync and one round trip.
#[derive(Debug, Parser)]
#[command(name = "ops/bench store")]
pub(crate) struct Options {
    /// The last line is one JSON object
    #[arg(long)]
    json: bool,
    /// Shorter rounds: to see that it works
    #[arg(long)]
    quick: bool,
    /// Rounds of everything
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: u64,
    /// Nodes of the replicated store, and of etcd
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=5))]
    nodes: u64,
    /// The etcd binary
    #[arg(long, value_name = "PATH", default_value = "etcd")]
    etcd: PathBuf,
    /// Measure the store without etcd
    #[arg(long)]
    no_etcd: bool,
    /// Only these parts
    #[arg(long, value_delimiter = ',', default_values = ["replicated", "commits", "disk", "reads"], value_parser = ["replicated", "commits", "disk", "reads"])]
    parts: Vec<String>,
    /// Where data goes, in a directory of its own that is removed at the end
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
}

impl Options {
    fn has(&self, part: &str) -> bool {
        self.parts.iter().any(|p| p == part)
    }

    pub(crate) fn round_time(&self) -> Duration {
        Duration::from_millis(if self.quick { 500 } else { 3000 })
    }

    /// The most a round writes or reads.
    pub(crate) fn round_bytes(&self) -> u64 {
        if self.quick { 64 << 20 } else { 256 << 20 }
    }
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(quic::FLAG) {
        return quic::serve();
    }
    let options = Options::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(until_told(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A signal ends it as an error would: what was started and written is cleared away.
async fn until_told(options: &Options) -> Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    tokio::select! {
        result = run(options) => result,
        _ = term.recv() => bail!("ended by SIGTERM"),
        _ = int.recv() => bail!("interrupted"),
    }
}

fn say(what: &str, value: &Value) {
    println!("{what}: {value}");
}

async fn run(o: &Options) -> Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("tp-store-bench-")
        .tempdir_in(&o.dir)
        .with_context(|| o.dir.display().to_string())?;
    let mut all = json!({"nodes": o.nodes, "rounds": o.rounds});
    if o.has("replicated") || o.has("commits") {
        many(o, dir.path(), &mut all).await?;
    }
    if o.has("disk") || o.has("reads") {
        let at = dir.path().join("one");
        std::fs::create_dir(&at)?;
        eprintln!("one node beside the raw disk and QUIC");
        let cluster = Cluster::start(&at, 1).await?;
        let names = if o.has("disk") {
            let disk = single::disk(&cluster, &at, o).await?;
            say("one node, 16 MiB batches", &disk.value);
            all["ratio_vs_raw_disk"] = json!(round(disk.ratio));
            all["disk"] = disk.value;
            disk.names
        } else {
            single::fill(&cluster, o).await?
        };
        if o.has("reads") {
            let quic = Quic::start().await?;
            let (value, ratio) = single::reads(&cluster, &quic, &names, o).await?;
            say("reads", &value);
            all["read_ratio_vs_quic"] = json!(round(ratio));
            all["reads"] = value;
        }
    }
    if o.json {
        println!("{all}");
    }
    Ok(())
}

async fn many(o: &Options, dir: &std::path::Path, all: &mut Value) -> Result<()> {
    let at = dir.join("many");
    std::fs::create_dir(&at)?;
    eprintln!("a cluster of {} nodes", o.nodes);
    let cluster = Cluster::start(&at, o.nodes as usize).await?;
    all["leads"] = json!(cluster.leads);
    if o.has("commits") {
        let quic = Quic::start().await?;
        let commits = single::commits(&cluster, &quic, &at, o).await?;
        say("commits", &commits.value);
        all["commit_ms_p50"] = json!(round(commits.p50));
        all["commit_ms_p99"] = json!(round(commits.p99));
        all["commits"] = commits.value;
    }
    if !o.has("replicated") {
        return Ok(());
    }
    let mut written: f64 = 0.0;
    for (len, label) in [(64 << 10, "64k"), (1 << 20, "1m")] {
        eprintln!("replicated puts of {label} bodies");
        // Frames make bodies a little longer; what is stored has the size that is named.
        let len = len - 64;
        ensure!(len > 0, "no body");
        let etcd = (!o.no_etcd).then_some(o.etcd.as_path());
        let peers = dir.join(format!("etcd-{label}"));
        std::fs::create_dir(&peers)?;
        let done = replicated::measure(&cluster, etcd, &peers, len, o).await?;
        std::fs::remove_dir_all(&peers)?;
        say(&format!("replicated puts, {label}"), &done.value);
        if let Some(ratio) = done.ratio {
            all[format!("ratio_vs_etcd_{label}")] = json!(round(ratio));
        }
        written = written.max(done.disk);
        all[format!("replicated_{label}")] = done.value;
    }
    all["disk_bytes_per_replica_byte"] = json!(round(written));
    Ok(())
}
