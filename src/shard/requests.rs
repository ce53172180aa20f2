//! Requests: read from a connection's bytes, judged in the protocol's order of refusal, carried out.
//!
//! Source: protocol version 1, sections 1 and 2; RFC 9112, 6455.
//! Memory: one head and one small body a connection while it is read. Errors: [`Refusal`].
//! Not here: what a head means (`connection::handshake`), what an open connection says (`open`).

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use crate::auth::grant::Grant;
use crate::codec::forwarded::{self, ProxyError};
use crate::codec::http::{self, BodyDecoder, BodyError, BodyLength, Framing, Head, Response, Upgrade};
use crate::codec::message::{ClientId, CloseReason, ErrorCode, Format};
use crate::codec::ws;
use crate::connection::handshake::{self, Carrier, Demand, How, Page, Refusal, SeenAs};
use crate::connection::{
    BodyPurpose, Connection, Echo, FirstCredential, Http, MessageRate, Phase, Reply, State, StreamRequest,
    Unauthenticated,
};
use crate::frame::{Encoding, Transport};
use crate::ids::{ConnectionKey, Holder};
use crate::limits;
use crate::time::Instant;

use super::ledger::Standing;
use super::lookup::{Authenticated, Waiter};
use super::subscribe::Cause;
use super::{CannedAnswer, Shard};

/// The policy of the playground page, hashed once.
static PLAYGROUND_POLICY: LazyLock<String> = LazyLock::new(crate::web::playground_security_policy);
/// The tag of the client library, hashed once.
static CLIENT_ETAG: LazyLock<String> = LazyLock::new(crate::web::client_etag);
/// Bytes of a connection whose requests must wait: past it, and past a head's limit, reading waits.
const BUFFERED_BYTES_MAX: usize = 256 << 10;
/// How long an answer to a failed credential is held back, where the address has failed too often.
pub const FAILURE_DELAY: Duration = Duration::from_secs(1);
/// How long another core may take to answer.
pub(super) const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// Who is at the other end, and how they see this server.
struct Client {
    addr: IpAddr,
    seen_as: SeenAs,
}

/// What became of looking at a request's credential.
pub(super) enum Judged {
    /// It opens with this grant.
    Granted(Grant),
    /// It may bring its credential in the first message.
    FirstMessage,
    /// Somebody outside is asked: the request is carried out again when the answer is there.
    Later,
}

/// What the holder of a subject's limits is made of: a user whose id is spelled like an API key's is not that key.
pub(super) const SUBJECT: &str = "subject";
pub(super) const BY_API_KEY: &str = "subject by API key";

impl Shard {
    /// A connection was accepted from `peer`.
    ///
    /// # Errors
    /// What to send before it is closed.
    pub fn accept(&mut self, now: crate::time::Now, peer: SocketAddr) -> Result<ConnectionKey, CannedAnswer> {
        self.now = now;
        if self.draining.is_some() {
            return Err(CannedAnswer::Draining);
        }
        let limits = &self.options.limits;
        if self.ledger.open_connection(limits.connections).is_err() {
            return Err(CannedAnswer::TooManyConnections);
        }
        let addr = peer.ip().to_canonical();
        let proxied = self.options.connection.trusted_proxies.iter().any(|net| net.contains(&addr));
        let mut holder = None;
        if limits.connections_per_address > 0 && !proxied {
            let address = self.ledger.address(addr);
            if self.ledger.hold_connection(address, limits.connections_per_address, now.at).is_err() {
                self.ledger.close_connection();
                return Err(CannedAnswer::TooManyFromAddress);
            }
            holder = Some(address);
        }
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let http = Http {
            buffer: Vec::new(),
            phase: Phase::Head,
            deadline: now.at + limits.handshake_timeout,
            peer: addr,
            proxied,
            told_by_proxy: None,
            admitted: None,
            fresh: true,
            judged: None,
        };
        let mut connection = Connection::accepted(generation, self.ledger.address(addr), now.at, http);
        connection.address = holder;
        let index = self.connections.insert(connection);
        self.metrics.accepted.count();
        self.arm(index);
        Ok(ConnectionKey { index, generation })
    }

    /// Whether bytes of this connection are to be read from its socket now.
    pub fn wants_bytes(&self, index: u32) -> bool {
        self.connections.at(index).is_some_and(|connection| !connection.paused)
    }

    /// Whether a PROXY header may come from this connection's peer before anything else.
    pub fn may_be_proxied(&self, index: u32) -> bool {
        match self.connections.at(index).map(|connection| &connection.state) {
            Some(State::Http(http)) => http.fresh && http.proxied,
            _ => false,
        }
    }

    /// Whether a TLS handshake is to be made with a connection: limits come before any cryptography. `told`: the client's
    /// address, where a trusted proxy has told it before the handshake.
    pub fn admit(&mut self, now: crate::time::Now, index: u32, told: Option<IpAddr>) -> bool {
        self.now = now;
        let Some(http) = self.http_mut(index).filter(|http| http.fresh) else { return true };
        let proxied = http.proxied;
        let told = told.map(|addr| addr.to_canonical()).filter(|_| proxied);
        http.told_by_proxy = told;
        let addr = told.unwrap_or(http.peer);
        // A proxy has no limits of its own. Whom it speaks for, where it has not said so yet, its request will tell.
        if self.options.connection.trusted_proxies.iter().any(|net| net.contains(&addr)) {
            return true;
        }
        let admitted = self.count_client(index, addr, proxied).is_ok();
        let holder = self.ledger.address(addr);
        if let Some(http) = self.http_mut(index) {
            http.admitted = Some(holder);
        }
        admitted
    }

    pub(super) fn received(&mut self, index: u32, bytes: &mut [u8]) {
        let now = self.now.at;
        let handshake_timeout = self.options.limits.handshake_timeout;
        let Some(connection) = self.connections.at_mut(index) else { return };
        connection.heard = now;
        self.metrics.received_bytes.add(bytes.len() as u64);
        match &mut connection.state {
            State::Http(http) => {
                if matches!(http.phase, Phase::Head) && http.buffer.is_empty() && !http.fresh {
                    // A further request has begun: from now on its head is waited for, not its beginning.
                    http.deadline = now + handshake_timeout;
                }
                http.buffer.extend_from_slice(bytes);
                self.serve_http(index);
                self.arm(index);
            }
            State::Open(open) if open.transport == Transport::Sse => {}
            State::Open(_) | State::Unauthenticated(_) | State::Echo(_) | State::Closing(_) => {
                self.websocket_bytes(index, bytes);
            }
        }
        // Whoever does not take its answers is not asked for more.
        if let Some(connection) = self.connections.at_mut(index) {
            connection.paused |= connection.is_full();
        }
        if self.has_unserved(index)
            && let Some(connection) = self.connections.at_mut(index)
        {
            connection.paused = true;
        }
    }

    /// Whether so many bytes of requests that must wait have been read that no more are to be.
    pub(super) fn has_unserved(&self, index: u32) -> bool {
        let bound = BUFFERED_BYTES_MAX.max(self.options.limits.request_head_bytes_max as usize);
        match self.connections.at(index).map(|connection| &connection.state) {
            Some(State::Http(http)) => http.buffer.len() > bound,
            _ => false,
        }
    }

    /// Makes as many requests as there are of what has been received, until one must wait.
    pub(super) fn serve_http(&mut self, index: u32) {
        loop {
            let head_max = self.options.limits.request_head_bytes_max as usize;
            let tls = self.options.connection.tls;
            let Some(connection) = self.connections.at_mut(index) else { return };
            let full = connection.is_full();
            let State::Http(http) = &mut connection.state else { return };
            if http.buffer.is_empty() || full {
                return;
            }
            let mut buffer = std::mem::take(&mut http.buffer);
            let used = match &http.phase {
                // With TLS it stands before the handshake, where the shell reads it.
                Phase::Head if http.fresh && http.proxied && !tls => match self.read_proxy_header(index, &buffer) {
                    Some(used) => used,
                    None => return self.keep(index, buffer),
                },
                Phase::Head => match http::parse_head(&buffer, head_max) {
                    Ok(None) => return self.keep(index, buffer),
                    Ok(Some((head, used))) => {
                        http.fresh = false;
                        self.request(index, &head);
                        self.keep_head(index, buffer.get(..used).unwrap_or_default());
                        used
                    }
                    Err(error) => {
                        let code = match error.status() {
                            413 | 414 | 431 => ErrorCode::TooLarge,
                            _ => ErrorCode::BadRequest,
                        };
                        let refusal = Refusal::new(code, error.to_string()).with_status(error.status());
                        self.refuse(index, &refusal, &Reply::default());
                        return;
                    }
                },
                Phase::Body { .. } => match self.read_body(index, &buffer) {
                    Some(used) => used,
                    None => return,
                },
                Phase::Waiting { .. } | Phase::Asking { .. } | Phase::Looking { .. } | Phase::Delayed { .. } => {
                    return self.keep(index, buffer);
                }
            };
            buffer.drain(..used);
            if !self.go_on(index, buffer) {
                return;
            }
        }
    }

    /// A request has been carried out: `buffer` came behind it. Whether the connection still speaks HTTP.
    fn go_on(&mut self, index: u32, mut buffer: Vec<u8>) -> bool {
        match self.connections.at_mut(index).map(|connection| &mut connection.state) {
            Some(State::Http(http)) => {
                http.buffer = buffer;
                return true;
            }
            // What came behind an upgrade is the WebSocket's.
            Some(State::Open(_) | State::Unauthenticated(_) | State::Echo(_)) if !buffer.is_empty() => {
                self.received(index, &mut buffer);
            }
            _ => {}
        }
        false
    }

    /// Keeps the head of a request whose credential is being looked at.
    fn keep_head(&mut self, index: u32, bytes: &[u8]) {
        if let Some(Phase::Looking { head, .. }) = self.http_mut(index).map(|http| &mut http.phase) {
            head.extend_from_slice(bytes);
        }
    }

    /// The credential of a request has been looked at: the request is carried out.
    pub(super) fn request_judged(&mut self, connection: ConnectionKey, outcome: Result<Grant, Refusal>) {
        let Some(index) = self.still(connection) else { return };
        let head_max = self.options.limits.request_head_bytes_max as usize;
        let deadline = self.now.at + self.options.limits.handshake_timeout;
        let Some(connection) = self.connections.at_mut(index) else { return };
        let client = connection.client;
        let State::Http(http) = &mut connection.state else { return };
        let Phase::Looking { head, .. } = &mut http.phase else { return };
        let head = std::mem::take(head);
        http.phase = Phase::Head;
        http.deadline = deadline;
        http.judged = Some(outcome);
        // It has been counted.
        http.admitted = Some(client);
        let buffer = std::mem::take(&mut http.buffer);
        match http::parse_head(&head, head_max.max(head.len())) {
            Ok(Some((head, _))) => self.request(index, &head),
            // It has been read before.
            Ok(None) | Err(_) => return self.close(index, CloseReason::Internal),
        }
        if let Some(http) = self.http_mut(index) {
            http.judged = None;
        }
        if self.go_on(index, buffer) {
            self.serve_http(index);
        }
        self.arm(index);
        self.resume_reading(index);
    }

    fn keep(&mut self, index: u32, buffer: Vec<u8>) {
        if let Some(http) = self.http_mut(index) {
            http.buffer = buffer;
        }
    }

    /// The PROXY header that a trusted proxy may send first. How many bytes it has; `None`: it is incomplete, or bad.
    fn read_proxy_header(&mut self, index: u32, buffer: &[u8]) -> Option<usize> {
        // A request has no NUL, so the header's signature is told by its first bytes.
        let (address, used) = match forwarded::proxy_v2(buffer) {
            Ok(None) => return None,
            Ok(Some((address, used))) => (address, used),
            Err(ProxyError::Signature) => (None, 0),
            Err(error) => {
                let refusal = Refusal::new(ErrorCode::BadRequest, error.to_string());
                self.refuse(index, &refusal, &Reply::default());
                return None;
            }
        };
        let http = self.http_mut(index)?;
        http.fresh = false;
        http.told_by_proxy = address.map(|address| address.ip().to_canonical());
        Some(used)
    }

    /// Who asks: by the fields of trusted proxies, and by the PROXY header of the nearest one.
    fn client(&self, head: &Head<'_>, peer: IpAddr, told_by_proxy: Option<IpAddr>) -> Client {
        let trusted = &self.options.connection.trusted_proxies;
        let client = forwarded::client(peer, trusted, head);
        Client {
            // The far end of the nearest hop; what it claims of further ones counts only where it is trusted itself.
            addr: told_by_proxy.map_or(client.addr, |addr| forwarded::client(addr, trusted, head).addr),
            seen_as: SeenAs {
                scheme: client.proto.unwrap_or(if self.options.connection.tls { "https" } else { "http" }).to_owned(),
                authority: client.host.unwrap_or_else(|| head.host.to_owned()),
            },
        }
    }

    /// Carries out one request.
    fn request(&mut self, index: u32, head: &Head<'_>) {
        let Some(connection) = self.connections.at(index) else { return };
        let State::Http(http) = &connection.state else { return };
        let (peer, proxied, told_by_proxy) = (http.peer, http.proxied, http.told_by_proxy);
        let more = !connection.peer_ended;
        let options = Arc::clone(&self.options);
        // A body that is not asked for is not read: the connection ends after the answer instead.
        let bodiless = matches!(head.body, BodyLength::None | BodyLength::Length(0));
        let mut reply = Reply {
            keep_alive: head.keep_alive && bodiless && more,
            head_only: head.method == "HEAD",
            cors_origin: None,
        };
        let client = self.client(head, peer, told_by_proxy);
        let page = match handshake::page(head, &client.seen_as, &options.connection) {
            Ok(page) => page,
            Err(refusal) => return self.refuse(index, &refusal, &reply),
        };
        if let Page::Allowed(origin) = &page {
            reply.cors_origin = Some(origin.clone());
        }
        if let Err(refusal) = self.count_client(index, client.addr, proxied) {
            return self.refuse(index, &refusal, &reply);
        }
        let demand = match handshake::demand(head, &options.connection) {
            Ok(demand) => demand,
            Err(refusal) => {
                return match self.credential_first(index, head, &page, client.addr, &refusal) {
                    Ok(true) => self.refuse(index, &refusal, &reply),
                    Ok(false) => {}
                    Err(first) => self.refuse_credential(index, &first, &reply, client.addr),
                };
            }
        };
        match demand {
            Demand::Health => {
                let response = Response::new(200).header("Cache-Control", "no-store");
                self.respond(index, response.body("application/json", &b"{\"status\":\"ok\"}\n"[..]), &reply);
            }
            Demand::Playground => {
                let response = Response::new(200)
                    .header("Content-Security-Policy", &PLAYGROUND_POLICY)
                    .header("Referrer-Policy", "no-referrer")
                    .header("Cache-Control", "no-cache");
                self.respond(
                    index,
                    response.body("text/html; charset=utf-8", crate::web::PLAYGROUND.as_bytes()),
                    &reply,
                );
            }
            Demand::ClientLibrary => {
                let is_held = http::if_none_match(head, &CLIENT_ETAG);
                let response = Response::new(if is_held { 304 } else { 200 })
                    .header("ETag", &CLIENT_ETAG)
                    .header("Cache-Control", "no-cache");
                let response = if is_held {
                    response
                } else {
                    response.body(crate::web::CLIENT_CONTENT_TYPE, crate::web::CLIENT.as_bytes())
                };
                self.respond(index, response, &reply);
            }
            Demand::Options(allow) => self.respond(index, preflight(head, allow, &reply), &reply),
            Demand::Echo(upgrade) => {
                let encoding = self.switch_protocols(index, &upgrade, None);
                if let Some(connection) = self.connections.at_mut(index) {
                    connection.state = State::Echo(Box::new(Echo { decoder: ws::Decoder::new(), encoding }));
                    self.arm(index);
                }
            }
            Demand::Renew(connection) => {
                let purpose = BodyPurpose::Renewal { connection, client: client.addr };
                self.read_body_for(index, head, purpose, reply);
            }
            Demand::Stream(..)
            | Demand::Many(_)
            | Demand::Ticket
            | Demand::Hook(_)
            | Demand::Described { .. }
            | Demand::MakeSession
                if self.draining.is_some() =>
            {
                let refusal = Refusal::new(ErrorCode::Draining, "the server is about to end").retry_after(2);
                self.refuse(index, &refusal, &reply);
            }
            Demand::Hook(id) => self.read_hook(index, head, id, client.addr, reply),
            Demand::Ticket => self.make_ticket(index, head, &page, client.addr, &reply),
            Demand::Described { request, sse } => {
                let request = Box::new(request);
                let purpose = |caller| BodyPurpose::Direct { caller, request, sse };
                self.read_description(index, head, &page, client.addr, reply, purpose);
            }
            Demand::MakeSession => {
                let seen_as = client.seen_as;
                let purpose = |caller| BodyPurpose::Session { caller, seen_as };
                self.read_description(index, head, &page, client.addr, reply, purpose);
            }
            Demand::Session { id, end } => {
                self.session_asked(index, head, &page, client.addr, &client.seen_as, id, end, &reply);
            }
            Demand::Stream(request, How::WebSocket(upgrade)) => {
                self.open_websocket(index, head, &page, &client, Some(request), &upgrade, &reply);
            }
            Demand::Many(upgrade) => self.open_websocket(index, head, &page, &client, None, &upgrade, &reply),
            Demand::Stream(request, How::Sse) => self.open_events(index, head, &page, &client, request, &reply),
            Demand::Stream(request, How::Json) => self.get_value(index, head, &page, &client, &request, reply),
        }
    }

    /// A request for streams that is wrong in itself: whether its credential is wrong, which is told first. `false`: that
    /// is not known yet.
    fn credential_first(
        &mut self,
        index: u32,
        head: &Head<'_>,
        page: &Page,
        addr: IpAddr,
        refusal: &Refusal,
    ) -> Result<bool, Refusal> {
        let id = head.path.strip_prefix("/v1/streams/");
        let direct = head.path == "/v1/direct" && self.options.connection.direct;
        if (id.is_none() && head.path != "/v1/ws" && !direct) || !matches!(refusal.status, 400 | 404 | 406 | 426) {
            return Ok(true);
        }
        let request = id.map(|id| StreamRequest {
            id: http::percent_decode(id).unwrap_or_default().into_owned(),
            params: Vec::new(),
            format: Format::Patch,
            since: None,
            select: None,
            max_rate_ms: 0,
            direct: None,
        });
        let websocket = head.path == "/v1/ws" || head.has_token("upgrade", "websocket");
        match self.judge(index, head, page, addr, request.as_ref(), websocket) {
            Ok(Judged::Granted(grant)) => {
                self.rights.release(grant);
                Ok(true)
            }
            Ok(Judged::FirstMessage) => Ok(true),
            Ok(Judged::Later) => Ok(false),
            Err(first) => Err(first),
        }
    }

    /// Limits by the client's address: handshakes per second, and connections where a proxy hides it.
    fn count_client(&mut self, index: u32, addr: IpAddr, proxied: bool) -> Result<(), Refusal> {
        let now = self.now.at;
        let holder = self.ledger.address(addr);
        let counted = self.http_mut(index).and_then(|http| http.admitted.take()) == Some(holder);
        let limits = &self.options.limits;
        if !counted && self.ledger.handshake(holder, limits.handshakes_per_second_per_address, now).is_err() {
            let detail = "as many requests per second from this address as there may be";
            return Err(Refusal::new(ErrorCode::RateLimited, detail).with_status(429).retry_after(1));
        }
        let Some(connection) = self.connections.at_mut(index) else { return Ok(()) };
        connection.client = holder;
        if proxied && limits.connections_per_address > 0 && connection.address != Some(holder) {
            // A proxy may send several clients' requests over one connection: it counts for the newest.
            if let Some(earlier) = connection.address.take() {
                self.ledger.release_connection(earlier, now);
            }
            if self.ledger.hold_connection(holder, limits.connections_per_address, now).is_err() {
                let detail = "as many connections from this address as there may be";
                return Err(Refusal::new(ErrorCode::TooManyConnections, detail).with_status(429).retry_after(5));
            }
            connection.address = Some(holder);
        }
        Ok(())
    }

    /// Who asks: the grant of what is presented, or of nothing.
    pub(super) fn judge(
        &mut self,
        index: u32,
        head: &Head<'_>,
        page: &Page,
        addr: IpAddr,
        request: Option<&StreamRequest>,
        websocket: bool,
    ) -> Result<Judged, Refusal> {
        let options = Arc::clone(&self.options);
        let mut presented = handshake::presented(head, &options.auth)?;
        if presented.is_empty() {
            let anonymous = match request {
                Some(request) => options.catalog.allows_anonymous_on(&request.id),
                None => websocket && options.catalog.allows_anonymous(),
            };
            return if anonymous {
                Ok(Judged::Granted(Grant::anonymous(&mut self.rights)))
            } else if websocket && options.auth.first_message.is_some() {
                Ok(Judged::FirstMessage)
            } else {
                Err(Refusal::new(ErrorCode::MissingCredential, "a credential is needed"))
            };
        }
        if let Some(outcome) = self.http_mut(index).and_then(|http| http.judged.take()) {
            return outcome.map(Judged::Granted);
        }
        // What a browser has sent by itself is not taken from just any page.
        let by_cookie = matches!(presented.first, Some((_, Carrier::Cookie)));
        if (by_cookie || presented.session.is_some())
            && let Err(refusal) = handshake::cookie_allowed(head, page)
        {
            if by_cookie || presented.first.is_none() {
                return Err(refusal);
            }
            presented.session = None;
        }
        self.standing_allows(addr)?;
        let Some(connection) = self.key_of(index) else { return Ok(Judged::Later) };
        match self.authenticate(presented, Waiter::Request(connection)) {
            Authenticated::Now(outcome) => outcome.map(Judged::Granted),
            Authenticated::Later(ask) => {
                let deadline = self.now.at + limits::LOOKUP_TIMEOUT;
                if let Some(http) = self.http_mut(index) {
                    http.phase = Phase::Looking { ask, head: Vec::new() };
                    http.deadline = deadline;
                    self.arm(index);
                }
                Ok(Judged::Later)
            }
        }
    }

    /// Refuses an address that has failed so often that its credentials are not looked at.
    pub(super) fn standing_allows(&self, addr: IpAddr) -> Result<(), Refusal> {
        if self.is_refused(self.ledger.address(addr)) {
            let detail = "too many failed credentials from this address";
            let refusal = Refusal::new(ErrorCode::RateLimited, detail).with_status(429).retry_after(60);
            return Err(refusal.because("rate_limited"));
        }
        Ok(())
    }

    /// Refuses a credential: counts it for the address, which past its limit is answered late.
    pub(super) fn refuse_credential(&mut self, index: u32, refusal: &Refusal, reply: &Reply, addr: IpAddr) {
        if !is_failure(refusal.code) {
            return self.refuse(index, refusal, reply);
        }
        if self.count_failure(addr) == Standing::Good {
            self.refuse(index, refusal, reply);
        } else {
            self.refuse_later(index, refusal, reply, FAILURE_DELAY);
        }
    }

    /// Whether an address has failed so often that its credentials are not looked at.
    pub(super) fn is_refused(&self, client: Holder) -> bool {
        let per_minute = self.options.limits.auth_failures_per_minute;
        self.ledger.standing(client, per_minute, self.now.at) == Standing::Refused
    }

    /// Counts a failed credential for its address; how that stood before.
    pub(super) fn count_failure(&self, addr: IpAddr) -> Standing {
        self.count_failure_of(self.ledger.address(addr))
    }

    /// The same of an address by whom it stands for.
    pub(super) fn count_failure_of(&self, client: Holder) -> Standing {
        let per_minute = self.options.limits.auth_failures_per_minute;
        let standing = self.ledger.standing(client, per_minute, self.now.at);
        self.ledger.failure(client, per_minute, self.now.at);
        standing
    }

    #[expect(clippy::too_many_arguments, reason = "a request's parts, each borrowed from elsewhere")]
    fn open_websocket(
        &mut self,
        index: u32,
        head: &Head<'_>,
        page: &Page,
        client: &Client,
        request: Option<StreamRequest>,
        upgrade: &Upgrade<'_>,
        reply: &Reply,
    ) {
        let grant = match self.judge(index, head, page, client.addr, request.as_ref(), true) {
            Ok(Judged::Granted(grant)) => grant,
            Ok(Judged::FirstMessage) => {
                let encoding = self.switch_protocols(index, upgrade, handshake::subprotocol(upgrade));
                let deadline = self.now.at + self.options.auth.first_message.unwrap_or_default();
                if let Some(connection) = self.connections.at_mut(index) {
                    connection.state = State::Unauthenticated(Box::new(Unauthenticated {
                        decoder: ws::Decoder::new(),
                        encoding,
                        request,
                        deadline,
                        rate: MessageRate::default(),
                        peer: client.addr,
                        credential: FirstCredential::Awaited,
                    }));
                    self.arm(index);
                }
                return;
            }
            Ok(Judged::Later) => return,
            Err(refusal) => return self.refuse_credential(index, &refusal, reply, client.addr),
        };
        let key = match &request {
            None => None,
            Some(request) => match self.resolve_request(&grant, request) {
                Ok(key) => key,
                Err(refusal) => return self.refuse(index, &refusal, reply),
            },
        };
        let counted = match self.hold_subject(&grant) {
            Ok(counted) => counted,
            Err(refusal) => return self.refuse(index, &refusal, reply),
        };
        let encoding = self.switch_protocols(index, upgrade, handshake::subprotocol(upgrade));
        self.open(index, Transport::WebSocket(encoding), grant, counted, request.is_some());
        match (key, request) {
            (Some(key), Some(request)) => self.open_single(index, &key, &request, None),
            (None, Some(request)) => self.await_opening(index, request),
            (_, None) => {}
        }
    }

    fn open_events(
        &mut self,
        index: u32,
        head: &Head<'_>,
        page: &Page,
        client: &Client,
        request: StreamRequest,
        reply: &Reply,
    ) {
        let opened = self.judge(index, head, page, client.addr, Some(&request), false);
        let grant = match opened {
            Ok(Judged::Granted(grant)) => grant,
            // Only a WebSocket has a first message.
            Ok(Judged::FirstMessage | Judged::Later) => return,
            Err(refusal) => return self.refuse_credential(index, &refusal, reply, client.addr),
        };
        self.open_events_under(index, grant, &request, reply);
    }

    /// The same, by whoever has that grant.
    pub(super) fn open_events_under(&mut self, index: u32, grant: Grant, request: &StreamRequest, reply: &Reply) {
        let key = match self.resolve_request(&grant, request) {
            Ok(Some(key)) => key,
            // Only a WebSocket has a first message.
            Ok(None) => return,
            Err(refusal) => return self.refuse(index, &refusal, reply),
        };
        let counted = match self.hold_subject(&grant) {
            Ok(counted) => counted,
            Err(refusal) => return self.refuse(index, &refusal, reply),
        };
        let last = Reply { keep_alive: false, ..reply.clone() };
        let response = Response::new(200).header("Cache-Control", "no-store").header("X-Accel-Buffering", "no");
        let response = response.streamed("text/event-stream", Framing::UntilClose);
        if reply.head_only {
            self.release_counted(counted.then_some(&grant));
            return self.respond(index, response, &last);
        }
        let head = self.written(response, &last);
        if let Some(connection) = self.connections.at_mut(index) {
            connection.outbox().write(|out| out.extend_from_slice(&head));
        }
        self.open(index, Transport::Sse, grant, counted, true);
        self.open_single(index, &key, request, None);
    }

    fn get_value(
        &mut self,
        index: u32,
        head: &Head<'_>,
        page: &Page,
        client: &Client,
        request: &StreamRequest,
        reply: Reply,
    ) {
        let grant = match self.judge(index, head, page, client.addr, Some(request), false) {
            Ok(Judged::Granted(grant)) => grant,
            Ok(Judged::FirstMessage | Judged::Later) => return,
            Err(refusal) => return self.refuse_credential(index, &refusal, &reply, client.addr),
        };
        let tags: Vec<String> =
            head.all("if-none-match").map(|value| String::from_utf8_lossy(value).into_owned()).collect();
        let known = (!tags.is_empty()).then(|| tags.join(", "));
        let wait_s = http::prefer_wait(head).map(|wait| wait.as_secs());
        self.get_value_under(index, grant, request, known, wait_s, reply);
    }

    /// The same, by whoever has that grant.
    pub(super) fn get_value_under(
        &mut self,
        index: u32,
        grant: Grant,
        request: &StreamRequest,
        known: Option<String>,
        wait_s: Option<u64>,
        reply: Reply,
    ) {
        match self.resolve_request(&grant, request) {
            Ok(Some(key)) => self.wait_for_value(index, &key, known, wait_s, grant, reply),
            // Only a WebSocket has a first message.
            Ok(None) => {}
            Err(refusal) => self.refuse(index, &refusal, &reply),
        }
    }

    /// Writes the answer to an upgrade. How the WebSocket's messages are encoded from now on.
    fn switch_protocols(&mut self, index: u32, upgrade: &Upgrade<'_>, protocol: Option<&str>) -> Encoding {
        let accept = http::accept_key(upgrade.key);
        let agreed = handshake::extension(upgrade, &self.options.connection);
        let answer = agreed.map(|agreed| agreed.answer());
        let extension = answer.as_deref().map(|answer| ("Sec-WebSocket-Extensions", answer));
        if let Some(connection) = self.connections.at_mut(index) {
            let extra = extension.as_slice();
            connection.outbox().write(|out| http::write_switching_protocols(out, &accept, protocol, extra));
            self.make_ready(index);
        }
        agreed.map_or(Encoding::Plain, |agreed| Encoding::Deflated(agreed.window))
    }

    /// Counts a connection for its subject, where that has a limit; whether it was counted.
    pub(super) fn hold_subject(&mut self, grant: &Grant) -> Result<bool, Refusal> {
        let limit = self.options.limits.connections_per_subject;
        let Some(holder) = self.subject(grant).filter(|_| limit > 0) else { return Ok(false) };
        self.ledger.hold_connection(holder, limit, self.now.at).map(|()| true).map_err(|_| {
            let detail = "the subject has as many connections as it may";
            Refusal::new(ErrorCode::TooManyConnections, detail).with_status(429).retry_after(5)
        })
    }

    fn release_counted(&mut self, grant: Option<&Grant>) {
        if let Some(holder) = grant.and_then(|grant| self.subject(grant)) {
            self.ledger.release_connection(holder, self.now.at);
        }
    }

    /// Whom the subject's limits count `grant` for.
    pub(super) fn subject(&self, grant: &Grant) -> Option<Holder> {
        let kind = if grant.api_key().is_some() { BY_API_KEY } else { SUBJECT };
        grant.sub().map(|sub| self.ledger.holder(kind, (grant.issuer(), sub)))
    }

    pub(super) fn subject_of(&self, index: u32) -> Option<Holder> {
        self.subject(&self.connections.at(index)?.open()?.grant)
    }

    /// The subject of whoever waits for a value over HTTP.
    pub(super) fn waiting_subject(&self, index: u32) -> Option<Holder> {
        match &self.connections.at(index)?.state {
            State::Http(http) => match &http.phase {
                Phase::Waiting { grant, .. } => self.subject(grant),
                _ => None,
            },
            _ => None,
        }
    }

    pub(super) fn release_subject(&mut self, index: u32) {
        let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) else { return };
        if std::mem::take(&mut open.counted)
            && let Some(holder) = self.subject_of(index)
        {
            self.ledger.release_connection(holder, self.now.at);
        }
    }

    /// A request's body is awaited.
    pub(super) fn read_body_for(&mut self, index: u32, head: &Head<'_>, purpose: BodyPurpose, mut reply: Reply) {
        reply.keep_alive = head.keep_alive;
        let deadline: Instant = self.now.at + self.options.limits.handshake_timeout;
        let decoder = match BodyDecoder::of(head) {
            Ok(decoder) => decoder,
            Err(error) => {
                self.forget_purpose(index, purpose);
                return self.refuse_body(index, error, &reply);
            }
        };
        if head.expects_continue()
            && let Some(connection) = self.connections.at_mut(index)
        {
            connection.outbox().write(|out| out.extend_from_slice(http::CONTINUE));
            self.make_ready(index);
        }
        let Some(http) = self.http_mut(index) else { return };
        http.phase = Phase::Body { decoder: Box::new(decoder), body: Vec::new(), purpose, reply };
        http.deadline = deadline;
        if matches!(head.body, BodyLength::None | BodyLength::Length(0)) {
            self.body_read(index);
        }
    }

    fn refuse_body(&mut self, index: u32, error: BodyError, reply: &Reply) {
        let code =
            if matches!(error, BodyError::TooLarge { .. }) { ErrorCode::TooLarge } else { ErrorCode::BadRequest };
        let reply = Reply { keep_alive: false, ..reply.clone() };
        self.refuse(index, &Refusal::new(code, error.to_string()).with_status(error.status()), &reply);
    }

    /// More of a body. How many bytes were its; `None`: it was refused, and the connection ends.
    fn read_body(&mut self, index: u32, buffer: &[u8]) -> Option<usize> {
        let Phase::Body { decoder, body, .. } = &mut self.http_mut(index)?.phase else { return None };
        match decoder.feed(buffer, body) {
            Ok((used, whole)) => {
                if whole {
                    self.body_read(index);
                }
                Some(used)
            }
            Err(error) => {
                let reply = self.forget_exchange(index);
                self.refuse_body(index, error, &reply);
                None
            }
        }
    }

    /// The body is whole.
    fn body_read(&mut self, index: u32) {
        let Some(http) = self.http_mut(index) else { return };
        let Phase::Body { body, purpose, reply, .. } = std::mem::replace(&mut http.phase, Phase::Head) else {
            return;
        };
        match purpose {
            // Whoever holds the connection is asked.
            BodyPurpose::Renewal { connection, client } => match crate::codec::message::parse_renewal(&body) {
                Ok(token) => self.ask_to_renew(index, connection, token, client, reply),
                Err(reason) => self.refuse(index, &Refusal::new(ErrorCode::BadRequest, reason), &reply),
            },
            BodyPurpose::Hook { id, signature, client } => {
                self.hook(index, id.as_ref(), &signature, &body, client, &reply)
            }
            BodyPurpose::Direct { caller, request, sse } => {
                let reply = Reply { keep_alive: reply.keep_alive && !sse, ..reply };
                self.direct_body_read(index, &body, caller, request, sse, reply);
            }
            BodyPurpose::Session { caller, seen_as } => self.session_body_read(index, &body, caller, &seen_as, &reply),
        }
    }

    /// Another core has not answered in time.
    pub(super) fn unanswered(&mut self, index: u32) {
        let reply = self.forget_exchange(index);
        let refusal = Refusal::new(ErrorCode::Overloaded, "the server is too busy").with_status(503).retry_after(2);
        self.refuse(index, &refusal, &reply);
    }

    /// A request took too long to come.
    pub(super) fn request_timed_out(&mut self, index: u32) {
        self.forget_exchange(index);
        let refusal = Refusal::new(ErrorCode::BadRequest, "the request took too long to come").with_status(408);
        self.refuse(index, &refusal, &Reply::default());
    }

    /// Subscribes a connection that was opened on one stream, by a message with that id, if it has one.
    pub(super) fn open_single(
        &mut self,
        index: u32,
        key: &Arc<super::StreamKey>,
        request: &StreamRequest,
        id: Option<&ClientId>,
    ) {
        let StreamRequest { format, since, max_rate_ms, .. } = *request;
        let outcome = self.subscribe(index, key, format, since, max_rate_ms, Cause::Opened);
        if let Err(refusal) = outcome {
            self.tell_error(index, refusal.code, &refusal.detail, id, Some(&key.name));
            self.close(index, CloseReason::Overloaded);
        }
    }
}

/// Whether a refusal of that code counts as a failed credential of its address.
pub(super) fn is_failure(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::InvalidToken
            | ErrorCode::TokenExpired
            | ErrorCode::TokenRevoked
            | ErrorCode::SessionExpired
            | ErrorCode::LoggedOut
    )
}

/// The answer to OPTIONS: what is allowed, and to whom.
fn preflight(head: &Head<'_>, allow: &'static str, reply: &Reply) -> Response {
    let mut response = Response::new(204).header("Allow", allow);
    if reply.cors_origin.is_some() && head.all("access-control-request-method").next().is_some() {
        response = response
            .header("Access-Control-Allow-Methods", allow)
            .header(
                "Access-Control-Allow-Headers",
                "Authorization, Content-Type, If-None-Match, Last-Event-ID, Prefer, X-Api-Key",
            )
            .header("Access-Control-Max-Age", "600");
    }
    response
}
