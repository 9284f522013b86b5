//! Bodies that a put here is about to name: they must not be deleted under it.
//!
//! A put looks which of its bodies are stored already, stores the others, and proposes the entry that names them all. A sweep that is applied between may take
//! a name away; when its body is to be deleted, the put may just have stored it again. So a put *holds* its names from before it looks until its entry is
//! decided, and bodies are deleted only through [`Holds::unheld`], which spares what is held and keeps new holds waiting meanwhile. What is spared is either named
//! again by the put's entry, or left behind without a record, which a scrub clears up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tidepool_proto::ChunkName;

/// The names held on this node. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Holds {
    names: Arc<Mutex<HashMap<ChunkName, u32>>>,
}

/// Some names, held while this lives.
#[derive(Debug)]
pub struct Held {
    holds: Holds,
    names: Vec<ChunkName>,
}

impl Holds {
    /// Holds names, more than once where they are held already.
    pub fn hold(&self, names: impl IntoIterator<Item = ChunkName>) -> Held {
        let names: Vec<ChunkName> = names.into_iter().collect();
        let mut held = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        for name in &names {
            *held.entry(*name).or_default() += 1;
        }
        drop(held);
        Held {
            holds: self.clone(),
            names,
        }
    }

    /// Calls `delete` with those of the names that nobody holds. No hold begins until it returns.
    pub fn unheld<T>(&self, names: &[ChunkName], delete: impl FnOnce(&[ChunkName]) -> T) -> T {
        let held = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let free: Vec<ChunkName> = names
            .iter()
            .filter(|n| !held.contains_key(n))
            .copied()
            .collect();
        delete(&free)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self
            .holds
            .names
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for name in &self.names {
            if let Some(n) = held.get_mut(name) {
                *n -= 1;
                if *n == 0 {
                    held.remove(name);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_spared_until_the_last_hold_ends() {
        let holds = Holds::default();
        let (a, b) = (ChunkName([1; 32]), ChunkName([2; 32]));
        let first = holds.hold([a]);
        let second = holds.hold([a]);
        let free = || holds.unheld(&[a, b], <[ChunkName]>::to_vec);
        assert_eq!(free(), [b]);
        drop(first);
        assert_eq!(free(), [b]);
        drop(second);
        assert_eq!(free(), [a, b]);
    }
}
