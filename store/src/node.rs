//! A node's life: opened, running, stopped.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use quinn::{Endpoint, TokioRuntime};
use tidepool_proto::wire::PEER_ALPN;
use tidepool_store_client::{Client, ClientConfig, ClientIdentity, transport};
use tidepool_store_core::ShardMap;
use tidepool_store_raft::{Core, CoreConfig, bootstrap};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::bodies::{BodyWriter, Damaged, MAX_DAMAGED};
use crate::config::{Identity, NodeConfig};
use crate::db::Db;
use crate::disk::{self, NodeDisk};
use crate::driver::{Driver, Handle};
use crate::error::StoreError;
use crate::gc::Collector;
use crate::holds::Holds;
use crate::member::{self, Member};
use crate::peers::{Arrivals, OtherCopies, PeerInbox, PeerNet, Peers};
use crate::pki::{self, Pki};
use crate::requests::Shared;
use crate::roles::Role;
use crate::scrub::{PeerBodies, Scrubber};
use crate::segments::{SegmentOptions, Segments};
use crate::space::Space;
use crate::stats::{Counters, NodeStats};
use crate::{cluster, gc, join, logs, orphans, scrub, server, sessions};

/// How long a node waits at start until its groups answer.
const START: Duration = Duration::from_secs(30);

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Ends of sessions that are told to other nodes at once.
const ENDS: usize = 16;

/// A running node.
pub struct Node {
    shared: Arc<Shared>,
    driver: Handle,
    threads: Vec<JoinHandle<()>>,
    tasks: JoinSet<()>,
    endpoint: Endpoint,
    local: SocketAddr,
    pki: Pki,
    identity: ClientIdentity,
    failed: watch::Receiver<Option<String>>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("local", &self.local).finish()
    }
}

impl Node {
    /// Makes or opens the data directory, and serves. A node that is its whole cluster returns when every group answers, another one at
    /// once. Needs a tokio runtime with more than one thread or blocking threads, which runs the node's tasks until [`Node::shutdown`].
    pub async fn start(cfg: NodeConfig) -> Result<Node, StoreError> {
        Self::start_boxed(cfg, None).await
    }

    /// The same with other copies of bodies than those of the cluster's nodes, from which damaged ones are mended.
    pub async fn start_with(
        cfg: NodeConfig,
        copies: Arc<dyn PeerBodies>,
    ) -> Result<Node, StoreError> {
        Self::start_boxed(cfg, Some(copies)).await
    }

    /// Not generic, and a pointer: so all of a node is compiled in this crate and not again in every one that starts one.
    #[inline(never)]
    fn start_boxed(
        cfg: NodeConfig,
        copies: Option<Arc<dyn PeerBodies>>,
    ) -> Boxed<Result<Node, StoreError>> {
        Box::pin(Self::start_inner(cfg, copies))
    }

    async fn start_inner(
        cfg: NodeConfig,
        copies: Option<Arc<dyn PeerBodies>>,
    ) -> Result<Node, StoreError> {
        let opening = cfg.clone();
        let opened = tokio::task::spawn_blocking(move || open(&opening))
            .await
            .map_err(|e| StoreError::Stopped(e.to_string()))??;
        let Opened {
            identity: me,
            map,
            pki,
            db,
            seeds,
        } = opened;
        let bodies_dir = cfg.data_dir.join("bodies");
        let bodies_db = db.clone();
        let bodies = tokio::task::spawn_blocking(move || {
            Segments::open(bodies_db, &bodies_dir, SegmentOptions::default())
        })
        .await
        .map_err(|e| StoreError::Stopped(e.to_string()))??;
        let bodies = Arc::new(bodies);
        let counters = Arc::new(Counters::default());
        let damaged = Arc::new(Damaged::default());
        let holds = Holds::default();
        let storage = NodeDisk {
            db: db.clone(),
            map,
            bodies: bodies.clone(),
            damaged: damaged.clone(),
            holds: holds.clone(),
        };
        let core_cfg = CoreConfig {
            node: me.node,
            run: rand::random(),
            election_ticks: None,
        };
        let core = Core::open(core_cfg, storage, server::raft_logger())?;
        let alone = core.is_alone();
        let (failed_tx, failed) = watch::channel(None);
        let thread = |e| StoreError::io("thread", e);
        let (driver, inputs) = Handle::new();
        let (writer, writer_thread) =
            BodyWriter::start(bodies.clone(), damaged.clone(), driver.clone()).map_err(thread)?;
        let (endpoint, local) = listen(&cfg, &pki)?;
        let arrivals = Arc::new(Arrivals::default());
        let inbox = Arc::new(PeerInbox {
            db: db.clone(),
            map,
            bodies: bodies.clone(),
            driver: driver.clone(),
            counters: counters.clone(),
            writer: writer.clone(),
            damaged: damaged.clone(),
            arrivals: arrivals.clone(),
        });
        let peers = Peers::new(me.node, endpoint.clone(), peer_tls(&pki)?, inbox);
        let net = PeerNet::new(
            peers.clone(),
            writer.clone(),
            damaged.clone(),
            driver.clone(),
            arrivals,
            bodies.clone(),
            counters.clone(),
        );
        let space = Arc::new(Space::new(&cfg.data_dir, cfg.reserve_bytes));
        let driver_thread = Driver::start(
            core,
            net,
            inputs,
            counters.clone(),
            space.clone(),
            failed_tx,
        )
        .map_err(thread)?;
        let copies = copies.unwrap_or_else(|| {
            Arc::new(OtherCopies {
                peers: peers.clone(),
                map,
                driver: driver.clone(),
            })
        });
        let shared = Arc::new(Shared {
            db,
            map,
            cluster: me.cluster.clone(),
            node: me.node,
            client: own_client(local, &seeds, &pki)?,
            seeds,
            pki: pki.clone(),
            peers,
            driver: driver.clone(),
            bodies,
            writer,
            damaged,
            space,
            holds,
            collector: Collector::default(),
            scrubber: Scrubber::new(copies),
            ends: Arc::new(Semaphore::new(ENDS)),
            counters,
        });
        // What is known to be damaged counts as missing.
        for (name, why) in shared
            .bodies
            .quarantined(MAX_DAMAGED)
            .map_err(|e| StoreError::Damaged(e.to_string()))?
        {
            tracing::error!(chunk = %name, why, "in quarantine: damaged, and no good copy was found");
            shared.damaged.add(name);
        }
        let member = Member {
            addr: cfg.advertise.unwrap_or(local),
            zone: if cfg.zone.is_empty() {
                me.zone.clone()
            } else {
                cfg.zone.clone()
            },
            first: me.is_first(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(server::run(endpoint.clone(), shared.clone()));
        tasks.spawn(sessions::expire(shared.clone()));
        tasks.spawn(gc::serve(shared.clone()));
        tasks.spawn(scrub::serve(shared.clone()));
        tasks.spawn(member::run(shared.clone(), member));
        tasks.spawn(orphans::clear(shared.clone()));
        let identity = pki.issue(Role::Host, pki::CLIENT)?;
        let node = Node {
            shared,
            driver,
            threads: vec![driver_thread, writer_thread],
            tasks,
            endpoint,
            local,
            pki,
            identity,
            failed,
        };
        for group in map.groups().filter(|_| alone) {
            let answer = tokio::time::timeout(START, node.leads(group)).await;
            match answer {
                Ok(Ok(())) => {}
                Ok(Err(e)) => {
                    node.end().await;
                    return Err(e);
                }
                Err(_) => {
                    node.end().await;
                    return Err(StoreError::Stopped(format!("group {group} has no leader")));
                }
            }
        }
        tracing::info!(node = me.node, addr = %node.local, "store node is ready");
        Ok(node)
    }

    async fn leads(&self, group: u32) -> Result<(), StoreError> {
        loop {
            if self.driver.read(group).await.is_ok() {
                return Ok(());
            }
            if let Some(why) = self.failed.borrow().clone() {
                return Err(StoreError::Stopped(why));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Makes the data directory ready without running: certificates, database, groups. Does nothing where that was done.
    pub fn init(cfg: &NodeConfig) -> Result<(), StoreError> {
        let opened = open(cfg)?;
        opened
            .db
            .flush_all()
            .map_err(|e| StoreError::Stopped(e.to_string()))
    }

    /// Makes the data directory that of a new member of the cluster that gave `token`, to be started then. Gives the node's number; on a
    /// directory that is a member's already, only that.
    pub async fn join(cfg: &NodeConfig, token: &str) -> Result<u64, StoreError> {
        let addr = cfg.advertise.unwrap_or(cfg.listen);
        join::become_member(&cfg.data_dir, token, addr, &cfg.zone).await
    }

    /// Signs a client's certificate with the authority in a data directory, running or not.
    pub fn issue_client(
        data_dir: &Path,
        role: Role,
        valid: Duration,
    ) -> Result<ClientIdentity, StoreError> {
        make_dir(data_dir)?;
        let node = Identity::node_of(data_dir)?;
        Pki::open(data_dir, node)?.issue(role, valid)
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// A host's identity, valid for this cluster; the same at every call.
    pub fn client_identity(&self) -> ClientIdentity {
        self.identity.clone()
    }

    /// Signs a new client certificate.
    pub fn issue(&self, role: Role, valid: Duration) -> Result<ClientIdentity, StoreError> {
        self.pki.issue(role, valid)
    }

    /// What the node counts.
    pub fn stats(&self) -> NodeStats {
        self.shared.stats()
    }

    /// Waits until the node stops by itself because a write failed, and says why.
    pub async fn failed(&self) -> StoreError {
        let mut failed = self.failed.clone();
        let why = match failed.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => "the driver died".to_owned(),
        };
        StoreError::Stopped(why)
    }

    /// Stops: refuses new requests, ends the connections, writes everything to disk, closes the database.
    pub async fn shutdown(self) {
        self.shutdown_boxed().await;
    }

    #[inline(never)]
    fn shutdown_boxed(self) -> Boxed<()> {
        Box::pin(self.end())
    }

    async fn end(mut self) {
        self.endpoint.close(1u32.into(), b"stopping");
        self.shared.peers.close();
        self.tasks.shutdown().await;
        self.driver.stop();
        let Node {
            shared,
            driver,
            threads,
            endpoint,
            ..
        } = self;
        let _ = tokio::time::timeout(Duration::from_secs(2), endpoint.wait_idle()).await;
        // The threads end when nothing can reach them any more.
        drop((shared, driver));
        let _ = tokio::task::spawn_blocking(move || {
            for thread in threads {
                let _ = thread.join();
            }
        })
        .await;
    }
}

pub(crate) fn make_dir(data: &Path) -> Result<(), StoreError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(data)
        .map_err(|e| StoreError::io(data, e))
}

/// What is in a data directory.
struct Opened {
    identity: Identity,
    map: ShardMap,
    pki: Pki,
    db: Db,
    seeds: Vec<tidepool_proto::cluster::Node>,
}

fn open(cfg: &NodeConfig) -> Result<Opened, StoreError> {
    let data = &cfg.data_dir;
    make_dir(data)?;
    // The database is opened first: its lock keeps a second process out.
    let db = Db::open(&data.join("db"))?;
    let (identity, map) = Identity::open(data, cfg.shards, &cfg.zone)?;
    let pki = Pki::open(data, identity.node)?;
    make_groups(&db, &identity, map)?;
    Ok(Opened {
        identity,
        map,
        pki,
        db,
        seeds: cluster::load_seeds(data)?,
    })
}

/// How this node connects to others.
fn peer_tls(pki: &Pki) -> Result<quinn::ClientConfig, StoreError> {
    let mut tls = tidepool_store_client::tls_config(&pki.node_identity(), PEER_ALPN)
        .map_err(StoreError::Pki)?;
    tls.transport_config(transport::peer());
    Ok(tls)
}

/// This node as a client, of itself first: it learns the others from itself.
fn own_client(
    local: SocketAddr,
    seeds: &[tidepool_proto::cluster::Node],
    pki: &Pki,
) -> Result<Client, StoreError> {
    let mut own = local;
    if own.ip().is_unspecified() {
        own.set_ip(match own {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let mut addrs = vec![own];
    addrs.extend(
        seeds
            .iter()
            .filter_map(|n| n.addr.parse::<SocketAddr>().ok()),
    );
    Client::new(ClientConfig::new(addrs, pki.node_identity()))
        .map_err(|e| StoreError::Network(e.to_string()))
}

/// Makes the groups of a new cluster, all at once, together with the cluster's id, which must be the directory's.
fn make_groups(db: &Db, identity: &Identity, map: ShardMap) -> Result<(), StoreError> {
    const CLUSTER: &[u8] = b"\xff\xff\xff\xffcluster";
    let damaged = |e: crate::db::DbError| StoreError::Damaged(e.to_string());
    if let Some(cluster) = db.raft(CLUSTER).map_err(damaged)? {
        if cluster != identity.cluster.as_bytes() {
            return Err(StoreError::Damaged(format!(
                "the database in {} is another cluster's",
                db.path().display()
            )));
        }
        return cut_beginnings(db, map);
    }
    let groups = map.groups().filter(|_| identity.is_first());
    let ops: Vec<_> = groups
        .flat_map(|group| bootstrap(group, &[identity.node]))
        .collect();
    let mut batch = disk::batch(db, &ops).map_err(damaged)?;
    batch.put_raft(CLUSTER, identity.cluster.as_bytes());
    db.commit(batch, true)
        .map_err(|e| StoreError::Stopped(e.to_string()))
}

/// See [`logs::cut_beginning`].
fn cut_beginnings(db: &Db, map: ShardMap) -> Result<(), StoreError> {
    let damaged = |e: crate::db::DbError| StoreError::Damaged(e.to_string());
    let mut ops = Vec::new();
    for group in map.groups() {
        ops.extend(logs::cut_beginning(db, group).map_err(damaged)?);
    }
    if ops.is_empty() {
        return Ok(());
    }
    let batch = disk::batch(db, &ops).map_err(damaged)?;
    db.commit(batch, true)
        .map_err(|e| StoreError::Stopped(e.to_string()))
}

fn listen(cfg: &NodeConfig, pki: &Pki) -> Result<(Endpoint, SocketAddr), StoreError> {
    let network = |e: std::io::Error| StoreError::Network(format!("{}: {e}", cfg.listen));
    let socket = transport::socket(cfg.listen).map_err(network)?;
    let loopback = cfg.listen.ip().is_loopback();
    let endpoint = Endpoint::new(
        transport::node_endpoint(pki.reset_key()),
        Some(pki.server(loopback)?),
        socket,
        Arc::new(TokioRuntime),
    )
    .map_err(network)?;
    let local = endpoint.local_addr().map_err(network)?;
    Ok((endpoint, local))
}
