//! Runs the built command against a file of its own.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own share")]

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// An endpoint that nobody else uses.
pub struct Cli {
    pub folder: TempDir,
    pub url: String,
}

/// What a run left behind.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Cli {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let url = format!("embedded://{}", folder.path().join("events.db").display());
        Self { folder, url }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// With `--url` and nothing on standard input.
    pub fn run(&self, args: &[&str]) -> Ran {
        self.feed(args, b"")
    }

    /// With `--url` and that on standard input.
    pub fn feed(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut child = self.spawn(args);
        let mut stdin = child.stdin.take().expect("piped");
        // The command answers while it reads: with its output unread, both sides would wait for each other's pipe.
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // A command that refuses its arguments does not read its input.
                let _ = stdin.write_all(input);
            });
            finish(child)
        })
    }

    /// As `feed`, which must succeed; the JSON objects it printed.
    pub fn json(&self, args: &[&str], input: &[u8]) -> Vec<Value> {
        let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
        let ran = self.feed(&args, input);
        assert_eq!(ran.code, Some(0), "{args:?}: {ran:?}");
        ran.objects()
    }

    pub fn spawn(&self, args: &[&str]) -> Child {
        start(&[args, &["--url", &self.url]].concat())
    }

    /// Publishes lines; the ids in their order.
    pub fn publish(&self, destination: &str, lines: &str) -> Vec<String> {
        let receipts = self.json(&["publish", destination], lines.as_bytes());
        receipts.iter().map(|receipt| receipt["id"].as_str().expect("an id").to_owned()).collect()
    }
}

/// Without any endpoint.
pub fn bare(args: &[&str]) -> Ran {
    finish(start(args))
}

pub fn start(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anybroker"));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Settings of whoever runs the tests are none of theirs.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ANYBROKER_") {
            command.env_remove(name);
        }
    }
    command.spawn().expect("the command starts")
}

pub fn finish(child: Child) -> Ran {
    let output = child.wait_with_output().expect("the command ends");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

impl Ran {
    /// Standard output as JSON, one object per line.
    pub fn objects(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
    }

    /// The error object on standard error.
    pub fn error(&self) -> Value {
        let last = self.err.lines().last().unwrap_or_default();
        serde_json::from_str::<Value>(last).unwrap_or_else(|_| panic!("no JSON: {self:?}"))["error"].clone()
    }
}

/// The texts under `name`.
pub fn texts(objects: &[Value], name: &str) -> Vec<String> {
    objects
        .iter()
        .map(|object| object[name].as_str().unwrap_or_else(|| panic!("{name}: {object}")).to_owned())
        .collect()
}
