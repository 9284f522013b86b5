//! Faults put in on purpose, by which the simulation shows that its checker sees.
//!
//! Without the feature `bugs` none can be armed and every question is a constant. With it one is armed for the thread that asks, so that one
//! build tries them all. The places are in this crate and in `store/raft`; the list is one, so that they cannot be armed together by mistake.

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// What a batch rests on is sent and answered before the batch is synced.
    AckBeforeFsync,
    /// An append is taken while its bodies are still being fetched.
    AppendBeforeBodies,
    /// A commit may rest on pins from before the cut of a collection.
    NoFence,
    /// Apply decides by its node's clock.
    ApplyReadsClock,
    /// The end of a conflicting suffix stays on disk.
    ForgetTruncation,
    /// A leader answers reads without asking whether it still leads.
    StaleRead,
    /// A sweep deletes bodies that an entry brings which is not applied yet.
    SweepNamed,
    /// A raft snapshot is taken over before its bodies are here.
    InstallBeforeBodies,
}

impl Bug {
    pub const ALL: [Bug; 8] = [
        Bug::AckBeforeFsync,
        Bug::AppendBeforeBodies,
        Bug::NoFence,
        Bug::ApplyReadsClock,
        Bug::ForgetTruncation,
        Bug::StaleRead,
        Bug::SweepNamed,
        Bug::InstallBeforeBodies,
    ];
}

#[cfg(feature = "bugs")]
mod armed {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static ARMED: Cell<Option<Bug>> = const { Cell::new(None) };
        static CLOCK_MS: Cell<u64> = const { Cell::new(0) };
    }

    /// Arms a fault for this thread, or disarms it. Tells whether it can be.
    pub fn arm(bug: Option<Bug>) -> bool {
        ARMED.set(bug);
        true
    }

    /// Whether it is armed.
    pub fn is_armed(bug: Bug) -> bool {
        ARMED.get() == Some(bug)
    }

    /// What [`Bug::ApplyReadsClock`] reads.
    pub fn set_clock(now_ms: u64) {
        CLOCK_MS.set(now_ms);
    }

    pub(crate) fn clock_ms() -> u64 {
        CLOCK_MS.get()
    }
}

#[cfg(not(feature = "bugs"))]
mod armed {
    use super::Bug;

    /// Arms a fault for this thread, or disarms it. Tells whether it can be.
    pub fn arm(bug: Option<Bug>) -> bool {
        bug.is_none()
    }

    /// Whether it is armed.
    #[inline(always)]
    pub const fn is_armed(_: Bug) -> bool {
        false
    }

    /// What [`Bug::ApplyReadsClock`] reads.
    #[inline(always)]
    pub const fn set_clock(_: u64) {}

    pub(crate) const fn clock_ms() -> u64 {
        0
    }
}

pub use armed::{arm, is_armed, set_clock};

/// The time of a command, as apply may see it.
pub(crate) fn command_time(now_ms: u64) -> u64 {
    match is_armed(Bug::ApplyReadsClock) {
        true => armed::clock_ms(),
        false => now_ms,
    }
}
