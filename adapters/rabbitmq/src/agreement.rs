//! Whether the members of a group agree about order.
//!
//! Members that keep order stand at a queue of their own, and one of them works ([`crate::owner`]); members that keep none just
//! consume from the group's queue. Together they would break the order that some of them have promised. So each shows itself
//! as a consumer of the one queue or of the other, and looks for the others then: of two that come at the same time one
//! sees the other at least.

use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Result};
use tokio::time::Instant;

use crate::names::Names;
use crate::owner::NO_ANSWER;
use crate::topology::Topology;

/// How long the consumers of members that have just gone may still be counted.
const LINGERS: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);
/// How often a queue is asked that may not have answered.
const LOOKS: u32 = 3;

/// Refuses a member that would break the order of others, or have its own broken. For one that keeps order, before it stands; for one
/// that keeps none, at any time.
pub(crate) async fn agree(
    topology: &Topology,
    queue: &str,
    keeps_order: bool,
    operation: &'static str,
    deadline: Instant,
) -> Result<()> {
    let until = Instant::now() + LINGERS;
    loop {
        let keepers = consumers(topology, &Names::owner(queue), operation, deadline).await?;
        let disagrees = match (keeps_order, keepers) {
            (false, keepers) => keepers > 0,
            // Who consumes from the group's queue is one of them.
            (true, 1..) => false,
            (true, 0) => consumers(topology, queue, operation, deadline).await? > 0,
        };
        if !disagrees {
            return Ok(());
        }
        if Instant::now() + PAUSE >= until.min(deadline) {
            let others = if keeps_order { "no order" } else { "order" };
            let text = format!("the group has members that keep {others}; ask for the same, or end them first");
            return Err(Error::new(ErrorKind::AlreadyExists, operation, text).with("queue", queue));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether members that keep order are there.
pub(crate) async fn is_kept(
    topology: &Topology,
    queue: &str,
    operation: &'static str,
    deadline: Instant,
) -> Result<bool> {
    Ok(consumers(topology, &Names::owner(queue), operation, deadline).await? > 0)
}

/// None where there is no such queue.
async fn consumers(topology: &Topology, queue: &str, operation: &'static str, deadline: Instant) -> Result<u32> {
    let mut found = None;
    for _ in 0..LOOKS {
        let asked = Instant::now();
        found = topology.look(queue, operation, deadline).await?;
        // No answer of the queue's, or a line on which every answer takes that long.
        if found != Some((0, 0)) || asked.elapsed() < NO_ANSWER {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(found.map_or(0, |(_, consumers)| consumers))
}
