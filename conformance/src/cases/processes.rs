//! Publishers and members whose process is killed at a named point.

use std::time::Duration;

use futures_util::future::try_join_all;

use crate::case::Proof;
use crate::checker::may_be_under_way;
use crate::env::Env;
use crate::process::{Point, end_at};
use crate::{Case, Level};

/// What is published for a member that ends.
const MESSAGES: usize = 40;
/// The least lease: time enough for whoever reads what is left, and no longer than has to be waited for.
const LEASE: Duration = Duration::from_secs(5);

pub(super) const CASES: &[Case] = &[
    Case {
        name: "faults/a-publisher-whose-process-is-killed-has-stored-what-was-confirmed",
        level: Level::Reliability,
        proves: "What is confirmed is stored, and nothing is made up, wherever the publisher's process ends.",
        needs: &[],
        alone: true,
        run: |env| Box::pin(publishers(env)),
    },
    Case {
        name: "faults/a-member-whose-process-is-killed-loses-nothing-and-what-it-settled-stays-settled",
        level: Level::Reliability,
        proves: "What a member had comes to others, and what was confirmed as settled does not, wherever its process ends.",
        needs: &[],
        alone: true,
        run: |env| Box::pin(members(env)),
    },
];

async fn publishers(env: &Env) -> Proof {
    try_join_all([Point::Publishing, Point::Confirmed].map(|point| one(env, point, 0))).await.map(drop)
}

async fn members(env: &Env) -> Proof {
    let mut points = vec![Point::Holding, Point::Acking, Point::Acked, Point::Closing];
    points.extend(env.record.nack.is_given().then_some(Point::Nacking));
    points.extend(env.record.dead_letter.is_given().then_some(Point::Burying));
    try_join_all(points.into_iter().map(|point| one(env, point, MESSAGES))).await.map(drop)
}

/// A process that ends at that point, and a fresh client that reads what is left. Each has a destination of its own: members
/// that are gone keep lanes on some brokers until they are missed.
async fn one(env: &Env, point: Point, messages: usize) -> Proof {
    let (destination, group) = (env.destination(&point.label()), env.group(&point.label()));
    let longest = env.record.limits.lease_max_ms.map_or(Duration::MAX, Duration::from_millis);
    // Whoever waits until nothing that it has settled is under way holds the rest for as long.
    let waits =
        if point == Point::Holding { may_be_under_way(env.record.ack_level) + env.quiet() } else { Duration::ZERO };
    let lease = env.lease().max(LEASE + waits).min(longest);
    let spec = env.spec(&destination, &group).with_lease(lease);
    let client = env.client().await?;
    // The group is there before anything is published.
    client.subscribe(spec.clone()).await?.close().await?;
    let message = |number| client.message(&destination, format!("key {}", number % 8).as_str());
    client.publish_ok((0..messages).map(message).collect()).await?;
    end_at(env, point, &spec).await?;
    env.client().await?.drain(spec).await?;
    client.close().await
}
