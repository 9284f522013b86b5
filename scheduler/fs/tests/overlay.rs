//! The upper of a real overlay: captured, restored under the same lower layer, it shows the same files. Needs root and overlayfs.

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::{Chunks, Scratch, capture_all, key, noise};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tidepool_fs::capture::dirty;
use tidepool_fs::restore::{RestoreOptions, materialise, verify};
use tidepool_fs::{CaptureOptions, DirtyInode, TreeKind};

struct Overlay(PathBuf);

impl Overlay {
    fn new(scratch: &Scratch, lower: &Path, upper: &Path, name: &str) -> Self {
        let work = scratch.dir(&format!("{name}-work"));
        let merged = scratch.dir(&format!("{name}-merged"));
        let options = format!(
            "lowerdir={},upperdir={},workdir={},redirect_dir=on,metacopy=off",
            lower.display(),
            upper.display(),
            work.display()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let flags = MountFlags::empty();
        mount("overlay", &merged, "overlay", flags, options.as_c_str()).unwrap();
        Self(merged)
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Err(e) = unmount(&self.0, UnmountFlags::DETACH) {
            eprintln!("unmounting {}: {e}", self.0.display());
        }
    }
}

fn every_inode(dir: &Path) -> Vec<DirtyInode> {
    let mut out = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = path.symlink_metadata().unwrap();
        out.push(DirtyInode {
            ino: meta.ino(),
            dev: meta.dev(),
            generation: 0,
        });
        if meta.is_dir() {
            todo.extend(std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    out
}

#[test]
fn a_restored_upper_shows_the_same_files() {
    let scratch = Scratch::new("overlay");
    let lower = scratch.dir("lower");
    for dir in ["keep", "gone", "replaced", "moved/deep", "emptied"] {
        std::fs::create_dir_all(lower.join(dir)).unwrap();
        for n in 0..3 {
            std::fs::write(lower.join(dir).join(format!("f{n}")), noise(n, 9000)).unwrap();
        }
    }
    let upper = scratch.dir("upper");
    let mut chunks = Chunks::default();
    let merged = Overlay::new(&scratch, &lower, &upper, "a");
    let empty = capture_all(&upper, None, &mut chunks);

    std::fs::remove_file(merged.join("keep/f0")).unwrap();
    std::fs::write(merged.join("keep/f1"), b"copied up and changed").unwrap();
    std::fs::remove_dir_all(merged.join("gone")).unwrap();
    std::fs::remove_dir_all(merged.join("replaced")).unwrap();
    std::fs::create_dir(merged.join("replaced")).unwrap();
    std::fs::write(merged.join("replaced/new"), b"in an opaque directory").unwrap();
    std::fs::rename(merged.join("moved"), merged.join("elsewhere")).unwrap();
    std::fs::write(merged.join("elsewhere/deep/f1"), noise(9, 20_000)).unwrap();
    for n in 0..3 {
        std::fs::remove_file(merged.join(&format!("emptied/f{n}"))).unwrap();
    }
    std::fs::hard_link(merged.join("keep/f2"), merged.join("linked")).unwrap();

    let before = capture_all(&upper, None, &mut chunks);
    let shown = |m: &Overlay| {
        let mut all = Chunks::default();
        capture_all(&m.0, None, &mut all).tree
    };
    let want = shown(&merged);

    let upper2 = scratch.join("upper2");
    materialise(before.tree, &upper2, &mut chunks, RestoreOptions::default()).unwrap();
    let restored = verify(&upper2, &key(), TreeKind::Upper, before.tree).unwrap();
    let again = Overlay::new(&scratch, &lower, &upper2, "b");
    assert_eq!(shown(&again), want);
    assert!(!again.join("keep/f0").exists() && !again.join("gone").exists());
    assert_eq!(
        std::fs::read_dir(again.join("replaced")).unwrap().count(),
        1
    );
    assert!(again.join("elsewhere/deep/f1").exists() && !again.join("moved").exists());

    // Both go on from there. What came back is deleted: its whiteout is no news; a mount alone is none either.
    std::fs::write(again.join("keep/f0"), b"back").unwrap();
    std::fs::remove_file(again.join("keep/f0")).unwrap();
    let opts = CaptureOptions::default();
    let inodes = every_inode(&upper2);
    let index = &restored.index;
    let net = dirty(&upper2, &key(), opts, index, &inodes, &mut chunks).unwrap();
    assert_eq!(net.full_walk, None);
    assert_eq!(
        net.tree,
        before.tree,
        "{:?}",
        net.index.changes_since(index, 20)
    );
    // From an empty upper every change is new, and all of it is found.
    let inodes = every_inode(&upper);
    let part = dirty(&upper, &key(), opts, &empty.index, &inodes, &mut chunks).unwrap();
    let whole = capture_all(&upper, Some(&empty.index), &mut chunks);
    assert_eq!(part.tree, whole.tree);
}
