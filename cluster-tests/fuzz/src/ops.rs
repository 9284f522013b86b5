//! The operations, as a process of the sandbox carries them out. Errors are part of the program: most come from names that are not there.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, CWD, IFlags, Mode, OFlags, RenameFlags, Timespec, Timestamps};

use crate::child::last;
use crate::script::HELD;

/// Where the overlay is mounted a second time, inside.
pub(crate) const ELSEWHERE: &str = "/mnt";
/// Bytes of each mapping.
const MAPPED: usize = 8192;

struct Mapped {
    address: *mut u8,
    /// A store past its end would end the process.
    file: File,
    /// So would a store while this is not so.
    writable: bool,
}

/// What a process holds from one operation to the next. Inherited by the processes it makes.
#[derive(Default)]
pub(crate) struct Held {
    files: [Option<File>; HELD as usize],
    maps: [Option<Mapped>; HELD as usize],
    memory: Vec<u8>,
}

impl Held {
    pub(crate) fn operate(&mut self, words: &[&str]) -> Result<()> {
        let word = |i: usize| words.get(i).copied().context("too few words");
        let number = |i: usize| -> Result<u64> { Ok(word(i)?.parse()?) };
        let slot = |i: usize| -> Result<usize> { Ok((number(i)? % HELD) as usize) };
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
            "fifo" => {
                let path = CString::new(word(1)?)?;
                // SAFETY: a terminated string that outlives the call.
                let answer = unsafe { libc::mkfifo(path.as_ptr(), 0o644) };
                ensure!(answer == 0, "{}", last());
            }
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
            "shmwrite" => fs::write(shm(word(1)?), noise(number(2)?, number(3)?))?,
            "shmmap" => self.map(slot(1)?, rw(&shm(word(2)?))?)?,
            "shmremove" => fs::remove_file(shm(word(1)?))?,
            "makedelete" => {
                let path = format!("{}/gone-again", word(1)?);
                fs::write(&path, b"for a moment")?;
                fs::remove_file(path)?;
            }
            "touchrestore" => {
                let meta = fs::symlink_metadata(word(1)?)?;
                utimes(word(1)?, "77")?;
                set_times(word(1)?, meta.mtime(), meta.mtime_nsec())?;
            }
            "chmodrestore" => {
                let meta = fs::metadata(word(1)?)?;
                fs::set_permissions(word(1)?, PermissionsExt::from_mode(0o711))?;
                fs::set_permissions(word(1)?, meta.permissions())?;
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

    fn map(&mut self, at: usize, file: File) -> Result<()> {
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

    fn unmap(&mut self, at: usize) {
        if let Some(Mapped { address, .. }) = self.maps[at].take() {
            // SAFETY: the mapping was made with this length, and nothing refers to it any more.
            unsafe { libc::munmap(address.cast(), MAPPED) };
        }
    }

    /// Takes the right to write from a mapping, or gives it back. Pages keep what they were meanwhile.
    fn protect(&mut self, at: usize, protection: i32) -> Result<()> {
        let mapped = self.maps[at].as_mut().context("nothing mapped")?;
        // SAFETY: the mapping has this length, and nothing stores to it while it is not writable.
        let answer = unsafe { libc::mprotect(mapped.address.cast(), MAPPED, protection) };
        ensure!(answer == 0, "{}", last());
        mapped.writable = protection & libc::PROT_WRITE != 0;
        Ok(())
    }

    fn store(&self, at: usize, offset: usize, byte: u8) -> Result<()> {
        let mapped = self.maps[at].as_ref().context("nothing mapped")?;
        let (address, file) = (mapped.address, &mapped.file);
        let offset = offset % MAPPED;
        ensure!(mapped.writable, "not writable");
        ensure!(file.metadata()?.len() > offset as u64, "past the end");
        // SAFETY: within the mapping, and within the file, which nobody else shortens: operations run one at a time.
        unsafe { address.add(offset).write_volatile(byte) };
        Ok(())
    }
}

fn rw(path: &str) -> Result<File> {
    // Not blocking: a name may be that of a pipe.
    Ok(OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?)
}

fn ro(path: &str) -> Result<File> {
    let mut options = OpenOptions::new();
    Ok(options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?)
}

/// Makes a file or replaces its content.
fn write_all(path: &str, bytes: &[u8]) -> Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    let mut file = options.custom_flags(libc::O_NONBLOCK).open(path)?;
    Ok(file.write_all(bytes)?)
}

fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while (bytes.len() as u64) < len {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.extend(word.to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

fn shm(name: &str) -> String {
    format!("/dev/shm/{name}")
}

fn direct(path: &str, byte: u8) -> Result<()> {
    #[repr(align(4096))]
    struct Block([u8; 4096]);
    let block = Block([byte; 4096]);
    let flags = libc::O_DIRECT | libc::O_NONBLOCK;
    let mut options = OpenOptions::new();
    let mut file = options
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file.write_all(&block.0)?)
}

fn splice(path: &str) -> Result<()> {
    let (reader, mut writer) = std::io::pipe()?;
    writer.write_all(b"through a pipe")?;
    let to = rw(path)?;
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are open; no offsets are given.
    let moved = unsafe { libc::splice(reader.as_raw_fd(), none, to.as_raw_fd(), none, 14, 0) };
    ensure!(moved == 14, "{}", last());
    Ok(())
}

fn renameat(from: &str, to: &str, flags: RenameFlags) -> Result<()> {
    Ok(rustix::fs::renameat_with(CWD, from, CWD, to, flags)?)
}

fn utimes(path: &str, when: &str) -> Result<()> {
    match when {
        "now" => {
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: libc::UTIME_NOW,
            };
            let times = Timestamps {
                last_access: now,
                last_modification: now,
            };
            Ok(rustix::fs::utimensat(
                CWD,
                path,
                &times,
                AtFlags::SYMLINK_NOFOLLOW,
            )?)
        }
        seconds => set_times(path, seconds.parse()?, 5),
    }
}

fn set_times(path: &str, tv_sec: i64, tv_nsec: i64) -> Result<()> {
    let at = Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: at,
        last_modification: at,
    };
    Ok(rustix::fs::utimensat(
        CWD,
        path,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

fn set_xattr(path: &str, name: &str, value: &[u8]) -> Result<()> {
    let flags = rustix::fs::XattrFlags::empty();
    Ok(rustix::fs::lsetxattr(path, name, value, flags)?)
}

fn acl(path: &str, user: u32) -> Result<()> {
    // posix_acl_xattr: version 2, then tag, permissions, id of owner, user, group, mask and others.
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 4, user),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 4, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    set_xattr(path, "system.posix_acl_access", &acl)
}

/// Looks at everything in ways that change nothing.
fn read_all(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let meta = fs::symlink_metadata(&path)?;
        if meta.is_dir() {
            read_all(&path)?;
        } else if meta.is_file() {
            File::open(&path)?.read_to_end(&mut Vec::new())?;
        } else if meta.is_symlink() {
            fs::read_link(&path)?;
        }
    }
    Ok(())
}
