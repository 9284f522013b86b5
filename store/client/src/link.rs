//! Requests sent until they are answered or their time is over: to the leader of their group, as far as it is known, to whom a
//! node names instead, and where nobody answers to the next one.
//!
//! Sending again is always safe: every request is idempotent. Errors that will not go away (a refused certificate, a wrong
//! request, a full disk) end the call at once.
//!
//! A node of several is given up when nothing is heard from it ([`crate::silence`]), and then asked last for a while ([`crate::suspects`]); the
//! others are asked who leads, again and again at short intervals, since an election is over within a few seconds.
//!
//! A store of one node is the case where there is nobody else: then nothing is given up but by the connection's own time-out.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use tidepool_proto::ErrorKind;
use tidepool_proto::wire::{self, Request, request, response};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::Boxed;
use crate::ClientConfig;
use crate::error::ClientError;
use crate::pool::{Attempt, Patience, Pool};
use crate::route::{self, Route};
use crate::suspects::Suspects;
use crate::topology::Map;

const MAX_IN_FLIGHT: usize = 48;
const FIRST_WAIT: Duration = Duration::from_millis(10);
/// The longest pause between two attempts of a call that has not lasted for [`ELECTION`] yet, and of one that has.
const SHORT_WAIT: Duration = Duration::from_millis(200);
const LONG_WAIT: Duration = Duration::from_secs(1);
const ELECTION: Duration = Duration::from_secs(6);
/// Redirections that are followed at once; after them a call waits as after a failure.
const REDIRECTS: u32 = 4;
/// How long an answer to the question for the map may take.
const ASK: Duration = Duration::from_secs(3);
/// Nodes whose round trips differ by less are equally near.
const NEAR: Duration = Duration::from_millis(2);
/// A map this young is not asked for again.
const MAP_AGE: Duration = Duration::from_millis(250);

pub(crate) struct Link {
    pool: Pool,
    pub(crate) cfg: ClientConfig,
    map: RwLock<Option<Arc<Map>>>,
    /// When the map was last asked for; one caller asks at a time.
    asked: Mutex<Option<Instant>>,
    /// The address that answered last among those that any request may go to.
    sticky: std::sync::atomic::AtomicUsize,
    suspects: Suspects,
    in_flight: Semaphore,
}

/// What a call has tried so far.
struct Tries {
    attempts: u32,
    redirects: u32,
    /// Addresses that did not help since all were tried last.
    tried: HashSet<SocketAddr>,
}

impl Link {
    pub(crate) fn new(cfg: ClientConfig) -> Result<Self, ClientError> {
        Ok(Self {
            pool: Pool::new(&cfg)?,
            cfg,
            map: RwLock::default(),
            asked: Mutex::default(),
            sticky: Default::default(),
            suspects: Default::default(),
            in_flight: Semaphore::new(MAX_IN_FLIGHT),
        })
    }

    pub(crate) fn addrs(&self) -> &[SocketAddr] {
        &self.cfg.addrs
    }

    pub(crate) fn map(&self) -> Option<Arc<Map>> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.clone()
    }

    /// Changes the map; false also where there is none.
    fn change_map(&self, f: impl FnOnce(&mut Map) -> bool) -> bool {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.as_mut().is_some_and(|m| f(Arc::make_mut(m)))
    }

    /// Sends a request where it belongs until it is answered.
    #[inline(never)]
    pub(crate) fn call(&self, op: request::Op) -> Boxed<'_, Result<response::Op, ClientError>> {
        Box::pin(async move {
            match op {
                request::Op::Pin(_) | request::Op::Put(_) => self.call_split(op).await,
                op => {
                    let route = self.map().map_or(Route::Any, |m| route::of(&op, m.shards));
                    self.send(op, route, self.deadline()).await
                }
            }
        })
    }

    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.cfg.deadline
    }

    /// Sends a request along a route until it is answered or `deadline`.
    #[inline(never)]
    pub(crate) fn send(
        &self,
        op: request::Op,
        route: Route,
        deadline: Instant,
    ) -> Boxed<'_, Result<response::Op, ClientError>> {
        Box::pin(async move {
            self.send_or_moved(op, route, deadline, false)
                .await
                .map(|done| done.unwrap_or_else(response::Op::NotLeader))
        })
    }

    /// The same. With `once` a node's word that it does not lead a group is given back (and noted), so that a request for several groups
    /// can be split anew.
    pub(crate) async fn send_or_moved(
        &self,
        op: request::Op,
        route: Route,
        deadline: Instant,
        once: bool,
    ) -> Result<Result<response::Op, response::NotLeader>, ClientError> {
        let frame = wire::frame(&Request::from(op))?;
        let mut last = ClientError::new(ErrorKind::Unavailable, "the store did not answer in time");
        let (mut wait, began) = (FIRST_WAIT, Instant::now());
        let mut tries = Tries {
            attempts: 0,
            redirects: 0,
            tried: HashSet::new(),
        };
        loop {
            let addr = self.choose(route, &mut tries);
            tries.attempts += 1;
            match timeout_at(deadline, self.attempt(addr, &frame)).await {
                Ok(Ok(response::Op::NotLeader(moved))) => {
                    last = ClientError::new(
                        ErrorKind::Unavailable,
                        format!("group {} has no leader that answers", moved.group),
                    );
                    tracing::debug!(%addr, group = moved.group, leader = moved.leader, "a node does not lead a group");
                    let note = |m: &mut Map| m.set_leader(moved.group, moved.leader);
                    if !self.change_map(note) {
                        self.refresh(deadline).await;
                        self.change_map(note);
                    }
                    if once {
                        return Ok(Err(moved));
                    }
                    let leader = self.map().and_then(|m| m.addr(moved.leader));
                    // One that died is named until the others notice.
                    let gone = leader.is_none_or(|a| self.suspects.has(a, Instant::now()));
                    if gone {
                        tries.tried.insert(addr);
                    } else {
                        tries.redirects += 1;
                        if tries.redirects <= REDIRECTS {
                            continue;
                        }
                        tries.redirects = 0;
                    }
                }
                Ok(Ok(op)) => return Ok(Ok(op)),
                Ok(Err(Attempt::Over(e))) => return Err(e.sent(tries.attempts)),
                Ok(Err(Attempt::Again(e))) => last = e,
                Ok(Err(Attempt::Lost(e))) => {
                    last = e;
                    self.lost(addr);
                    tries.tried.insert(addr);
                    self.refresh(deadline).await;
                }
                Err(_) => return Err(last),
            }
            tracing::debug!(%addr, error = %last, attempts = tries.attempts, "store request failed, trying again");
            if timeout_at(deadline, tokio::time::sleep(wait))
                .await
                .is_err()
            {
                return Err(last);
            }
            let longest = if began.elapsed() < ELECTION {
                SHORT_WAIT
            } else {
                LONG_WAIT
            };
            wait = (wait * 2).min(longest);
        }
    }

    /// Sends a request to one node, once.
    #[inline(never)]
    pub(crate) fn once(
        &self,
        node: u64,
        op: request::Op,
    ) -> Boxed<'_, Result<response::Op, ClientError>> {
        Box::pin(self.send_once(node, op))
    }

    async fn send_once(&self, node: u64, op: request::Op) -> Result<response::Op, ClientError> {
        let gone = || ClientError::new(ErrorKind::Unavailable, format!("there is no node {node}"));
        let where_is = || self.map().and_then(|m| m.addr(node));
        let frame = wire::frame(&Request::from(op))?;
        let mut addr = match where_is() {
            Some(addr) => addr,
            None => {
                self.refresh(self.deadline()).await;
                where_is().ok_or_else(gone)?
            }
        };
        loop {
            let e = match self.attempt(addr, &frame).await {
                Ok(op) => return Ok(op),
                Err(Attempt::Lost(e)) => e,
                Err(Attempt::Over(e) | Attempt::Again(e)) => return Err(e),
            };
            self.lost(addr);
            self.refresh(self.deadline()).await;
            // It may have come back somewhere else.
            match where_is() {
                Some(now) if now != addr => addr = now,
                _ => return Err(e),
            }
        }
    }

    /// Who to read a group's chunks from, the best first: not lately lost, of the same zone, near; equals by turns.
    pub(crate) fn readers(&self, map: &Map, group: u32) -> Vec<u64> {
        let now = Instant::now();
        let lost = |n: &u64| map.addr(*n).is_some_and(|a| self.suspects.has(a, now));
        let far = |n: &u64| {
            let rtt = map.addr(*n).and_then(|a| self.pool.rtt(a));
            rtt.map_or(0, |rtt| rtt.as_micros() / NEAR.as_micros())
        };
        let other = |n: &u64| self.cfg.zone.as_deref().is_some_and(|z| z != map.zone(*n));
        let mut members: Vec<u64> = map.members(group).to_vec();
        members.retain(|n| map.addr(*n).is_some());
        if !members.is_empty() {
            let turn = group as usize % members.len();
            members.rotate_left(turn);
        }
        members.sort_by_cached_key(|n| (lost(n), other(n), far(n)));
        members
    }

    /// The address to try next: the leader, else a member that was not tried yet, else any; suspects last.
    fn choose(&self, route: Route, tries: &mut Tries) -> SocketAddr {
        let (map, known, now) = (self.map(), self.known(), Instant::now());
        if let (Route::Leader(group), Some(map)) = (route, &map)
            && let Some(leader) = map.leader(group).and_then(|l| map.addr(l))
            && (!tries.tried.contains(&leader) || tries.attempts % 4 == 3)
            && self.suspects.probe(leader, now)
        {
            return leader;
        }
        let mut order: Vec<SocketAddr> = Vec::new();
        if let (Route::Leader(group), Some(map)) = (route, &map) {
            let members = map.members(group).iter().copied().chain(map.nodes());
            order.extend(members.filter_map(|m| map.addr(m)));
        }
        let start = self.sticky.load(std::sync::atomic::Ordering::Relaxed);
        let at = |i: usize| known[(start + i) % known.len()];
        order.extend((0..known.len()).map(at));
        order.retain(|a| !self.suspects.has(*a, now));
        let fresh = |a: &&SocketAddr| !tries.tried.contains(*a);
        if let Some(addr) = order.iter().find(fresh) {
            return *addr;
        }
        // All that may answer were tried: from the first again, and where there is none, round and round.
        tries.tried.clear();
        let first = order.first().copied();
        first.unwrap_or_else(|| at(tries.attempts as usize))
    }

    /// Every address there is: those given, and those of the map.
    fn known(&self) -> Vec<SocketAddr> {
        let mut known = self.cfg.addrs.clone();
        if let Some(map) = self.map() {
            for addr in map.nodes().filter_map(|n| map.addr(n)) {
                if !known.contains(&addr) {
                    known.push(addr);
                }
            }
        }
        known
    }

    fn is_many(&self) -> bool {
        self.cfg.addrs.len() > 1 || self.map().is_some_and(|m| !m.is_alone())
    }

    async fn attempt(&self, addr: SocketAddr, frame: &Bytes) -> Result<response::Op, Attempt> {
        let _permit = self.in_flight.acquire().await.map_err(|_| {
            Attempt::Over(ClientError::new(
                ErrorKind::Unavailable,
                "the client is closed",
            ))
        })?;
        let patience = self.patience(addr);
        let answer = self.pool.exchange(addr, frame.clone(), patience).await;
        if !matches!(answer, Err(Attempt::Lost(_))) {
            self.suspects.found(addr);
        }
        answer
    }

    fn patience(&self, addr: SocketAddr) -> Patience {
        if !self.is_many() {
            Patience::Alone
        } else if self.suspects.is_new(addr, Instant::now()) {
            Patience::Lost
        } else {
            Patience::Many
        }
    }

    /// A node does not answer: what it led is led by somebody else soon.
    fn lost(&self, addr: SocketAddr) {
        if let Some(node) = self.map().and_then(|m| m.node_at(addr)) {
            self.change_map(|m| {
                m.lost(node);
                true
            });
        }
        self.suspects.lost(addr, Instant::now());
        let count = self.cfg.addrs.len();
        let now = self.sticky.load(std::sync::atomic::Ordering::Relaxed);
        if self.cfg.addrs[now % count] == addr {
            self.sticky
                .store((now + 1) % count, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Asks for a new map, of whoever answers first. Without one the old one stays.
    #[inline(never)]
    pub(crate) fn refresh(&self, deadline: Instant) -> Boxed<'_, ()> {
        Box::pin(self.ask_for_map(deadline))
    }

    async fn ask_for_map(&self, deadline: Instant) {
        let Ok(mut asked) = timeout_at(deadline, self.asked.lock()).await else {
            return;
        };
        if asked.is_some_and(|at| at.elapsed() < MAP_AGE) {
            return;
        }
        let frame = Request::from(request::Op::Topology(request::TopologyRequest {}));
        let Ok(frame) = wire::frame(&frame) else {
            return;
        };
        let limit = deadline.min(Instant::now() + ASK);
        let mut known = self.known();
        let start = self.sticky.load(std::sync::atomic::Ordering::Relaxed);
        let count = known.len();
        known.rotate_left(start % count);
        let now = Instant::now();
        known.sort_by_key(|a| self.suspects.has(*a, now));
        for addr in known {
            let patience = self.patience(addr);
            let exchange = self.pool.exchange(addr, frame.clone(), patience);
            let each = limit.min(Instant::now() + ASK / 2);
            let answer = timeout_at(each, exchange).await;
            match answer {
                Ok(Ok(response::Op::Topology(t))) => {
                    if let Some(mut new) = Map::read(&t, addr) {
                        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
                        if let Some(old) = &*map {
                            new.keep_leaders(old);
                        }
                        *map = Some(Arc::new(new));
                    }
                    break;
                }
                // An older node does not know the question, and is alone.
                Ok(Ok(_) | Err(Attempt::Over(_))) => break,
                Ok(Err(Attempt::Again(_) | Attempt::Lost(_))) | Err(_) => {
                    if Instant::now() >= limit {
                        break;
                    }
                }
            }
        }
        *asked = Some(Instant::now());
    }
}
