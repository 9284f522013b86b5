//! `tidepool restore`, `rollback` and `fork`: three ways back to a checkpoint.
//!
//! `--dry-run` prints the very request that would be sent, beside what the daemon knows about its subject.

use serde::Serialize;
use tidepool_proto::api::{
    CheckpointDiff, CheckpointInfo, ForkRequest, RestoreInfo, RestoreRequest, SandboxInfo,
    SandboxState,
};
use tidepool_proto::error::ErrorKind;

use crate::cli::{ForkArgs, RestoreArgs, RollbackArgs};
use crate::client::{Client, path};
use crate::commands::{checkpoint, state, warn_about};
use crate::failure::Failure;
use crate::human;
use crate::ui::Ui;

/// What would be done.
#[derive(Serialize)]
struct Plan<'a> {
    dry_run: bool,
    action: &'static str,
    /// The request as it would be sent.
    request: &'a RestoreRequest,
    sandbox: &'a SandboxInfo,
    checkpoint: &'a CheckpointInfo,
    /// For a rollback: what differs between the checkpoint and the newest one.
    #[serde(skip_serializing_if = "Option::is_none")]
    undone: Option<&'a CheckpointDiff>,
}

pub(crate) async fn restore(args: RestoreArgs, client: &Client, ui: Ui) -> Result<(), Failure> {
    let request = RestoreRequest {
        checkpoint: args.checkpoint,
        force: args.force,
    };
    let sandbox = &args.sandbox.sandbox;
    if args.dry_run {
        return plan("restore", sandbox, &request, client, ui).await;
    }
    carry_out("restore", sandbox, &request, client, ui).await
}

pub(crate) async fn rollback(args: RollbackArgs, client: &Client, ui: Ui) -> Result<(), Failure> {
    // A sandbox that is rolled back usually runs: stopping it is what was asked for.
    let request = RestoreRequest {
        checkpoint: Some(args.to),
        force: true,
    };
    let sandbox = &args.sandbox.sandbox;
    if args.dry_run {
        return plan("rollback", sandbox, &request, client, ui).await;
    }
    carry_out("rollback", sandbox, &request, client, ui).await
}

pub(crate) async fn fork(args: ForkArgs, client: &Client, ui: Ui) -> Result<(), Failure> {
    let request = ForkRequest {
        name: args.new_name,
        checkpoint: args.checkpoint,
    };
    let path = path(&["sandboxes", &args.sandbox.sandbox, "fork"]);
    let info: RestoreInfo = client.events(&path, Some(&request)).await?;
    report("forked as", &info, ui)
}

async fn carry_out(
    action: &str,
    sandbox: &str,
    request: &RestoreRequest,
    client: &Client,
    ui: Ui,
) -> Result<(), Failure> {
    let path = path(&["sandboxes", sandbox, action]);
    let info: RestoreInfo = client.events(&path, Some(request)).await?;
    let done = if action == "rollback" {
        "rolled back"
    } else {
        "restored"
    };
    report(done, &info, ui)
}

fn report(done: &str, info: &RestoreInfo, ui: Ui) -> Result<(), Failure> {
    warn_about(&info.sandbox, ui);
    if !info.verified {
        ui.warn("the restored files were not compared with the checkpoint");
    }
    ui.result(info, || {
        let verified = if info.verified { ", verified" } else { "" };
        format!(
            "{done} {} ({}) at turn {}, checkpoint {}: {}, {} fetched, {}{verified}",
            human::clean(&info.sandbox.name),
            info.sandbox.id.short(),
            info.turn,
            info.checkpoint.short(),
            human::count(info.processes_restored.into(), "process", "processes"),
            human::size(info.fetched_bytes),
            human::micros(info.duration_ms.saturating_mul(1000)),
        )
    })
}

/// Prints what would be done, and fails as the daemon would where that can be told.
async fn plan(
    action: &'static str,
    name: &str,
    request: &RestoreRequest,
    client: &Client,
    ui: Ui,
) -> Result<(), Failure> {
    let sandbox: SandboxInfo = client.get(&path(&["sandboxes", name])).await?;
    let id = sandbox.id.to_string();
    let chosen = match (&request.checkpoint, sandbox.checkpoint) {
        (Some(text), _) => text.clone(),
        (None, Some(newest)) => newest.to_string(),
        (None, None) => {
            let name = human::clean(&sandbox.name);
            return Err(Failure::new(
                ErrorKind::NotFound,
                format!("{name} has no checkpoint"),
            ));
        }
    };
    let found: CheckpointInfo = client
        .get(&path(&["sandboxes", &id, "checkpoints", &chosen]))
        .await?;
    if sandbox.state != SandboxState::Dead && !request.force {
        return Err(Failure::new(
            ErrorKind::Conflict,
            format!(
                "{} is {} here",
                human::clean(&sandbox.name),
                state(sandbox.state)
            ),
        )
        .hint("--force stops it first; what no checkpoint holds is lost"));
    }
    let undone = if action == "rollback" {
        Some(checkpoint::diff(&id, &found.id.to_string(), None, client).await?)
    } else {
        None
    };
    let plan = Plan {
        dry_run: true,
        action,
        request,
        sandbox: &sandbox,
        checkpoint: &found,
        undone: undone.as_ref(),
    };
    ui.result(&plan, || plan_text(&plan))
}

fn plan_text(plan: &Plan<'_>) -> String {
    let (sandbox, found) = (plan.sandbox, plan.checkpoint);
    let mut out = String::new();
    if sandbox.state != SandboxState::Dead {
        out += &format!(
            "would stop {}, which is {}; what happened since turn {} would be lost\n",
            human::clean(&sandbox.name),
            state(sandbox.state),
            sandbox.turn
        );
    }
    let processes = match found.process_tree {
        Some(_) => format!(
            "{} with {} of memory",
            human::count(found.process_count.into(), "process", "processes"),
            human::size(found.process_bytes)
        ),
        None => "no processes".to_owned(),
    };
    out += &format!(
        "would {} {} to turn {}, checkpoint {} of {}: {} of files over {}, {processes}\n",
        if plan.action == "rollback" {
            "roll back"
        } else {
            "restore"
        },
        human::clean(&sandbox.name),
        found.turn,
        found.id.short(),
        human::time(found.created_ms),
        human::size(found.upper_bytes),
        human::clean(&found.image),
    );
    let later = sandbox.turn.0.saturating_sub(found.turn.0);
    if later > 0 {
        out += &format!(
            "{} after it would be undone\n",
            human::count(later, "turn", "turns")
        );
    }
    if let Some(diff) = plan.undone {
        if !diff.paths.is_empty() {
            out += "changes since that checkpoint, which would be undone:\n";
            out += &checkpoint::diff_table(&diff.paths);
            out.push('\n');
        }
        if diff.truncated {
            out += "and more paths\n";
        }
        if diff.processes_differ {
            out += "the processes differ too\n";
        }
    }
    out
}
