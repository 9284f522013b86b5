//! Nodes that did not answer lately. They are asked last, with little patience, and now and then all the same: one that comes back may
//! lead soon.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a node that did not answer is suspected.
const SUSPECT: Duration = Duration::from_secs(5);
/// How long one that others say leads is left alone, before somebody looks whether it is back.
const PROBE: Duration = Duration::from_millis(400);

#[derive(Clone, Copy)]
struct Lost {
    first: Instant,
    last: Instant,
}

impl Lost {
    fn is_over(&self, now: Instant) -> bool {
        now - self.last >= SUSPECT
    }
}

/// Addresses that did not answer.
#[derive(Default)]
pub(crate) struct Suspects(Mutex<HashMap<SocketAddr, Lost>>);

impl Suspects {
    fn all(&self) -> MutexGuard<'_, HashMap<SocketAddr, Lost>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It did not answer.
    pub(crate) fn lost(&self, addr: SocketAddr, now: Instant) {
        let mut all = self.all();
        let lost = all.entry(addr).or_insert(Lost {
            first: now,
            last: now,
        });
        if lost.is_over(now) {
            lost.first = now;
        }
        lost.last = now;
    }

    /// It answered.
    pub(crate) fn found(&self, addr: SocketAddr) {
        self.all().remove(&addr);
    }

    pub(crate) fn has(&self, addr: SocketAddr, now: Instant) -> bool {
        self.all().get(&addr).is_some_and(|l| !l.is_over(now))
    }

    /// Whether it is to be asked although it may be suspected. Of all who would, one does at a time.
    pub(crate) fn probe(&self, addr: SocketAddr, now: Instant) -> bool {
        match self.all().get_mut(&addr) {
            Some(lost) if !lost.is_over(now) => {
                let due = now - lost.last >= PROBE;
                if due {
                    lost.last = now;
                }
                due
            }
            _ => true,
        }
    }

    /// Whether it was lost only a moment ago, so that it is hardly back; one that stays away is given time, it may be far.
    pub(crate) fn is_new(&self, addr: SocketAddr, now: Instant) -> bool {
        let lost = self.all().get(&addr).copied();
        lost.is_some_and(|l| !l.is_over(now) && now - l.first < SUSPECT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lost_are_suspected_for_a_while_and_probed_by_one_at_a_time() {
        let (all, mut now) = (Suspects::default(), Instant::now());
        let addr = "192.0.2.1:1".parse().unwrap();
        assert!(!all.has(addr, now) && all.probe(addr, now) && !all.is_new(addr, now));
        all.lost(addr, now);
        assert!(all.has(addr, now) && !all.probe(addr, now) && all.is_new(addr, now));
        now += PROBE;
        assert!(all.probe(addr, now) && !all.probe(addr, now));
        // Lost again and again, it is given more time.
        for _ in 0..3 {
            now += SUSPECT / 2;
            all.lost(addr, now);
        }
        assert!(all.has(addr, now) && !all.is_new(addr, now));
        now += SUSPECT;
        assert!(!all.has(addr, now) && all.probe(addr, now));
        all.lost(addr, now);
        assert!(all.is_new(addr, now));
        all.found(addr);
        assert!(!all.has(addr, now));
    }
}
