//! The processes: their memory, page by page, and what the kernel keeps for them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use tidepool_inspector::pid_ns_inode;

use super::Digest;

/// A process other than the first: its host id and its start.
pub type ProcessId = (u32, u64);

/// A page, everywhere this runs.
const PAGE: usize = 4096;

/// A process at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// State, parent, mappings, and the contents of all private pages and of shared ones without a file.
    pub memory: Digest,
    /// What the kernel keeps for it, which others can change while it does not run.
    pub kernel: BTreeMap<String, String>,
}

/// The living processes of a sandbox but its first.
pub(super) fn read(init: u32) -> io::Result<BTreeMap<ProcessId, Process>> {
    let namespace = pid_ns_inode(init)?;
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // One that has ended has no namespace any more.
        if pid == init || !pid_ns_inode(pid).is_ok_and(|ns| ns == namespace) {
            continue;
        }
        let gone = |e: &io::Error| {
            e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
        };
        match process(pid) {
            Ok(Some((start, process))) => {
                found.insert((pid, start), process);
            }
            Ok(None) => {}
            Err(e) if gone(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// Start and contents of a process, if it lives.
fn process(pid: u32) -> io::Result<Option<(u64, Process)>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    // Counted from the third field of the file, which is the state.
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or("?");
    if matches!(field(3), "?" | "Z" | "X") {
        return Ok(None);
    }
    let start = field(22).parse().unwrap_or(0);
    let mut hash = blake3::Hasher::new();
    hash.update(field(3).as_bytes()).update(field(4).as_bytes());
    memory(pid, &mut hash)?;
    let mut kernel = kernel(pid)?;
    kernel.insert("nice".into(), field(19).into());
    let process = Process {
        memory: *hash.finalize().as_bytes(),
        kernel,
    };
    Ok(Some((start, process)))
}

fn memory(pid: u32, hash: &mut blake3::Hasher) -> io::Result<()> {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let pages = File::open(format!("/proc/{pid}/pagemap"))?;
    for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        // Not the names of what is mapped: other processes change those.
        let words: Vec<&str> = line.split_whitespace().collect();
        let word = |at: usize| words.get(at).copied().unwrap_or("");
        let (range, permissions, inode) = (word(0), word(1), word(4));
        hash.update(range.as_bytes()).update(permissions.as_bytes());
        let hex = |s| u64::from_str_radix(s, 16).ok();
        let Some((Some(from), Some(to))) = range.split_once('-').map(|(a, b)| (hex(a), hex(b)))
        else {
            continue;
        };
        let private = permissions.ends_with('p');
        let named = word(5);
        // The file's own contents are compared elsewhere, where it has a name; the kernel's own pages change by themselves.
        let without_file = inode == "0" || named.starts_with("/dev/zero");
        if named.starts_with("[v") || !private && !without_file {
            continue;
        }
        let count = ((to - from) as usize) / PAGE;
        let mut entries = vec![0u8; count * 8];
        let got = pages.read_at(&mut entries, from / PAGE as u64 * 8)?;
        let mut page = vec![0u8; PAGE];
        for (at, entry) in entries[..got].chunks_exact(8).enumerate() {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(entry);
            let entry = u64::from_le_bytes(bytes);
            let (present, swapped, of_a_file) = (
                entry >> 63 & 1 == 1,
                entry >> 62 & 1 == 1,
                entry >> 61 & 1 == 1,
            );
            // A private page that still is its file's, or none yet, is nobody's own.
            if !present && !swapped || private && of_a_file {
                continue;
            }
            hash.update(&(at as u64).to_le_bytes());
            match memory.read_at(&mut page, from + (at * PAGE) as u64) {
                Ok(n) => hash.update(&page[..n]),
                Err(_) => hash.update(b"unreadable"),
            };
        }
    }
    Ok(())
}

fn kernel(pid: u32) -> io::Result<BTreeMap<String, String>> {
    let text = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
    let mut found = BTreeMap::new();
    for line in text("status")?.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let kept = [
            "Name",
            "Umask",
            "Uid",
            "Gid",
            "Groups",
            "NSpgid",
            "NSsid",
            "SigPnd",
            "ShdPnd",
            "SigBlk",
            "SigIgn",
            "SigCgt",
            "CapEff",
            "Seccomp",
            "Cpus_allowed",
            "Threads",
        ];
        if kept.contains(&key) {
            found.insert(key.to_owned(), value.trim().to_owned());
        }
    }
    found.insert("limits".into(), text("limits")?);
    found.insert("oom".into(), text("oom_score_adj")?);
    for name in ["cwd", "root"] {
        let place = fs::metadata(format!("/proc/{pid}/{name}"));
        let place = place.map(|m| format!("{} {}", m.dev(), m.ino()));
        found.insert(name.into(), place.unwrap_or_default());
    }
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let fd = entry?.file_name().to_string_lossy().into_owned();
        let file = fs::metadata(format!("/proc/{pid}/fd/{fd}"));
        let file = file
            .map(|m| format!("{} {}", m.dev(), m.ino()))
            .unwrap_or_default();
        // Position, flags, locks, counters.
        let info = text(&format!("fdinfo/{fd}"))?;
        found.insert(format!("descriptor {fd}"), format!("{file} {info}"));
    }
    Ok(found)
}
