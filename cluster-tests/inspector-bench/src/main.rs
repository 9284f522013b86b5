//! `tidepool-inspector-bench --json`: what the inspector costs.
//!
//! | module | what it is for |
//! |---|---|
//! | `ground`, `processors` | a filesystem and a processor for what is measured |
//! | `stage`, `idle` | a sandbox for workloads; sandboxes that rest |
//! | `workloads` | what is run, and its material |
//! | `compare` | processor time with and without the probes, and under the reference tracer (`tracer`) |
//! | `turns` | from a turn's boundary to its verdict |
//! | `scale` | more sandboxes |
//! | `storm` | more events than are kept |
//! | `kernel`, `stats` | what the kernel counts; medians |
//! | `merge` | the results of several calls as one |
//!
//! Figures go to stdout, progress to stderr. Needs root and eBPF.

mod compare;
mod ground;
mod idle;
mod kernel;
mod merge;
mod processors;
mod scale;
mod stage;
mod stats;
mod storm;
mod tracer;
mod turns;
mod workloads;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use serde_json::{Map, Value, json};

use crate::compare::round;
use crate::stats::quantile;
use crate::workloads::Workload;

/// Measures what the inspector costs. Needs root and eBPF.
#[derive(Debug, Parser)]
#[command(name = "tidepool-inspector-bench")]
struct Arguments {
    /// Only this part; may be repeated. All where absent.
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Only this workload; may be repeated. All where absent.
    #[arg(long, value_enum)]
    workload: Vec<Workload>,
    /// Rounds, in each of which a workload is run four times without the probes and twice with them, and in some once under the reference tracer.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Three rounds, fewer turns, smaller storms: a first impression.
    #[arg(long)]
    quick: bool,
    /// Without this tracepoint on files, to see what it costs; may be repeated. Changes would be missed.
    #[arg(long)]
    leave_out: Vec<String>,
    /// Measures nothing: joins the last lines of such outputs (files) into one result; may be repeated.
    #[arg(long)]
    merge: Vec<PathBuf>,
    /// The last line is one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Processor time of workloads.
    Workloads,
    /// Time to a verdict.
    Verdicts,
    /// Figures as sandboxes grow in number.
    Scale,
    /// More events than are kept.
    Storm,
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let (first, second) = (words.next(), words.next().unwrap_or_default());
    if first.as_ref().is_some_and(|a| a == stage::FLAG) {
        let processor = words.next().unwrap_or_default();
        return stage::inside(Path::new(&second), &processor.to_string_lossy());
    }
    if first.is_some_and(|a| a == idle::FLAG) {
        return idle::inside(&second.to_string_lossy());
    }
    match bench(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("tidepool-inspector-bench: {e:?}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    if !arguments.merge.is_empty() {
        show(arguments, merge::merge(&arguments.merge)?);
        return Ok(());
    }
    ground::own_mounts()?;
    let processor = processors::leave_one()?;
    let began = Instant::now();
    let wanted = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let quick = arguments.quick;
    let mut result = Map::new();
    let mut set = |key: &str, value: Value| result.insert(key.to_owned(), value);
    if wanted(Part::Workloads) {
        for (key, value) in workloads(arguments, processor)? {
            set(&key, value);
        }
    }
    if wanted(Part::Verdicts) {
        let found = turns::verdicts(if quick { 100 } else { 1000 }, processor)?;
        let all = found.all();
        let (p50, p99) = (quantile(&all, 0.5), quantile(&all, 0.99));
        eprintln!(
            "verdicts        p50 {p50:.3} ms  p99 {p99:.3} ms  {}",
            found.json()
        );
        set("verdict_ms_p50", json!(round(p50)));
        set("verdict_ms_p99", json!(round(p99)));
        set("verdicts", found.json());
    }
    if wanted(Part::Scale) {
        let mut table = Vec::new();
        for count in scale::COUNTS {
            let (turns, rounds) = if quick {
                (50, 2)
            } else {
                (300, arguments.rounds)
            };
            let figures = scale::scale(count, turns, rounds, processor)?;
            eprintln!("scale           {figures}");
            table.push(figures);
        }
        set("scale", json!(table));
    }
    if wanted(Part::Storm) {
        let mut storms = Vec::new();
        for pumped in [false, true] {
            let figures = storm::storm(if quick { 600_000 } else { 1_000_000 }, pumped, processor)?;
            eprintln!("storm           {figures}");
            storms.push(figures);
        }
        set("storm", json!(storms));
    }
    set("quick", json!(quick));
    set("seconds", json!(began.elapsed().as_secs()));
    show(arguments, result);
    Ok(())
}

fn show(arguments: &Arguments, result: Map<String, Value>) {
    if arguments.json {
        println!("{}", Value::Object(result));
    } else {
        println!("{:#}", Value::Object(result));
    }
}

fn workloads(arguments: &Arguments, processor: Option<usize>) -> Result<Map<String, Value>> {
    let rounds = match arguments.quick {
        true => arguments.rounds.min(3),
        false => arguments.rounds,
    };
    let leave_out: Vec<&'static str> = arguments
        .leave_out
        .iter()
        .map(|name| &*name.clone().leak())
        .collect();
    let leave_out = leave_out.leak();
    let mut all = Vec::new();
    for workload in Workload::ALL {
        if !arguments.workload.is_empty() && !arguments.workload.contains(&workload) {
            continue;
        }
        let compared = compare::compare(workload, rounds, processor, leave_out)?;
        eprintln!("{}", compared.line());
        all.push(compared);
    }
    let each: Map<String, Value> = all
        .iter()
        .map(|c| (c.workload.name().to_owned(), c.json()))
        .collect();
    Ok(merge::with_summary(each))
}
