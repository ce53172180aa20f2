//! Request headers that a caller may choose: none that frame the request, route it, or speak for somebody else.
//!
//! Source: RFC 9110 sections 5.5, 5.6.2 and 7.6.1 (fields of one connection); RFC 7239 and its forerunners; the Fetch
//! standard's forbidden request-headers; what clouds' metadata services ask for.
//! Memory: constants. Errors: [`HeaderFault`]; no value is ever part of one.
//! Not here: the headers of the operator's file (`config`), how a request is written (`codec::http_response`).

use crate::codec::http_response::{RequestError, check_header};
use crate::limits::{DIRECT_HEADER_BYTES_MAX, DIRECT_HEADERS_BYTES_MAX, DIRECT_HEADERS_MAX, HEADER_NAME_BYTES_MAX};

/// Why a caller may not set a header.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HeaderFault {
    /// Not a token of RFC 9110, or too long.
    #[error("the name is no header name of at most {HEADER_NAME_BYTES_MAX} bytes")]
    Name,
    /// A control character, such as the end of a line.
    #[error("the value holds a control character")]
    Value,
    /// Too long a value.
    #[error("the value is over {DIRECT_HEADER_BYTES_MAX} bytes")]
    TooLong,
    /// More headers than a caller may give.
    #[error("more than {DIRECT_HEADERS_MAX} headers, or over {DIRECT_HEADERS_BYTES_MAX} bytes of them")]
    TooMany,
    /// The same name twice.
    #[error("the same header twice")]
    Repeated,
    /// It frames the request or belongs to one connection.
    #[error("the header frames the message or belongs to the connection")]
    Framing,
    /// It decides where the request goes or what is done with it.
    #[error("the header routes the request")]
    Routing,
    /// It says who asks, as a proxy or a browser would.
    #[error("the header speaks for a proxy, a browser or a user")]
    Impersonation,
    /// `Cookie`, where the operator has not allowed it.
    #[error("cookies are not allowed (`direct.cookies`)")]
    Cookie,
    /// What a metadata service asks for, so that a forged request would be believed.
    #[error("the header opens a cloud's metadata service")]
    Metadata,
}

const FRAMING: &[&str] = &[
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-range",
    "expect",
    "host",
    "http2-settings",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "keep-alive",
    "range",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];
const ROUTING: &[&str] = &[
    "alt-used",
    "max-forwards",
    "proxy", // RFC 3875 section 4.1.18 would make HTTP_PROXY of it
    "x-host",
    "x-http-host-override",
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
    "x-rewrite-url",
];
const ROUTING_PREFIXES: &[&str] = &["proxy-", "x-envoy-", "x-middleware-", "x-original-"];
const IMPERSONATION: &[&str] = &[
    "cf-connecting-ip",
    "cf-connecting-ipv6",
    "client-ip",
    "fastly-client-ip",
    "fly-client-ip",
    "forwarded",
    "origin",
    "referer",
    "remote-addr",
    "remote-user",
    "set-cookie",
    "set-cookie2",
    "true-client-ip",
    "via",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-real-ip",
];
/// The last ones are how proxies that sign users in tell the application who it is.
const IMPERSONATION_PREFIXES: &[&str] = &[
    "access-control-",
    "sec-",
    "x-forwarded-",
    "x-ssl-client-",
    "x-amzn-oidc-",
    "x-appengine-",
    "x-auth-request-",
    "x-authenticated-",
    "x-goog-authenticated-",
    "x-goog-iap-",
    "x-ms-client-principal",
    "x-remote-",
    "x-webauth-",
];
const METADATA: &[&str] = &[
    "metadata",
    "metadata-flavor",
    "metadata-token",
    "metadata-token-ttl-seconds",
    "x-google-metadata-request",
    "x-metadata-token",
];
const METADATA_PREFIXES: &[&str] = &["x-aws-ec2-metadata-"];

/// Whether a caller may set this header; `Cookie` where `cookies` are allowed.
///
/// # Errors
/// [`HeaderFault`].
pub(super) fn check(name: &str, value: &[u8], cookies: bool) -> Result<(), HeaderFault> {
    if name.len() > HEADER_NAME_BYTES_MAX {
        return Err(HeaderFault::Name);
    }
    // Gateways that make variables of headers (RFC 3875 section 4.1.18) take `_` and `-` for the same.
    let folded = name.to_ascii_lowercase().replace('_', "-");
    let is = |list: &[&str]| list.contains(&folded.as_str());
    let begins = |list: &[&str]| list.iter().any(|prefix| folded.starts_with(prefix));
    if is(FRAMING) {
        return Err(HeaderFault::Framing);
    }
    if is(ROUTING) || begins(ROUTING_PREFIXES) {
        return Err(HeaderFault::Routing);
    }
    if is(IMPERSONATION) || begins(IMPERSONATION_PREFIXES) || folded == "x-forwarded" {
        return Err(HeaderFault::Impersonation);
    }
    if is(METADATA) || begins(METADATA_PREFIXES) {
        return Err(HeaderFault::Metadata);
    }
    if matches!(folded.as_str(), "cookie" | "cookie2") && !cookies {
        return Err(HeaderFault::Cookie);
    }
    if value.len() > DIRECT_HEADER_BYTES_MAX {
        return Err(HeaderFault::TooLong);
    }
    // The very rules by which the request is written.
    check_header(name, value).map_err(|error| match error {
        RequestError::HeaderValue => HeaderFault::Value,
        RequestError::Reserved => HeaderFault::Framing,
        _ => HeaderFault::Name,
    })
}

/// The same of all headers of a request together.
///
/// # Errors
/// [`HeaderFault`] of the first that is refused.
pub(super) fn check_all<'h>(
    headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    cookies: bool,
) -> Result<(), HeaderFault> {
    let (mut bytes, mut names) = (0usize, Vec::<&str>::new());
    for (name, value) in headers {
        bytes = bytes.saturating_add(name.len()).saturating_add(value.len());
        if names.len() >= DIRECT_HEADERS_MAX || bytes > DIRECT_HEADERS_BYTES_MAX {
            return Err(HeaderFault::TooMany);
        }
        check(name, value, cookies)?;
        if names.iter().any(|other| other.eq_ignore_ascii_case(name)) {
            return Err(HeaderFault::Repeated);
        }
        names.push(name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_frames_routes_or_impersonates_is_refused_however_it_is_spelled() {
        for (names, fault) in [
            (FRAMING, HeaderFault::Framing),
            (ROUTING, HeaderFault::Routing),
            (IMPERSONATION, HeaderFault::Impersonation),
            (METADATA, HeaderFault::Metadata),
            (
                &["proxy-authorization", "proxy-connection", "x-original-url", "x-envoy-original-dst-host"][..],
                HeaderFault::Routing,
            ),
            (
                &["x-forwarded-for", "x-forwarded", "sec-fetch-site", "x-remote-user", "x-ms-client-principal-id"],
                HeaderFault::Impersonation,
            ),
            (&["x-aws-ec2-metadata-token", "x-aws-ec2-metadata-token-ttl-seconds"], HeaderFault::Metadata),
            (&["cookie", "cookie2"], HeaderFault::Cookie),
        ] {
            for name in names {
                for name in [(*name).to_owned(), name.to_uppercase(), name.replace('-', "_")] {
                    assert_eq!(check(&name, b"a", false), Err(fault), "{name}");
                }
            }
        }
    }

    #[test]
    fn what_apis_ask_for_may_be_set() {
        for name in [
            "Authorization",
            "X-Api-Key",
            "Accept",
            "Accept-Language",
            "User-Agent",
            "Content-Type",
            "X-Request-Id",
            "api_key",
            "Prefer",
            "Cache-Control",
            "X-Forward",
            "Security",
            "Viaduct",
            "X-Metadata",
            "Hosting",
        ] {
            assert_eq!(check(name, b"a value, with \"quotes\"; \xc3\xa9", false), Ok(()), "{name}");
        }
        assert_eq!(check("Cookie", b"a=b", true), Ok(()));
    }

    #[test]
    fn names_and_values_cannot_end_the_line() {
        for name in ["", "a b", "a:", "a\r\nb", "a\0", "é", ":authority", "(a)"] {
            assert_eq!(check(name, b"a", false), Err(HeaderFault::Name), "{name:?}");
        }
        for value in [&b"a\r\nb: c"[..], b"a\nb", b"a\rb", b"\0", b"\x7f", b"a\x0bb", b"\x1b[0m"] {
            assert_eq!(check("X-A", value, false), Err(HeaderFault::Value), "{value:?}");
        }
    }

    #[test]
    fn headers_are_bounded() {
        let long = vec![b'a'; DIRECT_HEADER_BYTES_MAX + 1];
        assert_eq!(check("X", &long[1..], false), Ok(()));
        assert_eq!(check("X", &long, false), Err(HeaderFault::TooLong));
        let name = "n".repeat(HEADER_NAME_BYTES_MAX + 1);
        assert_eq!(check(&name[1..], b"", false), Ok(()));
        assert_eq!(check(&name, b"", false), Err(HeaderFault::Name));
        let names: Vec<String> = (0..=DIRECT_HEADERS_MAX).map(|n| format!("X-{n}")).collect();
        let all = |count: usize| check_all(names.iter().take(count).map(|name| (name.as_str(), &b"a"[..])), false);
        assert_eq!(all(DIRECT_HEADERS_MAX), Ok(()));
        assert_eq!(all(DIRECT_HEADERS_MAX + 1), Err(HeaderFault::TooMany));
        let value = &long[1..];
        let fill = |count: usize| check_all(names.iter().take(count).map(|name| (name.as_str(), value)), false);
        assert_eq!(fill(1), Ok(()));
        assert_eq!(fill(DIRECT_HEADERS_BYTES_MAX / DIRECT_HEADER_BYTES_MAX + 1), Err(HeaderFault::TooMany));
        assert_eq!(check_all([("X-A", &b"1"[..]), ("x-a", b"2")], false), Err(HeaderFault::Repeated));
        assert_eq!(check_all([("X-A", &b"1"[..]), ("Host", b"2")], false), Err(HeaderFault::Framing));
    }
}
