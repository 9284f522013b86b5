//! `tidepool-store`: a store node alone.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use tidepool_store::{Node, NodeConfig, Role};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// A Tidepool store node: keeps chunks, checkpoints and turns, durable and verified.
#[derive(Parser)]
#[command(name = "tidepool-store", version)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Runs a node until SIGTERM or SIGINT. Makes a new cluster of this node alone at the first start.
    Run {
        /// The directory of everything the node keeps.
        #[arg(long)]
        data: PathBuf,
        /// The address to serve on; port 0 takes a free one, which is written to the log.
        #[arg(long, default_value = "127.0.0.1:7480")]
        listen: SocketAddr,
        /// Refuse writes when the disk has less than this many MiB left.
        #[arg(long, default_value_t = 64)]
        reserve_mib: u64,
    },
    /// Makes the data directory ready: certificates, database. Does nothing where that was done.
    Init {
        /// The directory of everything the node keeps.
        #[arg(long)]
        data: PathBuf,
    },
    /// Signs a client certificate and writes ca.pem, client.pem and client.key.
    IssueClient {
        /// The node's data directory.
        #[arg(long)]
        data: PathBuf,
        /// Where the three files go.
        #[arg(long)]
        out: PathBuf,
        /// What the client is.
        #[arg(long, value_enum, default_value = "operator")]
        role: RoleArg,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum RoleArg {
    Host,
    Operator,
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match execute(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Verb::Run {
            data,
            listen,
            reserve_mib,
        } => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()
                .context("starting the runtime")?;
            runtime.block_on(run(NodeConfig {
                data_dir: data,
                listen,
                reserve_bytes: reserve_mib << 20,
            }))
        }
        Verb::Init { data } => Ok(Node::init(&data)?),
        Verb::IssueClient { data, out, role } => {
            let role = match role {
                RoleArg::Host => Role::Host,
                RoleArg::Operator => Role::Operator,
            };
            Node::issue_client(&data, role)?.save(&out)?;
            println!("{}", out.display());
            Ok(())
        }
    }
}

async fn run(cfg: NodeConfig) -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("waiting for SIGINT")?;
    let node = Node::start(cfg).await?;
    // For whoever started it with port 0.
    println!("listening on {}", node.local_addr());
    tokio::select! {
        _ = term.recv() => tracing::info!("SIGTERM: stopping"),
        _ = int.recv() => tracing::info!("SIGINT: stopping"),
        why = node.failed() => {
            node.shutdown().await;
            return Err(why.into());
        }
    }
    node.shutdown().await;
    Ok(())
}
