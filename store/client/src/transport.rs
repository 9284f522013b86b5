//! QUIC settings, for both ends.
//!
//! Datagrams of 6000 bytes with segmentation offload cost less than half the CPU of standard ones where the path carries
//! them; more than 8 KiB misbehaves with offload. Discovery finds out; loopback needs none.
//!
//! A burst of datagrams is acknowledged by few: each acknowledgement is a system call and a wake-up on both sides. The first window is
//! that of a fast network within a site, so that a body does not wait for it to grow.
//!
//! The window of a connection is larger than those of all its streams together: streams that a node lets wait for want of memory
//! cannot keep the bytes of those it is reading from arriving.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{
    AckFrequencyConfig, ConnectionId, ConnectionIdGenerator, EndpointConfig, MtuDiscoveryConfig,
    TransportConfig, VarInt,
};

const MTU: u16 = 6000;
/// The most streams a peer may have open on one connection.
pub const MAX_STREAMS: u32 = 64;

/// The code with which a node closes a connection whose certificate may not be here.
pub const DENIED: u32 = 3;

/// An idle connection says so this often, so that a silent one is a dead one.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_millis(500);

const STREAM_WINDOW: u32 = 512 << 10;
const CONNECTION_WINDOW: u32 = (MAX_STREAMS + 16) * STREAM_WINDOW;
/// Messages longer than this are bulk: they go after short ones.
pub const SHORT: usize = 64 << 10;
/// What is asked of the kernel for each direction of a socket.
const SOCKET_BUFFER: usize = 4 << 20;

/// Datagrams that ask for an acknowledgement and need not have one at once, and how long none is sent at most.
const ACK_AFTER: (u32, Duration) = (10, Duration::from_millis(5));
/// Bytes under way on a new connection.
const FIRST_WINDOW: u64 = 128 << 10;

/// What all connections have in common.
fn base() -> TransportConfig {
    let mut config = TransportConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(MTU);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_AFTER.0));
    acks.max_ack_delay(Some(ACK_AFTER.1));
    let mut congestion = CubicConfig::default();
    congestion.initial_window(FIRST_WINDOW);
    config
        .mtu_discovery_config(Some(discovery))
        .ack_frequency_config(Some(acks))
        .congestion_controller_factory(Arc::new(congestion))
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None);
    config
}

/// Settings of a connection; `loopback` where the path is known to carry large datagrams.
pub fn connection(loopback: bool) -> Arc<TransportConfig> {
    let mut config = base();
    config
        .initial_mtu(if loopback { MTU } else { 1200 })
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(32 << 20)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(VarInt::from_u32(6_000).into()));
    // The first packets are sent again soon where they are lost; on a longer path that is a few bytes for nothing.
    config.initial_rtt(Duration::from_millis(if loopback { 1 } else { 100 }));
    Arc::new(config)
}

/// Settings of a connection between nodes: one that is gone is noticed sooner, and more may be under way.
pub fn peer() -> Arc<TransportConfig> {
    let mut config = base();
    config
        .initial_mtu(1200)
        .stream_receive_window(VarInt::from_u32(4 << 20))
        .receive_window(VarInt::from_u32(64 << 20))
        .send_window(64 << 20)
        .initial_rtt(Duration::from_millis(10))
        .keep_alive_interval(Some(Duration::from_secs(1)))
        .max_idle_timeout(Some(VarInt::from_u32(5_000).into()));
    Arc::new(config)
}

/// Settings of an endpoint.
pub fn endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    // The bound is between 1200 and 65527.
    let _ = config.max_udp_payload_size(MTU);
    config
}

/// Settings of a node's endpoint, which tells those who were connected to an earlier run of it, known by its key, that this is another.
pub fn node_endpoint(reset_key: Arc<dyn quinn::crypto::HmacKey>) -> EndpointConfig {
    let mut config = endpoint();
    config
        .reset_key(reset_key)
        .cid_generator(|| Box::new(RandomIds));
    config
}

/// Connection ids of which an endpoint cannot tell that they are not its own: the default ones of an earlier run it would ignore.
struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&rand::random::<[u8; 8]>())
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// A UDP socket with room for bursts, as much as the kernel grants.
pub fn socket(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(addr)?;
    // Only a wish: an unprivileged process gets what the system allows.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER);
    }
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
    Ok(socket)
}

/// How urgent a message of `len` bytes is, as a stream's priority.
pub fn priority(len: usize) -> i32 {
    if len > SHORT { -1 } else { 0 }
}

/// Whether all of these are on this machine.
pub fn all_loopback(addrs: &[SocketAddr]) -> bool {
    addrs.iter().all(|a| a.ip().is_loopback())
}
