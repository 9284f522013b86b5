//! The set of marked chunks of one round, in bounded memory.
//!
//! A Bloom filter: a name that was marked is always found; one that was not is taken for marked now and then (about one in a hundred at the size aimed at), and then some garbage is
//! spared in this round. The next round has another salt and finds it. An error of the other kind does not exist, which is the one that would lose data.

use tidepool_proto::ChunkName;

/// Bits a chunk, at the size aimed at.
const BITS_PER_CHUNK: u64 = 10;
const PROBES: u64 = 7;
const MIN_BITS: u64 = 1 << 16;
/// The most memory, in bytes: room for 200 million chunks at the rate above, more with more spared.
const MAX_BYTES: u64 = 256 << 20;

pub(super) struct Marks {
    bits: Vec<u64>,
    salt: u64,
}

impl Marks {
    /// For about `chunks` chunks. `salt` is random, another one each round.
    pub(super) fn new(chunks: u64, salt: u64) -> Self {
        let bits = chunks
            .saturating_mul(BITS_PER_CHUNK)
            .clamp(MIN_BITS, MAX_BYTES * 8);
        Self {
            bits: vec![0; bits.div_ceil(64) as usize],
            salt,
        }
    }

    pub(super) fn add(&mut self, name: &ChunkName) {
        for at in self.places(name) {
            self.bits[(at / 64) as usize] |= 1 << (at % 64);
        }
    }

    /// Whether it was added, or looks like it.
    pub(super) fn has(&self, name: &ChunkName) -> bool {
        self.places(name)
            .all(|at| self.bits[(at / 64) as usize] & (1 << (at % 64)) != 0)
    }

    fn places(&self, name: &ChunkName) -> impl Iterator<Item = u64> + use<> {
        // Two hashes make all probes. Names are hashes of a kind; the salt makes their places this round's alone.
        let (words, _) = name.0.as_chunks::<8>();
        let fold = |seed: u64| {
            words
                .iter()
                .fold(seed, |h, w| mix(h ^ u64::from_le_bytes(*w)))
        };
        let (a, b) = (fold(self.salt), fold(!self.salt) | 1);
        let n = self.bits.len() as u64 * 64;
        (0..PROBES).map(move |i| a.wrapping_add(b.wrapping_mul(i)) % n)
    }
}

/// The finaliser of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(i: u32) -> ChunkName {
        ChunkName(*blake3::hash(&i.to_le_bytes()).as_bytes())
    }

    #[test]
    fn what_was_marked_is_found_and_little_else() {
        let mut marks = Marks::new(20_000, 7);
        (0..20_000).for_each(|i| marks.add(&name(i)));
        assert!((0..20_000).all(|i| marks.has(&name(i))));
        let false_ones = (20_000..40_000).filter(|i| marks.has(&name(*i))).count();
        assert!(false_ones < 400, "{false_ones} of 20000");
        // Another salt errs about others.
        let mut other = Marks::new(20_000, 8);
        (0..20_000).for_each(|i| other.add(&name(i)));
        let both = (20_000..40_000).filter(|i| marks.has(&name(*i)) && other.has(&name(*i)));
        assert!(both.count() < 20);
    }
}
