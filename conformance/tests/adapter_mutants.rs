//! Mutants of real adapters: that each still applies, that each was killed, and that `conformance/mutants/README.md` says so.
//!
//! `cargo xtask mutants` runs them on live brokers and keeps what it found in `matrix.json`. Here is only seen that this is
//! what was found of the patches as they are; `UPDATE=1 cargo test -p anybroker-conformance --test adapter_mutants` rewrites
//! the table.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anybroker_conformance::cases;
use anybroker_conformance::mutants::{mutants, mutants_in_clusters, mutants_in_faults};
use serde::Deserialize;

const BEGIN: &str = "<!-- matrix:begin -->\n";
const END: &str = "<!-- matrix:end -->\n";

#[derive(Deserialize)]
struct Matrix {
    mutants: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    adapter: String,
    name: String,
    breaks: String,
    killed_by: String,
    killed: bool,
    verdict: String,
    server: String,
    blob: String,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("mutants")
}

fn matrix() -> Matrix {
    serde_json::from_str(&fs::read_to_string(folder().join("matrix.json")).unwrap()).unwrap()
}

fn patches() -> Vec<PathBuf> {
    let adapters = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let files = adapters.flat_map(|adapter| fs::read_dir(adapter).unwrap().map(|entry| entry.unwrap().path()));
    let mut files: Vec<PathBuf> = files.collect();
    files.sort();
    files
}

/// What Git says, in the root of the repository; an error is what it complains about.
fn git(arguments: &[&str], file: &Path) -> Result<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let output = Command::new("git").args(arguments).arg(file).current_dir(root).output().unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).unwrap().trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn every_mutant_of_an_adapter_still_applies() {
    let patches = patches();
    assert!(patches.len() >= 12, "{patches:?}");
    for patch in patches {
        if let Err(why) = git(&["apply", "--check"], &patch) {
            panic!("{} applies no more; write it anew and run `cargo xtask mutants`: {why}", patch.display());
        }
    }
}

#[test]
fn every_mutant_of_an_adapter_was_killed_as_it_is_by_a_case_that_there_is() {
    let matrix = matrix();
    let names: BTreeSet<&str> = cases().iter().map(|case| case.name).collect();
    let found: BTreeSet<String> = matrix
        .mutants
        .iter()
        .filter(|entry| entry.killed && names.contains(&*entry.killed_by))
        .map(|entry| entry.blob.clone())
        .collect();
    for patch in patches() {
        let blob = git(&["hash-object"], &patch).unwrap();
        assert!(found.contains(&blob), "{} was not killed yet: run `cargo xtask mutants`", patch.display());
    }
    assert_eq!(matrix.mutants.len(), patches().len(), "the matrix tells of mutants that are not there");
}

#[test]
fn the_table_says_what_the_matrix_says() {
    let readme = folder().join("README.md");
    let text = fs::read_to_string(&readme).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the begin marker");
    let (found, after) = rest.split_once(END).expect("the end marker");
    let table = table(&matrix());
    if std::env::var_os("UPDATE").is_some() {
        fs::write(readme, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
    } else {
        assert!(found == table, "conformance/mutants/README.md is out of date; it should be:\n{table}");
    }
}

fn table(matrix: &Matrix) -> String {
    let killed = matrix.mutants.iter().filter(|entry| entry.killed).count();
    let (memory, in_faults, in_clusters) = (mutants(), mutants_in_faults(), mutants_in_clusters());
    let all = matrix.mutants.len() + memory.len() + in_faults.len() + in_clusters.len();
    assert!(all >= 30, "{all}");
    let mut text = format!(
        "\n{all} mutants: {} of real adapters, {killed} of them killed; {} of the memory broker, which the tests kill each \
         time; {} that only the cases about faults can tell, which \
         the tests of the NATS adapter kill; {} of clusters in name only, which the tests kill each time too.\n\n",
        matrix.mutants.len(),
        memory.len(),
        in_faults.len(),
        in_clusters.len()
    );
    let servers: BTreeSet<(&str, &str)> =
        matrix.mutants.iter().map(|entry| (&*entry.adapter, &*entry.server)).collect();
    for (adapter, server) in servers {
        writeln!(text, "- {adapter} was run on: {server}").unwrap();
    }
    text.push_str("\n| adapter | what is broken | killed by | which says |\n|---|---|---|---|\n");
    let cell = |text: &str| text.replace('|', "\\|").replace('<', "&lt;");
    for entry in &matrix.mutants {
        let verdict =
            if entry.killed { cell(&entry.verdict) } else { format!("**survived**: {}", cell(&entry.verdict)) };
        writeln!(
            text,
            "| {} | [{}]({}/{}.patch) | `{}` | {verdict} |",
            entry.adapter,
            cell(entry.breaks.trim_end_matches('.')),
            entry.adapter,
            entry.name,
            entry.killed_by
        )
        .unwrap();
    }
    text.push_str("\n| memory | killed by |\n|---|---|\n");
    for mutant in memory.iter().chain(&in_faults).chain(&in_clusters) {
        writeln!(text, "| {}: {} | `{}` |", mutant.name, cell(mutant.fault), mutant.killed_by).unwrap();
    }
    text.push('\n');
    text
}
