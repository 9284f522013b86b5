//! A disk that is full, and one that fails. Needs root: real file systems on loop devices.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{DAY, Process, chunk, client, commit, fast, sandbox_id, session};
use tidepool_proto::manifest::Manifest;
use tidepool_proto::{Epoch, ErrorKind, SandboxId};
use tidepool_store::{Node, NodeConfig, Role};
use tidepool_store_client::{Client, ClientConfig, Commit};

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?} (as root?): {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Something mounted; unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(args: &[&str], at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        let mut all = args.to_vec();
        all.push(text(at));
        run("mount", &all);
        Mount(at.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// An ext4 of `mib` on a loop device, its image in `dir`.
fn small_ext4(dir: &Path, mib: u64) -> Mount {
    let image = dir.join("image");
    fs::File::create(&image)
        .unwrap()
        .set_len(mib << 20)
        .unwrap();
    run("mkfs.ext4", &["-q", "-m", "0", text(&image)]);
    Mount::new(&["-o", "loop", text(&image)], &dir.join("mnt"))
}

/// A turn whose manifest has 100 KiB.
fn large_commit(sandbox: SandboxId, turn: u64) -> Commit {
    let mut one = commit(sandbox, Epoch(1), turn);
    let (_, bytes) = one.manifest.unwrap();
    let mut manifest = Manifest::decode(&bytes).unwrap();
    manifest.spec = common::noise(turn, 100 << 10);
    let bytes = manifest.encode();
    let id = Manifest::id_of(&bytes);
    one.record = common::record(one.turn, &one.key, id);
    one.manifest = Some((id, bytes));
    one
}

fn temp() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("tpdisk").tempdir().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_serves_reads_and_recovers() {
    let dir = temp();
    let disk = small_ext4(dir.path(), 400);
    let data = disk.0.join("data");
    let node = Node::start(NodeConfig {
        reserve_bytes: 32 << 20,
        ..NodeConfig::embedded(&data)
    })
    .await
    .unwrap();
    let c = client(&node).await;
    let id = sandbox_id(1);
    c.create_sandbox(id, "s", vec![]).await.unwrap();
    c.commit(commit(id, Epoch(1), 1)).await.unwrap();

    // Until it is full.
    let mut stored = Vec::new();
    let e = loop {
        let seed = stored.len() as u64 * 100;
        let bodies: Vec<_> = (0..4).map(|i| chunk(seed + i, 1 << 20)).collect();
        match c.put(session(1), bodies.clone()).await {
            Ok(_) => stored.extend(bodies),
            Err(e) => break e,
        }
        assert!(stored.len() < 400, "the disk never filled");
    };
    assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
    assert!(e.to_string().contains("full"), "{e}");
    assert!(stored.len() > 200, "{} MiB stored", stored.len());
    // It refused what would not have fit; now nothing fits.
    fs::write(disk.0.join("others"), vec![1; 8 << 20]).unwrap();
    assert!(c.status().await.unwrap().full);
    let e = c.commit(commit(id, Epoch(1), 2)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable);
    let check = async |c: &Client| {
        for part in stored.chunks(16) {
            let names: Vec<_> = part.iter().map(|(n, _)| *n).collect();
            let got = c.get(&names).await.unwrap();
            assert!(got.iter().zip(part).all(|(g, (_, b))| g == b));
        }
        assert_eq!(c.sandbox(id).await.unwrap().unwrap().turns, 1);
    };
    check(&c).await;

    // Fuller still, by others: not one byte left.
    let filler = disk.0.join("filler");
    let _ = Command::new("dd")
        .args(["if=/dev/zero", "bs=64K", &format!("of={}", text(&filler))])
        .output()
        .unwrap();
    check(&c).await;
    let e = c.end_session(session(1)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable);
    drop(c);
    node.shutdown().await;

    // It starts again, and refuses writes while there is less room than it was told to leave.
    let node = Node::start(NodeConfig {
        reserve_bytes: 1 << 30,
        ..NodeConfig::embedded(&data)
    })
    .await
    .unwrap();
    let c = client(&node).await;
    check(&c).await;
    let tiny = vec![chunk(7_000_000, 1000)];
    let e = c.put(session(2), tiny).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable);
    drop(c);
    node.shutdown().await;
    fs::remove_file(&filler).unwrap();
    let node = Node::start(NodeConfig {
        reserve_bytes: 8 << 20,
        ..NodeConfig::embedded(&data)
    })
    .await
    .unwrap();
    let c = client(&node).await;
    c.put(session(2), vec![chunk(7_000_000, 1000)])
        .await
        .unwrap();
    c.commit(commit(id, Epoch(1), 2)).await.unwrap();
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_run_out_of_room_stall_and_go_on() {
    let dir = temp();
    let disk = small_ext4(dir.path(), 200);
    // Without a reserve nothing keeps the node from running into the end of the disk.
    let node = Node::start(NodeConfig {
        reserve_bytes: 0,
        ..NodeConfig::embedded(disk.0.join("data"))
    })
    .await
    .unwrap();
    let c = Client::connect(ClientConfig {
        deadline: Duration::from_secs(120),
        ..ClientConfig::new(vec![node.local_addr()], node.client_identity())
    })
    .await
    .unwrap();
    let before: Vec<_> = (0..8).map(|i| chunk(i, 100_000)).collect();
    c.put(session(1), before.clone()).await.unwrap();
    let id = sandbox_id(1);
    c.create_sandbox(id, "s", vec![]).await.unwrap();
    let filler = disk.0.join("filler");
    let _ = Command::new("dd")
        .args(["if=/dev/zero", "bs=4K", &format!("of={}", text(&filler))])
        .output()
        .unwrap();
    // Commits until one does not fit.
    let mut committed = 0;
    for turn in 1..10_000 {
        let one = large_commit(id, turn);
        match tokio::time::timeout(Duration::from_secs(3), c.commit(one)).await {
            Ok(Ok(())) => committed = turn,
            Ok(Err(e)) => {
                assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
                break;
            }
            Err(_) => break,
        }
    }
    assert!(node.stats().full, "{committed} commits fit a full disk");
    let names: Vec<_> = before.iter().map(|(n, _)| *n).collect();
    let got = c.get(&names).await.unwrap();
    assert!(got.iter().zip(&before).all(|(g, (_, b))| g == b));
    let turns = c.sandbox(id).await.unwrap().unwrap().turns;
    assert!(
        turns == committed || turns == committed + 1,
        "{turns} {committed}"
    );

    fs::remove_file(&filler).unwrap();
    // What was stalled goes through: the same commit again is the same commit.
    let mut tries = 0;
    while let Err(e) = c.commit(large_commit(id, committed + 1)).await {
        assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
        tries += 1;
        assert!(tries < 100, "no recovery: {e}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    println!("recovered after {tries} tries");
    c.put(session(1), vec![chunk(99, 100_000)]).await.unwrap();
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_disk_stops_the_node_and_loses_nothing() {
    // A disk larger than what backs it: writes beyond fail with an I/O error, as those of a dying disk.
    let dir = temp();
    let back = Mount::new(
        &["-t", "tmpfs", "-o", "size=160m", "tmpfs"],
        &dir.path().join("back"),
    );
    let disk = small_ext4(&back.0, 600);
    let data = disk.0.join("data");
    let identity = Node::issue_client(&data, Role::Host, DAY).unwrap();
    let mut store = Process::start(&data, 8);
    let c = Client::connect(fast(store.addr, identity.clone()))
        .await
        .unwrap();
    let mut stored = Vec::new();
    let e = loop {
        let seed = stored.len() as u64 * 100;
        let bodies: Vec<_> = (0..4).map(|i| chunk(seed + i, 1 << 20)).collect();
        match c.put(session(1), bodies.clone()).await {
            Ok(_) => stored.extend(bodies),
            Err(e) => break e,
        }
        assert!(stored.len() < 600, "the disk never failed");
    };
    println!("{} MiB stored, then: {e}", stored.len());
    assert!(stored.len() > 40);
    // It stops by itself, and says so with its exit code.
    assert!(!store.wait().success());

    // The disk is replaced: more room behind it, the file system checked.
    drop(disk);
    run("mount", &["-o", "remount,size=700m", text(&back.0)]);
    let image = back.0.join("image");
    let _ = Command::new("e2fsck")
        .args(["-fy", text(&image)])
        .output()
        .unwrap();
    let _disk = Mount::new(&["-o", "loop", text(&image)], &back.0.join("mnt"));
    let store = Process::start(&data, 8);
    let c = Client::connect(fast(store.addr, identity)).await.unwrap();
    for part in stored.chunks(16) {
        let names: Vec<_> = part.iter().map(|(n, _)| *n).collect();
        let got = c.get(&names).await.unwrap();
        assert!(got.iter().zip(part).all(|(g, (_, b))| g == b));
    }
    c.put(session(2), vec![chunk(8_000_000, 1 << 20)])
        .await
        .unwrap();
    drop(c);
    assert!(store.terminate());
}
