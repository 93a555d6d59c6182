//! What a case has done to the server, so that it is undone also when the case does not come to its end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::{BoxFuture, join_all};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::ServerControl;

/// How long a server that was left behind may take to be as it was.
const RESTORED_WITHIN: Duration = Duration::from_secs(180);

/// A server that remembers what lasts. A call goes on when nobody waits for it any more: otherwise a command that was given up half-way
/// could take effect after what undoes it.
pub(crate) struct Watched {
    control: Arc<dyn ServerControl>,
    /// Of the server as a whole, and then of each node: what is done to one waits for no other.
    lasting: Vec<Arc<Mutex<Lasting>>>,
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
    NodeKilled(u32),
    NodeFrozen(u32),
}

impl Fault {
    /// The node that it is a fault of.
    fn node(self) -> Option<u32> {
        match self {
            Self::NodeKilled(node) | Self::NodeFrozen(node) => Some(node),
            _ => None,
        }
    }

    fn begin(self, control: &dyn ServerControl) -> BoxFuture<'_, Result<(), String>> {
        match self {
            Self::Killed => control.kill(),
            Self::Frozen => control.pause(),
            Self::Full => control.fill(),
            Self::Locked => control.lock_out(),
            Self::NodeKilled(node) => control.kill_node(node),
            Self::NodeFrozen(node) => control.pause_node(node),
        }
    }

    fn undo(self, control: &dyn ServerControl) -> BoxFuture<'_, Result<(), String>> {
        match self {
            Self::Killed => control.restart(),
            Self::Frozen => control.resume(),
            Self::Full => control.relieve(),
            Self::Locked => control.let_in(),
            Self::NodeKilled(node) => control.restart_node(node),
            Self::NodeFrozen(node) => control.resume_node(node),
        }
    }

    fn left(self) -> &'static str {
        match self {
            Self::Killed | Self::NodeKilled(_) => "killed",
            Self::Frozen | Self::NodeFrozen(_) => "frozen",
            Self::Full => "without room",
            Self::Locked => "closed to its clients",
        }
    }
}

impl Watched {
    pub(crate) fn new(control: Arc<dyn ServerControl>) -> Self {
        let lasting = (0..=control.nodes().unwrap_or(0)).map(|_| Arc::default()).collect();
        Self { control, lasting }
    }

    /// Undoes whatever lasts still, when what is under way has ended.
    ///
    /// # Errors
    /// How the server is left, and why.
    pub(crate) async fn restore(&self) -> Result<(), String> {
        // A node may serve only when others do.
        let restoring = join_all(self.lasting.iter().map(|lasting| self.restore_part(lasting)));
        match tokio::time::timeout(RESTORED_WITHIN, restoring).await {
            Ok(left) if left.iter().all(Vec::is_empty) => Ok(()),
            Ok(left) => Err(left.concat().join("; ")),
            Err(_) => Err(format!("the server is not as it was {RESTORED_WITHIN:?} after the case")),
        }
    }

    async fn restore_part(&self, lasting: &Mutex<Lasting>) -> Vec<String> {
        let mut left = Vec::new();
        for (fault, is_certain) in std::mem::take(&mut *lasting.lock().await) {
            let control = Arc::clone(&self.control);
            let undone = tokio::spawn(async move { fault.undo(control.as_ref()).await }).await;
            // A panic there is no reason to run no case any more.
            if let Err(why) = undone.unwrap_or_else(|panic| Err(panic.to_string()))
                && is_certain
            {
                let what = fault.node().map_or_else(|| "the server".to_owned(), |node| format!("node {node}"));
                left.push(format!("{what} is left {}: {why}", fault.left()));
            }
        }
        left
    }

    async fn lasting(&self, fault: Fault) -> Result<OwnedMutexGuard<Lasting>, String> {
        let part = match fault.node() {
            None => self.lasting.first(),
            // Where there are no nodes the server itself says so.
            Some(_) if self.lasting.len() == 1 => self.lasting.first(),
            Some(0) => None,
            Some(node) => usize::try_from(node).ok().and_then(|node| self.lasting.get(node)),
        };
        let part = part.ok_or_else(|| format!("there is no node {}", fault.node().unwrap_or(0)))?;
        Ok(Arc::clone(part).lock_owned().await)
    }

    async fn begin(&self, fault: Fault) -> Result<(), String> {
        let (control, mut lasting) = (Arc::clone(&self.control), self.lasting(fault).await?);
        let begin = async move {
            lasting.insert(fault, false);
            let begun = fault.begin(control.as_ref()).await;
            lasting.insert(fault, begun.is_ok());
            begun
        };
        detached(begin).await
    }

    async fn undo(&self, fault: Fault) -> Result<(), String> {
        let (control, mut lasting) = (Arc::clone(&self.control), self.lasting(fault).await?);
        let undo = async move {
            fault.undo(control.as_ref()).await?;
            lasting.remove(&fault);
            Ok(())
        };
        detached(undo).await
    }

    /// Starting a node again may begin with ending it: from then on it is to be started.
    async fn start_again(&self, node: u32) -> Result<(), String> {
        let fault = Fault::NodeKilled(node);
        let (control, mut lasting) = (Arc::clone(&self.control), self.lasting(fault).await?);
        let restart = async move {
            lasting.entry(fault).or_insert(false);
            fault.undo(control.as_ref()).await?;
            lasting.remove(&fault);
            Ok(())
        };
        detached(restart).await
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

    fn nodes(&self) -> Result<u32, String> {
        self.control.nodes()
    }

    async fn kill_node(&self, node: u32) -> Result<(), String> {
        self.begin(Fault::NodeKilled(node)).await
    }

    async fn restart_node(&self, node: u32) -> Result<(), String> {
        self.start_again(node).await
    }

    async fn pause_node(&self, node: u32) -> Result<(), String> {
        self.begin(Fault::NodeFrozen(node)).await
    }

    async fn resume_node(&self, node: u32) -> Result<(), String> {
        self.undo(Fault::NodeFrozen(node)).await
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
        fn nodes(&self) -> Result<u32, String> {
            Ok(3)
        }
        async fn kill_node(&self, node: u32) -> Result<(), String> {
            self.note(["kill 1", "kill 2", "kill 3"][node as usize - 1])
        }
        /// Node 3 serves only when node 2 does.
        async fn restart_node(&self, node: u32) -> Result<(), String> {
            match node {
                2 => self.may_end.notify_one(),
                3 => self.may_end.notified().await,
                _ => {}
            }
            self.note(["restart 1", "restart 2", "restart 3"][node as usize - 1])
        }
        async fn pause_node(&self, node: u32) -> Result<(), String> {
            self.note(["pause 1", "pause 2", "pause 3"][node as usize - 1])
        }
        async fn resume_node(&self, node: u32) -> Result<(), String> {
            self.note(["resume 1", "resume 2", "resume 3"][node as usize - 1])
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

    #[tokio::test]
    async fn each_node_is_restored_by_itself_and_may_wait_for_another() {
        let (noted, server) = watched();
        server.pause_node(1).await.unwrap();
        server.kill_node(1).await.unwrap();
        server.restart_node(1).await.unwrap();
        server.kill_node(3).await.unwrap();
        server.kill_node(2).await.unwrap();
        assert_eq!(server.kill_node(4).await.unwrap_err(), "there is no node 4");
        assert_eq!(server.pause_node(0).await.unwrap_err(), "there is no node 0");
        server.restore().await.unwrap();
        server.restore().await.unwrap();
        let told = noted.told.lock();
        assert_eq!(told[..5], ["pause 1", "kill 1", "restart 1", "kill 3", "kill 2"]);
        assert_eq!(told[5..].iter().collect::<std::collections::BTreeSet<_>>().len(), 3, "{told:?}");
        assert!(told[5..].contains(&"resume 1") && told.ends_with(&["restart 3"]), "{told:?}");
    }

    #[tokio::test]
    async fn a_node_whose_orderly_restart_failed_is_started_again() {
        let (noted, server) = watched();
        noted.breaks.store(true, Ordering::Relaxed);
        server.restart_node(2).await.unwrap_err();
        noted.breaks.store(false, Ordering::Relaxed);
        server.restore().await.unwrap();
        server.kill_node(1).await.unwrap();
        noted.breaks.store(true, Ordering::Relaxed);
        assert_eq!(server.restore().await.unwrap_err(), "node 1 is left killed: broken");
        assert_eq!(*noted.told.lock(), ["restart 2", "restart 2", "kill 1", "restart 1"]);
    }
}
