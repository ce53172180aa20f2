//! What callers describe themselves, as they mean it: targets, which of them are the same, what their streams are called, and
//! the ephemeral sessions that are made of them; the model's own reading of protocol version 1, section 1, and docs/direct.md.
//!
//! A target is known in the model by its number, `direct#3`; what the server calls it is learned from what it sends and asks.
//! One name is one target, always: equal by URL, method, headers, body and interval, however they were spelled.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use restcast::stream::poll::Target as Polled;
use serde_json::{Value, json};

use super::client::{Book, Carrier, Client, Held, Kind, Known, Login, Request};
use super::deeds::encoded;
use super::dice::Dice;
use super::law::{LATE_US, Token};
use super::upstream::CHOICES;
use super::world::{SECOND_US, World};

/// What stands in everything that a caller means to be secret, and in nothing else.
pub const SECRET_MARK: &str = "sEcReT";
/// `direct.session_ttl_max` and `direct.sessions_per_subject` of every world.
pub const TTL_MAX_S: u64 = 25;
pub const SESSIONS_EACH: usize = 2;
/// How much longer than `direct.linger` a session may be there after its last watcher: a core may come late.
const LAPSE_US: u64 = 1_000_000;
/// The same where a store may have missed that nobody watches any more: what it was told last holds for a minute.
const SHARED_LAPSE_US: u64 = 66_000_000;

/// How many points of a stream may be gone on from.
const POINTS_KEPT: usize = 3;

/// A target.
pub struct Target {
    url: &'static str,
    post: bool,
    headers: &'static [(&'static str, &'static str)],
    body: Option<Body>,
    interval_ms: u64,
}

/// A body as it is given.
#[derive(Clone, Copy)]
enum Body {
    Text(&'static str),
    Json(&'static str),
}

const fn get(url: &'static str, interval_ms: u64) -> Target {
    Target { url, post: false, headers: &[], body: None, interval_ms }
}

const fn with(headers: &'static [(&'static str, &'static str)]) -> Target {
    Target { headers, ..get("http://up.test/d/0", 500) }
}

const fn post(body: Option<Body>) -> Target {
    Target { post: true, body, ..get("http://up.test/d/0", 500) }
}

/// The targets that there are: those beside each other differ in one thing.
pub const TARGETS: [Target; 14] = [
    get("http://up.test/d/0", 500),
    get("http://up.test/d/0", 1_000),
    get("http://up.test/d/1", 500),
    get("http://up.test/narrow/2", 500),
    get("http://10.0.0.1/d/0", 500),
    get("http://up.test/d/0?key=sEcReT-q", 500),
    with(&[("x-key", "sEcReT-a")]),
    with(&[("x-key", "sEcReT-b")]),
    with(&[("x-key", "sEcReT-a"), ("x-other", "sEcReT-b")]),
    with(&[("x-key", "sEcReT-b"), ("x-other", "sEcReT-a")]),
    post(None),
    post(Some(Body::Text("sEcReT-1"))),
    post(Some(Body::Json("{\"q\":\"sEcReT-1\"}"))),
    Target { headers: &[("x-key", "sEcReT-a")], ..post(Some(Body::Text("sEcReT-1"))) },
];
/// Those that may stand in a URL of the server's.
pub const PLAIN: usize = 5;
/// The one that a reload takes off the list, and the one that never stood on it.
const NARROW: usize = 3;
const BLOCKED: usize = 4;

/// `direct.allow`, and as a reload may leave it.
pub const ALLOW: &str = "[\"http://up.test/*\"]";
pub const ALLOW_LESS: &str = "[\"http://up.test/d/*\"]";

/// What the model calls the stream of that target.
pub fn name_of(target: usize) -> String {
    format!("direct#{target}")
}

/// The target whose stream the model calls so.
pub fn target_of(name: &str) -> Option<usize> {
    name.strip_prefix("direct#")?.parse().ok()
}

/// Where the values of a target are kept.
pub fn url_of(target: usize) -> String {
    format!("http://direct/{target}")
}

impl Target {
    /// Its URL, in one of its spellings.
    pub fn spelled_url(&self, dice: &mut Dice) -> String {
        let host = ["http://up.test/", "http://UP.test:80/", "HTTP://up.test/"];
        let url = self.url.replacen("http://up.test/", dice.pick::<&str>(&host), 1);
        if dice.percent(20) { url + "#part" } else { url }
    }

    /// Its interval, in one of its spellings; `None`: it is left out.
    pub fn spelled_interval(&self, dice: &mut Dice) -> Option<u64> {
        match self.interval_ms {
            1_000 if dice.percent(50) => None,
            500 => Some(*dice.pick(&[500, 0, 7])),
            other => Some(other),
        }
    }

    /// As a body or a message has it, in one of its spellings.
    pub fn described(&self, dice: &mut Dice) -> Value {
        let mut said = json!({ "url": self.spelled_url(dice), "interval_ms": self.spelled_interval(dice) });
        if !self.headers.is_empty() {
            let capitals = dice.percent(50);
            let spelled = |name: &str| if capitals { name.to_ascii_uppercase() } else { name.to_owned() };
            said["headers"] = self.headers.iter().map(|(name, value)| (spelled(name), json!(value))).collect();
        }
        match self.body {
            None => {}
            Some(Body::Text(text)) => said["body"] = text.into(),
            Some(Body::Json(text)) => said["body"] = serde_json::from_str(text).expect("it is JSON"),
        }
        if self.post && (self.body.is_none() || dice.percent(50)) {
            said["method"] = "POST".into();
        }
        said
    }

    /// Whether this is what a poll asks for, and how often: all of it, and nothing else.
    fn is_polled_by(&self, polled: &Polled) -> bool {
        let given = |(name, value): &(String, restcast::secret::Secret)| {
            (name.clone(), String::from_utf8_lossy(value.expose_secret()).into_owned())
        };
        let mut headers: Vec<(String, String)> = polled.options.headers.iter().map(given).collect();
        headers.sort();
        let own: Vec<(String, String)> =
            self.headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let body = self.body.map(|body| match body {
            Body::Text(text) | Body::Json(text) => text.as_bytes(),
        });
        polled.url.as_str() == self.url
            && polled.options.method == if self.post { "POST" } else { "GET" }
            && headers == own
            && polled.body.as_deref() == body
            && polled.options.interval.as_millis() == u128::from(self.interval_ms)
    }
}

/// Whether the target of that stream may be blocked by its URL.
pub fn may_be_blocked(name: &str, reloaded: bool) -> bool {
    target_of(name).is_some_and(|target| target == BLOCKED || target == NARROW && reloaded)
}

/// An ephemeral session that was handed out.
#[derive(Clone, Debug)]
pub struct Session {
    pub id: String,
    /// What it is opened by.
    pub token: String,
    pub target: usize,
    pub choice: Option<usize>,
    /// Whose it is, and what they came with.
    pub issuer: Option<&'static str>,
    pub sub: String,
    pub maker: Token,
    /// How many things had been said when it was handed out.
    pub made_after: usize,
    /// What its maker calls it.
    pub dedupe: Option<u64>,
    /// When it was asked for and handed out, on the monotonic clock, and for how long.
    pub asked_us: u64,
    pub made_us: u64,
    pub ttl_us: u64,
    /// When it ends, on the wall clock.
    pub ends_us: u64,
    /// Whether its end was asked for, and since when it was confirmed.
    pub end_asked: bool,
    pub ended_us: Option<u64>,
    /// Whether anybody has presented its token, and whether anybody has got its stream.
    pub presented: bool,
    pub watched: bool,
    /// Since when perhaps nobody watches, and certainly nobody does.
    perhaps_alone_us: Option<u64>,
    alone_us: Option<u64>,
    /// Whether it may have ended by that, and since when it must have.
    pub may_have_lapsed: bool,
    pub lapsed_us: Option<u64>,
}

/// An ephemeral session that was asked for.
#[derive(Clone, Debug)]
pub struct Wish {
    pub token: Token,
    pub target: usize,
    pub choice: Option<usize>,
    pub dedupe: Option<u64>,
    pub ttl_us: u64,
    pub asked_us: u64,
    pub asked_wall_us: u64,
}

/// A session that may be there all the same: whose, by which name, and until when.
#[derive(Clone, Debug)]
struct Lost {
    issuer: Option<&'static str>,
    sub: String,
    by_login: bool,
    dedupe: Option<u64>,
    until_us: u64,
}

/// All that was described.
#[derive(Debug, Default)]
pub struct Described {
    /// What the server calls each target's stream.
    names: BTreeMap<usize, String>,
    targets: BTreeMap<String, usize>,
    pub sessions: Vec<Session>,
    /// Those that were asked for and perhaps made, but not handed out.
    lost: Vec<Lost>,
    /// Whose wishes have had no answer: who does not read, or is gone, may have a session all the same.
    unanswered: Vec<(Option<&'static str>, String)>,
    /// The targets that have proved to be blocked when they were polled.
    pub proved_blocked: [bool; TARGETS.len()],
    /// Whether processes could share the sessions, and how many there may be in all.
    pub shared: bool,
    pub in_all: usize,
    pub linger_us: u64,
    /// Since when each core knows that the narrow target is off the list.
    closed: BTreeMap<usize, u64>,
    /// The last few points of each stream, and of each choice of it, that anybody got to.
    points: BTreeMap<(String, Option<usize>), Vec<Held>>,
    /// Of each target: since when perhaps nobody has watched it, and when it may have lingered for the last time.
    alone: [(Option<u64>, u64); TARGETS.len()],
}

impl Described {
    /// The server calls that target's stream so: one name for one target.
    pub fn learn(&mut self, target: usize, name: &str) {
        let known = self.names.entry(target).or_insert_with(|| name.to_owned());
        assert_eq!(known, name, "the same request has the same name");
        let known = *self.targets.entry(name.to_owned()).or_insert(target);
        assert_eq!(known, target, "requests that differ share no stream");
    }

    /// What the model calls the stream that the server calls so.
    pub fn model_name(&self, name: &str) -> Option<String> {
        self.targets.get(name).map(|target| name_of(*target))
    }

    /// What the server calls the stream of that target, if it is known.
    pub fn wire_name(&self, target: usize) -> Option<&str> {
        self.names.get(&target).map(String::as_str)
    }

    /// A stream that was described is polled: of which target.
    pub fn is_polled(&mut self, polled: &Polled) -> usize {
        let target = TARGETS.iter().position(|target| target.is_polled_by(polled));
        let target = target.unwrap_or_else(|| panic!("nobody has described what is polled at {}", polled.url));
        assert_ne!(target, BLOCKED, "a blocked target is polled");
        self.learn(target, polled.options.id.as_str());
        target
    }

    /// A core has read another configuration.
    pub fn hear_reload(&mut self, core: usize, at_us: u64, variant: u64) {
        match variant {
            2 => {
                self.closed.entry(core).or_insert(at_us);
            }
            _ => {
                self.closed.remove(&core);
            }
        }
    }

    /// Whether a core has known for a while that nobody may name that target.
    pub fn is_closed(&self, target: usize, core: usize, now_us: u64) -> bool {
        target == NARROW && self.closed.get(&core).is_some_and(|since| now_us > since + LATE_US)
    }

    /// Somebody has got to there.
    pub fn note_point(&mut self, name: &str, held: &Held) {
        let points = self.points.entry((name.to_owned(), held.choice)).or_default();
        points.push(held.clone());
        if points.len() > POINTS_KEPT {
            points.remove(0);
        }
    }

    /// When the stream of that target may have been forgotten last, for nobody watched it.
    pub fn lingered_us(&self, target: usize) -> u64 {
        self.alone[target].1
    }

    /// The session of that token.
    pub fn by_token(&self, token: &str) -> Option<usize> {
        self.sessions.iter().position(|session| session.token == token)
    }

    /// Time goes on from `from_us` to `to_us`; of each session: whether somebody certainly watches it meanwhile, and whether
    /// anybody may; `had`: of each target, whether somebody certainly watches that.
    fn pass_time(&mut self, from_us: u64, to_us: u64, watched: impl Fn(usize) -> (bool, bool), had: &[bool]) {
        let Described { sessions, linger_us, shared, alone, .. } = self;
        for ((since, lingered_us), had) in alone.iter_mut().zip(had) {
            *since = if *had { None } else { since.or(Some(from_us)) };
            if since.is_some_and(|since| to_us - since >= *linger_us) {
                *lingered_us = to_us;
            }
        }
        for (place, session) in sessions.iter_mut().enumerate() {
            let (certainly, perhaps) = watched(place);
            session.watched |= certainly;
            session.perhaps_alone_us = if certainly { None } else { session.perhaps_alone_us.or(Some(from_us)) };
            session.alone_us = if perhaps { None } else { session.alone_us.or(Some(from_us)) };
            let alone = session.perhaps_alone_us.is_some_and(|since| to_us - since >= *linger_us);
            session.may_have_lapsed |= alone && session.presented;
            let slack_us = if *shared { SHARED_LAPSE_US } else { LAPSE_US };
            let over = session.alone_us.map(|since| since + *linger_us + slack_us).filter(|over| *over <= to_us);
            if session.watched {
                session.lapsed_us = session.lapsed_us.or(over);
            }
        }
    }
}

impl Session {
    /// Whether it has certainly ended before `sent_us` of the monotonic clock, when the wall clock was at `wall_us`.
    pub fn is_over(&self, sent_us: u64, wall_us: u64, shared: bool) -> bool {
        let by_time = wall_us >= self.ends_us || (!shared && sent_us > self.made_us + self.ttl_us);
        let before = |at: Option<u64>| at.is_some_and(|at| at < sent_us);
        by_time || before(self.ended_us) || before(self.lapsed_us)
    }
}

impl Book {
    /// Of the sessions that count for that subject those that are certainly there, and those that may be.
    fn sessions_of(&self, issuer: Option<&str>, sub: &str) -> (usize, usize) {
        let Described { sessions, lost, unanswered, shared, .. } = &self.direct;
        // Who a record of a login session names may have changed.
        let own =
            |session: &&Session| session.issuer == issuer && session.sub == sub || session.maker.session.is_some();
        // A store has a clock of its own, and may have been told late.
        let perhaps = |session: &&Session| match shared {
            false => !session.is_over(self.mono_us, self.wall_us, false),
            true => {
                let in_store = self.store.was_set || self.mono_us <= session.made_us + session.ttl_us;
                in_store && !session.is_over(self.mono_us, 0, true)
            }
        };
        let lost = lost.iter().filter(|lost| lost.until_us > self.mono_us).count();
        let untold = unanswered.iter().filter(|(of, who)| *of == issuer && who == sub).count();
        let certain = self.certain_sessions(|session| own(&session) && session.maker.session.is_none());
        (certain, sessions.iter().filter(own).filter(perhaps).count() + lost + untold)
    }

    /// Sessions that are certainly there.
    fn certain_sessions(&self, of: impl Fn(&Session) -> bool) -> usize {
        let sessions = self.direct.sessions.iter().enumerate();
        sessions.filter(|(place, session)| of(session) && !self.session_may_be_over(*place)).count()
    }
}

impl Client {
    /// Whether it is who has made that session. Nobody can tell of one that was made by, or is asked for by, a login session.
    fn is_maker(&self, session: &Session) -> bool {
        self.issuer == session.issuer && self.sub == session.sub
    }

    /// The answer to a wish for a session.
    pub fn session_answered(&mut self, status: u16, body: &[u8], wish: Wish, book: &mut Book) {
        let name = name_of(wish.target);
        let answer: Value = serde_json::from_slice(body).expect("an answer is JSON");
        let code = answer["code"].as_str().unwrap_or_default();
        let by_login = wish.token.session.is_some();
        let unanswered = &mut book.direct.unanswered;
        let own = unanswered.iter().position(|(of, who)| *of == self.issuer && *who == self.sub);
        unanswered.swap_remove(own.expect("it was asked"));
        if !matches!(status, 200 | 201) {
            if (status, code) == (429, "TOO_MANY_STREAMS") {
                let (_, perhaps) = book.sessions_of(self.issuer, &self.sub);
                assert!(
                    perhaps >= SESSIONS_EACH || by_login,
                    "client {} has {perhaps} sessions: {answer}",
                    self.number
                );
            }
            if status == 503 {
                // It may be there all the same.
                let until_us = book.mono_us + wish.ttl_us + 5 * SECOND_US;
                let (issuer, sub, dedupe) = (self.issuer, self.sub.clone(), wish.dedupe);
                book.direct.lost.push(Lost { issuer, sub, by_login, dedupe, until_us });
            }
            return self.refused(status, &String::from_utf8_lossy(body), &name, book);
        }
        book.count(format!("session {status}"));
        let number = self.number;
        let refused = book.law.refuses(self.party(), &wish.token);
        assert!(!refused, "client {number} got a session in spite of a mark: {wish:?}");
        assert!(self.ephemeral().is_none() && self.may_have_reached(&name, book), "client {number} got a session");
        assert_ne!(wish.target, BLOCKED, "client {number} got a session of a blocked target");
        let text = |name: &str| answer[name].as_str().unwrap_or_else(|| panic!("{name} is missing")).to_owned();
        let (id, token, stream) = (text("id"), text("token"), text("stream"));
        let same = book.direct.by_token(&token);
        if status == 200 && same.is_none() {
            // It was made, and nobody was told of it then.
            let is_it = |lost: &Lost| {
                let own = lost.issuer == self.issuer && lost.sub == self.sub || lost.by_login || by_login;
                own && lost.dedupe == wish.dedupe && wish.dedupe.is_some()
            };
            assert!(book.direct.lost.iter().any(is_it), "client {number} got what was never made: {wish:?}");
            return;
        }
        book.direct.learn(same.map_or(wish.target, |place| book.direct.sessions[place].target), &stream);
        for (url, scheme) in [("ws_url", "ws"), ("sse_url", "http")] {
            assert_eq!(text(url), format!("{scheme}://h/v1/streams/{stream}"));
        }
        assert_eq!(answer["created"].as_bool(), Some(status == 201));
        let ends_us = answer["expires_at"].as_u64().expect("it has an end");
        if status == 200 {
            let place = same.expect("it was handed out");
            let same = &book.direct.sessions[place];
            assert!(same.dedupe.is_some() && same.dedupe == wish.dedupe, "client {number}: another name: {same:?}");
            let own = self.is_maker(same) || by_login || same.maker.session.is_some();
            assert!(own, "client {number} got what is {same:?}");
            assert_eq!((&same.id, same.ends_us), (&id, ends_us), "it is the same");
            let wall_us = wish.asked_wall_us.min(book.wall_us);
            assert!(
                !same.is_over(wish.asked_us, wall_us, book.direct.shared),
                "client {number} got what is over: {same:?}"
            );
            return;
        }
        assert_eq!(same, None, "no session is made twice");
        if !book.store.was_set {
            let ends = wish.asked_wall_us + wish.ttl_us..=book.wall_us + wish.ttl_us;
            assert!(ends.contains(&ends_us), "client {number}: {ends_us} is not in {ends:?}");
        }
        let Client { issuer, sub, .. } = &*self;
        let twice = book.certain_sessions(|other| {
            let before = other.made_us < wish.asked_us && other.maker.session.is_none() && !by_login;
            self.is_maker(other) && before && wish.dedupe.is_some() && other.dedupe == wish.dedupe
        });
        assert_eq!(twice, 0, "client {number} has a session of that name: {:?}", book.direct.sessions);
        book.direct.sessions.push(Session {
            id,
            token,
            target: wish.target,
            choice: wish.choice,
            issuer: *issuer,
            sub: sub.clone(),
            maker: wish.token,
            made_after: book.law.said.len(),
            dedupe: wish.dedupe,
            asked_us: wish.asked_us,
            made_us: book.mono_us,
            ttl_us: wish.ttl_us,
            ends_us,
            end_asked: false,
            ended_us: None,
            presented: false,
            watched: false,
            perhaps_alone_us: None,
            alone_us: None,
            may_have_lapsed: false,
            lapsed_us: None,
        });
        let (certain, _) = book.sessions_of(*issuer, sub);
        assert!(certain <= SESSIONS_EACH, "client {number} has {certain} sessions");
        let in_all = book.certain_sessions(|_| true);
        assert!(in_all <= book.direct.in_all, "there are {in_all} sessions");
    }

    /// The answer to who asks for a session by its id; `asked`: for which, whether its maker, whether to end it.
    pub fn face_answered(
        &mut self,
        status: u16,
        body: &[u8],
        asked: (usize, bool, bool),
        sent_us: u64,
        book: &mut Book,
    ) {
        let (place, is_maker, end) = asked;
        let may_be_over = book.session_may_be_over(place);
        let shared = book.direct.shared;
        let session = &mut book.direct.sessions[place];
        let by_login = session.maker.session.is_some() || self.tokens[0].session.is_some();
        match status {
            200 | 204 => {
                assert_eq!(status == 204, end, "client {}", self.number);
                assert!(is_maker || by_login, "client {} was told of {session:?}", self.number);
                let before = |at: Option<u64>| at.is_some_and(|at| at < sent_us);
                let over = before(session.ended_us) || before(session.lapsed_us.filter(|_| !shared));
                assert!(!over, "client {} was told of what is over: {session:?}", self.number);
                if end {
                    session.ended_us.get_or_insert(book.mono_us);
                } else {
                    let told: Value = serde_json::from_slice(body).expect("an answer is JSON");
                    let told = (told["id"].as_str(), told["token"].as_str(), told["expires_at"].as_u64());
                    assert_eq!(told, (Some(&*session.id), None, Some(session.ends_us)));
                }
                book.count(format!("session told {status}"));
            }
            404 => {
                let fine = !is_maker || by_login || may_be_over;
                assert!(fine, "client {} is told there is no {session:?}", self.number);
            }
            _ => self.refused(status, &String::from_utf8_lossy(body), "", book),
        }
    }
}

// What clients do with it.

impl World {
    /// Time goes on: which sessions are watched meanwhile.
    pub fn note_watchers(&mut self, from_us: u64, to_us: u64) {
        if self.setup.steps == 0 && self.book.direct.names.is_empty() && self.book.direct.sessions.is_empty() {
            return;
        }
        let mut watched = vec![(false, false); self.book.direct.sessions.len()];
        let mut had = [false; TARGETS.len()];
        for client in self.clients.iter().filter(|client| !client.gone) {
            let target = client.held.iter().find(|(_, held)| held.received).and_then(|(name, _)| target_of(name));
            let Some(socket) = self.cores[client.core].sockets.get(&client.socket) else { continue };
            let takes_all = socket.room == u64::MAX && !socket.lost && !socket.finished;
            let has = client.is_open() && !client.said_close && takes_all;
            if let Some(target) = target.filter(|_| has) {
                had[target] = true;
            }
            if let Some(place) = client.ephemeral() {
                watched[place].0 |= has && target == Some(self.book.direct.sessions[place].target);
                watched[place].1 = true;
            }
        }
        self.book.direct.pass_time(from_us, to_us, |place| watched[place], &had);
    }

    fn some_target(&mut self) -> usize {
        // A few in each world, so that some ask the same.
        (self.setup.target + self.dice.below(4) as usize) % TARGETS.len()
    }

    /// Options of a subscription to what a caller has described.
    fn described_terms(&mut self, name: &str, choice: Option<usize>) -> (Held, u64) {
        let format = (*self.dice.pick(&["patch", "merge", "full"])).to_owned();
        let rate_ms = if self.dice.percent(25) { 1 + self.dice.below(3_000) } else { 0 };
        let mut held = Held { format, choice, state: "live".to_owned(), ..Held::default() };
        // Where somebody got to, who may be gone.
        let known = self.book.direct.points.get(&(name.to_owned(), choice)).cloned().unwrap_or_default();
        if !known.is_empty() && self.dice.percent(60) {
            let from: &Held = self.dice.pick(&known);
            (held.epoch, held.seq, held.value) = (from.epoch.clone(), from.seq, from.value.clone());
            held.resumes = true;
        }
        (held, rate_ms)
    }

    fn some_choice(&mut self) -> Option<usize> {
        self.dice.percent(20).then(|| self.dice.below(CHOICES.len() as u64) as usize)
    }

    /// Somebody watches what they have described, or what somebody else has.
    pub fn connect_to_described_or_session(&mut self) {
        if self.live_clients().len() >= self.setup.clients + 12 {
            return;
        }
        if self.dice.percent(45) { self.connect_to_described() } else { self.connect_by_session() }
    }

    /// Somebody describes a stream and watches it.
    fn connect_to_described(&mut self) {
        let kind = *self.dice.pick(&[Kind::Single, Kind::Single, Kind::Events]);
        let core = self.dice.below(self.cores.len() as u64) as usize;
        let login = self.some_login(kind);
        let target = self.some_target();
        let choice = self.some_choice();
        let (held, rate_ms) = self.described_terms(&name_of(target), choice);
        self.open_described(kind, core, login, target, held, rate_ms);
    }

    /// A new client that describes that target; its number.
    pub fn open_described(
        &mut self,
        kind: Kind,
        core: usize,
        login: Login,
        target: usize,
        held: Held,
        rate_ms: u64,
    ) -> Option<usize> {
        let mut client = self.arrive(kind, core, login)?;
        let plain = target < PLAIN && self.dice.percent(50);
        let mut said = TARGETS[target].described(&mut self.dice);
        let (mut query, fields) = self.carried(&client, &client.tokens[0]);
        if plain {
            let _ = write!(query, "&{}", self.direct_query(target, held.choice));
            let _ = write!(query, "&format={}", held.format);
            if held.value.is_some() {
                let _ = write!(query, "&since={}-{}", held.epoch, held.seq);
            }
            if rate_ms > 0 {
                let _ = write!(query, "&max_rate_ms={rate_ms}");
            }
        } else {
            said["format"] = held.format.as_str().into();
            if let Some(choice) = held.choice {
                said["select"] = self.spelled(choice).into();
            }
            if held.value.is_some() {
                said["since"] = format!("{}-{}", held.epoch, held.seq).into();
            }
            if rate_ms > 0 {
                said["max_rate_ms"] = rate_ms.into();
            }
        }
        client.held.insert(name_of(target), held);
        let target = format!("/v1/direct?{}", query.trim_start_matches('&'));
        let upgrade = match kind {
            Kind::Single => World::upgrade(&mut client),
            _ => "Accept: text/event-stream\r\n".to_owned(),
        };
        let (method, body) = match kind {
            Kind::Events if !plain => ("POST", said.to_string()),
            _ => ("GET", String::new()),
        };
        let length = if method == "POST" { format!("Content-Length: {}\r\n", body.len()) } else { String::new() };
        let head = format!("{method} {target} HTTP/1.1\r\nHost: h\r\n{fields}{upgrade}{length}\r\n{body}");
        client.outgoing.extend(head.bytes());
        self.say_who(&mut client);
        if kind == Kind::Single && !plain {
            let start = client.outgoing.len();
            if self.dice.percent(15) {
                // It may be said once more.
                client.send_frame(1, b"{\"type\":\"open\",\"url\":7}");
            }
            said["type"] = "open".into();
            client.send_frame(1, said.to_string().as_bytes());
            client.behind = client.outgoing.split_off(start);
        }
        Some(self.plug_in(client))
    }

    /// A target that is no secret, as it stands in a URL of the server's.
    fn direct_query(&mut self, target: usize, choice: Option<usize>) -> String {
        let mut query = format!("url={}", encoded(&TARGETS[target].spelled_url(&mut self.dice)));
        if let Some(interval_ms) = TARGETS[target].spelled_interval(&mut self.dice) {
            let _ = write!(query, "&interval_ms={interval_ms}");
        }
        if let Some(choice) = choice {
            let _ = write!(query, "&select={}", encoded(self.spelled(choice)));
        }
        query
    }

    /// A client that speaks HTTP does something with streams that are described, or with sessions.
    pub fn describe(&mut self, number: usize) {
        match self.dice.below(10) {
            _ if self.clients[number].ephemeral().is_some() => self.overreach(number),
            0..5 => {
                let (target, choice, dedupe) = (self.some_target(), self.some_choice(), self.dice.below(4));
                let ttl_s = self.dice.percent(60).then(|| 1 + self.dice.below(2 * TTL_MAX_S));
                self.make_session(number, target, choice, Some(dedupe).filter(|name| *name < 3), ttl_s);
            }
            5..8 => {
                let Some(any) = self.some_session_made() else { return };
                let client = &self.clients[number];
                let own = self.book.direct.sessions.iter().rposition(|session| client.is_maker(session));
                let place = own.filter(|_| self.dice.percent(80)).unwrap_or(any);
                let end = self.dice.percent(40);
                self.ask_for_session(number, place, end);
            }
            _ => {
                let (target, choice) = (self.some_target(), self.some_choice());
                self.ask_for_described(number, target, choice, None, None);
            }
        }
    }

    /// A session that was handed out: mostly one that lives, or one of the last.
    fn some_session_made(&mut self) -> Option<usize> {
        let count = self.book.direct.sessions.len();
        let last = count.saturating_sub(20)..count;
        let living: Vec<usize> = last.filter(|&place| !self.book.session_may_be_over(place)).collect();
        if !living.is_empty() && self.dice.percent(70) {
            return Some(*self.dice.pick(&living));
        }
        let from = if self.dice.percent(80) { count.saturating_sub(4) } else { count.saturating_sub(30) };
        (count > 0).then(|| from + self.dice.below((count - from) as u64) as usize)
    }

    fn is_busy(&self, number: usize) -> bool {
        self.clients[number].closed.is_some() || self.clients[number].requests.len() > 2
    }

    /// Sends a request with a body.
    fn post_as(&mut self, number: usize, path: &str, accept: &str, token: &Token, said: &Value) {
        let (query, fields) = self.carried(&self.clients[number], token);
        let (body, and) = (said.to_string(), if query.is_empty() { "" } else { "?" });
        let length = body.len();
        let head = format!(
            "POST {path}{and}{query} HTTP/1.1\r\nHost: h\r\n{fields}{accept}Content-Length: {length}\r\n\r\n{body}"
        );
        self.clients[number].outgoing.extend(head.bytes());
    }

    /// Wishes for a session.
    pub fn make_session(
        &mut self,
        number: usize,
        target: usize,
        choice: Option<usize>,
        dedupe: Option<u64>,
        ttl_s: Option<u64>,
    ) {
        if self.is_busy(number) {
            return;
        }
        let token = self.presented_again(&self.clients[number].tokens[0]);
        let mut said = TARGETS[target].described(&mut self.dice);
        said["ttl_s"] = ttl_s.into();
        said["select"] = choice.map(|choice| self.spelled(choice)).into();
        said["dedupe_key"] = dedupe.map(|name| format!("k{name}")).into();
        self.post_as(number, "/v1/sessions", "", &token, &said);
        let ttl_us = ttl_s.unwrap_or(TTL_MAX_S).min(TTL_MAX_S) * SECOND_US;
        let (asked_us, asked_wall_us) = (self.book.mono_us, self.book.wall_us);
        let wish = Wish { token, target, choice, dedupe, ttl_us, asked_us, asked_wall_us };
        let Client { issuer, sub, .. } = &self.clients[number];
        self.book.direct.unanswered.push((*issuer, sub.clone()));
        self.clients[number].requests.push(Request::Session(Box::new(wish)));
    }

    /// Asks to be told of a session, or to end it.
    pub fn ask_for_session(&mut self, number: usize, place: usize, end: bool) {
        if self.is_busy(number) {
            return;
        }
        let client = &self.clients[number];
        let token = self.presented_again(&client.tokens[0]);
        let (query, fields) = self.carried(client, &token);
        let session = &self.book.direct.sessions[place];
        let is_maker = client.is_maker(session);
        let (method, id) = (if end { "DELETE" } else { "GET" }, &session.id);
        let head = format!("{method} /v1/sessions/{id}?{query} HTTP/1.1\r\nHost: h\r\n{fields}\r\n");
        let by_login = session.maker.session.is_some() || token.session.is_some();
        self.book.direct.sessions[place].end_asked |= end && (is_maker || by_login);
        let client = &mut self.clients[number];
        client.outgoing.extend(head.bytes());
        client.requests.push(Request::Face { place, is_maker, end, sent_us: self.book.mono_us });
    }

    /// Asks for the value of a target.
    pub fn ask_for_described(
        &mut self,
        number: usize,
        target: usize,
        choice: Option<usize>,
        known: Option<Known>,
        wait_s: Option<u64>,
    ) {
        if self.is_busy(number) {
            return;
        }
        let token = self.presented_again(&self.clients[number].tokens[0]);
        let (name, sent_us) = (name_of(target), self.book.mono_us);
        if target >= PLAIN || (known.is_none() && self.dice.percent(50)) {
            let mut said = TARGETS[target].described(&mut self.dice);
            said["select"] = choice.map(|choice| self.spelled(choice)).into();
            let accept = *self.dice.pick(&["", "Accept: application/json\r\n"]);
            self.post_as(number, "/v1/direct", accept, &token, &said);
            let request = Request::Value { name, choice, known: None, token, sent_us };
            return self.clients[number].requests.push(request);
        }
        let query = self.direct_query(target, choice);
        let (own, fields) = self.carried(&self.clients[number], &token);
        let mut head = format!("GET /v1/direct?{query}&{own} HTTP/1.1\r\nHost: h\r\n{fields}");
        if let Some(Known { etag, .. }) = &known {
            let _ = write!(head, "If-None-Match: {etag}\r\n");
        }
        if let Some(wait_s) = wait_s {
            let _ = write!(head, "Prefer: wait={wait_s}\r\n");
        }
        let client = &mut self.clients[number];
        client.outgoing.extend(head.bytes().chain(*b"\r\n"));
        let known = known.map(|known| known.etag);
        client.requests.push(Request::Value { name, choice, known, token, sent_us });
    }

    /// Does with the token of a session what that is not for.
    fn overreach(&mut self, number: usize) {
        if self.is_busy(number) {
            return;
        }
        let token = self.clients[number].tokens[0].clone();
        let said = TARGETS[0].described(&mut self.dice);
        match self.dice.below(4) {
            0 => self.post_as(number, "/v1/tickets", "", &token, &json!({})),
            1 => self.post_as(number, "/v1/direct", "", &token, &said),
            2 => self.post_as(number, "/v1/sessions", "", &token, &said),
            _ => {
                let (query, fields) = self.carried(&self.clients[number], &token);
                let place = self.clients[number].ephemeral().expect("it has the token of a session");
                let id = &self.book.direct.sessions[place].id;
                let head = format!("DELETE /v1/sessions/{id}?{query} HTTP/1.1\r\nHost: h\r\n{fields}\r\n");
                self.clients[number].outgoing.extend(head.bytes());
            }
        }
        self.clients[number].requests.push(Request::Forbidden);
    }

    /// Somebody comes with the token of a session.
    fn connect_by_session(&mut self) {
        let Some(place) = self.some_session_made() else { return };
        let kind = *self.dice.pick(&[Kind::Single, Kind::Single, Kind::Many, Kind::Events, Kind::Json]);
        let core = self.dice.below(self.cores.len() as u64) as usize;
        let session = &self.book.direct.sessions[place];
        let (name, own) = (name_of(session.target), session.choice);
        let choice = own.or_else(|| self.some_choice());
        let (held, rate_ms) = self.described_terms(&name, choice);
        // It is for no other stream.
        let name = if self.dice.percent(90) { name } else { self.stream_name() };
        let held = if target_of(&name).is_some() { held } else { Held { value: None, resumes: false, ..held } };
        self.open_by_session(kind, core, place, &name, held, rate_ms);
    }

    /// A new client with the token of that session; its number.
    pub fn open_by_session(
        &mut self,
        kind: Kind,
        core: usize,
        place: usize,
        name: &str,
        held: Held,
        rate_ms: u64,
    ) -> Option<usize> {
        let login = self.session_login(place);
        self.open_as(kind, core, login, name, held, rate_ms)
    }

    /// Whoever comes with the token of that session. It has an end of its own, and hangs on its maker's session or API key.
    fn session_login(&mut self, place: usize) -> Login {
        let leeway_us = self.book.leeway_us;
        let session = &mut self.book.direct.sessions[place];
        session.presented = true;
        let own_us = session.ends_us - leeway_us;
        let exp_us = if session.maker.key.is_some() { own_us.min(session.maker.exp_us) } else { own_us };
        let token = Token { id: 0, exp_us, has_ended: false, ..session.maker.clone() };
        Login { issuer: session.issuer, sub: session.sub.clone(), token, carrier: Carrier::Ephemeral(place) }
    }

    /// How the server calls that stream, in a path or a message of that client's.
    pub fn wire_name(&self, name: &str) -> String {
        let nobodys = "direct:AAAAAAAAAAAAAAAAAAAAAA";
        match target_of(name) {
            None => name.to_owned(),
            Some(target) => self.book.direct.wire_name(target).unwrap_or(nobodys).to_owned(),
        }
    }

    /// The stream that the token of a client's session is for; now and then another.
    pub fn own_stream(&mut self, number: usize) -> Option<String> {
        let place = self.clients[number].ephemeral()?;
        let name = name_of(self.book.direct.sessions[place].target);
        Some(if self.dice.percent(90) { name } else { self.stream_name() })
    }
}

impl World {
    /// When all are over, the tokens of the last sessions open nothing.
    pub fn check_dead_tokens(&mut self) {
        self.book.store.is_reliable = true;
        let count = self.book.direct.sessions.len();
        let mut asked = Vec::new();
        for place in count.saturating_sub(3)..count {
            let login = self.session_login(place);
            let name = name_of(self.book.direct.sessions[place].target);
            if let Some(number) = self.open_as(Kind::Json, 0, login, &name, Held::default(), 0) {
                self.ask_for_value(number, &name, None, None);
                asked.push(number);
            }
        }
        let before = self.book.tally.clone();
        self.idle(6 * SECOND_US);
        let refusals = |tally: &BTreeMap<String, u64>| -> u64 {
            tally.iter().filter(|(what, _)| what.starts_with("answer 401")).map(|(_, times)| times).sum()
        };
        let refused = refusals(&self.book.tally) - refusals(&before);
        assert_eq!(refused, asked.len() as u64, "a token of what is over opens nothing");
        for number in asked {
            self.end(number, false);
        }
        self.idle(6 * SECOND_US);
    }
}
