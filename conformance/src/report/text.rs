//! The report for a terminal.

use std::fmt::Write as _;
use std::time::Duration;

use super::Report;
use crate::Outcome;

impl Report {
    /// A table for people: every case with its outcome and counts, then what is not green, then the totals.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let endpoint = &self.endpoint;
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} ({} {}, {})", endpoint.name, endpoint.scheme, endpoint.mode, endpoint.server);
        let width = self.cases.iter().map(|case| case.name.len()).max().unwrap_or(0);
        let _ = writeln!(
            text,
            "{:width$}  {:20}  {:>6}  {:>16}  {:>9}  {:>12}",
            "case", "outcome", "ms", "ok/failed/unknown", "delivered", "dup just/unj"
        );
        for case in &self.cases {
            let counts = &case.counts;
            let published = format!("{}/{}/{}", counts.published_ok, counts.published_failed, counts.published_unknown);
            let duplicates = format!("{}/{}", counts.duplicates_justified, counts.duplicates_unjustified);
            let _ = writeln!(
                text,
                "{:width$}  {:20}  {:>6}  {published:>16}  {:>9}  {duplicates:>12}",
                case.name,
                case.outcome.as_str(),
                case.duration_ms,
                counts.delivered,
            );
        }
        text.push('\n');
        text.push_str(&self.summary());
        text
    }

    /// What is not green or was not run, and the totals.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for case in &self.cases {
            if matches!(case.outcome, Outcome::Pass | Outcome::RefusedAndVerified) {
                continue;
            }
            let _ = writeln!(
                text,
                "{}: {}\n    proves: {}\n    {}",
                case.outcome.as_str(),
                case.name,
                case.proves,
                case.detail
            );
            let more = [case.schedule_text(&self.settings), case.stories()];
            for line in more.iter().flatten().flat_map(|text| text.lines()) {
                let _ = writeln!(text, "    {line}");
            }
        }
        let _ = writeln!(text, "{}", self.totals_line());
        text
    }

    pub(super) fn totals_line(&self) -> String {
        let totals = &self.totals;
        format!(
            "{}: {} pass, {} fail, {} refused-and-verified, {} inconclusive, {} not run; {:.1} s, seed {}",
            self.endpoint.name,
            totals.pass,
            totals.fail,
            totals.refused_and_verified,
            totals.inconclusive,
            totals.not_run,
            Duration::from_millis(self.duration_ms).as_secs_f64(),
            self.settings.seed,
        )
    }
}
