//! What a case has done to the server, so that it is undone also when the case does not come to its end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use tokio::sync::Mutex;

use crate::ServerControl;

/// How long a server that was left behind may take to be as it was.
const RESTORED_WITHIN: Duration = Duration::from_secs(180);

/// A server that remembers what lasts. A call goes on when nobody waits for it any more: otherwise a command that was given up half-way
/// could take effect after what undoes it.
pub(crate) struct Watched {
    control: Arc<dyn ServerControl>,
    lasting: Arc<Mutex<Lasting>>,
}

/// Faults that have begun and are not over, and whether that is certain: one that failed may have done half of it.
type Lasting = BTreeMap<Fault, bool>;

/// In the order in which they are undone: only a server that runs is told anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Killed,
    Frozen,
    Full,
    Locked,
}

impl Fault {
    fn begin(self, control: &dyn ServerControl) -> BoxFuture<'_, Result<(), String>> {
        match self {
            Self::Killed => control.kill(),
            Self::Frozen => control.pause(),
            Self::Full => control.fill(),
            Self::Locked => control.lock_out(),
        }
    }

    fn undo(self, control: &dyn ServerControl) -> BoxFuture<'_, Result<(), String>> {
        match self {
            Self::Killed => control.restart(),
            Self::Frozen => control.resume(),
            Self::Full => control.relieve(),
            Self::Locked => control.let_in(),
        }
    }

    fn left(self) -> &'static str {
        match self {
            Self::Killed => "killed",
            Self::Frozen => "frozen",
            Self::Full => "without room",
            Self::Locked => "closed to its clients",
        }
    }
}

impl Watched {
    pub(crate) fn new(control: Arc<dyn ServerControl>) -> Self {
        Self { control, lasting: Arc::default() }
    }

    /// Undoes whatever lasts still, when what is under way has ended.
    ///
    /// # Errors
    /// How the server is left, and why.
    pub(crate) async fn restore(&self) -> Result<(), String> {
        let (control, lasting) = (Arc::clone(&self.control), Arc::clone(&self.lasting));
        let restoring = async move {
            let mut left = Vec::new();
            for (fault, is_certain) in std::mem::take(&mut *lasting.lock().await) {
                let control = Arc::clone(&control);
                let undone = tokio::spawn(async move { fault.undo(control.as_ref()).await }).await;
                // A panic there is no reason to run no case any more.
                if let Err(why) = undone.unwrap_or_else(|panic| Err(panic.to_string()))
                    && is_certain
                {
                    left.push(format!("the server is left {}: {why}", fault.left()));
                }
            }
            left
        };
        match tokio::time::timeout(RESTORED_WITHIN, restoring).await {
            Ok(left) if left.is_empty() => Ok(()),
            Ok(left) => Err(left.join("; ")),
            Err(_) => Err(format!("the server is not as it was {RESTORED_WITHIN:?} after the case")),
        }
    }

    async fn begin(&self, fault: Fault) -> Result<(), String> {
        let control = Arc::clone(&self.control);
        let begin = |mut lasting: tokio::sync::OwnedMutexGuard<Lasting>| async move {
            lasting.insert(fault, false);
            let begun = fault.begin(control.as_ref()).await;
            lasting.insert(fault, begun.is_ok());
            begun
        };
        detached(begin(Arc::clone(&self.lasting).lock_owned().await)).await
    }

    async fn undo(&self, fault: Fault) -> Result<(), String> {
        let control = Arc::clone(&self.control);
        let undo = |mut lasting: tokio::sync::OwnedMutexGuard<Lasting>| async move {
            fault.undo(control.as_ref()).await?;
            lasting.remove(&fault);
            Ok(())
        };
        detached(undo(Arc::clone(&self.lasting).lock_owned().await)).await
    }
}

/// Goes on when it is dropped. A panic is the caller's.
async fn detached<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(future).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

#[async_trait]
impl ServerControl for Watched {
    async fn kill(&self) -> Result<(), String> {
        self.begin(Fault::Killed).await
    }

    async fn restart(&self) -> Result<(), String> {
        self.undo(Fault::Killed).await
    }

    async fn pause(&self) -> Result<(), String> {
        self.begin(Fault::Frozen).await
    }

    async fn resume(&self) -> Result<(), String> {
        self.undo(Fault::Frozen).await
    }

    async fn fill(&self) -> Result<(), String> {
        self.begin(Fault::Full).await
    }

    async fn relieve(&self) -> Result<(), String> {
        self.undo(Fault::Full).await
    }

    async fn lock_out(&self) -> Result<(), String> {
        self.begin(Fault::Locked).await
    }

    async fn let_in(&self) -> Result<(), String> {
        self.undo(Fault::Locked).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::sync::Notify;

    use super::*;

    /// Notes what it is told. `fill` begins, and ends when it may; `let_in` fails.
    #[derive(Default)]
    struct Noted {
        told: parking_lot::Mutex<Vec<&'static str>>,
        begun: Notify,
        may_end: Notify,
        breaks: AtomicBool,
    }

    impl Noted {
        fn note(&self, told: &'static str) -> Result<(), String> {
            self.told.lock().push(told);
            if self.breaks.load(Ordering::Relaxed) { Err("broken".into()) } else { Ok(()) }
        }
    }

    #[async_trait]
    impl ServerControl for Noted {
        async fn kill(&self) -> Result<(), String> {
            self.note("kill")
        }
        async fn restart(&self) -> Result<(), String> {
            self.note("restart")
        }
        async fn pause(&self) -> Result<(), String> {
            self.note("pause")
        }
        async fn resume(&self) -> Result<(), String> {
            self.note("resume")
        }
        async fn fill(&self) -> Result<(), String> {
            self.begun.notify_one();
            self.may_end.notified().await;
            self.note("fill")
        }
        async fn relieve(&self) -> Result<(), String> {
            self.note("relieve")
        }
        async fn lock_out(&self) -> Result<(), String> {
            self.note("lock out")
        }
        async fn let_in(&self) -> Result<(), String> {
            self.note("let in")
        }
    }

    fn watched() -> (Arc<Noted>, Watched) {
        let noted = Arc::new(Noted::default());
        (Arc::clone(&noted), Watched::new(noted))
    }

    #[tokio::test]
    async fn what_lasts_is_undone_and_what_is_over_is_not_undone_again() {
        let (noted, server) = watched();
        server.lock_out().await.unwrap();
        server.pause().await.unwrap();
        server.kill().await.unwrap();
        server.resume().await.unwrap();
        server.restore().await.unwrap();
        server.restore().await.unwrap();
        assert_eq!(*noted.told.lock(), ["lock out", "pause", "kill", "resume", "restart", "let in"]);
    }

    #[tokio::test]
    async fn a_fault_that_was_given_up_while_it_began_is_undone_when_it_has_begun() {
        let (noted, server) = watched();
        let begun = tokio::select! {
            biased;
            ended = server.fill() => Some(ended),
            () = noted.begun.notified() => None,
        };
        assert_eq!(begun, None, "it does not end before it may");
        let restoring = async {
            noted.may_end.notify_one();
            server.restore().await.unwrap();
        };
        restoring.await;
        assert_eq!(*noted.told.lock(), ["fill", "relieve"]);
    }

    #[tokio::test]
    async fn what_cannot_be_undone_is_told_unless_nobody_knows_whether_it_began() {
        let (noted, server) = watched();
        server.lock_out().await.unwrap();
        noted.breaks.store(true, Ordering::Relaxed);
        server.pause().await.unwrap_err();
        let why = server.restore().await.unwrap_err();
        assert_eq!(why, "the server is left closed to its clients: broken");
        assert_eq!(*noted.told.lock(), ["lock out", "pause", "resume", "let in"]);
    }
}
