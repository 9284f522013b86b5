//! CRIU's log, put in words.
//!
//! CRIU says why it gave up in lines like `(00.012345) Error (criu/files.c:123): ...`. The first such line is the cause
//! and the ones after it its consequences. The kinds that users meet get a sentence that says what to change.

/// What a checkpoint or restore failed of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reason {
    pub(crate) reason: String,
    pub(crate) log: String,
}

/// Words in CRIU's error, and what they mean. All parts of one entry must occur.
const MEANINGS: &[(&[&str], &str)] = &[
    (
        &["io_uring"],
        "a process uses io_uring, which cannot be checkpointed",
    ),
    (
        &["unix", "xternal"],
        "a process holds a unix socket that is connected to something outside the sandbox",
    ),
    (
        &["unix: Can't dump half of stream unix connection"],
        "a process holds a unix socket whose other end is outside the sandbox",
    ),
    (
        &["unix", "connection to unexpected"],
        "a process holds a unix socket whose other end is outside the sandbox",
    ),
    (
        &["inotify"],
        "a process watches files in a way that cannot be found again",
    ),
    (
        &["fsnotify"],
        "a process watches files in a way that cannot be found again",
    ),
    (
        &["Can't find suitable path for handle"],
        "a process watches a file whose name cannot be found",
    ),
    (
        &["file lock"],
        "a process holds a file lock of an unsupported kind",
    ),
    (
        &["seccomp"],
        "a process has a seccomp filter that cannot be read",
    ),
    (
        &["Unsupported socket family"],
        "a process holds a socket of a kind that cannot be checkpointed",
    ),
    (
        &["packet socket"],
        "a process holds a packet socket that cannot be checkpointed",
    ),
    (
        &["Unknown netlink"],
        "a process holds a netlink socket that cannot be checkpointed",
    ),
    (
        &["netlink"],
        "a process holds a netlink socket with unread data or of an unsupported kind",
    ),
    (
        &["Connected TCP socket"],
        "a process holds an open TCP connection",
    ),
    (
        &["is being traced"],
        "a process is being traced by a debugger",
    ),
    (
        &["ptrace"],
        "a process cannot be stopped for the checkpoint; a debugger may be tracing it",
    ),
    (&["traced"], "a process is being traced by a debugger"),
    (
        &["ghost"],
        "a process holds a deleted file that is too large",
    ),
    (
        &["Can't lookup mount"],
        "a process holds a file of the host",
    ),
    (&["mnt:"], "a mount of the sandbox cannot be checkpointed"),
    (
        &["anon"],
        "a process holds a kernel object that cannot be checkpointed",
    ),
    (&["Unable to freeze"], "the processes did not stop in time"),
    (&["Timeout reached"], "the processes did not stop in time"),
    (
        &["CLONE_NEWUSER"],
        "a process made namespaces that cannot be checkpointed",
    ),
    (
        &["Can't dump nested"],
        "a process made namespaces that cannot be checkpointed",
    ),
    (
        &["has bad size"],
        "a file that a process holds is not as it was",
    ),
    (
        &["has bad build-ID"],
        "a program or library that a process runs is not as it was",
    ),
    (
        &["Can't open file"],
        "a file that a process holds is missing",
    ),
    (
        &["No space left"],
        "there is no space left for the process images",
    ),
    (
        &["CPU"],
        "the processor lacks something that the processes use",
    ),
    (
        &["cpu:"],
        "the processor lacks something that the processes use",
    ),
];

/// The text after `Error (file.c:line):`.
fn error_text(line: &str) -> Option<&str> {
    let at = line.find("Error (")?;
    let rest = &line[at + "Error (".len()..];
    rest.split_once("): ").map(|(_, text)| text.trim())
}

/// Errors that are in every log or only tell that something else failed.
fn incidental(text: &str) -> bool {
    [
        "rlimit: Can't setup RLIMIT_NOFILE",
        "Dumping FAILED",
        "Restoring FAILED",
    ]
    .iter()
    .any(|s| text.contains(s))
}

/// The process a line is about: from `Dumping task (pid: 12 comm: sh)` and the like.
fn task(line: &str) -> Option<(u32, &str)> {
    let rest = &line[line.find("task (pid: ")? + "task (pid: ".len()..];
    let (pid, rest) = rest.split_once(' ')?;
    let comm = rest.strip_prefix("comm: ")?;
    Some((pid.parse().ok()?, comm.rsplit_once(')')?.0))
}

/// Finds the reason in a log; `fallback` is what the runtime said.
pub(crate) fn explain(log: &[u8], fallback: &str) -> Reason {
    let text = String::from_utf8_lossy(log);
    let mut current = None;
    let mut errors: Vec<(&str, Option<(u32, &str)>)> = Vec::new();
    for line in text.lines() {
        current = task(line).or(current);
        if let Some(error) = error_text(line).filter(|e| !incidental(e)) {
            errors.push((error, current));
        }
    }
    let tail = crate::command::tail(log, 2000);
    let Some(&(first, process)) = errors.first() else {
        let reason = if fallback.is_empty() {
            "CRIU ended without a reason"
        } else {
            fallback
        };
        return Reason {
            reason: reason.to_owned(),
            log: tail,
        };
    };
    let mut reason = match MEANINGS
        .iter()
        .find(|(words, _)| words.iter().all(|w| first.contains(w)))
    {
        Some((_, meaning)) => format!("{meaning} (CRIU: {first})"),
        None => format!("CRIU: {first}"),
    };
    if let Some((pid, comm)) = process {
        reason.push_str(&format!(", at process {comm:?} with host pid {pid}"));
    }
    if let Some((second, _)) = errors.get(1).filter(|(e, _)| *e != first) {
        reason.push_str(&format!("; then: {second}"));
    }
    Reason { reason, log: tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_and_its_process_are_told_in_words() {
        let log =
            b"(00.001) Error (criu/cr-restore.c:1): rlimit: Can't setup RLIMIT_NOFILE for self\n\
            (00.010) Dumping task (pid: 42 comm: my (odd) name)\n\
            (00.020) Error (criu/sk-unix.c:780): unix: Can't dump half of stream unix connection.\n\
            (00.021) Error (criu/cr-dump.c:1768): Dump files (pid: 42) failed with -1\n\
            (00.030) Error (criu/cr-dump.c:2128): Dumping FAILED.\n";
        let found = explain(log, "runc said no");
        assert!(
            found.reason.starts_with(
                "a process holds a unix socket whose other end is outside the sandbox"
            )
        );
        assert!(
            found.reason.contains("\"my (odd) name\" with host pid 42"),
            "{}",
            found.reason
        );
        assert!(
            found.reason.contains("then: Dump files"),
            "{}",
            found.reason
        );
        assert!(found.log.ends_with("Dumping FAILED."));
    }

    #[test]
    fn unknown_reasons_are_quoted_and_missing_ones_come_from_the_runtime() {
        let found = explain(b"(00.1) Error (criu/x.c:1): Something new\n", "");
        assert_eq!(found.reason, "CRIU: Something new");
        assert_eq!(explain(b"", "criu not found").reason, "criu not found");
        assert_eq!(
            explain(b"junk \xff", "").reason,
            "CRIU ended without a reason"
        );
    }
}
