//! Keys that wait for a failed message of theirs.

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;

use crate::{Message, Order};

/// For adapters that give [`OnFailure::Block`](crate::OnFailure::Block) within a member: which messages of one lane failed, and
/// which wait behind them. `P` is a message's place in the lane.
///
/// It keeps places alone, and only of what is with the member: bounding that is the adapter's part.
#[derive(Debug)]
pub struct Blocks<P> {
    order: Order,
    scopes: HashMap<Bytes, Scope<P>>,
    behind: usize,
}

/// Places of one key; of all keys, under total order.
#[derive(Debug)]
struct Scope<P> {
    /// Failed, and not settled for good.
    failed: BTreeSet<P>,
    /// Behind a failed one.
    behind: BTreeSet<P>,
}

impl<P: Ord + Copy> Blocks<P> {
    /// For a subscription with that order: a failure holds back its key, or everything under [`Order::Total`].
    #[must_use]
    pub fn new(order: Order) -> Self {
        Self { order, scopes: HashMap::new(), behind: 0 }
    }

    fn scope_of(&self, message: &Message) -> Option<Bytes> {
        match self.order {
            Order::None => None,
            Order::Key => message.key_bytes().cloned(),
            Order::Total => Some(Bytes::new()),
        }
    }

    /// Whether anything would wait for a failure of this message: one without a key has no order to keep.
    #[must_use]
    pub fn can_block(&self, message: &Message) -> bool {
        match self.order {
            Order::None => false,
            Order::Key => message.key_bytes().is_some(),
            Order::Total => true,
        }
    }

    /// The message failed: from here on what is behind it waits.
    pub fn fail(&mut self, message: &Message, place: P) {
        if let Some(scope) = self.scope_of(message) {
            let scope = self.scopes.entry(scope);
            let scope = scope.or_insert_with(|| Scope { failed: BTreeSet::new(), behind: BTreeSet::new() });
            scope.failed.insert(place);
        }
    }

    /// Whether the message has to wait for one that failed before it; then that is noted.
    pub fn holds_back(&mut self, message: &Message, place: P) -> bool {
        if self.scopes.is_empty() {
            return false;
        }
        let Some(scope) = self.scope_of(message).and_then(|scope| self.scopes.get_mut(&scope)) else { return false };
        let waits = scope.failed.first().is_some_and(|first| *first < place);
        if waits && scope.behind.insert(place) {
            self.behind += 1;
        }
        waits
    }

    /// The message is settled for good, or is not with the member any more, or has not failed after all. Answers what may
    /// be handed out now and was told to wait, in order.
    pub fn leave(&mut self, message: &Message, place: P) -> Vec<P> {
        if self.scopes.is_empty() {
            return Vec::new();
        }
        let Some(key) = self.scope_of(message) else { return Vec::new() };
        let Some(scope) = self.scopes.get_mut(&key) else { return Vec::new() };
        self.behind -= usize::from(scope.behind.remove(&place));
        if !scope.failed.remove(&place) {
            return Vec::new();
        }
        let free = match scope.failed.first().copied() {
            None => std::mem::take(&mut scope.behind),
            Some(first) => {
                let later = scope.behind.split_off(&first);
                let mut free = std::mem::replace(&mut scope.behind, later);
                // The next one that failed waits for nobody.
                free.extend(scope.behind.take(&first));
                free
            }
        };
        if scope.failed.is_empty() {
            self.scopes.remove(&key);
        }
        self.behind -= free.len();
        free.into_iter().collect()
    }

    /// How many wait behind failed ones.
    #[must_use]
    pub fn behind(&self) -> usize {
        self.behind
    }

    /// Nothing of the lane is with the member any more.
    pub fn clear(&mut self) {
        self.scopes.clear();
        self.behind = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(key: Option<&'static str>) -> Message {
        let message = Message::new("d", "");
        match key {
            Some(key) => message.with_key(key),
            None => message,
        }
    }

    #[test]
    fn what_is_behind_a_failed_one_of_its_key_waits_until_that_has_left() {
        let (mut blocks, a, b) = (Blocks::new(Order::Key), of(Some("a")), of(Some("b")));
        blocks.fail(&a, 3);
        assert!(!blocks.holds_back(&a, 2) && !blocks.holds_back(&a, 3), "what is not behind it");
        assert!(!blocks.holds_back(&b, 4), "another key");
        assert!(blocks.holds_back(&a, 7) && blocks.holds_back(&a, 5) && blocks.holds_back(&a, 5));
        assert_eq!(blocks.behind(), 2);
        assert_eq!(blocks.leave(&a, 2), Vec::<u64>::new(), "one that has not failed holds nobody back");
        assert_eq!(blocks.leave(&a, 3), [5, 7]);
        assert!(!blocks.holds_back(&a, 8));
        assert_eq!(blocks.behind(), 0);
    }

    #[test]
    fn the_first_of_several_failed_ones_holds_the_others_back() {
        let (mut blocks, a) = (Blocks::new(Order::Key), of(Some("a")));
        blocks.fail(&a, 5);
        blocks.fail(&a, 3);
        for place in [4, 5, 6] {
            assert!(blocks.holds_back(&a, place), "{place}");
        }
        assert_eq!(blocks.leave(&a, 3), [4, 5]);
        assert_eq!(blocks.behind(), 1);
        assert_eq!(blocks.leave(&a, 6), Vec::<u64>::new(), "one that waits can leave");
        assert_eq!(blocks.behind(), 0);
        assert_eq!(blocks.leave(&a, 5), Vec::<u64>::new());
    }

    #[test]
    fn under_total_order_all_keys_wait_and_without_a_key_nothing_waits_otherwise() {
        let mut total = Blocks::new(Order::Total);
        total.fail(&of(None), 1);
        assert!(total.holds_back(&of(Some("a")), 2));
        total.clear();
        assert!(!total.holds_back(&of(Some("a")), 2));
        let mut keyed = Blocks::new(Order::Key);
        assert!(!keyed.can_block(&of(None)) && keyed.can_block(&of(Some("a"))) && total.can_block(&of(None)));
        keyed.fail(&of(None), 1);
        assert!(!keyed.holds_back(&of(None), 2));
    }
}
