//! A store in a process of its own: the same code and formats as the embedded one, and it may die while the host works.

use std::ffi::OsString;

use tidepool_cluster_tests::{StoreProcess, TestHost, issue};

#[test]
fn a_host_works_with_a_store_of_another_process_and_survives_its_death() {
    let dir = tempfile::Builder::new()
        .prefix("tp-store-")
        .tempdir_in("/var/tmp")
        .unwrap();
    let (data, identity) = (dir.path().join("data"), dir.path().join("identity"));
    // Before the host, so that it ends after it: the host needs it to clean up.
    let mut store = Some(StoreProcess::run(&data, "127.0.0.1:0"));
    let addr = store.as_ref().map(|s| s.addr.clone()).unwrap_or_default();
    issue(&data, "host", &identity);
    let options: [OsString; 4] = [
        "--store".into(),
        addr.clone().into(),
        "--store-identity".into(),
        identity.into(),
    ];
    let host = TestHost::with_options(options);
    assert_eq!(
        host.cli(["status"]).json()["store"]["endpoint"],
        addr.as_str()
    );
    host.create("a");
    host.exec("a", "echo 1 > /root/one");

    // The store dies. The command runs, its turn is not committed, and the sandbox runs on.
    store.take().expect("it ran").kill();
    let args = [
        "exec",
        "a",
        "--key",
        "k",
        "--",
        "sh",
        "-c",
        "echo x >> /root/two",
    ];
    let cut = host.cli(args);
    assert_eq!(cut.code, 12, "{cut:?}");
    assert_eq!(host.cli(["sandbox", "list"]).json()[0]["state"], "running");

    // It comes back, and the same key goes on where it was: the command does not run twice.
    store.replace(StoreProcess::run(&data, &addr));
    let again = host.cli(args);
    assert_eq!(again.code, 0, "{again:?}\n{}", host.log());
    let lines = host.exec("a", "test $(cat /root/one /root/two | wc -l) = 2");
    assert_eq!(lines["status"]["code"], 0, "{lines}");
    host.cli(["restore", "--force", "a"]).json();
    assert_eq!(
        host.exec("a", "test $(cat /root/one /root/two | wc -l) = 2")["status"]["code"],
        0
    );
}
