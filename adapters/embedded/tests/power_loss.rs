//! A process kill proves no sync: here everything is discarded that was not synced. Needs `strace`.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "test code")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anybroker_core::Start;
use anybroker_embedded::Durability;
use common::trace::{Step, any_order, disk, steps};
use common::*;
use rand::{RngExt, SeedableRng};

const ENTRY: &str = "a_child_plays_its_role";
const BATCHES: usize = 120;
const SIZE: usize = 16 << 10;

#[test]
fn a_child_plays_its_role() {
    let Some(role) = child::role() else { return };
    let durability = match role.name.as_str() {
        "synced" => Durability::Synced,
        "grouped" => Durability::Grouped,
        _ => Durability::DangerUnsynced,
    };
    child::runtime().block_on(async {
        let bus = child::open(&role.path, durability).await;
        child::publish_until_killed(&bus, "p", BATCHES, SIZE).await;
        // Not closed: the end of a process is no shutdown of the broker.
        std::process::exit(0);
    });
}

/// Runs a publisher under strace; `None` (and loudly so) where there is none.
fn traced(mode: &str) -> Option<(Vec<Step>, Place)> {
    let place = Place::new();
    let output = place.path().with_extension("strace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-ttt", "-xx", "-s", "1000000", "-o", output.to_str().unwrap()]);
    strace.args(["-e", "trace=pwrite64,write,writev,pwritev,ftruncate,fsync,fdatasync,unlink,unlinkat,rename"]);
    strace.arg(std::env::current_exe().unwrap());
    child::arguments(&mut strace, ENTRY, mode, &place.path(), &[]);
    let run = match strace.stdout(Stdio::null()).stderr(Stdio::piped()).output() {
        Ok(run) => run,
        Err(error) => {
            // The gate installs strace; this is for machines without it. Set the variable to make it a failure.
            let required = std::env::var_os("ANYBROKER_REQUIRE_STRACE").is_some();
            assert!(!required, "not run: strace is missing ({error})");
            eprintln!("NOT RUN: the power-loss test needs strace ({error}); install it (Debian: strace)");
            return None;
        }
    };
    let errors = String::from_utf8_lossy(&run.stderr).into_owned();
    if errors.contains("ptrace") && errors.contains("not permitted") {
        let required = std::env::var_os("ANYBROKER_REQUIRE_STRACE").is_some();
        assert!(!required, "not run: this system forbids tracing ({errors})");
        eprintln!("NOT RUN: the power-loss test needs to trace a process, which this system forbids ({errors})");
        return None;
    }
    assert!(run.status.success(), "{errors}");
    let trace = std::fs::read_to_string(&output).unwrap();
    Some((steps(&trace, place.path().parent().unwrap()), place))
}

/// What became of the messages when the power went after some step.
struct Aftermath {
    /// Confirmed before, and not there: with the moment of each confirm.
    lost: Vec<(String, f64)>,
    /// There, and never published.
    phantom: Vec<String>,
    /// The moment of the last thing that was said.
    at: f64,
    /// The file could not be read any more.
    damaged: Option<String>,
}

fn aftermath(steps: &[Step], until: usize, keep: impl FnMut() -> bool, original: &Path) -> Aftermath {
    let (mut attempted, mut confirmed, mut at) = (BTreeSet::new(), BTreeMap::new(), 0.0);
    for step in &steps[..until] {
        let Step::Said { line, at: moment } = step else { continue };
        let words: Vec<&str> = line.split(' ').collect();
        match words[0] {
            "@P" => attempted.extend(words[1..].iter().map(|id| (*id).to_owned())),
            "@A" => drop(confirmed.insert(words[1].to_owned(), *moment)),
            "@E" => panic!("a publish failed: {line}"),
            _ => {}
        }
        at = *moment;
    }
    let place = Place::new();
    for (file, content) in disk(steps, until, keep) {
        let name = file.strip_prefix(original.parent().unwrap()).unwrap();
        // The index is shared memory in a file: after a power loss it is built anew.
        if !name.to_str().unwrap().ends_with("-shm") {
            std::fs::write(place.path().with_file_name(name), content).unwrap();
        }
    }
    let (found, damaged) = child::runtime().block_on(async {
        match read(&place.path()).await {
            Ok(found) => (found, None),
            Err(error) => (BTreeSet::new(), Some(error.to_string())),
        }
    });
    let lost = confirmed.into_iter().filter(|(id, _)| !found.contains(id)).collect();
    let phantom = found.into_iter().filter(|id| !attempted.contains(id)).collect();
    Aftermath { lost, phantom, at, damaged }
}

async fn read(path: &Path) -> anybroker_core::Result<BTreeSet<String>> {
    let broker = anybroker_embedded::EmbeddedBroker::open(anybroker_embedded::Settings::new(path)).await?;
    let bus = anybroker_core::Bus::new(std::sync::Arc::new(broker), Default::default());
    let spec = bus.subscription("orders", "after").with_start(Start::Earliest).with_max_in_flight(100_000);
    let mut subscriber = bus.subscribe(spec).await?;
    let mut found = BTreeSet::new();
    loop {
        let deliveries = subscriber.receive(1_000, NOW).await?;
        if deliveries.is_empty() {
            return Ok(found);
        }
        for delivery in deliveries {
            assert_eq!(delivery.message().bytes().len(), SIZE);
            found.insert(delivery.message().id().to_string());
        }
    }
}

/// Moments at which the power goes: right after some confirms, the last of them included.
fn moments(steps: &[Step], count: usize) -> Vec<usize> {
    let confirms: Vec<usize> = (1..=steps.len())
        .filter(|end| matches!(&steps[end - 1], Step::Said { line, .. } if line.starts_with("@A")))
        .collect();
    assert!(confirms.len() > BATCHES, "only {} confirms were seen", confirms.len());
    let mut random = rand::rngs::StdRng::seed_from_u64(23);
    let mut chosen: BTreeSet<usize> = (0..count).map(|_| confirms[random.random_range(0..confirms.len())]).collect();
    chosen.extend([confirms[0], confirms[confirms.len() - 1]]);
    chosen.into_iter().collect()
}

#[test]
fn synced_commits_survive_a_power_loss_right_after_their_confirm() {
    let Some((steps, place)) = traced("synced") else { return };
    let syncs = steps.iter().filter(|step| matches!(step, Step::Sync { .. })).count();
    let moments = moments(&steps, 20);
    let mut random = rand::rngs::StdRng::seed_from_u64(29);
    for (index, moment) in moments.iter().enumerate() {
        // By turns nothing of what was not synced is there, or any half of it.
        let after = if index % 2 == 0 {
            aftermath(&steps, *moment, || false, &place.path())
        } else {
            aftermath(&steps, *moment, any_order(&mut random), &place.path())
        };
        assert!(after.damaged.is_none(), "at step {moment}: {:?}", after.damaged);
        assert!(after.lost.is_empty(), "at step {moment}: lost {:?}", after.lost);
        assert!(after.phantom.is_empty(), "at step {moment}: phantom {:?}", after.phantom);
    }
    println!("synced: {} power losses among {} calls, {syncs} of them syncs: nothing lost", moments.len(), steps.len());
}

#[test]
fn grouped_commits_lose_at_most_their_last_window() {
    let Some((steps, place)) = traced("grouped") else { return };
    // The default window of 50 ms, the sync itself, and what a loaded machine adds to a timer.
    let window = Duration::from_millis(50) + Duration::from_millis(950);
    let mut lost = 0;
    let moments = moments(&steps, 20);
    for moment in &moments {
        let after = aftermath(&steps, *moment, || false, &place.path());
        assert!(after.damaged.is_none(), "at step {moment}: {:?}", after.damaged);
        assert!(after.phantom.is_empty(), "at step {moment}: phantom {:?}", after.phantom);
        for (id, confirmed) in &after.lost {
            let age = after.at - confirmed;
            assert!(age <= window.as_secs_f64(), "at step {moment}: {id} was confirmed {age:.3} s before");
        }
        lost += after.lost.len();
    }
    println!("grouped: {} power losses took {lost} messages, all confirmed within their last window", moments.len());
}

/// The check can fail: without any sync it does.
#[test]
fn without_syncs_the_same_check_finds_losses() {
    let Some((steps, place)) = traced("unsynced") else { return };
    let after = aftermath(&steps, *moments(&steps, 1).last().unwrap(), || false, &place.path());
    println!("unsynced: {} lost, damaged: {:?}", after.lost.len(), after.damaged);
    assert!(!after.lost.is_empty() || after.damaged.is_some(), "nothing was synced, and nothing was missing");
}
