//! Shared mappings of files, and the ways to change what is mapped.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, bail, ensure};

use super::Held;
use crate::child::last;

/// Bytes of each mapping.
const MAPPED: usize = 8192;

pub(super) struct Mapped {
    address: *mut u8,
    /// A store past its end would end the process.
    file: File,
    /// So would a store while this is not so.
    writable: bool,
}

impl Held {
    pub(super) fn map(&mut self, at: usize, file: File) -> Result<()> {
        if file.metadata()?.len() < MAPPED as u64 {
            file.set_len(MAPPED as u64)?;
        }
        self.unmap(at);
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MAPPED,
                protection,
                flags,
                file.as_raw_fd(),
                0,
            )
        };
        ensure!(address != libc::MAP_FAILED, "{}", last());
        self.maps[at] = Some(Mapped {
            address: address.cast(),
            file,
            writable: true,
        });
        Ok(())
    }

    pub(super) fn unmap(&mut self, at: usize) {
        if let Some(Mapped { address, .. }) = self.maps[at].take() {
            // SAFETY: the mapping was made with this length, and nothing refers to it any more.
            unsafe { libc::munmap(address.cast(), MAPPED) };
        }
    }

    /// Takes the right to write from a mapping, or gives it back. Pages keep what they were meanwhile.
    pub(super) fn protect(&mut self, at: usize, protection: i32) -> Result<()> {
        let mapped = self.maps[at].as_mut().context("nothing mapped")?;
        // SAFETY: the mapping has this length, and nothing stores to it while it is not writable.
        let answer = unsafe { libc::mprotect(mapped.address.cast(), MAPPED, protection) };
        ensure!(answer == 0, "{}", last());
        mapped.writable = protection & libc::PROT_WRITE != 0;
        Ok(())
    }

    pub(super) fn store(&self, at: usize, offset: usize, byte: u8) -> Result<()> {
        let mapped = self.maps[at].as_ref().context("nothing mapped")?;
        let (address, file) = (mapped.address, &mapped.file);
        let offset = offset % MAPPED;
        ensure!(mapped.writable, "not writable");
        ensure!(file.metadata()?.len() > offset as u64, "past the end");
        // SAFETY: within the mapping, and within the file, which nobody else shortens: operations run one at a time.
        unsafe { address.add(offset).write_volatile(byte) };
        Ok(())
    }

    /// Changes a mapped file in a way that is no plain store.
    pub(super) fn change_mapped(&mut self, how: &str, at: usize, byte: u8) -> Result<()> {
        let mapped = self.maps[at].as_mut().context("nothing mapped")?;
        ensure!(mapped.writable, "not writable");
        let len = mapped.file.metadata()?.len();
        ensure!(len >= MAPPED as u64, "past the end");
        let offset = usize::from(byte) * 31 % MAPPED;
        // SAFETY: within the mapping.
        let place = unsafe { mapped.address.add(offset) };
        match how {
            // To another address, with its pages as they are; then a store.
            "move" => {
                let fresh = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let none = std::ptr::null_mut::<libc::c_void>();
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                // SAFETY: a place of the kernel's choice, which the move then replaces.
                let to = unsafe { libc::mmap(none, MAPPED, libc::PROT_NONE, flags, -1, 0) };
                ensure!(to != libc::MAP_FAILED, "{}", last());
                let from = mapped.address.cast();
                // SAFETY: both are this process's own, of this length, and nothing else refers to them.
                let moved = unsafe { libc::mremap(from, MAPPED, MAPPED, fresh, to) };
                ensure!(moved != libc::MAP_FAILED, "{}", last());
                mapped.address = moved.cast();
                self.store(at, offset, byte)
            }
            // A hole, made through the mapping.
            "remove" => {
                // SAFETY: one page within the mapping.
                let answer =
                    unsafe { libc::madvise(mapped.address.cast(), 4096, libc::MADV_REMOVE) };
                ensure!(answer == 0, "{}", last());
                Ok(())
            }
            // By the kernel, on behalf of a write to memory as a file.
            "through-proc" => {
                let mut memory = std::fs::OpenOptions::new()
                    .write(true)
                    .open("/proc/self/mem")?;
                memory.seek(SeekFrom::Start(place as u64))?;
                Ok(memory.write_all(&[byte])?)
            }
            // By the kernel, as what a read returns.
            "by-reading" => {
                let (reader, mut writer) = std::io::pipe()?;
                writer.write_all(&[byte])?;
                // SAFETY: one byte within the mapping.
                let got = unsafe { libc::read(reader.as_raw_fd(), place.cast(), 1) };
                ensure!(got == 1, "{}", last());
                Ok(())
            }
            // By the device, past the page tables: the pages are held, not faulted, when it stores.
            "by-device" => {
                let flags = libc::O_DIRECT;
                let path = "from-device";
                std::fs::write(path, [byte; 4096])?;
                let file = std::fs::OpenOptions::new()
                    .read(true)
                    .custom_flags(flags)
                    .open(path)?;
                file.sync_all()?;
                // SAFETY: one page within the mapping, at its start.
                let got = unsafe { libc::read(file.as_raw_fd(), mapped.address.cast(), 4096) };
                ensure!(got == 4096, "{}", last());
                Ok(())
            }
            // By another process's call on this one's memory; here its own.
            "by-call" => {
                let value = [byte];
                let from = libc::iovec {
                    iov_base: value.as_ptr().cast_mut().cast(),
                    iov_len: 1,
                };
                let to = libc::iovec {
                    iov_base: place.cast(),
                    iov_len: 1,
                };
                // SAFETY: a byte of this frame and one within the mapping.
                let got = unsafe {
                    libc::process_vm_writev(libc::getpid(), &raw const from, 1, &raw const to, 1, 0)
                };
                ensure!(got == 1, "{}", last());
                Ok(())
            }
            _ => bail!("no such way: {how}"),
        }
    }
}
