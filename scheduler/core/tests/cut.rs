//! Cutting is a function of the bytes alone, keeps holes, and finds again what did not change.

use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;

use proptest::prelude::*;
use tidepool_proto::codec::Linked;
use tidepool_proto::recipe::{Recipe, Segment};
use tidepool_proto::tree::Content;
use tidepool_proto::{ChunkName, DomainKey};
use tidepool_scheduler_core::cut::{
    BLOCK, CutError, Cutter, MAX_CHUNK, MIN_CHUNK, content_of, is_zero, store_blob,
};

fn key() -> DomainKey {
    DomainKey::new([1; 32])
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut out);
    out
}

#[derive(Default)]
struct Got(BTreeMap<ChunkName, Vec<u8>>);

impl Got {
    fn emit(
        &mut self,
    ) -> impl FnMut(ChunkName, &[u8], &[ChunkName]) -> Result<(), Infallible> + '_ {
        |name, plain, links| {
            assert_eq!(key().name_linked(plain, links), name);
            self.0.insert(name, plain.to_vec());
            Ok(())
        }
    }

    fn bytes(&self, recipe: &Recipe) -> Vec<u8> {
        let mut out = Vec::new();
        for s in &recipe.segments {
            match s {
                Segment::Hole { len } => out.resize(out.len() + *len as usize, 0),
                Segment::Data { chunk, offset, len } => {
                    let at = *offset as usize;
                    out.extend_from_slice(&self.0[chunk][at..at + *len as usize]);
                }
            }
        }
        out
    }
}

fn whole(bytes: &[u8]) -> (Recipe, Got) {
    let key = key();
    let mut got = Got::default();
    let mut cutter = Cutter::new(&key);
    let mut emit = got.emit();
    cutter.push(bytes, &mut emit).unwrap();
    let recipe = cutter.finish(&mut emit).unwrap();
    drop(emit);
    (recipe, got)
}

/// Bytes with stretches of zeros of all sizes.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        (any::<u64>(), 0..100_000usize).prop_map(|(s, n)| noise(s, n)),
        (0..30_000usize).prop_map(|n| vec![0; n]),
        (any::<u8>(), 0..20_000usize).prop_map(|(b, n)| vec![b; n]),
        Just(vec![0; BLOCK]),
        Just(vec![7; BLOCK]),
    ];
    proptest::collection::vec(part, 0..6).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_recipe_makes_the_bytes(bytes in content()) {
        let (recipe, got) = whole(&bytes);
        prop_assert_eq!(recipe.len(), bytes.len() as u64);
        prop_assert!(got.bytes(&recipe) == bytes);
        // Zero blocks, and nothing else, are holes.
        let mut at = 0u64;
        for s in &recipe.segments {
            let end = at + s.len();
            if let Segment::Hole { .. } = s {
                prop_assert_eq!(at % BLOCK as u64, 0);
                prop_assert!(end.is_multiple_of(BLOCK as u64) || end == bytes.len() as u64);
            } else {
                let first = (at as usize).next_multiple_of(BLOCK);
                for block in bytes[first.min(end as usize)..end as usize].chunks_exact(BLOCK) {
                    prop_assert!(!is_zero(block));
                }
            }
            at = end;
        }
        prop_assert!(got.0.values().all(|c| c.len() <= MAX_CHUNK));
    }

    #[test]
    fn how_it_is_fed_does_not_matter(bytes in content(), cuts in proptest::collection::vec(0..50_000usize, 0..20)) {
        let (expected, _) = whole(&bytes);
        let key = key();
        let mut cutter = Cutter::new(&key);
        let mut none = |_: ChunkName, _: &[u8], _: &[ChunkName]| Ok::<(), Infallible>(());
        let (mut left, mut cuts) = (&bytes[..], cuts.into_iter().cycle());
        while !left.is_empty() {
            let n = cuts.next().unwrap_or(left.len()).clamp(1, left.len());
            let (part, rest) = left.split_at(n);
            // Zeros may come as a hole that was not read.
            match is_zero(part) {
                true => cutter.hole(n as u64, &mut none).unwrap(),
                false => cutter.push(part, &mut none).unwrap(),
            }
            left = rest;
        }
        prop_assert_eq!(cutter.len(), bytes.len() as u64);
        prop_assert_eq!(cutter.finish(&mut none).unwrap(), expected);
    }

    #[test]
    fn a_blob_is_its_chunks(bytes in content()) {
        let mut got = Got::default();
        let value = Linked { bytes: bytes.clone(), links: Vec::new() };
        let blob = store_blob(&key(), &value, &mut got.emit()).unwrap();
        let back: Vec<u8> = blob.chunks.iter().flat_map(|c| got.0[c].clone()).collect();
        prop_assert!(back == bytes);
        prop_assert_eq!(blob.len, bytes.len() as u64);
    }
}

/// Each chunk of a recipe links to the names that begin in it, and an insertion leaves the others what they were.
#[test]
fn pieces_of_a_recipe_link_to_what_they_name() {
    let names: Vec<ChunkName> = (0..5000u32).map(|i| key().name(&i.to_le_bytes())).collect();
    let pieces = |names: &[ChunkName]| {
        let mut recipe = Recipe::default();
        for chunk in names {
            recipe.push(Segment::Data {
                chunk: *chunk,
                offset: 0,
                len: 16_384,
            });
        }
        let mut links: BTreeMap<ChunkName, Vec<ChunkName>> = BTreeMap::new();
        let mut emit = |name: ChunkName, plain: &[u8], of: &[ChunkName]| {
            assert_eq!(key().name_linked(plain, of), name);
            links.insert(name, of.to_vec());
            Ok::<(), Infallible>(())
        };
        store_blob(&key(), &recipe.encode_linked(), &mut emit).unwrap();
        links
    };
    let before = pieces(&names);
    let all: HashSet<ChunkName> = before.values().flatten().copied().collect();
    assert_eq!(all, names.iter().copied().collect());
    assert_eq!(before.values().map(Vec::len).sum::<usize>(), names.len());
    let mut more = names.clone();
    more.insert(2500, key().name(b"new"));
    let after = pieces(&more);
    let new = after.keys().filter(|n| !before.contains_key(n)).count();
    assert!(new <= 4, "{new} of {} are new", after.len());
}

#[test]
fn an_insertion_changes_few_chunks() {
    let bytes = noise(9, 4 << 20);
    let (_, before) = whole(&bytes);
    let mut changed = bytes.clone();
    changed.splice(1_000_000..1_000_000, noise(10, 100));
    let (_, after) = whole(&changed);
    let known: HashSet<_> = before.0.keys().collect();
    let new = after.0.keys().filter(|n| !known.contains(n)).count();
    assert!(new <= 4, "{new} new chunks");
    let average = bytes.len() / before.0.len();
    assert!((8_000..32_000).contains(&average), "{average}");
    assert!(before.0.values().filter(|c| c.len() < MIN_CHUNK).count() <= 1);
}

#[test]
fn content_stands_where_it_fits() {
    let key = key();
    let content = |bytes: &[u8]| {
        let mut got = Got::default();
        let mut cutter = Cutter::new(&key);
        let mut emit = got.emit();
        for part in bytes.chunks(100) {
            cutter.push(part, &mut emit).unwrap();
        }
        let content = cutter.finish_content(&mut emit).unwrap();
        drop(emit);
        (content, got.0.len())
    };
    assert_eq!(content(b""), (Content::Inline(Vec::new()), 0));
    let short = noise(1, 512);
    assert_eq!(content(&short), (Content::Inline(short.clone()), 0));
    // Zeros too: what is short is kept as it is.
    assert_eq!(content(&[0; 300]), (Content::Inline(vec![0; 300]), 0));
    assert!(matches!(content(&noise(1, 513)), (Content::Recipe(_), 1)));
    assert!(matches!(content(&[0; 100_000]), (Content::Recipe(r), 0) if r.segments.len() == 1));
    let (stored, chunks) = content(&noise(2, 2 << 20));
    assert!(matches!(stored, Content::Stored { len, .. } if len == 2 << 20));
    assert!(chunks > 50);
}

#[test]
fn a_large_hole_costs_nothing() {
    let key = key();
    let mut cutter = Cutter::new(&key);
    let mut got = Got::default();
    let mut emit = got.emit();
    cutter.hole(1 << 50, &mut emit).unwrap();
    cutter.push(b"end", &mut emit).unwrap();
    let recipe = cutter.finish(&mut emit).unwrap();
    assert_eq!((recipe.len(), recipe.segments.len()), ((1 << 50) + 3, 2));
    assert!(matches!(
        content_of(&key, recipe, &mut emit).unwrap(),
        Content::Recipe(_)
    ));
}

#[test]
fn a_failing_sink_ends_it() {
    let key = key();
    let mut cutter = Cutter::new(&key);
    let mut full = |_: ChunkName, _: &[u8], _: &[ChunkName]| Err("full");
    let e = cutter.push(&noise(1, 1 << 20), &mut full).unwrap_err();
    assert_eq!(e, CutError::Sink("full"));
}
