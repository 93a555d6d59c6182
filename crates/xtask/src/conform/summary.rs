//! What a run of many modes found, in Markdown: what is kept in the repository of a report of some megabytes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::counts::Counts;
use super::state::Run;

#[derive(Deserialize)]
struct Merged {
    reports: Vec<Report>,
}

#[derive(Deserialize)]
struct Report {
    endpoint: Endpoint,
    duration_ms: u64,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Endpoint {
    name: String,
    #[serde(default)]
    client: Option<String>,
    #[serde(default)]
    server: Option<String>,
    #[serde(default)]
    emulated: Option<String>,
}

/// As reports write them; a word that is new is an error here, not a row that lacks something.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Pass,
    RefusedAndVerified,
    Fail,
    Inconclusive,
    NotRun,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    outcome: Outcome,
    detail: String,
    counts: Counts,
}

/// The summary of a merged report, `report.json` of `anybroker conform report merge`.
pub(super) fn text(run: &Run, merged: &str) -> Result<String> {
    let merged: Merged = serde_json::from_str(merged).context("the merged report cannot be read")?;
    let mut text =
        format!("# The suite on every mode\n\n`cargo xtask conform` at {}, level {}", run.revision, run.level);
    if !run.cases.is_empty() {
        // Writing to a string cannot fail.
        let _ = write!(text, ", only {}", run.cases.join(", "));
    }
    text += ". Published, delivered and duplicates are sums over all cases.\n\n| mode | pass | refused, verified | failed | \
             inconclusive | not run | published ok / failed / unknown | delivered | duplicates justified / not | faults / met | longest \
             recovery, s | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    for report in &merged.reports {
        let of = |outcome: Outcome| report.cases.iter().filter(|case| case.outcome == outcome).count();
        let mut sum = Counts::default();
        report.cases.iter().for_each(|case| sum += case.counts);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} / {} / {} | {} | {} / {} | {} / {} | {} | {:.0} |",
            report.endpoint.name,
            of(Outcome::Pass),
            of(Outcome::RefusedAndVerified),
            of(Outcome::Fail),
            of(Outcome::Inconclusive),
            of(Outcome::NotRun),
            sum.published_ok,
            sum.published_failed,
            sum.published_unknown,
            sum.delivered,
            sum.duplicates_justified,
            sum.duplicates_unjustified,
            sum.faults,
            sum.faults_met,
            sum.recovery(),
            report.duration_ms as f64 / 1_000.0
        );
    }
    text += "\nWhat they ran on:\n\n";
    let mut places: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for Report { endpoint, .. } in &merged.reports {
        let told = [&endpoint.server, &endpoint.client, &endpoint.emulated];
        let told: Vec<&str> = told.into_iter().flatten().map(String::as_str).collect();
        let place = if told.is_empty() { "this process".to_owned() } else { told.join("; ") };
        places.entry(place).or_default().push(&endpoint.name);
    }
    for (place, modes) in places {
        let _ = writeln!(text, "- {}: {place}", modes.join(", "));
    }
    list(&mut text, &merged, Outcome::Fail, "Failed");
    list(&mut text, &merged, Outcome::Inconclusive, "Inconclusive");
    list(&mut text, &merged, Outcome::NotRun, "Not run");
    Ok(text)
}

/// The cases with such an outcome, those of one reason together.
fn list(text: &mut String, merged: &Merged, outcome: Outcome, title: &str) {
    let mut found: BTreeMap<(String, &str), Vec<&str>> = BTreeMap::new();
    for report in &merged.reports {
        for case in report.cases.iter().filter(|case| case.outcome == outcome) {
            let detail: String = case.detail.chars().take(200).collect();
            found.entry((detail, &case.name)).or_default().push(&report.endpoint.name);
        }
    }
    if found.is_empty() {
        return;
    }
    let _ = write!(text, "\n{title}:\n\n");
    for ((detail, case), modes) in found {
        let _ = writeln!(text, "- {case} ({}): {detail}", modes.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_has_a_row_and_what_did_not_pass_is_told_with_its_reason() {
        let case = |name: &str, outcome: &str, detail: &str| {
            serde_json::json!({"name": name, "outcome": outcome, "detail": detail, "counts": {
                "published_ok": 2, "published_failed": 0, "published_unknown": 1, "delivered": 3,
                "duplicates_justified": 1, "duplicates_unjustified": 0, "faults": 2, "faults_met": 1, "recovery_ms": 1_250}})
        };
        let report = |mode: &str| {
            serde_json::json!({"endpoint": {"name": mode, "server": "NATS 2.15", "client": null}, "duration_ms": 4_000,
                "cases": [case("a/b", "pass", ""), case("a/c", "fail", "it broke"), case("a/d", "not_run", "no proxy")]})
        };
        let merged = serde_json::json!({"reports": [report("one"), report("two")]}).to_string();
        let run = Run { revision: "abc".into(), level: "conformance".into(), cases: Vec::new() };
        let text = text(&run, &merged).unwrap();
        assert!(text.contains("at abc, level conformance."), "{text}");
        assert!(text.contains("| two | 1 | 0 | 1 | 0 | 1 | 6 / 0 / 3 | 9 | 3 / 0 | 6 / 3 | 1.2 | 4 |"), "{text}");
        assert!(text.contains("- one, two: NATS 2.15\n"), "{text}");
        assert!(text.contains("\nFailed:\n\n- a/c (one, two): it broke\n"), "{text}");
        assert!(text.contains("\nNot run:\n\n- a/d (one, two): no proxy\n"), "{text}");
        assert!(!text.contains("Inconclusive"), "{text}");
        assert!(super::text(&run, &merged.replace("not_run", "late")).is_err());
    }
}
