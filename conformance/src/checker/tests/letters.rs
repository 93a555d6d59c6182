//! Letters that nobody caused, and what letters tell of attempts.

use super::*;

/// What the checker says of a letter with that reason of a message that was handed out and dropped so often.
fn of_dropped(crash_limit: Option<u32>, hand_overs: u64, is_counted: bool, reason: &str) -> Vec<&'static str> {
    let mut script = Script::new();
    (script.crash_limit, script.rules.hand_overs) = (crash_limit, is_counted);
    script.member().published("a", "k", 1);
    for delivery in 1..=hand_overs {
        script.delivered(delivery, "a", 1).push(What::Dropped { delivery });
    }
    script.letter_of(9, "a", reason, 1).names()
}

#[test]
fn a_letter_of_the_crash_limit_needs_the_limit_and_as_many_hand_overs_without_an_outcome() {
    assert_eq!(of_dropped(Some(3), 3, true, "crash_limit"), [""; 0]);
    assert_eq!(of_dropped(None, 3, true, "crash_limit"), ["unjustified-dead-letter"]);
    assert_eq!(of_dropped(Some(3), 2, true, "crash_limit"), ["unjustified-dead-letter"]);
    // A broker's own count has more than what members were handed; what none of them has seen is buried by nobody.
    assert_eq!(of_dropped(Some(3), 2, false, "crash_limit"), [""; 0]);
    assert_eq!(of_dropped(Some(3), 0, false, "crash_limit"), ["unjustified-dead-letter"]);
}

#[test]
fn failures_are_outcomes_and_count_towards_no_crash_limit() {
    let mut script = Script::new();
    script.crash_limit = Some(3);
    script.member().published("a", "k", 1);
    script.delivered(1, "a", 1).settled(1, Verb::Nack).delivered(2, "a", 2).settled(2, Verb::Nack);
    script.delivered(3, "a", 3).push(What::Dropped { delivery: 3 });
    assert_eq!(script.letter_of(9, "a", "crash_limit", 3).names(), ["unjustified-dead-letter"]);
}

#[test]
fn a_letter_of_no_limit_of_ours_is_nobodys() {
    for reason in ["broker_limit", "malformed", "rejected", "attempts_exhausted", "bad-card"] {
        assert_eq!(of_dropped(Some(3), 5, true, reason), ["unjustified-dead-letter"], "{reason}");
    }
}

#[test]
fn a_letter_that_expired_needs_a_time_to_live() {
    let expired = |expires: bool| {
        let mut script = Script::new();
        script.member().published("a", "k", 1);
        for event in &mut script.events {
            if let What::PublishInvoke { expires: of, .. } = &mut event.what {
                *of = expires;
            }
        }
        script.letter_of(9, "a", "expired", 0).drained().names()
    };
    assert_eq!(expired(true), [""; 0]);
    // Whatever it says: nobody has seen the message, and it is no dead letter.
    assert_eq!(expired(false), ["unjustified-dead-letter"]);
}

#[test]
fn a_letter_that_is_parked_needs_one_of_its_key_before_it_and_a_member_that_parks() {
    let parked = |on_failure, key: &str| {
        let mut script = Script::new();
        script.subscribed(1, Order::Key, on_failure).published("a", "k", 1).published("b", key, 2);
        script.delivered(1, "a", 1).settled(1, Verb::DeadLetter).letter(9, "a");
        script.letter_of(9, "b", "parked", 0).drained().names()
    };
    assert_eq!(parked(OnFailure::Park, "k"), [""; 0]);
    assert_eq!(parked(OnFailure::Park, "other"), ["unjustified-dead-letter"]);
    assert_eq!(parked(OnFailure::GoPast, "k"), ["unjustified-dead-letter"]);
}

#[test]
fn a_letter_tells_the_attempt_at_which_it_was_buried() {
    let told = |count, attempts| {
        let mut script = Script::new();
        script.rules.attempts = count;
        script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::Nack);
        script.delivered(2, "a", 2).settled(2, Verb::DeadLetter);
        script.letter_of(9, "a", "rejected", attempts).drained().names()
    };
    for count in [AttemptCount::Exact, AttemptCount::Volatile] {
        assert_eq!(told(count, 2), [""; 0]);
        assert_eq!(told(count, 1), ["attempt-mismatch"]);
        assert_eq!(told(count, 3), ["attempt-mismatch"]);
    }
    assert_eq!(told(AttemptCount::Approximate, 3), [""; 0]);
    assert_eq!(told(AttemptCount::Approximate, 1), ["attempt-mismatch"]);
}

#[test]
fn a_letter_that_no_handler_buried_tells_no_attempt_that_there_was_not() {
    let told = |attempts| {
        let mut script = Script::new();
        script.crash_limit = Some(1);
        script.member().published("a", "k", 1).delivered(1, "a", 1).push(What::Dropped { delivery: 1 });
        script.letter_of(9, "a", "crash_limit", attempts).names()
    };
    assert_eq!(told(1), [""; 0]);
    assert_eq!(told(2), ["attempt-mismatch"]);
}

#[test]
fn a_last_failure_that_came_too_late_may_have_made_a_letter() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::Nack);
    script.delivered(2, "a", 2).settled(2, Verb::Nack).delivered(3, "a", 3).wait(LEASE).delivered(4, "a", 3);
    script.settled(3, Verb::Nack).settled(4, Verb::Ack).letter_of(9, "a", "attempts_exhausted", 3).drained();
    assert_eq!(script.names(), [""; 0]);
}
