//! Where messages lie, epochs, and who is served again.

use anybroker_core::Position;

use super::*;

impl Script {
    fn stored(&mut self, id: &str, sequence: u64, position: u64) -> &mut Self {
        let call = self.invoke(id, "k", sequence);
        self.push(What::PublishOk { call, duplicate: false, position: Some(Position::new(position)) })
    }

    fn came(&mut self, delivery: u64, id: &str, epoch: u32, position: Option<u64>) -> &mut Self {
        self.delivered(delivery, id, 1);
        let Some(What::Deliver(seen)) = self.events.last_mut().map(|event| &mut event.what) else { unreachable!() };
        (seen.epoch, seen.position) = (epoch, position.map(Position::new));
        self
    }
}

#[test]
fn a_position_holds_one_message_and_a_receipt_tells_which() {
    let mut script = Script::new();
    script.member().stored("a", 1, 4).stored("b", 2, 5).came(1, "a", 0, Some(4)).came(2, "b", 0, Some(5));
    assert_eq!(script.names(), [""; 0]);
    // The same message lies where it lay, when it comes again.
    script.settled(1, Verb::Nack);
    script.delivered(3, "a", 2);
    assert_eq!(script.names(), [""; 0]);

    let mut twice = Script::new();
    twice.member().published("a", "k", 1).published("b", "k", 2).came(1, "a", 0, Some(4)).came(2, "b", 0, Some(4));
    assert_eq!(twice.names(), ["position-conflict"]);

    let mut elsewhere = Script::new();
    elsewhere.member().stored("a", 1, 4).came(1, "a", 0, Some(5));
    assert_eq!(elsewhere.names(), ["position-conflict"]);
    // One that may be stored twice may be at either place.
    let mut unknown = Script::new();
    unknown.member().stored("a", 1, 4).invoke("a", "k", 2);
    unknown.came(1, "a", 0, Some(5));
    assert_eq!(unknown.names(), [""; 0]);
}

#[test]
fn the_epoch_of_a_lane_never_falls() {
    let mut script = Script::new();
    script.member().published("a", "k", 1).published("b", "k", 2).published("c", "k", 3);
    script.came(1, "a", 1, None).came(2, "b", 2, None);
    assert_eq!(script.names(), [""; 0]);
    script.came(3, "c", 1, None);
    assert_eq!(script.names(), ["epoch-fell"]);
}

#[test]
fn who_is_served_again_says_so() {
    let degraded = || {
        let mut script = Script::new();
        script.member().published("a", "k", 1).push(What::Degraded { subscription: 1 });
        // It may have had this one already.
        script.delivered(1, "a", 1);
        script
    };
    let mut silent = degraded();
    assert_eq!(silent.names(), [""; 0]);
    silent.published("b", "k", 2).delivered(2, "b", 1);
    assert_eq!(silent.names(), [""; 0], "the rest of what it reads may not be served yet");
    silent.wait(4_000_000).published("c", "k", 3).delivered(3, "c", 1);
    assert_eq!(silent.names(), [""; 0]);
    silent.wait(2_000_000).published("d", "k", 4);
    assert_eq!(silent.names(), ["unrecovered"], "where the history ends");
    silent.delivered(4, "d", 1).wait(6_000_000).push(What::Recovered { subscription: 1 });
    assert_eq!(silent.names(), ["unrecovered"; 2], "too late, and once for each time that it showed it");
    let mut told = degraded();
    told.push(What::Recovered { subscription: 1 }).published("b", "k", 2).delivered(2, "b", 1);
    assert_eq!(told.names(), [""; 0]);
}
