//! One seed: turns, the daemon's look and capture at each boundary, and the comparison with the truth.
//!
//! A boundary does what the daemon does: tasks, then [`Inspector::take`]; where files were dirtied, [`rearm::mapped`] for what is mapped shared and writable, then a capture
//! of the dirty inodes upon the index of the last one (of everything where nothing can be ruled out); the memory file system by its contents. Without
//! eBPF the tasks come from `/proc`, and every capture is a full one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use tidepool_fs::capture::{self, CaptureOptions};
use tidepool_fs::{Captured, DirtyInode, NullSink, TreeIndex};
use tidepool_inspector::{
    FileEffects, Inspector, SandboxSlot, Target, TaskTable, pid_ns_inode, rearm,
    shared_writable_mappings, tasks_from_proc,
};
use tidepool_proto::DomainKey;

use crate::breaks::{Break, Broken};
use crate::sandbox::Sandbox;
use crate::script::{Kind, Script, Turn};
use crate::truth::{ProcessId, Truth, differing, memory_files};

/// What was counted, over any number of seeds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub turns: u64,
    /// Turns whose end was compared with the truth.
    pub checked: u64,
    pub operations: u64,
    /// Of those, so many did something (were not refused).
    pub done: u64,
    /// Turns that changed nothing in truth.
    pub clean: u64,
    /// Of those, so many were reported as a change.
    pub false_positives: u64,
    /// Of these, so many for their files.
    pub false_files: u64,
    /// Of the clean ones, so many were captured before that was known.
    pub looked_twice: u64,
    /// Captures that walked everything.
    pub full_walks: u64,
}

/// A change that was not reported.
#[derive(Clone, Debug)]
pub struct Miss {
    pub seed: u64,
    pub turn: u64,
    pub what: String,
    /// The lines since the last comparison, with the turn and the outcome of each.
    pub lines: Vec<String>,
}

/// How the boundaries look.
pub struct Look<'a> {
    /// The eBPF programs, or none for a walk at every boundary.
    pub inspector: Option<&'a Inspector>,
    pub broken: Option<Break>,
    /// Print clean turns that were reported as changes.
    pub show: bool,
}

/// What was reported since the last comparison.
#[derive(Default)]
struct Reported {
    files: bool,
    memory_files: bool,
    /// Host ids.
    processes: BTreeSet<u32>,
}

struct Seed<'a> {
    look: &'a Look<'a>,
    broken: Broken,
    sandbox: Sandbox,
    slot: Option<SandboxSlot>,
    key: DomainKey,
    tasks: TaskTable,
    index: Option<TreeIndex>,
    memory: BTreeMap<PathBuf, [u8; 32]>,
    truth: Truth,
    reported: Reported,
    counts: Counts,
}

/// Runs the turns of one seed. The first missed change ends it.
pub fn seed(look: &Look<'_>, number: u64, turns: u64, counts: &mut Counts) -> Result<Option<Miss>> {
    let sandbox = Sandbox::start()?;
    let target = Target {
        pid_ns_inode: pid_ns_inode(sandbox.init())?,
        upper_dir: sandbox.upper(),
    };
    let slot = match look.inspector {
        Some(inspector) => Some(inspector.register(&target)?),
        None => None,
    };
    let mut run = Seed {
        look,
        broken: Broken::new(look.broken),
        sandbox,
        slot,
        key: DomainKey::new([7; 32]),
        tasks: TaskTable::default(),
        index: None,
        memory: BTreeMap::new(),
        truth: Truth::default(),
        reported: Reported::default(),
        counts: *counts,
    };
    let outcome = run.turns(number, turns);
    *counts = run.counts;
    if let (Some(inspector), Some(slot)) = (look.inspector, slot) {
        inspector.unregister(slot);
    }
    outcome
}

impl Seed<'_> {
    fn turns(&mut self, seed: u64, turns: u64) -> Result<Option<Miss>> {
        let mut script = Script::new(seed);
        // Before the first turn: everything is captured, and known.
        self.boundary()?;
        self.truth = Truth::read(&self.sandbox.upper(), self.sandbox.init())?;
        self.reported = Reported::default();
        let mut lines = Vec::new();
        // Slots that did something on their own since the last comparison; and how long ago that was.
        let (mut busy, mut since) = (false, 0);
        for number in 0..turns {
            let turn = script.turn(number + 1 == turns);
            let outcomes = self
                .sandbox
                .run(&turn.lines)
                .with_context(|| format!("seed {seed}, turn {number}: {:?}", turn.lines))?;
            for (line, outcome) in turn.lines.iter().zip(&outcomes) {
                ensure!(!outcome.contains("HANG"), "seed {seed}: {line}: {outcome}");
                lines.push(format!("turn {number}: {line} => {outcome}"));
                self.counts.operations += 1;
                self.counts.done += u64::from(outcome == "ok");
            }
            busy |= of_others(&turn);
            since += 1;
            self.counts.turns += 1;
            let captured = self
                .boundary()
                .with_context(|| format!("seed {seed}, turn {number}: {:?}", turn.lines))?;
            if !turn.check {
                continue;
            }
            self.counts.checked += 1;
            let truth = Truth::read(&self.sandbox.upper(), self.sandbox.init())?;
            if let Some(what) = self.missed(&truth)? {
                let lines = std::mem::take(&mut lines);
                return Ok(Some(Miss {
                    seed,
                    turn: number,
                    what,
                    lines,
                }));
            }
            if since == 1 && !busy && truth == self.truth {
                self.counts.clean += 1;
                self.counts.looked_twice += u64::from(captured);
                let reported = &self.reported;
                let any = reported.files || reported.memory_files || !reported.processes.is_empty();
                self.counts.false_positives += u64::from(any);
                self.counts.false_files += u64::from(reported.files);
                if any && self.look.show {
                    println!(
                        "reported for nothing: seed {seed}, turn {number}: files {}, memory files {}, processes {:?}: {:?} {:?}",
                        reported.files,
                        reported.memory_files,
                        reported.processes,
                        turn.kind,
                        turn.lines
                    );
                }
            }
            self.truth = truth;
            self.reported = Reported::default();
            lines.clear();
            (busy, since) = (false, 0);
        }
        Ok(None)
    }

    /// A turn's end, as the daemon takes it. Answers whether files were captured.
    fn boundary(&mut self) -> Result<bool> {
        let tasks = self.settled()?;
        let mut files = match (self.look.inspector, self.slot) {
            (Some(inspector), Some(slot)) => inspector.take(slot)?.files,
            _ => FileEffects::Everything {
                reason: "nothing watches this sandbox".into(),
            },
        };
        if self.look.broken != Some(Break::NoProcesses) {
            let ran = tasks.ran_since(&self.tasks);
            let others = ran.iter().filter(|r| r.task.tgid != self.sandbox.init());
            self.reported.processes.extend(others.map(|r| r.task.tgid));
        }
        self.tasks = tasks;

        let memory = memory_files(self.sandbox.init())?;
        if memory != self.memory && self.look.broken != Some(Break::NoTmpfs) {
            self.reported.memory_files = true;
        }
        self.memory = memory;

        self.broken.files(&mut files, &self.sandbox.upper());
        if self.index.is_some() && files.is_none() {
            return Ok(false);
        }
        if self.look.broken != Some(Break::NoRearm) {
            self.rearm()?;
        }
        let before = self.index.take();
        let captured = self.capture(before.as_ref(), &files)?;
        let all = matches!(files, FileEffects::Everything { .. });
        if all || captured.full_walk.is_some() {
            self.counts.full_walks += 1;
        }
        if before.is_none_or(|b| b.tree() != captured.tree) {
            self.reported.files = true;
        }
        self.index = Some(captured.index);
        Ok(true)
    }

    fn tasks(&self) -> Result<TaskTable> {
        Ok(match (self.look.inspector, self.slot) {
            (Some(inspector), Some(slot)) => inspector.tasks(slot)?,
            _ => tasks_from_proc(pid_ns_inode(self.sandbox.init())?)?,
        })
    }

    /// The tasks once all but the first are at rest: after its answer a process still has to get into its next read.
    fn settled(&self) -> Result<TaskTable> {
        let mut before = self.tasks()?;
        for _ in 0..10_000 {
            let now = self.tasks()?;
            let ran = now.ran_since(&before);
            if ran.iter().all(|r| r.task.tgid == self.sandbox.init()) {
                return Ok(now);
            }
            before = now;
            std::thread::yield_now();
        }
        bail!("the sandbox does not come to rest")
    }

    fn rearm(&self) -> Result<()> {
        let (upper, root) = (self.sandbox.upper(), self.sandbox.merged());
        if self.look.broken == Some(Break::RearmByName) {
            for pid in living(&self.tasks) {
                let mapped = shared_writable_mappings(pid)?;
                let names = mapped
                    .iter()
                    .filter_map(|m| m.path.strip_prefix(&root).ok());
                rearm::paths(&upper, names)?;
            }
            return Ok(());
        }
        // The first process too: here it is a process as any other, unlike the daemon's own.
        let failed = rearm::mapped(&upper, &root, living(&self.tasks))?;
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

    /// What of the truth was not reported, if anything.
    fn missed(&self, truth: &Truth) -> Result<Option<String>> {
        let Some(index) = &self.index else {
            bail!("nothing was captured");
        };
        let (upper, options) = (self.sandbox.upper(), CaptureOptions::default());
        let full = capture::full(&upper, &self.key, options, Some(index), &mut NullSink)?;
        if full.tree != index.tree() {
            let paths: Vec<String> = full
                .index
                .changes_since(index, 20)
                .changes
                .iter()
                .map(|c| format!("{} ({:?})", c.path, c.change))
                .collect();
            return Ok(Some(format!("files: {}", paths.join(", "))));
        }
        let files = differing(&truth.files, &self.truth.files);
        if !files.is_empty() && !self.reported.files {
            return Ok(Some(format!("files, by both captures: {files:?}")));
        }
        let memory = differing(&truth.memory_files, &self.truth.memory_files);
        if !memory.is_empty() && !self.reported.memory_files {
            return Ok(Some(format!("memory files: {memory:?}")));
        }
        let silent: Vec<ProcessId> = differing(&truth.processes, &self.truth.processes)
            .into_iter()
            .filter(|(pid, _)| !self.reported.processes.contains(pid))
            .collect();
        Ok((!silent.is_empty()).then(|| format!("processes (id, start): {silent:?}")))
    }
}

/// Whether processes other than the first were given something to do.
fn of_others(turn: &Turn) -> bool {
    turn.kind != Kind::Quiet && !turn.lines.is_empty()
}

fn living(tasks: &TaskTable) -> BTreeSet<u32> {
    let living = tasks.tasks.iter().filter(|t| !t.exited);
    living.map(|t| t.tgid).collect()
}
