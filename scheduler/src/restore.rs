//! Restore, rollback and fork: from a checkpoint to a running sandbox.
//!
//! A restore takes a new epoch before it makes anything, so that whatever ran before can no longer commit; files are materialised, walked again and
//! compared with the manifest's tree before anything starts on them.
//!
//! Elsewhere on purpose: which checkpoint is meant ([`crate::history`]), starting without processes ([`crate::life`]).

use std::sync::Arc;
use std::time::Instant;

use tidepool_fs::TreeKind;
use tidepool_proto::api::*;
use tidepool_proto::ids::valid_label;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, TurnRecord, TurnStats, Verdict};
use tidepool_proto::{CheckpointId, ErrorKind, SandboxId, TurnNo};
use tidepool_sandbox::SandboxSpec;
use tidepool_store_client::Commit;

use crate::error::{Context, HostError, Result};
use crate::history::restore_error;
use crate::host::{Host, now_ms};
use crate::http::Reporter;
use crate::life::runtime_name;
use crate::record::{LocalRecord, SandboxRecord};
use crate::sandbox::{Inner, Live, Sandbox};
use crate::transfer::PIN_AGAIN;

impl Host {
    /// Restores a sandbox that died, or an older checkpoint of it.
    pub async fn restore(
        self: Arc<Self>,
        which: &str,
        request: RestoreRequest,
        report: Reporter,
    ) -> Result<RestoreInfo> {
        let sandbox = self.find(which)?;
        if sandbox.info().state != SandboxState::Dead && !request.force {
            return Err(HostError::conflict(format!(
                "{0} runs here; `tidepool rollback {0}` takes it back, `restore --force` does the same",
                sandbox.record.name
            )));
        }
        self.restore_to(&sandbox, request.checkpoint.as_deref(), &report)
            .await
    }

    /// Takes a sandbox back to an older checkpoint, running or not.
    pub async fn rollback(
        self: Arc<Self>,
        which: &str,
        request: RestoreRequest,
        report: Reporter,
    ) -> Result<RestoreInfo> {
        let sandbox = self.find(which)?;
        if request.checkpoint.is_none() {
            return Err(HostError::invalid(
                "a rollback needs the checkpoint to go back to",
            ));
        }
        self.restore_to(&sandbox, request.checkpoint.as_deref(), &report)
            .await
    }

    async fn restore_to(
        &self,
        sandbox: &Arc<Sandbox>,
        which: Option<&str>,
        report: &Reporter,
    ) -> Result<RestoreInfo> {
        let since = Instant::now();
        // Before anything is ended: what it is to become must be there.
        let newest = self.head(sandbox.id).await?;
        let (checkpoint, manifest) = match which {
            Some(which) => self.resolve_checkpoint(sandbox.id, which).await?,
            None => newest.clone().map(|(id, m, _)| (id, m)).ok_or_else(|| {
                HostError::not_found(format!("{} has no checkpoint", sandbox.record.name))
            })?,
        };
        let name = runtime_name(sandbox.id)?;
        self.runtime.destroy(&name).await?;
        let mut inner = sandbox.inner.lock().await;
        self.tear_down(sandbox, &mut inner).await?;
        inner.epoch = self.transfer.client.take_sandbox(sandbox.id).await?;
        sandbox.publish(&inner, SandboxState::Starting);
        let materialised = self
            .materialise_and_start(sandbox, &inner, &manifest, report)
            .await;
        let (live, fetched) = match materialised {
            Ok(done) => done,
            Err(e) => {
                self.tear_down(sandbox, &mut inner).await?;
                return Err(e.context(format!("restoring {}", sandbox.record.name)));
            }
        };
        inner.live = Some(live);
        // A turn may have been committed between the first look and the new epoch.
        let (head, turn) = match self.head(sandbox.id).await? {
            Some((id, _, turn)) => (Some(id), turn),
            None => (None, TurnNo(0)),
        };
        inner.turn = turn;
        inner.last = Some((checkpoint, manifest.clone()));
        if head != Some(checkpoint) {
            self.mark_rollback(sandbox, &mut inner, checkpoint).await?;
        }
        sandbox.publish(&inner, SandboxState::Running);
        sandbox.set_capture_error(None);
        Ok(RestoreInfo {
            sandbox: sandbox.info(),
            checkpoint,
            turn: manifest.turn,
            verified: true,
            processes_restored: manifest.processes.as_ref().map_or(0, |p| p.count),
            fetched_bytes: fetched,
            duration_ms: since.elapsed().as_millis() as u64,
        })
    }

    /// Writes down that the state went back, so that a later restore finds it.
    async fn mark_rollback(
        &self,
        sandbox: &Sandbox,
        inner: &mut Inner,
        checkpoint: CheckpointId,
    ) -> Result<()> {
        let now = now_ms();
        let turn = TurnNo(inner.turn.0 + 1);
        let key = format!("rollback-{}", turn.0);
        let record = TurnRecord {
            turn,
            key: key.clone(),
            command: format!("(rollback to {})", checkpoint.short()),
            started_ms: now,
            ended_ms: now,
            verdict: Verdict::Clean,
            checkpoint,
            evidence: Evidence::default(),
            stats: TurnStats::default(),
            result: None,
        };
        let commit = Commit {
            sandbox: sandbox.id,
            epoch: inner.epoch,
            turn,
            key,
            record: record.encode(),
            manifest: None,
            session: None,
            round: 0,
            base: Some(checkpoint),
        };
        self.transfer.client.commit(commit).await?;
        inner.turn = turn;
        Ok(())
    }

    /// Brings files and processes of a checkpoint to life in a sandbox's (absent) directory.
    async fn materialise_and_start(
        &self,
        sandbox: &Sandbox,
        inner: &Inner,
        manifest: &Manifest,
        report: &Reporter,
    ) -> Result<(Live, u64)> {
        let dir = &sandbox.dir;
        std::fs::create_dir_all(&dir.0).context(format!("making {}", dir.0.display()))?;
        report.progress("fetching files", 0, Some(manifest.upper_bytes));
        let mut fetched = self
            .materialise(manifest.upper, &dir.upper(), TreeKind::Upper)
            .await
            .context("restoring files")?;
        report.progress("verifying files", 0, Some(manifest.upper_bytes));
        let (upper, key, expected) = (dir.upper(), self.transfer.key.clone(), manifest.upper);
        let verified = tokio::task::spawn_blocking(move || {
            tidepool_fs::restore::verify(&upper, &key, TreeKind::Upper, expected)
        });
        let verified = verified
            .await?
            .map_err(|e| restore_error(&e))
            .context("the restored files are not those of the checkpoint")?;
        // What the next capture is compared with; it walks all the same, since nothing watched until now.
        let index = Some(Arc::new(verified.index));
        let nonce = manifest.init_nonce;
        let Some(processes) = &manifest.processes else {
            report.progress("starting", 0, None);
            let mut live = self
                .start_fresh(sandbox, inner.epoch, nonce, report)
                .await?;
            live.committed = index.clone();
            live.index = index;
            return Ok((live, fetched));
        };
        report.progress("fetching processes", 0, Some(processes.bytes));
        let images = self.state.dump_dir()?;
        fetched += self
            .materialise(
                processes.tree,
                &images.path().join("images"),
                TreeKind::Upper,
            )
            .await
            .context("restoring process images")?;
        report.progress("restoring processes", 0, None);
        let layers = self.layers(&sandbox.record, dir, report).await?;
        let name = runtime_name(sandbox.id)?;
        let spec = spec_of(manifest)?;
        let local = LocalRecord {
            id: sandbox.id,
            epoch: inner.epoch,
            paused: false,
            init_nonce: nonce,
            spec,
            pristine: None,
        };
        sandbox.dir.save(&local)?;
        let created = self.runtime.restore(&name, &local.spec, &layers, &images.path().join("images")).await.map_err(HostError::from).map_err(|e| {
            let here = &self.compat;
            let from = &processes.compat;
            if (&here.kernel, &here.criu, &here.cpu_flags) == (&from.kernel, &from.criu, &from.cpu_flags) {
                return e;
            }
            e.context(format!(
                "they were dumped on kernel {} with CRIU {}, this host has kernel {} with CRIU {}{}",
                from.kernel,
                from.criu,
                here.kernel,
                here.criu,
                if here.cpu_flags == from.cpu_flags { "" } else { " and another CPU" }
            ))
        })?;
        let slot = self.watch(sandbox, &created)?;
        let mut live = self.live(name, created, slot, local).await?;
        // The images may have been another sandbox's: a fork's keys are its own.
        let forked = manifest.turn == TurnNo(1);
        self.forget_ended(sandbox, &live, forked).await?;
        live.committed = index.clone();
        live.index = index;
        Ok((live, fetched))
    }

    /// Commits a fork's first checkpoint. It needs the chunks of the one that it came from, so it rests on the round in which that was there.
    async fn commit_fork(
        &self,
        from: SandboxId,
        checkpoint: CheckpointId,
        mut commit: Commit,
    ) -> Result<()> {
        let client = &self.transfer.client;
        for _ in 0..PIN_AGAIN {
            commit.round = client.manifest_at(from, checkpoint).await?.1;
            match client.commit(commit.clone()).await {
                Err(e) if e.upload_again() => {
                    tracing::info!(error = %e, "a collection began: looking again");
                }
                other => return Ok(other?),
            }
        }
        Err(HostError::new(
            ErrorKind::Unavailable,
            "collections keep cutting this fork off",
        ))
    }

    /// Makes a new sandbox from a checkpoint of another.
    pub async fn fork(
        self: Arc<Self>,
        which: &str,
        request: ForkRequest,
        report: Reporter,
    ) -> Result<RestoreInfo> {
        let since = Instant::now();
        let from = self.find(which)?;
        if !valid_label(&request.name, 63) {
            return Err(HostError::invalid(format!(
                "{:?} cannot name a sandbox",
                request.name
            )));
        }
        let running = matches!(
            from.info().state,
            SandboxState::Running | SandboxState::Paused
        );
        let (checkpoint, manifest) = match &request.checkpoint {
            Some(which) => self.resolve_checkpoint(from.id, which).await?,
            None => {
                if running {
                    report.progress("taking a checkpoint", 0, None);
                    let name = from.id.to_string();
                    self.clone().checkpoint_now(&name).await?;
                }
                let head = self.head(from.id).await?;
                head.map(|(id, m, _)| (id, m)).ok_or_else(|| {
                    HostError::not_found(format!("{} has no checkpoint", from.record.name))
                })?
            }
        };
        let spec = spec_of(&manifest)?;
        let record = SandboxRecord {
            name: request.name,
            image_name: manifest.image_name.clone(),
            image: manifest.image,
            domain: from.record.domain.clone(),
            spec,
            ignore: from.record.ignore.clone(),
            agent: from.record.agent.clone(),
            init_nonce: manifest.init_nonce,
            created_ms: now_ms(),
        };
        let id = SandboxId(rand::random());
        let client = &self.transfer.client;
        let epoch = client
            .create_sandbox(id, &record.name, record.encode())
            .await?;
        let inner = Inner {
            epoch,
            turn: TurnNo(0),
            last: None,
            live: None,
            stale: false,
        };
        let sandbox = Sandbox::new(id, record, self.dir(id), &self.config.ignore, inner);
        sandbox.set_state(SandboxState::Starting);
        self.insert(sandbox.clone());
        let mut inner = sandbox.inner.lock().await;
        let made = async {
            // Its first checkpoint is the one it was forked from, under its own identity: it can be restored by itself from now on.
            let own = Manifest {
                sandbox: id,
                epoch,
                turn: TurnNo(1),
                parent: Some(checkpoint),
                created_ms: now_ms(),
                ..manifest.clone()
            };
            let encoded = own.encode();
            let own_id = Manifest::id_of(&encoded);
            let now = now_ms();
            let record = TurnRecord {
                turn: TurnNo(1),
                key: "fork".into(),
                command: format!("(fork of {} at {})", from.record.name, checkpoint.short()),
                started_ms: now,
                ended_ms: now,
                verdict: own.verdict,
                checkpoint: own_id,
                evidence: Evidence::default(),
                stats: TurnStats {
                    sent_bytes: encoded.len() as u64,
                    ..TurnStats::default()
                },
                result: None,
            };
            let commit = Commit {
                sandbox: id,
                epoch,
                turn: TurnNo(1),
                key: "fork".into(),
                record: record.encode(),
                manifest: Some((own_id, encoded)),
                session: None,
                round: 0,
                base: None,
            };
            self.commit_fork(from.id, checkpoint, commit).await?;
            inner.turn = TurnNo(1);
            let (live, fetched) = self
                .materialise_and_start(&sandbox, &inner, &own, &report)
                .await?;
            inner.live = Some(live);
            inner.last = Some((own_id, own));
            Ok((own_id, fetched))
        };
        match made.await {
            Ok((checkpoint, fetched)) => {
                sandbox.publish(&inner, SandboxState::Running);
                Ok(RestoreInfo {
                    sandbox: sandbox.info(),
                    checkpoint,
                    turn: TurnNo(1),
                    verified: true,
                    processes_restored: manifest.processes.as_ref().map_or(0, |p| p.count),
                    fetched_bytes: fetched,
                    duration_ms: since.elapsed().as_millis() as u64,
                })
            }
            Err(e) => {
                self.tear_down(&sandbox, &mut inner).await?;
                client.remove_sandbox(id, epoch).await?;
                self.forget(id);
                Err(HostError::context(
                    e,
                    format!("forking {}", from.record.name),
                ))
            }
        }
    }
}

/// How the sandbox of a checkpoint was set up.
fn spec_of(manifest: &Manifest) -> Result<SandboxSpec> {
    serde_json::from_slice(&manifest.spec).map_err(|e| {
        HostError::new(
            ErrorKind::Corruption,
            format!("the checkpoint's specification cannot be read: {e}"),
        )
    })
}
