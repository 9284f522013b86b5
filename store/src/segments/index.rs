//! The index in the database: names to places, a row for each segment, and the names that are in quarantine.
//!
//! Values carry the checksum that all rows of the database carry: a damaged one is an error and never a wrong place.

use std::collections::BTreeMap;

use rocksdb::{Direction, IteratorMode, ReadOptions, WriteBatch};
use tidepool_proto::ChunkName;

use super::format::{Place, Row};
use crate::bodies::Page;
use crate::db::{BODIES, Db, DbError, SEGMENTS, seal, unseal};

const ROW: u8 = b's';
const QUARANTINE: u8 = b'q';

fn row_key(segment: u32) -> [u8; 5] {
    let mut key = [ROW; 5];
    key[1..].copy_from_slice(&segment.to_be_bytes());
    key
}

fn quarantine_key(name: &ChunkName) -> [u8; 33] {
    let mut key = [QUARANTINE; 33];
    key[1..].copy_from_slice(&name.0);
    key
}

/// Changes that become visible together.
pub(super) struct IndexBatch<'a> {
    db: &'a Db,
    inner: WriteBatch,
}

impl<'a> IndexBatch<'a> {
    pub(super) fn new(db: &'a Db) -> Self {
        Self {
            db,
            inner: WriteBatch::default(),
        }
    }

    pub(super) fn put(&mut self, name: &ChunkName, place: Place) -> Result<(), DbError> {
        let value = seal(&name.0, &place.encode());
        self.inner.put_cf(&self.db.family(BODIES)?, name.0, value);
        Ok(())
    }

    pub(super) fn delete(&mut self, name: &ChunkName) -> Result<(), DbError> {
        self.inner.delete_cf(&self.db.family(BODIES)?, name.0);
        Ok(())
    }

    pub(super) fn put_row(&mut self, segment: u32, row: &Row) -> Result<(), DbError> {
        let key = row_key(segment);
        let family = self.db.family(SEGMENTS)?;
        self.inner.put_cf(&family, key, seal(&key, &row.encode()));
        Ok(())
    }

    pub(super) fn delete_row(&mut self, segment: u32) -> Result<(), DbError> {
        let family = self.db.family(SEGMENTS)?;
        self.inner.delete_cf(&family, row_key(segment));
        Ok(())
    }

    pub(super) fn quarantine(&mut self, name: &ChunkName, why: &str) -> Result<(), DbError> {
        let key = quarantine_key(name);
        let value = seal(&key, why.as_bytes());
        self.inner.put_cf(&self.db.family(SEGMENTS)?, key, value);
        Ok(())
    }

    pub(super) fn release(&mut self, name: &ChunkName) -> Result<(), DbError> {
        let family = self.db.family(SEGMENTS)?;
        self.inner.delete_cf(&family, quarantine_key(name));
        Ok(())
    }

    pub(super) fn write(self, sync: bool) -> Result<(), DbError> {
        self.db.write(self.inner, sync)
    }
}

/// Where a body is, if it is stored.
pub(super) fn place(db: &Db, name: &ChunkName) -> Result<Option<Place>, DbError> {
    let value = db.inner.get_pinned_cf(&db.family(BODIES)?, name.0)?;
    value.map(|v| place_of(name, &v)).transpose()
}

/// The same for many names.
pub(super) fn places(
    db: &Db,
    names: &[ChunkName],
) -> Result<Vec<Result<Option<Place>, DbError>>, DbError> {
    let family = db.family(BODIES)?;
    let keys = names.iter().map(|n| &n.0);
    let values = db.inner.batched_multi_get_cf(&family, keys, false);
    let of = |(name, value): (&ChunkName, Result<Option<rocksdb::DBPinnableSlice<'_>>, _>)| {
        value?.map(|v| place_of(name, &v)).transpose()
    };
    Ok(names.iter().zip(values).map(of).collect())
}

fn place_of(name: &ChunkName, value: &[u8]) -> Result<Place, DbError> {
    let value = unseal(&name.0, value.to_vec())?;
    Place::decode(&value).ok_or_else(|| {
        DbError::Corruption(format!(
            "the index entry of chunk {name} is not one that this version knows"
        ))
    })
}

/// Names after `after` in order, at most `max`, with their places.
pub(super) fn page(db: &Db, after: Option<&ChunkName>, max: usize) -> Result<Page, DbError> {
    let family = db.family(BODIES)?;
    let mut options = ReadOptions::default();
    options.fill_cache(false);
    let mode = match after {
        Some(name) => IteratorMode::From(&name.0, Direction::Forward),
        None => IteratorMode::Start,
    };
    let mut out = Vec::new();
    for item in db.inner.iterator_cf_opt(&family, options, mode) {
        let (key, value) = item?;
        let Ok(name) = <[u8; 32]>::try_from(&*key) else {
            let text = format!("the index has a name of {} bytes", key.len());
            return Err(DbError::Corruption(text));
        };
        let name = ChunkName(name);
        if after == Some(&name) {
            continue;
        }
        if out.len() == max {
            break;
        }
        out.push((name, place_of(&name, &value).ok()));
    }
    Ok(out)
}

/// Every segment's row.
pub(super) fn rows(db: &Db) -> Result<BTreeMap<u32, Row>, DbError> {
    let family = db.family(SEGMENTS)?;
    let mut out = BTreeMap::new();
    for item in db
        .inner
        .iterator_cf(&family, IteratorMode::From(&[ROW], Direction::Forward))
    {
        let (key, value) = item?;
        if key.first() != Some(&ROW) {
            break;
        }
        let segment = key.get(1..).and_then(|k| <[u8; 4]>::try_from(k).ok());
        let row = Row::decode(&unseal(&key, value.into_vec())?);
        let (Some(segment), Some(row)) = (segment, row) else {
            return Err(DbError::Corruption(
                "a segment's row is not one that this version knows".into(),
            ));
        };
        out.insert(u32::from_be_bytes(segment), row);
    }
    Ok(out)
}

/// The names in quarantine and why, at most `max`.
pub(super) fn quarantined(db: &Db, max: usize) -> Result<Vec<(ChunkName, String)>, DbError> {
    let family = db.family(SEGMENTS)?;
    let mut out = Vec::new();
    let mode = IteratorMode::From(&[QUARANTINE], Direction::Forward);
    for item in db.inner.iterator_cf(&family, mode) {
        let (key, value) = item?;
        if key.first() != Some(&QUARANTINE) || out.len() == max {
            break;
        }
        let why = unseal(&key, value.into_vec())?;
        if let Some(name) = key.get(1..).and_then(|k| <[u8; 32]>::try_from(k).ok()) {
            out.push((ChunkName(name), String::from_utf8_lossy(&why).into_owned()));
        }
    }
    Ok(out)
}
