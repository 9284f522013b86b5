//! The sandboxes of one host: making, starting, freezing, finding and removing them.
//!
//! Everything a sandbox is made of is made here and named in its record: the overlay, the network namespace, the cgroup,
//! the bundle. The OCI runtime only sees paths. Checkpoint and restore are in [`crate::checkpoint`].

use crate::cgroup::Hierarchies;
use crate::client::InitClient;
use crate::command::{self, run};
use crate::config::{Layers, Network, RuntimeConfig, SandboxName, SandboxSpec};
use crate::error::{Context, Result, SandboxError, blocking};
use crate::inspect::{self, Process};
use crate::programs::{init_file, recent_criu, too_old, version, write_init};
use crate::record::{Record, Records, write_whole};
use crate::{INIT_BINARY, mounts, nat, netns, oci};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidepool_init::auth::Key;
use tidepool_init::message::Setup;
use tokio::process::Command;
use tokio::sync::RwLock;

/// How long the OCI runtime may take for anything but processes' images.
pub(crate) const RUNC_TIME: Duration = Duration::from_secs(60);
/// How long init may take to listen after a start.
const INIT_TIME: Duration = Duration::from_secs(20);

/// A sandbox that was made or restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Created {
    /// Its init's number on the host.
    pub init_pid: i32,
    /// The inode of its process namespace, which marks its processes in the kernel.
    pub pid_ns_inode: u64,
}

/// What a sandbox is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Made, but not started.
    Created(Created),
    /// It runs.
    Running(Created),
    /// It is frozen.
    Paused(Created),
    /// Its init has ended; what it was made of is still there.
    Stopped,
    /// Nothing of it is on this host.
    Absent,
}

/// What this host's programs can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// The version of the OCI runtime.
    pub runc: String,
    /// The version of CRIU, or why there is no checkpoint of processes.
    pub criu: std::result::Result<String, String>,
}

/// Drives the sandboxes of one host. Cheap to clone.
#[derive(Clone)]
pub struct Runtime {
    pub(crate) cfg: RuntimeConfig,
    pub(crate) records: Records,
    pub(crate) groups: Hierarchies,
    /// Held for reading while the runtime makes cgroups, so that their parent is not removed meanwhile.
    pub(crate) making: Arc<RwLock<()>>,
    capabilities: Capabilities,
    init_digest: String,
}

impl Runtime {
    /// Prepares the host's directories and looks at its programs. CRIU may be missing: only what needs it fails then.
    pub async fn new(cfg: RuntimeConfig) -> Result<Self> {
        let at = &cfg.run_dir;
        if !at.is_absolute() || !cfg.state_dir.is_absolute() {
            return Err(SandboxError::Invalid(
                "the run and state directories need absolute paths".into(),
            ));
        }
        let parent = &cfg.cgroup_parent;
        if parent.is_empty()
            || !parent
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        {
            return Err(SandboxError::Invalid(format!(
                "{parent:?} cannot be a cgroup"
            )));
        }
        let records = Records::open(&cfg.run_dir)?;
        let init_digest = blake3::hash(INIT_BINARY).to_hex().to_string();
        let (state_dir, digest) = (cfg.state_dir.clone(), init_digest.clone());
        blocking(move || write_init(&state_dir, &digest)).await?;
        let runc = version(&cfg.runc)
            .await
            .map_err(|reason| SandboxError::MissingRuntime {
                path: cfg.runc.clone(),
                reason,
            })?;
        let criu = version(&cfg.criu).await.and_then(|v| {
            if recent_criu(&v) {
                Ok(v)
            } else {
                Err(too_old(&v))
            }
        });
        let groups = Hierarchies::find()?;
        Ok(Self {
            cfg,
            records,
            groups,
            making: Arc::default(),
            capabilities: Capabilities { runc, criu },
            init_digest,
        })
    }

    /// What this host's programs can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The digest of the init program that new sandboxes get. Keep it with a checkpoint and put it into
    /// [`SandboxSpec::init`] to restore.
    pub fn init_digest(&self) -> &str {
        &self.init_digest
    }

    pub(crate) fn init_path(&self, spec: &SandboxSpec) -> Result<PathBuf> {
        let digest = spec.init.as_deref().unwrap_or(&self.init_digest);
        let path = init_file(&self.cfg.state_dir, digest);
        if path.is_file() {
            Ok(path)
        } else {
            Err(SandboxError::MissingInit(digest.to_owned()))
        }
    }

    /// The OCI runtime, ready for a subcommand.
    pub(crate) fn runc(&self, log: Option<&Path>) -> Command {
        let mut command = Command::new(&self.cfg.runc);
        command
            .arg("--root")
            .arg(self.records.runc_root())
            .arg("--criu")
            .arg(&self.cfg.criu);
        if let Some(log) = log {
            command.arg("--log").arg(log);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// Makes everything of a sandbox but its first process: record, network, root, bundle.
    pub(crate) async fn prepare(
        &self,
        name: &SandboxName,
        spec: &SandboxSpec,
        layers: &Layers,
        new: bool,
    ) -> Result<Record> {
        spec.validate()?;
        layers.validate()?;
        let init = self.init_path(spec)?;
        let record = Record::new(&self.cfg, name, layers, spec.network, spec.criu_timeout());
        let (this, spec, made) = (self.clone(), spec.clone(), record.clone());
        blocking(move || {
            this.records.create(&made)?;
            netns::create(&made.netns)?;
            mounts::mount(&made.layers)?;
            let hostname = if spec.hostname.is_empty() {
                made.name.as_str()
            } else {
                &spec.hostname
            };
            if new {
                mounts::network_files(&made.layers.merged, hostname, spec.network)?;
            }
            let dir = this.records.dir(&made.name);
            let criu_config = dir.join("criu.conf");
            write_whole(&criu_config, crate::checkpoint::CRIU_CONFIG.as_bytes())?;
            let place = oci::Place {
                name: made.name.as_str(),
                root: &made.layers.merged,
                init: &init,
                netns: &made.netns,
                cgroup: &made.cgroup,
                criu_config: &criu_config,
            };
            let json = serde_json::to_vec_pretty(&oci::config(&spec, &place))
                .context(|| "config.json".into())?;
            write_whole(&dir.join("config.json"), &json)
        })
        .await?;
        if record.network == Network::Nat {
            nat::open(&record).await?;
        }
        Ok(record)
    }

    /// Makes a sandbox. Its init waits for [`Self::start`], so that an inspector can attach before anything runs.
    ///
    /// On failure nothing is left behind.
    pub async fn create(
        &self,
        name: &SandboxName,
        spec: &SandboxSpec,
        layers: &Layers,
        key: &Key,
    ) -> Result<Created> {
        let made = match self.prepare(name, spec, layers, true).await {
            Ok(record) => self.runc_create(&record, spec, key).await,
            Err(e @ SandboxError::Exists(_)) => return Err(e),
            Err(e) => Err(e),
        };
        self.or_destroy(name, made).await
    }

    /// Cleans up after a failure, and keeps the failure.
    pub(crate) async fn or_destroy<T>(&self, name: &SandboxName, result: Result<T>) -> Result<T> {
        if result.is_err()
            && let Err(e) = self.destroy(name).await
        {
            tracing::warn!(sandbox = %name, error = %e, "could not clean up after a failure");
        }
        result
    }

    async fn runc_create(&self, record: &Record, spec: &SandboxSpec, key: &Key) -> Result<Created> {
        let _making = self.making.read().await;
        let setup = Setup {
            key: *key,
            user: (!spec.user.is_empty()).then(|| spec.user.clone()),
            cwd: (!spec.cwd.is_empty()).then(|| spec.cwd.clone().into_bytes()),
            env: spec.env.iter().map(|v| v.clone().into_bytes()).collect(),
        };
        let mut setup = setup.encode();
        if setup.len() > Setup::MAX {
            return Err(SandboxError::Invalid("the environment is too long".into()));
        }
        // It fits into the pipe's buffer, so this does not wait for a reader.
        let (reader, mut writer) = std::io::pipe().context(|| "a pipe to init".into())?;
        std::io::Write::write_all(&mut writer, &setup).context(|| "a pipe to init".into())?;
        setup.fill(0);
        drop(writer);
        let dir = self.records.dir(&record.name);
        let (log, pid_file) = (dir.join("create.log"), dir.join("init.pid"));
        let mut command = self.runc(Some(&log));
        command
            .arg("create")
            .arg("--bundle")
            .arg(&dir)
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(record.name.as_str());
        command.stdin(reader);
        self.runc_ok("the OCI runtime's create", &mut command, &log, RUNC_TIME)
            .await?;
        created_from(&pid_file)
    }

    /// Runs the OCI runtime; a failure carries the end of its log.
    pub(crate) async fn runc_ok(
        &self,
        what: &str,
        command: &mut Command,
        log: &Path,
        limit: Duration,
    ) -> Result<()> {
        let output = run(what, command, limit).await?;
        if output.status.success() {
            return Ok(());
        }
        let said = fs::read(log).unwrap_or_default();
        Err(SandboxError::Command {
            what: what.to_owned(),
            status: output.status.to_string(),
            stderr: command::tail(&said, 2000),
        })
    }

    /// Starts the init of a sandbox that was made. When this returns, init can be reached.
    pub async fn start(&self, name: &SandboxName) -> Result<()> {
        let record = self.records.get(name)?;
        let log = self.records.dir(name).join("start.log");
        let mut command = self.runc(Some(&log));
        command.arg("start").arg(name.as_str());
        self.runc_ok("the OCI runtime's start", &mut command, &log, RUNC_TIME)
            .await?;
        let until = Instant::now() + INIT_TIME;
        loop {
            let path = record.netns.clone();
            let tried =
                blocking(move || netns::connect(&path, tidepool_init::PORT, INIT_TIME)).await;
            match tried {
                Ok(_) => return Ok(()),
                Err(e) if Instant::now() > until => {
                    return Err(SandboxError::Init(format!("it does not listen: {e}")));
                }
                Err(_) => {}
            }
            if matches!(self.state(name).await?, State::Stopped | State::Absent) {
                return Err(SandboxError::Init("it ended at once".into()));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Removes what this runtime made for all its sandboxes, where none of them is left.
    pub fn close(&self) {
        self.groups.remove_if_empty(&self.cfg.cgroup_parent);
    }

    /// Freezes every process. Freezing what is frozen is fine.
    pub async fn pause(&self, name: &SandboxName) -> Result<()> {
        self.set_frozen(name, true).await
    }

    /// Lets a frozen sandbox go on.
    pub async fn resume(&self, name: &SandboxName) -> Result<()> {
        self.set_frozen(name, false).await
    }

    pub(crate) async fn set_frozen(&self, name: &SandboxName, frozen: bool) -> Result<()> {
        let (this, name) = (self.clone(), name.clone());
        blocking(move || {
            let record = this.records.get(&name)?;
            if this.groups.existing(&record.cgroup).is_empty() {
                return Err(SandboxError::NotRunning(name.to_string()));
            }
            this.groups
                .set_frozen(name.as_str(), &record.cgroup, frozen)
        })
        .await
    }

    /// What a sandbox is doing.
    pub async fn state(&self, name: &SandboxName) -> Result<State> {
        let record = match self.records.get(name) {
            Ok(record) => record,
            Err(SandboxError::NotFound(_)) if !self.records.dir(name).exists() => {
                return Ok(State::Absent);
            }
            // Its making was cut short before the record was written.
            Err(SandboxError::NotFound(_)) => return Ok(State::Stopped),
            Err(e) => return Err(e),
        };
        let mut command = self.runc(None);
        command
            .arg("state")
            .arg(name.as_str())
            .stdout(Stdio::piped());
        let output = run("the OCI runtime's state", &mut command, RUNC_TIME).await?;
        if !output.status.success() {
            return Ok(State::Stopped);
        }
        let json: serde_json::Value =
            serde_json::from_slice(&output.stdout).context(|| "the OCI runtime's state".into())?;
        let pid = json["pid"]
            .as_i64()
            .and_then(|p| i32::try_from(p).ok())
            .filter(|p| *p > 0);
        let Some(created) = pid.and_then(|pid| created_at(pid).ok()) else {
            return Ok(State::Stopped);
        };
        Ok(match json["status"].as_str() {
            Some("created") => State::Created(created),
            Some("running" | "paused") if self.groups.is_frozen(&record.cgroup)? => {
                State::Paused(created)
            }
            Some("running" | "paused") => State::Running(created),
            _ => State::Stopped,
        })
    }

    /// Every sandbox of this host that is not wholly gone, also those whose making or removal was cut short.
    pub async fn list(&self) -> Result<Vec<(SandboxName, State)>> {
        let mut all = Vec::new();
        for name in self.records.names()? {
            let state = self.state(&name).await?;
            all.push((name, state));
        }
        Ok(all)
    }

    /// The layers a sandbox was made of.
    pub fn layers(&self, name: &SandboxName) -> Result<Layers> {
        Ok(self.records.get(name)?.layers)
    }

    /// A client for the init of a sandbox, proved to be the right one.
    pub async fn connect(&self, name: &SandboxName, key: &Key) -> Result<InitClient> {
        let client = InitClient::new(self.records.get(name)?.netns, *key);
        client.ping().await?;
        Ok(client)
    }

    /// Listens on the loopback inside a sandbox's network, for services the host offers it.
    pub async fn listen_inside(
        &self,
        name: &SandboxName,
        port: u16,
    ) -> Result<tokio::net::TcpListener> {
        let path = self.records.get(name)?.netns;
        let listener = blocking(move || netns::listen(&path, port)).await?;
        tokio::net::TcpListener::from_std(listener).context(|| "a listener inside".into())
    }

    /// The processes of a sandbox.
    pub async fn processes(&self, name: &SandboxName) -> Result<Vec<Process>> {
        let (this, name) = (self.clone(), name.clone());
        blocking(move || {
            let record = this.records.get(&name)?;
            if this.groups.existing(&record.cgroup).is_empty() {
                return Err(SandboxError::NotRunning(name.to_string()));
            }
            Ok(this
                .groups
                .processes(&record.cgroup)?
                .into_iter()
                .filter_map(inspect::process)
                .collect())
        })
        .await
    }
}

fn created_at(pid: i32) -> Result<Created> {
    let path = format!("/proc/{pid}/ns/pid");
    let inode = fs::metadata(&path)
        .context(|| format!("cannot look at {path}"))?
        .ino();
    Ok(Created {
        init_pid: pid,
        pid_ns_inode: inode,
    })
}

pub(crate) fn created_from(pid_file: &Path) -> Result<Created> {
    let text =
        fs::read_to_string(pid_file).context(|| format!("cannot read {}", pid_file.display()))?;
    let pid = text
        .trim()
        .parse()
        .map_err(std::io::Error::other)
        .context(|| format!("{}", pid_file.display()))?;
    created_at(pid)
}
