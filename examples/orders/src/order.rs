//! The events of the service: their names and the shapes of their data.

use anybroker::Timestamp;
use serde::{Deserialize, Serialize};

/// An order was placed; the data are an [`Order`].
pub const ORDER_CREATED: &str = "com.example.order.created";
/// An order was paid; the data are a [`Payment`].
pub const PAYMENT_COMPLETED: &str = "com.example.payment.completed";
/// The items of an order were put aside; the data are a [`Reservation`].
pub const STOCK_RESERVED: &str = "com.example.stock.reserved";

/// What a customer ordered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// Its identity: the aggregate of all events here, and the key of their messages.
    pub order_id: String,
    /// Who ordered.
    pub customer_id: String,
    /// When.
    #[serde(with = "rfc3339")]
    pub placed_at: Timestamp,
    /// The country it goes to, as two letters.
    pub country: String,
    /// The city it goes to.
    pub city: String,
    /// What was ordered.
    pub items: Vec<Item>,
    /// How it is to be paid.
    pub card: Card,
}

/// A line of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// The product.
    pub sku: String,
    /// How many.
    pub quantity: u32,
    /// Price of one.
    pub unit_price_cents: u64,
}

/// A card, as a token of the payment gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// The gateway's name for the card.
    pub token: String,
    /// What may be shown of its number.
    pub last4: String,
    /// The last month in which it is valid: `2028-04`.
    pub expires: String,
}

/// Data of [`PAYMENT_COMPLETED`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Payment {
    /// The country of the order.
    pub country: String,
    /// What was paid.
    pub amount_cents: u64,
}

/// Data of [`STOCK_RESERVED`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reservation {
    /// The country of the order.
    pub country: String,
    /// How many pieces.
    pub units: u64,
}

impl Order {
    /// What it costs.
    #[must_use]
    pub fn total_cents(&self) -> u64 {
        self.items.iter().map(|item| u64::from(item.quantity) * item.unit_price_cents).sum()
    }

    /// How many pieces it has.
    #[must_use]
    pub fn units(&self) -> u64 {
        self.items.iter().map(|item| u64::from(item.quantity)).sum()
    }
}

impl Card {
    /// Whether it is valid at that moment.
    #[must_use]
    pub fn is_valid_at(&self, moment: Timestamp) -> bool {
        // Both begin with year and month, so that their texts compare as their times do.
        moment.to_string().get(..7).is_some_and(|month| self.expires.as_str() >= month)
    }
}

mod rfc3339 {
    use anybroker::Timestamp;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(moment: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(moment)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(|_| D::Error::custom("expected a time in RFC 3339"))
    }
}

#[cfg(test)]
mod tests {
    use anybroker::events::check_event_type;

    use super::*;

    #[test]
    fn event_names_tell_what_has_happened() {
        for name in [ORDER_CREATED, PAYMENT_COMPLETED, STOCK_RESERVED] {
            assert_eq!(check_event_type(name), Ok(()), "{name}");
        }
    }

    #[test]
    fn a_card_is_valid_until_the_end_of_its_month() {
        let card = |expires: &str| Card { token: "t".into(), last4: "1".into(), expires: expires.into() };
        let moment: Timestamp = "2026-03-31T23:59:59Z".parse().expect("a time");
        assert!(card("2026-03").is_valid_at(moment));
        assert!(card("2030-01").is_valid_at(moment));
        assert!(!card("2026-02").is_valid_at(moment));
        assert!(!card("2025-12").is_valid_at(moment));
    }
}
