//! Requests to upstreams -> bytes.
//!
//! Source: RFC 9112 section 3, RFC 9110.
//! Memory: written straight into the caller's buffer.
//! Errors: [`RequestError`], before anything is sent; no value is ever part of one.  Not here: which headers a caller may
//! choose (`direct` mode), URLs.

use crate::codec::http::{is_authority, is_target_byte, is_token, is_value_byte};

/// What a request says of its sender.
const USER_AGENT: &str = concat!("restcast/", env!("CARGO_PKG_VERSION"));

/// Fields that this module writes, or that would change how the message or its answer is framed.
const RESERVED: [&str; 16] = [
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "accept-encoding",
    "if-none-match",
    "if-modified-since",
    "if-match",
    "if-range",
    "range",
];

/// A request to an upstream, but for the headers of the configuration. Not `Debug`: target and body may hold secrets.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// The method, a token.
    pub method: &'a str,
    /// Host, and the port where it is not the scheme's own: the value of `Host`.
    pub authority: &'a str,
    /// Path and query, as they are sent.
    pub target: &'a str,
    /// Sent as `If-None-Match`.
    pub if_none_match: Option<&'a [u8]>,
    /// Sent as `If-Modified-Since`.
    pub if_modified_since: Option<&'a [u8]>,
    /// The body; `Content-Type: application/json` unless the headers say otherwise.
    pub body: Option<&'a [u8]>,
}

/// Why a request was not written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// The method is no token.
    #[error("the method is not a token")]
    Method,
    /// The target does not begin with `/`, or holds a space, a control character, `#` or non-ASCII.
    #[error("the request target is not an encoded path and query")]
    Target,
    /// The authority is no `host[:port]`.
    #[error("the authority is not host[:port]")]
    Authority,
    /// A header's name is no token.
    #[error("a header's name is not a token")]
    HeaderName,
    /// A header's value holds a control byte.
    #[error("a header's value holds a control byte")]
    HeaderValue,
    /// A header that is not the configuration's to set.
    #[error("a header of the message's framing or condition cannot be set")]
    Reserved,
}

/// Whether a request may carry this header: what [`write_request`] asks of each.
///
/// # Errors
/// [`RequestError::HeaderName`], [`RequestError::HeaderValue`], [`RequestError::Reserved`].
pub fn check_header(name: &str, value: &[u8]) -> Result<(), RequestError> {
    if !is_token(name.as_bytes()) {
        return Err(RequestError::HeaderName);
    }
    if RESERVED.iter().any(|reserved| name.eq_ignore_ascii_case(reserved)) {
        return Err(RequestError::Reserved);
    }
    if !value.iter().all(|&b| is_value_byte(b)) {
        return Err(RequestError::HeaderValue);
    }
    Ok(())
}

/// Appends a request to `out`: `Host`, the given headers, then `User-Agent`, `Accept`, `Accept-Encoding`, conditions,
/// `Content-Type` and `Content-Length`. A given `User-Agent`, `Accept` or `Content-Type` stands for the one written here.
///
/// # Errors
/// [`RequestError`]; `out` is then as it was.
pub fn write_request<'h>(
    out: &mut Vec<u8>,
    request: &Request<'_>,
    headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
) -> Result<(), RequestError> {
    let before = out.len();
    let written = append(out, request, headers);
    if written.is_err() {
        out.truncate(before);
    }
    written
}

fn append<'h>(
    out: &mut Vec<u8>,
    request: &Request<'_>,
    headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
) -> Result<(), RequestError> {
    if !is_token(request.method.as_bytes()) {
        return Err(RequestError::Method);
    }
    if !request.target.starts_with('/') || !request.target.bytes().all(is_target_byte) {
        return Err(RequestError::Target);
    }
    if !is_authority(request.authority) {
        return Err(RequestError::Authority);
    }
    for part in [request.method, " ", request.target, " HTTP/1.1\r\nHost: ", request.authority, "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    let mut ours = [
        ("User-Agent", Some(USER_AGENT)),
        ("Accept", Some("application/json")),
        ("Content-Type", request.body.map(|_| "application/json")),
    ];
    for (name, value) in headers {
        check_header(name, value)?;
        if let Some((_, default)) = ours.iter_mut().find(|(own, _)| own.eq_ignore_ascii_case(name)) {
            *default = None;
        }
        push(out, name, value);
    }
    for (name, value) in ours {
        if let Some(value) = value {
            push(out, name, value.as_bytes());
        }
    }
    push(out, "Accept-Encoding", b"gzip, deflate");
    for (name, value) in [("If-None-Match", request.if_none_match), ("If-Modified-Since", request.if_modified_since)] {
        if let Some(value) = value {
            if !value.iter().all(|&b| is_value_byte(b)) {
                return Err(RequestError::HeaderValue);
            }
            push(out, name, value);
        }
    }
    // RFC 9110 8.6: a method that means a body says its length even where that is zero.
    let means_body = matches!(request.method, "POST" | "PUT" | "PATCH");
    if means_body || request.body.is_some() {
        let length = request.body.map_or(0, <[u8]>::len);
        push(out, "Content-Length", length.to_string().as_bytes());
    }
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(request.body.unwrap_or_default());
    Ok(())
}

fn push(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: Request<'_> = Request {
        method: "GET",
        authority: "api.example:8443",
        target: "/leads?key=k",
        if_none_match: None,
        if_modified_since: None,
        body: None,
    };

    fn written(request: &Request<'_>, headers: &[(&str, &str)]) -> Result<String, RequestError> {
        let mut out = b"before".to_vec();
        let headers = headers.iter().map(|(name, value)| (*name, value.as_bytes()));
        let result = write_request(&mut out, request, headers);
        let text = String::from_utf8(out).expect("text");
        if result.is_err() {
            assert_eq!(text, "before", "a request that is refused leaves nothing behind");
        }
        result.map(|()| text.trim_start_matches("before").to_owned())
    }

    #[test]
    fn a_poll_is_a_conditional_get() {
        let request = Request { if_none_match: Some(b"W/\"a\""), if_modified_since: Some(b"yesterday"), ..GET };
        let agent = format!("User-Agent: restcast/{}\r\n", env!("CARGO_PKG_VERSION"));
        assert_eq!(
            written(&request, &[("X-Api-Key", "k")]).expect("good"),
            format!(
                "GET /leads?key=k HTTP/1.1\r\nHost: api.example:8443\r\nX-Api-Key: k\r\n{agent}Accept: application/json\r\n\
                 Accept-Encoding: gzip, deflate\r\nIf-None-Match: W/\"a\"\r\nIf-Modified-Since: yesterday\r\n\r\n"
            )
        );
    }

    #[test]
    fn a_post_is_counted_and_its_headers_may_be_chosen() {
        let request = Request { method: "POST", body: Some(b"<a/>"), ..GET };
        let headers = [("content-type", "text/xml"), ("ACCEPT", "text/json"), ("User-agent", "me")];
        assert_eq!(
            written(&request, &headers).expect("good"),
            "POST /leads?key=k HTTP/1.1\r\nHost: api.example:8443\r\ncontent-type: text/xml\r\nACCEPT: text/json\r\n\
             User-agent: me\r\nAccept-Encoding: gzip, deflate\r\nContent-Length: 4\r\n\r\n<a/>"
        );
        let json = written(&Request { method: "POST", body: Some(b"{}"), ..GET }, &[]).expect("good");
        assert!(json.contains("\r\nContent-Type: application/json\r\n"));
        let empty = written(&Request { method: "POST", ..GET }, &[]).expect("good");
        assert!(empty.contains("\r\nContent-Length: 0\r\n") && !empty.contains("Content-Type"));
    }

    #[test]
    fn nothing_can_be_smuggled_into_a_request() {
        for (request, error) in [
            (Request { method: "GET / HTTP/1.1\r\n", ..GET }, RequestError::Method),
            (Request { method: "", ..GET }, RequestError::Method),
            (Request { target: "/a b", ..GET }, RequestError::Target),
            (Request { target: "/a\r\nX: y", ..GET }, RequestError::Target),
            (Request { target: "/a#b", ..GET }, RequestError::Target),
            (Request { target: "a", ..GET }, RequestError::Target),
            (Request { target: "", ..GET }, RequestError::Target),
            (Request { authority: "a\r\nX: y", ..GET }, RequestError::Authority),
            (Request { authority: "u:p@a", ..GET }, RequestError::Authority),
            (Request { authority: "", ..GET }, RequestError::Authority),
            (Request { if_none_match: Some(b"\"a\"\r\nX: y"), ..GET }, RequestError::HeaderValue),
            (Request { if_modified_since: Some(b"\n"), ..GET }, RequestError::HeaderValue),
        ] {
            assert_eq!(written(&request, &[]), Err(error), "{error}");
        }
        for (name, value, error) in [
            ("X\r\nY", "a", RequestError::HeaderName),
            ("X:", "a", RequestError::HeaderName),
            ("", "a", RequestError::HeaderName),
            ("X", "a\r\nY: b", RequestError::HeaderValue),
            ("X", "a\n", RequestError::HeaderValue),
            ("X", "\0", RequestError::HeaderValue),
        ] {
            assert_eq!(written(&GET, &[("A", "b"), (name, value)]), Err(error), "{name:?} {value:?}");
        }
        for name in RESERVED {
            assert_eq!(check_header(&name.to_uppercase(), b"a"), Err(RequestError::Reserved), "{name}");
        }
        assert_eq!(check_header("Authorization", b"Bearer \xe9"), Ok(()));
    }
}
