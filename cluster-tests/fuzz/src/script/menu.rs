//! The operations to choose from.

use super::{HELD, SLOTS, Script};

/// Ways to do something and undo it.
const WAYS: [&str; 10] = [
    "file", "mkdir", "symlink", "fifo", "rename", "link", "xattr", "chmod", "times", "truncate",
];
/// Ways to change a mapped file that are no plain stores.
const STORES: [&str; 6] = [
    "move",
    "remove",
    "through-proc",
    "by-reading",
    "by-device",
    "by-call",
];

impl Script {
    pub(super) fn quiet(&mut self, lines: &mut Vec<String>) {
        match self.rng.below(6) {
            0 => {}
            1 => lines.push("0 readall".into()),
            2 => lines.push("0 bear program /usr/bin/true".into()),
            3 => lines.push(format!("0 bear {}", self.passing())),
            _ => lines.push(format!("0 {}", self.passing())),
        }
    }

    /// What changes nothing in the end.
    fn passing(&mut self) -> String {
        let (path, dir) = (self.path(), self.dir());
        match self.rng.below(14) {
            0 => format!("samebytes {path}"),
            1 => format!("shm samebytes {}", self.memory_file()),
            2 => format!("shm back {} {}", self.way(), self.memory_file()),
            3 => format!("back times {path} ."),
            _ => format!("back {} {path} {dir}", self.way()),
        }
    }

    fn way(&mut self) -> &'static str {
        self.rng.pick::<&'static str>(&WAYS)
    }

    fn memory_file(&mut self) -> &'static str {
        self.rng
            .pick::<&'static str>(&["s0", "s1", "s2", "sd", "sd/s3"])
    }

    pub(super) fn operation(&mut self) -> String {
        let (p, q, f) = (self.path(), self.path(), self.file());
        let dir = self.dir();
        let held = self.rng.below(HELD);
        let byte = 1 + self.rng.below(255);
        let size = *self
            .rng
            .pick(&[0, 1, 40, 4095, 4096, 8192, 20_000, 100_000]);
        let at = *self.rng.pick(&[0, 1, 100, 4000, 4096, 8000, 30_000]);
        self.made += 1;
        match self.rng.below(104) {
            0..=4 => format!("write {f} {size} {byte}"),
            5 => format!("append {f} {size} {byte}"),
            6..=8 => format!("patch {f} {at} 7 {byte}"),
            9 => format!("twice {f} {byte}"),
            10 => format!("truncate {f} {size}"),
            11 => format!("fallocate {f} 0 {at} 5000"),
            12 => format!("fallocate {f} 1 {at} 5000"),
            13 => format!("fallocate {f} 3 0 4096"),
            14 => format!("fallocate {f} 16 0 4096"),
            15 => format!("patch {f} 1048576 5 {byte}"),
            16 => format!("direct {f} {byte}"),
            17 => format!("splice {f}"),
            18 => format!("sendfile {p} {f}"),
            19 => format!("copyrange {p} {f}"),
            20 => format!("symlink {q} {f}"),
            21 => format!("fifo {f}"),
            22..=24 => format!("mkdir {dir}"),
            25 => format!("rmdir {dir}"),
            26 => format!("removetree {dir}"),
            27..=29 => format!("unlink {f}"),
            30..=32 => format!("rename {p} {q}"),
            33 => format!("rename {dir} {}", self.dir()),
            34 => format!("exchange {p} {q}"),
            35 => format!("whiteout {f} {q}"),
            36..=37 => format!("link {f} {}", self.file()),
            38..=39 => format!("chmod {p} {}", 0o400 + self.rng.below(0o400)),
            40 => format!("chown {p} {} {}", self.rng.below(3), self.rng.below(3)),
            41 => format!("utimes {p} {}", 1_000_000 + self.rng.below(1000)),
            42 => format!("utimes {p} now"),
            43..=44 => format!("setxattr {p} user.k{} v{byte}", self.rng.below(3)),
            45 => format!("rmxattr {p} user.k{}", self.rng.below(3)),
            46 => format!("setxattr {p} user.big {}", "x".repeat(byte as usize * 4)),
            47 => format!("acl {p} {byte}"),
            48 => format!("flags {p} {}", *self.rng.pick(&[0, 0x40, 0x80, 0xc0])),
            49 => format!("tmpfile {held} {dir} {byte}"),
            50..=51 => format!("linkheld {held} {f}"),
            52..=53 => format!("open {held} {f}"),
            54..=56 => format!("heldwrite {held} {at} {byte}"),
            57 => format!("heldtruncate {held} {size}"),
            58 => format!("heldchmod {held} {}", 0o400 + self.rng.below(0o400)),
            59 => format!("close {held}"),
            60 => format!("map {held} {f}"),
            61 => format!("mapheld {held} {}", self.rng.below(HELD)),
            62..=64 => format!("store {held} {at} {byte}"),
            // Where a chain has its mapping.
            65..=66 => format!("store 3 {at} {byte}"),
            67 => format!("unmap {held}"),
            68 => format!("fsync {f}"),
            69..=70 => format!("shmmap {held} {}", *self.rng.pick(&["s0", "s1", "s2"])),
            71..=72 => format!("behind {f} {byte}"),
            73..=74 => format!("mapelsewhere {held} {f}"),
            75 => format!("device {f} {}", *self.rng.pick(&[3, 5, 7])),
            76 => format!("socket {f}"),
            77 => "lock 3".into(),
            78 => "hide 3".into(),
            79..=80 => format!("unlockstore 3 {at} {byte}"),
            81..=83 => format!("chain {f} {byte}"),
            84..=85 => self.passing(),
            86..=88 => format!("mapped {} {held} {byte}", *self.rng.pick(&STORES)),
            89..=90 => format!("mapped {} 3 {byte}", *self.rng.pick(&STORES)),
            91 => format!("heldxattr {held} {byte}"),
            92 => "program /usr/bin/true".into(),
            _ => self.in_memory(),
        }
    }

    /// On processes, and on objects of the kernel.
    pub(super) fn beside_files(&mut self) -> String {
        let (slot, byte, dir) = (self.slot(), self.rng.below(256), self.dir());
        let bear = if self.rng.one_in(2) { "bear " } else { "" };
        if self.objects && self.rng.one_in(2) {
            let key = 1 + self.rng.below(2);
            let what = match self.rng.below(12) {
                0 => format!("segment {key}"),
                1 => format!("store {key} {byte} {byte}"),
                2 => format!("semaphore {key}"),
                3 => format!("message {key} {byte}"),
                4 => format!("queue q{key} {byte}"),
                5 => format!("unqueue q{key}"),
                6..=7 => format!("unsegment {key}"),
                8..=9 => format!("unsemaphore {key}"),
                _ => format!("unmessage {key}"),
            };
            return format!("0 {bear}ipc {what}");
        }
        if self.mounts && self.rng.one_in(3) {
            let place = format!("mounted{}", byte % 2);
            return match self.rng.below(4) {
                0 => format!("0 {bear}mount tmpfs {place}"),
                1 => format!("0 {bear}mount bind {dir} {place}"),
                2 => format!("0 {bear}write {place}/a 100 {byte}"),
                _ => format!("0 {bear}mount away {place}"),
            };
        }
        // From the first process, or from one that is gone afterwards, so that nothing else tells.
        let others: Vec<usize> = (1..SLOTS).filter(|k| self.alive[*k]).collect();
        if !others.is_empty() && self.rng.one_in(2) {
            let k = *self.rng.pick(&others);
            let what = match self.rng.below(7) {
                0 => format!("signal {k}"),
                1 => format!("nice {k} {byte}"),
                2 => format!("limit {k} {}", byte * 4096),
                3 => format!("score {k} {byte}"),
                4 => format!("datagram {dir}/datagrams {byte}"),
                5 => format!("poke {k} {byte}"),
                _ => format!("connect {}", byte % 2),
            };
            return format!("0 {bear}other {what}");
        }
        let what = match self.rng.below(20) {
            0 => format!("name n{byte}"),
            1 => format!("mask {byte}"),
            2 => "group".into(),
            3 => "session".into(),
            4 => format!("nice {byte}"),
            5 => format!("limit {}", byte * 4096),
            6 => format!("timer {byte}"),
            7 => format!("pipe {}", byte * 200),
            8 => format!("pair {}", byte * 50),
            9 => format!("memfd {byte}"),
            10 => format!("shared {byte}"),
            11 => format!("event {byte}"),
            12 => format!("lock {}", byte % HELD),
            13 => format!("seek {} {byte}", byte % HELD),
            14..=15 => format!("datagrams {dir}/datagrams"),
            16..=17 => format!("listen {}", byte % 2),
            18 => "thread".into(),
            _ => "unthread".into(),
        };
        format!("{slot} own {what}")
    }

    /// On the memory file system.
    fn in_memory(&mut self) -> String {
        let (name, other) = (self.memory_file(), self.memory_file());
        let byte = 1 + self.rng.below(255);
        let size = *self.rng.pick(&[0, 40, 8192, 20_000]);
        let what = match self.rng.below(18) {
            0..=2 => format!("write {name} {size} {byte}"),
            3..=4 => format!("patch {name} {} {byte}", *self.rng.pick(&[0, 100, 4096])),
            5 => format!("truncate {name} {size}"),
            6 => format!("remove {name}"),
            7 => "mkdir sd".into(),
            8 => format!("rename {name} {other}"),
            9 => format!("link {name} {other}"),
            10 => format!("symlink {byte} {other}"),
            11 => format!("chmod {name} {}", 0o400 + self.rng.below(0o400)),
            12 => format!("chown {name} {}", self.rng.below(3)),
            13 => format!("utimes {name} {}", 1_000_000 + self.rng.below(1000)),
            14 => format!("xattr {name} v{byte}"),
            15..=16 => format!("behind {name} {byte}"),
            _ => format!("post {}", byte % 2),
        };
        format!("shm {what}")
    }
}
