//! The server side of HTTP/1.1: bytes -> request heads and bodies, answers -> bytes.
//!
//! Source: RFC 9112 (framing), RFC 9110 (fields), RFC 6455 section 4.2 (the WebSocket upgrade), RFC 6265, 7240, 9457.
//! Memory: a [`Head`] borrows the received bytes and owns one list of at most `HEADERS_MAX` places in them.
//! Errors: [`HeadError`], [`UpgradeError`], [`BodyError`]; each tells the status to answer, all but the upgrade's end the
//! connection. Every fault is found at a place in the bytes, so how they were split on the way makes no difference.
//! Not here: routes, credentials, time-outs (`connection`), the client side (`codec::http_response`).

mod answer;
mod body;
mod extensions;
mod fields;
mod upgrade;

use std::fmt;
use std::net::Ipv6Addr;

use crate::limits::{EMPTY_LINES_MAX, HEADERS_MAX, TARGET_BYTES_MAX};

pub use answer::{CONTINUE, Framing, LAST_CHUNK, Response, http_date, reason_phrase, write_chunk};
pub use body::{BodyDecoder, BodyError};
pub(crate) use body::{ChunkedDecoder, parse_content_length};
pub use extensions::{ExtensionPiece, Malformed, extension_pieces};
pub use fields::{
    Authorization, CookieError, Query, QueryError, Representation, bearer, cookie, if_none_match, negotiate,
    percent_decode, prefer_wait,
};
pub use upgrade::{Upgrade, UpgradeError, accept_key, websocket_upgrade, write_switching_protocols};

/// Fields that may stand in a request once only: two of them are two opinions on who asks, or where the body ends.
const SINGLETONS: [&str; 14] = [
    "host",
    "content-length",
    "content-type",
    "authorization",
    "origin",
    "if-modified-since",
    "if-match",
    "last-event-id",
    "sec-fetch-site",
    "sec-websocket-key",
    "sec-websocket-version",
    "x-api-key",
    "x-restcast-signature",
    "access-control-request-method",
];

/// How a request's body is delimited (RFC 9112 section 6.3).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BodyLength {
    /// No body.
    None,
    /// This many bytes; a number too large for a `u64` is `u64::MAX`.
    Length(u64),
    /// The chunked transfer coding.
    Chunked,
}

/// The form a request target was written in (RFC 9112 section 3.2); the authority form, of CONNECT, is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TargetForm {
    /// `/path?query`.
    Origin,
    /// `http://host/path?query`: its authority stands for `Host`.
    Absolute,
    /// `*`, of OPTIONS.
    Asterisk,
}

/// A request line and its fields, borrowed from the bytes they came in. Its `Debug` shows no query and no field's value.
#[derive(Clone, Eq, PartialEq)]
pub struct Head<'b> {
    /// The method: a token, as it was spelled.
    pub method: &'b str,
    /// The path, not decoded; it begins with `/`, or is `*`.
    pub path: &'b str,
    /// What stands behind the first `?`, not decoded.
    pub query: Option<&'b str>,
    /// The form of the target.
    pub target_form: TargetForm,
    /// The host and port asked for: `Host`, or the authority of an absolute target. Its grammar is checked.
    pub host: &'b str,
    /// Whether the peer lets the connection go on after the answer.
    pub keep_alive: bool,
    /// How the body is delimited.
    pub body: BodyLength,
    fields: Vec<Field<'b>>,
}

#[derive(Clone, Copy, Eq, PartialEq)]
struct Field<'b> {
    name: &'b str,
    value: &'b [u8],
}

/// Why a request head was refused. All of them are the peer's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HeadError {
    /// 431: more bytes than allowed.
    #[error("the request head has more than {limit} bytes")]
    TooLarge {
        /// The bytes allowed.
        limit: usize,
    },
    /// 414: a request target over `TARGET_BYTES_MAX`.
    #[error("the request target has more than {limit} bytes")]
    TargetTooLong {
        /// The bytes allowed.
        limit: usize,
    },
    /// 431: more fields than `HEADERS_MAX`.
    #[error("the request has more than {limit} header fields")]
    TooManyFields {
        /// The fields allowed.
        limit: usize,
    },
    /// 400: not `method SP target SP HTTP/1.1 CRLF`.
    #[error("the request line is not method, target and HTTP/1.1 with one space between them")]
    RequestLine,
    /// 400: the method is no token.
    #[error("the method is not a token")]
    Method,
    /// 400: a byte that no target has, or a form that this method does not have.
    #[error("the request target is not a path, an http URL, or * for OPTIONS, in visible ASCII without a fragment")]
    Target,
    /// 501: CONNECT.
    #[error("CONNECT is not served")]
    Connect,
    /// 505: another version of HTTP.
    #[error("the HTTP version is not 1.1")]
    Version,
    /// 400: a line that ends in LF alone.
    #[error("a line ends in LF without CR")]
    BareLineFeed,
    /// 400: a CR that no LF follows.
    #[error("a CR stands without LF")]
    BareCarriageReturn,
    /// 400: a line that begins with white space (obs-fold).
    #[error("a header line begins with white space")]
    FoldedField,
    /// 400: white space between a field's name and its colon.
    #[error("white space stands before the colon of a header field")]
    SpaceBeforeColon,
    /// 400: a field's name is no token.
    #[error("the name of a header field is not a token")]
    FieldName,
    /// 400: a control byte in a field's value.
    #[error("a header field's value holds a control byte")]
    FieldValue,
    /// 400: bytes outside UTF-8 where text is needed.
    #[error("header {name} is not UTF-8 text")]
    NotText {
        /// The field's name.
        name: &'static str,
    },
    /// 400: a field that may stand once stands twice.
    #[error("header {name} appears more than once")]
    Repeated {
        /// The field's name.
        name: &'static str,
    },
    /// 400: no `Host`.
    #[error("the request has no Host")]
    HostMissing,
    /// 400: `Host`, or the authority of the target, is no `host[:port]`.
    #[error("the host is not host[:port]")]
    HostInvalid,
    /// 400: `Content-Length` is not one number.
    #[error("Content-Length is not one decimal number")]
    ContentLength,
    /// 400: `Content-Length` beside `Transfer-Encoding`.
    #[error("Content-Length and Transfer-Encoding stand together")]
    LengthAndCoding,
    /// 501: a transfer coding other than chunked.
    #[error("a transfer coding other than chunked is not served")]
    UnknownCoding,
    /// 400: chunked is not the last transfer coding, or stands twice.
    #[error("chunked is not the last transfer coding, once")]
    ChunkedNotLast,
}

impl HeadError {
    /// The status that answers it.
    pub const fn status(self) -> u16 {
        match self {
            HeadError::TooLarge { .. } | HeadError::TooManyFields { .. } => 431,
            HeadError::TargetTooLong { .. } => 414,
            HeadError::Connect | HeadError::UnknownCoding => 501,
            HeadError::Version => 505,
            _ => 400,
        }
    }
}

/// Reads a request head from the beginning of `buf`: the head and the number of bytes it took, or `None` while it is
/// incomplete. `bytes_max` bounds the head, empty lines before it included.
///
/// # Errors
/// [`HeadError`] at the first byte that no head has at its place, whether or not the rest has come.
pub fn parse_head(buf: &[u8], bytes_max: usize) -> Result<Option<(Head<'_>, usize)>, HeadError> {
    let window = buf.get(..bytes_max).unwrap_or(buf);
    let text = after_empty_lines(window);
    let mut places = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut places);
    let parsed = request.parse(text);
    if let (Ok(httparse::Status::Complete(len)), Some(method), Some(target), Some(1)) =
        (parsed, request.method, request.path, request.version)
        && text.first().is_some_and(|&b| is_token_byte(b))
        && target.len() <= TARGET_BYTES_MAX
        && target.bytes().all(is_target_byte)
        && text.get(..len).is_some_and(each_line_ends_in_crlf)
    {
        let fields = request.headers.iter().map(|h| Field { name: h.name, value: h.value }).collect();
        let head = understand(method, target, fields)?;
        return Ok(Some((head, window.len() - text.len() + len)));
    }
    // httparse is more lenient than this server (LF alone, bytes over 0x7f, empty lines), says less, and may look ahead.
    first_fault(text)?;
    match parsed {
        _ if buf.len() >= bytes_max => Err(HeadError::TooLarge { limit: bytes_max }),
        Ok(httparse::Status::Partial) => Ok(None),
        // A version cut short, such as `HTTP/2`, is refused by httparse and by `first_fault` at the same byte.
        Ok(httparse::Status::Complete(_)) | Err(_) => Err(HeadError::RequestLine),
    }
}

impl<'b> Head<'b> {
    /// The value of a field that may stand once; names are compared without case.
    ///
    /// # Errors
    /// [`HeadError::Repeated`] where it stands twice, [`HeadError::NotText`] where it is not UTF-8.
    pub fn one(&self, name: &'static str) -> Result<Option<&'b str>, HeadError> {
        let mut values = self.all(name);
        let Some(value) = values.next() else {
            return Ok(None);
        };
        if values.next().is_some() {
            return Err(HeadError::Repeated { name });
        }
        std::str::from_utf8(value).map(Some).map_err(|_| HeadError::NotText { name })
    }

    /// The values of every field of this name, in order, as bytes without the white space around them.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &'b [u8]> {
        self.fields.iter().filter(move |field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
    }

    /// The elements of a comma-separated field, over all its lines, in order; empty ones are left out (RFC 9110 section
    /// 5.6.1). An element that is not UTF-8 is `"\u{fffd}"`, which is no token.
    pub fn list(&self, name: &str) -> impl Iterator<Item = &'b str> {
        self.all(name).flat_map(|value| elements(value, b',')).map(|e| std::str::from_utf8(e).unwrap_or("\u{fffd}"))
    }

    /// Whether a comma-separated field lists `token`, compared without case.
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.list(name).any(|element| element.eq_ignore_ascii_case(token))
    }

    /// Whether the peer waits for `100 Continue` before it sends the body (RFC 9110 section 10.1.1).
    pub fn expects_continue(&self) -> bool {
        self.body != BodyLength::None && self.has_token("expect", "100-continue")
    }
}

impl fmt::Debug for Head<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Head")
            .field("method", &self.method)
            .field("path", &self.path)
            .field("query_bytes", &self.query.map(str::len))
            .field("host", &self.host)
            .field("body", &self.body)
            .field("fields", &self.fields.len())
            .finish_non_exhaustive()
    }
}

/// Makes a head of its parts: everything that needs more than one byte to judge.
fn understand<'b>(method: &'b str, target: &'b str, fields: Vec<Field<'b>>) -> Result<Head<'b>, HeadError> {
    let mut head = Head {
        method,
        path: target,
        query: None,
        target_form: TargetForm::Origin,
        host: "",
        keep_alive: true,
        body: BodyLength::None,
        fields,
    };
    for name in SINGLETONS {
        if head.all(name).nth(1).is_some() {
            return Err(HeadError::Repeated { name });
        }
    }
    head.body = body_length(&head)?;
    // RFC 9112 3.2: a request without exactly one valid Host is refused, whatever its target says.
    head.host = head.one("host")?.ok_or(HeadError::HostMissing)?;
    if !is_authority(head.host) {
        return Err(HeadError::HostInvalid);
    }
    if method == "CONNECT" {
        return Err(HeadError::Connect);
    }
    let path_and_query = if target.starts_with('/') {
        target
    } else if target == "*" && method == "OPTIONS" {
        head.target_form = TargetForm::Asterisk;
        target
    } else {
        let (authority, rest) = split_absolute(target).ok_or(HeadError::Target)?;
        if !is_authority(authority) {
            return Err(HeadError::HostInvalid);
        }
        head.target_form = TargetForm::Absolute;
        // RFC 9112 3.2.2: the authority of an absolute target is what counts, Host is ignored.
        head.host = authority;
        rest
    };
    let (path, query) = match path_and_query.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (path_and_query, None),
    };
    // RFC 9112 3.2.4: OPTIONS of an absolute URL without a path asks about the server as a whole.
    let empty_path = if method == "OPTIONS" && query.is_none() { "*" } else { "/" };
    head.path = if path.is_empty() { empty_path } else { path };
    head.query = query;
    head.keep_alive = !head.has_token("connection", "close");
    Ok(head)
}

/// Splits `http://authority/path?query` behind the authority.
fn split_absolute(target: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = target.split_once("://")?;
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return None;
    }
    Some(rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len())))
}

/// RFC 9112 section 6.3 as a server must read it: where there is doubt about the end of a body there is no request.
fn body_length(head: &Head<'_>) -> Result<BodyLength, HeadError> {
    let length = head.all("content-length").next();
    if head.all("transfer-encoding").next().is_none() {
        let Some(value) = length else {
            return Ok(BodyLength::None);
        };
        return parse_content_length(value).map(BodyLength::Length).ok_or(HeadError::ContentLength);
    }
    if length.is_some() {
        return Err(HeadError::LengthAndCoding);
    }
    let is_chunked = |coding: &str| coding.eq_ignore_ascii_case("chunked");
    let mut known = true;
    let mut chunked_at = None;
    let mut count = 0usize;
    for coding in head.list("transfer-encoding") {
        // The registered codings are known to be well-framed only under a last `chunked`; others are not known at all.
        known &= ["chunked", "gzip", "x-gzip", "deflate", "compress", "x-compress", "identity"]
            .iter()
            .any(|registered| coding.eq_ignore_ascii_case(registered));
        if is_chunked(coding) && chunked_at.replace(count).is_some() {
            return Err(HeadError::ChunkedNotLast);
        }
        count += 1;
    }
    match chunked_at {
        Some(0) if count == 1 => Ok(BodyLength::Chunked),
        Some(place) if place + 1 == count => Err(HeadError::UnknownCoding),
        None if !known => Err(HeadError::UnknownCoding),
        Some(_) | None => Err(HeadError::ChunkedNotLast),
    }
}

/// What follows the empty lines that may stand before a request line.
fn after_empty_lines(mut bytes: &[u8]) -> &[u8] {
    for _ in 0..EMPTY_LINES_MAX {
        bytes = bytes.strip_prefix(b"\r\n").unwrap_or(bytes);
    }
    bytes
}

fn each_line_ends_in_crlf(head: &[u8]) -> bool {
    memchr::memchr_iter(b'\n', head).all(|at| at.checked_sub(1).and_then(|before| head.get(before)) == Some(&b'\r'))
}

/// The first byte of a head, complete or not, that cannot stand at its place. What comes after it is not looked at.
fn first_fault(head: &[u8]) -> Result<(), HeadError> {
    match request_line_fault(head)? {
        Some(fields) => fields_fault(fields),
        None => Ok(()),
    }
}

/// Looks for a fault in the request line; what follows the line, where it is whole.
fn request_line_fault(line: &[u8]) -> Result<Option<&[u8]>, HeadError> {
    match line {
        [b'\r'] => return Ok(None),
        [b'\r', b'\n', ..] => return Err(HeadError::RequestLine),
        [b'\r', ..] => return Err(HeadError::BareCarriageReturn),
        [b'\n', ..] => return Err(HeadError::BareLineFeed),
        _ => {}
    }
    let Some(method_end) = line.iter().position(|&b| !is_token_byte(b)) else {
        return Ok(None);
    };
    let rest = match line.get(method_end..) {
        Some([b' ', rest @ ..]) if method_end > 0 => rest,
        _ => return Err(HeadError::Method),
    };
    let rest = match rest.iter().take(TARGET_BYTES_MAX + 1).position(|&b| !is_target_byte(b)) {
        Some(0) => return Err(HeadError::Target),
        Some(end) => match rest.get(end..) {
            Some([b' ', rest @ ..]) => rest,
            _ => return Err(HeadError::Target),
        },
        None if rest.len() > TARGET_BYTES_MAX => return Err(HeadError::TargetTooLong { limit: TARGET_BYTES_MAX }),
        None => return Ok(None),
    };
    for (place, &wanted) in b"HTTP/1.1\r\n".iter().enumerate() {
        match rest.get(place) {
            None => return Ok(None),
            Some(&found) if found == wanted => {}
            Some(b'0'..=b'9') if place == 5 || place == 7 => return Err(HeadError::Version),
            Some(b'\n') if place == 8 => return Err(HeadError::BareLineFeed),
            Some(_) if place == 9 => return Err(HeadError::BareCarriageReturn),
            Some(_) => return Err(HeadError::RequestLine),
        }
    }
    Ok(rest.get(10..))
}

/// Looks for a fault in the lines behind a request line, up to the empty one.
fn fields_fault(mut rest: &[u8]) -> Result<(), HeadError> {
    for count in 0.. {
        match rest {
            [] | [b'\r'] | [b'\r', b'\n', ..] => return Ok(()),
            [b'\r', ..] => return Err(HeadError::BareCarriageReturn),
            [b'\n', ..] => return Err(HeadError::BareLineFeed),
            [b' ' | b'\t', ..] => return Err(HeadError::FoldedField),
            _ if count == HEADERS_MAX => return Err(HeadError::TooManyFields { limit: HEADERS_MAX }),
            _ => {}
        }
        let Some(name_end) = rest.iter().position(|&b| !is_token_byte(b)) else {
            return Ok(());
        };
        let value = match rest.get(name_end..) {
            Some([b':', value @ ..]) if name_end > 0 => value,
            Some([b' ' | b'\t', ..]) => return Err(HeadError::SpaceBeforeColon),
            _ => return Err(HeadError::FieldName),
        };
        let Some(value_end) = value.iter().position(|&b| !is_value_byte(b)) else {
            return Ok(());
        };
        rest = match value.get(value_end..) {
            Some([b'\r', b'\n', rest @ ..]) => rest,
            Some([b'\r']) => return Ok(()),
            Some([b'\r', ..]) => return Err(HeadError::BareCarriageReturn),
            Some([b'\n', ..]) => return Err(HeadError::BareLineFeed),
            _ => return Err(HeadError::FieldValue),
        };
    }
    Ok(())
}

/// `tchar` of RFC 9110 section 5.6.2.
pub(crate) const fn is_token_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric()
        || matches!(
            b,
            b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
        )
}

/// Whether `text` is a token of RFC 9110 section 5.6.2.
pub(crate) fn is_token(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|&b| is_token_byte(b))
}

/// A byte of a field's value: white space, visible, or obs-text (RFC 9110 section 5.5).
pub(crate) const fn is_value_byte(b: u8) -> bool {
    matches!(b, b'\t' | b' '..=0x7e | 0x80..)
}

/// Visible ASCII but `#`. Browsers leave characters such as `|` and `{` in a query that RFC 3986 would have encoded.
pub(crate) const fn is_target_byte(b: u8) -> bool {
    matches!(b, b'!'..=b'~') && b != b'#'
}

/// Whether `text` is `host [":" port]` of RFC 3986 section 3.2 with a host that is not empty and no user.
pub(crate) fn is_authority(text: &str) -> bool {
    let (host_is_good, port) = if let Some(literal) = text.strip_prefix('[') {
        match literal.split_once(']') {
            Some((address, "")) => (address.parse::<Ipv6Addr>().is_ok(), ""),
            Some((address, rest)) => match rest.strip_prefix(':') {
                Some(port) => (address.parse::<Ipv6Addr>().is_ok(), port),
                None => return false,
            },
            None => return false,
        }
    } else {
        let (host, port) = text.split_once(':').unwrap_or((text, ""));
        (is_registered_name(host), port)
    };
    let port_is_good = port.is_empty() || (port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok());
    host_is_good && port_is_good
}

/// `reg-name` of RFC 3986 section 3.2.2, which holds the IPv4 addresses, and is not empty here.
fn is_registered_name(host: &str) -> bool {
    let mut bytes = host.bytes();
    while let Some(b) = bytes.next() {
        let good = match b {
            b'%' => {
                bytes.next().is_some_and(|h| h.is_ascii_hexdigit())
                    && bytes.next().is_some_and(|l| l.is_ascii_hexdigit())
            }
            b'-' | b'.' | b'_' | b'~' => true,
            b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=' => true,
            _ => b.is_ascii_alphanumeric(),
        };
        if !good {
            return false;
        }
    }
    !host.is_empty()
}

/// The parts of `value` between `separator`s that stand outside quoted strings, trimmed; empty ones are left out.
pub(crate) fn elements(value: &[u8], separator: u8) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(value);
    std::iter::from_fn(move || {
        loop {
            let text = rest?;
            let end = unquoted_position(text, separator);
            let (element, after) = match end.and_then(|at| text.split_at_checked(at)) {
                Some((element, after)) => (element, after.get(1..)),
                None => (text, None),
            };
            rest = after;
            let element = element.trim_ascii();
            if !element.is_empty() {
                return Some(element);
            }
        }
    })
}

/// Where `wanted` first stands outside a quoted string (RFC 9110 section 5.6.4).
fn unquoted_position(text: &[u8], wanted: u8) -> Option<usize> {
    let mut quoted = false;
    let mut escaped = false;
    text.iter().position(|&b| {
        if escaped {
            escaped = false;
            return false;
        }
        match b {
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ => return !quoted && b == wanted,
        }
        false
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::*;

    /// The head of a GET with these further lines.
    pub(crate) fn get(lines: &str) -> String {
        format!("GET /v1/streams/leads?since=k-1 HTTP/1.1\r\nHost: live.example:8080\r\n{lines}\r\n")
    }

    pub(crate) fn parsed(text: &str) -> Head<'_> {
        let (head, len) = parse_head(text.as_bytes(), 1 << 16).expect("a good head").expect("a whole head");
        assert_eq!(len, text.len());
        head
    }

    fn refused(text: &str) -> HeadError {
        refused_bytes(text.as_bytes())
    }

    /// The error of a head, which must be the same for every beginning of it that is long enough to show it.
    fn refused_bytes(bytes: &[u8]) -> HeadError {
        let error = parse_head(bytes, 1 << 16).expect_err("a bad head");
        check_every_beginning(bytes, 1 << 16);
        error
    }

    fn check_every_beginning(bytes: &[u8], bytes_max: usize) {
        let whole = parse_head(bytes, bytes_max);
        let mut decided = false;
        for len in 0..=bytes.len() {
            match parse_head(bytes.get(..len).expect("a beginning"), bytes_max) {
                Ok(None) => assert!(!decided, "undecided again after {len} bytes"),
                early => {
                    decided = true;
                    assert_eq!(early, whole, "after {len} bytes");
                }
            }
        }
    }

    #[test]
    fn a_request_is_read_into_its_parts() {
        let text = get("X-One:  a b \r\nx-one: c\r\nAccept: text/html, ,application/json;q=\"a,b\"\r\n");
        let head = parsed(&text);
        assert_eq!((head.method, head.path, head.query), ("GET", "/v1/streams/leads", Some("since=k-1")));
        assert_eq!((head.host, head.keep_alive, head.body), ("live.example:8080", true, BodyLength::None));
        assert_eq!(head.all("X-ONE").collect::<Vec<_>>(), [&b"a b"[..], b"c"]);
        assert_eq!(head.one("x-one"), Err(HeadError::Repeated { name: "x-one" }));
        assert_eq!(head.one("x-two"), Ok(None));
        assert_eq!(head.list("accept").collect::<Vec<_>>(), ["text/html", "application/json;q=\"a,b\""]);
        check_every_beginning(text.as_bytes(), 1 << 16);
    }

    #[test]
    fn a_pipelined_request_is_left_alone() {
        let text = format!("\r\n\r\n{}GET /next", get(""));
        let (head, len) = parse_head(text.as_bytes(), 1 << 16).expect("good").expect("whole");
        assert_eq!((head.path, text.get(len..)), ("/v1/streams/leads", Some("GET /next")));
    }

    #[test]
    fn two_empty_lines_may_stand_before_a_request_and_no_third() {
        assert_eq!(refused(&format!("\r\n\r\n\r\n{}", get(""))), HeadError::RequestLine);
        assert_eq!(refused("\r\n\n"), HeadError::BareLineFeed);
        assert_eq!(refused("\rGET / HTTP/1.1\r\n"), HeadError::BareCarriageReturn);
    }

    #[test]
    fn targets_have_three_forms() {
        let absolute = "GET HTTP://API.example:81?x=1 HTTP/1.1\r\nHost: other\r\n\r\n";
        let head = parsed(absolute);
        assert_eq!((head.target_form, head.host), (TargetForm::Absolute, "API.example:81"));
        assert_eq!((head.path, head.query), ("/", Some("x=1")));
        let head = parsed("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!((head.target_form, head.path), (TargetForm::Asterisk, "*"));
        assert_eq!(parsed("OPTIONS http://a HTTP/1.1\r\nHost: a\r\n\r\n").path, "*");
        for (target, error) in [
            ("*", HeadError::Target),
            ("ftp://a/", HeadError::Target),
            ("a:80", HeadError::Target),
            ("path", HeadError::Target),
            ("/a#b", HeadError::Target),
            ("/\u{e9}", HeadError::Target),
            ("/\x7f", HeadError::Target),
            ("/a b", HeadError::RequestLine),
            ("", HeadError::Target),
            ("http:///path", HeadError::HostInvalid),
            ("http://user@a/", HeadError::HostInvalid),
        ] {
            assert_eq!(refused(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n")), error, "{target:?}");
        }
        assert_eq!(refused("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n"), HeadError::Connect);
    }

    #[test]
    fn request_lines_are_strict() {
        for (line, error) in [
            ("GET / HTTP/1.0\r\n", HeadError::Version),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", HeadError::Version),
            ("GET / HTTP/1.2\r\n", HeadError::Version),
            ("GET / http/1.1\r\n", HeadError::RequestLine),
            ("GET / HTTP/1.x\r\n", HeadError::RequestLine),
            ("GET / HTTP/1.1 \r\n", HeadError::RequestLine),
            ("GET / HTTP/1.1\n", HeadError::BareLineFeed),
            ("GET / HTTP/1.1\rX", HeadError::BareCarriageReturn),
            ("GET  / HTTP/1.1\r\n", HeadError::Target),
            ("GET /\r\n", HeadError::Target),
            ("G(T / HTTP/1.1\r\n", HeadError::Method),
            (" GET / HTTP/1.1\r\n", HeadError::Method),
            ("\u{16}\u{3}\u{1}", HeadError::Method),
        ] {
            assert_eq!(refused(line), error, "{line:?}");
        }
    }

    #[test]
    fn fields_are_strict() {
        for (lines, error) in [
            ("A : b\r\n", HeadError::SpaceBeforeColon),
            ("A\t: b\r\n", HeadError::SpaceBeforeColon),
            ("A: b\r\n c\r\n", HeadError::FoldedField),
            ("A: b\r\n\tc\r\n", HeadError::FoldedField),
            (": b\r\n", HeadError::FieldName),
            ("A b: c\r\n", HeadError::SpaceBeforeColon),
            ("A\r\n", HeadError::FieldName),
            ("A(: b\r\n", HeadError::FieldName),
            ("A: b\0c\r\n", HeadError::FieldValue),
            ("A: b\x7f\r\n", HeadError::FieldValue),
            ("A: b\rc\r\n", HeadError::BareCarriageReturn),
            ("A: b\r\r\n", HeadError::BareCarriageReturn),
            ("A: b\nC: d\r\n", HeadError::BareLineFeed),
            ("A:\nC: d\r\n", HeadError::BareLineFeed),
            ("A: b\r\n\n", HeadError::BareLineFeed),
        ] {
            assert_eq!(refused(&get(lines)), error, "{lines:?}");
        }
        assert_eq!(refused("GET / HTTP/1.1\r\n Host: a\r\n\r\n"), HeadError::FoldedField);
    }

    #[test]
    fn bytes_above_ascii_are_opaque_in_values() {
        let mut bytes = get("X: caf").into_bytes();
        bytes.truncate(bytes.len() - 2);
        bytes.extend_from_slice(b"\xe9\r\n\r\n");
        let (head, _) = parse_head(&bytes, 1 << 16).expect("good").expect("whole");
        assert_eq!(head.one("x"), Err(HeadError::NotText { name: "x" }));
        assert_eq!(head.all("x").collect::<Vec<_>>(), [b"caf\xe9"]);
        assert_eq!(head.list("x").collect::<Vec<_>>(), ["\u{fffd}"]);
    }

    #[test]
    fn there_is_one_good_host() {
        for host in ["a", "a:80", "a:", "127.0.0.1:65535", "[::1]", "[::1]:8080", "a_b.example.", "%41"] {
            assert_eq!(parsed(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).host, host);
        }
        for host in ["", "a:65536", "a:b", "a b", "a/b", "user@a", "[::1", "[::g]", "[::1]80", "a:1:2", "%4"] {
            let text = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            assert_eq!(refused(&text), HeadError::HostInvalid, "{host:?}");
        }
        assert_eq!(refused("GET / HTTP/1.1\r\n\r\n"), HeadError::HostMissing);
        let absolute = "GET http://a/ HTTP/1.1\r\n\r\n";
        assert_eq!(refused(absolute), HeadError::HostMissing, "an absolute target does not stand in for Host");
    }

    #[test]
    fn singletons_stand_once() {
        for name in SINGLETONS {
            let error = HeadError::Repeated { name };
            let text = if name == "host" {
                get("HOST: live.example:8080\r\n")
            } else {
                get(&format!("{name}: 1\r\n{name}: 1\r\n"))
            };
            assert_eq!(refused(&text), error);
            assert_eq!(error.status(), 400);
        }
    }

    #[test]
    fn the_end_of_a_body_is_never_in_doubt() {
        let body = |lines: &str| parsed(&get(lines)).body;
        assert_eq!(body("Content-Length: 007\r\n"), BodyLength::Length(7));
        assert_eq!(body("Content-Length: 99999999999999999999\r\n"), BodyLength::Length(u64::MAX));
        assert_eq!(body("Transfer-Encoding: Chunked\r\n"), BodyLength::Chunked);
        for (lines, error, status) in [
            ("Content-Length: +1\r\n", HeadError::ContentLength, 400),
            ("Content-Length: -1\r\n", HeadError::ContentLength, 400),
            ("Content-Length: 1, 1\r\n", HeadError::ContentLength, 400),
            ("Content-Length:\r\n", HeadError::ContentLength, 400),
            ("Content-Length: 0x1\r\n", HeadError::ContentLength, 400),
            ("Content-Length: 1\r\nContent-Length: 2\r\n", HeadError::Repeated { name: "content-length" }, 400),
            ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", HeadError::LengthAndCoding, 400),
            ("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n", HeadError::LengthAndCoding, 400),
            ("Transfer-Encoding: gzip, chunked\r\n", HeadError::UnknownCoding, 501),
            ("Transfer-Encoding: xchunked\r\n", HeadError::UnknownCoding, 501),
            ("Transfer-Encoding: \"chunked\"\r\n", HeadError::UnknownCoding, 501),
            ("Transfer-Encoding: chunked;a=b\r\n", HeadError::UnknownCoding, 501),
            ("Transfer-Encoding: chunked, gzip\r\n", HeadError::ChunkedNotLast, 400),
            ("Transfer-Encoding: gzip\r\n", HeadError::ChunkedNotLast, 400),
            ("Transfer-Encoding: identity\r\n", HeadError::ChunkedNotLast, 400),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", HeadError::ChunkedNotLast, 400),
            ("Transfer-Encoding:\r\n", HeadError::ChunkedNotLast, 400),
        ] {
            assert_eq!(refused(&get(lines)), error, "{lines:?}");
            assert_eq!(error.status(), status, "{lines:?}");
        }
    }

    #[test]
    fn a_head_may_have_as_many_bytes_as_allowed_and_not_one_more() {
        let text = get("");
        assert!(parse_head(text.as_bytes(), text.len()).expect("at the limit").is_some());
        let limit = text.len() - 1;
        assert_eq!(parse_head(text.as_bytes(), limit), Err(HeadError::TooLarge { limit }));
        check_every_beginning(text.as_bytes(), limit);
        assert_eq!(HeadError::TooLarge { limit }.status(), 431);
    }

    #[test]
    fn a_target_may_have_8_kib_and_not_one_byte_more() {
        let with = |bytes: usize| format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(bytes - 1));
        assert_eq!(parsed(&with(TARGET_BYTES_MAX)).path.len(), TARGET_BYTES_MAX);
        let error = HeadError::TargetTooLong { limit: TARGET_BYTES_MAX };
        let text = with(TARGET_BYTES_MAX + 1);
        assert_eq!(parse_head(text.as_bytes(), 1 << 16), Err(error));
        let shown_at = "GET ".len() + TARGET_BYTES_MAX;
        assert_eq!(parse_head(text.as_bytes().get(..shown_at).expect("long"), 1 << 16), Ok(None));
        assert_eq!(parse_head(text.as_bytes().get(..=shown_at).expect("long"), 1 << 16), Err(error));
        assert_eq!(error.status(), 414);
    }

    #[test]
    fn there_may_be_64_fields_and_not_one_more() {
        let with = |count: usize| get(&"A: b\r\n".repeat(count - 1));
        assert_eq!(parsed(&with(HEADERS_MAX)).all("a").count(), HEADERS_MAX - 1);
        let error = HeadError::TooManyFields { limit: HEADERS_MAX };
        assert_eq!(refused(&with(HEADERS_MAX + 1)), error);
        assert_eq!(error.status(), 431);
    }

    #[test]
    fn a_connection_goes_on_unless_told_otherwise() {
        assert!(parsed(&get("Connection: keep-alive, Upgrade\r\n")).keep_alive);
        assert!(!parsed(&get("Connection: upgrade\r\nconnection: x, CLOSE\r\n")).keep_alive);
    }

    #[test]
    fn only_a_request_with_a_body_waits_for_continue() {
        assert!(parsed(&get("Expect: 100-Continue\r\nContent-Length: 1\r\n")).expects_continue());
        assert!(!parsed(&get("Expect: 100-continue\r\n")).expects_continue());
    }

    #[test]
    fn a_head_printed_for_debugging_shows_no_secret() {
        let text = get("Authorization: Bearer hunter2\r\nCookie: a=hunter2\r\n");
        let shown = format!("{:?}", parsed(&text));
        assert!(!shown.contains("hunter2") && !shown.contains("since"), "{shown}");
    }

    proptest! {
        #[test]
        fn any_split_of_a_broken_head_is_judged_alike(at in 0usize..300, byte in any::<u8>(), insert in any::<bool>()) {
            let lines = "Connection: Upgrade\r\nX:\r\nTransfer-Encoding: chunked\r\nCookie: a=b; c=\"d\"\r\n";
            let mut bytes = format!("\r\n{}POST", get(lines)).into_bytes();
            let at = at % bytes.len();
            if insert {
                bytes.insert(at, byte);
            } else if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
            check_every_beginning(&bytes, 1 << 16);
            check_every_beginning(&bytes, bytes.len() / 2);
        }

        #[test]
        fn what_is_understood_is_what_was_written(
            path in "/[a-z0-9%/._~-]{0,20}", query in "[!-\"$->@-~]{0,20}",
            fields in proptest::collection::vec(("[a-z][a-z-]{0,8}x", "([!-~]([ -~]{0,10}[!-~])?)?"), 0..20),
        ) {
            let mut text = format!("PUT {path}?{query} HTTP/1.1\r\nHost: h\r\n");
            for (name, value) in &fields {
                text.push_str(&format!("{name}:\t{value} \r\n"));
            }
            text.push_str("\r\n");
            let head = parsed(&text);
            prop_assert_eq!((head.path, head.query), (path.as_str(), Some(query.as_str())));
            for (name, _) in &fields {
                let written = fields.iter().filter(|(other, _)| other == name).map(|(_, value)| value.as_bytes());
                prop_assert!(head.all(name).eq(written));
            }
        }
    }
}
