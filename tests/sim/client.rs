//! The model of a client: decoders of its own, and everything that one client may rely on.
//!
//! Checked with every frame: it is whole, `welcome` came first, the stream is one it holds, `seq` rises, a delta follows
//! on what is held, the value that results is one its upstream served and the one every other client has at that
//! place, the bytes are those that others got, and it was not started after the credential had ended, whatever ended it;
//! that its rights reach the stream, and that it was told of rights before what comes of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::sync::Arc;

use restcast::auth::api_key::ApiKey;
use restcast::stream::apply;
use serde_json::Value;

use super::direct::{self, Described, SECRET_MARK, Session, Wish, target_of};
use super::law::{ACTION_PERMISSION, LATE_US, Law, Party, Rights, Token, What};
use super::managed::Managed;
use super::store::{Store, Whose};
use super::upstream::Upstream;

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
    /// What was said of users, tokens and sessions.
    pub law: Law,
    /// The store of sessions.
    pub store: Store,
    /// The streams that the administrator makes.
    pub managed: Managed,
    /// What callers have described themselves.
    pub direct: Described,
    pub tickets: Vec<Ticket>,
    /// The API keys that there ever were.
    pub keys: Vec<Arc<ApiKey>>,
    /// How often what is worth checking has happened.
    pub tally: BTreeMap<String, u64>,
    /// The value at each place of each epoch.
    values: HashMap<(String, u64), u64>,
    /// Of which stream each epoch is, and what was selected of it.
    sequences: HashMap<String, (String, Option<usize>)>,
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
            law: Law::default(),
            store: Store::default(),
            tickets: Vec::new(),
            keys: Vec::new(),
            tally: BTreeMap::new(),
            managed: Managed::default(),
            direct: Described::default(),
            values: HashMap::new(),
            sequences: HashMap::new(),
            frames: HashMap::new(),
            payloads: HashMap::new(),
            trace: 0,
            traced: std::env::var("RESTCAST_SIM_CLIENT").ok().and_then(|number| number.parse().ok()),
        }
    }

    /// Something worth checking has happened.
    pub fn count(&mut self, what: impl Into<String>) {
        *self.tally.entry(what.into()).or_default() += 1;
    }

    /// By how much the wall clock is ahead of the monotonic one.
    pub fn offset_us(&self) -> u64 {
        self.wall_us - self.mono_us
    }

    /// Each of the rights that a token may give. `ever`: or may have given.
    fn rights(&self, party: Party<'_>, token: &Token, ever: bool) -> BTreeSet<Rights> {
        match whose(token, party.sub, party.only_asks) {
            Some(whose) if ever => self.store.all_rights(whose).into_iter().collect(),
            Some(whose) => self.store.rights(whose, party.at_us, party.offset_us).into_iter().collect(),
            None => self.law.rights(party, token, ever),
        }
    }

    /// Whether the session that a token is may be over.
    fn may_be_over(&self, token: &Token, user: &str) -> bool {
        whose(token, user, false).is_some_and(|whose| self.store.may_end(whose, self.mono_us, self.offset_us()))
    }
}

/// A ticket that was handed out.
#[derive(Clone, Debug)]
pub struct Ticket {
    pub text: String,
    /// What it was made for.
    pub token: Token,
    pub issuer: Option<&'static str>,
    pub sub: String,
    /// When it was asked for and handed out, on the monotonic clock.
    pub asked_us: u64,
    pub made_us: u64,
    /// How often it was presented, and by which client successfully.
    pub presented: u32,
    pub used_by: Option<usize>,
}

/// How long a ticket is good.
const TICKET_US: u64 = 30_000_000;

/// Streams that a reload takes away, or configures anew.
const RELOADED: [&str; 2] = ["keyed", "fast"];

impl Book {
    /// Whether a reload may have taken a subscription to that stream away, for whatever reason.
    fn may_lose(&self, name: &str) -> bool {
        let described = self.reloaded && target_of(name).is_some();
        (self.reloaded && RELOADED.contains(&name))
            || described
            || self.may_be_blocked(name)
            || self.managed.may_lose(name)
    }

    /// Whether what a caller has described may be blocked.
    fn may_be_blocked(&self, name: &str) -> bool {
        direct::may_be_blocked(name, self.reloaded)
    }

    /// Whether that ephemeral session may have ended.
    pub fn session_may_be_over(&self, place: usize) -> bool {
        let session = &self.direct.sessions[place];
        let Session { issuer, sub, maker, asked_us, .. } = session;
        let party = Party {
            issuer: *issuer,
            sub,
            only_asks: false,
            core: 0,
            welcomed_after: None,
            at_us: self.mono_us,
            offset_us: self.offset_us(),
            heard: u64::MAX,
        };
        let by_time = self.wall_us >= session.ends_us || self.mono_us >= asked_us + session.ttl_us;
        let by_maker = self.law.may_refuse(party, std::slice::from_ref(maker)) || self.may_be_over(maker, sub);
        let by_key = maker.key.is_some() && (maker.has_ended || self.wall_us >= maker.exp_us + self.leeway_us);
        session.end_asked || session.may_have_lapsed || self.store.was_set || by_time || by_maker || by_key
    }

    /// What the model calls the stream that the server calls so, which the client holds who is told of it.
    fn model_name(&mut self, stream: &str, held: &BTreeMap<String, Held>) -> String {
        if !stream.starts_with("direct:") {
            return stream.to_owned();
        }
        if let Some(name) = self.direct.model_name(stream) {
            return name;
        }
        let described: Vec<usize> = held.keys().filter_map(|name| target_of(name)).collect();
        let [target] = *described else { panic!("{stream} is told of to one who has described {described:?}") };
        self.direct.learn(target, stream);
        direct::name_of(target)
    }

    /// Whether a reload may have taken that stream away.
    fn may_be_reloaded(&self, name: &str) -> bool {
        self.reloaded && name == RELOADED[0]
    }

    /// Whether a ticket may be refused now: it may be too old, or another's.
    pub fn may_refuse_ticket(&self, place: usize) -> bool {
        let ticket = &self.tickets[place];
        // Its end is told by the wall clock as well.
        ticket.presented > 1 || self.store.was_set || self.mono_us >= ticket.asked_us + TICKET_US
    }

    /// The ticket was good: nobody else's use of it may have been.
    fn use_ticket(&mut self, place: usize, client: usize) {
        let ticket = &mut self.tickets[place];
        let earlier = ticket.used_by.replace(client);
        assert_eq!(earlier, None, "client {client} was let in by a ticket that was used");
    }
}

/// How a client says who it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Carrier {
    /// A token in `Authorization`, in the query, or in its cookie.
    Header,
    Query,
    Cookie,
    /// A token in the first message.
    FirstMessage,
    /// The application's cookie.
    Session,
    /// The same beside a token that is none.
    Hybrid,
    /// A ticket, by its place in the book.
    Ticket(usize),
    /// An API key.
    Key,
    /// The token of an ephemeral session, by its place in the book.
    Ephemeral(usize),
}

/// Who a client is.
#[derive(Clone, Debug)]
pub struct Login {
    pub issuer: Option<&'static str>,
    pub sub: String,
    pub token: Token,
    pub carrier: Carrier,
}

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
    /// What of it was selected, of [`CHOICES`]; `None`: all.
    pub choice: Option<usize>,
    pub epoch: String,
    pub seq: u64,
    pub value: Option<Vec<u8>>,
    /// As last told; `live` where nothing was.
    pub state: String,
    /// Whether it asked to go on from there and has got nothing yet.
    pub resumes: bool,
    /// Whether its epoch is one of which it has got an event, and the epochs before of which it had.
    pub received: bool,
    pub past: BTreeSet<String>,
}

/// What a numbered message of a client asked for.
#[derive(Clone, Debug)]
pub enum Asked {
    Subscribe {
        name: String,
        held: Held,
    },
    Unsubscribe {
        name: String,
    },
    /// `auth_update`, perhaps by a ticket.
    Renew {
        ticket: Option<usize>,
    },
    /// The same without a token: my session is to be read.
    Reread,
    RenewBadly,
    /// An action; how many times it was carried out.
    Act {
        begun: u32,
    },
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
    pub issuer: Option<&'static str>,
    pub sub: String,
    pub carrier: Carrier,
    /// The token in force, then those of renewals that have not been answered.
    pub tokens: Vec<Token>,
    /// Those of an event stream that have been renewed since: some of what it gets may be from before.
    past: Vec<Token>,
    /// The rights that it was told of last, where that was since its last token.
    told: Option<Rights>,
    /// The rights it may have got with its last token, and how many things had been said then.
    granted: BTreeSet<Rights>,
    granted_after: usize,
    /// How many things had been said when it was welcomed.
    welcomed_after: Option<usize>,
    /// Whether it has lost a stream to its rights.
    lost_rights: bool,
    /// When its request was sent, on both clocks, and how many things had been said then.
    pub sent_us: u64,
    pub sent_wall_us: u64,
    pub sent_after: usize,
    /// Since when none of them is good.
    pub expired: Option<Expired>,
    pub ever_stalled: bool,
    /// Answers no pings.
    pub mute: bool,
    pub renewals_refused: u32,
    pub renewals_accepted: u32,
    /// Whether a renewal over HTTP has not been answered.
    pub renewing: bool,
    pub outgoing: Vec<u8>,
    /// What it says when it has been let in.
    pub behind: Vec<u8>,
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
    pub etag: Option<Known>,
    pub answers: u64,
    /// Renewals over HTTP that were answered: for which client, which of its tokens, how.
    pub confirmed: Vec<(usize, u64, u16)>,
    upgraded: bool,
    buffer: Vec<u8>,
    late: bool,
    /// When what comes now began to come, on the monotonic clock, how much had been heard then, and by how much the wall clock
    /// was ahead.
    started: (u64, u64, u64),
}

/// A value that was answered.
#[derive(Clone, Debug)]
pub struct Known {
    pub name: String,
    pub choice: Option<usize>,
    pub etag: String,
}

/// An HTTP request that has been sent.
#[derive(Clone, Debug)]
pub enum Request {
    Value {
        name: String,
        choice: Option<usize>,
        known: Option<String>,
        token: Token,
        sent_us: u64,
    },
    Renewal {
        of: usize,
        id: u64,
    },
    Ticket {
        token: Token,
        asked_us: u64,
    },
    /// An ephemeral session.
    Session(Box<Wish>),
    /// To be told of an ephemeral session, or to end it, by its maker or by somebody else.
    Face {
        place: usize,
        is_maker: bool,
        end: bool,
        sent_us: u64,
    },
    /// What nobody may who has no more than the token of an ephemeral session.
    Forbidden,
}

impl Client {
    pub fn new(number: usize, kind: Kind, core: usize, socket: u32, login: Login) -> Client {
        let Login { issuer, sub, token, carrier } = login;
        Client {
            number,
            kind,
            core,
            socket,
            issuer,
            sub,
            carrier,
            tokens: vec![token],
            past: Vec::new(),
            told: None,
            granted: BTreeSet::new(),
            granted_after: 0,
            welcomed_after: None,
            lost_rights: false,
            sent_us: 0,
            sent_wall_us: 0,
            sent_after: 0,
            expired: None,
            ever_stalled: false,
            mute: false,
            renewals_refused: 0,
            renewals_accepted: 0,
            renewing: false,
            outgoing: Vec::new(),
            behind: Vec::new(),
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
            started: (0, 0, 0),
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
    }

    /// Whether a token that may be the one in force has ended.
    pub fn may_have_expired(&self) -> bool {
        self.tokens.iter().any(|token| token.has_ended)
    }

    /// As the law knows it.
    pub fn party(&self) -> Party<'_> {
        let Client { issuer, sub, core, welcomed_after, started: (at_us, heard, offset_us), .. } = self;
        let only_asks = self.kind == Kind::Json;
        let (at_us, offset_us, heard) = (*at_us, *offset_us, *heard);
        Party { issuer: *issuer, sub, only_asks, core: *core, welcomed_after: *welcomed_after, at_us, offset_us, heard }
    }

    /// The same, with all that was heard until now.
    pub fn party_now(&self, book: &Book) -> Party<'_> {
        Party { at_us: book.mono_us, offset_us: book.offset_us(), heard: u64::MAX, ..self.party() }
    }

    /// The companies whose values it may get.
    pub fn companies(&self, book: &Book) -> BTreeSet<u64> {
        let tokens = self.tokens.iter().chain(&self.past);
        tokens
            .flat_map(|token| match whose(token, &self.sub, self.kind == Kind::Json) {
                Some(whose) => book.store.companies(whose, self.started.0, self.started.2),
                // An API key makes no claims.
                None if token.key.is_some() => Vec::new(),
                None => vec![token.company],
            })
            .collect()
    }

    /// Each of the rights that it may have. `ever`: or may have had.
    pub fn rights(&self, book: &Book, ever: bool) -> BTreeSet<Rights> {
        let tokens = self.tokens.iter().chain(&self.past);
        tokens.flat_map(|token| book.rights(self.party(), token, ever)).collect()
    }

    /// Whether a frame of that stream may begin.
    fn may_reach(&self, name: &str, book: &Book) -> bool {
        Rights::default().reach(name) || self.rights(book, false).iter().any(|rights| rights.reach(name))
    }

    /// The ephemeral session that its token is of.
    pub fn ephemeral(&self) -> Option<usize> {
        match self.carrier {
            Carrier::Ephemeral(place) => Some(place),
            _ => None,
        }
    }

    /// Whether what it presents is not for that stream.
    fn is_for_another(&self, name: &str, book: &Book) -> bool {
        self.ephemeral().is_some_and(|place| direct::name_of(book.direct.sessions[place].target) != name)
    }

    /// Whether the ephemeral session that it has a token of may have ended.
    pub fn session_may_be_over(&self, book: &Book) -> bool {
        self.ephemeral().is_some_and(|place| book.session_may_be_over(place))
    }

    /// Since when the ephemeral session that it has a token of was ended by its maker.
    fn session_ended_at(&self, book: &Book) -> Option<u64> {
        self.ephemeral().and_then(|place| book.direct.sessions[place].ended_us)
    }

    /// It is let in, or given a value, by the token of an ephemeral session that it presented then: that it could be.
    fn check_session(&self, sent_us: u64, sent_wall_us: u64, sent_after: usize, book: &Book) {
        let Some(place) = self.ephemeral() else { return };
        let session = &book.direct.sessions[place];
        let wall_us = sent_wall_us.min(book.wall_us);
        let over = session.is_over(sent_us, wall_us, book.direct.shared);
        assert!(!over, "client {} was let in by what is over: {session:?} at {}", self.number, book.mono_us);
        let now = Token { sent_after, ..self.tokens[0].clone() };
        let refused = book.law.refuses(self.party(), &now);
        assert!(!refused, "client {} was let in in spite of a mark: {session:?}", self.number);
        // A session does not outlive the logout of its maker, also where that signs in again.
        let from = session.made_after.min(sent_after);
        let out = book.law.said[from..sent_after].iter().any(|saying| {
            matches!(&saying.what, What::LoggedOut(user) if self.party().is(user) && saying.first_said >= from)
        });
        let out = out && session.maker.session.is_some() && book.law.set_back_us == 0;
        assert!(!out, "client {} was let in in spite of its maker's logout: {session:?}", self.number);
    }

    /// Whether it may have been let in to that stream.
    pub fn may_have_reached(&self, name: &str, book: &Book) -> bool {
        if self.is_for_another(name, book) {
            return false;
        }
        Rights::default().reach(name) || self.rights(book, true).iter().any(|rights| rights.reach(name))
    }

    /// Whether it may have been kept from that stream.
    fn may_not_reach(&self, name: &str, book: &Book) -> bool {
        !Rights::default().reach(name) && self.rights(book, true).iter().any(|rights| !rights.reach(name))
    }

    /// Whether what it presents may be refused, for whatever it is.
    fn may_be_refused(&self, book: &Book) -> bool {
        self.may_have_expired()
            || book.law.may_refuse(self.party(), &self.tokens)
            || self.tokens.iter().any(|token| book.may_be_over(token, &self.sub))
    }

    /// Since when its credential has ended otherwise than by its time: revoked, logged out, its session gone.
    fn ended_at(&self, party: Party<'_>, book: &Book) -> Option<u64> {
        let over = |token: &Token| {
            let whose = whose(token, &self.sub, self.kind == Kind::Json);
            whose.is_some_and(|whose| !book.store.may_live(whose, book.mono_us, book.offset_us()))
        };
        if self.tokens.iter().all(over) {
            return Some(book.mono_us);
        }
        book.law.ended_at(party, &self.tokens)
    }

    /// The same, by all that was heard until now.
    pub fn ended_by_now(&self, book: &Book) -> Option<u64> {
        let by_session = self.session_ended_at(book);
        self.ended_at(self.party_now(book), book).into_iter().chain(by_session).min()
    }

    /// Whether it waits for an answer that should have come, for its credential has ended.
    pub fn waits_too_long(&self, book: &Book) -> bool {
        // Whoever holds a session may have to be asked first.
        let by_store = self.tokens[0].session.is_some() || self.ephemeral().is_some() && book.direct.shared;
        let Some(Request::Value { token, .. }) = self.requests.first().filter(|_| !by_store) else { return false };
        let ended = book.law.ended_at(self.party_now(book), std::slice::from_ref(token));
        ended.is_some_and(|at| book.mono_us > at + LATE_US)
    }

    /// It is under a new token: what it is told of its rights counts from now on.
    fn is_granted(&mut self, book: &Book) {
        self.told = None;
        self.granted = self.rights(book, false);
        self.granted_after = book.law.said.len();
    }

    /// All that there is to know of its credential, for whoever reads of a failure.
    fn shown(&self, book: &Book) -> String {
        let sessions: Vec<_> = self.tokens.iter().filter_map(|token| token.session.as_ref()).collect();
        let sessions: Vec<_> = sessions.into_iter().map(|sid| &book.store.sessions[sid]).collect();
        let Client { number, kind, core, issuer, sub, carrier, tokens, past, told, sent_us, expired, .. } = self;
        format!(
            "client {number} ({kind:?} on {core}, {issuer:?} {sub}, {carrier:?} at {sent_us}, {tokens:?}, before {past:?}, \
             expired {expired:?}, ended {:?}, told {told:?}, {sessions:?}, {} said) at {} ({})",
            self.ended_at(self.party(), book),
            book.law.shown(self.party()),
            book.mono_us,
            book.wall_us
        )
    }

    /// The renewal `id` was accepted: no earlier token counts any more.
    pub fn renewed(&mut self, id: u64, book: &Book) {
        self.renewals_accepted += 1;
        self.renewals_refused = 0;
        // Which frames of an event stream came before its renewal cannot be told from outside: its values may be the old
        // token's, not its life.
        let kept = self.tokens.iter().position(|token| token.id == id).expect("a renewal brought a token");
        // Whoever is moved away and back again begins anew.
        for (_, own) in self.held.iter_mut().filter(|(name, _)| kept > 0 && is_shaped(name)) {
            own.resumes = true;
        }
        let before = self.tokens.drain(..kept);
        if self.kind == Kind::Events {
            self.past.extend(before);
        } else {
            drop(before);
        }
        self.is_granted(book);
    }

    /// A renewal over HTTP was answered so: whether it may have been.
    pub fn check_renewal(&self, id: u64, status: u16, book: &Book) {
        let token = self.tokens.iter().find(|token| token.id == id).expect("a renewal brought a token");
        let fine = match status {
            200 => !book.law.refuses(self.party_now(book), token),
            401 => token.has_ended || book.law.may_refuse(self.party_now(book), std::slice::from_ref(token)),
            // It may have ended and not know it yet.
            404 => !self.is_open() || self.ever_stalled || self.may_be_refused(book) || self.may_lose_all(book),
            503 => true,
            _ => false,
        };
        assert!(fine, "client {}: {token:?} was answered {status}", self.number);
    }

    /// The renewal `id` was refused.
    pub fn not_renewed(&mut self, id: u64) {
        self.tokens.retain(|token| token.id != id);
    }

    /// Whether a stream frame that starts now is later than it may be.
    fn is_late(&self, book: &Book) -> bool {
        self.expired.is_some_and(|expired| expired.stepped || book.mono_us > expired.at_us + LATE_US)
            || (self.kind != Kind::Json && self.ended_at(self.party(), book).is_some())
            || self.session_ended_at(book).is_some_and(|at| book.mono_us > at + LATE_US)
    }

    /// Whether a waiting answer that starts now is later than it may be.
    fn is_late_for(&self, token: &Token, book: &Book) -> bool {
        // What was answered before the core heard may leave in the turn in which it has.
        let ended = book.law.ended_at(self.party(), std::slice::from_ref(token));
        ended.is_some_and(|at| at < book.mono_us)
    }

    /// What must be true of the rights it has been told of by now, as long as its socket takes everything.
    pub fn check_rights(&self, book: &Book) {
        let [token] = &*self.tokens else { return };
        let heard = book.mono_us.saturating_sub(LATE_US);
        let rights = match whose(token, &self.sub, false) {
            Some(whose) => book.store.settled(whose, book.mono_us).map(|version| version.rights.clone()),
            None if !book.law.changes_rights_of(self.party_now(book)) => return,
            None if !book.law.is_heard(self.core, heard) => None,
            None => {
                let rights = book.law.rights(self.party_now(book), token, false);
                assert_eq!(rights.len(), 1, "what everybody has heard of is certain");
                rights.into_iter().next()
            }
        };
        let Some(rights) = rights else { return };
        let knows = match &self.told {
            // An event stream may read late what was written under the token before.
            Some(told) => {
                *told == rights
                    || self.past.iter().any(|token| book.rights(self.party_now(book), token, true).contains(told))
            }
            None => self.granted.contains(&rights),
        };
        let Client { number, granted, .. } = self;
        assert!(knows, "{} has {rights:?}, granted {granted:?}", self.shown(book));
        if self.past.is_empty() {
            for name in self.held.keys() {
                assert!(rights.reach(name), "client {number} still holds {name} with {rights:?} at {}", book.mono_us);
            }
        }
    }

    /// Bytes from the server.
    pub fn receive(&mut self, bytes: &[u8], book: &mut Book) {
        assert!(!self.gone, "client {} got bytes after its socket was closed", self.number);
        if self.buffer.is_empty() {
            self.started = (book.mono_us, book.law.heard, book.offset_us());
            self.late = self.is_late(book);
        }
        self.buffer.extend_from_slice(bytes);
        let buffer = std::mem::take(&mut self.buffer);
        let mut rest: &[u8] = &buffer;
        while !rest.is_empty() {
            let Some(used) = self.unit(rest, book) else { break };
            rest = &rest[used..];
            self.started = (book.mono_us, book.law.heard, book.offset_us());
            self.late = self.is_late(book);
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
        check_no_secret(bytes);
        if status == 101 || status == 200 {
            self.upgraded = true;
            self.outgoing.append(&mut self.behind);
            let first_message = self.carrier == Carrier::FirstMessage;
            for name in self.held.keys().filter(|_| !first_message) {
                assert!(self.may_have_reached(name, book), "client {} was let in to {name}", self.number);
                let exists = book.managed.may_be_there(name, self.core, self.sent_us);
                assert!(exists, "client {} was let in to {name}, which there is not", self.number);
            }
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
        let name = self.held.keys().next().cloned().unwrap_or_default();
        self.refused(status, &text_of(&bytes[end..end + length]), &name, book);
        self.closed = Some(status);
        self.held.clear();
        Some(end + length)
    }

    pub fn refused(&self, status: u16, body: &str, name: &str, book: &mut Book) {
        if book.traced == Some(self.number) {
            eprintln!("{} client {} <- {status} {body}", book.mono_us, self.number);
        }
        let problem: Value = serde_json::from_str(body).unwrap_or_default();
        let party = self.party();
        book.count(format!("answer {status} {}", problem["code"].as_str().unwrap_or_default()));
        let fine = match (status, problem["code"].as_str().unwrap_or_default()) {
            (401, "TOKEN_EXPIRED") => self.may_have_expired(),
            (401, "LOGGED_OUT") => book.law.may_end(party, &self.tokens, "logged_out"),
            (401, "TOKEN_REVOKED") => {
                book.law.may_end(party, &self.tokens, "token_revoked") || self.key_may_be_gone(book)
            }
            (401, "SESSION_EXPIRED") => self.tokens.iter().any(|token| book.may_be_over(token, &self.sub)),
            (401, "INVALID_TOKEN") => {
                self.ticket_may_be_refused(book) || self.key_may_be_gone(book) || self.session_may_be_over(book)
            }
            (403, "INSUFFICIENT_PERMISSIONS") => self.may_not_reach(name, book),
            (403, "FORBIDDEN") => self.is_for_another(name, book),
            (403, "TARGET_BLOCKED") => {
                let proved = target_of(name).is_some_and(|target| book.direct.proved_blocked[target]);
                let own = self.ephemeral().map(|place| direct::name_of(book.direct.sessions[place].target));
                proved || book.may_be_blocked(name) || own.is_some_and(|name| book.may_be_blocked(&name))
            }
            (404, "STREAM_ENDED" | "STREAM_NOT_FOUND") if self.session_may_be_over(book) => true,
            (403, "CLAIM_MISSING") => self.carrier == Carrier::Key && name == "own",
            (404, "STREAM_ENDED") => book.managed.may_have_ended(name, self.core) || book.may_be_reloaded(name),
            (404, "STREAM_NOT_FOUND") => book.managed.may_be_missing(name, self.core) || book.may_be_reloaded(name),
            (503 | 429 | 408, _) => true,
            _ => false,
        };
        assert!(fine, "{} was answered {status} {body}", self.shown(book));
    }

    /// Whether the API key that it has may have been deleted.
    fn key_may_be_gone(&self, book: &Book) -> bool {
        self.tokens.iter().any(|token| token.key.is_some_and(|key| book.law.has_deleted(key, None)))
    }

    /// Whether the ticket that it presents may be good no longer.
    fn ticket_may_be_refused(&self, book: &Book) -> bool {
        matches!(self.carrier, Carrier::Ticket(place) if book.may_refuse_ticket(place))
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
        check_no_secret(&bytes[..end + length]);
        self.answers += 1;
        assert!(!self.requests.is_empty() || status == 408, "client {} got an answer to nothing: {head}", self.number);
        if self.requests.is_empty() {
            self.closed = Some(status);
            return Some(end + length);
        }
        match self.requests.remove(0) {
            Request::Value { name, choice, known, token, sent_us } => {
                let (sent_wall_us, sent_after) = (token.sent_wall_us, token.sent_after);
                book.trace = hash((book.trace, status, body));
                let etag = header(&head, "ETag").unwrap_or_default();
                if matches!(status, 200 | 304) {
                    let number = self.number;
                    assert!(!book.law.refuses(self.party(), &token), "client {number} was answered in spite of a mark");
                    let late = self.is_late_for(&token, book) && !self.ever_stalled;
                    assert!(!late, "client {number} was answered after its credential's end");
                    let reaches = self.may_reach(&name, book) || self.ever_stalled;
                    assert!(reaches, "client {number} was answered {name}");
                    let exists = book.managed.may_be_there(&name, self.core, sent_us);
                    assert!(exists, "client {number} was answered {name}, which there is not");
                    assert!(
                        !self.is_for_another(&name, book),
                        "client {number} was answered {name}, which is another's"
                    );
                    self.check_session(sent_us, sent_wall_us, sent_after, book);
                }
                match status {
                    200 => {
                        // What was answered in time may be read late.
                        let late = self.late && !self.ever_stalled;
                        assert!(!late, "client {} got a value after its credential's end", self.number);
                        self.check_value(&name, choice, sent_us, body, book);
                        let (epoch, seq) = etag.trim_matches('"').split_once('-').expect("an ETag is epoch-seq");
                        check_place(book, epoch, seq.parse().expect("a number"), (&name, choice), body);
                        self.etag = Some(Known { name, choice, etag });
                    }
                    304 => assert_eq!(Some(etag), known, "client {} was told its value is the newest", self.number),
                    _ => self.refused(status, &text_of(body), &name, book),
                }
            }
            Request::Renewal { of, id } => match status {
                200 | 401 | 403 | 404 | 503 => self.confirmed.push((of, id, status)),
                _ => panic!("client {} got {status} to a renewal: {}", self.number, text_of(body)),
            },
            Request::Ticket { token, asked_us } if status == 201 => {
                let number = self.number;
                let refused = book.law.refuses(self.party(), &token);
                assert!(!refused, "client {number} got a ticket in spite of a mark: {token:?} {}", self.shown(book));
                let answer: Value = serde_json::from_slice(body).expect("a ticket is handed out as JSON");
                assert_eq!(answer["expires_in_s"].as_u64(), Some(30));
                let text = answer["ticket"].as_str().expect("a ticket has its text").to_owned();
                assert!(!book.tickets.iter().any(|other| other.text == text), "no ticket is handed out twice");
                let Client { issuer, sub, .. } = self;
                let (issuer, sub, made_us) = (*issuer, sub.clone(), book.mono_us);
                let (presented, used_by) = (0, None);
                book.tickets.push(Ticket { text, token, issuer, sub, asked_us, made_us, presented, used_by });
            }
            Request::Ticket { .. } => self.refused(status, &text_of(body), "", book),
            Request::Session(wish) => self.session_answered(status, body, *wish, book),
            Request::Face { place, is_maker, end, sent_us } => {
                self.face_answered(status, body, (place, is_maker, end), sent_us, book);
            }
            Request::Forbidden => {
                let code = serde_json::from_slice::<Value>(body).expect("a problem")["code"].clone();
                book.count(format!("session token {status} {}", code.as_str().unwrap_or_default()));
                let fine = match (status, code.as_str().unwrap_or_default()) {
                    (403, "FORBIDDEN") => true,
                    (403 | 404 | 503, "ORIGIN_NOT_ALLOWED" | "NOT_FOUND" | "SESSION_STORE_UNAVAILABLE") => true,
                    (401, _) => self.session_may_be_over(book) || self.may_be_refused(book),
                    (429 | 408, _) => true,
                    _ => false,
                };
                assert!(fine, "client {} was answered {status} {}", self.number, text_of(body));
            }
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
        book.count(format!("close {code} {reason}"));
        if self.ephemeral().is_some() {
            book.count(format!("session closed {code} {reason}"));
        } else if self.held.keys().any(|name| target_of(name).is_some()) {
            book.count(format!("described closed {code} {reason}"));
        }
        let fine = match (code, reason) {
            (4001, "token_expired") => {
                self.carrier != Carrier::Key && self.ephemeral().is_none() && self.may_have_expired()
            }
            (4001, "session_expired") => self.tokens.iter().any(|token| book.may_be_over(token, &self.sub)),
            (4001, "invalid_token") => {
                self.carrier == Carrier::FirstMessage && !self.welcomed && self.may_be_refused(book)
            }
            // Of an event stream's renewals the last may not have been answered yet.
            (4001, "auth_update_rejected") => self.renewals_refused + u32::from(self.renewing) >= 5,
            (4001, "api_key_expired") => {
                let of_key = self.carrier == Carrier::Key || self.ephemeral().is_some();
                of_key && self.tokens[0].key.is_some() && self.may_have_expired()
            }
            (4010, "logged_out" | "token_revoked" | "api_key_revoked") => {
                book.law.may_end(self.party(), &self.tokens, reason)
            }
            (4003, "forbidden") => self.may_lose_all(book),
            (4004, "stream_ended") if self.session_may_be_over(book) => {
                self.held.values().all(|own| own.state == "ended") || !self.welcomed
            }
            (4004, "stream_ended" | "not_found") => {
                // Who watches is told first; who is about to be let in has nothing to be told of.
                let told = self.held.values().all(|own| own.state == "ended" || reason == "not_found");
                (told || !self.welcomed)
                    && self
                        .held
                        .keys()
                        .all(|name| book.may_be_reloaded(name) || book.managed.may_be_missing(name, self.core))
            }
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

    /// Whether its rights may leave it nothing of what it holds, or asked for when it opened.
    fn may_lose_all(&self, book: &Book) -> bool {
        match self.kind {
            Kind::Many => self.held.is_empty() && self.lost_rights,
            _ => self.held.keys().all(|name| self.may_not_reach(name, book) || book.may_lose(name)),
        }
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
        let shown = || text_of(&text[..text.len().min(120)]);
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
        let stream = book.model_name(head["stream"].as_str().unwrap_or_default(), &self.held);
        check_no_secret(text);
        let about = match own_kind {
            "unsubscribed" => head["reason"].as_str(),
            "error" => head["code"].as_str(),
            "welcome" => head["auth"]["type"].as_str(),
            _ => None,
        };
        book.count(format!("{own_kind} {}", about.unwrap_or_default()));
        match own_kind {
            "welcome" => {
                self.welcomed = true;
                self.connection = head["connection"].as_str().map(str::to_owned);
                self.check_welcome(&head, book);
            }
            "snapshot" | "patch" | "merge" => {
                let closed =
                    target_of(&stream).is_some_and(|target| book.direct.is_closed(target, self.core, self.started.0));
                assert!(!closed || self.ever_stalled, "client {} got what nobody may name: {}", self.number, shown());
                assert!(!self.late, "{} got a frame started after its credential's end: {}", self.shown(book), shown());
                assert!(
                    self.may_reach(&stream, book),
                    "{} got a frame of a stream that its rights do not reach: {}",
                    self.shown(book),
                    shown()
                );
                if let Some(told) = &self.told {
                    assert!(told.reach(&stream), "client {} was told it does not reach it: {}", self.number, shown());
                }
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
                assert!(self.may_have_reached(&name, book), "client {} was let in to {name}", self.number);
                let held = Held { state: "live".to_owned(), ..held };
                assert!(self.held.insert(stream, held).is_none(), "a stream is held once");
            }
            "unsubscribed" => {
                let reason = head["reason"].as_str().unwrap_or_default();
                match id.and_then(|id| self.asked.remove(&id)) {
                    Some(Asked::Unsubscribe { name }) => assert_eq!((name, reason), (stream.clone(), "requested")),
                    None => {
                        // Whoever loses rights while connected is told of them first.
                        let told = self.told.as_ref();
                        let by_told =
                            told.map_or_else(|| self.may_not_reach(&stream, book), |told| !told.reach(&stream));
                        let by_rights = reason == "forbidden" && by_told;
                        let may = match reason {
                            "stream_ended" => {
                                let told = self.held.get(&stream).is_some_and(|own| own.state == "ended");
                                let gone = book.managed.may_have_ended(&stream, self.core);
                                told && (gone || book.may_be_reloaded(&stream))
                            }
                            _ => book.may_lose(&stream) || by_rights,
                        };
                        assert!(may, "client {} lost {stream}, told {told:?}: {}", self.number, shown());
                        self.lost_rights |= reason == "forbidden";
                    }
                    other => panic!("{other:?} was answered {}", shown()),
                }
                assert!(self.held.remove(&stream).is_some(), "what was not held ends: {}", shown());
            }
            "auth_ok" => {
                let id = id.expect("an id is echoed");
                let asked = self.asked.remove(&id);
                match asked {
                    Some(Asked::Renew { ticket }) => {
                        let token = self.tokens.iter().find(|token| token.id == id);
                        let token = token.unwrap_or_else(|| panic!("{}: {}", self.shown(book), shown()));
                        let refused = book.law.refuses(self.party(), token);
                        assert!(!refused, "client {} was renewed in spite of a mark: {}", self.number, shown());
                        if let Some(place) = ticket {
                            book.use_ticket(place, self.number);
                        }
                        self.renewed(id, book);
                    }
                    Some(Asked::Reread) => {
                        self.renewals_refused = 0;
                        self.is_granted(book);
                        for (_, own) in self.held.iter_mut().filter(|(name, _)| is_shaped(name)) {
                            own.resumes = true;
                        }
                    }
                    other => panic!("client {}: {other:?} was answered {}", self.number, shown()),
                }
                let told = texts(&head["permissions"]);
                let lawful = self.rights(book, true);
                let fine = lawful.iter().any(|rights| rights.permissions == told);
                assert!(fine, "client {} has {lawful:?}, not {}", self.number, shown());
            }
            "permission_update" => {
                let told = Rights { roles: texts(&head["roles"]), permissions: texts(&head["permissions"]) };
                let lawful = self.rights(book, true);
                assert!(lawful.contains(&told), "client {} has {lawful:?}, not {}", self.number, shown());
                self.told = Some(told);
                for (_, own) in self.held.iter_mut().filter(|(name, _)| is_shaped(name)) {
                    own.resumes = true;
                }
            }
            "reauthenticate" => assert!(head["expires_at"].is_u64() && head["expires_in_ms"].is_u64(), "{}", shown()),
            "error" => self.told_error(&head, id, &stream, book),
            "action_result" => {
                let asked = id.and_then(|id| self.asked.remove(&id));
                assert!(matches!(asked, Some(Asked::Act { begun: 1 })), "{asked:?} was answered {}", shown());
                let late = self.late && !self.ever_stalled;
                assert!(!late, "client {} is told of its action after its credential's end", self.number);
                book.count("action_result");
            }
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

    /// A welcome comes to who was let in: that it could be.
    fn check_welcome(&mut self, head: &Value, book: &mut Book) {
        let kind = match self.carrier {
            Carrier::Ticket(_) => "ticket",
            Carrier::Session | Carrier::Hybrid => "session",
            Carrier::Key => "api_key",
            Carrier::Ephemeral(_) => "ticket",
            _ => "jwt",
        };
        assert_eq!(head["auth"]["type"].as_str(), Some(kind), "client {}", self.number);
        let sub = head["auth"]["sub"].as_str().expect("everybody has a name");
        if sub != self.sub {
            // Whoever is signed in when the record is read, that is it.
            let whose = whose(&self.tokens[0], sub, false).filter(|whose| book.store.was_of(*whose));
            assert!(whose.is_some(), "client {} is welcomed as {sub}: {}", self.number, self.sub);
            self.sub = sub.to_owned();
            self.late = self.is_late(book);
        }
        let refused = book.law.refuses(self.party(), &self.tokens[0]);
        assert!(!refused, "client {} was let in in spite of a mark: {:?}", self.number, self.tokens);
        let late = self.late && !self.ever_stalled;
        assert!(!late, "{} was let in after its credential's end", self.shown(book));
        if let Carrier::Ticket(place) = self.carrier {
            book.use_ticket(place, self.number);
            let ticket = &book.tickets[place];
            let in_time = self.sent_us <= ticket.made_us + TICKET_US;
            assert!(in_time, "client {} was let in by a ticket that was too old", self.number);
        }
        self.check_session(self.sent_us, self.sent_wall_us, self.sent_after, book);
        if let Some(place) = self.ephemeral() {
            let expires_us = head["auth"]["expires_at"].as_u64();
            let ends_us = book.direct.sessions[place].ends_us;
            assert!(expires_us.is_some_and(|at| at <= ends_us), "client {} is told {expires_us:?}", self.number);
        }
        self.welcomed_after = Some(book.law.said.len());
        self.is_granted(book);
    }

    /// An action that it asked for is carried out: it must have the right to it now, and a credential.
    pub fn check_act(&mut self, id: u64, book: &Book) {
        let shown = self.shown(book);
        let may_act_at_all = self.carrier != Carrier::Key && self.ephemeral().is_none();
        assert!(self.is_open() && self.welcomed && may_act_at_all, "{shown} acts");
        let party = self.party_now(book);
        let ended = self.ended_at(party, book);
        assert!(ended.is_none() && self.expired.is_none(), "{shown} acts after its credential's end");
        let tokens = self.tokens.iter().chain(&self.past);
        let may = tokens.flat_map(|token| book.rights(party, token, false)).any(|rights| may_act(&rights));
        assert!(may, "{shown} acts without the right to");
        match self.asked.get_mut(&id) {
            Some(Asked::Act { begun }) => *begun += 1,
            other => panic!("{shown} asked for {other:?}, not to act"),
        }
    }

    fn told_error(&mut self, head: &Value, id: Option<u64>, stream: &str, book: &Book) {
        let code = head["code"].as_str().unwrap_or_default();
        let asked = id.and_then(|id| self.asked.remove(&id));
        let fine = match (&asked, code) {
            (Some(Asked::Subscribe { .. }), "ALREADY_SUBSCRIBED" | "TOO_MANY_STREAMS" | "TOO_MANY_SUBSCRIPTIONS") => {
                true
            }
            (Some(Asked::Subscribe { name, .. }), "STREAM_NOT_FOUND") => {
                book.managed.may_be_missing(name, self.core)
                    || book.may_be_reloaded(name)
                    || self.session_may_be_over(book)
            }
            // The token of an ephemeral session is for its stream alone, and for nothing else.
            (Some(Asked::Subscribe { name, .. }), "FORBIDDEN") => self.is_for_another(name, book),
            (Some(Asked::Act { begun: 0 }), "FORBIDDEN") => self.ephemeral().is_some(),
            (Some(Asked::Subscribe { name, .. }), "TARGET_BLOCKED") => book.may_be_blocked(name),
            (None, "TARGET_BLOCKED") => self.held.keys().any(|name| book.may_be_blocked(name)),
            (None, "INSUFFICIENT_PERMISSIONS") => {
                self.held.keys().any(|name| target_of(name).is_some() && self.may_not_reach(name, book))
            }
            // It was taken away meanwhile.
            (Some(Asked::Unsubscribe { .. }), "STREAM_NOT_FOUND") => true,
            (Some(Asked::Subscribe { name, .. }), "CLAIM_MISSING") => self.carrier == Carrier::Key && name == "own",
            (Some(Asked::Subscribe { name, .. }), "INSUFFICIENT_PERMISSIONS") => self.may_not_reach(name, book),
            (Some(Asked::RenewBadly), "AUTH_UPDATE_REJECTED" | "AUTH_SUBJECT_MISMATCH") => true,
            // A token that has ended on the way.
            (Some(Asked::Renew { ticket }), "AUTH_UPDATE_REJECTED") => {
                let used = ticket.is_some_and(|place| book.may_refuse_ticket(place));
                let reason = head["reason"].as_str();
                // Who keeps the ticket, or the session that it is of, may not answer.
                let away = ticket.is_some() && reason == Some("session_store_unavailable");
                reason == Some("busy") || away || used || self.may_be_refused(book)
            }
            (Some(Asked::Act { begun: 0 }), "INSUFFICIENT_PERMISSIONS") => {
                self.carrier == Carrier::Key || self.rights(book, true).iter().any(|rights| !may_act(rights))
            }
            (Some(Asked::Act { begun: 0 }), "RATE_LIMITED") => true,
            (Some(Asked::Act { begun: 1 }), "ACTION_FAILED") => true,
            // Its session may be over, or somebody else's; or the store may not answer.
            (Some(Asked::Reread), "AUTH_UPDATE_REJECTED") => true,
            (None, "TOO_MANY_STREAMS") => true,
            (None, "BAD_MESSAGE" | "UNKNOWN_TYPE") => true,
            _ => false,
        };
        assert!(fine, "client {}: {asked:?} was answered {head}", self.number);
        if matches!(asked, Some(Asked::Renew { .. } | Asked::Reread | Asked::RenewBadly)) {
            self.renewals_refused += 1;
            self.not_renewed(id.expect("an answer that was asked for has an id"));
        }
        if code == "TOO_MANY_STREAMS" && asked.is_none() {
            self.held.remove(stream);
        }
    }

    fn changed(&mut self, kind: &str, stream: &str, head: &Value, body: &[u8], text: &[u8], book: &mut Book) {
        let (number, ephemeral) = (self.number, self.ephemeral().is_some());
        let epoch = head["epoch"].as_str().expect("an event has its epoch").to_owned();
        let seq = head["seq"].as_u64().expect("an event has its place");
        let shown = || text_of(&text[..text.len().min(120)]);
        let Some(held) = self.held.get_mut(stream) else {
            panic!("client {number} does not hold {stream} and got {}", shown());
        };
        // One that resumes may be ahead of the core it comes to (protocol section 3, «Resume»): it gets what there is.
        let many = self.tokens.len() + self.past.len() > 1 || self.tokens[0].session.is_some();
        let moves = self.kind == Kind::Events && is_shaped(stream) && many;
        let goes_on = std::mem::take(&mut held.resumes);
        let resumes = (goes_on || moves) && kind == "snapshot";
        if held.epoch == epoch && !resumes {
            assert!(seq > held.seq, "client {number}: seq rises, {} was held: {}", held.seq, shown());
        }
        if held.epoch != epoch && held.received && !is_shaped(stream) {
            held.past.insert(held.epoch.clone());
            assert!(!held.past.contains(&epoch), "client {number} has left that epoch: {}", shown());
        }
        held.received = true;
        if target_of(stream).is_some() {
            let by = if ephemeral { "by session" } else { "described" };
            book.count(format!("{by} {kind}"));
            if goes_on && kind != "snapshot" {
                book.count("described resumed");
            }
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
        if target_of(stream).is_some() {
            book.direct.note_point(stream, held);
        }
        let choice = held.choice;
        self.check_value(stream, choice, self.started.0 - LATE_US, &value, book);
        check_place(book, &epoch, seq, (stream, choice), &value);
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

    /// A value must be one that this client's upstream, whichever it has been since then, has served, or what it has chosen of
    /// one.
    pub fn check_value(&self, stream: &str, choice: Option<usize>, since_us: u64, value: &[u8], book: &Book) {
        // Of `roled` agents get a part, and whoever is none gets all.
        let parts: BTreeSet<bool> = match stream {
            "roled" => {
                let rights = self.rights(book, false);
                rights.iter().filter(|rights| rights.reach(stream)).map(Rights::sees_part).collect()
            }
            _ => BTreeSet::from([false]),
        };
        let urls = self.urls(stream, since_us, book);
        let served = match choice {
            None => {
                let is_part = !super::upstream::is_whole(value);
                parts.contains(&is_part) && urls.iter().any(|url| book.upstream.has_served(url, value))
            }
            Some(choice) => urls
                .iter()
                .any(|url| parts.iter().any(|part| book.upstream.has_served_choice(url, choice, *part, value))),
        };
        let shown = text_of(&value[..value.len().min(120)]);
        let of = self.shown(book);
        assert!(served, "{of} got as {stream} ({choice:?}) of {urls:?} a value that is not its own: {shown}");
    }

    /// The URLs whose values this client may see under that name, or might since then.
    pub fn urls(&self, stream: &str, since_us: u64, book: &Book) -> Vec<String> {
        match stream.split_once('?') {
            _ if target_of(stream).is_some() => target_of(stream).map(direct::url_of).into_iter().collect(),
            Some((id, query)) => vec![format!("http://up/{id}?{query}")],
            None if stream == "own" => {
                self.companies(book).iter().map(|company| format!("http://up/own/{company}")).collect()
            }
            None if Managed::is_one(stream) => book.managed.urls(stream, self.core, since_us),
            None => vec![format!("http://up/{stream}")],
        }
    }

    /// What of it this client is certain to be shown: who has the same shares the sequence.
    pub fn sequence(&self, name: &str, book: &Book) -> Option<(String, Option<usize>, Vec<String>, bool)> {
        let held = self.held.get(name)?;
        let rights = self.rights(book, false);
        let parts: BTreeSet<bool> = rights.iter().map(|rights| name == "roled" && rights.sees_part()).collect();
        let urls = self.urls(name, book.mono_us, book);
        (urls.len() == 1 && parts.len() == 1).then(|| (name.to_owned(), held.choice, urls, parts.contains(&true)))
    }
}

/// What callers mean to be secret stands in nothing that is sent to anybody.
fn check_no_secret(sent: &[u8]) {
    let found = find(sent, SECRET_MARK.as_bytes());
    assert!(found.is_none(), "a secret is told: {}", text_of(&sent[found.unwrap_or(0)..]));
}

/// Whether somebody may ask for the action.
fn may_act(rights: &Rights) -> bool {
    rights.permissions.iter().any(|own| own == ACTION_PERMISSION)
}

/// Whether the caller's credential shapes what they get as that stream.
fn is_shaped(stream: &str) -> bool {
    matches!(stream, "own" | "roled")
}

/// The value at one place of an epoch is the same for everybody, and another than at the place before it: what a sequence
/// does not show makes no event in it.
fn check_place(book: &mut Book, epoch: &str, seq: u64, of: (&str, Option<usize>), value: &[u8]) {
    let version = match of.1.is_none() && super::upstream::is_whole(value) {
        true => hash((super::upstream::place(value), value.len())),
        false => hash(super::upstream::sorted(value)),
    };
    let (name, choice) = book.sequences.entry(epoch.to_owned()).or_insert_with(|| (of.0.to_owned(), of.1));
    assert_eq!((&**name, *choice), of, "what differs has its own sequence, not {epoch}");
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

/// The session that a token is, as that user's.
/// The session that a token is, as that user's; as anybody's for one who only asks, who is not told whose it has become.
fn whose<'a>(token: &'a Token, user: &'a str, only_asks: bool) -> Option<Whose<'a>> {
    token.session.as_deref().map(|sid| Whose { sid, user: (!only_asks).then_some(user) })
}

fn texts(list: &Value) -> Vec<String> {
    let list = list.as_array().expect("a list of texts");
    list.iter().map(|text| text.as_str().expect("a text").to_owned()).collect()
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
