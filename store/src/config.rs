//! How a node runs, and what its data directory says about itself.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tidepool_store_core::ShardMap;

use crate::error::StoreError;
use crate::files;

const FILE: &str = "node.json";
const FORMAT: u32 = 1;
/// Shards of a cluster that is made without saying how many.
const DEFAULT_SHARDS: u32 = 4;
/// The number of the first node.
const FIRST_NODE: u64 = 1;

/// How a node runs.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Everything the node keeps is in here; made at the first start.
    pub data_dir: PathBuf,
    /// Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Writes are refused when the disk has less left, in bytes.
    pub reserve_bytes: u64,
}

impl NodeConfig {
    /// A node for this process only: loopback, any port, 64 MiB reserve.
    pub fn embedded(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            listen: ([127, 0, 0, 1], 0).into(),
            reserve_bytes: 64 << 20,
        }
    }
}

/// What a data directory is: written once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Identity {
    format: u32,
    /// The cluster's id, in hex.
    pub(crate) cluster: String,
    pub(crate) node: u64,
    shards: u32,
}

impl Identity {
    /// Reads it, or makes a new cluster of this node alone.
    pub(crate) fn open(data: &Path) -> Result<(Self, ShardMap), StoreError> {
        let path = data.join(FILE);
        let identity = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| StoreError::Damaged(format!("{} is damaged: {e}", path.display())))?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let new = Identity {
                    format: FORMAT,
                    cluster: format!("{:032x}", rand::random::<u128>()),
                    node: FIRST_NODE,
                    shards: DEFAULT_SHARDS,
                };
                let text = serde_json::to_vec_pretty(&new)
                    .map_err(|e| StoreError::Config(e.to_string()))?;
                files::write_atomic(&path, &text, 0o600)?;
                new
            }
            Err(e) => return Err(StoreError::io(path, e)),
        };
        if identity.format != FORMAT {
            return Err(StoreError::Damaged(format!(
                "{} has format {}, this version reads {FORMAT}",
                path.display(),
                identity.format
            )));
        }
        let map = ShardMap::new(identity.shards).filter(|_| identity.node != 0);
        let map = map.ok_or_else(|| {
            StoreError::Damaged(format!("{} has impossible numbers", path.display()))
        })?;
        Ok((identity, map))
    }
}
