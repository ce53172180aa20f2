//! What is said about users, sessions and tokens from outside: logged out, revoked, other permissions. Text in, a closed
//! set of events out; and the text of those that the admin API makes.
//!
//! Source: protocol version 1, section 6 («Control»); RFC 8259. Memory: what is returned, at most
//! [`limits::CONTROL_EVENT_BYTES_MAX`] an event and its text. Errors: [`ControlError`], the publisher's fault; nothing of
//! the event stands in it. Not here: where it is heard (`runtime`), what results from it (`marks`, `shard`).

use std::sync::Arc;
use std::time::Duration;

use super::api_key::ApiKeyMark;
use super::ephemeral::Place;
use super::grant::TokenMark;
use super::jwt::DATE_SECS_MAX;
use super::members::{Members, MembersError, Value, elements};
use super::session::SessionMark;
use crate::ids::{ProcessId, StreamId};
use crate::limits;
use crate::time::WallTime;

/// The default name of the channel for logouts, of users and of sessions.
pub const USER_LOGGED_OUT: &str = "user-logged-out";
/// The default name of the channel for permissions that change.
pub const PERMISSION_UPDATE: &str = "permission-update";
/// The default name of the channel for tokens that are revoked.
pub const TOKEN_REVOKED: &str = "token-revoked";

/// What stands on the control stream when the API keys in Redis have changed. It has no channel: restcast alone says it.
pub const API_KEYS_CHANGED: &str = "api-keys-changed";

/// The same of streams that the admin API has made, or stopped.
pub const STREAMS_CHANGED: &str = "streams-changed";

/// The same of an ephemeral session that has been ended before its time.
pub const EPHEMERAL_ENDED: &str = "ephemeral-ended";

/// What stands there when an administrator has had a stream polled at once.
pub const STREAM_REFRESH: &str = "stream-refresh";

/// How far ahead of ours a publisher's clock is believed: what is dated later counts as of then. Without it a date in the
/// wrong unit would lock a user out for good.
const AHEAD_MAX: Duration = Duration::from_secs(60);

/// One event as it is published and as the control stream keeps it. It is not judged yet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ControlEntry {
    /// The default name of the channel: `user-logged-out`, `permission-update` or `token-revoked`; or `api-keys-changed`.
    pub event: String,
    /// The payload.
    pub data: String,
    /// When it was heard or asked for: milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// A user: a subject of one issuer, or of each where none is named.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct User {
    /// Who issued its credentials; `None`: whoever did.
    pub issuer: Option<Box<str>>,
    /// The user id.
    pub sub: Box<str>,
}

/// What has happened to a user, a session or a token.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// All connections of a user end, and every token from before is refused.
    UserLoggedOut {
        /// Whose.
        user: User,
        /// When.
        at: WallTime,
    },
    /// A session has ended.
    SessionLoggedOut {
        /// Which.
        session: SessionMark,
        /// When.
        at: WallTime,
    },
    /// One token is good no longer.
    TokenRevoked {
        /// Whose token it is; `None`: whoever's.
        issuer: Option<Box<str>>,
        /// Which: by its `jti`.
        token: TokenMark,
        /// Its `exp`, where that was told.
        expires: Option<WallTime>,
        /// When it was revoked.
        at: WallTime,
    },
    /// Every token of a user that was issued before a certain time is good no longer.
    IssuedBeforeRevoked {
        /// Whose.
        user: User,
        /// That time: a token of this very time is still good.
        before: WallTime,
        /// When they were revoked.
        at: WallTime,
    },
    /// A user has other permissions or roles from now on.
    PermissionsChanged {
        /// Who.
        user: User,
        /// All of them; `None`: they stay as they are.
        permissions: Option<Arc<[Box<str>]>>,
        /// All of them; `None`: they stay as they are.
        roles: Option<Arc<[Box<str>]>>,
        /// Since when.
        at: WallTime,
    },
}

/// Why an event is not carried out.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ControlError {
    /// Not one of the three channels.
    #[error("there is no event of that name")]
    UnknownEvent,
    /// Not read at all.
    #[error("it has {bytes} bytes, at most {} are read", limits::CONTROL_EVENT_BYTES_MAX)]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// The payload of a logout is JSON, and neither an object nor an id.
    #[error("it is an array")]
    NotAnId,
    /// The payload is no object that could be read.
    #[error("{0}")]
    Payload(#[from] MembersError),
    /// It does not say whom or what it is about.
    #[error("it has neither {0}")]
    Missing(&'static str),
    /// A member is of another type than it must be.
    #[error("its {member} is not {wanted}")]
    BadMember {
        /// Which.
        member: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
}

impl ControlEntry {
    /// The entry for a user's logout.
    pub fn user_logged_out(sub: &str, issuer: Option<&str>, now: WallTime) -> ControlEntry {
        ControlEntry::of(USER_LOGGED_OUT, [("userId", Some(sub.into())), ("iss", issuer.map(Into::into))], now)
    }

    /// The entry for permissions and roles that change from `now` on; those that are `None` stay.
    pub fn permissions_changed(
        sub: &str,
        issuer: Option<&str>,
        permissions: Option<Vec<String>>,
        roles: Option<Vec<String>>,
        now: WallTime,
    ) -> ControlEntry {
        let members = [
            ("userId", Some(sub.into())),
            ("iss", issuer.map(Into::into)),
            ("permissions", permissions.map(Into::into)),
            ("roles", roles.map(Into::into)),
            // So that everyone who hears it dates it alike.
            ("at", Some(millis(now).into())),
        ];
        ControlEntry::of(PERMISSION_UPDATE, members, now)
    }

    /// The entry for one token that is revoked; `exp` in seconds.
    pub fn token_revoked(jti: &str, exp: Option<u64>, issuer: Option<&str>, now: WallTime) -> ControlEntry {
        let members = [("jti", Some(jti.into())), ("exp", exp.map(Into::into)), ("iss", issuer.map(Into::into))];
        ControlEntry::of(TOKEN_REVOKED, members, now)
    }

    /// The entry for a user's tokens from before `iat_before`, in seconds, that are revoked.
    pub fn issued_before_revoked(sub: &str, iat_before: u64, issuer: Option<&str>, now: WallTime) -> ControlEntry {
        let members =
            [("userId", Some(sub.into())), ("iat_before", Some(iat_before.into())), ("iss", issuer.map(Into::into))];
        ControlEntry::of(TOKEN_REVOKED, members, now)
    }

    /// The entry for API keys in Redis that have changed; `deleted`: this one is gone for good.
    pub fn api_keys_changed(deleted: Option<&ApiKeyMark>, now: WallTime) -> ControlEntry {
        let mark = |mark: &ApiKeyMark| serde_json::json!({ "id": mark.id.as_str(), "mark": mark.bits_text() });
        ControlEntry::of(API_KEYS_CHANGED, [("deleted", deleted.map(mark))], now)
    }

    /// Whether it says that the API keys in Redis have changed.
    pub fn is_of_api_keys(&self) -> bool {
        self.event == API_KEYS_CHANGED
    }

    /// The API key that it says is gone for good, where it says so of one.
    pub fn deleted_api_key(&self) -> Option<ApiKeyMark> {
        if !self.is_of_api_keys() || self.data.len() > limits::CONTROL_EVENT_BYTES_MAX {
            return None;
        }
        let said: serde_json::Value = serde_json::from_str(&self.data).ok()?;
        let deleted = said.get("deleted")?;
        ApiKeyMark::read(deleted.get("id")?.as_str()?, deleted.get("mark")?.as_str()?)
    }

    /// The entry for a stream in Redis that has changed.
    pub fn stream_changed(id: &StreamId, now: WallTime) -> ControlEntry {
        ControlEntry::of(STREAMS_CHANGED, [("id", Some(id.as_str().into()))], now)
    }

    /// The entry for a stream that is to be polled at once; `from`: the process that has done so.
    pub fn stream_refresh(id: &StreamId, from: ProcessId, now: WallTime) -> ControlEntry {
        let from = from.to_string();
        ControlEntry::of(STREAM_REFRESH, [("id", Some(id.as_str().into())), ("from", Some(from.into()))], now)
    }

    /// Whether it says that streams in Redis have changed.
    pub fn is_of_streams(&self) -> bool {
        self.event == STREAMS_CHANGED
    }

    /// The stream that it says has changed, where it names one.
    pub fn changed_stream(&self) -> Option<StreamId> {
        self.stream_of(STREAMS_CHANGED).map(|(id, _)| id)
    }

    /// The entry for an ephemeral session that has been ended.
    pub fn ephemeral_ended(place: Place, now: WallTime) -> ControlEntry {
        ControlEntry::of(EPHEMERAL_ENDED, [("place", Some(place.to_string().into()))], now)
    }

    /// Whether it says that an ephemeral session has been ended.
    pub fn is_of_ephemerals(&self) -> bool {
        self.event == EPHEMERAL_ENDED
    }

    /// The place of the session that it says has been ended.
    pub fn ended_ephemeral(&self) -> Option<Place> {
        if !self.is_of_ephemerals() || self.data.len() > limits::CONTROL_EVENT_BYTES_MAX {
            return None;
        }
        let said: serde_json::Value = serde_json::from_str(&self.data).ok()?;
        Place::parse(said.get("place")?.as_str()?)
    }

    /// Whether it says that a stream is to be polled.
    pub fn is_refresh(&self) -> bool {
        self.event == STREAM_REFRESH
    }

    /// The stream that another process than `own` has polled since `after`.
    pub fn refreshed_elsewhere(&self, own: ProcessId, after: WallTime) -> Option<StreamId> {
        let (id, said) = self.stream_of(STREAM_REFRESH)?;
        let from = said.get("from").and_then(serde_json::Value::as_str)?;
        (from != own.to_string() && self.at_ms >= millis(after)).then_some(id)
    }

    fn stream_of(&self, event: &str) -> Option<(StreamId, serde_json::Value)> {
        if self.event != event || self.data.len() > limits::CONTROL_EVENT_BYTES_MAX {
            return None;
        }
        let said: serde_json::Value = serde_json::from_str(&self.data).ok()?;
        Some((StreamId::new(said.get("id")?.as_str()?)?, said))
    }

    fn of<const N: usize>(event: &str, members: [(&str, Option<serde_json::Value>); N], now: WallTime) -> ControlEntry {
        let members = members.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        let data = serde_json::Value::Object(members.collect()).to_string();
        ControlEntry { event: event.to_owned(), data, at_ms: millis(now) }
    }
}

impl Event {
    /// What `entry`, received at `now`, says: one event, or two where it names a user and a session, or a token and a time.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn read(entry: &ControlEntry, now: WallTime) -> Result<Vec<Event>, ControlError> {
        if entry.data.len() > limits::CONTROL_EVENT_BYTES_MAX {
            return Err(ControlError::TooLarge { bytes: entry.data.len() });
        }
        let at = dated(entry.at_ms, now);
        match entry.event.as_str() {
            USER_LOGGED_OUT => read_logout(entry.data.trim(), at),
            PERMISSION_UPDATE => read_permissions(&entry.data, at, now),
            TOKEN_REVOKED => read_revocation(&entry.data, at),
            _ => Err(ControlError::UnknownEvent),
        }
    }
}

fn read_logout(data: &str, at: WallTime) -> Result<Vec<Event>, ControlError> {
    if !data.starts_with('{') {
        // An id that was published as the JSON it is, or as plain text. Text may be JSON by chance («1234e56», «true»): it is
        // the id it spells, for a logout that nobody is found by does less harm than one that is not heard. An array is no id.
        let sub = match serde_json::from_str(data) {
            Ok(serde_json::Value::String(sub)) => sub,
            Ok(serde_json::Value::Array(_)) => return Err(ControlError::NotAnId),
            Ok(_) | Err(_) => data.to_owned(),
        };
        if sub.is_empty() {
            return Err(ControlError::Missing("a user id nor an object"));
        }
        if sub.chars().any(char::is_control) {
            return Err(ControlError::BadMember { member: "user id", wanted: "text without control characters" });
        }
        return Ok(vec![Event::UserLoggedOut { user: User { issuer: None, sub: sub.into() }, at }]);
    }
    let members = Members::read(data.as_bytes())?;
    let issuer = text(&members, "iss")?;
    let mut events = Vec::new();
    if let Some(sub) = user_id(&members)? {
        events.push(Event::UserLoggedOut { user: User { issuer, sub }, at });
    }
    if let Some(sid) = text(&members, "sessionId")? {
        events.push(Event::SessionLoggedOut { session: SessionMark::of(sid.as_bytes()), at });
    }
    if events.is_empty() { Err(ControlError::Missing("userId nor sessionId")) } else { Ok(events) }
}

fn read_permissions(data: &str, received: WallTime, now: WallTime) -> Result<Vec<Event>, ControlError> {
    let members = Members::read(data.as_bytes())?;
    let Some(sub) = user_id(&members)? else { return Err(ControlError::Missing("userId nor anybody else")) };
    let user = User { issuer: text(&members, "iss")?, sub };
    let (permissions, roles) = (strings(&members, "permissions")?, strings(&members, "roles")?);
    if permissions.is_none() && roles.is_none() {
        return Err(ControlError::Missing("permissions nor roles"));
    }
    let at = match members.find("at") {
        None | Some(Value::Null) => received,
        Some(Value::Number(number)) => match number.parse::<f64>() {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "the range was looked at, and a part of a millisecond is none"
            )]
            Ok(ms) if (0.0..=DATE_SECS_MAX as f64 * 1e3).contains(&ms) => {
                let at = WallTime::from_micros((ms as u64).saturating_mul(1_000));
                // The same whenever it is read again: what is dated far ahead would come later each time.
                if at <= now + AHEAD_MAX { at } else { (received + AHEAD_MAX).min(now + AHEAD_MAX) }
            }
            _ => return Err(ControlError::BadMember { member: "at", wanted: "a date in milliseconds" }),
        },
        Some(_) => return Err(ControlError::BadMember { member: "at", wanted: "a number of milliseconds" }),
    };
    Ok(vec![Event::PermissionsChanged { user, permissions, roles, at }])
}

fn read_revocation(data: &str, at: WallTime) -> Result<Vec<Event>, ControlError> {
    let members = Members::read(data.as_bytes())?;
    let issuer = text(&members, "iss")?;
    let mut events = Vec::new();
    if let Some(jti) = text(&members, "jti")? {
        let expires = seconds(&members, "exp")?;
        events.push(Event::TokenRevoked { issuer: issuer.clone(), token: TokenMark::of(&jti), expires, at });
    }
    if let Some(before) = seconds(&members, "iat_before")? {
        let missing = ControlError::Missing("userId nor anybody else");
        let user = User { issuer, sub: user_id(&members)?.ok_or(missing)? };
        events.push(Event::IssuedBeforeRevoked { user, before, at });
    }
    if events.is_empty() { Err(ControlError::Missing("jti nor iat_before")) } else { Ok(events) }
}

/// The time that a publisher means by so many milliseconds.
fn dated(ms: u64, now: WallTime) -> WallTime {
    WallTime::from_micros(ms.saturating_mul(1_000)).min(now + AHEAD_MAX)
}

/// When something on the control stream was said, in milliseconds: as its field `at` has it or, where it has none that can be
/// read, or one that is still to come, as its entry was written (`written_ms`). What is dated ahead would be of another time
/// whenever it is read again, and refuse who has signed in since.
pub fn said_ms(at: Option<&[u8]>, written_ms: u64, now: WallTime) -> u64 {
    let text = at.and_then(|at| std::str::from_utf8(at).ok()).unwrap_or_default();
    // A clock in milliseconds may have parts of them.
    let whole = text.split_once('.').map_or(text, |(whole, part)| if is_digits(part) { whole } else { "" });
    let said = if is_digits(whole) { whole.parse::<u64>().ok() } else { None };
    said.filter(|&ms| ms <= millis(now + AHEAD_MAX)).unwrap_or(written_ms)
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn millis(time: WallTime) -> u64 {
    time.as_micros() / 1_000
}

/// `userId`, which applications also keep as a number.
fn user_id(members: &Members<'_>) -> Result<Option<Box<str>>, ControlError> {
    match members.find("userId") {
        Some(Value::Number(number)) if !number.contains(['.', 'e', 'E']) => Ok(Some(Box::from(*number))),
        Some(Value::Number(_)) => Err(ControlError::BadMember { member: "userId", wanted: "a string or an integer" }),
        _ => text(members, "userId"),
    }
}

fn text(members: &Members<'_>, member: &'static str) -> Result<Option<Box<str>>, ControlError> {
    match members.find(member) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(Box::from(text.as_ref()))),
        Some(_) => Err(ControlError::BadMember { member, wanted: "a string" }),
    }
}

/// A list is kept for as long as its mark, and shared by whoever it is given to.
fn strings(members: &Members<'_>, member: &'static str) -> Result<Option<Arc<[Box<str>]>>, ControlError> {
    let bad = ControlError::BadMember { member, wanted: "an array of strings" };
    let array = match members.find(member) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(array)) => array,
        Some(_) => return Err(bad),
    };
    let strings = elements(array)?.into_iter().map(|element| match element {
        Value::String(text) => Ok(Box::from(text.as_ref())),
        _ => Err(bad),
    });
    strings.collect::<Result<Arc<[_]>, _>>().map(Some)
}

/// A date in seconds, as a token's are.
fn seconds(members: &Members<'_>, member: &'static str) -> Result<Option<WallTime>, ControlError> {
    let bad = ControlError::BadMember { member, wanted: "a date from 1970 to 9999 in seconds" };
    match members.find(member) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => super::jwt::numeric_date(number).map(Some).ok_or(bad),
        Some(_) => Err(bad),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: WallTime = WallTime::from_secs(1_700_000_000);

    fn entry(event: &str, data: &str) -> ControlEntry {
        ControlEntry { event: event.to_owned(), data: data.to_owned(), at_ms: millis(NOW) }
    }

    fn read(event: &str, data: &str) -> Result<Vec<Event>, ControlError> {
        Event::read(&entry(event, data), NOW)
    }

    fn user(issuer: Option<&str>, sub: &str) -> User {
        User { issuer: issuer.map(Box::from), sub: sub.into() }
    }

    fn list(texts: &[&str]) -> Option<Arc<[Box<str>]>> {
        Some(texts.iter().map(|&text| Box::from(text)).collect())
    }

    #[test]
    fn an_api_key_that_is_gone_is_told_by_its_mark_and_nothing_else_is_taken_for_one() {
        let mark = ApiKeyMark::read("dash", "00000000000000ff").expect("a mark");
        let said = ControlEntry::api_keys_changed(Some(&mark), NOW);
        assert_eq!(said.data, r#"{"deleted":{"id":"dash","mark":"00000000000000ff"}}"#);
        assert_eq!((said.is_of_api_keys(), said.deleted_api_key()), (true, Some(mark)));
        assert_eq!(ControlEntry::api_keys_changed(None, NOW).deleted_api_key(), None);
        let of = |data: &str| entry(API_KEYS_CHANGED, data).deleted_api_key();
        for bad in [
            "",
            "[]",
            r#"{"deleted":"dash"}"#,
            r#"{"deleted":{"id":"dash"}}"#,
            r#"{"deleted":{"id":"no id","mark":"00000000000000ff"}}"#,
            r#"{"deleted":{"id":"dash","mark":"ff"}}"#,
            r#"{"deleted":{"id":"dash","mark":"+0000000000000ff"}}"#,
            r#"{"deleted":{"id":"dash","mark":"00000000000000fg"}}"#,
        ] {
            assert_eq!(of(bad), None, "{bad}");
        }
        let long = format!(
            r#"{{"deleted":{{"id":"dash","mark":"00000000000000ff"}},"x":"{}"}}"#,
            "x".repeat(limits::CONTROL_EVENT_BYTES_MAX)
        );
        assert_eq!(of(&long), None);
        let other = entry(USER_LOGGED_OUT, &said.data);
        assert_eq!((other.is_of_api_keys(), other.deleted_api_key()), (false, None));
    }

    #[test]
    fn an_ephemeral_session_that_has_ended_is_told_by_its_place() {
        let place = Place::of(crate::ids::EphemeralId(7));
        let said = ControlEntry::ephemeral_ended(place, NOW);
        assert!(said.is_of_ephemerals() && !said.is_of_streams() && !said.is_of_api_keys() && !said.is_refresh());
        assert_eq!(said.ended_ephemeral(), Some(place));
        for bad in ["", "[]", "{}", r#"{"place":7}"#, r#"{"place":"short"}"#, r#"{"place":"%"}"#] {
            assert_eq!(entry(EPHEMERAL_ENDED, bad).ended_ephemeral(), None, "{bad}");
        }
        assert_eq!(entry(STREAMS_CHANGED, &said.data).ended_ephemeral(), None);
    }

    #[test]
    fn what_is_said_of_streams_names_them() {
        let id = StreamId::new("leads").expect("an id");
        let changed = ControlEntry::stream_changed(&id, NOW);
        assert_eq!((changed.data.as_str(), changed.changed_stream()), (r#"{"id":"leads"}"#, Some(id.clone())));
        assert!(changed.is_of_streams() && !changed.is_refresh() && !changed.is_of_api_keys());
        let (own, other) = (ProcessId(7), ProcessId(8));
        let refresh = ControlEntry::stream_refresh(&id, other, NOW);
        assert!(refresh.is_refresh() && !refresh.is_of_streams());
        assert_eq!(refresh.refreshed_elsewhere(own, NOW), Some(id));
        assert_eq!(refresh.refreshed_elsewhere(other, NOW), None, "it has done so itself");
        assert_eq!(refresh.refreshed_elsewhere(own, NOW + Duration::from_secs(1)), None, "it is no news");
        for bad in ["", "[]", "{}", r#"{"id":7}"#, r#"{"id":"no id"}"#] {
            assert_eq!(entry(STREAMS_CHANGED, bad).changed_stream(), None, "{bad}");
            assert_eq!(entry(STREAM_REFRESH, bad).refreshed_elsewhere(own, NOW), None, "{bad}");
        }
    }

    #[test]
    fn a_logout_names_its_user_in_each_of_its_forms() {
        let of = |sub| Ok(vec![Event::UserLoggedOut { user: user(None, sub), at: NOW }]);
        for data in ["u1", " u1\n", "\"u1\"", r#"{"userId":"u1"}"#, r#"{"userId":"u1","iss":null,"more":[1]}"#] {
            assert_eq!(read(USER_LOGGED_OUT, data), of("u1"), "{data}");
        }
        assert_eq!(read(USER_LOGGED_OUT, "42"), of("42"));
        assert_eq!(read(USER_LOGGED_OUT, r#"{"userId":42}"#), of("42"), "an application may count its users");
        for text in ["[u1]", "null1", "007", "u\"1", "4e2x"] {
            assert_eq!(read(USER_LOGGED_OUT, text), of(text), "what is no JSON is an id as it stands");
        }
        for text in ["1234e56", "4e2", "1.5", "true", "null", "-0"] {
            assert_eq!(read(USER_LOGGED_OUT, text), of(text), "an id that is JSON by chance is the id it spells");
        }
        let of_issuer = Event::UserLoggedOut { user: user(Some("https://a"), "u1"), at: NOW };
        assert_eq!(read(USER_LOGGED_OUT, r#"{"iss":"https://a","userId":"u1"}"#), Ok(vec![of_issuer]));
    }

    #[test]
    fn a_logout_names_a_session_or_both() {
        let session = SessionMark::of(b"s1");
        let ended = Event::SessionLoggedOut { session, at: NOW };
        assert_eq!(read(USER_LOGGED_OUT, r#"{"sessionId":"s1"}"#), Ok(vec![ended.clone()]));
        let both = vec![Event::UserLoggedOut { user: user(None, "u1"), at: NOW }, ended];
        assert_eq!(read(USER_LOGGED_OUT, r#"{"sessionId":"s1","userId":"u1"}"#), Ok(both));
        assert_ne!(session, SessionMark::of(b"s2"));
    }

    #[test]
    fn a_revocation_names_a_token_or_a_time() {
        let token = TokenMark::of("t1");
        let revoked = |expires| Event::TokenRevoked { issuer: None, token, expires, at: NOW };
        assert_eq!(read(TOKEN_REVOKED, r#"{"jti":"t1"}"#), Ok(vec![revoked(None)]));
        let expires = Some(WallTime::from_secs(1_700_000_900));
        assert_eq!(read(TOKEN_REVOKED, r#"{"jti":"t1","exp":1700000900}"#), Ok(vec![revoked(expires)]));
        let before =
            Event::IssuedBeforeRevoked { user: user(Some("a"), "u1"), before: WallTime::from_secs(9), at: NOW };
        assert_eq!(read(TOKEN_REVOKED, r#"{"userId":"u1","iat_before":9,"iss":"a"}"#), Ok(vec![before]));
    }

    #[test]
    fn permissions_are_dated_by_their_publisher_or_by_their_receipt() {
        let changed = |permissions, roles, at| {
            Ok(vec![Event::PermissionsChanged { user: user(None, "u1"), permissions, roles, at }])
        };
        let told = read(PERMISSION_UPDATE, r#"{"userId":"u1","permissions":["a","b"],"roles":[],"at":1699999999999}"#);
        let at = WallTime::from_micros(1_699_999_999_999_000);
        assert_eq!(told, changed(list(&["a", "b"]), list(&[]), at));
        assert_eq!(read(PERMISSION_UPDATE, r#"{"userId":"u1","roles":["r"]}"#), changed(None, list(&["r"]), NOW));
        let ahead = read(PERMISSION_UPDATE, r#"{"userId":"u1","roles":["r"],"at":1800000000000}"#);
        assert_eq!(ahead, changed(None, list(&["r"]), NOW + AHEAD_MAX), "nobody is dated far ahead");
        let again = entry(PERMISSION_UPDATE, r#"{"userId":"u1","roles":["r"],"at":1800000000000}"#);
        let again = Event::read(&again, NOW + AHEAD_MAX * 100);
        assert_eq!(again, changed(None, list(&["r"]), NOW + AHEAD_MAX), "nor later whenever it is read again");
    }

    #[test]
    fn what_stands_on_the_stream_is_of_its_own_time_or_of_when_it_was_written() {
        let written = millis(NOW) - 7;
        let said = |at: &str| said_ms(Some(at.as_bytes()), written, NOW);
        assert_eq!(said_ms(None, written, NOW), written);
        assert_eq!((said("17"), said("0017"), said("1699999999123.456")), (17, 17, 1_699_999_999_123));
        let ahead = millis(NOW + AHEAD_MAX);
        assert_eq!(said(&ahead.to_string()), ahead, "a clock may be ahead");
        assert_eq!(said(&(ahead + 1).to_string()), written);
        for bad in
            ["1700000000000000", "99999999999999999999", "", "soon", "-5", "+5", "1.", ".5", "1e3", "1.5.5", " 5"]
        {
            assert_eq!(said(bad), written, "{bad}");
        }
        assert_eq!(said_ms(Some(b"\xff"), written, NOW), written);
    }

    #[test]
    fn what_says_nothing_is_an_error_that_shows_nothing() {
        let cases = [
            ("user-logged-in", "u1", "there is no event of that name"),
            (USER_LOGGED_OUT, "", "it has neither a user id nor an object"),
            (USER_LOGGED_OUT, " \n", "it has neither a user id nor an object"),
            (USER_LOGGED_OUT, "hush\u{0}hush", "its user id is not text without control characters"),
            (USER_LOGGED_OUT, "{}", "it has neither userId nor sessionId"),
            (USER_LOGGED_OUT, r#"{"userId":["hush"]}"#, "its userId is not a string"),
            (USER_LOGGED_OUT, r#"{"userId":1.5}"#, "its userId is not a string or an integer"),
            (USER_LOGGED_OUT, r#"{"userId":"hush","userId":"u2"}"#, "it has a member twice"),
            (USER_LOGGED_OUT, r#"{"userId":"hush"#, "it is not JSON"),
            (USER_LOGGED_OUT, r#"["hush"]"#, "it is an array"),
            (PERMISSION_UPDATE, r#"{"permissions":["hush"]}"#, "it has neither userId nor anybody else"),
            (PERMISSION_UPDATE, r#"{"userId":"hush"}"#, "it has neither permissions nor roles"),
            (PERMISSION_UPDATE, r#"{"userId":"u","roles":"hush"}"#, "its roles is not an array of strings"),
            (PERMISSION_UPDATE, r#"{"userId":"u","roles":["hush",1]}"#, "its roles is not an array of strings"),
            (PERMISSION_UPDATE, r#"{"userId":"u","roles":[],"at":-1}"#, "its at is not a date in milliseconds"),
            (
                PERMISSION_UPDATE,
                r#"{"userId":"u","roles":[],"at":1700000000000000}"#,
                "its at is not a date in milliseconds",
            ),
            (PERMISSION_UPDATE, r#"{"userId":"u","roles":[],"at":"x"}"#, "its at is not a number of milliseconds"),
            (PERMISSION_UPDATE, "hush", "it is not JSON"),
            (TOKEN_REVOKED, r#"{"userId":"hush"}"#, "it has neither jti nor iat_before"),
            (TOKEN_REVOKED, r#"{"iat_before":9}"#, "it has neither userId nor anybody else"),
            (TOKEN_REVOKED, r#"{"jti":7}"#, "its jti is not a string"),
            (
                TOKEN_REVOKED,
                r#"{"jti":"t","exp":1700000000000000}"#,
                "its exp is not a date from 1970 to 9999 in seconds",
            ),
            (TOKEN_REVOKED, "[1]", "it is not a JSON object"),
        ];
        for (event, data, said) in cases {
            let error = read(event, data).expect_err(data);
            assert_eq!(error.to_string(), said, "{data}");
            assert!(!format!("{error:?}").contains("hush"));
        }
    }

    #[test]
    fn an_event_is_read_up_to_its_bound() {
        let of = |bytes: usize| read(USER_LOGGED_OUT, &"u".repeat(bytes));
        assert!(of(limits::CONTROL_EVENT_BYTES_MAX).is_ok());
        let bytes = limits::CONTROL_EVENT_BYTES_MAX + 1;
        assert_eq!(of(bytes), Err(ControlError::TooLarge { bytes }));
    }

    #[test]
    fn what_the_admin_api_writes_is_read_as_it_was_meant() {
        let read = |entry: &ControlEntry| Event::read(entry, NOW).unwrap();
        let out = ControlEntry::user_logged_out("a\"b", None, NOW);
        assert_eq!(read(&out), [Event::UserLoggedOut { user: user(None, "a\"b"), at: NOW }]);
        let changed =
            ControlEntry::permissions_changed("u", Some("i"), Some(vec!["p".into()]), None, NOW + AHEAD_MAX * 3);
        let at = NOW + AHEAD_MAX;
        let expected =
            Event::PermissionsChanged { user: user(Some("i"), "u"), permissions: list(&["p"]), roles: None, at };
        assert_eq!(read(&changed), [expected]);
        let revoked = ControlEntry::token_revoked("t", Some(5), None, NOW);
        let token = TokenMark::of("t");
        let expires = Some(WallTime::from_secs(5));
        assert_eq!(read(&revoked), [Event::TokenRevoked { issuer: None, token, expires, at: NOW }]);
        let before = ControlEntry::issued_before_revoked("u", 7, Some("i"), NOW);
        let expected =
            Event::IssuedBeforeRevoked { user: user(Some("i"), "u"), before: WallTime::from_secs(7), at: NOW };
        assert_eq!(read(&before), [expected]);
    }
}
