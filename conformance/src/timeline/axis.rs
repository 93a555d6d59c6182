//! Where moments stand on the page. Histories are bursts with long waits between them: drawn to scale a burst would be one
//! point, so each gap gets room that grows with its logarithm, and long ones say how long they are.

/// From a moment to its place.
pub(super) struct Axis {
    /// Moments, and the place of each.
    places: Vec<(u64, f64)>,
}

/// Room for what happens at one moment: the fewer there are, the more each has.
const LEAST: std::ops::RangeInclusive<f64> = 7.0..=30.0;
/// What a few moments share.
const PAGE: f64 = 1_200.0;
const MOST: f64 = 110.0;

impl Axis {
    pub(super) fn new(mut moments: Vec<u64>) -> Self {
        moments.sort_unstable();
        moments.dedup();
        #[allow(clippy::cast_precision_loss, reason = "a place on a page")]
        let least = (PAGE / moments.len().max(1) as f64).clamp(*LEAST.start(), *LEAST.end());
        let mut places: Vec<(u64, f64)> = Vec::with_capacity(moments.len());
        for moment in moments {
            let place = places.last().map_or(0.0, |&(before, place)| place + least + room(moment - before));
            places.push((moment, place));
        }
        Self { places }
    }

    /// The place of a moment that the axis was made of; of any other, that of the one before.
    pub(super) fn place(&self, moment: u64) -> f64 {
        let after = self.places.partition_point(|(other, _)| *other <= moment);
        after.checked_sub(1).map_or(0.0, |index| self.places[index].1)
    }

    pub(super) fn width(&self) -> f64 {
        self.places.last().map_or(0.0, |(_, place)| *place)
    }

    /// Moments to write down, far enough from each other to be read.
    pub(super) fn ticks(&self) -> Vec<(u64, f64)> {
        let mut ticks: Vec<(u64, f64)> = Vec::new();
        for &(moment, place) in &self.places {
            if ticks.last().is_none_or(|(_, last)| place - last >= 84.0) {
                ticks.push((moment, place));
            }
        }
        ticks
    }
}

#[allow(clippy::cast_precision_loss, reason = "a place on a page")]
fn room(micros: u64) -> f64 {
    let tenths = micros as f64 / 100.0;
    (6.0 * (1.0 + tenths).log2()).min(MOST - LEAST.end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_moments_stand_further_right_and_a_long_wait_takes_little_more_room_than_a_short_one() {
        let axis = Axis::new(vec![0, 10, 10, 1_000, 5_000_000, 5_000_010]);
        let places: Vec<f64> = [0, 10, 1_000, 5_000_000, 5_000_010].iter().map(|at| axis.place(*at)).collect();
        assert!(
            places.windows(2).all(|pair| pair[1] - pair[0] >= *LEAST.start() && pair[1] - pair[0] <= MOST),
            "{places:?}"
        );
        assert_eq!(axis.place(999), axis.place(10));
    }
}
