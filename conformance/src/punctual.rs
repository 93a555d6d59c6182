//! Calls that have a deadline, and how late they may end.

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;

/// How much later than its deadline a call may end. The core cuts a publish off a second after its deadline
/// (`Bus::publish`), whatever the adapter does; another second is left for that to get here.
pub(crate) const LATE: Duration = Duration::from_secs(2);

/// What lateness is counted in.
const STEP: Duration = Duration::from_millis(20);

/// What the future brings; nothing when it ends later than [`LATE`] after its deadline, or not at all.
///
/// Lateness is counted in steps, by a task beside the call. While a machine is busy with other things this process makes no step,
/// so that the pace of the machine is not what is judged. A call that keeps its thread to itself is late all the same.
pub(crate) async fn in_time<T>(deadline: Duration, future: impl Future<Output = T>) -> Option<T> {
    within_steps(deadline, LATE.as_millis() / STEP.as_millis(), future).await
}

async fn within_steps<T>(deadline: Duration, steps: u128, future: impl Future<Output = T>) -> Option<T> {
    // Ends with this future, should that be dropped.
    let mut counting = JoinSet::new();
    counting.spawn(async move {
        tokio::time::sleep(deadline).await;
        for _ in 0..steps {
            tokio::time::sleep(STEP).await;
        }
    });
    tokio::select! {
        biased;
        brought = future => counting.try_join_next().is_none().then_some(brought),
        _ = counting.join_next() => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn what_ends_with_its_deadline_is_in_time_and_what_never_ends_is_late() {
        assert_eq!(in_time(DEADLINE, std::future::ready(1)).await, Some(1));
        assert_eq!(in_time(DEADLINE, tokio::time::sleep(DEADLINE)).await, Some(()));
        assert_eq!(within_steps(DEADLINE, 2, std::future::pending::<()>()).await, None);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_call_that_keeps_its_thread_until_long_after_its_deadline_is_late() {
        const STEPS: u128 = 2;
        let (end, ended) = std::sync::mpsc::channel();
        tokio::spawn(async move {
            tokio::time::sleep(DEADLINE).await;
            // Many more than are allowed, made on the same clock.
            for _ in 0..STEPS * 20 {
                tokio::time::sleep(STEP).await;
            }
            end.send(()).unwrap();
        });
        let blocking = async { ended.recv().unwrap() };
        assert_eq!(within_steps(DEADLINE, STEPS, blocking).await, None);
    }
}
