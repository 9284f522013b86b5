//! `tidepool-store`: a store node alone.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use tidepool_store::{Node, NodeConfig, Role};
use tidepool_store_client::{Client, ClientConfig};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

const HOUR: Duration = Duration::from_secs(3600);

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
        /// The address at which other nodes and clients reach this one, where it is not the one it listens on.
        #[arg(long)]
        advertise: Option<SocketAddr>,
        /// Refuse writes when the disk has less than this many MiB left.
        #[arg(long, default_value_t = 64)]
        reserve_mib: u64,
    },
    /// Makes a new cluster of this node alone, to be started with `run`. Does nothing where that was done.
    Init {
        /// The directory of everything the node keeps.
        #[arg(long)]
        data: PathBuf,
        /// How many shards the cluster has, for ever.
        #[arg(long, default_value_t = 16)]
        shards: u32,
        /// The node's failure domain (a rack, a power supply, a zone): replicas go to different ones.
        #[arg(long, default_value = "")]
        zone: String,
    },
    /// Makes a token with which nodes join the cluster, with the authority of a running node's data directory; prints it.
    Token {
        /// The node's data directory.
        #[arg(long)]
        data: PathBuf,
        /// The address of any node of the cluster that runs.
        #[arg(long)]
        store: SocketAddr,
        /// How long it is valid, in minutes.
        #[arg(long, default_value_t = 60)]
        minutes: u64,
        /// How many nodes may join with it.
        #[arg(long, default_value_t = 1)]
        uses: u32,
    },
    /// Makes the data directory that of a new member of a cluster, and runs it. Again on the same directory: runs it.
    Join {
        /// The directory of everything the node keeps; empty or new.
        #[arg(long)]
        data: PathBuf,
        /// The token, or @ and the path of a file with it.
        #[arg(long)]
        token: String,
        /// The address to serve on. Port 0 cannot be reached again after a restart and is refused.
        #[arg(long)]
        listen: SocketAddr,
        /// The address at which other nodes and clients reach this one, where it is not the one it listens on.
        #[arg(long)]
        advertise: Option<SocketAddr>,
        /// The node's failure domain.
        #[arg(long, default_value = "")]
        zone: String,
        /// Refuse writes when the disk has less than this many MiB left.
        #[arg(long, default_value_t = 64)]
        reserve_mib: u64,
        /// Only make the directory ready; start it later with `run`.
        #[arg(long)]
        no_run: bool,
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
        #[arg(long, value_enum, default_value = "host")]
        role: RoleArg,
        /// How many days the certificate is valid.
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
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
            advertise,
            reserve_mib,
        } => runtime()?.block_on(run(NodeConfig {
            listen,
            advertise,
            reserve_bytes: reserve_mib << 20,
            ..NodeConfig::embedded(data)
        })),
        Verb::Init { data, shards, zone } => Ok(Node::init(&NodeConfig {
            shards,
            zone,
            ..NodeConfig::embedded(data)
        })?),
        Verb::Token {
            data,
            store,
            minutes,
            uses,
        } => runtime()?.block_on(async {
            let identity = Node::issue_client(&data, Role::Operator, HOUR)?;
            let client = Client::connect(ClientConfig::new(vec![store], identity)).await?;
            let ttl = Duration::from_secs(minutes * 60);
            println!("{}", client.issue_token(ttl, uses).await?);
            Ok(())
        }),
        Verb::Join {
            data,
            token,
            listen,
            advertise,
            zone,
            reserve_mib,
            no_run,
        } => {
            anyhow::ensure!(listen.port() != 0, "a member needs a fixed port");
            let token = match token.strip_prefix('@') {
                Some(path) => std::fs::read_to_string(path).with_context(|| path.to_owned())?,
                None => token,
            };
            let cfg = NodeConfig {
                listen,
                advertise,
                zone,
                reserve_bytes: reserve_mib << 20,
                ..NodeConfig::embedded(data)
            };
            runtime()?.block_on(async {
                let node = Node::join(&cfg, &token).await?;
                tracing::info!(node, "member of the cluster");
                if no_run {
                    return Ok(());
                }
                run(cfg).await
            })
        }
        Verb::IssueClient {
            data,
            out,
            role,
            days,
        } => {
            let role = match role {
                RoleArg::Host => Role::Host,
                RoleArg::Operator => Role::Operator,
            };
            Node::issue_client(&data, role, 24 * HOUR * days)?.save(&out)?;
            println!("{}", out.display());
            Ok(())
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
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
