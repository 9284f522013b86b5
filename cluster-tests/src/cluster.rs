//! A store of several nodes under test: real `tidepool-store` processes, each on a host of its own, which is a network namespace on
//! a switch that is another one. Nothing here reaches the machine's own network.
//!
//! A [`TestCluster`] owns everything it makes; dropping it ends the processes and removes namespaces, disks and data, also when the test
//! failed. What the nodes logged last is shown then.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tidepool_proto::cluster::TopologyRequest;
use tidepool_proto::wire::{request, response};
use tidepool_store_client::{Client, ClientConfig, ClientIdentity};
use tokio::runtime::Runtime;

use crate::program;

/// The port of every node.
const PORT: u16 = 7480;
/// Entries that a member may lack where a load goes on.
const BEHIND: u64 = 64;
/// How long a cluster may take to come to rest.
const REST: Duration = Duration::from_secs(120);
/// The client's host.
const CLIENT: u64 = 100;

static CLUSTERS: AtomicU32 = AtomicU32::new(0);

/// Runs a command that has to succeed, and gives what it printed.
///
/// # Panics
/// Where it fails.
pub fn must<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: &[S]) -> String {
    let program = program.as_ref();
    let out = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}", program.display()));
    let args: Vec<_> = args.iter().map(|a| a.as_ref().to_owned()).collect();
    assert!(out.status.success(), "{program:?} {args:?}: {out:?}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

struct Host {
    /// The namespace's name.
    netns: String,
    child: Option<Child>,
    /// A file system of its own is mounted where its data is.
    disk: bool,
}

/// Several store nodes and the network between them.
pub struct TestCluster {
    dir: tempfile::TempDir,
    tag: String,
    hosts: BTreeMap<u64, Host>,
    /// Shards of the cluster.
    shards: u32,
}

impl TestCluster {
    /// Hosts `1..=hosts`, of which the first runs a new cluster's first node.
    ///
    /// # Panics
    /// Where anything of it fails, as everywhere here.
    pub fn new(hosts: u64, shards: u32) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("tp-cluster-")
            .tempdir_in("/var/tmp")
            .expect("a directory");
        let n = CLUSTERS.fetch_add(1, Relaxed);
        let mut cluster = Self {
            dir,
            tag: format!("tp{}c{n}", std::process::id()),
            hosts: BTreeMap::new(),
            shards,
        };
        cluster.make_network(hosts);
        let shards = cluster.shards.to_string();
        let data = cluster.data(1);
        let args = ["init", "--zone", "z1", "--shards", &shards, "--data"];
        let mut args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        args.push(data.as_os_str());
        must(program("tidepool-store"), &args);
        cluster.start(1);
        cluster
    }

    fn switch(&self) -> String {
        format!("{}sw", self.tag)
    }

    fn make_network(&mut self, hosts: u64) {
        let switch = self.switch();
        must("ip", &["netns", "add", &switch]);
        must(
            "ip",
            &["-n", &switch, "link", "add", "br0", "type", "bridge"],
        );
        must("ip", &["-n", &switch, "link", "set", "br0", "up"]);
        for n in (1..=hosts).chain([CLIENT]) {
            let netns = format!("{}h{n}", self.tag);
            must("ip", &["netns", "add", &netns]);
            let host = Host {
                netns: netns.clone(),
                child: None,
                disk: false,
            };
            self.hosts.insert(n, host);
            let port = format!("p{n}");
            let veth = ["type", "veth", "peer", "name", "eth0", "netns", &netns];
            let mut add = vec!["-n", &switch, "link", "add", &port];
            add.extend(veth);
            must("ip", &add);
            must(
                "ip",
                &["-n", &switch, "link", "set", &port, "master", "br0", "up"],
            );
            let addr = format!("{}/24", ip(n));
            must("ip", &["-n", &netns, "addr", "add", &addr, "dev", "eth0"]);
            must("ip", &["-n", &netns, "link", "set", "eth0", "up"]);
            must("ip", &["-n", &netns, "link", "set", "lo", "up"]);
            self.nft(n, "add table inet tp");
            self.nft(
                n,
                "add chain inet tp in { type filter hook input priority 0; }",
            );
        }
    }

    fn nft(&self, n: u64, command: &str) {
        must(
            "ip",
            &["netns", "exec", &self.hosts[&n].netns, "nft", command],
        );
    }

    /// Where a node keeps its data.
    pub fn data(&self, n: u64) -> PathBuf {
        self.dir.path().join(format!("node{n}"))
    }

    fn log(&self, n: u64) -> PathBuf {
        self.dir.path().join(format!("node{n}.log"))
    }

    /// Gives a node a disk of its own, of this many MiB, before it has any data.
    pub fn give_disk(&mut self, n: u64, mib: u64) {
        let (image, data) = (self.dir.path().join(format!("disk{n}.img")), self.data(n));
        File::create(&image)
            .and_then(|f| f.set_len(mib << 20))
            .expect("a disk image");
        must(
            "mkfs.ext4",
            &["-q".as_ref(), "-F".as_ref(), image.as_os_str()],
        );
        std::fs::create_dir_all(&data).expect("a mount point");
        let options = ["-o".as_ref(), "loop".as_ref()];
        let mut args: Vec<&OsStr> = options.to_vec();
        args.extend([image.as_os_str(), data.as_os_str()]);
        must("mount", &args);
        let _ = std::fs::remove_dir(data.join("lost+found"));
        self.host(n).disk = true;
    }

    fn host(&mut self, n: u64) -> &mut Host {
        self.hosts.get_mut(&n).expect("there is such a host")
    }

    /// Makes host `n` a member, and runs it.
    pub fn join(&mut self, n: u64) {
        let through = self.running().next().expect("a node runs");
        let (data, store) = (self.data(through), addr(through).to_string());
        let netns = self.hosts[&through].netns.clone();
        let store_program = program("tidepool-store");
        let mut args: Vec<&OsStr> = ["netns", "exec", &netns].map(OsStr::new).to_vec();
        args.push(store_program.as_os_str());
        args.extend(["token", "--store", &store, "--data"].map(OsStr::new));
        args.push(data.as_os_str());
        let token = must("ip", &args);
        let zone = format!("z{n}");
        let rest = ["--token", token.trim(), "--zone", &zone];
        self.spawn(n, "join", &rest);
    }

    /// Runs a member again.
    pub fn start(&mut self, n: u64) {
        self.spawn(n, "run", &[]);
    }

    fn spawn(&mut self, n: u64, verb: &str, rest: &[&str]) {
        assert!(self.try_spawn(n, verb, rest), "node {n} did not start");
    }

    /// Whether it started.
    fn try_spawn(&mut self, n: u64, verb: &str, rest: &[&str]) -> bool {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log(n))
            .expect("a log file");
        let data = self.data(n);
        let host = self.host(n);
        assert!(host.child.is_none(), "node {n} runs already");
        let mut child = Command::new("ip")
            .args(["netns", "exec", &host.netns])
            .arg(program("tidepool-store"))
            .arg(verb)
            .arg("--data")
            .arg(data)
            .args(["--listen", &addr(n).to_string(), "--reserve-mib", "8"])
            .args(rest)
            .env("RUST_LOG", "info")
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("ip runs");
        let out = child.stdout.take().expect("piped");
        host.child = Some(child);
        let mut line = String::new();
        let read = BufReader::new(out).read_line(&mut line);
        read.is_ok() && line.starts_with("listening on ")
    }

    /// Runs a member that is expected not to start, and gives what it logged last.
    pub fn start_in_vain(&mut self, n: u64) -> String {
        assert!(!self.try_spawn(n, "run", &[]), "node {n} started");
        self.reap(n);
        tail(&self.log(n)).unwrap_or_default()
    }

    fn signal(&mut self, n: u64, signal: Signal) {
        let child = self.host(n).child.as_ref().expect("the node runs");
        kill_process(Pid::from_child(child), signal).expect("it can be signalled");
    }

    /// SIGKILL.
    pub fn kill(&mut self, n: u64) {
        let mut child = self.host(n).child.take().expect("the node runs");
        child.kill().expect("it can be killed");
        child.wait().expect("it ends");
    }

    /// SIGTERM; it has to end well.
    pub fn terminate(&mut self, n: u64) {
        self.signal(n, Signal::TERM);
        let mut child = self.host(n).child.take().expect("the node runs");
        let status = child.wait().expect("it ends");
        assert!(status.success(), "node {n} ended with {status}");
    }

    /// SIGSTOP: it holds its connections and says nothing.
    pub fn stop(&mut self, n: u64) {
        self.signal(n, Signal::STOP);
    }

    /// SIGCONT.
    pub fn go_on(&mut self, n: u64) {
        self.signal(n, Signal::CONT);
    }

    /// Whether a node's process has ended by itself.
    pub fn has_ended(&mut self, n: u64) -> bool {
        let child = self.host(n).child.as_mut().expect("the node was started");
        child.try_wait().expect("it can be looked at").is_some()
    }

    /// Forgets a process that ended by itself.
    pub fn reap(&mut self, n: u64) {
        if let Some(mut child) = self.host(n).child.take() {
            let _ = child.wait();
        }
    }

    /// Nodes whose processes were started and not ended.
    pub fn running(&self) -> impl Iterator<Item = u64> + '_ {
        let hosts = self.hosts.iter();
        hosts.filter(|(_, h)| h.child.is_some()).map(|(n, _)| *n)
    }

    /// What `from` sends does not reach `to` any more; the other way goes on.
    pub fn cut(&self, from: u64, to: u64) {
        self.nft(
            to,
            &format!("add rule inet tp in ip saddr {} drop", ip(from)),
        );
    }

    /// Nothing from or to the other nodes reaches `n`; clients do.
    pub fn isolate(&self, n: u64) {
        for other in self.hosts.keys().filter(|o| **o != n && **o != CLIENT) {
            self.cut(*other, n);
            self.cut(n, *other);
        }
    }

    /// So many of a hundred packets to `n` are lost.
    pub fn lose(&self, n: u64, percent: u32) {
        let rule = format!("add rule inet tp in numgen random mod 100 < {percent} drop");
        self.nft(n, &rule);
    }

    /// From now on the clients' host sends no more than so many kbit a second, from a queue of half a second.
    pub fn slow_client(&self, kbit: u32) {
        let (netns, rate) = (&self.hosts[&CLIENT].netns, format!("{kbit}kbit"));
        let mut args = vec!["-n", netns, "qdisc", "add", "dev", "eth0", "root", "tbf"];
        args.extend(["rate", &rate, "burst", "64kb", "latency", "500ms"]);
        must("tc", &args);
    }

    /// Every packet arrives again.
    pub fn heal(&self) {
        for n in self.hosts.keys() {
            self.nft(*n, "flush chain inet tp in");
        }
    }

    /// A runtime whose threads are on the client's host: what is spawned on it reaches the nodes.
    pub fn client_runtime(&self) -> Runtime {
        let path = Path::new("/run/netns").join(&self.hosts[&CLIENT].netns);
        let netns = File::open(&path).expect("the client's namespace");
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .on_thread_start(move || {
                move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("the client's namespace can be entered");
            })
            .enable_all()
            .build()
            .expect("a runtime")
    }

    /// A certificate of role `host` or `operator`.
    pub fn identity(&self, role: &str) -> ClientIdentity {
        let from = self.running().next().expect("a node runs");
        let out = self.dir.path().join(format!("client-{role}"));
        let data = self.data(from);
        let mut args: Vec<&OsStr> = ["issue-client", "--role", role, "--data"]
            .map(OsStr::new)
            .to_vec();
        args.extend([data.as_os_str(), "--out".as_ref(), out.as_os_str()]);
        must(program("tidepool-store"), &args);
        ClientIdentity::load(&out).expect("the certificate that was written")
    }

    /// How a client of this role reaches all hosts that were members once.
    pub fn client_config(&self, role: &str) -> ClientConfig {
        let with_data = |n: &u64| *n != CLIENT && self.data(*n).join("node.json").exists();
        let addrs = self.hosts.keys().copied().filter(with_data).map(addr);
        ClientConfig {
            deadline: Duration::from_secs(60),
            ..ClientConfig::new(addrs.collect(), self.identity(role))
        }
    }
}

fn ip(n: u64) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, n as u8)
}

/// Where node `n` serves.
pub fn addr(n: u64) -> SocketAddr {
    (ip(n), PORT).into()
}

/// Waits until the leader of every group counts exactly its target as members, and every member has applied (nearly) what is committed.
///
/// # Panics
/// Where that takes too long.
pub async fn settled(client: &Client, nodes: &[u64], groups: u32, replicas: usize) {
    let began = Instant::now();
    loop {
        let open = unsettled(client, nodes, groups, replicas).await;
        if open.is_empty() {
            return;
        }
        assert!(began.elapsed() < REST, "not at rest: {open:#?}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

async fn unsettled(client: &Client, nodes: &[u64], groups: u32, replicas: usize) -> Vec<String> {
    let mut open: Vec<String> = Vec::new();
    let mut led: BTreeMap<u32, (Vec<u64>, u64)> = BTreeMap::new();
    let mut applied: BTreeMap<(u64, u32), (u64, bool)> = BTreeMap::new();
    for node in nodes {
        let ask = request::Op::Topology(TopologyRequest {});
        let t = match client.call_node(*node, ask).await {
            Ok(response::Op::Topology(t)) => t,
            other => {
                open.push(format!("node {node}: {other:?}"));
                continue;
            }
        };
        for mut g in t.groups {
            if !g.here {
                continue;
            }
            applied.insert((*node, g.group), (g.applied, g.changing));
            if g.leader == t.node {
                g.voters.sort_unstable();
                g.targets.sort_unstable();
                let meta = g.group == 0;
                let done = g.voters == g.targets
                    && !g.changing
                    && (meta || g.voters.len() == replicas && g.learners.is_empty());
                if !done {
                    open.push(format!("{g:?}"));
                }
                led.insert(g.group, (g.voters, g.committed));
            }
        }
    }
    for group in 0..=groups {
        match led.get(&group) {
            None => open.push(format!("group {group} has no leader")),
            Some((voters, committed)) => {
                for node in voters {
                    let at = applied.get(&(*node, group)).copied();
                    if at.is_none_or(|(at, changing)| changing || at + BEHIND < *committed) {
                        open.push(format!(
                            "group {group} on node {node} has applied {at:?} of {committed}"
                        ));
                    }
                }
            }
        }
    }
    open
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        for (n, host) in &mut self.hosts {
            if let Some(mut child) = host.child.take() {
                let _ = kill_process(Pid::from_child(&child), Signal::KILL);
                let _ = child.wait();
            }
            if host.disk {
                let data = self.dir.path().join(format!("node{n}"));
                let _ = Command::new("umount").arg(data).output();
            }
        }
        let names: Vec<String> = self.hosts.values().map(|h| h.netns.clone()).collect();
        for name in names.into_iter().chain([self.switch()]) {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
        if std::thread::panicking() {
            for n in self.hosts.keys() {
                if let Some(tail) = tail(&self.log(*n)) {
                    eprintln!("--- node {n} logged last:\n{tail}");
                }
            }
        }
    }
}

/// The end of a file.
fn tail(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(3000))).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}
