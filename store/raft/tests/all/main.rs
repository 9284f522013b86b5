//! The core of several nodes over disks in memory, and a network that a test controls.

mod bodies;
mod cluster;
mod common;
mod members;
mod room;
mod votes;
