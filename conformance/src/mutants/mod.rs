//! Brokers with one fault each, to see that the suite finds it.
//!
//! A mutant wraps any broker and breaks one promise. Each names the case that must fail on it.

mod in_clusters;
mod in_faults;
mod publishing;
mod receiving;
mod record;
mod settling;
mod tampered;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Broker, Bus, BusOptions, ManualClock, Result};
use async_trait::async_trait;

use crate::{Harness, HttpService, NativeChannel, Route, ServerControl};
use tampered::{Fault, Tampered};

/// A broker with one fault.
#[derive(Clone, Copy)]
pub struct Mutant {
    /// What it is called.
    pub name: &'static str,
    /// What it does wrong.
    pub fault: &'static str,
    /// The case that must fail on it.
    pub killed_by: &'static str,
    make: fn() -> Arc<dyn Fault>,
}

impl Mutant {
    /// The broker that the harness gives, with this fault. All its connections share the fault's memory.
    #[must_use]
    pub fn harness(&self, inner: Arc<dyn Harness>) -> MutantHarness {
        MutantHarness { name: self.name, fault: (self.make)(), inner, patience: None }
    }
}

impl std::fmt::Debug for Mutant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mutant").field("name", &self.name).field("killed_by", &self.killed_by).finish_non_exhaustive()
    }
}

/// Every mutant there is.
#[must_use]
pub fn mutants() -> Vec<Mutant> {
    [settling::MUTANTS, receiving::MUTANTS, publishing::MUTANTS, record::MUTANTS].concat()
}

/// Those that only the cases about faults can tell from the real one.
#[must_use]
pub fn mutants_in_faults() -> Vec<Mutant> {
    in_faults::MUTANTS.to_vec()
}

/// Those that only the cases about clusters can tell from the real one. Each has a cluster of three nodes in its harness, which are
/// there in name only.
#[must_use]
pub fn mutants_in_clusters() -> Vec<Mutant> {
    in_clusters::MUTANTS.to_vec()
}

/// A cluster of the same kind without a fault: the cases about clusters must pass on it.
#[must_use]
pub fn unmutated_cluster() -> Mutant {
    in_clusters::UNMUTATED
}

/// The wrapper without a fault: the suite must pass on it, or a mutant's death would prove nothing.
#[must_use]
pub fn unmutated() -> Mutant {
    Mutant { name: "unmutated", fault: "none", killed_by: "", make: || Arc::new(tampered::Faultless) }
}

/// The broker that the harness gives, as slow as one behind a network: a publish is in flight for as long as its confirm takes.
#[cfg(test)]
pub(crate) fn slow(inner: Arc<dyn Harness>, publish: Duration) -> MutantHarness {
    MutantHarness { name: "slow", fault: Arc::new(tampered::Slow(publish)), inner, patience: None }
}

/// The broker that the harness gives, with a record that claims more. Nothing that has to happen is waited for long.
pub(crate) fn claiming(inner: Arc<dyn Harness>, claim: fn(&mut anybroker_core::Capabilities)) -> MutantHarness {
    MutantHarness { name: "claiming more", fault: Arc::new(record::Record(claim)), inner, patience: Some(SOON) }
}

/// How long what the record refuses is waited for. Nothing fails for being later.
const SOON: Duration = Duration::from_secs(5);

/// A harness whose brokers have a fault.
pub struct MutantHarness {
    name: &'static str,
    fault: Arc<dyn Fault>,
    inner: Arc<dyn Harness>,
    /// The harness' own where there is none.
    patience: Option<Duration>,
}

impl MutantHarness {
    fn tamper(&self, bus: &Bus) -> Bus {
        let broker: Arc<dyn Broker> = Arc::new(Tampered::new(Arc::clone(bus.broker()), Arc::clone(&self.fault)));
        Bus::new(broker, BusOptions::default())
    }
}

#[async_trait]
impl Harness for MutantHarness {
    fn name(&self) -> String {
        format!("{} as {}", self.inner.name(), self.name)
    }

    fn about(&self) -> crate::About {
        self.inner.about()
    }

    async fn connect(&self) -> Result<Bus> {
        Ok(self.tamper(&self.inner.connect().await?))
    }

    async fn connect_strict(&self) -> Option<Result<Bus>> {
        let bus = self.inner.connect_strict().await?;
        Some(bus.map(|bus| self.tamper(&bus)))
    }

    fn lease(&self) -> Duration {
        self.inner.lease()
    }

    fn quiet(&self) -> Duration {
        self.inner.quiet()
    }

    fn patience(&self) -> Duration {
        self.patience.map_or_else(|| self.inner.patience(), |patience| patience.min(self.inner.patience()))
    }

    fn clock(&self) -> Option<ManualClock> {
        self.inner.clock()
    }

    fn is_disturbed(&self) -> bool {
        self.inner.is_disturbed()
    }

    fn routes(&self) -> std::result::Result<Vec<Route>, String> {
        self.inner.routes()
    }

    async fn connect_through(&self, addresses: &[SocketAddr]) -> Result<Bus> {
        Ok(self.tamper(&self.inner.connect_through(addresses).await?))
    }

    fn http(&self) -> std::result::Result<Arc<dyn HttpService>, String> {
        self.inner.http()
    }

    fn server(&self) -> std::result::Result<Arc<dyn ServerControl>, String> {
        self.fault.server().map_or_else(|| self.inner.server(), Ok)
    }

    fn native(&self) -> std::result::Result<Arc<dyn NativeChannel>, String> {
        self.inner.native()
    }
}

impl std::fmt::Debug for MutantHarness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MutantHarness").field("name", &self.name).finish_non_exhaustive()
    }
}
