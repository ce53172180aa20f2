//! One core's state: every connection and stream of that core. The only hall where subscribers and upstreams meet.
//!
//! Inputs go in by [`Shard::handle`], each with the time it happened; what the shell must do comes out of
//! [`Shard::poll_output`]; what sockets should send is pulled by [`Shard::transmit`], a bounded turn at a time;
//! [`Shard::next_timeout`] says when to come back. The same shard runs in production and in the simulator.
//!
//! Source: ARCHITECTURE.md. Memory: each table and queue names its bound. Errors: answered to the peer at fault.
//! Not here: sockets, threads, clocks.

mod actions;
mod api_keys;
mod authenticate;
mod catalog;
mod close;
mod control;
mod direct;
mod encoder;
mod ephemeral;
mod ephemeral_shared;
mod ephemeral_table;
mod fanout;
mod hooks;
mod http;
mod ledger;
mod lookup;
mod mail;
mod managed;
mod open;
mod owner;
mod places;
mod refresh;
mod refresh_mark;
mod rendition;
mod renewal;
mod requests;
mod rng;
mod room;
mod sessions;
mod slab;
mod starts;
mod stats;
mod subscribe;
mod ticket_table;
mod tickets;
mod timers;
pub mod topics;
pub mod wheel;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::auth::api_key::ApiKeys;
use crate::auth::cache::TokenCache;
use crate::auth::grant::RightsTable;
use crate::auth::jwks::KeySets;
use crate::auth::jwt::{LackedKey, Verifier};
use crate::auth::marks::Concerned;
use crate::auth::sealed::Heard;
use crate::codec::deflate::Inflater;
use crate::connection::Connection;
use crate::ids::{ConnectionKey, CoreId, EphemeralId, Holder, StreamId};
use crate::limits::Limits;
use crate::metrics::CoreMetrics;
use crate::stream::action::{ActResult, Call};
use crate::stream::budget::{Budgets, Lane, PollLeave};
use crate::stream::poll::{FetchRequest, FetchResult, PollNo, Status, UpstreamCode};
use crate::stream::succession::UnderWay;
use crate::time::{Instant, Now, Steps};
use crate::{auth, connection, stream};

pub use self::catalog::{Catalog, StreamKey};
pub use self::close::CannedAnswer;
pub use self::control::{ConnectionQuery, Listed, ListedConnection};
pub use self::ledger::Ledger;
pub use self::lookup::{
    EphemeralAsk, EphemeralFound, EphemeralHeld, EphemeralMake, EphemeralStanding, Found, Lookup, Order, PeerAsk,
    SessionRecord,
};
pub use self::mail::Mail;
pub use self::places::{Full, Wanted};
pub use self::refresh_mark::{MARK_BYTES, RefreshMark, Refreshed};
pub use self::rng::Rng;
pub use self::stats::Stats;

use self::actions::Acting;
use self::catalog::PolledKey;
use self::control::Passes;
use self::encoder::Encoder;
use self::ephemeral_shared::SharedSessions;
use self::fanout::Joint;
use self::lookup::Asked;
use self::owner::Owned;
use self::rendition::Meter;
use self::sessions::Sessions;
use self::slab::Slab;
use self::starts::Starts;
use self::topics::Topic;
use self::wheel::Wheel;

/// What every core of a process is told, at start and by a reload.
#[derive(Clone, Debug)]
pub struct Options {
    /// `[server]`, as far as connections need it.
    pub connection: connection::Options,
    /// `[auth]`.
    pub auth: auth::Options,
    /// `[limits]`, with 0 connections resolved.
    pub limits: Limits,
    /// `[[stream]]`.
    pub catalog: Catalog,
}

/// Something that happened outside.
#[derive(Debug)]
pub enum Input<'a> {
    /// Bytes came from a connection's peer.
    Received {
        /// Whose.
        connection: u32,
        /// The bytes; overwritten while they are made sense of.
        bytes: &'a mut [u8],
    },
    /// The peer will send nothing more.
    PeerFinished {
        /// Whose.
        connection: u32,
    },
    /// The connection is gone: reset, timed out.
    Lost {
        /// Which.
        connection: u32,
    },
    /// A socket that took less than it was given takes more.
    Writable {
        /// Whose.
        connection: u32,
    },
    /// A poll has ended.
    Fetched {
        /// Of which stream: its place.
        stream: u32,
        /// Which poll.
        poll: PollNo,
        /// How.
        result: FetchResult,
    },
    /// A comparison has ended on the worker pool.
    Compared(Box<stream::Compared>),
    /// Another core says something.
    Mail(Mail),
    /// An action has ended.
    Acted {
        /// Its number.
        ask: u64,
        /// How.
        result: ActResult,
    },
    /// A question has been answered.
    Found {
        /// Its number.
        ask: u64,
        /// The answer.
        found: Found,
    },
    /// Another process asks to renew the credential of a connection; the answer goes out as [`Order::Answer`].
    PeerRenewal {
        /// The connection's place.
        connection: u32,
        /// What it asks, sealed for that connection.
        sealed: Vec<u8>,
        /// Who asks.
        ask: PeerAsk,
    },
    /// Another process was sent a hook of that stream.
    PeerHook {
        /// Whose hook it is.
        id: StreamId,
        /// Which, sealed.
        sealed: Vec<u8>,
    },
    /// Another process has carried out an action that has changed what these show.
    PeerRefresh(Arc<[Refreshed]>),
    /// Marks were set: the connections of those whom they concern are to be looked at.
    Control(Arc<[Concerned]>),
    /// The store of sessions and tickets answers, or does not any more. «Answers» is said again where something may have been
    /// missed meanwhile: what was read from it is to be read again.
    StoreState {
        /// Whether it answers.
        up: bool,
    },
    /// Time has passed.
    Timeout,
    /// The wall clock was stepped, or the machine slept: credential deadlines are to be anchored anew.
    ClockMoved,
    /// The process is to end.
    Drain,
    /// The configuration was read again.
    Reload(Arc<Options>),
    /// An administrator has made, changed, deleted, stopped or started streams. All else is as it was.
    Catalog {
        /// What holds from now on.
        options: Arc<Options>,
        /// Which streams.
        changed: Arc<[StreamId]>,
    },
    /// What a stream shows may have changed: what is polled of it is polled at once.
    Refresh(StreamId),
    /// There are other API keys than before.
    ApiKeys(Arc<ApiKeys>),
    /// Key sets of issuers were fetched: from now on these are in force.
    KeySets(Arc<KeySets>),
}

/// Something to be done outside.
#[derive(Debug)]
pub enum Output {
    /// Carry out a poll, and bring back [`Input::Fetched`].
    Fetch {
        /// Of which stream: its place.
        stream: u32,
        /// Which poll.
        poll: PollNo,
        /// What to ask.
        request: FetchRequest,
        /// Leave to send it: what came of it is to be told.
        leave: PollLeave,
        /// To be dropped when the upstream has been asked and has answered, or will not any more.
        under_way: UnderWay,
    },
    /// Wait for the next value of an upstream that speaks a stream, and connect to it where there is no connection; bring back
    /// [`Input::Fetched`].
    Next {
        /// Of which stream: its place.
        stream: u32,
        /// Which poll.
        poll: PollNo,
        /// What to ask.
        request: FetchRequest,
        /// Where leave to connect is to be asked for.
        lane: Arc<Lane>,
        /// Whether the value before is held: to have reached the upstream again is an answer then.
        held: bool,
    },
    /// Close the connection to such an upstream: nobody waits for it any more.
    Unfollow {
        /// Of which stream: its place.
        stream: u32,
        /// Its last poll.
        poll: PollNo,
    },
    /// Compare two values on the worker pool, and bring back [`Input::Compared`].
    Compare(Box<stream::Comparison>),
    /// Carry out an action, once, and bring back [`Input::Acted`].
    Act {
        /// Its number.
        ask: u64,
        /// What to ask.
        call: Call,
    },
    /// Ask somebody outside of the cores, and bring back [`Input::Found`].
    LookUp {
        /// The number of the question.
        ask: u64,
        /// What is asked.
        lookup: Lookup,
    },
    /// Have the store do something, as soon as it can; nothing comes back.
    Order(Order),
    /// Tell another core.
    Mail {
        /// Which.
        to: CoreId,
        /// What.
        mail: Mail,
    },
    /// Nothing more will be sent: end our side of the socket.
    Finish {
        /// Whose.
        connection: u32,
    },
    /// The connection has ended: close its socket. Its place may be taken again at once.
    Close {
        /// Which.
        connection: u32,
        /// Whether to reset it: the peer did not end its side in time.
        reset: bool,
    },
    /// Bytes that were left in the socket may be read now.
    Resume {
        /// Whose.
        connection: u32,
    },
    /// Every connection of this core is gone, and it is draining.
    Drained,
    /// Something for the operator's log.
    Notice(Notice),
}

/// News for the operator. Holds nothing secret.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// A stream's upstream began to fail, goes on failing for another reason, or has recovered.
    Upstream {
        /// The stream's id.
        stream: String,
        /// What it is now.
        status: Status,
        /// What happened, where something failed.
        detail: String,
    },
    /// A view of a stream cannot be made of its value, or can be again.
    View {
        /// The stream's id.
        stream: String,
        /// What is wrong, which names the view; `None`: nothing any more.
        fault: Option<String>,
    },
    /// A token lives longer than logouts and revocations are kept in mind.
    LongToken,
    /// An action's upstream gave no answer. Told now and then, not each time.
    Action {
        /// The action's `type`.
        kind: String,
        /// Why not.
        code: UpstreamCode,
        /// What happened.
        detail: String,
    },
}

/// Where frames go: the sockets in production, models in the simulator. Never blocks.
pub trait Wire {
    /// Sends as many of `bytes` (never none) as the connection's socket takes now.
    fn send(&mut self, connection: u32, bytes: &[u8]) -> Sent;

    /// The same for bytes behind which our side of the socket will be ended at once ([`Output::Finish`]): they may be held
    /// back to leave in one packet with the end.
    fn send_last(&mut self, connection: u32, bytes: &[u8]) -> Sent {
        self.send(connection, bytes)
    }
}

/// What became of bytes that were given to a socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sent {
    /// It took so many, at least one.
    Bytes(usize),
    /// It takes none now; [`Input::Writable`] will say when it does.
    Blocked,
    /// It is gone.
    Lost,
}

/// Something to be done at a certain time, besides what the wheel holds.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Timer {
    /// The end of an owned stream's lingering; where a poll is due at the same time, it is not begun.
    Linger { index: u32, generation: u32 },
    /// A poll of an owned stream.
    Poll { index: u32, generation: u32 },
    /// A rated subscriber may get its next event.
    Rated { connection: u32, generation: u32, slot: u16 },
    /// A topic that nobody watches may be let go of.
    Topic { index: u32 },
    /// What a subject has left may be polled no more.
    Places { holder: Holder },
    /// An ephemeral session may have outlived its time, or its watchers.
    Ephemeral { id: EphemeralId },
    /// The ephemeral sessions with connections here are kept where processes share them.
    KeepEphemerals,
}

/// One core's state.
#[derive(Debug)]
pub struct Shard {
    core: CoreId,
    cores: u16,
    options: Arc<Options>,
    ledger: Arc<Ledger>,
    metrics: Arc<CoreMetrics>,
    verifier: Verifier,
    api_keys: Arc<ApiKeys>,
    /// Tokens that it has verified.
    tokens: TokenCache,
    rights: RightsTable,
    rng: Rng,
    now: Now,

    connections: Slab<Connection>,
    generation: u32,
    wheel: Wheel,
    timers: BinaryHeap<Reverse<(Instant, Timer)>>,

    topics: Slab<Topic>,
    topic_of: HashMap<Arc<StreamKey>, u32>,
    streams: Slab<Owned>,
    stream_of: HashMap<PolledKey, u32>,
    /// The places of all that is polled of one stream: one for each filled-in URL.
    streams_of: HashMap<StreamId, BTreeSet<u32>>,
    /// The same by the hash of what is polled, for those who know no more of it.
    stream_at: HashMap<u64, u32>,
    /// When those were polled that are forgotten.
    starts: Starts,
    /// Bytes of values and histories of the streams owned here,
    history_bytes: u64,
    /// and how many of them are of streams that callers have described.
    direct_bytes: u64,

    outputs: VecDeque<Output>,
    /// Connections that have something to send besides what sweeps give them.
    ready: VecDeque<u32>,
    /// Renditions that have something new: topic and kind.
    dirty: VecDeque<(u32, u8)>,
    swept_at: Instant,
    /// Scratch for a send of several subscriptions' frames.
    joint: Joint,
    meter: Rc<Meter>,
    encoder: Encoder,
    inflater: Inflater,
    /// Mail to this very core.
    inbox: VecDeque<Mail>,
    /// The next connection to be told to go, while draining.
    draining: Option<Draining>,
    /// The next connection whose deadlines are to be looked at again.
    recheck: Option<u32>,
    /// Whether grants are to be judged by a new configuration meanwhile.
    rejudge: bool,
    /// Connections whose API key was deleted or changed, which are still to be judged by that.
    rekeyed: VecDeque<ConnectionKey>,
    /// What the wall clock was set to, by which what is heard may be dated.
    clock_steps: Steps,
    /// Connections to streams that were changed or deleted, which are still to be moved or told.
    moved: VecDeque<ConnectionKey>,
    /// What was heard of logouts, revocations and permissions, and is still to be carried out.
    passes: Passes,
    /// HTTP requests that wait for another core's answer.
    asks: HashMap<u64, ConnectionKey>,
    /// What other processes have asked of this core lately.
    heard: Heard,
    /// What is done with the answers of those outside of the cores.
    looked_up: HashMap<u64, Asked>,
    /// The number of the question that is out for a key.
    keys_asked: HashMap<LackedKey, u64>,
    /// Actions that are under way.
    acting: HashMap<u64, Acting>,
    /// When the log was last told of each action's failures.
    action_told: HashMap<String, Instant>,
    sessions: Sessions,
    /// The places of the connections that live by each ephemeral session.
    ephemeral_connections: HashMap<EphemeralId, Vec<ephemeral::Living>>,
    /// What is asked about those that processes share.
    shared_sessions: SharedSessions,
    /// The number of the last question, of any kind.
    ask_no: u64,
}

#[derive(Clone, Copy, Debug)]
struct Draining {
    next: u32,
    until: Instant,
    told: bool,
}

impl Shard {
    /// The shard of core `core` of `cores`. `seed` is from the operating system's random numbers, another for each.
    pub fn new(
        core: CoreId,
        cores: u16,
        options: Arc<Options>,
        ledger: Arc<Ledger>,
        metrics: Arc<CoreMetrics>,
        seed: [u8; 32],
        now: Now,
    ) -> Shard {
        let encoder = Encoder::new(Arc::clone(&metrics));
        let rng = Rng::new(seed);
        let mut shard = Shard {
            core,
            cores,
            verifier: Verifier::new(options.auth.jwt.clone()),
            api_keys: Arc::default(),
            tokens: TokenCache::new(options.auth.token_cache, rng.secret("verified tokens")),
            options,
            ledger,
            metrics,
            rights: RightsTable::default(),
            rng,
            now,
            connections: Slab::default(),
            generation: 0,
            wheel: Wheel::new(now.at),
            timers: BinaryHeap::new(),
            topics: Slab::default(),
            topic_of: HashMap::new(),
            streams: Slab::default(),
            stream_of: HashMap::new(),
            streams_of: HashMap::new(),
            stream_at: HashMap::new(),
            starts: Starts::default(),
            history_bytes: 0,
            direct_bytes: 0,
            outputs: VecDeque::new(),
            ready: VecDeque::new(),
            dirty: VecDeque::new(),
            swept_at: Instant::default(),
            joint: Joint::default(),
            meter: Rc::default(),
            encoder,
            inflater: Inflater::default(),
            inbox: VecDeque::new(),
            draining: None,
            recheck: None,
            rejudge: false,
            rekeyed: VecDeque::new(),
            clock_steps: Steps::default(),
            moved: VecDeque::new(),
            passes: Passes::default(),
            asks: HashMap::new(),
            heard: Heard::default(),
            looked_up: HashMap::new(),
            keys_asked: HashMap::new(),
            acting: HashMap::new(),
            action_told: HashMap::new(),
            sessions: Sessions::default(),
            ephemeral_connections: HashMap::new(),
            shared_sessions: SharedSessions::default(),
            ask_no: 0,
        };
        // The first core's is the process's.
        shard.ledger.keep_direct_key(|| shard.direct_key());
        shard.share_bounds();
        shard.warm();
        shard.turn_inbox();
        shard
    }

    /// Takes in something that happened at `now`.
    pub fn handle(&mut self, now: Now, input: Input<'_>) {
        self.now = now;
        if !matches!(input, Input::Control(_)) {
            // What was heard before is carried out before.
            self.control_turn();
        }
        match input {
            Input::Received { connection, bytes } => self.received(connection, bytes),
            Input::PeerFinished { connection } => self.peer_finished(connection),
            Input::Lost { connection } => self.lose(connection),
            Input::Writable { connection } => self.writable(connection),
            Input::Fetched { stream, poll, result } => self.fetched(stream, poll, result),
            Input::Compared(compared) => self.compared(*compared),
            Input::Mail(mail) => self.mail(mail),
            Input::Acted { ask, result } => self.acted(ask, result),
            Input::Found { ask, found } => self.found(ask, found),
            Input::PeerRenewal { connection, sealed, ask } => self.peer_asks_to_renew(connection, &sealed, ask),
            Input::PeerHook { id, sealed } => self.peer_was_hooked(&id, &sealed),
            Input::PeerRefresh(refreshed) => self.peer_has_refreshed(&refreshed),
            Input::Control(concerned) => self.control(&concerned),
            Input::StoreState { up } => {
                self.store_state(up);
                if up {
                    self.keep_ephemerals();
                }
            }
            Input::Timeout => self.timeout(),
            Input::ClockMoved => {
                self.clock_steps.was_set(self.now);
                // The store's clock may have been stepped as well: what it holds is read anew.
                self.reread_all();
                self.recheck = Some(0);
            }
            Input::Drain => self.begin_drain(),
            Input::Reload(options) => self.reload(options),
            Input::Catalog { options, changed } => self.take_catalog(options, &changed),
            Input::Refresh(id) => self.refresh_stream(&id),
            Input::ApiKeys(keys) => self.take_api_keys(keys),
            Input::KeySets(sets) => self.trust_key_sets(sets),
        }
        self.turn_inbox();
        self.drop_unused_sessions();
    }

    /// The next thing to be done outside; `None` when there is nothing more for now.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`Shard::handle`] with [`Input::Timeout`] (or [`Shard::transmit`]) if nothing else happens before.
    pub fn next_timeout(&self) -> Option<Instant> {
        let swept = (!self.dirty.is_empty()).then(|| self.swept_at + fanout::PUBLISH_TICK);
        let now = (self.recheck.is_some() || self.drains_now() || !self.ready.is_empty()).then_some(self.now.at);
        let drained = self.draining.filter(|draining| !draining.told).map(|draining| draining.until);
        let timer = self.timers.peek().map(|Reverse((at, _))| *at);
        [swept, now, timer, self.wheel.next_timeout(), self.sessions.next_timeout(), drained, self.pass_due()]
            .into_iter()
            .flatten()
            .min()
    }

    /// How often upstreams may be asked, by all cores together.
    pub fn budgets(&self) -> &Arc<Budgets> {
        self.ledger.budgets()
    }

    /// How long a socket may take nothing.
    pub fn write_stall(&self) -> Duration {
        self.options.limits.write_stall
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Whether this place is held by the connection of that generation.
    pub fn is_live(&self, key: ConnectionKey) -> bool {
        self.connections.at(key.index).is_some_and(|connection| connection.generation == key.generation)
    }

    /// The connection at that place.
    pub fn key_at(&self, index: u32) -> Option<ConnectionKey> {
        self.key_of(index)
    }

    /// After a fault of ours while frames were sent: what it happened at is passed over, so that it does not happen again
    /// and again; its readers get the next event.
    pub fn skip_faulty(&mut self) {
        if let Some((topic, kind)) = self.dirty.pop_front()
            && let Some(topic) = self.topics.at_mut(topic)
            && let Some(rendition) = &mut topic.renditions[usize::from(kind)]
        {
            rendition.sweep = None;
            rendition.queued = false;
        }
    }

    /// Ends a connection whose handling has failed by a fault of ours: 1011 where it can still be told.
    pub fn fail(&mut self, key: ConnectionKey) {
        if self.is_live(key) {
            self.close(key.index, crate::codec::message::CloseReason::Internal);
        }
    }

    fn key_of(&self, index: u32) -> Option<ConnectionKey> {
        Some(ConnectionKey { index, generation: self.connections.at(index)?.generation })
    }

    fn set_timer(&mut self, at: Instant, timer: Timer) {
        self.timers.push(Reverse((at, timer)));
    }

    /// This core's part of the bounds that hold for the process.
    fn share_bounds(&mut self) {
        let cores = u64::from(self.cores.max(1));
        self.meter.logged_max.set(self.options.limits.history_bytes_total / cores);
    }

    fn turn_inbox(&mut self) {
        while let Some(mail) = self.inbox.pop_front() {
            self.mail(mail);
        }
    }
}
