//! What the kernel says about this process's own eBPF programs and maps.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use aya::programs::loaded_programs;

/// How often a program ran and how long, as far as the kernel counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Runs {
    pub(crate) count: u64,
    pub(crate) time: Duration,
}

/// Of each program of this process, by name. The kernel counts only while something asks it to (`aya::sys::enable_stats`).
pub(crate) fn programs() -> Result<BTreeMap<String, Runs>> {
    let own: BTreeSet<u64> = own("prog_id:", None)?
        .into_iter()
        .map(|(id, _)| id)
        .collect();
    let mut found = BTreeMap::new();
    for program in loaded_programs() {
        // Another process's may end between the listing and the look.
        let Ok(program) = program else { continue };
        if own.contains(&u64::from(program.id())) {
            let runs = Runs {
                count: program.run_count(),
                time: program.run_time(),
            };
            let name = program.name_as_str().unwrap_or("?").to_owned();
            found.insert(name, runs);
        }
    }
    Ok(found)
}

/// Kernel memory of all maps of this process, in bytes.
pub(crate) fn map_bytes() -> Result<u64> {
    let maps: BTreeMap<u64, u64> = own("map_id:", Some("memlock:"))?.into_iter().collect();
    Ok(maps.into_values().sum())
}

/// Resident memory of this process, in bytes.
pub(crate) fn resident() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kb = line.and_then(|l| l.trim().strip_suffix(" kB"));
    Ok(kb.context("no VmRSS")?.parse::<u64>()? * 1024)
}

/// Numbers that stand behind a key in what the kernel tells of this process's descriptors, with those behind another key.
fn own(key: &str, other: Option<&str>) -> Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        // The listing's own descriptor is gone by now.
        let Ok(text) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let number = |key: &str| -> Option<u64> {
            let line = text.lines().find_map(|l| l.strip_prefix(key))?;
            line.trim().parse().ok()
        };
        if let Some(id) = number(key) {
            found.push((id, other.and_then(number).unwrap_or(0)));
        }
    }
    Ok(found)
}
