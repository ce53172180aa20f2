//! What the cores of a process count together: connections, streams, and what one address or one subject may hold; and
//! what they all must know of users, sessions and tokens.
//!
//! Memory: one entry for each address or subject that holds something or failed lately, bounded by
//! [`ENTRIES_PER_PART_MAX`], and the marks (`auth::marks`). The locks are held for a map look-up, at a handshake, never on a delivery.
//! Errors: [`Over`] says which bound was met. Not here: what is answered then.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use crate::auth::ephemeral::{DirectKey, Place};
use crate::auth::hook::HookMark;
use crate::auth::marks::Marks;
use crate::ids::{EphemeralId, Holder, ProcessId, StreamId};
use crate::limits::Limits;
use crate::stream::budget::Budgets;
use crate::stream::succession::Successions;
use crate::time::Instant;

use super::ephemeral_table::Ephemerals;
use super::hooks::HooksSeen;
use super::places::{Change, Full, Places, Wanted};
use super::ticket_table::Tickets;

/// Entries in one of the [`PARTS`] of the ledger.
const ENTRIES_PER_PART_MAX: usize = 65_536;
const PARTS: usize = 32;
const MINUTE_US: u64 = 60_000_000;

/// A bound that would be passed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Over;

/// Bounds of what one core does for all of them. A reload reaches the cores one after another: whoever of them is the first
/// to ask by it must not be refused by one that has not heard of it, so these are the process's and hold before it is told.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Bounds {
    /// `limits.streams`.
    pub(super) streams: u32,
    /// `limits.selects_per_stream`.
    pub(super) selects_per_stream: u32,
}

impl Bounds {
    fn of(limits: &Limits) -> Bounds {
        Bounds { streams: limits.streams, selects_per_stream: limits.selects_per_stream }
    }
}

/// How an address stands by its failed credentials.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Standing {
    /// It may go on.
    Good,
    /// Over its limit: answers to further failures are delayed.
    Delayed,
    /// Over twice its limit: its credentials are not looked at.
    Refused,
}

#[derive(Debug, Default)]
struct Entry {
    connections: u32,
    places: Places,
    handshakes: Bucket,
    failures: Bucket,
    actions: Bucket,
}

impl Entry {
    fn is_idle(&self, now: Instant) -> bool {
        self.connections == 0
            && self.places.is_empty()
            && [&self.handshakes, &self.failures, &self.actions].iter().all(|bucket| bucket.is_empty(now))
    }
}

/// How much of a rate has been used: it flows off evenly (a leaky bucket, in units of the period).
#[derive(Debug, Default)]
struct Bucket {
    level_us: u64,
    seen: Instant,
}

impl Bucket {
    fn flow(&mut self, now: Instant) {
        let passed = u64::try_from(now.since(self.seen).as_micros()).unwrap_or(u64::MAX);
        self.level_us = self.level_us.saturating_sub(passed);
        self.seen = now;
    }

    fn is_empty(&self, now: Instant) -> bool {
        now.since(self.seen) >= Duration::from_micros(self.level_us)
    }

    /// Adds `one`, if there are at most `all` then.
    fn add(&mut self, now: Instant, one: u64, all: u64) -> Result<(), Over> {
        self.flow(now);
        if self.level_us + one > all {
            return Err(Over);
        }
        self.level_us += one;
        Ok(())
    }
}

/// The shared counts of a process.
#[derive(Debug)]
pub struct Ledger {
    hasher: RandomState,
    connections: AtomicU64,
    streams: AtomicU64,
    /// `None`: no core has begun.
    bounds: Mutex<Option<Bounds>>,
    /// Bytes of values and histories of streams that callers have described,
    direct_bytes: AtomicU64,
    /// and those of them that are left if all that can be cut is, of each who has described such a stream that is watched.
    direct_least: Mutex<HashMap<Holder, u64>>,
    parts: Vec<Mutex<HashMap<Holder, Entry>>>,
    /// How many subjects have each stream polled, by the hash of what is polled. Locked within a lock of `parts`, never
    /// the other way round.
    keepers: Vec<Mutex<HashMap<u64, u32>>>,
    marks: Marks,
    hooks: Mutex<HooksSeen>,
    tickets: Tickets,
    budgets: Arc<Budgets>,
    successions: Successions,
    ephemerals: Ephemerals,
    direct_key: OnceLock<DirectKey>,
    process: ProcessId,
}

impl Default for Ledger {
    fn default() -> Ledger {
        let hasher = RandomState::new();
        Ledger {
            process: ProcessId(hasher.hash_one("process")),
            hasher,
            connections: AtomicU64::new(0),
            streams: AtomicU64::new(0),
            bounds: Mutex::default(),
            direct_bytes: AtomicU64::new(0),
            direct_least: Mutex::default(),
            parts: (0..PARTS).map(|_| Mutex::default()).collect(),
            keepers: (0..PARTS).map(|_| Mutex::default()).collect(),
            marks: Marks::default(),
            tickets: Tickets::default(),
            budgets: Arc::default(),
            successions: Successions::default(),
            hooks: Mutex::default(),
            ephemerals: Ephemerals::default(),
            direct_key: OnceLock::new(),
        }
    }
}

impl Ledger {
    /// What was said of users, sessions and tokens.
    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// What streams leave to those that take their places.
    pub fn successions(&self) -> &Successions {
        &self.successions
    }

    /// How often upstreams may be asked.
    pub fn budgets(&self) -> &Arc<Budgets> {
        &self.budgets
    }

    /// The holder that `name` (an address, a subject) stands for.
    pub fn holder(&self, kind: &str, name: impl Hash) -> Holder {
        Holder::from_hash(self.hasher.hash_one((kind, name)))
    }

    /// The holder that a client's address stands for. An IPv6 client has a network of its own to choose addresses from
    /// (RFC 6177): its first 64 bits count.
    pub fn address(&self, address: IpAddr) -> Holder {
        match address {
            IpAddr::V4(address) => self.holder("v4", address),
            IpAddr::V6(address) => self.holder("v6", address.to_bits() >> 64),
        }
    }

    /// The same of a client of the admin listener.
    pub fn admin_address(&self, address: IpAddr) -> Holder {
        self.holder("admin", self.address(address.to_canonical()))
    }

    /// How many tickets were made that are not too old, used or not.
    pub fn tickets_made(&self, now: Instant) -> usize {
        self.tickets.made(now)
    }

    /// An empty one of the process with that name; [`Ledger::default`] draws it.
    pub fn of(process: ProcessId) -> Ledger {
        Ledger { process, ..Ledger::default() }
    }

    /// The process's name among those that share a Redis.
    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// Whether a hook asks for a poll; otherwise it is a replay.
    pub(super) fn is_news(&self, id: &StreamId, mark: HookMark, now: Instant) -> bool {
        self.hooks.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_news(id, mark, now)
    }

    /// The tickets that were made.
    pub(super) fn tickets(&self) -> &Tickets {
        &self.tickets
    }

    /// The ephemeral sessions that were made.
    pub(super) fn ephemerals(&self) -> &Ephemerals {
        &self.ephemerals
    }

    /// How many ephemeral sessions there are.
    pub fn ephemeral_sessions(&self) -> usize {
        self.ephemerals.len()
    }

    /// Makes the key of direct mode of these bits, unless there is one.
    pub(super) fn keep_direct_key(&self, key: impl FnOnce() -> DirectKey) {
        self.direct_key.get_or_init(key);
    }

    /// Ends an ephemeral session, by the place of its record: which that was, where it is known here.
    pub fn end_ephemeral(&self, place: Place) -> Option<EphemeralId> {
        self.ephemerals.by_place(place).filter(|id| self.ephemerals.remove(*id))
    }

    /// The key of direct mode.
    pub(super) fn direct_key(&self) -> &DirectKey {
        self.direct_key.get().expect("each core begins by making it")
    }

    /// From now on these hold, for every core: to be said before any of them is told.
    pub fn bound(&self, limits: &Limits) {
        *self.bounds.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Bounds::of(limits));
    }

    /// The bounds that hold; those of `limits` from now on, where none were said before.
    pub(super) fn bounds(&self, limits: &Limits) -> Bounds {
        let mut bounds = self.bounds.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *bounds.get_or_insert(Bounds::of(limits))
    }

    /// One more connection in all, if that is at most `limit` (0: unlimited).
    pub fn open_connection(&self, limit: u32) -> Result<(), Over> {
        add(&self.connections, limit)
    }

    /// One connection fewer.
    pub fn close_connection(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many connections there are.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// One more stream in all, if that is at most `limit` (0: unlimited).
    pub fn open_stream(&self, limit: u32) -> Result<(), Over> {
        add(&self.streams, limit)
    }

    /// One stream fewer.
    pub fn close_stream(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many streams there are.
    pub fn streams(&self) -> u64 {
        self.streams.load(Ordering::Relaxed)
    }

    /// One more connection of `holder`, if that is at most `limit`; 0: not counted.
    pub fn hold_connection(&self, holder: Holder, limit: u32, now: Instant) -> Result<(), Over> {
        self.with(holder, now, |entry| {
            if entry.connections >= limit {
                return Err(Over);
            }
            entry.connections += 1;
            Ok(())
        })
    }

    /// One connection of `holder` fewer.
    pub fn release_connection(&self, holder: Holder, now: Instant) {
        let _ = self.with(holder, now, |entry| {
            entry.connections = entry.connections.saturating_sub(1);
            Ok(())
        });
    }

    /// One more watch of `holder`, if they take at most `limit` places: the streams that nobody has polled any more because
    /// of that, by the hash of what is polled.
    ///
    /// # Errors
    /// There is no place.
    pub fn hold_stream(&self, holder: Holder, wanted: Wanted, limit: u32, now: Instant) -> Result<Vec<u64>, Full> {
        let mut held = Err(Full { wait: None });
        let _ = self.with(holder, now, |entry| {
            held = entry.places.hold(wanted, limit, now).map(|change| self.keep(change));
            Ok(())
        });
        held
    }

    /// One watch of `holder` on that stream fewer; what is polled is so for `linger`, or no more. When to call
    /// [`Ledger::pass_places`], where that is not known yet.
    pub fn release_stream(
        &self,
        holder: Holder,
        shown: u64,
        linger: Option<Duration>,
        now: Instant,
    ) -> Option<Instant> {
        let mut at = None;
        let _ = self.with(holder, now, |entry| {
            let (ended, look) = entry.places.release(shown, linger, now);
            self.keep(Change { begun: None, ended: ended.into_iter().collect() });
            at = look;
            Ok(())
        });
        at
    }

    /// `holder` was moved from what is polled so to something else, by no doing of its own: its place is free.
    pub fn yield_place(&self, holder: Holder, polled: u64, now: Instant) {
        let _ = self.with(holder, now, |entry| {
            entry.places.yield_place(polled);
            Ok(())
        });
    }

    /// Time has passed: gives the places of `holder` back whose streams are polled no more. When to look again.
    pub fn pass_places(&self, holder: Holder, now: Instant) -> Option<Instant> {
        let mut next = None;
        let _ = self.with(holder, now, |entry| {
            let (ended, at) = entry.places.pass(now);
            self.keep(Change { begun: None, ended });
            next = at;
            Ok(())
        });
        next
    }

    /// Counts who has what polled; what nobody has any more.
    fn keep(&self, change: Change) -> Vec<u64> {
        if let Some(begun) = change.begun {
            *self.keepers_of(begun).entry(begun).or_default() += 1;
        }
        let mut ended = change.ended;
        ended.retain(|&polled| {
            let mut part = self.keepers_of(polled);
            let Some(count) = part.get_mut(&polled) else { return true };
            *count -= 1;
            let nobody = *count == 0;
            if nobody {
                part.remove(&polled);
            }
            nobody
        });
        ended
    }

    fn keepers_of(&self, polled: u64) -> MutexGuard<'_, HashMap<u64, u32>> {
        let part = usize::try_from(polled % PARTS as u64).expect("there are few parts");
        self.keepers[part].lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How many streams callers have polled, and how many places of subjects are taken by them, be it that they linger.
    pub fn kept_streams(&self) -> (usize, usize) {
        let parts = self.keepers.iter().map(|part| part.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        parts.fold((0, 0), |(streams, places), part| {
            (streams + part.len(), places + part.values().map(|&count| count as usize).sum::<usize>())
        })
    }

    /// Whether several subjects have that stream polled.
    pub(super) fn is_kept_by_several(&self, polled: u64) -> bool {
        self.keepers_of(polled).get(&polled).is_some_and(|&count| count > 1)
    }

    /// Values and histories of streams that callers have described take `after` bytes where they took `before`.
    pub(super) fn recount_direct(&self, before: u64, after: u64) {
        if after >= before {
            self.direct_bytes.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.direct_bytes.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    /// Of those that `holder` has described at least `after` bytes are left where `before` were.
    pub(super) fn recount_direct_least(&self, holder: Holder, before: u64, after: u64) {
        let mut all = self.direct_least.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let own = all.entry(holder).or_default();
        *own = (*own + after).saturating_sub(before);
        if *own == 0 {
            all.remove(&holder);
        }
    }

    /// Who holds most of them, where more than `bytes_max` are left however much is cut.
    pub(super) fn greediest(&self, bytes_max: u64) -> Option<Holder> {
        let all = self.direct_least.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let over = all.values().sum::<u64>() > bytes_max;
        let most = all.iter().max_by_key(|&(&holder, &bytes)| (bytes, holder));
        most.filter(|_| over).map(|(&holder, _)| holder)
    }

    /// How many they are, of all cores.
    pub fn direct_bytes(&self) -> u64 {
        self.direct_bytes.load(Ordering::Relaxed)
    }

    /// One more handshake from `holder`, of at most `per_second` (0: not counted).
    pub fn handshake(&self, holder: Holder, per_second: u32, now: Instant) -> Result<(), Over> {
        if per_second == 0 {
            return Ok(());
        }
        self.with(holder, now, |entry| entry.handshakes.add(now, 1_000_000 / u64::from(per_second), 1_000_000))
    }

    /// One more action of `holder`, or request with the API key that it is, of `count` in each `period`, which may all come at once.
    ///
    /// # Errors
    /// How long it must wait.
    pub fn action(&self, holder: Holder, count: u32, period: Duration, now: Instant) -> Result<(), Duration> {
        let all = u64::try_from(period.as_micros()).unwrap_or(u64::MAX);
        let one = (all / u64::from(count.max(1))).max(1);
        let mut wait = period;
        let counted = self.with(holder, now, |entry| {
            entry.actions.add(now, one, all).inspect_err(|_| {
                wait = Duration::from_micros((entry.actions.level_us + one).saturating_sub(all));
            })
        });
        counted.map_err(|Over| wait)
    }

    /// One more failed credential from `holder`, of `per_minute` (0: not counted).
    pub fn failure(&self, holder: Holder, per_minute: u32, now: Instant) {
        if per_minute > 0 {
            let twice = 2 * MINUTE_US;
            let _ = self.with(holder, now, |entry| entry.failures.add(now, MINUTE_US / u64::from(per_minute), twice));
        }
    }

    /// How `holder` stands by its failed credentials.
    pub fn standing(&self, holder: Holder, per_minute: u32, now: Instant) -> Standing {
        if per_minute == 0 {
            return Standing::Good;
        }
        let one = MINUTE_US / u64::from(per_minute);
        let mut standing = Standing::Good;
        let _ = self.with(holder, now, |entry| {
            entry.failures.flow(now);
            standing = match entry.failures.level_us {
                level if level + one > 2 * MINUTE_US => Standing::Refused,
                level if level + one > MINUTE_US => Standing::Delayed,
                _ => Standing::Good,
            };
            Ok(())
        });
        standing
    }

    fn with(&self, holder: Holder, now: Instant, act: impl FnOnce(&mut Entry) -> Result<(), Over>) -> Result<(), Over> {
        let part = &self.parts[usize::try_from(holder.bits() % PARTS as u64).expect("there are few parts")];
        // A panic while the lock was held leaves counts, which are still good to go on with.
        let mut part = part.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if part.len() >= ENTRIES_PER_PART_MAX && !part.contains_key(&holder) {
            part.retain(|_, entry| !entry.is_idle(now));
            if part.len() >= ENTRIES_PER_PART_MAX {
                return Err(Over);
            }
        }
        let entry = part.entry(holder).or_default();
        let done = act(entry);
        if entry.is_idle(now) {
            part.remove(&holder);
        }
        done
    }
}

fn add(count: &AtomicU64, limit: u32) -> Result<(), Over> {
    let before = count.fetch_add(1, Ordering::Relaxed);
    if limit != 0 && before >= u64::from(limit) {
        count.fetch_sub(1, Ordering::Relaxed);
        return Err(Over);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Instant = Instant::from_micros(1_000_000_000);
    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn connections_are_counted_to_their_limit() {
        let ledger = Ledger::default();
        assert_eq!((ledger.open_connection(2), ledger.open_connection(2)), (Ok(()), Ok(())));
        assert_eq!(ledger.open_connection(2), Err(Over));
        ledger.close_connection();
        assert_eq!(ledger.open_connection(2), Ok(()));
        assert_eq!(ledger.open_connection(0), Ok(()), "0 is unlimited");
    }

    #[test]
    fn one_holder_does_not_use_up_anothers_limit() {
        let ledger = Ledger::default();
        let (a, b) = (ledger.holder("address", "a"), ledger.holder("address", "b"));
        assert_eq!(ledger.hold_connection(a, 1, NOW), Ok(()));
        assert_eq!(ledger.hold_connection(a, 1, NOW), Err(Over));
        assert_eq!(ledger.hold_connection(b, 1, NOW), Ok(()));
        ledger.release_connection(a, NOW);
        assert_eq!(ledger.hold_connection(a, 1, NOW), Ok(()));
    }

    #[test]
    fn an_ipv6_network_of_64_bits_is_one_holder() {
        let ledger = Ledger::default();
        let of = |text: &str| ledger.address(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:2:ffff::9"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[test]
    fn a_stream_watched_twice_counts_once() {
        let ledger = Ledger::default();
        let a = ledger.holder("subject", "a");
        let part = |shown| Wanted { shown, polled: None, spacing: Duration::ZERO };
        let hold = |shown| ledger.hold_stream(a, part(shown), 1, NOW);
        assert_eq!((hold(7), hold(7)), (Ok(vec![]), Ok(vec![])));
        assert_eq!(hold(8), Err(Full { wait: None }));
        assert_eq!(ledger.release_stream(a, 7, Some(MINUTE), NOW), None);
        assert_eq!(hold(8), Err(Full { wait: None }));
        assert_eq!(ledger.release_stream(a, 7, Some(MINUTE), NOW), None);
        assert_eq!(hold(8), Ok(vec![]));
    }

    #[test]
    fn a_stream_that_one_has_left_ends_when_nobody_else_has_it_polled() {
        let ledger = Ledger::default();
        let [a, b] = ["a", "b"].map(|name| ledger.holder("subject", name));
        let place = |polled| Wanted { shown: polled, polled: Some(polled), spacing: Duration::ZERO };
        assert_eq!(
            (ledger.hold_stream(a, place(7), 1, NOW), ledger.hold_stream(b, place(7), 1, NOW)),
            (Ok(vec![]), Ok(vec![]))
        );
        assert_eq!(ledger.kept_streams(), (1, 2));
        let look = ledger.release_stream(a, 7, Some(MINUTE), NOW);
        assert_eq!((look, ledger.release_stream(b, 7, Some(MINUTE), NOW)), (Some(NOW + MINUTE), Some(NOW + MINUTE)));
        assert_eq!(ledger.hold_stream(a, place(8), 1, NOW), Ok(vec![]), "b has left it too, and has it polled still");
        assert_eq!(ledger.hold_stream(b, place(9), 1, NOW), Ok(vec![7]));
        assert_eq!(ledger.kept_streams(), (2, 2));
        ledger.release_stream(a, 8, None, NOW);
        ledger.release_stream(b, 9, Some(MINUTE), NOW);
        assert_eq!(ledger.pass_places(b, NOW + MINUTE), None);
        assert_eq!(ledger.pass_places(a, NOW + MINUTE), None);
        assert_eq!(ledger.kept_streams(), (0, 0));
        let held: usize = ledger.parts.iter().map(|part| part.lock().unwrap().len()).sum();
        assert_eq!(held, 0, "nobody is remembered");
    }

    #[test]
    fn whoever_holds_most_is_told_only_where_cutting_is_not_enough() {
        let ledger = Ledger::default();
        let [a, b] = ["a", "b"].map(|name| ledger.holder("subject", name));
        ledger.recount_direct_least(a, 0, 60);
        ledger.recount_direct_least(b, 0, 25);
        ledger.recount_direct_least(b, 0, 25);
        assert_eq!((ledger.greediest(110), ledger.greediest(109)), (None, Some(a)));
        ledger.recount_direct_least(a, 60, 40);
        assert_eq!((ledger.greediest(90), ledger.greediest(89)), (None, Some(b)), "all that one has is counted");
        ledger.recount_direct_least(b, 25, 0);
        ledger.recount_direct_least(b, 25, 0);
        assert_eq!(ledger.greediest(0), Some(a));
        ledger.recount_direct_least(a, 40, 0);
        assert_eq!((ledger.greediest(0), ledger.direct_least.lock().unwrap().len()), (None, 0), "nobody is remembered");
    }

    #[test]
    fn an_address_that_was_only_asked_about_leaves_nothing_behind() {
        let ledger = Ledger::default();
        let held = |ledger: &Ledger| ledger.parts.iter().map(|part| part.lock().unwrap().len()).sum::<usize>();
        let a = ledger.holder("address", "a");
        assert_eq!(ledger.standing(a, 60, NOW), Standing::Good);
        assert_eq!(held(&ledger), 0);
        ledger.failure(a, 60, NOW);
        assert_eq!(held(&ledger), 1);
        assert_eq!(ledger.standing(a, 60, NOW + Duration::from_millis(999)), Standing::Good);
        assert_eq!(held(&ledger), 1, "one of 60 a minute flows off in a second");
        assert_eq!(ledger.standing(a, 60, NOW + Duration::from_secs(1)), Standing::Good);
        assert_eq!(held(&ledger), 0);
    }

    #[test]
    fn a_part_that_is_full_remembers_nobody_else_until_some_are_forgotten() {
        let ledger = Ledger::default();
        let of = |n: u64| Holder::from_hash((n + 1) * PARTS as u64);
        for n in 0..ENTRIES_PER_PART_MAX as u64 {
            ledger.failure(of(n), 60, NOW);
        }
        let one_more = of(ENTRIES_PER_PART_MAX as u64);
        assert_eq!(ledger.hold_connection(one_more, 1, NOW), Err(Over));
        assert_eq!(ledger.hold_connection(of(0), 1, NOW), Ok(()), "whoever is there is counted on");
        assert_eq!(ledger.hold_connection(Holder::from_hash(1), 1, NOW), Ok(()), "and so is everybody in another part");
        let later = NOW + Duration::from_secs(1);
        assert_eq!(ledger.hold_connection(one_more, 1, later), Ok(()));
        let held: usize = ledger.parts.iter().map(|part| part.lock().unwrap().len()).sum();
        assert_eq!(held, 3, "those whose failures have flowed off are forgotten");
    }

    #[test]
    fn time_that_passes_between_failures_does_not_let_one_more_through() {
        let ledger = Ledger::default();
        let a = ledger.holder("address", "a");
        for failures in 0..60 {
            let now = NOW + Duration::from_millis(failures);
            assert_eq!(ledger.standing(a, 60, now), Standing::Good, "after {failures}");
            ledger.failure(a, 60, now);
        }
        assert_eq!(ledger.standing(a, 60, NOW + Duration::from_millis(60)), Standing::Delayed);
    }

    #[test]
    fn actions_of_a_period_may_all_come_at_once_and_flow_off_with_time() {
        let ledger = Ledger::default();
        let (a, b) = (ledger.holder("action", "a"), ledger.holder("action", "b"));
        let minute = Duration::from_secs(60);
        for _ in 0..3 {
            assert_eq!(ledger.action(a, 3, minute, NOW), Ok(()));
        }
        assert_eq!(ledger.action(a, 3, minute, NOW), Err(Duration::from_secs(20)));
        assert_eq!(ledger.action(b, 3, minute, NOW), Ok(()), "another's are its own");
        assert_eq!(ledger.action(a, 3, minute, NOW + Duration::from_secs(19)), Err(Duration::from_secs(1)));
        assert_eq!(ledger.action(a, 3, minute, NOW + Duration::from_secs(20)), Ok(()));
        assert_eq!(ledger.action(a, 3, minute, NOW + Duration::from_secs(20)), Err(Duration::from_secs(20)));
        let held = || ledger.parts.iter().map(|part| part.lock().unwrap().len()).sum::<usize>();
        assert_eq!(held(), 2);
        let later = NOW + Duration::from_secs(200);
        assert_eq!((ledger.standing(a, 60, later), ledger.standing(b, 60, later)), (Standing::Good, Standing::Good));
        assert_eq!(held(), 0, "what has flowed off leaves nothing behind");
    }

    #[test]
    fn failures_delay_then_refuse_and_flow_off_with_time() {
        let ledger = Ledger::default();
        let a = ledger.holder("address", "a");
        for failures in 0..120 {
            let expected = if failures < 60 { Standing::Good } else { Standing::Delayed };
            assert_eq!(ledger.standing(a, 60, NOW), expected, "after {failures}");
            ledger.failure(a, 60, NOW);
        }
        assert_eq!(ledger.standing(a, 60, NOW), Standing::Refused);
        assert_eq!(ledger.standing(a, 60, NOW + Duration::from_secs(2)), Standing::Delayed);
        assert_eq!(ledger.standing(a, 60, NOW + Duration::from_secs(62)), Standing::Good);
        assert_eq!(ledger.standing(a, 0, NOW), Standing::Good, "0 is off");
    }
}
