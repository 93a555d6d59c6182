//! The report as one page that needs nothing else: no other files, no scripts; light and dark as the reader has it.

mod change;
mod endpoint;
mod matrix;

use std::fmt::Write as _;

use serde_json::Value;

use super::{Report, Totals};
use crate::Outcome;

pub(super) use change::comparison;

const STYLE: &str = include_str!("style.css");

/// One endpoint in full; of several also a comparison of all, before.
pub(super) fn page(reports: &[Report]) -> String {
    let mut body = String::new();
    let alone = reports.len() == 1;
    match reports {
        [report] => {
            let _ = write!(body, "<h1>Conformance of {}</h1>", text(&report.endpoint.name));
        }
        _ => {
            let _ = write!(body, "<h1>Conformance of {} endpoints</h1>", reports.len());
        }
    }
    body.push_str(INTRODUCTION);
    body.push_str("<label class=only><input type=checkbox id=only-red> show only what is not green</label>\n");
    if !alone {
        matrix::overview(&mut body, reports);
        matrix::cases(&mut body, reports);
        matrix::records(&mut body, reports);
    }
    for (number, report) in reports.iter().enumerate() {
        endpoint::section(&mut body, number, report, alone);
    }
    let title = if alone { format!("Conformance of {}", reports[0].endpoint.name) } else { "Conformance".to_owned() };
    document(&title, STYLE, &body)
}

const INTRODUCTION: &str = "<p class=muted>Each case puts one promise of the contract to the test on a live endpoint. After \
every case a checker reads everything that every client did and saw; nothing is deduplicated before it is counted, and no \
case is run again until it passes. What the endpoint's capability record refuses is not skipped: the refusal itself is \
verified.</p>\n<div class=key><span><b class='pill pass'>✓ pass</b> the promise held</span>\
<span><b class='pill refused'>⊘ refused-and-verified</b> refused by a typed answer, without side effect</span>\
<span><b class='pill fail'>✗ fail</b> it did not hold</span>\
<span><b class='pill odd'>? inconclusive</b> what was to be observed did not happen</span>\
<span><b class='pill none'>– not run</b> with its reason</span></div>\n";

/// A whole page.
pub(crate) fn document(title: &str, style: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n\
<meta name=viewport content='width=device-width, initial-scale=1'>\n\
<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
<title>{}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n",
        text(title)
    )
}

/// Text in a page, or in an attribute between quotes of either kind.
pub(crate) fn text(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            character if character.is_control() && character != '\n' => escaped.push('\u{fffd}'),
            character => escaped.push(character),
        }
    }
    escaped
}

/// The class of an outcome, and the mark that says the same without colours.
fn mark(outcome: Outcome) -> (&'static str, &'static str) {
    match outcome {
        Outcome::Pass => ("pass", "✓"),
        Outcome::Fail => ("fail", "✗"),
        Outcome::RefusedAndVerified => ("refused", "⊘"),
        Outcome::Inconclusive => ("odd", "?"),
        Outcome::NotRun => ("none", "–"),
    }
}

fn pill(outcome: Outcome) -> String {
    let (class, mark) = mark(outcome);
    format!("<b class='pill {class}'>{mark} {}</b>", outcome.as_str().to_lowercase())
}

fn verdict(report: &Report) -> &'static str {
    match (report.is_green(), report.totals.pass + report.totals.refused_and_verified) {
        (true, _) => "<b class='pill pass'>✓ green</b>",
        (false, 0) if report.totals.fail + report.totals.inconclusive == 0 => "<b class='pill none'>– nothing ran</b>",
        (false, _) => "<b class='pill fail'>✗ not green</b>",
    }
}

/// The outcomes as a bar; the same in words for who does not see it.
fn bar(totals: &Totals) -> String {
    let parts = [
        ("pass", totals.pass, "pass"),
        ("refused", totals.refused_and_verified, "refused and verified"),
        ("fail", totals.fail, "fail"),
        ("odd", totals.inconclusive, "inconclusive"),
        ("none", totals.not_run, "not run"),
    ];
    let words: Vec<String> =
        parts.iter().filter(|(_, count, _)| *count > 0).map(|(_, count, word)| format!("{count} {word}")).collect();
    let words = words.join(", ");
    let mut bar = format!("<div class=bar role=img aria-label='{words}' title='{words}'>");
    for (class, count, _) in parts {
        if count > 0 {
            let _ = write!(bar, "<i class={class} style='flex:{count}'></i>");
        }
    }
    bar + "</div>"
}

/// Milliseconds for people.
fn duration(millis: u64) -> String {
    match millis {
        0..1_000 => format!("{millis} ms"),
        1_000..120_000 => format!("{}.{} s", millis / 1_000, millis % 1_000 / 100),
        _ => format!("{} min {:02} s", millis / 60_000, millis % 60_000 / 1_000),
    }
}

/// A value of the capability record: its class, what it is in a word, and the price or the remedy.
fn capability(value: &Value) -> (&'static str, String, Option<String>) {
    match value {
        Value::String(word) if word == "native" => ("pass", "native".into(), None),
        Value::String(word) => ("", word.replace('_', " "), None),
        Value::Null => ("", "none".into(), None),
        Value::Object(entries) => match entries.iter().next() {
            Some((kind, Value::String(note))) if entries.len() == 1 && kind == "emulated" => {
                ("odd", "emulated".into(), Some(note.clone()))
            }
            Some((kind, Value::String(note))) if entries.len() == 1 && kind == "refused" => {
                ("refused", "refused".into(), Some(note.clone()))
            }
            _ => {
                let plain = |value: &Value| match value {
                    Value::String(text) => text.clone(),
                    Value::Null => "none".into(),
                    other => other.to_string(),
                };
                let parts: Vec<String> = entries
                    .iter()
                    .map(|(name, value)| format!("{} {}", name.replace('_', " "), plain(value)))
                    .collect();
                ("", parts.join(", "), None)
            }
        },
        other => ("", other.to_string(), None),
    }
}
