//! One poll from its first request to its value: redirects and pages on the way, each request with leave of its own.
//!
//! Source: RFC 9110 section 15.4, RFC 8288; `stream::budget` for leave. Memory: the value so far, within the stream's
//! `response_bytes_max`, and a hash for each place that was asked.
//! Errors: [`FetchError`]; a value is whole, as far as its pages are gathered, or there is none.
//! Not here: one exchange (`exchange`), where an answer leads (`redirect`), what the value is (`stream`).

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use monoio::time::{Instant, sleep};

use super::pages::{NoArray, Pages, Scan};
use super::redirect::{Place, refused};
use super::{Answer, Asked, Fetcher, TURN, deadline_after};
use crate::config::LogLevel;
use crate::runtime::log;
use crate::stream::action::is_success;
use crate::stream::budget::{Ask, Lane, Permit, PollLeave, Slot, Why};
use crate::stream::credential::Presented;
use crate::stream::poll::{FetchError, FetchRequest, FetchResponse, FetchResult, UpstreamCode, Validators};
use crate::time::Now;

/// Bytes of a page that are looked through before the core's other tasks get their turn.
const SCANNED_PER_TURN: usize = 256 << 10;

/// A poll on its way.
pub(super) struct Journey<'a> {
    fetcher: &'a Fetcher,
    request: &'a FetchRequest,
    now: &'a dyn Fn() -> Now,
    /// When the time for the whole of it is up.
    deadline: Instant,
    lane: Arc<Lane>,
    /// For the first request.
    permit: Option<Permit>,
    /// For leave of the others.
    slot: Slot,
}

impl<'a> Journey<'a> {
    pub(super) fn new(
        fetcher: &'a Fetcher,
        request: &'a FetchRequest,
        leave: PollLeave,
        now: &'a dyn Fn() -> Now,
    ) -> Journey<'a> {
        let deadline = deadline_after(request.target.options.timeout);
        let lane = Arc::clone(leave.lane());
        let (slot, permit) = match leave {
            PollLeave::Given(permit) => (permit.slot(), Some(permit)),
            PollLeave::Later(_) => (Slot::of(&request.target), None),
        };
        Journey { fetcher, request, now, deadline, lane, permit, slot }
    }

    pub(super) async fn run(mut self) -> FetchResult {
        let target = &self.request.target;
        let options = &target.options;
        let mut place = Place::start(target)?;
        let mut answer = self.ask_if_changed(&place, 0).await?;
        let mut seen = HashSet::from([hash_of(place.url.as_str())]);
        while options.redirects_max > 0
            && let Some(location) = &answer.location
            && let Some(next) = place.redirected(target, answer.response.status, location)?
        {
            if seen.len() > usize::from(options.redirects_max) {
                return Err(refused("more redirects than are followed"));
            }
            if !seen.insert(hash_of(next.url.as_str())) {
                return Err(refused("the redirects lead round in a circle"));
            }
            if matches!(answer.response.status, 301 | 308) {
                self.tell_moved(&place, &next);
            }
            place = next;
            answer = self.ask_if_changed(&place, place.mark()).await?;
        }
        if options.pages_max > 1 && is_success(answer.response.status) {
            return self.gather(place, answer).await;
        }
        Ok(answer.response)
    }

    /// A request that is conditional where the value that is held came from that very place.
    async fn ask_if_changed(&mut self, place: &Place, mark: u64) -> Result<Answer, FetchError> {
        let held = &self.request.validators;
        let own = Some(held).filter(|held| held.place == mark);
        let mut answer = self.ask(place, own, self.request.target.options.response_bytes_max).await?;
        if answer.response.status == 304 && own.is_none() && held.is_some() {
            // It is conditional as a whole, but nothing was asked of this place that could be answered so.
            let detail = "answered 304 to a request without a condition".to_owned();
            return Err(FetchError { code: UpstreamCode::Protocol, detail });
        }
        answer.response.validators.place = mark;
        Ok(answer)
    }

    /// The pages from this first one on, as one array.
    async fn gather(&mut self, mut place: Place, mut answer: Answer) -> FetchResult {
        let target = &self.request.target;
        let options = &target.options;
        let mut pages = Pages::new();
        let mut fresh_for = answer.response.fresh_for;
        let mut seen = HashSet::from([hash_of(place.url.as_str())]);
        loop {
            let mut scan = Scan::default();
            for piece in answer.response.body.chunks(SCANNED_PER_TURN) {
                scan.feed(piece);
                if piece.len() == SCANNED_PER_TURN {
                    sleep(TURN).await;
                }
            }
            pages.take(&answer.response.body, &scan).map_err(|NoArray| FetchError {
                code: UpstreamCode::Body,
                detail: format!("page {} is no JSON array", seen.len()),
            })?;
            let Some(link) = answer.next else { break };
            if seen.len() as u64 >= u64::from(options.pages_max) {
                self.tell_cut();
                break;
            }
            place = place.next_page(target, &link)?;
            if !seen.insert(hash_of(place.url.as_str())) {
                return Err(refused("the pages lead round in a circle"));
            }
            let left = options.response_bytes_max.saturating_sub(pages.len() as u64);
            answer = self.ask(&place, None, left).await?;
            if !is_success(answer.response.status) {
                // What there is of the value is not the value.
                return Ok(answer.response);
            }
            fresh_for = fresh_for.into_iter().chain(answer.response.fresh_for).min();
        }
        let body = pages.into_body();
        if body.len() as u64 > options.response_bytes_max {
            let detail = "the pages have more bytes than a value may".to_owned();
            return Err(FetchError { code: UpstreamCode::TooLarge, detail });
        }
        Ok(FetchResponse { body, fresh_for, validators: Validators::default(), ..answer.response })
    }

    /// One request and its answer, both of which count in its lane.
    async fn ask(
        &mut self,
        place: &Place,
        validators: Option<&Validators>,
        bytes_max: u64,
    ) -> Result<Answer, FetchError> {
        let request = self.request;
        let target = &request.target;
        let mut asked = Asked::of_poll(request, place.aim.as_ref());
        (asked.method, asked.url, asked.validators) = (&place.method, &place.url, validators);
        (asked.body, asked.response_bytes_max) = (target.body.as_deref().filter(|_| place.with_body), bytes_max);
        let without_body: Vec<_>;
        if !place.own {
            asked.headers = &[];
        } else if target.body.is_some() && !place.with_body {
            // RFC 9110 section 15.4: what describes the body goes with it.
            let describes = |name: &str| name.to_ascii_lowercase().starts_with("content-");
            without_body = asked.headers.iter().filter(|(name, _)| !describes(name)).cloned().collect();
            asked.headers = &without_body;
        }
        if !place.own {
            return self.send(place, &asked, Presented::default()).await;
        }
        let (fetcher, limit) = (self.fetcher, self.deadline.saturating_duration_since(Instant::now()));
        fetcher
            .present((&target.options.credential, target.guard.as_ref()), limit, async |presented| {
                self.send(place, &asked, presented).await
            })
            .await
    }

    /// One request, with leave for each time that it is sent.
    async fn send(&mut self, place: &Place, asked: &Asked<'_>, presented: Presented) -> Result<Answer, FetchError> {
        let at = (self.now)().at;
        let permit = match self.permit.take().filter(|permit| !permit.is_late(at)) {
            Some(permit) => permit,
            None => self.leave(place).await?,
        };
        let (fetcher, now, deadline) = (self.fetcher, self.now, self.deadline);
        let asked = Asked { presented: Some(&presented), ..*asked };
        fetcher.send_permitted(permit, async || self.leave(place).await, deadline, &asked, now, true).await
    }

    /// Leave for a further request, waited for as long as the poll has time.
    async fn leave(&mut self, place: &Place) -> Result<Permit, FetchError> {
        let options = &self.request.target.options;
        let mut elsewhere = Slot::of(&self.request.target);
        let (lane, slot) = match place.own {
            true => (Arc::clone(&self.lane), &mut self.slot),
            false => (self.lane.elsewhere(&place.url), &mut elsewhere),
        };
        loop {
            let now = (self.now)().at;
            let wait = match lane.ask(now, slot, options.backoff_max) {
                Ask::Go(permit) => return Ok(permit),
                Ask::Wait(wait) => wait,
            };
            let span = wait.until.since(now);
            let left = self.deadline.saturating_duration_since(Instant::now());
            if span >= left {
                slot.leave();
                let code = if let Why::Down(code, _) = wait.why { code } else { UpstreamCode::RateLimited };
                let detail = "the value takes more requests than the upstream takes in time".to_owned();
                return Err(FetchError { code, detail });
            }
            sleep(span.min(wait.look).max(TURN)).await;
        }
    }

    /// Says, once, that a list has more pages than are gathered.
    fn tell_cut(&self) {
        let options = &self.request.target.options;
        if !self.lane.is_news(hash_of(&("pages", options.id.as_str(), options.pages_max))) {
            return;
        }
        let fields: [(&str, &dyn std::fmt::Display); 2] = [("stream", &options.id), ("pages_max", &options.pages_max)];
        let sentence =
            "The upstream's list has more pages than stream.pages_max: its value is the first of them alone.";
        log::write(LogLevel::Warn, &fields, sentence);
    }

    /// Says, once, that a URL of the configuration is out of date.
    fn tell_moved(&self, from: &Place, to: &Place) {
        if !self.lane.is_news(hash_of(&(from.url.as_str(), to.url.as_str()))) {
            return;
        }
        // The rest of the URL may hold what is not for the log.
        let (stream, origin) = (&self.request.target.options.id, to.url.origin().ascii_serialization());
        let sentence = "The upstream's resource has moved for good: each poll of its old URL costs a request more.";
        log::write(LogLevel::Warn, &[("stream", stream), ("to", &origin)], sentence);
    }
}

fn hash_of(what: &(impl Hash + ?Sized)) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}
