//! The tickets of a process, from when they are made until they are used or too old. Shared by its cores.
//!
//! Source: protocol version 1, sections 1 and 6. Memory: an entry for each ticket that was made within a ticket's life, at
//! most [`TICKETS_MAX`]. The lock is held for a look-up. Errors: [`Over`]. Not here: what is answered then (`tickets`).

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
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

/// Where besides this table a ticket is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Elsewhere {
    /// In the store, where it is to be used up.
    Kept,
    /// In the store or not: it did not say.
    Unsure,
    /// Nowhere.
    No,
}

#[derive(Debug)]
struct Entry {
    record: TicketRecord,
    elsewhere: Elsewhere,
}

#[derive(Debug, Default)]
struct Table {
    kept: HashMap<TicketHash, Entry>,
    /// All that were made within a ticket's life, used or not, the earliest first.
    made: VecDeque<(Instant, TicketHash, Option<Holder>)>,
    made_of: HashMap<Holder, u32>,
}

impl Table {
    fn forget_old(&mut self, now: Instant) {
        while let Some(&(at, hash, holder)) = self.made.front()
            && at + TICKET_LIFE <= now
        {
            self.made.pop_front();
            self.kept.remove(&hash);
            if let Some(holder) = holder
                && let Some(count) = self.made_of.get_mut(&holder)
            {
                *count -= 1;
                if *count == 0 {
                    self.made_of.remove(&holder);
                }
            }
        }
    }
}

/// The tickets of a process.
#[derive(Debug)]
pub(super) struct Tickets {
    /// Tells this process's tickets from others'.
    pub(super) maker: u64,
    table: Mutex<Table>,
}

impl Default for Tickets {
    fn default() -> Tickets {
        Tickets::of(RandomState::new().hash_one("tickets"))
    }
}

impl Tickets {
    /// None so far, made by that process.
    pub(super) fn of(maker: u64) -> Tickets {
        Tickets { maker, table: Mutex::default() }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic while the lock was held leaves a table that is still good to go on with.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a ticket of `holder`'s.
    ///
    /// # Errors
    /// The bound that it would pass.
    pub(super) fn keep(
        &self,
        hash: TicketHash,
        record: TicketRecord,
        holder: Option<Holder>,
        now: Instant,
    ) -> Result<(), Over> {
        let mut table = self.table();
        table.forget_old(now);
        if table.made.len() >= TICKETS_MAX {
            return Err(Over::Process);
        }
        if let Some(holder) = holder {
            let count = table.made_of.entry(holder).or_default();
            if *count >= TICKETS_PER_SUBJECT_MAX {
                return Err(Over::Subject);
            }
            *count += 1;
        }
        table.made.push_back((now, hash, holder));
        table.kept.insert(hash, Entry { record, elsewhere: Elsewhere::No });
        Ok(())
    }

    /// How many tickets were made within a ticket's life, used ones included.
    pub(super) fn made(&self, now: Instant) -> usize {
        let mut table = self.table();
        table.forget_old(now);
        table.made.len()
    }

    /// Where besides here a ticket is from now on.
    pub(super) fn set_elsewhere(&self, hash: TicketHash, elsewhere: Elsewhere) {
        if let Some(entry) = self.table().kept.get_mut(&hash) {
            entry.elsewhere = elsewhere;
        }
    }

    /// Where besides here a ticket is; `None`: it is not here.
    pub(super) fn elsewhere(&self, hash: TicketHash, now: Instant) -> Option<Elsewhere> {
        let mut table = self.table();
        table.forget_old(now);
        table.kept.get(&hash).map(|entry| entry.elsewhere)
    }

    /// Uses up a ticket: whoever is second finds none.
    pub(super) fn take(&self, hash: TicketHash, now: Instant) -> Option<TicketRecord> {
        let mut table = self.table();
        table.forget_old(now);
        table.kept.remove(&hash).map(|entry| entry.record)
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
        TicketRecord { maker: 1, ends: WallTime::from_secs(1), grant }
    }

    fn holder(no: u64) -> Option<Holder> {
        Some(Holder::from_hash(no))
    }

    #[test]
    fn a_ticket_is_taken_once_and_within_its_life() {
        let tickets = Tickets::default();
        for no in 0..2 {
            assert_eq!(tickets.keep(hash(no), record(), holder(1), NOW), Ok(()));
        }
        assert_eq!(tickets.elsewhere(hash(0), NOW), Some(Elsewhere::No));
        tickets.set_elsewhere(hash(0), Elsewhere::Kept);
        assert_eq!(tickets.elsewhere(hash(0), NOW), Some(Elsewhere::Kept));
        assert_eq!(tickets.take(hash(0), NOW + (TICKET_LIFE - Duration::from_micros(1))), Some(record()));
        assert_eq!(tickets.take(hash(0), NOW), None);
        assert_eq!(tickets.take(hash(1), NOW + TICKET_LIFE), None);
        assert_eq!(tickets.elsewhere(hash(2), NOW), None);
    }

    #[test]
    fn tickets_are_bounded_for_a_subject_and_for_the_process_by_when_they_were_made() {
        let tickets = Tickets::default();
        for no in 0..TICKETS_PER_SUBJECT_MAX {
            assert_eq!(tickets.keep(hash(no), record(), holder(1), NOW), Ok(()));
            assert!(tickets.take(hash(no), NOW).is_some());
        }
        assert_eq!(tickets.keep(hash(0), record(), holder(1), NOW), Err(Over::Subject), "used ones count as well");
        let rest = u32::try_from(TICKETS_MAX).expect("few") - TICKETS_PER_SUBJECT_MAX;
        for no in 0..rest {
            assert_eq!(tickets.keep(hash(no), record(), None, NOW), Ok(()));
        }
        assert_eq!(tickets.keep(hash(rest), record(), holder(2), NOW), Err(Over::Process));
        assert_eq!(tickets.keep(hash(0), record(), holder(1), NOW + TICKET_LIFE), Ok(()));
        let table = tickets.table();
        assert_eq!((table.made.len(), table.kept.len(), table.made_of.len()), (1, 1, 1), "the old ones are gone");
    }
}
