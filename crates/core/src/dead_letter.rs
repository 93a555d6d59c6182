//! Dead letters: what they hold, how they are chosen, and redrive.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytestring::ByteString;

use crate::{Destination, Group, Message, Timestamp};

/// Why a message became a dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The handler failed as often as the subscription allows.
    AttemptsExhausted,
    /// The broker's own limit buried it; nobody of ours decided that.
    BrokerLimit,
    /// It was handed over too often without any outcome: it probably kills its consumer.
    CrashLimit,
    /// Its time to live ended before the group settled it.
    Expired,
    /// It could not be read.
    Malformed,
    /// It waits in order behind a dead letter of its key.
    Parked,
    /// The handler said so.
    Rejected,
    /// A reason of the application: a short word to filter by. What is longer than 256 bytes is cut when a message is
    /// settled with it, at the end of a character; the rest belongs into [`Verdict::detail`](crate::Verdict::detail).
    Other(ByteString),
}

impl Reason {
    /// Longer reasons of an application are cut: a letter must not become too large by them. In bytes.
    const LONGEST: usize = 256;

    /// Cuts a reason that is too long for a letter.
    pub(crate) fn cut(&mut self) {
        if let Self::Other(text) = self
            && text.len() > Self::LONGEST
        {
            let end = (0..=Self::LONGEST).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
            *text = ByteString::from(&text[..end]);
        }
    }

    /// The reason as it is stored, printed and filtered by (`snake_case`).
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::AttemptsExhausted => "attempts_exhausted",
            Self::BrokerLimit => "broker_limit",
            Self::CrashLimit => "crash_limit",
            Self::Expired => "expired",
            Self::Malformed => "malformed",
            Self::Parked => "parked",
            Self::Rejected => "rejected",
            Self::Other(text) => text,
        }
    }
}

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        match text {
            "attempts_exhausted" => Self::AttemptsExhausted,
            "broker_limit" => Self::BrokerLimit,
            "crash_limit" => Self::CrashLimit,
            "expired" => Self::Expired,
            "malformed" => Self::Malformed,
            "parked" => Self::Parked,
            "rejected" => Self::Rejected,
            other => Self::Other(other.into()),
        }
    }
}

impl FromStr for Reason {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(text.into())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Which dead-letter queue: it belongs to a source destination and a group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DeadLetterScope {
    /// The destination the letters came from.
    pub source: Destination,
    /// The group that failed them.
    pub group: Group,
}

impl DeadLetterScope {
    /// The queue of that source and group.
    pub fn new(source: impl Into<Destination>, group: impl Into<Group>) -> Self {
        Self { source: source.into(), group: group.into() }
    }
}

/// The identity of a dead letter within its queue: an opaque text of the adapter's. It differs between two
/// copies of the same message.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeadLetterId(pub ByteString);

impl fmt::Display for DeadLetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A message that will not be delivered again in its group, unless it is redriven. Body, headers, key and id are
/// untouched.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// Its identity within the queue.
    pub id: DeadLetterId,
    /// The message as it was published; its destination is the source.
    pub message: Message,
    /// The group that failed it.
    pub group: Group,
    /// Why.
    pub reason: Reason,
    /// The class of the last failure.
    pub error_type: Option<ByteString>,
    /// What a person should read about it.
    pub detail: Option<ByteString>,
    /// How many attempts failed.
    pub attempts: u32,
    /// When the group first received it, where that is known.
    pub first_at: Option<Timestamp>,
    /// When it became a dead letter.
    pub last_at: Timestamp,
    /// How often it has been redriven before.
    pub redrives: u32,
    /// Where the source had it, where that is known.
    pub position: Option<crate::Position>,
}

/// Which letters. Every condition that is set must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetterFilter {
    /// Only with this reason.
    pub reason: Option<Reason>,
    /// Only with this error type.
    pub error_type: Option<ByteString>,
    /// Only those that became dead letters at or after this moment.
    pub since: Option<Timestamp>,
    /// Only those that became dead letters before this moment.
    pub until: Option<Timestamp>,
    /// Only with this key.
    pub key: Option<bytes::Bytes>,
    /// Only with this header and value (any of the header's values may match).
    pub headers: Vec<(String, bytes::Bytes)>,
    /// Only this message id.
    pub id: Option<crate::MessageId>,
}

impl DeadLetterFilter {
    /// All letters.
    #[must_use]
    pub fn all() -> Self {
        Self::default()
    }

    /// Whether every condition holds.
    #[must_use]
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let headers = letter.message.headers();
        self.reason.as_ref().is_none_or(|reason| *reason == letter.reason)
            && self.error_type.as_ref().is_none_or(|class| Some(class) == letter.error_type.as_ref())
            && self.since.is_none_or(|since| letter.last_at >= since)
            && self.until.is_none_or(|until| letter.last_at < until)
            && self.key.as_ref().is_none_or(|key| letter.message.key() == Some(&key[..]))
            && self.id.as_ref().is_none_or(|id| id == letter.message.id())
            && self
                .headers
                .iter()
                .all(|(name, value)| headers.iter().any(|(other, found)| other == name && found == &value[..]))
    }
}

/// A page of letters, oldest first.
#[derive(Debug, Default)]
pub struct DeadLetterPage {
    /// The letters.
    pub letters: Vec<DeadLetter>,
    /// Where the next page starts; `None` behind the last.
    pub next: Option<DeadLetterId>,
}

/// How letters are redriven. Redriving is resumable by nature: what is done is gone from the queue, and running
/// the same call again goes on with the rest.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RedriveOptions {
    /// Which letters.
    pub filter: DeadLetterFilter,
    /// Only tell which would be redriven.
    pub dry_run: bool,
    /// At most that many; those that the loop guard refuses do not count.
    pub limit: Option<u64>,
    /// At most that many each second.
    pub rate: Option<f64>,
    /// Letters that were redriven this often already are refused, so that a broken handler and an eager operator
    /// cannot go round in a circle. Default 3.
    pub max_redrives: u32,
    /// How many are moved together. Default 100.
    pub batch: usize,
}

impl Default for RedriveOptions {
    fn default() -> Self {
        Self { filter: DeadLetterFilter::all(), dry_run: false, limit: None, rate: None, max_redrives: 3, batch: 100 }
    }
}

impl RedriveOptions {
    /// The pause after moving `moved` letters, to keep the rate.
    pub(crate) fn pause(&self, moved: usize) -> Option<Duration> {
        let rate = self.rate.filter(|rate| rate.is_finite() && *rate > 0.0)?;
        #[allow(clippy::cast_precision_loss, reason = "a batch is far below 2^52")]
        Some(Duration::try_from_secs_f64(moved as f64 / rate).unwrap_or(Duration::MAX))
    }
}

/// What became of a redrive or purge.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct RedriveReport {
    /// How many letters the filter matched.
    pub matched: u64,
    /// How many went back (or, in a dry run, would have).
    pub moved: u64,
    /// Those refused by the loop guard: redriven too often already.
    pub refused: Vec<(DeadLetterId, crate::MessageId, u32)>,
    /// Those that could not be moved, and why. They are still in the queue unless the effect says otherwise.
    pub failed: Vec<(DeadLetterId, crate::Error)>,
}
