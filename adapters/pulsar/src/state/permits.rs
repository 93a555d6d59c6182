//! How many messages the broker may send for each feed. Permits cannot be taken back, so that a feed for which nothing comes
//! keeps what it was granted. Under a small bound the one permit of each idle source is not reckoned, so that a busy one may have
//! all of it; what then comes beyond it goes back, or waits here and is not handed out.

use super::{FeedState, MOST_WAITING, State};

/// Of what comes back to the group, a tenth of `max_in_flight` may be asked for, and so much at most: the group's own topics need
/// nearly all of it.
const MOST_BACK: usize = 100;

impl FeedState {
    /// What it takes of `max_in_flight`.
    fn used(&self) -> usize {
        self.permits + self.held
    }
}

impl State {
    /// How many more messages a feed should be granted.
    ///
    /// Half of `max_in_flight` is the sources' in equal parts, so that none of them waits for the others; the other half is for
    /// those that need it. What a source is granted at once doubles as long as it uses that up.
    /// What waits for a failed message takes room of its own, as long as that lasts.
    pub(super) fn wanted(&mut self, feed: u32, max_in_flight: usize) -> usize {
        let most = match self.kept {
            0 => max_in_flight,
            // With what its source was granted for nothing: it may have no more.
            kept => max_in_flight + (kept + max_in_flight).min(MOST_WAITING),
        };
        let alike = self.feeds[feed as usize].is_back;
        let number = self.feeds.iter().filter(|other| other.is_back == alike).count();
        let (least, free) = if alike {
            let least = (max_in_flight / 10).min(MOST_BACK).div_ceil(number).max(1);
            (least, most.saturating_sub(self.entries.len()))
        } else {
            let here: usize = self.out + self.feeds.iter().map(|other| other.ready.len()).sum::<usize>();
            if here >= max_in_flight {
                // What came now would go back at once, and come again.
                return 0;
            }
            let least = (max_in_flight / (2 * number)).max(1);
            let came_back: usize = self.feeds.iter().filter(|other| other.is_back).map(|other| other.held).sum();
            let others =
                self.feeds.iter().enumerate().filter(|(index, other)| !other.is_back && *index != feed as usize);
            let idle = usize::from(least == 1);
            let reckoned = |other: &FeedState| other.used().max(least) - other.permits.min(idle);
            let taken: usize = others.map(|(_, other)| reckoned(other)).sum();
            let bound = most.saturating_sub(taken + came_back).max(least);
            (least, bound.saturating_sub(self.feeds[feed as usize].used()))
        };
        let own = &mut self.feeds[feed as usize];
        let share = match own.share {
            0 => least,
            share if own.permits <= share / 2 && !own.is_back => (2 * share).min(max_in_flight),
            share => share,
        };
        let wanted = free.min(share.saturating_sub(own.permits));
        // Few large grants rather than many small ones.
        if wanted == 0 || (own.permits > 0 && wanted < share.div_ceil(2)) {
            return 0;
        }
        own.share = share;
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(sources: usize) -> State {
        let mut state = State::default();
        for index in 0..sources {
            let source = u32::try_from(2 * index).unwrap();
            state.feeds.push(FeedState::new("d".into(), "g".into(), false, source, false));
            state.feeds.push(FeedState::new("d".into(), "g".into(), true, source, false));
        }
        state
    }

    /// Grants a feed what it should have, as the broker is told.
    fn grant(state: &mut State, feed: u32, max: usize) -> usize {
        let wanted = state.wanted(feed, max);
        state.feeds[feed as usize].permits += wanted;
        wanted
    }

    /// Everything that a feed was granted comes.
    fn comes(state: &mut State, feed: u32) {
        let feed = &mut state.feeds[feed as usize];
        feed.held += std::mem::take(&mut feed.permits);
    }

    fn used(state: &State) -> usize {
        state.feeds.iter().filter(|feed| !feed.is_back).map(FeedState::used).sum()
    }

    #[test]
    fn one_busy_source_gets_what_idle_ones_do_not_need_and_a_bound_is_kept() {
        let mut state = state(8);
        for feed in 0..16 {
            assert!(grant(&mut state, feed, 1_000) > 0);
        }
        for _ in 0..20 {
            comes(&mut state, 4);
            grant(&mut state, 4, 1_000);
        }
        assert!(state.feeds[4].held >= 500, "{}", state.feeds[4].held);
        assert!(used(&state) <= 1_000);
        // Another one that becomes busy is not starved by it.
        comes(&mut state, 6);
        state.feeds[6].held = 0;
        assert!(grant(&mut state, 6, 1_000) >= 62);
    }

    #[test]
    fn a_single_source_may_have_all_of_a_small_bound() {
        for max in [1, 2, 3, 10] {
            let mut state = state(1);
            for _ in 0..10 {
                grant(&mut state, 0, max);
                comes(&mut state, 0);
            }
            assert_eq!(state.feeds[0].held, max);
        }
    }

    #[test]
    fn a_busy_source_may_have_all_of_a_small_bound_beside_idle_ones() {
        let mut state = state(3);
        for source in [0, 2, 4] {
            assert_eq!(grant(&mut state, source, 4), 1);
        }
        for _ in 0..10 {
            comes(&mut state, 0);
            grant(&mut state, 0, 4);
        }
        assert_eq!(state.feeds[0].held, 4);
    }

    #[test]
    fn each_source_has_one_on_its_way_under_a_bound_of_one() {
        let mut state = state(8);
        for source in (0..16).step_by(2) {
            assert_eq!(grant(&mut state, source, 1), 1);
        }
    }
}
