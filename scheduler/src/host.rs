//! The daemon's state, its start and end, and how requests find what they name.
//!
//! Invariants: every sandbox the store knows is in `sandboxes` (dead, unless it runs here); what runs here and is not in the store, or whose epoch is not the
//! store's, is destroyed at start, since it can never commit again.
//!
//! Elsewhere on purpose: the life of sandboxes ([`crate::life`], [`crate::adopt`], [`crate::restore`]), turns ([`crate::sandbox`]).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tidepool_inspector::{Inspector, InspectorOptions, ProbeSet};
use tidepool_proto::api::*;
use tidepool_proto::manifest::Compat;
use tidepool_proto::{DomainId, ErrorKind, SandboxId};
use tidepool_sandbox::{Runtime, RuntimeConfig};
use tidepool_scheduler_core::pages::PageIndex;
use tidepool_store::{Node, NodeConfig};
use tidepool_store_client::{Client, ClientConfig, ClientIdentity};
use tokio::sync::Semaphore;

use crate::config::Config;
use crate::error::{Context, HostError, Result, chain};
use crate::keys;
use crate::sandbox::Sandbox;
use crate::state_dir::StateDir;
use crate::transfer::Transfer;

/// Pages whose place is remembered for dedup of process images: 1 GiB worth.
const PAGE_INDEX: usize = 256 << 10;

/// The daemon.
pub struct Host {
    pub config: Config,
    pub(crate) state: StateDir,
    pub(crate) transfer: Transfer,
    pub(crate) domain: DomainId,
    pub(crate) runtime: Runtime,
    pub(crate) inspector: Arc<Inspector>,
    pub(crate) pages: Arc<Mutex<PageIndex>>,
    pub(crate) compat: Compat,
    /// Process dumps at one time: as many as there are cores (more only slow each other down).
    pub(crate) dumps: Semaphore,
    /// One image is unpacked at a time.
    pub(crate) importing: tokio::sync::Mutex<()>,
    sandboxes: RwLock<BTreeMap<SandboxId, Arc<Sandbox>>>,
    warnings: Vec<String>,
    /// The embedded store; taken out at the end.
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

/// Loads the probes asked for, or the best that can be had.
fn load_inspector(config: &Config, warnings: &mut Vec<String>) -> Result<Arc<Inspector>> {
    let options = InspectorOptions {
        probe_set: config.probes.set(),
        trust_started: true,
        ..InspectorOptions::default()
    };
    let inspector = Inspector::load(&options).map_err(|e| {
        HostError::new(
            ErrorKind::Unavailable,
            format!("loading the probes: {}", chain(&e)),
        )
    })?;
    let fallbacks = inspector.fallbacks();
    if !fallbacks.is_empty() {
        tracing::info!(
            "probes: {} ({})",
            inspector.probe_set(),
            fallbacks.join("; ")
        );
    }
    if inspector.probes() == ProbeSet::Walk {
        warnings.push(format!(
            "no eBPF probe is in use{}: every turn walks the sandbox's files, and processes that live through a turn are always dumped",
            if fallbacks.is_empty() { "" } else { " since none could be loaded" }
        ));
    }
    Ok(Arc::new(inspector))
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
    match load_inspector(config, &mut warnings) {
        Ok(inspector) => {
            println!("inspector: {}", inspector.probe_set());
            for why in inspector.fallbacks() {
                println!("inspector: {why}");
            }
        }
        Err(e) => {
            println!("inspector: none");
            warnings.push(e.message);
        }
    }
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

/// Reaches the store: another process's where one is named, else one in this process.
async fn store(config: &Config, state: &StateDir) -> Result<(Client, Option<Node>)> {
    let failed =
        |doing: &str, e: &dyn std::error::Error| HostError::failed(format!("{doing}: {e}"));
    if let Some(dir) = config
        .store_identity
        .as_ref()
        .filter(|_| !config.store.is_empty())
    {
        let identity =
            ClientIdentity::load(dir).map_err(|e| failed("the store's certificate", &e))?;
        let client = Client::connect(ClientConfig::new(config.store.clone(), identity)).await?;
        return Ok((client, None));
    }
    let node = Node::start(NodeConfig {
        listen: config.store_listen,
        ..NodeConfig::embedded(state.store())
    });
    let node = node.await.map_err(|e| failed("starting the store", &e))?;
    let client = ClientConfig::new(vec![node.local_addr()], node.client_identity());
    Ok((Client::connect(client).await?, Some(node)))
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
        let (client, node) = store(&config, &state).await?;
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
        let inspector = load_inspector(&config, &mut warnings)?;
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
            node: tokio::sync::Mutex::new(node),
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
            probe_set: self.inspector.probe_set().to_owned(),
            probe_fallbacks: self.inspector.fallbacks(),
            runc: Some(found.runc.clone()),
            criu: found.criu.clone().ok(),
            kernel: self.compat.kernel.clone(),
            warnings: self.warnings.clone(),
            store: StoreStatus {
                endpoint: match self.config.store.as_slice() {
                    [] => "embedded".into(),
                    addrs => addrs
                        .iter()
                        .map(ToString::to_string)
                        .collect::<Vec<_>>()
                        .join(", "),
                },
                chunks: store.chunks,
                chunk_bytes: store.chunk_bytes,
                ready: store.ready,
            },
            sandboxes_running: running as u64,
            sandboxes_total: all.len() as u64,
        })
    }
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
