//! The answer to a commit is lost. The call says *unknown*, and what was settled is done or comes back as the broker has it.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anybroker_core::{Bus, Effect, PublishOptions, Settlement, Subscriber, settle_in};
use common::{LONG, Server, connect, nothing, number, numbered, publish, receive, unique};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The request that ends a transaction, in Kafka's protocol.
const END_TXN: [u8; 2] = [0, 26];

/// What happens to the requests that end transactions; everything else passes.
#[derive(Default)]
struct Fate {
    /// The broker gets them, and its answer is lost.
    loses_answers: AtomicBool,
    /// The broker does not get them.
    loses_requests: AtomicBool,
    lost: AtomicUsize,
}

impl Fate {
    fn loses(&self) -> bool {
        self.loses_answers.load(Ordering::Acquire) || self.loses_requests.load(Ordering::Acquire)
    }
}

/// A proxy between clients and the broker's listener behind it.
async fn proxy(server: &Server, fate: &Arc<Fate>) {
    let port = server.port("advertised.listeners", "PROXIED");
    let target = server.port("listeners", "PROXIED");
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let fate = Arc::clone(fate);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { continue };
            tokio::spawn(pass(client, server, Arc::clone(&fate)));
        }
    });
}

async fn pass(client: TcpStream, server: TcpStream, fate: Arc<Fate>) {
    let (mut requests, mut to_client) = client.into_split();
    let (mut answers, mut to_server) = server.into_split();
    let is_deaf = Arc::new(AtomicBool::new(false));
    let deaf = Arc::clone(&is_deaf);
    let back = tokio::spawn(async move {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(count) = answers.read(&mut buffer).await {
            let is_over = count == 0;
            if is_over || (!deaf.load(Ordering::Acquire) && to_client.write_all(&buffer[..count]).await.is_err()) {
                break;
            }
        }
    });
    while let Ok(length) = requests.read_u32().await {
        let mut body = vec![0; length as usize];
        if requests.read_exact(&mut body).await.is_err() {
            break;
        }
        if body.starts_with(&END_TXN) && fate.loses() {
            is_deaf.store(true, Ordering::Release);
            fate.lost.fetch_add(1, Ordering::AcqRel);
            if fate.loses_requests.load(Ordering::Acquire) {
                continue;
            }
        }
        if to_server.write_u32(length).await.is_err() || to_server.write_all(&body).await.is_err() {
            break;
        }
    }
    back.abort();
}

/// For each message one of the same number, in one transaction. Answers what the commit did.
async fn work(bus: &Bus, subscriber: &mut Subscriber, made: &str, count: u32) -> Result<(), Effect> {
    let deliveries = receive(subscriber, count as usize).await;
    assert!(deliveries.iter().all(|delivery| delivery.attempt() == 1));
    let transaction = bus.begin().await.unwrap();
    let options = PublishOptions::default().with_transaction(Arc::clone(&transaction));
    for outcome in bus.submit(numbered(made, 0..count), &options).await.await {
        outcome.unwrap();
    }
    let batch = deliveries.into_iter().map(|delivery| (delivery, Settlement::Ack)).collect();
    for outcome in settle_in(&transaction, batch).await {
        outcome.unwrap();
    }
    transaction.commit().await.map_err(|error| error.effect())
}

/// The next ones, acked.
async fn take(subscriber: &mut Subscriber, count: u32) -> Vec<u32> {
    let mut numbers = Vec::new();
    for delivery in receive(subscriber, count as usize).await {
        numbers.push(number(&delivery));
        delivery.ack().await.unwrap();
    }
    numbers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_became_of_a_commit_without_an_answer_is_found_out_and_each_message_has_its_effect_once() {
    let Some(server) = Server::find() else { return };
    let fate = Arc::new(Fate::default());
    proxy(&server, &fate).await;
    let through = format!("kafka://127.0.0.1:{}", server.port("advertised.listeners", "PROXIED"));
    let bus = connect(&through, "partitions=1&transaction_timeout=5s").await;
    let direct = connect(&common::url().unwrap(), "partitions=1").await;
    let (source, made) = (unique("unknown-source"), unique("unknown-made"));
    let mut subscriber = bus.subscribe(bus.subscription(source.as_str(), "g")).await.unwrap();
    let mut results = direct.subscribe(direct.subscription(made.as_str(), "g")).await.unwrap();

    // The broker commits, and nobody hears of it.
    publish(&direct, numbered(&source, 0..3)).await;
    fate.loses_answers.store(true, Ordering::Release);
    assert_eq!(work(&bus, &mut subscriber, &made, 3).await, Err(Effect::Unknown));
    assert!(fate.lost.swap(0, Ordering::AcqRel) > 0);
    assert_eq!(take(&mut results, 3).await, [0, 1, 2]);
    nothing(&mut subscriber).await;
    fate.loses_answers.store(false, Ordering::Release);

    // The broker never hears of the commit.
    publish(&direct, numbered(&source, 0..2)).await;
    fate.loses_requests.store(true, Ordering::Release);
    assert_eq!(work(&bus, &mut subscriber, &made, 2).await, Err(Effect::Unknown));
    assert!(fate.lost.swap(0, Ordering::AcqRel) > 0);
    fate.loses_requests.store(false, Ordering::Release);
    // What comes again is what was not done.
    assert_eq!(work(&bus, &mut subscriber, &made, 2).await, Ok(()));
    assert_eq!(take(&mut results, 2).await, [0, 1]);
    nothing(&mut results).await;
    nothing(&mut subscriber).await;

    // Nothing of it was saved by a close.
    drop(subscriber);
    let mut subscriber = direct.subscribe(direct.subscription(source.as_str(), "g")).await.unwrap();
    nothing(&mut subscriber).await;
    publish(&direct, numbered(&source, 9..10)).await;
    assert_eq!(take(&mut subscriber, 1).await, [9]);
    drop((subscriber, results));
    bus.close(LONG).await.unwrap();
    direct.close(LONG).await.unwrap();
}
