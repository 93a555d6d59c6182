//! The drawing: a lane for each client, with a row for what it publishes and one for each of its subscriptions.

use std::collections::HashSet;
use std::fmt::Write as _;

use super::axis::Axis;
use super::model::{Model, Moment, Span};
use super::words::time;
use crate::report::html::text;

/// Beyond so many publishes and deliveries only those of the messages concerned are drawn.
const FULL: usize = 400;
/// Left of the lanes: their names.
const NAMES: f64 = 210.0;
const ROW: f64 = 17.0;
/// A span is at least wide enough for its message's number.
const LEAST: f64 = 25.0;
const HEAD: f64 = 34.0;
/// Spans above each other, at most.
const SLOTS: usize = 40;
/// Messages with a colour of their own.
const COLOURS: usize = 6;

/// A row of the drawing.
struct Row<'m> {
    client: u64,
    label: String,
    title: String,
    /// From when to when the member was there.
    life: Option<(u64, u64)>,
    spans: Vec<&'m Span>,
    moments: Vec<&'m Moment>,
}

pub(super) fn draw(body: &mut String, model: &Model, focus: &[String]) {
    let concerned: HashSet<&str> = focus.iter().map(String::as_str).collect();
    let all = model.spans.len() <= FULL || focus.is_empty();
    let drawn = |message: &str| all || concerned.contains(message);
    // Where nothing is in focus and there is too much, the end is what tells.
    let first = if all { model.spans.len().saturating_sub(FULL) } else { 0 };
    let spans: Vec<&Span> = model.spans.iter().skip(first).filter(|span| drawn(&span.message)).collect();
    let moments: Vec<&Moment> = model
        .moments
        .iter()
        .filter(|moment| moment.messages.is_empty() || moment.messages.iter().any(|message| drawn(message)))
        .collect();
    let left_out = model.spans.len() - spans.len();
    if left_out > 0 {
        let _ = writeln!(
            body,
            "<p class=muted>{left_out} publishes and deliveries of other messages are not drawn; the stored history has them.</p>"
        );
    }
    let end = model.end();
    let mut times = vec![0, end];
    times.extend(spans.iter().flat_map(|span| [span.from, span.until.unwrap_or(end)]));
    times.extend(moments.iter().map(|moment| moment.at));
    times.extend(model.memberships.iter().flat_map(|member| [member.from, member.until.unwrap_or(end)]));
    times.extend(model.bands.iter().flat_map(|band| [band.from, band.until.unwrap_or(end)]));
    let axis = Axis::new(times);
    let rows = rows(model, &spans, &moments, end);
    Canvas { axis, model, focus, ground: String::new(), body: String::new(), path: vec![Vec::new(); focus.len()] }
        .finish(body, &rows);
}

fn rows<'m>(model: &Model, spans: &[&'m Span], moments: &[&'m Moment], end: u64) -> Vec<Row<'m>> {
    let mut clients: Vec<u64> = spans.iter().map(|span| span.client).collect();
    clients.extend(moments.iter().map(|moment| moment.client));
    clients.extend(model.memberships.iter().map(|member| member.client));
    clients.sort_unstable();
    clients.dedup();
    let mut rows = Vec::new();
    for client in clients {
        let members: Vec<u64> =
            model.memberships.iter().filter(|member| member.client == client).map(|member| member.number).collect();
        // What belongs to no subscription that opened stands with the client itself.
        let own = |subscription: Option<u64>| subscription.is_none_or(|number| !members.contains(&number));
        let row = Row {
            client,
            label: "publishes".into(),
            title: format!("client {client}"),
            life: None,
            spans: spans.iter().copied().filter(|span| span.client == client && own(span.subscription)).collect(),
            moments: moments.iter().copied().filter(|one| one.client == client && own(one.subscription)).collect(),
        };
        if !row.spans.is_empty() || !row.moments.is_empty() {
            rows.push(row);
        }
        for member in model.memberships.iter().filter(|member| member.client == client) {
            let belongs = |number: Option<u64>| number == Some(member.number);
            rows.push(Row {
                client,
                label: format!("subscription {}", member.number),
                title: member.label.clone(),
                life: Some((member.from, member.until.unwrap_or(end))),
                spans: spans
                    .iter()
                    .copied()
                    .filter(|span| span.client == client && belongs(span.subscription))
                    .collect(),
                moments: moments
                    .iter()
                    .copied()
                    .filter(|one| one.client == client && belongs(one.subscription))
                    .collect(),
            });
        }
    }
    rows
}

struct Canvas<'m> {
    axis: Axis,
    model: &'m Model,
    focus: &'m [String],
    /// What lies under the ways of the messages.
    ground: String,
    body: String,
    /// Where the messages in focus went: moment and place.
    path: Vec<Vec<(u64, f64, f64)>>,
}

impl Canvas<'_> {
    fn finish(mut self, page: &mut String, rows: &[Row<'_>]) {
        let mut top = HEAD;
        let mut client = None;
        let mut lanes = String::new();
        let width = NAMES + self.axis.width() + LEAST + 30.0;
        for row in rows {
            if client != Some(row.client) {
                client = Some(row.client);
                let _ = writeln!(
                    lanes,
                    "<line class=lane x1=0 x2={width:.0} y1={top:.0} y2={top:.0} /><text class=who x=8 y={:.0}>client {}</text>",
                    top + 13.0,
                    row.client
                );
            }
            let height = self.row(row, top);
            let _ = writeln!(
                lanes,
                "<g><title>{}</title><text class=name x=78 y={:.0}>{}</text></g>",
                text(&row.title),
                top + 13.0,
                text(&row.label)
            );
            top += height;
        }
        let mut svg = format!(
            "<div class=wide><svg xmlns='http://www.w3.org/2000/svg' role=img aria-label='the history, drawn; the tables below hold \
the same in words' width={width:.0} height={:.0} viewBox='0 0 {width:.0} {:.0}'>\n",
            top + 12.0,
            top + 12.0
        );
        for (moment, place) in self.axis.ticks() {
            let x = NAMES + place;
            let _ = writeln!(
                svg,
                "<line class=tick x1={x:.1} x2={x:.1} y1=20 y2={top:.0} /><text class=when x={x:.1} y=14>{}</text>",
                time(moment)
            );
        }
        for band in &self.model.bands {
            let from = NAMES + self.axis.place(band.from);
            let until = NAMES + self.axis.place(band.until.unwrap_or_else(|| self.model.end()));
            let _ = writeln!(
                svg,
                "<g><title>{4}</title><rect class=fault x={from:.1} y=20 width={1:.1} height={2:.0} /><text class=fault x={3:.1} \
y=30>{0}</text></g>",
                text(&band.label),
                (until - from).max(3.0),
                top - 20.0,
                from + 3.0,
                text(&band.title),
            );
        }
        svg.push_str(&self.ground);
        svg.push_str(&lanes);
        for (colour, path) in self.path.iter_mut().enumerate().take(COLOURS) {
            path.sort_by(|one, other| one.0.cmp(&other.0).then(one.1.total_cmp(&other.1)));
            let points: Vec<String> = path.iter().map(|(_, x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = writeln!(svg, "<polyline class='way c{colour}' points='{}' />", points.join(" "));
        }
        svg.push_str(&self.body);
        svg.push_str("</svg></div>\n");
        page.push_str(&svg);
        page.push_str(LEGEND);
    }

    /// Draws a row and answers how high it is.
    fn row(&mut self, row: &Row<'_>, top: f64) -> f64 {
        // Until where each slot is taken.
        let mut slots: Vec<f64> = Vec::new();
        let mut drawn = String::new();
        for span in &row.spans {
            let from = NAMES + self.axis.place(span.from);
            let until = NAMES + self.axis.place(span.until.unwrap_or_else(|| self.model.end()));
            let right = until.max(from + LEAST);
            let slot = match slots.iter().position(|taken| *taken < from) {
                Some(slot) => slot,
                None if slots.len() < SLOTS => {
                    slots.push(0.0);
                    slots.len() - 1
                }
                None => SLOTS - 1,
            };
            slots[slot] = right + 1.0;
            #[allow(clippy::cast_precision_loss, reason = "at most SLOTS")]
            let y = top + 3.0 + slot as f64 * ROW;
            let colour = self.colour(&span.message);
            if let Some(colour) = colour {
                self.path[colour].push((span.from, from + 2.0, y + 7.0));
                if span.until.is_some() {
                    self.path[colour].push((span.until.unwrap_or_default(), right - 2.0, y + 7.0));
                }
            }
            let kind = if span.subscription.is_some() { "d" } else { "p" };
            let _ = write!(
                drawn,
                "<g class='{kind} {}{}'><title>{} {}\n{}</title><rect x={from:.1} y={y:.1} width={:.1} height=14 rx=2 /><text \
x={:.1} y={:.1}>{}{}</text></g>\n",
                span.end,
                self.emphasis(colour),
                text(&self.model.label(&span.message)),
                text(&span.message),
                text(&span.title),
                right - from,
                from + 3.0,
                y + 10.5,
                text(&self.model.label(&span.message)),
                glyph(span.end, span.subscription.is_some()),
            );
        }
        #[allow(clippy::cast_precision_loss, reason = "at most SLOTS")]
        let below = top + 3.0 + slots.len() as f64 * ROW;
        let mut taken = f64::MIN;
        let mut steps = 0.0;
        for moment in &row.moments {
            let x = NAMES + self.axis.place(moment.at);
            // Marks at one moment stand below each other, up to four.
            steps = if x - taken < 9.0 && steps < 3.0 { steps + 1.0 } else { 0.0 };
            taken = x;
            let y = below + 11.0 + steps * 11.0;
            let colour = moment.messages.iter().find_map(|message| self.colour(message));
            if let Some(colour) = colour {
                self.path[colour].push((moment.at, x + 4.0, y - 4.0));
            }
            let label: Vec<String> = moment.messages.iter().map(|message| self.model.label(message)).collect();
            let _ = write!(
                drawn,
                "<g class='o{}'><title>{} {}\n{}</title><text x={x:.1} y={y:.1}>{}</text></g>\n",
                self.emphasis(colour),
                time(moment.at),
                text(&label.join(", ")),
                text(&moment.title),
                moment.mark
            );
        }
        let marks = if row.moments.is_empty() { 0.0 } else { 4.0 * 11.0 };
        let height = (below - top + marks + 4.0).max(ROW + 6.0);
        if let Some((from, until)) = row.life {
            let from = NAMES + self.axis.place(from);
            let width = (NAMES + self.axis.place(until) - from).max(LEAST);
            let _ = writeln!(
                self.ground,
                "<rect class=life x={from:.1} y={:.1} width={width:.1} height={:.1} rx=3 />",
                top + 1.0,
                height - 2.0
            );
        }
        self.body.push_str(&drawn);
        height
    }

    fn colour(&self, message: &str) -> Option<usize> {
        self.focus.iter().take(COLOURS).position(|focused| focused == message)
    }

    fn emphasis(&self, colour: Option<usize>) -> String {
        match colour {
            Some(colour) => format!(" focus c{colour}"),
            None if self.focus.is_empty() => String::new(),
            None => " dim".to_owned(),
        }
    }
}

/// How it ended, without colours.
fn glyph(end: &str, is_delivery: bool) -> &'static str {
    match (end, is_delivery) {
        ("failed", _) => "✗",
        ("unknown", _) => "?",
        ("ack", true) => "✓",
        ("nack", true) => "↺",
        ("release", true) => "↩",
        ("dead_letter", true) => "†",
        ("dropped", true) => "○",
        _ => "",
    }
}

const LEGEND: &str = "<p class='muted key'>Time runs from left to right, not to scale: waits are drawn short. A number is a \
message; hold the pointer over a mark for its details. Publishes: <b>plain</b> confirmed, <b>✗</b> not stored, <b>?</b> unknown. \
Deliveries, from the hand-over to the end of their settling: <b>✓</b> ack, <b>↺</b> nack, <b>↩</b> released, <b>†</b> dead letter, \
<b>○</b> dropped, no mark: not settled. Moments: <b>!</b> a settle failed, <b>▪</b> closed, <b>✗</b> gone without a close, \
<b>⚡</b> connection or lane lost, <b>†</b> a dead letter is read, <b>↻</b> redrive, <b>∞</b> hang. The coloured line is the way of \
a message that something is wrong with.</p>\n";
