//! What a process changes of another one, which need not run for it.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::AtomicU8;

use anyhow::{Context, Result, bail, ensure};

use super::own::limit;
use crate::child::last;
use crate::script::SLOTS;

/// Where others write: at one address in all processes, which are forks of the first.
static POKED: AtomicU8 = AtomicU8::new(0);

pub(super) fn operate(pids: &[i32; SLOTS], words: &[&str]) -> Result<()> {
    let word = |i: usize| words.get(i).copied().context("too few words");
    let number = |i: usize| -> Result<u64> { Ok(word(i)?.parse()?) };
    let pid = || -> Result<i32> {
        let pid = pids.get(number(1)? as usize).copied().unwrap_or(0);
        ensure!(pid > 0, "nobody there");
        Ok(pid)
    };
    match word(0)? {
        // All have it blocked: it stays pending.
        "signal" => call(|pid| unsafe_kill(pid, libc::SIGUSR1), pid()?),
        "nice" => {
            let (who, nice) = (pid()? as u32, number(2)? as i32 % 19);
            // SAFETY: no pointers.
            let answer = unsafe { libc::setpriority(libc::PRIO_PROCESS, who, nice) };
            ensure!(answer == 0, "{}", last());
            Ok(())
        }
        "limit" => limit(pid()?, number(2)?),
        "score" => Ok(fs::write(
            format!("/proc/{}/oom_score_adj", pid()?),
            format!("{}", number(2)? % 1000),
        )?),
        "poke" => {
            let memory = fs::File::options()
                .write(true)
                .open(format!("/proc/{}/mem", pid()?))?;
            Ok(memory.write_all_at(&[number(2)? as u8], POKED.as_ptr() as u64)?)
        }
        "datagram" => {
            UnixDatagram::unbound()?.send_to(&[number(2)? as u8], word(1)?)?;
            Ok(())
        }
        "connect" => {
            let mut stream = TcpStream::connect(("127.0.0.1", 20_000 + number(1)? as u16))?;
            Ok(stream.write_all(b"hello")?)
        }
        other => bail!("no such operation on others: {other}"),
    }
}

fn call(what: impl Fn(i32) -> i32, pid: i32) -> Result<()> {
    ensure!(what(pid) == 0, "{}", last());
    Ok(())
}

fn unsafe_kill(pid: i32, signal: i32) -> i32 {
    // SAFETY: no pointers.
    unsafe { libc::kill(pid, signal) }
}
