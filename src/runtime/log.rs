//! The operator's log: one full sentence an event on standard error, as text or JSON.
//!
//! Memory: at most [`LINES_WAITING_MAX`] lines wait for the writer thread; further ones are dropped and counted, so that
//! a full pipe never holds a core. Errors: none. Not here: what is worth a line. Secrets have no way in: fields are
//! numbers, ids and fixed words.
//!
//! Lines that say who has ordered what ([`audit`]) are of no level: they are written whatever `log.level` is, and wait for
//! room, as no core writes them.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use crate::config::{LogFormat, LogLevel, LogOptions};

/// Lines that may wait to be written.
pub const LINES_WAITING_MAX: usize = 4096;
/// How long an order's line may wait for room; then it is dropped and counted like any other.
const AUDIT_WAIT_MAX: Duration = Duration::from_secs(2);
/// How often it is tried meanwhile.
const AUDIT_TRY_INTERVAL: Duration = Duration::from_millis(10);

enum Line {
    Text(String),
    Flush(SyncSender<()>),
}

struct Log {
    options: LogOptions,
    lines: SyncSender<Line>,
    dropped: AtomicU64,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Starts the writer. A second call changes nothing.
pub fn start(options: LogOptions) {
    LOG.get_or_init(|| {
        let (lines, waiting) = sync_channel::<Line>(LINES_WAITING_MAX);
        let writer = std::thread::Builder::new().name("log".into()).spawn(move || {
            for line in waiting {
                match line {
                    // Where standard error is gone there is nobody to tell.
                    Line::Text(text) => drop(std::io::stderr().write_all(text.as_bytes())),
                    Line::Flush(done) => drop(done.send(())),
                }
            }
        });
        drop(writer);
        Log { options, lines, dropped: AtomicU64::new(0) }
    });
}

/// Writes a line, with fields before the sentence. Before [`start`] it goes to standard error as it is.
pub fn write(level: LogLevel, fields: &[(&str, &dyn std::fmt::Display)], sentence: &str) {
    let Some(log) = LOG.get() else {
        eprintln!("restcast: {sentence}");
        return;
    };
    if level > log.options.level {
        return;
    }
    log.line(name(level), fields, sentence, Duration::ZERO);
}

/// Writes a line about an order: who has given it, about whom, and why. Of the level `audit`, which no `log.level` leaves out.
/// May wait: not for a core's thread.
pub fn audit(fields: &[(&str, &dyn std::fmt::Display)], sentence: &str) {
    match LOG.get() {
        Some(log) => log.line("audit", fields, sentence, AUDIT_WAIT_MAX),
        None => eprintln!("restcast: {sentence}"),
    }
}

impl Log {
    /// Hands a line to the writer. Where that has as many as it may, waits so long for room.
    fn line(&self, level: &str, fields: &[(&str, &dyn std::fmt::Display)], sentence: &str, patience: Duration) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let mut line = Line::Text(match self.options.format {
            LogFormat::Text => as_text(level, fields, sentence, dropped),
            LogFormat::Json => as_json(level, fields, sentence, dropped),
        });
        let mut left = patience;
        while let Err(TrySendError::Full(back)) = self.lines.try_send(line) {
            if left.is_zero() {
                self.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
                return;
            }
            super::clock::hold_thread(AUDIT_TRY_INTERVAL.min(left));
            left = left.saturating_sub(AUDIT_TRY_INTERVAL);
            line = back;
        }
    }
}

/// Waits until everything written so far has left, at most a second.
pub fn flush() {
    if let Some(log) = LOG.get() {
        let (done, wait) = sync_channel(1);
        if log.lines.send(Line::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(Duration::from_secs(1));
        }
    }
}

fn name(level: LogLevel) -> &'static str {
    match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
        LogLevel::Trace => "trace",
    }
}

fn as_text(level: &str, fields: &[(&str, &dyn std::fmt::Display)], sentence: &str, dropped: u64) -> String {
    let mut line = format!("{} {:5}", super::clock::now().wall, level);
    for (field, value) in fields {
        let value: String = value.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let _ = write!(line, " {field}={value}");
    }
    if dropped > 0 {
        let _ = write!(line, " lines_dropped={dropped}");
    }
    let _ = writeln!(line, " {sentence}");
    line
}

fn as_json(level: &str, fields: &[(&str, &dyn std::fmt::Display)], sentence: &str, dropped: u64) -> String {
    let mut object = serde_json::Map::new();
    object.insert("ts".into(), super::clock::now().wall.as_micros().into());
    object.insert("level".into(), level.into());
    for (field, value) in fields {
        object.insert((*field).into(), value.to_string().into());
    }
    if dropped > 0 {
        object.insert("lines_dropped".into(), dropped.into());
    }
    object.insert("message".into(), sentence.into());
    let mut line = serde_json::Value::Object(object).to_string();
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_cannot_forge_a_line() {
        let line = as_text("warn", &[("stream", &"a\nerror forged")], "It failed.", 0);
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.ends_with(" warn  stream=a error forged It failed.\n"), "{line}");
        let line = as_json("error", &[("stream", &"a\n\"b")], "It failed.", 3);
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&object["stream"], &object["lines_dropped"], &object["level"]),
            (&"a\n\"b".into(), &3.into(), &"error".into())
        );
    }

    #[test]
    fn an_orders_line_is_written_at_every_level_and_waits_for_room() {
        let options = LogOptions { level: LogLevel::Error, format: LogFormat::Text };
        let (lines, waiting) = sync_channel::<Line>(1);
        let log = Log { options, lines, dropped: AtomicU64::new(0) };
        let text = |line: Line| match line {
            Line::Text(text) => text,
            Line::Flush(_) => String::new(),
        };
        std::thread::scope(|scope| {
            log.line("audit", &[("by", &"a")], "One.", AUDIT_WAIT_MAX);
            scope.spawn(|| log.line("audit", &[("by", &"b")], "Two.", Duration::from_secs(60)));
            let seen = [0, 1].map(|_| text(waiting.recv_timeout(Duration::from_secs(60)).expect("a line")));
            assert!(seen[0].ends_with(" audit by=a One.\n") && seen[1].ends_with(" audit by=b Two.\n"), "{seen:?}");
        });
        // But not for ever: whoever gave the order is answered.
        log.line("audit", &[], "Three.", AUDIT_WAIT_MAX);
        log.line("audit", &[], "Four.", AUDIT_TRY_INTERVAL);
        assert_eq!(log.dropped.load(Ordering::Relaxed), 1);
    }
}
