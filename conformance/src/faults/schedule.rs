//! Which faults of a case's schedule happen, and how few of them make it fail.

use std::fmt::Write as _;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// The faults of one run of a case: those that its seed draws, and of these the ones that are to happen.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    /// Numbers, from 1; all where there are none.
    only: Option<Vec<usize>>,
    drawn: Mutex<Vec<String>>,
}

impl Schedule {
    pub(crate) fn only(numbers: Option<Vec<usize>>) -> Self {
        Self { only: numbers, drawn: Mutex::default() }
    }

    /// The next fault of the case has been drawn; whether it is to happen.
    pub(crate) fn draw(&self, what: String) -> bool {
        let mut drawn = self.drawn.lock();
        drawn.push(what);
        self.only.as_ref().is_none_or(|only| only.contains(&drawn.len()))
    }

    /// What is chosen and is not there, once all are drawn.
    pub(crate) fn missing(&self) -> Option<String> {
        let (only, drawn) = (self.only.as_ref()?, self.drawn.lock().len());
        let missing = only.iter().find(|number| !(1..=drawn).contains(number))?;
        Some(format!("its schedule has {drawn} faults, and number {missing} was chosen"))
    }

    /// `None` of a case without a schedule.
    pub(crate) fn report(&self) -> Option<ScheduleReport> {
        let faults = self.drawn.lock().clone();
        (!faults.is_empty()).then(|| ScheduleReport { faults, only: self.only.clone(), shrunk: None })
    }
}

/// The faults of a case that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ScheduleReport {
    /// All that the seed draws, in their order.
    pub faults: Vec<String>,
    /// The numbers, from 1, of those that were to happen, where not all were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only: Option<Vec<usize>>,
    /// What it could be shrunk to, where that was tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shrunk: Option<Shrunk>,
}

/// What more runs of a case that failed have shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Shrunk {
    /// The numbers of the fewest faults with which it failed again; none where it did not fail again.
    pub faults: Vec<usize>,
    /// How many more runs there were.
    pub runs: usize,
    /// In how many of them it failed in the same way.
    pub failed: usize,
    /// Whether runs without any one of `faults` passed; otherwise there were no more runs.
    pub is_minimal: bool,
}

impl ScheduleReport {
    /// For people, and how to run it again.
    pub(crate) fn text(&self, case: &str, seed: u64) -> String {
        let is_to_happen = |number: &usize| self.only.as_ref().is_none_or(|only| only.contains(number));
        let named: Vec<String> = (1..)
            .zip(&self.faults)
            .filter(|(number, _)| is_to_happen(number))
            .map(|(number, fault)| format!("({number}) {fault}"))
            .collect();
        let mut text = format!("schedule: {}", named.join("; "));
        let mut again = self.only.clone();
        if let Some(Shrunk { faults, runs, failed, is_minimal }) = &self.shrunk {
            // Writing to a String cannot fail.
            let _ = if faults.is_empty() {
                write!(text, "\nnot shrunk: it did not fail again in {runs} more runs of the whole schedule")
            } else {
                again = Some(faults.clone());
                let left = if *is_minimal { "" } else { " (perhaps to fewer, in more runs)" };
                write!(text, "\nshrunk to {}{left}: it failed in {failed} of {runs} more runs", list(faults))
            };
        }
        let only = again.map_or(String::new(), |again| format!(" --schedule {}", list(&again)));
        let _ = write!(text, "\nagain: --case {case} --seed {seed}{only}");
        text
    }
}

fn list(numbers: &[usize]) -> String {
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// How often the whole schedule is run again before it counts as one that does not fail again.
const AGAIN: usize = 3;
/// How often fewer faults are tried: what depends on time does not fail every time.
const TRIES: usize = 2;

/// Looks for the fewest faults with which a case fails (delta debugging: halves are left out, then smaller parts, then single
/// ones). It is asked which ones to try [next](Self::next), and [told](Self::tell) what became of it.
#[derive(Debug)]
pub(crate) struct Shrinking {
    kept: Vec<usize>,
    /// Whether it has failed again at all.
    is_seen: bool,
    /// How many are left out together, and from where.
    part: usize,
    at: usize,
    /// Something was left out since the single ones were begun.
    has_shrunk: bool,
    tries: usize,
    is_done: bool,
    left: usize,
    runs: usize,
    failed: usize,
}

impl Shrinking {
    /// In at most so many runs.
    pub(crate) fn new(schedule: &ScheduleReport, runs: usize) -> Self {
        let kept = schedule.only.clone().unwrap_or_else(|| (1..=schedule.faults.len()).collect());
        let part = kept.len().div_ceil(2);
        Self {
            is_done: kept.len() < 2,
            kept,
            is_seen: false,
            part,
            at: 0,
            has_shrunk: false,
            tries: 0,
            left: runs,
            runs: 0,
            failed: 0,
        }
    }

    /// The faults to run the case with.
    pub(crate) fn next(&self) -> Option<Vec<usize>> {
        if self.is_done || self.left == 0 {
            return None;
        }
        Some(if self.is_seen { self.candidate() } else { self.kept.clone() })
    }

    fn candidate(&self) -> Vec<usize> {
        let left_out = self.at..self.at + self.part;
        let kept = self.kept.iter().enumerate().filter(|(place, _)| !left_out.contains(place));
        kept.map(|(_, number)| *number).collect()
    }

    /// Whether the case has failed with those, as before.
    pub(crate) fn tell(&mut self, failed: bool) {
        (self.left, self.runs, self.failed) = (self.left - 1, self.runs + 1, self.failed + usize::from(failed));
        self.tries += 1;
        if !self.is_seen {
            (self.is_seen, self.is_done) = (failed, !failed && self.tries == AGAIN);
            if failed {
                self.tries = 0;
            }
        } else if failed {
            (self.kept, self.tries, self.has_shrunk) = (self.candidate(), 0, true);
            self.part = self.part.min(self.kept.len().div_ceil(2));
            self.is_done = self.kept.len() == 1;
            self.turn();
        } else if self.tries == TRIES {
            self.tries = 0;
            self.at += self.part;
            self.turn();
        }
    }

    /// At the end: smaller parts, or once more, as long as that changed something.
    fn turn(&mut self) {
        if self.at < self.kept.len() {
            return;
        }
        self.at = 0;
        if self.part > 1 {
            (self.part, self.has_shrunk) = (self.part.div_ceil(2), false);
        } else if !std::mem::take(&mut self.has_shrunk) {
            self.is_done = true;
        }
    }

    /// What was found; `None` where nothing was tried.
    pub(crate) fn end(self) -> Option<Shrunk> {
        let Self { kept, is_seen, runs, failed, is_done, .. } = self;
        let is_minimal = is_seen && is_done;
        (runs > 0).then(|| Shrunk { faults: if is_seen { kept } else { Vec::new() }, runs, failed, is_minimal })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(count: usize) -> ScheduleReport {
        let schedule = Schedule::default();
        assert_eq!(schedule.report(), None);
        for number in 1..=count {
            assert!(schedule.draw(format!("fault {number}")));
        }
        schedule.report().unwrap()
    }

    /// Shrinks it against what fails, and counts the runs of each.
    fn shrunk(count: usize, runs: usize, mut fails: impl FnMut(&[usize]) -> bool) -> Shrunk {
        let mut shrinking = Shrinking::new(&schedule(count), runs);
        while let Some(faults) = shrinking.next() {
            assert!(!faults.is_empty(), "without a fault nothing is tried");
            shrinking.tell(fails(&faults));
        }
        shrinking.end().unwrap()
    }

    #[test]
    fn any_one_or_two_faults_that_matter_are_found() {
        for count in 2..=9 {
            for one in 1..=count {
                let found = shrunk(count, 100, |faults| faults.contains(&one));
                assert_eq!((found.faults, found.is_minimal), (vec![one], true), "of {count}");
                for other in one + 1..=count {
                    let found = shrunk(count, 100, |faults| faults.contains(&one) && faults.contains(&other));
                    assert_eq!((found.faults, found.is_minimal), (vec![one, other], true), "of {count}");
                }
            }
        }
    }

    #[test]
    fn what_fails_only_with_all_stays_whole_and_every_single_one_was_left_out() {
        let mut tried = Vec::new();
        let found = shrunk(5, 100, |faults| {
            tried.push(faults.to_vec());
            faults.len() == 5
        });
        assert_eq!((found.faults, found.failed, found.is_minimal), (vec![1, 2, 3, 4, 5], 1, true));
        for left_out in 1..=5 {
            let without: Vec<usize> = (1..=5).filter(|number| *number != left_out).collect();
            assert!(tried.contains(&without), "{without:?}");
        }
    }

    #[test]
    fn what_does_not_fail_again_is_not_shrunk() {
        let found = shrunk(8, 100, |faults| {
            assert_eq!(faults.len(), 8);
            false
        });
        assert_eq!(found, Shrunk { faults: vec![], runs: AGAIN, failed: 0, is_minimal: false });
    }

    #[test]
    fn what_fails_every_other_time_is_shrunk_all_the_same() {
        let mut runs = 0;
        let found = shrunk(8, 100, |faults| {
            runs += 1;
            faults.contains(&3) && runs % 2 == 0
        });
        assert_eq!(found.faults, [3]);
    }

    #[test]
    fn it_ends_with_the_runs_that_it_was_given() {
        let found = shrunk(8, 4, |faults| faults.contains(&1));
        assert_eq!(found, Shrunk { faults: vec![1, 2, 3, 4], runs: 4, failed: 2, is_minimal: false });
    }

    #[test]
    fn a_chosen_part_keeps_the_numbers_of_the_whole() {
        let part = Schedule::only(Some(vec![2, 4]));
        let happens: Vec<bool> = (1..=4).map(|number| part.draw(format!("fault {number}"))).collect();
        assert_eq!(happens, [false, true, false, true]);
        assert_eq!(part.missing(), None);
        let beyond = Schedule::only(Some(vec![1]));
        assert_eq!(beyond.missing().unwrap(), "its schedule has 0 faults, and number 1 was chosen");
        let mut report = part.report().unwrap();
        assert_eq!(
            report.text("faults/x", 7),
            "schedule: (2) fault 2; (4) fault 4\nagain: --case faults/x --seed 7 --schedule 2,4"
        );
        let mut shrinking = Shrinking::new(&report, 10);
        assert_eq!(shrinking.next().unwrap(), [2, 4]);
        shrinking.tell(true);
        assert_eq!(shrinking.next().unwrap(), [4]);
        shrinking.tell(true);
        report.shrunk = shrinking.end();
        let text = report.text("faults/x", 7);
        assert!(
            text.ends_with("shrunk to 4: it failed in 2 of 2 more runs\nagain: --case faults/x --seed 7 --schedule 4")
        );
    }
}
