//! The life of a sandbox on this host: creation, start, pause, removal.
//!
//! Order matters for crashes: a sandbox's name is claimed in the store before anything is made here, and its first checkpoint is committed before its creation is reported.
//!
//! Elsewhere on purpose: what was running before the daemon ([`crate::adopt`]), restores ([`crate::restore`]), turns ([`crate::sandbox`]), mounts and runc (`tidepool_sandbox`).

use std::path::PathBuf;
use std::sync::Arc;

use tidepool_inspector::look::Baseline;
use tidepool_inspector::memory::MemoryFiles;
use tidepool_inspector::{SandboxSlot, Target};
use tidepool_proto::api::*;
use tidepool_proto::ids::valid_label;
use tidepool_proto::{Epoch, ErrorKind, SandboxId, TurnNo};
use tidepool_sandbox::{Created, HostMount, Layers, Network, SandboxName, SandboxSpec};
use tidepool_scheduler_core::ignore::{self, Rules};

use crate::boundary::Cause;
use crate::error::{Context, HostError, Result, chain};
use crate::host::{Host, now_ms};
use crate::http::Reporter;
use crate::record::{LocalRecord, SandboxDir, SandboxRecord};
use crate::sandbox::{Inner, Live, Sandbox};

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
    pub(crate) fn dir(&self, id: SandboxId) -> SandboxDir {
        SandboxDir(self.state.sandboxes().join(id.to_string()))
    }

    pub(crate) fn init_key(&self, nonce: &[u8; 32]) -> [u8; 32] {
        self.transfer
            .key
            .derive("tidepool v1 init of a sandbox", nonce)
    }

    pub(crate) async fn layers(
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
        let rules = ignored(&self.config.ignore, &request.agent, &request.ignore)?;
        Rules::new(&rules).map_err(HostError::invalid)?;
        let record = SandboxRecord {
            ignore: request.ignore,
            agent: request.agent,
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
            &self.config.ignore,
            Inner {
                epoch,
                turn: TurnNo(0),
                last: None,
                live: None,
                stale: false,
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
    pub(crate) async fn start_fresh(
        &self,
        sandbox: &Sandbox,
        epoch: Epoch,
        nonce: [u8; 32],
        report: &Reporter,
    ) -> Result<Live> {
        let name = runtime_name(sandbox.id)?;
        let layers = self.layers(&sandbox.record, &sandbox.dir, report).await?;
        let local = LocalRecord {
            id: sandbox.id,
            epoch,
            paused: false,
            init_nonce: nonce,
            // A fresh init is this host's own.
            spec: SandboxSpec {
                init: Some(self.runtime.init_digest().to_owned()),
                ..sandbox.record.spec.clone()
            },
            pristine: None,
        };
        sandbox.dir.save(&local)?;
        let created = self
            .runtime
            .create(&name, &local.spec, &layers, &self.init_key(&nonce))
            .await?;
        let slot = self.watch(sandbox, &created)?;
        self.runtime.start(&name).await?;
        let mut live = self.live(name, created, slot, local).await?;
        let pid = live.init_pid;
        let memory = tokio::task::spawn_blocking(move || MemoryFiles::read(pid)).await?;
        live.local.pristine = Some(memory);
        sandbox.dir.save(&live.local)?;
        Ok(live)
    }

    pub(crate) async fn live(
        &self,
        name: SandboxName,
        created: Created,
        slot: SandboxSlot,
        local: LocalRecord,
    ) -> Result<Live> {
        let key = self.init_key(&local.init_nonce);
        let init = self.runtime.connect(&name, &key).await?;
        Ok(Live {
            name,
            init_pid: created.init_pid as u32,
            init,
            local,
            slot,
            index: None,
            committed: None,
            seen: Baseline::default(),
        })
    }

    /// Drops what an init that lived before this daemon keeps of ended jobs: of those that are journaled, which are answered from the journal, or of `all`,
    /// where they were another sandbox's.
    pub(crate) async fn forget_ended(
        &self,
        sandbox: &Sandbox,
        live: &Live,
        all: bool,
    ) -> Result<()> {
        for job in live.init.list().await? {
            if job.status.is_none() {
                continue;
            }
            if all
                || self
                    .transfer
                    .client
                    .turn_by_key(sandbox.id, &job.job)
                    .await?
                    .is_some()
            {
                live.init.forget(&job.job).await?;
            }
        }
        Ok(())
    }

    pub(crate) fn watch(&self, sandbox: &Sandbox, created: &Created) -> Result<SandboxSlot> {
        let target = Target {
            pid_ns_inode: created.pid_ns_inode,
            upper_dir: sandbox.dir.upper(),
        };
        self.inspector
            .register(&target)
            .map_err(|e| HostError::failed(format!("watching the sandbox: {}", chain(&e))))
    }

    /// Ends what runs of a sandbox here and removes its directory. Done where there is nothing.
    pub(crate) async fn tear_down(&self, sandbox: &Sandbox, inner: &mut Inner) -> Result<()> {
        if let Some(live) = inner.live.take() {
            self.inspector.unregister(live.slot);
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
        let mut inner = sandbox.inner.lock().await;
        let state = sandbox.info().state;
        let Some(live) = inner.live.as_mut().filter(|_| state != SandboxState::Dead) else {
            return Err(HostError::conflict(format!(
                "{} does not run here",
                sandbox.record.name
            )));
        };
        live.local.paused = paused;
        sandbox.dir.save(&live.local)?;
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
}

/// All lines that say what is ignored in a sandbox, in the order in which they count: the daemon's, its agent's, its own.
pub(crate) fn ignored(
    host: &[String],
    agent: &Option<String>,
    own: &[String],
) -> Result<Vec<String>> {
    let of_agent = match agent {
        None => &[],
        Some(name) => ignore::agent_lines(name).ok_or_else(|| {
            let known: Vec<&str> = ignore::agents().collect();
            HostError::invalid(format!(
                "no bookkeeping of an agent named {name:?} is known: {}",
                known.join(", ")
            ))
        })?,
    };
    let of_agent = of_agent.iter().map(|l| (*l).to_owned());
    Ok(host
        .iter()
        .cloned()
        .chain(of_agent)
        .chain(own.iter().cloned())
        .collect())
}

/// What the container runtime calls a sandbox.
pub(crate) fn runtime_name(id: SandboxId) -> Result<SandboxName> {
    Ok(SandboxName::new(&id.to_string())?)
}
