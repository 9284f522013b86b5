//! A boundary's look at a sandbox: everything the inspector can tell since the last one, in the order that makes it sound.
//!
//! Invariant: tasks are read before files, so that what a task does between the two readings is either in the files or shows as having run.
//!
//! What it asks for is the caller's to decide; so is what to keep of it as the next [`Baseline`] (only what a checkpoint was made of, or what was found not to need one).

use std::collections::BTreeSet;

use crate::memory::MemoryFiles;
use crate::surroundings::{Rested, mount_table};
use crate::{
    FileEffects, Inspector, InspectorError, Mark, ProbeSet, RanBecause, SandboxSlot, Surroundings,
    TaskTable,
};

/// What was seen last time. What is not known counts as changed.
#[derive(Clone, Debug, Default)]
pub struct Baseline {
    /// The tasks, or as of their rest after a thaw.
    pub tasks: Option<TaskTable>,
    /// Memory-backed files.
    pub memory: Option<MemoryFiles>,
    /// Whether there were System V objects.
    pub ipc: bool,
    /// What else processes can notice.
    pub around: Option<Surroundings>,
}

/// What the task tables say of the processes besides the sandbox's first. `None` is unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processes {
    /// Alive now.
    pub alive: u64,
    /// Of those, so many ran.
    pub ran: Option<u64>,
    /// Of those alive, so many were born since.
    pub born: Option<u64>,
    /// So many of the baseline's have ended.
    pub exited: Option<u64>,
    /// Process events were lost while processes live.
    pub lost: bool,
}

/// What a boundary saw.
#[derive(Clone, Debug)]
pub struct Look {
    /// Files of the upper.
    pub files: FileEffects,
    /// All tasks.
    pub tasks: TaskTable,
    /// For [`Inspector::activity_since`].
    pub mark: Mark,
    /// Memory-backed files.
    pub memory: MemoryFiles,
    /// Whether memory-backed files or System V objects changed. Objects that are there always may have: their contents cannot be read.
    pub memory_changed: Changed,
    /// Whether there are System V objects.
    pub ipc: bool,
    /// What else processes can notice.
    pub around: Surroundings,
    /// How that differs from the baseline's; none where that is not known.
    pub differs: Option<Vec<String>>,
    /// Processes besides the first.
    pub processes: Processes,
    /// What became of them, as `pid comm: what happened`.
    pub happened: Vec<String>,
}

/// Something that may not be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// Surely not.
    No,
    /// Surely.
    Yes,
    /// Cannot be told.
    Unknown,
}

/// Looks at a sandbox whose first process is `init` (a host process id; it runs for the host, and is left out of the processes).
///
/// # Errors
/// A failed reading, after which nothing can be ruled out.
pub fn look(
    inspector: &Inspector,
    slot: SandboxSlot,
    init: u32,
    before: &Baseline,
) -> Result<Look, InspectorError> {
    let tasks = inspector.tasks(slot)?;
    let effects = inspector.take(slot)?;
    let mounts = mount_table(init);
    let memory = MemoryFiles::of(init, mounts.as_deref());
    let ipc = inspector.ipc_in_use(slot, init)?;
    let alive = living(&tasks, init);
    let rested = before.tasks.as_ref().map(|t| rested(&tasks, t, &alive));
    let rested = rested.as_ref().zip(before.around.as_ref());
    let rested = rested.map(|(pids, earlier)| Rested { earlier, pids });
    let mut around = match &mounts {
        Ok(mounts) => Surroundings::again(init, &alive, mounts, rested),
        Err(e) => Surroundings::unreadable(e),
    };
    let numbers: BTreeSet<(u32, u32)> = tasks
        .tasks
        .iter()
        .filter(|t| alive.contains(&t.tgid))
        .map(|t| (t.tgid, t.ns_tgid))
        .collect();
    around
        .objects
        .extend(inspector.memory_written(slot, init, numbers)?);
    // Where there are no events at all the tables have to do, and they can: events only add what came and went in between.
    let lost = effects.process_events_lost && inspector.probes() != ProbeSet::Walk;
    let (processes, mut happened) = processes(&tasks, before.tasks.as_ref(), init, lost);
    if effects.from_outside {
        happened.push("something outside of the sandbox touched files of it".to_owned());
    }
    // Memory file systems of another mount namespace are not walked.
    let elsewhere = around.mount_namespaces() > 1;
    let same = before.memory.as_ref().map(|m| m.same_as(&memory));
    let memory_changed = match same {
        _ if ipc || elsewhere || memory.unsure.is_some() => Changed::Unknown,
        _ if before.ipc => Changed::Yes,
        Some(true) => Changed::No,
        Some(false) => Changed::Yes,
        None => Changed::Unknown,
    };
    Ok(Look {
        differs: before.around.as_ref().map(|b| around.changes_since(b)),
        files: effects.files,
        tasks,
        mark: effects.mark,
        memory,
        memory_changed,
        ipc,
        around,
        processes,
        happened,
    })
}

/// Processes besides the first.
fn living(tasks: &TaskTable, init: u32) -> BTreeSet<u32> {
    let others = tasks.tasks.iter().filter(|t| t.tgid != init && !t.exited);
    others.map(|t| t.tgid).collect()
}

/// Those of the living that have not run since an earlier reading.
fn rested(now: &TaskTable, earlier: &TaskTable, alive: &BTreeSet<u32>) -> BTreeSet<u32> {
    let ran = now.ran_since(earlier);
    let ran: BTreeSet<u32> = ran.iter().map(|r| r.task.tgid).collect();
    alive.difference(&ran).copied().collect()
}

fn processes(
    now: &TaskTable,
    baseline: Option<&TaskTable>,
    init: u32,
    lost: bool,
) -> (Processes, Vec<String>) {
    let alive = living(now, init);
    let mut happened = Vec::new();
    let Some(baseline) = baseline else {
        let unknown = alive.is_empty().then_some(0);
        let seen = Processes {
            alive: alive.len() as u64,
            ran: unknown,
            born: unknown,
            exited: unknown,
            lost: false,
        };
        return (seen, happened);
    };
    let (mut ran, mut born, mut exited) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let others = now.ran_since(baseline).into_iter();
    for r in others.filter(|r| r.task.tgid != init) {
        let t = &r.task;
        let (set, what) = match r.because {
            _ if t.exited => (&mut exited, "ended"),
            RanBecause::New => (&mut born, "was born"),
            RanBecause::Gone => (&mut exited, "ended"),
            RanBecause::Moved | RanBecause::Running => (&mut ran, "ran"),
        };
        if set.insert(t.tgid) {
            happened.push(format!("{} {}: {what}", t.ns_tgid, t.comm));
        }
    }
    let seen = Processes {
        alive: alive.len() as u64,
        ran: Some(ran.len() as u64),
        born: Some(born.len() as u64),
        exited: Some(exited.len() as u64),
        lost: lost && !alive.is_empty(),
    };
    (seen, happened)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TaskInfo;

    fn task(tgid: u32) -> TaskInfo {
        TaskInfo {
            tid: tgid,
            tgid,
            ns_tid: tgid,
            ns_tgid: tgid,
            parent_tgid: 1,
            start_boottime_ns: 5,
            comm: "sleep".into(),
            exited: false,
            running: false,
            sum_exec_runtime_ns: 1,
            nvcsw: 1,
            nivcsw: 1,
            pcount: 1,
        }
    }

    fn table(tasks: &[TaskInfo]) -> TaskTable {
        TaskTable {
            tasks: tasks.to_vec(),
        }
    }

    #[test]
    fn the_first_process_does_not_count_and_without_a_baseline_nothing_is_known() {
        let (seen, _) = processes(&table(&[task(1)]), None, 1, true);
        assert_eq!((seen.alive, seen.ran, seen.lost), (0, Some(0), false));
        let (seen, _) = processes(&table(&[task(1), task(2)]), None, 1, false);
        assert_eq!((seen.alive, seen.ran, seen.born), (1, None, None));
    }

    #[test]
    fn processes_are_told_apart() {
        let mut ran = task(2);
        ran.nvcsw += 1;
        let mut ended = task(5);
        ended.exited = true;
        let now = table(&[task(1), ran, task(3), task(4), ended]);
        let before = table(&[task(2), task(3), task(5), task(6)]);
        let (seen, happened) = processes(&now, Some(&before), 1, true);
        let alive = living(&now, 1);
        assert_eq!(rested(&now, &before, &alive), BTreeSet::from([3]));
        let counts = (seen.alive, seen.ran, seen.born, seen.exited);
        assert_eq!(counts, (3, Some(1), Some(1), Some(2)));
        assert!(seen.lost && happened.contains(&"2 sleep: ran".to_owned()));
    }
}
