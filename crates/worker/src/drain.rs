//! How a worker is told to stop.

use std::future::Future;

use tokio::sync::watch;

/// How far a worker is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// It receives.
    Running,
    /// It receives nothing any more; handlers may finish within the grace.
    Draining,
    /// The grace is cut short: handlers that still run are dropped.
    Over,
}

/// Tells a worker to stop, from anywhere. Cheap to clone.
///
/// ```no_run
/// # async fn example(worker: anybroker_worker::Worker) -> anybroker_core::Result<()> {
/// let shutdown = worker.shutdown_handle();
/// let running = tokio::spawn(worker.run());
/// shutdown.drain();
/// let report = running.await.expect("the worker does not panic")?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct ShutdownHandle(watch::Sender<Stage>);

impl ShutdownHandle {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(Stage::Running))
    }

    /// Stops receiving and lets running handlers finish within the worker's grace. Deliveries that wait for a
    /// handler go back at once, uncounted.
    pub fn drain(&self) {
        self.raise(Stage::Draining);
    }

    /// As [`drain`](Self::drain), and ends the grace at once: handlers that still run are dropped, and their messages
    /// come back uncounted.
    pub fn cut_short(&self) {
        self.raise(Stage::Over);
    }

    /// Whether it was told to stop.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        *self.0.borrow() != Stage::Running
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Stage> {
        self.0.subscribe()
    }

    fn raise(&self, stage: Stage) {
        self.0.send_if_modified(|current| {
            let later = stage > *current;
            if later {
                *current = stage;
            }
            later
        });
    }
}

/// SIGTERM and Ctrl-C: the first drains, the second cuts the grace short.
pub(crate) async fn obey(mut signals: Signals, shutdown: ShutdownHandle) {
    let name = signals.next().await;
    tracing::info!(signal = name, "draining; a second signal ends it at once");
    shutdown.drain();
    let name = signals.next().await;
    tracing::warn!(signal = name, "grace cut short");
    shutdown.cut_short();
}

/// Drains when `future` is over.
pub(crate) async fn drain_after(shutdown: ShutdownHandle, future: impl Future<Output = ()> + Send) {
    future.await;
    shutdown.drain();
}

/// The signals by which a process is told to stop; they are caught from the moment this exists.
#[cfg(unix)]
pub(crate) struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    pub(crate) fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// The signals by which a process is told to stop.
#[cfg(not(unix))]
pub(crate) struct Signals;

#[cfg(not(unix))]
impl Signals {
    #[allow(clippy::unnecessary_wraps, reason = "as on unix")]
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> &'static str {
        if tokio::signal::ctrl_c().await.is_err() {
            // Without a handler nobody can tell us to stop this way.
            std::future::pending::<()>().await;
        }
        "Ctrl-C"
    }
}
