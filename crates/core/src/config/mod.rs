//! Configuration: the same settings from a URL, a file and the environment.
//!
//! Precedence, later wins: defaults of the adapter, the query of the URL, the file, the environment, what the
//! program sets. The URL itself is the key `url`, with the same precedence.
//!
//! ```toml
//! url = "embedded:///var/lib/orders/events.db"
//! require = ["key_order", "dead_letter", "survives_process_kill"]
//! publish_timeout = "10s"
//!
//! [subscribe]          # what subscriptions start from
//! max_attempts = 5
//!
//! [embedded]           # settings of that broker only
//! durability = "synced"
//! ```

mod field;
mod section;
mod sources;
mod url;

pub use field::{Field, FieldKind, Problem};
pub(crate) use section::Setting;
pub use section::{Secret, Section};
pub(crate) use sources::{Checked, Known};
pub use sources::{Config, Format};
pub use url::EndpointUrl;

use crate::config::field::Field as F;

/// The settings that every endpoint has.
pub(crate) const COMMON: &[Field] = &[
    F::text("url", "The endpoint: scheme://[user[:password]@]host[:port][,host…]/path[?setting=value…].").required(),
    F::text(
        "credentials_file",
        "A file (JSON, TOML, YAML) with user and password, token, seed or access key, read anew for every connection.",
    ),
    F::list("require", "Capabilities without which the connection is refused, such as key_order or nack_delay:native."),
    F::duration("connect_timeout", "How long connecting may take.", "10s"),
    F::duration("publish_timeout", "How long a publish may take; its outcome is unknown then.", "30s"),
    F::choice(
        "publish_order",
        "What a failed message does to later ones of its key in the same batch.",
        &["key", "none"],
        "key",
    ),
];

/// What subscriptions start from (section `subscribe`).
pub(crate) const SUBSCRIBE: &[Field] = &[
    F::integer("max_in_flight", "Deliveries that may be unsettled with one member.", 1, 10_000_000, "1000"),
    F::duration("lease", "How long a delivery is leased.", "30s"),
    F::integer(
        "max_attempts",
        "Failed attempts before a message becomes a dead letter; 0 for never.",
        0,
        u32::MAX as i64,
        "5",
    ),
    F::integer(
        "crash_limit",
        "Hand-overs without outcome before a message becomes a dead letter; 0 for never.",
        0,
        u32::MAX as i64,
        "20",
    ),
    F::choice("order", "The order that deliveries keep.", &["none", "key", "total"], "none"),
    F::choice(
        "on_failure",
        "What happens to later messages of a failed key.",
        &["go_past", "block", "park"],
        "go_past",
    ),
    F::choice(
        "topology",
        "Whether missing destinations and groups are created.",
        &["declare", "verify", "leave"],
        "declare",
    ),
];
