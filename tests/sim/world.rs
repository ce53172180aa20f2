//! One world: shards, clocks, sockets, mail, workers and what happens to them; what must hold of all of them together.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::sync::Arc;

use restcast::auth::keys::{Algorithm, Key, KeyConfig};
use restcast::config::{Config, FileError, Sources};
use restcast::ids::CoreId;
use restcast::limits::{CONTROL_BYTES_MAX, SENDS_PER_TURN};
use restcast::metrics::CoreMetrics;
use restcast::secret::Secret;
use restcast::shard::{Catalog, Input, Ledger, Lookup, Mail, Options, Output, Sent, Shard, Wire};
use restcast::stream::Comparison;
use restcast::stream::action::{ActResult, Answer};
use restcast::stream::budget::PollLeave;
use restcast::stream::poll::{FetchError, FetchRequest, PollNo, UpstreamCode};
use restcast::stream::succession::UnderWay;
use restcast::time::{Instant, Now, WallTime};

use super::authority::News;
use super::client::{Book, Client, Kind};
use super::dice::Dice;
use super::direct::{self, ALLOW, ALLOW_LESS, SECRET_MARK, SESSIONS_EACH, TARGETS, TTL_MAX_S};
use super::ephemerals::Ephemerals;
use super::law::{ACTION_PERMISSION, DIRECT_ROLES, LATE_US, TEAM_ROLES, VAULT_PERMISSIONS};
use super::managed::Managed;
use super::store::{GRACE_S, REREAD_S};
use super::upstream::Mood;

const SECRET: &str = "a secret of the simulator, of 32 bytes or more";
/// What the cookies of sessions are signed with.
pub const SESSION_SECRET: &str = "a secret of its application";
pub const SECOND_US: u64 = 1_000_000;
pub const COMPANIES: u64 = 3;
/// The type of the messages that ask for the action.
pub const ACTION: &str = "write_it";
/// Turns without time going on, after which the server is taken to spin.
const TURNS_MAX: usize = 2_000;

/// The configuration of a world, as its file says it.
#[derive(Clone, Debug)]
pub struct Setup {
    pub cores: u16,
    pub clients: usize,
    pub steps: usize,
    pub server: String,
    pub limits: String,
    pub stream: String,
    pub interval_ms: u64,
    pub leeway_s: u64,
    /// Verified tokens that a core remembers.
    pub token_cache: usize,
    pub linger_ms: u64,
    /// Whether streams may be evicted while they are polled.
    pub evicts: bool,
    pub loses_mail: bool,
    pub huge: bool,
    /// Whether sessions live on while they are connected.
    pub touches: bool,
    /// How many of a hundred touches are lost on their way.
    pub loses_touches: u64,
    /// Whether tickets and ephemeral sessions stand in a store, where other processes find them.
    pub shares: bool,
    /// `direct.linger`.
    pub direct_linger_ms: u64,
    /// The first of those targets that are described.
    pub target: usize,
    pub write_stall_s: u64,
    pub drain_s: u64,
}

impl Setup {
    pub fn plain() -> Setup {
        Setup {
            cores: 1,
            clients: 8,
            steps: 0,
            server: String::new(),
            limits: String::new(),
            stream: "history = 64\nhistory_bytes = \"64KiB\"".to_owned(),
            interval_ms: 100,
            leeway_s: 0,
            token_cache: 16,
            linger_ms: 1_000,
            evicts: false,
            loses_mail: false,
            huge: false,
            touches: false,
            loses_touches: 0,
            shares: true,
            direct_linger_ms: 3_000,
            target: 0,
            write_stall_s: 30,
            drain_s: 5,
        }
    }

    fn chosen(dice: &mut Dice) -> Setup {
        let cores = 1 + dice.below(4) as u16;
        let evicts = dice.percent(25);
        let mut limits = String::new();
        if evicts {
            let _ = writeln!(limits, "streams = {}", 3 + dice.below(4));
        }
        if dice.percent(30) {
            let _ = writeln!(limits, "pinned_bytes = \"{}KiB\"", 16 << dice.below(4));
        }
        if dice.percent(20) {
            let _ = writeln!(limits, "history_bytes_total = \"{}KiB\"", 32 << dice.below(4));
        }
        if dice.percent(30) {
            let _ = writeln!(limits, "connections_per_subject = {}\nstreams_per_subject = 4", 40);
        }
        let history = 1 + dice.below(40);
        let history_kib = 1 << dice.below(7);
        Setup {
            cores,
            clients: 4 + dice.below(28) as usize,
            steps: 600,
            server: format!("heartbeat = \"{}s\"", 5 + dice.below(20)),
            stream: format!("history = {history}\nhistory_bytes = \"{history_kib}KiB\""),
            interval_ms: *dice.pick(&[1, 5, 20, 100, 1_000]),
            leeway_s: dice.below(4),
            token_cache: *dice.pick(&[0, 4, 64]),
            linger_ms: dice.below(3_000),
            evicts: evicts || limits.contains("history_bytes_total"),
            limits,
            loses_mail: dice.percent(25),
            huge: dice.percent(15),
            touches: dice.percent(40),
            loses_touches: *dice.pick(&[0, 0, 50, 100]),
            shares: dice.percent(50),
            direct_linger_ms: 100 + dice.below(4_000),
            target: dice.below(TARGETS.len() as u64) as usize,
            write_stall_s: 2 + dice.below(20),
            drain_s: 2 + dice.below(6),
        }
    }

    /// The file. `variant`: what a reload has made of it.
    fn text(&self, variant: u64) -> String {
        let Setup { server, limits, stream, interval_ms, leeway_s, linger_ms, .. } = self;
        let Setup { write_stall_s, drain_s, token_cache, touches, .. } = self;
        let mut text = format!(
            "[server]\ndrain = \"{drain_s}s\"\n{server}\n[limits]\nwrite_stall = \"{write_stall_s}s\"\n\
             messages_per_second = 0\nauth_failures_per_minute = 0\nkeep_alive = \"20s\"\n{limits}\n\
             [auth]\nreauth_before = \"10s\"\nfirst_message = \"5s\"\ntoken_cache = {token_cache}\n\
             [redis]\nurl = \"redis://127.0.0.1\"\n\
             [auth.session]\nsecrets = [\"another secret of it\", \"{SESSION_SECRET}\"]\n\
             reread = \"{REREAD_S}s\"\ngrace = \"{GRACE_S}s\"\ntouch = {touches}\n\
             [auth.jwt]\nleeway = \"{leeway_s}s\"\n\
             [[auth.jwt.key]]\nalg = \"HS256\"\nsecret = \"{SECRET}\"\n"
        );
        let (allow, linger_ms_described) = (if variant == 2 { ALLOW_LESS } else { ALLOW }, self.direct_linger_ms);
        // Another `[direct]` each time.
        let cookies = variant == 1;
        let _ = write!(
            text,
            "[direct]\nallow = {allow}\nroles = {DIRECT_ROLES:?}\ninterval_min = \"500ms\"\n\
             cookies = {cookies}\nsessions_per_subject = {SESSIONS_EACH}\nsession_ttl_max = \"{TTL_MAX_S}s\"\n\
             linger = \"{linger_ms_described}ms\"\n"
        );
        let common = format!("linger = \"{linger_ms}ms\"\nbackoff_max = \"1s\"\ntimeout = \"4s\"\n{stream}");
        let slower = (interval_ms * 7).min(2_000);
        let changed = if variant == 1 { interval_ms + 3 } else { *interval_ms };
        let _ =
            write!(text, "[[stream]]\nid = \"fast\"\nurl = \"http://up/fast\"\ninterval = \"{changed}ms\"\n{common}\n");
        let _ =
            write!(text, "[[stream]]\nid = \"slow\"\nurl = \"http://up/slow\"\ninterval = \"{slower}ms\"\n{common}\n");
        if variant != 2 {
            let keyed = "array_key = \"id\"\nignore = [\"/volatile\"]";
            let _ = write!(
                text,
                "[[stream]]\nid = \"keyed\"\nurl = \"http://up/keyed\"\ninterval = \"{slower}ms\"\n{keyed}\n{common}\n"
            );
        }
        let roles = format!("roles = {TEAM_ROLES:?}");
        let _ = write!(
            text,
            "[[stream]]\nid = \"team\"\nurl = \"http://up/team\"\ninterval = \"{slower}ms\"\n{roles}\n{common}\n"
        );
        let permissions = format!("permissions = {VAULT_PERMISSIONS:?}");
        let _ = write!(
            text,
            "[[stream]]\nid = \"vault\"\nurl = \"http://up/vault\"\ninterval = \"{slower}ms\"\n{permissions}\n{common}\n"
        );
        let url = "http://up/own/{claims.companyId}";
        let _ = write!(text, "[[stream]]\nid = \"own\"\nurl = \"{url}\"\ninterval = \"{interval_ms}ms\"\n{common}\n");
        // Agents see a part of it, admins all.
        let views = "[[stream.view]]\nroles = [\"agent\"]\npointers = [\"/source\", \"/public\", \"/items/*/id\"]\n\
                     [[stream.view]]\nroles = [\"admin\", \"agent\"]\npath = \"$\"";
        let url = "http://up/roled";
        let _ =
            write!(text, "[[stream]]\nid = \"roled\"\nurl = \"{url}\"\ninterval = \"{slower}ms\"\n{common}\n{views}\n");
        let url = "http://up/act?client={message.client}&number={message.number}";
        let _ = write!(
            text,
            "[[action]]\ntype = \"{ACTION}\"\nmethod = \"POST\"\nurl = \"{url}\"\n\
             permissions = [\"{ACTION_PERMISSION}\"]\nrefresh = [\"slow\", \"own\"]\n"
        );
        let url = "http://up/par?region={query.region}";
        let params = "params = [\"region\"]";
        let _ =
            write!(text, "[[stream]]\nid = \"par\"\nurl = \"{url}\"\ninterval = \"{slower}ms\"\n{params}\n{common}\n");
        text
    }
}

/// Neither files nor variables.
pub struct NoSources;

impl Sources for NoSources {
    fn env(&self, _name: &str) -> Option<Vec<u8>> {
        None
    }

    fn file(&self, _path: &str, _bytes_max: usize) -> Result<Vec<u8>, FileError> {
        Err(FileError::Missing)
    }
}

fn options(text: &str, managed: &Managed, shares: bool, previous: Option<&Catalog>) -> Arc<Options> {
    let (config, _) = Config::parse(text, &NoSources).unwrap_or_else(|errors| panic!("{errors:?} in\n{text}"));
    let (made, stopped) = managed.all();
    let streams = [config.streams.clone(), made].concat();
    let catalog = Catalog::new(&streams, previous, 7).with_actions(&config.actions).with_all_stopped(&stopped);
    let mut auth = config.auth.clone();
    auth.store = shares;
    Arc::new(Options {
        connection: config.connection.clone(),
        auth,
        limits: config.limits.clone(),
        catalog: catalog.with_direct(config.direct.as_ref(), previous),
    })
}

/// One end of a model connection, as the server's kernel holds it.
#[derive(Debug)]
pub struct Socket {
    pub client: usize,
    /// Bytes it takes until it is full; `u64::MAX`: any number.
    pub room: u64,
    /// Whether it was full when bytes were offered.
    pub blocked: bool,
    /// Whether that is over and has not been said.
    pub writable: bool,
    pub lost: bool,
    /// Bytes on their way to the server.
    pub inbound: VecDeque<u8>,
    /// Since when the server has sent nothing although it wanted to.
    pub blocked_since_us: Option<u64>,
    pub finished: bool,
}

/// A poll under way.
struct Fetching {
    begun_us: u64,
    due_us: u64,
    stream: u32,
    poll: PollNo,
    request: FetchRequest,
    under_way: UnderWay,
    leave: PollLeave,
}

/// A question to the store that has not been answered.
#[derive(Debug)]
pub struct Asking {
    pub ask: u64,
    pub lookup: Lookup,
    pub asked_us: u64,
    pub due_us: u64,
}

pub struct Core {
    pub shard: Shard,
    metrics: Arc<CoreMetrics>,
    pub sockets: BTreeMap<u32, Socket>,
    pub asking: Vec<Asking>,
    fetches: Vec<Fetching>,
    /// Actions under way: when each ends, and how.
    acts: Vec<(u64, u64, ActResult)>,
    comparisons: VecDeque<(u64, Box<Comparison>)>,
    drained: bool,
}

pub struct World {
    pub dice: Dice,
    pub setup: Setup,
    pub book: Book,
    pub cores: Vec<Core>,
    /// What is on its way to each core, from each core.
    mail: Vec<Vec<VecDeque<(u64, Mail)>>>,
    pub clients: Vec<Client>,
    /// What each core is still to hear of.
    pub news: Vec<VecDeque<(u64, News)>>,
    /// The ephemeral sessions that the store holds.
    pub ephemerals: Ephemerals,
    /// When the store comes back.
    pub store_returns_us: Option<u64>,
    pub options: Arc<Options>,
    pub ledger: Arc<Ledger>,
    pub key: Key,
    /// How many tokens with a name, and sessions, there have been.
    pub tokens_made: u64,
    pub sessions_made: u64,
    pub fetches: u64,
    /// Questions put to the store.
    pub questions: u64,
    /// Sends that were made.
    pub sends: usize,
    /// How long each poll takes at most.
    pub fetch_us_max: u64,
    /// The same of an answer of the store.
    pub store_us_max: u64,
    /// Whether no core hears of another's events.
    pub loses_events: bool,
    draining_until_us: Option<u64>,
    /// Whether a stream has been changed.
    pub has_changed: bool,
    /// Since when there are more streams than there may be: those that were changed, and what their watchers have not all left.
    crowded_since_us: Option<u64>,
}

/// How long what a stream was before it was changed may stand beside what it is.
const MOVE_US_MAX: u64 = 5_000_000;

/// The sockets of a core while it transmits.
struct Net<'w> {
    sockets: &'w mut BTreeMap<u32, Socket>,
    clients: &'w mut [Client],
    book: &'w mut Book,
    dice: &'w mut Dice,
    sends: usize,
}

impl Wire for Net<'_> {
    fn send(&mut self, connection: u32, bytes: &[u8]) -> Sent {
        assert!(!bytes.is_empty(), "nothing is never sent");
        self.sends += 1;
        let socket = self.sockets.get_mut(&connection).expect("only open sockets are sent to");
        assert!(!socket.finished, "nothing is sent after our end of the socket was closed");
        if socket.lost {
            return Sent::Lost;
        }
        if socket.room == 0 {
            socket.blocked = true;
            socket.blocked_since_us.get_or_insert(self.book.mono_us);
            return Sent::Blocked;
        }
        let mut count = bytes.len().min(usize::try_from(socket.room).unwrap_or(usize::MAX));
        if count > 1 && self.dice.percent(4) {
            count = 1 + self.dice.below(count as u64 - 1) as usize;
        }
        if socket.room != u64::MAX {
            socket.room -= count as u64;
        }
        socket.blocked_since_us = None;
        self.clients[socket.client].receive(&bytes[..count], self.book);
        Sent::Bytes(count)
    }
}

impl World {
    /// A world whose setup and fate are drawn.
    pub fn new(mut dice: Dice) -> World {
        let setup = Setup::chosen(&mut dice);
        World::with(dice, setup)
    }

    pub fn with(dice: Dice, setup: Setup) -> World {
        let options = options(&setup.text(0), &Managed::default(), setup.shares, None);
        let ledger = Arc::new(Ledger::of(restcast::ids::ProcessId(1)));
        ledger.marks().configure(&options.auth);
        let mut book = Book::new(1_000 * SECOND_US, 1_800_000_000 * SECOND_US, setup.leeway_s * SECOND_US);
        book.upstream.huge = setup.huge;
        book.store.touches = setup.touches;
        book.direct.shared = setup.shares;
        book.direct.linger_us = setup.direct_linger_ms * 1_000;
        book.direct.in_all = match options.limits.streams {
            0 => usize::MAX,
            streams => streams as usize,
        };
        let now = now(&book);
        let cores = (0..setup.cores)
            .map(|core| {
                let metrics = Arc::new(CoreMetrics::default());
                let mut secret = [7; 32];
                secret[0] = core as u8;
                let (options, ledger) = (Arc::clone(&options), Arc::clone(&ledger));
                let shard = Shard::new(CoreId(core), setup.cores, options, ledger, Arc::clone(&metrics), secret, now);
                let (sockets, asking, fetches, acts, comparisons) = Default::default();
                Core { shard, metrics, sockets, asking, fetches, acts, comparisons, drained: false }
            })
            .collect();
        let queues = |_| (0..setup.cores).map(|_| VecDeque::new()).collect();
        let secret = Secret::new(SECRET);
        let key = Key::new(&KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret }).expect("a long secret");
        World {
            dice,
            mail: (0..setup.cores).map(queues).collect(),
            news: (0..setup.cores).map(|_| VecDeque::new()).collect(),
            ephemerals: Ephemerals::default(),
            store_returns_us: None,
            tokens_made: 0,
            sessions_made: 0,
            setup,
            book,
            cores,
            clients: Vec::new(),
            options,
            ledger,
            key,
            fetches: 0,
            questions: 0,
            sends: 0,
            fetch_us_max: 300_000,
            store_us_max: u64::MAX,
            loses_events: false,
            draining_until_us: None,
            has_changed: false,
            crowded_since_us: None,
        }
    }

    /// The whole life of a world; a number that holds all that its clients have seen.
    pub fn run(mut self) -> (u64, BTreeMap<String, u64>) {
        for step in 0..self.setup.steps {
            self.step();
            if step % 300 == 299 {
                self.rest();
                self.book.upstream.mood = Mood::Wild;
            }
        }
        self.rest();
        if self.dice.percent(50) {
            self.drain();
        } else {
            self.leave();
        }
        for session in &self.book.direct.sessions {
            let what = format!("session {}", if session.lapsed_us.is_some() { "lapsed" } else { "not lapsed" });
            *self.book.tally.entry(what).or_default() += 1;
        }
        (self.book.trace, self.book.tally)
    }

    fn step(&mut self) {
        match self.dice.below(1_000) {
            0..450 => {
                self.settle();
                let most = *self.dice.pick(&[2_000, 20_000, 200_000, 1_500_000]);
                self.pass_time(most);
            }
            450..520 => self.connect(),
            520..760 => self.act(),
            760..900 => {
                let core = self.dice.below(self.cores.len() as u64) as usize;
                self.turn(core);
            }
            900..904 => self.step_clock(),
            904..906 => self.suspend(),
            906..909 => self.reload(),
            953..961 => self.administer(),
            909..930 => self.hang_up(),
            930..941 => {
                self.decree();
                self.ask_where(|client, book| book.law.is_about(client.party_now(book), &client.tokens[0]));
            }
            941..953 => self.disturb_sessions(),
            980..998 => self.connect_to_described_or_session(),
            961..980 => {
                if let Some(number) = self.some_requester() {
                    self.describe(number);
                }
            }
            _ => self.settle(),
        }
    }

    /// Some of those clients ask for the action at this very moment.
    fn ask_where(&mut self, them: impl Fn(&Client, &Book) -> bool) {
        for number in self.live_clients() {
            let client = &self.clients[number];
            let may_ask = matches!(client.kind, Kind::Single | Kind::Many) && client.is_open() && client.welcomed;
            if may_ask && them(client, &self.book) && self.dice.percent(50) {
                self.ask_to_act(number);
            }
        }
    }

    // Time.

    /// Time goes on to the next thing that happens, or by at most `most_us`.
    pub fn pass_time(&mut self, most_us: u64) {
        let now_us = self.book.mono_us;
        let next = self.next_event().unwrap_or(u64::MAX).max(now_us);
        // A core may come a little late.
        let late = if self.dice.percent(30) { self.dice.below(15_000) } else { 0 };
        let to = next.saturating_add(late).min(now_us + most_us.max(1));
        self.move_clocks(to.max(now_us + 1) - now_us);
        if self.setup.steps > 0 {
            self.ask_where(|client, _| client.expired.is_some_and(|expired| expired.at_us >= now_us));
        }
        self.check_deadlines();
        self.check_ended_streams();
    }

    /// Time goes on, and no core has its turn.
    pub fn move_clocks(&mut self, by_us: u64) {
        let before_us = self.book.wall_us;
        self.note_watchers(self.book.mono_us, self.book.mono_us + by_us);
        self.book.mono_us += by_us;
        self.book.wall_us += by_us;
        for client in &mut self.clients {
            client.notice_time(&self.book, before_us, false);
        }
    }

    /// Runs the world for `us` without anybody doing anything.
    pub fn idle(&mut self, us: u64) {
        let until = self.book.mono_us + us;
        while self.book.mono_us < until {
            self.settle();
            self.pass_time(until - self.book.mono_us);
        }
        self.settle();
    }

    fn next_event(&self) -> Option<u64> {
        let mail = self.mail.iter().flatten().filter_map(|queue| queue.front()).map(|(due, _)| *due);
        let news = self.news.iter().filter_map(|queue| queue.front()).map(|(due, _)| *due);
        let cores = self.cores.iter().filter(|core| !core.drained).flat_map(|core| {
            let fetches = core.fetches.iter().map(|fetch| fetch.due_us);
            let acts = core.acts.iter().map(|(due, ..)| *due);
            let comparisons = core.comparisons.iter().map(|(due, _)| *due).chain(acts);
            let lookups = core.asking.iter().map(|asking| asking.due_us);
            let timeout = core.shard.next_timeout().map(Instant::as_micros);
            fetches.chain(comparisons).chain(lookups).chain(timeout)
        });
        mail.chain(news).chain(self.store_returns_us).chain(cores).min()
    }

    fn step_clock(&mut self) {
        self.settle();
        let by_us = self.dice.below(30 * SECOND_US);
        if self.dice.percent(50) {
            self.book.wall_us += by_us;
        } else {
            self.book.wall_us -= by_us;
            self.book.store.set_back_us += by_us;
            self.book.law.set_back_us += by_us;
        }
        self.book.store.was_set = true;
        self.clock_moved();
    }

    /// The wall clock was set to something else.
    pub fn clock_moved(&mut self) {
        for client in &mut self.clients {
            client.notice_time(&self.book, 0, true);
        }
        for core in 0..self.cores.len() {
            self.handle(core, Input::ClockMoved);
        }
    }

    /// The machine sleeps: both clocks jump.
    fn suspend(&mut self) {
        self.settle();
        let by_us = self.dice.below(120 * SECOND_US);
        self.book.store.sleep(self.book.mono_us, self.book.mono_us + by_us);
        self.note_watchers(self.book.mono_us, self.book.mono_us + by_us);
        self.book.mono_us += by_us;
        self.book.wall_us += by_us;
        for client in &mut self.clients {
            // Nobody could be told in its sleep.
            if let Some(expired) = &mut client.expired {
                expired.at_us += by_us;
            }
            // Whoever expired meanwhile expired now, as far as anybody can tell.
            client.notice_time(&self.book, self.book.wall_us, false);
        }
        for core in &mut self.cores {
            for socket in core.sockets.values_mut() {
                if let Some(since) = &mut socket.blocked_since_us {
                    *since = self.book.mono_us;
                }
            }
        }
        // Heartbeats were missed on both sides.
        self.clients.iter_mut().for_each(|client| client.ever_stalled = true);
        self.settle();
    }

    // Cores.

    pub fn now(&self) -> Now {
        now(&self.book)
    }

    pub fn handle(&mut self, core: usize, input: Input<'_>) {
        let now = self.now();
        self.cores[core].shard.handle(now, input);
        self.outputs(core);
    }

    pub fn outputs(&mut self, index: usize) {
        while let Some(output) = self.cores[index].shard.poll_output() {
            let now_us = self.book.mono_us;
            match output {
                Output::Fetch { stream, poll, request, leave, under_way } => {
                    self.fetches += 1;
                    let id = request.target.options.id.as_str();
                    // A core that has not heard of it may still have what the stream was before polled by another.
                    let stopped = (0..self.cores.len()).all(|core| self.book.managed.is_stopped(id, core));
                    assert!(!stopped, "{id} is polled although it was stopped");
                    if request.target.guard.is_some() {
                        self.check_described(index, &request);
                    }
                    // Whatever was reloaded, changed, stopped or evicted meanwhile, and on whatever core it was polled before. Those
                    // who describe streams may ask for the same URL with headers of their own.
                    let same = |fetch: &Fetching| {
                        let (one, other) = (&fetch.request.target, &request.target);
                        let is_same =
                            one.options.id == other.options.id && one.url == other.url && one.body == other.body;
                        is_same && one.guard.is_none()
                    };
                    let twice = self.cores.iter().flat_map(|core| &core.fetches).any(same);
                    assert!(!twice, "{} is polled twice at a time", request.target.url);
                    let core = &mut self.cores[index];
                    let due_us =
                        now_us + self.dice.below(self.fetch_us_max.min(4 * SECOND_US)) / (1 + self.dice.below(50));
                    core.fetches.push(Fetching { begun_us: now_us, due_us, stream, poll, request, leave, under_way });
                }
                Output::Compare(comparison) => {
                    let due = now_us + self.dice.below(50_000);
                    self.cores[index].comparisons.push_back((due, comparison));
                }
                Output::Next { .. } | Output::Unfollow { .. } => unreachable!("no upstream speaks a stream"),
                Output::Act { ask, call } => {
                    let number =
                        |name| call.url.query_pairs().find(|(own, _)| own == name).and_then(|(_, n)| n.parse().ok());
                    let (client, id): (Option<u64>, Option<u64>) = (number("client"), number("number"));
                    let client = client.and_then(|client| usize::try_from(client).ok()).expect("its client");
                    self.clients[client].check_act(id.expect("its number"), &self.book);
                    let fate = if self.book.upstream.mood == Mood::Wild { self.dice.below(10) } else { 9 };
                    let result = match fate {
                        0 => Err(FetchError { code: UpstreamCode::Timeout, detail: "a fault of the model".to_owned() }),
                        1 => Ok(Answer { status: 409, retry_after: None, body: None }),
                        _ => Ok(Answer { status: 200, retry_after: None, body: None }),
                    };
                    let due_us = now_us + self.dice.below(SECOND_US);
                    self.cores[index].acts.push((due_us, ask, result));
                }
                Output::LookUp { ask, lookup } => {
                    self.questions += 1;
                    let (asked_us, due_us) = (now_us, self.answered_at());
                    self.put_to_store(index, Asking { ask, lookup, asked_us, due_us });
                }
                Output::Order(order) => self.order(order),
                Output::Mail { to, mail } => {
                    assert!(usize::from(to.0) != index, "mail to oneself stays inside");
                    let lossy = self.setup.loses_mail && self.book.upstream.mood == Mood::Wild;
                    if mail.may_be_lost() && (self.loses_events || (lossy && self.dice.percent(10))) {
                        continue;
                    }
                    // Drawn from no dice: the order in which a core writes to others is no order.
                    let delay = Dice::seeded(self.mails_seed(index, usize::from(to.0))).below(30_000);
                    let queue = &mut self.mail[usize::from(to.0)][index];
                    let due = (now_us + delay).max(queue.back().map_or(0, |(due, _)| *due));
                    queue.push_back((due, mail));
                }
                Output::Finish { connection } => {
                    let socket = self.cores[index].sockets.get_mut(&connection).expect("an open socket is finished");
                    assert!(!socket.finished, "a socket is finished once");
                    socket.finished = true;
                }
                Output::Close { connection, .. } => {
                    let socket = self.cores[index].sockets.remove(&connection).expect("a socket is closed once");
                    let client = &mut self.clients[socket.client];
                    client.gone = true;
                    client.held.clear();
                }
                Output::Resume { .. } => {}
                Output::Notice(notice) => {
                    let notice = format!("{notice:?}");
                    let tells = self.book.direct.sessions.iter().any(|session| notice.contains(&session.token));
                    assert!(!tells && !notice.contains(SECRET_MARK), "a secret is logged: {notice}");
                }
                Output::Drained => {
                    assert!(self.book.draining && !self.cores[index].drained, "a core drains once");
                    self.cores[index].drained = true;
                }
            }
        }
    }

    fn mails_seed(&self, from: usize, to: usize) -> u64 {
        self.book.mono_us ^ (from as u64) << 40 ^ (to as u64) << 50
    }

    /// One turn of a core, as its loop makes it; whether there is more to do at once.
    pub fn turn(&mut self, index: usize) -> bool {
        if self.cores[index].drained {
            self.mail[index].iter_mut().for_each(VecDeque::clear);
            self.news[index].clear();
            return false;
        }
        let now_us = self.book.mono_us;
        let mut acted = false;
        for from in 0..self.cores.len() {
            while self.mail[index][from].front().is_some_and(|(due, _)| *due <= now_us) {
                let (_, mail) = self.mail[index][from].pop_front().expect("a mail is there");
                self.handle(index, Input::Mail(mail));
                acted = true;
            }
        }
        acted |= self.hear(index);
        acted |= self.answer_lookups(index);
        acted |= self.turn_sockets(index);
        while let Some(at) = self.cores[index].fetches.iter().position(|fetch| fetch.due_us <= now_us) {
            let Fetching { stream, poll, request, leave, under_way, .. } = self.cores[index].fetches.remove(at);
            let received = WallTime::from_micros(self.book.wall_us);
            let target = request.target.guard.is_some().then(|| self.book.direct.is_polled(&request.target));
            let url = target.map_or_else(|| request.target.url.as_str().to_owned(), direct::url_of);
            let result = self.book.upstream.answer(&mut self.dice, &request, &url, received);
            if let Some(target) = target {
                let blocked = matches!(&result, Err(error) if error.code == UpstreamCode::Blocked);
                self.book.direct.proved_blocked[target] |= blocked;
            }
            under_way.end(Instant::from_micros(now_us), &result);
            // Of failures the budgets are not told here: what they make of these has tests of its own.
            if let Ok(response) = &result
                && response.status < 400
            {
                leave.answered(self.now().at, response);
            }
            self.handle(index, Input::Fetched { stream, poll, result });
            acted = true;
        }
        while let Some(at) = self.cores[index].acts.iter().position(|(due, ..)| *due <= now_us) {
            let (_, ask, result) = self.cores[index].acts.remove(at);
            self.handle(index, Input::Acted { ask, result });
            acted = true;
        }
        // The pool has several threads: a later comparison may end first.
        while let Some(at) = self.cores[index].comparisons.iter().position(|(due, _)| *due <= now_us) {
            let (_, comparison) = self.cores[index].comparisons.remove(at).expect("a comparison is there");
            self.handle(index, Input::Compared(Box::new(comparison.run_guarded())));
            acted = true;
        }
        if self.cores[index].shard.next_timeout().is_some_and(|at| at <= self.now().at) {
            self.handle(index, Input::Timeout);
            acted = true;
        }
        let now = self.now();
        let Core { shard, sockets, .. } = &mut self.cores[index];
        let mut net = Net { sockets, clients: &mut self.clients, book: &mut self.book, dice: &mut self.dice, sends: 0 };
        let more = shard.transmit(now, &mut net);
        assert!(net.sends <= 2 * SENDS_PER_TURN, "a turn makes a bounded number of sends");
        acted |= net.sends > 0;
        self.sends += net.sends;
        self.outputs(index);
        acted || more
    }

    /// A stream that was described is polled: by one who may, for a request as it was described, once at a time.
    fn check_described(&mut self, index: usize, request: &FetchRequest) {
        let described = self.book.direct.is_polled(&request.target);
        let closed = (0..self.cores.len()).all(|core| self.book.direct.is_closed(described, core, self.book.mono_us));
        assert!(!closed, "target {described} is polled, which nobody may name any more");
        let may = self.setup.evicts || self.book.reloaded;
        let lingered_us = self.book.direct.lingered_us(described);
        for core in self.cores.iter().filter(|_| !may) {
            let same = |fetch: &Fetching| {
                fetch.request.target.options.id == request.target.options.id && fetch.begun_us > lingered_us
            };
            assert!(!core.fetches.iter().any(same), "target {described} is polled twice at a time by {index}");
        }
    }

    /// What upstreams are still asked is answered at once.
    pub fn end_fetches_at_once(&mut self) {
        let now_us = self.book.mono_us;
        self.cores.iter_mut().flat_map(|core| &mut core.fetches).for_each(|fetch| fetch.due_us = now_us);
    }

    /// What is being carried out ends at once.
    pub fn end_acts_at_once(&mut self) {
        let now_us = self.book.mono_us;
        self.cores.iter_mut().flat_map(|core| &mut core.acts).for_each(|(due_us, ..)| *due_us = now_us);
    }

    fn turn_sockets(&mut self, index: usize) -> bool {
        let mut acted = false;
        let places: Vec<u32> = self.cores[index].sockets.keys().copied().collect();
        for place in places {
            let Some(socket) = self.cores[index].sockets.get_mut(&place) else { continue };
            let client = &mut self.clients[socket.client];
            socket.inbound.extend(client.outgoing.drain(..));
            if std::mem::take(&mut socket.writable) {
                self.handle(index, Input::Writable { connection: place });
                acted = true;
            }
            let core = &mut self.cores[index];
            let Some(socket) = core.sockets.get_mut(&place) else { continue };
            if socket.lost {
                self.handle(index, Input::Lost { connection: place });
                acted = true;
                continue;
            }
            if !socket.inbound.is_empty() && core.shard.wants_bytes(place) {
                let most = socket.inbound.len() as u64;
                let count = if self.dice.percent(80) { most } else { 1 + self.dice.below(most) };
                let mut bytes: Vec<u8> = socket.inbound.drain(..count as usize).collect();
                self.handle(index, Input::Received { connection: place, bytes: &mut bytes });
                acted = true;
            }
            let Some(socket) = self.cores[index].sockets.get(&place) else { continue };
            // Whoever sees our end closes its own, unless it is deaf.
            if socket.finished && !self.clients[socket.client].mute && socket.room > 0 {
                self.handle(index, Input::PeerFinished { connection: place });
                acted = true;
            }
        }
        acted
    }

    /// Turns, until there is nothing to do at this time.
    pub fn settle(&mut self) {
        for _ in 0..TURNS_MAX {
            let mut acted = false;
            for core in 0..self.cores.len() {
                acted |= self.turn(core);
            }
            self.renewals_confirmed();
            if !acted && self.next_event().is_none_or(|at| at > self.book.mono_us) {
                self.check_bounds();
                return;
            }
        }
        let mut shown = String::new();
        for index in 0..self.cores.len() {
            let acted = self.turn(index);
            let Core { shard, sockets, drained, .. } = &self.cores[index];
            let sockets: Vec<_> =
                sockets.values().filter(|socket| !socket.inbound.is_empty() || socket.finished).collect();
            let _ = write!(shown, "\n{acted} {drained} {:?} {:?} {sockets:?}", shard.next_timeout(), shard.stats());
        }
        panic!("the server spins at {}: {shown}", self.book.mono_us);
    }

    fn renewals_confirmed(&mut self) {
        for number in 0..self.clients.len() {
            for (of, id, status) in std::mem::take(&mut self.clients[number].confirmed) {
                self.clients[of].check_renewal(id, status, &self.book);
                match status {
                    200 => self.clients[of].renewed(id, &self.book),
                    // Whether an answer that did not come in time was a renewal is not known.
                    503 => {}
                    _ => {
                        self.clients[of].renewals_refused += u32::from(matches!(status, 401 | 403));
                        self.clients[of].not_renewed(id);
                    }
                }
                let client = &mut self.clients[of];
                client.renewing = status == 503;
                client.notice_time(&self.book, self.book.wall_us, false);
            }
        }
    }

    fn reload(&mut self) {
        let variant = self.dice.below(3);
        self.publish_reload(variant);
    }

    pub fn publish_reload(&mut self, variant: u64) {
        (self.book.reloaded, self.has_changed) = (true, true);
        let text = self.setup.text(variant);
        self.options = options(&text, &self.book.managed, self.setup.shares, Some(&self.options.catalog));
        self.tell_cores(&News::Reload(Arc::clone(&self.options), variant));
    }

    /// How often a reader got one snapshot for several events.
    pub fn conflations(&self) -> u64 {
        self.cores.iter().map(|core| core.metrics.conflations.value()).sum()
    }

    // What must hold.

    fn check_bounds(&mut self) {
        let is_crowded = self.ledger.streams() > u64::from(self.options.limits.streams);
        self.crowded_since_us = self.crowded_since_us.or(Some(self.book.mono_us)).filter(|_| is_crowded);
        let crowded_us = self.crowded_since_us.map_or(0, |since_us| self.book.mono_us - since_us);
        assert!(crowded_us <= MOVE_US_MAX, "streams are bounded, but for those that are changed, until they are");
        // What anybody watches, and what nobody does yet.
        let most = 2 * self.clients.len() * 11 + self.options.limits.streams as usize;
        assert!(self.ledger.streams() as usize <= most, "and then by what is watched");
        assert!(!is_crowded || self.has_changed, "nothing but a change lets there be more");
        assert!(self.ledger.marks().len() <= self.book.law.said.len(), "no more marks than were set");
        let pinned_max = self.options.limits.pinned_bytes / self.cores.len() as u64;
        for core in &self.cores {
            let stats = core.shard.stats();
            assert_eq!(stats.connections, core.sockets.len(), "every connection has its socket");
            assert!(stats.control_bytes_max <= 2 * CONTROL_BYTES_MAX, "answers that wait are bounded: {stats:?}");
            assert!(stats.outbox_items_max <= 400, "what waits for one connection is bounded: {stats:?}");
            let stalled = core.sockets.values().any(|socket| socket.blocked);
            assert!(stats.pinned_bytes <= pinned_max || !stalled, "pinned bytes are bounded: {stats:?}");
            // One of each kind: a client's own, and rereads of what its core holds.
            let lookups_max = 2 * self.clients.len() + 2 + 4 * self.book.direct.sessions.len();
            assert!(stats.lookups <= lookups_max.min(core.asking.len()), "questions are bounded: {stats:?}");
            let sessions_max = core.sockets.len() + stats.lookups;
            assert!(stats.sessions <= sessions_max, "a session has a connection: {stats:?}");
            let timers_max =
                64 + 16 * (stats.streams + stats.topics + stats.connections) + self.book.direct.sessions.len() * 3;
            assert!(stats.timers <= timers_max, "{stats:?}");
            assert_eq!(core.metrics.panics.value(), 0);
        }
        let sessions = self.ledger.ephemeral_sessions();
        assert!(sessions <= self.book.direct.in_all, "there are {sessions} ephemeral sessions");
        let watchers: u64 = self.cores.iter().map(|core| core.shard.stats().watchers).sum();
        assert!(watchers <= (self.clients.len() * 11) as u64);
    }

    /// Whoever's credential has ended has been told so, and ends.
    fn check_deadlines(&self) {
        for client in self.clients.iter().filter(|client| !client.gone) {
            let Some(socket) = self.cores[client.core].sockets.get(&client.socket) else { continue };
            let takes_all = socket.room == u64::MAX && !socket.lost;
            if client.kind == Kind::Json {
                let late = takes_all && !client.ever_stalled && client.waits_too_long(&self.book);
                assert!(!late, "client {} still waits for an answer: {:?}", client.number, client.requests);
            }
            if client.is_open() && client.welcomed && takes_all {
                client.check_rights(&self.book);
            }
            let expired = client.expired.map(|expired| expired.at_us);
            let ended = if client.kind == Kind::Json { None } else { client.ended_by_now(&self.book) };
            let Some(ended) = expired.into_iter().chain(ended).min() else { continue };
            let since_us = self.book.mono_us - ended;
            if client.is_open() && client.welcomed && takes_all {
                assert!(
                    since_us <= LATE_US,
                    "client {} ({:?}) lives on, {since_us} us after its end, {expired:?} {ended:?}",
                    client.number,
                    client.tokens
                );
            }
            if client.kind != Kind::Json && client.welcomed {
                // Told at once, reset 1 s later.
                let most_us = 2 * LATE_US + SECOND_US;
                assert!(since_us <= most_us, "client {} is there {since_us} us after its end", client.number);
            }
        }
    }

    /// Everything calms down: then whoever holds a stream holds the newest value of its upstream.
    pub fn rest(&mut self) {
        self.book.upstream.mood = Mood::Calm;
        if self.book.store.is_away() {
            self.store_returns();
        }
        self.start_all_streams();
        for number in self.live_clients() {
            self.set_room(number, u64::MAX);
        }
        // The longest wait of a poll, a back-off and an upstream's Retry-After.
        self.idle(8 * SECOND_US);
        let mut dice = self.dice.clone();
        self.book.upstream.renew_all(&mut dice);
        self.dice = dice;
        self.idle(8 * SECOND_US);
        let mut shared = BTreeMap::new();
        for client in self.clients.iter().filter(|client| client.is_open() && client.welcomed) {
            assert!(!client.is_torn(), "client {} waits for the rest of a frame", client.number);
            for (name, held) in &client.held {
                let shown = format!("client {} ({:?}) on {name}", client.number, client.kind);
                let value = held.value.as_deref().unwrap_or_else(|| panic!("{shown} has no value"));
                let urls = client.urls(name, self.book.mono_us, &self.book);
                let upstream = &self.book.upstream;
                let newest = urls.iter().any(|url| match held.choice {
                    None => upstream.is_newest(url, value),
                    Some(choice) => upstream.is_newest_choice(url, choice, value),
                });
                let start = String::from_utf8_lossy(&value[..value.len().min(200)]);
                assert!(newest, "{shown} holds {start} of {}-{} at rest, not the newest", held.epoch, held.seq);
                // And that part of it that is theirs.
                client.check_value(name, held.choice, self.book.mono_us, value, &self.book);
                if let Some(sequence) = client.sequence(name, &self.book) {
                    let place = (held.epoch.clone(), held.seq);
                    let first = shared.entry(sequence).or_insert_with(|| place.clone());
                    assert_eq!(*first, place, "{shown}: whoever is shown the same shares a sequence");
                }
                assert_eq!(held.state, "live", "{shown} was told the stream is live again");
            }
        }
    }

    /// The process ends: everybody is told, and it does end.
    pub fn drain(&mut self) {
        self.book.draining = true;
        let open: Vec<usize> = (0..self.clients.len())
            .filter(|&number| {
                self.clients[number].is_open() && self.clients[number].welcomed && !self.clients[number].mute
            })
            .collect();
        let until = self.book.mono_us + self.setup.drain_s * SECOND_US;
        self.draining_until_us = Some(until);
        for core in 0..self.cores.len() {
            self.handle(core, Input::Drain);
        }
        self.settle();
        for number in open {
            let client = &self.clients[number];
            let told = client.closed == Some(1012) && client.told_to_reconnect;
            // A more important cause may have come first.
            let other = client.closed.is_some_and(|code| code != 1012);
            assert!(
                told || other || client.said_close || client.may_have_expired(),
                "client {number} was told to reconnect: {client:?}"
            );
        }
        while self.cores.iter().any(|core| !core.drained) {
            assert!(self.book.mono_us <= until + SECOND_US / 10, "a drain ends in its window");
            self.pass_time(SECOND_US);
            self.settle();
        }
        assert_eq!(self.ledger.connections(), 0);
    }

    /// Everybody leaves: then nothing is left of them, and polling ends.
    pub fn leave(&mut self) {
        for number in self.live_clients() {
            self.end(number, false);
        }
        // Linger, then the copies on other cores, then a reset of whoever was told to go; the time of all ephemeral sessions,
        // and for as long as one that was asked for may wait for whoever asked.
        self.idle(self.setup.linger_ms.max(self.setup.direct_linger_ms) * 1_000 + 32 * SECOND_US);
        self.check_dead_tokens();
        let (polls, questions) = (self.fetches, self.questions);
        self.idle(30 * SECOND_US);
        assert_eq!(self.fetches, polls, "nobody watches, nobody is polled for");
        assert_eq!(self.questions, questions, "nobody has a session, no record is read");
        assert_eq!(self.ledger.tickets_made(self.now().at), 0, "tickets that are too old are forgotten");
        assert_eq!(self.ledger.ephemeral_sessions(), 0, "no session outlives its time");
        assert_eq!(self.ledger.connections(), 0);
        for core in &self.cores {
            let stats = core.shard.stats();
            let held = (stats.connections, stats.topics, stats.watchers, stats.readers, stats.log_bytes);
            assert_eq!(held, (0, 0, 0, 0, 0), "{stats:?}");
            assert_eq!((stats.pinned_bytes, stats.asks, stats.timers), (0, 0, 0), "{stats:?}");
            assert_eq!((stats.sessions, stats.lookups, core.asking.len()), (0, 0, 0), "{stats:?}");
            let rights_max = 64 + 2 * self.setup.token_cache;
            assert!(stats.rights <= rights_max, "rights that nobody has are forgotten: {stats:?}");
            assert_eq!(core.metrics.subscriptions.value(), 0);
            assert!(core.sockets.is_empty());
        }
    }
}

fn now(book: &Book) -> Now {
    Now { at: Instant::from_micros(book.mono_us), wall: WallTime::from_micros(book.wall_us) }
}
