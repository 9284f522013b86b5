//! The way to the store itself, for what its operators do: an address, and an identity that the cluster's authority signed.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use tidepool_proto::ErrorKind;
use tidepool_store_client::{Client, ClientConfig, ClientError, ClientIdentity};

use crate::failure::Failure;

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "The store")]
pub(crate) struct StoreArgs {
    /// A store node's address (may be given more than once)
    #[arg(
        long = "store",
        env = "TIDEPOOL_STORE",
        value_name = "IP:PORT",
        value_delimiter = ',',
        required = true
    )]
    pub(crate) store: Vec<SocketAddr>,
    /// The directory of an operator's identity (ca.pem, client.pem, client.key)
    #[arg(long, env = "TIDEPOOL_IDENTITY", value_name = "DIR")]
    pub(crate) identity: PathBuf,
}

impl StoreArgs {
    pub(crate) async fn connect(&self) -> Result<Client, Failure> {
        let identity = ClientIdentity::load(&self.identity)
            .map_err(|e| Failure::new(ErrorKind::Invalid, format!("the identity: {e}")))?;
        let cfg = ClientConfig::new(self.store.clone(), identity);
        Client::connect(cfg).await.map_err(failed)
    }
}

/// What a failed call to the store means to the user.
pub(crate) fn failed(e: ClientError) -> Failure {
    Failure::new(e.kind(), format!("store: {e}"))
}
