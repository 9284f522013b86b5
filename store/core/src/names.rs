//! Names of sandboxes, unique over the cluster.
//!
//! A name and its sandbox live in different groups. Creating goes: reserve the name here, create in the shard. Where the
//! name is another's that never came to be (its creator died between the two), that one is first fenced in its own
//! shard, so that it never can, and then replaced. So a name has at most one sandbox, and no crash takes a name away for ever.

use tidepool_proto::wire::array;

use crate::apply::{Applied, Reply, check_name, sandbox_id};
use crate::command::op;
use crate::kv::{KvRead, Write};
use crate::{keys, records};

pub(crate) fn reserve(state: &dyn KvRead, c: &op::ReserveName) -> Applied {
    check_name(&c.name, "a sandbox")?;
    let id = sandbox_id(&c.id)?;
    let key = keys::name(&c.name);
    if let Some(value) = state.get(&key)? {
        let holder = records::decode_sandbox_id(&value)?;
        if holder == id {
            return Ok((Reply::Done, Vec::new()));
        }
        let replaced = !c.replacing.is_empty()
            && array::<16>(&c.replacing, "a sandbox id has 16 bytes")? == holder.0;
        if !replaced {
            return Ok((Reply::TakenBy(holder), Vec::new()));
        }
    }
    let value = records::encode_sandbox_id(&id);
    Ok((Reply::Done, vec![Write::Put { key, value }]))
}

pub(crate) fn release(state: &dyn KvRead, c: &op::ReleaseName) -> Applied {
    let id = sandbox_id(&c.id)?;
    let key = keys::name(&c.name);
    let writes = match state.get(&key)? {
        Some(value) if records::decode_sandbox_id(&value)? == id => vec![Write::Delete { key }],
        _ => Vec::new(),
    };
    Ok((Reply::Done, writes))
}
