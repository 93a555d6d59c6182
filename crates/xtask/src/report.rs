//! The closing table of `cargo xtask test`: what ran, how long, and what did not run and why.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// What a step that did not fail says.
pub(crate) enum Verdict {
    /// Everything was checked.
    Passed,
    /// Nothing was checked, for this reason.
    NotRun(String),
}

/// A table with one row for each step, in the order in which they are done.
pub(crate) struct Report {
    planned: Vec<&'static str>,
    rows: Vec<(&'static str, String, Duration)>,
}

impl Report {
    /// A table for these steps.
    pub(crate) fn new(planned: &[&'static str]) -> Self {
        Self { planned: planned.to_vec(), rows: Vec::new() }
    }

    /// Does a step and remembers how it went; its error names the step.
    pub(crate) fn step(&mut self, name: &'static str, work: impl FnOnce() -> Result<Verdict>) -> Result<()> {
        debug_assert!(self.planned.contains(&name), "{name} is not planned");
        println!("\n==> {name}");
        let since = Instant::now();
        let verdict = work();
        let said = match &verdict {
            Ok(Verdict::Passed) => "ok".to_owned(),
            Ok(Verdict::NotRun(reason)) => format!("not run: {reason}"),
            Err(_) => "FAILED".to_owned(),
        };
        if !matches!(verdict, Ok(Verdict::Passed)) {
            println!("{name}: {said}");
        }
        self.rows.push((name, said, since.elapsed()));
        verdict.map(drop).with_context(|| format!("step `{name}` failed"))
    }

    /// The table; steps that were not reached are in it.
    pub(crate) fn table(&self) -> String {
        let width = self.planned.iter().map(|name| name.len()).max().unwrap_or_default();
        let mut table = String::new();
        for &name in &self.planned {
            let row = self.rows.iter().find(|(done, ..)| *done == name);
            let (said, time) = match row {
                Some((_, said, time)) => (said.as_str(), format!("{:.1} s", time.as_secs_f64())),
                None => ("not reached", "-".to_owned()),
            };
            table.push_str(&format!("{name:<width$}  {time:>9}  {said}\n"));
        }
        let total: Duration = self.rows.iter().map(|(.., time)| *time).sum();
        table.push_str(&format!("{:<width$}  {:>7.1} s\n", "total", total.as_secs_f64()));
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_what_passed_failed_did_not_run_and_was_not_reached() {
        let mut report = Report::new(&["one", "two", "three", "four"]);
        report.step("one", || Ok(Verdict::Passed)).unwrap();
        report.step("two", || Ok(Verdict::NotRun("no tool".to_owned()))).unwrap();
        let error = report.step("three", || anyhow::bail!("broken")).unwrap_err();
        assert_eq!(format!("{error:#}"), "step `three` failed: broken");
        let table = report.table();
        let ends: Vec<_> = table.lines().map(|line| line.rsplit("  ").next().unwrap().trim()).collect();
        assert_eq!(ends[..4], ["ok", "not run: no tool", "FAILED", "not reached"]);
    }
}
