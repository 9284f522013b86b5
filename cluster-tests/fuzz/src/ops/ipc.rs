//! System V objects and POSIX message queues: kernel objects with names, which outlive the processes that made them.

use std::ffi::CString;

use anyhow::{Context, Result, bail, ensure};

use crate::child::last;

/// Bytes of a shared segment.
const SEGMENT: usize = 8192;

/// Answers a call's result, or its error.
fn check(answer: i32) -> Result<i32> {
    ensure!(answer >= 0, "{}", last());
    Ok(answer)
}

pub(super) fn operate(words: &[&str]) -> Result<()> {
    let word = |i: usize| words.get(i).copied().context("too few words");
    let number = |i: usize| -> Result<i32> { Ok(word(i)?.parse()?) };
    let make = libc::IPC_CREAT | 0o600;
    match word(0)? {
        "segment" => {
            // SAFETY: no pointers.
            check(unsafe { libc::shmget(number(1)?, SEGMENT, make) })?;
        }
        "store" => {
            // SAFETY: no pointers.
            let id = check(unsafe { libc::shmget(number(1)?, SEGMENT, 0) })?;
            // SAFETY: at a place of the kernel's choice.
            let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
            ensure!(at as isize != -1, "{}", last());
            // SAFETY: within the segment, which is this size; then it is let go.
            unsafe {
                at.cast::<u8>()
                    .add(number(2)? as usize % SEGMENT)
                    .write_volatile(number(3)? as u8);
                libc::shmdt(at);
            }
        }
        "unsegment" => {
            // SAFETY: removal takes no structure.
            unsafe {
                let id = check(libc::shmget(number(1)?, SEGMENT, 0))?;
                check(libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()))?;
            }
        }
        "semaphore" => {
            // SAFETY: no pointers.
            let id = check(unsafe { libc::semget(number(1)?, 1, make) })?;
            let mut up = libc::sembuf {
                sem_num: 0,
                sem_op: 1,
                sem_flg: libc::IPC_NOWAIT as i16,
            };
            // SAFETY: one operation in an array of one.
            check(unsafe { libc::semop(id, &raw mut up, 1) })?;
        }
        "unsemaphore" => {
            // SAFETY: removal takes no further argument.
            unsafe {
                let id = check(libc::semget(number(1)?, 1, 0))?;
                check(libc::semctl(id, 0, libc::IPC_RMID))?;
            }
        }
        "message" => {
            // SAFETY: no pointers.
            let id = check(unsafe { libc::msgget(number(1)?, make) })?;
            let message = [1u64, number(2)? as u64];
            let at = message.as_ptr().cast();
            // SAFETY: a type and eight bytes, as said.
            check(unsafe { libc::msgsnd(id, at, 8, libc::IPC_NOWAIT) })?;
        }
        "unmessage" => {
            // SAFETY: removal takes no structure.
            unsafe {
                let id = check(libc::msgget(number(1)?, 0))?;
                check(libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()))?;
            }
        }
        "queue" => {
            let name = queue(word(1)?)?;
            let flags = libc::O_CREAT | libc::O_RDWR | libc::O_NONBLOCK;
            let attributes = std::ptr::null_mut::<libc::mq_attr>();
            // SAFETY: a terminated name; no attributes are the kernel's own.
            let at = check(unsafe { libc::mq_open(name.as_ptr(), flags, 0o600, attributes) })?;
            let byte = number(2)? as u8;
            // SAFETY: one byte; then it is closed.
            let sent = unsafe { libc::mq_send(at, (&raw const byte).cast(), 1, 0) };
            // SAFETY: as above.
            unsafe { libc::mq_close(at) };
            check(sent)?;
        }
        "unqueue" => {
            let name = queue(word(1)?)?;
            // SAFETY: a terminated name.
            check(unsafe { libc::mq_unlink(name.as_ptr()) })?;
        }
        // All of these for a moment.
        "passing" => {
            for (make, end) in [
                (["segment", "77"], ["unsegment", "77"]),
                (["semaphore", "77"], ["unsemaphore", "77"]),
            ] {
                operate(&make)?;
                operate(&end)?;
            }
        }
        other => bail!("no such operation on IPC: {other}"),
    }
    Ok(())
}

fn queue(name: &str) -> Result<CString> {
    Ok(CString::new(format!("/{name}"))?)
}
