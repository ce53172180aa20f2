//! What this process has heard by Pub/Sub lately, to tell its echoes on the control stream: each process that hears an event
//! puts it there, dated by when *it* has heard it. Of one that hears late a logout would come after the login that followed
//! it, and permissions of before would be news.
//!
//! Source: protocol version 1, section 6. Memory: a hash and a time for each event heard within [`limits::CONTROL_OVERLAP`], at
//! most [`limits::CONTROL_ECHOES_MAX`] of them. Errors: none: an echo that is not known as one is carried out.
//! Not here: what was heard (`events`), what stands on the stream (`follow`).
//!
//! Whoever hears everything that is published hears a second event that says the same as well, so the other's entry of it is
//! an echo too. That ends with the connection: then all is forgotten, and the stream is read again from before.

use std::collections::{HashMap, VecDeque};

use ring::digest;

use crate::auth::control::ControlEntry;
use crate::limits;
use crate::time::Instant;

/// An event and its channel, hashed: of its date no more than it says itself. A process may listen to other channels.
type Hash = [u8; 16];

#[derive(Debug, Default)]
pub(super) struct Echoes {
    /// When each was last heard.
    heard: HashMap<Hash, Instant>,
    /// Each time, the earliest first.
    order: VecDeque<(Instant, Hash)>,
}

impl Echoes {
    /// `entry` was heard by Pub/Sub, on that channel.
    pub(super) fn hear(&mut self, entry: &ControlEntry, channel: &str, now: Instant) {
        let hash = hash(entry, channel);
        self.heard.insert(hash, now);
        self.order.push_back((now, hash));
        while let Some(&(at, hash)) = self.order.front()
            && (at + limits::CONTROL_OVERLAP <= now || self.order.len() > limits::CONTROL_ECHOES_MAX)
        {
            self.order.pop_front();
            if self.heard.get(&hash) == Some(&at) {
                self.heard.remove(&hash);
            }
        }
    }

    /// Whether `entry`, which another process has heard on that channel, is what was heard here as well.
    pub(super) fn is_one(&self, entry: &ControlEntry, channel: &str, now: Instant) -> bool {
        self.heard.get(&hash(entry, channel)).is_some_and(|at| now < *at + limits::CONTROL_OVERLAP)
    }

    /// From now on something may be published that is not heard here; whether anything was that is forgotten by this.
    pub(super) fn forget(&mut self) -> bool {
        self.heard.clear();
        !std::mem::take(&mut self.order).is_empty()
    }
}

fn hash(entry: &ControlEntry, channel: &str) -> Hash {
    let mut context = digest::Context::new(&digest::SHA256);
    for text in [channel, &entry.event] {
        context.update(&(text.len() as u64).to_be_bytes());
        context.update(text.as_bytes());
    }
    context.update(entry.data.as_bytes());
    context.finish().as_ref().first_chunk().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Instant = Instant::from_micros(1_000_000_000);

    fn entry(data: &str, at_ms: u64) -> ControlEntry {
        ControlEntry { event: "user-logged-out".into(), data: data.into(), at_ms }
    }

    #[test]
    fn an_echo_says_the_same_within_a_minute_whenever_it_was_heard() {
        let mut echoes = Echoes::default();
        let end = NOW + limits::CONTROL_OVERLAP;
        echoes.hear(&entry("u1", 5), "out", NOW);
        assert!(echoes.is_one(&entry("u1", 9_000), "out", NOW));
        assert!(!echoes.is_one(&entry("u2", 5), "out", NOW));
        assert!(!echoes.is_one(&entry("u1", 5), "of others", NOW), "it is not heard here");
        assert!(!echoes.is_one(&ControlEntry { event: "token-revoked".into(), ..entry("u1", 5) }, "out", NOW));
        assert!(!echoes.is_one(&entry("u1", 5), "out", end));
        // Heard again, it is remembered for longer.
        echoes.hear(&entry("u1", 6), "out", NOW + limits::CONTROL_OVERLAP / 2);
        echoes.hear(&entry("u3", 7), "out", end);
        assert!(["u1", "u3"].iter().all(|user| echoes.is_one(&entry(user, 5), "out", end)));
        assert_eq!((echoes.heard.len(), echoes.order.len()), (2, 2), "the first time is forgotten");
        assert!(echoes.forget() && !echoes.forget());
        assert!(!echoes.is_one(&entry("u3", 5), "out", end));
    }

    #[test]
    fn of_more_than_are_remembered_the_oldest_are_no_echoes() {
        let mut echoes = Echoes::default();
        for n in 0..=limits::CONTROL_ECHOES_MAX {
            echoes.hear(&entry(&n.to_string(), 0), "out", NOW);
        }
        assert_eq!((echoes.heard.len(), echoes.order.len()), (limits::CONTROL_ECHOES_MAX, limits::CONTROL_ECHOES_MAX));
        let known = ["0", "1"].map(|user| echoes.is_one(&entry(user, 0), "out", NOW));
        assert_eq!(known, [false, true]);
    }
}
