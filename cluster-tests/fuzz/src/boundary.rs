//! A turn's end, as the daemon takes it: the inspector's look, and where files may have changed the capture of them.
//!
//! Tasks are read until all but the first are at rest; then comes [`look::look`], which is the daemon's own; where files were dirtied, [`rearm::mapped`] for what is mapped shared,
//! then a capture of the dirty inodes upon the index of the last one (of everything where nothing can be ruled out).
//!
//! What a boundary reports adds up until the truth is looked at again: [`Reported`].

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use tidepool_fs::capture::{self, CaptureOptions};
use tidepool_fs::{Captured, DirtyInode, NullSink, TreeIndex};
use tidepool_inspector::look::{self, Baseline, Changed, Look};
use tidepool_inspector::{
    FileEffects, Inspector, RanBecause, SandboxSlot, TaskTable, rearm, shared_writable_mappings,
};
use tidepool_proto::DomainKey;

use crate::breaks::{Break, Broken};
use crate::sandbox::Sandbox;

/// Far more than it takes; only to end a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a sentence begins that says that the memory of a process was written.
const POKE: &str = "memory of process ";

/// What was reported since the last comparison.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reported {
    pub(crate) files: bool,
    /// Memory files, IPC objects.
    pub(crate) memory: bool,
    /// Mounts, and what the kernel keeps for processes; one sentence each.
    pub(crate) around: Vec<String>,
    /// Processes that ran, were born or ended, by host id.
    pub(crate) processes: BTreeSet<u32>,
}

impl Reported {
    pub(crate) fn any(&self) -> bool {
        self.files || self.image()
    }

    /// Whether anything asks for a new process image.
    pub(crate) fn image(&self) -> bool {
        self.memory || !self.around.is_empty() || !self.processes.is_empty()
    }
}

/// What one boundary did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Done {
    /// Files were captured.
    pub(crate) captured: bool,
    /// By a walk of everything.
    pub(crate) walked: bool,
}

/// A sandbox whose turns are watched.
pub(crate) struct Watched<'a> {
    pub(crate) inspector: &'a Inspector,
    pub(crate) slot: SandboxSlot,
    pub(crate) sandbox: Sandbox,
    pub(crate) what: Option<Break>,
    pub(crate) broken: Broken,
    pub(crate) key: DomainKey,
    pub(crate) index: Option<TreeIndex>,
    pub(crate) baseline: Baseline,
    pub(crate) reported: Reported,
}

impl Watched<'_> {
    /// Takes one.
    pub(crate) fn boundary(&mut self) -> Result<Done> {
        self.settle()?;
        let init = self.sandbox.init();
        let look = look::look(self.inspector, self.slot, init, &self.baseline)?;
        self.report(&look);
        let mut files = look.files;
        self.baseline = Baseline {
            tasks: Some(look.tasks),
            memory: Some(look.memory),
            ipc: look.ipc,
            around: Some(look.around),
        };
        self.broken.files(&mut files, &self.sandbox.upper());
        if self.index.is_some() && files.is_none() {
            return Ok(Done::default());
        }
        if self.what != Some(Break::NoRearm) {
            self.rearm()?;
        }
        let before = self.index.take();
        let captured = self.capture(before.as_ref(), &files)?;
        let all = matches!(files, FileEffects::Everything { .. });
        let walked = all || captured.full_walk.is_some();
        if before.is_none_or(|b| b.tree() != captured.tree) {
            self.reported.files = true;
        }
        self.index = Some(captured.index);
        Ok(Done {
            captured: true,
            walked,
        })
    }

    fn report(&mut self, look: &Look) {
        let what = self.what;
        if what != Some(Break::NoProcesses) {
            let init = self.sandbox.init();
            let ran = match &self.baseline.tasks {
                Some(before) => look.tasks.ran_since(before),
                None => Vec::new(),
            };
            // What was a zombie at both ends is nobody.
            let ran = ran
                .iter()
                .filter(|r| !(r.task.exited && r.because == RanBecause::New));
            let others = ran.filter(|r| r.task.tgid != init).map(|r| r.task.tgid);
            self.reported.processes.extend(others);
        }
        if look.memory_changed != Changed::No && what != Some(Break::NoTmpfs) {
            self.reported.memory = true;
        }
        // Processes that nobody compares are not looked into either.
        if !matches!(what, Some(Break::NoSurroundings | Break::NoProcesses)) {
            let unknown = || vec!["nothing is known of before".to_owned()];
            let differs = look.differs.clone().unwrap_or_else(unknown);
            let (pokes, differs): (Vec<String>, Vec<String>) =
                differs.into_iter().partition(|d| d.starts_with(POKE));
            self.reported.around.extend(differs);
            if what != Some(Break::NoPokes) {
                let pids = pokes.iter().filter_map(|p| {
                    let pid = p.strip_prefix(POKE)?.split(':').next()?;
                    pid.parse::<u32>().ok()
                });
                self.reported.processes.extend(pids);
            }
        }
    }

    /// Waits until all but the first are at rest: after its answer a process still has to get into its next read.
    ///
    /// A task that waits for a disk or a lock in the midst of a call has not run either, but is not at rest: it goes on by itself, before it heeds a stop. A freezer
    /// waits for it, and the daemon, where it does not freeze, looks again afterwards; here the truth would be that of a later moment than the boundary.
    fn settle(&self) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            let before = self.inspector.tasks(self.slot)?;
            let at_rest = !before.tasks.iter().any(|t| goes_on(t.tgid, t.tid));
            if at_rest && self.rested_since(&before)? {
                return Ok(());
            }
            std::thread::yield_now();
        }
        bail!("the sandbox does not come to rest")
    }

    /// Whether nothing but the first process has run since the last boundary.
    pub(crate) fn rests(&self) -> Result<bool> {
        match &self.baseline.tasks {
            Some(tasks) => self.rested_since(tasks),
            None => Ok(false),
        }
    }

    fn rested_since(&self, before: &TaskTable) -> Result<bool> {
        let now = self.inspector.tasks(self.slot)?;
        let ran = now.ran_since(before);
        Ok(ran.iter().all(|r| r.task.tgid == self.sandbox.init()))
    }

    fn rearm(&self) -> Result<()> {
        let (upper, root) = (self.sandbox.upper(), self.sandbox.merged());
        let living = self.baseline.tasks.as_ref().map(living).unwrap_or_default();
        if self.what == Some(Break::RearmByName) {
            for pid in living {
                let mapped = shared_writable_mappings(pid)?;
                let names = mapped
                    .iter()
                    .filter_map(|m| m.path.strip_prefix(&root).ok());
                rearm::paths(&upper, names)?;
            }
            return Ok(());
        }
        // The first process too: here it is a process as any other, unlike the daemon's own.
        let failed = rearm::mapped(&upper, &root, living)?;
        ensure!(failed.is_empty(), "arming again: {failed:?}");
        Ok(())
    }

    fn capture(&self, before: Option<&TreeIndex>, files: &FileEffects) -> Result<Captured> {
        let (upper, options) = (self.sandbox.upper(), CaptureOptions::default());
        let sink = &mut NullSink;
        Ok(match (before, files) {
            (Some(before), FileEffects::Inodes(dirty)) => {
                let dirty: Vec<DirtyInode> = dirty
                    .iter()
                    .map(|d| DirtyInode {
                        ino: d.ino,
                        dev: d.dev,
                        generation: d.generation,
                    })
                    .collect();
                capture::dirty(&upper, &self.key, options, before, &dirty, sink)?
            }
            (before, _) => capture::full(&upper, &self.key, options, before, sink)?,
        })
    }
}

/// Whether a task runs, or will once something outside of it is done that is no event to wait for.
fn goes_on(pid: u32, tid: u32) -> bool {
    let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
    let end = stat.iter().rposition(|b| *b == b')');
    let state = end.and_then(|end| stat.get(end + 2));
    matches!(state, Some(b'D' | b'R'))
}

fn living(tasks: &TaskTable) -> BTreeSet<u32> {
    let living = tasks.tasks.iter().filter(|t| !t.exited);
    living.map(|t| t.tgid).collect()
}
