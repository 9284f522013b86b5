//! What a starting daemon finds: sandboxes that ran on without it, and what was cut short.
//!
//! Every sandbox the store knows becomes known here. One that runs here under the store's epoch is taken over; its next boundary looks at everything, since nobody watched it. Whatever
//! else lies here (an unfinished creation, a lost epoch, a sandbox the store does not know) is ended and removed.

use tidepool_proto::TurnNo;
use tidepool_proto::api::SandboxState;
use tidepool_sandbox::State;

use crate::error::{Context, Result};
use crate::host::Host;
use crate::life::runtime_name;
use crate::record::SandboxRecord;
use crate::sandbox::{Inner, Sandbox};

impl Host {
    /// At start: lists what the store knows, takes over what runs here, clears what is left of the rest.
    pub(crate) async fn adopt_all(&self) -> Result<()> {
        for known in self.transfer.client.sandboxes().await? {
            let record = SandboxRecord::decode(known.id, &known.meta)?;
            let inner = Inner {
                epoch: known.epoch,
                turn: known.last_turn,
                last: None,
                live: None,
                stale: false,
            };
            let sandbox = Sandbox::new(
                known.id,
                record,
                self.dir(known.id),
                &self.config.ignore,
                inner,
            );
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
        let live = self.live(name.clone(), created, slot, local).await;
        if let Ok(live) = &live {
            self.forget_ended(sandbox, live, false).await?;
        }
        if paused {
            self.runtime.pause(&name).await?;
        }
        inner.live = Some(live?);
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
}
