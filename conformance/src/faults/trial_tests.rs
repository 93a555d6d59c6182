//! What a trial's publishers do while a fault of the server lasts.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Effect, Error, ErrorKind, MessageId};
use async_trait::async_trait;

use super::{is_publishing_in_a_fault, is_settling_in_a_fault};
use crate::mutants::slow;
use crate::{Level, Options, Outcome, ServerControl, UrlHarness, run};

/// A server that is frozen in name only.
struct Untouched;

#[async_trait]
impl ServerControl for Untouched {
    async fn kill(&self) -> std::result::Result<(), String> {
        Err("it is not killed here".into())
    }
    async fn restart(&self) -> std::result::Result<(), String> {
        Err("it is not killed here".into())
    }
    async fn pause(&self) -> std::result::Result<(), String> {
        Ok(())
    }
    async fn resume(&self) -> std::result::Result<(), String> {
        Ok(())
    }
}

/// 2,000 are the publishers' share. A command that takes its time to disturb the server finds them publishing still.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishers_go_on_beyond_their_share_until_a_fault_of_the_server_is_over() {
    let memory = anybroker_memory::Memory::builder().build();
    let harness = UrlHarness::new("memory", move || {
        let memory = memory.clone();
        Box::pin(async move { Ok(memory.bus()) })
    });
    let harness = harness.with_server(Arc::new(Untouched)).with_quiet(Duration::from_millis(100));
    let harness = Arc::new(slow(Arc::new(harness), Duration::from_millis(1)));
    let options = Options::default().with_level(Level::Reliability).with_seed(1);
    let report = run(harness, options.with_filter("faults/a-server-that-is-frozen-*")).await.unwrap();
    assert_eq!(report.cases[0].outcome, Outcome::Pass, "{}", report.text());
    let published = report.cases[0].counts.published_ok;
    assert!(published > 2_500, "{published} published");
}

/// What certainly did nothing, and says that it will not pass, is not the fault's doing.
#[test]
fn a_fault_explains_what_may_pass_and_what_is_unknown_and_nothing_else() {
    let of = |kind, effect| Error::new(kind, "publish", "as it is said").with_effect(effect);
    for kind in [ErrorKind::Timeout, ErrorKind::Unavailable, ErrorKind::RateLimited] {
        assert!(is_publishing_in_a_fault(&of(kind, Effect::NotDone)).is_ok(), "{kind}");
        assert!(is_settling_in_a_fault(&of(kind, Effect::NotDone)).is_ok(), "{kind}");
    }
    let never = [
        ErrorKind::AlreadyExists,
        ErrorKind::Closed,
        ErrorKind::ConfigInvalid,
        ErrorKind::InvalidMessage,
        ErrorKind::NotFound,
        ErrorKind::PermissionDenied,
        ErrorKind::TooLarge,
        ErrorKind::Unauthenticated,
        ErrorKind::Unexpected,
        ErrorKind::Unsupported,
    ];
    for kind in never {
        assert!(is_publishing_in_a_fault(&of(kind, Effect::NotDone)).is_err(), "{kind}");
        assert!(is_settling_in_a_fault(&of(kind, Effect::NotDone)).is_err(), "{kind}");
    }
    let stale = of(ErrorKind::StaleDelivery, Effect::NotDone);
    assert!(is_settling_in_a_fault(&stale).is_ok() && is_publishing_in_a_fault(&stale).is_err());
    let unknown = of(ErrorKind::Unexpected, Effect::Unknown);
    assert!(is_settling_in_a_fault(&unknown).is_ok() && is_publishing_in_a_fault(&unknown).is_ok());
    let held_back = anybroker_core::held_back(&MessageId::from("m"), &"d".into());
    assert!(is_publishing_in_a_fault(&held_back).is_ok());
}
