//! Reports that are written, read back, merged and compared.

use std::time::Duration;

use super::*;
use crate::{Shrunk, cases};

fn report(outcomes: &[(usize, Outcome)]) -> Report {
    let case = |&(index, outcome): &(usize, Outcome)| {
        let history = matches!(outcome, Outcome::Fail).then(|| "{}\n".to_owned());
        let detail = if matches!(outcome, Outcome::Pass) { String::new() } else { "<why> & \"so\"".to_owned() };
        let (took, counts) = (Duration::from_millis(12), Counts::default());
        let mut report = CaseReport::new(&cases()[index], outcome, detail, took, counts, vec![], history);
        report.schedule = matches!(outcome, Outcome::Fail).then(|| ScheduleReport {
            faults: vec!["cut <1>".to_owned(), "cut 2".to_owned(), "cut 3".to_owned()],
            only: Some(vec![1, 2]),
            shrunk: Some(Shrunk { faults: vec![2], runs: 5, failed: 3, is_minimal: true }),
        });
        report
    };
    let endpoint = EndpointReport {
        name: "one".into(),
        scheme: "memory".into(),
        mode: "default".into(),
        url: "memory://x".into(),
        server: "memory 1".into(),
        client: Some("client 3".into()),
        emulated: None,
    };
    let settings = RunSettings {
        seed: u64::MAX,
        parallelism: 8,
        filter: Vec::new(),
        level: Level::Conformance,
        lease_ms: 1_000,
        quiet_ms: 2_000,
        patience_ms: 30_000,
        case_timeout_ms: 180_000,
    };
    let cases: Vec<CaseReport> = outcomes.iter().map(case).collect();
    Report {
        schema: SCHEMA,
        suite: "0.1.0".into(),
        started: "2026-11-28T10:00:00.000Z".into(),
        duration_ms: 61_234,
        platform: "linux x86_64".into(),
        endpoint,
        record: BTreeMap::from([("nack".to_owned(), "native".into())]),
        settings,
        totals: Totals::of(&cases),
        cases,
    }
}

#[test]
fn a_report_that_is_read_back_is_the_report_that_was_written() {
    let folder = folder("read-back");
    let written = report(&[(0, Outcome::Pass), (1, Outcome::Fail), (2, Outcome::NotRun)]);
    written.write_dir(&folder).unwrap();
    let read = ReportSet::read(&folder.join("report.json")).unwrap();
    assert_eq!(read.reports.len(), 1);
    assert_eq!(read.reports[0].json(), written.json());
    for file in ["report.txt", "report.html", "junit.xml"] {
        assert!(folder.join(file).is_file(), "{file}");
    }
    let history = written.cases[1].history_file.as_ref().unwrap();
    assert!(folder.join(history).is_file() && folder.join(history).with_extension("html").is_file());
}

#[test]
fn a_case_that_failed_says_which_faults_it_takes_and_how_to_run_it_again() {
    let written = report(&[(0, Outcome::Pass), (1, Outcome::Fail)]);
    let again = format!("again: --case {} --seed {} --schedule 2", cases()[1].name, u64::MAX);
    for (form, text) in [("text", written.text()), ("page", written.html()), ("JUnit", written.junit())] {
        assert!(text.contains(&again) && text.contains("shrunk to 2: it failed in 3 of 5"), "{form}: {text}");
        assert!(text.contains("(1) cut") && !text.contains("cut 3"), "{form}: {text}");
    }
}

#[test]
fn a_file_of_another_version_of_the_form_is_refused() {
    let folder = folder("other-version");
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("report.json");
    let mut json = report(&[(0, Outcome::Pass)]).json();
    json["schema"] = (SCHEMA + 1).into();
    std::fs::write(&file, json.to_string()).unwrap();
    let found = ReportSet::read(&file).unwrap_err();
    assert!(matches!(found, ReportError::OtherSchema(_, Some(version)) if version == u64::from(SCHEMA) + 1), "{found}");
    std::fs::write(&file, "{}").unwrap();
    assert!(matches!(ReportSet::read(&file).unwrap_err(), ReportError::OtherSchema(_, None)));
}

#[test]
fn merged_reports_keep_their_links_to_histories() {
    let folder = folder("merged");
    report(&[(0, Outcome::Fail)]).write_dir(&folder.join("modes/one")).unwrap();
    report(&[(0, Outcome::Pass)]).write_dir(&folder.join("modes/two")).unwrap();
    let files = ["one", "two"].map(|mode| folder.join("modes").join(mode).join("report.json"));
    let set = ReportSet::read_for(&folder.join("all"), &files).unwrap();
    set.write_dir(&folder.join("all")).unwrap();
    let history = set.reports[0].cases[0].history_file.clone().unwrap();
    assert!(folder.join("all").join(&history).is_file(), "{history}");
    assert!(set.html().contains(history.trim_end_matches(".jsonl")));
    // A set is merged like a single report.
    let again = ReportSet::read_for(&folder.join("all"), &[folder.join("all/report.json"), files[1].clone()]).unwrap();
    assert_eq!(again.reports.len(), 3);
    assert!(!set.is_green());
}

#[test]
fn a_page_needs_nothing_else_and_shows_text_as_text() {
    let page = report(&[(0, Outcome::Pass), (1, Outcome::Fail)]).html();
    assert!(page.contains("&lt;why&gt; &amp; &quot;so&quot;") && !page.contains("<why>"), "text is escaped");
    for foreign in ["<script", "<link", "<img", "url(", "@import", "http://", "https://"] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    assert!(page.contains("client 3"));
}

#[test]
fn a_comparison_tells_what_is_worse_from_what_is_only_different() {
    let set = |outcomes: &[(usize, Outcome)]| ReportSet::new(vec![report(outcomes)]);
    let worse = |before: Outcome, after: Outcome| Comparison::of(&set(&[(0, before)]), &set(&[(0, after)])).is_worse();
    assert!(worse(Outcome::Pass, Outcome::Fail));
    assert!(worse(Outcome::Pass, Outcome::NotRun));
    assert!(worse(Outcome::Pass, Outcome::RefusedAndVerified), "a promise is taken back");
    assert!(!worse(Outcome::RefusedAndVerified, Outcome::Pass));
    assert!(!worse(Outcome::Fail, Outcome::Pass));
    assert!(!worse(Outcome::Fail, Outcome::Inconclusive));

    let both = Comparison::of(
        &set(&[(0, Outcome::Pass), (1, Outcome::Pass)]),
        &set(&[(1, Outcome::Pass), (2, Outcome::Fail)]),
    );
    let changes: Vec<_> = both.endpoints[0].cases.iter().map(|change| (change.before, change.after)).collect();
    assert_eq!(changes, [(Some(Outcome::Pass), None), (None, Some(Outcome::Fail))]);
    assert_eq!(both.endpoints[0].unchanged, 1);
    assert!(both.is_worse(), "a case that was green is not part of the run any more");
}

#[test]
fn a_comparison_shows_a_record_that_changed_and_an_endpoint_that_is_gone() {
    let before = report(&[(0, Outcome::Pass)]);
    let mut after = before.clone();
    after.record.insert("nack".to_owned(), serde_json::json!({"refused": "no"}));
    let one = Comparison::of(&ReportSet::new(vec![before.clone()]), &ReportSet::new(vec![after.clone()]));
    assert_eq!(one.endpoints[0].record.len(), 1);
    assert!(!one.is_worse() && one.html().contains("refused"));

    after.endpoint.name = "two".into();
    let sets = (ReportSet::new(vec![before, after.clone()]), ReportSet::new(vec![after.clone()]));
    let gone = Comparison::of(&sets.0, &sets.1);
    assert_eq!((gone.gone.as_slice(), gone.is_worse()), (["one".to_owned()].as_slice(), true));
}

#[test]
fn reports_are_what_their_schema_says() {
    let mut full =
        report(&[(0, Outcome::Pass), (1, Outcome::Fail), (2, Outcome::RefusedAndVerified), (3, Outcome::Inconclusive)]);
    let anomaly = Anomaly { name: "lost", group: "g".into(), id: "m".into(), detail: "gone".into() };
    full.cases[1].anomalies.push(anomaly);
    full.endpoint.emulated = Some("a stand-in".into());
    let mut bare = report(&[(0, Outcome::NotRun)]);
    bare.endpoint.client = None;
    let mut found = Vec::new();
    for one in [&full, &bare] {
        schema::differences(&one.json(), &Report::json_schema(), "report", &mut found);
    }
    let set = serde_json::to_value(ReportSet::new(vec![full, bare])).unwrap();
    schema::differences(&set, &ReportSet::json_schema(), "set", &mut found);
    assert!(found.is_empty(), "{found:#?}");
}

/// `ANYBROKER_WRITE_SCHEMA=1` writes it anew.
#[test]
fn the_committed_schema_is_that_of_the_form() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("report.schema.json");
    let current = format!("{:#}\n", Report::json_schema());
    if std::env::var_os("ANYBROKER_WRITE_SCHEMA").is_some() {
        std::fs::write(&path, &current).unwrap();
    }
    // By what it says: the order of the fields depends on which features of serde_json others ask for.
    let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(
        value(&committed) == value(&current),
        "run the test with ANYBROKER_WRITE_SCHEMA=1, and raise SCHEMA where a field's meaning changed"
    );
}

/// A folder of this test alone, empty.
fn folder(name: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("anybroker-report-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    folder
}
