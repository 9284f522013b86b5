//! The life of sandboxes on this host: creation, adoption after a restart of the daemon, restore, rollback, fork, removal.
//!
//! Order matters for crashes: a sandbox's name is claimed in the store before anything is made here, its first checkpoint is committed before creation is reported, and
//! a restore takes a new epoch before it touches anything, so that whatever ran before can no longer commit.
//!
//! Elsewhere on purpose: turns ([`crate::sandbox`]), captures ([`crate::capture`]), mounts and runc (`tidepool_sandbox`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tidepool_fs::{TreeKind, load_node, load_root};
use tidepool_inspector::Target;
use tidepool_proto::api::*;
use tidepool_proto::ids::valid_label;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::{Evidence, TurnRecord, TurnStats, Verdict};
use tidepool_proto::{CheckpointId, Epoch, ErrorKind, SandboxId, TreeId, TurnNo};
use tidepool_sandbox::{Created, HostMount, Layers, Network, SandboxName, SandboxSpec, State};
use tidepool_scheduler_core::diff::{TreeDiff, diff};
use tidepool_store_client::Commit;

use crate::capture::Cause;
use crate::error::{Context, HostError, Result, chain};
use crate::host::{Host, decode_record, now_ms, restore_error};
use crate::http::Reporter;
use crate::observe::MemoryFiles;
use crate::record::{LocalRecord, SandboxDir, SandboxRecord};
use crate::sandbox::{Inner, Live, Sandbox};
use crate::transfer::source_error;

impl From<tidepool_sandbox::SandboxError> for HostError {
    fn from(e: tidepool_sandbox::SandboxError) -> Self {
        use tidepool_sandbox::SandboxError as S;
        let kind = match &e {
            S::Invalid(_) => ErrorKind::Invalid,
            S::Exists(_) => ErrorKind::Conflict,
            S::NotFound(_) => ErrorKind::NotFound,
            S::NotRunning(_)
            | S::MissingRuntime { .. }
            | S::MissingCriu { .. }
            | S::MissingInit(_) => ErrorKind::Unavailable,
            S::Refused { kind, .. } => match kind {
                tidepool_sandbox::ErrorKind::NotFound => ErrorKind::NotFound,
                tidepool_sandbox::ErrorKind::Invalid => ErrorKind::Invalid,
                tidepool_sandbox::ErrorKind::TooMany => ErrorKind::Unavailable,
                _ => ErrorKind::Failed,
            },
            _ => ErrorKind::Failed,
        };
        HostError::new(kind, chain(&e))
    }
}

impl Host {
    fn dir(&self, id: SandboxId) -> SandboxDir {
        SandboxDir(self.state.sandboxes().join(id.to_string()))
    }

    fn init_key(&self, nonce: &[u8; 32]) -> [u8; 32] {
        self.transfer
            .key
            .derive("tidepool v1 init of a sandbox", nonce)
    }

    async fn layers(
        &self,
        record: &SandboxRecord,
        dir: &SandboxDir,
        report: &Reporter,
    ) -> Result<Layers> {
        let root = self.image_root(record.image, report).await?;
        for path in [dir.upper(), dir.work(), dir.merged()] {
            std::fs::create_dir_all(&path).context(format!("making {}", path.display()))?;
        }
        Ok(Layers {
            lower: vec![root],
            upper: dir.upper(),
            work: dir.work(),
            merged: dir.merged(),
        })
    }

    /// Creates and starts a sandbox and commits its first checkpoint.
    pub async fn create(
        self: Arc<Self>,
        request: CreateSandbox,
        report: Reporter,
    ) -> Result<SandboxInfo> {
        if !valid_label(&request.name, 63) {
            return Err(HostError::invalid(format!(
                "{:?} cannot name a sandbox: 1 to 63 letters, digits and . _ -, beginning with a letter or digit",
                request.name
            )));
        }
        let image = self.image(&request.image).await?;
        let spec = self.spec(&request, &image)?;
        spec.validate().map_err(HostError::from)?;
        let record = SandboxRecord {
            name: request.name,
            image_name: image.name,
            image: image.tree,
            domain: self.domain.clone(),
            spec,
            init_nonce: rand::random(),
            created_ms: now_ms(),
        };
        let id = SandboxId(rand::random());
        let client = &self.transfer.client;
        let epoch = client
            .create_sandbox(id, &record.name, record.encode())
            .await?;
        let sandbox = Sandbox::new(
            id,
            record,
            self.dir(id),
            Inner {
                epoch,
                turn: TurnNo(0),
                last: None,
                live: None,
            },
        );
        sandbox.set_state(SandboxState::Starting);
        self.insert(sandbox.clone());
        let mut inner = sandbox.inner.lock().await;
        let started = async {
            report.progress("starting", 0, None);
            let live = self
                .start_fresh(&sandbox, epoch, sandbox.record.init_nonce, &report)
                .await?;
            inner.live = Some(live);
            let cause = Cause {
                key: "create".into(),
                command: String::new(),
                started_ms: now_ms(),
                result: None,
            };
            sandbox.publish(&inner, SandboxState::Running);
            sandbox.boundary(&self, &mut inner, cause).await
        };
        if let Err(e) = started.await {
            // Nobody was told of it: all of it goes.
            self.tear_down(&sandbox, &mut inner).await?;
            client.remove_sandbox(id, epoch).await?;
            self.forget(id);
            return Err(e.context(format!("creating {}", sandbox.record.name)));
        }
        Ok(sandbox.info())
    }

    fn spec(&self, request: &CreateSandbox, image: &ImageInfo) -> Result<SandboxSpec> {
        let mut env = image.env.clone();
        env.extend(request.env.iter().cloned());
        Ok(SandboxSpec {
            hostname: request.name.clone(),
            env,
            cwd: request.cwd.clone().unwrap_or_else(|| image.cwd.clone()),
            user: request.user.clone().unwrap_or_default(),
            memory_bytes: request.memory_bytes,
            pids: request.pids,
            network: if request.network {
                Network::Nat
            } else {
                Network::None
            },
            mounts: request
                .mounts
                .iter()
                .map(|m| HostMount {
                    source: PathBuf::from(&m.source),
                    target: PathBuf::from(&m.target),
                    read_only: m.read_only,
                })
                .collect(),
            init: Some(self.runtime.init_digest().to_owned()),
            ..SandboxSpec::default()
        })
    }

    /// Starts a sandbox with nothing but its init, on whatever its upper holds.
    async fn start_fresh(
        &self,
        sandbox: &Sandbox,
        epoch: Epoch,
        nonce: [u8; 32],
        report: &Reporter,
    ) -> Result<Live> {
        let name = runtime_name(sandbox.id)?;
        let layers = self.layers(&sandbox.record, &sandbox.dir, report).await?;
        self.save_local(sandbox, epoch, nonce, false, None)?;
        // A fresh init is this host's own.
        let spec = SandboxSpec {
            init: None,
            ..sandbox.record.spec.clone()
        };
        let created = self
            .runtime
            .create(&name, &spec, &layers, &self.init_key(&nonce))
            .await?;
        let slot = self.watch(sandbox, &created)?;
        self.runtime.start(&name).await?;
        let mut live = self.live(name, created, slot, nonce).await?;
        let pid = live.init_pid;
        live.pristine = Some(tokio::task::spawn_blocking(move || MemoryFiles::read(pid)).await?);
        self.save_local(sandbox, epoch, nonce, false, live.pristine.clone())?;
        Ok(live)
    }

    async fn live(
        &self,
        name: SandboxName,
        created: Created,
        slot: Option<tidepool_inspector::SandboxSlot>,
        nonce: [u8; 32],
    ) -> Result<Live> {
        let init = self.runtime.connect(&name, &self.init_key(&nonce)).await?;
        Ok(Live {
            name,
            init_pid: created.init_pid as u32,
            init,
            nonce,
            slot,
            index: None,
            tasks: None,
            memory: None,
            pristine: None,
        })
    }

    fn watch(
        &self,
        sandbox: &Sandbox,
        created: &Created,
    ) -> Result<Option<tidepool_inspector::SandboxSlot>> {
        let Some(inspector) = &self.inspector else {
            return Ok(None);
        };
        let target = Target {
            pid_ns_inode: created.pid_ns_inode,
            upper_dir: sandbox.dir.upper(),
        };
        match inspector.register(&target) {
            Ok(slot) => Ok(Some(slot)),
            Err(e) => Err(HostError::failed(format!(
                "watching the sandbox: {}",
                chain(&e)
            ))),
        }
    }

    fn save_local(
        &self,
        sandbox: &Sandbox,
        epoch: Epoch,
        init_nonce: [u8; 32],
        paused: bool,
        pristine: Option<MemoryFiles>,
    ) -> Result<()> {
        sandbox.dir.save(&LocalRecord {
            id: sandbox.id,
            epoch,
            paused,
            init_nonce,
            pristine,
        })
    }

    /// Ends what runs of a sandbox here and removes its directory. Done where there is nothing.
    async fn tear_down(&self, sandbox: &Sandbox, inner: &mut Inner) -> Result<()> {
        if let Some(live) = inner.live.take()
            && let (Some(inspector), Some(slot)) = (&self.inspector, live.slot)
        {
            inspector.unregister(slot);
        }
        self.runtime.destroy(&runtime_name(sandbox.id)?).await?;
        let dir = sandbox.dir.clone();
        tokio::task::spawn_blocking(move || dir.remove()).await??;
        sandbox.publish(inner, SandboxState::Dead);
        Ok(())
    }

    /// Removes a sandbox from this host; with `forget` its checkpoints too.
    pub async fn remove(&self, which: &str, forget: bool) -> Result<()> {
        let sandbox = self.find(which)?;
        // A command that still runs would hold the turn for as long as it likes: it ends with the sandbox.
        self.runtime.destroy(&runtime_name(sandbox.id)?).await?;
        let mut inner = sandbox.inner.lock().await;
        self.tear_down(&sandbox, &mut inner).await?;
        if forget {
            self.transfer
                .client
                .remove_sandbox(sandbox.id, inner.epoch)
                .await?;
            self.forget(sandbox.id);
        }
        Ok(())
    }

    /// Freezes a sandbox or lets it go on.
    pub async fn set_paused(&self, which: &str, paused: bool) -> Result<SandboxInfo> {
        let sandbox = self.find(which)?;
        let inner = sandbox.inner.lock().await;
        let state = sandbox.info().state;
        let Some(live) = inner.live.as_ref().filter(|_| state != SandboxState::Dead) else {
            return Err(HostError::conflict(format!(
                "{} does not run here",
                sandbox.record.name
            )));
        };
        self.save_local(
            &sandbox,
            inner.epoch,
            live.nonce,
            paused,
            live.pristine.clone(),
        )?;
        match paused {
            true => self.runtime.pause(&live.name).await?,
            false => self.runtime.resume(&live.name).await?,
        }
        sandbox.set_state(if paused {
            SandboxState::Paused
        } else {
            SandboxState::Running
        });
        Ok(sandbox.info())
    }

    /// Takes a checkpoint without a command.
    pub async fn checkpoint_now(self: Arc<Self>, which: &str) -> Result<TurnInfo> {
        let sandbox = self.find(which)?;
        let mut inner = sandbox.inner.lock().await;
        if sandbox.info().state == SandboxState::Dead {
            return Err(HostError::conflict(format!(
                "{} does not run here",
                sandbox.record.name
            )));
        }
        let cause = Cause {
            key: format!("checkpoint-{}", hex::encode(rand::random::<[u8; 8]>())),
            command: "(checkpoint)".into(),
            started_ms: now_ms(),
            result: None,
        };
        sandbox.boundary(&self, &mut inner, cause).await
    }

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

    /// The checkpoint that holds a sandbox's newest committed state, and its newest turn.
    async fn head(&self, id: SandboxId) -> Result<Option<(CheckpointId, Manifest, TurnNo)>> {
        let record = self.transfer.client.sandbox(id).await?;
        let Some(record) = record else {
            return Err(HostError::not_found("the store does not know the sandbox"));
        };
        if record.last_turn == TurnNo(0) {
            return Ok(None);
        }
        let newest = self.transfer.client.turns(id, record.last_turn, 1).await?;
        let Some(newest) = newest.first() else {
            return Err(HostError::new(
                ErrorKind::Corruption,
                "the newest turn's record is missing",
            ));
        };
        let newest = TurnRecord::decode(newest)?;
        let manifest = self.manifest(id, newest.checkpoint).await?;
        Ok(Some((newest.checkpoint, manifest, newest.turn)))
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
        self.save_local(sandbox, inner.epoch, nonce, false, None)?;
        let name = runtime_name(sandbox.id)?;
        let spec: SandboxSpec = serde_json::from_slice(&manifest.spec).map_err(|e| {
            HostError::new(
                ErrorKind::Corruption,
                format!("the checkpoint's specification cannot be read: {e}"),
            )
        })?;
        let created = self.runtime.restore(&name, &spec, &layers, &images.path().join("images")).await.map_err(HostError::from).map_err(|e| {
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
        let mut live = self.live(name, created, slot, nonce).await?;
        live.index = index;
        Ok((live, fetched))
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
        let spec: SandboxSpec = serde_json::from_slice(&manifest.spec).map_err(|e| {
            HostError::new(
                ErrorKind::Corruption,
                format!("the checkpoint's specification cannot be read: {e}"),
            )
        })?;
        let record = SandboxRecord {
            name: request.name,
            image_name: manifest.image_name.clone(),
            image: manifest.image,
            domain: from.record.domain.clone(),
            spec,
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
        };
        let sandbox = Sandbox::new(id, record, self.dir(id), inner);
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
            };
            client.commit(commit).await?;
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

    /// At start: lists what the store knows, takes over what runs here, clears what is left of the rest.
    pub(crate) async fn adopt_all(&self) -> Result<()> {
        for known in self.transfer.client.sandboxes().await? {
            let record = decode_record(known.id, &known.meta)?;
            let inner = Inner {
                epoch: known.epoch,
                turn: known.last_turn,
                last: None,
                live: None,
            };
            let sandbox = Sandbox::new(known.id, record, self.dir(known.id), inner);
            let mut inner = sandbox.inner.lock().await;
            if known.last_turn == TurnNo(0) {
                // Its creation was cut short before anyone was told.
                tracing::info!(sandbox = %sandbox.record.name, "an unfinished creation is cleared");
                self.tear_down(&sandbox, &mut inner).await?;
                self.transfer
                    .client
                    .remove_sandbox(known.id, known.epoch)
                    .await?;
                continue;
            }
            inner.last = self.head(known.id).await?.map(|(id, m, _)| (id, m));
            match self.adopt(&sandbox, &mut inner).await {
                Ok(true) => {
                    tracing::info!(sandbox = %sandbox.record.name, turn = %inner.turn, "adopted")
                }
                Ok(false) => self.tear_down(&sandbox, &mut inner).await?,
                Err(e) => {
                    tracing::warn!(sandbox = %sandbox.record.name, error = %e, "it cannot be adopted and is ended; it can be restored");
                    self.tear_down(&sandbox, &mut inner).await?;
                }
            }
            drop(inner);
            self.insert(sandbox);
        }
        self.clear_strangers().await
    }

    /// Takes over a sandbox that may run here. False where it does not.
    async fn adopt(&self, sandbox: &Sandbox, inner: &mut Inner) -> Result<bool> {
        let Some(local) = sandbox.dir.load()? else {
            return Ok(false);
        };
        if local.epoch != inner.epoch {
            // Another holder took over, or a restore was cut short: what runs here can never commit again.
            return Ok(false);
        }
        let name = runtime_name(sandbox.id)?;
        let created = match self.runtime.state(&name).await? {
            State::Running(created) => created,
            State::Paused(created) => {
                // A capture that was cut short leaves it frozen; only a user's own pause stays.
                if !local.paused {
                    self.runtime.resume(&name).await?;
                }
                created
            }
            _ => return Ok(false),
        };
        let paused = local.paused;
        if paused {
            // Init answers only while it runs.
            self.runtime.resume(&name).await?;
        }
        let slot = self.watch(sandbox, &created)?;
        let live = self
            .live(name.clone(), created, slot, local.init_nonce)
            .await;
        if paused {
            self.runtime.pause(&name).await?;
        }
        let mut live = live?;
        live.pristine = local.pristine;
        inner.live = Some(live);
        let state = if paused {
            SandboxState::Paused
        } else {
            SandboxState::Running
        };
        sandbox.publish(inner, state);
        Ok(true)
    }

    /// Ends and removes what lies here of sandboxes the store does not know.
    async fn clear_strangers(&self) -> Result<()> {
        let known: Vec<String> = self.all().iter().map(|s| s.id.to_string()).collect();
        for (name, _) in self.runtime.list().await? {
            if !known.iter().any(|k| k == name.as_str()) {
                tracing::warn!(%name, "a sandbox the store does not know is removed");
                self.runtime.destroy(&name).await?;
            }
        }
        let dir = self.state.sandboxes();
        for entry in std::fs::read_dir(&dir).context(format!("reading {}", dir.display()))? {
            let entry = entry.context("reading the sandboxes' directory")?;
            if !known.iter().any(|k| entry.file_name() == k.as_str()) {
                crate::record::remove_tree(&entry.path())?;
            }
        }
        Ok(())
    }

    /// What differs between two trees of the store.
    pub(crate) async fn compare(
        &self,
        before: TreeId,
        after: TreeId,
        limit: usize,
    ) -> Result<TreeDiff> {
        let mut source = self.transfer.fetcher();
        let found = tokio::task::spawn_blocking(move || {
            let (a, b) = (
                load_root(&mut source, before)?,
                load_root(&mut source, after)?,
            );
            diff(&a, &b, limit, |blob| load_node(&mut source, blob))
        });
        found.await?.map_err(|e| source_error(&e))
    }

    /// What differs between two checkpoints of a sandbox.
    pub async fn diff(&self, which: &str, from: &str, to: Option<&str>) -> Result<CheckpointDiff> {
        const LIMIT: usize = 10_000;
        let sandbox = self.find(which)?;
        let (from_id, before) = self.resolve_checkpoint(sandbox.id, from).await?;
        let (to_id, after) = match to {
            Some(to) => self.resolve_checkpoint(sandbox.id, to).await?,
            None => self
                .head(sandbox.id)
                .await?
                .map(|(id, m, _)| (id, m))
                .ok_or_else(|| HostError::not_found("there is no checkpoint"))?,
        };
        let found = self.compare(before.upper, after.upper, LIMIT).await?;
        Ok(CheckpointDiff {
            from: from_id,
            to: to_id,
            paths: found.changes,
            truncated: found.truncated,
            processes_differ: before.processes != after.processes,
        })
    }
}

fn runtime_name(id: SandboxId) -> Result<SandboxName> {
    Ok(SandboxName::new(&id.to_string())?)
}
