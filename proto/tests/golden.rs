//! Stored formats against files written by the build that fixed them: what one version stores, every later one reads, and writes alike.
//!
//! The files are written only with `TIDEPOOL_WRITE_GOLDEN=1`, and only where a format's version is new: changing one breaks every store that holds it.

mod common;

use std::fmt::Debug;
use std::path::PathBuf;

use tidepool_proto::body::check;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::recipe::Recipe;
use tidepool_proto::tree::{Meta, Node};
use tidepool_proto::turn::TurnRecord;
use tidepool_proto::{DomainKey, FormatError};

fn golden(file: &str, now: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(file);
    if std::env::var_os("TIDEPOOL_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, now).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn same<T: PartialEq + Debug>(
    file: &str,
    value: &T,
    encoded: Vec<u8>,
    decode: impl Fn(&[u8]) -> Result<T, FormatError>,
) {
    let stored = golden(file, &encoded);
    assert_eq!(encoded, stored, "{file}: written differently");
    assert_eq!(&decode(&stored).unwrap(), value, "{file}: read differently");
    for cut in 0..stored.len() {
        assert!(decode(&stored[..cut]).is_err(), "{file}: cut at {cut}");
    }
    let mut longer = stored.clone();
    longer.push(0);
    assert!(decode(&longer).is_err(), "{file}: something follows");
    let mut version = stored;
    version[0] = 99;
    match decode(&version) {
        Err(FormatError::Version { found: 99, .. }) => {}
        other => panic!("{file}: {other:?}"),
    }
}

#[test]
fn recipes_nodes_manifests_and_turns() {
    let recipe = common::recipe();
    same("recipe.bin", &recipe, recipe.encode(), Recipe::decode);
    let node = common::node();
    same("tree-node.bin", &node, node.encode(), Node::decode);
    let meta = Meta {
        mode: 0o755,
        ..Meta::default()
    };
    let root = Node::root(meta, Some(common::blob(1)));
    same("tree-root.bin", &root, root.encode(), Node::decode);
    let manifest = common::manifest();
    same(
        "manifest.bin",
        &manifest,
        manifest.encode(),
        Manifest::decode,
    );
    let turn = common::turn();
    same("turn.bin", &turn, turn.encode(), TurnRecord::decode);
}

#[test]
fn chunk_bodies() {
    let key = DomainKey::new([42; 32]);
    // Too short to be compressed, so that the bytes do not depend on the compressor's version.
    let plain = b"a chunk's plaintext";
    let name = key.name(plain);
    for (file, nonce) in [
        ("chunk-plain.bin", None),
        ("chunk-sealed.bin", Some([5; 12])),
    ] {
        let body = key.encode(&name, plain, &[], nonce);
        let stored = golden(file, &body);
        assert_eq!(body, stored, "{file}: written differently");
        check(&stored).unwrap();
        assert_eq!(key.open(&name, &stored).unwrap(), plain);
    }
    let links = [common::name(1), common::name(2)];
    let name = key.name_linked(plain, &links);
    for (file, nonce) in [
        ("chunk-linked.bin", None),
        ("chunk-linked-sealed.bin", Some([7; 12])),
    ] {
        let body = key.encode(&name, plain, &links, nonce);
        let stored = golden(file, &body);
        assert_eq!(body, stored, "{file}: written differently");
        assert_eq!(tidepool_proto::body::links(&stored).unwrap(), links);
        assert_eq!(key.open(&name, &stored).unwrap(), plain);
    }
    let plain = b"compressible ".repeat(1000);
    let name = key.name(&plain);
    for (file, nonce) in [
        ("chunk-compressed.bin", None),
        ("chunk-compressed-sealed.bin", Some([6; 12])),
    ] {
        let stored = golden(file, &key.encode(&name, &plain, &[], nonce));
        assert!(stored.len() < 200);
        check(&stored).unwrap();
        assert_eq!(key.open(&name, &stored).unwrap(), plain);
    }
}
