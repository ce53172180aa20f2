//! What a worker counts, and the same of all workers added up.
//!
//! Memory: a few histograms; names of causes are bounded by [`CAUSES_MAX`]. Errors: a report that is none.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::histogram::Distribution;

/// Different causes of failure, closes and errors that are told apart; later ones count as `other`.
const CAUSES_MAX: usize = 100;

/// The plain counters.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    /// Connections that were begun.
    pub started: u64,
    /// Those that reached their first frame.
    pub opened: u64,
    /// Those that did not.
    pub failed: u64,
    /// Of those that read: ended by the peer or the network without a close that says why.
    pub dropped: u64,
    /// Of those that read: closed by the server for no reason that lies in them.
    pub cut_off: u64,
    /// Of those that read: open when the run ended, but without an event of a stream that others like them got.
    pub silent: u64,
    /// Of those that read: left behind in an epoch that others have seen the end of.
    pub stuck: u64,
    /// Of those that read: open a second and more after `exp` + leeway.
    pub outlived: u64,
    /// Handshakes within the measured window (with `--churn`).
    pub handshakes: u64,
    /// TLS handshakes.
    pub tls_handshakes: u64,
    /// Of those, resumed ones.
    pub tls_resumed: u64,
    /// Events within the measured window.
    pub deliveries: u64,
    /// Bytes read within the measured window.
    pub bytes: u64,
    /// Events read by slow readers.
    pub slow_deliveries: u64,
    /// Events that never came.
    pub lost: u64,
    /// Events that came again.
    pub duplicated: u64,
    /// Events that came after a later one.
    pub reordered: u64,
    /// Events that a snapshot jumped over, for connections that read as fast as they can.
    pub conflated: u64,
    /// The same for slow readers, whom that is meant for.
    pub conflated_slow: u64,
    /// Renewals sent.
    pub renewals_sent: u64,
    /// Renewals the server accepted.
    pub renewals_accepted: u64,
    /// Renewals the server refused.
    pub renewals_refused: u64,
    /// Messages published by `--message`.
    pub published: u64,
}

impl Counters {
    /// Each by its name.
    fn fields(&mut self) -> [(&'static str, &mut u64); 23] {
        [
            ("started", &mut self.started),
            ("opened", &mut self.opened),
            ("failed", &mut self.failed),
            ("dropped", &mut self.dropped),
            ("cut_off", &mut self.cut_off),
            ("silent", &mut self.silent),
            ("stuck", &mut self.stuck),
            ("outlived", &mut self.outlived),
            ("handshakes", &mut self.handshakes),
            ("tls_handshakes", &mut self.tls_handshakes),
            ("tls_resumed", &mut self.tls_resumed),
            ("deliveries", &mut self.deliveries),
            ("bytes", &mut self.bytes),
            ("slow_deliveries", &mut self.slow_deliveries),
            ("lost", &mut self.lost),
            ("duplicated", &mut self.duplicated),
            ("reordered", &mut self.reordered),
            ("conflated", &mut self.conflated),
            ("conflated_slow", &mut self.conflated_slow),
            ("renewals_sent", &mut self.renewals_sent),
            ("renewals_accepted", &mut self.renewals_accepted),
            ("renewals_refused", &mut self.renewals_refused),
            ("published", &mut self.published),
        ]
    }
}

/// How often each cause was met.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Causes(pub BTreeMap<String, u64>);

impl Causes {
    /// One more.
    pub fn count(&mut self, cause: &str) {
        self.add(cause, 1);
    }

    fn add(&mut self, cause: &str, times: u64) {
        if let Some(count) = self.0.get_mut(cause) {
            *count += times;
        } else if self.0.len() < CAUSES_MAX {
            self.0.insert(cause.to_owned(), times);
        } else {
            *self.0.entry("other".into()).or_default() += times;
        }
    }

    /// As an object.
    pub fn to_json(&self) -> Value {
        Value::Object(self.0.iter().map(|(cause, count)| (cause.clone(), json!(count))).collect())
    }
}

/// Everything that is counted.
pub struct Tally {
    /// The plain counters.
    pub counters: Counters,
    /// Connections that failed, by cause.
    pub failures: Causes,
    /// Connections that were closed by the server, by code and reason.
    pub closes: Causes,
    /// Those of them that read slowly or not at all.
    pub slow_closes: Causes,
    /// `error` frames, by code.
    pub errors: Causes,
    /// From an event's `ts` to the moment its bytes were read, in microseconds.
    pub latency: Distribution,
    /// From the earliest moment at which bytes can have come to the moment they were read: [`Waits`].
    pub read_lag: Distribution,
    /// From the start of a connection to its first frame.
    pub handshake: Distribution,
    /// How many milliseconds after `exp` + leeway each 4001 came.
    pub expiry_late_ms: BTreeMap<i64, u64>,
    /// Of the connections that expired: the latest stream frame against `exp` + leeway, in milliseconds.
    pub expiry_latest_frame_ms: Option<i64>,
    /// CPU time over wall time within the measured window; of several workers the greatest.
    pub cpu_share_max: f64,
    /// The same of all workers together.
    pub cpu_share_sum: f64,
}

impl Default for Tally {
    fn default() -> Tally {
        Tally {
            counters: Counters::default(),
            failures: Causes::default(),
            closes: Causes::default(),
            slow_closes: Causes::default(),
            errors: Causes::default(),
            latency: Distribution::new(3),
            read_lag: Distribution::new(3),
            handshake: Distribution::new(3),
            expiry_late_ms: BTreeMap::new(),
            expiry_latest_frame_ms: None,
            cpu_share_max: 0.0,
            cpu_share_sum: 0.0,
        }
    }
}

/// Since when what epoll tells can have been there: never later than it was, so that a lag counted from there hides nothing.
///
/// Epoll hands out a bounded batch. Where ten thousand sockets become readable at once, the last of them is told of after
/// twenty batches, and has waited since the first.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    since_us: u64,
    returned_us: u64,
    full: bool,
}

impl Waits {
    /// Before the first one.
    pub fn new(now_us: u64) -> Waits {
        Waits { since_us: now_us, returned_us: now_us, full: false }
    }

    /// A wait returned at `now_us`. `blocked`: nothing was there when it began. `full`: there may be more than it brought.
    /// Returns since when what it brought can have been there.
    pub fn returned(&mut self, blocked: bool, full: bool, now_us: u64) -> u64 {
        if blocked {
            self.since_us = now_us;
        } else if !self.full {
            // The wait before brought all there was: this came after it had returned.
            self.since_us = self.returned_us;
        }
        (self.returned_us, self.full) = (now_us, full);
        self.since_us
    }
}

/// A worker's report cannot be read.
#[derive(Debug)]
pub struct BadReport;

impl Tally {
    /// For the pipe.
    pub fn to_json(&self) -> Value {
        let mut copy = self.counters;
        let counters: Map<String, Value> =
            copy.fields().into_iter().map(|(name, count)| (name.to_owned(), json!(*count))).collect();
        let expiry: Vec<(i64, u64)> = self.expiry_late_ms.iter().map(|(&late, &count)| (late, count)).collect();
        json!({
            "counters": counters,
            "failures": self.failures.to_json(),
            "closes": self.closes.to_json(),
            "slow_closes": self.slow_closes.to_json(),
            "errors": self.errors.to_json(),
            "latency": self.latency.to_json(),
            "read_lag": self.read_lag.to_json(),
            "handshake": self.handshake.to_json(),
            "expiry": expiry,
            "expiry_latest_frame_ms": self.expiry_latest_frame_ms,
            "cpu_share": self.cpu_share_max,
        })
    }

    /// Adds what another process counted.
    ///
    /// # Errors
    /// What [`Tally::to_json`] did not write.
    pub fn add_json(&mut self, report: &Value) -> Result<(), BadReport> {
        for (name, count) in self.counters.fields() {
            *count += report["counters"][name].as_u64().ok_or(BadReport)?;
        }
        for (causes, name) in [
            (&mut self.failures, "failures"),
            (&mut self.closes, "closes"),
            (&mut self.slow_closes, "slow_closes"),
            (&mut self.errors, "errors"),
        ] {
            for (cause, count) in report[name].as_object().ok_or(BadReport)? {
                causes.add(cause, count.as_u64().ok_or(BadReport)?);
            }
        }
        for (samples, name) in
            [(&mut self.latency, "latency"), (&mut self.read_lag, "read_lag"), (&mut self.handshake, "handshake")]
        {
            samples.add_json(&report[name]).map_err(|_| BadReport)?;
        }
        for pair in report["expiry"].as_array().ok_or(BadReport)? {
            let (late, count) = pair[0].as_i64().zip(pair[1].as_u64()).ok_or(BadReport)?;
            *self.expiry_late_ms.entry(late).or_default() += count;
        }
        self.expiry_latest_frame_ms = self.expiry_latest_frame_ms.max(report["expiry_latest_frame_ms"].as_i64());
        let share = report["cpu_share"].as_f64().ok_or(BadReport)?;
        self.cpu_share_max = self.cpu_share_max.max(share);
        self.cpu_share_sum += share;
        Ok(())
    }

    /// The lateness that a part of all expiries does not exceed.
    pub fn expiry_quantile_ms(&self, part: f64) -> Option<i64> {
        let all: u64 = self.expiry_late_ms.values().sum();
        let rank = ((all as f64 * part).ceil() as u64).max(1);
        let mut passed = 0;
        self.expiry_late_ms.iter().find_map(|(&late, &count)| {
            passed += count;
            (passed >= rank).then_some(late)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_reports_add_up() {
        let mut one = Tally::default();
        one.counters.opened = 3;
        one.counters.deliveries = 5;
        one.failures.count("refused");
        one.closes.count("4001 token_expired");
        one.slow_closes.count("reset");
        one.counters.silent = 2;
        one.latency.record(100);
        one.expiry_late_ms.insert(-2, 1);
        one.expiry_latest_frame_ms = Some(-40);
        one.cpu_share_max = 0.5;
        let mut two = Tally::default();
        two.counters.opened = 4;
        two.failures.count("refused");
        two.failures.count("timeout");
        two.latency.record(200);
        two.expiry_late_ms.insert(9, 2);
        two.cpu_share_max = 0.25;
        let mut all = Tally::default();
        all.add_json(&one.to_json()).expect("a report");
        all.add_json(&two.to_json()).expect("a report");
        assert_eq!((all.counters.opened, all.counters.deliveries), (7, 5));
        assert_eq!(all.failures.to_json(), json!({"refused": 2, "timeout": 1}));
        assert_eq!(all.closes.to_json(), json!({"4001 token_expired": 1}));
        assert_eq!((all.slow_closes.to_json(), all.counters.silent), (json!({"reset": 1}), 2));
        assert_eq!(all.latency.summary()["max"], 200);
        assert_eq!(all.expiry_latest_frame_ms, Some(-40));
        assert_eq!(
            (all.expiry_quantile_ms(0.0), all.expiry_quantile_ms(0.5), all.expiry_quantile_ms(1.0)),
            (Some(-2), Some(9), Some(9))
        );
        assert!((all.cpu_share_max - 0.5).abs() < 1e-9);
        assert!((all.cpu_share_sum - 0.75).abs() < 1e-9);
        assert_eq!(Tally::default().expiry_quantile_ms(0.5), None);
        assert!(all.add_json(&json!({"counters": {}})).is_err());
    }

    #[test]
    fn what_waits_for_full_batches_before_it_is_late_from_the_first_of_them() {
        let mut waits = Waits::new(1000);
        assert_eq!(waits.returned(true, true, 2000), 2000, "it came as it was told");
        assert_eq!(waits.returned(false, true, 4000), 2000, "it may have been there with the first batch");
        assert_eq!(waits.returned(false, false, 6000), 2000);
        assert_eq!(waits.returned(false, false, 7000), 6000, "all before was brought: it came since");
        assert_eq!(waits.returned(false, true, 9000), 7000);
        assert_eq!(waits.returned(true, false, 9500), 9500, "nothing was left of the full batch");
    }

    #[test]
    fn causes_are_bounded() {
        let mut causes = Causes::default();
        for n in 0..CAUSES_MAX as u64 + 5 {
            causes.count(&n.to_string());
        }
        assert_eq!(causes.0.len(), CAUSES_MAX + 1);
        assert_eq!(causes.0["other"], 5);
    }
}
