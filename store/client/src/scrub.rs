//! Scrubs, for operators: of the node that is asked, or of one that is named. Each node scrubs what it keeps itself.

use tidepool_proto::wire::{request, response};

use crate::{Client, ClientError};

impl Client {
    /// Begins a scrub, or sets the pace of the one that runs, and gives its account (JSON). A pace of 0 is the node's own; bodies that nothing
    /// names are removed when they were seen by an earlier pass this long ago (none: the node's own).
    pub async fn scrub_start(
        &self,
        bytes_per_s: u64,
        orphan_grace_ms: Option<u64>,
    ) -> Result<Vec<u8>, ClientError> {
        let op = request::ScrubStart {
            bytes_per_s,
            orphan_grace_ms,
        };
        self.scrub_report(request::Op::ScrubStart(op)).await
    }

    /// The account of the scrub that runs, or of the last (JSON).
    pub async fn scrub_status(&self) -> Result<Vec<u8>, ClientError> {
        let op = request::Op::ScrubStatus(request::ScrubStatus {});
        self.scrub_report(op).await
    }

    /// [`Client::scrub_start`] on one node.
    pub async fn scrub_start_on(
        &self,
        node: u64,
        bytes_per_s: u64,
        orphan_grace_ms: Option<u64>,
    ) -> Result<Vec<u8>, ClientError> {
        let op = request::ScrubStart {
            bytes_per_s,
            orphan_grace_ms,
        };
        report(self.link.once(node, request::Op::ScrubStart(op)).await?)
    }

    /// [`Client::scrub_status`] of one node.
    pub async fn scrub_status_of(&self, node: u64) -> Result<Vec<u8>, ClientError> {
        let op = request::Op::ScrubStatus(request::ScrubStatus {});
        report(self.link.once(node, op).await?)
    }

    async fn scrub_report(&self, op: request::Op) -> Result<Vec<u8>, ClientError> {
        report(self.link.call(op).await?)
    }
}

fn report(op: response::Op) -> Result<Vec<u8>, ClientError> {
    match op {
        response::Op::ScrubReport(report) => Ok(report.to_vec()),
        _ => Err(ClientError::unexpected()),
    }
}
