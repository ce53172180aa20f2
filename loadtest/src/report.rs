//! The figures of a run: as JSON with names that stay, and as text for people.
//!
//! Source: loadtest/README.md lists the names. Memory: the timeline, one row a second.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Instant;

use serde_json::{Value, json};

use crate::cli::RunOptions;
use crate::server::Sample;
use crate::tally::Tally;

/// From this share of a core on, a worker is what limits the run.
const SATURATED_SHARE: f64 = 0.9;
/// From this lag between hearing of bytes and reading them on, likewise.
const SATURATED_LAG_US: u64 = 20_000;
/// Seconds of a tick in `/proc/PID/stat` (USER_HZ, which Linux fixes at 100).
const TICK_S: f64 = 0.01;

/// One second of the run.
#[derive(Clone, Debug, Default)]
pub struct Point {
    /// Since the start.
    pub second: f64,
    /// Connections that are open.
    pub open: u64,
    /// Events in it.
    pub deliveries: u64,
    /// Latency in it.
    pub p50_us: Option<u64>,
    /// Likewise.
    pub p99_us: Option<u64>,
    /// Likewise.
    pub max_us: Option<u64>,
    /// The server at its end.
    pub server: Option<Sample>,
}

/// Everything that was measured.
pub struct Figures {
    asked: u32,
    warm: u64,
    processes: u32,
    churn: bool,
    idle: bool,
    leeway_ms: u64,
    urls: Vec<String>,
    /// What all workers counted.
    pub tally: Tally,
    /// The server with one connection to each URL.
    pub baseline: Option<Sample>,
    /// When the others began to open.
    pub opening_from: Option<Instant>,
    /// How long they took.
    pub opening_s: Option<f64>,
    /// The server when the last one was open.
    pub after_opening: Option<Sample>,
    /// The server a moment later, at rest.
    pub held: Option<Sample>,
    /// The server at the start of the measurement.
    pub before: Option<Sample>,
    /// The server at its end.
    pub after: Option<Sample>,
    /// How long was measured.
    pub duration_s: f64,
    /// Whether the run was ended by a signal.
    pub interrupted: bool,
    /// What keeps the figures from being trusted.
    pub problems: Vec<String>,
    /// Second by second.
    pub timeline: Vec<Point>,
}

impl Figures {
    /// Of a run that is about to begin.
    pub fn new(options: &RunOptions, processes: u32) -> Figures {
        Figures {
            asked: options.connections,
            warm: options.urls.len().min(options.connections as usize) as u64,
            processes,
            churn: options.churn,
            idle: options.idle,
            leeway_ms: options.leeway.as_millis() as u64,
            // A query may hold a token.
            urls: options.urls.iter().map(|url| url.split('?').next().unwrap_or_default().to_owned()).collect(),
            tally: Tally::default(),
            baseline: None,
            opening_from: None,
            opening_s: None,
            after_opening: None,
            held: None,
            before: None,
            after: None,
            duration_s: 0.0,
            interrupted: false,
            problems: Vec::new(),
            timeline: Vec::new(),
        }
    }

    /// What was asked, in a line.
    pub fn title(&self) -> String {
        let hosts: BTreeSet<&str> = self.urls.iter().map(String::as_str).collect();
        let urls: Vec<&str> = hosts.into_iter().take(3).collect();
        format!("{} connections to {}", self.asked, urls.join(", "))
    }

    /// Whether nothing failed, was dropped or lost.
    pub fn is_good(&self) -> bool {
        let counters = &self.tally.counters;
        counters.failed == 0 && counters.dropped == 0 && counters.lost == 0 && self.problems.is_empty()
    }

    fn saturated(&self) -> bool {
        let lag = self.tally.read_lag.quantile(0.99).unwrap_or_default();
        self.tally.cpu_share_max >= SATURATED_SHARE || lag >= SATURATED_LAG_US
    }

    /// The names that stay.
    pub fn json(&self) -> Value {
        let (tally, counters) = (&self.tally, &self.tally.counters);
        let per = |count: u64, seconds: f64| (seconds > 0.0).then(|| count as f64 / seconds);
        let spent = |from: &Option<Sample>, to: &Option<Sample>| {
            let (from, to) = (from.as_ref()?, to.as_ref()?);
            Some(to.cpu_ns.saturating_sub(from.cpu_ns) as f64 / 1e9)
        };
        let each_us =
            |cpu_s: Option<f64>, count: u64| cpu_s.filter(|_| count > 0).map(|cpu_s| cpu_s * 1e6 / count as f64);
        let opened_in_rate = counters.opened.saturating_sub(self.warm);
        let opening_cpu = spent(&self.baseline, &self.after_opening);
        let measured_cpu = spent(&self.before, &self.after);
        let handshakes = if self.churn {
            json!({
                "count": counters.handshakes,
                "per_s": per(counters.handshakes, self.duration_s),
                "server_cpu_us_each": each_us(measured_cpu, counters.handshakes),
            })
        } else {
            json!({
                "count": opened_in_rate,
                "per_s": per(opened_in_rate, self.opening_s.unwrap_or_default()),
                "server_cpu_us_each": each_us(opening_cpu, opened_in_rate),
            })
        };
        let mut handshakes = handshakes;
        handshakes["latency_us"] = tally.handshake.summary();
        handshakes["tls"] =
            json!({"full": counters.tls_handshakes - counters.tls_resumed, "resumed": counters.tls_resumed});
        let mut latency = tally.latency.summary();
        latency["samples"] = latency["count"].take();
        if let Some(members) = latency.as_object_mut() {
            members.remove("count");
        }
        json!({
            "connections": {
                "asked": self.asked,
                "opened": counters.opened,
                "failed": counters.failed,
                "dropped": counters.dropped,
                "failures": tally.failures.to_json(),
            },
            "connects_per_s": if self.churn { handshakes["per_s"].clone() } else { json!(per(opened_in_rate, self.opening_s.unwrap_or_default())) },
            "handshakes": handshakes,
            "deliveries": {
                "count": counters.deliveries,
                "per_s": per(counters.deliveries, self.duration_s),
                "bytes": counters.bytes,
                "bytes_per_s": per(counters.bytes, self.duration_s),
                "per_server_cpu_s": measured_cpu.filter(|cpu_s| *cpu_s > 0.0).map(|cpu_s| counters.deliveries as f64 / cpu_s),
                "server_cpu_us_each": each_us(measured_cpu, counters.deliveries),
            },
            "latency_us": latency,
            "events": {
                "lost": counters.lost,
                "duplicated": counters.duplicated,
                "reordered": counters.reordered,
                "conflated": counters.conflated,
            },
            "slow": {"deliveries": counters.slow_deliveries},
            "closes": tally.closes.to_json(),
            "errors": tally.errors.to_json(),
            "renewals": {
                "sent": counters.renewals_sent,
                "accepted": counters.renewals_accepted,
                "refused": counters.renewals_refused,
            },
            "published": counters.published,
            "expiry": {
                "count": tally.expiry_late_ms.values().sum::<u64>(),
                "leeway_ms": self.leeway_ms,
                "first_ms": tally.expiry_quantile_ms(0.0),
                "median_ms": tally.expiry_quantile_ms(0.5),
                "p99_ms": tally.expiry_quantile_ms(0.99),
                "last_ms": tally.expiry_quantile_ms(1.0),
                "latest_frame_ms": tally.expiry_latest_frame_ms,
            },
            "server": self.server_json(measured_cpu),
            "client": {
                "processes": self.processes,
                "cpu_share_max": round(tally.cpu_share_max),
                "saturated": self.saturated(),
                "read_lag_us_p99": tally.read_lag.quantile(0.99),
            },
            "client_saturated": self.saturated(),
            "duration_s": round(self.duration_s),
            "interrupted": self.interrupted,
            "problems": self.problems,
            "ok": self.is_good(),
        })
    }

    fn server_json(&self, measured_cpu: Option<f64>) -> Value {
        let held = self.held.or(self.after);
        let others = self.tally.counters.opened.saturating_sub(self.warm);
        let growth = |of: fn(&Sample) -> u64| {
            let (from, to) = (self.baseline.as_ref()?, self.held.as_ref()?);
            (others > 0).then(|| round((of(to) as f64 - of(from) as f64) / others as f64))
        };
        let last = self.after.or(held);
        let ticks = |of: fn(&Sample) -> u64| {
            let (from, to) = (self.before.as_ref()?, self.after.as_ref()?);
            Some(round((of(to).saturating_sub(of(from))) as f64 * TICK_S))
        };
        json!({
            "pss_bytes_per_connection": growth(|sample| sample.pss_bytes),
            "rss_bytes_per_connection": growth(|sample| sample.rss_bytes),
            "slab_bytes_per_connection": growth(|sample| sample.slab_bytes),
            "fds_per_connection": growth(|sample| sample.fds),
            "pss_bytes": held.map(|sample| sample.pss_bytes),
            "rss_bytes": held.map(|sample| sample.rss_bytes),
            "pss_bytes_baseline": self.baseline.map(|sample| sample.pss_bytes),
            "rss_bytes_baseline": self.baseline.map(|sample| sample.rss_bytes),
            "pss_bytes_end": last.map(|sample| sample.pss_bytes),
            "rss_bytes_end": last.map(|sample| sample.rss_bytes),
            "cpu_s": measured_cpu,
            "cpu_share": measured_cpu.filter(|_| self.duration_s > 0.0).map(|cpu_s| round(cpu_s / self.duration_s)),
            "user_s": ticks(|sample| sample.user_ticks),
            "system_s": ticks(|sample| sample.system_ticks),
            "fds": held.map(|sample| sample.fds),
            "tcp_sockets": held.map(|sample| sample.tcp_sockets),
            "tcp_buffer_bytes": held.map(|sample| sample.tcp_bytes),
            "slab_bytes": held.map(|sample| sample.slab_bytes),
        })
    }

    /// For people.
    pub fn text(&self, report: &Value) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self.write_text(&mut out, report);
        out
    }

    fn write_text(&self, out: &mut String, report: &Value) -> std::fmt::Result {
        let (tally, counters) = (&self.tally, &self.tally.counters);
        let number = |place: &str| report.pointer(place).and_then(Value::as_f64);
        writeln!(out, "\n{}", self.title())?;
        if self.interrupted {
            writeln!(out, "Ended before its time: what follows is the report so far.")?;
        }
        let mut line = |name: &str, text: String| writeln!(out, "  {name:<14} {text}");
        line(
            "connections",
            format!(
                "{} opened of {}, {} failed, {} dropped",
                counters.opened, self.asked, counters.failed, counters.dropped
            ),
        )?;
        for (cause, count) in &tally.failures.0 {
            line("", format!("{count} failed: {cause}"))?;
        }
        for (cause, count) in &tally.closes.0 {
            line("", format!("{count} ended: {cause}"))?;
        }
        for (code, count) in &tally.errors.0 {
            line("", format!("{count} error frames: {code}"))?;
        }
        if let Some(rate) = number("/handshakes/per_s") {
            let each =
                number("/handshakes/server_cpu_us_each").map(|us| format!(", {us:.1} us of the server's CPU each"));
            let tls = (counters.tls_handshakes > 0)
                .then(|| format!(", TLS: {} of {} resumed", counters.tls_resumed, counters.tls_handshakes));
            let p99 = tally.handshake.quantile(0.99).map(|us| format!(", p99 {}", millis(us)));
            line(
                "handshakes",
                format!("{} at {rate:.0} a second{}{}{}", report["handshakes"]["count"], opt(p99), opt(each), opt(tls)),
            )?;
        }
        if !self.churn && self.duration_s > 0.0 {
            line(
                "deliveries",
                format!(
                    "{} in {:.1} s: {:.0} a second, {:.2} MB a second",
                    counters.deliveries,
                    self.duration_s,
                    number("/deliveries/per_s").unwrap_or_default(),
                    number("/deliveries/bytes_per_s").unwrap_or_default() / 1e6,
                ),
            )?;
            if let Some(each) = number("/deliveries/server_cpu_us_each") {
                line(
                    "",
                    format!(
                        "{each:.2} us of the server's CPU each: {:.0} a CPU second",
                        number("/deliveries/per_server_cpu_s").unwrap_or_default()
                    ),
                )?;
            }
            if let (Some(p50), Some(p99), Some(p999), Some(max)) = (
                tally.latency.quantile(0.5),
                tally.latency.quantile(0.99),
                tally.latency.quantile(0.999),
                tally.latency.max(),
            ) {
                line(
                    "latency",
                    format!(
                        "p50 {}, p99 {}, p99.9 {}, max {} (from the event's stamp to its bytes read)",
                        millis(p50),
                        millis(p99),
                        millis(p999),
                        millis(max)
                    ),
                )?;
            }
            line(
                "events",
                format!(
                    "{} lost, {} duplicated, {} reordered, {} conflated",
                    counters.lost, counters.duplicated, counters.reordered, counters.conflated
                ),
            )?;
            if counters.slow_deliveries > 0 {
                line("", format!("{} more read by slow readers", counters.slow_deliveries))?;
            }
            if counters.deliveries == 0 && !self.idle {
                line("", "No event came: is the stream's value changing? (--idle says that none are expected)".into())?;
            }
        }
        if counters.renewals_sent > 0 {
            line(
                "renewals",
                format!(
                    "{} sent, {} accepted, {} refused",
                    counters.renewals_sent, counters.renewals_accepted, counters.renewals_refused
                ),
            )?;
        }
        if let (Some(first), Some(median), Some(last)) =
            (tally.expiry_quantile_ms(0.0), tally.expiry_quantile_ms(0.5), tally.expiry_quantile_ms(1.0))
        {
            line(
                "expiry",
                format!(
                    "4001 token_expired after exp + {} ms: first {first} ms, median {median} ms, last {last} ms",
                    self.leeway_ms
                ),
            )?;
            if let Some(frame) = tally.expiry_latest_frame_ms {
                line("", format!("latest stream frame {frame} ms after exp + leeway"))?;
            }
        }
        if let Some(pss) = number("/server/pss_bytes") {
            line(
                "server",
                format!(
                    "{:.1} MiB PSS, {:.1} MiB RSS, {} descriptors, CPU {:.0} % of a core",
                    pss / 1048576.0,
                    number("/server/rss_bytes").unwrap_or_default() / 1048576.0,
                    report["server"]["fds"],
                    number("/server/cpu_share").unwrap_or_default() * 100.0
                ),
            )?;
            if let Some(each) = number("/server/pss_bytes_per_connection") {
                line(
                    "",
                    format!(
                        "{each:.0} bytes PSS a connection, {:.0} RSS, {:.0} slab (slab: both ends, when the load runs on the same machine)",
                        number("/server/rss_bytes_per_connection").unwrap_or_default(),
                        number("/server/slab_bytes_per_connection").unwrap_or_default()
                    ),
                )?;
            }
        }
        line(
            "load tester",
            format!(
                "{} process{}, the busiest at {:.0} % of a core, p99 {} from hearing of bytes to reading them",
                self.processes,
                if self.processes == 1 { "" } else { "es" },
                tally.cpu_share_max * 100.0,
                millis(tally.read_lag.quantile(0.99).unwrap_or_default())
            ),
        )?;
        if tally.cpu_share_max >= SATURATED_SHARE {
            line(
                "",
                "THE LOAD TESTER WAS THE BOTTLENECK, not the server: the rates and latencies are its own. Use more"
                    .into(),
            )?;
            line("", "--processes, fewer connections, or another machine.".into())?;
        } else if self.saturated() {
            line(
                "",
                "THE LOAD TESTER READ LATE: this machine had no CPU for it in time, and the latencies hold that. Keep"
                    .into(),
            )?;
            line("", "cores free for it, or use another machine.".into())?;
        }
        for problem in &self.problems {
            line("problem", problem.clone())?;
        }
        Ok(())
    }
}

fn opt(text: Option<String>) -> String {
    text.unwrap_or_default()
}

fn millis(us: u64) -> String {
    format!("{:.2} ms", us as f64 / 1000.0)
}

/// To three places: more are noise.
fn round(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}
