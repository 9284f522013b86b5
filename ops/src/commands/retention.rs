//! `tidepool retention`: which checkpoints stay.
//!
//! `plan` shows what would go and why; `apply` takes that plan and does exactly that. Where the policies or a sandbox's history have changed since, it says so and
//! does nothing (to that sandbox). Space comes back with the next collection.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use tidepool_proto::manifest::Manifest;
use tidepool_proto::{CheckpointId, DomainId, ErrorKind, SandboxId};
use tidepool_store_client::{Client, SandboxRecord};
use tidepool_store_core::retention::{
    Checkpoint, History, Keep, Policies, Reason, SandboxPlan, Scope, decode_labels, encode_labels,
    plan,
};

use crate::commands::gc::garbage_without;
use crate::failure::Failure;
use crate::human;
use crate::store::{StoreArgs, failed};
use crate::ui::{Ui, left, table};

/// Checkpoints removed by one request.
const AT_ONCE: usize = 4096;

#[derive(Debug, Subcommand)]
pub(crate) enum RetentionCommand {
    /// Set, or with --clear remove, the rule of a scope
    Set(SetArgs),
    /// The rules in force
    Show {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Label a sandbox (KEY=VALUE; KEY= removes one), so that rules for the label count for it
    Label {
        #[command(flatten)]
        store: StoreArgs,
        /// The sandbox's name or id
        sandbox: String,
        #[arg(required = true, value_parser = label)]
        labels: Vec<(String, String)>,
    },
    /// Keep a checkpoint whatever the rules say
    Keep {
        #[command(flatten)]
        store: StoreArgs,
        /// The sandbox's name or id
        sandbox: String,
        /// The checkpoint's id, or how it begins
        checkpoint: String,
        /// Let it go again
        #[arg(long)]
        release: bool,
    },
    /// What would go, why, and how many bytes would come back
    Plan {
        #[command(flatten)]
        store: StoreArgs,
        /// Where to write the plan, for `apply`
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Do exactly what a plan says
    Apply {
        #[command(flatten)]
        store: StoreArgs,
        /// A plan written by `plan --out`
        plan: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct SetArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// For one sandbox (its name or id)
    #[arg(long, group = "scope")]
    sandbox: Option<String>,
    /// For sandboxes with this label
    #[arg(long, group = "scope", value_name = "KEY=VALUE", value_parser = label)]
    label: Option<(String, String)>,
    /// For a dedup domain
    #[arg(long, group = "scope")]
    domain: Option<DomainId>,
    /// Keep the newest so many
    #[arg(long, default_value_t = 0)]
    keep_last: u32,
    /// Keep what is younger
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    keep_within: Option<Duration>,
    /// Keep the newest of each of so many hours
    #[arg(long, default_value_t = 0)]
    hourly: u32,
    /// Keep the newest of each of so many days
    #[arg(long, default_value_t = 0)]
    daily: u32,
    /// Keep the newest of each of so many weeks
    #[arg(long, default_value_t = 0)]
    weekly: u32,
    /// Remove the rule: broader ones decide again
    #[arg(long)]
    clear: bool,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a label is KEY=VALUE".to_owned()),
    }
}

/// A plan as it is shown, kept and applied.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plan {
    cluster: String,
    made_ms: u64,
    /// The version of the policies that it was made by.
    policies: u64,
    removes: u64,
    keeps: u64,
    /// About how many bytes a collection would give back after it.
    bytes_back: u64,
    sandboxes: Vec<SandboxPlan>,
}

pub(crate) async fn run(command: RetentionCommand, ui: Ui) -> Result<(), Failure> {
    match command {
        RetentionCommand::Set(args) => set(args, ui).await,
        RetentionCommand::Show { store } => show(&store.connect().await?, ui).await,
        RetentionCommand::Label {
            store,
            sandbox,
            labels,
        } => {
            let client = store.connect().await?;
            let record = find(&client, &sandbox).await?;
            let mut all = labels_of(&record)?;
            for (key, value) in labels {
                match value.is_empty() {
                    true => drop(all.remove(&key)),
                    false => drop(all.insert(key, value)),
                }
            }
            let encoded = encode_labels(&all);
            client
                .label_sandbox(record.id, encoded)
                .await
                .map_err(failed)?;
            ui.result(&all, || {
                format!("{} is labelled", human::clean(&record.name))
            })
        }
        RetentionCommand::Keep {
            store,
            sandbox,
            checkpoint,
            release,
        } => {
            let client = store.connect().await?;
            let record = find(&client, &sandbox).await?;
            let id = find_checkpoint(&client, record.id, &checkpoint).await?;
            client
                .keep_checkpoint(record.id, id, !release)
                .await
                .map_err(failed)?;
            let what = if release { "released" } else { "kept" };
            ui.result(
                &serde_json::json!({"checkpoint": id, "kept": !release}),
                || format!("checkpoint {} is {what}", id.short()),
            )
        }
        RetentionCommand::Plan { store, out } => {
            let made = make(&store.connect().await?).await?;
            if let Some(path) = &out {
                write(path, &made)?;
            }
            ui.result(&made, || describe(&made))
        }
        RetentionCommand::Apply { store, plan } => apply(&store, &plan, ui).await,
    }
}

async fn policies(client: &Client) -> Result<Policies, Failure> {
    let bytes = client.policies().await.map_err(failed)?;
    match bytes.is_empty() {
        true => Ok(Policies::default()),
        false => Policies::decode(&bytes).map_err(|e| Failure::new(ErrorKind::Corruption, e.0)),
    }
}

async fn set(args: SetArgs, ui: Ui) -> Result<(), Failure> {
    let client = args.store.connect().await?;
    let scope = if let Some(which) = &args.sandbox {
        Scope::Sandbox(find(&client, which).await?.id)
    } else if let Some((key, value)) = args.label {
        Scope::Label { key, value }
    } else if let Some(domain) = args.domain {
        Scope::Domain(domain)
    } else {
        Scope::All
    };
    let keep = Keep {
        last: args.keep_last,
        within_ms: args
            .keep_within
            .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
        hourly: args.hourly,
        daily: args.daily,
        weekly: args.weekly,
    };
    if args.clear && keep != Keep::default() {
        return Err(Failure::usage("--clear removes a rule: it keeps nothing"));
    }
    let mut all = policies(&client).await?;
    all.set(scope, (!args.clear).then_some(keep));
    client.set_policies(all.encode()).await.map_err(failed)?;
    show(&client, ui).await
}

async fn show(client: &Client, ui: Ui) -> Result<(), Failure> {
    let all = policies(client).await?;
    ui.result(&all, || {
        if all.rules.is_empty() {
            return "no rules: every checkpoint stays".to_owned();
        }
        let row = |r: &tidepool_store_core::retention::Rule| {
            let k = &r.keep;
            vec![
                scope(&r.scope),
                k.last.to_string(),
                human::duration(k.within_ms / 1000),
                k.hourly.to_string(),
                k.daily.to_string(),
                k.weekly.to_string(),
            ]
        };
        let columns = [
            left("SCOPE"),
            left("LAST"),
            left("WITHIN"),
            left("HOURLY"),
            left("DAILY"),
            left("WEEKLY"),
        ];
        table(&columns, all.rules.iter().map(row).collect())
    })
}

fn scope(scope: &Scope) -> String {
    match scope {
        Scope::All => "all".to_owned(),
        Scope::Domain(domain) => format!("domain {domain}"),
        Scope::Label { key, value } => {
            format!("label {}={}", human::clean(key), human::clean(value))
        }
        Scope::Sandbox(id) => format!("sandbox {}", id.short()),
    }
}

fn labels_of(record: &SandboxRecord) -> Result<BTreeMap<String, String>, Failure> {
    decode_labels(&record.labels).map_err(|e| Failure::new(ErrorKind::Corruption, e.0))
}

async fn find(client: &Client, which: &str) -> Result<SandboxRecord, Failure> {
    let all = client.sandboxes().await.map_err(failed)?;
    let id: Option<SandboxId> = which.parse().ok();
    all.into_iter()
        .find(|s| s.name == which || Some(s.id) == id)
        .ok_or_else(|| Failure::new(ErrorKind::NotFound, format!("there is no sandbox {which}")))
}

async fn find_checkpoint(
    client: &Client,
    sandbox: SandboxId,
    which: &str,
) -> Result<CheckpointId, Failure> {
    let all = client.manifests(sandbox).await.map_err(failed)?;
    let mut fitting = all
        .into_iter()
        .map(|(_, id, _)| id)
        .filter(|id| id.to_string().starts_with(which));
    match (fitting.next(), fitting.next()) {
        (Some(id), None) => Ok(id),
        (None, _) => Err(Failure::new(
            ErrorKind::NotFound,
            format!("there is no checkpoint {which}"),
        )),
        (Some(_), Some(_)) => Err(Failure::usage(format!(
            "{which} is more than one checkpoint"
        ))),
    }
}

async fn histories(client: &Client) -> Result<Vec<History>, Failure> {
    let mut out = Vec::new();
    for record in client.sandboxes().await.map_err(failed)? {
        let kept = client.kept(record.id).await.map_err(failed)?;
        let mut domain = None;
        let mut checkpoints = Vec::new();
        for (turn, id, bytes) in client.manifests(record.id).await.map_err(failed)? {
            let manifest = Manifest::decode(&bytes).map_err(|e| {
                Failure::new(ErrorKind::Corruption, format!("checkpoint {id}: {e}"))
            })?;
            domain = Some(manifest.domain);
            checkpoints.push(Checkpoint {
                id,
                turn,
                created_ms: manifest.created_ms,
                parent: manifest.parent,
                keep: kept.contains(&id),
            });
        }
        out.push(History {
            id: record.id,
            labels: labels_of(&record)?,
            name: record.name,
            domain,
            // Read before the checkpoints: what changed in between makes the plan stale, never wrong.
            changes: record.changes,
            head: record.head,
            checkpoints,
        });
    }
    Ok(out)
}

async fn make(client: &Client) -> Result<Plan, Failure> {
    let rules = policies(client).await?;
    let histories = histories(client).await?;
    let made_ms = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64);
    let sandboxes = plan(&rules, &histories, made_ms);
    let gone: Vec<CheckpointId> = sandboxes.iter().flat_map(SandboxPlan::removed).collect();
    let bytes_back = match gone.is_empty() {
        true => 0,
        false => {
            let now = garbage_without(client, &[]).await?;
            garbage_without(client, &gone).await?.saturating_sub(now)
        }
    };
    let all: usize = sandboxes.iter().map(|s| s.decisions.len()).sum();
    Ok(Plan {
        cluster: client.status().await.map_err(failed)?.cluster,
        made_ms,
        policies: rules.version,
        removes: gone.len() as u64,
        keeps: (all - gone.len()) as u64,
        bytes_back,
        sandboxes,
    })
}

fn write(path: &Path, plan: &Plan) -> Result<(), Failure> {
    let json =
        serde_json::to_vec_pretty(plan).map_err(|e| Failure::failed(format!("the plan: {e}")))?;
    std::fs::write(path, json).map_err(|e| Failure::failed(format!("{}: {e}", path.display())))
}

fn describe(plan: &Plan) -> String {
    let columns = [
        left("SANDBOX"),
        left("TURN"),
        left("CHECKPOINT"),
        left("CREATED"),
        left("FATE"),
        left("WHY"),
    ];
    let rows = plan.sandboxes.iter().flat_map(|s| {
        s.decisions.iter().map(|d| {
            vec![
                human::clean(&s.name),
                d.turn.to_string(),
                d.checkpoint.short(),
                human::time(d.created_ms),
                if d.remove { "goes" } else { "stays" }.to_owned(),
                why(&d.reason),
            ]
        })
    });
    format!(
        "{}\n{} of {} go; about {} come back with the next collection",
        table(&columns, rows.collect()),
        plan.removes,
        human::count(plan.removes + plan.keeps, "checkpoint", "checkpoints"),
        human::size(plan.bytes_back),
    )
}

fn why(reason: &Reason) -> String {
    match reason {
        Reason::Head => "the sandbox stands on it".to_owned(),
        Reason::Kept => "kept on request".to_owned(),
        Reason::BranchPoint(fork) => format!("sandbox {} was forked from it", fork.short()),
        Reason::NoRule => "no rule fits the sandbox".to_owned(),
        Reason::Last => "among the newest".to_owned(),
        Reason::Within => "young enough".to_owned(),
        Reason::Hourly => "the newest of its hour".to_owned(),
        Reason::Daily => "the newest of its day".to_owned(),
        Reason::Weekly => "the newest of its week".to_owned(),
        Reason::NotKept(by) => format!("not kept by the rule for {}", scope(by)),
    }
}

/// What applying did.
#[derive(Debug, Default, Serialize)]
struct Applied {
    removed: u64,
    sandboxes: u64,
    /// Sandboxes whose history had changed: nothing was removed there.
    changed: Vec<String>,
}

async fn apply(store: &StoreArgs, path: &Path, ui: Ui) -> Result<(), Failure> {
    let bytes =
        std::fs::read(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
    let plan: Plan = serde_json::from_slice(&bytes)
        .map_err(|e| Failure::usage(format!("{} is not a plan: {e}", path.display())))?;
    let client = store.connect().await?;
    let conflict =
        |what: &str| Failure::new(ErrorKind::Conflict, what).hint("make a new plan and look at it");
    if client.status().await.map_err(failed)?.cluster != plan.cluster {
        return Err(conflict("the plan is another cluster's"));
    }
    if policies(&client).await?.version != plan.policies {
        return Err(conflict("the rules have changed since the plan was made"));
    }
    // A fork that was made since may have come from what is to go: every history has to be what it was before anything goes.
    let now: BTreeMap<SandboxId, u64> = client
        .sandboxes()
        .await
        .map_err(failed)?
        .into_iter()
        .map(|s| (s.id, s.changes))
        .collect();
    let then: BTreeMap<SandboxId, u64> = plan
        .sandboxes
        .iter()
        .map(|s| (s.sandbox, s.changes))
        .collect();
    if now != then {
        return Err(conflict("sandboxes have changed since the plan was made"));
    }
    let mut done = Applied::default();
    for sandbox in &plan.sandboxes {
        let gone: Vec<CheckpointId> = sandbox.removed().collect();
        // Each request counts as one change.
        for (at, part) in gone.chunks(AT_ONCE).enumerate() {
            let changes = sandbox.changes + at as u64;
            match client
                .remove_checkpoints(sandbox.sandbox, changes, part)
                .await
            {
                Ok(()) => done.removed += part.len() as u64,
                Err(e) if e.kind() == ErrorKind::Conflict => {
                    done.changed.push(sandbox.name.clone());
                    break;
                }
                Err(e) => return Err(failed(e)),
            }
        }
        done.sandboxes += u64::from(!gone.is_empty());
    }
    ui.result(&done, || {
        format!(
            "removed {} of {}",
            human::count(done.removed, "checkpoint", "checkpoints"),
            human::count(done.sandboxes, "sandbox", "sandboxes"),
        )
    })?;
    match done.changed.is_empty() {
        true => Ok(()),
        false => Err(Failure::partial(format!(
            "these changed meanwhile and were left alone: {}",
            human::clean(&done.changed.join(", "))
        ))
        .told()),
    }
}
