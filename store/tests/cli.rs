//! The binary's verbs.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use common::{Process, chunk, connect, session};
use tidepool_store_client::ClientIdentity;

fn store(args: &[&str], data: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidepool-store"))
        .args(args)
        .arg("--data")
        .arg(data)
        .output()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_made_and_its_clients_are_issued() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (dir.path().join("data"), dir.path().join("client"));
    for _ in 0..2 {
        let made = store(&["init"], &data);
        assert!(made.status.success(), "{made:?}");
    }
    let issue = ["issue-client", "--out", out.to_str().unwrap()];
    // Also over the files of an earlier one.
    for _ in 0..2 {
        assert!(store(&issue, &data).status.success());
    }
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&out.join("client.key")), 0o600);
    assert_eq!(mode(&data), 0o700);
    assert_eq!(mode(&data.join("pki/ca.key")), 0o600);
    let node = Process::start(&data, 64);
    let client = connect(node.addr, ClientIdentity::load(&out).unwrap()).await;
    client.put(session(1), vec![chunk(1, 1)]).await.unwrap();
    // A second node on the same directory says why it does not start.
    let second = store(&["run", "--listen", "127.0.0.1:0"], &data);
    assert!(!second.status.success());
    assert!(
        String::from_utf8_lossy(&second.stderr).contains("lock"),
        "{second:?}"
    );
    drop(client);
    assert!(node.terminate());

    let version = Command::new(env!("CARGO_BIN_EXE_tidepool-store"))
        .arg("--version")
        .output()
        .unwrap();
    let text = String::from_utf8(version.stdout).unwrap();
    assert_eq!(
        text.trim(),
        format!("tidepool-store {}", env!("CARGO_PKG_VERSION"))
    );
    let wrong = Command::new(env!("CARGO_BIN_EXE_tidepool-store"))
        .arg("fly")
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}
