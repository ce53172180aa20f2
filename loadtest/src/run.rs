//! `loadtest run`: starts the workers, tells them when, reads the server's cost beside them, reports.
//!
//! Memory: the workers' reports once. Errors: text for standard error; what failed in the run is in the report.

use std::collections::HashMap;
use std::io::{self, BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::cli::{CONNECTIONS_PER_PROCESS, RunOptions};
use crate::clock::wall_us;
use crate::histogram::Distribution;
use crate::plot;
use crate::report::{Figures, Point};
use crate::server::{self, Sample};
use crate::target::Target;

/// Descriptors of a worker besides its connections.
const SPARE_DESCRIPTORS: u64 = 100;
/// From the last connection's opening, or the first one's, until the server is looked at.
const CALM: Duration = Duration::from_millis(500);
/// What a worker may take to answer once it is to stop.
const PATIENCE: Duration = Duration::from_secs(20);
/// A point of the timeline does not wait longer for a worker.
const TICK_PATIENCE: Duration = Duration::from_secs(3);
/// This very program, even where its file was replaced meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// Connections a second, unless said otherwise.
const RATE: f64 = 2000.0;
/// Rows of the timeline that are kept: a day and more.
const POINTS_MAX: usize = 100_000;

/// What comes of a worker: its number and a line, or its end.
type Heard = (usize, Option<Value>);

struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    /// Its last line of progress.
    tick: Value,
    /// Whether that came since the last point of the timeline.
    ticked: bool,
    /// Whether its report was read or it is gone.
    ended: bool,
}

/// Where the run is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// The first connection of each URL opens.
    Warming,
    /// It is open; the server is to come to rest.
    Calming(Instant),
    Opening,
    /// All are open; the server is to come to rest.
    Opened(Instant),
    Measuring(Instant),
    /// The workers tell how far each sequence is.
    Stopping(Instant),
    /// They wait for what is under way.
    Settling(Instant),
}

/// Runs it and returns the exit code.
///
/// # Errors
/// What keeps it from starting.
pub fn run(options: RunOptions) -> Result<ExitCode, String> {
    for url in &options.urls {
        Target::parse(url).map_err(|error| error.to_string())?;
    }
    let limit = raise_descriptor_limit();
    let fitting = u32::try_from(limit.saturating_sub(SPARE_DESCRIPTORS)).unwrap_or(u32::MAX).max(1);
    let per_process = CONNECTIONS_PER_PROCESS.min(fitting);
    let processes = match options.processes {
        0 => options.connections.div_ceil(per_process),
        asked => asked.min(options.connections),
    };
    if options.connections.div_ceil(processes) > fitting {
        return Err(format!(
            "{processes} processes of at most {fitting} connections each (ulimit -n {limit}) cannot hold {}: raise the \
             limit or --processes",
            options.connections
        ));
    }
    let interrupts = Arc::new(AtomicUsize::new(0));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let interrupts = Arc::clone(&interrupts);
        let noted = move || {
            interrupts.fetch_add(1, Ordering::Relaxed);
        };
        on_signal(signal, noted)?;
    }
    let (workers, heard) = start(&options, processes)?;
    let mut run = Run {
        stage: Stage::Warming,
        figures: Figures::new(&options, processes),
        options,
        workers,
        interrupts,
        heads: HashMap::new(),
        waiting: processes as usize,
        second: Distribution::new(2),
        deliveries: 0,
        last_point: Instant::now(),
        began: Instant::now(),
        interrupted: false,
    };
    let outcome = run.follow(&heard);
    for worker in &mut run.workers {
        worker.input = None;
        // It ends by itself when its input does; one that hangs is ended.
        if !worker.ended {
            drop(worker.child.kill());
        }
        drop(worker.child.wait());
    }
    outcome?;
    run.write()
}

/// The run as it goes.
struct Run {
    options: RunOptions,
    stage: Stage,
    workers: Vec<Worker>,
    interrupts: Arc<AtomicUsize>,
    figures: Figures,
    /// How far each sequence is, of all workers.
    heads: HashMap<String, u64>,
    /// Workers that have not answered yet in this stage.
    waiting: usize,
    /// What was measured in the present second, of all workers.
    second: Distribution,
    deliveries: u64,
    last_point: Instant,
    began: Instant,
    interrupted: bool,
}

impl Run {
    fn follow(&mut self, heard: &Receiver<Heard>) -> Result<(), String> {
        loop {
            match heard.recv_timeout(Duration::from_millis(20)) {
                Ok((worker, Some(line))) => self.hear(worker, &line)?,
                Ok((worker, None)) => self.lose(worker)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            let now = Instant::now();
            self.advance(now);
            // A second is over when every worker has told of its own.
            let told = self.workers.iter().all(|worker| worker.ticked || worker.ended);
            if told || now - self.last_point > TICK_PATIENCE {
                self.point(now);
            }
            let done = self.workers.iter().all(|worker| worker.ended);
            match self.stage {
                Stage::Settling(_) if done => return Ok(()),
                Stage::Stopping(since) | Stage::Settling(since) if now - since > PATIENCE => {
                    self.figures
                        .problems
                        .push("a worker did not answer in time: its part of the report is missing".into());
                    return Ok(());
                }
                _ => {}
            }
            if self.interrupts.load(Ordering::Relaxed) > 1 {
                return Err("interrupted twice: no report".into());
            }
        }
    }

    fn hear(&mut self, number: usize, line: &Value) -> Result<(), String> {
        match line["kind"].as_str() {
            Some("tick") => {
                // A second that cannot be read is missing in the picture, and nowhere else.
                drop(self.second.add_json(&line["latency"]));
                self.deliveries += line["deliveries"].as_u64().unwrap_or_default();
                self.workers[number].tick = line.clone();
                self.workers[number].ticked = true;
            }
            Some("warm" | "open") => self.waiting = self.waiting.saturating_sub(1),
            Some("heads") => {
                self.waiting = self.waiting.saturating_sub(1);
                for head in line["heads"].as_array().into_iter().flatten() {
                    if let (Some(name), Some(seq)) = (head[0].as_str(), head[1].as_u64()) {
                        let known = self.heads.entry(name.to_owned()).or_default();
                        *known = seq.max(*known);
                    }
                }
            }
            Some("report") => {
                self.workers[number].ended = true;
                self.figures.tally.add_json(line).map_err(|_| "a worker's report cannot be read")?;
            }
            _ => return Err("a worker says what is not known".into()),
        }
        Ok(())
    }

    /// A worker's output ended.
    fn lose(&mut self, number: usize) -> Result<(), String> {
        if self.workers[number].ended {
            return Ok(());
        }
        self.workers[number].ended = true;
        Err("a worker ended before its time: its reason stands above".into())
    }

    fn advance(&mut self, now: Instant) {
        if self.interrupts.load(Ordering::Relaxed) > 0 && !self.interrupted {
            self.interrupted = true;
            self.figures.interrupted = true;
            if !matches!(self.stage, Stage::Stopping(_) | Stage::Settling(_)) {
                self.stop(now);
            }
        }
        match self.stage {
            Stage::Warming if self.waiting == 0 => self.stage = Stage::Calming(now + CALM),
            Stage::Calming(until) if now >= until => {
                self.figures.baseline = self.sample();
                self.waiting = self.workers.len();
                if self.options.churn {
                    self.measure(now);
                } else {
                    self.figures.opening_from = Some(now);
                    self.stage = Stage::Opening;
                    self.tell(&json!({"do": "connect"}));
                }
            }
            Stage::Opening if self.waiting == 0 => {
                self.figures.opening_s = self.figures.opening_from.map(|from| (now - from).as_secs_f64());
                self.figures.after_opening = self.sample();
                self.stage = Stage::Opened(now + self.options.warm_up.max(2 * CALM));
            }
            Stage::Opened(until) if now >= until => {
                self.figures.held = self.sample();
                self.measure(now);
            }
            Stage::Measuring(from) if now - from >= self.options.duration => self.stop(now),
            Stage::Stopping(_) if self.waiting == 0 => {
                self.stage = Stage::Settling(now);
                let heads: Vec<Value> = self.heads.iter().map(|(name, seq)| json!([name, seq])).collect();
                self.tell(&json!({"do": "settle", "heads": heads}));
            }
            _ => {}
        }
    }

    fn measure(&mut self, now: Instant) {
        self.tell(&json!({"do": "measure"}));
        self.figures.before = self.sample();
        self.stage = Stage::Measuring(now);
    }

    fn stop(&mut self, now: Instant) {
        self.tell(&json!({"do": "stop"}));
        if let Stage::Measuring(from) = self.stage {
            self.figures.after = self.sample();
            self.figures.duration_s = (now - from).as_secs_f64();
        } else if self.stage == Stage::Opening {
            self.figures.opening_s = self.figures.opening_from.map(|from| (now - from).as_secs_f64());
            self.figures.after_opening = self.sample();
        }
        self.waiting = self.workers.len();
        self.stage = Stage::Stopping(now);
    }

    fn tell(&mut self, line: &Value) {
        for worker in &mut self.workers {
            if let Some(input) = &mut worker.input {
                // One that is gone is noticed by the end of its output.
                drop(writeln!(input, "{line}"));
            }
        }
    }

    fn sample(&mut self) -> Option<Sample> {
        if self.options.pids.is_empty() {
            return None;
        }
        let sample = server::sample(&self.options.pids);
        if sample.is_none() && !self.figures.problems.iter().any(|problem| problem.contains("--pid")) {
            self.figures.problems.push("a process named by --pid cannot be read (any more)".into());
        }
        sample
    }

    /// One row of the timeline and one line of progress.
    fn point(&mut self, now: Instant) {
        let passed = (now - std::mem::replace(&mut self.last_point, now)).as_secs_f64();
        for worker in &mut self.workers {
            worker.ticked = false;
        }
        let sum = |name: &str| self.workers.iter().filter_map(|worker| worker.tick[name].as_u64()).sum::<u64>();
        let (open, failed, lost, handshakes) = (sum("open"), sum("failed"), sum("lost"), sum("handshakes"));
        let point = Point {
            second: (now - self.began).as_secs_f64(),
            open,
            deliveries: (self.deliveries as f64 / passed.max(0.001)).round() as u64,
            p50_us: self.second.quantile(0.5),
            p99_us: self.second.quantile(0.99),
            max_us: self.second.max(),
            server: self.sample(),
        };
        if !self.options.quiet {
            self.progress(&point, failed, lost, handshakes);
        }
        if self.figures.timeline.len() < POINTS_MAX {
            self.figures.timeline.push(point);
        }
        self.second.clear();
        self.deliveries = 0;
    }

    fn progress(&self, point: &Point, failed: u64, lost: u64, handshakes: u64) {
        let stage = match self.stage {
            Stage::Warming | Stage::Calming(_) => "first connection",
            Stage::Opening | Stage::Opened(_) => "opening",
            Stage::Measuring(_) => "measuring",
            Stage::Stopping(_) | Stage::Settling(_) => "finishing",
        };
        let mut line = format!("{:4.0}s {stage}: {} of {} open", point.second, point.open, self.options.connections);
        if self.options.churn {
            line.push_str(&format!(", {handshakes} handshakes"));
        }
        line.push_str(&format!(", {} deliveries/s", point.deliveries));
        if let Some(p99) = point.p99_us {
            line.push_str(&format!(", p99 {:.1} ms", p99 as f64 / 1000.0));
        }
        if let Some(server) = &point.server {
            line.push_str(&format!(", server {:.1} MiB", server.pss_bytes as f64 / 1048576.0));
        }
        if failed > 0 {
            line.push_str(&format!(", {failed} failed"));
        }
        if lost > 0 {
            line.push_str(&format!(", {lost} lost"));
        }
        let mut out = io::stderr().lock();
        // A terminal's line is overwritten; elsewhere each is a line of its own. Nobody may be reading.
        if io::stderr().is_terminal() {
            drop(write!(out, "\r{line}\x1b[K").and_then(|()| out.flush()));
        } else {
            drop(writeln!(out, "{line}"));
        }
    }

    /// Writes the report where it was asked for.
    fn write(&self) -> Result<ExitCode, String> {
        if !self.options.quiet && io::stderr().is_terminal() {
            drop(writeln!(io::stderr()));
        }
        let report = self.figures.json();
        let text = self.figures.text(&report);
        let told = |path: &std::path::Path, error: io::Error| format!("{}: {error}", path.display());
        let to_stdout = self.options.json.as_deref().is_some_and(|path| path.as_os_str() == "-");
        if let Some(path) = &self.options.json {
            let pretty = serde_json::to_string_pretty(&report).map_err(|error| error.to_string())? + "\n";
            if to_stdout {
                io::stdout().write_all(pretty.as_bytes()).map_err(|error| told(path, error))?;
            } else {
                std::fs::write(path, pretty).map_err(|error| told(path, error))?;
            }
        }
        if let Some(path) = &self.options.plot {
            std::fs::write(path, plot::svg(&self.figures.timeline, &self.figures.title()))
                .map_err(|error| told(path, error))?;
        }
        if !self.options.quiet {
            let shown = if to_stdout {
                io::stderr().write_all(text.as_bytes())
            } else {
                io::stdout().write_all(text.as_bytes())
            };
            shown.map_err(|error| error.to_string())?;
        }
        Ok(if self.figures.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Calls `noted` on each `signal`: on a thread of its own, where anything may be done.
fn on_signal(signal: i32, noted: impl Fn() + Send + 'static) -> Result<(), String> {
    let mut signals = signal_hook::iterator::Signals::new([signal]).map_err(|error| error.to_string())?;
    thread::spawn(move || {
        for _ in signals.forever() {
            noted();
        }
    });
    Ok(())
}

/// Lets this process and its workers open as many descriptors as they may; returns how many.
fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(1 << 20);
    let raised = Rlimit { current: Some(most), maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => most,
        Err(_) => limit.current.unwrap_or(most),
    }
}

/// Starts the workers and gives each its part.
fn start(options: &RunOptions, processes: u32) -> Result<(Vec<Worker>, Receiver<Heard>), String> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rate = match (options.rate, options.churn) {
        (Some(rate), _) => rate,
        (None, true) => 1e9,
        (None, false) => RATE,
    };
    let exp = options.expire_together.then(|| (wall_us() / 1_000_000) + options.expires_in.as_secs());
    let (sender, heard) = channel();
    let mut workers = Vec::new();
    let mut first = 0;
    for number in 0..processes {
        // The first ones take what does not divide.
        let count = options.connections / processes + u32::from(number < options.connections % processes);
        let part = json!({
            "args": args,
            "first": first,
            "count": count,
            "rate": rate / f64::from(processes),
            "exp": exp,
            "warm": number == 0,
        });
        first += count;
        let mut child = Command::new(THIS_PROGRAM)
            .arg("worker")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("a worker cannot be started: {error}"))?;
        let (mut input, output) = (child.stdin.take().expect("it is piped"), child.stdout.take().expect("it is piped"));
        writeln!(input, "{part}").map_err(|error| format!("a worker takes no part: {error}"))?;
        let sender = sender.clone();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let Ok(line) = serde_json::from_str(&line) else { break };
                if sender.send((number as usize, Some(line))).is_err() {
                    return;
                }
            }
            // With nobody left to hear it, it does not matter.
            drop(sender.send((number as usize, None)));
        });
        workers.push(Worker { child, input: Some(input), tick: Value::Null, ticked: false, ended: false });
    }
    Ok((workers, heard))
}
