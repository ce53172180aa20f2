//! The streams that this core polls, for itself and for other cores.
//!
//! A stream is polled once for all of its sequences, each of which has its own audience: a core hears of an event only if
//! someone there watches what shows it.
//! Source: protocol version 1, section 3; `stream` does the work of each. Memory: `limits.streams` streams of the
//! process; what they hold: `room`. Errors: [`Mail::Refused`] where there are too many.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::ids::{CoreId, Epoch, Holder, StreamId};
use crate::limits::SELECTS_OTHERS_PARTS;
use crate::metrics::PollResult;
use crate::stream::budget::{Ask, Lane, PollLeave, Slot, Wait, Why};
use crate::stream::log::{Event, History};
use crate::stream::poll::{Failure, FetchResult, PollNo, Record, StreamState, UpstreamCode};
use crate::stream::rest::Rest;
use crate::stream::succession::{Course, UnderWay};
use crate::stream::{CaughtUp, Compared, SequenceNo, Step, Stream};
use crate::time::Instant;

use super::catalog::PolledKey;
use super::{Mail, Notice, Output, Shard, StreamKey, Timer};

/// Least and longest time between two looks whether the poll of the stream before has ended; in between it is a quarter of what
/// has been waited.
const PREDECESSOR_LOOKS: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(1)];

/// A stream and those who want to hear of it.
#[derive(Debug)]
pub(super) struct Owned {
    /// Of the first who asked for it; what else it has in common with the keys of `audiences` is what is polled.
    pub(super) key: Arc<StreamKey>,
    pub(super) stream: Stream,
    /// What it has in common with those before and after it at the same request.
    course: Arc<Course>,
    /// Where it follows its upstream: that it does, or tries to.
    under_way: Option<UnderWay>,
    /// Since when it waits for the poll of the one before it to end, while it does.
    waits_since: Option<Instant>,
    /// Whom it asks, together with others.
    lane: Arc<Lane>,
    /// What tells whether it has got other secrets since, and with them another lane.
    credential_version: u64,
    /// Its place in a queue there.
    slot: Slot,
    /// Since when the poll that is due has waited for leave, while it does.
    held_since: Option<Instant>,
    /// Tells it from others that have stood at its place.
    pub(super) generation: u32,
    /// Who hears of each of its sequences; never none, once there was one.
    pub(super) audiences: Vec<Audience>,
    /// Whether it is polled without watchers.
    pub(super) warm: bool,
    /// When polling ends, where nobody watches.
    linger_until: Option<Instant>,
    /// When it was last watched.
    pub(super) used: Instant,
    /// Whether a poll has ended since polling last began.
    fresh: bool,
    /// Whether it is neither polled nor watched, and so does not count for `limits.streams`.
    parked: bool,
    /// When the poll under way, or the last one, began.
    begun: Instant,
    /// What it counts for in `Shard::history_bytes`, and the like.
    pub(super) counted: Held,
    /// When the latest timer for a poll fires, while one is set: a later poll is planned then, without another timer.
    poll_timer: Option<Instant>,
    /// The same for the end of its lingering.
    linger_timer: Option<Instant>,
}

/// Bytes that a stream holds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Held {
    pub(super) bytes: u64,
    /// What is left of them if all that can be cut is: of one that nobody watches nothing.
    pub(super) least: u64,
}

/// Those who want to hear of one sequence.
#[derive(Debug)]
pub(super) struct Audience {
    pub(super) no: SequenceNo,
    pub(super) key: Arc<StreamKey>,
    /// For each core that hears of it, whether someone there watches.
    pub(super) cores: BTreeMap<CoreId, bool>,
    /// When it was last watched.
    pub(super) used: Instant,
    /// The state that its cores go by.
    told: StreamState,
    /// Whether the log was told that it cannot be made of the value.
    faulted: bool,
    /// Who answers for the work of what is selected, of each core where it is known.
    payers: BTreeMap<CoreId, Holder>,
}

impl Audience {
    pub(super) fn is_watched(&self) -> bool {
        self.cores.values().any(|&watches| watches)
    }

    pub(super) fn cores(&self) -> Vec<CoreId> {
        self.cores.keys().copied().collect()
    }

    /// Those who answer for its work: who watches, or, where nobody does, who has.
    fn payers(&self) -> Vec<Holder> {
        let watching = self.payers.iter().filter(|(core, _)| self.cores.get(core).is_some_and(|&watches| watches));
        let mut payers: Vec<Holder> = if self.is_watched() {
            watching.map(|(_, payer)| *payer).collect()
        } else {
            self.payers.values().copied().collect()
        };
        payers.sort_unstable();
        payers.dedup();
        payers
    }
}

impl Owned {
    pub(super) fn is_watched(&self) -> bool {
        self.warm || self.audiences.iter().any(Audience::is_watched)
    }

    fn audience(&mut self, key: &StreamKey) -> Option<&mut Audience> {
        self.audiences.iter_mut().find(|audience| *audience.key == *key)
    }

    fn audience_of(&self, no: SequenceNo) -> Option<&Audience> {
        self.audiences.iter().find(|audience| audience.no == no)
    }

    /// Tells those who come after it how it stands with its upstream.
    fn leave_record(&self) {
        self.course.leave(&self.lane, self.key.revision, self.stream.record());
    }

    /// Tells them that it polls just now. How that ends nobody knows, so that they wait for no failure before it.
    fn leave_start(&self) {
        let record = self.stream.record();
        let record = Record { last_start: record.last_start, failures: record.failures, ..Record::default() };
        self.course.leave(&self.lane, self.key.revision, record);
    }

    /// Tells the stream who watches what is selected, where that is one, and who answers for it.
    fn claim(&mut self, no: SequenceNo) {
        let Some(audience) = self.audience_of(no).filter(|audience| audience.key.facet.select.is_some()) else {
            return;
        };
        let (watched, payers) = (audience.is_watched(), audience.payers());
        self.stream.set_claim(no, watched, payers);
    }

    /// Waits for no leave any more: who waits behind it need not.
    fn ask_no_more(&mut self) {
        self.slot.leave();
        self.held_since = None;
    }

    /// Polls look at those sequences that are watched or were a moment ago; where there is only one, the whole stream lingers.
    fn choose_wanted(&mut self, now: Instant) {
        if let [_, _, ..] = &*self.audiences {
            let linger = self.key.target.options.linger;
            for audience in &self.audiences {
                let wanted = self.warm || audience.is_watched() || audience.used + linger > now;
                self.stream.set_wanted(audience.no, wanted);
            }
        }
    }
}

impl Shard {
    /// Begins to poll the streams that are polled without watchers, as far as they are this core's.
    pub(super) fn warm(&mut self) {
        let options = Arc::clone(&self.options);
        for key in options.catalog.kept_warm() {
            self.warm_up(key, false);
        }
    }

    /// What was polled without watchers was changed: what it is now has its place, be it on another core that heard of the
    /// change first and has found none.
    fn warm_successor(&mut self, id: &StreamId) {
        let options = Arc::clone(&self.options);
        let Some(key) = options.catalog.kept_warm_of(id).first() else { return };
        if self.ledger.open_stream(0).is_ok() {
            self.send(key.owner(self.cores), Mail::Warm { key: Arc::clone(key) });
        }
    }

    pub(super) fn warmed(&mut self, key: &Arc<StreamKey>) {
        if !self.options.catalog.is_past(key) {
            self.warm_up(key, true);
        }
        // It has counted itself, or did before: what came along was to keep others from its place.
        self.ledger.close_stream();
    }

    fn warm_up(&mut self, key: &Arc<StreamKey>, moved: bool) {
        if key.owner(self.cores) == self.core
            && let Some(index) = self.own(key, moved)
        {
            self.hear(index, key);
            if let Some(owned) = self.streams.at_mut(index) {
                owned.warm = true;
            }
            self.start_stream(index);
        }
    }

    /// The place of that stream, which is made if there is none; `None` where there are too many. `moved`: it is watched by
    /// those who watched what it was before, whose places come free when they have left it.
    fn own(&mut self, key: &Arc<StreamKey>, moved: bool) -> Option<u32> {
        if let Some(index) = self.owned(key) {
            let owned = self.streams.at_mut(index)?;
            if owned.parked {
                // It is left alone meanwhile: it must not make place for itself.
                owned.used = self.now.at;
                self.take_place(Some(index), moved)?;
                if let Some(owned) = self.streams.at_mut(index) {
                    owned.parked = false;
                }
            }
            return Some(index);
        }
        self.take_place(None, moved)?;
        self.generation = self.generation.wrapping_add(1);
        // An answer that comes after its stream was evicted must not become the value of the next one at its place.
        let last = PollNo(u64::from(self.generation) << 32);
        let id = &key.target.options.id;
        let mut stream = Stream::new(Arc::clone(&key.target), self.rng.u64(), last);
        let lane = self.ledger.budgets().lane(&key.target);
        let course = self.ledger.successions().course(self.now.at, key.course());
        if let Some(left) = course.left_to(&lane, key.revision) {
            stream.take_up(self.now.at, left, lane.left_alone_until(&key.target, self.now.at));
        }
        if let Some(start) = self.starts.take(key.hash_value(), self.now.at) {
            stream.started_before(start);
        }
        if self.options.catalog.is_stopped(id) {
            stream.pause();
        }
        let owned = Owned {
            key: Arc::clone(key),
            stream,
            course,
            under_way: None,
            waits_since: None,
            credential_version: key.target.options.credential.version(),
            lane,
            slot: Slot::of(&key.target),
            held_since: None,
            generation: self.generation,
            audiences: Vec::new(),
            warm: false,
            linger_until: None,
            used: self.now.at,
            fresh: false,
            parked: false,
            begun: self.now.at,
            counted: Held::default(),
            poll_timer: None,
            linger_timer: None,
        };
        let index = self.streams.insert(owned);
        self.stream_of.insert(PolledKey(Arc::clone(key)), index);
        self.stream_at.insert(key.hash_value(), index);
        self.streams_of.entry(id.clone()).or_default().insert(index);
        self.metrics.streams.rise();
        Some(index)
    }

    /// The place of the stream that this is a facet of, where there is one.
    fn owned(&self, key: &Arc<StreamKey>) -> Option<u32> {
        self.stream_of.get(&PolledKey(Arc::clone(key))).copied()
    }

    /// The audience of that facet of the stream, which is made if there is none.
    fn hear(&mut self, index: u32, key: &Arc<StreamKey>) -> Option<&mut Audience> {
        let now = self.now.at;
        let owned = self.streams.at_mut(index)?;
        if owned.audience(key).is_none() {
            let no = owned.stream.add_sequence(key.facet.clone(), Epoch::from_random(self.rng.u64()));
            let told = owned.stream.status_of(no, now).state;
            let (key, cores) = (Arc::clone(key), BTreeMap::new());
            let payers = BTreeMap::new();
            owned.audiences.push(Audience { no, key, cores, used: now, told, faulted: false, payers });
        }
        owned.audience(key)
    }

    /// Whether the stream may have that facet: there is one `select` more at most than there may be, of which the one that
    /// has gone unwatched for longest makes place. A payer of many leaves some to others.
    fn take_select(&mut self, index: u32, key: &StreamKey, payer: Option<Holder>, moved: bool) -> bool {
        let most = self.ledger.bounds(&self.options.limits).selects_per_stream as usize;
        let Some(owned) = self.streams.at_mut(index) else { return false };
        if moved || key.facet.select.is_none() || owned.audience(key).is_some() {
            return true;
        }
        let selects = || owned.audiences.iter().filter(|audience| audience.key.facet.select.is_some());
        let theirs = |audience: &&Audience| payer.is_some_and(|payer| audience.payers().contains(&payer));
        let of_payer_max = most - most / SELECTS_OTHERS_PARTS as usize;
        if selects().filter(|audience| audience.is_watched()).filter(theirs).count() >= of_payer_max {
            return false;
        }
        if selects().count() < most {
            return true;
        }
        let unwatched = selects().filter(|audience| !audience.is_watched());
        let Some(oldest) = unwatched.min_by_key(|audience| audience.used).map(|audience| audience.no) else {
            return false;
        };
        self.forget_sequence(index, oldest);
        true
    }

    /// Counts one stream more, if there may be; one that lingers makes place for it, if need be one whose upstream wants to be
    /// left alone.
    fn take_place(&mut self, for_one: Option<u32>, moved: bool) -> Option<()> {
        let most = if moved { 0 } else { self.ledger.bounds(&self.options.limits).streams };
        if self.ledger.open_stream(most).is_ok() {
            return Some(());
        }
        let lingering = self
            .streams
            .iter()
            .filter(|(index, owned)| !owned.parked && !owned.is_watched() && Some(*index) != for_one);
        let now = self.now.at;
        let (index, _) = lingering.min_by_key(|(_, owned)| (owned.stream.is_put_off(now), owned.used))?;
        self.evict(index);
        self.ledger.open_stream(most).ok()
    }

    /// Polling has ended and nobody watches: the stream counts no more, and is kept for those who return as long as there
    /// is room for its value and history, at most as many as there may be streams.
    fn park(&mut self, index: u32) {
        let Some(owned) = self.streams.at_mut(index) else { return };
        if !std::mem::replace(&mut owned.parked, true) {
            self.ledger.close_stream();
        }
        let most = self.ledger.bounds(&self.options.limits).streams as usize;
        let parked = || self.streams.iter().filter(|(_, owned)| owned.parked);
        if most == 0 || parked().count() <= most {
            return;
        }
        let now = self.now.at;
        if let Some((oldest, _)) = parked().min_by_key(|(_, owned)| (owned.stream.is_put_off(now), owned.used)) {
            self.evict(oldest);
        }
    }

    /// Forgets a sequence, and with the last its stream.
    pub(super) fn evict_sequence(&mut self, index: u32, no: SequenceNo) {
        let Some(owned) = self.streams.at_mut(index) else { return };
        if let [_] | [] = &*owned.audiences {
            return self.evict(index);
        }
        self.forget_sequence(index, no);
    }

    /// Forgets a sequence; the stream stays, be it without any.
    fn forget_sequence(&mut self, index: u32, no: SequenceNo) {
        let Some(owned) = self.streams.at_mut(index) else { return };
        let Some(at) = owned.audiences.iter().position(|audience| audience.no == no) else { return };
        let audience = owned.audiences.swap_remove(at);
        owned.stream.remove_sequence(no);
        for core in audience.cores() {
            self.send(core, Mail::Evicted { key: Arc::clone(&audience.key) });
        }
        self.recount(index);
    }

    pub(super) fn evict(&mut self, index: u32) {
        let Some(mut owned) = self.streams.remove(index) else { return };
        owned.leave_record();
        if let Some(poll) = owned.stream.give_up() {
            self.outputs.push_back(Output::Unfollow { stream: index, poll });
        }
        self.stream_of.remove(&PolledKey(Arc::clone(&owned.key)));
        let polled = owned.key.hash_value();
        if self.stream_at.get(&polled) == Some(&index) {
            self.stream_at.remove(&polled);
        }
        if owned.key.is_polled_for_callers()
            && let (Some(start), Some(until)) = (owned.stream.last_start(), owned.stream.rests_until())
        {
            self.starts.remember(polled, start, until, self.now.at);
        }
        let id = &owned.key.target.options.id;
        if let Some(places) = self.streams_of.get_mut(id) {
            places.remove(&index);
            if places.is_empty() {
                self.streams_of.remove(id);
            }
        }
        if !owned.parked {
            self.ledger.close_stream();
        }
        self.metrics.streams.fall();
        self.count_bytes(owned.counted, Held::default(), owned.key.target.options.described_by);
        for audience in &owned.audiences {
            for core in audience.cores() {
                self.send(core, Mail::Evicted { key: Arc::clone(&audience.key) });
            }
        }
    }

    /// `attach`: a copy is wanted. `moved`: no limit of streams refuses it.
    pub(super) fn watched(
        &mut self,
        key: Arc<StreamKey>,
        from: CoreId,
        (attach, moved): (bool, bool),
        payer: Option<Holder>,
    ) {
        let now = self.now.at;
        let Some(index) = self.own(&key, moved).filter(|&index| self.take_select(index, &key, payer, moved)) else {
            self.send(from, Mail::Refused { key, full: !moved });
            return;
        };
        let Some(audience) = self.hear(index, &key) else { return };
        let known = audience.cores.insert(from, true).is_some();
        audience.used = now;
        audience.payers.extend(payer.map(|payer| (from, payer)));
        let no = audience.no;
        let Some(owned) = self.streams.at_mut(index) else { return };
        owned.claim(no);
        owned.linger_until = None;
        owned.used = now;
        if !owned.stream.is_running() {
            // What would not be polled again yet if it had been polled on is as good as then.
            let rests = owned.stream.rests_until().is_some_and(|until| until > now);
            owned.fresh = owned.stream.holds_newest(self.now) || (owned.fresh && rests);
        }
        owned.stream.set_wanted(no, true);
        self.recount(index);
        self.start_stream(index);
        self.catch_up_sequences(index);
        let Some(owned) = self.streams.at(index) else { return };
        let fresh = owned.fresh && owned.stream.is_current(no);
        let status = owned.stream.status_of(no, now);
        if attach || !known {
            let Some(history) = owned.stream.history(no) else { return };
            let history = Box::new(history.clone());
            self.send(from, Mail::Attached { key, history, status, fresh });
        } else if fresh {
            let head = owned.stream.history(no).and_then(History::point);
            self.send(from, Mail::Polled { key, status, changed: false, fresh, head });
        }
    }

    pub(super) fn unwatched(&mut self, key: &Arc<StreamKey>, from: CoreId) {
        let now = self.now.at;
        let Some(index) = self.owned(key) else { return };
        let Some(owned) = self.streams.at_mut(index) else { return };
        let Some(audience) = owned.audience(key) else { return };
        if let Some(watches) = audience.cores.get_mut(&from) {
            *watches = false;
        }
        audience.used = now;
        let no = audience.no;
        owned.used = now;
        owned.claim(no);
        self.recount(index);
        self.linger(index);
        // What it took may be what others wait for.
        self.catch_up_sequences(index);
    }

    /// Somebody else answers on `from` for the work of what is selected.
    pub(super) fn charged(&mut self, key: &Arc<StreamKey>, from: CoreId, payer: Holder) {
        let Some(index) = self.owned(key) else { return };
        let Some(owned) = self.streams.at_mut(index) else { return };
        let Some(audience) = owned.audience(key).filter(|audience| audience.cores.contains_key(&from)) else { return };
        audience.payers.insert(from, payer);
        let no = audience.no;
        owned.claim(no);
        self.catch_up_sequences(index);
    }

    /// What the stream shows may have changed: it is polled at once, and where a poll is under way, which may have missed
    /// the change, once more after it. One that is not polled now is with its next watcher.
    pub(super) fn refreshed(&mut self, key: &Arc<StreamKey>) {
        let Some(index) = self.owned(key) else { return };
        let now = self.now.at;
        if self.streams.at_mut(index).is_some_and(|owned| owned.stream.poll_now(now)) {
            self.plan_poll(index);
        }
    }

    /// The same for all that is polled of one stream, for those outside, who may say so as often as they like.
    pub(super) fn refresh_stream(&mut self, id: &StreamId) {
        self.refresh_those(id, |_| true);
    }

    /// The same for what of it is `meant`.
    pub(super) fn refresh_those(&mut self, id: &StreamId, meant: impl Fn(&StreamKey) -> bool) {
        let now = self.now.at;
        let places: Vec<u32> = self.streams_of.get(id).into_iter().flatten().copied().collect();
        for index in places {
            let owned = self.streams.at_mut(index).filter(|owned| meant(&owned.key));
            if owned.is_some_and(|owned| owned.stream.poll_soon(now)) {
                self.plan_poll(index);
            }
        }
    }

    /// Stops or starts what is polled of a stream, as the catalog says.
    fn obey_stop(&mut self, index: u32) {
        let now = self.now.at;
        let Some(owned) = self.streams.at_mut(index) else { return };
        let stopped = self.options.catalog.is_stopped(&owned.key.target.options.id);
        if !self.options.catalog.is_current(&owned.key) || owned.stream.is_paused() == stopped {
            return;
        }
        if stopped {
            owned.stream.pause();
            owned.ask_no_more();
            owned.under_way = None;
            if let Some(poll) = owned.stream.give_up() {
                self.outputs.push_back(Output::Unfollow { stream: index, poll });
            }
        } else {
            owned.stream.resume(now);
        }
        owned.fresh = false;
        // It is told below; the log has a line of who has ordered it.
        let _ = owned.stream.status_change(now);
        for no in owned.audiences.iter().map(|audience| audience.no).collect::<Vec<_>>() {
            self.tell_polled(index, no, false);
        }
        self.plan_poll(index);
    }

    pub(super) fn detached(&mut self, key: &Arc<StreamKey>, from: CoreId) {
        let Some(index) = self.owned(key) else { return };
        let Some(audience) = self.streams.at_mut(index).and_then(|owned| owned.audience(key)) else { return };
        audience.cores.remove(&from);
        if audience.payers.len() > 1 {
            audience.payers.remove(&from);
        }
        let no = audience.no;
        if let Some(owned) = self.streams.at_mut(index) {
            owned.claim(no);
        }
        self.recount(index);
        self.linger(index);
    }

    /// Where nobody watches, lets polling go on for `linger`, unless it is to end already.
    fn linger(&mut self, index: u32) {
        let Some(owned) = self.streams.at_mut(index) else { return };
        if owned.is_watched() {
            return;
        }
        if !self.options.catalog.is_current(&owned.key) {
            // It was changed or deleted: nobody comes back to it.
            return self.evict(index);
        }
        if owned.linger_until.is_some() || !owned.stream.is_running() {
            return;
        }
        owned.linger_until = Some(self.now.at + owned.key.target.options.linger);
        self.plan_linger_end(index);
    }

    fn plan_linger_end(&mut self, index: u32) {
        let Some(owned) = self.streams.at_mut(index) else { return };
        let Some(until) = owned.linger_until else { return };
        if owned.linger_timer.is_none_or(|set| until < set) {
            owned.linger_timer = Some(until);
            let timer = Timer::Linger { index, generation: owned.generation };
            self.set_timer(until, timer);
        }
    }

    fn start_stream(&mut self, index: u32) {
        let Some(owned) = self.streams.at_mut(index) else { return };
        let now = self.now.at;
        owned.stream.start(now);
        if let Some(until) = owned.lane.rests.until(&owned.key.target, now) {
            // When it looks nobody minds; what it may hope for is told to whoever comes meanwhile.
            owned.stream.hold(now, until, None);
        }
        self.plan_poll(index);
    }

    /// Sets a timer for the next poll, unless an earlier one is set, which will plan again: however often watchers come and
    /// go, a stream has one, and another for the end of its lingering.
    fn plan_poll(&mut self, index: u32) {
        let Some(owned) = self.streams.at_mut(index) else { return };
        let Some(due) = owned.stream.next_due() else { return };
        if owned.poll_timer.is_none_or(|set| due < set) {
            owned.poll_timer = Some(due);
            let timer = Timer::Poll { index, generation: owned.generation };
            self.set_timer(due, timer);
        }
    }

    /// The time that was set for the end of a stream's lingering has come.
    pub(super) fn linger_due(&mut self, index: u32, generation: u32, at: Instant) {
        let now = self.now.at;
        let Some(owned) = self.streams.at_mut(index).filter(|owned| owned.generation == generation) else { return };
        if owned.linger_timer == Some(at) {
            owned.linger_timer = None;
        }
        if owned.linger_until.is_none_or(|until| until > now) {
            // It was watched again meanwhile, and perhaps given up again.
            return self.plan_linger_end(index);
        }
        self.end_linger(index);
    }

    /// Those who have left a stream, by the hash of what is polled, need it polled no more.
    pub(super) fn let_go(&mut self, polled: u64) {
        let Some(&index) = self.stream_at.get(&polled) else { return };
        let Some(owned) = self.streams.at(index) else { return };
        if !owned.is_watched() && owned.stream.is_running() {
            self.end_linger(index);
        }
    }

    /// Nobody watches, and polling ends.
    fn end_linger(&mut self, index: u32) {
        let now = self.now.at;
        let Some(owned) = self.streams.at_mut(index) else { return };
        owned.linger_until = None;
        owned.stream.stop();
        owned.ask_no_more();
        owned.under_way = None;
        if let Some(poll) = owned.stream.give_up() {
            self.outputs.push_back(Output::Unfollow { stream: index, poll });
        }
        if !self.options.catalog.is_current(&owned.key) {
            return self.evict(index);
        }
        if !owned.key.is_direct() {
            owned.fresh = false;
            return self.park(index);
        }
        // What a caller has described may hold secrets: it is kept no longer than it would not be polled again if it was
        // asked for again.
        match owned.stream.rests_until().filter(|&until| until > now) {
            Some(until) => {
                owned.linger_until = Some(until);
                self.plan_linger_end(index);
            }
            None => self.evict(index),
        }
    }

    /// The time that was set for a poll has come.
    pub(super) fn poll_due(&mut self, index: u32, generation: u32, at: Instant) {
        let now = self.now.at;
        let Some(owned) = self.streams.at_mut(index).filter(|owned| owned.generation == generation) else { return };
        if owned.poll_timer == Some(at) {
            owned.poll_timer = None;
        }
        if owned.stream.next_due().is_none_or(|due| due > now) {
            return self.plan_poll(index);
        }
        if let Some(until) = owned.stream.closed_until(self.now) {
            owned.ask_no_more();
            return match owned.stream.hold_closed(self.now, until) {
                Some(failure) => self.stepped(index, Step::Failed(failure)),
                None => self.plan_poll(index),
            };
        }
        let version = owned.key.target.options.credential.version();
        if std::mem::replace(&mut owned.credential_version, version) != version {
            owned.slot.reset();
            owned.lane = self.ledger.budgets().lane(&owned.key.target);
        }
        if let Some(until) = owned.lane.rests.until(&owned.key.target, now) {
            // Another stream of that request was told so, which this one may have been before it was changed or evicted.
            return self.held_back(index, Wait { until, spread: Duration::ZERO, look: Duration::MAX, why: Why::Spent });
        }
        let begins = || owned.course.begin(&owned.lane, &owned.key.target);
        let Some(under_way) = owned.under_way.take().or_else(begins) else {
            return self.wait_for_predecessor(index);
        };
        owned.waits_since = None;
        if owned.stream.follows() {
            let (held, lane) = (owned.stream.holds_value(), Arc::clone(&owned.lane));
            owned.held_since = None;
            if let Some((poll, request)) = owned.stream.begin(now) {
                owned.begun = now;
                owned.under_way = Some(under_way);
                owned.leave_start();
                self.outputs.push_back(Output::Next { stream: index, poll, request, lane, held });
            }
            return;
        }
        let leave = if owned.stream.lacks_token() {
            // It would hold up those who have theirs for nothing.
            owned.slot.leave();
            PollLeave::Later(Arc::clone(&owned.lane))
        } else {
            owned.slot.set_works(owned.stream.works());
            match owned.lane.ask(now, &mut owned.slot, owned.key.target.options.backoff_max) {
                Ask::Wait(wait) => return self.held_back(index, wait),
                Ask::Go(permit) => PollLeave::Given(permit),
            }
        };
        owned.held_since = None;
        if let Some((poll, request)) = owned.stream.begin(now) {
            owned.begun = now;
            owned.leave_start();
            self.outputs.push_back(Output::Fetch { stream: index, poll, request, leave, under_way });
        }
    }

    /// A poll of the stream that was here before is under way still, or one that was begun before it was stopped: it is looked
    /// whether it has ended, the less often the longer it takes.
    fn wait_for_predecessor(&mut self, index: u32) {
        let now = self.now.at;
        let Some(owned) = self.streams.at_mut(index) else { return };
        let [least, longest] = PREDECESSOR_LOOKS;
        // Whoever would not go if its turn came holds none of those up who would.
        owned.slot.leave();
        let look = (now.since(*owned.waits_since.get_or_insert(now)) / 4).clamp(least, longest);
        let until = now + look + self.part_of(look / 4);
        if let Some(owned) = self.streams.at_mut(index) {
            owned.stream.hold(until, until, None);
        }
        self.plan_poll(index);
    }

    /// A poll that is due may not begin: who watches is told where that matters.
    fn held_back(&mut self, index: u32, wait: Wait) {
        let now = self.now.at;
        let until = wait.until + self.part_of(wait.spread);
        // Those who came together do not look together.
        let look = until.min(now + (wait.look / 2 + self.part_of(wait.look / 2)));
        let Some(owned) = self.streams.at_mut(index) else { return };
        let since = *owned.held_since.get_or_insert(now);
        // A wait for which a poll would have been given up is as bad as one that was.
        let long = until.since(since) > owned.key.target.options.timeout;
        let limited = |detail: &str| {
            let detail = detail.to_owned();
            Some(Failure { code: UpstreamCode::RateLimited, status: None, detail })
        };
        let failure = match wait.why {
            Why::Down(code, status) => {
                Some(Failure { code, status, detail: "the upstream fails whoever asks, and is left alone".to_owned() })
            }
            Why::Spent if long || !owned.stream.holds_value() => {
                limited("the upstream takes no more requests until then")
            }
            Why::Turn if long => match owned.lane.unanswered() {
                Some(code) => Some(Failure {
                    code,
                    status: None,
                    detail: "the upstream has answered nobody yet, and one after the other tries it".to_owned(),
                }),
                None => limited("others wait for the upstream too, which takes no more requests in time"),
            },
            Why::Spent | Why::Turn => None,
        };
        // It is told once, however often it looks.
        let told = owned.stream.status(now).code.filter(|_| owned.fresh);
        owned.stream.hold(look, until, failure.as_ref());
        match failure {
            Some(failure) if told != Some(failure.code) => self.stepped(index, Step::Failed(failure)),
            _ => self.plan_poll(index),
        }
    }

    /// A random part of a time.
    fn part_of(&mut self, time: Duration) -> Duration {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX - 1);
        Duration::from_micros(self.rng.u64() % us.saturating_add(1))
    }

    pub(super) fn fetched(&mut self, index: u32, poll: PollNo, result: FetchResult) {
        let now = self.now;
        let Some(owned) = self.streams.at_mut(index) else { return };
        let (not_modified, took) =
            (matches!(&result, Ok(response) if response.status == 304), now.at.since(owned.begun));
        owned.choose_wanted(now.at);
        let rest = Rest::of(&result);
        let step = owned.stream.fetched(now, index, poll, result);
        if !matches!(step, Step::Unexpected) {
            rest.tell(&owned.lane.rests, &owned.key.target, now.at);
        }
        if matches!(step, Step::Failed(_)) {
            owned.under_way = None;
            owned.leave_record();
        }
        if !matches!(step, Step::Unexpected) {
            self.metrics.poll_duration.observe(took);
        }
        self.count_poll(&step, not_modified);
        self.stepped(index, step);
    }

    pub(super) fn compared(&mut self, compared: Compared) {
        let now = self.now;
        let index = compared.stream;
        let Some(owned) = self.streams.at_mut(index) else { return };
        if !compared.is_of_poll() {
            let taken = owned.stream.caught_up(compared);
            self.sequences_caught_up(index, taken);
            return self.catch_up_sequences(index);
        }
        let step = owned.stream.compared(now, compared);
        if matches!(step, Step::Failed(_)) {
            owned.leave_record();
        }
        self.count_poll(&step, false);
        self.stepped(index, step);
    }

    /// Brings the sequences that are wanted again, or for the first time, up to date.
    fn catch_up_sequences(&mut self, index: u32) {
        let Some(owned) = self.streams.at_mut(index) else { return };
        match owned.stream.catch_up(index) {
            CaughtUp::Compare(comparison) => self.outputs.push_back(Output::Compare(Box::new(comparison))),
            CaughtUp::Now(taken) => self.sequences_caught_up(index, taken),
        }
    }

    /// Sequences have been brought up to date: some by an event.
    fn sequences_caught_up(&mut self, index: u32, taken: Vec<(SequenceNo, Option<Event>)>) {
        if taken.is_empty() {
            return;
        }
        for (no, event) in taken {
            if let Some(event) = event {
                self.publish(index, no, &event);
            }
            let Some(fresh) = self.streams.at(index).map(|owned| owned.fresh) else { return };
            self.tell_polled(index, no, fresh);
        }
        self.bound_histories(index);
    }

    /// Tells all who hear of a sequence how it stands now, and the log where it has begun or ceased to be one that cannot be
    /// made. `fresh`: what its history holds is no older than the last poll.
    fn tell_polled(&mut self, index: u32, no: SequenceNo, fresh: bool) {
        let now = self.now.at;
        let Some(owned) = self.streams.at_mut(index) else { return };
        let status = owned.stream.status_of(no, now);
        let faulted = owned.stream.fault_of(no).is_some();
        let head = owned.stream.history(no).and_then(History::point);
        let Some(audience) = owned.audiences.iter_mut().find(|audience| audience.no == no) else { return };
        let changed = std::mem::replace(&mut audience.told, status.state) != status.state;
        let news = std::mem::replace(&mut audience.faulted, faulted) != faulted;
        let (key, cores) = (Arc::clone(&audience.key), audience.cores());
        for core in cores {
            self.send(core, Mail::Polled { key: Arc::clone(&key), status, changed, fresh, head });
        }
        // What callers select is no operator's business: they would fill the log.
        if news
            && key.facet.select.is_none()
            && let Some(owned) = self.streams.at(index)
        {
            let fault = owned.stream.fault_of(no).map(|fault| fault.detail.clone());
            let stream = owned.key.target.options.id.to_string();
            self.outputs.push_back(Output::Notice(Notice::View { stream, fault }));
        }
    }

    /// Tells an event to all who hear of its sequence.
    fn publish(&mut self, index: u32, no: SequenceNo, event: &Event) {
        let Some(audience) = self.streams.at(index).and_then(|owned| owned.audience_of(no)) else { return };
        let (key, cores) = (Arc::clone(&audience.key), audience.cores());
        for core in cores {
            self.send(core, Mail::Published { key: Arc::clone(&key), event: event.clone() });
        }
    }

    fn count_poll(&self, step: &Step, not_modified: bool) {
        let result = match step {
            Step::Unexpected | Step::Compare(_) => return,
            Step::Unchanged if not_modified => PollResult::NotModified,
            Step::Unchanged => PollResult::Unchanged,
            Step::Changed(_) => PollResult::Changed,
            Step::Failed(failure) => PollResult::of_code(failure.code.as_str()),
        };
        self.metrics.polls.of(result).count();
    }

    fn stepped(&mut self, index: u32, step: Step) {
        let mut detail = String::new();
        match step {
            Step::Unexpected => return,
            Step::Compare(comparison) => {
                self.outputs.push_back(Output::Compare(Box::new(comparison)));
                return;
            }
            Step::Unchanged => {}
            Step::Failed(failure) => detail = failure.detail,
            Step::Changed(events) => {
                for (no, event) in &events {
                    self.publish(index, *no, event);
                }
                self.bound_histories(index);
            }
        }
        let Some(owned) = self.streams.at_mut(index) else { return };
        owned.fresh = true;
        let changed = owned.stream.status_change(self.now.at).is_some();
        let status = owned.stream.status(self.now.at);
        let stream = changed.then(|| owned.key.target.options.id.to_string());
        // The upstream's state is told to all; whether its value has changed only to those who see that.
        for at in 0..owned.audiences.len() {
            let Some(owned) = self.streams.at(index) else { return };
            let Some(no) = owned.audiences.get(at).map(|audience| audience.no) else { break };
            let fresh = owned.stream.is_current(no);
            self.tell_polled(index, no, fresh);
        }
        if let Some(stream) = stream {
            self.outputs.push_back(Output::Notice(Notice::Upstream { stream, status, detail }));
        }
        self.plan_poll(index);
        self.catch_up_sequences(index);
    }

    /// Lets go of owned streams that a reload removed or changed, and keeps those warm that are to be.
    pub(super) fn reload_streams(&mut self) {
        let all: Vec<u32> = self.streams.iter().map(|(index, _)| index).collect();
        self.keep_current(all);
        self.warm();
    }

    /// The same for these streams alone.
    pub(super) fn change_streams(&mut self, changed: &[StreamId]) {
        let places = changed.iter().filter_map(|id| self.streams_of.get(id)).flatten().copied().collect();
        self.keep_current(places);
        let options = Arc::clone(&self.options);
        for key in changed.iter().flat_map(|id| options.catalog.kept_warm_of(id)) {
            self.warm_up(key, false);
        }
    }

    fn keep_current(&mut self, places: Vec<u32>) {
        for index in places {
            let Some(owned) = self.streams.at_mut(index) else { continue };
            if self.options.catalog.is_current(&owned.key) {
                self.obey_stop(index);
                continue;
            }
            if std::mem::take(&mut owned.warm) {
                let id = owned.key.target.options.id.clone();
                self.warm_successor(&id);
            }
            self.linger(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::pointer::Pointer;
    use crate::limits::Limits;
    use crate::metrics::CoreMetrics;
    use crate::shard::{Catalog, Input, Options};
    use crate::stream;
    use crate::stream::poll::{FetchError, FetchResponse, UpstreamCode, Validators};
    use crate::stream::template::UrlTemplate;
    use crate::stream::view::{Places, Projection, View};
    use crate::time::{Now, WallTime};
    use crate::{auth, connection, ids};

    fn stream(id: &str, interval: Duration) -> Arc<stream::Options> {
        let url = UrlTemplate::parse::<&str>(&format!("http://upstream.example/{id}"), &[]).expect("a URL");
        let options = stream::Options::new(ids::StreamId::new(id).expect("an id"), url);
        Arc::new(stream::Options { interval, history: 16, history_bytes: 1 << 20, allow_anonymous: true, ..options })
    }

    fn view_of(pointer: &str) -> View {
        let places = Places::new(vec![Pointer::parse(pointer).expect("a pointer")]);
        View { roles: vec![pointer.to_owned()], projection: Projection::Pointers(places) }
    }

    fn at(ms: u64) -> Now {
        Now { at: Instant::from_micros(5_000_000 + ms * 1_000), wall: WallTime::from_secs(1_800_000_000) }
    }

    /// A shard of one core with these streams, at most one of which may exist at a time, and their keys.
    fn shard(interval: Duration) -> (Shard, [Arc<StreamKey>; 2]) {
        let catalog = Catalog::new(&[stream("a", interval), stream("b", interval)], None, 7);
        let anonymous = crate::auth::grant::Grant::anonymous(&mut Default::default());
        let keys = ["a", "b"].map(|id| catalog.resolve(&anonymous, id, &[]).expect("anyone may watch it"));
        let limits = Limits { streams: 1, ..Limits::default() };
        let options =
            Options { connection: connection::Options::default(), auth: auth::Options::default(), limits, catalog };
        let metrics = Arc::new(CoreMetrics::default());
        let shard = Shard::new(CoreId(0), 1, Arc::new(options), Arc::default(), metrics, [7; 32], at(0));
        (shard, keys)
    }

    fn fetches(shard: &mut Shard) -> Vec<(u32, PollNo)> {
        let mut found = Vec::new();
        while let Some(output) = shard.poll_output() {
            if let Output::Fetch { stream, poll, .. } = output {
                found.push((stream, poll));
            }
        }
        found
    }

    fn answer(body: &str) -> FetchResult {
        let (validators, received) = (Validators::default(), WallTime::from_secs(1_800_000_000));
        Ok(FetchResponse { status: 200, validators, retry_after: None, fresh_for: None, body: body.into(), received })
    }

    #[test]
    fn the_late_answer_of_an_evicted_stream_is_not_taken_for_the_next_ones_at_its_place() {
        let (mut shard, [a, b]) = shard(Duration::from_secs(1));
        let watch = |key| Input::Mail(Mail::Watch { key, from: CoreId(0), attach: true, payer: None, moved: false });
        shard.handle(at(0), watch(Arc::clone(&a)));
        shard.handle(at(0), Input::Timeout);
        let [(place, of_a)] = fetches(&mut shard)[..] else { panic!("one poll of a") };
        shard.handle(at(1), Input::Mail(Mail::Unwatch { key: a, from: CoreId(0) }));
        shard.handle(at(2), watch(Arc::clone(&b)));
        shard.handle(at(2), Input::Timeout);
        let [(same, of_b)] = fetches(&mut shard)[..] else { panic!("one poll of b") };
        assert_eq!(place, same, "b stands where a stood");
        shard.handle(at(3), Input::Fetched { stream: place, poll: of_a, result: answer(r#""secret of a""#) });
        let owned = shard.streams.at(place).expect("b");
        let value = |owned: &Owned| {
            let history = owned.stream.history(owned.audiences.first().expect("a sequence").no).expect("its history");
            history.value().map(|value| value.to_vec())
        };
        assert!(owned.key == b && value(owned).is_none(), "a's answer is not b's");
        shard.handle(at(4), Input::Fetched { stream: place, poll: of_b, result: answer(r#""b""#) });
        assert_eq!(value(shard.streams.at(place).expect("b")).as_deref(), Some(&br#""b""#[..]));
    }

    #[test]
    fn the_view_that_nobody_watches_makes_room_for_the_one_that_is_watched() {
        let mut options = (*stream("a", Duration::from_secs(1))).clone();
        options.allow_anonymous = false;
        options.views = ["/small", "/big"].map(view_of).to_vec();
        options.keep_warm = true;
        let catalog = Catalog::new(&[Arc::new(options.clone())], None, 7);
        let keys: Vec<Arc<StreamKey>> = catalog.kept_warm().cloned().collect();
        let [small, big] = <[Arc<StreamKey>; 2]>::try_from(keys).expect("a key of each of the two views");
        options.keep_warm = false;
        let catalog = Catalog::new(&[Arc::new(options)], None, 7);
        let limits = Limits { history_bytes_total: 20_000, ..Limits::default() };
        let options =
            Options { connection: connection::Options::default(), auth: auth::Options::default(), limits, catalog };
        let metrics = Arc::new(CoreMetrics::default());
        let mut shard = Shard::new(CoreId(0), 1, Arc::new(options), Arc::default(), metrics, [7; 32], at(0));
        for key in [&small, &big] {
            shard.handle(
                at(0),
                Input::Mail(Mail::Watch {
                    key: Arc::clone(key),
                    from: CoreId(0),
                    attach: true,
                    payer: None,
                    moved: false,
                }),
            );
        }
        shard.handle(at(0), Input::Mail(Mail::Unwatch { key: big, from: CoreId(0) }));
        let audiences = |shard: &Shard| {
            shard.streams.iter().flat_map(|(_, owned)| &owned.audiences).map(|a| Arc::clone(&a.key)).collect::<Vec<_>>()
        };
        for round in 0..5_u64 {
            assert_eq!(audiences(&shard).len(), 2, "there is room for both");
            let due = at(2_000 * round);
            shard.handle(due, Input::Timeout);
            let [(stream, poll)] = fetches(&mut shard)[..] else { panic!("one poll for both views") };
            let body = format!("{{\"small\":{round},\"big\":\"{}\"}}", "x".repeat(1_000 << round));
            shard.handle(due, Input::Fetched { stream, poll, result: answer(&body) });
            if audiences(&shard).len() < 2 {
                assert!(round > 0 && audiences(&shard) == [Arc::clone(&small)], "the watched one stays");
                let owned = shard.streams.at(stream).expect("the stream");
                let history = owned.stream.history(owned.audiences[0].no).expect("its history");
                assert_eq!(history.head(), Some(ids::Seq(round + 1)), "with all of its events");
                return;
            }
        }
        panic!("the bound was not kept");
    }

    /// A shard of core 0 of two, whose catalog is the same as that of core 1, with `limits`.
    fn shard_of(ledger: &Arc<crate::shard::Ledger>, limits: &Limits, ids: &[&str]) -> (Shard, Arc<Options>) {
        let streams: Vec<_> = ids.iter().map(|id| stream(id, Duration::from_secs(1))).collect();
        let catalog = Catalog::new(&streams, None, 7);
        let (connection, auth) = (connection::Options::default(), auth::Options::default());
        let options = Arc::new(Options { connection, auth, limits: limits.clone(), catalog });
        let (metrics, ledger) = (Arc::new(CoreMetrics::default()), Arc::clone(ledger));
        (Shard::new(CoreId(0), 2, Arc::clone(&options), ledger, metrics, [7; 32], at(0)), options)
    }

    #[test]
    fn a_core_that_has_not_heard_of_a_greater_limit_yet_refuses_nobody_who_has() {
        let ids: Vec<String> = (0..16).map(|n| format!("s{n}")).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let ledger = Arc::default();
        let limits = Limits { streams: 1, selects_per_stream: 0, ..Limits::default() };
        let (mut shard, options) = shard_of(&ledger, &limits, &ids);
        let anonymous = crate::auth::grant::Grant::anonymous(&mut Default::default());
        let mut keys = ids.iter().map(|id| options.catalog.resolve(&anonymous, id, &[]).expect("anyone may watch it"));
        let mut own = keys.by_ref().filter(|key| key.owner(2) == CoreId(0));
        let (first, second) = (own.next().expect("a stream of core 0"), own.next().expect("and another"));
        let mut ask = |key: &Arc<StreamKey>| {
            let watch = Mail::Watch { key: Arc::clone(key), from: CoreId(1), attach: true, payer: None, moved: false };
            shard.handle(at(0), Input::Mail(watch));
            std::iter::from_fn(|| shard.poll_output())
                .any(|output| matches!(output, Output::Mail { to: CoreId(1), mail: Mail::Refused { .. } }))
        };
        assert!(!ask(&first) && ask(&second), "there may be one");
        // Core 1 has been told, and asks by it; this core has the mail of that before it.
        ledger.bound(&Limits { streams: 2, selects_per_stream: 1, ..limits });
        assert!(!ask(&second));
        let select = crate::stream::select::Select::parse("$.a").expect("a path");
        let selecting = second.selecting(select);
        assert!(!ask(&selecting));
    }

    fn watch(key: &Arc<StreamKey>) -> Input<'static> {
        Input::Mail(Mail::Watch { key: Arc::clone(key), from: CoreId(0), attach: true, payer: None, moved: false })
    }

    fn unwatch(key: &Arc<StreamKey>) -> Input<'static> {
        Input::Mail(Mail::Unwatch { key: Arc::clone(key), from: CoreId(0) })
    }

    fn status_of(shard: &Shard, key: &Arc<StreamKey>, ms: u64) -> (StreamState, Option<Duration>) {
        let index = shard.owned(key).expect("it is polled");
        let status = shard.streams.at(index).expect("it is there").stream.status(at(ms).at);
        (status.state, status.retry_in)
    }

    #[test]
    fn an_evicted_stream_waits_as_long_as_it_would_have() {
        let (mut shard, [a, b]) = shard(Duration::from_secs(10));
        shard.handle(at(0), watch(&a));
        shard.handle(at(0), Input::Timeout);
        let [(stream, poll)] = fetches(&mut shard)[..] else { panic!("one poll of a") };
        let retry_after = Some(Duration::from_secs(120));
        let away = answer("").map(|response| FetchResponse { status: 502, retry_after, ..response });
        shard.handle(at(10), Input::Fetched { stream, poll, result: away });
        shard.handle(at(20), unwatch(&a));
        shard.handle(at(20), watch(&b));
        shard.handle(at(20), Input::Timeout);
        let [(stream, poll)] = fetches(&mut shard)[..] else { panic!("one poll of b, in the place of a") };
        shard.handle(at(30), Input::Fetched { stream, poll, result: answer("1") });
        shard.handle(at(40), unwatch(&b));
        shard.handle(at(40), watch(&a));
        shard.handle(at(40), Input::Timeout);
        assert_eq!(status_of(&shard, &a, 40), (StreamState::Failing, Some(Duration::from_millis(120_010 - 40))));
        for ms in (40..120_010).step_by(970) {
            shard.handle(at(ms), Input::Mail(Mail::Refresh { key: Arc::clone(&a) }));
            shard.handle(at(ms), Input::Timeout);
            assert!(fetches(&mut shard).is_empty(), "after {ms} ms");
        }
        shard.handle(at(120_010), Input::Timeout);
        assert_eq!(fetches(&mut shard).len(), 1);
    }

    #[test]
    fn what_an_evicted_streams_poll_brings_at_last_holds_the_next_one() {
        for is_put_off in [true, false] {
            let (mut shard, [a, b]) = shard(Duration::from_millis(100));
            shard.handle(at(0), watch(&a));
            shard.handle(at(0), Input::Timeout);
            let under_way = std::iter::from_fn(|| shard.poll_output()).find_map(|output| match output {
                Output::Fetch { under_way, .. } => Some(under_way),
                _ => None,
            });
            shard.handle(at(1), unwatch(&a));
            shard.handle(at(1), watch(&b));
            shard.handle(at(2), unwatch(&b));
            shard.handle(at(2), watch(&a));
            for ms in (3..5_000).step_by(10) {
                shard.handle(at(ms), Input::Timeout);
                assert!(fetches(&mut shard).is_empty(), "its poll is under way after {ms} ms");
            }
            let mut result = answer("1");
            if let (Ok(response), true) = (&mut result, is_put_off) {
                (response.status, response.retry_after) = (503, Some(Duration::from_secs(60)));
            }
            under_way.expect("a poll of a").end(at(5_000).at, &result);
            // It looks often enough.
            let mut polled = 0;
            for ms in (5_000..7_000).step_by(10) {
                shard.handle(at(ms), Input::Timeout);
                polled += fetches(&mut shard).len();
            }
            assert_eq!(polled, usize::from(!is_put_off));
            if is_put_off {
                let told = (StreamState::Failing, Some(Duration::from_secs(65 - 7)));
                assert_eq!(status_of(&shard, &a, 7_000), told);
                shard.handle(at(65_000), Input::Timeout);
                assert_eq!(fetches(&mut shard).len(), 1);
            }
        }
    }

    #[test]
    fn whoever_waits_long_for_the_first_answer_of_all_says_how_the_others_fare() {
        // Whether the first one fails at once, or none is ever answered.
        for (fails, code) in [(true, UpstreamCode::Unreachable), (false, UpstreamCode::Timeout)] {
            let streams = ["a", "b", "c"].map(|id| {
                let options = stream(id, Duration::from_secs(10));
                Arc::new(stream::Options { timeout: Duration::from_secs(2), ..(*options).clone() })
            });
            let catalog = Catalog::new(&streams, None, 7);
            let anonymous = crate::auth::grant::Grant::anonymous(&mut Default::default());
            let keys = ["a", "b", "c"].map(|id| catalog.resolve(&anonymous, id, &[]).expect("anyone may watch it"));
            let (connection, auth) = (connection::Options::default(), auth::Options::default());
            let options = Arc::new(Options { connection, auth, limits: Limits::default(), catalog });
            let mut shard = Shard::new(CoreId(0), 1, options, Arc::default(), Arc::default(), [7; 32], at(0));
            for key in &keys {
                let watch =
                    Mail::Watch { key: Arc::clone(key), from: CoreId(0), attach: true, payer: None, moved: false };
                shard.handle(at(0), Input::Mail(watch));
            }
            let (mut asked, mut under_way) = (Vec::new(), Vec::new());
            for ms in (0..3_000).step_by(10) {
                shard.handle(at(ms), Input::Timeout);
                while let Some(output) = shard.poll_output() {
                    let Output::Fetch { stream, leave: PollLeave::Given(mut permit), .. } = output else { continue };
                    permit.begin();
                    asked.push(stream);
                    if fails && asked.len() == 1 {
                        let detail = String::new();
                        permit.failed(at(ms).at, &FetchError { code: UpstreamCode::Unreachable, detail });
                    } else {
                        under_way.push(permit);
                    }
                }
            }
            assert_eq!(asked.len(), 1 + usize::from(fails), "one is under way");
            let waiting = shard.streams.iter().filter(|(index, _)| !asked.contains(index));
            let told: Vec<_> = waiting.map(|(_, owned)| owned.stream.status(at(3_000).at)).collect();
            assert_eq!(told.len(), 3 - asked.len());
            for status in told {
                assert_eq!((status.state, status.code), (StreamState::Failing, Some(code)));
            }
        }
    }

    #[test]
    fn those_go_first_whose_upstreams_want_nothing() {
        let streams = ["a", "b", "c"].map(|id| stream(id, Duration::from_secs(10)));
        let catalog = Catalog::new(&streams, None, 7);
        let anonymous = crate::auth::grant::Grant::anonymous(&mut Default::default());
        let [a, b, c] = ["a", "b", "c"].map(|id| catalog.resolve(&anonymous, id, &[]).expect("anyone may watch it"));
        let limits = Limits { streams: 2, ..Limits::default() };
        let (connection, auth) = (connection::Options::default(), auth::Options::default());
        let options = Arc::new(Options { connection, auth, limits, catalog });
        let mut shard = Shard::new(CoreId(0), 1, options, Arc::default(), Arc::default(), [7; 32], at(0));
        for (key, result) in
            [(&a, Err(FetchError { code: UpstreamCode::Timeout, detail: String::new() })), (&b, answer("1"))]
        {
            shard.handle(at(0), watch(key));
            shard.handle(at(0), Input::Timeout);
            let [(stream, poll)] = fetches(&mut shard)[..] else { panic!("a poll of each") };
            shard.handle(at(0), Input::Fetched { stream, poll, result });
        }
        shard.handle(at(1), unwatch(&a));
        shard.handle(at(2), unwatch(&b));
        shard.handle(at(3), watch(&c));
        assert!(shard.owned(&a).is_some() && shard.owned(&b).is_none(), "a is older, and waits after a failure");
    }

    /// Two streams of one URL, polled so often, and what they are in `previous`' place.
    fn of_one_url(interval: Duration, previous: Option<&Options>) -> (Arc<Options>, [Arc<StreamKey>; 2]) {
        let url = UrlTemplate::parse::<&str>("http://upstream.example/one", &[]).expect("a URL");
        let streams = ["a", "b"].map(|id| {
            let options = stream(id, interval);
            Arc::new(stream::Options { url: url.clone(), ..(*options).clone() })
        });
        let catalog = Catalog::new(&streams, previous.map(|previous| &previous.catalog), 7);
        let (connection, auth) = (connection::Options::default(), auth::Options::default());
        let anonymous = crate::auth::grant::Grant::anonymous(&mut Default::default());
        let keys = ["a", "b"].map(|id| catalog.resolve(&anonymous, id, &[]).expect("anyone may watch it"));
        (Arc::new(Options { connection, auth, limits: Limits::default(), catalog }), keys)
    }

    #[test]
    fn a_stream_that_is_changed_leaves_its_url_alone_for_as_long_as_the_upstream_has_asked_before() {
        /// When both are polled.
        const BEGUN_MS: u64 = 500;
        let watch = |key: &Arc<StreamKey>| Mail::Watch {
            key: Arc::clone(key),
            from: CoreId(0),
            attach: true,
            payer: None,
            moved: false,
        };
        let unavailable = || {
            let retry_after = Some(Duration::from_secs(60));
            answer("").map(|response| FetchResponse { status: 503, retry_after, ..response })
        };
        // Whether the other stream of the URL is given a value after all.
        for is_back in [false, true] {
            let (options, [a, b]) = of_one_url(Duration::from_secs(1), None);
            let (metrics, ledger) = (Arc::new(CoreMetrics::default()), Arc::default());
            let mut shard = Shard::new(CoreId(0), 1, Arc::clone(&options), ledger, metrics, [7; 32], at(0));
            shard.handle(at(0), Input::Mail(watch(&a)));
            shard.handle(at(0), Input::Mail(watch(&b)));
            // Before an origin's first answer one asks for all, and the other one then.
            let polls: Vec<_> = (0..BEGUN_MS)
                .flat_map(|ms| {
                    shard.handle(at(ms), Input::Timeout);
                    fetches(&mut shard)
                })
                .collect();
            let of = |key| polls.iter().copied().find(|(stream, _)| shard.owned(key) == Some(*stream));
            let [of_a, of_b] = [of(&a), of(&b)].map(|poll| poll.expect("a poll of each"));
            shard.handle(at(BEGUN_MS + 10), Input::Fetched { stream: of_a.0, poll: of_a.1, result: unavailable() });
            if is_back {
                shard.handle(at(BEGUN_MS + 20), Input::Fetched { stream: of_b.0, poll: of_b.1, result: answer("1") });
            }
            let (options, [changed, _]) = of_one_url(Duration::from_secs(2), Some(&options));
            assert!(changed != a, "it is another stream");
            shard.handle(at(BEGUN_MS + 30), Input::Reload(options));
            shard.handle(at(BEGUN_MS + 30), Input::Mail(watch(&changed)));
            shard.handle(at(BEGUN_MS + 30), Input::Timeout);
            assert!(fetches(&mut shard).is_empty(), "it waits as it would have after a failure");
            let index = shard.owned(&changed).expect("it is polled");
            // The stream that it was before is watched still, and may be the first of the two.
            let is_polled = |shard: &mut Shard, from_ms: u64| {
                let mut polled = (from_ms..from_ms + 1_000).flat_map(|ms| {
                    shard.handle(at(BEGUN_MS + ms), Input::Timeout);
                    fetches(shard)
                });
                polled.any(|(stream, _)| stream == index)
            };
            if is_back {
                assert!(is_polled(&mut shard, 2_010), "and no longer than that");
                continue;
            }
            let status =
                |shard: &Shard, ms: u64| shard.streams.at(index).expect("it is there").stream.status(at(ms).at);
            let told = status(&shard, BEGUN_MS + 30);
            assert_eq!((told.state, told.code), (StreamState::Failing, Some(UpstreamCode::RateLimited)));
            assert_eq!(told.retry_in, Some(Duration::from_millis(60_010 - 30)));
            // Whoever asks for it does not make it sooner.
            for ms in (1_000..60_010).step_by(500) {
                shard.handle(at(BEGUN_MS + ms), Input::Mail(Mail::Refresh { key: Arc::clone(&changed) }));
                shard.handle(at(BEGUN_MS + ms), Input::Timeout);
                assert!(fetches(&mut shard).is_empty(), "after {ms} ms");
            }
            assert!(is_polled(&mut shard, 60_010));
        }
    }

    #[test]
    fn a_poll_whose_stream_had_no_token_takes_no_leave_before_it_has_one() {
        let (mut shard, [a, _]) = shard(Duration::from_secs(1));
        shard.handle(
            at(0),
            Input::Mail(Mail::Watch { key: a, from: CoreId(0), attach: true, payer: None, moved: false }),
        );
        let without_token = || Err(FetchError { code: UpstreamCode::Auth, detail: "there is no token".to_owned() });
        let unauthorized = || answer("1").map(|response| FetchResponse { status: 401, ..response });
        let mut now_ms = 0;
        for (result, had_leave) in [
            (without_token(), true),
            (without_token(), false),
            (unauthorized(), false),
            (answer("1"), true),
            (without_token(), true),
            (answer("2"), false),
        ] {
            let (stream, poll, leave) = loop {
                shard.handle(at(now_ms), Input::Timeout);
                let fetch = std::iter::from_fn(|| shard.poll_output()).find_map(|output| match output {
                    Output::Fetch { stream, poll, leave, .. } => Some((stream, poll, leave)),
                    _ => None,
                });
                if let Some(fetch) = fetch {
                    break fetch;
                }
                now_ms += 100;
                assert!(now_ms < 600_000, "it polls");
            };
            assert_eq!(matches!(leave, PollLeave::Given(_)), had_leave, "before {result:?}");
            shard.handle(at(now_ms), Input::Fetched { stream, poll, result });
        }
    }

    #[test]
    fn watchers_that_come_and_go_do_not_pile_up_timers() {
        let (mut shard, [a, _]) = shard(Duration::from_secs(3_600));
        for round in 0..10_000 {
            let watch = Mail::Watch { key: Arc::clone(&a), from: CoreId(0), attach: true, payer: None, moved: false };
            shard.handle(at(round), Input::Mail(watch));
            shard.handle(at(round), Input::Timeout);
            if let [(stream, poll)] = fetches(&mut shard)[..] {
                shard.handle(at(round), Input::Fetched { stream, poll, result: answer("1") });
            }
            shard.handle(at(round), Input::Mail(Mail::Unwatch { key: Arc::clone(&a), from: CoreId(0) }));
        }
        assert!(shard.timers.len() <= 3, "{} timers", shard.timers.len());
        shard.handle(at(10_000 + 10_000), Input::Timeout);
        let owned = shard.streams.iter().next().expect("the value is kept").1;
        assert!(!owned.stream.is_running(), "polling ends when its lingering is over");
    }
}
