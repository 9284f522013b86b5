//! `tidepool turn`.

use tidepool_proto::api::{SandboxInfo, TurnInfo};

use crate::cli::{TurnCommand, TurnListArgs};
use crate::client::{Client, path, query};
use crate::failure::Failure;
use crate::human;
use crate::ui::{Ui, fields, flexible, left, right, table};

/// Turns asked for at a time.
const PAGE: u64 = 500;

pub(crate) async fn run(command: TurnCommand, client: &Client, ui: Ui) -> Result<(), Failure> {
    match command {
        TurnCommand::List(args) => list(args, client, ui).await,
    }
}

async fn list(args: TurnListArgs, client: &Client, ui: Ui) -> Result<(), Failure> {
    let sandbox = &args.sandbox.sandbox;
    let (from, limit) = match args.last {
        Some(last) => {
            let info: SandboxInfo = client.get(&path(&["sandboxes", sandbox])).await?;
            ((info.turn.0 + 1).saturating_sub(last), u64::MAX)
        }
        None => (args.from, args.limit.unwrap_or(u64::MAX)),
    };
    let turns = fetch(sandbox, from, limit, client).await?;
    ui.result(&turns, || {
        if args.evidence {
            let each: Vec<String> = turns.iter().map(describe).collect();
            each.join("\n")
        } else {
            turn_table(&turns)
        }
    })
}

/// Page by page, so that no answer grows without bound.
async fn fetch(
    sandbox: &str,
    mut from: u64,
    limit: u64,
    client: &Client,
) -> Result<Vec<TurnInfo>, Failure> {
    let mut turns = Vec::new();
    loop {
        let wanted = PAGE.min(limit - turns.len() as u64);
        if wanted == 0 {
            return Ok(turns);
        }
        let pairs = [("from", from.to_string()), ("limit", wanted.to_string())];
        let page: Vec<TurnInfo> = client
            .get(&query(path(&["sandboxes", sandbox, "turns"]), &pairs))
            .await?;
        let asked = from;
        for turn in page.into_iter().take(PAGE as usize) {
            if turn.turn.0 < from {
                return Err(Failure::failed(format!(
                    "the host daemon's answer is not understood: turn {} where {from} or later was asked for",
                    turn.turn
                )));
            }
            from = turn.turn.0 + 1;
            turns.push(turn);
        }
        if from == asked {
            return Ok(turns);
        }
    }
}

fn turn_table(turns: &[TurnInfo]) -> String {
    let columns = [
        right("TURN"),
        left("VERDICT"),
        right("CAPTURED"),
        right("SENT"),
        right("FROZEN"),
        right("WAITED"),
        left("EXIT"),
        left("CHECKPOINT"),
        flexible("EVIDENCE"),
        flexible("COMMAND"),
    ];
    let row = |t: &TurnInfo| {
        vec![
            t.turn.to_string(),
            human::verdict(t.verdict).to_owned(),
            human::size(t.stats.captured_bytes),
            human::size(t.stats.sent_bytes),
            human::micros(t.stats.frozen_us),
            human::micros(t.stats.exposed_us),
            human::exit(t.status),
            t.checkpoint.short(),
            human::evidence(&t.evidence),
            human::clean(&t.command),
        ]
    };
    table(&columns, turns.iter().map(row).collect())
}

/// A turn with everything known about it.
pub(crate) fn describe(t: &TurnInfo) -> String {
    let (e, s) = (&t.evidence, &t.stats);
    let took = t.ended_ms.saturating_sub(t.started_ms).saturating_mul(1000);
    let mut rows = vec![
        ("turn", t.turn.to_string()),
        ("command", or_none(human::clean(&t.command))),
        ("exit", human::exit(t.status)),
        (
            "started",
            format!(
                "{}, took {}",
                human::time(t.started_ms),
                human::micros(took)
            ),
        ),
        ("verdict", human::verdict(t.verdict).to_owned()),
        ("paths", sample(&e.paths, e.paths_total)),
        ("processes", sample(&e.processes, e.processes_total)),
        ("reasons", sample(&e.reasons, e.reasons.len() as u64)),
        (
            "not covered",
            sample(&e.not_covered, e.not_covered.len() as u64),
        ),
        (
            "captured",
            format!(
                "{}; everything would be {}",
                human::size(s.captured_bytes),
                human::size(s.full_bytes)
            ),
        ),
        (
            "sent",
            format!(
                "{} in {}, and a record of {}",
                human::size(s.sent_bytes),
                human::count(s.sent_chunks, "chunk", "chunks"),
                human::size(t.record_bytes)
            ),
        ),
        ("frozen", human::micros(s.frozen_us)),
        ("waited", human::micros(s.exposed_us)),
        ("checkpoint", t.checkpoint.to_string()),
        ("key", or_none(human::clean(&t.key))),
    ];
    rows.retain(|(_, value)| !value.is_empty());
    fields(&rows)
}

fn or_none(text: String) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}

/// The sample and how many more there are.
fn sample(shown: &[String], total: u64) -> String {
    let mut lines: Vec<String> = shown.iter().map(|s| human::clean(s)).collect();
    let more = total.saturating_sub(shown.len() as u64);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines.join("\n")
}
