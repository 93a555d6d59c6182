//! The conformance suite on running servers, in every mode: what the record claims holds, what it refuses is refused.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

mod common;

use std::time::Duration;

use anybroker_conformance::{Options, UrlHarness};
use anybroker_conformance_native::{channel, http};
use anybroker_testing::{judge, judge_faults};
use common::{localstack_url, try_connect, url};
use tokio::sync::Mutex;

/// One test at a time uses ElasticMQ, and one LocalStack: they are slow as it is.
static ELASTIC_MQ: Mutex<()> = Mutex::const_new(());
static LOCALSTACK: Mutex<()> = Mutex::const_new(());

/// What is particular to FIFO queues. Of all cases the emulators make minutes: `cargo xtask conform --only
/// sqs-fifo,sqs-fifo-total,sqs-sns-fifo` runs them.
const FIFO_SHARE: &[&str] =
    &["ordering/*", "settle/acks-may-come-in-any-order", "groups/members-that-come-and-go*", "native/*"];
/// What is particular to one order of everything.
const TOTAL_SHARE: &[&str] = &["ordering/*", "flow/*", "groups/what-is-acked-while*"];
/// What topics add to that.
const TOPICS_SHARE: &[&str] = &[
    "ordering/messages-of-a-key-*",
    "ordering/a-key-*",
    "groups/each-*",
    "groups/a-retry-*",
    "dead-letter/letters-belong-*",
    "native/*",
];
/// Of the faults those that SQS found hard: an answer that is lost leaves a message leased to nobody, or deleted; an ack that is lost
/// is asked for again; what is answered in the place of SQS.
const FAULTS_SHARE: &[&str] =
    &["faults/answers-that*", "faults/an-ack-that*", "faults/answers-of*", "faults/what-is-throttled*"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn standard_queues_hold_what_their_record_claims() {
    let Some(url) = url() else { return };
    let _alone = ELASTIC_MQ.lock().await;
    conform(url, 24, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifo_queues_keep_the_order_that_their_record_claims() {
    let Some(url) = url() else { return };
    let _alone = ELASTIC_MQ.lock().await;
    conform(format!("{url}&mode=fifo"), 8, FIFO_SHARE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifo_queues_in_total_order_hold_what_their_record_claims_of_it() {
    let Some(url) = url() else { return };
    let _alone = ELASTIC_MQ.lock().await;
    conform(format!("{url}&mode=fifo&message_group=one"), 8, TOTAL_SHARE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_with_standard_queues_hold_what_their_record_claims() {
    let Some(url) = localstack_url() else { return };
    let _alone = LOCALSTACK.lock().await;
    conform(url, 8, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_with_fifo_queues_keep_the_order_of_every_group() {
    let Some(url) = localstack_url() else { return };
    let _alone = LOCALSTACK.lock().await;
    conform(format!("{url}&mode=fifo"), 8, TOPICS_SHARE).await;
}

/// A share of them, with one seed; `cargo xtask faults sqs`, and `sqs-fifo`, run all of them, seed after seed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_connections_break_no_promise() {
    let Some(url) = url() else { return };
    let _alone = ELASTIC_MQ.lock().await;
    let service = http(&url, |_| None).unwrap();
    let harness = UrlHarness::behind_proxies(url.clone(), &url, move |url| Box::pin(try_connect(url, "")))
        .unwrap()
        .with_http(service)
        .with_lease(Duration::from_secs(2))
        .with_patience(Duration::from_secs(60));
    judge_faults(harness, 3, FAULTS_SHARE).await;
}

async fn conform(url: String, parallelism: usize, cases: &[&str]) {
    let (strict, name) = (url.clone(), url.clone());
    let native = channel(&url, |_| None).unwrap();
    let harness = UrlHarness::new(name, move || Box::pin(try_connect(url.clone(), "")))
        .with_strict(move || Box::pin(try_connect(strict.clone(), "create_destinations=false")))
        .with_native(native)
        .with_lease(Duration::from_secs(2))
        .with_patience(Duration::from_secs(60));
    judge(harness, Options::default().with_parallelism(parallelism), cases).await;
}
