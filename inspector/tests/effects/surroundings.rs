//! What processes notice besides files and memory.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use tidepool_inspector::{InspectorOptions, Surroundings};

use crate::sandbox::Watched;

fn look(watched: &Watched) -> Result<Surroundings> {
    let tasks = watched.settled()?.tasks;
    let living: BTreeSet<u32> = tasks.iter().filter(|t| !t.exited).map(|t| t.tgid).collect();
    let found = Surroundings::read(watched.sandbox.init(), &living);
    ensure!(found.unsure.is_none(), "{:?}", found.unsure);
    Ok(found)
}

pub(crate) fn mounts_made_inside_are_seen() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    let before = look(&watched)?;
    ensure!(look(&watched)?.changes_since(&before).is_empty());
    watched.sandbox.run("mount here")?;
    let mounted = look(&watched)?;
    let changes = mounted.changes_since(&before);
    ensure!(
        changes.len() == 1 && changes[0].contains("/here (") && changes[0].ends_with("came"),
        "{changes:?}"
    );
    watched.sandbox.run("umount here")?;
    let changes = look(&watched)?.changes_since(&mounted);
    ensure!(
        changes.len() == 1 && changes[0].ends_with("is gone"),
        "{changes:?}"
    );
    ensure!(look(&watched)?.changes_since(&before).is_empty());
    Ok(())
}

pub(crate) fn namespaces_made_inside_are_seen() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    let before = look(&watched)?;
    watched.sandbox.hold("unshare=uts")?;
    let changes = look(&watched)?.changes_since(&before);
    ensure!(
        changes.iter().any(|c| c.starts_with("namespace uts")),
        "{changes:?}"
    );
    Ok(())
}

/// A process that sleeps through all of it: its scheduler counters tell nothing.
pub(crate) fn what_others_do_to_a_sleeping_process_is_seen() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    watched.sandbox.run("fifo pipe")?;
    let inside = watched
        .sandbox
        .hold("fifo=pipe listen=127.0.0.1:4711 block=usr1")?;
    let tasks = watched.settled()?;
    let held = tasks.tasks.iter().find(|t| t.ns_tgid == inside);
    let held = held.context("the process")?.tgid;
    for (command, what) in [
        ("put pipe one".to_owned(), "pipe"),
        ("connect 127.0.0.1:4711".to_owned(), "socket:"),
        (format!("signal {inside}"), "signals"),
        (format!("limit {inside}"), "limits"),
    ] {
        let (before, tasks) = (look(&watched)?, watched.settled()?);
        watched.sandbox.run(&command)?;
        let now = watched.settled()?;
        let ran = now.ran_since(&tasks);
        ensure!(
            !ran.iter().any(|r| r.task.tgid == held),
            "{command} made it run: {ran:?}"
        );
        let changes = look(&watched)?.changes_since(&before);
        let of_it = format!("process {held} ");
        ensure!(
            changes
                .iter()
                .any(|c| format!("{c} ").replace(':', " ").starts_with(&of_it) && c.contains(what)),
            "{command}: {changes:?}"
        );
    }
    // A stop moves the counters.
    let tasks = watched.settled()?;
    watched.sandbox.run(&format!("stop {inside}"))?;
    let ran = watched.settled()?.ran_since(&tasks);
    ensure!(ran.iter().any(|r| r.task.tgid == held), "{ran:?}");
    Ok(())
}

pub(crate) fn a_sleeping_process_keeps_its_state() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    watched.sandbox.run("fifo pipe")?;
    watched
        .sandbox
        .hold("fifo=pipe listen=127.0.0.1:4711 block=usr1")?;
    let (before, tasks) = (look(&watched)?, watched.settled()?);
    for _ in 0..50 {
        let changes = look(&watched)?.changes_since(&before);
        ensure!(changes.is_empty(), "{changes:?}");
    }
    let ran = watched.settled()?.ran_since(&tasks);
    ensure!(ran.is_empty(), "looking made it run: {ran:?}");
    Ok(())
}
