//! Rows as they are printed.

use std::process::ExitCode;

use serde_json::{Map, Value};

/// Prints rows as they are measured: a table for people, or one JSON object per line.
#[derive(Debug)]
pub struct Report {
    filter: String,
    json: bool,
    rows: usize,
    section: String,
}

/// One measured row: figures by name, in the order of the columns.
#[derive(Debug, Default)]
pub struct Row(Vec<(&'static str, Value, String)>);

impl Row {
    /// Adds a rate per second.
    #[must_use]
    pub fn rate(self, name: &'static str, per_second: f64) -> Self {
        let text = if per_second >= 1e6 {
            format!("{:.2}M", per_second / 1e6)
        } else if per_second >= 1e3 {
            format!("{:.1}k", per_second / 1e3)
        } else {
            format!("{per_second:.0}")
        };
        self.add(name, per_second.round().into(), text)
    }

    /// Adds a number with two decimals.
    #[must_use]
    pub fn number(self, name: &'static str, number: f64) -> Self {
        self.add(name, ((number * 1e3).round() / 1e3).into(), format!("{number:.2}"))
    }

    /// Adds microseconds.
    #[must_use]
    pub fn micros(self, name: &'static str, nanos: u64) -> Self {
        #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
        let micros = nanos as f64 / 1e3;
        self.add(name, micros.into(), format!("{micros:.1}"))
    }

    /// Adds an amount of memory.
    #[must_use]
    pub fn mebibytes(self, name: &'static str, bytes: f64) -> Self {
        self.add(name, bytes.round().into(), format!("{:.1}", bytes / 1024.0 / 1024.0))
    }

    /// Adds a text.
    #[must_use]
    pub fn text(self, name: &'static str, text: impl Into<String>) -> Self {
        let text = text.into();
        self.add(name, text.clone().into(), text)
    }

    fn add(mut self, name: &'static str, value: Value, text: String) -> Self {
        self.0.push((name, value, text));
        self
    }
}

impl Report {
    /// An empty report of the rows whose name contains `filter`.
    #[must_use]
    pub fn new(filter: String, json: bool) -> Self {
        Self { filter, json, rows: 0, section: String::new() }
    }

    /// Whether the row is asked for.
    #[must_use]
    pub fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// Prints a row. Rows of one section share their columns.
    pub fn row(&mut self, section: &str, name: &str, row: &Row) {
        self.rows += 1;
        if self.json {
            let mut object = Map::from_iter([("section".to_owned(), section.into()), ("row".to_owned(), name.into())]);
            object.extend(row.0.iter().map(|(name, value, _)| ((*name).to_owned(), value.clone())));
            println!("{}", Value::Object(object));
            return;
        }
        let width = |title: &str| title.chars().count().max(9);
        if self.section != section {
            section.clone_into(&mut self.section);
            println!("\n{section}");
            print!("{:<40}", "");
            row.0.iter().for_each(|(title, _, _)| print!("  {title:>width$}", width = width(title)));
            println!();
        }
        print!("{name:<40}");
        row.0.iter().for_each(|(title, _, text)| print!("  {text:>width$}", width = width(title)));
        println!();
    }

    /// Fails when no row was asked for.
    #[must_use]
    pub fn finish(self) -> ExitCode {
        if self.rows == 0 {
            eprintln!("no row contains `{}`", self.filter);
            return ExitCode::FAILURE;
        }
        ExitCode::SUCCESS
    }
}
