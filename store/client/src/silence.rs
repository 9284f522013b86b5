//! When a node counts as gone: nothing at all is heard from it, although it had reason to speak. A node that lives acknowledges at once what
//! it gets, however long it takes to answer and however slow the path; so silence is bounded, and never how long something takes.
//!
//! Silence is counted in looks and not in time: a client that was itself held up does not blame the node for it.

use std::time::Duration;

use quinn::Connection;

use crate::transport::KEEP_ALIVE;

/// Time between two looks.
pub(crate) const LOOK: Duration = Duration::from_millis(100);
/// How long nothing may come from a node that was sent something, beside the time that the path takes.
const SILENCE: Duration = Duration::from_secs(1);

/// Listens to the connection that a request is under way on.
pub(crate) struct Silence {
    /// Datagrams that came so far.
    heard: u64,
    /// Looks since the last of them.
    looks: u32,
    /// One has come since the request was sent: now it is for the next keep-alive to provoke another.
    spoken: bool,
}

impl Silence {
    pub(crate) fn new(connection: &Connection) -> Self {
        Self {
            heard: connection.stats().udp_rx.datagrams,
            looks: 0,
            spoken: false,
        }
    }

    /// To be called every [`LOOK`]: whether the node counts as gone.
    pub(crate) fn look(&mut self, connection: &Connection) -> bool {
        self.note(connection.stats().udp_rx.datagrams, connection.rtt())
    }

    fn note(&mut self, heard: u64, rtt: Duration) -> bool {
        if heard != self.heard {
            (self.heard, self.looks, self.spoken) = (heard, 0, true);
            return false;
        }
        self.looks += 1;
        let mut limit = SILENCE + rtt * 3;
        if self.spoken {
            limit += KEEP_ALIVE;
        }
        LOOK * self.looks >= limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(silence: &mut Silence, rtt: u64) -> u32 {
        let heard = silence.heard;
        let rtt = Duration::from_millis(rtt);
        (1..1000)
            .find(|_| silence.note(heard, rtt))
            .expect("it is over some time")
    }

    #[test]
    fn silence_ends_with_each_datagram_and_is_longer_where_the_path_is() {
        let new = || Silence {
            heard: 7,
            looks: 0,
            spoken: false,
        };
        assert_eq!(looks(&mut new(), 0), 10);
        assert_eq!(looks(&mut new(), 300), 19);
        let mut spoken = new();
        for i in 0..50 {
            // Little by little, for as long as it takes.
            assert!(!spoken.note(8 + i, Duration::ZERO));
            assert!((0..9).all(|_| !spoken.note(8 + i, Duration::ZERO)));
        }
        assert!(!spoken.note(100, Duration::ZERO));
        assert_eq!(looks(&mut spoken, 0), 15);
    }
}
