//! Outcomes that are unknown: what they leave open, and what they do not.

use super::*;

impl Script {
    fn unknown(&mut self, id: &str, sequence: u64) -> &mut Self {
        let call = self.invoke(id, "k", sequence);
        self.push(What::PublishInfo { call, kind: ErrorKind::Timeout })
    }

    fn failed(&mut self, id: &str, sequence: u64) -> &mut Self {
        let call = self.invoke(id, "k", sequence);
        self.push(What::PublishFail { call, kind: ErrorKind::Unavailable })
    }

    fn in_order(&mut self) -> &mut Self {
        self.subscribed(1, Order::Key, OnFailure::GoPast)
    }

    fn all_delivered(&mut self, ids: &[&str]) -> Vec<&'static str> {
        for (delivery, id) in (1..).zip(ids) {
            self.delivered(delivery, id, 1).settled(delivery, Verb::Ack);
        }
        self.names()
    }
}

#[test]
fn a_publish_that_failed_for_certain_has_no_copy_and_its_repetition_has_one() {
    let mut script = Script::new();
    script.member().failed("a", 1).published("a", "k", 2).delivered(1, "a", 1).delivered(2, "a", 1);
    assert_eq!(script.names(), ["unjustified-duplicate"]);
}

#[test]
fn a_repetition_of_an_unknown_publish_is_a_second_copy_unless_the_broker_remembers_ids() {
    let twice = |dedup, between| {
        let mut script = Script::new();
        script.rules.dedup = dedup;
        script.member().unknown("a", 1).wait(between).published("a", "k", 2);
        script.all_delivered(&["a", "a"])
    };
    assert_eq!(twice(None, 0), [""; 0]);
    assert_eq!(twice(Some(1_000_000), 0), ["ack-lost"]);
    assert_eq!(twice(Some(1_000_000), 1_000_000), [""; 0]);
}

#[test]
fn an_unknown_publish_may_come_behind_later_ones_and_nothing_earlier_behind_it() {
    let mut script = Script::new();
    script.in_order().published("a", "k", 1).unknown("b", 2).published("c", "k", 3);
    assert_eq!(script.all_delivered(&["a", "c", "b"]), [""; 0]);
    let mut script = Script::new();
    script.in_order().published("a", "k", 1).unknown("b", 2).published("c", "k", 3);
    assert_eq!(script.all_delivered(&["b", "a", "c"]), ["reorder"]);
}

#[test]
fn an_unknown_publish_that_was_repeated_until_it_was_done_has_its_place_by_then() {
    let repeated = |ids: &[&str]| {
        let mut script = Script::new();
        script.in_order().unknown("a", 1).published("b", "k", 2).published("a", "k", 3).published("c", "k", 4);
        script.all_delivered(ids)
    };
    assert_eq!(repeated(&["a", "b", "c"]), [""; 0]);
    assert_eq!(repeated(&["b", "a", "c"]), [""; 0]);
    assert_eq!(repeated(&["b", "c", "a"]), ["reorder"]);
}

#[test]
fn a_publish_that_failed_for_certain_has_its_place_by_its_repetition() {
    let repeated = |ids: &[&str]| {
        let mut script = Script::new();
        script.in_order().failed("a", 1).published("b", "k", 2).published("a", "k", 3);
        script.all_delivered(ids)
    };
    assert_eq!(repeated(&["b", "a"]), [""; 0]);
    assert_eq!(repeated(&["a", "b"]), ["reorder"]);
}

#[test]
fn a_late_ack_that_was_refused_settles_nothing_and_one_that_is_unknown_may_have() {
    let then_vanished = |effect| {
        let mut script = Script::new();
        script.member().published("a", "k", 1).delivered(1, "a", 1).wait(LEASE);
        script.subscribed(2, Order::None, OnFailure::GoPast).delivered_to(2, 2, "a", 1);
        script.asked(1, Verb::Ack);
        script.push(What::SettleFail { delivery: 1, kind: ErrorKind::StaleDelivery, effect });
        script.asked(2, Verb::Ack);
        let (kind, effect) = (ErrorKind::StaleDelivery, Effect::NotDone);
        script.push(What::SettleFail { delivery: 2, kind, effect }).drained();
        script.names()
    };
    assert_eq!(then_vanished(Effect::NotDone), ["lost"]);
    assert_eq!(then_vanished(Effect::Unknown), [""; 0]);
}

#[test]
fn a_burial_of_unknown_effect_leaves_a_letter_or_the_message() {
    let unknown_burial = |again: bool, letter: bool| {
        let mut script = Script::new();
        script.member().published("a", "k", 1).delivered(1, "a", 1);
        script.asked(1, Verb::DeadLetter);
        script.push(What::SettleFail { delivery: 1, kind: ErrorKind::Timeout, effect: Effect::Unknown });
        if again {
            script.delivered(2, "a", 1).settled(2, Verb::Ack);
        }
        if letter {
            script.letter(9, "a");
        }
        script.drained();
        script.names()
    };
    for (again, letter) in [(true, false), (false, true), (true, true)] {
        assert_eq!(unknown_burial(again, letter), [""; 0]);
    }
    assert_eq!(unknown_burial(false, false), ["lost"]);
}

#[test]
fn the_source_of_a_burial_of_unknown_effect_comes_with_its_own_attempt_also_when_its_letter_was_redriven() {
    let beside = |effect, attempt| {
        let mut script = Script::new();
        script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::Nack);
        script.delivered(2, "a", 2).settled(2, Verb::Nack).delivered(3, "a", 3).asked(3, Verb::Nack);
        match effect {
            Some(effect) => {
                script.push(What::SettleFail { delivery: 3, kind: ErrorKind::Timeout, effect });
                script.push(What::Dropped { delivery: 3 })
            }
            None => script.answered(3),
        };
        script.letter_of(9, "a", "attempts", 3);
        script.push(What::RedriveInvoke { destination: "d".into(), group: "g".into(), ids: vec!["a".into()] });
        script.delivered(4, "a", 1).settled(4, Verb::Ack).wait(LEASE).delivered(5, "a", attempt).settled(5, Verb::Ack);
        script.names()
    };
    assert_eq!(beside(Some(Effect::Unknown), 3), [""; 0]);
    assert_eq!(beside(Some(Effect::Unknown), 4), ["attempt-mismatch"; 2], "more than it was, and than there may be");
    assert_eq!(beside(None, 3), ["ack-lost"]);
}

#[test]
fn a_nack_that_came_too_late_leaves_a_copy_unless_it_was_refused() {
    let nacked_too_late = |effect, attempt| {
        let mut script = Script::new();
        script.member().published("a", "k", 1).delivered(1, "a", 1).wait(LEASE);
        script.subscribed(2, Order::None, OnFailure::GoPast).delivered_to(2, 2, "a", 1).settled(2, Verb::Ack);
        script.asked(1, Verb::Nack);
        script.push(What::SettleFail { delivery: 1, kind: ErrorKind::StaleDelivery, effect });
        script.delivered_to(2, 3, "a", attempt);
        script.names()
    };
    assert_eq!(nacked_too_late(Effect::Unknown, 2), [""; 0]);
    assert_eq!(nacked_too_late(Effect::Unknown, 3), ["attempt-mismatch"]);
    assert_eq!(nacked_too_late(Effect::NotDone, 2), ["ack-lost"]);
}

#[test]
fn a_settle_that_had_no_answer_when_the_lease_ended_may_come_again_and_one_that_had_may_not() {
    let acked_then = |answered_after, micros| {
        let mut script = Script::new();
        script.member().published("a", "k", 1).delivered(1, "a", 1);
        script.asked(1, Verb::Ack).wait(answered_after).answered(1);
        script.wait(micros).delivered(2, "a", 1).settled(2, Verb::Ack);
        script.names()
    };
    assert_eq!(acked_then(LEASE, 0), [""; 0]);
    assert_eq!(acked_then(LEASE, 6_000_000), ["ack-lost"]);
    assert_eq!(acked_then(0, LEASE), ["ack-lost"]);
}

#[test]
fn what_was_acked_is_not_lost_when_somebody_else_fails_it_and_what_was_only_failed_is() {
    let failed_by_another = |is_acked: bool| {
        let mut script = Script::new();
        script.member().published("a", "k", 1).delivered(1, "a", 1);
        if is_acked {
            script.asked(1, Verb::Ack);
        }
        script.wait(LEASE).delivered(2, "a", 1);
        if is_acked {
            script.answered(1);
        }
        script.settled(2, Verb::Nack).drained();
        script.names()
    };
    assert_eq!(failed_by_another(true), [""; 0]);
    assert_eq!(failed_by_another(false), ["nack-lost"]);
}

#[test]
fn what_one_of_two_who_had_it_failed_is_not_lost_when_the_other_acks_it_too_late() {
    let acked_by_the_other = |answer: Option<Effect>| {
        let mut script = Script::new();
        script.member().published("a", "k", 1).delivered(1, "a", 1).wait(LEASE);
        script.subscribed(2, Order::None, OnFailure::GoPast).delivered_to(2, 2, "a", 1).settled(2, Verb::Nack);
        script.asked(1, Verb::Ack);
        match answer {
            Some(effect) => script.push(What::SettleFail { delivery: 1, kind: ErrorKind::StaleDelivery, effect }),
            None => script.answered(1),
        };
        script.drained().names()
    };
    assert_eq!(acked_by_the_other(None), [""; 0]);
    assert_eq!(acked_by_the_other(Some(Effect::Unknown)), [""; 0]);
    assert_eq!(acked_by_the_other(Some(Effect::NotDone)), ["nack-lost"]);
}

#[test]
fn what_needs_no_lost_connection_is_not_asked_for_one() {
    // The nack of the first leaves a copy and its source; the second, whose connection a fault hits, has one of them.
    let mut script = Script::new();
    script.lease = 1_000_000_000;
    script.member().published("a", "k", 1).delivered(1, "a", 1);
    script.asked(1, Verb::Nack);
    script.push(What::SettleFail { delivery: 1, kind: ErrorKind::Unavailable, effect: Effect::Unknown });
    script.delivered(2, "a", 1).fault(&[0]).delivered(3, "a", 2);
    assert_eq!(script.names(), [""; 0]);
    script.delivered(4, "a", 2);
    assert_eq!(script.names(), ["unjustified-duplicate"]);
}

#[test]
fn a_nack_that_had_no_answer_when_the_lease_ended_may_not_be_counted_and_one_that_had_is() {
    let nacked_then = |is_answered: bool, attempt| {
        let mut script = Script::new();
        script.member().published("a", "k", 1).delivered(1, "a", 1);
        script.asked(1, Verb::Nack);
        if is_answered {
            script.answered(1);
        }
        script.wait(LEASE).delivered(2, "a", attempt);
        script.names()
    };
    for attempt in [1, 2] {
        assert_eq!(nacked_then(false, attempt), [""; 0]);
    }
    assert_eq!(nacked_then(true, 1), ["attempt-mismatch"]);
    assert_eq!(nacked_then(true, 2), [""; 0]);
}

#[test]
fn what_an_unknown_nack_leaves_behind_keeps_its_number_while_its_copy_fails_again() {
    let then_comes = |effect, attempts: &[u32]| {
        let mut script = Script::new();
        script.member().published("a", "k", 1).delivered(1, "a", 1);
        script.asked(1, Verb::Nack);
        script.push(What::SettleFail { delivery: 1, kind: ErrorKind::Unavailable, effect });
        script.push(What::Dropped { delivery: 1 });
        for (delivery, attempt) in (2..).zip(attempts) {
            script.delivered(delivery, "a", *attempt).settled(delivery, Verb::Nack);
        }
        script.names()
    };
    // The copy fails, and then the source comes.
    assert_eq!(then_comes(Effect::Unknown, &[2, 1]), [""; 0]);
    assert_eq!(then_comes(Effect::NotDone, &[1, 1]), ["attempt-mismatch"]);
}
