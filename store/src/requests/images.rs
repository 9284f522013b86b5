//! Images, in the meta group.

use std::sync::Arc;

use bytes::Bytes;
use tidepool_proto::ErrorKind;
use tidepool_proto::wire::{ANSWER_BYTES, MAX_RECORD_NAME, WireError, request, response};
use tidepool_store_core::{ImageState, META_GROUP, keys, op};

use super::{Answer, Failure, Shared, done};
use crate::db::Value;

pub(super) async fn put(shared: &Arc<Shared>, r: request::PutImage) -> Answer {
    shared.write(META_GROUP, op::Op::PutImage(r)).await?;
    Ok(done())
}

pub(super) async fn remove(shared: &Arc<Shared>, r: request::Image) -> Answer {
    let op = op::Op::RemoveImage(r);
    shared.write_freeing(META_GROUP, op).await?;
    Ok(done())
}

pub(super) async fn one(shared: &Arc<Shared>, r: request::Image) -> Answer {
    shared
        .read(META_GROUP, move |shared| {
            // Before the image: a round that begins between the two only makes what rests on this older.
            let round = shared.round(META_GROUP)?;
            match shared.db.state(META_GROUP, &keys::image(&r.name))? {
                Some(image) => Ok(response::Op::Found(response::Found {
                    record: ImageState::decode(&image)?.record.into(),
                    round,
                })),
                None => Err(Failure::new(
                    ErrorKind::NotFound,
                    format!("there is no image {:.80}", r.name),
                )),
            }
        })
        .await
}

pub(super) async fn list(shared: &Arc<Shared>, r: request::After) -> Answer {
    if r.after.len() > MAX_RECORD_NAME {
        return Err(WireError::Field("a name is too long").into());
    }
    shared
        .read(META_GROUP, move |shared| {
            let prefix = keys::table(keys::Table::Image);
            let mut from = prefix.clone();
            from.extend_from_slice(&r.after);
            let mut page = response::Records::default();
            let mut bytes = 0;
            let scan = |key: &[u8], value: Value| {
                let name = &key[1..];
                if !r.after.is_empty() && name == r.after {
                    return true;
                }
                if bytes >= ANSWER_BYTES {
                    page.more = true;
                    return false;
                }
                let record = value
                    .map_err(Failure::from)
                    .and_then(|v| Ok(ImageState::decode(&v)?.record));
                if let Some(value) = shared.whole(record, &mut page.damaged) {
                    bytes += value.len() + name.len();
                    page.items.push(response::Record {
                        turn: 0,
                        key: Bytes::copy_from_slice(name),
                        bytes: value.into(),
                    });
                }
                true
            };
            shared.db.scan_state(META_GROUP, &prefix, &from, scan)?;
            Ok(response::Op::Records(page))
        })
        .await
}
