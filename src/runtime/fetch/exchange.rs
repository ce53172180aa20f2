//! One request and its response over one connection.
//!
//! Source: RFC 9112 sections 7 to 9; RFC 9110 section 15 for statuses.
//! Memory: the request's bytes, the link's buffers, the decoder's.
//! Errors: [`Failure`].  Not here: connecting, the time-out of the whole (`mod`), the wire format (`codec::http_response`).

use std::borrow::Cow;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use monoio::time::{Instant, sleep, timeout, timeout_at};
use monoio::utils::is_legacy;
use url::form_urlencoded;

use super::link::{Fault, Inbound, Link, Seal};
use super::{Answer, Asked, Course, Phase, endpoint, in_words, timed_out, tls_failed};
use crate::codec::http::percent_decode;
use crate::codec::http_response::{
    Progress, Request, ResponseDecoder, ResponseError, ResponseFault, ResponseLimits, fresh_for, http_date,
    retry_after, write_request,
};
use crate::codec::{link_header, rate_limit};
use crate::limits::{
    FOLLOWED_PADDING_FACTOR, UPSTREAM_DRAIN_BYTES_MAX, UPSTREAM_DRAIN_TIMEOUT, UPSTREAM_HEAD_BYTES_MAX,
};
use crate::secret::Secret;
use crate::stream::action::is_success;
use crate::stream::poll::{FetchError, FetchResponse, UpstreamCode, Validators};
use crate::time::WallTime;

/// Reads in a row, of at most 16 KiB each, before the core's other tasks get their turn.
const READS_PER_TURN: u32 = 64;
/// Bytes fed to the decoder at once: what they inflate to, a thousand times as much at most, must not hold the core.
const PIECE_BYTES: usize = 512;
/// Bytes of body decoded before the core's other tasks get their turn.
const DECODED_PER_TURN: u64 = 256 << 10;
/// The same of a body that is read as it comes: the reader looks at each line of it.
const HANDED_ON_PER_TURN: usize = 64 << 10;
/// The shortest wait that goes through the driver.
const TURN: Duration = Duration::from_millis(1);

/// Why there is no response.
pub(super) struct Failure {
    pub(super) error: FetchError,
    /// The connection ended before a byte of the response came: had it idled before, the upstream may never have seen the
    /// request.
    pub(super) unanswered: bool,
}

/// Sends the request and receives the response; the connection comes back where it can be used again.
pub(super) async fn run(course: &Course<'_>, link: Link) -> Result<(Answer, Option<Link>), Failure> {
    let bytes = course.request_bytes()?;
    let (mut inbound, mut outbound, seal) = link.split();
    let (answer, reusable) = {
        let mut sending = Sending { future: pin!(outbound.send(&seal, bytes)), outcome: None };
        let (answer, complete) = course.receive(&mut sending, &mut inbound, &seal).await?;
        // A response may come before the request has gone out (RFC 9112 section 9.3); what is left of it stays unsent.
        (answer, complete && sending.is_done().await)
    };
    let link = if reusable { Link::join(inbound, outbound, seal) } else { None };
    Ok((answer, link))
}

/// Who reads a body as it comes.
pub(super) trait Sink {
    /// There is an answer, its body aside; whether that is wanted.
    fn head(&mut self, answer: &Answer, content_type: Option<&[u8]>) -> bool;

    /// More of the body has come, codings undone; whether something ended in it that it was sent for.
    fn body(&mut self, bytes: &[u8]) -> Result<bool, FetchError>;
}

/// Sends the request and hands the body on as it comes, whatever time it takes and however long it becomes, but that something
/// comes within each `idle`, and that what compressed bytes become is more than padding: between two things that it is sent
/// for they grow by [`FOLLOWED_PADDING_FACTOR`] times `response_bytes_max` at most. Returns at its end, in good order, or at once where it is not wanted.
pub(super) async fn follow(
    course: &Course<'_>,
    link: Link,
    idle: Duration,
    sink: &mut impl Sink,
) -> Result<Answer, Failure> {
    let bytes = course.request_bytes()?;
    let (mut inbound, mut outbound, seal) = link.split();
    let mut sending = Sending { future: pin!(outbound.send(&seal, bytes)), outcome: None };
    let mut reception = Reception::new(course);
    let limits = ResponseLimits { head_bytes_max: UPSTREAM_HEAD_BYTES_MAX, body_bytes_max: u64::MAX };
    reception.decoder = ResponseDecoder::new(limits, false);
    let mut answer = None;
    let bytes = timeout_at(course.deadline, course.first_bytes(&mut sending, &mut inbound, &seal)).await;
    let bytes = bytes.map_err(|_| Failure::of(timed_out(course.asked.timeout, course.phase.get())))??;
    course.phase.set(Phase::Receiving);
    let mut ended = reception.hand_on(bytes, &mut sending, &mut answer, sink).await?;
    let mut reads = 0u32;
    while !ended {
        reads = reads.wrapping_add(1);
        if is_legacy() && reads.is_multiple_of(READS_PER_TURN) {
            sending.alongside(sleep(TURN)).await;
        }
        let until = if answer.is_none() { course.deadline } else { Instant::now() + idle };
        let Ok(arrived) = timeout_at(until, sending.alongside(inbound.next(&seal))).await else {
            return Err(Failure::of(match answer {
                None => timed_out(course.asked.timeout, Phase::Receiving),
                Some(_) => timed_out(idle, Phase::Receiving),
            }));
        };
        ended = match arrived {
            Ok([]) => {
                reception.decoder.eof().map_err(refused)?;
                true
            }
            Ok(bytes) => reception.hand_on(bytes, &mut sending, &mut answer, sink).await?,
            Err(fault) => {
                reception.fail(&fault)?;
                true
            }
        };
    }
    Ok(answer.unwrap_or_else(|| reception.into_answer()))
}

impl Course<'_> {
    /// The response, and whether the connection is at the start of the next one.
    async fn receive<S: Future<Output = io::Result<()>>>(
        &self,
        sending: &mut Sending<'_, S>,
        inbound: &mut Inbound,
        seal: &Seal,
    ) -> Result<(Answer, bool), Failure> {
        let mut reception = Reception::new(self);
        let bytes = self.first_bytes(sending, inbound, seal).await?;
        self.phase.set(Phase::Receiving);
        let mut end = reception.take_in_turns(bytes, sending).await?;
        let mut reads = 0u32;
        while end.is_none() {
            reads = reads.wrapping_add(1);
            if is_legacy() && reads.is_multiple_of(READS_PER_TURN) {
                // Over epoll a read that finds bytes does not wait: others get their turn here. The ring sees to that itself.
                sending.alongside(sleep(TURN)).await;
            }
            let next = sending.alongside(inbound.next(seal));
            let arrived = match reception.drain {
                None => next.await,
                Some(drain) => match timeout_at(drain.until, next).await {
                    Ok(arrived) => arrived,
                    Err(_) => break,
                },
            };
            end = match arrived {
                Ok([]) => Some(reception.close()?),
                Ok(bytes) => reception.take_in_turns(bytes, sending).await?,
                Err(fault) => Some(reception.fail(&fault)?),
            };
        }
        let reusable = matches!(end, Some(End { reusable: true }));
        Ok((reception.into_answer(), reusable))
    }

    /// Waits for the response's first bytes while the request goes out, and `first_byte_timeout` longer.
    async fn first_bytes<'i, S: Future<Output = io::Result<()>>>(
        &self,
        sending: &mut Sending<'_, S>,
        inbound: &'i mut Inbound,
        seal: &Seal,
    ) -> Result<&'i [u8], Failure> {
        let mut first = pin!(inbound.next(seal));
        let early = poll_fn(|cx| match first.as_mut().poll(cx) {
            Poll::Ready(arrived) => Poll::Ready(Some(arrived)),
            // Sent, or not to be sent: then too the upstream may have something to say.
            Poll::Pending => sending.poll(cx).map(|()| None),
        });
        let limit = self.asked.first_byte_timeout;
        let arrived = match early.await {
            Some(arrived) => arrived,
            None => {
                self.phase.set(Phase::Sent);
                timeout(limit, first).await.map_err(|_| Failure::of(timed_out(limit, Phase::Sent)))?
            }
        };
        match arrived {
            Ok([]) | Err(Fault::Cut) => {
                let detail = "the connection was closed before a response".to_owned();
                Err(Failure { error: FetchError { code: UpstreamCode::Protocol, detail }, unanswered: true })
            }
            Ok(bytes) => Ok(bytes),
            Err(Fault::Io(e)) => {
                let detail = format!("before a response: {}", in_words(&e));
                Err(Failure { error: FetchError { code: UpstreamCode::Unreachable, detail }, unanswered: true })
            }
            Err(Fault::Tls(e)) => Err(Failure::of(tls_failed(e))),
        }
    }

    fn request_bytes(&self) -> Result<Vec<u8>, Failure> {
        let query = self.asked.presented.and_then(|presented| presented.query.as_ref());
        let Asked { method, body, validators, headers, .. } = *self.asked;
        let endpoint = endpoint(self.asked).map_err(Failure::of)?;
        let request = Request {
            method,
            authority: endpoint.authority,
            target: &with_key(endpoint.target, query),
            if_none_match: validators.and_then(|validators| validators.etag.as_deref()),
            if_modified_since: validators.and_then(|validators| validators.last_modified.as_deref()),
            body,
        };
        let basic = basic_credentials(self.asked);
        let presented = self.asked.presented;
        let besides = presented.into_iter().flat_map(|presented| &presented.headers);
        let headers = headers.iter().chain(besides).map(|(name, value)| (name.as_str(), value.expose_secret()));
        let headers = headers.chain(basic.as_deref().map(|value| ("Authorization", value)));
        let mut bytes = Vec::new();
        write_request(&mut bytes, &request, headers)
            .map_err(|e| Failure::of(FetchError { code: UpstreamCode::Blocked, detail: e.to_string() }))?;
        Ok(bytes)
    }
}

/// A request's target with a further parameter, encoded already, in the place of those of its name: a redirect or the next
/// page may lead to a URL that has the one that it was asked with.
fn with_key<'t>(target: &'t str, pair: Option<&Secret>) -> Cow<'t, str> {
    let Some(pair) = pair else { return Cow::Borrowed(target) };
    let pair = String::from_utf8_lossy(pair.expose_secret());
    let name_of = |pair: &str| form_urlencoded::parse(pair.as_bytes()).next().map(|(name, _)| name.into_owned());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let name = name_of(&pair);
    let others = query.split('&').filter(|other| !other.is_empty() && name_of(other) != name);
    let query: Vec<&str> = others.chain([&*pair]).collect();
    Cow::Owned(format!("{path}?{}", query.join("&")))
}

/// RFC 7617: user and password of the URL as `Authorization`, unless the stream's headers have one of their own.
fn basic_credentials(asked: &Asked<'_>) -> Option<Vec<u8>> {
    let named = |(name, _): &(String, _)| name.eq_ignore_ascii_case("authorization");
    let user = percent_decode(asked.url.username())?;
    let password = percent_decode(asked.url.password().unwrap_or_default())?;
    let besides = asked.presented.into_iter().flat_map(|presented| &presented.headers);
    if (user.is_empty() && password.is_empty()) || asked.headers.iter().chain(besides).any(named) {
        return None;
    }
    Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))).into_bytes())
}

impl Failure {
    fn of(error: FetchError) -> Failure {
        Failure { error, unanswered: false }
    }
}

/// The request on its way out, driven while something else is waited for.
struct Sending<'a, S> {
    future: Pin<&'a mut S>,
    outcome: Option<io::Result<()>>,
}

impl<S: Future<Output = io::Result<()>>> Sending<'_, S> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.outcome.is_none() {
            match self.future.as_mut().poll(cx) {
                Poll::Ready(outcome) => self.outcome = Some(outcome),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(())
    }

    /// Whether all is sent. The news of it may have come together with the response, unheard yet: so this asks.
    async fn is_done(&mut self) -> bool {
        poll_fn(|cx| Poll::Ready(self.poll(cx).is_ready())).await && matches!(self.outcome, Some(Ok(())))
    }

    async fn alongside<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = pin!(other);
        poll_fn(|cx| {
            let _ = self.poll(cx);
            other.as_mut().poll(cx)
        })
        .await
    }
}

/// The response as far as it has come.
struct Reception<'a> {
    course: &'a Course<'a>,
    decoder: ResponseDecoder,
    /// How much of the body had been decoded at the last turn of the core's other tasks; where it is handed on, how much since.
    decoded: u64,
    /// Where it is handed on: what it has grown by in being decoded, since the last that it was sent for.
    padding: u64,
    /// When the head was whole.
    received: Option<WallTime>,
    /// Set where the status says that the body does not matter: it is read to its end only if that is near.
    drain: Option<Drain>,
    /// Whether the body of a failure could not be read: the status stands without it.
    spoilt: bool,
}

#[derive(Clone, Copy)]
struct Drain {
    until: Instant,
    left: u64,
}

/// The response is as complete as it needs to be.
struct End {
    /// Whether the connection is at the start of the next one.
    reusable: bool,
}

impl<'a> Reception<'a> {
    fn new(course: &'a Course<'a>) -> Reception<'a> {
        let limits =
            ResponseLimits { head_bytes_max: UPSTREAM_HEAD_BYTES_MAX, body_bytes_max: course.asked.response_bytes_max };
        let decoder = ResponseDecoder::new(limits, course.asked.method == "HEAD");
        Reception { course, decoder, decoded: 0, padding: 0, received: None, drain: None, spoilt: false }
    }

    /// Takes what has come, in pieces, between which others get their turn: little may inflate to much.
    async fn take_in_turns<S: Future<Output = io::Result<()>>>(
        &mut self,
        bytes: &[u8],
        sending: &mut Sending<'_, S>,
    ) -> Result<Option<End>, Failure> {
        let mut end = None;
        for piece in bytes.chunks(PIECE_BYTES) {
            // Behind the response's end too: what stands there makes the connection useless for another.
            end = self.take(piece)?;
            if matches!(end, Some(End { reusable: false })) {
                break;
            }
            let decoded = self.decoder.decoded_bytes();
            if decoded - self.decoded >= DECODED_PER_TURN {
                self.decoded = decoded;
                sending.alongside(sleep(TURN)).await;
            }
        }
        Ok(end)
    }

    /// Hands on what has come, in parts, between which others get their turn; whether it is all that there is, or that is
    /// wanted.
    async fn hand_on<S: Future<Output = io::Result<()>>>(
        &mut self,
        bytes: &[u8],
        sending: &mut Sending<'_, S>,
        answer: &mut Option<Answer>,
        sink: &mut impl Sink,
    ) -> Result<bool, Failure> {
        for piece in bytes.chunks(PIECE_BYTES) {
            let progress = self.decoder.feed(piece);
            if answer.is_none() && self.decoder.status().is_some() {
                self.received = Some((self.course.wall)());
                let told = answer.insert(self.answer_without_body());
                if !sink.head(told, self.decoder.header("content-type")) {
                    return Ok(true);
                }
            }
            let body = self.decoder.take_body();
            for part in body.chunks(HANDED_ON_PER_TURN) {
                let is_news = sink.body(part).map_err(Failure::of)?;
                self.padding = if is_news { 0 } else { self.padding + part.len() as u64 };
                self.decoded += part.len() as u64;
                if self.decoded >= HANDED_ON_PER_TURN as u64 {
                    self.decoded = 0;
                    sending.alongside(sleep(TURN)).await;
                }
            }
            // What is not compressed grows by nothing, however long it waits for something to say.
            self.padding = self.padding.saturating_sub(piece.len() as u64);
            let most = self.course.asked.response_bytes_max.saturating_mul(FOLLOWED_PADDING_FACTOR);
            if self.padding > most {
                let detail = format!("compressed bytes have grown to more than {most} bytes without an event");
                return Err(Failure::of(FetchError { code: UpstreamCode::TooLarge, detail }));
            }
            if progress.map_err(refused)? == Progress::Done {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn take(&mut self, bytes: &[u8]) -> Result<Option<End>, Failure> {
        let progress = self.decoder.feed(bytes);
        let Some(status) = self.decoder.status() else {
            return progress.map(|_| None).map_err(refused);
        };
        if self.received.is_none() {
            self.received = Some((self.course.wall)());
            // The status is known, so that time running out is no failure any more.
            let until = (Instant::now() + UPSTREAM_DRAIN_TIMEOUT).min(self.course.deadline);
            let wanted = (self.course.asked.wants_body)(status);
            self.drain = (!wanted).then_some(Drain { until, left: UPSTREAM_DRAIN_BYTES_MAX });
        }
        match progress {
            Ok(Progress::Done) => Ok(Some(End { reusable: self.decoder.is_reusable() })),
            Ok(Progress::NeedMore) => Ok(self.drain(bytes.len())),
            Err(_) if self.status_suffices() => Ok(Some(End { reusable: false })),
            Err(error) => Err(refused(error)),
        }
    }

    /// The upstream has closed the connection.
    fn close(&mut self) -> Result<End, Failure> {
        match self.decoder.eof() {
            Err(error) if !self.status_suffices() => Err(refused(error)),
            Ok(_) | Err(_) => Ok(End { reusable: false }),
        }
    }

    /// The connection has failed.
    fn fail(&mut self, fault: &Fault) -> Result<End, Failure> {
        if self.status_suffices() {
            return Ok(End { reusable: false });
        }
        let (code, detail) = match fault {
            Fault::Io(e) => (UpstreamCode::Protocol, format!("within the response: {}", in_words(e))),
            // RFC 9112 section 9.8: without a close_notify nobody knows whether this was all of it.
            Fault::Cut => (UpstreamCode::Protocol, "the connection was cut within the response".to_owned()),
            Fault::Tls(e) => (UpstreamCode::Tls, e.to_string()),
        };
        Err(Failure::of(FetchError { code, detail }))
    }

    /// Whether the status is all that is needed now that the body cannot be had: it does not matter, or is that of a failure.
    fn status_suffices(&mut self) -> bool {
        let failure = self.decoder.status().is_some_and(|status| !is_success(status));
        self.spoilt |= failure;
        self.drain.is_some() || failure
    }

    /// Counts what is read only to have it out of the way; past the bound that is not worth a connection.
    fn drain(&mut self, count: usize) -> Option<End> {
        let drain = self.drain.as_mut()?;
        drain.left = drain.left.saturating_sub(count as u64);
        (drain.left == 0).then_some(End { reusable: false })
    }

    fn into_answer(mut self) -> Answer {
        let mut answer = self.answer_without_body();
        if (self.course.asked.wants_body)(answer.response.status) && !self.spoilt {
            answer.response.body = self.decoder.take_body();
        }
        answer
    }

    fn answer_without_body(&self) -> Answer {
        let status = self.decoder.status().expect("a response ends after its head only");
        let received = self.received.expect("noted with the status");
        let field = |name: &str| self.decoder.header(name).map(Box::from);
        let validators = Validators { etag: field("etag"), last_modified: field("last-modified"), place: 0 };
        // A date is meant by the clock of whoever wrote it.
        let date = self.decoder.header("date").and_then(|value| http_date(value, received)).unwrap_or(received);
        let fresh_for = fresh_for(self.decoder.headers("cache-control"), self.decoder.header("age"));
        let quotas = rate_limit::quotas(|name| self.decoder.headers(name).collect(), received);
        // A 403 may mean that a budget is used up, as GitHub has it: it says when to come back by that budget's reset.
        let spent = quotas.iter().filter(|quota| status == 403 && quota.remaining == 0).map(|quota| quota.reset).max();
        let retry_after = self.decoder.header("retry-after").and_then(|value| retry_after(value, date)).or(spent);
        let location = self.decoder.header("location").and_then(|value| str::from_utf8(value).ok()).map(str::to_owned);
        let next = link_header::next(self.decoder.headers("link")).map(str::to_owned);
        let response = FetchResponse { status, validators, retry_after, fresh_for, body: Vec::new(), received };
        Answer { response, quotas, location, next }
    }
}

fn refused(error: ResponseError) -> Failure {
    let code = match error.fault() {
        ResponseFault::Protocol => UpstreamCode::Protocol,
        ResponseFault::Body => UpstreamCode::Body,
        ResponseFault::TooLarge => UpstreamCode::TooLarge,
    };
    Failure::of(FetchError { code, detail: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stands_once_in_a_query_whatever_stood_there() {
        let key = Secret::new(*b"api%20key=a%26b");
        for (target, asked) in [
            ("/a", "/a?api%20key=a%26b"),
            ("/a?", "/a?api%20key=a%26b"),
            ("/a?b=1&c", "/a?b=1&c&api%20key=a%26b"),
            ("/a?page=2&api%20key=a%26b", "/a?page=2&api%20key=a%26b"),
            ("/a?api+key=old&page=2&%61pi%20key", "/a?page=2&api%20key=a%26b"),
            ("/a?api%20key2=x&x=api%20key=y", "/a?api%20key2=x&x=api%20key=y&api%20key=a%26b"),
            ("/a?b=%2F?c&d=%26", "/a?b=%2F?c&d=%26&api%20key=a%26b"),
        ] {
            assert_eq!(with_key(target, Some(&key)), asked);
            assert_eq!(with_key(target, None), target);
        }
    }
}
