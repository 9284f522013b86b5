//! The host daemon's API: HTTP/1.1 with JSON over a unix socket.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`HostStatus`] |
//! | `GET /v1/images` | | `[ImageInfo]` |
//! | `POST /v1/images` | [`ImportImage`] | events: [`Progress`], then [`ImageInfo`] |
//! | `GET /v1/sandboxes` | | `[SandboxInfo]` |
//! | `POST /v1/sandboxes` | [`CreateSandbox`] | events, then [`SandboxInfo`] |
//! | `GET /v1/sandboxes/{sandbox}` | | [`SandboxInfo`] |
//! | `DELETE /v1/sandboxes/{sandbox}?forget=bool` | | `{}`; with `forget` its checkpoints go too |
//! | `POST /v1/sandboxes/{sandbox}/pause`, `/resume` | | [`SandboxInfo`] |
//! | `POST /v1/sandboxes/{sandbox}/exec` | [`ExecRequest`] | lines of [`ExecEvent`] |
//! | `POST /v1/sandboxes/{sandbox}/execs/{key}/stdin` | raw bytes, streamed | `{}` at their end, which closes stdin |
//! | `POST /v1/sandboxes/{sandbox}/execs/{key}/resize` | [`Resize`] | `{}` |
//! | `POST /v1/sandboxes/{sandbox}/execs/{key}/signal` | [`SendSignal`] | `{}` |
//! | `GET /v1/sandboxes/{sandbox}/turns?from=N&limit=N` | | `[TurnInfo]` |
//! | `GET /v1/sandboxes/{sandbox}/checkpoints` | | `[CheckpointInfo]` |
//! | `POST /v1/sandboxes/{sandbox}/checkpoints` | | events, then [`TurnInfo`] |
//! | `GET /v1/sandboxes/{sandbox}/checkpoints/{checkpoint}` | | [`CheckpointInfo`] |
//! | `GET /v1/sandboxes/{sandbox}/diff?from=C&to=C` | | [`CheckpointDiff`]; without `to` the newest |
//! | `POST /v1/sandboxes/{sandbox}/restore` | [`RestoreRequest`] | events, then [`RestoreInfo`] |
//! | `POST /v1/sandboxes/{sandbox}/rollback` | [`RestoreRequest`] | events, then [`RestoreInfo`] |
//! | `POST /v1/sandboxes/{sandbox}/fork` | [`ForkRequest`] | events, then [`RestoreInfo`] |
//!
//! `{sandbox}` is a name, an id or a unique prefix of an id (at least 4 digits); `{checkpoint}` an id, a unique prefix, or a turn as `@N`.
//! "Events" are lines of JSON ([`Event`]): any number of `progress`, then one `done` or `error`. A failure before the
//! first line has the HTTP status of its [`ErrorKind`] and a body of [`ApiError`].

use serde::{Deserialize, Serialize};

use crate::error::ErrorKind;
use crate::ids::{CheckpointId, DomainId, Epoch, SandboxId, TreeId, TurnNo};
use crate::turn::{Evidence, ExitStatus, TurnStats, Verdict};

/// A failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub kind: ErrorKind,
    pub message: String,
}

/// One line of a long request's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event<T> {
    Progress(Progress),
    Done { result: T },
    Error { error: ApiError },
}

/// How far a long request is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done, such as `reading files` or `sending chunks`.
    pub stage: String,
    /// Bytes done in this stage.
    pub done: u64,
    /// Bytes to do, where known.
    pub total: Option<u64>,
}

/// The daemon and what it runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    pub version: String,
    pub host: String,
    pub uptime_s: u64,
    pub state_dir: String,
    /// The inspector's probe set: `ctime`, `ext4`, `trampoline`, `syscalls` or `walk`.
    pub probe_set: String,
    /// Why better ones are not in use, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probe_fallbacks: Vec<String>,
    pub runc: Option<String>,
    pub criu: Option<String>,
    pub kernel: String,
    /// What does not work here, one sentence each.
    pub warnings: Vec<String>,
    pub store: StoreStatus,
    pub sandboxes_running: u64,
    pub sandboxes_total: u64,
}

/// The store behind the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// `embedded`, or the addresses of the nodes.
    pub endpoint: String,
    pub chunks: u64,
    pub chunk_bytes: u64,
    pub ready: bool,
}

/// Imports an image from this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportImage {
    pub name: String,
    /// An absolute path: a directory, a tar (plain, gzip or zstd) or an OCI layout (directory or tar).
    pub source: String,
    /// Told by looking where absent.
    pub kind: Option<ImageKind>,
}

/// What an image is imported from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageKind {
    Directory,
    Tar,
    OciLayout,
}

/// An imported image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    pub name: String,
    pub tree: TreeId,
    pub domain: DomainId,
    /// Logical bytes of its files.
    pub bytes: u64,
    pub files: u64,
    /// Bytes sent to the store for it: 0 when it was all there.
    pub sent_bytes: u64,
    pub created_ms: u64,
    /// Defaults from an OCI configuration.
    #[serde(default)]
    pub env: Vec<String>,
    #[serde(default)]
    pub cwd: String,
}

/// Creates and starts a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CreateSandbox {
    pub name: String,
    pub image: String,
    /// `KEY=VALUE`, for every exec.
    pub env: Vec<String>,
    /// Where execs start; the image's own, or `/`.
    pub cwd: Option<String>,
    /// `uid[:gid]` or a name in the image.
    pub user: Option<String>,
    pub memory_bytes: Option<u64>,
    pub pids: Option<u32>,
    /// Let it reach outside through NAT.
    pub network: bool,
    /// Host directories mounted in; no checkpoint covers them.
    pub mounts: Vec<MountSpec>,
    /// Lines of gitignore syntax, from the sandbox's root: changes of such paths alone ask for no checkpoint.
    pub ignore: Vec<String>,
    /// A known agent that runs inside, whose own bookkeeping is ignored too.
    pub agent: Option<String>,
}

/// A host directory mounted into a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    pub source: String,
    pub target: String,
    #[serde(default)]
    pub read_only: bool,
}

/// Where a sandbox stands on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    Running,
    Paused,
    /// Known, not running here; it can be restored from its last checkpoint.
    Dead,
    /// Being created or restored.
    Starting,
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxInfo {
    pub id: SandboxId,
    pub name: String,
    pub image: String,
    pub domain: DomainId,
    pub state: SandboxState,
    pub epoch: Epoch,
    /// The last committed turn.
    pub turn: TurnNo,
    /// The checkpoint that holds the state at that turn's end.
    pub checkpoint: Option<CheckpointId>,
    pub created_ms: u64,
    /// Why the last capture failed, where it did: the sandbox runs on, and its newest state is not yet safe.
    pub capture_error: Option<String>,
    /// What no checkpoint covers, such as `host directory /data at /mnt`.
    pub not_covered: Vec<String>,
    /// Lines of gitignore syntax: changes of such paths alone ask for no checkpoint. The daemon's own, the agent's, the sandbox's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<String>,
    /// The known agent whose bookkeeping is among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
}

/// Runs a command in a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecRequest {
    pub argv: Vec<String>,
    /// `KEY=VALUE`, added to the sandbox's.
    pub env: Vec<String>,
    pub cwd: Option<String>,
    pub user: Option<String>,
    /// A pseudo-terminal of this size.
    pub tty: Option<Resize>,
    /// Whether stdin will be sent; closed from the start otherwise.
    pub stdin: bool,
    pub timeout_ms: Option<u64>,
    /// The idempotency key, at most 128 bytes; made up by the daemon where empty. A key seen before gets its journaled result, nothing runs again.
    pub key: String,
}

/// A terminal's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resize {
    pub cols: u16,
    pub rows: u16,
}

/// A signal for a running exec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendSignal {
    pub signal: u8,
}

/// One line of an exec's answer. Output may stream; `exit` comes when the turn is committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecEvent {
    Started {
        key: String,
        turn: TurnNo,
        /// The key was journaled: what follows is the recorded result.
        replayed: bool,
    },
    /// Base64.
    Stdout { data: String },
    /// Base64.
    Stderr { data: String },
    /// The command ended; the turn is committed.
    Exit {
        status: ExitStatus,
        turn: Box<TurnInfo>,
    },
    /// The command may have run; its turn is not committed.
    Error { error: ApiError },
}

/// A committed turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TurnInfo {
    pub turn: TurnNo,
    pub key: String,
    pub command: String,
    pub started_ms: u64,
    pub ended_ms: u64,
    pub verdict: Verdict,
    pub checkpoint: CheckpointId,
    pub evidence: Evidence,
    pub stats: TurnStats,
    /// Bytes of the turn's record in the store, beside `stats.sent_bytes`.
    pub record_bytes: u64,
    pub status: Option<ExitStatus>,
}

/// A committed checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    pub id: CheckpointId,
    pub sandbox: SandboxId,
    pub turn: TurnNo,
    pub epoch: Epoch,
    pub parent: Option<CheckpointId>,
    pub created_ms: u64,
    pub verdict: Verdict,
    pub image: String,
    pub image_tree: TreeId,
    pub upper_tree: TreeId,
    pub upper_bytes: u64,
    pub process_tree: Option<TreeId>,
    pub process_bytes: u64,
    pub process_count: u32,
}

/// One path that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathChange {
    pub path: String,
    pub change: ChangeKind,
    pub bytes_before: u64,
    pub bytes_after: u64,
}

/// How a path differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    Added,
    Removed,
    /// Content or type.
    Modified,
    /// Only mode, owner, times or extended attributes.
    Metadata,
}

/// What differs between two checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDiff {
    pub from: CheckpointId,
    pub to: CheckpointId,
    pub paths: Vec<PathChange>,
    /// More differ than are listed.
    pub truncated: bool,
    pub processes_differ: bool,
}

/// Restores a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RestoreRequest {
    /// An id, a unique prefix or `@TURN`; the newest where absent.
    pub checkpoint: Option<String>,
    /// Restore even if the sandbox runs here (it is stopped first).
    pub force: bool,
}

/// Makes a new sandbox from a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ForkRequest {
    pub name: String,
    /// As in [`RestoreRequest`]; where absent a checkpoint is taken now if the sandbox runs here.
    pub checkpoint: Option<String>,
}

/// A finished restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreInfo {
    pub sandbox: SandboxInfo,
    pub checkpoint: CheckpointId,
    pub turn: TurnNo,
    /// The restored tree was walked again and its root equals the manifest's.
    pub verified: bool,
    pub processes_restored: u32,
    pub fetched_bytes: u64,
    pub duration_ms: u64,
}
