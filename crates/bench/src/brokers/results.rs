//! What is written down: the figures as JSON beside RESULTS.md, and their tables within it. What is written by hand there
//! stays.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::job::{Measured, Side, Task};
use super::plan::{PLANS, Plan};
use super::run::{Figures, Row};
use super::statistics::{Ratio, median};

const BEGIN: &str = "<!-- figures:begin -->";
const END: &str = "<!-- figures:end -->";

/// Keeps the figures of a broker, and renders all that are kept.
pub(crate) fn write(out: &Path, figures: &Figures) -> Result<()> {
    let folder = out.join("figures");
    std::fs::create_dir_all(&folder)?;
    let file = folder.join(format!("{}.json", figures.name));
    std::fs::write(&file, serde_json::to_string(figures)? + "\n")?;
    let mut tables = String::new();
    for plan in PLANS {
        let file = folder.join(format!("{}.json", plan.name));
        if let Ok(text) = std::fs::read_to_string(&file) {
            let figures = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
            tables.push_str(&section(plan, &figures));
        }
    }
    let path = out.join("RESULTS.md");
    let before = std::fs::read_to_string(&path).unwrap_or_else(|_| format!("# Results\n\n{BEGIN}\n{END}\n"));
    let (head, rest) = before.split_once(BEGIN).context("RESULTS.md has no place for figures")?;
    let (_, tail) = rest.split_once(END).context("RESULTS.md has no end of figures")?;
    std::fs::write(&path, format!("{head}{BEGIN}\n\n{}\n\n{END}{tail}", tables.trim()))?;
    Ok(())
}

/// The tables of one broker.
pub(crate) fn section(plan: &Plan, figures: &Figures) -> String {
    let machine = &figures.machine;
    let mut text = format!("### {}\n\n", plan.title);
    let _ = writeln!(
        text,
        "{}; {}. {} cores ({}), {:.0} GiB, Linux {}, broker on the same machine. {}, load {} at the start.\n",
        figures.server,
        figures.client,
        machine.cores,
        machine.processor,
        machine.memory_gib,
        machine.kernel,
        machine.date,
        machine.load
    );
    let rows = |task| figures.rows.iter().filter(move |row| row.task == task);
    if rows(Task::Publish).chain(rows(Task::Consume)).next().is_some() {
        text.push_str(
            "| | pairs | bare msg/s | adapter msg/s | time, adapter / bare | A/A | CPU, adapter / bare | CPU µs/msg, bare · \
             adapter | peak MiB, bare · adapter |\n|---|---|---|---|---|---|---|---|---|\n",
        );
    }
    rows(Task::Publish).chain(rows(Task::Consume)).for_each(|row| throughput(&mut text, row));
    if rows(Task::Latency).next().is_some() {
        text.push_str(
            "\n| open loop | pairs | msg/s | p50 ms, bare · adapter | p99 ms, bare · adapter | p50, adapter / bare | p99, \
             adapter / bare | p99, A/A |\n|---|---|---|---|---|---|---|---|\n",
        );
    }
    rows(Task::Latency).for_each(|row| latency(&mut text, row));
    let _ = writeln!(text, "\n- Publish: {}.\n- Consume: {}.", plan.publish_guarantee, plan.ack_guarantee);
    for row in figures.rows.iter().filter(|row| row.size == super::plan::SMALL) {
        for (side, name) in [(Side::Bare, "bare"), (Side::Adapter, "adapter"), (Side::ByHand, "by hand")] {
            if let Some(measured) = row.side(side).first() {
                let _ = writeln!(text, "- {}, {name}: {}.", row.name, measured.settings);
            }
        }
    }
    text.push('\n');
    text
}

fn throughput(text: &mut String, row: &Row) {
    let (bare, adapter) = (row.side(Side::Bare), row.side(Side::Adapter));
    let cell = |ratio: Option<Ratio>| ratio.map_or_else(|| "–".to_owned(), |ratio| ratio.to_string());
    let rate = |side: &[Measured]| thousands(1.0 / median(side.iter().map(Measured::each)));
    let micros = |side: &[Measured]| median(side.iter().map(Measured::processor_each)) * 1e6;
    let peak = |side: &[Measured]| median(side.iter().map(|one| one.peak_mib));
    let _ = writeln!(
        text,
        "| {} | {} | {} | {} | **{}** | {} | {} | {:.2} · {:.2} | {:.0} · {:.0} |",
        row.name,
        adapter.len(),
        rate(bare),
        rate(adapter),
        cell(over_bare(row, Side::Adapter, Measured::each)),
        cell(again(row, Measured::each)),
        cell(over_bare(row, Side::Adapter, Measured::processor_each)),
        micros(bare),
        micros(adapter),
        peak(bare),
        peak(adapter)
    );
    for (side, name) in [(Side::Worker, "worker"), (Side::ByHand, "protocol by hand")] {
        let own = row.side(side);
        if own.is_empty() {
            continue;
        }
        let _ = writeln!(
            text,
            "| {}, {name} | {} | {} | {} | {} | | {} | {:.2} · {:.2} | {:.0} · {:.0} |",
            row.name,
            own.len(),
            rate(bare),
            rate(own),
            cell(over_bare(row, side, Measured::each)),
            cell(over_bare(row, side, Measured::processor_each)),
            micros(bare),
            micros(own),
            peak(bare),
            peak(own)
        );
    }
    let allocations = |side: &[Measured]| median(side.iter().map(|one| precise(one.allocations) / precise(one.count)));
    if allocations(adapter) > 0.0 {
        let _ = writeln!(text, "| allocations | | {:.2} | {:.2} | | | | | |", allocations(bare), allocations(adapter));
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn precise(count: usize) -> f64 {
    count as f64
}

fn latency(text: &mut String, row: &Row) {
    let (bare, adapter) = (row.side(Side::Bare), row.side(Side::Adapter));
    let cell = |ratio: Option<Ratio>| ratio.map_or_else(|| "–".to_owned(), |ratio| ratio.to_string());
    let of = |side: &[Measured], figure: fn(&Measured) -> f64| median(side.iter().map(figure));
    let _ = writeln!(
        text,
        "| {} | {} | {} | {:.2} · {:.2} | {:.2} · {:.2} | {} | {} | {} |",
        row.name,
        adapter.len(),
        thousands(row.rate),
        of(bare, |one| one.p50),
        of(adapter, |one| one.p50),
        of(bare, |one| one.p99),
        of(adapter, |one| one.p99),
        cell(over_bare(row, Side::Adapter, |one| one.p50)),
        cell(over_bare(row, Side::Adapter, |one| one.p99)),
        cell(again(row, |one| one.p99))
    );
}

/// A side over the bare client: in each round over the geometric mean of the two bare runs. The worker and what is written
/// by hand run in some rounds only, the first and then every third.
fn over_bare(row: &Row, side: Side, figure: impl Fn(&Measured) -> f64) -> Option<Ratio> {
    let bare = row.side(Side::Bare).iter().zip(row.side(Side::BareAgain));
    let bare = bare.map(|(one, other)| (figure(one) * figure(other)).sqrt());
    let step = if matches!(side, Side::Worker | Side::ByHand) { super::run::SOME_EVERY } else { 1 };
    Ratio::of(row.side(side).iter().zip(bare.step_by(step)).map(|(one, bare)| figure(one) / bare))
}

/// The bare client over itself.
fn again(row: &Row, figure: impl Fn(&Measured) -> f64) -> Option<Ratio> {
    let pairs = row.side(Side::BareAgain).iter().zip(row.side(Side::Bare));
    Ratio::of(pairs.map(|(one, other)| figure(one) / figure(other)))
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rates are positive and small")]
fn thousands(rate: f64) -> String {
    let digits = (rate.round() as u64).to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
