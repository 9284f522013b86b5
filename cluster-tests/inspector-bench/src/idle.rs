//! Many sandboxes that do nothing: pid namespaces with a few resting processes each.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Signal, set_parent_process_death_signal};

/// First argument of the binary when it is to make such sandboxes.
pub(crate) const FLAG: &str = "--tp-idle";

/// Processes of each, the first one included.
pub(crate) const PROCESSES: u32 = 3;

/// Sandboxes at rest; gone when dropped.
#[derive(Debug)]
pub(crate) struct Idle {
    child: Child,
    /// Host process ids of their first processes.
    pub(crate) inits: Vec<u32>,
}

impl Idle {
    pub(crate) fn start(count: u32) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(FLAG)
            .arg(count.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting idle sandboxes")?;
        let mut replies = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut idle = Self {
            child,
            inits: Vec::new(),
        };
        for _ in 0..count {
            let mut line = String::new();
            ensure!(replies.read_line(&mut line)? > 0, "it ended early");
            idle.inits.push(line.trim().parse()?);
        }
        Ok(idle)
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The other side.
pub(crate) fn inside(count: &str) -> ExitCode {
    match make(count) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("idle sandboxes: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn make(count: &str) -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let count: u32 = count.parse()?;
    for _ in 0..count {
        let flags = libc::CLONE_NEWPID | libc::SIGCHLD;
        // SAFETY: without a stack this is a fork; this process has one thread, so the child is a whole one.
        match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
            -1 => bail!("clone: {}", std::io::Error::last_os_error()),
            0 => {
                let _ = set_parent_process_death_signal(Some(Signal::KILL));
                for _ in 1..PROCESSES {
                    // SAFETY: as above; the children do nothing but wait.
                    if unsafe { libc::fork() } == 0 {
                        break;
                    }
                }
                loop {
                    // SAFETY: no pointers.
                    unsafe { libc::pause() };
                }
            }
            pid => println!("{pid}"),
        }
    }
    // Until the other side ends.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
