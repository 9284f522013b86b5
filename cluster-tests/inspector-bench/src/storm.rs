//! A storm of events: far more inodes dirtied in one turn than the inspector keeps. It has to say "everything", and stay small and quick.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tidepool_inspector::{FileEffects, Inspector, InspectorOptions};

use crate::compare::round;
use crate::ground::Ground;
use crate::kernel;
use crate::stage::Stage;

/// How often the inspector is pumped, where it is.
const PUMP: Duration = Duration::from_millis(50);

/// So many files made in one turn, with or without pumping meanwhile.
pub(crate) fn storm(inodes: u64, pumped: bool, processor: Option<usize>) -> Result<Value> {
    let dir = Ground::make(inodes)?;
    std::fs::create_dir(dir.path().join("lower"))?;
    let mut stage = Stage::start(dir, processor)?;
    let inspector = Inspector::load(&InspectorOptions::default())?;
    let slot = inspector.register(&stage.target()?)?;
    inspector.take(slot)?;
    let (resident, maps) = (kernel::resident()?, kernel::map_bytes()?);

    let stop = AtomicBool::new(false);
    let (usage, slowest) = std::thread::scope(|scope| -> Result<_> {
        let pump = scope.spawn(|| -> Result<f64> {
            let mut slowest = 0.0f64;
            while pumped && !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                inspector.pump()?;
                slowest = slowest.max(began.elapsed().as_secs_f64() * 1000.0);
                std::thread::sleep(PUMP);
            }
            Ok(slowest)
        });
        let usage = stage.run(&format!("storm {inodes}"));
        stop.store(true, Ordering::Relaxed);
        let slowest = pump
            .join()
            .map_err(|_| anyhow::anyhow!("the pump failed"))?;
        Ok((usage?, slowest?))
    })?;
    let (resident_after, maps_after) = (kernel::resident()?, kernel::map_bytes()?);
    let began = Instant::now();
    let files = inspector.take(slot)?.files;
    let take_ms = began.elapsed().as_secs_f64() * 1000.0;
    let FileEffects::Everything { reason } = files else {
        anyhow::bail!("{inodes} inodes did not overflow");
    };

    // Afterwards it is as exact as before.
    stage.run("change 1")?;
    let began = Instant::now();
    let files = inspector.take(slot)?.files;
    let next_ms = began.elapsed().as_secs_f64() * 1000.0;
    ensure!(
        matches!(&files, FileEffects::Inodes(list) if (20..100).contains(&list.len())),
        "after the storm: {files:?}"
    );
    Ok(json!({
        "inodes": inodes,
        "pumped": pumped,
        "answer": reason,
        "storm_cpu_s": round(usage.cpu_us as f64 / 1e6),
        "take_ms": round(take_ms),
        "slowest_pump_ms": round(slowest),
        "take_after_ms": round(next_ms),
        "process_grew_bytes": resident_after.saturating_sub(resident),
        "kernel_maps_bytes": maps_after,
        "kernel_maps_grew_bytes": maps_after.saturating_sub(maps),
    }))
}
