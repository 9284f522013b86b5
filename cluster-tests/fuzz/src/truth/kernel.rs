//! Objects of the kernel that no process needs to hold: System V IPC, message queues, mounts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Columns of `/proc/sysvipc` that are neither times nor who was last.
const TABLES: [(&str, &[usize]); 3] = [
    ("shm", &[0, 1, 2, 3, 7, 8, 9, 10]),
    ("sem", &[0, 1, 2, 3, 4, 5, 6, 7]),
    ("msg", &[0, 1, 2, 3, 4, 7, 8, 9, 10]),
];

/// System V objects and message queues, by name.
pub(super) fn objects(init: u32) -> io::Result<BTreeMap<String, String>> {
    let namespace = File::open(format!("/proc/{init}/ns/ipc"))?;
    // A thread of its own: this one must stay where it is.
    let read = move || -> io::Result<BTreeMap<String, String>> {
        let kind = LinkNameSpaceType::InterProcessCommunication;
        move_into_link_name_space(namespace.as_fd(), Some(kind))?;
        let mut found = BTreeMap::new();
        for (table, columns) in TABLES {
            let text = fs::read_to_string(Path::new("/proc/sysvipc").join(table))?;
            for line in text.lines().skip(1) {
                let words: Vec<&str> = line.split_whitespace().collect();
                let word = |at: usize| words.get(at).copied().unwrap_or("?");
                let mut value: Vec<String> = columns.iter().map(|c| word(*c).to_owned()).collect();
                if table == "sem"
                    && let Ok(id) = word(1).parse()
                {
                    // SAFETY: no further argument is needed for the value of one semaphore.
                    let now = unsafe { libc::semctl(id, 0, libc::GETVAL) };
                    value.push(now.to_string());
                }
                found.insert(format!("{table} {}", word(1)), value.join(" "));
            }
        }
        Ok(found)
    };
    let mut found = std::thread::spawn(read)
        .join()
        .map_err(|_| io::Error::other("the reader of IPC objects panicked"))??;
    for entry in fs::read_dir(format!("/proc/{init}/root/dev/mqueue"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        found.insert(format!("queue {name}"), fs::read_to_string(entry.path())?);
    }
    Ok(found)
}

/// Mounts of the sandbox: root, place, options, kind and source, by number.
pub(super) fn mounts(init: u32) -> io::Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(format!("/proc/{init}/mountinfo"))?;
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = words.first().copied().unwrap_or("?").to_owned();
        found.insert(number, words.get(2..).unwrap_or_default().join(" "));
    }
    Ok(found)
}
