//! SQLite's errors as the broker's.

use std::path::Path;

use anybroker_core::{Effect, Error, ErrorKind, Retry};
use rusqlite::ErrorCode;

/// What stops a transaction.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The answer is known already.
    Broker(Error),
    /// SQLite said so.
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<rusqlite::types::FromSqlError> for Fault {
    fn from(error: rusqlite::types::FromSqlError) -> Self {
        damaged(format!("a value of another type than it was written with: {error}"))
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Broker(error)
    }
}

impl Fault {
    /// As the broker's error of `operation`. The transaction was taken back: nothing was done.
    pub(crate) fn into_error(self, operation: &'static str) -> Error {
        match self {
            Self::Broker(error) => error,
            Self::Sqlite(error) => translate(operation, error),
        }
    }
}

/// The result of work within a transaction.
pub(crate) type Step<T> = Result<T, Fault>;

/// SQLite's result code, where the error comes from SQLite.
pub(crate) fn failed(error: &rusqlite::Error) -> Option<ErrorCode> {
    error.sqlite_error_code()
}

/// A row or a state that this version cannot have written.
pub(crate) fn damaged(what: impl Into<String>) -> Fault {
    Fault::Broker(Error::new(ErrorKind::Unexpected, "read", what).with("cause", "corrupt").with_effect(Effect::NotDone))
}

/// The error of `operation`, of which nothing was done: its transaction was not begun, or taken back.
pub(crate) fn translate(operation: &'static str, error: rusqlite::Error) -> Error {
    let (kind, cause, text) = match failed(&error) {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed) => {
            (ErrorKind::Unavailable, "locked", "another process kept the file locked longer than busy_timeout")
        }
        Some(ErrorCode::DiskFull) => {
            (ErrorKind::Unavailable, "full", "the disk is full, or the file has reached max_file_size")
        }
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::AuthorizationForStatementDenied) => {
            (ErrorKind::PermissionDenied, "read_only", "the file or its directory cannot be written")
        }
        Some(ErrorCode::DatabaseCorrupt) => (ErrorKind::Unexpected, "corrupt", "the file is damaged"),
        Some(ErrorCode::NotADatabase) => (ErrorKind::Unexpected, "not_a_database", "the file is not a SQLite database"),
        Some(ErrorCode::CannotOpen) => (ErrorKind::Unavailable, "cannot_open", "the file cannot be opened"),
        Some(ErrorCode::SystemIoFailure | ErrorCode::OutOfMemory) => {
            (ErrorKind::Unavailable, "io", "the operating system failed to read or write the file")
        }
        Some(ErrorCode::TooBig) => (ErrorKind::TooLarge, "too_big", "larger than SQLite stores in one row"),
        _ => (ErrorKind::Unexpected, "sqlite", "SQLite answered in an unexpected way"),
    };
    let text = format!("{text}: {error}");
    Error::new(kind, operation, text).with("cause", cause).with_effect(Effect::NotDone).with_source(error)
}

/// The error of a commit. When the sync itself fails the commit is in the log and may be found there after a crash.
pub(crate) fn commit_failed(error: rusqlite::Error) -> Error {
    let unsynced = failed(&error) == Some(ErrorCode::SystemIoFailure);
    let error = translate("commit", error);
    if unsynced { error.with_effect(Effect::Unknown).with_retry(Retry::Never) } else { error }
}

/// Why a file could not be opened: SQLite says the same for every reason, so the path is asked.
pub(crate) fn cannot_open(path: &Path, error: rusqlite::Error) -> Error {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let refused = matches!(failed(&error), Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied));
    let error = if path.is_dir() {
        Error::new(ErrorKind::ConfigInvalid, "connect", "the path is a directory; expected a file").with_source(error)
    } else if refused {
        // Only the path is looked at: opening the file by hand and closing it again would drop SQLite's locks on it
        // (<https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_>).
        match std::fs::metadata(directory) {
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
                Error::new(ErrorKind::NotFound, "connect", "the directory does not exist; create it first")
                    .with_source(error)
            }
            Ok(found) if !found.is_dir() => {
                Error::new(ErrorKind::NotFound, "connect", "the parent of the path is not a directory")
                    .with_source(error)
            }
            _ => Error::new(ErrorKind::PermissionDenied, "connect", "the file may not be opened or created")
                .with_source(error),
        }
    } else {
        translate("connect", error)
    };
    error.with("path", path.display())
}
