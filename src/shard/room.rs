//! What the streams of a core hold, within bounds: values and histories.
//!
//! Source: `limits.history_bytes_total`. One part of it in [`DIRECT_BYTES_PART`] is for the streams that callers describe,
//! where they may, and counted over all cores: what they hold takes nothing from the operator's streams. The rest is the
//! operator's, each core has its share. Sequences that nobody watches go first, the longest unwatched before others, then the
//! histories of watched ones are cut. What is left is one value for each watched sequence: of the operator's streams that
//! stays, however much it is (`response_bytes_max` each); of callers' the largest streams end.
//! Memory: nothing of its own. Errors: [`Mail::Refused`] to those whose stream has ended.

use std::sync::Arc;

use crate::ids::CoreId;
use crate::limits::DIRECT_BYTES_PART;
use crate::stream::SequenceNo;
use crate::time::Instant;

use super::owner::Owned;
use super::{Mail, Shard};

/// Who has named what a stream polls.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Whose {
    Operators,
    Callers,
}

impl Whose {
    fn of(owned: &Owned) -> Whose {
        if owned.key.is_direct() { Whose::Callers } else { Whose::Operators }
    }
}

impl Shard {
    /// Keeps the bounds, where the stream at `newest` holds more than before: it is cut last.
    pub(super) fn bound_histories(&mut self, newest: u32) {
        self.recount(newest);
        let Some(whose) = self.streams.at(newest).map(Whose::of) else { return };
        self.make_room(whose, newest);
        if whose == Whose::Callers {
            self.end_largest();
            // This core has no more than its part; another has.
            if self.ledger.direct_bytes() > self.direct_bytes_max() {
                let own = self.core;
                for core in (0..self.cores).map(CoreId).filter(|&core| core != own) {
                    self.send(core, Mail::Crowded);
                }
            }
        }
    }

    /// Another core says that streams which callers have described hold too much together.
    pub(super) fn crowded(&mut self) {
        self.make_room(Whose::Callers, u32::MAX);
        self.end_largest();
    }

    /// What the streams that callers have described may hold in all.
    fn direct_bytes_max(&self) -> u64 {
        self.options.limits.history_bytes_total / DIRECT_BYTES_PART
    }

    /// By how much this core's streams of that kind hold more than they may.
    fn excess(&self, whose: Whose) -> u64 {
        let cores = u64::from(self.cores.max(1));
        let for_callers = self.direct_bytes_max();
        match whose {
            Whose::Callers => {
                // Whoever has less than an equal part is not at fault.
                let over = self.ledger.direct_bytes().saturating_sub(for_callers);
                over.min(self.direct_bytes.saturating_sub(for_callers / cores))
            }
            Whose::Operators => {
                let reserved = if self.options.catalog.direct().is_some() { for_callers } else { 0 };
                let share = (self.options.limits.history_bytes_total - reserved) / cores;
                (self.history_bytes - self.direct_bytes).saturating_sub(share)
            }
        }
    }

    fn make_room(&mut self, whose: Whose, newest: u32) {
        while self.excess(whose) > 0 {
            let Some((index, no)) = self.oldest_unwatched(whose, newest) else { break };
            self.evict_sequence(index, no);
        }
        if self.excess(whose) == 0 {
            return;
        }
        let streams = self.streams.iter().filter(|(_, owned)| Whose::of(owned) == whose);
        let mut order: Vec<(bool, Instant, u32)> =
            streams.map(|(index, owned)| (index == newest, owned.used, index)).collect();
        order.sort_unstable();
        for (_, _, index) in order {
            let excess = self.excess(whose);
            if excess == 0 {
                return;
            }
            let Some(owned) = self.streams.at_mut(index) else { continue };
            let before = owned.stream.bytes();
            owned.stream.trim_to(before.saturating_sub(excess));
            // The copies of other cores hold the same texts: only when all have let go of them are they gone.
            let mails = owned.audiences.iter().filter_map(|audience| {
                let bytes = owned.stream.history(audience.no)?.bytes();
                Some(audience.cores.keys().map(move |&core| (core, Arc::clone(&audience.key), bytes)))
            });
            for (core, key, bytes) in mails.flatten().collect::<Vec<_>>() {
                self.send(core, Mail::Trimmed { key, bytes });
            }
            self.recount(index);
        }
    }

    /// The sequence that has gone unwatched for longest, with its stream's place; of `newest` only beside a watched one.
    fn oldest_unwatched(&self, whose: Whose, newest: u32) -> Option<(u32, SequenceNo)> {
        let streams = self.streams.iter().filter(|(index, owned)| {
            Whose::of(owned) == whose && !owned.warm && (*index != newest || owned.is_watched())
        });
        let unwatched = streams.flat_map(|(index, owned)| {
            let audiences = owned.audiences.iter().filter(|audience| !audience.is_watched());
            audiences.map(move |audience| (audience.used, index, audience.no))
        });
        unwatched.min().map(|(_, index, no)| (index, no))
    }

    /// Ends streams that callers have described, while they hold too much with nothing left to cut: the largest, of equal ones
    /// the newest.
    fn end_largest(&mut self) {
        while self.excess(Whose::Callers) > 0 {
            let callers = self.streams.iter().filter(|(_, owned)| owned.key.is_direct());
            let largest = callers.max_by_key(|(_, owned)| (owned.counted, owned.generation));
            let Some((index, owned)) = largest.filter(|(_, owned)| owned.counted > 0) else { return };
            let audiences = owned.audiences.iter().map(|audience| (audience.cores(), Arc::clone(&audience.key)));
            for (cores, key) in audiences.collect::<Vec<_>>() {
                for core in cores {
                    self.send(core, Mail::Refused { key: Arc::clone(&key), full: false });
                }
            }
            self.evict(index);
        }
    }

    /// Brings the totals up to date with one stream.
    pub(super) fn recount(&mut self, index: u32) {
        let Some(owned) = self.streams.at_mut(index) else { return };
        let (bytes, direct) = (owned.stream.bytes(), owned.key.is_direct());
        let before = std::mem::replace(&mut owned.counted, bytes);
        self.count_bytes(before, bytes, direct);
    }

    /// A stream holds `after` bytes where it held `before`.
    pub(super) fn count_bytes(&mut self, before: u64, after: u64, direct: bool) {
        self.history_bytes = self.history_bytes - before + after;
        if direct {
            self.direct_bytes = self.direct_bytes - before + after;
            self.ledger.recount_direct(before, after);
        }
        self.metrics.history_bytes.set(self.history_bytes);
    }
}
