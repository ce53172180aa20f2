//! What single request fields mean: credentials, cookies, queries, and what the client would like to be answered.
//!
//! Source: RFC 9110 sections 11.4 (Authorization), 12.5.1 (Accept), 13.1.2 (If-None-Match); RFC 6750, 6265, 7240; WHATWG
//! URL section 5 (forms); protocol section 1.
//! Memory: borrowed; only what had to be decoded is copied.
//! Errors: [`CookieError`], [`QueryError`]: 400.  Not here: whether a credential is good (`auth`).

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use super::{Head, elements, is_token, is_token_byte};
use crate::limits::{PREFER_WAIT_MAX, QUERY_PAIRS_MAX};

/// Undoes percent-encoding, once. `None` where an escape is not `%` and two hexadecimal digits, or the result not UTF-8.
pub fn percent_decode(text: &str) -> Option<Cow<'_, str>> {
    unescape(text, false)
}

/// Undoes percent-encoding and, in a form, the `+` that stands for a space.
fn unescape(text: &str, form: bool) -> Option<Cow<'_, str>> {
    if !text.bytes().any(|b| b == b'%' || (form && b == b'+')) {
        return Some(Cow::Borrowed(text));
    }
    let hex = |digit: Option<u8>| char::from(digit?).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => hex(bytes.next())? << 4 | hex(bytes.next())?,
            b'+' if form => b' ',
            _ => byte,
        });
    }
    String::from_utf8(out).ok().map(Cow::Owned)
}

/// Why a query cannot be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum QueryError {
    /// An escape is not `%` and two hexadecimal digits, or what it stands for is not UTF-8.
    #[error("the query holds an escape that does not decode")]
    Escape,
    /// More than 64 pairs.
    #[error("the query has more than {QUERY_PAIRS_MAX} parameters")]
    TooMany,
}

/// The pairs of a query, decoded as `application/x-www-form-urlencoded`, in order. A piece without `=` has an empty
/// value, empty pieces are left out, and after an error comes nothing.
#[derive(Clone)]
pub struct Query<'q> {
    rest: Option<&'q str>,
    pairs_left: usize,
}

impl<'q> Query<'q> {
    /// Reads `raw`, what stands behind the `?` of a target.
    pub fn new(raw: &'q str) -> Query<'q> {
        Query { rest: Some(raw), pairs_left: QUERY_PAIRS_MAX }
    }
}

impl fmt::Debug for Query<'_> {
    // A query may hold a token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Query").field("bytes_left", &self.rest.map_or(0, str::len)).finish_non_exhaustive()
    }
}

impl<'q> Iterator for Query<'q> {
    type Item = Result<(Cow<'q, str>, Cow<'q, str>), QueryError>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = loop {
            let rest = self.rest.take()?;
            let piece = match rest.split_once('&') {
                Some((piece, after)) => {
                    self.rest = Some(after);
                    piece
                }
                None => rest,
            };
            if !piece.is_empty() {
                break piece;
            }
        };
        let Some(pairs_left) = self.pairs_left.checked_sub(1) else {
            self.rest = None;
            return Some(Err(QueryError::TooMany));
        };
        self.pairs_left = pairs_left;
        let (name, value) = piece.split_once('=').unwrap_or((piece, ""));
        match (unescape(name, true), unescape(value, true)) {
            (Some(name), Some(value)) => Some(Ok((name, value))),
            _ => {
                self.rest = None;
                Some(Err(QueryError::Escape))
            }
        }
    }
}

/// Why a cookie has no value that could be used.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CookieError {
    /// Two cookies have that name, and nothing says which one is meant.
    #[error("a cookie appears more than once")]
    Repeated,
    /// Its value is not UTF-8.
    #[error("a cookie's value is not UTF-8 text")]
    NotText,
}

/// The value of the cookie `name`, over all `Cookie` fields, without the double quotes it may stand in; not decoded.
///
/// # Errors
/// [`CookieError`]: a caller that took it for an absent cookie would let a bad credential pass as none.
pub fn cookie<'b>(head: &Head<'b>, name: &str) -> Result<Option<&'b str>, CookieError> {
    let mut found = None;
    let pairs = head.all("cookie").flat_map(|line| line.split(|&b| b == b';'));
    for pair in pairs {
        let mut halves = pair.splitn(2, |&b| b == b'=');
        let (Some(this), Some(value)) = (halves.next(), halves.next()) else {
            continue;
        };
        if this.trim_ascii() == name.as_bytes() && found.replace(value.trim_ascii()).is_some() {
            return Err(CookieError::Repeated);
        }
    }
    let Some(value) = found else {
        return Ok(None);
    };
    // RFC 6265 4.1.1: cookie-value = *cookie-octet / ( DQUOTE *cookie-octet DQUOTE )
    let value = value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value);
    std::str::from_utf8(value).map(Some).map_err(|_| CookieError::NotText)
}

/// How a stream is represented to a client that does not ask for a WebSocket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Representation {
    /// Server-sent events.
    EventStream,
    /// The current value.
    Json,
    /// Neither: 406.
    NotAcceptable,
}

/// Chooses a representation by the values of the `Accept` fields: events when `text/event-stream` itself is listed with
/// a weight that is not under JSON's, else JSON, which `application/*`, `*/*` and the absence of any preference allow too.
/// Media ranges that are malformed count as absent, parameters other than `q` are read over.
pub fn negotiate<'a>(accept: impl IntoIterator<Item = &'a [u8]>) -> Representation {
    let mut ranges_seen = false;
    let mut events: Option<u16> = None;
    // RFC 9110 12.5.1: the most specific range that matches decides, so each specificity has its own weight.
    let mut json: [Option<u16>; 3] = [None; 3];
    for range in accept.into_iter().flat_map(|value| elements(value, b',')) {
        let Some((media, weight)) = weighted_range(range) else {
            continue;
        };
        ranges_seen = true;
        let known: [(&[u8], &mut Option<u16>); 4] = {
            let [exact, subtypes, any] = &mut json;
            [
                (b"text/event-stream", &mut events),
                (b"application/json", exact),
                (b"application/*", subtypes),
                (b"*/*", any),
            ]
        };
        for (name, place) in known {
            if media.eq_ignore_ascii_case(name) {
                *place = (*place).max(Some(weight));
            }
        }
    }
    if !ranges_seen {
        return Representation::Json;
    }
    let json = json.into_iter().flatten().next().unwrap_or(0);
    match events {
        Some(weight) if weight > 0 && weight >= json => Representation::EventStream,
        _ if json > 0 => Representation::Json,
        _ => Representation::NotAcceptable,
    }
}

/// A media range and its weight in thousandths; `None` where either is malformed.
fn weighted_range(range: &[u8]) -> Option<(&[u8], u16)> {
    let mut parts = elements(range, b';');
    let media = parts.next()?;
    let slash = media.iter().position(|&b| b == b'/')?;
    if !is_token(media.get(..slash)?) || !is_token(media.get(slash + 1..)?) {
        return None;
    }
    let mut weight = 1000;
    for parameter in parts {
        if let Some((b"q" | b"Q", value)) = assignment(parameter) {
            weight = parse_weight(value)?;
        }
    }
    Some((media, weight))
}

/// `qvalue` of RFC 9110 section 12.4.2, in thousandths.
fn parse_weight(value: &[u8]) -> Option<u16> {
    let (&whole, rest) = value.split_first()?;
    let digits = match rest {
        [] => rest,
        [b'.', digits @ ..] => digits,
        _ => return None,
    };
    if digits.len() > 3 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let thousandths = (0..3).fold(0u16, |n, at| n * 10 + u16::from(digits.get(at).map_or(0, |d| d - b'0')));
    match (whole, thousandths) {
        (b'0', _) => Some(thousandths),
        (b'1', 0) => Some(1000),
        _ => None,
    }
}

/// Splits `name=value` or `name="value"`, with the white space allowed around `=` by the fields that are lenient there.
fn assignment(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|&b| b == b'=')?;
    let (name, value) = (text.get(..at)?.trim_ascii(), text.get(at + 1..)?.trim_ascii());
    let unquoted = value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value);
    Some((name, unquoted))
}

/// How long a client is ready to wait for a change: `Prefer: wait=N` (RFC 7240 section 4.3), at most `PREFER_WAIT_MAX`.
/// The first `wait` counts; one that is not a number of seconds is none.
pub fn prefer_wait(head: &Head<'_>) -> Option<Duration> {
    let preferences = head.all("prefer").flat_map(|value| elements(value, b','));
    let wait = preferences.filter_map(|preference| elements(preference, b';').next()).find_map(|preference| {
        let (name, value) = assignment(preference).unwrap_or((preference, b""));
        name.eq_ignore_ascii_case(b"wait").then_some(value)
    })?;
    let seconds = super::parse_content_length(wait)?;
    Some(Duration::from_secs(seconds).min(PREFER_WAIT_MAX))
}

/// Whether `If-None-Match` lists `etag` (with its quotes) or is `*`, by weak comparison (RFC 9110 section 8.8.3.2).
/// What follows a malformed entity tag is not read: at worst the whole representation is sent.
pub fn if_none_match(head: &Head<'_>, etag: &str) -> bool {
    let wanted = etag.strip_prefix("W/").unwrap_or(etag).as_bytes();
    head.all("if-none-match").any(|value| value == b"*" || entity_tags(value).any(|tag| tag == wanted))
}

/// The entity tags of a list, quotes included, `W/` left out. A comma may stand in a tag, and `\` escapes nothing.
fn entity_tags(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        while let [b' ' | b'\t' | b',', after @ ..] = rest {
            rest = after;
        }
        let text = rest.strip_prefix(b"W/").unwrap_or(rest);
        let inner = text.strip_prefix(b"\"")?;
        let end = inner.iter().position(|&b| b == b'"')?;
        // etagc of RFC 9110 8.8.3: visible, or obs-text.
        if !inner.get(..end)?.iter().all(|&b| matches!(b, 0x21..=0x7e | 0x80..)) {
            return None;
        }
        let (tag, after) = text.split_at_checked(end + 2)?;
        rest = match after.trim_ascii_start() {
            after @ ([] | [b',', ..]) => after,
            // Two tags without a comma between them: the list ends with the first.
            _ => &[],
        };
        Some(tag)
    })
}

/// What `Authorization` holds. Its `Debug` does not show the token.
#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Authorization<'b> {
    /// There is none.
    None,
    /// A bearer token (RFC 6750 section 2.1).
    Bearer(&'b str),
    /// The scheme is Bearer, or there is none, and what follows is not one token68.
    Malformed,
    /// Another scheme: nothing that this server reads.
    OtherScheme,
}

impl fmt::Debug for Authorization<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Authorization::None => "None",
            Authorization::Bearer(_) => "Bearer(***)",
            Authorization::Malformed => "Malformed",
            Authorization::OtherScheme => "OtherScheme",
        })
    }
}

/// Reads the `Authorization` field; a head that has two was refused when it was parsed.
pub fn bearer<'b>(head: &Head<'b>) -> Authorization<'b> {
    let Some(value) = head.all("authorization").next() else {
        return Authorization::None;
    };
    let scheme_end = value.iter().position(|&b| !is_token_byte(b)).unwrap_or(value.len());
    let Some((scheme, rest)) = value.split_at_checked(scheme_end) else {
        return Authorization::Malformed;
    };
    if scheme.is_empty() || !(rest.is_empty() || rest.starts_with(b" ")) {
        return Authorization::Malformed;
    }
    if !scheme.eq_ignore_ascii_case(b"bearer") {
        return Authorization::OtherScheme;
    }
    let token = rest.trim_ascii_start();
    match std::str::from_utf8(token) {
        Ok(text) if is_token68(token) => Authorization::Bearer(text),
        _ => Authorization::Malformed,
    }
}

/// Whether `text` is a `token68` of RFC 9110 section 11.2: what may stand behind `Bearer`.
pub fn is_token68(text: &[u8]) -> bool {
    let end = text.iter().rposition(|&b| b != b'=').map_or(0, |last| last + 1);
    let body = text.get(..end).unwrap_or_default();
    let is_body = |b: &u8| b.is_ascii_alphanumeric() || b"-._~+/".contains(b);
    !body.is_empty() && body.iter().all(is_body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::*;
    use crate::codec::http::tests::{get, parsed};

    #[test]
    fn percent_encoding_is_undone_once() {
        assert_eq!(percent_decode("a%2Fb%2e+%25%32%35").as_deref(), Some("a/b.+%25"));
        assert!(matches!(percent_decode("plain"), Some(Cow::Borrowed("plain"))));
        assert_eq!(percent_decode("%c3%A9").as_deref(), Some("é"));
        for bad in ["%", "%2", "%2g", "%g2", "%%", "%+1", "%ff", "%c3", "a%"] {
            assert_eq!(percent_decode(bad), None, "{bad:?}");
        }
    }

    fn pairs(raw: &str) -> Vec<Result<(String, String), QueryError>> {
        Query::new(raw).map(|pair| pair.map(|(name, value)| (name.into_owned(), value.into_owned()))).collect()
    }

    #[test]
    fn queries_are_forms() {
        let pair = |name: &str, value: &str| Ok((name.to_owned(), value.to_owned()));
        assert_eq!(
            pairs("a=b+c&&d=e%3Df=g&h&=i&"),
            [pair("a", "b c"), pair("d", "e=f=g"), pair("h", ""), pair("", "i")]
        );
        assert_eq!(pairs(""), []);
        assert_eq!(pairs("a=1&b=%zz&c=3"), [pair("a", "1"), Err(QueryError::Escape)]);
    }

    #[test]
    fn a_query_may_have_64_pairs_and_not_one_more() {
        assert!(Query::new(&["a=b"; QUERY_PAIRS_MAX].join("&")).all(|pair| pair.is_ok()));
        let over = pairs(&["a=b"; QUERY_PAIRS_MAX + 2].join("&"));
        assert_eq!((over.len(), over.last()), (QUERY_PAIRS_MAX + 1, Some(&Err(QueryError::TooMany))));
    }

    #[test]
    fn cookies_are_found_over_all_lines() {
        let text = get("Cookie: a=1; connect.sid=s%3Ax.y; q=\"v w\"\r\ncookie:b=2;c ;d=; e==f\r\n");
        let head = parsed(&text);
        for (name, value) in [("a", "1"), ("connect.sid", "s%3Ax.y"), ("q", "v w"), ("b", "2"), ("d", ""), ("e", "=f")]
        {
            assert_eq!(cookie(&head, name), Ok(Some(value)), "{name}");
        }
        for absent in ["A", "c", "x", ""] {
            assert_eq!(cookie(&head, absent), Ok(None), "{absent:?}");
        }
    }

    #[test]
    fn a_cookie_that_stands_twice_has_no_value() {
        assert_eq!(cookie(&parsed(&get("Cookie: a=1; b=2; a=1\r\n")), "a"), Err(CookieError::Repeated));
        assert_eq!(cookie(&parsed(&get("Cookie: a=1\r\nCookie: a=2\r\n")), "a"), Err(CookieError::Repeated));
    }

    #[test]
    fn a_cookie_that_is_no_text_is_not_an_absent_one() {
        let mut bytes = get("Cookie: a=?").into_bytes();
        bytes.iter_mut().filter(|b| **b == b'?').last().map(|b| *b = 0xff).expect("a mark");
        bytes.extend_from_slice(b"\r\n");
        let (head, _) = crate::codec::http::parse_head(&bytes, 1 << 16).expect("good").expect("whole");
        assert_eq!(cookie(&head, "a"), Err(CookieError::NotText));
        assert_eq!(cookie(&head, "b"), Ok(None));
    }

    #[test]
    fn a_representation_is_negotiated() {
        use Representation::{EventStream, Json, NotAcceptable};
        for (accept, wanted) in [
            (&[][..], Json),
            (&[""], Json),
            (&["*/*"], Json),
            (&["application/json"], Json),
            (&["APPLICATION/*;q=0.1"], Json),
            (&["text/event-stream"], EventStream),
            (&["Text/Event-Stream"], EventStream),
            (&["text/event-stream, application/json"], EventStream),
            (&["application/json", "text/event-stream"], EventStream),
            (&["text/event-stream;q=0.9, application/json"], Json),
            (&["text/event-stream;q=0.9, */*"], Json),
            (&["text/event-stream;q=0.9, application/json;q=0.5, */*"], EventStream),
            (&["text/event-stream;q=0.5, application/*;q=0.4, */*;q=0.9"], EventStream),
            (&["text/event-stream;q=0, */*"], Json),
            (&["text/event-stream;q=0.000"], NotAcceptable),
            (&["application/json;q=0, */*"], NotAcceptable),
            (&["text/event-stream;q=0.001, application/json;q=0"], EventStream),
            (&["text/html, application/xhtml+xml, */*;q=0.8"], Json),
            (&["text/html"], NotAcceptable),
            (&["text/*"], NotAcceptable),
            (&["text/event-stream;q=2, application/json"], Json),
            (&["text/event-stream; charset=utf-8; Q=1.000"], EventStream),
            (&["rubbish"], Json),
        ] {
            assert_eq!(negotiate(accept.iter().map(|value| value.as_bytes())), wanted, "{accept:?}");
        }
    }

    #[test]
    fn weights_have_at_most_three_digits_behind_the_point() {
        for (text, weight) in [("0", 0), ("0.", 0), ("0.5", 500), ("0.123", 123), ("1", 1000), ("1.000", 1000)] {
            assert_eq!(parse_weight(text.as_bytes()), Some(weight), "{text}");
        }
        for bad in ["", ".5", "0.1234", "1.001", "2", "00", "-1", "0,5", "0.x"] {
            assert_eq!(parse_weight(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_client_may_prefer_to_wait_for_60_s_and_no_longer() {
        let wait = |lines: &str| prefer_wait(&parsed(&get(lines))).map(|wait| wait.as_secs());
        assert_eq!(wait(""), None);
        assert_eq!(wait("Prefer: wait=60\r\n"), Some(60));
        assert_eq!(wait("Prefer: wait=61\r\n"), Some(60));
        assert_eq!(wait("Prefer: wait=99999999999999999999999\r\n"), Some(60));
        assert_eq!(wait("Prefer: respond-async, WAIT = \"5\"; x=y\r\nPrefer: wait=7\r\n"), Some(5));
        for bad in ["wait", "wait=", "wait=-1", "wait=1.5", "wait=x, wait=3", "waits=3"] {
            assert_eq!(wait(&format!("Prefer: {bad}\r\n")), None, "{bad}");
        }
    }

    #[test]
    fn entity_tags_are_compared_weakly() {
        let matches = |value: &str| if_none_match(&parsed(&get(&format!("If-None-Match: {value}\r\n"))), "\"k-1\"");
        for good in ["\"k-1\"", "W/\"k-1\"", "*", "\"a,b\\\", \"k-1\"", ", \"x\" ,W/\"k-1\"", "\"\",\"k-1\""] {
            assert!(matches(good), "{good}");
        }
        for bad in
            ["k-1", "\"k-2\"", "\"k-1", "w/\"k-1\"", "\"x\" \"k-1\"", "x, \"k-1\"", "\"a b\", \"k-1\"", "", "*, \"x\""]
        {
            assert!(!matches(bad), "{bad}");
        }
        assert!(if_none_match(&parsed(&get("If-None-Match: \"a\"\r\nIf-None-Match: \"b\"\r\n")), "W/\"b\""));
        assert!(!if_none_match(&parsed(&get("")), "\"b\""));
    }

    #[test]
    fn bearer_tokens_are_told_from_other_credentials() {
        for (value, wanted) in [
            ("Bearer a.b-c_d~e+f/g==", Authorization::Bearer("a.b-c_d~e+f/g==")),
            ("bEARER   x", Authorization::Bearer("x")),
            ("Bearer", Authorization::Malformed),
            ("Bearer a b", Authorization::Malformed),
            ("Bearer a,Bearer b", Authorization::Malformed),
            ("Bearer =", Authorization::Malformed),
            ("Bearer a=b", Authorization::Malformed),
            ("Bearer \"a\"", Authorization::Malformed),
            ("Bearer\tx", Authorization::Malformed),
            ("Bearer: x", Authorization::Malformed),
            ("", Authorization::Malformed),
            ("Basic dTpw", Authorization::OtherScheme),
            ("Bearerx y", Authorization::OtherScheme),
        ] {
            assert_eq!(bearer(&parsed(&get(&format!("Authorization: {value}\r\n")))), wanted, "{value:?}");
        }
        assert_eq!(bearer(&parsed(&get(""))), Authorization::None);
        assert_eq!(format!("{:?}", Authorization::Bearer("hunter2")), "Bearer(***)");
    }

    proptest! {
        #[test]
        fn what_was_encoded_decodes(text in any::<String>()) {
            let encoded: String = text.bytes().map(|b| format!("%{b:02x}")).collect();
            let decoded = percent_decode(&encoded);
            prop_assert_eq!(decoded.as_deref(), Some(text.as_str()));
            let raw = format!("{encoded}={encoded}");
            if !text.is_empty() {
                prop_assert_eq!(pairs(&raw), [Ok((text.clone(), text))]);
            }
        }

        #[test]
        fn no_value_is_too_strange(value in "[ -~\t]{0,60}") {
            let text = get(&format!(
                "Accept: {value}\r\nPrefer: wait={value}\r\nIf-None-Match: {value}\r\nCookie: {value}\r\nAuthorization: {value}\r\n"
            ));
            let head = parsed(&text);
            let _ = negotiate(head.all("accept"));
            prop_assert!(prefer_wait(&head).is_none_or(|wait| wait <= PREFER_WAIT_MAX));
            let _ = (if_none_match(&head, "\"a\""), cookie(&head, "a"), bearer(&head));
        }
    }
}
