//! One core's loop: events in, the shard's answers out, in bounded turns; sleeps in the ring in between.
//!
//! Source: ARCHITECTURE.md. Memory: one scratch buffer, and what the shard holds. Errors: a panic costs the connection or
//! poll it came from; a core that ends by itself ends the process.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

use monoio::net::TcpStream;
use rustix::event::{EventfdFlags, eventfd};

use crate::auth::marks::Concerned;
use crate::auth::sealed::Heard;
use crate::config::LogLevel;
use crate::ids::{ConnectionKey, CoreId, ProcessId};
use crate::limits::{self, INLINE_DIFF_BYTES_MAX};
use crate::metrics::{CoreMetrics, KeySetFetch};
use crate::shard::{Found, Input, Lookup, Notice, Output, Shard};
use crate::stream::action::ActResult;
use crate::stream::poll::{FetchError, FetchResult, PollNo, UpstreamCode};
use crate::time::{Instant, Now};

use super::clock::{self, StepWatch};
use super::fetch::{Egress, Fetcher, FetcherOptions, Followers};
use super::guarded::Guarded;
use super::jwks::{Asked, FETCHING_CORE, Issuers, Job, Question};
use super::log;
use super::mailbox::{Full, Mailbox, Message};
use super::oauth::Tokens;
use super::redis::Store;
use super::resolver::Resolver;
use super::session::{INTERNAL_ERROR_ALERT, Received, Shake};
use super::sockets::{AcceptError, Lost, Ready, Sockets};
use super::tls::Tls;
use super::workers::Workers;

/// Connections accepted in one turn.
const ACCEPTS_PER_TURN: usize = 64;
/// Reads of one connection in one turn.
const READS_PER_TURN: usize = 4;
/// Flights of TLS handshakes made in one turn. One may cost a signature and a key exchange: 0.3 ms with ECDSA, 1 ms with
/// RSA of 2048 bits; deliveries wait no longer for them than for a turn of sends.
const FLIGHTS_PER_TURN: usize = 4;
/// How long a turn goes on with handshakes: what costs time without being a flight of ours (a key exchange that ends one,
/// a signature that is none) is bounded by this.
const SHAKING_TIME: Duration = Duration::from_micros(1_500);
/// How long a turn hears sockets (accepts, reads, handshakes) while frames are being sent: about a fifth of what the sends
/// of a turn take, so that thousands who come or go at once hold up those who are served by no more. Whoever has bytes
/// waits in the kernel or in the turn's own list.
const HEARING_TIME_WHILE_SENDING: Duration = Duration::from_micros(700);
/// Connections in a handshake that are read in one turn, whether it gets on or not.
const SHAKING_READS_PER_TURN: usize = 256;
/// First flights that may wait for their turn, 0.1 s of work or so: past it nobody is accepted. Whoever waits in the kernel's
/// backlog has not begun to use up `limits.handshake_timeout`.
const SHAKING_MAX: usize = 64;
/// Bytes read at once.
const SCRATCH_BYTES: usize = 64 << 10;
/// How long accepting pauses where there are no descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Longest sleep: the clocks are compared at least so often.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// What the cores of a process share.
#[derive(Debug)]
pub struct Process {
    /// Its name among those that share a Redis.
    pub id: ProcessId,
    /// The questions for lists that were asked and answered lately.
    pub lists_heard: Mutex<Heard>,
    /// Every core's mailbox, by its number.
    pub mailboxes: Vec<Arc<Mailbox>>,
    /// Whether it serves: before that it reads what was said while it was away.
    pub serving: AtomicBool,
    /// Whether the process drains.
    pub draining: AtomicBool,
    /// Cores whose connections are all gone.
    pub drained: AtomicU16,
    /// The comparison workers.
    pub workers: Workers,
    /// The issuers whose key sets are fetched.
    pub issuers: Issuers,
    /// Tokens for upstreams.
    pub tokens: Arc<Tokens>,
    /// Which way requests to upstreams leave.
    pub egress: Arc<Egress>,
    /// Redis, where it is configured.
    pub store: Option<Store>,
}

impl Process {
    /// Answers who has asked for a key set: what there is now is in force.
    pub fn answer(&self, question: Question) {
        let mut message = Message::Found { ask: question.ask, found: Found::KeySet };
        // For threads outside of the cores, which have the time.
        while let Err(Full(back)) = self.mailboxes[usize::from(question.core.0)].post(message) {
            message = back;
            clock::hold_thread(Duration::from_millis(1));
        }
    }
}

/// What one core starts with.
pub struct CoreParts {
    /// Its number.
    pub core: CoreId,
    /// What the cores share.
    pub process: Arc<Process>,
    /// Its state.
    pub shard: Shard,
    /// Its listener.
    pub listener: std::net::TcpListener,
    /// What its connections speak, where it is TLS.
    pub tls: Option<Arc<Tls>>,
    /// Its counters.
    pub metrics: Arc<CoreMetrics>,
    /// Whether monoio runs on io_uring here.
    pub uring: bool,
    /// Told when it has all that it opens, and waits for [`Message::Serve`]; dropped where it never does.
    pub up: std::sync::mpsc::Sender<()>,
}

/// Polls and actions that have ended, for the loop to take in.
#[derive(Default)]
struct Fetched {
    results: VecDeque<Ended>,
    key_sets: VecDeque<(Job, FetchResult)>,
    waker: Option<Waker>,
}

/// What has ended, and how.
enum Ended {
    Poll(u32, PollNo, FetchResult),
    Action(u64, ActResult),
}

impl Fetched {
    fn push(&mut self, ended: Ended) {
        self.results.push_back(ended);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// A core at work.
struct Core {
    core: CoreId,
    process: Arc<Process>,
    shard: Shard,
    sockets: Sockets,
    metrics: Arc<CoreMetrics>,
    fetcher: Fetcher,
    followers: Followers,
    fetched: Rc<RefCell<Fetched>>,
    scratch: Vec<u8>,
    /// What sockets have told and nobody has looked at yet.
    ready: VecDeque<Ready>,
    /// Whether the last turn left frames to be sent.
    sending: bool,
    /// Sockets with bytes that were left for another turn.
    unread: VecDeque<ConnectionKey>,
    /// Connections that have begun a TLS handshake: their first flight waits to be read.
    shaking: VecDeque<ConnectionKey>,
    /// Connections whose client has answered the server's flight. They go first: their handshakes are all but paid for.
    answered: VecDeque<ConnectionKey>,
    /// The version of the key sets that the shard goes by.
    key_sets: u64,
    accept_at: Option<crate::time::Instant>,
    /// Mail that found its mailbox full.
    undelivered: VecDeque<(CoreId, Message)>,
    steps: StepWatch,
    drained: bool,
}

/// Runs a core until the process has drained. To be called inside the core's runtime.
///
/// # Errors
/// The system's, at start.
pub async fn run(parts: CoreParts, resolver: &Resolver) -> std::io::Result<()> {
    let CoreParts { core, process, shard, listener, tls, metrics, uring, up } = parts;
    let mailbox = Arc::clone(&process.mailboxes[usize::from(core.0)]);
    let tls = tls.map(|tls| (tls.config(), Arc::clone(&metrics)));
    let sockets = Sockets::new(listener, mailbox.bell(), tls, SCRATCH_BYTES)?;
    let epoll = as_stream(sockets.fd().try_clone_to_owned()?)?;
    let always = as_stream(eventfd(1, EventfdFlags::CLOEXEC)?)?;
    let fetcher = Fetcher::new(FetcherOptions::default(), resolver.handle()?);
    let fetcher = fetcher.with_tokens(Arc::clone(&process.tokens), Arc::clone(&metrics));
    let fetcher = fetcher.with_budgets(Arc::clone(shard.budgets())).with_egress(Arc::clone(&process.egress));
    let mut this = Core {
        core,
        process,
        shard,
        sockets,
        metrics,
        fetcher,
        followers: Followers::default(),
        fetched: Rc::default(),
        scratch: vec![0; SCRATCH_BYTES],
        ready: VecDeque::new(),
        sending: false,
        unread: VecDeque::new(),
        shaking: VecDeque::new(),
        answered: VecDeque::new(),
        key_sets: 0,
        accept_at: None,
        undelivered: VecDeque::new(),
        steps: StepWatch::new(clock::now()),
        drained: false,
    };
    this.sockets.set_write_stall(this.shard.write_stall());
    // Whoever connects before waits in the kernel's backlog.
    this.sockets.pause_accepting(true);
    this.outputs();
    let mut readable: Pin<Box<dyn Future<Output = _>>> = Box::pin(epoll.readable(false));
    let mut rung = false;
    // It has all that it opens.
    let _ = up.send(());
    drop(up);
    loop {
        mailbox.awake(rung);
        let begun = clock::now();
        let mut more = this.turn(begun, &mut rung);
        this.metrics.loop_latency.observe(clock::now().at.since(begun.at));
        if this.drained && this.sockets.next_timeout().is_none() {
            break;
        }
        if !more && !mailbox.may_sleep() {
            more = true;
        }
        if more {
            // Through the ring, never by waking itself: timers and upstream sockets get their turn.
            if uring {
                let _ = always.readable(false).await;
            } else {
                monoio::time::sleep(Duration::from_micros(100)).await;
            }
            continue;
        }
        let wait = this.wait(clock::now());
        let mut timer = Box::pin(monoio::time::sleep(wait));
        let fetched = Rc::clone(&this.fetched);
        poll_fn(|cx| {
            if readable.as_mut().poll(cx).is_ready() {
                readable = Box::pin(epoll.readable(false));
                return Poll::Ready(());
            }
            if timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            let mut fetched = fetched.borrow_mut();
            if !fetched.results.is_empty() || !fetched.key_sets.is_empty() {
                return Poll::Ready(());
            }
            fetched.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
    this.process.drained.fetch_add(1, Ordering::SeqCst);
    // An endpoint that was asked may have taken the old refresh token back: its answer has the only one that is good. A fourth of
    // the time is left for what else the process does at its end.
    let left = this.shard.drains_until().map_or(Duration::ZERO, |until| until.since(clock::now().at));
    this.fetcher.exchanges_end((left - left / 4).min(limits::OAUTH_TIMEOUT)).await;
    Ok(())
}

/// A descriptor that monoio can wait for; nothing is ever read from it or written to it by this.
fn as_stream(fd: OwnedFd) -> std::io::Result<TcpStream> {
    TcpStream::from_std(std::net::TcpStream::from(fd))
}

impl Core {
    /// Everything there is to do now, in bounded parts; whether something is left that could be done at once.
    fn turn(&mut self, now: Now, rung: &mut bool) -> bool {
        *rung = false;
        if self.steps.stepped(now) {
            self.metrics.clock_steps.count();
            self.guarded(now, None, Input::ClockMoved);
        }
        self.post_undelivered();
        let mut more = self.take_messages(now);
        let hears_until = self.sending.then(|| clock::now().at + HEARING_TIME_WHILE_SENDING);
        if self.ready.is_empty() {
            more |= self.sockets.poll(&mut self.ready);
        }
        // One at least, so that everybody gets on.
        while let Some(event) = self.ready.pop_front() {
            match event {
                Ready::Listener => more |= self.accept(now, hears_until),
                Ready::Bell => *rung = true,
                Ready::Socket { key, readable, writable, ended } => {
                    if writable && self.sockets.holds(key) {
                        self.writable(now, key);
                    }
                    if readable {
                        self.read_in_turn(now, key, ended);
                    }
                }
            }
            if is_over(hears_until) {
                break;
            }
        }
        more |= !self.ready.is_empty();
        for _ in 0..self.unread.len() {
            if let Some(key) = self.unread.pop_front()
                && self.sockets.holds(key)
            {
                self.read_in_turn(now, key, true);
            }
            if is_over(hears_until) {
                break;
            }
        }
        self.shake(now, hears_until);
        let sockets = &mut self.sockets;
        guarded(&self.metrics, || sockets.turn_left(now.at));
        if self.accept_at.is_some_and(|at| at <= now.at) {
            self.accept_at = None;
            self.sockets.pause_accepting(false);
        }
        loop {
            let next = self.fetched.borrow_mut().results.pop_front();
            match next {
                None => break,
                Some(Ended::Poll(stream, poll, result)) => {
                    self.guarded(now, None, Input::Fetched { stream, poll, result });
                }
                Some(Ended::Action(ask, result)) => self.guarded(now, None, Input::Acted { ask, result }),
            }
        }
        if self.core == FETCHING_CORE {
            self.fetch_key_sets(now);
        }
        let now = clock::now();
        if self.shard.next_timeout().is_some_and(|at| at <= now.at) {
            self.guarded(now, None, Input::Timeout);
        }
        self.outputs();
        let transmitted = catch_unwind(AssertUnwindSafe(|| self.shard.transmit(now, &mut self.sockets)));
        self.sending = transmitted.unwrap_or_else(|_| {
            self.metrics.panics.count();
            let _ = catch_unwind(AssertUnwindSafe(|| self.shard.skip_faulty()));
            true
        });
        more |= self.sending;
        self.outputs();
        let shaking = !self.shaking.is_empty() || !self.answered.is_empty();
        more || shaking || !self.unread.is_empty() || !self.undelivered.is_empty()
    }

    /// Gives the shard an input. A panic is the connection's end, if it is one's; the core goes on.
    fn guarded(&mut self, now: Now, key: Option<ConnectionKey>, input: Input<'_>) {
        let shard = &mut self.shard;
        if catch_unwind(AssertUnwindSafe(|| shard.handle(now, input))).is_err() {
            self.metrics.panics.count();
            log::write(
                LogLevel::Error,
                &[("core", &self.core.0)],
                "A fault of the server ended one connection or poll.",
            );
            if let Some(key) = key {
                let _ = catch_unwind(AssertUnwindSafe(|| self.shard.fail(key)));
            }
        }
        self.outputs();
    }

    fn take_messages(&mut self, now: Now) -> bool {
        let process = Arc::clone(&self.process);
        if process.mailboxes[usize::from(self.core.0)].take_everyone() {
            self.guarded(now, None, Input::Control([Concerned::Everyone].into()));
        }
        for message in process.mailboxes[usize::from(self.core.0)].take() {
            match message {
                Message::Mail(mail) => self.guarded(now, None, Input::Mail(mail)),
                Message::Found { ask, found } => self.guarded(now, None, Input::Found { ask, found }),
                Message::PeerRenewal { connection, sealed, ask } => {
                    self.guarded(now, None, Input::PeerRenewal { connection, sealed, ask });
                }
                Message::PeerHook { id, sealed } => self.guarded(now, None, Input::PeerHook { id, sealed }),
                Message::PeerRefresh(refreshed) => self.guarded(now, None, Input::PeerRefresh(refreshed)),
                Message::StoreState { up } => self.guarded(now, None, Input::StoreState { up }),
                Message::Acted { ask, result } => self.guarded(now, None, Input::Acted { ask, result }),
                Message::Compared(compared) => self.guarded(now, None, Input::Compared(compared)),
                Message::Control(concerned) => self.guarded(now, None, Input::Control(concerned)),
                // Whoever has asked may have gone.
                Message::List { query, reply } => drop(reply.try_send(self.shard.list(&query))),
                Message::Reload(options) => {
                    self.guarded(now, None, Input::Reload(options));
                    self.sockets.set_write_stall(self.shard.write_stall());
                }
                Message::Catalog { options, changed } => {
                    self.guarded(now, None, Input::Catalog { options, changed });
                }
                Message::Refresh(id) => self.guarded(now, None, Input::Refresh(id)),
                Message::ApiKeys(keys) => self.guarded(now, None, Input::ApiKeys(keys)),
                // Some may have been asked for while they were on their way.
                Message::KeySets(sets) if sets.version() <= self.key_sets => {}
                Message::KeySets(sets) => {
                    self.key_sets = sets.version();
                    self.guarded(now, None, Input::KeySets(sets));
                }
                // It was woken, and looks in this turn.
                Message::FetchKeySets => {}
                Message::Serve => self.sockets.pause_accepting(false),
                Message::Way => self.followers.leave_old_ways(&self.fetcher),
                Message::Drain => {
                    self.sockets.stop_listening();
                    self.guarded(now, None, Input::Drain);
                }
            }
        }
        false
    }

    /// Accepts those who wait; whether there may be more of them.
    fn accept(&mut self, now: Now, hears_until: Option<Instant>) -> bool {
        for accepted in 0..ACCEPTS_PER_TURN {
            if accepted > 0 && is_over(hears_until) {
                return true;
            }
            if self.shaking.len() > SHAKING_MAX {
                // The queue keeps the core awake, and the listener is told of in each turn for as long as somebody waits.
                return true;
            }
            match self.sockets.accept() {
                Ok((socket, peer)) => match self.shard.accept(now, peer) {
                    Ok(key) => {
                        let proxied = self.shard.may_be_proxied(key.index);
                        if self.sockets.insert(key, socket, proxied).is_err() {
                            self.guarded(now, Some(key), Input::Lost { connection: key.index });
                        }
                    }
                    Err(_) if self.sockets.is_secure() => refuse(&socket, &INTERNAL_ERROR_ALERT, &mut self.scratch),
                    Err(canned) => refuse(&socket, &canned.bytes(), &mut self.scratch),
                },
                Err(AcceptError::Empty) => return false,
                Err(AcceptError::Other) => self.metrics.accept_errors.count(),
                Err(AcceptError::Exhausted(error)) => {
                    self.metrics.accept_errors.count();
                    self.metrics.accept_pauses.count();
                    let sentence = "Accepting pauses for want of descriptors or memory: raise LimitNOFILE or lower limits.connections.";
                    log::write(LogLevel::Warn, &[("core", &self.core.0), ("error", &error)], sentence);
                    self.sockets.pause_accepting(true);
                    self.accept_at = Some(now.at + ACCEPT_PAUSE);
                    return false;
                }
            }
        }
        true
    }

    /// A socket takes more.
    fn writable(&mut self, now: Now, key: ConnectionKey) {
        let sockets = &mut self.sockets;
        match guarded(&self.metrics, || sockets.flush(key.index)).unwrap_or(Err(Lost)) {
            Ok(true) => self.guarded(now, Some(key), Input::Writable { connection: key.index }),
            Ok(false) => {}
            Err(Lost) => self.guarded(now, Some(key), Input::Lost { connection: key.index }),
        }
    }

    /// Reads what a socket has, or lets it wait where that may be a handshake.
    fn read_in_turn(&mut self, now: Now, key: ConnectionKey, ended: bool) {
        let shake = if self.sockets.holds(key) { self.sockets.shake(key.index) } else { None };
        match shake {
            None => self.read(now, key, ended),
            Some(_) if self.sockets.set_queued(key.index, true) => {}
            Some(Shake::Begun) => self.shaking.push_back(key),
            Some(Shake::Answered) => self.answered.push_back(key),
        }
    }

    /// Goes on with some of the handshakes that have bytes to be read: first with those that are nearest to their end. One
    /// of either kind gets its turn whatever the other has cost, so that none stands still for the other's sake.
    fn shake(&mut self, now: Now, hears_until: Option<Instant>) {
        if self.shaking.is_empty() && self.answered.is_empty() {
            return;
        }
        let before = self.sockets.flights();
        let until = hears_until.unwrap_or_else(|| clock::now().at + SHAKING_TIME);
        for kind in [Shake::Answered, Shake::Begun] {
            let mut read = 0;
            while read < SHAKING_READS_PER_TURN {
                let made = self.sockets.flights().wrapping_sub(before);
                if read > 0 && (made >= FLIGHTS_PER_TURN || is_over(Some(until))) {
                    break;
                }
                let waiting = match kind {
                    Shake::Answered => &mut self.answered,
                    Shake::Begun => &mut self.shaking,
                };
                let Some(key) = waiting.pop_front() else { break };
                // Those that are gone meanwhile cost nothing.
                if self.sockets.holds(key) {
                    self.sockets.set_queued(key.index, false);
                    self.read(now, key, true);
                    read += 1;
                }
            }
        }
    }

    /// Reads what a socket has, as long as the shard wants it and the turn lasts. `ended`: its end may stand behind the bytes.
    fn read(&mut self, now: Now, key: ConnectionKey, ended: bool) {
        let index = key.index;
        for _ in 0..READS_PER_TURN {
            if !self.sockets.holds(key) {
                return;
            }
            if !self.shard.wants_bytes(index) {
                // No further event will tell of what is there: it is remembered until the shard asks for it.
                self.sockets.set_unread(index, true);
                return;
            }
            let mut scratch = std::mem::take(&mut self.scratch);
            let (sockets, shard) = (&mut self.sockets, &mut self.shard);
            let mut admit = |client| shard.admit(now, index, client);
            let received = guarded(&self.metrics, || sockets.receive(index, &mut scratch, &mut admit));
            let received = received.unwrap_or(Received::Lost);
            // Whoever has sent this may have been told before that a key is deleted, or a stream made, and turns can be long.
            if self.process.mailboxes[usize::from(self.core.0)].is_ordered() {
                self.take_messages(now);
                if !self.sockets.holds(key) {
                    self.scratch = scratch;
                    return;
                }
            }
            match received {
                Received::Bytes(count) => {
                    self.guarded(now, Some(key), Input::Received { connection: index, bytes: &mut scratch[..count] });
                }
                Received::Nothing | Received::Held => {}
                Received::Finished => self.guarded(now, Some(key), Input::PeerFinished { connection: index }),
                Received::Lost => self.guarded(now, Some(key), Input::Lost { connection: index }),
            }
            self.scratch = scratch;
            match received {
                // All there was. What comes from now on, an end included, is an event of its own (epoll(7), «edge-triggered»):
                // a second call that finds nothing is saved. Not over TLS, where a read ends with its record.
                Received::Bytes(count) if count < SCRATCH_BYTES && !ended && !self.sockets.is_secure() => return,
                Received::Bytes(_) | Received::Held => {}
                Received::Nothing | Received::Finished | Received::Lost => return,
            }
        }
        if self.sockets.holds(key) {
            self.unread.push_back(key);
        }
    }

    /// Does what the shard wants done.
    fn outputs(&mut self) {
        while let Some(output) = self.shard.poll_output() {
            match output {
                Output::Fetch { stream, poll, request, leave, under_way } => {
                    let (fetcher, fetched) = (self.fetcher.clone(), Rc::clone(&self.fetched));
                    let metrics = Arc::clone(&self.metrics);
                    monoio::spawn(async move {
                        let result = Guarded(Box::pin(fetcher.poll(request, leave, clock::now))).await;
                        let result = result.unwrap_or_else(|| faulty(&metrics, "poll"));
                        under_way.end(clock::now().at, &result);
                        fetched.borrow_mut().push(Ended::Poll(stream, poll, result));
                    });
                }
                Output::Act { ask, call } => {
                    let (fetcher, fetched) = (self.fetcher.clone(), Rc::clone(&self.fetched));
                    let (metrics, process) = (Arc::clone(&self.metrics), Arc::clone(&self.process));
                    let core = usize::from(self.core.0);
                    monoio::spawn(async move {
                        let options = Arc::clone(&call.options);
                        let result = Guarded(Box::pin(fetcher.act(call, || clock::now().wall))).await;
                        let result = match result.unwrap_or_else(|| faulty(&metrics, "action")) {
                            Ok(response) if response.body.len() > INLINE_DIFF_BYTES_MAX => {
                                let mailbox = Arc::clone(&process.mailboxes[core]);
                                return process.workers.answer(ask, options, response, mailbox);
                            }
                            result => result.map(|response| options.answer(response)),
                        };
                        fetched.borrow_mut().push(Ended::Action(ask, result));
                    });
                }
                Output::Next { stream, poll, request, lane, held } => {
                    let (fetcher, fetched) = (self.fetcher.clone(), Rc::clone(&self.fetched));
                    let (metrics, followers) = (Arc::clone(&self.metrics), self.followers.clone());
                    monoio::spawn(async move {
                        let next = followers.next((stream, poll), (request, lane, held), &fetcher, clock::now);
                        let result = Guarded(Box::pin(next)).await.unwrap_or_else(|| faulty(&metrics, "poll"));
                        fetched.borrow_mut().push(Ended::Poll(stream, poll, result));
                    });
                }
                Output::Unfollow { stream, poll } => self.followers.forget(stream, poll),
                Output::Compare(comparison) => {
                    let mailbox = Arc::clone(&self.process.mailboxes[usize::from(self.core.0)]);
                    self.process.workers.compare(comparison, mailbox);
                }
                Output::LookUp { ask, lookup: Lookup::KeySet(place) } => {
                    let question = Question { core: self.core, ask };
                    match self.process.issuers.ask(place, question, self.key_sets, clock::now()) {
                        Asked::Behind(sets) => {
                            self.post(self.core, Message::KeySets(sets));
                            self.post(self.core, Message::Found { ask, found: Found::KeySet });
                        }
                        Asked::Answered => self.post(self.core, Message::Found { ask, found: Found::KeySet }),
                        Asked::Waits { tell: true } => self.post(FETCHING_CORE, Message::FetchKeySets),
                        Asked::Waits { tell: false } => {}
                    }
                }
                Output::LookUp { ask, lookup } => {
                    if !self.process.store.as_ref().is_some_and(|store| store.ask(self.core, ask, lookup)) {
                        self.post(self.core, Message::Found { ask, found: Found::Unavailable });
                    }
                }
                Output::Order(order) => {
                    if let Some(store) = &self.process.store {
                        store.order(order);
                    }
                }
                Output::Mail { to, mail } => self.post(to, Message::Mail(mail)),
                Output::Finish { connection } => {
                    let sockets = &mut self.sockets;
                    if guarded(&self.metrics, || sockets.finish(connection)).is_none() {
                        let key = self.shard.key_at(connection);
                        self.guarded(clock::now(), key, Input::Lost { connection });
                    }
                }
                Output::Close { connection, reset } => {
                    let (stall, sockets) = (self.shard.write_stall(), &mut self.sockets);
                    guarded(&self.metrics, || sockets.close(connection, reset, stall, clock::now().at));
                }
                Output::Resume { connection } => {
                    if self.sockets.set_unread(connection, false)
                        && let Some(key) = self.shard.key_at(connection)
                    {
                        self.unread.push_back(key);
                    }
                }
                Output::Drained => {
                    self.drained = true;
                    self.sockets.hurry_left(clock::now().at);
                }
                Output::Notice(notice) => tell(&notice),
            }
        }
    }

    /// Takes in the key sets that were fetched, and begins the fetches that are due.
    fn fetch_key_sets(&mut self, now: Now) {
        loop {
            let next = self.fetched.borrow_mut().key_sets.pop_front();
            let Some((job, result)) = next else { break };
            let finished = self.process.issuers.finish(&job, result, now);
            let result = if finished.brought { KeySetFetch::Ok } else { KeySetFetch::Failed };
            self.metrics.key_set_fetches.of(result).count();
            if let Some(sets) = finished.sets {
                for core in 0..self.process.mailboxes.len() {
                    let to = CoreId(u16::try_from(core).unwrap_or(u16::MAX));
                    self.post(to, Message::KeySets(Arc::clone(&sets)));
                }
            }
            // Behind the sets, so that those are in force when it is looked at again.
            for Question { core, ask } in finished.answered {
                self.post(core, Message::Found { ask, found: Found::KeySet });
            }
        }
        if !self.process.issuers.is_due(now.at) {
            return;
        }
        for job in self.process.issuers.begin(now) {
            let (fetcher, fetched) = (self.fetcher.clone(), Rc::clone(&self.fetched));
            let metrics = Arc::clone(&self.metrics);
            monoio::spawn(async move {
                let result = Guarded(Box::pin(fetcher.fetch(job.request.clone(), || clock::now().wall))).await;
                let result = result.unwrap_or_else(|| {
                    metrics.panics.count();
                    let detail = "a fault of the server ended the fetch".to_owned();
                    Err(FetchError { code: UpstreamCode::Protocol, detail })
                });
                let mut fetched = fetched.borrow_mut();
                fetched.key_sets.push_back((job, result));
                if let Some(waker) = fetched.waker.take() {
                    waker.wake();
                }
            });
        }
    }

    fn post(&mut self, to: CoreId, message: Message) {
        if !self.undelivered.is_empty() {
            self.undelivered.push_back((to, message));
        } else if let Err(Full(message)) = self.process.mailboxes[usize::from(to.0)].post(message) {
            self.metrics.mailbox_full.count();
            self.undelivered.push_back((to, message));
        }
        // An event that cannot be kept for a core is told by the next one, which does not follow on: the copy is fetched anew.
        if self.undelivered.len() > crate::limits::MAILBOX_MESSAGES_MAX {
            let lossy = |message: &Message| matches!(message, Message::Mail(mail) if mail.may_be_lost());
            self.undelivered.retain(|(_, message)| !lossy(message));
        }
    }

    fn post_undelivered(&mut self) {
        while let Some((to, message)) = self.undelivered.pop_front() {
            if let Err(Full(message)) = self.process.mailboxes[usize::from(to.0)].post(message) {
                self.undelivered.push_front((to, message));
                return;
            }
        }
    }

    fn wait(&self, now: Now) -> Duration {
        let key_sets = if self.core == FETCHING_CORE { self.process.issuers.next_timeout() } else { None };
        let until = [self.shard.next_timeout(), self.accept_at, self.sockets.next_timeout(), key_sets];
        let until = until.into_iter().flatten().min();
        until.map_or(SLEEP_MAX, |until| until.since(now.at)).min(SLEEP_MAX)
    }
}

/// Whether that moment has come, where there is one.
fn is_over(until: Option<Instant>) -> bool {
    until.is_some_and(|until| clock::now().at >= until)
}

/// What `act` gives; `None`: it panicked, which is counted. What it has left behind is a connection's that ends with it.
fn guarded<T>(metrics: &CoreMetrics, act: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(act)).inspect_err(|_| metrics.panics.count()).ok()
}

/// The result of a poll or an action that a fault of ours has ended.
fn faulty(metrics: &CoreMetrics, what: &str) -> FetchResult {
    metrics.panics.count();
    Err(FetchError { code: UpstreamCode::Protocol, detail: format!("a fault of the server ended the {what}") })
}

/// Sends a canned answer to one that is not served, and lets the socket go. What it has said so far is taken first: a
/// socket closed over unread bytes is reset, and the answer lost with it.
fn refuse(socket: &OwnedFd, answer: &[u8], scratch: &mut [u8]) {
    let _ = rustix::net::recv(socket, scratch, rustix::net::RecvFlags::DONTWAIT);
    let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
    let _ = rustix::net::send(socket, answer, flags);
    let _ = rustix::net::shutdown(socket.as_fd(), rustix::net::Shutdown::Write);
}

fn tell(notice: &Notice) {
    match notice {
        Notice::LongToken => {
            let sentence = "A token lives longer than auth.revocation_keep: after that time a logout or revocation no longer refuses it.";
            log::write(LogLevel::Warn, &[], sentence);
        }
        Notice::Action { kind, code, detail } => log::write(
            LogLevel::Warn,
            &[("action", kind), ("code", &code.as_str()), ("detail", detail)],
            "An action's upstream gave no answer.",
        ),
        Notice::View { stream, fault: Some(detail) } => {
            let fields: [(&str, &dyn std::fmt::Display); 2] = [("stream", stream), ("detail", detail)];
            log::write(LogLevel::Warn, &fields, "A view cannot be made of the value; the stream's others go on.");
        }
        Notice::View { stream, fault: None } => {
            log::write(LogLevel::Info, &[("stream", stream)], "A view that could not be made can be made again.");
        }
        Notice::Upstream { stream, status, detail } => {
            let state = status.state.as_str();
            let code = status.code.map_or("-", UpstreamCode::as_str);
            match status.code {
                None => {
                    log::write(LogLevel::Info, &[("stream", stream), ("state", &state)], "The upstream has recovered.")
                }
                Some(_) => {
                    let fields: [(&str, &dyn std::fmt::Display); 4] =
                        [("stream", stream), ("state", &state), ("code", &code), ("detail", detail)];
                    log::write(
                        LogLevel::Warn,
                        &fields,
                        "The upstream gives no value; the last good one stays in place.",
                    );
                }
            }
        }
    }
}
