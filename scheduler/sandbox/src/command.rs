//! Running other programs: never without a time limit, never as a shell line, and killed with all they started.

use crate::error::{Context, Result, SandboxError};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// How much of a program's output is kept.
const KEPT: usize = 64 * 1024;

/// What a program said and how it ended.
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// The last `max` bytes as text, from the start of a line where possible.
pub(crate) fn tail(bytes: &[u8], max: usize) -> String {
    let from = bytes.len().saturating_sub(max);
    let mut text = &bytes[from..];
    if from > 0
        && let Some(line) = text.iter().position(|b| *b == b'\n')
    {
        text = &text[line + 1..];
    }
    String::from_utf8_lossy(text).trim().to_owned()
}

async fn collect(from: Option<impl AsyncReadExt + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut buffer = [0; 8192];
    let Some(mut from) = from else { return kept };
    while let Ok(n) = from.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        kept.extend_from_slice(&buffer[..n]);
        if kept.len() > 2 * KEPT {
            kept.drain(..kept.len() - KEPT);
        }
    }
    kept
}

/// Kills a process group when it is dropped, unless told that the group is gone.
struct Group(Option<i32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // SAFETY: no pointers. The group's leader is our child and not yet reaped, so the number is still its own.
            unsafe { libc::kill(-pid, libc::SIGKILL) };
        }
    }
}

/// Runs a program to its end. Its streams must have been set where the program's children may outlive it: pipes are read
/// to their end.
pub(crate) async fn run(what: &str, command: &mut Command, limit: Duration) -> Result<Output> {
    command.process_group(0).kill_on_drop(true);
    let mut child = command
        .spawn()
        .context(|| format!("{what}: cannot run {:?}", command.as_std().get_program()))?;
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let all = async { tokio::join!(collect(stdout), collect(stderr), child.wait()) };
    let (stdout, stderr, status) = match tokio::time::timeout(limit, all).await {
        Ok((stdout, stderr, status)) => (stdout, stderr, status.context(|| what.to_owned())?),
        Err(_) => {
            drop(group);
            let _ = tokio::time::timeout(Duration::from_secs(5), child.wait()).await;
            return Err(SandboxError::TimedOut {
                what: what.to_owned(),
                after: limit,
            });
        }
    };
    group.0 = None;
    Ok(Output {
        status,
        stdout,
        stderr,
    })
}

/// Runs a program whose output matters, and fails if it does.
pub(crate) async fn run_ok(what: &str, command: &mut Command, limit: Duration) -> Result<Vec<u8>> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = run(what, command, limit).await?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(SandboxError::Command {
        what: what.to_owned(),
        status: output.status.to_string(),
        stderr: tail(&output.stderr, 2000),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_that_takes_too_long_is_killed_with_its_children() {
        let dir = tempfile::tempdir().expect("a directory");
        let pid_file = dir.path().join("pid");
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg("sleep 1000 & echo $! > \"$0\"; wait")
            .arg(&pid_file);
        command.stdout(Stdio::null());
        let result = run("a test", &mut command, Duration::from_millis(500)).await;
        assert!(matches!(result, Err(SandboxError::TimedOut { .. })));
        let pid = std::fs::read_to_string(&pid_file).expect("the child's number");
        let stat = format!("/proc/{}/stat", pid.trim());
        for _ in 0..500 {
            match std::fs::read_to_string(&stat) {
                Ok(s) if !s.contains(") Z ") => tokio::time::sleep(Duration::from_millis(10)).await,
                _ => return,
            }
        }
        panic!("the child lives on");
    }

    #[tokio::test]
    async fn failures_carry_what_the_program_said() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo broken >&2; exit 3"]);
        let e = run_ok("a test", &mut command, Duration::from_secs(10))
            .await
            .expect_err("it failed");
        assert!(
            e.to_string().contains("broken") && e.to_string().contains('3'),
            "{e}"
        );
    }

    #[test]
    fn tails_start_with_a_whole_line() {
        assert_eq!(tail(b"one\ntwo\nthree\n", 8), "three");
        assert_eq!(tail(b"one\n", 100), "one");
    }
}
