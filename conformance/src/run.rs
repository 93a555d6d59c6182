//! Runs cases against an endpoint.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anybroker_core::{Capabilities, Result, Timestamp};
use futures_util::StreamExt;
use futures_util::stream;
use rand::RngExt;
use tokio::sync::watch;

use crate::case::Breach;
use crate::checker::{self, Anomaly, Rules};
use crate::env::Env;
use crate::faults::Shrinking;
use crate::history::{Event, What};
use crate::report::{CaseReport, EndpointReport, Report, RunSettings};
use crate::{Case, Harness, Level, Outcome, cases, sweep};

/// Called with a case's report.
pub type Progress = Arc<dyn Fn(&CaseReport) + Send + Sync>;

/// Ends a run before its time: cases that run are given up, what they created is deleted, and the others are not begun.
#[derive(Debug, Clone)]
pub struct Stop(Arc<watch::Sender<bool>>);

impl Stop {
    /// Nothing is asked for yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    /// Asks the run to end.
    pub fn request(&self) {
        self.0.send_replace(true);
    }

    /// Whether somebody has asked.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        *self.0.borrow()
    }

    /// Ends when somebody asks.
    async fn requested(&self) {
        // The sender lives as long as `self`.
        let _ = self.0.subscribe().wait_for(|requested| *requested).await;
    }
}

impl Default for Stop {
    fn default() -> Self {
        Self::new()
    }
}

/// How the suite runs.
#[derive(Clone)]
#[non_exhaustive]
pub struct Options {
    /// Only cases whose name matches one of these; `*` stands for anything. Empty: all.
    pub filter: Vec<String>,
    /// Only cases of this level and below.
    pub level: Level,
    /// What everything random starts from; in the report, so that a run can be repeated.
    pub seed: u64,
    /// How many cases run at once. One where the clock is turned by hand.
    pub parallelism: usize,
    /// How long one case may take; one of [`Level::Long`] five times that.
    pub case_timeout: Duration,
    /// Which faults of a case's schedule happen, by their numbers from 1; `None` for all. A report names them.
    pub schedule: Option<Vec<usize>>,
    /// In how many more runs, at most, the schedule of a case that failed is shrunk to the faults that matter. 0 for none.
    pub shrink: usize,
    /// Called with each case's report as soon as there is one.
    pub progress: Option<Progress>,
    /// Ends the run before its time.
    pub stop: Stop,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            filter: Vec::new(),
            level: Level::Conformance,
            seed: rand::rng().random(),
            parallelism: 8,
            case_timeout: Duration::from_secs(180),
            schedule: None,
            shrink: 0,
            progress: None,
            stop: Stop::new(),
        }
    }
}

impl Options {
    /// Adds a name, or a pattern with `*`, of cases that are to run.
    #[must_use]
    pub fn with_filter(mut self, pattern: impl Into<String>) -> Self {
        self.filter.push(pattern.into());
        self
    }

    /// The highest level that is run.
    #[must_use]
    pub fn with_level(mut self, level: Level) -> Self {
        self.level = level;
        self
    }

    /// What everything random starts from.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// How many cases run at once.
    #[must_use]
    pub fn with_parallelism(mut self, parallelism: usize) -> Self {
        self.parallelism = parallelism;
        self
    }

    /// How long one case may take.
    #[must_use]
    pub fn with_case_timeout(mut self, timeout: Duration) -> Self {
        self.case_timeout = timeout;
        self
    }

    /// Lets only these faults of a case's schedule happen, by their numbers from 1: what a report has shrunk it to.
    #[must_use]
    pub fn with_schedule(mut self, numbers: impl IntoIterator<Item = usize>) -> Self {
        self.schedule = Some(numbers.into_iter().collect());
        self
    }

    /// Shrinks the schedule of a case that failed, in at most so many more runs.
    #[must_use]
    pub fn with_shrinking(mut self, runs: usize) -> Self {
        self.shrink = runs;
        self
    }

    /// Called with each case's report as soon as there is one.
    #[must_use]
    pub fn with_progress(mut self, progress: impl Fn(&CaseReport) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Lets the run be ended before its time. Cases that did not come to their end are "not run".
    #[must_use]
    pub fn with_stop(mut self, stop: Stop) -> Self {
        self.stop = stop;
        self
    }

    fn chooses(&self, case: &Case) -> bool {
        case.level <= self.level
            && (self.filter.is_empty() || self.filter.iter().any(|pattern| case.is_chosen_by(pattern)))
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("filter", &self.filter)
            .field("level", &self.level)
            .field("seed", &self.seed)
            .field("parallelism", &self.parallelism)
            .finish_non_exhaustive()
    }
}

/// Runs the cases that the options choose, and reports on each, in the order of the list.
///
/// # Errors
/// What the first connect says: an endpoint that cannot be reached has no report.
pub async fn run(harness: Arc<dyn Harness>, options: Options) -> Result<Report> {
    let started = Timestamp::now();
    let begin = Instant::now();
    let bus = harness.connect().await?;
    let record = Arc::new(bus.capabilities().clone());
    let endpoint = EndpointReport::of(harness.as_ref(), &bus);
    let settings = RunSettings::of(harness.as_ref(), &options);
    bus.close(harness.patience()).await?;

    let run_id = sweep::run_id();
    let chosen: Vec<&'static Case> = cases().iter().filter(|case| options.chooses(case)).collect();
    let parallelism = if harness.clock().is_some() { 1 } else { options.parallelism.max(1) };
    let run_one = |(index, case): (usize, &'static Case)| {
        let (harness, record, options) = (Arc::clone(&harness), Arc::clone(&record), options.clone());
        let scope = format!("{run_id}.{index}");
        async move {
            let env = |scope, only| {
                let env = Env::new(Arc::clone(&harness), Arc::clone(&record), scope, seed_of(case, options.seed));
                Arc::new(env.with_schedule(only))
            };
            let whole = env(scope.clone(), options.schedule.clone());
            let timeout = options.case_timeout * if case.level == Level::Long { 5 } else { 1 };
            let mut report = run_case(case, whole, timeout, &options.stop).await;
            if let Some(schedule) = &report.schedule {
                let mut shrinking = Shrinking::new(schedule, options.shrink);
                let mut number = 0;
                while let Some(faults) = shrinking.next().filter(|_| !options.stop.is_requested()) {
                    number += 1;
                    let fewer = env(format!("{scope}.{number}"), Some(faults));
                    let again = run_case(case, fewer, timeout, &options.stop).await;
                    shrinking.tell(report.fails_like(&again));
                }
                let shrunk = shrinking.end();
                report.schedule.iter_mut().for_each(|schedule| schedule.shrunk.clone_from(&shrunk));
            }
            if let Some(progress) = &options.progress {
                progress(&report);
            }
            (index, report)
        }
    };
    // Those that disturb others come last, one by one. So do those that share the one address that a proxy may listen on.
    let has_one_line = harness.routes().is_ok_and(|routes| routes.iter().any(|route| route.listen.is_some()));
    let is_alone = |case: &Case| case.alone || has_one_line && case.level == Level::Reliability;
    let (alone, together): (Vec<_>, Vec<_>) = chosen.into_iter().enumerate().partition(|(_, case)| is_alone(case));
    let mut reports: Vec<_> = stream::iter(together).map(&run_one).buffered(parallelism).collect().await;
    for case in alone {
        reports.push(run_one(case).await);
    }
    reports.sort_by_key(|(index, _)| *index);
    let reports = reports.into_iter().map(|(_, report)| report).collect();
    Ok(Report::new(endpoint, &record, settings, started, begin.elapsed(), reports))
}

/// The case's own seed: the same whichever other cases run.
fn seed_of(case: &Case, seed: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (case.name, seed).hash(&mut hasher);
    hasher.finish()
}

async fn run_case(case: &'static Case, env: Arc<Env>, timeout: Duration, stop: &Stop) -> CaseReport {
    let begin = Instant::now();
    let refused = refused(case, &env.record);
    let mut given_up = false;
    let proof = if stop.is_requested() {
        Err(interrupted())
    } else {
        let env = Arc::clone(&env);
        let mut task = tokio::spawn(async move {
            match refused {
                Some(need) => (need.refusal)(&env).await,
                None => (case.run)(&env).await,
            }
        });
        let proof = tokio::select! {
            biased;
            ended = &mut task => match ended {
                Ok(proof) => proof,
                Err(panic) => Err(Breach::Failed(panic_text(panic))),
            },
            () = tokio::time::sleep(timeout) => {
                Err(Breach::Failed(format!("hang: the case did not end within {timeout:?}")))
            }
            () = stop.requested() => Err(interrupted()),
        };
        if !task.is_finished() {
            given_up = true;
            task.abort();
            // Until it has let go of everything, it could create something after the deletion of what it created.
            let _ = tokio::time::timeout(Duration::from_secs(5), task).await;
        }
        proof
    };
    let proof = match env.restore().await {
        Ok(()) => proof,
        Err(left) => Err(Breach::Failed(match proof {
            Ok(()) => left,
            Err(Breach::Failed(why) | Breach::Inconclusive(why) | Breach::NotRun(why)) => format!("{why}; {left}"),
        })),
    };
    let (events, rules) = (env.history.events(), Rules::of(&env.record));
    // Not here: other cases go on in this task, and what they wait for has its time.
    let checked = tokio::task::spawn_blocking(move || {
        let checked = checker::check(&events, rules);
        (events, checked)
    });
    let (events, (anomalies, counts)) = checked.await.expect("the checker does not panic");
    let lost = |event: &Event| matches!(event.what, What::Degraded { .. } | What::LaneLost { .. });
    let proof = match proof {
        Err(Breach::Failed(why)) if env.harness.is_disturbed() && anomalies.is_empty() && events.iter().any(lost) => {
            Err(Breach::NotRun(format!(
                "a connection or lane was lost meanwhile, as this endpoint is set up to: {why}"
            )))
        }
        proof => proof,
    };
    let is_of_faults = case.level == Level::Reliability || counts.faults > 0;
    let proof = match proof {
        Ok(()) if refused.is_none() && is_of_faults && counts.faults_met == 0 => {
            Err(Breach::Inconclusive(format!("none of {} faults met an operation in flight", counts.faults)))
        }
        proof => proof,
    };
    let proof = match (env.schedule.missing(), refused) {
        (Some(missing), None) => Err(Breach::NotRun(missing)),
        _ => proof,
    };
    let (mut outcome, mut detail) = conclude(proof, refused.map(|need| need.name), &anomalies);
    if let Err(error) = env.clean_up(given_up).await
        && outcome == Outcome::Pass
    {
        (outcome, detail) = (Outcome::Fail, format!("cleaning up: {error:?}"));
    }
    let history = (!matches!(outcome, Outcome::Pass | Outcome::RefusedAndVerified | Outcome::NotRun))
        .then(|| env.history.to_json_lines());
    let mut report = CaseReport::new(case, outcome, detail, begin.elapsed(), counts, anomalies, history);
    report.schedule = env.schedule.report().filter(|_| outcome == Outcome::Fail);
    report
}

fn interrupted() -> Breach {
    Breach::NotRun("the run was interrupted".into())
}

/// The first of the case's needs that the endpoint refuses.
fn refused(case: &Case, record: &Capabilities) -> Option<&'static crate::Need> {
    case.needs.iter().find(|need| !(need.given)(record))
}

fn conclude(proof: Result<(), Breach>, refused: Option<&str>, anomalies: &[Anomaly]) -> (Outcome, String) {
    let found: Vec<String> = anomalies
        .iter()
        .take(5)
        .map(|anomaly| {
            format!("{} in group `{}`: message {}: {}", anomaly.name, anomaly.group, anomaly.id, anomaly.detail)
        })
        .collect();
    let more = anomalies.len().saturating_sub(5);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    let history =
        if found.is_empty() { String::new() } else { format!("the history shows {}{more}", found.join("; ")) };
    match proof {
        Ok(()) if anomalies.is_empty() => match refused {
            Some(need) => (Outcome::RefusedAndVerified, format!("the endpoint refuses {need}")),
            None => (Outcome::Pass, String::new()),
        },
        Ok(()) => (Outcome::Fail, history),
        Err(Breach::Failed(why)) if anomalies.is_empty() => (Outcome::Fail, why),
        Err(Breach::Failed(why)) => (Outcome::Fail, format!("{why}; {history}")),
        Err(Breach::Inconclusive(why)) if anomalies.is_empty() => (Outcome::Inconclusive, why),
        Err(Breach::Inconclusive(why)) => (Outcome::Fail, format!("{why}; {history}")),
        Err(Breach::NotRun(why)) => (Outcome::NotRun, why),
    }
}

fn panic_text(panic: tokio::task::JoinError) -> String {
    match panic.try_into_panic() {
        Ok(payload) => {
            let text = payload
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| payload.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            format!("panic: {text}")
        }
        Err(other) => other.to_string(),
    }
}
