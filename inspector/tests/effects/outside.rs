//! Changes to an upper by processes that are in no sandbox, with each set of hooks that names inodes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::sandbox::{Sandbox, Watched, scratch};
use crate::sets::naming_inodes;

/// A sandbox with some files, for each set.
fn for_each_set(test: impl Fn(&mut Watched) -> Result<()>) -> Result<()> {
    naming_inodes(|options| {
        let mut watched = Watched::start(options)?;
        watched.sandbox.run("many d 2")?;
        watched.sandbox.run("write f")?;
        watched.end_turn()?;
        test(&mut watched)
    })
}

/// Runs a script as another process of the host, with `$U` for the upper and `$O` for a directory beside it.
fn host(watched: &Watched, outside: &Path, script: &str) -> Result<()> {
    let status = Command::new("/bin/sh")
        .args(["-ec", script])
        .env("U", watched.sandbox.upper())
        .env("O", outside)
        .env("PID", watched.sandbox.init().to_string())
        .status()?;
    ensure!(status.success(), "{script}: {status}");
    Ok(())
}

/// Has the host do something, which has to be seen at these paths, as from outside. What comes to have its first name in the upper is found by its directory.
fn seen(watched: &Watched, outside: &Path, script: &str, paths: &[&str]) -> Result<()> {
    host(watched, outside, script)?;
    let effects = watched.take()?;
    let dirty = watched.dirty_paths(&effects)?;
    for path in paths {
        ensure!(dirty.contains(*path), "{script}: {path} not in {dirty:?}");
    }
    ensure!(effects.from_outside, "{script}: not from outside");
    nothing(watched).context("it is told once")
}

fn nothing(watched: &Watched) -> Result<()> {
    let effects = watched.take()?;
    ensure!(
        effects.files.is_none() && !effects.from_outside,
        "{effects:?}"
    );
    Ok(())
}

pub(crate) fn writes_from_outside_are_seen() -> Result<()> {
    let dir = scratch()?;
    for_each_set(|watched| {
        let cases: &[(&str, &[&str])] = &[
            ("echo more >>$U/f", &["f"]),
            ("chmod 600 $U/d/0", &["d/0"]),
            ("touch -d 2001-01-01 $U/d/0", &["d/0"]),
            ("echo new >$U/d/new", &["d", "d/new"]),
            ("mkdir -p $U/a/b/c/e/g/h/i/j/k/l", &[""]),
            ("mkdir $U/a/b/c/e/g/h/i/j/k/l/m", &["a/b/c/e/g/h/i/j/k/l"]),
            (
                "echo deep >$U/a/b/c/e/g/h/i/j/k/l/f",
                &["a/b/c/e/g/h/i/j/k/l/f"],
            ),
            ("ln -s f $U/link", &[""]),
            ("ln $U/f $U/d/hard", &["d", "d/hard", "f"]),
            ("mv $U/d/1 $U/a/1", &["d", "a", "a/1"]),
            ("rm $U/d/new", &["d"]),
            // Through the sandbox's own view of it.
            ("echo more >>/proc/$PID/root$U/../merged/f", &["f"]),
        ];
        for (script, paths) in cases {
            seen(watched, dir.path(), script, paths)?;
        }
        // What the sandbox does is still its own.
        watched.sandbox.run("write f2")?;
        let effects = watched.take()?;
        ensure!(!effects.from_outside, "{effects:?}");
        ensure!(watched.dirty_paths(&effects)?.contains("f2"));
        Ok(())
    })
}

pub(crate) fn what_comes_into_an_upper_is_followed() -> Result<()> {
    let dir = scratch()?;
    for_each_set(|watched| {
        let at = dir.path();
        // Known to be outside, and then not any more.
        host(
            watched,
            at,
            "rm -rf $O/*; mkdir -p $O/t/u; echo x >$O/m; echo x >$O/l; echo x >$O/t/u/f; sleep 3",
        )?;
        host(
            watched,
            at,
            "echo x >>$O/m; echo x >>$O/l; echo x >>$O/t/u/f",
        )?;
        nothing(watched)?;
        seen(watched, at, "mv $O/m $U/m", &[""])?;
        seen(watched, at, "echo x >>$U/m", &["m"])?;
        seen(watched, at, "ln $O/l $U/l", &[""])?;
        seen(watched, at, "echo x >>$O/l", &["l"])?;
        seen(watched, at, "mv $O/t $U/t", &[""])?;
        seen(watched, at, "echo x >>$U/t/u/f", &["t/u/f"])?;
        // One that stays open over the move, written by its descriptor; not in the tick of the move, when there is nothing to be seen but the directory (in which it is found).
        host(watched, at, "echo x >$O/h; sleep 3; echo x >>$O/h")?;
        nothing(watched)?;
        seen(
            watched,
            at,
            "exec 5>>$O/h; echo x >&5; mv $O/h $U/h; sleep 0.02; echo x >&5",
            &["", "h"],
        )?;
        Ok(())
    })
}

pub(crate) fn other_writes_of_the_host_are_nobodys() -> Result<()> {
    let dir = scratch()?;
    for_each_set(|watched| {
        let script = "rm -rf $O/*; for i in 1 2 3; do mkdir -p $O/x$i/y/z; echo $i >$O/x$i/y/z/f; chmod 600 $O/x$i/y/z/f; mv $O/x$i $O/z$i; done; rm -r $O/z2";
        host(watched, dir.path(), script)?;
        nothing(watched)?;
        // Nor are those in a sandbox that is gone.
        let other = Sandbox::start()?;
        let slot = watched.inspector.register(&other.target()?)?;
        watched.inspector.take(slot)?;
        let upper = other.upper();
        let write = |name: &str| host(watched, &upper, &format!("echo x >$O/{name}"));
        write("a")?;
        let seen = watched.inspector.take(slot)?;
        ensure!(seen.from_outside && !seen.files.is_none(), "{seen:?}");
        nothing(watched)?;
        watched.inspector.unregister(slot);
        write("b")?;
        nothing(watched)?;
        Ok(())
    })
}
