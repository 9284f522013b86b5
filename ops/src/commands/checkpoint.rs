//! `tidepool checkpoint`.

use tidepool_proto::api::{ChangeKind, CheckpointDiff, CheckpointInfo, PathChange, TurnInfo};

use crate::cli::CheckpointCommand;
use crate::client::{Client, path, query};
use crate::commands::NOTHING;
use crate::failure::Failure;
use crate::human;
use crate::ui::{Ui, fields, flexible, left, right, table};

pub(crate) async fn run(
    command: CheckpointCommand,
    client: &Client,
    ui: Ui,
) -> Result<(), Failure> {
    match command {
        CheckpointCommand::Create { sandbox } => {
            let path = path(&["sandboxes", &sandbox.sandbox, "checkpoints"]);
            let turn: TurnInfo = client.events(&path, NOTHING).await?;
            ui.result(&turn, || {
                format!(
                    "checkpoint {} at turn {}: {}; captured {}, sent {}",
                    turn.checkpoint.short(),
                    turn.turn,
                    human::verdict(turn.verdict),
                    human::size(turn.stats.captured_bytes),
                    human::size(turn.stats.sent_bytes),
                )
            })
        }
        CheckpointCommand::List { sandbox } => {
            let path = path(&["sandboxes", &sandbox.sandbox, "checkpoints"]);
            let all: Vec<CheckpointInfo> = client.get(&path).await?;
            ui.result(&all, || list(&all))
        }
        CheckpointCommand::Show {
            sandbox,
            checkpoint,
        } => {
            let path = path(&["sandboxes", &sandbox.sandbox, "checkpoints", &checkpoint]);
            let info: CheckpointInfo = client.get(&path).await?;
            ui.result(&info, || describe(&info))
        }
        CheckpointCommand::Diff { sandbox, from, to } => {
            let diff = diff(&sandbox.sandbox, &from, to.as_deref(), client).await?;
            ui.result(&diff, || diff_table(&diff.paths))?;
            if diff.processes_differ {
                ui.note("the processes differ too");
            }
            if diff.truncated {
                ui.warn("more paths differ than are listed");
            }
            Ok(())
        }
    }
}

/// Asks what differs between two checkpoints.
pub(crate) async fn diff(
    sandbox: &str,
    from: &str,
    to: Option<&str>,
    client: &Client,
) -> Result<CheckpointDiff, Failure> {
    let mut pairs = vec![("from", from.to_owned())];
    pairs.extend(to.map(|to| ("to", to.to_owned())));
    client
        .get(&query(path(&["sandboxes", sandbox, "diff"]), &pairs))
        .await
}

fn list(all: &[CheckpointInfo]) -> String {
    let columns = [
        left("ID"),
        right("TURN"),
        left("VERDICT"),
        right("FILES"),
        right("MEMORY"),
        right("PROCESSES"),
        left("PARENT"),
        left("CREATED"),
    ];
    let row = |c: &CheckpointInfo| {
        let (memory, processes) = match c.process_tree {
            Some(_) => (human::size(c.process_bytes), c.process_count.to_string()),
            None => ("-".to_owned(), "-".to_owned()),
        };
        vec![
            c.id.short(),
            c.turn.to_string(),
            human::verdict(c.verdict).to_owned(),
            human::size(c.upper_bytes),
            memory,
            processes,
            c.parent.map_or("-".to_owned(), |p| p.short()),
            human::time(c.created_ms),
        ]
    };
    table(&columns, all.iter().map(row).collect())
}

/// A checkpoint with everything known about it.
pub(crate) fn describe(c: &CheckpointInfo) -> String {
    let processes = match c.process_tree {
        Some(tree) => format!(
            "{}, {}, tree {tree}",
            human::count(c.process_count.into(), "process", "processes"),
            human::size(c.process_bytes)
        ),
        None => "none: files only".to_owned(),
    };
    fields(&[
        ("id", c.id.to_string()),
        ("sandbox", c.sandbox.to_string()),
        ("turn", c.turn.to_string()),
        ("epoch", c.epoch.to_string()),
        ("parent", c.parent.map_or("-".to_owned(), |p| p.to_string())),
        ("created", human::time(c.created_ms)),
        ("verdict", human::verdict(c.verdict).to_owned()),
        (
            "image",
            format!("{}, tree {}", human::clean(&c.image), c.image_tree),
        ),
        (
            "files",
            format!("{}, tree {}", human::size(c.upper_bytes), c.upper_tree),
        ),
        ("processes", processes),
    ])
}

/// Paths that differ, one a line.
pub(crate) fn diff_table(paths: &[PathChange]) -> String {
    let columns = [
        left("CHANGE"),
        right("BEFORE"),
        right("AFTER"),
        flexible("PATH"),
    ];
    let row = |p: &PathChange| {
        let before = (p.change != ChangeKind::Added).then(|| human::size(p.bytes_before));
        let after = (p.change != ChangeKind::Removed).then(|| human::size(p.bytes_after));
        vec![
            change(p.change).to_owned(),
            before.unwrap_or_else(|| "-".to_owned()),
            after.unwrap_or_else(|| "-".to_owned()),
            human::clean(&p.path),
        ]
    };
    table(&columns, paths.iter().map(row).collect())
}

fn change(kind: ChangeKind) -> &'static str {
    match kind {
        ChangeKind::Added => "added",
        ChangeKind::Removed => "removed",
        ChangeKind::Modified => "modified",
        ChangeKind::Metadata => "metadata",
    }
}
