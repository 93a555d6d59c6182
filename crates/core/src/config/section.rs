//! Settings after they were read and checked.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::EndpointUrl;
use crate::credentials::Login;

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the client library only.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[derive(Debug, Clone)]
pub(crate) enum Setting {
    Bool(bool),
    Duration(Duration),
    Integer(i64),
    List(Vec<String>),
    Secret(Secret),
    Text(String),
}

/// The checked settings of an adapter: its URL and the values of its [fields](super::Field), defaults filled in.
///
/// The accessors panic when the adapter asks for a field it did not describe, or as another type: a mistake in
/// the adapter that its first test meets, never one of the user's.
#[derive(Debug, Clone)]
pub struct Section {
    pub(crate) url: EndpointUrl,
    pub(crate) connect_timeout: Duration,
    pub(crate) values: BTreeMap<&'static str, Option<Setting>>,
    pub(crate) login: Option<Login>,
}

macro_rules! accessor {
    ($(#[$doc:meta])* $name:ident, $variant:ident, $ty:ty, |$value:ident| $read:expr) => {
        $(#[$doc])*
        ///
        /// # Panics
        /// When the field is not described as one of this type.
        #[must_use]
        pub fn $name(&self, field: &str) -> $ty {
            match self.values.get(field) {
                Some(Some(Setting::$variant($value))) => $read,
                other => panic!("field {field} is not described as {}: {other:?}", stringify!($variant)),
            }
        }
    };
}

impl Section {
    /// The parsed URL.
    #[must_use]
    pub fn url(&self) -> &EndpointUrl {
        &self.url
    }

    /// How long connecting may take.
    #[must_use]
    pub fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }

    /// The credentials of a provider, or user and password of the URL. Whoever reads user and password of the URL himself has a
    /// second source for them, and asks no provider.
    #[must_use]
    pub fn login(&self) -> Option<&Login> {
        self.login.as_ref()
    }

    /// Whether the credentials come from a provider: they then stand nowhere else.
    #[must_use]
    pub fn has_provider(&self) -> bool {
        self.login.as_ref().is_some_and(Login::may_change)
    }

    accessor!(/** A switch. */ bool, Bool, bool, |value| *value);
    accessor!(/** A duration that is set or has a default. */ duration, Duration, Duration, |value| *value);
    accessor!(/** A whole number that is set or has a default. */ integer, Integer, i64, |value| *value);
    accessor!(/** A text that is required or has a default. */ text, Text, &str, |value| value);

    /// A list; empty when it is not set.
    #[must_use]
    pub fn list(&self, field: &str) -> &[String] {
        match self.values.get(field) {
            Some(Some(Setting::List(list))) => list,
            _ => &[],
        }
    }

    /// A text, where it is set.
    #[must_use]
    pub fn optional_text(&self, field: &str) -> Option<&str> {
        match self.values.get(field) {
            Some(Some(Setting::Text(text))) => Some(text),
            _ => None,
        }
    }

    /// A duration, where it is set.
    #[must_use]
    pub fn optional_duration(&self, field: &str) -> Option<Duration> {
        match self.values.get(field) {
            Some(Some(Setting::Duration(duration))) => Some(*duration),
            _ => None,
        }
    }

    /// A whole number, where it is set.
    #[must_use]
    pub fn optional_integer(&self, field: &str) -> Option<i64> {
        match self.values.get(field) {
            Some(Some(Setting::Integer(number))) => Some(*number),
            _ => None,
        }
    }

    /// A secret, where it is set.
    #[must_use]
    pub fn secret(&self, field: &str) -> Option<&Secret> {
        match self.values.get(field) {
            Some(Some(Setting::Secret(secret))) => Some(secret),
            _ => None,
        }
    }
}
