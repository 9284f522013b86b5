//! Which capture runs next on a host: a pure queue with a limit for each stage.
//!
//! A job goes through capture -> cut and hash -> upload -> commit. Each stage runs at most so many jobs at once. Among jobs ready for a stage, one whose
//! caller already waits goes first; then the one whose answer is due earliest; bulk (base images) last. Within one rank tenants take turns: the
//! one that was served least goes first, so that no tenant starves another.
//!
//! The daemon asks [`Engine::poll`] what to start and tells [`Engine::done`] what ended. Time is an argument.

use std::collections::BTreeMap;

/// A job's id, chosen by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// What a job does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    Capture,
    Cut,
    Upload,
    Commit,
}

impl Stage {
    const ALL: [Stage; 4] = [Stage::Capture, Stage::Cut, Stage::Upload, Stage::Commit];

    fn next(self) -> Option<Stage> {
        match self {
            Stage::Capture => Some(Stage::Cut),
            Stage::Cut => Some(Stage::Upload),
            Stage::Upload => Some(Stage::Commit),
            Stage::Commit => None,
        }
    }
}

/// How urgent a job is, most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// Its answer is there and waits for the commit.
    Waiting,
    /// Its answer is expected at this time, in microseconds of the caller's clock.
    Due(u64),
    /// Nobody waits: images and other bulk.
    Bulk,
}

/// A job to queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    pub id: JobId,
    /// Who it is for; tenants share the stages fairly.
    pub tenant: String,
    pub rank: Rank,
}

/// How many jobs each stage may run, and how many may be queued in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub capture: usize,
    pub cut: usize,
    pub upload: usize,
    pub commit: usize,
    pub queued: usize,
}

impl Limits {
    /// Limits for a host with so many cores: dumps beyond the number of cores only slow each other.
    pub fn for_cores(cores: usize) -> Self {
        let cores = cores.max(1);
        Self {
            capture: cores,
            cut: cores,
            upload: 2 * cores,
            commit: 64,
            queued: 4096,
        }
    }

    fn of(&self, stage: Stage) -> usize {
        match stage {
            Stage::Capture => self.capture,
            Stage::Cut => self.cut,
            Stage::Upload => self.upload,
            Stage::Commit => self.commit,
        }
    }
}

/// The queue is full: the caller waits or gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} captures are queued on this host already")]
pub struct Full(pub usize);

#[derive(Debug)]
struct Entry {
    job: Job,
    stage: Stage,
    running: bool,
    /// The order of arrival, for ties.
    seq: u64,
}

/// The queue.
#[derive(Debug)]
pub struct Engine {
    limits: Limits,
    jobs: BTreeMap<JobId, Entry>,
    /// How many stages each tenant with queued jobs was given.
    served: BTreeMap<String, u64>,
    seq: u64,
}

impl Engine {
    /// An empty queue.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            jobs: BTreeMap::new(),
            served: BTreeMap::new(),
            seq: 0,
        }
    }

    /// Jobs in it, running or not.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Whether it has no job.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// How many jobs wait for and run in a stage: the visible back pressure.
    pub fn load(&self, stage: Stage) -> (usize, usize) {
        let at = self.jobs.values().filter(|e| e.stage == stage);
        let running = at.clone().filter(|e| e.running).count();
        (at.count() - running, running)
    }

    /// Queues a job at its first stage. A job of the same id is replaced.
    pub fn push(&mut self, job: Job) -> Result<(), Full> {
        if self.jobs.len() >= self.limits.queued && !self.jobs.contains_key(&job.id) {
            return Err(Full(self.jobs.len()));
        }
        // A tenant that comes anew starts level with the least served: absence earns no credit.
        let floor = self.served.values().min().copied().unwrap_or(0);
        self.served.entry(job.tenant.clone()).or_insert(floor);
        self.seq += 1;
        let entry = Entry {
            stage: Stage::Capture,
            running: false,
            seq: self.seq,
            job,
        };
        self.jobs.insert(entry.job.id, entry);
        Ok(())
    }

    /// Tells that a job's answer is there now, or is expected at another time.
    pub fn rerank(&mut self, id: JobId, rank: Rank) {
        if let Some(e) = self.jobs.get_mut(&id) {
            e.job.rank = rank;
        }
    }

    /// The next job to start, and its stage. `now` is in microseconds of the caller's clock: what was due by then counts as waiting.
    pub fn poll(&mut self, now: u64) -> Option<(JobId, Stage)> {
        // Later stages first: what is nearly done frees memory and answers.
        for stage in Stage::ALL.into_iter().rev() {
            let (waiting, running) = self.load(stage);
            if waiting == 0 || running >= self.limits.of(stage) {
                continue;
            }
            let served = &self.served;
            let best = self
                .jobs
                .values()
                .filter(|e| e.stage == stage && !e.running)
                .min_by_key(|e| {
                    let rank = match e.job.rank {
                        Rank::Due(at) if at <= now => Rank::Waiting,
                        rank => rank,
                    };
                    // Fairness decides within a rank; between due times only where both wait.
                    let tenant = served.get(&e.job.tenant).copied().unwrap_or(0);
                    (rank, tenant, e.seq)
                })
                .map(|e| e.job.id);
            if let Some(e) = best.and_then(|id| self.jobs.get_mut(&id)) {
                e.running = true;
                *self.served.entry(e.job.tenant.clone()).or_insert(0) += 1;
                return Some((e.job.id, stage));
            }
        }
        None
    }

    /// Tells that a job ended its stage: it goes on to the next one, or leaves after the last, or when it failed.
    pub fn done(&mut self, id: JobId, ok: bool) {
        let Some(e) = self.jobs.get_mut(&id) else {
            return;
        };
        match e.stage.next().filter(|_| ok) {
            Some(next) => {
                e.stage = next;
                e.running = false;
            }
            None => {
                if let Some(gone) = self.jobs.remove(&id) {
                    let tenant = gone.job.tenant;
                    if !self.jobs.values().any(|e| e.job.tenant == tenant) {
                        self.served.remove(&tenant);
                    }
                }
            }
        }
    }
}
