//! Names of users and groups, as the sandbox's own `/etc/passwd` and `/etc/group` have them.
//!
//! Both files belong to the sandbox and may be anything: they are opened without waiting, must be regular files, and only
//! their first part counts.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

const MAX_FILE: u64 = 1024 * 1024;
const MAX_GROUPS: usize = 64;

/// Who a job runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) name: Option<String>,
    pub(crate) home: String,
}

/// Finds who `user` is (`name`, `uid`, either with `:group`).
pub(crate) fn lookup(user: &str) -> Result<Identity, String> {
    resolve(user, &read("/etc/passwd"), &read("/etc/group"))
}

fn read(path: &str) -> String {
    let mut bytes = Vec::new();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    if let Ok(file) = file
        && file.metadata().is_ok_and(|m| m.is_file())
        && file.take(MAX_FILE).read_to_end(&mut bytes).is_err()
    {
        bytes.clear();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn resolve(user: &str, passwd: &str, group: &str) -> Result<Identity, String> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((u, g)) => (u, Some(g)),
        None => (user, None),
    };
    let number = user.parse::<u32>().ok().filter(|n| *n != u32::MAX);
    let entry = passwd.lines().find_map(|line| {
        let f: Vec<&str> = line.split(':').collect();
        let uid = f.get(2)?.parse::<u32>().ok()?;
        let gid = f.get(3)?.parse::<u32>().ok()?;
        let hit = f.first().is_some_and(|n| *n == user) || number == Some(uid);
        hit.then(|| {
            (
                uid,
                gid,
                f[0].to_owned(),
                f.get(5).copied().unwrap_or("/").to_owned(),
            )
        })
    });
    let mut identity = match (entry, number) {
        (Some((uid, gid, name, home)), _) => {
            let home = if home.starts_with('/') {
                home
            } else {
                "/".into()
            };
            Identity {
                uid,
                gid,
                groups: Vec::new(),
                name: Some(name),
                home,
            }
        }
        // Root needs no entry: images without any user database run as well.
        (None, Some(0)) => Identity {
            uid: 0,
            gid: 0,
            groups: vec![],
            name: Some("root".into()),
            home: "/root".into(),
        },
        (None, None) if user == "root" => Identity {
            uid: 0,
            gid: 0,
            groups: vec![],
            name: Some("root".into()),
            home: "/root".into(),
        },
        (None, Some(uid)) => Identity {
            uid,
            gid: 0,
            groups: vec![],
            name: None,
            home: "/".into(),
        },
        (None, None) => {
            return Err(format!(
                "no user named {user:?} in the sandbox's /etc/passwd"
            ));
        }
    };
    let groups = group.lines().filter_map(|line| {
        let f: Vec<&str> = line.split(':').collect();
        Some((
            *f.first()?,
            f.get(2)?.parse::<u32>().ok()?,
            f.get(3).copied().unwrap_or(""),
        ))
    });
    match wanted_group {
        Some(g) => {
            identity.gid = match g.parse::<u32>().ok().filter(|n| *n != u32::MAX) {
                Some(gid) => gid,
                None => groups
                    .into_iter()
                    .find(|(name, ..)| *name == g)
                    .map(|(_, gid, _)| gid)
                    .ok_or_else(|| format!("no group named {g:?} in the sandbox's /etc/group"))?,
            };
        }
        None => {
            if let Some(name) = &identity.name {
                identity.groups = groups
                    .filter(|(_, _, members)| members.split(',').any(|m| m == name))
                    .map(|(_, gid, _)| gid)
                    .take(MAX_GROUPS)
                    .collect();
            }
        }
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nann:x:1000:100:Ann:/home/ann:/bin/sh\nbad line\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:ann,bob\nusers:x:100:\n";

    fn at(user: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        resolve(user, PASSWD, GROUP).map(|i| (i.uid, i.gid, i.groups, i.home))
    }

    #[test]
    fn names_numbers_and_groups_resolve() {
        assert_eq!(at("ann"), Ok((1000, 100, vec![10], "/home/ann".into())));
        assert_eq!(at("1000"), Ok((1000, 100, vec![10], "/home/ann".into())));
        assert_eq!(at("ann:wheel"), Ok((1000, 10, vec![], "/home/ann".into())));
        assert_eq!(at("7:9"), Ok((7, 9, vec![], "/".into())));
        assert_eq!(at("0"), Ok((0, 0, vec![], "/root".into())));
        assert!(at("eve").is_err());
        assert!(at("ann:nobody").is_err());
        assert!(at("4294967295").is_err(), "-1 would mean: leave unchanged");
        assert_eq!(resolve("root", "", "").map(|i| i.uid), Ok(0));
    }
}
