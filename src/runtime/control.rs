//! Logouts, revocations and changed permissions of the whole process: heard of in Redis or asked for by an administrator,
//! marked for all who come, told to every core for those who are there, handed on for other processes.
//!
//! Source: protocol version 1, section 6 («Control»). Memory: the marks (`auth::marks`); a message to each core, or, where
//! its mailbox is full, a flag. Errors: an event that cannot be read is counted and logged without its content.
//! Never waits: it may be called from any thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::auth::control::{ControlEntry, ControlError, Event};
use crate::auth::marks::{Concerned, Taken};
use crate::config::LogLevel;
use crate::limits;
use crate::metrics::ControlCounts;
use crate::shard::Ledger;
use crate::time::WallTime;

use super::mailbox::Mailbox;
use super::{clock, log};

/// Least time between two lines of the log about the same trouble.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Where entries go that other processes are to hear of.
pub type Publish = Box<dyn Fn(ControlEntry) + Send + Sync>;

/// The control events of a process.
pub struct Control {
    ledger: Arc<Ledger>,
    mailboxes: Vec<Arc<Mailbox>>,
    /// The way to other processes, where there is one.
    publish: OnceLock<Publish>,
    events: AtomicU64,
    refused: AtomicU64,
    dropped: AtomicU64,
    refusal_told: Told,
    drop_told: Told,
}

/// When something was last said in the log, in microseconds of the wall clock.
#[derive(Default)]
pub struct Told(AtomicU64);

impl Told {
    /// Whether it may be said again.
    pub fn again(&self, now: WallTime) -> bool {
        let last = self.0.load(Ordering::Relaxed);
        let due = last == 0 || now.since(WallTime::from_micros(last)) >= LINE_INTERVAL;
        due && self.0.compare_exchange(last, now.as_micros(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

impl Control {
    /// Of a process whose cores share `ledger` and have these mailboxes.
    pub fn new(ledger: Arc<Ledger>, mailboxes: Vec<Arc<Mailbox>>) -> Control {
        Control {
            ledger,
            mailboxes,
            publish: OnceLock::new(),
            events: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            refusal_told: Told::default(),
            drop_told: Told::default(),
        }
    }

    /// Entries that are asked for here go to other processes by `publish` from now on. The first one counts.
    pub fn publish_by(&self, publish: Publish) {
        let _ = self.publish.set(publish);
    }

    /// Carries out what was heard, in the order in which it was; what was heard before does no harm.
    pub fn heard(&self, entries: &[ControlEntry]) {
        let now = clock::now().wall;
        let mut events = Vec::new();
        // What is said of API keys, streams and ephemeral sessions is for those who keep them.
        let is_ours = |entry: &&ControlEntry| {
            !entry.is_of_api_keys() && !entry.is_of_streams() && !entry.is_refresh() && !entry.is_of_ephemerals()
        };
        for entry in entries.iter().filter(is_ours) {
            match Event::read(entry, now) {
                Ok(read) => events.extend(read),
                Err(error) => self.refuse(&entry.event, error, now),
            }
        }
        self.carry_out(&events, now);
    }

    /// Carries out what an administrator asks for, and lets other processes hear of it.
    ///
    /// # Errors
    /// [`ControlError`]: nothing was done.
    pub fn ask(&self, entry: ControlEntry) -> Result<(), ControlError> {
        let now = clock::now().wall;
        let events = Event::read(&entry, now)?;
        self.carry_out(&events, now);
        if let Some(publish) = self.publish.get() {
            publish(entry);
        }
        Ok(())
    }

    /// What was counted so far, and how many marks there are.
    pub fn counts(&self) -> ControlCounts {
        ControlCounts {
            events: self.events.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            marks: self.ledger.marks().len() as u64,
            marks_dropped: self.dropped.load(Ordering::Relaxed),
        }
    }

    fn refuse(&self, event: &str, error: ControlError, now: WallTime) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        if self.refusal_told.again(now) {
            // Of a name that is not ours only that it is not.
            let event = if error == ControlError::UnknownEvent { "unknown" } else { event };
            let fields: [(&str, &dyn std::fmt::Display); 2] = [("event", &event), ("error", &error)];
            log::write(LogLevel::Warn, &fields, "A control event was not understood and has no effect.");
        }
    }

    fn carry_out(&self, events: &[Event], now: WallTime) {
        let marks = self.ledger.marks();
        let mut concerned = Vec::new();
        let mut dropped = 0;
        for event in events {
            // Its mark stands before a core hears of it: who opens in between is judged by it.
            let Taken { concerned: one, dropped: gone } = marks.take(event, now);
            concerned.extend(one);
            dropped += gone as u64;
        }
        self.events.fetch_add(events.len() as u64, Ordering::Relaxed);
        if dropped > 0 {
            self.dropped.fetch_add(dropped, Ordering::Relaxed);
            if self.drop_told.again(now) {
                let sentence = "There are more logouts, revocations and changed permissions than are kept in mind: those \
                                that end soonest are forgotten, and tokens that they refused may be good again. Lower \
                                auth.revocation_keep to what tokens live.";
                log::write(LogLevel::Error, &[("marks", &marks.len()), ("dropped", &dropped)], sentence);
            }
        }
        if concerned.is_empty() {
            return;
        }
        if concerned.len() > limits::CONCERNED_MAX {
            concerned = vec![Concerned::Everyone];
        }
        let concerned: Arc<[Concerned]> = concerned.into();
        for mailbox in &self.mailboxes {
            mailbox.post_control(&concerned);
        }
    }
}
