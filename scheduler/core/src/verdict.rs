//! What a turn's effects ask for: the rules, as one pure function over plain observations.
//!
//! Rules for an agent outside the sandbox (it drives the sandbox by `exec`):
//! - files: anything dirtied, or anything unknown about files, asks for files; a capture that finds no net change turns that back (see [`net`]);
//! - the init is no process: its state is not needed, it starts anew when nothing else lives;
//! - only the init lives now, and nothing else lived at the last checkpoint: no process image is needed;
//! - processes lived at the last checkpoint and none lives now: the manifest drops its process image, which is a `Processes` change with nothing to dump;
//! - a surviving process that ran or was born since the last dump, or that has a dirty file open or mapped, asks for processes;
//! - memory file systems (`/dev/shm`) live in the process image: a change there while processes live asks for processes;
//! - what a surviving process holds in the kernel can be changed by others without its running: that asks for processes too;
//! - unknown, lost and overflown always ask for more, and the first checkpoint asks for everything there is.
//!
//! Invariant: making an observation worse (more dirty, less known) never makes the verdict smaller. A test goes through all of them.

use tidepool_proto::turn::Verdict;

/// What the inspector and the host saw since the last checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observation {
    pub files: FilesSeen,
    pub processes: ProcessesSeen,
    /// Whether any dirty file is open in or mapped by a surviving process.
    pub open_dirty: Seen,
    /// Whether a memory file system of the sandbox (`/dev/shm`) changed.
    pub tmpfs: Seen,
    /// Whether what surviving processes hold in the kernel (pipes, sockets, terminals, limits, ...) changed without their running.
    pub held: Seen,
    /// The last committed checkpoint.
    pub previous: Previous,
    /// Why everything is captured whatever was seen (a checkpoint asked for by hand, a failed capture before).
    pub forced: Option<String>,
}

/// Which files were dirtied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FilesSeen {
    None,
    /// So many inodes.
    Inodes(u64),
    /// Nothing can be ruled out, and why.
    Everything(String),
}

impl Default for FilesSeen {
    /// Nothing is known.
    fn default() -> Self {
        FilesSeen::Everything("nothing is known about the files".into())
    }
}

/// What is known of the processes besides the init.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProcessesSeen {
    /// Alive now, where known.
    pub alive: Option<u64>,
    /// Of those, so many ran since the last checkpoint's processes were dumped or were seen to be none.
    pub ran: Option<u64>,
    /// Of those alive, so many were born since.
    pub born: Option<u64>,
    /// So many that were in the last dump have ended.
    pub exited: Option<u64>,
    /// Process events were lost: the counts may be too low.
    pub lost: bool,
}

/// Something that may not be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Seen {
    No,
    Yes,
    #[default]
    Unknown,
}

/// What the last checkpoint holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Previous {
    /// There is none.
    #[default]
    None,
    /// Files, and nothing but the init lived.
    FilesOnly,
    /// Files and this many processes.
    WithProcesses(u32),
}

/// What to do about processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessPart {
    /// The previous manifest's process image stands (or there is none, and none is needed).
    Keep,
    /// Dump them.
    Dump,
    /// None lives any more: the new manifest has no process image.
    Drop,
}

/// The decision about one turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    pub processes: ProcessPart,
    /// The whole upper has to be walked, because dirty inodes are not known.
    pub full_walk: bool,
    /// Why more is captured than was seen to change, and what decided, one sentence each.
    pub reasons: Vec<String>,
}

/// Decides about one turn of a sandbox whose agent is outside.
pub fn decide(seen: &Observation) -> Decision {
    let mut reasons = Vec::new();
    let first = seen.previous == Previous::None;
    if first {
        reasons.push("first checkpoint".to_owned());
    }
    if let Some(why) = &seen.forced {
        reasons.push(why.clone());
    }
    let forced = first || seen.forced.is_some();

    let mut full_walk = first;
    let mut files = forced;
    match &seen.files {
        FilesSeen::None => {}
        FilesSeen::Inodes(0) => {}
        FilesSeen::Inodes(_) => files = true,
        FilesSeen::Everything(why) => {
            files = true;
            full_walk = true;
            reasons.push(format!("all files: {why}"));
        }
    }
    let processes = processes(seen, forced, files, &mut reasons);
    Decision {
        verdict: Verdict::of(files, processes != ProcessPart::Keep),
        processes,
        full_walk,
        reasons,
    }
}

fn processes(
    seen: &Observation,
    forced: bool,
    files: bool,
    reasons: &mut Vec<String>,
) -> ProcessPart {
    let had = match seen.previous {
        Previous::WithProcesses(n) => n > 0,
        Previous::None | Previous::FilesOnly => false,
    };
    let p = &seen.processes;
    // How many live is read from the process table at the boundary, not counted from events: losing events does not make it doubtful.
    let Some(alive) = p.alive else {
        reasons.push("which processes live is unknown".to_owned());
        return ProcessPart::Dump;
    };
    if alive == 0 {
        if !had {
            return ProcessPart::Keep;
        }
        reasons.push("no process is left: the process image is dropped".to_owned());
        return ProcessPart::Drop;
    }
    let mut dump = false;
    let mut because = |yes: bool, why: String| {
        if yes {
            dump = true;
            reasons.push(why);
        }
    };
    because(forced, format!("{alive} processes live"));
    because(
        !forced && !had,
        format!("{alive} processes live, the last checkpoint has none"),
    );
    because(p.lost, "process events were lost".to_owned());
    let mut count = |n: Option<u64>, what: &str| match n {
        Some(0) => {}
        Some(n) => because(true, format!("{n} of {alive} surviving processes {what}")),
        None => because(
            true,
            format!("whether surviving processes {what} is unknown"),
        ),
    };
    count(p.ran, "ran");
    count(p.born, "were born");
    match p.exited {
        Some(0) => {}
        Some(n) => because(true, format!("{n} processes of the last dump have ended")),
        None => because(
            true,
            "whether processes of the last dump have ended is unknown".to_owned(),
        ),
    }
    match seen.tmpfs {
        Seen::No => {}
        Seen::Yes => because(true, "a memory file system changed".to_owned()),
        Seen::Unknown => because(
            true,
            "whether a memory file system changed is unknown".to_owned(),
        ),
    }
    match seen.held {
        Seen::No => {}
        Seen::Yes => because(
            true,
            "what a surviving process holds in the kernel changed".to_owned(),
        ),
        Seen::Unknown => because(
            true,
            "whether what surviving processes hold in the kernel changed is unknown".to_owned(),
        ),
    }
    if files {
        match seen.open_dirty {
            Seen::No => {}
            Seen::Yes => because(
                true,
                "a surviving process has a changed file open or mapped".to_owned(),
            ),
            Seen::Unknown => because(
                true,
                "whether a surviving process has a changed file open is unknown".to_owned(),
            ),
        }
    }
    match dump {
        true => ProcessPart::Dump,
        false => ProcessPart::Keep,
    }
}

/// The verdict after capture: a tree that equals the last checkpoint's is no change of files.
pub fn net(decision: &Decision, tree_changed: bool) -> Verdict {
    Verdict::of(
        decision.verdict.files() && tree_changed,
        decision.processes != ProcessPart::Keep,
    )
}
