//! Sessions of an application that keeps them in Redis as express-session and connect-redis do: the cookie that names one,
//! and the record that says whose it is.
//!
//! Source: protocol version 1, section 2 («Session»); cookie-signature 1 for the cookie (`s:` + id + `.` + unpadded base64 of
//! HMAC-SHA256), express-session 1 for `cookie` in the record, RFC 6901 for pointers.
//! Memory: what is returned; a record is bounded by [`SESSION_RECORD_BYTES_MAX`], what is kept of it by what it says.
//! Errors: [`CookieError`], the caller's fault; [`RecordError`], the application's. Not here: Redis (`runtime`), when a record
//! is read (`shard`).

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use ring::{digest, hmac};

use super::grant::{ClaimValue, Rights};
use super::members::{Members, MembersError, Value, elements};
use crate::limits::{SESSION_ID_BYTES_MAX, SESSION_LISTED_MAX, SESSION_RECORD_BYTES_MAX, SESSION_TEXT_BYTES_MAX};
use crate::secret::Secret;
use crate::time::WallTime;
use crate::time::iso::iso_date;

/// `[auth.session]`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Secrets that cookies may be signed with: all verify.
    pub secrets: CookieSecrets,
    /// Name of the cookie.
    pub cookie: String,
    /// What stands before the session id in the name of its record.
    pub prefix: String,
    /// Where the user id stands, a string or an integer.
    pub user: Place,
    /// Where the role stands, a string or an array of them.
    pub role: Place,
    /// Where the company stands, which templates know as `companyId`.
    pub company: Place,
    /// Where the permissions stand, an array of strings.
    pub permissions: Place,
    /// How often the record of a live session is read again.
    pub reread: Duration,
    /// How long live sessions outlast a Redis that does not answer.
    pub grace: Duration,
    /// Whether the life of a session is extended while one of its connections is open.
    pub touch: bool,
}

/// The secrets that session cookies are signed with, ready to verify. Cloning shares them.
#[derive(Clone)]
pub struct CookieSecrets(Arc<[hmac::Key]>);

impl CookieSecrets {
    /// All of these verify, as with several secrets of express-session.
    pub fn new(secrets: &[Secret]) -> CookieSecrets {
        CookieSecrets(secrets.iter().map(|secret| hmac::Key::new(hmac::HMAC_SHA256, secret.expose_secret())).collect())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The id of the session that a cookie names: `value` is the cookie's, its escapes undone. What the time taken depends on
    /// is how long the cookie is and how many secrets there are.
    ///
    /// Errors: what is wrong with it.
    pub fn session_id(&self, value: &[u8]) -> Result<Secret, CookieError> {
        let signed = value.strip_prefix(b"s:").ok_or(CookieError::NotSigned)?;
        // cookie-signature takes the last dot: an id may have some.
        let dot = signed.iter().rposition(|&byte| byte == b'.').ok_or(CookieError::NotSigned)?;
        let (id, signature) = (signed.get(..dot).unwrap_or_default(), signed.get(dot + 1..).unwrap_or_default());
        if id.is_empty() || id.len() > SESSION_ID_BYTES_MAX {
            return Err(CookieError::BadId);
        }
        let signature = STANDARD_NO_PAD.decode(signature).map_err(|_| CookieError::BadSignature)?;
        // Each is tried, whichever fits.
        let verifies = |good: bool, key: &hmac::Key| hmac::verify(key, id, &signature).is_ok() | good;
        if self.0.iter().fold(false, verifies) { Ok(Secret::new(id)) } else { Err(CookieError::BadSignature) }
    }

    /// The cookie that names the session `id`, signed with the first secret as express-session does, its escapes not made;
    /// `None` where there is no secret.
    pub fn cookie(&self, id: &str) -> Option<String> {
        let tag = hmac::sign(self.0.first()?, id.as_bytes());
        Some(format!("s:{id}.{}", STANDARD_NO_PAD.encode(tag)))
    }
}

impl fmt::Debug for CookieSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|_| "***")).finish()
    }
}

/// Why a cookie names no session.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CookieError {
    /// It is not `s:`, an id, a dot and a signature.
    #[error("the session's cookie is not a signed one")]
    NotSigned,
    /// The id is empty or too long.
    #[error("the id in the session's cookie has not 1 to {SESSION_ID_BYTES_MAX} bytes")]
    BadId,
    /// Not signed with a secret that is known.
    #[error("the session's cookie is not signed with a secret of this server")]
    BadSignature,
}

impl CookieError {
    /// A word for programs.
    pub const fn reason(self) -> &'static str {
        match self {
            CookieError::NotSigned => "cookie_not_signed",
            CookieError::BadId => "bad_session_id",
            CookieError::BadSignature => "bad_signature",
        }
    }
}

/// A session's id, hashed: enough to find its connections, and not the credential that the id is.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SessionMark([u8; 16]);

impl SessionMark {
    /// The mark of the session with this id.
    pub fn of(sid: &[u8]) -> SessionMark {
        let hash = digest::digest(&digest::SHA256, sid);
        SessionMark(hash.as_ref().first_chunk().copied().unwrap_or_default())
    }

    /// Its bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A place in a record, as a JSON pointer names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Place {
    text: Box<str>,
    tokens: Box<[Box<str>]>,
}

impl Place {
    /// The place that the pointer spelled `text` names; `tokens` are its parts, their escapes undone.
    pub fn new(text: &str, tokens: &[String]) -> Place {
        Place { text: text.into(), tokens: tokens.iter().map(|token| token.as_str().into()).collect() }
    }

    /// The pointer.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// What stands there; `None`: nothing.
    fn find<'a>(&self, record: &Members<'a>) -> Result<Option<Value<'a>>, MembersError> {
        let Some((first, rest)) = self.tokens.split_first() else { return Ok(None) };
        let mut found = record.find(first).cloned();
        for token in rest {
            found = match found {
                Some(Value::Object(text)) => Members::read(text.as_bytes())?.find(token).cloned(),
                Some(Value::Array(text)) => {
                    let canonical = &**token == "0" || !token.starts_with('0');
                    let place = token.parse::<usize>().ok().filter(|_| canonical && !token.starts_with('+'));
                    place
                        .and_then(|place| elements(text).map(|all| all.into_iter().nth(place)).transpose())
                        .transpose()?
                }
                _ => return Ok(None),
            };
        }
        Ok(found)
    }
}

/// What a record says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Record {
    /// The user id, an integer as it is spelled. Never empty.
    pub user: Box<str>,
    /// Roles, permissions, and the claims that templates name.
    pub rights: Rights,
    /// `cookie.expires`; `None`: the record sets no end of its own.
    pub expires: Option<WallTime>,
    /// `cookie.originalMaxAge`: how long the application lets a session live that nobody uses.
    pub max_age: Option<Duration>,
}

/// Why a record is no session. Holds nothing of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RecordError {
    /// Over its bound.
    #[error("the session's record is over {SESSION_RECORD_BYTES_MAX} bytes")]
    TooLarge,
    /// Not a JSON object.
    #[error("the session's record cannot be read: {0}")]
    NotAnObject(#[from] MembersError),
    /// Nobody is signed in.
    #[error("nobody is signed in under the session")]
    NoUser,
    /// Something is not of its type, or too long.
    #[error("the session's record has something else than {wanted} for {what}")]
    Unfit {
        /// What it is for.
        what: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
}

impl Record {
    /// The record whose text is `text`. Of its top-level members those in `template_claims` are kept, with `companyId`.
    ///
    /// Errors: the first rule it breaks.
    pub fn parse(text: &[u8], options: &Options, template_claims: &[String]) -> Result<Record, RecordError> {
        if text.len() > SESSION_RECORD_BYTES_MAX {
            return Err(RecordError::TooLarge);
        }
        let record = Members::read(text)?;
        let user = match options.user.find(&record)? {
            Some(Value::String(user)) => user,
            Some(Value::Number(number)) if is_integer(number) => Cow::Borrowed(number),
            None | Some(Value::Null | Value::Bool) => return Err(RecordError::NoUser),
            Some(_) => return Err(RecordError::Unfit { what: "the user", wanted: "a string or an integer" }),
        };
        if user.is_empty() {
            return Err(RecordError::NoUser);
        }
        let user = short(&user, "the user")?;
        let roles = match options.role.find(&record)? {
            Some(Value::String(role)) => Box::from([short(&role, "the role")?]),
            found => texts(found, "the role", "a string or an array of strings")?,
        };
        let permissions = texts(options.permissions.find(&record)?, "the permissions", "an array of strings")?;
        let (expires, max_age) = cookie(&record)?;
        let company = options.company.find(&record)?.filter(|value| *value != Value::Null);
        let rights =
            Rights { roles, permissions, claims: claims(record, company, template_claims), ..Rights::default() };
        Ok(Record { user, rights, expires, max_age })
    }

    /// When the session ends: the sooner of what the record says and what Redis does, whose key was seen at `seen` to live
    /// for `ttl` more; `None`: neither sets an end. `touch`: touching moves the key's life and leaves the record as the
    /// application has last saved it, which says nothing then; what is not touched ends by the record as well.
    pub fn ends(&self, seen: WallTime, ttl: Option<Duration>, touch: bool) -> Option<WallTime> {
        match ttl.map(|ttl| seen + ttl) {
            Some(ends) if touch && self.slides() => Some(ends),
            ends => [self.expires, ends].into_iter().flatten().min(),
        }
    }

    /// How long a session lives from now on that is touched, whose key has been seen to live for `ttl` more; `None`: it is
    /// not touched. A key that has no end is given none, and what would take of a life is no touch.
    pub fn touched_life(&self, ttl: Option<Duration>) -> Option<Duration> {
        let life = self.max_age.unwrap_or(TOUCH_LIFE);
        ttl.filter(|ttl| self.slides() && *ttl < life).map(|_| life)
    }

    /// Whether its end may be moved: one that the record sets without an age is fixed.
    fn slides(&self) -> bool {
        self.max_age.is_some() || self.expires.is_none()
    }
}

/// What express-session keeps of the cookie: its end and its age.
fn cookie(record: &Members<'_>) -> Result<(Option<WallTime>, Option<Duration>), RecordError> {
    let Some(Value::Object(text)) = record.find("cookie") else { return Ok((None, None)) };
    let cookie = Members::read(text.as_bytes())?;
    let unfit = RecordError::Unfit { what: "cookie.expires", wanted: "a date as JSON.stringify writes it" };
    let expires = match cookie.find("expires") {
        // express-session's own ways of saying that the browser decides.
        None | Some(Value::Null | Value::Bool) => None,
        Some(Value::String(date)) => Some(iso_date(date).ok_or(unfit)?),
        Some(_) => return Err(unfit),
    };
    let max_age = match cookie.find("originalMaxAge") {
        Some(Value::Number(number)) => milliseconds(number),
        _ => None,
    };
    Ok((expires, max_age))
}

/// So many milliseconds, of which an application that has reckoned with fractions may write a part; `None`: not one.
fn milliseconds(number: &str) -> Option<Duration> {
    let ms: f64 = number.parse().ok()?;
    let life = Duration::try_from_secs_f64(ms.trunc() / 1_000.0).ok()?;
    (life >= Duration::from_millis(1)).then_some(life)
}

/// What templates may be filled with: sorted by name, as [`Rights`] wants it.
fn claims(
    record: Members<'_>,
    company: Option<Value<'_>>,
    template_claims: &[String],
) -> Box<[(Box<str>, ClaimValue)]> {
    let named = |name: &str| template_claims.iter().any(|wanted| wanted == name);
    let mut claims: Vec<(Box<str>, ClaimValue)> = Vec::new();
    for (name, value) in record.into_sorted() {
        let configured = company.is_some() && &*name == COMPANY_CLAIM;
        if named(&name) && !configured {
            claims.push((Box::from(&*name), claim_value(value)));
        }
    }
    if let Some(company) = company.filter(|_| named(COMPANY_CLAIM)) {
        claims.push((Box::from(COMPANY_CLAIM), claim_value(company)));
        claims.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    }
    claims.into_boxed_slice()
}

/// How long touching lets a session live whose record names no age: connect-redis's own default.
const TOUCH_LIFE: Duration = Duration::from_secs(86_400);

/// The claim that the configured company fills.
const COMPANY_CLAIM: &str = "companyId";

fn claim_value(value: Value<'_>) -> ClaimValue {
    match value {
        Value::String(text) if text.len() <= SESSION_TEXT_BYTES_MAX => ClaimValue::Text(Box::from(&*text)),
        Value::Number(number) if is_integer(number) => ClaimValue::Integer(Box::from(number)),
        _ => ClaimValue::Other,
    }
}

fn is_integer(number: &str) -> bool {
    number.len() <= SESSION_TEXT_BYTES_MAX && !number.contains(['.', 'e', 'E'])
}

fn short(text: &str, what: &'static str) -> Result<Box<str>, RecordError> {
    if text.len() > SESSION_TEXT_BYTES_MAX {
        return Err(RecordError::Unfit { what, wanted: "a short text" });
    }
    Ok(Box::from(text))
}

/// The strings of an array, where there is one.
fn texts(found: Option<Value<'_>>, what: &'static str, wanted: &'static str) -> Result<Box<[Box<str>]>, RecordError> {
    let unfit = RecordError::Unfit { what, wanted };
    let array = match found {
        None | Some(Value::Null) => return Ok(Box::default()),
        Some(Value::Array(array)) => array,
        Some(_) => return Err(unfit),
    };
    let all = elements(array)?;
    if all.len() > SESSION_LISTED_MAX {
        return Err(unfit);
    }
    let text = |element| match element {
        Value::String(text) => short(&text, what),
        _ => Err(unfit),
    };
    all.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn secrets(list: &[&str]) -> CookieSecrets {
        CookieSecrets::new(&list.iter().map(|text| Secret::new(*text)).collect::<Vec<_>>())
    }

    fn place(text: &str) -> Place {
        let tokens: Vec<String> = text.split('/').skip(1).map(str::to_owned).collect();
        Place::new(text, &tokens)
    }

    fn options() -> Options {
        Options {
            secrets: secrets(&["keyboard cat"]),
            cookie: "connect.sid".into(),
            prefix: "sess:".into(),
            user: place("/userId"),
            role: place("/userRole"),
            company: place("/companyId"),
            permissions: place("/permissions"),
            reread: Duration::from_secs(30),
            grace: Duration::from_secs(300),
            touch: false,
        }
    }

    fn parse(text: &str) -> Result<Record, RecordError> {
        Record::parse(text.as_bytes(), &options(), &["companyId".into(), "region".into(), "deep".into()])
    }

    fn texts_of(list: &[Box<str>]) -> Vec<&str> {
        list.iter().map(|text| &**text).collect()
    }

    #[test]
    fn a_cookie_of_cookie_signature_verifies() {
        // `require("cookie-signature").sign("s3cr3t.id/+", "keyboard cat")` and its like, by cookie-signature 1.0.7.
        let known = "s:hello.YaYtq6kSw9y9I7GsjWNzmzz/AQQhR8gwFNQb0cnmPXI";
        let ours = secrets(&["tobiiscool"]);
        let made = ours.cookie("hello").expect("there is a secret");
        assert_eq!(ours.session_id(made.as_bytes()).map(|id| id == Secret::new("hello")), Ok(true));
        // Of cookie-signature's own README: sign("hello", "tobiiscool").
        assert_eq!(made, "s:hello.DGDUkGlIkCzPz+C0B064FNgHdEjox7ch8tOBGslZ5QI");
        assert_eq!(ours.session_id(known.as_bytes()), Err(CookieError::BadSignature));
    }

    #[test]
    fn each_of_several_secrets_verifies_and_no_other() {
        let (old, new, both) = (secrets(&["old"]), secrets(&["new"]), secrets(&["new", "old"]));
        for one in [&old, &new] {
            let cookie = one.cookie("a.b.c").expect("there is a secret");
            assert_eq!(both.session_id(cookie.as_bytes()), Ok(Secret::new("a.b.c")), "an id may have dots");
        }
        let cookie = old.cookie("a").expect("there is a secret");
        assert_eq!(new.session_id(cookie.as_bytes()), Err(CookieError::BadSignature));
        assert_eq!(secrets(&[]).session_id(cookie.as_bytes()), Err(CookieError::BadSignature));
        assert_eq!((secrets(&[]).is_empty(), both.len(), secrets(&[]).cookie("a")), (true, 2, None));
        assert_eq!(format!("{both:?}"), r#"["***", "***"]"#);
    }

    #[test]
    fn what_is_no_signed_cookie_names_no_session() {
        let ours = secrets(&["keyboard cat"]);
        let good = ours.cookie("abc").expect("there is a secret");
        for bad in ["", "abc", "s:", "s:abc", "j:{}", &good[2..], &good.replace("s:", "S:")] {
            assert_eq!(ours.session_id(bad.as_bytes()), Err(CookieError::NotSigned), "{bad}");
        }
        let of_empty = ours.cookie("").expect("there is a secret");
        assert_eq!(ours.session_id(of_empty.as_bytes()), Err(CookieError::BadId));
        let longest = "x".repeat(SESSION_ID_BYTES_MAX);
        let cookie = ours.cookie(&longest).expect("there is a secret");
        assert_eq!(ours.session_id(cookie.as_bytes()), Ok(Secret::new(longest.clone())));
        let cookie = ours.cookie(&(longest + "x")).expect("there is a secret");
        assert_eq!(ours.session_id(cookie.as_bytes()), Err(CookieError::BadId));
        for bad in [format!("{good}="), format!("{good}A"), format!("{good} "), good.replace("s:abc.", "s:abc.A")] {
            assert_eq!(ours.session_id(bad.as_bytes()), Err(CookieError::BadSignature), "{bad}");
        }
        let reasons = [CookieError::NotSigned, CookieError::BadId, CookieError::BadSignature].map(CookieError::reason);
        assert_eq!(reasons, ["cookie_not_signed", "bad_session_id", "bad_signature"]);
    }

    #[test]
    fn a_record_of_express_session_is_read() {
        let record = parse(
            r#"{"cookie":{"originalMaxAge":86400000,"expires":"2026-11-22T19:21:27.042Z","httpOnly":true,"path":"/"},
                "userId":42,"userRole":"agent","companyId":"c1","permissions":["leads.read","leads.write"],
                "region":"eu","deep":{"a":1},"csrf":"x","n":1.5}"#,
        )
        .expect("a record");
        assert_eq!(&*record.user, "42");
        assert_eq!(texts_of(&record.rights.roles), ["agent"]);
        assert_eq!(texts_of(&record.rights.permissions), ["leads.read", "leads.write"]);
        let claim = |name: &str| record.rights.claims.iter().find(|claim| &*claim.0 == name).map(|claim| &claim.1);
        assert_eq!(claim("companyId"), Some(&ClaimValue::Text("c1".into())));
        assert_eq!(claim("region"), Some(&ClaimValue::Text("eu".into())));
        assert_eq!(claim("deep"), Some(&ClaimValue::Other));
        assert_eq!(claim("csrf"), None, "what no template names is not kept");
        assert!(record.rights.claims.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(record.expires, Some(WallTime::from_micros(1_795_375_287_042_000)));
        assert_eq!(record.max_age, Some(Duration::from_secs(86_400)));
        assert_eq!((record.rights.issuer, record.rights.streams), (None, None));
    }

    #[test]
    fn identity_stands_where_the_pointers_say() {
        let options = Options {
            user: place("/passport/user/id"),
            role: place("/passport/user/roles"),
            company: place("/orgs/1/id"),
            permissions: place("/passport/user/may"),
            ..options()
        };
        let text = r#"{"passport":{"user":{"id":"u1","roles":["a","b"],"may":["x"]}},"orgs":[{"id":1},{"id":77}],
                       "companyId":"its own"}"#;
        let record = Record::parse(text.as_bytes(), &options, &["companyId".into()]).expect("a record");
        assert_eq!((&*record.user, texts_of(&record.rights.roles)), ("u1", vec!["a", "b"]));
        assert_eq!(texts_of(&record.rights.permissions), ["x"]);
        let company: (Box<str>, ClaimValue) = ("companyId".into(), ClaimValue::Integer("77".into()));
        assert_eq!(&*record.rights.claims, [company], "what is configured goes before a member of that name");
        let beyond = Options { company: place("/orgs/2/id"), ..options.clone() };
        let record = Record::parse(text.as_bytes(), &beyond, &["companyId".into()]).expect("a record");
        let own: (Box<str>, ClaimValue) = ("companyId".into(), ClaimValue::Text("its own".into()));
        assert_eq!(&*record.rights.claims, [own]);
        for bad in ["/orgs/01/id", "/orgs/+1/id", "/orgs/-/id", "/passport/user/id/x"] {
            let odd = Options { user: place(bad), ..options.clone() };
            assert_eq!(Record::parse(text.as_bytes(), &odd, &[]), Err(RecordError::NoUser), "{bad}");
        }
        assert_eq!(place("/orgs/1/id").as_str(), "/orgs/1/id");
    }

    #[test]
    fn a_record_without_a_user_is_no_session() {
        for text in [
            "{}",
            r#"{"userId":null}"#,
            r#"{"userId":""}"#,
            r#"{"userId":false}"#,
            r#"{"cookie":{"originalMaxAge":null,"expires":null}}"#,
        ] {
            assert_eq!(parse(text), Err(RecordError::NoUser), "{text}");
        }
    }

    #[test]
    fn what_is_not_of_its_type_is_refused() {
        let unfit = |text: &str| match parse(text) {
            Err(RecordError::Unfit { what, .. }) => what,
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(unfit(r#"{"userId":["u1"]}"#), "the user");
        assert_eq!(unfit(r#"{"userId":{"id":"u1"}}"#), "the user");
        assert_eq!(unfit(r#"{"userId":1.5}"#), "the user");
        assert_eq!(unfit(r#"{"userId":"u1","userRole":7}"#), "the role");
        assert_eq!(unfit(r#"{"userId":"u1","userRole":["a",7]}"#), "the role");
        assert_eq!(unfit(r#"{"userId":"u1","permissions":"all"}"#), "the permissions");
        assert_eq!(unfit(r#"{"userId":"u1","permissions":[null]}"#), "the permissions");
        assert_eq!(unfit(r#"{"userId":"u1","cookie":{"expires":1795375287042}}"#), "cookie.expires");
        assert_eq!(unfit(r#"{"userId":"u1","cookie":{"expires":"tomorrow"}}"#), "cookie.expires");
        for text in ["", "null", "[]", "{", r#"{"userId":"u1","userId":"u2"}"#] {
            assert!(matches!(parse(text), Err(RecordError::NotAnObject(_))), "{text}");
        }
    }

    #[test]
    fn a_record_and_its_texts_are_bounded() {
        let sized = |bytes: usize| {
            let frame = r#"{"userId":"u1","pad":""}"#.len();
            format!(r#"{{"userId":"u1","pad":"{}"}}"#, "x".repeat(bytes - frame))
        };
        assert!(parse(&sized(SESSION_RECORD_BYTES_MAX)).is_ok());
        assert_eq!(parse(&sized(SESSION_RECORD_BYTES_MAX + 1)), Err(RecordError::TooLarge));
        let user = |bytes: usize| parse(&format!(r#"{{"userId":"{}"}}"#, "u".repeat(bytes)));
        assert!(user(SESSION_TEXT_BYTES_MAX).is_ok());
        assert!(matches!(user(SESSION_TEXT_BYTES_MAX + 1), Err(RecordError::Unfit { what: "the user", .. })));
        let listed = |count: usize| {
            let list = vec![r#""p""#; count].join(",");
            parse(&format!(r#"{{"userId":"u1","permissions":[{list}]}}"#))
        };
        assert!(listed(SESSION_LISTED_MAX).is_ok());
        assert!(matches!(listed(SESSION_LISTED_MAX + 1), Err(RecordError::Unfit { what: "the permissions", .. })));
    }

    #[test]
    fn a_session_ends_with_its_key_or_its_cookie_whichever_is_sooner() {
        let at = WallTime::from_secs(1_000);
        let record = |expires: Option<u64>| Record {
            user: "u1".into(),
            rights: Rights::default(),
            expires: expires.map(WallTime::from_secs),
            max_age: None,
        };
        let ends = |expires, ttl: Option<u64>| record(expires).ends(at, ttl.map(Duration::from_secs), false);
        assert_eq!(ends(Some(1_500), Some(100)), Some(WallTime::from_secs(1_100)));
        assert_eq!(ends(Some(1_050), Some(100)), Some(WallTime::from_secs(1_050)));
        assert_eq!(ends(None, Some(100)), Some(WallTime::from_secs(1_100)));
        assert_eq!(ends(Some(1_050), None), Some(WallTime::from_secs(1_050)));
        assert_eq!(ends(None, None), None);
    }

    #[test]
    fn an_age_is_told_in_milliseconds_and_parts_of_them() {
        let aged = |age: &str| {
            let text = format!(r#"{{"userId":"u1","cookie":{{"originalMaxAge":{age},"expires":null}}}}"#);
            parse(&text).expect("a record").max_age
        };
        // `maxAge: 1.1 * 60 * 1000` and its like.
        assert_eq!(aged("66000.00000000001"), Some(Duration::from_millis(66_000)));
        assert_eq!(aged("5e3"), Some(Duration::from_secs(5)));
        for none in ["null", "0", "-5", "0.5", "1e300", "\"5000\""] {
            assert_eq!(aged(none), None, "{none}");
        }
    }

    #[test]
    fn a_session_that_is_touched_ends_with_its_key_and_by_its_cookie_where_the_key_has_no_end() {
        let at = WallTime::from_secs(1_795_375_000);
        let text = br#"{"userId":"u1","cookie":{"expires":"2026-11-22T19:21:27Z","originalMaxAge":5000}}"#;
        let touched = Options { touch: true, ..options() };
        let record = Record::parse(text, &touched, &[]).expect("a record");
        let by_cookie = Some(WallTime::from_secs(1_795_375_287));
        assert_eq!((record.expires, record.max_age), (by_cookie, Some(Duration::from_secs(5))));
        assert_eq!(record.ends(at, Some(Duration::from_secs(900)), true), Some(at + Duration::from_secs(900)));
        assert_eq!(record.ends(at, None, true), by_cookie);
        assert_eq!(Record { expires: None, ..record }.ends(at, None, true), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in r#"\{"(userId|cookie|permissions)":[ \[\]{}:,"\\a0-9.eE+-]{0,24}\}"#) {
            let _ = parse(&text);
        }

        #[test]
        fn an_id_that_was_signed_is_read_back(id in "[ -~]{1,64}", secret in ".{1,32}") {
            let ours = CookieSecrets::new(&[Secret::new(secret)]);
            let cookie = ours.cookie(&id).unwrap();
            prop_assert_eq!(ours.session_id(cookie.as_bytes()), Ok(Secret::new(id)));
        }

        #[test]
        fn no_other_cookie_verifies(cookie in r"s:[a-z.]{1,8}\.[A-Za-z0-9+/]{43}") {
            prop_assert!(options().secrets.session_id(cookie.as_bytes()).is_err());
        }
    }
}
