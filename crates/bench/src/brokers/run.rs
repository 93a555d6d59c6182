//! The rounds: each side in turn, so that whatever else the machine does meets all of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anybroker_core::{Bus, TopologySpec};
use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::job::{Job, Measured, Side, Task};
use super::machine::{self, Machine};
use super::plan::{LARGE, PLANS, Plan, SMALL};
use super::{adapter, child, results, statistics};

const GROUP: &str = "bench";
/// How long the open loop runs.
const LOOP: f64 = 2.0;
/// The worker, and what is written by hand, run in every so manieth round.
pub(crate) const SOME_EVERY: usize = 3;

/// What the command line says.
pub(crate) struct Options {
    pub(crate) names: Vec<String>,
    pub(crate) pairs: usize,
    pub(crate) other_pairs: usize,
    pub(crate) is_quick: bool,
    pub(crate) rows: String,
    pub(crate) limit: Duration,
    pub(crate) out: Option<PathBuf>,
    pub(crate) servers: Vec<String>,
}

/// The figures of one broker.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) name: String,
    pub(crate) server: String,
    pub(crate) client: String,
    pub(crate) machine: Machine,
    pub(crate) rows: Vec<Row>,
}

/// The measurements of one row, side by side: the same index is the same round.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) task: Task,
    pub(crate) size: usize,
    pub(crate) count: usize,
    /// Messages on their way at once.
    #[serde(default)]
    pub(crate) window: usize,
    pub(crate) rate: f64,
    pub(crate) sides: BTreeMap<Side, Vec<Measured>>,
}

impl Row {
    fn new(name: String, task: Task, size: usize, count: usize, window: usize) -> Self {
        Self { name, task, size, count, window, rate: 0.0, sides: BTreeMap::new() }
    }

    pub(crate) fn side(&self, side: Side) -> &[Measured] {
        self.sides.get(&side).map_or(&[], Vec::as_slice)
    }

    fn add(&mut self, side: Side, mut measured: Measured) {
        let measurements = self.sides.entry(side).or_default();
        if !measurements.is_empty() {
            // Once is enough.
            measured.settings.clear();
        }
        measurements.push(measured);
    }
}

/// Measures what the options say.
pub(crate) async fn run(options: &Options) -> Result<()> {
    let begun = Instant::now();
    for name in &options.names {
        ensure!(PLANS.iter().any(|plan| plan.name == name), "no benchmark is called {name}");
    }
    let mut is_any = false;
    for plan in PLANS.iter().filter(|plan| options.names.is_empty() || options.names.iter().any(|it| it == plan.name)) {
        let variable = format!("ANYBROKER_TEST_{}_URL", plan.name.to_uppercase());
        let Ok(url) = std::env::var(&variable) else {
            ensure!(options.names.is_empty(), "{variable} is not set; bring the broker up");
            eprintln!("{}: not run, because {variable} is not set", plan.name);
            continue;
        };
        is_any = true;
        let mut bench = Bench::connect(plan, &url, options, begun).await?;
        let measured = bench.rows().await;
        // What was measured before something failed is kept.
        println!("{}", results::section(plan, &bench.figures));
        if let Some(out) = &options.out {
            results::write(out, &bench.figures)?;
        }
        measured?;
    }
    ensure!(is_any, "no broker is up: eval \"$(cargo xtask brokers up)\"");
    Ok(())
}

struct Bench<'a> {
    plan: &'a Plan,
    options: &'a Options,
    begun: Instant,
    url: String,
    bus: Bus,
    figures: Figures,
    number: usize,
}

/// Where one side works in a round.
#[derive(Clone, Default)]
struct Place {
    destination: String,
    physical: String,
    physical_group: String,
}

impl<'a> Bench<'a> {
    async fn connect(plan: &'a Plan, url: &str, options: &'a Options, begun: Instant) -> Result<Self> {
        let machine = Machine::look();
        let joint = if url.contains('?') { "&" } else { "?" };
        let url = if plan.query.is_empty() { url.to_owned() } else { format!("{url}{joint}{}", plan.query) };
        let bus = adapter::connect(&url).await?;
        let prefix = format!("{}=", plan.name);
        let told = options.servers.iter().find_map(|server| server.strip_prefix(&prefix));
        let server = told.map_or_else(|| bus.endpoint().server.clone(), ToOwned::to_owned);
        let client = machine::versions(plan.clients);
        let figures = Figures { name: plan.name.into(), server, client, machine, rows: Vec::new() };
        Ok(Self { plan, options, begun, url, bus, figures, number: 0 })
    }

    fn wants(&self, row: &str) -> bool {
        row.contains(&self.options.rows)
    }

    async fn rows(&mut self) -> Result<()> {
        let Plan { small, large, .. } = *self.plan;
        let shrink = |count: usize| if self.options.is_quick { (count / 10).next_multiple_of(100) } else { count };
        let (small, large) = (shrink(small), shrink(large));
        self.throughput(SMALL, small, self.options.pairs).await?;
        if let Some(window) = self.plan.small_window {
            let name = format!("publish {}, window {window}", text(SMALL));
            let rows = vec![Row::new(name, Task::Publish, SMALL, small, window)];
            self.rounds(rows, self.options.other_pairs).await?;
        }
        self.latency(SMALL).await?;
        self.throughput(LARGE, large, self.options.other_pairs).await?;
        self.latency(LARGE).await
    }

    fn is_over(&self) -> bool {
        let is_over = self.begun.elapsed() > self.options.limit;
        if is_over {
            eprintln!("{}: no further round after {:?}", self.plan.name, self.options.limit);
        }
        is_over
    }

    /// Publishing and consuming, of what was published.
    async fn throughput(&mut self, size: usize, count: usize, pairs: usize) -> Result<()> {
        let window = self.plan.window_of(size);
        let publish = Row::new(format!("publish {}", text(size)), Task::Publish, size, count, window);
        // One more was published before the clock ran.
        let consume = Row::new(format!("consume {}", text(size)), Task::Consume, size, count + 1, window);
        self.rounds(vec![publish, consume], pairs).await
    }

    /// The rounds of rows that follow one another.
    async fn rounds(&mut self, mut rows: Vec<Row>, pairs: usize) -> Result<()> {
        if pairs == 0 || !rows.iter().any(|row| self.wants(&row.name)) {
            return Ok(());
        }
        let mut places: BTreeMap<Side, Place> = BTreeMap::new();
        let mut measured = Ok(());
        // Round 0 warms up.
        for round in 0..=pairs {
            if self.is_over() {
                break;
            }
            measured = self.round(round, &mut rows, &mut places).await;
            if measured.is_err() {
                break;
            }
            eprintln!("{}: {}, round {round} of {pairs}", self.plan.name, rows[0].name);
        }
        self.figures.rows.extend(rows.into_iter().filter(|row| !row.sides.is_empty()));
        for place in places.into_values() {
            self.bus.delete(place.destination.as_str(), None).await?;
        }
        measured
    }

    async fn round(&mut self, round: usize, rows: &mut [Row], places: &mut BTreeMap<Side, Place>) -> Result<()> {
        let mut sides = vec![Side::Bare, Side::Adapter, Side::BareAgain];
        if round % SOME_EVERY == 1 {
            if rows.iter().any(|row| row.task == Task::Consume) {
                sides.push(Side::Worker);
            }
            if self.plan.has_by_hand {
                sides.push(Side::ByHand);
            }
        }
        // Nobody is always first, or always behind the same one.
        sides.rotate_left(round % 3);
        if round / 3 % 2 == 1 {
            sides.reverse();
        }
        for side in &sides {
            if !places.contains_key(side) {
                places.insert(*side, self.place().await?);
            }
        }
        for row in rows.iter_mut() {
            for side in &sides {
                let by = if (*side, row.task) == (Side::Worker, Task::Publish) { Side::Adapter } else { *side };
                let measured = child::measure(&self.job(row, by, &places[side], row.rate)).await?;
                if round > 0 && by == *side {
                    row.add(*side, measured);
                }
            }
        }
        for side in &sides {
            if self.plan.has_lag && rows.iter().any(|row| row.task == Task::Consume) {
                self.check_nothing_is_left(&places[side]).await?;
            }
            if self.plan.is_fresh
                && let Some(place) = places.remove(side)
            {
                self.bus.delete(place.destination.as_str(), None).await?;
            }
        }
        Ok(())
    }

    /// Whether the broker, too, has everything settled: a message that came twice would have stood for another.
    async fn check_nothing_is_left(&self, place: &Place) -> Result<()> {
        let lag = self.bus.lag(place.destination.as_str(), GROUP).await?;
        if lag.total().is_some_and(|left| left > 0) {
            bail!("{}: not everything is settled: {lag:?}", self.plan.name);
        }
        Ok(())
    }

    /// An open loop at half of what the bare client published in the row before.
    async fn latency(&mut self, size: usize) -> Result<()> {
        let name = format!("latency {}", text(size));
        let pairs = self.options.other_pairs;
        let publish = format!("publish {}", text(size));
        let Some(fastest) = self.figures.rows.iter().find(|row| row.name == publish) else { return Ok(()) };
        let rate = 0.5 / statistics::median(fastest.side(Side::Bare).iter().map(Measured::each));
        if pairs == 0 || !rate.is_finite() || !self.wants(&name) {
            return Ok(());
        }
        let mut row = Row { rate, ..Row::new(name, Task::Latency, size, 0, self.plan.window_of(size)) };
        for round in 0..pairs {
            if self.is_over() {
                break;
            }
            let mut sides = vec![Side::Bare, Side::Adapter, Side::BareAgain];
            sides.rotate_left(round % 3);
            for side in sides {
                let place = self.place().await?;
                let measured = child::measure(&self.job(&row, side, &place, rate)).await?;
                row.add(side, measured);
                self.bus.delete(place.destination.as_str(), None).await?;
            }
            eprintln!("{}: {}, round {} of {pairs}", self.plan.name, row.name, round + 1);
        }
        self.figures.rows.push(row);
        Ok(())
    }

    /// A new destination with its group. The adapter declares it for both sides: at the broker they find the same.
    async fn place(&mut self) -> Result<Place> {
        self.number += 1;
        let destination = format!("bench.{}.{}", uuid::Uuid::now_v7().simple(), self.number);
        self.bus.declare(&TopologySpec::group(destination.as_str(), GROUP)).await?;
        let described = self.bus.describe(destination.as_str()).await?;
        let group = described.groups.into_iter().find(|group| group.group.as_str() == GROUP);
        let physical_group = group.context("the group that was declared is there")?.physical;
        Ok(Place { destination, physical: described.physical, physical_group })
    }

    fn job(&self, row: &Row, side: Side, place: &Place, rate: f64) -> Job {
        let Plan { large_window, batch, in_flight, receive, .. } = *self.plan;
        Job {
            broker: self.plan.name.into(),
            task: row.task,
            side,
            url: self.url.clone(),
            destination: place.destination.clone(),
            group: GROUP.into(),
            physical: place.physical.clone(),
            physical_group: place.physical_group.clone(),
            size: row.size,
            count: row.count,
            window: row.window,
            batch: if row.task == Task::Consume { receive } else { batch },
            in_flight: if row.size == SMALL { in_flight } else { in_flight.min(large_window) },
            rate,
            seconds: if self.options.is_quick { 1.0 } else { LOOP },
        }
    }
}

fn text(size: usize) -> String {
    if size < 1_024 { format!("{size} B") } else { format!("{} KiB", size / 1_024) }
}
