//! The memory file system `/dev/shm` in all the ways of a file system, and mounts made inside.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use super::files::{noise, rw, same_bytes, set_times, set_xattr, shm, there_and_back, utimes};

pub(super) fn operate(words: &[&str]) -> Result<()> {
    let word = |i: usize| words.get(i).copied().context("too few words");
    let number = |i: usize| -> Result<u64> { Ok(word(i)?.parse()?) };
    let path = |i: usize| -> Result<String> { Ok(shm(word(i)?)) };
    match word(0)? {
        "write" => fs::write(path(1)?, noise(number(2)?, number(3)?))?,
        "patch" => rw(&path(1)?)?.write_all_at(&noise(3, number(3)?), number(2)?)?,
        "truncate" => rw(&path(1)?)?.set_len(number(2)?)?,
        "remove" => {
            let path = path(1)?;
            match fs::symlink_metadata(&path)?.is_dir() {
                true => fs::remove_dir_all(path)?,
                false => fs::remove_file(path)?,
            }
        }
        "mkdir" => fs::create_dir(path(1)?)?,
        "rename" => fs::rename(path(1)?, path(2)?)?,
        "link" => fs::hard_link(path(1)?, path(2)?)?,
        "symlink" => symlink(word(1)?, path(2)?)?,
        "chmod" => fs::set_permissions(path(1)?, PermissionsExt::from_mode(number(2)? as u32))?,
        "chown" => std::os::unix::fs::lchown(path(1)?, Some(number(2)? as u32), None)?,
        "utimes" => utimes(&path(1)?, word(2)?)?,
        "xattr" => set_xattr(&path(1)?, "user.k0", word(2)?.as_bytes())?,
        "samebytes" => same_bytes(&path(1)?)?,
        "behind" => {
            let path = path(1)?;
            let meta = fs::metadata(&path)?;
            rw(&path)?.write_all_at(&[number(2)? as u8], 0)?;
            set_times(&path, meta.mtime(), meta.mtime_nsec())?;
        }
        "back" => there_and_back(word(1)?, &path(2)?, "/dev/shm")?,
        // As the C library keeps a named semaphore: a file whose first word is its value.
        "post" => {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(shm(&format!("sem.{}", word(1)?)))?;
            let mut value = [0; 8];
            let _ = file.read_exact_at(&mut value, 0);
            file.write_all_at(&(u64::from_le_bytes(value) + 1).to_le_bytes(), 0)?;
        }
        other => bail!("no such operation on memory: {other}"),
    }
    Ok(())
}

/// Mounts in the sandbox's own mount namespace.
pub(super) fn mounts(words: &[&str]) -> Result<()> {
    match words {
        ["tmpfs", dir] => {
            fs::create_dir_all(dir)?;
            mount("tp-inner", *dir, "tmpfs", MountFlags::NOATIME, None)?;
        }
        ["bind", from, to] => {
            fs::create_dir_all(to)?;
            mount_bind(*from, *to)?;
        }
        ["away", dir] => unmount(*dir, UnmountFlags::DETACH)?,
        _ => bail!("no such operation on mounts: {words:?}"),
    }
    Ok(())
}
