//! Bodies that a leader sends to the other members of a group while it writes them itself, so that all disks write at the same time and
//! an append finds the bodies it names.
//!
//! Only a help: a push may be dropped at any point (no connection, too much waiting on either side, damage), and what an append then
//! misses is fetched ([`super::net`]). A fetch of names that are arriving waits for them, so that no body crosses the network twice. Nothing
//! is acknowledged by a push; a body that no entry comes to name stays until a scrub finds it, as one of a put that was given up does.
//!
//! On the stream: a frame with a [`PushHead`], then the bodies one after the other. Both sides bound what waits, in bytes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message as _;
use quinn::{Connection, SendStream};
use tidepool_proto::ChunkName;
use tidepool_proto::wire::{MAX_FRAME, MAX_NAMES, join_names, split_names};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::stream::PUSH;

/// Bytes of bodies that may wait for one peer.
pub(super) const MAX_PUSHING: u64 = 32 << 20;
/// Bytes of bodies after which the next stream begins.
const STREAM: usize = 4 << 20;
/// Bytes of pushes that a node takes in at once, in units of [`UNIT`].
const TAKEN: usize = 64 << 20;
const UNIT: usize = 4096;

/// A body on its way.
pub(crate) type Pushed = (ChunkName, Bytes);

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PushHead {
    #[prost(bytes = "bytes", tag = "1")]
    names: Bytes,
    /// A u32, little-endian, for each name: the bytes of its body.
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) lens: Bytes,
}

/// Sends what is waiting, a few MiB in a stream, until the connection ends.
pub(super) async fn send_all(
    connection: Connection,
    mut queue: UnboundedReceiver<Pushed>,
    waiting: Arc<AtomicU64>,
) -> String {
    let mut bodies = Vec::new();
    loop {
        if queue.recv_many(&mut bodies, MAX_NAMES).await == 0 {
            return "replaced".into();
        }
        let mut left = bodies.drain(..).peekable();
        while left.peek().is_some() {
            let (mut names, mut lens, mut part) = (Vec::new(), BytesMut::new(), Vec::new());
            let mut bytes = 0;
            while let Some((_, next)) = left.peek()
                && (part.is_empty() || bytes + next.len() <= STREAM)
                && let Some((name, body)) = left.next()
            {
                bytes += body.len();
                names.push(name);
                lens.put_u32_le(body.len() as u32);
                part.push(body);
            }
            let head = PushHead {
                names: join_names(&names),
                lens: lens.freeze(),
            };
            let sent = async {
                let (mut send, _recv) = connection.open_bi().await.map_err(|e| e.to_string())?;
                let _ = send.set_priority(-1);
                write(&mut send, &head, &mut part).await.ok();
                let _ = send.finish();
                Ok::<_, String>(())
            };
            if let Err(why) = sent.await {
                return why;
            }
            waiting.fetch_sub(bytes as u64, Relaxed);
        }
    }
}

/// A receiver that has no room stops the stream: that is no error.
async fn write(
    send: &mut SendStream,
    head: &PushHead,
    bodies: &mut [Bytes],
) -> Result<(), quinn::WriteError> {
    let head = head.encode_to_vec();
    let mut first = Vec::with_capacity(5 + head.len());
    first.push(PUSH);
    first.put_u32_le(head.len() as u32);
    first.extend_from_slice(&head);
    send.write_chunk(first.into()).await?;
    send.write_all_chunks(bodies).await
}

/// What is arriving at a node, and how much may.
pub(crate) struct Arrivals {
    names: Mutex<HashMap<ChunkName, watch::Receiver<()>>>,
    room: Arc<Semaphore>,
}

impl Default for Arrivals {
    fn default() -> Self {
        Self {
            names: Mutex::default(),
            room: Arc::new(Semaphore::new(TAKEN / UNIT)),
        }
    }
}

impl Arrivals {
    fn names<T>(&self, f: impl FnOnce(&mut HashMap<ChunkName, watch::Receiver<()>>) -> T) -> T {
        f(&mut self.names.lock().unwrap_or_else(PoisonError::into_inner))
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.names(|all| all.is_empty()) && self.room.available_permits() == TAKEN / UNIT
    }

    /// Takes a push in, if there is room. An error says what is wrong with the head.
    pub(super) fn take(self: &Arc<Self>, head: Bytes) -> Result<Option<Coming>, String> {
        let head = PushHead::decode(head).map_err(|e| e.to_string())?;
        let names = split_names(&head.names).map_err(|e| e.to_string())?;
        if names.len() > MAX_NAMES || head.lens.len() != names.len() * 4 {
            return Err("a push of names without one length each".into());
        }
        let lens = head.lens.chunks_exact(4);
        let len = |l: &[u8]| l.try_into().map_or(0, u32::from_le_bytes) as usize;
        let bytes = lens.map(len).fold(0usize, usize::saturating_add);
        if bytes > MAX_FRAME {
            return Err(format!("a push of {bytes} bytes"));
        }
        let units = bytes.div_ceil(UNIT) as u32;
        let Ok(room) = self.room.clone().try_acquire_many_owned(units) else {
            return Ok(None);
        };
        let (done, arriving) = watch::channel(());
        self.names(|all| {
            for name in &names {
                all.insert(*name, arriving.clone());
            }
        });
        Ok(Some(Coming {
            names,
            lens: head.lens,
            bytes,
            arriving,
            arrivals: self.clone(),
            _done: done,
            _room: room,
        }))
    }

    /// Waits until none of these is arriving any more; says whether one was.
    pub(crate) async fn wait(&self, names: &[ChunkName]) -> bool {
        let arriving = self.names(|all| {
            let mut found: Vec<watch::Receiver<()>> = Vec::new();
            for one in names.iter().filter_map(|n| all.get(n)) {
                if !found.last().is_some_and(|f| f.same_channel(one)) {
                    found.push(one.clone());
                }
            }
            found
        });
        let any = !arriving.is_empty();
        for mut one in arriving {
            // Nothing is ever sent: the sender goes with the push.
            let _ = one.changed().await;
        }
        any
    }
}

/// A push that is arriving: until this is dropped, fetches of its names wait.
pub(crate) struct Coming {
    pub(super) names: Vec<ChunkName>,
    pub(super) lens: Bytes,
    pub(super) bytes: usize,
    arriving: watch::Receiver<()>,
    arrivals: Arc<Arrivals>,
    _done: watch::Sender<()>,
    _room: OwnedSemaphorePermit,
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.arrivals.names(|all| {
            for name in &self.names {
                // Another push may have brought the same name since.
                if all
                    .get(name)
                    .is_some_and(|a| a.same_channel(&self.arriving))
                {
                    all.remove(name);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn head(names: &[ChunkName], lens: &[u32]) -> Bytes {
        let lens: Vec<u8> = lens.iter().flat_map(|l| l.to_le_bytes()).collect();
        PushHead {
            names: join_names(names),
            lens: lens.into(),
        }
        .encode_to_vec()
        .into()
    }

    fn name(n: u8) -> ChunkName {
        ChunkName([n; 32])
    }

    #[tokio::test]
    async fn a_fetch_waits_for_what_is_arriving_and_for_nothing_else() {
        let arrivals = Arc::new(Arrivals::default());
        assert!(!arrivals.wait(&[name(1)]).await);
        let first = arrivals.take(head(&[name(1), name(2)], &[5, 6])).unwrap();
        let first = first.unwrap();
        assert_eq!(first.bytes, 11);
        // The same name once more: whoever asks now waits for this one.
        let second = arrivals.take(head(&[name(2)], &[6])).unwrap().unwrap();
        assert!(!arrivals.wait(&[name(3)]).await);
        let waiting = tokio::spawn({
            let arrivals = arrivals.clone();
            async move { arrivals.wait(&[name(1), name(2)]).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(first);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished(), "the second push is still arriving");
        drop(second);
        assert!(waiting.await.unwrap());
        assert!(arrivals.names(|all| all.is_empty()));
    }

    #[test]
    fn heads_are_checked_and_room_is_bounded() {
        let arrivals = Arc::new(Arrivals::default());
        assert!(arrivals.take(Bytes::from_static(b"\xff\xff")).is_err());
        assert!(arrivals.take(head(&[name(1)], &[])).is_err());
        assert!(arrivals.take(head(&[name(1)], &[u32::MAX])).is_err());
        assert!(arrivals.take(head(&[name(1); 3], &[8 << 20; 3])).is_err());
        let taken: Vec<_> = (0..TAKEN / (8 << 20))
            .map(|n| arrivals.take(head(&[name(n as u8)], &[8 << 20])).unwrap())
            .collect();
        assert!(taken.iter().all(Option::is_some));
        assert!(arrivals.take(head(&[name(99)], &[1])).unwrap().is_none());
        assert_eq!(arrivals.names(|all| all.len()), taken.len());
        drop(taken);
        assert!(arrivals.take(head(&[name(99)], &[1])).unwrap().is_some());
    }
}
