//! A raft snapshot being fetched: pages of rows into the staging area, then the bodies they name that are not here, and only
//! then raft is told. The group goes on meanwhile: heartbeats are answered, and if it catches up otherwise the snapshot falls away.
//!
//! Bodies are asked for like those of appends, see [`crate::parked`]: of the sender, then of the others in turn. A source that has applied
//! as much as the view and has neither row nor body of a name proves that it was swept behind the view, whoever the source is: the
//! view has the row, and both are prefixes of one history.

use bytes::Bytes;
use raft::eraftpb::{ConfState, Message};
use tidepool_proto::ChunkName;
use tidepool_store_core::bugs::{Bug, is_armed};
use tidepool_store_core::keys;

use crate::disk::{Disk, DiskError, DiskOp};
use crate::page::{Page, PageRequest};
use crate::parked::FETCH_NAMES;

/// Rows looked through for missing bodies at a time.
const WINDOW: usize = 1024;
/// Ticks after a failed fetch.
const RETRY_TICKS: u32 = 10;

/// What comes next.
pub(crate) enum Next {
    Page(PageRequest),
    Bodies(Vec<ChunkName>),
    /// Everything is here: step this.
    Done(Box<Message>),
    Wait,
}

/// The snapshot being fetched.
pub(crate) struct Install {
    group: u32,
    pub(crate) from: u64,
    message: Message,
    view: u64,
    after: Vec<u8>,
    /// Index, term and members of the view.
    meta: Option<(u64, u64, ConfState)>,
    /// All rows are staged; bodies are looked for behind this key.
    bodies_after: Option<Vec<u8>>,
    gone: Vec<ChunkName>,
    pub(crate) fetch: Option<u64>,
    /// How many bodies were missing when they were last asked for.
    asked: usize,
    /// Fetches of bodies that came to nothing, one after the other: each next one goes to another member.
    pub(crate) in_vain: usize,
    wait: u32,
}

impl Install {
    pub(crate) fn new(group: u32, from: u64, message: Message) -> Self {
        Self {
            group,
            from,
            message,
            view: 0,
            after: Vec::new(),
            meta: None,
            bodies_after: None,
            gone: Vec::new(),
            fetch: None,
            asked: 0,
            in_vain: 0,
            wait: 0,
        }
    }

    /// Whether this is the announcement of the same leader again.
    pub(crate) fn is(&self, from: u64, term: u64) -> bool {
        self.from == from && self.message.term == term
    }

    /// The index of the view, where it is known.
    pub(crate) fn index(&self) -> u64 {
        self.meta.as_ref().map_or(0, |(index, _, _)| *index)
    }

    pub(crate) fn tick(&mut self) {
        self.wait = self.wait.saturating_sub(1);
    }

    pub(crate) fn next<D: Disk>(&mut self, disk: &D) -> Result<Next, DiskError> {
        if self.fetch.is_some() || self.wait > 0 {
            return Ok(Next::Wait);
        }
        let Some(after) = &mut self.bodies_after else {
            return Ok(Next::Page(PageRequest {
                group: self.group,
                view: self.view,
                after: Bytes::copy_from_slice(&self.after),
            }));
        };
        let table = &keys::chunk(&ChunkName([0; 32]))[..1];
        loop {
            let rows = disk.staged(self.group, table, after, WINDOW)?;
            let Some((last, _)) = rows.last() else {
                return Ok(self.done());
            };
            let mut missing = Vec::new();
            for (key, _) in &rows {
                let Ok(name) = <[u8; 32]>::try_from(&key[1..]) else {
                    return Err(DiskError::Corruption(format!(
                        "a staged row of group {} has a key of {} bytes",
                        self.group,
                        key.len()
                    )));
                };
                let name = ChunkName(name);
                if !self.gone.contains(&name) && !disk.has_body(&name)? {
                    missing.push(name);
                }
                if missing.len() == FETCH_NAMES {
                    break;
                }
            }
            if !missing.is_empty() && !is_armed(Bug::InstallBeforeBodies) {
                // Nothing came: not at once again.
                if missing.len() == self.asked {
                    self.asked = 0;
                    self.in_vain += 1;
                    self.wait = RETRY_TICKS;
                    return Ok(Next::Wait);
                }
                self.asked = missing.len();
                return Ok(Next::Bodies(missing));
            }
            self.asked = 0;
            self.in_vain = 0;
            self.gone.clear();
            after.clone_from(last);
        }
    }

    fn done(&mut self) -> Next {
        let mut message = std::mem::take(&mut self.message);
        let (Some(snapshot), Some((index, term, conf))) = (&mut message.snapshot, self.meta.take())
        else {
            return Next::Wait;
        };
        let meta = snapshot.metadata.get_or_insert_default();
        meta.index = index;
        meta.term = term;
        meta.conf_state = Some(conf);
        Next::Done(Box::new(message))
    }

    /// A page came. Gives what has to be staged; none where the page does not fit, and all begins anew.
    pub(crate) fn page(&mut self, page: Page) -> Option<Vec<DiskOp>> {
        self.fetch = None;
        let Some(ops) = self.take(page) else {
            self.restart();
            return None;
        };
        Some(ops)
    }

    fn take(&mut self, page: Page) -> Option<Vec<DiskOp>> {
        let announced = self.message.snapshot.as_ref()?.metadata.as_ref()?.index;
        let conf = page.members()?;
        let mut ops = Vec::new();
        match &self.meta {
            None => ops.push(DiskOp::ClearStage { group: self.group }),
            Some((index, term, _)) => {
                if (page.view, page.index, page.term) != (self.view, *index, *term) {
                    return None;
                }
            }
        }
        if page.index < announced || page.term == 0 {
            return None;
        }
        for row in &page.rows {
            if row.key.is_empty() || *row.key <= *self.after {
                return None;
            }
            self.after = row.key.to_vec();
            ops.push(DiskOp::Stage {
                group: self.group,
                key: row.key.to_vec(),
                value: row.value.to_vec(),
            });
        }
        if page.rows.is_empty() && !page.last {
            return None;
        }
        self.view = page.view;
        self.meta = Some((page.index, page.term, conf));
        if page.last {
            self.bodies_after = Some(Vec::new());
        }
        Some(ops)
    }

    /// Bodies came; these were collected meanwhile.
    pub(crate) fn bodies(&mut self, gone: Vec<ChunkName>) {
        self.fetch = None;
        self.gone.extend(gone);
    }

    /// A fetch failed. Staged rows whose bodies are being fetched stay good; a view is not trusted to be there still.
    pub(crate) fn failed(&mut self) {
        self.fetch = None;
        if self.bodies_after.is_some() {
            self.asked = 0;
            self.in_vain += 1;
            self.wait = RETRY_TICKS;
        } else {
            self.restart();
        }
    }

    fn restart(&mut self) {
        self.view = 0;
        self.after.clear();
        self.meta = None;
        self.wait = RETRY_TICKS;
    }
}
