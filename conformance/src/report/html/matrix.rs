//! Several endpoints side by side.

use std::fmt::Write as _;

use super::endpoint::anchor;
use super::{bar, capability, duration, mark, text, verdict};
use crate::report::{CaseReport, Report};

/// One line for each endpoint.
pub(super) fn overview(page: &mut String, reports: &[Report]) {
    page.push_str(
        "<h2>Endpoints</h2>\n<div class=wide><table><thead><tr><th>endpoint<th>verdict<th>outcomes<th class=n>pass<th \
class=n>refused<th class=n>fail<th class=n>incon&shy;clusive<th class=n>not run<th class=n>published<th class=n>delivered<th \
class=n>unjustified duplicates<th class=n>time</tr></thead><tbody>\n",
    );
    for (number, report) in reports.iter().enumerate() {
        let sum = |count: fn(&CaseReport) -> u64| report.cases.iter().map(count).sum::<u64>();
        let (endpoint, totals) = (&report.endpoint, &report.totals);
        let versions = [Some(endpoint.server.as_str()), endpoint.client.as_deref()];
        let versions: Vec<&str> = versions.into_iter().flatten().collect();
        let emulated = match &endpoint.emulated {
            Some(emulated) => format!(" <b class='pill odd' title='{}'>emulated</b>", text(emulated)),
            None => String::new(),
        };
        let _ = writeln!(
            page,
            "<tr><td class=case><a href='#e{number}'>{}</a>{emulated}<small>{}</small><td>{}<td>{}<td class=n>{}<td class=n>{}<td \
class=n>{}<td class=n>{}<td class=n>{}<td class=n>{}<td class=n>{}<td class=n>{}<td class=n>{}</tr>",
            text(&endpoint.name),
            text(&versions.join(" · ")),
            verdict(report),
            bar(totals),
            totals.pass,
            totals.refused_and_verified,
            totals.fail,
            totals.inconclusive,
            totals.not_run,
            sum(|case| case.counts.published_ok),
            sum(|case| case.counts.delivered),
            sum(|case| case.counts.duplicates_unjustified),
            duration(report.duration_ms),
        );
    }
    page.push_str("</tbody></table></div>\n");
}

/// Cases and what became of each on each endpoint.
pub(super) fn cases(page: &mut String, reports: &[Report]) {
    page.push_str("<h2>Cases</h2>\n<div class=wide><table class=matrix>");
    columns(page, reports, "case");
    let mut known: Vec<&CaseReport> = Vec::new();
    for case in reports.iter().flat_map(|report| &report.cases) {
        if known.iter().all(|other| other.name != case.name) {
            known.push(case);
        }
    }
    // Cases that only some endpoints have stand with their theme.
    let mut themes: Vec<&str> = Vec::new();
    for case in &known {
        if !themes.contains(&case.theme) {
            themes.push(case.theme);
        }
    }
    for theme in themes {
        let _ = writeln!(page, "<tr><th class=theme colspan={}>{}</tr>", reports.len() + 1, text(theme));
        for case in known.iter().filter(|case| case.theme == theme) {
            let found: Vec<Option<&CaseReport>> = reports.iter().map(|report| report.case(case.name)).collect();
            let green = found.iter().flatten().all(|case| case.is_green());
            let name = case.name.split_once('/').map_or(case.name, |(_, name)| name);
            let _ = write!(
                page,
                "<tr{}><th title='{}'>{}",
                if green { " class=green" } else { "" },
                text(case.proves),
                text(name)
            );
            for (number, found) in found.into_iter().enumerate() {
                match found {
                    None => page.push_str("<td class='o'>"),
                    Some(found) => {
                        let (class, mark) = mark(found.outcome);
                        let said = if found.detail.is_empty() {
                            found.outcome.as_str().to_lowercase()
                        } else {
                            format!("{}: {}", found.outcome.as_str().to_lowercase(), found.detail)
                        };
                        let said: String = said.chars().take(300).collect();
                        let _ = write!(
                            page,
                            "<td class='o {class}'><a href='#{}' title='{}'>{mark}</a>",
                            anchor(number, case.name),
                            text(&said)
                        );
                    }
                }
            }
            page.push_str("</tr>\n");
        }
    }
    page.push_str("</tbody></table></div>\n");
}

/// What each endpoint's record says, field by field.
pub(super) fn records(page: &mut String, reports: &[Report]) {
    page.push_str("<h2>Capability records</h2>\n<div class=wide><table class=matrix>");
    columns(page, reports, "field");
    let mut fields: Vec<&String> = reports.iter().flat_map(|report| report.record.keys()).collect();
    fields.sort_unstable();
    fields.dedup();
    for field in fields {
        let _ = write!(page, "<tr><th><code>{}</code>", text(field));
        for report in reports {
            let (class, word, note) = report.record.get(field).map(capability).unwrap_or_default();
            let _ = write!(page, "<td class='v {class}' title='{}'>{}", text(&note.unwrap_or_default()), text(&word));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n");
}

fn columns(page: &mut String, reports: &[Report], what: &str) {
    let _ = write!(page, "<thead><tr><th>{what}");
    for (number, report) in reports.iter().enumerate() {
        let _ = write!(page, "<th class=col><a href='#e{number}'>{}</a>", text(&report.endpoint.name));
    }
    page.push_str("</tr></thead><tbody>\n");
}
