//! A turn's boundary: look, decide, capture what has to be captured, send it, commit.
//!
//! Two ways to capture. *Without a freeze*: where no process has to be dumped, the files are read as they lie, and it is checked afterwards that nothing ran and
//! nothing was dirtied meanwhile. *Frozen*: where that check fails, or processes have to be dumped; files and processes are then of the same instant, and
//! everything that can wait (cutting the process images, sending) waits until the sandbox runs again.
//!
//! Invariants: what is remembered of the last boundary is taken out first and put back only after the commit, so that any failure on the way makes the next boundary
//! look at everything; after a failed commit the store is asked what it has.
//!
//! Elsewhere on purpose: what is seen ([`crate::look`]), how it is captured ([`crate::capture`]), the rules (`scheduler_core::verdict`).

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use tidepool_fs::TreeIndex;
use tidepool_inspector::FileEffects;
use tidepool_inspector::look::{Baseline, Look};
use tidepool_proto::api::TurnInfo;
use tidepool_proto::manifest::{Manifest, ProcessImage};
use tidepool_proto::turn::{ExecResult, ExitStatus, TurnRecord, TurnStats, Verdict};
use tidepool_proto::{CheckpointId, ChunkName, ErrorKind, TurnNo};
use tidepool_scheduler_core::verdict::{FilesSeen, Observation, ProcessPart, Seen, decide};
use tidepool_store_client::{Commit, lower_round};

use crate::capture::{Files, MAX_CHANGES, Settled};
use crate::error::{HostError, Result};
use crate::history::turn_info;
use crate::host::{Host, now_ms};
use crate::look::{evidence, observation};
use crate::sandbox::{Inner, Live, Sandbox, not_covered};
use crate::transfer::{PIN_AGAIN, Upload, Uploaded};

/// What a boundary is the end of.
pub(crate) struct Cause {
    pub(crate) key: String,
    pub(crate) command: String,
    pub(crate) started_ms: u64,
    /// A command's end and output; none for a checkpoint asked for.
    pub(crate) result: Option<(ExitStatus, Vec<u8>, Vec<u8>)>,
}

/// What a boundary captured.
struct Taken {
    /// None where no file had to be looked at.
    captured: Option<Files>,
    part: ProcessPart,
    /// As the new manifest has them.
    processes: Option<ProcessImage>,
    result: Option<ExecResult>,
    look: Look,
    settled: Option<Settled>,
}

impl Sandbox {
    /// Ends a turn: afterwards its record, and its checkpoint where there is one, are committed.
    pub(crate) async fn boundary(
        &self,
        host: &Arc<Host>,
        inner: &mut Inner,
        cause: Cause,
    ) -> Result<TurnInfo> {
        let done = async {
            self.refresh(host, inner).await?;
            Boundary::take(self, host, inner, cause).await
        };
        let done = done.await;
        if let (Err(e), Some(live)) = (&done, inner.live.as_mut()) {
            tracing::warn!(sandbox = %self.record.name, error = %e, "a turn could not be committed");
            live.index = None;
            live.committed = None;
            live.seen = Baseline::default();
            inner.stale = true;
        }
        self.set_capture_error(done.as_ref().err().map(|e| e.message.clone()));
        let state = self.info().state;
        self.publish(inner, state);
        done
    }

    /// Learns what the store has, where a commit failed before: it may have been taken all the same.
    pub(crate) async fn refresh(&self, host: &Host, inner: &mut Inner) -> Result<()> {
        if !inner.stale {
            return Ok(());
        }
        if let Some((checkpoint, manifest, turn)) = host.head(self.id).await? {
            inner.last = Some((checkpoint, manifest));
            inner.turn = turn;
        }
        inner.stale = false;
        Ok(())
    }
}

/// One boundary under way.
pub(crate) struct Boundary<'a> {
    pub(crate) sandbox: &'a Sandbox,
    pub(crate) host: &'a Arc<Host>,
    ended: Instant,
    pub(crate) frozen_us: u64,
    reasons: Vec<String>,
}

impl<'a> Boundary<'a> {
    async fn take(
        sandbox: &'a Sandbox,
        host: &'a Arc<Host>,
        inner: &mut Inner,
        cause: Cause,
    ) -> Result<TurnInfo> {
        let mut this = Self {
            sandbox,
            host,
            ended: Instant::now(),
            frozen_us: 0,
            reasons: Vec::new(),
        };
        let ended_ms = now_ms();
        let inner_epoch = inner.epoch;
        let Some(live) = inner.live.as_mut() else {
            return Err(HostError::new(
                ErrorKind::Unavailable,
                "the sandbox does not run here",
            ));
        };
        let index = live.index.take();
        let mut look = this.look(live).await?;
        let mut seen = observation(&look, live, inner.last.as_ref());
        if index.is_none() {
            seen.files = FilesSeen::Everything("the last look at the files is not known".into());
            look.files = FileEffects::Everything {
                reason: String::new(),
            };
        }
        let last = inner.last.as_ref();
        let upload = host.transfer.upload();
        let taken = this
            .capture(live, &seen, look, &index, last, cause.result, &upload)
            .await;
        let (taken, uploaded) = match (taken, upload.finish().await) {
            (Ok(taken), Ok(finished)) => (taken, finished),
            // Where sending fails, cutting is cut short: the cause is the sender's.
            (_, Err(e)) | (Err(e), Ok(_)) => return Err(e),
        };
        let Uploaded {
            session,
            sent,
            names,
        } = uploaded;
        let Taken {
            captured,
            part,
            processes,
            result,
            look,
            settled,
        } = taken;

        let upper = captured
            .as_ref()
            .map(|f| f.captured.tree)
            .or(last.map(|(_, m)| m.upper));
        let upper = upper.ok_or_else(|| HostError::failed("there is no file tree to commit"))?;
        let processes_changed = last.is_none_or(|(_, m)| m.processes != processes);
        // Where nothing but what is not worth a checkpoint changed, the last one stands as it is; where there is to be one, it has everything.
        let light = match (&captured, last, processes_changed) {
            (Some(files), Some((_, m)), false) if m.upper != upper => {
                files.light.clone().map(|light| (light, m.upper))
            }
            _ => None,
        };
        let (light, upper) = match light {
            Some((light, upper)) => (Some(light), upper),
            None => (None, upper),
        };
        let files_changed = last.is_none_or(|(_, m)| m.upper != upper);
        let verdict = Verdict::of(files_changed, processes_changed);
        let changes = match (&captured, last) {
            (
                Some(Files {
                    changes: Some(changes),
                    ..
                }),
                _,
            ) => changes.clone(),
            // The first boundary after a restart or restore: the store knows what was there before.
            (Some(_), Some((_, before))) if files_changed => {
                let found = host.compare(before.upper, upper, MAX_CHANGES).await;
                found.map(|d| d.changes).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let changes = if light.is_some() { Vec::new() } else { changes };
        let upper_bytes = match (&captured, last) {
            (Some(f), _) => f.captured.bytes,
            (None, Some((_, m))) => m.upper_bytes,
            (None, None) => 0,
        };
        let turn = TurnNo(inner.turn.0 + 1);
        let record = &sandbox.record;
        let manifest = (verdict != Verdict::Clean || last.is_none()).then(|| Manifest {
            sandbox: sandbox.id,
            epoch: inner_epoch,
            turn,
            parent: last.map(|(id, _)| *id),
            created_ms: ended_ms,
            verdict,
            domain: record.domain.clone(),
            image_name: record.image_name.clone(),
            image: record.image,
            upper,
            processes: processes.clone(),
            spec: serde_json::to_vec(&live.local.spec).expect("a specification has only text keys"),
            init_nonce: live.local.init_nonce,
            upper_bytes,
        });
        let encoded = manifest.as_ref().map(Manifest::encode);
        let id = encoded.as_deref().map(Manifest::id_of);
        let checkpoint = match (id, last) {
            (Some(id), _) => id,
            (None, Some((id, _))) => *id,
            (None, None) => return Err(HostError::failed("a first turn without a checkpoint")),
        };
        let mut stats = TurnStats {
            captured_bytes: captured.as_ref().map_or(0, |f| f.captured.read_bytes)
                + if part == ProcessPart::Dump {
                    processes.as_ref().map_or(0, |p| p.bytes)
                } else {
                    0
                },
            sent_bytes: sent.bytes + encoded.as_ref().map_or(0, |m| m.len() as u64),
            sent_chunks: sent.chunks,
            full_bytes: upper_bytes + processes.as_ref().map_or(0, |p| p.bytes),
            frozen_us: this.frozen_us,
            exposed_us: 0,
        };
        stats.exposed_us = this.ended.elapsed().as_micros() as u64;
        let record = TurnRecord {
            turn,
            key: cause.key.clone(),
            command: cause.command,
            started_ms: cause.started_ms,
            ended_ms,
            verdict,
            checkpoint,
            evidence: evidence(
                &look,
                &changes,
                &this.reasons,
                verdict,
                light.as_ref(),
                not_covered(record),
            ),
            stats,
            result,
        };
        let record = record.encode();
        let commit = Commit {
            sandbox: sandbox.id,
            epoch: inner_epoch,
            turn,
            key: cause.key,
            record: record.clone(),
            manifest: id.zip(encoded),
            session,
            round: sent.round,
            base: last.map(|(id, _)| *id),
        };
        this.commit(commit, &names).await?;
        if let Some(session) = session {
            let client = host.transfer.client.clone();
            // Nobody has to wait for it. Where it fails the pins end with the session's time.
            tokio::spawn(async move { client.end_session(session).await });
        }
        live.index = match captured {
            Some(files) => {
                let unarmed = files.unarmed;
                let index = Arc::new(files.captured.index);
                if light.is_none() {
                    live.committed = Some(index.clone());
                }
                (!unarmed).then_some(index)
            }
            None => index,
        };
        live.seen = Baseline {
            tasks: match settled {
                Some(settled) => settled.await?,
                None => Some(look.tasks),
            },
            memory: Some(look.memory),
            ipc: look.ipc,
            around: Some(look.around),
        };
        inner.turn = turn;
        if let (Some(id), Some(manifest)) = (id, manifest) {
            inner.last = Some((id, manifest));
        }
        turn_info(&record)
    }

    /// Commits. Where a collection cut it off, what it rests on is pinned again.
    async fn commit(&self, mut commit: Commit, names: &HashSet<ChunkName>) -> Result<()> {
        let first = commit.base.is_none();
        for _ in 0..PIN_AGAIN {
            let mut one = commit.clone();
            // A first checkpoint rests on its image, which must be there still; a later one on the one before it.
            if first {
                let image = self.host.image_round(&self.sandbox.record).await?;
                one.round = lower_round(one.round, image);
            }
            match self.host.transfer.client.commit(one).await {
                Ok(()) => return Ok(()),
                Err(e) if !e.upload_again() => return Err(e.into()),
                Err(e) => tracing::info!(error = %e, "a collection began: pinning again"),
            }
            let (session, round) = self.host.transfer.pin_again(names).await?;
            (commit.session, commit.round) = (Some(session), round);
        }
        Err(HostError::new(
            ErrorKind::Unavailable,
            "collections keep cutting this commit off",
        ))
    }

    /// Captures what has to be captured, cuts it, and offers it to the upload.
    #[allow(clippy::too_many_arguments)]
    async fn capture(
        &mut self,
        live: &Live,
        seen: &Observation,
        mut look: Look,
        index: &Option<Arc<TreeIndex>>,
        last: Option<&(CheckpointId, Manifest)>,
        result: Option<(ExitStatus, Vec<u8>, Vec<u8>)>,
        upload: &Upload,
    ) -> Result<Taken> {
        let decision = decide(seen);
        // Files first, as they lie; a change that a living process could notice asks for its image too.
        let mut part = decision.processes;
        let mut captured = None;
        if decision.verdict.files() && part != ProcessPart::Dump {
            let taken = self.files(live, index.clone(), &look.files, upload).await?;
            let quiet = self.quiet_since(live, &look).await?;
            match taken {
                Some(taken) if quiet => match self.held(live, &taken, look.processes.alive).await {
                    Seen::No => captured = Some(taken),
                    // A process that held any of it and wrote to it has run.
                    _ if taken.light.is_some() => captured = Some(taken),
                    _ => {
                        self.reasons
                            .push("a living process may hold a file that changed".into());
                        part = ProcessPart::Dump;
                    }
                },
                _ => {
                    self.reasons
                        .push("something ran while the files were read".into());
                    part = if look.processes.alive == 0 {
                        part
                    } else {
                        ProcessPart::Dump
                    };
                }
            }
        }
        self.reasons.extend(decision.reasons);
        let (mut dump, mut settled) = (None, None);
        if part == ProcessPart::Dump || (decision.verdict.files() && captured.is_none()) {
            let frozen = self
                .frozen(
                    live,
                    index.clone(),
                    &look,
                    upload,
                    part == ProcessPart::Dump,
                )
                .await?;
            (captured, dump, look) = (Some(frozen.files), frozen.dump, frozen.look);
            settled = frozen.settled;
        }
        // Everything below happens while the sandbox runs on.
        let processes = match (part, dump) {
            (ProcessPart::Dump, Some((dir, alive))) => {
                Some(self.process_image(dir, alive, upload).await?)
            }
            (ProcessPart::Drop, _) => None,
            _ => last.and_then(|(_, m)| m.processes.clone()),
        };
        let result = match result {
            Some((status, stdout, stderr)) => Some(ExecResult {
                status,
                stdout: self.journal(stdout, upload).await?,
                stderr: self.journal(stderr, upload).await?,
            }),
            None => None,
        };
        Ok(Taken {
            captured,
            part,
            processes,
            result,
            look,
            settled,
        })
    }
}
