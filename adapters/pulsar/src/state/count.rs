//! How often messages of one feed were handed out, and what has to be stored before one is handed out.

use std::collections::{BTreeMap, HashMap};

use super::{Entry, Place, Shared, State};
use crate::hand_overs::{At, RESERVED};

/// More counts are not kept: the oldest are forgotten.
const MOST: usize = 100_000;

/// Of one feed.
#[derive(Default)]
pub(crate) struct Count {
    /// Up to there the group may have handed out.
    reserved: Option<At>,
    /// Up to there others may have handed out before this member came.
    suspect: Option<At>,
    /// The furthest that has arrived.
    highest: Option<At>,
    /// What is known of single messages.
    times: BTreeMap<Place, u32>,
    /// Something is being stored.
    is_busy: bool,
    /// It is that messages are handed out once more.
    is_announcing: bool,
}

/// What has to be stored.
pub(crate) enum Wanted {
    /// That everything from there on, for a good way, may be handed out.
    Reserve { feed: u32, from: At },
    /// That these are handed out once more.
    Note { feed: u32, keys: Vec<u64> },
}

impl Wanted {
    pub(crate) fn feed(&self) -> u32 {
        match self {
            Self::Reserve { feed, .. } | Self::Note { feed, .. } => *feed,
        }
    }
}

/// What the next message of a feed needs.
pub(super) enum Need {
    Nothing,
    /// It may be handed out; the reservation should be renewed soon.
    Soon(At),
    Reserve(At),
    Note(Vec<u64>),
    /// Something is being stored already.
    Wait,
}

impl Need {
    pub(super) fn must_wait(&self) -> bool {
        matches!(self, Self::Reserve(_) | Self::Note(_) | Self::Wait)
    }

    /// Whether messages are announced: it will be stored that they are handed out.
    pub(super) fn announces(&self) -> bool {
        matches!(self, Self::Note(_))
    }

    pub(super) fn wanted(self, feed: usize) -> Option<Wanted> {
        let feed = u32::try_from(feed).expect("a subscription has few topics");
        match self {
            Self::Soon(from) | Self::Reserve(from) => Some(Wanted::Reserve { feed, from }),
            Self::Note(keys) => Some(Wanted::Note { feed, keys }),
            Self::Nothing | Self::Wait => None,
        }
    }
}

impl Count {
    /// A consumer is there, and everything was read.
    pub(super) fn attached(&mut self) {
        self.suspect = self.reserved;
        self.highest = None;
    }

    /// Whether others may have handed it out before. `may_overtake`: what comes late does not come from another member.
    pub(super) fn arrived(&mut self, place: Place, may_overtake: bool) -> bool {
        let at = Some((place.0, place.1));
        let comes_late = !may_overtake && at < self.highest;
        self.highest = self.highest.max(at);
        at <= self.suspect || comes_late || self.times.contains_key(&place)
    }

    /// Whether something is being stored.
    pub(super) fn is_storing(&self) -> bool {
        self.is_busy
    }

    pub(super) fn settled(&mut self, place: Place) {
        self.times.remove(&place);
    }

    /// What the first of `ready` needs, and those behind it that need the same. `may_announce`: no other feed has announced something
    /// that is not out yet.
    pub(super) fn before(
        &mut self,
        ready: &BTreeMap<Place, u64>,
        entries: &HashMap<u64, Entry>,
        room: usize,
        may_announce: bool,
    ) -> Need {
        let Some((place, key)) = ready.first_key_value() else { return Need::Nothing };
        let at = (place.0, place.1);
        let need = if entries[key].needs_note() {
            if !may_announce {
                return Need::Wait;
            }
            let keys = ready.values().take_while(|key| entries[*key].needs_note()).take(room).copied();
            Need::Note(keys.collect())
        } else if Some(at) > self.reserved {
            Need::Reserve(at)
        } else if self.reserved.is_some_and(|end| end.0 == at.0 && end.1 < at.1 + RESERVED / 2) && !self.is_busy {
            Need::Soon(at)
        } else {
            return Need::Nothing;
        };
        if std::mem::replace(&mut self.is_busy, true) {
            return Need::Wait;
        }
        self.is_announcing = need.announces();
        need
    }

    fn keep(&mut self, place: Place, times: u32) {
        let known = self.times.entry(place).or_default();
        *known = times.max(*known);
        if self.times.len() > MOST {
            self.times.pop_first();
        }
    }
}

impl Entry {
    fn needs_note(&self) -> bool {
        (self.is_suspect || self.hand_overs > 0) && self.noted <= self.hand_overs
    }

    /// It is stored that it is handed out, which has not been done yet.
    pub(super) fn is_announced(&self) -> bool {
        self.noted > self.hand_overs
    }

    /// Hand-overs without an outcome, before the one that is going on.
    pub(super) fn lost(&self) -> u32 {
        self.notes.lost + self.hand_overs.saturating_sub(1 + self.in_place)
    }
}

impl State {
    /// Which feed has announced messages that are not out yet. Until they are, no other one announces any: whatever the application does
    /// with what it has got first, the others would count as handed out and never were.
    pub(super) fn announcing(&self) -> Option<usize> {
        self.feeds.iter().position(|feed| {
            let Some(count) = &feed.count else { return false };
            let is_announced = |(_, key): (&Place, &u64)| self.entries[key].is_announced();
            let announces = count.is_announcing || feed.ready.first_key_value().is_some_and(is_announced);
            // Last, because it looks at the connection: mostly nothing is announced.
            announces && !feed.is_leaving && !feed.is_cut_off()
        })
    }

    /// Keeps the count of what leaves this member unsettled.
    pub(super) fn keep_count(&mut self, entry: &Entry) {
        if let Some(count) = &mut self.feeds[entry.feed as usize].count
            && entry.hand_overs > 0
        {
            count.keep(entry.place(), entry.hand_overs);
        }
    }

    pub(super) fn remember(&mut self, feed: u32) {
        let Some(count) = &mut self.feeds[feed as usize].count else { return };
        let own = self.entries.values().filter(|entry| entry.feed == feed && entry.hand_overs > 0);
        own.for_each(|entry| count.keep(entry.place(), entry.hand_overs));
    }
}

impl Shared {
    fn counted<T>(&self, feed: u32, with: impl FnOnce(&mut Count) -> T) -> Option<T> {
        self.lock().feeds.get_mut(feed as usize)?.count.as_mut().map(with)
    }

    /// Everything up to there may have been handed out.
    pub(crate) fn reserved(&self, feed: u32, up_to: At) {
        self.counted(feed, |count| count.reserved = count.reserved.max(Some(up_to)));
    }

    /// Somebody has noted that a message was handed out so often.
    pub(crate) fn seen(&self, feed: u32, place: Place, times: u32) {
        self.counted(feed, |count| count.keep(place, times));
    }

    /// How often those that are here still were handed out, and where they lie.
    pub(crate) fn hand_overs(&self, keys: &[u64]) -> Vec<(u64, Place, u32)> {
        let state = self.lock();
        let times = |key: &u64| {
            let entry = state.entries.get(key)?;
            let count = state.feeds[entry.feed as usize].count.as_ref()?;
            let known = count.times.get(&entry.place()).copied().unwrap_or(0);
            Some((*key, entry.place(), entry.hand_overs.max(known)))
        };
        keys.iter().filter_map(times).collect()
    }

    /// That each is handed out once more is stored.
    pub(crate) fn noted(&self, counts: &[(u64, Place, u32)]) {
        let mut state = self.lock();
        for (key, _, times) in counts {
            if let Some(entry) = state.entries.get_mut(key) {
                (entry.hand_overs, entry.noted) = (*times, times + 1);
            }
        }
    }

    /// What was wanted is done with.
    pub(crate) fn stored(&self, wanted: &Wanted) {
        self.counted(wanted.feed(), |count| (count.is_busy, count.is_announcing) = (false, false));
        self.arrived.notify_one();
        self.room.notify_waiters();
    }
}
