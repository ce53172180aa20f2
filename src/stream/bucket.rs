//! The operator's rate of requests to one origin, and the queue of those who wait for it.
//!
//! A request goes when the bucket is free, which alone keeps the rate. Those who wait have places in a queue, one gap apart, so
//! that they come one after the other and in their turn. There is a queue for each voice, and the voices that wait take turns:
//! none of them, however many wait there, has more than its share while another one waits. A place that is given back, and what
//! a request leaves that was not sent after all, is taken by whoever looks next: those who wait look every now and then, so
//! that none waits for somebody who has gone.
//! Source: GCRA (ITU-T I.371). Memory: an entry for each who waits, of which there are no more than streams, and for each place
//! that was given back and not taken yet, at most `PLACES_FREE_MAX` a voice. Errors: none. Not here: who asks for what
//! (`budget`).

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

/// So many voices take turns.
pub(super) const VOICES: usize = 3;

/// Which of them.
pub(super) type VoiceNo = usize;

/// A place in the queue of a voice.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Place {
    at: Instant,
    voice: VoiceNo,
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
    /// Turns that were taken, also by what was not sent after all: nobody who sends nothing keeps the turn.
    turns: u64,
    queues: [Queue; VOICES],
}

/// Those of one voice who wait.
#[derive(Debug, Default)]
struct Queue {
    /// Number of its last turn: of the voices that wait, the one whose last is the longest ago has the next.
    last: u64,
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
        (self.rate, self.round) = (rate, self.round.wrapping_add(1));
        self.queues.iter_mut().for_each(Queue::forget_places);
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

    fn waiting(&self) -> u32 {
        self.queues.iter().map(|queue| queue.waiting).sum()
    }

    /// `None`: a request of that voice may go now, and the place that was held for it is given up. Else there is one from now
    /// on.
    pub(super) fn wait(&mut self, now: Instant, voice: VoiceNo, slot: &mut Option<Place>) -> Option<Turn> {
        let Some(rate) = self.rate else {
            *slot = None;
            return None;
        };
        *slot = slot.filter(|place| place.round == self.round);
        let (gap, free, is_alone) = (rate.gap(), self.free(rate), self.waiting() == 0);
        let queue = &mut self.queues[voice];
        // Nobody has come for them in time.
        while queue.holes.first().is_some_and(|&hole| hole + gap <= now) {
            queue.holes.pop_first();
        }
        let tail = queue.tail.max(free);
        let hole = queue.holes.first().copied().filter(|&hole| hole < slot.map_or(tail, |place| place.at));
        // Free for a whole gap: no place that is due has a use for it.
        let is_idle = free + gap <= now;
        if is_idle || (is_alone && free <= now) {
            if let Some(hole) = hole.filter(|&hole| hole <= now) {
                queue.holes.remove(&hole);
            }
            self.leave(slot);
            return None;
        }
        let at = match (hole, &slot) {
            (Some(hole), _) => {
                queue.holes.remove(&hole);
                hole
            }
            (None, Some(place)) => place.at,
            (None, None) => {
                let place = tail.min(now + QUEUE_MAX);
                queue.tail = place + gap;
                place
            }
        };
        if hole.is_some() || slot.is_none() {
            *queue.places.entry(at).or_default() += 1;
            queue.waiting += 1;
            self.leave(slot);
        }
        *slot = Some(Place { at, voice, round: self.round });
        let until = at.max(free + gap * self.ahead_of(voice, at, free.max(now)));
        if until <= now {
            // It is used now, not given back.
            *slot = None;
            self.queues[voice].has_left(at);
            return None;
        }
        Some(Turn { until, look: gap.min(LOOK).max(LOOK_APART * self.waiting()) })
    }

    /// How many go before the place `at` of that voice, where the next request goes at `next`: those before it in its own
    /// queue, and of each other voice as many in turn.
    fn ahead_of(&self, voice: VoiceNo, at: Instant, next: Instant) -> u32 {
        let own = &self.queues[voice];
        let ahead: u32 = own.places.range(..at).take(AHEAD_COUNTED).map(|(_, held)| held).sum();
        let others = self.queues.iter().enumerate().filter(|(other, _)| *other != voice);
        let in_turn = others.map(|(_, other)| {
            let has_turn = other.last < own.last && other.places.keys().next().is_some_and(|&first| first <= next);
            other.waiting.min(ahead + u32::from(has_turn))
        });
        ahead + in_turn.sum::<u32>()
    }

    /// A request is sent; `None`: it is no poll, and no voice's.
    pub(super) fn take(&mut self, now: Instant, voice: Option<VoiceNo>) -> Taken {
        self.sent += 1;
        if let Some(voice) = voice {
            self.turns += 1;
            self.queues[voice].last = self.turns;
        }
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
            // One of each voice may come for it, and whose turn it is goes.
            for queue in self.queues.iter_mut().filter(|queue| queue.waiting > 0) {
                queue.offer(taken.at, rate.gap());
            }
        }
    }

    /// Whoever had that place waits no more.
    pub(super) fn leave(&mut self, slot: &mut Option<Place>) {
        let place = slot.take().filter(|place| place.round == self.round);
        if let (Some(place), Some(rate)) = (place, self.rate) {
            let queue = &mut self.queues[place.voice];
            queue.offer(place.at, rate.gap());
            queue.has_left(place.at);
        }
    }
}

impl Queue {
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
        self.waiting = 0;
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
        ask_as(bucket, now_ms, 0, slot)
    }

    fn ask_as(bucket: &mut Bucket, now_ms: u64, voice: VoiceNo, slot: &mut Option<Place>) -> Option<u64> {
        match bucket.wait(at(now_ms), voice, slot) {
            Some(turn) => Some(turn.until.since(at(now_ms)).as_millis() as u64),
            None => {
                bucket.take(at(now_ms), Some(voice));
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
            bucket.take(at(0), None);
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
        let mut look = || bucket.wait(at(0), 0, &mut None).expect("it waits").look;
        assert_eq!(look(), ms(1_000));
        assert_eq!((1..1_000).map(|_| look()).last(), Some(ms(4_000)));
        let mut hourly = Bucket::default();
        hourly.set(at(0), rate(1, ms(3_600_000), 1));
        ask(&mut hourly, 0, &mut None);
        assert_eq!(hourly.wait(at(0), 0, &mut None).expect("it waits").look, ms(1_000));
    }

    #[test]
    fn what_was_not_sent_is_given_back() {
        let mut bucket = bucket();
        let taken = bucket.take(at(0), Some(0));
        let mut slots = [None; 2];
        assert_eq!(slots.each_mut().map(|slot| ask(&mut bucket, 10, slot)), [Some(990), Some(1_990)]);
        bucket.give_back(taken);
        let [first, second] = &mut slots;
        assert_eq!(ask(&mut bucket, 20, second), None, "whoever looks first goes");
        assert_eq!(ask(&mut bucket, 30, first), Some(990), "and nobody else");
        // What was taken under another rate is nothing to this one.
        let taken = bucket.take(at(1_020), Some(0));
        bucket.set(at(1_020), rate(10, ms(1_000), 1));
        bucket.give_back(taken);
        assert_eq!(ask(&mut bucket, 1_020, &mut None), Some(100));
    }

    #[test]
    fn what_is_given_back_late_is_not_there_twice() {
        let mut bucket = bucket();
        let late = [0, 1_000, 2_001].map(|at_ms| bucket.take(at(at_ms), Some(0)));
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

    #[test]
    fn one_voice_however_many_wait_there_leaves_another_its_share() {
        let mut bucket = bucket();
        ask_as(&mut bucket, 0, 2, &mut None);
        let mut many = [None; 64];
        for slot in &mut many {
            assert!(ask_as(&mut bucket, 0, 2, slot).is_some());
        }
        let [mut own, mut newcomer] = [None; 2];
        assert_eq!(ask_as(&mut bucket, 10, 0, &mut own), Some(990), "before all of them");
        assert_eq!(ask_as(&mut bucket, 20, 1, &mut newcomer), Some(980), "this one, or that");
        assert_eq!(ask_as(&mut bucket, 1_000, 2, &mut many[0]), Some(2_000), "after one of each");
        assert_eq!(ask_as(&mut bucket, 1_000, 0, &mut own), None);
        assert_eq!(ask_as(&mut bucket, 1_001, 0, &mut own), Some(2_999), "after one of each");
        assert_eq!(ask_as(&mut bucket, 2_000, 1, &mut newcomer), None);
        assert_eq!(ask_as(&mut bucket, 3_000, 2, &mut many[63]), Some(64_000), "63 of theirs and the other one");
    }

    #[test]
    fn the_turn_of_a_voice_that_does_not_come_for_it_is_anybodys() {
        let mut bucket = bucket();
        ask_as(&mut bucket, 0, 2, &mut None);
        let [mut silent, mut other] = [None; 2];
        assert_eq!(ask_as(&mut bucket, 0, 0, &mut silent), Some(1_000));
        assert_eq!(ask_as(&mut bucket, 0, 2, &mut other), Some(2_000));
        assert_eq!(ask_as(&mut bucket, 1_999, 2, &mut other), Some(1));
        assert_eq!(ask_as(&mut bucket, 2_000, 2, &mut other), None, "free for a gap");
        bucket.leave(&mut silent);
        assert_eq!(ask_as(&mut bucket, 2_500, 2, &mut other), Some(500), "nobody else is there");
    }

    #[test]
    fn a_voice_that_sends_nothing_after_all_keeps_no_turn() {
        let mut bucket = bucket();
        ask_as(&mut bucket, 0, 0, &mut None);
        let [mut own, mut theirs] = [None; 2];
        assert!(ask_as(&mut bucket, 0, 0, &mut own).is_some() && ask_as(&mut bucket, 0, 2, &mut theirs).is_some());
        assert_eq!(bucket.wait(at(1_000), 2, &mut theirs), None);
        let unsent = bucket.take(at(1_000), Some(2));
        assert!(ask_as(&mut bucket, 1_001, 2, &mut theirs).is_some());
        bucket.give_back(unsent);
        assert!(ask_as(&mut bucket, 1_900, 2, &mut theirs).is_some(), "it has had its turn");
        assert_eq!(ask_as(&mut bucket, 1_900, 0, &mut own), None);
    }

    proptest! {
        /// Those who wait and come when they are told to: while one of a voice waits, no other voice has more than one
        /// request; and the rate is kept, whoever asks.
        #[test]
        fn voices_take_turns(
            burst in 1..4_u32,
            askers in prop::collection::vec((0..VOICES, 0..1_500_u64), 1..80),
            calls in prop::collection::vec(0..20_000_u64, 0..20),
        ) {
            let mut bucket = Bucket::default();
            bucket.set(at(0), rate(10, ms(1_000), burst));
            let mut slots = vec![None; askers.len()];
            let mut due: BTreeSet<(Instant, usize)> =
                askers.iter().enumerate().map(|(who, (_, pause_ms))| (at(*pause_ms), who)).collect();
            let mut calls: BTreeSet<Instant> = calls.into_iter().map(at).collect();
            let mut sent: Vec<Instant> = Vec::new();
            // How many requests each voice has had while that one waits.
            let mut passed = [[0_u32; VOICES]; VOICES];
            while let Some((now, who)) = due.pop_first().filter(|(now, _)| *now < at(20_000)) {
                while calls.first().is_some_and(|&call| call <= now) {
                    calls.pop_first();
                    // It goes when it may, ahead of all who wait.
                    let goes = bucket.free_at(now);
                    bucket.take(now, None);
                    sent.push(goes);
                }
                let (voice, pause_ms) = askers[who];
                if let Some(turn) = bucket.wait(now, voice, &mut slots[who]) {
                    due.insert((turn.until.min(now + turn.look), who));
                    continue;
                }
                bucket.take(now, Some(voice));
                sent.push(now);
                due.insert((now + ms(1 + pause_ms), who));
                passed[voice] = [0; VOICES];
                for other in (0..VOICES).filter(|&other| other != voice && bucket.queues[other].waiting > 0) {
                    passed[other][voice] += 1;
                    prop_assert!(passed[other][voice] <= 1, "{now:?}: {voice} before {other}: {passed:?}");
                }
            }
            sent.sort_unstable();
            for (place, &first) in sent.iter().enumerate() {
                let within = sent[place..].iter().take_while(|&&later| later < first + ms(1_000)).count();
                prop_assert!(within <= 9 + burst as usize, "{within} in a second");
            }
        }

        /// However they come, wait, leave and send nothing after all: the rate is kept, and a bucket that has been free for a
        /// gap lets whoever asks go.
        #[test]
        fn the_rate_is_kept_and_nobody_waits_for_those_who_have_gone(
            burst in 1..4_u32,
            voices in 1..=VOICES,
            steps in prop::collection::vec((0..120_u64, 0..8_usize, 0..10_u8), 1..300),
        ) {
            let mut bucket = Bucket::default();
            bucket.set(at(0), rate(10, ms(1_000), burst));
            let voice_of = |who| who % voices;
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
                    _ => match bucket.wait(at(now_ms), voice_of(who), &mut slots[who]) {
                        Some(turn) => {
                            prop_assert!(taken_ms.is_some_and(|last| now_ms < last + 200), "{now_ms}: {turn:?}");
                            prop_assert!(turn.until > at(now_ms) && turn.until <= at(now_ms) + ms(100 * 16));
                        }
                        None => {
                            let taken = bucket.take(at(now_ms), Some(voice_of(who)));
                            taken_ms = Some(now_ms);
                            if deed == 3 { unsent.push(taken) } else { sent.push(now_ms) }
                        }
                    },
                }
                let held = slots.iter().flatten().count();
                prop_assert_eq!(bucket.waiting() as usize, held);
            }
            for (place, &first) in sent.iter().enumerate() {
                let within = sent[place..].iter().take_while(|&&later| later < first + 1_000).count();
                prop_assert!(within <= 9 + burst as usize, "{within} in a second: {sent:?}");
            }
        }
    }
}
