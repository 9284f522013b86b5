//! The daemon's state, its start and end, and how requests find what they name.
//!
//! Invariants: every sandbox the store knows is in `sandboxes` (dead, unless it runs here); what runs here and is not in the store, or whose epoch is not the
//! store's, is destroyed at start, since it can never commit again.
//!
//! Elsewhere on purpose: creating, removing and restoring ([`crate::restore`]), turns ([`crate::sandbox`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tidepool_fs::TreeKind;
use tidepool_fs::restore::{RestoreError, RestoreOptions};
use tidepool_inspector::{Inspector, InspectorOptions};
use tidepool_proto::api::*;
use tidepool_proto::manifest::{Compat, Manifest};
use tidepool_proto::turn::TurnRecord;
use tidepool_proto::{CheckpointId, DomainId, ErrorKind, SandboxId, TreeId, TurnNo};
use tidepool_sandbox::{Runtime, RuntimeConfig};
use tidepool_scheduler_core::pages::PageIndex;
use tidepool_store::{Node, NodeConfig};
use tidepool_store_client::{Client, ClientConfig};
use tokio::sync::Semaphore;

use crate::config::Config;
use crate::error::{Context, HostError, Result, chain};
use crate::keys;
use crate::record::SandboxRecord;
use crate::sandbox::Sandbox;
use crate::state_dir::StateDir;
use crate::transfer::{Transfer, source_error};

/// Pages whose place is remembered for dedup of process images: 1 GiB worth.
const PAGE_INDEX: usize = 256 << 10;

/// The daemon.
pub struct Host {
    pub config: Config,
    pub(crate) state: StateDir,
    pub(crate) transfer: Transfer,
    pub(crate) domain: DomainId,
    pub(crate) runtime: Runtime,
    /// None where no probe could be loaded: every boundary then walks.
    pub(crate) inspector: Option<Arc<Inspector>>,
    pub(crate) pages: Arc<Mutex<PageIndex>>,
    pub(crate) compat: Compat,
    /// Process dumps at one time: as many as there are cores (more only slow each other down).
    pub(crate) dumps: Semaphore,
    /// One image is unpacked at a time.
    pub(crate) importing: tokio::sync::Mutex<()>,
    sandboxes: RwLock<BTreeMap<SandboxId, Arc<Sandbox>>>,
    warnings: Vec<String>,
    /// Taken out at the end.
    node: tokio::sync::Mutex<Option<Node>>,
    started: Instant,
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

/// A lock whose holder cannot leave it half-changed; a panic elsewhere does not matter to it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn load_inspector(warnings: &mut Vec<String>) -> Option<Arc<Inspector>> {
    match Inspector::load(&InspectorOptions::default()) {
        Ok(inspector) => Some(Arc::new(inspector)),
        Err(e) => {
            warnings.push(format!(
                "no eBPF probe could be loaded ({}): every turn walks the sandbox's files, and processes that live through a turn are always dumped",
                chain(&e)
            ));
            None
        }
    }
}

fn runtime_config(config: &Config, run: PathBuf, kept: PathBuf) -> RuntimeConfig {
    let mut runtime = RuntimeConfig::new(run, kept);
    runtime.runc.clone_from(&config.runc);
    if let Some(criu) = &config.criu {
        runtime.criu.clone_from(criu);
    }
    runtime
}

/// Checks what the daemon needs by using it, and says what does not work.
///
/// # Errors
/// Unavailable where sandboxes could not be run or watched at all.
pub async fn check(config: &Config) -> Result<()> {
    let mut warnings = Vec::new();
    let inspector = load_inspector(&mut warnings);
    println!("inspector: {}", inspector.map_or("none", |i| i.probe_set()));
    let dir = std::env::temp_dir().join(format!("tidepool-check-{}", std::process::id()));
    let runtime = Runtime::new(runtime_config(config, dir.join("run"), dir.join("state"))).await;
    let _ = std::fs::remove_dir_all(&dir);
    match runtime {
        Ok(runtime) => {
            let found = runtime.capabilities();
            println!("runc: {}", found.runc);
            match &found.criu {
                Ok(version) => println!("criu: {version}"),
                Err(why) => warnings.push(format!("processes cannot be checkpointed: {why}")),
            }
        }
        Err(e) => warnings.push(format!("runc: {}", chain(&e))),
    }
    for warning in &warnings {
        println!("warning: {warning}");
    }
    if warnings.is_empty() {
        Ok(())
    } else {
        Err(HostError::new(
            ErrorKind::Unavailable,
            "this machine lacks what the warnings name",
        ))
    }
}

impl Host {
    /// Starts the daemon: state, store, inspector, runtime; then adopts what runs.
    pub async fn start(config: Config) -> Result<Arc<Self>> {
        let domain: DomainId = config
            .domain
            .parse()
            .map_err(|e| HostError::invalid(format!("--domain: {e}")))?;
        let state = StateDir::open(&config.state_dir, config.image_gib, &config.dump_dir)?;
        let mut warnings: Vec<String> = state.note.iter().cloned().collect();
        let key = keys::load_or_create(&state.root().join("domain.key"))?;
        let node = Node::start(NodeConfig {
            listen: config.store_listen,
            ..NodeConfig::embedded(state.store())
        })
        .await
        .map_err(|e| HostError::failed(format!("starting the store: {}", chain(&e))))?;
        let client = Client::connect(ClientConfig::new(
            vec![node.local_addr()],
            node.client_identity(),
        ))
        .await?;
        // One control group a state directory, so that two daemons of one machine never meet.
        let tag = blake3::hash(state.root().as_os_str().as_encoded_bytes()).to_hex();
        let found = RuntimeConfig {
            cgroup_parent: format!("tidepool-{}", &tag[..8]),
            ..runtime_config(&config, state.run(), state.root().join("runtime"))
        };
        let criu = found.criu.clone();
        let runtime = Runtime::new(found)
            .await
            .map_err(|e| HostError::from(e).context("preparing the container runtime"))?;
        let found = runtime.capabilities();
        if let Err(why) = &found.criu {
            warnings.push(format!(
                "turns that leave processes behind cannot be checkpointed: {}: {why}",
                criu.display()
            ));
        }
        let compat = compat(found.criu.clone().unwrap_or_default())?;
        let inspector = load_inspector(&mut warnings);
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let host = Arc::new(Self {
            transfer: Transfer {
                client,
                key,
                seal: true,
            },
            domain,
            runtime,
            inspector,
            pages: Arc::new(Mutex::new(PageIndex::new(PAGE_INDEX))),
            compat,
            dumps: Semaphore::new(cores),
            importing: tokio::sync::Mutex::new(()),
            sandboxes: RwLock::default(),
            warnings,
            node: tokio::sync::Mutex::new(Some(node)),
            started: Instant::now(),
            state,
            config,
        });
        host.sweep_images()?;
        host.adopt_all().await?;
        Ok(host)
    }

    /// Waits until the store stops by itself because a write failed: nothing can be committed any more.
    pub async fn store_failed(&self) -> HostError {
        // Held while waiting; whoever shuts down has dropped this future before.
        match &*self.node.lock().await {
            Some(node) => HostError::new(ErrorKind::Unavailable, chain(&node.failed().await)),
            None => std::future::pending().await,
        }
    }

    /// Waits for running boundaries and closes the store. Sandboxes run on.
    pub async fn shutdown(&self) -> Result<()> {
        for sandbox in self.all() {
            // A boundary holds this; an exec that still runs does not end with the daemon.
            let _ =
                tokio::time::timeout(std::time::Duration::from_secs(30), sandbox.boundary_done())
                    .await;
        }
        let node = self.node.lock().await.take();
        if let Some(node) = node {
            node.shutdown().await;
        }
        self.runtime.close();
        self.state.close();
        Ok(())
    }

    /// All known sandboxes, oldest first.
    pub fn all(&self) -> Vec<Arc<Sandbox>> {
        let mut all: Vec<_> = self
            .sandboxes
            .read()
            .unwrap_or_else(|e| e.into_inner())
            .values()
            .cloned()
            .collect();
        all.sort_by_key(|s| (s.record.created_ms, s.id));
        all
    }

    pub(crate) fn insert(&self, sandbox: Arc<Sandbox>) {
        let mut all = self.sandboxes.write().unwrap_or_else(|e| e.into_inner());
        all.insert(sandbox.id, sandbox);
    }

    pub(crate) fn forget(&self, id: SandboxId) {
        self.sandboxes
            .write()
            .unwrap_or_else(|e| e.into_inner())
            .remove(&id);
    }

    /// The sandbox of this name, id or unique prefix of an id.
    pub fn find(&self, which: &str) -> Result<Arc<Sandbox>> {
        let all = self.sandboxes.read().unwrap_or_else(|e| e.into_inner());
        if let Some(found) = all.values().find(|s| s.record.name == which) {
            return Ok(found.clone());
        }
        let prefixed: Vec<_> = all
            .values()
            .filter(|s| which.len() >= 4 && s.id.to_string().starts_with(which))
            .collect();
        match prefixed.as_slice() {
            [one] => Ok(Arc::clone(one)),
            [] => Err(HostError::not_found(format!(
                "there is no sandbox {which:?}; `tidepool sandbox list` shows those there are"
            ))),
            _ => Err(HostError::invalid(format!(
                "{which:?} begins the ids of several sandboxes"
            ))),
        }
    }

    /// The daemon and what it runs on.
    pub async fn status(&self) -> Result<HostStatus> {
        let store = self.transfer.client.status().await?;
        let all = self.all();
        let running = all
            .iter()
            .filter(|s| s.info().state == SandboxState::Running)
            .count();
        let found = self.runtime.capabilities();
        Ok(HostStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: self.config.host_name.clone().unwrap_or_else(|| {
                rustix::system::uname()
                    .nodename()
                    .to_string_lossy()
                    .into_owned()
            }),
            uptime_s: self.started.elapsed().as_secs(),
            state_dir: self.state.root().display().to_string(),
            probe_set: self
                .inspector
                .as_ref()
                .map_or("walk", |i| i.probe_set())
                .to_owned(),
            runc: Some(found.runc.clone()),
            criu: found.criu.clone().ok(),
            kernel: self.compat.kernel.clone(),
            warnings: self.warnings.clone(),
            store: StoreStatus {
                endpoint: "embedded".into(),
                chunks: store.chunks,
                chunk_bytes: store.chunk_bytes,
                ready: store.ready,
            },
            sandboxes_running: running as u64,
            sandboxes_total: all.len() as u64,
        })
    }

    /// Turn records of a sandbox from `from` on.
    pub async fn turns(&self, which: &str, from: TurnNo, limit: u32) -> Result<Vec<TurnInfo>> {
        let id = self.find(which)?.id;
        let records = self.transfer.client.turns(id, from, limit).await?;
        records.iter().map(|bytes| turn_info(bytes)).collect()
    }

    /// Committed manifests of a sandbox, oldest first.
    pub(crate) async fn manifests(&self, id: SandboxId) -> Result<Vec<(CheckpointId, Manifest)>> {
        let all = self.transfer.client.manifests(id).await?;
        all.into_iter()
            .map(|(_, checkpoint, bytes)| Ok((checkpoint, checked_manifest(checkpoint, &bytes)?)))
            .collect()
    }

    pub(crate) async fn manifest(
        &self,
        id: SandboxId,
        checkpoint: CheckpointId,
    ) -> Result<Manifest> {
        let bytes = self.transfer.client.manifest(id, checkpoint).await?;
        checked_manifest(checkpoint, &bytes)
    }

    /// The checkpoints of a sandbox, oldest first.
    pub async fn checkpoints(&self, which: &str) -> Result<Vec<CheckpointInfo>> {
        let sandbox = self.find(which)?;
        let all = self.manifests(sandbox.id).await?;
        Ok(all.iter().map(|(id, m)| checkpoint_info(*id, m)).collect())
    }

    /// One checkpoint.
    pub async fn checkpoint(&self, which: &str, checkpoint: &str) -> Result<CheckpointInfo> {
        let sandbox = self.find(which)?;
        let (id, manifest) = self.resolve_checkpoint(sandbox.id, checkpoint).await?;
        Ok(checkpoint_info(id, &manifest))
    }

    /// The checkpoint that an id, a unique prefix of one, or `@TURN` names.
    pub(crate) async fn resolve_checkpoint(
        &self,
        id: SandboxId,
        which: &str,
    ) -> Result<(CheckpointId, Manifest)> {
        if let Some(turn) = which.strip_prefix('@') {
            let turn: u64 = turn
                .parse()
                .map_err(|_| HostError::invalid(format!("{which:?} is not a turn such as @3")))?;
            let records = self.transfer.client.turns(id, TurnNo(turn), 1).await?;
            let record = records.first().map(|b| TurnRecord::decode(b)).transpose()?;
            let record = record
                .filter(|r| r.turn.0 == turn)
                .ok_or_else(|| HostError::not_found(format!("there is no turn {turn}")))?;
            return Ok((
                record.checkpoint,
                self.manifest(id, record.checkpoint).await?,
            ));
        }
        if let Ok(full) = which.parse::<CheckpointId>() {
            return Ok((full, self.manifest(id, full).await?));
        }
        let hex = which.len() >= 4 && which.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex {
            return Err(HostError::invalid(format!(
                "{which:?} is neither a checkpoint's id (or 4 digits of it) nor a turn such as @3"
            )));
        }
        let mut found = self.manifests(id).await?;
        found.retain(|(c, _)| c.to_string().starts_with(&which.to_ascii_lowercase()));
        match found.len() {
            1 => Ok(found.remove(0)),
            0 => Err(HostError::not_found(format!(
                "there is no checkpoint {which}"
            ))),
            _ => Err(HostError::invalid(format!(
                "{which} begins the ids of several checkpoints"
            ))),
        }
    }

    /// Materialises a tree at `dest` (absent or empty), from the store. Answers the bytes of bodies fetched.
    pub(crate) async fn materialise(
        &self,
        tree: TreeId,
        dest: &Path,
        kind: TreeKind,
    ) -> Result<u64> {
        let dest = PathBuf::from(dest);
        let mut source = self.transfer.fetcher();
        let fetched = source.fetched();
        let options = RestoreOptions {
            kind,
            ..RestoreOptions::default()
        };
        tokio::task::spawn_blocking(move || {
            tidepool_fs::restore::materialise(tree, &dest, &mut source, options)
        })
        .await?
        .map_err(|e| restore_error(&e))?;
        Ok(fetched.load(Ordering::Relaxed))
    }
}

/// What a failed materialisation means to whoever asked.
pub(crate) fn restore_error(e: &RestoreError) -> HostError {
    let kind = match e {
        e if e.is_corruption() => ErrorKind::Corruption,
        RestoreError::Source { source, .. } => source_error(source).kind,
        RestoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            ErrorKind::Unavailable
        }
        _ => ErrorKind::Failed,
    };
    HostError::new(kind, chain(e))
}

fn checked_manifest(id: CheckpointId, bytes: &[u8]) -> Result<Manifest> {
    if Manifest::id_of(bytes) != id {
        return Err(HostError::new(
            ErrorKind::Corruption,
            format!("the manifest of checkpoint {id} was damaged"),
        ));
    }
    Ok(Manifest::decode(bytes)?)
}

/// A manifest as the API shows it.
pub(crate) fn checkpoint_info(id: CheckpointId, m: &Manifest) -> CheckpointInfo {
    CheckpointInfo {
        id,
        sandbox: m.sandbox,
        turn: m.turn,
        epoch: m.epoch,
        parent: m.parent,
        created_ms: m.created_ms,
        verdict: m.verdict,
        image: m.image_name.clone(),
        image_tree: m.image,
        upper_tree: m.upper,
        upper_bytes: m.upper_bytes,
        process_tree: m.processes.as_ref().map(|p| p.tree),
        process_bytes: m.processes.as_ref().map_or(0, |p| p.bytes),
        process_count: m.processes.as_ref().map_or(0, |p| p.count),
    }
}

/// A turn record as the API shows it.
pub(crate) fn turn_info(bytes: &[u8]) -> Result<TurnInfo> {
    let r = TurnRecord::decode(bytes)?;
    Ok(TurnInfo {
        turn: r.turn,
        key: r.key,
        command: r.command,
        started_ms: r.started_ms,
        ended_ms: r.ended_ms,
        verdict: r.verdict,
        checkpoint: r.checkpoint,
        evidence: r.evidence,
        stats: r.stats,
        record_bytes: bytes.len() as u64,
        status: r.result.map(|x| x.status),
    })
}

fn compat(criu: String) -> Result<Compat> {
    let uname = rustix::system::uname();
    let info = std::fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    let flags = info
        .lines()
        .find_map(|l| l.strip_prefix("flags"))
        .unwrap_or_default();
    let mut flags: Vec<&str> = flags
        .trim_start_matches(['\t', ' ', ':'])
        .split_whitespace()
        .collect();
    flags.sort_unstable();
    let mut cpu_flags = flags.join(" ");
    // The manifest's bound on a text; the sorted head is as good a fingerprint as any of that length.
    cpu_flags.truncate(4096);
    Ok(Compat {
        arch: uname.machine().to_string_lossy().into_owned(),
        kernel: uname.release().to_string_lossy().into_owned(),
        criu,
        cpu_flags,
    })
}

/// A sandbox's record as the store has it.
pub(crate) fn decode_record(id: SandboxId, meta: &[u8]) -> Result<SandboxRecord> {
    SandboxRecord::decode(id, meta)
}
