//! Ratios of what ran side by side, and how sure they are.

use serde::{Deserialize, Serialize};

/// A ratio with its 95 % interval: Student's t on the logarithms of the pairs' ratios.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Ratio {
    pub(crate) mean: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) pairs: usize,
}

impl Ratio {
    /// The geometric mean of `ratios`; nothing with fewer than two.
    #[allow(clippy::cast_precision_loss, reason = "counts are small")]
    pub(crate) fn of(ratios: impl Iterator<Item = f64>) -> Option<Self> {
        let logs: Vec<f64> = ratios.map(f64::ln).collect();
        let pairs = logs.len();
        if pairs < 2 || logs.iter().any(|log| !log.is_finite()) {
            return None;
        }
        let mean = logs.iter().sum::<f64>() / pairs as f64;
        let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / (pairs - 1) as f64;
        let half = student(pairs - 1) * (variance / pairs as f64).sqrt();
        Some(Self { mean: mean.exp(), low: (mean - half).exp(), high: (mean + half).exp(), pairs })
    }
}

impl std::fmt::Display for Ratio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3} ({:.3} to {:.3})", self.mean, self.low, self.high)
    }
}

/// The two-sided 95 % quantile of Student's t.
#[allow(clippy::cast_precision_loss, reason = "degrees of freedom are few")]
fn student(freedom: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
    ];
    // Beyond the table the first terms of its expansion are right to three digits.
    freedom.checked_sub(1).and_then(|at| TABLE.get(at).copied()).unwrap_or(1.960 + 2.5 / freedom as f64)
}

/// The middle one; of none, 0.
pub(crate) fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_student_on_logarithms() {
        let ratio = Ratio::of([1.0, 1.1, 1.21].into_iter()).unwrap();
        // Logarithms 0, l, 2l with l = ln 1.1: mean l, deviation l, half a width 4.303 l / √3.
        let log = 1.1_f64.ln();
        assert!((ratio.mean - 1.1).abs() < 1e-9);
        assert!((ratio.low.ln() - (log - 4.303 * log / 3.0_f64.sqrt())).abs() < 1e-9);
        assert!((ratio.high.ln() - (log + 4.303 * log / 3.0_f64.sqrt())).abs() < 1e-9);
    }

    #[test]
    fn one_pair_has_no_interval_and_neither_has_a_ratio_of_nothing() {
        assert!(Ratio::of([1.0].into_iter()).is_none());
        assert!(Ratio::of([1.0, 0.0].into_iter()).is_none());
    }
}
