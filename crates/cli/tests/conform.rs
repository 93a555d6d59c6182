//! The conformance suite from the command line.

mod common;

use common::{Cli, bare, finish, texts};

#[test]
fn cases_are_listed_without_an_endpoint() {
    let ran = bare(&["conform", "--list", "--json"]);
    assert_eq!(ran.code, Some(0));
    let cases = ran.objects();
    assert!(cases.iter().all(|case| case["proves"].is_string() && case["needs"].is_array()));
    for level in ["conformance", "reliability", "long"] {
        assert!(cases.iter().any(|case| case["level"] == level), "{level}");
    }
    assert!(texts(&cases, "name").iter().any(|name| name.starts_with("dead-letter/")));
}

#[test]
fn a_run_reports_each_case_and_leaves_a_report_behind() {
    let cli = Cli::new();
    let folder = cli.path("report");
    let args = ["conform", "--case", "delivery/what-*", "--seed", "7", "--report", folder.to_str().expect("UTF-8")];
    let objects = cli.json(&args, b"");
    let (run, cases) = objects.split_last().expect("at least the run");
    assert!(!cases.is_empty());
    assert!(cases.iter().all(|case| case["outcome"] == "pass"), "{cases:?}");
    assert_eq!((&run["green"], &run["settings"]["seed"]), (&true.into(), &7.into()));
    for name in ["report.txt", "report.html", "report.json", "junit.xml"] {
        assert!(folder.join(name).is_file(), "{name}");
    }
}

#[test]
fn reports_are_merged_and_compared() {
    let cli = Cli::new();
    let report = |name: &str, case: &str| {
        let folder = cli.path(name);
        let args = ["conform", "--case", case, "--name", "it", "--client", "client 9", "--report"];
        cli.json(&[&args[..], &[folder.to_str().expect("UTF-8")]].concat(), b"");
        folder.join("report.json").to_str().expect("UTF-8").to_owned()
    };
    let (before, after) = (report("before", "delivery/what-*"), report("after", "delivery/a-fresh-client-*"));
    let all = cli.path("all");
    let merged = cli.json(&["conform", "report", "merge", &before, &after, "--to", all.to_str().expect("UTF-8")], b"");
    assert_eq!(merged[0]["reports"].as_array().map(Vec::len), Some(2));
    assert_eq!(merged[0]["reports"][0]["endpoint"]["client"], "client 9");
    assert!(all.join("report.html").is_file() && all.join("report.json").is_file());

    let same = bare(&["conform", "report", "compare", &before, &before, "--json"]);
    assert_eq!(same.code, Some(0), "{same:?}");
    // What the earlier run showed, the later one does not show any more.
    let less = bare(&["conform", "report", "compare", &before, &after]);
    assert_eq!(less.code, Some(1), "{less:?}");
    assert!(less.out.contains("not part of the run"), "{}", less.out);
}

#[test]
fn a_file_that_is_no_report_is_wrong_usage() {
    let cli = Cli::new();
    let file = cli.path("report.json");
    std::fs::write(&file, "{\"schema\": 1}").expect("written");
    let file = file.to_str().expect("UTF-8");
    let ran = bare(&["conform", "report", "compare", file, file, "--json"]);
    assert_eq!((ran.code, &ran.error()["kind"]), (Some(2), &"usage".into()));
    let missing = bare(&["conform", "report", "compare", "/nowhere/report.json", file, "--json"]);
    assert_eq!((missing.code, &missing.error()["kind"]), (Some(1), &"io".into()));
}

#[test]
fn an_interrupted_run_deletes_what_it_created() {
    let cli = Cli::new();
    let folder = cli.path("report");
    let child = cli.spawn(&["conform", "--json", "--parallel", "4", "--report", folder.to_str().expect("UTF-8")]);
    let created = || {
        let file = rusqlite::Connection::open(cli.path("events.db")).expect("opened");
        let count = "SELECT count(*) FROM destinations WHERE name LIKE 'conform-%'";
        // Before the file has its tables there is nothing in it.
        file.query_row(count, [], |row| row.get::<_, i64>(0)).unwrap_or(0)
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while created() == 0 {
        assert!(std::time::Instant::now() < deadline, "no case has begun");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT)
        .expect("signalled");
    let ran = finish(child);
    assert_eq!(ran.code, Some(130), "{ran:?}");
    assert!(ran.out.contains("interrupted"), "{}", ran.out);
    assert_eq!(created(), 0, "destinations are left behind");
    assert!(!folder.join("report.json").exists(), "half a report could be taken for a whole one");
}

#[test]
fn a_sweep_deletes_what_a_killed_run_has_left_behind_once_it_is_old_enough() {
    let cli = Cli::new();
    let mut child = cli.spawn(&["conform", "--json", "--parallel", "4"]);
    let left = || cli.json(&["conform", "sweep", "--dry-run", "--older-than", "0s"], b"");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while left().is_empty() {
        assert!(std::time::Instant::now() < deadline, "no case has begun");
    }
    // Without a chance to delete anything.
    child.kill().expect("killed");
    child.wait().expect("ended");
    cli.json(&["declare", "conform-orders"], b"");

    let before = left();
    assert!(!before.is_empty() && before.iter().all(|one| one["deleted"] == false), "{before:?}");
    assert_eq!(cli.json(&["conform", "sweep"], b""), Vec::<serde_json::Value>::new(), "a run that began just now");
    let swept = cli.json(&["conform", "sweep", "--older-than", "0s"], b"");
    assert_eq!(texts(&swept, "destination"), texts(&before, "destination"));
    assert!(swept.iter().all(|one| one["deleted"] == true && one["error"].is_null()), "{swept:?}");
    assert_eq!(left(), Vec::<serde_json::Value>::new());
    cli.json(&["describe", "conform-orders"], b"");
}

#[test]
fn faults_that_cannot_be_brought_about_are_refused_before_anything_is_run() {
    let cli = Cli::new();
    for (args, code, kind) in [
        // A file has no connection and no server.
        (&["--faults", "proxy"][..], 4, "unsupported"),
        (&["--restart-command", "true"], 4, "unsupported"),
        (&["--faults", "process"], 2, "usage"),
        (&["--faults", "none", "--proxy", "127.0.0.1:1=127.0.0.1:2"], 2, "usage"),
        (&["--faults", "proxy", "--level", "conformance"], 2, "usage"),
        (&["--nodes", "3", "--restart-node-command", "true"], 4, "unsupported"),
        (&["--nodes", "3", "--restart-node-command", "true", "--level", "reliability"], 2, "usage"),
        (&["--nodes", "3"], 2, "usage"),
        (&["--nodes", "1", "--restart-node-command", "true"], 2, "usage"),
        (&["--restart-node-command", "true"], 2, "usage"),
        (&["--nodes", "3", "--kill-node-command", "true"], 2, "usage"),
        (&["--nodes", "3", "--pause-node-command", "true"], 2, "usage"),
        (&["--nodes", "3", "--resume-node-command", "true"], 2, "usage"),
    ] {
        let ran = cli.run(&[&["conform", "--json", "--case", "delivery/what-*"][..], args].concat());
        assert_eq!((ran.code, &ran.error()["kind"]), (Some(code), &kind.into()), "{args:?}: {ran:?}");
        assert!(ran.out.is_empty(), "{args:?}: {ran:?}");
    }
    // Without them those cases are not run, which is a failure for whoever names them. Processes there can be of a file, too.
    for (faults, killed) in [(&[][..], "pass"), (&["--faults", "none"], "not_run")] {
        let ran = cli.run(&[&["conform", "--level", "L2", "--case", "faults/*", "--json"][..], faults].concat());
        assert_eq!(ran.code, Some(1), "{ran:?}");
        let mut cases = ran.objects();
        cases.pop();
        let is_of_processes = |case: &serde_json::Value| {
            let name = case["name"].to_string();
            name.contains("-process-is-killed-") || name.contains("-stands-still-")
        };
        // Of what the record refuses, nothing has to be disturbed.
        let is_as_expected = |case: &serde_json::Value| {
            let is_refused = case["needs"].to_string().contains("transactions");
            case["outcome"] == if is_refused { "refused_and_verified" } else { "not_run" }
        };
        let (processes, others): (Vec<_>, Vec<_>) = cases.into_iter().partition(is_of_processes);
        assert!(processes.len() == 5 && processes.iter().all(|case| case["outcome"] == killed), "{ran:?}");
        assert!(others.len() > 1 && others.iter().all(is_as_expected), "{ran:?}");
    }
}

#[test]
fn a_case_that_is_named_is_run_whatever_its_level_and_a_pattern_may_take_along_what_the_line_leaves_alone() {
    let cli = Cli::new();
    let killed = "faults/a-publisher-whose-process-is-killed-has-stored-what-was-confirmed";
    let ran = cli.run(&["conform", "--case", killed, "--json"]);
    assert_eq!((ran.code, &ran.objects()[0]["outcome"]), (Some(0), &"pass".into()), "{ran:?}");
    let pattern =
        ["conform", "--case", "faults/*-whose-process-is-killed-*", "--case", "faults/a-black-hole-*", "--json"];
    let ran = cli.run(&[&pattern[..], &["--faults", "clients"]].concat());
    let outcomes: Vec<_> = ran.objects().into_iter().map(|case| case["outcome"].clone()).collect();
    assert!(
        ran.code == Some(0) && outcomes.contains(&"pass".into()) && outcomes.contains(&"not_run".into()),
        "{ran:?}"
    );
    // Nothing on this line leaves connections alone: they are missing.
    assert_eq!(cli.run(&pattern).code, Some(1));
}

#[test]
fn a_broker_in_this_process_is_one_broker_for_the_whole_run() {
    let ran = bare(&["conform", "--url", "memory://", "--case", "delivery/a-fresh-client-*", "--json"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.objects()[0]["outcome"], "pass");
}

#[test]
fn a_client_that_creates_nothing_is_had_of_a_broker_in_this_process_too() {
    let ran = bare(&["conform", "--url", "memory://", "--case", "publish/a-client-that-creates-nothing-*", "--json"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.objects()[0]["outcome"], "pass");
}

#[test]
fn a_pattern_that_matches_no_case_is_wrong_usage() {
    let ran = bare(&["conform", "--url", "memory://", "--case", "nothing/*", "--json"]);
    assert_eq!(ran.code, Some(2));
    assert_eq!(ran.error()["kind"], "usage");
}

#[test]
fn a_broker_in_this_process_is_said_to_have_neither_a_server_nor_other_processes() {
    // With a name it is in this process all the same.
    for url in ["memory://", "memory://shop"] {
        for (case, told) in [
            ("faults/a-server-that-is-frozen-*", "names no server"),
            ("cluster/nodes-that-are-restarted-*", "names no server"),
            ("faults/a-publisher-whose-process-is-killed-*", "in this process's memory"),
            ("faults/a-member-whose-process-is-killed-*", "in this process's memory"),
            ("faults/what-a-member-was-told-*", "in this process's memory"),
        ] {
            let ran = bare(&["conform", "--url", url, "--level", "long", "--case", case, "--json"]);
            let case = &ran.objects()[0];
            assert_eq!(case["outcome"], "not_run", "{url}: {ran:?}");
            assert!(case["detail"].as_str().is_some_and(|why| why.contains(told)), "{url}: {ran:?}");
        }
    }
}
