//! The operator's rate of requests to one origin, and the queue of those who wait for it.
//!
//! A request goes when the bucket is free, which alone keeps the rate. Those who wait have places in a queue, one gap apart, so
//! that they come one after the other and in their turn. A place that is given back, and what a request leaves that was not
//! sent after all, is taken by whoever looks next: those who wait look every now and then, so that none waits for somebody who
//! has gone.
//! Source: GCRA (ITU-T I.371). Memory: an entry for each who waits, of which there are no more than streams, and for each place
//! that was given back and not taken yet, at most `PLACES_FREE_MAX`. Errors: none. Not here: who asks for what (`budget`).

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::action;
use crate::limits::{PLACES_FREE_MAX, QUEUE_MAX};
use crate::time::Instant;

/// A rate of requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rate {
    /// So many requests in that time.
    pub every: action::Rate,
    /// So many of them may come at once, 1 at least.
    pub burst: u32,
}

impl Rate {
    fn gap(self) -> Duration {
        self.every.period / self.every.count.max(1)
    }
}

/// Whoever waits looks at least so often whether its turn has come sooner, or once a gap where that is less often,
const LOOK: Duration = Duration::from_secs(1);
/// and where many wait, all of them together once in this time.
const LOOK_APART: Duration = Duration::from_millis(4);

/// Places ahead of one's own that are counted: whoever has more before it looks again when these have gone.
const AHEAD_COUNTED: usize = 64;

/// A place in the queue.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Place {
    at: Instant,
    /// Which rate it was given for.
    round: u32,
}

/// What one request has taken from the bucket.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Taken {
    at: Instant,
    round: u32,
    no: u64,
}

/// When the turn of somebody comes, at the latest as far as is known, and how soon to look again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Turn {
    pub(super) until: Instant,
    pub(super) look: Duration,
}

/// A request goes when `free` has come.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    rate: Option<Rate>,
    /// Counts the rates that there were.
    round: u32,
    /// GCRA's theoretical arrival time.
    arrival: Instant,
    /// Requests that were sent.
    sent: u64,
    /// The first place that nobody has had.
    tail: Instant,
    /// Places before that which nobody has any more.
    holes: BTreeSet<Instant>,
    /// The places of those who wait, and how many have each: by these they go one after the other, however far a request
    /// that did not wait, or one that came late, has put all of them off.
    places: BTreeMap<Instant, u32>,
    /// Those who have a place.
    waiting: u32,
}

impl Bucket {
    /// From now on this rate holds. What was used up under another one counts for no longer than one gap of it.
    pub(super) fn set(&mut self, now: Instant, rate: Option<Rate>) {
        if rate == self.rate {
            return;
        }
        (self.rate, self.round, self.waiting) = (rate, self.round.wrapping_add(1), 0);
        self.forget_places();
        if let Some(rate) = rate {
            self.arrival = self.arrival.min(now + rate.gap());
        }
    }

    /// When a request may go, whoever waits.
    pub(super) fn free_at(&self, now: Instant) -> Instant {
        self.rate.map_or(now, |rate| self.free(rate).max(now))
    }

    fn free(&self, rate: Rate) -> Instant {
        self.arrival - rate.gap() * rate.burst.saturating_sub(1)
    }

    /// `None`: a request may go now, and the place that was held for it is given up. Else there is one from now on.
    pub(super) fn wait(&mut self, now: Instant, slot: &mut Option<Place>) -> Option<Turn> {
        let Some(rate) = self.rate else {
            *slot = None;
            return None;
        };
        *slot = slot.filter(|place| place.round == self.round);
        let (gap, free) = (rate.gap(), self.free(rate));
        // Nobody has come for them in time.
        while self.holes.first().is_some_and(|&hole| hole + gap <= now) {
            self.holes.pop_first();
        }
        let tail = self.tail.max(free);
        let hole = self.holes.first().copied().filter(|&hole| hole < slot.map_or(tail, |place| place.at));
        // Free for a whole gap: no place that is due has a use for it.
        let is_idle = free + gap <= now;
        if is_idle || (slot.is_none() && free <= now && self.places.is_empty()) {
            if let Some(hole) = hole.filter(|&hole| hole <= now) {
                self.holes.remove(&hole);
            }
            self.leave(slot);
            return None;
        }
        let at = match (hole, &slot) {
            (Some(hole), _) => {
                self.holes.remove(&hole);
                hole
            }
            (None, Some(place)) => place.at,
            (None, None) => {
                let place = tail.min(now + QUEUE_MAX);
                self.tail = place + gap;
                place
            }
        };
        if hole.is_some() || slot.is_none() {
            *self.places.entry(at).or_default() += 1;
            self.waiting += 1;
            self.leave(slot);
        }
        *slot = Some(Place { at, round: self.round });
        let ahead = self.places.range(..at).take(AHEAD_COUNTED).map(|(_, held)| held).sum();
        let until = at.max(free + gap * ahead);
        if until <= now {
            // It is used now, not given back.
            *slot = None;
            self.has_left(at);
            return None;
        }
        Some(Turn { until, look: gap.min(LOOK).max(LOOK_APART * self.waiting) })
    }

    /// A request is sent.
    pub(super) fn take(&mut self, now: Instant) -> Taken {
        self.sent += 1;
        if let Some(rate) = self.rate {
            self.arrival = self.arrival.max(now) + rate.gap();
        }
        Taken { at: now, round: self.round, no: self.sent }
    }

    /// It was not sent after all. Where others were sent meanwhile nobody knows what would be left without it: it counts.
    pub(super) fn give_back(&mut self, taken: Taken) {
        let is_last = (taken.round, taken.no) == (self.round, self.sent);
        if let Some(rate) = self.rate.filter(|_| is_last) {
            self.sent -= 1;
            self.arrival = self.arrival - rate.gap();
            if self.waiting > 0 {
                self.offer(taken.at, rate.gap());
            }
        }
    }

    /// Whoever had that place waits no more.
    pub(super) fn leave(&mut self, slot: &mut Option<Place>) {
        let place = slot.take().filter(|place| place.round == self.round);
        if let (Some(place), Some(rate)) = (place, self.rate) {
            self.offer(place.at, rate.gap());
            self.has_left(place.at);
        }
    }

    fn offer(&mut self, at: Instant, gap: Duration) {
        if at + gap != self.tail {
            if self.holes.len() < PLACES_FREE_MAX {
                self.holes.insert(at);
            }
            return;
        }
        self.tail = at;
        while let Some(&last) = self.holes.last()
            && last + gap == self.tail
        {
            self.holes.pop_last();
            self.tail = last;
        }
    }

    fn has_left(&mut self, place: Instant) {
        if let Entry::Occupied(mut held) = self.places.entry(place) {
            *held.get_mut() -= 1;
            if *held.get() == 0 {
                held.remove();
            }
        }
        self.waiting = self.waiting.saturating_sub(1);
        if self.waiting == 0 {
            self.forget_places();
        }
    }

    fn forget_places(&mut self) {
        self.holes.clear();
        self.places.clear();
        self.tail = Instant::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn at(at_ms: u64) -> Instant {
        Instant::from_micros(5_000_000_000 + at_ms * 1_000)
    }

    fn rate(count: u32, period: Duration, burst: u32) -> Option<Rate> {
        Some(Rate { every: action::Rate { count, period }, burst })
    }

    /// One request in a second.
    fn bucket() -> Bucket {
        let mut bucket = Bucket::default();
        bucket.set(at(0), rate(1, ms(1_000), 1));
        bucket
    }

    /// How many milliseconds later the turn of whoever has `slot` comes; `None`: it has come, and is used.
    fn ask(bucket: &mut Bucket, now_ms: u64, slot: &mut Option<Place>) -> Option<u64> {
        match bucket.wait(at(now_ms), slot) {
            Some(turn) => Some(turn.until.since(at(now_ms)).as_millis() as u64),
            None => {
                bucket.take(at(now_ms));
                None
            }
        }
    }

    #[test]
    fn who_waits_goes_in_turn_though_requests_that_do_not_wait_put_all_off() {
        let mut bucket = bucket();
        assert_eq!(ask(&mut bucket, 0, &mut None), None);
        let mut slots = [None; 3];
        slots.iter_mut().for_each(|slot| assert!(ask(&mut bucket, 0, slot).is_some()));
        for _ in 0..5 {
            bucket.take(at(0));
        }
        // All look as often as they can, the last of them first, and whoever has gone comes back at once.
        let mut went = [0; 3];
        for now in (0..16_000).step_by(10) {
            for asker in (0..3).rev() {
                if ask(&mut bucket, now, &mut slots[asker]).is_none() {
                    went[asker] += 1;
                }
            }
        }
        assert!(went.iter().all(|&times| (3..=4).contains(&times)), "{went:?}");
    }

    #[test]
    fn the_places_of_those_who_have_gone_hold_nobody() {
        let mut bucket = bucket();
        assert_eq!(ask(&mut bucket, 0, &mut None), None);
        let mut slots = [None; 40];
        for (place, slot) in (1..).zip(&mut slots) {
            assert_eq!(ask(&mut bucket, 0, slot), Some(1_000 * place));
        }
        for slot in &mut slots {
            bucket.leave(slot);
        }
        let mut newcomer = None;
        assert_eq!(ask(&mut bucket, 500, &mut newcomer), Some(500));
        assert_eq!(ask(&mut bucket, 1_000, &mut newcomer), None);
    }

    #[test]
    fn whoever_looks_takes_the_first_place_that_was_given_back() {
        let mut bucket = bucket();
        ask(&mut bucket, 0, &mut None);
        let mut slots = [None; 4];
        for slot in &mut slots {
            ask(&mut bucket, 0, slot);
        }
        let [first, second, third, fourth] = &mut slots;
        bucket.leave(second);
        assert_eq!(ask(&mut bucket, 100, fourth), Some(1_900));
        let mut newcomer = None;
        assert_eq!(ask(&mut bucket, 200, &mut newcomer), Some(3_800), "the place that this one has left");
        assert_eq!(ask(&mut bucket, 300, third), Some(2_700), "there is none before its own");
        bucket.leave(first);
        bucket.leave(third);
        // Two of five are left, and one more: at the places of those who have gone.
        let mut last = None;
        assert_eq!(ask(&mut bucket, 1_500, &mut last), None, "a second after the last request, and nobody is due");
        assert_eq!(ask(&mut bucket, 2_500, fourth), None);
        assert_eq!(ask(&mut bucket, 3_000, &mut newcomer), Some(500), "the rate is kept");
    }

    #[test]
    fn those_who_wait_look_often_and_together_no_more_than_is_good() {
        let mut bucket = bucket();
        ask(&mut bucket, 0, &mut None);
        let mut look = || bucket.wait(at(0), &mut None).expect("it waits").look;
        assert_eq!(look(), ms(1_000));
        assert_eq!((1..1_000).map(|_| look()).last(), Some(ms(4_000)));
        let mut hourly = Bucket::default();
        hourly.set(at(0), rate(1, ms(3_600_000), 1));
        ask(&mut hourly, 0, &mut None);
        assert_eq!(hourly.wait(at(0), &mut None).expect("it waits").look, ms(1_000));
    }

    #[test]
    fn what_was_not_sent_is_given_back() {
        let mut bucket = bucket();
        let taken = bucket.take(at(0));
        let mut slots = [None; 2];
        assert_eq!(slots.each_mut().map(|slot| ask(&mut bucket, 10, slot)), [Some(990), Some(1_990)]);
        bucket.give_back(taken);
        let [first, second] = &mut slots;
        assert_eq!(ask(&mut bucket, 20, second), None, "whoever looks first goes");
        assert_eq!(ask(&mut bucket, 30, first), Some(990), "and nobody else");
        // What was taken under another rate is nothing to this one.
        let taken = bucket.take(at(1_020));
        bucket.set(at(1_020), rate(10, ms(1_000), 1));
        bucket.give_back(taken);
        assert_eq!(ask(&mut bucket, 1_020, &mut None), Some(100));
    }

    #[test]
    fn what_is_given_back_late_is_not_there_twice() {
        let mut bucket = bucket();
        let late = [0, 1_000, 2_001].map(|at_ms| bucket.take(at(at_ms)));
        assert_eq!(ask(&mut bucket, 3_002, &mut None), None);
        for taken in late {
            bucket.give_back(taken);
            let mut slot = None;
            assert_eq!(ask(&mut bucket, 3_003, &mut slot), Some(999));
            bucket.leave(&mut slot);
        }
    }

    #[test]
    fn a_rate_that_is_raised_holds_at_once_for_those_who_wait() {
        let mut bucket = Bucket::default();
        bucket.set(at(0), rate(1, ms(60_000), 1));
        ask(&mut bucket, 0, &mut None);
        let mut slots = [None; 3];
        let asked = slots.each_mut().map(|slot| ask(&mut bucket, 0, slot));
        assert_eq!(asked, [Some(60_000), Some(120_000), Some(180_000)]);
        bucket.set(at(1_000), rate(10, ms(1_000), 1));
        let [first, second, third] = &mut slots;
        assert_eq!(ask(&mut bucket, 1_000, third), Some(100));
        assert_eq!(ask(&mut bucket, 1_000, first), Some(200));
        assert_eq!(ask(&mut bucket, 1_100, third), None);
        bucket.leave(second);
        assert_eq!(ask(&mut bucket, 1_200, first), None, "a place of the old rate was nobody's");
        bucket.set(at(1_200), None);
        assert_eq!(ask(&mut bucket, 1_200, &mut None), None);
    }

    #[test]
    fn what_was_sent_before_a_rate_is_lowered_counts_as_it_did() {
        let mut bucket = Bucket::default();
        bucket.set(at(0), rate(10, ms(1_000), 5));
        for _ in 0..5 {
            assert_eq!(ask(&mut bucket, 0, &mut None), None);
        }
        bucket.set(at(0), rate(1, ms(1_000), 1));
        assert_eq!(ask(&mut bucket, 0, &mut None), Some(500));
    }

    proptest! {
        /// However they come, wait, leave and send nothing after all: the rate is kept, and a bucket that has been free for a
        /// gap lets whoever asks go.
        #[test]
        fn the_rate_is_kept_and_nobody_waits_for_those_who_have_gone(
            burst in 1..4_u32,
            steps in prop::collection::vec((0..120_u64, 0..8_usize, 0..10_u8), 1..300),
        ) {
            let mut bucket = Bucket::default();
            bucket.set(at(0), rate(10, ms(1_000), burst));
            let mut slots = [None; 8];
            let mut now_ms = 0;
            let mut sent: Vec<u64> = Vec::new();
            let mut taken_ms = None;
            let mut unsent: Vec<Taken> = Vec::new();
            for (pass_ms, who, deed) in steps {
                now_ms += pass_ms;
                match deed {
                    0 | 1 => bucket.leave(&mut slots[who]),
                    2 if !unsent.is_empty() => bucket.give_back(unsent.swap_remove(who % unsent.len())),
                    _ => match bucket.wait(at(now_ms), &mut slots[who]) {
                        Some(turn) => {
                            prop_assert!(taken_ms.is_some_and(|last| now_ms < last + 200), "{now_ms}: {turn:?}");
                            prop_assert!(turn.until > at(now_ms) && turn.until <= at(now_ms) + ms(100 * 16));
                        }
                        None => {
                            let taken = bucket.take(at(now_ms));
                            taken_ms = Some(now_ms);
                            if deed == 3 { unsent.push(taken) } else { sent.push(now_ms) }
                        }
                    },
                }
                let held = slots.iter().flatten().count();
                prop_assert_eq!(bucket.waiting as usize, held);
            }
            for (place, &first) in sent.iter().enumerate() {
                let within = sent[place..].iter().take_while(|&&later| later < first + 1_000).count();
                prop_assert!(within <= 9 + burst as usize, "{within} in a second: {sent:?}");
            }
        }
    }
}
