//! What becomes of lines of input.

mod common;

use std::io::{BufRead, BufReader, Write};

use common::{Cli, finish, texts};
use serde_json::{Value, json};

/// Everything that a group has not seen yet, in order; how much that is the broker tells.
fn consumed(cli: &Cli, destination: &str) -> Vec<Value> {
    let group = ["--group", "reader"];
    cli.json(&[&["declare", destination][..], &group].concat(), b"");
    let ready = cli.json(&[&["lag", destination][..], &group].concat(), b"")[0]["ready"].to_string();
    if ready == "0" {
        return Vec::new();
    }
    let consume = ["consume", destination, "--order", "total", "--idle", "20s", "--max", &ready];
    cli.json(&[&consume[..], &group].concat(), b"")
}

#[test]
fn every_line_is_a_message_the_empty_one_and_the_last_one_too() {
    let cli = Cli::new();
    for (input, expected) in [
        (&b"a\n\nb\n"[..], &["a", "", "b"][..]),
        (b"a\nb", &["a", "b"]),
        (b"\n", &[""]),
        (b"a\r\n", &["a\r"]),
        (b"", &[]),
    ] {
        let receipts = cli.json(&["publish", "d"], input);
        assert_eq!(receipts.len(), expected.len());
        assert!(receipts.iter().all(|receipt| receipt["status"] == "ok"));
        assert_eq!(texts(&consumed(&cli, "d"), "payload"), expected);
    }
}

#[test]
fn flags_hold_for_every_line() {
    let cli = Cli::new();
    let flags = ["--key", "k", "--header", "a=1", "--header", "a=x=y", "--content-type", "text/plain"];
    let receipts = cli.json(&[&["publish", "d"][..], &flags].concat(), b"one\ntwo\n");
    let received = consumed(&cli, "d");
    assert_eq!(texts(&receipts, "id"), texts(&received, "id"));
    for delivery in received {
        assert_eq!((&delivery["key"], &delivery["content_type"]), (&json!("k"), &json!("text/plain")));
        assert_eq!(delivery["headers"], json!([{"name": "a", "value": "1"}, {"name": "a", "value": "x=y"}]));
    }
}

#[test]
fn a_file_is_read_like_standard_input() {
    let cli = Cli::new();
    let file = cli.path("lines.txt");
    std::fs::write(&file, b"\xff\x00\ntext").expect("written");
    let file = file.to_str().expect("UTF-8");
    assert_eq!(cli.json(&["publish", "d", "--file", file], b"").len(), 2);
    let received = consumed(&cli, "d");
    assert_eq!(received[0]["payload_base64"], "/wA=");
    assert!(received[0].get("payload").is_none());
    assert_eq!(received[1]["payload"], "text");
    assert_eq!(cli.run(&["publish", "d", "--file", "/nonexistent/file"]).code, Some(2));
    assert_eq!(cli.run(&["publish", "d", "--file", "/"]).code, Some(1), "a folder opens, and cannot be read");
}

#[test]
fn an_id_names_one_message() {
    let cli = Cli::new();
    let refused = cli.feed(&["publish", "d", "--id", "x", "--json"], b"one\ntwo\n");
    assert_eq!((refused.code, refused.out.as_str()), (Some(2), ""));
    assert_eq!(refused.error()["kind"], "usage");
    assert_eq!(cli.run(&["describe", "d"]).code, Some(1), "nothing was published");
    let receipts = cli.json(&["publish", "d", "--id", "x"], b"one\n");
    assert_eq!(texts(&receipts, "id"), ["x"]);
    assert_eq!(texts(&consumed(&cli, "d"), "id"), ["x"]);
}

#[test]
fn a_bad_line_does_not_stop_the_rest_and_the_exit_code_tells() {
    let cli = Cli::new();
    let args = ["publish", "d", "--json", "--key", "the same", "--set", "embedded.max_payload=10"];
    let ran = cli.feed(&args, b"fits\nthis line is too long\nfits too\n");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let receipts = ran.objects();
    assert_eq!(texts(&receipts, "status"), ["ok", "failed", "ok"]);
    assert_eq!(
        receipts.iter().map(|receipt| receipt["line"].as_u64()).collect::<Vec<_>>(),
        [Some(1), Some(2), Some(3)]
    );
    let error = &receipts[1]["error"];
    assert_eq!(
        (&error["kind"], &error["effect"], &error["retry"]),
        (&json!("too_large"), &json!("not_done"), &json!("never"))
    );
    assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()));
    assert_eq!(texts(&consumed(&cli, "d"), "payload"), ["fits", "fits too"]);
}

#[test]
fn a_line_is_not_held_back_behind_a_failed_one_of_its_key() {
    let cli = Cli::new();
    let lines = concat!(
        r#"{"payload": "1", "key": "k"}"#,
        "\n",
        r#"{"payload": "2", "key": "k", "headers": {"anybroker-attempt": "7"}}"#,
        "\n",
        r#"{"payload": "3", "key": "k"}"#,
    );
    let ran = cli.feed(&["publish", "d", "--format", "json", "--json"], lines.as_bytes());
    assert_eq!(texts(&ran.objects(), "status"), ["ok", "failed", "ok"]);
    assert_eq!(ran.objects()[1]["error"]["kind"], "invalid_message");
    assert_eq!(texts(&consumed(&cli, "d"), "payload"), ["1", "3"]);
}

#[test]
fn json_lines_say_everything_and_bad_ones_fail_alone() {
    let cli = Cli::new();
    let lines = concat!(
        r#"{"payload": "a", "id": "1", "key": "k", "headers": [{"name": "n", "value": "v"}], "content_type": "x/y"}"#,
        "\nno json\n\n",
        r#"{"payload": "a", "colour": "red"}"#,
        "\n",
        r#"{"payload_base64": "/wA=", "id": "2", "key_base64": "/g=="}"#,
    );
    let ran = cli.feed(
        &["publish", "d", "--format", "json", "--json", "--key", "default", "--header", "all=1"],
        lines.as_bytes(),
    );
    assert_eq!(ran.code, Some(1));
    let receipts = ran.objects();
    assert_eq!(texts(&receipts, "status"), ["ok", "failed", "failed", "failed", "ok"]);
    assert!(
        receipts[1..4].iter().all(|receipt| receipt["error"]["kind"] == "invalid_message" && receipt["id"].is_null())
    );
    let received = consumed(&cli, "d");
    assert_eq!(texts(&received, "id"), ["1", "2"]);
    assert_eq!((&received[0]["key"], &received[0]["content_type"]), (&json!("k"), &json!("x/y")));
    assert_eq!(received[0]["headers"], json!([{"name": "all", "value": "1"}, {"name": "n", "value": "v"}]));
    assert_eq!((&received[1]["key"], &received[1]["key_base64"]), (&Value::Null, &json!("/g==")));
    assert_eq!(received[1]["payload_base64"], "/wA=");
}

#[test]
fn what_was_consumed_can_be_published_again_as_it_is() {
    let cli = Cli::new();
    let first =
        r#"{"payload_base64": "/wA=", "id": "1", "key": "k", "headers": [{"name": "n", "value_base64": "/Q=="}]}"#;
    cli.json(&["publish", "a", "--format", "json"], first.as_bytes());
    let consumed_first = cli.feed(&["consume", "a", "--group", "g", "--max", "1", "--json"], b"");
    cli.json(&["publish", "b", "--format", "json"], consumed_first.out.as_bytes());
    let (mut one, mut two) = (consumed_first.objects().remove(0), consumed(&cli, "b").remove(0));
    for object in [&mut one, &mut two] {
        let object = object.as_object_mut().expect("an object");
        ["destination", "group", "lease_until", "position", "lane"].iter().for_each(|name| drop(object.remove(*name)));
    }
    assert_eq!(one, two);
}

#[test]
fn many_lines_are_published_in_order_with_a_receipt_each() {
    let cli = Cli::new();
    let lines: String = (0..5_000).map(|number| format!("{number}\n")).collect();
    let receipts = cli.json(&["publish", "d", "--key", "k"], lines.as_bytes());
    let numbers: Vec<Option<u64>> = receipts.iter().map(|receipt| receipt["line"].as_u64()).collect();
    assert_eq!(numbers, (1..=5_000).map(Some).collect::<Vec<_>>());
    let received = cli.json(&["consume", "d", "--group", "g", "--max", "5000", "--order", "key"], b"");
    assert_eq!(texts(&received, "payload"), lines.lines().collect::<Vec<_>>());
    assert_eq!(texts(&received, "id"), texts(&receipts, "id"));
}

#[test]
fn a_delayed_message_is_counted_as_delayed() {
    let cli = Cli::new();
    cli.json(&["declare", "d", "--group", "g"], b"");
    cli.json(&["publish", "d", "--delay", "1h"], b"later\n");
    let lag = &cli.json(&["lag", "d", "--group", "g"], b"")[0];
    assert_eq!((&lag["ready"], &lag["delayed"]), (&json!(0), &json!(1)));
}

#[test]
fn a_summary_for_people_goes_to_standard_error() {
    let cli = Cli::new();
    let ran = cli.feed(&["publish", "d"], b"a\nb\n");
    assert_eq!(ran.err, "2 published, 0 failed, 0 unknown\n");
    assert_eq!(ran.out.lines().filter(|line| line.starts_with("ok ")).count(), 2, "{ran:?}");
}

#[test]
fn a_line_is_published_while_the_input_stays_open_and_an_interrupt_ends_it_with_130() {
    let cli = Cli::new();
    let mut child = cli.spawn(&["publish", "d", "--json"]);
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    let mut input = child.stdin.take().expect("piped");
    for line in ["first", "second"] {
        writeln!(input, "{line}").expect("written");
        let mut receipt = String::new();
        out.read_line(&mut receipt).expect("a receipt");
        assert!(receipt.contains("\"status\":\"ok\""), "{receipt}");
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("signalled");
    assert_eq!(finish(child).code, Some(130));
    drop(input);
    assert_eq!(texts(&consumed(&cli, "d"), "payload"), ["first", "second"]);
}
