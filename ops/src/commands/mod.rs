//! The commands, one module for each noun.

pub(crate) mod checkpoint;
pub(crate) mod gc;
pub(crate) mod image;
pub(crate) mod node;
pub(crate) mod restore;
pub(crate) mod retention;
pub(crate) mod sandbox;
pub(crate) mod scrub;
pub(crate) mod status;
pub(crate) mod turn;

use tidepool_proto::api::{SandboxInfo, SandboxState};

use crate::human;
use crate::ui::Ui;

/// No body.
const NOTHING: Option<&()> = None;

/// A state's name.
fn state(state: SandboxState) -> &'static str {
    match state {
        SandboxState::Running => "running",
        SandboxState::Paused => "paused",
        SandboxState::Dead => "dead",
        SandboxState::Starting => "starting",
    }
}

/// Tells what about a sandbox must not be missed.
fn warn_about(sandbox: &SandboxInfo, ui: Ui) {
    let name = human::clean(&sandbox.name);
    if let Some(why) = &sandbox.capture_error {
        ui.warn(&format!(
            "the last capture of {name} failed, its newest state is not yet safe: {}",
            human::clean(why)
        ));
    }
    for what in &sandbox.not_covered {
        ui.warn(&format!(
            "no checkpoint of {name} covers {}",
            human::clean(what)
        ));
    }
}
