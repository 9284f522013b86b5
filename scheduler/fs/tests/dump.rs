//! Dumps: memory pages by name over several dumps, restored byte for byte.

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Chunks, Scratch, key, noise};
use tidepool_fs::restore::{RestoreOptions, materialise};
use tidepool_fs::{dump, load_node, load_root, walk_chunks};
use tidepool_proto::tree::{Content, Kind};
use tidepool_scheduler_core::pages::{PAGE, PageIndex};

fn same(a: &Path, b: &Path) {
    let list = |d: &Path| {
        let mut all: Vec<_> = std::fs::read_dir(d)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        all.sort();
        all
    };
    assert_eq!(list(a), list(b));
    for name in list(a) {
        assert!(std::fs::read(a.join(&name)).unwrap() == std::fs::read(b.join(&name)).unwrap());
    }
}

/// Writes what a dump of two processes looks like; `step` changes some of their pages.
fn write(dir: &Path, step: u64) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("inventory.img"), noise(1, 60)).unwrap();
    std::fs::write(dir.join("pstree.img"), noise(step, 200)).unwrap();
    std::fs::write(dir.join("pagemap-1.img"), noise(3, 20_000)).unwrap();
    std::fs::write(dir.join("dump.log"), noise(4 + step, 100_000)).unwrap();
    let mut one = noise(7, 600 * PAGE);
    for page in 0..step as usize {
        one[page * 50 * PAGE..][..8].copy_from_slice(&(step * 1000 + page as u64).to_le_bytes());
    }
    // A new page in front shifts all others.
    let front = noise(1000 + step, PAGE * (step as usize % 2));
    std::fs::write(dir.join("pages-1.img"), [front, one].concat()).unwrap();
    // The same pages as the first process has, and holes.
    let two = std::fs::File::create(dir.join("pages-2.img")).unwrap();
    two.set_len(100 * PAGE as u64).unwrap();
    two.write_all_at(&noise(7, 600 * PAGE)[..40 * PAGE], 50 * PAGE as u64)
        .unwrap();
    std::fs::write(dir.join("pages-3.img"), b"").unwrap();
}

#[test]
fn dumps_share_pages_and_come_back() {
    let scratch = Scratch::new("dump");
    let mut chunks = Chunks::default();
    let mut pages = PageIndex::default();
    let mut trees = Vec::new();
    for step in 0..4 {
        let dir = scratch.join(&format!("dump{step}"));
        write(&dir, step);
        let done = dump::capture(&dir, &key(), &mut pages, &mut chunks).unwrap();
        let logical: u64 = std::fs::read_dir(&dir)
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum();
        assert_eq!((done.bytes, done.files), (logical, 7));
        // Each file is read once, holes at most not at all.
        assert!(done.read_bytes <= logical);
        let new = done.pages.new_bytes / PAGE as u64;
        match step {
            // The second process adds none.
            0 => assert_eq!(new, 600),
            n => assert_eq!(new, n + n % 2, "step {n}"),
        }
        assert!(done.packs.iter().all(|p| chunks.map.contains_key(p)));
        trees.push((done.tree, dir, done.packs));
    }
    for (n, (tree, dir, packs)) in trees.iter().enumerate() {
        let dest = scratch.join(&format!("restored{n}"));
        let before = chunks.got;
        materialise(*tree, &dest, &mut chunks, RestoreOptions::default()).unwrap();
        same(dir, &dest);
        let names = walk_chunks(&mut chunks, *tree).unwrap();
        assert!(packs.is_subset(&names));
        // A pack is fetched once for all its pages in a file, not once for each.
        assert!(chunks.got - before < 200);
    }
}

#[test]
fn a_lost_pack_is_cut_again() {
    let scratch = Scratch::new("lostpack");
    let mut chunks = Chunks::default();
    let mut pages = PageIndex::default();
    let dir = scratch.join("dump");
    write(&dir, 1);
    let first = dump::capture(&dir, &key(), &mut pages, &mut chunks).unwrap();
    let lost: Vec<_> = first.packs.iter().take(1).copied().collect();
    chunks.map.remove(&lost[0]);
    // Without knowing, the next dump relies on it.
    let second = dump::capture(&dir, &key(), &mut pages, &mut chunks).unwrap();
    assert_eq!(second.pages.new_bytes, 0);
    assert!(second.packs.contains(&lost[0]));
    assert_eq!(pages.forget_packs(&lost), 1);
    let third = dump::capture(&dir, &key(), &mut pages, &mut chunks).unwrap();
    assert!(third.pages.new_bytes > 0);
    assert!(third.packs.iter().all(|p| chunks.map.contains_key(p)));
    let dest = scratch.join("restored");
    materialise(third.tree, &dest, &mut chunks, RestoreOptions::default()).unwrap();
    same(&dir, &dest);
}

#[test]
fn a_recipe_that_changes_little_costs_little() {
    let scratch = Scratch::new("recipe");
    let mut chunks = Chunks::default();
    let mut pages = PageIndex::default();
    let dir = scratch.dir("dump");
    let memory = noise(1, 20_000 * PAGE);
    std::fs::write(dir.join("pages-1.img"), &memory).unwrap();
    dump::capture(&dir, &key(), &mut pages, &mut chunks).unwrap();
    // Ten pages in a hundred change: the recipe is long now.
    let mut changed = memory;
    for page in (0..20_000).step_by(10) {
        changed[page * PAGE] ^= 1;
    }
    std::fs::write(dir.join("pages-1.img"), &changed).unwrap();
    dump::capture(&dir, &key(), &mut pages, &mut chunks).unwrap();
    changed[77 * PAGE] ^= 2;
    std::fs::write(dir.join("pages-1.img"), &changed).unwrap();
    let known = chunks.map.clone();
    let done = dump::capture(&dir, &key(), &mut pages, &mut chunks).unwrap();
    let new: usize = chunks
        .map
        .iter()
        .filter(|(name, _)| !known.contains_key(*name))
        .map(|(_, plain)| plain.len())
        .sum();
    assert_eq!(done.pages.new_bytes, PAGE as u64);
    assert!(new < 200_000, "{new} new bytes");
    let root = load_root(&mut chunks, done.tree).unwrap();
    let (_, children) = root.as_root().unwrap();
    let node = load_node(&mut chunks, children.unwrap()).unwrap();
    assert!(matches!(
        &node.entries[0].kind,
        Kind::File {
            content: Content::Stored { .. },
            ..
        }
    ));
}
