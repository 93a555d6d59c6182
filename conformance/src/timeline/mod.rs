//! The history of a case as a page that a person reads: what is wrong, the whole story of each message concerned, and a
//! drawing with a lane for each client and faults as bands. No scripts, no other files.

mod axis;
mod drawing;
mod model;
mod told;
mod words;

use std::fmt::Write as _;

use crate::CaseReport;
use crate::report::html::{document, text};
use model::{Line, Model};
pub(crate) use told::stories;

/// Messages whose story is told.
const STORIES: usize = 6;
/// Lines of the list of everything.
const LISTED: usize = 3_000;

/// The page of a case whose history is kept.
pub(crate) fn page(case: &CaseReport, history: &str) -> String {
    let model = Model::read(history);
    let focus = focus(case, &model);
    // The list below says what the history shows.
    let (found, _) = case.detail.split_once("the history shows").unwrap_or((&case.detail, ""));
    let mut body = format!(
        "<h1>{}</h1>\n<p>{}</p>\n<p class=verdict><b>{}</b> {}</p>\n",
        text(case.name),
        text(case.proves),
        text(case.outcome.as_str()),
        text(found.trim_end_matches([' ', ';']))
    );
    if !case.anomalies.is_empty() {
        body.push_str("<ul>\n");
        for anomaly in case.anomalies.iter().take(20) {
            let _ = writeln!(
                body,
                "<li><b>{}</b> <span class=m>{}</span> {}",
                text(anomaly.name),
                text(&model.label(&anomaly.id)),
                text(&anomaly.detail)
            );
        }
        body.push_str("</ul>\n");
    }
    drawing::draw(&mut body, &model, &focus);
    for (colour, message) in focus.iter().enumerate().take(STORIES) {
        let _ = writeln!(
            body,
            "<h2><span class='m c{colour}'>{}</span> {}</h2>",
            text(&model.label(message)),
            text(message)
        );
        table(&mut body, &model, &model.story(message));
    }
    if focus.len() > STORIES {
        let _ = writeln!(body, "<p class=muted>and {} more messages</p>", focus.len() - STORIES);
    }
    let all: Vec<&Line> = model.lines.iter().take(LISTED).collect();
    let _ = writeln!(body, "<details><summary>Everything, in its order ({} events)</summary>", model.lines.len());
    table(&mut body, &model, &all);
    if model.lines.len() > LISTED {
        let _ = writeln!(body, "<p class=muted>and {} more, in the stored history</p>", model.lines.len() - LISTED);
    }
    body.push_str("</details>\n");
    document(&format!("Timeline of {}", case.name), include_str!("style.css"), &body)
}

/// The messages that the page is about: those that the checker names; otherwise those that the case's own message names;
/// otherwise those that were not brought to an end.
fn focus(case: &CaseReport, model: &Model) -> Vec<String> {
    let mut focus: Vec<String> = Vec::new();
    let mut add = |message: &str| {
        if model.numbers.contains_key(message) && !focus.iter().any(|known| known == message) {
            focus.push(message.to_owned());
        }
    };
    case.anomalies.iter().for_each(|anomaly| add(&anomaly.id));
    // An anomaly may name a second message: the one that was overtaken, or held elsewhere.
    for message in model.numbers.keys() {
        if case.anomalies.iter().any(|anomaly| anomaly.detail.contains(message.as_str())) {
            add(message);
        }
    }
    if focus.is_empty() {
        focus = model.numbers.keys().filter(|message| case.detail.contains(message.as_str())).cloned().collect();
    }
    if focus.is_empty() {
        focus = unfinished(model);
    }
    focus
}

/// Messages that were confirmed and never seen; where there are none, those whose last delivery was not settled for good.
fn unfinished(model: &Model) -> Vec<String> {
    let (mut unseen, mut open) = (Vec::new(), Vec::new());
    for message in model.numbers.keys() {
        let of = |is_delivery: bool| {
            model
                .spans
                .iter()
                .filter(move |span| span.message == *message && span.subscription.is_some() == is_delivery)
        };
        let is_letter = model.moments.iter().any(|moment| moment.messages.contains(message));
        match of(true).next_back() {
            None if is_letter => {}
            None if of(false).any(|span| span.end == "ok") => unseen.push(message.clone()),
            Some(last) if !matches!(last.end, "ack" | "dead_letter") => open.push(message.clone()),
            _ => {}
        }
    }
    if unseen.is_empty() { open } else { unseen }
}

fn table(body: &mut String, model: &Model, lines: &[&Line]) {
    body.push_str("<div class=wide><table><thead><tr><th class=n>after<th>client<th>message<th>what happened</tr></thead><tbody>\n");
    for line in lines {
        let message = match line.text("id") {
            id if id.is_empty() => String::new(),
            id => model.label(&id),
        };
        let _ = writeln!(
            body,
            "<tr><td class=n>{}<td class=n>{}<td><span class=m>{}</span><td>{}</tr>",
            words::time(line.at),
            line.client,
            text(&message),
            text(&words::of(line))
        );
    }
    body.push_str("</tbody></table></div>\n");
}
