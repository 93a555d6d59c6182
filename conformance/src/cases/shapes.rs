//! Shapes of payloads, headers, keys and names: exact, or refused with a type.

use anybroker_core::{Bytes, Destination, Effect, ErrorKind, Message, MessageId, RESERVED_HEADER_PREFIX, Timestamp};

use super::case;
use crate::Case;
use crate::case::{Proof, ensure, ensure_eq, fail};
use crate::client::Client;
use crate::consumer::Consumer;
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "shapes/payloads-of-any-bytes-come-through",
        [],
        "payload: bytes (empty allowed, any byte); everything round-trips byte for byte.",
        payloads
    ),
    case!(
        "shapes/a-tombstone-is-not-an-empty-payload",
        [need::TOMBSTONES],
        "A tombstone differs from an empty payload.",
        tombstone
    ),
    case!(
        "shapes/the-largest-payload-passes-and-one-byte-more-is-too-large",
        [],
        "Too large is TooLarge, before it hurts the connection.",
        largest
    ),
    case!(
        "shapes/headers-are-ordered-repeatable-and-hold-any-bytes",
        [],
        "headers: ordered, repeatable, byte values.",
        headers
    ),
    case!(
        "shapes/header-names-that-mean-something-to-a-broker-change-nothing",
        [need::NACK],
        "User headers cannot be forged into changing broker behaviour.",
        foreign_names
    ),
    case!(
        "shapes/the-librarys-own-header-names-are-refused",
        [],
        "The library's own headers cannot be forged: InvalidMessage, and the connection stays usable.",
        reserved_names
    ),
    case!(
        "shapes/the-librarys-own-headers-never-show",
        [need::NACK, need::DEAD_LETTER, need::REDRIVE],
        "The library's own headers never show among the user's.",
        own_headers_hidden
    ),
    case!(
        "shapes/many-and-big-headers-come-through-or-are-refused-with-a-type",
        [],
        "Everything round-trips, or publish answers TooLarge or InvalidMessage.",
        big_headers
    ),
    case!("shapes/keys-of-any-bytes-come-through", [], "key: optional bytes.", keys),
    case!(
        "shapes/content-type-and-timestamp-come-through",
        [],
        "content type, timestamp: as they were given.",
        metadata
    ),
    case!(
        "shapes/an-empty-id-destination-or-header-name-is-refused",
        [],
        "What cannot be named is InvalidMessage, with effect not done.",
        empty_names
    ),
    case!(
        "shapes/names-of-destinations-and-groups-may-be-long-dotted-and-alike",
        [],
        "Names are logical and may hold dots; adapters map them injectively.",
        names
    ),
];

/// A header's name and value.
type Pair<'a> = (&'a str, &'a [u8]);

struct Stage<'e> {
    client: Client<'e>,
    consumer: Consumer<'e>,
    destination: Destination,
}

impl<'e> Stage<'e> {
    async fn new(env: &'e Env) -> Proof<Self> {
        let destination = env.destination("d");
        let client = env.client().await?;
        let consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
        Ok(Self { client, consumer, destination })
    }

    /// It comes through unchanged, or its publish answers that it cannot be represented. Tells which.
    async fn round_trip(&mut self, what: &str, message: Message) -> Proof<bool> {
        match self.client.send(message.clone()).await? {
            Ok(_) => {
                let held = self.consumer.one().await?;
                if held.message() != &message {
                    fail!("{what}: sent {}, came {}", show(&message), show(held.message()));
                }
                held.ack().await?;
                Ok(true)
            }
            Err(error) => {
                let kind = error.kind();
                ensure!(matches!(kind, ErrorKind::InvalidMessage | ErrorKind::TooLarge), "{what}: {error:?}");
                ensure_eq!(error.effect(), Effect::NotDone, "{what}: effect of the refusal");
                Ok(false)
            }
        }
    }

    /// It comes through unchanged.
    async fn must_pass(&mut self, what: &str, message: Message) -> Proof {
        ensure!(self.round_trip(what, message).await?, "{what}: refused");
        Ok(())
    }

    /// It is refused with that kind, and the connection is usable afterwards.
    async fn must_be(&mut self, kind: ErrorKind, what: &str, message: Message) -> Proof {
        match self.client.send(message).await? {
            Ok(_) => fail!("{what}: accepted"),
            Err(error) => {
                ensure_eq!(error.kind(), kind, "{what}: kind of the refusal ({error})");
                ensure_eq!(error.effect(), Effect::NotDone, "{what}: effect of the refusal");
            }
        }
        let after = self.client.message(&self.destination, "after");
        self.must_pass(&format!("the message after {what}"), after).await
    }

    fn with_payload(&self, payload: impl Into<Bytes>) -> Message {
        Message::new(&self.destination, payload).with_key("k").with_header("h", "v")
    }

    fn with_headers<'h>(&self, headers: impl IntoIterator<Item = (&'h str, &'h [u8])>) -> Message {
        let mut message = Message::new(&self.destination, "body").with_key("k");
        message.headers_mut().extend(headers);
        message
    }
}

/// Short enough to read, whatever the size.
fn show(message: &Message) -> String {
    let text = format!("{message:?}");
    let cut = text.char_indices().nth(600).map_or(text.len(), |(at, _)| at);
    format!("{}{}", &text[..cut], if cut < text.len() { "…" } else { "" })
}

async fn payloads(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let all: Vec<u8> = (0..=255).collect();
    let payloads: [(&str, Vec<u8>); 12] = [
        ("an empty payload", Vec::new()),
        ("one zero byte", vec![0]),
        ("all 256 byte values", all.clone()),
        ("all 256 byte values, backwards", all.into_iter().rev().collect()),
        ("invalid UTF-8", vec![0xc3, 0x28, 0xff, 0xfe, 0xed, 0xa0, 0x80]),
        ("text that looks like base64", b"SGVsbG8=".to_vec()),
        ("text that looks like JSON of an envelope", br#"{"Type":"Notification","Message":"x","headers":{}}"#.to_vec()),
        ("characters that XML has no place for", "a\u{1}\u{b}\u{fffe}\u{ffff}z".into()),
        ("emoji and combining characters", "👩‍👩‍👧‍👦 e\u{301} \u{202e}".into()),
        ("line ends", b"\r\n\r\n.\r\n\0".to_vec()),
        ("spaces only", b"   ".to_vec()),
        ("64 KiB", (0..65_536_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect()),
    ];
    for (what, payload) in payloads {
        let message = stage.with_payload(payload);
        stage.must_pass(what, message).await?;
    }
    Ok(())
}

async fn tombstone(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let tombstone = Message::tombstone(&stage.destination, "k").with_header("h", "v");
    stage.must_pass("a tombstone", tombstone).await?;
    let empty = stage.with_payload("");
    stage.must_pass("an empty payload", empty).await
}

async fn largest(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    // Where the endpoint states no limit, what everybody carries.
    let Some(limit) = env.record.limits.payload else {
        let message = stage.with_payload(vec![7; 1 << 20]);
        return stage.must_pass("1 MiB where the record states no limit", message).await;
    };
    let size = usize::try_from(limit).map_err(|_| crate::case::Breach::NotRun("the limit exceeds memory".into()))?;
    ensure!(size <= 64 << 20, "a limit of {limit} bytes is more than a message can sensibly have");
    let exact = Message::new(&stage.destination, vec![0xa5; size]);
    stage.must_pass("a payload of exactly the limit", exact).await?;
    let over = Message::new(&stage.destination, vec![0xa5; size + 1]);
    stage.must_be(ErrorKind::TooLarge, "one byte more than the limit", over).await
}

async fn headers(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let bytes: Vec<u8> = (0..=255).collect();
    let sets: [(&str, Vec<Pair<'_>>); 9] = [
        ("no headers", vec![]),
        ("repeated names, interleaved", vec![("a", b"1"), ("b", b"x"), ("a", b"2"), ("a", b"1")]),
        ("names that differ in case", vec![("Tenant", b"1"), ("tenant", b"2"), ("TENANT", b"3")]),
        ("empty values", vec![("a", b""), ("a", b""), ("b", b"")]),
        ("all 256 byte values", vec![("bytes", &bytes)]),
        ("line ends in values", vec![("a", b"x\r\nInjected: yes\r\n\r\nbody"), ("b", b"\n")]),
        ("unicode names and values", vec![("ключ 🔑", "значение".as_bytes()), ("é", "e\u{301}".as_bytes())]),
        ("odd names", vec![("../a b\\\"'", b"1"), ("a=b;c,d", b"2"), ("0", b"3"), (".", b"4"), ("%41_%", b"5")]),
        ("line ends in names", vec![("a\r\nInjected", b"1"), ("b\tc", b"2")]),
    ];
    for (index, (what, set)) in sets.into_iter().enumerate() {
        let message = stage.with_headers(set);
        if index < 5 {
            stage.must_pass(what, message).await?;
        } else {
            stage.round_trip(what, message).await?;
        }
    }
    Ok(())
}

async fn foreign_names(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let names: &[(&str, &[u8])] = &[
        ("x-death", b"[{count: 99}]"),
        ("x-delivery-count", b"99"),
        ("x-delay", b"3600000"),
        ("Nats-Msg-Id", b"the same"),
        ("Nats-Expected-Last-Sequence", b"1"),
        ("Nats-Rollup", b"all"),
        ("AWS.trace", b"x"),
        ("Amazon.x", b"x"),
        ("content-type", b"text/fake"),
        ("message-id", b"fake"),
        ("id", b"fake"),
        ("key", b"fake"),
        ("timestamp", b"0"),
        ("expiration", b"1"),
        ("delay", b"3600"),
        ("attempt", b"99"),
        ("__0x2f__", b"x"),
        ("REAL_TOPIC", b"fake"),
        ("RECONSUMETIMES", b"99"),
        ("kafka_offset", b"0"),
    ];
    for round in 0..2 {
        // The same values twice: a broker that took them for its own would swallow or refuse the second.
        for name in names {
            let message = stage.with_headers([*name]);
            stage.must_pass(&format!("a header `{}` (round {round})", name.0), message).await?;
        }
    }
    // Together, on a message that fails once: it comes back unchanged at attempt 2.
    for set in names.chunks(5) {
        let message = stage.with_headers(set.iter().copied());
        stage.client.publish_ok(vec![message.clone()]).await?;
        for attempt in 1..=2 {
            let held = stage.consumer.one().await?;
            ensure_eq!((held.message(), held.attempt()), (&message, attempt), "message and attempt");
            if attempt == 1 { held.nack(std::time::Duration::ZERO).await? } else { held.ack().await? }
        }
    }
    let Stage { client, mut consumer, .. } = stage;
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn reserved_names(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    for name in ["attempt", "redrives", "x", ""] {
        for prefix in [RESERVED_HEADER_PREFIX.to_owned(), RESERVED_HEADER_PREFIX.to_uppercase()] {
            let name = format!("{prefix}{name}");
            let message = stage.with_headers([(name.as_str(), &b"99"[..])]);
            stage.must_be(ErrorKind::InvalidMessage, &format!("a header `{name}`"), message).await?;
        }
    }
    let message = stage.with_headers([("anybroker", &b"1"[..]), ("x-anybroker-attempt", b"2")]);
    stage.must_pass("names that only look like it", message).await
}

async fn own_headers_hidden(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_max_attempts(2)).await?;
    let message = Message::new(&destination, "body").with_key("k");
    client.publish_ok(vec![message.clone()]).await?;
    for _ in 0..2 {
        let held = consumer.one().await?;
        ensure_eq!(held.message().headers().len(), 0, "headers of a message that was sent without");
        held.nack(std::time::Duration::ZERO).await?;
    }
    let letter = client.letters_until(&destination, &group, 1).await?.remove(0);
    ensure_eq!(letter.message.headers().len(), 0, "headers of the dead letter");
    client.redrive(&destination, &group, &anybroker_core::RedriveOptions::default()).await?;
    let held = consumer.one().await?;
    ensure_eq!(held.message(), &message, "the redriven message");
    held.ack().await
}

async fn big_headers(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let limits = env.record.limits;
    let big = vec![0x5a; 16 << 10];
    let message = stage.with_headers([("big", &big[..])]);
    stage.round_trip("a header of 16 KiB", message).await?;
    let names: Vec<String> = (0..100).map(|number| format!("name-{number}")).collect();
    let message = stage.with_headers(names.iter().map(|name| (name.as_str(), name.as_bytes())));
    stage.round_trip("100 headers", message).await?;
    let long = "n".repeat(255);
    let message = stage.with_headers([(long.as_str(), &b"v"[..])]);
    stage.round_trip("a header name of 255 bytes", message).await?;
    if let Some(limit) = limits.headers.and_then(|limit| usize::try_from(limit).ok()).filter(|limit| *limit <= 16 << 20)
    {
        let exact = vec![1; limit - 1];
        let message = stage.with_headers([("h", &exact[..])]);
        stage.must_pass("headers of exactly the limit", message).await?;
        let over = vec![1; limit];
        let message = stage.with_headers([("h", &over[..])]);
        stage.must_be(ErrorKind::TooLarge, "headers of one byte more than the limit", message).await?;
    }
    if let Some(limit) =
        limits.header_count.and_then(|limit| usize::try_from(limit).ok()).filter(|limit| *limit <= 10_000)
    {
        let message = stage.with_headers((0..limit).map(|_| ("n", &b"v"[..])));
        stage.must_pass("as many headers as the limit", message).await?;
        let message = stage.with_headers((0..=limit).map(|_| ("n", &b"v"[..])));
        stage.must_be(ErrorKind::InvalidMessage, "one header more than the limit", message).await?;
    }
    Ok(())
}

async fn keys(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let all: Vec<u8> = (0..=255).collect();
    stage.must_pass("no key", Message::new(&stage.destination, "body")).await?;
    for (what, key) in [
        ("a key of text", b"order-17".to_vec()),
        ("a key of one zero byte", vec![0]),
        ("a key of invalid UTF-8", vec![0xff, 0xfe, 0x00]),
        ("a key with line ends", b"a\r\nb".to_vec()),
    ] {
        let message = Message::new(&stage.destination, "body").with_key(key);
        stage.must_pass(what, message).await?;
    }
    for (what, key) in
        [("an empty key", Vec::new()), ("a key of all byte values", all), ("a key of 4 KiB", vec![b'k'; 4_096])]
    {
        let message = Message::new(&stage.destination, "body").with_key(key);
        stage.round_trip(what, message).await?;
    }
    if let Some(limit) =
        env.record.limits.key.and_then(|limit| usize::try_from(limit).ok()).filter(|limit| *limit <= 1 << 20)
    {
        let exact = Message::new(&stage.destination, "body").with_key(vec![b'k'; limit]);
        stage.must_pass("a key of exactly the limit", exact).await?;
        let over = Message::new(&stage.destination, "body").with_key(vec![b'k'; limit + 1]);
        stage.must_be(ErrorKind::InvalidMessage, "a key of one byte more than the limit", over).await?;
    }
    Ok(())
}

async fn metadata(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let plain = || Message::new(&stage.destination, "body");
    let messages = [
        ("no content type", plain()),
        ("a content type", plain().with_content_type("application/cloudevents+json; charset=UTF-8")),
        ("the epoch", plain().with_timestamp(Timestamp::from_millis(0))),
        ("a timestamp with milliseconds", plain().with_timestamp(Timestamp::from_millis(1_767_225_600_123))),
        ("a timestamp far ahead", plain().with_timestamp(Timestamp::from_millis(4_102_444_800_000))),
    ];
    for (what, message) in messages {
        stage.must_pass(what, message).await?;
    }
    for (what, message) in [
        ("an empty content type", Message::new(&stage.destination, "body").with_content_type("")),
        (
            "a time before the epoch",
            Message::new(&stage.destination, "body").with_timestamp(Timestamp::from_millis(-1)),
        ),
    ] {
        stage.round_trip(what, message).await?;
    }
    Ok(())
}

async fn empty_names(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let message = stage.with_payload("body").with_id(MessageId::from(""));
    stage.must_be(ErrorKind::InvalidMessage, "an empty id", message).await?;
    let message = stage.with_payload("body").with_destination("");
    stage.must_be(ErrorKind::InvalidMessage, "an empty destination", message).await?;
    let message = stage.with_headers([("", &b"v"[..])]);
    stage.must_be(ErrorKind::InvalidMessage, "an empty header name", message).await
}

async fn names(env: &Env) -> Proof {
    let client = env.client().await?;
    let long = "n".repeat(120);
    let labels = [
        "a.b.c".to_owned(),
        "a..b".to_owned(),
        "A.B.C".to_owned(),
        "a_b_c".to_owned(),
        "with-dash".to_owned(),
        format!("{long}.1"),
        format!("{long}.2"),
        "ending.dlq".to_owned(),
        "ending.fifo".to_owned(),
    ];
    let mut consumers = Vec::new();
    for label in &labels {
        let spec = env.spec(&env.destination(label), &env.group(label));
        consumers.push(client.subscribe(spec).await?);
    }
    let mut sent = Vec::new();
    for label in &labels {
        sent.extend(client.fill(&env.destination(label), "k", 1).await?);
    }
    for (consumer, sent) in consumers.iter_mut().zip(&sent) {
        let held = consumer.one().await?;
        ensure_eq!(held.message(), sent, "what {} brings", sent.destination());
        held.ack().await?;
    }
    for consumer in &mut consumers {
        consumer.silence("a name that is alike").await?;
    }
    Ok(())
}
