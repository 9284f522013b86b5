//! `tidepool sandbox`.

use serde::Serialize;
use tidepool_proto::api::{CreateSandbox, SandboxInfo};

use crate::cli::{CreateArgs, RmArgs, SandboxCommand};
use crate::client::{Client, path, query};
use crate::commands::{NOTHING, state, warn_about};
use crate::failure::{Failure, kind_name};
use crate::human;
use crate::ui::{Ui, fields, flexible, left, right, table};

pub(crate) async fn run(command: SandboxCommand, client: &Client, ui: Ui) -> Result<(), Failure> {
    match command {
        SandboxCommand::Create(args) => create(*args, client, ui).await,
        SandboxCommand::List => list(client, ui).await,
        SandboxCommand::Show { sandbox } => {
            let info: SandboxInfo = client.get(&path(&["sandboxes", &sandbox.sandbox])).await?;
            ui.result(&info, || describe(&info))
        }
        SandboxCommand::Rm(args) => remove(args, client, ui).await,
        SandboxCommand::Pause { sandbox } => set(&sandbox.sandbox, "pause", client, ui).await,
        SandboxCommand::Resume { sandbox } => set(&sandbox.sandbox, "resume", client, ui).await,
    }
}

async fn create(args: CreateArgs, client: &Client, ui: Ui) -> Result<(), Failure> {
    let request = CreateSandbox {
        name: args.name,
        image: args.image.or(args.image_name).unwrap_or_default(),
        env: args.env,
        cwd: args.workdir,
        user: args.user,
        memory_bytes: args.memory,
        pids: args.pids,
        network: args.network,
        mounts: args.mount,
        ignore: args.ignore,
        agent: args.agent,
    };
    let info: SandboxInfo = client.events(&path(&["sandboxes"]), Some(&request)).await?;
    warn_about(&info, ui);
    ui.result(&info, || {
        format!(
            "created {} ({}) from {}: {}",
            human::clean(&info.name),
            info.id.short(),
            human::clean(&info.image),
            state(info.state),
        )
    })
}

async fn list(client: &Client, ui: Ui) -> Result<(), Failure> {
    let sandboxes: Vec<SandboxInfo> = client.get(&path(&["sandboxes"])).await?;
    ui.result(&sandboxes, || {
        let columns = [
            flexible("NAME"),
            left("ID"),
            left("STATE"),
            left("IMAGE"),
            right("TURN"),
            left("CHECKPOINT"),
            left("CREATED"),
            flexible("NOTES"),
        ];
        table(&columns, sandboxes.iter().map(row).collect())
    })
}

fn row(s: &SandboxInfo) -> Vec<String> {
    let mut notes = Vec::new();
    if s.capture_error.is_some() {
        notes.push("last capture failed".to_owned());
    }
    if !s.not_covered.is_empty() {
        notes.push(format!("not covered: {}", s.not_covered.len()));
    }
    vec![
        human::clean(&s.name),
        s.id.short(),
        state(s.state).to_owned(),
        human::clean(&s.image),
        s.turn.to_string(),
        s.checkpoint.map_or("-".to_owned(), |c| c.short()),
        human::time(s.created_ms),
        notes.join(", "),
    ]
}

fn describe(s: &SandboxInfo) -> String {
    let mut rows = vec![
        ("name", human::clean(&s.name)),
        ("id", s.id.to_string()),
        ("state", state(s.state).to_owned()),
        ("image", human::clean(&s.image)),
        ("domain", s.domain.to_string()),
        ("epoch", s.epoch.to_string()),
        ("turn", s.turn.to_string()),
        (
            "checkpoint",
            s.checkpoint.map_or("-".to_owned(), |c| c.to_string()),
        ),
        ("created", human::time(s.created_ms)),
    ];
    if let Some(why) = &s.capture_error {
        rows.push(("capture failed", human::clean(why)));
    }
    if let Some(agent) = &s.agent {
        rows.push(("agent", human::clean(agent)));
    }
    if !s.ignore.is_empty() {
        let all: Vec<String> = s.ignore.iter().map(|w| human::clean(w)).collect();
        rows.push(("ignored", all.join("\n")));
    }
    if !s.not_covered.is_empty() {
        let all: Vec<String> = s.not_covered.iter().map(|w| human::clean(w)).collect();
        rows.push(("not covered", all.join("\n")));
    }
    fields(&rows)
}

async fn set(sandbox: &str, verb: &str, client: &Client, ui: Ui) -> Result<(), Failure> {
    let info: SandboxInfo = client
        .post(&path(&["sandboxes", sandbox, verb]), NOTHING)
        .await?;
    ui.result(&info, || {
        format!("{} is {}", human::clean(&info.name), state(info.state))
    })
}

/// What `sandbox rm` did, or with `--dry-run` would do.
#[derive(Serialize)]
struct Removal {
    dry_run: bool,
    forget: bool,
    removed: Vec<Removed>,
    failed: Vec<NotRemoved>,
}

#[derive(Serialize)]
struct Removed {
    /// As it was named.
    sandbox: String,
    /// Known only in a dry run.
    #[serde(skip_serializing_if = "Option::is_none")]
    info: Option<SandboxInfo>,
    /// Whether it can be brought back.
    restorable: bool,
}

#[derive(Serialize)]
struct NotRemoved {
    sandbox: String,
    kind: String,
    message: String,
}

async fn remove(args: RmArgs, client: &Client, ui: Ui) -> Result<(), Failure> {
    let mut done = Removal {
        dry_run: args.dry_run,
        forget: args.forget,
        removed: Vec::new(),
        failed: Vec::new(),
    };
    let mut first: Option<Failure> = None;
    for sandbox in args.sandboxes {
        match remove_one(&sandbox, args.forget, args.dry_run, client).await {
            Ok(removed) => done.removed.push(removed),
            Err(e) => {
                done.failed.push(NotRemoved {
                    sandbox,
                    kind: e.kind().map_or("failed".to_owned(), kind_name),
                    message: e.message.clone(),
                });
                first.get_or_insert(e);
            }
        }
    }
    match first {
        None => ui.result(&done, || removed_text(&done)),
        Some(e) if done.removed.is_empty() => Err(e),
        Some(_) => {
            // The document already says what failed: the failure itself adds nothing to stdout.
            ui.result(&done, || removed_text(&done))?;
            for f in &done.failed {
                ui.warn(&format!(
                    "{} not removed: {}",
                    human::clean(&f.sandbox),
                    f.message
                ));
            }
            Err(Failure::partial(format!(
                "{} of {} not removed",
                done.failed.len(),
                done.failed.len() + done.removed.len()
            ))
            .told())
        }
    }
}

async fn remove_one(
    sandbox: &str,
    forget: bool,
    dry_run: bool,
    client: &Client,
) -> Result<Removed, Failure> {
    let path = path(&["sandboxes", sandbox]);
    let mut removed = Removed {
        sandbox: sandbox.to_owned(),
        info: None,
        restorable: !forget,
    };
    if dry_run {
        let info: SandboxInfo = client.get(&path).await?;
        removed.restorable &= info.checkpoint.is_some();
        removed.info = Some(info);
    } else {
        client
            .delete(&query(path, &[("forget", forget.to_string())]))
            .await?;
    }
    Ok(removed)
}

fn removed_text(done: &Removal) -> String {
    let mut out = String::new();
    for r in &done.removed {
        let name = human::clean(&r.sandbox);
        out += &match (&r.info, done.forget) {
            (None, true) => format!("removed {name} and its checkpoints"),
            (None, false) => {
                format!(
                    "removed {name}; its checkpoints are kept, `tidepool restore {name}` brings it back"
                )
            }
            (Some(i), true) => format!(
                "would remove {name} ({}), its {} and all its checkpoints; nothing could be restored",
                state(i.state),
                human::count(i.turn.0, "turn", "turns"),
            ),
            (Some(i), false) => match i.checkpoint {
                Some(checkpoint) => format!(
                    "would remove {name} ({}); what happened since turn {} would be lost, checkpoint {} kept",
                    state(i.state),
                    i.turn,
                    checkpoint.short(),
                ),
                None => format!(
                    "would remove {name} ({}); it has no checkpoint and could not be restored",
                    state(i.state)
                ),
            },
        };
        out.push('\n');
    }
    out
}
