//! What a boundary sees: effects, processes, memory-backed files, IPC; and what that means to the rules and to the user.
//!
//! Invariant: tasks are read before files, so that what a task does between the two readings is either in the files or shows as having run.

use std::collections::BTreeSet;

use tidepool_inspector::{FileEffects, Mark, RanBecause, TaskTable};
use tidepool_proto::CheckpointId;
use tidepool_proto::api::PathChange;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, Verdict};
use tidepool_scheduler_core::verdict::{FilesSeen, Observation, Previous, ProcessesSeen, Seen};

use crate::boundary::Boundary;
use crate::error::{Context, HostError, Result, chain};
use crate::observe::{MemoryFiles, ipc_in_use};
use crate::sandbox::{Live, shorten};

/// Paths and processes named in a turn's evidence.
const SAMPLES: usize = 6;
/// Longest path or reason in evidence, in bytes.
const SAMPLE_LEN: usize = 80;

/// What a boundary saw.
pub(crate) struct Look {
    pub(crate) files: FileEffects,
    pub(crate) tasks: Option<TaskTable>,
    pub(crate) mark: Option<Mark>,
    pub(crate) memory: MemoryFiles,
    pub(crate) ipc: bool,
    /// Processes besides init, as `pid comm: what happened`.
    pub(crate) happened: Vec<String>,
    pub(crate) seen: ProcessesSeen,
}

impl Boundary<'_> {
    /// Reads what happened since the last boundary.
    pub(crate) async fn look(&self, live: &Live) -> Result<Look> {
        let (inspector, slot, init_pid) = (self.host.inspector.clone(), live.slot, live.init_pid);
        let baseline = live.tasks.clone();
        let blind = match (&inspector, slot) {
            (Some(_), Some(_)) => None,
            _ => Some(
                self.host
                    .runtime
                    .processes(&live.name)
                    .await
                    .map_err(HostError::from)?,
            ),
        };
        tokio::task::spawn_blocking(move || {
            // Tasks before files: what a task does between the two readings is then in the files, or shows as having run.
            let (tasks, files, mark, lost) = match (&inspector, slot) {
                (Some(inspector), Some(slot)) => {
                    let tasks = inspector
                        .tasks(slot)
                        .map_err(|e| HostError::failed(chain(&e)))?;
                    let effects = inspector
                        .take(slot)
                        .map_err(|e| HostError::failed(chain(&e)))?;
                    (
                        Some(tasks),
                        effects.files,
                        Some(effects.mark),
                        effects.process_events_lost,
                    )
                }
                _ => {
                    let reason = "nothing watches this sandbox".to_owned();
                    (None, FileEffects::Everything { reason }, None, true)
                }
            };
            let memory = MemoryFiles::read(init_pid);
            let ipc = ipc_in_use(init_pid).context("looking at the sandbox's IPC objects")?;
            let (seen, happened) = match (&tasks, blind) {
                (Some(now), _) => processes_seen(now, baseline.as_ref(), init_pid, lost),
                (None, blind) => {
                    let others = blind
                        .unwrap_or_default()
                        .iter()
                        .filter(|p| p.pid as u32 != init_pid)
                        .count();
                    let unknown = (others == 0).then_some(0);
                    let seen = ProcessesSeen {
                        alive: Some(others as u64),
                        ran: unknown,
                        born: unknown,
                        exited: Some(0),
                        lost: false,
                    };
                    (seen, Vec::new())
                }
            };
            Ok(Look {
                files,
                tasks,
                mark,
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
        let (Some(inspector), Some(slot)) = (self.host.inspector.clone(), live.slot) else {
            return Ok(look.seen.alive == Some(0));
        };
        let (Some(tasks), Some(mark)) = (look.tasks.clone(), look.mark) else {
            return Ok(false);
        };
        let init_pid = live.init_pid;
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

/// What the task tables say of the processes besides init.
fn processes_seen(
    now: &TaskTable,
    baseline: Option<&TaskTable>,
    init: u32,
    lost: bool,
) -> (ProcessesSeen, Vec<String>) {
    let others = |t: &&tidepool_inspector::TaskInfo| t.tgid != init && !t.exited;
    let alive: BTreeSet<u32> = now.tasks.iter().filter(others).map(|t| t.tgid).collect();
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
    Observation {
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
    not_covered: Vec<String>,
) -> Evidence {
    let sample = |list: &[String]| {
        list.iter()
            .take(SAMPLES)
            .map(|s| shorten(s, SAMPLE_LEN))
            .collect()
    };
    let paths: Vec<String> = changes.iter().map(|c| c.path.clone()).collect();
    let mut reasons: Vec<String> = reasons.to_vec();
    reasons.extend(look.memory.unsure.clone());
    reasons.dedup();
    Evidence {
        paths: sample(&paths),
        paths_total: paths.len() as u64,
        processes: sample(&look.happened),
        processes_total: look.happened.len() as u64,
        // A Clean turn's record stays small: what made it look twice is not worth keeping.
        reasons: if verdict == Verdict::Clean {
            Vec::new()
        } else {
            sample(&reasons)
        },
        not_covered: sample(&not_covered),
    }
}
