//! Redis, where it is configured: sessions and tickets, what is published about users and tokens, and the control stream.
//!
//! One thread of its own and four connections, so that none waits for another: for commands, which are pipelined; for what
//! is published, by other processes too; for the control stream; for calls, whose replies may be large. No core ever waits:
//! what it asks stands in a bounded queue, and the answer comes back through its mailbox. Threads that may wait make calls
//! ([`Store::call`]).
//!
//! Source: protocol version 1, sections 2 and 6; ARCHITECTURE.md. Memory: the queues, each bounded by its line in `limits`.
//! Errors: none comes out of here but [`Found::Unavailable`]; why Redis is away is said in the log, once.
//! Not here: what records and events mean (`auth`), what becomes of them (`shard`).

mod calls;
mod commands;
mod echoes;
mod ephemerals;
mod events;
mod follow;
mod link;
mod mailboxes;
mod peers;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustls::ClientConfig;

use crate::auth::control::ControlEntry;
use crate::auth::identity::Identity;
use crate::codec::resp::Reply;
use crate::config::{LogLevel, RedisOptions};
use crate::ids::{CoreId, StreamId};
use crate::limits;
use crate::metrics::{RedisLink, RedisResult, StoreMetrics};
use crate::secret::Secret;
use crate::shard::{Found, Lookup, Order, PeerAsk, Refreshed, Rng};
use crate::time::{Instant, Now};

use super::fetch::tls::{TlsError, read_system_roots, roots_of, server_name};
use super::resolver::{Answer, ResolveError, Resolver};
use super::{clock, log};

use self::calls::{Call, Calls};
use self::commands::{Commands, Question, Said};
use self::echoes::Echoes;
use self::events::Events;
use self::follow::Follow;
use self::link::{Fault, Io, Link, Target, Turn};
use self::peers::Peers;

pub use self::calls::{CallError, Command};
pub use self::mailboxes::Mailboxes;
pub use self::peers::PeerLists;

/// The stream that keeps what Pub/Sub would lose (protocol section 6).
pub const CONTROL_STREAM: &str = "restcast:control";
/// The field of an entry there that a process has heard by Pub/Sub, and has dated by when it did: the channel.
const HEARD: &str = "heard";
/// Bytes read at once.
const SCRATCH_BYTES: usize = 64 << 10;
/// How soon those who had no room for an answer are asked again.
const SETTLE: Duration = Duration::from_millis(5);
/// How much longer than it may take a call is waited for: the thread that answers it may be held up on a busy machine.
const CALL_MARGIN: Duration = Duration::from_secs(1);
/// Longest sleep.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// What the thread needs of other parts of the configuration; a reload may change it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// What stands before a session's id in the name of its record.
    pub session_prefix: String,
    /// How long the control stream is kept, and how far it is read back.
    pub revocation_keep: Duration,
}

/// Where what Redis says goes. All is called on the thread that speaks with Redis, which must not be held up.
pub trait Sink: Send {
    /// A question has been answered.
    fn found(&mut self, core: CoreId, ask: u64, found: Found);
    /// Control events were heard, or read from the control stream, in this order. The same may come more than once.
    fn heard(&mut self, entries: Vec<ControlEntry>);
    /// Another process asks to renew a connection of that core, in that place; whether there is such a core.
    fn renewal(&mut self, core: CoreId, index: u32, sealed: Vec<u8>, ask: PeerAsk) -> bool;
    /// Another process asks for a list of connections.
    fn list(&mut self, ask: PeerAsk, sealed: Vec<u8>);
    /// Another process was sent a hook of that stream. Where there is no room for it, it is lost.
    fn hook(&mut self, id: StreamId, sealed: Vec<u8>) {
        drop((id, sealed));
    }
    /// Actions of another process have changed what these show. Where there is no room for it, it is lost.
    fn refresh(&mut self, refreshed: Vec<Refreshed>) {
        drop(refreshed);
    }
    /// Questions are answered, or not any more. «Answered» is said again where something may have been missed.
    fn state(&mut self, up: bool);
    /// Calls are answered from now on. What was read by earlier ones may be out of date.
    fn takes_calls(&mut self) {}
    /// Hands on what found no room so far; whether everything has found it. Until then nothing more is read.
    fn settle(&mut self) -> bool;
}

/// The handle of all cores and of the process.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store(..)")
    }
}

/// What the thread starts with.
pub struct StoreParts {
    /// `[redis]`.
    pub options: RedisOptions,
    /// The process's name among those that share this Redis, which it can prove.
    pub identity: Identity,
    /// What else is configured.
    pub settings: Settings,
    /// Where what Redis says goes.
    pub sink: Box<dyn Sink>,
    /// Looks host names up.
    pub resolver: Arc<Resolver>,
    /// For jitter: random numbers of the operating system.
    pub seed: [u8; 32],
    /// Called where the thread ends by a fault: nothing it was asked will be answered.
    pub failed: Box<dyn FnOnce() + Send>,
}

struct Shared {
    inbox: Mutex<Inbox>,
    bell: OwnedFd,
    /// Whether all connections are there.
    up: AtomicBool,
    metrics: Arc<StoreMetrics>,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

/// What waits for the thread.
#[derive(Default)]
struct Inbox {
    questions: VecDeque<Question>,
    /// Questions that were not taken for want of room.
    refused: u64,
    /// Questions that the thread has and has not answered, as of its last turn.
    under_way: usize,
    touches: VecDeque<(Secret, Duration)>,
    calls: Vec<Call>,
    /// Calls that the thread has and has not sent, as of its last turn.
    calls_waiting: usize,
    entries: VecDeque<ControlEntry>,
    entry_bytes: usize,
    entries_lost: u64,
    answers: VecDeque<(PeerAsk, Option<Vec<u8>>)>,
    answer_bytes: usize,
    lists: VecDeque<(Vec<u8>, SyncSender<PeerLists>)>,
    /// The last of each stream.
    hooks: BTreeMap<StreamId, Vec<u8>>,
    /// What actions have changed.
    refreshed: BTreeSet<Refreshed>,
    resolved: VecDeque<(RedisLink, u64, Answer)>,
    settings: Option<Settings>,
    finish: bool,
}

/// What others wait for.
#[derive(Default)]
struct State {
    /// How reading the control stream for the first time has ended: whether all of it was read.
    replayed: Option<bool>,
    /// How often something of it was read until then.
    read: u64,
    finished: bool,
}

/// Why there is no thread that speaks with Redis: one sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The certificates to be trusted, or the name, cannot be used.
    #[error("Redis cannot be spoken to by TLS: {0}")]
    Tls(String),
    /// The system has no thread or descriptor left.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// A store that takes questions; they are answered once it has been started. `timeout` is `redis.timeout`.
    ///
    /// # Errors
    /// Where the process has no descriptor left.
    pub fn new(timeout: Duration) -> std::io::Result<Store> {
        let shared = Shared {
            inbox: Mutex::default(),
            bell: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            up: AtomicBool::new(false),
            metrics: Arc::default(),
            timeout,
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        Ok(Store { shared: Arc::new(shared) })
    }

    /// Starts the thread, which connects at once.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn start(&self, parts: StoreParts) -> Result<(), StoreError> {
        let StoreParts { options, identity, settings, sink, resolver, seed, failed } = parts;
        let target = target_of(&options)?;
        let thread = Arc::clone(&self.shared);
        std::thread::Builder::new().name("redis".into()).spawn(move || {
            let now = clock::now().at;
            let metrics = Arc::clone(&thread.metrics);
            let hub = Hub {
                commands: Commands::new(metrics, options.timeout, now),
                events: Events::new(&options, identity.process(), now),
                peers: Peers::new(identity, options.timeout, now),
                follow: Follow::new(options.timeout, now),
                echoes: Echoes::default(),
                calls: Calls::new(options.timeout, now),
                target,
                settings,
                sink,
                resolver,
                rng: Rng::new(seed),
                scratch: vec![0; SCRATCH_BYTES],
                said: BTreeSet::new(),
                away_said: false,
                all_up_since: None,
                hears_all: false,
                complete_once: false,
                told_up: None,
                finish_by: None,
                shared: Arc::clone(&thread),
            };
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hub.run()));
            if ended.is_err() {
                failed();
            }
            lock(&thread.state).finished = true;
            thread.changed.notify_all();
        })?;
        Ok(())
    }

    /// Asks for a core; whether the question was taken. Where it was not there is no room, and no answer will come.
    pub fn ask(&self, core: CoreId, ask: u64, lookup: Lookup) -> bool {
        if matches!(lookup, Lookup::KeySet(_)) {
            return false;
        }
        let asked = clock::now().at;
        let mut inbox = lock(&self.shared.inbox);
        if inbox.finish || inbox.questions.len() + inbox.under_way >= limits::STORE_QUESTIONS_MAX {
            inbox.refused += 1;
            return false;
        }
        inbox.questions.push_back(Question { core, ask, lookup, asked });
        self.ring(inbox);
        true
    }

    /// Has something done without an answer.
    pub fn order(&self, order: Order) {
        let mut inbox = lock(&self.shared.inbox);
        match order {
            Order::Touch { .. } if inbox.touches.len() >= limits::STORE_TOUCHES_MAX => return,
            Order::Touch { sid, life } => inbox.touches.push_back((sid, life)),
            Order::Publish(entry) => {
                inbox.entry_bytes += entry.event.len() + entry.data.len();
                inbox.entries.push_back(entry);
                while inbox.entries.len() > limits::STORE_ENTRIES_MAX
                    || inbox.entry_bytes > limits::STORE_ENTRY_BYTES_MAX
                {
                    let Some(oldest) = inbox.entries.pop_front() else { break };
                    inbox.entry_bytes -= oldest.event.len() + oldest.data.len();
                    inbox.entries_lost += 1;
                }
            }
            Order::Answer { to, sealed } => {
                let bytes = sealed.as_ref().map_or(0, Vec::len);
                let fits = inbox.answer_bytes + bytes <= limits::PEER_QUEUE_BYTES_MAX;
                if !fits || inbox.answers.len() >= limits::PEER_MESSAGES_MAX {
                    return;
                }
                inbox.answer_bytes += bytes;
                inbox.answers.push_back((to, sealed));
            }
            Order::Hook { id, .. } if inbox.hooks.len() >= limits::HOOKS_TOLD_MAX && !inbox.hooks.contains_key(&id) => {
                return;
            }
            // The others poll once they hear of it: for those before it, too.
            Order::Hook { id, sealed } => drop(inbox.hooks.insert(id, sealed)),
            Order::Refresh(_) if inbox.refreshed.len() >= limits::REFRESHES_TOLD_MAX => return,
            Order::Refresh(refreshed) => drop(inbox.refreshed.insert(refreshed)),
        }
        self.ring(inbox);
    }

    /// Has commands carried out, one after the other, and waits for their answers: for up to `redis.timeout` until they are
    /// sent and, while they go on coming, [`limits::STORE_CALL_TIME`], so not
    /// on a core's thread. While Redis is known to be away it says so at once.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call(&self, commands: Vec<Command>) -> Result<Vec<Reply>, CallError> {
        let (replies, answered) = sync_channel(1);
        let due = clock::now().at + self.shared.timeout;
        let mut inbox = lock(&self.shared.inbox);
        if inbox.finish || inbox.calls.len() + inbox.calls_waiting >= limits::STORE_CALLS_MAX {
            return Err(CallError::Away);
        }
        inbox.calls.push(Call { commands, replies, due });
        self.ring(inbox);
        // Where the thread has ended it has dropped the call.
        let patience = self.shared.timeout + limits::STORE_CALL_TIME.max(self.shared.timeout) + CALL_MARGIN;
        answered.recv_timeout(patience).unwrap_or(Err(CallError::Unanswered))
    }

    /// Asks all other processes for a list. What they have answered comes within `redis.timeout`, or nothing does.
    pub fn list(&self, sealed: Vec<u8>) -> Receiver<PeerLists> {
        let (reply, lists) = sync_channel(1);
        let mut inbox = lock(&self.shared.inbox);
        if !inbox.finish && inbox.lists.len() < limits::PEER_LISTS_MAX {
            inbox.lists.push_back((sealed, reply));
        }
        self.ring(inbox);
        lists
    }

    /// `redis.timeout`.
    pub fn timeout(&self) -> Duration {
        self.shared.timeout
    }

    /// Other parts of the configuration have changed.
    pub fn replace(&self, settings: Settings) {
        let mut inbox = lock(&self.shared.inbox);
        inbox.settings = Some(settings);
        self.ring(inbox);
    }

    /// Whether Redis is there: all connections are.
    pub fn is_up(&self) -> bool {
        self.shared.up.load(Ordering::Relaxed)
    }

    /// What is counted.
    pub fn metrics(&self) -> Arc<StoreMetrics> {
        Arc::clone(&self.shared.metrics)
    }

    /// Waits until the control stream has been read for the first time: at most so long until it begins to come, and while it
    /// goes on coming at most [`limits::CONTROL_REPLAY_TIME`]; not where Redis does not answer. Whether all of it was read.
    pub fn wait_for_replay(&self, patience: Duration) -> bool {
        let until = clock::now().at + limits::CONTROL_REPLAY_TIME;
        let mut patience = patience;
        let mut state = lock(&self.shared.state);
        loop {
            let before = state.read;
            let nothing = |state: &mut State| state.replayed.is_none() && state.read == before;
            let waited = self.shared.changed.wait_timeout_while(state, patience, nothing);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            let now = clock::now().at;
            if state.replayed.is_some() || state.read == before || now >= until {
                return state.replayed == Some(true);
            }
            patience = self.shared.timeout * 2;
        }
    }

    /// Ends the thread, once the control events that wait have reached Redis, where it is there; waits for that at most
    /// [`limits::STORE_FINISH`].
    pub fn finish(&self) {
        let mut inbox = lock(&self.shared.inbox);
        inbox.finish = true;
        self.ring(inbox);
        let state = lock(&self.shared.state);
        // What little it may take to notice is no reason to give up first.
        let patience = limits::STORE_FINISH + Duration::from_millis(200);
        drop(self.shared.changed.wait_timeout_while(state, patience, |state| !state.finished));
    }

    fn ring(&self, inbox: MutexGuard<'_, Inbox>) {
        drop(inbox);
        self.shared.ring();
    }
}

impl Shared {
    fn ring(&self) {
        // A bell that is full rings already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

/// Whom to connect to.
fn target_of(options: &RedisOptions) -> Result<Target, StoreError> {
    let server = options.server.clone();
    let tls = if server.tls {
        let host = match &server.host {
            url::Host::Domain(name) => url::Host::Domain(name.as_str()),
            url::Host::Ipv4(ip) => url::Host::Ipv4(*ip),
            url::Host::Ipv6(ip) => url::Host::Ipv6(*ip),
        };
        let failed = |error: TlsError| StoreError::Tls(error.to_string());
        let roots = options.ca.as_ref().map_or_else(read_system_roots, roots_of).map_err(failed)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring's provider has cipher suites for the default versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Some((Arc::new(config), server_name(&host).map_err(failed)?))
    } else {
        None
    };
    Ok(Target { server, tls, timeout: options.timeout })
}

/// The thread's own.
struct Hub {
    commands: Commands,
    events: Events,
    peers: Peers,
    follow: Follow,
    echoes: Echoes,
    calls: Calls,
    target: Target,
    settings: Settings,
    sink: Box<dyn Sink>,
    resolver: Arc<Resolver>,
    rng: Rng,
    scratch: Vec<u8>,
    /// What has been said since Redis was last well.
    said: BTreeSet<String>,
    /// Whether that it is away was.
    away_said: bool,
    all_up_since: Option<Instant>,
    /// Whether all is heard that sessions and logouts depend on: all connections but that for calls are there,
    hears_all: bool,
    /// and whether it was before.
    complete_once: bool,
    /// What the sink was last told.
    told_up: Option<bool>,
    /// When the thread ends, whatever waits.
    finish_by: Option<Instant>,
    shared: Arc<Shared>,
}

impl Hub {
    fn run(mut self) {
        let mut ready = [PollFlags::empty(); 4];
        loop {
            let now = clock::now();
            let hold = !self.sink.settle();
            let more = self.take_inbox(now);
            self.turn(now, ready, hold);
            self.tell_state(now);
            if self.is_finished(now) {
                return;
            }
            let wait = if more { Duration::ZERO } else { self.wait(clock::now(), hold) };
            ready = self.sleep(wait, hold);
        }
    }

    /// Takes what others have left; whether there is more.
    fn take_inbox(&mut self, now: Now) -> bool {
        let under_way = self.commands.questions() + self.peers.questions();
        let calls_waiting = self.calls.waiting();
        let (
            questions,
            refused,
            touches,
            calls,
            entries,
            lost,
            answers,
            lists,
            hooks,
            refreshed,
            resolved,
            settings,
            finish,
        ) = {
            let mut inbox = lock(&self.shared.inbox);
            inbox.under_way = under_way + inbox.questions.len();
            inbox.calls_waiting = calls_waiting + inbox.calls.len();
            (inbox.entry_bytes, inbox.answer_bytes) = (0, 0);
            (
                std::mem::take(&mut inbox.questions),
                std::mem::take(&mut inbox.refused),
                std::mem::take(&mut inbox.touches),
                std::mem::take(&mut inbox.calls),
                std::mem::take(&mut inbox.entries),
                std::mem::take(&mut inbox.entries_lost),
                std::mem::take(&mut inbox.answers),
                std::mem::take(&mut inbox.lists),
                std::mem::take(&mut inbox.hooks),
                std::mem::take(&mut inbox.refreshed),
                std::mem::take(&mut inbox.resolved),
                inbox.settings.take(),
                inbox.finish,
            )
        };
        let metrics = Arc::clone(&self.shared.metrics);
        metrics.questions.of(RedisResult::Away).add(refused);
        if lost > 0 {
            metrics.entries.of(crate::metrics::RedisEntry::Dropped).add(lost);
        }
        if let Some(settings) = settings {
            self.settings = settings;
        }
        for question in questions {
            match question.lookup {
                Lookup::Renew { .. } => {
                    self.peers.renew(question, &mut self.commands, self.sink.as_mut(), &metrics);
                }
                _ => self.commands.ask(question),
            }
        }
        for (to, sealed) in answers {
            self.peers.answer(to, sealed.as_deref(), &mut self.commands);
        }
        for (sealed, reply) in lists {
            self.peers.list(&sealed, reply, now.at, &mut self.commands);
        }
        hooks.iter().for_each(|(id, sealed)| self.peers.hooked(id, sealed, &mut self.commands));
        self.peers.refreshed(refreshed);
        touches.into_iter().for_each(|(sid, life)| self.commands.touch(sid, life));
        calls.into_iter().for_each(|call| self.calls.take(call));
        entries.into_iter().for_each(|entry| self.commands.append(entry, None));
        let any = !resolved.is_empty();
        for (which, attempt, answer) in resolved {
            self.resolved(now, which, attempt, answer);
        }
        if finish && self.finish_by.is_none() {
            self.finish_by = Some(now.at + limits::STORE_FINISH);
            self.peers.say_bye(&mut self.commands);
        }
        any
    }

    /// A name has been looked up for one of the links.
    fn resolved(&mut self, now: Now, which: RedisLink, attempt: u64, answer: Answer) {
        let resolve = |_: RedisLink, _: u64, _: &str| Err(ResolveError::Busy);
        let Hub { commands, events, follow, calls, rng, scratch, target, settings, sink, .. } = self;
        let mut io = Io { now: now.at, rng, scratch, target, resolve: &resolve };
        let mut turns = Vec::new();
        match which {
            RedisLink::Commands => {
                let turn = commands.link.resolved(attempt, answer, &mut io);
                commands.after(turn, sink.as_mut(), &mut turns);
            }
            RedisLink::Events => {
                let turn = events.link.resolved(attempt, answer, &mut io);
                events.after(turn, now.at, &mut turns);
            }
            RedisLink::Log => {
                let turn = follow.link.resolved(attempt, answer, &mut io);
                follow.after(turn, now, settings, &mut turns);
            }
            RedisLink::Calls => {
                let turn = calls.link.resolved(attempt, answer, &mut io);
                calls.after(turn, &mut turns);
            }
        }
        self.happened(which, turns);
    }

    /// The turn of each link.
    fn turn(&mut self, now: Now, ready: [PollFlags; 4], hold: bool) {
        let [for_commands, for_events, for_log, for_calls] = ready;
        let metrics = Arc::clone(&self.shared.metrics);
        let Hub {
            commands,
            events,
            peers,
            follow,
            echoes,
            calls,
            rng,
            scratch,
            target,
            settings,
            sink,
            resolver,
            shared,
            ..
        } = self;
        let resolve = |which: RedisLink, attempt: u64, name: &str| {
            let shared = Arc::clone(shared);
            resolver.look_up(name, move |answer| {
                lock(&shared.inbox).resolved.push_back((which, attempt, answer));
                shared.ring();
            })
        };
        let mut io = Io { now: now.at, rng, scratch, target, resolve: &resolve };
        let mut said: Vec<Said> = Vec::new();
        let readable = |flags: PollFlags| if hold { flags - PollFlags::IN } else { flags };

        let (mut published, mut logged, mut told) = (Vec::new(), Vec::new(), Vec::new());
        let of_events = events.turn(now, readable(for_events), &mut io, &metrics, &mut said, &mut published, &mut told);
        for message in told {
            if !peers.heard(now.at, &message, commands, sink.as_mut(), &metrics) && peers.nonsense(now.at) {
                said.push((RedisLink::Events, "a message of another process makes no sense".to_owned()));
            }
        }
        peers.turn(now.at, events.hears_peers(), commands, sink.as_mut(), &metrics);
        published.iter().for_each(|entry| echoes.hear(entry, events.channel(&entry.event), now.at));
        if of_events.iter().any(|turn| matches!(turn, Turn::Closed(_))) && echoes.forget() {
            follow.read_again();
        }
        let of_log =
            follow.turn(now, readable(for_log), hold, &mut io, settings, echoes, &metrics, &mut said, &mut logged);
        // What nobody but this process may have heard is kept for the others, and for those that are away.
        for entry in &published {
            commands.append(entry.clone(), Some(events.channel(&entry.event)));
        }
        let some_logged = !logged.is_empty();
        for entries in [published, logged] {
            if !entries.is_empty() {
                sink.heard(entries);
            }
        }
        let of_commands = commands.turn(now, readable(for_commands), &mut io, settings, sink.as_mut());
        // Nobody's mailbox is in the way of these.
        let of_calls = calls.turn(now, for_calls, &mut io);
        for (ask, heard_by) in std::mem::take(&mut commands.published) {
            peers.published(now.at, ask, heard_by, sink.as_mut(), &metrics);
        }
        said.append(&mut commands.said);
        said.append(&mut calls.said);

        if some_logged {
            self.read_on();
        }
        for (link, what) in said {
            self.say(link, &what);
        }
        self.happened(RedisLink::Commands, of_commands);
        self.happened(RedisLink::Events, of_events);
        self.happened(RedisLink::Log, of_log);
        self.happened(RedisLink::Calls, of_calls);
    }

    /// Counts and says what became of a link.
    fn happened(&mut self, which: RedisLink, turns: Vec<Turn>) {
        for turn in turns {
            match turn {
                Turn::Same => {}
                Turn::Opened => {
                    self.shared.metrics.connects.of(which).count();
                    if which == RedisLink::Calls {
                        self.sink.takes_calls();
                    }
                }
                Turn::Closed(fault) => {
                    if which == RedisLink::Log && !fault.is_loading() {
                        self.replayed(false);
                    }
                    self.away(which, &fault);
                }
            }
        }
    }

    fn away(&mut self, which: RedisLink, fault: &Fault) {
        let why = fault.to_string();
        if self.is_news(&why) {
            self.away_said = true;
            let fields: [(&str, &dyn std::fmt::Display); 2] = [("link", &name(which)), ("why", &why)];
            log::write(LogLevel::Warn, &fields, "Redis is away; it is connected to again until it answers.");
        }
    }

    /// Says something that needs no new connection, once.
    fn say(&mut self, which: RedisLink, what: &str) {
        if self.is_news(what) {
            let fields: [(&str, &dyn std::fmt::Display); 2] = [("link", &name(which)), ("what", &what)];
            log::write(LogLevel::Warn, &fields, "Redis does not do, or holds, what it should.");
        }
    }

    fn is_news(&mut self, what: &str) -> bool {
        self.said.len() < limits::REDIS_SAID_MAX && self.said.insert(what.to_owned())
    }

    /// Something of the control stream was read.
    fn read_on(&self) {
        let mut state = lock(&self.shared.state);
        if state.replayed.is_none() {
            state.read += 1;
            self.shared.changed.notify_all();
        }
    }

    /// The control stream was read for the first time, or cannot be.
    fn replayed(&self, whole: bool) {
        let mut state = lock(&self.shared.state);
        if state.replayed.is_none() {
            state.replayed = Some(whole);
            self.shared.changed.notify_all();
        }
    }

    /// Tells whoever wants to know how Redis is.
    fn tell_state(&mut self, now: Now) {
        let (commands, events, log) = (self.commands.link.is_ready(), self.events.listens(), self.follow.follows());
        let calls = self.calls.link.is_ready();
        let metrics = &self.shared.metrics;
        let links = [
            (RedisLink::Commands, commands),
            (RedisLink::Events, events),
            (RedisLink::Log, log),
            (RedisLink::Calls, calls),
        ];
        for (which, up) in links {
            metrics.up.of(which).set(u64::from(up));
        }
        metrics.waiting.set((self.commands.questions() + self.peers.questions()) as u64);
        metrics.entries_waiting.set(self.commands.entries() as u64);
        if log {
            self.replayed(true);
        }
        let all = commands && events && log && calls;
        self.shared.up.store(all, Ordering::Relaxed);
        // What is called for misses nothing, and says by itself when it is there again.
        let hears_all = commands && events && log;
        let heard_all = std::mem::replace(&mut self.hears_all, hears_all);
        if !all {
            self.all_up_since = None;
        }
        // Whoever waits in the moments of a new attempt is not told of a failure that may be none.
        let up = if commands { Some(true) } else { (!self.commands.link.is_hopeful()).then_some(false) };
        // Once everything is heard again, what was read before may be old.
        let missed = hears_all && !heard_all && self.complete_once && self.told_up == Some(true);
        self.complete_once |= hears_all;
        if up.is_some_and(|up| self.told_up != Some(up)) || missed {
            self.told_up = up;
            self.sink.state(up == Some(true));
        }
        if all {
            let since = *self.all_up_since.get_or_insert(now.at);
            if now.at.since(since) >= limits::REDIS_SETTLED && !self.said.is_empty() {
                self.said.clear();
                if std::mem::take(&mut self.away_said) {
                    log::write(LogLevel::Info, &[], "Redis answers again.");
                }
            }
        }
    }

    fn is_finished(&self, now: Now) -> bool {
        let Some(by) = self.finish_by else { return false };
        now.at >= by || self.commands.entries() == 0 || !self.commands.link.is_ready()
    }

    fn wait(&self, now: Now, hold: bool) -> Duration {
        let settled = self.all_up_since.filter(|_| !self.said.is_empty()).map(|since| since + limits::REDIS_SETTLED);
        let settle = hold.then(|| now.at + SETTLE);
        let timeouts = [
            self.commands.next_timeout(),
            self.events.next_timeout(),
            self.follow.next_timeout(),
            self.calls.next_timeout(),
            self.peers.next_timeout(),
            settled,
            settle,
            self.finish_by,
        ];
        let until = timeouts.into_iter().flatten().min();
        until.map_or(SLEEP_MAX, |until| until.since(now.at)).min(SLEEP_MAX)
    }

    /// Waits for the sockets, the bell, or so long; what is ready of each link.
    fn sleep(&self, wait: Duration, hold: bool) -> [PollFlags; 4] {
        let links: [(&Link, bool); 4] = [
            (&self.commands.link, hold),
            (&self.events.link, hold),
            (&self.follow.link, hold),
            (&self.calls.link, false),
        ];
        let mut fds = vec![PollFd::from_borrowed_fd(self.shared.bell.as_fd(), PollFlags::IN)];
        let mut of = Vec::with_capacity(links.len());
        for (at, (link, hold)) in links.into_iter().enumerate() {
            if let Some((fd, flags)) = link.interest(hold) {
                fds.push(PollFd::from_borrowed_fd(fd, flags));
                of.push(at);
            }
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            // Rounded up, so that a deadline has passed when it wakes.
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let mut ready = [PollFlags::empty(); 4];
        // A signal that interrupts it, or anything else, is a turn in which nothing is ready.
        if poll(&mut fds, Some(&timeout)).is_err() {
            return ready;
        }
        let mut polled = fds.iter();
        if polled.next().is_some_and(|bell| bell.revents().contains(PollFlags::IN)) {
            let _ = rustix::io::read(&self.shared.bell, &mut [0u8; 8]);
        }
        for (fd, at) in polled.zip(of) {
            if let Some(ready) = ready.get_mut(at) {
                *ready = fd.revents();
            }
        }
        ready
    }
}

fn name(which: RedisLink) -> &'static str {
    match which {
        RedisLink::Commands => "commands",
        RedisLink::Events => "events",
        RedisLink::Log => "log",
        RedisLink::Calls => "calls",
    }
}
