//! Views of groups' states, from which raft snapshots are read page by page.
//!
//! A view is a snapshot of the database, held by a thread of its own until its last page is read or nobody asks for a while. It is
//! opened on the driver's thread, between two batches, so that the applied index that goes with it is exact.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use tidepool_store_raft::{PAGE_BYTES, Page, Row};
use tokio::sync::oneshot;

use crate::db::Db;

/// Views open at once: each keeps the database from forgetting what was overwritten since.
const MAX_VIEWS: usize = 16;
/// A view that nobody reads is closed after this.
const IDLE: Duration = Duration::from_secs(30);
/// Rows of a page.
const ROWS: usize = 8192;

type Answer = oneshot::Sender<Result<Page, String>>;

struct Ask {
    after: Bytes,
    answer: Answer,
}

struct View {
    asks: Sender<Ask>,
    /// Gone when its thread has ended.
    alive: Weak<()>,
}

/// The open views.
pub(super) struct Views {
    db: Db,
    open: HashMap<u64, View>,
    next: u64,
}

impl Views {
    /// `first`: the number of the first view; random, so that views of an earlier run are not taken for those of this one.
    pub(super) fn new(db: Db, first: u64) -> Self {
        Self {
            db,
            open: HashMap::new(),
            next: first,
        }
    }

    /// Opens a view of a group's state as it is now; `head` says which index that is.
    pub(super) fn open(&mut self, group: u32, head: Page) -> Result<u64, String> {
        self.open.retain(|_, v| v.alive.strong_count() > 0);
        if self.open.len() >= MAX_VIEWS {
            return Err("too many raft snapshots are being read".into());
        }
        self.next = self.next.wrapping_add(1).max(1);
        let view = self.next;
        let head = Page { view, ..head };
        let (asks, queue) = channel();
        let (ready, opened) = sync_channel(1);
        let alive = Arc::new(());
        let weak = Arc::downgrade(&alive);
        let db = self.db.clone();
        std::thread::Builder::new()
            .name("store-view".into())
            .spawn(move || {
                serve(&db, group, &head, &queue, &ready);
                drop(alive);
            })
            .map_err(|e| e.to_string())?;
        opened.recv().map_err(|e| e.to_string())?;
        self.open.insert(view, View { asks, alive: weak });
        Ok(view)
    }

    /// Has a page read.
    pub(super) fn page(&mut self, view: u64, after: Bytes, answer: Answer) {
        let ask = Ask { after, answer };
        let gone = match self.open.get(&view) {
            Some(v) => v.asks.send(ask).map_err(|e| e.0),
            None => Err(ask),
        };
        if let Err(ask) = gone {
            self.open.remove(&view);
            let _ = ask
                .answer
                .send(Err("this raft snapshot is not there any more".into()));
        }
    }
}

fn serve(db: &Db, group: u32, head: &Page, queue: &Receiver<Ask>, ready: &SyncSender<()>) {
    let snapshot = db.snapshot(group);
    let _ = ready.send(());
    while let Ok(ask) = queue.recv_timeout(IDLE) {
        let mut page = head.clone();
        let (mut bytes, mut bad) = (0, None);
        page.last = true;
        let result = snapshot.scan(&ask.after, |key, value| match value {
            _ if bytes >= PAGE_BYTES || page.rows.len() >= ROWS => {
                page.last = false;
                false
            }
            Ok(value) => {
                bytes += key.len() + value.len() + 16;
                page.rows.push(Row {
                    key: Bytes::copy_from_slice(key),
                    value: value.into(),
                });
                true
            }
            Err(e) => {
                bad = Some(e);
                false
            }
        });
        let answer = match result.err().or(bad) {
            None => Ok(page),
            Some(e) => {
                tracing::error!(group, error = %e, "a raft snapshot cannot be read");
                Err(e.to_string())
            }
        };
        let done = answer.as_ref().is_ok_and(|p| p.last);
        let _ = ask.answer.send(answer);
        if done {
            break;
        }
    }
}
