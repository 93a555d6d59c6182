//! Choosing, redriving and purging dead letters: what the core does once for all adapters.

mod common;

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    DeadLetter, DeadLetterFilter, DeadLetterId, DeadLetters, ErrorKind, Message, Reason, RedriveOptions, Timestamp,
};
use common::{TestBroker, record};
use tokio::time::Instant;

fn letter(number: usize) -> DeadLetter {
    DeadLetter {
        id: DeadLetterId(format!("{number:06}").into()),
        message: Message::new("d", "x").with_id(format!("m{number}")).with_key(if number.is_multiple_of(2) {
            "even"
        } else {
            "odd"
        }),
        group: "g".into(),
        reason: Reason::Rejected,
        error_type: None,
        detail: None,
        attempts: 1,
        first_at: None,
        last_at: Timestamp::from_millis(i64::try_from(number).expect("small")),
        redrives: 0,
        position: None,
    }
}

fn queue(letters: impl IntoIterator<Item = DeadLetter>) -> (Arc<TestBroker>, DeadLetters) {
    let broker = TestBroker::new(record());
    broker.letters.lock().extend(letters);
    let letters = broker.bus().dead_letters("d", "g").expect("given");
    (broker, letters)
}

fn left(broker: &TestBroker) -> Vec<String> {
    broker.letters.lock().iter().map(|letter| letter.message.id().to_string()).collect()
}

fn redriven(broker: &TestBroker) -> Vec<usize> {
    broker.redriven.lock().iter().map(Vec::len).collect()
}

#[tokio::test]
async fn every_condition_of_a_filter_must_hold() {
    let mut one = letter(1);
    one.error_type = Some("TIMEOUT".into());
    one.message = one.message.with_header("tenant", "acme").with_header("tenant", "beta");
    let matches = |change: fn(&mut DeadLetterFilter)| {
        let mut filter = DeadLetterFilter::all();
        change(&mut filter);
        filter.matches(&one)
    };
    assert!(matches(|_| {}));
    assert!(matches(|filter| filter.reason = Some(Reason::Rejected)));
    assert!(!matches(|filter| filter.reason = Some(Reason::Expired)));
    assert!(matches(|filter| filter.error_type = Some("TIMEOUT".into())));
    assert!(!matches(|filter| filter.error_type = Some("timeout".into())));
    assert!(matches(|filter| filter.since = Some(Timestamp::from_millis(1))), "at that moment is since");
    assert!(!matches(|filter| filter.until = Some(Timestamp::from_millis(1))), "at that moment is not before");
    assert!(matches(|filter| filter.key = Some("odd".into())));
    assert!(!matches(|filter| filter.key = Some("".into())));
    assert!(matches(|filter| filter.id = Some("m1".into())));
    assert!(matches(|filter| filter.headers = vec![("tenant".into(), "beta".into())]), "any of its values");
    assert!(!matches(|filter| filter.headers = vec![("tenant".into(), "gamma".into())]));
    assert!(!matches(|filter| {
        filter.id = Some("m1".into());
        filter.reason = Some(Reason::Expired);
    }));
}

#[tokio::test]
async fn all_letters_are_redriven_in_batches_over_several_pages() {
    let (broker, letters) = queue((0..1234).map(letter));
    let mut told = Vec::new();
    let options = RedriveOptions::default();
    let report = letters.redrive_with(&options, |report| told.push(report.moved)).await.expect("redriven");
    assert_eq!((report.matched, report.moved), (1234, 1234));
    assert!(report.refused.is_empty() && report.failed.is_empty());
    assert!(left(&broker).is_empty());
    assert_eq!(told.last(), Some(&1234));
    assert!(redriven(&broker).iter().all(|size| *size <= 100));
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_is_on_its_way_comes_to_its_end_when_nobody_waits_for_it() {
    let (broker, _) = queue((0..250).map(letter));
    *broker.redrive_takes.lock() = Duration::from_secs(1);
    let bus = broker.bus();
    let letters = bus.dead_letters("d", "g").expect("given");
    let options = RedriveOptions::default();
    let redriving = letters.redrive(&options);
    tokio::time::timeout(Duration::from_millis(1_500), redriving).await.expect_err("three batches take three seconds");
    assert_eq!((redriven(&broker), left(&broker).len()), (vec![100, 100], 150), "the second one is on its way");
    bus.close(Duration::from_secs(5)).await.expect("closed");
    assert_eq!((redriven(&broker), left(&broker).len()), (vec![100, 100], 50), "and no third one begins");
}

#[tokio::test]
async fn a_rate_that_is_no_positive_number_is_refused_and_the_smallest_one_is_not() {
    let (broker, letters) = queue((0..2).map(letter));
    for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let mut options = RedriveOptions::default();
        options.rate = Some(rate);
        let error = letters.redrive(&options).await.expect_err("no rate");
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{rate}");
    }
    assert!(redriven(&broker).is_empty());
    let mut options = RedriveOptions::default();
    options.rate = Some(f64::MIN_POSITIVE);
    // For ever, as it was asked for.
    tokio::time::timeout(Duration::from_millis(50), letters.redrive(&options)).await.expect_err("the second one waits");
    assert_eq!(redriven(&broker), [1]);
}

#[tokio::test]
async fn a_dry_run_tells_and_changes_nothing() {
    let (broker, letters) = queue((0..10).map(letter));
    let mut options = RedriveOptions::default();
    options.dry_run = true;
    options.filter.key = Some("odd".into());
    let report = letters.redrive(&options).await.expect("told");
    assert_eq!((report.matched, report.moved), (5, 5));
    assert!(redriven(&broker).is_empty());
    assert_eq!(left(&broker).len(), 10);
}

#[tokio::test]
async fn what_was_redriven_too_often_is_refused_and_listed() {
    let (broker, letters) = queue((0..4).map(|number| {
        let mut letter = letter(number);
        letter.redrives = u32::try_from(number).expect("small");
        letter
    }));
    let report = letters.redrive(&RedriveOptions::default()).await.expect("redriven");
    assert_eq!((report.matched, report.moved), (4, 3));
    assert_eq!(report.refused.len(), 1);
    assert_eq!((report.refused[0].1.to_string().as_str(), report.refused[0].2), ("m3", 3));
    assert_eq!(left(&broker), ["m3"]);
}

#[tokio::test]
async fn refused_letters_at_the_head_do_not_use_up_the_limit() {
    let (broker, letters) = queue((0..10).map(|number| {
        let mut letter = letter(number);
        letter.redrives = if number < 4 { 3 } else { 0 };
        letter
    }));
    let mut options = RedriveOptions::default();
    options.limit = Some(2);
    for round in 1..=3 {
        let report = letters.redrive(&options).await.expect("redriven");
        assert_eq!((report.moved, report.refused.len()), (2, 4), "round {round}");
    }
    assert_eq!(left(&broker), ["m0", "m1", "m2", "m3"]);
}

#[tokio::test(start_paused = true)]
async fn a_rate_is_kept_without_a_pause_behind_the_last() {
    for (rate, count, seconds) in [(10.0, 30, 2), (0.5, 3, 4), (1_000.0, 50, 0)] {
        let (_broker, letters) = queue((0..count).map(letter));
        let mut options = RedriveOptions::default();
        options.rate = Some(rate);
        let start = Instant::now();
        letters.redrive(&options).await.expect("redriven");
        assert_eq!(start.elapsed().as_secs(), seconds, "{count} at {rate}");
    }
}

#[tokio::test]
async fn a_filtered_peek_does_not_read_letter_by_letter() {
    let (broker, letters) = queue((0..1000).map(letter));
    let mut filter = DeadLetterFilter::all();
    filter.id = Some("m999".into());
    assert_eq!(letters.peek(&filter, 1).await.expect("read").len(), 1);
    assert!(broker.pages.lock().len() <= 3, "{:?}", broker.pages.lock());
    broker.pages.lock().clear();
    assert_eq!(letters.peek(&DeadLetterFilter::all(), 1).await.expect("read")[0].message.id().to_string(), "m0");
    assert_eq!(*broker.pages.lock(), [1], "without a filter no more is read than shown");
}

#[tokio::test]
async fn a_purge_deletes_what_matches_and_tells_how_many() {
    let (broker, letters) = queue((0..1001).map(letter));
    let mut filter = DeadLetterFilter::all();
    filter.key = Some("odd".into());
    assert_eq!(letters.count(&filter).await.expect("counted"), 500);
    assert_eq!(letters.purge(&filter).await.expect("purged"), 500);
    assert_eq!(left(&broker).len(), 501);
    assert_eq!(letters.purge(&DeadLetterFilter::all()).await.expect("purged"), 501);
    assert_eq!(letters.count(&DeadLetterFilter::all()).await.expect("counted"), 0);
}
