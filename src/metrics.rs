//! What the server counts, and the page a scraper reads.
//!
//! Source: Prometheus text format 0.0.4; names have base units (seconds, bytes), counters end in `_total`.
//! [`METRICS`] is the list of all there is: [`render`] and the README's table follow it.
//! Memory: one [`CoreMetrics`] a core, about 1.2 KiB; every label's values are a closed set, so nothing grows.
//! Cost: a core alone writes its cells, by plain loads and stores without a lock or a locked instruction; a scrape adds
//! them up as it finds them, so that two metrics on one page may be a moment apart. Errors: none.
//! Not here: who serves the page (`runtime::admin`), what is worth a log line.

use std::fmt::Write as _;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::time::WallTime;

/// `Content-Type` of what [`render`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A number that only grows. Written by one thread.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one.
    pub fn count(&self) {
        self.add(1);
    }

    /// Counts `n`.
    pub fn add(&self, n: u64) {
        // One writer: nothing can come between the load and the store.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// What was counted.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that rises and falls. Written by one thread.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// It is `n` now.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// One more.
    pub fn rise(&self) {
        self.set(self.value().saturating_add(1));
    }

    /// One less.
    pub fn fall(&self) {
        self.set(self.value().saturating_sub(1));
    }

    /// What it is.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Bounds of a [`Histogram`]'s buckets; one more holds what is over the last.
pub const BUCKETS: usize = 14;

/// How often a duration fell between which bounds. Written by one thread.
#[derive(Debug)]
pub struct Histogram {
    bounds_us: &'static [u64; BUCKETS],
    buckets: [Counter; BUCKETS + 1],
    sum_us: Counter,
}

impl Histogram {
    /// An empty one whose buckets end at `bounds_us`, ascending microseconds, inclusive.
    pub fn new(bounds_us: &'static [u64; BUCKETS]) -> Histogram {
        Histogram { bounds_us, buckets: Default::default(), sum_us: Counter::default() }
    }

    /// Counts one that took `duration`.
    pub fn observe(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.buckets[self.bounds_us.partition_point(|&bound| bound < us)].count();
        self.sum_us.add(us);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(Counter::value).sum()
    }
}

/// Bounds for what an upstream takes: 5 ms to 60 s.
pub const UPSTREAM_BOUNDS_US: [u64; BUCKETS] = [
    5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000, 15_000_000,
    30_000_000, 60_000_000,
];
/// Bounds for what the server itself takes: 50 us to 1 s.
pub const SERVER_BOUNDS_US: [u64; BUCKETS] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000];

/// A closed set of label values: an enum, numbered as it is written.
pub trait Label: Copy + 'static {
    /// Each of them, in order.
    const ALL: &'static [Self];
    /// The values of its labels, by number.
    const VALUES: &'static [&'static [&'static str]];
    /// Its number.
    fn index(self) -> usize;
}

/// One cell for each value of a label.
#[derive(Debug)]
pub struct Family<L, C, const N: usize> {
    cells: [C; N],
    label: PhantomData<fn(L)>,
}

impl<L: Label, C, const N: usize> Family<L, C, N> {
    const COMPLETE: () = assert!(L::VALUES.len() == N, "a family has one cell for each value of its label");

    /// The cell of `label`.
    pub fn of(&self, label: L) -> &C {
        &self.cells[label.index()]
    }
}

impl<L: Label, C: Default, const N: usize> Default for Family<L, C, N> {
    fn default() -> Family<L, C, N> {
        let () = Self::COMPLETE;
        Family { cells: std::array::from_fn(|_| C::default()), label: PhantomData }
    }
}

/// The one with these label values.
fn with_values<L: Label>(values: &[&str]) -> Option<L> {
    L::ALL.iter().copied().find(|label| L::VALUES[label.index()] == values)
}

macro_rules! labels {
    ($(#[$about:meta])* $name:ident { $($variant:ident = $($value:literal)+, $meaning:literal;)+ }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        pub enum $name {
            $(#[doc = $meaning] $variant,)+
        }

        impl Label for $name {
            const ALL: &'static [$name] = &[$($name::$variant),+];
            const VALUES: &'static [&'static [&'static str]] = &[$(&[$($value),+]),+];
            fn index(self) -> usize {
                self as usize
            }
        }
    };
}

labels! {
    /// What a connection is.
    ConnectionKind {
        WebSocket = "ws", "A WebSocket.";
        Sse = "sse", "An SSE response.";
        JsonWait = "json_wait", "A JSON answer that waits: for a first poll, or by `Prefer: wait`.";
    }
}

labels! {
    /// How a request for a stream or a WebSocket ended: with `ok`, or with the code it was refused with.
    HandshakeResult {
        Ok = "ok", "It was let in.";
        MissingCredential = "MISSING_CREDENTIAL", "401.";
        InvalidToken = "INVALID_TOKEN", "401.";
        TokenExpired = "TOKEN_EXPIRED", "401.";
        TokenRevoked = "TOKEN_REVOKED", "401.";
        SessionExpired = "SESSION_EXPIRED", "401.";
        LoggedOut = "LOGGED_OUT", "401.";
        AuthTimeout = "AUTH_TIMEOUT", "No first message in time.";
        OriginNotAllowed = "ORIGIN_NOT_ALLOWED", "403.";
        Forbidden = "FORBIDDEN", "403.";
        InsufficientPermissions = "INSUFFICIENT_PERMISSIONS", "403.";
        ClaimMissing = "CLAIM_MISSING", "403.";
        ClaimInvalid = "CLAIM_INVALID", "403.";
        StreamNotFound = "STREAM_NOT_FOUND", "404.";
        StreamUnavailable = "STREAM_UNAVAILABLE", "503.";
        StreamEnded = "STREAM_ENDED", "The stream was deleted meanwhile.";
        TooManyConnections = "TOO_MANY_CONNECTIONS", "429 or 503.";
        TooManySubscriptions = "TOO_MANY_SUBSCRIPTIONS", "429.";
        TooManyStreams = "TOO_MANY_STREAMS", "429 or 503.";
        RateLimited = "RATE_LIMITED", "429.";
        SessionStoreUnavailable = "SESSION_STORE_UNAVAILABLE", "503.";
        Draining = "DRAINING", "503.";
        Overloaded = "OVERLOADED", "503.";
        BadRequest = "BAD_REQUEST", "400.";
        NotFound = "NOT_FOUND", "404.";
        MethodNotAllowed = "METHOD_NOT_ALLOWED", "405.";
        NotAcceptable = "NOT_ACCEPTABLE", "406.";
        TooLarge = "TOO_LARGE", "413, 414 or 431.";
        UpgradeRequired = "UPGRADE_REQUIRED", "426.";
        TargetBlocked = "TARGET_BLOCKED", "403.";
        Internal = "INTERNAL", "500.";
        Other = "other", "Any other code.";
    }
}

impl HandshakeResult {
    /// The one that counts a refusal with the protocol's `code` (section 4).
    pub fn of_code(code: &str) -> HandshakeResult {
        with_values(&[code]).unwrap_or(HandshakeResult::Other)
    }
}

labels! {
    /// What became of an API key that was presented.
    ApiKeyResult {
        Ok = "ok", "It is good.";
        Unknown = "unknown", "There is no such key.";
        Expired = "expired", "It has expired.";
        RateLimited = "rate_limited", "It is good, and was presented more often than it may.";
    }
}

labels! {
    /// How a TLS handshake of a client ended.
    TlsHandshake {
        Full = "full", "With a certificate.";
        Resumed = "resumed", "By a ticket of an earlier one.";
        Failed = "failed", "It was broken off, or the two had nothing in common.";
        Refused = "refused", "None was made: its address had as many handshakes or connections as it may.";
        NotTls = "not_tls", "The client spoke HTTP in the clear, or a bad PROXY header.";
    }
}

labels! {
    /// How a poll ended.
    PollResult {
        Changed = "changed", "The value changed.";
        Unchanged = "unchanged", "A body, with the value held.";
        NotModified = "not_modified", "304.";
        Timeout = "UPSTREAM_TIMEOUT", "A time-out.";
        Unreachable = "UPSTREAM_UNREACHABLE", "No connection.";
        Dns = "UPSTREAM_DNS", "The name does not resolve.";
        Tls = "UPSTREAM_TLS", "The TLS handshake failed.";
        Status = "UPSTREAM_STATUS", "A status that is no value.";
        Protocol = "UPSTREAM_PROTOCOL", "Not HTTP.";
        Body = "UPSTREAM_BODY", "Not JSON.";
        TooLarge = "UPSTREAM_TOO_LARGE", "Too large.";
        Auth = "UPSTREAM_AUTH", "401 or 403.";
        RateLimited = "UPSTREAM_RATE_LIMITED", "429, or 503 with `Retry-After`.";
        Redirect = "UPSTREAM_REDIRECT", "A redirect.";
        Blocked = "UPSTREAM_BLOCKED", "The target is not allowed.";
        Other = "other", "Any other code.";
    }
}

impl PollResult {
    /// The one that counts a failure with the protocol's `code` (section 3).
    pub fn of_code(code: &str) -> PollResult {
        with_values(&[code]).unwrap_or(PollResult::Other)
    }
}

labels! {
    /// How a fetch of an issuer's key set ended.
    KeySetFetch {
        Ok = "ok", "It brought a set, which is in force.";
        Failed = "failed", "It brought none; the last one stays in force.";
    }
}

labels! {
    /// How a request for an upstream's token ended.
    TokenFetch {
        Ok = "ok", "It brought a token, which is in use.";
        Refused = "refused", "The token endpoint refuses the credential; a token that is still good stays in use.";
        Failed = "failed", "It brought none; a token that is still good stays in use.";
    }
}

labels! {
    /// What became of a hook's call.
    HookResult {
        Poll = "ok", "It is good and asks for a poll.";
        Replayed = "replayed", "It is one that came before.";
        Stopped = "stopped", "It is good, and the stream is stopped.";
        Malformed = "malformed", "Its signature is missing, or is none.";
        OutOfTime = "out_of_time", "Its time is too far from ours.";
        Unsigned = "unsigned", "Its signature does not verify.";
        Unknown = "unknown", "There is no such stream, or it has no hook.";
    }
}

labels! {
    /// How an action ended.
    ActionResult {
        Ok = "ok", "The upstream did it.";
        MissingCredential = "MISSING_CREDENTIAL", "An anonymous caller.";
        InsufficientPermissions = "INSUFFICIENT_PERMISSIONS", "A caller without the right.";
        BadMessage = "BAD_MESSAGE", "A message that does not fit.";
        ClaimMissing = "CLAIM_MISSING", "A caller without a claim that is needed.";
        ClaimInvalid = "CLAIM_INVALID", "A claim that cannot stand in the request.";
        RateLimited = "RATE_LIMITED", "Too many of one caller.";
        Overloaded = "OVERLOADED", "Too many in all.";
        Timeout = "UPSTREAM_TIMEOUT", "A time-out.";
        Unreachable = "UPSTREAM_UNREACHABLE", "No connection.";
        Dns = "UPSTREAM_DNS", "The name does not resolve.";
        Tls = "UPSTREAM_TLS", "The TLS handshake failed.";
        Status = "UPSTREAM_STATUS", "A status that is no success.";
        Protocol = "UPSTREAM_PROTOCOL", "Not HTTP.";
        Body = "UPSTREAM_BODY", "A body that cannot be read.";
        TooLarge = "UPSTREAM_TOO_LARGE", "Too large.";
        Auth = "UPSTREAM_AUTH", "401 or 403.";
        UpstreamRateLimited = "UPSTREAM_RATE_LIMITED", "429, or 503 with `Retry-After`.";
        Redirect = "UPSTREAM_REDIRECT", "A redirect.";
        Blocked = "UPSTREAM_BLOCKED", "The target is not allowed.";
        Other = "other", "Any other code.";
    }
}

impl ActionResult {
    /// The one that counts a refusal or failure with the protocol's `code` (sections 3 and 4).
    pub fn of_code(code: &str) -> ActionResult {
        with_values(&[code]).unwrap_or(ActionResult::Other)
    }
}

labels! {
    /// Why a connection ended: close code and reason (protocol section 5), or that the client was the one to go.
    Close {
        TokenExpired = "4001" "token_expired", "The token's `exp` came.";
        SessionExpired = "4001" "session_expired", "The session ended.";
        ApiKeyExpired = "4001" "api_key_expired", "The API key ended.";
        KeyRemoved = "4001" "key_removed", "The key that had signed the token was removed.";
        AuthUpdateRejected = "4001" "auth_update_rejected", "Too many refused updates in a row.";
        InvalidToken = "4001" "invalid_token", "A first message with a bad token.";
        Forbidden = "4003" "forbidden", "The right to the stream was lost or missing.";
        StreamEnded = "4004" "stream_ended", "The stream was deleted.";
        NotFound = "4004" "not_found", "There is no such stream.";
        AuthTimeout = "4008" "auth_timeout", "No first message in time.";
        LoggedOut = "4010" "logged_out", "The user logged out.";
        TokenRevoked = "4010" "token_revoked", "The token was revoked.";
        ApiKeyRevoked = "4010" "api_key_revoked", "The API key was revoked.";
        Draining = "1012" "draining", "The server is going down.";
        Overloaded = "1013" "overloaded", "The server has no room.";
        WriteStall = "1013" "write_stall", "The socket took nothing for too long.";
        HeartbeatTimeout = "1001" "heartbeat_timeout", "The client fell silent.";
        RateLimited = "1008" "rate_limited", "Too many messages.";
        ProtocolError = "1002" "protocol_error", "Not RFC 6455.";
        Unsupported = "1003" "unsupported_data", "A message of a type that is not taken.";
        InvalidText = "1007" "invalid_payload", "A text message that is not UTF-8.";
        MessageTooLarge = "1009" "message_too_big", "A message over the limit.";
        Internal = "1011" "internal", "A fault of the server.";
        ByClient = "1000" "by_client", "The client closed, or its answer was complete.";
        Gone = "1006" "gone", "The client's socket ended without a close.";
        Other = "other" "other", "Any other code.";
    }
}

impl Close {
    /// The one that counts a close sent with `code` and `reason`; where only the code is known, `reason` may be empty.
    pub fn of(code: u16, reason: &str) -> Close {
        let code = match code {
            1002 => return Close::ProtocolError,
            1003 => return Close::Unsupported,
            1007 => return Close::InvalidText,
            1009 => return Close::MessageTooLarge,
            1011 => return Close::Internal,
            1000 => return Close::ByClient,
            1006 => return Close::Gone,
            1001 => "1001",
            1008 => "1008",
            1012 => "1012",
            1013 => "1013",
            4001 => "4001",
            4003 => "4003",
            4004 => "4004",
            4008 => "4008",
            4010 => "4010",
            _ => return Close::Other,
        };
        with_values(&[code, reason]).unwrap_or(Close::Other)
    }
}

labels! {
    /// How an `auth_update` ended.
    AuthUpdateResult {
        Accepted = "accepted", "The connection has a new grant.";
        Rejected = "rejected", "The credential was refused.";
        SubjectMismatch = "subject_mismatch", "The credential is another identity's.";
    }
}

labels! {
    /// One of the connections to Redis.
    RedisLink {
        Commands = "commands", "Questions and orders.";
        Events = "events", "What is published.";
        Log = "log", "The control stream, followed.";
        Calls = "calls", "API keys, which may be many at once.";
    }
}

labels! {
    /// How a question to Redis ended.
    RedisResult {
        Answered = "answered", "With an answer.";
        Refused = "refused", "With an error, or with the connection.";
        Timeout = "timeout", "Without an answer in time.";
        Away = "away", "At once, for Redis was away or too many questions were waiting.";
    }
}

labels! {
    /// What became of a control event.
    RedisEntry {
        Heard = "heard", "It was published, and heard.";
        Read = "read", "It was read from the control stream.";
        Appended = "appended", "It was put on the control stream.";
        Bad = "bad", "It was too long, no text, or no event.";
        Dropped = "dropped", "It was to be put on the control stream, and there was no more room to wait.";
    }
}

/// What the thread that speaks with Redis counts. Only that thread writes it; anyone may read.
#[derive(Debug, Default)]
pub struct StoreMetrics {
    /// Whether each connection is there and answers: 1 or 0.
    pub up: Family<RedisLink, Gauge, { RedisLink::VALUES.len() }>,
    /// Connections made.
    pub connects: Family<RedisLink, Counter, { RedisLink::VALUES.len() }>,
    /// Questions that ended.
    pub questions: Family<RedisResult, Counter, { RedisResult::VALUES.len() }>,
    /// Questions that wait or are under way.
    pub waiting: Gauge,
    /// Control events.
    pub entries: Family<RedisEntry, Counter, { RedisEntry::VALUES.len() }>,
    /// Control events that wait to be put on the control stream.
    pub entries_waiting: Gauge,
}

/// What one core counts. Only that core writes it; anyone may read.
// Aligned so that no two cores write to one cache line (pairs of 64 bytes are fetched together).
#[derive(Debug)]
#[repr(align(128))]
pub struct CoreMetrics {
    /// Open connections.
    pub connections: Family<ConnectionKind, Gauge, { ConnectionKind::VALUES.len() }>,
    /// Sockets accepted.
    pub accepted: Counter,
    /// Accepts that failed.
    pub accept_errors: Counter,
    /// Times that accepting paused: no descriptors or memory.
    pub accept_pauses: Counter,
    /// TLS handshakes of clients.
    pub tls_handshakes: Family<TlsHandshake, Counter, { TlsHandshake::VALUES.len() }>,
    /// API keys presented.
    pub api_key_handshakes: Family<ApiKeyResult, Counter, { ApiKeyResult::VALUES.len() }>,
    /// Requests for a stream or a WebSocket.
    pub handshakes: Family<HandshakeResult, Counter, { HandshakeResult::VALUES.len() }>,
    /// Connections that ended.
    pub closes: Family<Close, Counter, { Close::VALUES.len() }>,
    /// Connections whose credential ran out.
    pub expiries: Counter,
    /// `auth_update`s.
    pub auth_updates: Family<AuthUpdateResult, Counter, { AuthUpdateResult::VALUES.len() }>,
    /// Tokens that were verified.
    pub token_verifications: Counter,
    /// Tokens that were not, because they had been.
    pub token_cache_hits: Counter,
    /// `permission_update` frames.
    pub permission_updates: Counter,
    /// `reauthenticate` frames.
    pub reauthenticates: Counter,
    /// Sessions that connections hang on.
    pub sessions: Gauge,
    /// Records of sessions that were read: at handshakes, and again.
    pub session_reads: Counter,
    /// Records of sessions that the store did not give.
    pub session_read_failures: Counter,
    /// Tickets handed out.
    pub tickets_made: Counter,
    /// Tickets used.
    pub tickets_used: Counter,
    /// Events handed to sockets, one for each subscriber.
    pub deliveries: Counter,
    /// Times that a slow or rate-limited reader got one snapshot for several events.
    pub conflations: Counter,
    /// Messages deflated.
    pub deflated: Counter,
    /// Their bytes before.
    pub deflated_from_bytes: Counter,
    /// Their bytes after.
    pub deflated_to_bytes: Counter,
    /// Bytes written to clients.
    pub sent_bytes: Counter,
    /// Bytes read from clients.
    pub received_bytes: Counter,
    /// From an upstream's response to the first send of the event it made.
    pub publish_lag: Histogram,
    /// From the first to the last turn in which an event was sent to its readers.
    pub fanout: Histogram,
    /// Polls that ended.
    pub polls: Family<PollResult, Counter, { PollResult::VALUES.len() }>,
    /// From a poll's start to its end.
    pub poll_duration: Histogram,
    /// Fetches of issuers' key sets.
    pub key_set_fetches: Family<KeySetFetch, Counter, { KeySetFetch::VALUES.len() }>,
    /// Requests for upstreams' tokens.
    pub token_fetches: Family<TokenFetch, Counter, { TokenFetch::VALUES.len() }>,
    /// Calls of hooks.
    pub hooks: Family<HookResult, Counter, { HookResult::VALUES.len() }>,
    /// Actions that ended.
    pub actions: Family<ActionResult, Counter, { ActionResult::VALUES.len() }>,
    /// Actions that are under way.
    pub actions_in_flight: Gauge,
    /// From an action's request to its end.
    pub action_duration: Histogram,
    /// Streams that exist: filled-in URLs, lingering ones included.
    pub streams: Gauge,
    /// Subscriptions of open connections.
    pub subscriptions: Gauge,
    /// Bytes of values and histories.
    pub history_bytes: Gauge,
    /// Bytes of frames held for stalled readers.
    pub pinned_bytes: Gauge,
    /// Messages that found another core's mailbox full.
    pub mailbox_full: Counter,
    /// How long one turn of the core's loop took.
    pub loop_latency: Histogram,
    /// Times that the wall clock was stepped.
    pub clock_steps: Counter,
    /// Tasks that panicked; each cost one connection or poll.
    pub panics: Counter,
}

impl Default for CoreMetrics {
    fn default() -> CoreMetrics {
        CoreMetrics {
            connections: Family::default(),
            accepted: Counter::default(),
            accept_errors: Counter::default(),
            accept_pauses: Counter::default(),
            tls_handshakes: Family::default(),
            api_key_handshakes: Family::default(),
            handshakes: Family::default(),
            closes: Family::default(),
            expiries: Counter::default(),
            auth_updates: Family::default(),
            token_verifications: Counter::default(),
            token_cache_hits: Counter::default(),
            permission_updates: Counter::default(),
            reauthenticates: Counter::default(),
            sessions: Gauge::default(),
            session_reads: Counter::default(),
            session_read_failures: Counter::default(),
            tickets_made: Counter::default(),
            tickets_used: Counter::default(),
            deliveries: Counter::default(),
            conflations: Counter::default(),
            deflated: Counter::default(),
            deflated_from_bytes: Counter::default(),
            deflated_to_bytes: Counter::default(),
            sent_bytes: Counter::default(),
            received_bytes: Counter::default(),
            publish_lag: Histogram::new(&SERVER_BOUNDS_US),
            fanout: Histogram::new(&SERVER_BOUNDS_US),
            polls: Family::default(),
            poll_duration: Histogram::new(&UPSTREAM_BOUNDS_US),
            key_set_fetches: Family::default(),
            token_fetches: Family::default(),
            hooks: Family::default(),
            actions: Family::default(),
            actions_in_flight: Gauge::default(),
            action_duration: Histogram::new(&UPSTREAM_BOUNDS_US),
            streams: Gauge::default(),
            subscriptions: Gauge::default(),
            history_bytes: Gauge::default(),
            pinned_bytes: Gauge::default(),
            mailbox_full: Counter::default(),
            loop_latency: Histogram::new(&SERVER_BOUNDS_US),
            clock_steps: Counter::default(),
            panics: Counter::default(),
        }
    }
}

/// What belongs to the process and not to a core, as of the scrape.
#[derive(Clone, Debug, Default)]
pub struct Process {
    /// When it started.
    pub started: WallTime,
    /// Connections it takes at most.
    pub connections_max: u64,
    /// Whether it drains.
    pub draining: bool,
    /// Keys that were fetched with issuers' key sets.
    pub key_set_keys: u64,
    /// How long ago the oldest of those sets was fetched.
    pub key_set_age: Duration,
    /// Ephemeral sessions that it knows.
    pub ephemeral_sessions: u64,
    /// What is counted of Redis, where it is configured.
    pub store: Option<Arc<StoreMetrics>>,
    /// Its logouts, revocations and changed permissions.
    pub control: ControlCounts,
}

/// What was counted of logouts, revocations and changed permissions.
#[derive(Clone, Copy, Debug, Default)]
pub struct ControlCounts {
    /// Those that were carried out.
    pub events: u64,
    /// Those that were not understood.
    pub refused: u64,
    /// What is kept of them in mind.
    pub marks: u64,
    /// Marks that had to go before their time.
    pub marks_dropped: u64,
}

/// What kind of metric one is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Durations, by bucket.
    Histogram,
}

impl MetricKind {
    /// Its spelling in `# TYPE` lines.
    pub const fn as_str(self) -> &'static str {
        match self {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct MetricDoc {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub kind: MetricKind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it says, without a full stop.
    pub meaning: &'static str,
    source: Source,
}

/// Where a metric's numbers come from.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// Of each core, one number for each of the label values.
    Cells { values: &'static [&'static [&'static str]], read: fn(&CoreMetrics, usize) -> u64 },
    /// Of each core.
    Histogram(fn(&CoreMetrics) -> &Histogram),
    /// One number, with these label values.
    Process { values: &'static [&'static str], read: fn(&Process, usize) -> u64 },
    /// Of Redis, one number for each of the label values; none where it is not configured.
    Store { values: &'static [&'static [&'static str]], read: fn(&StoreMetrics, usize) -> u64 },
}

const fn cells(
    (name, kind, labels): (&'static str, MetricKind, &'static [&'static str]),
    meaning: &'static str,
    values: &'static [&'static [&'static str]],
    read: fn(&CoreMetrics, usize) -> u64,
) -> MetricDoc {
    MetricDoc { name, kind, labels, meaning, source: Source::Cells { values, read } }
}

const fn counter(name: &'static str, meaning: &'static str, read: fn(&CoreMetrics, usize) -> u64) -> MetricDoc {
    cells((name, MetricKind::Counter, &[]), meaning, &[&[]], read)
}

const fn gauge(name: &'static str, meaning: &'static str, read: fn(&CoreMetrics, usize) -> u64) -> MetricDoc {
    cells((name, MetricKind::Gauge, &[]), meaning, &[&[]], read)
}

const fn histogram(name: &'static str, meaning: &'static str, read: fn(&CoreMetrics) -> &Histogram) -> MetricDoc {
    MetricDoc { name, kind: MetricKind::Histogram, labels: &[], meaning, source: Source::Histogram(read) }
}

const fn process(name: &'static str, meaning: &'static str, read: fn(&Process, usize) -> u64) -> MetricDoc {
    let source = Source::Process { values: &[], read };
    MetricDoc { name, kind: MetricKind::Gauge, labels: &[], meaning, source }
}

const fn store(
    (name, kind, labels): (&'static str, MetricKind, &'static [&'static str]),
    meaning: &'static str,
    values: &'static [&'static [&'static str]],
    read: fn(&StoreMetrics, usize) -> u64,
) -> MetricDoc {
    MetricDoc { name, kind, labels, meaning, source: Source::Store { values, read } }
}

const fn process_counter(name: &'static str, meaning: &'static str, read: fn(&Process, usize) -> u64) -> MetricDoc {
    let source = Source::Process { values: &[], read };
    MetricDoc { name, kind: MetricKind::Counter, labels: &[], meaning, source }
}

/// Every metric, in the order of the page.
pub const METRICS: &[MetricDoc] = &[
    MetricDoc {
        name: "restcast_build_info",
        kind: MetricKind::Gauge,
        labels: &["version"],
        meaning: "Always 1; the version is its label",
        source: Source::Process { values: &[env!("CARGO_PKG_VERSION")], read: |_, _| 1 },
    },
    process(
        "restcast_start_time_seconds",
        "When the process started, in seconds since the Unix epoch",
        |process, _| process.started.as_secs(),
    ),
    process("restcast_cores", "Cores that serve, one thread each", |_, cores| cores as u64),
    process("restcast_draining", "1 while the process drains, else 0", |process, _| u64::from(process.draining)),
    process("restcast_connections_max", "Connections the process takes at most", |process, _| process.connections_max),
    cells(
        ("restcast_connections", MetricKind::Gauge, &["transport"]),
        "Open connections",
        ConnectionKind::VALUES,
        |core, at| core.connections.cells[at].value(),
    ),
    counter("restcast_connections_accepted_total", "Sockets accepted", |core, _| core.accepted.value()),
    counter("restcast_accept_errors_total", "Accepts that failed", |core, _| core.accept_errors.value()),
    counter(
        "restcast_accept_pauses_total",
        "Times that accepting paused for want of descriptors or memory",
        |core, _| core.accept_pauses.value(),
    ),
    cells(
        ("restcast_tls_handshakes_total", MetricKind::Counter, &["result"]),
        "TLS handshakes of clients, with a certificate, resumed or failed; refused: its address had as many as it may; not_tls: nothing of TLS was spoken",
        TlsHandshake::VALUES,
        |core, at| core.tls_handshakes.cells[at].value(),
    ),
    cells(
        ("restcast_handshakes_total", MetricKind::Counter, &["result"]),
        "Requests for a stream or a WebSocket, by ok or the code of the refusal",
        HandshakeResult::VALUES,
        |core, at| core.handshakes.cells[at].value(),
    ),
    cells(
        ("restcast_api_key_handshakes_total", MetricKind::Counter, &["result"]),
        "API keys presented",
        ApiKeyResult::VALUES,
        |core, at| core.api_key_handshakes.cells[at].value(),
    ),
    cells(
        ("restcast_closes_total", MetricKind::Counter, &["code", "reason"]),
        "Connections that ended, by close code and reason",
        Close::VALUES,
        |core, at| core.closes.cells[at].value(),
    ),
    counter("restcast_expiries_total", "Connections whose credential ran out", |core, _| core.expiries.value()),
    cells(
        ("restcast_auth_updates_total", MetricKind::Counter, &["result"]),
        "Credentials presented on live connections",
        AuthUpdateResult::VALUES,
        |core, at| core.auth_updates.cells[at].value(),
    ),
    process_counter(
        "restcast_control_events_total",
        "Logouts, revocations and changed permissions that were carried out, each as often as it was heard",
        |process, _| process.control.events,
    ),
    process_counter(
        "restcast_control_events_refused_total",
        "Control events that were not understood",
        |process, _| process.control.refused,
    ),
    process("restcast_marks", "Logouts, revocations and changed permissions that are kept in mind", |process, _| {
        process.control.marks
    }),
    process_counter(
        "restcast_marks_dropped_total",
        "Marks that had to go before their time, for want of room: someone must act",
        |process, _| process.control.marks_dropped,
    ),
    counter("restcast_token_verifications_total", "Tokens whose signature was verified", |core, _| {
        core.token_verifications.value()
    }),
    counter("restcast_token_cache_hits_total", "Tokens that had been verified before, and cost a hash", |core, _| {
        core.token_cache_hits.value()
    }),
    counter(
        "restcast_permission_updates_total",
        "Connections that were told of other permissions or roles",
        |core, _| core.permission_updates.value(),
    ),
    counter("restcast_reauthenticates_total", "Reauthenticate frames sent", |core, _| core.reauthenticates.value()),
    gauge("restcast_sessions", "Sessions that connections hang on, on each core", |core, _| core.sessions.value()),
    counter(
        "restcast_session_reads_total",
        "Records of sessions that were read, at handshakes and again",
        |core, _| core.session_reads.value(),
    ),
    counter("restcast_session_read_failures_total", "Records of sessions that the store did not give", |core, _| {
        core.session_read_failures.value()
    }),
    counter("restcast_tickets_made_total", "Tickets handed out", |core, _| core.tickets_made.value()),
    counter("restcast_tickets_used_total", "Tickets used", |core, _| core.tickets_used.value()),
    counter("restcast_deliveries_total", "Events handed to sockets, one for each subscriber", |core, _| {
        core.deliveries.value()
    }),
    counter(
        "restcast_conflations_total",
        "Times that a slow or rate-limited reader got one snapshot for several events",
        |core, _| core.conflations.value(),
    ),
    counter("restcast_deflated_frames_total", "Frames deflated, once for all of a core who get them so", |core, _| {
        core.deflated.value()
    }),
    counter("restcast_deflate_input_bytes_total", "Bytes of those frames before", |core, _| {
        core.deflated_from_bytes.value()
    }),
    counter("restcast_deflate_output_bytes_total", "Bytes of those frames after", |core, _| {
        core.deflated_to_bytes.value()
    }),
    counter("restcast_sent_bytes_total", "Bytes written to clients", |core, _| core.sent_bytes.value()),
    counter("restcast_received_bytes_total", "Bytes read from clients", |core, _| core.received_bytes.value()),
    histogram(
        "restcast_publish_lag_seconds",
        "From an upstream's response to the first send of the event it made",
        |core| &core.publish_lag,
    ),
    histogram(
        "restcast_fanout_seconds",
        "From the first to the last turn in which a core sent an event to its readers",
        |core| &core.fanout,
    ),
    cells(
        ("restcast_polls_total", MetricKind::Counter, &["result"]),
        "Polls that ended, by what they brought or the code of the failure",
        PollResult::VALUES,
        |core, at| core.polls.cells[at].value(),
    ),
    histogram("restcast_poll_duration_seconds", "From a poll's start to its end", |core| &core.poll_duration),
    cells(
        ("restcast_key_set_fetches_total", MetricKind::Counter, &["result"]),
        "Fetches of issuers' key sets that ended; after a failure the last set stays in force",
        KeySetFetch::VALUES,
        |core, at| core.key_set_fetches.cells[at].value(),
    ),
    process(
        "restcast_key_set_keys",
        "Keys of fetched key sets that are in force, one for each algorithm",
        |process, _| process.key_set_keys,
    ),
    process(
        "restcast_key_set_age_seconds",
        "How long ago the oldest key set in force was fetched, or since the start where one never was; 0 without issuers",
        |process, _| process.key_set_age.as_secs(),
    ),
    cells(
        ("restcast_oauth_token_requests_total", MetricKind::Counter, &["result"]),
        "Requests for upstreams' OAuth tokens that ended; after a failure a token that is still good stays in use",
        TokenFetch::VALUES,
        |core, at| core.token_fetches.cells[at].value(),
    ),
    cells(
        ("restcast_hooks_total", MetricKind::Counter, &["result"]),
        "Calls of `POST /v1/hooks/{id}`, by what became of them",
        HookResult::VALUES,
        |core, at| core.hooks.cells[at].value(),
    ),
    process(
        "restcast_ephemeral_sessions",
        "Ephemeral sessions that live in this process; with Redis those that its connections live by, or did within `direct.linger`",
        |process, _| process.ephemeral_sessions,
    ),
    cells(
        ("restcast_actions_total", MetricKind::Counter, &["result"]),
        "Actions that ended, by ok or the code of the refusal or failure",
        ActionResult::VALUES,
        |core, at| core.actions.cells[at].value(),
    ),
    gauge("restcast_actions_in_flight", "Actions whose upstream has not answered yet", |core, _| {
        core.actions_in_flight.value()
    }),
    histogram("restcast_action_duration_seconds", "From an action's request to its end", |core| &core.action_duration),
    gauge("restcast_streams", "Filled-in URLs that exist, lingering ones included", |core, _| core.streams.value()),
    gauge("restcast_subscriptions", "Subscriptions of open connections", |core, _| core.subscriptions.value()),
    gauge("restcast_history_bytes", "Bytes of values and histories", |core, _| core.history_bytes.value()),
    gauge("restcast_pinned_bytes", "Bytes of frames held for stalled readers", |core, _| core.pinned_bytes.value()),
    counter("restcast_mailbox_full_total", "Messages that found another core's mailbox full", |core, _| {
        core.mailbox_full.value()
    }),
    histogram("restcast_loop_latency_seconds", "How long one turn of a core's loop took", |core| &core.loop_latency),
    counter("restcast_clock_steps_total", "Times that a core saw the wall clock stepped", |core, _| {
        core.clock_steps.value()
    }),
    counter("restcast_panics_total", "Tasks that panicked; each cost one connection or poll", |core, _| {
        core.panics.value()
    }),
    store(
        ("restcast_redis_up", MetricKind::Gauge, &["link"]),
        "1 while the connection to Redis for commands, published events, the control stream or API keys is there, else 0",
        RedisLink::VALUES,
        |store, at| store.up.cells[at].value(),
    ),
    store(
        ("restcast_redis_connects_total", MetricKind::Counter, &["link"]),
        "Connections to Redis that were made and logged in",
        RedisLink::VALUES,
        |store, at| store.connects.cells[at].value(),
    ),
    store(
        ("restcast_redis_questions_total", MetricKind::Counter, &["result"]),
        "Questions to Redis about sessions and tickets, and by way of it to other processes, by how they ended",
        RedisResult::VALUES,
        |store, at| store.questions.cells[at].value(),
    ),
    store(
        ("restcast_redis_questions_waiting", MetricKind::Gauge, &[]),
        "Questions to Redis that wait or are under way",
        &[&[]],
        |store, _| store.waiting.value(),
    ),
    store(
        ("restcast_control_entries_total", MetricKind::Counter, &["what"]),
        "Control events heard, read from or appended to the control stream, not understood, or dropped for want of room",
        RedisEntry::VALUES,
        |store, at| store.entries.cells[at].value(),
    ),
    store(
        ("restcast_control_entries_waiting", MetricKind::Gauge, &[]),
        "Control events that wait to be put on the control stream",
        &[&[]],
        |store, _| store.entries_waiting.value(),
    ),
];

/// The page, in the text format 0.0.4: the sums over `cores`, and what belongs to the `process`.
pub fn render(cores: &[Arc<CoreMetrics>], process: &Process) -> String {
    let mut page = String::with_capacity(16 << 10);
    for metric in METRICS {
        let name = metric.name;
        let _ = writeln!(page, "# HELP {name} {}.\n# TYPE {name} {}", metric.meaning, metric.kind.as_str());
        match metric.source {
            Source::Cells { values, read } => {
                for (at, values) in values.iter().enumerate() {
                    let sum = cores.iter().map(|core| read(core, at)).fold(0, u64::wrapping_add);
                    write_sample(&mut page, name, metric.labels, values, sum);
                }
            }
            Source::Histogram(read) => write_histogram(&mut page, name, cores, read),
            Source::Process { values, read } => {
                write_sample(&mut page, name, metric.labels, values, read(process, cores.len()));
            }
            Source::Store { values, read } => {
                for store in process.store.iter() {
                    for (at, values) in values.iter().enumerate() {
                        write_sample(&mut page, name, metric.labels, values, read(store, at));
                    }
                }
            }
        }
    }
    page
}

/// The README's table of [`METRICS`], in Markdown.
pub fn table() -> String {
    let mut table = String::from("| metric | kind | labels | meaning |\n|---|---|---|---|\n");
    for MetricDoc { name, kind, labels, meaning, .. } in METRICS {
        let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(table, "| `{name}` | {} | {} | {meaning} |", kind.as_str(), labels.join(", "));
    }
    table
}

fn write_sample(page: &mut String, name: &str, labels: &[&str], values: &[&str], sample: u64) {
    // No label value holds a character that would need an escape: they are the words written above.
    let pairs: Vec<_> = labels.iter().zip(values).map(|(label, value)| format!("{label}=\"{value}\"")).collect();
    let _ = match pairs.as_slice() {
        [] => writeln!(page, "{name} {sample}"),
        pairs => writeln!(page, "{name}{{{}}} {sample}", pairs.join(",")),
    };
}

fn write_histogram(page: &mut String, name: &str, cores: &[Arc<CoreMetrics>], read: fn(&CoreMetrics) -> &Histogram) {
    // The bounds are the histogram's own; a page of no cores has them too.
    let empty = CoreMetrics::default();
    let bounds_us = read(&empty).bounds_us;
    let mut below = 0;
    for at in 0..=BUCKETS {
        below += cores.iter().map(|core| read(core).buckets[at].value()).sum::<u64>();
        let bound = bounds_us.get(at).map_or("+Inf".to_owned(), |&bound_us| seconds(bound_us));
        let _ = writeln!(page, "{name}_bucket{{le=\"{bound}\"}} {below}");
    }
    let sum_us = cores.iter().map(|core| read(core).sum_us.value()).fold(0, u64::wrapping_add);
    // The count is read off the buckets, so that it is theirs even if the core counts one meanwhile.
    let _ = writeln!(page, "{name}_sum {}\n{name}_count {below}", seconds(sum_us));
}

/// `us` in seconds, without a rounding error.
fn seconds(us: u64) -> String {
    let text = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_of(cores: &[Arc<CoreMetrics>]) -> String {
        let process = Process {
            started: WallTime::from_secs(1_700_000_000),
            connections_max: 900,
            draining: true,
            store: Some(Arc::new(StoreMetrics::default())),
            ..Process::default()
        };
        render(cores, &process)
    }

    fn assert_says(page: &str, line: &str) {
        assert!(page.lines().any(|found| found == line), "no line «{line}» in\n{page}");
    }

    #[test]
    fn the_cores_are_added_up() {
        let cores = [Arc::new(CoreMetrics::default()), Arc::new(CoreMetrics::default())];
        for core in &cores {
            core.connections.of(ConnectionKind::WebSocket).rise();
            core.deliveries.add(500);
        }
        cores[0].connections.of(ConnectionKind::Sse).rise();
        cores[0].connections.of(ConnectionKind::Sse).fall();
        cores[0].handshakes.of(HandshakeResult::of_code("INVALID_TOKEN")).count();
        cores[1].polls.of(PollResult::of_code("UPSTREAM_DNS")).count();
        cores[1].closes.of(Close::of(4001, "token_expired")).count();
        cores[1].history_bytes.set(4_096);
        let page = page_of(&cores);
        for line in [
            "# TYPE restcast_connections gauge",
            "restcast_connections{transport=\"ws\"} 2",
            "restcast_connections{transport=\"sse\"} 0",
            "# TYPE restcast_deliveries_total counter",
            "restcast_deliveries_total 1000",
            "restcast_handshakes_total{result=\"INVALID_TOKEN\"} 1",
            "restcast_polls_total{result=\"UPSTREAM_DNS\"} 1",
            "restcast_closes_total{code=\"4001\",reason=\"token_expired\"} 1",
            "restcast_history_bytes 4096",
            "restcast_cores 2",
            "restcast_draining 1",
            "restcast_connections_max 900",
            "restcast_start_time_seconds 1700000000",
            concat!("restcast_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            assert_says(&page, line);
        }
    }

    #[test]
    fn redis_is_counted_where_it_is_configured() {
        let store = Arc::new(StoreMetrics::default());
        store.up.of(RedisLink::Log).set(1);
        store.questions.of(RedisResult::Timeout).add(3);
        store.entries_waiting.set(7);
        let page = render(&[], &Process { store: Some(store), ..Process::default() });
        for line in [
            "restcast_redis_up{link=\"log\"} 1",
            "restcast_redis_up{link=\"commands\"} 0",
            "restcast_redis_questions_total{result=\"timeout\"} 3",
            "restcast_control_entries_waiting 7",
        ] {
            assert_says(&page, line);
        }
        let without = render(&[], &Process::default());
        let sample = without.lines().find(|line| !line.starts_with('#') && line.contains("redis"));
        assert_eq!(sample, None, "an alert on 0 would mean nothing");
    }

    #[test]
    fn a_histograms_buckets_are_cumulative_and_inclusive() {
        let core = Arc::new(CoreMetrics::default());
        for us in [0, 50, 51, 1_000_000, 1_000_001, 90_000_000] {
            core.loop_latency.observe(Duration::from_micros(us));
        }
        let page = page_of(&[core]);
        for line in [
            "# TYPE restcast_loop_latency_seconds histogram",
            "restcast_loop_latency_seconds_bucket{le=\"0.00005\"} 2",
            "restcast_loop_latency_seconds_bucket{le=\"0.0001\"} 3",
            "restcast_loop_latency_seconds_bucket{le=\"0.5\"} 3",
            "restcast_loop_latency_seconds_bucket{le=\"1\"} 4",
            "restcast_loop_latency_seconds_bucket{le=\"+Inf\"} 6",
            "restcast_loop_latency_seconds_sum 92.000102",
            "restcast_loop_latency_seconds_count 6",
        ] {
            assert_says(&page, line);
        }
    }

    #[test]
    fn bounds_ascend() {
        for bounds in [UPSTREAM_BOUNDS_US, SERVER_BOUNDS_US] {
            assert!(bounds.is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn a_gauge_does_not_fall_below_zero() {
        let gauge = Gauge::default();
        gauge.fall();
        assert_eq!(gauge.value(), 0);
    }

    #[test]
    fn every_metric_follows_the_naming_rules() {
        for (at, metric) in METRICS.iter().enumerate() {
            let MetricDoc { name, kind, labels, meaning, source } = metric;
            assert!(name.starts_with("restcast_"), "{name}");
            assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == MetricKind::Counter, "{name}");
            assert_eq!(matches!(source, Source::Histogram(_)), *kind == MetricKind::Histogram, "{name}");
            assert!(!meaning.contains(['\n', '\\', '|']) && !meaning.ends_with('.'), "{name}");
            assert!(METRICS[at + 1..].iter().all(|other| other.name != *name), "{name} stands twice");
            let values = match source {
                Source::Cells { values, .. } | Source::Store { values, .. } => values,
                Source::Process { values, .. } => std::slice::from_ref(values),
                Source::Histogram(_) => &[],
            };
            for (at, set) in values.iter().enumerate() {
                assert_eq!(set.len(), labels.len(), "{name}");
                assert!(!set.iter().any(|value| value.contains(['"', '\\', '\n'])), "{name}");
                assert!(!values[at + 1..].contains(set), "{name}: {set:?} stands twice");
            }
        }
    }

    #[test]
    fn each_line_of_the_page_is_a_comment_or_a_sample() {
        for line in page_of(&[Arc::new(CoreMetrics::default())]).lines() {
            let sample = line.rsplit_once(' ').is_some_and(|(_, value)| value.parse::<f64>().is_ok());
            assert!(line.starts_with("# HELP ") || line.starts_with("# TYPE ") || sample, "{line}");
        }
        assert!(page_of(&[]).contains("restcast_loop_latency_seconds_count 0\n"), "no core, no sample, no panic");
    }

    #[test]
    fn every_code_of_an_upstream_has_its_label() {
        for code in crate::stream::poll::UpstreamCode::ALL {
            assert_eq!(PollResult::VALUES[PollResult::of_code(code.as_str()).index()], [code.as_str()]);
        }
        assert_eq!(PollResult::of_code("UPSTREAM_NEW"), PollResult::Other);
        assert_eq!(HandshakeResult::of_code("NEW"), HandshakeResult::Other);
    }

    #[test]
    fn every_close_is_found_by_its_code_and_reason() {
        for close in Close::ALL.iter().filter(|&&close| close != Close::Other) {
            let [code, reason] = Close::VALUES[close.index()] else { panic!("two labels") };
            assert_eq!(Close::of(code.parse().expect("a number"), reason), *close);
        }
        assert_eq!(Close::of(1002, ""), Close::ProtocolError);
        assert_eq!(Close::of(4001, "new"), Close::Other);
        assert_eq!(Close::of(4999, ""), Close::Other);
    }

    #[test]
    fn the_table_has_a_row_for_each_metric() {
        let table = table();
        assert_eq!(table.lines().count(), 2 + METRICS.len());
        assert!(table.contains("| `restcast_closes_total` | counter | `code`, `reason` | Connections that ended, by"));
    }
}
