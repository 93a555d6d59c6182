//! Answers that a proxy gives in the place of a server that is spoken to over HTTP: errors, and that it is asked too often.

use std::time::Duration;

use anybroker_core::{Order, SubscribeSpec};
use rand::RngExt;
use rand::rngs::StdRng;

use super::faults::{any, disturbed_on, millis};
use crate::case::{Breach, Proof};
use crate::env::Env;
use crate::faults::{Answers, Kind, Network};
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

/// Both errors for publishers, and for members.
async fn errors(env: &Env) -> Proof {
    answered(env, 6, |random, number| {
        (Kind::Answered(ERRORS[number % 2]), millis(random, 300..2_500), number / 2 % 2 == 0)
    })
    .await
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
    let network = Network::open_to_answer(env).await?;
    let in_order = |spec: SubscribeSpec| match env.record.key_order.is_given() {
        true => spec.with_order(Order::Key),
        false => spec,
    };
    disturbed_on(env, &network, in_order, count, draw).await?;
    match network.answered() {
        0 => Err(Breach::Inconclusive("no request came while a proxy answered in the server's place".into())),
        _ => Ok(()),
    }
}
