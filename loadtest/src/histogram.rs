//! Distributions that can be sent over a pipe and added up: percentiles of many processes are those of all samples, never an
//! average of percentiles.
//!
//! Memory: about 200 KiB each at three digits. Errors: pairs that are none are refused.

use hdrhistogram::Histogram;
use serde_json::Value;

/// Ten minutes in microseconds: the most that is told apart.
const HIGHEST: u64 = 600_000_000;

/// Samples of one quantity.
pub struct Distribution {
    samples: Histogram<u64>,
}

impl Distribution {
    /// None yet; values are told apart to `digits` digits.
    pub fn new(digits: u8) -> Distribution {
        let samples = Histogram::new_with_bounds(1, HIGHEST, digits).expect("the bounds are constants");
        Distribution { samples }
    }

    /// One sample.
    pub fn record(&mut self, value: u64) {
        self.samples.saturating_record(value);
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.samples.len()
    }

    /// The value that a part of all samples does not exceed; `None` without samples.
    pub fn quantile(&self, part: f64) -> Option<u64> {
        (!self.samples.is_empty()).then(|| self.samples.value_at_quantile(part).min(self.samples.max()))
    }

    /// The greatest.
    pub fn max(&self) -> Option<u64> {
        (!self.samples.is_empty()).then(|| self.samples.max())
    }

    /// Their mean.
    pub fn mean(&self) -> Option<f64> {
        (!self.samples.is_empty()).then(|| self.samples.mean())
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.samples.reset();
    }

    /// As `[value, count, value, count, …]`.
    pub fn to_json(&self) -> Value {
        let pairs = self.samples.iter_recorded();
        // The highest value that stands for the same: adding it up elsewhere falls into the same place.
        Value::from(pairs.flat_map(|step| [step.value_iterated_to(), step.count_at_value()]).collect::<Vec<u64>>())
    }

    /// Adds what [`Distribution::to_json`] wrote.
    ///
    /// # Errors
    /// Anything else.
    pub fn add_json(&mut self, pairs: &Value) -> Result<(), NotPairs> {
        let pairs = pairs.as_array().filter(|pairs| pairs.len().is_multiple_of(2)).ok_or(NotPairs)?;
        for pair in pairs.chunks_exact(2) {
            let (value, count) = pair[0].as_u64().zip(pair[1].as_u64()).ok_or(NotPairs)?;
            self.samples.saturating_record_n(value, count);
        }
        Ok(())
    }

    /// `{p50, p99, p999, max, mean, count}`, null where there are no samples.
    pub fn summary(&self) -> Value {
        serde_json::json!({
            "count": self.count(),
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "p999": self.quantile(0.999),
            "max": self.max(),
            "mean": self.mean().map(f64::round),
        })
    }
}

/// What was to be a distribution is none.
#[derive(Debug)]
pub struct NotPairs;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_percentiles_are_those_of_all_samples() {
        let (mut fast, mut slow, mut all) = (Distribution::new(3), Distribution::new(3), Distribution::new(3));
        // 990 quick ones and 10 slow ones: an average of the two p99 would say 50,050.
        for value in 1..=990 {
            fast.record(value);
            all.record(value);
        }
        for value in (100_000..).step_by(1000).take(10) {
            slow.record(value);
            all.record(value);
        }
        let mut merged = Distribution::new(3);
        merged.add_json(&fast.to_json()).expect("pairs");
        merged.add_json(&slow.to_json()).expect("pairs");
        assert_eq!(merged.summary(), all.summary());
        assert_eq!(merged.quantile(0.99), Some(990));
        assert_eq!(merged.max(), all.max());
        assert_eq!(merged.count(), 1000);
        // Sent on, it stays what it is.
        let mut again = Distribution::new(3);
        again.add_json(&merged.to_json()).expect("pairs");
        assert_eq!(again.to_json(), merged.to_json());
    }

    #[test]
    fn extremes_are_kept_within_bounds() {
        let mut samples = Distribution::new(3);
        assert_eq!(samples.summary()["p50"], Value::Null);
        samples.record(0);
        samples.record(u64::MAX);
        assert_eq!(samples.count(), 2);
        assert!(samples.max().expect("samples") >= HIGHEST);
        samples.clear();
        assert_eq!(samples.count(), 0);
    }

    #[test]
    fn what_is_not_pairs_is_refused() {
        for text in ["[1]", "{}", "[1,-1]", "[1,\"x\"]", "null"] {
            let value: Value = serde_json::from_str(text).expect("JSON");
            assert!(Distribution::new(2).add_json(&value).is_err(), "{text}");
        }
    }
}
