//! Scrubbing: every stored body is read and verified at a set pace, and mended from a peer where it is damaged.
//!
//! A pass has two walks. The first goes over what is stored: a body whose checksum does not fit, or whose index entry is damaged, is fetched
//! from a peer; where none has a good copy it is put into quarantine, which is reported loudly, survives a restart, and makes the chunk
//! count as missing until an upload brings it again. The second goes over what the groups' states name: a chunk without a body is damage too.
//!
//! A stored body that no state names is an orphan (a crash between a sweep and its delete, an upload that was refused, a raft snapshot that was
//! installed over rows). It may also belong to something under way, so it is removed only when a later pass finds the very same record
//! still unnamed, and by the driver, which knows what is under way.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tidepool_proto::body::check;
use tidepool_proto::wire::{request, response};
use tidepool_proto::{ChunkName, ErrorKind};
use tidepool_store_core::keys;
use tokio::sync::Notify;

use crate::db::DbError;
use crate::driver::now_ms;
use crate::requests::{Answer, Failure, Shared};
use crate::segments::Place;

/// The pace where none is asked for, in bytes a second.
const PACE: u64 = 32 << 20;
/// Names looked at together.
const PAGE: usize = 1024;
/// Bytes verified between two looks at the clock.
const STEP: u64 = 1 << 20;
/// Chunk rows looked at together.
const ROWS: usize = 4096;
/// An orphan is left alone for this long after it was seen first.
const GRACE: Duration = Duration::from_secs(600);
/// The most orphans remembered, and the most names in a report.
const MAX_ORPHANS: usize = 1 << 16;
const MAX_NAMED: usize = 32;

type Fetched<'a> = Pin<Box<dyn Future<Output = Result<Option<Bytes>, String>> + Send + 'a>>;

/// Where other copies of a body are.
pub trait PeerBodies: Send + Sync + 'static {
    /// Whether there are other nodes at all.
    fn any(&self) -> bool;
    /// A copy from any node that has one, unverified; none where every node that should have it was asked and has none.
    fn fetch<'a>(&'a self, name: &'a ChunkName) -> Fetched<'a>;
}

/// A node alone.
#[derive(Debug, Clone, Copy)]
pub struct NoPeers;

impl PeerBodies for NoPeers {
    fn any(&self) -> bool {
        false
    }

    fn fetch<'a>(&'a self, _: &'a ChunkName) -> Fetched<'a> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

/// The account of a pass.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    pub running: bool,
    /// Bytes a second.
    pub pace: u64,
    /// 0: there was none since the node started.
    pub started_ms: u64,
    pub ended_ms: u64,
    /// Bodies verified, and their bytes.
    pub bodies: u64,
    pub bytes: u64,
    /// Damaged or gone, and of those mended from a peer.
    pub damaged: u64,
    pub repaired: u64,
    /// No good copy was found of these: they are lost unless an upload brings them again. The first few by name.
    pub quarantined: u64,
    pub quarantined_names: Vec<String>,
    /// Bodies that nothing names, and of those removed.
    pub orphans: u64,
    pub orphan_bytes: u64,
    pub orphans_removed: u64,
    /// Why the pass ended early.
    pub error: Option<String>,
}

/// A node's scrubber: takes orders, and knows the last account.
pub(crate) struct Scrubber {
    pub(crate) peers: Arc<dyn PeerBodies>,
    report: Mutex<ScrubReport>,
    wake: Notify,
    /// Orphans seen, where they were and when.
    orphans: Mutex<HashMap<ChunkName, (Place, Instant)>>,
    grace: Mutex<Duration>,
}

impl Scrubber {
    pub(crate) fn new(peers: Arc<dyn PeerBodies>) -> Self {
        Self {
            peers,
            report: Mutex::default(),
            wake: Notify::new(),
            orphans: Mutex::default(),
            grace: Mutex::new(GRACE),
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut ScrubReport) -> T) -> T {
        f(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn answer(report: &ScrubReport) -> Answer {
    let json = serde_json::to_vec(report)
        .map_err(|e| Failure::new(ErrorKind::Failed, format!("an account of a scrub: {e}")))?;
    Ok(response::Op::ScrubReport(json.into()))
}

/// Begins a pass; where one runs, only its pace is set.
pub(crate) fn start(shared: &Shared, r: &request::ScrubStart) -> Answer {
    let scrubber = &shared.scrubber;
    let grace = r.orphan_grace_ms.map_or(GRACE, Duration::from_millis);
    *scrubber
        .grace
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = grace;
    let report = scrubber.with(|report| {
        let pace = if r.bytes_per_s == 0 {
            PACE
        } else {
            r.bytes_per_s
        };
        if report.running {
            report.pace = pace;
        } else {
            *report = ScrubReport {
                running: true,
                pace,
                started_ms: now_ms(),
                ..ScrubReport::default()
            };
            scrubber.wake.notify_one();
        }
        report.clone()
    });
    answer(&report)
}

/// The account of the pass that runs, or of the last.
pub(crate) fn status(shared: &Shared) -> Answer {
    answer(&shared.scrubber.with(|report| report.clone()))
}

/// Runs the passes that are ordered, one after the other.
pub(crate) async fn serve(shared: Arc<Shared>) {
    loop {
        shared.scrubber.wake.notified().await;
        let result = pass(&shared).await;
        let report = shared.scrubber.with(|report| {
            report.running = false;
            report.ended_ms = now_ms();
            report.error = result.err().map(|e| e.text().to_owned());
            report.clone()
        });
        tracing::info!(?report, "a scrub ended");
    }
}

async fn pass(shared: &Arc<Shared>) -> Result<(), Failure> {
    let mut after: Option<ChunkName> = None;
    loop {
        let from = after;
        let page = shared
            .blocking(move |shared| Ok(shared.bodies.page(from.as_ref(), PAGE)?))
            .await?;
        let Some((last, _)) = page.last() else {
            break;
        };
        after = Some(*last);
        let mut rest = page;
        while !rest.is_empty() {
            let begun = Instant::now();
            let (left, step) = shared.blocking(move |shared| verify(shared, rest)).await?;
            rest = left;
            let pace = note(shared, &step);
            for (name, why) in &step.damaged {
                mend(shared, name, why).await?;
            }
            remove_orphans(shared, step.orphans).await?;
            let due = Duration::from_secs_f64(step.bytes as f64 / pace.max(1) as f64);
            tokio::time::sleep(due.saturating_sub(begun.elapsed())).await;
        }
    }
    for group in shared.map.shard_groups() {
        let mut from = keys::table(keys::Table::Chunk);
        loop {
            let (gone, next) = shared
                .blocking(move |shared| without_body(shared, group, &from))
                .await?;
            for name in gone {
                mend(shared, &name, "its body is gone").await?;
            }
            match next {
                Some(next) => from = next,
                None => break,
            }
        }
    }
    Ok(())
}

/// What a step of the first walk found.
#[derive(Default)]
struct Step {
    bodies: u64,
    bytes: u64,
    damaged: Vec<(ChunkName, String)>,
    orphans: Vec<(ChunkName, Place)>,
}

type Page = Vec<(ChunkName, Option<Place>)>;

fn named(shared: &Shared, name: &ChunkName) -> Result<bool, Failure> {
    let group = shared.map.of_chunk(name);
    Ok(shared.db.state(group, &keys::chunk(name))?.is_some())
}

/// Verifies the first bodies of a page. Returns what is left of it.
fn verify(shared: &Shared, mut page: Page) -> Result<(Page, Step), Failure> {
    let mut step = Step::default();
    let mut done = 0;
    for (name, place) in &page {
        if step.bytes >= STEP {
            break;
        }
        done += 1;
        let named = named(shared, name)?;
        match (shared.bodies.get(name), place) {
            (Ok(None), _) => continue,
            (Ok(Some(body)), Some(place)) if !named => {
                step.bytes += body.len() as u64;
                step.orphans.push((*name, *place));
            }
            (Ok(Some(body)), _) => step.bytes += body.len() as u64,
            (Err(DbError::Corruption(why)), place) => {
                step.bytes += place.map_or(0, |p| u64::from(p.len));
                match (named, place) {
                    (true, _) => step.damaged.push((*name, why)),
                    (false, Some(place)) => step.orphans.push((*name, *place)),
                    (false, None) => {}
                }
            }
            (Err(e), _) => return Err(e.into()),
        }
        step.bodies += 1;
    }
    Ok((page.split_off(done), step))
}

/// Adds a step to the account. Returns the pace.
fn note(shared: &Shared, step: &Step) -> u64 {
    shared.scrubber.with(|report| {
        report.bodies += step.bodies;
        report.bytes += step.bytes;
        report.orphans += step.orphans.len() as u64;
        report.orphan_bytes += step
            .orphans
            .iter()
            .map(|(_, p)| u64::from(p.len))
            .sum::<u64>();
        report.pace
    })
}

/// Fetches a good copy, or puts the chunk into quarantine.
async fn mend(shared: &Arc<Shared>, name: &ChunkName, why: &str) -> Result<(), Failure> {
    shared.damaged.add(*name);
    shared.counters.corruption();
    shared.scrubber.with(|report| report.damaged += 1);
    let cause = match shared.scrubber.peers.fetch(name).await {
        Ok(Some(body)) if check(&body).is_ok() => {
            // Held: a sweep must not take it away and leave this behind.
            let _held = shared.holds.hold([*name]);
            let of = *name;
            if shared.blocking(move |shared| named(shared, &of)).await? {
                shared.writer.put(vec![(*name, body)]).await?;
                shared.scrubber.with(|report| report.repaired += 1);
                tracing::warn!(chunk = %name, why, "a damaged body was mended from a peer");
            }
            return Ok(());
        }
        Ok(Some(_)) => "a peer's copy is damaged too".to_owned(),
        Ok(None) => "no other node has it".to_owned(),
        Err(e) => e,
    };
    tracing::error!(
        chunk = %name, why, %cause,
        "QUARANTINE: a body is damaged and no good copy was found; an upload of the same data heals it"
    );
    let (of, text) = (*name, format!("{why}; {cause}"));
    shared
        .blocking(move |shared| Ok(shared.bodies.quarantine(&of, &text)?))
        .await?;
    shared.scrubber.with(|report| {
        report.quarantined += 1;
        if report.quarantined_names.len() < MAX_NAMED {
            report.quarantined_names.push(name.to_string());
        }
    });
    Ok(())
}

/// Remembers orphans, and removes those that have been some for long enough.
async fn remove_orphans(
    shared: &Arc<Shared>,
    orphans: Vec<(ChunkName, Place)>,
) -> Result<(), Failure> {
    let scrubber = &shared.scrubber;
    if orphans.is_empty() {
        return Ok(());
    }
    let grace = *scrubber
        .grace
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let mut ripe: HashMap<u32, Vec<ChunkName>> = HashMap::new();
    {
        let mut seen = scrubber
            .orphans
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (name, place) in orphans {
            match seen.get(&name) {
                Some((at, since)) if *at == place && since.elapsed() >= grace => {
                    ripe.entry(shared.map.of_chunk(&name))
                        .or_default()
                        .push(name);
                }
                Some((at, _)) if *at == place => {}
                _ if seen.len() < MAX_ORPHANS => {
                    seen.insert(name, (place, Instant::now()));
                }
                _ => {}
            }
        }
    }
    for (group, names) in ripe {
        // The driver knows what is under way; a record that came since spares its body.
        let removed = shared.driver.delete_orphans(group, names.clone()).await;
        scrubber.with(|report| report.orphans_removed += removed);
        let mut seen = scrubber
            .orphans
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for name in &names {
            seen.remove(name);
        }
    }
    Ok(())
}

/// Names, and the key to go on from.
type Gone = (Vec<ChunkName>, Option<Vec<u8>>);

/// Chunks of a group from a key on that have no body, and where to go on.
fn without_body(shared: &Shared, group: u32, from: &[u8]) -> Result<Gone, Failure> {
    let prefix = keys::table(keys::Table::Chunk);
    let mut names = Vec::new();
    shared.db.scan_state(group, &prefix, from, |key, _| {
        if let Ok(name) = <[u8; 32]>::try_from(&key[prefix.len()..]) {
            names.push(ChunkName(name));
        }
        names.len() < ROWS
    })?;
    let next = (names.len() == ROWS)
        .then(|| {
            names.last().map(|last| {
                let mut key = keys::chunk(last);
                key.push(0);
                key
            })
        })
        .flatten();
    let have = shared.bodies.has(&names)?;
    let mut gone = Vec::new();
    for (name, have) in names.into_iter().zip(have) {
        // A sweep may have taken the row and then the body since.
        if !have && named(shared, &name)? {
            gone.push(name);
        }
    }
    Ok((gone, next))
}
