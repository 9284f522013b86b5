//! What a host writes down about each of its sandboxes, so that a restarted daemon knows them and a clean-up finds
//! everything, also of a sandbox whose making was cut short.
//!
//! The record is written before anything else is made and removed after everything else is gone.

use crate::config::{Layers, Network, RuntimeConfig, SandboxName};
use crate::error::{Context, Result, SandboxError};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

const MAX_RECORD: u64 = 1024 * 1024;
/// Where network namespaces are kept, so that the usual tools see them.
const NETNS_DIR: &str = "/run/netns";

/// One sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) name: SandboxName,
    pub(crate) layers: Layers,
    pub(crate) netns: PathBuf,
    pub(crate) cgroup: String,
    pub(crate) network: Network,
    pub(crate) criu_timeout: Duration,
}

impl Record {
    /// The record of a new sandbox. Names that the whole machine shares carry a part that is this host's own, because
    /// several hosts on one machine may have sandboxes of one name.
    pub(crate) fn new(
        cfg: &RuntimeConfig,
        name: &SandboxName,
        layers: &Layers,
        network: Network,
        t: Duration,
    ) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(cfg.run_dir.as_os_str().as_encoded_bytes());
        let host = hash.finalize().to_hex();
        hash.update(&[0]);
        hash.update(name.as_str().as_bytes());
        let both = hash.finalize().to_hex();
        Self {
            name: name.clone(),
            layers: layers.clone(),
            netns: Path::new(NETNS_DIR).join(format!("tp-{}", &both[..12])),
            cgroup: format!("{}/{name}-{}", cfg.cgroup_parent, &host[..8]),
            network,
            criu_timeout: t,
        }
    }
}

/// The files of a host's sandboxes below its run directory.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    run_dir: PathBuf,
}

impl Records {
    pub(crate) fn open(run_dir: &Path) -> Result<Self> {
        let this = Self {
            run_dir: run_dir.to_owned(),
        };
        for dir in [this.runc_root(), this.sandboxes()] {
            fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(this)
    }

    /// The runtime's own directory.
    pub(crate) fn runc_root(&self) -> PathBuf {
        self.run_dir.join("runc")
    }

    fn sandboxes(&self) -> PathBuf {
        self.run_dir.join("sandboxes")
    }

    /// The directory of one sandbox: its bundle and logs.
    pub(crate) fn dir(&self, name: &SandboxName) -> PathBuf {
        self.sandboxes().join(name.as_str())
    }

    /// Claims a name.
    pub(crate) fn create(&self, record: &Record) -> Result<()> {
        let dir = self.dir(&record.name);
        match fs::create_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(SandboxError::Exists(record.name.to_string()));
            }
            other => other.context(|| format!("cannot make {}", dir.display()))?,
        }
        let path = dir.join("record.json");
        let json = serde_json::to_vec(record).context(|| "cannot encode a record".into())?;
        write_whole(&path, &json)
    }

    /// Reads the record of a sandbox. A directory without a readable one is told apart from none at all.
    pub(crate) fn get(&self, name: &SandboxName) -> Result<Record> {
        let path = self.dir(name).join("record.json");
        let size = match fs::metadata(&path) {
            Ok(m) => m.len(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(SandboxError::NotFound(name.to_string()));
            }
            Err(e) => return Err(e).context(|| format!("cannot read {}", path.display())),
        };
        if size > MAX_RECORD {
            return Err(SandboxError::Invalid(format!(
                "{} is too large",
                path.display()
            )));
        }
        let bytes = fs::read(&path).context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes).context(|| format!("cannot read {}", path.display()))
    }

    /// The names of all sandboxes.
    pub(crate) fn names(&self) -> Result<Vec<SandboxName>> {
        let dir = self.sandboxes();
        let mut names = Vec::new();
        for entry in fs::read_dir(&dir).context(|| format!("cannot read {}", dir.display()))? {
            let entry = entry.context(|| format!("cannot read {}", dir.display()))?;
            names.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|n| SandboxName::new(n).ok()),
            );
        }
        names.sort();
        Ok(names)
    }

    /// Removes what is kept of a sandbox.
    pub(crate) fn remove(&self, name: &SandboxName) -> Result<()> {
        for dir in [self.runc_root().join(name.as_str()), self.dir(name)] {
            crate::mounts::remove_tree(&dir)?;
        }
        Ok(())
    }
}

/// Writes a file so that it is there whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let part = path.with_extension("part");
    let write = || -> io::Result<()> {
        let mut file = fs::File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_names_are_claimed_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let records = Records::open(dir.path()).expect("opened");
        let cfg = RuntimeConfig::new(dir.path().into(), dir.path().into());
        let name = SandboxName::new("box").expect("a name");
        let layers = Layers {
            lower: vec!["/l".into()],
            upper: "/u".into(),
            work: "/w".into(),
            merged: "/m".into(),
        };
        let record = Record::new(&cfg, &name, &layers, Network::None, Duration::from_secs(1));
        assert!(matches!(records.get(&name), Err(SandboxError::NotFound(_))));
        records.create(&record).expect("created");
        assert!(matches!(
            records.create(&record),
            Err(SandboxError::Exists(_))
        ));
        assert_eq!(records.get(&name).expect("read"), record);
        assert_eq!(records.names().expect("read"), vec![name.clone()]);
        let elsewhere = RuntimeConfig::new("/elsewhere".into(), "/elsewhere".into());
        let other = Record::new(
            &elsewhere,
            &name,
            &layers,
            Network::None,
            Duration::from_secs(1),
        );
        assert!(other.netns != record.netns && other.cgroup != record.cgroup);
        records.remove(&name).expect("removed");
        records.remove(&name).expect("removing nothing is fine");
        assert!(records.names().expect("read").is_empty());
    }
}
