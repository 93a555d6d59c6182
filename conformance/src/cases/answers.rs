//! Answers that a proxy gives in the place of a server that is spoken to over HTTP: errors, and that it is asked too often.

use std::time::Duration;

use anybroker_core::{Order, Settlement, SubscribeSpec};
use rand::RngExt;
use rand::rngs::StdRng;

use super::faults::{any, disturbed_on, millis};
use crate::case::{Breach, Proof};
use crate::consumer::{ack_all, settle};
use crate::env::Env;
use crate::faults::{Answers, Kind, Network, Planned, is_settling_in_a_fault};
use crate::{Case, Level};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "faults/answers-of-an-error-leave-outcomes-unknown-and-lose-nothing",
        level: Level::Reliability,
        proves: "An answer that is not the service's tells nothing of what was asked for: it may be done or not, and is never taken for either.",
        needs: &[],
        alone: false,
        run: |env| Box::pin(errors(env)),
    },
    Case {
        name: "faults/what-is-given-back-without-an-answer-stays-with-who-gets-it-next",
        level: Level::Reliability,
        proves: "A member that gave messages back, and never heard that it was done, does not take them from the one that has got them since.",
        needs: &[],
        alone: false,
        run: |env| Box::pin(given_back_without_an_answer(env)),
    },
    Case {
        name: "faults/what-is-throttled-is-asked-for-again-and-loses-nothing",
        level: Level::Reliability,
        proves: "What the service refuses because it is asked too often is not done, is told so, and goes on when it is asked again.",
        needs: &[],
        alone: false,
        run: |env| Box::pin(throttled(env)),
    },
    Case {
        name: "faults/a-mixed-schedule-of-lost-connections-and-answers-of-errors-breaks-no-promise",
        level: Level::Reliability,
        proves: "Nothing lost, nothing phantom, no order broken where there is one, recovery by itself, whoever answers and whatever becomes of connections.",
        needs: &[],
        alone: false,
        run: |env| Box::pin(mixed(env)),
    },
];

const ERRORS: [Answers; 2] = [Answers::Unavailable, Answers::DoneButUnavailable];

/// Both errors for publishers, and for members; before that, one for the acks of a lone member.
async fn errors(env: &Env) -> Proof {
    let network = Network::open_to_answer(env).await?;
    acked_without_an_answer(env, &network).await?;
    answered_on(env, &network, 6, |random, number| {
        (Kind::Answered(ERRORS[number % 2]), millis(random, 300..2_500), number / 2 % 2 == 0)
    })
    .await
}

/// So long that a first answer is lost, and so short that an ack that is asked for again has one.
const ANSWERS_LOST: Planned = Planned {
    kind: Kind::Answered(Answers::DoneButUnavailable),
    lasts: Duration::from_millis(500),
    publishing: false,
    whom: 0,
};

/// The acks of one member are done, and the answers say nothing. What it is told of them at last is true: the history says of each
/// that was certainly not done that it has to come again.
async fn acked_without_an_answer(env: &Env, network: &Network<'_>) -> Proof {
    let line = network.line()?;
    let (publisher, member) = (env.client().await?, line.client(env).await?);
    let spec = env.spec(&env.destination("alone"), &env.group("g"));
    let mut consumer = member.subscribe(spec.clone()).await?;
    let message = |number| publisher.message(&spec.destinations[0], format!("key {number}").as_str());
    publisher.publish_ok((0..env.at_once(5)).map(message).collect()).await?;
    let held = consumer.take(env.at_once(5)).await?;
    let settling = settle(held.into_iter().map(|held| (held, Settlement::Ack)).collect());
    // The first is polled first: the fault has begun when the acks are asked for.
    let ((), outcomes) = futures_util::join!(line.suffer(env, &ANSWERS_LOST), settling);
    for outcome in outcomes? {
        if let Err((_, error)) = outcome {
            is_settling_in_a_fault(&error)?;
        }
    }
    consumer.close().await?;
    env.client().await?.drain(spec).await?;
    for client in [publisher, member] {
        client.close().await?;
    }
    Ok(())
}

/// A request to give back that is sent again finds the message with another member: then it may take it from that one, whose
/// lease lasts for long. The history says whether it came once more within it.
async fn given_back_without_an_answer(env: &Env) -> Proof {
    let network = Network::open_to_answer(env).await?;
    let line = network.line()?;
    let (first, second) = (line.client(env).await?, env.client().await?);
    let spec = env.spec(&env.destination("d"), &env.group("g")).with_lease(env.lease() * 4);
    let count = env.at_once(5);
    let mut giver = first.subscribe(spec.clone()).await?;
    let message = |number| second.message(&spec.destinations[0], format!("key {number}").as_str());
    second.publish_ok((0..count).map(message).collect()).await?;
    let held = giver.take(count).await?;
    // It asks for nothing more while it gives back, so that they come to the other one.
    let mut next = second.subscribe(spec.clone()).await?;
    let giving = settle(held.into_iter().map(|held| (held, Settlement::Release)).collect());
    let ((), given, taken) = futures_util::join!(line.suffer(env, &ANSWERS_LOST), giving, next.take(count));
    for outcome in given? {
        if let Err((_, error)) = outcome {
            is_settling_in_a_fault(&error)?;
        }
    }
    let taken = taken?;
    next.silence("the next member holds all that there is").await?;
    ack_all(taken).await?;
    for consumer in [giver, next] {
        consumer.close().await?;
    }
    second.drain(spec).await?;
    for client in [first, second] {
        client.close().await?;
    }
    has_answered(&network)
}

async fn throttled(env: &Env) -> Proof {
    answered(env, 4, |random, number| (Kind::Answered(Answers::Throttled), millis(random, 500..3_000), number % 2 == 0))
        .await
}

/// In the order of each key, where the endpoint has one.
async fn mixed(env: &Env) -> Proof {
    const ANSWERS: [Answers; 3] = [ERRORS[0], ERRORS[1], Answers::Throttled];
    answered(env, 8, |random, number| match number % 2 {
        0 => any(random, number),
        _ => {
            let answers = ANSWERS[random.random_range(0..ANSWERS.len())];
            (Kind::Answered(answers), millis(random, 300..2_500), random.random())
        }
    })
    .await
}

async fn answered(env: &Env, count: usize, draw: impl FnMut(&mut StdRng, usize) -> (Kind, Duration, bool)) -> Proof {
    answered_on(env, &Network::open_to_answer(env).await?, count, draw).await
}

async fn answered_on(
    env: &Env,
    network: &Network<'_>,
    count: usize,
    draw: impl FnMut(&mut StdRng, usize) -> (Kind, Duration, bool),
) -> Proof {
    let in_order = |spec: SubscribeSpec| match env.record.key_order.is_given() {
        true => spec.with_order(Order::Key),
        false => spec,
    };
    disturbed_on(env, network, in_order, count, draw).await?;
    has_answered(network)
}

/// Otherwise nothing is shown.
fn has_answered(network: &Network<'_>) -> Proof {
    match network.answered() {
        0 => Err(Breach::Inconclusive("no request came while a proxy answered in the server's place".into())),
        _ => Ok(()),
    }
}
