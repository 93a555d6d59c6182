//! Two runs, and what is different between them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{CaseReport, Report, ReportSet, SCHEMA, html};
use crate::Outcome;

/// What changed from one run to another.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Comparison {
    /// The version of this form.
    pub schema: u32,
    /// One for each endpoint that both runs have.
    pub endpoints: Vec<EndpointComparison>,
    /// Endpoints that only the earlier run has.
    pub gone: Vec<String>,
    /// Endpoints that only the later run has.
    pub new: Vec<String>,
}

/// What changed on one endpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct EndpointComparison {
    /// Its name.
    pub name: String,
    /// When the earlier run began, and on which server.
    pub before: String,
    /// When the later run began, and on which server.
    pub after: String,
    /// Cases that ended otherwise, are there only once, or (where neither is green) fail otherwise.
    pub cases: Vec<CaseChange>,
    /// Fields of the capability record that have another value.
    pub record: Vec<RecordChange>,
    /// How many cases ended the same.
    pub unchanged: usize,
}

/// A case that ended otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CaseChange {
    /// Its name.
    pub name: String,
    /// How it ended before; none where it was not part of the run.
    pub before: Option<Outcome>,
    /// How it ended after.
    pub after: Option<Outcome>,
    /// Why it is not green now, or was not.
    pub detail: String,
}

impl CaseChange {
    /// Whether it was green and is not any more.
    #[must_use]
    pub fn is_worse(&self) -> bool {
        let green = |outcome: Option<Outcome>| matches!(outcome, Some(Outcome::Pass | Outcome::RefusedAndVerified));
        // A pass that became a refusal is a promise that was taken back.
        let taken_back = self.before == Some(Outcome::Pass) && self.after == Some(Outcome::RefusedAndVerified);
        (green(self.before) && !green(self.after)) || taken_back
    }
}

/// A field of the capability record that has another value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RecordChange {
    /// The field.
    pub field: String,
    /// Its value before.
    pub before: Value,
    /// Its value after.
    pub after: Value,
}

impl Comparison {
    /// Compares the endpoints that have the same name. Where each run has just one, these two are compared whatever they are
    /// called.
    #[must_use]
    pub fn of(before: &ReportSet, after: &ReportSet) -> Self {
        let (mut endpoints, mut gone) = (Vec::new(), Vec::new());
        let alone = before.reports.len() == 1 && after.reports.len() == 1;
        let name = |report: &Report| report.endpoint.name.clone();
        for earlier in &before.reports {
            match after.reports.iter().find(|later| alone || later.endpoint.name == earlier.endpoint.name) {
                Some(later) => endpoints.push(EndpointComparison::of(earlier, later)),
                None => gone.push(name(earlier)),
            }
        }
        let is_new = |later: &&Report| before.reports.iter().all(|one| one.endpoint.name != later.endpoint.name);
        let new = if alone { Vec::new() } else { after.reports.iter().filter(is_new).map(name).collect() };
        Self { schema: SCHEMA, endpoints, gone, new }
    }

    /// Whether something that was green is not any more, a promise was taken back, or an endpoint is gone.
    #[must_use]
    pub fn is_worse(&self) -> bool {
        !self.gone.is_empty() || self.endpoints.iter().any(|endpoint| endpoint.cases.iter().any(CaseChange::is_worse))
    }

    /// For a terminal.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        for endpoint in &self.endpoints {
            let _ = writeln!(text, "{}\n  before: {}\n  after:  {}", endpoint.name, endpoint.before, endpoint.after);
            for change in &endpoint.cases {
                let mark = if change.is_worse() { "worse " } else { "      " };
                let _ = writeln!(
                    text,
                    "  {mark} {}: {} -> {}{}{}",
                    change.name,
                    said(change.before),
                    said(change.after),
                    if change.detail.is_empty() { "" } else { ": " },
                    change.detail
                );
            }
            for change in &endpoint.record {
                let _ = writeln!(text, "  record {}: {} -> {}", change.field, change.before, change.after);
            }
            let _ = writeln!(text, "  {} cases ended the same", endpoint.unchanged);
        }
        for name in &self.gone {
            let _ = writeln!(text, "gone: {name}");
        }
        for name in &self.new {
            let _ = writeln!(text, "new: {name}");
        }
        text
    }

    /// A page that needs nothing else.
    #[must_use]
    pub fn html(&self) -> String {
        html::comparison(self)
    }
}

impl EndpointComparison {
    fn of(before: &Report, after: &Report) -> Self {
        let what = |report: &Report| format!("{}, {}, suite {}", report.started, report.endpoint.server, report.suite);
        let later: BTreeMap<&str, &CaseReport> = after.cases.iter().map(|case| (case.name, case)).collect();
        let mut cases = Vec::new();
        let mut unchanged = 0;
        for case in &before.cases {
            let now = later.get(case.name).copied();
            // Which of several promises broke is in the names of the anomalies; the text around them names messages of one
            // run.
            let found = |case: &CaseReport| {
                let mut names: Vec<_> = case.anomalies.iter().map(|anomaly| anomaly.name).collect();
                names.sort_unstable();
                names.dedup();
                names
            };
            if now.is_some_and(|now| now.outcome == case.outcome && found(now) == found(case)) {
                unchanged += 1;
                continue;
            }
            let detail = now.filter(|now| !now.detail.is_empty()).map_or(&case.detail, |now| &now.detail).clone();
            let (before, after) = (Some(case.outcome), now.map(|now| now.outcome));
            cases.push(CaseChange { name: case.name.to_owned(), before, after, detail });
        }
        for case in &after.cases {
            if before.case(case.name).is_none() {
                let (name, detail) = (case.name.to_owned(), case.detail.clone());
                cases.push(CaseChange { name, before: None, after: Some(case.outcome), detail });
            }
        }
        let mut fields: Vec<&String> = before.record.keys().chain(after.record.keys()).collect();
        fields.sort_unstable();
        fields.dedup();
        let value = |report: &Report, field: &String| report.record.get(field).cloned().unwrap_or_default();
        let record = fields
            .into_iter()
            .map(|field| RecordChange {
                field: field.clone(),
                before: value(before, field),
                after: value(after, field),
            })
            .filter(|change| change.before != change.after)
            .collect();
        Self { name: after.endpoint.name.clone(), before: what(before), after: what(after), cases, record, unchanged }
    }
}

/// An outcome that may be missing.
pub(super) fn said(outcome: Option<Outcome>) -> &'static str {
    outcome.map_or("not part of the run", Outcome::as_str)
}
