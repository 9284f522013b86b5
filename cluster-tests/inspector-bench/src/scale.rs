//! What more sandboxes cost: one that works among many that rest.

use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tidepool_inspector::{
    FileEffects, Inspector, InspectorOptions, SandboxSlot, Target, pid_ns_inode,
};

use crate::compare::round;
use crate::ground::Ground;
use crate::idle::{Idle, PROCESSES};
use crate::stage::Stage;
use crate::stats::{estimate, quantile};

/// Registered sandboxes, the one that works included.
pub(crate) const COUNTS: [u32; 4] = [1, 16, 64, 256];
/// What the working one does where its processor time is compared.
const WORK: [&str; 2] = ["writes 100000", "starts 500"];

/// The figures for one number of sandboxes.
pub(crate) fn scale(
    count: u32,
    turns: u32,
    rounds: u32,
    processor: Option<usize>,
) -> Result<Value> {
    let dir = Ground::make(0)?;
    std::fs::create_dir(dir.path().join("lower"))?;
    let mut stage = Stage::start(dir, processor)?;
    stage.run("idle 4")?;
    let idle = Idle::start(count - 1)?;

    let inspector = Inspector::load(&InspectorOptions::default())?;
    let slots = registered(&inspector, &stage, &idle)?;
    let working = slots[0];
    for slot in &slots {
        inspector.take(*slot)?;
    }
    let (mut tasks, mut takes, mut clean) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..turns {
        stage.run(&format!("change {turn}"))?;
        let began = Instant::now();
        let table = inspector.tasks(working)?;
        tasks.push(ms(began));
        ensure!(table.tasks.len() == 5, "{} tasks", table.tasks.len());
        let began = Instant::now();
        let files = inspector.take(working)?.files;
        takes.push(ms(began));
        ensure!(
            matches!(&files, FileEffects::Inodes(list) if list.len() >= 20),
            "{files:?}"
        );
        stage.run("nothing")?;
        let began = Instant::now();
        let table = inspector.tasks(working)?;
        let files = inspector.take(working)?.files;
        clean.push(ms(began));
        ensure!(table.tasks.len() == 5 && files.is_none(), "{files:?}");
    }
    slots.iter().for_each(|slot| inspector.unregister(*slot));
    stage.run("clean")?;

    let mut ratios = serde_json::Map::new();
    for line in WORK {
        let mut ratio = Vec::new();
        for round in 0..rounds {
            let mut cpu = [0.0; 2];
            // There and back, and which comes first changes.
            for half in [0, 1, 1, 0] {
                let with = (round + half) % 2;
                stage.settle()?;
                let attached = registered(&inspector, &stage, &idle)?;
                if with == 0 {
                    attached.iter().for_each(|slot| inspector.unregister(*slot));
                }
                cpu[with as usize] += stage.run(line)?.cpu_us as f64;
                attached.iter().for_each(|slot| inspector.unregister(*slot));
                stage.run("clean")?;
            }
            ratio.push(cpu[1] / cpu[0]);
        }
        let e = estimate(&ratio);
        let name = line.split(' ').next().unwrap_or_default();
        ratios.insert(
            name.into(),
            json!({"median": round(e.median), "low": round(e.low), "high": round(e.high)}),
        );
    }
    let of =
        |v: &[f64]| json!({"ms_p50": round(quantile(v, 0.5)), "ms_p99": round(quantile(v, 0.99))});
    Ok(json!({
        "sandboxes": count,
        "resting_processes": (count - 1) * PROCESSES,
        "tasks": of(&tasks),
        "take": of(&takes),
        "clean_turn": of(&clean),
        "cpu_ratio": ratios,
    }))
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// Registers them all, the one that works first.
fn registered(inspector: &Inspector, stage: &Stage, idle: &Idle) -> Result<Vec<SandboxSlot>> {
    let mut slots = vec![inspector.register(&stage.target()?)?];
    for init in &idle.inits {
        slots.push(inspector.register(&Target {
            pid_ns_inode: pid_ns_inode(*init)?,
            upper_dir: stage.upper(),
        })?);
    }
    Ok(slots)
}
