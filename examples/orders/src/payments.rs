//! Charges the card of each order.

use std::collections::HashMap;
use std::fmt;
use std::sync::Mutex;
use std::time::Duration;

use anybroker::events::{Mode, TypedEvent};
use anybroker::worker::{Classify, Context, ErrorClass, Handler, HandlerError, Outcome, async_trait};

use crate::PAYMENTS;
use crate::order::{Card, Order, PAYMENT_COMPLETED, Payment};

/// The card was refused. Trying again does not help.
pub const CARD_DECLINED: ErrorClass = ErrorClass::from_static("CARD_DECLINED");

/// The worker of the group `payments`.
#[derive(Debug)]
pub struct Payments {
    gateway: Gateway,
}

impl Payments {
    /// Payments through that gateway.
    #[must_use]
    pub fn new(gateway: Gateway) -> Self {
        Self { gateway }
    }
}

#[async_trait]
impl Handler for Payments {
    async fn handle(&self, ctx: &Context) -> Outcome {
        let created = TypedEvent::<Order>::from_message(ctx.message()).class(ErrorClass::SCHEMA_MISMATCH)?;
        let order = created.data;
        if !order.card.is_valid_at(order.placed_at) {
            let detail = format!("the card ending in {} expired in {}", order.card.last4, order.card.expires);
            return Err(HandlerError::new(ErrorClass::VALIDATION_ERROR, detail));
        }
        let amount_cents = order.total_cents();
        self.gateway.charge(&order.order_id, &order.card, amount_cents).await.map_err(Refusal::into_failure)?;
        // The id follows from the order: should this handler run twice, the second event is known by its id.
        let paid = TypedEvent::new("/payments", PAYMENT_COMPLETED, Payment { country: order.country, amount_cents })
            .with_id(format!("{}-paid", order.order_id))
            .with_subject(order.order_id)
            .with_time(order.placed_at)
            .caused_by(ctx.message());
        ctx.send(paid.to_message(PAYMENTS, Mode::Binary)?).await?;
        Ok(())
    }
}

/// Stands in for the payment provider, which is what such providers are: mostly there. It fails in the same way at
/// every run, so that the example can be compared with itself.
#[derive(Debug, Default)]
pub struct Gateway {
    /// Calls by order, successful ones included.
    orders: Mutex<HashMap<String, Progress>>,
    bank_is_back: bool,
}

#[derive(Debug, Default)]
struct Progress {
    calls: u32,
    charged: bool,
}

/// Why a card was not charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The bank says no.
    Declined,
    /// No answer in time.
    Timeout,
    /// The bank cannot be reached.
    Unavailable,
}

impl Gateway {
    /// One that reaches all banks: the outage is over.
    #[must_use]
    pub fn with_all_banks() -> Self {
        Self { bank_is_back: true, ..Self::default() }
    }

    /// Charges a card, once for each order however often it is called.
    ///
    /// # Errors
    /// The refusal.
    pub async fn charge(&self, order: &str, card: &Card, _amount_cents: u64) -> Result<(), Refusal> {
        // The way to the provider and back.
        tokio::time::sleep(Duration::from_millis(2)).await;
        let mut orders = self.orders.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let progress = orders.entry(order.to_owned()).or_default();
        if progress.charged {
            return Ok(());
        }
        progress.calls += 1;
        match card.token.as_str() {
            "tok_declined" => return Err(Refusal::Declined),
            "tok_bank_down" if !self.bank_is_back => return Err(Refusal::Unavailable),
            _ => {}
        }
        // Of a hundred orders six need a second call, and two a third.
        match (checksum(order) % 100, progress.calls) {
            (0..6, 1) | (6..8, 1) => Err(Refusal::Timeout),
            (6..8, 2) => Err(Refusal::Unavailable),
            _ => {
                progress.charged = true;
                Ok(())
            }
        }
    }
}

/// FNV-1a: the same on every machine and in every release, unlike the standard library's hash.
fn checksum(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Refusal {
    fn into_failure(self) -> HandlerError {
        let class = match self {
            Self::Declined => CARD_DECLINED,
            Self::Timeout => ErrorClass::TIMEOUT,
            Self::Unavailable => ErrorClass::SERVICE_UNAVAILABLE,
        };
        HandlerError::new(class, self.to_string())
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Declined => "the bank declined the card",
            Self::Timeout => "the payment gateway did not answer in time",
            Self::Unavailable => "the customer's bank cannot be reached",
        })
    }
}
