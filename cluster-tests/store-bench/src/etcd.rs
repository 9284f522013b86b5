//! etcd, as Debian has it, and a client of its gRPC interface: unary calls over HTTP/2 without TLS.
//!
//! Only what a measurement needs, but natively: the messages are hand-written after etcd's `rpc.proto`, values are sent without any detour through text.
//! All clients talk to the leader, which spares etcd the forwarding that a client of a follower would cost.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use prost::Message;
use tokio::net::TcpStream;

use crate::process::Process;

const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(200);
/// Room for everything that a run writes; etcd's own default is 2 GiB.
const QUOTA: &str = "8589934592";

pub(crate) struct Etcd {
    pub(crate) nodes: Vec<Process>,
    leader: SocketAddr,
}

fn free() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

impl Etcd {
    /// Starts `count` members below `dir` and waits for their leader.
    pub(crate) async fn start(binary: &Path, dir: &Path, count: usize) -> Result<Self> {
        let mut members = Vec::new();
        for i in 0..count {
            members.push((format!("etcd-{i}"), free()?, free()?));
        }
        let all: Vec<String> = members
            .iter()
            .map(|(name, peer, _)| format!("{name}=http://{peer}"))
            .collect();
        let mut nodes = Vec::new();
        for (name, peer, client) in &members {
            let (peer, client) = (format!("http://{peer}"), format!("http://{client}"));
            let log = dir.join(format!("{name}.log"));
            let mut command = Command::new(binary);
            command
                .args(["--name", name, "--data-dir"])
                .arg(dir.join(name))
                .args(["--listen-peer-urls", &peer])
                .args(["--initial-advertise-peer-urls", &peer])
                .args(["--listen-client-urls", &client])
                .args(["--advertise-client-urls", &client])
                .args(["--initial-cluster", &all.join(",")])
                .args(["--quota-backend-bytes", QUOTA])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(&log)?)
                // Debian's start script sets such variables; none of them is meant here.
                .env_clear()
                // Without it the binary is looked for in the system's directories only.
                .envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
            nodes.push(Process::start(&mut command)?);
        }
        let addrs: Vec<SocketAddr> = members.iter().map(|m| m.2).collect();
        let logs: Vec<PathBuf> = members
            .iter()
            .map(|m| dir.join(format!("{}.log", m.0)))
            .collect();
        let leader = find_leader(&mut nodes, &addrs, &logs).await?;
        Ok(Self { nodes, leader })
    }

    pub(crate) async fn client(&self) -> Result<Kv> {
        Kv::connect(self.leader).await
    }
}

async fn find_leader(
    nodes: &mut [Process],
    addrs: &[SocketAddr],
    logs: &[PathBuf],
) -> Result<SocketAddr> {
    let begun = Instant::now();
    loop {
        for (node, log) in nodes.iter_mut().zip(logs) {
            if !node.runs() {
                let text = std::fs::read_to_string(log).unwrap_or_default();
                bail!("etcd ended: {}", text.lines().last().unwrap_or_default());
            }
        }
        let mut answered = 0;
        let mut leader = None;
        for addr in addrs {
            let status = async { Kv::connect(*addr).await?.status().await };
            if let Ok((member, leads)) = status.await {
                answered += 1;
                if leads == member {
                    leader = Some(*addr);
                }
            }
        }
        if answered == addrs.len()
            && let Some(leader) = leader
        {
            return Ok(leader);
        }
        ensure!(
            begun.elapsed() < PATIENCE,
            "etcd has no leader after {PATIENCE:?}"
        );
        tokio::time::sleep(LOOK).await;
    }
}

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct ResponseHeader {
    #[prost(uint64, tag = "2")]
    member_id: u64,
    #[prost(int64, tag = "3")]
    revision: i64,
}

#[derive(Clone, PartialEq, Message)]
struct PutResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
}

#[derive(Clone, PartialEq, Message)]
struct StatusRequest {}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

/// One connection.
pub(crate) struct Kv {
    addr: SocketAddr,
    requests: SendRequest<Bytes>,
}

impl Kv {
    async fn connect(addr: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        let (requests, connection) = h2::client::handshake(stream).await?;
        // Ends when the last sender of requests is gone.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(Self { addr, requests })
    }

    /// The id of the member that answers, and its leader's.
    async fn status(&self) -> Result<(u64, u64)> {
        let path = "/etcdserverpb.Maintenance/Status";
        let answer: StatusResponse = self.call(path, &StatusRequest {}).await?;
        let header = answer.header.context("a status without a header")?;
        Ok((header.member_id, answer.leader))
    }

    pub(crate) async fn put(&self, key: Bytes, value: Bytes) -> Result<()> {
        let path = "/etcdserverpb.KV/Put";
        let answer: PutResponse = self.call(path, &PutRequest { key, value }).await?;
        let revision = answer.header.map_or(0, |h| h.revision);
        ensure!(revision > 0, "etcd put at no revision");
        Ok(())
    }

    async fn call<T: Message + Default>(&self, path: &str, message: &impl Message) -> Result<T> {
        let request = http::Request::post(format!("http://{}{path}", self.addr))
            .version(http::Version::HTTP_2)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let len = message.encoded_len();
        let mut frame = BytesMut::with_capacity(5 + len);
        // Not compressed.
        frame.put_u8(0);
        frame.put_u32(u32::try_from(len)?);
        message.encode(&mut frame)?;

        let mut requests = self.requests.clone().ready().await?;
        let (response, mut stream) = requests.send_request(request, false)?;
        let mut rest = frame.freeze();
        while !rest.is_empty() {
            stream.reserve_capacity(rest.len());
            let room = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
            let room = room.context("the stream was closed")??.min(rest.len());
            let part = rest.split_to(room);
            stream.send_data(part, rest.is_empty())?;
        }
        let response = response.await?;
        let status = response.status();
        ensure!(status.is_success(), "etcd answers {status}");
        // An answer without a body has its status here.
        granted(response.headers())?;
        let mut body = response.into_body();
        let mut got = BytesMut::new();
        while let Some(data) = body.data().await {
            let data = data?;
            got.extend_from_slice(&data);
            body.flow_control().release_capacity(data.len())?;
        }
        let trailers = body.trailers().await?.context("an answer without an end")?;
        ensure!(
            trailers.contains_key("grpc-status"),
            "an answer without a status"
        );
        granted(&trailers)?;
        ensure!(
            got.len() >= 5 && got[0] == 0,
            "an answer that is no message"
        );
        got.advance(5);
        Ok(T::decode(got)?)
    }
}

fn granted(headers: &http::HeaderMap) -> Result<()> {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    match text("grpc-status") {
        None | Some("0") => Ok(()),
        Some(code) => bail!(
            "etcd refuses, code {code}: {}",
            text("grpc-message").unwrap_or("")
        ),
    }
}
