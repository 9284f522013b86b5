//! The daemon's options.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use tidepool_inspector::ProbeSet;

/// The probe set asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Probes {
    Auto,
    Ctime,
    Ext4,
    Trampoline,
    Syscalls,
    Walk,
}

impl Probes {
    /// None where the best is to be found.
    pub fn set(self) -> Option<ProbeSet> {
        match self {
            Self::Auto => None,
            Self::Ctime => Some(ProbeSet::Ctime),
            Self::Ext4 => Some(ProbeSet::Ext4),
            Self::Trampoline => Some(ProbeSet::Trampoline),
            Self::Syscalls => Some(ProbeSet::Syscalls),
            Self::Walk => Some(ProbeSet::Walk),
        }
    }
}

/// Runs sandboxes on this host and checkpoints their turns.
#[derive(Debug, Clone, Parser)]
#[command(name = "tidepool-host", version, about)]
pub struct Config {
    /// Where everything of this host is kept. Should be on ext4; otherwise an ext4 image is made in it and mounted.
    #[arg(long, env = "TIDEPOOL_STATE_DIR", default_value = "/var/lib/tidepool")]
    pub state_dir: PathBuf,

    /// The API's unix socket.
    #[arg(
        long,
        env = "TIDEPOOL_SOCKET",
        default_value = "/run/tidepool/host.sock"
    )]
    pub socket: PathBuf,

    /// The OCI runtime.
    #[arg(long, env = "TIDEPOOL_RUNC", default_value = "runc")]
    pub runc: PathBuf,

    /// CRIU 4.2.1 or newer; that of ops/setup where it is there, else `criu`. Without it sandboxes run, but no process can be checkpointed.
    #[arg(long, env = "TIDEPOOL_CRIU")]
    pub criu: Option<PathBuf>,

    /// This host's name in records.
    #[arg(long, env = "TIDEPOOL_HOST_NAME")]
    pub host_name: Option<String>,

    /// The dedup domain of this host's sandboxes.
    #[arg(long, default_value = "default")]
    pub domain: String,

    /// A store of its own process (`tidepool-store`) instead of the embedded one; may be given several times.
    #[arg(
        long,
        env = "TIDEPOOL_STORE",
        value_name = "ADDR",
        requires = "store_identity"
    )]
    pub store: Vec<SocketAddr>,

    /// The directory with this host's certificate for that store, as `tidepool-store issue-client` writes it.
    #[arg(long, value_name = "DIR")]
    pub store_identity: Option<PathBuf>,

    /// Where the embedded store listens (loopback: only this host uses it).
    #[arg(long, default_value = "127.0.0.1:0")]
    pub store_listen: SocketAddr,

    /// The size of the ext4 image made where the state directory is not on ext4, in GiB (sparse).
    #[arg(long, default_value_t = 32)]
    pub image_gib: u64,

    /// Where process images are kept until they are sent; memory-backed.
    #[arg(long, default_value = "/dev/shm")]
    pub dump_dir: PathBuf,

    /// How the effects of sandboxes are seen: the first that this kernel allows of `ext4`, `trampoline` and `syscalls`, else `walk`; or the one named, without which the daemon does not start.
    #[arg(long, env = "TIDEPOOL_PROBES", value_enum, default_value_t = Probes::Auto)]
    pub probes: Probes,

    /// A line of gitignore syntax for all sandboxes: changes of such paths alone ask for no checkpoint; may be given several times. A sandbox's own lines come after these.
    #[arg(long, value_name = "PATTERN")]
    pub ignore: Vec<String>,

    /// Loads the inspector and checks runc, CRIU, overlay and the kernel; says what does not work; exits.
    #[arg(long)]
    pub check: bool,
}
