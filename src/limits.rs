//! Every bound of the server, in one place: those an operator may set ([`Limits`], the `[limits]` table) and those that
//! are fixed (constants). Nothing is unbounded: a buffer, queue, map, retry or wait that has no line here is a defect.

use std::time::Duration;

/// The `[limits]` table. A count of 0 means «unlimited» unless its line says otherwise.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Connections in all; 0: what the descriptors allow, with a margin.
    pub connections: u32,
    /// Connections from one client address.
    pub connections_per_address: u32,
    /// Connections of one subject.
    pub connections_per_subject: u32,
    /// Streams one `/v1/ws` connection may be subscribed to at once.
    pub subscriptions_per_connection: u32,
    /// Filled-in URLs that exist at once, lingering ones included.
    pub streams: u32,
    /// Filled-in URLs from templates that one subject may have polled at once.
    pub streams_per_subject: u32,
    /// Those that callers without a subject choose by parameters, of one client address.
    pub streams_per_address: u32,
    /// Different `select`s of one filled-in URL at once, lingering ones included; 0: callers may not select.
    pub selects_per_stream: u32,
    /// Bytes of histories and values of the process.
    pub history_bytes_total: u64,
    /// Bytes of frames held for stalled readers only; past it the longest stalled are closed 1013.
    pub pinned_bytes: u64,
    /// Handshakes per second from one client address.
    pub handshakes_per_second_per_address: u32,
    /// How long an HTTP connection may idle between requests.
    pub keep_alive: Duration,
    /// How long a request head (and the credential, where `auth.first_message` is off) may take.
    pub handshake_timeout: Duration,
    /// Bytes of a request line and headers.
    pub request_head_bytes_max: u32,
    /// Bytes of one message from a client.
    pub message_bytes_max: u32,
    /// Messages per second from one connection; past it the connection is closed 1008.
    pub messages_per_second: u32,
    /// Failed credentials per minute from one address; past it answers are delayed, then 429.
    pub auth_failures_per_minute: u32,
    /// How long a socket may take nothing before it is closed 1013.
    pub write_stall: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 0,
            connections_per_address: 0,
            connections_per_subject: 0,
            subscriptions_per_connection: 64,
            streams: 10_000,
            streams_per_subject: 64,
            streams_per_address: 1024,
            selects_per_stream: 128,
            history_bytes_total: 256 << 20,
            pinned_bytes: 256 << 20,
            handshakes_per_second_per_address: 0,
            keep_alive: Duration::from_secs(15),
            handshake_timeout: Duration::from_secs(10),
            request_head_bytes_max: 16 << 10,
            message_bytes_max: 64 << 10,
            messages_per_second: 50,
            auth_failures_per_minute: 60,
            write_stall: Duration::from_secs(30),
        }
    }
}

/// Header fields in one request or upstream response.
pub const HEADERS_MAX: usize = 64;
/// Bytes of a request target.
pub const TARGET_BYTES_MAX: usize = 8 << 10;
/// Empty lines read over before a request line (RFC 9112 section 2.2 asks for at least one).
pub const EMPTY_LINES_MAX: usize = 2;
/// Pairs of one query.
pub const QUERY_PAIRS_MAX: usize = 64;
/// Subprotocols one WebSocket handshake may offer.
pub const SUBPROTOCOLS_MAX: usize = 16;
/// Bytes of chunk extensions in one body, of a request or an upstream response.
pub const CHUNK_EXTENSION_BYTES_MAX: u32 = 16 << 10;
/// Bytes of trailers behind one body, of a request or an upstream response.
pub const TRAILER_BYTES_MAX: u32 = 8 << 10;
/// Hops of `Forwarded` or `X-Forwarded-For` that are followed, from the nearest.
pub const FORWARDED_HOPS_MAX: usize = 32;
/// Bytes of a PROXY v2 header, its TLVs included.
pub const PROXY_V2_BYTES_MAX: usize = 2 << 10;
/// Interim (1xx) responses of an upstream before the final one.
pub const INTERIM_RESPONSES_MAX: u8 = 8;
/// Members of one gzip body: each costs an inflater.
pub const GZIP_MEMBERS_MAX: u16 = 1024;
/// Bytes of a request body on the public or the admin listener.
pub const REQUEST_BODY_BYTES_MAX: usize = 64 << 10;
/// Bytes of a JWT (protocol section 2).
pub const TOKEN_BYTES_MAX: usize = 8 << 10;
/// Bytes of an API key's id.
pub const API_KEY_ID_BYTES_MAX: usize = 64;
/// API keys that the admin API has made and not deleted.
pub const API_KEYS_MAX: usize = 10_000;
/// Streams, roles or permissions that one API key lists.
pub const API_KEY_LIST_MAX: usize = 64;
/// Bytes of a stream's id or glob, and of a role or permission, in such a list.
pub const STREAM_GLOB_BYTES_MAX: usize = 128;
/// Bytes of all their records together, about; past it none is made until one is deleted.
pub const API_KEYS_BYTES_MAX: usize = 8 << 20;
/// Deletions of such keys that are remembered, so that nothing brings one back; past it those go that were only heard of, then
/// the oldest that Redis knows of.
pub const API_KEYS_DELETED_MAX: usize = 10_000;
/// Bytes of one key's record in Redis: a longer one counts as one that cannot be read.
pub const API_KEY_RECORD_BYTES_MAX: usize = 128 << 10;
/// Bytes of all strings of one reply of Redis about API keys; what goes beyond is read over.
pub const API_KEYS_REPLY_BYTES_MAX: usize = 2 * API_KEYS_BYTES_MAX;
/// Fields of the hash of API keys in Redis that are read: more than there may be keys, for several processes may make the
/// last ones at the same time; where there are still more, somebody else keeps something there.
pub const API_KEYS_FIELDS_MAX: usize = 2 * API_KEYS_MAX;
/// Keys that are put in Redis, or taken out, with one call.
pub const API_KEYS_PER_CALL: usize = 64;
/// Changes of the hash of API keys that it tells the words of: whoever has not read it for so many cannot tell whether it came
/// back older meanwhile.
pub const API_KEYS_HISTORY_MAX: usize = 256;
/// Deletions of other processes that may wait to be carried out; past it the keys are read anew instead.
pub const API_KEYS_HEARD_MAX: usize = 10_000;
/// How many of them are carried out before others may use the keys.
pub const API_KEYS_HEARD_AT_ONCE: usize = 256;
/// Least time between two readings of all API keys in Redis, however often they change,
pub const API_KEYS_READ_INTERVAL: Duration = Duration::from_millis(50);
/// and how many bytes of them are read a second at most: of a few thousand keys that is no less often.
pub const API_KEYS_READ_BYTES_PER_SEC: usize = 8 << 20;
/// The longest time between two readings: what nobody has told of is seen then.
pub const API_KEYS_REREAD: Duration = Duration::from_secs(30);
/// How often in a row they are read to put things right, where others change them meanwhile.
pub const API_KEYS_ROUNDS_MAX: usize = 8;
/// Bytes of the state file.
pub const STATE_BYTES_MAX: usize = 16 << 20;
/// Bits of an RSA key that verifies tokens (RFC 7518 section 3.3),
pub const RSA_BITS_MIN: usize = 2048;
/// and the longest, which takes a core half a millisecond.
pub const RSA_BITS_MAX: usize = 8192;
/// `[[auth.jwt.jwks]]`.
pub const ISSUERS_MAX: usize = 64;
/// Bytes of an issuer's key set.
pub const JWKS_BYTES_MAX: usize = 256 << 10;
/// Keys of an issuer's set that are used, the first ones: a token without `kid` is tried against each of its algorithm.
pub const JWKS_KEYS_MAX: usize = 64;
/// How long a fetch of a key set may take: whoever waits for an unknown key waits no longer.
pub const JWKS_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the first fetches hold up the start.
pub const JWKS_START_WAIT: Duration = Duration::from_secs(6);
/// How long after a fetch for an unknown key the next such may begin.
pub const JWKS_COOL_DOWN: Duration = Duration::from_secs(30);
/// How long a key set is used before it is fetched anew, where its `Cache-Control` does not say: RFC 9111 section 5.2.2.1,
pub const JWKS_LIFE: Duration = Duration::from_secs(15 * 60);
/// at the least,
pub const JWKS_LIFE_MIN: Duration = Duration::from_secs(60);
/// and at the most.
pub const JWKS_LIFE_MAX: Duration = Duration::from_secs(86_400);
/// How long after a failed fetch the next begins, doubled after each one more,
pub const JWKS_RETRY_MIN: Duration = Duration::from_secs(1);
/// up to this.
pub const JWKS_RETRY_MAX: Duration = Duration::from_secs(60);
/// Nesting of a JSON value, from a client or an upstream (protocol section 3).
pub const JSON_DEPTH_MAX: usize = 128;
/// Bytes of a `since`, a client frame's `id` and the like.
pub const CLIENT_ID_BYTES_MAX: usize = 64;
/// Frames of one WebSocket message from a client.
pub const MESSAGE_FRAGMENTS_MAX: u32 = 1024;
/// Bytes of a frame that is deflated for those who take it so: a smaller one would hardly get smaller,
pub const DEFLATE_BYTES_MIN: usize = 64;
/// and a larger one would hold the core: it takes about 3 ms, as long as a turn of sends.
pub const DEFLATE_BYTES_MAX: usize = 1 << 20;
/// Bytes of a deflater's or an inflater's buffer that are kept from one message to the next.
pub const DEFLATE_SCRATCH_BYTES_MAX: usize = 64 << 10;
/// Deflate streams, each ended by a final block, that one message from a client may be made of.
pub const INFLATE_STREAMS_MAX: usize = 64;
/// Bytes of a URL that a caller gives, and of a `Location`.
pub const DIRECT_URL_BYTES_MAX: usize = 4 << 10;
/// Headers that a caller gives for a request,
pub const DIRECT_HEADERS_MAX: usize = HEADERS_MAX / 2;
/// bytes of one's value,
pub const DIRECT_HEADER_BYTES_MAX: usize = 8 << 10;
/// and of all names and values together.
pub const DIRECT_HEADERS_BYTES_MAX: usize = 16 << 10;
/// Bytes of a request's body that a caller gives.
pub const DIRECT_BODY_BYTES_MAX: usize = 32 << 10;
/// Bytes of the secret that names in direct mode are made under, at least: clients see the names.
pub const DIRECT_SECRET_BYTES_MIN: usize = 32;
/// Of what histories and values may take in all (`limits.history_bytes_total`), one part in so many is for streams that callers
/// describe, and theirs alone: past it the largest of them ends.
pub const DIRECT_BYTES_PART: u64 = 4;
/// A place among a subject's or an address's streams (`limits.streams_per_subject`, `streams_per_address`) is given to another
/// configured stream once in the interval of the one that had it, or in this where that is less.
pub const PLACE_SPACING_MAX: Duration = Duration::from_secs(10);
/// Filled-in streams that a core has forgotten, but not when they were polled last, so that one that is asked for again is polled
/// no sooner for it.
pub const STARTS_MAX: usize = 16_384;
/// The longest interval that a caller may ask for, in milliseconds: a day.
pub const DIRECT_INTERVAL_MS_MAX: u64 = 86_400_000;
/// Ephemeral sessions of the process, where `limits.streams` sets no lower bound.
pub const EPHEMERALS_MAX: usize = 65_536;
/// Bytes of the record of a session that processes share,
pub const EPHEMERAL_RECORD_BYTES_MAX: usize = 192 << 10;
/// and of what stands under the name that its maker gave it.
pub const EPHEMERAL_NAMED_BYTES_MAX: usize = 256;
/// How often a core tells the others which of those sessions its connections live by,
pub const EPHEMERAL_PASS: Duration = Duration::from_secs(10);
/// and how long it is believed: a process that is killed, or cannot say so, is missed after this.
pub const EPHEMERAL_HOLD: Duration = Duration::from_secs(60);
/// Sessions that are told of at once,
pub const EPHEMERALS_PER_LOOKUP: usize = 64;
/// and those whose records the store has lost, and gets back.
pub const EPHEMERALS_GIVEN_BACK: usize = 8;
/// Bytes of a `dedupe_key`.
pub const DEDUPE_KEY_BYTES_MAX: usize = 256;
/// Bytes of the name of a request's header.
pub const HEADER_NAME_BYTES_MAX: usize = 128;
/// Entries of `direct.allow`.
pub const ALLOW_PATTERNS_MAX: usize = 256;
/// Bytes of one of them.
pub const ALLOW_PATTERN_BYTES_MAX: usize = 2 << 10;
/// Redirects of one request that are followed.
pub const REDIRECTS_MAX: usize = 5;
/// Bytes of a host name (RFC 1035 section 2.3.4),
pub const NAME_BYTES_MAX: usize = 253;
/// and of one label of it.
pub const LABEL_BYTES_MAX: usize = 63;
/// `Prefer: wait=N` is clamped to this.
pub const PREFER_WAIT_MAX: Duration = Duration::from_secs(60);
/// An upstream's `Retry-After` is honoured up to this.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(86_400);
/// Budgets (`RateLimit`) of one response that are looked at.
pub const QUOTAS_MAX: usize = 8;
/// How long nobody asks an upstream that has nothing left of a budget and does not say until when.
pub const RESET_UNKNOWN: Duration = Duration::from_secs(60);
/// Links in the `Link` fields of one response that are looked at.
pub const LINKS_MAX: usize = 64;
/// How many times `response_bytes_max` the compressed bytes of a followed upstream may grow by without an event: room for what
/// stands around an event's data, and not for bombs.
pub const FOLLOWED_PADDING_FACTOR: u64 = 2;
/// Requests of streams that are not polled any more which are kept in mind, because their upstreams are to be left alone for a
/// while. Past it those that come back soonest are forgotten.
pub const SUCCESSIONS_MAX: usize = 16_384;
/// Requests to one origin with one credential that their upstream wants left alone for a while (`Retry-After` of a 4xx or
/// 5xx); past it those that come back soonest are forgotten.
pub const RESTS_MAX: usize = 4096;
/// Budgets of upstreams (origin and credential) that are kept in mind. Past it those without a hold are forgotten first.
pub const LANES_MAX: usize = 65_536;
/// Farthest place in the queue of those who wait for an upstream's rate.
pub const QUEUE_MAX: Duration = Duration::from_secs(3600);
/// Places in it that were given back and that nobody has taken yet; more are lost.
pub const PLACES_FREE_MAX: usize = 16_384;
/// Requests to one origin that fail in a row before it is left alone.
pub const BREAKER_FAILURES: u32 = 10;
/// How long an origin is left alone at first; it doubles with each probe that fails.
pub const BREAKER_REST_MIN: Duration = Duration::from_secs(1);
/// How long an origin is left alone at most.
pub const BREAKER_REST_MAX: Duration = Duration::from_secs(30);
/// Callers and origins where what a caller has described has failed last, of which that is kept in mind. Past it those that
/// are not left alone are forgotten first; more are not.
pub const CALLERS_BREAKERS_MAX: usize = 16_384;
/// `[[upstream]]` tables.
pub const UPSTREAMS_MAX: usize = 1024;
/// Windows of one stream.
pub const WINDOWS_MAX: usize = 32;
/// Pages of one value.
pub const PAGES_MAX: u64 = 1000;
/// Redirects of one poll that can be followed.
pub const POLL_REDIRECTS_MAX: u64 = 5;
/// Bytes of an upstream's `ETag` or `Last-Modified`; a longer one is not sent back.
pub const VALIDATOR_BYTES_MAX: usize = 1024;
/// Credentials of one core that somebody outside is asked about at once; past it those who present one are told to wait.
pub const LOOKUPS_MAX: usize = 65_536;
/// Keys, by issuer and `kid`, that one core asks for at once, besides those: whoever makes names up takes no room from others.
pub const KEY_LOOKUPS_MAX: usize = 1024;
/// Tokens that are looked at in one turn of those that have waited for the same key: each may have to be verified.
pub const KEY_WAITERS_PER_TURN: usize = 256;
/// How long such a question may go unanswered: beyond every timeout of those who are asked.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of one control event: a logout, a revocation, permissions that change.
pub const CONTROL_EVENT_BYTES_MAX: usize = 16 << 10;
/// Steps of the wall clock that a core remembers, 16 bytes each: a logout may have been dated by any of its times.
pub const CLOCK_STEPS_MAX: usize = 16;
/// Marks of control events that the process keeps at once, 110 bytes each; past it the one that ends soonest goes.
pub const MARKS_MAX: usize = 1 << 20;
/// Bytes of the lists of permissions and roles among them.
pub const MARKS_LIST_BYTES_MAX: usize = 64 << 20;
/// Users, sessions and tokens that one core may be told of at once; past it every connection is looked at.
pub const CONCERNED_MAX: usize = 4096;
/// Bytes of a session's id: express-session makes 32.
pub const SESSION_ID_BYTES_MAX: usize = 512;
/// Bytes of a session's record, as Redis holds it.
pub const SESSION_RECORD_BYTES_MAX: usize = 64 << 10;
/// Bytes of one text of a session's record that is kept: the user, a role, a permission, a claim.
pub const SESSION_TEXT_BYTES_MAX: usize = 1 << 10;
/// Roles, and permissions, that one session's record may list.
pub const SESSION_LISTED_MAX: usize = 1024;
/// Sessions whose records are asked for together.
pub const SESSIONS_PER_LOOKUP: usize = 256;
/// Sessions of one core that are looked after in one turn.
pub const SESSIONS_PER_TURN: usize = 2048;
/// Requests and connections that may wait for the answer to one question about a session or a key.
pub const LOOKUP_WAITERS_MAX: usize = 4096;
/// How long a ticket is good for (protocol section 1).
pub const TICKET_LIFE: Duration = Duration::from_secs(30);
/// Tickets made by one process within a ticket's life.
pub const TICKETS_MAX: usize = 65_536;
/// Tickets made for one subject within a ticket's life.
pub const TICKETS_PER_SUBJECT_MAX: u32 = 256;
/// Bytes of a ticket's record, as it is kept in Redis.
pub const TICKET_RECORD_BYTES_MAX: usize = 128 << 10;
/// `auth_update`s refused in a row before a connection is closed 4001.
pub const AUTH_UPDATES_REFUSED_MAX: u8 = 5;
/// Bytes of answers waiting for one connection's socket (frames of streams not included: those stay in the log).
pub const CONTROL_BYTES_MAX: usize = 256 << 10;
/// Connections that one fan-out turn serves before the core goes back through the ring.
pub const SENDS_PER_TURN: usize = 384;
/// Largest body that is compared, or as an action's answer checked, on the core itself; larger ones go to the worker pool.
pub const INLINE_DIFF_BYTES_MAX: usize = 256 << 10;
/// Bytes of a log chunk; a larger frame has its own.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Time from a close frame to the reset of a socket whose peer does not close.
pub const CLOSE_GRACE: Duration = Duration::from_secs(1);
/// Largest interval that a `max_rate_ms` may ask for.
pub const MAX_RATE_MS_MAX: u64 = 3_600_000;
/// Messages that may wait in one core's mailbox.
pub const MAILBOX_MESSAGES_MAX: usize = 65_536;
/// Bytes of a stream's `url` as written.
pub const URL_TEMPLATE_BYTES_MAX: usize = 8 << 10;
/// Bytes of a stream's `body` as written.
pub const BODY_TEMPLATE_BYTES_MAX: usize = 64 << 10;
/// Placeholders in one `url` or `body`.
pub const PLACEHOLDERS_MAX: usize = 16;
/// Bytes of a value that fills a placeholder, before it is encoded.
pub const TEMPLATE_VALUE_BYTES_MAX: usize = 1 << 10;
/// Bytes of a claim's or parameter's name in a placeholder.
pub const CLAIM_NAME_BYTES_MAX: usize = 128;
/// Streams that the admin API has made and not deleted,
pub const MANAGED_STREAMS_MAX: usize = 10_000;
/// and the bytes of all their records together; past either none is made until one is deleted.
pub const MANAGED_BYTES_MAX: usize = 6 << 20;
/// Fields of the hash of such streams in Redis that are read: more than there may be streams, for several processes may make
/// the last ones at the same time.
pub const MANAGED_FIELDS_MAX: usize = 2 * MANAGED_STREAMS_MAX;
/// Changed streams that may wait to be read from Redis; past it all are read.
pub const MANAGED_HEARD_MAX: usize = 256;
/// Least time between two readings of all streams in Redis,
pub const MANAGED_READ_INTERVAL: Duration = Duration::from_millis(200);
/// and the longest: what nobody has told of is seen then.
pub const MANAGED_REREAD: Duration = Duration::from_secs(30);
/// How often in a row they are read, where this process changes them meanwhile.
pub const MANAGED_ROUNDS_MAX: usize = 8;
/// How often in a row a change of one such stream is tried, where others change it meanwhile.
pub const MANAGED_CHANGES_MAX: usize = 64;
/// How old a refresh of another process may be: what is read back after an absence is no news.
pub const REFRESH_HEARD_MAX: Duration = Duration::from_secs(10);
/// Such streams that are looked at, every [`SECRETS_INTERVAL`], for whether the secrets that they name are there again.
pub const MANAGED_LOOKS_MAX: usize = 256;
/// Tables and arrays within each other in such a stream's JSON.
pub const MANAGED_DEPTH_MAX: usize = 8;
/// Least time between the starts of two polls of one filled-in URL that hooks or administrators ask for, however often
/// they do: what comes within it is one poll at its end.
pub const REFRESH_INTERVAL: Duration = Duration::from_millis(100);
/// Secrets that the hooks of one stream may be signed with.
pub const HOOK_SECRETS_MAX: usize = 8;
/// Signatures in one hook's header: one for each of the sender's secrets.
pub const HOOK_SIGNATURES_MAX: usize = 8;
/// Bytes of that header.
pub const HOOK_HEADER_BYTES_MAX: usize = 1 << 10;
/// How far a hook's time may be from ours, either way (protocol section 6).
pub const HOOK_WINDOW: Duration = Duration::from_secs(300);
/// How long after its first coming the same hook asks for a poll again: senders repeat what they think was lost, and two
/// changes of one second are signed alike. Later it is a replay.
pub const HOOK_REPEAT: Duration = Duration::from_secs(10);
/// Hooks that are kept in mind to tell replays; past it the oldest go, and a replay of one asks for a poll.
pub const HOOKS_SEEN_MAX: usize = 16_384;
/// Streams whose hooks wait to be told to other processes; of one stream the last, and more are not told.
pub const HOOKS_TOLD_MAX: usize = 1024;
/// Bytes of what is told of a hook, sealed.
pub const HOOK_TOLD_BYTES_MAX: usize = 128;
/// Filled-in streams that actions have changed and that wait to be told to other processes, each once; more are not told, and
/// are seen there with the next regular poll. A process tells of all that wait at once, [`REFRESH_INTERVAL`] apart.
pub const REFRESHES_TOLD_MAX: usize = 1024;
/// `[[action]]`s of a configuration.
pub const ACTIONS_MAX: usize = 256;
/// Bytes of an action's `type`, and of the `type` of a message that may be one.
pub const ACTION_TYPE_BYTES_MAX: usize = 64;
/// Streams that an action's `refresh` may name.
pub const ACTION_REFRESH_MAX: usize = 16;
/// Bytes of an action's `schema`.
pub const ACTION_SCHEMA_BYTES_MAX: usize = 64 << 10;
/// Nesting of a message that is checked against a schema: checking recurses, through each of its levels several times.
pub const ACTION_SCHEMA_DEPTH_MAX: usize = 32;
/// Bytes of an action's request body, filled in.
pub const ACTION_BODY_BYTES_MAX: usize = 16 << 20;
/// Actions of one connection that are under way at once; past it they are refused.
pub const ACTIONS_PER_CONNECTION_MAX: u8 = 16;
/// Actions of one core that are under way at once; past it they are refused.
pub const ACTIONS_PER_CORE_MAX: usize = 1024;
/// Least time between two log lines about one action's failures, on one core.
pub const ACTION_NOTICE_INTERVAL: Duration = Duration::from_secs(60);
/// Names in a stream's `params`.
pub const PARAMS_MAX: usize = 16;
/// Views of one stream.
pub const VIEWS_MAX: usize = 32;
/// Pointers of one view.
pub const VIEW_POINTERS_MAX: usize = 64;
/// Bytes of a JSONPath as written.
pub const PATH_BYTES_MAX: usize = 1 << 10;
/// Parentheses, filters and functions of a JSONPath within each other.
pub const PATH_NESTING_MAX: usize = 16;
/// Steps that evaluating a JSONPath may take for each byte of the value, a step being about as much as looking at a member:
pub const PATH_STEPS_PER_BYTE: u64 = 8;
/// and how many it may take with any value, however small.
pub const PATH_STEPS_MIN: u64 = 1 << 16;
/// Bytes that the `match()` and `search()` patterns of a JSONPath are compiled to, together.
pub const PATH_PATTERN_BYTES_MAX: usize = 1 << 16;
/// Work that a caller's `select` may take for each byte of what is shown without it, a step of its path or a byte of what it
/// selects:
pub const SELECT_WORK_PER_BYTE: u64 = 4;
/// and how much it may take with any value, however small.
pub const SELECT_WORK_MIN: u64 = 1 << 14;
/// The same for all `select`s of a stream, or of one of its views, together:
pub const SELECTS_WORK_PER_BYTE: u64 = 16;
/// As above,
pub const SELECTS_WORK_MIN: u64 = 1 << 18;
/// and at most so much for those of all views, however large the value: it takes about a quarter of a second.
pub const SELECTS_WORK_MAX: u64 = 1 << 25;
/// Of which each that is watched has one of so many parts for itself, whatever others take; where more than half as many are
/// watched, half of it is shared out so.
pub const SELECTS_CHEAP_PARTS: u64 = 128;
/// One subject, or one address of callers without a credential, takes at most one of so many parts of it beside that.
pub const SELECTS_SUBJECT_PARTS: u64 = 2;
/// One of so many parts of `limits.selects_per_stream` is left to others by whoever watches many.
pub const SELECTS_OTHERS_PARTS: u32 = 4;
/// Bytes of an operator's `filter`.
pub const FILTER_BYTES_MAX: usize = 4 << 10;
/// Bytes of stack that reading or running one may take: a nested text takes some for each byte of it.
pub const FILTER_STACK_BYTES: usize = 256 << 20;
/// Bytes of address space of the process that filters run in, its stack and its program included.
pub const FILTER_MEMORY_BYTES_MAX: u64 = 1536 << 20;
/// How long one run of a filter may take.
pub const FILTER_TIME_MAX: Duration = Duration::from_secs(3);
/// How much longer the server waits for the process to say so before it ends it.
pub const FILTER_TIME_GRACE: Duration = Duration::from_secs(1);
/// Processes that filters run in, each with its thread in the server.
pub const FILTER_PROCESSES: usize = 2;
/// Programs that such a process keeps compiled.
pub const FILTER_PROGRAMS_MAX: usize = 64;
/// Bytes of what a filter reads and writes past which its process is made anew, so that its memory is given back.
pub const FILTER_RETIRE_BYTES: usize = 4 << 20;
/// Bytes of the name of a key that signs events.
pub const SIGNING_KEY_ID_BYTES_MAX: usize = 64;
/// Bytes of a stream's name with its parameters: id, and each parameter's name and value percent-encoded.
pub const STREAM_NAME_BYTES_MAX: usize = 8 << 10;

/// Upstream connections of one core at once: connecting, in use and idle.
pub const UPSTREAM_CONNECTIONS_MAX: usize = 1024;
/// Those of them that are the operator's alone: what callers have described may take no more than the others.
pub const UPSTREAM_CONNECTIONS_OWN: usize = 256;
/// Idle upstream connections of one core, to one origin.
pub const UPSTREAM_IDLE_PER_ORIGIN_MAX: usize = 128;
/// Idle upstream connections of one core in all.
pub const UPSTREAM_IDLE_MAX: usize = 1024;
/// How long an upstream connection may idle before it is closed.
pub const UPSTREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Fetches of one core that may wait for a free upstream connection.
pub const UPSTREAM_WAITING_MAX: usize = 65_536;
/// Of what callers have described; it waits behind the operator's.
pub const UPSTREAM_CALLERS_WAITING_MAX: usize = 16_384;
/// Upstreams' streams (`kind = "sse"`, `"ndjson"`) that one core follows at once, each over a connection of its own.
pub const UPSTREAM_FOLLOWED_MAX: usize = 4096;
/// Bytes of an upstream's status line and headers.
pub const UPSTREAM_HEAD_BYTES_MAX: usize = 32 << 10;
/// Bytes of what an HTTP proxy answers to `CONNECT`.
pub const PROXY_HEAD_BYTES_MAX: usize = 16 << 10;
/// Header fields of one head of that.
pub const PROXY_HEADERS_MAX: usize = 64;
/// Bytes of a response without a value (an error page) that are read only so that the connection can be used again.
pub const UPSTREAM_DRAIN_BYTES_MAX: u64 = 64 << 10;
/// How long that may take.
pub const UPSTREAM_DRAIN_TIMEOUT: Duration = Duration::from_millis(500);
/// Time between the attempts to connect to a name's addresses (RFC 8305 section 5).
pub const CONNECT_STAGGER: Duration = Duration::from_millis(250);
/// Sets of trusted certificates one core keeps ready; the one used longest ago goes first.
pub const TRUST_SETS_MAX: usize = 64;
/// Threads that look up the operator's host names: of the configuration and the admin API, of token endpoints and key sets.
pub const RESOLVER_THREADS_MAX: usize = 4;
/// Lookups that may wait for such a thread.
pub const RESOLVER_QUEUE_MAX: usize = 256;
/// Threads that look up the host names of targets that callers have described,
pub const RESOLVER_CALLERS_THREADS_MAX: usize = 16;
/// of which those of one subject take this many at once.
pub const RESOLVER_SUBJECT_THREADS_MAX: usize = 2;
/// Lookups that may wait for such a thread; past it whoever has most of them loses the newest to whoever has fewer,
pub const RESOLVER_CALLERS_QUEUE_MAX: usize = 512;
/// and of one subject.
pub const RESOLVER_SUBJECT_QUEUE_MAX: usize = 64;
/// Host names whose addresses are remembered, of the operator's and of callers' each.
pub const RESOLVER_NAMES_MAX: usize = 1024;
/// Addresses of one host name that are tried.
pub const RESOLVER_ADDRESSES_MAX: usize = 16;
/// How long the addresses of a host name are remembered.
pub const RESOLVER_TTL: Duration = Duration::from_secs(30);
/// How long it is remembered that a host name does not resolve.
pub const RESOLVER_FAILURE_TTL: Duration = Duration::from_secs(2);
/// Threads that read and write files for the upstream client: refresh tokens on their way to the state file, the system's
/// certificates.
pub const FILE_THREADS_MAX: usize = 2;
/// What may wait for such a thread. Of each kind there is one at most: those who want it wait for that one.
pub const FILE_QUEUE_MAX: usize = 16;
/// Questions to Redis of all cores that wait or are under way; past it who asks is told at once that there is no answer.
pub const STORE_QUESTIONS_MAX: usize = 16_384;
/// Commands to Redis that are under way at once: sent, not yet answered.
pub const STORE_FLIGHT_MAX: usize = 1024;
/// Bytes of commands that wait for the socket to Redis; past it no further command is written.
pub const STORE_OUT_BYTES_MAX: usize = 256 << 10;
/// How long the answers to a call may take in all, while they go on coming; where nothing comes, `redis.timeout`.
pub const STORE_CALL_TIME: Duration = Duration::from_secs(30);
/// How long the answer to a question about many sessions may take in all, while it goes on coming; where nothing comes,
/// `redis.timeout`.
pub const STORE_BATCH_TIME: Duration = Duration::from_secs(10);
/// Such questions that are under way at once: who signs in waits behind no more of them.
pub const STORE_BATCHES_MAX: usize = 4;
/// Calls that wait for their turn on the link for them: one for each thread of the admin listener, and some more.
pub const STORE_CALLS_MAX: usize = 64;
/// Sessions whose life is to be extended that wait; past it those who come later are left out, until they are due again.
pub const STORE_TOUCHES_MAX: usize = 16_384;
/// Control events that wait to be put on the control stream, while Redis is away,
pub const STORE_ENTRIES_MAX: usize = 16_384;
/// and their bytes; past either the oldest go, which is counted and said.
pub const STORE_ENTRY_BYTES_MAX: usize = 16 << 20;
/// Control events that are put on the control stream at once.
pub const STORE_APPENDS_MAX: usize = 128;
/// How long nothing is put on the control stream after it was refused.
pub const STORE_APPEND_PAUSE: Duration = Duration::from_secs(1);
/// Bytes of a session's or ticket's record; a longer one is read over and counts as none.
pub const STORE_RECORD_BYTES_MAX: usize = 256 << 10;
/// Entries of the control stream that are read at once.
pub const CONTROL_PAGE_ENTRIES: u32 = 256;
/// Bytes of such a page's strings; those that go beyond are read with the next.
pub const CONTROL_PAGE_BYTES_MAX: usize = 8 << 20;
/// How long the start waits for the control stream to be read, while it goes on coming.
pub const CONTROL_REPLAY_TIME: Duration = Duration::from_secs(60);
/// Elements of one reply of Redis, however nested.
pub const REDIS_ELEMENTS_MAX: usize = 65_536;
/// Arrays within arrays in such a reply.
pub const REDIS_DEPTH_MAX: usize = 8;
/// Bytes of a line (a status, an error) of Redis.
pub const REDIS_LINE_BYTES_MAX: usize = 4 << 10;
/// Reads in a row from one connection to Redis, of 64 KiB each, before the others get their turn.
pub const REDIS_READS_PER_TURN: usize = 8;
/// How long the server of the control stream may have nothing to say before it says so.
pub const REDIS_BLOCK: Duration = Duration::from_secs(2);
/// How long a connection to Redis may idle before it is asked whether it lives.
pub const REDIS_PING_INTERVAL: Duration = Duration::from_secs(2);
/// The wait before Redis is connected to again is random, up to this,
pub const REDIS_BACKOFF_MIN: Duration = Duration::from_millis(100);
/// and with each attempt that fails up to twice as much, at most this.
pub const REDIS_BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How long a connection to Redis must have held for the next wait to be short again.
pub const REDIS_SETTLED: Duration = Duration::from_secs(1);
/// Different things about Redis that are said in the log before it is well again; further ones are counted alone.
pub const REDIS_SAID_MAX: usize = 32;
/// How far the control stream is read again from before the last entry seen when a connection was lost: a server that takes
/// over may know less, and its clock be behind. What is read twice does no harm.
pub const CONTROL_OVERLAP: Duration = Duration::from_secs(60);
/// Control events heard by Pub/Sub within that time that are remembered, so that other processes' entries of them are known as
/// echoes.
pub const CONTROL_ECHOES_MAX: usize = 16_384;
/// How long the process's end waits for control events to reach Redis.
pub const STORE_FINISH: Duration = Duration::from_secs(1);
/// Bytes of a message from one process to another by way of Redis; a longer one is read over.
pub const PEER_MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Questions to other processes that are under way; past it who asks is told at once that there is no answer.
pub const PEER_ASKS_MAX: usize = 4096;
/// Messages to other processes that wait for Redis, and that are not questions,
pub const PEER_MESSAGES_MAX: usize = 4096;
/// and the bytes of all that wait; past either a message is dropped, and whoever waits for it is told in its time.
pub const PEER_QUEUE_BYTES_MAX: usize = 8 << 20;
/// How old a question of another process may be, or how far ahead its clock.
pub const PEER_ASK_AGE_MAX: Duration = Duration::from_secs(30);
/// Questions of other processes that a core, or the process for lists, remembers so as to answer none twice, 100 bytes each; past
/// it the oldest may be repeated.
pub const PEER_HEARD_MAX: usize = 32_768;
/// How long a process that is asked for a renewal may take to look a token up before it leaves it: a key set may have to be
/// fetched ([`JWKS_TIMEOUT`]), or a ticket and its session be found.
pub const PEER_RENEWAL_TIME: Duration = Duration::from_secs(7);
/// How long the one that has asked waits for it, once the question was heard: what it says has failed is not done afterwards.
pub const PEER_RENEWAL_PATIENCE: Duration = Duration::from_secs(9);
/// How often a process tells the others that it is there,
pub const PEER_HELLO_INTERVAL: Duration = Duration::from_secs(5);
/// and how long they believe it: one whose connection was lost has come back by then ([`REDIS_BACKOFF_MAX`]).
pub const PEER_HELLO_LIFE: Duration = Duration::from_secs(11);
/// How long one that listens waits before it takes those it has heard of for all that are there.
pub const PEER_KNOWN_AFTER: Duration = Duration::from_secs(6);
/// How long a process that has not said that it is there is waited for, where somebody has heard the question.
pub const PEER_UNKNOWN_PATIENCE: Duration = Duration::from_millis(500);
/// Bytes of the shortest admin key under which other processes are asked for lists. What is asked can be guessed but for the
/// key, so whoever may listen there can try keys out.
pub const PEER_KEY_BYTES_MIN: usize = 32;
/// Least time between two log lines about messages of other processes that make no sense.
pub const PEER_NOTICE_INTERVAL: Duration = Duration::from_secs(60);
/// Other processes that one knows of.
pub const PEERS_MAX: usize = 1024;
/// Lists of connections that other processes ask for and that wait to be made; past it they are not answered.
pub const PEER_LISTS_MAX: usize = 8;
/// Bytes of the connections that one process lists for another; where there are more, the page ends there.
pub const PEER_LIST_BYTES_MAX: usize = 128 << 10;
/// Bytes of what such a list says of one connection; streams that do not fit are left out.
pub const PEER_LISTED_BYTES_MAX: usize = 32 << 10;
/// Bytes of all processes' lists that one page is made of; who comes later has not answered.
pub const PEER_LISTS_BYTES_MAX: usize = 4 << 20;
const _: () = {
    // A process that gives back all keys is not to push out what the others know the history by.
    assert!(API_KEYS_MAX.div_ceil(API_KEYS_PER_CALL) < API_KEYS_HISTORY_MAX);
    // What is sealed is told in base 64 and with a little around it; in JSON a byte of a token may take six.
    assert!(PEER_LIST_BYTES_MAX * 4 / 3 + 4096 <= PEER_MESSAGE_BYTES_MAX);
    assert!(TOKEN_BYTES_MAX * 6 * 4 / 3 + 4096 <= PEER_MESSAGE_BYTES_MAX);
    assert!(PEER_LISTED_BYTES_MAX * 2 <= PEER_LIST_BYTES_MAX);
    // An id of 128 bytes, a mark in base 64, and what JSON puts around them.
    assert!(REFRESHES_TOLD_MAX * (128 + 22 + 8) + 4096 <= PEER_MESSAGE_BYTES_MAX);
    assert!(PEER_RENEWAL_TIME.as_secs() > JWKS_TIMEOUT.as_secs());
    assert!(STORE_BATCH_TIME.as_secs() < LOOKUP_TIMEOUT.as_secs());
    assert!(PEER_RENEWAL_PATIENCE.as_secs() > PEER_RENEWAL_TIME.as_secs());
    // `redis.timeout`, 20 s at most, passes before.
    assert!(PEER_RENEWAL_PATIENCE.as_secs() + 20 < LOOKUP_TIMEOUT.as_secs());
    // What stands under a name is answered with the record.
    assert!(EPHEMERAL_RECORD_BYTES_MAX + EPHEMERAL_NAMED_BYTES_MAX + 1024 <= STORE_RECORD_BYTES_MAX);
    assert!(
        DIRECT_URL_BYTES_MAX + DIRECT_HEADERS_BYTES_MAX + DIRECT_BODY_BYTES_MAX + 4096 < EPHEMERAL_RECORD_BYTES_MAX / 2
    );
    assert!(EPHEMERAL_HOLD.as_secs() > 2 * EPHEMERAL_PASS.as_secs() + LOOKUP_TIMEOUT.as_secs());
    assert!(PEER_KNOWN_AFTER.as_secs() > PEER_HELLO_INTERVAL.as_secs());
    assert!(PEER_HELLO_LIFE.as_secs() > PEER_HELLO_INTERVAL.as_secs() + REDIS_BACKOFF_MAX.as_secs());
};
/// Connections of a core that one turn looks through for a list.
pub const LIST_LOOKS_PER_TURN: u32 = 4096;
/// Connections on one page of the admin API's list,
pub const ADMIN_PAGE_MAX: usize = 1000;
/// and where the caller does not say how many.
pub const ADMIN_PAGE_DEFAULT: usize = 100;
/// Streams that the list names of one connection.
pub const LISTED_STREAMS_MAX: usize = 64;
/// Bytes of a request head on the admin listener.
pub const ADMIN_HEAD_BYTES_MAX: usize = 16 << 10;
/// Bytes of a secret that an upstream is shown, and of a header's value.
pub const UPSTREAM_SECRET_BYTES_MAX: usize = 8 << 10;
/// Members of `params` of `[stream.auth]`.
pub const UPSTREAM_AUTH_PARAMS_MAX: usize = 32;
/// Bytes of a token endpoint's answer,
pub const OAUTH_RESPONSE_BYTES_MAX: usize = 64 << 10;
/// and of a token in it.
pub const OAUTH_TOKEN_BYTES_MAX: usize = 16 << 10;
/// How long one request to a token endpoint may take.
pub const OAUTH_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a poll waits for a token, before it is a poll without one: time for two requests and a write to the disk.
pub const OAUTH_WAIT: Duration = Duration::from_secs(25);
/// Two renewals of one token begin at least so far apart, whatever upstreams answer.
pub const OAUTH_SPACING: Duration = Duration::from_secs(1);
/// After a renewal that fails the next one waits so long, half of it random, and twice as long after each,
pub const OAUTH_RETRY_MIN: Duration = Duration::from_secs(1);
/// at most this.
pub const OAUTH_RETRY_MAX: Duration = Duration::from_secs(60);
/// A token counts as good for so long, even if its endpoint says less: longer than the spacing,
pub const OAUTH_LIFE_MIN: Duration = Duration::from_secs(2);
/// and at most so long.
pub const OAUTH_LIFE_MAX: Duration = Duration::from_secs(365 * 86_400);
/// Credentials whose tokens are held; past it the one asked for longest ago goes, and gets a new token when it is needed.
pub const OAUTH_CREDENTIALS_MAX: usize = 16_384;
/// Refresh tokens that the state file keeps; past it the one that was got longest ago goes.
pub const OAUTH_STORED_MAX: usize = 1024;
/// After a write of them that fails the next one waits so long, and twice as long after each,
pub const OAUTH_WRITE_RETRY_MIN: Duration = Duration::from_secs(1);
/// at most this.
pub const OAUTH_WRITE_RETRY_MAX: Duration = Duration::from_secs(60);
/// How long the end of the process waits for them to be written where the drain's time is over: a disk that hangs may be no
/// reason to go on for longer.
pub const OAUTH_WRITE_AT_END: Duration = Duration::from_millis(250);
/// How often the files of upstreams' secrets are looked at.
pub const SECRETS_INTERVAL: Duration = Duration::from_secs(2);
/// `[[server.tls]]`: each handshake that is not resumed looks through the certificates for the name it asks for.
pub const TLS_CERTIFICATES_MAX: usize = 64;
/// Sockets of one core that are closed but for the end of a sealed record, which they are still to take: each is a
/// descriptor more than its connections. Past it the one that has stayed longest is reset.
pub const LEFT_PER_CORE_MAX: u16 = 256;
/// Descriptors left for upstreams, files and the runtime when `limits.connections` is 0.
pub const DESCRIPTORS_RESERVED: u64 = 512;
