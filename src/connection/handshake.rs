//! A request head, judged: what is asked for, by whom, from which page. Pure; nothing is looked up.
//!
//! Source: protocol version 1, sections 1 and 2; RFC 9110, 9112, 6455, 6454, Fetch Metadata.
//! Memory: owns the texts it hands out, all bounded by `limits.request_head_bytes_max`.
//! Errors: [`Refusal`], with its status and code. Not here: whether a credential is good (`auth`), who may see what.

use std::borrow::Cow;

use crate::auth::{self, ticket};
use crate::codec::deflate::{self, Agreement};
use crate::codec::direct::{self, DirectRequest};
use crate::codec::http::{self, Authorization, Head, Representation, Upgrade};
use crate::codec::message::{ErrorCode, Format};
use crate::ids::{ConnectionId, EphemeralId, ResumePoint};
use crate::limits;
use crate::secret::Secret;

use super::{DirectAsk, Options, StreamRequest};

/// A request that is answered with an error. Always the peer's fault, or for the peer to try again.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// The stable code.
    pub code: ErrorCode,
    /// What to tell the caller. Holds nothing secret.
    pub detail: Cow<'static, str>,
    /// `Allow`, with 405.
    pub allow: Option<&'static str>,
    /// `Retry-After` in seconds.
    pub retry_after_s: Option<u64>,
    /// A word for programs, where a credential is refused: `reason` of `AUTH_UPDATE_REJECTED`.
    pub reason: Option<&'static str>,
}

impl Refusal {
    /// The refusal of that code, with the code's own status.
    pub fn new(code: ErrorCode, detail: impl Into<Cow<'static, str>>) -> Refusal {
        Refusal {
            status: code.http_status(),
            code,
            detail: detail.into(),
            allow: None,
            retry_after_s: None,
            reason: None,
        }
    }

    /// The same with another status.
    pub fn with_status(mut self, status: u16) -> Refusal {
        self.status = status;
        self
    }

    /// The same with `Retry-After`.
    pub fn retry_after(mut self, seconds: u64) -> Refusal {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The same with a word for programs.
    pub fn because(mut self, reason: &'static str) -> Refusal {
        self.reason = Some(reason);
        self
    }

    fn not_allowed(allow: &'static str) -> Refusal {
        let mut refusal = Refusal::new(ErrorCode::MethodNotAllowed, format!("this resource knows {allow}"));
        refusal.allow = Some(allow);
        refusal
    }
}

/// What a path names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Resource<'b> {
    /// `/healthz`.
    Health,
    /// `/`.
    Playground,
    /// `/client.js`.
    ClientLibrary,
    /// `/echo`.
    Echo,
    /// `/v1/streams/{id}`: the id, not decoded.
    Stream(&'b str),
    /// `/v1/ws`.
    Many,
    /// `/v1/tickets`.
    Tickets,
    /// `/v1/connections/{connection}/auth`: the name, not decoded.
    Renewal(&'b str),
    /// `/v1/hooks/{id}`: the id, not decoded.
    Hook(&'b str),
    /// `/v1/direct`.
    Direct,
    /// `/v1/sessions`.
    Sessions,
    /// `/v1/sessions/{id}`: the id, not decoded.
    Session(&'b str),
}

impl<'b> Resource<'b> {
    /// What `path` names, if anything.
    pub fn of(path: &'b str, options: &Options) -> Option<Resource<'b>> {
        match path {
            "/healthz" => Some(Resource::Health),
            "/" if options.playground => Some(Resource::Playground),
            "/client.js" => Some(Resource::ClientLibrary),
            "/echo" if options.echo => Some(Resource::Echo),
            "/v1/ws" => Some(Resource::Many),
            "/v1/tickets" => Some(Resource::Tickets),
            "/v1/direct" if options.direct => Some(Resource::Direct),
            "/v1/sessions" if options.direct => Some(Resource::Sessions),
            _ => {
                if let Some(id) = path.strip_prefix("/v1/sessions/").filter(|_| options.direct) {
                    return (!id.is_empty() && !id.contains('/')).then_some(Resource::Session(id));
                }
                if let Some(id) = path.strip_prefix("/v1/streams/") {
                    return (!id.is_empty() && !id.contains('/')).then_some(Resource::Stream(id));
                }
                if let Some(id) = path.strip_prefix("/v1/hooks/") {
                    return (!id.is_empty() && !id.contains('/')).then_some(Resource::Hook(id));
                }
                let name = path.strip_prefix("/v1/connections/")?.strip_suffix("/auth")?;
                (!name.is_empty() && !name.contains('/')).then_some(Resource::Renewal(name))
            }
        }
    }

    /// The methods it knows, as `Allow` lists them.
    pub const fn allow(self) -> &'static str {
        match self {
            Resource::Renewal(_) | Resource::Tickets | Resource::Sessions | Resource::Hook(_) => "POST, OPTIONS",
            Resource::Direct => "GET, HEAD, POST, OPTIONS",
            Resource::Session(_) => "GET, HEAD, DELETE, OPTIONS",
            _ => "GET, HEAD, OPTIONS",
        }
    }
}

/// What a request wants.
#[derive(Debug)]
pub enum Demand<'b> {
    /// To know that the process serves.
    Health,
    /// The playground page.
    Playground,
    /// The client library.
    ClientLibrary,
    /// What it may do: the answer is 204 and these methods.
    Options(&'static str),
    /// A WebSocket that returns what it gets.
    Echo(Upgrade<'b>),
    /// One stream.
    Stream(StreamRequest, How<'b>),
    /// A WebSocket without a subscription.
    Many(Upgrade<'b>),
    /// A one-time ticket for the credential that is presented.
    Ticket,
    /// To renew the credential of a live connection (`None`: its name is none), by the body.
    Renew(Option<ConnectionId>),
    /// To say that a stream's upstream has something new: the stream's id, not decoded.
    Hook(&'b str),
    /// A stream that the body describes.
    Described {
        /// How it is wanted, as far as the query says.
        request: StreamRequest,
        /// Whether as events; else its value.
        sse: bool,
    },
    /// An ephemeral session, which the body describes.
    MakeSession,
    /// To be told of an ephemeral session (`None`: the name is none), or to end it.
    Session {
        /// Which.
        id: Option<EphemeralId>,
        /// Whether it is to end.
        end: bool,
    },
}

/// In which representation a stream is wanted.
#[derive(Debug)]
pub enum How<'b> {
    /// Over a WebSocket.
    WebSocket(Upgrade<'b>),
    /// As server-sent events.
    Sse,
    /// The value.
    Json,
}

/// What `head` wants.
///
/// # Errors
/// 404 `NOT_FOUND`, 405, 406, 426, 400: in the order in which they are found.
pub fn demand<'b>(head: &Head<'b>, options: &Options) -> Result<Demand<'b>, Refusal> {
    if head.path == "*" {
        return Ok(Demand::Options("GET, HEAD, POST, OPTIONS"));
    }
    let Some(resource) = Resource::of(head.path, options) else {
        return Err(Refusal::new(ErrorCode::NotFound, "there is no such resource"));
    };
    match (resource, head.method) {
        (_, "OPTIONS") => return Ok(Demand::Options(resource.allow())),
        (
            Resource::Renewal(_) | Resource::Tickets | Resource::Sessions | Resource::Direct | Resource::Hook(_),
            "POST",
        )
        | (Resource::Session(_), "DELETE") => {}
        (Resource::Renewal(_) | Resource::Tickets | Resource::Sessions | Resource::Hook(_), _) => {
            return Err(Refusal::not_allowed(resource.allow()));
        }
        // HEAD is GET without its body, where that is a refusal too (RFC 9110 section 9.3.2).
        (_, "GET" | "HEAD") => {}
        _ => return Err(Refusal::not_allowed(resource.allow())),
    }
    let upgrade = || -> Result<Option<Upgrade<'b>>, Refusal> {
        http::websocket_upgrade(head).map_err(|error| {
            let code = if error.status() == 426 { ErrorCode::UpgradeRequired } else { ErrorCode::BadRequest };
            Refusal::new(code, error.to_string()).with_status(error.status())
        })
    };
    let needed = |upgrade: Option<Upgrade<'b>>| {
        upgrade.ok_or_else(|| Refusal::new(ErrorCode::UpgradeRequired, "this resource is a WebSocket: send an upgrade"))
    };
    match resource {
        Resource::Health => Ok(Demand::Health),
        Resource::Playground => Ok(Demand::Playground),
        Resource::ClientLibrary => Ok(Demand::ClientLibrary),
        Resource::Echo => Ok(Demand::Echo(needed(upgrade()?)?)),
        Resource::Many => Ok(Demand::Many(needed(upgrade()?)?)),
        Resource::Tickets => Ok(Demand::Ticket),
        Resource::Hook(id) => Ok(Demand::Hook(id)),
        Resource::Renewal(name) => Ok(Demand::Renew(ConnectionId::parse(name))),
        Resource::Stream(id) => {
            let how = how(head, upgrade()?)?;
            Ok(Demand::Stream(stream_request(id, head, matches!(how, How::Sse))?, how))
        }
        Resource::Direct if head.method == "POST" => {
            let sse = matches!(how(head, None)?, How::Sse);
            Ok(Demand::Described { request: stream_request("", head, sse)?, sse })
        }
        Resource::Direct => {
            let how = how(head, upgrade()?)?;
            let mut request = stream_request("", head, matches!(how, How::Sse))?;
            request.direct = Some(direct_ask(&mut request.params, matches!(how, How::WebSocket(_)))?);
            Ok(Demand::Stream(request, how))
        }
        Resource::Sessions => Ok(Demand::MakeSession),
        Resource::Session(id) => Ok(Demand::Session { id: EphemeralId::parse(id), end: head.method == "DELETE" }),
    }
}

/// In which representation a stream is wanted.
fn how<'b>(head: &Head<'b>, upgrade: Option<Upgrade<'b>>) -> Result<How<'b>, Refusal> {
    match upgrade {
        Some(upgrade) => Ok(How::WebSocket(upgrade)),
        None => match http::negotiate(head.all("accept")) {
            Representation::EventStream => Ok(How::Sse),
            Representation::Json => Ok(How::Json),
            Representation::NotAcceptable => {
                let detail = "this resource is application/json, text/event-stream or a WebSocket";
                Err(Refusal::new(ErrorCode::NotAcceptable, detail))
            }
        },
    }
}

/// What `?url=…&interval_ms=…` describes. A WebSocket may say it later.
fn direct_ask(params: &mut Vec<(String, String)>, websocket: bool) -> Result<DirectAsk, Refusal> {
    let bad = |detail| Refusal::new(ErrorCode::BadRequest, detail);
    let (mut url, mut interval_ms) = (None, None);
    for (name, value) in std::mem::take(params) {
        match &*name {
            "url" => url = Some(value),
            "interval_ms" => {
                interval_ms = Some(direct::parse_interval_ms(&value).ok_or_else(|| bad(direct::BAD_INTERVAL))?);
            }
            _ => {}
        }
    }
    match url {
        Some(url) => Ok(DirectAsk::Here(Box::new(DirectRequest::get(&url, interval_ms)))),
        None if websocket => Ok(DirectAsk::FirstMessage),
        None => Err(bad("url is missing")),
    }
}

/// The stream a request names, and its parameters.
fn stream_request(id: &str, head: &Head<'_>, sse: bool) -> Result<StreamRequest, Refusal> {
    let bad = |detail: String| Refusal::new(ErrorCode::BadRequest, detail);
    let id = http::percent_decode(id).ok_or_else(|| bad("the stream's id is not percent-encoded UTF-8".into()))?;
    let mut request = StreamRequest {
        id: id.into_owned(),
        params: Vec::new(),
        format: Format::Patch,
        since: None,
        select: None,
        max_rate_ms: 0,
        direct: None,
    };
    let mut seen: Vec<String> = Vec::new();
    for pair in http::Query::new(head.query.unwrap_or_default()) {
        let (name, value) = pair.map_err(|error| bad(format!("the query: {error}")))?;
        if seen.iter().any(|earlier| *earlier == *name) {
            return Err(bad(format!("the parameter {} appears twice", printable(&name))));
        }
        seen.push(name.to_string());
        match &*name {
            "token" | "ticket" => {}
            "format" => {
                request.format = Format::parse(&value).ok_or_else(|| bad("format is patch, merge or full".into()))?;
            }
            // A malformed `since` is answered by a snapshot, like one of another epoch.
            "since" => request.since = ResumePoint::parse(&value),
            // It is looked at when it is known who asks.
            "select" => request.select = Some(value.into_owned()),
            "max_rate_ms" => {
                let rate = value.parse().ok().filter(|&ms: &u32| u64::from(ms) <= limits::MAX_RATE_MS_MAX);
                let detail =
                    || bad(format!("max_rate_ms is a number of milliseconds up to {}", limits::MAX_RATE_MS_MAX));
                request.max_rate_ms = rate.ok_or_else(detail)?;
            }
            _ => request.params.push((name.into_owned(), value.into_owned())),
        }
    }
    if sse && let Some(last) = head.one("last-event-id").map_err(|error| bad(error.to_string()))? {
        request.since = ResumePoint::parse(last);
    }
    Ok(request)
}

/// A caller's text in an error, cut and without control characters.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

/// Where a credential stood.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Carrier {
    /// `Authorization: Bearer`.
    Authorization,
    /// `Sec-WebSocket-Protocol: …, jwt, <token>`.
    Subprotocol,
    /// `?token=` or `?ticket=`.
    Query,
    /// `X-Api-Key`.
    ApiKeyField,
    /// A cookie, which a browser sends by itself.
    Cookie,
}

/// A credential as presented, not looked at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Credential {
    /// A JSON Web Token.
    Token(Secret),
    /// A one-time ticket.
    Ticket(Secret),
    /// An API key.
    ApiKey(Secret),
}

/// What stands in the session's cookie.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SessionCookie {
    /// Its value, its escapes undone.
    Value(Secret),
    /// No one value: there are two, and nothing says which is meant, or what is there is no text.
    Unclear,
}

/// What a request presents to say who asks.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Presented {
    /// The first carrier that is there: later ones are not read.
    pub first: Option<(Credential, Carrier)>,
    /// The session cookie: looked at where nothing else is there, or where that is a token that does not verify.
    pub session: Option<SessionCookie>,
}

impl Presented {
    /// A token, or a ticket, that did not come with a request: which, its form tells.
    pub fn token(token: Secret) -> Presented {
        let credential = match ticket::is_ticket(token.expose_secret()) {
            true => Credential::Ticket(token),
            false => Credential::Token(token),
        };
        Presented { first: Some((credential, Carrier::Authorization)), session: None }
    }

    /// Whether nothing is presented.
    pub fn is_empty(&self) -> bool {
        self.first.is_none() && self.session.is_none()
    }
}

/// The credentials a request presents (protocol section 2, «Carriers»).
///
/// # Errors
/// 400 where one carrier holds two values, 401 where it holds what can be none (or `?token=` is switched off).
pub fn presented(head: &Head<'_>, options: &auth::Options) -> Result<Presented, Refusal> {
    let session = match &options.session {
        None => None,
        Some(session) => match http::cookie(head, &session.cookie) {
            // express-session percent-encodes it. What is no escape was none of its.
            Ok(value) => value.map(|value| match http::percent_decode(value) {
                Some(decoded) => SessionCookie::Value(Secret::new(decoded.as_bytes())),
                None => SessionCookie::Value(Secret::new(value.as_bytes())),
            }),
            // A browser holds as many as there are paths and domains that set one: whoever has a token needs none of them.
            Err(_) => Some(SessionCookie::Unclear),
        },
    };
    Ok(Presented { first: first_presented(head, options, session.is_some())?, session })
}

fn first_presented(
    head: &Head<'_>,
    options: &auth::Options,
    has_session: bool,
) -> Result<Option<(Credential, Carrier)>, Refusal> {
    let bad = |detail: &'static str| Refusal::new(ErrorCode::BadRequest, detail);
    let invalid = |detail: &'static str| Refusal::new(ErrorCode::InvalidToken, detail);
    let found = |token: &str, carrier| Ok(Some((Credential::Token(Secret::new(token.as_bytes())), carrier)));
    let mut other_scheme = false;
    match http::bearer(head) {
        Authorization::Bearer(token) => return found(token, Carrier::Authorization),
        Authorization::None => {}
        // It may be a proxy's before us, and the token stand elsewhere; alone it is no credential.
        Authorization::OtherScheme => other_scheme = true,
        Authorization::Malformed if head.all("authorization").any(|value| value.contains(&b',')) => {
            return Err(bad("Authorization holds more than one value"));
        }
        Authorization::Malformed => return Err(invalid("Authorization is not «Bearer» and a token")),
    }
    let mut protocols = head.list("sec-websocket-protocol");
    if protocols.by_ref().any(|protocol| protocol == "jwt") {
        let Some(token) = protocols.next() else {
            return Err(invalid("the subprotocol jwt is not followed by a token"));
        };
        let mut rest = protocols;
        if rest.any(|protocol| protocol == "jwt") {
            return Err(bad("the subprotocol jwt appears twice"));
        }
        return found(token, Carrier::Subprotocol);
    }
    let (mut tokens, mut tickets) = (Vec::new(), Vec::new());
    for pair in http::Query::new(head.query.unwrap_or_default()) {
        // What cannot be read may have been a credential: it is never passed over.
        let (name, value) = pair.map_err(|error| Refusal::new(ErrorCode::BadRequest, format!("the query: {error}")))?;
        match &*name {
            "token" => tokens.push(value),
            "ticket" => tickets.push(value),
            _ => {}
        }
    }
    match tokens.as_slice() {
        [] => {}
        [_] if !options.query_token => return Err(invalid("tokens in the query are switched off")),
        [token] => return found(token, Carrier::Query),
        _ => return Err(bad("the parameter token appears twice")),
    }
    match http::cookie(head, &options.jwt.cookie) {
        Ok(Some(token)) => return found(token, Carrier::Cookie),
        Ok(None) => {}
        Err(_) => return Err(bad("the token's cookie appears twice")),
    }
    match tickets.as_slice() {
        [] => {}
        [ticket] => return Ok(Some((Credential::Ticket(Secret::new(ticket.as_bytes())), Carrier::Query))),
        _ => return Err(bad("the parameter ticket appears twice")),
    }
    let mut keys = head.all("x-api-key");
    if let Some(key) = keys.next() {
        if keys.next().is_some() {
            return Err(bad("X-Api-Key appears twice"));
        }
        return Ok(Some((Credential::ApiKey(Secret::new(key)), Carrier::ApiKeyField)));
    }
    if other_scheme && !has_session {
        return Err(invalid("Authorization is not «Bearer» and a token"));
    }
    Ok(None)
}

/// How the client saw this server: scheme and authority, as `Origin` writes them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SeenAs {
    /// `http` or `https`.
    pub scheme: String,
    /// Host, and port where it is not the scheme's.
    pub authority: String,
}

/// What a page's `Origin` is to this server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Page {
    /// No `Origin` was sent.
    Unknown,
    /// It is this server's own.
    Same,
    /// It is in `allowed_origins`: this is it, for CORS.
    Allowed(String),
    /// It is neither.
    Foreign,
}

/// What the page behind `head` is.
///
/// # Errors
/// 400 where there are two `Origin`s.
pub fn page(head: &Head<'_>, seen_as: &SeenAs, options: &Options) -> Result<Page, Refusal> {
    let origin = head.one("origin").map_err(|error| Refusal::new(ErrorCode::BadRequest, error.to_string()))?;
    let Some(origin) = origin else { return Ok(Page::Unknown) };
    if options.allowed_origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin)) {
        return Ok(Page::Allowed(origin.to_owned()));
    }
    let own = match &options.public_origin {
        Some(public) => public.eq_ignore_ascii_case(origin),
        None => false,
    };
    if own || is_origin_of(origin, seen_as) { Ok(Page::Same) } else { Ok(Page::Foreign) }
}

fn is_origin_of(origin: &str, seen_as: &SeenAs) -> bool {
    let Some((scheme, authority)) = origin.split_once("://") else { return false };
    let default = if seen_as.scheme == "https" { ":443" } else { ":80" };
    let bare = |authority: &str| authority.strip_suffix(default).unwrap_or(authority).to_ascii_lowercase();
    scheme.eq_ignore_ascii_case(&seen_as.scheme) && bare(authority) == bare(&seen_as.authority)
}

/// Whether a credential that the browser sends by itself may be used for a request from that page.
///
/// # Errors
/// 403 `ORIGIN_NOT_ALLOWED`.
pub fn cookie_allowed(head: &Head<'_>, page: &Page) -> Result<(), Refusal> {
    let site = head.all("sec-fetch-site").next().unwrap_or_default();
    let foreign = match page {
        Page::Allowed(_) => false,
        Page::Foreign => true,
        // Fetch Metadata speaks where `Origin` does not, and against a page that only looks the same.
        Page::Same | Page::Unknown => site == b"cross-site" || site == b"same-site",
    };
    if foreign {
        return Err(Refusal::new(ErrorCode::OriginNotAllowed, "a cookie is not accepted from a page of that origin"));
    }
    Ok(())
}

/// What is agreed on of the extensions a client offers, where anything is.
pub fn extension(upgrade: &Upgrade<'_>, options: &Options) -> Option<Agreement> {
    if options.permessage_deflate { deflate::negotiate(&upgrade.extensions) } else { None }
}

/// The subprotocol to answer with, where one was offered: never the token.
pub fn subprotocol(upgrade: &Upgrade<'_>) -> Option<&'static str> {
    let offered = |name: &str| upgrade.protocols.contains(&name);
    if offered("restcast.v1") {
        Some("restcast.v1")
    } else if offered("jwt") {
        Some("jwt")
    } else {
        None
    }
}
