//! All tests of the workspace, built once and then run side by side: most of the time that tests of brokers take is
//! waiting, and adapters do not share a server.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::child::{self, cargo};

/// The packages that have a lane of their own, one after the other within it. A server belongs to one package, which
/// may kill it. Every other package is in a lane that is given no server.
const LANES: &[&[&str]] =
    &[&["anybroker-kafka", "anybroker-nats"], &["anybroker-pulsar", "anybroker-rabbitmq", "anybroker-sqs"]];

/// These use every server, so they wait until nobody else does: packages, or one file of a package's tests.
const LAST: &[&str] = &["anybroker", "orders", "anybroker-cli tests/conform_brokers.rs"];

/// How many lines of a program that failed are shown once more, behind everything else.
const SHOWN_AGAIN: usize = 40;

/// What a run of tests is given.
pub(crate) struct Tests {
    /// For every test.
    pub(crate) environment: BTreeMap<String, String>,
    /// For the packages that use servers.
    pub(crate) servers: BTreeMap<String, String>,
    /// How long building may take, and how long a lane.
    pub(crate) limit: Duration,
}

/// A program with tests.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Program {
    package: String,
    /// What is tested: a library, a binary, a file of `tests/`.
    target: String,
    executable: PathBuf,
    folder: PathBuf,
}

/// A line of `cargo test --message-format=json`, as far as it is of interest.
#[derive(Deserialize)]
struct Line {
    reason: String,
    #[serde(default)]
    manifest_path: PathBuf,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
    src_path: PathBuf,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

impl Tests {
    /// Builds all tests, runs all of them, and fails when one of them has.
    pub(crate) fn run(&self) -> Result<()> {
        let programs = build(self.limit)?;
        let failed = Mutex::new(Vec::new());
        let lanes = lanes(&programs);
        println!("{} programs in {} lanes", programs.len(), lanes.len());
        thread::scope(|scope| {
            for (lane, has_servers) in &lanes {
                scope.spawn(|| self.lane(lane, *has_servers, &failed));
            }
        });
        let last: Vec<&Program> = programs.iter().filter(|program| is_in(LAST, program)).collect();
        self.lane(&last, true, &failed);
        crate::interrupt::check()?;
        // Examples in comments; they compile while they run, so cargo does it.
        let mut documentation = cargo(["test", "--workspace", "--all-features", "--no-fail-fast", "--doc"]);
        if let Err(error) = child::run(documentation.envs(&self.environment), self.limit) {
            failed.lock().expect("no thread panics with it").push(format!("{error:#}"));
        }
        let failed = failed.into_inner().expect("no thread panics with it");
        ensure!(failed.is_empty(), "{} of the programs failed:\n  {}", failed.len(), failed.join("\n  "));
        Ok(())
    }

    fn lane(&self, programs: &[&Program], has_servers: bool, failed: &Mutex<Vec<String>>) {
        for program in programs {
            if crate::interrupt::check().is_err() {
                return;
            }
            if let Err(error) = self.program(program, has_servers) {
                failed.lock().expect("no thread panics with it").push(format!("{program}: {error:#}"));
            }
        }
    }

    /// Runs one program in the folder of its package, as cargo does, and shows all that it said at its end.
    fn program(&self, program: &Program, has_servers: bool) -> Result<()> {
        let mut said = tempfile::tempfile()?;
        let mut command = Command::new(&program.executable);
        child::clean(&mut command);
        command.current_dir(&program.folder).env("CARGO_MANIFEST_DIR", &program.folder).envs(&self.environment);
        if has_servers {
            command.envs(&self.servers);
        }
        command.stdout(said.try_clone()?).stderr(said.try_clone()?).stdin(Stdio::null());
        let begun = Instant::now();
        let status = child::wait(&mut command, self.limit);
        let text = show(program, &mut said, begun.elapsed())?;
        let status = status?;
        ensure!(status.success(), "{status}; the end of what it said:\n{}", end_of(&text));
        Ok(())
    }
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.package, self.target)
    }
}

/// Its last lines, which tell what failed: what it said stands a long way above, among what all the others said.
fn end_of(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    // A backtrace would leave no room for what the test has said.
    let is_frame = |line: &str| {
        let line = line.trim_start();
        line.starts_with("at ") || line.split_once(": ").is_some_and(|(number, _)| number.parse::<u16>().is_ok())
    };
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty() && !is_frame(line)).collect();
    let last = lines.iter().skip(lines.len().saturating_sub(SHOWN_AGAIN));
    last.map(|line| format!("    | {line}")).collect::<Vec<_>>().join("\n")
}

/// In one piece, however many lanes there are; answers it.
fn show(program: &Program, said: &mut File, took: Duration) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    said.rewind()?;
    said.read_to_end(&mut text)?;
    let mut out = io::stdout().lock();
    writeln!(out, "\n     Running {program} ({:.1} s)", took.as_secs_f64())?;
    out.write_all(&text)?;
    out.flush()?;
    Ok(text)
}

fn is_in(packages: &[&str], program: &Program) -> bool {
    packages.iter().any(|name| *name == program.package || *name == program.to_string())
}

/// What runs side by side, and whether it is given the servers.
fn lanes(programs: &[Program]) -> Vec<(Vec<&Program>, bool)> {
    let mut lanes = vec![(Vec::new(), false)];
    for packages in LANES {
        lanes.push((programs.iter().filter(|program| is_in(packages, program)).collect(), true));
    }
    let elsewhere = |program: &Program| is_in(LAST, program) || LANES.iter().any(|lane| is_in(lane, program));
    lanes[0].0.extend(programs.iter().filter(|program| !elsewhere(program)));
    lanes
}

fn build(limit: Duration) -> Result<Vec<Program>> {
    let mut command = cargo(["test", "--workspace", "--all-features", "--no-run"]);
    command.arg("--message-format=json-render-diagnostics");
    let mut lines = tempfile::tempfile()?;
    child::run(command.stdout(lines.try_clone()?), limit)?;
    let mut text = String::new();
    lines.rewind()?;
    lines.read_to_string(&mut text)?;
    let programs = programs(&text)?;
    for package in LANES.iter().copied().flatten().chain(LAST) {
        ensure!(programs.iter().any(|program| is_in(&[package], program)), "no tests of {package}: is it renamed?");
    }
    Ok(programs)
}

/// The programs that cargo tells of, in an order that does not depend on which was built first.
fn programs(lines: &str) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    for line in lines.lines() {
        let line: Line = serde_json::from_str(line).with_context(|| format!("cargo printed: {line}"))?;
        let (Some(target), Some(profile), Some(executable)) = (line.target, line.profile, line.executable) else {
            continue;
        };
        if line.reason != "compiler-artifact" || !profile.test {
            continue;
        }
        let Some(folder) = line.manifest_path.parent().map(Path::to_path_buf) else {
            bail!("cargo told of no manifest for {}", target.name)
        };
        let source = target.src_path.strip_prefix(&folder).unwrap_or(&target.src_path).display().to_string();
        let kind = if target.kind.iter().any(|kind| kind == "test") { String::new() } else { "unittests ".to_owned() };
        programs.push(Program { package: package(&folder)?, target: format!("{kind}{source}"), executable, folder });
    }
    programs.sort_by(|one, other| (&one.package, &one.target).cmp(&(&other.package, &other.target)));
    Ok(programs)
}

/// The name in the folder's manifest.
fn package(folder: &Path) -> Result<String> {
    let manifest = folder.join("Cargo.toml");
    let text = std::fs::read_to_string(&manifest).with_context(|| manifest.display().to_string())?;
    let name = text.lines().find_map(|line| line.strip_prefix("name = ")).map(|name| name.trim_matches('"').to_owned());
    name.with_context(|| format!("{} has no name", manifest.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(package: &str) -> Program {
        let path = PathBuf::from("/x");
        Program { package: package.to_owned(), target: "tests/a.rs".to_owned(), executable: path.clone(), folder: path }
    }

    #[test]
    fn every_package_is_in_one_lane_and_what_uses_all_servers_is_in_none() {
        let all = ["anybroker", "anybroker-core", "anybroker-kafka", "anybroker-nats", "anybroker-sqs", "orders"];
        let programs: Vec<Program> = all.into_iter().map(program).collect();
        let lanes = lanes(&programs);
        let named =
            |lane: &(Vec<&Program>, bool)| -> Vec<String> { lane.0.iter().map(|p| p.package.clone()).collect() };
        assert_eq!(lanes.len(), 1 + LANES.len());
        assert_eq!((named(&lanes[0]), lanes[0].1), (vec!["anybroker-core".to_owned()], false));
        assert_eq!(
            (named(&lanes[1]), lanes[1].1),
            (vec!["anybroker-kafka".to_owned(), "anybroker-nats".to_owned()], true)
        );
        assert_eq!(named(&lanes[2]), ["anybroker-sqs"]);
        let mut one_file = program("anybroker-cli");
        assert!(!is_in(LAST, &one_file));
        "tests/conform_brokers.rs".clone_into(&mut one_file.target);
        assert!(is_in(LAST, &one_file));
    }

    #[test]
    fn of_what_a_failed_program_said_the_last_lines_are_shown_again() {
        let text: String = (1..=100).map(|line| format!("line {line}\n\n")).collect();
        let end = end_of(text.as_bytes());
        assert_eq!(end.lines().count(), SHOWN_AGAIN);
        assert_eq!((end.lines().next(), end.lines().last()), (Some("    | line 61"), Some("    | line 100")));
        assert_eq!(
            end_of(b"panicked\n   0: rust_begin_unwind\n             at /rustc/x.rs:1:2\nfailures:"),
            "    | panicked\n    | failures:"
        );
        assert_eq!(end_of(b""), "");
    }

    #[test]
    fn programs_are_read_from_what_cargo_prints_and_other_artifacts_are_passed_over() {
        let folder = env!("CARGO_MANIFEST_DIR");
        let line = |reason: &str, kind: &str, source: &str, test: bool, executable: &str| {
            format!(
                r#"{{"reason":"{reason}","manifest_path":"{folder}/Cargo.toml","target":{{"name":"n","kind":["{kind}"],"src_path":"{folder}/{source}"}},"profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let lines = [
            line("compiler-artifact", "test", "tests/b.rs", true, r#""/t/b""#),
            line("compiler-artifact", "bin", "src/main.rs", false, r#""/t/bin""#),
            line("compiler-artifact", "lib", "src/lib.rs", false, "null"),
            line("compiler-artifact", "bin", "src/main.rs", true, r#""/t/main""#),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ];
        let found = programs(&lines.join("\n")).unwrap();
        let targets: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(targets, ["xtask tests/b.rs", "xtask unittests src/main.rs"]);
        assert!(programs("no JSON").is_err());
    }
}
