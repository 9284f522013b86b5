//! The diff of two trees against a comparison path by path.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;

use proptest::prelude::*;
use tidepool_proto::DomainKey;
use tidepool_proto::api::ChangeKind;
use tidepool_proto::recipe::BlobRef;
use tidepool_proto::tree::{Content, Entry, Kind, Meta, Node};
use tidepool_scheduler_core::diff::{TreeDiff, diff, printable};

#[derive(Debug, Clone, PartialEq)]
enum Model {
    File(u8, u32),
    Whiteout,
    Dir(u32, BTreeMap<u8, Model>),
}

fn model() -> impl Strategy<Value = Model> {
    let leaf = prop_oneof![
        4 => (0..4u8, 0..2u32).prop_map(|(c, m)| Model::File(c, m)),
        1 => Just(Model::Whiteout),
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        (
            0..2u32,
            proptest::collection::btree_map(b'a'..b'f', inner, 0..5),
        )
            .prop_map(|(m, c)| Model::Dir(m, c))
    })
}

fn root() -> impl Strategy<Value = Model> {
    proptest::collection::btree_map(b'a'..b'f', model(), 0..5).prop_map(|c| Model::Dir(0, c))
}

#[derive(Default)]
struct Nodes {
    nodes: BTreeMap<Vec<u8>, Node>,
    loads: usize,
}

impl Nodes {
    fn entry(&mut self, name: &[u8], model: &Model) -> Entry {
        let meta = |mode| Meta {
            mode,
            ..Meta::default()
        };
        let (meta, kind) = match model {
            Model::File(c, m) => {
                let content = Content::Inline(vec![*c; *c as usize]);
                let link_group = None;
                (
                    meta(*m),
                    Kind::File {
                        content,
                        link_group,
                    },
                )
            }
            Model::Whiteout => (meta(0), Kind::CharDevice { major: 0, minor: 0 }),
            Model::Dir(m, children) => {
                let entries: Vec<_> = children.iter().map(|(n, c)| self.entry(&[*n], c)).collect();
                let children = (!entries.is_empty()).then(|| {
                    let node = Node { entries };
                    let bytes = node.encode();
                    let name = DomainKey::new([0; 32]).name(&bytes);
                    self.nodes.insert(name.0.to_vec(), node);
                    BlobRef {
                        len: bytes.len() as u64,
                        chunks: vec![name],
                    }
                });
                (meta(*m), Kind::Dir { children })
            }
        };
        let name = name.to_vec();
        Entry { name, meta, kind }
    }

    fn root(&mut self, model: &Model) -> Node {
        Node {
            entries: vec![self.entry(b"", model)],
        }
    }
}

fn flat(prefix: &str, model: &Model, out: &mut BTreeMap<String, Model>) {
    if let Model::Dir(_, children) = model {
        for (name, child) in children {
            let path = match prefix {
                "" => format!("{}", *name as char),
                p => format!("{p}/{}", *name as char),
            };
            out.insert(path.clone(), child.clone());
            flat(&path, child, out);
        }
    }
}

fn expected(a: &Model, b: &Model) -> Vec<(String, ChangeKind)> {
    let (mut x, mut y) = (BTreeMap::new(), BTreeMap::new());
    flat("", a, &mut x);
    flat("", b, &mut y);
    let mut paths: Vec<_> = x.keys().chain(y.keys()).collect();
    paths.sort_by_key(|p| p.split('/').map(str::to_owned).collect::<Vec<_>>());
    paths.dedup();
    let mut out = Vec::new();
    for path in paths {
        use Model::{Dir, File, Whiteout};
        let change = match (x.get(path), y.get(path)) {
            (Some(Whiteout), Some(Whiteout)) | (None, None) => continue,
            (_, Some(Whiteout)) => ChangeKind::Removed,
            (Some(Whiteout) | None, _) => ChangeKind::Added,
            (Some(_), None) => ChangeKind::Removed,
            (Some(File(c, m)), Some(File(d, n))) if c == d => match m == n {
                true => continue,
                false => ChangeKind::Metadata,
            },
            (Some(Dir(m, _)), Some(Dir(n, _))) => match m == n {
                true => continue,
                false => ChangeKind::Metadata,
            },
            _ => ChangeKind::Modified,
        };
        out.push((path.clone(), change));
    }
    out
}

fn run(a: &Model, b: &Model, limit: usize) -> (TreeDiff, usize) {
    let nodes = RefCell::new(Nodes::default());
    let x = nodes.borrow_mut().root(a);
    let y = nodes.borrow_mut().root(b);
    let found = diff(&x, &y, limit, |blob| {
        nodes.borrow_mut().loads += 1;
        Ok::<Node, Infallible>(nodes.borrow().nodes[&blob.chunks[0].0.to_vec()].clone())
    })
    .unwrap();
    let loads = nodes.borrow().loads;
    (found, loads)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn it_finds_what_differs(a in root(), b in root(), limit in 0..20usize) {
        let (found, _) = run(&a, &b, usize::MAX);
        let list: Vec<_> = found.changes.iter().map(|c| (c.path.clone(), c.change)).collect();
        prop_assert_eq!(&list, &expected(&a, &b));
        prop_assert!(!found.truncated);
        let (some, _) = run(&a, &b, limit);
        prop_assert_eq!(some.truncated, list.len() > limit);
        prop_assert_eq!(&some.changes[..], &found.changes[..limit.min(list.len())]);
    }

    #[test]
    fn equal_trees_are_not_loaded(a in root()) {
        prop_assert_eq!(run(&a, &a, 10), (TreeDiff::default(), 0));
    }
}

#[test]
fn depth_has_no_bound() {
    let deep = |mode| {
        (0..20_000).fold(Model::File(1, mode), |m, _| {
            Model::Dir(0, [(b'd', m)].into())
        })
    };
    // Building the model recurses; on a thread with room for that.
    let run = move || {
        let (a, b) = (deep(0), deep(1));
        let (found, loads) = run(&a, &b, 10);
        assert_eq!((found.changes.len(), loads), (1, 40_000));
        std::mem::forget((a, b));
    };
    #[allow(clippy::disallowed_methods)]
    let thread = std::thread::Builder::new().stack_size(512 << 20).spawn(run);
    thread.unwrap().join().unwrap();
}

#[test]
fn paths_are_printable() {
    assert_eq!(printable("a/\u{e9} b".as_bytes()), "a/\u{e9} b");
    assert_eq!(printable(b"a\nb\\c\xff\x7f"), "a\\x0ab\\\\c\\xff\\x7f");
}
