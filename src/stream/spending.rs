//! What an upstream says that it takes, and the queue of those who wait for what is left of it.
//!
//! The upstream's word is taken as of the last answer, less whatever is under way and may have been counted since; what is
//! little is spread over the time until there is more. Before the first answer of all one request asks for all.
//! Source: draft-ietf-httpapi-ratelimit-headers-10, RFC 6585 section 4. Memory: one [`Spending`] a lane, of at most
//! `LANE_QUOTAS_MAX` budgets and `QUEUE_PLACES_MAX` who wait. Errors: [`Wait`]. Not here: reading of headers
//! (`codec::rate_limit`), the operator's rates (`bucket`), who shares what (`budget`).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::codec::rate_limit::{Quota, Resource};
use crate::limits::{QUEUE_MAX, QUOTAS_MAX, RESET_UNKNOWN};
use crate::time::Instant;

use super::poll::UpstreamCode;
use super::voice::{Voice, Wait, Why};

/// Less of a budget than one in so many parts is little: it is spread over the time that is left.
const LITTLE_PART: u64 = 5;
/// The same for a budget whose size is not known.
const LITTLE: u64 = 20;
/// How soon a budget is looked at again that all who were under way at its reset may have used up at once, where nobody knows
/// when there is more.
const RENEWED_AGAIN: Duration = Duration::from_secs(5);
/// A reset that is so much later is of another window: less may be rounding.
const NEXT_WINDOW: Duration = Duration::from_secs(2);
/// Those who waited for the same moment come back within this time behind it.
const SPREAD: Duration = Duration::from_secs(1);
/// Least time until whoever has to let others go first asks again.
const TURN_MIN: Duration = Duration::from_millis(50);
/// Before the first answer of all, which may tell of a budget, one more goes each time that none has come for so long,
const FIRST_PATIENCE: Duration = Duration::from_secs(5);
/// and the others look whether it is there, all of them together no more often than once in this time,
const FIRST_LOOK_APART: Duration = Duration::from_millis(1);
/// each at least this often.
const FIRST_LOOK_MAX: Duration = Duration::from_secs(1);
/// How much later than said whoever waits may come back without losing its place.
const GRACE: Duration = Duration::from_secs(1);
/// Those who may wait for one budget in turn; more wait without a place.
const QUEUE_PLACES_MAX: usize = 16_384;
/// Whoever waits for its turn in a budget looks at least so often whether it has come sooner,
const LOOK: Duration = Duration::from_secs(5);
/// and where many wait, all of them together once in this time.
const LOOK_APART: Duration = Duration::from_millis(4);
/// Budgets of one lane: each resource may have several of its own. Past it the one that is reset soonest is forgotten.
const LANE_QUOTAS_MAX: usize = 32;

/// What one asker is to the budgets of a lane, from one time to the next.
#[derive(Debug, Default)]
pub(super) struct Asker {
    /// Its place in the queue: 0 is none.
    ticket: u64,
    pub(super) named: Named,
    pub(super) voice: Voice,
}

impl Asker {
    /// Whether it has a place in the queue.
    pub(super) fn waits(&self) -> bool {
        self.ticket != 0
    }
}

/// The budgets that the upstream has named in its last answer to an asker, if it did: the others are no matter of its.
#[derive(Clone, Debug, Default)]
pub(super) struct Named(Arc<Mutex<Vec<Resource>>>);

impl Named {
    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<Resource>> {
        // What stands there is names, each of which is in order by itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer has told of `quotas`: where these are named, they are its.
    pub(super) fn hear(&self, quotas: &[Quota]) {
        let named: Vec<Resource> = quotas.iter().take(QUOTAS_MAX).filter_map(|quota| quota.resource).collect();
        if !named.is_empty() {
            *self.lock() = named;
        }
    }
}

/// What a lane may still spend.
#[derive(Debug, Default)]
pub(super) struct Spending {
    /// Number of the last permit.
    no: u64,
    in_flight: u64,
    /// Before the first answer: until when the others wait for that to the last request, or for its end,
    first_until: Option<Instant>,
    /// and whose that request is.
    first_of: Voice,
    /// Whether there has been an answer, of whatever status: what the upstream allows is known, or is not limited. That a time is
    /// up is none: an upstream that is slow because it has just begun is the last that all should come to at once.
    pub(super) heard: bool,
    /// How the last one has failed that was not answered.
    failed: Option<UpstreamCode>,
    /// At most `LANE_QUOTAS_MAX`.
    known: Vec<Known>,
    /// Until when the upstream wants to be asked for nothing at all: `Retry-After` of a 429.
    held: Instant,
    /// Number of the last permit when the upstream last told of a budget: an answer to a later one is news of its own.
    settled: u64,
    /// Those who wait, in the order they came: at most `QUEUE_PLACES_MAX`.
    queue: VecDeque<Ticket>,
    /// The last of all tickets.
    tickets: u64,
}

/// Who waits for a part of a budget.
#[derive(Clone, Copy, Debug)]
struct Ticket {
    no: u64,
    /// Who has not come back by then does not wait any more.
    until: Instant,
    /// The budget that it waits for.
    budget: Budget,
    /// Whose request it is.
    voice: Voice,
}

/// Which budget of a lane: the one of that name, or where it has none, of that limit and window.
type Budget = (Option<Resource>, Option<u64>, Option<Duration>);

/// What one request has taken of the budgets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spent {
    no: u64,
    pub(super) at: Instant,
}

/// What a lane has for those who ask now.
enum Room {
    /// Nothing is known of a budget.
    Unlimited,
    /// So many may go, and the others ask again a gap apart.
    For(u64, Duration),
    /// None may before that.
    Nobody(Instant, Why, Duration),
}

/// A budget as the upstream last told of it. What is on its way and not answered is still to be taken off.
#[derive(Clone, Copy, Debug)]
struct Known {
    left: u64,
    /// When there is more again, at the latest,
    reset: Instant,
    /// and at the earliest: an answer does not say when on its way it was made.
    reset_early: Instant,
    /// Requests that may have been sent since `reset_early`: they may count for what comes after `reset`.
    ahead: u64,
    limit: Option<u64>,
    window: Option<Duration>,
    /// Which one it is, where the upstream names it.
    resource: Option<Resource>,
    /// When a request was last sent that may count in it.
    last_sent: Instant,
    /// Whether its reset has passed, and the upstream has not told of it since.
    renewed: bool,
}

impl Known {
    fn of(quota: &Quota, now: Instant, sent: Instant, ahead: u64) -> Known {
        let Quota { remaining: left, reset, limit, window, resource } = *quota;
        let (reset, reset_early) = (now + reset, sent + reset);
        Known { left, reset, reset_early, ahead, limit, window, resource, last_sent: sent, renewed: false }
    }

    fn budget(&self) -> Budget {
        match self.resource {
            Some(_) => (self.resource, None, None),
            None => (None, self.limit, self.window),
        }
    }

    /// Whether the requests of whoever has had its own budgets `named` count in this one.
    fn concerns(&self, named: &[Resource]) -> bool {
        named.is_empty() || self.resource.is_none_or(|resource| named.contains(&resource))
    }

    /// Whether nobody knows how much there is: one request at a time asks.
    fn is_unknown(&self) -> bool {
        self.renewed && self.limit.is_none()
    }

    /// Where its reset has passed there is as much as ever.
    fn renew(&mut self, now: Instant) {
        if self.reset <= now {
            self.left = self.limit.map_or(1, |limit| limit.saturating_sub(self.ahead));
            let unknown = if self.left == 0 { RENEWED_AGAIN } else { RESET_UNKNOWN };
            self.reset = now + self.window.unwrap_or(unknown);
            (self.reset_early, self.ahead, self.renewed) = (self.reset, 0, true);
        }
    }

    /// How long nothing is left, where nothing is.
    fn spent(&self, now: Instant, in_flight: u64) -> Option<(Instant, Why)> {
        if self.left > in_flight {
            return None;
        }
        // The answer to what is on its way may say that there is more.
        let spent = self.left == 0;
        let until = if spent { self.reset } else { self.reset.min(now + TURN_MIN) };
        Some((until, if spent { Why::Spent } else { Why::Turn }))
    }

    /// What there is of it for those who ask now.
    fn room(&self, now: Instant, in_flight: u64) -> Room {
        if let Some((until, why)) = self.spent(now, in_flight) {
            return Room::Nobody(until, why, Duration::ZERO);
        }
        let left = self.left.saturating_sub(in_flight);
        if !self.is_little() {
            return Room::For(left, Duration::ZERO);
        }
        let parts = u32::try_from(left.saturating_add(1)).unwrap_or(u32::MAX);
        let gap = self.reset.since(self.last_sent) / parts;
        let next = self.last_sent + gap;
        if next > now { Room::Nobody(next, Why::Turn, gap) } else { Room::For(1, gap) }
    }

    fn is_little(&self) -> bool {
        self.limit.map_or(self.left < LITTLE, |limit| self.left < limit.div_ceil(LITTLE_PART)) && !self.is_unknown()
    }
}

impl Room {
    /// Which of two has less.
    fn is_less(&self, than: &Room) -> bool {
        match (self, than) {
            (Room::Nobody(one, ..), Room::Nobody(other, ..)) => one > other,
            (Room::Nobody(..), _) => true,
            (Room::For(one, _), Room::For(other, _)) => one < other,
            (Room::For(..), Room::Unlimited) => true,
            _ => false,
        }
    }
}

impl Spending {
    /// Whether anything is known that limits it.
    pub(super) fn is_limited(&self) -> bool {
        !self.known.is_empty() || self.held > Instant::default()
    }

    /// Why no request may be sent now, however it is asked for.
    pub(super) fn wait_for_call(&mut self, now: Instant) -> Option<Wait> {
        let in_flight = self.in_flight;
        let held = self.held(now);
        let spent = self.known.iter_mut().filter_map(|known| {
            known.renew(now);
            known.spent(now, in_flight)
        });
        let (until, why) = spent.chain(held).max_by_key(|(until, _)| *until)?;
        Some(Wait { until, spread: SPREAD, look: Duration::MAX, why })
    }

    /// Until when the upstream wants to be asked for nothing at all.
    pub(super) fn held(&self, now: Instant) -> Option<(Instant, Why)> {
        (self.held > now).then_some((self.held, Why::Spent))
    }

    /// `None`: as far as the budgets go, a request may be sent now. Else whoever asks has a place in the queue from now on.
    pub(super) fn wait(&mut self, now: Instant, asker: &mut Asker) -> Option<Wait> {
        while self.queue.front().is_some_and(|first| first.until <= now) {
            self.queue.pop_front();
        }
        let (room, budget) = self.room(now, asker);
        let place = self.queue.iter().position(|waiting| waiting.no == asker.ticket);
        // Whoever waits for another budget takes nothing of this one.
        let before = self.queue.iter().take(place.unwrap_or(self.queue.len()));
        let ahead = before.filter(|waiting| waiting.budget == budget).count();
        let (until, spread, gap, why) = match room {
            Room::Unlimited => return None,
            // Whoever has waited longest goes first.
            Room::For(room, _) if (ahead as u64) < room => return None,
            Room::For(_, gap) => (now + gap.max(TURN_MIN), TURN_MIN, gap, Why::Turn),
            Room::Nobody(until, Why::Turn, gap) if !gap.is_zero() => (until, Duration::ZERO, gap, Why::Turn),
            Room::Nobody(until, Why::Turn, gap) => (until, TURN_MIN, gap, Why::Turn),
            Room::Nobody(until, why, gap) => (until, SPREAD, gap, why),
        };
        let behind = u32::try_from(ahead).unwrap_or(u32::MAX);
        let until = until + gap.saturating_mul(behind).min(QUEUE_MAX);
        if let Some(waiting) = place.and_then(|place| self.queue.get_mut(place)) {
            waiting.budget = budget;
        } else if self.queue.len() < QUEUE_PLACES_MAX {
            self.tickets += 1;
            asker.ticket = self.tickets;
            self.queue.push_back(Ticket { no: self.tickets, until, budget, voice: asker.voice });
        }
        let waiting = u32::try_from(self.queue.len()).unwrap_or(u32::MAX);
        let look = if why == Why::Turn { LOOK.max(LOOK_APART * waiting) } else { Duration::MAX };
        Some(Wait { until, spread, look, why })
    }

    /// Whoever has a place is to come back when `wait` says so, and keeps it until then.
    pub(super) fn stay(&mut self, asker: &Asker, now: Instant, wait: &Wait) {
        if asker.ticket == 0 {
            return;
        }
        let back = (wait.until + wait.spread).min(now + wait.look);
        if let Some(waiting) = self.queue.iter_mut().find(|waiting| waiting.no == asker.ticket) {
            waiting.until = back + GRACE;
        }
    }

    /// Gives that place back.
    pub(super) fn leave(&mut self, asker: &mut Asker) {
        let no = std::mem::take(&mut asker.ticket);
        if no != 0 {
            self.queue.retain(|waiting| waiting.no != no);
        }
    }

    /// Whether whoever asks lets somebody else go first who waits: the operator's streams go before what callers ask for, and one
    /// caller's request not after another one of theirs, so that nobody's targets that hang hold up those of others for long.
    fn yields(&self, now: Instant, asker: &Asker) -> bool {
        let rank = |voice: Voice| match voice {
            Voice::Operator => 0,
            Voice::Caller(_) if voice == self.first_of => 2,
            Voice::Chosen | Voice::Caller(_) => 1,
        };
        let own = rank(asker.voice);
        self.queue.iter().any(|other| other.until > now && rank(other.voice) < own)
    }

    /// What there is for whoever asks, by the budgets that it has had named, and the one of which there is least.
    fn room(&mut self, now: Instant, asker: &Asker) -> (Room, Budget) {
        let in_flight = self.in_flight;
        let waits = |until: Instant| until > now || self.yields(now, asker);
        if !self.heard && in_flight > 0 && self.first_until.is_some_and(waits) {
            let waiting = u32::try_from(self.queue.len()).unwrap_or(u32::MAX);
            let look = FIRST_LOOK_APART.saturating_mul(waiting).clamp(TURN_MIN, FIRST_LOOK_MAX);
            return (Room::Nobody(now + look, Why::Turn, Duration::ZERO), Budget::default());
        }
        let held = self.held(now).map_or(Room::Unlimited, |(until, why)| Room::Nobody(until, why, Duration::ZERO));
        let mut least = (held, (None, None, None));
        let named = &*asker.named.lock();
        for known in self.known.iter_mut().filter(|known| known.concerns(named)) {
            known.renew(now);
            let room = known.room(now, in_flight);
            if room.is_less(&least.0) {
                least = (room, known.budget());
            }
        }
        least
    }

    /// A poll is sent now. While nothing is heard the next one waits as long for this one's answer. A call, which waits for nobody,
    /// does not put it off.
    pub(super) fn begins(&mut self, now: Instant, voice: Voice) {
        (self.first_until, self.first_of) = (Some(now + FIRST_PATIENCE), voice);
    }

    /// A request is sent at `at`, by whoever has had these budgets named.
    pub(super) fn take(&mut self, at: Instant, named: &[Resource]) -> Spent {
        self.no += 1;
        self.in_flight += 1;
        self.first_until.get_or_insert(at + FIRST_PATIENCE);
        for known in self.known.iter_mut().filter(|known| known.concerns(named)) {
            known.last_sent = at;
            if known.reset_early <= at {
                known.ahead += 1;
            }
        }
        Spent { no: self.no, at }
    }

    /// That request was not sent after all.
    pub(super) fn give_back(&mut self, spent: Spent, named: &[Resource]) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if self.first_until == Some(spent.at + FIRST_PATIENCE) {
            // There is no answer to wait for.
            self.first_until = Some(spent.at);
        }
        for known in self.known.iter_mut().filter(|known| known.concerns(named) && known.reset_early <= spent.at) {
            known.ahead = known.ahead.saturating_sub(1);
        }
    }

    /// That request has been answered; `quotas` is what that said.
    pub(super) fn answered(&mut self, now: Instant, Spent { no, at: sent }: Spent, quotas: &[Quota]) {
        self.heard = true;
        if quotas.is_empty() {
            // The upstream tells of its budgets no more.
            self.known.retain(|known| !known.renewed);
            return self.lost();
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        let is_later = no > self.settled;
        for quota in quotas.iter().take(QUOTAS_MAX) {
            // What was sent after this one and has been answered told of itself where it counts.
            let mut new = Known::of(quota, now, sent, (self.no - no).min(self.in_flight));
            // An answer that took longer than its window had left says nothing of the one that is now.
            let is_stale = new.reset_early <= now;
            if let Some(known) = self.known.iter_mut().find(|known| known.budget() == new.budget()) {
                if is_stale {
                    continue;
                }
                let of_another_window =
                    known.is_unknown() || known.reset <= now || new.reset_early > known.reset + NEXT_WINDOW;
                // Where others were under way with it, a lower word was perhaps said later.
                let left = if is_later || of_another_window { new.left } else { known.left.min(new.left) };
                *known = Known { left, last_sent: known.last_sent.max(sent), ..new };
                continue;
            }
            if self.known.len() >= LANE_QUOTAS_MAX {
                let soonest = self.known.iter().enumerate().min_by_key(|(_, known)| known.reset).map(|(at, _)| at);
                soonest.map(|at| self.known.swap_remove(at));
            }
            if is_stale {
                new.left = 0;
            }
            self.known.push(new);
        }
        self.settled = self.no;
    }

    /// It wants to be asked for nothing before then.
    pub(super) fn hold(&mut self, until: Instant) {
        self.held = self.held.max(until);
    }

    /// How it has failed, where nobody has been answered yet and those who are asked for all are under way.
    pub(super) fn unanswered(&self) -> Option<UpstreamCode> {
        (!self.heard && self.in_flight > 0).then_some(self.failed.unwrap_or(UpstreamCode::Timeout))
    }

    /// There was no answer to a request.
    pub(super) fn failed(&mut self, code: UpstreamCode) {
        self.failed = Some(code);
        self.lost();
    }

    /// A request is over, and nothing is known of what it has used.
    pub(super) fn lost(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
        for known in self.known.iter_mut().filter(|known| !known.is_unknown()) {
            known.left = known.left.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::stream::budget::tests::{
        PATIENCE, at, by, drop_begun, go, lane, ms, of_callers, quota, refused, set_heard, target, wait,
    };
    use crate::stream::budget::{Ask, Budgets, Lane, Permit, Slot, Upstream};
    use crate::stream::poll::FetchError;
    use crate::time::WallTime;

    #[test]
    fn a_budget_that_is_used_up_is_waited_for() {
        let lane = lane();
        go(&lane, at(0)).answered_by(at(10), 200, &[quota(0, ms(30_000), Some(1000))]);
        let held = wait(&lane, at(20));
        assert_eq!((held.until, held.why), (at(30_010), Why::Spent));
        assert_eq!(wait(&lane, at(30_009)).until, at(30_010));
        let permits: Vec<Permit> = (0..1000).map(|_| go(&lane, at(30_010))).collect();
        assert_eq!(wait(&lane, at(30_010)).why, Why::Turn, "no more than its limit before anything is answered");
        permits.into_iter().for_each(drop_begun);
        assert_eq!(wait(&lane, at(30_011)).why, Why::Spent, "lost ones count");
    }

    #[test]
    fn before_the_first_answer_one_asks_for_all() {
        let lane = Arc::new(Budgets::default()).lane(&target("https://up.example/a", &[]));
        let first = go(&lane, at(0));
        let mut slots: [Slot; 20] = std::array::from_fn(|_| Slot::default());
        for slot in &mut slots {
            let Ask::Wait(wait) = lane.ask(at(1), slot, PATIENCE) else { panic!("nothing is known yet") };
            assert!(wait.why == Why::Turn && wait.until <= at(1) + FIRST_LOOK_MAX);
        }
        first.answered_by(at(100), 200, &[quota(10, ms(60_000), Some(11))]);
        let now = at(100) + FIRST_LOOK_MAX;
        let went: Vec<Permit> = slots
            .iter_mut()
            .filter_map(|slot| match lane.ask(now, slot, PATIENCE) {
                Ask::Go(permit) => Some(permit),
                Ask::Wait(_) => None,
            })
            .collect();
        assert_eq!(went.len(), 10);
        // An answer that tells of no budget frees all, be it an error.
        for status in [200, 500] {
            let lane = new_lane();
            let lost = go(&lane, at(0));
            lost.failed(at(10), &refused());
            let slow = go(&lane, at(20));
            wait(&lane, at(30));
            slow.answered_by(at(4_000), status, &[]);
            let _all = [0; 50].map(|_| go(&lane, at(4_000)));
        }
    }

    /// One of whose upstream nothing has been heard, and that is never taken for down.
    fn new_lane() -> Arc<Lane> {
        let budgets = Arc::new(Budgets::default());
        budgets.configure(at(0), &[Upstream { origin: "https://up.example".into(), rate: None, breaker: 0 }]);
        budgets.lane(&target("https://up.example/a", &[]))
    }

    /// All of `slots` that have not gone ask every 50 ms from then on, in their order: who has leave, and when.
    fn asking(lane: &Arc<Lane>, slots: &mut [Option<Slot>], ms: std::ops::Range<u64>) -> Vec<(u64, usize, Permit)> {
        let mut went = Vec::new();
        for now_ms in ms.step_by(50) {
            for (no, waiting) in slots.iter_mut().enumerate() {
                let Some(slot) = waiting else { continue };
                if let Ask::Go(mut permit) = lane.ask(at(now_ms), slot, PATIENCE) {
                    permit.begin();
                    *waiting = None;
                    went.push((now_ms, no, permit));
                }
            }
        }
        went
    }

    fn times(went: &[(u64, usize, Permit)]) -> Vec<u64> {
        went.iter().map(|(at, ..)| *at).collect()
    }

    #[test]
    fn where_the_first_answer_is_long_in_coming_the_others_go_one_by_one() {
        let lane = new_lane();
        let mut slots: [Option<Slot>; 100] = std::array::from_fn(|_| Some(Slot::default()));
        let mut sent = asking(&lane, &mut slots, 0..12_000);
        assert_eq!(times(&sent), [0, 5_000, 10_000]);
        // The first of ten, of which the other two may be more.
        let (.., first) = sent.remove(0);
        first.answered_by(at(12_000), 200, &[quota(9, ms(60_000), Some(10))]);
        assert_eq!(
            asking(&lane, &mut slots, 12_000..14_000).len(),
            7,
            "as many as there may be, and none before its turn"
        );
    }

    #[test]
    fn where_the_first_requests_fail_no_more_than_one_is_under_way_until_one_is_answered() {
        let lane = new_lane();
        let mut slots: [Option<Slot>; 100] = std::array::from_fn(|_| Some(Slot::default()));
        for now in (0..60_000).step_by(1_000) {
            let mut went = asking(&lane, &mut slots, now..now + 1_000);
            assert_eq!(times(&went), [now]);
            let (_, no, permit) = went.remove(0);
            permit.failed(at(now + 999), &FetchError { code: UpstreamCode::Timeout, detail: String::new() });
            slots[no] = Some(Slot::default());
        }
        // It comes up, and takes its time.
        let mut sent = asking(&lane, &mut slots, 60_000..66_000);
        assert_eq!(times(&sent), [60_000, 65_000]);
        let (.., last) = sent.remove(1);
        last.answered_by(at(66_000), 200, &[]);
        assert_eq!(times(&asking(&lane, &mut slots, 66_000..66_050)), [66_000; 98]);
    }

    #[test]
    fn a_first_request_that_hangs_holds_the_others_up_until_the_next_one_is_answered() {
        let lane = new_lane();
        let mut slots: [Option<Slot>; 20] = std::array::from_fn(|_| Some(Slot::default()));
        let _hangs = asking(&lane, &mut slots, 0..4_000);
        let (at_ms, _, next) = asking(&lane, &mut slots, 4_000..5_050).remove(0);
        assert_eq!(at_ms, 5_000);
        next.answered_by(at(5_100), 200, &[]);
        assert_eq!(times(&asking(&lane, &mut slots, 5_100..5_150)), [5_100; 18]);
    }

    #[test]
    fn what_is_not_sent_and_what_is_no_poll_put_the_next_one_off_by_nothing() {
        let lane = new_lane();
        let _hangs = go(&lane, at(0));
        let Ask::Go(_call) = lane.ask_for_call(at(4_900), PATIENCE) else { panic!("it waits for nobody") };
        drop(go(&lane, at(5_000)));
        let _next = go(&lane, at(5_001));
        assert_eq!(wait(&lane, at(10_000)).why, Why::Turn);
        drop(go(&lane, at(10_001)));
    }

    #[test]
    fn the_hanging_requests_of_a_caller_are_not_waited_for_one_after_the_other() {
        let budgets = Arc::new(Budgets::default());
        let (described, filled_in, lanes) = of_callers(&budgets);
        lanes.iter().for_each(|lane| set_heard(lane, false));
        let operators = target("https://up.example/a", &[]);
        let [own, theirs, _] = lanes;
        for (lane, many, one) in [(theirs, by(&described, 1), by(&described, 2)), (own, filled_in, operators)] {
            let mut slots: Vec<_> = (0..64).map(|_| Some(Slot::of(&many))).collect();
            let first = asking(&lane, &mut slots, 0..1_000);
            slots.push(Some(Slot::of(&one)));
            let second = asking(&lane, &mut slots, 1_000..6_000);
            assert_eq!(second.iter().map(|(at, no, _)| (*at, *no)).collect::<Vec<_>>(), [(5_000, 64)]);
            // Where it is nobody else's turn, it is theirs.
            let third = asking(&lane, &mut slots, 6_000..11_000);
            assert_eq!((times(&first), times(&third)), (vec![0], vec![10_000]));
        }
    }

    #[test]
    fn what_somebody_waits_for_is_taken_from_the_budget_and_sent_while_there_is_any() {
        let lane = lane();
        go(&lane, at(0)).answered_by(at(0), 200, &[quota(2, ms(60_000), Some(1000))]);
        // Polls would spread these two over the minute.
        assert_eq!(wait(&lane, at(0)).why, Why::Turn);
        let Ask::Go(first) = lane.ask_for_call(at(0), PATIENCE) else { panic!("two are left") };
        let Ask::Go(second) = lane.ask_for_call(at(0), PATIENCE) else { panic!("one is left") };
        let none = |now| match lane.ask_for_call(now, PATIENCE) {
            Ask::Go(_) => panic!("there is none left"),
            Ask::Wait(wait) => (wait.until, wait.why),
        };
        assert_eq!(none(at(0)), (at(50), Why::Turn), "an answer may say that there is more");
        first.answered_by(at(10), 200, &[quota(1, ms(59_990), Some(1000))]);
        second.answered_by(at(20), 200, &[quota(0, ms(59_980), Some(1000))]);
        assert_eq!(none(at(30)), (at(60_000), Why::Spent));
    }

    fn spent_of(name: &str, remaining: u64, reset_s: u64) -> Vec<Quota> {
        let field = format!("\"{name}\";r={remaining};t={reset_s}");
        let of = |header: &'static str| if header == "ratelimit" { vec![field.as_bytes()] } else { Vec::new() };
        crate::codec::rate_limit::quotas(of, WallTime::from_secs(1))
    }

    #[test]
    fn the_spent_budget_of_one_resource_holds_nobody_who_has_another() {
        let lane = lane();
        let ask = |slot: &mut Slot, now| match lane.ask(now, slot, PATIENCE) {
            Ask::Go(permit) => Ok(permit),
            Ask::Wait(wait) => Err((wait.until, wait.why)),
        };
        let (mut core, mut search) = (Slot::default(), Slot::default());
        ask(&mut core, at(0)).expect("nothing is known").answered_by(at(0), 200, &spent_of("core", 4_990, 3_600));
        ask(&mut search, at(0)).expect("there is enough").answered_by(at(0), 200, &spent_of("search", 0, 20));
        let until = at(21_000);
        assert_eq!(ask(&mut search, at(10)).expect_err("it is spent"), (until, Why::Spent));
        for now in 10..1_000 {
            let permit = ask(&mut core, at(now)).expect("core has some left");
            // The pages of the same value are of the same resource.
            assert!(now > 10 || ask(&mut permit.slot(), at(now)).is_ok());
            permit.answered_by(at(now), 200, &spent_of("core", 4_990, 3_600));
        }
        assert_eq!(ask(&mut Slot::default(), at(1_000)).expect_err("it may be of search"), (until, Why::Spent));
        drop(ask(&mut search, until).expect("there is more again"));
    }

    #[test]
    fn what_one_resource_spends_does_not_postpone_another_that_has_little_left() {
        let lane = lane();
        let (mut core, mut search) = (Slot::default(), Slot::default());
        let ask = |slot: &mut Slot, now| match lane.ask(now, slot, PATIENCE) {
            Ask::Go(permit) => Some(permit),
            Ask::Wait(_) => None,
        };
        let mut searched = 0;
        for now in (0..60_000).step_by(100) {
            for (slot, name, left) in [(&mut core, "core", 4_990), (&mut search, "search", 3)] {
                if let Some(permit) = ask(slot, at(now)) {
                    searched += u32::from(name == "search");
                    permit.answered_by(at(now), 200, &spent_of(name, left, 40));
                }
            }
        }
        assert!((4..=8).contains(&searched), "every ten seconds or so: {searched}");
    }

    #[test]
    fn answers_that_come_in_another_order_hold_nobody_for_long() {
        let lane = lane();
        let mut permits: VecDeque<Permit> = (0..6).map(|_| go(&lane, at(0))).collect();
        let first = permits.pop_front().expect("six");
        for (left, permit) in [2, 1, 0, 0, 0].into_iter().zip(permits) {
            permit.answered_by(at(100), 200, &[quota(left, ms(2_000), Some(3))]);
        }
        first.answered_by(at(600), 429, &[quota(0, ms(2_000), Some(3))]);
        assert_eq!(wait(&lane, at(700)).until, at(2_600));
        drop(go(&lane, at(2_600)));
    }

    #[test]
    fn a_budget_that_may_be_used_up_by_those_under_way_is_looked_at_again_soon() {
        let lane = lane();
        go(&lane, at(0)).answered_by(at(400), 200, &[quota(2, ms(500), Some(2))]);
        // These may have come before the reset or after it.
        let slow = [go(&lane, at(600)), go(&lane, at(600))];
        let held = wait(&lane, at(1_000));
        assert_eq!((held.until, held.why), (at(1_000) + RENEWED_AGAIN, Why::Spent));
        slow.into_iter().for_each(drop_begun);
        drop(go(&lane, held.until));
    }

    #[test]
    fn where_the_limit_is_not_known_one_request_asks_after_the_reset() {
        let lane = lane();
        go(&lane, at(0)).answered_by(at(0), 200, &[quota(0, ms(1_000), None)]);
        let first = go(&lane, at(1_000));
        assert_eq!(wait(&lane, at(1_001)).why, Why::Turn);
        first.failed(at(1_100), &refused());
        let second = go(&lane, at(1_200));
        second.answered_by(at(1_300), 200, &[quota(40, ms(1_000), None)]);
        let _both = [go(&lane, at(1_300)), go(&lane, at(1_300))];
    }

    #[test]
    fn what_is_left_of_a_budget_is_spread_where_it_is_little() {
        let lane = lane();
        go(&lane, at(0)).answered_by(at(0), 200, &[quota(199, ms(60_000), Some(1000))]);
        // Where it was last sent, and 60 s for 199 requests: about 300 ms each.
        let next = wait(&lane, at(0));
        assert_eq!((next.until, next.why), (at(300), Why::Turn));
        let lane = self::lane();
        go(&lane, at(0)).answered_by(at(0), 200, &[quota(200, ms(60_000), Some(1000))]);
        go(&lane, at(0)).answered_by(at(0), 200, &[]);
    }

    #[test]
    fn answers_that_overtake_each_other_raise_no_budget() {
        let lane = lane();
        let (first, second) = (go(&lane, at(0)), go(&lane, at(0)));
        second.answered_by(at(5), 200, &[quota(1, ms(60_000), None)]);
        // `first` is under way and not answered: that may be the one.
        assert_eq!(wait(&lane, at(6)).why, Why::Turn);
        first.answered_by(at(10), 200, &[quota(2, ms(60_000), None)]);
        let held = wait(&lane, at(11));
        assert_eq!((held.why, held.until > at(11)), (Why::Turn, true), "one is left, and spread");
        let third = go(&lane, held.until);
        assert_eq!(wait(&lane, held.until).why, Why::Turn, "that was it");
        // What costs nothing (a 304 of some) is given back by the answer to a request that was alone.
        third.answered_by(held.until + ms(5), 304, &[quota(1, ms(20_000), None)]);
        let again = wait(&lane, held.until + ms(6));
        assert_eq!(again.why, Why::Turn);
        drop(go(&lane, again.until));
    }

    #[test]
    fn a_window_that_begins_earlier_than_thought_holds_nobody_to_its_end() {
        let lane = lane();
        let (first, second) = (go(&lane, at(0)), go(&lane, at(0)));
        first.answered_by(at(5), 200, &[quota(0, ms(1_500), Some(10))]);
        second.answered_by(at(1_000), 200, &[quota(9, ms(10_500), Some(10))]);
        drop(go(&lane, at(1_001)));
    }

    #[test]
    fn a_scarce_budget_goes_round() {
        for limit in [Some(4), None] {
            let lane = lane();
            let (mut now, mut served) = (at(0), [0_u32; 5]);
            let mut due: Vec<(Instant, usize)> = (0..5).map(|asker| (now, asker)).collect();
            let mut slots: [Slot; 5] = Default::default();
            let (mut window, mut used) = (0, 0);
            while now < at(60_000) {
                due.sort_unstable();
                let (when, asker) = due.remove(0);
                now = now.max(when);
                let Ask::Go(permit) = lane.ask(now, &mut slots[asker], PATIENCE).or_wait(|wait| {
                    due.push((wait.until + wait.spread / 2, asker));
                }) else {
                    continue;
                };
                let at_ms = now.since(at(0)).as_millis() as u64;
                if at_ms / 2_000 != window {
                    (window, used) = (at_ms / 2_000, 0);
                }
                used += 1;
                assert!(used <= 4);
                served[asker] += 1;
                let reset = ms((window + 1) * 2_000 - at_ms);
                permit.answered_by(now, 200, &[quota(4 - used, reset, limit)]);
                // Whoever was served would like to be again at once.
                due.push((now + ms(1), asker));
            }
            let (least, most) = (served.iter().min(), served.iter().max());
            assert!(least >= Some(&10) && most <= Some(&40), "{limit:?}: {served:?}");
        }
    }

    #[test]
    fn whoever_does_not_come_back_is_not_waited_for() {
        let lane = lane();
        go(&lane, at(0)).answered_by(at(0), 200, &[quota(0, ms(1_000), None)]);
        let mut silent: [Slot; 10] = Default::default();
        for slot in &mut silent {
            assert!(matches!(lane.ask(at(0), slot, PATIENCE), Ask::Wait(_)));
        }
        let mut slot = Slot::default();
        let mut now = at(500);
        let mut waited = 0;
        while let Ask::Wait(wait) = lane.ask(now, &mut slot, PATIENCE) {
            now = wait.until + wait.spread;
            waited += 1;
        }
        assert!(now <= at(4_000) && waited < 100, "{now:?}, asked {waited} times");
    }

    proptest! {
        /// An upstream with a fixed window that counts every request, and clients that overlap: it never gets more than it
        /// has said it takes, once it has said so.
        #[test]
        fn never_one_request_more_than_allowed(
            limit in 1..20_u64,
            tell_limit in any::<bool>(),
            steps in prop::collection::vec((0..400_u64, 0..6_usize, 0..10_u8), 1..300),
        ) {
            const WINDOW_MS: u64 = 2_000;
            let lane = lane();
            let (mut now_ms, mut window, mut used) = (0, 0, 0);
            // What was sent and the answer that waits to be heard.
            let mut under_way: Vec<(Permit, Quota)> = Vec::new();
            let mut heard = false;
            for (pass_ms, which, deed) in steps {
                now_ms += pass_ms;
                if deed < 6 && (heard || under_way.is_empty()) {
                    if let Ask::Go(permit) = lane.ask(at(now_ms), &mut Slot::default(), PATIENCE) {
                        if now_ms / WINDOW_MS != window {
                            (window, used) = (now_ms / WINDOW_MS, 0);
                        }
                        used += 1;
                        prop_assert!(used <= limit, "request {} of {}", used, limit);
                        let left_ms = (window + 1) * WINDOW_MS - now_ms;
                        let said = Quota {
                            remaining: limit - used,
                            reset: ms(left_ms),
                            limit: tell_limit.then_some(limit),
                            window: None,
                            resource: None,
                        };
                        under_way.push((permit, said));
                    }
                } else if !under_way.is_empty() {
                    let (permit, mut said) = under_way.swap_remove(which % under_way.len());
                    // An answer is late: its reset counts from when it was heard, which errs on the safe side.
                    said.reset += ms(u64::from(deed));
                    heard = true;
                    permit.answered_by(at(now_ms), 200, &[said]);
                }
            }
        }
    }
}
