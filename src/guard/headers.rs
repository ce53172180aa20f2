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
    // Who asks, and from where.
    "akamai-client-ip",
    "ali-cdn-real-ip",
    "cdn-src-ip",
    "cf-connecting-ip",
    "cf-connecting-ipv6",
    "cf-ipcountry",
    "cf-pseudo-ipv4",
    "cf-visitor",
    "cf-worker",
    "client-ip",
    "do-connecting-ip",
    "early-data", // RFC 8470 section 5.1
    "fastly-client-ip",
    "fly-client-ip",
    "forwarded",
    "incap-client-ip",
    "origin",
    "referer",
    "set-cookie",
    "set-cookie2",
    "true-client-ip",
    "via",
    "x-akamai-edgescape",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-forwarded",
    "x-originating-ip",
    "x-proxyuser-ip",
    "x-real-ip",
    "x-sucuri-clientip",
    // Whom a proxy has signed in.
    "iv-creds",
    "iv-groups",
    "iv-user",
    "oam-remote-user",
    "sm-user",
    "teleport-jwt-assertion",
    "x-anonymous-consumer",
    "x-client-dn",
    "x-client-verify",
    "x-credential-identifier",
    "x-credential-username",
    "x-jwt-assertion",
    "x-ssl-cert",
];
const IMPERSONATION_PREFIXES: &[&str] = &[
    "access-control-",
    "cloudfront-",
    "fly-forwarded-",
    "sec-",
    "wl-proxy-",
    "x-arr-",
    "x-azure-",
    "x-forward-",
    "x-forwarded-",
    "x-nf-",
    "x-vercel-",
    // How proxies that sign users in tell the application who it is.
    "cf-access-",
    "client-cert", // RFC 9440
    "mellon-",
    "oidc-",
    "remote-",
    "shib-",
    "ssl-client-",
    "tailscale-",
    "x-amzn-",
    "x-apigateway-",
    "x-appengine-",
    "x-auth-request-",
    "x-authenticated-",
    "x-authentik-",
    "x-client-cert",
    "x-consumer-",
    "x-endpoint-api-",
    "x-goog-authenticated-",
    "x-goog-iap-",
    "x-ms-client-principal",
    "x-ms-token-",
    "x-pomerium-",
    "x-remote-",
    "x-ssl-client-",
    "x-vouch-",
    "x-webauth-",
];
/// What begins like those, and is what a client itself has to show to such a proxy, or to be followed by.
const CLIENTS_OWN: &[&str] = &[
    "cf-access-client-id",
    "cf-access-client-secret",
    "cf-access-token",
    "x-amzn-trace-id",
    "x-pomerium-authorization",
    "x-vercel-protection-bypass",
];
const METADATA: &[&str] = &[
    "metadata",
    "metadata-flavor",
    "metadata-token",
    "metadata-token-ttl-seconds",
    "x-google-metadata-request",
    "x-metadata-token",
];
const METADATA_PREFIXES: &[&str] = &["x-aliyun-ecs-metadata-", "x-aws-ec2-metadata-"];

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
    if is(IMPERSONATION) || (begins(IMPERSONATION_PREFIXES) && !is(CLIENTS_OWN)) {
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
            (
                &["x-aws-ec2-metadata-token", "x-aws-ec2-metadata-token-ttl-seconds", "x-aliyun-ecs-metadata-token"],
                HeaderFault::Metadata,
            ),
            (&["cookie", "cookie2"], HeaderFault::Cookie),
        ] {
            for name in names {
                for name in [(*name).to_owned(), name.to_uppercase(), name.replace('-', "_")] {
                    assert_eq!(check(&name, b"a", false), Err(fault), "{name}");
                }
            }
        }
    }

    /// What proxies in front of an application tell it of who asks, each by its name as they document it.
    #[rustfmt::skip]
    const TOLD_BY_PROXIES: &[&str] = &[
        // Who has signed in.
        "Cf-Access-Jwt-Assertion", "Cf-Access-Authenticated-User-Email", "Tailscale-User-Login", "Tailscale-User-Name",
        "Tailscale-App-Capabilities", "X-Pomerium-Jwt-Assertion", "X-Pomerium-Claim-Email", "X-Consumer-ID", "X-Consumer-Custom-ID",
        "X-Consumer-Username", "X-Consumer-Groups", "X-Credential-Identifier", "X-Anonymous-Consumer", "X-authentik-username",
        "X-authentik-groups", "X-authentik-jwt", "Remote-User", "Remote-Name", "Remote-Groups", "Remote-Email", "X-Apigateway-Api-Userinfo",
        "X-Endpoint-API-UserInfo", "X-Ms-Token-Aad-Id-Token", "X-Ms-Token-Aad-Access-Token", "X-Ms-Client-Principal", "X-Ms-Client-Principal-Id",
        "X-Amzn-Oidc-Identity", "X-Amzn-Oidc-Data", "X-Goog-IAP-JWT-Assertion", "X-Goog-Authenticated-User-Email", "X-Auth-Request-User",
        "X-Auth-Request-Email", "X-WebAuth-User", "X-Vouch-User", "OIDC_CLAIM_email", "Shib-Session-ID", "MELLON_name_id", "iv-user", "SM_USER",
        "Teleport-Jwt-Assertion", "X-Jwt-Assertion", "OAM_REMOTE_USER", "X-Remote-User", "X-Remote-Group", "X-Authenticated-Userid",
        // Which certificate was shown.
        "Client-Cert", "Client-Cert-Chain", "X-Client-Cert", "X-Client-Certificate", "X-Arr-ClientCert", "SSL_CLIENT_CERT", "Ssl-Client-Verify",
        "Ssl-Client-Subject-Dn", "X-Ssl-Client-Cn", "X-Amzn-Mtls-Clientcert", "X-Amzn-Mtls-Clientcert-Subject", "X-Forwarded-Client-Cert",
        "WL-Proxy-Client-Cert", "X-Client-DN", "X-Client-Verify",
        // From where.
        "X-Forwarded-For", "X-Forwarded-Proto", "X-Forward-For", "Forwarded", "X-Real-IP", "X-Azure-ClientIP", "X-Azure-SocketIP", "Akamai-Client-IP",
        "WL-Proxy-Client-IP", "DO-Connecting-IP", "X-Vercel-Forwarded-For", "X-Vercel-IP-Country", "X-Nf-Client-Connection-Ip", "Early-Data",
        "CF-Connecting-IP", "CF-IPCountry", "True-Client-IP", "Fastly-Client-IP", "Fly-Client-IP", "Fly-Forwarded-Port", "X-Cluster-Client-IP",
        "CloudFront-Viewer-Address", "X-AppEngine-User-IP", "Incap-Client-IP", "X-Originating-IP", "X-ProxyUser-Ip", "Remote-Addr", "Remote_Addr",
    ];

    #[test]
    fn what_a_proxy_would_tell_of_who_asks_is_not_a_callers_to_say() {
        for name in TOLD_BY_PROXIES {
            for name in [(*name).to_owned(), name.to_uppercase(), name.replace('-', "_")] {
                assert_eq!(check(&name, b"a", true), Err(HeaderFault::Impersonation), "{name}");
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
            "X-Tenant",
            "X-Tenant-Id",
            "X-User-Id",
            "X-Correlation-Id",
            "Traceparent",
            "X-B3-TraceId",
            "X-Amzn-Trace-Id",
            "X-Auth-Token",
            "X-Auth-Key",
            "X-Auth-Email",
            "X-Access-Token",
            "X-Csrf-Token",
            "X-Client-Id",
            "X-Client-Secret",
            "Client-Id",
            "X-Consumer",
            "Remote",
            "X-GitHub-Api-Version",
            "X-Amz-Date",
            "X-Amz-Security-Token",
            "X-Goog-Api-Key",
            "X-Goog-User-Project",
            "X-Ms-Version",
            "X-Ms-Date",
            "Ocp-Apim-Subscription-Key",
            "DD-API-KEY",
            "Stripe-Version",
            "Notion-Version",
            "X-Shopify-Access-Token",
            "X-Hasura-Admin-Secret",
            "CF-Access-Client-Id",
            "CF-Access-Client-Secret",
            "X-Pomerium-Authorization",
            "X-Vercel-Protection-Bypass",
            "OIDC",
            "Secret",
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
