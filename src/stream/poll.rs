//! When to poll an upstream, and what to make of its answer. (being built: `Poller`)
//!
//! The shell carries out a [`FetchRequest`] and brings back a [`FetchResult`]; all judgement is here.

use std::sync::Arc;
use std::time::Duration;

use url::Url;

use crate::time::WallTime;

/// A filled-in upstream request: what one stream polls. Two callers share a stream only if theirs are equal.
#[derive(Debug)]
pub struct Target {
    /// The stream's configuration: method, headers, time-outs, limits, CA.
    pub options: Arc<super::Options>,
    /// The URL, placeholders filled.
    pub url: Url,
    /// The body, placeholders filled.
    pub body: Option<Arc<[u8]>>,
}

/// What the upstream gave to tell its next answer from this one (RFC 9110 section 8.8), byte for byte.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Validators {
    /// `ETag`, sent back as `If-None-Match`.
    pub etag: Option<Box<[u8]>>,
    /// `Last-Modified`, sent back as `If-Modified-Since`.
    pub last_modified: Option<Box<[u8]>>,
}

/// One poll, to be carried out by the shell.
#[derive(Clone, Debug)]
pub struct FetchRequest {
    /// What to ask for.
    pub target: Arc<Target>,
    /// What to make it conditional on.
    pub validators: Validators,
}

/// How a poll went.
pub type FetchResult = Result<FetchResponse, FetchError>;

/// An upstream's whole answer, whatever its status.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FetchResponse {
    /// Its status code.
    pub status: u16,
    /// Its validators.
    pub validators: Validators,
    /// `Retry-After`, both forms, as a time to wait.
    pub retry_after: Option<Duration>,
    /// The body, transfer and content codings undone; empty unless the status is 2xx.
    pub body: Vec<u8>,
    /// When its head was received.
    pub received: WallTime,
}

/// Why there is no answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FetchError {
    /// The stable code.
    pub code: UpstreamCode,
    /// What happened, for the operator's log. Never holds a URL's query, a header's value or a body.
    pub detail: String,
}

/// The stable codes of `stream_status` (protocol section 3).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum UpstreamCode {
    /// A time-out: connect, first byte or whole exchange.
    Timeout,
    /// No connection: refused, reset, no route.
    Unreachable,
    /// The name does not resolve.
    Dns,
    /// The TLS handshake failed: certificate, name, version.
    Tls,
    /// A status that is no value.
    Status,
    /// Not HTTP/1.1 as RFC 9112 has it, or cut short.
    Protocol,
    /// Not a JSON value as section 3 has it, or a content coding that does not decode.
    Body,
    /// Over `response_bytes_max`.
    TooLarge,
    /// 401 or 403.
    Auth,
    /// 429, or 503 with `Retry-After`.
    RateLimited,
    /// A redirect, which is not followed.
    Redirect,
    /// The target is not allowed.
    Blocked,
}

impl UpstreamCode {
    /// Every code, in the order of the protocol.
    pub const ALL: [UpstreamCode; 12] = [
        UpstreamCode::Timeout,
        UpstreamCode::Unreachable,
        UpstreamCode::Dns,
        UpstreamCode::Tls,
        UpstreamCode::Status,
        UpstreamCode::Protocol,
        UpstreamCode::Body,
        UpstreamCode::TooLarge,
        UpstreamCode::Auth,
        UpstreamCode::RateLimited,
        UpstreamCode::Redirect,
        UpstreamCode::Blocked,
    ];

    /// Its spelling on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            UpstreamCode::Timeout => "UPSTREAM_TIMEOUT",
            UpstreamCode::Unreachable => "UPSTREAM_UNREACHABLE",
            UpstreamCode::Dns => "UPSTREAM_DNS",
            UpstreamCode::Tls => "UPSTREAM_TLS",
            UpstreamCode::Status => "UPSTREAM_STATUS",
            UpstreamCode::Protocol => "UPSTREAM_PROTOCOL",
            UpstreamCode::Body => "UPSTREAM_BODY",
            UpstreamCode::TooLarge => "UPSTREAM_TOO_LARGE",
            UpstreamCode::Auth => "UPSTREAM_AUTH",
            UpstreamCode::RateLimited => "UPSTREAM_RATE_LIMITED",
            UpstreamCode::Redirect => "UPSTREAM_REDIRECT",
            UpstreamCode::Blocked => "UPSTREAM_BLOCKED",
        }
    }
}
