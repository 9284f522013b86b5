//! Sandboxes, turns, checkpoints and images.

use bytes::Bytes;
use tidepool_proto::wire::{self, request, response};
use tidepool_proto::{CheckpointId, ChunkName, Epoch, ErrorKind, SandboxId, TurnNo};

use crate::types::{StoreStatus, sandbox_record};
use crate::{Client, ClientError, Commit, SandboxRecord};

pub(crate) fn id(id: SandboxId) -> Bytes {
    Bytes::copy_from_slice(&id.0)
}

/// None where the error says that there is no such thing.
fn found<T>(result: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match result {
        Ok(v) => Ok(Some(v)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

impl Client {
    /// How the node is that this client talks to.
    pub async fn status(&self) -> Result<StoreStatus, ClientError> {
        let op = request::Op::Status(request::Status {});
        crate::types::status(self.link.call(op).await?)
    }

    /// Creates a sandbox with epoch 1. A taken name is a conflict.
    pub async fn create_sandbox(
        &self,
        sandbox: SandboxId,
        name: &str,
        meta: Vec<u8>,
    ) -> Result<Epoch, ClientError> {
        let op = request::Op::CreateSandbox(request::CreateSandbox {
            id: id(sandbox),
            name: name.to_owned(),
            meta: meta.into(),
        });
        self.epoch(op).await
    }

    /// Takes a sandbox over: a new, higher epoch, which fences whoever held it.
    pub async fn take_sandbox(&self, sandbox: SandboxId) -> Result<Epoch, ClientError> {
        let op = request::Op::TakeSandbox(request::TakeSandbox {
            id: id(sandbox),
            token: Bytes::copy_from_slice(&rand::random::<[u8; 16]>()),
        });
        self.epoch(op).await
    }

    /// Replaces a sandbox's metadata.
    pub async fn update_sandbox_meta(
        &self,
        sandbox: SandboxId,
        epoch: Epoch,
        meta: Vec<u8>,
    ) -> Result<(), ClientError> {
        let meta = Bytes::from(meta);
        loop {
            let Some(now) = self.sandbox_wire(sandbox).await? else {
                return Err(ClientError::new(
                    ErrorKind::NotFound,
                    format!("there is no sandbox {sandbox}"),
                ));
            };
            let op = request::Op::UpdateSandboxMeta(request::UpdateSandboxMeta {
                id: id(sandbox),
                epoch: epoch.0,
                version: now.version,
                meta: meta.clone(),
            });
            match self.done(op).await {
                // Another update of the same holder came first; this one goes on top of it.
                Err(e) if e.kind() == ErrorKind::Conflict => {}
                other => return other,
            }
        }
    }

    /// Removes a sandbox with its turns, checkpoints and name.
    pub async fn remove_sandbox(
        &self,
        sandbox: SandboxId,
        epoch: Epoch,
    ) -> Result<(), ClientError> {
        let op = request::Op::RemoveSandbox(request::RemoveSandbox {
            id: id(sandbox),
            epoch: epoch.0,
        });
        self.done(op).await
    }

    /// A sandbox, if there is one.
    pub async fn sandbox(&self, sandbox: SandboxId) -> Result<Option<SandboxRecord>, ClientError> {
        match self.sandbox_wire(sandbox).await? {
            Some(s) => Ok(Some(sandbox_record(s)?)),
            None => Ok(None),
        }
    }

    async fn sandbox_wire(
        &self,
        sandbox: SandboxId,
    ) -> Result<Option<response::Sandbox>, ClientError> {
        let op = request::Op::Sandbox(request::Sandbox { id: id(sandbox) });
        match self.link.call(op).await? {
            response::Op::Sandboxes(mut page) => Ok(page.items.pop()),
            _ => Err(ClientError::unexpected()),
        }
    }

    /// Every sandbox whose record is not damaged; those that are, are logged and left out.
    pub async fn sandboxes(&self) -> Result<Vec<SandboxRecord>, ClientError> {
        let mut out = Vec::new();
        let mut after = Bytes::new();
        loop {
            let op = request::Op::Sandboxes(request::After { after });
            let page = match self.link.call(op).await? {
                response::Op::Sandboxes(page) => page,
                _ => return Err(ClientError::unexpected()),
            };
            report(page.damaged);
            for item in page.items {
                out.push(sandbox_record(item)?);
            }
            if page.next.is_empty() {
                return Ok(out);
            }
            after = page.next;
        }
    }

    /// Commits a turn. Only send it when the puts of its chunks are acknowledged. The same commit again is answered as the first;
    /// another epoch than the current is fenced; another turn in the same place is a conflict. Where a collection began meanwhile the error says
    /// so ([`ClientError::upload_again`]).
    pub async fn commit(&self, c: Commit) -> Result<(), ClientError> {
        let (checkpoint, manifest) = match c.manifest {
            Some((id, bytes)) => (Bytes::copy_from_slice(&id.0), bytes.into()),
            None => (Bytes::new(), Bytes::new()),
        };
        let op = request::Op::Commit(request::Commit {
            sandbox: id(c.sandbox),
            epoch: c.epoch.0,
            turn: c.turn.0,
            key: c.key,
            record: c.record.into(),
            checkpoint,
            manifest,
            session: c
                .session
                .map(|s| Bytes::copy_from_slice(&s.0))
                .unwrap_or_default(),
            round: c.round,
            base: c
                .base
                .map(|b| Bytes::copy_from_slice(&b.0))
                .unwrap_or_default(),
        });
        self.done(op).await
    }

    /// A checkpoint's manifest, verified against its id.
    pub async fn manifest(
        &self,
        sandbox: SandboxId,
        checkpoint: CheckpointId,
    ) -> Result<Vec<u8>, ClientError> {
        Ok(self.manifest_at(sandbox, checkpoint).await?.0)
    }

    /// The same with the round in which it was there: what is committed elsewhere and needs its chunks rests on that.
    pub async fn manifest_at(
        &self,
        sandbox: SandboxId,
        checkpoint: CheckpointId,
    ) -> Result<(Vec<u8>, u64), ClientError> {
        let op = request::Op::Manifest(request::Manifest {
            sandbox: id(sandbox),
            checkpoint: Bytes::copy_from_slice(&checkpoint.0),
        });
        let found = self.found(op).await?;
        Ok((verified(checkpoint, found.record)?, found.round))
    }

    /// Every manifest of a sandbox that is not damaged, by the turn that committed it.
    pub async fn manifests(
        &self,
        sandbox: SandboxId,
    ) -> Result<Vec<(TurnNo, CheckpointId, Vec<u8>)>, ClientError> {
        let mut out = Vec::new();
        let mut from = 0;
        loop {
            let op = request::Op::Manifests(request::FromTurn {
                sandbox: id(sandbox),
                from,
                limit: u32::MAX,
            });
            let page = self.records(op).await?;
            let Some(last) = page.items.last() else {
                return Ok(out);
            };
            from = last.turn.saturating_add(1);
            for item in page.items {
                let checkpoint =
                    CheckpointId(wire::array(&item.key, "a checkpoint id has 32 bytes")?);
                let bytes = verified(checkpoint, item.bytes)?;
                out.push((TurnNo(item.turn), checkpoint, bytes));
            }
            if !page.more {
                return Ok(out);
            }
        }
    }

    /// The record of the turn with this idempotency key, if there is one.
    pub async fn turn_by_key(
        &self,
        sandbox: SandboxId,
        key: &str,
    ) -> Result<Option<Vec<u8>>, ClientError> {
        let op = request::Op::TurnByKey(request::TurnByKey {
            sandbox: id(sandbox),
            key: key.to_owned(),
        });
        Ok(found(self.record(op).await)?.map(|b| b.to_vec()))
    }

    /// Records of turns, from one on, at most `limit`.
    pub async fn turns(
        &self,
        sandbox: SandboxId,
        from: TurnNo,
        limit: u32,
    ) -> Result<Vec<Vec<u8>>, ClientError> {
        let mut out = Vec::new();
        let (mut from, mut left) = (from.0, limit);
        while left > 0 {
            let op = request::Op::Turns(request::FromTurn {
                sandbox: id(sandbox),
                from,
                limit: left,
            });
            let page = self.records(op).await?;
            let Some(last) = page.items.last() else {
                break;
            };
            from = last.turn.saturating_add(1);
            left = left.saturating_sub(page.items.len() as u32);
            out.extend(page.items.into_iter().map(|i| i.bytes.to_vec()));
            if !page.more {
                break;
            }
        }
        Ok(out)
    }

    /// Records an image. One of this name with another record is a conflict. `roots` are the chunks from which all of its are reached,
    /// `round` the lowest round of the answers that their upload got.
    pub async fn put_image(
        &self,
        name: &str,
        record: Vec<u8>,
        roots: &[ChunkName],
        round: u64,
    ) -> Result<(), ClientError> {
        let op = request::Op::PutImage(request::PutImage {
            name: name.to_owned(),
            record: record.into(),
            round,
            roots: wire::join_names(roots),
        });
        self.done(op).await
    }

    /// An image's record, if there is one.
    pub async fn image(&self, name: &str) -> Result<Option<Vec<u8>>, ClientError> {
        Ok(self.image_at(name).await?.map(|(record, _)| record))
    }

    /// The same with the round in which it was there: what is committed and needs its chunks rests on that.
    pub async fn image_at(&self, name: &str) -> Result<Option<(Vec<u8>, u64)>, ClientError> {
        let op = request::Op::Image(request::Image {
            name: name.to_owned(),
        });
        let image = found(self.found(op).await)?;
        Ok(image.map(|i| (i.record.to_vec(), i.round)))
    }

    /// Every image's name and record, by name; damaged ones are logged and left out.
    pub async fn images(&self) -> Result<Vec<(String, Vec<u8>)>, ClientError> {
        let mut out = Vec::new();
        let mut after = Bytes::new();
        loop {
            let page = self
                .records(request::Op::Images(request::After { after }))
                .await?;
            let Some(last) = page.items.last() else {
                return Ok(out);
            };
            after = last.key.clone();
            for item in page.items {
                let name =
                    String::from_utf8(item.key.to_vec()).map_err(|_| ClientError::unexpected())?;
                out.push((name, item.bytes.to_vec()));
            }
            if !page.more {
                return Ok(out);
            }
        }
    }

    /// Removes an image's record.
    pub async fn remove_image(&self, name: &str) -> Result<(), ClientError> {
        let op = request::Op::RemoveImage(request::Image {
            name: name.to_owned(),
        });
        match self.done(op).await {
            Err(e) if e.is_own_removal() => Ok(()),
            other => other,
        }
    }

    pub(crate) async fn done(&self, op: request::Op) -> Result<(), ClientError> {
        match self.link.call(op).await? {
            response::Op::Done(_) => Ok(()),
            _ => Err(ClientError::unexpected()),
        }
    }

    async fn epoch(&self, op: request::Op) -> Result<Epoch, ClientError> {
        match self.link.call(op).await? {
            response::Op::Epoch(e) => Ok(Epoch(e)),
            _ => Err(ClientError::unexpected()),
        }
    }

    async fn found(&self, op: request::Op) -> Result<response::Found, ClientError> {
        match self.link.call(op).await? {
            response::Op::Found(found) => Ok(found),
            _ => Err(ClientError::unexpected()),
        }
    }

    pub(crate) async fn record(&self, op: request::Op) -> Result<Bytes, ClientError> {
        match self.link.call(op).await? {
            response::Op::Record(bytes) => Ok(bytes),
            _ => Err(ClientError::unexpected()),
        }
    }

    pub(crate) async fn records(&self, op: request::Op) -> Result<response::Records, ClientError> {
        match self.link.call(op).await? {
            response::Op::Records(page) => {
                report(page.damaged);
                Ok(page)
            }
            _ => Err(ClientError::unexpected()),
        }
    }
}

/// Lists leave out what is damaged; asking for it by its id or name fails as corruption.
fn report(damaged: u32) {
    if damaged > 0 {
        tracing::error!(damaged, "the store left damaged records out of a list");
    }
}

fn verified(checkpoint: CheckpointId, bytes: Bytes) -> Result<Vec<u8>, ClientError> {
    if tidepool_proto::manifest::Manifest::id_of(&bytes) != checkpoint {
        return Err(ClientError::new(
            ErrorKind::Corruption,
            format!("the manifest of checkpoint {checkpoint} arrived damaged"),
        ));
    }
    Ok(bytes.to_vec())
}
