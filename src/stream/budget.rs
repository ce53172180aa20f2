//! How often upstreams may be asked: leave to send a request, and who shares what is said of that.
//!
//! A **lane** is an origin and a credential there: what upstreams count requests by. All streams of a lane, on all cores,
//! share what its answers say of budgets; all lanes of an origin share its rate and its breaker. Nobody asks an upstream
//! without a [`Permit`] of its lane, and each permit is for one request.
//! Source: those of what it asks: `spending` (the upstream's own budgets), `bucket` (the operator's rates), `breaker` (a rest for
//! those that are down), `rest` (`Retry-After`). Memory: one entry an origin and lane, at most `LANES_MAX` of each, kept while
//! something is held against it. The locks are taken once a request, never on a delivery.
//! Errors: [`Wait`]. Not here: what a stream makes of a wait (`poll`), reading of headers (`codec::rate_limit`).

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use url::Url;

use crate::codec::rate_limit::Quota;
use crate::limits::{BREAKER_FAILURES, LANES_MAX, RETRY_AFTER_MAX};
use crate::secret::Secret;
use crate::time::Instant;

use super::action::Call;
use super::breaker::{Breaker, Callers, Failed, OriginHash};
pub use super::bucket::Rate;
use super::bucket::{Bucket, Place, Taken};
use super::credential::Credential;
use super::oauth;
use super::poll::{FetchError, FetchResponse, Target, UpstreamCode};
use super::rest::Rests;
use super::spending::{Asker, Named, Spending, Spent};
use super::voice::Voice;
pub use super::voice::{Wait, Why};

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
/// Leave that is not used within this time is asked for again.
const PERMIT_AGE_MAX: Duration = Duration::from_millis(50);
/// Permanent redirects of one lane that are told.
const MOVED_MAX: usize = 64;

/// What the cores of a process know of upstreams together.
#[derive(Debug, Default)]
pub struct Budgets {
    hasher: RandomState,
    table: Mutex<Table>,
    /// Their breakers take a lock of their own, behind that of an origin.
    callers: Callers,
}

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
            moved: Mutex::default(),
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
                self.callers.forget(origin.hash);
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
    /// Permanent redirects that were told: at most `MOVED_MAX`.
    moved: Mutex<Vec<u64>>,
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

/// What one asker has of a lane from one time to the next: its places in the queues, and which budgets are its. Dropped, it
/// gives the places back.
#[derive(Debug, Default)]
pub struct Slot {
    /// Where it has a place.
    lane: Option<Arc<Lane>>,
    /// For the operator's rate.
    place: Option<Place>,
    /// For the upstream's budget.
    asker: Asker,
    works: bool,
}

impl Slot {
    /// For the polls of `target`.
    pub fn of(target: &Target) -> Slot {
        let mut slot = Slot::default();
        slot.asker.voice = Voice::of(target);
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
        lock(&lane.spending).leave(&mut self.asker);
    }

    /// It asks for something else from now on.
    pub fn reset(&mut self) {
        self.leave();
        self.asker.named = Named::default();
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
        let voice = slot.asker.voice;
        let wait = origin.breaker.wait(now, patience, voice);
        let of_caller = if slot.works { Duration::ZERO } else { patience };
        let wait = wait.or_else(|| self.of_caller(voice, |own| own.wait(now, of_caller, voice))?);
        let wait = wait.or_else(|| spending.wait(now, &mut slot.asker));
        if wait.is_some() {
            // Those who wait for the rate go one after the other: whoever would not go if its turn came holds none of them up.
            origin.bucket.leave(&mut slot.place);
        }
        let wait = wait.or_else(|| {
            let turn = origin.bucket.wait(now, voice.no(), &mut slot.place)?;
            Some(Wait { until: turn.until, spread: Duration::ZERO, look: turn.look, why: Why::Turn })
        });
        if let Some(wait) = wait {
            // Its place in the budget's queue is kept, whatever is waited for.
            spending.stay(&slot.asker, now, &wait);
            slot.lane = (slot.place.is_some() || slot.asker.waits()).then(|| Arc::clone(self));
            return Ask::Wait(wait);
        }
        spending.leave(&mut slot.asker);
        slot.lane = None;
        let is_probe = match voice.is_caller() {
            true => self.of_caller(voice, |own| own.take(voice)).unwrap_or(false),
            false => origin.breaker.take(voice),
        };
        let taken = origin.bucket.take(now, Some(voice.no()));
        spending.begins(now, voice);
        let named = slot.asker.named.clone();
        let spent = spending.take(now, &named.lock());
        let (lane, named, voice) = (Arc::clone(self), Some(named), Some(voice));
        Ask::Go(Permit { lane, spent, taken, named, is_probe, voice, state: State::Given })
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
        budgets.callers.ask((self.origin.hash, who), then)
    }

    /// Tells the breaker that it concerns of a poll's outcome.
    fn tell(&self, now: Instant, voice: Voice, is_probe: bool, failure: Option<Failed>) {
        let mut origin = lock(&self.origin.state);
        let Voice::Caller(who) = voice else { return origin.breaker.outcome(now, voice, is_probe, failure) };
        let Some(budgets) = self.budgets.upgrade() else { return };
        budgets.callers.outcome(now, (self.origin.hash, who), &origin.breaker, is_probe, failure);
    }

    /// The lane of a request to `url` that carries no credential.
    pub fn elsewhere(self: &Arc<Lane>, url: &Url) -> Arc<Lane> {
        // Without a table there is nobody left to share anything with.
        self.budgets
            .upgrade()
            .map_or_else(|| Arc::clone(self), |budgets| budgets.lane_of(url, (self.whose.0, NO_CREDENTIAL)))
    }

    /// Until when the upstream wants that request left alone, by what it has said of that or of whoever asks.
    pub fn left_alone_until(&self, target: &Target, now: Instant) -> Option<Instant> {
        let held = lock(&self.spending).held(now).map(|(until, _)| until);
        held.max(self.rests.until(target, now))
    }

    /// How it has failed, where nobody has been answered yet and those who are asked for all are under way.
    pub fn unanswered(&self) -> Option<UpstreamCode> {
        lock(&self.spending).unanswered()
    }

    /// Whether that permanent redirect is told of for the first time. `hash` is of where from and where to.
    pub fn is_news(&self, hash: u64) -> bool {
        let mut moved = lock(&self.moved);
        let news = moved.len() < MOVED_MAX && !moved.contains(&hash);
        if news {
            moved.push(hash);
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
        (slot.asker.named, slot.asker.voice) = (named, voice);
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
            spending.hold(now + wait.min(RETRY_AFTER_MAX));
        }
        spending.answered(now, self.spent, quotas);
        if let Some(named) = &self.named {
            named.hear(quotas);
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
        lock(&self.lane.spending).failed(error.code);
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
        let named = self.named.as_ref().map(Named::lock);
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
        self.breaker.set(rule.map_or(BREAKER_FAILURES, |rule| rule.breaker));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::guard::Policy;
    use crate::ids::{Holder, StreamId};
    use crate::stream::credential::Scheme;
    use crate::stream::live::{Live, Rule as Shape, Source};
    use crate::stream::poll::Validators;
    use crate::stream::template::UrlTemplate;
    use crate::stream::{Options, Param, action};
    use crate::time::WallTime;

    pub(in crate::stream) const PATIENCE: Duration = Duration::from_secs(60);

    pub(in crate::stream) fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    pub(in crate::stream) fn at(at_ms: u64) -> Instant {
        Instant::from_micros(5_000_000_000 + at_ms * 1_000)
    }

    pub(in crate::stream) fn target(url: &str, headers: &[(&str, &str)]) -> Target {
        let blank = UrlTemplate::parse::<&str>("http://up.example/", &[]).expect("a URL");
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), Secret::new(value.as_bytes()))).collect();
        let options = Options { headers, ..Options::new(StreamId::new("s").expect("an id"), blank) };
        Target { options: Arc::new(options), url: url.parse().expect("a URL"), body: None, guard: None }
    }

    /// Whether its upstream has answered before.
    pub(in crate::stream) fn set_heard(lane: &Arc<Lane>, heard: bool) {
        lock(&lane.spending).heard = heard;
    }

    /// How many callers' requests have last failed.
    pub(in crate::stream) fn callers_held(budgets: &Budgets) -> usize {
        budgets.callers.len()
    }

    /// One whose upstream has answered before.
    pub(in crate::stream) fn lane() -> Arc<Lane> {
        let lane = Arc::new(Budgets::default()).lane(&target("https://up.example/a", &[]));
        set_heard(&lane, true);
        lane
    }

    pub(in crate::stream) fn rated(count: u32, per: Duration, burst: u32) -> Arc<Lane> {
        let budgets = Arc::new(Budgets::default());
        let rate = Some(Rate { every: action::Rate { count, period: per }, burst });
        budgets.configure(at(0), &[Upstream { origin: "https://up.example".into(), rate, breaker: 10 }]);
        budgets.lane(&target("https://up.example/a", &[]))
    }

    pub(in crate::stream) fn go(lane: &Arc<Lane>, now: Instant) -> Permit {
        match lane.ask(now, &mut Slot::default(), PATIENCE) {
            Ask::Go(permit) => permit,
            Ask::Wait(wait) => panic!("{wait:?}"),
        }
    }

    /// What somebody waits for who then gives up.
    pub(in crate::stream) fn wait(lane: &Arc<Lane>, now: Instant) -> Wait {
        match lane.ask(now, &mut Slot::default(), PATIENCE) {
            Ask::Go(_) => panic!("it may be asked"),
            Ask::Wait(wait) => wait,
        }
    }

    impl Ask {
        pub(in crate::stream) fn or_wait(self, wait: impl FnOnce(Wait)) -> Ask {
            if let Ask::Wait(until) = &self {
                wait(*until);
            }
            self
        }
    }

    impl Permit {
        pub(in crate::stream) fn answered_by(self, now: Instant, status: u16, quotas: &[Quota]) {
            self.answered(now, &response(status, None), quotas);
        }
    }

    pub(in crate::stream) fn response(status: u16, retry_after: Option<Duration>) -> FetchResponse {
        let (validators, received) = (Validators::default(), WallTime::from_secs(1));
        FetchResponse { status, validators, retry_after, fresh_for: None, body: Vec::new(), received }
    }

    pub(in crate::stream) fn quota(remaining: u64, reset: Duration, limit: Option<u64>) -> Quota {
        Quota { remaining, reset, limit, window: None, resource: None }
    }

    pub(in crate::stream) fn refused() -> FetchError {
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
    pub(in crate::stream) fn of_callers(budgets: &Arc<Budgets>) -> (Target, Target, [Arc<Lane>; 3]) {
        let own = target("https://up.example/a", &[]);
        let described = Target { guard: Some(Arc::new(Policy::public())), ..target("https://up.example/b", &[]) };
        let param = Param { name: "q".into(), pattern: None };
        let options = Options { params: vec![param], ..(*own.options).clone() };
        let filled_in = Target { options: Arc::new(options), ..target("https://up.example/a?q=1", &[]) };
        let lanes = [&own, &described, &filled_in].map(|target| budgets.lane(target));
        lanes.iter().for_each(|lane| set_heard(lane, true));
        (described, filled_in, lanes)
    }

    pub(in crate::stream) fn asks(lane: &Arc<Lane>, target: &Target, now: Instant) -> Result<Permit, Wait> {
        match lane.ask(now, &mut Slot::of(target), PATIENCE) {
            Ask::Go(permit) => Ok(permit),
            Ask::Wait(wait) => Err(wait),
        }
    }

    pub(in crate::stream) fn may(lane: &Arc<Lane>, target: &Target, now: Instant) -> Permit {
        asks(lane, target, now).expect("it may be asked")
    }

    /// The same target, described by that caller.
    pub(in crate::stream) fn by(target: &Target, caller: u64) -> Target {
        let options = Options { described_by: Some(Holder::from_hash(caller)), ..(*target.options).clone() };
        Target {
            options: Arc::new(options),
            url: target.url.clone(),
            body: target.body.clone(),
            guard: target.guard.clone(),
        }
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

    pub(in crate::stream) fn drop_begun(mut permit: Permit) {
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
}
