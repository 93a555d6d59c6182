//! What the server's and the client's failures mean in the terms of the contract.

use anybroker_core::{Effect, Error, ErrorKind, Result};
use lapin::ErrorKind as Lapin;

/// Reply codes (AMQP 0-9-1, "Constants", and RabbitMQ's use of them).
pub(crate) const NOT_FOUND: u16 = 404;
const CONNECTION_FORCED: u16 = 320;
const ACCESS_REFUSED: u16 = 403;
const RESOURCE_LOCKED: u16 = 405;
const PRECONDITION_FAILED: u16 = 406;
const RESOURCE_ERROR: u16 = 506;
const NOT_ALLOWED: u16 = 530;
const NOT_IMPLEMENTED: u16 = 540;
const INTERNAL_ERROR: u16 = 541;

/// The reply code of a protocol error.
pub(crate) fn code(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        Lapin::ProtocolError(error) => Some(error.get_id()),
        _ => None,
    }
}

/// A request that failed. What the server refuses it has not done; a connection that is gone leaves it open.
pub(crate) fn failed(operation: &'static str, error: &lapin::Error) -> Error {
    let (kind, effect) = match error.kind() {
        Lapin::ProtocolError(protocol) => {
            let text = protocol.get_message().to_string();
            let kind = match protocol.get_id() {
                // A stream that a server which has just started does not serve yet: seen on 4.0.5 after a kill.
                NOT_FOUND if text.contains("is down or inaccessible") => ErrorKind::Unavailable,
                NOT_FOUND => ErrorKind::NotFound,
                ACCESS_REFUSED => ErrorKind::PermissionDenied,
                RESOURCE_LOCKED => ErrorKind::AlreadyExists,
                PRECONDITION_FAILED if text.contains("inequivalent") => ErrorKind::AlreadyExists,
                PRECONDITION_FAILED if text.contains("larger than") => ErrorKind::TooLarge,
                PRECONDITION_FAILED => ErrorKind::Unexpected,
                NOT_ALLOWED if text.contains("not found") => ErrorKind::NotFound,
                NOT_ALLOWED => ErrorKind::PermissionDenied,
                NOT_IMPLEMENTED => ErrorKind::Unsupported,
                CONNECTION_FORCED | RESOURCE_ERROR | INTERNAL_ERROR => ErrorKind::Unavailable,
                _ => ErrorKind::Unexpected,
            };
            let effect = if kind == ErrorKind::Unavailable { Effect::Unknown } else { Effect::NotDone };
            return Error::new(kind, operation, text).with_effect(effect);
        }
        Lapin::ChannelsLimitReached => (ErrorKind::RateLimited, Effect::NotDone),
        Lapin::InvalidChannel(_) | Lapin::InvalidChannelState(..) | Lapin::InvalidConnectionState(_) => {
            (ErrorKind::Unavailable, Effect::Unknown)
        }
        Lapin::IOError(_) | Lapin::MissingHeartbeatError => (ErrorKind::Unavailable, Effect::Unknown),
        Lapin::RuntimeShutdownError(_) => (ErrorKind::Closed, Effect::Unknown),
        Lapin::AuthProviderError(_) => (ErrorKind::Unauthenticated, Effect::NotDone),
        _ => (ErrorKind::Unexpected, Effect::Unknown),
    };
    Error::new(kind, operation, error.to_string()).with_effect(effect)
}

/// A connection that could not be made.
pub(crate) fn unconnected(error: &lapin::Error) -> Error {
    if code(error) == Some(ACCESS_REFUSED) {
        let text = "the server refuses user and password";
        return Error::new(ErrorKind::Unauthenticated, "connect", text).with_effect(Effect::NotDone);
    }
    if let Lapin::IOError(io) = error.kind() {
        let text = io.to_string();
        if is_about_trust(&text) {
            let text = format!("the server's certificate is not accepted, or it does not accept ours: {text}");
            return Error::new(ErrorKind::Unauthenticated, "connect", text).with_effect(Effect::NotDone);
        }
        return Error::new(ErrorKind::Unavailable, "connect", text).with_effect(Effect::NotDone);
    }
    failed("connect", error).with_effect(Effect::NotDone)
}

/// Whether a connection failed because one side does not trust the other: rustls' own words, which the client passes on as
/// an input error, and the alerts of TLS by which a server refuses a certificate (RFC 8446, 6.2).
pub(crate) fn is_about_trust(text: &str) -> bool {
    ["certificate", "Certificate", "UnknownCA", "AccessDenied"].iter().any(|word| text.contains(word))
}

/// Nothing came within the time.
pub(crate) fn late(operation: &'static str) -> Error {
    Error::new(ErrorKind::Timeout, operation, "no answer from the server in time")
}

/// Why nothing took a message, by what a second look at its queue has found: there is none, or its server does not route to it yet.
pub(crate) fn untaken(found: Result<bool>, operation: &'static str, none: &str, not_yet: &str) -> Error {
    match found {
        Ok(false) => Error::new(ErrorKind::NotFound, operation, none),
        Ok(true) => {
            let text = format!("{not_yet}: its server is starting, or elects a leader");
            Error::new(ErrorKind::Unavailable, operation, text)
        }
        Err(error) => {
            let text = format!("{not_yet}, and why could not be asked: {}", error.message());
            Error::new(ErrorKind::Unavailable, operation, text).with_source(error)
        }
    }
    .with_effect(Effect::NotDone)
}
