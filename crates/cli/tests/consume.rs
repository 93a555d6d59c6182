//! What becomes of deliveries: printed first, then settled, and nothing is lost on the way.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use common::{Cli, finish, texts};
use serde_json::{Value, json};

fn lag(cli: &Cli, figure: &str) -> u64 {
    cli.json(&["lag", "d", "--group", "g"], b"")[0][figure].as_u64().expect("a number")
}

#[test]
fn a_delivery_has_the_documented_shape() {
    let cli = Cli::new();
    let receipt = cli.json(&["publish", "d", "--id", "i", "--header", "n=v"], b"text\n").remove(0);
    assert!(receipt["position"].is_string(), "{receipt}");
    let delivery = cli.json(&["consume", "d", "--group", "g", "--max", "1"], b"").remove(0);
    for (name, expected) in [
        ("id", json!("i")),
        ("key", Value::Null),
        ("headers", json!([{"name": "n", "value": "v"}])),
        ("payload", json!("text")),
        ("attempt", json!(1)),
        ("position", receipt["position"].clone()),
        ("destination", json!("d")),
        ("group", json!("g")),
    ] {
        assert_eq!(delivery.get(name), Some(&expected), "{name}: {delivery}");
    }
}

#[test]
fn max_ends_it_and_the_rest_stays() {
    let cli = Cli::new();
    cli.publish("d", "1\n2\n3\n");
    assert_eq!(texts(&cli.json(&["consume", "d", "--group", "g", "--max", "2"], b""), "payload"), ["1", "2"]);
    assert_eq!((lag(&cli, "ready"), lag(&cli, "in_flight")), (1, 0));
    assert_eq!(texts(&cli.json(&["consume", "d", "--group", "g", "--max", "1"], b""), "payload"), ["3"]);
    assert_eq!(lag(&cli, "total"), 0);
    assert!(cli.json(&["consume", "d", "--group", "g", "--idle", "200ms", "--max", "1"], b"").is_empty());
}

#[test]
fn looking_takes_nothing_and_counts_nothing() {
    let cli = Cli::new();
    cli.publish("d", "1\n2\n");
    for _ in 0..3 {
        let seen = cli.json(&["consume", "d", "--group", "g", "--max", "2", "--settle", "none"], b"");
        assert_eq!(texts(&seen, "payload"), ["1", "2"]);
        assert!(seen.iter().all(|delivery| delivery["attempt"] == 1));
    }
    assert_eq!(lag(&cli, "ready"), 2);
}

#[test]
fn a_long_look_prints_each_message_once_although_leases_end_meanwhile() {
    // Where the machine stood still for longer than half a lease, it has ended in truth, and the end of the look tells so:
    // then with a longer one.
    let look = |lease: &str, idle: &str| {
        let cli = Cli::new();
        cli.publish("d", "1\n");
        let flags = ["--lease", lease, "--idle", idle, "--settle", "none", "--json"];
        cli.run(&[&["consume", "d", "--group", "g"][..], &flags].concat())
    };
    let looks = [("1s", "2500ms"), ("4s", "9s"), ("12s", "26s")];
    let ran = looks
        .iter()
        .map(|(lease, idle)| look(lease, idle))
        .find(|ran| !ran.err.contains("stale_delivery"))
        .expect("one lease that was kept");
    assert_eq!((ran.code, texts(&ran.objects(), "payload")), (Some(0), vec!["1".to_owned()]), "{ran:?}");
}

#[test]
fn a_look_that_is_killed_buries_nothing() {
    let cli = Cli::new();
    cli.publish("d", "1\n");
    let look = [
        "consume",
        "d",
        "--group",
        "g",
        "--settle",
        "none",
        "--lease",
        "1s",
        "--set",
        "subscribe.crash_limit=1",
        "--idle",
        "20s",
    ];
    for _ in 0..2 {
        let mut child = cli.spawn(&look);
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        let mut printed = String::new();
        out.read_line(&mut printed).expect("printed once the lease before has ended");
        assert!(printed.contains("attempt=1"), "{printed}");
        child.kill().expect("killed");
        finish(child);
    }
    assert!(cli.json(&["dlq", "list", "d", "--group", "g"], b"").is_empty());
}

#[test]
fn a_nack_comes_back_after_its_delay_and_dies_after_max_attempts() {
    let cli = Cli::new();
    let nack = |more: &[&str]| {
        cli.json(
            &[&["consume", "d", "--group", "g", "--max", "1", "--settle", "nack", "--max-attempts", "2"], more]
                .concat(),
            b"",
        )
    };
    cli.publish("d", "waits long\n");
    nack(&["--delay", "1h"]);
    assert_eq!((lag(&cli, "ready"), lag(&cli, "delayed")), (0, 1));
    cli.publish("d", "1\n");
    let delay = Duration::from_millis(500);
    let begin = Instant::now();
    assert_eq!(nack(&["--delay", "500ms"])[0]["attempt"], 1);
    assert_eq!(nack(&["--error-type", "TIMEOUT"])[0]["attempt"], 2);
    assert!(begin.elapsed() >= delay, "it came back after {:?}", begin.elapsed());
    let letters = cli.json(&["dlq", "list", "d", "--group", "g"], b"");
    assert_eq!(letters[0]["reason"], "attempts_exhausted");
    assert_eq!((&letters[0]["attempts"], &letters[0]["error_type"]), (&json!(2), &json!("TIMEOUT")));
}

#[test]
fn a_dead_letter_has_the_documented_shape() {
    let cli = Cli::new();
    let receipt = cli.json(&["publish", "d", "--id", "i", "--key", "k"], b"text\n").remove(0);
    let settle = ["--settle", "dead-letter", "--reason", "bad_card", "--detail", "expired in May"];
    cli.json(&[&["consume", "d", "--group", "g", "--max", "1"][..], &settle].concat(), b"");
    let letter = cli.json(&["dlq", "peek", "d", "--group", "g"], b"").remove(0);
    for (name, expected) in [
        ("id", json!("i")),
        ("key", json!("k")),
        ("headers", json!([])),
        ("payload", json!("text")),
        ("attempt", json!(1)),
        ("attempts", json!(1)),
        ("position", receipt["position"].clone()),
        ("reason", json!("bad_card")),
        ("source", json!("d")),
        ("group", json!("g")),
        ("detail", json!("expired in May")),
        ("error_type", Value::Null),
        ("redrives", json!(0)),
    ] {
        assert_eq!(letter.get(name), Some(&expected), "{name}: {letter}");
    }
    assert!(letter["dead_letter_id"].is_string() && letter["last_at"].is_string() && letter["first_at"].is_string());
}

#[test]
fn a_new_group_starts_where_it_is_told() {
    let cli = Cli::new();
    let positions = texts(&cli.json(&["publish", "d"], b"1\n2\n3\n"), "position");
    let from = |group: &str, start: &str, end: &[&str]| {
        let consume = ["consume", "d", "--group", group, "--start", start];
        texts(&cli.json(&[&consume, end].concat(), b""), "payload").join(" ")
    };
    let all = &["--max", "3"];
    assert_eq!(from("a", "earliest", all), "1 2 3");
    assert_eq!(from("b", &format!("position:{}", positions[1]), &["--max", "2"]), "2 3");
    assert_eq!(from("c", "1h", all), "1 2 3", "since an hour ago");
    let quiet = &["--idle", "200ms"];
    assert_eq!(from("d", "latest", quiet), "");
    assert_eq!(from("e", "now", quiet), "");
    // What comes now is the first that they see, and no start moves a group that exists.
    cli.publish("d", "4\n");
    assert_eq!(from("d", "earliest", &["--max", "1"]), "4");
    assert_eq!(from("e", "earliest", &["--max", "1"]), "4");
}

#[test]
fn flags_that_contradict_the_settlement_are_refused() {
    let cli = Cli::new();
    for flags in [
        &["--delay", "1s"][..],
        &["--settle", "nack", "--reason", "x"],
        &["--settle", "none", "--error-type", "X"],
        &["--settle", "nack", "--detail", "x"],
        &["--max", "0"],
        &["--idle", "5"],
        &["--start", "sometime"],
    ] {
        let ran = cli.run(&[&["consume", "d", "--group", "g"], flags].concat());
        assert_eq!(ran.code, Some(2), "{flags:?}: {ran:?}");
    }
}

#[test]
fn a_closed_pipe_settles_nothing_that_was_not_written() {
    let cli = Cli::new();
    // More than a pipe and the buffers before it hold, so that the command cannot have written it all.
    let line = "x".repeat(1_000);
    let lines = 2_000;
    cli.publish("d", &format!("{line}\n").repeat(lines));
    let mut child = cli.spawn(&["consume", "d", "--group", "g", "--json", "--idle", "20s"]);
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    let mut first = String::new();
    out.read_line(&mut first).expect("a line");
    drop(out);
    let ran = finish(child);
    assert_eq!(ran.code, Some(1), "{}", ran.err);
    assert_eq!(ran.error()["kind"], "io");
    // The first batch does not fit into the pipe: it was not written as a whole, so none of it is acked.
    assert_eq!((lag(&cli, "ready"), lag(&cli, "in_flight")), (lines as u64, 0));
    let rest = cli.json(&["consume", "d", "--group", "g", "--max", "2000"], b"");
    assert_eq!((rest.len(), lag(&cli, "total")), (lines, 0));
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_it_with_130_and_leaves_nothing_in_flight() {
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::TERM] {
        let cli = Cli::new();
        cli.publish("d", "1\n");
        let mut child = cli.spawn(&["consume", "d", "--group", "g", "--settle", "none", "--json", "--idle", "20s"]);
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        let mut first = String::new();
        out.read_line(&mut first).expect("a line");
        assert!(first.contains("\"payload\":\"1\""), "{first}");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, signal).expect("signalled");
        let mut rest = String::new();
        out.read_to_string(&mut rest).expect("the end");
        assert_eq!((finish(child).code, rest.as_str()), (Some(130), ""));
        assert_eq!((lag(&cli, "ready"), lag(&cli, "in_flight")), (1, 0));
    }
}

#[test]
fn messages_that_come_while_it_waits_are_printed_at_once() {
    let cli = Cli::new();
    cli.json(&["declare", "d", "--group", "g"], b"");
    let child = cli.spawn(&["consume", "d", "--group", "g", "--max", "3", "--json", "--idle", "20s"]);
    cli.publish("d", "1\n");
    cli.publish("d", "2\n3\n");
    let ran = finish(child);
    assert_eq!((ran.code, texts(&ran.objects(), "payload").join(" ").as_str()), (Some(0), "1 2 3"));
    assert_eq!(lag(&cli, "total"), 0);
}
