//! What a run prints at its end.

use std::collections::BTreeMap;
use std::fmt;

use anybroker::DeadLetter;

use crate::service::Summary;

/// A summary for people. `flags` are what the `anybroker` command needs to reach the same broker.
#[derive(Debug)]
pub struct Printed<'a> {
    /// What happened.
    pub summary: &'a Summary,
    /// Such as `cargo run -q -p anybroker-cli --`.
    pub anybroker: &'a str,
    /// Such as `--url embedded:///tmp/orders.db`.
    pub flags: &'a str,
    /// Such as `cargo run -p orders -- --resume`.
    pub resume: &'a str,
}

impl fmt::Display for Printed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.published(f)?;
        self.worked(f)?;
        self.dead_letters(f)?;
        self.next(f)?;
        writeln!(f, "\nTotals\n{}", self.summary.totals)?;
        match (self.summary.interrupted, self.summary.scheme) {
            (false, _) => write!(f, "Done in {:.1} s.", self.seconds()),
            (true, "memory") => write!(f, "Interrupted after {:.1} s.", self.seconds()),
            (true, _) => {
                let fed = self.summary.fed.as_ref().map_or(0, |fed| fed.lines);
                writeln!(
                    f,
                    "Interrupted after {:.1} s, at line {fed}. To work off what was published:",
                    self.seconds()
                )?;
                write!(f, "  {}", self.resume)
            }
        }
    }
}

impl Printed<'_> {
    fn seconds(&self) -> f64 {
        self.summary.took.as_secs_f64()
    }

    fn published(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(fed) = &self.summary.fed else { return Ok(()) };
        write!(f, "\nPublished {} events from {} lines", fed.published, fed.lines)?;
        if fed.known > 0 {
            write!(f, " ({} of them were known to the broker)", fed.known)?;
        }
        writeln!(f)?;
        if !fed.unreadable.is_empty() {
            let numbers: Vec<String> = fed.unreadable.iter().map(ToString::to_string).collect();
            writeln!(f, "  {} lines could not be read: {}", numbers.len(), numbers.join(", "))?;
        }
        for (id, problem) in &fed.failed {
            writeln!(f, "  not published: {id}: {problem}")?;
        }
        Ok(())
    }

    fn worked(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n  {:<10} {:>10} {:>8} {:>13}", "group", "processed", "retried", "dead letters")?;
        for part in &self.summary.worked.subscriptions {
            let counts = &part.counts;
            let letters = counts.dead_letters();
            writeln!(f, "  {:<10} {:>10} {:>8} {letters:>13}", part.group, counts.processed, counts.retried)?;
        }
        writeln!(f, "  {} events came more than once; the totals count each once", self.summary.duplicates)
    }

    fn dead_letters(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nDead letters\n  {:<20} {:<20} {:>5}  for example", "queue", "error type", "count")?;
        for (destination, group, letters) in &self.summary.dead_letters {
            let mut classes: BTreeMap<&str, Vec<&DeadLetter>> = BTreeMap::new();
            for letter in letters {
                let class = letter.error_type.as_deref().unwrap_or(letter.reason.as_str());
                classes.entry(class).or_default().push(letter);
            }
            for (class, letters) in classes {
                let queue = format!("{destination} [{group}]");
                let example = letters.iter().find_map(|letter| Some((letter.message.id(), letter.detail.as_deref()?)));
                write!(f, "  {queue:<20} {class:<20} {:>5}", letters.len())?;
                match example {
                    Some((id, detail)) => writeln!(f, "  {id}: {}", shortened(detail))?,
                    None => writeln!(f, "  {}", letters[0].message.id())?,
                }
            }
        }
        Ok(())
    }

    fn next(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.summary.scheme == "memory" {
            return writeln!(f, "\nThis broker lived in this process, and its dead letters with it.");
        }
        let (anybroker, flags) = (self.anybroker, self.flags);
        writeln!(f, "\nTo look at them:")?;
        writeln!(f, "  {anybroker} dlq list orders --group payments {flags}")?;
        writeln!(f, "  {anybroker} dlq peek orders --group payments --error-type CARD_DECLINED --limit 1 {flags}")?;
        let unreachable = |letter: &DeadLetter| letter.error_type.as_deref() == Some("SERVICE_UNAVAILABLE");
        if !self.summary.dead_letters.iter().any(|(_, _, letters)| letters.iter().any(unreachable)) {
            return Ok(());
        }
        writeln!(f, "To put those back that failed only because a bank could not be reached, and process them:")?;
        writeln!(f, "  {anybroker} dlq redrive orders --group payments --error-type SERVICE_UNAVAILABLE {flags}")?;
        writeln!(f, "  {}", self.resume)
    }
}

fn shortened(detail: &str) -> String {
    match detail.char_indices().nth(70) {
        Some((end, _)) => format!("{}…", &detail[..end]),
        None => detail.to_owned(),
    }
}
