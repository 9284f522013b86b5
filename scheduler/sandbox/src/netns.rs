//! Network namespaces: one for each sandbox, made and kept by the host, so that it can be entered before, while and after
//! a sandbox runs.
//!
//! A thread's namespace is its own. Everything that has to happen inside runs on a thread that ends afterwards, so no
//! thread of a pool is ever left in a sandbox's network.

use crate::error::{Context, Result, SandboxError};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// Runs something on a thread of its own and waits for it.
fn on_own_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let panicked = || SandboxError::Io {
        what: "a namespace thread".into(),
        source: io::Error::other("it panicked"),
    };
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("tidepool-netns".into());
        let thread = builder
            .spawn_scoped(scope, work)
            .context(|| "cannot start a thread".into())?;
        thread.join().map_err(|_| panicked())?
    })
}

/// Runs something inside a network namespace.
pub(crate) fn inside<T: Send>(path: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace =
        fs::File::open(path).context(|| format!("no network namespace at {}", path.display()))?;
    on_own_thread(move || {
        rustix::thread::move_into_link_name_space(
            namespace.as_fd(),
            Some(LinkNameSpaceType::Network),
        )
        .context(|| "cannot enter the sandbox's network namespace".into())?;
        work()
    })
}

/// Makes the directory of namespaces a shared mount of its own, as `ip netns` does before its first one. If it came later, it
/// would cover the namespaces that are here already: they could be entered no more, nor removed.
fn share(dir: &Path) -> rustix::io::Result<()> {
    let flags = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    let lock = rustix::fs::open(
        dir,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // `ip netns` takes the same lock, so that only one of all binds it.
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    match rustix::mount::mount_change(dir, flags) {
        Err(Errno::INVAL) => {
            rustix::mount::mount_bind_recursive(dir, dir)?;
            rustix::mount::mount_change(dir, flags)
        }
        other => other,
    }
}

/// Makes a namespace that stays at `path`, with its loopback up.
pub(crate) fn create(path: &Path) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).context(|| format!("cannot make {}", dir.display()))?;
        share(dir).context(|| format!("cannot make {} a shared mount", dir.display()))?;
    }
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .context(|| format!("cannot make {}", path.display()))?;
    on_own_thread(|| {
        // SAFETY: only file tables shared between threads make this dangerous, and it leaves them alone.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
            .context(|| "cannot make a network namespace".into())?;
        rustix::mount::mount("/proc/thread-self/ns/net", path, "", MountFlags::BIND, None)
            .context(|| format!("cannot keep a network namespace at {}", path.display()))?;
        loopback_up()?;
        // As container engines do: there is nobody to protect low ports from in a sandbox's own network.
        let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
        let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
        Ok(())
    })
}

/// Lets a namespace go. It ends with its last process.
pub(crate) fn remove(path: &Path) -> Result<()> {
    while crate::mounts::is_mounted(path)? {
        rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .context(|| format!("cannot let go of {}", path.display()))?;
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn loopback_up() -> Result<()> {
    // SAFETY: the request is zeroed, its name is shorter than its field, and it outlives both calls; the descriptor is
    // owned as soon as it exists.
    let up = unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            Err(io::Error::last_os_error())
        } else {
            let socket = OwnedFd::from_raw_fd(socket);
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
                *to = *from as libc::c_char;
            }
            let known = libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) == 0;
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
            if known && libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        }
    };
    up.context(|| "cannot bring up the loopback of a network namespace".into())
}

/// Connects to a port on the loopback inside.
pub(crate) fn connect(path: &Path, port: u16, limit: Duration) -> Result<TcpStream> {
    inside(path, move || {
        let stream =
            TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), limit)
                .context(|| format!("cannot connect to port {port} inside the sandbox"))?;
        stream
            .set_nonblocking(true)
            .and_then(|()| stream.set_nodelay(true))
            .context(|| "a connection".into())?;
        Ok(stream)
    })
}

/// Listens on the loopback inside.
pub(crate) fn listen(path: &Path, port: u16) -> Result<TcpListener> {
    inside(path, move || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .context(|| format!("cannot listen on port {port} inside the sandbox"))?;
        listener
            .set_nonblocking(true)
            .context(|| "a listener".into())?;
        Ok(listener)
    })
}
