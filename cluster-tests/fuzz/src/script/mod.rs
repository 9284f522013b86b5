//! What the sandbox does in a turn, chosen from a seed: lines `SLOT OPERATION ARGUMENTS`.
//!
//! Slot 0 is the sandbox's first process, the others are processes that come and go ([`SLOTS`]). Names are few, so that operations meet:
//! most turns move, link, remove and change what earlier ones made. Operations that fail (no such name) are part of the program.

mod menu;

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
    /// What the host does to the upper afterwards, see [`crate::outside`].
    pub outside: Vec<String>,
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
    /// Whether IPC objects are made. While there are any, every turn asks for a new image, which hides what else may be missed.
    objects: bool,
    /// Whether mounts are made inside.
    mounts: bool,
    /// Whether the truth is looked at seldom.
    sparse: bool,
    /// Whether there are processes that work on. What they do between two lines depends on time, so such a seed replays in its lines only.
    loops: bool,
    /// Chooses what the host does, in seeds in which it does anything.
    host: Option<Rng>,
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
            objects: seed % 5 == 3,
            mounts: seed % 7 == 5,
            sparse: seed % 2 == 1,
            loops: seed % 4 >= 2,
            // Another one, so that the sandbox does what it does without.
            host: (seed % 6 == 1).then(|| Rng::new(!seed)),
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
        let outside = self.outside();
        Turn {
            kind,
            lines,
            outside,
            check,
        }
    }

    fn outside(&mut self) -> Vec<String> {
        let recent = self.recent.clone();
        let Some(rng) = &mut self.host else {
            return Vec::new();
        };
        if !rng.one_in(5) {
            return Vec::new();
        }
        let line = |_| {
            let dir = *rng.pick(&DIRS);
            let name = *rng.pick(&NAMES);
            let file = match &recent {
                Some(recent) if rng.one_in(2) => recent.clone(),
                _ => format!("{dir}/{name}"),
            };
            let number = rng.below(10_000);
            match rng.below(4) {
                0 => format!("make {number} {dir}/host{}", rng.below(3)),
                1 => format!("mode {number} {file}"),
                2 => format!("mark {number} {file}"),
                _ => format!("append {number} {file}"),
            }
        };
        (0..3).map(line).collect()
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
        if self.rng.one_in(12) {
            return self.beside_files();
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
            let how = if self.rng.one_in(3) { "orphan" } else { "fork" };
            return Some(format!("{parent} {how} {free}"));
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
