//! Streams that callers describe themselves: who may, for which targets, and what a description becomes: a key like that of
//! any stream.
//!
//! Source: protocol version 1, sections 1 and 2. Two callers share a stream where all of its request is the same: its name is
//! a MAC of URL, method, headers, body and interval under a key of this process, or of all that share a secret, and the
//! operator's rules that let it in are part of its key's revision. So secrets are compared without being kept anywhere but in the request itself.
//! Memory: a key for each description in use. Errors: [`Refusal`]; one that is blocked is told that, and nothing else.
//! Not here: what is blocked (`guard`), ephemeral sessions (`ephemeral`).

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use crate::auth::ephemeral::{STREAM_PREFIX, is_stream_name};
use crate::auth::ephemeral_record::SharedSession;
use crate::auth::grant::{CredentialKind, Grant, GrantRecord};
use crate::codec::direct::{self, DirectBody, DirectRequest};
use crate::codec::http::Head;
use crate::codec::message::{ClientId, CloseReason, ErrorCode, StreamState};
use crate::connection::handshake::{Page, Refusal};
use crate::connection::{BodyPurpose, Caller, DirectAsk, Opening, Reply, StreamRequest};
use crate::guard::{Blocked, DirectOptions, HeaderFault};
use crate::ids::{Holder, ResumePoint, StreamId};
use crate::stream;
use crate::stream::poll::{RESTART_MIN, UpstreamCode};
use crate::stream::select::Select;
use crate::stream::template::UrlTemplate;

use super::requests::{BY_API_KEY, Judged, SUBJECT};
use super::{Shard, StreamKey};

/// What stands where a configured stream has its template: the URL itself is the target's.
static NO_TEMPLATE: LazyLock<UrlTemplate> =
    LazyLock::new(|| UrlTemplate::parse::<&str>("http://direct.invalid/", &[]).expect("it is a URL"));

fn off() -> Refusal {
    Refusal::new(ErrorCode::NotFound, "there is no such resource")
}

/// The same whatever it is that speaks against the target.
pub(super) fn blocked() -> Refusal {
    Refusal::new(ErrorCode::TargetBlocked, ErrorCode::TargetBlocked.meaning())
}

fn refused_header(fault: &HeaderFault) -> Refusal {
    match fault {
        HeaderFault::Name
        | HeaderFault::Value
        | HeaderFault::Repeated
        | HeaderFault::TooLong
        | HeaderFault::TooMany => Refusal::new(ErrorCode::BadRequest, format!("headers: {fault}")),
        // Which headers there are is no secret of the target's.
        _ => Refusal::new(ErrorCode::TargetBlocked, format!("headers: {fault}")),
    }
}

impl Shard {
    /// Whether `grant` may describe streams of its own.
    ///
    /// # Errors
    /// 404 where nobody may, 401 without a credential, 403.
    pub(super) fn may_describe(&self, grant: &Grant) -> Result<&DirectOptions, Refusal> {
        let options = self.options.catalog.direct().ok_or_else(off)?;
        if grant.kind() == CredentialKind::Anonymous {
            return Err(Refusal::new(ErrorCode::MissingCredential, "a credential is needed"));
        }
        if grant.only().is_some() || grant.streams_allow(STREAM_PREFIX).is_err() {
            return Err(Refusal::new(ErrorCode::Forbidden, "the credential is not for streams of one's own"));
        }
        self.has_direct_role(grant, options)?;
        Ok(options)
    }

    fn has_direct_role(&self, grant: &Grant, options: &DirectOptions) -> Result<(), Refusal> {
        grant.has_rights(&options.roles, &[]).map_err(|_| {
            let detail = "the credential has none of the roles that may name targets";
            Refusal::new(ErrorCode::InsufficientPermissions, detail)
        })
    }

    /// The stream that `grant` describes.
    ///
    /// # Errors
    /// Those of [`Shard::may_describe`]; 403 `TARGET_BLOCKED`, 400 for a header that is none.
    pub(super) fn described(&self, grant: &Grant, request: &DirectRequest) -> Result<Arc<StreamKey>, Refusal> {
        let options = self.may_describe(grant)?;
        let text = std::str::from_utf8(request.url.expose_secret()).map_err(|_| blocked())?;
        let aim = options.policy.judge(text).map_err(|_| blocked())?;
        let headers = request.headers.iter().map(|(name, value)| (&**name, value.expose_secret()));
        options.policy.judge_headers(headers).map_err(|reason| match reason {
            Blocked::Header(fault) => refused_header(&fault),
            _ => blocked(),
        })?;
        let interval = Duration::from_millis(request.interval_ms).max(options.interval_min);
        let mut headers = request.headers.clone();
        for (name, _) in &mut headers {
            name.make_ascii_lowercase();
        }
        headers.sort_by(|one, other| one.0.cmp(&other.0));
        let method = if request.post { "POST" } else { "GET" };
        let interval_ms = interval.as_millis().to_le_bytes();
        let head = [aim.url().as_str().as_bytes(), method.as_bytes(), &interval_ms];
        let given = headers.iter().flat_map(|(name, value)| [name.as_bytes(), value.expose_secret()]);
        let body = request.body.as_ref().map(|body| body.expose_secret());
        // No header has this name: what follows is the body, if there is one.
        let name = self.ledger.direct_key().stream_name(head.into_iter().chain(given).chain([&b":"[..]]).chain(body));
        let id = StreamId::new(&name).expect("a name of ours is an id");
        let stream = stream::Options {
            interval,
            method: method.to_owned(),
            headers,
            described_by: Some(self.asker(grant)),
            ..bounded(stream::Options::new(id, NO_TEMPLATE.clone()), options)
        };
        let body = body.map(Arc::from);
        let key = self.options.catalog.direct_key(name, stream, aim.url().clone(), body).ok_or_else(off)?;
        Ok(Arc::new(key))
    }

    /// Whom a stream that `grant` describes is polled for: its subject, or whoever has that credential.
    pub(super) fn asker(&self, grant: &Grant) -> Holder {
        let of_token = || self.ledger.holder("token", (grant.issuer(), grant.token()));
        self.subject(grant).unwrap_or_else(of_token)
    }

    /// The same of the maker of a session.
    fn asker_of(&self, maker: &GrantRecord) -> Holder {
        let kind = if maker.api_key.is_some() { BY_API_KEY } else { SUBJECT };
        let (issuer, sub) = (maker.rights.issuer.as_deref(), maker.sub.as_deref());
        sub.map_or_else(
            || self.ledger.holder("token", (issuer, maker.token)),
            |sub| self.ledger.holder(kind, (issuer, sub)),
        )
    }

    /// A stream that was described to another process, under the configuration of this one. It goes by the name that it has
    /// there.
    ///
    /// # Errors
    /// 404 where nobody may describe streams, 403 `TARGET_BLOCKED`, 401 for what is no such stream.
    pub(super) fn described_elsewhere(&self, session: SharedSession) -> Result<Arc<StreamKey>, Refusal> {
        let SharedSession { face, request } = session;
        let unknown = || Refusal::new(ErrorCode::InvalidToken, "the session is of a form that is not known here");
        let options = self.options.catalog.direct().ok_or_else(off)?;
        let aim = options.policy.judge(&request.url).map_err(|_| blocked())?;
        let headers = request.headers.iter().map(|(name, value)| (&**name, value.expose_secret()));
        options.policy.judge_headers(headers).map_err(|_| blocked())?;
        let id = StreamId::new(&face.stream).filter(|_| is_stream_name(&face.stream)).ok_or_else(unknown)?;
        let stream = stream::Options {
            interval: Duration::from_millis(request.interval_ms).max(options.interval_min),
            method: if request.post { "POST" } else { "GET" }.to_owned(),
            headers: request.headers,
            described_by: Some(self.asker_of(&request.maker)),
            ..bounded(stream::Options::new(id, NO_TEMPLATE.clone()), options)
        };
        let body = request.body.map(|body| Arc::from(body.expose_secret()));
        let key = self.options.catalog.direct_key(face.stream, stream, aim.url().clone(), body).ok_or_else(off)?;
        self.selected(Arc::new(key), request.select.as_deref(), ErrorCode::InvalidToken)
    }

    /// A stream that was described under an earlier configuration, under the present one.
    pub(super) fn described_again(&self, key: &Arc<StreamKey>) -> Result<Arc<StreamKey>, Refusal> {
        if self.options.catalog.is_current(key) {
            return Ok(Arc::clone(key));
        }
        let options = self.options.catalog.direct().ok_or_else(off)?;
        let target = &key.target;
        options.policy.judge(target.url.as_str()).map_err(|_| blocked())?;
        let headers = target.options.headers.iter().map(|(name, value)| (&**name, value.expose_secret()));
        options.policy.judge_headers(headers).map_err(|_| blocked())?;
        let stream = stream::Options {
            interval: target.options.interval.max(options.interval_min),
            ..bounded((*target.options).clone(), options)
        };
        let again =
            self.options.catalog.direct_key(key.name.to_string(), stream, target.url.clone(), target.body.clone());
        let again = again.map(Arc::new).ok_or_else(off)?;
        Ok(selecting(again, key.facet.select.as_ref()))
    }

    /// What `grant` gets as stream `id` with these parameters: a configured one, or that of its ephemeral session.
    ///
    /// # Errors
    /// In the protocol's order.
    pub(super) fn resolve(
        &self,
        grant: &Grant,
        id: &str,
        params: &[(String, String)],
    ) -> Result<Arc<StreamKey>, Refusal> {
        match grant.only() {
            None => self.options.catalog.resolve(grant, id, params),
            Some(_) if grant.streams_allow(id).is_err() => {
                Err(Refusal::new(ErrorCode::Forbidden, "the credential is not for this stream"))
            }
            Some(only) => {
                let options = self.options.catalog.direct().ok_or_else(off)?;
                let key = self
                    .ledger
                    .ephemerals()
                    .key(only.session)
                    .ok_or_else(|| Refusal::new(ErrorCode::StreamNotFound, "there is no such stream"))?;
                self.has_direct_role(grant, options)?;
                self.described_again(&key)
            }
        }
    }

    /// The same for what a request asks for; `None`: nothing yet.
    ///
    /// # Errors
    /// As above.
    pub(super) fn resolve_request(
        &self,
        grant: &Grant,
        request: &StreamRequest,
    ) -> Result<Option<Arc<StreamKey>>, Refusal> {
        let key = match &request.direct {
            None => self.resolve(grant, &request.id, &request.params)?,
            Some(DirectAsk::Here(described)) => self.described(grant, described)?,
            Some(DirectAsk::FirstMessage) => return self.may_describe(grant).map(|_| None),
        };
        self.selected(key, request.select.as_deref(), ErrorCode::BadRequest).map(Some)
    }

    /// What `grant` gets now of a stream that it had.
    ///
    /// # Errors
    /// As above.
    pub(super) fn resolve_again(&self, grant: &Grant, key: &Arc<StreamKey>) -> Result<Arc<StreamKey>, Refusal> {
        if grant.only().is_some() {
            let resolved = self.resolve(grant, key.target.options.id.as_str(), &key.params)?;
            let own = key.facet.select.as_ref().filter(|_| resolved.facet.select.is_none());
            return Ok(selecting(resolved, own));
        }
        if key.is_direct() {
            self.may_describe(grant)?;
            return self.described_again(key);
        }
        self.options.catalog.resolve_anew(grant, key)
    }

    /// Whether there is no such stream any more, for anybody.
    pub(super) fn has_ended(&self, grant: &Grant, key: &StreamKey) -> bool {
        if !key.is_direct() {
            return !self.options.catalog.contains(&key.target.options.id);
        }
        let session = grant.only().map(|only| only.session);
        self.options.catalog.direct().is_none()
            || session.is_some_and(|session| self.ledger.ephemerals().key(session).is_none())
    }

    /// A body that describes a stream is awaited; who sends it is judged before.
    pub(super) fn read_description(
        &mut self,
        index: u32,
        head: &Head<'_>,
        page: &Page,
        addr: std::net::IpAddr,
        reply: Reply,
        purpose: impl FnOnce(Caller) -> BodyPurpose,
    ) {
        let grant = match self.judge(index, head, page, addr, None, false) {
            Ok(Judged::Granted(grant)) => grant,
            Ok(Judged::FirstMessage | Judged::Later) => return,
            Err(refusal) => return self.refuse_credential(index, &refusal, &reply, addr),
        };
        if let Err(refusal) = self.may_describe(&grant) {
            self.rights.release(grant);
            return self.refuse(index, &refusal, &reply);
        }
        let session = grant.session();
        let caller = Caller { grant: Box::new(grant), since: self.now };
        self.join_session(session, index);
        self.read_body_for(index, head, purpose(caller), reply);
    }

    /// A described stream is wanted as events or as its value.
    pub(super) fn direct_body_read(
        &mut self,
        index: u32,
        body: &[u8],
        caller: Caller,
        mut request: Box<StreamRequest>,
        sse: bool,
        reply: Reply,
    ) {
        let grant = match self.caller_now(index, caller) {
            Ok(grant) => grant,
            Err(refusal) => return self.refuse(index, &refusal, &reply),
        };
        let said = match described_in(body) {
            Ok(said) => said,
            Err(refusal) => {
                self.rights.release(grant);
                return self.refuse(index, &refusal, &reply);
            }
        };
        describe(&mut request, said);
        if sse {
            self.open_events_under(index, grant, &request, &reply);
        } else {
            self.get_value_under(index, grant, &request, None, None, reply);
        }
    }

    /// The grant of one whose body has been read, by all that was said while it was awaited: nobody has looked at it since.
    ///
    /// # Errors
    /// 401 where it is good no longer.
    pub(super) fn caller_now(&mut self, index: u32, caller: Caller) -> Result<Grant, Refusal> {
        let since = caller.since;
        let grant = self.take_caller(index, caller);
        let grant = self.grant_now(grant)?;
        self.still_good(&grant, since)?;
        Ok(grant)
    }

    /// The grant of one whose body is awaited no more.
    pub(super) fn take_caller(&mut self, index: u32, caller: Caller) -> Grant {
        self.leave_session(caller.grant.session(), index);
        *caller.grant
    }

    /// A WebSocket has been opened whose first message is to describe its stream.
    pub(super) fn await_opening(&mut self, index: u32, request: StreamRequest) {
        let deadline = self.now.at + self.options.limits.handshake_timeout;
        if let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) {
            open.opening = Some(Box::new(Opening { deadline, request }));
        }
        self.arm(index);
    }

    /// Whether a connection is still to describe its stream.
    pub(super) fn is_opening(&self, index: u32) -> bool {
        let open = self.connections.at(index).and_then(|connection| connection.open());
        open.is_some_and(|open| open.opening.is_some())
    }

    /// The first message of a WebSocket that describes its stream: `open`.
    pub(super) fn asked_to_open(&mut self, index: u32, id: Option<&ClientId>, text: &str) {
        let said = match direct::parse(text) {
            Ok(said) => said,
            // It may be said once more, as long as there is time.
            Err(reason) => return self.tell_error(index, ErrorCode::BadMessage, reason, id, None),
        };
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return };
        let Some(opening) = &open.opening else { return };
        let mut request = opening.request.clone();
        describe(&mut request, said);
        let resolved = self.resolve_request(&open.grant, &request);
        if let Err(refusal) = &resolved
            && refusal.code == ErrorCode::BadRequest
        {
            return self.tell_error(index, ErrorCode::BadMessage, &refusal.detail, id, None);
        }
        if let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) {
            open.opening = None;
        }
        match resolved {
            Ok(Some(key)) => self.open_single(index, &key, &request, id),
            Ok(None) => {}
            Err(refusal) => {
                self.tell_error(index, refusal.code, &refusal.detail, id, None);
                let reason = match refusal.code {
                    ErrorCode::NotFound => CloseReason::NotFound,
                    _ => CloseReason::Forbidden,
                };
                self.close(index, reason);
            }
        }
        self.arm(index);
    }

    /// Whether a stream that gives no value is one whose target proved to be blocked.
    pub(super) fn is_blocked(&self, topic: u32) -> bool {
        let status = self.topics.at(topic).and_then(|topic| topic.status);
        status.is_some_and(|status| status.state == StreamState::Failing && status.code == Some(UpstreamCode::Blocked))
    }
}

/// A stream within what `[direct]` sets for all.
fn bounded(stream: stream::Options, options: &DirectOptions) -> stream::Options {
    stream::Options {
        linger: options.linger,
        restart_min: RESTART_MIN.max(options.interval_min),
        timeout: options.timeout,
        response_bytes_max: options.response_bytes_max,
        ..stream
    }
}

fn selecting(key: Arc<StreamKey>, select: Option<&Select>) -> Arc<StreamKey> {
    match select {
        None => key,
        Some(select) => key.selecting(select.clone()),
    }
}

/// What a body says.
pub(super) fn described_in(body: &[u8]) -> Result<DirectBody, Refusal> {
    let bad = |detail: &'static str| Refusal::new(ErrorCode::BadRequest, detail);
    let text = std::str::from_utf8(body).map_err(|_| bad("the body is not UTF-8"))?;
    direct::parse(text).map_err(bad)
}

/// What a request wants, with what its body or message says of it.
fn describe(request: &mut StreamRequest, said: DirectBody) {
    let DirectBody { request: described, select, format, since, max_rate_ms, .. } = said;
    request.select = select.or(request.select.take());
    request.direct = Some(DirectAsk::Here(Box::new(described)));
    request.format = format.unwrap_or(request.format);
    if let Some(since) = since {
        request.since = ResumePoint::parse(&since);
    }
    request.max_rate_ms = max_rate_ms.unwrap_or(request.max_rate_ms);
}
