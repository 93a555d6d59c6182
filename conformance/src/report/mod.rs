//! What a run found: as a table, as JSON with a schema, as JUnit XML, as a page.

mod compare;
mod file;
pub(crate) mod html;
pub(crate) mod interned;
mod junit;
mod schema;
mod text;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anybroker_core::{Bus, Capabilities, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Anomaly, Case, Counts, Harness, Level, Options, Outcome, ScheduleReport, timeline};

pub use compare::{CaseChange, Comparison, EndpointComparison, RecordChange};
pub use file::{ReportError, ReportSet};
pub(crate) use interned::Text;

/// The version of the JSON form. It rises when a field changes its meaning or goes; new fields alone do not raise it.
pub const SCHEMA: u32 = 2;

/// A run of the suite.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Report {
    /// The version of this form.
    pub schema: u32,
    /// The version of the suite.
    pub suite: String,
    /// When it began.
    pub started: String,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// Operating system and architecture of the machine that ran the suite.
    pub platform: String,
    /// What was tested.
    pub endpoint: EndpointReport,
    /// Its capability record.
    pub record: BTreeMap<String, Value>,
    /// How it was run.
    pub settings: RunSettings,
    /// How many cases ended how.
    pub totals: Totals,
    /// The cases, in the order of the list.
    pub cases: Vec<CaseReport>,
}

/// What was tested.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct EndpointReport {
    /// What the harness calls it.
    pub name: String,
    /// The scheme of the adapter.
    pub scheme: String,
    /// The mode of the adapter.
    pub mode: String,
    /// The URL with its settings, without credentials.
    pub url: String,
    /// Product and version of the server.
    pub server: String,
    /// Product and version of the client library, where the harness knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// What stands in for the product, where it is not the product itself: an emulator, a stand-in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub emulated: Option<String>,
}

impl EndpointReport {
    pub(crate) fn of(harness: &dyn Harness, bus: &Bus) -> Self {
        let endpoint = bus.endpoint();
        let about = harness.about();
        // Adapters say it in the product's name where they can see it at connect.
        let told = ["emulated", "stand-in"].iter().any(|word| endpoint.server.contains(word));
        Self {
            name: harness.name(),
            scheme: endpoint.scheme.to_owned(),
            mode: endpoint.mode.clone(),
            url: endpoint.url.clone(),
            server: endpoint.server.clone(),
            client: about.client,
            emulated: about.emulated.or_else(|| told.then(|| endpoint.server.clone())),
        }
    }
}

/// How the suite was run: what it takes to run it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RunSettings {
    /// What everything random started from.
    pub seed: u64,
    /// How many cases ran at once.
    pub parallelism: usize,
    /// The patterns of the cases that were chosen; empty for all.
    pub filter: Vec<String>,
    /// The highest level.
    pub level: Level,
    /// The lease that cases waited for, in milliseconds.
    pub lease_ms: u64,
    /// How long nothing had to happen before an absence counted, in milliseconds.
    pub quiet_ms: u64,
    /// How long something might take that had to happen, in milliseconds.
    pub patience_ms: u64,
    /// How long one case might take, in milliseconds.
    pub case_timeout_ms: u64,
}

impl RunSettings {
    pub(crate) fn of(harness: &dyn Harness, options: &Options) -> Self {
        Self {
            seed: options.seed,
            parallelism: options.parallelism,
            filter: options.filter.clone(),
            level: options.level,
            lease_ms: millis(harness.lease()),
            quiet_ms: millis(harness.quiet()),
            patience_ms: millis(harness.patience()),
            case_timeout_ms: millis(options.case_timeout),
        }
    }
}

/// How many cases ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
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

impl Totals {
    fn of(cases: &[CaseReport]) -> Self {
        let mut totals = Self::default();
        for case in cases {
            *match case.outcome {
                Outcome::Pass => &mut totals.pass,
                Outcome::Fail => &mut totals.fail,
                Outcome::RefusedAndVerified => &mut totals.refused_and_verified,
                Outcome::Inconclusive => &mut totals.inconclusive,
                Outcome::NotRun => &mut totals.not_run,
            } += 1;
        }
        totals
    }
}

/// What became of one case.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CaseReport {
    /// Its name.
    #[serde(deserialize_with = "interned::text")]
    pub name: Text,
    /// Its theme.
    #[serde(deserialize_with = "interned::text")]
    pub theme: Text,
    /// Its level.
    pub level: Level,
    /// The sentence of the contract that it proves.
    #[serde(deserialize_with = "interned::text")]
    pub proves: Text,
    /// The fields of the record that it needs.
    #[serde(deserialize_with = "interned::texts")]
    pub needs: Vec<Text>,
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
    /// The faults of a case that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<ScheduleReport>,
    /// Where the history lies, from the folder of the report, where the case did not pass. The timeline is beside it, with
    /// the ending `.html`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history_file: Option<String>,
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
            history_file: history.as_ref().map(|_| format!("histories/{}.jsonl", case.name.replace('/', "-"))),
            schedule: None,
            history,
        }
    }

    /// Whether another run of a case that failed shows the same: an anomaly of the same name, or, where there was none, a failure
    /// without one.
    pub(crate) fn fails_like(&self, other: &Self) -> bool {
        let names = |of: &Self| of.anomalies.iter().map(|anomaly| anomaly.name).collect::<Vec<_>>();
        let (own, others) = (names(self), names(other));
        other.outcome == Outcome::Fail
            && if own.is_empty() { others.is_empty() } else { own.iter().any(|name| others.contains(name)) }
    }

    /// The faults of a case that failed, in lines, and how to run it again.
    pub(crate) fn schedule_text(&self, settings: &RunSettings) -> Option<String> {
        Some(self.schedule.as_ref()?.text(self.name, settings.seed))
    }

    /// Whether the promise held, or its refusal did.
    #[must_use]
    pub fn is_green(&self) -> bool {
        matches!(self.outcome, Outcome::Pass | Outcome::RefusedAndVerified)
    }

    /// The history as a page: a lane for each client, faults as bands, the story of each message that something is wrong
    /// with. `None` where the history is not kept, because the case passed.
    #[must_use]
    pub fn timeline(&self) -> Option<String> {
        Some(timeline::page(self, self.history.as_deref()?))
    }

    /// The same for a terminal, without the drawing: what befell the first messages that something is wrong with, a line for each
    /// event. `None` where the history is not kept.
    #[must_use]
    pub fn stories(&self) -> Option<String> {
        Some(timeline::stories(self, self.history.as_deref()?))
    }
}

impl Report {
    pub(crate) fn new(
        endpoint: EndpointReport,
        record: &Capabilities,
        settings: RunSettings,
        started: Timestamp,
        duration: Duration,
        cases: Vec<CaseReport>,
    ) -> Self {
        Self {
            schema: SCHEMA,
            suite: env!("CARGO_PKG_VERSION").to_owned(),
            started: started.to_string(),
            duration_ms: millis(duration),
            platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            endpoint,
            record: record.fields().into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            settings,
            totals: Totals::of(&cases),
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

    /// The report as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// The JSON Schema of [`json`](Self::json).
    #[must_use]
    pub fn json_schema() -> Value {
        schema::report()
    }

    /// The report as one page that needs nothing else: no other files, no scripts.
    #[must_use]
    pub fn html(&self) -> String {
        html::page(std::slice::from_ref(self))
    }

    /// Writes `report.txt`, `report.html`, `junit.xml`, history and timeline of every case that is not green, and last
    /// `report.json`: where that is, all of it is.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write_dir(&self, directory: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        let histories = directory.join("histories");
        // An earlier run's would be taken for this one's.
        match std::fs::remove_dir_all(&histories) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        for case in &self.cases {
            if let (Some(history), Some(file)) = (&case.history, &case.history_file) {
                std::fs::create_dir_all(&histories)?;
                let file = directory.join(file);
                std::fs::write(&file, history)?;
                std::fs::write(file.with_extension("html"), case.timeline().unwrap_or_default())?;
            }
        }
        std::fs::write(directory.join("report.txt"), self.text())?;
        std::fs::write(directory.join("report.html"), self.html())?;
        std::fs::write(directory.join("junit.xml"), self.junit())?;
        file::write(&directory.join("report.json"), &self.json())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests;
