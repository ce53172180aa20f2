//! What Redis says, put in the cores' mailboxes.
//!
//! Memory: what a full mailbox has not taken: one answer at most for each question, and one state. Errors: none.
//! Not here: what a core makes of it (`shard`).

use std::collections::VecDeque;
use std::sync::Arc;

use super::Sink;
use crate::auth::control::ControlEntry;
use crate::ids::CoreId;
use crate::runtime::mailbox::{Full, Mailbox, Message};
use crate::shard::Found;

/// Whoever hears control events.
type Hear = Box<dyn Fn(&[ControlEntry]) + Send>;

/// The cores' mailboxes, and whoever hears control events.
pub struct Mailboxes {
    mailboxes: Vec<Arc<Mailbox>>,
    /// Messages that found a mailbox full, in their order.
    undelivered: VecDeque<(usize, Message)>,
    heard: Hear,
    takes_calls: Box<dyn Fn() + Send>,
}

impl Mailboxes {
    /// Every core's, by its number; `heard` is told of control events, `takes_calls` that calls are answered from now on.
    pub fn new(mailboxes: Vec<Arc<Mailbox>>, heard: Hear, takes_calls: Box<dyn Fn() + Send>) -> Mailboxes {
        Mailboxes { mailboxes, undelivered: VecDeque::new(), heard, takes_calls }
    }

    fn post(&mut self, to: usize, message: Message) {
        let Some(mailbox) = self.mailboxes.get(to) else { return };
        if self.undelivered.is_empty() {
            if let Err(Full(message)) = mailbox.post(message) {
                self.undelivered.push_back((to, message));
            }
        } else {
            self.undelivered.push_back((to, message));
        }
    }
}

impl Sink for Mailboxes {
    fn found(&mut self, core: CoreId, ask: u64, found: Found) {
        self.post(usize::from(core.0), Message::Found { ask, found });
    }

    fn heard(&mut self, entries: Vec<ControlEntry>) {
        (self.heard)(&entries);
    }

    fn state(&mut self, up: bool) {
        // What was said before and has not arrived is out of date.
        self.undelivered.retain(|(_, message)| !matches!(message, Message::StoreState { .. }));
        for core in 0..self.mailboxes.len() {
            self.post(core, Message::StoreState { up });
        }
    }

    fn takes_calls(&mut self) {
        (self.takes_calls)();
    }

    fn settle(&mut self) -> bool {
        while let Some((to, message)) = self.undelivered.pop_front() {
            if let Some(mailbox) = self.mailboxes.get(to)
                && let Err(Full(message)) = mailbox.post(message)
            {
                self.undelivered.push_front((to, message));
                return false;
            }
        }
        true
    }
}
