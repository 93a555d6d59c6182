//! Reserves the items of each order.

use anybroker::events::{Mode, TypedEvent};
use anybroker::worker::{Classify, Context, ErrorClass, Handler, HandlerError, Outcome, async_trait};

use crate::STOCK;
use crate::order::{Order, Reservation, STOCK_RESERVED};

/// A product that the warehouse does not have. A person has to look at it.
pub const UNKNOWN_SKU: ErrorClass = ErrorClass::from_static("UNKNOWN_SKU");

/// What the warehouse has.
const CATALOGUE: &[&str] = &[
    "BOOK-0042",
    "BOOK-1984",
    "CUP-BLUE",
    "CUP-RED",
    "DESK-OAK-160",
    "HEADSET-2",
    "KEYBOARD-DE",
    "KEYBOARD-FR",
    "LAMP-DESK",
    "MOUSE-S",
    "NOTEBOOK-A5",
    "PEN-5",
];

/// The worker of the group `inventory`. It sees every order too: groups do not take messages from one another.
#[derive(Debug, Default)]
pub struct Inventory;

#[async_trait]
impl Handler for Inventory {
    async fn handle(&self, ctx: &Context) -> Outcome {
        let created = TypedEvent::<Order>::from_message(ctx.message()).class(ErrorClass::SCHEMA_MISMATCH)?;
        let order = created.data;
        if let Some(item) = order.items.iter().find(|item| !CATALOGUE.contains(&item.sku.as_str())) {
            return Err(HandlerError::new(UNKNOWN_SKU, format!("the warehouse has no {}", item.sku)));
        }
        let reservation = Reservation { units: order.units(), country: order.country };
        let reserved = TypedEvent::new("/inventory", STOCK_RESERVED, reservation)
            .with_id(format!("{}-reserved", order.order_id))
            .with_subject(order.order_id)
            .with_time(order.placed_at)
            .caused_by(ctx.message());
        ctx.send(reserved.to_message(STOCK, Mode::Binary)?).await?;
        Ok(())
    }
}
