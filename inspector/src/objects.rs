//! What one process holds in the kernel, and in which state: pipes, sockets, terminals, event counters, limits, signals that wait.
//!
//! Descriptors are duplicated into this process for a moment (`pidfd_getfd`) and asked; nothing is consumed. The states are texts, to be
//! compared for equality and shown to people.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, statat};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::procfs::{directory, link_at, read_at};
use crate::surroundings::{bounded, gone};

/// Descriptors looked at of one process.
const MAX_DESCRIPTORS: usize = 4096;
/// Bytes of a pipe's or a unix socket's contents looked at; a pipe has no more by default.
const PEEK: usize = 64 << 10;
/// The state of a connection that is neither begun nor ending.
const TCP_ESTABLISHED: u8 = 1;

/// The ends of connections, the own one first.
pub(crate) type Connections = BTreeSet<(SocketAddr, SocketAddr)>;

/// Adds the objects of a process, by `process PID thing`, and its established connections.
pub(crate) fn of_process(
    pid: u32,
    into: &mut BTreeMap<String, String>,
    connections: &mut Connections,
) -> io::Result<()> {
    let who = format!("process {pid}");
    let at = directory(format!("/proc/{pid}"))?;
    into.insert(who.clone(), itself(&at)?);
    let not = io::Error::from_raw_os_error(libc::ESRCH);
    let number = Pid::from_raw(pid.cast_signed()).ok_or(not)?;
    let process = Process {
        links: directory(format!("/proc/{pid}/fd"))?,
        infos: directory(format!("/proc/{pid}/fdinfo"))?,
        handle: pidfd_open(number, PidfdFlags::empty())?,
    };
    for (count, entry) in fs::read_dir(format!("/proc/{pid}/fd"))?.enumerate() {
        if count >= MAX_DESCRIPTORS {
            return Err(io::Error::other(format!(
                "{who} has more than {MAX_DESCRIPTORS} descriptors"
            )));
        }
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        let Ok(fd) = name.parse() else { continue };
        match process.descriptor(name, fd, connections) {
            Ok((what, state)) => {
                into.insert(format!("{who} descriptor {fd} {what}"), state);
            }
            // Closed meanwhile.
            Err(e) if gone(&e) || e.raw_os_error() == Some(libc::EBADF) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What others can change of a process that does not run.
fn itself(process: &OwnedFd) -> io::Result<String> {
    let read = |name: &str| read_at(process, name);
    let (stat, status) = (read("stat")?, read("status")?);
    let stat = String::from_utf8_lossy(&stat);
    let fields: Vec<&str> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split_ascii_whitespace().collect())
        .unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or("?");
    let status = String::from_utf8_lossy(&status);
    let line = |key: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(key));
        line.map_or("?", str::trim).to_owned()
    };
    let limits = blake3::hash(&read("limits")?).to_hex();
    let oom = read("oom_score_adj")?;
    Ok(format!(
        "group {} session {} terminal {} foreground {} nice {} policy {} {} signals {} {} processors {} limits {} oom {}",
        field(5),
        field(6),
        field(7),
        field(8),
        field(19),
        field(41),
        field(40),
        line("SigPnd:"),
        line("ShdPnd:"),
        line("Cpus_allowed:"),
        &limits[..12],
        String::from_utf8_lossy(&oom).trim(),
    ))
}

/// A process whose descriptors are looked at.
struct Process {
    links: OwnedFd,
    infos: OwnedFd,
    handle: OwnedFd,
}

impl Process {
    fn descriptor(
        &self,
        number: &str,
        fd: i32,
        connections: &mut Connections,
    ) -> io::Result<(String, String)> {
        let link = link_at(&self.links, number)?;
        let info = read_at(&self.infos, number)?;
        let info = String::from_utf8_lossy(&info);
        let name = bounded(link);
        // Position and flags are of the open file, which another process may share. What else there is depends on the kind; times pass by themselves.
        let lines = [
            "pos:",
            "flags:",
            "eventfd-count:",
            "sigmask:",
            "ticks:",
            "lock:",
        ];
        let lines = info
            .lines()
            .filter(|l| lines.iter().any(|p| l.starts_with(p)));
        let mut state = lines
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
            .join(" ");
        let copy =
            || pidfd_getfd(&self.handle, fd, PidfdGetfdFlags::empty()).map_err(io::Error::from);
        if name.starts_with("socket:[") {
            state.push_str(&socket(&copy()?, connections));
        } else if name.starts_with("anon_inode:inotify") {
            state.push_str(&format!(" waiting {}", waiting(&copy()?)));
        } else if name.starts_with("pipe:[") || !name.starts_with("anon_inode:") {
            let meta = statat(&self.links, number, AtFlags::empty())?;
            let kind = FileType::from_raw_mode(meta.st_mode);
            if kind == FileType::Fifo {
                state.push_str(&pipe(&copy()?)?);
            } else if kind == FileType::CharacterDevice && terminal_major(libc::major(meta.st_rdev))
            {
                state.push_str(&terminal(&copy()?));
            } else if name.starts_with("/memfd:") {
                state.push_str(&format!(
                    " size {} changed {}.{}",
                    meta.st_size, meta.st_mtime, meta.st_mtime_nsec
                ));
            }
        }
        Ok((name, bounded(state)))
    }
}

/// Terminals and their masters: tty, console and ptmx, ptys.
fn terminal_major(major: u32) -> bool {
    matches!(major, 4 | 5 | 128..=143)
}

/// Bytes that can be read; of a datagram socket those of the first one.
fn waiting(fd: &OwnedFd) -> i32 {
    let mut bytes = 0;
    // SAFETY: FIONREAD writes one int.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) } {
        0 => bytes,
        _ => -1,
    }
}

/// A pipe's contents, copied without being taken out.
fn pipe(fd: &OwnedFd) -> io::Result<String> {
    let bytes = waiting(fd);
    if bytes == 0 {
        return Ok(" empty".into());
    }
    let (mut reader, writer) = io::pipe()?;
    let flags = libc::SPLICE_F_NONBLOCK;
    // SAFETY: no pointers.
    let copied = unsafe { libc::tee(fd.as_raw_fd(), writer.as_raw_fd(), PEEK, flags) };
    if copied < 0 {
        // Its writing end cannot be peeked into; the reading end is somebody's too.
        return Ok(format!(" holds {bytes}"));
    }
    drop(writer);
    let mut contents = Vec::new();
    io::Read::read_to_end(&mut reader, &mut contents)?;
    let hash = blake3::hash(&contents).to_hex();
    Ok(format!(" holds {bytes} {}", &hash[..12]))
}

fn socket(fd: &OwnedFd, connections: &mut Connections) -> String {
    let mut state = format!(" waiting {}", waiting(fd));
    // Memory that what was received and is to be sent takes.
    let mut memory = [0u32; 9];
    if option(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, &mut memory) {
        state.push_str(&format!(" queues {} {}", memory[0], memory[5]));
    }
    let mut domain = [0u32; 1];
    option(fd, libc::SOL_SOCKET, libc::SO_DOMAIN, &mut domain);
    match domain[0].cast_signed() {
        libc::AF_INET | libc::AF_INET6 => {
            // `struct tcp_info`: the state; of a listening socket the connections that wait, of another what is not acknowledged; bytes received and sent.
            let mut info = [0u32; 64];
            if option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info) {
                let first = info[0].to_ne_bytes()[0];
                if first == TCP_ESTABLISHED {
                    connections.extend(ends(fd));
                }
                state.push_str(&format!(
                    " tcp {first} unacknowledged {} received {} {} acknowledged {} {}",
                    info[6], info[32], info[33], info[30], info[31]
                ));
            }
        }
        libc::AF_UNIX => state.push_str(&peeked(fd)),
        _ => {}
    }
    state
}

fn ends(fd: &OwnedFd) -> Option<(SocketAddr, SocketAddr)> {
    let here = SocketAddr::try_from(rustix::net::getsockname(fd).ok()?).ok()?;
    let there = SocketAddr::try_from(rustix::net::getpeername(fd).ok()??).ok()?;
    // Addresses of version 4 in a socket of version 6 are what they are.
    let plain = |at: SocketAddr| SocketAddr::new(at.ip().to_canonical(), at.port());
    Some((plain(here), plain(there)))
}

/// Reads a socket option of plain words; words that the kernel has not stay as they are.
fn option<const N: usize>(fd: &OwnedFd, level: i32, name: i32, into: &mut [u32; N]) -> bool {
    let mut len = size_of_val(into) as libc::socklen_t;
    let at = into.as_mut_ptr().cast();
    // SAFETY: `into` is `len` bytes; the kernel writes no more.
    unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, at, &raw mut len) == 0 }
}

/// What waits in a unix socket, as far as one look gets.
fn peeked(fd: &OwnedFd) -> String {
    let mut buffer = vec![0u8; PEEK];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    let at = buffer.as_mut_ptr().cast();
    // SAFETY: `buffer` is of that length.
    let got = unsafe { libc::recv(fd.as_raw_fd(), at, buffer.len(), flags) };
    match usize::try_from(got) {
        Ok(n) if n > 0 => {
            let hash = blake3::hash(&buffer[..n]).to_hex();
            format!(" holds {}", &hash[..12])
        }
        _ => String::new(),
    }
}

fn terminal(fd: &OwnedFd) -> String {
    let mut state = format!(" waiting {}", waiting(fd));
    if let Ok(settings) = rustix::termios::tcgetattr(fd) {
        let hash = blake3::hash(format!("{settings:?}").as_bytes()).to_hex();
        state.push_str(&format!(" settings {}", &hash[..12]));
    }
    if let Ok(size) = rustix::termios::tcgetwinsize(fd) {
        state.push_str(&format!(" size {}x{}", size.ws_col, size.ws_row));
    }
    if let Ok(group) = rustix::termios::tcgetpgrp(fd) {
        state.push_str(&format!(" foreground {}", group.as_raw_pid()));
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn own() -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        of_process(std::process::id(), &mut found, &mut BTreeSet::new()).expect("readable");
        found
    }

    fn of(fd: &impl AsRawFd) -> String {
        let key = format!(
            "process {} descriptor {} ",
            std::process::id(),
            fd.as_raw_fd()
        );
        let found = own().into_iter().find(|(k, _)| k.starts_with(&key));
        found.expect("the descriptor").1
    }

    #[test]
    fn a_pipes_contents_show_and_stay() {
        let (mut reader, mut writer) = io::pipe().expect("a pipe");
        let empty = of(&reader);
        writer.write_all(b"one").expect("written");
        let one = of(&reader);
        assert_ne!(empty, one);
        let mut read = [0; 3];
        reader.read_exact(&mut read).expect("still there");
        assert_eq!((&read, of(&reader)), (b"one", empty));
        writer.write_all(b"two").expect("written");
        assert_ne!(of(&reader), one, "as many bytes, but others");
    }

    #[test]
    fn a_sockets_contents_show_and_stay() {
        let (mut a, mut b) = UnixStream::pair().expect("a pair");
        let empty = of(&b);
        a.write_all(b"hello").expect("written");
        assert_ne!(empty, of(&b));
        let mut read = [0; 5];
        b.read_exact(&mut read).expect("still there");
        assert_eq!(&read, b"hello");
    }

    #[test]
    fn a_connection_that_waits_shows() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let before = of(&listener);
        assert_eq!(before, of(&listener));
        let at = listener.local_addr().expect("an address");
        let client = std::net::TcpStream::connect(at).expect("a connection");
        assert_ne!(before, of(&listener));
        let mut connections = BTreeSet::new();
        of_process(std::process::id(), &mut BTreeMap::new(), &mut connections).expect("readable");
        assert!(connections.contains(&(client.local_addr().expect("an address"), at)));
    }

    #[test]
    fn a_terminals_size_shows() {
        use rustix::pty::{OpenptFlags, openpt};
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        let before = of(&master);
        let mut size = rustix::termios::tcgetwinsize(&master).expect("a size");
        size.ws_col += 7;
        rustix::termios::tcsetwinsize(&master, size).expect("set");
        assert_ne!(before, of(&master));
    }
}
