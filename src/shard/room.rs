//! What the streams of a core hold, within bounds: values and histories.
//!
//! Source: `limits.history_bytes_total`. One part of it in [`DIRECT_BYTES_PART`] is for the streams that callers describe,
//! where they may, and counted over all cores: what they hold takes nothing from the operator's streams. The rest is the
//! operator's, each core has its share. Sequences that nobody watches go first, the longest unwatched before others, then the
//! histories of watched ones are cut. What is left is one value for each watched sequence: of the operator's streams that
//! stays, however much it is (`response_bytes_max` each); of callers' the largest streams of whoever holds most end, on
//! whichever cores they are.
//! Memory: nothing of its own. Errors: [`Mail::Refused`] to those whose stream has ended.

use std::sync::Arc;

use crate::ids::{CoreId, Holder};
use crate::limits::DIRECT_BYTES_PART;
use crate::stream::SequenceNo;
use crate::time::Instant;

use super::owner::{Held, Owned};
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
            // Nothing else is left here.
            self.make_room(whose, u32::MAX);
            self.tell_crowded();
        }
    }

    /// Another core says that streams which callers have described hold too much together.
    pub(super) fn crowded(&mut self) {
        self.make_room(Whose::Callers, u32::MAX);
        if self.end_largest() {
            // Somebody else may hold most now.
            self.tell_crowded();
        }
    }

    /// Where they hold too much still: others have what can be cut, or streams of whoever holds most.
    fn tell_crowded(&mut self) {
        if self.excess(Whose::Callers) > 0 {
            let own = self.core;
            for core in (0..self.cores).map(CoreId).filter(|&core| core != own) {
                self.send(core, Mail::Crowded);
            }
        }
    }

    /// What the streams that callers have described may hold in all.
    fn direct_bytes_max(&self) -> u64 {
        self.options.limits.history_bytes_total / DIRECT_BYTES_PART
    }

    /// By how much the operator's streams of this core hold more than they may, or callers' of all cores.
    fn excess(&self, whose: Whose) -> u64 {
        let cores = u64::from(self.cores.max(1));
        let for_callers = self.direct_bytes_max();
        match whose {
            Whose::Callers => self.ledger.direct_bytes().saturating_sub(for_callers),
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

    /// Ends streams that callers have described, while more than they may hold is left however much is cut, and some of whoever
    /// holds most of that are here: the largest, of equal ones the newest; those that others have polled as well only when no
    /// more are left. Whether any was.
    fn end_largest(&mut self) -> bool {
        let mut ended = false;
        while self.excess(Whose::Callers) > 0 {
            let Some(greediest) = self.ledger.greediest(self.direct_bytes_max()) else { break };
            let theirs = self.streams.iter().filter(|(_, owned)| {
                owned.counted.least > 0 && owned.key.target.options.described_by == Some(greediest)
            });
            let largest = theirs.max_by_key(|(_, owned)| {
                let shared = self.ledger.is_kept_by_several(owned.key.hash_value());
                (!shared, owned.counted.least, owned.generation)
            });
            let Some((index, owned)) = largest else { break };
            let audiences = owned.audiences.iter().map(|audience| (audience.cores(), Arc::clone(&audience.key)));
            for (cores, key) in audiences.collect::<Vec<_>>() {
                for core in cores {
                    self.send(core, Mail::Refused { key: Arc::clone(&key), full: false });
                }
            }
            self.evict(index);
            ended = true;
        }
        ended
    }

    /// Brings the totals up to date with one stream.
    pub(super) fn recount(&mut self, index: u32) {
        let Some(owned) = self.streams.at_mut(index) else { return };
        let bytes = owned.stream.bytes();
        let least = if owned.is_watched() { owned.stream.least_bytes() } else { 0 };
        let before = std::mem::replace(&mut owned.counted, Held { bytes, least });
        let (after, described_by) = (owned.counted, owned.key.target.options.described_by);
        self.count_bytes(before, after, described_by);
    }

    /// A stream, which that caller has described if one has, holds `after` where it held `before`.
    pub(super) fn count_bytes(&mut self, before: Held, after: Held, described_by: Option<Holder>) {
        self.history_bytes = self.history_bytes - before.bytes + after.bytes;
        self.metrics.history_bytes.set(self.history_bytes);
        let Some(holder) = described_by.filter(|_| before != after) else { return };
        self.direct_bytes = self.direct_bytes - before.bytes + after.bytes;
        self.ledger.recount_direct(before.bytes, after.bytes);
        self.ledger.recount_direct_least(holder, before.least, after.least);
    }
}
