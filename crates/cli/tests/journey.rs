//! One message's way through every verb, as an operator would walk it.

mod common;

use std::time::{Duration, Instant};

use common::{Cli, finish, texts};
use serde_json::{Value, json};

#[test]
fn publish_consume_nack_die_look_redrive_purge_lag_describe_delete() {
    let cli = Cli::new();
    let group = ["--group", "payments"];
    let with = |verb: &[&'static str], more: &[&'static str]| [verb, &group, more].concat();

    let declared = cli.json(&with(&["declare", "orders"], &[]), b"");
    assert_eq!(declared, [json!({"destination": "orders", "group": "payments", "declared": "created"})]);
    assert_eq!(cli.json(&with(&["declare", "orders"], &[]), b"")[0]["declared"], "existed");
    let ids = cli.publish("orders", "one\ntwo\nthree\n");
    assert_eq!(ids.len(), 3);
    let lag = &cli.json(&with(&["lag", "orders"], &[]), b"")[0];
    assert_eq!(
        (&lag["ready"], &lag["in_flight"], &lag["delayed"], &lag["total"]),
        (&json!(3), &json!(0), &json!(0), &json!(3))
    );

    // The first is done, the second fails and comes back, the third is dead at once.
    let consume = |more: &[&'static str]| cli.json(&with(&["consume", "orders"], more), b"");
    assert_eq!(texts(&consume(&["--max", "1"]), "payload"), ["one"]);
    assert_eq!(texts(&consume(&["--max", "1", "--settle", "nack"]), "payload"), ["two"]);
    let again = consume(&["--max", "2", "--settle", "none"]);
    let mut attempts: Vec<(String, u64)> =
        again.iter().map(|one| (one["payload"].to_string(), one["attempt"].as_u64().expect("a number"))).collect();
    attempts.sort();
    assert_eq!(attempts, [("\"three\"".to_owned(), 1), ("\"two\"".to_owned(), 2)]);
    let dead = ["--max", "2", "--settle", "dead-letter", "--reason", "bad_card", "--error-type", "VALIDATION_ERROR"];
    assert_eq!(consume(&dead).len(), 2);

    let list = cli.json(&with(&["dlq", "list", "orders"], &[]), b"");
    let mut dead: Vec<String> = texts(&list, "id");
    dead.sort();
    assert_eq!(dead, ids[1..]);
    assert!(list.iter().all(|letter| letter["reason"] == "bad_card" && letter["error_type"] == "VALIDATION_ERROR"));
    let second = list.iter().find(|letter| letter["id"] == ids[1].as_str()).expect("the second");
    assert_eq!(second["attempts"], 2, "one failure and the verdict");

    // A filter chooses, a dry run only tells.
    let one = ["--id", &ids[1]];
    let dry = cli.json(&[&with(&["dlq", "redrive", "orders"], &["--dry-run"])[..], &one].concat(), b"");
    assert_eq!((&dry[0]["matched"], &dry[0]["moved"], &dry[0]["dry_run"]), (&json!(1), &json!(1), &json!(true)));
    assert_eq!(cli.json(&with(&["dlq", "list", "orders"], &[]), b"").len(), 2);
    let redriven = cli.json(&[&with(&["dlq", "redrive", "orders"], &[])[..], &one].concat(), b"");
    assert_eq!((&redriven[0]["moved"], &redriven[0]["refused"]), (&json!(1), &json!([])));
    let back = consume(&["--max", "1"]);
    assert_eq!((&back[0]["id"], &back[0]["attempt"]), (&json!(ids[1]), &json!(1)));

    let purge = |more: &[&'static str]| cli.run(&with(&["dlq", "purge", "orders"], more));
    assert_eq!(purge(&[]).code, Some(2), "not without --yes");
    assert_eq!(purge(&["--dry-run"]).code, Some(0));
    let purged = cli.json(&with(&["dlq", "purge", "orders"], &["--yes"]), b"");
    assert_eq!(purged, [json!({"matched": 1, "purged": 1, "dry_run": false})]);
    assert!(cli.json(&with(&["dlq", "list", "orders"], &[]), b"").is_empty());
    assert_eq!(cli.json(&with(&["lag", "orders"], &[]), b"")[0]["total"], 0);

    let description = &cli.json(&["describe", "orders"], b"")[0];
    assert_eq!(
        (&description["destination"], &description["groups"][0]["group"]),
        (&json!("orders"), &json!("payments"))
    );
    assert_eq!(cli.run(&["describe", "orders", "--group", "nobody"]).code, Some(1));
    assert_eq!(cli.run(&["delete", "orders"]).code, Some(2), "not without --yes");
    let deleted = cli.json(&with(&["delete", "orders"], &["--yes"]), b"");
    assert_eq!(deleted, [json!({"destination": "orders", "group": "payments", "deleted": true})]);
    assert_eq!(cli.json(&["describe", "orders"], b"")[0]["groups"], json!([]));
    cli.json(&["delete", "orders", "--yes"], b"");
    assert_eq!(cli.run(&["describe", "orders", "--json"]).error()["kind"], "not_found");
}

#[test]
fn a_letter_that_goes_round_in_a_circle_is_refused_and_listed() {
    let cli = Cli::new();
    let ids = cli.publish("d", "poison\n");
    let die = || {
        let died = cli.json(&["consume", "d", "--group", "g", "--max", "1", "--settle", "dead-letter"], b"");
        assert_eq!(died.len(), 1);
    };
    let redrive = |more: &[&'static str]| cli.run(&[&["dlq", "redrive", "d", "--group", "g", "--json"], more].concat());
    die();
    for _ in 0..2 {
        assert_eq!(redrive(&["--max-redrives", "2"]).code, Some(0));
        die();
    }
    for more in [&["--max-redrives", "2"][..], &["--max-redrives", "2", "--dry-run"]] {
        let refused = redrive(more);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        let report = &refused.objects()[0];
        assert_eq!((&report["matched"], &report["moved"]), (&json!(1), &json!(0)));
        assert_eq!((&report["refused"][0]["id"], &report["refused"][0]["redrives"]), (&json!(ids[0]), &json!(2)));
    }
    assert_eq!(cli.json(&["dlq", "list", "d", "--group", "g"], b"").len(), 1, "it is still there");
    assert_eq!(redrive(&["--max-redrives", "3"]).code, Some(0));
}

#[test]
fn dead_letters_are_chosen_by_every_filter() {
    let cli = Cli::new();
    let lines = r#"{"payload": "a", "id": "1", "key": "k", "headers": {"tenant": "acme"}}
{"payload": "b", "id": "2", "key": "k", "headers": {"tenant": "beta"}}
{"payload": "c", "id": "3"}"#;
    cli.json(&["publish", "d", "--format", "json"], lines.as_bytes());
    for (reason, class) in [("malformed", "SCHEMA_MISMATCH"), ("rejected", "TIMEOUT"), ("rejected", "TIMEOUT")] {
        let settle = ["--settle", "dead-letter", "--reason", reason, "--error-type", class];
        cli.json(&[&["consume", "d", "--group", "g", "--max", "1"][..], &settle].concat(), b"");
    }
    let chosen = |filter: &[&str]| {
        texts(&cli.json(&[&["dlq", "list", "d", "--group", "g"], filter].concat(), b""), "id").join(" ")
    };
    assert_eq!(chosen(&[]), "1 2 3");
    assert_eq!(chosen(&["--reason", "malformed"]), "1");
    assert_eq!(chosen(&["--error-type", "TIMEOUT"]), "2 3");
    assert_eq!(chosen(&["--key", "k"]), "1 2");
    assert_eq!(chosen(&["--header", "tenant=beta"]), "2");
    assert_eq!(chosen(&["--id", "3"]), "3");
    assert_eq!(chosen(&["--since", "1h"]), "1 2 3");
    assert_eq!(chosen(&["--until", "1h"]), "");
    assert_eq!(
        chosen(&["--until", "now", "--since", "2026-01-01T00:00:00Z", "--key", "k", "--reason", "rejected"]),
        "2"
    );
    assert_eq!(chosen(&["--limit", "2"]), "1 2");
    let peek = cli.json(&["dlq", "peek", "d", "--group", "g", "--limit", "1", "--reason", "rejected"], b"");
    assert_eq!(texts(&peek, "id"), ["2"]);
    let moved =
        |args: &[&str]| cli.json(&[&["dlq", "redrive", "d", "--group", "g"], args].concat(), b"")[0]["moved"].clone();
    assert_eq!(moved(&["--limit", "1", "--rate", "1000"]), Value::from(1));
    assert_eq!(chosen(&[]), "2 3", "the oldest first, and the rest stays");
    assert_eq!(moved(&[]), Value::from(2), "running it again goes on with the rest");
}

#[test]
fn a_redrive_that_was_interrupted_goes_on_with_the_rest() {
    let cli = Cli::new();
    cli.publish("d", "1\n2\n3\n4\n5\n");
    cli.json(&["consume", "d", "--group", "g", "--max", "5", "--settle", "dead-letter"], b"");
    let letters = || cli.json(&["dlq", "list", "d", "--group", "g"], b"").len();
    let child = cli.spawn(&["dlq", "redrive", "d", "--group", "g", "--rate", "0.001", "--json"]);
    let deadline = Instant::now() + Duration::from_secs(30);
    while letters() == 5 {
        assert!(Instant::now() < deadline, "nothing was redriven");
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT)
        .expect("signalled");
    let ran = finish(child);
    assert_eq!(ran.code, Some(130), "{ran:?}");
    assert_eq!(ran.objects(), [json!({"moved": 1, "interrupted": true, "dry_run": false})]);
    assert_eq!(letters(), 4);
    assert_eq!(cli.json(&["dlq", "redrive", "d", "--group", "g"], b"")[0]["moved"], 4);
    assert_eq!(cli.json(&["consume", "d", "--group", "g", "--max", "5"], b"").len(), 5);
}

#[test]
fn people_get_tables_and_no_json() {
    let cli = Cli::new();
    cli.publish("orders", "one\n");
    let consumed = cli.run(&["consume", "orders", "--group", "g", "--max", "1", "--settle", "dead-letter"]);
    assert!(consumed.out.contains("attempt=1") && consumed.out.contains("one"), "{consumed:?}");
    for (args, parts) in [
        (&["dlq", "list", "orders", "--group", "g"][..], &["REASON", "rejected"][..]),
        (&["dlq", "peek", "orders", "--group", "g"], &["rejected", "one"]),
        (&["lag", "orders", "--group", "g"], &["READY", "total"]),
        (&["capabilities"], &["CAPABILITY", "key_order", "native"]),
        (&["describe", "orders"], &["physical", "GROUP"]),
    ] {
        let ran = cli.run(args);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(parts.iter().all(|part| ran.out.contains(part)), "{args:?}: {}", ran.out);
        assert!(!ran.out.contains('{') && !ran.out.contains('\u{1b}'), "{args:?}: {}", ran.out);
    }
}
