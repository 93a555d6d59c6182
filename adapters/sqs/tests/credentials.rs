//! Credentials that are replaced while a service runs. The emulators look at none: a proxy before them lets in one access key, and
//! answers to others as Amazon does.
#![allow(clippy::unwrap_used, reason = "test code")]

#[path = "common/answers.rs"]
mod answers;
mod common;

use std::time::Duration;

use answers::Proxy;
use anybroker_core::{Bus, Config, Credentials, Effect, ErrorKind, Registry, Retry, Secret, SubscriptionEvent, ack};
use anybroker_sqs::SqsDriver;
use anybroker_testing::Vault;
use common::{LONG, host, localstack_url, nothing, numbered, publish, receive, unique, url};
use tokio::time::Instant;

fn access(key: &str) -> Credentials {
    Credentials::AccessKey { id: key.into(), secret: Secret::new("of the test"), session_token: None }
}

async fn connect(url: &str, vault: &Vault) -> anybroker_core::Result<Bus> {
    let config = Config::from_url(url).with_credentials(vault.clone());
    Registry::new().with(SqsDriver).connect(config).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn access_keys_are_replaced_while_queues_are_in_use() {
    let Some(url) = url() else { return };
    replaced(&url).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn access_keys_are_replaced_while_fifo_queues_are_in_use() {
    let Some(url) = url() else { return };
    replaced(&format!("{url}&mode=fifo")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn access_keys_are_replaced_while_topics_are_in_use() {
    let Some(url) = localstack_url() else { return };
    replaced(&url).await;
}

async fn replaced(url: &str) {
    let proxy = Proxy::to(host(url)).await;
    proxy.lets_in("FIRST");
    let vault = Vault::saying(Ok(access("FIRST")));
    let bus = connect(&url.replace(&host(url), &proxy.address().to_string()), &vault).await.unwrap();
    let name = unique("rotated");
    let mut subscriber =
        bus.subscribe(bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(5))).await.unwrap();
    publish(&bus, numbered(&name, 0..20)).await;
    let first = receive(&mut subscriber, 20).await;
    assert_eq!(vault.asked(), 1, "for all these requests");

    // The provider knows the new ones: nobody notices.
    vault.says(Ok(access("SECOND")));
    proxy.lets_in("SECOND");
    publish(&bus, numbered(&name, 20..40)).await;
    assert!(ack(first).await.iter().all(Result::is_ok));
    let second = receive(&mut subscriber, 20).await;
    assert!(ack(second).await.iter().all(Result::is_ok));

    // The provider does not know them yet.
    proxy.lets_in("THIRD");
    let outcomes = bus.publish(numbered(&name, 40..45)).await;
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert_eq!((error.kind(), error.effect()), (ErrorKind::Unauthenticated, Effect::NotDone), "{error}");
        assert_eq!(error.retry(), Retry::Later(None));
    }
    let mut told = false;
    let deadline = Instant::now() + LONG;
    while !told {
        assert!(Instant::now() < deadline, "the subscriber was told nothing");
        let received = subscriber.receive_all(50, Duration::from_secs(1)).await.unwrap();
        assert!(received.deliveries.is_empty());
        told = received.events.iter().any(|event| matches!(event, SubscriptionEvent::Degraded { .. }));
    }
    // A vault that is closed says nothing of a queue, whatever it answers.
    vault.says(Err("sealed"));
    let outcomes = bus.publish(numbered(&name, 40..41)).await;
    let error = outcomes.into_iter().next().unwrap().unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Unavailable, Effect::NotDone), "{error}");
    assert!(error.to_string().contains("sealed"), "{error}");

    vault.says(Ok(access("THIRD")));
    publish(&bus, numbered(&name, 40..60)).await;
    let third = receive(&mut subscriber, 20).await;
    assert!(ack(third).await.iter().all(Result::is_ok));
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_provider_says_at_first_is_told_by_connect() {
    let Some(url) = url() else { return };
    let vault = Vault::saying(Ok(access("FIRST")));
    let told = async |said| {
        vault.says(said);
        connect(&url, &vault).await.map(drop).unwrap_err()
    };
    let closed = told(Err("sealed")).await;
    assert_eq!(closed.kind(), ErrorKind::NotFound);
    let unfit = told(Ok(Credentials::Token(Secret::new("MARKER")))).await;
    assert_eq!(unfit.kind(), ErrorKind::ConfigInvalid);
    assert!(unfit.to_string().contains("expected an access key") && !unfit.to_string().contains("MARKER"), "{unfit}");
    let proxy = Proxy::to(host(&url)).await;
    proxy.lets_in("SECOND");
    vault.says(Ok(access("FIRST")));
    let refused = connect(&url.replace(&host(&url), &proxy.address().to_string()), &vault).await.map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unauthenticated);
}

#[test]
fn what_stands_beside_a_provider_is_a_mistake() {
    for setting in ["session_token=x", "profile=x"] {
        let config = Config::from_url(format!("sqs://localhost?region=x&{setting}"))
            .with_credentials(Vault::saying(Ok(access("A"))));
        let error = Registry::new().with(SqsDriver).check(config).unwrap_err();
        assert!(error.message().contains("provider"), "{error}");
    }
}
