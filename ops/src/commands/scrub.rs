//! `tidepool scrub`: every node, or those that are named, reads and verifies what it keeps.
//!
//! A scrub is each node's own, with an account of its own; here the accounts stand side by side. A chunk without a good copy anywhere is the one thing
//! that must not be missed: the command warns and leaves with the code for corruption, whoever asked.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use tidepool_proto::ErrorKind;
use tidepool_proto::cluster::NodeState;
use tidepool_store_client::{Client, ClientError};

use crate::failure::Failure;
use crate::human;
use crate::store::{StoreArgs, failed};
use crate::ui::{Ui, flexible, left, right, table};

/// How often accounts are looked at while a scrub is waited for.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Debug, Subcommand)]
pub(crate) enum ScrubCommand {
    /// Begin a scrub; where one runs, set its pace
    Start(StartArgs),
    /// The scrub that runs on each node, or its last since it started
    Status {
        #[command(flatten)]
        store: StoreArgs,
        #[command(flatten)]
        nodes: Nodes,
    },
}

#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    nodes: Nodes,
    /// Bytes that a node reads in a second, such as 64MiB; its own pace where absent
    #[arg(long, value_name = "SIZE", value_parser = pace)]
    pace: Option<u64>,
    /// Remove bodies that nothing names where an earlier scrub saw them this long ago
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    orphan_grace: Option<Duration>,
    /// Wait until it is done
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Nodes {
    /// Only this node, by its number; may be given several times
    #[arg(long = "node", value_name = "N")]
    nodes: Vec<u64>,
}

fn pace(text: &str) -> Result<u64, String> {
    match human::parse_size(text)? {
        0 => Err("at that pace a scrub never ends".to_owned()),
        pace => Ok(pace),
    }
}

/// A node's own account.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Account {
    running: bool,
    /// Bytes a second.
    pace: u64,
    /// 0: there was none since the node started.
    started_ms: u64,
    ended_ms: u64,
    bodies: u64,
    bytes: u64,
    damaged: u64,
    repaired: u64,
    quarantined: u64,
    quarantined_names: Vec<String>,
    orphans: u64,
    orphan_bytes: u64,
    orphans_removed: u64,
    /// Why it ended early; or why there is no account.
    error: Option<String>,
}

/// A node and its account.
#[derive(Debug, Serialize)]
struct Scrub {
    node: u64,
    /// It answered.
    reachable: bool,
    #[serde(flatten)]
    account: Account,
}

pub(crate) async fn run(command: ScrubCommand, ui: Ui) -> Result<(), Failure> {
    match command {
        ScrubCommand::Start(args) => {
            let client = args.store.connect().await?;
            let nodes = args.nodes.choose(&client).await?;
            let grace = args
                .orphan_grace
                .map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
            let mut begun = Vec::with_capacity(nodes.len());
            for node in nodes {
                let answer = client
                    .scrub_start_on(node, args.pace.unwrap_or(0), grace)
                    .await;
                begun.push(read(node, answer)?);
            }
            // The account of a scrub that has just begun says nothing yet, and nothing about the one before.
            if args.wait {
                finished(&client, &mut begun).await?;
            }
            tell(&begun, ui)
        }
        ScrubCommand::Status { store, nodes } => {
            let client = store.connect().await?;
            let mut list = Vec::new();
            for node in nodes.choose(&client).await? {
                list.push(read(node, client.scrub_status_of(node).await)?);
            }
            tell(&list, ui)
        }
    }
}

impl Nodes {
    /// Those that are named, or else all there are.
    async fn choose(self, client: &Client) -> Result<Vec<u64>, Failure> {
        let known = client.topology().await.map_err(failed)?.nodes;
        let here = known
            .iter()
            .filter(|n| NodeState::of(n.state) != Some(NodeState::Removed));
        let known: Vec<u64> = here.map(|n| n.id).collect();
        if self.nodes.is_empty() {
            return Ok(known);
        }
        match self.nodes.iter().find(|n| !known.contains(n)) {
            Some(unknown) => Err(Failure::new(
                ErrorKind::NotFound,
                format!("there is no node {unknown}"),
            )),
            None => Ok(self.nodes),
        }
    }
}

/// A node that cannot be reached is part of the answer; one that refuses the request ends the command.
fn read(node: u64, answer: Result<Vec<u8>, ClientError>) -> Result<Scrub, Failure> {
    let (reachable, account) = match answer {
        Ok(bytes) => {
            let account = serde_json::from_slice(&bytes)
                .map_err(|e| Failure::failed(format!("the account of node {node}: {e}")))?;
            (true, account)
        }
        Err(e) if e.kind() == ErrorKind::Unavailable => {
            let error = Some(e.to_string());
            (
                false,
                Account {
                    error,
                    ..Account::default()
                },
            )
        }
        Err(e) => return Err(failed(e)),
    };
    Ok(Scrub {
        node,
        reachable,
        account,
    })
}

async fn finished(client: &Client, begun: &mut [Scrub]) -> Result<(), Failure> {
    while begun.iter().any(|s| s.account.running) {
        tokio::time::sleep(LOOK).await;
        for scrub in begun.iter_mut().filter(|s| s.account.running) {
            *scrub = read(scrub.node, client.scrub_status_of(scrub.node).await)?;
        }
    }
    Ok(())
}

fn tell(list: &[Scrub], ui: Ui) -> Result<(), Failure> {
    ui.result(&list, || {
        let columns = [
            right("NODE"),
            left("STATE"),
            left("STARTED"),
            right("PACE"),
            right("BODIES"),
            right("SIZE"),
            right("DAMAGED"),
            right("REPAIRED"),
            right("QUARANTINED"),
            right("ORPHANS"),
            flexible("ERROR"),
        ];
        table(&columns, list.iter().map(row).collect())
    })?;
    for scrub in list {
        for name in &scrub.account.quarantined_names {
            ui.warn(&format!(
                "node {}: no good copy of chunk {} is left",
                scrub.node,
                human::clean(name)
            ));
        }
    }
    verdict(list)
}

fn row(scrub: &Scrub) -> Vec<String> {
    let a = &scrub.account;
    let state = match a {
        _ if !scrub.reachable => "unreachable",
        a if a.running => "running",
        a if a.started_ms == 0 => "never",
        a if a.error.is_some() => "failed",
        _ => "done",
    };
    // Of a node without an account there is nothing to count.
    let known = scrub.reachable && a.started_ms != 0;
    let or = |text: String| if known { text } else { "-".to_owned() };
    vec![
        scrub.node.to_string(),
        state.to_owned(),
        or(human::time(a.started_ms)),
        or(format!("{}/s", human::size(a.pace))),
        or(a.bodies.to_string()),
        or(human::size(a.bytes)),
        or(a.damaged.to_string()),
        or(a.repaired.to_string()),
        or(a.quarantined.to_string()),
        or(a.orphans.to_string()),
        a.error.as_deref().map_or("-".to_owned(), human::clean),
    ]
}

/// How the command ends: lost data before failed scrubs before nodes that do not answer.
fn verdict(list: &[Scrub]) -> Result<(), Failure> {
    let lost: u64 = list.iter().map(|s| s.account.quarantined).sum();
    if lost > 0 {
        let chunks = human::count(lost, "chunk has", "chunks have");
        return Err(
            Failure::new(ErrorKind::Corruption, format!("{chunks} no good copy"))
                .hint("an upload of the same data heals a chunk")
                .told(),
        );
    }
    let ended = list.iter().filter(|s| s.reachable);
    if let Some(scrub) = ended.clone().find(|s| s.account.error.is_some()) {
        let why = scrub.account.error.as_deref().unwrap_or_default();
        let message = format!(
            "the scrub of node {} ended early: {}",
            scrub.node,
            human::clean(why)
        );
        return Err(Failure::failed(message).told());
    }
    let silent: Vec<String> = list
        .iter()
        .filter(|s| !s.reachable)
        .map(|s| s.node.to_string())
        .collect();
    if silent.is_empty() {
        return Ok(());
    }
    let message = format!("these nodes do not answer: {}", silent.join(", "));
    Err(match silent.len() == list.len() {
        true => Failure::unavailable(message).told(),
        false => Failure::partial(message).told(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrub(node: u64, json: &str) -> Scrub {
        read(node, Ok(json.as_bytes().to_vec())).unwrap()
    }

    fn silent(node: u64) -> Scrub {
        let e = ClientError::new(ErrorKind::Unavailable, "gone");
        read(node, Err(e)).unwrap()
    }

    #[test]
    fn a_pace_is_a_size_that_is_not_nothing() {
        assert_eq!(pace("64MiB"), Ok(64 << 20));
        assert!(pace("0").is_err() && pace("fast").is_err());
    }

    #[test]
    fn each_end_has_its_code() {
        let good = r#"{"running":false,"started_ms":1,"ended_ms":2,"bodies":3}"#;
        let lost = r#"{"started_ms":1,"ended_ms":2,"damaged":2,"quarantined":1,"quarantined_names":["aa"]}"#;
        let early = r#"{"started_ms":1,"ended_ms":2,"error":"disk"}"#;
        let code = |list: &[Scrub]| verdict(list).err().map(|f| f.exit_code());
        assert_eq!(code(&[scrub(1, good), scrub(2, "{}")]), None);
        assert_eq!(code(&[scrub(1, good), silent(2)]), Some(3));
        assert_eq!(code(&[silent(1), silent(2)]), Some(12));
        assert_eq!(code(&[silent(1), scrub(2, early)]), Some(1));
        assert_eq!(
            code(&[silent(1), scrub(2, early), scrub(3, lost)]),
            Some(13)
        );
        let refused = ClientError::new(ErrorKind::Denied, "no");
        assert!(read(1, Err(refused)).is_err() && read(1, Ok(b"x".to_vec())).is_err());
    }

    #[test]
    fn a_node_without_an_account_has_no_figures() {
        let cells = |s: &Scrub| row(s).join(" ");
        assert_eq!(cells(&scrub(1, "{}")), "1 never - - - - - - - - -");
        assert_eq!(
            cells(&silent(2)),
            format!("2 unreachable{} gone", " -".repeat(8))
        );
        let running =
            r#"{"running":true,"started_ms":1000,"pace":1048576,"bodies":2,"bytes":2048}"#;
        assert_eq!(
            cells(&scrub(3, running)),
            "3 running 1970-01-01T00:00:01Z 1.0 MiB/s 2 2.0 KiB 0 0 0 0 -"
        );
    }
}
