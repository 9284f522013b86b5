//! Processor time of workloads with and without the probes: interleaved, so that what else the machine does falls on all alike.
//!
//! Each round runs a workload without anything, with the inspector, without anything again and with the reference tracer, in an order that turns from
//! round to round. A ratio is that of a round: against the mean of its two runs without anything. How far those two are from each
//! other is the noise, reported in the same way. At the end one run is counted by the kernel: how often each program ran, and how long.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};
use tidepool_inspector::{FileEffects, Inspector, InspectorOptions};

use crate::kernel::{self, Runs};
use crate::stage::{Stage, scratch};
use crate::stats::{Estimate, estimate, median};
use crate::tracer::Tracer;
use crate::workloads::{Workload, prepare};

/// How a workload is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mode {
    Without,
    With,
    Again,
    Reference,
}

const MODES: [Mode; 4] = [Mode::Without, Mode::With, Mode::Again, Mode::Reference];

/// What was measured of one workload.
#[derive(Clone, Debug)]
pub(crate) struct Compared {
    pub(crate) workload: Workload,
    pub(crate) runs: u32,
    /// Medians of processor time in milliseconds, in the order of [`MODES`].
    cpu_ms: [f64; 4],
    pub(crate) ratio: Estimate,
    pub(crate) noise: Estimate,
    pub(crate) reference: Estimate,
    /// Records of the tracer in one run, and those it lost.
    traced: (u64, u64),
    /// Inodes reported in one run.
    dirty: u64,
    /// Programs in one run, counted by the kernel.
    programs: BTreeMap<String, Runs>,
}

impl Compared {
    /// Time within the programs, as a part of the workload's without them.
    pub(crate) fn inside(&self) -> f64 {
        let ms: f64 = self.programs.values().map(|r| r.time.as_secs_f64()).sum();
        ms * 1000.0 / self.cpu_ms[0]
    }

    pub(crate) fn json(&self) -> Value {
        let estimate = |e: Estimate| json!({"median": round(e.median), "low": round(e.low), "high": round(e.high)});
        let programs: BTreeMap<&str, Value> = self
            .programs
            .iter()
            .filter(|(_, r)| r.count > 0)
            .map(|(name, r)| {
                let ns = r.time.as_nanos() as f64 / r.count as f64;
                let value = json!({"runs": r.count, "ns_each": ns.round(), "ms": round(r.time.as_secs_f64() * 1e3)});
                (name.as_str(), value)
            })
            .collect();
        json!({
            "runs": self.runs,
            "without_ms": round(self.cpu_ms[0]),
            "with_ms": round(self.cpu_ms[1]),
            "again_without_ms": round(self.cpu_ms[2]),
            "reference_ms": round(self.cpu_ms[3]),
            "ratio": estimate(self.ratio),
            "noise_ratio": estimate(self.noise),
            "reference_ratio": estimate(self.reference),
            "inside_programs": round(self.inside()),
            "programs": programs,
            "dirty_inodes": self.dirty,
            "reference_records": self.traced.0,
            "reference_lost": self.traced.1,
        })
    }

    pub(crate) fn line(&self) -> String {
        let calls: u64 = self.programs.values().map(|r| r.count).sum();
        format!(
            "{:<15} {:>8.1} ms  with {:.4} ({:.4}..{:.4})  again without {:.4} ({:.4}..{:.4})  reference {:.3}  in programs {:.4} ({calls} calls)",
            self.workload.name(),
            self.cpu_ms[0],
            self.ratio.median,
            self.ratio.low,
            self.ratio.high,
            self.noise.median,
            self.noise.low,
            self.noise.high,
            self.reference.median,
            self.inside(),
        )
    }
}

/// Four digits behind the point.
pub(crate) fn round(v: f64) -> f64 {
    (v * 1e4).round() / 1e4
}

/// Measures one workload in a sandbox of its own.
pub(crate) fn compare(workload: Workload, runs: u32, quick: bool) -> Result<Compared> {
    let dir = scratch()?;
    let lower = dir.path().join("lower");
    std::fs::create_dir(&lower)?;
    prepare(workload, &lower)?;
    let mut stage = Stage::start(dir)?;
    // Caches fill, and git learns what its files look like here.
    one(&mut stage, workload, quick, Mode::Without)?;

    let mut times: BTreeMap<Mode, Vec<f64>> = BTreeMap::new();
    let (mut traced, mut dirty) = ((0, 0), 0);
    for round in 0..runs as usize {
        for turn in 0..MODES.len() {
            // Forwards and backwards in turn, and each time another one first.
            let at = match round % 2 {
                0 => round / 2 + turn,
                _ => round / 2 + MODES.len() - turn,
            };
            let mode = MODES[at % MODES.len()];
            let done = one(&mut stage, workload, quick, mode)?;
            times.entry(mode).or_default().push(done.cpu_ms);
            traced = done.traced.unwrap_or(traced);
            dirty = done.dirty.unwrap_or(dirty);
        }
    }
    let programs = counted(&mut stage, workload, quick)?;
    let of = |mode: Mode| times.get(&mode).cloned().unwrap_or_default();
    let (without, again) = (of(Mode::Without), of(Mode::Again));
    let against = |mode: Mode| -> Estimate {
        let ratios: Vec<f64> = of(mode)
            .iter()
            .zip(without.iter().zip(&again))
            .map(|(it, (a, b))| it / ((a + b) / 2.0))
            .collect();
        estimate(&ratios)
    };
    let noise: Vec<f64> = again.iter().zip(&without).map(|(b, a)| b / a).collect();
    Ok(Compared {
        workload,
        runs,
        cpu_ms: MODES.map(|m| median(&of(m))),
        ratio: against(Mode::With),
        noise: estimate(&noise),
        reference: against(Mode::Reference),
        traced,
        dirty,
        programs,
    })
}

struct Done {
    cpu_ms: f64,
    traced: Option<(u64, u64)>,
    dirty: Option<u64>,
}

fn one(stage: &mut Stage, workload: Workload, quick: bool, mode: Mode) -> Result<Done> {
    let line = workload.line(quick);
    let (mut traced, mut dirty) = (None, None);
    let usage = match mode {
        Mode::Without | Mode::Again => stage.run(line)?,
        Mode::With => {
            let inspector = Inspector::load(&InspectorOptions::default())?;
            let slot = inspector.register(&stage.target()?)?;
            inspector.take(slot)?;
            let usage = stage.run(line)?;
            dirty = match inspector.take(slot)?.files {
                FileEffects::Inodes(list) => Some(list.len() as u64),
                FileEffects::Everything { .. } => None,
            };
            usage
        }
        Mode::Reference => {
            let tracer = Tracer::load(stage.target()?.pid_ns_inode)?;
            let usage = stage.run(line)?;
            let seen = tracer.finish()?;
            traced = Some((seen.records, seen.lost));
            usage
        }
    };
    stage.run("clean")?;
    Ok(Done {
        cpu_ms: usage.cpu_us as f64 / 1000.0,
        traced,
        dirty,
    })
}

/// One run in which the kernel counts the programs. Counting costs time itself, so it is none of the others.
fn counted(stage: &mut Stage, workload: Workload, quick: bool) -> Result<BTreeMap<String, Runs>> {
    let inspector = Inspector::load(&InspectorOptions::default())?;
    let slot = inspector.register(&stage.target()?)?;
    inspector.take(slot)?;
    let counting = aya::sys::enable_stats(aya::sys::Stats::RunTime)?;
    let before = kernel::programs()?;
    stage.run(workload.line(quick))?;
    let after = kernel::programs()?;
    drop(counting);
    stage.run("clean")?;
    let mut programs = BTreeMap::new();
    for (name, now) in after {
        let was = before.get(&name).copied().unwrap_or_default();
        programs.insert(
            name,
            Runs {
                count: now.count - was.count,
                time: now.time - was.time,
            },
        );
    }
    Ok(programs)
}
