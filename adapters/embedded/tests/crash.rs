//! `kill -9` of publishers and consumers, and several processes at work on one file.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anybroker_core::{Reason, Verdict};
use anybroker_embedded::Durability;
use common::child::{self, Process};
use common::*;
use rand::{RngExt, SeedableRng};

const ENTRY: &str = "a_child_plays_its_role";
const LEASE: Duration = Duration::from_secs(1);

#[test]
fn a_child_plays_its_role() {
    let Some(role) = child::role() else { return };
    child::runtime().block_on(async {
        let bus = child::open(&role.path, Durability::Synced).await;
        match role.name.as_str() {
            "publish" => child::publish_until_killed(&bus, &role.words[0], usize::MAX, 100).await,
            "consume" => child::consume_until_killed(&bus, "g", LEASE).await,
            "reject" => {
                let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
                loop {
                    for delivery in subscriber.receive(10, SOON).await.unwrap() {
                        child::say(&format!("R {}", delivery.message().id()));
                        delivery.dead_letter(Verdict::new(Reason::Rejected)).await.unwrap();
                    }
                }
            }
            other => panic!("no role {other}"),
        }
    });
}

/// What the children said, put together.
#[derive(Default)]
struct Said {
    attempted: BTreeSet<String>,
    confirmed: BTreeSet<String>,
    /// By message: moment, process, attempt.
    received: BTreeMap<String, Vec<(u128, usize, u32)>>,
    acked: BTreeMap<String, (u128, usize)>,
}

impl Said {
    fn add(&mut self, process: usize, lines: &[String]) {
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            match words[0] {
                "@P" => self.attempted.extend(words[1..].iter().map(|id| (*id).to_owned())),
                "@A" => drop(self.confirmed.insert(words[1].to_owned())),
                "@R" => {
                    let seen = (words[2].parse().unwrap(), process, words[3].parse().unwrap());
                    self.received.entry(words[1].to_owned()).or_default().push(seen);
                }
                "@K" => {
                    let before = self.acked.insert(words[1].to_owned(), (words[2].parse().unwrap(), process));
                    assert!(before.is_none(), "{} was acked twice", words[1]);
                }
                "@S" => {}
                _ => panic!("a child failed: {line}"),
            }
        }
    }
}

#[test]
fn two_hundred_kills_of_publishers_and_consumers_lose_nothing_and_redeliver_only_what_was_unacked() {
    const ROUNDS: usize = 200;
    let place = Place::new();
    let mut random = rand::rngs::StdRng::seed_from_u64(17);
    let mut said = Said::default();
    let mut killed = BTreeSet::new();
    let mut number = 0;
    let logs = tempfile::tempdir().unwrap();
    let mut start = |role: &str| {
        number += 1;
        let log = logs.path().join(number.to_string());
        (number, Process::start(ENTRY, role, &place.path(), &[&format!("p{number}")], log))
    };
    let begin = Instant::now();
    let roles = ["publish", "consume", "consume"];
    let mut running: Vec<(usize, Process)> = roles.iter().map(|role| start(role)).collect();
    for _ in 0..ROUNDS {
        std::thread::sleep(Duration::from_millis(random.random_range(20..160)));
        let victim = random.random_range(0..running.len());
        let (process, child) = &mut running[victim];
        child.kill();
        said.add(*process, &child.lines());
        killed.insert(*process);
        running[victim] = start(roles[victim]);
    }
    // The publisher stops for good; the consumers finish what is there.
    let (process, mut publisher) = running.remove(0);
    publisher.kill();
    said.add(process, &publisher.lines());
    child::runtime().block_on(async {
        let bus = real(&place.path()).await;
        worked_off(&bus, "orders", "g").await;
    });
    // The last acks are on their way to the logs.
    let unsaid = |process: &Process| {
        process.lines().iter().filter(|line| line.starts_with("@R")).count()
            > process.lines().iter().filter(|line| line.starts_with("@K") || line.starts_with("@S")).count()
    };
    let until = Instant::now() + SOON;
    while running.iter().any(|(_, process)| unsaid(process)) {
        assert!(Instant::now() < until, "a consumer does not tell what became of its acks");
        std::thread::sleep(Duration::from_millis(10));
    }
    for (process, mut child) in running {
        child.kill();
        said.add(process, &child.lines());
    }

    said.received.values_mut().for_each(|seen| seen.sort_unstable());
    let lost: Vec<_> = said.confirmed.iter().filter(|id| !said.received.contains_key(*id)).collect();
    let phantom: Vec<_> = said.received.keys().filter(|id| !said.attempted.contains(*id)).collect();
    let mut redelivered = 0;
    let mut after_ack = Vec::new();
    let mut of_living = Vec::new();
    for (id, seen) in &said.received {
        redelivered += seen.len() - 1;
        assert!(seen.iter().all(|(_, _, attempt)| *attempt == 1), "{id}: a kill is no failed attempt: {seen:?}");
        let acked = said.acked.get(id);
        if let Some((moment, _)) = acked
            && seen.iter().any(|(received, _, _)| received > moment)
        {
            after_ack.push(id);
        }
        // Whoever received it and did not ack it was killed before it could.
        for (_, process, _) in seen.iter().filter(|(_, process, _)| acked.is_none_or(|(_, acker)| acker != process)) {
            if !killed.contains(process) {
                of_living.push((id, process));
            }
        }
    }
    println!(
        "{ROUNDS} kills in {:.1} s: {} messages attempted, {} confirmed, {} received, {} acked, {redelivered} \
         redeliveries; {} lost, {} phantom, {} redelivered after an ack, {} unacked by a living process",
        begin.elapsed().as_secs_f64(),
        said.attempted.len(),
        said.confirmed.len(),
        said.received.len(),
        said.acked.len(),
        lost.len(),
        phantom.len(),
        after_ack.len(),
        of_living.len(),
    );
    assert!(said.confirmed.len() > ROUNDS, "the test did too little to prove anything");
    assert!(redelivered > 0, "no consumer was killed with a message in its hands");
    assert!(lost.is_empty(), "lost: {lost:?}");
    assert!(phantom.is_empty(), "phantom: {phantom:?}");
    assert!(after_ack.is_empty(), "redelivered after an ack: {after_ack:?}");
    // A lease of a second can end under a consumer that gets no processor; that is a redelivery of what was unacked too.
    assert!(of_living.len() <= redelivered, "{of_living:?}");
}

#[test]
fn two_processes_of_a_group_share_the_work_while_a_third_reads_the_dead_letters() {
    const MESSAGES: usize = 400;
    let place = Place::new();
    let logs = tempfile::tempdir().unwrap();
    let path = place.path();
    child::runtime().block_on(async {
        let bus = real(&path).await;
        bus.declare(&anybroker_core::TopologySpec::group("orders", "g")).await.unwrap();
        let workers: Vec<_> = (0..2)
            .map(|number| Process::start(ENTRY, "reject", &path, &[], logs.path().join(number.to_string())))
            .collect();
        // Both are members before there is anything to share.
        subscribed(&path, 2).await;
        let publishing = async {
            for number in 0..MESSAGES / 10 {
                publish(&bus, "orders", &[number.to_string().as_str(); 10]).await;
            }
        };
        // This process is the third: it reads the letters while the others write them.
        let letters = bus.dead_letters("orders", "g").unwrap();
        let reading = async {
            let (mut reads, mut most, mut until) = (0, 0, Instant::now() + SOON);
            loop {
                let count = letters.count(&Default::default()).await.unwrap();
                assert!(count >= most, "letters do not go away by being read");
                if count > most {
                    until = Instant::now() + SOON;
                }
                (reads, most) = (reads + 1, count);
                if count as usize == MESSAGES {
                    return reads;
                }
                assert!(Instant::now() < until, "{count} of {MESSAGES} letters came");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let ((), reads) = tokio::join!(publishing, reading);
        let mut shares = Vec::new();
        let mut ids = BTreeSet::new();
        for worker in &workers {
            let lines = worker.lines();
            shares.push(lines.len());
            ids.extend(lines);
        }
        println!("shares {shares:?}, {reads} readings of the dead letters meanwhile");
        assert_eq!((shares.iter().sum::<usize>(), ids.len()), (MESSAGES, MESSAGES), "each once");
        assert!(shares.iter().all(|share| *share > MESSAGES / 20), "both worked: {shares:?}");
    });
}

#[test]
fn a_killed_process_leaves_no_member_behind() {
    let place = Place::new();
    let logs = tempfile::tempdir().unwrap();
    let path = place.path();
    child::runtime().block_on(async {
        let bus = real(&path).await;
        let mut consumer = Process::start(ENTRY, "consume", &path, &[], logs.path().join("consume"));
        subscribed(&path, 1).await;
        consumer.kill();
        let _subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
        assert_eq!(members(&path), 1);
    });
}

fn members(path: &std::path::Path) -> i64 {
    let file = rusqlite::Connection::open(path).unwrap();
    let ids = "SELECT count(DISTINCT id) FROM members";
    file.query_row(ids, [], |row| row.get::<_, i64>(0)).unwrap()
}

async fn subscribed(path: &std::path::Path, count: i64) {
    let until = Instant::now() + SOON;
    while members(path) != count {
        assert!(Instant::now() < until, "{} members, expected {count}", members(path));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
