//! A capture of what is dirty gives what a full capture gives, whatever was done in between.
//!
//! Each random operation reports the inodes that the inspector would report for it (see the facts: parent directories of created, removed and renamed names, the
//! inode that was written, linked or moved; nothing for what is inside a moved directory).

mod common;

use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use common::{Chunks, Scratch, capture_all, key, noise};
use proptest::prelude::*;
use tidepool_fs::capture::dirty;
use tidepool_fs::restore::{RestoreOptions, materialise, verify};
use tidepool_fs::{CaptureOptions, DirtyInode, TreeIndex, TreeKind};

#[derive(Debug, Clone)]
enum Op {
    Create(usize, usize),
    Write(usize, u8, usize),
    Append(usize, usize),
    Mkdir(usize, usize),
    Rename(usize, usize, usize),
    Unlink(usize),
    RemoveAll(usize),
    Link(usize, usize, usize),
    Symlink(usize, usize),
    Chmod(usize, u32),
    Xattr(usize, u8),
    Whiteout(usize, usize),
    MakeAndDelete(usize),
    Rewrite(usize),
    ReplaceByRename(usize),
    TouchDir(usize),
    Fifo(usize, usize),
    Truncate(usize, usize),
}

fn op() -> impl Strategy<Value = Op> {
    let d = || 0..100usize;
    let n = || 0..6usize;
    prop_oneof![
        4 => (d(), n()).prop_map(|(a, b)| Op::Create(a, b)),
        4 => (d(), any::<u8>(), 0..40_000usize).prop_map(|(a, b, c)| Op::Write(a, b, c)),
        2 => (d(), 1..3000usize).prop_map(|(a, b)| Op::Append(a, b)),
        4 => (d(), n()).prop_map(|(a, b)| Op::Mkdir(a, b)),
        6 => (d(), d(), n()).prop_map(|(a, b, c)| Op::Rename(a, b, c)),
        3 => d().prop_map(Op::Unlink),
        1 => d().prop_map(Op::RemoveAll),
        3 => (d(), d(), n()).prop_map(|(a, b, c)| Op::Link(a, b, c)),
        1 => (d(), n()).prop_map(|(a, b)| Op::Symlink(a, b)),
        1 => (d(), 0..0o1000u32).prop_map(|(a, b)| Op::Chmod(a, b)),
        1 => (d(), any::<u8>()).prop_map(|(a, b)| Op::Xattr(a, b)),
        2 => (d(), n()).prop_map(|(a, b)| Op::Whiteout(a, b)),
        1 => d().prop_map(Op::MakeAndDelete),
        1 => d().prop_map(Op::Rewrite),
        2 => d().prop_map(Op::ReplaceByRename),
        1 => d().prop_map(Op::TouchDir),
        1 => (d(), n()).prop_map(|(a, b)| Op::Fifo(a, b)),
        1 => (d(), 0..9000usize).prop_map(|(a, b)| Op::Truncate(a, b)),
    ]
}

/// The tree that is worked on, and what was dirtied.
struct World {
    root: PathBuf,
    dirty: BTreeSet<(u64, u64)>,
    /// Where whiteouts are linked from, as overlayfs does: outside the upper.
    whiteout: PathBuf,
    seed: u64,
}

impl World {
    fn all(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let (mut dirs, mut rest) = (vec![self.root.clone()], Vec::new());
        let mut at = 0;
        while at < dirs.len() {
            let mut here: Vec<_> = std::fs::read_dir(&dirs[at])
                .unwrap()
                .map(|e| e.unwrap().path())
                .collect();
            here.sort();
            for path in here {
                match path.symlink_metadata().unwrap().is_dir() {
                    true => dirs.push(path),
                    false => rest.push(path),
                }
            }
            at += 1;
        }
        (dirs, rest)
    }

    fn dir(&self, n: usize) -> PathBuf {
        let (dirs, _) = self.all();
        dirs[n % dirs.len()].clone()
    }

    fn file(&self, n: usize) -> Option<PathBuf> {
        let (_, rest) = self.all();
        let files: Vec<_> = rest
            .into_iter()
            .filter(|p| p.symlink_metadata().unwrap().is_file())
            .collect();
        (!files.is_empty()).then(|| files[n % files.len()].clone())
    }

    fn any(&self, n: usize) -> Option<PathBuf> {
        let (dirs, rest) = self.all();
        let mut all: Vec<_> = dirs.into_iter().skip(1).chain(rest).collect();
        all.sort();
        (!all.is_empty()).then(|| all[n % all.len()].clone())
    }

    fn mark(&mut self, path: &Path) {
        let meta = path.symlink_metadata().unwrap();
        self.dirty.insert((meta.ino(), meta.dev()));
    }

    fn mark_parent(&mut self, path: &Path) {
        let parent = path.parent().unwrap().to_owned();
        self.mark(&parent);
    }

    fn mark_all(&mut self, path: &Path) {
        self.mark(path);
        if path.symlink_metadata().unwrap().is_dir() {
            for e in std::fs::read_dir(path).unwrap() {
                self.mark_all(&e.unwrap().path());
            }
        }
    }

    fn name(n: usize) -> &'static str {
        ["a", "b", "c", "d", "e\n", "f g"][n]
    }

    fn apply(&mut self, op: &Op) {
        self.seed += 1;
        match *op {
            Op::Create(d, n) => {
                let path = self.dir(d).join(Self::name(n));
                if path.symlink_metadata().is_err() {
                    std::fs::write(&path, b"new").unwrap();
                    self.mark(&path);
                    self.mark_parent(&path);
                }
            }
            Op::Write(f, at, len) => {
                if let Some(path) = self.file(f) {
                    let file = std::fs::File::options().write(true).open(&path).unwrap();
                    file.write_all_at(&noise(self.seed, len), u64::from(at) * 1000)
                        .unwrap();
                    self.mark(&path);
                }
            }
            Op::Append(f, len) => {
                if let Some(path) = self.file(f) {
                    let at = path.metadata().unwrap().len();
                    let file = std::fs::File::options().write(true).open(&path).unwrap();
                    file.write_all_at(&noise(self.seed, len), at).unwrap();
                    self.mark(&path);
                }
            }
            Op::Truncate(f, len) => {
                if let Some(path) = self.file(f) {
                    let file = std::fs::File::options().write(true).open(&path).unwrap();
                    file.set_len(len as u64).unwrap();
                    self.mark(&path);
                }
            }
            Op::Mkdir(d, n) => {
                let path = self.dir(d).join(Self::name(n));
                if std::fs::create_dir(&path).is_ok() {
                    self.mark(&path);
                    self.mark_parent(&path);
                }
            }
            Op::Rename(from, to, n) => {
                let Some(from) = self.any(from) else { return };
                let to = self.dir(to).join(Self::name(n));
                let replaced = to.symlink_metadata().ok().map(|m| (m.ino(), m.dev()));
                let (ino, dev) = {
                    let m = from.symlink_metadata().unwrap();
                    (m.ino(), m.dev())
                };
                let parent = from.parent().unwrap().to_owned();
                if std::fs::rename(&from, &to).is_ok() {
                    self.dirty.insert((ino, dev));
                    self.mark(&parent);
                    self.mark_parent(&to);
                    self.dirty.extend(replaced);
                }
            }
            Op::Unlink(n) => {
                let Some(path) = self.any(n) else { return };
                let m = path.symlink_metadata().unwrap();
                let gone = match m.is_dir() {
                    true => std::fs::remove_dir(&path).is_ok(),
                    false => std::fs::remove_file(&path).is_ok(),
                };
                if gone {
                    self.dirty.insert((m.ino(), m.dev()));
                    self.mark_parent(&path);
                }
            }
            Op::RemoveAll(d) => {
                let path = self.dir(d);
                if path != self.root {
                    self.mark_all(&path);
                    self.mark_parent(&path);
                    std::fs::remove_dir_all(&path).unwrap();
                }
            }
            Op::Link(f, d, n) => {
                let Some(from) = self.file(f) else { return };
                let to = self.dir(d).join(Self::name(n));
                if std::fs::hard_link(&from, &to).is_ok() {
                    self.mark(&to);
                    self.mark_parent(&to);
                }
            }
            Op::Symlink(d, n) => {
                let path = self.dir(d).join(Self::name(n));
                if std::os::unix::fs::symlink("/somewhere/else", &path).is_ok() {
                    self.mark(&path);
                    self.mark_parent(&path);
                }
            }
            Op::Chmod(n, mode) => {
                let Some(path) = self.any(n) else { return };
                if !path.is_symlink() {
                    let mode = std::fs::Permissions::from_mode(mode | 0o700);
                    std::fs::set_permissions(&path, mode).unwrap();
                    self.mark(&path);
                }
            }
            Op::Xattr(n, value) => {
                let Some(path) = self.any(n) else { return };
                let flags = rustix::fs::XattrFlags::empty();
                if rustix::fs::lsetxattr(&path, "trusted.test", &[value], flags).is_ok() {
                    self.mark(&path);
                }
            }
            Op::Whiteout(d, n) => {
                let path = self.dir(d).join(Self::name(n));
                if std::fs::hard_link(&self.whiteout, &path).is_ok() {
                    // The shared inode is dirtied too; it is no news about any place.
                    self.mark(&path);
                    self.mark_parent(&path);
                }
            }
            Op::MakeAndDelete(d) => {
                let path = self.dir(d).join("temporary");
                std::fs::write(&path, b"x").unwrap();
                self.mark(&path);
                std::fs::remove_file(&path).unwrap();
                self.mark_parent(&path);
            }
            Op::Rewrite(f) => {
                if let Some(path) = self.file(f) {
                    let bytes = std::fs::read(&path).unwrap();
                    std::fs::write(&path, bytes).unwrap();
                    self.mark(&path);
                }
            }
            Op::ReplaceByRename(f) => {
                if let Some(path) = self.file(f) {
                    let new = path.parent().unwrap().join("replacement");
                    std::fs::write(&new, noise(self.seed, 700)).unwrap();
                    self.mark(&path);
                    std::fs::rename(&new, &path).unwrap();
                    self.mark(&path);
                    self.mark_parent(&path);
                }
            }
            Op::TouchDir(d) => {
                let path = self.dir(d);
                let times = rustix::fs::Timestamps {
                    last_access: rustix::fs::Timespec {
                        tv_sec: 5,
                        tv_nsec: 6,
                    },
                    last_modification: rustix::fs::Timespec {
                        tv_sec: 7 + self.seed as i64,
                        tv_nsec: 8,
                    },
                };
                let flags = rustix::fs::AtFlags::empty();
                rustix::fs::utimensat(rustix::fs::CWD, &path, &times, flags).unwrap();
                self.mark(&path);
            }
            Op::Fifo(d, n) => {
                let path = self.dir(d).join(Self::name(n));
                let name = CString::new(path.as_os_str().as_bytes()).unwrap();
                let mode = rustix::fs::Mode::RUSR;
                let kind = rustix::fs::FileType::Fifo;
                if rustix::fs::mknodat(rustix::fs::CWD, &name, kind, mode, 0).is_ok() {
                    self.mark(&path);
                    self.mark_parent(&path);
                }
            }
        }
    }

    fn take_dirty(&mut self) -> Vec<DirtyInode> {
        std::mem::take(&mut self.dirty)
            .into_iter()
            .map(|(ino, dev)| DirtyInode {
                ino,
                dev,
                generation: 0,
            })
            .collect()
    }
}

fn check(scratch: &Scratch, rounds: &[Vec<Op>]) -> Result<(), TestCaseError> {
    let root = scratch.dir("upper");
    let whiteout = scratch.join("whiteout");
    let mode = rustix::fs::Mode::empty();
    let kind = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(rustix::fs::CWD, &whiteout, kind, mode, 0).unwrap();
    let mut world = World {
        root: root.clone(),
        dirty: BTreeSet::new(),
        whiteout,
        seed: 0,
    };
    let mut chunks = Chunks::default();
    let mut index: TreeIndex = capture_all(&root, None, &mut chunks).index;
    for (nth, round) in rounds.iter().enumerate() {
        for op in round {
            world.apply(op);
        }
        let inodes = world.take_dirty();
        let opts = CaptureOptions::default();
        let part = dirty(&root, &key(), opts, &index, &inodes, &mut chunks).unwrap();
        let mut other = Chunks::default();
        let whole = capture_all(&root, Some(&index), &mut other);
        prop_assert_eq!(&part.full_walk, &None);
        prop_assert_eq!(
            part.tree,
            whole.tree,
            "round {}: {:#?}",
            nth,
            part.index.changes_since(&whole.index, 20)
        );
        prop_assert_eq!(
            (part.bytes, part.files, part.index.directories()),
            (whole.bytes, whole.files, whole.index.directories())
        );
        // An index that went through many rounds is as good as a new one.
        for ino in inodes.iter().map(|d| d.ino) {
            let sorted = |i: &TreeIndex| i.paths_of(ino).into_iter().collect::<BTreeSet<_>>();
            prop_assert_eq!(sorted(&part.index), sorted(&whole.index));
        }
        index = part.index;
        // Everything the tree needs was given to the sink at some time.
        let dest = scratch.join(&format!("dest{nth}"));
        materialise(index.tree(), &dest, &mut chunks, RestoreOptions::default()).unwrap();
        verify(&dest, &key(), TreeKind::Upper, index.tree()).unwrap();
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn dirty_equals_full(rounds in proptest::collection::vec(proptest::collection::vec(op(), 1..50), 1..6)) {
        let scratch = Scratch::new("dirty");
        check(&scratch, &rounds)?;
    }
}

#[test]
fn a_change_after_one_that_was_undone() {
    // The directory's mtime moved without a lasting change; then a file in it changes, which does not dirty the directory.
    let scratch = Scratch::new("undone");
    let rounds = [
        vec![Op::Create(0, 0), Op::Mkdir(0, 1), Op::Create(1, 2)],
        vec![Op::MakeAndDelete(0), Op::MakeAndDelete(1)],
        vec![Op::Write(0, 0, 100)],
        vec![Op::Write(1, 0, 100)],
        vec![Op::Rename(1, 0, 5)],
    ];
    check(&scratch, &rounds).unwrap();
}
