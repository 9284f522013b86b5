//! What clients store: a small fixed set of chunks, so that the same ones are pinned, collected and brought again all the time.

use std::collections::{BTreeMap, BTreeSet};

use tidepool_proto::ChunkName;
use tidepool_proto::body::DomainKey;

use crate::rng::Rng;

/// The chunks that exist in this world.
pub(crate) struct Content {
    key: DomainKey,
    bodies: BTreeMap<ChunkName, Vec<u8>>,
    links: BTreeMap<ChunkName, Vec<ChunkName>>,
    /// Chunks with links: what a manifest can name.
    pub(crate) trees: Vec<ChunkName>,
    /// Chunks without.
    pub(crate) leaves: Vec<ChunkName>,
}

impl Content {
    pub(crate) fn new(rng: &mut Rng, leaves: usize, trees: usize) -> Self {
        let mut content = Self {
            key: DomainKey::new(rng.bytes()),
            bodies: BTreeMap::new(),
            links: BTreeMap::new(),
            trees: Vec::new(),
            leaves: Vec::new(),
        };
        for _ in 0..leaves {
            let name = content.add(rng, Vec::new());
            content.leaves.push(name);
        }
        for at in 0..trees {
            let mut links = BTreeSet::new();
            for _ in 0..rng.between(1, 4) {
                links.extend(rng.pick(&content.leaves));
            }
            // Some are directories of others.
            if at > 0 && rng.chance(40) {
                links.extend(rng.pick(&content.trees));
            }
            let name = content.add(rng, links.into_iter().collect());
            content.trees.push(name);
        }
        content
    }

    fn add(&mut self, rng: &mut Rng, links: Vec<ChunkName>) -> ChunkName {
        let plain: [u8; 24] = rng.bytes();
        let name = self.key.name_linked(&plain, &links);
        let body = self.key.encode(&name, &plain, &links, None);
        self.bodies.insert(name, body);
        self.links.insert(name, links);
        name
    }

    /// The body of a chunk.
    pub(crate) fn body(&self, name: &ChunkName) -> &[u8] {
        self.bodies.get(name).map_or(&[], Vec::as_slice)
    }

    /// Whether a body is that of a name, as a host finds out.
    pub(crate) fn opens(&self, name: &ChunkName, body: &[u8]) -> bool {
        self.key.open(name, body).is_ok()
    }

    pub(crate) fn is_linked(&self, name: &ChunkName) -> bool {
        self.links.get(name).is_some_and(|l| !l.is_empty())
    }

    /// Everything that is reached from these.
    pub(crate) fn closure(
        &self,
        roots: impl IntoIterator<Item = ChunkName>,
    ) -> BTreeSet<ChunkName> {
        let mut met = BTreeSet::new();
        let mut waiting: Vec<ChunkName> = roots.into_iter().collect();
        while let Some(name) = waiting.pop() {
            if met.insert(name) {
                waiting.extend(self.links.get(&name).into_iter().flatten());
            }
        }
        met
    }
}
