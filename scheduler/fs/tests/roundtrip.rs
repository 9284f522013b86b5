//! Capture, restore, and capture again.

mod common;

use common::{Chunks, Scratch, capture_all, key, noise};
use std::path::Path;
use tidepool_fs::restore::{RestoreOptions, materialise, verify};
use tidepool_fs::{TreeKind, walk_chunks};

#[test]
fn a_real_directory_comes_back() {
    let scratch = Scratch::new("real");
    let mut chunks = Chunks::default();
    let t = std::time::Instant::now();
    let captured = capture_all(Path::new("/usr/lib/python3"), None, &mut chunks);
    eprintln!(
        "capture {:?} {} bytes {} files",
        t.elapsed(),
        captured.bytes,
        captured.files
    );
    let dest = scratch.join("dest");
    let t = std::time::Instant::now();
    let done = materialise(captured.tree, &dest, &mut chunks, RestoreOptions::default()).unwrap();
    eprintln!("restore {:?} {done:?}", t.elapsed());
    assert_eq!((done.bytes, done.files), (captured.bytes, captured.files));
    let again = verify(&dest, &key(), TreeKind::Upper, captured.tree).unwrap();
    assert_eq!(again.bytes, captured.bytes);
    let names = walk_chunks(&mut chunks, captured.tree).unwrap();
    assert!(names.iter().all(|n| chunks.map.contains_key(n)));
    assert_eq!(names.len(), chunks.map.len(), "{}", noise(1, 10).len());
}
