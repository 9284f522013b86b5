//! `tidepool-effect-fuzz --seeds 0..10 --turns 1000 --json`

use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tidepool_effect_fuzz::breaks::Break;
use tidepool_effect_fuzz::run::{Counts, Look, seed};
use tidepool_effect_fuzz::{child, outside, sandbox};
use tidepool_inspector::{Inspector, InspectorOptions, ProbeSet};

/// Looks for changes that the inspector misses. Needs root and eBPF.
#[derive(Debug, Parser)]
#[command(name = "tidepool-effect-fuzz")]
struct Arguments {
    /// Seeds to run, each in a sandbox of its own, such as 0..20.
    #[arg(long, value_parser = range, default_value = "0..10")]
    seeds: Range<u64>,
    /// Turns of each seed.
    #[arg(long, default_value_t = 200)]
    turns: u64,
    /// Which probes to use: ctime, ext4, trampoline, syscalls or walk. An error where they cannot be loaded; the best that can be where none are named.
    #[arg(long)]
    probe_set: Option<ProbeSet>,
    /// Break the inspector in this way; a miss is then expected.
    #[arg(long = "break", value_enum)]
    broken: Option<Break>,
    /// Inodes that may be dirty at a time; few make the inspector overflow, after which everything is walked.
    #[arg(long, default_value_t = InspectorOptions::default().max_dirty_inodes)]
    max_dirty_inodes: u32,
    /// The last line is one JSON object.
    #[arg(long)]
    json: bool,
    /// Print clean turns that were reported as changes.
    #[arg(long)]
    show_false_positives: bool,
    /// Go on with the next seed after a miss.
    #[arg(long)]
    keep_going: bool,
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let (from, to) = text.split_once("..").ok_or("not of the form 0..20")?;
    let number = |s: &str| s.parse::<u64>().map_err(|e| e.to_string());
    Ok(number(from)?..number(to)?)
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|a| a == sandbox::FLAG) {
        let dir = words.next().unwrap_or_default();
        return child::run(Path::new(&dir));
    }
    if std::env::args_os()
        .nth(1)
        .is_some_and(|a| a == outside::FLAG)
    {
        let mut words = std::env::args_os().skip(2);
        let upper = words.next().unwrap_or_default();
        let line = words.next().unwrap_or_default();
        return outside::run(Path::new(&upper), &line.to_string_lossy());
    }
    match fuzz(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("tidepool-effect-fuzz: {e:?}");
            ExitCode::from(2)
        }
    }
}

fn fuzz(arguments: &Arguments) -> Result<u64> {
    let (needed, leave_out) = arguments.broken.and_then(Break::leave_out).unzip();
    if let (Some(needed), Some(asked)) = (needed, arguments.probe_set) {
        ensure!(
            needed == asked,
            "this is a break of the probe set {needed}, not of {asked}"
        );
    }
    let inspector = Inspector::load(&InspectorOptions {
        probe_set: arguments.probe_set.or(needed),
        leave_out: leave_out.unwrap_or_default(),
        ignore_outside: arguments.broken == Some(Break::NoOutside),
        max_dirty_inodes: arguments.max_dirty_inodes,
        ..InspectorOptions::default()
    })
    .context("loading the inspector")?;
    let probe_set = inspector.probe_set();
    let look = Look {
        inspector: &inspector,
        broken: arguments.broken,
        show: arguments.show_false_positives,
    };
    let (mut counts, mut missed) = (Counts::default(), 0u64);
    let start = Instant::now();
    for number in arguments.seeds.clone() {
        let Some(miss) = seed(&look, number, arguments.turns, &mut counts)? else {
            continue;
        };
        missed += 1;
        println!(
            "MISSED: seed {}, turn {}: {}",
            miss.seed, miss.turn, miss.what
        );
        miss.lines.iter().for_each(|line| println!("    {line}"));
        if !arguments.keep_going {
            break;
        }
    }
    let rate = counts.false_positives as f64 / counts.clean.max(1) as f64;
    if arguments.json {
        let line = serde_json::json!({
            "turns": counts.turns,
            "missed": missed,
            "false_positive_rate": rate,
            "probe_set": probe_set,
            "checked": counts.checked,
            "operations": counts.operations,
            "operations_done": counts.done,
            "clean_turns": counts.clean,
            "turns_with_unknown_objects": counts.unknown,
            "false_positives": counts.false_positives,
            "false_positives_files": counts.false_files,
            "clean_but_captured": counts.looked_twice,
            "full_walks": counts.full_walks,
            "changes_from_outside": counts.outside,
            "truths_of_another_moment": counts.late,
            "seconds": start.elapsed().as_secs(),
        });
        println!("{line}");
    } else {
        println!(
            "{probe_set}: {} turns, {missed} missed, {} of {} clean turns reported as changes; {} s",
            counts.turns,
            counts.false_positives,
            counts.clean,
            start.elapsed().as_secs()
        );
    }
    Ok(missed)
}
