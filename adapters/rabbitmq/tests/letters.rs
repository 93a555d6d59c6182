//! Dead letters: complete and in order, whatever the server does to their order when they are given back.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use anybroker_core::{
    Bus, DeadLetter, ErrorKind, Message, Order, Reason, RedriveOptions, Settlement, TopologySpec, Verdict, settle,
};
use common::{LONG, connect, number, numbered, publish, receive, unique, url};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;

fn numbers(found: &[DeadLetter]) -> Vec<u32> {
    found.iter().map(|letter| std::str::from_utf8(letter.message.bytes()).unwrap().parse().unwrap()).collect()
}

/// A group of which `count` messages are dead, in their order.
async fn dead(bus: &Bus, name: &str, count: u32) {
    let mut subscriber = bus.subscribe(bus.subscription(name, "g").with_max_in_flight(200)).await.unwrap();
    publish(bus, numbered(name, 0..count)).await;
    let mut left = count as usize;
    while left > 0 {
        let deliveries = receive(&mut subscriber, left.min(100)).await;
        left -= deliveries.len();
        let verdict = || Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected)));
        for outcome in settle(deliveries.into_iter().map(|delivery| (delivery, verdict())).collect()).await {
            outcome.unwrap();
        }
    }
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_keep_their_order_through_readings() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("letters");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..40)).await;
    for delivery in receive(&mut subscriber, 40).await {
        let verdict = Verdict::new(Reason::Rejected).with_detail("line\r\nbreak ".repeat(1_000));
        delivery.dead_letter(verdict).await.unwrap();
    }
    let letters = bus.dead_letters(name.as_str(), "g").unwrap();
    for _ in 0..8 {
        let page = letters.page(None, 7).await.unwrap();
        assert_eq!(numbers(&page.letters), (0..7).collect::<Vec<_>>());
        let page = letters.page(page.next, 100).await.unwrap();
        assert_eq!(numbers(&page.letters), (7..40).collect::<Vec<_>>());
        assert_eq!(page.next, None);
    }
    assert_eq!(letters.purge(&Default::default()).await.unwrap(), 40);
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_server_lets_expire_is_a_letter_with_that_reason() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("expired");
    bus.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    let message = Message::new(name.as_str(), "x").with_key("k").with_ttl(Duration::from_millis(50));
    bus.send(message.clone()).await.unwrap();
    let letters = bus.dead_letters(name.as_str(), "g").unwrap();
    let deadline = Instant::now() + LONG;
    let letter = loop {
        assert!(Instant::now() < deadline, "no letter");
        if let Some(letter) = letters.page(None, 10).await.unwrap().letters.pop() {
            break letter;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!((letter.message, letter.reason), (message.without_instructions(), Reason::Expired));
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_letters_than_a_page_holds_are_redriven_in_order_and_purged_without_a_rest() {
    const COUNT: u32 = 1_100;
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("many");
    dead(&bus, &name, COUNT).await;
    let letters = bus.dead_letters(name.as_str(), "g").unwrap();
    // Readings of a few, which leave the server's queue in no order.
    for max in [1, 70, 3] {
        let page = letters.page(None, max).await.unwrap();
        assert_eq!(numbers(&page.letters), (0..u32::try_from(max).unwrap()).collect::<Vec<_>>());
    }
    let report = letters.redrive(&RedriveOptions::default()).await.unwrap();
    assert_eq!((report.matched, report.moved, report.failed.len()), (u64::from(COUNT), u64::from(COUNT), 0));
    assert!(letters.page(None, 10).await.unwrap().letters.is_empty());
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g").with_order(Order::Key)).await.unwrap();
    let mut came = Vec::new();
    while came.len() < COUNT as usize {
        let deliveries = receive(&mut subscriber, 1).await;
        came.extend(deliveries.iter().map(number));
        let verdict = || Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected)));
        for outcome in settle(deliveries.into_iter().map(|delivery| (delivery, verdict())).collect()).await {
            outcome.unwrap();
        }
    }
    assert_eq!(came, (0..COUNT).collect::<Vec<_>>());
    subscriber.close(LONG).await.unwrap();
    assert_eq!(letters.purge(&Default::default()).await.unwrap(), u64::from(COUNT));
    assert!(letters.page(None, 10).await.unwrap().letters.is_empty());
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_meet_see_every_letter_each() {
    let Some(url) = url() else { return };
    let name = unique("readers");
    let bus = connect(&url, "").await;
    dead(&bus, &name, 300).await;
    // Connections of their own know as little of each other as processes do.
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let (url, name) = (url.clone(), name.clone());
            tokio::spawn(async move {
                let bus = connect(&url, "").await;
                let letters = bus.dead_letters(name.as_str(), "g").unwrap();
                for _ in 0..4 {
                    let page = letters.page(None, 1_000).await.unwrap();
                    assert_eq!(numbers(&page.letters), (0..300).collect::<Vec<_>>());
                }
                bus.close(LONG).await.unwrap();
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_is_not_there_has_no_letters_and_says_so() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("nobody");
    bus.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    let letters = bus.dead_letters(name.as_str(), "g").unwrap();
    assert!(letters.page(None, 10).await.unwrap().letters.is_empty());
    let error = bus.dead_letters(name.as_str(), "other").unwrap().page(None, 10).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// An operator bounds queues by a policy: a letter for which there is no room is refused, and no older one goes for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_that_an_operators_policy_has_no_room_for_are_refused_and_drop_none() {
    let Some(url) = url() else { return };
    for mode in ["quorum", "classic", "stream"] {
        let bus = connect(&url, &format!("queue={mode}")).await;
        let name = unique("bounded");
        let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
        let queue = format!("anybroker.{name}=g=g=letters");
        let (pattern, policy) = (format!("^{}$", queue.replace('.', "\\\\.")), format!("/api/policies/%2f/{name}"));
        let bound = format!(r#"{{"pattern":"{pattern}","definition":{{"max-length":2}},"apply-to":"queues"}}"#);
        admin(&url, "PUT", &policy, &bound).await;
        let described = format!("/api/queues/%2f/{}", queue.replace('=', "%3D"));
        let deadline = Instant::now() + LONG;
        while !admin(&url, "GET", &described, "").await.contains(&format!(r#""policy":"{name}""#)) {
            assert!(Instant::now() < deadline, "{mode}: the policy takes no effect");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        publish(&bus, numbered(&name, 0..8)).await;
        let mut buried = Vec::new();
        for delivery in receive(&mut subscriber, 8).await {
            let number = number(&delivery);
            match delivery.dead_letter(Verdict::new(Reason::Rejected)).await {
                Ok(_) => buried.push(number),
                Err(failed) => assert_eq!(failed.error().kind(), ErrorKind::Unavailable, "{mode}: {failed:?}"),
            }
        }
        assert!(buried.len() < 8, "{mode}: there was room for all");
        let letters = bus.dead_letters(name.as_str(), "g").unwrap();
        let page = letters.page(None, 100).await.unwrap();
        let found = numbers(&page.letters);
        assert!(buried.iter().all(|number| found.contains(number)), "{mode}: of {buried:?} there are {found:?}");
        admin(&url, "DELETE", &policy, "").await;
        subscriber.close(LONG).await.unwrap();
        bus.delete(name.as_str(), None).await.unwrap();
        bus.close(LONG).await.unwrap();
    }
}

/// What the management plugin answers.
async fn admin(url: &str, method: &str, path: &str, body: &str) -> String {
    let address = url.split("admin=http://").nth(1).unwrap().split('&').next().unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.0\r\nAuthorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.split_whitespace().nth(1).is_some_and(|code| code.starts_with('2')), "{method} {path}: {answer}");
    answer
}
