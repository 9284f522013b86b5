//! `tidepool-store-sim`: runs seeds of a simulated cluster, and replays one with a trace.

use std::ops::Range;
use std::process::ExitCode;

use clap::Parser;
use tidepool_store_core::bugs::Bug;
use tidepool_store_sim::runner::{self, Plan};

/// Runs a simulated store cluster, seed by seed.
#[derive(Parser)]
#[command(name = "tidepool-store-sim", version)]
struct Args {
    /// The seeds, the last one not included.
    #[arg(long, value_parser = seeds, default_value = "0..100")]
    seeds: Range<u64>,
    /// Nodes at the start; without it three or five, by seed.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=9))]
    nodes: Option<u64>,
    /// Events before everything is healed.
    #[arg(long, default_value_t = 10_000)]
    steps: u64,
    /// Threads; without it one for each processor.
    #[arg(long)]
    threads: Option<usize>,
    /// Print every event, on one thread.
    #[arg(long)]
    trace: bool,
    /// Print the result as JSON in the last line.
    #[arg(long)]
    json: bool,
    /// Print what each seed came to.
    #[arg(long, short)]
    verbose: bool,
    /// Stop at the first violation.
    #[arg(long)]
    stop: bool,
    /// Put a fault in on purpose (only in builds with the feature `bugs`).
    #[arg(long, value_parser = bug)]
    bug: Option<Bug>,
}

fn seeds(text: &str) -> Result<Range<u64>, String> {
    let number = |t: &str| t.parse::<u64>().map_err(|e| format!("{t:?}: {e}"));
    match text.split_once("..") {
        Some((from, to)) => Ok(number(from)?..number(to)?),
        None => number(text).map(|n| n..n + 1),
    }
}

fn bug(text: &str) -> Result<Bug, String> {
    let named = |b: &&Bug| format!("{b:?}").eq_ignore_ascii_case(text);
    let all = || Bug::ALL.map(|b| format!("{b:?}")).join(", ");
    let found = Bug::ALL.iter().find(named).copied();
    found.ok_or_else(|| format!("it is none of {}", all()))
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    runner::quiet_panics();
    let plan = Plan {
        seeds: args.seeds,
        nodes: args.nodes,
        steps: args.steps,
        trace: args.trace,
        bug: args.bug,
        stop: args.stop,
        threads: match args.trace {
            true => 1,
            false => args
                .threads
                .or_else(|| std::thread::available_parallelism().ok().map(Into::into))
                .unwrap_or(1),
        },
    };
    let summary = runner::run(&plan, |outcome| {
        if args.verbose {
            eprintln!("{outcome:?}");
        }
        if let Some(why) = &outcome.violation {
            let nodes = args
                .nodes
                .map(|n| format!(" --nodes {n}"))
                .unwrap_or_default();
            let bug = args
                .bug
                .map(|b| format!(" --bug {b:?}"))
                .unwrap_or_default();
            let (seed, steps) = (outcome.seed, plan.steps);
            eprintln!(
                "VIOLATION in seed {seed} at step {}: {why}\n  replay: tidepool-store-sim --seeds {seed}..{} --steps {steps}{nodes}{bug} --trace",
                outcome.steps,
                seed + 1
            );
        }
    });
    match args.json {
        true => println!("{}", serde_json::to_string(&summary)?),
        false => println!("{summary:#?}"),
    }
    Ok(match summary.violations {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}
