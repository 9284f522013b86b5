//! QUIC settings, for both ends.
//!
//! Datagrams of 6000 bytes with segmentation offload cost less than half the CPU of standard ones where the path carries
//! them; more than 8 KiB misbehaves with offload. Discovery finds out; loopback needs none.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};

const MTU: u16 = 6000;
/// The most streams a peer may have open on one connection.
pub const MAX_STREAMS: u32 = 64;

/// Settings of a connection; `loopback` where the path is known to carry large datagrams.
pub fn connection(loopback: bool) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(MTU);
    config
        .initial_mtu(if loopback { MTU } else { 1200 })
        .mtu_discovery_config(Some(discovery))
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(8 << 20))
        .receive_window(VarInt::from_u32(32 << 20))
        .send_window(32 << 20)
        .keep_alive_interval(Some(Duration::from_secs(3)))
        .max_idle_timeout(Some(VarInt::from_u32(15_000).into()));
    if loopback {
        config.initial_rtt(Duration::from_millis(1));
    }
    Arc::new(config)
}

/// Settings of an endpoint.
pub fn endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    // The bound is between 1200 and 65527.
    let _ = config.max_udp_payload_size(MTU);
    config
}

/// Whether all of these are on this machine.
pub fn all_loopback(addrs: &[SocketAddr]) -> bool {
    addrs.iter().all(|a| a.ip().is_loopback())
}
