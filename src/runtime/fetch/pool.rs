//! One core's upstream connections: those that idle, and leave to open more.
//!
//! Some of the places are the operator's alone, and whoever waits for the operator goes first: however many targets of callers
//! hang, what the operator has configured is polled.
//!
//! Source: RFC 9112 section 9.3 for keep-alive.
//! Memory: at most [`FetcherOptions::connections_max`] connections, of which `idle_max` idle, `idle_per_origin_max` to one
//! origin; `waiting_max` requests of the operator's and `callers_waiting_max` of callers' wait in order for a place. One task
//! while anything idles.
//! Errors: [`PoolFull`].  Not here: connecting, talking, time-outs of a caller.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use monoio::time::{Instant, sleep_until};

use super::FetcherOptions;
use super::link::Link;
use super::tls::TrustId;
use super::tunnel::Way;
use crate::guard::Judgement;

/// What connections must have in common to be used for each other's requests.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct Origin {
    pub(super) https: bool,
    pub(super) host: Box<str>,
    pub(super) port: u16,
    pub(super) trust: TrustId,
    /// How the guard has judged the address; `None`: the operator has named it. What others may reach whose addresses are
    /// judged otherwise need not be this request's to reach.
    pub(super) judged: Option<Judgement>,
    /// Whose requests they serve.
    pub(super) whose: Whose,
    /// The proxy that they go through.
    pub(super) via: Option<Way>,
}

/// Who wants a connection.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) enum Whose {
    /// The configuration, the admin API.
    Operator,
    /// Whoever has described a target.
    Caller,
}

/// More callers wait for a connection than may.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct PoolFull;

/// An open connection and its place in the pool; dropping it closes the one and frees the other.
pub(super) struct Connection {
    pub(super) link: Link,
    pub(super) origin: Rc<Origin>,
    pub(super) place: Place,
}

/// Leave to have one connection open.
pub(super) struct Place {
    pool: Weak<Pool>,
    whose: Whose,
}

/// What a caller gets.
pub(super) enum Leave {
    /// A connection to the origin it wants, which another caller has just done with.
    Reuse(Connection),
    /// Leave to open one.
    Open(Place),
}

/// One core's pool.
pub(super) struct Pool {
    options: FetcherOptions,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// Places taken: connecting, in use and idle,
    open: usize,
    /// and those of them that are callers'.
    of_callers: usize,
    /// The longest idle first, in each origin. No empty queues.
    idle: HashMap<Rc<Origin>, VecDeque<Idle>>,
    idle_count: usize,
    /// Who waits, in order of arrival; those who gave up are passed over. The operator's requests, and
    waiting: VecDeque<Rc<Waiter>>,
    /// callers'.
    callers_waiting: VecDeque<Rc<Waiter>>,
    sweeping: bool,
}

struct Idle {
    connection: Connection,
    since: Instant,
}

struct Waiter {
    /// Where it may be given a connection that has been used.
    wants: Option<Rc<Origin>>,
    state: RefCell<WaiterState>,
}

enum WaiterState {
    Waiting(Option<Waker>),
    Granted(Leave),
    Gone,
}

impl Pool {
    pub(super) fn new(options: FetcherOptions) -> Rc<Pool> {
        Rc::new(Pool { options, state: RefCell::new(State::default()) })
    }

    /// Connections that are open or being opened, and how many of them idle.
    pub(super) fn counts(&self) -> (usize, usize) {
        let state = self.state.borrow();
        (state.open, state.idle_count)
    }

    /// A connection to `origin` that idles, the one used last first, so that the rest may expire.
    pub(super) fn idle(&self, origin: &Rc<Origin>) -> Option<Connection> {
        let mut state = self.state.borrow_mut();
        let queue = state.idle.get_mut(origin)?;
        let idle = queue.pop_back();
        if queue.is_empty() {
            state.idle.remove(origin);
        }
        state.idle_count -= usize::from(idle.is_some());
        idle.map(|idle| idle.connection)
    }

    /// A place for one more connection. At the cap an idle connection is closed for it; where none idles, callers wait in
    /// the order they came, and may be given a connection to the origin they want instead.
    ///
    /// # Errors
    /// When as many wait already as may.
    pub(super) async fn leave(self: &Rc<Pool>, whose: Whose, wants: Option<&Rc<Origin>>) -> Result<Leave, PoolFull> {
        {
            let mut state = self.state.borrow_mut();
            // Whoever waits is served before a place becomes free, so that a free one passes nobody over.
            if self.has_room(&state, whose) {
                return Ok(Leave::Open(self.place(&mut state, whose)));
            }
            let waiting_max = match whose {
                Whose::Operator => self.options.waiting_max,
                Whose::Caller => self.options.callers_waiting_max,
            };
            let waiting = state.waiting(whose);
            if waiting.len() >= waiting_max {
                waiting.retain(|waiter| waiter.is_waiting());
            }
            if waiting.len() >= waiting_max {
                return Err(PoolFull);
            }
        }
        let waiter = Rc::new(Waiter { wants: wants.cloned(), state: RefCell::new(WaiterState::Waiting(None)) });
        self.state.borrow_mut().waiting(whose).push_back(Rc::clone(&waiter));
        let _leaving = Leaving { waiter: &waiter };
        // What of callers' idles goes first: that of the operator's is for polls that come again.
        let evicted = self.take_longest_idle(Some(Whose::Caller)).or_else(|| match self.callers_are_full() {
            true if whose == Whose::Caller => None,
            _ => self.take_longest_idle(None),
        });
        drop(evicted); // Its place goes to whoever waits longest.
        let granted = poll_fn(|cx| match waiter.state.replace(WaiterState::Waiting(Some(cx.waker().clone()))) {
            WaiterState::Granted(leave) => {
                waiter.state.replace(WaiterState::Gone);
                Poll::Ready(leave)
            }
            WaiterState::Waiting(_) | WaiterState::Gone => Poll::Pending,
        });
        Ok(granted.await)
    }

    /// Keeps a connection that can be used again. Where somebody waits, whoever's turn it is gets it, or at least its place.
    pub(super) fn keep(self: &Rc<Pool>, connection: Connection) {
        if let Some((whose, waiter)) = self.next_waiting(connection.place.whose) {
            if waiter.wants.as_ref() == Some(&connection.origin) {
                self.state.borrow_mut().waiting(whose).pop_front();
                waiter.grant(Leave::Reuse(connection));
            }
            return; // Or closed, which frees its place.
        }
        if self.options.idle_max == 0 || self.options.idle_per_origin_max == 0 {
            return;
        }
        let mut surplus = None;
        {
            let mut state = self.state.borrow_mut();
            let queue = state.idle.entry(Rc::clone(&connection.origin)).or_default();
            queue.push_back(Idle { connection, since: Instant::now() });
            if queue.len() > self.options.idle_per_origin_max {
                surplus = queue.pop_front().map(|idle| idle.connection);
            } else {
                state.idle_count += 1;
            }
        }
        if self.state.borrow().idle_count > self.options.idle_max {
            surplus = self.take_longest_idle(None);
        }
        drop(surplus); // Not under the borrow: a place that is freed looks for its next holder.
        self.sweep_while_idle();
    }

    /// Whose turn it is if a place of `freed`'s becomes free: of those who may have it then the operator's first, and of these
    /// who waits longest, after taking those who gave up out of the way.
    fn next_waiting(&self, freed: Whose) -> Option<(Whose, Rc<Waiter>)> {
        let mut state = self.state.borrow_mut();
        let callers_too = freed == Whose::Caller || state.of_callers < self.callers_max();
        let order =
            [Whose::Operator, Whose::Caller].into_iter().filter(|&whose| whose == Whose::Operator || callers_too);
        for whose in order {
            let waiting = state.waiting(whose);
            while waiting.front().is_some_and(|waiter| !waiter.is_waiting()) {
                waiting.pop_front();
            }
            if let Some(waiter) = waiting.front() {
                return Some((whose, Rc::clone(waiter)));
            }
        }
        None
    }

    /// Places that callers may have.
    fn callers_max(&self) -> usize {
        self.options.connections_max.saturating_sub(self.options.own_connections).max(1)
    }

    fn callers_are_full(&self) -> bool {
        self.state.borrow().of_callers >= self.callers_max()
    }

    fn has_room(&self, state: &State, whose: Whose) -> bool {
        let callers_too = whose == Whose::Operator || state.of_callers < self.callers_max();
        state.open < self.options.connections_max.max(1) && callers_too
    }

    /// Takes a place.
    fn place(self: &Rc<Pool>, state: &mut State, whose: Whose) -> Place {
        state.open += 1;
        state.of_callers += usize::from(whose == Whose::Caller);
        Place { pool: Rc::downgrade(self), whose }
    }

    /// The connection that idles longest, of all or of these.
    fn take_longest_idle(&self, whose: Option<Whose>) -> Option<Connection> {
        let mut state = self.state.borrow_mut();
        let meant = state.idle.iter().filter(|(origin, _)| whose.is_none_or(|whose| origin.whose == whose));
        let heads = meant.filter_map(|(origin, queue)| Some((queue.front()?.since, origin)));
        let origin = Rc::clone(heads.min_by_key(|(since, _)| *since)?.1);
        let queue = state.idle.get_mut(&origin)?;
        let idle = queue.pop_front()?;
        if queue.is_empty() {
            state.idle.remove(&origin);
        }
        state.idle_count -= 1;
        Some(idle.connection)
    }

    /// Closes what has idled too long; returns when the next will have, if anything idles.
    fn sweep(&self, now: Instant) -> Option<Instant> {
        let mut expired = Vec::new();
        let mut state = self.state.borrow_mut();
        let timeout = self.options.idle_timeout;
        for queue in state.idle.values_mut() {
            while queue.front().is_some_and(|idle| idle.since + timeout <= now) {
                expired.extend(queue.pop_front());
            }
        }
        state.idle.retain(|_, queue| !queue.is_empty());
        state.idle_count -= expired.len();
        let next = state.idle.values().filter_map(|queue| Some(queue.front()?.since + timeout)).min();
        state.sweeping = next.is_some();
        drop(state);
        drop(expired);
        next
    }

    fn sweep_while_idle(self: &Rc<Pool>) {
        let mut state = self.state.borrow_mut();
        if state.sweeping || state.idle_count == 0 {
            return;
        }
        state.sweeping = true;
        let first = Instant::now() + self.options.idle_timeout;
        let pool = Rc::downgrade(self);
        monoio::spawn(async move {
            let mut due = Some(first);
            while let Some(at) = due {
                sleep_until(at).await;
                due = pool.upgrade().and_then(|pool| pool.sweep(Instant::now()));
            }
        });
    }

    /// A place is free: whoever's turn it is gets it.
    fn release(self: &Rc<Pool>, freed: Whose) {
        {
            let mut state = self.state.borrow_mut();
            state.open -= 1;
            state.of_callers -= usize::from(freed == Whose::Caller);
        }
        // The count of callers' is less by this one already.
        let Some((whose, waiter)) = self.next_waiting(Whose::Operator) else { return };
        let place = {
            let mut state = self.state.borrow_mut();
            state.waiting(whose).pop_front();
            self.place(&mut state, whose)
        };
        waiter.grant(Leave::Open(place));
    }
}

impl State {
    fn waiting(&mut self, whose: Whose) -> &mut VecDeque<Rc<Waiter>> {
        match whose {
            Whose::Operator => &mut self.waiting,
            Whose::Caller => &mut self.callers_waiting,
        }
    }
}

impl Waiter {
    fn is_waiting(&self) -> bool {
        matches!(*self.state.borrow(), WaiterState::Waiting(_))
    }

    fn grant(&self, leave: Leave) {
        if let WaiterState::Waiting(Some(waker)) = self.state.replace(WaiterState::Granted(leave)) {
            waker.wake();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.release(self.whose);
        }
    }
}

/// Marks a waiter that gave up, for the queue to pass over; a place it was granted meanwhile goes on to the next.
struct Leaving<'a> {
    waiter: &'a Waiter,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let left = self.waiter.state.replace(WaiterState::Gone);
        drop(left); // Not under a borrow: a place that is freed looks for its next holder.
    }
}
