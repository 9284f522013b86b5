//! Path safety as a property: whatever names an archive or a tree holds, nothing outside its destination changes.

mod common;

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::{Chunks, Scratch, key};
use proptest::prelude::*;
use tar::{EntryType, Header};
use tidepool_fs::images::{ImportLimits, import};
use tidepool_fs::restore::{RestoreOptions, materialise, remove_tree, verify};
use tidepool_fs::{TreeKind, capture};
use tidepool_proto::TreeId;
use tidepool_proto::codec::Linked;
use tidepool_proto::recipe::BlobRef;
use tidepool_proto::tree::{Content, Entry, Kind, Meta, Node};

/// Everything there is to see of a directory: names, types, link counts, owners, modes, times, content.
fn seen(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut out = BTreeMap::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(path) = todo.pop() {
        let m = path.symlink_metadata().unwrap();
        let content = match m.is_file() {
            true => std::fs::read(&path).unwrap(),
            false => Vec::new(),
        };
        let what = (
            m.mode(),
            m.nlink(),
            m.uid(),
            m.gid(),
            m.mtime(),
            m.mtime_nsec(),
        );
        out.insert(path.clone(), format!("{what:?} {content:?}"));
        if m.is_dir() {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    out
}

/// A world with things to protect beside the destination.
struct World {
    scratch: Scratch,
    before: BTreeMap<PathBuf, String>,
}

impl World {
    fn new() -> Self {
        let scratch = Scratch::new("paths");
        let outside = scratch.dir("outside");
        std::fs::create_dir(outside.join("a")).unwrap();
        for name in ["secret", "a/b", "l"] {
            std::fs::write(outside.join(name), name).unwrap();
        }
        let before = seen(&outside);
        Self { scratch, before }
    }

    fn outside(&self) -> PathBuf {
        self.scratch.join("outside")
    }

    fn unharmed(&self) -> Result<(), TestCaseError> {
        prop_assert_eq!(&seen(&self.outside()), &self.before);
        Ok(())
    }
}

fn part() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just(".."),
        Just("."),
        Just(""),
        Just("a"),
        Just("b"),
        Just("l"),
        Just("outside"),
        Just("secret"),
        Just(".wh.a"),
    ]
}

/// `OUT` at the beginning stands for the directory to protect, as an absolute path.
fn path() -> impl Strategy<Value = String> {
    let parts = proptest::collection::vec(part(), 1..5).prop_map(|p| p.join("/"));
    (parts, 0..8u8).prop_map(|(p, how)| match how {
        0 => format!("/{p}"),
        1 => format!("OUT/{p}"),
        2 => "OUT".into(),
        _ => p,
    })
}

fn entry() -> impl Strategy<Value = (EntryType, String, String)> {
    let kind = prop_oneof![
        3 => Just(EntryType::Regular),
        2 => Just(EntryType::Directory),
        4 => Just(EntryType::Symlink),
        3 => Just(EntryType::Link),
        1 => Just(EntryType::Fifo),
    ];
    (kind, path(), path())
}

fn nasty_name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => proptest::sample::select(vec!["a", "b", "l", "m"]).prop_map(|s| s.as_bytes().to_vec()),
        1 => proptest::sample::select(vec!["..", ".", "", "../outside/secret", "l/x", "/", "a\0"])
            .prop_map(|s| s.as_bytes().to_vec()),
    ]
}

#[derive(Debug, Clone)]
enum Made {
    File(Option<u64>),
    Link(bool),
    Dir(Vec<(Vec<u8>, Made)>),
}

fn made() -> impl Strategy<Value = Made> {
    let leaf = prop_oneof![
        proptest::option::of(0..2u64).prop_map(Made::File),
        any::<bool>().prop_map(Made::Link),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        proptest::collection::vec((nasty_name(), inner), 0..4).prop_map(Made::Dir)
    })
}

fn put(chunks: &mut Chunks, value: Linked) -> BlobRef {
    let name = key().name_linked(&value.bytes, &value.within(0..value.bytes.len()));
    let bytes = value.bytes;
    let len = bytes.len() as u64;
    chunks.map.insert(name, bytes);
    BlobRef {
        len,
        chunks: vec![name],
    }
}

fn entry_of(chunks: &mut Chunks, name: Vec<u8>, made: Made, outside: &Path) -> Entry {
    let kind = match made {
        Made::File(link_group) => Kind::File {
            content: Content::Inline(b"written".to_vec()),
            link_group,
        },
        Made::Link(up) => Kind::Symlink {
            target: match up {
                true => b"../outside".to_vec(),
                false => outside.as_os_str().as_bytes().to_vec(),
            },
        },
        Made::Dir(all) => {
            let mut entries: Vec<Entry> = all
                .into_iter()
                .map(|(n, m)| entry_of(chunks, n, m, outside))
                .collect();
            // Sorted, as a decoder demands; names that come twice stay.
            entries.sort_by(|a, b| a.name.cmp(&b.name));
            let children = put(chunks, Node { entries }.encode_linked());
            Kind::Dir {
                children: Some(children),
            }
        }
    };
    let meta = Meta {
        mode: 0o777,
        ..Meta::default()
    };
    Entry { name, meta, kind }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_tar_reaches_nothing_outside(entries in proptest::collection::vec(entry(), 1..12)) {
        let world = World::new();
        let out = world.outside();
        let fill = |p: &str| p.replace("OUT", out.to_str().unwrap());
        let mut tar = tar::Builder::new(Vec::new());
        for (kind, path, link) in &entries {
            let content: &[u8] = if kind.is_file() { b"written" } else { b"" };
            tar.append_pax_extensions([
                ("path", fill(path).as_bytes()),
                ("linkpath", fill(link).as_bytes()),
            ])
            .unwrap();
            let mut h = Header::new_ustar();
            h.set_entry_type(*kind);
            h.set_mode(0o777);
            h.set_size(content.len() as u64);
            h.set_cksum();
            tar.append(&h, content).unwrap();
        }
        let source = world.scratch.join("t.tar");
        std::fs::write(&source, tar.into_inner().unwrap()).unwrap();
        let dest = world.scratch.join("dest");
        let limits = ImportLimits::default();
        let mut chunks = Chunks::default();
        let kind = Some(tidepool_proto::api::ImageKind::Tar);
        let done = import(&source, kind, &dest, &key(), limits, &mut chunks, &mut |_, _, _| {});
        world.unharmed()?;
        match done {
            Ok(done) => {
                verify(&dest, &key(), TreeKind::Image, done.tree).unwrap();
            }
            Err(e) => {
                prop_assert!(e.is_invalid(), "{}", e);
                prop_assert!(!dest.exists());
            }
        }
        // Nothing beside what the test made.
        let names = std::fs::read_dir(world.scratch.path()).unwrap().count();
        prop_assert!(names <= 3);
    }

    #[test]
    fn a_tree_reaches_nothing_outside(all in proptest::collection::vec((nasty_name(), made()), 0..6)) {
        let world = World::new();
        let mut chunks = Chunks::default();
        let root = entry_of(&mut chunks, Vec::new(), Made::Dir(all), &world.outside());
        let root = put(&mut chunks, Node { entries: vec![root] }.encode_linked());
        let tree = TreeId(root.chunks[0].0);
        let dest = world.scratch.join("dest");
        let done = materialise(tree, &dest, &mut chunks, RestoreOptions::default());
        world.unharmed()?;
        if let Err(e) = done {
            prop_assert!(e.is_corruption(), "{}", e);
        } else {
            // What was made is inside, and can be captured.
            let opts = tidepool_fs::CaptureOptions::default();
            capture::full(&dest, &key(), opts, None, &mut chunks).unwrap();
        }
        remove_tree(&dest).unwrap();
        world.unharmed()?;
    }
}
