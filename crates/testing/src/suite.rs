//! The conformance suite, as a test.

use std::path::PathBuf;
use std::sync::Arc;

use anybroker_conformance::{CaseReport, Harness, Level, Options, Outcome, Report, UrlHarness, run};

/// Other cases than the test's own.
const CASES: &str = "ANYBROKER_TEST_CASES";

/// In how many more runs the schedule of a case that failed is shrunk.
const SHRINKING: usize = 8;

/// Another seed than the test's own.
const SEED: &str = "ANYBROKER_TEST_SEED";

/// Runs those cases, all of them when none is named, and prints the report. `ANYBROKER_TEST_CASES` names others, and
/// `ANYBROKER_TEST_SEED` another seed. A report that is not green is kept with the histories and timelines of what failed, in the
/// folder `failed-suites` beside the test's program: what fails once in a hundred runs cannot be asked again.
///
/// # Panics
/// When the report is not green, and when it cannot be made.
pub async fn judge(harness: UrlHarness, options: Options, cases: &[&str]) -> Report {
    let options = match std::env::var(CASES) {
        Ok(chosen) => options.with_filter(chosen),
        Err(_) => cases.iter().fold(options, |options, case| options.with_filter(*case)),
    };
    let options = match std::env::var(SEED) {
        Ok(seed) => options.with_seed(seed.parse().unwrap_or_else(|_| panic!("{SEED}: {seed} is no whole number"))),
        Err(_) => options,
    };
    let report = run(Arc::new(harness), options).await.unwrap_or_else(|error| panic!("{error}"));
    println!("{}", report.text());
    assert!(report.is_green(), "{}\n{}", report.summary(), keep(&report));
    report
}

/// Says where it is, or why it is not.
fn keep(report: &Report) -> String {
    let folder = folder();
    match report.write_dir(&folder) {
        Ok(()) => format!("kept, with history and timeline of each: {}", folder.display()),
        Err(error) => format!("not kept: {}: {error}", folder.display()),
    }
}

/// One for each test, so that the last failure of each is there.
fn folder() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    let program_name = program.file_stem().unwrap_or_default();
    let test = std::thread::current().name().unwrap_or("unnamed").replace("::", "-");
    program.with_file_name("failed-suites").join(program_name).join(test)
}

/// [`judge`] for cases about connections, with one seed, which fixes what happens, not when.
///
/// # Panics
/// As [`judge`], and when a case about connections was not run. Where `ANYBROKER_TEST_CASES` takes along cases about answers over HTTP,
/// they need not be if the harness has said that there are none; what the test itself names has to.
pub async fn judge_faults(harness: UrlHarness, parallelism: usize, cases: &[&str]) {
    let options = Options::default().with_level(Level::Reliability).with_parallelism(parallelism).with_seed(1);
    let options = options.with_shrinking(SHRINKING);
    let no_http = harness.http().err().filter(|_| std::env::var_os(CASES).is_some());
    let report = judge(harness, options, cases).await;
    let wants_server = |case: &CaseReport| case.name.contains("a-server-") || case.name.contains("-locked-out-");
    let is_excused = |case: &CaseReport| wants_server(case) || no_http.as_ref() == Some(&case.detail);
    let left_out = |case: &&CaseReport| case.outcome == Outcome::NotRun && !is_excused(case);
    assert_eq!(report.cases.iter().find(left_out).map(|case| case.name), None, "a case about connections was not run");
}

/// [`judge`] for cases about a server that only this test uses, with one seed.
///
/// # Panics
/// As [`judge`], and when a case was not run.
pub async fn judge_server(harness: UrlHarness, cases: &[&str]) {
    let options = Options::default().with_level(Level::Reliability).with_seed(1).with_shrinking(SHRINKING);
    let report = judge(harness, options, cases).await;
    let left_out = report.cases.iter().find(|case| case.outcome == Outcome::NotRun);
    assert_eq!(left_out.map(|case| (case.name, &case.detail)), None, "a case about the server was not run");
}
