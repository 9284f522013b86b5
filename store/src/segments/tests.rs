use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use proptest::prelude::*;
use tidepool_proto::DomainKey;

use super::*;

fn chunk(seed: u64, len: usize) -> (ChunkName, Bytes) {
    let mut plain = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut plain);
    let key = DomainKey::new([7; 32]);
    let name = key.name(&plain);
    (name, key.encode(&name, &plain, &[], None).into())
}

fn small() -> SegmentOptions {
    SegmentOptions {
        segment_bytes: 64 << 10,
        max_open: 2,
        rewrite_bytes_per_s: 1 << 40,
        at: None,
    }
}

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn open(&self, options: SegmentOptions) -> Segments {
        let db = Db::open(&self.0.path().join("db")).unwrap();
        Segments::open(db, &self.dir(), options).unwrap()
    }

    fn dir(&self) -> PathBuf {
        self.0.path().join("bodies")
    }

    fn newest(&self) -> PathBuf {
        let mut all: Vec<_> = fs::read_dir(self.dir())
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        all.sort();
        all.pop().unwrap()
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn all_there(segments: &Segments, bodies: &[(ChunkName, Bytes)]) {
    for (name, body) in bodies {
        assert_eq!(segments.get(name).unwrap().as_deref(), Some(&**body));
    }
}

#[test]
fn what_the_index_lost_is_found_in_the_segments() {
    let place = Home::new();
    let old: Vec<_> = (0..10).map(|i| chunk(i, 3000)).collect();
    let new: Vec<_> = (10..90).map(|i| chunk(i, 3000)).collect();
    let segments = place.open(small());
    segments.put(&old).unwrap();
    drop(segments);
    let (db, aside) = (place.0.path().join("db"), place.0.path().join("aside"));
    copy(&db, &aside);
    let segments = place.open(small());
    for part in new.chunks(7) {
        segments.put(part).unwrap();
    }
    drop(segments);
    assert!(fs::read_dir(place.dir()).unwrap().count() > 3);
    // The database as it was before, and the last record torn.
    fs::remove_dir_all(&db).unwrap();
    copy(&aside, &db);
    let newest = place.newest();
    let bytes = fs::read(&newest).unwrap();
    fs::write(&newest, &bytes[..bytes.len() - 5]).unwrap();
    let segments = place.open(small());
    all_there(&segments, &old);
    all_there(&segments, &new[..79]);
    assert_eq!(segments.get(&new[79].0).unwrap(), None);
    segments.put(&new[79..]).unwrap();
    drop(segments);
    let segments = place.open(small());
    all_there(&segments, &new);
    let live: u64 = old
        .iter()
        .chain(&new)
        .map(|(_, b)| b.len() as u64 + 56)
        .sum();
    assert_eq!(segments.usage().1, live);
}

#[test]
fn a_torn_tail_is_cut_and_what_was_promised_is_damage_that_has_a_name() {
    let place = Home::new();
    let bodies: Vec<_> = (0..5).map(|i| chunk(i, 3000)).collect();
    place.open(small()).put(&bodies).unwrap();
    let newest = place.newest();
    let whole = fs::read(&newest).unwrap();
    for garbage in [&b"x"[..], &[0; 5000], &whole[32..1000], &whole[32..3000]] {
        let mut longer = whole.clone();
        longer.extend_from_slice(garbage);
        fs::write(&newest, &longer).unwrap();
        let segments = place.open(small());
        all_there(&segments, &bodies);
        assert_eq!(fs::read(&newest).unwrap(), whole);
    }
    // Shorter than promised: the others stay, the next upload heals.
    fs::write(&newest, &whole[..whole.len() - 1]).unwrap();
    let segments = place.open(small());
    all_there(&segments, &bodies[..4]);
    let e = segments.get(&bodies[4].0).unwrap_err();
    assert!(matches!(&e, DbError::Corruption(why) if why.contains(&bodies[4].0.to_string())));
    segments.put(&bodies[4..]).unwrap();
    all_there(&segments, &bodies);
    drop(segments);
    // The whole file gone.
    fs::remove_file(&newest).unwrap();
    let segments = place.open(small());
    let e = segments.get(&bodies[0].0).unwrap_err();
    assert!(matches!(e, DbError::Corruption(_)));
    all_there(&segments, &bodies[4..]);
    segments.put(&bodies[..4]).unwrap();
    all_there(&segments, &bodies);
}

#[test]
fn a_damaged_record_spoils_no_other() {
    let place = Home::new();
    let bodies: Vec<_> = (0..3).map(|i| chunk(i, 500)).collect();
    place.open(small()).put(&bodies).unwrap();
    let newest = place.newest();
    let whole = fs::read(&newest).unwrap();
    let second = 32 + 56 + bodies[0].1.len();
    for at in [second, second + 4, second + 20, second + 50, second + 100] {
        let mut bad = whole.clone();
        bad[at] ^= 1;
        fs::write(&newest, &bad).unwrap();
        let segments = place.open(small());
        let e = segments.get(&bodies[1].0).unwrap_err();
        assert!(matches!(&e, DbError::Corruption(why) if why.contains(&bodies[1].0.to_string())));
        // A bit of the body is for the reader to find, and nothing else.
        let unverified = segments.get_unverified(&bodies[1].0);
        assert_eq!(unverified.is_ok(), at == second + 100, "{at}");
        all_there(&segments, &bodies[2..]);
        all_there(&segments, &bodies[..1]);
    }
}

#[test]
fn deleted_space_comes_back() {
    for (len, count) in [(20_000, 200), (600, 3000), (100, 6000)] {
        let place = Home::new();
        let bodies: Vec<_> = (0..count).map(|i| chunk(i, len)).collect();
        let options = SegmentOptions {
            segment_bytes: 256 << 10,
            ..small()
        };
        let segments = place.open(options.clone());
        for part in bodies.chunks(50) {
            segments.put(part).unwrap();
        }
        let before = segments.usage();
        // A half, scattered.
        let (gone, left): (Vec<_>, Vec<_>) = bodies
            .iter()
            .cloned()
            .partition(|(name, _)| name.0[0] % 2 == 0);
        let names: Vec<_> = gone.iter().map(|(n, _)| *n).collect();
        for part in names.chunks(100) {
            segments.delete(part).unwrap();
        }
        segments.delete(&names).unwrap();
        segments.reclaim_now().unwrap();
        let after = segments.usage();
        println!("{count} of {len}: {before:?} -> {after:?}");
        let open = 256 << 10;
        assert!(after.0 * 4 <= after.1 * 5 + 4 * open, "{after:?}");
        assert!(after.0 < before.0 * 7 / 10);
        drop(segments);
        let segments = place.open(options.clone());
        all_there(&segments, &left);
        assert_eq!(segments.has(&names).unwrap(), vec![false; names.len()]);
        let left: Vec<_> = left.iter().map(|(n, _)| *n).collect();
        segments.delete(&left).unwrap();
        segments.reclaim_now().unwrap();
        assert_eq!(segments.usage().1, 0);
        assert!(segments.usage().0 <= open + 4096);
    }
}

/// Stops at the `n`th point, as a crash would, and looks at what the next start makes of it.
#[test]
fn a_crash_between_any_two_steps_loses_nothing() {
    let mut points = std::collections::BTreeSet::new();
    for n in 0.. {
        let place = Home::new();
        let seen = Arc::new(AtomicUsize::new(0));
        let at: Arc<Mutex<Vec<&'static str>>> = Arc::default();
        let (counter, list) = (seen.clone(), at.clone());
        let segments = place.open(SegmentOptions {
            at: Some(Arc::new(move |point| {
                lock(&list).push(point);
                counter.fetch_add(1, SeqCst) != n
            })),
            ..small()
        });
        let bodies: Vec<_> = (0..120).map(|i| chunk(i, 1500)).collect();
        let mut stored: BTreeMap<ChunkName, Bytes> = BTreeMap::new();
        let mut maybe: BTreeMap<ChunkName, Bytes> = BTreeMap::new();
        let mut crashed = false;
        for part in bodies.chunks(20) {
            match segments.put(part) {
                Ok(()) => stored.extend(part.iter().cloned()),
                Err(_) => {
                    maybe.extend(part.iter().cloned());
                    crashed = true;
                    break;
                }
            }
        }
        let delete: Vec<_> = bodies
            .iter()
            .map(|(n, _)| *n)
            .filter(|n| n.0[0] % 3 > 0)
            .collect();
        if !crashed {
            for part in delete.chunks(30) {
                match segments.delete(part) {
                    Ok(()) => stored.retain(|name, _| !part.contains(name)),
                    Err(_) => {
                        maybe.extend(part.iter().filter_map(|n| stored.remove_entry(n)));
                    }
                }
            }
        }
        let _ = segments.reclaim_now();
        drop(segments);
        let done = seen.load(SeqCst) <= n;
        points.extend(lock(&at).iter().copied());
        for _ in 0..2 {
            let segments = place.open(small());
            for (name, body) in &stored {
                assert_eq!(segments.get(name).unwrap().as_ref(), Some(body), "{n}");
            }
            for (name, body) in &maybe {
                let got = segments.get(name).unwrap();
                assert!(got.is_none_or(|g| g == body.to_vec()), "{n}");
            }
            segments.reclaim_now().unwrap();
            let page = segments.page(None, 1000).unwrap();
            let live: u64 = page.iter().map(|(_, p)| p.unwrap().bytes()).sum();
            assert_eq!(segments.usage().1, live, "{n}");
        }
        if done {
            assert!(n > 10);
            break;
        }
    }
    assert!(points.len() >= 8, "{points:?}");
}

#[test]
fn quarantine_is_kept_and_ends_with_a_put() {
    let place = Home::new();
    let bodies: Vec<_> = (0..3).map(|i| chunk(i, 500)).collect();
    let segments = place.open(small());
    segments.put(&bodies).unwrap();
    segments.quarantine(&bodies[1].0, "no copy").unwrap();
    drop(segments);
    let segments = place.open(small());
    assert_eq!(
        segments.quarantined(9).unwrap(),
        [(bodies[1].0, "no copy".to_owned())]
    );
    segments.put(&bodies[1..2]).unwrap();
    assert!(segments.quarantined(9).unwrap().is_empty());
    segments.quarantine(&bodies[2].0, "no copy").unwrap();
    segments.delete(&[bodies[2].0]).unwrap();
    assert!(segments.quarantined(9).unwrap().is_empty());
}

#[derive(Debug, Clone)]
enum Step {
    Put(Vec<(u8, u8)>),
    Delete(Vec<u8>),
    Reclaim,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::collection::vec((any::<u8>(), 0..4u8), 1..20).prop_map(Step::Put),
        3 => prop::collection::vec(any::<u8>(), 1..60).prop_map(Step::Delete),
        1 => Just(Step::Reclaim),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn segments_are_a_map(steps in prop::collection::vec(step(), 1..40)) {
        let place = Home::new();
        let options = SegmentOptions { segment_bytes: 16 << 10, ..small() };
        let mut segments = place.open(options.clone());
        let mut model: BTreeMap<ChunkName, Bytes> = BTreeMap::new();
        let name = |seed: u8| ChunkName([seed; 32]);
        for step in steps {
            match step {
                Step::Put(list) => {
                    // The same name may come with another body: sealed bodies differ.
                    let bodies: Vec<_> = list
                        .iter()
                        .map(|(seed, kind)| (name(*seed), chunk(u64::from(*kind), 1 + usize::from(*seed) * 37).1))
                        .collect();
                    segments.put(&bodies).unwrap();
                    for (name, body) in bodies.into_iter().rev() {
                        model.insert(name, body);
                    }
                }
                Step::Delete(list) => {
                    let names: Vec<_> = list.into_iter().map(name).collect();
                    segments.delete(&names).unwrap();
                    model.retain(|n, _| !names.contains(n));
                }
                Step::Reclaim => segments.reclaim_now().unwrap(),
                Step::Reopen => {
                    drop(segments);
                    segments = place.open(options.clone());
                }
            }
            let page = segments.page(None, 1000).unwrap();
            let names: Vec<_> = page.iter().map(|(n, _)| *n).collect();
            prop_assert_eq!(names, model.keys().copied().collect::<Vec<_>>());
            let live: u64 = model.values().map(|b| b.len() as u64 + 56).sum();
            prop_assert_eq!(segments.usage().1, live);
            for (name, body) in &model {
                let got = segments.get(name).unwrap();
                prop_assert_eq!(got.as_deref(), Some(&**body));
            }
        }
    }
}
