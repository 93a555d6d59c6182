//! The stories of the messages that something is wrong with, for a terminal.

use std::fmt::Write as _;

use super::model::{Line, Model};
use super::{focus, words};
use crate::CaseReport;

/// Messages whose story is told; the page tells more.
const STORIES: usize = 2;
/// Lines of one of them.
const LINES: usize = 40;
/// What befell everybody at the time stands in each story.
const COMMON: [&str; 5] = ["fault_begin", "fault_end", "degraded", "recovered", "vanished"];

/// Empty where nothing is wrong with a particular message.
pub(crate) fn stories(case: &CaseReport, history: &str) -> String {
    let model = Model::read(history);
    let focus = focus(case, &model);
    let mut text = String::new();
    for message in focus.iter().take(STORIES) {
        let lines = with_what_befell_all(&model, &model.story(message));
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {message}", model.label(message));
        for line in lines.iter().take(LINES) {
            let _ = writeln!(text, "{:>14}  client {}  {}", words::time(line.at), line.client, words::of(line));
        }
        if lines.len() > LINES {
            let _ = writeln!(text, "and {} more events", lines.len() - LINES);
        }
    }
    if focus.len() > STORIES {
        let _ = writeln!(text, "and {} more messages", focus.len() - STORIES);
    }
    text
}

fn with_what_befell_all<'m>(model: &'m Model, story: &[&'m Line]) -> Vec<&'m Line> {
    let is_told =
        |line: &&Line| COMMON.contains(&line.event.as_str()) || story.iter().any(|own| std::ptr::eq(*own, *line));
    model.lines.iter().filter(is_told).collect()
}
