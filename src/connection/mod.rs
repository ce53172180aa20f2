//! One client connection: from its first byte to its last. The types of its states; `shard` moves it through them.
//!
//! Source: protocol version 1, sections 1, 4 and 5.
//! Memory: [`Connection`] itself while idle, and what its grant shares; a box while a request is read or answered, a box
//! while bytes wait for the socket. No read buffer: bytes come in a scratch buffer of the core.
//! Not here: sockets, streams, and which core it is on.

pub mod handshake;
pub mod outbox;
pub mod subscriptions;

use std::time::Duration;

use ipnet::IpNet;

use crate::auth::grant::{Grant, MaybeTime};
use crate::codec::direct::DirectRequest;
use crate::codec::http::BodyDecoder;
use crate::codec::message::{CloseReason, Format};
use crate::codec::ws;
use crate::frame::{Encoding, Transport};
use crate::ids::{ConnectionId, Holder, Keeper, ResumePoint, StreamId};
use crate::limits;
use crate::time::{Instant, Now};

use self::handshake::{Refusal, SeenAs};
use self::outbox::Outbox;
use self::subscriptions::Subscriptions;

/// What connections need of the `[server]` table.
#[derive(Clone, Debug)]
pub struct Options {
    /// Proxies whose word on the client's address, host and scheme is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// How browsers see this server, where a proxy hides it: scheme, host and port, as `Origin` writes them.
    pub public_origin: Option<String>,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Window over which a drain spreads reconnects.
    pub drain: Duration,
    /// Origins allowed besides same-origin, as `Origin` writes them.
    pub allowed_origins: Vec<String>,
    /// Whether `GET /` answers with the playground.
    pub playground: bool,
    /// Whether `GET /echo` exists.
    pub echo: bool,
    /// Whether the listener speaks TLS: clients see `https`, and a PROXY header stands before the handshake.
    pub tls: bool,
    /// Whether WebSockets are offered permessage-deflate.
    pub permessage_deflate: bool,
    /// Whether callers may name upstreams of their own: `/v1/direct` and `/v1/sessions` exist.
    pub direct: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            trusted_proxies: Vec::new(),
            public_origin: None,
            heartbeat: Duration::from_secs(25),
            drain: Duration::from_secs(10),
            allowed_origins: Vec::new(),
            playground: true,
            echo: false,
            tls: false,
            permessage_deflate: true,
            direct: false,
        }
    }
}

/// Which stream a caller asks for, and how. Not yet judged.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamRequest {
    /// The configured stream's id, as given.
    pub id: String,
    /// Names and values for `{query.NAME}`, as given: those the stream does not know are passed over.
    pub params: Vec<(String, String)>,
    /// What frames hold.
    pub format: Format,
    /// Where to go on; `None` where it was absent or malformed.
    pub since: Option<ResumePoint>,
    /// What of the value is wanted: a JSONPath, as given.
    pub select: Option<String>,
    /// Least time between two events; 0: none.
    pub max_rate_ms: u32,
    /// The upstream that the caller describes instead of naming a stream.
    pub direct: Option<DirectAsk>,
}

/// Where a caller describes an upstream.
#[derive(Clone, Debug, PartialEq)]
pub enum DirectAsk {
    /// Here.
    Here(Box<DirectRequest>),
    /// In the first message of the WebSocket.
    FirstMessage,
}

/// One connection of a core.
#[derive(Debug)]
pub struct Connection {
    /// Tells it from others that have stood at its place.
    pub generation: u32,
    /// Whom `connections_per_address` counts it for.
    pub address: Option<Holder>,
    /// The client's address: its failed credentials are counted for it, and what callers without a subject have polled.
    pub client: Holder,
    /// When the peer last sent something, or the connection began to wait for it.
    pub heard: Instant,
    /// What it is doing.
    pub state: State,
    /// What waits for its socket.
    pub outbox: Option<Box<Outbox>>,
    /// Whether its socket took less than it was given, and has not said since that it takes more.
    pub blocked: bool,
    /// Whether it stands in the queue of connections to be flushed.
    pub queued: bool,
    /// Whether bytes of the peer are left in the socket until its answers have been taken.
    pub paused: bool,
    /// Whether the peer has ended its side: it sends nothing more, but may still read.
    pub peer_ended: bool,
}

/// What a connection is doing.
#[derive(Debug)]
pub enum State {
    /// Speaks HTTP: a request is read, answered or waited for.
    Http(Box<Http>),
    /// A WebSocket without a credential, which its first message must bring.
    Unauthenticated(Box<Unauthenticated>),
    /// Has a grant and gets frames.
    Open(Open),
    /// `/echo`.
    Echo(Box<Echo>),
    /// The last bytes are on their way; ends when the peer has ended, or at the deadline.
    Closing(Box<Closing>),
}

/// A connection to `/echo`.
#[derive(Debug)]
pub struct Echo {
    /// What makes messages of the bytes.
    pub decoder: ws::Decoder,
    /// How they go back.
    pub encoding: Encoding,
}

/// A connection that speaks HTTP.
#[derive(Debug)]
pub struct Http {
    /// Bytes not yet made sense of. At most a head's or a body's limit, and one read.
    pub buffer: Vec<u8>,
    /// Where in an exchange it is.
    pub phase: Phase,
    /// When that must have ended.
    pub deadline: Instant,
    /// The peer's address.
    pub peer: std::net::IpAddr,
    /// The client's, where a trusted proxy gave it by PROXY v2.
    pub told_by_proxy: Option<std::net::IpAddr>,
    /// Whose handshake has been counted already, before TLS: its first request does not count again.
    pub admitted: Option<Holder>,
    /// Whether `peer` is a trusted proxy (and a PROXY header may come first).
    pub proxied: bool,
    /// Whether the first byte of the connection is still to be made sense of.
    pub fresh: bool,
    /// What has become of the credential of the request at hand, where somebody outside had to be asked.
    pub judged: Option<Result<Grant, Refusal>>,
}

/// Where in an exchange an HTTP connection is.
#[derive(Debug)]
pub enum Phase {
    /// A request head is awaited or incomplete.
    Head,
    /// The body of a request is read.
    Body {
        /// What makes the body of the bytes.
        decoder: Box<BodyDecoder>,
        /// What there is of it.
        body: Vec<u8>,
        /// What it is read for.
        purpose: BodyPurpose,
        /// How to answer.
        reply: Reply,
    },
    /// A value is waited for.
    Waiting {
        /// The topic watched.
        topic: u32,
        /// Whose streams count it, where they are counted.
        held: Option<Keeper>,
        /// `If-None-Match`: answered with the value when that is another.
        known: Option<String>,
        /// `Prefer: wait` in seconds, where it is obeyed.
        preferred_s: Option<u64>,
        /// Until when the first value of a cold stream is waited for.
        cold_until: Instant,
        /// What the caller may see, and until when: with it ends the wait.
        grant: Box<Grant>,
        /// Since when it is waited for.
        since: Now,
        /// How to answer.
        reply: Reply,
    },
    /// Somebody outside is asked about the request's credential.
    Looking {
        /// The number of the question.
        ask: u64,
        /// The request's head, to be carried out when the answer is there.
        head: Vec<u8>,
    },
    /// Another core is asked, or somebody outside for something that the answer needs.
    Asking {
        /// The number of the question.
        ask: u64,
        /// How to answer.
        reply: Reply,
    },
    /// The answer is ready, and is held back until the deadline.
    Delayed {
        /// The answer.
        answer: Vec<u8>,
        /// Whether the connection goes on after it.
        keep_alive: bool,
    },
}

/// What a body is read for.
#[derive(Debug)]
pub enum BodyPurpose {
    /// `POST /v1/connections/{connection}/auth`.
    Renewal {
        /// The connection to be renewed, if the name was one.
        connection: Option<ConnectionId>,
        /// Whom a failure is counted for.
        client: std::net::IpAddr,
    },
    /// `POST /v1/hooks/{id}`.
    Hook {
        /// The stream, if the name may be one's.
        id: Option<StreamId>,
        /// `X-Restcast-Signature`.
        signature: String,
        /// Whom a failure is counted for.
        client: std::net::IpAddr,
    },
    /// `POST /v1/direct`.
    Direct {
        /// Who asks.
        caller: Caller,
        /// How, so far.
        request: Box<StreamRequest>,
        /// Whether for events; else for the value.
        sse: bool,
    },
    /// `POST /v1/sessions`.
    Session {
        /// Who asks.
        caller: Caller,
        /// How they see this server.
        seen_as: SeenAs,
    },
}

impl BodyPurpose {
    /// Who was judged before the body was read, where somebody was.
    pub fn caller(&self) -> Option<&Caller> {
        match self {
            BodyPurpose::Direct { caller, .. } | BodyPurpose::Session { caller, .. } => Some(caller),
            BodyPurpose::Renewal { .. } | BodyPurpose::Hook { .. } => None,
        }
    }
}

/// Who asks, judged before the body was read.
#[derive(Debug)]
pub struct Caller {
    /// What they may do.
    pub grant: Box<Grant>,
    /// Since when that is known.
    pub since: Now,
}

/// What an answer needs to know of its request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reply {
    /// Whether the connection goes on after it.
    pub keep_alive: bool,
    /// Whether it is to HEAD: no body.
    pub head_only: bool,
    /// The origin to be named in CORS headers.
    pub cors_origin: Option<String>,
}

/// A WebSocket without a credential.
#[derive(Debug)]
pub struct Unauthenticated {
    /// What makes messages of the bytes.
    pub decoder: ws::Decoder,
    /// How its messages are encoded.
    pub encoding: Encoding,
    /// What it will be subscribed to; `None` on `/v1/ws`.
    pub request: Option<StreamRequest>,
    /// When it is closed: 4008, or by what it is refused by.
    pub deadline: Instant,
    /// How many messages came.
    pub rate: MessageRate,
    /// Whom failures are counted for.
    pub peer: std::net::IpAddr,
    /// Whether its credential has come. What it sends after that is passed over.
    pub credential: FirstCredential,
}

/// What has become of the credential of a first message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FirstCredential {
    /// It is still to come.
    Awaited,
    /// It is being looked at.
    Looking,
    /// It is refused, which is held back until the deadline: the peer's address has failed too often.
    Refused(CloseReason),
}

/// A connection with a grant.
#[derive(Debug)]
pub struct Open {
    /// The random part of its name, as bytes: a number would have each connection begin at a multiple of sixteen.
    pub random: [u8; 16],
    /// What it may do, and until when.
    pub grant: Grant,
    /// Makes messages of a WebSocket's bytes.
    pub decoder: ws::Decoder,
    /// What it gets.
    pub subscriptions: Subscriptions,
    /// When `reauthenticate` is due, by the clock that the credential ends by; `None` where it has been sent or none will be.
    pub reauthenticate_at: MaybeTime,
    /// When it was opened.
    pub since: Instant,
    /// Since when it is whose it is: since it was opened, or raised from anonymous.
    pub identified: Now,
    /// When the next heartbeat is due.
    pub heartbeat_at: Instant,
    /// How many messages came.
    pub rate: MessageRate,
    /// What its frames travel in.
    pub transport: Transport,
    /// Whether it was opened on one stream, and ends with it.
    pub single: bool,
    /// `auth_update`s refused in a row.
    pub refusals: u8,
    /// Whether a new credential of it is being looked at: another must wait.
    pub updating: bool,
    /// Its actions that are under way.
    pub acting: u8,
    /// Whether the subject's connections count it.
    pub counted: bool,
    /// What is still to be said in its first message, where that describes its stream.
    pub opening: Option<Box<Opening>>,
}

/// A connection whose stream is still to be described.
#[derive(Debug)]
pub struct Opening {
    /// When it is closed 4008.
    pub deadline: Instant,
    /// What its request said of the stream.
    pub request: StreamRequest,
}

/// An instant that does not come.
pub const NEVER: Instant = Instant::from_micros(u64::MAX);

/// A connection whose last bytes are on their way.
#[derive(Debug)]
pub struct Closing {
    /// When it ends by itself.
    pub deadline: Instant,
    /// Whether it spoke HTTP: its socket is closed then and not reset, for the kernel may still hold the end of an answer.
    pub http: bool,
    /// What it ends by: still open to a more important cause until its close frame is written.
    pub cause: Option<CloseReason>,
    /// How to say so.
    pub farewell: Farewell,
    /// Reads a WebSocket's bytes for the peer's close frame.
    pub decoder: ws::Decoder,
    /// Whether its messages may be compressed.
    pub deflate: bool,
    /// Whether an answer is still to be sent: that may take its time, as long as the socket takes something.
    pub answering: bool,
    /// Whether our side has been ended.
    pub finished: bool,
    /// Whether the peer has ended its side, or sent its close frame.
    pub peer_done: bool,
}

/// How a connection's end is told to its peer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Farewell {
    /// A close frame is still to be written.
    CloseFrame,
    /// A close event is still to be written.
    CloseEvent,
    /// Nothing more is to be written.
    Said,
}

/// How many messages a connection sent in the present second.
#[derive(Clone, Copy, Debug, Default)]
pub struct MessageRate {
    second: u32,
    count: u32,
}

impl MessageRate {
    /// Counts one message; whether that is within `per_second` (0: unlimited).
    pub fn count(&mut self, now: Instant, per_second: u32) -> bool {
        let second = u32::try_from(now.as_micros() / 1_000_000 % (1 << 32)).unwrap_or(0);
        if second != self.second {
            *self = MessageRate { second, count: 0 };
        }
        self.count += 1;
        per_second == 0 || self.count <= per_second
    }
}

impl Connection {
    /// A connection that was just accepted.
    pub fn accepted(generation: u32, client: Holder, now: Instant, http: Http) -> Connection {
        Connection {
            generation,
            address: None,
            client,
            heard: now,
            state: State::Http(Box::new(http)),
            outbox: None,
            blocked: false,
            queued: false,
            paused: false,
            peer_ended: false,
        }
    }

    /// What waits for its socket, made if there is none.
    pub fn outbox(&mut self) -> &mut Outbox {
        self.outbox.get_or_insert_default()
    }

    /// Whether so much waits for its socket that its requests must.
    pub fn is_full(&self) -> bool {
        self.outbox.as_ref().is_some_and(|outbox| outbox.control_bytes() > limits::CONTROL_BYTES_MAX)
    }

    /// Whether permessage-deflate was agreed on.
    pub fn deflates(&self) -> bool {
        let encoding = match &self.state {
            State::Open(Open { transport: Transport::WebSocket(encoding), .. }) => *encoding,
            State::Unauthenticated(waiting) => waiting.encoding,
            State::Echo(echo) => echo.encoding,
            State::Closing(closing) => return closing.deflate,
            State::Open(_) | State::Http(_) => Encoding::Plain,
        };
        encoding != Encoding::Plain
    }

    /// Its grant, where it has one.
    pub fn open(&self) -> Option<&Open> {
        match &self.state {
            State::Open(open) => Some(open),
            _ => None,
        }
    }

    /// The same, to be changed.
    pub fn open_mut(&mut self) -> Option<&mut Open> {
        match &mut self.state {
            State::Open(open) => Some(open),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_by_the_second() {
        let mut rate = MessageRate::default();
        let at = |ms: u64| Instant::from_micros(ms * 1_000);
        assert!(rate.count(at(1_000), 2) && rate.count(at(1_900), 2));
        assert!(!rate.count(at(1_999), 2));
        assert!(rate.count(at(2_000), 2), "a new second, a new count");
        assert!(rate.count(at(2_000), 0) && rate.count(at(2_000), 0) && rate.count(at(2_000), 0), "0 is unlimited");
    }

    #[test]
    fn an_idle_connection_is_small() {
        let size = size_of::<Connection>();
        assert!(size <= 224, "a connection takes {size} bytes before its grant's text and its wheel entry");
    }
}
