//! A store cluster of real `tidepool-store` processes on loopback, made as an operator makes one: init, run, token, join.

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tidepool_store_client::{Client, ClientConfig, ClientIdentity};

use crate::process::Process;

/// How long a cluster may take until every group has all its voters and a leader.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long leaders may take to spread; a cluster that leaves them where they are is measured as it is.
const SPREAD: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(200);

pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Process>,
    addrs: Vec<SocketAddr>,
    identity: ClientIdentity,
    /// Groups that each node led when measuring began.
    pub(crate) leads: Vec<usize>,
}

/// Whether leaders are as even as the store spreads them.
fn is_even(leads: &[usize]) -> bool {
    let most = leads.iter().max().copied().unwrap_or(0);
    leads.iter().all(|n| most - n <= 2)
}

/// A UDP port that was free just now.
fn free() -> Result<SocketAddr> {
    Ok(UdpSocket::bind("127.0.0.1:0")?.local_addr()?)
}

/// The binary beside this one.
fn store() -> Result<Command> {
    let path = std::env::current_exe()?.with_file_name("tidepool-store");
    ensure!(path.exists(), "{} is not built", path.display());
    Ok(Command::new(path))
}

fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{command:?} failed: {said}");
    Ok(String::from_utf8(out.stdout)?.trim().to_owned())
}

fn serve(mut command: Command, log: &Path) -> Result<Process> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(log)?)
        .env("RUST_LOG", "warn");
    Process::start(&mut command)
}

impl Cluster {
    /// Starts `count` nodes below `dir` and waits until all keep everything.
    pub(crate) async fn start(dir: &Path, count: usize) -> Result<Self> {
        let data = |i: usize| dir.join(format!("node-{i}"));
        let log = |i: usize| dir.join(format!("node-{i}.log"));
        output(store()?.arg("init").arg("--data").arg(data(0)))?;
        let mut addrs = vec![free()?];
        let mut first = store()?;
        first.arg("run").arg("--data").arg(data(0));
        first.args(["--listen", &addrs[0].to_string()]);
        let mut nodes = vec![serve(first, &log(0))?];
        let issue = |role: &str, out: &Path| -> Result<ClientIdentity> {
            let mut command = store()?;
            command.arg("issue-client").arg("--data").arg(data(0));
            output(command.args(["--role", role]).arg("--out").arg(out))?;
            Ok(ClientIdentity::load(out)?)
        };
        let identity = issue("host", &dir.join("host"))?;
        let operator = issue("operator", &dir.join("operator"))?;
        let reach = |addrs: &[SocketAddr], who: &ClientIdentity| {
            Client::connect(ClientConfig::new(addrs.to_vec(), who.clone()))
        };
        let client = reach(&addrs, &operator).await?;
        for i in 1..count {
            let token = client.issue_token(Duration::from_secs(600), 1).await?;
            let addr = free()?;
            let mut member = store()?;
            member.arg("join").arg("--data").arg(data(i));
            member.args(["--token", &token, "--listen", &addr.to_string()]);
            nodes.push(serve(member, &log(i))?);
            addrs.push(addr);
        }
        let mut cluster = Self {
            nodes,
            addrs,
            identity,
            leads: Vec::new(),
        };
        cluster
            .settle(&client, &(0..count).map(log).collect::<Vec<_>>())
            .await?;
        Ok(cluster)
    }

    async fn settle(&mut self, operator: &Client, logs: &[PathBuf]) -> Result<()> {
        let begun = Instant::now();
        let mut whole_since: Option<Instant> = None;
        loop {
            for (node, log) in self.nodes.iter_mut().zip(logs) {
                if !node.runs() {
                    let text = std::fs::read_to_string(log).unwrap_or_default();
                    bail!("a node ended: {}", text.trim());
                }
            }
            let (whole, leads) = self.look(operator).await?;
            self.leads = leads;
            if whole {
                let since = *whole_since.get_or_insert_with(Instant::now);
                if is_even(&self.leads) || since.elapsed() > SPREAD {
                    return Ok(());
                }
            }
            ensure!(
                begun.elapsed() < PATIENCE,
                "not every group has {} voters and a leader after {PATIENCE:?}",
                self.nodes.len()
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether every node answers and keeps every group, and how many groups each leads.
    async fn look(&self, operator: &Client) -> Result<(bool, Vec<usize>)> {
        let list = operator.nodes().await?;
        let mut whole = list.len() == self.nodes.len();
        let mut leads = vec![0; self.nodes.len()];
        for (node, led) in list.iter().zip(&mut leads) {
            let Ok((status, topology)) = &node.answer else {
                return Ok((false, leads));
            };
            let all = topology
                .groups
                .iter()
                .all(|g| g.here && g.leader != 0 && g.voters.len() == self.nodes.len());
            whole &= status.ready && all && topology.groups.len() > status.shards as usize;
            *led = topology
                .groups
                .iter()
                .filter(|g| g.leader == node.id)
                .count();
        }
        Ok((whole, leads))
    }

    /// A client with a connection of its own.
    pub(crate) async fn client(&self) -> Result<Client> {
        let cfg = ClientConfig::new(self.addrs.clone(), self.identity.clone());
        Client::connect(cfg)
            .await
            .context("connecting to the store")
    }
}
