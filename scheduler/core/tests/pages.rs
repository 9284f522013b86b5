//! Memory images: what is restored is what was fed; pages known are not packed again.

use std::collections::BTreeMap;
use std::convert::Infallible;

use proptest::prelude::*;
use tidepool_proto::recipe::{Recipe, Segment};
use tidepool_proto::{ChunkName, DomainKey, MAX_CHUNK_LEN};
use tidepool_scheduler_core::pages::{PAGE, PackStats, PageIndex, PagePacker};

fn key() -> DomainKey {
    DomainKey::new([1; 32])
}

type Store = BTreeMap<ChunkName, Vec<u8>>;

/// Page number `n`: 0 is the zero page.
fn page(n: u16) -> Vec<u8> {
    let mut out = vec![0; PAGE];
    if n != 0 {
        out[..2].copy_from_slice(&n.to_le_bytes());
        out[PAGE - 1] = 1;
    }
    out
}

fn dump(index: &mut PageIndex, store: &mut Store, images: &[Vec<u8>]) -> (Vec<Recipe>, PackStats) {
    let key = key();
    let mut packer = PagePacker::new(&key, index);
    let mut emit = |name: ChunkName, plain: &[u8], _: &[ChunkName]| -> Result<(), Infallible> {
        assert_eq!(key.name(plain), name);
        assert!(!plain.is_empty() && plain.len() <= MAX_CHUNK_LEN);
        store.insert(name, plain.to_vec());
        Ok(())
    };
    for (n, image) in images.iter().enumerate() {
        assert_eq!(packer.begin(&mut emit).unwrap(), n);
        for part in image.chunks(10_000) {
            match part.iter().all(|b| *b == 0) {
                true => packer.hole(part.len() as u64, &mut emit).unwrap(),
                false => packer.push(part, &mut emit).unwrap(),
            }
        }
    }
    packer.finish(&mut emit).unwrap()
}

fn bytes(store: &Store, recipe: &Recipe) -> Vec<u8> {
    let mut out = Vec::new();
    for s in &recipe.segments {
        match s {
            Segment::Hole { len } => out.resize(out.len() + *len as usize, 0),
            Segment::Data { chunk, offset, len } => {
                let at = *offset as usize;
                out.extend_from_slice(&store[chunk][at..at + *len as usize]);
            }
        }
    }
    out
}

fn image() -> impl Strategy<Value = Vec<u8>> {
    (proptest::collection::vec(0..600u16, 0..400), 0..PAGE).prop_map(|(pages, tail)| {
        let mut out = pages.into_iter().flat_map(page).collect::<Vec<_>>();
        out.extend(page(1000).into_iter().take(tail));
        out
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn images_come_back(dumps in proptest::collection::vec((proptest::collection::vec(image(), 1..4), any::<bool>()), 1..5), cap in 1..700usize) {
        let mut index = PageIndex::new(cap);
        let mut store = Store::new();
        for (images, lose) in dumps {
            if lose {
                // The store lost a pack: after it is forgotten nothing refers to it.
                if let Some(name) = store.keys().next().copied() {
                    store.remove(&name);
                    index.forget_packs(&[name]);
                }
            }
            let (recipes, stats) = dump(&mut index, &mut store, &images);
            prop_assert_eq!(recipes.len(), images.len());
            for (recipe, image) in recipes.iter().zip(&images) {
                prop_assert!(&bytes(&store, recipe) == image);
            }
            prop_assert_eq!(stats.bytes, images.iter().map(|i| i.len() as u64).sum::<u64>());
            prop_assert!(index.len() <= cap + 1);
        }
    }
}

#[test]
fn only_new_pages_are_packed() {
    let mut index = PageIndex::default();
    let mut store = Store::new();
    let first: Vec<u8> = (1..=1000).flat_map(page).collect();
    let (_, stats) = dump(&mut index, &mut store, &[first]);
    assert_eq!((stats.packs, stats.new_bytes), (4, 1000 * PAGE as u64));
    // A page put in front shifts all that follows; ten pages are new.
    let second = [2000]
        .into_iter()
        .chain(1..500)
        .chain(3000..3009)
        .chain(500..=1000);
    let second: Vec<u8> = second.flat_map(page).collect();
    let (recipes, stats) = dump(&mut index, &mut store, &[second]);
    assert_eq!((stats.packs, stats.new_bytes), (1, 10 * PAGE as u64));
    assert!(recipes[0].segments.len() < 12);
    // The same page twice in one image, and in two images of one dump, is packed once.
    let twins = vec![[page(5000), page(0), page(5000)].concat(), page(5000)];
    let (recipes, stats) = dump(&mut index, &mut store, &twins);
    assert_eq!(
        (stats.new_bytes, stats.zero_bytes),
        (PAGE as u64, PAGE as u64)
    );
    assert_eq!(recipes[1].segments[0], recipes[0].segments[0]);
}

#[test]
fn a_dump_that_fails_teaches_the_index_nothing() {
    let key = key();
    let mut index = PageIndex::default();
    let mut packer = PagePacker::new(&key, &mut index);
    let mut full = |_: ChunkName, _: &[u8], _: &[ChunkName]| Err("full");
    let all: Vec<u8> = (1..=300).flat_map(page).collect();
    packer.begin(&mut full).unwrap();
    packer.push(&all, &mut full).unwrap_err();
    assert!(index.is_empty());
}

#[test]
fn a_forgotten_pack_is_packed_again() {
    let mut index = PageIndex::default();
    let mut store = Store::new();
    let image: Vec<u8> = (1..=100).flat_map(page).collect();
    dump(&mut index, &mut store, std::slice::from_ref(&image));
    let packs: Vec<_> = store.keys().copied().collect();
    assert_eq!(index.forget_packs(&packs), 1);
    assert_eq!(index.forget_packs(&packs), 0);
    assert!(index.is_empty());
    let (_, stats) = dump(&mut index, &mut store, &[image]);
    assert_eq!(stats.new_bytes, 100 * PAGE as u64);
}
