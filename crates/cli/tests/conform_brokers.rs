//! `anybroker conform` against running servers: faults, and what killed runs have left behind.

mod common;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{Ran, bare};

/// One of these tests kills this server.
static NATS: Mutex<()> = Mutex::new(());

fn alone_on_nats() -> MutexGuard<'static, ()> {
    NATS.lock().unwrap_or_else(PoisonError::into_inner)
}

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

/// With the name and the URL of each broker that there is one of.
fn on_each_broker(test: impl Fn(&str, &str)) {
    let brokers = [
        ("kafka", cfg!(feature = "kafka")),
        ("nats", cfg!(feature = "nats")),
        ("pulsar", cfg!(feature = "pulsar")),
        ("rabbitmq", cfg!(feature = "rabbitmq")),
        ("sqs", cfg!(feature = "sqs")),
    ];
    for (name, has_client) in brokers {
        let Some(url) = url(name, has_client) else { continue };
        let _alone = (name == "nats").then(alone_on_nats);
        test(name, &url);
    }
}

const CUT: &str = "faults/answers-that-are-lost-leave-outcomes-unknown-and-lose-nothing";
const ANSWERED: &str = "faults/answers-of-an-error-leave-outcomes-unknown-and-lose-nothing";
const KILLED: &str = "faults/a-server-that-is-killed-and-comes-back-loses-nothing-that-was-confirmed";

const FULL: &str = "faults/a-server-without-room-refuses-or-holds-what-is-published-and-loses-nothing";

fn conform(url: &str, case: &str, more: &[&str]) -> Ran {
    bare(&[&["conform", "--url", url, "--case", case, "--seed", "5", "--patience", "60s", "--json"][..], more].concat())
}

/// The case was run, and its faults met something.
fn assert_disturbed(ran: &Ran) {
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let objects = ran.objects();
    assert_eq!((objects.len(), &objects[0]["outcome"]), (2, &"pass".into()), "{ran:?}");
    assert!(objects[0]["counts"]["faults_met"].as_u64() > Some(0), "{ran:?}");
}

#[test]
fn connections_of_the_command_are_disturbed_without_anything_being_set_up() {
    let Some(url) = url("nats", cfg!(feature = "nats")) else { return };
    let _alone = alone_on_nats();
    assert_disturbed(&conform(&url, CUT, &["--faults", "proxy"]));
}

#[test]
fn the_command_answers_in_the_place_of_a_server_that_is_spoken_to_over_http() {
    let Some(url) = url("sqs", cfg!(feature = "sqs")) else { return };
    assert_disturbed(&conform(&url, ANSWERED, &["--faults", "proxy"]));
}

#[test]
fn a_case_about_answers_over_http_is_missed_elsewhere_only_by_whoever_names_it_or_runs_nothing_else() {
    let Some(url) = url("nats", cfg!(feature = "nats")) else { return };
    let _alone = alone_on_nats();
    for (case, code, outcomes) in [
        ("faults/answers-*", 0, &["pass", "not_run"][..]),
        ("faults/answers-of-*", 1, &["not_run"]),
        (ANSWERED, 1, &["not_run"]),
    ] {
        let ran = conform(&url, case, &["--faults", "proxy"]);
        let mut objects = ran.objects();
        objects.pop();
        let found: Vec<&str> = objects.iter().filter_map(|case| case["outcome"].as_str()).collect();
        assert_eq!((ran.code, &*found), (Some(code), outcomes), "{ran:?}");
        let detail = objects.last().and_then(|case| case["detail"].as_str());
        assert!(detail.is_some_and(|detail| detail.starts_with("`nats` is not spoken to over HTTP")), "{ran:?}");
    }
}

/// Whether the endpoint keeps its promises then is for the adapter's own tests to show.
#[test]
fn a_server_is_restarted_by_the_command_that_its_owner_names_and_by_nothing_else() {
    let Some(url) = url("nats", cfg!(feature = "nats")) else { return };
    let Ok(xtask) = std::env::var("ANYBROKER_XTASK") else {
        return println!("not run: ANYBROKER_XTASK is not set (cargo xtask test sets it)");
    };
    let _alone = alone_on_nats();
    // The command under test is not given the settings of these tests.
    let kept = ["ANYBROKER_INSTANCE", "ANYBROKER_STATE"];
    let kept: String =
        kept.iter().filter_map(|name| Some(format!("{name}='{}' ", std::env::var(name).ok()?))).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let mark = folder.path().join("restarted");
    let restart = format!("{kept}'{xtask}' brokers restart nats && touch '{}'", mark.display());
    let ran = conform(&url, KILLED, &["--restart-command", &restart]);
    assert!(mark.exists(), "{ran:?}");
    let case = &ran.objects()[0];
    assert!(case["outcome"] != "not_run" && case["counts"]["faults_met"] == 1, "{ran:?}");
    let (killed, back) = (folder.path().join("killed"), folder.path().join("back"));
    let kill = format!("{kept}'{xtask}' brokers kill nats && touch '{}'", killed.display());
    // It starts what is dead, or fails.
    let start =
        format!("rm '{}' && {kept}'{xtask}' brokers restart nats && touch '{}'", killed.display(), back.display());
    let ran = conform(&url, KILLED, &["--kill-command", &kill, "--restart-command", &start]);
    assert!(!killed.exists() && back.exists(), "{ran:?}");
    assert!(ran.objects()[0]["counts"]["faults_met"] == 1, "{ran:?}");
    assert_eq!(conform(&url, KILLED, &["--kill-command", &kill]).code, Some(2), "nothing would start it again");

    let ran = conform(&url, KILLED, &["--faults", "none", "--level", "reliability"]);
    assert_eq!((ran.code, &ran.objects()[0]["outcome"]), (Some(1), &"not_run".into()), "{ran:?}");

    let failed = conform(&url, KILLED, &["--restart-command", "exit 7"]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    let case = &failed.objects()[0];
    assert_eq!(case["outcome"], "fail", "{failed:?}");
    assert!(case["detail"].as_str().is_some_and(|detail| detail.contains("--restart-command")), "{failed:?}");
}

/// The commands do nothing to the server.
#[test]
fn a_command_that_takes_no_room_is_noticed_and_one_that_fails_leaves_the_case_not_run() {
    let Some(url) = url("nats", cfg!(feature = "nats")) else { return };
    let _alone = alone_on_nats();
    let outcome = |fill: &str, relieve: &str| {
        let ran = conform(&url, FULL, &["--fill-command", fill, "--relieve-command", relieve]);
        let case = ran.objects().swap_remove(0);
        (case["outcome"].to_string(), case["detail"].to_string())
    };
    let (found, why) = outcome("true", "true");
    assert!(found == "\"inconclusive\"" && why.contains("took everything"), "{found}: {why}");
    let (found, why) = outcome("true", "exit 7");
    assert!(found == "\"not_run\"" && why.contains("--relieve-command"), "{found}: {why}");
    let alone = conform(&url, FULL, &["--fill-command", "true"]);
    assert_eq!(alone.code, Some(2), "{alone:?}");
}

#[test]
fn a_fault_without_a_command_is_not_run_and_says_what_is_missing_and_why() {
    let Some(url) = url("nats", cfg!(feature = "nats")) else { return };
    let _alone = alone_on_nats();
    let why = |more: &[&str]| {
        let ran = conform(&url, FULL, &[&["--pause-command", "true", "--resume-command", "true"], more].concat());
        let case = ran.objects().swap_remove(0);
        assert_eq!(case["outcome"], "not_run", "{ran:?}");
        case["detail"].as_str().unwrap_or_default().to_owned()
    };
    let missing = why(&[]);
    assert!(missing.contains("--fill-command") && missing.contains("no room"), "{missing}");
    assert_eq!(why(&["--cannot", "fill=its disk has no end"]), "its disk has no end");
    for wrong in ["fill", "fill=", "flood=of water"] {
        let refused = conform(&url, FULL, &["--cannot", wrong]);
        assert_eq!(refused.code, Some(2), "{wrong}: {refused:?}");
    }
    let undisturbed = conform(&url, FULL, &["--level", "reliability"]).objects().swap_remove(0);
    assert!(undisturbed["detail"].to_string().contains("--restart-command"), "{undisturbed}");
}

#[test]
fn clients_that_would_walk_round_the_proxy_are_noticed_and_go_through_the_one_that_is_named() {
    let Some(url) = url("kafka", cfg!(feature = "kafka")) else { return };
    let refused = conform(&url, CUT, &["--faults", "proxy"]);
    assert_eq!((refused.code, &refused.error()["kind"]), (Some(4), &"unsupported".into()), "{refused:?}");
    assert!(refused.out.is_empty(), "{refused:?}");
    let Some(route) = advertised_by_kafka() else { return };
    assert_disturbed(&conform(&url, CUT, &["--proxy", &route]));
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

/// The cases that look past the adapter, none of which is left out: of this broker they all can be run, or are refused.
#[test]
fn the_command_looks_past_each_adapter_with_the_brokers_bare_client() {
    on_each_broker(|name, url| {
        let ran = bare(&["conform", "--url", url, "--case", "native/*", "--patience", "60s", "--json"]);
        assert_eq!(ran.code, Some(0), "{name}: {ran:?}");
        let run = ran.objects().pop().expect("the run");
        assert_eq!(run["totals"]["not_run"], 0, "{name}: {ran:?}");
    });
}

#[test]
fn publishers_and_members_that_the_command_kills_lose_nothing_on_any_broker() {
    on_each_broker(|name, url| {
        let ran = conform(url, "faults/*-process-is-killed-*", &["--faults", "clients"]);
        assert_eq!(ran.code, Some(0), "{name}: {ran:?}");
        let mut objects = ran.objects();
        objects.pop();
        assert_eq!(objects.len(), 4, "{name}: {ran:?}");
        assert!(objects.iter().all(|case| case["outcome"] == "pass"), "{name}: {ran:?}");
    });
}

#[test]
fn a_sweep_deletes_what_an_old_run_left_behind_and_nothing_else() {
    on_each_broker(|name, url| {
        if name != "sqs" {
            sweep(name, url);
        }
    });
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
