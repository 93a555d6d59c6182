//! Connections that are cut, held, slowed down or half gone, and servers that are killed and frozen.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Order, SubscribeSpec};
use futures_util::future::BoxFuture;
use rand::RngExt;
use rand::rngs::StdRng;

use crate::case::{Breach, Proof};
use crate::env::Env;
use crate::faults::{Disturbance, KILLED, Kind, Line, Network, Planned, Trial, of_server, plan};
use crate::{Case, Level, ServerControl, need};

/// A case of the second level.
macro_rules! fault {
    ($name:literal, $alone:literal, [$($need:expr),* $(,)?], $proves:literal, $run:path) => {
        Case {
            name: $name,
            level: Level::Reliability,
            proves: $proves,
            needs: &[$($need),*],
            alone: $alone,
            run: |env| Box::pin($run(env)),
        }
    };
}

pub(super) const CASES: &[Case] = &[
    fault!(
        "faults/connections-cut-while-publishing-lose-nothing-that-was-confirmed",
        false,
        [],
        "A cut connection leaves an outcome unknown; what is done is stored, what is not done is not; publishers recover by themselves.",
        cut_publishing
    ),
    fault!(
        "faults/connections-cut-while-consuming-bring-back-what-was-not-settled",
        false,
        [],
        "Lost connections: every subscription recovers by itself, what was unsettled comes back, a confirmed ack stays.",
        cut_consuming
    ),
    fault!(
        "faults/a-black-hole-ends-no-call-late-and-loses-nothing",
        false,
        [],
        "Every call ends by its deadline, whatever the broker does; a timeout is unknown.",
        black_hole
    ),
    fault!(
        "faults/answers-that-are-lost-leave-outcomes-unknown-and-lose-nothing",
        false,
        [],
        "A missing confirm is unknown, never done and never not done.",
        lost_answers
    ),
    fault!(
        "faults/a-slow-connection-loses-nothing-and-doubles-nothing-that-was-answered",
        false,
        [],
        "Slowness is no failure.",
        slow
    ),
    fault!(
        "faults/a-mixed-schedule-breaks-no-promise",
        false,
        [],
        "Nothing lost, nothing phantom, delivered again only what a fault has met, no call without end, recovery by itself.",
        mixed
    ),
    fault!(
        "faults/a-mixed-schedule-keeps-the-order-of-each-key",
        false,
        [need::KEY_ORDER],
        "Order::Key holds for first deliveries, whatever becomes of connections.",
        mixed_in_order
    ),
    fault!(
        "faults/a-server-that-is-killed-and-comes-back-loses-nothing-that-was-confirmed",
        true,
        [need::SURVIVES_KILL],
        "What is confirmed survives the server's process; everybody recovers by himself.",
        killed
    ),
    fault!(
        "faults/a-server-that-is-frozen-for-a-while-loses-nothing",
        true,
        [],
        "Every call ends by its deadline while the server is frozen, and everything goes on afterwards.",
        frozen
    ),
];

fn millis(random: &mut StdRng, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(random.random_range(range))
}

/// A cut of one kind or another.
fn cut(random: &mut StdRng) -> (Kind, Duration) {
    let lasts = millis(random, 50..600);
    match random.random_range(0..4) {
        0 => (Kind::Finish, lasts),
        1 => (Kind::CutAfter { bytes: random.random_range(100..20_000), answers: random.random() }, lasts * 2),
        _ => (Kind::Cut, lasts),
    }
}

async fn cut_publishing(env: &Env) -> Proof {
    disturbed(
        env,
        |spec| spec,
        6,
        |random, _| {
            let (kind, lasts) = cut(random);
            (kind, lasts, true)
        },
    )
    .await
}

async fn cut_consuming(env: &Env) -> Proof {
    disturbed(
        env,
        |spec| spec,
        6,
        |random, _| {
            let (kind, lasts) = cut(random);
            (kind, lasts, false)
        },
    )
    .await
}

async fn black_hole(env: &Env) -> Proof {
    disturbed(
        env,
        |spec| spec,
        3,
        |random, number| {
            let kind = [Kind::BlackHole, Kind::DeafServer, Kind::HalfOpen][number % 3];
            // Longer than a publish may take.
            (kind, millis(random, 2_500..4_000), random.random())
        },
    )
    .await
}

async fn lost_answers(env: &Env) -> Proof {
    disturbed(env, |spec| spec, 4, |random, number| (Kind::DropAnswers, millis(random, 500..2_500), number % 2 == 0))
        .await
}

async fn slow(env: &Env) -> Proof {
    disturbed(env, |spec| spec, 3, |random, number| (slowness(random), millis(random, 1_000..2_500), number % 2 == 0))
        .await
}

fn slowness(random: &mut StdRng) -> Kind {
    let bytes_per_second = if random.random() { 0 } else { random.random_range(20_000..200_000) };
    Kind::Slow { delay: millis(random, 20..200), bytes_per_second }
}

async fn mixed(env: &Env) -> Proof {
    disturbed(env, |spec| spec, 8, any).await
}

async fn mixed_in_order(env: &Env) -> Proof {
    disturbed(env, |spec| spec.with_order(Order::Key), 6, any).await
}

fn any(random: &mut StdRng, _: usize) -> (Kind, Duration, bool) {
    let publishing = random.random();
    let (kind, lasts) = match random.random_range(0..8) {
        0..3 => cut(random),
        3 => (Kind::HalfOpen, millis(random, 500..2_500)),
        4 => (Kind::BlackHole, millis(random, 500..3_000)),
        5 => (Kind::DeafServer, millis(random, 500..3_000)),
        6 => (Kind::DropAnswers, millis(random, 300..2_000)),
        _ => (slowness(random), millis(random, 500..1_500)),
    };
    (kind, lasts, publishing)
}

/// A trial with a line for each client, and `count` faults that the seed draws.
async fn disturbed(
    env: &Env,
    shape: impl FnOnce(SubscribeSpec) -> SubscribeSpec,
    count: usize,
    mut draw: impl FnMut(&mut StdRng, usize) -> (Kind, Duration, bool),
) -> Proof {
    let network = Network::open(env).await?;
    let (publishers, members) = Trial::CLIENTS;
    let (mut lines, mut clients) = (Vec::new(), Vec::new());
    for _ in 0..publishers + members {
        let line = network.line().await?;
        clients.push(line.client(env).await?);
        lines.push(line);
    }
    let members = clients.split_off(publishers);
    let mut number = 0;
    let planned = plan(&mut env.rng(), count, |random| {
        number += 1;
        draw(random, number - 1)
    });
    let hits: Vec<Box<dyn Disturbance>> = planned
        .into_iter()
        .map(|planned| {
            let of = if planned.publishing { &lines[..publishers] } else { &lines[publishers..] };
            Box::new(Hit { lines: of.to_vec(), planned }) as Box<dyn Disturbance>
        })
        .collect();
    Trial::new(env, shape).run(clients, members, &hits).await
}

/// A fault of one line, of the publishers' or of the members'.
struct Hit {
    lines: Vec<Arc<Line>>,
    planned: Planned,
}

impl Disturbance for Hit {
    fn wants(&self) -> (bool, usize) {
        (self.planned.publishing, self.planned.whom)
    }

    fn happen<'a>(&'a self, env: &'a Env, whom: usize) -> BoxFuture<'a, Proof> {
        Box::pin(async move {
            self.lines[whom].suffer(env, &self.planned).await;
            Ok(())
        })
    }
}

async fn killed(env: &Env) -> Proof {
    of_process(env, |server| Process { server, kills: true }, 1).await
}

async fn frozen(env: &Env) -> Proof {
    of_process(env, |server| Process { server, kills: false }, 1).await
}

async fn of_process(env: &Env, process: impl Fn(Arc<dyn ServerControl>) -> Process, count: usize) -> Proof {
    let server = env.harness.server().ok_or_else(|| Breach::NotRun("the harness may not kill the server".into()))?;
    let (publishers, members) = Trial::CLIENTS;
    let mut clients = Vec::new();
    for _ in 0..publishers + members {
        clients.push(env.client().await?);
    }
    let members = clients.split_off(publishers);
    let hits: Vec<Box<dyn Disturbance>> =
        (0..count).map(|_| Box::new(process(Arc::clone(&server))) as Box<dyn Disturbance>).collect();
    Trial::new(env, |spec| spec).run(clients, members, &hits).await
}

/// A fault of the server.
struct Process {
    server: Arc<dyn ServerControl>,
    kills: bool,
}

/// Longer than a publish may take.
const FROZEN: Duration = Duration::from_secs(5);

impl Disturbance for Process {
    fn wants(&self) -> (bool, usize) {
        (true, 0)
    }

    fn happen<'a>(&'a self, env: &'a Env, _: usize) -> BoxFuture<'a, Proof> {
        let server = &self.server;
        Box::pin(async move {
            match self.kills {
                true => of_server(env, KILLED, Duration::ZERO, server.kill(), server.restart()).await,
                false => of_server(env, "server frozen", FROZEN, server.pause(), server.resume()).await,
            }
        })
    }
}
