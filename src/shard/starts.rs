//! When streams that callers fill in were last polled, for as long as that matters to who asks for one again after it was
//! forgotten: it is polled no sooner than if it had stayed.
//!
//! Memory: [`STARTS_MAX`] entries a core; past it the one that matters least long goes. Errors: none.

use std::collections::HashMap;

use crate::limits::STARTS_MAX;
use crate::time::Instant;

/// By the hash of what is polled.
#[derive(Debug, Default)]
pub(super) struct Starts {
    of: HashMap<u64, Start>,
}

#[derive(Clone, Copy, Debug)]
struct Start {
    at: Instant,
    until: Instant,
}

impl Starts {
    /// A stream is forgotten whose last poll began at `at`, which matters until `until`.
    pub(super) fn remember(&mut self, polled: u64, at: Instant, until: Instant, now: Instant) {
        if until <= now {
            return;
        }
        if self.of.len() >= STARTS_MAX {
            self.of.retain(|_, start| start.until > now);
            let least = self.of.iter().min_by_key(|(_, start)| start.until).map(|(&polled, _)| polled);
            if let Some(least) = least.filter(|_| self.of.len() >= STARTS_MAX) {
                self.of.remove(&least);
            }
        }
        self.of.insert(polled, Start { at, until });
    }

    /// When that stream, which is made anew, was polled last, if that matters still.
    pub(super) fn take(&mut self, polled: u64, now: Instant) -> Option<Instant> {
        self.of.remove(&polled).filter(|start| start.until > now).map(|start| start.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_are_remembered_and_those_that_matter_longest() {
        let at = |us: usize| Instant::from_micros(1_000_000 + us as u64);
        let mut starts = Starts::default();
        starts.remember(7, at(0), at(0), at(0));
        assert_eq!(starts.of.len(), 0, "what does not matter is not kept");
        for no in 0..STARTS_MAX {
            starts.remember(no as u64, at(0), at(1_000 + no), at(0));
        }
        starts.remember(u64::MAX, at(1), at(50_000_000), at(1));
        assert_eq!((starts.of.len(), starts.take(0, at(1))), (STARTS_MAX, None), "the first was the first to go");
        assert_eq!((starts.take(1, at(1)), starts.take(1, at(1))), (Some(at(0)), None));
        assert_eq!(starts.take(2, at(1_002)), None, "its time is over");
        assert_eq!(starts.take(u64::MAX, at(1)), Some(at(1)));
        for no in 0..2 * STARTS_MAX {
            starts.remember(no as u64, at(no), at(no + 10), at(no));
        }
        assert!(starts.of.len() <= STARTS_MAX);
    }
}
