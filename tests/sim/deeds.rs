//! What clients do: connect, ask, renew, grow slow, go.

use std::collections::{BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use restcast::auth::api_key::{ApiKey, ApiKeyId, ApiKeys, KeyHash, Source, key_text};
use restcast::auth::jwt;
use restcast::auth::session::CookieSecrets;
use restcast::secret::Secret;
use restcast::shard::Input;
use restcast::time::WallTime;
use serde_json::json;

use super::client::{Asked, Carrier, Client, Held, Kind, Known, Login, Request, Ticket};
use super::direct::target_of;
use super::law::{Rights, Token};
use super::managed::MANAGED;
use super::store::{Store, Whose};
use super::upstream::CHOICES;
use super::world::{ACTION, COMPANIES, SECOND_US, SESSION_SECRET, Socket, World};

const REGIONS: [&str; 2] = ["eu", "us"];
/// Who issues tokens; a session's user is nobody's.
pub const ISSUERS: [Option<&str>; 3] = [None, Some("https://a.example"), Some("https://b.example")];
/// Users there are.
pub const USERS: u64 = 5;
/// What users may be.
pub const ROLES: [&[&str]; 4] = [&[], &["viewer"], &["agent"], &["viewer", "admin"]];
pub const PERMISSIONS: [&[&str]; 4] = [&[], &["read"], &["read", "list"], &["list", "write", "read"]];

/// Percent-encoded, as much as can be.
pub fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

impl World {
    // Credentials.

    /// The text of a token of the subject.
    pub fn token_text(&self, issuer: Option<&str>, sub: &str, token: &Token) -> String {
        let exp = token.exp_us as f64 / SECOND_US as f64;
        let mut claims = json!({ "sub": sub, "companyId": token.company, "exp": exp });
        if let Some(issuer) = issuer {
            claims["iss"] = issuer.into();
        }
        if let Some(iat_s) = token.iat_s {
            claims["iat"] = iat_s.into();
        }
        if let Some(jti) = &token.jti {
            claims["jti"] = jti.as_str().into();
        }
        for (name, list) in [("roles", &token.rights.roles), ("permissions", &token.rights.permissions)] {
            if !list.is_empty() {
                claims[name] = list.clone().into();
            }
        }
        jwt::mint(&self.key, &claims.to_string())
    }

    /// A token that is good for so long, and says nothing more.
    pub fn plain_token(&self, company: u64, life_us: u64) -> Token {
        // Tokens are in milliseconds.
        let exp_us = (self.book.wall_us + life_us) / 1_000 * 1_000;
        Token {
            id: 0,
            exp_us,
            company,
            rights: Rights::default(),
            iat_s: Some(self.book.wall_us / SECOND_US),
            jti: None,
            session: None,
            key: None,
            has_ended: false,
            sent_after: self.book.law.said.len(),
            sent_wall_us: self.book.wall_us,
        }
    }

    pub fn some_rights(&mut self) -> Rights {
        let (roles, permissions) = (*self.dice.pick(&ROLES), *self.dice.pick(&PERMISSIONS));
        Rights::of(roles, permissions)
    }

    fn some_token(&mut self) -> Token {
        let (company, life_us) = (self.dice.below(COMPANIES), self.life_us());
        let mut token = self.plain_token(company, life_us);
        token.rights = self.some_rights();
        match self.dice.below(10) {
            0 => token.iat_s = None,
            // One that was made a while ago.
            1..4 => token.iat_s = token.iat_s.map(|iat_s| iat_s - self.dice.below(60)),
            _ => {}
        }
        if self.dice.percent(60) {
            self.tokens_made += 1;
            token.jti = Some(format!("t{}", self.tokens_made));
        }
        token
    }

    /// The token that stands for a session, which lives as long as its record.
    pub fn session_token(&self, sid: &str) -> Token {
        let session = Some(sid.to_owned());
        Token { session, exp_us: u64::MAX / 4, iat_s: None, ..self.plain_token(0, 0) }
    }

    /// An API key that has not been deleted, or a new one.
    fn some_key(&mut self) -> usize {
        let living: Vec<usize> =
            (0..self.book.keys.len()).filter(|&key| !self.book.law.has_deleted(key, None)).collect();
        if !living.is_empty() && self.dice.percent(60) {
            return *self.dice.pick(&living);
        }
        let (rights, life_us) = (self.some_rights(), self.life_us());
        let expires = self.dice.percent(60).then(|| WallTime::from_micros(self.book.wall_us + life_us));
        self.make_key(&rights, expires)
    }

    /// A new API key, which every core knows from now on.
    pub fn make_key(&mut self, rights: &Rights, expires: Option<WallTime>) -> usize {
        let place = self.book.keys.len();
        let id = World::key_id(place);
        let hash = KeyHash::new(&World::key_text(place), [place as u8; 16]);
        let Rights { roles, permissions } = rights.clone();
        let (streams, created, source) = (vec!["*".to_owned()], None, Source::Admin);
        self.book.keys.push(Arc::new(ApiKey {
            id,
            hash,
            streams,
            roles,
            permissions,
            rate: 0,
            created,
            expires,
            source,
        }));
        for core in 0..self.cores.len() {
            let table = self.key_table(core);
            self.handle(core, Input::ApiKeys(table));
        }
        place
    }

    /// The API keys that are left, as far as a core has heard.
    pub fn key_table(&self, core: usize) -> Arc<ApiKeys> {
        let left = |key: &usize| !self.book.law.has_deleted(*key, Some(core));
        let keys = (0..self.book.keys.len()).filter(left).map(|key| Arc::clone(&self.book.keys[key]));
        Arc::new(ApiKeys::new(keys))
    }

    fn key_id(place: usize) -> ApiKeyId {
        ApiKeyId::new(&format!("k{place}")).expect("an id")
    }

    fn key_text(place: usize) -> Secret {
        key_text(&World::key_id(place), &[place as u8; 32])
    }

    /// The token that stands for an API key, which lives as long as it says.
    pub fn key_token(&self, place: usize) -> Token {
        let key = &self.book.keys[place];
        let rights = Rights { roles: key.roles.clone(), permissions: key.permissions.clone() };
        // There is no allowance for it: it ends by the server's own clock.
        let exp_us = key.expires.map_or(u64::MAX / 4, |expires| expires.as_micros() - self.book.leeway_us);
        Token { key: Some(place), rights, exp_us, iat_s: None, ..self.plain_token(0, 0) }
    }

    /// Signs a user in: the id of the session.
    pub fn sign_in(&mut self, user: &str, rights: Rights, company: u64, life_us: u64, with_expires: bool) -> String {
        self.sessions_made += 1;
        let sid = format!("s{}.{}", self.sessions_made, self.sessions_made * 7);
        let now_us = self.book.mono_us;
        // As dates are written, in milliseconds.
        let expires_us = with_expires.then(|| (self.book.wall_us + life_us) / 1_000 * 1_000);
        let version = Store::version(now_us, user, rights, company, life_us, expires_us);
        self.book.store.sign_in(&sid, version);
        sid
    }

    /// The cookie of a session, as express-session signs and encodes it.
    fn cookie(sid: &str) -> String {
        let secrets = CookieSecrets::new(&[Secret::new(SESSION_SECRET)]);
        let cookie = secrets.cookie(sid).expect("there is a secret");
        cookie.replace(':', "%3A").replace('+', "%2B").replace('/', "%2F").replace('=', "%3D")
    }

    /// Somebody with a session: one of the user's that lives, or a new one.
    fn some_session(&mut self, sub: &str) -> Token {
        let now_us = self.book.mono_us;
        let store = &self.book.store;
        let all = store.sessions.iter().filter(|(_, session)| session.user == sub);
        let living: Vec<String> = all.filter(|(sid, _)| store.lives(sid, now_us)).map(|(sid, _)| sid.clone()).collect();
        let sid = match living.as_slice() {
            [_, ..] if self.dice.percent(70) => self.dice.pick(&living).clone(),
            _ => {
                let (rights, company, life_us) = (self.some_rights(), self.dice.below(COMPANIES), self.life_us());
                let with_expires = self.dice.percent(50);
                self.sign_in(sub, rights, company, life_us, with_expires)
            }
        };
        self.session_token(&sid)
    }

    /// Somebody, and how they say who they are.
    pub fn some_login(&mut self, kind: Kind) -> Login {
        let sub = format!("u{}", self.dice.below(USERS));
        let fresh = |ticket: &Ticket| ticket.made_us + 40 * SECOND_US > self.book.mono_us;
        let tickets: Vec<usize> = (0..self.book.tickets.len()).filter(|&no| fresh(&self.book.tickets[no])).collect();
        match self.dice.below(100) {
            0..20 => {
                let token = self.some_session(&sub);
                let carrier = if self.dice.percent(20) { Carrier::Hybrid } else { Carrier::Session };
                Login { issuer: None, sub, token, carrier }
            }
            93.. => {
                let key = self.some_key();
                Login {
                    issuer: None,
                    sub: self.book.keys[key].id.as_str().to_owned(),
                    token: self.key_token(key),
                    carrier: Carrier::Key,
                }
            }
            20..40 if !tickets.is_empty() && kind != Kind::Json => {
                let place = *self.dice.pick(&tickets);
                self.ticket_login(place)
            }
            _ => {
                let token = self.some_token();
                let carrier = match self.dice.below(10) {
                    0 => Carrier::Query,
                    1 => Carrier::Cookie,
                    2 if matches!(kind, Kind::Single | Kind::Many) => Carrier::FirstMessage,
                    _ => Carrier::Header,
                };
                Login { issuer: *self.dice.pick(&ISSUERS), sub, token, carrier }
            }
        }
    }

    /// Whoever comes with that ticket.
    pub fn ticket_login(&self, place: usize) -> Login {
        let ticket = &self.book.tickets[place];
        let token = Token { id: 0, ..self.presented_again(&ticket.token) };
        Login { issuer: ticket.issuer, sub: ticket.sub.clone(), token, carrier: Carrier::Ticket(place) }
    }

    /// The same token, presented now.
    pub fn presented_again(&self, token: &Token) -> Token {
        Token { sent_after: self.book.law.said.len(), sent_wall_us: self.book.wall_us, ..token.clone() }
    }

    pub fn life_us(&mut self) -> u64 {
        (1 + self.dice.below(60_000)) * 1_000
    }

    /// How a request presents what a client has: the end of its target, and its fields.
    pub fn carried(&self, client: &Client, token: &Token) -> (String, String) {
        let text = || self.token_text(client.issuer, &client.sub, token);
        let cookie = || World::cookie(token.session.as_deref().expect("a session has its id"));
        match client.carrier {
            Carrier::Header => (String::new(), format!("Authorization: Bearer {}\r\n", text())),
            Carrier::Query => (format!("token={}", text()), String::new()),
            Carrier::Cookie => (String::new(), format!("Cookie: a=b; restcast_token={}\r\n", text())),
            Carrier::FirstMessage => (String::new(), String::new()),
            Carrier::Session => (String::new(), format!("Cookie: connect.sid={}\r\n", cookie())),
            Carrier::Hybrid => {
                (String::new(), format!("Authorization: Bearer not.a.token\r\nCookie: connect.sid={}\r\n", cookie()))
            }
            Carrier::Key => {
                let key = World::key_text(token.key.expect("it has an API key"));
                (String::new(), format!("X-Api-Key: {}\r\n", String::from_utf8_lossy(key.expose_secret())))
            }
            Carrier::Ticket(place) => (format!("ticket={}", self.book.tickets[place].text), String::new()),
            Carrier::Ephemeral(place) => {
                let token = &self.book.direct.sessions[place].token;
                match place % 3 {
                    0 => (String::new(), format!("Authorization: Bearer {token}\r\n")),
                    1 => (format!("token={token}"), String::new()),
                    _ => (String::new(), format!("Cookie: restcast_token={token}\r\n")),
                }
            }
        }
    }

    // Connecting.

    pub fn stream_name(&mut self) -> String {
        match self.dice.below(12) {
            9 => "roled".to_owned(),
            0 | 1 => "fast".to_owned(),
            2 => "slow".to_owned(),
            3 => "keyed".to_owned(),
            4 => "own".to_owned(),
            5 => "team".to_owned(),
            6 => "vault".to_owned(),
            7 | 10 => (*self.dice.pick(&MANAGED)).to_owned(),
            _ => format!("par?region={}", self.dice.pick(&REGIONS)),
        }
    }

    fn choice(&mut self) -> Option<usize> {
        self.dice.percent(30).then(|| self.dice.below(CHOICES.len() as u64) as usize)
    }

    /// One of the spellings of a choice.
    pub fn spelled(&mut self, choice: usize) -> &'static str {
        let spellings = CHOICES[choice].spellings;
        spellings[self.dice.below(2) as usize]
    }

    /// Options of a subscription: format, perhaps a rate, perhaps where to go on as somebody else got to.
    fn terms(&mut self, name: &str, companies: &BTreeSet<u64>) -> (Held, u64) {
        let format = (*self.dice.pick(&["patch", "merge", "full"])).to_owned();
        let rate_ms = if self.dice.percent(25) { 1 + self.dice.below(3_000) } else { 0 };
        let choice = self.choice();
        let mut held = Held { format, choice, state: "live".to_owned(), ..Held::default() };
        if self.dice.percent(40) {
            // A point of another choice's sequence is of no use, and known not to be.
            let of_any = self.dice.percent(10);
            let others =
                self.clients.iter().filter(|other| companies.len() == 1 && other.companies(&self.book) == *companies);
            let known = others.filter_map(|other| other.held.get(name));
            let known: Vec<Held> = known.filter(|from| of_any || from.choice == choice).cloned().collect();
            if let Some(from) =
                known.get(self.dice.below(known.len() as u64) as usize).filter(|from| from.value.is_some())
            {
                (held.epoch, held.seq, held.value) = (from.epoch.clone(), from.seq, from.value.clone());
                held.resumes = true;
            }
        }
        (held, rate_ms)
    }

    pub fn connect(&mut self) {
        if self.live_clients().len() >= self.setup.clients {
            return;
        }
        if self.dice.percent(36) {
            return self.connect_to_described_or_session();
        }
        let kind = *self.dice.pick(&[Kind::Single, Kind::Single, Kind::Many, Kind::Many, Kind::Events, Kind::Json]);
        let core = self.dice.below(self.cores.len() as u64) as usize;
        let name = self.stream_name();
        let login = self.some_login(kind);
        let companies = match &login.token.session {
            Some(sid) => {
                let book = &self.book;
                let whose = Whose { sid, user: Some(&login.sub) };
                book.store.companies(whose, book.mono_us, book.offset_us()).into_iter().collect()
            }
            None => BTreeSet::from([login.token.company]),
        };
        let (held, rate_ms) = self.terms(&name, &companies);
        if let Some(client) = self.open_as(kind, core, login, &name, held, rate_ms)
            && self.dice.percent(5)
        {
            self.clients[client].mute = true;
        }
    }

    /// A new client on `core` with a plain token; its number.
    #[expect(clippy::too_many_arguments, reason = "what a client is, and what it asks for")]
    pub fn open(
        &mut self,
        kind: Kind,
        core: usize,
        company: u64,
        life_us: u64,
        name: &str,
        held: Held,
        rate_ms: u64,
    ) -> Option<usize> {
        let sub = format!("u{}", self.clients.len() as u64 % USERS);
        let token = self.plain_token(company, life_us);
        let login = Login { issuer: None, sub, token, carrier: Carrier::Header };
        self.open_as(kind, core, login, name, held, rate_ms)
    }

    /// A new client on `core`; its number.
    pub fn open_as(
        &mut self,
        kind: Kind,
        core: usize,
        login: Login,
        name: &str,
        held: Held,
        rate_ms: u64,
    ) -> Option<usize> {
        let mut client = self.arrive(kind, core, login)?;
        let mut target = match kind {
            Kind::Many => "/v1/ws?".to_owned(),
            _ => match name.split_once('?') {
                Some((id, query)) => format!("/v1/streams/{id}?{query}&"),
                None => format!("/v1/streams/{}?", self.wire_name(name)),
            },
        };
        if matches!(kind, Kind::Single | Kind::Events) {
            let _ = write!(target, "format={}&", held.format);
            if rate_ms > 0 {
                let _ = write!(target, "max_rate_ms={rate_ms}&");
            }
            if held.value.is_some() {
                let _ = write!(target, "since={}-{}&", held.epoch, held.seq);
            }
            if let Some(choice) = held.choice.filter(|_| self.may_select(client.carrier)) {
                let _ = write!(target, "select={}&", encoded(self.spelled(choice)));
            }
            client.held.insert(name.to_owned(), held);
        }
        let (query, fields) = self.carried(&client, &client.tokens[0]);
        let head = |more: &str| format!("GET {target}{query} HTTP/1.1\r\nHost: h\r\n{fields}{more}\r\n");
        match kind {
            Kind::Single | Kind::Many => {
                let upgrade = World::upgrade(&mut client);
                client.outgoing.extend(head(&upgrade).bytes());
            }
            Kind::Events => client.outgoing.extend(head("Accept: text/event-stream\r\n").bytes()),
            Kind::Json => {}
        }
        self.say_who(&mut client);
        Some(self.plug_in(client))
    }

    /// Somebody connects to `core`.
    pub fn arrive(&mut self, kind: Kind, core: usize, login: Login) -> Option<Client> {
        let now = self.now();
        let peer: SocketAddr = "192.0.2.1:4711".parse().expect("an address");
        let accepted = self.cores[core].shard.accept(now, peer);
        self.outputs(core);
        let Ok(key) = accepted else {
            assert!(self.book.draining, "nobody is sent away but by a drain");
            return None;
        };
        let mut client = Client::new(self.clients.len(), kind, core, key.index, login);
        client.sent_us = self.book.mono_us;
        client.sent_wall_us = self.book.wall_us;
        client.sent_after = self.book.law.said.len();
        client.notice_time(&self.book, self.book.wall_us, false);
        if let Carrier::Ticket(place) = client.carrier {
            self.book.tickets[place].presented += 1;
        }
        Some(client)
    }

    /// The fields of a request for a WebSocket.
    pub fn upgrade(client: &mut Client) -> String {
        let mut upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                           Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            .to_owned();
        client.deflate = [None, Some(15), Some(15), Some(9)][client.number % 4];
        if let Some(bits) = client.deflate {
            let window = if bits == 15 { String::new() } else { format!("; server_max_window_bits={bits}") };
            let _ = write!(upgrade, "Sec-WebSocket-Extensions: permessage-deflate{window}\r\n");
        }
        upgrade
    }

    /// Whoever says so in the first message does.
    pub fn say_who(&self, client: &mut Client) {
        if client.carrier == Carrier::FirstMessage {
            let token = self.token_text(client.issuer, &client.sub, &client.tokens[0]);
            client.send_frame(1, format!("{{\"type\":\"auth\",\"token\":\"{token}\"}}").as_bytes());
        }
    }

    /// Whether somebody may select: what an ephemeral session was made with, nobody else chooses.
    fn may_select(&self, carrier: Carrier) -> bool {
        match carrier {
            Carrier::Ephemeral(place) => self.book.direct.sessions[place].choice.is_none(),
            _ => true,
        }
    }

    /// The socket of a client who has arrived; its number.
    pub fn plug_in(&mut self, client: Client) -> usize {
        let Client { number, core, socket: place, .. } = client;
        let socket = Socket {
            client: number,
            room: u64::MAX,
            blocked: false,
            writable: false,
            lost: false,
            inbound: VecDeque::new(),
            blocked_since_us: None,
            finished: false,
        };
        assert!(self.cores[core].sockets.insert(place, socket).is_none(), "a place is taken once");
        self.clients.push(client);
        number
    }

    pub fn live_clients(&self) -> Vec<usize> {
        (0..self.clients.len()).filter(|&number| !self.clients[number].gone).collect()
    }

    // Connected.

    pub fn act(&mut self) {
        let live = self.live_clients();
        if live.is_empty() {
            return;
        }
        let number = *self.dice.pick(&live);
        if self.dice.percent(25) {
            return self.change_pace(number);
        }
        let client = &self.clients[number];
        match client.kind {
            Kind::Json if self.dice.percent(40) => self.describe(number),
            Kind::Json if client.carrier != Carrier::Key && client.ephemeral().is_none() && self.dice.percent(25) => {
                self.ask_for_ticket(number);
            }
            Kind::Json => self.request(number),
            _ if client.closed.is_some() || !client.welcomed => {}
            Kind::Single | Kind::Many if self.dice.percent(15) => self.ask_to_act(number),
            Kind::Many if self.dice.percent(75) => self.change_subscription(number),
            Kind::Single | Kind::Many => self.say(number),
            Kind::Events => self.renew_events(number),
        }
    }

    /// A reader grows slow, stops, or goes on.
    fn change_pace(&mut self, number: usize) {
        let room = match self.dice.below(4) {
            0 => 0,
            1 => self.dice.below(2_000),
            _ => u64::MAX,
        };
        self.set_room(number, room);
    }

    /// How much the socket of a client takes from now on.
    pub fn set_room(&mut self, number: usize, room: u64) {
        let client = &mut self.clients[number];
        let socket = self.cores[client.core].sockets.get_mut(&client.socket).expect("a live client has a socket");
        client.ever_stalled |= room != u64::MAX;
        socket.room = room;
        if room > 0 && std::mem::take(&mut socket.blocked) {
            socket.writable = true;
        }
    }

    fn change_subscription(&mut self, number: usize) {
        let name = self.own_stream(number).unwrap_or_else(|| self.stream_name());
        let companies = self.clients[number].companies(&self.book);
        let (mut held, rate_ms) = self.terms(&name, &companies);
        if let Some(place) = self.clients[number].ephemeral() {
            held = Held { format: held.format, state: held.state, ..Held::default() };
            held.choice = self.book.direct.sessions[place].choice;
        }
        self.subscribe(number, &name, held, rate_ms);
    }

    /// Subscribes a `/v1/ws` client to a stream, or, where it holds it already, the opposite.
    pub fn subscribe(&mut self, number: usize, name: &str, held: Held, rate_ms: u64) {
        let spelled = held.choice.map(|choice| self.spelled(choice));
        let wire = self.wire_name(name);
        let may_select = self.may_select(self.clients[number].carrier);
        let spelled = spelled.filter(|_| may_select);
        let client = &mut self.clients[number];
        let pending = client.asked.values().any(|asked| match asked {
            Asked::Subscribe { name: other, .. } | Asked::Unsubscribe { name: other } => other == name,
            _ => false,
        });
        if pending {
            return;
        }
        if client.held.contains_key(name) {
            let message = format!("{{\"type\":\"unsubscribe\",\"stream\":\"{wire}\"}}");
            client.ask(&message, Asked::Unsubscribe { name: name.to_owned() });
            return;
        }
        let mut message = format!("{{\"type\":\"subscribe\",\"stream\":\"{wire}\",\"format\":\"{}\"", held.format);
        if held.value.is_some() {
            let _ = write!(message, ",\"since\":\"{}-{}\"", held.epoch, held.seq);
        }
        if rate_ms > 0 {
            let _ = write!(message, ",\"max_rate_ms\":{rate_ms}");
        }
        if let Some(path) = spelled {
            let _ = write!(message, ",\"select\":{}", json!(path));
        }
        message.push('}');
        client.ask(&message, Asked::Subscribe { name: name.to_owned(), held });
    }

    /// Asks for the action.
    pub fn ask_to_act(&mut self, number: usize) {
        let client = &mut self.clients[number];
        let message = format!("{{\"type\":\"{ACTION}\",\"client\":{number},\"number\":{}}}", client.next_id);
        client.ask(&message, Asked::Act { begun: 0 });
    }

    fn say(&mut self, number: usize) {
        match self.dice.below(10) {
            // What is good for one session alone is renewed by nothing else.
            0..5 if self.clients[number].ephemeral().is_some() => {
                let token = self.plain_token(0, 60 * SECOND_US);
                let client = &self.clients[number];
                let text = self.token_text(client.issuer, &client.sub, &token);
                let message = format!("{{\"type\":\"auth_update\",\"token\":\"{text}\"}}");
                self.clients[number].ask(&message, Asked::RenewBadly);
            }
            // An API key cannot be renewed.
            0..5 if self.clients[number].carrier == Carrier::Key => {}
            0..5 if self.clients[number].tokens[0].session.is_some() => {
                let waits = self.clients[number].asked.values().any(|asked| matches!(asked, Asked::Reread));
                if !waits {
                    self.clients[number].ask("{\"type\":\"auth_update\"}", Asked::Reread);
                }
            }
            0..5 => {
                let client = &self.clients[number];
                let own = |ticket: &Ticket| ticket.sub == client.sub && ticket.issuer == client.issuer;
                let fresh = self.book.tickets.iter().rposition(|ticket| own(ticket) && ticket.token.session.is_none());
                match fresh.filter(|_| self.dice.percent(30)) {
                    Some(place) => self.renew_by_ticket(number, place),
                    None => {
                        let token = self.some_token();
                        self.renew_with(number, token);
                    }
                }
            }
            5 => {
                let session = self.book.direct.sessions.last().filter(|_| self.clients[number].ephemeral().is_none());
                let token = match self.dice.below(3) {
                    0 => self.token_text(None, "somebody-else", &self.plain_token(0, 60 * SECOND_US)),
                    1 if session.is_some() => session.map(|session| session.token.clone()).expect("there is one"),
                    _ => "not.a.token".to_owned(),
                };
                let message = format!("{{\"type\":\"auth_update\",\"token\":\"{token}\"}}");
                self.clients[number].ask(&message, Asked::RenewBadly);
            }
            6 => self.clients[number].send_frame(1, b"{\"type\":\"nonsense\"}"),
            7 => self.clients[number].send_frame(1, b"]["),
            8 => self.clients[number].send_frame(9, b"are you there"),
            _ => self.clients[number].send_frame(10, b""),
        }
    }

    /// Brings that token over a WebSocket.
    pub fn renew_with(&mut self, number: usize, token: Token) {
        let client = &self.clients[number];
        let text = self.token_text(client.issuer, &client.sub, &token);
        self.renew_by(number, token, &text, None);
    }

    /// Brings a ticket over a WebSocket.
    pub fn renew_by_ticket(&mut self, number: usize, place: usize) {
        self.book.tickets[place].presented += 1;
        let text = self.book.tickets[place].text.clone();
        let token = self.presented_again(&self.book.tickets[place].token);
        self.renew_by(number, token, &text, Some(place));
    }

    fn renew_by(&mut self, number: usize, token: Token, text: &str, ticket: Option<usize>) {
        let client = &mut self.clients[number];
        client.tokens.push(Token { id: client.next_id, ..token });
        client.notice_time(&self.book, self.book.wall_us, false);
        client.ask(&format!("{{\"type\":\"auth_update\",\"token\":\"{text}\"}}"), Asked::Renew { ticket });
    }

    /// Somebody who speaks HTTP now.
    pub fn some_requester(&mut self) -> Option<usize> {
        let speaks = |client: &Client| client.kind == Kind::Json && client.closed.is_none();
        let all: Vec<usize> = self.live_clients().into_iter().filter(|&other| speaks(&self.clients[other])).collect();
        (!all.is_empty()).then(|| *self.dice.pick(&all))
    }

    /// Brings a new token for an SSE connection, over some HTTP connection.
    fn renew_events(&mut self, number: usize) {
        let client = &self.clients[number];
        let own = &client.tokens[0];
        let is_token = own.session.is_none() && own.key.is_none() && client.ephemeral().is_none();
        if !is_token || client.renewing || client.connection.is_none() {
            return;
        }
        let Some(over) = self.some_requester() else { return };
        let token = self.some_token();
        self.renew_over(number, over, token);
    }

    /// Brings that token for an SSE connection, over that HTTP connection.
    pub fn renew_over(&mut self, number: usize, over: usize, token: Token) {
        let client = &mut self.clients[number];
        client.renewing = true;
        let connection = client.connection.clone().expect("it was welcomed");
        let id = client.next_id;
        client.next_id += 1;
        client.tokens.push(Token { id, ..token.clone() });
        client.notice_time(&self.book, self.book.wall_us, false);
        let (issuer, sub) = (client.issuer, client.sub.clone());
        let body = format!("{{\"token\":\"{}\"}}", self.token_text(issuer, &sub, &token));
        let other = &mut self.clients[over];
        let length = body.len();
        let head =
            format!("POST /v1/connections/{connection}/auth HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n");
        other.outgoing.extend(head.bytes().chain(body.bytes()));
        other.requests.push(Request::Renewal { of: number, id });
    }

    fn request(&mut self, number: usize) {
        let mut name = self.own_stream(number).unwrap_or_else(|| self.stream_name());
        let wait_s = self.dice.percent(40).then(|| self.dice.below(20));
        let known = self.clients[number].etag.clone().filter(|_| self.dice.percent(70));
        let mut choice = self.choice();
        if let Some(same) = &known {
            (name, choice) = (same.name.clone(), same.choice);
        }
        self.ask_for_choice(number, &name, choice, known, wait_s);
    }

    /// Asks for a value; `known`: unless it is that.
    pub fn ask_for_value(&mut self, number: usize, name: &str, known: Option<Known>, wait_s: Option<u64>) {
        self.ask_for_choice(number, name, None, known, wait_s);
    }

    /// The same for what a choice leaves of it.
    pub fn ask_for_choice(
        &mut self,
        number: usize,
        name: &str,
        choice: Option<usize>,
        known: Option<Known>,
        wait_s: Option<u64>,
    ) {
        let carrier = self.clients[number].carrier;
        if let Some(target) = target_of(name).filter(|_| !matches!(carrier, Carrier::Ephemeral(_))) {
            return self.ask_for_described(number, target, choice, known, wait_s);
        }
        let mut choice = choice;
        if let Carrier::Ephemeral(place) = carrier {
            self.book.direct.sessions[place].presented = true;
            choice = self.book.direct.sessions[place].choice.or(choice);
        }
        if self.clients[number].closed.is_some() || self.clients[number].requests.len() > 2 {
            return;
        }
        let token = self.presented_again(&self.clients[number].tokens[0]);
        let (query, fields) = self.carried(&self.clients[number], &token);
        let and = if name.contains('?') { "&" } else { "?" };
        let wire = self.wire_name(name);
        let selected = choice.filter(|_| self.may_select(carrier));
        let select = selected.map(|choice| format!("select={}&", encoded(self.spelled(choice)))).unwrap_or_default();
        let mut head = format!("GET /v1/streams/{wire}{and}{select}{query} HTTP/1.1\r\nHost: h\r\n{fields}");
        if let Some(Known { etag, .. }) = &known {
            let _ = write!(head, "If-None-Match: {etag}\r\n");
        }
        if let Some(wait_s) = wait_s {
            let _ = write!(head, "Prefer: wait={wait_s}\r\n");
        }
        let client = &mut self.clients[number];
        client.outgoing.extend(head.bytes().chain(*b"\r\n"));
        let (name, known, sent_us) = (name.to_owned(), known.map(|known| known.etag), self.book.mono_us);
        client.requests.push(Request::Value { name, choice, known, token, sent_us });
    }

    /// Asks for a ticket.
    pub fn ask_for_ticket(&mut self, number: usize) {
        if self.clients[number].closed.is_some() || self.clients[number].requests.len() > 2 {
            return;
        }
        let token = self.presented_again(&self.clients[number].tokens[0]);
        let (query, fields) = self.carried(&self.clients[number], &token);
        let head = format!("POST /v1/tickets?{query} HTTP/1.1\r\nHost: h\r\n{fields}Content-Length: 0\r\n\r\n");
        let client = &mut self.clients[number];
        client.outgoing.extend(head.bytes());
        client.requests.push(Request::Ticket { token, asked_us: self.book.mono_us });
    }

    /// A client goes: reset, or politely.
    pub fn hang_up(&mut self) {
        let live = self.live_clients();
        if !live.is_empty() {
            let number = *self.dice.pick(&live);
            let polite = self.dice.percent(50);
            self.end(number, polite);
        }
    }

    pub fn end(&mut self, number: usize, polite: bool) {
        let client = &mut self.clients[number];
        let (core, place) = (client.core, client.socket);
        if polite && client.is_open() && client.kind != Kind::Events && client.welcomed {
            client.said_close = true;
            client.send_frame(8, &1000u16.to_be_bytes());
        } else if polite {
            self.handle(core, Input::PeerFinished { connection: place });
        } else {
            self.cores[core].sockets.get_mut(&place).expect("a live client has a socket").lost = true;
        }
    }
}
