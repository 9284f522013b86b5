//! What the store holds of sandboxes: turns, checkpoints, trees; and what differs between them.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use tidepool_fs::restore::{RestoreError, RestoreOptions};
use tidepool_fs::{TreeKind, load_node, load_root};
use tidepool_proto::api::*;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::TurnRecord;
use tidepool_proto::{CheckpointId, ErrorKind, SandboxId, TreeId, TurnNo};
use tidepool_scheduler_core::diff::{TreeDiff, diff};

use crate::error::{HostError, Result, chain};
use crate::host::Host;
use crate::transfer::source_error;

impl Host {
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

    /// The checkpoint that holds a sandbox's newest committed state, and its newest turn.
    pub(crate) async fn head(
        &self,
        id: SandboxId,
    ) -> Result<Option<(CheckpointId, Manifest, TurnNo)>> {
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
