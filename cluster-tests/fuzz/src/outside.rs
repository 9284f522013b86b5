//! What the host does to a sandbox's upper, as a process of its own: the inspector leaves out what its own process does.
//!
//! Only what an overlay can bear: files that are in the upper are changed, and new ones made under names that the sandbox does not use.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};

/// First argument of the binary when it is to be such a process.
pub const FLAG: &str = "--tp-outside";

/// Has it done; says whether it was.
pub(crate) fn ask(upper: &Path, line: &str) -> Result<bool> {
    let status = Command::new(std::env::current_exe()?)
        .args([FLAG.as_ref(), upper.as_os_str()])
        .arg(line)
        .status()
        .context("starting a process outside")?;
    ensure!(matches!(status.code(), Some(0 | 1)), "{line}: {status}");
    Ok(status.success())
}

/// The other side.
pub fn run(upper: &Path, line: &str) -> ExitCode {
    match act(upper, line) {
        Ok(()) => ExitCode::SUCCESS,
        // No such file, mostly.
        Err(_) => ExitCode::FAILURE,
    }
}

fn act(upper: &Path, line: &str) -> Result<()> {
    let words: Vec<&str> = line.splitn(3, ' ').collect();
    let [what, number, name] = words[..] else {
        bail!("no such line")
    };
    let path = upper.join(name);
    let number: u32 = number.parse()?;
    if what == "make" {
        // In a directory that is in the upper.
        fs::symlink_metadata(path.parent().context("a parent")?)?;
        return Ok(fs::write(&path, number.to_string())?);
    }
    ensure!(fs::symlink_metadata(&path)?.is_file(), "not a file");
    match what {
        "append" => {
            let mut file = OpenOptions::new().append(true).open(&path)?;
            Ok(file.write_all(&vec![b'h'; number as usize])?)
        }
        "mode" => Ok(fs::set_permissions(
            &path,
            Permissions::from_mode(0o600 | number & 0o77),
        )?),
        "mark" => Ok(rustix::fs::setxattr(
            &path,
            "user.outside",
            &number.to_ne_bytes(),
            rustix::fs::XattrFlags::empty(),
        )?),
        _ => bail!("no such operation"),
    }
}
