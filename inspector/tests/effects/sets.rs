//! The probe sets, each against the same operations where it can be loaded here.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use tidepool_inspector::{FileEffects, Inspector, InspectorError, InspectorOptions, ProbeSet};

use crate::cases::CASES;
use crate::files::{every_operation, inodes_of};
use crate::sandbox::{Sandbox, Watched};

fn only(set: ProbeSet) -> InspectorOptions {
    InspectorOptions {
        probe_set: Some(set),
        ..InspectorOptions::default()
    }
}

/// The same with each set of hooks that names inodes and can be loaded here, in each of its forms.
pub(crate) fn naming_inodes(test: impl Fn(&InspectorOptions) -> Result<()>) -> Result<()> {
    for (set, plainest_form) in [
        (ProbeSet::Ctime, false),
        (ProbeSet::Ext4, false),
        (ProbeSet::Ext4, true),
    ] {
        let options = InspectorOptions {
            plainest_form,
            ..only(set)
        };
        test(&options).with_context(|| format!("{set}, the plainest form: {plainest_form}"))?;
    }
    Ok(())
}

pub(crate) fn trampolines_see_the_same_or_are_refused() -> Result<()> {
    match Inspector::load(&only(ProbeSet::Trampoline)) {
        Ok(_) => every_operation(&only(ProbeSet::Trampoline)),
        // All functions are there and only the kernel's rules forbid it: then the programs fit this kernel as far as can be told.
        Err(e @ InspectorError::Unsupported { .. }) => {
            let text = format!("{e:?}");
            ensure!(text.contains("not permitted"), "{text}");
            println!("trampolines are forbidden here");
            Ok(())
        }
        Err(e) => bail!(e),
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) fn system_calls_tell_that_files_may_have_changed() -> Result<()> {
    let mut watched = Watched::start(&only(ProbeSet::Syscalls))?;
    // Registered before its first reading, when something may have been mapped.
    watched.take()?;
    let mut failures = Vec::new();
    for case in CASES {
        // What is mapped stays so, and then every reading doubts: that is another test. A ring is one for good.
        if ["mapping", "store", "io_uring"]
            .iter()
            .any(|n| case.name.contains(n))
        {
            continue;
        }
        watched.sandbox.run(&format!("prepare {}", case.name))?;
        watched.take()?;
        watched.sandbox.run(&format!("act {}", case.name))?;
        match watched.take()?.files {
            FileEffects::Everything { reason } if reason.contains("system call") => {}
            other => failures.push(format!("{}: {other:?}", case.name)),
        }
        let again = watched.take()?.files;
        ensure!(again.is_none(), "{} twice: {again:?}", case.name);
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    for _ in 0..3 {
        watched.sandbox.run("read")?;
        let files = watched.take()?.files;
        ensure!(files.is_none(), "reading: {files:?}");
    }
    // Children that start and end, their output, and what they open.
    watched.sandbox.run("spawn 3")?;
    let effects = watched.take()?;
    ensure!(effects.files.is_none(), "{:?}", effects.files);
    ensure!(effects.born.len() == 3, "{:?}", effects.born);
    Ok(())
}

#[cfg(target_arch = "x86_64")]
pub(crate) fn system_calls_see_mappings() -> Result<()> {
    let mut watched = Watched::start(&only(ProbeSet::Syscalls))?;
    watched.sandbox.run("map f")?;
    watched.take()?;
    for round in 0..3 {
        watched.sandbox.run("store")?;
        let files = watched.take()?.files;
        ensure!(
            matches!(&files, FileEffects::Everything { reason } if reason.contains("mapped")),
            "round {round}: {files:?}"
        );
    }
    let mut watched = Watched::start(&only(ProbeSet::Syscalls))?;
    watched.take()?;
    for half in ["prepare", "act"] {
        watched.sandbox.run(&format!("{half} io_uring_write"))?;
    }
    for round in 0..3 {
        let files = watched.take()?.files;
        ensure!(!files.is_none(), "round {round}: {files:?}");
    }
    Ok(())
}

pub(crate) fn a_walk_always_doubts_files_and_knows_tasks() -> Result<()> {
    let sandbox = Sandbox::start()?;
    let inspector = Inspector::load(&only(ProbeSet::Walk))?;
    ensure!(inspector.probe_set() == "walk");
    let slot = inspector.register(&sandbox.target()?)?;
    let mut watched = Watched {
        sandbox,
        inspector,
        slot,
    };
    let before = watched.settled()?;
    let mark = watched.take()?.mark;
    ensure!(before.tasks.len() == 1, "{before:?}");
    for _ in 0..20 {
        let activity = watched.inspector.activity_since(slot, &mark, &before)?;
        ensure!(activity.is_quiet(), "{activity:?}");
        let files = watched.take()?.files;
        ensure!(matches!(files, FileEffects::Everything { .. }), "{files:?}");
    }
    for command in ["write f", "spawn 1", "nothing"] {
        let before = watched.settled()?;
        watched.sandbox.run(command)?;
        let activity = watched.inspector.activity_since(slot, &mark, &before)?;
        ensure!(
            !activity.is_quiet() && activity.dirtied,
            "{command}: {activity:?}"
        );
    }
    ensure!(matches!(
        watched.inspector.watch_thaw(slot),
        Err(InspectorError::NotInSet { .. })
    ));
    watched.inspector.unregister(slot);
    ensure!(watched.take().is_err());
    Ok(())
}

pub(crate) fn the_best_set_is_found() -> Result<()> {
    let inspector = Inspector::load(&InspectorOptions::default())?;
    ensure!(
        inspector.probe_set() == "ctime",
        "{}",
        inspector.probe_set()
    );
    ensure!(
        inspector.fallbacks().is_empty(),
        "{:?}",
        inspector.fallbacks()
    );
    Ok(())
}

pub(crate) fn nothing_stays_attached_without_sandboxes() -> Result<()> {
    let inspector = Inspector::load(&InspectorOptions::default())?;
    let links = || -> Result<usize> {
        let all = std::fs::read_dir("/proc/self/fdinfo")?;
        let texts = all.filter_map(|e| std::fs::read_to_string(e.ok()?.path()).ok());
        Ok(texts.filter(|t| t.contains("link_type:")).count())
    };
    ensure!(links()? == 0, "{} before the first", links()?);
    let sandboxes = [Sandbox::start()?, Sandbox::start()?];
    let a = inspector.register(&sandboxes[0].target()?)?;
    let b = inspector.register(&sandboxes[1].target()?)?;
    let attached = links()?;
    ensure!(attached > 0, "nothing is attached");
    inspector.unregister(a);
    ensure!(links()? == attached, "{} with one", links()?);
    inspector.unregister(b);
    ensure!(links()? == 0, "{} after the last", links()?);
    Ok(())
}

pub(crate) fn a_storm_stays_correct_and_bounded() -> Result<()> {
    const FILES: u32 = 30_000;
    let options = InspectorOptions {
        max_dirty_inodes: 10_000,
        ..InspectorOptions::default()
    };
    let mut watched = Watched::start(&options)?;
    watched.sandbox.run(&format!("many storm {FILES}"))?;
    let start = Instant::now();
    let files = watched.take()?.files;
    println!(
        "a storm of {FILES} inodes was taken in {:?}",
        start.elapsed()
    );
    ensure!(matches!(files, FileEffects::Everything { .. }), "{files:?}");
    // It heals at once.
    ensure!(watched.take()?.files.is_none());
    watched.sandbox.run("write f")?;
    let dirty = watched.dirty_paths(&watched.take()?)?;
    ensure!(dirty.contains("f"), "{dirty:?}");
    // With readings on the way it stays exact up to the bound.
    watched.sandbox.run("many a 4000")?;
    watched.inspector.pump()?;
    watched.sandbox.run("many b 4000")?;
    let dirty = watched.dirty_paths(&watched.take()?)?;
    ensure!(dirty.len() > 8000, "{}", dirty.len());
    Ok(())
}

pub(crate) fn a_storm_is_nobody_elses() -> Result<()> {
    let options = InspectorOptions {
        max_dirty_inodes: 2_000,
        ..InspectorOptions::default()
    };
    let mut a = Watched::start(&options)?;
    let mut b = Sandbox::start()?;
    let slot = a.inspector.register(&b.target()?)?;
    a.inspector.take(slot)?;
    a.sandbox.run("many storm 10000")?;
    b.run("write f")?;
    let files = a.inspector.take(slot)?.files;
    let inodes = inodes_of(&files).context("b is in doubt for what a did")?;
    ensure!(inodes.contains(&crate::sandbox::inode(&b.upper().join("f"))?));
    ensure!(matches!(a.take()?.files, FileEffects::Everything { .. }));
    Ok(())
}
