//! What Redis says, put in the cores' mailboxes.
//!
//! Memory: what a full mailbox has not taken: one answer at most for each question, and one state. Errors: none.
//! Not here: what a core makes of it (`shard`).

use std::collections::VecDeque;
use std::sync::Arc;

use super::Sink;
use crate::auth::control::ControlEntry;
use crate::ids::{CoreId, StreamId};
use crate::runtime::mailbox::{Full, Mailbox, Message};
use crate::shard::{Found, PeerAsk, Refreshed};

/// Whoever hears control events.
type Hear = Box<dyn Fn(&[ControlEntry]) + Send>;

/// Whoever makes lists of connections for other processes. It must not wait.
type List = Box<dyn Fn(PeerAsk, Vec<u8>) + Send>;

/// The cores' mailboxes, and whoever hears control events.
pub struct Mailboxes {
    mailboxes: Vec<Arc<Mailbox>>,
    /// Messages that found a mailbox full, in their order.
    undelivered: VecDeque<(usize, Message)>,
    heard: Hear,
    list: List,
    takes_calls: Box<dyn Fn() + Send>,
}

impl Mailboxes {
    /// Every core's, by its number; `heard` is told of control events, `list` of lists that other processes ask for,
    /// `takes_calls` that calls are answered from now on.
    pub fn new(mailboxes: Vec<Arc<Mailbox>>, heard: Hear, list: List, takes_calls: Box<dyn Fn() + Send>) -> Mailboxes {
        Mailboxes { mailboxes, undelivered: VecDeque::new(), heard, list, takes_calls }
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

    fn renewal(&mut self, core: CoreId, index: u32, sealed: Vec<u8>, ask: PeerAsk) -> bool {
        let Some(mailbox) = self.mailboxes.get(usize::from(core.0)) else { return false };
        // Where there is no room it gets no answer, as if the process were too busy, which it is.
        drop(mailbox.post(Message::PeerRenewal { connection: index, sealed, ask }));
        true
    }

    fn list(&mut self, ask: PeerAsk, sealed: Vec<u8>) {
        (self.list)(ask, sealed);
    }

    fn hook(&mut self, id: StreamId, sealed: Vec<u8>) {
        // One core judges it, and has the others poll.
        if let Some(mailbox) = self.mailboxes.first() {
            drop(mailbox.post(Message::PeerHook { id, sealed }));
        }
    }

    fn refresh(&mut self, refreshed: Vec<Refreshed>) {
        let refreshed: Arc<[Refreshed]> = refreshed.into();
        for mailbox in &self.mailboxes {
            // Where a core has no room it has other things to do than to poll early.
            drop(mailbox.post(Message::PeerRefresh(Arc::clone(&refreshed))));
        }
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
