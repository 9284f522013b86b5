//! Collection and retention, for operators: policies, labels, kept and removed checkpoints.

use bytes::Bytes;
use tidepool_proto::wire::{request, response};
use tidepool_proto::{CheckpointId, SandboxId};

use crate::calls::id;
use crate::{Client, ClientError};

impl Client {
    /// Begins a collection, unless one runs, and gives its account so far (JSON). `grace_ms` is how long it waits for uploads under way.
    pub async fn gc_run(&self, grace_ms: u64) -> Result<Vec<u8>, ClientError> {
        let op = request::Op::GcRun(request::GcRun {
            grace_ms,
            ..request::GcRun::default()
        });
        self.gc_report(op).await
    }

    /// The same for one that only looks what would go, as if these checkpoints were removed.
    pub async fn gc_try(&self, without: &[CheckpointId]) -> Result<Vec<u8>, ClientError> {
        let mut without: Vec<[u8; 32]> = without.iter().map(|c| c.0).collect();
        without.sort_unstable();
        let op = request::Op::GcRun(request::GcRun {
            grace_ms: 0,
            dry: true,
            without: without.concat().into(),
        });
        self.gc_report(op).await
    }

    /// The account of the last collection, or of the one that runs (JSON).
    pub async fn gc_status(&self) -> Result<Vec<u8>, ClientError> {
        self.gc_report(request::Op::GcStatus(request::GcStatus {}))
            .await
    }

    async fn gc_report(&self, op: request::Op) -> Result<Vec<u8>, ClientError> {
        match self.link.call(op).await? {
            response::Op::GcReport(report) => Ok(report.to_vec()),
            _ => Err(ClientError::unexpected()),
        }
    }

    /// The policies of retention, as the store's core encodes them; empty where none were ever set.
    pub async fn policies(&self) -> Result<Vec<u8>, ClientError> {
        let op = request::Op::Policies(request::Policies {});
        Ok(self.record(op).await?.to_vec())
    }

    /// Replaces the policies: a conflict where others than the version they name are in force.
    pub async fn set_policies(&self, policies: Vec<u8>) -> Result<(), ClientError> {
        let policies = policies.into();
        self.done(request::Op::SetPolicies(request::SetPolicies { policies }))
            .await
    }

    /// Replaces a sandbox's labels, as the store's core encodes them.
    pub async fn label_sandbox(
        &self,
        sandbox: SandboxId,
        labels: Vec<u8>,
    ) -> Result<(), ClientError> {
        self.done(request::Op::LabelSandbox(request::LabelSandbox {
            sandbox: id(sandbox),
            labels: labels.into(),
        }))
        .await
    }

    /// Has a checkpoint kept whatever the policies say, or lets it go again.
    pub async fn keep_checkpoint(
        &self,
        sandbox: SandboxId,
        checkpoint: CheckpointId,
        keep: bool,
    ) -> Result<(), ClientError> {
        self.done(request::Op::KeepCheckpoint(request::KeepCheckpoint {
            sandbox: id(sandbox),
            checkpoint: Bytes::copy_from_slice(&checkpoint.0),
            keep,
        }))
        .await
    }

    /// The checkpoints of a sandbox that are kept on request.
    pub async fn kept(&self, sandbox: SandboxId) -> Result<Vec<CheckpointId>, ClientError> {
        let op = request::Op::Kept(request::Sandbox { id: id(sandbox) });
        let bytes = self.record(op).await?;
        let (ids, rest) = bytes.as_chunks::<32>();
        if !rest.is_empty() {
            return Err(ClientError::unexpected());
        }
        Ok(ids.iter().map(|c| CheckpointId(*c)).collect())
    }

    /// Removes checkpoints of a sandbox: a conflict where its history is not at `changes` any more.
    pub async fn remove_checkpoints(
        &self,
        sandbox: SandboxId,
        changes: u64,
        checkpoints: &[CheckpointId],
    ) -> Result<(), ClientError> {
        let list: Vec<u8> = checkpoints.iter().flat_map(|c| c.0).collect();
        self.done(request::Op::RemoveCheckpoints(request::RemoveCheckpoints {
            sandbox: id(sandbox),
            changes,
            checkpoints: list.into(),
        }))
        .await
    }
}
