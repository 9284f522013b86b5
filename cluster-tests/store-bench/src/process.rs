//! Server processes: they end with the one who started them, whatever becomes of it, and the kernel says what they cost.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};

use anyhow::{Context, Result};
use rustix::process::{Signal, set_parent_process_death_signal};

/// What the kernel counts processor time in for user space, a second; the same on every architecture that we run on.
const TICKS: f64 = 100.0;

/// A process; killed and waited for when dropped.
pub(crate) struct Process(Child);

impl Process {
    /// To be called on the main thread: the kernel ends the process with the thread that started it.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        // SAFETY: prctl is safe between fork and exec and touches nothing of this process.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        Ok(Self(child))
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Whether it runs still.
    pub(crate) fn runs(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    fn cost(&self) -> Result<Cost> {
        let dir = format!("/proc/{}", self.0.id());
        let dir = Path::new(&dir);
        let stat = fs::read_to_string(dir.join("stat"))?;
        // The name in parentheses may have blanks in it.
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .map_or("", |(_, rest)| rest)
            .split_whitespace()
            .collect();
        let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<u64>().ok());
        let (user, system) = ticks(11).zip(ticks(12)).context("no times in stat")?;
        let io = fs::read_to_string(dir.join("io"))?;
        let written = io
            .lines()
            .find_map(|l| l.strip_prefix("write_bytes: "))
            .context("no write_bytes in io")?;
        Ok(Cost {
            cpu_s: (user + system) as f64 / TICKS,
            written: written.trim().parse()?,
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What processes have used since they started.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// Processor time, of both kinds.
    pub(crate) cpu_s: f64,
    /// Bytes that went, or are bound to go, to disk.
    pub(crate) written: u64,
}

impl Cost {
    pub(crate) fn of(processes: &[Process]) -> Result<Self> {
        let mut sum = Self::default();
        for p in processes {
            let cost = p.cost()?;
            sum.cpu_s += cost.cpu_s;
            sum.written += cost.written;
        }
        Ok(sum)
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            cpu_s: self.cpu_s - before.cpu_s,
            written: self.written - before.written,
        }
    }

    pub(crate) fn add(&mut self, more: Self) {
        self.cpu_s += more.cpu_s;
        self.written += more.written;
    }
}
