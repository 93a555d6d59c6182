//! Every class of failure has its exit code, and with `--json` an error object on standard error.

mod common;

use common::{Cli, Ran, bare};
use serde_json::Value;

fn failed(ran: &Ran, code: i32, kind: &str) -> Value {
    assert_eq!(ran.code, Some(code), "{ran:?}");
    assert_eq!(ran.out, "", "nothing is printed where nothing happened");
    let error = ran.error();
    assert_eq!(error["kind"], kind, "{ran:?}");
    for name in ["kind", "retry", "effect", "message"] {
        assert!(error[name].is_string(), "{name}: {error}");
    }
    error
}

#[test]
fn wrong_usage_is_2() {
    for args in [&[][..], &["--json"], &["fly", "--json"], &["lag", "d", "--json"], &["publish", "--json"]] {
        assert_eq!(bare(args).code, Some(2), "{args:?}");
    }
    failed(&bare(&["lag", "d", "--json"]), 2, "usage");
    assert_eq!(bare(&["--help"]).code, Some(0));
    assert_eq!(bare(&["--version"]).code, Some(0));
    assert!(bare(&["consume", "--help"]).out.contains("--settle"));
}

#[test]
fn no_endpoint_at_all_is_2_and_says_how_to_name_one() {
    let ran = bare(&["capabilities"]);
    assert_eq!(ran.code, Some(2));
    for part in ["--url", "--config", "ANYBROKER_URL"] {
        assert!(ran.err.contains(part), "{}", ran.err);
    }
}

#[test]
fn an_unknown_scheme_is_2_and_names_the_known_ones() {
    let error = failed(&bare(&["capabilities", "--url", "nosuch://me:MARKER@host", "--json"]), 2, "config_invalid");
    let message = error["message"].as_str().expect("a text");
    assert!(message.contains("embedded") && message.contains("memory"), "{message}");
}

#[test]
fn three_mistakes_are_told_at_once() {
    let cli = Cli::new();
    let file = cli.path("bad.toml");
    std::fs::write(&file, format!("url = '{}'\ncolour = 1\n[embedded]\ndurability = 'some'", cli.url))
        .expect("written");
    let file = file.to_str().expect("UTF-8");
    for verb in [&["capabilities"][..], &["config", "check"], &["config", "check", "--connect"]] {
        let args = [verb, &["--config", file, "--set", "publish_timeout=soon", "--json"]].concat();
        let error = failed(&bare(&args), 2, "config_invalid");
        let message = error["message"].as_str().expect("a text");
        for part in ["3 problems", "colour", "embedded.durability", "publish_timeout"] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
}

#[test]
fn a_configuration_that_cannot_be_read_is_2() {
    let cli = Cli::new();
    failed(&bare(&["capabilities", "--json", "--config", "/nonexistent/x.toml"]), 2, "not_found");
    failed(&bare(&["capabilities", "--json", "--config", "/"]), 2, "config_invalid");
    let broken = cli.path("broken.toml");
    std::fs::write(&broken, "url = 'test://me:MARKER@a").expect("written");
    let error =
        failed(&bare(&["capabilities", "--json", "--config", broken.to_str().expect("UTF-8")]), 2, "config_invalid");
    assert!(!error.to_string().contains("MARKER"), "{error}");
}

#[test]
fn what_is_not_there_is_1() {
    let cli = Cli::new();
    for args in [
        &["lag", "d", "--group", "g", "--json"][..],
        &["describe", "d", "--json"],
        &["delete", "d", "--yes", "--json"],
        &["dlq", "list", "d", "--group", "g", "--json"],
        &["dlq", "redrive", "d", "--group", "g", "--json"],
    ] {
        failed(&cli.run(args), 1, "not_found");
    }
}

#[test]
fn an_endpoint_that_cannot_serve_is_3() {
    let cli = Cli::new();
    let payload = "x".repeat(2 << 20);
    let args = ["publish", "d", "--json", "--set", "embedded.max_file_size=1048576"];
    let ran = cli.feed(&args, payload.as_bytes());
    assert_eq!(ran.code, Some(3), "{}", ran.err);
    let receipt = &ran.objects()[0];
    assert_eq!((&receipt["status"], &receipt["error"]["kind"]), (&"failed".into(), &"unavailable".into()));
    assert_eq!(receipt["error"]["retry"], "later");
    // Where one of two failed, it is a partial success: this one is larger than any message may be.
    let payload = "x".repeat(17 << 20);
    let ran = cli.feed(&["publish", "d", "--json"], format!("small\n{payload}").as_bytes());
    assert_eq!(ran.code, Some(1));
}

#[test]
fn an_outcome_that_nobody_knows_is_unknown_and_3() {
    let cli = Cli::new();
    cli.publish("d", "before\n");
    // Whoever else locks the file for longer than the deadline: the message may be stored afterwards.
    let other = rusqlite::Connection::open(cli.path("events.db")).expect("opened");
    other.execute_batch("BEGIN EXCLUSIVE").expect("locked");
    let ran = cli.feed(&["publish", "d", "--json", "--set", "publish_timeout=300ms"], b"late\n");
    assert_eq!(ran.code, Some(3), "{ran:?}");
    let receipt = &ran.objects()[0];
    assert_eq!((&receipt["status"], &receipt["error"]["kind"]), (&"unknown".into(), &"timeout".into()));
    assert_eq!((&receipt["error"]["effect"], &receipt["error"]["retry"]), (&"unknown".into(), &"later".into()));
    assert!(receipt["id"].is_string(), "what has an unknown outcome is sent again under its id");
}

#[test]
fn an_unmet_requirement_is_4_and_names_endpoint_requirement_and_remedy() {
    let cli = Cli::new();
    let error = failed(
        &cli.run(&["capabilities", "--json", "--set", "require=transactions,payload>=99999999999"]),
        4,
        "unsupported",
    );
    let message = error["message"].as_str().expect("a text");
    for part in ["transactions", "payload>=99999999999", "embedded://"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn secrets_on_the_command_line_are_not_repeated() {
    for args in [
        &["capabilities", "--url", "memory://me:MARKER@name?x=MARKER"][..],
        &["capabilities", "--url", "memory//me:MARKER@name"],
        &["capabilities", "--url", "memory://", "--set", "memory.password=MARKER"],
        &["capabilities", "--url", "memory://", "--set", "MARKER"],
        &["capabilities", "--url", "memory://x:MARKER/y@z"],
    ] {
        for json in [&[][..], &["--json"]] {
            let ran = bare(&[args, json].concat());
            assert_eq!(ran.code, Some(2), "{ran:?}");
            let told = format!("{}{}", ran.out, ran.err);
            // What clap quotes is the one argument that it cannot read at all.
            if args.last() != Some(&"MARKER") {
                assert!(!told.contains("MARKER"), "{told}");
            }
        }
    }
}

#[test]
fn settings_come_from_file_environment_and_flags_in_that_order() {
    let cli = Cli::new();
    let file = cli.path("settings.yaml");
    std::fs::write(&file, format!("url: {}\nembedded:\n  max_payload: 10\n", cli.url)).expect("written");
    let limit = |variables: &[(&str, &str)], flags: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_anybroker"));
        command.arg("capabilities").arg("--json").arg("--config").arg(&file).args(flags);
        command.env_remove("ANYBROKER_URL").envs(variables.iter().copied());
        let output = command.output().expect("it runs");
        let object: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        object["capabilities"]["limits"]["payload"].as_u64().expect("a number")
    };
    let variable = [("ANYBROKER_EMBEDDED__MAX_PAYLOAD", "20")];
    assert_eq!(limit(&[], &[]), 10);
    assert_eq!(limit(&variable, &[]), 20);
    assert_eq!(limit(&variable, &["--set", "embedded.max_payload=30"]), 30);
    let query = format!("{}?max_payload=40", cli.url);
    assert_eq!(limit(&[], &["--url", &query]), 10, "the query of the URL lies below the file");
}

#[test]
fn the_settings_can_be_checked_without_connecting() {
    let cli = Cli::new();
    let checked = cli.json(&["config", "check"], b"");
    assert_eq!((&checked[0]["valid"], &checked[0]["connected"]), (&true.into(), &false.into()));
    assert!(!cli.path("events.db").exists(), "nothing was opened");
    let checked = cli.json(&["config", "check", "--connect"], b"");
    assert_eq!(checked[0]["connected"], true);
    let schema = bare(&["config", "schema", "--json"]);
    let schema = &schema.objects()[0];
    assert!(schema["properties"]["embedded"]["properties"]["durability"].is_object());
    assert!(schema["properties"]["subscribe"]["properties"]["max_attempts"].is_object());
}

#[test]
fn completions_are_there_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = bare(&["completions", shell]);
        assert_eq!(ran.code, Some(0));
        assert!(ran.out.contains("redrive"), "{shell}");
    }
}
