//! The report for build servers.

use std::fmt::Write as _;
use std::time::Duration;

use super::{Report, ReportSet};
use crate::Outcome;

const HEAD: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";

impl ReportSet {
    /// The reports as JUnit XML, a suite for each.
    #[must_use]
    pub fn junit(&self) -> String {
        let suites: String = self.reports.iter().map(Report::test_suite).collect();
        format!("{HEAD}<testsuites>\n{suites}</testsuites>\n")
    }
}

impl Report {
    /// The report as JUnit XML: refused-and-verified cases are passes, cases not run are skipped with their reason.
    #[must_use]
    pub fn junit(&self) -> String {
        format!("{HEAD}{}", self.test_suite())
    }

    fn test_suite(&self) -> String {
        let totals = &self.totals;
        let mut xml = String::new();
        let _ = writeln!(
            xml,
            "<testsuite name=\"{}\" tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\" time=\"{}\" timestamp=\"{}\">",
            escape(&format!("conformance of {}", self.endpoint.name)),
            self.cases.len(),
            totals.fail,
            totals.inconclusive,
            totals.not_run,
            seconds(self.duration_ms),
            escape(&self.started),
        );
        for case in &self.cases {
            let _ = write!(
                xml,
                "  <testcase classname=\"{}\" name=\"{}\" time=\"{}\">",
                escape(case.theme),
                escape(case.name),
                seconds(case.duration_ms),
            );
            let detail = escape(&case.detail);
            let _ = match case.outcome {
                Outcome::Pass => Ok(()),
                Outcome::RefusedAndVerified => write!(xml, "<system-out>{detail}</system-out>"),
                Outcome::Fail => {
                    let schedule = case.schedule_text(&self.settings).map_or(String::new(), |text| escape(&text));
                    write!(xml, "<failure message=\"{detail}\">{schedule}</failure>")
                }
                Outcome::Inconclusive => write!(xml, "<error message=\"{detail}\"/>"),
                Outcome::NotRun => write!(xml, "<skipped message=\"{detail}\"/>"),
            };
            xml.push_str("</testcase>\n");
        }
        xml.push_str("</testsuite>\n");
        xml
    }
}

/// XML text: the five entities, and nothing that XML 1.0 has no place for.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            '\t' | '\n' | '\r' => escaped.push(' '),
            character if character.is_control() || matches!(character, '\u{fffe}' | '\u{ffff}') => {
                escaped.push('\u{fffd}');
            }
            character => escaped.push(character),
        }
    }
    escaped
}

fn seconds(millis: u64) -> f64 {
    Duration::from_millis(millis).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn junit_text_is_escaped() {
        assert_eq!(escape("a<b>&\"c\" \u{1}\n"), "a&lt;b&gt;&amp;&quot;c&quot; \u{fffd} ");
    }
}
