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
/// Shards of a cluster that a node for one process makes without being told how many.
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
    /// Where the other nodes reach this one, where that is not where it listens.
    pub advertise: Option<SocketAddr>,
    /// The failure domain of a new cluster's first node; a node that joins says its own then.
    pub zone: String,
    /// Shards of a cluster that this node makes; fixed from then on.
    pub shards: u32,
}

impl NodeConfig {
    /// A node for this process only: loopback, any port, 64 MiB reserve.
    pub fn embedded(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            listen: ([127, 0, 0, 1], 0).into(),
            reserve_bytes: 64 << 20,
            advertise: None,
            zone: String::new(),
            shards: DEFAULT_SHARDS,
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
    /// The failure domain that a first node was given when it made the cluster.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) zone: String,
}

impl Identity {
    /// Reads it, or makes a new cluster of this node alone.
    pub(crate) fn open(
        data: &Path,
        shards: u32,
        zone: &str,
    ) -> Result<(Self, ShardMap), StoreError> {
        let identity = match Self::read(data)? {
            Some(identity) => identity,
            None if crate::join::is_unfinished(data) => {
                return Err(StoreError::Config(format!(
                    "{} was to join a cluster and has not finished: join again",
                    data.display()
                )));
            }
            None => {
                let cluster = format!("{:032x}", rand::random::<u128>());
                Self::create(data, cluster, FIRST_NODE, shards, zone)?
            }
        };
        let map = ShardMap::new(identity.shards).filter(|_| identity.node != 0);
        let map = map.ok_or_else(|| {
            StoreError::Damaged(format!(
                "{} has impossible numbers",
                data.join(FILE).display()
            ))
        })?;
        Ok((identity, map))
    }

    /// Reads it, if there is one.
    pub(crate) fn read(data: &Path) -> Result<Option<Self>, StoreError> {
        let path = data.join(FILE);
        let identity: Self = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| StoreError::Damaged(format!("{} is damaged: {e}", path.display())))?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(StoreError::io(path, e)),
        };
        if identity.format != FORMAT {
            return Err(StoreError::Damaged(format!(
                "{} has format {}, this version reads {FORMAT}",
                path.display(),
                identity.format
            )));
        }
        Ok(Some(identity))
    }

    pub(crate) fn exists(data: &Path) -> bool {
        data.join(FILE).exists()
    }

    /// Whether this is the node that made the cluster.
    pub(crate) fn is_first(&self) -> bool {
        self.node == FIRST_NODE
    }

    /// Writes what a directory is from now on.
    pub(crate) fn create(
        data: &Path,
        cluster: String,
        node: u64,
        shards: u32,
        zone: &str,
    ) -> Result<Self, StoreError> {
        if ShardMap::new(shards).is_none() {
            return Err(StoreError::Config(format!(
                "{shards} shards are impossible"
            )));
        }
        let new = Identity {
            format: FORMAT,
            cluster,
            node,
            shards,
            zone: zone.to_owned(),
        };
        let text =
            serde_json::to_vec_pretty(&new).map_err(|e| StoreError::Config(e.to_string()))?;
        files::write_atomic(&data.join(FILE), &text, 0o600)?;
        Ok(new)
    }

    /// The node's number where there is one, else that of a first node.
    pub(crate) fn node_of(data: &Path) -> Result<u64, StoreError> {
        Ok(Self::read(data)?.map_or(FIRST_NODE, |i| i.node))
    }
}
