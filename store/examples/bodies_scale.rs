//! What bodies cost: memory and cold start of a large index, writing against the raw disk, and the space that comes back.
//!
//! `bodies_scale names DIR COUNT` puts COUNT small bodies, `bodies_scale start DIR COUNT` starts again with them; `bodies_scale disk DIR` writes 16 MiB batches beside a
//! plain file; `bodies_scale deletes DIR LEN COUNT` deletes half of the bodies at random. DIR must be new (but for `start`) and is left to the caller. One JSON object a line.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use serde_json::json;
use tidepool_proto::{ChunkName, DomainKey};
use tidepool_store::bodies::BodyStore;
use tidepool_store::db::Db;
use tidepool_store::segments::{SegmentOptions, Segments};

const BATCH: usize = 16 << 20;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

/// A small body under a name that is as good as random; checked bodies are not made over and over.
fn name(seed: u64) -> ChunkName {
    ChunkName(*blake3::hash(&seed.to_le_bytes()).as_bytes())
}

fn open(dir: &Path) -> anyhow::Result<Segments> {
    let db = Db::open(&dir.join("db"))?;
    Ok(Segments::open(
        db,
        &dir.join("bodies"),
        SegmentOptions::default(),
    )?)
}

/// A line of /proc/self/status or io, in its own unit.
fn proc(file: &str, field: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/{file}"))?;
    let line = text.lines().find_map(|l| l.strip_prefix(field));
    let number = line.and_then(|l| l.trim_start_matches(':').split_whitespace().next());
    Ok(number.unwrap_or("0").parse()?)
}

fn names(dir: &Path, count: u64) -> anyhow::Result<()> {
    let key = DomainKey::new([7; 32]);
    let body = Bytes::from(key.encode(&key.name(b"x"), b"x", &[], None));
    let segments = open(dir)?;
    let begun = Instant::now();
    for from in (0..count).step_by(20_000) {
        let part: Vec<_> = (from..count.min(from + 20_000))
            .map(|i| (name(i), body.clone()))
            .collect();
        segments.put(&part)?;
    }
    let (seconds, rss) = (begun.elapsed().as_secs_f64(), proc("status", "VmRSS")?);
    println!(
        "{}",
        json!({"names": count, "put_s": seconds, "rss_mib": rss / 1024, "peak_mib": proc("status", "VmHWM")? / 1024})
    );
    Ok(())
}

fn start(dir: &Path, count: u64) -> anyhow::Result<()> {
    let begun = Instant::now();
    let segments = open(dir)?;
    anyhow::ensure!(segments.get(&name(count / 2))?.is_some());
    let seconds = begun.elapsed().as_secs_f64();
    let rss = proc("status", "VmRSS")?;
    println!(
        "{}",
        json!({"names": count, "cold_start_s": seconds, "rss_mib": rss / 1024})
    );
    let begun = Instant::now();
    let looks = count.min(10_000);
    for i in 0..looks {
        let seed = i.wrapping_mul(7919) % count;
        anyhow::ensure!(segments.has(&[name(seed)])?[0]);
    }
    println!(
        "{}",
        json!({"look_ups_per_s": (looks as f64 / begun.elapsed().as_secs_f64()) as u64, "rss_mib": proc("status", "VmRSS")? / 1024})
    );
    Ok(())
}

fn disk(dir: &Path) -> anyhow::Result<()> {
    let key = DomainKey::new([7; 32]);
    let segments = open(dir)?;
    let plain = dir.join("plain");
    let mut file = fs::File::create(&plain)?;
    let (mut raw, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let bytes: Vec<u8> = noise(1, BATCH);
    let body =
        |len: usize, seed: u64| Bytes::from(key.encode(&name(seed), &noise(seed, len), &[], None));
    for (len, label) in [(64 << 10, "64k"), (1 << 20, "1m")] {
        let mut written = 0;
        for round in 0..24u64 {
            let count = BATCH / len;
            let batch: Vec<_> = (0..count as u64)
                .map(|i| {
                    (
                        name(round << 32 | i << 1 | (len >> 20) as u64),
                        body(len, i),
                    )
                })
                .collect();
            let begun = Instant::now();
            file.write_all(&bytes)?;
            rustix::fs::fdatasync(&file)?;
            raw.push(BATCH as f64 / begun.elapsed().as_secs_f64() / 1e6);
            let before = proc("io", "write_bytes")?;
            let begun = Instant::now();
            segments.put(&batch)?;
            ours.push(BATCH as f64 / begun.elapsed().as_secs_f64() / 1e6);
            written += proc("io", "write_bytes")? - before;
            ratios.push(ours[ours.len() - 1] / raw[raw.len() - 1]);
        }
        let median = |list: &mut Vec<f64>| {
            list.sort_by(f64::total_cmp);
            let middle = list[list.len() / 2];
            list.clear();
            middle
        };
        let amplification = written as f64 / (24 * BATCH) as f64;
        println!(
            "{}",
            json!({"bodies": label, "batch_mib": 16, "raw_mb_s": median(&mut raw), "put_mb_s": median(&mut ours),
                "ratio_vs_raw_disk": median(&mut ratios), "disk_bytes_per_byte": amplification})
        );
    }
    fs::remove_file(plain)?;
    Ok(())
}

fn deletes(dir: &Path, len: usize, count: u64) -> anyhow::Result<()> {
    let key = DomainKey::new([7; 32]);
    let segments = open(dir)?;
    let body = Bytes::from(key.encode(&name(0), &noise(0, len), &[], None));
    for from in (0..count).step_by(1000) {
        let part: Vec<_> = (from..count.min(from + 1000))
            .map(|i| (name(i), body.clone()))
            .collect();
        segments.put(&part)?;
    }
    let before = segments.usage();
    let gone: Vec<_> = (0..count).map(name).filter(|n| n.0[5] % 2 == 0).collect();
    let begun = Instant::now();
    for part in gone.chunks(4096) {
        segments.delete(part)?;
    }
    let deleted = begun.elapsed().as_secs_f64();
    segments.reclaim_now()?;
    let after = segments.usage();
    println!(
        "{}",
        json!({"len": len, "count": count, "deleted": gone.len(), "delete_s": deleted, "reclaim_s": begun.elapsed().as_secs_f64(),
            "taken_before": before.0, "taken_after": after.0, "live_after": after.1})
    );
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["names", dir, count] => names(Path::new(dir), count.parse()?),
        ["start", dir, count] => start(Path::new(dir), count.parse()?),
        ["disk", dir] => disk(Path::new(dir)),
        ["deletes", dir, len, count] => deletes(Path::new(dir), len.parse()?, count.parse()?),
        _ => anyhow::bail!(
            "usage: bodies_scale names|start DIR COUNT, disk DIR, deletes DIR LEN COUNT"
        ),
    }
}
