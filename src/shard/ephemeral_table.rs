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
    /// Whether a timer is set that looks for that: however often they come and go, there is one.
    timed: bool,
}

impl Entry {
    fn due(&self, now: Now, linger: Duration) -> Due {
        if self.session.ends <= now.at || self.session.ends_at <= now.wall {
            return Due::Over;
        }
        match self.left.filter(|_| self.watchers == 0).map(|left| left + linger) {
            Some(at) if at <= now.at => Due::Over,
            Some(at) => Due::At(at),
            None => Due::Watched,
        }
    }
}

/// Whether a session has outlived its time, or its watchers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Due {
    /// It has, and is gone.
    Over,
    /// It will then, unless somebody watches again.
    At(Instant),
    /// Somebody watches, or nobody has yet.
    Watched,
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
        table.sessions.insert(new.id, Entry { session: new.clone(), token, watchers: 0, left: None, timed: false });
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

    /// One fewer; whether a timer is to be set that looks, in a while, whether that was the last.
    pub(super) fn leave(&self, id: EphemeralId, now: Instant) -> bool {
        let mut table = self.table();
        let Some(entry) = table.sessions.get_mut(&id) else { return false };
        entry.watchers = entry.watchers.saturating_sub(1);
        entry.left = Some(now);
        entry.watchers == 0 && !std::mem::replace(&mut entry.timed, true)
    }

    /// A timer has come: takes a session away that has outlived its time, or its last watcher by `linger`.
    pub(super) fn timed(&self, id: EphemeralId, now: Now, linger: Duration) -> Due {
        let mut table = self.table();
        let Some(entry) = table.sessions.get_mut(&id) else { return Due::Watched };
        let due = entry.due(now, linger);
        entry.timed = matches!(due, Due::At(_));
        if due == Due::Over {
            table.remove(id);
        }
        due
    }

    /// Whether a session has outlived its time or its watchers, and only its timer is still to come.
    pub(super) fn is_over(&self, id: EphemeralId, now: Now, linger: Duration) -> bool {
        self.table().sessions.get(&id).is_none_or(|entry| entry.due(now, linger) == Due::Over)
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

#[cfg(test)]
mod tests {
    use url::Url;

    use super::*;
    use crate::auth::ephemeral::DirectKey;
    use crate::auth::grant::Rights;
    use crate::guard::{DirectOptions, Policy};
    use crate::ids::StreamId;
    use crate::shard::Catalog;
    use crate::stream;
    use crate::stream::template::UrlTemplate;

    const LINGER: Duration = Duration::from_secs(5);

    fn at(ms: u64) -> Now {
        Now { at: Instant::from_micros(1_000_000 + ms * 1_000), wall: WallTime::from_micros(9_000_000 + ms * 1_000) }
    }

    fn session(no: u128, dedupe_key: Option<&str>) -> (Ephemeral, TokenHash) {
        let direct = DirectOptions {
            policy: Arc::new(Policy::public()),
            roles: Vec::new(),
            interval_min: Duration::ZERO,
            sessions_per_subject: 0,
            session_ttl_max: Duration::ZERO,
            linger: LINGER,
        };
        let catalog = Catalog::new(&[], None, 7).with_direct(Some(&direct), None);
        let template = UrlTemplate::parse::<&str>("http://a.test/", &[]).expect("a URL");
        let options = stream::Options::new(StreamId::new("direct:a").expect("an id"), template);
        let url = Url::parse("http://a.test/").expect("a URL");
        let key = catalog.direct_key("direct:a".into(), options, url, None).expect("it is on");
        let maker = GrantRecord {
            sub: Some("u1".into()),
            expires: None,
            issued_at: None,
            key: None,
            token: None,
            rights: Rights::default(),
            session: None,
            api_key: None,
        };
        let id = EphemeralId(no);
        let new = Ephemeral {
            id,
            key: Arc::new(key),
            maker,
            holder: Holder::from_hash(1),
            dedupe_key: dedupe_key.map(Box::from),
            made: at(0).wall,
            ends: at(100_000).at,
            ends_at: at(100_000).wall,
        };
        let token = DirectKey::of_random([7; 32]).token(id);
        (new, TokenHash::of(token.expose_secret()).expect("a token"))
    }

    #[test]
    fn watchers_that_come_and_go_do_not_pile_up_timers() {
        let table = Ephemerals::default();
        let (new, token) = session(1, None);
        assert!(matches!(table.make(&new, token, 0, 0), Ok(Made::New)));
        let mut timers = 0;
        for ms in 0..1_000 {
            assert!(table.join(new.id));
            timers += u32::from(table.leave(new.id, at(ms).at));
        }
        assert_eq!(timers, 1);
        let last = at(999).at + LINGER;
        assert_eq!(table.timed(new.id, at(5_000), LINGER), Due::At(last), "it is set anew, for the last who left");
        assert!(table.join(new.id) && !table.leave(new.id, at(5_500).at));
        assert!(table.join(new.id));
        assert_eq!(table.timed(new.id, at(10_600), LINGER), Due::Watched);
        assert!(table.leave(new.id, at(10_700).at), "and once more after that");
        assert!(table.is_over(new.id, at(15_700), LINGER) && !table.is_over(new.id, at(15_699), LINGER));
        assert_eq!(table.timed(new.id, at(15_700), LINGER), Due::Over);
        assert!(table.by_token(token).is_none() && table.len() == 0 && table.of(new.holder).is_empty());
    }

    #[test]
    fn bounds_hold_at_their_value() {
        let table = Ephemerals::default();
        let make = |no, dedupe, in_all, each| {
            let (new, token) = session(no, dedupe);
            table.make(&new, token, in_all, each).map(|made| matches!(made, Made::New))
        };
        assert_eq!([make(1, Some("a"), 3, 2), make(2, None, 3, 2)], [Ok(true), Ok(true)]);
        assert_eq!(make(3, None, 3, 2), Err(Over::Subject));
        assert_eq!(make(4, Some("a"), 3, 2), Ok(false), "the same is there already");
        assert_eq!([make(5, None, 3, 0), make(6, None, 3, 0)], [Ok(true), Err(Over::Process)]);
        assert_eq!(make(7, None, 0, 0), Ok(true), "0 is unlimited, but for what a process may have");
        assert!(table.remove(EphemeralId(1)) && !table.remove(EphemeralId(1)));
        assert_eq!(make(8, Some("a"), 0, 0), Ok(true), "what has ended is no duplicate");
    }

    #[test]
    fn nobody_in_particular_has_made_nothing() {
        let (one, _) = session(1, None);
        assert!(one.is_of(&one.maker));
        let other =
            GrantRecord { rights: Rights { issuer: Some("b".into()), ..Rights::default() }, ..one.maker.clone() };
        assert!(!one.is_of(&other));
        let nobody = GrantRecord { sub: None, ..one.maker.clone() };
        let of_nobody = Ephemeral { maker: nobody.clone(), ..one };
        assert!(!of_nobody.is_of(&nobody));
    }
}
