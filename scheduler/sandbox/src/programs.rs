//! The programs a host needs: the init it hands out, the OCI runtime and CRIU.

use crate::INIT_BINARY;
use crate::command;
use crate::error::{Context, Result};
use crate::record::write_whole;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::process::Command;

pub(crate) fn init_file(state_dir: &Path, digest: &str) -> PathBuf {
    state_dir.join("init").join(digest).join("tidepool-init")
}

/// Puts the init program where sandboxes mount it from. Older ones stay: checkpoints were made with them.
pub(crate) fn write_init(state_dir: &Path, digest: &str) -> Result<()> {
    let path = init_file(state_dir, digest);
    if fs::read(&path).is_ok_and(|b| b == INIT_BINARY) {
        return Ok(());
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).context(|| format!("cannot make {}", dir.display()))?;
    }
    write_whole(&path, INIT_BINARY)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o555))
        .context(|| format!("{}", path.display()))
}

/// The first version number a program tells.
pub(crate) async fn version(program: &Path) -> std::result::Result<String, String> {
    let mut command = Command::new(program);
    command.arg("--version");
    let out = command::run_ok(
        "asking for a version",
        &mut command,
        Duration::from_secs(20),
    )
    .await;
    let out = out.map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&out).into_owned();
    let number = text
        .split_whitespace()
        .find(|w| w.starts_with(|c: char| c.is_ascii_digit()));
    number
        .map(str::to_owned)
        .ok_or_else(|| format!("it tells no version: {}", text.trim()))
}

pub(crate) fn recent_criu(version: &str) -> bool {
    let number = |s: Option<&str>| s.and_then(|s| s.parse::<u32>().ok()).unwrap_or(0);
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    (
        number(parts.next()),
        number(parts.next()),
        number(parts.next()),
    ) >= (4, 2, 1)
}

pub(crate) fn too_old(version: &str) -> String {
    format!(
        "version {version} is older than 4.2.1, the first that can checkpoint containers with TCP sockets here"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_versions_of_criu_are_told_from_new_ones() {
        for good in ["4.2.1", "4.3", "5", "10.0"] {
            assert!(recent_criu(good), "{good}");
        }
        for bad in ["4.2", "3.17.1", "4.1.9", "", "x"] {
            assert!(!recent_criu(bad), "{bad}");
        }
    }
}
