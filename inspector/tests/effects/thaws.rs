//! Watching a thaw without a dump: both freezers, waits of every kind in one process, and the ends of a watch.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tidepool_inspector::{InspectorError, InspectorOptions, Thaw, ThawBecause, ThawWatch};

use crate::sandbox::{PATIENCE, Watched};

/// A cgroup of its own for one process, in one hierarchy. Thawed and removed when dropped.
struct Freezer {
    dir: PathBuf,
    v2: bool,
    pid: u32,
}

impl Freezer {
    /// One in each hierarchy that can freeze, of which this machine must have one at least.
    fn all() -> Result<Vec<(PathBuf, bool)>> {
        let mut found = Vec::new();
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            let (before, after) = line.split_once(" - ").context("mountinfo")?;
            let root = before.split(' ').nth(4).context("mountinfo")?;
            let mut after = after.split(' ');
            let kind = after.next().context("mountinfo")?;
            let options = after.next_back().context("mountinfo")?;
            if kind == "cgroup2" || kind == "cgroup" && options.split(',').any(|o| o == "freezer") {
                found.push((PathBuf::from(root), kind == "cgroup2"));
            }
        }
        ensure!(!found.is_empty(), "these tests need a cgroup freezer");
        Ok(found)
    }

    fn new(root: &Path, v2: bool, pid: u32) -> Result<Self> {
        let dir = root.join(format!("tp-inspector-{}-{pid}", std::process::id()));
        fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
        let freezer = Self { dir, v2, pid };
        fs::write(freezer.dir.join("cgroup.procs"), pid.to_string())?;
        Ok(freezer)
    }

    fn freeze(&self) -> Result<()> {
        let start = Instant::now();
        self.set(true)?;
        let (file, mark) = match self.v2 {
            true => ("cgroup.events", "frozen 1"),
            false => ("freezer.state", "FROZEN"),
        };
        while !fs::read_to_string(self.dir.join(file))?.contains(mark) {
            ensure!(start.elapsed() < PATIENCE, "it does not freeze");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn thaw(&self) -> Result<()> {
        self.set(false)
    }

    fn set(&self, frozen: bool) -> Result<()> {
        let (file, text) = match (self.v2, frozen) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        Ok(fs::write(self.dir.join(file), text)?)
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = self.thaw();
        if let Some(root) = self.dir.parent() {
            let _ = fs::write(root.join("cgroup.procs"), self.pid.to_string());
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

fn answer(watch: &ThawWatch) -> Result<Thaw> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        match watch.poll(0)? {
            Thaw::Pending => std::thread::sleep(Duration::from_millis(1)),
            thaw => return Ok(thaw),
        }
    }
    bail!("no answer")
}

fn ran(thaw: &Thaw, because: ThawBecause) -> bool {
    matches!(thaw, Thaw::Ran(ran) if ran.iter().any(|r| r.because == because))
}

/// Rounds of which [`threads_find_back_after_a_freeze`] may doubt one thread: on the way back into its call a thread can have to wait for a lock or a page,
/// which looks as if it had been woken in the call. Such a thread counts as having run, as every doubt does; on a busy machine it happens.
const DOUBTS: u32 = 3;

pub(crate) fn threads_find_back_after_a_freeze() -> Result<()> {
    for (root, v2) in Freezer::all()? {
        let mut watched = Watched::start(&InspectorOptions::default())?;
        watched.sandbox.run("wait")?;
        let threads = watched.settled()?.tasks.len();
        ensure!(threads > 8, "{threads}");
        let freezer = Freezer::new(&root, v2, watched.sandbox.init())?;
        watched.settled()?;
        let mut doubted = 0;
        for round in 0..50 {
            freezer.freeze()?;
            let watch = watched.inspector.watch_thaw(watched.slot)?;
            let before = watch.poll(0)?;
            freezer.thaw()?;
            // A thread that the freezer found in the midst of something is in doubt at once.
            if before != Thaw::Pending {
                let what = format!("v2 {v2}, round {round}, while frozen: {before:?}");
                ensure!(matches!(before, Thaw::Ran(_)) && doubted < DOUBTS, "{what}");
                eprintln!("{what}");
                doubted += 1;
                watched.settled()?;
                continue;
            }
            let thaw = answer(&watch)?;
            drop(watch);
            if ran(&thaw, ThawBecause::Moved) && doubted < DOUBTS {
                doubted += 1;
                watched.settled()?;
                continue;
            }
            let Thaw::Quiet { tasks, .. } = thaw else {
                bail!("v2 {v2}, round {round}: {thaw:?}");
            };
            ensure!(tasks.tasks.len() == threads);
            std::thread::sleep(Duration::from_millis(2));
            let ran = watched.inspector.tasks(watched.slot)?.ran_since(&tasks);
            ensure!(ran.is_empty(), "v2 {v2}, round {round}: {ran:?}");
        }
        // The one thread that is told to do something is seen.
        freezer.freeze()?;
        let watch = watched.inspector.watch_thaw(watched.slot)?;
        watched.sandbox.send("nothing")?;
        freezer.thaw()?;
        watched.sandbox.finish("nothing")?;
        let thaw = answer(&watch)?;
        ensure!(
            matches!(&thaw, Thaw::Ran(ran) if ran.len() == 1),
            "v2 {v2}: {thaw:?}"
        );
    }
    Ok(())
}

pub(crate) fn busy_threads_have_run_after_a_freeze() -> Result<()> {
    for (root, v2) in Freezer::all()? {
        let mut watched = Watched::start(&InspectorOptions::default())?;
        watched.sandbox.send("spin")?;
        watched.sandbox.expect("spinning")?;
        let freezer = Freezer::new(&root, v2, watched.sandbox.init())?;
        for round in 0..50 {
            freezer.freeze()?;
            let watch = watched.inspector.watch_thaw(watched.slot)?;
            freezer.thaw()?;
            let thaw = answer(&watch)?;
            ensure!(matches!(thaw, Thaw::Ran(_)), "v2 {v2}, round {round}");
        }
        watched.sandbox.send("nothing")?;
        watched.sandbox.finish("spin")?;
        watched.sandbox.finish("nothing")?;
    }
    Ok(())
}

/// A number of the old interface would be taken for another call.
#[cfg(target_arch = "x86_64")]
pub(crate) fn calls_with_old_numbers_have_run() -> Result<()> {
    let (root, v2) = Freezer::all()?.remove(0);
    let mut watched = Watched::start(&InspectorOptions::default())?;
    watched.sandbox.run("old-pause")?;
    watched.settled()?;
    let freezer = Freezer::new(&root, v2, watched.sandbox.init())?;
    freezer.freeze()?;
    let watch = watched.inspector.watch_thaw(watched.slot)?;
    freezer.thaw()?;
    let thaw = answer(&watch)?;
    ensure!(ran(&thaw, ThawBecause::Unknown), "{thaw:?}");
    Ok(())
}

pub(crate) fn an_overflow_of_a_watch_means_that_something_ran() -> Result<()> {
    let (root, v2) = Freezer::all()?.remove(0);
    let options = InspectorOptions {
        max_watched_tasks: 1,
        ..InspectorOptions::default()
    };
    let mut watched = Watched::start(&options)?;
    watched.sandbox.run("wait")?;
    watched.settled()?;
    let freezer = Freezer::new(&root, v2, watched.sandbox.init())?;
    watched.settled()?;
    freezer.freeze()?;
    let watch = watched.inspector.watch_thaw(watched.slot)?;
    freezer.thaw()?;
    // More than one thread enters a call.
    watched.sandbox.run("thread")?;
    let thaw = answer(&watch)?;
    ensure!(ran(&thaw, ThawBecause::Doubt), "{thaw:?}");
    Ok(())
}

pub(crate) fn a_watch_leaves_nothing_attached() -> Result<()> {
    let mut watched = Watched::start(&InspectorOptions::default())?;
    ensure!(attached()? == 0);
    let first = watched.inspector.watch_thaw(watched.slot)?;
    // Not frozen: whoever asks like that gets no false comfort.
    watched.sandbox.run("nothing")?;
    ensure!(matches!(answer(&first)?, Thaw::Ran(_)));
    let second = watched.inspector.watch_thaw(watched.slot)?;
    ensure!(attached()? == 1, "one program for all watches");
    ensure!(
        ran(&first.poll(0)?, ThawBecause::Doubt),
        "a watch replaced by another knows nothing"
    );
    drop(first);
    ensure!(attached()? == 1, "the second watch goes on");
    watched.sandbox.run("nothing")?;
    ensure!(matches!(answer(&second)?, Thaw::Ran(_)));
    drop(second);
    ensure!(attached()? == 0);

    let third = watched.inspector.watch_thaw(watched.slot)?;
    watched.inspector.unregister(watched.slot);
    ensure!(matches!(
        third.poll(0),
        Err(InspectorError::UnknownSlot(slot)) if slot == watched.slot
    ));
    ensure!(matches!(
        watched.inspector.watch_thaw(watched.slot),
        Err(InspectorError::UnknownSlot(_))
    ));
    drop(third);
    ensure!(attached()? == 0);
    Ok(())
}

/// How often this process has a program attached to the entry of system calls.
fn attached() -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        // The descriptor of the listing itself is gone by now.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        count += usize::from(text.lines().any(|l| {
            l.strip_prefix("tp_name:")
                .is_some_and(|n| n.trim() == "sys_enter")
        }));
    }
    Ok(count)
}
