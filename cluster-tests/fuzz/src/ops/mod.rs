//! The operations, as a process of the sandbox carries them out. Errors are part of the program: most come from names that are not there.

mod files;
mod ipc;
mod maps;
mod memory;
mod others;
mod own;

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, CWD, IFlags, Mode, OFlags, RenameFlags};

use self::files::{
    acl, behind_times, direct, fifo, noise, read_all, renameat, ro, rw, same_bytes, set_xattr, shm,
    splice, there_and_back, utimes, write_all,
};
use self::maps::Mapped;
use crate::child::last;
use crate::script::{HELD, SLOTS};

/// Where the overlay is mounted a second time, inside.
pub(crate) const ELSEWHERE: &str = "/mnt";
/// What a process holds from one operation to the next. Inherited by the processes it makes.
#[derive(Default)]
pub(crate) struct Held {
    files: [Option<File>; HELD as usize],
    maps: [Option<Mapped>; HELD as usize],
    memory: Vec<u8>,
    own: own::Own,
    /// Of the slots. Only the first process's is up to date, and what it makes at a time.
    pub(crate) pids: [i32; SLOTS],
}

impl Held {
    pub(crate) fn operate(&mut self, words: &[&str]) -> Result<()> {
        let word = |i: usize| words.get(i).copied().context("too few words");
        let number = |i: usize| -> Result<u64> { Ok(word(i)?.parse()?) };
        let slot = |i: usize| -> Result<usize> { Ok((number(i)? % HELD) as usize) };
        match words {
            ["shm", rest @ ..] => return memory::operate(rest),
            ["mount", rest @ ..] => return memory::mounts(rest),
            ["ipc", rest @ ..] => return ipc::operate(rest),
            ["own", rest @ ..] => return self.own(rest),
            ["other", rest @ ..] => return others::operate(&self.pids, rest),
            ["back", what, path, dir] => return there_and_back(what, path, dir),
            _ => {}
        }
        match word(0)? {
            "nothing" | "loop" | "halt" => {}
            "memory" => self.memory = vec![number(1)? as u8; 20_000],
            "readall" => read_all(Path::new("."))?,
            "write" => write_all(word(1)?, &noise(number(2)?, number(3)?))?,
            "append" => OpenOptions::new()
                .append(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(word(1)?)?
                .write_all(&noise(number(2)?, number(3)?))?,
            "patch" => rw(word(1)?)?.write_all_at(&noise(number(3)?, number(4)?), number(2)?)?,
            "twice" => {
                let file = rw(word(1)?)?;
                file.write_all_at(b"once", 0)?;
                file.write_all_at(&noise(5, number(2)?), 0)?;
            }
            "truncate" => rw(word(1)?)?.set_len(number(2)?)?,
            "fallocate" => {
                let mode = number(2)? as i32;
                // Punching keeps the size by definition; the others are as given.
                let file = rw(word(1)?)?;
                // SAFETY: no pointers.
                let answer = unsafe {
                    libc::fallocate(file.as_raw_fd(), mode, number(3)? as i64, number(4)? as i64)
                };
                ensure!(answer == 0, "{}", last());
            }
            "direct" => direct(word(1)?, number(2)? as u8)?,
            "splice" => splice(word(1)?)?,
            "sendfile" => {
                let (from, to) = (ro(word(1)?)?, rw(word(2)?)?);
                rustix::fs::sendfile(&to, &from, None, 3000)?;
            }
            "copyrange" => {
                let (from, to) = (ro(word(1)?)?, rw(word(2)?)?);
                rustix::fs::copy_file_range(&from, None, &to, None, 5000)?;
            }
            "symlink" => symlink(word(1)?, word(2)?)?,
            "fifo" => fifo(word(1)?)?,
            "mkdir" => fs::create_dir_all(word(1)?)?,
            "rmdir" => fs::remove_dir(word(1)?)?,
            "removetree" => {
                ensure!(word(1)? != ".", "not the root");
                fs::remove_dir_all(word(1)?)?;
            }
            "unlink" => fs::remove_file(word(1)?)?,
            "rename" => fs::rename(word(1)?, word(2)?)?,
            "exchange" => renameat(word(1)?, word(2)?, RenameFlags::EXCHANGE)?,
            "whiteout" => renameat(word(1)?, word(2)?, RenameFlags::WHITEOUT)?,
            "link" => fs::hard_link(word(1)?, word(2)?)?,
            "chmod" => fs::set_permissions(word(1)?, PermissionsExt::from_mode(number(2)? as u32))?,
            "chown" => std::os::unix::fs::lchown(
                word(1)?,
                Some(number(2)? as u32),
                Some(number(3)? as u32),
            )?,
            "utimes" => utimes(word(1)?, word(2)?)?,
            "setxattr" => set_xattr(word(1)?, word(2)?, word(3)?.as_bytes())?,
            "rmxattr" => rustix::fs::lremovexattr(word(1)?, word(2)?)?,
            "acl" => acl(word(1)?, number(2)? as u32)?,
            "flags" => {
                let file = ro(word(1)?)?;
                let settable = IFlags::NODUMP | IFlags::NOATIME;
                let wanted = IFlags::from_bits_retain(number(2)? as _) & settable;
                let now = rustix::fs::ioctl_getflags(&file)?;
                rustix::fs::ioctl_setflags(&file, (now - settable) | wanted)?;
            }
            "tmpfile" => {
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                let file = rustix::fs::open(word(2)?, flags, Mode::from_raw_mode(0o644))?;
                let file = File::from(file);
                file.write_all_at(&noise(9000, number(3)?), 0)?;
                self.files[slot(1)?] = Some(file);
            }
            "linkheld" => {
                let file = self.file(slot(1)?)?;
                rustix::fs::linkat(file, "", CWD, word(2)?, AtFlags::EMPTY_PATH)?;
            }
            "open" => self.files[slot(1)?] = Some(rw(word(2)?)?),
            "heldwrite" => self
                .file(slot(1)?)?
                .write_all_at(&noise(9, number(3)?), number(2)?)?,
            "heldtruncate" => self.file(slot(1)?)?.set_len(number(2)?)?,
            "heldchmod" => self
                .file(slot(1)?)?
                .set_permissions(PermissionsExt::from_mode(number(2)? as u32))?,
            "close" => self.files[slot(1)?] = None,
            "fsync" => rw(word(1)?)?.sync_all()?,
            "map" => self.map(slot(1)?, rw(word(2)?)?)?,
            "mapelsewhere" => self.map(slot(1)?, rw(&format!("{ELSEWHERE}/{}", word(2)?))?)?,
            "device" => {
                let path = CString::new(word(1)?)?;
                // Null, zero or full: nothing that could act, even where the mount did not forbid its use.
                let minor = number(2)? as u32;
                ensure!(matches!(minor, 3 | 5 | 7), "not that device");
                let device = libc::makedev(1, minor);
                // SAFETY: a terminated string that outlives the call.
                let answer = unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o600, device) };
                ensure!(answer == 0, "{}", last());
            }
            "socket" => drop(std::os::unix::net::UnixListener::bind(word(1)?)?),
            "mapheld" => {
                let file = self.file(slot(2)?)?.try_clone()?;
                self.map(slot(1)?, file)?;
            }
            "store" => self.store(slot(1)?, number(2)? as usize, number(3)? as u8)?,
            "unmap" => self.unmap(slot(1)?),
            "lock" => self.protect(slot(1)?, libc::PROT_READ)?,
            "hide" => self.protect(slot(1)?, libc::PROT_NONE)?,
            "unlockstore" => {
                let at = slot(1)?;
                self.protect(at, libc::PROT_READ | libc::PROT_WRITE)?;
                self.store(at, number(2)? as usize, number(3)? as u8)?;
            }
            "shmmap" => self.map(slot(1)?, rw(&shm(word(2)?))?)?,
            "samebytes" => same_bytes(word(1)?)?,
            "behind" => behind_times(word(1)?, number(2)? as u8)?,
            "mapped" => self.change_mapped(word(1)?, slot(2)?, number(3)? as u8)?,
            "heldxattr" => {
                let value = [number(2)? as u8];
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::fsetxattr(self.file(slot(1)?)?, "user.k1", &value, flags)?;
            }
            "program" => {
                let status = std::process::Command::new(word(1)?)
                    .stdin(std::process::Stdio::null())
                    .stdout(std::process::Stdio::null())
                    .status()?;
                ensure!(status.success(), "{status}");
            }
            "chain" => self.chain(word(1)?, number(2)?)?,
            other => bail!("no such operation: {other}"),
        }
        Ok(())
    }

    fn file(&self, at: usize) -> Result<&File> {
        self.files[at].as_ref().context("nothing held")
    }

    /// A file that is made, opened, mapped, moved, linked and stored to, all at once: names that meet by chance do this too rarely.
    fn chain(&mut self, path: &str, byte: u64) -> Result<()> {
        write_all(path, &noise(9000, byte))?;
        self.map(3, rw(path)?)?;
        self.files[3] = Some(rw(path)?);
        let other = format!("{path}{}", byte % 3);
        match byte % 4 {
            0 => fs::rename(path, &other)?,
            1 => fs::hard_link(path, &other)?,
            2 => {
                let _ = fs::remove_file(&other);
                fs::hard_link(path, &other)?;
                fs::remove_file(path)?;
            }
            _ => {}
        }
        self.store(3, 0, byte as u8)
    }

    /// One round of work that nobody waits for. Only on files of its own, which nothing else shortens while they are stored to.
    pub(crate) fn work_on(&mut self, name: &str, round: u64) -> Result<()> {
        let (path, other) = (format!("loop-{name}"), format!("d0/loop-{name}"));
        let byte = round as u8;
        match round % 64 {
            1 => {
                write_all(&path, &noise(9000, round))?;
                self.map(1, rw(&path)?)?;
            }
            n if n % 9 == 0 => rw(&path)?.write_all_at(&[byte; 3], round % 8000)?,
            10 | 40 => fs::rename(&path, &other)?,
            11 | 50 => fs::rename(&other, &path)?,
            20 => set_xattr(&path, "user.k0", &[byte])?,
            21 => fs::set_permissions(&path, PermissionsExt::from_mode(0o600 + round as u32 % 8))?,
            30 => {
                fs::hard_link(&path, &other)?;
                fs::remove_file(&path)?;
            }
            31 => fs::rename(&other, &path)?,
            _ => self.store(1, (round * 97) as usize, byte)?,
        }
        Ok(())
    }
}
