//! Host names to addresses without blocking a core: `getaddrinfo` on a few helper threads, with a cache.
//!
//! A [`Resolver`] belongs to the process, a [`ResolverHandle`] to one core. Callers on any core that ask for the same name
//! share one lookup (a `Flight`); the core is woken through a socket pair that a task of its own listens to.
//! The helper threads also do the process's other blocking chore, reading the system's certificates (`fetch::tls`).
//!
//! Source: RFC 6761 section 6.3 for `localhost`; the order of addresses is `getaddrinfo`'s (RFC 6724).
//! Memory: at most `limits::RESOLVER_NAMES_MAX` names in the cache, `RESOLVER_QUEUE_MAX` lookups waiting,
//! `RESOLVER_THREADS_MAX` threads, `RESOLVER_ADDRESSES_MAX` addresses a name; one waker per waiting caller.
//! Errors: [`ResolveError`].  Not here: which address is connected to (`fetch::connect`), time-outs (the caller's).

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::thread;

use monoio::time::Instant;

use crate::limits::{
    RESOLVER_ADDRESSES_MAX, RESOLVER_FAILURE_TTL, RESOLVER_NAMES_MAX, RESOLVER_QUEUE_MAX, RESOLVER_THREADS_MAX,
    RESOLVER_TTL,
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
    /// This server's fault: too many lookups wait.
    #[error("{RESOLVER_QUEUE_MAX} lookups are waiting already")]
    Busy,
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
    work: Mutex<Work>,
    has_work: Condvar,
    names: Mutex<HashMap<Arc<str>, Arc<Flight<Answer>>>>,
}

struct Work {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

type Job = Box<dyn FnOnce() + Send>;

impl Resolver {
    /// A resolver that asks the system.
    pub fn system() -> Resolver {
        Resolver::with_lookup(Box::new(|name| Ok((name, 0).to_socket_addrs()?.map(|a| a.ip()).collect())))
    }

    /// A resolver that asks `lookup` instead.
    pub fn with_lookup(lookup: Box<Lookup>) -> Resolver {
        let work = Work { jobs: VecDeque::new(), threads: 0, idle: 0, closed: false };
        let process =
            Process { lookup, work: Mutex::new(work), has_work: Condvar::new(), names: Mutex::new(HashMap::new()) };
        Resolver { process: Arc::new(process) }
    }

    /// This core's handle. Must be called inside the core's runtime; one per core is enough.
    ///
    /// # Errors
    /// When the process has no descriptors left: a handle takes three.
    pub fn handle(&self) -> io::Result<ResolverHandle> {
        Ok(ResolverHandle { process: Arc::clone(&self.process), bell: Bell::hang()? })
    }

    /// Has `name` looked up anew, whatever the cache holds; `then` is given the answer, on a helper thread. For threads that
    /// are no core.
    ///
    /// # Errors
    /// [`ResolveError::Busy`]; `then` is not called.
    pub(super) fn look_up(&self, name: &str, then: impl FnOnce(Answer) + Send + 'static) -> Result<(), ResolveError> {
        if is_localhost(name) {
            then(Ok(localhost()));
            return Ok(());
        }
        let (name, process) = (name.to_owned(), Arc::clone(&self.process));
        Process::run(&self.process, Box::new(move || then(process.look_up(&name))))
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        let unstarted = {
            let mut work = lock(&self.process.work);
            work.closed = true;
            std::mem::take(&mut work.jobs)
        };
        self.process.has_work.notify_all();
        drop(unstarted); // Which tells those who wait for them.
    }
}

impl ResolverHandle {
    /// The addresses of `name`, which is a host name and no IP literal. Waits as long as the system's resolver does: put a
    /// time-out around it; dropping the future is safe, and the lookup's answer is kept for the next caller.
    ///
    /// # Errors
    /// See [`ResolveError`]. A failure is remembered for [`RESOLVER_FAILURE_TTL`].
    pub async fn resolve(&self, name: &str) -> Answer {
        if is_localhost(name) {
            return Ok(localhost());
        }
        let flight = self.flight_for(name)?;
        self.landing(flight).await
    }

    /// Waits until `flight` has landed.
    pub(super) async fn landing<T: Clone>(&self, flight: Arc<Flight<T>>) -> T {
        Landing { flight, bell: Rc::clone(&self.bell), ticket: None }.await
    }

    /// Has `job` done on a helper thread.
    ///
    /// # Errors
    /// [`ResolveError::Busy`] when the queue is full, the resolver has ended, or no thread can be started.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) -> Result<(), ResolveError> {
        Process::run(&self.process, Box::new(job))
    }

    fn flight_for(&self, name: &str) -> Result<Arc<Flight<Answer>>, ResolveError> {
        let mut names = lock(&self.process.names);
        let now = Instant::now();
        if let Some(flight) = names.get(name)
            && is_fresh(flight, now)
        {
            return Ok(Arc::clone(flight));
        }
        make_room(&mut names, now);
        let flight = Flight::departing();
        let (name, process) = (Arc::<str>::from(name), Arc::clone(&self.process));
        let job = {
            let (name, pilot) = (Arc::clone(&name), Pilot::of(&flight, Err(ResolveError::Busy)));
            move || pilot.land(process.look_up(&name))
        };
        self.run(job)?;
        names.insert(name, Arc::clone(&flight));
        Ok(flight)
    }
}

impl Process {
    fn run(process: &Arc<Process>, job: Job) -> Result<(), ResolveError> {
        let mut work = lock(&process.work);
        if work.closed || work.jobs.len() >= RESOLVER_QUEUE_MAX {
            return Err(ResolveError::Busy);
        }
        work.jobs.push_back(job);
        if work.jobs.len() > work.idle && work.threads < RESOLVER_THREADS_MAX {
            let body = Arc::clone(process);
            match thread::Builder::new().name("restcast-resolve".into()).spawn(move || body.serve()) {
                Ok(_) => work.threads += 1,
                Err(_) if work.threads == 0 => {
                    work.jobs.pop_back();
                    return Err(ResolveError::Busy);
                }
                // Fewer threads than wanted is slower, not wrong.
                Err(_) => {}
            }
        }
        process.has_work.notify_one();
        Ok(())
    }

    fn serve(&self) {
        let mut work = lock(&self.work);
        while !work.closed {
            if let Some(job) = work.jobs.pop_front() {
                drop(work);
                // A job that panics tells its waiters as it unwinds; the thread goes on.
                let _ = catch_unwind(AssertUnwindSafe(job));
                work = lock(&self.work);
            } else {
                work.idle += 1;
                work = self.has_work.wait(work).unwrap_or_else(PoisonError::into_inner);
                work.idle -= 1;
            }
        }
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
    let ttl = |answer: &Answer| if answer.is_ok() { RESOLVER_TTL } else { RESOLVER_FAILURE_TTL };
    flight.landed(|answer, at| now < at + ttl(answer)).unwrap_or(true)
}

/// Makes room for one more name: what has expired goes first, then the answer that is oldest. Lookups under way stay, and
/// cannot fill the cache: they are bounded by the queue and the threads.
fn make_room(names: &mut HashMap<Arc<str>, Arc<Flight<Answer>>>, now: Instant) {
    const { assert!(RESOLVER_NAMES_MAX > RESOLVER_QUEUE_MAX + RESOLVER_THREADS_MAX) };
    if names.len() < RESOLVER_NAMES_MAX {
        return;
    }
    names.retain(|_, flight| is_fresh(flight, now));
    while names.len() >= RESOLVER_NAMES_MAX {
        let landed = names.iter().filter_map(|(name, flight)| Some((flight.landed(|_, at| at)?, name)));
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
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use monoio::time::{sleep, timeout};

    use super::super::clock;
    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn on_a_core(test: impl AsyncFnOnce()) {
        let mut runtime = monoio::RuntimeBuilder::<monoio::LegacyDriver>::new().enable_timer().build().expect("epoll");
        runtime.block_on(test());
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
                        let one = monoio::spawn(async move { one.resolve("a.test").await });
                        let two = monoio::spawn(async move { two.resolve("a.test").await });
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
                monoio::spawn(async move { handle.resolve(&format!("{n}.test")).await })
            };
            let under_way: Vec<_> = (0..RESOLVER_THREADS_MAX).map(ask).collect();
            while count.load(Ordering::SeqCst) < RESOLVER_THREADS_MAX {
                sleep(Duration::from_millis(1)).await;
            }
            let waiting: Vec<_> = (100..100 + RESOLVER_QUEUE_MAX).map(ask).collect();
            sleep(Duration::from_millis(1)).await;
            assert_eq!(ask(1000).await, Err(ResolveError::Busy));
            assert_eq!(count.load(Ordering::SeqCst), RESOLVER_THREADS_MAX, "and no more threads than may");
            open(&gate);
            for lookup in under_way.into_iter().chain(waiting) {
                assert_eq!(lookup.await, Ok([LOOPBACK].into()));
            }
            assert_eq!(ask(1000).await, Ok([LOOPBACK].into()), "being busy is not remembered");
        });
    }

    #[test]
    fn a_caller_that_gives_up_leaves_nothing_behind() {
        let (resolver, gate, _) = gated();
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            timeout(Duration::from_millis(5), handle.resolve("a.test")).await.expect_err("the gate is shut");
            assert!(handle.bell.waiting.borrow().is_empty());
            let flight = lock(&resolver.process.names).get("a.test").cloned().expect("it is under way");
            assert!(matches!(&*lock(&flight.state), FlightState::Under(rings) if rings.is_empty()));
            open(&gate);
            assert_eq!(handle.resolve("a.test").await, Ok([LOOPBACK].into()));
        });
    }

    #[test]
    fn the_cache_holds_as_many_names_as_it_may() {
        let resolver = Resolver::with_lookup(Box::new(|_| Ok(vec![LOOPBACK])));
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            let held = || lock(&resolver.process.names).len();
            for n in 0..RESOLVER_NAMES_MAX {
                handle.resolve(&format!("{n}.test")).await.expect("an address");
            }
            assert_eq!(held(), RESOLVER_NAMES_MAX);
            handle.resolve("one-more.test").await.expect("an address");
            assert_eq!(held(), RESOLVER_NAMES_MAX);
            let names = lock(&resolver.process.names);
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
                assert_eq!(handle.resolve("none.test").await, Err(ResolveError::Empty));
                assert_eq!(handle.resolve("gone.test").await, Err(ResolveError::Failed("no such host".into())));
                assert!(matches!(handle.resolve("panic.test").await, Err(ResolveError::Failed(_))));
            }
            assert_eq!(count.load(Ordering::SeqCst), 3);
            sleep(RESOLVER_FAILURE_TTL).await;
            assert_eq!(handle.resolve("gone.test").await, Err(ResolveError::Failed("no such host".into())));
            assert_eq!(count.load(Ordering::SeqCst), 4);
        });
    }

    #[test]
    fn addresses_are_bounded_and_each_is_there_once() {
        let many: Vec<IpAddr> = (0..=255).flat_map(|n| [IpAddr::from([10, 0, 0, n]); 2]).collect();
        let resolver = Resolver::with_lookup(Box::new(move |_| Ok(many.clone())));
        on_a_core(async || {
            let handle = resolver.handle().expect("descriptors");
            let addresses = handle.resolve("many.test").await.expect("addresses");
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
                assert!(handle.resolve(name).await.expect("loopback").iter().all(IpAddr::is_loopback), "{name}");
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
            assert_eq!(handle.resolve("a.test").await, Err(ResolveError::Busy));
            drop(handle);
            let (resolver, gate, _) = gated();
            let handle = resolver.handle().expect("descriptors");
            let asked: Vec<_> = (0..=RESOLVER_THREADS_MAX)
                .map(|n| {
                    let handle = handle.clone();
                    monoio::spawn(async move { handle.resolve(&format!("{n}.test")).await })
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
            for _ in 0..100 {
                if process.strong_count() == 0 {
                    return;
                }
                sleep(Duration::from_millis(10)).await;
            }
            panic!("a thread holds on to the resolver");
        });
    }
}
