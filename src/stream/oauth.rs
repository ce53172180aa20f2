//! Tokens for upstreams that speak OAuth 2.0: when one is got, kept, got anew, and what is asked for it.
//!
//! A [`Renewal`] keeps the times of one credential, however many streams and cores use it; the shell carries out what it
//! begins, and tells how that ended. Nothing is begun unless somebody asks: a credential that nobody polls with is not
//! renewed.
//!
//! Source: RFC 6749 sections 2.3.1 (client authentication), 4.4 (client credentials), 5 (answers) and 6 (refresh), RFC 6750;
//! «Exponential Backoff And Jitter» (AWS Architecture Blog, 2015). Time and chance are arguments.
//! Memory: a token and a few words a credential. Errors: [`Why`]; none holds what an endpoint wrote.
//! Not here: HTTP, who waits (`runtime::oauth`), how a token stands in a request (`credential`).

use std::hash::{Hash, Hasher};
use std::time::Duration;

use url::Url;
use url::form_urlencoded::byte_serialize;

use super::CaFile;
use super::live::{self, ClientIdentity, Live};
use super::poll::UpstreamCode;
use crate::codec::json::{Document, Kind, Node};
use crate::limits::{
    OAUTH_LIFE_MAX, OAUTH_LIFE_MIN, OAUTH_RETRY_MAX, OAUTH_RETRY_MIN, OAUTH_SPACING, OAUTH_TOKEN_BYTES_MAX,
    RETRY_AFTER_MAX,
};
use crate::secret::Secret;
use crate::time::Instant;

/// `[stream.auth]` with `kind = "oauth2"`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Options {
    /// How a token is got.
    pub grant: Grant,
    /// Where: `https`, or `http` on this machine.
    pub token_url: Url,
    /// Who asks.
    pub client_id: Live,
    /// What proves it; `None`: a public client.
    pub client_secret: Option<Live>,
    /// Where these stand in the request.
    pub client_auth: ClientAuth,
    /// What the token is to be good for.
    pub scope: Option<String>,
    /// Whom the token is to be shown to, where the endpoint wants that.
    pub audience: Option<String>,
    /// Further parameters, in their order; each may be a secret of the endpoint's.
    pub params: Vec<(String, Live)>,
    /// Roots to trust instead of the system's.
    pub ca: Option<CaFile>,
    /// What is shown to an endpoint that asks for a client certificate.
    pub identity: Option<ClientIdentity>,
}

/// How a token is got.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Grant {
    /// RFC 6749 section 4.4.
    ClientCredentials,
    /// RFC 6749 section 6, beginning with this refresh token. The endpoint may give another one with each answer.
    RefreshToken(Live),
}

/// How a client shows who it is (RFC 6749 section 2.3.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ClientAuth {
    /// `Authorization: Basic`.
    Basic,
    /// In the request's body.
    Post,
}

impl Options {
    /// The secrets that it is made of.
    pub fn values(&self) -> Vec<&Live> {
        let refresh = match &self.grant {
            Grant::RefreshToken(token) => Some(token),
            Grant::ClientCredentials => None,
        };
        let own = [Some(&self.client_id), self.client_secret.as_ref(), refresh];
        own.into_iter().flatten().chain(self.params.iter().map(|(_, value)| value)).collect()
    }

    /// The configured refresh token as it is now.
    pub fn refresh_token(&self) -> Option<Secret> {
        match &self.grant {
            Grant::RefreshToken(token) => Some(token.value()),
            Grant::ClientCredentials => None,
        }
    }

    /// What is asked for a token, by this refresh token where the grant is one.
    pub fn request(&self, refresh_token: Option<&Secret>) -> TokenRequest {
        let mut form = Form(Vec::new());
        match refresh_token {
            Some(token) => {
                form.pair("grant_type", b"refresh_token");
                form.pair("refresh_token", token.expose_secret());
            }
            None => form.pair("grant_type", b"client_credentials"),
        }
        if let Some(scope) = &self.scope {
            form.pair("scope", scope.as_bytes());
        }
        if let Some(audience) = &self.audience {
            form.pair("audience", audience.as_bytes());
        }
        for (name, value) in &self.params {
            form.pair(name, value.value().expose_secret());
        }
        let mut authorization = None;
        let id = self.client_id.value();
        match (&self.client_secret, self.client_auth) {
            (Some(secret), ClientAuth::Basic) => {
                // Both are form-encoded before they are joined by a colon, and that is encoded in base64.
                let encoded = |secret: &Secret| Secret::new(encoded(secret.expose_secret()).into_bytes());
                let pair = live::basic(&encoded(&id), &encoded(&secret.value()));
                authorization = Some(Secret::new([b"Basic ", &pair[..]].concat()));
            }
            (Some(secret), ClientAuth::Post) => {
                form.pair("client_id", id.expose_secret());
                form.pair("client_secret", secret.value().expose_secret());
            }
            // RFC 6749 section 3.2.1: who has no secret says at least who it is.
            (None, _) => form.pair("client_id", id.expose_secret()),
        }
        TokenRequest { authorization, body: Secret::new(form.0) }
    }
}

impl Hash for Options {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.token_url.hash(state);
        self.scope.hash(state);
        self.values().hash(state);
    }
}

/// The parameters that a request is made of, which `params` may not name.
pub const OWN_PARAMS: [&str; 6] = ["grant_type", "refresh_token", "scope", "audience", "client_id", "client_secret"];

/// What is sent to a token endpoint. `Debug` shows nothing of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TokenRequest {
    /// The value of `Authorization`, if there is one.
    pub authorization: Option<Secret>,
    /// The body, `application/x-www-form-urlencoded`.
    pub body: Secret,
}

struct Form(Vec<u8>);

impl Form {
    fn pair(&mut self, name: &str, value: &[u8]) {
        if !self.0.is_empty() {
            self.0.push(b'&');
        }
        self.0.extend_from_slice(encoded(name.as_bytes()).as_bytes());
        self.0.push(b'=');
        self.0.extend_from_slice(encoded(value).as_bytes());
    }
}

fn encoded(bytes: &[u8]) -> String {
    byte_serialize(bytes).collect()
}

/// What a token endpoint has granted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Granted {
    /// The token.
    pub access_token: Secret,
    /// How long it is good, from when it was asked for; `None`: until an upstream refuses it.
    pub life: Option<Duration>,
    /// The refresh token that is good from now on, where there is another one.
    pub refresh_token: Option<Secret>,
}

/// Why there is no token. For the operator's log; nothing an endpoint wrote stands in it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Why {
    /// The endpoint cannot be reached, or does not answer as HTTP.
    #[error("the token endpoint gives no answer: {code}: {detail}", code = code.as_str())]
    Unanswered {
        /// What kind of failure.
        code: UpstreamCode,
        /// What happened.
        detail: String,
    },
    /// It refuses the credential itself.
    #[error("the token endpoint answers {status} {error}")]
    Refused {
        /// The status.
        status: u16,
        /// RFC 6749 section 5.2, as far as it is one of its words.
        error: &'static str,
    },
    /// Any other status.
    #[error("the token endpoint answers {status}")]
    Status {
        /// The status.
        status: u16,
    },
    /// An answer that is none.
    #[error("the token endpoint's answer {what}")]
    Malformed {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The upstream refuses a token that was got a moment ago.
    #[error("the upstream refuses a token that was got a moment ago")]
    TooSoon,
    /// It has not come in time for this poll, which goes on without.
    #[error("the token has not come in time")]
    Slow,
    /// Our own fault.
    #[error("a fault of the server ended the request for a token")]
    Fault,
}

impl Why {
    /// Whether another refresh token may do what this one did not.
    pub fn is_of_refresh_token(&self) -> bool {
        matches!(self, Why::Refused { error: "invalid_grant", .. })
    }
}

/// The errors of RFC 6749 section 5.2, and two that endpoints borrow from section 4.1.2.1.
const ERRORS: [&str; 8] = [
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
    "server_error",
    "temporarily_unavailable",
];

/// Reads what a token endpoint has answered.
///
/// # Errors
/// [`Why`].
pub fn read(status: u16, body: &[u8]) -> Result<Granted, Why> {
    if status != 200 {
        let answer = Document::parse(body).ok();
        let error = answer.as_ref().and_then(|answer| {
            let error = answer.root().member("error")?.unescaped();
            ERRORS.into_iter().find(|known| known.as_bytes() == &*error)
        });
        return Err(match (status, error) {
            (400..=499, Some(error)) => Why::Refused { status, error },
            _ => Why::Status { status },
        });
    }
    let malformed = |what| Why::Malformed { what };
    // A member that stands there twice is refused: who knows which is meant.
    let answer = Document::parse(body).map_err(|_| malformed("is no JSON"))?;
    let answer = answer.root();
    if answer.kind() != Kind::Object {
        return Err(malformed("is no JSON object"));
    }
    let text_of = |name| answer.member(name).filter(|value| value.kind() == Kind::String).map(Node::unescaped);
    // RFC 6749 section 7.1: a client must not use a token of a type that it does not understand.
    match text_of("token_type") {
        Some(kind) if kind.eq_ignore_ascii_case(b"bearer") => {}
        Some(_) => return Err(malformed("has a token_type other than bearer")),
        None => return Err(malformed("has no token_type")),
    }
    let fits = |token: &[u8]| !token.is_empty() && token.len() <= OAUTH_TOKEN_BYTES_MAX;
    let access_token = match text_of("access_token") {
        // RFC 6750 section 2.1 has fewer characters; what matters is that it is one word of a header.
        Some(token) if fits(&token) && token.iter().all(u8::is_ascii_graphic) => Secret::new(&*token),
        Some(_) => return Err(malformed("has an access_token that no header can carry")),
        None => return Err(malformed("has no access_token")),
    };
    let refresh_token = match answer.member("refresh_token").map(|value| (value.kind(), value.unescaped())) {
        None | Some((Kind::Null, _)) => None,
        Some((Kind::String, token)) if token.is_empty() => None,
        // RFC 6749 appendix A.17.
        Some((Kind::String, token)) if fits(&token) && token.iter().all(|b| (0x20..=0x7e).contains(b)) => {
            Some(Secret::new(&*token))
        }
        Some(_) => return Err(malformed("has a refresh_token that is none")),
    };
    // What is no time from now says nothing: the token is good all the same.
    let life = answer.member("expires_in").and_then(seconds).map(Duration::from_secs);
    Ok(Granted { access_token, life, refresh_token })
}

/// A number of seconds, or the text of one, as some write it; fractions are cut.
fn seconds(value: Node<'_>) -> Option<u64> {
    let text = match value.kind() {
        Kind::Number | Kind::String => value.unescaped(),
        _ => return None,
    };
    let text = str::from_utf8(&text).ok().filter(|text| text.starts_with(|first: char| first.is_ascii_digit()))?;
    let seconds: f64 = text.parse().ok().filter(|seconds: &f64| seconds.is_finite())?;
    // A cast ends at the greatest; past a year nobody looks at it.
    Some(seconds as u64)
}

/// The refresh tokens that are worth a try, in their order. `stored` is the one that an endpoint gave last, with the mark of
/// the configured one that it goes back to; `configured` the one of the configuration, with its mark.
pub fn candidates<M: PartialEq>(stored: Option<(Secret, M)>, configured: (Secret, M)) -> Vec<Secret> {
    let (token, mark) = configured;
    match stored {
        None => vec![token],
        Some((stored, _)) if stored == token => vec![token],
        // The operator has put in another one since: whoever it was given to is who is meant now.
        Some((stored, of)) if of != mark => vec![token, stored],
        Some((stored, _)) => vec![stored, token],
    }
}

/// A token to be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Token {
    /// The token.
    pub text: Secret,
    /// Grows with each token: which one an upstream has refused.
    pub generation: u64,
}

/// What is to be done for somebody who wants a token.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Ask {
    /// This one is good.
    Use(Token),
    /// This one is still good; a renewal has begun and is to be carried out.
    UseAndRenew(Token),
    /// A renewal has begun and is to be carried out; whoever asks waits for it.
    Renew,
    /// A renewal is under way; whoever asks waits for it.
    Wait,
    /// There is none.
    None(Why),
}

/// The times of one credential.
#[derive(Debug, Default)]
pub struct Renewal {
    held: Option<Held>,
    generation: u64,
    /// Whether a renewal is under way.
    renewing: bool,
    /// When the last one began.
    began: Option<Instant>,
    /// No renewal begins before this: the wait after a failure.
    retry_at: Option<Instant>,
    /// Failures in a row.
    failures: u32,
    /// The last of them.
    why: Option<Why>,
}

#[derive(Debug)]
struct Held {
    token: Token,
    renew_at: Option<Instant>,
    expires_at: Option<Instant>,
}

impl Renewal {
    /// Somebody wants a token.
    pub fn ask(&mut self, now: Instant) -> Ask {
        if let Some(held) = self.held.as_ref().filter(|held| held.is_good(now)) {
            let (token, due) = (held.token.clone(), held.renew_at.is_some_and(|at| at <= now));
            return if due && self.begin(now).is_ok() { Ask::UseAndRenew(token) } else { Ask::Use(token) };
        }
        self.renewed(now)
    }

    /// An upstream has answered 401 to the token of that generation. On [`Ask::Use`] there is another one, to be tried once.
    pub fn refused(&mut self, now: Instant, generation: u64) -> Ask {
        match self.held.as_ref().filter(|held| held.is_good(now) && held.token.generation > generation) {
            Some(held) => Ask::Use(held.token.clone()),
            None => self.renewed(now),
        }
    }

    /// A new token is wanted by somebody who cannot go on without.
    fn renewed(&mut self, now: Instant) -> Ask {
        if self.renewing {
            return Ask::Wait;
        }
        match self.begin(now) {
            Ok(()) => Ask::Renew,
            Err(why) => Ask::None(why),
        }
    }

    /// Begins a renewal, unless one is under way, began less than [`OAUTH_SPACING`] ago, or is not to be tried yet.
    fn begin(&mut self, now: Instant) -> Result<(), Why> {
        if self.renewing || self.began.is_some_and(|began| now < began + OAUTH_SPACING) {
            return Err(self.why.clone().unwrap_or(Why::TooSoon));
        }
        if self.retry_at.is_some_and(|at| now < at) {
            return Err(self.why.clone().unwrap_or(Why::Fault));
        }
        self.renewing = true;
        self.began = Some(now);
        Ok(())
    }

    /// What the renewal under way asks is sent only now, for it had to wait for another's.
    pub fn sent(&mut self, now: Instant) {
        if self.renewing {
            self.began = Some(now);
        }
    }

    /// The renewal under way has brought a token. `chance` is uniform in 0..=1000.
    pub fn brought(&mut self, now: Instant, granted: &Granted, chance: u32) -> Token {
        self.generation += 1;
        let token = Token { text: granted.access_token.clone(), generation: self.generation };
        // Its life began at the latest when it was asked for.
        let since = self.began.unwrap_or(now);
        let life = granted.life.map(|life| life.clamp(OAUTH_LIFE_MIN, OAUTH_LIFE_MAX));
        // Early, and not all processes at once: after seven to eight tenths of its life.
        let renew_after = |life: Duration| life / 10 * 7 + life / 10 * chance.min(1000) / 1000;
        self.held = Some(Held {
            token: token.clone(),
            renew_at: life.map(|life| since + renew_after(life)),
            expires_at: life.map(|life| since + life),
        });
        (self.renewing, self.failures, self.retry_at, self.why) = (false, 0, None, None);
        token
    }

    /// The renewal under way has brought nothing: what there is stays in use as long as it is good. `chance` is uniform in
    /// 0..=1000.
    pub fn failed(&mut self, now: Instant, why: Why, retry_after: Option<Duration>, chance: u32) {
        let ceiling = OAUTH_RETRY_MIN.saturating_mul(1 << self.failures.min(16)).min(OAUTH_RETRY_MAX);
        // Never longer than that, and down to half of it; the endpoint's own wish is a minimum.
        let wait = ceiling - ceiling / 2 * chance.min(1000) / 1000;
        let wait = wait.max(retry_after.unwrap_or_default().min(RETRY_AFTER_MAX));
        self.failures = self.failures.saturating_add(1);
        (self.renewing, self.retry_at, self.why) = (false, Some(now + wait), Some(why));
    }

    /// What is asked with has changed: the next who needs a token need not wait until the last failure is long ago.
    pub fn hurry(&mut self) {
        self.retry_at = None;
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Whether nothing is under way, so that all there is to lose is the token.
    pub fn is_idle(&self) -> bool {
        !self.renewing
    }
}

impl Held {
    fn is_good(&self, now: Instant) -> bool {
        self.expires_at.is_none_or(|at| now < at)
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use proptest::prelude::*;

    use super::*;
    use crate::stream::live::{Rule, Source};

    const fn at(ms: u64) -> Instant {
        Instant::from_micros((1_000_000 + ms) * 1_000)
    }

    fn granted(text: &str, life_s: Option<u64>) -> Granted {
        let (access_token, life) = (Secret::new(text), life_s.map(Duration::from_secs));
        Granted { access_token, life, refresh_token: None }
    }

    fn token(text: &str, generation: u64) -> Token {
        Token { text: Secret::new(text), generation }
    }

    fn down() -> Why {
        Why::Status { status: 500 }
    }

    fn options(grant: Grant, secret: Option<&str>, client_auth: ClientAuth) -> Options {
        let live = |text: &str| Live::new(Source::Written, Rule::Text, Secret::new(text));
        Options {
            grant,
            token_url: "https://idp.example/token".parse().expect("a URL"),
            client_id: live("client:1"),
            client_secret: secret.map(live),
            client_auth,
            scope: Some("leads read".into()),
            audience: Some("https://api/".into()),
            params: vec![("resource".into(), live("r&s"))],
            ca: None,
            identity: None,
        }
    }

    #[test]
    fn requests_are_as_the_rfc_has_them() {
        let text = |secret: &Secret| String::from_utf8(secret.expose_secret().to_vec()).expect("text");
        let request = options(Grant::ClientCredentials, Some("s e:c+r%t"), ClientAuth::Basic).request(None);
        assert_eq!(
            text(&request.body),
            "grant_type=client_credentials&scope=leads+read&audience=https%3A%2F%2Fapi%2F&resource=r%26s"
        );
        // «client%3A1:s+e%3Ac%2Br%25t»
        let basic = request.authorization.as_ref().map(text);
        assert_eq!(basic.as_deref(), Some("Basic Y2xpZW50JTNBMTpzK2UlM0FjJTJCciUyNXQ="));
        let request = options(Grant::ClientCredentials, Some("s&t"), ClientAuth::Post).request(None);
        assert!(text(&request.body).ends_with("&client_id=client%3A1&client_secret=s%26t"));
        assert_eq!(request.authorization, None);
        let refresh = Grant::RefreshToken(Live::new(Source::Written, Rule::Text, Secret::new(*b"r 1")));
        let options = options(refresh, None, ClientAuth::Basic);
        let request = options.request(options.refresh_token().as_ref());
        assert!(text(&request.body).starts_with("grant_type=refresh_token&refresh_token=r+1&scope="));
        assert!(text(&request.body).ends_with("&client_id=client%3A1"), "a public client says who it is");
        assert!(!format!("{options:?} {request:?}").contains("r 1"));
    }

    fn answer(status: u16, body: &str, expect: Expect) {
        let said = match read(status, body.as_bytes()) {
            Ok(Granted { access_token, life, refresh_token }) => {
                let text = |secret: &Secret| String::from_utf8_lossy(secret.expose_secret()).into_owned();
                format!("{} for {life:?}, refresh {:?}", text(&access_token), refresh_token.as_ref().map(text))
            }
            Err(why) => why.to_string(),
        };
        expect.assert_eq(&said);
    }

    #[test]
    fn answers_are_read_strictly() {
        let good = |rest: &str| format!("{{\"access_token\":\"a.b-c\",\"token_type\":\"Bearer\"{rest}}}");
        answer(200, &good(""), expect!["a.b-c for None, refresh None"]);
        answer(
            200,
            &good(",\"expires_in\":3600,\"refresh_token\":\"r\""),
            expect![[r#"a.b-c for Some(3600s), refresh Some("r")"#]],
        );
        answer(
            200,
            &good(",\"expires_in\":\"3599\",\"refresh_token\":null"),
            expect!["a.b-c for Some(3599s), refresh None"],
        );
        answer(200, &good(",\"expires_in\":1.5,\"refresh_token\":\"\""), expect!["a.b-c for Some(1s), refresh None"]);
        answer(
            200,
            &good(",\"refresh_token\":\"r\\n\""),
            expect!["the token endpoint's answer has a refresh_token that is none"],
        );
        answer(200, &good(",\"access_token\":\"second\""), expect!["the token endpoint's answer is no JSON"]);
        answer(200, "{\"access_token\":\"a\"}", expect!["the token endpoint's answer has no token_type"]);
        answer(
            200,
            "{\"access_token\":\"a\",\"token_type\":\"mac\"}",
            expect!["the token endpoint's answer has a token_type other than bearer"],
        );
        answer(200, "{\"token_type\":\"bearer\"}", expect!["the token endpoint's answer has no access_token"]);
        for bad in ["a b", "a\\r\\nX: y", "a\\u0000", "é", ""] {
            let body = format!("{{\"access_token\":\"{bad}\",\"token_type\":\"bearer\"}}");
            answer(200, &body, expect!["the token endpoint's answer has an access_token that no header can carry"]);
        }
        let long = |bytes| format!("{{\"access_token\":\"{}\",\"token_type\":\"bearer\"}}", "a".repeat(bytes));
        assert!(read(200, long(OAUTH_TOKEN_BYTES_MAX).as_bytes()).is_ok());
        assert!(read(200, long(OAUTH_TOKEN_BYTES_MAX + 1).as_bytes()).is_err());
        for garbage in ["", "<html>", "access_token=a&token_type=bearer", "{\"access_token\":"] {
            answer(200, garbage, expect!["the token endpoint's answer is no JSON"]);
        }
        answer(200, "[]", expect!["the token endpoint's answer is no JSON object"]);
        answer(201, &good(""), expect!["the token endpoint answers 201"]);
        answer(400, "{\"error\":\"invalid_grant\"}", expect!["the token endpoint answers 400 invalid_grant"]);
        answer(401, "{\"error\":\"invalid_client\"}", expect!["the token endpoint answers 401 invalid_client"]);
        answer(400, "{\"error\":\"your secret hunter2 is wrong\"}", expect!["the token endpoint answers 400"]);
        answer(503, "{\"error\":\"invalid_grant\"}", expect!["the token endpoint answers 503"]);
        assert!(Why::Refused { status: 400, error: "invalid_grant" }.is_of_refresh_token());
        assert!(!Why::Refused { status: 400, error: "invalid_client" }.is_of_refresh_token());
    }

    #[test]
    fn a_life_that_is_no_time_does_not_spoil_the_token() {
        let life = |expires_in: &str| {
            let body = format!("{{\"access_token\":\"a\",\"token_type\":\"bearer\",\"expires_in\":{expires_in}}}");
            read(200, body.as_bytes()).expect("the token is good").life.map(|life| life.as_secs())
        };
        for nothing in
            ["-1", "\"-1\"", "1e400", "\"1e400\"", "\"soon\"", "\"\"", "\"inf\"", "null", "true", "[3]", "{}"]
        {
            assert_eq!(life(nothing), None, "{nothing}");
        }
        for (some, seconds) in
            [("0", 0), ("3600", 3600), ("\"3600\"", 3600), ("\"3600.0\"", 3600), ("3.6e3", 3600), ("1.9", 1)]
        {
            assert_eq!(life(some), Some(seconds), "{some}");
        }
        assert_eq!(life("99999999999999999999999999"), Some(u64::MAX));
    }

    #[test]
    fn the_refresh_token_that_is_tried_first_is_the_newest_of_the_one_that_is_meant() {
        let secret = |text: &str| Secret::new(text);
        assert_eq!(candidates(None, (secret("c"), 1)), [secret("c")]);
        assert_eq!(candidates(Some((secret("s"), 1)), (secret("c"), 1)), [secret("s"), secret("c")]);
        assert_eq!(candidates(Some((secret("c"), 1)), (secret("c"), 1)), [secret("c")]);
        assert_eq!(
            candidates(Some((secret("s"), 1)), (secret("d"), 2)),
            [secret("d"), secret("s")],
            "another one was put into the configuration"
        );
    }

    #[test]
    fn one_token_is_got_for_all_and_renewed_before_it_ends() {
        let mut renewal = Renewal::default();
        assert_eq!(renewal.ask(at(0)), Ask::Renew);
        assert_eq!(renewal.ask(at(1)), Ask::Wait, "one flight");
        assert_eq!(renewal.brought(at(500), &granted("a", Some(100)), 0), token("a", 1));
        assert_eq!(renewal.ask(at(69_999)), Ask::Use(token("a", 1)));
        assert_eq!(renewal.ask(at(70_000)), Ask::UseAndRenew(token("a", 1)));
        assert_eq!(renewal.ask(at(70_001)), Ask::Use(token("a", 1)), "whoever comes meanwhile does not wait");
        renewal.brought(at(71_000), &granted("b", Some(100)), 1000);
        assert_eq!(renewal.ask(at(149_999)), Ask::Use(token("b", 2)));
        assert_eq!(renewal.ask(at(150_000)), Ask::UseAndRenew(token("b", 2)), "chance spreads it by a tenth");
        renewal.failed(at(151_000), down(), None, 0);
        assert_eq!(renewal.ask(at(151_001)), Ask::Use(token("b", 2)), "still good");
        assert_eq!(renewal.ask(at(152_000)), Ask::UseAndRenew(token("b", 2)));
        renewal.failed(at(153_000), down(), Some(Duration::from_secs(60)), 0);
        assert_eq!(renewal.ask(at(169_999)), Ask::Use(token("b", 2)));
        assert_eq!(renewal.ask(at(170_000)), Ask::None(down()), "its life counts from when it was asked for");
        assert_eq!(renewal.ask(at(212_999)), Ask::None(down()), "the endpoint's wish is obeyed");
        assert_eq!(renewal.ask(at(213_000)), Ask::Renew);
    }

    #[test]
    fn a_token_lives_from_when_it_was_asked_for_however_long_that_had_to_wait() {
        let mut renewal = Renewal::default();
        renewal.sent(at(0));
        assert_eq!(renewal.ask(at(0)), Ask::Renew, "nothing was under way");
        renewal.sent(at(5_000));
        renewal.brought(at(5_100), &granted("a", Some(3)), 0);
        assert_eq!(renewal.ask(at(7_000)), Ask::Use(token("a", 1)));
        assert_eq!(renewal.ask(at(8_000)), Ask::Renew);
    }

    #[test]
    fn a_token_without_an_end_is_used_until_it_is_refused() {
        let mut renewal = Renewal::default();
        renewal.ask(at(0));
        renewal.brought(at(0), &granted("a", None), 0);
        assert_eq!(renewal.ask(at(1_000_000_000)), Ask::Use(token("a", 1)));
        assert_eq!(renewal.refused(at(1_000_000_000), 1), Ask::Renew);
    }

    #[test]
    fn a_refused_token_is_compared_and_renewed_once_a_second_at_most() {
        let mut renewal = Renewal::default();
        renewal.ask(at(0));
        renewal.brought(at(100), &granted("a", Some(3600)), 0);
        assert_eq!(renewal.refused(at(200), 1), Ask::None(Why::TooSoon), "it was got a moment ago");
        assert_eq!(renewal.refused(at(1_000), 1), Ask::Renew);
        assert_eq!(renewal.refused(at(1_001), 1), Ask::Wait);
        assert_eq!(renewal.ask(at(1_002)), Ask::Use(token("a", 1)), "others may be luckier");
        renewal.brought(at(1_100), &granted("b", Some(3600)), 0);
        assert_eq!(renewal.refused(at(1_200), 1), Ask::Use(token("b", 2)), "there is a newer one already");
        assert_eq!(renewal.refused(at(1_200), 2), Ask::None(Why::TooSoon));
        assert_eq!(renewal.refused(at(2_000), 2), Ask::Renew);
        renewal.failed(at(2_100), down(), None, 0);
        assert_eq!(renewal.ask(at(2_200)), Ask::Use(token("b", 2)), "kept, as it may be good elsewhere");
    }

    #[test]
    fn failures_are_tried_again_ever_later_unless_what_is_asked_with_changes() {
        let mut renewal = Renewal::default();
        let mut now = at(0);
        let mut waits = Vec::new();
        for _ in 0..8 {
            assert_eq!(renewal.ask(now), Ask::Renew);
            renewal.failed(now, down(), None, 0);
            let first = (0..).map(|ms| now + Duration::from_millis(ms)).find(|&at| {
                renewal.retry_at.is_none_or(|retry| retry <= at)
                    && renewal.began.is_none_or(|b| b + OAUTH_SPACING <= at)
            });
            let next = first.expect("some time");
            waits.push(next.since(now).as_secs());
            now = next;
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(renewal.failures(), 8);
        assert_eq!(renewal.ask(now), Ask::Renew);
        renewal.failed(now, down(), Some(Duration::from_secs(600)), 1000);
        now = now + Duration::from_secs(2);
        assert_eq!(renewal.ask(now), Ask::None(down()));
        renewal.hurry();
        assert_eq!(renewal.ask(now), Ask::Renew);
    }

    #[test]
    fn lives_are_bounded_on_both_sides() {
        let mut renewal = Renewal::default();
        renewal.ask(at(0));
        renewal.brought(at(0), &granted("a", Some(0)), 0);
        assert_eq!(renewal.ask(at(0)), Ask::Use(token("a", 1)), "good for something at least");
        let end = at(0) + OAUTH_LIFE_MIN;
        assert_eq!(renewal.ask(end), Ask::Renew);
        renewal.brought(end, &granted("b", Some(u64::MAX)), 0);
        assert_eq!(renewal.ask(end + OAUTH_LIFE_MAX), Ask::Renew);
    }

    proptest! {
        /// Whatever upstreams and endpoints answer: one renewal at a time, two never begin within the spacing, none before
        /// the endpoint wants it, and a token that is handed out is good and the newest.
        #[test]
        fn renewals_keep_their_distance(
            steps in prop::collection::vec((0u8..5, 0u64..3_000, 0u32..=1000, prop::option::of(0u64..20)), 1..200),
        ) {
            let mut renewal = Renewal::default();
            let (mut now, mut under_way) = (at(0), false);
            let mut began: Option<Instant> = None;
            let mut not_before: Option<Instant> = None;
            let mut newest: Option<(u64, Option<Instant>)> = None;
            for (step, ms, chance, seconds) in steps {
                now = now + Duration::from_millis(ms);
                let asked = match step {
                    0 | 1 => Some(renewal.ask(now)),
                    2 => Some(renewal.refused(now, newest.map_or(0, |(generation, _)| generation))),
                    3 if under_way => {
                        let token = renewal.brought(now, &granted("a", seconds), chance);
                        let life = seconds.map(|s| Duration::from_secs(s).max(OAUTH_LIFE_MIN));
                        newest = Some((token.generation, life.map(|life| began.expect("one began") + life)));
                        (under_way, not_before) = (false, None);
                        None
                    }
                    4 if under_way => {
                        let retry_after = seconds.map(Duration::from_secs);
                        renewal.failed(now, down(), retry_after, chance);
                        not_before = Some(now + retry_after.unwrap_or_default());
                        under_way = false;
                        None
                    }
                    _ => None,
                };
                let begins = matches!(asked, Some(Ask::Renew | Ask::UseAndRenew(_)));
                if begins {
                    prop_assert!(!under_way, "one at a time");
                    prop_assert!(began.is_none_or(|began| began + OAUTH_SPACING <= now));
                    prop_assert!(not_before.is_none_or(|at| at <= now));
                    (under_way, began) = (true, Some(now));
                }
                if let Some(Ask::Use(token) | Ask::UseAndRenew(token)) = asked {
                    let (generation, end) = newest.expect("somebody brought it");
                    prop_assert!(token.generation == generation && end.is_none_or(|end| now < end));
                }
                prop_assert_eq!(renewal.is_idle(), !under_way);
            }
        }
    }
}
