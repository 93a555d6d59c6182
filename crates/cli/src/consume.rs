//! `anybroker consume`: receives, prints, and only then settles.

use std::time::{Duration, Instant};

use anybroker::{
    Delivery, Message, Nack, Order, Reason, Settlement, Subscriber, SubscriptionEvent, Verdict, extend, settle,
};
use serde_json::json;

use crate::args::{ConsumeArgs, Global, OrderArg, Settle};
use crate::exit::{Exit, Failure, Tally};
use crate::interrupt::Interrupt;
use crate::output::{Output, readable, remark};
use crate::{connect, json};

/// Deliveries that are printed and settled together.
const BATCH: usize = 500;
/// How many deliveries `--settle none` holds where `--max` says nothing.
const LOOK: usize = 10_000;

pub(crate) async fn run(global: &Global, args: ConsumeArgs, output: &mut Output) -> Result<Exit, Failure> {
    contradictions(&args)?;
    let bus = connect::connect(global).await?;
    let mut spec = bus.subscription(args.destination.as_str(), args.group.as_str()).with_start(args.start);
    if let Some(order) = args.order {
        spec = spec.with_order(match order {
            OrderArg::None => Order::None,
            OrderArg::Key => Order::Key,
            OrderArg::Total => Order::Total,
        });
    }
    if let Some(lease) = args.lease {
        spec = spec.with_lease(lease);
    }
    if let Some(max_attempts) = args.max_attempts {
        spec = spec.with_max_attempts(Some(max_attempts).filter(|max| *max > 0));
    }
    if args.settle == Settle::None {
        // Looking is no hand-over that failed: it must not be what buries a message.
        spec = spec.with_max_in_flight(LOOK).with_crash_limit(None);
    }
    if let Some(max) = args.max {
        // Nothing is fetched that will not be printed.
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        let bound = if args.settle == Settle::None { max } else { max.min(spec.max_in_flight) };
        spec = spec.with_max_in_flight(bound);
    }
    let lease = spec.lease;
    let mut subscriber = bus.subscribe(spec).await?;
    // Before this there is nothing to give back, and the signal may end the process as usual.
    let mut interrupt = Interrupt::listen()?;
    let mut consuming = Consuming {
        args: &args,
        lease,
        held: Vec::new(),
        extended: Instant::now(),
        printed: 0,
        tally: Tally::default(),
    };
    let ended = consuming.until_the_end(&mut subscriber, &mut interrupt, output).await;
    let Consuming { held, printed, mut tally, .. } = consuming;
    // After a failure (a closed pipe, for one) what was not settled is given back too, and the failure is told.
    let released = give_back(held, bus.capabilities().release.is_given()).await;
    released.into_iter().for_each(|error| tell(&error, &mut tally, output));
    let closed = subscriber.close(connect::CLOSE_GRACE).await;
    ended?;
    closed?;
    if !output.is_json() {
        remark(false, &format!("{printed} consumed"), &serde_json::Value::Null);
    }
    let exit = match tally.exit() {
        Exit::Done if interrupt.is_requested() => Exit::Interrupted,
        exit => exit,
    };
    connect::close_after(&bus, exit, output.is_json()).await
}

fn contradictions(args: &ConsumeArgs) -> Result<(), Failure> {
    let only = |flag: &str, given: bool, with: &[Settle], names: &str| match given && !with.contains(&args.settle) {
        true => Err(Failure::Usage(format!("{flag} belongs to --settle {names}"))),
        false => Ok(()),
    };
    only("--delay", args.delay.is_some(), &[Settle::Nack], "nack")?;
    only("--reason", args.reason.is_some(), &[Settle::DeadLetter], "dead-letter")?;
    only("--detail", args.detail.is_some(), &[Settle::DeadLetter], "dead-letter")?;
    only("--error-type", args.error_type.is_some(), &[Settle::Nack, Settle::DeadLetter], "nack or dead-letter")
}

struct Consuming<'a> {
    args: &'a ConsumeArgs,
    lease: Duration,
    /// What `--settle none` has printed and gives back at the end.
    held: Vec<Delivery>,
    extended: Instant,
    printed: u64,
    tally: Tally,
}

impl Consuming<'_> {
    async fn until_the_end(
        &mut self,
        subscriber: &mut Subscriber,
        interrupt: &mut Interrupt,
        output: &mut Output,
    ) -> Result<(), Failure> {
        let mut last = Instant::now();
        loop {
            let left = self.args.max.map_or(BATCH as u64, |max| max - self.printed);
            let batch = usize::try_from(left).unwrap_or(BATCH).min(BATCH);
            if batch == 0 || (self.args.idle.is_some_and(|idle| last.elapsed() >= idle)) {
                return Ok(());
            }
            let idle = self.args.idle.map_or(Duration::MAX, |idle| idle.saturating_sub(last.elapsed()));
            let wait = idle.min(self.until_extension());
            let received = tokio::select! {
                biased;
                () = interrupt.requested() => return Ok(()),
                received = subscriber.receive_all(batch, wait) => received?,
            };
            received.events.iter().for_each(|event| announce(event, output));
            if !received.deliveries.is_empty() {
                self.tally.success();
                self.print_and_settle(received.deliveries, output).await?;
                last = Instant::now();
            }
            self.keep_leases(output).await;
        }
    }

    /// A delivery counts as consumed only after it was written and flushed: what was not is given back by its drop.
    async fn print_and_settle(&mut self, deliveries: Vec<Delivery>, output: &mut Output) -> Result<(), Failure> {
        for delivery in &deliveries {
            print(delivery, output)?;
        }
        output.flush()?;
        self.printed += deliveries.len() as u64;
        let settlement = match self.args.settle {
            Settle::None => {
                self.held.extend(deliveries);
                return Ok(());
            }
            Settle::Ack => Settlement::Ack,
            Settle::Nack => Settlement::Nack(Nack {
                delay: self.args.delay.unwrap_or_default(),
                error_type: self.args.error_type.as_deref().map(Into::into),
            }),
            Settle::DeadLetter => Settlement::DeadLetter(Box::new(self.verdict())),
        };
        let batch = deliveries.into_iter().map(|delivery| (delivery, settlement.clone())).collect();
        for outcome in settle(batch).await {
            match outcome {
                Ok(_) => self.tally.success(),
                Err(failed) => {
                    let id = failed.error().context().any(|(name, _)| name == "id");
                    let (delivery, error) = failed.into_parts();
                    let error = if id { error } else { error.with("id", delivery.message().id()) };
                    tell(&error, &mut self.tally, output);
                }
            }
        }
        Ok(())
    }

    fn verdict(&self) -> Verdict {
        let reason = self.args.reason.as_deref().map_or(Reason::Rejected, Reason::from);
        let mut verdict = Verdict::new(reason);
        verdict.error_type = self.args.error_type.as_deref().map(Into::into);
        verdict.detail = self.args.detail.as_deref().map(Into::into);
        verdict
    }

    /// How long a receive may wait before the leases of what is held have to be extended.
    fn until_extension(&self) -> Duration {
        if self.held.is_empty() { Duration::MAX } else { (self.lease / 2).saturating_sub(self.extended.elapsed()) }
    }

    /// Without this, a long look would print its messages again whenever their leases end.
    async fn keep_leases(&mut self, output: &mut Output) {
        if self.held.is_empty() {
            self.extended = Instant::now();
        } else if self.until_extension().is_zero() {
            let held: Vec<&Delivery> = self.held.iter().collect();
            let failed: Vec<_> = extend(&held, self.lease).await.into_iter().filter_map(Result::err).collect();
            failed.iter().for_each(|error| tell(error, &mut self.tally, output));
            self.extended = Instant::now();
        }
    }
}

/// Gives back what was only looked at; what that did not work for comes back when its lease ends.
async fn give_back(held: Vec<Delivery>, release: bool) -> Vec<anybroker::Error> {
    if !release {
        return Vec::new();
    }
    let batch = held.into_iter().map(|delivery| (delivery, Settlement::Release)).collect();
    settle(batch).await.into_iter().filter_map(Result::err).map(Into::into).collect()
}

/// A settlement that failed: the message comes back, and the exit code will not be 0.
fn tell(error: &anybroker::Error, tally: &mut Tally, output: &Output) {
    tally.failure(error.kind());
    remark(output.is_json(), &format!("error: {error}"), &json!({"error": json::error(error)}));
}

fn announce(event: &SubscriptionEvent, output: &Output) {
    let (name, text) = match event {
        SubscriptionEvent::Degraded { cause } => ("degraded", cause.as_str()),
        SubscriptionEvent::Recovered => ("recovered", "the subscription is served again"),
        // Lanes that come and go are everyday business.
        _ => return,
    };
    remark(output.is_json(), &format!("{name}: {text}"), &json!({"event": name, "message": text}));
}

fn print(delivery: &Delivery, output: &mut Output) -> Result<(), Failure> {
    if output.is_json() {
        return output.object(&json::delivery(delivery));
    }
    let position = delivery.position().map_or_else(String::new, |position| format!(" position={position}"));
    let message = delivery.message();
    output.line(&format!("{} attempt={}{position}{}", message.id(), delivery.attempt(), key_and_headers(message)))?;
    output.line(&format!("  {}", payload(message)))
}

/// ` key=… name: value …`, as far as there are any.
pub(crate) fn key_and_headers(message: &Message) -> String {
    let mut text = message.key().map_or_else(String::new, |key| format!(" key={}", readable(key)));
    for (name, value) in message.headers() {
        text.push_str(&format!(" {}={}", readable(name.as_bytes()), readable(value)));
    }
    text
}

/// The payload for people.
pub(crate) fn payload(message: &Message) -> String {
    message.payload().map_or_else(|| "(tombstone)".to_owned(), |payload| readable(payload))
}
