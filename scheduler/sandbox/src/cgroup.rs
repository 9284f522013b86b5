//! A sandbox's cgroup on hosts of version 1, version 2 and both: finding, freezing, listing and removing it.
//!
//! Freezing is done here and not through the runtime's command: it takes a millisecond this way, and a turn waits for it.

use crate::error::{Context, Result, SandboxError};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long freezing may take. A process deep in the kernel can hold it up.
const FREEZE_TIME: Duration = Duration::from_secs(10);

/// Where cgroup hierarchies are mounted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hierarchies {
    all: Vec<PathBuf>,
    freezer_v1: Option<PathBuf>,
    v2: Option<PathBuf>,
}

impl Hierarchies {
    /// Reads the mount table.
    pub(crate) fn find() -> Result<Self> {
        let table = fs::read_to_string("/proc/self/mountinfo")
            .context(|| "cannot read the mount table".into())?;
        Ok(Self::parse(&table))
    }

    fn parse(table: &str) -> Self {
        let mut found = Self::default();
        for line in table.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let Some(point) = left.split(' ').nth(4) else {
                continue;
            };
            let bytes = crate::mounts::unescape(point.as_bytes());
            let point = PathBuf::from(String::from_utf8_lossy(&bytes).into_owned());
            let mut right = right.split(' ');
            match right.next() {
                Some("cgroup2") => {
                    found.v2.get_or_insert_with(|| point.clone());
                }
                Some("cgroup") => {
                    if right
                        .nth(1)
                        .is_some_and(|o| o.split(',').any(|o| o == "freezer"))
                    {
                        found.freezer_v1.get_or_insert_with(|| point.clone());
                    }
                }
                _ => continue,
            }
            found.all.push(point);
        }
        found
    }

    /// The directories of a cgroup that exist.
    pub(crate) fn existing(&self, cgroup: &str) -> Vec<PathBuf> {
        self.all
            .iter()
            .map(|m| m.join(cgroup))
            .filter(|d| d.is_dir())
            .collect()
    }

    fn freezer(&self, cgroup: &str) -> Result<Freezer> {
        if let Some(mount) = &self.freezer_v1 {
            return Ok(Freezer::V1(mount.join(cgroup)));
        }
        match &self.v2 {
            Some(mount) => Ok(Freezer::V2(mount.join(cgroup))),
            None => Err(SandboxError::Io {
                what: "cannot freeze sandboxes".into(),
                source: io::Error::other(
                    "neither the version 1 freezer nor cgroup version 2 is mounted",
                ),
            }),
        }
    }

    /// The directory of a cgroup where the version 1 freezer is what freezes it.
    pub(crate) fn version_1_freezer(&self, cgroup: &str) -> Option<PathBuf> {
        self.freezer_v1.as_ref().map(|mount| mount.join(cgroup))
    }

    /// Freezes or thaws a cgroup and waits until it is so.
    pub(crate) fn set_frozen(&self, name: &str, cgroup: &str, frozen: bool) -> Result<()> {
        let freezer = self.freezer(cgroup)?;
        let until = Instant::now() + FREEZE_TIME;
        let mut tries = 0u32;
        freezer.set(frozen)?;
        while freezer.is_frozen()? != frozen {
            if Instant::now() > until {
                let _ = freezer.set(false);
                return Err(SandboxError::Freeze(name.to_owned()));
            }
            // Version 1 can stay between the two for ever when a process forks meanwhile: asking again, after a short
            // thaw at times, is what gets it through.
            tries += 1;
            if tries.is_multiple_of(50) {
                freezer.set(!frozen)?;
            }
            if tries.is_multiple_of(10) {
                freezer.set(frozen)?;
            }
            std::thread::sleep(Duration::from_micros(if tries < 20 { 200 } else { 2000 }));
        }
        Ok(())
    }

    /// Shell commands that freeze a cgroup from inside it: whoever runs them, and its parent, leave first.
    pub(crate) fn freeze_commands(&self, cgroup: &str) -> Result<String> {
        let freezer = self.freezer(cgroup)?;
        let (file, text) = freezer.request(true);
        let root = match &freezer {
            Freezer::V1(_) => self.freezer_v1.as_ref(),
            Freezer::V2(_) => self.v2.as_ref(),
        };
        // The top is the one place of version 2 that may hold processes beside other cgroups.
        let top = root.map(|r| r.join("cgroup.procs")).unwrap_or_default();
        let top = top.display();
        Ok(format!(
            "echo $PPID > '{top}' || exit 1\necho $$ > '{top}' || exit 1\necho {text} > '{}'",
            file.display()
        ))
    }

    /// Whether a cgroup is frozen; one that does not exist is not.
    pub(crate) fn is_frozen(&self, cgroup: &str) -> Result<bool> {
        let freezer = self.freezer(cgroup)?;
        if !freezer.dir().is_dir() {
            return Ok(false);
        }
        freezer.is_asked()
    }

    /// The processes of a cgroup and of those below it.
    pub(crate) fn processes(&self, cgroup: &str) -> Result<Vec<i32>> {
        let freezer = self.freezer(cgroup)?;
        let mut pids = Vec::new();
        collect(freezer.dir(), 0, &mut pids)?;
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Removes a group that holds nothing any more; one that does is left.
    pub(crate) fn remove_if_empty(&self, cgroup: &str) {
        for dir in self.existing(cgroup) {
            let _ = fs::remove_dir(dir);
        }
    }

    /// Removes a cgroup that has nothing in it; one that has stays.
    pub(crate) fn remove_empty(&self, cgroup: &str) {
        for dir in self.existing(cgroup) {
            let _ = fs::remove_dir(dir);
        }
    }

    /// Kills what is left in a cgroup and removes it everywhere.
    pub(crate) fn remove(&self, cgroup: &str) -> Result<()> {
        let until = Instant::now() + FREEZE_TIME;
        loop {
            let left = self.existing(cgroup);
            if left.is_empty() {
                return Ok(());
            }
            let mut last = None;
            for dir in &left {
                let mut pids = Vec::new();
                let _ = collect(dir, 0, &mut pids);
                for pid in pids {
                    // SAFETY: no pointers; the number was just read from the cgroup of this sandbox.
                    unsafe { libc::kill(pid, libc::SIGKILL) };
                }
                last = remove_tree(dir, 0).err().or(last);
            }
            // What is frozen does not die.
            if let Ok(freezer) = self.freezer(cgroup)
                && freezer.dir().is_dir()
            {
                let _ = freezer.set(false);
            }
            if let (Some(e), true) = (last, Instant::now() > until) {
                return Err(e).context(|| format!("cannot remove the cgroup {cgroup}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

enum Freezer {
    V1(PathBuf),
    V2(PathBuf),
}

impl Freezer {
    fn dir(&self) -> &Path {
        match self {
            Self::V1(d) | Self::V2(d) => d,
        }
    }

    /// What to write where.
    fn request(&self, frozen: bool) -> (PathBuf, &'static str) {
        match self {
            Self::V1(d) => (
                d.join("freezer.state"),
                if frozen { "FROZEN" } else { "THAWED" },
            ),
            Self::V2(d) => (d.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
        }
    }

    fn set(&self, frozen: bool) -> Result<()> {
        let (file, text) = self.request(frozen);
        fs::write(&file, text).context(|| format!("cannot write {text} to {}", file.display()))
    }

    /// Whether everything in it stands still.
    fn is_frozen(&self) -> Result<bool> {
        let (file, mark) = match self {
            Self::V1(d) => (d.join("freezer.state"), "FROZEN"),
            Self::V2(d) => (d.join("cgroup.events"), "frozen 1"),
        };
        let text =
            fs::read_to_string(&file).context(|| format!("cannot read {}", file.display()))?;
        Ok(match self {
            // FREEZING counts as neither: it is not THAWED, which is what thawing waits for.
            Self::V1(_) => text.trim() != "THAWED" && text.trim() == mark,
            Self::V2(_) => text.lines().any(|l| l == mark),
        })
    }

    /// Whether it has been asked to stand still.
    fn is_asked(&self) -> Result<bool> {
        match self {
            Self::V1(_) => self.is_frozen(),
            Self::V2(d) => {
                let file = d.join("cgroup.freeze");
                let text = fs::read_to_string(&file)
                    .context(|| format!("cannot read {}", file.display()))?;
                Ok(text.trim() == "1")
            }
        }
    }
}

fn children(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Sandboxes cannot nest cgroups; the depth is bounded all the same.
const DEPTH: usize = 8;

fn collect(dir: &Path, depth: usize, pids: &mut Vec<i32>) -> Result<()> {
    let file = dir.join("cgroup.procs");
    let text = fs::read_to_string(&file).context(|| format!("cannot read {}", file.display()))?;
    pids.extend(
        text.lines()
            .filter_map(|l| l.trim().parse::<i32>().ok())
            .filter(|p| *p > 1),
    );
    if depth < DEPTH {
        for child in children(dir).context(|| format!("cannot read {}", dir.display()))? {
            collect(&child, depth + 1, pids)?;
        }
    }
    Ok(())
}

fn remove_tree(dir: &Path, depth: usize) -> io::Result<()> {
    if depth < DEPTH {
        for child in children(dir)? {
            remove_tree(&child, depth + 1)?;
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn hybrid_hosts_freeze_by_version_1_and_pure_ones_by_version_2() {
        let hybrid = Hierarchies::parse(V1);
        assert_eq!(hybrid.all.len(), 3);
        assert!(
            matches!(hybrid.freezer("t/x"), Ok(Freezer::V1(d)) if d == Path::new("/sys/fs/cgroup/freezer/t/x"))
        );
        let pure = Hierarchies::parse(V2);
        assert_eq!(pure.all.len(), 1);
        assert!(
            matches!(pure.freezer("t/x"), Ok(Freezer::V2(d)) if d == Path::new("/sys/fs/cgroup/t/x"))
        );
        assert!(Hierarchies::parse("").freezer("t/x").is_err());
    }

    #[test]
    fn version_2_files_are_read_and_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let cgroup = dir.path().join("t/x");
        fs::create_dir_all(&cgroup).expect("made");
        for (file, text) in [
            ("cgroup.freeze", "0\n"),
            ("cgroup.events", "populated 1\nfrozen 1\n"),
            ("cgroup.procs", ""),
        ] {
            fs::write(cgroup.join(file), text).expect("written");
        }
        let pure = Hierarchies {
            all: vec![dir.path().into()],
            freezer_v1: None,
            v2: Some(dir.path().into()),
        };
        assert!(!pure.is_frozen("t/x").expect("read"));
        pure.set_frozen("x", "t/x", true).expect("frozen");
        assert!(pure.is_frozen("t/x").expect("read"));
        assert!(!pure.is_frozen("t/y").expect("absent"));
        fs::write(cgroup.join("cgroup.procs"), "17\n5\n17\n").expect("written");
        assert_eq!(pure.processes("t/x").expect("read"), vec![5, 17]);
    }
}
