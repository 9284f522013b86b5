//! Shared writable mappings of a sandbox's files.
//!
//! A page of such a mapping that is writable already takes stores without any event. A caller either
//! treats the file as dirty at every turn, or re-arms it (see [`crate::rearm`]) while the sandbox is frozen.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::{Inspector, InspectorError, SandboxSlot};

/// Maps files larger than this are refused (65536 mappings, the kernel's default limit, are about 8 MiB).
const MAX_MAPS: u64 = 256 << 20;

/// A file mapped shared and writable.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SharedMapping {
    /// Process, on the host.
    pub pid: u32,
    /// Path as the sandbox sees it, starting with `/`. Also of memory filesystems, memfds and System V segments (`/SYSV...`).
    pub path: PathBuf,
    /// Whether the name is gone (always so for memfds and System V segments).
    pub deleted: bool,
}

/// Shared writable file mappings of one process; empty if it is gone.
///
/// # Errors
/// If the process may not be looked at.
pub fn shared_writable_mappings(pid: u32) -> io::Result<Vec<SharedMapping>> {
    let all = shared_mappings(pid)?.into_iter();
    let all: BTreeSet<_> = all.filter(|m| m.writable).map(|m| m.mapping).collect();
    Ok(all.into_iter().collect())
}

/// A shared mapping at its place.
#[derive(Debug)]
pub(crate) struct Mapped {
    /// The address range as `/proc` writes it.
    pub(crate) range: String,
    /// Whether it can be stored to as it is. One that cannot may be given that right later, and pages that were stored to before then take
    /// stores without an event.
    pub(crate) writable: bool,
    pub(crate) mapping: SharedMapping,
}

/// All shared file mappings of one process, writable or not; none if it is gone.
pub(crate) fn shared_mappings(pid: u32) -> io::Result<Vec<Mapped>> {
    let mut text = Vec::new();
    let read = fs::File::open(format!("/proc/{pid}/maps"))
        .and_then(|file| file.take(MAX_MAPS).read_to_end(&mut text));
    match read {
        Ok(got) if got as u64 == MAX_MAPS => {
            return Err(io::Error::other("the list of mappings is too long"));
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(e),
    }
    let mut found = Vec::new();
    for line in text.split(|b| *b == b'\n') {
        let Some((range, writable, name)) = shared(line) else {
            continue;
        };
        // A newline in a name is shown as \012, just like a name that contains these four characters; the link tells.
        let name = if name.contains(&b'\\') {
            match fs::read_link(format!("/proc/{pid}/map_files/{range}")) {
                Ok(link) => link.into_os_string().into_vec(),
                Err(_) => name.to_vec(),
            }
        } else {
            name.to_vec()
        };
        let (name, deleted) = match name.strip_suffix(b" (deleted)") {
            Some(rest) => (rest.to_vec(), true),
            None => (name, false),
        };
        let mapping = SharedMapping {
            pid,
            path: PathBuf::from(OsString::from_vec(name)),
            deleted,
        };
        found.push(Mapped {
            range: range.to_owned(),
            writable,
            mapping,
        });
    }
    Ok(found)
}

/// Shared writable file mappings of all processes of a sandbox, each path once (with one of its processes).
///
/// # Errors
/// [`InspectorError::UnknownSlot`], or a process that may not be looked at: then nothing can be ruled out.
pub fn shared_writable_mappings_of(
    inspector: &Inspector,
    slot: SandboxSlot,
) -> Result<Vec<SharedMapping>, InspectorError> {
    let pids: BTreeSet<u32> = inspector
        .tasks(slot)?
        .tasks
        .iter()
        .filter(|t| !t.exited)
        .map(|t| t.tgid)
        .collect();
    let mut seen = BTreeSet::new();
    let mut all = Vec::new();
    for pid in pids {
        let mappings = shared_writable_mappings(pid).map_err(|source| InspectorError::Kernel {
            what: "the mappings of a process cannot be read",
            source,
        })?;
        all.extend(
            mappings
                .into_iter()
                .filter(|m| seen.insert((m.path.clone(), m.deleted))),
        );
    }
    Ok(all)
}

/// The address range of a line of a maps file, whether it is writable, and the name, if it is a shared mapping of a file.
fn shared(line: &[u8]) -> Option<(&str, bool, &[u8])> {
    // range, permissions, offset, device, inode; then blanks; then the name, which may contain blanks.
    let mut rest = line;
    let mut fields = [&b""[..]; 5];
    for field in &mut fields {
        let end = rest.iter().position(|b| *b == b' ')?;
        (*field, rest) = (&rest[..end], &rest[end + 1..]);
    }
    let permissions = fields[1];
    if permissions.get(3) != Some(&b's') {
        return None;
    }
    let writable = permissions.get(1) == Some(&b'w');
    let name = rest.trim_ascii_start();
    name.starts_with(b"/").then_some(())?;
    Some((std::str::from_utf8(fields[0]).ok()?, writable, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_files_count() {
        let line = b"7f0-7f1 rw-s 00000000 fe:00 1234                       /data/a b.db";
        assert_eq!(shared(line), Some(("7f0-7f1", true, &b"/data/a b.db"[..])));
        assert_eq!(
            shared(b"7f0-7f1 r--s 00000000 fe:00 1234    /data/a"),
            Some(("7f0-7f1", false, &b"/data/a"[..]))
        );
        for other in [
            &b"7f0-7f1 rw-p 00000000 fe:00 1234    /data/a"[..],
            b"7f0-7f1 rw-s 00000000 00:0e 1234    anon_inode:[io_uring]",
            b"7f0-7f1 rw-p 00000000 00:00 0 ",
            b"7f0-7f1",
            b"",
        ] {
            assert_eq!(shared(other), None, "{:?}", String::from_utf8_lossy(other));
        }
    }

    #[test]
    fn a_process_that_is_gone_has_no_mappings() {
        assert_eq!(
            shared_writable_mappings(u32::MAX / 4).expect("readable"),
            []
        );
    }
}
