//! The way from a sandbox to the outside.
//!
//! Every sandbox has the same inner address, so that listeners and connections bound to it fit on any host after a restore.
//! A second namespace beside each sandbox's own, its router, translates that address into one that is unique on this
//! host, and the host translates that into its own. Both links end with the router's namespace; what stays on the host is one
//! table of rules and one claimed address, both removed with the sandbox.
//!
//! The sandbox may reach the outside and nothing else: not the host's own services, not other sandboxes, not the
//! link-local addresses that clouds serve credentials on.

use crate::command::{run, run_ok, tail};
use crate::error::{Context, Result, SandboxError};
use crate::netns;
use crate::record::Record;
use std::fs;
use std::io::{ErrorKind, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

const INNER: &str = "10.77.0.2";
const GATEWAY: &str = "10.77.0.1";
/// The same everywhere, so that what a restored sandbox remembers of its neighbour stays true.
const INNER_MAC: &str = "02:54:50:00:00:02";
const GATEWAY_MAC: &str = "02:54:50:00:00:01";
/// Address pairs between routers and the host, from the range set aside for carriers.
const PAIRS: u32 = 1 << 20;
const CLAIMS: &str = "/run/tidepool-nat";
const LIMIT: Duration = Duration::from_secs(20);

/// The names of one sandbox's way out.
struct Way {
    sandbox: String,
    router: PathBuf,
    link: String,
    table: String,
}

impl Way {
    fn of(record: &Record) -> Self {
        let sandbox = record
            .netns
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let id = sandbox.trim_start_matches("tp-").to_owned();
        Self {
            router: record.netns.with_file_name(format!("{sandbox}-r")),
            link: format!("tpo{id}"),
            table: format!("tidepool_{id}"),
            sandbox,
        }
    }
}

fn addresses(index: u32) -> (Ipv4Addr, Ipv4Addr) {
    let first = u32::from(Ipv4Addr::new(100, 64, 0, 0)) + index * 2;
    (Ipv4Addr::from(first), Ipv4Addr::from(first + 1))
}

/// Claims a pair of addresses for this sandbox: a file whose name is the pair and whose content is the owner.
fn claim(record: &Record) -> Result<u32> {
    fs::create_dir_all(CLAIMS).context(|| format!("cannot make {CLAIMS}"))?;
    let owner = record.netns.as_os_str().as_encoded_bytes();
    let start = owner
        .iter()
        .fold(0u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(*b)));
    for n in 0..PAIRS {
        let index = start.wrapping_add(n) % PAIRS;
        let path = Path::new(CLAIMS).join(index.to_string());
        match fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
        {
            Ok(mut file) => {
                file.write_all(owner)
                    .context(|| format!("cannot write {}", path.display()))?;
                return Ok(index);
            }
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).context(|| format!("cannot make {}", path.display())),
        }
    }
    Err(SandboxError::Invalid(
        "no address is left for a sandbox's network".into(),
    ))
}

fn release(record: &Record) {
    let owner = record.netns.as_os_str().as_encoded_bytes();
    for entry in fs::read_dir(CLAIMS).into_iter().flatten().flatten() {
        if fs::read(entry.path()).is_ok_and(|o| o == owner) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Feeds text to a program.
async fn feed(what: &str, program: &str, args: &[&str], text: &str) -> Result<()> {
    let file = tempfile(text)?;
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(file)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let output = run(what, &mut command, LIMIT).await?;
    if output.status.success() {
        return Ok(());
    }
    Err(SandboxError::Command {
        what: what.to_owned(),
        status: output.status.to_string(),
        stderr: tail(&output.stderr, 2000),
    })
}

/// An unnamed file with this text, to read from.
fn tempfile(text: &str) -> Result<fs::File> {
    let make = || -> std::io::Result<fs::File> {
        let memory = rustix::fs::memfd_create("tidepool", rustix::fs::MemfdFlags::CLOEXEC)?;
        let mut file = fs::File::from(memory);
        file.write_all(text.as_bytes())?;
        std::io::Seek::rewind(&mut file)?;
        Ok(file)
    };
    make().context(|| "a file in memory".into())
}

/// Opens the way out of a sandbox whose namespace exists.
pub(crate) async fn open(record: &Record) -> Result<()> {
    let way = Way::of(record);
    let (ours, theirs) = addresses(claim(record)?);
    netns::create(&way.router)?;
    netns::inside(&way.router, || {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")
            .context(|| "cannot forward in a router namespace".into())
    })?;
    // Inside the thread's view of /proc this is the host's own setting.
    if fs::read_to_string("/proc/sys/net/ipv4/ip_forward").is_ok_and(|f| f.trim() == "0") {
        tracing::warn!("switching IPv4 forwarding on: sandboxes with a network need it");
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")
            .context(|| "cannot switch IPv4 forwarding on".into())?;
    }
    let router = way
        .router
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let (link, sandbox, table) = (&way.link, &way.sandbox, &way.table);
    let host = format!(
        "link add {link} type veth peer name outer netns {router}\n\
         addr add {ours}/31 dev {link}\n\
         link set {link} up\n"
    );
    feed(
        "laying a sandbox's outer link",
        "ip",
        &["-batch", "-"],
        &host,
    )
    .await?;
    let inner = format!(
        "link add inner address {GATEWAY_MAC} type veth peer name eth0 address {INNER_MAC} netns {sandbox}\n\
         addr add {GATEWAY}/30 dev inner\n\
         link set inner up\n\
         addr add {theirs}/31 dev outer\n\
         link set outer up\n\
         route add default via {ours}\n"
    );
    feed(
        "laying a sandbox's inner link",
        "ip",
        &["-n", &router, "-batch", "-"],
        &inner,
    )
    .await?;
    let end = format!(
        "addr add {INNER}/30 dev eth0\nlink set eth0 up\nroute add default via {GATEWAY}\n"
    );
    feed(
        "setting a sandbox's address",
        "ip",
        &["-n", sandbox, "-batch", "-"],
        &end,
    )
    .await?;
    let translate = "table ip tidepool {\n\
         chain out {\n\
         type nat hook postrouting priority 100\n\
         oifname \"outer\" masquerade\n\
         }\n\
         }\n";
    feed(
        "a router's rules",
        "ip",
        &["netns", "exec", &router, "nft", "-f", "-"],
        translate,
    )
    .await?;
    let guard = format!(
        "table ip {table} {{\n\
         chain out {{\n\
         type nat hook postrouting priority 100\n\
         ip saddr {theirs} oifname != \"tpo*\" masquerade\n\
         }}\n\
         chain host {{\n\
         type filter hook input priority 0\n\
         iifname \"{link}\" ct state established,related accept\n\
         iifname \"{link}\" drop\n\
         }}\n\
         chain through {{\n\
         type filter hook forward priority 0\n\
         iifname \"{link}\" oifname \"tpo*\" drop\n\
         iifname \"{link}\" ip daddr 169.254.0.0/16 drop\n\
         oifname \"{link}\" ct state established,related accept\n\
         oifname \"{link}\" drop\n\
         }}\n\
         }}\n"
    );
    feed(
        "the host's rules for a sandbox",
        "nft",
        &["-f", "-"],
        &guard,
    )
    .await
}

/// Closes the way out; fine if there is none or only a part.
pub(crate) async fn close(record: &Record) -> Result<()> {
    let way = Way::of(record);
    if fs::exists(Path::new("/sys/class/net").join(&way.link)).unwrap_or(true) {
        // Its other end goes with it. Both may be gone with the namespace already.
        let _ = run_ok(
            "removing a link",
            Command::new("ip").args(["link", "del", &way.link]),
            LIMIT,
        )
        .await;
    }
    netns::remove(&way.router)?;
    let tables = run_ok(
        "listing rules",
        Command::new("nft").args(["list", "tables", "ip"]),
        LIMIT,
    )
    .await?;
    if String::from_utf8_lossy(&tables)
        .lines()
        .any(|l| l.trim() == format!("table ip {}", way.table))
    {
        run_ok(
            "removing rules",
            Command::new("nft").args(["delete", "table", "ip", &way.table]),
            LIMIT,
        )
        .await?;
    }
    release(record);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_pairs_stay_in_their_range() {
        assert_eq!(
            addresses(0),
            (Ipv4Addr::new(100, 64, 0, 0), Ipv4Addr::new(100, 64, 0, 1))
        );
        assert_eq!(addresses(PAIRS - 1).1, Ipv4Addr::new(100, 95, 255, 255));
    }
}
