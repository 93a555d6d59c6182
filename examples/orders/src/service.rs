//! Ties feed and workers together and waits until everything is worked off.

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anybroker::worker::{ErrorClasses, HandlerOptions, Report, RetryPolicy, Worker};
use anybroker::{Bus, Config, DeadLetter, DeadLetterFilter, Precision, TopologySpec};
use tokio_util::sync::CancellationToken;

use crate::feed::{self, Fed};
use crate::inventory::{Inventory, UNKNOWN_SKU};
use crate::payments::{CARD_DECLINED, Gateway, Payments};
use crate::totals::{Ledger, Projection, Totals};
use crate::{ORDERS, PAYMENTS, STOCK};

/// Who reads what: upstream first, since a group that is done may have given others more to do.
pub const GROUPS: &[(&str, &str)] =
    &[(ORDERS, "payments"), (ORDERS, "inventory"), (ORDERS, "totals"), (PAYMENTS, "totals"), (STOCK, "totals")];

/// How long nothing may be left before it counts as done, where the broker only estimates what is left.
const QUIET: Duration = Duration::from_secs(3);

/// How long handlers may go on when the service is told to stop.
const GRACE: Duration = Duration::from_secs(10);

/// How long closing the connection may take afterwards: on a busy disk that is a while, and no failure.
const CLOSING: Duration = Duration::from_secs(60);

/// What one run does.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The broker.
    pub config: Config,
    /// The orders to publish; none to work off what is in the broker already.
    pub orders: Option<PathBuf>,
    /// The database of the totals.
    pub totals: PathBuf,
    /// Whether the payment gateway reaches all banks.
    pub all_banks: bool,
}

/// What one run did.
#[derive(Debug)]
pub struct Summary {
    /// The broker, without credentials.
    pub endpoint: String,
    /// The broker's URL scheme.
    pub scheme: &'static str,
    /// What was published, where something was to be.
    pub fed: Option<Fed>,
    /// What the workers did.
    pub worked: Report,
    /// Messages that the totals had seen before.
    pub duplicates: u64,
    /// Everything in the dead-letter queues now: destination, group, letters.
    pub dead_letters: Vec<(&'static str, &'static str, Vec<DeadLetter>)>,
    /// The sums.
    pub totals: Totals,
    /// Whether it was told to stop before everything was done.
    pub interrupted: bool,
    /// How long it took.
    pub took: Duration,
}

/// Runs the service until nothing is left to do, or until `stop`.
///
/// # Errors
/// When the broker cannot be reached or refuses what the configuration requires, when the file of orders or the
/// database cannot be opened, when a subscription ends by itself.
pub async fn run(settings: Settings, stop: CancellationToken) -> Result<Summary, Box<dyn Error + Send + Sync>> {
    let start = Instant::now();
    if let Some(file) = &settings.orders {
        std::fs::File::open(file).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    let bus = anybroker::connect_with(settings.config).await?;
    let ledger = Ledger::open(&settings.totals)?;
    // Before the first message, so that every group is given all of them on every broker.
    for (destination, group) in GROUPS {
        bus.declare(&TopologySpec::group(*destination, *group)).await?;
    }
    let gateway = if settings.all_banks { Gateway::with_all_banks() } else { Gateway::default() };
    let worker = workers(&bus, gateway, ledger.clone());
    let shutdown = worker.shutdown_handle();
    let mut working = tokio::spawn(worker.run_until(stop.clone().cancelled_owned()));

    let mut fed = settings.orders.is_some().then(Fed::default);
    let worked_off = async {
        if let Some((file, fed)) = settings.orders.as_deref().zip(fed.as_mut()) {
            feed::publish(&bus, file, fed).await?;
        }
        nothing_left(&bus).await?;
        Ok::<_, Box<dyn Error + Send + Sync>>(())
    };
    let worked = tokio::select! {
        done = worked_off => {
            // Also after a failure: what the workers hold goes back in good order.
            shutdown.drain();
            let worked = working.await??;
            done?;
            worked
        }
        // Told to stop, or all subscriptions were ended by something that stands in the report.
        ended = &mut working => ended??,
    };
    if let Some(error) = worked.error() {
        return Err(error.to_string().into());
    }

    let mut dead_letters = Vec::new();
    for (destination, group) in GROUPS {
        let letters = bus.dead_letters(*destination, *group)?.peek(&DeadLetterFilter::all(), usize::MAX).await?;
        dead_letters.push((*destination, *group, letters));
    }
    let endpoint = bus.endpoint().clone();
    bus.close(CLOSING).await?;
    Ok(Summary {
        endpoint: endpoint.url,
        scheme: endpoint.scheme,
        fed,
        worked,
        duplicates: ledger.duplicates(),
        dead_letters,
        totals: Totals::read(&settings.totals)?,
        interrupted: stop.is_cancelled(),
        took: start.elapsed(),
    })
}

fn workers(bus: &Bus, gateway: Gateway, ledger: Ledger) -> Worker {
    // Much shorter than the default (1 s, doubled up to 60 s), since nobody wants to wait for an example.
    let retry = RetryPolicy::default().with_first_delay(Duration::from_millis(100));
    let payments = HandlerOptions::new(bus.subscription(ORDERS, "payments"))
        .with_concurrency(64)
        .with_retry(retry)
        .with_classes(ErrorClasses::default().not_retryable(CARD_DECLINED));
    let inventory = HandlerOptions::new(bus.subscription(ORDERS, "inventory"))
        .with_classes(ErrorClasses::default().not_retryable(UNKNOWN_SKU));
    let everything = bus.subscription(ORDERS, "totals").and_destination(PAYMENTS).and_destination(STOCK);
    let totals = HandlerOptions::new(everything).with_concurrency(256);
    Worker::new(bus.clone())
        .with_grace(GRACE)
        .handle(payments, Payments::new(gateway))
        .handle(inventory, Inventory)
        .handle(totals, Projection::new(ledger))
}

/// Waits until no group has anything left to do.
async fn nothing_left(bus: &Bus) -> anybroker::Result<()> {
    let exact = bus.capabilities().lag.ready == Some(Precision::Exact);
    let mut quiet_since = None;
    loop {
        let mut left = 0;
        for (destination, group) in GROUPS {
            left += bus.lag(*destination, *group).await?.total().unwrap_or(1);
        }
        let since = *quiet_since.get_or_insert_with(Instant::now);
        match left {
            0 if exact || since.elapsed() >= QUIET => return Ok(()),
            0 => {}
            _ => quiet_since = None,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
