//! What one process holds in the kernel, and in which state: pipes, sockets, terminals, event counters, limits, signals that wait.
//!
//! Descriptors are duplicated into this process for a moment (`pidfd_getfd`) and asked; nothing is consumed. The states are texts, to be
//! compared for equality and shown to people.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, openat, statat};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::procfs::{directory, link_at, read_at};
use crate::surroundings::{bounded, gone, process_key};

/// Descriptors looked at of one process.
const MAX_DESCRIPTORS: usize = 4096;
/// Open files of one name that one is compared with.
const MAX_COMPARED: usize = 8;
/// Open files that are held for that. Others are read as often as they are met.
const MAX_HELD: usize = 256;
/// Bytes of a pipe's or a unix socket's contents looked at; a pipe has no more by default.
const PEEK: usize = 64 << 10;
/// The state of a connection that is neither begun nor ending.
const TCP_ESTABLISHED: u8 = 1;

/// The ends of connections, the own one first.
pub(crate) type Connections = BTreeSet<(SocketAddr, SocketAddr)>;

/// Reads what the processes of one sandbox hold, one process after the other.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// By `process PID thing`.
    pub(crate) objects: BTreeMap<String, String>,
    /// Established ones.
    pub(crate) connections: Connections,
    /// The open files that were read, by their names.
    open: HashMap<String, Vec<Open>>,
    held: usize,
}

/// An open file, held by this process until the end of the reading: so it is the one that was read, whatever is behind the descriptor by now.
#[derive(Debug)]
struct Open {
    file: OwnedFd,
    state: String,
}

impl Reader {
    /// Adds those of a process.
    pub(crate) fn process(&mut self, pid: u32) -> io::Result<()> {
        let who = process_key(pid);
        let at = directory(format!("/proc/{pid}"))?;
        self.objects.insert(who.clone(), itself(&at)?);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut process = Process {
            pid,
            descriptors: openat(&at, "fd", flags, Mode::empty())?,
            at,
            handle: None,
        };
        for (count, fd) in process.numbers()?.into_iter().enumerate() {
            if count >= MAX_DESCRIPTORS {
                return Err(io::Error::other(format!(
                    "{who} has more than {MAX_DESCRIPTORS} descriptors"
                )));
            }
            match self.descriptor(&mut process, fd) {
                Ok((what, state)) => {
                    let key = format!("{who} descriptor {fd} {what}");
                    self.objects.insert(key, state);
                }
                // Closed meanwhile.
                Err(e) if gone(&e) || e.raw_os_error() == Some(libc::EBADF) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Its name and its state. Many descriptors are inherited, and what others can change of one is of the open file: that is read once. The state has
    /// two things that are the descriptor's or the process's own, close-on-exec and record locks, which only a process that runs can change.
    fn descriptor(&mut self, process: &mut Process, fd: i32) -> io::Result<(String, String)> {
        let number = fd.to_string();
        let name = bounded(link_at(&process.descriptors, &number)?);
        let same = self.open.entry(name.clone()).or_default();
        let known = same
            .iter()
            .take(MAX_COMPARED)
            .find(|o| o.is_at(process.pid, fd));
        if let Some(open) = known {
            return Ok((name, open.state.clone()));
        }
        let file = match self.held {
            MAX_HELD.. => None,
            _ => process.copy(fd).ok(),
        };
        let state = process.state(&name, &number, fd, &mut self.connections)?;
        let open = file.map(|file| Open {
            file,
            state: state.clone(),
        });
        // It was behind the descriptor before the reading and is after it, so that it is the one that was read.
        if let Some(open) = open.filter(|o| o.is_at(process.pid, fd)) {
            self.held += 1;
            same.push(open);
        }
        Ok((name, state))
    }
}

impl Open {
    fn is_at(&self, pid: u32, fd: i32) -> bool {
        same_file((std::process::id(), self.file.as_raw_fd()), (pid, fd))
    }
}

/// Whether two descriptors of two processes are one open file. Where the kernel cannot say, they are not.
fn same_file(one: (u32, i32), other: (u32, i32)) -> bool {
    // KCMP_FILE
    let kind = 0;
    // SAFETY: numbers only.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one.0, other.0, kind, one.1, other.1) };
    order == 0
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
    pid: u32,
    at: OwnedFd,
    descriptors: OwnedFd,
    handle: Option<OwnedFd>,
}

impl Process {
    fn numbers(&self) -> io::Result<Vec<i32>> {
        let mut buffer = Vec::with_capacity(8 << 10);
        let mut entries = RawDir::new(&self.descriptors, buffer.spare_capacity_mut());
        let mut found = Vec::new();
        while let Some(entry) = entries.next() {
            let name = entry?;
            let number = name.file_name().to_str().ok();
            found.extend(number.and_then(|n| n.parse::<i32>().ok()));
        }
        Ok(found)
    }

    /// A descriptor of this process that is the same open file.
    fn copy(&mut self, fd: i32) -> io::Result<OwnedFd> {
        let handle = match self.handle.take() {
            Some(handle) => handle,
            None => {
                let pid = Pid::from_raw(self.pid.cast_signed());
                let not = io::Error::from_raw_os_error(libc::ESRCH);
                pidfd_open(pid.ok_or(not)?, PidfdFlags::empty())?
            }
        };
        let handle = self.handle.insert(handle);
        Ok(pidfd_getfd(handle, fd, PidfdGetfdFlags::empty())?)
    }

    fn state(
        &mut self,
        name: &str,
        number: &str,
        fd: i32,
        connections: &mut Connections,
    ) -> io::Result<String> {
        let info = read_at(&self.at, &format!("fdinfo/{number}"))?;
        let info = String::from_utf8_lossy(&info);
        // Position and flags are of the open file, which another process may share. What else there is depends on the kind; times pass by themselves.
        let lines = [
            "pos:",
            "flags:",
            "eventfd-count:",
            "sigmask:",
            "ticks:",
            "lock:",
            // What an epoll or inotify descriptor watches, and a timer's interval: another process may share it.
            "tfd:",
            "inotify wd:",
            "it_interval:",
        ];
        let lines = info
            .lines()
            .filter(|l| lines.iter().any(|p| l.starts_with(p)));
        let mut state = lines
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
            .join(" ");
        if name.starts_with("socket:[") {
            state.push_str(&socket(&self.copy(fd)?, connections));
        } else if name.starts_with("pipe:[") {
            state.push_str(&pipe(&self.copy(fd)?)?);
        } else if name.starts_with("anon_inode:inotify") {
            state.push_str(&format!(" waiting {}", waiting(&self.copy(fd)?)));
        } else if !name.starts_with("anon_inode:") {
            let meta = statat(&self.descriptors, number, AtFlags::empty())?;
            let kind = FileType::from_raw_mode(meta.st_mode);
            if kind == FileType::Fifo {
                state.push_str(&pipe(&self.copy(fd)?)?);
            } else if kind == FileType::CharacterDevice && terminal_major(libc::major(meta.st_rdev))
            {
                state.push_str(&terminal(&self.copy(fd)?));
            } else if name.starts_with("/memfd:") {
                state.push_str(&format!(
                    " size {} changed {}.{}",
                    meta.st_size, meta.st_mtime, meta.st_mtime_nsec
                ));
            }
        }
        Ok(bounded(state))
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

    fn read() -> Reader {
        let mut reader = Reader::default();
        reader.process(std::process::id()).expect("readable");
        reader
    }

    fn of(fd: &impl AsRawFd) -> String {
        let key = format!(
            "process {} descriptor {} ",
            std::process::id(),
            fd.as_raw_fd()
        );
        let found = read()
            .objects
            .into_iter()
            .find(|(k, _)| k.starts_with(&key));
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
        assert!(
            read()
                .connections
                .contains(&(client.local_addr().expect("an address"), at))
        );
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
