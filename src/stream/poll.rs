//! When to poll an upstream, and what to make of its answer.
//!
//! The shell carries out a [`FetchRequest`] and brings back a [`FetchResult`]; all judgement is here: a [`Poller`] keeps
//! the times of one stream's polls, at most one of which is under way, and says what each answer was.
//! Source: protocol version 1, section 3 (status, codes); RFC 9110 sections 8.8 and 13 (validators), 10.2.3 and 15
//! (`Retry-After`, status codes); «Exponential Backoff And Jitter» (AWS Architecture Blog, 2015): full jitter.
//! Memory: one `Poller` a stream, at most 320 bytes and its validators, each at most `VALIDATOR_BYTES_MAX`.
//! Errors: `FetchError` from the shell, [`Failure`] from here; both are the upstream's fault and carry its stable code.
//! Not here: sockets, parsing and comparing bodies (`diff`), who watches, what is kept (`log`).

use std::sync::Arc;
use std::time::Duration;

use url::{Host, Position, Url};

use crate::codec::http::is_value_byte;
use crate::guard::Policy;
use crate::limits::{REFRESH_INTERVAL, RETRY_AFTER_MAX, VALIDATOR_BYTES_MAX};
use crate::time::{Instant, Now, WallTime};

use super::pace::Pace;

/// A filled-in upstream request: what one stream polls. Two callers share a stream only if theirs are equal.
pub struct Target {
    /// The stream's configuration: method, headers, time-outs, limits, CA.
    pub options: Arc<super::Options>,
    /// The URL, placeholders filled.
    pub url: Url,
    /// The body, placeholders filled.
    pub body: Option<Arc<[u8]>>,
    /// Who says whether it may be connected to, where a caller or an administrator has named it; `None`: it stands in the
    /// operator's file.
    pub guard: Option<Arc<Policy>>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Its URL and body may be a caller's secrets.
        f.debug_struct("Target")
            .field("id", &self.options.id)
            .field("guarded", &self.guard.is_some())
            .finish_non_exhaustive()
    }
}

/// What is connected to for a URL and what is sent there: the one reading of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoint<'u> {
    /// Whether over TLS.
    pub https: bool,
    /// The address, or the name that is looked up and that the certificate must be valid for.
    pub host: Host<&'u str>,
    /// The port.
    pub port: u16,
    /// The value of `Host`.
    pub authority: &'u str,
    /// Path and query, as they are sent.
    pub target: &'u str,
}

impl Endpoint<'_> {
    /// The endpoint of `url`; `None`: it is neither `http` nor `https`, or has no host.
    pub fn of(url: &Url) -> Option<Endpoint<'_>> {
        let https = match url.scheme() {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        Some(Endpoint {
            https,
            host: url.host()?,
            port: url.port_or_known_default()?,
            authority: &url[Position::BeforeHost..Position::AfterPort],
            target: &url[Position::BeforePath..Position::AfterQuery],
        })
    }
}

/// What the upstream gave to tell its next answer from this one (RFC 9110 section 8.8), byte for byte.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Validators {
    /// `ETag`, sent back as `If-None-Match`.
    pub etag: Option<Box<[u8]>>,
    /// `Last-Modified`, sent back as `If-Modified-Since`.
    pub last_modified: Option<Box<[u8]>>,
    /// Which request they are of: 0 is the first of a poll, any other the hash of one that a redirect has led to.
    pub place: u64,
}

impl Validators {
    /// Whether there are any.
    pub fn is_some(&self) -> bool {
        self.etag.is_some() || self.last_modified.is_some()
    }
}

/// One poll, to be carried out by the shell.
#[derive(Clone, Debug)]
pub struct FetchRequest {
    /// What to ask for.
    pub target: Arc<Target>,
    /// What to make it conditional on.
    pub validators: Validators,
}

/// How a poll went.
pub type FetchResult = Result<FetchResponse, FetchError>;

/// An upstream's whole answer, whatever its status.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FetchResponse {
    /// Its status code.
    pub status: u16,
    /// Its validators.
    pub validators: Validators,
    /// `Retry-After`, both forms, as a time to wait; of an upstream that is followed its `retry`.
    pub retry_after: Option<Duration>,
    /// How long it may be used by its own `Cache-Control`, less its `Age`; `None`: it does not say.
    pub fresh_for: Option<Duration>,
    /// The body, transfer and content codings undone; empty unless the status is 2xx.
    pub body: Vec<u8>,
    /// When its head was received.
    pub received: WallTime,
}

impl FetchResponse {
    /// For how long the upstream wants to be asked no more, where it says so. RFC 9110 section 10.2.3: any answer may; gateways
    /// do with every 5xx. Of a value it is nothing that matters.
    pub fn asks_to_be_left_alone(&self) -> Option<Duration> {
        self.retry_after.filter(|_| (400..=599).contains(&self.status))
    }

    /// What an answer of 400 to 599 is.
    fn failure_code(&self) -> UpstreamCode {
        match self.status {
            // Some say so what others say by 429: GitHub, of its secondary limits.
            403 | 503 if self.retry_after.is_some() => UpstreamCode::RateLimited,
            401 | 403 => UpstreamCode::Auth,
            429 => UpstreamCode::RateLimited,
            _ => UpstreamCode::Status,
        }
    }
}

/// Why there is no answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FetchError {
    /// The stable code: `Auth` where nothing was sent for want of a token.
    pub code: UpstreamCode,
    /// What happened, for the operator's log. Never holds a URL's query, a header's value or a body.
    pub detail: String,
}

/// Number of a poll of one stream: one more than the last. An answer is known by it.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PollNo(pub u64);

/// What a [`Poller`] needs of its stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PollOptions {
    /// From the start of one poll to the start of the next; less than [`INTERVAL_MIN`] is raised to it.
    pub interval: Duration,
    /// Where polling ended and begins again, polls are so far apart at least, or `interval` where that is less.
    pub restart_min: Duration,
    /// Longest wait after a failure; less than `interval` is raised to it.
    pub backoff_max: Duration,
    /// Whether polls may be conditional: for methods other than GET and HEAD, `If-None-Match` has another meaning
    /// (RFC 9110 section 13.1.2: 412, not 304).
    pub conditional: bool,
    /// Of the stream's key and nothing that two streams share: the phase of its polls and its jitter come of it.
    pub seed: u64,
}

impl PollOptions {
    /// Those of a configured stream, for one filled-in URL whose key hashes to `seed`.
    pub fn of(options: &super::Options, seed: u64) -> PollOptions {
        PollOptions {
            interval: options.interval,
            restart_min: options.restart_min,
            backoff_max: options.backoff_max,
            // What is followed is gone on with by its last id, whatever the method. That the first page is as it was says
            // nothing of the others, nor whether there are others now.
            conditional: options.follow.is_some()
                || (matches!(options.method.as_str(), "GET" | "HEAD") && options.pages_max <= 1),
            seed,
        }
    }
}

/// Least interval between the starts of two polls.
pub const INTERVAL_MIN: Duration = Duration::from_millis(1);
/// Least base of the exponential backoff: an upstream polled every few milliseconds that fails is left alone for longer.
pub const BACKOFF_BASE_MIN: Duration = Duration::from_millis(100);
/// Where the interval changes by the time of the day, the first polls with the new one are spread over this, or the interval
/// where that is less.
const CHANGE_SPREAD: Duration = Duration::from_secs(1);
/// A stream whose watchers come and go is not polled at once again sooner than this, or its interval where that is less.
pub const RESTART_MIN: Duration = Duration::from_secs(1);

/// What an answer was.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Judged {
    /// A body that may be a value. Tell what it proved to be: [`Poller::accept`] or [`Poller::refuse`]; until then the
    /// poll counts as under way.
    Body {
        /// Never empty.
        bytes: Vec<u8>,
        /// When the response was received: the `ts` of the event, if it makes one.
        received: WallTime,
    },
    /// The value held is still the newest.
    NotModified,
    /// No value.
    Failed(Failure),
    /// An answer that nobody waits for, to be dropped: its poll was ended by another one.
    Unexpected,
}

/// Why a poll brought no value. The upstream's fault, never a client's.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{}: {detail}", code.as_str())]
pub struct Failure {
    /// The stable code.
    pub code: UpstreamCode,
    /// The status, where `code` is [`UpstreamCode::Status`].
    pub status: Option<u16>,
    /// What happened, for the operator's log; holds nothing secret.
    pub detail: String,
}

pub use crate::codec::message::StreamState;

/// A [`StreamState`] and what goes with it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Status {
    /// The state.
    pub state: StreamState,
    /// Why the last poll failed, where it did.
    pub code: Option<UpstreamCode>,
    /// The upstream's status, where `code` is [`UpstreamCode::Status`].
    pub status: Option<u16>,
    /// Until the next poll, where the last one failed and the next is planned.
    pub retry_in: Option<Duration>,
}

/// How a stream stands with its upstream, for the one that takes its place.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Record {
    /// When its last poll began.
    pub last_start: Option<Instant>,
    /// Until when it waits after a failure.
    pub backoff_until: Option<Instant>,
    /// Its failures in a row.
    pub failures: u32,
    /// How its last poll failed, where it did: the code, and the status.
    pub failure: Option<(UpstreamCode, Option<u16>)>,
}

impl Record {
    /// What of it holds where the stream has been configured anew: a failure that may have come of the configuration does not.
    pub fn after_a_change(self) -> Record {
        use UpstreamCode::{Blocked, Body, Redirect, Tls, TooLarge};
        match self.failure {
            Some((Blocked | Body | Redirect | Tls | TooLarge, _)) => {
                Record { last_start: self.last_start, ..Record::default() }
            }
            _ => self,
        }
    }
}

/// The poll loop of one stream.
///
/// - [`start`](Poller::start) with the first watcher, [`stop`](Poller::stop) after the last;
/// - at [`next_due`](Poller::next_due), [`begin`](Poller::begin) a poll and send its request;
/// - each poll begun is answered by one call of [`fetched`](Poller::fetched), also after `stop` (a fetch given up is an
///   error), and each [`Judged::Body`] by one of [`accept`](Poller::accept) or [`refuse`](Poller::refuse);
/// - after each of these, [`status_change`](Poller::status_change) says whether to send a `stream_status`.
///
/// **Interval and phase.** The first poll is at once. The next start is the first moment of the stream's own phase
/// (a place in the interval drawn from `seed`, on the monotonic clock) at least half an interval after the last start, so within [1/2, 3/2) of an
/// interval; from then on starts are one interval apart, and a late one does not shift those after it. So a thousand
/// streams that were started together do not poll together. A poll that takes longer than the interval is followed at
/// once by one poll, not by those it missed.
///
/// **Backoff.** After the n-th failure in a row the wait, from the answer on, is uniform in 0..=min(`backoff_max`,
/// base * 2^n), but at least the interval; base is the interval, at least [`BACKOFF_BASE_MIN`]. `Retry-After` of any 4xx
/// or 5xx is a minimum that nothing shortens, at most [`RETRY_AFTER_MAX`]. The first success ends it.
#[derive(Debug)]
pub struct Poller {
    interval: Duration,
    /// From the last poll to the first after polling has begun again.
    restart: Duration,
    backoff_max: Duration,
    conditional: bool,
    /// The stream's place in its interval: a part of it, of 2^64.
    phase: u64,
    /// What else its polls go by, where there is something.
    pace: Option<Box<Pace>>,
    /// Where polls are answered by what the upstream sends whenever it does: the least time from one to the next.
    gap: Option<Duration>,
    /// There, too: the least time from the end of a connection to the next one, by the upstream's own word.
    reconnect: Option<Duration>,
    jitter: SplitMix64,
    turn: Turn,
    /// Whether polls go on: someone watches.
    running: bool,
    /// Whether an administrator has stopped it: no poll is planned, whoever watches.
    paused: bool,
    /// The poll that follows the one under way does not start before this.
    again_from: Option<Instant>,
    /// Whether a poll was asked for that has not begun: where nobody watches, it is made for the next who does.
    owed: bool,
    last_no: PollNo,
    last_start: Option<Instant>,
    /// No poll starts before this: the wait after a failure.
    backoff_until: Option<Instant>,
    /// No poll starts before this, not even one asked for: the upstream's `Retry-After`.
    retry_after_until: Option<Instant>,
    /// When leave is hoped for that the poll which is due waits for.
    hoped: Option<Instant>,
    /// Failures in a row.
    failures: u32,
    /// Of the value held; sent with the next poll.
    validators: Validators,
    value_held: bool,
    ended: bool,
    /// Why the last poll failed, where it did.
    failure: Option<(UpstreamCode, Option<u16>)>,
    /// Whether it was for want of a token.
    lacks_token: bool,
    /// The state subscribers were last told.
    told: StreamState,
}

#[derive(Debug)]
enum Turn {
    /// No poll is planned.
    Idle,
    /// The next is planned; `asked`: for a reason of its own, such as a first watcher, not by the interval.
    Waiting { due: Instant, asked: bool },
    /// The shell has the request.
    Fetching { started: Instant, conditional: bool, again: bool },
    /// The body is being parsed.
    Judging { started: Instant, validators: Validators, again: bool },
}

impl Poller {
    /// A loop that has not been started and holds no value.
    pub fn new(options: PollOptions) -> Poller {
        let interval = options.interval.max(INTERVAL_MIN);
        let mut jitter = SplitMix64(options.seed);
        Poller {
            interval,
            restart: interval.min(options.restart_min),
            backoff_max: options.backoff_max.max(interval),
            conditional: options.conditional,
            phase: jitter.next(),
            pace: None,
            gap: None,
            reconnect: None,
            jitter,
            turn: Turn::Idle,
            running: false,
            paused: false,
            again_from: None,
            owed: false,
            last_no: PollNo(0),
            last_start: None,
            backoff_until: None,
            retry_after_until: None,
            hoped: None,
            failures: 0,
            validators: Validators::default(),
            value_held: false,
            ended: false,
            failure: None,
            lacks_token: false,
            told: StreamState::Live,
        }
    }

    /// Counts polls from behind `no` on: where pollers follow each other at one place, none takes another's answer for its own.
    pub fn numbered_from(mut self, no: PollNo) -> Poller {
        self.last_no = no;
        self
    }

    /// Goes by this pace too.
    pub fn at_pace(mut self, pace: Option<Pace>) -> Poller {
        self.pace = pace.map(Box::new);
        self
    }

    /// Is answered by what the upstream sends, whenever it does: the next poll is begun so long after that.
    pub fn following(mut self, gap: Option<Duration>) -> Poller {
        self.gap = gap;
        self
    }

    /// How it stands with its upstream.
    pub fn record(&self) -> Record {
        let Poller { last_start, backoff_until, failures, failure, .. } = *self;
        // What an administrator or the day's windows have stopped is no failure.
        let failure = failure.filter(|(code, _)| *code != UpstreamCode::Stopped);
        Record { last_start, backoff_until, failures, failure }
    }

    /// Goes on, before it is started, where the stream before it has left off: it keeps to that one's wait after a failure, and
    /// `restart_min` from its last poll. `alone_until`: until when the upstream wants to be left alone, which that failure may have
    /// said.
    pub fn take_up(&mut self, now: Instant, left: Record, alone_until: Option<Instant>) {
        self.last_start = left.last_start;
        if let Some(until) = left.backoff_until.filter(|until| *until > now) {
            self.backoff_until = Some(until.min(now + self.backoff_max));
            (self.failures, self.failure) = (left.failures, left.failure);
            self.retry_after_until = alone_until;
            // Its watchers were told.
            self.told = left.failure.map_or(self.told, |_| StreamState::Failing);
        }
    }

    /// Whether its upstream is to be left alone for a while.
    pub fn is_put_off(&self, now: Instant) -> bool {
        self.backoff_until.max(self.retry_after_until).is_some_and(|until| until > now)
    }

    /// Nobody waits for the poll under way any more, which may have no end: its number, to be given up.
    pub fn give_up(&mut self) -> Option<PollNo> {
        if matches!(self.turn, Turn::Fetching { .. }) {
            self.turn = Turn::Idle;
        }
        Some(self.last_no)
    }

    /// When the next poll may begin where polling has ended and begins again; `None`: at once.
    pub fn rests_until(&self) -> Option<Instant> {
        self.last_start.map(|last| last + self.restart)
    }

    /// When the last poll began; `None`: none has.
    pub fn last_start(&self) -> Option<Instant> {
        self.last_start
    }

    /// Goes on from a loop of the same stream that was forgotten: its last poll began then.
    pub fn started_before(&mut self, at: Instant) {
        self.last_start = self.last_start.max(Some(at));
    }

    /// Someone watches: polls at once, except that the wait after a failure and `restart_min` go on; of these `restart_min`
    /// alone where a poll was asked for meanwhile. Where it runs already, nothing changes; a poll still under way since before
    /// a `stop` is taken as the first.
    pub fn start(&mut self, now: Instant) {
        if self.running || self.ended {
            return;
        }
        self.running = true;
        if matches!(self.turn, Turn::Idle) && !self.paused {
            let spaced = self.spaced_from(now);
            let own = if self.owed { [None, None] } else { [self.fresh_until(), self.backoff_until] };
            let waits = [Some(now), Some(spaced), self.retry_after_until].into_iter().chain(own);
            self.turn = Turn::Waiting { due: waits.flatten().max().unwrap_or(now), asked: true };
        }
    }

    /// Nobody watches: plans no further poll. The answer of one under way is judged as ever.
    pub fn stop(&mut self) {
        self.running = false;
        self.hoped = None;
        match &mut self.turn {
            Turn::Waiting { .. } => self.turn = Turn::Idle,
            Turn::Fetching { again, .. } | Turn::Judging { again, .. } => *again = false,
            Turn::Idle => {}
        }
    }

    /// An administrator stops it: no poll is planned until [`Poller::resume`], and the answer of one under way is not taken,
    /// so that what is held stays as it was told. It goes on counting whether someone watches.
    pub fn pause(&mut self) {
        self.paused = true;
        self.hoped = None;
        self.turn = Turn::Idle;
    }

    /// An administrator starts it again: polls at once where someone watches, whatever the backoff says, but not before the
    /// upstream's `Retry-After`, nor sooner after the last poll than `restart_min` allows. Until that poll has ended its
    /// watchers are told what they were.
    pub fn resume(&mut self, now: Instant) {
        if !std::mem::take(&mut self.paused) || self.ended {
            return;
        }
        self.backoff_until = None;
        self.failure = None;
        if self.running {
            self.failure = Some((UpstreamCode::Stopped, None));
            let due = self.spaced_from(now).max(self.retry_after_until.unwrap_or(now));
            self.turn = Turn::Waiting { due, asked: true };
        }
    }

    /// When a poll may start that no interval has planned: not at once where one has just started.
    fn spaced_from(&self, now: Instant) -> Instant {
        self.rests_until().map_or(now, |until| until.max(now))
    }

    /// Whether an administrator has stopped it.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// The stream was deleted: stops for good.
    pub fn end(&mut self) {
        self.stop();
        self.ended = true;
    }

    /// Polls at once (a hook, an action, the admin), whatever the interval and the backoff say, but not before the
    /// upstream's `Retry-After`. While one is under way, which may have missed the change, one more follows it, however
    /// often this is called. Says whether a poll will follow: not while it is stopped, when the next watcher starts one.
    pub fn poll_now(&mut self, now: Instant) -> bool {
        self.owed = true;
        match &mut self.turn {
            Turn::Idle => return false,
            Turn::Waiting { due, asked } => {
                *due = self.retry_after_until.map_or(now, |at| at.max(now)).min(*due);
                *asked = true;
            }
            Turn::Fetching { again, .. } | Turn::Judging { again, .. } => {
                *again = self.running;
                self.again_from = None;
            }
        }
        self.running
    }

    /// As [`Poller::poll_now`] for those outside, who may ask as often as they like: such polls start at least
    /// [`REFRESH_INTERVAL`] apart from the poll before. Each poll that is asked for is made, be it one for many.
    pub fn poll_soon(&mut self, now: Instant) -> bool {
        self.owed = true;
        let from = self.last_start.map_or(now, |last| (last + REFRESH_INTERVAL).max(now));
        match &mut self.turn {
            Turn::Idle => return false,
            Turn::Waiting { due, asked } => {
                *due = self.retry_after_until.map_or(from, |at| at.max(from)).min(*due);
                *asked = true;
            }
            Turn::Fetching { again, .. } | Turn::Judging { again, .. } => {
                if !*again {
                    *again = self.running;
                    self.again_from = Some(from);
                }
            }
        }
        self.running
    }

    /// Until when the value held is fresh by the upstream's word.
    fn fresh_until(&self) -> Option<Instant> {
        self.pace.as_ref().and_then(|pace| pace.fresh_until()).filter(|_| self.value_held)
    }

    /// Whether the value held is the newest that is to be had: it is fresh by the upstream's word, and nobody has asked for a
    /// poll since, or none is made at this time of the day.
    pub fn holds_newest(&self, now: Now) -> bool {
        let fresh = !self.owed && self.fresh_until().is_some_and(|until| until > now.at);
        fresh || (self.value_held && self.closed_until(now).is_some())
    }

    /// When to call [`Poller::begin`]; `None`: not before something else happens.
    pub fn next_due(&self) -> Option<Instant> {
        match self.turn {
            Turn::Waiting { due, .. } => Some(due),
            _ => None,
        }
    }

    /// Until when, where it is now, no poll is to begin for a window of the day that has none.
    pub fn closed_until(&self, now: Now) -> Option<Instant> {
        self.pace.as_ref().and_then(|pace| pace.closed_until(now))
    }

    /// The poll that is due may not begin yet, and is to be asked for again at `look`; that it may at `until` is what can be hoped
    /// for. With a `failure` that is as if it had been made, but for the back-off.
    pub fn hold(&mut self, look: Instant, until: Instant, failure: Option<&Failure>) {
        if let Turn::Waiting { due, .. } = &mut self.turn {
            *due = look.max(*due);
            self.hoped = Some(until);
            if let Some(failure) = failure {
                self.failure = Some((failure.code, failure.status));
            }
        }
    }

    /// The poll that is due may not begin before `until`, for a window of the day that has none. Where no value is held, whoever
    /// waits for one is to be told so.
    pub fn hold_closed(&mut self, now: Now, until: Instant) -> Option<Failure> {
        let opens_at = self.pace.as_ref().and_then(|pace| pace.opens_at(now)).unwrap_or(until);
        let failure = (!self.value_held).then(|| {
            let detail = "no poll is made at this time of the day".to_owned();
            Failure { code: UpstreamCode::Stopped, status: None, detail }
        });
        self.hold(until, opens_at, failure.as_ref());
        failure
    }

    /// Whether the last value is held.
    pub fn holds_value(&self) -> bool {
        self.value_held
    }

    /// Whether a value is held, and the last poll that was sent has not failed.
    pub fn works(&self) -> bool {
        self.failures == 0 && self.holds_value()
    }

    /// A poll has just succeeded, and what it brought has changed or not: plans the next by the pace, where there is one.
    pub fn paced(&mut self, now: Now, changed: bool) {
        let Some(pace) = &mut self.pace else { return };
        pace.succeeded(changed);
        let (interval, stays) = pace.interval(now);
        let interval = interval.max(INTERVAL_MIN);
        let (fresh_until, started) = (pace.fresh_until(), self.last_start.unwrap_or(now.at));
        if !matches!(self.turn, Turn::Waiting { asked: false, .. }) {
            return;
        }
        let next = if stays { self.in_phase(interval, started + interval / 2) } else { started + interval };
        let mut due = next.max(now.at);
        if let Some(change) = self.pace.as_ref().and_then(|pace| pace.change_before(now, due)) {
            // All streams with that window come together there.
            due = change + part(self.phase, self.interval.min(CHANGE_SPREAD));
        }
        self.turn = Turn::Waiting { due: due.max(fresh_until.unwrap_or(due)), asked: false };
    }

    /// Whether a poll's answer, or the judgement of its body, is awaited.
    pub fn is_polling(&self) -> bool {
        matches!(self.turn, Turn::Fetching { .. } | Turn::Judging { .. })
    }

    /// Whether the last poll was not sent because there was no token for it: an upstream's own 401 or 403 is an answer.
    pub fn lacks_token(&self) -> bool {
        self.lacks_token
    }

    /// Whether polls go on.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Starts the poll that is due: its number, and what to make the request conditional on. `None`: none is due.
    pub fn begin(&mut self, now: Instant) -> Option<(PollNo, Validators)> {
        self.next_due().filter(|&due| due <= now)?;
        self.last_no = PollNo(self.last_no.0 + 1);
        self.last_start = Some(now);
        self.owed = false;
        self.hoped = None;
        let validators = self.validators.clone();
        // One that is followed is confirmed by being reached.
        let conditional = validators.is_some() || (self.gap.is_some() && self.value_held);
        self.turn = Turn::Fetching { started: now, conditional, again: false };
        Some((self.last_no, validators))
    }

    /// Judges the answer of poll `no`.
    pub fn fetched(&mut self, now: Instant, no: PollNo, result: FetchResult) -> Judged {
        let Turn::Fetching { started, conditional, again } = self.turn else { return Judged::Unexpected };
        if no != self.last_no {
            return Judged::Unexpected;
        }
        self.lacks_token = matches!(&result, Err(error) if error.code == UpstreamCode::Auth);
        let response = match result {
            Ok(response) => response,
            Err(FetchError { code, detail }) => {
                return Judged::Failed(self.fail(now, again, self.reconnect, Failure { code, status: None, detail }));
            }
        };
        if self.gap.is_some() && matches!(response.status, 200 | 304) {
            self.reconnect = response.retry_after;
        }
        if let Some(pace) = &mut self.pace {
            pace.heard(now, response.fresh_for, response.status == 304);
        }
        match verdict(&response, conditional) {
            Verdict::Value => {
                self.turn = Turn::Judging { started, validators: response.validators, again };
                Judged::Body { bytes: response.body, received: response.received }
            }
            Verdict::NotModified => {
                // What is followed moves on by events that are no values, too.
                if self.gap.is_some() && self.value_held && response.validators.etag.is_some() {
                    self.validators = bounded(response.validators);
                }
                // Where the value was evicted meanwhile, what was not modified is fetched again, without a condition.
                self.succeed(now, started, again || !self.value_held);
                Judged::NotModified
            }
            Verdict::Failure(failure) => {
                if response.status == 304 {
                    // It answers a condition that was not put: the next poll puts none either.
                    self.validators = Validators::default();
                }
                let retry_after = response.asks_to_be_left_alone();
                Judged::Failed(self.fail(now, again, retry_after.max(self.reconnect), failure))
            }
        }
    }

    /// The body of poll `no` is the value now, whether it changed or not: the next poll is conditional on its validators.
    /// Says whether the poll was the one being judged.
    pub fn accept(&mut self, now: Instant, no: PollNo) -> bool {
        let Turn::Judging { started, validators, again } = &mut self.turn else { return false };
        if no != self.last_no {
            return false;
        }
        let (started, validators, again) = (*started, std::mem::take(validators), *again);
        self.validators = if self.conditional { bounded(validators) } else { Validators::default() };
        self.value_held = true;
        self.succeed(now, started, again);
        true
    }

    /// The body of poll `no` is no value (`Body`, or `TooLarge` where a bound of the value was passed): a failure like any
    /// other, which leaves the validators of the value that is held. `None`: the poll was not the one being judged.
    pub fn refuse(&mut self, now: Instant, no: PollNo, code: UpstreamCode, detail: String) -> Option<Failure> {
        let Turn::Judging { again, .. } = self.turn else { return None };
        (no == self.last_no).then(|| self.fail(now, again, None, Failure { code, status: None, detail }))
    }

    /// The value was evicted: the next poll is unconditional, and a failure is `failing`, not `stale`.
    pub fn forget_value(&mut self) {
        self.value_held = false;
        if let Some(pace) = &mut self.pace {
            pace.forget();
        }
        self.validators = Validators::default();
    }

    /// The next poll is unconditional: the value is to be looked at again.
    pub fn forget_validators(&mut self) {
        self.validators = Validators::default();
    }

    /// The state and what goes with it, for a new subscriber where it is not `Live`.
    pub fn status(&self, now: Instant) -> Status {
        let (state, failure) = match self.failure {
            _ if self.ended => (StreamState::Ended, None),
            _ if self.paused => {
                let state = if self.value_held { StreamState::Stale } else { StreamState::Failing };
                (state, Some((UpstreamCode::Stopped, None)))
            }
            None => (StreamState::Live, None),
            Some(failure) if self.value_held => (StreamState::Stale, Some(failure)),
            Some(failure) => (StreamState::Failing, Some(failure)),
        };
        Status {
            state,
            code: failure.map(|(code, _)| code),
            status: failure.and_then(|(_, status)| status),
            retry_in: failure.and_then(|_| self.next_due()).map(|due| self.hoped.unwrap_or(due).max(due).since(now)),
        }
    }

    /// The status, once after each change of its state: another code in the same state is no change.
    pub fn status_change(&mut self, now: Instant) -> Option<Status> {
        let status = self.status(now);
        let changed = status.state != self.told;
        self.told = status.state;
        changed.then_some(status)
    }

    fn succeed(&mut self, now: Instant, started: Instant, again: bool) {
        self.failures = 0;
        self.failure = None;
        self.backoff_until = None;
        self.retry_after_until = None;
        let planned = match self.gap {
            Some(gap) => now + gap,
            None => self.in_phase(self.interval, started + self.interval / 2).max(now),
        };
        let asked = again.then(|| self.again_from.take().map_or(now, |from| from.max(now)));
        let due = asked.map_or(planned, |asked| asked.min(planned));
        self.turn = if self.running { Turn::Waiting { due, asked: again } } else { Turn::Idle };
    }

    fn fail(&mut self, now: Instant, again: bool, retry_after: Option<Duration>, failure: Failure) -> Failure {
        self.failures = self.failures.saturating_add(1);
        self.failure = Some((failure.code, failure.status));
        let base = self.interval.max(BACKOFF_BASE_MIN);
        let ceiling = base.saturating_mul(1u32.checked_shl(self.failures).unwrap_or(u32::MAX)).min(self.backoff_max);
        let wait = Duration::from_micros(self.jitter.below(micros(ceiling).saturating_add(1))).max(self.interval);
        let backoff_until = now + wait;
        let retry_after_until = now + retry_after.unwrap_or_default().min(RETRY_AFTER_MAX);
        self.backoff_until = Some(backoff_until);
        self.retry_after_until = Some(retry_after_until);
        let planned = backoff_until.max(retry_after_until);
        let asked = again.then(|| self.again_from.take().map_or(retry_after_until, |from| from.max(retry_after_until)));
        let due = asked.map_or(planned, |asked| asked.min(planned));
        self.turn = if self.running { Turn::Waiting { due, asked: again } } else { Turn::Idle };
        failure
    }

    /// The first moment of the stream's phase in `interval` that is not before `at`.
    fn in_phase(&self, interval: Duration, at: Instant) -> Instant {
        let (interval_us, phase_us) = (micros(interval), micros(part(self.phase, interval)));
        let intervals_us = at.as_micros().saturating_sub(phase_us).div_ceil(interval_us).saturating_mul(interval_us);
        Instant::from_micros(phase_us.saturating_add(intervals_us))
    }
}

enum Verdict {
    Value,
    NotModified,
    Failure(Failure),
}

/// What a response is by its status. `conditional`: the request had validators.
fn verdict(response: &FetchResponse, conditional: bool) -> Verdict {
    let failure = |code, detail: String| {
        let status = (code == UpstreamCode::Status).then_some(response.status);
        Verdict::Failure(Failure { code, status, detail })
    };
    match response.status {
        // RFC 9110 section 15.3.7: a part of the representation, which nobody asked for.
        206 => failure(UpstreamCode::Protocol, "answered 206 to a request without Range".into()),
        200..=299 if response.body.is_empty() => {
            failure(UpstreamCode::Body, format!("answered {} without a body", response.status))
        }
        204 | 205 => failure(UpstreamCode::Body, format!("answered {}, which has no body", response.status)),
        200..=299 => Verdict::Value,
        304 if conditional => Verdict::NotModified,
        304 => failure(UpstreamCode::Protocol, "answered 304 to a request without a condition".into()),
        300..=399 => {
            failure(UpstreamCode::Redirect, format!("answered {}: redirects are not followed", response.status))
        }
        400..=599 => {
            let until = if response.retry_after.is_some() { " with a time to come back" } else { "" };
            failure(response.failure_code(), format!("answered {}{until}", response.status))
        }
        // RFC 9110 section 15: outside 100..=599 a status is invalid, and a 1xx is never the last answer.
        _ => failure(UpstreamCode::Protocol, format!("answered {}, which is no final status", response.status)),
    }
}

/// `validators` without those that cannot be sent back with each request: too long, or of bytes that no header carries (an
/// event's id may hold any).
fn bounded(validators: Validators) -> Validators {
    let fits = |value: &[u8]| {
        (1..=VALIDATOR_BYTES_MAX).contains(&value.len()) && value.iter().all(|&byte| is_value_byte(byte))
    };
    Validators {
        etag: validators.etag.filter(|etag| fits(etag)),
        last_modified: validators.last_modified.filter(|date| fits(date)),
        place: validators.place,
    }
}

/// So much of `span`, of 2^64.
fn part(part: u64, span: Duration) -> Duration {
    Duration::from_micros(((u128::from(part) * u128::from(micros(span))) >> 64) as u64)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Steele, Lea and Flood, «Fast Splittable Pseudorandom Number Generators» (2014). For spreading load only.
#[derive(Clone, Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in `0..bound`, but for a bias of at most `bound / 2^64`.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// The stable codes of `stream_status` (protocol section 3).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum UpstreamCode {
    /// A time-out: connect, first byte or whole exchange.
    Timeout,
    /// No connection: refused, reset, no route.
    Unreachable,
    /// The name does not resolve.
    Dns,
    /// The TLS handshake failed: certificate, name, version.
    Tls,
    /// A status that is no value.
    Status,
    /// Not HTTP/1.1 as RFC 9112 has it, or cut short.
    Protocol,
    /// Not a JSON value as section 3 has it, or a content coding that does not decode.
    Body,
    /// Over `response_bytes_max`.
    TooLarge,
    /// 401 or 403, or no token to ask with.
    Auth,
    /// 429, or 403 or 503 with `Retry-After`.
    RateLimited,
    /// A redirect, which is not followed.
    Redirect,
    /// The target is not allowed.
    Blocked,
    /// No fault of the upstream's: an administrator has stopped the stream, or a window of the day has no polls.
    Stopped,
}

impl UpstreamCode {
    /// Every code that a poll may end with, in the order of the protocol.
    pub const ALL: [UpstreamCode; 12] = [
        UpstreamCode::Timeout,
        UpstreamCode::Unreachable,
        UpstreamCode::Dns,
        UpstreamCode::Tls,
        UpstreamCode::Status,
        UpstreamCode::Protocol,
        UpstreamCode::Body,
        UpstreamCode::TooLarge,
        UpstreamCode::Auth,
        UpstreamCode::RateLimited,
        UpstreamCode::Redirect,
        UpstreamCode::Blocked,
    ];

    /// Its spelling on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            UpstreamCode::Timeout => "UPSTREAM_TIMEOUT",
            UpstreamCode::Unreachable => "UPSTREAM_UNREACHABLE",
            UpstreamCode::Dns => "UPSTREAM_DNS",
            UpstreamCode::Tls => "UPSTREAM_TLS",
            UpstreamCode::Status => "UPSTREAM_STATUS",
            UpstreamCode::Protocol => "UPSTREAM_PROTOCOL",
            UpstreamCode::Body => "UPSTREAM_BODY",
            UpstreamCode::TooLarge => "UPSTREAM_TOO_LARGE",
            UpstreamCode::Auth => "UPSTREAM_AUTH",
            UpstreamCode::RateLimited => "UPSTREAM_RATE_LIMITED",
            UpstreamCode::Redirect => "UPSTREAM_REDIRECT",
            UpstreamCode::Blocked => "UPSTREAM_BLOCKED",
            UpstreamCode::Stopped => "STOPPED",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START_MS: u64 = 5_000_123;

    /// A poller and its clock, for scripts.
    struct Script {
        poller: Poller,
        now: Instant,
    }

    fn options(interval_ms: u64) -> PollOptions {
        PollOptions {
            interval: Duration::from_millis(interval_ms),
            restart_min: RESTART_MIN,
            backoff_max: Duration::from_secs(60),
            conditional: true,
            seed: 7,
        }
    }

    fn script(options: PollOptions) -> Script {
        let mut script = Script { poller: Poller::new(options), now: Instant::from_micros(START_MS * 1_000) };
        script.start();
        script
    }

    fn answer(status: u16) -> FetchResponse {
        let received = WallTime::from_secs(9);
        let validators = Validators::default();
        FetchResponse { status, validators, retry_after: None, fresh_for: None, body: b"{}".to_vec(), received }
    }

    fn tagged(etag: &[u8]) -> FetchResponse {
        let validators = Validators { etag: Some(etag.into()), ..Validators::default() };
        FetchResponse { validators, ..answer(200) }
    }

    fn refused() -> FetchResult {
        Err(FetchError { code: UpstreamCode::Unreachable, detail: "connection refused".into() })
    }

    impl Script {
        fn after_ms(&mut self, ms: u64) -> &mut Script {
            self.now = self.now + Duration::from_millis(ms);
            self
        }

        fn start(&mut self) {
            self.poller.start(self.now);
        }

        fn poll_now(&mut self) -> bool {
            self.poller.poll_now(self.now)
        }

        /// Waits for the next poll and begins it; the wait, and what the request is conditional on.
        fn begin(&mut self) -> (Duration, PollNo, Validators) {
            let due = self.poller.next_due().expect("a poll is planned");
            let wait = due.since(self.now);
            self.now = self.now.max(due);
            let (no, validators) = self.poller.begin(self.now).expect("the poll is due");
            assert_eq!(self.poller.begin(self.now), None, "one at a time");
            assert_eq!(self.poller.next_due(), None, "nothing is due while a poll is under way");
            (wait, no, validators)
        }

        fn answer(&mut self, no: PollNo, result: FetchResult) -> Judged {
            let judged = self.poller.fetched(self.now, no, result);
            if let Judged::Body { .. } = judged {
                assert!(self.poller.accept(self.now, no));
            }
            judged
        }

        /// A whole poll; how long it was waited for.
        fn poll(&mut self, result: FetchResult) -> Duration {
            let (wait, no, _) = self.begin();
            self.answer(no, result);
            wait
        }

        fn failure(&mut self, result: FetchResult) -> (UpstreamCode, Option<u16>) {
            let (_, no, _) = self.begin();
            match self.answer(no, result) {
                Judged::Failed(failure) => (failure.code, failure.status),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_first_poll_is_at_once_and_the_others_keep_the_interval() {
        let mut script = script(options(1_000));
        assert_eq!(script.poll(Ok(answer(200))), Duration::ZERO);
        let second = script.after_ms(20).poll(Ok(answer(200))) + Duration::from_millis(20);
        assert!((500..1_500).contains(&second.as_millis()), "{second:?}");
        let mut started = script.now;
        for took_ms in [0, 100, 999] {
            let (_, no, _) = script.begin();
            assert_eq!(script.now.since(started), Duration::from_secs(1), "from start to start");
            started = script.now;
            script.after_ms(took_ms).answer(no, Ok(answer(200)));
        }
    }

    #[test]
    fn a_late_start_does_not_shift_the_later_ones() {
        let mut script = script(options(1_000));
        script.poll(Ok(answer(200)));
        script.poll(Ok(answer(200)));
        let due = script.poller.next_due().expect("planned");
        script.now = due + Duration::from_millis(100); // one tick of the wheel
        let (_, no, _) = script.begin();
        script.answer(no, Ok(answer(200)));
        assert_eq!(script.poller.next_due(), Some(due + Duration::from_secs(1)));
    }

    #[test]
    fn a_poll_longer_than_the_interval_is_followed_by_one_at_once() {
        let mut script = script(options(100));
        let (_, no, _) = script.begin();
        script.after_ms(950).answer(no, Ok(answer(200)));
        assert_eq!(script.poll(Ok(answer(200))), Duration::ZERO);
        assert!(script.poll(Ok(answer(200))) >= Duration::from_millis(50), "those missed are not made up for");
    }

    #[test]
    fn a_thousand_streams_started_together_spread_over_their_interval() {
        let mut tenths = [0u32; 10];
        for seed in 0..1_000 {
            let mut script = script(PollOptions { seed, ..options(1_000) });
            script.poll(Ok(answer(200)));
            let wait = script.poll(Ok(answer(200)));
            tenths[(wait.as_millis() as usize - 500) / 100] += 1;
        }
        assert!(tenths.iter().all(|&polls| (60..=140).contains(&polls)), "{tenths:?}");
    }

    #[test]
    fn a_poller_is_small() {
        assert!(size_of::<Poller>() <= 320, "{}", size_of::<Poller>());
    }

    #[test]
    fn intervals_have_a_least_value() {
        let mut script = script(options(0));
        script.poll(Ok(answer(200)));
        let started = script.now;
        script.poll(Ok(answer(200)));
        script.poll(Ok(answer(200)));
        assert!(script.now.since(started) >= INTERVAL_MIN);
    }

    #[test]
    fn answers_are_judged_by_their_status() {
        use UpstreamCode::{Auth, Body, Protocol, RateLimited, Redirect, Status};
        for (status, expected) in [
            (206, (Protocol, None)),
            (204, (Body, None)),
            (205, (Body, None)),
            (304, (Protocol, None)),
            (300, (Redirect, None)),
            (301, (Redirect, None)),
            (399, (Redirect, None)),
            (400, (Status, Some(400))),
            (401, (Auth, None)),
            (403, (Auth, None)),
            (404, (Status, Some(404))),
            (429, (RateLimited, None)),
            (500, (Status, Some(500))),
            (503, (Status, Some(503))),
            (599, (Status, Some(599))),
            (600, (Protocol, None)),
            (999, (Protocol, None)),
            (199, (Protocol, None)),
            (0, (Protocol, None)),
        ] {
            assert_eq!(script(options(1_000)).failure(Ok(answer(status))), expected, "{status}");
        }
        for status in [200, 203, 299] {
            let mut script = script(options(1_000));
            let (_, no, _) = script.begin();
            let judged = script.poller.fetched(script.now, no, Ok(answer(status)));
            assert_eq!(judged, Judged::Body { bytes: b"{}".to_vec(), received: WallTime::from_secs(9) });
        }
        let empty = FetchResponse { body: Vec::new(), ..answer(200) };
        assert_eq!(script(options(1_000)).failure(Ok(empty)), (Body, None));
        let unavailable = FetchResponse { retry_after: Some(Duration::ZERO), ..answer(503) };
        assert_eq!(script(options(1_000)).failure(Ok(unavailable)), (RateLimited, None));
        let unauthorized = FetchResponse { retry_after: Some(Duration::ZERO), ..answer(401) };
        assert_eq!(script(options(1_000)).failure(Ok(unauthorized)), (Auth, None));
        for code in UpstreamCode::ALL {
            let error = FetchError { code, detail: "what happened".into() };
            assert_eq!(script(options(1_000)).failure(Err(error)), (code, None));
        }
    }

    #[test]
    fn a_403_that_says_when_to_come_back_was_once_taken_for_a_refused_credential_and_asked_again_sooner() {
        let mut script = script(options(1_000));
        let limited = FetchResponse { retry_after: Some(Duration::from_secs(90)), ..answer(403) };
        assert_eq!(script.failure(Ok(limited)), (UpstreamCode::RateLimited, None));
        let due = script.poller.next_due().expect("it goes on");
        assert!(due.since(script.now) >= Duration::from_secs(90), "{due:?}");
    }

    #[test]
    fn validators_are_those_of_the_value_held() {
        let mut script = script(options(1_000));
        let (_, no, validators) = script.begin();
        assert_eq!(validators, Validators::default(), "nothing is held");
        script.answer(no, Ok(tagged(b"\"one\"")));

        let (_, no, validators) = script.begin();
        assert_eq!(validators.etag.as_deref(), Some(&b"\"one\""[..]));
        assert!(matches!(script.poller.fetched(script.now, no, Ok(tagged(b"\"bad\""))), Judged::Body { .. }));
        let failure = script.poller.refuse(script.now, no, UpstreamCode::Body, "depth over 128".into());
        assert_eq!(failure.expect("it is being judged").to_string(), "UPSTREAM_BODY: depth over 128");

        let (_, no, validators) = script.begin();
        assert_eq!(validators.etag.as_deref(), Some(&b"\"one\""[..]), "a bad body does not poison them");
        assert_eq!(script.answer(no, Ok(answer(304))), Judged::NotModified);

        let (_, no, validators) = script.begin();
        assert_eq!(validators.etag.as_deref(), Some(&b"\"one\""[..]), "a 304 keeps them");
        script.answer(no, Ok(answer(200)));
        assert_eq!(script.begin().2, Validators::default(), "a value without validators has none");
    }

    #[test]
    fn a_304_that_was_not_asked_for_is_a_failure() {
        let mut script = script(options(1_000));
        script.poll(Ok(answer(200)));
        assert_eq!(script.failure(Ok(answer(304))), (UpstreamCode::Protocol, None));
    }

    #[test]
    fn a_304_for_a_value_evicted_meanwhile_is_fetched_again_at_once() {
        let mut script = script(options(1_000));
        script.poll(Ok(tagged(b"\"one\"")));
        let (_, no, _) = script.begin();
        script.poller.forget_value();
        assert_eq!(script.answer(no, Ok(answer(304))), Judged::NotModified);
        assert_eq!(script.poller.status_change(script.now), None);
        let (wait, _, validators) = script.begin();
        assert_eq!((wait, validators), (Duration::ZERO, Validators::default()));
    }

    #[test]
    fn other_methods_than_get_are_not_conditional() {
        let mut script = script(PollOptions { conditional: false, ..options(1_000) });
        script.poll(Ok(tagged(b"\"one\"")));
        assert_eq!(script.begin().2, Validators::default());
    }

    #[test]
    fn validators_longer_than_the_limit_are_not_sent_back() {
        for (bytes, kept) in [(VALIDATOR_BYTES_MAX, true), (VALIDATOR_BYTES_MAX + 1, false), (0, false)] {
            let mut script = script(options(1_000));
            script.poll(Ok(tagged(&vec![b'a'; bytes])));
            assert_eq!(script.begin().2.etag.is_some(), kept, "{bytes}");
        }
    }

    #[test]
    fn failures_back_off_with_jitter_and_a_success_ends_it() {
        let mut longest = Duration::ZERO;
        let mut script = script(options(1_000));
        script.poll(refused());
        for n in 1..40 {
            let wait = script.poll(refused());
            let ceiling = Duration::from_secs(60).min(Duration::from_secs(1 << n.min(10)));
            assert!((Duration::from_secs(1)..=ceiling).contains(&wait), "{wait:?} after {n} failures");
            longest = longest.max(wait);
        }
        assert!(longest > Duration::from_secs(30), "it grows: {longest:?}");
        script.poll(Ok(answer(200)));
        assert!(script.poll(refused()) < Duration::from_millis(1_500), "the interval again");
        assert!(script.poll(refused()) <= Duration::from_secs(2), "and the backoff from its beginning");
    }

    #[test]
    fn the_backoff_of_short_and_long_intervals_has_its_bounds() {
        let mut quick = script(options(1));
        let waits: Vec<_> = (0..8).map(|_| quick.poll(refused())).collect();
        assert!(waits.iter().max() > Some(&Duration::from_millis(100)), "{waits:?}");
        let mut slow = script(options(3_600_000));
        slow.poll(refused());
        assert_eq!(slow.poll(refused()), Duration::from_secs(3_600), "not under the interval, though over backoff_max");
    }

    #[test]
    fn retry_after_is_a_minimum_up_to_a_day() {
        for (status, asked_s, least_s, most_s) in [
            (429, 120, 120, 120),
            (503, 120, 120, 120),
            (403, 120, 120, 120),
            (429, 86_400, 86_400, 86_400),
            (429, 86_401, 86_400, 86_400),
            (500, 120, 120, 120),
            (302, 120, 1, 2),
        ] {
            let mut script = script(options(1_000));
            script.poll(Ok(FetchResponse { retry_after: Some(Duration::from_secs(asked_s)), ..answer(status) }));
            let wait = script.poller.next_due().expect("planned").since(script.now).as_secs_f64();
            assert!((least_s as f64..=most_s as f64).contains(&wait), "{status} {asked_s}: {wait}");
        }
    }

    #[test]
    fn asking_for_a_poll_shortens_the_wait_but_not_the_upstreams_own() {
        let mut script = script(options(60_000));
        script.poll(refused());
        assert!(script.poll_now());
        assert_eq!(script.poll(Ok(answer(200))), Duration::ZERO);
        assert!(script.after_ms(5).poll_now());
        let asked = FetchResponse { retry_after: Some(Duration::from_secs(90)), ..answer(429) };
        assert_eq!(script.poll(Ok(asked)), Duration::ZERO);
        assert!(script.poll_now());
        assert_eq!(script.poll(Ok(answer(200))), Duration::from_secs(90));
    }

    #[test]
    fn asking_while_a_poll_is_under_way_makes_one_more() {
        let mut script = script(options(60_000));
        let (_, no, _) = script.begin();
        for _ in 0..3 {
            assert!(script.poll_now());
        }
        assert!(matches!(script.poller.fetched(script.now, no, Ok(answer(200))), Judged::Body { .. }));
        assert!(script.poller.is_polling() && script.poller.next_due().is_none(), "its body is not judged yet");
        assert!(script.poller.accept(script.now, no));
        assert_eq!(script.poll(Ok(answer(200))), Duration::ZERO);
        assert!(script.poll(Ok(answer(200))) >= Duration::from_secs(30), "one, not three");
    }

    #[test]
    fn whoever_may_ask_as_often_as_they_like_gets_a_poll_a_tenth_of_a_second() {
        let mut script = script(options(60_000));
        script.poll(Ok(answer(200)));
        // Two tenths after the last: at once; the next within a tenth of that waits for it, however many ask.
        script.after_ms(200);
        assert!(script.poller.poll_soon(script.now));
        assert_eq!(script.poll(Ok(answer(200))), Duration::ZERO);
        script.after_ms(30);
        for _ in 0..3 {
            assert!(script.poller.poll_soon(script.now));
        }
        let (wait, no, _) = script.begin();
        assert_eq!(wait, REFRESH_INTERVAL - Duration::from_millis(30));
        // While it is under way: one more, a tenth after it began, or at once where it took longer.
        assert!(script.poller.poll_soon(script.now) && script.poller.poll_soon(script.now));
        script.after_ms(20).answer(no, Ok(answer(200)));
        let (wait, no, _) = script.begin();
        assert_eq!(wait, REFRESH_INTERVAL - Duration::from_millis(20));
        assert!(script.poller.poll_soon(script.now));
        script.after_ms(500).answer(no, refused());
        assert_eq!(script.poll(Ok(answer(200))), Duration::ZERO);
        assert!(script.poll(Ok(answer(200))) >= Duration::from_secs(29), "and no further ones");
        // An action's poll is not held back by those.
        let (_, no, _) = script.begin();
        assert!(script.poller.poll_soon(script.now) && script.poll_now());
        script.answer(no, Ok(answer(200)));
        assert_eq!(script.poll(Ok(answer(200))), Duration::ZERO);
        // Nor does anybody shorten what the upstream has asked for.
        let asked = FetchResponse { retry_after: Some(Duration::from_secs(90)), ..answer(429) };
        script.poll(Ok(asked));
        script.after_ms(1_000);
        assert!(script.poller.poll_soon(script.now));
        assert_eq!(script.poll(Ok(answer(200))), Duration::from_secs(89));
        script.poller.stop();
        assert!(!script.poller.poll_soon(script.now));
    }

    #[test]
    fn what_an_administrator_has_stopped_is_not_polled_until_it_is_resumed() {
        let mut script = script(options(1_000));
        script.poll(Ok(answer(200)));
        let (_, no, _) = script.begin();
        script.poller.pause();
        let stopped = |state| Status { state, code: Some(UpstreamCode::Stopped), status: None, retry_in: None };
        assert_eq!(script.poller.status_change(script.now), Some(stopped(StreamState::Stale)));
        assert_eq!(script.answer(no, Ok(answer(200))), Judged::Unexpected, "what was on its way is not taken");
        // Watchers come and go, and nobody has it polled.
        script.poller.stop();
        script.start();
        assert!(!script.poll_now() && !script.poller.poll_soon(script.now));
        assert_eq!((script.poller.next_due(), script.poller.is_polling()), (None, false));
        assert_eq!(script.poller.status_change(script.now), None);

        script.after_ms(60_000);
        script.poller.resume(script.now);
        assert_eq!(script.poller.status(script.now).state, StreamState::Stale, "it is not known to be well yet");
        assert_eq!(script.poll(Ok(answer(200))), Duration::ZERO);
        assert_eq!(script.poller.status_change(script.now).map(|status| status.state), Some(StreamState::Live));
        script.poller.resume(script.now);
        assert_eq!(script.poller.status(script.now).state, StreamState::Live, "twice is once");

        // The back-off ends with the stop; the upstream's own wish does not.
        let asked = FetchResponse { retry_after: Some(Duration::from_secs(90)), ..answer(429) };
        script.poll(Ok(asked));
        script.poller.pause();
        script.poller.resume(script.now);
        assert_eq!(script.poll(Ok(answer(200))), Duration::from_secs(90));
        // Where nobody watches, nothing is polled and nothing is wrong.
        script.poller.pause();
        script.poller.stop();
        script.poller.resume(script.now);
        assert_eq!((script.poller.next_due(), script.poller.status(script.now).state), (None, StreamState::Live));

        let mut cold = Poller::new(options(1_000));
        cold.pause();
        cold.start(script.now);
        assert_eq!(cold.status(script.now), stopped(StreamState::Failing));
        cold.resume(script.now);
        assert_eq!(cold.next_due(), Some(script.now));
    }

    #[test]
    fn stopped_and_started_again_and_again_it_polls_once_a_second() {
        for (interval_ms, spaced_ms) in [(200, 200), (3_600_000, 1_000)] {
            let mut script = script(options(interval_ms));
            script.poll(Ok(answer(200)));
            for _ in 0..5 {
                let started = script.now;
                for _ in 0..20 {
                    script.after_ms(1);
                    script.poller.pause();
                    script.poller.resume(script.now);
                }
                script.begin();
                assert_eq!(script.now.since(started), Duration::from_millis(spaced_ms), "{interval_ms}");
            }
        }
    }

    #[test]
    fn the_next_of_a_stream_goes_on_from_its_wait() {
        let mut script = script(options(10_000));
        script.poll(Ok(answer(500)));
        let left = script.poller.record();
        let until = left.backoff_until.expect("it waits");
        assert_eq!((left.failures, left.failure), (1, Some((UpstreamCode::Status, Some(500)))));
        let mut next = Poller::new(options(10_000));
        next.take_up(script.now, left, None);
        next.start(script.now);
        assert_eq!(next.next_due(), Some(until));
        let status = next.status(script.now);
        let told = (status.state, status.code, status.status, status.retry_in);
        let waits = Some(until.since(script.now));
        assert_eq!(told, (StreamState::Failing, Some(UpstreamCode::Status), Some(500), waits));
        assert!(next.poll_now(script.now), "whoever asks for it is not kept waiting");
        assert_eq!(next.next_due(), Some(script.now));
        // The longest wait is its own.
        let mut hasty = Poller::new(PollOptions { backoff_max: Duration::from_secs(1), ..options(100) });
        hasty.take_up(script.now, left, None);
        hasty.start(script.now);
        assert_eq!(hasty.next_due(), Some(script.now + Duration::from_secs(1)));
        // What the upstream has asked for counts where it is longer, and is what watchers are told.
        let (mut told, alone) = (Poller::new(options(10_000)), script.now + Duration::from_secs(600));
        told.take_up(script.now, left, Some(alone));
        told.start(script.now);
        assert_eq!(told.next_due(), Some(alone));
        told.poll_now(script.now);
        assert_eq!(told.next_due(), Some(alone), "whoever asks for it");
        assert_eq!(told.status(script.now).retry_in, Some(Duration::from_secs(600)));
        // What is over is over, but for the time between two polls.
        let mut late = Poller::new(options(10_000));
        late.take_up(until, left, None);
        late.start(until);
        assert_eq!((late.next_due(), late.status(until).state), (Some(until), StreamState::Live));
    }

    #[test]
    fn retry_after_of_any_failure_is_kept_to() {
        for status in [400, 401, 403, 404, 408, 429, 500, 502, 503, 504, 599] {
            let mut script = script(options(1_000));
            let asked = FetchResponse { retry_after: Some(Duration::from_secs(90)), ..answer(status) };
            script.poll(Ok(asked));
            script.poll_now();
            assert_eq!(script.begin().0, Duration::from_secs(90), "{status}");
        }
        for status in [200, 206, 302] {
            let mut script = script(options(1_000));
            let asked = FetchResponse { retry_after: Some(Duration::from_secs(90)), ..answer(status) };
            script.poll(Ok(asked));
            script.poll_now();
            assert_eq!(script.begin().0, Duration::ZERO, "{status}");
        }
    }

    #[test]
    fn a_stopped_loop_plans_nothing_and_its_last_answer_counts() {
        let mut script = script(options(1_000));
        let (_, no, _) = script.begin();
        script.poller.stop();
        assert!(!script.poll_now());
        assert!(matches!(script.answer(no, Ok(tagged(b"\"one\""))), Judged::Body { .. }));
        assert_eq!((script.poller.next_due(), script.poller.is_polling()), (None, false));
        assert!(!script.poll_now());
        script.after_ms(60_000).start();
        let (wait, _, validators) = script.begin();
        assert_eq!(wait, Duration::ZERO, "the first poll for a first watcher");
        assert!(validators.etag.is_some());
    }

    #[test]
    fn watchers_that_come_and_go_do_not_drive_the_upstream() {
        let mut quick = script(options(10_000));
        quick.poll(Ok(answer(200)));
        quick.poller.stop();
        quick.after_ms(300).start();
        assert_eq!(quick.poll(refused()), Duration::from_millis(700));
        let due = quick.poller.next_due();
        quick.poller.stop();
        quick.after_ms(2_000).start();
        assert_eq!(quick.poller.next_due(), due, "the backoff goes on");
    }

    #[test]
    fn a_watcher_who_returns_during_a_poll_is_served_by_it() {
        let mut script = script(options(1_000));
        let (_, no, _) = script.begin();
        script.poller.stop();
        script.start();
        assert_eq!(script.poller.begin(script.now), None, "still one at a time");
        script.answer(no, Ok(answer(200)));
        assert!(script.poller.next_due() > Some(script.now));
    }

    #[test]
    fn answers_nobody_waits_for_change_nothing() {
        let mut script = script(options(1_000));
        assert_eq!(script.poller.fetched(script.now, PollNo(1), refused()), Judged::Unexpected);
        let (_, no, _) = script.begin();
        assert_eq!(script.poller.fetched(script.now, PollNo(no.0 + 1), refused()), Judged::Unexpected);
        assert!(!script.poller.accept(script.now, no), "no body came yet");
        assert_eq!(script.poller.refuse(script.now, no, UpstreamCode::Body, String::new()), None);
        assert!(matches!(script.poller.fetched(script.now, no, Ok(answer(200))), Judged::Body { .. }));
        assert_eq!(script.poller.fetched(script.now, no, refused()), Judged::Unexpected, "answered once");
        assert!(!script.poller.accept(script.now, PollNo(9)));
        assert!(script.poller.accept(script.now, no));
        assert!(!script.poller.accept(script.now, no), "accepted once");
    }

    #[test]
    fn the_status_is_told_on_change_of_state_only() {
        let mut script = script(options(1_000));
        let told = |script: &mut Script| script.poller.status_change(script.now).map(|s| (s.state, s.code, s.status));
        assert_eq!(told(&mut script), None, "nothing is known yet");
        script.poll(refused());
        assert_eq!(told(&mut script), Some((StreamState::Failing, Some(UpstreamCode::Unreachable), None)));
        script.poll(Ok(answer(500)));
        assert_eq!(told(&mut script), None, "another code is no change of state");
        let status = script.poller.status(script.now);
        assert_eq!((status.code, status.status), (Some(UpstreamCode::Status), Some(500)), "a new subscriber sees it");
        assert_eq!(status.retry_in, script.poller.next_due().map(|due| due.since(script.now)));
        script.poll(Ok(tagged(b"\"one\"")));
        assert_eq!(told(&mut script), Some((StreamState::Live, None, None)));
        script.poll(Ok(answer(401)));
        assert_eq!(told(&mut script), Some((StreamState::Stale, Some(UpstreamCode::Auth), None)));
        script.poll(Ok(answer(304)));
        assert_eq!(told(&mut script), Some((StreamState::Live, None, None)), "a 304 confirms the value");
        script.poll(refused());
        script.poller.forget_value();
        assert_eq!(told(&mut script).map(|told| told.0), Some(StreamState::Failing), "no value is held any more");
        script.poller.end();
        assert_eq!(told(&mut script), Some((StreamState::Ended, None, None)));
        script.start();
        assert_eq!(script.poller.next_due(), None, "for good");
    }

    fn at_pace(interval_ms: u64, pacing: super::super::pace::Pacing) -> Script {
        let options = options(interval_ms);
        let poller = Poller::new(options).at_pace(Pace::new(&pacing, options.interval));
        let mut script = Script { poller, now: Instant::from_micros(START_MS * 1_000) };
        script.start();
        script
    }

    impl Script {
        fn both(&self) -> Now {
            Now { at: self.now, wall: WallTime::from_micros(self.now.as_micros()) }
        }

        /// A whole poll of a value that has changed or not; how long it was waited for.
        fn paced(&mut self, answer: FetchResponse, changed: bool) -> Duration {
            let wait = self.poll(Ok(answer));
            let now = self.both();
            self.poller.paced(now, changed);
            wait
        }
    }

    #[test]
    fn a_fresh_answer_is_not_asked_for_again_but_by_request() {
        let pacing = super::super::pace::Pacing { respect_max_age: true, ..Default::default() };
        let mut script = at_pace(1_000, pacing);
        let fresh = |s| FetchResponse { fresh_for: Some(Duration::from_secs(s)), ..answer(200) };
        script.paced(fresh(30), true);
        assert_eq!(script.paced(fresh(0), false), Duration::from_secs(30));
        assert!(script.paced(fresh(30), false) < Duration::from_millis(1_500), "the interval, where it is longer");
        script.poller.stop();
        script.after_ms(5_000).start();
        assert_eq!(script.paced(fresh(30), false), Duration::from_secs(25), "nor for a watcher who comes");
        assert!(script.poll_now());
        assert_eq!(script.paced(fresh(30), false), Duration::ZERO, "but for a hook");
        script.poller.stop();
        script.poller.forget_value();
        script.after_ms(5_000).start();
        assert_eq!(script.paced(answer(200), true), Duration::ZERO, "what is not held is not fresh");
        assert!(script.poll(refused()) < Duration::from_millis(1_500));
    }

    #[test]
    fn a_poll_that_was_asked_for_while_nobody_watched_is_made_for_the_next_who_does() {
        let pacing = super::super::pace::Pacing { respect_max_age: true, ..Default::default() };
        let mut script = at_pace(1_000, pacing);
        let fresh = || FetchResponse { fresh_for: Some(Duration::from_secs(3_600)), ..answer(200) };
        script.paced(fresh(), true);
        script.poller.stop();
        script.after_ms(5_000);
        assert!(!script.poll_now(), "nobody watches");
        script.after_ms(5_000).start();
        assert_eq!(script.paced(fresh(), true), Duration::ZERO, "fresh as it may be");
        // One that was under way may have missed the change, and one that was planned was not made.
        script.poll_now();
        let (_, no, _) = script.begin();
        script.poll_now();
        script.poller.stop();
        script.answer(no, Ok(fresh()));
        let now = script.both();
        script.poller.paced(now, false);
        script.after_ms(5_000).start();
        assert!(script.poller.poll_soon(script.now));
        script.poller.stop();
        script.after_ms(5_000).start();
        assert_eq!(script.paced(fresh(), true), Duration::ZERO);
        script.poller.stop();
        script.after_ms(5_000).start();
        assert!(script.paced(fresh(), true) > Duration::from_secs(3_000), "one, and not for everybody who comes");
        // The back-off holds nobody up either, but what the upstream has asked for does.
        script.poller.poll_now(script.now);
        let asked = FetchResponse { retry_after: Some(Duration::from_secs(90)), ..answer(429) };
        script.poll(Ok(asked));
        script.poller.stop();
        script.poll_now();
        script.after_ms(5_000).start();
        assert_eq!(script.poll(refused()), Duration::from_secs(85));
        script.poller.stop();
        script.poll_now();
        script.after_ms(2_000).start();
        assert_eq!(script.poll(Ok(answer(200))), Duration::ZERO);
    }

    #[test]
    fn a_moving_interval_is_counted_from_start_to_start() {
        use super::super::pace::{Adaptive, Pacing};
        let bounds = Adaptive { min: Duration::from_secs(1), max: Duration::from_secs(8) };
        let mut script = at_pace(4_000, Pacing { adaptive: Some(bounds), ..Default::default() });
        script.paced(answer(200), true);
        let waits: Vec<u64> = [true, true, false, false, false, false, false, false]
            .map(|changed| script.paced(answer(200), changed).as_millis() as u64)
            .to_vec();
        assert_eq!(waits, [2_000, 1_000, 1_000, 1_500, 2_250, 3_375, 5_062, 7_593]);
    }

    #[test]
    fn no_poll_begins_in_a_window_without_an_interval_and_the_next_one_has_its_own() {
        use super::super::pace::{EVERY_DAY, Pacing, Window};
        // START_MS is 01:23:20 and a bit of the clock here.
        let windows = vec![
            Window { from: 84, to: 85, days: EVERY_DAY, interval: None },
            Window { from: 85, to: 86, days: EVERY_DAY, interval: Some(Duration::from_secs(2)) },
        ];
        let mut script = at_pace(30_000, Pacing { windows, ..Default::default() });
        script.paced(answer(200), true);
        let until = |script: &Script| script.poller.closed_until(script.both());
        assert_eq!(until(&script), None);
        script.paced(answer(200), true);
        let due = script.poller.next_due().expect("planned");
        script.now = due;
        let closed = until(&script).expect("it is 01:24");
        assert_eq!(closed.as_micros() % 60_000_000, 0);
        script.poller.hold(closed, closed, None);
        script.poll_now();
        assert_eq!(until(&script), Some(closed), "whoever asks");
        script.poller.hold(closed, closed, None);
        script.paced(answer(200), true);
        assert_eq!((script.now, until(&script)), (closed, None));
        let first = script.paced(answer(200), true);
        assert!((1_000..3_000).contains(&first.as_millis()), "{first:?}");
        assert_eq!(script.paced(answer(200), true), Duration::from_secs(2));
    }

    #[test]
    fn who_waits_for_a_first_value_is_told_of_a_window_without_polls_and_when_it_ends() {
        use super::super::pace::{EVERY_DAY, Pacing, Window};
        // START_MS is 01:23:20 and a bit of the clock here.
        let windows = vec![Window { from: 60, to: 120, days: EVERY_DAY, interval: None }];
        let mut script = at_pace(30_000, Pacing { windows, ..Default::default() });
        let hold = |script: &mut Script| {
            let until = script.poller.closed_until(script.both()).expect("it is closed");
            script.poller.hold_closed(script.both(), until)
        };
        let told = hold(&mut script).expect("there is no value");
        assert_eq!(told.code, UpstreamCode::Stopped);
        let status = script.poller.status_change(script.now).expect("it was live");
        let opens_in = status.retry_in.expect("it opens at two").as_secs();
        assert_eq!((status.state, status.code, opens_in), (StreamState::Failing, Some(UpstreamCode::Stopped), 2_199));
        assert_eq!(
            script.poller.next_due().map(|due| due.since(script.now).as_secs()),
            Some(60),
            "it is looked at again"
        );
        script.after_ms(60_000);
        hold(&mut script);
        let status = script.poller.status(script.now);
        assert_eq!(status.retry_in.map(|wait| wait.as_secs()), Some(2_139));
        // A value that is held is as good as it was.
        script.after_ms(3_600_000).poll(Ok(answer(200)));
        assert_eq!(script.poller.status(script.now).state, StreamState::Live);
        script.after_ms(23 * 3_600_000);
        assert_eq!(hold(&mut script), None);
        assert_eq!(script.poller.status_change(script.now).map(|status| status.state), Some(StreamState::Live));
    }

    #[test]
    fn what_is_followed_is_asked_again_after_its_gap_and_confirmed_by_being_reached() {
        let gap = Some(Duration::from_millis(50));
        let poller = Poller::new(options(1_000)).following(gap);
        let mut script = Script { poller, now: Instant::from_micros(START_MS * 1_000) };
        script.start();
        let (_, no, _) = script.begin();
        script.after_ms(3_600_000).answer(no, Ok(answer(200)));
        let (wait, no, _) = script.begin();
        assert_eq!(wait, Duration::from_millis(50));
        script.answer(no, refused());
        let (wait, no, validators) = script.begin();
        assert!(wait >= Duration::from_secs(1), "it is left alone for its interval: {wait:?}");
        assert_eq!(validators, Validators::default());
        assert_eq!(script.answer(no, Ok(answer(304))), Judged::NotModified, "reached, without an id");
        let (_, last, _) = script.begin();
        script.poller.stop();
        assert_eq!(script.poller.give_up(), Some(last));
        assert_eq!(script.answer(last, refused()), Judged::Unexpected);
        assert_eq!(script.poller.status(script.now).state, StreamState::Live);
        script.after_ms(5_000).start();
        assert_eq!(script.poll(Ok(answer(200))), Duration::ZERO, "the next watcher's is at once");
    }

    fn followed(id: &[u8], retry_ms: Option<u64>, status: u16) -> FetchResponse {
        let validators = Validators { etag: Some(id.into()), ..Validators::default() };
        FetchResponse { validators, retry_after: retry_ms.map(Duration::from_millis), ..answer(status) }
    }

    fn following() -> Script {
        let poller = Poller::new(options(100)).following(Some(Duration::from_millis(50)));
        let mut script = Script { poller, now: Instant::from_micros(START_MS * 1_000) };
        script.start();
        script
    }

    #[test]
    fn an_id_that_no_header_carries_is_not_gone_on_from() {
        let mut script = following();
        for (id, sent) in [
            (&b"7"[..], true),
            (b"\xc3\xbc, and \t more", true),
            (b"a\x01b", false),
            (b"a\x7fb", false),
            (b"a\x1b[0m", false),
            (&[b'7'; VALIDATOR_BYTES_MAX], true),
            (&[b'7'; VALIDATOR_BYTES_MAX + 1], false),
        ] {
            script.poll(Ok(followed(id, None, 200)));
            let (_, no, validators) = script.begin();
            assert_eq!(validators.etag.as_deref(), Some(id).filter(|_| sent));
            script.answer(no, refused());
        }
    }

    #[test]
    fn what_is_followed_moves_on_by_what_is_no_value_while_one_is_held() {
        let mut script = following();
        let id_after = |script: &mut Script, response| {
            script.poll(Ok(response));
            script.poller.validators.etag.clone()
        };
        assert_eq!(id_after(&mut script, followed(b"1", None, 200)).as_deref(), Some(&b"1"[..]));
        assert_eq!(id_after(&mut script, followed(b"2", None, 304)).as_deref(), Some(&b"2"[..]));
        assert_eq!(id_after(&mut script, answer(304)).as_deref(), Some(&b"2"[..]), "it was reached again");
        assert_eq!(id_after(&mut script, followed(b"", None, 304)), None, "it was taken back");
        script.poll(Ok(followed(b"3", None, 200)));
        let (_, no, _) = script.begin();
        script.poller.forget_value();
        script.answer(no, Ok(followed(b"4", None, 304)));
        assert_eq!(script.poller.validators.etag, None, "without the value there is nothing to go on from");
    }

    #[test]
    fn what_is_followed_says_when_it_wants_to_be_reached_again() {
        let mut script = following();
        script.poll(Ok(followed(b"1", Some(90_000), 200)));
        script.poll(refused());
        let status = script.poller.status(script.now);
        assert_eq!((status.state, status.retry_in), (StreamState::Stale, Some(Duration::from_secs(90))));
        assert_eq!(script.poll(Ok(FetchResponse { retry_after: None, ..answer(500) })), Duration::from_secs(90));
        assert_eq!(script.poll(Ok(followed(b"1", Some(10), 304))), Duration::from_secs(90), "whatever came between");
        script.poll(refused());
        let wait = script.poll(Ok(followed(b"2", Some(90_000), 200)));
        assert!((100..=200).contains(&wait.as_millis()), "its interval is longer: {wait:?}");
        // A value that is none says nothing of the connection, which goes on.
        let (_, no, _) = script.begin();
        script.poller.fetched(script.now, no, Ok(followed(b"3", Some(90_000), 200)));
        script.poller.refuse(script.now, no, UpstreamCode::Body, String::new()).expect("it was judged");
        let status = script.poller.status(script.now);
        assert!(status.retry_in.is_some_and(|wait| wait < Duration::from_secs(1)), "{status:?}");
    }

    #[test]
    fn polls_that_are_held_back_are_as_failed_where_that_is_said() {
        let mut script = script(options(1_000));
        script.poll(Ok(tagged(b"\"one\"")));
        let held = script.now + Duration::from_secs(90);
        script.poller.hold(script.now + Duration::from_secs(60), held, None);
        assert_eq!(script.poller.status(script.now).state, StreamState::Live);
        let failure = Failure { code: UpstreamCode::RateLimited, status: None, detail: String::new() };
        let look = script.now + Duration::from_secs(70);
        script.poller.hold(look, held, Some(&failure));
        let status = script.poller.status(script.now);
        let expected = (StreamState::Stale, Some(UpstreamCode::RateLimited), Some(Duration::from_secs(90)));
        assert_eq!((status.state, status.code, status.retry_in), expected);
        assert_eq!(script.poll(Ok(answer(304))), Duration::from_secs(70), "it may be sooner");
        assert_eq!(script.poller.status(script.now).state, StreamState::Live);
        assert!(script.poll(refused()) < Duration::from_millis(1_500), "the back-off did not grow by it");
        assert!(script.poll(refused()) <= Duration::from_secs(2));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Start,
        Stop,
        PollNow,
        Forget,
        Wait { ms: u64 },
        Answer { status: u16, retry_after_s: Option<u64>, accept: bool },
        Fail,
    }

    fn step() -> impl Strategy<Value = Step> {
        let status = prop_oneof![3 => Just(200), 1 => Just(304), 1 => Just(429), 1 => Just(503), 1 => any::<u16>()];
        let answer = (status, prop::option::of(0..10_000u64), any::<bool>());
        prop_oneof![
            1 => Just(Step::Start),
            1 => Just(Step::Stop),
            1 => Just(Step::PollNow),
            1 => Just(Step::Forget),
            4 => (0..5_000u64).prop_map(|ms| Step::Wait { ms }),
            4 => answer.prop_map(|(status, retry_after_s, accept)| Step::Answer { status, retry_after_s, accept }),
            2 => Just(Step::Fail),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_there_is_one_poll_and_a_next_one(
            interval_ms in 0..5_000u64,
            seed in any::<u64>(),
            steps in prop::collection::vec(step(), 1..100),
        ) {
            let mut script = script(PollOptions { seed, ..options(interval_ms) });
            let mut polling: Option<PollNo> = None;
            let mut begun = 0;
            for step in steps {
                match step {
                    Step::Start => script.start(),
                    Step::Stop => script.poller.stop(),
                    Step::PollNow => prop_assert_eq!(script.poll_now(), script.poller.is_running()),
                    Step::Forget => script.poller.forget_value(),
                    Step::Wait { ms } => { script.after_ms(ms); }
                    Step::Answer { status, retry_after_s, accept } => if let Some(no) = polling.take() {
                        let retry_after = retry_after_s.map(Duration::from_secs);
                        let answer = FetchResponse { retry_after, ..tagged(&status.to_le_bytes()) };
                        let answer = FetchResponse { status, ..answer };
                        match script.poller.fetched(script.now, no, Ok(answer)) {
                            Judged::Body { .. } if accept => prop_assert!(script.poller.accept(script.now, no)),
                            Judged::Body { .. } => prop_assert!(
                                script.poller.refuse(script.now, no, UpstreamCode::Body, String::new()).is_some()
                            ),
                            judged => prop_assert!(judged != Judged::Unexpected),
                        }
                    }
                    Step::Fail => if let Some(no) = polling.take() {
                        prop_assert!(matches!(script.poller.fetched(script.now, no, refused()), Judged::Failed(_)));
                    }
                }
                if let Some((no, _)) = script.poller.begin(script.now) {
                    prop_assert_eq!(polling, None, "one at a time");
                    begun += 1;
                    prop_assert_eq!(no, PollNo(begun));
                    polling = Some(no);
                }
                prop_assert_eq!(script.poller.is_polling(), polling.is_some());
                let planned = script.poller.is_running() && polling.is_none();
                prop_assert_eq!(script.poller.next_due().is_some(), planned);
                if let Some(due) = script.poller.next_due() {
                    prop_assert!(due.since(script.now) <= RETRY_AFTER_MAX.max(Duration::from_secs(60)));
                }
                script.poller.status_change(script.now);
                prop_assert_eq!(script.poller.status_change(script.now), None, "told once");
            }
        }
    }
}
