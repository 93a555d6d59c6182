//! What a run found: as a table, as JSON, as JUnit XML.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anybroker_core::{Bus, Capabilities, Timestamp};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{Anomaly, Case, Counts, Harness, Level, Options, Outcome};

/// The version of the JSON form.
const SCHEMA: u32 = 1;

/// A run of the suite.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The version of this form.
    pub schema: u32,
    /// The version of the suite.
    pub suite: &'static str,
    /// When it began.
    pub started: String,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// What was tested.
    pub endpoint: EndpointReport,
    /// Its capability record.
    pub record: BTreeMap<&'static str, Value>,
    /// How it was run: seed, parallelism, filter, level.
    pub settings: Value,
    /// How many cases ended how.
    pub totals: Totals,
    /// The cases, in the order of the list.
    pub cases: Vec<CaseReport>,
}

/// What was tested.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct EndpointReport {
    /// What the harness calls it.
    pub name: String,
    /// The scheme of the adapter.
    pub scheme: String,
    /// The mode of the adapter.
    pub mode: String,
    /// The URL without credentials.
    pub url: String,
    /// Product and version of the server.
    pub server: String,
}

impl EndpointReport {
    pub(crate) fn of(harness: &dyn Harness, bus: &Bus) -> Self {
        let endpoint = bus.endpoint();
        Self {
            name: harness.name(),
            scheme: endpoint.scheme.to_owned(),
            mode: endpoint.mode.clone(),
            url: endpoint.url.clone(),
            server: endpoint.server.clone(),
        }
    }
}

/// How many cases ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Totals {
    /// The promise held.
    pub pass: usize,
    /// It did not.
    pub fail: usize,
    /// What the endpoint refuses, it refuses properly.
    pub refused_and_verified: usize,
    /// What was to be observed did not happen.
    pub inconclusive: usize,
    /// Not run.
    pub not_run: usize,
}

/// What became of one case.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct CaseReport {
    /// Its name.
    pub name: &'static str,
    /// Its theme.
    pub theme: &'static str,
    /// Its level.
    pub level: Level,
    /// The sentence of the contract that it proves.
    pub proves: &'static str,
    /// The fields of the record that it needs.
    pub needs: Vec<&'static str>,
    /// What became of it.
    pub outcome: Outcome,
    /// Why it did not pass, or what is refused.
    pub detail: String,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// What its history is made of.
    pub counts: Counts,
    /// What the checker found.
    pub anomalies: Vec<Anomaly>,
    /// The whole history as JSON lines, where the case did not pass.
    #[serde(skip)]
    pub history: Option<String>,
}

impl CaseReport {
    pub(crate) fn new(
        case: &Case,
        outcome: Outcome,
        detail: String,
        duration: Duration,
        counts: Counts,
        anomalies: Vec<Anomaly>,
        history: Option<String>,
    ) -> Self {
        Self {
            name: case.name,
            theme: case.theme(),
            level: case.level,
            proves: case.proves,
            needs: case.needs.iter().map(|need| need.name).collect(),
            outcome,
            detail,
            duration_ms: millis(duration),
            counts,
            anomalies,
            history,
        }
    }
}

impl Report {
    pub(crate) fn new(
        endpoint: EndpointReport,
        record: &Capabilities,
        options: &Options,
        started: Timestamp,
        duration: Duration,
        cases: Vec<CaseReport>,
    ) -> Self {
        let mut totals = Totals::default();
        for case in &cases {
            *match case.outcome {
                Outcome::Pass => &mut totals.pass,
                Outcome::Fail => &mut totals.fail,
                Outcome::RefusedAndVerified => &mut totals.refused_and_verified,
                Outcome::Inconclusive => &mut totals.inconclusive,
                Outcome::NotRun => &mut totals.not_run,
            } += 1;
        }
        Self {
            schema: SCHEMA,
            suite: env!("CARGO_PKG_VERSION"),
            started: started.to_string(),
            duration_ms: millis(duration),
            endpoint,
            record: record.fields().into_iter().collect(),
            settings: json!({
                "seed": options.seed, "parallelism": options.parallelism, "filter": options.filter,
                "level": options.level,
            }),
            totals,
            cases,
        }
    }

    /// Whether at least one case ran, and none failed or was inconclusive.
    #[must_use]
    pub fn is_green(&self) -> bool {
        let totals = self.totals;
        totals.fail == 0 && totals.inconclusive == 0 && totals.pass + totals.refused_and_verified > 0
    }

    /// 0 where the run is green, 1 otherwise.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        i32::from(!self.is_green())
    }

    /// The cases that are not green.
    pub fn failures(&self) -> impl Iterator<Item = &CaseReport> {
        self.cases.iter().filter(|case| matches!(case.outcome, Outcome::Fail | Outcome::Inconclusive))
    }

    /// A case by its name.
    #[must_use]
    pub fn case(&self, name: &str) -> Option<&CaseReport> {
        self.cases.iter().find(|case| case.name == name)
    }

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
        }
        let totals = &self.totals;
        let _ = writeln!(
            text,
            "{}: {} pass, {} fail, {} refused-and-verified, {} inconclusive, {} not run; {:.1} s, seed {}",
            self.endpoint.name,
            totals.pass,
            totals.fail,
            totals.refused_and_verified,
            totals.inconclusive,
            totals.not_run,
            Duration::from_millis(self.duration_ms).as_secs_f64(),
            self.settings["seed"],
        );
        text
    }

    /// The report as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// The report as JUnit XML: refused-and-verified cases are passes, cases not run are skipped with their reason.
    #[must_use]
    pub fn junit(&self) -> String {
        let totals = &self.totals;
        let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
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
                Outcome::Fail => write!(xml, "<failure message=\"{detail}\"/>"),
                Outcome::Inconclusive => write!(xml, "<error message=\"{detail}\"/>"),
                Outcome::NotRun => write!(xml, "<skipped message=\"{detail}\"/>"),
            };
            xml.push_str("</testcase>\n");
        }
        xml.push_str("</testsuite>\n");
        xml
    }

    /// Writes `report.txt`, `report.json`, `junit.xml`, and the history of every case that is not green.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write_dir(&self, directory: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        std::fs::write(directory.join("report.txt"), self.text())?;
        std::fs::write(directory.join("report.json"), format!("{:#}\n", self.json()))?;
        std::fs::write(directory.join("junit.xml"), self.junit())?;
        for case in &self.cases {
            if let Some(history) = &case.history {
                let histories = directory.join("histories");
                std::fs::create_dir_all(&histories)?;
                std::fs::write(histories.join(format!("{}.jsonl", case.name.replace('/', "-"))), history)?;
            }
        }
        Ok(())
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

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn junit_text_is_escaped() {
        assert_eq!(escape("a<b>&\"c\" \u{1}\n"), "a&lt;b&gt;&amp;&quot;c&quot; \u{fffd} ");
    }
}
