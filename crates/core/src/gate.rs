//! A gate that closes once, and lets those who are inside finish: what a connection is that is being closed.

use tokio::sync::watch;
use tokio::time::Instant;

/// Whether a connection is closed, and how many calls are inside: one that began before the close is handed over whole, so
/// that the connection must not end under it. For adapters.
///
/// ```
/// # use anybroker_core::gate::Gate;
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let gate = Gate::default();
/// let call = gate.enter().expect("it is open");
/// assert!(gate.close());
/// assert!(gate.enter().is_none(), "who comes now is told so");
/// drop(call);
/// assert!(gate.empty(tokio::time::Instant::now()).await);
/// # }
/// ```
#[derive(Debug)]
pub struct Gate(watch::Sender<(bool, usize)>);

impl Default for Gate {
    fn default() -> Self {
        Self(watch::Sender::new((false, 0)))
    }
}

/// Somebody inside, until it is dropped.
#[derive(Debug)]
pub struct Pass<'g>(&'g Gate);

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|(_, inside)| *inside -= 1);
    }
}

impl Gate {
    /// Lets somebody in, unless it is closed.
    #[must_use]
    pub fn enter(&self) -> Option<Pass<'_>> {
        let is_open = self.0.send_if_modified(|(is_closed, inside)| {
            *inside += usize::from(!*is_closed);
            !*is_closed
        });
        is_open.then(|| Pass(self))
    }

    /// Closes it; false where it was closed already.
    #[must_use]
    pub fn close(&self) -> bool {
        self.0.send_if_modified(|(is_closed, _)| !std::mem::replace(is_closed, true))
    }

    /// Waits until nobody is inside; false at the deadline.
    #[must_use]
    pub async fn empty(&self, deadline: Instant) -> bool {
        let mut state = self.0.subscribe();
        let emptied = state.wait_for(|(_, inside)| *inside == 0);
        tokio::time::timeout_at(deadline, emptied).await.is_ok()
    }
}
