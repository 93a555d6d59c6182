//! What the record refuses, tried past the check layer, which refuses it by the record.

use std::sync::Arc;

use anybroker_core::{Capabilities, Support};
use futures_util::future::join_all;
use tokio::runtime::Handle;

use super::case;
use crate::case::{Breach, Proof, ensure};
use crate::env::Env;
use crate::mutants::claiming;
use crate::{Case, Need, Options, Outcome, Stop, need, run};

pub(super) const CASES: &[Case] = &[case!(
    "topology/what-the-record-refuses-does-not-work-behind-it",
    [],
    "A record that is too modest is not true either: no adapter does what its record refuses.",
    behind_the_record
)];

/// A field that is claimed although the record refuses it, and a case that fails where the claim is not true.
struct Claim {
    need: Need,
    make: fn(&mut Capabilities),
    case: &'static str,
}

macro_rules! claims {
    ($($need:ident $field:ident: $case:literal;)+) => {
        &[$(Claim { need: need::$need, make: |record| record.$field = Support::Native, case: $case }),+]
    };
}

/// Those that one run can decide. Messages that come in order may do so by chance.
const CLAIMS: &[Claim] = claims! {
    NACK nack: "redelivery/a-nacked-message-comes-back-with-the-next-attempt";
    NACK_DELAY nack_delay: "redelivery/a-delayed-nack-is-never-early";
    RELEASE release: "settle/what-was-released-comes-back-with-the-same-attempt";
    LEASE lease: "lease/a-delivery-comes-back-when-its-lease-has-ended-and-not-before";
    EXTENSION lease_extension: "lease/an-extended-lease-holds";
    DEAD_LETTER dead_letter: "dead-letter/a-letter-holds-the-message-untouched-and-why-it-died";
    REDRIVE redrive: "dead-letter/a-redrive-returns-only-to-the-group-that-failed-at-attempt-one-with-its-id";
    PURGE purge: "dead-letter/a-purge-deletes-what-it-chooses-for-good";
    GROUPS groups: "groups/each-group-sees-every-message";
    REPLAY replay: "groups/a-group-can-start-at-a-time";
    START_POSITION start_position: "groups/a-group-can-start-at-a-position";
    START_LATEST start_latest: "groups/latest-is-fixed-when-subscribe-returns";
    DELAYED_PUBLISH delayed_publish: "time/a-delayed-publish-is-never-early";
    TTL ttl: "time/what-is-not-settled-within-its-time-to-live-becomes-a-dead-letter";
    DEDUP publish_dedup: "idempotency/a-second-publish-of-an-id-within-the-window-is-stored-once";
    TRANSACTIONS transactions: "transactions/nothing-is-seen-before-the-commit-and-all-of-it-afterwards";
    TOMBSTONES tombstones: "shapes/a-tombstone-is-not-an-empty-payload";
    DECLARE declare: "topology/declaring-twice-changes-nothing";
    DESCRIBE describe: "topology/describe-shows-groups-and-both-names";
    DELETE delete: "topology/a-deleted-destination-ends-its-subscriptions-with-not-found";
};

/// Whether a field is among them.
pub(crate) fn is_claimed(field: &str) -> bool {
    CLAIMS.iter().any(|claim| claim.need.name == field)
}

/// Whoever gives this case up gives the runs within it up.
struct StopsWhenDropped(Stop);

impl Drop for StopsWhenDropped {
    fn drop(&mut self) {
        self.0.request();
    }
}

async fn behind_the_record(env: &Env) -> Proof {
    let refused: Vec<&Claim> = CLAIMS.iter().filter(|claim| !(claim.need.given)(&env.record)).collect();
    if refused.is_empty() {
        return Err(Breach::NotRun("the record refuses nothing that one run could show to work".into()));
    }
    // All of them to their end: each has a run of its own, which would outlive this case.
    join_all(refused.into_iter().map(|claim| one(env, claim))).await.into_iter().collect()
}

/// The case of a claim, on clients whose record claims it. Some refusals are the check layer's alone: without it an adapter may take what
/// it then does not do, and the case fails, as it should.
async fn one(env: &Env, claim: &Claim) -> Proof {
    let stop = StopsWhenDropped(Stop::new());
    let options = Options::default().with_filter(claim.case).with_seed(env.seed()).with_stop(stop.0.clone());
    let harness = Arc::new(claiming(Arc::clone(&env.harness), claim.make));
    let runtime = Handle::current();
    // On a thread of its own, where an adapter that panics because nothing has kept this from it ends nobody else.
    let running = tokio::task::spawn_blocking(move || runtime.block_on(run(harness, options)));
    let Ok(report) = running.await else { return Ok(()) };
    let report = report?;
    let works = report.cases.iter().any(|case| case.outcome == Outcome::Pass);
    ensure!(!works, "{} is refused by the record, and works: `{}` passes", claim.need.name, claim.case);
    Ok(())
}
