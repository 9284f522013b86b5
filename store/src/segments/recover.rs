//! What a start does with the segments it finds.
//!
//! Records up to a segment's `indexed` were promised: they are left alone, and damage there is found by whoever reads them. What stands
//! behind was written by a batch that a crash cut short, or whose index entries the crash took: whole records are put into the index again,
//! and from the first that is not whole on the file is cut.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use tidepool_proto::ChunkName;

use super::format::{Head, Place, RECORD_HEADER, Row, SEGMENT_HEADER, check_segment_header};
use super::index::{self, IndexBatch};
use super::{Inner, Put, Tail, files, lock};
use crate::db::DbError;
use crate::error::StoreError;

/// Records put into the index at once.
const BATCH: usize = 4096;
/// The most names in quarantine that a start remembers.
const MAX_QUARANTINED: usize = 1 << 16;

fn stopped(e: DbError) -> StoreError {
    match e {
        DbError::Corruption(why) => StoreError::Damaged(why),
        other => StoreError::Stopped(other.to_string()),
    }
}

pub(super) fn recover(inner: &Inner) -> Result<(), StoreError> {
    let rows = index::rows(&inner.db).map_err(stopped)?;
    let quarantined = index::quarantined(&inner.db, MAX_QUARANTINED).map_err(stopped)?;
    lock(&inner.quarantined).extend(quarantined.into_iter().map(|(name, _)| name));
    let io = |segment: u32| {
        let path = inner.files.path(segment);
        move |e| StoreError::io(path, e)
    };
    let found = inner
        .files
        .list()
        .map_err(|e| StoreError::io(inner.db.path(), e))?;
    *lock(&inner.rows) = without_gone(inner, rows, &found).map_err(stopped)?;
    let mut newest = None;
    for segment in found {
        let file = inner.files.get(segment).map_err(io(segment))?;
        let len = file.metadata().map_err(io(segment))?.len();
        let row = lock(&inner.rows).get(&segment).copied();
        let header = read_header(&file, segment).map_err(io(segment))?;
        if let (None, Err(why)) = (row, header) {
            // Its first batch was never whole, and nothing in it was promised.
            tracing::warn!(segment, why, bytes = len, "a torn segment is removed");
            inner.files.remove(segment).map_err(io(segment))?;
            continue;
        }
        if let Err(why) = header {
            tracing::error!(segment, why, "a segment is damaged");
        }
        let row = row.unwrap_or(Row::NEW);
        if len < row.indexed {
            tracing::error!(
                segment,
                bytes = row.indexed - len,
                "bodies that were promised are gone: the segment is too short"
            );
        }
        let mut whole = len >= row.indexed && header.is_ok();
        let mut end = row.indexed;
        if whole && len > row.indexed {
            end = tail(inner, &file, segment, row.indexed, len)?;
            if end < len {
                tracing::warn!(segment, bytes = len - end, "a torn tail is cut");
                file.set_len(end)
                    .and_then(|()| file.sync_all())
                    .map_err(io(segment))?;
            }
        }
        whole &= !row.sealed && end < inner.options.segment_bytes;
        newest = whole.then_some(Tail {
            segment,
            file,
            len: end,
            ended: None,
        });
    }
    seal_all_but(inner, newest.as_ref().map(|t| t.segment)).map_err(stopped)?;
    *lock(&inner.tail) = newest;
    Ok(())
}

/// The rows of segments that have files. A row without one is the last trace of a segment that was given back, or a loss.
fn without_gone(
    inner: &Inner,
    mut rows: BTreeMap<u32, Row>,
    found: &[u32],
) -> Result<BTreeMap<u32, Row>, DbError> {
    let mut batch = IndexBatch::new(&inner.db);
    let mut lost = Ok(());
    rows.retain(|segment, row| {
        if found.binary_search(segment).is_ok() {
            return true;
        }
        if row.live > 0 {
            // Its row stays, so that the number is not used again and every name in it is damage and not absence.
            tracing::error!(
                segment,
                bytes = row.live,
                "a segment with stored bodies is gone"
            );
            return true;
        }
        lost = lost.clone().and(batch.delete_row(*segment));
        false
    });
    lost?;
    batch.write(false)?;
    Ok(rows)
}

/// Segments that nothing is appended to any more say so in their rows.
fn seal_all_but(inner: &Inner, open: Option<u32>) -> Result<(), DbError> {
    let mut rows = lock(&inner.rows);
    let mut batch = IndexBatch::new(&inner.db);
    for (segment, row) in rows.iter_mut() {
        if Some(*segment) != open && !row.sealed {
            row.sealed = true;
            batch.put_row(*segment, row)?;
        }
    }
    batch.write(true)
}

fn read_header(file: &File, segment: u32) -> std::io::Result<Result<(), &'static str>> {
    Ok(match files::read(file, 0, SEGMENT_HEADER)? {
        Some(bytes) => check_segment_header(segment, &bytes),
        None => Err("it ends within its header"),
    })
}

/// Puts the records between two offsets into the index, up to the first that is not whole. Returns where that is.
fn tail(
    inner: &Inner,
    file: &Arc<File>,
    segment: u32,
    from: u64,
    len: u64,
) -> Result<u64, StoreError> {
    let io = |e| StoreError::io(inner.files.path(segment), e);
    // What is here may never have been synced, and the index is about to say that it was.
    file.sync_all().map_err(io)?;
    let mut at = from;
    let mut found: Vec<(ChunkName, Place)> = Vec::new();
    let mut total = 0;
    let flush = |found: &mut Vec<(ChunkName, Place)>| {
        // The same name twice: the later one is the newer.
        let unique: BTreeMap<ChunkName, Place> = found.drain(..).collect();
        let names: Vec<ChunkName> = unique.keys().copied().collect();
        let places: Vec<Place> = unique.values().copied().collect();
        inner.index(&names, &places, &Put::New, None)
    };
    loop {
        let next = record(file, segment, at, len).map_err(io)?;
        if let Some((name, place)) = next {
            at = place.end();
            total += 1;
            found.push((name, place));
        }
        if !found.is_empty() && (next.is_none() || found.len() == BATCH) {
            flush(&mut found).map_err(stopped)?;
        }
        if next.is_none() {
            break;
        }
    }
    if total > 0 {
        tracing::info!(
            segment,
            records = total,
            "bodies were put into the index again"
        );
    }
    Ok(at)
}

/// The whole record at an offset, if there is one.
fn record(
    file: &File,
    segment: u32,
    at: u64,
    len: u64,
) -> std::io::Result<Option<(ChunkName, Place)>> {
    if at + RECORD_HEADER as u64 > len {
        return Ok(None);
    }
    let head = files::read(file, at, RECORD_HEADER)?;
    let Some(head) = head.as_deref().and_then(Head::decode) else {
        return Ok(None);
    };
    let Ok(offset) = u32::try_from(at) else {
        return Ok(None);
    };
    let place = Place {
        segment,
        offset,
        len: head.len,
    };
    if place.end() > len {
        return Ok(None);
    }
    let body = files::read(file, at + RECORD_HEADER as u64, head.len as usize)?;
    let good = body.is_some_and(|body| head.verify(segment, offset, &body).is_ok());
    Ok(good.then_some((head.name, place)))
}
