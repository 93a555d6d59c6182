//! Hand-written histories: each anomaly is found, and a good history passes.

mod burials;
mod faults;
mod letters;
mod positions;
mod uncertain;

use anybroker_core::{Effect, ErrorKind, OnFailure, Order};

use super::*;
use crate::history::{Seen, Verb};

/// Writes a history of one destination `d`, one group `g`.
struct Script {
    events: Vec<Event>,
    at: u64,
    next: u64,
    rules: Rules,
    lease: u64,
    crash_limit: Option<u32>,
}

const LEASE: u64 = 100_000;

impl Script {
    fn new() -> Self {
        Self { events: Vec::new(), at: 0, next: 100, rules: Rules::default(), lease: LEASE, crash_limit: None }
    }

    fn push(&mut self, what: What) -> &mut Self {
        self.at += 10;
        self.events.push(Event { at: self.at, client: 0, what });
        self
    }

    fn wait(&mut self, micros: u64) -> &mut Self {
        self.at += micros;
        self
    }

    fn subscribed(&mut self, subscription: u64, order: Order, on_failure: OnFailure) -> &mut Self {
        let lease_micros = self.lease;
        self.push(What::Subscribed {
            subscription,
            group: "g".into(),
            destinations: vec!["d".into()],
            order,
            on_failure,
            earliest: true,
            lease_micros,
            max_attempts: Some(3),
            crash_limit: self.crash_limit,
        })
    }

    fn member(&mut self) -> &mut Self {
        self.subscribed(1, Order::None, OnFailure::GoPast)
    }

    fn invoke(&mut self, id: &str, key: &str, sequence: u64) -> u64 {
        self.next += 1;
        let call = self.next;
        self.push(What::PublishInvoke {
            call,
            id: id.into(),
            destination: "d".into(),
            key: Some(key.as_bytes().to_vec()),
            sequence,
            digest: 7,
            instructed: false,
            expires: false,
        });
        call
    }

    fn published(&mut self, id: &str, key: &str, sequence: u64) -> &mut Self {
        let call = self.invoke(id, key, sequence);
        self.push(What::PublishOk { call, duplicate: false, position: None })
    }

    fn delivered_to(&mut self, subscription: u64, delivery: u64, id: &str, attempt: u32) -> &mut Self {
        self.push(What::Deliver(Seen {
            delivery,
            subscription,
            id: id.into(),
            destination: "d".into(),
            digest: 7,
            attempt,
            deliveries: None,
            lane: 0,
            epoch: 0,
            position: None,
            excerpt: String::new(),
        }))
    }

    fn delivered(&mut self, delivery: u64, id: &str, attempt: u32) -> &mut Self {
        self.delivered_to(1, delivery, id, attempt)
    }

    fn settled(&mut self, delivery: u64, verb: Verb) -> &mut Self {
        self.asked(delivery, verb).answered(delivery)
    }

    fn asked(&mut self, delivery: u64, verb: Verb) -> &mut Self {
        self.push(What::SettleInvoke { delivery, verb, delay: 0 })
    }

    /// What was asked for is told as done.
    fn answered(&mut self, delivery: u64) -> &mut Self {
        let level = self.rules.level;
        self.push(What::SettleOk { delivery, level })
    }

    fn letter(&mut self, scan: u64, id: &str) -> &mut Self {
        self.letter_of(scan, id, "rejected", 1)
    }

    fn letter_of(&mut self, scan: u64, id: &str, reason: &str, attempts: u32) -> &mut Self {
        self.push(What::Letter {
            scan,
            destination: "d".into(),
            group: "g".into(),
            id: id.into(),
            digest: 7,
            reason: reason.into(),
            attempts,
        })
    }

    fn drained(&mut self) -> &mut Self {
        self.push(What::Drained { destination: "d".into(), group: "g".into(), scan: Some(9) })
    }

    fn names(&self) -> Vec<&'static str> {
        check(&self.events, self.rules).0.into_iter().map(|anomaly| anomaly.name).collect()
    }
}

#[test]
fn a_good_history_passes() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).published("b", "k", 2).published("c", "k", 3);
    script.delivered(1, "a", 1).settled(1, Verb::Nack).delivered(2, "a", 2).settled(2, Verb::Ack);
    script.delivered(3, "b", 1).settled(3, Verb::DeadLetter).letter(9, "b");
    script
        .delivered(4, "c", 1)
        .push(What::Dropped { delivery: 4 })
        .delivered(5, "c", 1)
        .settled(5, Verb::Ack)
        .drained();
    assert_eq!(script.names(), [""; 0]);
    let counts = check(&script.events, script.rules).1;
    assert_eq!((counts.delivered, counts.duplicates_justified, counts.acked, counts.nacked), (5, 2, 2, 1));
}

#[test]
fn a_message_that_never_arrives_is_lost() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).drained();
    assert_eq!(script.names(), ["lost"]);
}

#[test]
fn a_message_published_before_a_group_that_starts_late_is_not_lost() {
    let mut script = Script::new();
    script.published("a", "k", 1).push(What::Subscribed {
        subscription: 1,
        group: "g".into(),
        destinations: vec!["d".into()],
        order: Order::None,
        on_failure: OnFailure::GoPast,
        earliest: false,
        lease_micros: LEASE,
        max_attempts: None,
        crash_limit: None,
    });
    script.drained();
    assert_eq!(script.names(), [""; 0]);
}

#[test]
fn a_message_that_nobody_published_is_a_phantom() {
    let mut script = Script::new();
    script.member().delivered(1, "ghost", 1);
    assert_eq!(script.names(), ["phantom"]);
}

#[test]
fn a_changed_message_is_altered() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1);
    if let Some(Event { what: What::Deliver(seen), .. }) = script.events.last_mut() {
        seen.digest = 8;
    }
    assert_eq!(script.names(), ["altered"]);
}

#[test]
fn a_failed_publish_that_is_delivered_is_an_aborted_read() {
    let mut script = Script::new();
    let call = script.member().invoke("a", "k", 1);
    script.push(What::PublishFail { call, kind: ErrorKind::TooLarge }).delivered(1, "a", 1);
    assert_eq!(script.names(), ["aborted-read"]);
}

#[test]
fn a_publish_of_unknown_outcome_may_be_delivered_or_not() {
    let mut script = Script::new();
    for id in ["a", "b"] {
        let call = script.invoke(id, "k", 1);
        script.push(What::PublishInfo { call, kind: ErrorKind::Timeout });
    }
    script.member().delivered(1, "a", 1).settled(1, Verb::Ack).drained();
    assert_eq!(script.names(), [""; 0]);
}

#[test]
fn a_second_delivery_without_a_cause_is_an_unjustified_duplicate() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).delivered(2, "a", 1);
    assert_eq!(script.names(), ["unjustified-duplicate"]);
}

#[test]
fn a_second_delivery_after_the_lease_is_justified() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).wait(LEASE).delivered(2, "a", 1);
    assert_eq!(script.names(), [""; 0]);
}

#[test]
fn an_extended_lease_holds() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).wait(LEASE / 2);
    let until = script.at + LEASE;
    script.push(What::Extended { delivery: 1, until }).wait(LEASE / 2 + 20).delivered(2, "a", 1);
    assert_eq!(script.names(), ["unjustified-duplicate"]);
}

#[test]
fn a_delivery_after_an_ack_is_ack_lost() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::Ack).delivered(2, "a", 1);
    assert_eq!(script.names(), ["ack-lost"]);
}

#[test]
fn only_what_was_acked_above_a_hole_may_come_again_where_prefixes_are_kept() {
    let hole_then_close = |again: &[&str]| {
        let mut script = Script::new();
        script.rules.granularity = AckGranularity::Prefix;
        script.member().published("a", "k", 1).published("b", "k", 2).published("c", "k", 3);
        script.delivered(1, "a", 1).delivered(2, "b", 1).delivered(3, "c", 1);
        script.settled(1, Verb::Ack).settled(3, Verb::Ack).push(What::CloseInvoke { subscription: 1 });
        script.subscribed(2, Order::None, OnFailure::GoPast);
        for (number, id) in again.iter().enumerate() {
            script.delivered_to(2, 10 + number as u64, id, 1);
        }
        script.names()
    };
    assert_eq!(hole_then_close(&["b", "c"]), [""; 0]);
    assert_eq!(hole_then_close(&["a", "b", "c"]), ["ack-lost"]);
}

#[test]
fn what_was_dropped_is_a_hole_where_prefixes_are_kept_until_it_is_settled() {
    let dropped_then_close = |settles: bool| {
        let mut script = Script::new();
        script.rules.granularity = AckGranularity::Prefix;
        script.member().published("a", "k", 1).published("b", "k", 2).delivered(1, "a", 1).delivered(2, "b", 1);
        script.push(What::Dropped { delivery: 1 });
        if settles {
            script.delivered(3, "a", 1).settled(3, Verb::Ack);
        }
        script.settled(2, Verb::Ack).push(What::CloseInvoke { subscription: 1 });
        script.subscribed(2, Order::None, OnFailure::GoPast);
        if !settles {
            script.delivered_to(2, 4, "a", 1).settled(4, Verb::Ack);
        }
        script.delivered_to(2, 5, "b", 1).names()
    };
    assert_eq!(dropped_then_close(false), [""; 0]);
    assert_eq!(dropped_then_close(true), ["ack-lost"]);
}

#[test]
fn an_ack_that_was_forgotten_above_a_hole_is_a_hole_itself_until_it_comes_again() {
    let acked_above = |comes_again: bool| {
        let mut script = Script::new();
        script.rules.granularity = AckGranularity::Prefix;
        script.member().published("a", "k", 1).published("b", "k", 2).published("c", "k", 3);
        script.delivered(1, "a", 1).delivered(2, "b", 1).settled(2, Verb::Ack);
        script.push(What::CloseInvoke { subscription: 1 }).subscribed(2, Order::None, OnFailure::GoPast);
        script.delivered_to(2, 3, "a", 1).settled(3, Verb::Ack);
        if comes_again {
            script.delivered_to(2, 4, "b", 1).settled(4, Verb::Ack);
        }
        script.delivered_to(2, 5, "c", 1).settled(5, Verb::Ack).push(What::CloseInvoke { subscription: 2 });
        script.subscribed(3, Order::None, OnFailure::GoPast).delivered_to(3, 6, "c", 1).names()
    };
    assert_eq!(acked_above(false), [""; 0]);
    assert_eq!(acked_above(true), ["ack-lost"]);
}

#[test]
fn a_nack_that_never_comes_again_is_nack_lost() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::Nack).drained();
    assert_eq!(script.names(), ["nack-lost"]);
}

#[test]
fn a_dropped_delivery_that_never_comes_again_is_lost() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).push(What::Dropped { delivery: 1 }).drained();
    assert_eq!(script.names(), ["lost"]);
}

#[test]
fn first_deliveries_out_of_order_are_a_reorder_only_in_ordered_modes() {
    for (order, expected) in [(Order::None, vec![]), (Order::Key, vec!["reorder"]), (Order::Total, vec!["reorder"])] {
        let mut script = Script::new();
        script.subscribed(1, order, OnFailure::GoPast).published("a", "k", 1).published("b", "k", 2);
        script.delivered(1, "b", 1).settled(1, Verb::Ack).delivered(2, "a", 1);
        assert_eq!(script.names(), expected);
    }
}

#[test]
fn what_passes_a_failed_message_of_its_key_is_a_reorder_only_where_it_blocks() {
    for (on_failure, expected) in [(OnFailure::GoPast, vec![]), (OnFailure::Block, vec!["reorder"])] {
        let mut script = Script::new();
        script.subscribed(1, Order::Key, on_failure).published("a", "k", 1).published("b", "k", 2);
        script.delivered(1, "a", 1).settled(1, Verb::Nack).delivered(2, "b", 1);
        assert_eq!(script.names(), expected);
    }
}

#[test]
fn what_was_given_back_of_a_message_that_is_stored_twice_may_be_the_later_one() {
    for (outcome, expected) in [(None, vec![]), (Some(true), vec!["reorder"])] {
        let mut script = Script::new();
        script.subscribed(1, Order::Key, OnFailure::Block);
        let call = script.invoke("a", "k", 1);
        script.push(What::PublishInfo { call, kind: ErrorKind::Timeout }).published("b", "k", 2);
        let again = script.invoke("a", "k", 3);
        script.push(What::PublishOk { call: again, duplicate: outcome.is_some(), position: None });
        if outcome.is_none() {
            script.delivered(1, "a", 1).settled(1, Verb::Ack);
        }
        script.delivered(2, "b", 1).delivered(3, "a", 1).settled(3, Verb::Nack).settled(2, Verb::Nack);
        script.delivered(4, "b", 2);
        let found = script.names().into_iter().filter(|name| *name == "reorder").collect::<Vec<_>>();
        assert_eq!(found, expected, "{outcome:?}");
    }
}

#[test]
fn a_key_is_with_one_member_where_either_of_two_was_promised_an_order() {
    for (orders, expected) in [
        ((Order::None, Order::None), vec![]),
        ((Order::Key, Order::None), vec!["concurrent-key"]),
        ((Order::None, Order::Key), vec!["concurrent-key"]),
        ((Order::None, Order::Total), vec!["concurrent-key"]),
    ] {
        let mut script = Script::new();
        script.subscribed(1, orders.0, OnFailure::GoPast).subscribed(2, orders.1, OnFailure::GoPast);
        script.published("a", "k", 1).published("b", "k", 2);
        script.delivered_to(1, 1, "a", 1).delivered_to(2, 2, "b", 1);
        assert_eq!(script.names(), expected, "{orders:?}");
    }
}

#[test]
fn a_key_held_by_two_members_is_a_concurrent_key() {
    let mut script = Script::new();
    script.subscribed(1, Order::Key, OnFailure::GoPast).subscribed(2, Order::Key, OnFailure::GoPast);
    script.published("a", "k", 1).published("b", "k", 2).published("x", "other", 1);
    script.delivered_to(1, 1, "a", 1).delivered_to(2, 2, "x", 1);
    assert_eq!(script.names(), [""; 0]);
    script.delivered_to(2, 3, "b", 1);
    assert_eq!(script.names(), ["concurrent-key"]);
}

#[test]
fn attempts_are_checked_by_what_the_record_says_of_them() {
    let dropped_then = |attempts, attempt| {
        let mut script = Script::new();
        script.rules.attempts = attempts;
        script.member().published("a", "k", 1).delivered(1, "a", 1).push(What::Dropped { delivery: 1 });
        script.delivered(2, "a", attempt);
        script.names()
    };
    assert_eq!(dropped_then(AttemptCount::Exact, 1), [""; 0]);
    assert_eq!(dropped_then(AttemptCount::Exact, 2), ["attempt-mismatch"]);
    assert_eq!(dropped_then(AttemptCount::Approximate, 2), [""; 0]);

    let nacked_then = |attempts, crash: bool, attempt| {
        let mut script = Script::new();
        script.rules.attempts = attempts;
        script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::Nack);
        if crash {
            script.push(What::Vanished { subscription: 1 }).subscribed(2, Order::None, OnFailure::GoPast);
        }
        script.delivered_to(if crash { 2 } else { 1 }, 2, "a", attempt);
        script.names()
    };
    assert_eq!(nacked_then(AttemptCount::Exact, false, 1), ["attempt-mismatch"]);
    assert_eq!(nacked_then(AttemptCount::Volatile, false, 1), ["attempt-mismatch"]);
    assert_eq!(nacked_then(AttemptCount::Volatile, true, 1), [""; 0]);
    assert_eq!(nacked_then(AttemptCount::Exact, true, 1), ["attempt-mismatch"]);
}

#[test]
fn a_brokers_own_count_may_count_what_a_member_that_is_gone_had_fetched() {
    let second = |attempts, gone: bool| {
        let mut script = Script::new();
        script.rules.attempts = attempts;
        script.member().published("a", "k", 1).subscribed(2, Order::None, OnFailure::GoPast);
        if gone {
            script.push(What::Vanished { subscription: 1 });
        }
        script.delivered_to(2, 1, "a", 2);
        script.names()
    };
    assert_eq!(second(AttemptCount::Approximate, true), [""; 0]);
    assert_eq!(second(AttemptCount::Approximate, false), ["attempt-mismatch"]);
    assert_eq!(second(AttemptCount::Exact, true), ["attempt-mismatch"]);
}

#[test]
fn an_attempt_beyond_the_limit_is_a_mismatch() {
    let mut script = Script::new();
    script.member().published("a", "k", 1);
    script.rules.attempts = AttemptCount::Approximate;
    script.delivered(1, "a", 4);
    assert!(script.names().contains(&"attempt-mismatch"));
}

#[test]
fn a_message_that_is_acked_and_a_dead_letter_breaks_conservation() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::Ack).letter(9, "a").drained();
    assert_eq!(script.names(), ["unjustified-dead-letter", "conservation"]);
}

#[test]
fn a_buried_message_without_a_letter_is_lost() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::DeadLetter).drained();
    assert_eq!(script.names(), ["lost"]);
}

#[test]
fn two_letters_of_one_message_are_a_duplicate() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::DeadLetter);
    script.letter(9, "a").letter(9, "a");
    assert_eq!(script.names(), ["dead-letter-duplicate"]);
}

#[test]
fn a_letter_read_twice_is_no_duplicate() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::DeadLetter);
    script.letter(8, "a").letter(9, "a").drained();
    assert_eq!(script.names(), [""; 0]);
}

#[test]
fn a_redriven_message_starts_again_at_attempt_one() {
    let redriven_then = |attempt| {
        let mut script = Script::new();
        script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::Nack);
        script.delivered(2, "a", 2).settled(2, Verb::DeadLetter).letter_of(8, "a", "rejected", 2);
        script.push(What::RedriveInvoke { destination: "d".into(), group: "g".into(), ids: vec!["a".into()] });
        script.delivered(3, "a", attempt).settled(3, Verb::Ack).drained();
        script.names()
    };
    assert_eq!(redriven_then(1), [""; 0]);
    assert_eq!(redriven_then(3), ["attempt-mismatch"]);
}

#[test]
fn a_redriven_message_that_does_not_come_is_lost() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::DeadLetter).letter(8, "a");
    script.push(What::RedriveInvoke { destination: "d".into(), group: "g".into(), ids: vec!["a".into()] }).drained();
    assert_eq!(script.names(), ["lost"]);
}

#[test]
fn an_operation_that_does_not_end_is_a_hang() {
    let mut script = Script::new();
    script.push(What::Hang { operation: "receive".into() });
    assert_eq!(script.names(), ["hang"]);
}

#[test]
fn two_copies_may_be_delivered_twice_and_deduplicated_ones_once() {
    let twice = |duplicate| {
        let mut script = Script::new();
        script.member().published("a", "k", 1);
        let call = script.invoke("a", "k", 2);
        script.push(What::PublishOk { call, duplicate, position: None });
        script.delivered(1, "a", 1).settled(1, Verb::Ack).delivered(2, "a", 1).settled(2, Verb::Ack);
        script.names()
    };
    assert_eq!(twice(false), [""; 0]);
    assert_eq!(twice(true), ["ack-lost"]);
}
