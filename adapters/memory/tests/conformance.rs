//! The conformance suite on the memory broker.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::{Level, Options, Outcome, Report, UrlHarness, run};
use anybroker_core::ManualClock;
use anybroker_memory::{Memory, MemoryBuilder, Profile};

/// A harness of a broker that is built from `builder`, and of one that creates no destinations.
fn harness(name: &str, builder: impl Fn() -> MemoryBuilder) -> UrlHarness {
    let (memory, strict) = (builder().build(), builder().create_destinations(false).build());
    UrlHarness::new(name, move || {
        let memory = memory.clone();
        Box::pin(async move { Ok(memory.bus()) })
    })
    .with_strict(move || {
        let strict = strict.clone();
        Box::pin(async move { Ok(strict.bus()) })
    })
    .with_lease(Duration::from_millis(500))
    .with_quiet(Duration::from_millis(100))
    .with_patience(Duration::from_secs(20))
}

async fn must_be_green(harness: UrlHarness, options: Options) -> Report {
    let report = run(Arc::new(harness), options).await.unwrap();
    println!("{}", report.text());
    assert!(report.is_green(), "{}", report.summary());
    report
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reference_passes_every_case() {
    let options = Options::default().with_parallelism(16);
    must_be_green(harness("memory", Memory::builder), options).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_passes_with_a_dedup_window() {
    let builder = || Memory::builder().dedup_window(Duration::from_secs(120));
    must_be_green(harness("memory with dedup", builder), Options::default().with_parallelism(16)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_passes_on_a_clock_that_is_turned_by_hand() {
    let clock = ManualClock::new();
    let builder = || Memory::builder().clock(clock.clone());
    let harness =
        harness("memory on a manual clock", builder).with_clock(clock.clone()).with_lease(Duration::from_secs(30));
    must_be_green(harness.with_quiet(Duration::from_millis(30)), Options::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn minutes_pass_at_once_on_a_clock_that_is_turned_by_hand() {
    let clock = ManualClock::new();
    let builder = || Memory::builder().clock(clock.clone()).dedup_window(Duration::from_secs(120));
    let harness = harness("memory with dedup, on a manual clock", builder).with_clock(clock.clone());
    let options = Options::default().with_level(Level::Long).with_filter("long/*");
    let report = must_be_green(harness.with_quiet(Duration::from_millis(30)), options).await;
    // All but the one about another process, which there is none of.
    let not_run: Vec<_> =
        report.cases.iter().filter(|case| case.outcome != Outcome::Pass).map(|case| case.name).collect();
    assert!(matches!(not_run[..], [name] if name.starts_with("long/a-process-")), "{not_run:?}: {}", report.summary());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_runs_at_once_do_not_disturb_each_other() {
    let memory = Memory::new();
    let harness = || {
        let memory = memory.clone();
        UrlHarness::new("memory, shared by two runs", move || {
            let memory = memory.clone();
            Box::pin(async move { Ok(memory.bus()) })
        })
        .with_lease(Duration::from_millis(500))
        .with_quiet(Duration::from_millis(100))
    };
    let options = || Options::default().with_parallelism(8).with_filter("delivery/*").with_filter("groups/*");
    tokio::join!(must_be_green(harness(), options()), must_be_green(harness(), options()));
}

/// A profile with its awkward habits, and (with a seed) what goes wrong by itself on that broker.
async fn in_profile(profile: Profile, seed: Option<u64>) {
    let builder = || {
        let builder = Memory::builder().profile(profile);
        if let Some(seed) = seed { builder.seed(seed) } else { builder }
    };
    let name = format!("memory as {profile:?} with seed {seed:?}");
    let options = Options::default().with_parallelism(16);
    let Some(_) = seed else {
        must_be_green(harness(&name, builder), options).await;
        return;
    };
    let report = must_be_green(harness(&name, builder).with_disturbances(), options).await;
    // Losses are rare enough that most cases come about, and each history is checked in any case.
    let totals = report.totals;
    assert!(totals.pass > 3 * totals.not_run, "{}", report.summary());
}

macro_rules! profiles {
    ($($name:ident: $profile:ident),+ $(,)?) => {
        $(mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn passes_where_nothing_goes_wrong() {
                in_profile(Profile::$profile, None).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn passes_with_a_seed() {
                for seed in [1, 17] {
                    in_profile(Profile::$profile, Some(seed)).await;
                }
            }
        })+
    };
}

profiles!(kafka: Kafka, rabbitmq: RabbitMq, jetstream: JetStream, sqs: Sqs, pulsar: Pulsar);
