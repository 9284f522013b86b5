//! The domain's key file: 32 random bytes, made at first start, readable by root only.
//!
//! Losing it loses every checkpoint of the domain: names and seals derive from it. It is written once, synced, then renamed into place, and never overwritten.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use tidepool_proto::DomainKey;

use crate::error::{Context, HostError, Result};

/// The key at `path`, made where there is none.
pub fn load_or_create(path: &Path) -> Result<DomainKey> {
    match fs::read(path) {
        Ok(bytes) => {
            let key: [u8; 32] = bytes.try_into().map_err(|_| {
                HostError::new(
                    tidepool_proto::ErrorKind::Corruption,
                    format!(
                        "{} is not a domain key of 32 bytes; restore it from a copy",
                        path.display()
                    ),
                )
            })?;
            Ok(DomainKey::new(key))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let key: [u8; 32] = rand::random();
            write_synced(path, &key, 0o600)?;
            Ok(DomainKey::new(key))
        }
        Err(e) => Err(e).context(format!("reading {}", path.display())),
    }
}

/// Writes a file so that after a crash it is whole or absent (or as it was): temporary file, sync, rename, sync of the directory.
pub fn write_synced(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let tmp = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&tmp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&tmp, path)?;
        fs::File::open(dir)?.sync_all()
    };
    write().context(format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("domain.key");
        let key = load_or_create(&path).unwrap();
        assert_eq!(load_or_create(&path).unwrap(), key);
        fs::write(&path, b"short").unwrap();
        let e = load_or_create(&path).unwrap_err();
        assert_eq!(e.kind, tidepool_proto::ErrorKind::Corruption);
        assert_eq!(fs::read(&path).unwrap(), b"short");
    }
}
