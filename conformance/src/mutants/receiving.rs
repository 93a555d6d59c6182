//! Mutants that subscribe and deliver wrongly.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, DeliveryFacts, Headers, Lane, Message, OnFailure, Order, Received, Result, Settlement,
    Settling, Start, SubscribeSpec, Subscription, Token,
};
use async_trait::async_trait;

use super::Mutant;
use super::tampered::{Entries, Fault, Inner, Tap};

pub(super) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "double-deliver",
        fault: "every tenth delivery comes twice",
        killed_by: "delivery/what-is-published-arrives-once-and-unchanged",
        make: || Arc::new(DoubleDeliver(AtomicU64::new(0))),
    },
    Mutant {
        name: "phantom",
        fault: "now and then a message comes that nobody published",
        killed_by: "delivery/what-is-published-arrives-once-and-unchanged",
        make: || Arc::new(Phantom(AtomicU64::new(0))),
    },
    Mutant {
        name: "header-loss",
        fault: "of headers with one name only the last is delivered",
        killed_by: "shapes/headers-are-ordered-repeatable-and-hold-any-bytes",
        make: || Arc::new(Changes(|message| message.clone().with_headers(last_of_each(message.headers())))),
    },
    Mutant {
        name: "lossy-text",
        fault: "payloads go through text",
        killed_by: "shapes/payloads-of-any-bytes-come-through",
        make: || Arc::new(Changes(through_text)),
    },
    Mutant {
        name: "new-id-on-delivery",
        fault: "each delivery has an id of its own",
        killed_by: "idempotency/the-id-is-stable-across-nack-drop-and-close",
        make: || Arc::new(Changes(|message| message.clone().with_id(anybroker_core::MessageId::new()))),
    },
    Mutant {
        name: "attempts-not-counted",
        fault: "every delivery is told to be the first attempt",
        killed_by: "redelivery/a-nacked-message-comes-back-with-the-next-attempt",
        make: || Arc::new(AttemptsNotCounted),
    },
    Mutant {
        name: "ack-on-receive",
        fault: "what is delivered is acked at once",
        killed_by: "lifecycle/a-consumer-that-vanishes-loses-nothing",
        make: || Arc::new(AckOnReceive),
    },
    Mutant {
        name: "receive-not-cancel-safe",
        fault: "a receive that is dropped loses what it had taken",
        killed_by: "flow/a-thousand-cancelled-receives-lose-nothing-and-burn-no-attempt",
        make: || Arc::new(NotCancelSafe),
    },
    Mutant {
        name: "hoards",
        fault: "it prefetches whatever there is, beyond max_in_flight",
        killed_by: "flow/a-full-member-leaves-the-rest-to-others",
        make: || Arc::new(Hoards),
    },
    Mutant {
        name: "goes-on-when-closed",
        fault: "a subscription that is closed goes on receiving, for nobody",
        killed_by: "lifecycle/a-closed-consumer-takes-nothing-any-more",
        make: || Arc::new(GoesOnWhenClosed),
    },
    Mutant {
        name: "hands-out-when-closed",
        fault: "what had come before a close is handed out after it",
        killed_by: "lifecycle/what-had-come-before-a-close-is-not-handed-out-after-it",
        make: || Arc::new(HandsOutWhenClosed),
    },
    Mutant {
        name: "overstays",
        fault: "a receive that brings nothing ends five seconds after its wait",
        killed_by: "flow/a-receive-of-nothing-ends-with-its-wait",
        make: || Arc::new(Overstays),
    },
    Mutant {
        name: "pause-no-op",
        fault: "pausing answers Ok and does nothing",
        killed_by: "flow/a-paused-subscription-delivers-nothing-and-a-resumed-one-everything",
        make: || Arc::new(PauseNoOp),
    },
    Mutant {
        name: "reorder-on-nack",
        fault: "later messages of a key pass a failed one although it blocks",
        killed_by: "ordering/under-block-later-messages-of-a-key-wait-for-the-failed-one",
        make: || Arc::new(Subscribes(|spec| spec.with_on_failure(OnFailure::GoPast))),
    },
    Mutant {
        name: "key-ignored",
        fault: "order per key is taken for no order",
        killed_by: "ordering/a-key-is-with-one-member-at-a-time",
        make: || {
            Arc::new(Subscribes(|spec| match spec.order {
                Order::Key => spec.with_order(Order::None).with_on_failure(OnFailure::GoPast),
                _ => spec,
            }))
        },
    },
    Mutant {
        name: "reverse-order",
        fault: "what is received together comes backwards",
        killed_by: "ordering/messages-of-a-key-come-in-the-order-they-were-published",
        make: || Arc::new(Reversed),
    },
    Mutant {
        name: "latest-is-earliest",
        fault: "a group that starts latest sees what is there already",
        killed_by: "groups/latest-is-fixed-when-subscribe-returns",
        make: || Arc::new(Subscribes(|spec| spec.with_start(Start::Earliest))),
    },
    Mutant {
        name: "one-group-for-all",
        fault: "all groups are one",
        killed_by: "groups/each-group-sees-every-message",
        make: || {
            Arc::new(Subscribes(|mut spec| {
                spec.group = "one-for-all".into();
                spec
            }))
        },
    },
    Mutant {
        name: "subscribe-returns-early",
        fault: "a subscription is effective from its first receive on only",
        killed_by: "groups/latest-is-fixed-when-subscribe-returns",
        make: || Arc::new(SubscribeReturnsEarly),
    },
    Mutant {
        name: "verify-creates",
        fault: "TopologyMode::Verify creates what is missing",
        killed_by: "topology/subscribing-under-verify-creates-nothing",
        make: || Arc::new(Subscribes(|spec| spec.with_topology(anybroker_core::TopologyMode::Declare))),
    },
    Mutant {
        name: "lease-for-ever",
        fault: "a lease never ends",
        killed_by: "lease/a-delivery-comes-back-when-its-lease-has-ended-and-not-before",
        make: || Arc::new(Subscribes(|spec| spec.with_lease(Duration::from_secs(3_600)))),
    },
    Mutant {
        name: "lease-too-short",
        fault: "a lease ends at half its time",
        killed_by: "lease/a-delivery-comes-back-when-its-lease-has-ended-and-not-before",
        make: || {
            Arc::new(Subscribes(|spec| {
                let half = spec.lease / 2;
                spec.with_lease(half)
            }))
        },
    },
];

/// Asks the broker for another subscription than it was asked for.
struct Subscribes(fn(SubscribeSpec) -> SubscribeSpec);

impl Fault for Subscribes {
    fn spec(&self, spec: SubscribeSpec) -> SubscribeSpec {
        (self.0)(spec)
    }
}

/// Delivers another message than was published.
struct Changes(fn(&Message) -> Message);

#[async_trait]
impl Fault for Changes {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        let Received { deliveries, events } = tap.inner.receive(max, wait).await?;
        let change = |delivery: Delivery| {
            let message = (self.0)(delivery.message());
            delivery.with_message(message)
        };
        Ok(Received { deliveries: deliveries.into_iter().map(change).collect(), events })
    }
}

fn last_of_each(headers: &Headers) -> Headers {
    let mut seen = BTreeSet::new();
    let mut kept: Vec<(&str, &[u8])> = headers.iter().collect();
    kept.reverse();
    kept.retain(|(name, _)| seen.insert(name.to_owned()));
    kept.reverse();
    kept.into_iter().collect()
}

fn through_text(message: &Message) -> Message {
    let text = String::from_utf8_lossy(message.bytes()).into_owned();
    let mut changed = Message::new(message.destination(), text)
        .with_id(message.id().clone())
        .with_headers(message.headers().clone())
        .with_timestamp(message.timestamp());
    if let Some(key) = message.key_bytes() {
        changed = changed.with_key(key.clone());
    }
    if let Some(content_type) = message.content_type() {
        changed = changed.with_content_type(content_type);
    }
    changed
}

/// What was kept first, then what the broker has.
async fn kept_first(tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
    if tap.kept.is_empty() {
        return tap.inner.receive(max, wait).await;
    }
    let rest = tap.kept.split_off(tap.kept.len().min(max));
    let deliveries = std::mem::replace(&mut tap.kept, rest);
    Ok(Received { deliveries, events: Vec::new() })
}

struct DoubleDeliver(AtomicU64);

#[async_trait]
impl Fault for DoubleDeliver {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        let kept = !tap.kept.is_empty();
        let received = kept_first(tap, max, wait).await?;
        if !kept {
            for delivery in &received.deliveries {
                if self.0.fetch_add(1, Ordering::Relaxed) % 10 == 9 {
                    let context = Arc::clone(&tap.side.context);
                    tap.kept.push(Delivery::new(delivery.message().clone(), delivery.facts().clone(), &context));
                }
            }
        }
        Ok(received)
    }

    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        // The second settle of a pair is not told stale, or the fault would show by itself.
        let settling = inner.settler.settle(batch);
        Settling::waiting(async move {
            settling.await.into_iter().map(|outcome| Ok(outcome.unwrap_or(AckLevel::Confirmed))).collect()
        })
    }
}

struct Phantom(AtomicU64);

#[async_trait]
impl Fault for Phantom {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        let kept = !tap.kept.is_empty();
        let received = kept_first(tap, max, wait).await?;
        if !kept {
            for delivery in &received.deliveries {
                if self.0.fetch_add(1, Ordering::Relaxed) % 10 == 9 {
                    let ghost = Message::new(delivery.message().destination(), "nobody sent this");
                    let facts = DeliveryFacts::new(Token::Pair(u64::MAX, u64::MAX));
                    tap.kept.push(Delivery::new(ghost, facts, &Arc::clone(&tap.side.context)));
                }
            }
        }
        Ok(received)
    }

    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        let settling = inner.settler.settle(batch);
        Settling::waiting(async move {
            settling.await.into_iter().map(|outcome| Ok(outcome.unwrap_or(AckLevel::Confirmed))).collect()
        })
    }
}

struct AttemptsNotCounted;

#[async_trait]
impl Fault for AttemptsNotCounted {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        let mut received = tap.inner.receive(max, wait).await?;
        for delivery in &mut received.deliveries {
            delivery.facts_mut().attempt = 1;
        }
        Ok(received)
    }
}

struct AckOnReceive;

#[async_trait]
impl Fault for AckOnReceive {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        let received = tap.inner.receive(max, wait).await?;
        for delivery in &received.deliveries {
            tap.side.settle_quietly(delivery.facts().clone(), Settlement::Ack);
        }
        Ok(received)
    }

    fn settle(&self, _: &Inner, batch: Entries) -> Settling {
        Settling::ready(batch.iter().map(|_| Ok(AckLevel::Confirmed)).collect())
    }

    fn abandoned(&self, _: &Inner, _: &Token, _: Lane) {}
}

struct NotCancelSafe;

#[async_trait]
impl Fault for NotCancelSafe {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        let received = tap.inner.receive(max, wait).await?;
        // Whoever drops the future here drops what was taken.
        tokio::time::sleep(Duration::from_micros(200)).await;
        Ok(received)
    }
}

struct Hoards;

#[async_trait]
impl Fault for Hoards {
    fn spec(&self, spec: SubscribeSpec) -> SubscribeSpec {
        spec.with_max_in_flight(10_000)
    }

    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        if tap.kept.is_empty() {
            let Received { deliveries, events } = tap.inner.receive(10_000, wait).await?;
            tap.kept = deliveries;
            if tap.kept.is_empty() {
                return Ok(Received { deliveries: Vec::new(), events });
            }
        }
        kept_first(tap, max, wait).await
    }
}

struct GoesOnWhenClosed;

#[async_trait]
impl Fault for GoesOnWhenClosed {
    async fn close(&self, mut inner: Box<dyn Subscription>, _: Duration) -> Result<()> {
        tokio::spawn(async move {
            let mut taken = Vec::new();
            // Until its connection is closed.
            while let Ok(received) = inner.receive(100, Duration::from_secs(1)).await {
                taken.extend(received.deliveries);
            }
        });
        Ok(())
    }
}

struct HandsOutWhenClosed;

#[async_trait]
impl Fault for HandsOutWhenClosed {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        if tap.kept.is_empty() {
            let Received { deliveries, events } = tap.inner.receive(max.saturating_add(5), wait).await?;
            tap.kept = deliveries;
            if tap.kept.is_empty() {
                return Ok(Received { deliveries: Vec::new(), events });
            }
        }
        kept_first(tap, max, wait).await
    }
}

struct Overstays;

#[async_trait]
impl Fault for Overstays {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        tap.inner.receive(max, wait.saturating_add(Duration::from_secs(5))).await
    }
}

struct PauseNoOp;

#[async_trait]
impl Fault for PauseNoOp {
    async fn pause(&self, _: &mut Tap, _: bool) -> Result<()> {
        Ok(())
    }
}

struct Reversed;

#[async_trait]
impl Fault for Reversed {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        let mut received = tap.inner.receive(max, wait).await?;
        received.deliveries.reverse();
        Ok(received)
    }
}

struct SubscribeReturnsEarly;

impl Fault for SubscribeReturnsEarly {
    fn is_lazy(&self) -> bool {
        true
    }
}
