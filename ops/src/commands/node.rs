//! `tidepool node`: the nodes of the store cluster. It talks to the store itself, with an operator's certificate.

use std::time::Duration;

use serde::Serialize;
use tidepool_proto::cluster::NodeState;
use tidepool_store_client::{Client, ClientConfig, ClientError, ClientIdentity, NodeStatus};

use crate::cli::{NodeArgs, NodeCommand, StoreArgs};
use crate::failure::Failure;
use crate::human;
use crate::ui::{Ui, flexible, left, right, table};

/// A node, as `--json` shows it.
#[derive(Debug, Serialize)]
struct NodeInfo {
    id: u64,
    addr: String,
    zone: String,
    state: &'static str,
    /// It answered just now.
    reachable: bool,
    /// Groups it has a replica of, and those of them it leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    replicas: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    leads: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    corruptions: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Token {
    token: String,
    minutes: u64,
    uses: u32,
}

#[derive(Debug, Serialize)]
struct Changed {
    id: u64,
    state: &'static str,
}

impl From<ClientError> for Failure {
    fn from(e: ClientError) -> Self {
        Failure::new(e.kind(), e.to_string())
    }
}

pub(crate) async fn run(args: NodeArgs, ui: Ui) -> Result<(), Failure> {
    let client = connect(&args.store).await?;
    match args.command {
        NodeCommand::List => list(&client, ui).await,
        NodeCommand::Join { minutes, uses } => join(&client, ui, minutes, uses).await,
        NodeCommand::Drain { node, undo } => {
            let state = if undo {
                NodeState::Active
            } else {
                NodeState::Draining
            };
            change(&client, ui, node, state, false).await
        }
        NodeCommand::Remove { node, dead } => {
            change(&client, ui, node, NodeState::Removed, dead).await
        }
    }
}

/// Connects to the store with the certificate that was given.
async fn connect(args: &StoreArgs) -> Result<Client, Failure> {
    let identity = ClientIdentity::load(&args.identity).map_err(|e| {
        Failure::usage(format!("cannot read the certificate: {e}")).hint(
            "make one on a node: tidepool-store issue-client --role operator --data DIR --out DIR",
        )
    })?;
    Ok(Client::connect(ClientConfig::new(args.store.clone(), identity)).await?)
}

async fn list(client: &Client, ui: Ui) -> Result<(), Failure> {
    let nodes: Vec<NodeInfo> = client.nodes().await?.into_iter().map(info).collect();
    ui.result(&nodes, || {
        let columns = [
            right("NODE"),
            flexible("ADDRESS"),
            left("ZONE"),
            left("STATE"),
            right("REPLICAS"),
            right("LEADS"),
            right("CHUNKS"),
            right("SIZE"),
            right("FREE"),
            left("ANSWER"),
        ];
        let or = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let row = |n: &NodeInfo| {
            vec![
                n.id.to_string(),
                human::clean(&n.addr),
                if n.zone.is_empty() {
                    "-".to_owned()
                } else {
                    human::clean(&n.zone)
                },
                n.state.to_owned(),
                or(n.replicas.map(|r| r.to_string())),
                or(n.leads.map(|l| l.to_string())),
                or(n.chunks.map(|c| c.to_string())),
                or(n.chunk_bytes.map(human::size)),
                or(n.free_bytes.map(human::size)),
                match (&n.error, n.full, n.corruptions) {
                    (Some(e), ..) => human::clean(e),
                    (None, Some(true), _) => "full".to_owned(),
                    (None, _, Some(c)) if c > 0 => human::count(c, "damage", "damages"),
                    _ => "ok".to_owned(),
                },
            ]
        };
        table(&columns, nodes.iter().map(row).collect())
    })
}

fn info(node: NodeStatus) -> NodeInfo {
    let mut info = NodeInfo {
        id: node.id,
        addr: node.addr,
        zone: node.zone,
        state: node.state.name(),
        reachable: node.answer.is_ok(),
        replicas: None,
        leads: None,
        chunks: None,
        chunk_bytes: None,
        free_bytes: None,
        full: None,
        corruptions: None,
        error: None,
    };
    match node.answer {
        Ok((status, topology)) => {
            let here = topology.groups.iter().filter(|g| g.here);
            let led = here.clone().filter(|g| g.leader == node.id);
            info.replicas = Some(here.count());
            info.leads = Some(led.count());
            info.chunks = Some(status.chunks);
            info.chunk_bytes = Some(status.chunk_bytes);
            info.free_bytes = Some(status.free_bytes);
            info.full = Some(status.full);
            info.corruptions = Some(status.corruptions);
        }
        Err(e) => info.error = Some(e.to_string()),
    }
    info
}

async fn join(client: &Client, ui: Ui, minutes: u64, uses: u32) -> Result<(), Failure> {
    let ttl = Duration::from_secs(minutes * 60);
    let token = client.issue_token(ttl, uses).await?;
    ui.note("on the new node: tidepool-store join --data DIR --listen ADDRESS --token TOKEN");
    let result = Token {
        token,
        minutes,
        uses,
    };
    ui.result(&result, || result.token.clone())
}

async fn change(
    client: &Client,
    ui: Ui,
    node: u64,
    state: NodeState,
    dead: bool,
) -> Result<(), Failure> {
    client.change_node(node, state, dead).await?;
    let changed = Changed {
        id: node,
        state: state.name(),
    };
    ui.result(&changed, || format!("node {node} is {}", state.name()))
}
