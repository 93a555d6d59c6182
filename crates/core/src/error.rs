//! One opaque error for every operation.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

/// The result of an operation of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, independent of the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// Something with this name exists already, with other settings.
    AlreadyExists,
    /// The handle, subscription or connection was closed by this process.
    Closed,
    /// One or more settings are missing, unknown or wrong; the message lists all of them.
    ConfigInvalid,
    /// The message cannot be represented on this endpoint (header rules, key length, tombstone).
    InvalidMessage,
    /// The destination, group, dead letter or file does not exist.
    NotFound,
    /// The credentials are valid and do not allow this.
    PermissionDenied,
    /// The broker asked to slow down, or a bounded buffer stayed full.
    RateLimited,
    /// The delivery's lease, assignment or connection is gone; somebody else may have the message.
    StaleDelivery,
    /// No answer within the deadline.
    Timeout,
    /// Larger than the endpoint carries.
    TooLarge,
    /// The credentials are missing or wrong.
    Unauthenticated,
    /// The broker cannot be reached, or cannot serve at the moment (disk full, leader moving).
    Unavailable,
    /// A broker's answer, or a state, that this library does not know how to read.
    Unexpected,
    /// The endpoint's capability record refuses this verb or option. Nothing was done.
    Unsupported,
}

impl ErrorKind {
    /// The name as it is printed and serialised (`snake_case`).
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AlreadyExists => "already_exists",
            Self::Closed => "closed",
            Self::ConfigInvalid => "config_invalid",
            Self::InvalidMessage => "invalid_message",
            Self::NotFound => "not_found",
            Self::PermissionDenied => "permission_denied",
            Self::RateLimited => "rate_limited",
            Self::StaleDelivery => "stale_delivery",
            Self::Timeout => "timeout",
            Self::TooLarge => "too_large",
            Self::Unauthenticated => "unauthenticated",
            Self::Unavailable => "unavailable",
            Self::Unexpected => "unexpected",
            Self::Unsupported => "unsupported",
        }
    }

    /// What a caller may assume when the adapter says nothing else.
    fn default_retry(self) -> Retry {
        match self {
            Self::RateLimited | Self::Timeout | Self::Unavailable => Retry::Later(None),
            _ => Retry::Never,
        }
    }

    fn default_effect(self) -> Effect {
        match self {
            Self::Timeout | Self::Unexpected => Effect::Unknown,
            _ => Effect::NotDone,
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether the same call may succeed when it is made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Retry {
    /// It was retried until its budget was used up.
    Exhausted,
    /// It may; not before the hint, where the broker gave one.
    Later(Option<Duration>),
    /// It will not.
    Never,
}

impl Retry {
    /// The name as it is printed and serialised.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exhausted => "exhausted",
            Self::Later(_) => "later",
            Self::Never => "never",
        }
    }
}

/// What the failed call did. For a publish: is the message stored?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// It took effect, although the call reports a failure.
    Done,
    /// It certainly did not take effect.
    NotDone,
    /// It may have taken effect (a timeout, a cut connection, a missing confirm).
    Unknown,
}

impl Effect {
    /// The name as it is printed and serialised.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::NotDone => "not_done",
            Self::Unknown => "unknown",
        }
    }
}

/// The error of every operation: [kind](ErrorKind), [retry](Retry), [effect](Effect), the operation,
/// context and source.
///
/// `Display` is one line for logs; `Debug` lists everything. Neither contains secrets: adapters put only
/// redacted URLs and names into the context.
///
/// ```
/// use anybroker_core::{Effect, Error, ErrorKind, Retry};
/// let error = Error::new(ErrorKind::Timeout, "publish", "no confirm within 5 s").with("destination", "orders");
/// assert_eq!(error.kind(), ErrorKind::Timeout);
/// assert_eq!(error.effect(), Effect::Unknown);
/// assert_eq!(error.retry(), Retry::Later(None));
/// assert_eq!(error.to_string(), "publish: timeout: no confirm within 5 s (destination=orders)");
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    retry: Retry,
    effect: Effect,
    operation: Cow<'static, str>,
    message: String,
    context: Vec<(&'static str, String)>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` in `operation` (a verb: `publish`, `connect`), with a message that names what was
    /// wrong and what was expected. Retry and effect start from what the kind implies.
    pub fn new(kind: ErrorKind, operation: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            retry: kind.default_retry(),
            effect: kind.default_effect(),
            operation: operation.into(),
            message: message.into(),
            context: Vec::new(),
            source: None,
        }))
    }

    /// A verb or option that the endpoint's record refuses.
    pub fn unsupported(operation: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, operation, message)
    }

    /// A handle that was closed.
    pub fn closed(operation: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Closed, operation, "it was closed")
    }

    /// Adds a context pair, such as `destination=orders`. Never a secret.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.0.context.push((name, value.to_string()));
        self
    }

    /// Says what the failed call did.
    #[must_use]
    pub fn with_effect(mut self, effect: Effect) -> Self {
        self.0.effect = effect;
        self
    }

    /// Says whether the call may be made again.
    #[must_use]
    pub fn with_retry(mut self, retry: Retry) -> Self {
        self.0.retry = retry;
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What went wrong. Tests and callers decide on this, never on the text.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub fn retry(&self) -> Retry {
        self.0.retry
    }

    /// What the failed call did.
    #[must_use]
    pub fn effect(&self) -> Effect {
        self.0.effect
    }

    /// The verb that failed.
    #[must_use]
    pub fn operation(&self) -> &str {
        &self.0.operation
    }

    /// What was wrong and what was expected, without operation, kind and context.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The context pairs in the order they were added.
    pub fn context(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.context.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// The same error once more, for the other entries of a batch that failed together. The source is kept as text.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self(Box::new(Inner {
            kind: self.0.kind,
            retry: self.0.retry,
            effect: self.0.effect,
            operation: self.0.operation.clone(),
            message: self.0.message.clone(),
            context: self.0.context.clone(),
            source: self.0.source.as_ref().map(|source| source.to_string().into()),
        }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.0.operation, self.0.kind, OneLine(&self.0.message))?;
        if let Some((first, rest)) = self.0.context.split_first() {
            write!(f, " ({}={}", first.0, OneLine(&first.1))?;
            for (name, value) in rest {
                write!(f, ", {name}={}", OneLine(value))?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

/// A text without control characters: ids and names come from senders, and must not forge lines of a log.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        while let Some(at) = rest.find(char::is_control) {
            let (plain, control) = rest.split_at(at);
            let mut characters = control.chars();
            f.write_str(plain)?;
            characters.next().map_or(Ok(()), |control| write!(f, "{}", control.escape_default()))?;
            rest = characters.as_str();
        }
        f.write_str(rest)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("operation", &self.0.operation)
            .field("message", &self.0.message)
            .field("retry", &self.0.retry)
            .field("effect", &self.0.effect)
            .field("context", &self.0.context)
            .field("source", &self.0.source)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}
