//! A rest for origins that are down: the breaker, one of each origin and one of each caller there whose requests fail.
//!
//! An origin that has failed so often in a row, whoever asked, is left alone, and tried now and then by one request. What a
//! caller has described says nothing of the origin (`voice`): it counts for that caller's own breaker there, which holds nobody
//! else.
//! Source: «Circuit Breaker» (Nygard, «Release It!», 2007). Memory: one [`Breaker`] an origin, and of callers at most
//! `CALLERS_BREAKERS_MAX`, who is down kept longest. Errors: [`Wait`]. Not here: which outcome is a failure (`budget`), budgets
//! and rates (`spending`, `bucket`), the wait of one stream after its own failures (`poll`).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::ids::Holder;
use crate::limits::{BREAKER_FAILURES, BREAKER_REST_MAX, BREAKER_REST_MIN, CALLERS_BREAKERS_MAX};
use crate::time::Instant;

use super::poll::UpstreamCode;
use super::voice::{Voice, Wait, Why};

/// How a request has failed: the code, and the status where there was one.
pub(super) type Failed = (UpstreamCode, Option<u16>);

/// What stands for an origin.
pub(super) type OriginHash = u64;

/// The breakers of callers whose last request at that origin has failed: at most `CALLERS_BREAKERS_MAX`.
#[derive(Debug, Default)]
pub(super) struct Callers(Mutex<HashMap<Place, Breaker>>);

/// Where, and whose.
pub(super) type Place = (OriginHash, Option<Holder>);

impl Callers {
    fn lock(&self) -> MutexGuard<'_, HashMap<Place, Breaker>> {
        // What stands there is numbers, each of which is in order by itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the breaker of that caller there, where something of that caller's has failed.
    pub(super) fn ask<T>(&self, place: Place, then: impl FnOnce(&mut Breaker) -> T) -> Option<T> {
        self.lock().get_mut(&place).map(then)
    }

    /// Tells that breaker, which opens as the origin's does, what came of a request.
    pub(super) fn outcome(
        &self,
        now: Instant,
        place: Place,
        of_origin: &Breaker,
        is_probe: bool,
        failure: Option<Failed>,
    ) {
        let mut callers = self.lock();
        if failure.is_none() || of_origin.failures_max == 0 {
            callers.remove(&place);
            return;
        }
        if callers.len() >= CALLERS_BREAKERS_MAX && !callers.contains_key(&place) {
            callers.retain(|_, breaker| breaker.is_down_lately(now));
        }
        if callers.len() < CALLERS_BREAKERS_MAX || callers.contains_key(&place) {
            let breaker = callers.entry(place).or_insert_with(Breaker::new);
            breaker.failures_max = of_origin.failures_max;
            breaker.outcome(now, Voice::Caller(place.1), is_probe, failure);
        }
    }

    /// Nobody is held at that origin any more.
    pub(super) fn forget(&self, origin: OriginHash) {
        self.lock().retain(|(hash, _), _| *hash != origin);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }
}

impl Voice {
    /// What the breaker makes of an outcome, where the origin is down, if it is, for `down`.
    fn says(self, failure: Option<Failed>, down: Option<UpstreamCode>) -> Verdict {
        use UpstreamCode::{Dns, Status, Tls, Unreachable};
        let is_of_way = |code| matches!(code, Unreachable | Dns | Tls);
        match (self, failure) {
            (_, None) => Verdict::Works,
            // It could not be reached, and now it answers.
            (Voice::Chosen, Some((Status, _))) if down.is_some_and(is_of_way) => Verdict::Works,
            (Voice::Chosen, Some((code, _))) if !is_of_way(code) => Verdict::Nothing,
            (_, Some(failed)) => Verdict::Fails(failed),
        }
    }
}

/// What an outcome says of an origin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Works,
    Nothing,
    Fails(Failed),
}

/// Leaves an origin alone that has failed `failures_max` times in a row, whoever asked; then one request tries it. What callers
/// have chosen is tried beside what the operator has, so that one that proves nothing takes no turn of one that can.
#[derive(Debug)]
pub(super) struct Breaker {
    /// 0: it never opens.
    failures_max: u32,
    failures: u32,
    rest: Duration,
    /// How it failed.
    down: Option<Failed>,
    tries: [Try; 2],
}

/// When who asks tries an origin that is down.
#[derive(Clone, Copy, Debug, Default)]
struct Try {
    since: Instant,
    /// After so long.
    rest: Duration,
    /// There is one under way, since that was how long it rested.
    probing: Option<Duration>,
}

impl Breaker {
    pub(super) fn new() -> Breaker {
        let (failures_max, rest) = (BREAKER_FAILURES, BREAKER_REST_MIN);
        Breaker { failures_max, failures: 0, rest, down: None, tries: Default::default() }
    }

    /// It opens after so many failures from now on; 0: it never does.
    pub(super) fn set(&mut self, failures_max: u32) {
        self.failures_max = failures_max;
        if failures_max == 0 {
            self.down = None;
        }
    }

    fn try_of(&mut self, voice: Voice) -> &mut Try {
        &mut self.tries[usize::from(voice == Voice::Chosen)]
    }

    /// How long whoever asks has to leave it alone; `patience` is the longest that it wants to. `None`: not at all.
    pub(super) fn wait(&mut self, now: Instant, patience: Duration, voice: Voice) -> Option<Wait> {
        let (code, status) = self.down?;
        let Try { since, rest, probing } = *self.try_of(voice);
        let rest = rest.min(patience);
        let until = if probing.is_some() { now + rest } else { since + rest };
        (until > now).then_some(Wait { until, spread: rest, look: Duration::MAX, why: Why::Down(code, status) })
    }

    /// Whether the request that is sent now is one that tries the origin.
    pub(super) fn take(&mut self, voice: Voice) -> bool {
        let rest = self.rest;
        let is_down = self.down.is_some();
        if is_down {
            self.try_of(voice).probing = Some(rest);
        }
        is_down
    }

    /// A request that was to try it does not.
    pub(super) fn give_up(&mut self, voice: Voice) {
        self.try_of(voice).probing = None;
    }

    /// Whether it is held against somebody who has tried not long ago.
    fn is_down_lately(&self, now: Instant) -> bool {
        self.down.is_some() && self.tries[0].since + BREAKER_REST_MAX * 2 > now
    }

    /// What came of a request: `None` is an answer that shows that it works.
    pub(super) fn outcome(&mut self, now: Instant, voice: Voice, is_probe: bool, failure: Option<Failed>) {
        let probed = if is_probe { self.try_of(voice).probing.take() } else { None };
        let failed = match voice.says(failure, self.down.map(|(code, _)| code)) {
            Verdict::Fails(failed) => failed,
            Verdict::Works => {
                *self = Breaker { failures_max: self.failures_max, ..Breaker::new() };
                return;
            }
            // Another one tries it, soon: who asks for what answers may be among many who ask for what does not.
            Verdict::Nothing => {
                if is_probe {
                    *self.try_of(voice) = Try { since: now, rest: BREAKER_REST_MIN, probing: None };
                }
                return;
            }
        };
        self.failures = self.failures.saturating_add(1);
        if self.failures_max == 0 || self.failures < self.failures_max {
            return;
        }
        // Where the other one has failed meanwhile, this is no news.
        if probed == Some(self.rest) {
            self.rest = (self.rest * 2).min(BREAKER_REST_MAX);
        }
        self.down = Some(failed);
        for of_voice in &mut self.tries {
            (of_voice.since, of_voice.rest) = (now, self.rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::stream::budget::tests::{
        PATIENCE, asks, at, by, callers_held, go, lane, may, ms, of_callers, refused, target, wait,
    };
    use crate::stream::budget::{Ask, Budgets, Slot, Upstream};
    use crate::stream::poll::{FetchError, Target};

    #[test]
    fn what_callers_ask_for_may_fail_as_often_as_they_like() {
        let (described, filled_in, [own, theirs, filled]) = of_callers(&Arc::new(Budgets::default()));
        for n in 0..u64::from(4 * BREAKER_FAILURES) {
            may(&theirs, &by(&described, n), at(n)).answered_by(at(n), 500, &[]);
            may(&theirs, &by(&described, n), at(n)).failed(at(n), &refused());
            may(&filled, &filled_in, at(n)).answered_by(at(n), 500, &[]);
        }
        drop(go(&own, at(1_000)));
        // That nobody is there is true of whatever is asked for.
        for n in 0..u64::from(BREAKER_FAILURES) {
            may(&filled, &filled_in, at(2_000 + n)).failed(at(2_000 + n), &refused());
        }
        assert!(matches!(wait(&own, at(2_020)).why, Why::Down(..)));
        assert!(asks(&theirs, &described, at(2_020)).is_err(), "they obey it");
        // When it may be tried again, theirs proves nothing.
        may(&theirs, &described, at(3_500)).answered_by(at(3_500), 200, &[]);
        let probe = go(&own, at(3_500));
        assert!(matches!(wait(&own, at(3_501)).why, Why::Down(..)));
        probe.answered_by(at(3_600), 200, &[]);
        drop([go(&own, at(3_600)), go(&own, at(3_600))]);
    }

    #[test]
    fn what_is_filled_in_tries_an_origin_beside_what_the_operator_asks_for_and_puts_none_of_it_off() {
        let (_, filled_in, [own, _, filled]) = of_callers(&Arc::new(Budgets::default()));
        for _ in 0..BREAKER_FAILURES {
            go(&own, at(0)).answered_by(at(0), 500, &[]);
        }
        assert!(asks(&filled, &filled_in, at(999)).is_err() && wait(&own, at(999)).until == at(1_000));
        // Whatever comes of theirs, the operator's is not held by it: not while it is under way, nor afterwards.
        let slow = may(&filled, &filled_in, at(1_000));
        assert!(asks(&filled, &filled_in, at(1_000)).is_err(), "one of them at a time");
        slow.answered_by(at(1_100), 500, &[]);
        let theirs = asks(&filled, &filled_in, at(1_101)).expect_err("after a rest");
        assert_eq!((theirs.until, theirs.spread), (at(2_100), BREAKER_REST_MIN));
        go(&own, at(1_101)).answered_by(at(1_200), 500, &[]);
        assert_eq!(wait(&own, at(1_200)).until, at(3_200), "longer");
        assert_eq!(asks(&filled, &filled_in, at(1_200)).expect_err("that is true of all").until, at(3_200));
        // However long the operator's rest has become, theirs try again soon: who asks for what works is among many.
        for (now, failed) in [(3_200, 3_300), (7_300, 7_400)] {
            go(&own, at(now)).answered_by(at(failed), 500, &[]);
        }
        assert_eq!(wait(&own, at(7_400)).until, at(15_400));
        may(&filled, &filled_in, at(15_400)).answered_by(at(15_500), 500, &[]);
        may(&filled, &filled_in, at(16_500)).answered_by(at(16_600), 200, &[]);
        drop([go(&own, at(16_600)), may(&filled, &filled_in, at(16_600))]);
    }

    #[test]
    fn an_origin_that_is_asked_for_what_is_filled_in_alone_recovers_by_any_answer() {
        let (_, filled_in, [own, _, filled]) = of_callers(&Arc::new(Budgets::default()));
        for _ in 0..BREAKER_FAILURES {
            may(&filled, &filled_in, at(0)).failed(at(0), &refused());
        }
        let late = FetchError { code: UpstreamCode::Timeout, detail: "late".into() };
        may(&filled, &filled_in, at(1_000)).failed(at(1_100), &late);
        assert!(asks(&filled, &filled_in, at(1_200)).is_err(), "that may be of what was asked for");
        may(&filled, &filled_in, at(2_100)).answered_by(at(2_200), 500, &[]);
        drop([may(&filled, &filled_in, at(2_200)), go(&own, at(2_200))]);
    }

    #[test]
    fn two_who_try_an_origin_at_once_find_it_down_once() {
        let (_, filled_in, [own, _, filled]) = of_callers(&Arc::new(Budgets::default()));
        for _ in 0..BREAKER_FAILURES {
            go(&own, at(0)).failed(at(0), &refused());
        }
        let both = [go(&own, at(1_000)), may(&filled, &filled_in, at(1_000))];
        both.into_iter().for_each(|probe| probe.failed(at(1_100), &refused()));
        assert_eq!(wait(&own, at(1_100)).until, at(3_100));
    }

    #[test]
    fn a_caller_whose_targets_of_an_origin_fail_leaves_it_alone_and_no_other_caller_does() {
        let budgets = Arc::new(Budgets::default());
        let (described, _, [own, theirs, _]) = of_callers(&budgets);
        let (mine, other) = (by(&described, 1), by(&described, 2));
        let elsewhere = Target { url: "https://other.example/b".parse().expect("a URL"), ..by(&described, 1) };
        for _ in 0..BREAKER_FAILURES {
            may(&theirs, &mine, at(0)).answered_by(at(0), 500, &[]);
        }
        let held = asks(&theirs, &mine, at(0)).expect_err("it has failed ten times");
        assert_eq!((held.until, held.why), (at(1_000), Why::Down(UpstreamCode::Status, Some(500))));
        drop([go(&own, at(0)), may(&theirs, &other, at(0)), may(&budgets.lane(&elsewhere), &elsewhere, at(0))]);
        // What works goes on, for others may watch it too; the operator's breaker holds that as well.
        let mut works = Slot::of(&mine);
        works.set_works(true);
        assert!(matches!(theirs.ask(at(0), &mut works, PATIENCE), Ask::Go(_)));
        // One at a time tries it, and longer apart.
        let unused = may(&theirs, &mine, at(1_000));
        assert!(asks(&theirs, &mine, at(1_000)).is_err());
        drop(unused);
        may(&theirs, &mine, at(1_000)).failed(at(1_100), &refused());
        assert_eq!(asks(&theirs, &mine, at(1_100)).expect_err("it is down").until, at(3_100));
        may(&theirs, &mine, at(3_100)).answered_by(at(3_200), 200, &[]);
        assert!(callers_held(&budgets) == 0);
        drop([may(&theirs, &mine, at(3_200)), may(&theirs, &mine, at(3_200))]);
        for _ in 0..BREAKER_FAILURES {
            go(&own, at(4_000)).failed(at(4_000), &refused());
        }
        assert!(matches!(theirs.ask(at(4_000), &mut works, PATIENCE), Ask::Wait(_)));
    }

    #[test]
    fn a_breaker_that_is_turned_off_holds_no_caller_either() {
        let budgets = Arc::new(Budgets::default());
        let (described, _, [_, theirs, _]) = of_callers(&budgets);
        let set = |breaker| {
            budgets.configure(at(0), &[Upstream { origin: "https://up.example".into(), rate: None, breaker }]);
        };
        let fail = |times| (0..times).for_each(|_| may(&theirs, &described, at(0)).failed(at(0), &refused()));
        set(3);
        fail(3);
        assert!(asks(&theirs, &described, at(0)).is_err());
        set(0);
        fail(50);
    }

    #[test]
    fn callers_who_are_left_alone_have_a_bound() {
        let budgets = Arc::new(Budgets::default());
        let (described, _, [_, theirs, _]) = of_callers(&budgets);
        for _ in 0..BREAKER_FAILURES {
            may(&theirs, &described, at(0)).failed(at(0), &refused());
        }
        for caller in 1..2 * CALLERS_BREAKERS_MAX as u64 {
            may(&theirs, &by(&described, caller), at(0)).failed(at(0), &refused());
        }
        assert!((2..=CALLERS_BREAKERS_MAX).contains(&callers_held(&budgets)));
        assert!(asks(&theirs, &described, at(0)).is_err(), "who is down is kept longest");
    }

    #[test]
    fn the_breaker_is_the_polls_alone() {
        let lane = lane();
        let call = |now| match lane.ask_for_call(now, PATIENCE) {
            Ask::Go(permit) => permit,
            Ask::Wait(wait) => panic!("{wait:?}"),
        };
        for _ in 0..2 * BREAKER_FAILURES {
            call(at(0)).failed(at(0), &refused());
            call(at(0)).answered_by(at(0), 500, &[]);
        }
        for _ in 0..BREAKER_FAILURES {
            go(&lane, at(0)).failed(at(0), &refused());
        }
        assert_eq!(wait(&lane, at(0)).until, at(1_000));
        call(at(0)).answered_by(at(0), 200, &[]);
        drop(call(at(0)));
        assert_eq!(wait(&lane, at(0)).until, at(1_000), "what one caller gets is no proof for the others");
    }

    #[test]
    fn an_origin_that_is_down_is_tried_by_one_at_a_time() {
        let budgets = Arc::new(Budgets::default());
        let lanes: Vec<_> = (0..100)
            .map(|n| budgets.lane(&target("http://up.example/", &[("Authorization", &n.to_string())])))
            .collect();
        for lane in &lanes[..BREAKER_FAILURES as usize] {
            go(lane, at(0)).failed(at(0), &refused());
        }
        for lane in &lanes {
            let held = wait(lane, at(0));
            assert_eq!((held.until, held.why), (at(1_000), Why::Down(UpstreamCode::Unreachable, None)));
        }
        let probe = go(&lanes[7], at(1_000));
        assert!(lanes.iter().all(|lane| wait(lane, at(1_000)).until == at(2_000)));
        probe.answered_by(at(1_100), 502, &[]);
        assert_eq!(wait(&lanes[0], at(1_100)).why, Why::Down(UpstreamCode::Status, Some(502)));
        assert_eq!(wait(&lanes[0], at(1_100)).until, at(3_100), "longer");
        drop(go(&lanes[0], at(3_100)));
        go(&lanes[1], at(3_100)).answered_by(at(3_200), 404, &[]);
        let _all: Vec<_> = lanes.iter().map(|lane| go(lane, at(3_200))).collect();
    }

    #[test]
    fn whoever_has_less_patience_tries_sooner() {
        let lane = lane();
        for _ in 0..BREAKER_FAILURES {
            go(&lane, at(0)).failed(at(0), &refused());
        }
        let mut slot = Slot::default();
        assert!(matches!(lane.ask(at(199), &mut slot, ms(200)), Ask::Wait(_)));
        assert!(matches!(lane.ask(at(200), &mut slot, ms(200)), Ask::Go(_)));
    }

    #[test]
    fn a_breaker_of_zero_never_opens() {
        let budgets = Arc::new(Budgets::default());
        budgets.configure(at(0), &[Upstream { origin: "https://up.example".into(), rate: None, breaker: 0 }]);
        let lane = budgets.lane(&target("https://up.example/a", &[]));
        for _ in 0..100 {
            go(&lane, at(0)).failed(at(0), &refused());
        }
    }
}
