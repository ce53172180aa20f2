//! Actions: a client's message made into one call of an upstream.
//!
//! Source: protocol version 1, sections 1 «Templates» and 6 «Actions»; RFC 9110 section 9.2.2 for which methods may be
//! sent twice.
//! Memory: an [`Options`] a configured action; a [`Call`] while it is under way: its URL and body.
//! Errors: [`Unfit`], the caller's or its token's fault. Not here: who may act and how often (`shard::actions`), sockets
//! (`runtime::fetch`).

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use url::Url;

use super::CaFile;
use super::credential::Credential;
use super::poll::{FetchError, FetchResponse, UpstreamCode};
use super::schema::Schema;
use super::template::{BodyTemplate, ClaimValue, FillError, UrlTemplate};
use crate::codec::json::Document;
use crate::codec::message::Members;
use crate::ids::StreamId;
use crate::secret::Secret;

/// One `[[action]]` of the configuration, parsed and checked.
#[derive(Debug, PartialEq)]
pub struct Options {
    /// The `type` of the messages that ask for it.
    pub kind: String,
    /// Any one of these is needed, where there are some.
    pub roles: Vec<String>,
    /// All of these are needed.
    pub permissions: Vec<String>,
    /// `PUT`, `POST`, … (a token, RFC 9110 section 5.6.2, upper case).
    pub method: String,
    /// The upstream's URL, with its placeholders.
    pub url: UrlTemplate,
    /// Static request headers; the values may be secrets and are never shown.
    pub headers: Vec<(String, Secret)>,
    /// What lets requests in besides those headers.
    pub credential: Credential,
    /// The request's body, with its placeholders.
    pub body: Option<BodyTemplate>,
    /// What the message must fit.
    pub schema: Option<Schema>,
    /// How often one caller may ask for it.
    pub rate: Option<Rate>,
    /// The streams that are polled at once after it.
    pub refresh: Vec<StreamId>,
    /// Whether the caller gets what the upstream answers on success.
    pub reply_body: bool,
    /// Whether the caller gets what the upstream answers on failure.
    pub error_body: bool,
    /// Roots to trust instead of the system's.
    pub ca: Option<CaFile>,
    /// For the TCP and TLS handshakes.
    pub connect_timeout: Duration,
    /// From the request's last byte to the response's first.
    pub first_byte_timeout: Duration,
    /// For the whole exchange.
    pub timeout: Duration,
    /// Bytes of a response body, inflated.
    pub response_bytes_max: u64,
}

/// So many in each period, of which all may come at once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rate {
    /// How many.
    pub count: u32,
    /// In which time.
    pub period: Duration,
}

impl Rate {
    /// The periods that it is written in, and their spellings.
    const PERIODS: [(&'static str, Duration); 3] =
        [("s", Duration::from_secs(1)), ("m", Duration::from_secs(60)), ("h", Duration::from_secs(3_600))];
    /// The greatest count.
    pub const COUNT_MAX: u32 = 1_000_000;

    /// The rate written `"5/s"`, `"100/m"` or `"1000/h"`; `None` where it is none, or the count is 0 or over
    /// [`Rate::COUNT_MAX`].
    pub fn parse(text: &str) -> Option<Rate> {
        let (count, unit) = text.split_once('/')?;
        let digits = !count.is_empty() && count.bytes().all(|b| b.is_ascii_digit());
        let count = count.parse().ok().filter(|count| digits && (1..=Rate::COUNT_MAX).contains(count))?;
        let (_, period) = Rate::PERIODS.into_iter().find(|(spelling, _)| *spelling == unit)?;
        Some(Rate { count, period })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = Rate::PERIODS.into_iter().find(|(_, period)| *period == self.period).map_or("s", |(unit, _)| unit);
        write!(f, "{}/{unit}", self.count)
    }
}

/// Why a message makes no call.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Unfit {
    /// It does not fit the schema, or is no message at all.
    #[error("{0}")]
    Message(String),
    /// The templates cannot be filled from it and the caller's claims.
    #[error(transparent)]
    Fill(#[from] FillError),
}

/// One call of an upstream, to be carried out by the shell. `Debug` shows neither URL nor body.
#[derive(Clone)]
pub struct Call {
    /// The action's configuration: method, headers, time-outs, limits, CA.
    pub options: Arc<Options>,
    /// The URL, placeholders filled.
    pub url: Url,
    /// The body, placeholders filled.
    pub body: Option<Arc<[u8]>>,
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Call({} {})", self.options.method, self.options.url)
    }
}

impl Call {
    /// Whether the request may be sent a second time where a kept connection turns out to have been closed before anything
    /// of an answer came: sent twice it does what it does once.
    pub fn is_idempotent(&self) -> bool {
        matches!(self.options.method.as_str(), "GET" | "PUT" | "DELETE" | "OPTIONS")
    }
}

/// How a call went.
pub type ActResult = Result<Answer, FetchError>;

/// An upstream's answer, as far as its caller gets it. `Debug` does not show the body.
#[derive(Clone, Eq, PartialEq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// `Retry-After`, both forms, as a time to wait.
    pub retry_after: Option<Duration>,
    /// Its JSON, where the caller is to have it: valid UTF-8.
    pub body: Option<Arc<[u8]>>,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Answer({}, {} bytes)", self.status, self.body.as_ref().map_or(0, |body| body.len()))
    }
}

impl Answer {
    /// Why it is no success; `None`: it is one.
    pub fn failure(&self) -> Option<UpstreamCode> {
        match self.status {
            200..=299 => None,
            300..=399 => Some(UpstreamCode::Redirect),
            401 | 403 => Some(UpstreamCode::Auth),
            429 => Some(UpstreamCode::RateLimited),
            503 if self.retry_after.is_some() => Some(UpstreamCode::RateLimited),
            400..=599 => Some(UpstreamCode::Status),
            // RFC 9110 section 15: outside 100..=599 a status is invalid, and a 1xx is never the last answer.
            _ => Some(UpstreamCode::Protocol),
        }
    }
}

/// A claim, as a URL and a body want it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Claim<'c> {
    /// A string's content.
    Text(&'c str),
    /// An integer's spelling.
    Integer(&'c str),
    /// Neither: it can stand nowhere.
    Other,
}

impl Options {
    /// An action of which only this much is known; all else is as where the configuration leaves it out.
    pub fn new(kind: String, url: UrlTemplate) -> Options {
        Options {
            kind,
            roles: Vec::new(),
            permissions: Vec::new(),
            method: "POST".to_owned(),
            url,
            headers: Vec::new(),
            credential: Credential::default(),
            body: None,
            schema: None,
            rate: None,
            refresh: Vec::new(),
            reply_body: true,
            error_body: false,
            ca: None,
            connect_timeout: Duration::from_secs(3),
            first_byte_timeout: Duration::from_secs(10),
            timeout: Duration::from_secs(15),
            response_bytes_max: 1 << 20,
        }
    }

    /// The names of the claims that its templates need.
    pub fn claims_used(&self) -> impl Iterator<Item = &str> {
        self.url.claims_used().into_iter().chain(self.body.iter().flat_map(|body| body.claims_used()))
    }

    /// What the message of that text makes of it, for a caller with those claims.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn call<'c>(
        self: &Arc<Options>,
        message: &str,
        claim: &dyn Fn(&str) -> Option<Claim<'c>>,
    ) -> Result<Call, Unfit> {
        if let Some(schema) = &self.schema {
            schema.check(message).map_err(|misfit| Unfit::Message(misfit.to_string()))?;
        }
        let members = Members::parse(message).map_err(|reason| Unfit::Message(reason.to_owned()))?;
        let member = |path: &str| members.at(path);
        let in_url = |name: &str| {
            claim(name).map(|claim| match claim {
                Claim::Text(text) | Claim::Integer(text) => text,
                // The empty text may not stand in a URL: it is refused as invalid, not as missing.
                Claim::Other => "",
            })
        };
        let in_body = |name: &str| {
            claim(name).map(|claim| match claim {
                Claim::Text(text) => ClaimValue::Text(text),
                Claim::Integer(text) => ClaimValue::Integer(text),
                Claim::Other => ClaimValue::Integer(""),
            })
        };
        let url = self.url.fill_for_action(&in_url, &member)?;
        let body = self.body.as_ref().map(|body| body.fill_for_action(&in_body, &member)).transpose()?;
        Ok(Call { options: Arc::clone(self), url, body: body.map(Arc::from) })
    }

    /// Whether the body of an answer with this status is of any use.
    pub fn wants_body(&self, status: u16) -> bool {
        if is_success(status) { self.reply_body } else { self.error_body }
    }

    /// What the caller gets of a response: of its body the JSON as the upstream sent it, but for white space around its
    /// tokens. What is not JSON is not passed on. Takes time in proportion to the body's size.
    pub fn answer(&self, response: FetchResponse) -> Answer {
        let FetchResponse { status, retry_after, body, .. } = response;
        let wanted = self.wants_body(status) && !body.is_empty();
        let document = if wanted { Document::parse(&body).ok() } else { None };
        Answer { status, retry_after, body: document.map(|document| Arc::clone(document.text())) }
    }
}

/// Whether an upstream has done what it was asked.
pub fn is_success(status: u16) -> bool {
    (200..=299).contains(&status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::poll::Validators;
    use crate::time::WallTime;

    /// An action that PUTs to `url` with `body`.
    pub(crate) fn action(url: &str, body: Option<&str>) -> Options {
        Options {
            kind: "update".into(),
            roles: Vec::new(),
            permissions: Vec::new(),
            method: "PUT".into(),
            url: UrlTemplate::parse_for_action(url).expect(url),
            headers: Vec::new(),
            credential: Credential::default(),
            body: body.map(|body| BodyTemplate::parse_for_action(body).expect(body)),
            schema: None,
            rate: None,
            refresh: Vec::new(),
            reply_body: true,
            error_body: false,
            ca: None,
            connect_timeout: Duration::from_secs(3),
            first_byte_timeout: Duration::from_secs(10),
            timeout: Duration::from_secs(15),
            response_bytes_max: 1 << 20,
        }
    }

    fn call(options: Options, message: &str) -> Result<(String, String), Unfit> {
        let claims = |name: &str| match name {
            "sub" => Some(Claim::Text("u\"1")),
            "companyId" => Some(Claim::Integer("42")),
            "list" => Some(Claim::Other),
            _ => None,
        };
        let call = Arc::new(options).call(message, &claims)?;
        let body = call.body.map(|body| String::from_utf8(body.to_vec()).expect("UTF-8"));
        Ok((call.url.to_string(), body.unwrap_or_default()))
    }

    #[test]
    fn a_message_fills_the_url_encoded_and_the_body_as_it_was_sent() {
        let options = action(
            "https://api/c/{claims.companyId}/p/{message.property.id}?by={claims.sub}&force={message.force}",
            Some(r#"{"by":{claims.sub},"of":{claims.companyId},"new":{message.property},"all":[{message.list}]}"#),
        );
        let message =
            r#"{"type":"update","property":{ "id":"a/b c","price":1.50E+2 },"force":true,"list":[1, 2],"id":9}"#;
        assert_eq!(
            call(options, message),
            Ok((
                "https://api/c/42/p/a%2Fb%20c?by=u%221&force=true".to_owned(),
                r#"{"by":"u\"1","of":42,"new":{ "id":"a/b c","price":1.50E+2 },"all":[[1, 2]]}"#.to_owned()
            ))
        );
        let options = action("https://api/p/{message.id}", Some("{message.property}"));
        assert_eq!(
            call(options, r#"{"type":"update","id":12345678901234567890.0,"property":null}"#),
            Ok(("https://api/p/12345678901234567890.0".to_owned(), "null".to_owned()))
        );
    }

    #[test]
    fn what_cannot_stand_in_its_place_is_the_callers_fault_or_its_tokens() {
        let with = |message: &str| call(action("https://api/p/{message.p.id}", None), message);
        for message in [r#"{"p":{}}"#, r#"{"p":7}"#, r#"{"p":[{"id":1}]}"#, r#"{"p.id":1}"#, r#"{"id":1}"#, "{}"] {
            assert_eq!(with(message), Err(Unfit::Fill(FillError::MessageMissing("p.id".into()))), "{message}");
        }
        for value in [
            r#""""#,
            r#"".""#,
            r#""..""#,
            r#""\u002e.""#,
            r#""a\nb""#,
            r#""\u0000""#,
            r#""\u0085""#,
            "null",
            "{}",
            "[]",
            "[1]",
            &format!("\"{}\"", "a".repeat(1025)),
        ] {
            let message = format!(r#"{{"p":{{"id":{value}}}}}"#);
            assert_eq!(with(&message), Err(Unfit::Fill(FillError::MessageInvalid("p.id".into()))), "{value}");
        }
        for (value, segment) in [
            (r#""../../admin""#, "..%2F..%2Fadmin"),
            (r#""a?b#c&d=e""#, "a%3Fb%23c%26d%3De"),
            (r#""%2e%2e""#, "%252e%252e"),
            ("\"\\\\\"", "%5C"),
            ("-1", "-1"),
            ("1e+5", "1e%2B5"),
            ("false", "false"),
            (&format!("\"{}\"", "a".repeat(1024)), &"a".repeat(1024)),
        ] {
            let message = format!(r#"{{"p":{{"id":{value}}}}}"#);
            assert_eq!(with(&message).map(|call| call.0), Ok(format!("https://api/p/{segment}")), "{value}");
        }
        let missing = call(action("https://api/{claims.nope}", None), "{}");
        assert_eq!(missing, Err(Unfit::Fill(FillError::ClaimMissing("nope".into()))));
        let invalid = call(action("https://api/{claims.list}", None), "{}");
        assert_eq!(invalid, Err(Unfit::Fill(FillError::ClaimInvalid("list".into()))));
        let invalid = call(action("https://api/", Some("{claims.list}")), "{}");
        assert_eq!(invalid, Err(Unfit::Fill(FillError::ClaimInvalid("list".into()))));
        let missing = call(action("https://api/", Some("[{message.a}]")), r#"{"b":1}"#);
        assert_eq!(missing, Err(Unfit::Fill(FillError::MessageMissing("a".into()))));
    }

    #[test]
    fn the_schema_is_asked_before_anything_is_filled() {
        let schema = Schema::parse(r#"{"properties":{"id":{"type":"integer"}},"required":["id"]}"#).expect("a schema");
        let options = || action("https://api/p/{message.id}", None);
        let with_schema = Options { schema: Some(schema), ..options() };
        assert!(matches!(call(with_schema, r#"{"type":"update","id":"x"}"#), Err(Unfit::Message(_))));
        assert!(call(options(), r#"{"type":"update","id":"x"}"#).is_ok());
        assert!(matches!(call(options(), "nonsense"), Err(Unfit::Message(_))));
    }

    #[test]
    fn rates_are_read_as_they_are_written() {
        for text in ["1/s", "5/s", "100/m", "1000000/h"] {
            assert_eq!(Rate::parse(text).map(|rate| rate.to_string()).as_deref(), Some(text));
        }
        for text in ["", "5", "/s", "5/", "0/s", "-1/s", "+5/s", "5/d", "5/S", "5 /s", "5/s ", "1000001/s", "1.5/s"] {
            assert_eq!(Rate::parse(text), None, "{text}");
        }
        assert_eq!(Rate::parse("90/m"), Some(Rate { count: 90, period: Duration::from_secs(60) }));
    }

    fn response(status: u16, body: &str) -> FetchResponse {
        FetchResponse {
            status,
            validators: Validators::default(),
            retry_after: None,
            fresh_for: None,
            body: body.into(),
            received: WallTime::from_secs(1),
        }
    }

    #[test]
    fn an_answers_body_is_passed_on_where_it_is_json_and_wanted() {
        let options = |reply_body, error_body| Options { reply_body, error_body, ..action("https://api/", None) };
        let body = |options: &Options, status, body| {
            let answer = options.answer(response(status, body));
            assert_eq!(answer.status, status);
            answer.body.map(|body| String::from_utf8(body.to_vec()).expect("UTF-8"))
        };
        let it = options(true, false);
        assert_eq!(body(&it, 200, " {\"a\" : 1.0E1}\n").as_deref(), Some("{\"a\":1.0E1}"));
        for (status, text) in [(200, ""), (200, "ok"), (200, "{} {}"), (200, "{\"a\":1,\"a\":2}"), (422, "{}")] {
            assert_eq!(body(&it, status, text), None, "{status} {text}");
        }
        assert_eq!(body(&options(false, true), 422, "[1]").as_deref(), Some("[1]"));
        assert_eq!(body(&options(false, true), 200, "[1]"), None);
        let shown = format!("{:?}", it.answer(response(200, "\"hunter2\"")));
        assert_eq!(shown, "Answer(200, 9 bytes)");
    }

    #[test]
    fn each_status_that_is_no_success_has_its_code() {
        let of = |status, retry_after| Answer { status, retry_after, body: None }.failure().map(UpstreamCode::as_str);
        for (status, code) in [
            (304, "UPSTREAM_REDIRECT"),
            (400, "UPSTREAM_STATUS"),
            (401, "UPSTREAM_AUTH"),
            (403, "UPSTREAM_AUTH"),
            (404, "UPSTREAM_STATUS"),
            (422, "UPSTREAM_STATUS"),
            (429, "UPSTREAM_RATE_LIMITED"),
            (500, "UPSTREAM_STATUS"),
            (503, "UPSTREAM_STATUS"),
            (600, "UPSTREAM_PROTOCOL"),
            (101, "UPSTREAM_PROTOCOL"),
        ] {
            assert_eq!(of(status, None), Some(code), "{status}");
            assert!(!is_success(status));
        }
        assert_eq!(of(503, Some(Duration::from_secs(1))), Some("UPSTREAM_RATE_LIMITED"));
        for status in [200, 201, 204, 299] {
            assert_eq!((of(status, None), is_success(status)), (None, true));
        }
    }

    #[test]
    fn a_call_shows_neither_its_url_nor_its_body() {
        let options = Arc::new(action("https://u:pw@api/p/{message.id}?key=hunter2", Some("{message.id}")));
        let call = options.call(r#"{"id":"hunter3"}"#, &|_| None).expect("a call");
        let shown = format!("{call:?}");
        assert_eq!(shown, "Call(PUT https://***@api/p/{message.id}?key=***)");
    }

    #[test]
    fn only_what_does_twice_what_it_does_once_may_be_sent_again() {
        for (method, may) in [("PUT", true), ("DELETE", true), ("GET", true), ("POST", false), ("PATCH", false)] {
            let options = Arc::new(Options { method: method.into(), ..action("https://api/", None) });
            assert_eq!(options.call("{}", &|_| None).expect("a call").is_idempotent(), may, "{method}");
        }
    }
}
