//! What the sandbox does in a turn, chosen from a seed: lines `SLOT OPERATION ARGUMENTS`.
//!
//! Slot 0 is the sandbox's first process, the others are processes that come and go ([`SLOTS`]). Names are few, so that operations meet:
//! most turns move, link, remove and change what earlier ones made. Operations that fail (no such name) are part of the program.

use crate::rng::Rng;

/// Slots of processes, the first one included.
pub const SLOTS: usize = 6;
/// Descriptors that each process may hold, and mappings.
pub const HELD: u64 = 4;

/// Directories that the lower layer has.
pub const LOWER_DIRS: [&str; 4] = ["l0", "l0/m0", "l0/m0/n0", "l1"];
const DIRS: [&str; 12] = [
    ".", "d0", "d0/e0", "d0/e0/f0", "d1", "d1/e1", "d2", "l0", "l0/m0", "l0/m0/n0", "l1", "d1/l1",
];
/// Names in each directory of the lower layer that has files.
pub const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

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

/// What a turn is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Anything.
    Busy,
    /// Nothing, or nothing that lasts: the turn is to be found clean where the truth says so.
    Quiet,
}

/// One turn's program.
#[derive(Clone, Debug)]
pub struct Turn {
    pub kind: Kind,
    pub lines: Vec<String>,
    /// Whether the truth is looked at after it. Looking is itself a remedy for some errors (it marks times as seen), so it is rare.
    pub check: bool,
}

/// Makes the turns of one seed.
#[derive(Debug)]
pub struct Script {
    rng: Rng,
    alive: [bool; SLOTS],
    stopped: [bool; SLOTS],
    /// Who works on without being told, all through the turns.
    looping: [bool; SLOTS],
    made: u64,
    next: Option<Kind>,
    /// The file last named: what happens to one file again and again is what goes wrong.
    recent: Option<String>,
    /// Whether the truth is looked at seldom.
    sparse: bool,
    /// Whether there are processes that work on. What they do between two lines depends on time, so such a seed replays in its lines only.
    loops: bool,
}

impl Script {
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut alive = [false; SLOTS];
        alive[0] = true;
        Self {
            rng: Rng::new(seed),
            alive,
            stopped: [false; SLOTS],
            looping: [false; SLOTS],
            made: 0,
            next: None,
            recent: None,
            sparse: seed % 2 == 1,
            loops: seed % 4 >= 2,
        }
    }

    /// The next turn. `last` has it checked.
    pub fn turn(&mut self, last: bool) -> Turn {
        let kind = match self.next.take() {
            Some(Kind::Quiet) if !self.looping.contains(&true) => Kind::Quiet,
            _ => Kind::Busy,
        };
        let next = match self.rng.one_in(6) {
            true => Kind::Quiet,
            false => Kind::Busy,
        };
        self.next = Some(next);
        let mut lines = self.all_looping("continue");
        match kind {
            Kind::Quiet => self.quiet(&mut lines),
            Kind::Busy => {
                if self.made == 0 {
                    self.beginning(&mut lines);
                }
                // One operation alone is the hardest: nothing else hides that it was missed.
                let count = match self.rng.below(4) {
                    0 | 1 => 1,
                    2 => 1 + self.rng.below(4),
                    _ => 1 + self.rng.below(24),
                };
                for _ in 0..count {
                    let line = self.line();
                    lines.push(line);
                }
            }
        }
        // As the freezer would, before the look.
        lines.extend(self.all_looping("stop"));
        let quiet = kind == Kind::Quiet || next == Kind::Quiet;
        let check = match self.sparse {
            true => self.rng.one_in(12),
            false => quiet || self.rng.one_in(5),
        };
        let check = check || last;
        Turn { kind, lines, check }
    }

    fn all_looping(&self, what: &str) -> Vec<String> {
        let them = (1..SLOTS).filter(|k| self.looping[*k] && !self.stopped[*k]);
        them.map(|k| format!("0 {what} {k}")).collect()
    }

    /// Directories and files to begin with, so that most operations find what they are for.
    fn beginning(&mut self, lines: &mut Vec<String>) {
        for dir in DIRS {
            lines.push(format!("0 mkdir {dir}"));
            for name in NAMES {
                if self.rng.one_in(2) {
                    let size = self.rng.below(12_000);
                    lines.push(format!("0 write {dir}/{name} {size} 9"));
                }
            }
        }
    }

    fn quiet(&mut self, lines: &mut Vec<String>) {
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

    fn dir(&mut self) -> &'static str {
        self.rng.pick::<&'static str>(&DIRS)
    }

    fn path(&mut self) -> String {
        if self.rng.one_in(12) {
            return self.dir().to_owned();
        }
        self.file()
    }

    fn file(&mut self) -> String {
        if let Some(recent) = &self.recent
            && self.rng.one_in(4)
        {
            return recent.clone();
        }
        let file = self.any_file();
        self.recent = Some(file.clone());
        file
    }

    fn any_file(&mut self) -> String {
        let dir = match self.rng.one_in(2) {
            true => *self.rng.pick(&DIRS[..4]),
            false => self.dir(),
        };
        let name = match self.rng.one_in(30) {
            true => "odd\\012\u{e9}(deleted)",
            false => *self.rng.pick(&NAMES),
        };
        match dir {
            "." => name.to_owned(),
            dir => format!("{dir}/{name}"),
        }
    }

    /// A process that can be spoken to.
    fn slot(&mut self) -> usize {
        let can: Vec<usize> = (0..SLOTS)
            .filter(|k| self.alive[*k] && !self.stopped[*k] && !self.looping[*k])
            .collect();
        *self.rng.pick(&can)
    }

    fn line(&mut self) -> String {
        if self.rng.one_in(10)
            && let Some(line) = self.processes()
        {
            return line;
        }
        let slot = self.slot();
        let bear = if self.rng.one_in(25) { "bear " } else { "" };
        format!("{slot} {bear}{}", self.operation())
    }

    fn processes(&mut self) -> Option<String> {
        let others: Vec<usize> = (1..SLOTS).filter(|k| self.alive[*k]).collect();
        let free = (1..SLOTS).find(|k| !self.alive[*k]);
        if let Some(free) = free
            && (others.len() < 2 || self.rng.one_in(2))
        {
            let parent = self.slot();
            self.alive[free] = true;
            return Some(format!("{parent} fork {free}"));
        }
        if others.is_empty() {
            return None;
        }
        let k = *self.rng.pick(&others);
        if self.stopped[k] {
            self.stopped[k] = false;
            return Some(format!("0 continue {k}"));
        }
        if self.looping[k] && self.rng.one_in(3) {
            self.looping[k] = false;
            return Some(format!("{k} halt"));
        }
        Some(match self.rng.below(if self.looping[k] { 2 } else { 4 }) {
            0 => {
                self.stopped[k] = true;
                format!("0 stop {k}")
            }
            1 => {
                self.alive[k] = false;
                self.looping[k] = false;
                format!("0 kill {k}")
            }
            2 if self.loops => {
                self.looping[k] = true;
                format!("{k} loop {k}")
            }
            2 => format!("{k} memory {}", self.rng.below(256)),
            _ => format!("{k} nothing"),
        })
    }

    fn operation(&mut self) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_gives_the_same_turns() {
        let turns = |seed| -> Vec<Vec<String>> {
            let mut script = Script::new(seed);
            (0..200).map(|_| script.turn(false).lines).collect()
        };
        assert_eq!(turns(7), turns(7));
        assert_ne!(turns(7), turns(8));
    }
}
