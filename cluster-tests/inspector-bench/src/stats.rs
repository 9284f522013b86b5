//! Medians, and how sure they are.

use std::fmt;

use tidepool_effect_fuzz::rng::Rng;

/// A median with the interval in which it lies in 95 of 100 resamplings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, low, high } = self;
        write!(f, "{median:.4} ({low:.4}..{high:.4})")
    }
}

/// The value at a part (0 to 1) of the sorted list; not a number where that is empty.
pub(crate) fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let at = part * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * at.fract()
}

pub(crate) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The median and its interval, by the bootstrap, always with the same choices.
pub(crate) fn estimate(values: &[f64]) -> Estimate {
    let mut rng = Rng::new(1);
    let mut medians = Vec::with_capacity(1000);
    for _ in 0..1000 {
        let again: Vec<f64> = (0..values.len())
            .map(|_| values[rng.below(values.len() as u64) as usize])
            .collect();
        medians.push(median(&again));
    }
    Estimate {
        median: median(values),
        low: quantile(&medians, 0.025),
        high: quantile(&medians, 0.975),
    }
}

pub(crate) fn geometric_mean(values: &[f64]) -> f64 {
    let logs: f64 = values.iter().map(|v| v.ln()).sum();
    (logs / values.len() as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(median(&values), 2.5);
        assert_eq!(quantile(&values, 1.0), 4.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn an_estimate_encloses_its_median() {
        let values: Vec<f64> = (0..21).map(f64::from).collect();
        let e = estimate(&values);
        assert_eq!(e.median, 10.0);
        assert!(e.low < 10.0 && e.high > 10.0 && e.low >= 4.0 && e.high <= 16.0);
    }

    #[test]
    fn a_geometric_mean_of_inverses_is_one() {
        assert!((geometric_mean(&[2.0, 0.5]) - 1.0).abs() < 1e-12);
    }
}
