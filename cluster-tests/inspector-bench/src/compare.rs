//! Processor time of workloads with and without the probes.
//!
//! What is to be seen is below one part in a hundred, and a machine's own moods are many times that. So: a workload is cut into slices of about a second, on a
//! processor of its own and a filesystem of its own ([`crate::ground`]), and each round runs six of them, without the probes, with them and without them again, there and back
//! (such as A B C C B A), so that whatever goes up or down steadily meanwhile falls on all three alike; which comes first turns from round to round. Before each slice, also
//! those without, the probes are attached and what was left to be written is written. A ratio is that of a round, with the probes against the mean of all slices without; how far the two kinds of slices
//! without are from each other is the noise, reported in the same way. Some rounds have one slice under the reference tracer besides.
//!
//! At the end one slice is counted by the kernel: how often each program ran, and how long. The kernel counts every run on the machine, whoever caused it, so what else the machine did is told beside it.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};
use tidepool_inspector::{FileEffects, Inspector, InspectorOptions};

use crate::ground::Ground;
use crate::kernel::{self, Runs};
use crate::processors::Machine;
use crate::stage::Stage;
use crate::stats::{Estimate, estimate, median};
use crate::tracer::Tracer;
use crate::workloads::{Workload, prepare};

/// How a slice is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mode {
    Without,
    With,
    Again,
    Reference,
}

const MODES: [Mode; 4] = [Mode::Without, Mode::With, Mode::Again, Mode::Reference];

/// The first half of a round, in turn. The second one is the same backwards.
const ORDERS: [[Mode; 3]; 3] = [
    [Mode::Without, Mode::With, Mode::Again],
    [Mode::With, Mode::Again, Mode::Without],
    [Mode::Again, Mode::Without, Mode::With],
];

/// One of so many rounds has a slice under the reference tracer.
const REFERENCE_EVERY: u32 = 4;

/// What was measured of one workload.
#[derive(Clone, Debug)]
pub(crate) struct Compared {
    pub(crate) workload: Workload,
    pub(crate) rounds: u32,
    /// Medians of processor time in milliseconds, in the order of [`MODES`].
    cpu_ms: [f64; 4],
    pub(crate) ratio: Estimate,
    pub(crate) noise: Estimate,
    pub(crate) reference: Estimate,
    /// What the machine did besides while slices ran, as a part of what they took themselves; and what was taken away from it.
    others: f64,
    stolen: f64,
    /// The same of the counted slice alone.
    others_counted: f64,
    /// Records of the tracer in one run, and those it lost.
    traced: (u64, u64),
    /// Inodes reported in one run.
    dirty: u64,
    /// Programs in one slice, counted by the kernel, and its processor time.
    counted_ms: f64,
    programs: BTreeMap<String, Runs>,
}

impl Compared {
    /// Time within the programs, as a part of that of the same slice without them.
    pub(crate) fn inside(&self) -> f64 {
        let seconds: f64 = self.programs.values().map(|r| r.time.as_secs_f64()).sum();
        seconds * 1e3 / (self.counted_ms - seconds * 1e3)
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
            "rounds": self.rounds,
            "without_ms": round(self.cpu_ms[0]),
            "with_ms": round(self.cpu_ms[1]),
            "again_without_ms": round(self.cpu_ms[2]),
            "reference_ms": round(self.cpu_ms[3]),
            "ratio": estimate(self.ratio),
            "noise_ratio": estimate(self.noise),
            "reference_ratio": estimate(self.reference),
            "others_share": round(self.others),
            "stolen_share": round(self.stolen),
            "inside_programs": round(self.inside()),
            "others_share_counted": round(self.others_counted),
            "programs": programs,
            "dirty_inodes": self.dirty,
            "reference_records": self.traced.0,
            "reference_lost": self.traced.1,
        })
    }

    pub(crate) fn line(&self) -> String {
        let calls: u64 = self.programs.values().map(|r| r.count).sum();
        format!(
            "{:<15} {:>7.1} ms  with {}  again without {}  reference {}  in programs {:.4} ({calls} calls)  others {:.3}, stolen {:.3}",
            self.workload.name(),
            self.cpu_ms[0],
            self.ratio,
            self.noise,
            self.reference,
            self.inside(),
            self.others,
            self.stolen,
        )
    }
}

/// Four digits behind the point.
pub(crate) fn round(v: f64) -> f64 {
    (v * 1e4).round() / 1e4
}

/// Measures one workload in a sandbox of its own.
pub(crate) fn compare(
    workload: Workload,
    rounds: u32,
    processor: Option<usize>,
    leave_out: &'static [&'static str],
) -> Result<Compared> {
    let ground = Ground::make(0)?;
    let lower = ground.path().join("lower");
    std::fs::create_dir(&lower)?;
    prepare(workload, &lower)?;
    let mut bench = Bench {
        stage: Stage::start(ground, processor)?,
        inspector: Inspector::load(&InspectorOptions {
            leave_out,
            ..InspectorOptions::default()
        })?,
        line: workload.line(),
        spent: Spent::default(),
    };
    // Caches fill, and git learns what its files look like here.
    bench.slice(Mode::Without)?;
    bench.slice(Mode::With)?;
    bench.spent = Spent::default();

    let mut rounds_of: BTreeMap<Mode, Vec<f64>> = BTreeMap::new();
    let mut slices: BTreeMap<Mode, Vec<f64>> = BTreeMap::new();
    let (mut references, mut traced, mut dirty) = (Vec::new(), (0, 0), 0);
    for round in 0..rounds {
        let order = ORDERS[round as usize % ORDERS.len()];
        let mut sums: BTreeMap<Mode, f64> = BTreeMap::new();
        for mode in order.iter().chain(order.iter().rev()) {
            let done = bench.slice(*mode)?;
            *sums.entry(*mode).or_default() += done.cpu_ms;
            slices.entry(*mode).or_default().push(done.cpu_ms);
            dirty = done.dirty.unwrap_or(dirty);
        }
        let of = |mode: Mode| sums.get(&mode).copied().unwrap_or(f64::NAN);
        let without = (of(Mode::Without) + of(Mode::Again)) / 2.0;
        if round % REFERENCE_EVERY == 0 {
            let done = bench.slice(Mode::Reference)?;
            slices.entry(Mode::Reference).or_default().push(done.cpu_ms);
            references.push(2.0 * done.cpu_ms / without);
            traced = done.traced.unwrap_or(traced);
        }
        let mut add = |mode, ratio| rounds_of.entry(mode).or_default().push(ratio);
        add(Mode::With, of(Mode::With) / without);
        add(Mode::Again, of(Mode::Again) / of(Mode::Without));
    }
    let spent = std::mem::take(&mut bench.spent);
    let (counted_ms, programs) = bench.counted()?;
    let of = |of: &BTreeMap<Mode, Vec<f64>>, mode| of.get(&mode).cloned().unwrap_or_default();
    Ok(Compared {
        workload,
        rounds,
        cpu_ms: MODES.map(|m| median(&of(&slices, m))),
        ratio: estimate(&of(&rounds_of, Mode::With)),
        noise: estimate(&of(&rounds_of, Mode::Again)),
        reference: estimate(&references),
        others: spent.others(),
        stolen: spent.stolen / spent.own,
        others_counted: bench.spent.others(),
        traced,
        dirty,
        counted_ms,
        programs,
    })
}

/// Milliseconds of processor time while slices ran.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    own: f64,
    machine: f64,
    stolen: f64,
}

impl Spent {
    fn others(&self) -> f64 {
        (self.machine - self.own).max(0.0) / self.own
    }
}

struct Bench {
    stage: Stage,
    inspector: Inspector,
    line: &'static str,
    spent: Spent,
}

struct Done {
    cpu_ms: f64,
    traced: Option<(u64, u64)>,
    dirty: Option<u64>,
}

impl Bench {
    /// Runs the workload once, and clears up after it.
    fn slice(&mut self, mode: Mode) -> Result<Done> {
        self.stage.settle()?;
        let (mut traced, mut dirty) = (None, None);
        // In each mode, so that what it leaves behind in caches is the same.
        let slot = self.inspector.register(&self.stage.target()?)?;
        self.inspector.take(slot)?;
        if mode != Mode::With {
            self.inspector.unregister(slot);
        }
        let cpu_ms = match mode {
            Mode::Without | Mode::Again => self.run()?,
            Mode::With => {
                let cpu_ms = self.run()?;
                dirty = match self.inspector.take(slot)?.files {
                    FileEffects::Inodes(list) => Some(list.len() as u64),
                    FileEffects::Everything { .. } => None,
                };
                self.inspector.unregister(slot);
                cpu_ms
            }
            Mode::Reference => {
                let tracer = Tracer::load(self.stage.target()?.pid_ns_inode)?;
                let cpu_ms = self.run()?;
                let seen = tracer.finish()?;
                traced = Some((seen.records, seen.lost));
                cpu_ms
            }
        };
        self.stage.run("clean")?;
        Ok(Done {
            cpu_ms,
            traced,
            dirty,
        })
    }

    fn run(&mut self) -> Result<f64> {
        let before = Machine::now()?;
        let own = self.stage.run(self.line)?.cpu_us as f64 / 1e3;
        let after = Machine::now()?;
        self.spent.own += own;
        self.spent.machine += after.busy - before.busy;
        self.spent.stolen += after.stolen - before.stolen;
        Ok(own)
    }

    /// One slice in which the kernel counts the programs, with its processor time. Counting costs time itself, so it is none of the others.
    fn counted(&mut self) -> Result<(f64, BTreeMap<String, Runs>)> {
        self.stage.settle()?;
        let slot = self.inspector.register(&self.stage.target()?)?;
        self.inspector.take(slot)?;
        let counting = aya::sys::enable_stats(aya::sys::Stats::RunTime)?;
        let before = kernel::programs()?;
        let cpu_ms = self.run()?;
        let after = kernel::programs()?;
        drop(counting);
        self.inspector.unregister(slot);
        self.stage.run("clean")?;
        let since = |(name, now): (String, Runs)| {
            let was = before.get(&name).copied().unwrap_or_default();
            let runs = Runs {
                count: now.count - was.count,
                time: now.time - was.time,
            };
            (name, runs)
        };
        Ok((cpu_ms, after.into_iter().map(since).collect()))
    }
}
