//! What a boundary sees: effects, processes, memory-backed files, IPC; and what that means to the rules and to the user.
//!
//! Invariant: tasks are read before files, so that what a task does between the two readings is either in the files or shows as having run.

use std::collections::BTreeSet;

use tidepool_fs::Light;
use tidepool_inspector::memory::{MemoryFiles, ipc_in_use};
use tidepool_inspector::{FileEffects, Mark, ProbeSet, RanBecause, Surroundings, TaskTable};
use tidepool_proto::CheckpointId;
use tidepool_proto::api::PathChange;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, Verdict};
use tidepool_scheduler_core::verdict::{FilesSeen, Observation, Previous, ProcessesSeen, Seen};

use crate::boundary::Boundary;
use crate::error::{Context, HostError, Result, chain};

use crate::sandbox::{Live, shorten};

/// Paths and processes named in a turn's evidence.
const SAMPLES: usize = 6;
/// Longest path or reason in evidence, in bytes.
const SAMPLE_LEN: usize = 80;

/// What a boundary saw.
pub(crate) struct Look {
    pub(crate) files: FileEffects,
    pub(crate) tasks: TaskTable,
    pub(crate) mark: Mark,
    pub(crate) memory: MemoryFiles,
    pub(crate) ipc: bool,
    /// What else processes can notice.
    pub(crate) around: Surroundings,
    /// How that differs from the last boundary's; none where that is not known.
    pub(crate) differs: Option<Vec<String>>,
    /// Processes besides init, as `pid comm: what happened`.
    pub(crate) happened: Vec<String>,
    pub(crate) seen: ProcessesSeen,
}

impl Boundary<'_> {
    /// Reads what happened since the last boundary.
    pub(crate) async fn look(&self, live: &Live) -> Result<Look> {
        let (inspector, slot, init_pid) = (self.host.inspector.clone(), live.slot, live.init_pid);
        let (baseline, around_before) = (live.tasks.clone(), live.around.clone());
        tokio::task::spawn_blocking(move || {
            // Tasks before files: what a task does between the two readings is then in the files, or shows as having run.
            let tasks = inspector
                .tasks(slot)
                .map_err(|e| HostError::failed(chain(&e)))?;
            let effects = inspector
                .take(slot)
                .map_err(|e| HostError::failed(chain(&e)))?;
            // Where there are no events at all the tables have to do, and they can: see `processes_seen`.
            let lost = effects.process_events_lost && inspector.probes() != ProbeSet::Walk;
            let memory = MemoryFiles::read(init_pid);
            let ipc = ipc_in_use(init_pid).context("looking at the sandbox's IPC objects")?;
            let (seen, happened) = processes_seen(&tasks, baseline.as_ref(), init_pid, lost);
            let around = Surroundings::read(init_pid, &living(&tasks, init_pid));
            let differs = around_before.map(|before| around.changes_since(&before));
            Ok(Look {
                around,
                differs,
                files: effects.files,
                tasks,
                mark: effects.mark,
                memory,
                ipc,
                happened,
                seen,
            })
        })
        .await?
    }

    /// Whether nothing ran and nothing was dirtied since `look`. Init itself runs when it is spoken to; it writes no files.
    pub(crate) async fn quiet_since(&self, live: &Live, look: &Look) -> Result<bool> {
        let (inspector, slot, init_pid) = (self.host.inspector.clone(), live.slot, live.init_pid);
        let (tasks, mark) = (look.tasks.clone(), look.mark);
        tokio::task::spawn_blocking(move || {
            let activity = inspector
                .activity_since(slot, &mark, &tasks)
                .map_err(|e| HostError::failed(chain(&e)))?;
            let ran = activity.ran.iter().any(|r| r.task.tgid != init_pid);
            Ok(!ran && !activity.dirtied && !activity.process_events)
        })
        .await?
    }
}

/// Both readings' effects.
pub(crate) fn merge(a: &FileEffects, b: FileEffects) -> FileEffects {
    match (a, b) {
        (FileEffects::Inodes(a), FileEffects::Inodes(mut b)) => {
            b.extend_from_slice(a);
            b.sort_unstable();
            b.dedup();
            FileEffects::Inodes(b)
        }
        (FileEffects::Everything { reason }, _) => FileEffects::Everything {
            reason: reason.clone(),
        },
        (_, everything) => everything,
    }
}

/// Processes besides init.
fn living(tasks: &TaskTable, init: u32) -> BTreeSet<u32> {
    let others = tasks.tasks.iter().filter(|t| t.tgid != init && !t.exited);
    others.map(|t| t.tgid).collect()
}

/// What the task tables say of the processes besides init.
fn processes_seen(
    now: &TaskTable,
    baseline: Option<&TaskTable>,
    init: u32,
    lost: bool,
) -> (ProcessesSeen, Vec<String>) {
    let alive = living(now, init);
    let mut happened = Vec::new();
    let Some(baseline) = baseline else {
        let unknown = alive.is_empty().then_some(0);
        let seen = ProcessesSeen {
            alive: Some(alive.len() as u64),
            ran: unknown,
            born: unknown,
            exited: unknown,
            lost: false,
        };
        return (seen, happened);
    };
    let (mut ran, mut born, mut exited) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for r in now
        .ran_since(baseline)
        .iter()
        .filter(|r| r.task.tgid != init)
    {
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
    let seen = ProcessesSeen {
        alive: Some(alive.len() as u64),
        ran: Some(ran.len() as u64),
        born: Some(born.len() as u64),
        exited: Some(exited.len() as u64),
        // The tables tell what lives; events only add what came and went in between.
        lost: lost && !alive.is_empty(),
    };
    (seen, happened)
}

/// What was seen, as the rules take it.
pub(crate) fn observation(
    look: &Look,
    live: &Live,
    last: Option<&(CheckpointId, Manifest)>,
) -> Observation {
    let files = match &look.files {
        FileEffects::Inodes(list) if list.is_empty() => FilesSeen::None,
        FileEffects::Inodes(list) => FilesSeen::Inodes(list.len() as u64),
        FileEffects::Everything { reason } => FilesSeen::Everything(reason.clone()),
    };
    let same =
        |other: &Option<MemoryFiles>| other.as_ref().is_some_and(|m| m.same_as(&look.memory));
    let mut processes = look.seen.clone();
    // Memory-backed files and IPC objects live in the process image: they need one even where only init lives.
    let holds_memory = look.ipc || !same(&live.local.pristine);
    if holds_memory && processes.alive == Some(0) {
        processes.alive = Some(1);
    }
    let changed = match (look.ipc || look.memory.unsure.is_some(), same(&live.memory)) {
        (true, _) => Seen::Unknown,
        (false, true) => Seen::No,
        (false, false) => Seen::Yes,
    };
    let held = match (&look.differs, look.around.unsure.is_some()) {
        (_, true) | (None, _) => Seen::Unknown,
        (Some(differs), _) if differs.is_empty() => Seen::No,
        (Some(_), _) => Seen::Yes,
    };
    Observation {
        held,
        files,
        processes,
        // Decided when the changed paths are known.
        open_dirty: Seen::No,
        tmpfs: changed,
        previous: match last {
            None => Previous::None,
            Some((_, m)) => match &m.processes {
                Some(p) => Previous::WithProcesses(p.count.max(1)),
                None => Previous::FilesOnly,
            },
        },
        forced: None,
    }
}

/// What was seen, as the turn's record keeps it.
pub(crate) fn evidence(
    look: &Look,
    changes: &[PathChange],
    reasons: &[String],
    verdict: Verdict,
    light: Option<&Light>,
    mut not_covered: Vec<String>,
) -> Evidence {
    let sample = |list: &[String]| {
        list.iter()
            .take(SAMPLES)
            .map(|s| shorten(s, SAMPLE_LEN))
            .collect()
    };
    let outside = look.around.outside.iter();
    not_covered.extend(outside.map(|c| format!("connection {c}: closed by a restore")));
    let differs = look.differs.as_deref().unwrap_or_default();
    // A restore makes the network anew, and mounts where no process image is restored.
    let lost = differs
        .iter()
        .filter(|d| d.starts_with("network ") || d.starts_with("mount "));
    not_covered.extend(lost.map(|d| format!("{d}: made inside")));
    let mut happened = look.happened.clone();
    happened.extend(differs.iter().cloned());
    let paths: Vec<String> = changes.iter().map(|c| c.path.clone()).collect();
    let mut reasons: Vec<String> = reasons.to_vec();
    reasons.extend(look.memory.unsure.clone());
    reasons.dedup();
    // A Clean turn's record stays small: what made it look twice is not worth keeping. What was passed over is.
    if verdict == Verdict::Clean {
        reasons.clear();
    }
    if let Some(light) = light.filter(|l| l.ignored_total > 0) {
        reasons.push(format!(
            "{} changes are ignored: {}",
            light.ignored_total,
            light.ignored.join(", ")
        ));
    }
    if let Some(light) = light.filter(|l| l.renewed > 0) {
        reasons.push(format!(
            "{} files were written anew with the same contents",
            light.renewed
        ));
    }
    Evidence {
        paths: sample(&paths),
        paths_total: paths.len() as u64,
        processes: sample(&happened),
        processes_total: happened.len() as u64,
        reasons: sample(&reasons),
        not_covered: sample(&not_covered),
    }
}
