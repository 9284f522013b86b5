//! Process images: taking them from a running sandbox and making a sandbox from them.
//!
//! The OCI runtime calls CRIU, because it knows the container's mounts and cgroups; what it has no option for goes through
//! CRIU's own configuration file.

use crate::config::{Layers, SandboxName, SandboxSpec};
use crate::criulog::{self, Reason};
use crate::error::{Context, Result, SandboxError, blocking};
use crate::locks::{self, Lock};
use crate::record::{Record, write_whole};
use crate::runtime::{Created, Runtime, State, created_from};
use crate::seizing::Seizing;
use crate::tracing_stop::Stopped;
use crate::{remaps, watches};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// - `tcp-close`: open connections are closed in what is restored; the running sandbox keeps them. Their other ends are the
///   host or the outside, which a restored sandbox could not go on talking to.
/// - `file-locks`: without it every use of a database fails the checkpoint.
/// - `link-remap`, `ghost-limit`: files that are open but have lost their name. Small ones go into the images.
/// - `force-irmap`: file watches are found again by name.
/// - `skip-in-flight`: connections nobody accepted yet are refused after a restore and made again.
pub(crate) const CRIU_CONFIG: &str = "\
tcp-close
file-locks
link-remap
ghost-limit 1G
force-irmap
skip-in-flight
";

const DUMP_LOG: &str = "dump.log";
const RESTORE_LOG: &str = "restore.log";

/// What a checkpoint of the processes took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointStats {
    /// How long it took; the processes stood still for most of it.
    pub took: Duration,
    /// The size of the images in bytes.
    pub image_bytes: u64,
    /// How many image files there are.
    pub image_files: u64,
}

impl Runtime {
    fn need_criu(&self) -> Result<()> {
        match &self.capabilities().criu {
            Ok(_) => Ok(()),
            Err(reason) => Err(SandboxError::MissingCriu {
                path: self.cfg.criu.clone(),
                reason: reason.clone(),
            }),
        }
    }

    /// Writes images of all processes into `images`, which must be empty or absent, and lets the sandbox go on as it was:
    /// running, or paused if it was paused.
    ///
    /// [`SandboxError::Dump`] tells why processes cannot be checkpointed; the sandbox goes on then too.
    pub async fn checkpoint(&self, name: &SandboxName, images: &Path) -> Result<CheckpointStats> {
        self.need_criu()?;
        let record = self.records.get(name)?;
        match self.state(name).await? {
            State::Running(_) | State::Paused(_) => {}
            _ => return Err(SandboxError::NotRunning(name.to_string())),
        }
        let was_frozen = self.groups.is_frozen(&record.cgroup)?;
        fs::create_dir_all(images).context(|| format!("cannot make {}", images.display()))?;
        let started = Instant::now();
        // Frozen from the first look at the processes to the last at their files; and CRIU is quicker then.
        self.set_frozen(name, true).await?;
        let result = self.dump_frozen(&record, images).await;
        self.set_frozen(name, was_frozen).await?;
        result?;
        let took = started.elapsed();
        let (image_bytes, image_files) = sizes(images)?;
        Ok(CheckpointStats {
            took,
            image_bytes,
            image_files,
        })
    }

    async fn dump_frozen(&self, record: &Record, images: &Path) -> Result<()> {
        let dir = self.records.dir(&record.name);
        let (work, log) = (dir.join("dump"), dir.join("checkpoint.log"));
        fresh_dir(&work)?;
        let _ = fs::remove_file(&log);
        // Serves CRIU until the dump is over.
        let _seizing = self
            .prepare_dump(record, &work.join(DUMP_LOG), images)
            .await?;
        let mut command = self.runc(Some(&log));
        command
            .args(["checkpoint", "--leave-running", "--file-locks"])
            .arg("--image-path")
            .arg(images)
            .arg("--work-path")
            .arg(&work)
            .arg(record.name.as_str());
        let what = "the OCI runtime's checkpoint";
        let result = self
            .runc_ok(what, &mut command, &log, record.criu_timeout)
            .await;
        if let Err(e) = result {
            let Reason { reason, log } = reason(e, &work.join(DUMP_LOG))?;
            return Err(SandboxError::Dump { reason, log });
        }
        let (layers, images) = (record.layers.clone(), images.to_owned());
        blocking(move || remaps::collect(&layers, &images)).await
    }

    /// Looks at the processes and writes what CRIU has to know of them, and what it forgets.
    async fn prepare_dump(
        &self,
        record: &Record,
        dump_log: &Path,
        images: &Path,
    ) -> Result<Option<Seizing>> {
        let (this, record, dump_log) = (self.clone(), record.clone(), dump_log.to_owned());
        let images = images.to_owned();
        blocking(move || {
            let dir = this.records.dir(&record.name);
            let pids = this.groups.processes(&record.cgroup)?;
            locks::save(&locks::all(&pids), &images)?;
            let mut config = CRIU_CONFIG.to_owned();
            for path in watches::examine(&pids, &record.layers.merged)? {
                config.push_str(&format!("irmap-scan-path {}\n", path.display()));
            }
            let script = dir.join("at-dump.sh");
            remaps::write_script(&script, &record.layers, &dump_log)?;
            config.push_str(&format!("action-script {}\n", script.display()));
            let seizing = match this.groups.version_1_freezer(&record.cgroup) {
                Some(freezer) => Seizing::prepare(&freezer, dir.join("seizing"))?,
                None => None,
            };
            config.extend(seizing.as_ref().map(Seizing::config));
            write_whole(&dir.join("criu.conf"), config.as_bytes())?;
            Ok(seizing)
        })
        .await
    }

    /// Makes a sandbox from images and from layers that are as they were when the images were taken. It runs at once. The
    /// name may be another than the original's.
    ///
    /// On failure nothing is left behind; [`SandboxError::Restore`] tells why.
    pub async fn restore(
        &self,
        name: &SandboxName,
        spec: &SandboxSpec,
        layers: &Layers,
        images: &Path,
    ) -> Result<Created> {
        self.need_criu()?;
        if !images.is_dir() {
            return Err(SandboxError::Invalid(format!(
                "there are no images at {}",
                images.display()
            )));
        }
        let made = match self.prepare(name, spec, layers, false).await {
            Ok(record) => self.runc_restore(&record, images).await,
            Err(e @ SandboxError::Exists(_)) => return Err(e),
            Err(e) => Err(e),
        };
        self.or_destroy(name, made).await
    }

    async fn runc_restore(&self, record: &Record, images: &Path) -> Result<Created> {
        let _making = self.making.read().await;
        let dir = self.records.dir(&record.name);
        let (work, log, pid_file) = (
            dir.join("restore"),
            dir.join("restore.log"),
            dir.join("init.pid"),
        );
        fresh_dir(&work)?;
        remaps::restore(&record.layers.merged, images)?;
        let wanted = locks::load(images)?;
        if !wanted.is_empty() {
            // Nothing may run before the locks have been looked at.
            let script = dir.join("at-restore.sh");
            // CRIU restores from inside the sandbox's cgroup.
            let freeze = self.groups.freeze_commands(&record.cgroup)?;
            let text = format!(
                "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = pre-resume ] || exit 0\n{freeze}\n"
            );
            write_whole(&script, text.as_bytes())?;
            fs::set_permissions(&script, fs::Permissions::from_mode(0o700))
                .context(|| format!("{}", script.display()))?;
            let config = format!("{CRIU_CONFIG}action-script {}\n", script.display());
            write_whole(&dir.join("criu.conf"), config.as_bytes())?;
        }
        let mut command = self.runc(Some(&log));
        command
            .args(["restore", "--detach", "--file-locks", "--bundle"])
            .arg(&dir)
            .arg("--image-path")
            .arg(images)
            .arg("--work-path")
            .arg(&work)
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(record.name.as_str());
        let what = "the OCI runtime's restore";
        let result = self
            .runc_ok(what, &mut command, &log, record.criu_timeout)
            .await;
        if let Err(e) = result {
            let Reason { reason, log } = reason(e, &work.join(RESTORE_LOG))?;
            return Err(SandboxError::Restore { reason, log });
        }
        if !wanted.is_empty() {
            let (this, record) = (self.clone(), record.clone());
            blocking(move || this.take_locks(&record, &wanted)).await?;
        }
        created_from(&pid_file)
    }

    /// Gives restored and frozen processes the file locks they miss, and lets them go.
    fn take_locks(&self, record: &Record, wanted: &[Lock]) -> Result<()> {
        let freeze = |frozen| {
            self.groups
                .set_frozen(record.name.as_str(), &record.cgroup, frozen)
        };
        freeze(true)?;
        let pids = self.groups.processes(&record.cgroup)?;
        let missing = locks::missing(wanted, &pids)?;
        if missing.is_empty() {
            return freeze(false);
        }
        let stopped = Stopped::take(&pids, || freeze(false))?;
        for (pid, lock) in &missing {
            stopped.take_lock(*pid, lock)?;
        }
        match locks::missing(wanted, &pids)?.first() {
            None => Ok(()),
            Some((pid, lock)) => Err(locks::failed(format!(
                "process with host pid {pid} did not get its file lock back: {lock:?}"
            ))),
        }
    }
}

/// Puts a failure of the runtime in CRIU's words. Failures of another kind, like a time-out, stay what they are.
fn reason(e: SandboxError, log: &Path) -> Result<Reason> {
    match e {
        SandboxError::Command { stderr, .. } => Ok(criulog::explain(
            &fs::read(log).unwrap_or_default(),
            &stderr,
        )),
        other => Err(other),
    }
}

fn fresh_dir(dir: &Path) -> Result<()> {
    crate::mounts::remove_tree(dir)?;
    fs::create_dir(dir).context(|| format!("cannot make {}", dir.display()))
}

fn sizes(images: &Path) -> Result<(u64, u64)> {
    let (mut bytes, mut files) = (0, 0);
    let what = || format!("cannot read {}", images.display());
    for entry in fs::read_dir(images).context(what)? {
        let meta = entry.and_then(|e| e.metadata()).context(what)?;
        if meta.is_file() {
            bytes += meta.len();
            files += 1;
        }
    }
    Ok((bytes, files))
}
