//! What the server has refused: it answers nothing to who may not publish or subscribe, and tells only the connection.

use anybroker_core::{Effect, Error, ErrorKind};
use tokio::sync::watch;
use tokio::time::Instant;

/// How many refusals are remembered.
const REMEMBERED: usize = 64;

/// The refusals of one connection.
pub(crate) struct Denials(watch::Sender<Vec<Denial>>);

#[derive(Debug, Clone)]
struct Denial {
    at: Instant,
    is_publish: bool,
    subject: String,
}

impl Default for Denials {
    fn default() -> Self {
        Self(watch::Sender::new(Vec::new()))
    }
}

impl Denials {
    /// Notes what the server said: whether it refuses a publish, and not a subscription, and the subject.
    pub(crate) fn note(&self, text: &str) -> Option<(bool, String)> {
        let (is_publish, subject) = parse(text)?;
        let denial = Denial { at: Instant::now(), is_publish, subject: subject.to_owned() };
        self.0.send_modify(|denials| {
            if denials.len() == REMEMBERED {
                denials.remove(0);
            }
            denials.push(denial);
        });
        Some((is_publish, subject.to_owned()))
    }

    /// Ends when publishing to this subject, or any subscription, is refused at or after `since`.
    pub(crate) async fn of(&self, operation: &'static str, subject: &str, since: Instant) -> Error {
        let mut denials = self.0.subscribe();
        let concerns = |denial: &&Denial| denial.at >= since && (!denial.is_publish || denial.subject == subject);
        let found = denials.wait_for(|denials| denials.iter().any(|denial| concerns(&denial))).await;
        let Some(denial) = found.ok().and_then(|denials| denials.iter().find(concerns).cloned()) else {
            return std::future::pending().await;
        };
        refused(operation, denial.is_publish, &denial.subject)
    }
}

pub(crate) fn refused(operation: &'static str, is_publish: bool, subject: &str) -> Error {
    let verb = if is_publish { "publish" } else { "subscribe" };
    let text = format!("the user may not {verb} to {subject}");
    Error::new(ErrorKind::PermissionDenied, operation, text).with_effect(Effect::NotDone)
}

/// `Permissions Violation for Publish to "a.b"`, and `… for Subscription to "a.b"` with an optional queue.
fn parse(text: &str) -> Option<(bool, &str)> {
    let rest = text.trim_matches('\'').strip_prefix("Permissions Violation for ")?;
    let (what, rest) = rest.split_once(" to \"")?;
    let (subject, _) = rest.split_once('"')?;
    Some((what.starts_with("Publish"), subject))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_refusals_are_read() {
        assert_eq!(parse("Permissions Violation for Publish to \"a.b\""), Some((true, "a.b")));
        assert_eq!(parse("Permissions Violation for Subscription to \"a.>\" using queue \"q\""), Some((false, "a.>")));
        assert_eq!(parse("Stale Connection"), None);
    }
}
