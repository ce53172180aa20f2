//! The tickets that a process keeps itself, from when they are made until they are used or too old, and the count of all
//! that it makes. Shared by its cores. One that the store has, or may have, is never here: it is used up in one place.
//!
//! Source: protocol version 1, sections 1 and 6. Memory: a few words for each ticket that was made within a ticket's life, and
//! an entry for each that is kept here, at most [`TICKETS_MAX`] of either. The lock is held for a look-up. Errors: [`Over`].
//! Not here: what is answered then (`tickets`).

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::auth::ticket::{TicketHash, TicketRecord};
use crate::ids::Holder;
use crate::limits::{TICKET_LIFE, TICKETS_MAX, TICKETS_PER_SUBJECT_MAX};
use crate::time::Instant;

/// A bound that one ticket more would pass.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Over {
    /// That of the process.
    Process,
    /// That of the subject.
    Subject,
}

#[derive(Debug, Default)]
struct Table {
    kept: HashMap<TicketHash, TicketRecord>,
    /// Those, used or not, by when they were put there.
    kept_at: VecDeque<(Instant, TicketHash)>,
    /// All that were made within a ticket's life, wherever they are kept, the earliest first.
    made: VecDeque<(Instant, Holder)>,
    made_of: HashMap<Holder, u32>,
}

impl Table {
    fn forget_old(&mut self, now: Instant) {
        while let Some(&(at, hash)) = self.kept_at.front()
            && at + TICKET_LIFE <= now
        {
            self.kept_at.pop_front();
            self.kept.remove(&hash);
        }
        while let Some(&(at, holder)) = self.made.front()
            && at + TICKET_LIFE <= now
        {
            self.made.pop_front();
            if let Some(count) = self.made_of.get_mut(&holder) {
                *count -= 1;
                if *count == 0 {
                    self.made_of.remove(&holder);
                }
            }
        }
    }
}

/// The tickets of a process.
#[derive(Debug, Default)]
pub(super) struct Tickets {
    table: Mutex<Table>,
}

impl Tickets {
    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic while the lock was held leaves a table that is still good to go on with.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a ticket of `holder`'s, wherever it is to be kept.
    ///
    /// # Errors
    /// The bound that it would pass.
    pub(super) fn count(&self, holder: Holder, now: Instant) -> Result<(), Over> {
        let mut table = self.table();
        table.forget_old(now);
        if table.made.len() >= TICKETS_MAX {
            return Err(Over::Process);
        }
        let count = table.made_of.entry(holder).or_default();
        if *count >= TICKETS_PER_SUBJECT_MAX {
            return Err(Over::Subject);
        }
        *count += 1;
        table.made.push_back((now, holder));
        Ok(())
    }

    /// Keeps a ticket that was counted, and is nowhere else.
    ///
    /// # Errors
    /// [`Over::Process`].
    pub(super) fn keep(&self, hash: TicketHash, record: TicketRecord, now: Instant) -> Result<(), Over> {
        let mut table = self.table();
        table.forget_old(now);
        // One that the store was asked to keep first comes a while after it was counted.
        if table.kept_at.len() >= TICKETS_MAX {
            return Err(Over::Process);
        }
        table.kept_at.push_back((now, hash));
        table.kept.insert(hash, record);
        Ok(())
    }

    /// How many tickets were made within a ticket's life, used ones included.
    pub(super) fn made(&self, now: Instant) -> usize {
        let mut table = self.table();
        table.forget_old(now);
        table.made.len()
    }

    /// Uses up a ticket: whoever is second finds none.
    pub(super) fn take(&self, hash: TicketHash, now: Instant) -> Option<TicketRecord> {
        let mut table = self.table();
        table.forget_old(now);
        table.kept.remove(&hash)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::auth::grant::{GrantRecord, Rights};
    use crate::auth::ticket;
    use crate::time::WallTime;

    const NOW: Instant = Instant::from_micros(1_000_000_000);

    fn hash(no: u32) -> TicketHash {
        let mut random = [0; 32];
        random[..4].copy_from_slice(&no.to_le_bytes());
        TicketHash::of(ticket::of_random(random).expose_secret()).expect("a ticket")
    }

    fn record() -> TicketRecord {
        let grant = GrantRecord {
            sub: None,
            expires: None,
            issued_at: None,
            key: None,
            token: None,
            rights: Rights::default(),
            session: None,
            api_key: None,
        };
        TicketRecord { ends: WallTime::from_secs(1), grant }
    }

    fn holder(no: u32) -> Holder {
        Holder::from_hash(u64::from(no))
    }

    #[test]
    fn a_ticket_is_taken_once_and_within_its_life() {
        let tickets = Tickets::default();
        for no in 0..2 {
            assert_eq!(tickets.keep(hash(no), record(), NOW), Ok(()));
        }
        assert_eq!(tickets.take(hash(0), NOW + (TICKET_LIFE - Duration::from_micros(1))), Some(record()));
        assert_eq!(tickets.take(hash(0), NOW), None);
        assert_eq!(tickets.take(hash(1), NOW + TICKET_LIFE), None);
        assert_eq!(tickets.take(hash(2), NOW), None);
    }

    #[test]
    fn tickets_are_bounded_for_a_subject_and_for_the_process_by_when_they_were_made() {
        let tickets = Tickets::default();
        for no in 0..TICKETS_PER_SUBJECT_MAX {
            assert_eq!(tickets.count(holder(1), NOW), Ok(()));
            assert_eq!(tickets.keep(hash(no), record(), NOW), Ok(()));
            assert!(tickets.take(hash(no), NOW).is_some());
        }
        assert_eq!(tickets.count(holder(1), NOW), Err(Over::Subject), "used ones count as well");
        let all = u32::try_from(TICKETS_MAX).expect("few");
        for no in TICKETS_PER_SUBJECT_MAX..all {
            assert_eq!(tickets.count(holder(1_000 + no / TICKETS_PER_SUBJECT_MAX), NOW), Ok(()));
            assert_eq!(tickets.keep(hash(no), record(), NOW), Ok(()));
        }
        assert_eq!(tickets.count(holder(2), NOW), Err(Over::Process));
        assert_eq!(tickets.keep(hash(all), record(), NOW), Err(Over::Process));
        assert_eq!(tickets.count(holder(1), NOW + TICKET_LIFE), Ok(()));
        assert_eq!(tickets.keep(hash(all), record(), NOW + TICKET_LIFE), Ok(()));
        let table = tickets.table();
        let left = (table.made.len(), table.made_of.len(), table.kept.len(), table.kept_at.len());
        assert_eq!(left, (1, 1, 1, 1), "the old ones are gone");
    }
}
