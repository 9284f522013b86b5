//! Capturing: files as they lie or frozen, processes, and the output of the turn's command.
//!
//! Invariant: a sandbox frozen here is resumed here, whatever fails.
//!
//! Elsewhere on purpose: when and what to capture ([`crate::boundary`]), reading trees and cutting (`tidepool_fs`).

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidepool_fs::{
    CaptureError, CaptureOptions, Captured, ChunkSink, DirtyInode, Light, TreeIndex,
};
use tidepool_inspector::look::Look;
use tidepool_inspector::rearm::{self, Moment};
use tidepool_inspector::{FileEffects, TaskTable, Thaw, ThawWatch};
use tidepool_proto::ChunkName;
use tidepool_proto::api::{ChangeKind, PathChange, SandboxState};
use tidepool_proto::manifest::ProcessImage;
use tidepool_proto::recipe::BlobRef;
use tidepool_proto::turn::{MAX_INLINE_OUTPUT, Output};
use tidepool_sandbox::{HeldFile, Hold};
use tidepool_scheduler_core::verdict::Seen;

use crate::boundary::Boundary;
use crate::error::{Context, HostError, Result, chain};
use crate::look::merge;
use crate::sandbox::Live;
use crate::state_dir::DumpDir;
use crate::transfer::Upload;

/// Changed paths looked at to tell whether a process holds one; more count as unknown.
pub(crate) const MAX_CHANGES: usize = 4096;
/// How long threads may take to stand still after a thaw; those that do not have work to do.
const SETTLE_TIME: Duration = Duration::from_millis(100);

/// What was captured of the files.
pub(crate) struct Files {
    pub(crate) captured: Captured,
    /// What changed since the last capture; none where that is not known here.
    pub(crate) changes: Option<Vec<PathChange>>,
    /// Set where nothing changed since the last checkpoint that is worth one.
    pub(crate) light: Option<Light>,
    /// A mapped file may change unseen from now on: the next capture has to read everything.
    pub(crate) unarmed: bool,
}

impl Boundary<'_> {
    /// Captures the upper: by dirty inodes where they are known, else by a walk. Arms the hooks again for files mapped for writing.
    /// None where a file changed while it was read.
    pub(crate) async fn files(
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
        let (committed, rules) = (live.committed.clone(), self.sandbox.rules.clone());
        let others = self.others(live).await?;
        // The reading was before this.
        let reading = Moment::now();
        tokio::task::spawn_blocking(move || {
            let pids = others.into_iter().map(|pid| pid as u32);
            let unarmed = rearm::mapped(&upper, Path::new("/"), pids)
                .context("arming the hooks for mapped files again")?;
            for (path, e) in &unarmed {
                tracing::warn!(path = %path.display(), error = %e, "a mapped file cannot be watched: the next turn reads all files");
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
            reading.outlast();
            let changes = index.map(|before| captured.index.changes_since(&before, MAX_CHANGES));
            let changes = changes.filter(|c| !c.truncated).map(|c| c.changes);
            let light = committed.and_then(|before| {
                let ignores = |path: &[u8], dir: bool| rules.ignores(path, dir);
                tidepool_fs::weigh(&upper, &before, &captured.index, &ignores)
            });
            Ok(Some(Files {
                captured,
                changes,
                light,
                unarmed: !unarmed.is_empty(),
            }))
        })
        .await?
    }

    /// Processes besides init.
    async fn others(&self, live: &Live) -> Result<Vec<i32>> {
        let all = self
            .host
            .runtime
            .processes(&live.name)
            .await
            .map_err(HostError::from)?;
        let others = all
            .iter()
            .map(|p| p.pid)
            .filter(|pid| *pid as u32 != live.init_pid);
        Ok(others.collect())
    }

    async fn held_files(&self, live: &Live) -> Result<Vec<HeldFile>> {
        let others = self.others(live).await?;
        let held = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            for pid in others {
                match tidepool_sandbox::open_files(pid) {
                    Ok(held) => all.extend(held),
                    // Gone meanwhile; whether something ran is checked afterwards.
                    Err(e) => tracing::debug!(pid, error = %e, "a process is gone"),
                }
            }
            all
        });
        Ok(held.await?)
    }

    /// Whether a living process holds a file that changed.
    pub(crate) async fn held(&self, live: &Live, files: &Files, alive: u64) -> Seen {
        if alive == 0 {
            return Seen::No;
        }
        let Some(changes) = &files.changes else {
            return Seen::Unknown;
        };
        let Ok(held) = self.held_files(live).await else {
            return Seen::Unknown;
        };
        match held.iter().any(|h| touched(h, changes)) {
            true => Seen::Yes,
            false => Seen::No,
        }
    }

    /// Captures files, and processes where asked, in one frozen instant.
    pub(crate) async fn frozen(
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
        let was_paused = self.sandbox.info().state == SandboxState::Paused;
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
        if !wanted {
            return None;
        }
        let watch = self.host.inspector.watch_thaw(live.slot);
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
                Some((dir, look.processes.alive))
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
    pub(crate) async fn process_image(
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
                false => {
                    let pinned = client.pin(session, &reused).await?;
                    upload.rests_on(&reused, pinned.round);
                    pinned.missing
                }
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
    pub(crate) async fn journal(&self, bytes: Vec<u8>, upload: &Upload) -> Result<Output> {
        if bytes.len() <= MAX_INLINE_OUTPUT {
            return Ok(Output::Inline(bytes));
        }
        let (mut sink, key) = (upload.sink(), self.host.transfer.key.clone());
        tokio::task::spawn_blocking(move || {
            let mut chunks = Vec::new();
            for piece in bytes.chunks(256 << 10) {
                let name = key.name(piece);
                // A failure is the upload's own, which says so when it ends.
                let _ = sink.chunk(name, piece, &[]);
                chunks.push(name);
            }
            let len = bytes.len() as u64;
            Ok(Output::Stored(BlobRef { len, chunks }))
        })
        .await?
    }
}

/// What was captured in a frozen instant.
pub(crate) struct Frozen {
    pub(crate) files: Files,
    pub(crate) dump: Option<(DumpDir, u64)>,
    pub(crate) look: Look,
    /// The tasks once they stand still after the thaw, if nothing ran; absent where there was no thaw.
    pub(crate) settled: Option<Settled>,
}

/// The tasks to compare the next boundary with; none where something ran or may have.
pub(crate) type Settled = tokio::task::JoinHandle<Option<TaskTable>>;

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

/// Whether any of the changes is one of a held file: of itself, or of a directory on its way that came or went (with all in it).
fn touched(held: &HeldFile, changes: &[PathChange]) -> bool {
    let itself_matters = held.deleted || !matches!(held.hold, Hold::WorkingDirectory | Hold::Root);
    changes.iter().any(|c| {
        let path = Path::new("/").join(c.path.trim_start_matches('/'));
        match path == held.path {
            // A directory's own entry changes with what is in it; a process only stands there.
            true => itself_matters || c.change == ChangeKind::Removed,
            false => {
                matches!(c.change, ChangeKind::Added | ChangeKind::Removed)
                    && held.path.starts_with(&path)
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(path: &str, hold: Hold) -> HeldFile {
        HeldFile {
            path: path.into(),
            deleted: false,
            hold,
        }
    }

    fn change(path: &str, change: ChangeKind) -> PathChange {
        PathChange {
            path: path.into(),
            change,
            bytes_before: 0,
            bytes_after: 0,
        }
    }

    #[test]
    fn a_held_file_is_touched_by_its_own_change_and_by_its_directory_coming_or_going() {
        let file = held("/srv/log/a", Hold::Program);
        assert!(touched(&file, &[change("srv/log/a", ChangeKind::Modified)]));
        assert!(touched(&file, &[change("/srv", ChangeKind::Removed)]));
        assert!(touched(&file, &[change("srv/log", ChangeKind::Added)]));
        assert!(!touched(&file, &[change("srv/log", ChangeKind::Metadata)]));
        assert!(!touched(
            &file,
            &[
                change("srv/lo", ChangeKind::Added),
                change("srv/log/b", ChangeKind::Modified)
            ]
        ));
        let cwd = held("/srv", Hold::WorkingDirectory);
        assert!(!touched(&cwd, &[change("srv", ChangeKind::Metadata)]));
        assert!(touched(&cwd, &[change("srv", ChangeKind::Removed)]));
        let gone = HeldFile {
            deleted: true,
            ..held("/srv", Hold::WorkingDirectory)
        };
        assert!(touched(&gone, &[change("srv", ChangeKind::Metadata)]));
    }
}
