//! Standard output: one JSON object per line, or text and tables for people.

use std::io::{self, BufWriter, Stdout, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

use crate::exit::Failure;

/// Where results go. Nothing counts as printed before [`flush`](Self::flush) returned.
pub(crate) struct Output {
    json: bool,
    stdout: BufWriter<Stdout>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, stdout: BufWriter::with_capacity(64 * 1024, io::stdout()) }
    }

    /// Whether `--json` was given.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// One JSON object on a line of its own.
    pub(crate) fn object(&mut self, object: &Value) -> Result<(), Failure> {
        serde_json::to_writer(&mut self.stdout, object).map_err(|error| failed(error.into()))?;
        self.raw(b"\n")
    }

    /// A line for people.
    pub(crate) fn line(&mut self, text: &str) -> Result<(), Failure> {
        self.raw(text.as_bytes())?;
        self.raw(b"\n")
    }

    /// Rows under a head, for people.
    pub(crate) fn table(&mut self, head: &[&str], rows: Vec<Vec<String>>) -> Result<(), Failure> {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_header(head);
        table.add_rows(rows);
        let text = table.to_string();
        for line in text.lines() {
            // The preset pads every cell, the first one too.
            self.line(line.strip_prefix(' ').unwrap_or(line).trim_end())?;
        }
        Ok(())
    }

    /// Bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.stdout.write_all(bytes).map_err(failed)
    }

    /// Everything printed so far has left this process when it returns.
    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        self.stdout.flush().map_err(failed)
    }
}

fn failed(error: io::Error) -> Failure {
    Failure::Io("write to standard output", error)
}

/// A remark for people, on standard error; with `--json` an object.
pub(crate) fn remark(json: bool, text: &str, object: &Value) {
    let text = if json { object.to_string() } else { text.to_owned() };
    // A remark that cannot be written changes nothing about the result.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Bytes for people: text without control characters, which could change the terminal; anything else escaped.
pub(crate) fn readable(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text
            .chars()
            .flat_map(|c| if c.is_control() && c != '\t' { c.escape_default().collect() } else { vec![c] })
            .collect(),
        Err(_) => bytes.escape_ascii().to_string(),
    }
}

/// A figure that may be missing.
pub(crate) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_read_cannot_command_their_terminal() {
        assert_eq!(readable("a\tö\u{1b}[2J\n".as_bytes()), "a\tö\\u{1b}[2J\\n");
        assert_eq!(readable(&[0xff, b'a']), "\\xffa");
    }
}
