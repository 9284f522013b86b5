//! Values of every stored format: fixed ones for the golden files, arbitrary ones for properties.
#![allow(dead_code)]

use proptest::prelude::*;
use tidepool_proto::manifest::{Compat, Manifest, ProcessImage};
use tidepool_proto::recipe::{BlobRef, Recipe, Segment};
use tidepool_proto::tree::{
    Content, Entry, Kind, MAX_INLINE, MAX_INLINE_SEGMENTS, Meta, Node, valid_name,
};
use tidepool_proto::turn::{
    Evidence, ExecResult, ExitStatus, MAX_INLINE_OUTPUT, Output, TurnRecord, TurnStats, Verdict,
};
use tidepool_proto::{CheckpointId, ChunkName, Epoch, MAX_CHUNK_LEN, SandboxId, TreeId, TurnNo};

pub(crate) fn name(n: u8) -> ChunkName {
    ChunkName([n; 32])
}

pub(crate) fn recipe() -> Recipe {
    let mut r = Recipe::default();
    let data = |n, offset, len| Segment::Data {
        chunk: name(n),
        offset,
        len,
    };
    r.push(data(1, 0, 16_384));
    r.push(Segment::Hole { len: 1 << 40 });
    r.push(data(2, 4096, 4096));
    r.push(data(2, 0, 4096));
    r.push(data(1, 1_044_480, 4096));
    r
}

pub(crate) fn blob(n: u8) -> BlobRef {
    BlobRef {
        len: 70_000,
        chunks: vec![name(n), name(n + 1)],
    }
}

pub(crate) fn node() -> Node {
    let meta = Meta {
        mode: 0o4755,
        uid: 1000,
        gid: 4_000_000_000,
        mtime_s: -1,
        mtime_ns: 999_999_999,
        xattrs: vec![
            (b"security.capability".to_vec(), vec![1, 0, 0, 2]),
            (b"user.empty".to_vec(), Vec::new()),
        ],
        flags: 0x10,
    };
    let file = |content, link_group| Kind::File {
        content,
        link_group,
    };
    let kinds = [
        file(Content::Inline(b"inline".to_vec()), None),
        file(Content::Recipe(recipe()), Some(u64::MAX)),
        file(
            Content::Stored {
                len: 1 << 33,
                recipe: blob(3),
            },
            None,
        ),
        Kind::Dir { children: None },
        Kind::Dir {
            children: Some(blob(5)),
        },
        Kind::Symlink {
            target: b"../\xff".to_vec(),
        },
        Kind::CharDevice { major: 0, minor: 0 },
        Kind::BlockDevice {
            major: 259,
            minor: 1_000_000,
        },
        Kind::Fifo,
        Kind::Socket,
    ];
    let entries = kinds.into_iter().enumerate().map(|(n, kind)| Entry {
        name: vec![b'a' + n as u8, 0xfe],
        meta: if n % 2 == 0 {
            meta.clone()
        } else {
            Meta::default()
        },
        kind,
    });
    Node {
        entries: entries.collect(),
    }
}

pub(crate) fn manifest() -> Manifest {
    Manifest {
        sandbox: SandboxId([7; 16]),
        epoch: Epoch(3),
        turn: TurnNo(300),
        parent: Some(CheckpointId([8; 32])),
        created_ms: 1_700_000_000_000,
        verdict: Verdict::Full,
        domain: "default".parse().unwrap(),
        image_name: "debian:12".into(),
        image: TreeId([9; 32]),
        upper: TreeId([10; 32]),
        processes: Some(ProcessImage {
            tree: TreeId([11; 32]),
            bytes: 1 << 30,
            count: 12,
            compat: Compat {
                arch: "x86_64".into(),
                kernel: "6.18.0".into(),
                criu: "4.2.1".into(),
                cpu_flags: "avx avx2 sse4_2".into(),
            },
        }),
        spec: br#"{"cwd":"/"}"#.to_vec(),
        init_nonce: [13; 32],
        upper_bytes: 123_456_789,
    }
}

pub(crate) fn turn() -> TurnRecord {
    TurnRecord {
        turn: TurnNo(300),
        key: "turn-300".into(),
        command: "make -j2 test".into(),
        started_ms: 1_700_000_000_000,
        ended_ms: 1_700_000_001_234,
        verdict: Verdict::Processes,
        checkpoint: CheckpointId([14; 32]),
        evidence: Evidence {
            paths: vec!["tmp/out".into()],
            paths_total: 1,
            processes: vec!["12 python3: ran".into(), "13 sh: born".into()],
            processes_total: 9,
            reasons: vec!["first checkpoint".into()],
            not_covered: vec!["host directory /data at /mnt".into()],
        },
        stats: TurnStats {
            captured_bytes: 1,
            sent_bytes: 300,
            sent_chunks: 3,
            full_bytes: 1 << 31,
            frozen_us: 150_000,
            exposed_us: 350_000,
        },
        result: Some(ExecResult {
            status: ExitStatus::Signal(9),
            stdout: Output::Inline(b"ok\n".to_vec()),
            stderr: Output::Stored(blob(15)),
        }),
    }
}

fn any_name() -> impl Strategy<Value = ChunkName> {
    // Few different ones, so that neighbours repeat.
    prop_oneof![
        3 => (0..4u8).prop_map(name),
        1 => any::<[u8; 32]>().prop_map(ChunkName),
    ]
}

pub(crate) fn any_blob() -> impl Strategy<Value = BlobRef> {
    proptest::collection::vec(any_name(), 1..5).prop_flat_map(|chunks| {
        let n = chunks.len() as u64;
        (n..=n * MAX_CHUNK_LEN as u64).prop_map(move |len| BlobRef {
            len,
            chunks: chunks.clone(),
        })
    })
}

pub(crate) fn any_recipe(max: usize) -> impl Strategy<Value = Recipe> {
    let data = (
        any_name(),
        0..MAX_CHUNK_LEN as u32,
        1..=MAX_CHUNK_LEN as u32,
    );
    let segment = prop_oneof![
        1 => (1..1u64 << 40).prop_map(|len| Segment::Hole { len }),
        3 => data.prop_map(|(chunk, offset, len)| Segment::Data {
            chunk,
            offset,
            len: len.min(MAX_CHUNK_LEN as u32 - offset),
        }),
    ];
    proptest::collection::vec(segment, 0..=max).prop_map(|segments| Recipe { segments })
}

fn any_meta() -> impl Strategy<Value = Meta> {
    let xattrs = proptest::collection::btree_map(
        "[a-z.]{1,20}".prop_map(String::into_bytes),
        proptest::collection::vec(any::<u8>(), 0..50),
        0..4,
    );
    let numbers = (0..0o10000u32, any::<u32>(), any::<u32>(), any::<u32>());
    (numbers, any::<i64>(), 0..1_000_000_000u32, xattrs).prop_map(
        |((mode, uid, gid, flags), mtime_s, mtime_ns, xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime_s,
            mtime_ns,
            xattrs: xattrs.into_iter().collect(),
            flags,
        },
    )
}

fn any_content() -> impl Strategy<Value = Content> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..=MAX_INLINE).prop_map(Content::Inline),
        any_recipe(MAX_INLINE_SEGMENTS).prop_map(Content::Recipe),
        (0..=i64::MAX as u64, any_blob()).prop_map(|(len, recipe)| Content::Stored { len, recipe }),
    ]
}

fn any_kind() -> impl Strategy<Value = Kind> {
    let device = || (any::<u32>(), any::<u32>());
    prop_oneof![
        4 => (any_content(), proptest::option::of(any::<u64>()))
            .prop_map(|(content, link_group)| Kind::File { content, link_group }),
        2 => proptest::option::of(any_blob()).prop_map(|children| Kind::Dir { children }),
        1 => proptest::collection::vec(1..=255u8, 1..100).prop_map(|target| Kind::Symlink { target }),
        1 => device().prop_map(|(major, minor)| Kind::CharDevice { major, minor }),
        1 => device().prop_map(|(major, minor)| Kind::BlockDevice { major, minor }),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Socket),
    ]
}

pub(crate) fn any_node() -> impl Strategy<Value = Node> {
    let names = proptest::collection::vec(any::<u8>(), 1..=255).prop_map(|mut n| {
        n.iter_mut()
            .filter(|b| **b == b'/' || **b == 0)
            .for_each(|b| *b = b'_');
        match valid_name(&n) {
            true => n,
            false => b"x".to_vec(),
        }
    });
    proptest::collection::btree_map(names, (any_meta(), any_kind()), 0..8).prop_map(|all| Node {
        entries: all
            .into_iter()
            .map(|(name, (meta, kind))| Entry { name, meta, kind })
            .collect(),
    })
}

pub(crate) fn any_verdict() -> impl Strategy<Value = Verdict> {
    (any::<bool>(), any::<bool>()).prop_map(|(f, p)| Verdict::of(f, p))
}

pub(crate) fn any_manifest() -> impl Strategy<Value = Manifest> {
    let text = || "\\PC{0,40}";
    let compat =
        (text(), text(), text(), text()).prop_map(|(arch, kernel, criu, cpu_flags)| Compat {
            arch,
            kernel,
            criu,
            cpu_flags,
        });
    let tree = || any::<[u8; 32]>().prop_map(TreeId);
    let processes =
        (tree(), any::<u64>(), any::<u32>(), compat).prop_map(|(tree, bytes, count, compat)| {
            ProcessImage {
                tree,
                bytes,
                count,
                compat,
            }
        });
    let ids = (
        any::<[u8; 16]>(),
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
    );
    let parent = proptest::option::of(any::<[u8; 32]>().prop_map(CheckpointId));
    let texts = ("[a-z0-9][a-z0-9._-]{0,63}", text());
    let rest = (
        proptest::collection::vec(any::<u8>(), 0..300),
        any::<[u8; 32]>(),
        any_verdict(),
    );
    (
        ids,
        parent,
        texts,
        tree(),
        tree(),
        proptest::option::of(processes),
        rest,
    )
        .prop_map(
            |(
                ids,
                parent,
                (domain, image_name),
                image,
                upper,
                processes,
                (spec, init_nonce, verdict),
            )| {
                Manifest {
                    sandbox: SandboxId(ids.0),
                    epoch: Epoch(ids.1),
                    turn: TurnNo(ids.2),
                    parent,
                    created_ms: ids.3,
                    verdict,
                    domain: domain.parse().unwrap(),
                    image_name,
                    image,
                    upper,
                    processes,
                    spec,
                    init_nonce,
                    upper_bytes: ids.4,
                }
            },
        )
}

pub(crate) fn any_turn() -> impl Strategy<Value = TurnRecord> {
    let list = || proptest::collection::vec("\\PC{0,30}", 0..5);
    let evidence = (list(), list(), list(), list(), any::<u64>(), any::<u64>()).prop_map(
        |(paths, processes, reasons, not_covered, paths_total, processes_total)| Evidence {
            paths,
            paths_total,
            processes,
            processes_total,
            reasons,
            not_covered,
        },
    );
    let stats = any::<[u64; 6]>().prop_map(|s| TurnStats {
        captured_bytes: s[0],
        sent_bytes: s[1],
        sent_chunks: s[2],
        full_bytes: s[3],
        frozen_us: s[4],
        exposed_us: s[5],
    });
    let output = || {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..=MAX_INLINE_OUTPUT).prop_map(Output::Inline),
            any_blob().prop_map(Output::Stored),
        ]
    };
    let status = prop_oneof![
        any::<u8>().prop_map(ExitStatus::Code),
        any::<u8>().prop_map(ExitStatus::Signal),
        Just(ExitStatus::TimedOut),
    ];
    let result = (status, output(), output()).prop_map(|(status, stdout, stderr)| ExecResult {
        status,
        stdout,
        stderr,
    });
    let head = (
        "[a-z0-9]{0,40}",
        "\\PC{0,60}",
        any::<[u64; 3]>(),
        any::<[u8; 32]>(),
    );
    (
        head,
        any_verdict(),
        evidence,
        stats,
        proptest::option::of(result),
    )
        .prop_map(
            |((key, command, n, checkpoint), verdict, evidence, stats, result)| TurnRecord {
                turn: TurnNo(n[0]),
                key,
                command,
                started_ms: n[1],
                ended_ms: n[2],
                verdict,
                checkpoint: CheckpointId(checkpoint),
                evidence,
                stats,
                result,
            },
        )
}
