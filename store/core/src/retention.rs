//! Retention: which checkpoints of a sandbox stay, by policies, and why.
//!
//! A policy is a list of rules, each for a scope; the narrowest scope that fits a sandbox decides (the sandbox itself, then a label, then the
//! domain, then everything). A sandbox that no rule fits keeps all. A checkpoint stays where any part of its rule says so; some stay whatever the rule says:
//! the one that the sandbox stands on, those that people keep, and those that a living fork came from.
//!
//! [`plan`] is a pure function of what it is shown and of the time it is given. It decides nothing: whoever executes it names the counts of changes that it was made
//! on, and the shards refuse where the history has moved (see [`crate::Op`]'s `RemoveCheckpoints`).
//!
//! Elsewhere on purpose: reading histories (the store's requests), what a removal frees (collection).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tidepool_proto::codec::{Reader, Writer};
use tidepool_proto::{CheckpointId, DomainId, SandboxId, TurnNo};

use crate::kv::ReadError;

const VERSION: u8 = 1;
/// The most rules of a cluster.
pub const MAX_RULES: usize = 4096;
/// The most labels of a sandbox.
pub const MAX_LABELS: usize = 64;
/// The longest key or value of a label, in bytes.
pub const MAX_LABEL: usize = 128;
const HOUR_MS: u64 = 3_600_000;

/// Which sandboxes a rule is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Every sandbox.
    All,
    /// The sandboxes of a dedup domain.
    Domain(DomainId),
    /// The sandboxes that carry this label.
    Label { key: String, value: String },
    /// One sandbox.
    Sandbox(SandboxId),
}

/// What stays. A rule that says nothing keeps only what stays in any case.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Keep {
    /// The newest so many.
    pub last: u32,
    /// Those younger than this, in milliseconds.
    pub within_ms: u64,
    /// The newest of each of the last so many hours that have one.
    pub hourly: u32,
    /// The same by days (UTC).
    pub daily: u32,
    /// The same by weeks (that begin on Monday, UTC).
    pub weekly: u32,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub scope: Scope,
    pub keep: Keep,
}

/// A cluster's rules, at most one a scope, sorted by scope.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policies {
    /// Counts their changes.
    pub version: u64,
    pub rules: Vec<Rule>,
}

impl Policies {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.varint(self.version);
        w.varint(self.rules.len() as u64);
        for rule in &self.rules {
            match &rule.scope {
                Scope::All => w.u8(0),
                Scope::Domain(domain) => {
                    w.u8(1);
                    w.bytes(domain.as_str().as_bytes());
                }
                Scope::Label { key, value } => {
                    w.u8(2);
                    w.bytes(key.as_bytes());
                    w.bytes(value.as_bytes());
                }
                Scope::Sandbox(id) => {
                    w.u8(3);
                    w.raw(&id.0);
                }
            }
            let k = &rule.keep;
            for n in [k.last, k.hourly, k.daily, k.weekly] {
                w.varint(u64::from(n));
            }
            w.varint(k.within_ms);
        }
        w.into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, ReadError> {
        let mut r = Reader::versioned("policies", bytes, VERSION)?;
        let version = r.varint()?;
        let mut rules: Vec<Rule> = Vec::new();
        for _ in 0..r.count(MAX_RULES, 6)? {
            let scope = match r.u8()? {
                0 => Scope::All,
                1 => {
                    let text = r.text(64)?;
                    Scope::Domain(text.parse().map_err(|_| r.invalid("not a domain"))?)
                }
                2 => Scope::Label {
                    key: r.text(MAX_LABEL)?,
                    value: r.text(MAX_LABEL)?,
                },
                3 => Scope::Sandbox(SandboxId(r.array()?)),
                v => return Err(r.invalid(format!("unknown scope {v}")).into()),
            };
            let keep = Keep {
                last: r.varint_u32()?,
                hourly: r.varint_u32()?,
                daily: r.varint_u32()?,
                weekly: r.varint_u32()?,
                within_ms: r.varint()?,
            };
            if rules.last().is_some_and(|last| last.scope >= scope) {
                return Err(r.invalid("rules are not in order").into());
            }
            rules.push(Rule { scope, keep });
        }
        r.finish()?;
        Ok(Self { version, rules })
    }

    /// Sets, or with none removes, the rule of a scope.
    pub fn set(&mut self, scope: Scope, keep: Option<Keep>) {
        self.rules.retain(|r| r.scope != scope);
        if let Some(keep) = keep {
            let at = self.rules.partition_point(|r| r.scope < scope);
            self.rules.insert(at, Rule { scope, keep });
        }
    }

    /// The rule that decides over a sandbox: the narrowest that fits, of several labels the first in order.
    pub fn rule_of(&self, sandbox: &History) -> Option<&Rule> {
        let fits = |scope: &Scope| match scope {
            Scope::All => true,
            Scope::Domain(domain) => sandbox.domain.as_ref() == Some(domain),
            Scope::Label { key, value } => sandbox.labels.get(key) == Some(value),
            Scope::Sandbox(id) => sandbox.id == *id,
        };
        let width = |scope: &Scope| match scope {
            Scope::Sandbox(_) => 0,
            Scope::Label { .. } => 1,
            Scope::Domain(_) => 2,
            Scope::All => 3,
        };
        let fitting = self.rules.iter().filter(|r| fits(&r.scope));
        fitting.min_by_key(|r| width(&r.scope))
    }
}

/// Labels of a sandbox, as they are stored.
pub fn encode_labels(labels: &BTreeMap<String, String>) -> Vec<u8> {
    let mut w = Writer::versioned(VERSION);
    w.varint(labels.len() as u64);
    for (key, value) in labels {
        w.bytes(key.as_bytes());
        w.bytes(value.as_bytes());
    }
    w.into_bytes()
}

/// What [`encode_labels`] wrote; nothing for no bytes.
pub fn decode_labels(bytes: &[u8]) -> Result<BTreeMap<String, String>, ReadError> {
    let mut labels = BTreeMap::new();
    if bytes.is_empty() {
        return Ok(labels);
    }
    let mut r = Reader::versioned("labels", bytes, VERSION)?;
    for _ in 0..r.count(MAX_LABELS, 2)? {
        let (key, value) = (r.text(MAX_LABEL)?, r.text(MAX_LABEL)?);
        if key.is_empty()
            || labels
                .last_key_value()
                .is_some_and(|(last, _)| *last >= key)
        {
            return Err(r.invalid("labels are not in order").into());
        }
        labels.insert(key, value);
    }
    r.finish()?;
    Ok(labels)
}

/// A sandbox's checkpoints, as retention sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    pub id: SandboxId,
    pub name: String,
    pub domain: Option<DomainId>,
    pub labels: BTreeMap<String, String>,
    /// The count of changes of the history when it was read.
    pub changes: u64,
    /// What the sandbox stands on.
    pub head: Option<CheckpointId>,
    /// Live ones, in order of turns.
    pub checkpoints: Vec<Checkpoint>,
}

/// One checkpoint of a [`History`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub id: CheckpointId,
    pub turn: TurnNo,
    pub created_ms: u64,
    /// The checkpoint it came after, perhaps another sandbox's.
    pub parent: Option<CheckpointId>,
    /// People want it kept.
    pub keep: bool,
}

/// Why a checkpoint stays or goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The sandbox stands on it.
    Head,
    /// Kept on request.
    Kept,
    /// A living fork came from it.
    BranchPoint(SandboxId),
    /// No rule fits the sandbox.
    NoRule,
    /// Among the newest.
    Last,
    /// Young enough.
    Within,
    /// The newest of its hour.
    Hourly,
    /// The newest of its day.
    Daily,
    /// The newest of its week.
    Weekly,
    /// Nothing in the rule of this scope keeps it.
    NotKept(Scope),
}

/// What becomes of one checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    pub checkpoint: CheckpointId,
    pub turn: TurnNo,
    pub created_ms: u64,
    pub remove: bool,
    pub reason: Reason,
}

/// What becomes of one sandbox's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxPlan {
    pub sandbox: SandboxId,
    pub name: String,
    /// The count of changes that this was made on.
    pub changes: u64,
    pub decisions: Vec<Decision>,
}

impl SandboxPlan {
    /// The checkpoints that go.
    pub fn removed(&self) -> impl Iterator<Item = CheckpointId> + '_ {
        let gone = self.decisions.iter().filter(|d| d.remove);
        gone.map(|d| d.checkpoint)
    }
}

/// Decides over all histories at `now_ms`. Forks are found among them: show it all, or branch points look like any other checkpoint.
pub fn plan(policies: &Policies, histories: &[History], now_ms: u64) -> Vec<SandboxPlan> {
    // A checkpoint whose parent is another sandbox's is where it was forked.
    let own: BTreeMap<CheckpointId, SandboxId> = histories
        .iter()
        .flat_map(|h| h.checkpoints.iter().map(|c| (c.id, h.id)))
        .collect();
    let mut branches: BTreeMap<CheckpointId, SandboxId> = BTreeMap::new();
    for history in histories {
        for parent in history.checkpoints.iter().filter_map(|c| c.parent) {
            if own.get(&parent).is_some_and(|of| *of != history.id) {
                branches.entry(parent).or_insert(history.id);
            }
        }
    }
    let plans = histories.iter().map(|h| SandboxPlan {
        sandbox: h.id,
        name: h.name.clone(),
        changes: h.changes,
        decisions: decide(policies.rule_of(h), h, &branches, now_ms),
    });
    plans.collect()
}

fn decide(
    rule: Option<&Rule>,
    history: &History,
    branches: &BTreeMap<CheckpointId, SandboxId>,
    now_ms: u64,
) -> Vec<Decision> {
    let newest_first: Vec<&Checkpoint> = history.checkpoints.iter().rev().collect();
    let by_rule = rule.map(|rule| kept_by(&rule.keep, &newest_first, now_ms));
    let decisions = history.checkpoints.iter().map(|c| {
        let reason = if history.head == Some(c.id) {
            Reason::Head
        } else if c.keep {
            Reason::Kept
        } else if let Some(fork) = branches.get(&c.id) {
            Reason::BranchPoint(*fork)
        } else {
            match (rule, &by_rule) {
                (Some(rule), Some(kept)) => kept
                    .get(&c.id)
                    .cloned()
                    .unwrap_or_else(|| Reason::NotKept(rule.scope.clone())),
                _ => Reason::NoRule,
            }
        };
        Decision {
            checkpoint: c.id,
            turn: c.turn,
            created_ms: c.created_ms,
            remove: matches!(reason, Reason::NotKept(_)),
            reason,
        }
    });
    decisions.collect()
}

fn kept_by(
    keep: &Keep,
    newest_first: &[&Checkpoint],
    now_ms: u64,
) -> BTreeMap<CheckpointId, Reason> {
    let mut kept = BTreeMap::new();
    for c in newest_first.iter().take(keep.last as usize) {
        kept.entry(c.id).or_insert(Reason::Last);
    }
    // A clock that is ahead makes a checkpoint young, never old.
    let since = now_ms.saturating_sub(keep.within_ms);
    for c in newest_first {
        if keep.within_ms > 0 && c.created_ms >= since {
            kept.entry(c.id).or_insert(Reason::Within);
        }
    }
    let day = HOUR_MS * 24;
    // The epoch began on a Thursday.
    let week = 7 * day;
    for (count, reason, length, shift) in [
        (keep.hourly, Reason::Hourly, HOUR_MS, 0),
        (keep.daily, Reason::Daily, day, 0),
        (keep.weekly, Reason::Weekly, week, 3 * day),
    ] {
        let mut met = BTreeSet::new();
        for c in newest_first {
            if met.len() >= count as usize {
                break;
            }
            if met.insert(c.created_ms.saturating_add(shift) / length) {
                kept.entry(c.id).or_insert_with(|| reason.clone());
            }
        }
    }
    kept
}
