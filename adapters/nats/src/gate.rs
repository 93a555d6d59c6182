//! A gate that closes once, and lets those who are inside finish.

use tokio::sync::watch;
use tokio::time::Instant;

/// Whether it is closed, and how many are inside.
pub(crate) struct Gate(watch::Sender<(bool, usize)>);

impl Default for Gate {
    fn default() -> Self {
        Self(watch::Sender::new((false, 0)))
    }
}

/// Somebody inside.
pub(crate) struct Pass<'g>(&'g Gate);

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|(_, inside)| *inside -= 1);
    }
}

impl Gate {
    /// Lets somebody in, unless it is closed.
    pub(crate) fn enter(&self) -> Option<Pass<'_>> {
        let is_open = self.0.send_if_modified(|(is_closed, inside)| {
            *inside += usize::from(!*is_closed);
            !*is_closed
        });
        is_open.then(|| Pass(self))
    }

    /// Closes it; false where it was closed already.
    pub(crate) fn close(&self) -> bool {
        self.0.send_if_modified(|(is_closed, _)| !std::mem::replace(is_closed, true))
    }

    /// Waits until nobody is inside; false at the deadline.
    pub(crate) async fn empty(&self, deadline: Instant) -> bool {
        let mut state = self.0.subscribe();
        let emptied = state.wait_for(|(_, inside)| *inside == 0);
        tokio::time::timeout_at(deadline, emptied).await.is_ok()
    }
}
