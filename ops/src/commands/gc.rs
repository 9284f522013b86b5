//! `tidepool gc`.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::Value;
use tidepool_proto::{CheckpointId, ErrorKind};
use tidepool_store_client::Client;

use crate::failure::Failure;
use crate::human;
use crate::store::{StoreArgs, failed};
use crate::ui::Ui;

const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, Subcommand)]
pub(crate) enum GcCommand {
    /// Collect the chunks that no checkpoint and no image needs, and wait until that is done
    Run(RunArgs),
    /// The last collection, or the one that runs
    Status {
        #[command(flatten)]
        store: StoreArgs,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// How long to wait for uploads under way; longer ones have to pin again
    #[arg(long, default_value = "5m", value_parser = humantime::parse_duration)]
    grace: Duration,
    /// Only tell what would go
    #[arg(long)]
    dry_run: bool,
}

pub(crate) async fn run(command: GcCommand, ui: Ui) -> Result<(), Failure> {
    match command {
        GcCommand::Run(args) => {
            let client = args.store.connect().await?;
            let begun = match args.dry_run {
                true => client.gc_try(&[]).await,
                false => {
                    let grace = u64::try_from(args.grace.as_millis()).unwrap_or(u64::MAX);
                    client.gc_run(grace).await
                }
            };
            begun.map_err(failed)?;
            let report = finished(&client).await?;
            tell(&report, ui)?;
            match report["error"].as_str() {
                Some(why) => Err(Failure::new(ErrorKind::Failed, human::clean(why)).told()),
                None => Ok(()),
            }
        }
        GcCommand::Status { store } => {
            let client = store.connect().await?;
            tell(&account(&client).await?, ui)
        }
    }
}

async fn account(client: &Client) -> Result<Value, Failure> {
    let bytes = client.gc_status().await.map_err(failed)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Failure::failed(format!("the account of the collection: {e}")))
}

async fn finished(client: &Client) -> Result<Value, Failure> {
    loop {
        let report = account(client).await?;
        if report["ended_ms"].as_u64() != Some(0) {
            return Ok(report);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Bytes of what nothing would need if these checkpoints were gone.
pub(crate) async fn garbage_without(
    client: &Client,
    gone: &[CheckpointId],
) -> Result<u64, Failure> {
    client.gc_try(gone).await.map_err(failed)?;
    let report = finished(client).await?;
    match report["error"].as_str() {
        Some(why) => Err(Failure::new(ErrorKind::Failed, human::clean(why))),
        None => Ok(report["garbage_bytes"].as_u64().unwrap_or(0)),
    }
}

fn tell(report: &Value, ui: Ui) -> Result<(), Failure> {
    let number = |key: &str| report[key].as_u64().unwrap_or(0);
    ui.result(report, || {
        let phase = report["phase"].as_str().unwrap_or("unknown");
        if phase == "never" {
            return "no collection has run".to_owned();
        }
        let count = |key| human::count(number(key), "chunk", "chunks");
        format!(
            "round {} is {phase}: {} ({}) not needed, {} ({}) swept; marked from {}",
            number("round"),
            count("garbage"),
            human::size(number("garbage_bytes")),
            count("swept"),
            human::size(number("swept_bytes")),
            human::count(number("roots"), "root", "roots"),
        )
    })
}
