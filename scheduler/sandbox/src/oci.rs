//! The OCI configuration of a sandbox: what a container engine would write, less the cgroup mount, which checkpoints do
//! not get along with.

use crate::config::SandboxSpec;
use serde_json::{Value, json};
use std::path::Path;

/// Where init is inside.
pub(crate) const INIT_PATH: &str = "/.tidepool/init";

/// The default set of container engines.
const CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

const READ_ONLY: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

const DEFAULT_PIDS: u32 = 4096;
const NOFILE: u64 = 1 << 20;

/// What the configuration needs besides the specification.
pub(crate) struct Place<'a> {
    pub(crate) name: &'a str,
    pub(crate) root: &'a Path,
    pub(crate) init: &'a Path,
    pub(crate) netns: &'a Path,
    pub(crate) cgroup: &'a str,
    pub(crate) criu_config: &'a Path,
}

fn tmpfs(target: &str, kind: &str, options: &[&str]) -> Value {
    json!({"destination": target, "type": kind, "source": kind, "options": options})
}

fn mounts(spec: &SandboxSpec, init: &Path) -> Vec<Value> {
    let mut mounts = vec![
        tmpfs("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        tmpfs(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        tmpfs(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        tmpfs(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=524288k"],
        ),
        tmpfs("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    ];
    let bind = |source: &Path, target: &Path, read_only: bool| {
        let access = if read_only { "ro" } else { "rw" };
        let options = ["bind", "rprivate", "nosuid", "nodev", access];
        json!({"destination": target, "type": "bind", "source": source, "options": options})
    };
    mounts.push(bind(init, Path::new(INIT_PATH), true));
    mounts.extend(
        spec.mounts
            .iter()
            .map(|m| bind(&m.source, &m.target, m.read_only)),
    );
    mounts
}

/// The most files a sandbox may open: as engines set it, but never above what this process could give.
fn nofile() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place for the result.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
    if known {
        limit.rlim_max.min(NOFILE)
    } else {
        1024
    }
}

/// The contents of `config.json`.
pub(crate) fn config(spec: &SandboxSpec, place: &Place<'_>) -> Value {
    let hostname = if spec.hostname.is_empty() {
        place.name
    } else {
        &spec.hostname
    };
    let mut resources = json!({
        "devices": [{"allow": false, "access": "rwm"}],
        "pids": {"limit": spec.pids.unwrap_or(DEFAULT_PIDS)},
    });
    if let Some(bytes) = spec.memory_bytes {
        resources["memory"] = json!({"limit": bytes});
    }
    let nofile = nofile();
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": [INIT_PATH],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": nofile, "soft": nofile}],
            "noNewPrivileges": true,
        },
        "root": {"path": place.root, "readonly": false},
        "hostname": hostname,
        "mounts": mounts(spec, place.init),
        "annotations": {"org.criu.config": place.criu_config},
        "linux": {
            "cgroupsPath": format!("/{}", place.cgroup),
            "namespaces": [
                {"type": "pid"},
                {"type": "ipc"},
                {"type": "uts"},
                {"type": "mount"},
                {"type": "network", "path": place.netns},
            ],
            "resources": resources,
            "seccomp": crate::seccomp::profile(),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    })
}
