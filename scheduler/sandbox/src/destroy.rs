//! Removing a sandbox, whatever is left of it.

use crate::command::run;
use crate::config::{Network, SandboxName};
use crate::error::{Result, SandboxError, blocking};
use crate::runtime::{RUNC_TIME, Runtime};
use crate::{mounts, nat, netns};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

impl Runtime {
    /// Ends a sandbox and removes everything of it but its layers. Nothing to remove is no error.
    pub async fn destroy(&self, name: &SandboxName) -> Result<()> {
        let record = match self.records.get(name) {
            Ok(record) => Some(record),
            Err(SandboxError::NotFound(_)) => None,
            Err(e) => {
                tracing::warn!(sandbox = %name, error = %e, "the record is unreadable; removing what can be found");
                None
            }
        };
        let (this, group) = (self.clone(), record.clone());
        blocking(move || match group {
            // Kills everything, whoever started it; the network and mount namespaces end with it.
            Some(r) => {
                let pids = this.groups.processes(&r.cgroup).unwrap_or_default();
                this.groups.remove(&r.cgroup)?;
                wait_gone(&pids);
                Ok(())
            }
            None => Ok(()),
        })
        .await?;
        if self.records.runc_root().join(name.as_str()).exists() {
            let log = self.records.dir(name).join("delete.log");
            let mut command = self.runc(
                Some(&log)
                    .filter(|_| self.records.dir(name).exists())
                    .map(PathBuf::as_path),
            );
            command.arg("delete").arg("--force").arg(name.as_str());
            // Its processes are gone and what else it would remove is removed below, so its result does not matter.
            if let Err(e) = run("the OCI runtime's delete", &mut command, RUNC_TIME).await {
                tracing::warn!(sandbox = %name, error = %e, "the OCI runtime did not forget a sandbox");
            }
        }
        if let Some(r) = record.as_ref().filter(|r| r.network == Network::Nat) {
            nat::close(r).await?;
        }
        let (this, name) = (self.clone(), name.clone());
        blocking(move || {
            if let Some(r) = &record {
                // The runtime may have made it anew meanwhile if it was in the middle of something.
                this.groups.remove(&r.cgroup)?;
                mounts::unmount(&r.layers.merged)?;
                let _ = fs::remove_dir(&r.layers.merged);
                netns::remove(&r.netns)?;
                // The cgroup above it goes with the last sandbox, unless one is being made.
                if let (Ok(_alone), Some((parent, _))) =
                    (this.making.try_write(), r.cgroup.rsplit_once('/'))
                {
                    this.groups.remove_empty(parent);
                }
            }
            this.records.remove(&name)
        })
        .await
    }
}

/// Processes leave their cgroup a moment before they are gone. One that its parent does not reap is not waited for.
fn wait_gone(pids: &[i32]) {
    let until = Instant::now() + Duration::from_secs(2);
    // A zombie holds nothing any more; when it is reaped is its parent's business.
    let there = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        !matches!(state, None | Some('Z' | 'X'))
    };
    while pids.iter().any(there) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
}
