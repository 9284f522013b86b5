//! What a boundary's look at the sandbox (`tidepool_inspector::look`) means to the rules and to the user.

use tidepool_fs::Light;
use tidepool_inspector::FileEffects;
use tidepool_inspector::look::{Changed, Look, look};
use tidepool_proto::CheckpointId;
use tidepool_proto::api::PathChange;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, Verdict};
use tidepool_scheduler_core::verdict::{FilesSeen, Observation, Previous, ProcessesSeen, Seen};

use crate::boundary::Boundary;
use crate::error::{HostError, Result, chain};
use crate::sandbox::{Live, shorten};

/// Paths and processes named in a turn's evidence.
const SAMPLES: usize = 6;
/// Longest path or reason in evidence, in bytes.
const SAMPLE_LEN: usize = 80;

impl Boundary<'_> {
    /// Reads what happened since the last boundary.
    pub(crate) async fn look(&self, live: &Live) -> Result<Look> {
        let (inspector, slot, init_pid) = (self.host.inspector.clone(), live.slot, live.init_pid);
        let before = live.seen.clone();
        tokio::task::spawn_blocking(move || {
            look(&inspector, slot, init_pid, &before).map_err(|e| HostError::failed(chain(&e)))
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
    let mut processes = ProcessesSeen {
        alive: Some(look.processes.alive),
        ran: look.processes.ran,
        born: look.processes.born,
        exited: look.processes.exited,
        lost: look.processes.lost,
    };
    // Memory-backed files and IPC objects live in the process image: they need one even where only init lives.
    let pristine = live.local.pristine.as_ref();
    let holds_memory = look.ipc || !pristine.is_some_and(|m| m.same_as(&look.memory));
    if holds_memory && processes.alive == Some(0) {
        processes.alive = Some(1);
    }
    let changed = match look.memory_changed {
        Changed::No => Seen::No,
        Changed::Yes => Seen::Yes,
        Changed::Unknown => Seen::Unknown,
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
