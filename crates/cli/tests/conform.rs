//! The conformance suite from the command line.

mod common;

use common::{Cli, bare, texts};

#[test]
fn cases_are_listed_without_an_endpoint() {
    let ran = bare(&["conform", "--list", "--json"]);
    assert_eq!(ran.code, Some(0));
    let cases = ran.objects();
    assert!(cases.iter().all(|case| case["proves"].is_string() && case["needs"].is_array()));
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
    for name in ["report.txt", "report.json", "junit.xml"] {
        assert!(folder.join(name).is_file(), "{name}");
    }
}

#[test]
fn a_broker_in_this_process_is_one_broker_for_the_whole_run() {
    let ran = bare(&["conform", "--url", "memory://", "--case", "delivery/a-fresh-client-*", "--json"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.objects()[0]["outcome"], "pass");
}

#[test]
fn a_pattern_that_matches_no_case_is_wrong_usage() {
    let ran = bare(&["conform", "--url", "memory://", "--case", "nothing/*", "--json"]);
    assert_eq!(ran.code, Some(2));
    assert_eq!(ran.error()["kind"], "usage");
}
