//! Burials and delays that a fault meets.

use super::*;

/// Longer than anything is under way after a fault.
const LATER: u64 = 16_000_000;

/// With a lease that does not end meanwhile.
fn held(level: AckLevel) -> Script {
    let mut script = Script::new();
    (script.lease, script.rules.level) = (1_000_000_000, level);
    script.member().published("a", "k", 1).delivered(1, "a", 1);
    script
}

#[test]
fn a_fault_that_meets_a_burial_explains_one_letter_more_and_none_where_it_is_one_step() {
    let letters = |faults: u64, is_atomic: bool, letters: u64| {
        let mut script = held(AckLevel::Confirmed);
        script.rules.atomic_burials = is_atomic;
        script.asked(1, Verb::DeadLetter);
        for _ in 0..faults {
            script.fault(&[0]);
        }
        script.answered(1);
        for _ in 0..letters {
            script.letter(9, "a");
        }
        script.drained().names()
    };
    assert_eq!(letters(0, false, 1), [""; 0]);
    assert_eq!(letters(0, false, 2), ["dead-letter-duplicate"]);
    assert_eq!(letters(1, false, 2), [""; 0]);
    assert_eq!(letters(1, false, 3), ["dead-letter-duplicate"]);
    assert_eq!(letters(2, false, 3), [""; 0]);
    assert_eq!(letters(1, true, 2), ["dead-letter-duplicate"]);
    assert_eq!(letters(1, false, 0), ["lost"]);
}

#[test]
fn a_burial_whose_end_was_only_sent_may_come_again_with_the_connection_and_be_acked_beside_its_letter() {
    let again = |level, is_told: bool, is_acked: bool| {
        let mut script = held(level);
        script.settled(1, Verb::DeadLetter).fault(&[0]);
        if is_told {
            script.lost();
        }
        script.delivered(2, "a", 1).settled(2, if is_acked { Verb::Ack } else { Verb::DeadLetter });
        script.letter(9, "a").drained().names()
    };
    for is_acked in [true, false] {
        assert_eq!(again(AckLevel::Sent, true, is_acked), [""; 0], "{is_acked}");
        assert!(again(AckLevel::Sent, false, is_acked).contains(&"unjustified-duplicate"), "{is_acked}");
        assert!(again(AckLevel::Confirmed, true, is_acked).contains(&"unjustified-duplicate"), "{is_acked}");
    }
}

#[test]
fn a_burial_without_an_answer_in_a_fault_may_come_again_and_be_buried_twice() {
    let mut script = held(AckLevel::Confirmed);
    script.asked(1, Verb::DeadLetter).fault(&[0]).lost().delivered(2, "a", 1).answered(1).settled(2, Verb::DeadLetter);
    script.letter(9, "a").letter(9, "a").drained();
    assert_eq!(script.names(), [""; 0]);
    script.wait(LATER).delivered(3, "a", 1);
    assert_eq!(script.names(), ["unjustified-duplicate"]);
}

#[test]
fn a_burial_that_came_again_and_was_refused_afterwards_leaves_no_account_behind() {
    let mut script = held(AckLevel::Confirmed);
    script.asked(1, Verb::DeadLetter).fault(&[0]).lost().delivered(2, "a", 1);
    script.push(What::SettleFail { delivery: 1, kind: ErrorKind::StaleDelivery, effect: Effect::NotDone });
    script.settled(2, Verb::Ack).drained();
    assert_eq!(script.names(), [""; 0]);
    // It certainly did nothing, says its answer.
    script.letter(9, "a");
    assert_eq!(script.names(), ["unjustified-dead-letter"]);
}

#[test]
fn an_ack_that_was_sent_on_a_connection_that_is_gone_does_not_contradict_who_buries_the_message_then() {
    let after_the_ack = |is_lost: bool| {
        let mut script = held(AckLevel::Sent);
        script.asked(1, Verb::Ack);
        if is_lost {
            script.fault(&[0]).lost().delivered(2, "a", 1).settled(2, Verb::DeadLetter).answered(1);
        } else {
            script.answered(1);
        }
        script.letter(9, "a").drained().names()
    };
    assert_eq!(after_the_ack(true), [""; 0]);
    assert_eq!(after_the_ack(false), ["unjustified-dead-letter", "conservation"]);
}

#[test]
fn an_ack_of_what_was_another_members_already_does_not_contradict_its_burial() {
    let client = |script: &mut Script, client: u32| {
        if let Some(event) = script.events.last_mut() {
            event.client = client;
        }
    };
    // The first one belongs to a client of its own, which the fault hits; its connection is gone, and it is not told yet.
    let mut script = Script::new();
    (script.lease, script.rules.level) = (1_000_000_000, AckLevel::Sent);
    script.member();
    client(&mut script, 5);
    script.subscribed(2, Order::None, OnFailure::GoPast).published("a", "k", 1).fault(&[5]);
    script.delivered_to(2, 1, "a", 1).settled(1, Verb::DeadLetter);
    script.delivered_to(1, 2, "a", 1).settled(2, Verb::Ack).lost().letter(9, "a").drained();
    assert_eq!(script.names(), [""; 0]);
}

#[test]
fn a_burial_above_a_hole_may_come_again_where_prefixes_are_kept() {
    let after_a_close = |granularity| {
        let mut script = Script::new();
        script.rules.granularity = granularity;
        script.member().published("a", "k", 1).published("b", "k", 2).delivered(1, "a", 1).delivered(2, "b", 1);
        script.settled(2, Verb::DeadLetter).push(What::CloseInvoke { subscription: 1 });
        script.subscribed(2, Order::None, OnFailure::GoPast).delivered_to(2, 3, "a", 1).settled(3, Verb::Ack);
        script.delivered_to(2, 4, "b", 1).settled(4, Verb::Ack).letter(9, "b").drained().names()
    };
    assert_eq!(after_a_close(AckGranularity::Prefix), [""; 0]);
    assert_eq!(after_a_close(AckGranularity::Individual), ["unjustified-duplicate"]);
}

#[test]
fn of_a_copy_and_the_source_that_a_fault_left_behind_one_may_be_acked_and_the_other_one_buried() {
    let mut script = held(AckLevel::Sent);
    script.asked(1, Verb::Nack).fault(&[0]).lost().delivered(2, "a", 2).delivered(3, "a", 1).answered(1);
    script.settled(3, Verb::DeadLetter).settled(2, Verb::Ack).letter(9, "a").drained();
    assert_eq!(script.names(), [""; 0]);
}

#[test]
fn an_attempt_that_comes_before_its_delay_is_early_and_a_source_that_is_left_behind_is_not() {
    let second = 1_000_000;
    let again = |after, attempt| {
        let mut script = held(AckLevel::Confirmed);
        script.push(What::SettleInvoke { delivery: 1, verb: Verb::Nack, delay: second }).fault(&[0]).lost().answered(1);
        script.wait(after).delivered(2, "a", attempt).names()
    };
    assert_eq!(again(second, 2), [""; 0]);
    assert_eq!(again(second / 2, 2), ["early-redelivery"]);
    assert_eq!(again(second / 2, 1), [""; 0]);
}
