//! Clients: plain async functions, polled by the world when an answer came or a wait is over. They know nothing of nodes but what they are told.

mod admin;
mod collector;
mod host;
mod others;
mod upload;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use tidepool_proto::{CheckpointId, SandboxId};
use tidepool_store_core::{META_GROUP, Reply, ShardMap, op};

use crate::check::Checker;
use crate::content::Content;
use crate::rng::Rng;
use crate::wire::{Answer, Fail, Query, Request, Result};

pub(crate) use admin::admin;
pub(crate) use collector::collector;
pub(crate) use host::host;
pub(crate) use others::{expirer, reader, remover};

/// How long a client waits for an answer.
const PATIENCE_US: u64 = 4_000_000;
/// How often it asks before it gives up.
const TRIES: u32 = 30;

/// What a client wants of the world.
pub(crate) enum Effect {
    Call {
        client: u32,
        call: u64,
        to: u64,
        request: Request,
        timeout_us: u64,
    },
    Sleep {
        client: u32,
        call: u64,
        us: u64,
    },
    /// A node that joined is to be started.
    Start(u64),
    /// A node that was removed is to be stopped for good.
    Stop(u64),
}

/// What clients know together: a directory, as schedulers have it.
#[derive(Default)]
pub(crate) struct Directory {
    pub(crate) sandboxes: Vec<SandboxId>,
    pub(crate) checkpoints: Vec<(SandboxId, CheckpointId)>,
    /// Nodes that can be asked.
    pub(crate) nodes: Vec<u64>,
    /// Nodes that died for good and are still in the list.
    pub(crate) dead: Vec<u64>,
    /// Operations that came to an end as they should.
    pub(crate) done: u64,
    pub(crate) groups_led: BTreeMap<u32, u64>,
    /// The members that any node knows of each group: an operator's list.
    pub(crate) members: BTreeMap<u32, Vec<u64>>,
}

/// What all clients of a world share.
pub(crate) struct Shared {
    pub(crate) now_us: Cell<u64>,
    pub(crate) effects: RefCell<Vec<Effect>>,
    /// Answers that were not taken yet, by call.
    pub(crate) answers: RefCell<BTreeMap<u64, Result<Answer>>>,
    pub(crate) next: Cell<u64>,
    pub(crate) checker: Rc<RefCell<Checker>>,
    pub(crate) content: Rc<Content>,
    pub(crate) shards: ShardMap,
    pub(crate) dir: RefCell<Directory>,
    /// Faults and changes are over: everything is to be brought to an end.
    pub(crate) ending: Cell<bool>,
}

/// A client's view of the world.
pub(crate) struct Ctx {
    pub(crate) id: u32,
    pub(crate) shared: Rc<Shared>,
    pub(crate) rng: RefCell<Rng>,
}

/// A client that runs.
pub(crate) type Task = Pin<Box<dyn Future<Output = ()>>>;

impl Ctx {
    pub(crate) fn chance(&self, percent: u64) -> bool {
        self.rng.borrow_mut().chance(percent)
    }

    pub(crate) fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n)
    }

    pub(crate) fn bytes<const N: usize>(&self) -> [u8; N] {
        self.rng.borrow_mut().bytes()
    }

    pub(crate) fn pick<T: Clone>(&self, list: &[T]) -> Option<T> {
        self.rng.borrow_mut().pick(list).cloned()
    }

    /// Another operation came to its end.
    pub(crate) fn done(&self) {
        self.shared.dir.borrow_mut().done += 1;
    }

    fn number(&self) -> u64 {
        let n = self.shared.next.get() + 1;
        self.shared.next.set(n);
        n
    }

    async fn wait(&self, call: u64) -> Result<Answer> {
        std::future::poll_fn(|_| match self.shared.answers.borrow_mut().remove(&call) {
            Some(answer) => Poll::Ready(answer),
            None => Poll::Pending,
        })
        .await
    }

    /// Lets time pass.
    pub(crate) async fn sleep(&self, us: u64) {
        let (client, call) = (self.id, self.number());
        let sleep = Effect::Sleep { client, call, us };
        self.shared.effects.borrow_mut().push(sleep);
        let _ = self.wait(call).await;
    }

    pub(crate) async fn pause(&self, low_ms: u64, high_ms: u64) {
        let us = self.rng.borrow_mut().between(low_ms * 1000, high_ms * 1000);
        self.sleep(us).await;
    }

    /// Asks one node once.
    pub(crate) async fn call(&self, to: u64, request: Request) -> Result<Answer> {
        let call = self.number();
        self.shared.effects.borrow_mut().push(Effect::Call {
            client: self.id,
            call,
            to,
            request,
            timeout_us: PATIENCE_US,
        });
        self.wait(call).await
    }

    /// Asks the leader of a group, whoever that is, until there is an answer that means something. Every request may be sent again.
    pub(crate) async fn lead(&self, group: u32, request: Request) -> Result<Answer> {
        let mut to = self.shared.dir.borrow().groups_led.get(&group).copied();
        for _ in 0..TRIES {
            let nodes = self.shared.dir.borrow().nodes.clone();
            let Some(node) = to.take().or_else(|| self.pick(&nodes)) else {
                return Err(Fail::GaveUp);
            };
            match self.call(node, request.clone()).await {
                Err(Fail::NotLeader(leader)) => {
                    to = leader.filter(|l| *l != node && nodes.contains(l));
                    match to {
                        Some(_) => self.pause(1, 20).await,
                        None => self.pause(50, 400).await,
                    }
                }
                Err(Fail::Again | Fail::Full) => self.pause(100, 600).await,
                Err(Fail::Timeout) => {}
                decided => {
                    self.shared.dir.borrow_mut().groups_led.insert(group, node);
                    return decided;
                }
            }
            self.shared.dir.borrow_mut().groups_led.remove(&group);
        }
        Err(Fail::GaveUp)
    }

    /// Proposes a command where its group is led.
    pub(crate) async fn propose(&self, group: u32, op: op::Op) -> Result<Reply> {
        let op = Box::new(op);
        match self.lead(group, Request::Propose { group, op }).await? {
            Answer::Reply(reply) => Ok(reply),
            _ => Err(Fail::Conflict),
        }
    }

    /// Reads at a point that shows all that was acknowledged before.
    pub(crate) async fn read(&self, group: u32, query: Query) -> Result<Answer> {
        let floor = self.shared.checker.borrow().floor(group);
        let request = Request::Read {
            group,
            floor,
            query,
        };
        self.lead(group, request).await
    }

    /// Reads a row, and has the checker look at it.
    pub(crate) async fn row(&self, group: u32, key: Vec<u8>) -> Result<Option<Vec<u8>>> {
        let floor = self.shared.checker.borrow().floor(group);
        match self.read(group, Query::Row(key.clone())).await? {
            Answer::Row(row) => {
                let mut checker = self.shared.checker.borrow_mut();
                checker.read_row(group, &key, row.as_deref(), floor);
                Ok(row)
            }
            _ => Err(Fail::Conflict),
        }
    }

    /// The group of a sandbox.
    pub(crate) fn home(&self, sandbox: &SandboxId) -> u32 {
        self.shared.shards.of_sandbox(sandbox)
    }

    /// All groups.
    pub(crate) fn groups(&self) -> std::ops::Range<u32> {
        META_GROUP..self.shared.shards.shards() + 1
    }
}
