//! Many seeds on several threads. What comes out does not depend on how they were spread.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tidepool_store_core::bugs::{self, Bug};

use crate::check::Stats;
use crate::rng::hash;
use crate::world::{Config, Outcome, World};

/// What seeds are run, and how.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seeds: Range<u64>,
    /// At the start; none for three or five, by seed.
    pub nodes: Option<u64>,
    pub steps: u64,
    pub trace: bool,
    /// A fault that is put in on purpose.
    pub bug: Option<Bug>,
    /// No further seeds after the first violation.
    pub stop: bool,
    pub threads: usize,
}

/// What all seeds came to.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Summary {
    pub seeds: u64,
    pub steps: u64,
    pub violations: u64,
    pub trace_hash: String,
    /// Hours of the worlds' own time.
    pub hours: f64,
    pub done: u64,
    pub checked: BTreeMap<String, u64>,
    pub faults: BTreeMap<&'static str, u64>,
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Has panics of worlds kept for their report.
pub fn quiet_panics() {
    std::panic::set_hook(Box::new(|info| {
        PANIC.set(Some(info.to_string()));
    }));
}

/// Runs one seed. A panic of the code under test is a violation like any other.
pub fn run_seed(cfg: Config, bug: Option<Bug>) -> Outcome {
    let seed = cfg.seed;
    if !bugs::arm(bug) {
        return failed(seed, "this build has no faults to arm".into());
    }
    let result = catch_unwind(AssertUnwindSafe(|| World::new(cfg).run()));
    bugs::arm(None);
    result.unwrap_or_else(|_| {
        let why = PANIC.take().unwrap_or_else(|| "it panicked".into());
        failed(seed, format!("panic: {}", why.replace('\n', " ")))
    })
}

fn failed(seed: u64, violation: String) -> Outcome {
    Outcome {
        seed,
        steps: 0,
        time_ms: 0,
        violation: Some(violation),
        trace_hash: 0,
        stats: Stats::default(),
        faults: BTreeMap::new(),
        done: 0,
    }
}

/// Runs all seeds of a plan, and tells of each as it ends.
pub fn run(plan: &Plan, each: impl Fn(&Outcome) + Sync) -> Summary {
    let next = AtomicU64::new(plan.seeds.start);
    let stop = AtomicBool::new(false);
    let outcomes = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..plan.threads.max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if !plan.seeds.contains(&seed) {
                        return;
                    }
                    let cfg = Config {
                        seed,
                        nodes: plan.nodes.unwrap_or(3 + seed % 2 * 2),
                        steps: plan.steps,
                        trace: plan.trace,
                    };
                    let outcome = run_seed(cfg, plan.bug);
                    each(&outcome);
                    if outcome.violation.is_some() && plan.stop {
                        stop.store(true, Ordering::Relaxed);
                    }
                    if let Ok(mut all) = outcomes.lock() {
                        all.insert(seed, outcome);
                    }
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap_or_default();
    sum(outcomes.into_values())
}

fn sum(outcomes: impl Iterator<Item = Outcome>) -> Summary {
    let mut out = Summary::default();
    let mut trace = 0;
    let mut time_ms = 0;
    for o in outcomes {
        out.seeds += 1;
        out.steps += o.steps;
        out.violations += u64::from(o.violation.is_some());
        out.done += o.done;
        time_ms += o.time_ms;
        trace = hash(trace, &o.trace_hash.to_le_bytes());
        for (kind, n) in o.faults {
            *out.faults.entry(kind).or_default() += n;
        }
        if let Ok(serde_json::Value::Object(stats)) = serde_json::to_value(o.stats) {
            for (name, n) in stats {
                *out.checked.entry(name).or_default() += n.as_u64().unwrap_or(0);
            }
        }
    }
    out.hours = (time_ms as f64 / 36_000.0).round() / 100.0;
    out.trace_hash = format!("{trace:016x}");
    out
}
