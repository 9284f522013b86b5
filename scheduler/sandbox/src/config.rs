//! What a sandbox is asked to be. Everything is checked here, once, before it reaches a mount or a runtime.

use crate::error::{Result, SandboxError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

const MAX_ENV_BYTES: usize = 32 * 1024;
const MAX_ENV: usize = 1024;
const MAX_MOUNTS: usize = 64;
const MAX_TEXT: usize = 1024;
const MAX_LOWER: usize = 64;

fn invalid<T>(why: impl Into<String>) -> Result<T> {
    Err(SandboxError::Invalid(why.into()))
}

/// Where the programs and directories of a host's sandboxes are.
#[derive(Debug, Clone)]
pub struct RuntimeConfig {
    /// The OCI runtime, `runc` or compatible.
    pub runc: PathBuf,
    /// CRIU 4.2.1 or newer.
    pub criu: PathBuf,
    /// Where this host keeps what describes its running sandboxes. One per host daemon; may be lost with a reboot.
    pub run_dir: PathBuf,
    /// Where this host keeps what outlives reboots: the init programs.
    pub state_dir: PathBuf,
    /// The cgroup under which sandboxes get theirs.
    pub cgroup_parent: String,
}

impl RuntimeConfig {
    /// The usual programs, with `TIDEPOOL_CRIU` or the private installation of CRIU before the system's.
    pub fn new(run_dir: PathBuf, state_dir: PathBuf) -> Self {
        let private =
            std::env::var_os("HOME").map(|h| Path::new(&h).join(".cache/tidepool/criu/criu"));
        let criu = std::env::var_os("TIDEPOOL_CRIU")
            .map(PathBuf::from)
            .or_else(|| private.filter(|p| p.exists()))
            .unwrap_or_else(|| "criu".into());
        Self {
            runc: "runc".into(),
            criu,
            run_dir,
            state_dir,
            cgroup_parent: "tidepool".into(),
        }
    }
}

/// The name of a sandbox: 1 to 63 of `a-z`, `0-9`, `-`, `_` and `.`, starting with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxName(String);

impl SandboxName {
    /// Checks a name.
    pub fn new(name: &str) -> Result<Self> {
        let mut bytes = name.bytes();
        let first = bytes
            .next()
            .is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let rest =
            bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b));
        if first && rest && name.len() <= 63 {
            return Ok(Self(name.to_owned()));
        }
        invalid(format!(
            "{name:?} is no sandbox name: 1 to 63 of a-z, 0-9, '-', '_' and '.', starting with a letter or digit"
        ))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SandboxName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for SandboxName {
    type Error = SandboxError;
    fn try_from(name: String) -> Result<Self> {
        Self::new(&name)
    }
}

impl From<SandboxName> for String {
    fn from(name: SandboxName) -> Self {
        name.0
    }
}

/// What a sandbox may reach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Its own loopback only.
    #[default]
    None,
    /// The outside through the host's address.
    Nat,
}

/// A directory or file of the host inside a sandbox. Checkpoints do not cover it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMount {
    /// The path on the host, absolute.
    pub source: PathBuf,
    /// The path inside, absolute.
    pub target: PathBuf,
    /// Whether the sandbox may only read it.
    pub read_only: bool,
}

/// What a sandbox is. The same value must be given again to restore it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxSpec {
    /// The host name inside; the sandbox's own name where empty.
    pub hostname: String,
    /// Variables of every job, as `NAME=value`.
    pub env: Vec<String>,
    /// Where jobs start; `/` where empty.
    pub cwd: String,
    /// Who jobs run as: `name`, `uid`, either with `:group`; root where empty.
    pub user: String,
    /// The most memory in bytes.
    pub memory_bytes: Option<u64>,
    /// The most processes and threads.
    pub pids: Option<u32>,
    /// What it may reach.
    pub network: Network,
    /// What of the host it sees.
    pub mounts: Vec<HostMount>,
    /// How long CRIU may take, in seconds; 120 where absent.
    pub criu_timeout_s: Option<u64>,
    /// The digest of the init program it was created with ([`crate::Runtime::init_digest`]); this host's own where absent.
    /// A restore needs the very same program.
    pub init: Option<String>,
}

impl SandboxSpec {
    /// How long CRIU may take.
    pub fn criu_timeout(&self) -> Duration {
        Duration::from_secs(self.criu_timeout_s.unwrap_or(120).clamp(1, 3600))
    }

    /// Checks every bound.
    pub fn validate(&self) -> Result<()> {
        let host_ok = |h: &str| {
            h.len() <= 63
                && h.bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        if !host_ok(&self.hostname) {
            return invalid(format!("{:?} is no host name", self.hostname));
        }
        if self.env.len() > MAX_ENV
            || self.env.iter().map(|v| v.len() + 4).sum::<usize>() > MAX_ENV_BYTES
        {
            return invalid(
                "too many or too long environment variables: 1024 with 32 KiB in all are allowed",
            );
        }
        for var in &self.env {
            let named = var
                .split_once('=')
                .is_some_and(|(name, _)| !name.is_empty());
            if !named || var.contains('\0') {
                return invalid(format!("{var:?} is not of the form NAME=value"));
            }
        }
        if !self.cwd.is_empty() && !inside_path(Path::new(&self.cwd)) {
            return invalid(format!(
                "the working directory {:?} is not an absolute path",
                self.cwd
            ));
        }
        if self.user.len() > MAX_TEXT || self.user.contains('\0') {
            return invalid("the user's name is too long");
        }
        if self.memory_bytes.is_some_and(|m| m < 16 * 1024 * 1024) {
            return invalid("a sandbox needs at least 16 MiB of memory");
        }
        if self.pids.is_some_and(|p| p < 4) {
            return invalid("a sandbox needs room for at least 4 processes");
        }
        if self.mounts.len() > MAX_MOUNTS {
            return invalid(format!("more than {MAX_MOUNTS} host mounts"));
        }
        for m in &self.mounts {
            if !inside_path(&m.source) || !inside_path(&m.target) {
                return invalid(format!(
                    "a host mount needs plain absolute paths, not {m:?}"
                ));
            }
            let reserved = ["/", "/proc", "/sys", "/dev", "/.tidepool"];
            if reserved
                .iter()
                .any(|r| m.target == Path::new(r) || (*r != "/" && m.target.starts_with(r)))
            {
                return invalid(format!(
                    "nothing of the host can be mounted at {}",
                    m.target.display()
                ));
            }
        }
        if self
            .init
            .as_ref()
            .is_some_and(|d| d.len() != 64 || !d.bytes().all(|b| b.is_ascii_hexdigit()))
        {
            return invalid("the init program's digest is not 64 hexadecimal digits");
        }
        Ok(())
    }
}

/// Whether a path is absolute, bounded, and goes straight down.
fn inside_path(path: &Path) -> bool {
    let plain = |c: Component<'_>| matches!(c, Component::RootDir | Component::Normal(_));
    let text = path.as_os_str().as_encoded_bytes();
    path.is_absolute()
        && path.components().all(plain)
        && text.len() <= MAX_TEXT
        && !text.contains(&0)
}

/// The directories that make a sandbox's root. `upper` and `work` must be on one filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers {
    /// Read-only layers, the topmost first.
    pub lower: Vec<PathBuf>,
    /// The sandbox's own changes.
    pub upper: PathBuf,
    /// Overlayfs's scratch space.
    pub work: PathBuf,
    /// Where the result is mounted.
    pub merged: PathBuf,
}

impl Layers {
    /// Checks that every path can be told to overlayfs.
    pub fn validate(&self) -> Result<()> {
        if self.lower.is_empty() || self.lower.len() > MAX_LOWER {
            return invalid(format!("a sandbox needs 1 to {MAX_LOWER} lower layers"));
        }
        for path in self
            .lower
            .iter()
            .chain([&self.upper, &self.work, &self.merged])
        {
            let text = path.as_os_str().as_encoded_bytes();
            if !inside_path(path) || text.iter().any(|b| b":,\\\n\"".contains(b)) {
                return invalid(format!(
                    "{} cannot be a layer: layers have plain absolute paths without ':', ',', '\\' and quotes",
                    path.display()
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded() {
        for good in ["a", "0", "a-b_c.d", &"x".repeat(63)] {
            assert!(SandboxName::new(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            ".a",
            "A",
            "a/b",
            "a b",
            "a\0",
            "..",
            &"x".repeat(64),
        ] {
            assert!(SandboxName::new(bad).is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<SandboxName>("\"../x\"").is_err());
    }

    #[test]
    fn specs_are_bounded() {
        let good = SandboxSpec {
            env: vec!["A=b=c".into()],
            cwd: "/tmp".into(),
            ..SandboxSpec::default()
        };
        assert!(good.validate().is_ok());
        let mount = |source: &str, target: &str| SandboxSpec {
            mounts: vec![HostMount {
                source: source.into(),
                target: target.into(),
                read_only: true,
            }],
            ..SandboxSpec::default()
        };
        assert!(mount("/data", "/mnt/data").validate().is_ok());
        let bad = [
            SandboxSpec {
                hostname: "a b".into(),
                ..SandboxSpec::default()
            },
            SandboxSpec {
                env: vec!["=x".into()],
                ..SandboxSpec::default()
            },
            SandboxSpec {
                env: vec!["A=\0".into()],
                ..SandboxSpec::default()
            },
            SandboxSpec {
                env: vec![format!("A={}", "x".repeat(40_000))],
                ..SandboxSpec::default()
            },
            SandboxSpec {
                cwd: "tmp".into(),
                ..SandboxSpec::default()
            },
            SandboxSpec {
                cwd: "/tmp/../..".into(),
                ..SandboxSpec::default()
            },
            SandboxSpec {
                memory_bytes: Some(1),
                ..SandboxSpec::default()
            },
            SandboxSpec {
                init: Some("../../x".into()),
                ..SandboxSpec::default()
            },
            mount("data", "/mnt"),
            mount("/data", "/"),
            mount("/data", "/proc/1"),
            mount("/data", "/.tidepool/init"),
        ];
        for spec in bad {
            assert!(spec.validate().is_err(), "{spec:?}");
        }
    }

    #[test]
    fn layers_that_overlayfs_would_misread_are_refused() {
        let layers = |upper: &str| Layers {
            lower: vec!["/l".into()],
            upper: upper.into(),
            work: "/w".into(),
            merged: "/m".into(),
        };
        assert!(layers("/u").validate().is_ok());
        for bad in ["u", "/u:v", "/u,lowerdir=/", "/u\\", "/u/../v"] {
            assert!(layers(bad).validate().is_err(), "{bad}");
        }
    }
}
