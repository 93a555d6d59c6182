//! The brokers' bare clients, for the cases of the theme `native`: they write and read past the adapter.
//!
//! Nothing of the adapters is used here, so that no mistake of an adapter is made twice and cancels itself out. Each client stands
//! behind a feature; a build without one has no client library.

mod access;
#[cfg(feature = "kafka")]
mod kafka;
#[cfg(feature = "nats")]
mod nats;
#[cfg(feature = "pulsar")]
mod pulsar;
#[cfg(feature = "pulsar")]
mod pulsar_null;
#[cfg(feature = "rabbitmq")]
mod rabbitmq;
#[cfg(feature = "sqs")]
mod sqs;
#[cfg(feature = "sqs")]
mod sqs_answers;

use std::sync::Arc;

use anybroker_conformance::{HttpService, NativeChannel};

use access::Access;

type Opened = Result<Arc<dyn NativeChannel>, String>;

type Service = Result<Arc<dyn HttpService>, String>;

/// What is known of a URL's scheme.
struct Kind {
    scheme: &'static str,
    open: fn(&Access) -> Opened,
    http: fn(&Access) -> Service,
}

fn is_not_http(access: &Access) -> Service {
    Err(format!("`{}` is not spoken to over HTTP, so that no proxy can answer in its place", access.scheme()))
}

const KINDS: &[Kind] = &[
    #[cfg(feature = "kafka")]
    Kind { scheme: "kafka", open: |access| Ok(Arc::new(kafka::Native::new(access)?)), http: is_not_http },
    #[cfg(feature = "nats")]
    Kind { scheme: "nats", open: |access| Ok(Arc::new(nats::Native::new(access)?)), http: is_not_http },
    #[cfg(feature = "pulsar")]
    Kind { scheme: "pulsar", open: |access| Ok(Arc::new(pulsar::Native::new(access)?)), http: is_not_http },
    #[cfg(feature = "rabbitmq")]
    Kind { scheme: "amqp", open: |access| Ok(Arc::new(rabbitmq::Native::new(access)?)), http: is_not_http },
    #[cfg(feature = "sqs")]
    Kind {
        scheme: "sqs",
        open: |access| Ok(Arc::new(sqs::Native::new(access)?)),
        http: |access| Ok(Arc::new(sqs_answers::Service::new(access)?)),
    },
    Kind {
        scheme: "memory",
        open: |_| Err("messages lie in this process's memory: there is no other program that could reach them".into()),
        http: is_not_http,
    },
    Kind {
        scheme: "embedded",
        open: |_| {
            let why = "the tables of the file are this library's own, and change with its versions: other programs write none";
            Err(why.into())
        },
        http: is_not_http,
    },
];

/// The bare client of the endpoint with that URL. Connects when it is used.
///
/// `given` answers what a setting of the endpoint's section (`token`, `mode`, …) is where a file or a program gives it; `|_| None`
/// where all stand in the URL.
///
/// # Errors
/// Why there is none: the broker has no clients of others, this build lacks the client, or the settings ask for what the bare client
/// is not made for, such as certificates. That is what the report says of the cases that need it.
pub fn channel(url: &str, given: impl Fn(&str) -> Option<String>) -> Opened {
    let access = Access::of(url, &given)?;
    match KINDS.iter().find(|kind| kind.scheme == access.scheme()) {
        Some(kind) => (kind.open)(&access),
        None => Err(format!("no bare client of `{}` is built in", access.scheme())),
    }
}

/// The service that is spoken to over HTTP at that URL, so that a proxy can answer in its place. `given` as for [`channel`].
///
/// # Errors
/// Why nothing can answer in its place: it speaks another protocol, or encrypted. That is what the report says of the cases that need
/// it.
pub fn http(url: &str, given: impl Fn(&str) -> Option<String>) -> Service {
    let access = Access::of(url, &given)?;
    match KINDS.iter().find(|kind| kind.scheme == access.scheme()) {
        Some(kind) => (kind.http)(&access),
        None => Err(format!("it is not known how `{}` answers over HTTP", access.scheme())),
    }
}
