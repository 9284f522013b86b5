//! Capture, restore, and capture again: every kind of file, odd names, any depth, and trees that were tampered with.

mod common;

use std::ffi::{CString, OsStr};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use common::{Chunks, Scratch, capture_all, key, noise};
use rustix::fs::{AtFlags, CWD, FileType, IFlags, Mode, OFlags, XattrFlags};
use tidepool_fs::capture::full;
use tidepool_fs::restore::{RestoreError, RestoreOptions, materialise, remove_tree, verify};
use tidepool_fs::{
    CaptureError, CaptureOptions, ChunkSink, SourceError, TreeKind, load_node, load_root,
    walk_chunks,
};
use tidepool_proto::codec::Linked;
use tidepool_proto::recipe::{BlobRef, Recipe, Segment};
use tidepool_proto::tree::{Content, Entry, Kind, Meta, Node};
use tidepool_proto::{ChunkName, TreeId};

fn node(path: &Path, kind: FileType, dev: u64) {
    let name = CString::new(path.as_os_str().as_bytes()).unwrap();
    rustix::fs::mknodat(CWD, &name, kind, Mode::from_raw_mode(0o640), dev).unwrap();
}

fn xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn mtime(path: &Path, sec: i64, nsec: i64) {
    let time = rustix::fs::Timespec {
        tv_sec: sec,
        tv_nsec: nsec as _,
    };
    let times = rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn inode_flags(path: &Path, flags: IFlags) {
    let file = std::fs::File::open(path).unwrap();
    let now = rustix::fs::ioctl_getflags(&file).unwrap();
    rustix::fs::ioctl_setflags(&file, now | flags).unwrap();
}

/// A POSIX ACL as the kernel keeps it: owner, one named user, group, mask, others.
fn acl() -> Vec<u8> {
    let mut out = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in [
        (0x01u16, 7u16, u32::MAX),
        (0x02, 5, 1234),
        (0x04, 5, u32::MAX),
        (0x10, 5, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        out.extend(tag.to_le_bytes());
        out.extend(perm.to_le_bytes());
        out.extend(id.to_le_bytes());
    }
    out
}

fn make_everything(root: &Path) {
    let file = |name: &str, bytes: &[u8]| {
        let path = root.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    for (name, len) in [
        ("empty", 0),
        ("one", 1),
        ("inline", 512),
        ("recipe", 513),
        ("block", 4096),
        ("large", 3_000_000),
    ] {
        file(name, &noise(len as u64, len));
    }
    // Zeros that were written, zeros that were not, both at odd places.
    file("zeros", &vec![0; 100_000]);
    file("zero-tail", &[noise(1, 5000), vec![0; 9000]].concat());
    file("short-zeros", &[0; 300]);
    let sparse = file("sparse", b"");
    let f = std::fs::File::options().write(true).open(&sparse).unwrap();
    f.set_len(1 << 30).unwrap();
    f.write_all_at(&noise(2, 10_000), 123_456_789).unwrap();
    f.write_all_at(b"end", (1 << 30) - 3).unwrap();
    let prealloc = file("preallocated", b"data");
    let f = std::fs::File::options()
        .write(true)
        .open(&prealloc)
        .unwrap();
    rustix::fs::fallocate(&f, rustix::fs::FallocateFlags::empty(), 0, 50_000).unwrap();

    std::fs::create_dir_all(root.join("dir/sub/empty")).unwrap();
    std::fs::create_dir(root.join("other")).unwrap();
    std::fs::write(root.join("dir/linked"), noise(3, 20_000)).unwrap();
    std::fs::hard_link(root.join("dir/linked"), root.join("other/again")).unwrap();
    std::fs::hard_link(root.join("dir/linked"), root.join("a-first")).unwrap();
    std::fs::write(root.join("dir/small"), b"small").unwrap();
    std::fs::hard_link(root.join("dir/small"), root.join("dir/sub/small2")).unwrap();

    std::os::unix::fs::symlink("/etc/passwd", root.join("absolute-link")).unwrap();
    std::os::unix::fs::symlink("../../../..", root.join("dir/up-link")).unwrap();
    std::os::unix::fs::symlink("nowhere", root.join("dangling")).unwrap();
    xattr(&root.join("dangling"), "trusted.on-link", b"1");
    mtime(&root.join("dangling"), 1_000_000_000, 987_654_321);

    node(&root.join("whiteout"), FileType::CharacterDevice, 0);
    node(
        &root.join("null"),
        FileType::CharacterDevice,
        rustix::fs::makedev(1, 3),
    );
    node(
        &root.join("disk"),
        FileType::BlockDevice,
        rustix::fs::makedev(259, 70_000),
    );
    node(&root.join("fifo"), FileType::Fifo, 0);
    node(&root.join("socket"), FileType::Socket, 0);
    xattr(&root.join("fifo"), "trusted.on-fifo", b"2");

    let tool = file("set-id", b"#!/bin/true\n");
    std::os::unix::fs::chown(&tool, Some(1000), Some(4_000_000_000)).unwrap();
    std::fs::set_permissions(&tool, PermissionsExt::from_mode(0o6755)).unwrap();
    let caps = file("capable", b"x");
    std::os::unix::fs::chown(&caps, Some(7), Some(8)).unwrap();
    // cap_net_raw+ep, as `setcap` writes it.
    let mut cap = 0x0200_0001u32.to_le_bytes().to_vec();
    cap.extend([0x00, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    xattr(&caps, "security.capability", &cap);
    std::fs::set_permissions(root.join("other"), PermissionsExt::from_mode(0o3777)).unwrap();

    let acls = root.join("acls");
    std::fs::create_dir(&acls).unwrap();
    std::fs::write(acls.join("before"), b"made before the default").unwrap();
    xattr(&acls, "system.posix_acl_access", &acl());
    xattr(&acls, "system.posix_acl_default", &acl());
    std::fs::write(acls.join("after"), b"inherits").unwrap();
    std::fs::create_dir(acls.join("subdir")).unwrap();
    let attrs = file("attrs", b"y");
    xattr(&attrs, "user.empty", b"");
    xattr(&attrs, "user.binary", &[0, 255, 10, 61, 0]);
    xattr(&attrs, "user.large", &noise(4, 2000));
    xattr(&root.join("dir"), "trusted.overlay.opaque", b"y");
    // The overlay's own book-keeping does not belong to the tree.
    xattr(&root.join("dir"), "trusted.overlay.origin", &noise(5, 29));
    xattr(&root.join("dir"), "trusted.overlay.impure", b"y");

    for name in [
        b"new\nline".as_slice(),
        b"not \xff\xfe utf-8",
        b" ",
        b"-rf",
        b"back\\slash",
        b"...",
        &[b'n'; 255],
        "\u{1f30a}".as_bytes(),
    ] {
        std::fs::write(root.join(OsStr::from_bytes(name)), name).unwrap();
    }
    mtime(&root.join("one"), -5, 1);
    mtime(&root.join("inline"), 4_000_000_000, 999_999_999);
    mtime(&root.join("dir/sub"), 12, 34);
    mtime(&root.join("dir"), 56, 78);
    mtime(root, 90, 12);

    inode_flags(&file("immutable", b"fixed"), IFlags::IMMUTABLE);
    inode_flags(&file("append", &noise(6, 5000)), IFlags::APPEND);
    inode_flags(&root.join("dir/small"), IFlags::NODUMP | IFlags::NOATIME);
    let fixed = root.join("fixed-dir");
    std::fs::create_dir(&fixed).unwrap();
    std::fs::write(fixed.join("inside"), b"z").unwrap();
    std::fs::hard_link(fixed.join("inside"), root.join("zz-outside")).unwrap();
    inode_flags(&fixed, IFlags::IMMUTABLE);
    // A flag that new entries would inherit.
    let inherit = root.join("inherit");
    std::fs::create_dir(&inherit).unwrap();
    std::fs::write(inherit.join("without"), b"w").unwrap();
    inode_flags(&inherit, IFlags::NODUMP);
    std::fs::write(inherit.join("with"), b"w").unwrap();
}

#[test]
fn every_kind_of_file_comes_back() {
    let scratch = Scratch::new("kinds");
    let root = scratch.dir("from");
    make_everything(&root);
    let mut chunks = Chunks::default();
    let captured = capture_all(&root, None, &mut chunks);
    assert_eq!(captured.notes, Vec::<String>::new());
    assert!(captured.read_bytes < 10_000_000, "holes are not read");

    let dest = scratch.join("to");
    let opts = RestoreOptions {
        sync: true,
        ..RestoreOptions::default()
    };
    let done = materialise(captured.tree, &dest, &mut chunks, opts).unwrap();
    assert_eq!((done.bytes, done.files), (captured.bytes, captured.files));
    verify(&dest, &key(), TreeKind::Upper, captured.tree).unwrap();

    // Seen with other eyes than those that captured.
    let meta = |name: &str| dest.join(name).symlink_metadata().unwrap();
    assert_eq!(meta("dir/linked").ino(), meta("other/again").ino());
    assert_eq!(meta("dir/linked").ino(), meta("a-first").ino());
    assert_eq!(meta("dir/linked").nlink(), 3);
    assert_eq!(meta("dir/sub/small2").ino(), meta("dir/small").ino());
    assert_eq!(meta("zz-outside").ino(), meta("fixed-dir/inside").ino());
    assert_eq!(meta("sparse").len(), 1 << 30);
    assert!(meta("sparse").blocks() < 100, "holes are holes");
    assert_eq!(meta("set-id").mode() & 0o7777, 0o6755);
    assert_eq!(
        (meta("set-id").uid(), meta("set-id").gid()),
        (1000, 4_000_000_000)
    );
    assert_eq!((meta("one").mtime(), meta("one").mtime_nsec()), (-5, 1));
    assert_eq!((meta("dir").mtime(), meta("dir").mtime_nsec()), (56, 78));
    assert_eq!(meta("dangling").mtime_nsec(), 987_654_321);
    assert_eq!(meta("disk").rdev(), rustix::fs::makedev(259, 70_000));
    assert!(meta("fifo").file_type().is_fifo());
    assert!(meta("socket").file_type().is_socket());
    for name in [
        "large",
        "sparse",
        "zeros",
        "zero-tail",
        "recipe",
        "preallocated",
        "append",
    ] {
        assert!(
            std::fs::read(root.join(name)).unwrap() == std::fs::read(dest.join(name)).unwrap(),
            "{name}"
        );
    }
    let get = |path: &str, name: &str| {
        let mut buf = [0u8; 4096];
        rustix::fs::lgetxattr(dest.join(path), name, &mut buf[..]).map(|n| buf[..n].to_vec())
    };
    assert_eq!(get("attrs", "user.binary").unwrap(), [0, 255, 10, 61, 0]);
    assert_eq!(get("acls", "system.posix_acl_default").unwrap(), acl());
    assert!(get("acls/before", "system.posix_acl_access").is_err());
    assert_eq!(get("capable", "security.capability").unwrap().len(), 20);
    assert_eq!(get("dir", "trusted.overlay.opaque").unwrap(), b"y");
    assert!(get("dir", "trusted.overlay.origin").is_err());
    std::fs::write(dest.join("immutable"), b"no").unwrap_err();
    std::fs::write(dest.join("fixed-dir/new"), b"no").unwrap_err();

    // As an image nothing of the overlay is kept.
    let opts = CaptureOptions {
        kind: TreeKind::Image,
    };
    let mut other = Chunks::default();
    let image = full(&root, &key(), opts, None, &mut other).unwrap();
    assert_ne!(image.tree, captured.tree);

    // Everything the tree names was given to the sink, and nothing else.
    let names = walk_chunks(&mut chunks, captured.tree).unwrap();
    let mut have: Vec<_> = chunks.map.keys().copied().collect();
    have.sort();
    assert_eq!(names.into_iter().collect::<Vec<_>>(), have);

    remove_tree(&dest).unwrap();
    assert!(!dest.exists());
}

#[test]
fn a_real_directory_comes_back() {
    let scratch = Scratch::new("real");
    let mut chunks = Chunks::default();
    let captured = capture_all(Path::new("/usr/lib/python3"), None, &mut chunks);
    assert!(captured.files > 50);
    let dest = scratch.join("dest");
    let done = materialise(captured.tree, &dest, &mut chunks, RestoreOptions::default()).unwrap();
    assert_eq!((done.bytes, done.files), (captured.bytes, captured.files));
    verify(&dest, &key(), TreeKind::Upper, captured.tree).unwrap();
    // Batches, not a round trip for each file.
    assert!(chunks.gets as u64 <= captured.index.directories() * 2 + 200);
}

#[test]
fn depth_has_no_bound() {
    let scratch = Scratch::new("deep");
    let root = scratch.dir("from");
    let mut at = rustix::fs::open(&root, OFlags::DIRECTORY, Mode::empty()).unwrap();
    for depth in 0..2500 {
        let name = format!("{depth:0100}");
        rustix::fs::mkdirat(&at, &name, Mode::RWXU).unwrap();
        at = rustix::fs::openat(&at, &name, OFlags::DIRECTORY, Mode::empty()).unwrap();
        if depth % 500 == 499 {
            let flags = OFlags::CREATE | OFlags::WRONLY;
            let f = rustix::fs::openat(&at, "file", flags, Mode::RUSR).unwrap();
            rustix::io::write(&f, &noise(depth, 5000)).unwrap();
            // Linked across the whole depth.
            if depth == 2499 {
                let top = rustix::fs::open(&root, OFlags::DIRECTORY, Mode::empty()).unwrap();
                rustix::fs::linkat(&at, "file", &top, "zz", AtFlags::empty()).unwrap();
            }
        }
    }
    let mut chunks = Chunks::default();
    let captured = capture_all(&root, None, &mut chunks);
    assert_eq!((captured.files, captured.index.directories()), (6, 2501));
    let dest = scratch.join("to");
    materialise(captured.tree, &dest, &mut chunks, RestoreOptions::default()).unwrap();
    verify(&dest, &key(), TreeKind::Upper, captured.tree).unwrap();
    assert_eq!(
        walk_chunks(&mut chunks, captured.tree).unwrap().len(),
        chunks.map.len()
    );
    remove_tree(&dest).unwrap();
    remove_tree(&root).unwrap();
}

#[test]
fn what_was_undone_is_no_change() {
    let scratch = Scratch::new("net");
    let root = scratch.dir("from");
    std::fs::create_dir_all(root.join("a/b")).unwrap();
    std::fs::write(root.join("a/b/file"), noise(1, 10_000)).unwrap();
    let mut chunks = Chunks::default();
    let before = capture_all(&root, None, &mut chunks);
    let taken = chunks.taken;

    std::fs::write(root.join("a/b/tmp"), b"made and deleted").unwrap();
    std::fs::remove_file(root.join("a/b/tmp")).unwrap();
    std::fs::create_dir(root.join("x")).unwrap();
    std::fs::remove_dir(root.join("x")).unwrap();
    let after = capture_all(&root, Some(&before.index), &mut chunks);
    assert_eq!(after.tree, before.tree);
    // The file was cut again, no node was sent.
    assert!(chunks.taken - taken <= 4);
    assert!(
        after
            .index
            .changes_since(&before.index, 10)
            .changes
            .is_empty()
    );

    // An mtime of a file is a change; so is any other metadata of a directory.
    mtime(&root.join("a/b/file"), 1, 1);
    let touched = capture_all(&root, Some(&before.index), &mut chunks);
    assert_ne!(touched.tree, before.tree);
    let changes = touched.index.changes_since(&before.index, 10).changes;
    let paths: Vec<_> = changes.iter().map(|c| c.path.as_str()).collect();
    // The directory of the changed file has the mtime it really has; those above it had no lasting change.
    assert_eq!(paths, ["a/b", "a/b/file"]);
    std::fs::set_permissions(root.join("a"), PermissionsExt::from_mode(0o700)).unwrap();
    let chmod = capture_all(&root, Some(&touched.index), &mut chunks);
    assert_ne!(chmod.tree, touched.tree);
}

#[test]
fn a_failed_capture_says_why() {
    let scratch = Scratch::new("fails");
    let root = scratch.dir("from");
    let mut chunks = Chunks::default();
    let missing = scratch.join("missing");
    let opts = CaptureOptions::default();
    match full(&missing, &key(), opts, None, &mut chunks) {
        Err(CaptureError::Io { path, .. }) => assert!(path.ends_with("missing")),
        other => panic!("{other:?}"),
    }
    std::fs::write(root.join("copied-up"), b"").unwrap();
    xattr(&root.join("copied-up"), "trusted.overlay.metacopy", b"");
    match full(&root, &key(), opts, None, &mut chunks) {
        Err(CaptureError::Unsupported { path, why }) => {
            assert_eq!(path, "copied-up");
            assert!(why.contains("metacopy"));
        }
        other => panic!("{other:?}"),
    }
    struct Refuses;
    impl ChunkSink for Refuses {
        fn chunk(
            &mut self,
            name: ChunkName,
            _: &[u8],
            _: &[ChunkName],
        ) -> Result<(), tidepool_fs::SinkError> {
            Err(tidepool_fs::SinkError::new(name, "no room"))
        }
    }
    std::fs::remove_file(root.join("copied-up")).unwrap();
    let e = full(&root, &key(), opts, None, &mut Refuses).unwrap_err();
    assert!(e.to_string().contains("no room"), "{e}");
}

#[test]
fn missing_and_damaged_chunks_are_named() {
    let scratch = Scratch::new("damaged");
    let root = scratch.dir("from");
    std::fs::create_dir(root.join("dir")).unwrap();
    std::fs::write(root.join("dir/file"), noise(1, 200_000)).unwrap();
    let mut chunks = Chunks::default();
    let captured = capture_all(&root, None, &mut chunks);
    let names = walk_chunks(&mut chunks, captured.tree).unwrap();
    for (n, name) in names.iter().enumerate() {
        let plain = chunks.map.remove(name).unwrap();
        let dest = scratch.join(&format!("missing{n}"));
        let e = materialise(captured.tree, &dest, &mut chunks, RestoreOptions::default());
        let e = e.unwrap_err();
        match &e {
            RestoreError::Source {
                source: SourceError::Missing { name: missing },
                ..
            } => assert_eq!(missing, name),
            other => panic!("{other:?}"),
        }
        assert!(e.to_string().contains(&name.to_string()), "{e}");
        // A chunk that is too short for what is asked of it.
        chunks.map.insert(*name, plain[..plain.len() / 2].to_vec());
        let dest = scratch.join(&format!("short{n}"));
        let e = materialise(captured.tree, &dest, &mut chunks, RestoreOptions::default());
        assert!(e.unwrap_err().is_corruption());
        chunks.map.insert(*name, plain);
    }
    let dest = scratch.join("right");
    materialise(captured.tree, &dest, &mut chunks, RestoreOptions::default()).unwrap();
    std::fs::write(dest.join("dir/file"), b"another").unwrap();
    match verify(&dest, &key(), TreeKind::Upper, captured.tree) {
        Err(e @ RestoreError::Mismatch { .. }) => assert!(e.is_corruption()),
        other => panic!("{other:?}"),
    }
    match materialise(captured.tree, &dest, &mut chunks, RestoreOptions::default()) {
        Err(RestoreError::NotEmpty { .. }) => {}
        other => panic!("{other:?}"),
    }
}

/// A tree of one directory with these entries.
fn tree_of(chunks: &mut Chunks, entries: Vec<Entry>) -> TreeId {
    let put = |chunks: &mut Chunks, value: Linked| {
        let links = value.within(0..value.bytes.len());
        let name = key().name_linked(&value.bytes, &links);
        let bytes = value.bytes;
        chunks.map.insert(name, bytes.clone());
        BlobRef {
            len: bytes.len() as u64,
            chunks: vec![name],
        }
    };
    let children = put(chunks, Node { entries }.encode_linked());
    let root = Node::root(Meta::default(), Some(children)).encode_linked();
    TreeId(put(chunks, root).chunks[0].0)
}

fn entry(name: &[u8], kind: Kind) -> Entry {
    Entry {
        name: name.to_vec(),
        meta: Meta {
            mode: 0o644,
            ..Meta::default()
        },
        kind,
    }
}

#[test]
fn a_hostile_tree_stays_inside() {
    let scratch = Scratch::new("hostile");
    let outside = scratch.dir("outside");
    let mut chunks = Chunks::default();
    let inline = |bytes: &[u8], link_group| Kind::File {
        content: Content::Inline(bytes.to_vec()),
        link_group,
    };
    let mut nth = 0;
    let mut refuse = |chunks: &mut Chunks, entries: Vec<Entry>| -> RestoreError {
        nth += 1;
        let tree = tree_of(chunks, entries);
        let dest = scratch.join(&format!("dest{nth}"));
        materialise(tree, &dest, chunks, RestoreOptions::default()).unwrap_err()
    };
    // Names that lead elsewhere, or come twice: a link first and then a file through it.
    for name in [&b".."[..], b".", b"a/b", b"../outside/x", b"", b"a\0b"] {
        let e = refuse(&mut chunks, vec![entry(name, inline(b"x", None))]);
        assert!(e.is_corruption(), "{name:?}: {e}");
    }
    let target = outside.as_os_str().as_bytes().to_vec();
    let link = Kind::Symlink { target };
    let e = refuse(
        &mut chunks,
        vec![entry(b"a", link.clone()), entry(b"a", inline(b"x", None))],
    );
    assert!(e.is_corruption(), "{e}");
    // A recipe that is not as long as the file it is for.
    let bytes = Recipe {
        segments: vec![Segment::Hole { len: 10_000 }],
    }
    .encode();
    let name = key().name(&bytes);
    let recipe = BlobRef {
        len: bytes.len() as u64,
        chunks: vec![name],
    };
    chunks.map.insert(name, bytes);
    let content = Content::Stored {
        len: 20_000,
        recipe,
    };
    let link_group = None;
    let e = refuse(
        &mut chunks,
        vec![entry(
            b"f",
            Kind::File {
                content,
                link_group,
            },
        )],
    );
    assert!(e.is_corruption(), "{e}");
    // The overlay must not be told to look elsewhere for data.
    let mut bad = entry(b"f", inline(b"x", None));
    bad.meta.xattrs = vec![(b"trusted.overlay.metacopy".to_vec(), Vec::new())];
    assert!(matches!(
        refuse(&mut chunks, vec![bad]),
        RestoreError::Unsupported { .. }
    ));
    // A link is made as it is; names of one group that disagree are found by the check.
    let tree = tree_of(
        &mut chunks,
        vec![
            entry(b"a", inline(b"one", Some(1))),
            entry(b"b", inline(b"two", Some(1))),
            entry(b"c", link),
        ],
    );
    let dest = scratch.join("disagree");
    materialise(tree, &dest, &mut chunks, RestoreOptions::default()).unwrap();
    verify(&dest, &key(), TreeKind::Upper, tree).unwrap_err();
    // A directory that holds itself would never end; a node can't name itself, as names are hashes. A root below a root is refused.
    let root = Node::root(Meta::default(), None).encode();
    let name = key().name(&root);
    chunks.map.insert(name, root.clone());
    let blob = BlobRef {
        len: root.len() as u64,
        chunks: vec![name],
    };
    load_node(&mut chunks, &blob).unwrap_err();
    load_root(&mut chunks, TreeId(name.0)).unwrap();
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn a_destination_passes_nothing_on() {
    let scratch = Scratch::new("inherit");
    let root = scratch.dir("from");
    std::fs::create_dir(root.join("d")).unwrap();
    std::fs::write(root.join("d/f"), b"x").unwrap();
    let mut chunks = Chunks::default();
    let captured = capture_all(&root, None, &mut chunks);
    let dest = scratch.dir("to");
    xattr(&dest, "system.posix_acl_default", &acl());
    inode_flags(&dest, IFlags::NODUMP);
    let file = std::fs::File::open(&dest).unwrap();
    rustix::fs::fchmod(file.as_fd(), Mode::from_raw_mode(0o2777)).unwrap();
    materialise(captured.tree, &dest, &mut chunks, RestoreOptions::default()).unwrap();
    verify(&dest, &key(), TreeKind::Upper, captured.tree).unwrap();
}

/// Changes a file while it is read: a chunk of it is taken in the middle.
struct Meddles<'a>(&'a Path, bool);

impl ChunkSink for Meddles<'_> {
    fn chunk(
        &mut self,
        _: ChunkName,
        _: &[u8],
        _: &[ChunkName],
    ) -> Result<(), tidepool_fs::SinkError> {
        if std::mem::take(&mut self.1) {
            let file = std::fs::File::options().write(true).open(self.0).unwrap();
            file.write_all_at(b"changed", 5_000_000).unwrap();
        }
        Ok(())
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_an_error() {
    let scratch = Scratch::new("meddle");
    let root = scratch.dir("from");
    let file = root.join("file");
    std::fs::write(&file, noise(1, 6_000_000)).unwrap();
    let opts = CaptureOptions::default();
    match full(&root, &key(), opts, None, &mut Meddles(&file, true)) {
        Err(CaptureError::Changed { path }) => assert_eq!(path, "file"),
        other => panic!("{other:?}"),
    }
    full(&root, &key(), opts, None, &mut Meddles(&file, false)).unwrap();
}

#[test]
fn a_full_disk_is_named() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    let scratch = Scratch::new("full");
    let root = scratch.dir("from");
    std::fs::create_dir(root.join("dir")).unwrap();
    std::fs::write(root.join("dir/large"), noise(1, 4 << 20)).unwrap();
    let mut chunks = Chunks::default();
    let captured = capture_all(&root, None, &mut chunks);
    struct Mounted(std::path::PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            unmount(&self.0, UnmountFlags::DETACH).unwrap();
        }
    }
    let small = Mounted(scratch.dir("small"));
    let size = Some(c"size=1m");
    mount("tmpfs", &small.0, "tmpfs", MountFlags::empty(), size).unwrap();
    let dest = small.0.join("to");
    let e = materialise(captured.tree, &dest, &mut chunks, RestoreOptions::default());
    match e.unwrap_err() {
        RestoreError::Io { path, source, .. } => {
            assert_eq!(path, "dir/large");
            assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        }
        other => panic!("{other:?}"),
    }
    remove_tree(&dest).unwrap();
}
