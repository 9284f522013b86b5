//! The reference tracer: loads `bpf/tracer.bpf.c` and reads what it records, as a security tool's daemon would.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::{Map, PerCpuArray, RingBuf};
use aya::programs::RawTracePoint;
use aya::{Btf, Ebpf, EbpfLoader, include_bytes_aligned};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tracer.o"));

/// How long its reader sleeps when there is nothing to read.
const PAUSE: Duration = Duration::from_micros(500);

/// Attached until dropped.
pub(crate) struct Tracer {
    ebpf: Ebpf,
    stop: Arc<AtomicBool>,
    read: Arc<AtomicU64>,
    reader: Option<JoinHandle<()>>,
}

/// What a tracer saw.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) records: u64,
    /// Records that found no room.
    pub(crate) lost: u64,
}

impl Tracer {
    /// Traces the system calls of one pid namespace.
    pub(crate) fn load(pid_ns_inode: u64) -> Result<Self> {
        let namespace = u32::try_from(pid_ns_inode).context("no inode of a namespace")?;
        let btf = Btf::from_sys_fs()?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("PID_NS", &namespace, true)
            .load(OBJECT)
            .context("loading the tracer")?;
        for (name, tracepoint) in [("ref_enter", "sys_enter"), ("ref_exit", "sys_exit")] {
            let program = ebpf.program_mut(name).context("no such program")?;
            let program: &mut RawTracePoint = program.try_into()?;
            program.load()?;
            program.attach(tracepoint)?;
        }
        let ring: Map = ebpf.take_map("CALLS").context("no ring")?;
        let mut ring = RingBuf::try_from(ring)?;
        let (stop, read) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (stopped, count): (_, Arc<AtomicU64>) = (stop.clone(), Arc::clone(&read));
        let reader = std::thread::Builder::new()
            .name("tracer".into())
            .spawn(move || {
                loop {
                    let mut got = 0u64;
                    while let Some(record) = ring.next() {
                        // Touched, as a tool that looks at it would.
                        got += u64::from(record.iter().fold(0u8, |a, b| a ^ b) != 0) | 1;
                    }
                    count.fetch_add(got, Ordering::Relaxed);
                    if got == 0 {
                        if stopped.load(Ordering::Relaxed) {
                            return;
                        }
                        std::thread::sleep(PAUSE);
                    }
                }
            })?;
        Ok(Self {
            ebpf,
            stop,
            read,
            reader: Some(reader),
        })
    }

    /// Ends it.
    pub(crate) fn finish(mut self) -> Result<Seen> {
        self.end();
        let lost = self.ebpf.map("LOST").context("no counter")?;
        let lost: PerCpuArray<_, u64> = lost.try_into()?;
        let lost = lost.get(&0, 0)?.iter().sum();
        let records = self.read.load(Ordering::Relaxed);
        Ok(Seen { records, lost })
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.end();
    }
}
