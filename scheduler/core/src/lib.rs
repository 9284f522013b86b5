//! The host's decisions and cutting, free of IO: what a turn's effects ask for, how a turn goes on, which capture runs next, how bytes become
//! chunks, what differs between two trees.
//!
//! Everything here is a function or a `handle(now, input)` / `poll_action()` machine: time is an argument, nothing is drawn at
//! random, nothing is read or written. The daemon (`scheduler`) and `scheduler/fs` execute; tests and simulations run the same code.

pub mod cut;
pub mod diff;
pub mod engine;
pub mod ignore;
pub mod pages;
pub mod turn;
pub mod verdict;
