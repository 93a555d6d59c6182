//! Maps by numbers that this library or the server counts. A hash that nobody can foresee would cost more than the rest of a
//! look-up, and there is nobody to foresee it.

use std::hash::{BuildHasher, Hasher};

/// For maps by such numbers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Numbers;

impl BuildHasher for Numbers {
    type Hasher = Number;

    fn build_hasher(&self) -> Number {
        Number(0)
    }
}

/// Spreads what follows one another.
pub(crate) struct Number(u64);

impl Hasher for Number {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        // The fraction of the golden ratio.
        self.0 = (self.0.rotate_left(32) ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
