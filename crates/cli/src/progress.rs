//! Progress of long work: on standard error, and only where that is a terminal.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A counter of what is done; silent where nobody looks.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// `verb` tells what is counted: `published`, `redriven`. Where results are printed meanwhile to the same
    /// terminal (`beside_results`), a moving line between them would only flicker, so there is none.
    pub(crate) fn new(verb: &'static str, beside_results: bool) -> Self {
        let watched = std::io::stderr().is_terminal() && !(beside_results && std::io::stdout().is_terminal());
        let bar = if watched {
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(5))
        } else {
            ProgressBar::hidden()
        };
        let style = ProgressStyle::with_template("{spinner} {human_pos} {msg}, {per_sec}, {elapsed}");
        bar.set_style(style.expect("the template is part of the program text"));
        bar.set_message(verb);
        if watched {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self(bar)
    }

    /// For counting from elsewhere.
    pub(crate) fn handle(&self) -> ProgressBar {
        self.0.clone()
    }

    /// That many are done.
    pub(crate) fn set(&self, done: u64) {
        self.0.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
