//! Records of images. What is in them is the hosts' business.

use tidepool_proto::ErrorKind;
use tidepool_proto::wire::{MAX_RECORD, request};

use crate::apply::{Applied, Refusal, Reply, check_len, check_name};
use crate::keys;
use crate::kv::{KvRead, Write};

pub(crate) fn put(state: &dyn KvRead, c: &request::PutImage) -> Applied {
    check_name(&c.name, "an image")?;
    check_len(c.record.len(), MAX_RECORD, "an image's record")?;
    let key = keys::image(&c.name);
    match state.get(&key)? {
        Some(old) if old == c.record => Ok((Reply::Done, Vec::new())),
        Some(_) => Err(Refusal::new(
            ErrorKind::Conflict,
            format!("the image {} exists with another content", c.name),
        )),
        None => {
            let value = c.record.to_vec();
            Ok((Reply::Done, vec![Write::Put { key, value }]))
        }
    }
}

pub(crate) fn remove(state: &dyn KvRead, c: &request::Image) -> Applied {
    let key = keys::image(&c.name);
    if state.get(&key)?.is_none() {
        return Err(Refusal::new(
            ErrorKind::NotFound,
            format!("there is no image {:.80}", c.name),
        ));
    }
    Ok((Reply::Done, vec![Write::Delete { key }]))
}
