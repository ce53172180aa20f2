//! Shards of one process without sockets and clocks: what is said to them and what they say, with a time of its own and a
//! store that a test plays.

#![allow(dead_code, reason = "each test uses a part of it")]

pub mod ephemerals;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use restcast::auth::api_key::ApiKeys;
use restcast::auth::control::{ControlEntry, Event};
use restcast::auth::jwt;
use restcast::auth::keys::{Algorithm, Key, KeyConfig};
use restcast::auth::marks::Concerned;
use restcast::auth::session::{self, CookieSecrets, Place};
use restcast::codec::ws::{Opcode, write_masked};
use restcast::config::{Config, FileError, Sources};
use restcast::ids::CoreId;
use restcast::metrics::CoreMetrics;
use restcast::secret::Secret;
use restcast::shard::{
    Catalog, ConnectionQuery, Found, Input, Ledger, Listed, Lookup, Mail, Options, Order, Output, Sent, SessionRecord,
    Shard, Wire,
};
use restcast::stream::budget::PollLeave;
use restcast::stream::poll::{FetchResponse, PollNo, Validators};
use restcast::stream::succession::UnderWay;
use restcast::time::{Instant, Now, WallTime};
use serde_json::{Value, json};

use self::ephemerals::Ephemerals;

pub const SECRET: &str = "a secret of the hall, of 32 bytes or more";
pub const COOKIE_SECRET: &str = "a secret of the session cookies";
pub const WALL_S: u64 = 1_800_000_000;
pub const MS: Duration = Duration::from_millis(1);
pub const SECOND: Duration = Duration::from_secs(1);

struct NoSources;

impl Sources for NoSources {
    fn env(&self, _name: &str) -> Option<Vec<u8>> {
        None
    }

    fn file(&self, _path: &str, _bytes_max: usize) -> Result<Vec<u8>, FileError> {
        Err(FileError::Missing)
    }
}

/// What a connection was sent.
#[derive(Default)]
struct Sink(BTreeMap<(usize, u32), Vec<u8>>, usize);

impl Wire for Sink {
    fn send(&mut self, connection: u32, bytes: &[u8]) -> Sent {
        self.0.entry((self.1, connection)).or_default().extend_from_slice(bytes);
        Sent::Bytes(bytes.len())
    }
}

/// A connection: its core and its place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Conn {
    pub core: usize,
    pub index: u32,
}

/// A question that waits for its answer.
#[derive(Debug)]
pub struct Question {
    pub core: usize,
    pub ask: u64,
    pub lookup: Lookup,
}

/// What is configured besides streams.
#[derive(Clone)]
pub struct Setup {
    pub cores: u16,
    pub text: String,
    pub streams: Vec<(String, String)>,
    pub session: Option<session::Options>,
    pub store: bool,
    /// What chance depends on: another for each process.
    pub seed: u8,
}

fn place(text: &str) -> Place {
    Place::new(text, &text.split('/').skip(1).map(str::to_owned).collect::<Vec<_>>())
}

pub fn session_options() -> session::Options {
    session::Options {
        secrets: CookieSecrets::new(&[Secret::new(COOKIE_SECRET)]),
        cookie: "connect.sid".into(),
        prefix: "sess:".into(),
        user: place("/userId"),
        role: place("/userRole"),
        company: place("/companyId"),
        permissions: place("/permissions"),
        reread: Duration::from_secs(30),
        grace: Duration::from_secs(300),
        touch: false,
    }
}

fn parsed(text: &str) -> Config {
    Config::parse(text, &NoSources).unwrap_or_else(|errors| panic!("{errors:?}\n{text}")).0
}

/// The API keys of a file that has these lines besides.
pub fn api_keys(lines: &str) -> Arc<ApiKeys> {
    let key = format!("[[auth.jwt.key]]\nalg = \"HS256\"\nsecret = \"{SECRET}\"\n");
    Arc::new(ApiKeys::new(parsed(&format!("{key}{lines}")).api_keys))
}

impl Setup {
    pub fn new() -> Setup {
        Setup {
            cores: 1,
            text: String::new(),
            streams: vec![("leads".into(), "linger = \"1h\"\ninterval = \"1h\"".into())],
            session: Some(session_options()),
            store: true,
            seed: 7,
        }
    }

    pub fn stream(mut self, id: &str, more: &str) -> Setup {
        self.streams.push((id.to_owned(), format!("linger = \"1h\"\ninterval = \"1h\"\n{more}")));
        self
    }

    pub fn options(&self, previous: Option<&Catalog>) -> Options {
        let mut text = format!(
            "[server]\nheartbeat = \"30m\"\n{}\n[[auth.jwt.key]]\nalg = \"HS256\"\nsecret = \"{SECRET}\"\n",
            self.text
        );
        for (id, more) in &self.streams {
            let url = if more.contains("url = ") { String::new() } else { format!("url = \"http://up/{id}\"\n") };
            let _ = write!(text, "[[stream]]\nid = \"{id}\"\n{url}{more}\n");
        }
        let config = parsed(&text);
        let mut auth = config.auth.clone();
        auth.session = self.session.clone();
        auth.store = self.store;
        let mut connection = config.connection.clone();
        connection.heartbeat = Duration::from_secs(30 * 86_400);
        let catalog = Catalog::new(&config.streams, previous, 7).with_direct(config.direct.as_ref(), previous);
        Options { connection, auth, limits: config.limits.clone(), catalog }
    }
}

pub struct Hall {
    shards: Vec<Shard>,
    options: Arc<Options>,
    pub ledger: Arc<Ledger>,
    now: Now,
    key: Key,
    sent: Sink,
    read: BTreeMap<(usize, u32), usize>,
    pub questions: VecDeque<Question>,
    pub orders: Vec<Order>,
    pub closed: Vec<Conn>,
    polls: VecDeque<(usize, u32, PollNo, PollLeave, UnderWay)>,
    /// When each poll began, and of which URL.
    pub polled: Vec<(Instant, String)>,
    /// What upstreams answer, by path; a small value otherwise.
    pub bodies: BTreeMap<String, String>,
    /// What is polled, of those that wait.
    begun: VecDeque<String>,
    /// The sessions that the store holds: text, and when the key ends.
    pub store: BTreeMap<String, (String, Option<WallTime>)>,
    pub tickets: BTreeMap<String, Secret>,
    /// Whether questions are answered as soon as they are put.
    pub answers: bool,
    /// The ephemeral sessions that the store holds, which halls may share.
    pub ephemerals: Rc<RefCell<Ephemerals>>,
    /// Whether the store says that it cannot.
    pub away: bool,
    /// How many questions about sessions have been put, and about how many sessions.
    pub asked: Vec<usize>,
}

impl Hall {
    pub fn new(setup: &Setup) -> Hall {
        let now = Now { at: Instant::from_micros(1_000_000), wall: WallTime::from_secs(WALL_S) };
        Hall::beside(setup, now)
    }

    fn beside(setup: &Setup, now: Now) -> Hall {
        let ledger = Arc::new(Ledger::default());
        let options = Arc::new(setup.options(None));
        let shards = (0..setup.cores)
            .map(|core| {
                let metrics = Arc::new(CoreMetrics::default());
                let seed = [setup.seed + u8::try_from(core).expect("few cores"); 32];
                ledger.marks().configure(&options.auth);
                let options = Arc::clone(&options);
                Shard::new(CoreId(core), setup.cores, options, Arc::clone(&ledger), metrics, seed, now)
            })
            .collect();
        let config = KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret: Secret::new(SECRET) };
        let mut hall = Hall {
            shards,
            options,
            ledger,
            now,
            key: Key::new(&config).expect("a long secret"),
            sent: Sink::default(),
            read: BTreeMap::new(),
            questions: VecDeque::new(),
            orders: Vec::new(),
            closed: Vec::new(),
            polls: VecDeque::new(),
            polled: Vec::new(),
            bodies: BTreeMap::new(),
            begun: VecDeque::new(),
            store: BTreeMap::new(),
            tickets: BTreeMap::new(),
            ephemerals: Rc::default(),
            answers: true,
            away: false,
            asked: Vec::new(),
        };
        hall.settle();
        hall
    }

    pub fn now(&self) -> Now {
        self.now
    }

    pub fn wall(&self) -> WallTime {
        self.now.wall
    }

    pub fn token(&self, claims: Value) -> String {
        let mut all = json!({ "sub": "u1", "exp": WALL_S + 3_600, "iat": WALL_S });
        all.as_object_mut().expect("an object").extend(claims.as_object().expect("an object").clone());
        self.token_of(all)
    }

    /// A token that claims this and nothing else.
    pub fn token_of(&self, claims: Value) -> String {
        jwt::mint(&self.key, &claims.to_string())
    }

    /// Puts a session into the store, whose key lives for `ttl`.
    pub fn put_session(&mut self, sid: &str, record: Value, ttl: Option<Duration>) {
        self.store.insert(sid.to_owned(), (record.to_string(), ttl.map(|ttl| self.now.wall + ttl)));
    }

    pub fn connect(&mut self, core: usize) -> Conn {
        let peer: SocketAddr = "192.0.2.1:4711".parse().expect("an address");
        let key = self.shards[core].accept(self.now, peer).expect("there is room");
        Conn { core, index: key.index }
    }

    /// What a core tells of its connections in one turn.
    pub fn list(&self, core: usize, sub: Option<&str>, first: u32, limit: usize) -> Listed {
        self.shards[core].list(&ConnectionQuery { sub: sub.map(str::to_owned), first, limit })
    }

    pub fn say(&mut self, conn: Conn, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        self.input(conn.core, Input::Received { connection: conn.index, bytes: &mut bytes });
        self.settle();
    }

    pub fn request(&mut self, core: usize, method: &str, path: &str, headers: &[(&str, &str)]) -> Conn {
        let conn = self.connect(core);
        self.request_on(conn, method, path, headers);
        conn
    }

    pub fn request_on(&mut self, conn: Conn, method: &str, path: &str, headers: &[(&str, &str)]) {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: live.example\r\n");
        for (name, value) in headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        head.push_str("\r\n");
        self.say(conn, head.as_bytes());
    }

    pub fn upgrade(&mut self, core: usize, path: &str, headers: &[(&str, &str)]) -> Conn {
        let mut all = vec![
            ("Connection", "Upgrade"),
            ("Upgrade", "websocket"),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        all.extend_from_slice(headers);
        self.request(core, "GET", path, &all)
    }

    /// Says a WebSocket message.
    pub fn message(&mut self, conn: Conn, message: Value) {
        let mut frame = Vec::new();
        write_masked(&mut frame, true, Opcode::Text, message.to_string().as_bytes(), [1, 2, 3, 4]);
        self.say(conn, &frame);
    }

    /// Says a WebSocket message; nothing else happens yet.
    pub fn message_at_once(&mut self, conn: Conn, message: Value) {
        let mut frame = Vec::new();
        write_masked(&mut frame, true, Opcode::Text, message.to_string().as_bytes(), [1, 2, 3, 4]);
        self.input(conn.core, Input::Received { connection: conn.index, bytes: &mut frame });
    }

    fn input(&mut self, core: usize, input: Input<'_>) {
        self.shards[core].handle(self.now, input);
    }

    /// The wall clock is set forward.
    pub fn set_clock_forward(&mut self, by: Duration) {
        self.now.wall = self.now.wall + by;
        self.tell_all(|| Input::ClockMoved);
    }

    pub fn set_clock_back(&mut self, by: Duration) {
        self.now.wall = self.now.wall - by;
        self.tell_all(|| Input::ClockMoved);
    }

    /// Something is heard of a user or a session by Redis.
    pub fn hear(&mut self, event: &str, data: Value) {
        self.hear_late(event, data, self.now.wall);
    }

    /// The same, dated `at`.
    pub fn hear_late(&mut self, event: &str, data: Value, at: WallTime) {
        let entry = ControlEntry { event: event.to_owned(), data: data.to_string(), at_ms: at.as_micros() / 1_000 };
        let events = Event::read(&entry, self.now.wall).expect("an event");
        let concerned: Arc<[Concerned]> =
            events.iter().filter_map(|event| self.ledger.marks().take(event, self.now.wall).concerned).collect();
        self.tell_all(|| Input::Control(Arc::clone(&concerned)));
    }

    /// What was put on the control stream here and is of ephemeral sessions is heard at another process.
    pub fn heard_at(&mut self, other: &mut Hall) {
        for order in std::mem::take(&mut self.orders) {
            let Order::Publish(entry) = order else { continue };
            if let Some(id) = entry.ended_ephemeral().and_then(|place| other.ledger.end_ephemeral(place)) {
                other.tell_all(|| Input::Mail(Mail::SessionEnded { id }));
            }
        }
    }

    /// Gives each core an input.
    pub fn tell_all(&mut self, input: impl Fn() -> Input<'static>) {
        for core in 0..self.shards.len() {
            self.input(core, input());
        }
        self.settle();
    }

    pub fn reload(&mut self, setup: &Setup) {
        let options = Arc::new(setup.options(Some(&self.options.catalog)));
        self.options = Arc::clone(&options);
        self.ledger.bound(&options.limits);
        self.tell_all(|| Input::Reload(Arc::clone(&options)));
    }

    /// The cores hear of it in that order, with whatever `after` makes of each before it goes on.
    pub fn reload_in_order(&mut self, setup: &Setup, order: &[usize], mut after: impl FnMut(&mut Hall, usize)) {
        let options = Arc::new(setup.options(Some(&self.options.catalog)));
        self.options = Arc::clone(&options);
        self.ledger.bound(&options.limits);
        for &core in order {
            self.input(core, Input::Reload(Arc::clone(&options)));
            after(self, core);
        }
        self.settle();
    }

    pub fn lose(&mut self, conn: Conn) {
        self.input(conn.core, Input::Lost { connection: conn.index });
        self.settle();
    }

    /// Lets everything happen that can happen at this moment.
    pub fn settle(&mut self) {
        for turn in 0.. {
            assert!(turn < 10_000, "it never settles");
            let mut more = false;
            for core in 0..self.shards.len() {
                self.sent.1 = core;
                while self.shards[core].transmit(self.now, &mut self.sent) {}
                while let Some(output) = self.shards[core].poll_output() {
                    more = true;
                    self.output(core, output);
                }
                if self.shards[core].next_timeout().is_some_and(|at| at <= self.now.at) {
                    self.input(core, Input::Timeout);
                    more = true;
                }
            }
            if self.answers && !self.questions.is_empty() {
                self.answer_all();
                more = true;
            }
            while let Some((core, stream, poll, leave, under_way)) = self.polls.pop_front() {
                let (validators, received) = (Validators::default(), self.now.wall);
                let path = self.begun.pop_front().expect("each poll has its path");
                let body = self.bodies.get(&path).map_or("[{\"id\":1}]", String::as_str).as_bytes().to_vec();
                let response =
                    FetchResponse { status: 200, validators, retry_after: None, fresh_for: None, body, received };
                leave.answered(self.now.at, &response);
                let result = Ok(response);
                under_way.end(self.now.at, &result);
                self.input(core, Input::Fetched { stream, poll, result });
                more = true;
            }
            if !more {
                return;
            }
        }
    }

    fn output(&mut self, core: usize, output: Output) {
        match output {
            Output::Fetch { stream, poll, request, leave, under_way } => {
                self.polls.push_back((core, stream, poll, leave, under_way));
                self.polled.push((self.now.at, request.target.url.to_string()));
                self.begun.push_back(request.target.url.path().to_owned());
            }
            Output::LookUp { ask, lookup } => {
                if let Lookup::Sessions(sids) = &lookup {
                    self.asked.push(sids.len());
                }
                self.questions.push_back(Question { core, ask, lookup });
            }
            Output::Order(order) => {
                if let Order::Touch { sid, life } = &order {
                    let sid = String::from_utf8_lossy(sid.expose_secret()).into_owned();
                    let ends = self.now.wall + *life;
                    if let Some((_, ttl)) = self.store.get_mut(&sid).filter(|_| !self.away) {
                        *ttl = Some(ends);
                    }
                }
                self.orders.push(order);
            }
            Output::Mail { to, mail } => self.input(usize::from(to.0), Input::Mail(mail)),
            Output::Close { connection, .. } => self.closed.push(Conn { core, index: connection }),
            Output::Compare(_) => unreachable!("the value does not change"),
            Output::Act { .. } => unreachable!("no action is configured"),
            Output::Next { .. } | Output::Unfollow { .. } => unreachable!("no upstream speaks a stream"),
            Output::Finish { .. } | Output::Resume { .. } | Output::Drained | Output::Notice(_) => {}
        }
    }

    /// Answers every question that waits, as the store is now.
    pub fn answer_all(&mut self) {
        while let Some(question) = self.questions.pop_front() {
            self.answer(question);
        }
        if !self.answers {
            self.settle();
        }
    }

    pub fn answer(&mut self, question: Question) {
        let Question { core, ask, lookup } = question;
        let found = if self.away { Found::Unavailable } else { self.found(lookup) };
        self.input(core, Input::Found { ask, found });
    }

    fn found(&mut self, lookup: Lookup) -> Found {
        match lookup {
            Lookup::Sessions(sids) => Found::Sessions(
                sids.iter().map(|sid| self.record(&String::from_utf8_lossy(sid.expose_secret()))).collect(),
            ),
            Lookup::TakeTicket(hash) => Found::Ticket(self.tickets.remove(&hash)),
            Lookup::KeepTicket { hash, record, .. } => {
                self.tickets.insert(hash, record);
                Found::Kept
            }
            Lookup::KeySet(_) => Found::KeySet,
            Lookup::Renew { .. } => Found::Renewed(None),
            Lookup::Ephemeral(ask) => Found::Ephemeral(self.ephemerals.borrow_mut().answer(ask, self.now)),
        }
    }

    fn record(&self, sid: &str) -> Option<SessionRecord> {
        let (text, ends) = self.store.get(sid)?;
        let ttl = ends.map(|ends| ends.since(self.now.wall));
        (ttl != Some(Duration::ZERO)).then(|| SessionRecord { text: Secret::new(text.as_str()), ttl })
    }

    /// Lets so much time pass, stopping wherever something is due.
    pub fn pass(&mut self, by: Duration) {
        let end = self.now.at + by;
        while self.now.at < end {
            let next = self.shards.iter().filter_map(Shard::next_timeout).min().unwrap_or(end);
            let next = next.max(self.now.at + Duration::from_micros(1)).min(end);
            let step = next.since(self.now.at);
            self.now = Now { at: next, wall: self.now.wall + step };
            for core in 0..self.shards.len() {
                self.input(core, Input::Timeout);
            }
            self.settle();
        }
    }

    /// What a connection was sent since this was last asked.
    pub fn bytes(&mut self, conn: Conn) -> Vec<u8> {
        let all = self.sent.0.get(&(conn.core, conn.index)).cloned().unwrap_or_default();
        let from = self.read.insert((conn.core, conn.index), all.len()).unwrap_or(0);
        all[from..].to_vec()
    }

    /// The status and the body of an HTTP answer.
    pub fn answered(&mut self, conn: Conn) -> (u16, Value) {
        let bytes = self.bytes(conn);
        let text = String::from_utf8_lossy(&bytes);
        let status = text.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    /// The status and the code of a refusal.
    pub fn refused(&mut self, conn: Conn) -> (u16, String) {
        let (status, body) = self.answered(conn);
        (status, body["code"].as_str().unwrap_or_default().to_owned())
    }

    /// The frames of a WebSocket since this was last asked; a close is `{"close": code, "reason": …}`.
    pub fn frames(&mut self, conn: Conn) -> Vec<Value> {
        let bytes = self.bytes(conn);
        let mut rest = bytes.as_slice();
        if rest.starts_with(b"HTTP/1.1 101") {
            let end = rest.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole head") + 4;
            rest = &rest[end..];
        }
        let mut frames = Vec::new();
        while let [first, second, more @ ..] = rest {
            let (length, more) = match second {
                126 => (usize::from(u16::from_be_bytes([more[0], more[1]])), &more[2..]),
                127 => {
                    let length = u64::from_be_bytes(more[..8].try_into().expect("eight bytes"));
                    (usize::try_from(length).expect("it was sent"), &more[8..])
                }
                short => (usize::from(*short), more),
            };
            let payload = &more[..length];
            match first & 15 {
                1 => frames.push(serde_json::from_slice(payload).expect("JSON")),
                8 => {
                    let code = u16::from_be_bytes([payload[0], payload[1]]);
                    frames.push(json!({ "close": code, "reason": String::from_utf8_lossy(&payload[2..]) }));
                }
                _ => {}
            }
            rest = &more[length..];
        }
        frames
    }

    /// The kinds of those frames: `type`, or the reason of a close.
    pub fn kinds(&mut self, conn: Conn) -> Vec<String> {
        let kind = |frame: &Value| match &frame["close"] {
            Value::Null => frame["type"].as_str().unwrap_or_default().to_owned(),
            code => format!("{code} {}", frame["reason"].as_str().unwrap_or_default()),
        };
        self.frames(conn).iter().map(kind).collect()
    }
}

/// The cookie header of a session, as a browser sends back what Express has set.
pub fn cookie(sid: &str) -> String {
    cookie_by(COOKIE_SECRET, sid)
}

pub fn cookie_by(secret: &str, sid: &str) -> String {
    let value = CookieSecrets::new(&[Secret::new(secret)]).cookie(sid).expect("a secret");
    let escaped = value.replace('%', "%25").replace(':', "%3A").replace('/', "%2F").replace('+', "%2B");
    format!("theme=dark; connect.sid={escaped}")
}
