//! Records of images. What is in them is the hosts' business, but for the roots of what they rest on.

use tidepool_proto::ErrorKind;
use tidepool_proto::wire::{MAX_RECORD, request, split_names};

use crate::apply::{Applied, Refusal, Reply, check_len, check_name};
use crate::gc::{check_fence, gc_of};
use crate::keys;
use crate::kv::{KvRead, Write};
use crate::records::{ImageState, MAX_IMAGE_ROOTS};

pub(crate) fn put(state: &dyn KvRead, c: &request::PutImage) -> Applied {
    check_name(&c.name, "an image")?;
    check_len(c.record.len(), MAX_RECORD, "an image's record")?;
    let roots = split_names(&c.roots)?;
    if roots.len() > MAX_IMAGE_ROOTS {
        return Err(Refusal::new(
            ErrorKind::Invalid,
            "an image of too many roots",
        ));
    }
    let key = keys::image(&c.name);
    let new = ImageState {
        roots,
        record: c.record.to_vec(),
    };
    match state.get(&key)? {
        Some(old) if ImageState::decode(&old)? == new => Ok((Reply::Done, Vec::new())),
        Some(_) => Err(Refusal::new(
            ErrorKind::Conflict,
            format!("the image {} exists with another content", c.name),
        )),
        None => {
            if !new.roots.is_empty() {
                check_fence(&gc_of(state)?, c.round)?;
            }
            let value = new.encode();
            Ok((Reply::Done, vec![Write::Put { key, value }]))
        }
    }
}

pub(crate) fn remove(state: &dyn KvRead, c: &request::Image) -> Applied {
    let key = keys::image(&c.name);
    let Some(value) = state.get(&key)? else {
        return Err(Refusal::new(
            ErrorKind::NotFound,
            format!("there is no image {:.80}", c.name),
        ));
    };
    // Someone may have read it and be about to commit what rests on it.
    let tail = keys::image_grave_tail(gc_of(state)?.round, &c.name);
    let grave = Write::Put {
        key: keys::image_grave(&tail),
        value,
    };
    Ok((Reply::Done, vec![Write::Delete { key }, grave]))
}
