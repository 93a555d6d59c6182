//! What a handler answers, and how its failures are classed.

use std::any::Any;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use anybroker_core::{ByteString, ErrorKind, Reason, Retry, Verdict};

/// What a handler answers: done (the message is acked), or a [`HandlerError`] (it is retried or dead-lettered).
pub type Outcome<T = ()> = Result<T, HandlerError>;

/// The class of a failure: an upper-case word that decides whether the message is retried, and that the dead letter
/// keeps as its `error_type`. The associated constants are the classes this crate knows; any other text is a class
/// of your own.
///
/// ```
/// use anybroker_worker::ErrorClass;
/// const CARD_DECLINED: ErrorClass = ErrorClass::from_static("CARD_DECLINED");
/// assert_eq!(CARD_DECLINED, ErrorClass::from("CARD_DECLINED"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ErrorClass(ByteString);

impl ErrorClass {
    /// No answer in time. Retried. Also the class of a handler that was cut off at its time limit.
    pub const TIMEOUT: Self = Self::from_static("TIMEOUT");
    /// A service that the handler needs is not there. Retried.
    pub const SERVICE_UNAVAILABLE: Self = Self::from_static("SERVICE_UNAVAILABLE");
    /// A service asked to slow down. Retried.
    pub const RATE_LIMITED: Self = Self::from_static("RATE_LIMITED");
    /// The database chose this transaction as the victim. Retried.
    pub const DATABASE_DEADLOCK: Self = Self::from_static("DATABASE_DEADLOCK");
    /// The message says something that cannot be. Not retried.
    pub const VALIDATION_ERROR: Self = Self::from_static("VALIDATION_ERROR");
    /// The message was processed before. Not retried.
    pub const DUPLICATE_MESSAGE: Self = Self::from_static("DUPLICATE_MESSAGE");
    /// The payload does not follow its schema. Not retried.
    pub const SCHEMA_MISMATCH: Self = Self::from_static("SCHEMA_MISMATCH");
    /// The handler panicked. Retried: a panic is a failed attempt like any other.
    pub const PANIC: Self = Self::from_static("PANIC");
    /// Nobody said what it is (an error that `?` brought). Retried: giving up on a message that a retry would have
    /// saved costs more than some attempts on one that it would not.
    pub const UNCLASSIFIED: Self = Self::from_static("UNCLASSIFIED");
    /// The class in reports and metrics of a dead letter whose handler named no class.
    pub(crate) const REJECTED: Self = Self::from_static("REJECTED");

    /// A class that is part of the program text; does not allocate.
    #[must_use]
    pub const fn from_static(class: &'static str) -> Self {
        Self(ByteString::from_static(class))
    }

    /// The word.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn text(&self) -> ByteString {
        self.0.clone()
    }
}

impl From<&str> for ErrorClass {
    fn from(class: &str) -> Self {
        Self(class.into())
    }
}

impl From<String> for ErrorClass {
    fn from(class: String) -> Self {
        Self(class.into())
    }
}

impl From<ByteString> for ErrorClass {
    fn from(class: ByteString) -> Self {
        Self(class)
    }
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Which classes are retried. Classes that are not listed are.
///
/// ```
/// use anybroker_worker::{ErrorClass, ErrorClasses};
/// let classes = ErrorClasses::default().not_retryable("CARD_DECLINED").retryable("VALIDATION_ERROR");
/// assert!(!classes.is_retryable(&ErrorClass::from("CARD_DECLINED")));
/// assert!(classes.is_retryable(&ErrorClass::VALIDATION_ERROR));
/// assert!(classes.is_retryable(&ErrorClass::from("NEVER_HEARD_OF")));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorClasses(BTreeMap<ErrorClass, bool>);

impl Default for ErrorClasses {
    fn default() -> Self {
        let retried = [
            ErrorClass::TIMEOUT,
            ErrorClass::SERVICE_UNAVAILABLE,
            ErrorClass::RATE_LIMITED,
            ErrorClass::DATABASE_DEADLOCK,
            ErrorClass::PANIC,
            ErrorClass::UNCLASSIFIED,
        ];
        let not = [ErrorClass::VALIDATION_ERROR, ErrorClass::DUPLICATE_MESSAGE, ErrorClass::SCHEMA_MISMATCH];
        Self(
            retried.into_iter().map(|class| (class, true)).chain(not.into_iter().map(|class| (class, false))).collect(),
        )
    }
}

impl ErrorClasses {
    /// Failures of this class are retried.
    #[must_use]
    pub fn retryable(mut self, class: impl Into<ErrorClass>) -> Self {
        self.0.insert(class.into(), true);
        self
    }

    /// Failures of this class go to the dead letters at once.
    #[must_use]
    pub fn not_retryable(mut self, class: impl Into<ErrorClass>) -> Self {
        self.0.insert(class.into(), false);
        self
    }

    /// Whether failures of this class are retried.
    #[must_use]
    pub fn is_retryable(&self, class: &ErrorClass) -> bool {
        self.0.get(class).copied().unwrap_or(true)
    }
}

/// Why a handler did not process the message: a class, a text for people, and what to do about it.
///
/// Every [`std::error::Error`] turns into one with `?`. Errors of this library get the class that fits their kind
/// (`TIMEOUT`, `SERVICE_UNAVAILABLE`, `RATE_LIMITED`, `VALIDATION_ERROR` for messages that no endpoint would take);
/// everything else is [`UNCLASSIFIED`](ErrorClass::UNCLASSIFIED), unless [`Classify`] gives it a class. It is no
/// `std::error::Error` itself: that is what makes the `?` possible.
///
/// ```
/// use std::time::Duration;
/// use anybroker_worker::{Classify, Context, ErrorClass, HandlerError, Outcome};
///
/// async fn pay(ctx: &Context) -> Outcome {
///     // A payload that cannot be read will not get better: dead letter.
///     let cents: u64 = std::str::from_utf8(ctx.message().bytes())
///         .class(ErrorClass::SCHEMA_MISMATCH)?
///         .parse()
///         .class(ErrorClass::SCHEMA_MISMATCH)?;
///     if cents == 0 {
///         return Err(HandlerError::dead_letter("nothing_to_pay", "an order of 0 cents"));
///     }
///     // The gateway said when to come back.
///     Err(HandlerError::new(ErrorClass::RATE_LIMITED, "429").with_retry_after(Duration::from_secs(30)))
/// }
/// ```
pub struct HandlerError(Box<Failure>);

struct Failure {
    class: Option<ErrorClass>,
    message: Cow<'static, str>,
    retry_after: Option<Duration>,
    reason: Option<Reason>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl HandlerError {
    /// A failure of that class; the class decides whether it is retried.
    pub fn new(class: impl Into<ErrorClass>, message: impl Into<Cow<'static, str>>) -> Self {
        let class = Some(class.into());
        Self(Box::new(Failure { class, message: message.into(), retry_after: None, reason: None, source: None }))
    }

    /// Straight to the dead letters with that reason, whatever the classes say; `message` becomes the detail that a
    /// person reads.
    pub fn dead_letter(reason: impl Into<Reason>, message: impl Into<Cow<'static, str>>) -> Self {
        let reason = Some(reason.into());
        Self(Box::new(Failure { class: None, message: message.into(), retry_after: None, reason, source: None }))
    }

    /// Names the class (and, of a dead letter, its `error_type`).
    #[must_use]
    pub fn with_class(mut self, class: impl Into<ErrorClass>) -> Self {
        self.0.class = Some(class.into());
        self
    }

    /// Asks for this delay instead of the policy's. It is kept as it is: no jitter, no cap but the endpoint's.
    #[must_use]
    pub fn with_retry_after(mut self, delay: Duration) -> Self {
        self.0.retry_after = Some(delay);
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The class; [`UNCLASSIFIED`](ErrorClass::UNCLASSIFIED) where none was named.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        self.0.class.clone().unwrap_or(ErrorClass::UNCLASSIFIED)
    }

    /// The text for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The delay that was asked for.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// The reason, where it goes straight to the dead letters.
    #[must_use]
    pub fn dead_letter_reason(&self) -> Option<&Reason> {
        self.0.reason.as_ref()
    }

    /// The cause.
    #[must_use]
    pub fn source(&self) -> Option<&(dyn std::error::Error + Send + Sync + 'static)> {
        self.0.source.as_deref()
    }

    /// The verdict of the dead letter that this failure ends in.
    pub(crate) fn into_verdict(self, reason: Reason) -> Verdict {
        let Failure { class, message, reason: own, .. } = *self.0;
        let mut verdict = Verdict::new(own.unwrap_or(reason));
        verdict.error_type = class.map(|class| class.0);
        if !message.is_empty() {
            verdict.detail = Some(match message {
                Cow::Borrowed(text) => ByteString::from_static(text),
                Cow::Owned(text) => text.into(),
            });
        }
        verdict
    }

    /// The class by which a dead letter is counted.
    pub(crate) fn counted_class(&self) -> ErrorClass {
        match (&self.0.class, &self.0.reason) {
            (Some(class), _) => class.clone(),
            (None, Some(_)) => ErrorClass::REJECTED,
            (None, None) => ErrorClass::UNCLASSIFIED,
        }
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.reason {
            Some(reason) => write!(f, "dead letter ({reason}): {}", self.0.message),
            None => write!(f, "{}: {}", self.class(), self.0.message),
        }
    }
}

impl fmt::Debug for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerError")
            .field("class", &self.0.class)
            .field("message", &self.0.message)
            .field("retry_after", &self.0.retry_after)
            .field("dead_letter_reason", &self.0.reason)
            .field("source", &self.0.source)
            .finish()
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for HandlerError {
    fn from(error: E) -> Self {
        let (class, retry_after) = class_of(&error);
        let failure = Self::new(class, error.to_string()).with_source(error);
        match retry_after {
            Some(delay) => failure.with_retry_after(delay),
            None => failure,
        }
    }
}

fn class_of(error: &(dyn Any + Send + Sync)) -> (ErrorClass, Option<Duration>) {
    if let Some(error) = error.downcast_ref::<anybroker_core::Error>() {
        let class = match error.kind() {
            ErrorKind::Timeout => ErrorClass::TIMEOUT,
            ErrorKind::Unavailable => ErrorClass::SERVICE_UNAVAILABLE,
            ErrorKind::RateLimited => ErrorClass::RATE_LIMITED,
            ErrorKind::InvalidMessage | ErrorKind::TooLarge => ErrorClass::VALIDATION_ERROR,
            _ => ErrorClass::UNCLASSIFIED,
        };
        let hint = if let Retry::Later(hint) = error.retry() { hint } else { None };
        return (class, hint);
    }
    let timed_out = error.is::<tokio::time::error::Elapsed>()
        || error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::TimedOut);
    (if timed_out { ErrorClass::TIMEOUT } else { ErrorClass::UNCLASSIFIED }, None)
}

/// Gives the errors of other libraries a class on their way out.
///
/// ```
/// use anybroker_worker::{Classify, ErrorClass, HandlerError};
/// fn amount(text: &str) -> Result<u64, HandlerError> {
///     Ok(text.parse::<u64>().class(ErrorClass::VALIDATION_ERROR)?)
/// }
/// assert_eq!(amount("12").unwrap(), 12);
/// assert_eq!(amount("twelve").unwrap_err().class(), ErrorClass::VALIDATION_ERROR);
/// ```
pub trait Classify<T> {
    /// The same result; an error gets that class.
    ///
    /// # Errors
    /// The error it was called on.
    fn class(self, class: impl Into<ErrorClass>) -> Result<T, HandlerError>;
}

impl<T, E: Into<HandlerError>> Classify<T> for Result<T, E> {
    fn class(self, class: impl Into<ErrorClass>) -> Result<T, HandlerError> {
        self.map_err(|error| error.into().with_class(class))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_classes_are_those_of_the_requirements_and_unknown_ones_are_retried() {
        let classes = ErrorClasses::default();
        for class in ["TIMEOUT", "SERVICE_UNAVAILABLE", "RATE_LIMITED", "DATABASE_DEADLOCK", "PANIC", "UNCLASSIFIED"] {
            assert!(classes.is_retryable(&class.into()), "{class}");
        }
        for class in ["VALIDATION_ERROR", "DUPLICATE_MESSAGE", "SCHEMA_MISMATCH"] {
            assert!(!classes.is_retryable(&class.into()), "{class}");
        }
        assert!(classes.is_retryable(&"SOMETHING_ELSE".into()));
    }

    #[test]
    fn errors_of_this_library_get_the_class_of_their_kind_and_keep_the_brokers_hint() {
        let hint = Duration::from_secs(7);
        let error = anybroker_core::Error::new(ErrorKind::RateLimited, "publish", "slow down")
            .with_retry(Retry::Later(Some(hint)));
        let failure = HandlerError::from(error);
        assert_eq!(failure.class(), ErrorClass::RATE_LIMITED);
        assert_eq!(failure.retry_after(), Some(hint));
        let error = anybroker_core::Error::new(ErrorKind::TooLarge, "publish", "too large");
        assert_eq!(HandlerError::from(error).class(), ErrorClass::VALIDATION_ERROR);
        assert_eq!(HandlerError::from(std::fmt::Error).class(), ErrorClass::UNCLASSIFIED);
    }

    #[test]
    fn an_outcome_is_no_larger_than_a_pointer() {
        assert_eq!(size_of::<Outcome>(), size_of::<usize>());
    }

    #[test]
    fn a_verdict_keeps_reason_class_and_text() {
        let verdict = HandlerError::new("X", "because").into_verdict(Reason::Rejected);
        assert_eq!(verdict, Verdict::new(Reason::Rejected).with_error_type("X").with_detail("because"));
        let verdict = HandlerError::dead_letter("odd", "because").into_verdict(Reason::Rejected);
        assert_eq!(verdict, Verdict::new(Reason::Other("odd".into())).with_detail("because"));
    }
}
