//! Why a node could not start, or had to stop.

use std::io;
use std::path::PathBuf;

/// A node's failure as a whole; failures of single requests are answers.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// RocksDB refused: a damaged log or table, a second process on the same directory, a full or failing disk.
    #[error("database {path}: {source}")]
    Database {
        path: PathBuf,
        #[source]
        source: rocksdb::Error,
    },
    /// What is stored does not fit together.
    #[error("{0}")]
    Damaged(String),
    #[error("certificates: {0}")]
    Pki(String),
    #[error("network: {0}")]
    Network(String),
    #[error("configuration: {0}")]
    Config(String),
    /// The node stopped by itself after a write failed.
    #[error("the node stopped: {0}")]
    Stopped(String),
}

impl StoreError {
    pub(crate) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        StoreError::Io {
            path: path.into(),
            source,
        }
    }
}

impl From<tidepool_store_raft::CoreError> for StoreError {
    fn from(e: tidepool_store_raft::CoreError) -> Self {
        use tidepool_store_raft::{CoreError, DiskError};
        match e {
            CoreError::Disk(DiskError::Corruption(_)) | CoreError::Damaged { .. } => {
                StoreError::Damaged(e.to_string())
            }
            CoreError::Disk(_) | CoreError::Raft { .. } => StoreError::Stopped(e.to_string()),
        }
    }
}
