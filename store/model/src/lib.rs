//! Exhaustive models of the store's protocols, at small size: every order of steps is tried.
//!
//! - [`gc`]: collection against uploads, forks and removals. The groups are the production state machines
//!   ([`tidepool_store_core::apply`]); only who sends what and when is the model's.
//!
//! A model can leave out one rule of its protocol; the tests show that the checker then finds what the rule is there for. So the model
//! is known to see.
//!
//! Elsewhere on purpose: faults of network and disk, and everything larger (the simulation).

pub mod gc;
