//! The fuzzer finds what is broken, within 2,000 turns, and nothing where nothing is. Needs root and eBPF.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Runs the fuzzer; answers its last line and whether it found nothing.
fn fuzz(arguments: &[&str]) -> Result<(Value, bool)> {
    let ran = Command::new(env!("CARGO_BIN_EXE_tidepool-effect-fuzz"))
        .arg("--json")
        .args(arguments)
        .output()?;
    let text = String::from_utf8_lossy(&ran.stdout);
    let last = text.lines().last().with_context(|| {
        let errors = String::from_utf8_lossy(&ran.stderr);
        format!("{arguments:?} says nothing: {errors}")
    })?;
    let counts: Value = serde_json::from_str(last).with_context(|| text.to_string())?;
    let found_nothing = ran.status.success();
    ensure!(
        found_nothing == (counts["missed"] == 0),
        "the exit status contradicts {counts}"
    );
    Ok((counts, found_nothing))
}

fn caught(broken: &str) -> Result<()> {
    let (counts, found_nothing) = fuzz(&["--seeds", "0..10", "--turns", "200", "--break", broken])?;
    ensure!(!found_nothing, "{broken} was not caught: {counts}");
    ensure!(counts["turns"].as_u64() <= Some(2000), "{counts}");
    println!("{broken}: caught after {} turns", counts["turns"]);
    Ok(())
}

fn sound(probe_set: &str) -> Result<()> {
    let arguments = [
        "--seeds",
        "1000..1002",
        "--turns",
        "150",
        "--probe-set",
        probe_set,
    ];
    let (counts, found_nothing) = fuzz(&arguments)?;
    ensure!(found_nothing, "something was missed: {counts}");
    ensure!(counts["turns"] == 300, "{counts}");
    ensure!(counts["probe_set"] == probe_set, "{counts}");
    // A run that does nothing would miss nothing.
    ensure!(counts["operations_done"].as_u64() > Some(300), "{counts}");
    ensure!(counts["checked"].as_u64() > Some(50), "{counts}");
    Ok(())
}

#[test]
fn ctime_misses_nothing() -> Result<()> {
    sound("ctime")
}

#[test]
fn ext4_misses_nothing() -> Result<()> {
    sound("ext4")
}

#[test]
fn walk_misses_nothing() -> Result<()> {
    sound("walk")
}

#[test]
fn writeback_alone_is_caught() -> Result<()> {
    caught("w-only")
}

#[test]
fn a_missing_journal_hook_is_caught() -> Result<()> {
    caught("no-journal")
}

#[test]
fn dirty_pages_alone_are_caught() -> Result<()> {
    caught("pages-only")
}

#[test]
fn a_forgetting_map_is_caught() -> Result<()> {
    caught("lru")
}

#[test]
fn mappings_not_armed_again_are_caught() -> Result<()> {
    caught("no-rearm")
}

#[test]
fn mappings_armed_by_name_only_are_caught() -> Result<()> {
    caught("rearm-by-name")
}

#[test]
fn a_missing_guard_within_a_tick_is_caught() -> Result<()> {
    caught("no-tick-guard")
}

#[test]
fn an_ignored_memory_file_system_is_caught() -> Result<()> {
    caught("no-tmpfs")
}

#[test]
fn dropped_directories_are_caught() -> Result<()> {
    caught("no-directories")
}

#[test]
fn ignored_processes_are_caught() -> Result<()> {
    caught("no-processes")
}

#[test]
fn ignored_writes_of_the_host_are_caught() -> Result<()> {
    caught("no-outside")
}

#[test]
fn ignored_writes_to_memory_are_caught() -> Result<()> {
    caught("no-pokes")
}

#[test]
fn ignored_surroundings_are_caught() -> Result<()> {
    caught("no-surroundings")
}
