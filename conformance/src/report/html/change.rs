//! What changed between two runs, as a page.

use std::fmt::Write as _;

use super::{STYLE, capability, document, pill, text};
use crate::Outcome;
use crate::report::Comparison;
use crate::report::compare::EndpointComparison;

pub(in crate::report) fn comparison(comparison: &Comparison) -> String {
    let mut body = String::from("<h1>What changed between two runs</h1>\n");
    let verdict = if comparison.is_worse() {
        "<b class='pill fail'>✗ something is worse</b>"
    } else {
        "<b class='pill pass'>✓ nothing is worse</b>"
    };
    let _ = writeln!(body, "<p>{verdict}</p>");
    for (names, what) in [(&comparison.gone, "only in the earlier run"), (&comparison.new, "only in the later run")] {
        if !names.is_empty() {
            let _ = writeln!(body, "<p>{what}: {}</p>", text(&names.join(", ")));
        }
    }
    for endpoint in &comparison.endpoints {
        section(&mut body, endpoint);
    }
    document("What changed between two conformance runs", STYLE, &body)
}

fn section(body: &mut String, endpoint: &EndpointComparison) {
    let _ = write!(
        body,
        "<h2>{}</h2>\n<dl class=facts><dt>before<dd>{}<dt>after<dd>{}<dt>ended the same<dd>{} cases</dl>\n",
        text(&endpoint.name),
        text(&endpoint.before),
        text(&endpoint.after),
        endpoint.unchanged
    );
    if !endpoint.cases.is_empty() {
        body.push_str("<div class=wide><table><thead><tr><th>case<th>before<th>after<th>why</tr></thead><tbody>\n");
        for change in &endpoint.cases {
            let class = if change.is_worse() { " class=why" } else { "" };
            let _ = writeln!(
                body,
                "<tr{class}><td><code>{}</code><td>{}<td>{}<td>{}</tr>",
                text(&change.name),
                ended(change.before),
                ended(change.after),
                text(&change.detail)
            );
        }
        body.push_str("</tbody></table></div>\n");
    }
    if !endpoint.record.is_empty() {
        body.push_str("<h3>Capability record</h3>\n<div class=wide><table><thead><tr><th>field<th>before<th>after</tr></thead><tbody>\n");
        for change in &endpoint.record {
            let value = |value| {
                let (class, word, note) = capability(value);
                let note = note.map(|note| format!(" <small class=muted>{}</small>", text(&note))).unwrap_or_default();
                format!(
                    "<span class='{}{class}'>{}</span>{note}",
                    if class.is_empty() { "" } else { "pill " },
                    text(&word)
                )
            };
            let _ = writeln!(
                body,
                "<tr><td><code>{}</code><td>{}<td>{}</tr>",
                text(&change.field),
                value(&change.before),
                value(&change.after)
            );
        }
        body.push_str("</tbody></table></div>\n");
    }
}

fn ended(outcome: Option<Outcome>) -> String {
    outcome.map_or_else(|| "<span class=muted>not part of the run</span>".into(), pill)
}
