//! The broker is killed and comes back, while a publisher and a member go on.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::HashSet;
use std::process::Command;
use std::time::Duration;

use anybroker_core::{Effect, PublishOptions, SubscriptionEvent, ack};
use common::{LONG, connect, nothing, number, numbered, url};
use tokio::time::Instant;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_confirmed_survives_a_kill_and_everybody_goes_on_by_himself() {
    let Some(url) = url() else { return };
    let Some(xtask) = std::env::var_os("ANYBROKER_XTASK") else {
        println!("not run: ANYBROKER_XTASK is not set (cargo xtask test sets it)");
        return;
    };
    let bus = connect(&url, "partitions=1").await;
    let name = common::unique("restart");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let publishing = tokio::spawn({
        let (bus, name) = (bus.clone(), name.clone());
        async move {
            let options = PublishOptions::default().with_timeout(Duration::from_secs(3));
            let (mut stored, mut unknown) = (HashSet::new(), HashSet::new());
            let start = Instant::now();
            let mut next = 0;
            // Over the kill and well beyond the return.
            while start.elapsed() < Duration::from_secs(20) {
                for (entry, outcome) in
                    bus.submit(numbered(&name, next..next + 10), &options).await.await.iter().enumerate()
                {
                    let number = next + u32::try_from(entry).unwrap();
                    match outcome {
                        Ok(_) => stored.insert(number),
                        Err(error) if error.effect() == Effect::Unknown => unknown.insert(number),
                        Err(_) => false,
                    };
                }
                next += 10;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            (stored, unknown)
        }
    });
    let restart = tokio::task::spawn_blocking(move || {
        let act =
            |verb: &str| assert!(Command::new(&xtask).args(["brokers", verb, "kafka"]).status().unwrap().success());
        act("kill");
        act("restart");
    });
    let (mut seen, mut events) = (HashSet::new(), Vec::new());
    let until = Instant::now() + Duration::from_secs(22);
    while Instant::now() < until {
        let received = subscriber.receive_all(100, Duration::from_millis(200)).await.unwrap();
        seen.extend(received.deliveries.iter().map(number));
        events.extend(received.events);
        assert!(ack(received.deliveries).await.iter().all(Result::is_ok));
    }
    restart.await.unwrap();
    let (stored, unknown) = publishing.await.unwrap();
    println!("{} stored, {} unknown, {} seen; {events:?}", stored.len(), unknown.len(), seen.len());
    let deadline = Instant::now() + LONG;
    while !stored.is_subset(&seen) {
        assert!(Instant::now() < deadline, "lost: {:?}", stored.difference(&seen).collect::<Vec<_>>());
        let deliveries = subscriber.receive(100, Duration::from_secs(1)).await.unwrap();
        seen.extend(deliveries.iter().map(number));
        drop(ack(deliveries));
    }
    assert!(stored.len() > 50, "it went on after the return: {}", stored.len());
    // Nothing that certainly is not stored came.
    assert!(seen.iter().all(|number| stored.contains(number) || unknown.contains(number)));
    assert!(events.iter().any(|event| matches!(event, SubscriptionEvent::Degraded { .. })), "{events:?}");
    assert!(events.contains(&SubscriptionEvent::Recovered), "{events:?}");
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
}
