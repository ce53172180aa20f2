//! Upstreams that speak a stream: one connection each, read as it comes; whoever asks gets the newest value that nobody has had.
//!
//! Source: WHATWG HTML section 9.2 (`Last-Event-ID`, `retry`), `stream::follow`. Memory: a task, a connection and at most
//! one value for each stream that is followed; they end with [`Followers::forget`].
//! Errors: as those of a poll; the end of the upstream's stream is one, in good order or not.
//! Not here: when it is tried again, which is a poll's back-off (`stream::poll`); an answer (`exchange`).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use monoio::time::{Instant, sleep, sleep_until, timeout_at};
use url::Url;

use super::pool::Place as PoolPlace;
use super::redirect::Place;
use super::tunnel::Way;
use super::{Answer, Asked, Course, Fetcher, Phase, deadline_after, exchange, timed_out};
use crate::limits::RETRY_AFTER_MAX;
use crate::secret::Secret;
use crate::stream::action::is_success;
use crate::stream::budget::{Ask, Lane, Permit, Slot, Why};
use crate::stream::follow::{Events, Following, Newest};
use crate::stream::poll::{
    Endpoint, FetchError, FetchRequest, FetchResponse, FetchResult, PollNo, UpstreamCode, Validators,
};
use crate::time::{Now, WallTime};

/// A stream on its core, and not another at its place later.
type Key = (u32, u64);

/// What is followed on one core.
#[derive(Clone, Default)]
pub struct Followers {
    open: Rc<RefCell<HashMap<Key, Rc<Follow>>>>,
}

/// One upstream's stream.
#[derive(Default)]
struct Follow {
    state: RefCell<State>,
    /// Nobody wants it any more.
    forgotten: Cell<bool>,
    /// What is connected to, and which way, while there is a connection.
    way: RefCell<Option<(Url, Option<Way>)>>,
    /// Requests leave another way: it is to be reached anew.
    moves: Cell<bool>,
    /// The id to go on from, as far as the reader has come.
    last_id: RefCell<Option<String>>,
    reader: RefCell<Option<Waker>>,
}

#[derive(Default)]
struct State {
    newest: Option<FetchResponse>,
    /// What is held is as it was: the upstream has been reached again since anything was told, or has moved on without a value.
    confirmed: Option<FetchResponse>,
    /// Why it ended.
    ended: Option<FetchResult>,
    /// No new connection before this: the upstream's `retry`.
    not_before: Option<Instant>,
    reading: bool,
    asker: Option<Waker>,
}

impl Follow {
    fn tell(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.borrow_mut();
        change(&mut state);
        if let Some(asker) = state.asker.take() {
            asker.wake();
        }
    }

    fn wake_reader(&self) {
        if let Some(reader) = self.reader.borrow_mut().take() {
            reader.wake();
        }
    }
}

impl Followers {
    /// The next value of a stream: waits for it, and connects first where there is no connection. `held`: the value before
    /// is held, so that to have reached the upstream is an answer («not modified»).
    ///
    /// # Errors
    /// As for [`Fetcher::poll`](super::Fetcher::poll).
    pub async fn next(
        &self,
        (stream, poll): (u32, PollNo),
        asked: (FetchRequest, Arc<Lane>, bool),
        fetcher: &Fetcher,
        now: fn() -> Now,
    ) -> FetchResult {
        let (request, lane, held) = asked;
        let key = key_of(stream, poll);
        let follow = Rc::clone(self.open.borrow_mut().entry(key).or_default());
        if !std::mem::replace(&mut follow.state.borrow_mut().reading, true) {
            let (fetcher, follow) = (fetcher.clone(), Rc::clone(&follow));
            monoio::spawn(async move { read(&fetcher, &request, &lane, &follow, now).await });
        }
        poll_fn(|cx| {
            let mut state = follow.state.borrow_mut();
            if follow.forgotten.get() {
                return Poll::Ready(Err(FetchError { code: UpstreamCode::Unreachable, detail: "given up".to_owned() }));
            }
            let confirmed = state.confirmed.take().filter(|_| held);
            if let Some(answer) = state.newest.take().or(confirmed) {
                return Poll::Ready(Ok(answer));
            }
            if let Some(ended) = state.ended.take() {
                state.reading = false;
                return Poll::Ready(ended);
            }
            state.asker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Ends what nobody wants any more: its connection is closed.
    pub fn forget(&self, stream: u32, poll: PollNo) {
        let Some(follow) = self.open.borrow_mut().remove(&key_of(stream, poll)) else { return };
        follow.forgotten.set(true);
        follow.wake_reader();
        follow.tell(|_| ());
    }

    /// Requests leave another way: each upstream whose connection, be it open or being opened, has left the old one is reached
    /// anew. Nobody is told, unless that fails.
    pub fn leave_old_ways(&self, fetcher: &Fetcher) {
        for follow in self.open.borrow().values() {
            let is_old = follow.way.borrow().as_ref().is_some_and(|(url, way)| {
                Endpoint::of(url).is_some_and(|endpoint| fetcher.egress.way_to(&endpoint.host) != *way)
            });
            if is_old {
                follow.moves.set(true);
                follow.wake_reader();
            }
        }
    }
}

/// The upper half of a poll's number tells the streams apart that stand at one place one after another.
fn key_of(stream: u32, poll: PollNo) -> Key {
    (stream, poll.0 >> 32)
}

fn answer_to(status: u16, newest: Newest, retry_after: Option<Duration>, received: WallTime) -> FetchResponse {
    let etag = newest.id.map(|id| id.into_bytes().into_boxed_slice());
    let validators = Validators { etag, ..Validators::default() };
    FetchResponse { status, validators, retry_after, fresh_for: None, body: newest.data, received }
}

/// Reads until the upstream's stream ends or is forgotten.
async fn read(fetcher: &Fetcher, request: &FetchRequest, lane: &Arc<Lane>, follow: &Rc<Follow>, now: fn() -> Now) {
    *follow.last_id.borrow_mut() = None;
    let ended = loop {
        let not_before = follow.state.borrow_mut().not_before.take();
        let mut reading = pin!(async {
            if let Some(until) = not_before {
                sleep_until(until).await;
            }
            let options = &request.target.options;
            let following = options.follow.as_ref().expect("only such a stream is followed");
            let events = Events::new(following, options.response_bytes_max);
            let told = (String::new(), None);
            Reading { follow, lane, now, permit: None, following, events, told, kind_is_right: false }
                .run(fetcher, request)
                .await
        });
        let ended = poll_fn(|cx| {
            if follow.forgotten.get() {
                return Poll::Ready(None);
            }
            if follow.moves.get() {
                return Poll::Ready(Some(None));
            }
            *follow.reader.borrow_mut() = Some(cx.waker().clone());
            reading.as_mut().poll(cx).map(|ended| Some(Some(ended)))
        })
        .await;
        *follow.way.borrow_mut() = None;
        // Its connection is closed, and its place free, before the next one is asked for. The upstream's `retry` is for
        // connections that are lost.
        match ended {
            Some(None) => follow.moves.set(false),
            Some(Some(ended)) => break ended,
            None => return,
        }
    };
    follow.tell(|state| state.ended = Some(ended));
}

/// Leave to connect, waited for as long as a poll would be.
async fn leave(request: &FetchRequest, lane: &Arc<Lane>, now: fn() -> Now) -> Result<Permit, FetchError> {
    let options = &request.target.options;
    let mut slot = Slot::of(&request.target);
    let deadline = deadline_after(options.timeout);
    loop {
        let at = now().at;
        let wait = match lane.ask(at, &mut slot, options.backoff_max) {
            Ask::Go(permit) => return Ok(permit),
            Ask::Wait(wait) => wait,
        };
        let span = wait.until.since(at);
        if let Why::Down(code, _) = wait.why {
            return Err(FetchError { code, detail: "the upstream fails whoever asks, and is left alone".to_owned() });
        }
        if span >= deadline.saturating_duration_since(Instant::now()) {
            let detail = "the upstream takes no more requests until then".to_owned();
            return Err(FetchError { code: UpstreamCode::RateLimited, detail });
        }
        sleep(span.min(wait.look).max(Duration::from_millis(1))).await;
    }
}

/// One connection's life.
struct Reading<'a> {
    follow: &'a Follow,
    lane: &'a Arc<Lane>,
    now: fn() -> Now,
    permit: Option<Permit>,
    following: &'a Following,
    events: Events,
    /// The id and the `retry` that went with what was told last.
    told: (String, Option<Duration>),
    /// Whether the answer is such a stream.
    kind_is_right: bool,
}

impl Reading<'_> {
    async fn run(&mut self, fetcher: &Fetcher, request: &FetchRequest) -> FetchResult {
        let target = &request.target;
        let options = &target.options;
        let following = self.following;
        let place = Place::start(target)?;
        let mut headers = options.headers.clone();
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("accept")) {
            headers.push(("Accept".to_owned(), Secret::new(following.kind.media_type())));
        }
        let reached = self.follow.last_id.borrow().as_ref().map(|id| id.as_bytes().to_vec());
        let id = reached.or_else(|| request.validators.etag.as_ref().map(|id| id.to_vec()));
        if let Some(id) = id.filter(|id| !id.is_empty()) {
            headers.push(("Last-Event-ID".to_owned(), Secret::new(id)));
        }
        let mut asked = Asked::of_poll(request, place.aim.as_ref());
        (asked.url, asked.headers, asked.validators) = (&place.url, &headers, None);
        let outcome = fetcher
            .present((&options.credential, target.guard.as_ref()), options.timeout, async |presented| {
                // First, so that nothing is held against an upstream that there is no place for.
                let place = fetcher.place_to_follow().await?;
                self.permit = Some(leave(request, self.lane, self.now).await?);
                self.permit.iter_mut().for_each(Permit::begin);
                self.exchange(fetcher, &Asked { presented: Some(&presented), ..asked }, place).await
            })
            .await
            .map(|answer| answer.response);
        let now = self.now;
        if let (Err(error), Some(permit)) = (&outcome, self.permit.take()) {
            permit.failed(now().at, error);
        }
        if let Some(retry) = self.retry() {
            self.follow.state.borrow_mut().not_before = Some(deadline_after(retry));
        }
        outcome
    }

    fn retry(&self) -> Option<Duration> {
        self.events.retry().map(|retry| retry.min(RETRY_AFTER_MAX))
    }

    async fn exchange(&mut self, fetcher: &Fetcher, asked: &Asked<'_>, place: PoolPlace) -> Result<Answer, FetchError> {
        let (now, following) = (self.now, self.following);
        let (phase, wall) = (Cell::new(Phase::Waiting), || now().wall);
        let deadline = deadline_after(asked.timeout);
        let course = Course { asked, wall: &wall, phase: &phase, deadline };
        let origin = fetcher.origin(asked)?;
        *self.follow.way.borrow_mut() = Some((asked.url.clone(), origin.via.clone()));
        // For itself: it is not given back.
        let connecting = timeout_at(deadline, fetcher.open_in_time(&course, &origin, place)).await;
        let connection = connecting.map_err(|_| timed_out(asked.timeout, phase.get()))??;
        let (link, _place) = (connection.link, connection.place);
        let answer = exchange::follow(&course, link, following.idle_timeout, self).await;
        let answer = answer.map_err(|failure| failure.error)?;
        if !is_success(answer.response.status) {
            return Ok(answer);
        }
        if !self.kind_is_right {
            let detail = format!("the answer is no {}", following.kind.media_type());
            return Err(FetchError { code: UpstreamCode::Body, detail });
        }
        Err(FetchError { code: UpstreamCode::Unreachable, detail: "the upstream has ended its stream".to_owned() })
    }
}

impl exchange::Sink for Reading<'_> {
    fn head(&mut self, answer: &Answer, content_type: Option<&[u8]>) -> bool {
        let response = &answer.response;
        if let Some(permit) = self.permit.take() {
            permit.answered((self.now)().at, response, &answer.quotas);
        }
        self.kind_is_right = self.following.kind.is_spoken(content_type);
        // RFC 9110 section 15.3.5: nothing follows a 204.
        let goes_on = is_success(response.status) && response.status != 204 && self.kind_is_right;
        if goes_on {
            let confirmed = answer_to(304, Newest::default(), None, response.received);
            self.follow.tell(|state| state.confirmed = Some(confirmed));
        }
        goes_on
    }

    fn body(&mut self, bytes: &[u8]) -> Result<bool, FetchError> {
        let before = self.events.ended();
        let newest = self
            .events
            .feed(bytes)
            .map_err(|error| FetchError { code: UpstreamCode::TooLarge, detail: error.to_string() })?;
        let is_news = self.events.ended() != before;
        let told = (self.events.last_id().to_owned(), self.retry());
        if newest.is_none() && told == self.told {
            return Ok(is_news);
        }
        let (id, retry, received) = (told.0.clone(), told.1, (self.now)().wall);
        *self.follow.last_id.borrow_mut() = Some(id.clone());
        self.told = told;
        self.follow.tell(|state| match (newest, &mut state.newest) {
            (Some(newest), held) => *held = Some(answer_to(200, newest, retry, received)),
            // Nobody has had the value before it.
            (None, Some(held)) => {
                held.validators.etag = Some(id.into_bytes().into_boxed_slice());
                held.retry_after = retry;
            }
            (None, None) => {
                let newest = Newest { data: Vec::new(), id: Some(id) };
                state.confirmed = Some(answer_to(304, newest, retry, received));
            }
        });
        Ok(is_news)
    }
}
