//! One sandbox on this host: what is known of it, and its execs, one turn each.
//!
//! `inner` is held from the start of an exec to the commit of its turn, so that turns are taken one at a time and the next exec waits for the capture.
//! `public` and `control` answer questions meanwhile.
//!
//! Elsewhere on purpose: execs ([`crate::exec`]), the boundary itself ([`crate::boundary`]).

use std::sync::{Arc, Mutex};

use tidepool_fs::TreeIndex;
use tidepool_inspector::SandboxSlot;
use tidepool_inspector::look::Baseline;
use tidepool_proto::api::*;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::{CheckpointId, Epoch, SandboxId, TurnNo};
use tidepool_sandbox::{InitClient, JobControl, SandboxName};
use tidepool_scheduler_core::ignore::Rules;

use crate::error::{HostError, Result};
use crate::host::lock;
use crate::life::ignored;
use crate::record::{LocalRecord, SandboxDir, SandboxRecord};

/// A sandbox.
pub struct Sandbox {
    pub id: SandboxId,
    pub record: SandboxRecord,
    pub dir: SandboxDir,
    /// The lines that say which changes alone ask for no checkpoint, and what they mean.
    ignore: Vec<String>,
    pub(crate) rules: Rules,
    public: Mutex<Public>,
    /// The exec that runs now, for input and signals.
    pub(crate) running: Mutex<Option<(String, JobControl)>>,
    pub(crate) inner: tokio::sync::Mutex<Inner>,
}

/// What may be asked while a turn is taken.
#[derive(Debug, Clone)]
struct Public {
    state: SandboxState,
    epoch: Epoch,
    turn: TurnNo,
    checkpoint: Option<CheckpointId>,
    capture_error: Option<String>,
    init_pid: Option<u32>,
}

/// What a turn changes.
pub struct Inner {
    pub(crate) epoch: Epoch,
    /// The last committed turn.
    pub(crate) turn: TurnNo,
    /// The checkpoint that holds the state at its end.
    pub(crate) last: Option<(CheckpointId, Manifest)>,
    pub(crate) live: Option<Live>,
    /// A commit failed: the store may have it all the same, and is asked before the next turn.
    pub(crate) stale: bool,
}

/// A sandbox that runs here.
pub struct Live {
    pub(crate) name: SandboxName,
    pub(crate) init_pid: u32,
    pub(crate) init: InitClient,
    /// As its directory has it.
    pub(crate) local: LocalRecord,
    pub(crate) slot: SandboxSlot,
    /// The upper as of the last capture; none makes the next one walk it whole.
    pub(crate) index: Option<Arc<TreeIndex>>,
    /// The upper as of the last checkpoint, where that is known: what has changed since is weighed against it.
    pub(crate) committed: Option<Arc<TreeIndex>>,
    /// What the last boundary saw besides files; what is not known counts as changed.
    pub(crate) seen: Baseline,
}

impl Sandbox {
    pub(crate) fn new(
        id: SandboxId,
        record: SandboxRecord,
        dir: SandboxDir,
        host: &[String],
        inner: Inner,
    ) -> Arc<Self> {
        // Checked when it was created. What another version knew and this one does not is not ignored.
        let ignore = ignored(host, &record.agent, &record.ignore).unwrap_or_default();
        let rules = Rules::new(&ignore).unwrap_or_default();
        let sandbox = Self {
            ignore,
            rules,
            public: Mutex::new(Public {
                state: SandboxState::Dead,
                epoch: inner.epoch,
                turn: inner.turn,
                checkpoint: None,
                capture_error: None,
                init_pid: None,
            }),
            id,
            record,
            dir,
            running: Mutex::new(None),
            inner: tokio::sync::Mutex::new(inner),
        };
        Arc::new(sandbox)
    }

    /// As the API shows it.
    pub fn info(&self) -> SandboxInfo {
        let mut p = lock(&self.public);
        // Its processes may have been killed behind our back; a look at /proc is cheap.
        if matches!(p.state, SandboxState::Running | SandboxState::Paused)
            && p.init_pid.is_some_and(|pid| !alive(pid))
        {
            p.state = SandboxState::Dead;
        }
        let p = p.clone();
        SandboxInfo {
            id: self.id,
            name: self.record.name.clone(),
            image: self.record.image_name.clone(),
            domain: self.record.domain.clone(),
            state: p.state,
            epoch: p.epoch,
            turn: p.turn,
            checkpoint: p.checkpoint,
            created_ms: self.record.created_ms,
            capture_error: p.capture_error,
            not_covered: not_covered(&self.record),
            ignore: self.ignore.clone(),
            agent: self.record.agent.clone(),
        }
    }

    /// Shows what `inner` has become.
    pub(crate) fn publish(&self, inner: &Inner, state: SandboxState) {
        let mut p = lock(&self.public);
        p.state = state;
        p.epoch = inner.epoch;
        p.turn = inner.turn;
        p.checkpoint = inner.last.as_ref().map(|(id, _)| *id);
        p.init_pid = inner.live.as_ref().map(|l| l.init_pid);
    }

    pub(crate) fn set_state(&self, state: SandboxState) {
        lock(&self.public).state = state;
    }

    pub(crate) fn set_capture_error(&self, error: Option<String>) {
        lock(&self.public).capture_error = error;
    }

    /// Waits until no turn is being taken.
    pub async fn boundary_done(&self) {
        if lock(&self.running).is_none() {
            drop(self.inner.lock().await);
        }
    }

    /// The running exec with this key, for input, size and signals.
    pub fn control(&self, key: &str) -> Result<JobControl> {
        match &*lock(&self.running) {
            Some((running, control)) if running == key => Ok(control.clone()),
            _ => Err(HostError::not_found(format!(
                "no exec with key {key} runs in {}",
                self.record.name
            ))),
        }
    }
}

/// The first `max` bytes of a text, cut between characters.
pub(crate) fn shorten(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let mut end = max - '…'.len_utf8();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

/// What no checkpoint of this sandbox covers.
pub(crate) fn not_covered(record: &SandboxRecord) -> Vec<String> {
    let mut list: Vec<String> = record
        .spec
        .mounts
        .iter()
        .map(|m| {
            format!(
                "host directory {} at {}",
                m.source.display(),
                m.target.display()
            )
        })
        .collect();
    if record.spec.network == tidepool_sandbox::Network::Nat {
        list.push("connections to outside: closed by a restore".into());
    }
    list
}

/// Whether a process exists and is not a zombie.
pub(crate) fn alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The state follows the last parenthesis: a name may hold anything.
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(shorten("abc", 3), "abc");
        assert_eq!(shorten("abcdef", 5), "ab…");
        assert!(shorten(&"é".repeat(100), 50).len() <= 50);
    }
}
