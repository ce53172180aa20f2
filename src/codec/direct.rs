//! What a caller says of an upstream of its own: the body of `POST /v1/sessions` and `POST /v1/direct`, and the first frame
//! of a WebSocket to `/v1/direct`.
//!
//! Source: protocol version 1, section 1. Memory: what is said, bounded by the message or body that it came in.
//! Errors: a sentence for the caller, which quotes nothing. Not here: whether the target may be asked (`guard`).

use super::message::{Format, Members};
use crate::limits::{
    CLIENT_ID_BYTES_MAX, DEDUPE_KEY_BYTES_MAX, DIRECT_BODY_BYTES_MAX, DIRECT_HEADERS_MAX, DIRECT_INTERVAL_MS_MAX,
    MAX_RATE_MS_MAX, PATH_BYTES_MAX,
};
use crate::secret::Secret;

/// How often an upstream is asked where the caller does not say.
pub const INTERVAL_MS: u64 = 1000;

/// What is asked of an upstream, and how often. All of it may be secret.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DirectRequest {
    /// The URL, as given.
    pub url: Secret,
    /// Whether by POST: `method`, or else whether there is a body.
    pub post: bool,
    /// Headers, in the order of their names.
    pub headers: Vec<(String, Secret)>,
    /// The body: a string's content, or the JSON text of any other value.
    pub body: Option<Secret>,
    /// From the start of one poll to the start of the next.
    pub interval_ms: u64,
}

impl DirectRequest {
    /// A GET of `url` without headers.
    pub fn get(url: &str, interval_ms: Option<u64>) -> DirectRequest {
        let interval_ms = interval_ms.unwrap_or(INTERVAL_MS);
        DirectRequest { url: Secret::new(url), post: false, headers: Vec::new(), body: None, interval_ms }
    }
}

/// All that may be said: each resource has use for a part of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DirectBody {
    /// What is asked.
    pub request: DirectRequest,
    /// What the caller calls it, so that it is not made twice.
    pub dedupe_key: Option<String>,
    /// How long a session lives.
    pub ttl_s: Option<u64>,
    /// What is left of the value, as given.
    pub select: Option<String>,
    /// What frames hold.
    pub format: Option<Format>,
    /// Where to go on, as given; empty where that can be no place.
    pub since: Option<String>,
    /// Least time between two events.
    pub max_rate_ms: Option<u32>,
}

/// An `interval_ms`; `None`: it is none. 0 is as often as may be.
pub fn parse_interval_ms(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|ms| digits && *ms <= DIRECT_INTERVAL_MS_MAX)
}

/// What is wrong with an `interval_ms` that is none.
pub const BAD_INTERVAL: &str = "interval_ms is a whole number of milliseconds, at most a day's";

/// What `text` says. Members that it does not know are ignored, and so are those that are `null`.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str) -> Result<DirectBody, &'static str> {
    let members = Members::parse(text)?.without_nulls();
    let select = members.string("select").ok_or("select is not a string")?.map(|select| select.into_owned());
    if select.as_ref().is_some_and(|select| select.len() > PATH_BYTES_MAX) {
        return Err("select is too long");
    }
    let url = members.string("url").ok_or("url is not a string")?.ok_or("url is missing")?;
    let body = members.find("body").map(|json| match members.string("body").flatten() {
        Some(content) => Secret::new(content.into_owned()),
        None => Secret::new(json),
    });
    if body.as_ref().is_some_and(|body| body.len() > DIRECT_BODY_BYTES_MAX) {
        return Err("body is too long");
    }
    let post = match members.string("method").ok_or("method is not a string")?.as_deref() {
        None => body.is_some(),
        Some("GET") if body.is_some() => return Err("a GET has no body"),
        Some("GET") => false,
        Some("POST") => true,
        Some(_) => return Err("method is GET or POST"),
    };
    let interval_ms = match members.find("interval_ms") {
        None => INTERVAL_MS,
        Some(json) => parse_interval_ms(json).ok_or(BAD_INTERVAL)?,
    };
    let dedupe_key = members.string("dedupe_key").ok_or("dedupe_key is not a string")?;
    if dedupe_key.as_ref().is_some_and(|key| key.is_empty() || key.len() > DEDUPE_KEY_BYTES_MAX) {
        return Err("dedupe_key has 1 to 256 bytes");
    }
    Ok(DirectBody {
        request: DirectRequest {
            url: Secret::new(url.into_owned()),
            post,
            headers: headers(&members)?,
            body,
            interval_ms,
        },
        select,
        dedupe_key: dedupe_key.map(|key| key.into_owned()),
        ttl_s: whole(&members, "ttl_s", u64::MAX).map_err(|()| "ttl_s is a whole number of seconds, at least 1")?,
        format: match members.string("format").ok_or("format is not a string")? {
            None => None,
            Some(text) => Some(Format::parse(&text).ok_or("format is none of patch, merge, full")?),
        },
        // A malformed place, of whatever type, is one that cannot be resumed from.
        since: match members.string("since") {
            Some(since) => {
                since.map(|since| if since.len() > CLIENT_ID_BYTES_MAX { String::new() } else { since.into() })
            }
            None => Some(String::new()),
        },
        max_rate_ms: match members.find("max_rate_ms") {
            None | Some("0") => None,
            Some(_) => whole(&members, "max_rate_ms", MAX_RATE_MS_MAX)
                .map_err(|()| "max_rate_ms is a whole number of milliseconds, at most an hour's")?
                .and_then(|ms| u32::try_from(ms).ok()),
        },
    })
}

/// A whole number from 1 to `max`.
fn whole(members: &Members<'_>, name: &str, max: u64) -> Result<Option<u64>, ()> {
    let Some(json) = members.find(name) else { return Ok(None) };
    if !json.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(());
    }
    // What is more than a number can hold is more than anything lives.
    Some(json.parse().unwrap_or(u64::MAX)).filter(|number| (1..=max).contains(number)).map(Some).ok_or(())
}

fn headers(members: &Members<'_>) -> Result<Vec<(String, Secret)>, &'static str> {
    const NO_OBJECT: &str = "headers is an object of strings";
    let Some(json) = members.find("headers") else { return Ok(Vec::new()) };
    let headers = Members::parse(json).map_err(|_| NO_OBJECT)?;
    let headers = headers.strings(NO_OBJECT)?;
    if headers.len() > DIRECT_HEADERS_MAX {
        return Err("too many headers");
    }
    Ok(headers.into_iter().map(|(name, value)| (name.to_owned(), Secret::new(value.into_owned()))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_alone_is_a_get_once_a_second() {
        let said = parse(r#"{"type":"open","url":"https://a.test/x","more":[]}"#).expect("it is enough");
        assert_eq!(said.request, DirectRequest::get("https://a.test/x", None));
        assert_eq!((said.format, said.since, said.max_rate_ms), (None, None, None));
        assert_eq!((said.dedupe_key, said.ttl_s), (None, None));
    }

    #[test]
    fn everything_that_can_be_said_is_read() {
        let said = parse(
            r#"{"url":"u","headers":{"X-Key":"a\u0062","A":""},"body":{"n":1.50},"interval_ms":5,"dedupe_key":"k",
            "ttl_s":9,"format":"merge","since":"e-1","max_rate_ms":7,"method":"POST"}"#,
        )
        .expect("it is read");
        let headers = [("A", ""), ("X-Key", "ab")].map(|(name, value)| (name.to_owned(), Secret::new(value)));
        assert_eq!((said.request.headers.as_slice(), said.request.post), (&headers[..], true));
        assert_eq!(said.request.body, Some(Secret::new("{\"n\":1.50}")), "numbers keep their spelling");
        assert_eq!((said.request.interval_ms, said.ttl_s, said.max_rate_ms), (5, Some(9), Some(7)));
        assert_eq!((said.dedupe_key.as_deref(), said.since.as_deref()), (Some("k"), Some("e-1")));
        assert_eq!(said.format, Some(Format::Merge));
        let text = parse(r#"{"url":"u","body":"a=b"}"#).expect("it is read").request;
        assert_eq!((text.body, text.post), (Some(Secret::new("a=b")), true));
    }

    #[test]
    fn what_is_null_was_left_out() {
        let names = [
            "method",
            "headers",
            "body",
            "interval_ms",
            "select",
            "dedupe_key",
            "ttl_s",
            "format",
            "since",
            "max_rate_ms",
        ];
        let nulls: Vec<String> = names.iter().map(|name| format!("\"{name}\": null")).collect();
        let said = parse(&format!(r#"{{"url":"u",{}}}"#, nulls.join(","))).expect("nothing is wrong");
        assert_eq!(said, parse(r#"{"url":"u"}"#).expect("a URL is enough"));
    }

    #[test]
    fn an_interval_of_nothing_is_as_often_as_may_be() {
        let said = parse(r#"{"url":"u","interval_ms":0}"#).expect("it is a number");
        assert_eq!((said.request.interval_ms, parse_interval_ms("0")), (0, Some(0)));
    }

    #[test]
    fn what_is_wrong_is_said_without_a_word_of_it() {
        let long = "k".repeat(DEDUPE_KEY_BYTES_MAX + 1);
        for (text, wrong) in [
            ("[]".to_owned(), "not a JSON object"),
            (r#"{"body":"x"}"#.into(), "url is missing"),
            (r#"{"url":7}"#.into(), "url is not a string"),
            (r#"{"url":null}"#.into(), "url is missing"),
            (r#"{"url":"u","headers":{"a":null}}"#.into(), "headers is an object of strings"),
            (r#"{"url":"u","method":"PUT"}"#.into(), "method is GET or POST"),
            (r#"{"url":"u","url":"v"}"#.into(), "a member stands twice"),
            (r#"{"url":"u","method":"DELETE"}"#.into(), "method is GET or POST"),
            (r#"{"url":"u","method":"GET","body":1}"#.into(), "a GET has no body"),
            (r#"{"url":"u","headers":["a"]}"#.into(), "headers is an object of strings"),
            (r#"{"url":"u","headers":{"a":1}}"#.into(), "headers is an object of strings"),
            (r#"{"url":"u","interval_ms":-1}"#.into(), BAD_INTERVAL),
            (r#"{"url":"u","interval_ms":86400001}"#.into(), BAD_INTERVAL),
            (r#"{"url":"u","interval_ms":1.5}"#.into(), BAD_INTERVAL),
            (r#"{"url":"u","ttl_s":0}"#.into(), "ttl_s is a whole number of seconds, at least 1"),
            (r#"{"url":"u","dedupe_key":""}"#.into(), "dedupe_key has 1 to 256 bytes"),
            (format!(r#"{{"url":"u","dedupe_key":"{long}"}}"#), "dedupe_key has 1 to 256 bytes"),
            (format!(r#"{{"url":"u","body":"{}"}}"#, "x".repeat(DIRECT_BODY_BYTES_MAX + 1)), "body is too long"),
            (
                r#"{"url":"u","max_rate_ms":3600001}"#.into(),
                "max_rate_ms is a whole number of milliseconds, at most an hour's",
            ),
            (r#"{"url":"u","format":"x"}"#.into(), "format is none of patch, merge, full"),
        ] {
            assert_eq!(parse(&text).err(), Some(wrong), "{text:.80}");
        }
        let many: Vec<String> = (0..=DIRECT_HEADERS_MAX).map(|n| format!("\"h{n}\":\"\"")).collect();
        assert_eq!(
            parse(&format!(r#"{{"url":"u","headers":{{{}}}}}"#, many.join(","))).err(),
            Some("too many headers")
        );
        assert!(parse(&format!(r#"{{"url":"u","headers":{{{}}}}}"#, many[1..].join(","))).is_ok());
        assert!(parse(&format!(r#"{{"url":"u","dedupe_key":"{}"}}"#, &long[1..])).is_ok());
        assert!(parse(r#"{"url":"u","interval_ms":86400000,"ttl_s":99999999999999999999}"#).is_ok());
    }

    #[test]
    fn what_a_caller_says_is_never_shown() {
        let said =
            parse(r#"{"url":"https://hunter2/","headers":{"A":"hunter2"},"body":"hunter2"}"#).expect("it is read");
        assert!(!format!("{said:?}").contains("hunter2"));
    }
}
