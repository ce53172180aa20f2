//! The HTTP/1.1 client that carries out polls and actions, one per core: a [`FetchRequest`] or [`Call`] in, a
//! [`FetchResult`] out.
//!
//! Source: RFC 9110 and RFC 9112; what is polled and how an answer is judged stands in `stream::poll`.
//! Memory: the connections of `pool` (bounded by [`FetcherOptions`]); per request under way the request, two buffers of
//! 16 KiB and what the response decoder holds (at most the stream's `response_bytes_max`).
//! Errors: [`FetchError`], whose detail holds no URL, header value or body.
//! Not here: cookies, which are not kept; retries of a poll (`stream::poll`).

mod connect;
mod credential;
mod exchange;
mod journey;
mod link;
mod pages;
mod pool;
mod redirect;
mod stream;
pub(super) mod tls;
mod token;
mod tunnel;

use std::cell::Cell;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use monoio::time::{Instant, sleep, timeout, timeout_at};
use url::{Host, Url};

use self::exchange::Failure;
use self::journey::Journey;
use self::link::Link;
use self::pool::{Connection, Leave, Origin, Place, Pool, PoolFull, Whose};
pub use self::stream::Followers;
use self::tls::{TlsError, TrustSets};
pub use self::tunnel::Egress;
use crate::codec::rate_limit::Quota;
use crate::guard::{Aim, Blocked, Policy};
use crate::limits;
use crate::metrics::CoreMetrics;
use crate::runtime::clock;
use crate::runtime::oauth::Tokens;
use crate::runtime::resolver::{Asker, ResolveError, ResolverHandle};
use crate::secret::Secret;
use crate::stream::CaFile;
use crate::stream::action::{self, Call};
use crate::stream::budget::{Ask, Budgets, Lane, Permit, PollLeave};
use crate::stream::credential::Presented;
use crate::stream::live::{ClientIdentity, IdentityPem};
use crate::stream::oauth::{self, TokenRequest};
use crate::stream::poll::{
    Endpoint, FetchError, FetchRequest, FetchResponse, FetchResult, Target, UpstreamCode, Validators,
};
use crate::time::{Now, WallTime};

use self::token::Exchanges;

/// The shortest wait that goes through the driver.
const TURN: Duration = Duration::from_millis(1);
/// What stands for a time-out that no clock reaches.
const TIMEOUT_MAX: Duration = Duration::from_secs(365 * 86_400);

/// The bounds of one core's client.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FetcherOptions {
    /// Connections at once, 1 at least: connecting, in use and idle. While a name's addresses are tried, one connection may for a
    /// moment have several sockets, at most [`limits::RESOLVER_ADDRESSES_MAX`].
    pub connections_max: usize,
    /// Those of them that requests of callers leave to the operator's; one at least is for callers.
    pub own_connections: usize,
    /// Idle connections to one origin.
    pub idle_per_origin_max: usize,
    /// Idle connections in all.
    pub idle_max: usize,
    /// How long a connection may idle.
    pub idle_timeout: Duration,
    /// Requests of the operator's that may wait for a connection,
    pub waiting_max: usize,
    /// and of callers'.
    pub callers_waiting_max: usize,
    /// Upstreams' streams that are followed at once, each over a connection of its own besides the others.
    pub followed_max: usize,
}

impl Default for FetcherOptions {
    fn default() -> FetcherOptions {
        FetcherOptions {
            connections_max: limits::UPSTREAM_CONNECTIONS_MAX,
            own_connections: limits::UPSTREAM_CONNECTIONS_OWN,
            idle_per_origin_max: limits::UPSTREAM_IDLE_PER_ORIGIN_MAX,
            idle_max: limits::UPSTREAM_IDLE_MAX,
            idle_timeout: limits::UPSTREAM_IDLE_TIMEOUT,
            waiting_max: limits::UPSTREAM_WAITING_MAX,
            callers_waiting_max: limits::UPSTREAM_CALLERS_WAITING_MAX,
            followed_max: limits::UPSTREAM_FOLLOWED_MAX,
        }
    }
}

/// One core's client. Cloning shares it; it stays on its core, and is used inside that core's runtime.
#[derive(Clone)]
pub struct Fetcher {
    pool: Rc<Pool>,
    /// The connections of upstreams' streams, which may last for ever: polls do not wait for their end.
    followed: Rc<Pool>,
    trust: Rc<TrustSets>,
    resolver: ResolverHandle,
    /// Where tokens for upstreams come from, and what counts them.
    tokens: Option<Arc<Tokens>>,
    metrics: Option<Arc<CoreMetrics>>,
    /// Where leave is asked for requests that come without.
    budgets: Option<Arc<Budgets>>,
    /// Which way requests leave.
    egress: Arc<Egress>,
    /// Refresh tokens that are exchanged just now.
    exchanges: Rc<Exchanges>,
}

/// An upstream's answer, and what it says to others than the stream.
#[derive(Debug)]
struct Answer {
    response: FetchResponse,
    /// Its budgets.
    quotas: Vec<Quota>,
    /// `Location`.
    location: Option<String>,
    /// `Link` with the relation `next`.
    next: Option<String>,
}

/// What a client's connections do just now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FetcherCounts {
    /// Connections that are open or being opened.
    pub open: usize,
    /// Those of them that idle.
    pub idle: usize,
}

/// What is asked, and within which bounds: a poll's or an action's.
#[derive(Clone, Copy)]
struct Asked<'a> {
    method: &'a str,
    url: &'a Url,
    /// What the guard has made of a URL that a caller has named, `url` being its; `None`: it is the operator's.
    aim: Option<&'a Aim>,
    /// Who wants it: what callers have named neither waits with what is the operator's nor is in its way.
    asker: Asker,
    headers: &'a [(String, Secret)],
    /// What lets it in besides.
    presented: Option<&'a Presented>,
    body: Option<&'a [u8]>,
    /// What it is conditional on.
    validators: Option<&'a Validators>,
    ca: Option<&'a CaFile>,
    connect_timeout: Duration,
    first_byte_timeout: Duration,
    timeout: Duration,
    response_bytes_max: u64,
    /// Whether an answer of this status has a body that is of use.
    wants_body: &'a dyn Fn(u16) -> bool,
}

impl<'a> Asked<'a> {
    fn of_poll(request: &'a FetchRequest, aim: Option<&'a Aim>) -> Asked<'a> {
        let options = &request.target.options;
        Asked {
            method: &options.method,
            url: aim.map_or(&request.target.url, Aim::url),
            aim,
            asker: asker_of(&request.target),
            headers: &options.headers,
            presented: None,
            body: request.target.body.as_deref(),
            validators: Some(&request.validators),
            ca: options.ca.as_ref(),
            connect_timeout: options.connect_timeout,
            first_byte_timeout: options.first_byte_timeout,
            timeout: options.timeout,
            response_bytes_max: options.response_bytes_max,
            wants_body: &action::is_success,
        }
    }

    fn of_action(call: &'a Call, wants_body: &'a dyn Fn(u16) -> bool) -> Asked<'a> {
        let options = &call.options;
        Asked {
            method: &options.method,
            url: &call.url,
            aim: None,
            asker: Asker::Operator,
            headers: &options.headers,
            presented: None,
            body: call.body.as_deref(),
            validators: None,
            ca: options.ca.as_ref(),
            connect_timeout: options.connect_timeout,
            first_byte_timeout: options.first_byte_timeout,
            timeout: options.timeout,
            response_bytes_max: options.response_bytes_max,
            wants_body,
        }
    }

    /// Whether who asks is signed in for as long as the connection lasts (RFC 4559 section 6, NTLM): whoever used it next would
    /// be taken for the same.
    fn signs_connection_in(&self) -> bool {
        let presented = self.presented.map(|presented| presented.headers.as_slice()).unwrap_or_default();
        self.headers.iter().chain(presented).any(|(name, value)| {
            let scheme = value.expose_secret().split(|b| b" ,\t".contains(b)).find(|word| !word.is_empty());
            let is = |one: &[u8]| scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(one));
            name.eq_ignore_ascii_case("authorization") && (is(b"negotiate") || is(b"ntlm"))
        })
    }

    fn identity(&self) -> Option<&Arc<IdentityPem>> {
        self.presented.and_then(|presented| presented.identity.as_ref())
    }
}

/// A request to a token endpoint.
struct TokenAsked<'a> {
    /// The endpoint.
    options: &'a oauth::Options,
    /// Who says whether it may be connected to, where it does not stand in the operator's file.
    guard: Option<&'a Policy>,
    /// What it is sent.
    request: &'a TokenRequest,
}

/// A request without an answer.
struct Lost {
    error: FetchError,
    /// Its connection had been used before and may just have idled for too long: it is worth a fresh one.
    again: bool,
    /// It found no connection of ours: the upstream knows nothing of it, and is not to blame.
    unsent: bool,
}

impl From<FetchError> for Lost {
    fn from(error: FetchError) -> Lost {
        Lost { error, again: false, unsent: false }
    }
}

/// A request on its way.
struct Course<'a> {
    asked: &'a Asked<'a>,
    wall: &'a dyn Fn() -> WallTime,
    phase: &'a Cell<Phase>,
    /// When the time for the whole of it is up.
    deadline: Instant,
}

/// How far a request has come, so that a time-out can say so.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Phase {
    /// For a connection: nothing has been asked of the upstream yet.
    Waiting,
    Connecting,
    Sending,
    Sent,
    Receiving,
}

impl Fetcher {
    /// A client that has no connections yet.
    pub fn new(options: FetcherOptions, resolver: ResolverHandle) -> Fetcher {
        // Nobody waits for such a place: whoever has one keeps it.
        let followed = FetcherOptions { connections_max: options.followed_max, waiting_max: 0, ..options.clone() };
        let (pool, followed, trust) = (Pool::new(options), Pool::new(followed), Rc::new(TrustSets::new()));
        Fetcher {
            pool,
            followed,
            trust,
            resolver,
            tokens: None,
            metrics: None,
            budgets: None,
            egress: Arc::default(),
            exchanges: Rc::default(),
        }
    }

    /// The same with a place where tokens come from: without one, requests that need a token fail as `Auth`.
    pub fn with_tokens(self, tokens: Arc<Tokens>, metrics: Arc<CoreMetrics>) -> Fetcher {
        Fetcher { tokens: Some(tokens), metrics: Some(metrics), ..self }
    }

    /// The same where actions and requests for tokens count as polls do. Without, they are sent as they come.
    pub fn with_budgets(self, budgets: Arc<Budgets>) -> Fetcher {
        Fetcher { budgets: Some(budgets), ..self }
    }

    /// The same where requests leave by the proxy of `egress`, if it has one.
    pub fn with_egress(self, egress: Arc<Egress>) -> Fetcher {
        Fetcher { egress, ..self }
    }

    /// Asks a token endpoint, once: what it is asked may be good for one time only, so that it goes over a connection of its
    /// own. The answer has its body, whatever its status.
    async fn ask_token(&self, asked: TokenAsked<'_>, wall: impl Fn() -> WallTime) -> FetchResult {
        let TokenAsked { options, guard, request } = asked;
        let aim = guard.map(|policy| policy.judge(options.token_url.as_str())).transpose();
        let aim = aim.map_err(|reason| blocked_by_guard(&reason))?;
        let mut headers = vec![("Content-Type".to_owned(), Secret::new(*b"application/x-www-form-urlencoded"))];
        headers.extend(request.authorization.iter().map(|value| ("Authorization".to_owned(), value.clone())));
        let identity = options.identity.as_ref().map(ClientIdentity::pem);
        let asked = Asked {
            method: "POST",
            url: aim.as_ref().map_or(&options.token_url, Aim::url),
            aim: aim.as_ref(),
            asker: Asker::Operator,
            headers: &headers,
            presented: Some(&Presented { identity, ..Presented::default() }),
            body: Some(request.body.expose_secret()),
            validators: None,
            ca: options.ca.as_ref(),
            connect_timeout: limits::OAUTH_TIMEOUT,
            first_byte_timeout: limits::OAUTH_TIMEOUT,
            timeout: limits::OAUTH_TIMEOUT,
            response_bytes_max: limits::OAUTH_RESPONSE_BYTES_MAX as u64,
            wants_body: &|_| true,
        };
        let deadline = deadline_after(asked.timeout);
        let lane = self.budgets.as_ref().map(|budgets| budgets.lane_of_tokens(options));
        self.send_counted(lane.as_ref(), deadline, &asked, &wall, false).await.map(|answer| answer.response)
    }

    /// Sends a request that is no poll once it may be sent, and tells what came of it.
    async fn send_counted(
        &self,
        lane: Option<&Arc<Lane>>,
        deadline: Instant,
        asked: &Asked<'_>,
        wall: &dyn Fn() -> WallTime,
        reuse: bool,
    ) -> Result<Answer, FetchError> {
        let Some(lane) = lane else { return self.until(deadline, asked, wall, reuse).await };
        let permit = leave_for_call(lane, deadline).await?;
        let leave = async || leave_for_call(lane, deadline).await;
        self.send_permitted(permit, leave, deadline, asked, &clock::now, reuse).await
    }

    /// Sends a request with leave, and tells what came of it. Where the connection that was used again has ended without an
    /// answer, the request may have been read: it counts, and is sent once more over a fresh one with leave of its own, which
    /// `leave` asks for.
    async fn send_permitted(
        &self,
        mut permit: Permit,
        mut leave: impl AsyncFnMut() -> Result<Permit, FetchError>,
        deadline: Instant,
        asked: &Asked<'_>,
        now: &dyn Fn() -> Now,
        mut reuse: bool,
    ) -> Result<Answer, FetchError> {
        let wall = || now().wall;
        loop {
            permit.begin();
            let outcome = self.once(deadline, asked, &wall, reuse).await;
            let error = match outcome {
                Ok(answer) => {
                    permit.answered(now().at, &answer.response, &answer.quotas);
                    return Ok(answer);
                }
                Err(Lost { error, unsent: true, .. }) => {
                    permit.unsent();
                    return Err(error);
                }
                Err(Lost { error, again: false, .. }) => error,
                Err(Lost { error, again: true, .. }) => match leave().await {
                    Ok(another) => {
                        (permit, reuse) = (another, false);
                        continue;
                    }
                    Err(_) => error,
                },
            };
            permit.failed(now().at, &error);
            return Err(error);
        }
    }

    /// Carries out a poll: asks once and reads the whole answer, within the stream's time-outs and size. Where a connection
    /// that idled turns out to have been closed before anything of the answer came, asks once more over a fresh one: a poll
    /// is repeated anyway, whatever its method. Dropping the future closes the connection.
    ///
    /// Where the target has a guard, that judges the URL now, and each new connection by all that the name resolves to then;
    /// only those addresses are connected to. A connection serves those requests alone whose addresses are judged alike
    /// ([`Judgement`](crate::guard::Judgement)), and one of the operator's none that are judged.
    ///
    /// # Errors
    /// `Timeout`, `Unreachable`, `Dns`, `Tls`, `Protocol`, `Body`, `TooLarge` as [`UpstreamCode`] says; `Blocked` for a URL
    /// that is not `http` or `https`, or that the guard blocks. Statuses are no errors here.
    pub async fn fetch(&self, request: FetchRequest, wall: impl Fn() -> WallTime) -> FetchResult {
        let target = &request.target;
        let aim = target.guard.as_ref().map(|policy| policy.judge(target.url.as_str()));
        let aim = aim.transpose().map_err(|reason| blocked_by_guard(&reason))?;
        let asked = Asked::of_poll(&request, aim.as_ref());
        self.let_in(asked, (&target.options.credential, target.guard.as_ref()), &wall, true).await
    }

    /// Carries out a poll as [`fetch`](Fetcher::fetch) does, with `leave` for its first request: redirects are followed as
    /// far as the stream allows it, and pages gathered, with leave of the lane for each further request.
    ///
    /// # Errors
    /// As for [`fetch`](Fetcher::fetch); `Redirect` where an answer leads where it may not, `RateLimited` where leave for a
    /// further request would come too late.
    pub async fn poll(&self, request: FetchRequest, leave: PollLeave, now: impl Fn() -> Now) -> FetchResult {
        Journey::new(self, &request, leave, &now).run().await
    }

    /// Carries out an action, within its time-outs and size; what it waits for leave is part of its time. One that may not be sent twice ([`Call::is_idempotent`]) goes
    /// over a connection of its own from the start; any other is carried out as a poll is. The answer has a body where the
    /// action [wants](action::Options::wants_body) it.
    ///
    /// # Errors
    /// As for [`fetch`](Fetcher::fetch); `RateLimited` where leave would come too late.
    pub async fn act(&self, call: Call, wall: impl Fn() -> WallTime) -> FetchResult {
        let wants_body = |status| call.options.wants_body(status);
        let asked = Asked::of_action(&call, &wants_body);
        let deadline = deadline_after(asked.timeout);
        let lane = self.budgets.as_ref().map(|budgets| budgets.lane_of_call(&call));
        let send = async |presented: Presented| {
            let asked = Asked { presented: Some(&presented), ..asked };
            self.send_counted(lane.as_ref(), deadline, &asked, &wall, call.is_idempotent()).await
        };
        let credential = (&call.options.credential, None);
        self.present(credential, asked.timeout, send).await.map(|answer| answer.response)
    }

    /// How many connections there are.
    pub fn counts(&self) -> FetcherCounts {
        let (open, idle) = self.pool.counts();
        FetcherCounts { open: open + self.followed.counts().0, idle }
    }

    async fn within_time(
        &self,
        asked: &Asked<'_>,
        wall: &dyn Fn() -> WallTime,
        reuse: bool,
    ) -> Result<Answer, FetchError> {
        self.until(deadline_after(asked.timeout), asked, wall, reuse).await
    }

    /// The same, with what is left of the time for several requests.
    async fn until(
        &self,
        deadline: Instant,
        asked: &Asked<'_>,
        wall: &dyn Fn() -> WallTime,
        reuse: bool,
    ) -> Result<Answer, FetchError> {
        match self.once(deadline, asked, wall, reuse).await {
            Err(Lost { again: true, .. }) => self.once(deadline, asked, wall, false).await,
            outcome => outcome,
        }
        .map_err(|lost| lost.error)
    }

    /// The same, sent once.
    async fn once(
        &self,
        deadline: Instant,
        asked: &Asked<'_>,
        wall: &dyn Fn() -> WallTime,
        reuse: bool,
    ) -> Result<Answer, Lost> {
        let phase = Cell::new(Phase::Waiting);
        let limit = asked.timeout;
        let course = Course { asked, wall, phase: &phase, deadline };
        // Where time is up the future is dropped, and with it the connection: what it was doing cannot be taken up again.
        let outcome = match timeout_at(deadline, self.carry_out(&course, reuse)).await {
            Ok(result) => result,
            Err(_) => Err(timed_out(limit, phase.get()).into()),
        };
        outcome.map_err(|lost| Lost { unsent: phase.get() == Phase::Waiting, ..lost })
    }

    async fn carry_out(&self, course: &Course<'_>, reuse: bool) -> Result<Answer, Lost> {
        let origin = self.origin(course.asked)?;
        let (connection, used_before) = self.connection(course, &origin, reuse).await?;
        let outcome = self.exchange(connection, course).await;
        outcome.map_err(|failure| Lost {
            again: failure.unanswered && used_before,
            error: failure.error,
            unsent: false,
        })
    }

    /// A connection to `origin`, and whether it has been used before.
    async fn connection(
        &self,
        course: &Course<'_>,
        origin: &Rc<Origin>,
        reuse: bool,
    ) -> Result<(Connection, bool), FetchError> {
        let mut wants = reuse.then_some(origin);
        if reuse && let Some(connection) = self.open_idle(origin).await {
            return Ok((connection, true));
        }
        let place = loop {
            match self.pool.leave(origin.whose, wants).await.map_err(too_many)? {
                Leave::Open(place) => break place,
                Leave::Reuse(mut connection) => {
                    if connection.link.is_open().await {
                        return Ok((connection, true));
                    }
                    wants = None;
                }
            }
        };
        Ok((self.open_in_time(course, origin, place).await?, false))
    }

    /// Leave to open a connection for an upstream's stream.
    async fn place_to_follow(&self) -> Result<Place, FetchError> {
        match self.followed.leave(Whose::Operator, None).await {
            Ok(Leave::Open(place)) => Ok(place),
            Ok(Leave::Reuse(_)) | Err(PoolFull) => {
                let detail = "as many upstreams' streams are followed as may be at once".to_owned();
                Err(FetchError { code: UpstreamCode::Unreachable, detail })
            }
        }
    }

    /// A new connection, within the time for that.
    async fn open_in_time(
        &self,
        course: &Course<'_>,
        origin: &Rc<Origin>,
        place: Place,
    ) -> Result<Connection, FetchError> {
        course.phase.set(Phase::Connecting);
        let limit = course.asked.connect_timeout;
        match timeout(limit, self.open(course.asked, Rc::clone(origin), place)).await {
            Ok(opened) => opened,
            Err(_) => Err(timed_out(limit, Phase::Connecting)),
        }
    }

    async fn exchange(&self, connection: Connection, course: &Course<'_>) -> Result<Answer, Failure> {
        course.phase.set(Phase::Sending);
        let Connection { link, origin, place } = connection;
        let (answer, link) = exchange::run(course, link).await?;
        if let Some(link) = link.filter(|_| !course.asked.signs_connection_in()) {
            self.pool.keep(Connection { link, origin, place });
        }
        Ok(answer)
    }

    /// A connection that idles and has not been closed by the upstream; those that have are closed on the way.
    async fn open_idle(&self, origin: &Rc<Origin>) -> Option<Connection> {
        while let Some(mut connection) = self.pool.idle(origin) {
            if connection.link.is_open().await {
                return Some(connection);
            }
        }
        None
    }

    fn origin(&self, asked: &Asked<'_>) -> Result<Rc<Origin>, FetchError> {
        let Endpoint { https, port, host, .. } = endpoint(asked)?;
        let via = self.egress.way_to(&host);
        let host = asked.url.host_str().unwrap_or_default().into();
        let trust = if https { self.trust.id_of(asked.ca, asked.identity()) } else { tls::TrustId::SYSTEM };
        let whose = match asked.asker {
            Asker::Operator => Whose::Operator,
            Asker::Caller(_) => Whose::Caller,
        };
        Ok(Rc::new(Origin { https, host, port, trust, judged: asked.aim.map(Aim::judgement), whose, via }))
    }

    async fn open(&self, asked: &Asked<'_>, origin: Rc<Origin>, place: Place) -> Result<Connection, FetchError> {
        let host = endpoint(asked)?.host;
        let mut stream = match &origin.via {
            Some(via) => self.tunnel(asked, via, &host, origin.port).await?,
            None => {
                let addresses = self.addresses(asked, &host).await?;
                connect::connect(&addresses, origin.port).await.map_err(|e| unreachable(&e))?
            }
        };
        let link = if origin.https {
            let config = self.trust.config(asked.ca, asked.identity(), &self.resolver).await.map_err(tls_failed)?;
            let name = tls::server_name(&host).map_err(tls_failed)?;
            let tls = tls::handshake(&mut stream, config, name).await.map_err(tls_failed)?;
            Link::sealed(stream, tls)
        } else {
            Link::plain(stream)
        };
        Ok(Connection { link, origin, place })
    }

    /// The addresses to connect to: of a guarded target those that the guard has pinned.
    async fn addresses(&self, asked: &Asked<'_>, host: &Host<&str>) -> Result<Arc<[IpAddr]>, FetchError> {
        let found: Arc<[IpAddr]> = match host {
            Host::Ipv4(ip) => Arc::from([IpAddr::V4(*ip)]),
            Host::Ipv6(ip) => Arc::from([IpAddr::V6(*ip)]),
            Host::Domain(name) => {
                let answer = self.resolver.resolve(name, asked.asker).await;
                answer.map_err(|error| unresolved(&error, asked.aim))?
            }
        };
        let Some(aim) = asked.aim else { return Ok(found) };
        let target = aim.clone().pin(&found).map_err(|reason| blocked_by_guard(&reason))?;
        Ok(Arc::clone(target.addresses()))
    }
}

/// Who wants a poll: whoever has described its target, or the operator, who has it in the file or made by the admin API.
fn asker_of(target: &Target) -> Asker {
    match &target.guard {
        Some(policy) if !policy.own => Asker::Caller(target.options.described_by),
        _ => Asker::Operator,
    }
}

/// Leave for a request that is no poll, waited for through three quarters of the time until `deadline`: one that is sent at the
/// last moment would be carried out, and its answer not be waited for.
async fn leave_for_call(lane: &Arc<Lane>, deadline: Instant) -> Result<Permit, FetchError> {
    let latest = deadline - deadline.saturating_duration_since(Instant::now()) / 4;
    loop {
        let (now, left) = (clock::now().at, latest.saturating_duration_since(Instant::now()));
        let until = match lane.ask_for_call(now, left) {
            Ask::Go(permit) => {
                let span = permit.starts().since(now);
                if !span.is_zero() {
                    sleep(span).await;
                }
                return Ok(permit);
            }
            Ask::Wait(wait) => wait.until,
        };
        let span = until.since(now);
        if span >= left {
            let detail = "the upstream takes no more requests in time".to_owned();
            return Err(FetchError { code: UpstreamCode::RateLimited, detail });
        }
        sleep(span.max(TURN)).await;
    }
}

/// A name has no addresses. Whoever may name any host is told the same of one that leads inside: else names could be tried
/// until one proves to be there. The detail, which the operator sees, tells them apart.
fn unresolved(error: &ResolveError, aim: Option<&Aim>) -> FetchError {
    let is_told = *error == ResolveError::Busy || aim.is_none_or(Aim::is_chosen);
    let code = if is_told { UpstreamCode::Dns } else { UpstreamCode::Blocked };
    FetchError { code, detail: error.to_string() }
}

fn endpoint<'a>(asked: &Asked<'a>) -> Result<Endpoint<'a>, FetchError> {
    Endpoint::of(asked.url).ok_or_else(|| blocked("neither http nor https, or without a host"))
}

fn blocked_by_guard(reason: &Blocked) -> FetchError {
    FetchError { code: UpstreamCode::Blocked, detail: format!("{reason} ({})", reason.reason()) }
}

fn deadline_after(limit: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(limit).unwrap_or(now + TIMEOUT_MAX)
}

fn timed_out(limit: Duration, phase: Phase) -> FetchError {
    let doing = match phase {
        Phase::Waiting => "waiting for a free connection",
        Phase::Connecting => "connecting",
        Phase::Sending => "sending the request",
        Phase::Sent => "waiting for the response's first byte",
        Phase::Receiving => "receiving the response",
    };
    FetchError { code: UpstreamCode::Timeout, detail: format!("{limit:?} passed while {doing}") }
}

fn too_many(_: PoolFull) -> FetchError {
    FetchError { code: UpstreamCode::Unreachable, detail: "too many requests wait for a connection".into() }
}

fn blocked(why: &str) -> FetchError {
    FetchError { code: UpstreamCode::Blocked, detail: why.to_owned() }
}

fn unreachable(error: &io::Error) -> FetchError {
    FetchError { code: UpstreamCode::Unreachable, detail: format!("no connection: {}", in_words(error)) }
}

fn tls_failed(error: TlsError) -> FetchError {
    FetchError { code: UpstreamCode::Tls, detail: error.to_string() }
}

/// An error of a socket, which holds nothing that was sent.
pub(super) fn in_words(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code).to_string(),
        None => error.kind().to_string(),
    }
}
