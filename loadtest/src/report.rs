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
/// From this lag between the coming of bytes and their being read on, likewise, besides [`SWEEP_US`] a connection.
const SATURATED_LAG_US: u64 = 20_000;
/// What a worker may take for each of its connections when all become readable at once, because the server just wrote to all:
/// the last of 10,000 then waits 35 ms for those before it, and the worker keeps up all the same.
const SWEEP_US: u64 = 5;
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
    /// Cores that this machine lets it use; `None` where it does not say.
    cores: Option<usize>,
    churn: bool,
    idle: bool,
    /// Connections that read as fast as they can, and slow ones.
    readers: u32,
    slow: u32,
    /// Connections a second that were allowed; `None`: as fast as it goes.
    rate: Option<f64>,
    leeway_ms: u64,
    urls: Vec<String>,
    /// What all workers counted.
    pub tally: Tally,
    /// The server with one connection to each URL.
    pub baseline: Option<Sample>,
    /// Connections that were open then.
    pub open_at_baseline: u64,
    /// Connections that were open when the server was at rest.
    pub open_when_held: u64,
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
    /// Of a run that is about to begin, with so many connections a second.
    pub fn new(options: &RunOptions, processes: u32, rate: Option<f64>) -> Figures {
        Figures {
            asked: options.connections,
            warm: options.urls.len().min(options.connections as usize) as u64,
            processes,
            cores: std::thread::available_parallelism().ok().map(std::num::NonZero::get),
            churn: options.churn,
            idle: options.idle,
            readers: options.connections - options.stalled - options.slow,
            slow: options.slow,
            rate,
            leeway_ms: options.leeway.as_millis() as u64,
            // A query may hold a token.
            urls: options.urls.iter().map(|url| url.split('?').next().unwrap_or_default().to_owned()).collect(),
            tally: Tally::default(),
            baseline: None,
            open_at_baseline: 0,
            open_when_held: 0,
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

    /// Notes a problem, once.
    pub fn problem(&mut self, problem: String) {
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// When all is counted: notes what makes the whole run doubtful.
    pub fn conclude(&mut self) {
        let counters = &self.tally.counters;
        let expected = !self.idle && !self.churn && self.duration_s > 0.0 && counters.opened > 0;
        let none = self.readers > 0 && counters.deliveries == 0
            || self.readers == 0 && self.slow > 0 && counters.slow_deliveries == 0;
        if expected && none {
            self.problem(
                "no event came while it was measured: does the stream's value change? (--idle says that none are expected)"
                    .into(),
            );
        }
    }

    /// Whether the server kept its word to every connection, as far as that can be seen.
    pub fn is_good(&self) -> bool {
        let counters = &self.tally.counters;
        let broken = [
            counters.failed,
            counters.dropped,
            counters.cut_off,
            counters.lost,
            counters.duplicated,
            counters.reordered,
            counters.stuck,
            counters.outlived,
            // Where no events are expected, one that came to somebody need not come to all.
            if self.idle { 0 } else { counters.silent },
        ];
        broken.iter().all(|&count| count == 0) && self.problems.is_empty()
    }

    /// The lag from which on it was the load tester that was late.
    fn lag_limit_us(&self) -> u64 {
        SATURATED_LAG_US + SWEEP_US * u64::from(self.asked.div_ceil(self.processes.max(1)))
    }

    /// Whether one worker, or all together, used up the CPU that was there for them.
    fn out_of_cpu(&self) -> bool {
        let all = self.cores.is_some_and(|cores| self.tally.cpu_share_sum >= SATURATED_SHARE * cores as f64);
        self.tally.cpu_share_max >= SATURATED_SHARE || all
    }

    fn saturated(&self) -> bool {
        let lag = self.tally.read_lag.quantile(0.99).unwrap_or_default();
        self.out_of_cpu() || lag >= self.lag_limit_us()
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
        handshakes["allowed_per_s"] = json!(self.rate);
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
                "cut_off": counters.cut_off,
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
                "conflated_slow": counters.conflated_slow,
                "silent": counters.silent,
                "stuck": counters.stuck,
            },
            "slow": {"deliveries": counters.slow_deliveries, "closes": tally.slow_closes.to_json()},
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
                "outlived": counters.outlived,
            },
            "server": self.server_json(measured_cpu),
            "client": {
                "processes": self.processes,
                "cpu_share_max": round(tally.cpu_share_max),
                "cpu_share_sum": round(tally.cpu_share_sum),
                "cores": self.cores,
                "saturated": self.saturated(),
                "read_lag_us_p99": tally.read_lag.quantile(0.99),
                "read_lag_us_limit": self.lag_limit_us(),
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
        // Connections that were gone again when the server was looked at cost it nothing then.
        let others = self.open_when_held.saturating_sub(self.open_at_baseline);
        let growth = |of: fn(&Sample) -> Option<u64>| {
            let (from, to) = (of(self.baseline.as_ref()?)?, of(self.held.as_ref()?)?);
            (others > 0).then(|| round((to as f64 - from as f64) / others as f64))
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
            "pss_bytes": held.and_then(|sample| sample.pss_bytes),
            "rss_bytes": held.and_then(|sample| sample.rss_bytes),
            "pss_bytes_baseline": self.baseline.and_then(|sample| sample.pss_bytes),
            "rss_bytes_baseline": self.baseline.and_then(|sample| sample.rss_bytes),
            "pss_bytes_end": last.and_then(|sample| sample.pss_bytes),
            "rss_bytes_end": last.and_then(|sample| sample.rss_bytes),
            "connections_baseline": self.baseline.map(|_| self.open_at_baseline),
            "connections": self.held.map(|_| self.open_when_held),
            "cpu_s": measured_cpu,
            "cpu_share": measured_cpu.filter(|_| self.duration_s > 0.0).map(|cpu_s| round(cpu_s / self.duration_s)),
            "user_s": ticks(|sample| sample.user_ticks),
            "system_s": ticks(|sample| sample.system_ticks),
            "fds": held.and_then(|sample| sample.fds),
            "tcp_sockets": held.and_then(|sample| sample.tcp_sockets),
            "tcp_buffer_bytes": held.and_then(|sample| sample.tcp_bytes),
            "slab_bytes": held.and_then(|sample| sample.slab_bytes),
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
        if counters.cut_off > 0 {
            line(
                "",
                format!("{} CUT OFF: they read, and the server closed them for no reason of theirs", counters.cut_off),
            )?;
        }
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
            let paced = self.rate.map(|allowed| {
                if rate >= 0.9 * allowed {
                    " (as --rate allows)".into()
                } else {
                    format!(" (--rate allows {allowed:.0})")
                }
            });
            let p99 = tally.handshake.quantile(0.99).map(|us| format!(", p99 {}", millis(us)));
            line(
                "handshakes",
                format!(
                    "{} at {rate:.0} a second{}{}{}{}",
                    report["handshakes"]["count"],
                    opt(paced),
                    opt(p99),
                    opt(each),
                    opt(tls)
                ),
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
                line(
                    "",
                    format!(
                        "{} more read by slow readers, {} conflated for them",
                        counters.slow_deliveries, counters.conflated_slow
                    ),
                )?;
            }
        }
        if counters.silent > 0 {
            line(
                "",
                format!("{} connections SILENT: others got events of a stream that they asked for", counters.silent),
            )?;
        }
        if counters.stuck > 0 {
            line("", format!("{} connections STUCK in an epoch that is over", counters.stuck))?;
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
        if counters.outlived > 0 {
            line(
                "",
                format!(
                    "{} connections OUTLIVED their token by {} ms and more",
                    counters.outlived,
                    self.leeway_ms + 1000
                ),
            )?;
        }
        if self.held.or(self.after).is_some() {
            let mib =
                |place: &str| number(place).map_or("unknown".into(), |bytes| format!("{:.1} MiB", bytes / 1048576.0));
            line(
                "server",
                format!(
                    "{} PSS, {} RSS, {} descriptors, CPU {:.0} % of a core",
                    mib("/server/pss_bytes"),
                    mib("/server/rss_bytes"),
                    number("/server/fds").map_or("unknown".into(), |fds| fds.to_string()),
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
                "{} process{}, the busiest at {:.0} % of a core; p99 {} from when bytes can have come to reading them,",
                self.processes,
                if self.processes == 1 { "" } else { "es" },
                tally.cpu_share_max * 100.0,
                millis(tally.read_lag.quantile(0.99).unwrap_or_default())
            ),
        )?;
        line(
            "",
            format!("at most so much of the latency is its own ({} would be too much)", millis(self.lag_limit_us())),
        )?;
        if self.out_of_cpu() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};

    /// The figures of a run of that command line, in which nothing has happened.
    fn figures(line: &str, processes: u32) -> Figures {
        let Ok(Command::Run(options)) = parse(line.split_whitespace().map(Into::into)) else { panic!("{line}") };
        Figures::new(&options, processes, Some(2000.0))
    }

    fn sample(bytes: u64) -> Sample {
        let (known, fds) = (Some(bytes), Some(bytes / 1000));
        Sample { rss_bytes: known, pss_bytes: known, fds, slab_bytes: known, ..Sample::default() }
    }

    #[test]
    fn growth_is_divided_by_what_was_open_when_the_server_was_looked_at() {
        let mut figures = figures("run ws://h/ --connections 101", 1);
        figures.baseline = Some(sample(1_000_000));
        figures.held = Some(sample(1_050_000));
        // 101 opened, but half of them were gone again.
        figures.tally.counters.opened = 101;
        (figures.open_at_baseline, figures.open_when_held) = (1, 51);
        let report = figures.json();
        for name in ["pss_bytes_per_connection", "rss_bytes_per_connection", "slab_bytes_per_connection"] {
            assert_eq!(report["server"][name], 1000.0, "{name}");
        }
        assert_eq!((&report["server"]["connections"], &report["server"]["fds"]), (&json!(51), &json!(1050)));
        assert!(figures.text(&report).contains("1000 bytes PSS a connection"));
        figures.open_when_held = 1;
        assert_eq!(figures.json()["server"]["pss_bytes_per_connection"], Value::Null, "nothing to divide by");
    }

    #[test]
    fn memory_that_is_not_known_is_null_and_not_zero() {
        let mut figures = figures("run ws://h/ --connections 11", 1);
        let unread = Sample { pss_bytes: None, fds: None, ..sample(5_000_000) };
        (figures.baseline, figures.held) = (Some(sample(4_000_000)), Some(unread));
        (figures.open_at_baseline, figures.open_when_held) = (1, 11);
        let report = figures.json();
        for name in ["pss_bytes", "pss_bytes_per_connection", "pss_bytes_end", "fds", "fds_per_connection"] {
            assert_eq!(report["server"][name], Value::Null, "{name}");
        }
        assert_eq!(report["server"]["rss_bytes_per_connection"], 100_000.0);
        let text = figures.text(&report);
        assert!(text.contains("unknown PSS, 4.8 MiB RSS, unknown descriptors"), "{text}");
    }

    #[test]
    fn each_broken_promise_makes_a_run_bad() {
        let check = |line: &str, name: &str, good: bool| {
            let mut figures = figures(line, 1);
            figures.tally.counters.deliveries = 1;
            let mut report = figures.tally.to_json();
            assert!(figures.is_good(), "before {name}");
            report["counters"][name] = json!(1);
            figures.tally = Tally::default();
            figures.tally.add_json(&report).expect("a report");
            assert_eq!(figures.is_good(), good, "{name}");
        };
        let names = ["failed", "dropped", "cut_off", "lost", "duplicated", "reordered", "silent", "stuck", "outlived"];
        names.into_iter().for_each(|name| check("run ws://h/", name, false));
        for name in ["conflated", "conflated_slow", "slow_deliveries", "published"] {
            check("run ws://h/", name, true);
        }
        check("run ws://h/ --idle", "silent", true);
    }

    #[test]
    fn a_run_without_events_is_a_problem_where_some_were_expected() {
        let check = |line: &str, deliveries: u64, slow_deliveries: u64, problems: usize| {
            let mut figures = figures(line, 1);
            figures.duration_s = 1.0;
            figures.tally.counters.opened = 10;
            (figures.tally.counters.deliveries, figures.tally.counters.slow_deliveries) = (deliveries, slow_deliveries);
            figures.conclude();
            figures.conclude();
            assert_eq!(figures.problems.len(), problems, "{line}: {:?}", figures.problems);
        };
        check("run ws://h/", 0, 0, 1);
        check("run ws://h/", 1, 0, 0);
        check("run ws://h/ --idle", 0, 0, 0);
        check("run ws://h/ --churn", 0, 0, 0);
        check("run ws://h/ --connections 10 --slow 5", 0, 7, 1);
        check("run ws://h/ --connections 10 --slow 10", 0, 7, 0);
        check("run ws://h/ --connections 10 --slow 10", 0, 0, 1);
        check("run ws://h/ --connections 10 --stalled 10", 0, 0, 0);
    }

    #[test]
    fn the_load_tester_is_the_bottleneck_alone_or_together() {
        let check = |connections: u32, processes: u32, shares: &[f64], lag_us: u64, saturated: bool| {
            let mut figures = figures(&format!("run ws://h/ --connections {connections}"), processes);
            figures.cores = Some(4);
            for &share in shares {
                let mut report = Tally::default().to_json();
                report["cpu_share"] = json!(share);
                figures.tally.add_json(&report).expect("a report");
            }
            figures.tally.read_lag.record(lag_us);
            let report = figures.json();
            assert_eq!(report["client_saturated"], saturated, "{connections} {shares:?} {lag_us}: {report}");
        };
        check(100, 1, &[0.89], 0, false);
        check(100, 1, &[0.91], 0, true);
        // No worker has a whole core, and yet there is none left.
        check(100, 6, &[0.55; 6], 0, false);
        check(100, 6, &[0.65; 6], 0, true);
        // A sweep over 10,000 that are readable at once takes its time; a hundred do not.
        check(100, 1, &[0.1], 35_000, true);
        check(10_000, 1, &[0.1], 35_000, false);
        check(10_000, 1, &[0.1], 75_000, true);
        check(10_000, 4, &[0.1; 4], 35_000, true);
    }

    #[test]
    fn a_rate_that_was_asked_for_is_not_told_as_the_servers() {
        let mut figures = figures("run ws://h/ --connections 1001", 1);
        figures.tally.counters.opened = 1001;
        figures.opening_s = Some(0.5);
        assert!(figures.text(&figures.json()).contains("1000 at 2000 a second (as --rate allows)"));
        figures.opening_s = Some(1.0);
        assert!(figures.text(&figures.json()).contains("1000 at 1000 a second (--rate allows 2000)"));
        figures.rate = None;
        assert!(!figures.text(&figures.json()).contains("--rate"));
    }
}
