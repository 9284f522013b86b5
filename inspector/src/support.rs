//! Which filesystems the probe set sees, and the small conversions registration needs.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const EXT_SUPER_MAGIC: i64 = 0xEF53;

/// Whether the `ctime` and `ext4` probe sets see changes in this directory's filesystem.
///
/// # Errors
/// A sentence that says why not. Registering such a directory works; every reading then says
/// that everything may have changed.
pub fn supports(upper_dir: &Path) -> Result<(), String> {
    let stat = rustix::fs::statfs(upper_dir).map_err(|e| {
        format!(
            "the filesystem of {} cannot be read: {e}",
            upper_dir.display()
        )
    })?;
    #[allow(
        clippy::unnecessary_cast,
        reason = "the type differs between architectures"
    )]
    let magic = stat.f_type as i64;
    if magic != EXT_SUPER_MAGIC {
        return Err(format!(
            "{} is not on ext4 (filesystem magic {magic:#x}), the only filesystem this probe set sees",
            upper_dir.display()
        ));
    }
    // ext2, ext3 and ext4 share one magic number, and ext2 may be served by a driver without the hooks.
    let dev = fs::metadata(upper_dir)
        .map_err(|e| format!("{} cannot be read: {e}", upper_dir.display()))?
        .dev();
    let mounts = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|e| format!("/proc/self/mountinfo cannot be read: {e}"))?;
    match filesystem_of(&mounts, dev) {
        Some("ext4") => Ok(()),
        Some(other) => Err(format!(
            "{} is on {other}, not on ext4, the only filesystem this probe set sees",
            upper_dir.display()
        )),
        None => Err(format!(
            "no mount says which filesystem {} is on",
            upper_dir.display()
        )),
    }
}

/// The filesystem type of a device in the text of a mountinfo file.
fn filesystem_of(mountinfo: &str, dev: u64) -> Option<&str> {
    let wanted = format!("{}:{}", libc::major(dev), libc::minor(dev));
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (before.split(' ').nth(2)? == wanted).then(|| after.split(' ').next())?
    })
}

/// The kernel's own form of a device number from that of `stat`.
pub(crate) fn kernel_dev(st_dev: u64) -> u32 {
    (libc::major(st_dev) << 20) | libc::minor(st_dev)
}

/// Inode of the pid namespace of a process: what [`Target`](crate::Target) names a sandbox by.
///
/// # Errors
/// If there is no such process, or it may not be looked at.
pub fn pid_ns_inode(pid: u32) -> io::Result<u64> {
    Ok(fs::metadata(format!("/proc/{pid}/ns/pid"))?.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_decides_which_mount_line_counts() {
        let text = "22 1 0:20 / /proc rw shared:5 - proc proc rw\n\
                    24 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw\n\
                    25 24 254:16 /a /b rw - ext2 /dev/vdb rw\n\
                    garbage\n";
        assert_eq!(filesystem_of(text, libc::makedev(254, 0)), Some("ext4"));
        assert_eq!(filesystem_of(text, libc::makedev(254, 16)), Some("ext2"));
        assert_eq!(filesystem_of(text, libc::makedev(1, 1)), None);
    }

    #[test]
    fn device_numbers_take_the_kernels_form() {
        assert_eq!(kernel_dev(libc::makedev(254, 0)), 254 << 20);
        assert_eq!(kernel_dev(libc::makedev(7, 300)), (7 << 20) | 300);
        assert_eq!(kernel_dev(libc::makedev(0xfff, 0xf_ffff)), 0xffff_ffff);
    }

    #[test]
    fn memory_filesystems_are_refused_with_a_reason() {
        let reason = supports(Path::new("/proc")).expect_err("proc is not ext4");
        assert!(reason.contains("not on ext4"), "{reason}");
    }
}
