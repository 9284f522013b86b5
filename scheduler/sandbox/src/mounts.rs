//! The overlay that is a sandbox's root, and the few files a network needs in it.

use crate::config::{Layers, Network};
use crate::error::{Context, Result, SandboxError};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::{CString, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Keeps overlayfs to plain directories, so that an upper can be read and written without knowing its mount: no
/// redirects, no metadata-only copies, no index.
const OPTIONS: &str = "redirect_dir=off,metacopy=off,index=off";

/// Mounts the layers.
pub(crate) fn mount(layers: &Layers) -> Result<()> {
    layers.validate()?;
    for dir in layers.lower.iter().chain([&layers.upper]) {
        if !dir.is_dir() {
            return Err(SandboxError::Invalid(format!(
                "the layer {} is not a directory",
                dir.display()
            )));
        }
    }
    for dir in [&layers.work, &layers.merged] {
        fs::create_dir_all(dir).context(|| format!("cannot make {}", dir.display()))?;
    }
    let lower: Vec<_> = layers
        .lower
        .iter()
        .map(|p| p.as_os_str().as_bytes())
        .collect();
    let mut base = b"lowerdir=".to_vec();
    base.extend(lower.join(&b':'));
    for (name, path) in [(",upperdir=", &layers.upper), (",workdir=", &layers.work)] {
        base.extend_from_slice(name.as_bytes());
        base.extend_from_slice(path.as_os_str().as_bytes());
    }
    if base.len() + OPTIONS.len() + 2 > 4096 {
        return Err(SandboxError::Invalid(
            "the paths of the layers are too long together".into(),
        ));
    }
    let with = |options: &str| -> Result<CString> {
        let text = [&base, options.as_bytes()].concat();
        CString::new(text)
            .map_err(|_| SandboxError::Invalid("a layer's path has a zero byte".into()))
    };
    let attempt = |data: &CString| {
        rustix::mount::mount(
            "overlay",
            &layers.merged,
            "overlay",
            // Reading must not look like a change.
            MountFlags::NOATIME,
            Some(data.as_c_str()),
        )
    };
    let mounted = match attempt(&with(&format!(",{OPTIONS}"))?) {
        // Kernels without one of these features do not know its switch either.
        Err(rustix::io::Errno::INVAL) => attempt(&with("")?),
        other => other,
    };
    mounted.context(|| {
        format!(
            "cannot mount the sandbox's root at {}",
            layers.merged.display()
        )
    })?;
    // What is mounted below must not travel to the host's other mount namespaces, nor keep the root busy there.
    rustix::mount::mount_change(
        &layers.merged,
        rustix::mount::MountPropagationFlags::PRIVATE,
    )
    .context(|| format!("cannot make {} private", layers.merged.display()))
}

/// Whether something is mounted at this very path.
pub(crate) fn is_mounted(path: &Path) -> Result<bool> {
    let table =
        fs::read("/proc/self/mountinfo").context(|| "cannot read the mount table".into())?;
    Ok(table.split(|b| *b == b'\n').any(|line| {
        let point = line.split(|b| *b == b' ').nth(4).unwrap_or_default();
        unescape(point) == path.as_os_str().as_bytes()
    }))
}

/// Removes a directory with all in it, unmounting first what is mounted below: a restore that was killed leaves mounts of the
/// machine's own cgroups there, which must not be taken for files to remove.
pub(crate) fn remove_tree(dir: &Path) -> Result<()> {
    let what = || format!("cannot remove {}", dir.display());
    let real = match fs::canonicalize(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.context(what)?,
    };
    let table =
        fs::read("/proc/self/mountinfo").context(|| "cannot read the mount table".into())?;
    let points = table
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4));
    let mut below: Vec<PathBuf> = points
        .map(|p| PathBuf::from(OsString::from_vec(unescape(p))))
        .filter(|p| p.starts_with(&real))
        .collect();
    // What was mounted last comes off first.
    while let Some(point) = below.pop() {
        rustix::mount::unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .context(|| format!("cannot unmount {}", point.display()))?;
    }
    fs::remove_dir_all(dir).context(what)
}

/// Undoes the kernel's octal escapes (`\040` for a space).
pub(crate) fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&b, tail)) = rest.split_first() {
        let digits = tail
            .get(..3)
            .filter(|d| b == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        match digits {
            Some(d) => {
                let value = d.iter().fold(0u32, |v, c| v * 8 + u32::from(c - b'0'));
                out.push(value as u8);
                rest = &tail[3..];
            }
            None => {
                out.push(b);
                rest = tail;
            }
        }
    }
    out
}

/// Unmounts everything at a path, also what is still in use.
pub(crate) fn unmount(path: &Path) -> Result<()> {
    for _ in 0..16 {
        if !is_mounted(path)? {
            return Ok(());
        }
        if rustix::mount::unmount(path, UnmountFlags::NOFOLLOW).is_err() {
            rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                .context(|| format!("cannot unmount {}", path.display()))?;
        }
    }
    Err(SandboxError::Io {
        what: format!("cannot unmount {}", path.display()),
        source: io::Error::other("something is mounted there again and again"),
    })
}

/// Writes `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf` where the image has none or empty ones. As plain files of
/// the sandbox they need no mounts and travel with it.
pub(crate) fn network_files(root: &Path, hostname: &str, network: Network) -> Result<()> {
    let root = rustix::fs::open(
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| "cannot open the sandbox's root".into())?;
    let inside = |path: &str, flags: OFlags, mode: u32| {
        // The image is not trusted: no link in it leads out of it.
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(
            &root,
            path,
            flags | OFlags::CLOEXEC,
            Mode::from_raw_mode(mode),
            resolve,
        )
    };
    if inside("etc", OFlags::PATH | OFlags::DIRECTORY, 0).is_err() {
        match rustix::fs::mkdirat(&root, "etc", Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e).context(|| "cannot make /etc in the sandbox".into()),
        }
    }
    let resolv = match network {
        Network::None => String::new(),
        Network::Nat => resolvers(),
    };
    let hosts =
        format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for (path, text) in [
        ("etc/hostname", format!("{hostname}\n")),
        ("etc/hosts", hosts),
        ("etc/resolv.conf", resolv),
    ] {
        if text.is_empty() {
            continue;
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
        // A dangling link or a directory in its place is the image's own business.
        let Ok(file) = inside(path, flags, 0o644) else {
            continue;
        };
        let mut file = fs::File::from(file);
        if file.metadata().is_ok_and(|m| m.is_file() && m.len() == 0) {
            file.write_all(text.as_bytes())
                .context(|| format!("cannot write /{path} in the sandbox"))?;
        }
    }
    Ok(())
}

/// The host's name servers, less those that only the host itself can reach.
fn resolvers() -> String {
    let host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let lines = host.lines().take(64).filter(|l| {
        let mut words = l.split_whitespace();
        match (
            words.next(),
            words
                .next()
                .and_then(|a| a.parse::<std::net::IpAddr>().ok()),
        ) {
            (Some("nameserver"), Some(address)) => !address.is_loopback(),
            (Some("search" | "options"), _) => true,
            _ => false,
        }
    });
    lines.map(|l| format!("{l}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_escapes_are_undone() {
        assert_eq!(unescape(br"/a\040b\134c\1"), b"/a b\\c\\1");
    }

    #[test]
    fn links_of_an_image_do_not_lead_files_out_of_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir_all(root.join("real")).expect("made");
        fs::create_dir_all(&outside).expect("made");
        std::os::unix::fs::symlink(&outside, root.join("etc")).expect("linked");
        network_files(&root, "box", Network::None).ok();
        assert_eq!(fs::read_dir(&outside).expect("read").count(), 0);
        fs::remove_file(root.join("etc")).expect("removed");
        std::os::unix::fs::symlink("/real", root.join("etc")).expect("linked");
        fs::write(root.join("real/hosts"), "kept").expect("written");
        network_files(&root, "box", Network::None).expect("written");
        assert_eq!(
            fs::read_to_string(root.join("real/hosts")).expect("read"),
            "kept"
        );
        assert_eq!(
            fs::read_to_string(root.join("real/hostname")).expect("read"),
            "box\n"
        );
        assert!(!root.join("real/resolv.conf").exists());
    }
}
