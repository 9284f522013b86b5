//! Process events, the task iterator, and what registration refuses.

use anyhow::{Context, Result, ensure};
use tidepool_inspector::{
    Inspector, InspectorError, InspectorOptions, Target, TaskTable, pid_ns_inode,
};

use crate::sandbox::{Sandbox, Watched};

pub(crate) fn processes_are_born_and_end() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    watched.sandbox.run("spawn 2")?;
    let effects = watched.take()?;
    ensure!(!effects.process_events_lost);
    ensure!(
        effects.born.len() == 2 && effects.execs.len() == 2 && effects.exited.len() == 2,
        "{effects:?}"
    );
    let born = &effects.born[0];
    ensure!(
        !born.is_thread() && born.parent_tgid == watched.sandbox.init(),
        "{born:?}"
    );
    ensure!(born.ns_tid > 1 && born.ns_tgid == born.ns_tid, "{born:?}");
    let exec = &effects.execs[0];
    ensure!(
        exec.path == "/bin/false" && exec.process.tid == born.tid,
        "{exec:?}"
    );
    ensure!(
        exec.process.start_boottime_ns == born.start_boottime_ns,
        "{exec:?}"
    );
    let exit = &effects.exited[0];
    ensure!(
        exit.status == 1 << 8 && exit.process.tid == born.tid,
        "{exit:?}"
    );

    watched.sandbox.run("thread")?;
    let effects = watched.take()?;
    ensure!(
        effects.born.len() == 1 && effects.execs.is_empty(),
        "{effects:?}"
    );
    let thread = &effects.born[0];
    ensure!(
        thread.is_thread() && thread.ns_tgid == 1 && thread.ns_tid > 1,
        "{thread:?}"
    );
    Ok(())
}

pub(crate) fn lost_events_are_said_and_heal() -> Result<()> {
    // The smallest ring there is: room for about 340 events.
    let options = InspectorOptions {
        event_bytes: 1,
        ..InspectorOptions::default()
    };
    let mut watched = Watched::start(&options)?;
    watched.sandbox.run("spawn 200")?;
    ensure!(
        watched.take()?.process_events_lost,
        "600 events fitted into 64 KiB"
    );
    watched.sandbox.run("spawn 1")?;
    let effects = watched.take()?;
    ensure!(
        !effects.process_events_lost && effects.execs.len() == 1,
        "{effects:?}"
    );

    // With readings in between there is room for all.
    for _ in 0..20 {
        watched.sandbox.run("spawn 10")?;
        watched.inspector.pump()?;
    }
    let effects = watched.take()?;
    ensure!(
        !effects.process_events_lost && effects.execs.len() == 200,
        "{}",
        effects.execs.len()
    );
    Ok(())
}

pub(crate) fn an_idle_sandbox_has_not_run() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    let before = watched.settled()?;
    let mark = watched.take()?.mark;
    ensure!(
        before.tasks.len() == 1 && before.tasks[0].ns_tgid == 1,
        "{before:?}"
    );
    for _ in 0..200 {
        // What a host does while a sandbox is idle: looking at its processes.
        std::fs::read(format!("/proc/{}/maps", watched.sandbox.init()))?;
        std::fs::read(format!("/proc/{}/stat", watched.sandbox.init()))?;
        let activity = watched
            .inspector
            .activity_since(watched.slot, &mark, &before)?;
        ensure!(activity.is_quiet(), "{activity:?}");
    }
    watched.sandbox.run("nothing")?;
    let ran = watched.settled()?.ran_since(&before);
    ensure!(
        ran.len() == 1 && ran[0].task.tid == watched.sandbox.init(),
        "{ran:?}"
    );
    Ok(())
}

/// Both ways of reading tasks, while processes come and go; also where there are more than the quicker one can answer.
pub(crate) fn tasks_are_the_same_in_both_ways() -> Result<()> {
    for plainest_form in [false, true] {
        let options = InspectorOptions {
            plainest_form,
            ..InspectorOptions::default()
        };
        let mut watched = Watched::start(&options)?;
        let whole = Inspector::load(&InspectorOptions {
            whole_readings: true,
            ..options
        })?;
        let slot = whole.register(&watched.sandbox.target()?)?;
        watched.sandbox.run("wait")?;
        let stopped = watched.sandbox.hold("block")?;
        watched.sandbox.run(&format!("stop {stopped}"))?;
        for more in [0, 1, 50, 100, 100] {
            for _ in 0..more {
                watched.sandbox.hold("block")?;
            }
            let before = watched.inspector.quick_readings();
            let quick = watched.settled()?;
            let used = watched.inspector.quick_readings() - before;
            let all = whole.tasks(slot)?;
            ensure!(quick == all, "{more} more: {quick:?}\n{all:?}");
            // The first reading finds where to begin.
            ensure!(
                (used > 0) == (all.tasks.len() <= 192),
                "{more} more: {used} quick readings of {} tasks",
                all.tasks.len()
            );
        }
        ensure!(whole.quick_readings() == 0, "not all were read");
    }
    Ok(())
}

pub(crate) fn a_busy_task_always_counts_as_run() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    watched.sandbox.send("spin")?;
    watched.sandbox.expect("spinning")?;
    // Readings much closer together than a tick: the counters often stand still between them.
    let mut before: TaskTable = watched.inspector.tasks(watched.slot)?;
    for round in 0..2000 {
        let now = watched.inspector.tasks(watched.slot)?;
        ensure!(
            now.ran_since(&before).len() == 1,
            "round {round}: {before:?} {now:?}"
        );
        before = now;
    }
    watched.sandbox.send("nothing")?;
    watched.sandbox.finish("spin")?;
    watched.sandbox.finish("nothing")?;
    Ok(())
}

pub(crate) fn activity_ends_the_quiet() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    for command in ["write f", "again f", "spawn 1", "nothing"] {
        watched.end_turn()?;
        let before = watched.settled()?;
        let mark = watched.take()?.mark;
        ensure!(
            watched
                .inspector
                .activity_since(watched.slot, &mark, &before)?
                .is_quiet(),
            "{command}"
        );
        watched.sandbox.run(command)?;
        let activity = watched
            .inspector
            .activity_since(watched.slot, &mark, &before)?;
        ensure!(
            !activity.is_quiet() && !activity.ran.is_empty(),
            "{command}: {activity:?}"
        );
        ensure!(
            activity.dirtied == command.ends_with(" f"),
            "{command}: {activity:?}"
        );
        ensure!(
            activity.process_events == command.starts_with("spawn"),
            "{command}: {activity:?}"
        );
        // Looking took nothing.
        let taken = watched.take()?;
        ensure!(
            taken.files.is_none() != command.ends_with(" f"),
            "{command}: {taken:?}"
        );
    }
    Ok(())
}

pub(crate) fn bad_registrations_are_refused() -> Result<()> {
    let a = Sandbox::start()?;
    let b = Sandbox::start()?;
    let options = InspectorOptions {
        max_sandboxes: 1,
        ..InspectorOptions::default()
    };
    let inspector = Inspector::load(&options)?;
    ensure!(inspector.probe_set() == "ctime");

    let own = Target {
        pid_ns_inode: pid_ns_inode(std::process::id())?,
        ..a.target()?
    };
    ensure!(matches!(
        inspector.register(&own),
        Err(InspectorError::Namespace { .. })
    ));
    for pid_ns_inode in [0, u64::MAX] {
        let target = Target {
            pid_ns_inode,
            ..a.target()?
        };
        ensure!(matches!(
            inspector.register(&target),
            Err(InspectorError::Namespace { .. })
        ));
    }
    let gone = Target {
        upper_dir: a.upper().join("gone"),
        ..a.target()?
    };
    ensure!(matches!(
        inspector.register(&gone),
        Err(InspectorError::Upper { .. })
    ));

    let slot = inspector.register(&a.target()?)?;
    ensure!(matches!(
        inspector.register(&b.target()?),
        Err(InspectorError::TooManySandboxes { limit: 1 })
    ));
    // The same namespace again is the same place, under a new slot.
    let anew = inspector.register(&a.target()?)?;
    ensure!(matches!(inspector.take(slot), Err(InspectorError::UnknownSlot(s)) if s == slot));
    ensure!(matches!(
        inspector.tasks(slot),
        Err(InspectorError::UnknownSlot(_))
    ));
    inspector.unregister(slot);
    inspector.take(anew).context("the new slot")?;
    inspector.unregister(anew);
    inspector.register(&b.target()?)?;
    Ok(())
}
