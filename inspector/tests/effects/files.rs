//! Effects on files.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context, Result, ensure};
use tidepool_inspector::{
    FileEffects, Inspector, InspectorOptions, Target, pid_ns_inode, rearm,
    shared_writable_mappings_of, supports,
};

use crate::cases::{CASES, Case};
use crate::sandbox::{Sandbox, Watched, inode, scratch};
use crate::sets::naming_inodes;

pub(crate) fn every_operation_is_seen_at_its_path() -> Result<()> {
    naming_inodes(every_operation)
}

pub(crate) fn inodes_of(files: &FileEffects) -> Option<HashSet<u64>> {
    match files {
        FileEffects::Inodes(inodes) => Some(inodes.iter().map(|i| i.ino).collect()),
        FileEffects::Everything { .. } => None,
    }
}

/// For a probe set that names inodes.
pub(crate) fn every_operation(options: &InspectorOptions) -> Result<()> {
    let mut watched = Watched::start(options)?;
    let failures: Vec<String> = CASES
        .iter()
        .filter_map(|case| {
            one_operation(&mut watched, case)
                .err()
                .map(|e| format!("{}: {e:?}", case.name))
        })
        .collect();
    println!("{} operations", CASES.len());
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

fn one_operation(watched: &mut Watched, case: &Case) -> Result<()> {
    watched.sandbox.run(&format!("prepare {}", case.name))?;
    watched.end_turn()?;
    watched.sandbox.run(&format!("act {}", case.name))?;
    let dirty = watched.dirty_paths(&watched.take()?)?;
    for path in case.dirty {
        let path = if *path == "." {
            case.name.to_owned()
        } else {
            format!("{}/{path}", case.name)
        };
        ensure!(dirty.contains(&path), "{path} is not among {dirty:?}");
    }
    // And nothing that the operation has nothing to do with.
    let inside = format!("{}/", case.name);
    for path in &dirty {
        ensure!(
            path == case.name || path.starts_with(&inside),
            "{path} is dirty too"
        );
        ensure!(!path.ends_with("/still"), "{path} is dirty too");
    }
    ensure!(
        watched.take()?.files.is_none(),
        "the same effects are reported twice"
    );
    Ok(())
}

pub(crate) fn reading_dirties_nothing() -> Result<()> {
    naming_inodes(reading)
}

fn reading(options: &InspectorOptions) -> Result<()> {
    let mut watched = Watched::start(options)?;
    watched.sandbox.run("prepare append")?;
    watched.sandbox.run("prepare copy_up_of_parents")?;
    watched.sandbox.run("many upperdir 10")?;
    watched.end_turn()?;
    for round in 0..3 {
        watched.sandbox.run("read")?;
        let effects = watched.take()?;
        ensure!(
            effects.files.is_none(),
            "round {round}: {:?}",
            watched.dirty_paths(&effects)
        );
        ensure!(effects.born.is_empty() && effects.execs.is_empty() && effects.exited.is_empty());
    }
    Ok(())
}

pub(crate) fn rewrites_in_one_tick_are_seen_after_rearm() -> Result<()> {
    naming_inodes(rewrites_in_one_tick)
}

fn rewrites_in_one_tick(options: &InspectorOptions) -> Result<()> {
    let mut watched = Watched::start(options)?;
    watched.sandbox.run("write f")?;
    let upper = watched.sandbox.upper();
    let wanted = inode(&upper.join("f"))?;
    for round in 0..500 {
        // Nothing here may look at the file but the re-arming: any stat of it would do half of that work.
        watched.take()?;
        let failed = rearm::paths(&upper, ["f"])?;
        ensure!(failed.is_empty(), "{failed:?}");
        watched.wait_if_coarse();
        watched.sandbox.run("again f")?;
        let files = watched.take()?.files;
        let seen =
            matches!(&files, FileEffects::Inodes(inodes) if inodes.iter().any(|i| i.ino == wanted));
        ensure!(seen, "round {round}: {files:?}");
    }
    Ok(())
}

pub(crate) fn stores_to_a_mapping_are_seen_after_rearm() -> Result<()> {
    naming_inodes(stores_to_a_mapping)
}

fn stores_to_a_mapping(options: &InspectorOptions) -> Result<()> {
    let mut watched = Watched::start(options)?;
    watched.sandbox.run("map f")?;
    watched.end_turn()?;
    for round in 0..100 {
        watched.sandbox.run("store")?;
        let dirty = watched.dirty_paths(&watched.take()?)?;
        ensure!(dirty.contains("f"), "round {round}: {dirty:?}");
        if round % 2 == 0 {
            let failed = rearm::paths(&watched.sandbox.upper(), &dirty)?;
            ensure!(failed.is_empty(), "{failed:?}");
        } else {
            rearm::file(fs::File::open(watched.sandbox.upper().join("f"))?)?;
        }
        ensure!(
            watched.take()?.files.is_none(),
            "re-arming itself shows as an effect"
        );
    }
    Ok(())
}

pub(crate) fn mappings_are_armed_again_under_other_names() -> Result<()> {
    naming_inodes(mappings_under_other_names)
}

fn mappings_under_other_names(options: &InspectorOptions) -> Result<()> {
    let mut watched = Watched::start(options)?;
    watched.sandbox.run("map f")?;
    // The mapping shows a name that is gone; the file has another.
    watched.sandbox.run("relink f g")?;
    watched.sandbox.run("store")?;
    let (upper, merged) = (watched.sandbox.upper(), watched.sandbox.merged());
    let init = watched.sandbox.init();
    for round in 0..50 {
        watched.take()?;
        let failed = rearm::mapped(&upper, &merged, [init])?;
        ensure!(failed.is_empty(), "{failed:?}");
        watched.wait_if_coarse();
        ensure!(
            watched.take()?.files.is_none(),
            "re-arming itself shows as an effect"
        );
        watched.sandbox.run("store")?;
        let dirty = watched.dirty_paths(&watched.take()?)?;
        ensure!(dirty.contains("g"), "round {round}: {dirty:?}");
    }
    // A mapping that cannot be stored to at the moment.
    for round in 0..50 {
        watched.sandbox.run("store")?;
        watched.sandbox.run("protect")?;
        watched.take()?;
        let failed = rearm::mapped(&upper, &merged, [init])?;
        ensure!(failed.is_empty(), "{failed:?}");
        watched.wait_if_coarse();
        watched.sandbox.run("unprotect")?;
        watched.sandbox.run("store")?;
        let dirty = watched.dirty_paths(&watched.take()?)?;
        ensure!(dirty.contains("g"), "protected, round {round}: {dirty:?}");
    }
    // And where a name is one, and a process is gone.
    watched.sandbox.run("relink g f")?;
    let failed = rearm::mapped(&upper, &merged, [init, u32::MAX >> 2])?;
    ensure!(failed.is_empty(), "{failed:?}");
    Ok(())
}

pub(crate) fn rearm_does_not_leave_the_upper() -> Result<()> {
    let dir = scratch()?;
    let upper = dir.path().join("upper");
    fs::create_dir(&upper)?;
    fs::write(dir.path().join("outside"), b"x")?;
    fs::write(upper.join("f"), b"x")?;
    symlink("../outside", upper.join("link"))?;
    symlink("..", upper.join("up"))?;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        upper.join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )?;
    let failed = rearm::paths(
        &upper,
        [
            "f",
            ".",
            "pipe",
            "gone",
            "f/below",
            "up/outside",
            "../outside",
            "link",
        ],
    )?;
    let failed: BTreeSet<_> = failed
        .iter()
        .map(|(path, _)| path.to_str().unwrap_or("?"))
        .collect();
    // The link itself is an inode of the upper like any other; what it points to is not touched.
    ensure!(
        failed == BTreeSet::from(["../outside", "up/outside"]),
        "{failed:?}"
    );
    Ok(())
}

pub(crate) fn shared_mappings_are_listed() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    ensure!(shared_writable_mappings_of(&watched.inspector, watched.slot)?.is_empty());
    watched.sandbox.run("map back\\012slash and blank")?;
    let mappings = shared_writable_mappings_of(&watched.inspector, watched.slot)?;
    ensure!(mappings.len() == 1, "{mappings:?}");
    ensure!(
        mappings[0].pid == watched.sandbox.init() && !mappings[0].deleted,
        "{mappings:?}"
    );
    ensure!(
        mappings[0]
            .path
            .ends_with("merged/back\\012slash and blank"),
        "{mappings:?}"
    );
    Ok(())
}

pub(crate) fn overflow_means_everything_and_heals() -> Result<()> {
    naming_inodes(overflow)
}

fn overflow(options: &InspectorOptions) -> Result<()> {
    let few = InspectorOptions {
        max_dirty_inodes: 64,
        ..options.clone()
    };
    let mut watched = Watched::start(&few)?;
    watched.sandbox.run("many a 500")?;
    let files = watched.take()?.files;
    ensure!(
        matches!(&files, FileEffects::Everything { reason } if reason.contains("no room")),
        "{files:?}"
    );
    watched.sandbox.run("write f")?;
    let dirty = watched.dirty_paths(&watched.take()?)?;
    ensure!(dirty.contains("f") && dirty.contains(""), "{dirty:?}");
    ensure!(watched.take()?.files.is_none());
    Ok(())
}

pub(crate) fn other_filesystems_mean_everything() -> Result<()> {
    let sandbox = Sandbox::start()?;
    let upper_dir = tempfile::Builder::new()
        .prefix("tp-inspector-")
        .tempdir_in("/dev/shm")?;
    let reason = supports(upper_dir.path())
        .err()
        .context("/dev/shm is not a tmpfs here")?;
    let inspector = Inspector::load(&InspectorOptions::default())?;
    let slot = inspector.register(&Target {
        pid_ns_inode: pid_ns_inode(sandbox.init())?,
        upper_dir: upper_dir.path().to_owned(),
    })?;
    inspector.take(slot)?;
    for _ in 0..3 {
        let files = inspector.take(slot)?.files;
        ensure!(
            files
                == FileEffects::Everything {
                    reason: reason.clone()
                },
            "{files:?}"
        );
    }
    Ok(())
}

pub(crate) fn nothing_is_lost_while_draining() -> Result<()> {
    const COUNT: usize = 20_000;
    let mut watched = Watched::start(&InspectorOptions::default())?;
    let command = format!("many storm {COUNT}");
    let mut seen = HashSet::new();
    let mut takes = 0;
    watched.sandbox.send(&command)?;
    let mut last = false;
    while !last {
        last = watched.sandbox.answered()?;
        match watched.take()?.files {
            FileEffects::Inodes(inodes) => seen.extend(inodes.into_iter().map(|i| i.ino)),
            FileEffects::Everything { reason } => anyhow::bail!("unexpected doubt: {reason}"),
        }
        takes += 1;
    }
    watched.sandbox.finish(&command)?;
    let dir = watched.sandbox.upper().join("storm");
    let mut missed = 0;
    let mut count = 0;
    for entry in fs::read_dir(dir)? {
        count += 1;
        missed += usize::from(!seen.contains(&inode(&entry?.path())?));
    }
    println!("{count} files over {takes} takes");
    ensure!(
        count == COUNT && takes > 2 && missed == 0,
        "{missed} of {count} missed in {takes} takes"
    );
    Ok(())
}

pub(crate) fn sandboxes_do_not_see_each_other() -> Result<()> {
    let mut a = Watched::start(&InspectorOptions::default())?;
    let mut b = Sandbox::start()?;
    let slot = a.inspector.register(&b.target()?)?;
    a.inspector.take(slot)?;
    a.sandbox.run("write of-a")?;
    b.run("many of-b 3")?;
    b.run("spawn 1")?;
    a.inspector.pump()?;

    let of_a = a.take()?;
    ensure!(
        a.dirty_paths(&of_a)? == BTreeSet::from([String::new(), "of-a".into()]),
        "{of_a:?}"
    );
    ensure!(of_a.born.is_empty() && of_a.exited.is_empty(), "{of_a:?}");
    // b's effects were moved along by a's take and wait.
    let of_b = a.inspector.take(slot)?;
    let FileEffects::Inodes(inodes) = &of_b.files else {
        anyhow::bail!("{:?}", of_b.files)
    };
    let inodes: HashSet<u64> = inodes.iter().map(|i| i.ino).collect();
    for path in ["of-b", "of-b/0", "of-b/2"] {
        ensure!(
            inodes.contains(&inode(&b.upper().join(path))?),
            "{path}: {of_b:?}"
        );
    }
    ensure!(!inodes.contains(&inode(&a.sandbox.upper().join("of-a"))?));
    ensure!(of_b.born.len() == 1 && of_b.exited.len() == 1, "{of_b:?}");
    let tasks = a.inspector.tasks(slot)?.tasks;
    ensure!(
        tasks.len() == 1 && tasks[0].tid == b.init() && tasks[0].ns_tid == 1,
        "{tasks:?}"
    );
    Ok(())
}

pub(crate) fn a_new_slot_knows_nothing_of_the_old() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    watched.sandbox.run("write left-behind")?;
    let old = watched.slot;
    watched.inspector.unregister(old);
    ensure!(
        watched.inspector.take(old).is_err(),
        "an unregistered slot answers"
    );
    watched.sandbox.run("write unwatched")?;

    watched.slot = watched.inspector.register(&watched.sandbox.target()?)?;
    ensure!(watched.slot != old);
    ensure!(matches!(
        watched.take()?.files,
        FileEffects::Everything { .. }
    ));
    watched.sandbox.run("write new")?;
    let effects = watched.take()?;
    let dirty = watched.dirty_paths(&effects)?;
    ensure!(
        dirty == BTreeSet::from([String::new(), "new".into()]),
        "{dirty:?}"
    );
    ensure!(effects.born.is_empty() && effects.exited.is_empty());
    Ok(())
}

pub(crate) fn writes_of_the_watching_process_do_not_count() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    watched.sandbox.run("write f")?;
    watched.end_turn()?;
    fs::write(watched.sandbox.upper().join("by-the-host"), b"x")?;
    // Written back now, by a kernel thread: not the sandbox's doing either.
    fs::File::open(watched.sandbox.upper().join("f"))?.sync_all()?;
    let effects = watched.take()?;
    ensure!(
        effects.files.is_none() && !effects.from_outside,
        "{effects:?}"
    );
    Ok(())
}
