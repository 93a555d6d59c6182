//! What other programs write and read, seen with the bare client.
//!
//! Deliveries are taken past the history: messages that no client of the suite has published would be phantoms in it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    AckLevel, DeadLetterFilter, Delivery, Message, RESERVED_HEADER_PREFIX, Reason, RedriveOptions, Subscriber,
    TopologySpec, Verdict,
};
use tokio::time::Instant;

use super::case;
use crate::Case;
use crate::case::{Breach, Proof, ensure, ensure_eq};
use crate::client::Client;
use crate::env::Env;
use crate::native::{Carries, NativeChannel, Place, RawMessage};
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "native/what-other-programs-write-is-read-whole",
        [need::DECLARE, need::DESCRIBE],
        "Messages of programs that do not know this library come through, with all that they hold.",
        foreign
    ),
    case!(
        "native/a-payload-that-is-null-is-read-as-none",
        [need::DECLARE, need::DESCRIBE, need::TOMBSTONES],
        "A null that another program wrote is a tombstone, and an empty payload is none; so it is where the broker has no null.",
        null
    ),
    case!(
        "native/garbage-in-this-librarys-headers-loses-nothing-and-ends-nothing",
        [need::DECLARE, need::DESCRIBE],
        "What stands in a reserved header of another program's message may be anything: it is delivered, and the rest goes on.",
        garbage
    ),
    case!(
        "native/what-another-program-wrote-fails-and-dies-like-any-other",
        [need::DECLARE, need::DESCRIBE, need::NACK, need::DEAD_LETTER],
        "A nack, a dead letter and a redrive keep all that a foreign message holds.",
        foreign_fails
    ),
    case!(
        "native/what-another-program-wrote-together-is-settled-one-by-one",
        [need::DECLARE, need::DESCRIBE],
        "A program may write many messages as one batch: what of it is not settled comes again, and what was confirmed does not.",
        foreign_batch
    ),
    case!(
        "native/what-is-published-is-what-other-programs-read",
        [need::DECLARE, need::DESCRIBE],
        "Headers travel natively where the broker carries them exactly, and the payload as it is.",
        on_the_wire
    ),
];

/// A destination with a group, and what the broker calls them.
struct Stage<'e> {
    env: &'e Env,
    client: Client<'e>,
    native: Arc<dyn NativeChannel>,
    place: Place,
    subscriber: Option<Subscriber>,
}

impl<'e> Stage<'e> {
    async fn new(env: &'e Env) -> Proof<Self> {
        let native = env.harness.native().map_err(Breach::NotRun)?;
        let (destination, group) = (env.destination("d"), env.group("g"));
        let client = env.client().await?;
        client.declare(&TopologySpec::group(&destination, group)).await?;
        let described = env.bounded("describe", client.bus.describe(&destination)).await??;
        let group = described.groups.first().map(|group| group.physical.clone());
        let group = group.ok_or_else(|| Breach::Failed("the declared group is not described".into()))?;
        Ok(Self { env, client, native, place: Place::new(described.physical, group), subscriber: None })
    }

    async fn put(&mut self, messages: &[RawMessage]) -> Proof {
        let put = self.env.bounded("put natively", self.native.put(&self.place, messages)).await?;
        put.map_err(|why| Breach::Failed(format!("the bare client could not write: {why}")))
    }

    async fn receive(&mut self, count: usize) -> Proof<Vec<Delivery>> {
        let (destination, group) = (self.env.destination("d"), self.env.group("g"));
        let subscriber = match &mut self.subscriber {
            Some(subscriber) => subscriber,
            none => {
                let spec = self.env.spec(&destination, &group);
                none.insert(self.env.bounded("subscribe", self.client.bus.subscribe(spec)).await??)
            }
        };
        let deadline = Instant::now() + self.env.patience();
        let mut came = Vec::new();
        while came.len() < count {
            ensure!(Instant::now() < deadline, "{} of {count} messages of another program came", came.len());
            let more = subscriber.receive(count - came.len(), Duration::from_millis(200));
            came.extend(self.env.bounded("receive", more).await??);
        }
        Ok(came)
    }

    /// Everything that comes, at least these, until nothing has come for a while.
    async fn receive_until_quiet(&mut self, expected: &BTreeSet<String>) -> Proof<Vec<Delivery>> {
        let mut came = self.receive(expected.len()).await?;
        let deadline = Instant::now() + self.env.patience();
        while !expected.is_subset(&came.iter().map(payload).collect()) {
            ensure!(
                Instant::now() < deadline,
                "of {expected:?} there came {:?}",
                came.iter().map(payload).collect::<Vec<_>>()
            );
            came.extend(self.more(Duration::from_millis(200)).await?);
        }
        loop {
            match self.more(self.env.quiet()).await? {
                none if none.is_empty() => return Ok(came),
                more => came.extend(more),
            }
        }
    }

    async fn more(&mut self, within: Duration) -> Proof<Vec<Delivery>> {
        match &mut self.subscriber {
            Some(subscriber) => Ok(self.env.bounded("receive", subscriber.receive(100, within)).await??),
            None => Ok(Vec::new()),
        }
    }

    /// With a client of its own from here on; what the one before has out is still held.
    async fn again(&mut self) -> Proof {
        if let Some(subscriber) = self.subscriber.take() {
            self.env.bounded("close", subscriber.close(self.env.patience())).await??;
        }
        std::mem::replace(&mut self.client, self.env.client().await?).close().await
    }

    /// Nothing comes for a while, and then a message of this library does.
    async fn end(mut self) -> Proof {
        let quiet = self.env.quiet();
        if let Some(subscriber) = &mut self.subscriber {
            let more = self.env.bounded("receive", subscriber.receive(10, quiet)).await??;
            ensure!(more.is_empty(), "came again after an ack: {:?}", more.iter().map(payload).collect::<Vec<_>>());
        }
        let canary = Message::new(self.env.destination("d"), "canary").with_key("canary");
        for outcome in self.env.bounded("publish", self.client.bus.publish(vec![canary.clone()])).await? {
            outcome?;
        }
        let came = self.receive(1).await?.remove(0);
        ensure_eq!(came.message().id(), canary.id(), "what comes last");
        came.ack().await?;
        match self.subscriber.take() {
            Some(subscriber) => Ok(self.env.bounded("close", subscriber.close(self.env.patience())).await??),
            None => Ok(()),
        }
    }
}

fn payload(delivery: &Delivery) -> String {
    String::from_utf8_lossy(delivery.message().bytes()).into_owned()
}

fn text_of(put: &RawMessage) -> String {
    String::from_utf8_lossy(put.payload.as_deref().unwrap_or_default()).into_owned()
}

async fn ack_all(deliveries: Vec<Delivery>) -> Proof {
    for delivery in deliveries {
        delivery.ack().await?;
    }
    Ok(())
}

/// Each with a payload of its own, by which it is told from the others.
fn shapes(carries: Carries) -> Vec<RawMessage> {
    let mut shapes = vec![
        RawMessage::of("a payload and nothing else"),
        RawMessage::of("{\"text\": \"ключ <&> \\u0000\"}").with_header("x", "1").with_header("ключ-x", "y"),
        // The binary mode of CloudEvents.
        RawMessage {
            content_type: carries.content_type.then(|| "application/json".to_owned()),
            ..RawMessage::of("{\"total\": 12}")
        }
        .with_header("ce_specversion", "1.0")
        .with_header("ce_id", "7f2a")
        .with_header("ce_source", "/shop")
        .with_header("ce_type", "com.example.order"),
        RawMessage::of(" spaces and a line\nfeed \t").with_header("many", "v".repeat(1_000)),
    ];
    if carries.keys {
        shapes.push(RawMessage { key: Some(b"a key".to_vec()), ..RawMessage::of("keyed") });
        shapes.push(RawMessage { key: Some(vec![0, 0xff, 0xfe]), ..RawMessage::of("keyed with bytes") });
    }
    if carries.any_bytes {
        shapes.push(RawMessage::of((0..=255).collect::<Vec<u8>>()));
        shapes.push(RawMessage::of([0xff, 0xfe, 0x00]));
    }
    if carries.empty {
        shapes.push(RawMessage::of("").with_header("of", "an empty payload"));
    }
    if carries.any_header {
        shapes.push(RawMessage::of("odd headers").with_header("bytes", [0xff, 0x00, 0xfe]).with_header("empty", ""));
    }
    shapes.retain(|shape| carries.any_header || shape.headers.iter().all(|(name, _)| name.is_ascii()));
    shapes
}

/// That a message holds what was put.
fn compare(found: &Message, put: &RawMessage) -> Proof {
    let name = text_of(put);
    ensure_eq!(found.payload().map(|bytes| bytes.to_vec()), put.payload, "the payload of `{name}`");
    if put.key.is_some() {
        ensure_eq!(found.key().map(<[u8]>::to_vec), put.key, "the key of `{name}`");
    }
    for (header, value) in &put.headers {
        ensure_eq!(found.headers().get(header), Some(&value[..]), "header `{header}` of `{name}`");
    }
    if let Some(content_type) = &put.content_type {
        let told = found.content_type().or_else(|| {
            let header = found.headers().get("content-type")?;
            std::str::from_utf8(header).ok()
        });
        ensure_eq!(told, Some(&**content_type), "the content type of `{name}`");
    }
    let own: Vec<&str> =
        found.headers().iter().map(|(name, _)| name).filter(|name| name.starts_with(RESERVED_HEADER_PREFIX)).collect();
    ensure!(own.is_empty(), "reserved headers of `{name}` show: {own:?}");
    ensure!(!found.id().is_empty(), "`{name}` has an empty id");
    Ok(())
}

/// Each of `put` is among what came, once, and there is nothing else.
fn compare_all(came: &[Delivery], put: &[RawMessage]) -> Proof {
    ensure_eq!(came.len(), put.len(), "how many messages came");
    for shape in put {
        let same: Vec<&Delivery> = came
            .iter()
            .filter(|found| found.message().payload().map(|bytes| &bytes[..]) == shape.payload.as_deref())
            .collect();
        let name = text_of(shape);
        ensure_eq!(same.len(), 1, "how often `{name}` came");
        compare(same[0].message(), shape)?;
        ensure_eq!(same[0].attempt(), 1, "the attempt of `{name}`");
    }
    Ok(())
}

async fn foreign(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let put = shapes(stage.native.carries());
    stage.put(&put).await?;
    let came = stage.receive(put.len()).await?;
    compare_all(&came, &put)?;
    ack_all(came).await?;
    stage.end().await
}

async fn null(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let carries = stage.native.carries();
    if !carries.empty {
        return Err(Breach::NotRun("the broker has tombstones, and its bare client writes no empty payload".into()));
    }
    let key = carries.keys.then(|| b"k".to_vec());
    let mut put = vec![RawMessage { key: key.clone(), ..RawMessage::of("") }];
    if carries.null {
        put.push(RawMessage { payload: None, key, ..RawMessage::default() });
    }
    stage.put(&put).await?;
    let came = stage.receive(put.len()).await?;
    let nulls = came.iter().filter(|found| found.message().is_tombstone()).count();
    ensure_eq!((came.len(), nulls), (put.len(), put.len() - 1), "messages, and tombstones among them");
    ack_all(came).await?;
    stage.end().await
}

async fn garbage(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let carries = stage.native.carries();
    let mut put = Vec::new();
    for (number, name) in ["meta", "note", "hop", "letter", "key", "attempt", "id"].into_iter().enumerate() {
        let header = format!("{RESERVED_HEADER_PREFIX}{name}");
        let mut values: Vec<Vec<u8>> = vec![b"x".to_vec(), b"{\"f\": -1}".to_vec(), b"AQAAAAAA".to_vec()];
        if carries.any_header {
            values.extend([vec![0xff; 40], vec![1], vec![127, 0, 0, 0, 0, 255, 255, 255, 255], Vec::new()]);
        }
        for (place, value) in values.into_iter().enumerate() {
            put.push(RawMessage::of(format!("garbage {number}/{place}")).with_header(&header, value));
        }
    }
    stage.put(&put).await?;
    let came = stage.receive(put.len()).await?;
    let mut found: Vec<String> = came.iter().map(payload).collect();
    let mut expected: Vec<String> = put.iter().map(text_of).collect();
    found.sort_unstable();
    expected.sort_unstable();
    ensure_eq!(found, expected, "the payloads of what came");
    ack_all(came).await?;
    stage.end().await
}

async fn foreign_fails(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let carries = stage.native.carries();
    let mut put = RawMessage::of("it fails").with_header("x", "1").with_header("y", "two words");
    put.content_type = carries.content_type.then(|| "text/plain".to_owned());
    put.key = carries.keys.then(|| b"k".to_vec());
    stage.put(std::slice::from_ref(&put)).await?;
    let first = stage.receive(1).await?.remove(0);
    let id = first.message().id().clone();
    first.nack(Duration::ZERO).await?;
    let again = stage.receive(1).await?.remove(0);
    compare(again.message(), &put)?;
    ensure_eq!((again.attempt(), again.message().id()), (2, &id), "attempt and id after a nack");
    again.dead_letter(Verdict::new(Reason::Rejected)).await?;
    let letters = env.bounded("dead letters", async {
        let letters = stage.client.bus.dead_letters(env.destination("d"), env.group("g"))?;
        letters.peek(&DeadLetterFilter::all(), 10).await
    });
    let letters = letters.await??;
    ensure_eq!(letters.len(), 1, "dead letters");
    compare(&letters[0].message, &put)?;
    ensure_eq!(letters[0].message.id(), &id, "the id of the dead letter");
    if env.record.redrive.is_given() {
        let redriving = env.bounded("redrive", async {
            let letters = stage.client.bus.dead_letters(env.destination("d"), env.group("g"))?;
            letters.redrive(&RedriveOptions::default()).await
        });
        ensure_eq!(redriving.await??.moved, 1, "letters that were put back");
        let again = stage.receive(1).await?.remove(0);
        compare(again.message(), &put)?;
        ensure_eq!((again.attempt(), again.message().id()), (1, &id), "attempt and id after a redrive");
        again.ack().await?;
    }
    stage.end().await
}

async fn foreign_batch(env: &Env) -> Proof {
    let mut stage = Stage::new(env).await?;
    let count = env.at_once(12);
    let put: Vec<RawMessage> = (0..count).map(|number| RawMessage::of(format!("part {number}"))).collect();
    stage.put(&put).await?;
    let came = stage.receive(count).await?;
    compare_all(&came, &put)?;
    // Every third one, beginning with the second, so that there are some before and behind what is acked.
    let is_kept = |delivery: &Delivery| {
        put.iter().position(|put| text_of(put) == payload(delivery)).is_some_and(|at| at % 3 == 1)
    };
    let (kept, acked): (Vec<_>, Vec<_>) = came.into_iter().partition(is_kept);
    let unsettled: BTreeSet<String> = kept.iter().map(payload).collect();
    let mut confirmed = BTreeSet::new();
    for delivery in acked {
        let name = payload(&delivery);
        if delivery.ack().await? == AckLevel::Confirmed {
            confirmed.insert(name);
        }
    }
    stage.again().await?;
    drop(kept);
    let left = stage.receive_until_quiet(&unsettled).await?;
    let names: Vec<String> = left.iter().map(payload).collect();
    let different: BTreeSet<String> = names.iter().cloned().collect();
    ensure_eq!(names.len(), different.len(), "how many came, and how many different ones: {names:?}");
    let undone: Vec<&String> = different.intersection(&confirmed).collect();
    ensure!(undone.is_empty(), "confirmed as acked, and came again: {undone:?}");
    ack_all(left).await?;
    stage.end().await
}

async fn on_the_wire(env: &Env) -> Proof {
    let stage = Stage::new(env).await?;
    let carries = stage.native.carries();
    let texts = ["plain", "{\"total\": 12}"];
    let mut sent: Vec<Message> = texts
        .iter()
        .map(|text| {
            Message::new(env.destination("d"), *text)
                .with_key("order-17")
                .with_content_type("application/json")
                .with_header("ce_type", "com.example.order")
                .with_header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        })
        .collect();
    if carries.any_bytes {
        sent.push(Message::new(env.destination("d"), (0..=255).collect::<Vec<u8>>()).with_key("order-17"));
    }
    for outcome in env.bounded("publish", stage.client.bus.publish(sent.clone())).await? {
        outcome?;
    }
    let taken = env.bounded("take natively", stage.native.take(&stage.place, sent.len())).await?;
    let taken = taken.map_err(|why| Breach::Failed(format!("the bare client could not read: {why}")))?;
    ensure_eq!(taken.len(), sent.len(), "how many messages lie there");
    for message in &sent {
        let same: Vec<&RawMessage> =
            taken.iter().filter(|raw| raw.payload.as_deref() == Some(message.bytes())).collect();
        let name = String::from_utf8_lossy(message.bytes()).into_owned();
        ensure_eq!(same.len(), 1, "how often the payload `{name}` lies there as it was given, in {taken:?}");
        let raw = same[0];
        for (header, value) in message.headers() {
            ensure_eq!(raw.header(header), Some(value), "header `{header}` as other programs read it");
        }
        if carries.content_type {
            ensure_eq!(
                raw.content_type.as_deref(),
                message.content_type(),
                "the content type as other programs read it"
            );
        }
        if carries.keys {
            ensure_eq!(raw.key.as_deref(), message.key(), "the key as other programs read it");
        }
    }
    Ok(())
}
