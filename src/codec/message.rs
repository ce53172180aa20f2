//! What the frames between client and server say: clients' JSON -> [`ClientMessage`], the server's answers -> JSON, and the
//! two tables of the contract, [`ErrorCode`] and [`CloseReason`].
//!
//! Source: protocol version 1, sections 3 to 5; RFC 8259.
//! Memory: a message's members are borrowed from its text while it is read; what is kept is copied out, tokens as `Secret`.
//! Errors: [`MessageError`], the client's fault, each to be answered by an `error` frame; the connection stays.
//! Not here: framing (`codec::ws`, `codec::sse`), frames that carry events (`frame`), what a message leads to (`connection`).

use std::borrow::Cow;
use std::io::Write;

use crate::codec::ws::FrameError;
use crate::ids::ConnectionId;
use crate::limits::{
    ACTION_TYPE_BYTES_MAX, CLIENT_ID_BYTES_MAX, JSON_DEPTH_MAX, MAX_RATE_MS_MAX, PATH_BYTES_MAX, STREAM_NAME_BYTES_MAX,
};
use crate::secret::Secret;
use crate::time::WallTime;

/// The form in which events reach a subscriber.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Format {
    /// Deltas as RFC 6902 patches.
    #[default]
    Patch,
    /// Deltas as RFC 7396 merge patches.
    Merge,
    /// Each event a snapshot.
    Full,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 3] = [Format::Patch, Format::Merge, Format::Full];

    /// The format spelled `text`, in a frame or as `?format=`; `None` where it is not one.
    pub fn parse(text: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.as_str() == text)
    }

    /// Its spelling.
    pub const fn as_str(self) -> &'static str {
        match self {
            Format::Patch => "patch",
            Format::Merge => "merge",
            Format::Full => "full",
        }
    }
}

/// The `id` of a client's frame, echoed byte for byte: the JSON text of a number of at most 64 bytes, or of a string whose
/// content has at most 64.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ClientId(Box<str>);

impl ClientId {
    /// The id whose JSON text is `json`; `None` where that is neither a number nor a string, or too long.
    pub fn from_json(json: &str) -> Option<ClientId> {
        let mut scanner = Scanner::new(json);
        scanner.value(0).ok().filter(|_| scanner.is_done())?;
        ClientId::from_scanned(json)
    }

    fn from_scanned(json: &str) -> Option<ClientId> {
        let bytes = match json.as_bytes().first()? {
            b'"' => string(json)?.len(),
            b'-' | b'0'..=b'9' => json.len(),
            _ => return None,
        };
        (bytes <= CLIENT_ID_BYTES_MAX).then(|| ClientId(Box::from(json)))
    }

    /// Its JSON text, as the client wrote it.
    pub fn as_json(&self) -> &str {
        &self.0
    }
}

/// What a client asks for (protocol section 4).
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ClientMessage {
    /// The credential of a connection that opened without one.
    Auth {
        /// The JWT.
        token: Secret,
    },
    /// A new credential for a live connection.
    AuthUpdate {
        /// A JWT or ticket; `None`: the connection's session is to be read again.
        token: Option<Secret>,
        /// To be echoed.
        id: Option<ClientId>,
    },
    /// Follow a stream.
    Subscribe(Subscribe),
    /// Follow a stream no more.
    Unsubscribe {
        /// Its name: at most [`STREAM_NAME_BYTES_MAX`] bytes.
        stream: String,
        /// To be echoed.
        id: Option<ClientId>,
    },
    /// Something that only the configuration can know: an action, or `UNKNOWN_TYPE`.
    Other {
        /// Its `type`: at most [`ACTION_TYPE_BYTES_MAX`] bytes.
        kind: String,
        /// To be echoed.
        id: Option<ClientId>,
    },
}

/// A client's `subscribe`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Subscribe {
    /// The stream's name, with its `params` if it has some: at most [`STREAM_NAME_BYTES_MAX`] bytes.
    pub stream: String,
    /// The form wanted; `None`: the default.
    pub format: Option<Format>,
    /// The last event seen, as given, for `ResumePoint::parse`. One over 64 bytes is malformed and so stands here as empty:
    /// it leads to a snapshot, not to an error.
    pub since: Option<String>,
    /// What of the value is wanted: a JSONPath, as given, of at most [`PATH_BYTES_MAX`] bytes.
    pub select: Option<String>,
    /// Least time between two events, in milliseconds; at most [`MAX_RATE_MS_MAX`].
    pub max_rate_ms: Option<u64>,
    /// To be echoed.
    pub id: Option<ClientId>,
}

/// Why a client's frame is no message. The connection stays.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum MessageError {
    /// Its `type` is none that exists: `UNKNOWN_TYPE`.
    #[error("no such message type")]
    UnknownType {
        /// To be echoed.
        id: Option<ClientId>,
    },
    /// It is malformed: `BAD_MESSAGE`.
    #[error("{reason}")]
    Bad {
        /// What is wrong, for the `error` frame's text.
        reason: &'static str,
        /// To be echoed, where it could be read.
        id: Option<ClientId>,
    },
}

impl MessageError {
    /// The code of the `error` frame that answers it.
    pub const fn code(&self) -> ErrorCode {
        match self {
            MessageError::UnknownType { .. } => ErrorCode::UnknownType,
            MessageError::Bad { .. } => ErrorCode::BadMessage,
        }
    }

    /// The `id` to echo.
    pub const fn id(&self) -> Option<&ClientId> {
        match self {
            MessageError::UnknownType { id } | MessageError::Bad { id, .. } => id.as_ref(),
        }
    }
}

impl ClientMessage {
    /// The message that a text frame holds. Members that the type does not have are ignored, as long as they are JSON.
    pub fn parse(text: &str) -> Result<ClientMessage, MessageError> {
        let bad = |reason| MessageError::Bad { reason, id: None };
        let members = Members::parse(text).map_err(bad)?;
        let id = match members.find("id") {
            None => None,
            Some(json) => Some(
                ClientId::from_scanned(json).ok_or(bad("id is not a number or a string, each of at most 64 bytes"))?,
            ),
        };
        // From here on the client learns which of its frames was bad.
        let bad = |reason| MessageError::Bad { reason, id: id.clone() };
        let message_type = members.string("type").ok_or(bad("type is not a string"))?.ok_or(bad("type is missing"))?;
        match &*message_type {
            "auth" => Ok(ClientMessage::Auth { token: members.token().map_err(bad)?.ok_or(bad("token is missing"))? }),
            "auth_update" => Ok(ClientMessage::AuthUpdate { token: members.token().map_err(bad)?, id }),
            "subscribe" => members.subscribe(id.clone()).map(ClientMessage::Subscribe).map_err(bad),
            "unsubscribe" => Ok(ClientMessage::Unsubscribe { stream: members.stream().map_err(bad)?, id }),
            kind if kind.len() <= ACTION_TYPE_BYTES_MAX => Ok(ClientMessage::Other { kind: kind.to_owned(), id }),
            _ => Err(MessageError::UnknownType { id }),
        }
    }

    /// The `type`s that have a meaning of their own, which no action may take.
    pub const TYPES: [&str; 4] = ["auth", "auth_update", "subscribe", "unsubscribe"];
}

/// The token of a body that renews a connection's credential: `{"token":"…"}`.
///
/// # Errors
/// What is wrong with it.
pub fn parse_renewal(body: &[u8]) -> Result<Secret, &'static str> {
    let text = std::str::from_utf8(body).map_err(|_| "the body is not UTF-8")?;
    Members::parse(text)?.token()?.ok_or("the body has no token")
}

/// The members of a message: names decoded, values as JSON text, which keeps the spelling of numbers.
pub struct Members<'a>(Vec<(Cow<'a, str>, &'a str)>);

impl<'a> Members<'a> {
    /// The members of the object that `text` is.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &'a str) -> Result<Members<'a>, &'static str> {
        let mut scanner = Scanner::new(text);
        scanner.skip_space();
        if scanner.peek() != Some(b'{') {
            return Err("not a JSON object");
        }
        let members = scanner.object(0)?;
        scanner.skip_space();
        if scanner.is_done() { Ok(Members(members)) } else { Err("something follows the JSON object") }
    }

    /// The same without those that are `null`: as if they had been left out.
    pub(super) fn without_nulls(mut self) -> Members<'a> {
        self.0.retain(|(_, json)| *json != "null");
        self
    }

    /// The JSON of the value that `path` leads to: names between dots, each a member of an object.
    pub fn at(&self, path: &str) -> Option<&'a str> {
        let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
        let json = self.find(name)?;
        match rest {
            None => Some(json),
            Some(rest) => Members::parse(json).ok()?.at(rest),
        }
    }

    pub(super) fn find(&self, name: &str) -> Option<&'a str> {
        // `Scanner::object` has sorted them.
        let place = self.0.binary_search_by(|(member, _)| (**member).cmp(name)).ok()?;
        self.0.get(place).map(|(_, json)| *json)
    }

    /// The members that are strings, in the order of their names.
    ///
    /// # Errors
    /// `not_text`: one is not.
    pub(super) fn strings(&self, not_text: &'static str) -> Result<Vec<(&str, Cow<'a, str>)>, &'static str> {
        self.0.iter().map(|(name, json)| Ok((&**name, string(json).ok_or(not_text)?))).collect()
    }

    /// `None`: it is not a string. `Some(None)`: it is absent.
    pub(super) fn string(&self, name: &str) -> Option<Option<Cow<'a, str>>> {
        match self.find(name) {
            None => Some(None),
            Some(json) => string(json).map(Some),
        }
    }

    fn token(&self) -> Result<Option<Secret>, &'static str> {
        let token = self.string("token").ok_or("token is not a string")?;
        Ok(token.map(|token| Secret::new(token.into_owned())))
    }

    fn stream(&self) -> Result<String, &'static str> {
        let stream = self.string("stream").ok_or("stream is not a string")?.ok_or("stream is missing")?;
        if stream.len() > STREAM_NAME_BYTES_MAX {
            return Err("stream is too long");
        }
        Ok(stream.into_owned())
    }

    fn subscribe(&self, id: Option<ClientId>) -> Result<Subscribe, &'static str> {
        let format = match self.string("format").ok_or("format is not a string")? {
            None => None,
            Some(text) => Some(Format::parse(&text).ok_or("format is none of patch, merge, full")?),
        };
        // A malformed place, of whatever type, is one that cannot be resumed from.
        let mut since = self.string("since").unwrap_or(Some(Cow::Borrowed(""))).map(Cow::into_owned);
        if let Some(text) = &mut since
            && text.len() > CLIENT_ID_BYTES_MAX
        {
            *text = String::new();
        }
        let max_rate_ms = match self.find("max_rate_ms") {
            None => None,
            Some(json) => {
                let digits = json.bytes().all(|byte| byte.is_ascii_digit());
                let max_rate_ms = digits.then(|| json.parse().unwrap_or(u64::MAX));
                Some(max_rate_ms.ok_or("max_rate_ms is not a whole number")?)
            }
        };
        if max_rate_ms.is_some_and(|max_rate_ms| max_rate_ms > MAX_RATE_MS_MAX) {
            return Err("max_rate_ms is over an hour");
        }
        let select = self.string("select").ok_or("select is not a string")?.map(Cow::into_owned);
        if select.as_ref().is_some_and(|select| select.len() > PATH_BYTES_MAX) {
            return Err("select is too long");
        }
        Ok(Subscribe { stream: self.stream()?, format, since, select, max_rate_ms, id })
    }
}

/// The content of a JSON string that [`Scanner`] has accepted; `None` where the value is not a string.
fn string(json: &str) -> Option<Cow<'_, str>> {
    let inner = json.strip_prefix('"')?.strip_suffix('"')?;
    if inner.contains('\\') { serde_json::from_str(json).ok().map(Cow::Owned) } else { Some(Cow::Borrowed(inner)) }
}

const NOT_JSON: &str = "not JSON";
const TOO_DEEP: &str = "nested too deeply";
const DUPLICATE: &str = "a member stands twice";

/// Reads JSON text (RFC 8259) strictly: no duplicate members at any depth, no lone surrogates, no nesting over
/// [`JSON_DEPTH_MAX`], which also bounds the recursion. Numbers are checked, not evaluated, and so keep their spelling.
struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    const fn new(text: &'a str) -> Scanner<'a> {
        Scanner { text, at: 0 }
    }

    fn is_done(&self) -> bool {
        self.at == self.text.len()
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn eat(&mut self, byte: u8) -> bool {
        let is_next = self.peek() == Some(byte);
        self.at += usize::from(is_next);
        is_next
    }

    fn skip_while(&mut self, wanted: impl Fn(u8) -> bool) -> usize {
        let start = self.at;
        while self.peek().is_some_and(&wanted) {
            self.at += 1;
        }
        self.at - start
    }

    fn skip_space(&mut self) {
        self.skip_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r'));
    }

    /// The text from `start` to here. Both stand beside ASCII bytes, which is never within a character.
    fn since(&self, start: usize) -> Result<&'a str, &'static str> {
        self.text.get(start..self.at).ok_or(NOT_JSON)
    }

    /// The text of the value that begins here, `depth` arrays and objects down.
    fn value(&mut self, depth: usize) -> Result<&'a str, &'static str> {
        let start = self.at;
        match self.peek().ok_or(NOT_JSON)? {
            b'{' => drop(self.object(depth)?),
            b'[' => self.array(depth)?,
            b'"' => drop(self.string()?),
            b'-' | b'0'..=b'9' => self.number()?,
            _ => self.literal()?,
        }
        self.since(start)
    }

    fn literal(&mut self) -> Result<(), &'static str> {
        let rest = self.text.get(self.at..).ok_or(NOT_JSON)?;
        let literal =
            ["true", "false", "null"].into_iter().find(|literal| rest.starts_with(literal)).ok_or(NOT_JSON)?;
        self.at += literal.len();
        Ok(())
    }

    fn number(&mut self) -> Result<(), &'static str> {
        let digits = |scanner: &mut Self| match scanner.skip_while(|byte| byte.is_ascii_digit()) {
            0 => Err(NOT_JSON),
            _ => Ok(()),
        };
        self.eat(b'-');
        // RFC 8259 section 6: no leading zeros.
        if !self.eat(b'0') {
            digits(self)?;
        }
        if self.eat(b'.') {
            digits(self)?;
        }
        if self.eat(b'e') || self.eat(b'E') {
            if !self.eat(b'+') {
                self.eat(b'-');
            }
            digits(self)?;
        }
        Ok(())
    }

    fn string(&mut self) -> Result<Cow<'a, str>, &'static str> {
        let start = self.at;
        if !self.eat(b'"') {
            return Err(NOT_JSON);
        }
        loop {
            self.skip_while(|byte| byte != b'"' && byte != b'\\' && byte >= 0x20);
            match self.peek() {
                Some(b'"') => break,
                // Whatever is escaped does not end the string; `string` judges the escape.
                Some(b'\\') => self.at += 2,
                _ => return Err(NOT_JSON),
            }
        }
        self.at += 1;
        string(self.since(start)?).ok_or("a string has an invalid escape")
    }

    fn array(&mut self, depth: usize) -> Result<(), &'static str> {
        self.open(b'[', depth)?;
        if self.eat(b']') {
            return Ok(());
        }
        loop {
            self.skip_space();
            self.value(depth + 1)?;
            self.skip_space();
            if self.eat(b']') {
                return Ok(());
            }
            if !self.eat(b',') {
                return Err(NOT_JSON);
            }
        }
    }

    /// The members of the object that begins here, sorted by name.
    fn object(&mut self, depth: usize) -> Result<Vec<(Cow<'a, str>, &'a str)>, &'static str> {
        let mut members = Vec::new();
        self.open(b'{', depth)?;
        if self.eat(b'}') {
            return Ok(members);
        }
        loop {
            self.skip_space();
            let name = self.string()?;
            self.skip_space();
            if !self.eat(b':') {
                return Err(NOT_JSON);
            }
            self.skip_space();
            members.push((name, self.value(depth + 1)?));
            self.skip_space();
            if self.eat(b'}') {
                break;
            }
            if !self.eat(b',') {
                return Err(NOT_JSON);
            }
        }
        members.sort_unstable();
        let twice = |pair: &[(Cow<'_, str>, &str)]| matches!(pair, [(one, _), (other, _)] if one == other);
        if members.windows(2).any(twice) { Err(DUPLICATE) } else { Ok(members) }
    }

    fn open(&mut self, bracket: u8, depth: usize) -> Result<(), &'static str> {
        if depth >= JSON_DEPTH_MAX {
            return Err(TOO_DEEP);
        }
        if !self.eat(bracket) {
            return Err(NOT_JSON);
        }
        self.skip_space();
        Ok(())
    }
}

/// What kind of credential a connection lives by, as `welcome` names it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum AuthKind {
    /// A JWT.
    Jwt,
    /// A session's cookie.
    Session,
    /// A restcast API key.
    ApiKey,
    /// A one-time ticket.
    Ticket,
    /// None.
    Anonymous,
}

impl AuthKind {
    /// Its spelling.
    pub const fn as_str(self) -> &'static str {
        match self {
            AuthKind::Jwt => "jwt",
            AuthKind::Session => "session",
            AuthKind::ApiKey => "api_key",
            AuthKind::Ticket => "ticket",
            AuthKind::Anonymous => "anonymous",
        }
    }
}

/// What a stream's `stream_status` says of it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum StreamState {
    /// The last poll succeeded.
    Live,
    /// The last poll failed; a value is held.
    Stale,
    /// The last poll failed; there is no value yet.
    Failing,
    /// The stream was deleted.
    Ended,
}

impl StreamState {
    /// Its spelling.
    pub const fn as_str(self) -> &'static str {
        match self {
            StreamState::Live => "live",
            StreamState::Stale => "stale",
            StreamState::Failing => "failing",
            StreamState::Ended => "ended",
        }
    }
}

/// Why a subscription ended while its connection goes on.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum UnsubscribedReason {
    /// The client asked for it.
    Requested,
    /// The grant does not cover the stream any more.
    Forbidden,
    /// The stream was deleted.
    StreamEnded,
}

impl UnsubscribedReason {
    /// Its spelling.
    pub const fn as_str(self) -> &'static str {
        match self {
            UnsubscribedReason::Requested => "requested",
            UnsubscribedReason::Forbidden => "forbidden",
            UnsubscribedReason::StreamEnded => "stream_ended",
        }
    }
}

/// Appends `welcome`, the first frame of every connection. `sub` and `expires_at` are null where there is none.
pub fn write_welcome(
    out: &mut Vec<u8>,
    connection: ConnectionId,
    kind: AuthKind,
    sub: Option<&str>,
    expires_at: Option<WallTime>,
    heartbeat_ms: u64,
) {
    let mut frame = Object::begin(out, "welcome");
    frame.string("connection", &connection.to_string());
    frame.raw("auth", "{");
    let mut auth = Object { out: &mut *frame.out, is_empty: true };
    auth.string("type", kind.as_str());
    auth.string_or_null("sub", sub);
    auth.number_or_null("expires_at", expires_at.map(WallTime::as_micros));
    auth.end();
    frame.number("heartbeat_ms", heartbeat_ms);
    frame.end();
}

/// Appends `subscribed`, which echoes the `id` of the `subscribe` if it had one.
pub fn write_subscribed(out: &mut Vec<u8>, stream: &str, id: Option<&ClientId>) {
    let mut frame = Object::begin(out, "subscribed");
    frame.string("stream", stream);
    frame.id(id);
    frame.end();
}

/// Appends `unsubscribed`; one that was requested echoes the `id` of the request if it had one.
pub fn write_unsubscribed(out: &mut Vec<u8>, stream: &str, reason: UnsubscribedReason, id: Option<&ClientId>) {
    let mut frame = Object::begin(out, "unsubscribed");
    frame.string("stream", stream);
    frame.string("reason", reason.as_str());
    frame.id(id);
    frame.end();
}

/// Appends `reauthenticate`: the credential ends at `expires_at`, `expires_in_ms` from now.
pub fn write_reauthenticate(out: &mut Vec<u8>, expires_at: WallTime, expires_in_ms: u64) {
    let mut frame = Object::begin(out, "reauthenticate");
    frame.number("expires_at", expires_at.as_micros());
    frame.number("expires_in_ms", expires_in_ms);
    frame.end();
}

/// Appends `auth_ok`, the answer to an accepted `auth_update`. `expires_at` is null where there is none.
pub fn write_auth_ok<'p>(
    out: &mut Vec<u8>,
    id: Option<&ClientId>,
    expires_at: Option<WallTime>,
    permissions: impl IntoIterator<Item = &'p str>,
) {
    let mut frame = Object::begin(out, "auth_ok");
    frame.id(id);
    frame.number_or_null("expires_at", expires_at.map(WallTime::as_micros));
    frame.strings("permissions", permissions);
    frame.end();
}

/// Appends `permission_update`: what the connection may do from now on.
pub fn write_permission_update<'t>(
    out: &mut Vec<u8>,
    permissions: impl IntoIterator<Item = &'t str>,
    roles: impl IntoIterator<Item = &'t str>,
) {
    let mut frame = Object::begin(out, "permission_update");
    frame.strings("permissions", permissions);
    frame.strings("roles", roles);
    frame.end();
}

/// An `error` frame.
#[derive(Clone, Copy, Debug)]
pub struct ErrorFrame<'a> {
    /// What went wrong, for programs.
    pub code: ErrorCode,
    /// What went wrong, for people. Never holds a secret.
    pub error: &'a str,
    /// Why, where the code alone does not tell: the `reason` of `AUTH_UPDATE_REJECTED`, the code of `ACTION_FAILED`.
    pub reason: Option<&'a str>,
    /// What an action's upstream answered, where it did.
    pub status: Option<u16>,
    /// The JSON of its answer, where the configuration lets it through.
    pub body: Option<&'a str>,
    /// When it may be tried again, where that is known.
    pub retry_in_ms: Option<u64>,
    /// The `id` of the frame it answers.
    pub id: Option<&'a ClientId>,
    /// The stream it is about.
    pub stream: Option<&'a str>,
}

impl<'a> ErrorFrame<'a> {
    /// An error that says what its code says; set further members as needed.
    pub const fn of(code: ErrorCode) -> ErrorFrame<'a> {
        ErrorFrame {
            code,
            error: code.meaning(),
            reason: None,
            status: None,
            body: None,
            retry_in_ms: None,
            id: None,
            stream: None,
        }
    }
}

impl<'a> From<&'a MessageError> for ErrorFrame<'a> {
    fn from(error: &'a MessageError) -> ErrorFrame<'a> {
        let text = match error {
            MessageError::UnknownType { .. } => ErrorCode::UnknownType.meaning(),
            MessageError::Bad { reason, .. } => reason,
        };
        ErrorFrame { error: text, id: error.id(), ..ErrorFrame::of(error.code()) }
    }
}

/// Appends `error`; members without a value are left out.
pub fn write_error(out: &mut Vec<u8>, error: &ErrorFrame<'_>) {
    let mut frame = Object::begin(out, "error");
    frame.string("code", error.code.as_str());
    frame.string("error", error.error);
    if let Some(reason) = error.reason {
        frame.string("reason", reason);
    }
    if let Some(status) = error.status {
        frame.number("status", u64::from(status));
    }
    if let Some(retry_in_ms) = error.retry_in_ms {
        frame.number("retry_in_ms", retry_in_ms);
    }
    frame.id(error.id);
    if let Some(stream) = error.stream {
        frame.string("stream", stream);
    }
    if let Some(body) = error.body {
        frame.raw("body", body);
    }
    frame.end();
}

/// Appends `action_result`, which echoes the `id` of the action if it had one. `body` is JSON, as the upstream sent it.
pub fn write_action_result(out: &mut Vec<u8>, id: Option<&ClientId>, status: u16, body: Option<&str>) {
    let mut frame = Object::begin(out, "action_result");
    frame.id(id);
    frame.number("status", u64::from(status));
    if let Some(body) = body {
        frame.raw("body", body);
    }
    frame.end();
}

/// Appends `reconnect`: the server goes away, and the client is to come back after `after_ms`.
pub fn write_reconnect(out: &mut Vec<u8>, after_ms: u64) {
    let mut frame = Object::begin(out, "reconnect");
    frame.number("after_ms", after_ms);
    frame.end();
}

/// Appends `close`, which over SSE stands for the WebSocket's close frame.
pub fn write_close(out: &mut Vec<u8>, reason: CloseReason) {
    let mut frame = Object::begin(out, "close");
    frame.number("code", u64::from(reason.code()));
    frame.string("reason", reason.reason());
    frame.end();
}

/// A `stream_status` frame.
#[derive(Clone, Copy, Debug)]
pub struct StreamStatus<'a> {
    /// The stream's name.
    pub stream: &'a str,
    /// How it is.
    pub state: StreamState,
    /// Why, where it is not live: one of the `UPSTREAM_…` codes, or `STOPPED`.
    pub code: Option<&'a str>,
    /// The upstream's status, with `UPSTREAM_STATUS`.
    pub status: Option<u16>,
    /// When it will be polled again, where that is known.
    pub retry_in_ms: Option<u64>,
    /// When the state began.
    pub ts: WallTime,
}

/// Appends `stream_status`; members without a value are left out.
pub fn write_stream_status(out: &mut Vec<u8>, status: &StreamStatus<'_>) {
    let mut frame = Object::begin(out, "stream_status");
    frame.string("stream", status.stream);
    frame.string("state", status.state.as_str());
    if let Some(code) = status.code {
        frame.string("code", code);
    }
    if let Some(status) = status.status {
        frame.number("status", u64::from(status));
    }
    if let Some(retry_in_ms) = status.retry_in_ms {
        frame.number("retry_in_ms", retry_in_ms);
    }
    frame.number("ts", status.ts.as_micros());
    frame.end();
}

/// A JSON object that is being written, without white space. Names are the contract's and need no escaping.
struct Object<'o> {
    out: &'o mut Vec<u8>,
    is_empty: bool,
}

impl<'o> Object<'o> {
    fn begin(out: &'o mut Vec<u8>, frame_type: &'static str) -> Object<'o> {
        out.push(b'{');
        let mut object = Object { out, is_empty: true };
        object.string("type", frame_type);
        object
    }

    fn raw(&mut self, name: &'static str, json: &str) {
        if !std::mem::replace(&mut self.is_empty, false) {
            self.out.push(b',');
        }
        self.out.push(b'"');
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b"\":");
        self.out.extend_from_slice(json.as_bytes());
    }

    fn string(&mut self, name: &'static str, value: &str) {
        self.raw(name, "");
        write_string(self.out, value);
    }

    fn string_or_null(&mut self, name: &'static str, value: Option<&str>) {
        match value {
            Some(value) => self.string(name, value),
            None => self.raw(name, "null"),
        }
    }

    fn strings<'s>(&mut self, name: &'static str, values: impl IntoIterator<Item = &'s str>) {
        self.raw(name, "[");
        for (place, value) in values.into_iter().enumerate() {
            if place > 0 {
                self.out.push(b',');
            }
            write_string(self.out, value);
        }
        self.out.push(b']');
    }

    fn number(&mut self, name: &'static str, value: u64) {
        self.raw(name, "");
        write!(self.out, "{value}").expect("a Vec takes every write");
    }

    fn number_or_null(&mut self, name: &'static str, value: Option<u64>) {
        match value {
            Some(value) => self.number(name, value),
            None => self.raw(name, "null"),
        }
    }

    fn id(&mut self, id: Option<&ClientId>) {
        if let Some(id) = id {
            self.raw("id", id.as_json());
        }
    }

    fn end(self) {
        self.out.push(b'}');
    }
}

fn write_string(out: &mut Vec<u8>, value: &str) {
    serde_json::to_writer(out, value).expect("a str is always JSON, and a Vec takes every write");
}

/// Writes the enum, its spellings, statuses and meanings as one table, so that no column can be forgotten.
macro_rules! error_codes {
    ($($variant:ident $text:literal $status:literal $meaning:literal,)*) => {
        /// The stable codes of `error` frames and problem documents (protocol section 4).
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        pub enum ErrorCode {
            $(#[doc = $meaning] $variant,)*
        }

        impl ErrorCode {
            /// Every code, in the order of the contract.
            pub const ALL: &[ErrorCode] = &[$(ErrorCode::$variant,)*];

            /// Its spelling on the wire.
            pub const fn as_str(self) -> &'static str {
                match self { $(ErrorCode::$variant => $text,)* }
            }

            /// The status of the HTTP answer that carries it.
            pub const fn http_status(self) -> u16 {
                match self { $(ErrorCode::$variant => $status,)* }
            }

            /// What it means, in one line, for people.
            pub const fn meaning(self) -> &'static str {
                match self { $(ErrorCode::$variant => $meaning,)* }
            }
        }
    };
}

error_codes! {
    MissingCredential "MISSING_CREDENTIAL" 401 "A credential is needed and none was presented",
    InvalidToken "INVALID_TOKEN" 401 "The credential presented is not valid",
    TokenExpired "TOKEN_EXPIRED" 401 "The token has expired",
    TokenRevoked "TOKEN_REVOKED" 401 "The token was revoked",
    SessionExpired "SESSION_EXPIRED" 401 "The session has expired or does not exist",
    LoggedOut "LOGGED_OUT" 401 "The user has logged out since the credential was issued",
    AuthTimeout "AUTH_TIMEOUT" 401 "No credential came in time",
    AuthUpdateRejected "AUTH_UPDATE_REJECTED" 401 "The new credential was refused; the connection goes on under its old one",
    AuthSubjectMismatch "AUTH_SUBJECT_MISMATCH" 403 "The new credential names another identity; the connection goes on under its old one",
    OriginNotAllowed "ORIGIN_NOT_ALLOWED" 403 "A cookie was sent from an origin that is not allowed",
    Forbidden "FORBIDDEN" 403 "The credential does not allow this",
    InsufficientPermissions "INSUFFICIENT_PERMISSIONS" 403 "Permission denied",
    ClaimMissing "CLAIM_MISSING" 403 "The credential lacks a claim that the stream's URL or body needs",
    ClaimInvalid "CLAIM_INVALID" 403 "A claim cannot stand in the stream's URL or body",
    StreamNotFound "STREAM_NOT_FOUND" 404 "There is no such stream",
    StreamUnavailable "STREAM_UNAVAILABLE" 503 "The stream has no value yet",
    StreamEnded "STREAM_ENDED" 404 "The stream was deleted",
    AlreadySubscribed "ALREADY_SUBSCRIBED" 409 "The connection is subscribed to that stream already",
    TooManyConnections "TOO_MANY_CONNECTIONS" 429 "The limit of connections is reached",
    TooManySubscriptions "TOO_MANY_SUBSCRIPTIONS" 429 "The connection's limit of subscriptions is reached",
    TooManyStreams "TOO_MANY_STREAMS" 429 "The limit of streams is reached",
    RateLimited "RATE_LIMITED" 429 "Too many requests or messages in too short a time",
    SessionStoreUnavailable "SESSION_STORE_UNAVAILABLE" 503 "The session store does not answer",
    Draining "DRAINING" 503 "The server is shutting down",
    Overloaded "OVERLOADED" 503 "The server has no room at the moment",
    BadRequest "BAD_REQUEST" 400 "The request is malformed",
    NotFound "NOT_FOUND" 404 "There is nothing at this path",
    MethodNotAllowed "METHOD_NOT_ALLOWED" 405 "The path does not have this method",
    NotAcceptable "NOT_ACCEPTABLE" 406 "None of the representations is acceptable",
    PreconditionFailed "PRECONDITION_FAILED" 412 "The resource has changed since it was read",
    TooLarge "TOO_LARGE" 413 "The request is too large",
    UpgradeRequired "UPGRADE_REQUIRED" 426 "This is a WebSocket endpoint of version 13",
    BadMessage "BAD_MESSAGE" 400 "The message is malformed or not for this connection",
    UnknownType "UNKNOWN_TYPE" 400 "There is no message of this type",
    UnknownConnection "UNKNOWN_CONNECTION" 404 "There is no such connection",
    TargetBlocked "TARGET_BLOCKED" 403 "The target is not allowed",
    ActionFailed "ACTION_FAILED" 502 "The upstream did not carry out the action",
    Internal "INTERNAL" 500 "The server made a mistake",
}

/// Writes the table of section 5, so that no column can be forgotten.
macro_rules! close_reasons {
    ($($variant:ident $code:literal $reason:literal $client:literal,)*) => {
        /// Why the server ends a connection (protocol section 5): a close code, a reason and what a client makes of it.
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        pub enum CloseReason {
            $(#[doc = concat!(stringify!($code), " `", $reason, "`")] $variant,)*
        }

        impl CloseReason {
            /// Every reason, in the order of the contract.
            pub const ALL: &[CloseReason] = &[$(CloseReason::$variant,)*];

            /// The code of the close frame.
            pub const fn code(self) -> u16 {
                match self { $(CloseReason::$variant => $code,)* }
            }

            /// The reason of the close frame, which programs may compare.
            pub const fn reason(self) -> &'static str {
                match self { $(CloseReason::$variant => $reason,)* }
            }

            /// What the client should do now.
            pub const fn client_should(self) -> &'static str {
                match self { $(CloseReason::$variant => $client,)* }
            }
        }
    };
}

close_reasons! {
    TokenExpired 4001 "token_expired" "get a fresh credential, reconnect",
    SessionExpired 4001 "session_expired" "get a fresh credential, reconnect",
    ApiKeyExpired 4001 "api_key_expired" "get a fresh credential, reconnect",
    KeyRemoved 4001 "key_removed" "get a fresh credential, reconnect",
    AuthUpdateRejected 4001 "auth_update_rejected" "get a fresh credential, reconnect",
    InvalidToken 4001 "invalid_token" "get a fresh credential, reconnect",
    Forbidden 4003 "forbidden" "not reconnect unchanged",
    StreamEnded 4004 "stream_ended" "not reconnect",
    NotFound 4004 "not_found" "not reconnect",
    AuthTimeout 4008 "auth_timeout" "reconnect with a credential",
    LoggedOut 4010 "logged_out" "not reconnect: sign in again",
    TokenRevoked 4010 "token_revoked" "not reconnect: sign in again",
    ApiKeyRevoked 4010 "api_key_revoked" "not reconnect: sign in again",
    Draining 1012 "draining" "reconnect after `reconnect.after_ms`",
    Overloaded 1013 "overloaded" "back off with jitter",
    WriteStall 1013 "write_stall" "back off with jitter",
    HeartbeatTimeout 1001 "heartbeat_timeout" "reconnect",
    RateLimited 1008 "rate_limited" "send less",
    ProtocolError 1002 "protocol_error" "mend its framing",
    UnsupportedData 1003 "unsupported_data" "send text",
    InvalidPayload 1007 "invalid_payload" "send UTF-8",
    MessageTooBig 1009 "message_too_big" "send smaller messages",
    Internal 1011 "internal" "back off with jitter",
}

impl CloseReason {
    /// Which of several causes that fall into one turn wins: the higher. Between turns the first cause wins whatever its rank.
    pub const fn rank(self) -> u8 {
        match self.code() {
            4010 => 5,
            4001 => 4,
            4003 => 3,
            4004 => 2,
            1012 => 1,
            _ => 0,
        }
    }
}

impl From<FrameError> for CloseReason {
    fn from(error: FrameError) -> CloseReason {
        match error.close_code() {
            1007 => CloseReason::InvalidPayload,
            1009 => CloseReason::MessageTooBig,
            _ => CloseReason::ProtocolError,
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn id(json: &str) -> Option<ClientId> {
        Some(ClientId::from_json(json).expect("it is an id"))
    }

    fn bad(text: &str) -> (&'static str, Option<ClientId>) {
        match ClientMessage::parse(text) {
            Err(MessageError::Bad { reason, id }) => (reason, id),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn the_contracts_messages_are_understood() {
        let parse = |text| ClientMessage::parse(text).expect("it is in the contract");
        assert_eq!(parse(r#"{"type":"auth","token":"a.b.c"}"#), ClientMessage::Auth { token: Secret::new(*b"a.b.c") });
        assert_eq!(
            parse(r#"{"type":"auth_update","token":"a.b.c","id":7}"#),
            ClientMessage::AuthUpdate { token: Some(Secret::new(*b"a.b.c")), id: id("7") }
        );
        assert_eq!(parse(r#"{"type":"auth_update"}"#), ClientMessage::AuthUpdate { token: None, id: None });
        let text = r#" {"type":"subscribe","stream":"leads","format":"merge","since":"k3f9-40","select":"$.a","max_rate_ms":500,"id":"a"} "#;
        assert_eq!(
            parse(text),
            ClientMessage::Subscribe(Subscribe {
                stream: "leads".into(),
                format: Some(Format::Merge),
                since: Some("k3f9-40".into()),
                select: Some("$.a".into()),
                max_rate_ms: Some(500),
                id: id(r#""a""#),
            })
        );
        let bare =
            Subscribe { stream: "leads".into(), format: None, since: None, select: None, max_rate_ms: None, id: None };
        assert_eq!(parse(r#"{"stream":"leads","type":"subscribe"}"#), ClientMessage::Subscribe(bare));
        assert_eq!(
            parse(r#"{"type":"unsubscribe","stream":"leads?region=eu","id":-1.50E+2}"#),
            ClientMessage::Unsubscribe { stream: "leads?region=eu".into(), id: id("-1.50E+2") }
        );
    }

    #[test]
    fn unknown_members_are_ignored_and_escapes_are_read() {
        let text = r#"{"ty\u0070e":"unsubscribe","x":{"a":[1,{"b":null}],"c":"\ud83d\ude00"},"stream":"l\u0065ads"}"#;
        let message = ClientMessage::parse(text).expect("it is well-formed");
        assert_eq!(message, ClientMessage::Unsubscribe { stream: "leads".into(), id: None });
    }

    #[test]
    fn an_unknown_type_is_told_from_a_malformed_message() {
        let parsed = ClientMessage::parse(r#"{"type":"dance","id":3}"#);
        assert_eq!(parsed, Ok(ClientMessage::Other { kind: "dance".into(), id: id("3") }));
        let of = |bytes: usize| ClientMessage::parse(&format!(r#"{{"type":"{}","id":3}}"#, "d".repeat(bytes)));
        assert!(matches!(of(64), Ok(ClientMessage::Other { .. })));
        assert_eq!(of(65), Err(MessageError::UnknownType { id: id("3") }));
        assert_eq!(of(65).expect_err("unknown").code(), ErrorCode::UnknownType);
        for kind in ClientMessage::TYPES {
            let parsed = ClientMessage::parse(&format!(r#"{{"type":"{kind}"}}"#));
            assert!(!matches!(parsed, Ok(ClientMessage::Other { .. })), "{kind}");
        }
    }

    #[test]
    fn a_dotted_name_leads_to_the_json_of_a_member() {
        let text = r#"{"type":"t","a":{"b":{"c":1.50E+2},"":0,"\u0064":[ 1 ]},"a.b":7,"x":[{"y":1}]}"#;
        let members = Members::parse(text).expect("an object");
        for (path, json) in [
            ("type", Some(r#""t""#)),
            ("a.b", Some(r#"{"c":1.50E+2}"#)),
            ("a.b.c", Some("1.50E+2")),
            ("a.d", Some("[ 1 ]")),
            ("a.", Some("0")),
            ("b", None),
            ("a.b.c.d", None),
            ("x.y", None),
            ("x.0", None),
            ("type.t", None),
            ("", None),
        ] {
            assert_eq!(members.at(path), json, "{path}");
        }
        assert!(Members::parse("[]").is_err());
        assert!(Members::parse(r#"{"a":{"b":1,"b":2}}"#).is_err());
    }

    #[test]
    fn what_is_malformed_is_refused_with_its_reason() {
        for text in ["", "[]", "\"type\"", "7", "null", "nonsense"] {
            assert_eq!(bad(text), ("not a JSON object", None), "{text}");
        }
        for text in [
            "{",
            "{}}",
            r#"{"type""#,
            r#"{"type":}"#,
            r#"{"type":"auth",}"#,
            r#"{,}"#,
            r#"{type:1}"#,
            r#"{"a":01}"#,
            r#"{"a":1.}"#,
            r#"{"a":.5}"#,
            r#"{"a":1e}"#,
            r#"{"a":+1}"#,
            r#"{"a":-}"#,
            r#"{"a":tru}"#,
            r#"{"a":[1,]}"#,
            r#"{"a":[1 2]}"#,
            "{\"a\":\"\n\"}",
            r#"{"a":"\x"}"#,
            r#"{"a":"\ud800"}"#,
            r#"{"a":"\"#,
            r#"{"a":"é\"#,
            r#"{"a":"\u00zz"}"#,
            r#"{"a":"\é"}"#,
            "{\"a\":1\u{a0}}",
        ] {
            assert_eq!(bad(text).1, None, "{text}");
        }
        assert_eq!(bad(r#"{"type":"auth","token":"a","type":"auth"}"#), ("a member stands twice", None));
        assert_eq!(bad(r#"{"type":"auth","token":"a","x":{"b":1,"\u0062":2}}"#), ("a member stands twice", None));
        assert_eq!(bad("{}"), ("type is missing", None));
        assert_eq!(bad(r#"{"id":1}"#), ("type is missing", id("1")));
        assert_eq!(bad(r#"{"id":1,"type":1}"#), ("type is not a string", id("1")));
        assert_eq!(bad(r#"{"type":"auth"}"#), ("token is missing", None));
        assert_eq!(bad(r#"{"type":"auth","token":1}"#), ("token is not a string", None));
        assert_eq!(bad(r#"{"type":"auth_update","token":null,"id":1}"#), ("token is not a string", id("1")));
        assert_eq!(bad(r#"{"type":"subscribe","id":1}"#), ("stream is missing", id("1")));
        assert_eq!(bad(r#"{"type":"unsubscribe","stream":[]}"#), ("stream is not a string", None));
        let subscribe = |member: &str| bad(&format!(r#"{{"type":"subscribe","stream":"s","id":1,{member}}}"#));
        assert_eq!(subscribe(r#""format":"xml""#), ("format is none of patch, merge, full", id("1")));
        assert_eq!(subscribe(r#""format":1"#), ("format is not a string", id("1")));
        assert_eq!(subscribe(r#""select":1"#), ("select is not a string", id("1")));
        let long = format!(r#""select":"${}""#, "a".repeat(PATH_BYTES_MAX));
        assert_eq!(subscribe(&long), ("select is too long", id("1")));
        for rate in ["-1", "1.0", "1e3", "\"1\"", "null"] {
            let member = format!(r#""max_rate_ms":{rate}"#);
            assert_eq!(subscribe(&member), ("max_rate_ms is not a whole number", id("1")), "{rate}");
        }
    }

    #[test]
    fn ids_are_numbers_or_strings_of_at_most_64_bytes_and_keep_their_spelling() {
        for json in ["0", "-0.0", "1E5", "12345678901234567890123", r#""""#, r#""\u0041\n\/""#, r#""é""#] {
            assert_eq!(id(json).expect("it is an id").as_json(), json);
        }
        for json in ["true", "null", "{}", "[]", "", "1 ", " 1", "01", "1,2", "\"", r#""a"b"#, r#""\q""#] {
            assert_eq!(ClientId::from_json(json), None, "{json}");
        }
        assert!(ClientId::from_json(&"1".repeat(64)).is_some());
        assert!(ClientId::from_json(&"1".repeat(65)).is_none());
        let string = |bytes| format!("\"{}\"", "x".repeat(bytes));
        assert!(ClientId::from_json(&string(64)).is_some());
        assert!(ClientId::from_json(&string(65)).is_none());
        assert!(ClientId::from_json(&format!("\"{}\"", r"\u0041".repeat(64))).is_some(), "its content counts");
        let reason = "id is not a number or a string, each of at most 64 bytes";
        assert_eq!(bad(&format!(r#"{{"type":"dance","id":{}}}"#, string(65))), (reason, None));
        assert_eq!(bad(r#"{"type":"auth_update","id":null}"#), (reason, None));
    }

    #[test]
    fn limits_hold_at_their_value_and_not_past_it() {
        let nested = |depth: usize| {
            // The message itself is the first level.
            let (open, close) = ("[".repeat(depth - 1), "]".repeat(depth - 1));
            ClientMessage::parse(&format!(r#"{{"type":"auth_update","x":{open}{close}}}"#))
        };
        assert!(nested(128).is_ok());
        assert_eq!(nested(129), Err(MessageError::Bad { reason: "nested too deeply", id: None }));
        assert!(nested(30_000).is_err(), "the recursion is bounded too");

        let subscribe = |stream: usize, since: usize, max_rate_ms: u64| {
            let (stream, since) = ("s".repeat(stream), "0".repeat(since));
            let text =
                format!(r#"{{"type":"subscribe","stream":"{stream}","since":"{since}","max_rate_ms":{max_rate_ms}}}"#);
            match ClientMessage::parse(&text)? {
                ClientMessage::Subscribe(subscribe) => Ok::<_, MessageError>(subscribe),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(subscribe(1, 64, 0).map(|s| s.since), Ok(Some("0".repeat(64))));
        assert_eq!(subscribe(1, 65, 0).map(|s| s.since), Ok(Some(String::new())), "malformed, which is no error");
        assert_eq!(subscribe(1, 1, MAX_RATE_MS_MAX).map(|s| s.max_rate_ms), Ok(Some(3_600_000)));
        assert!(subscribe(1, 1, MAX_RATE_MS_MAX + 1).is_err());
        assert!(
            ClientMessage::parse(r#"{"type":"subscribe","stream":"s","max_rate_ms":99999999999999999999}"#).is_err()
        );
        assert!(subscribe(STREAM_NAME_BYTES_MAX, 1, 1).is_ok());
        assert!(subscribe(STREAM_NAME_BYTES_MAX + 1, 1, 1).is_err());
    }

    #[test]
    fn tokens_are_never_printed() {
        for text in [r#"{"type":"auth","token":"hunter2"}"#, r#"{"type":"auth_update","token":"hunter2"}"#] {
            assert!(!format!("{:?}", ClientMessage::parse(text)).contains("hunter2"));
        }
    }

    fn check(write: impl FnOnce(&mut Vec<u8>), expected: Expect) {
        let mut out = Vec::new();
        write(&mut out);
        let text = String::from_utf8(out).expect("frames are UTF-8");
        serde_json::from_str::<Value>(&text).expect("frames are JSON");
        expected.assert_eq(&text);
    }

    #[test]
    fn the_servers_frames_are_the_contracts() {
        let connection =
            ConnectionId { random: 7, process: crate::ids::ProcessId(1), core: crate::ids::CoreId(0), index: 0 };
        let at = WallTime::from_secs(1_700_000_000);
        check(
            |out| write_welcome(out, connection, AuthKind::Jwt, Some("u\"1"), Some(at), 25_000),
            expect![[
                r#"{"type":"welcome","connection":"c_000000000000000000000000000000070000000000000001000000000000","auth":{"type":"jwt","sub":"u\"1","expires_at":1700000000000000},"heartbeat_ms":25000}"#
            ]],
        );
        check(
            |out| write_welcome(out, connection, AuthKind::Anonymous, None, None, 25_000),
            expect![[
                r#"{"type":"welcome","connection":"c_000000000000000000000000000000070000000000000001000000000000","auth":{"type":"anonymous","sub":null,"expires_at":null},"heartbeat_ms":25000}"#
            ]],
        );
        check(
            |out| write_subscribed(out, "leads", id("1.0").as_ref()),
            expect![[r#"{"type":"subscribed","stream":"leads","id":1.0}"#]],
        );
        check(|out| write_subscribed(out, "leads", None), expect![[r#"{"type":"subscribed","stream":"leads"}"#]]);
        check(
            |out| write_unsubscribed(out, "leads", UnsubscribedReason::Forbidden, None),
            expect![[r#"{"type":"unsubscribed","stream":"leads","reason":"forbidden"}"#]],
        );
        check(
            |out| write_unsubscribed(out, "leads", UnsubscribedReason::Requested, id("2").as_ref()),
            expect![[r#"{"type":"unsubscribed","stream":"leads","reason":"requested","id":2}"#]],
        );
        check(
            |out| write_reauthenticate(out, at, 60_000),
            expect![[r#"{"type":"reauthenticate","expires_at":1700000000000000,"expires_in_ms":60000}"#]],
        );
        check(
            |out| write_auth_ok(out, id("7").as_ref(), Some(at), ["leads.read", "a\nb"]),
            expect![[r#"{"type":"auth_ok","id":7,"expires_at":1700000000000000,"permissions":["leads.read","a\nb"]}"#]],
        );
        check(
            |out| write_auth_ok(out, None, None, []),
            expect![[r#"{"type":"auth_ok","expires_at":null,"permissions":[]}"#]],
        );
        check(|out| write_reconnect(out, 1700), expect![[r#"{"type":"reconnect","after_ms":1700}"#]]);
        check(
            |out| write_close(out, CloseReason::TokenExpired),
            expect![[r#"{"type":"close","code":4001,"reason":"token_expired"}"#]],
        );
    }

    #[test]
    fn errors_leave_out_what_they_do_not_know() {
        let nine = id("9");
        check(
            |out| write_error(out, &ErrorFrame::of(ErrorCode::StreamNotFound)),
            expect![[r#"{"type":"error","code":"STREAM_NOT_FOUND","error":"There is no such stream"}"#]],
        );
        let denied = ErrorFrame {
            id: nine.as_ref(),
            stream: Some("leads"),
            ..ErrorFrame::of(ErrorCode::InsufficientPermissions)
        };
        check(
            |out| write_error(out, &denied),
            expect![[
                r#"{"type":"error","code":"INSUFFICIENT_PERMISSIONS","error":"Permission denied","id":9,"stream":"leads"}"#
            ]],
        );
        let rejected = ErrorFrame { reason: Some("token_expired"), ..ErrorFrame::of(ErrorCode::AuthUpdateRejected) };
        check(
            |out| write_error(out, &rejected),
            expect![[
                r#"{"type":"error","code":"AUTH_UPDATE_REJECTED","error":"The new credential was refused; the connection goes on under its old one","reason":"token_expired"}"#
            ]],
        );
        let failed = ErrorFrame {
            reason: Some("UPSTREAM_STATUS"),
            status: Some(422),
            body: Some(r#"{"field":1.0}"#),
            retry_in_ms: Some(1500),
            id: nine.as_ref(),
            ..ErrorFrame::of(ErrorCode::ActionFailed)
        };
        check(
            |out| write_error(out, &failed),
            expect![[
                r#"{"type":"error","code":"ACTION_FAILED","error":"The upstream did not carry out the action","reason":"UPSTREAM_STATUS","status":422,"retry_in_ms":1500,"id":9,"body":{"field":1.0}}"#
            ]],
        );
        check(
            |out| write_action_result(out, nine.as_ref(), 200, Some(r#"{"n":1.50E+2}"#)),
            expect![[r#"{"type":"action_result","id":9,"status":200,"body":{"n":1.50E+2}}"#]],
        );
        check(|out| write_action_result(out, None, 204, None), expect![[r#"{"type":"action_result","status":204}"#]]);
        let error = ClientMessage::parse(r#"{"type":"subscribe","id":"x"}"#).expect_err("it names no stream");
        check(
            |out| write_error(out, &ErrorFrame::from(&error)),
            expect![[r#"{"type":"error","code":"BAD_MESSAGE","error":"stream is missing","id":"x"}"#]],
        );
    }

    #[test]
    fn a_status_has_its_code_only_where_there_is_one() {
        let live = StreamStatus {
            stream: "leads",
            state: StreamState::Live,
            code: None,
            status: None,
            retry_in_ms: None,
            ts: WallTime::from_micros(5),
        };
        check(
            |out| write_stream_status(out, &live),
            expect![[r#"{"type":"stream_status","stream":"leads","state":"live","ts":5}"#]],
        );
        let stale = StreamStatus {
            state: StreamState::Stale,
            code: Some("UPSTREAM_STATUS"),
            status: Some(500),
            retry_in_ms: Some(2000),
            ..live
        };
        check(
            |out| write_stream_status(out, &stale),
            expect![[
                r#"{"type":"stream_status","stream":"leads","state":"stale","code":"UPSTREAM_STATUS","status":500,"retry_in_ms":2000,"ts":5}"#
            ]],
        );
    }

    #[test]
    fn every_code_of_the_contract_stands_in_its_order() {
        let contract = "MISSING_CREDENTIAL INVALID_TOKEN TOKEN_EXPIRED TOKEN_REVOKED SESSION_EXPIRED LOGGED_OUT \
            AUTH_TIMEOUT AUTH_UPDATE_REJECTED AUTH_SUBJECT_MISMATCH ORIGIN_NOT_ALLOWED FORBIDDEN \
            INSUFFICIENT_PERMISSIONS CLAIM_MISSING CLAIM_INVALID STREAM_NOT_FOUND STREAM_UNAVAILABLE STREAM_ENDED \
            ALREADY_SUBSCRIBED TOO_MANY_CONNECTIONS TOO_MANY_SUBSCRIPTIONS TOO_MANY_STREAMS RATE_LIMITED \
            SESSION_STORE_UNAVAILABLE DRAINING OVERLOADED BAD_REQUEST NOT_FOUND METHOD_NOT_ALLOWED NOT_ACCEPTABLE \
            PRECONDITION_FAILED TOO_LARGE UPGRADE_REQUIRED BAD_MESSAGE UNKNOWN_TYPE UNKNOWN_CONNECTION \
            TARGET_BLOCKED ACTION_FAILED INTERNAL";
        let spelled: Vec<&str> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(spelled, contract.split_ascii_whitespace().collect::<Vec<_>>());
        for code in ErrorCode::ALL {
            assert!((400..600).contains(&code.http_status()) && !code.meaning().contains('\n'), "{code:?}");
        }
    }

    #[test]
    fn close_reasons_may_be_sent_and_are_ranked_as_the_contract_says() {
        for reason in CloseReason::ALL {
            assert!(crate::codec::ws::close_code_may_be_sent(reason.code()), "{reason:?}");
            assert!(reason.reason().len() <= 123 && !reason.client_should().is_empty(), "{reason:?}");
        }
        let mut ranked = [
            CloseReason::Draining,
            CloseReason::StreamEnded,
            CloseReason::LoggedOut,
            CloseReason::Forbidden,
            CloseReason::HeartbeatTimeout,
            CloseReason::TokenExpired,
        ];
        ranked.sort_by_key(|reason| std::cmp::Reverse(reason.rank()));
        assert_eq!(ranked.map(CloseReason::code), [4010, 4001, 4003, 4004, 1012, 1001]);
    }

    #[test]
    fn broken_framing_has_its_close_reason() {
        for error in [FrameError::Unmasked, FrameError::InvalidUtf8, FrameError::MessageTooLarge { limit: 1 }] {
            assert_eq!(CloseReason::from(error).code(), error.close_code());
        }
    }

    /// Any JSON value, as another implementation writes it.
    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".{0,4}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_another_implementation_writes_is_scanned(value in json()) {
            for text in [value.to_string(), serde_json::to_string_pretty(&value).expect("a value is JSON")] {
                let mut scanner = Scanner::new(&text);
                prop_assert_eq!(scanner.value(0), Ok(text.as_str()));
                prop_assert!(scanner.is_done());
            }
        }

        #[test]
        fn what_is_scanned_is_json_to_another_implementation(
            text in r#"[ \-\\{}\[\]",:0-2.eEu+tfnralse]{0,12}"#,
        ) {
            let mut scanner = Scanner::new(&text);
            if scanner.value(0).is_ok() && scanner.is_done() {
                let other = serde_json::from_str::<Value>(&text);
                // A float beyond f64's range is JSON all the same.
                prop_assert!(other.is_ok() || text.contains(['e', 'E']), "{other:?}");
            }
        }

        #[test]
        fn nothing_makes_it_panic(text in r#"[{}"a-z:,\\ é0-9\[\]]{0,64}"#) {
            let _ = ClientMessage::parse(&text);
            let _ = ClientMessage::parse(&format!(r#"{{"type":{text}"#));
        }
    }
}
