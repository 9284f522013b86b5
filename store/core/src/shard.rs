//! Where things live: which group keeps a chunk or a sandbox.

use tidepool_proto::{ChunkName, SandboxId};

/// The number of the meta group. Shard `i` is group `i + 1`.
pub const META_GROUP: u32 = 0;

/// How many shards there are: fixed when the cluster is made, for everything placed depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardMap {
    shards: u32,
}

impl ShardMap {
    /// A map of `shards` shards; at least one, at most 4096.
    pub fn new(shards: u32) -> Option<Self> {
        (1..=4096).contains(&shards).then_some(Self { shards })
    }

    /// How many shards.
    pub fn shards(&self) -> u32 {
        self.shards
    }

    /// Every group, the meta group first.
    pub fn groups(&self) -> std::ops::Range<u32> {
        META_GROUP..self.shards + 1
    }

    /// The groups of the shards.
    pub fn shard_groups(&self) -> std::ops::Range<u32> {
        META_GROUP + 1..self.shards + 1
    }

    /// The group that keeps this chunk. Names are hashes: their first bytes are as good as any.
    pub fn of_chunk(&self, name: &ChunkName) -> u32 {
        let mut head = [0; 8];
        head.copy_from_slice(&name.0[..8]);
        (u64::from_le_bytes(head) % u64::from(self.shards)) as u32 + 1
    }

    /// The group that keeps this sandbox. Ids are chosen by clients, so they are hashed first.
    pub fn of_sandbox(&self, id: &SandboxId) -> u32 {
        // FNV-1a, and the high bits, which depend on every byte.
        let hash = id.0.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
        });
        ((hash >> 32) % u64::from(self.shards)) as u32 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placement_is_even_and_fixed() {
        let map = ShardMap::new(4).unwrap();
        let mut counts = [0u32; 5];
        for i in 0..4000u32 {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&i.to_le_bytes());
            counts[map.of_sandbox(&SandboxId(id)) as usize] += 1;
        }
        assert_eq!(counts[0], 0);
        assert!(
            counts[1..].iter().all(|c| (700..1300).contains(c)),
            "{counts:?}"
        );
        // Changing these numbers loses every stored cluster.
        assert_eq!(map.of_chunk(&ChunkName([7; 32])), 4);
        assert_eq!(
            map.of_sandbox(&SandboxId([7; 16])),
            map.of_sandbox(&SandboxId([7; 16]))
        );
        assert!(ShardMap::new(0).is_none());
    }
}
