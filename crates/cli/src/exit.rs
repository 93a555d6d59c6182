//! How a command ends: exit codes, and failures as text or JSON.

use std::fmt;
use std::process::ExitCode;

use anybroker::{Error, ErrorKind};
use serde_json::{Value, json};

use crate::json;
use crate::output::remark;

/// The documented exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Everything that was asked for happened.
    Done = 0,
    /// Something failed, or happened only in part.
    Failed = 1,
    /// Wrong usage or configuration; nothing was attempted.
    Usage = 2,
    /// The broker cannot be reached or did not answer in time.
    Unavailable = 3,
    /// The endpoint's record refuses the verb or option.
    Refused = 4,
    /// Ctrl-C or SIGTERM.
    Interrupted = 130,
}

impl Exit {
    /// The code for an error of that kind.
    pub(crate) fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::ConfigInvalid => Self::Usage,
            ErrorKind::RateLimited | ErrorKind::Timeout | ErrorKind::Unavailable => Self::Unavailable,
            ErrorKind::Unsupported => Self::Refused,
            _ => Self::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        (exit as u8).into()
    }
}

/// The exit code of many outcomes: the code of a failure's class only where nothing succeeded and all failed alike.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    succeeded: bool,
    failed: Option<Exit>,
}

impl Tally {
    pub(crate) fn success(&mut self) {
        self.succeeded = true;
    }

    pub(crate) fn failure(&mut self, kind: ErrorKind) {
        let exit = Exit::of(kind);
        self.failed = Some(match self.failed {
            Some(other) if other != exit => Exit::Failed,
            _ => exit,
        });
    }

    pub(crate) fn exit(&self) -> Exit {
        match self.failed {
            None => Exit::Done,
            Some(_) if self.succeeded => Exit::Failed,
            Some(exit) => exit,
        }
    }
}

/// What ends a command before it could do what it was asked for.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line contradicts itself or the input.
    Usage(String),
    /// The settings cannot be read or are wrong, whatever the kind.
    Config(Error),
    /// The library's answer.
    Broker(Error),
    /// A file or stream of this machine.
    Io(&'static str, std::io::Error),
}

impl Failure {
    fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) | Self::Config(_) => Exit::Usage,
            Self::Broker(error) => Exit::of(error.kind()),
            Self::Io(..) => Exit::Failed,
        }
    }

    /// Tells standard error what went wrong, and with what the process ends.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        self.tell(json);
        self.exit().into()
    }

    /// Tells standard error what went wrong.
    pub(crate) fn tell(&self, json: bool) {
        remark(json, &format!("error: {self}"), &json!({"error": self.to_json()}));
    }

    fn to_json(&self) -> Value {
        match self {
            Self::Config(error) | Self::Broker(error) => json::error(error),
            Self::Usage(message) => {
                json!({"kind": "usage", "retry": "never", "effect": "not_done", "message": message})
            }
            Self::Io(operation, error) => {
                json!({
                    "kind": "io", "retry": "never", "effect": "unknown",
                    "message": error.to_string(), "operation": operation,
                })
            }
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(message) => f.write_str(message),
            Self::Config(error) | Self::Broker(error) => error.fmt(f),
            Self::Io(operation, error) => write!(f, "{operation}: {error}"),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Broker(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_outcomes_have_the_code_of_a_class_only_where_all_failed_alike() {
        let exit = |kinds: &[ErrorKind], succeeded: bool| {
            let mut tally = Tally::default();
            kinds.iter().for_each(|kind| tally.failure(*kind));
            if succeeded {
                tally.success();
            }
            tally.exit()
        };
        assert_eq!(exit(&[], true), Exit::Done);
        assert_eq!(exit(&[ErrorKind::Timeout, ErrorKind::Unavailable], false), Exit::Unavailable);
        assert_eq!(exit(&[ErrorKind::Timeout], true), Exit::Failed);
        assert_eq!(exit(&[ErrorKind::Timeout, ErrorKind::TooLarge], false), Exit::Failed);
        assert_eq!(exit(&[ErrorKind::Unsupported], false), Exit::Refused);
    }
}
