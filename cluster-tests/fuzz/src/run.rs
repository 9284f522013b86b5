//! One seed: turns, a boundary at the end of each, and the comparison of what was reported with the truth.

use anyhow::{Context, Result, bail, ensure};
use tidepool_fs::NullSink;
use tidepool_fs::capture::{self, CaptureOptions};
use tidepool_inspector::look::Baseline;
use tidepool_inspector::{Inspector, ProbeSet, Target, pid_ns_inode};
use tidepool_proto::DomainKey;

use crate::boundary::{Reported, Watched};
use crate::breaks::{Break, Broken};
use crate::outside;
use crate::sandbox::Sandbox;
use crate::script::{Kind, Script, Turn};
use crate::truth::{ProcessId, Truth, differing};

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
    /// Turns that may have changed nothing: there were IPC objects, whose contents the truth does not know either.
    pub unknown: u64,
    /// Of those, so many were reported as a change.
    pub false_positives: u64,
    /// Of these, so many for their files.
    pub false_files: u64,
    /// Of the clean ones, so many were captured before that was known.
    pub looked_twice: u64,
    /// Changes made by the host.
    pub outside: u64,
    /// Truths that were of another moment than their boundary.
    pub late: u64,
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
    pub inspector: &'a Inspector,
    pub broken: Option<Break>,
    /// Print clean turns that were reported as changes.
    pub show: bool,
}

/// Boundaries that are tried at the end of a turn before the truth is taken as it is.
const MOMENTS: u32 = 20;

struct Seed<'a> {
    watched: Watched<'a>,
    show: bool,
    /// Whether the host changes files too.
    outside: bool,
    truth: Truth,
    counts: Counts,
}

/// Runs the turns of one seed. The first missed change ends it.
pub fn seed(look: &Look<'_>, number: u64, turns: u64, counts: &mut Counts) -> Result<Option<Miss>> {
    let sandbox = Sandbox::start()?;
    let target = Target {
        pid_ns_inode: pid_ns_inode(sandbox.init())?,
        upper_dir: sandbox.upper(),
    };
    let slot = look.inspector.register(&target)?;
    let mut run = Seed {
        watched: Watched {
            inspector: look.inspector,
            slot,
            sandbox,
            what: look.broken,
            broken: Broken::new(look.broken),
            key: DomainKey::new([7; 32]),
            index: None,
            baseline: Baseline::default(),
            reported: Reported::default(),
        },
        show: look.show,
        // By system calls of sandboxes nothing of that is seen.
        outside: look.inspector.probes() != ProbeSet::Syscalls,
        truth: Truth::default(),
        counts: *counts,
    };
    let outcome = run.turns(number, turns);
    *counts = run.counts;
    look.inspector.unregister(slot);
    outcome
}

impl Seed<'_> {
    fn turns(&mut self, seed: u64, turns: u64) -> Result<Option<Miss>> {
        let mut script = Script::new(seed);
        // Before the first turn: everything is captured, and known.
        self.watched.boundary()?;
        self.truth = self.truth()?;
        self.watched.reported = Reported::default();
        let mut lines = Vec::new();
        // Slots that did something on their own since the last comparison; and how long ago that was.
        let (mut busy, mut since) = (false, 0);
        for number in 0..turns {
            let turn = script.turn(number + 1 == turns);
            let context = || format!("seed {seed}, turn {number}: {:?}", turn.lines);
            let outcomes = self
                .watched
                .sandbox
                .run(&turn.lines)
                .with_context(context)?;
            for (line, outcome) in turn.lines.iter().zip(&outcomes) {
                ensure!(!outcome.contains("HANG"), "seed {seed}: {line}: {outcome}");
                lines.push(format!("turn {number}: {line} => {outcome}"));
                self.counts.operations += 1;
                self.counts.done += u64::from(outcome == "ok");
            }
            busy |= of_others(&turn);
            if self.outside {
                for line in &turn.outside {
                    let done = outside::ask(&self.watched.sandbox.upper(), line)?;
                    lines.push(format!("turn {number}: outside {line} => {done}"));
                    busy |= done;
                    self.counts.outside += u64::from(done);
                }
            }
            since += 1;
            self.counts.turns += 1;
            let mut done = self.watched.boundary().with_context(context)?;
            self.counts.full_walks += u64::from(done.walked);
            if !turn.check {
                continue;
            }
            self.counts.checked += 1;
            let mut truth = self.truth()?;
            // On a busy machine something may have gone on after all; and where the host removes a directory, what is mounted there ends in every namespace.
            // Then this truth is of a later moment, and what the boundary saw is not held against it.
            for _ in 0..MOMENTS {
                let unmounted =
                    truth.mounts != self.truth.mounts && self.watched.reported.around.is_empty();
                if self.watched.rests()? && !unmounted {
                    break;
                }
                self.counts.late += 1;
                done = self.watched.boundary().with_context(context)?;
                truth = self.truth()?;
            }
            if let Some(what) = self.missed(&truth)? {
                return Ok(Some(Miss {
                    seed,
                    turn: number,
                    what,
                    lines,
                }));
            }
            if since == 1 && !busy && truth == self.truth {
                match truth.objects.is_empty() {
                    true => self.clean(seed, number, &turn, done.captured),
                    false => self.counts.unknown += 1,
                }
            }
            self.truth = truth;
            self.watched.reported = Reported::default();
            lines.clear();
            (busy, since) = (false, 0);
        }
        Ok(None)
    }

    fn truth(&self) -> Result<Truth> {
        let sandbox = &self.watched.sandbox;
        Truth::read(&sandbox.upper(), sandbox.init())
    }

    /// Counts a turn that changed nothing.
    fn clean(&mut self, seed: u64, number: u64, turn: &Turn, captured: bool) {
        let reported = &self.watched.reported;
        self.counts.clean += 1;
        self.counts.looked_twice += u64::from(captured);
        self.counts.false_positives += u64::from(reported.any());
        self.counts.false_files += u64::from(reported.files);
        if reported.any() && self.show {
            println!(
                "reported for nothing: seed {seed}, turn {number}: {reported:?}: {:?} {:?}",
                turn.kind, turn.lines
            );
        }
    }

    /// What of the truth was not reported, if anything.
    fn missed(&self, truth: &Truth) -> Result<Option<String>> {
        let (watched, before) = (&self.watched, &self.truth);
        let reported = &watched.reported;
        let Some(index) = &watched.index else {
            bail!("nothing was captured");
        };
        let (upper, options) = (watched.sandbox.upper(), CaptureOptions::default());
        let full = capture::full(&upper, &watched.key, options, Some(index), &mut NullSink)?;
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
        let files = differing(&truth.files, &before.files);
        if !files.is_empty() && !reported.files {
            return Ok(Some(format!("files, by both captures: {files:?}")));
        }
        let memory = differing(&truth.memory_files, &before.memory_files);
        if !memory.is_empty() && !reported.memory {
            return Ok(Some(format!("memory files: {memory:?}")));
        }
        let objects = differing(&truth.objects, &before.objects);
        if !objects.is_empty() && !reported.memory {
            return Ok(Some(format!("IPC objects: {objects:?}")));
        }
        let mounts = differing(&truth.mounts, &before.mounts);
        if !mounts.is_empty() && reported.around.is_empty() {
            return Ok(Some(format!("mounts: {mounts:?}")));
        }
        Ok(missed_processes(truth, before, reported))
    }
}

/// A process that was born or ended, or whose memory or state changed, has to be among those reported. What the kernel keeps for it can be changed by another, so
/// that anything that asks for a new image will do.
fn missed_processes(truth: &Truth, before: &Truth, reported: &Reported) -> Option<String> {
    for id in differing(&truth.processes, &before.processes) {
        let (pid, start): ProcessId = id;
        if reported.processes.contains(&pid) {
            continue;
        }
        let (now, was) = (truth.processes.get(&id), before.processes.get(&id));
        let (Some(now), Some(was)) = (now, was) else {
            return Some(format!("process {pid} (of {start}) came or went"));
        };
        if now.memory != was.memory {
            return Some(format!("process {pid} (of {start}): memory or state"));
        }
        if !reported.image() {
            let what = differing(&now.kernel, &was.kernel);
            return Some(format!("process {pid} (of {start}): {what:?}"));
        }
    }
    None
}

/// Whether processes other than the first were given something to do.
fn of_others(turn: &Turn) -> bool {
    turn.kind != Kind::Quiet && !turn.lines.is_empty()
}
