//! Every key a configuration may have: the one list that the parser, its suggestions and the README's table read.
//!
//! Source: protocol version 1, section 7, and `restcast.example.toml`. Memory: constants.
//! Errors: none. Not here: reading values (`form`), what they mean together (`meaning`).

use std::fmt;
use std::fmt::Write as _;
use std::time::Duration;

/// One key of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct KeyDoc {
    /// Its tables and its name, `limits.connections`; a table of [`ARRAYS`] stands there once for all of its elements.
    pub path: &'static str,
    /// What its value looks like.
    pub form: Form,
    /// What it is where the file does not have it.
    pub default: Preset,
    /// What it does, for the README.
    pub meaning: &'static str,
}

/// What a value looks like, and the bounds it must keep (both inclusive).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// `true` or `false`.
    Boolean,
    /// A whole number.
    Integer {
        /// The least.
        min: u64,
        /// The greatest.
        max: u64,
    },
    /// `"250ms"`, `"5s"`, `"10m"`, `"1h"`, `"30d"`.
    Duration {
        /// The least, in milliseconds.
        min_ms: u64,
        /// The greatest, in milliseconds.
        max_ms: u64,
    },
    /// `"64KiB"`, `"16MiB"`, or an integer of bytes.
    Size {
        /// The least, in bytes.
        min: u64,
        /// The greatest, in bytes.
        max: u64,
    },
    /// A string.
    Text,
    /// An array of strings.
    TextList,
    /// An array of JSON pointers, of which the empty string is one.
    PointerList,
    /// A string, or an array of strings.
    TextOrList,
    /// A table whose members are strings.
    TextTable,
    /// A string, `env:NAME`, `file:PATH`, `b64:…` or `hex:…`.
    Secret,
    /// An array of secrets.
    SecretList,
    /// A secret, or an array of secrets.
    SecretOrList,
    /// A table whose members are secrets.
    SecretTable,
    /// One of these strings.
    Choice(&'static [&'static str]),
    /// `"IP:PORT"`.
    Address,
    /// `2027-01-01T00:00:00Z`.
    Moment,
}

/// What a key is where the file does not have it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Preset {
    /// Its feature is off.
    Unset,
    /// An error: each element of its array must have it.
    Required,
    /// This value, as TOML writes it.
    Is(&'static str),
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Form::Boolean => "boolean",
            Form::Integer { .. } => "integer",
            Form::Duration { .. } => "duration",
            Form::Size { .. } => "size",
            Form::Text => "string",
            Form::TextList | Form::PointerList => "array of strings",
            Form::TextOrList => "string or array of strings",
            Form::TextTable => "table of strings",
            Form::Secret => "secret",
            Form::SecretList => "array of secrets",
            Form::SecretOrList => "secret or array of secrets",
            Form::SecretTable => "table of secrets",
            Form::Address => "address",
            Form::Moment => "date-time",
            Form::Choice(choices) => return write!(f, "\"{}\"", choices.join("\" or \"")),
        };
        f.write_str(name)
    }
}

const DAY_MS: u64 = 24 * 60 * 60 * 1000;
/// Longest duration a key may have. Past any use, and far from the ends of the clocks.
const LONGEST_MS: u64 = 366 * DAY_MS;
/// Shortest wait: a shorter one would end what it guards before it can begin.
const WAIT: Form = Form::Duration { min_ms: 10, max_ms: LONGEST_MS };
/// A duration that may be nothing.
const SPAN: Form = Form::Duration { min_ms: 0, max_ms: LONGEST_MS };
const COUNT: Form = Form::Integer { min: 0, max: u32::MAX as u64 };
const BUDGET: Form = Form::Size { min: 0, max: 1 << 50 };

use crate::limits::{PAGES_MAX, POLL_REDIRECTS_MAX};

use Form::{
    Address, Boolean, Choice, Moment, PointerList, Secret, SecretList, SecretOrList, SecretTable, Text, TextList,
    TextOrList, TextTable,
};
use Preset::{Is, Required, Unset};

/// Tables that may stand several times, as `[[stream]]`.
pub const ARRAYS: &[&str] = &[
    "server.tls",
    "auth.jwt.key",
    "auth.jwt.jwks",
    "auth.api_key",
    "stream",
    "stream.view",
    "stream.windows",
    "upstream",
    "action",
];

/// What a key of the configuration may be for.
pub(super) const ALGORITHMS: &[&str] =
    &["HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"];

/// Every key, in the order of the example file.
#[rustfmt::skip]
pub const KEYS: &[KeyDoc] = &[
    key("server.listen", Address, Is("\"127.0.0.1:8080\""), "The public listener; port 0: chosen by the kernel, told in the ready line"),
    key("server.plaintext", Boolean, Is("false"), "May listen beyond loopback without TLS, which a proxy in front ends; not needed with `[[server.tls]]`"),
    key("server.trusted_proxies", TextList, Is("[]"), "CIDRs whose `Forwarded`, `X-Forwarded-For` and PROXY v2 are believed"),
    key("server.share_port", Boolean, Is("false"), "Several processes may listen on the same address, for more connections than one may have descriptors; the kernel spreads them"),
    key("server.cores", Form::Integer { min: 0, max: 1024 }, Is("0"), "Threads, one shard each; 0: one per available core"),
    key("server.driver", Choice(&["auto", "io_uring", "epoll"]), Is("\"auto\""), "`auto` falls back to epoll where the kernel refuses io_uring, and says so"),
    key("server.public_origin", Text, Unset, "How browsers see this server (`https://live.example.com`), where a proxy hides it"),
    key("server.heartbeat", WAIT, Is("\"25s\""), "Time between WebSocket pings and SSE comments"),
    key("server.drain", Form::Duration { min_ms: 0, max_ms: DAY_MS }, Is("\"10s\""), "Window over which SIGTERM spreads reconnects"),
    key("server.allowed_origins", TextList, Is("[]"), "Origins besides same-origin, for cookie-borne credentials and CORS"),
    key("server.permessage_deflate", Boolean, Is("true"), "WebSockets may agree on compression (RFC 7692): each event is deflated once for all who take it so"),
    key("server.playground", Boolean, Is("true"), "`GET /` answers with the playground page"),
    key("server.echo", Boolean, Is("false"), "`GET /echo` is a WebSocket that returns every message; refused beyond loopback"),
    key("server.state", Text, Is("\"restcast.state\""), "File for what the admin API creates, for this process alone; where it is set here it is locked at start, else when there is something to write"),
    key("server.tls.cert", Text, Required, "PEM file of a certificate and those that vouch for it, the server's own first; with one or more `[[server.tls]]` `listen` speaks TLS only, and SNI chooses among several: the first whose names match, else the first; at most 64"),
    key("server.tls.key", Text, Required, "PEM file of its private key (PKCS #8, PKCS #1 or SEC 1, not encrypted); both files are read again on SIGHUP"),
    key("admin.listen", Address, Is("\"127.0.0.1:9080\""), "The admin listener"),
    key("admin.key", Secret, Unset, "Bearer key of `/admin/v1/`, which answers 403 without one; `/metrics` and `/readyz` never need it"),
    key("admin.names", TextList, Is("[]"), "Further `Host` names the admin listener accepts"),
    key("admin.stream_urls", TextList, Is("[]"), "What streams that the admin API makes may be polled from, and their token endpoints: patterns as of `direct.allow`; an address that is listed may be any. Without any: whatever is public, loopback or of a private network, but no metadata service and no link-local address. At most 256"),
    key("log.level", Choice(&["error", "warn", "info", "debug", "trace"]), Is("\"info\""), "Least important level that is written; lines of the level `audit`, on what the admin API was ordered, always are"),
    key("log.format", Choice(&["text", "json"]), Is("\"text\""), "Lines for people, or JSON objects"),
    key("limits.connections", COUNT, Is("0"), "Connections in all; 0: what the descriptors allow, with a margin"),
    key("limits.connections_per_address", COUNT, Is("0"), "Connections from one client address; 0: unlimited"),
    key("limits.connections_per_subject", COUNT, Is("0"), "WebSocket and SSE connections of one subject; 0: unlimited"),
    key("limits.subscriptions_per_connection", COUNT, Is("64"), "Streams one `/v1/ws` connection may watch at once; 0: unlimited"),
    key("limits.streams", COUNT, Is("10000"), "Filled-in URLs that exist at once, lingering ones included; 0: unlimited"),
    key("limits.streams_per_subject", COUNT, Is("64"), "Filled-in URLs one subject may have polled at once; 0: unlimited. One that nobody watches any more keeps its place until its polling ends, or another takes it, which it may no sooner than an interval after it was taken (10 s at most; of streams that callers describe a second, or `direct.interval_min` where that is more): until then 429 with `Retry-After`"),
    key("limits.streams_per_address", COUNT, Is("1024"), "The same of all callers of one client address (IPv6: its first 64 bits) who have no subject, anonymous ones and those whose tokens have no `sub`, for streams whose `params` they fill in; however many of them watch one filled-in URL, it is one. Behind a proxy that is not in `server.trusted_proxies` all visitors are one address; 0: unlimited"),
    key("limits.selects_per_stream", Form::Integer { min: 0, max: 4096 }, Is("128"), "Different `select`s of one filled-in URL at once; one more is refused as `TOO_MANY_STREAMS` unless one of them is unwatched, which makes place; 0: callers may not select"),
    key("limits.history_bytes_total", BUDGET, Is("\"256MiB\""), "Values and histories of the process; unwatched ones go first, oldest use first; the newest value of what is watched stays. With `[direct]` a fourth of it is for what callers describe, and bounds that: past it the largest streams of whoever holds most end. 0: unlimited"),
    key("limits.pinned_bytes", BUDGET, Is("\"256MiB\""), "Frames held for stalled readers, over TLS without the record that each has been sealed (16 KiB at most); past it the longest stalled are closed 1013; 0: unlimited"),
    key("limits.handshakes_per_second_per_address", COUNT, Is("0"), "Handshakes per second from one client address; 0: unlimited"),
    key("limits.keep_alive", WAIT, Is("\"15s\""), "How long an HTTP connection may idle between requests"),
    key("limits.handshake_timeout", WAIT, Is("\"10s\""), "How long a request head, and a TLS handshake before it, may take"),
    key("limits.request_head_bytes_max", Form::Size { min: 512, max: 1 << 20 }, Is("\"16KiB\""), "Bytes of a request line and headers"),
    key("limits.message_bytes_max", Form::Size { min: 64, max: 64 << 20 }, Is("\"64KiB\""), "Bytes of one message from a client, after inflating"),
    key("limits.messages_per_second", COUNT, Is("50"), "Messages per second from one connection; past it closed 1008; 0: unlimited"),
    key("limits.auth_failures_per_minute", COUNT, Is("60"), "Failed credentials per minute from one address; past it answers are delayed, then 429; 0: unlimited"),
    key("limits.write_stall", WAIT, Is("\"30s\""), "How long a socket may take nothing before it is closed 1013"),
    key("auth.query_token", Boolean, Is("true"), "`?token=` is read; where not, its presence is 401"),
    key("auth.reauth_before", SPAN, Is("\"60s\""), "Longest lead of `reauthenticate` before `exp`"),
    key("auth.revocation_keep", Form::Duration { min_ms: 1000, max_ms: LONGEST_MS }, Is("\"30d\""), "How long logouts, revocations and changed permissions are remembered, here and in Redis; longer-lived tokens get a warning"),
    key("auth.token_cache", Form::Integer { min: 0, max: 1 << 20 }, Is("4096"), "Verified tokens each core remembers, so that a reconnect costs a hash, about 100 bytes each; 0: none"),
    key("auth.first_message", Form::Duration { min_ms: 10, max_ms: 10 * 60 * 1000 }, Unset, "How long a WebSocket may stay open before its first message brings the credential; unset: it is needed at the handshake"),
    key("auth.jwt.leeway", Form::Duration { min_ms: 0, max_ms: 60 * 60 * 1000 }, Is("\"5s\""), "Allowance for clocks that differ"),
    key("auth.jwt.issuer", TextOrList, Unset, "Accepted `iss` values; unset: `iss` is not looked at"),
    key("auth.jwt.audience", TextOrList, Unset, "Accepted `aud` values; unset: `aud` is not looked at"),
    key("auth.jwt.cookie", Text, Is("\"restcast_token\""), "Cookie that carries a token"),
    key("auth.jwt.close_on_key_removal", Boolean, Is("false"), "Connections under a key that a reload removed are closed 4001 `key_removed`; where a key set has another `url`, once it has been fetched from there"),
    key("auth.jwt.claims.sub", Text, Is("\"sub\""), "Claim with the user id, a string"),
    key("auth.jwt.claims.role", Text, Is("\"role\""), "Claim with the one role, a string"),
    key("auth.jwt.claims.roles", Text, Is("\"roles\""), "Claim with the roles, an array of strings"),
    key("auth.jwt.claims.permissions", Text, Is("\"permissions\""), "Claim with the permissions, an array of strings"),
    key("auth.jwt.claims.streams", Text, Is("\"streams\""), "Claim with the stream ids or globs that may be subscribed"),
    key("auth.jwt.key.kid", Text, Unset, "Key id; a token without one is tried against every key of its `alg`"),
    key("auth.jwt.key.alg", Choice(ALGORITHMS), Required, "The algorithm, never taken from the token"),
    key("auth.jwt.key.secret", Secret, Unset, "The key of HS256, HS384 or HS512: at least 32, 48 or 64 bytes"),
    key("auth.jwt.key.public_key", Secret, Unset, "The key of the other algorithms, usually `file:key.pem`: PEM (a public key or a certificate, whose key alone counts), DER or a JSON Web Key; RSA of 2048 to 8192 bits"),
    key("auth.jwt.jwks.issuer", Text, Required, "The `iss` whose tokens this key set verifies, and nothing else does; at most 64 issuers"),
    key("auth.jwt.jwks.url", Text, Unset, "Where the key set is (RFC 7517): `https://`, or `http://` on this machine; fetched at the start, before its `Cache-Control` age is over (15 minutes where it says none, at least 1 minute, at most a day) and once for an unknown `kid`, at most every 30 s; the last good one stays in force"),
    key("auth.jwt.jwks.file", Text, Unset, "The same from a file, read again on SIGHUP; either `url` or `file`"),
    key("auth.jwt.jwks.algs", TextList, Is("[\"RS256\", \"RS384\", \"RS512\", \"PS256\", \"PS384\", \"PS512\", \"ES256\", \"ES384\", \"EdDSA\"]"), "What its tokens may be signed with; never HMAC"),
    key("auth.jwt.jwks.audience", TextOrList, Unset, "Accepted `aud` values of its tokens; unset: `aud` is not looked at, and a token that the issuer made for another service is accepted"),
    key("auth.jwt.jwks.ca", Text, Unset, "PEM file of the roots to trust for `url` instead of the system's"),
    key("auth.api_key.id", Text, Required, "Its name, 1 to 64 of `A-Z a-z 0-9 . _ : ~ -`, which stands in the key itself: `rck_<id>_…`"),
    key("auth.api_key.hash", Secret, Required, "What it is known by, `sha256:<salt>:<hex SHA-256 of salt and key>`; `POST /admin/v1/keys` makes keys without one here"),
    key("auth.api_key.streams", TextList, Required, "Ids and globs of the streams it is for"),
    key("auth.api_key.expires", Moment, Unset, "When it ends; unset: when it is taken out of the file"),
    key("auth.api_key.rate", COUNT, Is("0"), "Requests and handshakes a minute with it; past it 429; 0: unlimited"),
    key("auth.api_key.roles", TextList, Is("[]"), "Roles of who presents it, for streams and views that ask for one; actions are not for API keys"),
    key("auth.api_key.permissions", TextList, Is("[]"), "Permissions of who presents it"),
    key("redis.url", Secret, Unset, "`redis://user:password@host:port/database`, `rediss://` for TLS; user and password percent-encoded, each part but the host may be left out. Redis 6.2 or newer, or Valkey; without it sessions, tickets, the admin API's keys and control events are this process's alone"),
    key("redis.ca", Text, Unset, "PEM file of the roots to trust instead of the system's"),
    key("redis.timeout", Form::Duration { min_ms: 10, max_ms: 20_000 }, Is("\"2s\""), "How long connecting to Redis, logging in or an answer may take"),
    key("redis.channel_logout", Text, Is("\"user-logged-out\""), "Channel on which logouts are published"),
    key("redis.channel_permissions", Text, Is("\"permission-update\""), "Channel on which changed permissions are published"),
    key("redis.channel_revoked", Text, Is("\"token-revoked\""), "Channel on which revoked tokens are published"),
    key("auth.session.secrets", SecretList, Unset, "Secrets that session cookies may be signed with: all verify; with it the sessions of an express-session application in Redis are credentials"),
    key("auth.session.cookie", Text, Is("\"connect.sid\""), "Cookie that names the session"),
    key("auth.session.prefix", Text, Is("\"sess:\""), "What stands before the session's id in the name of its record"),
    key("auth.session.user", Text, Is("\"/userId\""), "JSON pointer into the record: the user id, a string or an integer; without one nobody is signed in"),
    key("auth.session.role", Text, Is("\"/userRole\""), "The role, a string or an array of strings"),
    key("auth.session.company", Text, Is("\"/companyId\""), "What fills `{claims.companyId}`; other claims are the record's members of that name"),
    key("auth.session.permissions", Text, Is("\"/permissions\""), "The permissions, an array of strings"),
    key("auth.session.reread", Form::Duration { min_ms: 100, max_ms: DAY_MS }, Is("\"30s\""), "How often the record of a live session is read again, at the latest; a tenth of it is spread"),
    key("auth.session.grace", SPAN, Is("\"5m\""), "How long live sessions outlast a Redis that does not answer"),
    key("auth.session.touch", Boolean, Is("false"), "The life of a session is extended while it is connected, by the record's `cookie.originalMaxAge` (a day where it has neither that nor `cookie.expires`); its end is then the key's alone, not `cookie.expires`, which touching does not move. Where the key has no end, or the record has `cookie.expires` and no age, nothing is touched and `cookie.expires` counts"),
    key("stream.id", Text, Required, "1 to 128 of `A-Z a-z 0-9 . _ : ~ -`; its place is `/v1/streams/{id}`"),
    key("stream.url", Text, Required, "The upstream, with `{claims.NAME}` and `{query.NAME}` in path segments and query values"),
    key("stream.interval", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Is("\"1s\""), "From the start of one poll to the start of the next; a warning under 100ms"),
    key("stream.method", Text, Is("\"GET\""), "Request method: `GET` or `POST`"),
    key("stream.headers", SecretTable, Is("{}"), "Request headers; values may be secrets and are never shown"),
    key("stream.body", Text, Unset, "Request body; a placeholder stands where a JSON value may"),
    key("stream.params", TextList, Is("[]"), "Which `{query.NAME}` a caller may fill"),
    key("stream.params_pattern", TextTable, Is("{}"), "Regular expressions that values of `params` must match"),
    key("stream.ca", Text, Unset, "PEM file of the roots to trust instead of the system's"),
    key("stream.connect_timeout", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Is("\"3s\""), "For the TCP and TLS handshakes"),
    key("stream.first_byte_timeout", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Is("\"10s\""), "From the request's last byte to the response's first"),
    key("stream.timeout", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Is("\"15s\""), "For the whole exchange"),
    key("stream.response_bytes_max", Form::Size { min: 1, max: 1 << 30 }, Is("\"16MiB\""), "Bytes of a response body, inflated"),
    key("stream.backoff_max", WAIT, Is("\"60s\""), "Longest wait between polls that fail"),
    key("stream.linger", SPAN, Is("\"10s\""), "How long polling goes on after the last watcher; value and history stay longer"),
    key("stream.keep_warm", Boolean, Is("false"), "Polling goes on without watchers"),
    key("stream.history", Form::Integer { min: 0, max: 1_000_000 }, Is("1024"), "Events kept for resume, and"),
    key("stream.history_bytes", BUDGET, Is("\"4MiB\""), "their size; the sooner ends it"),
    key("stream.filter", Text, Unset, "jq program, of at most 4 KiB, that makes the value of what the upstream sends, before anything is compared, as in `[.items[].id]`. It gives exactly one value, within 3 s and `response_bytes_max`, or the poll has failed with `UPSTREAM_BODY`. Nothing outside of the value is there for it: no environment, files, clock, regular expressions"),
    key("stream.ignore", TextList, Is("[]"), "JSON pointers into the upstream's value, also where there are views: what changes there makes no event by itself"),
    key("stream.array_key", Text, Unset, "Member by which the objects of an array are matched, in arrays whose objects all have it; in a view, as far as it shows that member"),
    key("stream.kind", Choice(&["poll", "sse", "ndjson"]), Is("\"poll\""), "`sse`, `ndjson`: the upstream speaks a stream itself, of server-sent events or lines of JSON, each of which is the new value; it is read while somebody watches, gone on with by `Last-Event-ID`, and `interval` and `backoff_max` are between connections. One core follows at most 4096"),
    key("stream.events", TextList, Is("[]"), "With `sse`: types of the events that are values; none: all"),
    key("stream.events_per_second", Form::Integer { min: 1, max: 1000 }, Is("20"), "With `sse` and `ndjson`: values taken at most; of those that come faster the newest counts"),
    key("stream.idle_timeout", WAIT, Is("\"90s\""), "With `sse` and `ndjson`: an upstream that sends nothing for so long, not even a comment or an empty line, has gone"),
    key("stream.respect_max_age", Boolean, Is("false"), "`Cache-Control: max-age` less `Age`, a day at most, is a floor of the interval; an action, a hook or the admin still polls at once"),
    key("stream.pages_max", Form::Integer { min: 1, max: PAGES_MAX }, Is("1"), "Pages (`Link: rel=next`, of the same origin) gathered into one array, within `timeout` and `response_bytes_max`; each must be an array, and where one fails there is no value. What stands on further pages is left out, and the log says so once. With more than 1 polls are not conditional: that the first page is as it was says nothing of the others"),
    key("stream.redirects_max", Form::Integer { min: 0, max: POLL_REDIRECTS_MAX }, Is("0"), "Redirects of one poll that are followed: not from https to http, to other hosts and ports only where these are public, and without `headers` and `body` to another origin"),
    key("stream.interval_min", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Unset, "With it or `interval_max` the interval moves: half as long after a change, half as long again after a poll without one, from `interval` on, not under this (`interval`, where it is left out)"),
    key("stream.interval_max", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Unset, "and not over this (`interval`, where it is left out)"),
    key("stream.utc_offset", Text, Is("\"+00:00\""), "What the clock of `windows` is ahead of UTC, `+05:30` or `-08:00`: it is fixed, there is no summer time"),
    key("stream.windows.from", Text, Required, "When it begins, `HH:MM`. The first of the stream's windows that holds counts; outside of all it is `interval`"),
    key("stream.windows.to", Text, Required, "When it ends; not after `from`: on the next day. `24:00` is midnight"),
    key("stream.windows.days", TextList, Is("[]"), "On which days it begins, `mon` to `sun`; none: every day"),
    key("stream.windows.interval", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Unset, "The interval in it; left out: no poll, whoever asks for one; who has no value yet is told `STOPPED` and when it ends"),
    key("stream.hash", Boolean, Is("false"), "Each event holds `hash`, the SHA-256 of the canonical form of the value as of it, so that who applied patches can prove what they hold"),
    key("stream.sign.key_id", Text, Unset, "Name of the key, `kid` in its events: 1 to 64 of `A-Z a-z 0-9 . _ : ~ -`; with `[stream.sign]` each event is signed"),
    key("stream.sign.secret", Secret, Unset, "HMAC-SHA-256 key of at least 32 bytes. A reload with another one signs with it from then on, in a new epoch that begins with a snapshot"),
    key("stream.allow_anonymous", Boolean, Is("false"), "A caller without a credential may watch"),
    key("stream.roles", TextList, Is("[]"), "Any one of them is needed"),
    key("stream.permissions", TextList, Is("[]"), "All of them are needed"),
    key("stream.hook_secret", SecretOrList, Unset, "What `POST /v1/hooks/{id}` is signed with, which polls at once; all verify, at most 8"),
    key("stream.client_cert", Text, Unset, "PEM file of the certificate that is shown to an upstream that asks for one (and to its token endpoint), with those that vouch for it; with `client_key`. Both files are read again when they change"),
    key("stream.client_key", Text, Unset, "PEM file of its private key"),
    key("stream.auth.kind", Choice(&["bearer", "basic", "header", "query", "oauth2"]), Unset, "How requests are let in at the upstream, besides `headers`"),
    key("stream.auth.token", Secret, Unset, "Of `bearer`: the token"),
    key("stream.auth.username", Secret, Unset, "Of `basic`: the user"),
    key("stream.auth.password", Secret, Unset, "Of `basic`: the password"),
    key("stream.auth.name", Text, Unset, "Of `header` and `query`: the name of the header, or of the parameter of the URL's query"),
    key("stream.auth.value", Secret, Unset, "Of `header` and `query`: its value, which stands in no log, status or error"),
    key("stream.auth.grant", Choice(&["client_credentials", "refresh_token"]), Is("\"client_credentials\""), "Of `oauth2`: how a token is got. One token serves all streams whose `[stream.auth]` is the same, and is renewed after seven to eight tenths of its life, and once, at most once a second, when an upstream answers 401"),
    key("stream.auth.token_url", Text, Unset, "Of `oauth2`: the token endpoint; `http://` on this machine only"),
    key("stream.auth.client_id", Secret, Unset, "Of `oauth2`: who asks for the token"),
    key("stream.auth.client_secret", Secret, Unset, "Of `oauth2`: what proves it; a public client (`refresh_token` only) has none"),
    key("stream.auth.client_auth", Choice(&["basic", "post"]), Is("\"basic\""), "Of `oauth2`: whether these two stand in `Authorization` (RFC 6749 section 2.3.1) or in the request's body"),
    key("stream.auth.refresh_token", Secret, Unset, "Of `refresh_token`: the one to begin with. Those that the endpoint gives in its place are kept in `server.state`, and tried first until the configured one is another"),
    key("stream.auth.scope", Text, Unset, "Of `oauth2`: `scope` of the request"),
    key("stream.auth.audience", Text, Unset, "Of `oauth2`: `audience` of the request, which some endpoints want"),
    key("stream.auth.params", SecretTable, Is("{}"), "Of `oauth2`: further parameters of the request, such as `resource`; values may be secrets and are never shown"),
    key("stream.auth.ca", Text, Unset, "Of `oauth2`: PEM file of the roots to trust for `token_url` instead of the system's; `ca` of the stream is for its `url` alone"),
    key("stream.view.roles", TextList, Required, "Who gets this view: the first `[[stream.view]]` of the stream that names a role of the caller; none: 403. Each view has its own epoch and `seq`, and a change outside of it makes no event in it"),
    key("stream.view.pointers", PointerList, Unset, "JSON pointers: the value reduced to these places, its structure kept. `*` stands for each element or member (`/rows/*/name`), an index for one element; arrays close up over elements that are left out"),
    key("stream.view.path", Text, Unset, "Instead of `pointers` a JSONPath (RFC 9535): the array of its matches; of names and indexes alone the match itself, or null. Patterns of `match` and `search` are literals"),
    key("direct.allow", TextList, Is("[]"), "Targets that callers may name in direct mode and ephemeral sessions, off without `[direct]`: `https://api.example.com/*`, matched on scheme, host, port and normalised path. `*` is any run of characters in a path, every name below a domain as `*.`, any port as `:*`; without a path every path. A name must resolve to public addresses only; an address that is listed itself may be private. At most 256"),
    key("direct.allow_public", Boolean, Is("false"), "Besides, whatever is public: `http` or `https`, a port of HTTP, a name of the public DNS, addresses of no special purpose"),
    key("direct.cookies", Boolean, Is("false"), "Callers may set `Cookie`; headers that frame, route or impersonate they never set"),
    key("direct.roles", TextList, Is("[]"), "Any one of them is needed; without any, a credential suffices; an anonymous caller never does"),
    key("direct.interval_min", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Is("\"500ms\""), "A smaller `interval_ms` is raised to this"),
    key("direct.sessions_per_subject", COUNT, Is("16"), "Ephemeral sessions of one subject at once; 0: unlimited"),
    key("direct.session_ttl_max", Form::Duration { min_ms: 1000, max_ms: LONGEST_MS }, Is("\"1h\""), "A longer `ttl_s` is lowered to this"),
    key("direct.linger", SPAN, Is("\"10s\""), "A stream that a caller has described is polled, and an ephemeral session goes on, this long after its last watcher"),
    key("direct.response_bytes_max", Form::Size { min: 1, max: 1 << 30 }, Is("\"1MiB\""), "Bytes of one response to such a stream, inflated; what all of them hold is bounded by a fourth of `limits.history_bytes_total`"),
    key("direct.timeout", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Is("\"15s\""), "For one whole exchange of such a stream"),
    key("direct.secret", Secret, Unset, "With `[redis]`: what processes that share it call streams that callers describe, and the sessions of a `dedupe_key`, by the same names under; at least 32 bytes, read at start. Left out, the first shared secret of `auth.jwt` serves; without one, names are each process's own"),
    key("upstream.origin", Text, Required, "`https://api.example.com`, `http://10.0.0.7:8080`: scheme, host and port that the keys beside it are for, whichever streams and credentials ask there"),
    key("upstream.rate", Text, Unset, "Requests it is sent at most, as in `5/s`, `100/m` or `1000/h`, evenly and by turns: redirects, pages and repeats after a 401 count, and so do actions and requests for tokens, which go before polls; key sets do not"),
    key("upstream.burst", Form::Integer { min: 1, max: 10_000 }, Is("1"), "So many of them may come at once"),
    key("upstream.breaker", Form::Integer { min: 0, max: 10_000 }, Is("10"), "Failures in a row, of whatever streams (of what a caller describes: that caller's), after which it is left alone for a second, up to 30 (but no stream's `backoff_max`), and then tried by one request; 0: never. It is 10 for origins that are not listed"),
    key("proxy.url", Secret, Unset, "`http://user:password@host:port` of an HTTP proxy through which upstreams are asked: polls, actions, token endpoints and key sets, by a tunnel (`CONNECT`) each, plain ones too; unset: directly, whatever the environment's variables say. What callers may name in direct mode is asked for by the address that was judged, never by its name"),
    key("proxy.except", TextList, Is("[]"), "Hosts that are asked directly: names, `*.NAME` for those under one, addresses and networks in CIDR form, as they stand in the URL; this machine always is"),
    key("action.type", Text, Required, "The `type` of the messages that ask for it: 1 to 64 of `A-Z a-z 0-9 . _ : ~ / -`; at most 256 actions"),
    key("action.roles", TextList, Is("[]"), "Any one of them is needed, by the grant of the moment; an anonymous caller or an API key never acts"),
    key("action.permissions", TextList, Is("[]"), "All of them are needed"),
    key("action.method", Text, Is("\"POST\""), "Request method; only GET, PUT, DELETE and OPTIONS may be sent a second time, where a kept connection turns out to be closed"),
    key("action.url", Text, Required, "The upstream, with `{message.NAME}` and `{claims.NAME}` in path segments and query values; NAME may lead into the message, `{message.property.id}`; strings, numbers and Booleans may stand there"),
    key("action.headers", SecretTable, Is("{}"), "Request headers; values may be secrets and are never shown"),
    key("action.body", Text, Unset, "Request body; a placeholder stands where a JSON value may, and a `{message.NAME}` becomes that value as it was sent; at most 16 MiB filled in"),
    key("action.schema", Text, Unset, "JSON Schema, as text or `file:PATH`, that the message must fit (draft 2020-12 unless `$schema` says otherwise; no `$ref` beyond itself); `type` and `id` of the message are shown to it only where its `properties` or `required`, or those of what it applies to the whole message (`allOf`, `$ref` …), name them"),
    key("action.rate", Text, Unset, "How often one subject may ask for it on all of its connections, as in `5/s`, `100/m` or `1000/h`; they may all come at once; past it `RATE_LIMITED` with `retry_in_ms`"),
    key("action.refresh", TextList, Is("[]"), "Streams that are polled at once after a success: what the caller's claims select, and what its connection is subscribed to; with `admin.key`, those of the admin API too; at most 16"),
    key("action.reply_body", Boolean, Is("true"), "`action_result` holds the upstream's JSON"),
    key("action.error_body", Boolean, Is("false"), "The `error` of a failure holds the upstream's JSON"),
    key("action.ca", Text, Unset, "PEM file of the roots to trust instead of the system's"),
    key("action.connect_timeout", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Is("\"3s\""), "For the TCP and TLS handshakes"),
    key("action.first_byte_timeout", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Is("\"10s\""), "From the request's last byte to the response's first"),
    key("action.timeout", Form::Duration { min_ms: 1, max_ms: LONGEST_MS }, Is("\"15s\""), "For the whole exchange"),
    key("action.response_bytes_max", Form::Size { min: 1, max: 4 << 20 }, Is("\"1MiB\""), "Bytes of a response body, inflated"),
    key("action.client_cert", Text, Unset, "As of a stream"),
    key("action.client_key", Text, Unset, "As of a stream"),
    key("action.auth.kind", Choice(&["bearer", "basic", "header", "query", "oauth2"]), Unset, "As of a stream, and so are the keys below"),
    key("action.auth.token", Secret, Unset, "Of `bearer`"),
    key("action.auth.username", Secret, Unset, "Of `basic`"),
    key("action.auth.password", Secret, Unset, "Of `basic`"),
    key("action.auth.name", Text, Unset, "Of `header` and `query`"),
    key("action.auth.value", Secret, Unset, "Of `header` and `query`"),
    key("action.auth.grant", Choice(&["client_credentials", "refresh_token"]), Is("\"client_credentials\""), "Of `oauth2`"),
    key("action.auth.token_url", Text, Unset, "Of `oauth2`"),
    key("action.auth.client_id", Secret, Unset, "Of `oauth2`"),
    key("action.auth.client_secret", Secret, Unset, "Of `oauth2`"),
    key("action.auth.client_auth", Choice(&["basic", "post"]), Is("\"basic\""), "Of `oauth2`"),
    key("action.auth.refresh_token", Secret, Unset, "Of `refresh_token`"),
    key("action.auth.scope", Text, Unset, "Of `oauth2`"),
    key("action.auth.audience", Text, Unset, "Of `oauth2`"),
    key("action.auth.params", SecretTable, Is("{}"), "Of `oauth2`"),
    key("action.auth.ca", Text, Unset, "Of `oauth2`"),
];

const fn key(path: &'static str, form: Form, default: Preset, meaning: &'static str) -> KeyDoc {
    KeyDoc { path, form, default, meaning }
}

/// The key at `path`, if there is one.
pub(super) fn find(path: &str) -> Option<&'static KeyDoc> {
    KEYS.iter().find(|key| key.path == path)
}

/// The table or array of tables at `path`, spelled as in this list, if there is one.
pub(super) fn find_table(path: &str) -> Option<&'static str> {
    KEYS.iter().find_map(|key| {
        let rest = key.path.strip_prefix(path)?;
        rest.starts_with('.').then(|| key.path.strip_suffix(rest))?
    })
}

/// Characters of an unknown key that are compared; no key is that long.
const COMPARED_CHARS_MAX: usize = 64;

/// The known key or table nearest to `name`, which is unknown in the table at `within` (empty: the root).
pub(super) fn nearest(within: &str, name: &str) -> String {
    let here = if within.is_empty() { String::new() } else { format!("{within}.") };
    let name: String = name.chars().take(COMPARED_CHARS_MAX).collect();
    let siblings = KEYS.iter().filter_map(|key| {
        let last = key.path.strip_prefix(&here)?.split('.').next()?;
        Some((edit_distance(&name, last), format!("{here}{last}")))
    });
    // A key put into the wrong table is as near as one slip in its name.
    let elsewhere = KEYS.iter().filter(|key| key.path.rsplit('.').next() == Some(name.as_str()));
    let candidates = siblings.chain(elsewhere.map(|key| (1, key.path.to_owned())));
    candidates.min_by_key(|(distance, _)| *distance).map(|(_, path)| path).unwrap_or_default()
}

/// The one of `known` that is spelled most like `name`; `None` where there are none. For a flag or command mistyped.
pub fn nearest_name<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let name: String = name.chars().take(COMPARED_CHARS_MAX).collect();
    known.into_iter().min_by_key(|candidate| edit_distance(&name, candidate))
}

/// Slips between two names: characters put in, left out, replaced, or swapped with their neighbour.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, &ca) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &cb) in b.iter().enumerate() {
            let mut least = (last[j] + usize::from(ca != cb)).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && ca == b[j - 1] && a[i - 1] == cb {
                least = least.min(before_last[j - 1] + 1);
            }
            row.push(least);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

/// The README's table of keys, in Markdown.
pub fn keys_table() -> String {
    let mut table = String::from("| key | form | default | meaning |\n| --- | --- | --- | --- |\n");
    for key in KEYS {
        let default = match key.default {
            Preset::Unset => "—".to_owned(),
            Preset::Required => "required".to_owned(),
            Preset::Is(value) => format!("`{value}`"),
        };
        writeln!(table, "| `{}` | {} | {default} | {} |", key.path, key.form, key.meaning)
            .expect("writing to a String does not fail");
    }
    table
}

/// The bounds of `form` as a sentence's end, for the error of a value past them.
pub(super) fn bounds(form: Form) -> String {
    match form {
        Form::Integer { min, max } => format!("from {min} to {max}"),
        Form::Duration { min_ms, max_ms } => {
            let shown = |ms| super::show::duration(Duration::from_millis(ms));
            format!("from {} to {}", shown(min_ms), shown(max_ms))
        }
        Form::Size { min, max } => format!("from {min} to {max} bytes"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_key_is_the_one_meant() {
        for (within, name, meant) in [
            ("stream", "intervall", "stream.interval"),
            ("stream", "urL", "stream.url"),
            ("", "sever", "server"),
            ("", "streams", "stream"),
            ("", "interval", "stream.interval"),
            ("limits", "heartbeat", "server.heartbeat"),
            ("auth.jwt", "keys", "auth.jwt.key"),
            ("auth.jwt.key", "secert", "auth.jwt.key.secret"),
        ] {
            assert_eq!(nearest(within, name), meant);
        }
        assert!(!nearest("server", &"a".repeat(10_000)).is_empty());
        assert!(!nearest("server", "").is_empty());
    }

    #[test]
    fn edit_distance_counts_slips() {
        for (a, b, slips) in [("", "", 0), ("", "ab", 2), ("ab", "ba", 1), ("kitten", "sitting", 3), ("é", "e", 1)] {
            assert_eq!(edit_distance(a, b), slips, "{a} {b}");
            assert_eq!(edit_distance(b, a), slips, "{b} {a}");
        }
    }

    #[test]
    fn every_key_stands_once_and_is_documented() {
        for (i, key) in KEYS.iter().enumerate() {
            assert!(KEYS.iter().skip(i + 1).all(|other| other.path != key.path), "{} twice", key.path);
            assert!(!key.meaning.is_empty() && !key.meaning.contains('|'), "{}", key.path);
            assert!(keys_table().contains(&format!("| `{}` |", key.path)));
            assert_eq!(find_table(key.path), None, "{} is a key and a table", key.path);
        }
        assert!(ARRAYS.iter().all(|array| find_table(array) == Some(array)));
    }
}
