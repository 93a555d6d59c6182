//! What a fault justifies, and what it does not.

use super::*;

impl Script {
    pub(super) fn fault(&mut self, clients: &[u32]) -> &mut Self {
        self.push(What::FaultBegin { fault: 1, kind: "cut".into(), clients: clients.to_vec(), connections: 1 });
        self.push(What::FaultEnd { fault: 1, connections: 1, bytes: 0 })
    }

    fn killed(&mut self) -> &mut Self {
        self.push(What::FaultBegin { fault: 2, kind: KILLED.into(), clients: vec![0], connections: 0 });
        self.push(What::FaultEnd { fault: 2, connections: 0, bytes: 0 })
    }

    /// A node of the cluster.
    fn node_killed(&mut self, away: u64) -> &mut Self {
        let kind = "node 2 killed".into();
        self.push(What::FaultBegin { fault: 2, kind, clients: vec![0], connections: 0 }).wait(away);
        self.push(What::FaultEnd { fault: 2, connections: 0, bytes: 0 })
    }

    /// The member says that its connection was lost, and that it has it again.
    pub(super) fn lost(&mut self) -> &mut Self {
        self.push(What::Degraded { subscription: 1 }).push(What::Recovered { subscription: 1 })
    }

    fn faults(&self) -> (u64, u64) {
        let counts = check(&self.events, self.rules).1;
        (counts.faults, counts.faults_met)
    }
}

#[test]
fn recovery_is_the_longest_from_the_end_of_a_fault_to_what_a_client_does_next() {
    let recovery = |script: &Script| check(&script.events, script.rules).1.recovery_ms;
    let mut script = held("a");
    assert_eq!(recovery(&script), None, "there was no fault");
    script.fault(&[0, 7]).wait(1_990);
    assert_eq!(recovery(&script), None, "nobody has done anything since");
    script.published("b", "k", 2);
    assert_eq!(recovery(&script), Some(3), "2.01 ms until it was confirmed, rounded up; client 7 has done nothing");
    script.wait(LATER).delivered(2, "b", 1);
    assert_eq!(recovery(&script), Some(3), "it works already");
    script.fault(&[0]).wait(500).fault(&[0]).wait(7_000).delivered(3, "a", 1);
    assert_eq!(recovery(&script), Some(8), "from the end of the last of two faults in a row");
}

/// Longer than anything is under way after a fault.
const LATER: u64 = 16_000_000;

/// With a lease that does not end meanwhile.
fn held(id: &str) -> Script {
    let mut script = Script::new();
    script.lease = 1_000_000_000;
    script.member().published(id, "k", 1).delivered(1, id, 1);
    script
}

#[test]
fn a_fault_justifies_a_duplicate_of_what_was_held_and_of_nothing_later() {
    let mut script = held("a");
    script.fault(&[0]).lost().delivered(2, "a", 1);
    assert_eq!((script.names(), script.faults()), (vec![], (1, 1)));
    script.wait(LATER).published("b", "k", 2).delivered(3, "b", 1).delivered(4, "b", 1);
    assert_eq!(script.names(), ["unjustified-duplicate"]);
}

#[test]
fn a_brokers_own_count_may_count_what_was_fetched_on_a_connection_that_a_fault_hit() {
    let first_is_the_second = |attempts, clients: &[u32], was_there: bool| {
        let mut script = Script::new();
        script.rules.attempts = attempts;
        script.member();
        match was_there {
            true => script.published("a", "k", 1).fault(clients),
            false => script.fault(clients).wait(LATER).published("a", "k", 1),
        };
        script.delivered(1, "a", 2);
        script.names()
    };
    assert_eq!(first_is_the_second(AttemptCount::Approximate, &[0], true), [""; 0]);
    assert_eq!(first_is_the_second(AttemptCount::Approximate, &[7], true), ["attempt-mismatch"]);
    assert_eq!(first_is_the_second(AttemptCount::Approximate, &[0], false), ["attempt-mismatch"]);
    assert_eq!(first_is_the_second(AttemptCount::Exact, &[0], true), ["attempt-mismatch"]);
}

#[test]
fn an_ack_without_an_answer_when_its_message_came_again_does_not_contradict_the_letter_that_was_made_of_it() {
    let acked_and_buried = |answered_before: bool| {
        let mut script = held("a");
        script.rules.level = AckLevel::Sent;
        script.asked(1, Verb::Release);
        script.push(What::FaultBegin { fault: 1, kind: "cut".into(), clients: vec![0], connections: 1 });
        script.push(What::SettleOk { delivery: 1, level: AckLevel::Recorded });
        script.delivered(2, "a", 1).asked(2, Verb::Ack);
        if answered_before {
            script.answered(2).wait(LATER);
        }
        script.delivered(3, "a", 1).settled(3, Verb::DeadLetter);
        if !answered_before {
            script.answered(2);
        }
        script.push(What::FaultEnd { fault: 1, connections: 1, bytes: 0 }).lost().letter(9, "a").drained();
        script.names()
    };
    assert_eq!(acked_and_buried(false), [""; 0]);
    assert_eq!(acked_and_buried(true), [""; 0]);
}

#[test]
fn a_fault_of_other_clients_justifies_nothing_and_meets_nothing() {
    let mut script = held("a");
    script.fault(&[7]).delivered(2, "a", 1);
    assert_eq!((script.names(), script.faults()), (vec!["unjustified-duplicate"], (1, 0)));
}

#[test]
fn a_fault_that_costs_no_connection_justifies_no_duplicate() {
    let mut script = held("a");
    script.fault(&[0]).delivered(2, "a", 1);
    assert_eq!(script.names(), ["unjustified-duplicate"]);
    let counts = check(&script.events, script.rules).1;
    assert_eq!((counts.duplicates_justified, counts.duplicates_unjustified), (0, 1));
    // Long afterwards it is another loss.
    script.wait(LATER).lost();
    assert_eq!(script.names(), ["unjustified-duplicate"]);
}

#[test]
fn a_lost_connection_brings_a_message_back_once() {
    let mut script = held("a");
    script.fault(&[0]).lost().delivered(2, "a", 1).delivered(3, "a", 1);
    assert_eq!(script.names(), ["unjustified-duplicate"]);
    let mut script = held("a");
    script.fault(&[0]).lost().delivered(2, "a", 1).lost().delivered(3, "a", 1);
    assert_eq!(script.names(), [""; 0]);
}

#[test]
fn a_member_that_was_not_told_of_a_loss_hands_out_once_what_another_one_has_settled() {
    let stale = |before: &dyn Fn(&mut Script), times: u64, after: &dyn Fn(&mut Script)| {
        let mut script = Script::new();
        script.lease = 1_000_000_000;
        script.member().subscribed(2, Order::None, OnFailure::GoPast);
        script.events.last_mut().unwrap().client = 7;
        script.published("a", "k", 1).fault(&[0]);
        before(&mut script);
        script.delivered_to(2, 1, "a", 1).settled(1, Verb::Ack);
        for delivery in 2..2 + times {
            script.delivered(delivery, "a", 1);
        }
        after(&mut script);
        script.names()
    };
    let nothing = |_: &mut Script| {};
    let lost = |script: &mut Script| {
        script.lost();
    };
    assert_eq!(stale(&nothing, 1, &lost), [""; 0]);
    assert_eq!(stale(&nothing, 2, &lost), ["ack-lost"]);
    assert_eq!(stale(&nothing, 1, &nothing), ["unjustified-duplicate"], "it never says that its connection was lost");
    assert_eq!(stale(&lost, 1, &nothing), ["ack-lost"], "it has been told");
    let lost_and_hit_again = |script: &mut Script| {
        script.lost().fault(&[0]);
    };
    assert_eq!(stale(&lost_and_hit_again, 1, &lost), [""; 0], "of the first loss it was told, of the second not yet");
    assert_eq!(stale(&lost_and_hit_again, 2, &lost), ["ack-lost"]);
}

#[test]
fn what_a_member_that_was_not_told_of_a_loss_hands_out_is_not_the_return_that_another_ones_nack_brings() {
    let nacked_then = |is_told: bool, attempts: &[u32]| {
        let mut script = Script::new();
        script.lease = 1_000_000_000;
        script.member().subscribed(2, Order::None, OnFailure::GoPast);
        script.events.last_mut().unwrap().client = 7;
        script.published("a", "k", 1).fault(&[0]);
        if is_told {
            script.lost();
        }
        script.delivered_to(2, 1, "a", 1).asked(1, Verb::Nack);
        script.delivered(2, "a", attempts[0]).answered(1);
        for (delivery, attempt) in (3..).zip(&attempts[1..]) {
            script.delivered_to(2, delivery, "a", *attempt);
        }
        script.lost();
        script.names()
    };
    assert_eq!(nacked_then(false, &[1, 2]), [""; 0]);
    assert_eq!(nacked_then(false, &[2]), [""; 0], "the return itself may come to it");
    assert_eq!(nacked_then(false, &[1, 1]), ["attempt-mismatch"], "the return has the next number");
    assert_eq!(nacked_then(false, &[1, 2, 2]), ["unjustified-duplicate"], "each comes once");
    assert_eq!(nacked_then(true, &[1]), ["attempt-mismatch"], "it has been told");
}

#[test]
fn what_a_member_that_was_not_told_of_a_loss_fails_or_releases_counts_on_its_own_beside_what_another_one_fails() {
    let two_members = || {
        let mut script = Script::new();
        script.lease = 1_000_000_000;
        script.member().subscribed(2, Order::None, OnFailure::GoPast);
        script.events.last_mut().unwrap().client = 7;
        script.published("a", "k", 1);
        script
    };
    let copy_comes = |attempt| {
        let mut script = two_members();
        script.delivered(1, "a", 1).fault(&[0]).delivered_to(2, 2, "a", 1).settled(2, Verb::Nack);
        script.settled(1, Verb::Nack).delivered_to(2, 3, "a", 2).settled(3, Verb::Nack);
        script.delivered_to(2, 4, "a", attempt).lost();
        script.names()
    };
    assert_eq!(copy_comes(2), [""; 0]);
    assert_eq!(copy_comes(1), ["attempt-mismatch"]);
    let released_comes = |attempt| {
        let mut script = two_members();
        script.fault(&[0]).delivered_to(2, 1, "a", 1).settled(1, Verb::Nack).delivered_to(2, 2, "a", 2);
        script.settled(2, Verb::Nack).delivered(3, "a", 1).settled(3, Verb::Release).delivered(4, "a", attempt).lost();
        script.names()
    };
    assert_eq!(released_comes(1), [""; 0]);
    assert_eq!(released_comes(4), ["attempt-mismatch"; 2]);
}

#[test]
fn a_member_that_was_not_told_of_a_loss_hands_out_of_a_key_what_it_has_while_another_one_holds_the_key() {
    let both = |hit: &[u32], is_told: bool| {
        let mut script = Script::new();
        script.lease = 1_000_000_000;
        script.subscribed(1, Order::Key, OnFailure::GoPast).subscribed(2, Order::Key, OnFailure::GoPast);
        script.events.last_mut().unwrap().client = 7;
        script.published("a", "k", 1).published("b", "k", 2).fault(hit);
        if is_told {
            script.lost();
        }
        script.delivered_to(2, 1, "a", 1).delivered_to(1, 2, "b", 1);
        script.names()
    };
    assert_eq!(both(&[0], false), [""; 0]);
    assert_eq!(both(&[0], true), ["concurrent-key"], "it has been told");
    assert_eq!(both(&[8], false), ["concurrent-key"], "a fault of somebody else");
    let goes_on_beside = |stale: bool| {
        let mut script = Script::new();
        script.lease = 1_000_000_000;
        script.subscribed(1, Order::Key, OnFailure::GoPast).subscribed(2, Order::Key, OnFailure::GoPast);
        script.events.last_mut().unwrap().client = 7;
        script.published("a", "k", 1).published("b", "k", 2).published("c", "k", 3);
        match stale {
            true => script.fault(&[0]).delivered_to(2, 1, "a", 1).settled(1, Verb::Ack).delivered_to(1, 2, "a", 1),
            false => script.delivered_to(1, 2, "a", 1),
        };
        script.delivered_to(2, 3, "b", 1).lost();
        script.names()
    };
    assert_eq!(goes_on_beside(true), [""; 0]);
    assert_eq!(goes_on_beside(false), ["concurrent-key"]);
}

#[test]
fn what_one_member_gives_back_and_another_has_acked_keeps_no_later_message_of_its_key_back() {
    let given_back = |is_acked: bool| {
        let mut script = Script::new();
        script.lease = 1_000_000_000;
        script.subscribed(1, Order::Key, OnFailure::Block).subscribed(2, Order::Key, OnFailure::Block);
        script.events.last_mut().unwrap().client = 7;
        script.published("a", "k", 1).published("b", "k", 2);
        match is_acked {
            true => script.fault(&[0]).delivered_to(2, 1, "a", 1).settled(1, Verb::Ack).delivered_to(1, 2, "a", 1),
            false => script.delivered_to(2, 2, "a", 1),
        };
        script.asked(2, Verb::Nack);
        let (kind, effect) = (ErrorKind::StaleDelivery, Effect::Unknown);
        script.push(What::SettleFail { delivery: 2, kind, effect }).delivered_to(2, 3, "b", 1).lost();
        script.names()
    };
    assert_eq!(given_back(true), [""; 0]);
    assert_eq!(given_back(false), ["reorder"]);
}

#[test]
fn where_the_broker_keeps_leases_a_fault_brings_nothing_back_before_they_end() {
    let again_after = |micros| {
        let mut script = Script::new();
        script.rules.by_lease = true;
        script.member().published("a", "k", 1).delivered(1, "a", 1).fault(&[0]).wait(micros).delivered(2, "a", 1);
        script.names()
    };
    assert_eq!(again_after(0), ["unjustified-duplicate"]);
    assert_eq!(again_after(LEASE), [""; 0]);
}

#[test]
fn an_ack_that_was_confirmed_before_a_fault_stays() {
    let mut script = held("a");
    script.settled(1, Verb::Ack).fault(&[0]).lost().delivered(2, "a", 1);
    assert_eq!(script.names(), ["ack-lost"]);
}

#[test]
fn an_ack_that_was_only_sent_may_be_lost_with_its_connection_and_only_just_before() {
    let sent_before = |micros, is_lost| {
        let mut script = held("a");
        script.rules.level = AckLevel::Sent;
        script.settled(1, Verb::Ack).wait(micros).fault(&[0]);
        if is_lost {
            script.lost();
        }
        script.delivered(2, "a", 1);
        script.names()
    };
    assert_eq!(sent_before(1_000_000, true), [""; 0]);
    assert_eq!(sent_before(1_000_000, false), ["unjustified-duplicate"]);
    assert_eq!(sent_before(10_000_000, true), ["ack-lost"]);
}

#[test]
fn an_ack_that_was_only_sent_is_lost_once() {
    let mut script = held("a");
    script.rules.level = AckLevel::Sent;
    script.settled(1, Verb::Ack).fault(&[0]).lost().lost().delivered(2, "a", 1);
    assert_eq!(script.names(), [""; 0]);
    // Acked on the connection that was made since, it is acked.
    script.wait(LATER).settled(2, Verb::Ack).delivered(3, "a", 1);
    assert_eq!(script.names(), ["unjustified-duplicate"]);
}

#[test]
fn an_ack_that_a_fault_met_and_that_was_confirmed_afterwards_stays() {
    let acked_in_a_fault_then = |by_lease, micros| {
        let mut script = held("a");
        script.rules.by_lease = by_lease;
        script.asked(1, Verb::Ack).fault(&[0]).lost().answered(1);
        script.wait(micros).delivered(2, "a", 1);
        script.names()
    };
    // It may have been handed to another one before the server had the ack, where connections decide on that.
    assert_eq!(acked_in_a_fault_then(false, 0), [""; 0]);
    assert_eq!(acked_in_a_fault_then(false, LATER), ["ack-lost"]);
    assert_eq!(acked_in_a_fault_then(true, 0), ["ack-lost"]);
}

#[test]
fn a_nack_that_was_confirmed_within_the_lease_counts_although_a_fault_met_it() {
    let nacked_in_a_fault_then = |by_lease, attempt| {
        let mut script = held("a");
        script.rules.by_lease = by_lease;
        script.asked(1, Verb::Nack).fault(&[0]).answered(1);
        script.delivered(2, "a", attempt);
        script.names()
    };
    assert_eq!(nacked_in_a_fault_then(true, 1), ["attempt-mismatch"]);
    assert_eq!(nacked_in_a_fault_then(true, 2), [""; 0]);
    // Where it is a copy, the source may come before it, with the count that it had.
    assert_eq!(nacked_in_a_fault_then(false, 1), [""; 0]);
}

#[test]
fn a_publish_that_a_fault_met_may_be_stored_once_more_and_not_twice_more() {
    let mut script = Script::new();
    let call = script.invoke("a", "k", 1);
    script.fault(&[0]).push(What::PublishOk { call, duplicate: false, position: None });
    script.member().delivered(1, "a", 1).settled(1, Verb::Ack).delivered(2, "a", 1).settled(2, Verb::Ack);
    assert_eq!((script.names(), script.faults()), (vec![], (1, 1)));
    // And not at all where the broker remembers ids.
    script.rules.dedup = Some(1_000_000);
    assert_eq!(script.names(), ["ack-lost"]);
    script.rules.dedup = None;
    script.delivered(3, "a", 1);
    assert_eq!(script.names(), ["ack-lost"]);
}

#[test]
fn what_was_held_on_a_lost_connection_and_never_comes_again_is_lost() {
    let mut script = held("a");
    script.fault(&[0]);
    script.asked(1, Verb::Ack);
    let (kind, effect) = (ErrorKind::StaleDelivery, Effect::NotDone);
    script.push(What::SettleFail { delivery: 1, kind, effect }).drained();
    assert_eq!(script.names(), ["lost"]);
}

#[test]
fn a_refused_settle_of_what_has_come_again_excuses_no_further_delivery() {
    let refused = |has_come: bool| {
        let mut script = held("a");
        script.asked(1, Verb::Ack).fault(&[0]).lost();
        if has_come {
            script.delivered(2, "a", 1);
        }
        let (kind, effect) = (ErrorKind::StaleDelivery, Effect::NotDone);
        script.push(What::SettleFail { delivery: 1, kind, effect }).wait(LATER);
        script.delivered(3, "a", 1);
        script.names()
    };
    assert_eq!(refused(false), [""; 0]);
    assert_eq!(refused(true), ["unjustified-duplicate"]);
}

#[test]
fn a_copy_that_is_nacked_in_a_fault_counts_although_its_source_came_again_meanwhile() {
    let mut script = held("a");
    script.push(What::FaultBegin { fault: 1, kind: "cut".into(), clients: vec![0], connections: 1 });
    script.asked(1, Verb::Nack);
    let (kind, effect) = (ErrorKind::Unavailable, Effect::Unknown);
    script.push(What::SettleFail { delivery: 1, kind, effect });
    script.push(What::FaultEnd { fault: 1, connections: 1, bytes: 0 }).lost();
    // The copy was stored, and its source not settled: both come. The copy is nacked, and fails.
    script.delivered(2, "a", 2).delivered(3, "a", 1).settled(3, Verb::Ack).settled(2, Verb::Nack);
    script.delivered(4, "a", 3).settled(4, Verb::Ack).drained();
    assert_eq!(script.names(), [""; 0]);
}

#[test]
fn a_source_and_a_copy_whose_acks_were_forgotten_together_are_explained_by_the_loss_that_was_told() {
    let mut script = held("a");
    script.rules.level = AckLevel::Sent;
    script.wait(LATER).asked(1, Verb::Nack);
    script.push(What::FaultBegin { fault: 1, kind: "cut".into(), clients: vec![0], connections: 1 });
    script.answered(1).delivered(2, "a", 2).settled(2, Verb::Ack).lost();
    script.push(What::FaultEnd { fault: 1, connections: 1, bytes: 0 });
    // The second of them comes while the first is out, on a connection that nothing happens to.
    script.delivered(3, "a", 1).delivered(4, "a", 2).settled(3, Verb::Ack).settled(4, Verb::Ack);
    assert_eq!(script.names(), [""; 0]);
    script.wait(LATER).delivered(5, "a", 2);
    assert_eq!(script.names(), ["unjustified-duplicate"]);
}

#[test]
fn a_killed_server_forgets_the_last_acks_once_each_where_the_record_says_so() {
    let again = |forgets: bool, wait: u64, times: u64| {
        let mut script = held("a");
        (script.rules.by_lease, script.rules.forgets) = (true, forgets);
        script.settled(1, Verb::Ack).wait(wait).killed().lost().wait(LEASE);
        for time in 0..times {
            script.delivered(2 + time, "a", 1).settled(2 + time, Verb::Ack).wait(LATER);
        }
        script.names()
    };
    assert_eq!(again(true, 0, 1), [""; 0]);
    assert_eq!(again(true, 0, 2), ["ack-lost"]);
    assert_eq!(again(true, LATER, 1), ["ack-lost"]);
    assert_eq!(again(false, 0, 1), ["ack-lost"]);
}

#[test]
fn what_a_killed_server_has_delivered_comes_again_at_once_where_the_record_says_so() {
    for (forgets, expected) in [(true, vec![]), (false, vec!["unjustified-duplicate"])] {
        let mut script = held("a");
        (script.rules.by_lease, script.rules.forgets) = (true, forgets);
        script.killed().delivered(2, "a", 1).lost();
        assert_eq!(script.names(), expected);
    }
}

#[test]
fn a_killed_node_takes_along_what_it_has_delivered_and_no_ack() {
    for (forgets, expected) in [(true, vec![]), (false, vec!["unjustified-duplicate"])] {
        let mut script = held("a");
        (script.rules.by_lease, script.rules.forgets) = (true, forgets);
        script.node_killed(1_000).delivered(2, "a", 1).lost();
        assert_eq!(script.names(), expected);
    }
    let mut script = held("a");
    (script.rules.by_lease, script.rules.forgets) = (true, true);
    script.settled(1, Verb::Ack).node_killed(1_000).lost().wait(LEASE).delivered(2, "a", 1);
    assert_eq!(script.names(), ["ack-lost"]);
}

#[test]
fn an_ack_of_what_a_killed_server_had_delivered_may_be_without_effect_and_one_of_a_later_delivery_may_not() {
    let again = |early: bool| {
        let mut script = held("a");
        (script.rules.by_lease, script.rules.forgets) = (true, true);
        if early {
            script.killed().lost().wait(1_000);
        } else {
            script.killed().wait(1_000).lost().published("b", "k", 2).delivered(2, "b", 1);
        }
        let (delivery, id) = if early { (1, "a") } else { (2, "b") };
        script.settled(delivery, Verb::Ack).wait(LATER).delivered(3, id, 1);
        script.names()
    };
    assert_eq!(again(true), [""; 0]);
    assert_eq!(again(false), ["ack-lost"]);
}

#[test]
fn a_nack_of_what_a_killed_server_had_delivered_may_meet_what_it_has_delivered_anew_and_that_comes_beside_it_once() {
    let beside = |early: bool, times: u64| {
        let mut script = held("a");
        (script.rules.by_lease, script.rules.forgets) = (true, true);
        let delivery = match early {
            true => 1,
            false => 2,
        };
        script.killed().wait(1_000).lost();
        if !early {
            script.published("b", "k", 2).delivered(2, "b", 1);
        }
        let id = if early { "a" } else { "b" };
        script.settled(delivery, Verb::Nack).delivered(3, id, 2).settled(3, Verb::Ack).wait(LATER);
        for time in 0..times {
            script.delivered(4 + time, id, 1).settled(4 + time, Verb::Ack);
        }
        script.names()
    };
    assert_eq!(beside(true, 1), [""; 0]);
    assert_eq!(beside(true, 2), ["ack-lost"]);
    assert_eq!(beside(false, 1), ["ack-lost"]);
}

#[test]
fn who_releases_what_a_killed_server_has_delivered_to_another_hands_it_out_once_more_while_the_lease_goes_on() {
    let released = |forgets: bool, is_told: bool, wait: u64, times: u64| {
        let mut script = Script::new();
        (script.rules.by_lease, script.rules.forgets, script.lease) = (true, forgets, 1_000_000_000);
        script.member().subscribed(2, Order::None, OnFailure::GoPast).published("a", "k", 1).delivered(1, "a", 1);
        match forgets {
            true => script.killed().lost(),
            false => script.wait(1_001_000_000),
        };
        script.delivered_to(2, 2, "a", 1).settled(2, Verb::DeadLetter).wait(wait).asked(1, Verb::Release);
        match is_told {
            true => script.push(What::SettleOk { delivery: 1, level: AckLevel::Recorded }),
            false => {
                script.push(What::SettleFail { delivery: 1, kind: ErrorKind::StaleDelivery, effect: Effect::NotDone })
            }
        };
        for time in 0..times {
            script.delivered(3 + time, "a", 1).settled(3 + time, Verb::Ack);
        }
        script.letter(9, "a").drained();
        script.names()
    };
    assert_eq!(released(true, true, 0, 1), [""; 0]);
    assert_eq!(released(true, true, 0, 2), ["ack-lost"]);
    assert!(!released(true, false, 0, 1).is_empty(), "it was refused");
    assert!(!released(true, true, 1_000_000_000, 1).is_empty(), "its lease had ended");
    assert!(!released(false, true, 0, 1).is_empty(), "the lease had ended, and no server was killed");
}

#[test]
fn a_burial_that_a_killed_member_had_asked_for_leaves_a_letter_or_the_message_or_both_and_not_neither() {
    let after_the_kill = |has_letter: bool, comes_again: bool| {
        let mut script = held("a");
        script.asked(1, Verb::DeadLetter);
        script.push(What::FaultBegin { fault: 1, kind: "process killed".into(), clients: vec![0], connections: 0 });
        script.push(What::Vanished { subscription: 1 });
        script.push(What::FaultEnd { fault: 1, connections: 0, bytes: 0 });
        script.subscribed(2, Order::None, OnFailure::GoPast);
        if comes_again {
            script.delivered_to(2, 2, "a", 1).settled(2, Verb::Ack);
        }
        if has_letter {
            script.letter(9, "a");
        }
        script.drained();
        script.names()
    };
    for (has_letter, comes_again) in [(true, false), (false, true), (true, true)] {
        assert_eq!(after_the_kill(has_letter, comes_again), [""; 0], "{has_letter} {comes_again}");
    }
    assert_eq!(after_the_kill(false, false), ["lost"]);
}

#[test]
fn a_member_that_is_gone_has_forgotten_no_ack_that_is_older_than_its_level_allows() {
    let again = |level, since_the_ack| {
        let mut script = Script::new();
        script.rules.level = level;
        script.member().published("a", "k", 1).delivered(1, "a", 1).settled(1, Verb::Ack).wait(since_the_ack);
        script.push(What::Vanished { subscription: 1 }).subscribed(2, Order::None, OnFailure::GoPast);
        script.delivered_to(2, 2, "a", 1).names()
    };
    let second = 1_000_000;
    assert_eq!(again(AckLevel::Sent, second), [""; 0]);
    assert_eq!(again(AckLevel::Sent, 3 * second), ["ack-lost"]);
    assert_eq!(again(AckLevel::Recorded, 14 * second), [""; 0]);
    assert_eq!(again(AckLevel::Recorded, 16 * second), ["ack-lost"]);
}

#[test]
fn a_redrive_that_nobody_was_told_of_leaves_a_letter_or_brings_the_message_once_or_both_and_not_neither() {
    let after_it = |comes: u64, has_letter: bool| {
        let mut script = held("a");
        script.settled(1, Verb::DeadLetter).letter(8, "a");
        script.push(What::RedriveInfo { destination: "d".into(), group: "g".into(), ids: vec!["a".into()] });
        for delivery in 2..2 + comes {
            script.delivered(delivery, "a", 1).settled(delivery, Verb::Ack);
        }
        if has_letter {
            script.letter(9, "a");
        }
        script.drained();
        script.names()
    };
    for (comes, has_letter) in [(0, true), (1, false), (1, true)] {
        assert_eq!(after_it(comes, has_letter), [""; 0], "{comes} {has_letter}");
    }
    assert_eq!(after_it(0, false), ["lost"]);
    assert_eq!(after_it(2, false), ["ack-lost"]);
}

#[test]
fn a_letter_that_such_a_redrive_has_left_comes_when_it_is_put_back_unless_its_message_was_back_before() {
    let put_back = |came_before: bool, comes: bool| {
        let mut script = held("a");
        script.settled(1, Verb::DeadLetter).letter(8, "a");
        script.push(What::RedriveInfo { destination: "d".into(), group: "g".into(), ids: vec!["a".into()] });
        if came_before {
            script.delivered(2, "a", 1).settled(2, Verb::Ack);
        }
        script.letter(7, "a");
        script.push(What::RedriveInvoke { destination: "d".into(), group: "g".into(), ids: vec!["a".into()] });
        if comes {
            script.delivered(3, "a", 1).settled(3, Verb::Ack);
        }
        script.drained();
        script.names()
    };
    for (came_before, comes) in [(false, true), (true, false), (true, true)] {
        assert_eq!(put_back(came_before, comes), [""; 0], "{came_before} {comes}");
    }
    assert_eq!(put_back(false, false), ["lost"]);
}
