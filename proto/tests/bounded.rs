//! Decoders take no more memory than a small multiple of their input, whatever lengths it claims.
//!
//! One test in a binary of its own: it counts what the whole process allocates.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tidepool_proto::DomainKey;
use tidepool_proto::codec::Writer;
use tidepool_proto::manifest::Manifest;
use tidepool_proto::recipe::Recipe;
use tidepool_proto::tree::Node;
use tidepool_proto::turn::TurnRecord;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; only sizes are counted beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above; the pointer came from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most that decoding these bytes held at once, as every format.
fn peak(bytes: &[u8]) -> usize {
    let key = DomainKey::new([1; 32]);
    let name = key.name(b"x");
    let decoders: [&dyn Fn(); 5] = [
        &|| drop(Recipe::decode(bytes)),
        &|| drop(Node::decode(bytes)),
        &|| drop(Manifest::decode(bytes)),
        &|| drop(TurnRecord::decode(bytes)),
        &|| drop(key.open(&name, bytes)),
    ];
    let mut most = 0;
    for decode in decoders {
        let before = NOW.load(Relaxed);
        PEAK.store(before, Relaxed);
        decode();
        most = most.max(PEAK.load(Relaxed) - before);
    }
    most
}

#[test]
fn memory_is_bounded_by_the_input() {
    // A body may claim a mebibyte of plaintext; beside that a few dozen times the input.
    let bound = |len: usize| (1 << 20) + 64 * len + (64 << 10);
    let samples = [
        common::recipe().encode(),
        common::node().encode(),
        common::manifest().encode(),
        common::turn().encode(),
    ];
    for sample in &samples {
        for at in 0..sample.len() {
            // A large number wherever a length could stand.
            for lie in [
                &[0xff, 0xff, 0xff, 0xff, 0x0f][..],
                &[0xff; 9],
                &[0xff, 0xff, 0x7f],
            ] {
                let mut bytes = sample[..at].to_vec();
                bytes.extend_from_slice(lie);
                bytes.extend_from_slice(&sample[at..]);
                let peak = peak(&bytes);
                assert!(
                    peak <= bound(bytes.len()),
                    "{peak} bytes for {} at {at}",
                    bytes.len()
                );
            }
        }
    }
    // A node whose file claims as many segments as its many bytes could hold.
    let mut w = Writer::versioned(1);
    w.varint(1);
    w.bytes(b"name");
    for _ in 0..7 {
        w.varint(0);
    }
    w.u8(1);
    w.u8(0);
    w.varint(1 << 22);
    let mut bytes = w.into_bytes();
    for _ in 0..1 << 22 {
        bytes.extend_from_slice(&[0, 1]);
    }
    let peak = peak(&bytes);
    assert!(peak < bytes.len(), "{peak} bytes for {}", bytes.len());
}
