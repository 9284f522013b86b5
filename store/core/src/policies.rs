//! The cluster's policies of retention, in the meta group. What they mean is [`crate::retention`]'s.

use tidepool_proto::ErrorKind;
use tidepool_proto::wire::request;

use crate::apply::{Applied, Refusal, Reply};
use crate::keys;
use crate::kv::{KvRead, Write};
use crate::retention::Policies;

pub(crate) fn set(state: &dyn KvRead, c: &request::SetPolicies) -> Applied {
    let mut new = Policies::decode(&c.policies)
        .map_err(|e| Refusal::new(ErrorKind::Invalid, e.to_string()))?;
    let old = match state.get(&keys::policies())? {
        Some(value) => Policies::decode(&value)?,
        None => Policies::default(),
    };
    if old.version != new.version {
        let again = new.version.checked_add(1) == Some(old.version) && old.rules == new.rules;
        return if again {
            Ok((Reply::Done, Vec::new()))
        } else {
            Err(Refusal::new(
                ErrorKind::Conflict,
                "the policies changed meanwhile",
            ))
        };
    }
    new.version = new.version.saturating_add(1);
    let write = Write::Put {
        key: keys::policies(),
        value: new.encode(),
    };
    Ok((Reply::Done, vec![write]))
}
