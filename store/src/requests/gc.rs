//! What a collection asks of a group: roots, links, and chunks that are old enough to go.
//!
//! Pages are read one after another, not from one instant. That is enough: a group answers only after its cut, from when on nothing new can rest on anything older, and
//! what is removed while pages are read stays a root.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message as _;
use tidepool_proto::body;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::turn::TurnRecord;
use tidepool_proto::wire::{ABSENT, ANSWER_BYTES, WireError, request, response, split_names};
use tidepool_proto::{ErrorKind, SandboxId};
use tidepool_store_core::keys::{self, Table};
use tidepool_store_core::{
    ChunkState, Command, GcState, ImageState, META_GROUP, ManifestRow, SessionState, Tombstone, op,
};

use super::{Answer, Failure, Shared};

/// Rows looked at for one page.
const ROWS: usize = 4096;

/// How many uploads that began before the round are still open.
pub(crate) fn open_sessions(shared: &Shared, round: u64) -> Result<u64, Failure> {
    let mut open = std::collections::HashSet::new();
    for group in shared.map.shard_groups() {
        let prefix = keys::table(Table::Session);
        shared
            .db
            .scan_state(group, &prefix, &prefix, |key, value| {
                let old = |v: Vec<u8>| SessionState::decode(&v).is_ok_and(|s| s.round < round);
                if value.is_ok_and(old) {
                    open.insert(key.to_vec());
                }
                true
            })?;
    }
    Ok(open.len() as u64)
}

fn check_group(shared: &Shared, group: u32) -> Result<(), Failure> {
    match shared.map.groups().contains(&group) {
        true => Ok(()),
        false => Err(WireError::Field("there is no such group").into()),
    }
}

/// The group must be at the cut of the round that asks, if one does.
fn at_cut(shared: &Shared, group: u32, round: u64) -> Result<(), Failure> {
    if round == 0 {
        return Ok(());
    }
    let gc = match shared.db.state(group, &keys::gc())? {
        Some(value) => GcState::decode(&value)?,
        None => GcState::default(),
    };
    if gc.fence != round {
        return Err(Failure::new(
            ErrorKind::Conflict,
            format!("group {group} is at the cut of round {}", gc.fence),
        ));
    }
    Ok(())
}

/// A page under way.
struct Page {
    /// 0 where the group is looked at as it is.
    round: u64,
    /// Checkpoints that count as removed, sorted.
    without: Bytes,
    names: BytesMut,
    items: u64,
    purge: op::Purge,
    purge_sandboxes: Vec<SandboxId>,
    purge_checkpoints: BytesMut,
    /// The last sandbox met, and the round of its removal where it is removed.
    sandbox: Option<(SandboxId, Option<u64>)>,
}

impl Page {
    /// Whether what was removed in this round, if it was, is a root.
    fn live(&self, removed: Option<u64>) -> bool {
        removed.is_none_or(|at| self.round != 0 && at >= self.round)
    }

    fn names(&mut self, names: impl IntoIterator<Item = tidepool_proto::ChunkName>) {
        let before = self.names.len();
        for name in names {
            self.names.put_slice(&name.0);
        }
        self.items += u64::from(self.names.len() > before);
    }

    /// When the sandbox of a row was removed, if it was.
    fn removed(
        &mut self,
        shared: &Shared,
        group: u32,
        id: SandboxId,
    ) -> Result<Option<u64>, Failure> {
        if let Some((last, removed)) = self.sandbox
            && last == id
        {
            return Ok(removed);
        }
        let removed = match shared.db.state(group, &keys::tombstone(&id))? {
            Some(stone) => Some(Tombstone::decode(&stone)?.removed),
            None => None,
        };
        self.sandbox = Some((id, removed));
        if removed.is_some_and(|at| at < self.round) {
            self.purge_sandboxes.push(id);
        }
        Ok(removed)
    }

    fn row(
        &mut self,
        shared: &Shared,
        group: u32,
        key: &[u8],
        value: Vec<u8>,
    ) -> Result<(), Failure> {
        let table = key.first().copied().unwrap_or_default();
        if table == Table::Image as u8 {
            self.names(ImageState::decode(&value)?.roots);
        } else if table == Table::ImageGrave as u8 {
            let tail = &key[1..];
            let at = tail.first_chunk::<8>().map(|r| u64::from_be_bytes(*r));
            if self.live(at) {
                self.names(ImageState::decode(&value)?.roots);
            } else {
                self.purge.images.push(Bytes::copy_from_slice(tail));
            }
        } else {
            let Some((id, turn)) = key[1..].split_first_chunk::<16>() else {
                return Err(Failure::new(
                    ErrorKind::Corruption,
                    "a row without a sandbox",
                ));
            };
            let removed = self.removed(shared, group, SandboxId(*id))?;
            if !self.live(removed) {
                return Ok(());
            }
            if table == Table::Turn as u8 {
                let record = TurnRecord::decode(&value)
                    .map_err(|e| Failure::new(ErrorKind::Corruption, e.to_string()))?;
                self.names(record.links());
                return Ok(());
            }
            let row = ManifestRow::decode(&value)?;
            if self.live(row.removed) {
                let (without, _) = self.without.as_chunks::<32>();
                if without.binary_search(&row.id.0).is_ok() {
                    return Ok(());
                }
                let manifest = Manifest::decode(row.manifest).map_err(|e| {
                    let text = format!("the manifest of checkpoint {}: {e}", row.id);
                    Failure::new(ErrorKind::Corruption, text)
                })?;
                self.names(manifest.links());
            } else {
                self.purge_checkpoints.put_slice(id);
                self.purge_checkpoints.put_slice(turn);
            }
        }
        Ok(())
    }

    fn purge(&mut self) -> Bytes {
        let mut sandboxes = BytesMut::new();
        for id in &self.purge_sandboxes {
            sandboxes.put_slice(&id.0);
        }
        self.purge.sandboxes = sandboxes.freeze();
        self.purge.checkpoints = self.purge_checkpoints.split().freeze();
        if self.purge == op::Purge::default() {
            return Bytes::new();
        }
        Command::new(0, op::Op::Purge(self.purge.clone()))
            .encode_to_vec()
            .into()
    }
}

/// A page of what is reached first: from images in the meta group, from checkpoints and journaled outputs in shards.
pub(crate) async fn roots(shared: &Arc<Shared>, r: request::GcPage) -> Answer {
    check_group(shared, r.group)?;
    let tables: &'static [Table] = match r.group {
        META_GROUP => &[Table::Image, Table::ImageGrave],
        _ => &[Table::Manifest, Table::Turn],
    };
    shared
        .read(r.group, move |shared| {
            at_cut(shared, r.group, r.round)?;
            let mut page = Page {
                round: r.round,
                without: r.without,
                names: BytesMut::new(),
                items: 0,
                purge: op::Purge::default(),
                purge_sandboxes: Vec::new(),
                purge_checkpoints: BytesMut::new(),
                sandbox: None,
            };
            let mut next = Bytes::new();
            let mut rows = 0;
            for table in tables {
                let prefix = keys::table(*table);
                // The cursor is the last row of the page before.
                if !r.after.is_empty() && r.after[0] > prefix[0] {
                    continue;
                }
                let mut failure = None;
                shared
                    .db
                    .scan_state(r.group, &prefix, &r.after, |key, value| {
                        if key == &r.after[..] {
                            return true;
                        }
                        let row = value
                            .map_err(Failure::from)
                            .and_then(|v| page.row(shared, r.group, key, v));
                        if let Err(e) = row {
                            failure = Some(e);
                            return false;
                        }
                        rows += 1;
                        if rows >= ROWS || page.names.len() >= ANSWER_BYTES {
                            next = Bytes::copy_from_slice(key);
                            return false;
                        }
                        true
                    })?;
                if let Some(e) = failure {
                    return Err(e);
                }
                if !next.is_empty() {
                    break;
                }
            }
            Ok(response::Op::GcRoots(response::GcNames {
                purge: page.purge(),
                items: page.items,
                names: page.names.freeze(),
                next,
                lens: Bytes::new(),
            }))
        })
        .await
}

/// What chunks refer to. The answer may be for the first ones only.
pub(crate) async fn links(shared: &Arc<Shared>, r: request::GcLinks) -> Answer {
    check_group(shared, r.group)?;
    let names = split_names(&r.names)?;
    shared
        .read(r.group, move |shared| {
            let (mut counts, mut links) = (BytesMut::new(), BytesMut::new());
            for name in &names {
                if links.len() >= ANSWER_BYTES {
                    break;
                }
                let Some(value) = shared.db.state(r.group, &keys::chunk(name))? else {
                    counts.put_u32_le(ABSENT);
                    continue;
                };
                if !ChunkState::decode(&value)?.linked {
                    counts.put_u32_le(0);
                    continue;
                }
                let damaged = |what: String| {
                    Failure::new(ErrorKind::Corruption, format!("chunk {name}: {what}"))
                };
                let Some(body) = shared.bodies.get(name)? else {
                    return Err(damaged("its body is gone".into()));
                };
                let of = body::links(&body).map_err(|e| damaged(e.to_string()))?;
                counts.put_u32_le(of.len() as u32);
                for link in of {
                    links.put_slice(&link.0);
                }
            }
            Ok(response::Op::GcLinks(response::GcLinks {
                counts: counts.freeze(),
                links: links.freeze(),
            }))
        })
        .await
}

/// A page of the chunks that were neither added nor pinned since the round began.
pub(crate) async fn old(shared: &Arc<Shared>, r: request::GcPage) -> Answer {
    check_group(shared, r.group)?;
    shared
        .read(r.group, move |shared| {
            at_cut(shared, r.group, r.round)?;
            let prefix = keys::table(Table::Chunk);
            let (mut names, mut lens, mut next) = (BytesMut::new(), BytesMut::new(), Bytes::new());
            let mut failure = None;
            let mut rows = 0;
            shared
                .db
                .scan_state(r.group, &prefix, &r.after, |key, value| {
                    if key == &r.after[..] {
                        return true;
                    }
                    let chunk = value
                        .map_err(Failure::from)
                        .and_then(|v| Ok(ChunkState::decode(&v)?));
                    match chunk {
                        Ok(chunk) if r.round == 0 || chunk.stamp < r.round => {
                            names.put_slice(&key[1..]);
                            lens.put_u32_le(chunk.len);
                        }
                        Ok(_) => {}
                        Err(e) => {
                            failure = Some(e);
                            return false;
                        }
                    }
                    rows += 1;
                    if rows >= ROWS * 16 {
                        next = Bytes::copy_from_slice(key);
                        return false;
                    }
                    true
                })?;
            match failure {
                Some(e) => Err(e),
                None => Ok(response::Op::GcOld(response::GcNames {
                    names: names.freeze(),
                    lens: lens.freeze(),
                    next,
                    ..response::GcNames::default()
                })),
            }
        })
        .await
}
