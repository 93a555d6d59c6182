//! An order service that runs on any broker: what `cargo run -p orders` does, as a library, so that its test can run it
//! on every broker too.
//!
//! | who | group | reads | does |
//! |---|---|---|---|
//! | [`feed`] | | `data/orders.jsonl` | publishes `com.example.order.created` to `orders`, keyed by order |
//! | [`payments`] | `payments` | `orders` | charges the card, publishes `com.example.payment.completed` |
//! | [`inventory`] | `inventory` | `orders` | reserves the items, publishes `com.example.stock.reserved` |
//! | [`totals`] | `totals` | all three | adds up, each event once, in a database of its own |
//!
//! [`service`] ties them together. None of it names a broker.

pub mod feed;
pub mod inventory;
pub mod order;
pub mod payments;
pub mod report;
pub mod service;
pub mod totals;

/// Where orders are published.
pub const ORDERS: &str = "orders";
/// Where payments are published.
pub const PAYMENTS: &str = "payments";
/// Where reservations are published.
pub const STOCK: &str = "stock";
