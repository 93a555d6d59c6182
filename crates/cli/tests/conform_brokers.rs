//! `anybroker conform` against running servers: faults, and what killed runs have left behind.

mod common;

use std::path::PathBuf;

use common::{Ran, bare};

/// The server's URL, or `None` after saying why the test does not run.
fn url(name: &str, has_client: bool) -> Option<String> {
    if !has_client {
        println!("not run: built without the feature {name}");
        return None;
    }
    let variable = format!("ANYBROKER_TEST_{}_URL", name.to_uppercase());
    let url = std::env::var(&variable).ok().filter(|url| !url.is_empty());
    if url.is_none() {
        println!("not run: {variable} is not set (cargo xtask brokers up {name})");
        let is_required = std::env::var("ANYBROKER_TEST_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
        assert!(!is_required, "{variable} is not set, and ANYBROKER_TEST_REQUIRE_BROKERS demands it");
    }
    url
}

const CASE: &str = "faults/answers-that-are-lost-leave-outcomes-unknown-and-lose-nothing";

fn conform(url: &str, more: &[&str]) -> Ran {
    bare(&[&["conform", "--url", url, "--case", CASE, "--seed", "5", "--patience", "60s", "--json"][..], more].concat())
}

/// The case was run, and its faults met something.
fn assert_disturbed(ran: &Ran) {
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let objects = ran.objects();
    assert_eq!((&objects[0]["name"], &objects[0]["outcome"]), (&CASE.into(), &"pass".into()), "{ran:?}");
    assert!(objects[0]["counts"]["faults_met"].as_u64() > Some(0), "{ran:?}");
}

#[test]
fn connections_of_the_command_are_disturbed_without_anything_being_set_up() {
    let Some(url) = url("nats", cfg!(feature = "nats")) else { return };
    assert_disturbed(&conform(&url, &["--faults", "proxy"]));
}

#[test]
fn clients_that_would_walk_round_the_proxy_are_noticed_and_go_through_the_one_that_is_named() {
    let Some(url) = url("kafka", cfg!(feature = "kafka")) else { return };
    let refused = conform(&url, &["--faults", "proxy"]);
    assert_eq!((refused.code, &refused.error()["kind"]), (Some(4), &"unsupported".into()), "{refused:?}");
    assert!(refused.out.is_empty(), "{refused:?}");
    let Some(route) = advertised_by_kafka() else { return };
    assert_disturbed(&conform(&url, &["--proxy", &route]));
}

/// Where the server of `cargo xtask brokers` tells clients of its listener PROXIED to come to, and where it listens itself.
fn advertised_by_kafka() -> Option<String> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state/anybroker"));
    let state = std::env::var_os("ANYBROKER_STATE").map(PathBuf::from).or_else(home)?;
    let instance = std::env::var("ANYBROKER_INSTANCE").unwrap_or_else(|_| "dev".into());
    let file = state.join("brokers").join(instance).join("kafka/server.properties");
    let Ok(properties) = std::fs::read_to_string(&file) else {
        println!("not run: {} is not there; the server is not one of `cargo xtask brokers`", file.display());
        return None;
    };
    let address = |setting: &str| {
        let line = properties.lines().find_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
        let proxied = line.and_then(|line| line.split(',').find_map(|address| address.strip_prefix("PROXIED://")));
        proxied.expect("a listener PROXIED").to_owned()
    };
    Some(format!("{}={}", address("advertised.listeners"), address("listeners")))
}

#[test]
fn a_sweep_deletes_what_an_old_run_left_behind_and_nothing_else() {
    let brokers = [
        ("kafka", cfg!(feature = "kafka")),
        ("nats", cfg!(feature = "nats")),
        ("pulsar", cfg!(feature = "pulsar")),
        ("rabbitmq", cfg!(feature = "rabbitmq")),
    ];
    for (name, has_client) in brokers {
        if let Some(url) = url(name, has_client) {
            sweep(name, &url);
        }
    }
}

fn sweep(broker: &str, url: &str) {
    let unique = format!("{:06x}", std::process::id() & 0x00ff_ffff);
    // Runs of 1970, so that no younger run on the same server is touched.
    let left = [format!("conform-00000001-{unique}.7.d"), format!("conform-00000001-{unique}.7.part.e")];
    let others = [format!("conform-{unique}.7.d"), format!("conform-00000001-{unique}x.7.d")];
    let run = |args: &[&str]| bare(&[args, &["--url", url, "--json"]].concat());
    let is_there = |name: &str| match run(&["describe", name]) {
        ran if ran.code == Some(0) => true,
        ran => {
            assert_eq!(ran.error()["kind"], "not_found", "{broker}: {ran:?}");
            false
        }
    };
    for name in left.iter().chain(&others) {
        let declared = run(&["declare", name, "--group", "g"]);
        assert_eq!(declared.code, Some(0), "{broker}: {declared:?}");
    }
    let swept = |args: &[&str]| {
        let ran = run(&[&["conform", "sweep", "--older-than", "10000d"][..], args].concat());
        assert_eq!(ran.code, Some(0), "{broker}: {ran:?}");
        let own = |name: &str| left.iter().chain(&others).any(|own| own == name);
        let mut found = ran.objects();
        found.retain(|one| own(one["destination"].as_str().expect("a name")));
        found.into_iter().map(|one| (one["destination"].clone(), one["deleted"].clone())).collect::<Vec<_>>()
    };
    let expected = |deleted: bool| left.iter().map(|name| (name.as_str().into(), deleted.into())).collect::<Vec<_>>();
    assert_eq!(swept(&["--dry-run"]), expected(false), "{broker}");
    assert!(left.iter().all(|name| is_there(name)), "{broker}");
    assert_eq!(swept(&[]), expected(true), "{broker}");
    assert!(!left.iter().any(|name| is_there(name)), "{broker}");
    for name in &others {
        assert!(is_there(name), "{broker}: {name}");
        assert_eq!(run(&["delete", name, "--yes"]).code, Some(0), "{broker}: {name}");
    }
}
