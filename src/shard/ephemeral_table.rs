//! The ephemeral sessions of a process, from when they are made until they end. Shared by its cores. Of those that processes
//! share it has the ones that connections here live by, or did a moment ago.
//!
//! Source: protocol version 1, sections 1 and 6. Memory: an entry for each session, at most `limits.streams` of them and
//! [`EPHEMERALS_MAX`]; the request that it describes is in its key. The lock is held for a look-up. Errors: [`Over`].
//! Not here: what is answered then, and when a session ends (`ephemeral`); what other processes know (`ephemeral_shared`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::auth::ephemeral::Place;
use crate::auth::grant::GrantRecord;
use crate::ids::{EphemeralId, Holder};
use crate::limits::{EPHEMERALS_MAX, LOOKUP_TIMEOUT};
use crate::secret::Secret;
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
    /// What it is opened by.
    pub(super) token: Secret,
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
    /// Where it is counted among its maker's, where processes share it.
    pub(super) counted: Option<Box<str>>,
}

impl Ephemeral {
    /// Whether it stands where processes share it: there its maker, its end and its watchers are known, not here.
    pub(super) fn is_shared(&self) -> bool {
        self.counted.is_some()
    }

    /// Whether it is the same caller's as `other`.
    fn is_of_same_caller(&self, other: &Ephemeral) -> bool {
        self.is_of(&other.maker)
    }

    /// Whether whoever has `record` has made it.
    pub(super) fn is_of(&self, record: &GrantRecord) -> bool {
        self.maker.is_same_caller(record)
    }
}

#[derive(Debug)]
struct Entry {
    session: Ephemeral,
    /// The connections that live by it,
    living: u32,
    /// and those of them that have their stream: they watch.
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
        // What processes share goes on for as long as it is watched elsewhere: where connections live by it here, it is known.
        let known = self.watchers > 0 || self.living > 0 && self.session.is_shared();
        match self.left.filter(|_| !known).map(|left| left + linger) {
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

/// What a watcher has come to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Joined {
    /// There is no such session.
    Gone,
    /// It is the only one here.
    First,
    /// There are others.
    Another,
}

/// What a watcher leaves behind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Left {
    /// Nobody watches here any more.
    pub(super) last: bool,
    /// A timer is to be set that looks, in a while, whether that is so still.
    pub(super) set_timer: bool,
}

#[derive(Debug, Default)]
struct Table {
    sessions: HashMap<EphemeralId, Entry>,
    /// Those that processes share, by their places.
    by_place: HashMap<Place, EphemeralId>,
    of: HashMap<Holder, Vec<EphemeralId>>,
}

impl Table {
    fn of(&self, holder: Holder) -> impl Iterator<Item = &Ephemeral> {
        let ids = self.of.get(&holder).into_iter().flatten();
        ids.filter_map(|id| self.sessions.get(id)).map(|entry| &entry.session)
    }

    fn remove(&mut self, id: EphemeralId) -> bool {
        let Some(entry) = self.sessions.remove(&id) else { return false };
        self.by_place.remove(&Place::of(id));
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
    pub(super) fn make(&self, new: &Ephemeral, in_all: u32, per_subject: u32) -> Result<Made, Over> {
        let mut table = self.table();
        if new.dedupe_key.is_some()
            && let Some(same) =
                table.of(new.holder).find(|old| old.dedupe_key == new.dedupe_key && old.is_of_same_caller(new))
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
        table.of.entry(new.holder).or_default().push(new.id);
        table.sessions.insert(new.id, Entry { session: new.clone(), living: 0, watchers: 0, left: None, timed: false });
        Ok(Made::New)
    }

    /// Puts a session there that stands where processes share it, for whoever is about to open it; what there is of it
    /// already, and whether that is new: then a timer is to be set, for its end and for when `linger` has passed.
    ///
    /// # Errors
    /// The bound that it would pass.
    pub(super) fn take_up(&self, session: Ephemeral, now: Instant) -> Result<(Ephemeral, bool), Over> {
        let mut table = self.table();
        if let Some(entry) = table.sessions.get_mut(&session.id) {
            if entry.watchers == 0 {
                entry.left = Some(now + LOOKUP_TIMEOUT);
            }
            return Ok((entry.session.clone(), false));
        }
        if table.sessions.len() >= EPHEMERALS_MAX {
            return Err(Over::Process);
        }
        table.by_place.insert(Place::of(session.id), session.id);
        // Whoever opens it may have to be looked at by others first.
        let left = Some(now + LOOKUP_TIMEOUT);
        let entry = Entry { session: session.clone(), living: 0, watchers: 0, left, timed: true };
        table.sessions.insert(session.id, entry);
        Ok((session, true))
    }

    /// The sessions that count for a holder.
    pub(super) fn of(&self, holder: Holder) -> Vec<Ephemeral> {
        self.table().of(holder).cloned().collect()
    }

    /// The session whose record stands there.
    pub(super) fn by_place(&self, place: Place) -> Option<EphemeralId> {
        self.table().by_place.get(&place).copied()
    }

    /// Whether connections of this process watch it.
    pub(super) fn is_watched(&self, id: EphemeralId) -> bool {
        self.table().sessions.get(&id).is_some_and(|entry| entry.watchers > 0)
    }

    /// The session of that id.
    pub(super) fn find(&self, id: EphemeralId) -> Option<Ephemeral> {
        self.table().sessions.get(&id).map(|entry| entry.session.clone())
    }

    /// The stream of a session.
    pub(super) fn key(&self, id: EphemeralId) -> Option<Arc<StreamKey>> {
        self.table().sessions.get(&id).map(|entry| Arc::clone(&entry.session.key))
    }

    /// One connection more that lives by it; whether it is there.
    pub(super) fn enter(&self, id: EphemeralId) -> bool {
        self.table().sessions.get_mut(&id).map(|entry| entry.living += 1).is_some()
    }

    /// One fewer; whether a timer is to be set that looks, in a while, whether anything here needs it still.
    pub(super) fn exit(&self, id: EphemeralId, now: Instant) -> bool {
        let mut table = self.table();
        let Some(entry) = table.sessions.get_mut(&id) else { return false };
        entry.living = entry.living.saturating_sub(1);
        let last = entry.living == 0 && entry.watchers == 0 && entry.session.is_shared();
        if last && entry.left.is_none() {
            entry.left = Some(now);
        }
        last && !std::mem::replace(&mut entry.timed, true)
    }

    /// One watcher more.
    pub(super) fn join(&self, id: EphemeralId) -> Joined {
        match self.table().sessions.get_mut(&id) {
            None => Joined::Gone,
            Some(entry) => {
                entry.watchers += 1;
                if entry.watchers == 1 { Joined::First } else { Joined::Another }
            }
        }
    }

    /// One fewer.
    pub(super) fn leave(&self, id: EphemeralId, now: Instant) -> Left {
        let mut table = self.table();
        let Some(entry) = table.sessions.get_mut(&id) else { return Left { last: false, set_timer: false } };
        entry.watchers = entry.watchers.saturating_sub(1);
        entry.left = Some(now);
        let last = entry.watchers == 0;
        Left { last, set_timer: last && !std::mem::replace(&mut entry.timed, true) }
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
    use crate::auth::ephemeral::{id_of, token_of_random};
    use crate::auth::grant::{Rights, TokenMark};
    use crate::guard::{DirectOptions, Policy};
    use crate::ids::StreamId;
    use crate::shard::Catalog;
    use crate::stream;
    use crate::stream::template::UrlTemplate;

    const LINGER: Duration = Duration::from_secs(5);

    fn at(ms: u64) -> Now {
        Now { at: Instant::from_micros(1_000_000 + ms * 1_000), wall: WallTime::from_micros(9_000_000 + ms * 1_000) }
    }

    fn session(no: u8, dedupe_key: Option<&str>) -> Ephemeral {
        let direct = DirectOptions {
            policy: Arc::new(Policy::public()),
            roles: Vec::new(),
            interval_min: Duration::ZERO,
            sessions_per_subject: 0,
            session_ttl_max: Duration::ZERO,
            linger: LINGER,
            response_bytes_max: 1 << 20,
            timeout: Duration::from_secs(15),
            secret: None,
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
        let token = token_of_random([no; 32]);
        Ephemeral {
            id: id_of(token.expose_secret()).expect("a token"),
            token,
            key: Arc::new(key),
            maker,
            holder: Holder::from_hash(1),
            dedupe_key: dedupe_key.map(Box::from),
            made: at(0).wall,
            ends: at(100_000).at,
            ends_at: at(100_000).wall,
            counted: None,
        }
    }

    #[test]
    fn watchers_that_come_and_go_do_not_pile_up_timers() {
        let table = Ephemerals::default();
        let new = session(1, None);
        assert!(matches!(table.make(&new, 0, 0), Ok(Made::New)));
        let mut timers = 0;
        for ms in 0..1_000 {
            assert_eq!(table.join(new.id), Joined::First);
            timers += u32::from(table.leave(new.id, at(ms).at).set_timer);
        }
        assert_eq!(timers, 1);
        let last = at(999).at + LINGER;
        assert_eq!(table.timed(new.id, at(5_000), LINGER), Due::At(last), "it is set anew, for the last who left");
        assert_eq!(table.join(new.id), Joined::First);
        assert_eq!(table.join(new.id), Joined::Another);
        assert_eq!(table.leave(new.id, at(5_400).at), Left { last: false, set_timer: false });
        assert_eq!(table.leave(new.id, at(5_500).at), Left { last: true, set_timer: false });
        assert_eq!(table.join(new.id), Joined::First);
        assert_eq!(table.timed(new.id, at(10_600), LINGER), Due::Watched);
        assert!(table.leave(new.id, at(10_700).at).set_timer, "and once more after that");
        assert!(table.is_over(new.id, at(15_700), LINGER) && !table.is_over(new.id, at(15_699), LINGER));
        assert_eq!(table.timed(new.id, at(15_700), LINGER), Due::Over);
        assert!(table.find(new.id).is_none() && table.len() == 0 && table.of(new.holder).is_empty());
        assert_eq!(table.join(new.id), Joined::Gone);
    }

    #[test]
    fn a_session_that_was_taken_up_waits_for_whoever_opens_it_and_is_there_once() {
        let table = Ephemerals::default();
        let new = Ephemeral { counted: Some("of".into()), ..session(1, None) };
        let place = Place::of(new.id);
        assert!(matches!(table.take_up(new.clone(), at(0).at), Ok((_, true))));
        assert!(matches!(table.take_up(new.clone(), at(7).at), Ok((_, false))));
        assert_eq!((table.by_place(place), table.len(), table.of(new.holder).len()), (Some(new.id), 1, 0));
        assert!(!table.is_watched(new.id) && table.join(new.id) == Joined::First && table.is_watched(new.id));
        let wait = u64::try_from((LOOKUP_TIMEOUT + LINGER).as_millis()).expect("it is short");
        assert_eq!(table.timed(new.id, at(wait), LINGER), Due::Watched);
        assert!(table.leave(new.id, at(wait).at).set_timer && table.remove(new.id));
        assert_eq!(table.by_place(place), None);
        assert!(matches!(table.take_up(new.clone(), at(0).at), Ok((_, true))));
        assert_eq!(table.timed(new.id, at(wait), LINGER), Due::Over, "nobody has come");
    }

    #[test]
    fn a_session_that_processes_share_is_known_while_a_connection_lives_by_it() {
        let table = Ephemerals::default();
        let new = Ephemeral { counted: Some("of".into()), ..session(1, None) };
        assert!(table.take_up(new.clone(), at(0).at).is_ok_and(|(_, new)| new));
        assert!(table.enter(new.id));
        let over = at(0).at + LOOKUP_TIMEOUT + LINGER;
        let over = u64::try_from(over.since(at(0).at).as_millis()).expect("it is short");
        assert_eq!(table.timed(new.id, at(over), LINGER), Due::Watched, "others may watch it elsewhere");
        assert!(table.exit(new.id, at(over + 1).at), "then nobody here needs it");
        assert_eq!(table.timed(new.id, at(over + 2), LINGER), Due::Over);
        assert_eq!(table.len(), 0);
        // One that is this process's own ends by its watchers alone, or by its time.
        let own = session(2, None);
        assert!(table.make(&own, 0, 0).is_ok() && table.enter(own.id));
        assert!(!table.exit(own.id, at(1).at));
        assert!(!table.is_over(own.id, at(99_999), LINGER));
        assert!(table.enter(own.id) && table.join(own.id) == Joined::First && table.leave(own.id, at(2).at).set_timer);
        assert_eq!(table.timed(own.id, at(5_002), LINGER), Due::Over, "also where one lives by it that does not watch");
        assert!(!table.enter(own.id));
    }

    #[test]
    fn bounds_hold_at_their_value() {
        let table = Ephemerals::default();
        let make = |no, dedupe, in_all, each| {
            table.make(&session(no, dedupe), in_all, each).map(|made| matches!(made, Made::New))
        };
        assert_eq!([make(1, Some("a"), 3, 2), make(2, None, 3, 2)], [Ok(true), Ok(true)]);
        assert_eq!(make(3, None, 3, 2), Err(Over::Subject));
        assert_eq!(make(4, Some("a"), 3, 2), Ok(false), "the same is there already");
        assert_eq!([make(5, None, 3, 0), make(6, None, 3, 0)], [Ok(true), Err(Over::Process)]);
        assert_eq!(make(7, None, 0, 0), Ok(true), "0 is unlimited, but for what a process may have");
        let first = session(1, None).id;
        assert!(table.remove(first) && !table.remove(first));
        assert_eq!(make(8, Some("a"), 0, 0), Ok(true), "what has ended is no duplicate");
    }

    #[test]
    fn a_session_is_its_makers_by_subject_or_else_by_token() {
        let one = session(1, None);
        assert!(one.is_of(&one.maker));
        let other =
            GrantRecord { rights: Rights { issuer: Some("b".into()), ..Rights::default() }, ..one.maker.clone() };
        assert!(!one.is_of(&other));
        let by = |token: &str| GrantRecord { sub: None, token: Some(TokenMark::of(token)), ..one.maker.clone() };
        let of_token = Ephemeral { maker: by("a"), ..one.clone() };
        assert!(of_token.is_of(&by("a")) && !of_token.is_of(&by("b")) && !of_token.is_of(&one.maker));
        assert!(!of_token.is_of(&GrantRecord { sub: Some("u1".into()), ..by("a") }));
        // Nobody in particular has made nothing.
        let nobody = GrantRecord { sub: None, ..one.maker.clone() };
        let of_nobody = Ephemeral { maker: nobody.clone(), ..one };
        assert!(!of_nobody.is_of(&nobody));
    }
}
