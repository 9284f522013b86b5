//! From a turn's boundary to its verdict, for turns that change nothing that lasts.
//!
//! A sandbox with an upper of 5,000 files and some resting processes. Three kinds of turn: nothing happens; a command only looks; a file
//! is made and removed again, so that directories have to be read before the turn is known to be clean. The time is that of what the daemon does at
//! a boundary until it knows: [`look::look`], which is the daemon's own, and where something was dirtied the capture of that.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tidepool_fs::capture::{self, CaptureOptions};
use tidepool_fs::{DirtyInode, NullSink, TreeIndex};
use tidepool_inspector::look::{self, Baseline, Changed};
use tidepool_inspector::{FileEffects, Inspector, InspectorOptions, SandboxSlot};
use tidepool_proto::DomainKey;

use crate::compare::round;
use crate::ground::Ground;
use crate::stage::Stage;
use crate::stats::quantile;
use crate::workloads::{Workload, prepare};

/// Kinds of turns, by their lines.
const KINDS: [(&str, &str); 3] = [
    ("idle", "nothing"),
    ("read_only", "look"),
    ("made_and_removed", "passing"),
];

/// Times to a verdict.
#[derive(Debug, Default)]
pub(crate) struct Verdicts {
    ms: BTreeMap<&'static str, Vec<f64>>,
    /// Turns that were not found to be clean.
    unclean: u64,
}

impl Verdicts {
    pub(crate) fn all(&self) -> Vec<f64> {
        self.ms.values().flatten().copied().collect()
    }

    pub(crate) fn json(&self) -> Value {
        let kinds: BTreeMap<&str, Value> = self
            .ms
            .iter()
            .map(|(kind, ms)| {
                let at = |part| round(quantile(ms, part));
                (*kind, json!({"turns": ms.len(), "ms_p50": at(0.5), "ms_p99": at(0.99), "ms_max": at(1.0)}))
            })
            .collect();
        json!({"kinds": kinds, "unclean": self.unclean})
    }
}

struct Watched<'a> {
    inspector: &'a Inspector,
    slot: SandboxSlot,
    init: u32,
    upper: std::path::PathBuf,
    key: DomainKey,
    seen: Baseline,
    index: TreeIndex,
}

/// Measures so many turns of each kind.
pub(crate) fn verdicts(turns: u32, processor: Option<usize>) -> Result<Verdicts> {
    let dir = Ground::make(0)?;
    let lower = dir.path().join("lower");
    std::fs::create_dir(&lower)?;
    prepare(Workload::Unpack, &lower)?;
    let mut stage = Stage::start(dir, processor)?;
    stage.run("unpack")?;
    stage.run("idle 4")?;
    let inspector = Inspector::load(&InspectorOptions::default())?;
    let slot = inspector.register(&stage.target()?)?;
    // The first turn writes what is written only once.
    stage.run("passing")?;
    inspector.take(slot)?;
    let key = DomainKey::new([7; 32]);
    let full = capture::full(
        &stage.upper(),
        &key,
        CaptureOptions::default(),
        None,
        &mut NullSink,
    )?;
    let mut watched = Watched {
        inspector: &inspector,
        slot,
        init: stage.init(),
        upper: stage.upper(),
        key,
        seen: Baseline::default(),
        index: full.index,
    };
    // The first look has nothing to compare with.
    watched.boundary()?;
    let mut found = Verdicts::default();
    for _ in 0..turns {
        for (kind, line) in KINDS {
            stage.run(line)?;
            let began = Instant::now();
            let clean = watched.boundary()?;
            let ms = began.elapsed().as_secs_f64() * 1000.0;
            found.ms.entry(kind).or_default().push(ms);
            found.unclean += u64::from(!clean);
        }
    }
    Ok(found)
}

impl Watched<'_> {
    /// Whether nothing changed.
    fn boundary(&mut self) -> Result<bool> {
        let look = look::look(self.inspector, self.slot, self.init, &self.seen)?;
        let p = &look.processes;
        let rested = (p.ran, p.born, p.exited, p.lost) == (Some(0), Some(0), Some(0), false)
            && look.memory_changed == Changed::No
            && look.differs.as_ref().is_some_and(Vec::is_empty);
        self.seen = Baseline {
            tasks: Some(look.tasks),
            memory: Some(look.memory),
            ipc: look.ipc,
            around: Some(look.around),
        };
        let FileEffects::Inodes(dirty) = look.files else {
            return Ok(false);
        };
        if dirty.is_empty() {
            return Ok(rested);
        }
        let dirty: Vec<DirtyInode> = dirty
            .iter()
            .map(|d| DirtyInode {
                ino: d.ino,
                dev: d.dev,
                generation: d.generation,
            })
            .collect();
        let captured = capture::dirty(
            &self.upper,
            &self.key,
            CaptureOptions::default(),
            &self.index,
            &dirty,
            &mut NullSink,
        )?;
        ensure!(captured.full_walk.is_none(), "everything was walked");
        let same = captured.tree == self.index.tree();
        self.index = captured.index;
        Ok(rested && same)
    }
}
