//! One endpoint in full.

use std::fmt::Write as _;

use serde_json::Value;

use super::{bar, capability, duration, pill, text, verdict};
use crate::report::{CaseReport, Report, RunSettings};

/// Columns of the table of cases.
const COLUMNS: usize = 10;

pub(super) fn section(page: &mut String, number: usize, report: &Report, alone: bool) {
    if !alone {
        let _ = writeln!(page, "<h2 id=e{number}>{}</h2>", text(&report.endpoint.name));
    }
    facts(page, report);
    record(page, report);
    cases(page, number, report);
}

/// The anchor of a case.
pub(super) fn anchor(number: usize, case: &str) -> String {
    text(&format!("e{number}-{}", case.replace('/', "-")))
}

fn facts(page: &mut String, report: &Report) {
    let endpoint = &report.endpoint;
    let totals = &report.totals;
    let _ = write!(
        page,
        "<p>{} {} pass, {} refused-and-verified, {} fail, {} inconclusive, {} not run</p>\n{}\n",
        verdict(report),
        totals.pass,
        totals.refused_and_verified,
        totals.fail,
        totals.inconclusive,
        totals.not_run,
        bar(totals)
    );
    let settings = &report.settings;
    let chosen = if settings.filter.is_empty() { "all cases".to_owned() } else { settings.filter.join(", ") };
    let mut rows = vec![
        ("adapter", format!("{}, mode {}", endpoint.scheme, endpoint.mode)),
        ("server", endpoint.server.clone()),
        ("client", endpoint.client.clone().unwrap_or_else(|| "not told".into())),
    ];
    if let Some(emulated) = &endpoint.emulated {
        rows.push(("emulated", emulated.clone()));
    }
    rows.extend([
        ("URL and settings", endpoint.url.clone()),
        ("run", format!("{}, {}, suite {} on {}", report.started, duration(report.duration_ms), report.suite, report.platform)),
        (
            "settings",
            format!(
                "{chosen} up to level {}; seed {}, {} at once; lease {}, quiet window {}, patience {}, at most {} a case",
                serde_json::to_value(settings.level).ok().and_then(|level| level.as_str().map(str::to_owned)).unwrap_or_default(),
                settings.seed,
                settings.parallelism,
                duration(settings.lease_ms),
                duration(settings.quiet_ms),
                duration(settings.patience_ms),
                duration(settings.case_timeout_ms),
            ),
        ),
    ]);
    page.push_str("<dl class=facts>\n");
    for (name, value) in rows {
        let class = if name == "emulated" { " class='pill odd'" } else { "" };
        let _ = writeln!(page, "<dt>{name}</dt><dd><span{class}>{}</span></dd>", text(&value));
    }
    page.push_str("</dl>\n");
}

fn record(page: &mut String, report: &Report) {
    page.push_str(
        "<details><summary>Capability record</summary>\n<div class=wide><table><thead><tr><th>field<th>value<th>price, or \
what would give it</tr></thead><tbody>\n",
    );
    for (field, value) in &report.record {
        let (class, word, note) = capability(value);
        let class = if class.is_empty() { String::new() } else { format!(" class='pill {class}'") };
        let _ = writeln!(
            page,
            "<tr><td><code>{}</code><td><span{class}>{}</span><td class=muted>{}</tr>",
            text(field),
            text(&word),
            text(note.as_deref().unwrap_or_default())
        );
    }
    page.push_str("</tbody></table></div></details>\n");
}

fn cases(page: &mut String, number: usize, report: &Report) {
    let mut theme = "";
    for case in &report.cases {
        if case.theme != theme {
            if !theme.is_empty() {
                page.push_str("</tbody></table></div>\n");
            }
            theme = case.theme;
            let green = report.cases.iter().filter(|case| case.theme == theme).all(CaseReport::is_green);
            let class = if green { " class=green" } else { "" };
            let _ = write!(
                page,
                "<div{class}><h3>{}</h3></div>\n<div class='wide{}'><table><thead><tr><th>outcome<th>case, and what it \
proves<th class=n title='publishes: confirmed / certainly not stored / unknown'>published<br>ok / failed / unknown<th \
class=n title='every delivery counted'>delivered<th class=n title='with a cause such as a nack, a lease, a close / without \
one'>duplicates<br>justified / not<th class=n>settle<br>failures<th class=n title='dead letters read, each reading \
counted'>letters<th class=n title='all / those that met an operation in flight'>faults<br>all / met<th class=n title='the longest \
that a client took, from the end of a fault, until a publish was confirmed to it or a message came to it'>recovery<th class=n>time</tr></thead><tbody>\n",
                text(theme),
                if green { " green" } else { "" },
            );
        }
        row(page, number, case, &report.settings);
    }
    if !theme.is_empty() {
        page.push_str("</tbody></table></div>\n");
    }
}

fn row(page: &mut String, number: usize, case: &CaseReport, settings: &RunSettings) {
    let counts = &case.counts;
    let name = case.name.split_once('/').map_or(case.name, |(_, name)| name);
    let unjustified = if counts.duplicates_unjustified > 0 {
        format!("<b class='pill fail'>{}</b>", counts.duplicates_unjustified)
    } else {
        "0".into()
    };
    let _ = writeln!(
        page,
        "<tr id='{}'{}><td>{}<td class=case><code>{}</code><small>{}</small><td class=n>{} / {} / {}<td class=n>{}<td \
class=n>{} / {unjustified}<td class=n>{}<td class=n>{}<td class=n>{}<td class=n>{}<td class=n>{}</tr>",
        anchor(number, case.name),
        if case.is_green() { " class=green" } else { "" },
        pill(case.outcome),
        text(name),
        text(case.proves),
        counts.published_ok,
        counts.published_failed,
        counts.published_unknown,
        counts.delivered,
        counts.duplicates_justified,
        counts.settle_failed,
        counts.letters_read,
        if counts.faults > 0 { format!("{} / {}", counts.faults, counts.faults_met) } else { String::new() },
        counts.recovery_ms.map(duration).unwrap_or_default(),
        duration(case.duration_ms),
    );
    if case.is_green() {
        if !case.detail.is_empty() {
            let _ = writeln!(
                page,
                "<tr class=green><td><td colspan={} class=muted>{}</tr>",
                COLUMNS - 1,
                text(&case.detail)
            );
        }
        return;
    }
    let _ = write!(page, "<tr class=why><td><td colspan={}><p>{}</p>", COLUMNS - 1, text(&case.detail));
    if !case.anomalies.is_empty() {
        page.push_str("<ul>");
        for anomaly in case.anomalies.iter().take(20) {
            let _ = write!(
                page,
                "<li><b>{}</b> {} <code>{}</code>: {}",
                text(anomaly.name),
                if anomaly.group.is_empty() {
                    String::new()
                } else {
                    format!("in group <code>{}</code>, message", text(&anomaly.group))
                },
                text(&anomaly.id),
                text(&anomaly.detail)
            );
        }
        if case.anomalies.len() > 20 {
            let _ = write!(page, "<li>and {} more", case.anomalies.len() - 20);
        }
        page.push_str("</ul>");
    }
    if let Some(schedule) = case.schedule_text(settings) {
        let lines: Vec<String> = schedule.lines().map(text).collect();
        let _ = write!(page, "<p>{}</p>", lines.join("<br>"));
    }
    page.push_str("<p class=muted>");
    if let Ok(Value::Object(counts)) = serde_json::to_value(case.counts) {
        let counts: Vec<String> = counts
            .iter()
            .filter(|(_, value)| value.as_u64() != Some(0))
            .map(|(name, value)| format!("{} {value}", name.replace('_', " ")))
            .collect();
        page.push_str(&text(&counts.join(", ")));
    }
    page.push_str("</p>");
    if let Some(file) = &case.history_file {
        let page_of = file.strip_suffix(".jsonl").map(|stem| format!("{stem}.html")).unwrap_or_default();
        let _ = write!(
            page,
            "<p><a href='{}'>Timeline of this case</a> · <a href='{}'>history (JSON lines)</a></p>",
            text(&page_of),
            text(file)
        );
    }
    page.push_str("</tr>\n");
}
