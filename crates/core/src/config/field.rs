//! Settings as data: one description serves reading, checking, documentation and the JSON Schema.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use super::section::{Secret, Setting};

/// One setting: its name, type, default and meaning.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Its key, `snake_case`.
    pub name: &'static str,
    /// Its type.
    pub kind: FieldKind,
    /// The value that holds when it is not set, in text form.
    pub default: Option<&'static str>,
    /// It must be set.
    pub required: bool,
    /// What it means, in one or two sentences.
    pub doc: &'static str,
}

/// The type of a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FieldKind {
    /// `true` or `false`.
    Bool,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A number with a unit: `250ms`, `30s`, `5m`, `2h`.
    Duration,
    /// A whole number between these, inclusive.
    Integer(i64, i64),
    /// A list of texts; in a URL or an environment variable separated by commas.
    List,
    /// A text that is never printed.
    Secret,
    /// A text.
    Text,
}

impl Field {
    const fn new(name: &'static str, kind: FieldKind, default: Option<&'static str>, doc: &'static str) -> Self {
        Self { name, kind, default, required: false, doc }
    }

    /// A switch with a default (`"true"` or `"false"`).
    #[must_use]
    pub const fn bool(name: &'static str, doc: &'static str, default: &'static str) -> Self {
        Self::new(name, FieldKind::Bool, Some(default), doc)
    }

    /// One of several words.
    #[must_use]
    pub const fn choice(
        name: &'static str,
        doc: &'static str,
        words: &'static [&'static str],
        default: &'static str,
    ) -> Self {
        Self::new(name, FieldKind::Choice(words), Some(default), doc)
    }

    /// A duration with a default such as `"30s"`.
    #[must_use]
    pub const fn duration(name: &'static str, doc: &'static str, default: &'static str) -> Self {
        Self::new(name, FieldKind::Duration, Some(default), doc)
    }

    /// A whole number between `min` and `max`.
    #[must_use]
    pub const fn integer(name: &'static str, doc: &'static str, min: i64, max: i64, default: &'static str) -> Self {
        Self::new(name, FieldKind::Integer(min, max), Some(default), doc)
    }

    /// A list of texts; empty when it is not set.
    #[must_use]
    pub const fn list(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, FieldKind::List, None, doc)
    }

    /// A text that is never printed.
    #[must_use]
    pub const fn secret(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, FieldKind::Secret, None, doc)
    }

    /// A text that may be absent.
    #[must_use]
    pub const fn text(name: &'static str, doc: &'static str) -> Self {
        Self::new(name, FieldKind::Text, None, doc)
    }

    /// The same field, which must be set.
    #[must_use]
    pub const fn required(mut self) -> Self {
        self.required = true;
        self
    }

    /// The same field without a default: it may be absent.
    #[must_use]
    pub const fn optional(mut self) -> Self {
        self.default = None;
        self
    }

    /// The same field with this default, in text form.
    #[must_use]
    pub const fn or(mut self, default: &'static str) -> Self {
        self.default = Some(default);
        self
    }

    /// Reads a value of any source. Texts are converted, since URLs and environment variables have no types.
    pub(crate) fn read(&self, value: &Value) -> Result<Setting, String> {
        let wrong = |found: &Value| format!("expected {}, found {}", self.expected(), self.shown(found));
        let text = match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        };
        Ok(match self.kind {
            FieldKind::Bool => Setting::Bool(match (value, text) {
                (Value::Bool(value), _) => *value,
                (_, Some("true")) => true,
                (_, Some("false")) => false,
                _ => return Err(wrong(value)),
            }),
            FieldKind::Choice(words) => match words.iter().find(|word| Some(**word) == text) {
                Some(word) => Setting::Text((*word).to_owned()),
                None => return Err(wrong(value)),
            },
            FieldKind::Duration => Setting::Duration(text.and_then(duration).ok_or_else(|| wrong(value))?),
            FieldKind::Integer(min, max) => {
                let number = value.as_i64().or_else(|| text.and_then(|text| text.replace('_', "").parse().ok()));
                Setting::Integer(number.filter(|number| (min..=max).contains(number)).ok_or_else(|| wrong(value))?)
            }
            FieldKind::List => Setting::List(match (value, text) {
                (_, Some(text)) => {
                    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(Into::into).collect()
                }
                (Value::Array(items), _) => items
                    .iter()
                    .map(|item| item.as_str().map(ToOwned::to_owned).ok_or_else(|| wrong(item)))
                    .collect::<Result<_, _>>()?,
                _ => return Err(wrong(value)),
            }),
            FieldKind::Secret => Setting::Secret(Secret::new(text.ok_or_else(|| wrong(value))?)),
            FieldKind::Text => {
                Setting::Text(text.filter(|text| !text.is_empty()).ok_or_else(|| wrong(value))?.to_owned())
            }
        })
    }

    /// What is expected, for messages.
    #[must_use]
    pub fn expected(&self) -> String {
        match self.kind {
            FieldKind::Bool => "true or false".into(),
            FieldKind::Choice(words) => format!("one of {}", words.join(", ")),
            FieldKind::Duration => "a duration with a unit such as \"250ms\", \"30s\" or \"5m\"".into(),
            FieldKind::Integer(min, max) => format!("a whole number from {min} to {max}"),
            FieldKind::List => "a list of texts".into(),
            FieldKind::Secret => "a text".into(),
            FieldKind::Text => "a text that is not empty".into(),
        }
    }

    /// What was found, unless it is or may hold a secret.
    fn shown(&self, value: &Value) -> String {
        match value {
            Value::Array(_) => "a list".into(),
            Value::Object(_) => "a table".into(),
            _ if self.kind == FieldKind::Secret => "something else".into(),
            value => value.to_string(),
        }
    }

    /// The field as JSON Schema.
    pub(crate) fn schema(&self) -> Value {
        let mut schema = match self.kind {
            FieldKind::Bool => json!({"type": "boolean"}),
            FieldKind::Choice(words) => json!({"enum": words}),
            FieldKind::Duration => json!({"type": "string", "pattern": "^[0-9][0-9a-z ]*$"}),
            FieldKind::Integer(min, max) => json!({"type": "integer", "minimum": min, "maximum": max}),
            FieldKind::List => json!({"type": "array", "items": {"type": "string"}}),
            FieldKind::Secret => json!({"type": "string", "writeOnly": true}),
            FieldKind::Text => json!({"type": "string", "minLength": 1}),
        };
        schema["description"] = json!(self.doc);
        if let Some(default) = self.default {
            schema["default"] = match self.kind {
                FieldKind::Bool => json!(default == "true"),
                FieldKind::Integer(..) => default.parse::<i64>().map_or(Value::Null, Value::from),
                _ => json!(default),
            };
        }
        schema
    }
}

fn duration(text: &str) -> Option<Duration> {
    // A bare number has no unit: is it seconds or milliseconds? It is refused rather than guessed.
    if text.bytes().all(|byte| byte.is_ascii_digit()) && text != "0" {
        return None;
    }
    humantime::parse_duration(text).ok()
}

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key, with its section: `embedded.durability`.
    pub key: String,
    /// Where it came from: `url`, `file orders.toml`, `environment`, `program`.
    pub origin: String,
    /// What was wrong and what was expected.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.key, self.origin, self.message)
    }
}
