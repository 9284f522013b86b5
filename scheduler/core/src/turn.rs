//! The turns of one sandbox, as a machine: one exec at a time per boundary, the next one waits for the capture.
//!
//! `Idle -> Running -> Boundary -> Capturing -> Committing -> Idle`. The daemon feeds inputs and does what the actions say; it executes nothing on its own
//! account. A capture or commit that fails ends the turn as *failed*: the sandbox stays usable, the turn is marked, and the next boundary is
//! forced to capture everything.
//!
//! Elsewhere: what the verdict is (`verdict`), who captures first on a host (`engine`), the journal of results (the store).

use std::collections::VecDeque;

use tidepool_proto::TurnNo;

/// The most execs that may wait for one sandbox; more are refused.
pub const MAX_WAITING: usize = 1024;

/// Where a sandbox's turn stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Idle,
    /// A command runs.
    Running {
        turn: TurnNo,
        key: String,
    },
    /// It ended; what it changed is being looked at.
    Boundary {
        turn: TurnNo,
        key: String,
    },
    /// What it changed is being captured.
    Capturing {
        turn: TurnNo,
        key: String,
    },
    /// The checkpoint or the record is being committed.
    Committing {
        turn: TurnNo,
        key: String,
    },
    /// The sandbox is gone: nothing runs any more.
    Stopped,
}

/// What the daemon tells the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A caller wants to run a command under this key.
    Exec { key: String },
    /// A boundary without a command was asked for (a checkpoint by hand, the creation).
    Checkpoint { key: String },
    /// A caller that waited went away.
    Cancel { key: String },
    /// The running command ended.
    Ended,
    /// The verdict asks for a capture, or does not.
    Decided { capture: bool },
    /// The capture succeeded, or why it did not.
    Captured(Result<(), String>),
    /// The commit succeeded, or why it did not.
    Committed(Result<(), String>),
    /// The sandbox died or was stopped.
    Stop,
}

/// What the daemon does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Run the command of this key as this turn.
    Run { turn: TurnNo, key: String },
    /// Ask the inspector and decide. `forced` says why everything is to be captured.
    Observe {
        turn: TurnNo,
        forced: Option<String>,
    },
    /// Capture.
    Capture { turn: TurnNo },
    /// Commit the turn's record, and its checkpoint where there is one.
    Commit { turn: TurnNo, checkpoint: bool },
    /// Tell the caller of this key: the turn is committed, or marked as failed.
    Finish {
        turn: TurnNo,
        key: String,
        result: Result<(), String>,
    },
    /// Tell the caller that its command was not run.
    Refuse { key: String, why: Refusal },
}

/// Why a command is not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the sandbox is not running")]
    Stopped,
    #[error("too many commands wait for this sandbox")]
    TooMany,
    #[error("a command with this key runs or waits already")]
    Duplicate,
}

/// The machine.
#[derive(Debug, Clone)]
pub struct TurnMachine {
    state: State,
    next: TurnNo,
    /// Keys that wait; the flag tells a command from a bare boundary.
    waiting: VecDeque<(String, bool)>,
    actions: VecDeque<Action>,
    /// Why the next boundary captures everything.
    forced: Option<String>,
    captured: bool,
    /// When the state was entered, in microseconds of the caller's clock.
    since: u64,
}

impl TurnMachine {
    /// An idle machine whose next turn is `next`.
    pub fn new(next: TurnNo, now: u64) -> Self {
        Self {
            state: State::Idle,
            next,
            waiting: VecDeque::new(),
            actions: VecDeque::new(),
            forced: None,
            captured: false,
            since: now,
        }
    }

    /// Where it stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// How many commands wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// When the state was entered, in microseconds of the caller's clock.
    pub fn since(&self) -> u64 {
        self.since
    }

    /// Makes the next boundary capture everything, such as after a restart of the daemon.
    pub fn force_next(&mut self, why: impl Into<String>) {
        self.forced = Some(why.into());
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Takes one input at `now` (microseconds of the caller's clock). An input that does not fit the state is ignored: it belongs to a turn that was given up.
    pub fn handle(&mut self, now: u64, input: Input) {
        match (std::mem::replace(&mut self.state, State::Idle), input) {
            (State::Stopped, Input::Exec { key } | Input::Checkpoint { key }) => {
                self.state = State::Stopped;
                let why = Refusal::Stopped;
                self.actions.push_back(Action::Refuse { key, why });
            }
            (State::Stopped, _) => self.state = State::Stopped,
            (state, Input::Stop) => self.stop(now, state),
            (state, Input::Exec { key }) => self.wait(state, key, true),
            (state, Input::Checkpoint { key }) => self.wait(state, key, false),
            (state, Input::Cancel { key }) => {
                self.state = state;
                self.waiting.retain(|(k, _)| *k != key);
            }
            (State::Running { turn, key }, Input::Ended) => self.observe(now, turn, key),
            (State::Boundary { turn, key }, Input::Decided { capture }) => {
                self.captured = capture;
                if capture {
                    self.enter(now, State::Capturing { turn, key });
                    self.actions.push_back(Action::Capture { turn });
                } else {
                    self.commit(now, turn, key);
                }
            }
            (State::Capturing { turn, key }, Input::Captured(Ok(()))) => {
                self.commit(now, turn, key)
            }
            (State::Capturing { turn, key }, Input::Captured(Err(why))) => {
                self.finish(now, turn, key, Err(why));
            }
            (State::Committing { turn, key }, Input::Committed(result)) => {
                self.finish(now, turn, key, result);
            }
            (state, _) => self.state = state,
        }
        self.start(now);
    }

    fn enter(&mut self, now: u64, state: State) {
        self.state = state;
        self.since = now;
    }

    fn wait(&mut self, state: State, key: String, command: bool) {
        let busy_with = match &state {
            State::Running { key, .. }
            | State::Boundary { key, .. }
            | State::Capturing { key, .. }
            | State::Committing { key, .. } => Some(key),
            State::Idle | State::Stopped => None,
        };
        let duplicate = busy_with == Some(&key) || self.waiting.iter().any(|(k, _)| *k == key);
        self.state = state;
        if duplicate || self.waiting.len() >= MAX_WAITING {
            let why = match duplicate {
                true => Refusal::Duplicate,
                false => Refusal::TooMany,
            };
            self.actions.push_back(Action::Refuse { key, why });
        } else {
            self.waiting.push_back((key, command));
        }
    }

    fn start(&mut self, now: u64) {
        if self.state != State::Idle {
            return;
        }
        let Some((key, command)) = self.waiting.pop_front() else {
            return;
        };
        let turn = self.next;
        self.next = TurnNo(turn.0 + 1);
        if command {
            let action = Action::Run {
                turn,
                key: key.clone(),
            };
            self.enter(now, State::Running { turn, key });
            self.actions.push_back(action);
        } else {
            self.observe(now, turn, key);
        }
    }

    fn observe(&mut self, now: u64, turn: TurnNo, key: String) {
        self.enter(now, State::Boundary { turn, key });
        // Kept until a commit succeeds: a turn given up half-way leaves its changes to the next.
        let forced = self.forced.clone();
        self.actions.push_back(Action::Observe { turn, forced });
    }

    fn commit(&mut self, now: u64, turn: TurnNo, key: String) {
        self.enter(now, State::Committing { turn, key });
        let checkpoint = self.captured;
        self.actions.push_back(Action::Commit { turn, checkpoint });
    }

    fn finish(&mut self, now: u64, turn: TurnNo, key: String, result: Result<(), String>) {
        self.forced = match &result {
            Ok(()) => None,
            Err(why) => Some(format!("turn {turn} was not committed: {why}")),
        };
        self.enter(now, State::Idle);
        self.actions.push_back(Action::Finish { turn, key, result });
    }

    fn stop(&mut self, now: u64, state: State) {
        if let State::Running { turn, key }
        | State::Boundary { turn, key }
        | State::Capturing { turn, key }
        | State::Committing { turn, key } = state
        {
            let result = Err(Refusal::Stopped.to_string());
            self.actions.push_back(Action::Finish { turn, key, result });
        }
        for (key, _) in std::mem::take(&mut self.waiting) {
            let why = Refusal::Stopped;
            self.actions.push_back(Action::Refuse { key, why });
        }
        self.enter(now, State::Stopped);
    }
}
