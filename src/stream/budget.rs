//! How often upstreams may be asked: their own budgets, the operator's rates, and a rest for those that are down.
//!
//! A **lane** is an origin and a credential there: what upstreams count requests by. All streams of a lane, on all cores,
//! share what its answers say of budgets; all lanes of an origin share its rate and its breaker. Nobody asks an upstream
//! without a [`Permit`] of its lane, and each permit is for one request.
//! Source: draft-ietf-httpapi-ratelimit-headers-10, GCRA (ITU-T I.371) for rates, «Circuit Breaker»
//! (Nygard, «Release It!», 2007). Memory: one entry an origin and lane, at most `LANES_MAX` of each, kept while something is
//! held against it. The locks are taken once a request, never on a delivery.
//! Errors: [`Wait`]. Not here: what a stream makes of a wait (`poll`), reading of headers (`codec::rate_limit`).

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use url::Url;

use crate::codec::rate_limit::{Quota, Resource};
use crate::ids::Holder;
use crate::limits::{
    BREAKER_FAILURES, BREAKER_REST_MAX, BREAKER_REST_MIN, CALLERS_BREAKERS_MAX, LANES_MAX, QUEUE_MAX, QUOTAS_MAX,
    RESET_UNKNOWN, RETRY_AFTER_MAX,
};
use crate::secret::Secret;
use crate::time::Instant;

use super::action::Call;
pub use super::bucket::Rate;
use super::bucket::{Bucket, Place, Taken, VOICES, VoiceNo};
use super::credential::Credential;
use super::oauth;
use super::poll::{FetchError, FetchResponse, Target, UpstreamCode};
use super::rest::Rests;

/// One `[[upstream]]` of the configuration.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Upstream {
    /// Scheme, host and port, as `url` spells them.
    pub origin: String,
    /// How many requests it is sent at most.
    pub rate: Option<Rate>,
    /// Failures in a row after which it is left alone; 0: it never is.
    pub breaker: u32,
}

/// Headers by which nobody is told from another: all others of a request may be its credential.
const NO_CREDENTIALS: [&str; 8] =
    ["accept", "accept-language", "cache-control", "content-type", "if-none-match", "pragma", "prefer", "user-agent"];
/// What stands for no credential at all, where one is known to be missing.
const NO_CREDENTIAL: u64 = 0;
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
/// For the first answer of all, which may tell of a budget, the others wait at most so long,
const FIRST_PATIENCE: Duration = Duration::from_secs(5);
/// and look whether it is there, all of them together no more often than once in this time,
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
/// Leave that is not used within this time is asked for again.
const PERMIT_AGE_MAX: Duration = Duration::from_millis(50);
/// Permanent redirects of one lane that are told.
const MOVED_MAX: usize = 64;

/// What the cores of a process know of upstreams together.
#[derive(Debug, Default)]
pub struct Budgets {
    hasher: RandomState,
    table: Mutex<Table>,
    /// Of callers whose last request at that origin has failed: at most `CALLERS_BREAKERS_MAX`.
    callers: Mutex<HashMap<(OriginHash, Option<Holder>), Breaker>>,
}

/// What stands for an origin.
type OriginHash = u64;

/// Whether it is a caller's, and the hash of the credential.
type Whose = (bool, u64);

#[derive(Debug, Default)]
struct Table {
    rules: HashMap<String, Upstream>,
    origins: HashMap<String, Arc<Origin>>,
    lanes: HashMap<(String, Whose), Arc<Lane>>,
}

impl Budgets {
    /// The lane of a request: its origin, and whatever in it may be a credential. What callers have described has lanes of its
    /// own: an upstream that they make say «no more» says so to them.
    pub fn lane(self: &Arc<Budgets>, target: &Target) -> Arc<Lane> {
        let voice = Voice::of(target);
        self.lane_with(&target.url, &target.options.headers, &target.options.credential, voice)
    }

    /// The lane of an action's request: that of the polls with its origin and credential.
    pub fn lane_of_call(self: &Arc<Budgets>, call: &Call) -> Arc<Lane> {
        self.lane_with(&call.url, &call.options.headers, &call.options.credential, Voice::Operator)
    }

    /// The lane of requests for a token: whoever asks for it.
    pub fn lane_of_tokens(self: &Arc<Budgets>, options: &oauth::Options) -> Arc<Lane> {
        let mut hasher = self.hasher.build_hasher();
        "token".hash(&mut hasher);
        Budgets::hash_client(options, &mut hasher);
        self.lane_of(&options.token_url, (Voice::Operator.is_caller(), hasher.finish()))
    }

    /// Whose tokens are asked for, and with what rights: all that the endpoint is sent for one.
    fn hash_client(options: &oauth::Options, hasher: &mut impl Hasher) {
        let request = options.request(options.refresh_token().as_ref());
        options.token_url.as_str().hash(hasher);
        request.authorization.as_ref().map(Secret::expose_secret).hash(hasher);
        request.body.expose_secret().hash(hasher);
        options.identity.as_ref().map(|identity| identity.pem().cert.clone()).hash(hasher);
    }

    fn lane_with(
        self: &Arc<Budgets>,
        url: &Url,
        headers: &[(String, Secret)],
        credential: &Credential,
        voice: Voice,
    ) -> Arc<Lane> {
        let mut hasher = self.hasher.build_hasher();
        (url.username(), url.password()).hash(&mut hasher);
        let presented = credential.presented(None);
        let written = headers.iter().chain(&presented.headers);
        let mut headers: Vec<(String, &[u8])> = written.map(named).collect();
        headers.retain(|(name, _)| !NO_CREDENTIALS.contains(&name.as_str()));
        headers.sort_unstable();
        headers.hash(&mut hasher);
        presented.query.as_ref().map(Secret::expose_secret).hash(&mut hasher);
        presented.identity.as_ref().map(|identity| &identity.cert).hash(&mut hasher);
        if let Some(options) = credential.oauth() {
            Budgets::hash_client(options, &mut hasher);
        }
        self.lane_of(url, (voice.is_caller(), hasher.finish()))
    }

    fn lane_of(self: &Arc<Budgets>, url: &Url, whose: Whose) -> Arc<Lane> {
        let origin = url.origin().ascii_serialization();
        let mut table = lock(&self.table);
        if let Some(lane) = table.lanes.get(&(origin.clone(), whose)) {
            return Arc::clone(lane);
        }
        table.make_room();
        let rule = table.rules.get(&origin).cloned();
        let hash = self.hasher.hash_one(&origin);
        let shared = table.origins.entry(origin.clone()).or_insert_with(|| Arc::new(Origin::new(hash, rule)));
        let lane = Arc::new(Lane {
            budgets: Arc::downgrade(self),
            origin: Arc::clone(shared),
            whose,
            spending: Mutex::default(),
            rests: Rests::default(),
        });
        table.lanes.insert((origin, whose), Arc::clone(&lane));
        lane
    }

    /// What the operator has said of upstreams, in place of what was said before.
    pub fn configure(&self, now: Instant, upstreams: &[Upstream]) {
        let mut table = lock(&self.table);
        table.rules = upstreams.iter().map(|upstream| (upstream.origin.clone(), upstream.clone())).collect();
        for (name, origin) in &table.origins {
            lock(&origin.state).configure(now, table.rules.get(name));
            if table.rules.get(name).is_some_and(|rule| rule.breaker == 0) {
                lock(&self.callers).retain(|(hash, _), _| *hash != origin.hash);
            }
        }
    }
}

fn named((name, value): &(String, Secret)) -> (String, &[u8]) {
    (name.to_ascii_lowercase(), value.expose_secret())
}

impl Table {
    /// Lets go of what nobody uses, where there is too much of it: what holds nothing back first.
    fn make_room(&mut self) {
        if self.lanes.len() >= LANES_MAX {
            self.lanes.retain(|_, lane| {
                Arc::strong_count(lane) > 1 || lock(&lane.spending).is_limited() || lane.rests.is_any()
            });
        }
        if self.lanes.len() >= LANES_MAX {
            self.lanes.retain(|_, lane| Arc::strong_count(lane) > 1);
        }
        if self.origins.len() >= LANES_MAX {
            self.origins.retain(|_, origin| Arc::strong_count(origin) > 1);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What stands there is numbers, each of which is in order by itself.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An origin and a credential there.
#[derive(Debug)]
pub struct Lane {
    budgets: Weak<Budgets>,
    origin: Arc<Origin>,
    whose: Whose,
    spending: Mutex<Spending>,
    /// What of it is to be left alone.
    pub rests: Rests,
}

/// An answer to who wants to send a request.
#[derive(Debug)]
pub enum Ask {
    /// Send one.
    Go(Permit),
    /// Ask again later.
    Wait(Wait),
}

/// Why no request may be sent now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wait {
    /// When there is leave, as far as is known,
    pub until: Instant,
    /// or, so that not all come at once, up to so much later.
    pub spread: Duration,
    /// It may be sooner: ask again after this time.
    pub look: Duration,
    /// Why.
    pub why: Why,
}

/// What a request waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Why {
    /// Its turn.
    Turn,
    /// The upstream's budget is used up.
    Spent,
    /// The origin is left alone, for it has failed: this is how it last did.
    Down(UpstreamCode, Option<u16>),
}

/// What the outcome of a poll says of its origin to others who ask there: whoever chooses what is asked for can have it fail.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Voice {
    /// All that stands in the file, or was made by an administrator, down to the path and query.
    #[default]
    Operator,
    /// A caller has filled something in (`params`): no more than whether the origin can be reached.
    Chosen,
    /// That caller has described it: nothing, but to whatever else the same caller has described there.
    Caller(Option<Holder>),
}

impl Voice {
    fn of(target: &Target) -> Voice {
        match &target.guard {
            Some(policy) if !policy.own => Voice::Caller(target.options.described_by),
            _ if !target.options.params.is_empty() => Voice::Chosen,
            _ => Voice::Operator,
        }
    }

    fn is_caller(self) -> bool {
        matches!(self, Voice::Caller(_))
    }

    /// Which of those it is that take turns in the operator's rate.
    fn no(self) -> VoiceNo {
        const { assert!(VOICES == 3) };
        match self {
            Voice::Operator => 0,
            Voice::Chosen => 1,
            Voice::Caller(_) => 2,
        }
    }

    /// What the breaker makes of an outcome, where the origin is down, if it is, for `down`.
    fn says(self, failure: Option<(UpstreamCode, Option<u16>)>, down: Option<UpstreamCode>) -> Verdict {
        use UpstreamCode::{Dns, Status, Tls, Unreachable};
        let is_of_way = |code| matches!(code, Unreachable | Dns | Tls);
        match (self, failure) {
            (_, None) => Verdict::Works,
            // It could not be reached, and now it answers.
            (Voice::Chosen, Some((Status, _))) if down.is_some_and(is_of_way) => Verdict::Works,
            (Voice::Chosen, Some((code, _))) if !is_of_way(code) => Verdict::Nothing,
            (_, Some((code, status))) => Verdict::Fails(code, status),
        }
    }
}

/// What an outcome says of an origin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Works,
    Nothing,
    Fails(UpstreamCode, Option<u16>),
}

/// What one asker has of a lane from one time to the next: its places in the queues, and which budgets are its. Dropped, it
/// gives the places back.
#[derive(Debug, Default)]
pub struct Slot {
    /// Where it has a place.
    lane: Option<Arc<Lane>>,
    /// For the operator's rate.
    place: Option<Place>,
    /// For the upstream's budget: 0 is none.
    ticket: u64,
    named: Named,
    voice: Voice,
    works: bool,
}

/// The budgets that the upstream has named in its last answer to an asker, if it did: the others are no matter of its.
type Named = Arc<Mutex<Vec<Resource>>>;

impl Slot {
    /// For the polls of `target`.
    pub fn of(target: &Target) -> Slot {
        let mut slot = Slot::default();
        slot.voice = Voice::of(target);
        slot
    }

    /// Whether its last poll was answered well. Who is, where the caller has described it, is not left alone for what else the
    /// same caller has described there: others may watch it too.
    pub fn set_works(&mut self, works: bool) {
        self.works = works;
    }

    /// Waits no more.
    pub fn leave(&mut self) {
        let Some(lane) = self.lane.take() else { return };
        lock(&lane.origin.state).bucket.leave(&mut self.place);
        lock(&lane.spending).leave(&mut self.ticket);
    }

    /// It asks for something else from now on.
    pub fn reset(&mut self) {
        self.leave();
        self.named = Named::default();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Lane {
    /// Asks for leave to send one request. `patience` is the longest that the asker wants to leave an origin alone that is
    /// down.
    pub fn ask(self: &Arc<Lane>, now: Instant, slot: &mut Slot, patience: Duration) -> Ask {
        if slot.lane.as_ref().is_some_and(|lane| !Arc::ptr_eq(lane, self)) {
            slot.reset();
        }
        let mut origin = lock(&self.origin.state);
        let mut spending = lock(&self.spending);
        let wait = origin.breaker.wait(now, patience, slot.voice);
        let of_caller = if slot.works { Duration::ZERO } else { patience };
        let wait = wait.or_else(|| self.of_caller(slot.voice, |own| own.wait(now, of_caller, slot.voice))?);
        let wait = wait.or_else(|| spending.wait(now, &mut slot.ticket, &lock(&slot.named)));
        if wait.is_some() {
            // Those who wait for the rate go one after the other: whoever would not go if its turn came holds none of them up.
            origin.bucket.leave(&mut slot.place);
        }
        let wait = wait.or_else(|| {
            let turn = origin.bucket.wait(now, slot.voice.no(), &mut slot.place)?;
            Some(Wait { until: turn.until, spread: Duration::ZERO, look: turn.look, why: Why::Turn })
        });
        if let Some(wait) = wait {
            // Its place in the budget's queue is kept, whatever is waited for.
            spending.stay(slot.ticket, now, &wait);
            slot.lane = (slot.place.is_some() || slot.ticket != 0).then(|| Arc::clone(self));
            return Ask::Wait(wait);
        }
        spending.leave(&mut slot.ticket);
        slot.lane = None;
        let is_probe = match slot.voice.is_caller() {
            true => self.of_caller(slot.voice, |own| own.take(slot.voice)).unwrap_or(false),
            false => origin.breaker.take(slot.voice),
        };
        let taken = origin.bucket.take(now, Some(slot.voice.no()));
        let spent = spending.take(now, &lock(&slot.named));
        let named = Some(Arc::clone(&slot.named));
        let voice = Some(slot.voice);
        Ask::Go(Permit { lane: Arc::clone(self), spent, taken, named, is_probe, voice, state: State::Given })
    }

    /// Asks for leave to send a request that is no poll: an action's, which somebody waits for, or one for a token, without
    /// which nobody is let in. It counts in the budget and in the rate like any other and goes before the polls that wait for
    /// these: at [`Permit::starts`], which is no later than `patience` allows.
    ///
    /// The breaker is the polls' alone. Such a request is sent, once, though the origin may be down, and that it fails is
    /// nothing to the polls: what one caller asks for may be wrong for that caller only.
    pub fn ask_for_call(self: &Arc<Lane>, now: Instant, patience: Duration) -> Ask {
        let mut origin = lock(&self.origin.state);
        let mut spending = lock(&self.spending);
        if let Some(wait) = spending.wait_for_call(now) {
            return Ask::Wait(wait);
        }
        let starts = origin.bucket.free_at(now);
        if starts > now + patience {
            return Ask::Wait(Wait { until: starts, spread: Duration::ZERO, look: Duration::MAX, why: Why::Turn });
        }
        let (taken, spent) = (origin.bucket.take(now, None), spending.take(starts, &[]));
        let (lane, named) = (Arc::clone(self), None);
        Ask::Go(Permit { lane, spent, taken, named, is_probe: false, voice: None, state: State::Given })
    }

    /// Asks the breaker of the caller that has described it, where something of that caller's has failed at this origin.
    fn of_caller<T>(&self, voice: Voice, then: impl FnOnce(&mut Breaker) -> T) -> Option<T> {
        let Voice::Caller(who) = voice else { return None };
        let budgets = self.budgets.upgrade()?;
        let mut callers = lock(&budgets.callers);
        callers.get_mut(&(self.origin.hash, who)).map(then)
    }

    /// Tells the breaker that it concerns of a poll's outcome.
    fn tell(&self, now: Instant, voice: Voice, is_probe: bool, failure: Option<(UpstreamCode, Option<u16>)>) {
        let mut origin = lock(&self.origin.state);
        let Voice::Caller(who) = voice else { return origin.breaker.outcome(now, voice, is_probe, failure) };
        let Some(budgets) = self.budgets.upgrade() else { return };
        let mut callers = lock(&budgets.callers);
        let place = (self.origin.hash, who);
        let failures_max = origin.breaker.failures_max;
        if failure.is_none() || failures_max == 0 {
            callers.remove(&place);
            return;
        }
        if callers.len() >= CALLERS_BREAKERS_MAX && !callers.contains_key(&place) {
            callers.retain(|_, breaker| breaker.is_down_lately(now));
        }
        if callers.len() < CALLERS_BREAKERS_MAX || callers.contains_key(&place) {
            let breaker = callers.entry(place).or_insert_with(Breaker::new);
            breaker.failures_max = failures_max;
            breaker.outcome(now, voice, is_probe, failure);
        }
    }

    /// The lane of a request to `url` that carries no credential.
    pub fn elsewhere(self: &Arc<Lane>, url: &Url) -> Arc<Lane> {
        // Without a table there is nobody left to share anything with.
        self.budgets
            .upgrade()
            .map_or_else(|| Arc::clone(self), |budgets| budgets.lane_of(url, (self.whose.0, NO_CREDENTIAL)))
    }

    /// Until when the upstream wants `url` left alone, by what it has said of that or of whoever asks.
    pub fn left_alone_until(&self, url: &Url, now: Instant) -> Option<Instant> {
        let held = lock(&self.spending).held(now).map(|(until, _)| until);
        held.max(self.rests.until(url, now))
    }

    /// Whether that permanent redirect is told of for the first time. `hash` is of where from and where to.
    pub fn is_news(&self, hash: u64) -> bool {
        let mut spending = lock(&self.spending);
        let news = spending.moved.len() < MOVED_MAX && !spending.moved.contains(&hash);
        if news {
            spending.moved.push(hash);
        }
        news
    }
}

/// Leave to send one request, which begins with [`Permit::begin`]. What came of it is to be told; where it is not, the request
/// counts as sent and lost. Leave that was not used is given back.
#[derive(Debug)]
pub struct Permit {
    lane: Arc<Lane>,
    spent: Spent,
    taken: Taken,
    named: Option<Named>,
    is_probe: bool,
    /// `None`: no poll's.
    voice: Option<Voice>,
    state: State,
}

/// The leave of a poll's first request.
#[derive(Debug)]
pub enum PollLeave {
    /// There it is.
    Given(Permit),
    /// It is asked of this lane once the request could be sent: what it lacks, a token say, may not come at all.
    Later(Arc<Lane>),
}

impl PollLeave {
    /// Of whom it is had.
    pub fn lane(&self) -> &Arc<Lane> {
        match self {
            PollLeave::Given(permit) => permit.lane(),
            PollLeave::Later(lane) => lane,
        }
    }

    /// The poll was one request, which has been answered with that: for who carries polls out without connections.
    pub fn answered(self, now: Instant, response: &FetchResponse) {
        if let PollLeave::Given(mut permit) = self {
            permit.begin();
            permit.answered(now, response, &[]);
        }
    }
}

/// How far the request of a permit has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Given,
    Begun,
    Told,
}

impl Permit {
    /// Whose it is.
    pub fn lane(&self) -> &Arc<Lane> {
        &self.lane
    }

    /// When the request may be sent: the moment it was asked for, but for [`Lane::ask_for_call`].
    pub fn starts(&self) -> Instant {
        self.spent.at
    }

    /// Whether it has been held for so long, while a token was got say, that others may have been sent meanwhile: used now, both
    /// would come together. It is worth asking again.
    pub fn is_late(&self, now: Instant) -> bool {
        now > self.spent.at + PERMIT_AGE_MAX
    }

    /// From now on something of the request may reach the upstream.
    pub fn begin(&mut self) {
        self.state = State::Begun;
    }

    /// Nothing of the request has reached the upstream, nor will it: it does not count.
    pub fn unsent(mut self) {
        self.state = State::Given;
    }

    /// For leave of a further request of the same asker.
    pub fn slot(&self) -> Slot {
        let (named, voice) = (self.named.clone().unwrap_or_default(), self.voice.unwrap_or_default());
        let mut slot = Slot::default();
        (slot.named, slot.voice) = (named, voice);
        slot
    }

    /// The upstream has answered, with that and `quotas`.
    pub fn answered(mut self, now: Instant, response: &FetchResponse, quotas: &[Quota]) {
        self.state = State::Told;
        let status = response.status;
        if let Some(voice) = self.voice {
            let failure = (status >= 500).then_some((UpstreamCode::Status, Some(status)));
            self.lane.tell(now, voice, self.is_probe, failure);
        }
        let mut spending = lock(&self.lane.spending);
        // RFC 6585 section 4: too many requests are all of whoever is meant, and not of one resource. A 503 is.
        if let (429, Some(wait)) = (status, response.retry_after) {
            spending.held = spending.held.max(now + wait.min(RETRY_AFTER_MAX));
        }
        spending.answered(now, self.spent, quotas);
        let named: Vec<Resource> = quotas.iter().take(QUOTAS_MAX).filter_map(|quota| quota.resource).collect();
        if let (Some(known), false) = (&self.named, named.is_empty()) {
            *lock(known) = named;
        }
    }

    /// There was no answer.
    pub fn failed(mut self, now: Instant, error: &FetchError) {
        use UpstreamCode::{Dns, Protocol, Timeout, Tls, Unreachable};
        self.state = State::Told;
        if let Some(voice) = self.voice {
            let down = matches!(error.code, Timeout | Unreachable | Dns | Tls | Protocol).then_some((error.code, None));
            self.lane.tell(now, voice, self.is_probe, down);
        }
        lock(&self.lane.spending).lost();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.state == State::Told {
            return;
        }
        let mut origin = lock(&self.lane.origin.state);
        let mut spending = lock(&self.lane.spending);
        if let (true, Some(voice)) = (self.is_probe, self.voice) {
            match voice.is_caller() {
                true => _ = self.lane.of_caller(voice, |own| own.give_up(voice)),
                false => origin.breaker.give_up(voice),
            }
        }
        if self.state == State::Begun {
            return spending.lost();
        }
        origin.bucket.give_back(self.taken);
        let named = self.named.as_ref().map(|named| lock(named));
        spending.give_back(self.spent, named.as_deref().map_or(&[], Vec::as_slice));
    }
}

#[derive(Debug)]
struct Origin {
    hash: OriginHash,
    state: Mutex<OriginState>,
}

#[derive(Debug)]
struct OriginState {
    bucket: Bucket,
    breaker: Breaker,
}

impl Origin {
    fn new(hash: OriginHash, rule: Option<Upstream>) -> Origin {
        let mut state = OriginState { bucket: Bucket::default(), breaker: Breaker::new() };
        state.configure(Instant::default(), rule.as_ref());
        Origin { hash, state: Mutex::new(state) }
    }
}

impl OriginState {
    fn configure(&mut self, now: Instant, rule: Option<&Upstream>) {
        self.bucket.set(now, rule.and_then(|rule| rule.rate));
        self.breaker.failures_max = rule.map_or(BREAKER_FAILURES, |rule| rule.breaker);
        if self.breaker.failures_max == 0 {
            self.breaker.down = None;
        }
    }
}

/// Leaves an origin alone that has failed `failures_max` times in a row, whoever asked; then one request tries it. What callers
/// have chosen is tried beside what the operator has, so that one that proves nothing takes no turn of one that can.
#[derive(Debug)]
struct Breaker {
    failures_max: u32,
    failures: u32,
    rest: Duration,
    /// How it failed.
    down: Option<(UpstreamCode, Option<u16>)>,
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
    fn new() -> Breaker {
        let (failures_max, rest) = (BREAKER_FAILURES, BREAKER_REST_MIN);
        Breaker { failures_max, failures: 0, rest, down: None, tries: Default::default() }
    }

    fn try_of(&mut self, voice: Voice) -> &mut Try {
        &mut self.tries[usize::from(voice == Voice::Chosen)]
    }

    fn wait(&mut self, now: Instant, patience: Duration, voice: Voice) -> Option<Wait> {
        let (code, status) = self.down?;
        let Try { since, rest, probing } = *self.try_of(voice);
        let rest = rest.min(patience);
        let until = if probing.is_some() { now + rest } else { since + rest };
        (until > now).then_some(Wait { until, spread: rest, look: Duration::MAX, why: Why::Down(code, status) })
    }

    /// Whether the request that is sent now is one that tries the origin.
    fn take(&mut self, voice: Voice) -> bool {
        let rest = self.rest;
        let is_down = self.down.is_some();
        if is_down {
            self.try_of(voice).probing = Some(rest);
        }
        is_down
    }

    /// A request that was to try it does not.
    fn give_up(&mut self, voice: Voice) {
        self.try_of(voice).probing = None;
    }

    fn is_down_lately(&self, now: Instant) -> bool {
        self.down.is_some() && self.tries[0].since + BREAKER_REST_MAX * 2 > now
    }

    fn outcome(&mut self, now: Instant, voice: Voice, is_probe: bool, failure: Option<(UpstreamCode, Option<u16>)>) {
        let probed = if is_probe { self.try_of(voice).probing.take() } else { None };
        let (code, status) = match voice.says(failure, self.down.map(|(code, _)| code)) {
            Verdict::Fails(code, status) => (code, status),
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
        self.down = Some((code, status));
        for of_voice in &mut self.tries {
            (of_voice.since, of_voice.rest) = (now, self.rest);
        }
    }
}

/// What a lane may still spend.
#[derive(Debug, Default)]
struct Spending {
    /// Number of the last permit.
    no: u64,
    in_flight: u64,
    /// Until when the others wait for the answer to the first request, or for its end.
    first_until: Option<Instant>,
    /// Whether there has been an answer: what the upstream allows is known, or is not limited.
    heard: bool,
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
    /// Permanent redirects that were told.
    moved: Vec<u64>,
}

/// Who waits for a part of a budget.
#[derive(Clone, Copy, Debug)]
struct Ticket {
    no: u64,
    /// Who has not come back by then does not wait any more.
    until: Instant,
    /// The budget that it waits for.
    budget: Budget,
}

/// Which budget of a lane: the one of that name, or where it has none, of that limit and window.
type Budget = (Option<Resource>, Option<u64>, Option<Duration>);

/// What one request has taken of the budgets.
#[derive(Clone, Copy, Debug)]
struct Spent {
    no: u64,
    at: Instant,
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
    fn is_limited(&self) -> bool {
        !self.known.is_empty() || self.held > Instant::default()
    }

    /// Why no request may be sent now, however it is asked for.
    fn wait_for_call(&mut self, now: Instant) -> Option<Wait> {
        let in_flight = self.in_flight;
        let held = self.held(now);
        let spent = self.known.iter_mut().filter_map(|known| {
            known.renew(now);
            known.spent(now, in_flight)
        });
        let (until, why) = spent.chain(held).max_by_key(|(until, _)| *until)?;
        Some(Wait { until, spread: SPREAD, look: Duration::MAX, why })
    }

    fn held(&self, now: Instant) -> Option<(Instant, Why)> {
        (self.held > now).then_some((self.held, Why::Spent))
    }

    /// `None`: as far as the budgets go, a request may be sent now. Else whoever asks has a place in the queue from now on.
    fn wait(&mut self, now: Instant, ticket: &mut u64, named: &[Resource]) -> Option<Wait> {
        while self.queue.front().is_some_and(|first| first.until <= now) {
            self.queue.pop_front();
        }
        let (room, budget) = self.room(now, named);
        let place = self.queue.iter().position(|waiting| waiting.no == *ticket);
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
            *ticket = self.tickets;
            self.queue.push_back(Ticket { no: self.tickets, until, budget });
        }
        let waiting = u32::try_from(self.queue.len()).unwrap_or(u32::MAX);
        let look = if why == Why::Turn { LOOK.max(LOOK_APART * waiting) } else { Duration::MAX };
        Some(Wait { until, spread, look, why })
    }

    /// Whoever has that ticket is to come back when `wait` says so.
    fn stay(&mut self, ticket: u64, now: Instant, wait: &Wait) {
        if ticket == 0 {
            return;
        }
        let back = (wait.until + wait.spread).min(now + wait.look);
        if let Some(waiting) = self.queue.iter_mut().find(|waiting| waiting.no == ticket) {
            waiting.until = back + GRACE;
        }
    }

    fn leave(&mut self, ticket: &mut u64) {
        let no = std::mem::take(ticket);
        if no != 0 {
            self.queue.retain(|waiting| waiting.no != no);
        }
    }

    /// What there is for whoever has had these budgets named, and the one of which there is least.
    fn room(&mut self, now: Instant, named: &[Resource]) -> (Room, Budget) {
        let in_flight = self.in_flight;
        if !self.heard && in_flight > 0 && self.first_until.is_some_and(|until| until > now) {
            let waiting = u32::try_from(self.queue.len()).unwrap_or(u32::MAX);
            let look = FIRST_LOOK_APART.saturating_mul(waiting).clamp(TURN_MIN, FIRST_LOOK_MAX);
            return (Room::Nobody(now + look, Why::Turn, Duration::ZERO), Budget::default());
        }
        let held = self.held(now).map_or(Room::Unlimited, |(until, why)| Room::Nobody(until, why, Duration::ZERO));
        let mut least = (held, (None, None, None));
        for known in self.known.iter_mut().filter(|known| known.concerns(named)) {
            known.renew(now);
            let room = known.room(now, in_flight);
            if room.is_less(&least.0) {
                least = (room, known.budget());
            }
        }
        least
    }

    /// A request is sent at `at`, by whoever has had these budgets named.
    fn take(&mut self, at: Instant, named: &[Resource]) -> Spent {
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
    fn give_back(&mut self, spent: Spent, named: &[Resource]) {
        self.in_flight = self.in_flight.saturating_sub(1);
        for known in self.known.iter_mut().filter(|known| known.concerns(named) && known.reset_early <= spent.at) {
            known.ahead = known.ahead.saturating_sub(1);
        }
    }

    /// That request has been answered; `quotas` is what that said.
    fn answered(&mut self, now: Instant, Spent { no, at: sent }: Spent, quotas: &[Quota]) {
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

    /// A request is over, and nothing is known of what it has used.
    fn lost(&mut self) {
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
    use crate::guard::Policy;
    use crate::ids::StreamId;
    use crate::stream::credential::Scheme;
    use crate::stream::live::{Live, Rule as Shape, Source};
    use crate::stream::poll::Validators;
    use crate::stream::template::UrlTemplate;
    use crate::stream::{Options, Param, action};
    use crate::time::WallTime;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn at(at_ms: u64) -> Instant {
        Instant::from_micros(5_000_000_000 + at_ms * 1_000)
    }

    fn target(url: &str, headers: &[(&str, &str)]) -> Target {
        let blank = UrlTemplate::parse::<&str>("http://up.example/", &[]).expect("a URL");
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), Secret::new(value.as_bytes()))).collect();
        let options = Options { headers, ..Options::new(StreamId::new("s").expect("an id"), blank) };
        Target { options: Arc::new(options), url: url.parse().expect("a URL"), body: None, guard: None }
    }

    /// One whose upstream has answered before.
    fn lane() -> Arc<Lane> {
        let lane = Arc::new(Budgets::default()).lane(&target("https://up.example/a", &[]));
        lock(&lane.spending).heard = true;
        lane
    }

    fn rated(count: u32, per: Duration, burst: u32) -> Arc<Lane> {
        let budgets = Arc::new(Budgets::default());
        let rate = Some(Rate { every: action::Rate { count, period: per }, burst });
        budgets.configure(at(0), &[Upstream { origin: "https://up.example".into(), rate, breaker: 10 }]);
        budgets.lane(&target("https://up.example/a", &[]))
    }

    fn go(lane: &Arc<Lane>, now: Instant) -> Permit {
        match lane.ask(now, &mut Slot::default(), PATIENCE) {
            Ask::Go(permit) => permit,
            Ask::Wait(wait) => panic!("{wait:?}"),
        }
    }

    /// What somebody waits for who then gives up.
    fn wait(lane: &Arc<Lane>, now: Instant) -> Wait {
        match lane.ask(now, &mut Slot::default(), PATIENCE) {
            Ask::Go(_) => panic!("it may be asked"),
            Ask::Wait(wait) => wait,
        }
    }

    impl Ask {
        fn or_wait(self, wait: impl FnOnce(Wait)) -> Ask {
            if let Ask::Wait(until) = &self {
                wait(*until);
            }
            self
        }
    }

    impl Permit {
        fn answered_by(self, now: Instant, status: u16, quotas: &[Quota]) {
            self.answered(now, &response(status, None), quotas);
        }
    }

    fn response(status: u16, retry_after: Option<Duration>) -> FetchResponse {
        let (validators, received) = (Validators::default(), WallTime::from_secs(1));
        FetchResponse { status, validators, retry_after, fresh_for: None, body: Vec::new(), received }
    }

    fn quota(remaining: u64, reset: Duration, limit: Option<u64>) -> Quota {
        Quota { remaining, reset, limit, window: None, resource: None }
    }

    fn refused() -> FetchError {
        FetchError { code: UpstreamCode::Unreachable, detail: "refused".into() }
    }

    #[test]
    fn a_lane_is_an_origin_and_a_credential() {
        let budgets = Arc::new(Budgets::default());
        let same = |a: &Target, b: &Target| Arc::ptr_eq(&budgets.lane(a), &budgets.lane(b));
        let key = [("X-Api-Key", "k1"), ("Accept", "text/json")];
        let one = target("https://up.example/a?b", &key);
        assert!(same(&one, &target("https://up.example:443/other", &[("x-api-key", "k1")])));
        assert!(!same(&one, &target("https://up.example/a", &[("X-Api-Key", "k2")])));
        assert!(!same(&one, &target("https://up.example/a", &[])));
        assert!(!same(&one, &target("http://up.example/a", &key)));
        assert!(!same(&one, &target("https://user@up.example/a", &key)));
        let shown = format!("{budgets:?}");
        assert!(!shown.contains("k1") && !shown.contains("k2"), "{shown}");
    }

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
    fn too_many_requests_of_one_stream_are_too_many_of_all_that_share_its_credential() {
        let budgets = Arc::new(Budgets::default());
        let of =
            |path: &str, key: &str| budgets.lane(&target(&format!("https://up.example/{path}"), &[("X-Api-Key", key)]));
        let (one, other, stranger) = (of("a", "k1"), of("b", "k1"), of("a", "k2"));
        go(&other, at(0)).answered_by(at(0), 200, &[]);
        let under_way = go(&other, at(0));
        go(&one, at(0)).answered(at(10), &response(429, Some(ms(30_000))), &[]);
        // What was sent before says nothing of it, nor does a shorter word.
        under_way.answered_by(at(20), 200, &[]);
        let held = wait(&other, at(20));
        assert_eq!((held.until, held.why), (at(30_010), Why::Spent));
        assert!(matches!(other.ask_for_call(at(20), PATIENCE), Ask::Wait(wait) if wait.until == at(30_010)));
        go(&stranger, at(20)).answered(at(30), &response(503, Some(ms(60_000))), &[]);
        go(&stranger, at(40)).answered(at(50), &response(429, None), &[]);
        drop(go(&stranger, at(60)));
        drop(go(&other, at(30_010)));
        // Nobody is held for longer than a stream would be.
        go(&one, at(40_000)).answered(at(40_000), &response(429, Some(RETRY_AFTER_MAX * 2)), &[]);
        assert_eq!(wait(&one, at(40_000)).until, at(40_000) + RETRY_AFTER_MAX);
    }

    /// A lane of what a caller has described, or filled in, beside that of the operator's.
    fn of_callers(budgets: &Arc<Budgets>) -> (Target, Target, [Arc<Lane>; 3]) {
        let own = target("https://up.example/a", &[]);
        let described = Target { guard: Some(Arc::new(Policy::public())), ..target("https://up.example/b", &[]) };
        let param = Param { name: "q".into(), pattern: None };
        let options = Options { params: vec![param], ..(*own.options).clone() };
        let filled_in = Target { options: Arc::new(options), ..target("https://up.example/a?q=1", &[]) };
        let lanes = [&own, &described, &filled_in].map(|target| budgets.lane(target));
        lanes.iter().for_each(|lane| lock(&lane.spending).heard = true);
        (described, filled_in, lanes)
    }

    fn asks(lane: &Arc<Lane>, target: &Target, now: Instant) -> Result<Permit, Wait> {
        match lane.ask(now, &mut Slot::of(target), PATIENCE) {
            Ask::Go(permit) => Ok(permit),
            Ask::Wait(wait) => Err(wait),
        }
    }

    fn may(lane: &Arc<Lane>, target: &Target, now: Instant) -> Permit {
        asks(lane, target, now).expect("it may be asked")
    }

    /// The same target, described by that caller.
    fn by(target: &Target, caller: u64) -> Target {
        let options = Options { described_by: Some(Holder::from_hash(caller)), ..(*target.options).clone() };
        Target {
            options: Arc::new(options),
            url: target.url.clone(),
            body: target.body.clone(),
            guard: target.guard.clone(),
        }
    }

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
        assert!(lock(&budgets.callers).is_empty());
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
        assert!((2..=CALLERS_BREAKERS_MAX).contains(&lock(&budgets.callers).len()));
        assert!(asks(&theirs, &described, at(0)).is_err(), "who is down is kept longest");
    }

    #[test]
    fn what_callers_ask_for_takes_turns_with_the_operators_in_its_rate() {
        let budgets = Arc::new(Budgets::default());
        let rate = Some(Rate { every: action::Rate { count: 4, period: ms(1_000) }, burst: 1 });
        budgets.configure(at(0), &[Upstream { origin: "https://up.example".into(), rate, breaker: 10 }]);
        let (described, filled_in, [own, theirs, filled]) = of_callers(&budgets);
        let plain = target("https://up.example/a", &[]);
        let askers: Vec<(&Arc<Lane>, &Target)> =
            (0..64).flat_map(|_| [(&theirs, &described), (&filled, &filled_in)]).chain([(&own, &plain)]).collect();
        let mut slots: Vec<Slot> = askers.iter().map(|(_, target)| Slot::of(target)).collect();
        let mut due: std::collections::BTreeSet<(Instant, usize)> = (0..askers.len()).map(|who| (at(0), who)).collect();
        let (mut polls, mut all) = (Vec::new(), 0);
        while let Some((now, who)) = due.pop_first().filter(|(now, _)| *now < at(60_000)) {
            match askers[who].0.ask(now, &mut slots[who], PATIENCE) {
                Ask::Go(permit) => {
                    drop_begun(permit);
                    all += 1;
                    if who + 1 == askers.len() {
                        polls.push(now);
                    }
                    due.insert((now + ms(500), who));
                }
                Ask::Wait(wait) => _ = due.insert((wait.until.min(now + wait.look), who)),
            }
        }
        assert!((239..=240).contains(&all), "{all}");
        assert!(polls.windows(2).all(|pair| pair[1].since(pair[0]) <= ms(500 + 3 * 250)), "{polls:?}");
    }

    #[test]
    fn an_upstream_that_callers_make_say_no_more_says_so_to_them() {
        let (described, _, [own, theirs, _]) = of_callers(&Arc::new(Budgets::default()));
        let Ask::Go(permit) = theirs.ask(at(0), &mut Slot::of(&described), PATIENCE) else { panic!("it may be asked") };
        permit.answered(at(0), &response(429, Some(Duration::from_secs(3_600))), &[quota(0, ms(60_000), Some(10))]);
        assert!(matches!(theirs.ask(at(1), &mut Slot::of(&described), PATIENCE), Ask::Wait(_)));
        drop(go(&own, at(1)));
        let elsewhere = |lane: &Arc<Lane>| lane.elsewhere(&"https://other.example/".parse().expect("a URL"));
        assert!(!Arc::ptr_eq(&elsewhere(&own), &elsewhere(&theirs)), "nor where they are redirected to");
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
        // An answer that tells of no budget frees all, and so does one that is too long in coming.
        let lane = Arc::new(Budgets::default()).lane(&target("https://up.example/a", &[]));
        let lost = go(&lane, at(0));
        lost.failed(at(10), &refused());
        let slow = go(&lane, at(20));
        wait(&lane, at(30));
        let _both = (go(&lane, at(0) + FIRST_PATIENCE), go(&lane, at(0) + FIRST_PATIENCE));
        slow.answered_by(at(6_000), 200, &[]);
        let _all = [0; 50].map(|_| go(&lane, at(6_000)));
    }

    #[test]
    fn what_somebody_waits_for_goes_before_polls_within_the_same_rate() {
        let lane = rated(10, ms(1_000), 1);
        drop_begun(go(&lane, at(0)));
        let mut slots: [Slot; 3] = Default::default();
        for slot in &mut slots {
            assert!(matches!(lane.ask(at(0), slot, PATIENCE), Ask::Wait(_)));
        }
        let starts = |now, patience| match lane.ask_for_call(now, patience) {
            Ask::Go(mut permit) => {
                permit.begin();
                Ok(permit.starts())
            }
            Ask::Wait(wait) => Err(wait.until),
        };
        assert_eq!(starts(at(0), ms(150)), Ok(at(100)));
        assert_eq!(starts(at(0), ms(199)), Err(at(200)), "it would come too late, and takes nothing");
        assert_eq!(starts(at(0), ms(200)), Ok(at(200)));
        let Ask::Wait(wait) = lane.ask(at(100), &mut slots[0], PATIENCE) else { panic!("that was the action's") };
        assert_eq!(wait.until, at(300));
        assert!(matches!(lane.ask(at(300), &mut slots[0], PATIENCE), Ask::Go(_)));
        assert_eq!(starts(at(10_000), ms(0)), Ok(at(10_000)));
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
    fn actions_share_the_lane_of_polls_with_their_credential() {
        let budgets = Arc::new(Budgets::default());
        let poll = budgets.lane(&target("https://up.example/a", &[("X-Api-Key", "k1")]));
        let call = |key: &str| {
            let url = UrlTemplate::parse_for_action("https://up.example/act").expect("a URL");
            let headers = vec![("x-api-key".to_owned(), Secret::new(key.as_bytes()))];
            let options = Arc::new(action::Options { headers, ..action::Options::new("act".into(), url) });
            budgets.lane_of_call(&options.call("{}", &|_| None).expect("a call"))
        };
        assert!(Arc::ptr_eq(&poll, &call("k1")) && !Arc::ptr_eq(&poll, &call("k2")));
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
    fn leave_that_is_not_used_costs_nothing() {
        let lane = rated(1, ms(1_000), 1);
        drop(go(&lane, at(0)));
        drop_begun(go(&lane, at(0)));
        assert_eq!(wait(&lane, at(0)).until, at(1_000), "what was begun may have been sent");
        let held = go(&lane, at(1_000));
        assert!(!held.is_late(at(1_050)) && held.is_late(at(1_051)), "so long it may be held");
        let lane = self::lane();
        go(&lane, at(0)).answered_by(at(0), 200, &[quota(1, ms(60_000), None)]);
        let spread = wait(&lane, at(0)).until;
        drop(go(&lane, spread));
        drop(go(&lane, at(59_000)));
        drop_begun(go(&lane, at(59_600)));
        assert_eq!(wait(&lane, at(59_600)).why, Why::Spent);
    }

    #[test]
    fn whoever_waits_for_a_rate_is_served_by_whoever_sends_nothing() {
        let lane = rated(1, ms(1_000), 1);
        let mut slots: [Slot; 3] = Default::default();
        let [first, second, third] = &mut slots;
        drop_begun(go(&lane, at(0)));
        for slot in [&mut *first, &mut *second, &mut *third] {
            assert!(matches!(lane.ask(at(0), slot, PATIENCE), Ask::Wait(_)));
        }
        let Ask::Go(unsent) = lane.ask(at(1_000), first, PATIENCE) else { panic!("it is its turn") };
        drop(unsent);
        let Ask::Go(permit) = lane.ask(at(1_050), third, PATIENCE) else { panic!("whoever looks first") };
        drop_begun(permit);
        let Ask::Wait(wait) = lane.ask(at(2_000), second, PATIENCE) else { panic!("the rate is kept") };
        assert_eq!(wait.until, at(2_050));
    }

    fn drop_begun(mut permit: Permit) {
        permit.begin();
    }

    #[test]
    fn those_who_leave_a_queue_are_waited_for_by_nobody() {
        let rated = rated(1, ms(1_000), 1);
        drop_begun(go(&rated, at(0)));
        let spread = lane();
        go(&spread, at(0)).answered_by(at(0), 200, &[quota(9, ms(100_000), Some(1_000))]);
        for (lane, until) in [(rated, at(1_000)), (spread, at(10_000))] {
            let mut gone: [Slot; 8] = Default::default();
            for slot in &mut gone {
                assert!(matches!(lane.ask(at(0), slot, PATIENCE), Ask::Wait(_)));
            }
            let mut last = Slot::default();
            let asked = lane.ask(at(0), &mut last, PATIENCE);
            assert!(matches!(asked, Ask::Wait(wait) if wait.until >= until + until.since(at(0)) * 7), "{asked:?}");
            drop(gone);
            let asked = lane.ask(at(10), &mut last, PATIENCE);
            assert!(matches!(asked, Ask::Wait(wait) if wait.until == until), "{asked:?}");
            assert_eq!(wait(&lane, at(10)).until, until + until.since(at(0)), "behind the one who stays");
        }
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
    fn who_is_held_by_a_budget_of_its_own_holds_nobody_in_the_rate() {
        let budgets = Arc::new(Budgets::default());
        let rate = Some(Rate { every: action::Rate { count: 1, period: ms(1_000) }, burst: 1 });
        budgets.configure(at(0), &[Upstream { origin: "https://up.example".into(), rate, breaker: 10 }]);
        let of = |key| budgets.lane(&target("https://up.example/a", &[("X-Api-Key", key)]));
        let (held, open) = (of("k1"), of("k2"));
        let mut under_way = Some(go(&held, at(0)));
        let (mut first, mut second, mut went) = (Slot::default(), Slot::default(), 0);
        for now in (0..20_000).step_by(50).map(at) {
            // Both wait for the rate; then one's credential has asked too often.
            if now == at(500) {
                let told = response(429, Some(Duration::from_secs(60)));
                under_way.take().expect("the first").answered(now, &told, &[]);
            }
            assert!(matches!(held.ask(now, &mut first, PATIENCE), Ask::Wait(_)));
            if let Ask::Go(permit) = open.ask(now, &mut second, PATIENCE) {
                drop_begun(permit);
                went += 1;
            }
        }
        assert_eq!(went, 19, "one in each second but the first");
    }

    #[test]
    fn a_rate_that_is_raised_is_used_at_once() {
        let budgets = Arc::new(Budgets::default());
        let set = |now, count, period| {
            let rate = Some(Rate { every: action::Rate { count, period }, burst: 1 });
            budgets.configure(now, &[Upstream { origin: "https://up.example".into(), rate, breaker: 10 }]);
        };
        set(at(0), 1, ms(60_000));
        let lane = budgets.lane(&target("https://up.example/a", &[]));
        drop_begun(go(&lane, at(0)));
        let mut slot = Slot::default();
        assert!(matches!(lane.ask(at(0), &mut slot, PATIENCE), Ask::Wait(wait) if wait.until == at(60_000)));
        set(at(2_000), 10, ms(1_000));
        assert!(matches!(lane.ask(at(2_000), &mut slot, PATIENCE), Ask::Wait(wait) if wait.until == at(2_100)));
    }

    #[test]
    fn clients_of_an_endpoint_have_each_a_lane_of_their_own() {
        let budgets = Arc::new(Budgets::default());
        let written = |text: &str| Live::new(Source::Written, Shape::Text, Secret::new(text));
        let lane = |id: &str, secret: &str, refresh: Option<&str>, param: &str| {
            let options = oauth::Options {
                grant: refresh.map_or(oauth::Grant::ClientCredentials, |it| oauth::Grant::RefreshToken(written(it))),
                token_url: "https://id.example/token".parse().expect("a URL"),
                client_id: written(id),
                client_secret: Some(written(secret)),
                client_auth: oauth::ClientAuth::Basic,
                scope: None,
                audience: None,
                params: vec![("tenant".into(), written(param))],
                ca: None,
                identity: None,
            };
            let tokens = budgets.lane_of_tokens(&options);
            let mut target = target("https://up.example/a", &[]);
            let changed = Arc::get_mut(&mut target.options).expect("nobody else's");
            changed.credential = Credential { scheme: Some(Scheme::OAuth(Arc::new(options))), ..Credential::default() };
            [budgets.lane(&target), tokens]
        };
        let one = lane("id", "secret", None, "p");
        let same = lane("id", "secret", None, "p");
        for at in 0..2 {
            assert!(Arc::ptr_eq(&one[at], &same[at]));
        }
        for other in [
            lane("other", "secret", None, "p"),
            lane("id", "other", None, "p"),
            lane("id", "secret", Some("r"), "p"),
            lane("id", "secret", None, "other"),
        ] {
            assert!((0..2).all(|at| !Arc::ptr_eq(&one[at], &other[at])));
        }
        let (mine, theirs) = (lane("id", "secret", Some("r1"), "p"), lane("id", "secret", Some("r2"), "p"));
        assert!((0..2).all(|at| !Arc::ptr_eq(&mine[at], &theirs[at])), "each user has a budget");
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

    #[test]
    fn a_rate_is_kept_and_shared_in_turn() {
        let lane = rated(10, ms(1_000), 1);
        let mut slots: [Slot; 5] = Default::default();
        let mut due: VecDeque<(Instant, usize)> = (0..5).map(|asker| (at(0), asker)).collect();
        let mut sent: Vec<(Instant, usize)> = Vec::new();
        while let Some((now, asker)) = due.pop_front() {
            match lane.ask(now, &mut slots[asker], PATIENCE) {
                Ask::Go(permit) => {
                    drop_begun(permit);
                    sent.push((now, asker));
                    if sent.len() == 50 {
                        break;
                    }
                    due.push_back((now + ms(1), asker));
                }
                Ask::Wait(wait) => due.push_back((wait.until, asker)),
            }
            due.make_contiguous().sort();
        }
        assert!(sent.windows(2).all(|pair| pair[1].0.since(pair[0].0) == ms(100)), "{sent:?}");
        let of = |asker| sent.iter().filter(|(_, who)| *who == asker).count();
        assert_eq!([of(0), of(1), of(2), of(3), of(4)], [10; 5]);
    }

    #[test]
    fn a_burst_may_come_at_once_and_no_more() {
        let lane = rated(10, ms(1_000), 3);
        for _ in 0..3 {
            drop_begun(go(&lane, at(0)));
        }
        assert_eq!(wait(&lane, at(0)).until, at(100));
    }

    #[test]
    fn late_askers_do_not_come_together() {
        let lane = rated(10, ms(1_000), 1);
        drop_begun(go(&lane, at(0)));
        let mut slots: [Slot; 3] = Default::default();
        for slot in &mut slots {
            assert!(matches!(lane.ask(at(0), slot, PATIENCE), Ask::Wait(_)));
        }
        // All three are late, as on a core that was held up.
        let Ask::Go(first) = lane.ask(at(900), &mut slots[0], PATIENCE) else { panic!("it is its turn") };
        drop_begun(first);
        let Ask::Wait(wait) = lane.ask(at(900), &mut slots[1], PATIENCE) else { panic!("one at a time") };
        assert_eq!(wait.until, at(1_000));
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

    #[test]
    fn a_permanent_redirect_is_told_once() {
        let lane = lane();
        assert!(lane.is_news(7) && !lane.is_news(7) && lane.is_news(8));
        assert_eq!((100..1_000).filter(|&hash| lane.is_news(hash)).count(), MOVED_MAX - 2);
    }

    #[test]
    fn lanes_have_a_bound_and_those_that_hold_stay_longest() {
        let budgets = Arc::new(Budgets::default());
        let of = |n: usize| target("http://up.example/", &[("Authorization", &n.to_string())]);
        go(&budgets.lane(&of(0)), at(0)).answered_by(at(0), 200, &[quota(0, ms(1_000), None)]);
        for n in 1..=LANES_MAX {
            budgets.lane(&of(n));
        }
        assert_eq!(lock(&budgets.table).lanes.len(), 2);
        assert_eq!(wait(&budgets.lane(&of(0)), at(1)).why, Why::Spent);
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
