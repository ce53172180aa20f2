//! When the key set of an issuer is fetched: by itself before it is too old, and once for a key that is not in it.
//!
//! Source: protocol version 1, section 2; RFC 9111 section 4.2 for what «too old» is; RFC 8725 section 3.10 for why strangers
//! must not set the pace. Time and chance are arguments.
//! Memory: a few words an issuer. Errors: none. Not here: fetching (`runtime::jwks`), what a set holds (`jwks`).

use std::time::Duration;

use crate::limits::{JWKS_COOL_DOWN, JWKS_LIFE, JWKS_LIFE_MAX, JWKS_LIFE_MIN, JWKS_RETRY_MAX, JWKS_RETRY_MIN};
use crate::time::Instant;

/// What is to be done for somebody who has met an unknown key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wanted {
    /// Fetch the set; who asks waits for it.
    Fetch,
    /// A fetch is under way; who asks waits for it.
    Wait,
    /// The set was fetched for another's sake a moment ago: what is not in it now is not waited for.
    Refuse,
}

/// One issuer's times.
#[derive(Clone, Copy, Debug)]
pub struct Refresh {
    fetching: bool,
    /// When the set is fetched by itself.
    due: Instant,
    /// Until when an unknown key fetches nothing.
    cool_until: Instant,
    /// Failures in a row.
    failures: u32,
    /// When the set in force was fetched.
    fetched: Option<Instant>,
    /// Whether a fetch has ended, well or not.
    tried: bool,
}

impl Refresh {
    /// Of a set that has not been fetched: due at once.
    pub fn new(now: Instant) -> Refresh {
        let cool_until = Instant::default();
        Refresh { fetching: false, due: now, cool_until, failures: 0, fetched: None, tried: false }
    }

    /// Whether a fetch is to begin by itself; if so it has begun.
    pub fn begin_if_due(&mut self, now: Instant) -> bool {
        let begins = !self.fetching && self.due <= now;
        self.fetching |= begins;
        begins
    }

    /// Somebody has met an unknown key. On [`Wanted::Fetch`] a fetch has begun.
    pub fn want(&mut self, now: Instant) -> Wanted {
        if self.fetching {
            return Wanted::Wait;
        }
        if now < self.cool_until {
            return Wanted::Refuse;
        }
        // From its beginning on, and whatever comes of it: a server in trouble is asked no more often than one that is well.
        self.cool_until = now + JWKS_COOL_DOWN;
        self.fetching = true;
        Wanted::Fetch
    }

    /// The fetch has brought a set that may be used for `max_age` by its own word. `chance` is uniform in 0..1000.
    pub fn succeeded(&mut self, now: Instant, max_age: Option<Duration>, chance: u32) {
        let life = max_age.unwrap_or(JWKS_LIFE).clamp(JWKS_LIFE_MIN, JWKS_LIFE_MAX);
        // Before it is too old, and not all processes at once: after eight to nine tenths of its life.
        self.due = now + life / 10 * 8 + life / 10 * chance.min(1000) / 1000;
        self.failures = 0;
        self.fetched = Some(now);
        self.ended();
    }

    /// The fetch has brought nothing: the last set stays in force. `chance` is uniform in 0..1000.
    pub fn failed(&mut self, now: Instant, chance: u32) {
        let wait = JWKS_RETRY_MIN.saturating_mul(1 << self.failures.min(16)).min(JWKS_RETRY_MAX);
        // Never longer than that, and down to half of it.
        self.due = now + wait - wait / 2 * chance.min(1000) / 1000;
        self.failures = self.failures.saturating_add(1);
        self.ended();
    }

    fn ended(&mut self) {
        self.fetching = false;
        self.tried = true;
    }

    /// When to call [`Refresh::begin_if_due`]; `None`: not before the fetch under way has ended.
    pub fn next_timeout(&self) -> Option<Instant> {
        (!self.fetching).then_some(self.due)
    }

    /// Whether a fetch has ended, well or not.
    pub fn is_tried(&self) -> bool {
        self.tried
    }

    /// When the set in force was fetched.
    pub fn fetched(&self) -> Option<Instant> {
        self.fetched
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn at(s: u64) -> Instant {
        Instant::from_micros((1_000 + s) * 1_000_000)
    }

    #[test]
    fn a_set_is_fetched_at_once_and_before_its_life_is_over() {
        let mut refresh = Refresh::new(at(0));
        assert_eq!(refresh.next_timeout(), Some(at(0)));
        assert!(!refresh.is_tried() && refresh.begin_if_due(at(0)) && !refresh.begin_if_due(at(0)), "one flight");
        assert_eq!(refresh.next_timeout(), None);
        refresh.succeeded(at(1), Some(Duration::from_secs(1_000)), 0);
        assert!(refresh.is_tried());
        assert_eq!((refresh.next_timeout(), refresh.fetched()), (Some(at(801)), Some(at(1))));
        assert!(!refresh.begin_if_due(at(800)) && refresh.begin_if_due(at(801)));
        refresh.succeeded(at(801), Some(Duration::from_secs(1_000)), 1_000);
        assert_eq!(refresh.next_timeout(), Some(at(801 + 900)));
    }

    #[test]
    fn the_life_of_a_set_is_bounded_on_both_sides() {
        let due = |max_age: Option<u64>| {
            let mut refresh = Refresh::new(at(0));
            refresh.succeeded(at(0), max_age.map(Duration::from_secs), 0);
            refresh.next_timeout()
        };
        assert_eq!(due(None), Some(at(12 * 60)));
        assert_eq!(due(Some(0)), Some(at(48)));
        assert_eq!(due(Some(60)), Some(at(48)));
        assert_eq!(due(Some(86_400)), Some(at(69_120)));
        assert_eq!(due(Some(u64::MAX)), Some(at(69_120)));
    }

    #[test]
    fn an_unknown_key_fetches_once_in_30_s_and_its_friends_wait_for_it() {
        let mut refresh = Refresh::new(at(0));
        assert!(refresh.begin_if_due(at(0)));
        assert_eq!(refresh.want(at(0)), Wanted::Wait, "the first fetch serves them too");
        refresh.succeeded(at(1), None, 0);
        assert_eq!(refresh.want(at(2)), Wanted::Fetch, "the start is no reason to wait");
        assert_eq!(refresh.want(at(2)), Wanted::Wait);
        refresh.succeeded(at(3), None, 0);
        assert_eq!(refresh.want(at(3)), Wanted::Refuse);
        assert_eq!(refresh.want(at(32) - Duration::from_micros(1)), Wanted::Refuse);
        assert_eq!(refresh.want(at(32)), Wanted::Fetch, "30 s after the last began");
        refresh.failed(at(33), 0);
        assert_eq!(refresh.want(at(34)), Wanted::Refuse, "a failure is no reason to ask more often");
        assert!(refresh.begin_if_due(at(34)), "but it is tried again by itself");
    }

    #[test]
    fn failures_are_tried_again_ever_later() {
        let mut refresh = Refresh::new(at(0));
        let mut waits = Vec::new();
        let mut now = at(0);
        for _ in 0..9 {
            assert!(refresh.begin_if_due(now));
            refresh.failed(now, 0);
            let next = refresh.next_timeout().unwrap();
            waits.push(next.since(now).as_secs());
            now = next;
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!((refresh.failures(), refresh.fetched()), (9, None));
        refresh.failed(now, 1_000);
        assert_eq!(refresh.next_timeout(), Some(now + Duration::from_secs(30)), "chance halves it at most");
        refresh.succeeded(now, None, 0);
        refresh.failed(now, 0);
        assert_eq!(refresh.next_timeout(), Some(now + JWKS_RETRY_MIN), "a success forgives");
    }

    proptest! {
        /// Whatever happens, strangers make no two fetches begin within the cool-down.
        #[test]
        fn strangers_do_not_set_the_pace(steps in prop::collection::vec((0u8..4, 0u64..40, 0u32..=1000), 1..200)) {
            let (mut refresh, mut now) = (Refresh::new(at(0)), at(0));
            let mut begun: Option<Instant> = None;
            for (step, s, chance) in steps {
                now = now + Duration::from_secs(s);
                match step {
                    0 => { refresh.begin_if_due(now); }
                    1 if refresh.want(now) == Wanted::Fetch => {
                        prop_assert!(begun.is_none_or(|begun| begun + JWKS_COOL_DOWN <= now));
                        begun = Some(now);
                    },
                    1 => {},
                    2 if refresh.fetching => refresh.succeeded(now, Some(Duration::from_secs(s * 1_000)), chance),
                    3 if refresh.fetching => refresh.failed(now, chance),
                    _ => {}
                }
                let next = refresh.next_timeout();
                prop_assert!(next.is_none_or(|next| next <= now + JWKS_LIFE_MAX));
            }
        }
    }
}
