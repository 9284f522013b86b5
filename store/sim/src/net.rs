//! The network: it loses, delays, reorders, doubles and cuts, one way or both.

use std::collections::{BTreeMap, BTreeSet};

use crate::rng::Rng;
use crate::wire::Packet;

/// How messages fare now.
pub(crate) struct Net {
    rng: Rng,
    /// Nothing goes from the first to the second.
    pub(crate) cut: BTreeSet<(u64, u64)>,
    /// In a hundred.
    pub(crate) loss: u64,
    pub(crate) twice: u64,
    pub(crate) reorder: u64,
    /// The longest usual delay, in microseconds.
    pub(crate) delay_us: u64,
    /// When the last message of a link arrives.
    last: BTreeMap<(u64, u64), u64>,
    /// The time now.
    clock: u64,
}

impl Net {
    pub(crate) fn new(mut rng: Rng) -> Self {
        let delay_us = [300, 2_000, 20_000][rng.below(3) as usize];
        Self {
            loss: rng.below(3),
            twice: rng.below(4),
            reorder: rng.below(10),
            delay_us,
            cut: BTreeSet::new(),
            last: BTreeMap::new(),
            clock: 0,
            rng,
        }
    }

    /// No more trouble.
    pub(crate) fn heal(&mut self) {
        self.cut.clear();
        self.loss = 0;
    }

    fn delay(&mut self) -> u64 {
        let usual = 50 + self.rng.below(self.delay_us);
        // A few take very long.
        match self.rng.rarely(3000) {
            true => usual + self.rng.below(3_000_000),
            false => usual,
        }
    }

    fn arrivals(&mut self) -> Vec<u64> {
        if self.rng.chance(self.loss) {
            return Vec::new();
        }
        let mut out = vec![self.delay()];
        if self.rng.chance(self.twice) {
            out.push(self.delay() + self.rng.below(200_000));
        }
        out
    }

    /// Between a client and a node, either way: the delay of each copy that arrives.
    pub(crate) fn answer(&mut self) -> Vec<u64> {
        self.arrivals()
    }

    /// Between nodes: what arrives, and after how long.
    pub(crate) fn send(&mut self, from: u64, to: u64, packet: Packet) -> Vec<(u64, Packet)> {
        if from == to {
            return vec![(1, packet)];
        }
        if self.cut.contains(&(from, to)) {
            return Vec::new();
        }
        let parts = match packet {
            // Now and then each message fares alone.
            Packet::Envelopes(list) if list.len() > 1 && self.rng.chance(self.reorder * 2) => {
                let each = list.into_iter().map(|e| Packet::Envelopes(vec![e]));
                each.collect()
            }
            whole => vec![whole],
        };
        let mut out = Vec::new();
        for part in parts {
            for delay in self.arrivals() {
                let behind = self.last.get(&(from, to)).copied().unwrap_or(0);
                // Usually in order: behind the last one of a moment ago.
                let delay = match self.rng.chance(self.reorder) {
                    true => delay,
                    false => delay.max(behind.saturating_sub(self.clock)),
                };
                self.last.insert((from, to), self.clock + delay + 1);
                out.push((delay, part.clone()));
            }
        }
        out
    }

    /// Time goes on.
    pub(crate) fn set_clock(&mut self, now_us: u64) {
        self.clock = now_us;
    }
}
