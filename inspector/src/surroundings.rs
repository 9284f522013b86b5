//! What processes of a sandbox can notice that is neither in its files nor in their memory, read from outside: mounts, network configuration, connections to
//! outside, and the kernel objects that processes hold.
//!
//! A process that does not run can be changed all the same: another writes into a pipe it has open, changes its terminal or its limits, sends
//! it a signal that it blocks, connects to a socket on which it listens. None of that moves a counter of the scheduler. So at each boundary these are
//! read and compared with the reading before. Reading changes none of them: descriptors are duplicated, contents are peeked at.
//!
//! Invariant: what cannot be read is said in [`Surroundings::unsure`] and counts as changed.
//!
//! Elsewhere: memory-backed files and System V objects ([`crate::memory`]), objects one by one ([`crate::objects`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use serde::{Deserialize, Serialize};

use crate::memory::unescape;
use crate::objects::{Connections, Reader};
use crate::procfs::{directory, link_at, read_whole};

/// Longest entry kept, in bytes.
const MAX_TEXT: usize = 512;
/// Entries of one kind.
const MAX_ENTRIES: usize = 4096;

/// One reading.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Surroundings {
    /// Mount points with what is mounted there, of the first process and of every process in a mount namespace of its own.
    pub mounts: BTreeSet<String>,
    /// Interfaces, addresses and routes. Not in a checkpoint: a restore makes the network anew.
    pub network: BTreeSet<String>,
    /// Namespaces of the first process, and those of others that are not the same, by process.
    pub namespaces: BTreeSet<String>,
    /// What each process holds in the kernel: `pid thing` and its state.
    pub objects: BTreeMap<String, String>,
    /// Established connections to outside that its processes hold. Not in a checkpoint: a restore closes them.
    pub outside: BTreeSet<String>,
    /// Why something could not be read.
    pub unsure: Option<String>,
}

/// What an earlier reading says of processes that have not run since.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rested<'a> {
    pub(crate) earlier: &'a Surroundings,
    pub(crate) pids: &'a BTreeSet<u32>,
}

impl Rested<'_> {
    /// Whether a process is surely in the namespaces of the first one still: it was, when it was last read to its end, and only a process that runs gets into others.
    fn as_the_first(&self, pid: u32, first: &BTreeMap<String, String>) -> bool {
        let own = |n: &String| n.ends_with(&of_process(pid));
        let unmoved = || {
            let mut first = first.iter();
            first.all(|(kind, name)| self.earlier.namespaces.contains(&of_first(kind, name)))
        };
        self.pids.contains(&pid)
            && self.earlier.unsure.is_none()
            && self.earlier.objects.contains_key(&process_key(pid))
            && !self.earlier.namespaces.iter().any(own)
            && unmoved()
    }
}

impl Surroundings {
    /// Reads those of the sandbox whose first process is `init`, with the objects of `pids` (host process ids). Processes that end meanwhile are left out.
    #[must_use]
    pub fn read(init: u32, pids: &BTreeSet<u32>) -> Self {
        match mount_table(init) {
            Ok(table) => Self::again(init, pids, &table, None),
            Err(e) => Self::unreadable(&e),
        }
    }

    /// As [`Self::read`], with the first process's mount table at hand.
    pub(crate) fn again(
        init: u32,
        pids: &BTreeSet<u32>,
        mounts: &[u8],
        rested: Option<Rested<'_>>,
    ) -> Self {
        let mut found = Self::default();
        if let Err(e) = found.all(init, pids, mounts, rested) {
            found.unsure = Self::unreadable(&e).unsure;
        }
        found
    }

    pub(crate) fn unreadable(e: &io::Error) -> Self {
        Self {
            unsure: Some(format!("its surroundings cannot be read: {e}")),
            ..Self::default()
        }
    }

    /// What differs between two readings of one sandbox, one sentence each; not the connections to outside, which no checkpoint holds. Empty means surely the same.
    #[must_use]
    pub fn changes_since(&self, earlier: &Self) -> Vec<String> {
        let mut changes: Vec<String> = self
            .unsure
            .iter()
            .chain(&earlier.unsure)
            .take(1)
            .cloned()
            .collect();
        for (what, now, then) in [
            ("mount", &self.mounts, &earlier.mounts),
            ("network", &self.network, &earlier.network),
            ("namespace", &self.namespaces, &earlier.namespaces),
        ] {
            changes.extend(now.difference(then).map(|e| format!("{what} {e} came")));
            changes.extend(then.difference(now).map(|e| format!("{what} {e} is gone")));
        }
        for (key, state) in &self.objects {
            match earlier.objects.get(key) {
                Some(then) if then == state => {}
                Some(then) => changes.push(format!("{key}: {}", difference(state, then))),
                None => changes.push(format!("{key}: {state} (was not there)")),
            }
        }
        let gone = earlier.objects.keys();
        let gone = gone.filter(|key| !self.objects.contains_key(*key));
        changes.extend(gone.map(|key| format!("{key} is gone")));
        changes
    }

    /// Mount namespaces that its processes are in.
    pub(crate) fn mount_namespaces(&self) -> usize {
        let names = self
            .namespaces
            .iter()
            .filter_map(|n| n.strip_prefix("mnt "));
        let names = names.filter_map(|n| n.split(' ').next());
        names.collect::<BTreeSet<_>>().len()
    }

    fn all(
        &mut self,
        init: u32,
        pids: &BTreeSet<u32>,
        mounted: &[u8],
        rested: Option<Rested<'_>>,
    ) -> io::Result<()> {
        let first = namespaces(init)?;
        let named = first.iter().map(|(kind, name)| of_first(kind, name));
        self.namespaces.extend(named);
        self.mounts = mounts(mounted)?;
        self.network = network(init)?;
        let mut held = Reader::default();
        for pid in pids.iter().filter(|pid| **pid != init) {
            let known = rested.is_some_and(|r| r.as_the_first(*pid, &first));
            let read = match known {
                true => Ok(()),
                false => self.namespaces_of(*pid, &first),
            };
            match read.and_then(|()| held.process(*pid)) {
                Ok(()) => {}
                Err(e) if gone(&e) => {}
                Err(e) => return Err(e),
            }
            if held.objects.len() > MAX_ENTRIES {
                return Err(io::Error::other("its processes hold too many objects"));
            }
        }
        self.objects = held.objects;
        self.outside = to_outside(&held.connections);
        Ok(())
    }

    /// Those that are not the first process's.
    fn namespaces_of(&mut self, pid: u32, first: &BTreeMap<String, String>) -> io::Result<()> {
        for (kind, name) in namespaces(pid)? {
            if first.get(&kind) == Some(&name) {
                continue;
            }
            if kind == "mnt" {
                let mounts = mounts(&mount_table(pid)?)?.into_iter();
                self.mounts.extend(mounts.map(|m| format!("{m} in {name}")));
            }
            self.namespaces
                .insert(format!("{kind} {name}{}", of_process(pid)));
        }
        Ok(())
    }
}

fn of_first(kind: &str, name: &str) -> String {
    format!("{kind} {name} of the first process")
}

/// Of what a process is itself, among the objects.
pub(crate) fn process_key(pid: u32) -> String {
    format!("process {pid}")
}

fn of_process(pid: u32) -> String {
    format!(" of process {pid}")
}

/// Where a state begins to differ from another, with the two words before that say what it is.
fn difference(now: &str, then: &str) -> String {
    let words: Vec<&str> = now.split_whitespace().collect();
    let same = words
        .iter()
        .zip(then.split_whitespace())
        .take_while(|(a, b)| **a == *b);
    let at = same.count();
    let shown = &words[at.saturating_sub(2).min(words.len())..words.len().min(at + 3)];
    shown.join(" ")
}

/// Whether an error says that a process has ended.
pub(crate) fn gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
}

/// Cuts a text that a sandbox may have made long.
pub(crate) fn bounded(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        // What is cut off still tells one from another.
        let hash = blake3::hash(text.as_bytes()).to_hex();
        let mut end = MAX_TEXT - 20;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(&hash[..16]);
    }
    text
}

/// A process's namespaces by kind; those its children will be in are left out.
fn namespaces(pid: u32) -> io::Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let directory = directory(format!("/proc/{pid}/ns"))?;
    for kind in ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"] {
        match link_at(&directory, kind) {
            Ok(link) => {
                found.insert(kind.to_owned(), link);
            }
            // A kind this kernel does not have; or the process has ended, which the first one tells.
            Err(e) if gone(&e) && !found.is_empty() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// A process's mount table.
pub(crate) fn mount_table(pid: u32) -> io::Result<Vec<u8>> {
    read_whole(format!("/proc/{pid}/mountinfo"))
}

/// A mount table without the numbers that differ from one reading to the next.
fn mounts(table: &[u8]) -> io::Result<BTreeSet<String>> {
    let lines = table.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    let mut counts = BTreeMap::new();
    for mount in lines.filter_map(mount).map(bounded) {
        *counts.entry(mount).or_insert(0u32) += 1;
    }
    // The same once more in the same place is another mount, over the first.
    let found: BTreeSet<String> = counts
        .into_iter()
        .map(|(mount, count)| match count {
            1 => mount,
            _ => format!("{mount} {count} times"),
        })
        .collect();
    match found.len() {
        0 => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        n if n > MAX_ENTRIES => Err(io::Error::other("it has too many mounts")),
        _ => Ok(found),
    }
}

fn mount(line: &[u8]) -> Option<String> {
    let text = |field: &[u8]| String::from_utf8_lossy(&unescape(field)).into_owned();
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().position(|f| *f == b"-")?;
    let (root, point, options) = (fields.get(3)?, fields.get(4)?, fields.get(5)?);
    let (kind, source) = (fields.get(dash + 1)?, fields.get(dash + 2)?);
    Some(format!(
        "{} ({} of {} {}, {})",
        text(point),
        text(root),
        text(kind),
        text(source),
        text(options)
    ))
}

/// Interfaces, addresses and routes of a process's network namespace. Link-local ones come and go by themselves and are left out.
fn network(pid: u32) -> io::Result<BTreeSet<String>> {
    let read = |name: &str| match read_whole(format!("/proc/{pid}/net/{name}")) {
        // No such protocol here.
        Err(e) if gone(&e) && name != "dev" => Ok(String::new()),
        other => other.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
    };
    let mut found = BTreeSet::new();
    for line in read("dev")?.lines().skip(2) {
        if let Some((name, _)) = line.split_once(':') {
            found.insert(format!("interface {}", name.trim()));
        }
    }
    let fields = |line: &str, which: &[usize]| {
        let all: Vec<&str> = line.split_whitespace().collect();
        let some: Option<Vec<&str>> = which.iter().map(|i| all.get(*i).copied()).collect();
        some.map(|some| some.join(" "))
    };
    for line in read("route")?.lines().skip(1) {
        // Device, destination, gateway, flags, metric, mask.
        found.extend(fields(line, &[0, 1, 2, 3, 6, 7]).map(|r| format!("route {r}")));
    }
    for line in read("ipv6_route")?.lines() {
        let local = ["fe8", "ff"].iter().any(|p| line.starts_with(p));
        if !local && !line.trim_end().ends_with(" lo") {
            found.extend(fields(line, &[0, 1, 4, 9]).map(|r| format!("route {r}")));
        }
    }
    for line in read("if_inet6")?.lines().filter(|l| !l.starts_with("fe8")) {
        found.extend(fields(line, &[0, 2, 5]).map(|a| format!("address {a}")));
    }
    let trie = read("fib_trie")?;
    let mut address = "";
    for line in trie.lines().map(str::trim) {
        if let Some(leaf) = line.strip_prefix("|-- ") {
            address = leaf;
        } else if line.ends_with("host LOCAL") {
            found.insert(format!("address {address}"));
        }
    }
    match found.len() {
        n if n > MAX_ENTRIES => Err(io::Error::other("its network has too many parts")),
        _ => Ok(found.into_iter().map(bounded).collect()),
    }
}

/// Of established connections, by their ends, those whose other end is not among them. The kernel's own list is of no use: reading it takes as long as its
/// hash table has places, 10 ms with that of a large host, however few connections there are.
fn to_outside(connections: &Connections) -> BTreeSet<String> {
    // One with both ends in the sandbox has two sockets there.
    let outside = connections.iter().filter(|(here, there)| {
        !there.ip().is_loopback() && !connections.contains(&(*there, *here))
    });
    outside
        .take(MAX_ENTRIES)
        .map(|(here, there)| format!("{here} to {there}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    #[test]
    fn mounts_lose_their_numbers_only() {
        let line = br"36 35 98:0 /mnt1 /a\040b rw,noatime master:1 - ext3 /dev/root rw";
        let other = br"99 12 98:0 /mnt1 /a\040b rw,noatime - ext3 /dev/root rw";
        assert_eq!(mount(line), mount(other));
        assert_eq!(
            mount(line).as_deref(),
            Some("/a b (/mnt1 of ext3 /dev/root, rw,noatime)")
        );
        assert_eq!(mount(b"36 35 98:0"), None);
    }

    #[test]
    fn connections_with_both_ends_here_do_not_lead_outside() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let (a, b, c) = (at("10.0.0.2:80"), at("10.0.0.2:81"), at("192.0.2.1:443"));
        let lo = at("127.0.0.1:5");
        let all = BTreeSet::from([(a, b), (b, a), (b, c), (lo, lo)]);
        let outside = BTreeSet::from(["10.0.0.2:81 to 192.0.2.1:443".to_owned()]);
        assert_eq!(to_outside(&all), outside);
    }

    #[test]
    fn this_process_has_surroundings_that_stay() {
        let pid = std::process::id();
        let look = || Surroundings::read(pid, &BTreeSet::from([pid]));
        let found = look();
        assert_eq!(found.unsure, None);
        assert!(
            found.mounts.iter().any(|m| m.starts_with("/ (")),
            "{found:?}"
        );
        assert!(found.network.contains("interface lo"), "{found:?}");
        let other = Surroundings {
            network: BTreeSet::new(),
            ..found.clone()
        };
        assert!(!found.changes_since(&other).is_empty());
        let doubtful = Surroundings {
            unsure: Some("why".into()),
            ..found.clone()
        };
        assert_eq!(doubtful.changes_since(&doubtful.clone()), ["why"]);
    }

    #[test]
    fn differences_are_shown_with_what_they_are_of() {
        let then = "nice 0 signals 0 0 limits ab oom 0";
        assert_eq!(
            difference("nice 0 signals 0 200 limits ab oom 0", then),
            "signals 0 200 limits ab"
        );
        assert_eq!(difference("holds 5", "empty"), "holds 5");
        assert_eq!(difference("pos: 0", "pos: 0 holds 3"), "pos: 0");
    }

    #[test]
    fn long_texts_stay_different() {
        let (a, b) = ("x".repeat(600), format!("{}y", "x".repeat(599)));
        assert_ne!(bounded(a.clone()), bounded(b));
        assert!(bounded(a).len() <= MAX_TEXT);
    }
}
