//! Which group a destination belongs to, where a destination is a queue of one group.

use std::collections::HashMap;
use std::sync::LazyLock;

use anybroker_core::{Destination, Error, Group, Result};
use parking_lot::Mutex;

static OWNERS: LazyLock<Mutex<HashMap<Destination, Group>>> = LazyLock::new(Mutex::default);

/// Takes a destination's queue for its one group.
///
/// # Errors
/// `Unsupported` for a second group.
pub fn one_group(destination: &Destination, group: &Group, operation: &'static str) -> Result<()> {
    let mut owners = OWNERS.lock();
    let found = owners.entry(destination.clone()).or_insert_with(|| group.clone());
    if found == group { Ok(()) } else { Err(Error::unsupported(operation, "a queue has one group")) }
}

/// Whether it is the destination's one group.
#[must_use]
pub fn is_owner(destination: &Destination, group: &Group) -> bool {
    OWNERS.lock().get(destination) == Some(group)
}

/// Forgets the destination's group.
pub fn disown(destination: &Destination) {
    OWNERS.lock().remove(destination);
}
