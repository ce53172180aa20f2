//! Host names to addresses without blocking a core: `getaddrinfo` on a few helper threads, with a cache.
//!
//! A [`Resolver`] belongs to the process, a [`ResolverHandle`] to one core. Callers on any core that ask for the same name
//! share one lookup (a `Flight`); the core is woken through a socket pair that a task of its own listens to.
//! Names that callers have given are looked up apart from the operator's: by threads, a queue and a cache of their own, of
//! which each subject has its share. The process's other blocking chores, the system's certificates (`fetch::tls`) and
//! refresh tokens on their way to the disk (`fetch::token`), have threads of their own too: no name holds them up.
//!
//! Source: RFC 6761 section 6.3 for `localhost`; the order of addresses is `getaddrinfo`'s (RFC 6724).
//! Memory: two caches of at most `limits::RESOLVER_NAMES_MAX` names, `RESOLVER_ADDRESSES_MAX` addresses a name; what waits is
//! bounded by `helpers`; one waker per waiting caller.
//! Errors: [`ResolveError`].  Not here: which address is connected to (`fetch::connect`), time-outs (the caller's), threads
//! (`helpers`).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use monoio::time::Instant;

use super::helpers::{Bounds, Busy, Helpers, Job, Share};
use crate::ids::Holder;
use crate::limits::{
    FILE_QUEUE_MAX, FILE_THREADS_MAX, RESOLVER_ADDRESSES_MAX, RESOLVER_CALLERS_QUEUE_MAX, RESOLVER_CALLERS_THREADS_MAX,
    RESOLVER_FAILURE_TTL, RESOLVER_NAMES_MAX, RESOLVER_QUEUE_MAX, RESOLVER_SUBJECT_QUEUE_MAX,
    RESOLVER_SUBJECT_THREADS_MAX, RESOLVER_THREADS_MAX, RESOLVER_TTL,
};

/// What a name resolves to: one address or more, in the order they are to be tried.
pub type Answer = Result<Arc<[IpAddr]>, ResolveError>;

/// Why a name has no addresses.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ResolveError {
    /// The system's resolver says so; its own words, which do not hold the name.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The resolver answered without an address.
    #[error("the name has no address")]
    Empty,
    /// As many lookups wait as may, of all or of this caller.
    #[error("as many lookups wait already as may")]
    Busy,
}

impl From<Busy> for ResolveError {
    fn from(Busy: Busy) -> ResolveError {
        ResolveError::Busy
    }
}

/// For whom a name is looked up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Asker {
    /// For the operator: the configuration, the admin API.
    Operator,
    /// For whoever has named a target of their own.
    Caller(Option<Holder>),
}

/// How a name is looked up, on a helper thread: blocks as long as it likes.
pub type Lookup = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

/// The process's resolver. Its threads start as they are needed and end when it is dropped (one inside a lookup, after it).
pub struct Resolver {
    process: Arc<Process>,
}

/// One core's way to the [`Resolver`]. Cloning shares it; it stays on its core.
#[derive(Clone)]
pub struct ResolverHandle {
    process: Arc<Process>,
    bell: Rc<Bell>,
}

struct Process {
    lookup: Box<Lookup>,
    /// The operator's names.
    own: Directory,
    /// Those that callers have given.
    callers: Directory,
    /// For what is done to files.
    files: Arc<Helpers>,
}

/// Names, and those who look them up.
struct Directory {
    helpers: Arc<Helpers>,
    names: Mutex<HashMap<Arc<str>, Entry>>,
}

/// A name that was looked up, is, or is to be.
struct Entry {
    flight: Arc<Flight<Answer>>,
    /// Whoever takes this looks it up. Gone once that has begun.
    order: Weak<Order>,
    /// In whose turn it may be.
    shares: Vec<Share>,
}

/// A lookup that nobody has begun. Dropped with the last that could have.
type Order = Mutex<Option<Pilot<Answer>>>;

const OWN: Bounds = Bounds {
    name: "restcast-resolve",
    threads_max: RESOLVER_THREADS_MAX,
    queue_max: RESOLVER_QUEUE_MAX,
    share_threads_max: RESOLVER_THREADS_MAX,
    share_queue_max: RESOLVER_QUEUE_MAX,
};
const CALLERS: Bounds = Bounds {
    name: "restcast-callers",
    threads_max: RESOLVER_CALLERS_THREADS_MAX,
    queue_max: RESOLVER_CALLERS_QUEUE_MAX,
    share_threads_max: RESOLVER_SUBJECT_THREADS_MAX,
    share_queue_max: RESOLVER_SUBJECT_QUEUE_MAX,
};
const FILES: Bounds = Bounds {
    name: "restcast-files",
    threads_max: FILE_THREADS_MAX,
    queue_max: FILE_QUEUE_MAX,
    share_threads_max: FILE_THREADS_MAX,
    share_queue_max: FILE_QUEUE_MAX,
};

impl Resolver {
    /// A resolver that asks the system.
    pub fn system() -> Resolver {
        Resolver::with_lookup(Box::new(|name| Ok((name, 0).to_socket_addrs()?.map(|a| a.ip()).collect())))
    }

    /// A resolver that asks `lookup` instead.
    pub fn with_lookup(lookup: Box<Lookup>) -> Resolver {
        let (own, callers, files) = (Directory::new(OWN), Directory::new(CALLERS), Helpers::new(FILES));
        Resolver { process: Arc::new(Process { lookup, own, callers, files }) }
    }

    /// This core's handle. Must be called inside the core's runtime; one per core is enough.
    ///
    /// # Errors
    /// When the process has no descriptors left: a handle takes three.
    pub fn handle(&self) -> io::Result<ResolverHandle> {
        Ok(ResolverHandle { process: Arc::clone(&self.process), bell: Bell::hang()? })
    }

    /// Has one of the operator's names looked up anew, whatever the cache holds; `then` is given the answer, on a helper
    /// thread. For threads that are no core.
    ///
    /// # Errors
    /// [`ResolveError::Busy`]; `then` is not called.
    pub(super) fn look_up(&self, name: &str, then: impl FnOnce(Answer) + Send + 'static) -> Result<(), ResolveError> {
        if is_localhost(name) {
            then(Ok(localhost()));
            return Ok(());
        }
        let (name, process) = (name.to_owned(), Arc::clone(&self.process));
        Ok(self.process.own.helpers.run(None, Box::new(move || then(process.look_up(&name))))?)
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        for helpers in [&self.process.own.helpers, &self.process.callers.helpers, &self.process.files] {
            helpers.close();
        }
    }
}

impl ResolverHandle {
    /// The addresses of `name`, which is a host name and no IP literal, for `asker`. Waits as long as the system's resolver
    /// does: put a time-out around it; dropping the future is safe, and the lookup's answer is kept for the next caller.
    ///
    /// # Errors
    /// See [`ResolveError`]. A failure is remembered for [`RESOLVER_FAILURE_TTL`].
    pub async fn resolve(&self, name: &str, asker: Asker) -> Answer {
        if is_localhost(name) {
            return Ok(localhost());
        }
        let flight = self.flight_for(name, asker)?;
        self.landing(flight).await
    }

    /// Waits until `flight` has landed.
    pub(super) async fn landing<T: Clone>(&self, flight: Arc<Flight<T>>) -> T {
        Landing { flight, bell: Rc::clone(&self.bell), ticket: None }.await
    }

    /// Has `job`, which reads or writes files, done on a thread for that.
    ///
    /// # Errors
    /// When the queue is full, the resolver has ended, or no thread can be started.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) -> Result<(), Busy> {
        self.process.files.run(None, Box::new(job))
    }

    fn flight_for(&self, name: &str, asker: Asker) -> Result<Arc<Flight<Answer>>, ResolveError> {
        let (directory, share) = match asker {
            Asker::Operator => (&self.process.own, None),
            Asker::Caller(holder) => (&self.process.callers, holder),
        };
        let mut names = lock(&directory.names);
        let now = Instant::now();
        if let Some(entry) = names.get_mut(name)
            && is_fresh(&entry.flight, now)
        {
            // Somebody else's turn may be far away: it is looked up in the turn of whoever comes first.
            if !entry.shares.contains(&share)
                && let Some(order) = entry.order.upgrade()
                && directory.helpers.run(share, self.process.job(name, order)).is_ok()
            {
                entry.shares.push(share);
            }
            return Ok(Arc::clone(&entry.flight));
        }
        make_room(&mut names, now);
        let flight = Flight::departing();
        let order = Arc::new(Mutex::new(Some(Pilot::of(&flight, Err(ResolveError::Busy)))));
        let entry = Entry { flight: Arc::clone(&flight), order: Arc::downgrade(&order), shares: Vec::from([share]) };
        directory.helpers.run(share, self.process.job(name, order))?;
        names.insert(Arc::from(name), entry);
        Ok(flight)
    }
}

impl Directory {
    fn new(bounds: Bounds) -> Directory {
        Directory { helpers: Helpers::new(bounds), names: Mutex::default() }
    }
}

impl Process {
    /// What looks `name` up, unless that has been begun by then.
    fn job(self: &Arc<Process>, name: &str, order: Arc<Order>) -> Job {
        let (name, process) = (name.to_owned(), Arc::clone(self));
        Box::new(move || {
            let pilot = lock(&order).take();
            drop(order);
            if let Some(pilot) = pilot {
                pilot.land(process.look_up(&name));
            }
        })
    }

    fn look_up(&self, name: &str) -> Answer {
        let found = catch_unwind(AssertUnwindSafe(|| (self.lookup)(name)))
            .unwrap_or_else(|_| Err(io::Error::other("the resolver panicked")));
        let mut addresses: Vec<IpAddr> = Vec::new();
        for address in found.map_err(|e| ResolveError::Failed(Arc::from(e.to_string())))? {
            if addresses.len() < RESOLVER_ADDRESSES_MAX && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() { Err(ResolveError::Empty) } else { Ok(Arc::from(addresses)) }
    }
}

/// RFC 6761 section 6.3: such names are loopback, and no name server is asked.
fn is_localhost(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let last = name.rsplit('.').next().unwrap_or(name);
    last.eq_ignore_ascii_case("localhost")
}

fn localhost() -> Arc<[IpAddr]> {
    Arc::from([IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)])
}

fn is_fresh(flight: &Flight<Answer>, now: Instant) -> bool {
    let ttl = |answer: &Answer| match answer {
        Ok(_) => RESOLVER_TTL,
        // That there was no room for it says nothing of the name.
        Err(ResolveError::Busy) => Duration::ZERO,
        Err(_) => RESOLVER_FAILURE_TTL,
    };
    flight.landed(|answer, at| now < at + ttl(answer)).unwrap_or(true)
}

/// Makes room for one more name: what has expired goes first, then the answer that is oldest. Lookups under way stay, and
/// cannot fill the cache: they are bounded by the queue and the threads.
fn make_room(names: &mut HashMap<Arc<str>, Entry>, now: Instant) {
    const { assert!(RESOLVER_NAMES_MAX > RESOLVER_QUEUE_MAX + RESOLVER_THREADS_MAX) };
    const { assert!(RESOLVER_NAMES_MAX > RESOLVER_CALLERS_QUEUE_MAX + RESOLVER_CALLERS_THREADS_MAX) };
    if names.len() < RESOLVER_NAMES_MAX {
        return;
    }
    names.retain(|_, entry| is_fresh(&entry.flight, now));
    while names.len() >= RESOLVER_NAMES_MAX {
        let landed = names.iter().filter_map(|(name, entry)| Some((entry.flight.landed(|_, at| at)?, name)));
        let Some((_, oldest)) = landed.min_by_key(|(at, _)| *at) else { return };
        let oldest = Arc::clone(oldest);
        names.remove(&oldest);
    }
}

/// One piece of work on a helper thread, and everyone on any core who waits for what comes of it.
pub(super) struct Flight<T> {
    state: Mutex<FlightState<T>>,
}

enum FlightState<T> {
    Under(Vec<Ring>),
    Landed(T, Instant),
}

impl<T> Flight<T> {
    /// Work that is under way.
    pub(super) fn departing() -> Arc<Flight<T>> {
        Arc::new(Flight { state: Mutex::new(FlightState::Under(Vec::new())) })
    }

    /// Sets the outcome and wakes all who wait for it. Only the first outcome counts.
    fn land(&self, outcome: T) {
        let mut state = lock(&self.state);
        if let FlightState::Under(waiting) = &mut *state {
            let waiting = std::mem::take(waiting);
            *state = FlightState::Landed(outcome, Instant::now());
            drop(state);
            waiting.iter().for_each(Ring::ring);
        }
    }

    /// `read` of the outcome and when it came; `None` while the work is under way.
    pub(super) fn landed<R>(&self, read: impl FnOnce(&T, Instant) -> R) -> Option<R> {
        match &*lock(&self.state) {
            FlightState::Under(_) => None,
            FlightState::Landed(outcome, at) => Some(read(outcome, *at)),
        }
    }
}

/// Whose duty it is to land a flight: on a helper thread, or, where the work is dropped undone, then and there.
pub(super) struct Pilot<T> {
    flight: Arc<Flight<T>>,
    otherwise: Option<T>,
}

impl<T> Pilot<T> {
    /// The pilot of `flight`, whose outcome is `otherwise` if nothing else.
    pub(super) fn of(flight: &Arc<Flight<T>>, otherwise: T) -> Pilot<T> {
        Pilot { flight: Arc::clone(flight), otherwise: Some(otherwise) }
    }

    /// Lands the flight with this outcome.
    pub(super) fn land(self, outcome: T) {
        self.flight.land(outcome);
    }
}

impl<T> Drop for Pilot<T> {
    fn drop(&mut self) {
        if let Some(otherwise) = self.otherwise.take() {
            self.flight.land(otherwise);
        }
    }
}

/// A caller waiting for a flight. Dropping it takes its waker and its ring back.
struct Landing<T> {
    flight: Arc<Flight<T>>,
    bell: Rc<Bell>,
    ticket: Option<u64>,
}

impl<T: Clone> Future for Landing<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let landing = &mut *self;
        let mut state = lock(&landing.flight.state);
        match &mut *state {
            FlightState::Landed(outcome, _) => return Poll::Ready(outcome.clone()),
            FlightState::Under(rings) => {
                let ticket = *landing.ticket.get_or_insert_with(|| {
                    let ticket = landing.bell.ticket();
                    rings.push(Ring { inbox: Arc::downgrade(&landing.bell.inbox), ticket });
                    ticket
                });
                landing.bell.waiting.borrow_mut().insert(ticket, cx.waker().clone());
            }
        }
        Poll::Pending
    }
}

impl<T> Drop for Landing<T> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        self.bell.waiting.borrow_mut().remove(&ticket);
        if let FlightState::Under(rings) = &mut *lock(&self.flight.state) {
            rings.retain(|ring| ring.ticket != ticket || !ring.is_for(&self.bell.inbox));
        }
    }
}

/// How other threads wake tasks of one core: the runtime's own wakers must not leave it.
struct Bell {
    inbox: Arc<Inbox>,
    waiting: Rc<RefCell<HashMap<u64, Waker>>>,
    next_ticket: Cell<u64>,
}

/// The half of a [`Bell`] that other threads hold.
struct Inbox {
    rung: Mutex<Vec<u64>>,
    rope: UnixStream,
}

/// One ticket of one core's bell.
struct Ring {
    inbox: Weak<Inbox>,
    ticket: u64,
}

impl Bell {
    fn hang() -> io::Result<Rc<Bell>> {
        let (rope, hammer) = UnixStream::pair()?;
        rope.set_nonblocking(true)?;
        hammer.set_nonblocking(true)?;
        // Two descriptors of one socket: the runtime waits on the one, the other is read without waiting. A read in the
        // ring cannot be had here, as O_NONBLOCK makes it fail at once while epoll needs O_NONBLOCK.
        let watched = monoio::net::UnixStream::from_std(hammer.try_clone()?)?;
        let inbox = Arc::new(Inbox { rung: Mutex::new(Vec::new()), rope });
        let bell = Bell { inbox, waiting: Rc::default(), next_ticket: Cell::new(0) };
        monoio::spawn(listen(watched, hammer, Arc::downgrade(&bell.inbox), Rc::clone(&bell.waiting)));
        Ok(Rc::new(bell))
    }

    fn ticket(&self) -> u64 {
        let ticket = self.next_ticket.get();
        self.next_ticket.set(ticket + 1);
        ticket
    }
}

/// Wakes the tasks whose tickets are rung, until the bell is gone.
async fn listen(
    watched: monoio::net::UnixStream,
    hammer: UnixStream,
    inbox: Weak<Inbox>,
    waiting: Rc<RefCell<HashMap<u64, Waker>>>,
) {
    let mut bytes = [0; 64];
    loop {
        match (&hammer).read(&mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if watched.readable(false).await.is_err() {
                    return;
                }
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        }
        let Some(inbox) = inbox.upgrade() else { return };
        let rung = std::mem::take(&mut *lock(&inbox.rung));
        for ticket in rung {
            let waker = waiting.borrow_mut().remove(&ticket);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

impl Ring {
    fn ring(&self) {
        let Some(inbox) = self.inbox.upgrade() else { return };
        let mut rung = lock(&inbox.rung);
        rung.push(self.ticket);
        if rung.len() == 1 {
            // One byte until the tickets are taken: it always fits, and where the core has ended nobody is left to wake.
            let _ = (&inbox.rope).write(&[1]);
        }
    }

    fn is_for(&self, inbox: &Arc<Inbox>) -> bool {
        std::ptr::eq(self.inbox.as_ptr(), Arc::as_ptr(inbox))
    }
}

/// A panic while one of these is held leaves nothing half done: each critical section is a few pushes and pops.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Condvar;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use monoio::time::{sleep, timeout};

    use super::super::clock;
    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn on_a_core(test: impl AsyncFnOnce()) {
        let mut runtime = monoio::RuntimeBuilder::<monoio::LegacyDriver>::new().enable_timer().build().expect("epoll");
        // What waits for ever is a failure that says so.
        runtime.block_on(async { timeout(Duration::from_secs(120), test()).await.expect("the test ends") });
    }

    type Gate = Arc<(Mutex<bool>, Condvar)>;

    /// A resolver whose lookups wait for the gate, and what counts them.
    fn gated() -> (Resolver, Gate, Arc<AtomicUsize>) {
        let gate = Gate::new((Mutex::new(false), Condvar::new()));
        let count = Arc::new(AtomicUsize::new(0));
        let (their_gate, their_count) = (Arc::clone(&gate), Arc::clone(&count));
        let resolver = Resolver::with_lookup(Box::new(move |_| {
            their_count.fetch_add(1, Ordering::SeqCst);
            let (open, changed) = &*their_gate;
            let _open = changed.wait_while(lock(open), |open| !*open);
            Ok(vec![LOOPBACK])
        }));
        (resolver, gate, count)
    }

    fn open(gate: &(Mutex<bool>, Condvar)) {
        *lock(&gate.0) = true;
        gate.1.notify_all();
    }

    #[test]
    fn one_lookup_serves_every_core_that_waits() {
        let (resolver, gate, count) = gated();
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    on_a_core(async || {
                        let handle = resolver.handle().expect("descriptors");
                        let (one, two) = (handle.clone(), handle.clone());
                        let one = monoio::spawn(async move { one.resolve("a.test", Asker::Operator).await });
                        let two = monoio::spawn(async move { two.resolve("a.test", Asker::Operator).await });
                        assert_eq!((one.await, two.await), (Ok([LOOPBACK].into()), Ok([LOOPBACK].into())));
                    });
                });
            }
            clock::hold_thread(Duration::from_millis(50));
            open(&gate);
        });
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn as_many_lookups_wait_as_may_and_no_more() {
        let (resolver, gate, count) = gated();
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            let ask = |n: usize| {
                let handle = handle.clone();
                monoio::spawn(async move { handle.resolve(&format!("{n}.test"), Asker::Operator).await })
            };
            let under_way: Vec<_> = (0..RESOLVER_THREADS_MAX).map(ask).collect();
            while count.load(Ordering::SeqCst) < RESOLVER_THREADS_MAX {
                sleep(Duration::from_millis(1)).await;
            }
            let waiting: Vec<_> = (100..100 + RESOLVER_QUEUE_MAX).map(ask).collect();
            while resolver.process.own.helpers.counts().0 < RESOLVER_QUEUE_MAX {
                sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(ask(1000).await, Err(ResolveError::Busy));
            assert_eq!(count.load(Ordering::SeqCst), RESOLVER_THREADS_MAX, "and no more threads than may");
            open(&gate);
            for lookup in under_way.into_iter().chain(waiting) {
                assert_eq!(lookup.await, Ok([LOOPBACK].into()));
            }
            assert_eq!(ask(1000).await, Ok([LOOPBACK].into()), "being busy is not remembered");
        });
    }

    fn caller(of: u64) -> Asker {
        Asker::Caller(Some(Holder::from_hash(of)))
    }

    #[test]
    fn what_callers_have_named_holds_up_neither_the_operator_nor_each_other() {
        let gate = Gate::new((Mutex::new(false), Condvar::new()));
        let (their_gate, asked) = (Arc::clone(&gate), Arc::new(Mutex::new(Vec::new())));
        let told = Arc::clone(&asked);
        let resolver = Resolver::with_lookup(Box::new(move |name| {
            lock(&told).push(name.to_owned());
            if name.ends_with(".slow.test") {
                let (open, changed) = &*their_gate;
                let _open = changed.wait_while(lock(open), |open| !*open);
            }
            Ok(vec![LOOPBACK])
        }));
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            let ask = |name: String, asker| {
                let handle = handle.clone();
                monoio::spawn(async move { handle.resolve(&name, asker).await })
            };
            let at_once = async |name: &str, asker| {
                let answer = timeout(Duration::from_secs(20), handle.resolve(name, asker)).await;
                assert_eq!(answer.expect("it does not wait for others"), Ok([LOOPBACK].into()), "{name}");
            };
            let bound = RESOLVER_SUBJECT_THREADS_MAX + RESOLVER_SUBJECT_QUEUE_MAX;
            let name_of = |of: u64, n: usize| format!("{of}-{n}.slow.test");
            let counts = || resolver.process.callers.helpers.counts();
            let comes = async |what: &dyn Fn(&[String]) -> bool| {
                let begun = clock::now().at;
                while !what(&lock(&asked)) {
                    assert!(clock::now().at.since(begun) < Duration::from_secs(20), "{:?}", lock(&asked));
                    sleep(Duration::from_millis(1)).await;
                }
            };
            let slow_names = |asked: &[String]| asked.iter().filter(|name| name.ends_with(".slow.test")).count();
            // The threads first, then the queue: what is refused must not depend on how soon a thread starts.
            let threads = RESOLVER_SUBJECT_THREADS_MAX;
            let mut slow: Vec<_> = (0..threads).map(|n| ask(name_of(1, n), caller(1))).collect();
            comes(&|asked| slow_names(asked) == threads).await;
            slow.extend((threads..bound).map(|n| ask(name_of(1, n), caller(1))));
            comes(&|_| counts().0 == RESOLVER_SUBJECT_QUEUE_MAX).await;
            // One who has asked for too much is told so. Others are served, also where they want what that one waits for.
            at_once("quick.test", caller(2)).await;
            let same = ask(name_of(1, bound - 1), caller(2));
            comes(&|asked| asked.contains(&name_of(1, bound - 1))).await;
            assert_eq!(handle.resolve("more.test", caller(1)).await, Err(ResolveError::Busy));
            at_once("more.test", caller(2)).await;
            assert_eq!(slow_names(&lock(&asked)), threads + 1);
            // Many of them fill all that is for callers, and nothing of what is the operator's.
            let subjects = 3..3 + RESOLVER_CALLERS_QUEUE_MAX as u64 / 16;
            slow.extend(subjects.clone().map(|of| ask(name_of(of, 0), caller(of))));
            comes(&|asked| slow_names(asked) == RESOLVER_CALLERS_THREADS_MAX).await;
            for of in subjects.clone() {
                slow.extend((1..bound).map(|n| ask(name_of(of, n), caller(of))));
            }
            comes(&|_| counts() == (RESOLVER_CALLERS_QUEUE_MAX, RESOLVER_CALLERS_THREADS_MAX)).await;
            at_once("operators.test", Asker::Operator).await;
            at_once("quick.test", Asker::Operator).await;
            let done = Flight::departing();
            let pilot = Pilot::of(&done, false);
            handle.run(move || pilot.land(true)).expect("there is room for what is done to files");
            assert!(timeout(Duration::from_secs(20), handle.landing(done)).await.expect("nobody holds it up"));
            open(&gate);
            let mut outcomes = Vec::new();
            for lookup in slow {
                outcomes.push(lookup.await);
            }
            assert_eq!(same.await, Ok([LOOPBACK].into()));
            // Whoever had most waiting has given way to the others; all are told, and nobody waits for ever.
            let refused = outcomes.iter().filter(|outcome| **outcome == Err(ResolveError::Busy)).count();
            let served = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
            assert_eq!(refused + served, outcomes.len());
            assert!(served >= RESOLVER_CALLERS_QUEUE_MAX && refused > 0, "{served} and {refused}");
            for of in subjects {
                assert!(is_known(&resolver, &name_of(of, 0)), "each has had something looked up: {of}");
            }
            at_once("more.test", caller(1)).await;
        });
    }

    fn is_known(resolver: &Resolver, name: &str) -> bool {
        let names = lock(&resolver.process.callers.names);
        names.get(name).is_some_and(|entry| entry.flight.landed(|answer, _| answer.is_ok()) == Some(true))
    }

    #[test]
    fn a_caller_that_gives_up_leaves_nothing_behind() {
        let (resolver, gate, _) = gated();
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            timeout(Duration::from_millis(5), handle.resolve("a.test", Asker::Operator))
                .await
                .expect_err("the gate is shut");
            assert!(handle.bell.waiting.borrow().is_empty());
            let flight = lock(&resolver.process.own.names)
                .get("a.test")
                .map(|entry| Arc::clone(&entry.flight))
                .expect("it is under way");
            assert!(matches!(&*lock(&flight.state), FlightState::Under(rings) if rings.is_empty()));
            open(&gate);
            assert_eq!(handle.resolve("a.test", Asker::Operator).await, Ok([LOOPBACK].into()));
        });
    }

    #[test]
    fn the_cache_holds_as_many_names_as_it_may() {
        let resolver = Resolver::with_lookup(Box::new(|_| Ok(vec![LOOPBACK])));
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            let held = || lock(&resolver.process.own.names).len();
            for n in 0..RESOLVER_NAMES_MAX {
                handle.resolve(&format!("{n}.test"), Asker::Operator).await.expect("an address");
            }
            assert_eq!(held(), RESOLVER_NAMES_MAX);
            handle.resolve("one-more.test", Asker::Operator).await.expect("an address");
            assert_eq!(held(), RESOLVER_NAMES_MAX);
            let names = lock(&resolver.process.own.names);
            assert!(names.contains_key("one-more.test") && !names.contains_key("0.test"), "the oldest goes first");
        });
    }

    #[test]
    fn failures_are_remembered_for_a_while_and_panics_are_failures() {
        let count = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&count);
        let resolver = Resolver::with_lookup(Box::new(move |name| {
            counting.fetch_add(1, Ordering::SeqCst);
            match name {
                "none.test" => Ok(Vec::new()),
                "panic.test" => panic!("a resolver with a defect"),
                _ => Err(io::Error::other("no such host")),
            }
        }));
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            for _ in 0..2 {
                assert_eq!(handle.resolve("none.test", Asker::Operator).await, Err(ResolveError::Empty));
                assert_eq!(
                    handle.resolve("gone.test", Asker::Operator).await,
                    Err(ResolveError::Failed("no such host".into()))
                );
                assert!(matches!(handle.resolve("panic.test", Asker::Operator).await, Err(ResolveError::Failed(_))));
            }
            assert_eq!(count.load(Ordering::SeqCst), 3);
            sleep(RESOLVER_FAILURE_TTL).await;
            assert_eq!(
                handle.resolve("gone.test", Asker::Operator).await,
                Err(ResolveError::Failed("no such host".into()))
            );
            assert_eq!(count.load(Ordering::SeqCst), 4);
        });
    }

    #[test]
    fn addresses_are_bounded_and_each_is_there_once() {
        let many: Vec<IpAddr> = (0..=255).flat_map(|n| [IpAddr::from([10, 0, 0, n]); 2]).collect();
        let resolver = Resolver::with_lookup(Box::new(move |_| Ok(many.clone())));
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            let addresses = handle.resolve("many.test", Asker::Operator).await.expect("addresses");
            assert_eq!(addresses.len(), RESOLVER_ADDRESSES_MAX);
            assert_eq!(addresses[..2], [IpAddr::from([10, 0, 0, 0]), IpAddr::from([10, 0, 0, 1])]);
        });
    }

    #[test]
    fn localhost_asks_nobody() {
        let resolver = Resolver::with_lookup(Box::new(|name| panic!("asked for {name}")));
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            for name in ["localhost", "LocalHost.", "a.b.localhost"] {
                assert!(
                    handle.resolve(name, Asker::Operator).await.expect("loopback").iter().all(IpAddr::is_loopback),
                    "{name}"
                );
            }
        });
        assert!(!is_localhost("localhost.example.com") && !is_localhost("notlocalhost"));
    }

    #[test]
    fn a_resolver_that_is_gone_answers_busy_and_its_threads_end() {
        let resolver = Resolver::system();
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            handle.run(|| {}).expect("a thread");
            let process = Arc::downgrade(&resolver.process);
            drop(resolver);
            assert_eq!(handle.resolve("a.test", Asker::Operator).await, Err(ResolveError::Busy));
            drop(handle);
            let (resolver, gate, _) = gated();
            let handle = resolver.handle().expect("descriptors");
            let asked: Vec<_> = (0..=RESOLVER_THREADS_MAX)
                .map(|n| {
                    let handle = handle.clone();
                    monoio::spawn(async move { handle.resolve(&format!("{n}.test"), Asker::Operator).await })
                })
                .collect();
            sleep(Duration::from_millis(5)).await;
            drop(resolver);
            open(&gate);
            let mut outcomes = Vec::new();
            for asked in asked {
                outcomes.push(asked.await);
            }
            assert_eq!(outcomes.pop(), Some(Err(ResolveError::Busy)), "the one that had not begun");
            drop(handle);
            let begun = super::super::clock::now().at;
            while process.strong_count() > 0 {
                let waited = super::super::clock::now().at.since(begun);
                assert!(waited < Duration::from_secs(20), "a thread holds on to the resolver");
                sleep(Duration::from_millis(10)).await;
            }
        });
    }
}
