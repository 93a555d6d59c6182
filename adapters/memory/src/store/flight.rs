//! What is handed out and not settled.

use anybroker_core::Timestamp;

use super::pending::History;

/// "No such slot, key or member."
pub(crate) const NONE: u32 = u32::MAX;

/// The deliveries of a group that are out. A slot is found again by its number; its generation tells whether it is still
/// the same delivery, so that a late settle harms nobody.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    slots: Vec<Slot>,
    free: Vec<u32>,
    generation: u64,
}

/// One delivery that is out.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) sequence: u64,
    /// 0 while the slot is free.
    generation: u64,
    pub(crate) lease_until: Timestamp,
    pub(crate) handed_at: Timestamp,
    pub(crate) history: Option<Box<History>>,
    pub(crate) attempt: u32,
    pub(crate) deliveries: u32,
    pub(crate) member: u32,
    pub(crate) key: u32,
    before: u32,
    behind: u32,
}

/// The slots of one member, by the end of their lease: a list threaded through the slots, so that settling in any order
/// costs nothing but the unlinking. Leases of one member are equally long, so that a new one belongs at the end.
#[derive(Debug)]
pub(crate) struct Leases {
    first: u32,
    last: u32,
}

impl Default for Leases {
    fn default() -> Self {
        Self { first: NONE, last: NONE }
    }
}

impl Slot {
    pub(crate) fn new(sequence: u64, attempt: u32, deliveries: u32, history: Option<Box<History>>) -> Self {
        Self {
            sequence,
            generation: 0,
            lease_until: Timestamp::default(),
            handed_at: Timestamp::default(),
            history,
            attempt,
            deliveries,
            member: NONE,
            key: NONE,
            before: NONE,
            behind: NONE,
        }
    }
}

impl Flight {
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Slot)> {
        (0..).zip(&self.slots).filter(|(_, slot)| slot.generation != 0)
    }

    /// Hands one out: the number and generation by which it is settled.
    pub(crate) fn insert(&mut self, leases: &mut Leases, mut slot: Slot) -> (u32, u64) {
        self.generation += 1;
        let generation = self.generation;
        slot.generation = generation;
        let number = match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = slot;
                number
            }
            None => {
                self.slots.push(slot);
                u32::try_from(self.slots.len() - 1).expect("fewer deliveries are out than a u32 counts")
            }
        };
        self.link(leases, number);
        (number, generation)
    }

    /// The delivery, where it is still out.
    pub(crate) fn find(&self, number: u32, generation: u64) -> Option<&Slot> {
        self.slots.get(number as usize).filter(|slot| slot.generation == generation && generation != 0)
    }

    /// Takes a delivery back that [`find`](Self::find) has found.
    pub(crate) fn remove(&mut self, leases: &mut Leases, number: u32) -> Slot {
        self.unlink(leases, number);
        let slot = &mut self.slots[number as usize];
        let taken = Slot { history: slot.history.take(), ..*slot };
        slot.generation = 0;
        self.free.push(number);
        taken
    }

    /// Moves the end of a lease.
    pub(crate) fn extend(&mut self, leases: &mut Leases, number: u32, until: Timestamp) {
        self.unlink(leases, number);
        self.slots[number as usize].lease_until = until;
        self.link(leases, number);
    }

    /// The member's delivery whose lease ends first.
    pub(crate) fn first(&self, leases: &Leases) -> Option<(u32, Timestamp)> {
        self.slots.get(leases.first as usize).map(|slot| (leases.first, slot.lease_until))
    }

    fn link(&mut self, leases: &mut Leases, number: u32) {
        let until = self.slots[number as usize].lease_until;
        let mut before = leases.last;
        while before != NONE && self.slots[before as usize].lease_until > until {
            before = self.slots[before as usize].before;
        }
        let behind = match before {
            NONE => std::mem::replace(&mut leases.first, number),
            _ => std::mem::replace(&mut self.slots[before as usize].behind, number),
        };
        match behind {
            NONE => leases.last = number,
            _ => self.slots[behind as usize].before = number,
        }
        let slot = &mut self.slots[number as usize];
        (slot.before, slot.behind) = (before, behind);
    }

    fn unlink(&mut self, leases: &mut Leases, number: u32) {
        let slot = &self.slots[number as usize];
        let (before, behind) = (slot.before, slot.behind);
        match before {
            NONE => leases.first = behind,
            _ => self.slots[before as usize].behind = behind,
        }
        match behind {
            NONE => leases.last = before,
            _ => self.slots[behind as usize].before = before,
        }
    }
}
