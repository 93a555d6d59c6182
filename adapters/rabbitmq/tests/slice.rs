//! What is this adapter's own, on a running server.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use anybroker_core::{
    AckLevel, Effect, ErrorKind, Message, Nack, Order, Settlement, Timestamp, TopologySpec, ack, settle,
};
use common::{LONG, Proxy, connect, nothing, number, numbered, publish, receive, try_connect, unique, url};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_shape_of_message_comes_back_byte_for_byte() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let destination = unique("shapes");
    let name = destination.as_str();
    let mut subscriber = bus.subscribe(bus.subscription(name, "g")).await.unwrap();
    let all_bytes: Vec<u8> = (0..=255).collect();
    let messages = vec![
        Message::new(name, all_bytes.clone()).with_key(all_bytes.clone()).with_id("not a uuid ✓"),
        Message::new(name, ""),
        Message::tombstone(name, "k"),
        Message::new(name, "headers").with_header("b", "1").with_header("a", all_bytes).with_header("b", ""),
        Message::new(name, "native").with_header("b", "1").with_header("a", "2").with_header("c", "3"),
        Message::new(name, "forged").with_header("CC", "elsewhere").with_header("x-delivery-count", "9"),
        Message::new(name, "before").with_timestamp(Timestamp::from_millis(-5)).with_id("i".repeat(300)),
    ];
    publish(&bus, messages.clone()).await;
    let deliveries = receive(&mut subscriber, messages.len()).await;
    for (delivery, sent) in deliveries.iter().zip(&messages) {
        assert_eq!(delivery.message(), sent);
        assert_eq!((delivery.attempt(), delivery.facts().deliveries), (1, Some(1)));
    }
    ack(deliveries).await.into_iter().for_each(|outcome| assert_eq!(outcome.unwrap(), AckLevel::Sent));
    subscriber.close(LONG).await.unwrap();
    bus.delete(name, None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_outlives_more_failures_than_the_servers_own_limit_of_deliveries() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("limit");
    let spec = bus.subscription(name.as_str(), "g").with_max_attempts(None).with_crash_limit(None);
    bus.subscribe(spec.clone()).await.unwrap().close(LONG).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    // Each close gives it back; the server's default limit is 20.
    for round in 0..24 {
        let mut subscriber = bus.subscribe(spec.clone()).await.unwrap();
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        assert_eq!((delivery.attempt(), delivery.facts().deliveries), (1, Some(round + 1)));
        subscriber.close(LONG).await.unwrap();
    }
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    for attempt in 1..=24 {
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        assert_eq!(delivery.attempt(), attempt);
        delivery.nack(Duration::ZERO).await.unwrap();
    }
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_order_the_next_member_goes_on_behind_a_close_in_order() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("handover");
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key);
    let mut first = bus.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..30)).await;
    let held = receive(&mut first, 10).await;
    let mut second = bus.subscribe(spec).await.unwrap();
    nothing(&mut second).await;
    first.close(LONG).await.unwrap();
    let stale = ack(held).await;
    assert!(
        stale
            .iter()
            .all(|outcome| outcome.as_ref().is_err_and(|error| error.error().kind() == ErrorKind::StaleDelivery))
    );
    let mut came = Vec::new();
    while came.len() < 30 {
        for delivery in receive(&mut second, 1).await {
            came.push(number(&delivery));
            delivery.ack().await.unwrap();
        }
    }
    assert_eq!(came, (0..30).collect::<Vec<_>>());
    second.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_group_is_final_but_right_after_a_lost_connection() {
    let Some(url) = url() else { return };
    let proxy = Proxy::start(&url).await;
    let (bus, direct) = (connect(&proxy.url, "publish_timeout=5s").await, connect(&url, "").await);
    let name = unique("groupless");
    let send =
        async || bus.send(Message::new(name.as_str(), "x")).await.map_err(|error| (error.kind(), error.effect()));
    assert_eq!(send().await.unwrap_err(), (ErrorKind::NotFound, Effect::NotDone), "none yet");
    direct.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    send().await.unwrap();
    direct.delete(name.as_str(), Some(&"g".into())).await.unwrap();
    assert_eq!(send().await.unwrap_err(), (ErrorKind::NotFound, Effect::NotDone), "none any more");
    // Behind a new connection may be a server that has just started, and does not know all of its groups yet.
    proxy.cut();
    let deadline = Instant::now() + LONG;
    let told = loop {
        let told = send().await.unwrap_err();
        // What was under way when the connection was cut.
        if told.1 == Effect::NotDone || Instant::now() > deadline {
            break told;
        }
    };
    assert_eq!(told, (ErrorKind::Unavailable, Effect::NotDone));
    direct.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    send().await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
    direct.close(LONG).await.unwrap();
}

/// As a server does that was killed again while it started.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_binding_that_is_lost_is_there_again_after_the_connection_was() {
    let Some(url) = url() else { return };
    for queue in ["quorum", "classic", "stream"] {
        let proxy = Proxy::start(&url).await;
        let settings = format!("publish_timeout=5s&queue={queue}");
        let (bus, direct) = (connect(&proxy.url, &settings).await, connect(&url, &settings).await);
        let name = unique("unbound");
        let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
        let send = async |number: u32| direct.send(Message::new(name.as_str(), number.to_string())).await;
        send(0).await.unwrap();
        let found = direct.describe(name.as_str()).await.unwrap();
        let (exchange, group) = (found.physical.clone(), found.groups[0].physical.clone());
        let mut own = lapin::types::FieldTable::default();
        let bound = if queue == "stream" {
            format!("{exchange}=stream")
        } else {
            own.insert("anybroker-group".into(), lapin::types::AMQPValue::LongString("g".into()));
            group
        };
        let amqp = url.split('?').next().unwrap();
        let bare = lapin::Connection::connect(amqp, lapin::ConnectionProperties::default()).await.unwrap();
        let channel = bare.create_channel().await.unwrap();
        channel.queue_unbind(bound.as_str().into(), exchange.as_str().into(), "".into(), own).await.unwrap();
        assert_eq!(send(1).await.unwrap_err().effect(), Effect::NotDone, "{queue}: unbound");
        proxy.cut();
        let deadline = Instant::now() + LONG;
        while let Err(error) = send(2).await {
            assert!(error.effect() == Effect::NotDone && Instant::now() < deadline, "{queue}: {error:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let mut seen = Vec::new();
        while seen.last() != Some(&2) {
            for delivery in receive(&mut subscriber, 1).await {
                seen.push(number(&delivery));
                delivery.ack().await.unwrap();
            }
        }
        assert!(!seen.contains(&1), "{queue}: {seen:?}");
        bare.close(200, "done".into()).await.unwrap();
        direct.delete(name.as_str(), None).await.unwrap();
        bus.close(LONG).await.unwrap();
        direct.close(LONG).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_connections_lose_nothing_and_no_consumer_is_there_twice() {
    let Some(url) = url() else { return };
    let proxy = Proxy::start(&url).await;
    let (bus, direct) = (connect(&proxy.url, "publish_timeout=2s").await, connect(&url, "").await);
    let name = unique("cut");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let mut seen = std::collections::HashSet::new();
    for round in 0..5_u32 {
        for number in round * 20..round * 20 + 20 {
            let message = Message::new(name.as_str(), number.to_string());
            while let Err(error) = bus.send(message.clone()).await {
                assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout), "{error:?}");
            }
        }
        let held = subscriber.receive(5, LONG).await.unwrap();
        seen.extend(held.iter().map(number));
        proxy.cut();
        // Settled in time, or stale; both are told.
        for outcome in ack(held).await {
            if let Err(error) = outcome {
                assert_eq!(error.error().kind(), ErrorKind::StaleDelivery);
            }
        }
    }
    while seen.len() < 100 {
        for delivery in receive(&mut subscriber, 1).await {
            seen.insert(number(&delivery));
            drop(delivery.ack().await);
        }
    }
    let deadline = Instant::now() + LONG;
    loop {
        let consumers = consumers(&url, &name).await;
        if consumers == 1 {
            break;
        }
        // The figures are some seconds old.
        assert!(Instant::now() < deadline, "{consumers} consumers");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    subscriber.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
    direct.close(LONG).await.unwrap();
}

/// How many consumers the queue of group `g` has, by the management plugin.
async fn consumers(url: &str, name: &str) -> u64 {
    let admin = url.split("admin=http://").nth(1).unwrap();
    let mut stream = TcpStream::connect(admin).await.unwrap();
    let request = format!(
        "GET /api/queues/%2f/anybroker.{name}%3Dg%3Dg HTTP/1.0\r\nAuthorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    serde_json::from_str::<serde_json::Value>(body).unwrap()["consumers"].as_u64().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_connection_is_told_by_its_kind_and_shows_no_secret() {
    let Some(url) = url() else { return };
    let (_, rest) = url.split_once("://").unwrap();
    let host = rest.split('/').next().unwrap();
    let cases = [
        (format!("amqp://guest:MARKER@{host}"), ErrorKind::Unauthenticated),
        (format!("amqp://nobody:MARKER@{host}"), ErrorKind::Unauthenticated),
        (format!("amqp://{host}/no-such-host"), ErrorKind::NotFound),
        ("amqp://guest:MARKER@127.0.0.1:1".to_owned(), ErrorKind::Unavailable),
        ("amqps://guest:MARKER@127.0.0.1:1".to_owned(), ErrorKind::Unavailable),
    ];
    for (url, kind) in cases {
        let begun = Instant::now();
        let error = try_connect(&url, "connect_timeout=5s").await.map(drop).unwrap_err();
        assert_eq!((error.kind(), error.effect()), (kind, Effect::NotDone), "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(7), "{:?}", begun.elapsed());
        assert!(!format!("{error} {error:?}").contains("MARKER"), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_admin_endpoint_what_needs_it_is_refused() {
    let Some(url) = url() else { return };
    let bus = connect(url.split('?').next().unwrap(), "").await;
    let name = unique("bare");
    bus.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..3)).await;
    for error in
        [bus.describe(name.as_str()).await.map(drop).unwrap_err(), bus.delete(name.as_str(), None).await.unwrap_err()]
    {
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    let lag = bus.lag(name.as_str(), "g").await.unwrap();
    assert_eq!((lag.ready.map(|(count, _)| count), lag.in_flight, lag.delayed), (Some(3), None, None));
    bus.close(LONG).await.unwrap();
    let admin = connect(&url, "").await;
    admin.delete(name.as_str(), None).await.unwrap();
    admin.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_a_destination_leaves_those_whose_names_begin_like_it() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("name");
    let others = [format!("{name} b"), format!("{name}=g=g"), format!("{name}.b")];
    for other in &others {
        bus.declare(&TopologySpec::group(other.as_str(), "g")).await.unwrap();
    }
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    let nack = Nack { delay: Duration::from_secs(3_600), error_type: None };
    settle(vec![(delivery, Settlement::Nack(nack))]).await.remove(0).unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    for other in &others {
        bus.verify(&TopologySpec::group(other.as_str(), "g")).await.unwrap();
        bus.delete(other.as_str(), None).await.unwrap();
    }
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acked_right_before_a_close_does_not_come_again() {
    const COUNT: u32 = 2_000;
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("acked");
    let spec = bus.subscription(name.as_str(), "g").with_max_in_flight(COUNT as usize);
    let mut subscriber = bus.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..COUNT)).await;
    let mut deliveries = receive(&mut subscriber, COUNT as usize).await;
    deliveries.sort_by_key(number);
    // As long as the oldest is out, each ack is a frame of its own.
    let oldest = deliveries.remove(0);
    for outcome in ack(deliveries).await {
        outcome.unwrap();
    }
    subscriber.close(LONG).await.unwrap();
    publish(&bus, numbered(&name, COUNT..COUNT + 1)).await;
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let mut came: Vec<u32> = receive(&mut subscriber, 2).await.iter().map(number).collect();
    came.sort_unstable();
    assert_eq!(came, [0, COUNT], "what comes back stands before what never was out");
    drop(oldest);
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_of_the_other_type_of_queue_is_refused_and_stays_as_it_is() {
    let Some(url) = url() else { return };
    let (quorum, classic) = (connect(&url, "").await, connect(&url, "queue=classic").await);
    let name = unique("types");
    quorum.subscribe(quorum.subscription(name.as_str(), "q")).await.unwrap().close(LONG).await.unwrap();
    classic.subscribe(classic.subscription(name.as_str(), "c")).await.unwrap().close(LONG).await.unwrap();
    publish(&quorum, numbered(&name, 0..1)).await;
    for (bus, group) in [(&quorum, "c"), (&classic, "q")] {
        let error = bus.subscribe(bus.subscription(name.as_str(), group)).await.unwrap_err();
        assert_eq!((error.kind(), error.effect()), (ErrorKind::AlreadyExists, Effect::NotDone), "{group}");
    }
    for (bus, group, counted) in [(&quorum, "q", Some(1)), (&classic, "c", None)] {
        let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), group)).await.unwrap();
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        assert_eq!((number(&delivery), delivery.facts().deliveries), (0, counted), "{group}");
        delivery.ack().await.unwrap();
        subscriber.close(LONG).await.unwrap();
    }
    quorum.delete(name.as_str(), None).await.unwrap();
    for bus in [quorum, classic] {
        bus.close(LONG).await.unwrap();
    }
}
