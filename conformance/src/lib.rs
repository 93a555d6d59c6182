//! The conformance suite of AnyBroker: what the contract promises, as cases that run against a live endpoint.
//!
//! A case is data: a name, the sentence of the contract that it proves, what it needs of the endpoint's capability
//! record, and how it runs. Every event of every client goes to one history, and a checker reads the whole history
//! after every case: lost, phantom, altered, aborted read, unjustified duplicate, ack lost, nack lost, reorder,
//! concurrent key, attempt mismatch, conservation, hang. What the record refuses is not skipped: the refusal
//! itself is verified.
//!
//! ```no_run
//! use std::sync::Arc;
//! use anybroker_conformance::{Options, UrlHarness, run};
//! # async fn example(connect: impl Fn() -> futures_util::future::BoxFuture<'static, anybroker_core::Result<anybroker_core::Bus>> + Send + Sync + 'static)
//! # -> Result<(), Box<dyn std::error::Error>> {
//! let harness = UrlHarness::new("embedded:///tmp/conform.db", connect);
//! let report = run(Arc::new(harness), Options::default()).await?;
//! println!("{}", report.text());
//! report.write_dir("conformance-report".as_ref())?;
//! std::process::exit(report.exit_code());
//! # }
//! ```

mod case;
mod cases;
mod checker;
mod client;
mod consumer;
mod env;
mod faults;
mod harness;
mod history;
mod http;
pub mod mutants;
mod native;
mod need;
mod probes;
mod process;
mod punctual;
mod report;
mod run;
mod sweep;
mod timeline;
mod unit;
mod volume;

pub use case::{Case, Level, Outcome};
pub use cases::cases;
pub use checker::{Anomaly, Counts};
pub use faults::{Route, ScheduleReport, ServerControl, Shrunk, check_proxies, routes_of, url_through};
pub use harness::{About, Harness, UrlHarness};
pub use http::{HttpAnswer, HttpService};
pub use native::{Carries, NativeChannel, Place, RawMessage};
pub use need::Need;
pub use probes::{Evidence, Probe, probes};
pub use process::{CHILD_JOB, run_child};
pub use report::{
    CaseChange, CaseReport, Comparison, EndpointComparison, EndpointReport, RecordChange, Report, ReportError,
    ReportSet, RunSettings, SCHEMA, Totals,
};
pub use run::{Options, Progress, Stop, run};
pub use sweep::{Leftover, fresh_name, sweep};
pub use volume::{Recovery, Volume, VolumeReport, volume};
