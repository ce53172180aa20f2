//! Timer wheel: when each of many numbered things is due next, with one deadline a thing.
//!
//! Source: Varghese and Lauck, «Hashed and Hierarchical Timing Wheels» (1987), scheme 6: one level of [`SLOTS`] slots, an
//! entry further away than one rotation carries the number of its rotation and is looked at once a rotation until then.
//! One level suits deadlines that lie mostly within a rotation (a heartbeat is due every 25 s, a rotation is 51.2 s), and
//! a far one costs one look every 51.2 s; nothing ever cascades, so no tick is dearer than its slot.
//! Cost: `set` and `clear` touch three entries; a tick looks at 1/512 of the entries (1,000,000: 1,953) and an empty slot
//! is skipped by its bit. Memory: 12 bytes a key, set or not, up to the greatest key ever set, and 6.2 KiB; no allocation
//! once [`Wheel::reserve`] has made the room.
//! Errors: none.  Not here: which kinds of deadline a connection has (its owner sets the earliest), wall time.

use std::time::Duration;

use crate::time::Instant;

/// Slots of one rotation.
pub const SLOTS: usize = 512;
/// Time between two slots, unless told otherwise.
pub const TICK: Duration = Duration::from_millis(100);
/// Greatest key: what remains of the 32-bit links after the lists' own.
pub const KEY_MAX: u32 = u32::MAX - KEYS_AT - 1;

const WORDS: usize = SLOTS / 64;
/// The list of what was taken out of its slot and is to be looked at.
const DUE: u32 = SLOTS as u32;
/// Where the entries of the keys begin: after the lists' own.
const KEYS_AT: u32 = DUE + 1;
/// In place of a link: the key is not set.
const UNSET: u32 = u32::MAX;

const _: () = assert!(SLOTS.is_power_of_two() && SLOTS.is_multiple_of(64));
const _: () = assert!(size_of::<Entry>() == 12);

/// Deadlines of keys `0..`, which are places in the owner's table: at most one each.
///
/// A key is due in the first tick that begins at or after its deadline: never early, and at most one tick late where
/// [`Wheel::pop_due`] is called on time. A suspend of hours costs one look at each entry, whatever its length.
#[derive(Debug)]
pub struct Wheel {
    tick_us: u64,
    /// The last tick whose slot was emptied. Grows only.
    passed: u64,
    /// The slot that the entries of the list `DUE` were taken from.
    due_slot: u32,
    /// How many keys are set.
    len: u32,
    /// Bit `slot % 64` of word `slot / 64`: whether the slot's list holds anything.
    occupied: [u64; WORDS],
    /// The heads of the slots' lists, the head of `DUE`, then one entry for each key.
    entries: Vec<Entry>,
}

/// A link of a ring; the ring of a head alone is an empty list.
#[derive(Clone, Copy, Debug)]
struct Entry {
    next: u32,
    prev: u32,
    /// Rotation in which it is due: with the slot, its tick. 32 bits are 6,900 years of 100 ms ticks, 69 of 1 ms.
    rotation: u32,
}

impl Wheel {
    /// An empty wheel of ticks of [`TICK`].
    pub fn new(now: Instant) -> Wheel {
        Wheel::with_tick(now, TICK)
    }

    /// An empty wheel of ticks of `tick`, at least 1 ms. A rotation is 512 of them.
    pub fn with_tick(now: Instant, tick: Duration) -> Wheel {
        assert!(tick >= Duration::from_millis(1), "a tick is at least 1 ms");
        let tick_us = u64::try_from(tick.as_micros()).expect("a tick is shorter than 584,000 years");
        let passed = now.as_micros() / tick_us;
        let entries = (0..KEYS_AT).map(|head| Entry { next: head, prev: head, rotation: 0 }).collect();
        Wheel { tick_us, passed, due_slot: slot_of(passed), len: 0, occupied: [0; WORDS], entries }
    }

    /// Makes room for the keys `0..keys`, so that setting them allocates nothing.
    pub fn reserve(&mut self, keys: u32) {
        let wanted = KEYS_AT as usize + keys as usize;
        self.entries.reserve_exact(wanted.saturating_sub(self.entries.len()));
    }

    /// Makes `key` due at `deadline` and at no other time. One that has passed is due in the next call of `pop_due`.
    pub fn set(&mut self, key: u32, deadline: Instant) {
        assert!(key <= KEY_MAX, "a key is a place in a table that fits in memory");
        let entry = KEYS_AT + key;
        if self.entries.len() <= entry as usize {
            self.entries.resize(entry as usize + 1, Entry { next: UNSET, prev: UNSET, rotation: 0 });
        }
        if self.entries[entry as usize].next == UNSET {
            self.len += 1;
        } else {
            self.unlink(entry);
        }
        let tick = deadline.as_micros().div_ceil(self.tick_us);
        if tick <= self.passed {
            // In `DUE` the tick is read as rotation 0 of `due_slot`: `due_slot` itself, which is no later than `passed`.
            self.link(DUE, entry, 0);
        } else {
            let rotation = u32::try_from(tick / SLOTS as u64).unwrap_or(u32::MAX);
            self.link(slot_of(tick), entry, rotation);
        }
    }

    /// Makes `key` due at no time. Says whether it was set.
    pub fn clear(&mut self, key: u32) -> bool {
        if !self.is_set(key) {
            return false;
        }
        self.unlink(KEYS_AT + key);
        self.entries[(KEYS_AT + key) as usize].next = UNSET;
        self.len -= 1;
        true
    }

    /// Whether `key` has a deadline.
    pub fn is_set(&self, key: u32) -> bool {
        key <= KEY_MAX && self.entries.get((KEYS_AT + key) as usize).is_some_and(|entry| entry.next != UNSET)
    }

    /// How many keys have a deadline.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether no key has a deadline.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A key that is due, which is thereby no longer set. `None`: there is none, or `budget` is spent.
    ///
    /// `budget` is what a turn may still look at: each entry looked at takes one from it, also one that proves to be due
    /// in a later rotation. What is left when it is spent stays due: `next_timeout` is then not after `now`.
    /// Keys come tick by tick, those of one tick in the order they were set; after a pause of more than a rotation, in
    /// the order of their slots.
    pub fn pop_due(&mut self, now: Instant, budget: &mut u32) -> Option<u32> {
        let target = now.as_micros() / self.tick_us;
        loop {
            loop {
                let entry = self.entries[DUE as usize].next;
                if entry == DUE {
                    break;
                }
                *budget = budget.checked_sub(1)?;
                self.unlink(entry);
                let rotation = self.entries[entry as usize].rotation;
                if u64::from(rotation) * SLOTS as u64 + u64::from(self.due_slot) <= target {
                    self.entries[entry as usize].next = UNSET;
                    self.len -= 1;
                    return Some(entry - KEYS_AT);
                }
                self.link(self.due_slot, entry, rotation);
            }
            if !self.take_slot(target) {
                return None;
            }
        }
    }

    /// When to call [`Wheel::pop_due`] next: never after the tick of the earliest deadline or, where that has passed, the
    /// last `now`. It may be earlier, at most once a rotation for each slot that holds only later ones. `None`: no key is set.
    pub fn next_timeout(&self) -> Option<Instant> {
        let tick = if self.entries[DUE as usize].next == DUE { self.next_occupied()? } else { self.passed };
        Some(Instant::from_micros(tick.saturating_mul(self.tick_us)))
    }

    /// Takes the entries of the next slot that has some out of it, up to the tick `target`. `DUE` must be empty.
    fn take_slot(&mut self, target: u64) -> bool {
        // After more than a rotation each slot is looked at once, for every tick that went by.
        self.passed = self.passed.max(target.saturating_sub(SLOTS as u64));
        let Some(tick) = self.next_occupied().filter(|&tick| tick <= target) else {
            self.passed = self.passed.max(target);
            return false;
        };
        self.passed = tick;
        self.due_slot = slot_of(tick);
        let slot = self.due_slot;
        let Entry { next: first, prev: last, .. } = self.entries[slot as usize];
        (self.entries[DUE as usize].next, self.entries[DUE as usize].prev) = (first, last);
        (self.entries[first as usize].prev, self.entries[last as usize].next) = (DUE, DUE);
        (self.entries[slot as usize].next, self.entries[slot as usize].prev) = (slot, slot);
        self.occupied[slot as usize / 64] &= !(1 << (slot % 64));
        true
    }

    /// The first tick after `passed` whose slot holds anything.
    fn next_occupied(&self) -> Option<u64> {
        let from = slot_of(self.passed + 1) as usize;
        let (word, bit) = (from / 64, from % 64);
        let at_or_after = u64::MAX << bit;
        (0..=WORDS).find_map(|step| {
            let mask = match step {
                0 => at_or_after,
                WORDS => !at_or_after,
                _ => u64::MAX,
            };
            let bits = self.occupied[(word + step) % WORDS] & mask;
            let ahead = (step * 64 + bits.trailing_zeros() as usize).wrapping_sub(bit);
            (bits != 0).then_some(self.passed + 1 + ahead as u64)
        })
    }

    /// Puts `entry`, which is in no list, last in the list of `head`.
    fn link(&mut self, head: u32, entry: u32, rotation: u32) {
        let last = self.entries[head as usize].prev;
        self.entries[entry as usize] = Entry { next: head, prev: last, rotation };
        self.entries[last as usize].next = entry;
        self.entries[head as usize].prev = entry;
        if head != DUE {
            self.occupied[head as usize / 64] |= 1 << (head % 64);
        }
    }

    /// Takes `entry` out of the list it is in. The caller says what becomes of it.
    fn unlink(&mut self, entry: u32) {
        let Entry { next, prev, .. } = self.entries[entry as usize];
        self.entries[prev as usize].next = next;
        self.entries[next as usize].prev = prev;
        // Both neighbours are the head: it was the last of its list.
        if next == prev && next < DUE {
            self.occupied[next as usize / 64] &= !(1 << (next % 64));
        }
    }
}

fn slot_of(tick: u64) -> u32 {
    (tick % SLOTS as u64) as u32
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const ROTATION_MS: u64 = 51_200;

    fn ms(ms: u64) -> Instant {
        Instant::from_micros(ms * 1_000)
    }

    /// Every key that is due at `now`, in the order it comes.
    fn due(wheel: &mut Wheel, now: Instant) -> Vec<u32> {
        let mut budget = u32::MAX;
        std::iter::from_fn(|| wheel.pop_due(now, &mut budget)).collect()
    }

    #[test]
    fn a_key_is_due_in_the_first_tick_at_or_after_its_deadline() {
        let mut wheel = Wheel::new(ms(0));
        wheel.set(7, ms(300));
        wheel.set(8, Instant::from_micros(300_001));
        assert_eq!(wheel.next_timeout(), Some(ms(300)));
        assert_eq!(due(&mut wheel, Instant::from_micros(299_999)), [0u32; 0]);
        assert_eq!(due(&mut wheel, ms(300)), [7]);
        assert_eq!(wheel.next_timeout(), Some(ms(400)));
        assert_eq!(due(&mut wheel, Instant::from_micros(399_999)), [0u32; 0]);
        assert_eq!(due(&mut wheel, ms(400)), [8], "at most one tick late");
        assert_eq!((wheel.len(), wheel.next_timeout()), (0, None));
    }

    #[test]
    fn a_deadline_that_has_passed_is_due_at_once() {
        let mut wheel = Wheel::new(ms(86_400_000));
        wheel.set(0, ms(0));
        wheel.set(1, ms(86_400_000));
        assert_eq!(wheel.next_timeout(), Some(ms(86_400_000)));
        assert_eq!(due(&mut wheel, ms(86_400_000)), [0, 1]);
    }

    #[test]
    fn setting_again_moves_and_clearing_removes() {
        let mut wheel = Wheel::new(ms(0));
        wheel.set(1, ms(100));
        wheel.set(2, ms(100));
        wheel.set(1, ms(500));
        assert_eq!(wheel.len(), 2);
        assert!(wheel.clear(2));
        assert!(!wheel.clear(2), "cleared once");
        assert!(!wheel.clear(99), "never set");
        assert!(!wheel.is_set(KEY_MAX) && !wheel.is_set(u32::MAX));
        assert_eq!(wheel.next_timeout(), Some(ms(500)), "an emptied slot wakes nobody");
        assert_eq!(due(&mut wheel, ms(499)), [0u32; 0]);
        assert_eq!(due(&mut wheel, ms(500)), [1]);
    }

    #[test]
    fn a_deadline_one_rotation_away_is_not_taken_for_one_now() {
        for start in [0, 100, 51_100, 51_200, 1_000_000_000] {
            let mut wheel = Wheel::new(ms(start));
            wheel.set(0, ms(start + ROTATION_MS));
            wheel.set(1, ms(start + ROTATION_MS + 100));
            assert_eq!(due(&mut wheel, ms(start + 100)), [0u32; 0]);
            assert_eq!(due(&mut wheel, ms(start + ROTATION_MS - 100)), [0u32; 0]);
            assert_eq!(due(&mut wheel, ms(start + ROTATION_MS)), [0]);
            assert_eq!(due(&mut wheel, ms(start + ROTATION_MS + 100)), [1]);
        }
    }

    #[test]
    fn a_token_of_30_days_ends_in_its_tick() {
        let month = 30 * 86_400_000;
        let mut wheel = Wheel::new(ms(12_345));
        wheel.set(3, ms(month + 50));
        let mut turns = 0;
        while let Some(next) = wheel.next_timeout() {
            if !due(&mut wheel, next).is_empty() {
                assert_eq!(next, ms(month + 100));
            }
            turns += 1;
        }
        assert!(turns <= month / ROTATION_MS + 2, "woken once a rotation, not {turns} times");
    }

    #[test]
    fn a_deadline_past_every_clock_is_never_due() {
        let mut wheel = Wheel::new(ms(0));
        wheel.set(0, Instant::from_micros(u64::MAX));
        assert_eq!(due(&mut wheel, ms(1_000 * 365 * 86_400_000)), [0u32; 0]);
        assert_eq!(wheel.len(), 1);
    }

    #[test]
    fn a_suspend_of_hours_looks_at_each_entry_once() {
        let mut wheel = Wheel::new(ms(0));
        for key in 0..10_000u32 {
            wheel.set(key, ms(u64::from(key) * 7_200)); // 20 hours of them
        }
        let mut budget = 10_000;
        let mut fired = Vec::new();
        while let Some(key) = wheel.pop_due(ms(36_000_000), &mut budget) {
            fired.push(key);
        }
        fired.sort_unstable();
        assert_eq!(fired, (0..=5_000).collect::<Vec<u32>>(), "those of the first ten hours");
        assert_eq!(budget, 0);
        assert_eq!(due(&mut wheel, ms(36_000_000)), [0u32; 0], "and no more");
    }

    #[test]
    fn nineteen_thousand_of_one_second_are_spread_over_turns_and_none_is_lost() {
        let mut wheel = Wheel::new(ms(0));
        for key in 0..19_000 {
            wheel.set(key, ms(60_000));
        }
        let mut seen = vec![false; 19_000];
        let mut turns = 0;
        while wheel.next_timeout().is_some_and(|at| at <= ms(60_000)) {
            let mut budget = 256;
            while let Some(key) = wheel.pop_due(ms(60_000), &mut budget) {
                assert!(!std::mem::replace(&mut seen[key as usize], true), "due once");
            }
            turns += 1;
        }
        assert!(seen.iter().all(|&seen| seen));
        // 19,000 / 256, and the turn that looked at them a rotation earlier.
        assert!((75..=76 + 75).contains(&turns), "{turns} turns");
    }

    #[test]
    fn what_is_set_or_cleared_between_two_turns_of_one_tick_counts() {
        let mut wheel = Wheel::new(ms(0));
        for key in 0..4 {
            wheel.set(key, ms(100));
        }
        assert_eq!(wheel.pop_due(ms(100), &mut 1), Some(0));
        wheel.clear(1);
        wheel.set(2, ms(900));
        wheel.set(4, ms(50));
        wheel.set(5, ms(100 + ROTATION_MS));
        assert_eq!(wheel.pop_due(ms(100), &mut 0), None);
        assert!(wheel.next_timeout() <= Some(ms(100)), "something is left for the next turn");
        assert_eq!(due(&mut wheel, ms(100)), [3, 4]);
        assert_eq!(due(&mut wheel, ms(900)), [2]);
        assert_eq!(due(&mut wheel, ms(100 + ROTATION_MS)), [5]);
    }

    #[test]
    fn a_clock_read_twice_or_out_of_order_fires_nothing_early() {
        let mut wheel = Wheel::new(ms(1_000));
        wheel.set(0, ms(2_000));
        assert_eq!(due(&mut wheel, ms(1_900)), [0u32; 0]);
        assert_eq!(due(&mut wheel, ms(1_200)), [0u32; 0]);
        assert_eq!(due(&mut wheel, ms(2_000)), [0]);
    }

    #[test]
    fn ticks_of_a_millisecond_serve_polls() {
        let mut wheel = Wheel::with_tick(ms(5), Duration::from_millis(1));
        wheel.set(0, ms(6));
        wheel.set(1, ms(3_600_000));
        assert_eq!(due(&mut wheel, ms(6)), [0]);
        assert_eq!(due(&mut wheel, ms(3_599_999)), [0u32; 0]);
        assert_eq!(due(&mut wheel, ms(3_600_000)), [1]);
    }

    #[test]
    fn a_key_is_twelve_bytes() {
        let mut wheel = Wheel::new(ms(0));
        wheel.reserve(1_000_000);
        assert!(wheel.entries.capacity() * size_of::<Entry>() <= 12 * (1_000_000 + KEYS_AT as usize));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set { key: u32, in_ms: i64 },
        Clear { key: u32 },
        Turn { after_ms: u64, budget: u32 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let near = prop_oneof![-2_000..2_000i64, 0..200_000i64, Just(51_200), 0..100_000_000i64];
        let pause = prop_oneof![0..300u64, 0..60_000u64, 0..10_000_000u64];
        prop_oneof![
            4 => (0..64u32, near).prop_map(|(key, in_ms)| Step::Set { key, in_ms }),
            1 => (0..64u32).prop_map(|key| Step::Clear { key }),
            3 => (pause, prop_oneof![0..8u32, Just(1_000)])
                .prop_map(|(after_ms, budget)| Step::Turn { after_ms, budget }),
        ]
    }

    proptest! {
        #[test]
        fn it_does_what_a_sorted_map_does(start in 0..1_000_000u64, steps in prop::collection::vec(step(), 1..200)) {
            let mut wheel = Wheel::new(ms(start));
            let mut model = BTreeMap::new();
            let mut now_ms = start;
            for step in steps {
                match step {
                    Step::Set { key, in_ms } => {
                        let at = now_ms.saturating_add_signed(in_ms);
                        wheel.set(key, ms(at));
                        model.insert(key, at);
                    }
                    Step::Clear { key } => prop_assert_eq!(wheel.clear(key), model.remove(&key).is_some()),
                    Step::Turn { after_ms, budget } => {
                        now_ms += after_ms;
                        let mut left = budget;
                        while let Some(key) = wheel.pop_due(ms(now_ms), &mut left) {
                            let at = model.remove(&key);
                            prop_assert!(at.is_some_and(|at| at <= now_ms), "{key} of {at:?} came at {now_ms}");
                        }
                        let overdue = model.values().any(|at| at.div_ceil(100) <= now_ms / 100);
                        prop_assert!(!overdue || left == 0, "something due was left");
                        prop_assert!(!overdue || wheel.next_timeout() <= Some(ms(now_ms)));
                    }
                }
                prop_assert_eq!(wheel.len(), model.len());
                let earliest = model.values().min().map(|at| ms((at.div_ceil(100) * 100).max(now_ms)));
                prop_assert_eq!(wheel.next_timeout().is_some(), earliest.is_some());
                prop_assert!(wheel.next_timeout() <= earliest);
            }
        }
    }
}
