//! What is kept about a sandbox beside its turns and manifests: in the store (so that any host can restore it) and in the sandbox's directory (so that a
//! restarted daemon knows what it runs).

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tidepool_inspector::memory::MemoryFiles;
use tidepool_proto::{DomainId, Epoch, SandboxId, TreeId};
use tidepool_sandbox::SandboxSpec;

use crate::error::{Context, HostError, Result, chain};
use crate::keys::write_synced;

/// A sandbox's record in the store, as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxRecord {
    pub name: String,
    pub image_name: String,
    pub image: TreeId,
    pub domain: DomainId,
    pub spec: SandboxSpec,
    /// Lines of gitignore syntax given when it was created.
    #[serde(default)]
    pub ignore: Vec<String>,
    /// The known agent that runs inside.
    #[serde(default)]
    pub agent: Option<String>,
    /// The key that speaks to its init is derived from the domain's key and this.
    #[serde(with = "hex::serde")]
    pub init_nonce: [u8; 32],
    pub created_ms: u64,
}

impl SandboxRecord {
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record has only text keys")
    }

    pub fn decode(id: SandboxId, bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|e| {
            HostError::new(
                tidepool_proto::ErrorKind::Corruption,
                format!("the record of sandbox {id} cannot be read: {e}"),
            )
        })
    }
}

/// What a host remembers of a sandbox it runs; `local.json` in its directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LocalRecord {
    pub id: SandboxId,
    pub epoch: Epoch,
    /// Paused because a user asked for it, not by a capture that was cut short.
    pub paused: bool,
    /// The init nonce of what runs here: after a fork it is that of the sandbox forked from.
    #[serde(with = "hex::serde")]
    pub init_nonce: [u8; 32],
    /// As it was started here, with the init program it runs: a restore of its processes needs the same.
    pub spec: SandboxSpec,
    /// Its memory-backed files when it was started anew: as long as they are these, a new start has them too. None where it was restored with processes.
    #[serde(default)]
    pub pristine: Option<MemoryFiles>,
}

/// The directory of one sandbox on this host.
#[derive(Debug, Clone)]
pub struct SandboxDir(pub PathBuf);

impl SandboxDir {
    pub fn upper(&self) -> PathBuf {
        self.0.join("upper")
    }

    pub fn work(&self) -> PathBuf {
        self.0.join("work")
    }

    pub fn merged(&self) -> PathBuf {
        self.0.join("merged")
    }

    fn local(&self) -> PathBuf {
        self.0.join("local.json")
    }

    pub fn save(&self, record: &LocalRecord) -> Result<()> {
        let json = serde_json::to_vec(record).expect("a record has only text keys");
        write_synced(&self.local(), &json, 0o600)
    }

    /// None where the directory was left unfinished.
    pub fn load(&self) -> Result<Option<LocalRecord>> {
        match std::fs::read(self.local()) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).context(format!("reading {}", self.local().display())),
        }
    }

    /// Removes the directory with all in it; immutable files too. Done where it is absent.
    pub fn remove(&self) -> Result<()> {
        remove_tree(&self.0)
    }
}

/// Removes a directory that a sandbox may have filled, immutable files included. Done where it is absent.
pub fn remove_tree(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    tidepool_fs::restore::remove_tree(path).map_err(|e| HostError::failed(chain(&e)))
}
