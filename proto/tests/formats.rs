//! Formats for arbitrary values and arbitrary bytes: what is written is read again, and no input panics.

mod common;

use proptest::prelude::*;
use tidepool_proto::DomainKey;
use tidepool_proto::body::check;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::recipe::Recipe;
use tidepool_proto::tree::{Node, valid_name};
use tidepool_proto::turn::TurnRecord;

/// Decodes as everything; what decodes is encoded again to the same bytes, as equal values must have equal names.
fn all(bytes: &[u8]) {
    if let Ok(r) = Recipe::decode(bytes) {
        assert_eq!(r.encode(), bytes);
        assert_eq!(r.segments.iter().map(|s| s.len()).sum::<u64>(), r.len());
    }
    if let Ok(n) = Node::decode(bytes) {
        assert_eq!(n.encode(), bytes);
        let root = n.as_root().is_ok();
        assert!(n.entries.iter().all(|e| valid_name(&e.name) || root));
        assert!(n.entries.windows(2).all(|w| w[0].name < w[1].name));
    }
    if let Ok(m) = Manifest::decode(bytes) {
        assert_eq!(m.encode(), bytes);
    }
    if let Ok(t) = TurnRecord::decode(bytes) {
        assert_eq!(t.encode(), bytes);
    }
    let _ = check(bytes);
    if let Ok(links) = tidepool_proto::body::links(bytes) {
        assert_eq!(tidepool_proto::body::is_linked(bytes), !links.is_empty());
    }
    let key = DomainKey::new([42; 32]);
    let _ = key.open(&key.name(b"x"), bytes);
}

fn samples() -> Vec<Vec<u8>> {
    let key = DomainKey::new([42; 32]);
    let plain = b"compressible ".repeat(100);
    let name = key.name(&plain);
    vec![
        common::recipe().encode(),
        common::node().encode(),
        common::manifest().encode(),
        common::turn().encode(),
        key.encode(&name, &plain, &[], None),
        key.encode(&name, &plain, &[], Some([1; 12])),
        {
            let links = [common::name(1), common::name(2)];
            key.encode(&key.name_linked(&plain, &links), &plain, &links, None)
        },
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recipes_come_back(r in common::any_recipe(200)) {
        prop_assert_eq!(Recipe::decode(&r.encode()).unwrap(), r);
    }

    #[test]
    fn nodes_come_back(n in common::any_node()) {
        prop_assert_eq!(Node::decode(&n.encode()).unwrap(), n);
    }

    #[test]
    fn manifests_come_back(m in common::any_manifest()) {
        let bytes = m.encode();
        prop_assert_eq!(Manifest::decode(&bytes).unwrap(), m);
        prop_assert_eq!(Manifest::id_of(&bytes), Manifest::id_of(&bytes.clone()));
    }

    #[test]
    fn turns_come_back(t in common::any_turn()) {
        prop_assert_eq!(TurnRecord::decode(&t.encode()).unwrap(), t);
    }

    /// Links are found where names begin, wherever a value is cut.
    #[test]
    fn links_are_the_names_in_a_value(n in common::any_node(), at in any::<proptest::sample::Index>()) {
        let linked = n.encode_linked();
        prop_assert_eq!(&linked.bytes, &n.encode());
        for (at, name) in &linked.links {
            prop_assert_eq!(&linked.bytes[*at..*at + 32], &name.0);
        }
        let all: std::collections::BTreeSet<_> = linked.links.iter().map(|(_, n)| *n).collect();
        let cut = at.index(linked.bytes.len() + 1);
        let mut parts: std::collections::BTreeSet<_> = linked.within(0..cut).into_iter().collect();
        parts.extend(linked.within(cut..linked.bytes.len()));
        prop_assert_eq!(parts, all);
    }

    #[test]
    fn bodies_come_back(parts in proptest::collection::vec((any::<u8>(), 0..5000usize), 0..8), nonce in proptest::option::of(any::<[u8; 12]>()), key in any::<[u8; 32]>()) {
        let plain: Vec<u8> = parts.iter().flat_map(|(b, n)| vec![*b; *n]).collect();
        let key = DomainKey::new(key);
        let name = key.name(&plain);
        let body = key.encode(&name, &plain, &[], nonce);
        check(&body).unwrap();
        prop_assert_eq!(key.open(&name, &body).unwrap(), plain);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), versioned in any::<bool>()) {
        if versioned && !bytes.is_empty() {
            bytes[0] = 1 + bytes[0] % 2;
        }
        all(&bytes);
    }

    #[test]
    fn mutated_formats_do_no_harm(which in 0..7usize, edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>(), 0..4u8), 1..6)) {
        let mut bytes = samples().remove(which);
        for (at, value, how) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = value,
                1 => bytes[at] ^= 1 << (value % 8),
                2 => bytes.truncate(at),
                _ => bytes.insert(at, value),
            }
        }
        all(&bytes);
        // As a damaged body whose checksum fits: what is behind the checksum has to hold too.
        if which >= 4 && bytes.len() > 16 {
            let at = bytes.len() - 16;
            let sum = blake3::hash(&bytes[..at]);
            bytes[at..].copy_from_slice(&sum.as_bytes()[..16]);
            all(&bytes);
        }
    }
}

#[test]
fn every_single_byte_of_every_sample() {
    for sample in samples() {
        for at in 0..sample.len() {
            for value in [0, 1, 2, 0x7f, 0x80, 0xff] {
                let mut bytes = sample.clone();
                bytes[at] = value;
                all(&bytes);
            }
        }
    }
}
