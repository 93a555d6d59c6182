//! Dead letters: what they hold, whose they are, and how they go back.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anybroker_core::{
    AttemptCount, Browse, Bytes, DeadLetter, DeadLetterFilter, Destination, Group, Message, Nack, Reason,
    RedriveOptions, Settlement, Verdict,
};

use super::case;
use crate::Case;
use crate::case::{Proof, ensure, ensure_eq};
use crate::client::Client;
use crate::consumer::{Consumer, held_ids, ids, settle};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "dead-letter/a-letter-holds-the-message-untouched-and-why-it-died",
        [need::DEAD_LETTER],
        "A dead letter holds body, headers, key and id untouched, plus source, group, attempts, reason, error type, first and last time.",
        content
    ),
    case!(
        "dead-letter/a-letter-is-readable-when-its-settle-has-returned",
        [need::DEAD_LETTER],
        "The dead letter is stored (confirmed) before the source is settled.",
        stored_first
    ),
    case!(
        "dead-letter/the-last-failure-is-what-the-letter-tells",
        [need::DEAD_LETTER, need::NACK],
        "After max_attempts the letter has reason attempts_exhausted, the attempts, and the class of the last failure.",
        last_failure
    ),
    case!(
        "dead-letter/letters-belong-to-their-source-and-group",
        [need::DEAD_LETTER, need::GROUPS],
        "A DLQ belongs to (source, group).",
        scoped
    ),
    case!(
        "dead-letter/a-dead-letter-is-never-delivered-again",
        [need::DEAD_LETTER],
        "dead_letter: never again here.",
        never_again
    ),
    case!(
        "dead-letter/reading-takes-nothing-away",
        [need::DEAD_LETTER],
        "Browsing is declared non-destructive or leasing; neither loses a letter.",
        reading
    ),
    case!(
        "dead-letter/letters-are-listed-oldest-first-and-paged-without-gaps",
        [need::DEAD_LETTER],
        "List: oldest first, page by page, each letter once.",
        pages
    ),
    case!(
        "dead-letter/filters-choose-by-reason-type-key-header-id-and-time",
        [need::DEAD_LETTER],
        "The same filters on every broker; every condition that is set must hold.",
        filters
    ),
    case!(
        "dead-letter/a-redrive-returns-only-to-the-group-that-failed-at-attempt-one-with-its-id",
        [need::DEAD_LETTER, need::REDRIVE, need::GROUPS, need::NACK],
        "Redrive returns a message only to the group that failed it; it starts again at attempt 1 with its id kept.",
        redrive_scope
    ),
    case!(
        "dead-letter/a-redriven-message-has-all-its-attempts-and-dies-with-its-redrives-counted",
        [need::DEAD_LETTER, need::REDRIVE, need::NACK],
        "The library's own headers do not make a redriven message die at once; redrives are counted.",
        dies_again
    ),
    case!("dead-letter/a-dry-run-moves-nothing", [need::DEAD_LETTER, need::REDRIVE], "Redrive: dry run.", dry_run),
    case!(
        "dead-letter/a-redrive-takes-what-its-filter-and-limit-choose-and-can-be-resumed",
        [need::DEAD_LETTER, need::REDRIVE],
        "Redrive: filtered, throttled, resumable.",
        resumable
    ),
    case!(
        "dead-letter/the-loop-guard-refuses-letters-that-were-redriven-too-often",
        [need::DEAD_LETTER, need::REDRIVE],
        "Redrive: loop-guarded.",
        loop_guard
    ),
    case!(
        "dead-letter/a-purge-deletes-what-it-chooses-for-good",
        [need::DEAD_LETTER, need::PURGE],
        "Purge: what the filter chooses is gone, the rest stays.",
        purge
    ),
    case!(
        "dead-letter/a-message-that-kills-its-consumer-is-buried-by-the-crash-limit",
        [need::DEAD_LETTER, need::CRASH_COUNT],
        "Hand-overs without an outcome have a limit of their own: a message that kills its consumer must not loop for ever.",
        crash_limit
    ),
];

struct Stage<'e> {
    client: Client<'e>,
    consumer: Consumer<'e>,
    destination: Destination,
    group: Group,
}

impl<'e> Stage<'e> {
    async fn new(env: &'e Env) -> Proof<Self> {
        let (destination, group) = (env.destination("d"), env.group("g"));
        let client = env.client().await?;
        let consumer = client.subscribe(env.spec(&destination, &group)).await?;
        Ok(Self { client, consumer, destination, group })
    }

    /// Publishes a message and buries it.
    async fn bury(&mut self, message: Message, verdict: Verdict) -> Proof {
        self.client.publish_ok(vec![message]).await?;
        self.consumer.one().await?.dead_letter(verdict).await
    }

    async fn bury_many(&mut self, count: usize) -> Proof<Vec<Message>> {
        let messages = self.client.messages(&self.destination, "k", count);
        for message in &messages {
            self.bury(message.clone(), Verdict::new(Reason::Rejected)).await?;
        }
        Ok(messages)
    }

    /// The same of many together, in whatever order.
    async fn bury_together(&mut self, count: usize) -> Proof {
        let keys = (0..count).map(|number| format!("key {number}"));
        let batch = keys.map(|key| self.client.message(&self.destination, key.as_str())).collect();
        self.client.publish_ok(batch).await?;
        let mut left = count;
        while left > 0 {
            let came = self.consumer.take(self.client.env.at_once(20).min(left)).await?;
            left -= came.len();
            let verdict = || Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected)));
            for outcome in settle(came.into_iter().map(|held| (held, verdict())).collect()).await? {
                outcome.map_err(|(_, error)| error)?;
            }
        }
        Ok(())
    }

    async fn letters(&mut self, count: usize) -> Proof<Vec<DeadLetter>> {
        self.client.letters_until(&self.destination, &self.group, count).await
    }

    async fn redrive(&mut self, options: &RedriveOptions) -> Proof<anybroker_core::RedriveReport> {
        self.client.redrive(&self.destination, &self.group, options).await
    }

    /// The letters that match now.
    async fn matching(&mut self, filter: &DeadLetterFilter) -> Proof<Vec<String>> {
        let letters = self.client.bus.dead_letters(&self.destination, &self.group)?;
        Ok(ids(letters.peek(filter, 100).await?.iter().map(|letter| &letter.message)))
    }
}

fn options(change: impl FnOnce(&mut RedriveOptions)) -> RedriveOptions {
    let mut options = RedriveOptions::default();
    change(&mut options);
    options
}

fn filter(change: impl FnOnce(&mut DeadLetterFilter)) -> DeadLetterFilter {
    let mut filter = DeadLetterFilter::all();
    change(&mut filter);
    filter
}

async fn content(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let body: Vec<u8> = (0..=255).collect();
    let message = stage
        .client
        .message(&stage.destination, "key")
        .with_header("twice", "1")
        .with_header("twice", "2")
        .with_header("Twice", [0xff, 0x00])
        .with_header("ключ", "значение")
        .with_header("empty", "");
    let message = Message::from_parts(
        stage.destination.clone(),
        "an id of its own".into(),
        message.timestamp(),
        Some(Bytes::from(body)),
    )
    .with_key([0, 1, 254, 255].to_vec())
    .with_headers(message.headers().clone())
    .with_content_type("application/x-thing; charset=\"utf-8\"");
    let before =
        env.harness.clock().map_or_else(anybroker_core::Timestamp::now, |clock| anybroker_core::Clock::now(&clock));
    let verdict =
        Verdict::new(Reason::Other("bad-card".into())).with_error_type("VALIDATION_ERROR").with_detail("no such card");
    stage.bury(message.clone(), verdict).await?;
    let letter = stage.letters(1).await?.remove(0);
    ensure_eq!(letter.message, message, "the letter's message");
    ensure_eq!(letter.group, stage.group, "the group");
    ensure_eq!(letter.reason, Reason::Other("bad-card".into()), "the reason");
    ensure_eq!(letter.error_type.as_deref(), Some("VALIDATION_ERROR"), "the error type");
    ensure_eq!(letter.detail.as_deref(), Some("no such card"), "the detail");
    ensure_eq!(letter.redrives, 0, "redrives");
    if env.record.attempt_count == AttemptCount::Exact {
        ensure_eq!(letter.attempts, 1, "attempts");
    }
    // A second of tolerance: the broker's clock may be another one.
    let slack = Duration::from_secs(1);
    ensure!(
        letter.last_at.as_millis() + 1_000 >= before.as_millis(),
        "the letter says {}, it was buried after {before} (within {slack:?})",
        letter.last_at
    );
    if let Some(first) = letter.first_at {
        ensure!(first <= letter.last_at, "first at {first}, last at {}", letter.last_at);
    }
    Ok(())
}

async fn stored_first(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    for number in 1..=5 {
        let message = stage.client.message(&stage.destination, "k");
        stage.bury(message.clone(), Verdict::new(Reason::Rejected)).await?;
        // No waiting: the settle has returned.
        let letters = stage.client.letters(&stage.destination, &stage.group).await?;
        ensure_eq!(letters.len(), number, "letters right after settle {number} has returned Ok");
        ensure!(letters.iter().any(|letter| letter.message.id() == message.id()), "letter {} is missing", message.id());
    }
    Ok(())
}

async fn last_failure(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_max_attempts(2)).await?;
    client.fill(&destination, "k", 1).await?;
    for class in ["TIMEOUT", "RATE_LIMITED"] {
        let nack = Nack { delay: Duration::ZERO, error_type: Some(class.into()) };
        consumer.one().await?.settle(Settlement::Nack(nack)).await?.map_err(|(_, error)| error)?;
    }
    let letter = client.letters_until(&destination, &group, 1).await?.remove(0);
    ensure_eq!(letter.reason, Reason::AttemptsExhausted, "the reason");
    ensure_eq!(letter.error_type.as_deref(), Some("RATE_LIMITED"), "the class of the last failure");
    ensure_eq!(letter.attempts, 2, "the attempts");
    consumer.silence_then_canary(&client, "it is a dead letter").await
}

async fn scoped(env: &Env) -> Proof {
    let client = env.client().await?;
    let (here, there) = (env.destination("here"), env.destination("there"));
    let (good, bad) = (env.group("good"), env.group("bad"));
    let mut keeper = client.subscribe(env.spec(&here, &good)).await?;
    let mut failing = client.subscribe(env.spec(&here, &bad)).await?;
    let elsewhere = client.subscribe(env.spec(&there, &bad)).await?;
    let sent = client.fill(&here, "k", 1).await?;
    failing.one().await?.dead_letter(Verdict::new(Reason::Rejected)).await?;
    keeper.one().await?.ack().await?;
    let letters = client.letters_until(&here, &bad, 1).await?;
    ensure_eq!(ids(letters.iter().map(|letter| &letter.message)), ids(&sent), "letters of the group that failed it");
    ensure_eq!(letters[0].message.destination(), &here, "the source that the letter names");
    ensure_eq!(client.letters(&here, &good).await?.len(), 0, "letters of the other group");
    ensure_eq!(client.letters(&there, &bad).await?.len(), 0, "letters of the other source");
    elsewhere.close().await
}

async fn never_again(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    stage.bury_many(3).await?;
    let Stage { client, mut consumer, destination, group } = stage;
    consumer.silence_then_canary(&client, "all are dead letters").await?;
    consumer.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what a fresh client reads");
    Ok(())
}

async fn reading(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let sent = stage.bury_many(5).await?;
    for round in 0..3 {
        let reader = env.client().await?;
        let deadline = Instant::now() + env.patience();
        loop {
            let found =
                ids(reader.letters(&stage.destination, &stage.group).await?.iter().map(|letter| &letter.message));
            if found == ids(&sent) {
                break;
            }
            // Leased letters may be hidden for a while; otherwise each reading sees them all.
            ensure!(
                env.record.dead_letter_browse == Browse::Leasing && Instant::now() < deadline,
                "reading {round} sees {} of 5 letters",
                found.len()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        reader.close().await?;
    }
    Ok(())
}

async fn pages(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let sent = stage.bury_many(11).await?;
    let letters = stage.client.bus.dead_letters(&stage.destination, &stage.group)?;
    let (mut found, mut times, mut from) = (Vec::new(), Vec::new(), None);
    loop {
        let page = env.bounded("dead letters", letters.page(from, 4)).await??;
        ensure!(page.letters.len() <= 4, "a page of {}, 4 were asked for", page.letters.len());
        times.extend(page.letters.iter().map(|letter| letter.last_at));
        found.extend(ids(page.letters.iter().map(|letter| &letter.message)));
        ensure!(found.len() <= 11, "more letters than there are: {found:?}");
        match page.next {
            Some(next) => from = Some(next),
            None => break,
        }
    }
    ensure_eq!(found, ids(&sent), "the letters of all pages, oldest first");
    ensure!(times.is_sorted(), "the times of the letters are not in order: {times:?}");
    Ok(())
}

async fn filters(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let (client, destination) = (&stage.client, stage.destination.clone());
    let a = client.message(&destination, "a").with_header("tenant", "acme").with_header("tenant", "beta");
    let b = client.message(&destination, "b").with_header("tenant", "acme");
    let c = client.message(&destination, "b");
    stage.bury(a.clone(), Verdict::new(Reason::Rejected).with_error_type("VALIDATION_ERROR")).await?;
    stage.bury(b.clone(), Verdict::new(Reason::Malformed)).await?;
    env.pass(Duration::from_millis(30)).await;
    stage.bury(c.clone(), Verdict::new(Reason::Rejected)).await?;
    let third = stage.letters(3).await?.remove(2).last_at;
    let header =
        |name: &str, value: &'static str| filter(|filter| filter.headers = vec![(name.into(), Bytes::from(value))]);
    let cases = [
        ("everything", DeadLetterFilter::all(), vec![&a, &b, &c]),
        ("the reason", filter(|filter| filter.reason = Some(Reason::Rejected)), vec![&a, &c]),
        ("the error type", filter(|filter| filter.error_type = Some("VALIDATION_ERROR".into())), vec![&a]),
        ("the key", filter(|filter| filter.key = Some(Bytes::from("b"))), vec![&b, &c]),
        ("a header", header("tenant", "acme"), vec![&a, &b]),
        ("the second value of a header", header("tenant", "beta"), vec![&a]),
        ("the id", filter(|filter| filter.id = Some(b.id().clone())), vec![&b]),
        ("since", filter(|filter| filter.since = Some(third)), vec![&c]),
        ("until", filter(|filter| filter.until = Some(third)), vec![&a, &b]),
        (
            "two conditions",
            filter(|filter| {
                filter.reason = Some(Reason::Rejected);
                filter.key = Some(Bytes::from("b"));
            }),
            vec![&c],
        ),
        ("nothing", filter(|filter| filter.reason = Some(Reason::Expired)), vec![]),
    ];
    for (what, filter, expected) in cases {
        ensure_eq!(stage.matching(&filter).await?, ids(expected), "letters chosen by {what}");
    }
    Ok(())
}

async fn redrive_scope(env: &Env) -> Proof {
    let destination = env.destination("d");
    let (good, bad) = (env.group("good"), env.group("bad"));
    let client = env.client().await?;
    let mut keeper = client.subscribe(env.spec(&destination, &good)).await?;
    let mut failing = client.subscribe(env.spec(&destination, &bad).with_max_attempts(2)).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    keeper.one().await?.ack().await?;
    failing.one().await?.nack(Duration::ZERO).await?;
    failing.one().await?.nack(Duration::ZERO).await?;
    client.letters_until(&destination, &bad, 1).await?;
    let report = client.redrive(&destination, &bad, &RedriveOptions::default()).await?;
    ensure_eq!((report.matched, report.moved), (1, 1), "matched and moved");
    let again = failing.one().await?;
    ensure_eq!(again.message(), &sent[0], "the redriven message");
    ensure_eq!(again.attempt(), 1, "the attempt after a redrive");
    again.ack().await?;
    keeper.silence_then_canary(&client, "this group is done with it").await?;
    ensure_eq!(client.letters(&destination, &bad).await?.len(), 0, "letters after the redrive");
    Ok(())
}

async fn dies_again(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_max_attempts(3)).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    for redrives in 0..=2 {
        for attempt in 1..=3 {
            let held = consumer.one().await?;
            ensure_eq!(held.attempt(), attempt, "the attempt after {redrives} redrives");
            ensure_eq!(held.message(), &sent[0], "the message after {redrives} redrives");
            held.nack(Duration::ZERO).await?;
        }
        let letters = client.letters_until(&destination, &group, 1).await?;
        ensure_eq!(letters.len(), 1, "letters");
        ensure_eq!(letters[0].message, sent[0], "the letter's message after {redrives} redrives");
        ensure_eq!(letters[0].redrives, redrives, "the redrives that the letter tells");
        ensure_eq!(letters[0].attempts, 3, "the attempts that the letter tells");
        if redrives < 2 {
            client.redrive(&destination, &group, &RedriveOptions::default()).await?;
        }
    }
    consumer.silence_then_canary(&client, "it is a dead letter").await
}

async fn dry_run(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let sent = stage.bury_many(3).await?;
    let report = stage.redrive(&options(|options| options.dry_run = true)).await?;
    ensure_eq!((report.matched, report.moved), (3, 3), "what the dry run tells");
    let Stage { client, consumer, destination, group } = &mut stage;
    consumer.silence_then_canary(client, "a dry run moves nothing").await?;
    let found = client.letters_until(destination, group, 3).await?;
    ensure_eq!(ids(found.iter().map(|letter| &letter.message)), ids(&sent), "letters after the dry run");
    Ok(())
}

async fn resumable(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let sent = stage.bury_many(6).await?;
    let odd = stage.client.message(&stage.destination, "odd");
    stage.bury(odd.clone(), Verdict::new(Reason::Malformed)).await?;
    let step = options(|options| {
        options.filter = filter(|filter| filter.reason = Some(Reason::Rejected));
        options.limit = Some(4);
        options.batch = 3;
    });
    let first = stage.redrive(&step).await?;
    ensure_eq!((first.matched, first.moved), (4, 4), "the first step");
    let mut came: Vec<String> = Vec::new();
    for held in stage.consumer.take(4).await? {
        came.push(held.id());
        held.ack().await?;
    }
    let second = stage.redrive(&step).await?;
    ensure_eq!((second.matched, second.moved), (2, 2), "the second step");
    for held in stage.consumer.take(2).await? {
        came.push(held.id());
        held.ack().await?;
    }
    let found: BTreeSet<_> = came.iter().cloned().collect();
    ensure_eq!(found, ids(&sent).into_iter().collect::<BTreeSet<_>>(), "what both steps brought back");
    let Stage { client, mut consumer, destination, group } = stage;
    consumer.silence_then_canary(&client, "each letter goes back once").await?;
    let left = client.letters_until(&destination, &group, 1).await?;
    ensure_eq!(ids(left.iter().map(|letter| &letter.message)), ids([&odd]), "the letter that was not chosen");
    Ok(())
}

async fn loop_guard(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    stage.bury_many(1).await?;
    let guard = options(|options| options.max_redrives = 2);
    for round in 0..2 {
        ensure_eq!(stage.redrive(&guard).await?.moved, 1, "moved in round {round}");
        stage.consumer.one().await?.dead_letter(Verdict::new(Reason::Rejected)).await?;
        stage.letters(1).await?;
    }
    let report = stage.redrive(&guard).await?;
    ensure_eq!((report.matched, report.moved, report.refused.len()), (1, 0, 1), "matched, moved, refused");
    let Stage { client, mut consumer, destination, group } = stage;
    consumer.silence_then_canary(&client, "the loop guard refused it").await?;
    ensure_eq!(client.letters_until(&destination, &group, 1).await?.len(), 1, "the letter stays");
    Ok(())
}

async fn purge(env: &Env) -> Proof {
    // More than brokers take in one request, or let wait while they are at work on what was asked for before.
    const MANY: usize = 60;
    let mut stage = Stage::new(env).await?;
    stage.bury_together(MANY).await?;
    let kept = stage.client.message(&stage.destination, "kept");
    stage.bury(kept.clone(), Verdict::new(Reason::Malformed)).await?;
    stage.letters(MANY + 1).await?;
    let rejected = filter(|filter| filter.reason = Some(Reason::Rejected));
    let purged = stage.client.purge(&stage.destination, &stage.group, &rejected).await?;
    ensure_eq!(purged, MANY as u64, "letters purged");
    let left = stage.letters(1).await?;
    ensure_eq!(ids(left.iter().map(|letter| &letter.message)), ids([&kept]), "the letters that stay");
    let Stage { client, mut consumer, destination, group } = stage;
    ensure_eq!(client.purge(&destination, &group, &rejected).await?, 0, "purged by a second call");
    consumer.silence_then_canary(&client, "purged letters do not come back").await?;
    if env.record.redrive.is_given() {
        let report = client.redrive(&destination, &group, &RedriveOptions::default()).await?;
        ensure_eq!(report.moved, 1, "letters left to redrive");
        let came = consumer.take(1).await?;
        ensure_eq!(held_ids(&came), ids([&kept]), "what the redrive brings");
    }
    Ok(())
}

async fn crash_limit(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let lease = env.lease();
    let spec = env.spec(&destination, &group).with_crash_limit(3).with_lease(lease);
    let mut consumer = client.subscribe(spec).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    for hand_over in 1..=3 {
        let held = consumer.one().await?;
        ensure_eq!(held.id(), sent[0].id().to_string(), "hand-over {hand_over}");
        drop(held);
        if env.harness.clock().is_some() {
            env.pass(lease).await;
        }
    }
    consumer.silence_then_canary(&client, "three hand-overs had no outcome").await?;
    let letters = client.letters_until(&destination, &group, 1).await?;
    ensure_eq!(ids(letters.iter().map(|letter| &letter.message)), ids(&sent), "the dead letters");
    ensure_eq!(letters[0].reason, Reason::CrashLimit, "the reason");
    Ok(())
}
