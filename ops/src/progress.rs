//! How far a long request is, on stderr and only where that is a terminal.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tidepool_proto::api::Progress;

use crate::human;
use crate::ui::Ui;

/// One line that is redrawn; removed when dropped, so that results and errors stand alone.
pub(crate) struct ProgressLine {
    ui: Ui,
    bar: Option<ProgressBar>,
    stage: Option<String>,
    bounded: Option<bool>,
}

impl ProgressLine {
    pub(crate) fn new(ui: Ui) -> Self {
        let shown = !ui.quiet && std::io::stderr().is_terminal();
        Self {
            ui,
            bar: shown.then(|| ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())),
            stage: None,
            bounded: None,
        }
    }

    /// The stage last heard of.
    pub(crate) fn stage(&self) -> Option<&str> {
        self.stage.as_deref()
    }

    /// Shows where the request is.
    pub(crate) fn show(&mut self, p: &Progress) {
        if self.stage.as_deref() != Some(&p.stage) {
            self.stage = Some(p.stage.clone());
            self.bounded = None;
            if self.bar.is_none() {
                self.ui.detail(&human::clean(&p.stage));
            }
        }
        let Some(bar) = &self.bar else { return };
        let bounded = p.total.is_some_and(|t| t > 0);
        if self.bounded != Some(bounded) {
            self.bounded = Some(bounded);
            let template = if bounded {
                "{spinner} {msg}  {bar:30} {binary_bytes} of {binary_total_bytes} ({binary_bytes_per_sec})"
            } else {
                "{spinner} {msg}  {binary_bytes}"
            };
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> ");
            bar.set_style(style);
            bar.reset();
        }
        bar.set_message(human::clean(&p.stage));
        match p.total {
            Some(total) if total > 0 => bar.set_length(total),
            _ => bar.unset_length(),
        }
        bar.set_position(p.done);
        bar.tick();
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
