//! A history as what there is to draw: publishes, deliveries, subscriptions, faults, moments.
//!
//! It is read from the stored lines, not from the events in memory: what is drawn is what is kept, and an event that this file
//! does not know is still shown.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

/// One event of the history, as it is stored.
pub(super) struct Line {
    /// Microseconds since the case began.
    pub(super) at: u64,
    pub(super) client: u64,
    /// What happened: `publish_invoke`, `deliver`, ….
    pub(super) event: String,
    /// Everything else.
    pub(super) fields: Value,
}

impl Line {
    pub(super) fn text(&self, field: &str) -> String {
        plain(&self.fields[field])
    }

    pub(super) fn number(&self, field: &str) -> Option<u64> {
        self.fields[field].as_u64()
    }
}

/// A stretch of time on a client's lane: a publish from call to answer, or a delivery from hand-over to the end of its settling.
pub(super) struct Span {
    pub(super) client: u64,
    /// None for a publish.
    pub(super) subscription: Option<u64>,
    pub(super) message: String,
    pub(super) from: u64,
    /// None where the history ends before it does.
    pub(super) until: Option<u64>,
    /// How it ended: `ok`, `failed`, `unknown`; `ack`, `nack`, `release`, `dead_letter`, `dropped`, `open`.
    pub(super) end: &'static str,
    /// All of it in words.
    pub(super) title: String,
}

/// A subscription's life.
pub(super) struct Membership {
    pub(super) number: u64,
    pub(super) client: u64,
    pub(super) label: String,
    pub(super) from: u64,
    pub(super) until: Option<u64>,
}

/// Something without duration.
pub(super) struct Moment {
    pub(super) client: u64,
    pub(super) subscription: Option<u64>,
    pub(super) at: u64,
    pub(super) mark: &'static str,
    pub(super) messages: Vec<String>,
    pub(super) title: String,
}

/// A fault, from its beginning to its end.
pub(super) struct Band {
    number: Option<u64>,
    pub(super) label: String,
    pub(super) title: String,
    pub(super) from: u64,
    pub(super) until: Option<u64>,
}

/// What there is to draw.
#[derive(Default)]
pub(super) struct Model {
    pub(super) lines: Vec<Line>,
    pub(super) spans: Vec<Span>,
    pub(super) memberships: Vec<Membership>,
    pub(super) moments: Vec<Moment>,
    pub(super) bands: Vec<Band>,
    /// Messages, numbered in the order in which the history names them.
    pub(super) numbers: BTreeMap<String, usize>,
}

impl Model {
    pub(super) fn read(history: &str) -> Self {
        let mut model = Self::default();
        for line in history.lines().filter(|line| !line.trim().is_empty()) {
            let Ok(fields) = serde_json::from_str::<Value>(line) else { continue };
            let line = Line {
                at: fields["at"].as_u64().unwrap_or_default(),
                client: fields["client"].as_u64().unwrap_or_default(),
                event: plain(&fields["event"]),
                fields,
            };
            model.lines.push(line);
        }
        let lines = std::mem::take(&mut model.lines);
        Reading { model: &mut model, publishes: HashMap::new(), deliveries: HashMap::new() }.all(&lines);
        model.lines = lines;
        model
    }

    /// `#3` for a message.
    pub(super) fn label(&self, message: &str) -> String {
        self.numbers.get(message).map_or_else(|| message.to_owned(), |number| format!("#{number}"))
    }

    /// What the line names: one message, or those of a redrive; and those that a settle, a call belong to.
    pub(super) fn concerns(&self, line: &Line, message: &str, calls: &[u64], deliveries: &[u64]) -> bool {
        line.text("id") == message
            || line.fields["ids"].as_array().is_some_and(|ids| ids.iter().any(|id| plain(id) == message))
            || line.number("call").is_some_and(|call| calls.contains(&call))
            || line.number("delivery").is_some_and(|delivery| deliveries.contains(&delivery))
    }

    /// Everything that the history holds of a message, in its order.
    pub(super) fn story(&self, message: &str) -> Vec<&Line> {
        let of = |event: &str, field: &str| -> Vec<u64> {
            let lines = self.lines.iter().filter(|line| line.event == event && line.text("id") == message);
            lines.filter_map(|line| line.number(field)).collect()
        };
        let (calls, deliveries) = (of("publish_invoke", "call"), of("deliver", "delivery"));
        self.lines.iter().filter(|line| self.concerns(line, message, &calls, &deliveries)).collect()
    }

    /// When the last thing happened.
    pub(super) fn end(&self) -> u64 {
        self.lines.last().map_or(0, |line| line.at)
    }
}

struct Reading<'m> {
    model: &'m mut Model,
    /// Call to place among the spans.
    publishes: HashMap<u64, usize>,
    /// Delivery to place among the spans.
    deliveries: HashMap<u64, usize>,
}

impl Reading<'_> {
    fn all(&mut self, lines: &[Line]) {
        for line in lines {
            self.line(line);
        }
        let gone: HashMap<u64, u64> =
            self.model.memberships.iter().filter_map(|one| Some((one.number, one.until?))).collect();
        for span in &mut self.model.spans {
            // What a member held when it went, it holds no more.
            if let (None, Some(until)) = (span.until, span.subscription.and_then(|member| gone.get(&member))) {
                span.until = Some(*until);
            }
        }
    }

    fn line(&mut self, line: &Line) {
        let words = super::words::of(line);
        match line.event.as_str() {
            "publish_invoke" => {
                let call = line.number("call").unwrap_or_default();
                self.publishes.insert(call, self.model.spans.len());
                self.span(line, None, words);
            }
            "publish_ok" => self.end(line, &words, "ok"),
            "publish_fail" => self.end(line, &words, "failed"),
            "publish_info" => self.end(line, &words, "unknown"),
            "deliver" => {
                let delivery = line.number("delivery").unwrap_or_default();
                self.deliveries.insert(delivery, self.model.spans.len());
                self.span(line, line.number("subscription"), words);
            }
            "settle_invoke" => {
                let verb = match line.text("verb").as_str() {
                    "ack" => "ack",
                    "nack" => "nack",
                    "release" => "release",
                    _ => "dead_letter",
                };
                if let Some(span) = self.found(line) {
                    span.end = verb;
                    span.title.push_str(&format!("\n{words}"));
                }
            }
            "settle_ok" => {
                let at = line.at;
                if let Some(span) = self.found(line) {
                    span.until = Some(at);
                    span.title.push_str(&format!("\n{words}"));
                }
            }
            "settle_fail" => {
                // The delivery is back in the client's hands.
                if let Some(span) = self.found(line) {
                    span.end = "open";
                    span.title.push_str(&format!("\n{words}"));
                }
                self.moment(line, "!", words);
            }
            "dropped" => self.end(line, &words, "dropped"),
            "subscribe_invoke" => {}
            "subscribed" => {
                let destinations =
                    line.fields["destinations"].as_array().map(|all| all.iter().map(plain).collect::<Vec<_>>());
                let label = format!("group {} on {}", line.text("group"), destinations.unwrap_or_default().join(", "));
                self.model.memberships.push(Membership {
                    number: line.number("subscription").unwrap_or_default(),
                    client: line.client,
                    label,
                    from: line.at,
                    until: None,
                });
            }
            "closed" | "vanished" => {
                let number = line.number("subscription");
                if let Some(member) = self.model.memberships.iter_mut().find(|member| Some(member.number) == number) {
                    member.until = Some(line.at);
                }
                self.moment(line, if line.event == "closed" { "▪" } else { "✗" }, words);
            }
            "degraded" | "recovered" | "lane_lost" => self.moment(line, "⚡", words),
            "letter" => self.moment(line, "†", words),
            "redrive_invoke" | "redrive_info" => self.moment(line, "↻", words),
            "hang" => self.moment(line, "∞", words),
            "fault_begin" | "fault_end" => self.fault(line, &words),
            _ => self.moment(line, "·", words),
        }
    }

    fn span(&mut self, line: &Line, subscription: Option<u64>, title: String) {
        let message = line.text("id");
        self.number(&message);
        let (client, from) = (line.client, line.at);
        let end = if subscription.is_some() { "open" } else { "unknown" };
        self.model.spans.push(Span { client, subscription, message, from, until: None, end, title });
    }

    fn found(&mut self, line: &Line) -> Option<&mut Span> {
        let place = match line.number("call") {
            Some(call) => self.publishes.get(&call),
            None => self.deliveries.get(&line.number("delivery")?),
        };
        self.model.spans.get_mut(*place?)
    }

    fn end(&mut self, line: &Line, words: &str, how: &'static str) {
        let at = line.at;
        if let Some(span) = self.found(line) {
            (span.until, span.end) = (Some(at), how);
            span.title.push_str(&format!("\n{words}"));
        }
    }

    fn moment(&mut self, line: &Line, mark: &'static str, title: String) {
        let mut messages: Vec<String> = line.fields["ids"].as_array().into_iter().flatten().map(plain).collect();
        messages.extend(line.fields["id"].as_str().map(str::to_owned));
        messages.extend(self.found(line).map(|span| span.message.clone()));
        messages.iter().for_each(|message| self.number(message));
        let (client, subscription, at) = (line.client, line.number("subscription"), line.at);
        self.model.moments.push(Moment { client, subscription, at, mark, messages, title });
    }

    /// The end of a fault names the same number as its beginning.
    fn fault(&mut self, line: &Line, words: &str) {
        let number = line.number("fault");
        if line.event == "fault_end" {
            if let Some(band) = self.model.bands.iter_mut().find(|band| band.number == number && band.until.is_none()) {
                band.until = Some(line.at);
                band.title.push_str(&format!("\n{words}"));
            }
            return;
        }
        let label = line.text("kind");
        self.model.bands.push(Band { number, label, title: words.to_owned(), from: line.at, until: None });
    }

    fn number(&mut self, message: &str) {
        let next = self.model.numbers.len() + 1;
        self.model.numbers.entry(message.to_owned()).or_insert(next);
    }
}

/// A value in words: bytes (keys) as text where they are text.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let bytes: Option<Vec<u8>> =
                items.iter().map(|item| item.as_u64().and_then(|byte| u8::try_from(byte).ok())).collect();
            match bytes {
                Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
                None => items.iter().map(plain).collect::<Vec<_>>().join(", "),
            }
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_a_band_from_its_beginning_to_its_own_end() {
        let history = r#"{"at":10,"client":0,"event":"fault_begin","fault":1,"kind":"cut","clients":[0],"connections":1}
{"at":20,"client":0,"event":"fault_begin","fault":2,"kind":"freeze","clients":[0],"connections":1}
{"at":30,"client":0,"event":"fault_end","fault":1,"connections":1,"bytes":7}"#;
        let bands: Vec<_> =
            Model::read(history).bands.into_iter().map(|band| (band.label, band.from, band.until)).collect();
        assert_eq!(bands, [("cut".to_owned(), 10, Some(30)), ("freeze".to_owned(), 20, None)]);
    }

    #[test]
    fn an_event_that_is_not_known_is_shown_with_all_that_it_says() {
        let model = Model::read(r#"{"at":5,"client":3,"event":"sun_flare","strength":9}"#);
        assert_eq!((model.moments[0].client, model.moments[0].at), (3, 5));
        assert!(model.moments[0].title.contains("sun flare") && model.moments[0].title.contains("strength: 9"));
    }
}
