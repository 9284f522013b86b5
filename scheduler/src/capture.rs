//! A turn's boundary: look, decide, capture what has to be captured, send it, commit.
//!
//! Two ways to capture. *Without a freeze*: where no process has to be dumped, the files are read as they lie, and it is checked afterwards that nothing ran and nothing was dirtied meanwhile.
//! *Frozen*: where that check fails, or processes have to be dumped; files and processes are then of the same instant, and everything that can wait
//! (cutting the process images, sending) waits until the sandbox runs again.
//!
//! Invariants: what is remembered of the last boundary is taken out first and put back only after the commit, so that any failure on the way makes the next boundary
//! look at everything; a sandbox frozen here is resumed here, whatever fails.
//!
//! Elsewhere on purpose: the rules (`scheduler_core::verdict`), reading trees (`tidepool_fs`).

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidepool_fs::{CaptureError, CaptureOptions, Captured, ChunkSink, DirtyInode, TreeIndex};
use tidepool_inspector::{FileEffects, RanBecause, TaskTable, Thaw, ThawWatch};
use tidepool_proto::api::{PathChange, TurnInfo};
use tidepool_proto::manifest::{Manifest, ProcessImage};
use tidepool_proto::recipe::BlobRef;
use tidepool_proto::turn::{
    Evidence, ExecResult, ExitStatus, MAX_INLINE_OUTPUT, Output, TurnRecord, TurnStats, Verdict,
};
use tidepool_proto::{CheckpointId, ChunkName, ErrorKind, TurnNo};
use tidepool_sandbox::Hold;
use tidepool_scheduler_core::verdict::{
    FilesSeen, Observation, Previous, ProcessPart, ProcessesSeen, Seen, decide,
};
use tidepool_store_client::Commit;

use crate::error::{Context, HostError, Result, chain};
use crate::host::{Host, now_ms, turn_info};
use crate::observe::{MemoryFiles, ipc_in_use};
use crate::sandbox::{Inner, Live, Sandbox, not_covered, shorten};
use crate::state_dir::DumpDir;
use crate::transfer::Upload;

/// Changed paths looked at to tell whether a process holds one; more count as unknown.
const MAX_CHANGES: usize = 4096;
/// Paths and processes named in a turn's evidence.
const SAMPLES: usize = 6;
/// How long threads may take to stand still after a thaw; those that do not have work to do.
const SETTLE_TIME: Duration = Duration::from_millis(100);
/// Longest path or reason in evidence, in bytes.
const SAMPLE_LEN: usize = 80;

/// What a boundary is the end of.
pub(crate) struct Cause {
    pub(crate) key: String,
    pub(crate) command: String,
    pub(crate) started_ms: u64,
    /// A command's end and output; none for a checkpoint asked for.
    pub(crate) result: Option<(ExitStatus, Vec<u8>, Vec<u8>)>,
}

/// What a boundary saw.
struct Look {
    files: FileEffects,
    tasks: Option<TaskTable>,
    mark: Option<tidepool_inspector::Mark>,
    memory: MemoryFiles,
    ipc: bool,
    /// Processes besides init, as `pid comm: what happened`.
    happened: Vec<String>,
    seen: ProcessesSeen,
}

/// What was captured of the files.
struct Files {
    captured: Captured,
    /// What changed since the last capture; none where that is not known here.
    changes: Option<Vec<PathChange>>,
}

/// What a boundary captured.
struct Taken {
    /// None where no file had to be looked at.
    captured: Option<Files>,
    part: ProcessPart,
    /// As the new manifest has them.
    processes: Option<ProcessImage>,
    result: Option<ExecResult>,
    look: Look,
    settled: Option<Settled>,
}

impl Sandbox {
    /// Ends a turn: afterwards its record, and its checkpoint where there is one, are committed.
    pub(crate) async fn boundary(
        &self,
        host: &Arc<Host>,
        inner: &mut Inner,
        cause: Cause,
    ) -> Result<TurnInfo> {
        let done = Boundary::take(self, host, inner, cause).await;
        if let (Err(e), Some(live)) = (&done, inner.live.as_mut()) {
            tracing::warn!(sandbox = %self.record.name, error = %e, "a turn could not be committed");
            live.index = None;
            live.tasks = None;
            live.memory = None;
        }
        self.set_capture_error(done.as_ref().err().map(|e| e.message.clone()));
        let state = self.info().state;
        self.publish(inner, state);
        done
    }
}

/// One boundary under way.
struct Boundary<'a> {
    sandbox: &'a Sandbox,
    host: &'a Arc<Host>,
    ended: Instant,
    frozen_us: u64,
    reasons: Vec<String>,
}

impl<'a> Boundary<'a> {
    async fn take(
        sandbox: &'a Sandbox,
        host: &'a Arc<Host>,
        inner: &mut Inner,
        cause: Cause,
    ) -> Result<TurnInfo> {
        let mut this = Self {
            sandbox,
            host,
            ended: Instant::now(),
            frozen_us: 0,
            reasons: Vec::new(),
        };
        let ended_ms = now_ms();
        let inner_epoch = inner.epoch;
        let Some(live) = inner.live.as_mut() else {
            return Err(HostError::new(
                ErrorKind::Unavailable,
                "the sandbox does not run here",
            ));
        };
        let index = live.index.take();
        let mut look = this.look(live).await?;
        let mut seen = observation(&look, live, inner.last.as_ref());
        if index.is_none() {
            seen.files = FilesSeen::Everything("the last look at the files is not known".into());
            look.files = FileEffects::Everything {
                reason: String::new(),
            };
        }
        let last = inner.last.as_ref();
        let upload = host.transfer.upload();
        let taken = this
            .capture(live, &seen, look, &index, last, cause.result, &upload)
            .await;
        let (taken, (session, sent)) = match (taken, upload.finish().await) {
            (Ok(taken), Ok(finished)) => (taken, finished),
            // Where sending fails, cutting is cut short: the cause is the sender's.
            (_, Err(e)) | (Err(e), Ok(_)) => return Err(e),
        };
        let Taken {
            captured,
            part,
            processes,
            result,
            look,
            settled,
        } = taken;

        let upper = captured
            .as_ref()
            .map(|f| f.captured.tree)
            .or(last.map(|(_, m)| m.upper));
        let upper = upper.ok_or_else(|| HostError::failed("there is no file tree to commit"))?;
        let files_changed = last.is_none_or(|(_, m)| m.upper != upper);
        let processes_changed = last.is_none_or(|(_, m)| m.processes != processes);
        let verdict = Verdict::of(files_changed, processes_changed);
        let changes = match (&captured, last) {
            (
                Some(Files {
                    changes: Some(changes),
                    ..
                }),
                _,
            ) => changes.clone(),
            // The first boundary after a restart or restore: the store knows what was there before.
            (Some(_), Some((_, before))) if files_changed => {
                let found = host.compare(before.upper, upper, MAX_CHANGES).await;
                found.map(|d| d.changes).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let upper_bytes = match (&captured, last) {
            (Some(f), _) => f.captured.bytes,
            (None, Some((_, m))) => m.upper_bytes,
            (None, None) => 0,
        };
        let turn = TurnNo(inner.turn.0 + 1);
        let record = &sandbox.record;
        let manifest = (verdict != Verdict::Clean || last.is_none()).then(|| Manifest {
            sandbox: sandbox.id,
            epoch: inner_epoch,
            turn,
            parent: last.map(|(id, _)| *id),
            created_ms: ended_ms,
            verdict,
            domain: record.domain.clone(),
            image_name: record.image_name.clone(),
            image: record.image,
            upper,
            processes: processes.clone(),
            spec: serde_json::to_vec(&record.spec).expect("a specification has only text keys"),
            init_nonce: live.nonce,
            upper_bytes,
        });
        let encoded = manifest.as_ref().map(Manifest::encode);
        let id = encoded.as_deref().map(Manifest::id_of);
        let checkpoint = match (id, last) {
            (Some(id), _) => id,
            (None, Some((id, _))) => *id,
            (None, None) => return Err(HostError::failed("a first turn without a checkpoint")),
        };
        let mut stats = TurnStats {
            captured_bytes: captured.as_ref().map_or(0, |f| f.captured.read_bytes)
                + if part == ProcessPart::Dump {
                    processes.as_ref().map_or(0, |p| p.bytes)
                } else {
                    0
                },
            sent_bytes: sent.bytes + encoded.as_ref().map_or(0, |m| m.len() as u64),
            sent_chunks: sent.chunks,
            full_bytes: upper_bytes + processes.as_ref().map_or(0, |p| p.bytes),
            frozen_us: this.frozen_us,
            exposed_us: 0,
        };
        stats.exposed_us = this.ended.elapsed().as_micros() as u64;
        let record = TurnRecord {
            turn,
            key: cause.key.clone(),
            command: cause.command,
            started_ms: cause.started_ms,
            ended_ms,
            verdict,
            checkpoint,
            evidence: evidence(&look, &changes, &this.reasons, verdict, not_covered(record)),
            stats,
            result,
        };
        let record = record.encode();
        let commit = Commit {
            sandbox: sandbox.id,
            epoch: inner_epoch,
            turn,
            key: cause.key,
            record: record.clone(),
            manifest: id.zip(encoded),
            session,
        };
        host.transfer
            .client
            .commit(commit)
            .await
            .map_err(HostError::from)?;
        if let Some(session) = session
            && let Err(e) = host.transfer.client.end_session(session).await
        {
            // The pins end with the session's time; nothing is lost by their staying a while.
            tracing::debug!(error = %e, "a session was not ended");
        }

        live.index = captured.map(|f| Arc::new(f.captured.index)).or(index);
        live.tasks = match settled {
            Some(settled) => settled.await?,
            None => look.tasks,
        };
        live.memory = Some(look.memory);
        inner.turn = turn;
        if let (Some(id), Some(manifest)) = (id, manifest) {
            inner.last = Some((id, manifest));
        }
        turn_info(&record)
    }

    /// Captures what has to be captured, cuts it, and offers it to the upload.
    #[allow(clippy::too_many_arguments)]
    async fn capture(
        &mut self,
        live: &Live,
        seen: &Observation,
        mut look: Look,
        index: &Option<Arc<TreeIndex>>,
        last: Option<&(CheckpointId, Manifest)>,
        result: Option<(ExitStatus, Vec<u8>, Vec<u8>)>,
        upload: &Upload,
    ) -> Result<Taken> {
        let decision = decide(seen);
        // Files first, as they lie; a change that a living process could notice asks for its image too.
        let mut part = decision.processes;
        let mut captured = None;
        if decision.verdict.files() && part != ProcessPart::Dump {
            let taken = self.files(live, index.clone(), &look.files, upload).await?;
            let quiet = self.quiet_since(live, &look).await?;
            match taken {
                Some(taken) if quiet => match self.held(live, &taken, look.seen.alive).await {
                    Seen::No => captured = Some(taken),
                    _ => {
                        self.reasons
                            .push("a living process may hold a file that changed".into());
                        part = ProcessPart::Dump;
                    }
                },
                _ => {
                    self.reasons
                        .push("something ran while the files were read".into());
                    part = if look.seen.alive == Some(0) {
                        part
                    } else {
                        ProcessPart::Dump
                    };
                }
            }
        }
        self.reasons.extend(decision.reasons);
        let (mut dump, mut settled) = (None, None);
        if part == ProcessPart::Dump || (decision.verdict.files() && captured.is_none()) {
            let frozen = self
                .frozen(
                    live,
                    index.clone(),
                    &look,
                    upload,
                    part == ProcessPart::Dump,
                )
                .await?;
            (captured, dump, look) = (Some(frozen.files), frozen.dump, frozen.look);
            settled = frozen.settled;
        }
        // Everything below happens while the sandbox runs on.
        let processes = match (part, dump) {
            (ProcessPart::Dump, Some((dir, alive))) => {
                Some(self.process_image(dir, alive, upload).await?)
            }
            (ProcessPart::Drop, _) => None,
            _ => last.and_then(|(_, m)| m.processes.clone()),
        };
        let result = match result {
            Some((status, stdout, stderr)) => Some(ExecResult {
                status,
                stdout: self.journal(stdout, upload).await?,
                stderr: self.journal(stderr, upload).await?,
            }),
            None => None,
        };
        Ok(Taken {
            captured,
            part,
            processes,
            result,
            look,
            settled,
        })
    }

    /// Reads what happened since the last boundary.
    async fn look(&self, live: &Live) -> Result<Look> {
        let (inspector, slot, init_pid) = (self.host.inspector.clone(), live.slot, live.init_pid);
        let baseline = live.tasks.clone();
        let blind = match (&inspector, slot) {
            (Some(_), Some(_)) => None,
            _ => Some(
                self.host
                    .runtime
                    .processes(&live.name)
                    .await
                    .map_err(HostError::from)?,
            ),
        };
        tokio::task::spawn_blocking(move || {
            // Tasks before files: what a task does between the two readings is then in the files, or shows as having run.
            let (tasks, files, mark, lost) = match (&inspector, slot) {
                (Some(inspector), Some(slot)) => {
                    let tasks = inspector
                        .tasks(slot)
                        .map_err(|e| HostError::failed(chain(&e)))?;
                    let effects = inspector
                        .take(slot)
                        .map_err(|e| HostError::failed(chain(&e)))?;
                    (
                        Some(tasks),
                        effects.files,
                        Some(effects.mark),
                        effects.process_events_lost,
                    )
                }
                _ => {
                    let reason = "nothing watches this sandbox".to_owned();
                    (None, FileEffects::Everything { reason }, None, true)
                }
            };
            let memory = MemoryFiles::read(init_pid);
            let ipc = ipc_in_use(init_pid).context("looking at the sandbox's IPC objects")?;
            let (seen, happened) = match (&tasks, blind) {
                (Some(now), _) => processes_seen(now, baseline.as_ref(), init_pid, lost),
                (None, blind) => {
                    let others = blind
                        .unwrap_or_default()
                        .iter()
                        .filter(|p| p.pid as u32 != init_pid)
                        .count();
                    let unknown = (others == 0).then_some(0);
                    let seen = ProcessesSeen {
                        alive: Some(others as u64),
                        ran: unknown,
                        born: unknown,
                        exited: Some(0),
                        lost: false,
                    };
                    (seen, Vec::new())
                }
            };
            Ok(Look {
                files,
                tasks,
                mark,
                memory,
                ipc,
                happened,
                seen,
            })
        })
        .await?
    }

    /// Whether nothing ran and nothing was dirtied since `look`. Init itself runs when it is spoken to; it writes no files.
    async fn quiet_since(&self, live: &Live, look: &Look) -> Result<bool> {
        let (Some(inspector), Some(slot)) = (self.host.inspector.clone(), live.slot) else {
            return Ok(look.seen.alive == Some(0));
        };
        let (Some(tasks), Some(mark)) = (look.tasks.clone(), look.mark) else {
            return Ok(false);
        };
        let init_pid = live.init_pid;
        tokio::task::spawn_blocking(move || {
            let activity = inspector
                .activity_since(slot, &mark, &tasks)
                .map_err(|e| HostError::failed(chain(&e)))?;
            let ran = activity.ran.iter().any(|r| r.task.tgid != init_pid);
            Ok(!ran && !activity.dirtied && !activity.process_events)
        })
        .await?
    }

    /// Captures the upper: by dirty inodes where they are known, else by a walk. Arms the hooks again for files mapped for writing.
    /// None where a file changed while it was read.
    async fn files(
        &self,
        live: &Live,
        index: Option<Arc<TreeIndex>>,
        effects: &FileEffects,
        upload: &Upload,
    ) -> Result<Option<Files>> {
        let upper = self.sandbox.dir.upper();
        let key = self.host.transfer.key.clone();
        let mut sink = upload.sink();
        let effects = effects.clone();
        let mapped = self.mapped(live).await?;
        tokio::task::spawn_blocking(move || {
            let failed = tidepool_inspector::rearm::paths(&upper, &mapped)
                .context("arming the hooks for mapped files again")?;
            if let Some((path, e)) = failed.first() {
                return Err(HostError::failed(format!(
                    "arming the hooks for {}: {e}",
                    path.display()
                )));
            }
            let options = CaptureOptions::default();
            let captured = match (&index, effects) {
                (Some(index), FileEffects::Inodes(dirty)) => {
                    let dirty: Vec<DirtyInode> = dirty
                        .iter()
                        .map(|d| DirtyInode {
                            ino: d.ino,
                            dev: d.dev,
                            generation: d.generation,
                        })
                        .collect();
                    tidepool_fs::capture::dirty(&upper, &key, options, index, &dirty, &mut sink)
                }
                (index, _) => {
                    tidepool_fs::capture::full(&upper, &key, options, index.as_deref(), &mut sink)
                }
            };
            let captured = match captured {
                Ok(captured) => captured,
                Err(CaptureError::Changed { path }) => {
                    tracing::debug!(path, "a file changed while it was read");
                    return Ok(None);
                }
                Err(e) => return Err(HostError::failed(format!("capturing files: {}", chain(&e)))),
            };
            let changes = index.map(|before| captured.index.changes_since(&before, MAX_CHANGES));
            let changes = changes.filter(|c| !c.truncated).map(|c| c.changes);
            Ok(Some(Files { captured, changes }))
        })
        .await?
    }

    /// Files that living processes have mapped shared and writable, as inside paths.
    async fn mapped(&self, live: &Live) -> Result<BTreeSet<PathBuf>> {
        let held = self.held_files(live).await?;
        Ok(held
            .into_iter()
            .filter(|(_, hold)| {
                matches!(
                    hold,
                    Hold::Mapped {
                        shared_writable: true
                    }
                )
            })
            .filter_map(|(path, _)| path.strip_prefix("/").map(PathBuf::from).ok())
            .collect())
    }

    async fn held_files(&self, live: &Live) -> Result<Vec<(PathBuf, Hold)>> {
        let processes = self
            .host
            .runtime
            .processes(&live.name)
            .await
            .map_err(HostError::from)?;
        let init_pid = live.init_pid;
        let held = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            for p in processes.iter().filter(|p| p.pid as u32 != init_pid) {
                match tidepool_sandbox::open_files(p.pid) {
                    Ok(held) => all.extend(held.into_iter().map(|h| (h.path, h.hold))),
                    // Gone meanwhile; whether something ran is checked afterwards.
                    Err(e) => tracing::debug!(pid = p.pid, error = %e, "a process is gone"),
                }
            }
            all
        });
        Ok(held.await?)
    }

    /// Whether a living process holds a file that changed.
    async fn held(&self, live: &Live, files: &Files, alive: Option<u64>) -> Seen {
        if alive == Some(0) {
            return Seen::No;
        }
        let Some(changes) = &files.changes else {
            return Seen::Unknown;
        };
        let Ok(held) = self.held_files(live).await else {
            return Seen::Unknown;
        };
        let changed: BTreeSet<PathBuf> = changes
            .iter()
            .map(|c| PathBuf::from(format!("/{}", c.path.trim_start_matches('/'))))
            .collect();
        // A directory's own entry changes with its times; only what is gone from under a process matters there.
        let touched = |path: &PathBuf, hold: &Hold| match hold {
            Hold::WorkingDirectory | Hold::Root => !path.exists() && changed.contains(path),
            _ => changed.contains(path),
        };
        match held.iter().any(|(path, hold)| touched(path, hold)) {
            true => Seen::Yes,
            false => Seen::No,
        }
    }

    /// Captures files, and processes where asked, in one frozen instant.
    async fn frozen(
        &mut self,
        live: &Live,
        index: Option<Arc<TreeIndex>>,
        before: &Look,
        upload: &Upload,
        dump: bool,
    ) -> Result<Frozen> {
        let _slot = self
            .host
            .dumps
            .acquire()
            .await
            .map_err(|_| HostError::failed("the daemon stops"))?;
        let runtime = &self.host.runtime;
        let was_paused = self.sandbox.info().state == tidepool_proto::api::SandboxState::Paused;
        let since = Instant::now();
        if !was_paused {
            runtime.pause(&live.name).await.map_err(HostError::from)?;
        }
        let taken = self.frozen_inside(live, index, before, upload, dump).await;
        if was_paused {
            return taken;
        }
        let watch = self.watch_thaw(live, taken.is_ok());
        let resumed = runtime.resume(&live.name).await.map_err(HostError::from);
        self.frozen_us += since.elapsed().as_micros() as u64;
        // A sandbox that stays frozen is worse than a turn that is not committed.
        resumed.context("resuming the sandbox")?;
        let mut frozen = taken?;
        let init_pid = live.init_pid;
        frozen.settled = Some(tokio::task::spawn_blocking(move || {
            settle(watch?, init_pid)
        }));
        Ok(frozen)
    }

    /// Begins to tell a thaw from work. None where that is not possible: all that lives then counts as having run.
    fn watch_thaw(&self, live: &Live, wanted: bool) -> Option<ThawWatch> {
        let (inspector, slot) = (self.host.inspector.as_ref()?, live.slot.filter(|_| wanted)?);
        let watch = inspector.watch_thaw(slot);
        watch
            .inspect_err(|e| tracing::debug!(error = %e, "a thaw cannot be watched"))
            .ok()
    }

    async fn frozen_inside(
        &self,
        live: &Live,
        index: Option<Arc<TreeIndex>>,
        before: &Look,
        upload: &Upload,
        dump: bool,
    ) -> Result<Frozen> {
        let mut look = self.look(live).await?;
        look.files = merge(&before.files, look.files);
        let news: Vec<String> = before
            .happened
            .iter()
            .filter(|h| !look.happened.contains(h))
            .cloned()
            .collect();
        look.happened.extend(news);
        let dump = match dump {
            true => {
                let dir = self.host.state.dump_dir()?;
                self.host
                    .runtime
                    .checkpoint(&live.name, dir.path())
                    .await
                    .map_err(HostError::from)?;
                Some((dir, look.seen.alive.unwrap_or(0)))
            }
            false => None,
        };
        let files = self.files(live, index, &look.files, upload).await?;
        let files = files.ok_or_else(|| {
            HostError::failed(
                "files changed while the sandbox was frozen: something outside writes to its upper",
            )
        })?;
        Ok(Frozen {
            files,
            dump,
            look,
            settled: None,
        })
    }

    /// Cuts and sends dumped process images.
    async fn process_image(
        &self,
        dir: DumpDir,
        alive: u64,
        upload: &Upload,
    ) -> Result<ProcessImage> {
        let (pages, key) = (self.host.pages.clone(), self.host.transfer.key.clone());
        let client = self.host.transfer.client.clone();
        let session = upload.session();
        upload.mark_used();
        let dir = Arc::new(dir);
        // A pack that the index remembers may be gone from the store; then its pages are packed again, once.
        for _ in 0..3 {
            let (mut sink, pages, key, dir) =
                (upload.sink(), pages.clone(), key.clone(), dir.clone());
            let cut = tokio::task::spawn_blocking(move || {
                let mut index = crate::host::lock(&pages);
                tidepool_fs::dump::capture(dir.path(), &key, &mut index, &mut sink)
            })
            .await?
            .map_err(|e| HostError::failed(format!("cutting process images: {}", chain(&e))))?;
            let fresh = upload.offered();
            let reused: Vec<ChunkName> = cut
                .packs
                .iter()
                .filter(|p| !fresh.contains(p))
                .copied()
                .collect();
            let missing = match reused.is_empty() {
                true => Vec::new(),
                false => client.pin(session, &reused).await?,
            };
            if missing.is_empty() {
                return Ok(ProcessImage {
                    tree: cut.tree,
                    bytes: cut.bytes,
                    count: alive.min(u64::from(u32::MAX)) as u32,
                    compat: self.host.compat.clone(),
                });
            }
            crate::host::lock(&self.host.pages).forget_packs(&missing);
        }
        Err(HostError::failed(
            "the store keeps losing packs of process images",
        ))
    }

    /// An output stream as the journal keeps it.
    async fn journal(&self, bytes: Vec<u8>, upload: &Upload) -> Result<Output> {
        if bytes.len() <= MAX_INLINE_OUTPUT {
            return Ok(Output::Inline(bytes));
        }
        let (mut sink, key) = (upload.sink(), self.host.transfer.key.clone());
        tokio::task::spawn_blocking(move || {
            let mut chunks = Vec::new();
            for piece in bytes.chunks(256 << 10) {
                let name = key.name(piece);
                // A failure is the upload's own, which says so when it ends.
                let _ = sink.chunk(name, piece);
                chunks.push(name);
            }
            let len = bytes.len() as u64;
            Ok(Output::Stored(BlobRef { len, chunks }))
        })
        .await?
    }
}

struct Frozen {
    files: Files,
    dump: Option<(DumpDir, u64)>,
    look: Look,
    /// The tasks once they stand still after the thaw, if nothing ran; absent where there was no thaw.
    settled: Option<Settled>,
}

/// The tasks to compare the next boundary with; none where something ran or may have.
type Settled = tokio::task::JoinHandle<Option<TaskTable>>;

/// Waits until the threads stand still again after a thaw.
fn settle(watch: ThawWatch, init_pid: u32) -> Option<TaskTable> {
    let until = Instant::now() + SETTLE_TIME;
    while Instant::now() < until {
        match watch.poll(init_pid) {
            Ok(Thaw::Pending) => std::thread::sleep(Duration::from_millis(1)),
            Ok(Thaw::Quiet { tasks, .. }) => return Some(tasks),
            Ok(Thaw::Ran(_)) => return None,
            Err(e) => {
                tracing::debug!(error = %chain(&e), "a thaw cannot be watched");
                return None;
            }
        }
    }
    None
}

fn merge(a: &FileEffects, b: FileEffects) -> FileEffects {
    match (a, b) {
        (FileEffects::Inodes(a), FileEffects::Inodes(mut b)) => {
            b.extend_from_slice(a);
            b.sort_unstable();
            b.dedup();
            FileEffects::Inodes(b)
        }
        (FileEffects::Everything { reason }, _) => FileEffects::Everything {
            reason: reason.clone(),
        },
        (_, everything) => everything,
    }
}

/// What the task tables say of the processes besides init.
fn processes_seen(
    now: &TaskTable,
    baseline: Option<&TaskTable>,
    init: u32,
    lost: bool,
) -> (ProcessesSeen, Vec<String>) {
    let others = |t: &&tidepool_inspector::TaskInfo| t.tgid != init && !t.exited;
    let alive: BTreeSet<u32> = now.tasks.iter().filter(others).map(|t| t.tgid).collect();
    let mut happened = Vec::new();
    let Some(baseline) = baseline else {
        let unknown = alive.is_empty().then_some(0);
        let seen = ProcessesSeen {
            alive: Some(alive.len() as u64),
            ran: unknown,
            born: unknown,
            exited: unknown,
            lost: false,
        };
        return (seen, happened);
    };
    let (mut ran, mut born, mut exited) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for r in now
        .ran_since(baseline)
        .iter()
        .filter(|r| r.task.tgid != init)
    {
        let t = &r.task;
        let (set, what) = match r.because {
            _ if t.exited => (&mut exited, "ended"),
            RanBecause::New => (&mut born, "was born"),
            RanBecause::Gone => (&mut exited, "ended"),
            RanBecause::Moved | RanBecause::Running => (&mut ran, "ran"),
        };
        if set.insert(t.tgid) {
            happened.push(format!("{} {}: {what}", t.ns_tgid, t.comm));
        }
    }
    let seen = ProcessesSeen {
        alive: Some(alive.len() as u64),
        ran: Some(ran.len() as u64),
        born: Some(born.len() as u64),
        exited: Some(exited.len() as u64),
        // The tables tell what lives; events only add what came and went in between.
        lost: lost && !alive.is_empty(),
    };
    (seen, happened)
}

fn observation(look: &Look, live: &Live, last: Option<&(CheckpointId, Manifest)>) -> Observation {
    let files = match &look.files {
        FileEffects::Inodes(list) if list.is_empty() => FilesSeen::None,
        FileEffects::Inodes(list) => FilesSeen::Inodes(list.len() as u64),
        FileEffects::Everything { reason } => FilesSeen::Everything(reason.clone()),
    };
    let same =
        |other: &Option<MemoryFiles>| other.as_ref().is_some_and(|m| m.same_as(&look.memory));
    let mut processes = look.seen.clone();
    // Memory-backed files and IPC objects live in the process image: they need one even where only init lives.
    let holds_memory = look.ipc || !same(&live.pristine);
    if holds_memory && processes.alive == Some(0) {
        processes.alive = Some(1);
    }
    let changed = match (look.ipc || look.memory.unsure.is_some(), same(&live.memory)) {
        (true, _) => Seen::Unknown,
        (false, true) => Seen::No,
        (false, false) => Seen::Yes,
    };
    Observation {
        files,
        processes,
        // Decided when the changed paths are known.
        open_dirty: Seen::No,
        tmpfs: changed,
        previous: match last {
            None => Previous::None,
            Some((_, m)) => match &m.processes {
                Some(p) => Previous::WithProcesses(p.count.max(1)),
                None => Previous::FilesOnly,
            },
        },
        forced: None,
    }
}

fn evidence(
    look: &Look,
    changes: &[PathChange],
    reasons: &[String],
    verdict: Verdict,
    not_covered: Vec<String>,
) -> Evidence {
    let sample = |list: &[String]| {
        list.iter()
            .take(SAMPLES)
            .map(|s| shorten(s, SAMPLE_LEN))
            .collect()
    };
    let paths: Vec<String> = changes.iter().map(|c| c.path.clone()).collect();
    let mut reasons: Vec<String> = reasons.to_vec();
    reasons.extend(look.memory.unsure.clone());
    reasons.dedup();
    Evidence {
        paths: sample(&paths),
        paths_total: paths.len() as u64,
        processes: sample(&look.happened),
        processes_total: look.happened.len() as u64,
        // A Clean turn's record stays small: what made it look twice is not worth keeping.
        reasons: if verdict == Verdict::Clean {
            Vec::new()
        } else {
            sample(&reasons)
        },
        not_covered: sample(&not_covered),
    }
}
