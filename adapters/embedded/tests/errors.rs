//! What goes wrong with a file, and with settings: each a typed error.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "test code")]

mod common;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::time::Duration;

use anybroker_core::{Config, Effect, Error, ErrorKind, Message, Registry, Result, Retry, SubscriptionEvent};
use anybroker_embedded::{EmbeddedBroker, EmbeddedDriver, Settings};
use common::*;

const ENTRY: &str = "a_child_opens_a_file_without_privileges";

async fn opening(path: &Path) -> Result<EmbeddedBroker> {
    let mut settings = Settings::new(path);
    settings.busy_timeout = Duration::from_millis(200);
    EmbeddedBroker::open(settings).await
}

/// Kind and cause of a failure that has done nothing.
fn told(error: &Error) -> (ErrorKind, &str) {
    assert_eq!(error.effect(), Effect::NotDone, "{error:?}");
    (error.kind(), error.context().find(|(name, _)| *name == "cause").map_or("", |(_, cause)| cause))
}

async fn refused(path: &Path) -> Error {
    opening(path).await.err().unwrap_or_else(|| panic!("{} was opened", path.display()))
}

#[tokio::test]
async fn a_file_that_is_no_database_is_left_alone() {
    let place = Place::new();
    let text = "just some text, ".repeat(1_000);
    std::fs::write(place.path(), &text).unwrap();
    assert_eq!(told(&refused(&place.path()).await), (ErrorKind::Unexpected, "not_a_database"));
    assert_eq!(std::fs::read_to_string(place.path()).unwrap(), text);
}

#[tokio::test]
async fn another_applications_database_is_left_alone() {
    let place = Place::new();
    rusqlite::Connection::open(place.path()).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
    let before = std::fs::read(place.path()).unwrap();
    assert_eq!(told(&refused(&place.path()).await), (ErrorKind::Unexpected, "foreign_database"));
    assert_eq!(std::fs::read(place.path()).unwrap(), before);
}

#[tokio::test]
async fn a_newer_schema_is_left_alone() {
    let place = Place::new();
    real(&place.path()).await.close(SOON).await.unwrap();
    let file = rusqlite::Connection::open(place.path()).unwrap();
    file.execute_batch("PRAGMA user_version = 99").unwrap();
    let error = refused(&place.path()).await;
    assert_eq!(told(&error), (ErrorKind::Unexpected, "newer_schema"));
    assert!(error.message().contains("99"), "{error}");
    assert_eq!(file.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0)).unwrap(), 99);
}

#[tokio::test]
async fn a_damaged_file_is_told_of_by_whatever_meets_the_damage() {
    let place = Place::new();
    let bus = real(&place.path()).await;
    for number in 0..200 {
        publish(&bus, "orders", &[&format!("{number} {}", "x".repeat(2_000))]).await;
    }
    bus.close(SOON).await.unwrap();
    let mut bytes = std::fs::read(place.path()).unwrap();
    assert!(bytes.len() > 100_000, "the log was moved into the file at close");
    // The schema on the first pages stays; what follows is noise.
    let begin = bytes.len() / 2;
    bytes[begin..].fill(0xa5);
    std::fs::write(place.path(), bytes).unwrap();
    let bus = real(&place.path()).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let error = loop {
        match subscriber.receive(10, SOON).await {
            Ok(deliveries) => assert!(!deliveries.is_empty(), "the damage was not noticed"),
            Err(error) => break error,
        }
    };
    assert_eq!(told(&error), (ErrorKind::Unexpected, "corrupt"));
    assert_eq!(error.retry(), Retry::Never);
}

#[tokio::test]
async fn a_missing_directory_and_a_directory_in_place_of_the_file_are_told_apart() {
    let place = Place::new();
    let missing = place.path().with_file_name("no/such/events.db");
    assert_eq!(told(&refused(&missing).await).0, ErrorKind::NotFound);
    let directory = place.path().parent().unwrap().to_owned();
    assert_eq!(told(&refused(&directory).await).0, ErrorKind::ConfigInvalid);
    std::fs::write(place.path(), "").unwrap();
    let below = place.path().join("events.db");
    assert_eq!(told(&refused(&below).await).0, ErrorKind::NotFound);
}

/// Root may write everything, so these files are opened by a child of another user where we are root.
#[test]
fn a_file_that_may_not_be_written_is_permission_denied() {
    let place = Place::new();
    child::runtime().block_on(async { real(&place.path()).await.close(SOON).await.unwrap() });
    let directory = place.path().parent().unwrap().to_owned();
    let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    // A binary where everybody can reach it.
    let binary = directory.join("this-test");
    std::fs::copy(std::env::current_exe().unwrap(), &binary).unwrap();
    mode(&binary, 0o755);
    let root = std::fs::metadata(&binary).unwrap().uid() == 0;
    let open = |path: &Path| {
        let mut command = child::command(&binary, ENTRY, "open", path, &[]);
        if root {
            command.uid(65_534).gid(65_534);
        }
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = text.lines().find(|line| line.starts_with('@')).map(ToOwned::to_owned);
        said.unwrap_or_else(|| panic!("{text} {}", String::from_utf8_lossy(&output.stderr)))
    };
    mode(&directory, 0o755);
    mode(&place.path(), 0o444);
    assert_eq!(open(&place.path()), "@permission_denied", "a file that may only be read");
    mode(&place.path(), 0o000);
    assert_eq!(open(&place.path()), "@permission_denied", "a file that may not be read");
    mode(&directory, 0o555);
    assert_eq!(open(&directory.join("new.db")), "@permission_denied", "a directory that may not be written");
    mode(&directory, 0o777);
    assert_eq!(open(&directory.join("new.db")), "@opened", "the check can fail");
    mode(&directory, 0o755);
}

#[test]
fn a_child_opens_a_file_without_privileges() {
    let Some(role) = child::role() else { return };
    child::runtime().block_on(async {
        match opening(&role.path).await {
            Ok(_) => child::say("opened"),
            Err(error) => child::say(&error.kind().to_string()),
        }
    });
}

#[tokio::test]
async fn a_file_that_stays_locked_is_unavailable_and_nothing_was_done() {
    let place = Place::new();
    let mut settings = Settings::new(place.path());
    settings.busy_timeout = Duration::from_millis(200);
    let bus = open(settings, anybroker_core::SystemClock::new()).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let other = rusqlite::Connection::open(place.path()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = bus.send(Message::new("orders", "1")).await.unwrap_err();
    assert_eq!(told(&error), (ErrorKind::Unavailable, "locked"));
    assert_eq!(error.retry(), Retry::Later(None));
    // A receive waits for better times, and says so.
    let received = subscriber.receive_all(1, SOON).await.unwrap();
    assert!(received.deliveries.is_empty());
    assert!(matches!(received.events[..], [SubscriptionEvent::Degraded { .. }]), "{:?}", received.events);
    other.execute_batch("ROLLBACK").unwrap();
    publish(&bus, "orders", &["2"]).await;
    let received = subscriber.receive_all(1, SOON).await.unwrap();
    assert_eq!(received.events, [SubscriptionEvent::Recovered]);
    let mut came = texts(&received.deliveries);
    if came.is_empty() {
        came = texts(&subscriber.receive(1, SOON).await.unwrap());
    }
    assert_eq!(came, ["2"], "the first was not stored");
}

#[tokio::test]
async fn a_full_file_refuses_publishes_keeps_what_it_has_and_serves_again_when_there_is_room() {
    let (bus, _clock, _place) = built(|settings| settings.max_file_size = Some(2 << 20)).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g").with_max_in_flight(10_000)).await.unwrap();
    let mut stored = 0;
    let error = loop {
        match bus.send(Message::new("orders", vec![b'x'; 16 << 10])).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 1_000, "the file grew beyond its bound");
    };
    assert_eq!(told(&error), (ErrorKind::Unavailable, "full"));
    assert!(stored > 50, "{stored}");
    // A batch is stored or refused by entry; none is half there.
    let outcomes = bus.publish((0..4).map(|_| Message::new("orders", vec![b'x'; 64 << 10])).collect()).await;
    assert!(outcomes.iter().all(|outcome| told(outcome.as_ref().unwrap_err()) == (ErrorKind::Unavailable, "full")));
    assert_eq!(bus.lag("orders", "g").await.unwrap().total(), Some(stored));
    // What is there can still be received; deleting makes room.
    let came = subscriber.receive(10, NOW).await.unwrap();
    assert_eq!(came.len(), 10);
    bus.delete("orders", None).await.unwrap();
    publish(&bus, "orders", &["again"]).await;
}

#[tokio::test]
async fn settings_are_checked_all_at_once() {
    let connect = async |url: &str| Registry::new().with(EmbeddedDriver).connect(Config::from_url(url)).await;
    let error = connect("embedded:///tmp/x.db?durability=maybe&busy_timeout=5&unknown=1").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    for key in ["embedded.durability", "embedded.busy_timeout", "embedded.unknown"] {
        assert!(error.message().contains(key), "{error}");
    }
    for url in ["embedded://events.db", "embedded://", "embedded:///", "embedded://me@/tmp/x.db", "embedded:///tmp/"] {
        assert_eq!(connect(url).await.unwrap_err().kind(), ErrorKind::ConfigInvalid, "{url}");
    }
    let error = connect("embedded:///tmp/x.db?group_window=0s").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
}

#[tokio::test]
async fn the_record_and_the_limits_follow_the_settings() {
    let place = Place::new();
    let url = format!("embedded://{}?durability=grouped&max_payload=100", place.path().display());
    let bus = Registry::new().with(EmbeddedDriver).connect(Config::from_url(&url)).await.unwrap();
    assert!(!bus.capabilities().survives_power_loss.is_given());
    assert_eq!(bus.endpoint().mode, "grouped");
    let error = bus.send(Message::new("orders", vec![0; 101])).await.unwrap_err();
    assert_eq!(told(&error).0, ErrorKind::TooLarge);
    let needy = Config::from_url(&url).with("require", "survives_power_loss");
    let unmet = Registry::new().with(EmbeddedDriver).connect(needy).await.unwrap_err();
    assert_eq!(unmet.kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn a_waiting_receive_is_told_of_another_connections_commit() {
    let place = Place::new();
    let mut settings = place.settings();
    // Without the net under the notification: what comes is what was told of.
    settings.look_every = Some(secs(3_600));
    let (bus, other) = (open(settings, anybroker_core::SystemClock::new()).await, real(&place.path()).await);
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    for round in 0..3 {
        let (came, ()) = tokio::join!(subscriber.receive(1, SOON), async {
            // The receive has looked, found nothing, and waits.
            tokio::time::sleep(Duration::from_millis(50)).await;
            publish(&other, "orders", &["x"]).await;
        });
        let came = came.unwrap();
        assert_eq!(texts(&came), ["x"], "round {round}: the commit was not told of");
        ack_all(came).await;
    }
}
