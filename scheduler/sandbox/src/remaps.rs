//! Files that a process holds by a name that is gone while another name of the same file is still there.
//!
//! CRIU gives such a file a temporary name (`link_remap.N` beside the lost one) and expects it at the restore, but takes it
//! away again when the dumped processes go on. So while they still stand, a script keeps each such file by a hard link
//! in the overlay's scratch directory, which is on the same filesystem; afterwards its other name is looked up and both go
//! into a small file beside the images. A restore makes the temporary names again, and CRIU removes them.

use crate::config::Layers;
use crate::error::{Context, Result, SandboxError};
use crate::record::write_whole;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Beside the images; only there if it is needed.
const LIST: &str = "link-remaps.json";
const MAX_LIST: u64 = 1 << 20;
const PREFIX: &str = "link_remap.";

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remap {
    /// The temporary name, from the root of the sandbox.
    temporary: PathBuf,
    /// Another name of the same file.
    same_as: PathBuf,
}

fn kept_dir(layers: &Layers) -> PathBuf {
    layers.work.join("link-remaps")
}

fn quoted(path: &Path) -> Result<String> {
    let text = path.to_str().filter(|t| !t.contains('\''));
    let text =
        text.ok_or_else(|| SandboxError::Invalid(format!("{} has a quote in it", path.display())))?;
    Ok(format!("'{text}'"))
}

/// Writes the script that CRIU runs at each stage of a dump.
pub(crate) fn write_script(path: &Path, layers: &Layers, dump_log: &Path) -> Result<()> {
    let kept = kept_dir(layers);
    if kept.exists() {
        fs::remove_dir_all(&kept).context(|| format!("cannot remove {}", kept.display()))?;
    }
    let (kept, upper, log) = (quoted(&kept)?, quoted(&layers.upper)?, quoted(dump_log)?);
    let script = format!(
        r#"#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0
grep -q '{PREFIX}' {log} || exit 0
export KEPT={kept}
cd {upper} || exit 1
exec find . -xdev -name '{PREFIX}*' -type f -exec sh -c '
for f; do
    d="$KEPT/${{f%/*}}"
    mkdir -p "$d" && ln -f "$f" "$d/${{f##*/}}" || exit 1
done' sh {{}} +
"#
    );
    write_whole(path, script.as_bytes())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
        .context(|| format!("{}", path.display()))
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files(&entry.path(), found)?;
        } else {
            found.push(entry.path());
        }
    }
    Ok(())
}

/// Writes the list of what the script kept into `images` and lets the files go. Call it while the upper is still as it was.
pub(crate) fn collect(layers: &Layers, images: &Path) -> Result<()> {
    let kept = kept_dir(layers);
    if !kept.exists() {
        return Ok(());
    }
    let what = || format!("cannot read {}", layers.upper.display());
    let (mut temporaries, mut names, mut list) = (Vec::new(), Vec::new(), Vec::new());
    files(&kept, &mut temporaries).context(what)?;
    files(&layers.upper, &mut names).context(what)?;
    let inode = |p: &Path| fs::symlink_metadata(p).map(|m| m.ino());
    for temporary in temporaries {
        let wanted = inode(&temporary).context(what)?;
        let same = names.iter().find(|n| inode(n).is_ok_and(|i| i == wanted));
        let path = temporary
            .strip_prefix(&kept)
            .unwrap_or(&temporary)
            .to_owned();
        let Some(same) = same else {
            return Err(SandboxError::Dump {
                reason: format!(
                    "a file held by a process lost its names while it was dumped: /{}",
                    path.display()
                ),
                log: String::new(),
            });
        };
        list.push(Remap {
            temporary: path,
            same_as: same.strip_prefix(&layers.upper).unwrap_or(same).to_owned(),
        });
    }
    let json = serde_json::to_vec(&list).context(|| "the list of temporary names".into())?;
    write_whole(&images.join(LIST), &json)?;
    fs::remove_dir_all(&kept).context(|| format!("cannot remove {}", kept.display()))
}

/// Makes the temporary names in a sandbox's mounted root.
pub(crate) fn restore(root: &Path, images: &Path) -> Result<()> {
    let path = images.join(LIST);
    let Ok(meta) = fs::metadata(&path) else {
        return Ok(());
    };
    if meta.len() > MAX_LIST {
        return Err(SandboxError::Invalid(format!(
            "{} is too large",
            path.display()
        )));
    }
    let bytes = fs::read(&path).context(|| format!("cannot read {}", path.display()))?;
    let list: Vec<Remap> =
        serde_json::from_slice(&bytes).context(|| format!("cannot read {}", path.display()))?;
    let open = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, open | OFlags::DIRECTORY, Mode::empty())
        .context(|| "cannot open the sandbox's root".into())?;
    for remap in list {
        let name = remap
            .temporary
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or("")
            .to_owned();
        if !name.starts_with(PREFIX) {
            return Err(SandboxError::Invalid(format!(
                "{} is no temporary name",
                remap.temporary.display()
            )));
        }
        // What a checkpoint says is not trusted: neither name may lead out of the sandbox, and only names of this kind
        // are made.
        let parent_of = |p: &Path| -> Result<OwnedFd> {
            let dir = p
                .parent()
                .filter(|d| !d.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            rustix::fs::openat2(&root, dir, open | OFlags::DIRECTORY, Mode::empty(), resolve)
                .context(|| format!("no directory for {}", p.display()))
        };
        let same = remap.same_as.file_name().unwrap_or_default();
        rustix::fs::linkat(
            parent_of(&remap.same_as)?,
            same,
            parent_of(&remap.temporary)?,
            &name,
            AtFlags::empty(),
        )
        .context(|| {
            format!(
                "cannot link /{} to /{}",
                remap.temporary.display(),
                remap.same_as.display()
            )
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_files_are_listed_by_another_name_and_linked_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |p: &str| dir.path().join(p);
        let layers = Layers {
            lower: vec![at("l")],
            upper: at("upper"),
            work: at("work"),
            merged: at("merged"),
        };
        for d in ["upper/d", "work", "images", "root/d"] {
            fs::create_dir_all(at(d)).expect("made");
        }
        fs::write(at("upper/d/other"), "text").expect("made");
        fs::hard_link(at("upper/d/other"), at("upper/d/link_remap.3")).expect("linked");
        fs::write(at("log"), "(00.1) made d/link_remap.3").expect("made");
        let script = at("script");
        write_script(&script, &layers, &at("log")).expect("written");
        for action in ["pre-dump", "post-dump", "post-dump"] {
            let ran = std::process::Command::new(&script)
                .env("CRTOOLS_SCRIPT_ACTION", action)
                .status();
            assert!(ran.expect("it runs").success());
        }
        fs::remove_file(at("upper/d/link_remap.3")).expect("as CRIU does");
        collect(&layers, &at("images")).expect("collected");
        assert!(!at("work/link-remaps").exists());
        fs::write(at("root/d/other"), "text").expect("made");
        restore(&at("root"), &at("images")).expect("restored");
        let inode = |p: &str| fs::metadata(at(p)).expect("there").ino();
        assert_eq!(inode("root/d/other"), inode("root/d/link_remap.3"));
        // Nothing is linked outside.
        let bad = [
            ("../link_remap.1", "d/other"),
            ("d/passwd", "d/other"),
            ("link_remap.1", "../log"),
        ];
        for (temporary, same_as) in bad {
            let list = vec![Remap {
                temporary: temporary.into(),
                same_as: same_as.into(),
            }];
            fs::write(
                at("images").join(LIST),
                serde_json::to_vec(&list).expect("json"),
            )
            .expect("written");
            assert!(restore(&at("root"), &at("images")).is_err(), "{temporary}");
        }
    }
}
