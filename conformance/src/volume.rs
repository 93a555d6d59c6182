//! Many messages while every connection is cut and the server is killed: minutes show what a case of seconds does not.
//!
//! It is no case: it takes long, and its times are of interest. An adapter's test runs it on a harness that has
//! [routes](Harness::routes) and, where the server keeps what it has, a [process](Harness::server).

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anybroker_core::{
    Bus, Effect, Error, ErrorKind, Message, MessageId, Order, PublishOptions, PublishOrder, Result, Subscriber, ack,
};
use futures_util::future::try_join_all;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::Harness;
use crate::faults::{End, Proxy};

/// How much. The default is what the adapters' tests run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// In all; a multiple of the publishers.
    pub messages: u32,
    /// Each publishes its share, in order, with keys of its own, and again what is not confirmed.
    pub publishers: u32,
    /// Of one group.
    pub members: u32,
    /// Of each publisher.
    pub keys: u32,
    /// Messages that are published with one call.
    pub batch: u32,
    /// By then a publish ends whose answer does not come.
    pub publish_timeout: Duration,
    /// What is leased to nobody comes back after that.
    pub lease: Duration,
}

impl Default for Volume {
    fn default() -> Self {
        Self {
            messages: 100_000,
            publishers: 8,
            members: 4,
            keys: 16,
            batch: 100,
            publish_timeout: Duration::from_secs(10),
            lease: Duration::from_secs(30),
        }
    }
}

/// What became of them.
#[derive(Debug, Default)]
pub struct VolumeReport {
    /// Confirmed, and never delivered.
    pub lost: Vec<u32>,
    /// Delivered, and never published.
    pub phantoms: Vec<String>,
    /// First deliveries of a key in the wrong order: what came before, and what came then. Without what was ever unknown, whose
    /// place nobody knows. Empty where the record has no order.
    pub reordered: Vec<(u32, u32)>,
    /// Receives that ended with an error: an interruption is no end.
    pub aborted: Vec<Error>,
    /// Messages whose publish had an unknown outcome; each was published again.
    pub unknown: usize,
    /// Deliveries of what had come before.
    pub again: u32,
    /// Connections that were cut.
    pub cut: usize,
    /// What happened in the middle.
    pub recoveries: Vec<Recovery>,
    /// From the first publish to the last delivery.
    pub took: Duration,
}

/// How it went on after something happened.
#[derive(Debug, Clone, Copy)]
pub struct Recovery {
    /// What happened.
    pub what: &'static str,
    /// For how long.
    pub lasted: Duration,
    /// From its end to the first confirm of what was published after it.
    pub confirm: Duration,
    /// From its end to the first delivery of what was published after it, which comes behind what was there already.
    pub delivery: Duration,
}

impl VolumeReport {
    /// Nothing lost, nothing phantom, nothing out of order, no receive that ended.
    #[must_use]
    pub fn is_green(&self) -> bool {
        self.lost.is_empty() && self.phantoms.is_empty() && self.reordered.is_empty() && self.aborted.is_empty()
    }
}

impl fmt::Display for VolumeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} lost, {} phantoms, {} out of order, {} aborted reads; {} unknown publishes, {} came again, {} connections cut, \
             {:.1?} in all",
            self.lost.len(),
            self.phantoms.len(),
            self.reordered.len(),
            self.aborted.len(),
            self.unknown,
            self.again,
            self.cut,
            self.took
        )?;
        for Recovery { what, lasted, confirm, delivery } in &self.recoveries {
            write!(
                f,
                "\n{what} for {lasted:.1?}; then a confirm after {confirm:.1?}, a delivery after {delivery:.1?}"
            )?;
        }
        Ok(())
    }
}

/// Publishes and consumes all of it. The server is killed and started again after a third, where the harness has it in its
/// hands, and every connection is cut after two thirds. Before each of them something is kept back: how soon it goes on shows in
/// messages that are published afterwards.
///
/// # Errors
/// What connecting, subscribing and deleting say; `Timeout` when nothing goes on for the harness's patience, three times over.
pub async fn volume(harness: &dyn Harness, volume: &Volume) -> Result<VolumeReport> {
    let routes = harness.routes().map_err(|why| Error::new(ErrorKind::ConfigInvalid, "volume", why))?;
    let mut proxies = Vec::new();
    for route in routes {
        let proxy = Proxy::start(route.listen, route.upstream.clone());
        proxies.push(proxy.map_err(|error| Error::new(ErrorKind::Unavailable, "volume", error.to_string()))?);
    }
    let addresses: Vec<_> = proxies.iter().map(Proxy::address).collect();
    let connect = || harness.connect_through(&addresses);
    let name = format!("volume.{}", MessageId::new());
    let scene = Scene::new(volume, name, harness.patience() * 3);
    let mut members = Vec::new();
    for _ in 0..volume.members {
        let bus = connect().await?;
        let order = if bus.capabilities().key_order.is_given() { Order::Key } else { Order::None };
        let spec = bus.subscription(scene.name.as_str(), "g").with_order(order).with_lease(volume.lease);
        let subscriber = bus.subscribe(spec).await?;
        members.push((bus, subscriber, order == Order::Key));
    }
    let mut publishers = Vec::new();
    for _ in 0..volume.publishers {
        publishers.push(connect().await?);
    }
    if harness.server().is_ok() {
        tokio::time::sleep(MADE).await;
    }
    let begun = Instant::now();
    let is_ordered = members.first().is_some_and(|(.., is_ordered)| *is_ordered);
    let members: Vec<_> = members
        .into_iter()
        .map(|(bus, subscriber, _)| tokio::spawn(consume(Arc::clone(&scene), bus, subscriber)))
        .collect();
    let publishing = publishers.into_iter().zip(0..).map(|(bus, number)| {
        let publishing = tokio::spawn(publish(Arc::clone(&scene), bus, number, is_ordered));
        async move { publishing.await.expect("publishers do not panic") }
    });
    let disturbing = async {
        let mut recoveries = Vec::new();
        if let Ok(server) = harness.server() {
            scene.allow(volume.messages / 2);
            scene.reached(&scene.confirmed, volume.messages / 3).await?;
            let wrong = |text| Error::new(ErrorKind::Unexpected, "volume", text);
            let killed = Instant::now();
            server.kill().await.map_err(wrong)?;
            server.restart().await.map_err(wrong)?;
            recoveries.push(scene.recovery("killed", killed, volume.messages / 8 * 5).await?);
        }
        scene.allow(volume.messages / 8 * 7);
        scene.reached(&scene.confirmed, volume.messages / 3 * 2).await?;
        let cut = Instant::now();
        let count = proxies.iter().map(Proxy::open).sum();
        proxies.iter().for_each(|proxy| proxy.end(End::Reset));
        recoveries.push(scene.recovery("every connection cut", cut, volume.messages).await?);
        Ok((recoveries, count))
    };
    let (_, (recoveries, cut)) = tokio::try_join!(try_join_all(publishing), disturbing)?;
    // What is not there by then is lost.
    let _ = scene.reached(&scene.distinct, volume.messages).await;
    let took = begun.elapsed();
    scene.is_over.store(true, Ordering::Release);
    for member in members {
        member.await.expect("members do not panic")?;
    }
    let seen = std::mem::take(&mut *scene.seen.lock());
    let unknown = std::mem::take(&mut *scene.unknown.lock());
    let lost = (0..volume.messages).filter(|number| !seen.numbers.contains(number)).collect::<Vec<_>>();
    harness.connect().await?.delete(scene.name.as_str(), None).await?;
    Ok(VolumeReport {
        lost,
        reordered: if is_ordered { reordered(&seen.first, &unknown) } else { Vec::new() },
        phantoms: seen.phantoms,
        aborted: std::mem::take(&mut *scene.aborted.lock()),
        unknown: unknown.len(),
        again: seen.again,
        cut,
        recoveries,
        took,
    })
}

/// First deliveries that came after newer ones of their key.
fn reordered(first: &HashMap<u32, Vec<u32>>, unknown: &BTreeSet<u32>) -> Vec<(u32, u32)> {
    let of_key = |numbers: &Vec<u32>| {
        let mut newest = None;
        let known = numbers.iter().copied().filter(|number| !unknown.contains(number));
        let behind = known.filter_map(|number| match newest {
            Some(before) if before > number => Some((before, number)),
            _ => {
                newest = Some(number);
                None
            }
        });
        behind.collect::<Vec<_>>()
    };
    first.values().flat_map(of_key).collect()
}

/// What all of them share.
struct Scene {
    volume: Volume,
    name: String,
    patience: Duration,
    /// How many may be published by now, in all.
    allowed: watch::Sender<u32>,
    confirmed: AtomicU32,
    distinct: AtomicU32,
    /// What was unknown once.
    unknown: Mutex<BTreeSet<u32>>,
    is_over: AtomicBool,
    seen: Mutex<Seen>,
    aborted: Mutex<Vec<Error>>,
    /// What the last publish that failed said.
    refusal: Mutex<Option<String>>,
    /// How it goes on after the last disturbance.
    since: Mutex<Since>,
}

/// How long before a server is killed everything has been made. RabbitMQ brings a quorum queue that is younger than some seconds back without
/// a leader (see `cases/burials.rs`).
const MADE: Duration = Duration::from_secs(4);

/// What was published after a moment, and when the first of it was confirmed and delivered.
#[derive(Default)]
struct Since {
    moment: Option<Instant>,
    numbers: BTreeSet<u32>,
    confirm: Option<Duration>,
    delivery: Option<Duration>,
}

/// What the members have seen.
#[derive(Default)]
struct Seen {
    numbers: BTreeSet<u32>,
    /// Of each key, as they came for the first time.
    first: HashMap<u32, Vec<u32>>,
    phantoms: Vec<String>,
    again: u32,
}

impl Scene {
    fn new(volume: &Volume, name: String, patience: Duration) -> Arc<Self> {
        Arc::new(Self {
            volume: volume.clone(),
            name,
            patience,
            allowed: watch::Sender::new(0),
            confirmed: AtomicU32::new(0),
            distinct: AtomicU32::new(0),
            unknown: Mutex::default(),
            is_over: AtomicBool::new(false),
            seen: Mutex::default(),
            aborted: Mutex::default(),
            refusal: Mutex::default(),
            since: Mutex::default(),
        })
    }

    /// Keys belong to one publisher each.
    fn key(&self, number: u32) -> u32 {
        let each = self.volume.messages / self.volume.publishers;
        number / each * self.volume.keys + number % self.volume.keys
    }

    /// So many may be published from here on.
    fn allow(&self, count: u32) {
        self.allowed.send_replace(count);
    }

    /// Waits until so many are counted; given up when none is for the time of the patience.
    async fn reached(&self, counter: &AtomicU32, count: u32) -> Result<()> {
        let (mut last, mut since) = (0, Instant::now());
        loop {
            let now = counter.load(Ordering::Acquire);
            if now >= count {
                return Ok(());
            }
            if now != last {
                (last, since) = (now, Instant::now());
            }
            if since.elapsed() > self.patience {
                return Err(self.stopped(&format!("{now} of {count}, and no more for {:?}", self.patience)));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// It does not go on, and what publishers were told last.
    fn stopped(&self, what: &str) -> Error {
        let refusal = self.refusal.lock();
        let said = refusal.as_deref().map_or(String::new(), |said| format!("; the last publish that failed: {said}"));
        Error::new(ErrorKind::Timeout, "volume", format!("{what}{said}"))
    }

    /// How it goes on after what began then is over, which is now: with what may be published from now on, `allowed` in all.
    async fn recovery(&self, what: &'static str, began: Instant, allowed: u32) -> Result<Recovery> {
        let over = Instant::now();
        *self.since.lock() = Since { moment: Some(over), ..Since::default() };
        self.allow(allowed);
        let (mut last, mut moved) = ((0, 0), over);
        loop {
            let counts = (self.confirmed.load(Ordering::Acquire), self.distinct.load(Ordering::Acquire));
            if counts != last {
                (last, moved) = (counts, Instant::now());
            }
            let came = {
                let since = self.since.lock();
                since.confirm.zip(since.delivery)
            };
            if let Some((confirm, delivery)) = came {
                return Ok(Recovery { what, lasted: over - began, confirm, delivery });
            }
            if moved.elapsed() > self.patience {
                let (confirmed, distinct) = counts;
                let text = format!("{confirmed} confirmed, {distinct} delivered: nothing works after it was {what}");
                return Err(self.stopped(&text));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn handed_over(&self, numbers: &[u32]) {
        let mut since = self.since.lock();
        if since.moment.is_some() && since.confirm.zip(since.delivery).is_none() {
            since.numbers.extend(numbers);
        }
    }

    fn confirm(&self, number: u32) {
        self.confirmed.fetch_add(1, Ordering::AcqRel);
        let mut since = self.since.lock();
        if since.confirm.is_none() && since.numbers.contains(&number) {
            since.confirm = since.moment.map(|moment| moment.elapsed());
        }
    }

    fn take(&self, body: &[u8], key: &[u8]) {
        let text = String::from_utf8_lossy(body).into_owned();
        let number = text.parse().ok().filter(|number| *number < self.volume.messages);
        let mut seen = self.seen.lock();
        let Some(number) = number.filter(|number| self.key(*number).to_string().as_bytes() == key) else {
            seen.phantoms.push(text);
            return;
        };
        if !seen.numbers.insert(number) {
            seen.again += 1;
            return;
        }
        self.distinct.fetch_add(1, Ordering::AcqRel);
        seen.first.entry(self.key(number)).or_default().push(number);
        let mut since = self.since.lock();
        if since.delivery.is_none() && since.numbers.contains(&number) {
            since.delivery = since.moment.map(|moment| moment.elapsed());
        }
    }
}

/// Batch after batch, each until it is confirmed.
async fn publish(scene: Arc<Scene>, bus: Bus, publisher: u32, is_ordered: bool) -> Result<()> {
    let each = scene.volume.messages / scene.volume.publishers;
    let mut options = PublishOptions::default().with_timeout(scene.volume.publish_timeout);
    if is_ordered {
        options = options.with_order(PublishOrder::Key);
    }
    let (mut next, end) = (publisher * each, (publisher + 1) * each);
    let mut allowed = scene.allowed.subscribe();
    while next < end {
        // Its share of what all may publish. There is no end of waiting without one of the scene.
        let begun = next - publisher * each;
        if allowed.wait_for(|allowed| begun < allowed / scene.volume.publishers).await.is_err() {
            return Ok(());
        }
        let until = end.min(next + scene.volume.batch);
        let message =
            |number: u32| Message::new(scene.name.as_str(), number.to_string()).with_key(scene.key(number).to_string());
        let mut left: Vec<(u32, Message)> = (next..until).map(|number| (number, message(number))).collect();
        next = until;
        let mut progress = Instant::now();
        while !left.is_empty() {
            let numbers: Vec<u32> = left.iter().map(|(number, _)| *number).collect();
            scene.handed_over(&numbers);
            let batch = left.iter().map(|(_, message)| message.clone()).collect();
            let outcomes = bus.submit(batch, &options).await.await;
            let mut again = Vec::new();
            for ((number, message), outcome) in left.into_iter().zip(outcomes) {
                match outcome {
                    Ok(_) => {
                        scene.confirm(number);
                        progress = Instant::now();
                    }
                    Err(error) if progress.elapsed() > scene.patience => return Err(error),
                    Err(error) => {
                        *scene.refusal.lock() = Some(format!("{:?}: {error}", error.kind()));
                        if error.effect() == Effect::Unknown {
                            scene.unknown.lock().insert(number);
                        }
                        again.push((number, message));
                    }
                }
            }
            left = again;
            if !left.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    bus.close(scene.patience).await
}

/// Receives until all of it is over; what could not be acked comes again.
async fn consume(scene: Arc<Scene>, bus: Bus, mut subscriber: Subscriber) -> Result<()> {
    while !scene.is_over.load(Ordering::Acquire) {
        match subscriber.receive(500, Duration::from_millis(500)).await {
            Ok(deliveries) => {
                for delivery in &deliveries {
                    let message = delivery.message();
                    scene.take(message.bytes(), message.key().unwrap_or_default());
                }
                drop(ack(deliveries).await);
            }
            Err(error) => {
                scene.aborted.lock().push(error);
                break;
            }
        }
    }
    subscriber.close(scene.patience).await?;
    bus.close(scene.patience).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_after_newer_messages_of_its_key_is_out_of_order_unless_its_publish_was_unknown() {
        let first = HashMap::from([(1, vec![1, 3, 2, 4]), (2, vec![9, 7, 8])]);
        let mut found = reordered(&first, &BTreeSet::new());
        found.sort_unstable();
        assert_eq!(found, [(3, 2), (9, 7), (9, 8)]);
        assert_eq!(reordered(&first, &BTreeSet::from([2, 9])), []);
    }
}
