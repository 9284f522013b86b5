//! Collection, as the node that leads the meta group drives it. What makes it safe is in [`tidepool_store_core::gc`]; here is the walk.
//!
//! One collection at a time. It asks groups page by page and holds, besides a page, the chunks that have links (few) and a [`marks::Marks`] of bounded size. It may die at any step:
//! the next one begins a new round.
//!
//! Invariants: nothing is swept unless every name reached was found; a step that any group does not confirm ends the collection.
//!
//! Elsewhere on purpose: what pages hold (`requests::gc`), deleting bodies on each replica (whoever applies the sweep).

mod marks;
mod walk;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tidepool_proto::wire::{join_names, request, response};
use tidepool_proto::{ChunkName, ErrorKind};
use tidepool_store_core::{Command, META_GROUP, Reply, keys, op};
use tokio::sync::mpsc;

use crate::driver::now_ms;
use crate::requests::{Answer, Failure, Shared};
use marks::Marks;

/// Names swept by one command.
const SWEEP: usize = 4096;
/// How often open uploads are looked for while a collection waits for them.
const LOOK: Duration = Duration::from_millis(500);
/// The longest a collection waits for uploads, in milliseconds.
const MAX_GRACE_MS: u64 = 24 * 3600 * 1000;

/// How far a collection is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// There never was one.
    #[default]
    Never,
    Begin,
    /// Waits for uploads under way.
    Wait,
    Cut,
    Mark,
    Sweep,
    Done,
    Failed,
}

/// The account of a collection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    pub phase: Phase,
    /// 0 for a dry one.
    pub round: u64,
    /// It only looks: no round is begun, nothing is swept.
    pub dry: bool,
    pub started_ms: u64,
    /// 0 while it runs.
    pub ended_ms: u64,
    /// Checkpoints, images and journaled outputs from which it marked.
    pub roots: u64,
    /// Distinct chunks with links that it walked through.
    pub nodes: u64,
    /// Links that it followed, the same chunk counted once a place.
    pub links: u64,
    /// Chunks, and bytes of their bodies, that nothing needs.
    pub garbage: u64,
    pub garbage_bytes: u64,
    /// Of those, what was swept: all but what someone pinned meanwhile.
    pub swept: u64,
    pub swept_bytes: u64,
    /// Uploads that were still open when the wait was over: they have to pin again.
    pub interrupted: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// The node's collector: takes orders, and knows the last account.
pub(crate) struct Collector {
    orders: mpsc::Sender<request::GcRun>,
    queue: Mutex<Option<mpsc::Receiver<request::GcRun>>>,
    report: Mutex<Option<GcReport>>,
}

impl Default for Collector {
    fn default() -> Self {
        let (orders, queue) = mpsc::channel(1);
        Self {
            orders,
            queue: Mutex::new(Some(queue)),
            report: Mutex::new(None),
        }
    }
}

impl Collector {
    fn last(&self) -> Option<GcReport> {
        let report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.clone()
    }

    fn set(&self, report: &GcReport) {
        let mut last = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Some(report.clone());
    }
}

fn answer(report: &GcReport) -> Answer {
    let json = serde_json::to_vec(report)
        .map_err(|e| Failure::new(ErrorKind::Failed, format!("an account of a round: {e}")))?;
    Ok(response::Op::GcReport(json.into()))
}

/// Begins a collection; where one runs, gives its account.
pub(crate) async fn run(shared: &Arc<Shared>, r: request::GcRun) -> Answer {
    if !r.without.len().is_multiple_of(32) || !r.without.as_chunks::<32>().0.is_sorted() {
        return Err(Failure::new(
            ErrorKind::Invalid,
            "a list of checkpoints is not sorted or not a whole number of them",
        ));
    }
    if r.grace_ms > MAX_GRACE_MS {
        return Err(Failure::new(
            ErrorKind::Invalid,
            "a collection waits a day at the most",
        ));
    }
    // Only the leader of the meta group collects.
    shared.read(META_GROUP, |_| Ok(())).await?;
    let running = shared
        .collector
        .last()
        .filter(|last| last.started_ms != 0 && last.ended_ms == 0);
    if let Some(running) = running {
        return answer(&running);
    }
    let begun = GcReport {
        phase: Phase::Begin,
        dry: r.dry,
        started_ms: now_ms(),
        ..GcReport::default()
    };
    if shared.collector.orders.try_send(r).is_err() {
        return Err(Failure::again("a collection is about to begin"));
    }
    shared.collector.set(&begun);
    answer(&begun)
}

/// The account of this node's collection, or else the last that the cluster knows.
pub(crate) async fn status(shared: &Arc<Shared>) -> Answer {
    if let Some(last) = shared.collector.last() {
        return answer(&last);
    }
    let stored = shared
        .read(META_GROUP, |shared| {
            Ok(shared.db.state(META_GROUP, &keys::gc_report())?)
        })
        .await?;
    match stored {
        Some(json) => Ok(response::Op::GcReport(json.into())),
        None => answer(&GcReport::default()),
    }
}

/// Executes orders, one after another, until the node stops.
pub(crate) async fn serve(shared: Arc<Shared>) {
    let queue = {
        let mut queue = shared
            .collector
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        queue.take()
    };
    let Some(mut queue) = queue else { return };
    while let Some(order) = queue.recv().await {
        let mut round = Round {
            without: match order.dry {
                true => order.without,
                false => Bytes::new(),
            },
            shared: shared.clone(),
            report: GcReport {
                phase: Phase::Begin,
                dry: order.dry,
                started_ms: now_ms(),
                ..GcReport::default()
            },
        };
        let result = round.collect(order.grace_ms).await;
        let mut report = round.report;
        report.ended_ms = now_ms();
        match result {
            Ok(()) => {
                report.phase = Phase::Done;
                tracing::info!(
                    round = report.round,
                    swept = report.swept,
                    bytes = report.swept_bytes,
                    "a collection is done"
                );
            }
            Err(e) => {
                tracing::error!(round = report.round, error = %e.text(), "a collection ended early");
                report.phase = Phase::Failed;
                report.error = Some(e.text().to_owned());
            }
        }
        shared.collector.set(&report);
        // Only for those who ask after a restart.
        if !report.dry
            && let Ok(json) = serde_json::to_vec(&report)
        {
            let op = op::Op::ReportGc(op::ReportGc {
                round: report.round,
                report: json.into(),
            });
            let _ = shared.propose(META_GROUP, op).await;
        }
    }
}

/// One collection under way.
struct Round {
    shared: Arc<Shared>,
    /// Checkpoints that count as removed.
    without: Bytes,
    report: GcReport,
}

impl Round {
    fn enter(&mut self, phase: Phase) {
        self.report.phase = phase;
        self.shared.collector.set(&self.report);
    }

    async fn collect(&mut self, grace_ms: u64) -> Result<(), Failure> {
        if !self.report.dry {
            self.cut(grace_ms).await?;
        }
        self.enter(Phase::Mark);
        let chunks = self.shared.stats().chunks;
        let mut marks = Marks::new(chunks, rand::random());
        let purges = self.mark(&mut marks).await?;
        self.enter(Phase::Sweep);
        for group in self.shared.map.shard_groups() {
            self.sweep(group, &marks).await?;
        }
        if !self.report.dry {
            for (group, purge) in purges {
                self.shared.propose(group, purge).await?;
            }
        }
        Ok(())
    }

    /// Brings every group to the cut of a new round.
    async fn cut(&mut self, grace_ms: u64) -> Result<(), Failure> {
        let token: [u8; 16] = rand::random();
        let start = op::Op::StartRound(op::StartRound {
            token: Bytes::copy_from_slice(&token),
        });
        let round = match self.shared.propose(META_GROUP, start).await? {
            Reply::Gc { round, .. } => round,
            _ => return Err(unexpected()),
        };
        self.report.round = round;
        self.every_group(op::Op::BeginRound(op::Round { round }), |r, _| r)
            .await?;
        self.enter(Phase::Wait);
        self.wait(grace_ms).await?;
        self.enter(Phase::Cut);
        // Only now that all have begun. The model shows that this is not what makes it safe (the lowest round that a commit met does): it spares uploads that
        // would be refused for nothing.
        self.every_group(op::Op::Cut(op::Round { round }), |_, fence| fence)
            .await
    }

    /// Asks a group, wherever it is led.
    async fn ask(&self, group: u32, op: request::Op) -> Result<response::Op, Failure> {
        let answer = match op.clone() {
            request::Op::GcRoots(r) => crate::requests::gc::roots(&self.shared, r).await,
            request::Op::GcLinks(r) => crate::requests::gc::links(&self.shared, r).await,
            request::Op::GcOld(r) => crate::requests::gc::old(&self.shared, r).await,
            _ => return Err(unexpected()),
        };
        match answer {
            Err(e) if e.is_moved() => Ok(self.shared.client.call_group(group, op).await?),
            here => here,
        }
    }

    /// Has every group do a step, and checks that it did.
    async fn every_group(
        &mut self,
        step: op::Op,
        reached: impl Fn(u64, u64) -> u64,
    ) -> Result<(), Failure> {
        for group in self.shared.map.groups() {
            match self.shared.propose(group, step.clone()).await? {
                Reply::Gc { round, fence } if reached(round, fence) == self.report.round => {}
                Reply::Gc { round, .. } => {
                    return Err(Failure::new(
                        ErrorKind::Conflict,
                        format!("another collection has begun round {round}"),
                    ));
                }
                _ => return Err(unexpected()),
            }
        }
        Ok(())
    }

    /// Waits, no longer than it was told to, until no upload from before the round is open: a courtesy, nothing depends on it.
    async fn wait(&mut self, grace_ms: u64) -> Result<(), Failure> {
        let until = tokio::time::Instant::now() + Duration::from_millis(grace_ms);
        loop {
            let round = self.report.round;
            let open = self
                .shared
                .blocking(move |shared| crate::requests::gc::open_sessions(shared, round))
                .await?;
            self.report.interrupted = open;
            let now = tokio::time::Instant::now();
            if open == 0 || now >= until {
                return Ok(());
            }
            tokio::time::sleep(LOOK.min(until - now)).await;
        }
    }

    async fn sweep(&mut self, group: u32, marks: &Marks) -> Result<(), Failure> {
        let mut after = Bytes::new();
        loop {
            let page = request::GcPage {
                group,
                round: self.report.round,
                after,
                without: Bytes::new(),
            };
            let page = match self.ask(group, request::Op::GcOld(page)).await? {
                response::Op::GcOld(page) => page,
                _ => return Err(unexpected()),
            };
            let (names, _) = page.names.as_chunks::<32>();
            let (lens, _) = page.lens.as_chunks::<4>();
            let mut garbage: Vec<ChunkName> = Vec::new();
            for (name, len) in names.iter().map(|n| ChunkName(*n)).zip(lens) {
                if !marks.has(&name) {
                    self.report.garbage += 1;
                    self.report.garbage_bytes += u64::from(u32::from_le_bytes(*len));
                    garbage.push(name);
                }
            }
            if !self.report.dry {
                for names in garbage.chunks(SWEEP) {
                    self.sweep_some(group, names).await?;
                }
            }
            self.shared.collector.set(&self.report);
            if page.next.is_empty() {
                return Ok(());
            }
            after = page.next;
        }
    }

    async fn sweep_some(&mut self, group: u32, names: &[ChunkName]) -> Result<(), Failure> {
        let op = op::Op::Sweep(op::Sweep {
            round: self.report.round,
            names: join_names(names),
        });
        match self.shared.propose(group, op).await? {
            // Every replica deletes the bodies as it applies this.
            Reply::Swept { names, bytes } => {
                self.report.swept += names.len() as u64;
                self.report.swept_bytes += bytes;
                Ok(())
            }
            _ => Err(unexpected()),
        }
    }
}

fn unexpected() -> Failure {
    Failure::new(ErrorKind::Failed, "a group answered with something else")
}

/// A command that a page of roots asked for.
fn purge_of(bytes: Bytes) -> Result<Option<op::Op>, Failure> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let command = <Command as prost::Message>::decode(bytes)
        .map_err(|e| Failure::new(ErrorKind::Failed, format!("not a command: {e}")))?;
    Ok(command.op)
}
