//! What control events leave behind: who has logged out since when, which tokens are revoked, whose rights are other than
//! their tokens say. One table for the process, asked at each verification and never waited for.
//!
//! Source: protocol version 1, section 6 («Control»). Memory: at most [`limits::MARKS_MAX`] marks, each some 110 bytes and,
//! of changed rights, its lists, at most [`limits::MARKS_LIST_BYTES_MAX`] of them; users, tokens and sessions are kept as
//! hashes. A mark goes when it can no longer matter: after `auth.revocation_keep`, or at the token's end. Where there is no
//! room, the one that ends soonest goes, and is counted. Errors: none.
//! Not here: what an event says (`control`), live connections (`shard`).

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use ring::digest;

use super::control::{Event, User};
use super::grant::{Grant, TokenMark};
use super::session::SessionMark;
use crate::limits;
use crate::time::WallTime;

/// Marks that are let go of at once when their time is over: what is left goes with the next ones.
const ENDED_PER_TURN: usize = 1024;
/// Time between two warnings of tokens that outlive marks.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Why a credential that is good in itself is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Revoked {
    /// Its user, or its session, has logged out.
    LoggedOut,
    /// It was revoked.
    Token,
}

/// Permissions and roles in the place of a token's; those that are `None` stay.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NewRights {
    /// The permissions.
    pub permissions: Option<Arc<[Box<str>]>>,
    /// The roles.
    pub roles: Option<Arc<[Box<str>]>>,
}

impl NewRights {
    /// Whether both stay.
    pub fn is_none(&self) -> bool {
        self.permissions.is_none() && self.roles.is_none()
    }
}

/// Whose live connections are to be looked at, because a mark of theirs was set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Concerned {
    /// A user's.
    User {
        /// The user id.
        sub: Box<str>,
        /// Who issued their credentials; `None`: whoever did.
        issuer: Option<Box<str>>,
        /// Whether they are to be told of their rights even where those stay the same: the event was not heard before.
        news: bool,
    },
    /// A session's.
    Session(SessionMark),
    /// Those under one token.
    Token(TokenMark),
    /// All: more was said than is kept apart.
    Everyone,
}

/// What became of an event.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Taken {
    /// Who is concerned; `None`: the event is so old that it no longer matters.
    pub concerned: Option<Concerned>,
    /// How many marks had to go before their time.
    pub dropped: usize,
}

/// What a mark is about. What it is about is told apart by the hash as well, the kind saves a byte of text in it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
enum Kind {
    Logout,
    Session,
    Token,
    Before,
    Rights,
}

#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct Key {
    kind: Kind,
    hash: [u8; 16],
}

impl Key {
    fn of_user(kind: Kind, issuer: Option<&str>, sub: &str) -> Key {
        Key::of(kind, issuer, sub.as_bytes())
    }

    fn of_token(issuer: Option<&str>, token: TokenMark) -> Key {
        Key::of(Kind::Token, issuer, &token.bits().to_be_bytes())
    }

    fn of_session(session: SessionMark) -> Key {
        Key::of(Kind::Session, None, session.bytes())
    }

    fn of(kind: Kind, issuer: Option<&str>, name: &[u8]) -> Key {
        let mut context = digest::Context::new(&digest::SHA256);
        // None is told from the empty issuer, and where the one ends from where the other begins.
        let length = issuer.map_or(u64::MAX, |issuer| issuer.len() as u64);
        context.update(&length.to_be_bytes());
        context.update(issuer.unwrap_or_default().as_bytes());
        context.update(name);
        Key { kind, hash: context.finish().as_ref().first_chunk().copied().unwrap_or_default() }
    }
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum What {
    /// A logout of then, tokens revoked that are older, a session or token that ended then.
    At(WallTime),
    /// A token that was revoked then, and would have ended by itself when its mark begins to.
    Ending(WallTime),
    /// Rights, boxed: they are few among many.
    Rights(Box<RightsMark>),
}

/// How long marks stand after what they count from. A reload may change it, for those that stand as well: where it is
/// lengthened because of tokens that live longer, what was revoked before is meant too.
#[derive(Clone, Copy, Debug)]
struct Lives {
    /// `auth.revocation_keep`.
    keep: Duration,
    /// `auth.jwt.leeway`: of a token whose end is known.
    leeway: Duration,
}

/// A list, and when it was said.
type Dated = Option<(Arc<[Box<str>]>, WallTime)>;

#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct RightsMark {
    permissions: Dated,
    roles: Dated,
}

impl RightsMark {
    /// Bytes of its lists.
    fn bytes(&self) -> usize {
        let of = |list: &Dated| {
            list.as_ref().map_or(0, |(list, _)| list.iter().map(|text| text.len() + 2 * size_of::<usize>()).sum())
        };
        size_of::<RightsMark>() + of(&self.permissions) + of(&self.roles)
    }
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct Mark {
    /// What its life counts from.
    from: WallTime,
    what: What,
}

impl Mark {
    fn list_bytes(&self) -> usize {
        match &self.what {
            What::At(_) | What::Ending(_) => 0,
            What::Rights(rights) => rights.bytes(),
        }
    }

    /// When it can no longer matter.
    fn until(&self, lives: Lives) -> WallTime {
        self.from + if matches!(self.what, What::Ending(_)) { lives.leeway } else { lives.keep }
    }
}

#[derive(Debug, Default)]
struct Table {
    marks: HashMap<Key, Mark>,
    /// The same, by what their lives count from: of those that live by `keep` those of rights apart, because only they make
    /// room for lists;
    kept: BTreeSet<(WallTime, Key)>,
    rights: BTreeSet<(WallTime, Key)>,
    /// and those that live by `leeway`.
    ending: BTreeSet<(WallTime, Key)>,
    list_bytes: usize,
}

impl Table {
    fn at(&self, key: &Key, now: WallTime, lives: Lives) -> Option<&Mark> {
        self.marks.get(key).filter(|mark| mark.until(lives) > now)
    }

    fn time(&self, key: &Key, now: WallTime, lives: Lives) -> Option<WallTime> {
        match self.at(key, now, lives)?.what {
            What::At(time) | What::Ending(time) => Some(time),
            What::Rights(_) => None,
        }
    }

    fn order_of(&mut self, what: &What) -> &mut BTreeSet<(WallTime, Key)> {
        match what {
            What::At(_) => &mut self.kept,
            What::Ending(_) => &mut self.ending,
            What::Rights(_) => &mut self.rights,
        }
    }

    /// The one that ends soonest, and when.
    fn first(&self, lives: Lives) -> Option<(WallTime, Key)> {
        let kept = [&self.kept, &self.rights].map(|order| order.first().map(|&(from, key)| (from + lives.keep, key)));
        let ending = self.ending.first().map(|&(from, key)| (from + lives.leeway, key));
        kept.into_iter().chain([ending]).flatten().min()
    }

    fn put(&mut self, key: Key, mark: Mark) {
        self.remove(&key);
        self.list_bytes += mark.list_bytes();
        self.order_of(&mark.what).insert((mark.from, key));
        self.marks.insert(key, mark);
    }

    fn remove(&mut self, key: &Key) -> Option<Mark> {
        let mark = self.marks.remove(key)?;
        self.order_of(&mark.what).remove(&(mark.from, *key));
        self.list_bytes -= mark.list_bytes();
        Some(mark)
    }

    /// Marks `key` with the later of `time` and the time it is marked with, for as long as the longer of both marks stands.
    fn put_latest(&mut self, key: Key, time: WallTime, (from, ends): (WallTime, bool), lives: Lives) {
        let mark = |time, from, ends| Mark { from, what: if ends { What::Ending(time) } else { What::At(time) } };
        let mut new = mark(time, from, ends);
        if let Some(old) = self.marks.get(&key)
            && let What::At(before) | What::Ending(before) = old.what
        {
            let longer = if old.until(lives) > new.until(lives) { old } else { &new };
            new = mark(time.max(before), longer.from, matches!(longer.what, What::Ending(_)));
        }
        self.put(key, new);
    }

    /// Marks `key` with rights, each member by the latest event that named it; whether that changed any.
    fn put_rights(&mut self, key: Key, new: &NewRights, at: WallTime) -> bool {
        let (mut rights, mut from) = (RightsMark::default(), at);
        if let Some(old) = self.remove(&key) {
            from = from.max(old.from);
            if let What::Rights(old) = old.what {
                rights = *old;
            }
        }
        let permissions = renew(&mut rights.permissions, new.permissions.as_ref(), at);
        let roles = renew(&mut rights.roles, new.roles.as_ref(), at);
        self.put(key, Mark { from, what: What::Rights(Box::new(rights)) });
        permissions || roles
    }

    /// Lets go of marks whose time is over.
    fn forget_ended(&mut self, now: WallTime, lives: Lives) {
        let mut left = ENDED_PER_TURN;
        while let Some((until, key)) = self.first(lives)
            && until <= now
            && left > 0
        {
            self.remove(&key);
            left -= 1;
        }
    }

    /// Lets go of those that end soonest until the rest has room; how many.
    fn make_room(&mut self, marks_max: usize, list_bytes_max: usize, lives: Lives) -> usize {
        let mut dropped = 0;
        while self.marks.len() > marks_max
            && let Some((_, key)) = self.first(lives)
        {
            self.remove(&key);
            dropped += 1;
        }
        while self.list_bytes > list_bytes_max
            && let Some(&(_, key)) = self.rights.first()
        {
            self.remove(&key);
            dropped += 1;
        }
        dropped
    }
}

/// Puts `new` in the place of an older list; whether it says anything else.
fn renew(old: &mut Dated, new: Option<&Arc<[Box<str>]>>, at: WallTime) -> bool {
    let Some(new) = new else { return false };
    match old {
        Some((_, old_at)) if *old_at > at => false,
        Some((list, old_at)) if list == new => {
            *old_at = at;
            false
        }
        _ => {
            *old = Some((Arc::clone(new), at));
            true
        }
    }
}

/// The marks of a process.
#[derive(Debug)]
pub struct Marks {
    table: RwLock<Table>,
    /// How many there are: where there are none, nobody takes the lock.
    held: AtomicUsize,
    keep_us: AtomicU64,
    leeway_us: AtomicU64,
    /// When tokens that outlive marks were last warned of.
    warned_us: AtomicU64,
    marks_max: usize,
    list_bytes_max: usize,
}

impl Default for Marks {
    fn default() -> Marks {
        Marks::with_bounds(limits::MARKS_MAX, limits::MARKS_LIST_BYTES_MAX)
    }
}

impl Marks {
    fn with_bounds(marks_max: usize, list_bytes_max: usize) -> Marks {
        let marks = Marks {
            table: RwLock::default(),
            held: AtomicUsize::new(0),
            keep_us: AtomicU64::new(0),
            leeway_us: AtomicU64::new(0),
            warned_us: AtomicU64::new(0),
            marks_max,
            list_bytes_max,
        };
        marks.configure(&super::Options::default());
        marks
    }

    /// Goes by `options` from now on, also with the marks that stand.
    pub fn configure(&self, options: &super::Options) {
        let micros = |span: Duration| u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
        self.keep_us.store(micros(options.revocation_keep), Ordering::Relaxed);
        self.leeway_us.store(micros(options.jwt.leeway), Ordering::Relaxed);
    }

    fn lives(&self) -> Lives {
        let span = |us: &AtomicU64| Duration::from_micros(us.load(Ordering::Relaxed));
        Lives { keep: span(&self.keep_us), leeway: span(&self.leeway_us) }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.held.load(Ordering::Acquire)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes in an event at `now`. The same one twice, or one older than another that was taken in, does no harm.
    pub fn take(&self, event: &Event, now: WallTime) -> Taken {
        let lives = self.lives();
        let user_key = |kind, user: &User| Key::of_user(kind, user.issuer.as_deref(), &user.sub);
        // What its mark's life counts from, and whether that is a token's end.
        let (from, ends) = match event {
            Event::TokenRevoked { expires: Some(expires), .. } => (*expires, true),
            // It may be about tokens that are still to be issued.
            Event::IssuedBeforeRevoked { before, at, .. } => (*at.max(before), false),
            Event::UserLoggedOut { at, .. }
            | Event::SessionLoggedOut { at, .. }
            | Event::TokenRevoked { at, .. }
            | Event::PermissionsChanged { at, .. } => (*at, false),
        };
        if from + (if ends { lives.leeway } else { lives.keep }) <= now {
            return Taken { concerned: None, dropped: 0 };
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.forget_ended(now, lives);
        let mut news = false;
        let mut put_latest = |key, time| table.put_latest(key, time, (from, ends), lives);
        match event {
            Event::UserLoggedOut { user, at } => put_latest(user_key(Kind::Logout, user), *at),
            Event::SessionLoggedOut { session, at } => put_latest(Key::of_session(*session), *at),
            Event::TokenRevoked { issuer, token, at, .. } => {
                put_latest(Key::of_token(issuer.as_deref(), *token), *at);
            }
            Event::IssuedBeforeRevoked { user, before, .. } => put_latest(user_key(Kind::Before, user), *before),
            Event::PermissionsChanged { user, permissions, roles, at } => {
                let new = NewRights { permissions: permissions.clone(), roles: roles.clone() };
                news = table.put_rights(user_key(Kind::Rights, user), &new, *at);
            }
        }
        let dropped = table.make_room(self.marks_max, self.list_bytes_max, lives);
        self.held.store(table.marks.len(), Ordering::Release);
        drop(table);
        let concerned = match event {
            Event::UserLoggedOut { user, .. }
            | Event::IssuedBeforeRevoked { user, .. }
            | Event::PermissionsChanged { user, .. } => {
                Concerned::User { sub: user.sub.clone(), issuer: user.issuer.clone(), news }
            }
            Event::SessionLoggedOut { session, .. } => Concerned::Session(*session),
            Event::TokenRevoked { token, .. } => Concerned::Token(*token),
        };
        Taken { concerned: Some(concerned), dropped }
    }

    /// Whether `grant`, where it stands for a token, is still good.
    ///
    /// # Errors
    /// [`Revoked`]: its user has logged out in the second it was issued in or later, or it does not say when that was; it
    /// was revoked by its `jti`, or by having been issued before a certain time.
    pub fn judge(&self, grant: &Grant, now: WallTime) -> Result<(), Revoked> {
        if self.is_empty() || !grant.is_of_token() {
            return Ok(());
        }
        let issuer = grant.issuer();
        let issued = grant.issued_at();
        let lives = self.lives();
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let marked = |key: Key| table.time(&key, now, lives);
        if let Some(sub) = grant.sub() {
            let latest = |kind| {
                let own = issuer.and_then(|_| marked(Key::of_user(kind, issuer, sub)));
                own.max(marked(Key::of_user(kind, None, sub)))
            };
            if let Some(at) = latest(Kind::Logout)
                && issued.is_none_or(|issued| issued.as_secs() <= at.as_secs())
            {
                return Err(Revoked::LoggedOut);
            }
            if let Some(before) = latest(Kind::Before)
                && issued.is_none_or(|issued| issued < before)
            {
                return Err(Revoked::Token);
            }
        }
        if let Some(token) = grant.token() {
            let own = issuer.is_some() && marked(Key::of_token(issuer, token)).is_some();
            if own || marked(Key::of_token(None, token)).is_some() {
                return Err(Revoked::Token);
            }
        }
        Ok(())
    }

    /// Whether a session may go on, or begin, by what was said of itself.
    ///
    /// # Errors
    /// [`Revoked::LoggedOut`].
    pub fn judge_session(&self, session: SessionMark, now: WallTime) -> Result<(), Revoked> {
        if self.is_empty() {
            return Ok(());
        }
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        if table.at(&Key::of_session(session), now, self.lives()).is_some() { Err(Revoked::LoggedOut) } else { Ok(()) }
    }

    /// When the user that a connection belongs to has last logged out; sessions that were opened later are judged by their
    /// record alone.
    pub fn logged_out_at(&self, issuer: Option<&str>, sub: &str, now: WallTime) -> Option<WallTime> {
        if self.is_empty() {
            return None;
        }
        let lives = self.lives();
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let own = issuer.and_then(|_| table.time(&Key::of_user(Kind::Logout, issuer, sub), now, lives));
        own.max(table.time(&Key::of_user(Kind::Logout, None, sub), now, lives))
    }

    /// When it was last said what a user may do, whoever issued their tokens: a session's record that was read before may be
    /// out of date.
    pub fn rights_said_at(&self, sub: &str, now: WallTime) -> Option<WallTime> {
        if self.is_empty() {
            return None;
        }
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        match &table.at(&Key::of_user(Kind::Rights, None, sub), now, self.lives())?.what {
            What::Rights(rights) => [&rights.permissions, &rights.roles].into_iter().flatten().map(|(_, at)| *at).max(),
            What::At(_) | What::Ending(_) => None,
        }
    }

    /// What stands in the place of a token's permissions and roles: of each the latest that was said, where the token was
    /// not issued in a later second.
    pub fn rights_of(&self, grant: &Grant, now: WallTime) -> NewRights {
        let Some(sub) = grant.sub().filter(|_| !self.is_empty() && grant.is_of_token()) else {
            return NewRights::default();
        };
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let lives = self.lives();
        let of = |issuer: Option<&str>| match &table.at(&Key::of_user(Kind::Rights, issuer, sub), now, lives)?.what {
            What::Rights(rights) => Some(&**rights),
            What::At(_) | What::Ending(_) => None,
        };
        let (any, own) = (of(None), grant.issuer().and_then(|issuer| of(Some(issuer))));
        let stands = |at: &WallTime| grant.issued_at().is_none_or(|issued| issued.as_secs() <= at.as_secs());
        let latest = |member: fn(&RightsMark) -> &Dated| {
            let said = [any, own].into_iter().flatten().filter_map(|rights| member(rights).as_ref());
            said.filter(|(_, at)| stands(at)).max_by_key(|(_, at)| *at).map(|(list, _)| Arc::clone(list))
        };
        NewRights { permissions: latest(|rights| &rights.permissions), roles: latest(|rights| &rights.roles) }
    }

    /// Whether it is time to warn of `grant`: its token outlives the marks that could refuse it, and nobody has warned of
    /// one lately.
    pub fn warns_of(&self, grant: &Grant, now: WallTime) -> bool {
        let Some(expires) = grant.expires().filter(|_| grant.is_of_token()) else { return false };
        if expires.since(grant.issued_at().unwrap_or(now)) <= self.lives().keep {
            return false;
        }
        let last = self.warned_us.load(Ordering::Relaxed);
        let due = last == 0 || now.since(WallTime::from_micros(last)) >= WARNING_INTERVAL;
        due && self.warned_us.compare_exchange(last, now.as_micros(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::auth::grant::{Rights, RightsTable, TokenFacts};
    use crate::auth::keys::{Algorithm, KeyConfig, KeySet};
    use crate::secret::Secret;

    const NOW: WallTime = WallTime::from_secs(1_000_000);
    const KEEP: Duration = Duration::from_secs(1_000);

    fn grant(issuer: Option<&str>, sub: Option<&str>, issued_at: Option<WallTime>, jti: Option<&str>) -> Grant {
        let config = KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret: Secret::new([1; 32]) };
        let facts = TokenFacts {
            sub: sub.map(Box::from),
            expires: NOW + KEEP,
            issued_at,
            token: jti.map(TokenMark::of),
            key: KeySet::new(&[config]).unwrap().iter().next().unwrap().id(),
        };
        let rights = Rights { issuer: issuer.map(Box::from), ..Rights::default() };
        Grant::of_token(facts, RightsTable::default().intern(rights))
    }

    fn of_user(sub: &str, issued_s: u64) -> Grant {
        grant(None, Some(sub), Some(WallTime::from_secs(issued_s)), None)
    }

    fn marks() -> Marks {
        let marks = Marks::default();
        let options = crate::auth::Options { revocation_keep: KEEP, ..crate::auth::Options::default() };
        marks.configure(&options);
        marks
    }

    fn user(issuer: Option<&str>, sub: &str) -> User {
        User { issuer: issuer.map(Box::from), sub: sub.into() }
    }

    fn logout(sub: &str, at: WallTime) -> Event {
        Event::UserLoggedOut { user: user(None, sub), at }
    }

    fn list(texts: &[&str]) -> Option<Arc<[Box<str>]>> {
        Some(texts.iter().map(|&text| Box::from(text)).collect())
    }

    fn changed(issuer: Option<&str>, permissions: Option<&[&str]>, roles: Option<&[&str]>, at: WallTime) -> Event {
        let (permissions, roles) = (permissions.and_then(list), roles.and_then(list));
        Event::PermissionsChanged { user: user(issuer, "u1"), permissions, roles, at }
    }

    #[test]
    fn a_logout_refuses_tokens_up_to_its_second() {
        let marks = marks();
        let at = NOW + Duration::from_millis(400);
        assert_eq!(marks.judge(&of_user("u1", 5), NOW), Ok(()));
        let taken = marks.take(&logout("u1", at), NOW);
        assert_eq!(taken.concerned, Some(Concerned::User { sub: "u1".into(), issuer: None, news: false }));
        let later_in_it = grant(None, Some("u1"), Some(NOW + Duration::from_millis(900)), None);
        assert_eq!(marks.judge(&of_user("u1", 999_999), NOW), Err(Revoked::LoggedOut));
        assert_eq!(marks.judge(&later_in_it, NOW), Err(Revoked::LoggedOut), "the second is what counts");
        assert_eq!(marks.judge(&of_user("u1", 1_000_001), NOW), Ok(()), "a later token is a new login");
        assert_eq!(marks.judge(&grant(None, Some("u1"), None, None), NOW), Err(Revoked::LoggedOut), "no iat");
        assert_eq!(marks.judge(&of_user("u2", 5), NOW), Ok(()));
        assert_eq!(marks.judge(&grant(None, None, None, None), NOW), Ok(()), "a token without a user");
        marks.take(&logout("u1", NOW - KEEP / 2), NOW);
        assert_eq!(marks.judge(&of_user("u1", 999_999), NOW), Err(Revoked::LoggedOut), "an older one changes nothing");
        assert_eq!(marks.judge(&of_user("u1", 5), at + KEEP), Ok(()), "after so long nobody is held to it");
        assert_eq!(marks.logged_out_at(Some("any"), "u1", NOW), Some(at));
    }

    #[test]
    fn an_event_that_names_an_issuer_is_about_its_users_alone() {
        let marks = marks();
        marks.take(&Event::UserLoggedOut { user: user(Some("a"), "u1"), at: NOW }, NOW);
        let of = |issuer| grant(issuer, Some("u1"), Some(NOW), None);
        assert_eq!(marks.judge(&of(Some("a")), NOW), Err(Revoked::LoggedOut));
        assert_eq!((marks.judge(&of(Some("b")), NOW), marks.judge(&of(None), NOW)), (Ok(()), Ok(())));
        marks.take(&Event::UserLoggedOut { user: user(None, "u1"), at: NOW }, NOW);
        assert_eq!(marks.judge(&of(Some("b")), NOW), Err(Revoked::LoggedOut));
        // Issuer and user are told apart wherever the one ends.
        marks.take(&Event::UserLoggedOut { user: user(Some("ab"), "c"), at: NOW }, NOW);
        assert_eq!(marks.judge(&grant(Some("a"), Some("bc"), Some(NOW), None), NOW), Ok(()));
    }

    #[test]
    fn a_token_is_revoked_by_its_name_until_it_ends() {
        let marks = marks();
        let expires = Some(NOW + Duration::from_secs(60));
        let revoked = |issuer: Option<&str>, token, expires| Event::TokenRevoked {
            issuer: issuer.map(Box::from),
            token: TokenMark::of(token),
            expires,
            at: NOW,
        };
        let taken = marks.take(&revoked(None, "t1", expires), NOW);
        assert_eq!(taken.concerned, Some(Concerned::Token(TokenMark::of("t1"))));
        let of = |issuer, jti| grant(issuer, Some("u1"), Some(NOW + KEEP), Some(jti));
        assert_eq!(marks.judge(&of(Some("a"), "t1"), NOW), Err(Revoked::Token), "a later iat does not help it");
        assert_eq!(marks.judge(&of(None, "t2"), NOW), Ok(()));
        let leeway = crate::auth::jwt::Options::default().leeway;
        let last = NOW + Duration::from_secs(60) + leeway - Duration::from_micros(1);
        assert_eq!(marks.judge(&of(None, "t1"), last), Err(Revoked::Token));
        assert_eq!(marks.judge(&of(None, "t1"), last + Duration::from_micros(1)), Ok(()), "it has expired by then");
        marks.take(&revoked(Some("a"), "t3", None), NOW);
        assert_eq!(marks.judge(&of(Some("a"), "t3"), NOW + KEEP / 2), Err(Revoked::Token));
        assert_eq!(marks.judge(&of(Some("b"), "t3"), NOW), Ok(()));
    }

    #[test]
    fn what_was_issued_before_a_time_is_revoked() {
        let marks = marks();
        let before = WallTime::from_secs(1_000_010);
        marks.take(&Event::IssuedBeforeRevoked { user: user(None, "u1"), before, at: NOW }, NOW);
        assert_eq!(marks.judge(&of_user("u1", 1_000_009), NOW), Err(Revoked::Token));
        assert_eq!(marks.judge(&of_user("u1", 1_000_010), NOW), Ok(()));
        assert_eq!(marks.judge(&grant(None, Some("u1"), None, None), NOW), Err(Revoked::Token));
        let long_after = before + KEEP - Duration::from_micros(1);
        assert_eq!(marks.judge(&of_user("u1", 1), long_after), Err(Revoked::Token), "it is kept from its own time on");
    }

    #[test]
    fn a_session_that_was_logged_out_stays_so() {
        let marks = marks();
        let session = SessionMark::of(b"s1");
        let taken = marks.take(&Event::SessionLoggedOut { session, at: NOW }, NOW);
        assert_eq!(taken.concerned, Some(Concerned::Session(session)));
        assert_eq!(marks.judge_session(session, NOW), Err(Revoked::LoggedOut));
        assert_eq!(marks.judge_session(SessionMark::of(b"s2"), NOW), Ok(()));
        assert_eq!(marks.judge_session(session, NOW + KEEP), Ok(()));
    }

    #[test]
    fn rights_are_the_latest_that_was_said_of_each_member() {
        let marks = marks();
        let later = NOW + Duration::from_secs(2);
        let news = |event: &Event| match marks.take(event, NOW).concerned {
            Some(Concerned::User { news, .. }) => news,
            other => panic!("{other:?}"),
        };
        let token = grant(Some("a"), Some("u1"), Some(NOW), None);
        assert!(marks.rights_of(&token, NOW).is_none());
        assert!(news(&changed(None, Some(&["p"]), Some(&["r"]), NOW)));
        assert!(!news(&changed(None, Some(&["p"]), Some(&["r"]), NOW)), "it was heard before");
        assert!(news(&changed(None, None, Some(&["s"]), later)), "a member left out stays");
        assert!(!news(&changed(None, Some(&["old"]), Some(&["old"]), NOW - KEEP / 2)));
        let held = NewRights { permissions: list(&["p"]), roles: list(&["s"]) };
        assert_eq!(marks.rights_of(&token, NOW), held);
        assert!(news(&changed(Some("a"), Some(&[]), None, later)));
        let own = NewRights { permissions: list(&[]), roles: list(&["s"]) };
        assert_eq!(marks.rights_of(&token, NOW), own, "what was said of this issuer's user is later");
        assert_eq!(marks.rights_of(&grant(Some("b"), Some("u1"), Some(NOW), None), NOW), held);
        let between = grant(None, Some("u1"), Some(NOW + Duration::from_secs(1)), None);
        assert_eq!(marks.rights_of(&between, NOW), NewRights { permissions: None, roles: list(&["s"]) });
        assert!(marks.rights_of(&of_user("u1", 1_000_003), NOW).is_none(), "later tokens win");
        assert_eq!(marks.rights_of(&grant(None, Some("u1"), None, None), NOW), held, "no iat");
    }

    #[test]
    fn an_event_from_before_all_that_is_kept_concerns_nobody() {
        let marks = marks();
        let taken = marks.take(&logout("u1", NOW - KEEP), NOW);
        assert_eq!(taken, Taken { concerned: None, dropped: 0 });
        assert!(marks.is_empty());
    }

    #[test]
    fn marks_that_stand_live_by_what_is_configured_since() {
        let marks = marks();
        let seconds = Duration::from_secs;
        let options = |keep, leeway| {
            let jwt = crate::auth::jwt::Options { leeway, ..Default::default() };
            crate::auth::Options { revocation_keep: keep, jwt, ..Default::default() }
        };
        marks.configure(&options(seconds(60), seconds(5)));
        let revoked =
            |token, expires| Event::TokenRevoked { issuer: None, token: TokenMark::of(token), expires, at: NOW };
        for event in [
            logout("u1", NOW),
            Event::IssuedBeforeRevoked { user: user(None, "u2"), before: NOW, at: NOW },
            Event::SessionLoggedOut { session: SessionMark::of(b"s1"), at: NOW },
            changed(None, Some(&["p"]), None, NOW),
            revoked("ends", Some(NOW + seconds(10))),
            revoked("open", None),
            // Of two marks the one that stands longer counts.
            revoked("both", None),
            revoked("both", Some(NOW + seconds(10))),
        ] {
            marks.take(&event, NOW);
        }
        let holds = |at: WallTime| {
            let by = |jti| marks.judge(&grant(None, Some("u9"), Some(NOW + KEEP), Some(jti)), at).is_err();
            let by_user = |sub| marks.judge(&of_user(sub, 1), at).is_err();
            let session = marks.judge_session(SessionMark::of(b"s1"), at).is_err();
            let rights = !marks.rights_of(&of_user("u1", 1), at).is_none();
            ([by_user("u1"), by_user("u2"), session, rights, by("open"), by("both")], by("ends"))
        };
        assert_eq!(holds(NOW + seconds(14)), ([true; 6], true));
        assert_eq!(holds(NOW + seconds(15)), ([true; 6], false));
        assert_eq!(holds(NOW + seconds(60)), ([false; 6], false));
        marks.configure(&options(seconds(120), seconds(60)));
        assert_eq!(holds(NOW + seconds(69)), ([true; 6], true), "tokens may live that long now");
        assert_eq!(holds(NOW + seconds(119)), ([true; 6], false));
        assert_eq!(holds(NOW + seconds(120)), ([false; 6], false));
        // What goes first where there is no room is what ends first as it is now.
        marks.configure(&options(seconds(20), seconds(60)));
        marks.take(&logout("u3", NOW + seconds(30)), NOW + seconds(30));
        let left = ["ends", "both"].map(|jti| marks.judge(&grant(None, None, None, Some(jti)), NOW).is_err());
        assert_eq!((marks.len(), left), (2, [true, false]), "the others have ended by then");
    }

    #[test]
    fn marks_that_have_ended_go_with_the_next_event() {
        let marks = marks();
        for n in 0..10 {
            marks.take(&logout(&format!("u{n}"), NOW), NOW);
        }
        assert_eq!(marks.len(), 10);
        marks.take(&logout("last", NOW + KEEP), NOW + KEEP);
        assert_eq!(marks.len(), 1);
    }

    #[test]
    fn where_there_is_no_room_the_mark_that_ends_soonest_goes() {
        let marks = Marks::with_bounds(2, 1_000_000);
        let late = |n: u64| NOW + Duration::from_secs(n);
        let dropped: Vec<usize> =
            [2, 1, 3].map(|n| marks.take(&logout(&format!("u{n}"), late(n)), NOW).dropped).to_vec();
        assert_eq!((dropped.as_slice(), marks.len()), (&[0, 0, 1][..], 2));
        let refused = [1, 2, 3].map(|n| marks.judge(&of_user(&format!("u{n}"), 1), NOW).is_err());
        assert_eq!(refused, [false, true, true]);
        // Lists have a bound of their own, and only what has lists makes room for it.
        let marks = Marks::with_bounds(100, 400);
        marks.take(&logout("u1", NOW), NOW);
        let of = |sub: &str, at| {
            let event =
                Event::PermissionsChanged { user: user(None, sub), permissions: list(&["p"; 9]), roles: None, at };
            marks.take(&event, NOW).dropped
        };
        assert_eq!([of("a", late(2)), of("b", late(1)), of("c", late(3))], [0, 1, 1]);
        assert_eq!(marks.judge(&of_user("u1", 1), NOW), Err(Revoked::LoggedOut));
        assert!(!marks.rights_of(&of_user("c", 1), NOW).is_none());
    }

    #[test]
    fn tokens_that_outlive_marks_are_warned_of_once_a_minute() {
        let marks = marks();
        let lives = |span: Duration| grant(None, Some("u"), Some(NOW + KEEP - span), None);
        assert!(!marks.warns_of(&lives(KEEP), NOW));
        let long = lives(KEEP + Duration::from_micros(1));
        assert!(marks.warns_of(&long, NOW));
        assert!(!marks.warns_of(&long, NOW + Duration::from_secs(59)));
        assert!(marks.warns_of(&long, NOW + Duration::from_secs(60)));
    }

    /// A user or a token that events of the property test are about.
    fn event() -> impl Strategy<Value = Event> {
        let issuer = || prop::option::of("[ab]").prop_map(|issuer| issuer.map(String::into_boxed_str));
        let users = || (issuer(), "[uv]").prop_map(|(issuer, sub)| User { issuer, sub: sub.into() });
        let time = || (0..20_000u64).prop_map(|ms| NOW + Duration::from_millis(ms));
        let lists = || prop::option::of(prop::collection::vec("[pq]", 0..3));
        let shared = |list: Option<Vec<String>>| {
            list.map(|list| list.into_iter().map(String::into_boxed_str).collect::<Arc<[Box<str>]>>())
        };
        prop_oneof![
            (users(), time()).prop_map(|(user, at)| Event::UserLoggedOut { user, at }),
            (users(), time()).prop_map(|(user, at)| Event::IssuedBeforeRevoked { user, before: at, at: NOW }),
            (issuer(), "[tw]", prop::option::of(time())).prop_map(|(issuer, jti, expires)| {
                Event::TokenRevoked { issuer, token: TokenMark::of(&jti), expires, at: NOW }
            }),
            (users(), lists(), lists(), time()).prop_map(move |(user, permissions, roles, at)| {
                Event::PermissionsChanged { user, permissions: shared(permissions), roles: shared(roles), at }
            }),
        ]
    }

    proptest! {
        /// The table against the plain reading of the rules over the list of all that was said.
        #[test]
        fn the_table_judges_as_the_list_of_events_does(
            events in prop::collection::vec(event(), 0..12),
            again in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
            issuer in prop::option::of("[ab]"),
            sub in "[uv]",
            issued_ms in prop::option::of(0..20_000u64),
            jti in prop::option::of("[tw]"),
            passed_ms in 0..30_000u64,
        ) {
            let marks = marks();
            for event in &events {
                marks.take(event, NOW);
            }
            // What is replayed changes nothing but the order of rights said at the very same time.
            for index in again.iter().filter(|_| !events.is_empty()) {
                let event = index.get(&events);
                if !matches!(event, Event::PermissionsChanged { .. }) {
                    marks.take(event, NOW);
                }
            }
            let now = NOW + Duration::from_millis(passed_ms);
            let issued = issued_ms.map(|ms| NOW + Duration::from_millis(ms));
            let token = grant(issuer.as_deref(), Some(&sub), issued, jti.as_deref());
            let mine = |user: &User| {
                *user.sub == *sub && user.issuer.as_deref().is_none_or(|named| Some(named) == issuer.as_deref())
            };
            let mut expected = Ok(());
            let leeway = crate::auth::jwt::Options::default().leeway;
            for event in &events {
                match event {
                    Event::UserLoggedOut { user, at }
                        if mine(user) && issued.is_none_or(|issued| issued.as_secs() <= at.as_secs()) =>
                    {
                        expected = Err(Revoked::LoggedOut);
                    }
                    Event::IssuedBeforeRevoked { user, before, .. }
                        if mine(user) && expected.is_ok() && issued.is_none_or(|issued| issued < *before) =>
                    {
                        expected = Err(Revoked::Token);
                    }
                    Event::TokenRevoked { issuer: named, token, expires, .. } if expected.is_ok() => {
                        let this = jti.as_deref().map(TokenMark::of) == Some(*token);
                        let issuers = named.as_deref().is_none_or(|named| Some(named) == issuer.as_deref());
                        if this && issuers && expires.is_none_or(|expires| expires + leeway > now) {
                            expected = Err(Revoked::Token);
                        }
                    }
                    _ => {}
                }
            }
            // Of several marks of one token the longest holds, so an earlier end refuses nothing less.
            prop_assert_eq!(marks.judge(&token, now), expected);

            let mut rights = NewRights::default();
            let (mut permissions_at, mut roles_at) = (WallTime::default(), WallTime::default());
            let mut said: Vec<&Event> = events.iter().collect();
            // Of one time, what was said of the issuer's own user counts.
            said.sort_by_key(|event| match event {
                Event::PermissionsChanged { user, .. } => user.issuer.is_some(),
                _ => false,
            });
            for event in said {
                let Event::PermissionsChanged { user, permissions, roles, at } = event else { continue };
                if !mine(user) || issued.is_some_and(|issued| issued.as_secs() > at.as_secs()) {
                    continue;
                }
                if permissions.is_some() && *at >= permissions_at {
                    (rights.permissions, permissions_at) = (permissions.clone(), *at);
                }
                if roles.is_some() && *at >= roles_at {
                    (rights.roles, roles_at) = (roles.clone(), *at);
                }
            }
            prop_assert_eq!(marks.rights_of(&token, now), rights);
        }
    }
}
