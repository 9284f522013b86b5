//! Middles, tails and rounding.

use std::time::Duration;

/// The middle one; of an even number the upper of the two. 0 of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    at(values, 0.5)
}

/// The value below which this part of them lies. 0 of nothing.
pub(crate) fn at(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len() as f64 * part) as usize;
    sorted
        .get(index.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(0.0)
}

/// Ratios of what was measured in the same rounds.
pub(crate) fn ratios(these: &[f64], those: &[f64]) -> Vec<f64> {
    these.iter().zip(those).map(|(a, b)| a / b).collect()
}

pub(crate) fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// MB a second.
pub(crate) fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / 1e6 / took.as_secs_f64()
}

/// Three digits behind the point.
pub(crate) fn round(v: f64) -> f64 {
    (v * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn middles_and_tails() {
        let values: Vec<f64> = (0..100).rev().map(f64::from).collect();
        assert_eq!((median(&values), at(&values, 0.99)), (50.0, 99.0));
        assert_eq!(
            (median(&[]), median(&[3.0]), at(&[3.0], 1.0)),
            (0.0, 3.0, 3.0)
        );
        assert_eq!(ratios(&[4.0, 9.0], &[2.0, 3.0]), [2.0, 3.0]);
    }
}
