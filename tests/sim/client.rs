//! The model of a client: decoders of its own, and everything that one client may rely on.
//!
//! Checked with every frame: it is whole, `welcome` came first, the stream is one it holds, `seq` rises, a delta follows
//! on what is held, the value that results is one its upstream served and the one every other client has at that
//! place, the bytes are those that others got, and it was not started after the credential had ended, was revoked or no
//! longer allowed it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};

use restcast::stream::apply;
use serde_json::Value;

use super::upstream::Upstream;

/// How late a stream frame may start after its credential's end (protocol section 5).
pub const LATE_US: u64 = 250_000;

/// What clients have in common: the clocks, the upstreams, and what others have seen.
#[derive(Debug)]
pub struct Book {
    pub upstream: Upstream,
    /// The monotonic clock.
    pub mono_us: u64,
    /// The wall clock.
    pub wall_us: u64,
    pub leeway_us: u64,
    pub draining: bool,
    /// Whether streams have been changed or taken away.
    pub reloaded: bool,
    /// What was said of users and tokens.
    pub said: Said,
    /// The value at each place of each epoch.
    values: HashMap<(String, u64), u64>,
    /// The bytes of each event in each transport and form.
    frames: HashMap<(String, u64, bool, String), u64>,
    /// What was sent for each event to those who get it deflated within so many bits.
    payloads: HashMap<(String, u64, u8, String), u64>,
    /// All that has been seen, in a number.
    pub trace: u64,
    /// `RESTCAST_SIM_CLIENT`: the client whose frames are printed.
    pub traced: Option<usize>,
}

impl Book {
    pub fn new(mono_us: u64, wall_us: u64, leeway_us: u64) -> Book {
        Book {
            upstream: Upstream::new(),
            mono_us,
            wall_us,
            leeway_us,
            draining: false,
            reloaded: false,
            said: Said::default(),
            values: HashMap::new(),
            frames: HashMap::new(),
            payloads: HashMap::new(),
            trace: 0,
            traced: std::env::var("RESTCAST_SIM_CLIENT").ok().and_then(|number| number.parse().ok()),
        }
    }
}

/// What was said of users and tokens, plainly.
#[derive(Debug, Default)]
pub struct Said {
    /// The second that a user has logged out in.
    pub logouts: BTreeMap<String, u64>,
    /// The second before which a user's tokens are revoked.
    pub before: BTreeMap<String, u64>,
    /// Tokens that are revoked, by their numbers.
    pub revoked: BTreeSet<u64>,
    /// Whether a user may see the guarded stream, by what was said of it last, and in which second.
    pub guarded: BTreeMap<String, (bool, u64)>,
}

impl Said {
    fn is_logged_out(&self, sub: &str, token: &Token) -> bool {
        self.logouts.get(sub).is_some_and(|second| token.iat_s <= *second)
    }

    fn is_revoked(&self, sub: &str, token: &Token) -> bool {
        self.revoked.contains(&token.jti) || self.before.get(sub).is_some_and(|second| token.iat_s < *second)
    }

    /// Whether a token is good for nothing any more.
    pub fn is_dead(&self, sub: &str, token: &Token) -> bool {
        self.is_logged_out(sub, token) || self.is_revoked(sub, token)
    }

    /// Whether a token reaches the guarded stream.
    pub fn may_see_guarded(&self, sub: &str, token: &Token) -> bool {
        self.guarded.get(sub).is_none_or(|(may, second)| *may || token.iat_s > *second)
    }
}

/// The stream that needs a permission, which each token has of itself.
pub const GUARDED: &str = "guarded";

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// How a client is connected.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// A WebSocket on one stream.
    Single,
    /// `/v1/ws`.
    Many,
    /// SSE.
    Events,
    /// HTTP requests.
    Json,
}

/// What a client holds of one stream.
#[derive(Clone, Debug, Default)]
pub struct Held {
    pub format: String,
    pub epoch: String,
    pub seq: u64,
    pub value: Option<Vec<u8>>,
    /// As last told; `live` where nothing was.
    pub state: String,
    /// Whether it asked to go on from there and has got nothing yet.
    pub resumes: bool,
}

/// What a numbered message of a client asked for.
#[derive(Clone, Debug)]
pub enum Asked {
    Subscribe { name: String, held: Held },
    Unsubscribe { name: String },
    Renew,
    RenewBadly,
}

/// A token that a client has brought.
#[derive(Clone, Copy, Debug)]
pub struct Token {
    /// Which message brought it; 0: the request.
    pub id: u64,
    /// `exp`, in microseconds.
    pub exp_us: u64,
    pub company: u64,
    /// `iat`.
    pub iat_s: u64,
    /// Its number, of which its `jti` is made.
    pub jti: u64,
    /// Whether it has ended at some time, even if the clock was set back since.
    pub has_ended: bool,
}

/// When a credential ended.
#[derive(Clone, Copy, Debug)]
pub struct Expired {
    /// On the monotonic clock.
    pub at_us: u64,
    /// Whether the wall clock was stepped over it.
    pub stepped: bool,
}

#[derive(Debug)]
pub struct Client {
    pub number: usize,
    pub kind: Kind,
    pub core: usize,
    pub socket: u32,
    pub sub: String,
    /// The token in force, then those of renewals that have not been answered.
    pub tokens: Vec<Token>,
    /// Since when none of them is good.
    pub expired: Option<Expired>,
    /// Since when, on the monotonic clock, each of them is logged out or revoked.
    pub dead_since_us: Option<u64>,
    pub ever_stalled: bool,
    /// Answers no pings.
    pub mute: bool,
    pub renewals_refused: u32,
    pub renewals_accepted: u32,
    /// Whether a renewal over HTTP has not been answered.
    pub renewing: bool,
    pub outgoing: Vec<u8>,
    /// The window, in bits, that it offers permessage-deflate with.
    pub deflate: Option<u8>,
    /// What the last message's payload was, deflated or not.
    payload: u64,
    pub held: BTreeMap<String, Held>,
    pub asked: BTreeMap<u64, Asked>,
    pub next_id: u64,
    pub welcomed: bool,
    /// The connection's name, as `welcome` told it.
    pub connection: Option<String>,
    pub closed: Option<u16>,
    pub told_to_reconnect: bool,
    pub said_close: bool,
    /// The socket is no more.
    pub gone: bool,
    /// HTTP answers awaited, oldest first: the stream asked for, `None` where it is a renewal for that client.
    pub requests: Vec<Request>,
    pub etag: Option<(String, String)>,
    pub answers: u64,
    /// Renewals over HTTP that were answered: for which client, which of its tokens, how.
    pub confirmed: Vec<(usize, u64, u16)>,
    upgraded: bool,
    buffer: Vec<u8>,
    late: bool,
    /// Whether the frame that is read was started when no token reached the guarded stream.
    unguarded: bool,
}

/// An HTTP request that has been sent.
#[derive(Clone, Debug)]
pub enum Request {
    Value { name: String, known: Option<String> },
    Renewal { of: usize, id: u64 },
}

impl Client {
    pub fn new(number: usize, kind: Kind, core: usize, socket: u32, sub: String, token: Token) -> Client {
        Client {
            number,
            kind,
            core,
            socket,
            sub,
            tokens: vec![token],
            expired: None,
            dead_since_us: None,
            ever_stalled: false,
            mute: false,
            renewals_refused: 0,
            renewals_accepted: 0,
            renewing: false,
            outgoing: Vec::new(),
            deflate: None,
            payload: 0,
            held: BTreeMap::new(),
            asked: BTreeMap::new(),
            next_id: 1,
            welcomed: false,
            connection: None,
            closed: None,
            told_to_reconnect: false,
            said_close: false,
            gone: false,
            requests: Vec::new(),
            etag: None,
            answers: 0,
            confirmed: Vec::new(),
            upgraded: false,
            buffer: Vec::new(),
            late: false,
            unguarded: false,
        }
    }

    /// Whether it has a live connection with a credential.
    pub fn is_open(&self) -> bool {
        !self.gone && self.closed.is_none() && self.kind != Kind::Json
    }

    /// Notes that the clocks have moved: by a step where `stepped`, else on from `before_us` of the wall clock.
    pub fn notice_time(&mut self, book: &Book, before_us: u64, stepped: bool) {
        for token in &mut self.tokens {
            token.has_ended |= book.wall_us >= token.exp_us + book.leeway_us;
        }
        let last = self.tokens.iter().map(|token| token.exp_us).max().expect("there is always a token");
        let end = last + book.leeway_us;
        if book.wall_us < end {
            self.expired = None;
        } else if self.expired.is_none() {
            let ago = if stepped { 0 } else { book.wall_us - end.max(before_us) };
            self.expired = Some(Expired { at_us: book.mono_us - ago, stepped });
        }
        self.notice_said(book);
    }

    /// Notes what was said of its user and its tokens.
    pub fn notice_said(&mut self, book: &Book) {
        let dead = self.tokens.iter().all(|token| book.said.is_dead(&self.sub, token));
        self.dead_since_us = if dead { self.dead_since_us.or(Some(book.mono_us)) } else { None };
    }

    /// Whether a token that may be the one in force is good for nothing any more.
    pub fn may_be_dead(&self, book: &Book) -> bool {
        self.tokens.iter().any(|token| book.said.is_dead(&self.sub, token))
    }

    /// Whether a token that may be the one in force does not reach the guarded stream.
    fn may_be_kept_out(&self, book: &Book) -> bool {
        self.tokens.iter().any(|token| !book.said.may_see_guarded(&self.sub, token))
    }

    /// Whether a token that may be the one in force has ended.
    pub fn may_have_expired(&self) -> bool {
        self.tokens.iter().any(|token| token.has_ended)
    }

    /// The companies that its tokens name.
    pub fn companies(&self) -> BTreeSet<u64> {
        self.tokens.iter().map(|token| token.company).collect()
    }

    /// The renewal `id` was accepted: no earlier token counts any more.
    pub fn renewed(&mut self, id: u64) {
        self.renewals_accepted += 1;
        self.renewals_refused = 0;
        // Which frames of an event stream came before its renewal cannot be told from outside: its values may be the old
        // token's, not its life.
        let kept = self.tokens.iter().position(|token| token.id == id).expect("a renewal brought a token");
        // Whoever is moved away and back again begins anew.
        for (_, own) in self.held.iter_mut().filter(|(name, _)| kept > 0 && is_shaped(name)) {
            own.resumes = true;
        }
        match self.kind {
            Kind::Events => {
                let exp_us = self.tokens[kept].exp_us;
                self.tokens[..kept].iter_mut().for_each(|token| (token.exp_us, token.has_ended) = (exp_us, false));
            }
            _ => drop(self.tokens.drain(..kept)),
        }
    }

    /// The renewal `id` was refused.
    pub fn not_renewed(&mut self, id: u64) {
        self.tokens.retain(|token| token.id != id);
    }

    /// Whether a stream frame that starts now is later than it may be.
    fn is_late(&self, book: &Book) -> bool {
        // A core that was told starts nothing more at once; an answer may have been ready by then.
        let allowance_us = if self.kind == Kind::Json { LATE_US } else { 0 };
        self.expired.is_some_and(|expired| expired.stepped || book.mono_us > expired.at_us + LATE_US)
            || self.dead_since_us.is_some_and(|since_us| book.mono_us >= since_us + allowance_us)
    }

    fn is_unguarded(&self, book: &Book) -> bool {
        self.kind != Kind::Json && !self.tokens.iter().any(|token| book.said.may_see_guarded(&self.sub, token))
    }

    /// Bytes from the server.
    pub fn receive(&mut self, bytes: &[u8], book: &mut Book) {
        assert!(!self.gone, "client {} got bytes after its socket was closed", self.number);
        if self.buffer.is_empty() {
            (self.late, self.unguarded) = (self.is_late(book), self.is_unguarded(book));
        }
        self.buffer.extend_from_slice(bytes);
        let buffer = std::mem::take(&mut self.buffer);
        let mut rest: &[u8] = &buffer;
        while !rest.is_empty() {
            let Some(used) = self.unit(rest, book) else { break };
            rest = &rest[used..];
            (self.late, self.unguarded) = (self.is_late(book), self.is_unguarded(book));
        }
        self.buffer = rest.to_vec();
    }

    /// Whether bytes of an incomplete frame wait.
    pub fn is_torn(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// One frame, event or answer from the start of `bytes`; how long it is, where it is whole.
    fn unit(&mut self, bytes: &[u8], book: &mut Book) -> Option<usize> {
        assert!(self.closed.is_none(), "client {} got {:?} after its close", self.number, text_of(bytes));
        match self.kind {
            Kind::Json => self.answer(bytes, book),
            _ if !self.upgraded => self.opening(bytes, book),
            Kind::Events => {
                let end = find(bytes, b"\n\n")? + 2;
                self.event(&bytes[..end], book);
                Some(end)
            }
            Kind::Single | Kind::Many => self.websocket_frame(bytes, book),
        }
    }

    /// The answer to the request that opens a stream.
    fn opening(&mut self, bytes: &[u8], book: &mut Book) -> Option<usize> {
        let end = find(bytes, b"\r\n\r\n")? + 4;
        let head = text_of(&bytes[..end]);
        let status = status_of(&head);
        if status == 101 || status == 200 {
            self.upgraded = true;
            let agreed = self.deflate.map(|bits| {
                let bits = if bits == 15 { String::new() } else { format!("; server_max_window_bits={bits}") };
                format!("permessage-deflate; server_no_context_takeover; client_no_context_takeover{bits}")
            });
            assert_eq!(header(&head, "Sec-WebSocket-Extensions"), agreed, "client {}", self.number);
            return Some(end);
        }
        let length = content_length(&head);
        if bytes.len() < end + length {
            return None;
        }
        self.refused(status, &text_of(&bytes[end..end + length]), book);
        self.closed = Some(status);
        Some(end + length)
    }

    fn refused(&self, status: u16, body: &str, book: &Book) {
        if book.traced == Some(self.number) {
            eprintln!("{} client {} <- {status} {body}", book.mono_us, self.number);
        }
        let fine = match status {
            401 => self.may_have_expired() || self.may_be_dead(book),
            403 => self.may_be_kept_out(book),
            404 => book.reloaded,
            503 | 429 | 408 => true,
            _ => false,
        };
        assert!(fine, "client {} was answered {status} {body}", self.number);
    }

    fn answer(&mut self, bytes: &[u8], book: &mut Book) -> Option<usize> {
        let end = find(bytes, b"\r\n\r\n")? + 4;
        let head = text_of(&bytes[..end]);
        let status = status_of(&head);
        let length = if status == 304 { 0 } else { content_length(&head) };
        if bytes.len() < end + length {
            return None;
        }
        let body = &bytes[end..end + length];
        self.answers += 1;
        assert!(!self.requests.is_empty() || status == 408, "client {} got an answer to nothing: {head}", self.number);
        if self.requests.is_empty() {
            self.closed = Some(status);
            return Some(end + length);
        }
        match self.requests.remove(0) {
            Request::Value { name, known, .. } => {
                book.trace = hash((book.trace, status, body));
                let etag = header(&head, "ETag").unwrap_or_default();
                match status {
                    200 => {
                        // What was answered in time may be read late.
                        let late = self.late && !self.ever_stalled;
                        assert!(!late, "client {} got a value after its credential's end", self.number);
                        self.check_value(&name, body, book);
                        let (epoch, seq) = etag.trim_matches('"').split_once('-').expect("an ETag is epoch-seq");
                        check_place(book, epoch, seq.parse().expect("a number"), body);
                        self.etag = Some((name, etag));
                    }
                    304 => assert_eq!(Some(etag), known, "client {} was told its value is the newest", self.number),
                    _ => self.refused(status, &text_of(body), book),
                }
            }
            Request::Renewal { of, id } => match status {
                200 | 401 | 403 | 404 | 503 => self.confirmed.push((of, id, status)),
                _ => panic!("client {} got {status} to a renewal: {}", self.number, text_of(body)),
            },
        }
        if header(&head, "Connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            self.closed = Some(status);
        }
        Some(end + length)
    }

    fn event(&mut self, block: &[u8], book: &mut Book) {
        let text = text_of(block);
        let (mut kind, mut id, mut data) = (None, None, None);
        for line in text.lines().filter(|line| !line.is_empty()) {
            match line.split_once(": ").unwrap_or((line, "")) {
                ("event", value) => kind = Some(value.to_owned()),
                ("id", value) => id = Some(value.to_owned()),
                ("data", value) => data = Some(value.to_owned()),
                ("retry", value) => assert!(value.parse::<u64>().is_ok(), "retry is a number: {value}"),
                _ => assert!(line.starts_with(':'), "client {} got a line that is no field: {line}", self.number),
            }
        }
        let Some(data) = data else { return };
        let kind = kind.expect("every event has its type");
        if kind == "close" {
            let close: Value = serde_json::from_str(&data).expect("a close event is JSON");
            let code = close["code"].as_u64().and_then(|code| u16::try_from(code).ok()).expect("a close has its code");
            self.check_close(code, close["reason"].as_str().unwrap_or_default(), book);
            return;
        }
        if let Some(id) = id {
            let frame: Value = serde_json::from_str(&data).expect("a frame is JSON");
            let place = format!("{}-{}", frame["epoch"].as_str().unwrap_or_default(), frame["seq"]);
            assert_eq!(id, place, "an event's id is its place");
        }
        self.frame(data.as_bytes(), Some(&kind), book);
    }

    fn websocket_frame(&mut self, bytes: &[u8], book: &mut Book) -> Option<usize> {
        let &[first, second, ..] = bytes else { return None };
        assert_eq!(first & 0xb0, 0x80, "client {}: whole frames, no reserved bits: {:?}", self.number, text_of(bytes));
        let deflated = first & 0x40 != 0;
        assert!(!deflated || (self.deflate.is_some() && first & 0x0f == 1), "client {}: RSV1", self.number);
        assert_eq!(second & 0x80, 0, "a server masks nothing");
        let (from, length) = match second {
            126 => (4, u64::from(u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?))),
            127 => (10, u64::from_be_bytes(*bytes.get(2..)?.first_chunk()?)),
            short => (2, u64::from(short)),
        };
        let end = from + usize::try_from(length).expect("a frame fits in memory");
        let payload = bytes.get(from..end)?;
        match first & 0x0f {
            1 if deflated => {
                self.payload = hash((deflated, payload));
                self.frame(&inflated(payload), None, book);
            }
            1 => {
                self.payload = hash((deflated, payload));
                self.frame(payload, None, book);
            }
            8 => {
                let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                self.check_close(code, &text_of(payload.get(2..).unwrap_or_default()), book);
                if !self.said_close && !self.mute {
                    self.send_frame(8, payload);
                }
            }
            9 if !self.mute => self.send_frame(10, payload),
            9 | 10 => {}
            other => panic!("client {} got a frame of opcode {other}", self.number),
        }
        Some(end)
    }

    fn check_close(&mut self, code: u16, reason: &str, book: &mut Book) {
        book.trace = hash((book.trace, code, reason));
        let fine = match (code, reason) {
            (4001, "token_expired") => self.may_have_expired(),
            (4001, "auth_update_rejected") => self.renewals_refused >= 5,
            (4010, "logged_out") => self.tokens.iter().any(|token| book.said.is_logged_out(&self.sub, token)),
            (4010, "token_revoked") => self.tokens.iter().any(|token| book.said.is_revoked(&self.sub, token)),
            (4003, "forbidden") => book.reloaded || self.may_be_kept_out(book),
            (4004, "stream_ended" | "not_found") => book.reloaded,
            (1012, "draining") => book.draining && (!self.welcomed || self.told_to_reconnect),
            (1013, "write_stall" | "overloaded") => true,
            (1001, "heartbeat_timeout") => self.mute || self.ever_stalled,
            (1000 | 1005, _) => self.said_close,
            _ => false,
        };
        let Client { number, kind, tokens, .. } = self;
        assert!(fine, "client {number} ({kind:?}, {tokens:?}) was closed {code} {reason} at {}", book.wall_us);
        self.closed = Some(code);
        self.held.clear();
    }

    /// Sends one frame, masked. Every other message of one that has agreed on it is deflated.
    pub fn send_frame(&mut self, opcode: u8, payload: &[u8]) {
        let deflates = self.deflate.is_some() && opcode == 1 && self.next_id.is_multiple_of(2);
        let payload = if deflates { &*deflated(payload) } else { payload };
        let mask = [0x12, 0x34, 0x56, 0x78];
        self.outgoing.push(0x80 | if deflates { 0x40 } else { 0 } | opcode);
        match payload.len() {
            short @ 0..126 => self.outgoing.push(0x80 | short as u8),
            long => {
                self.outgoing.push(0x80 | 126);
                self.outgoing.extend_from_slice(&u16::try_from(long).expect("a short message").to_be_bytes());
            }
        }
        self.outgoing.extend_from_slice(&mask);
        self.outgoing.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    }

    /// Sends a message that is answered by its id.
    pub fn ask(&mut self, message: &str, asked: Asked) {
        let id = self.next_id;
        self.next_id += 1;
        self.asked.insert(id, asked);
        let message = format!("{},\"id\":{id}}}", message.trim_end_matches('}'));
        self.send_frame(1, message.as_bytes());
    }

    fn frame(&mut self, text: &[u8], kind: Option<&str>, book: &mut Book) {
        book.trace = hash((book.trace, self.number, text));
        let shown = || text_of(&text[..text.len().min(300)]);
        if book.traced == Some(self.number) {
            eprintln!("{} client {} <- {}", book.mono_us, self.number, shown());
        }
        // The heads of events are read without what they hold, which may be large.
        let head_end = [&b",\"data\":"[..], b",\"patch\":", b",\"merge\":"].iter().find_map(|mark| {
            let at = find(&text[..text.len().min(400)], mark)?;
            Some((at, at + mark.len()))
        });
        let is_event = [&b"{\"type\":\"snapshot\""[..], b"{\"type\":\"patch\"", b"{\"type\":\"merge\""]
            .iter()
            .any(|start| text.starts_with(start));
        let (head, body) = match head_end.filter(|_| is_event) {
            Some((end, from)) => {
                assert_eq!(text.last(), Some(&b'}'), "an event ends its object: {}", shown());
                ([&text[..end], b"}"].concat(), Some(&text[from..text.len() - 1]))
            }
            None => (text.to_vec(), None),
        };
        let head: Value = serde_json::from_slice(&head)
            .unwrap_or_else(|error| panic!("client {} got a torn frame ({error}): {}", self.number, shown()));
        let own_kind = head["type"].as_str().expect("every frame has its type");
        assert!(kind.is_none_or(|kind| kind == own_kind), "an event is named by its type: {}", shown());
        assert_eq!(
            self.welcomed,
            own_kind != "welcome",
            "client {}: welcome comes first, once: {}",
            self.number,
            shown()
        );
        let id = head["id"].as_u64();
        let stream = head["stream"].as_str().unwrap_or_default().to_owned();
        match own_kind {
            "welcome" => {
                self.welcomed = true;
                self.connection = head["connection"].as_str().map(str::to_owned);
                assert_eq!(head["auth"]["sub"].as_str(), Some(&*self.sub), "a welcome names its own subject");
            }
            "snapshot" | "patch" | "merge" => {
                assert!(
                    !self.late,
                    "client {} got a frame started after its credential's end: {}",
                    self.number,
                    shown()
                );
                assert!(stream != GUARDED || !self.unguarded, "client {} may not see {}", self.number, shown());
                self.changed(own_kind, &stream, &head, body.expect("an event has a body"), text, book);
            }
            "stream_status" => {
                let held = self.held.get_mut(&stream);
                let held = held.unwrap_or_else(|| panic!("client {} does not hold {stream}: {}", self.number, shown()));
                held.state = head["state"].as_str().expect("a status has its state").to_owned();
            }
            "subscribed" => {
                let asked = id.and_then(|id| self.asked.remove(&id));
                let Some(Asked::Subscribe { name, held }) = asked else { panic!("nobody asked: {}", shown()) };
                assert_eq!(name, stream, "the name asked for is echoed");
                let held = Held { state: "live".to_owned(), ..held };
                assert!(self.held.insert(stream, held).is_none(), "a stream is held once");
            }
            "unsubscribed" => {
                let reason = head["reason"].as_str().unwrap_or_default();
                match id.and_then(|id| self.asked.remove(&id)) {
                    Some(Asked::Unsubscribe { name }) => assert_eq!((name, reason), (stream.clone(), "requested")),
                    None if stream == GUARDED && self.may_be_kept_out(book) => assert_eq!(reason, "forbidden"),
                    None => assert!(book.reloaded, "client {} lost {stream}: {}", self.number, shown()),
                    other => panic!("{other:?} was answered {}", shown()),
                }
                assert!(self.held.remove(&stream).is_some(), "what was not held ends: {}", shown());
            }
            "auth_ok" => {
                let id = id.expect("an id is echoed");
                let asked = self.asked.remove(&id);
                assert!(matches!(asked, Some(Asked::Renew)), "client {} was renewed unasked: {}", self.number, shown());
                self.renewed(id);
            }
            "reauthenticate" => assert!(head["expires_at"].is_u64() && head["expires_in_ms"].is_u64(), "{}", shown()),
            "permission_update" => {
                let may = head["permissions"] == serde_json::json!(["guarded"]);
                let said = book.said.guarded.get(&self.sub).map(|(said, _)| *said);
                assert_eq!(said, Some(may), "client {} is told what was said: {}", self.number, shown());
            }
            "error" => self.told_error(&head, id, book),
            "reconnect" => {
                assert!(
                    book.draining && !self.told_to_reconnect,
                    "client {} is sent away once, in a drain",
                    self.number
                );
                self.told_to_reconnect = true;
            }
            other => panic!("client {} got a frame of type {other}", self.number),
        }
    }

    fn told_error(&mut self, head: &Value, id: Option<u64>, book: &Book) {
        let code = head["code"].as_str().unwrap_or_default();
        let asked = id.and_then(|id| self.asked.remove(&id));
        let fine = match (&asked, code) {
            (Some(Asked::Subscribe { .. }), "ALREADY_SUBSCRIBED" | "TOO_MANY_STREAMS" | "TOO_MANY_SUBSCRIPTIONS") => {
                true
            }
            (Some(Asked::Subscribe { .. } | Asked::Unsubscribe { .. }), "STREAM_NOT_FOUND") => true,
            (Some(Asked::Subscribe { name, .. }), "INSUFFICIENT_PERMISSIONS") => {
                name == GUARDED && self.may_be_kept_out(book)
            }
            (Some(Asked::RenewBadly), "AUTH_UPDATE_REJECTED" | "AUTH_SUBJECT_MISMATCH") => true,
            // A token that has expired on the way.
            (Some(Asked::Renew), "AUTH_UPDATE_REJECTED") => self.may_have_expired() || self.may_be_dead(book),
            (None, "TOO_MANY_STREAMS") => true,
            (None, "BAD_MESSAGE" | "UNKNOWN_TYPE") => true,
            _ => false,
        };
        assert!(fine, "client {}: {asked:?} was answered {head}", self.number);
        if matches!(asked, Some(Asked::Renew | Asked::RenewBadly)) {
            self.renewals_refused += 1;
            self.not_renewed(id.expect("an answer that was asked for has an id"));
        }
        if code == "TOO_MANY_STREAMS" && asked.is_none() {
            self.held.remove(head["stream"].as_str().unwrap_or_default());
        }
    }

    fn changed(&mut self, kind: &str, stream: &str, head: &Value, body: &[u8], text: &[u8], book: &mut Book) {
        let number = self.number;
        let epoch = head["epoch"].as_str().expect("an event has its epoch").to_owned();
        let seq = head["seq"].as_u64().expect("an event has its place");
        let shown = || text_of(&text[..text.len().min(300)]);
        let Some(held) = self.held.get_mut(stream) else {
            panic!("client {number} does not hold {stream} and got {}", shown());
        };
        // One that resumes may be ahead of the core it comes to (protocol section 3, «Resume»): it gets what there is.
        let moves = self.kind == Kind::Events && is_shaped(stream) && self.tokens.len() > 1;
        let resumes = (std::mem::take(&mut held.resumes) || moves) && kind == "snapshot";
        if held.epoch == epoch && !resumes {
            assert!(seq > held.seq, "client {number}: seq rises, {} was held: {}", held.seq, shown());
        }
        let value = match kind {
            "snapshot" => body.to_vec(),
            _ => {
                assert_eq!(kind, held.format, "client {number} asked for another format: {}", shown());
                assert_eq!((&epoch, seq - 1), (&held.epoch, held.seq), "client {number}: it follows on: {}", shown());
                assert_eq!(head["base"].as_u64(), Some(seq - 1), "base is the place before: {}", shown());
                let base = held.value.as_deref().expect("what is held has a value");
                let applied =
                    if kind == "patch" { apply::apply_patch(base, body) } else { apply::apply_merge(base, body) };
                applied.unwrap_or_else(|error| panic!("client {number}: {error}: {}", shown()))
            }
        };
        (held.epoch, held.seq, held.value) = (epoch.clone(), seq, Some(value.clone()));
        self.check_value(stream, &value, book);
        check_place(book, &epoch, seq, &value);
        let frame = (epoch, seq, self.kind == Kind::Events, kind.to_owned());
        if let Some(bits) = self.deflate {
            let (epoch, seq, _, kind) = &frame;
            let frame = (epoch.clone(), *seq, bits, kind.clone());
            let payload = *book.payloads.entry(frame).or_insert(self.payload);
            assert_eq!(payload, self.payload, "client {number}: an event is deflated the same for all: {}", shown());
        }
        let bytes = *book.frames.entry(frame).or_insert_with(|| hash(text));
        assert_eq!(bytes, hash(text), "client {number}: an event's bytes are the same for all: {}", shown());
    }

    /// A value must be one that this client's upstream has served.
    pub fn check_value(&self, stream: &str, value: &[u8], book: &Book) {
        // Of `roled` agents get a part, and whoever is none gets all.
        let is_agents = !super::upstream::is_whole(value);
        let is_theirs = if stream == "roled" {
            self.companies().iter().any(|&company| is_agent(company) == is_agents)
        } else {
            !is_agents
        };
        let served = is_theirs && self.urls(stream).iter().any(|url| book.upstream.has_served(url, value));
        let shown = text_of(&value[..value.len().min(300)]);
        assert!(served, "client {} got as {stream} a value that is not its own: {shown}", self.number);
    }

    /// The URLs whose values this client may see under that name.
    pub fn urls(&self, stream: &str) -> Vec<String> {
        match stream.split_once('?') {
            Some((id, query)) => vec![format!("http://up/{id}?{query}")],
            None if stream == "own" => {
                self.companies().iter().map(|company| format!("http://up/own/{company}")).collect()
            }
            None => vec![format!("http://up/{stream}")],
        }
    }
}

/// Whether the caller's credential shapes what they get as that stream.
fn is_shaped(stream: &str) -> bool {
    matches!(stream, "own" | "roled")
}

/// Whether the people of that company are agents.
pub fn is_agent(company: u64) -> bool {
    company == 0
}

/// The value at one place of an epoch is the same for everybody, and another than at the place before it: what a sequence
/// does not show makes no event in it.
fn check_place(book: &mut Book, epoch: &str, seq: u64, value: &[u8]) {
    let version = match super::upstream::is_whole(value) {
        true => hash((super::upstream::place(value), value.len())),
        false => hash(super::upstream::sorted(value)),
    };
    for other in [seq.checked_sub(1), seq.checked_add(1)].into_iter().flatten() {
        let beside = book.values.get(&(epoch.to_owned(), other));
        assert_ne!(beside, Some(&version), "the same value stands at {epoch}-{seq} and {epoch}-{other}");
    }
    let first = *book.values.entry((epoch.to_owned(), seq)).or_insert(version);
    assert_eq!(first, version, "two clients hold different values at {epoch}-{seq}");
}

/// A message's payload, made whole again; it refers to no message before it.
fn inflated(payload: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    let whole = [payload, &[0x00, 0x00, 0xff, 0xff, 0x01, 0x00, 0x00, 0xff, 0xff]].concat();
    flate2::read::DeflateDecoder::new(&whole[..]).read_to_end(&mut text).expect("a message is deflated");
    text
}

fn deflated(message: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(message).and_then(|()| encoder.flush()).expect("memory");
    let mut payload = encoder.get_ref().clone();
    payload.truncate(payload.len() - 4);
    payload
}

fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|part| part == mark)
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn status_of(head: &str) -> u16 {
    head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("an answer begins with its status")
}

fn header(head: &str, name: &str) -> Option<String> {
    head.lines().find_map(|line| {
        let (own, value) = line.split_once(':')?;
        own.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
    })
}

fn content_length(head: &str) -> usize {
    header(head, "Content-Length").and_then(|length| length.parse().ok()).unwrap_or(0)
}
