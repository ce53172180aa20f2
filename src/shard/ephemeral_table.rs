//! The ephemeral sessions of a process, from when they are made until they end. Shared by its cores.
//!
//! Source: protocol version 1, sections 1 and 6. Memory: an entry for each session, at most `limits.streams` of them and
//! [`EPHEMERALS_MAX`]; the request that it describes is in its key. The lock is held for a look-up. Errors: [`Over`].
//! Not here: what is answered then, and when a session ends (`ephemeral`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::auth::ephemeral::TokenHash;
use crate::auth::grant::GrantRecord;
use crate::ids::{EphemeralId, Holder};
use crate::limits::EPHEMERALS_MAX;
use crate::time::{Instant, Now, WallTime};

use super::StreamKey;

/// A bound that one session more would pass.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Over {
    /// That of the process.
    Process,
    /// That of the subject.
    Subject,
}

/// A session, as it was made.
#[derive(Clone, Debug)]
pub(super) struct Ephemeral {
    pub(super) id: EphemeralId,
    /// Its stream.
    pub(super) key: Arc<StreamKey>,
    /// What whoever made it had.
    pub(super) maker: GrantRecord,
    /// Whom it counts for.
    pub(super) holder: Holder,
    /// What its maker calls it.
    pub(super) dedupe_key: Option<Box<str>>,
    pub(super) made: WallTime,
    pub(super) ends: Instant,
    pub(super) ends_at: WallTime,
}

impl Ephemeral {
    /// Whether it is the same user's as `other`.
    fn is_of_same_user(&self, other: &Ephemeral) -> bool {
        self.is_of(&other.maker)
    }

    /// Whether whoever has `record` has made it: somebody, not nobody in particular.
    pub(super) fn is_of(&self, record: &GrantRecord) -> bool {
        let key = |record: &GrantRecord| record.api_key.as_ref().map(|mark| mark.id.clone());
        self.maker.sub.is_some()
            && self.maker.sub == record.sub
            && self.maker.rights.issuer == record.rights.issuer
            && key(&self.maker) == key(record)
    }
}

#[derive(Debug)]
struct Entry {
    session: Ephemeral,
    token: TokenHash,
    watchers: u32,
    /// When the last of them left.
    left: Option<Instant>,
}

#[derive(Debug, Default)]
struct Table {
    sessions: HashMap<EphemeralId, Entry>,
    by_token: HashMap<TokenHash, EphemeralId>,
    of: HashMap<Holder, Vec<EphemeralId>>,
}

impl Table {
    fn of(&self, holder: Holder) -> impl Iterator<Item = &Ephemeral> {
        let ids = self.of.get(&holder).into_iter().flatten();
        ids.filter_map(|id| self.sessions.get(id)).map(|entry| &entry.session)
    }

    fn remove(&mut self, id: EphemeralId) -> bool {
        let Some(entry) = self.sessions.remove(&id) else { return false };
        self.by_token.remove(&entry.token);
        let holder = entry.session.holder;
        if let Some(ids) = self.of.get_mut(&holder) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.of.remove(&holder);
            }
        }
        true
    }
}

/// The sessions of a process.
#[derive(Debug, Default)]
pub(super) struct Ephemerals {
    table: Mutex<Table>,
}

/// What became of making a session.
#[derive(Debug)]
pub(super) enum Made {
    /// There is one more.
    New,
    /// Its maker has that one already, by the same name.
    Same(Box<Ephemeral>),
}

impl Ephemerals {
    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic while the lock was held leaves a table that is still good to go on with.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a session there, unless its maker has one of that name. `in_all`, `per_subject`: how many there may be; 0 is
    /// unlimited.
    ///
    /// # Errors
    /// The bound that it would pass.
    pub(super) fn make(&self, new: &Ephemeral, token: TokenHash, in_all: u32, per_subject: u32) -> Result<Made, Over> {
        let mut table = self.table();
        if new.dedupe_key.is_some()
            && let Some(same) =
                table.of(new.holder).find(|old| old.dedupe_key == new.dedupe_key && old.is_of_same_user(new))
        {
            return Ok(Made::Same(Box::new(same.clone())));
        }
        let in_all = if in_all == 0 { EPHEMERALS_MAX } else { EPHEMERALS_MAX.min(in_all as usize) };
        if table.sessions.len() >= in_all {
            return Err(Over::Process);
        }
        if per_subject != 0 && table.of.get(&new.holder).map_or(0, Vec::len) >= per_subject as usize {
            return Err(Over::Subject);
        }
        table.by_token.insert(token, new.id);
        table.of.entry(new.holder).or_default().push(new.id);
        table.sessions.insert(new.id, Entry { session: new.clone(), token, watchers: 0, left: None });
        Ok(Made::New)
    }

    /// The sessions that count for a holder.
    pub(super) fn of(&self, holder: Holder) -> Vec<Ephemeral> {
        self.table().of(holder).cloned().collect()
    }

    /// The session of that token.
    pub(super) fn by_token(&self, token: TokenHash) -> Option<Ephemeral> {
        let table = self.table();
        table.by_token.get(&token).and_then(|id| table.sessions.get(id)).map(|entry| entry.session.clone())
    }

    /// The session of that id.
    pub(super) fn find(&self, id: EphemeralId) -> Option<Ephemeral> {
        self.table().sessions.get(&id).map(|entry| entry.session.clone())
    }

    /// The stream of a session.
    pub(super) fn key(&self, id: EphemeralId) -> Option<Arc<StreamKey>> {
        self.table().sessions.get(&id).map(|entry| Arc::clone(&entry.session.key))
    }

    /// One watcher more; whether there is such a session.
    pub(super) fn join(&self, id: EphemeralId) -> bool {
        self.table().sessions.get_mut(&id).map(|entry| entry.watchers += 1).is_some()
    }

    /// One fewer; whether that was the last of a session that goes on.
    pub(super) fn leave(&self, id: EphemeralId, now: Instant) -> bool {
        let mut table = self.table();
        let Some(entry) = table.sessions.get_mut(&id) else { return false };
        entry.watchers = entry.watchers.saturating_sub(1);
        entry.left = Some(now);
        entry.watchers == 0
    }

    /// Takes a session away that has outlived its time, or its last watcher by `linger`; whether it did.
    pub(super) fn take_over(&self, id: EphemeralId, now: Now, linger: Duration) -> bool {
        let mut table = self.table();
        let Some(entry) = table.sessions.get(&id) else { return false };
        let left_alone = entry.watchers == 0 && entry.left.is_some_and(|left| left + linger <= now.at);
        let over = entry.session.ends <= now.at || entry.session.ends_at <= now.wall || left_alone;
        over && table.remove(id)
    }

    /// Takes a session away; whether it was there.
    pub(super) fn remove(&self, id: EphemeralId) -> bool {
        self.table().remove(id)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.table().sessions.len()
    }
}
