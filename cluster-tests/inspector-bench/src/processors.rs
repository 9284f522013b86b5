//! Which processor does what: workloads have one of their own, this program and what it starts besides have the others. And what all of them did meanwhile.

use std::fs;

use anyhow::{Context, Result, ensure};

/// The last of those this process may use, where there are several.
fn last() -> Result<Option<usize>> {
    let all = allowed()?;
    Ok((all.len() > 1).then(|| all[all.len() - 1]))
}

/// Leaves the last one to workloads. For this process and what it starts.
pub(crate) fn leave_one() -> Result<Option<usize>> {
    let Some(own) = last()? else {
        eprintln!("there is one processor only: workloads share it with this program");
        return Ok(None);
    };
    let mut rest = allowed()?;
    rest.retain(|cpu| *cpu != own);
    keep_to(&rest)?;
    Ok(Some(own))
}

/// From now on this process, and what it starts, runs on these only.
pub(crate) fn keep_to(cpus: &[usize]) -> Result<()> {
    // SAFETY: all zeroes are the empty set; the kernel reads it during the call.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        cpus.iter().for_each(|cpu| libc::CPU_SET(*cpu, &mut set));
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set)
    };
    ensure!(
        done == 0,
        "processors {cpus:?}: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

fn allowed() -> Result<Vec<usize>> {
    // SAFETY: the kernel fills the set, which outlives the call.
    let (done, set) = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let done = libc::sched_getaffinity(0, size_of_val(&set), &raw mut set);
        (done, set)
    };
    ensure!(done == 0, "{}", std::io::Error::last_os_error());
    let limit = usize::try_from(libc::CPU_SETSIZE)?;
    // SAFETY: below the size of the set.
    Ok((0..limit)
        .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) })
        .collect())
}

/// Milliseconds since the machine began to run, of all processors together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) busy: f64,
    /// Taken away by the machine below, where this is a virtual one.
    pub(crate) stolen: f64,
}

impl Machine {
    pub(crate) fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().context("an empty /proc/stat")?;
        let fields: Vec<f64> = line
            .split_whitespace()
            .skip(1)
            .filter_map(|f| f.parse().ok())
            .collect();
        // User, nice, system, idle, waiting, interrupts of two kinds, stolen; in hundredths.
        let of = |which: &[usize]| -> f64 {
            let some = which.iter().filter_map(|i| fields.get(*i));
            some.sum::<f64>() * 10.0
        };
        Ok(Self {
            busy: of(&[0, 1, 2, 5, 6]),
            stolen: of(&[7]),
        })
    }
}
