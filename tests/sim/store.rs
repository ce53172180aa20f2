//! The model of the store of sessions and tickets: what each record has said at which time, and how the store answers.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use restcast::secret::Secret;
use restcast::shard::{Found, Lookup, SessionRecord};

use super::dice::Dice;
use super::law::{LATE_US, Rights};

const SECOND_US: u64 = 1_000_000;
/// `auth.session.reread` and `auth.session.grace` of every world.
pub const REREAD_S: u64 = 3;
pub const GRACE_S: u64 = 20;
/// How long a question may go unanswered: `redis.timeout`.
pub const TIMEOUT_US: u64 = 2 * SECOND_US;
/// Within this the server has read a record again, as long as the store is there: two rereads, for one may fail, and their
/// answers.
const KNOWN_WITHIN_US: u64 = 2 * REREAD_S * SECOND_US + TIMEOUT_US + SECOND_US;
/// What the records of every world say that a session's life is: no session lives longer.
pub const MAX_AGE_US: u64 = 60 * SECOND_US;
/// How far two readings of one end may be apart.
const EARLY_US: u64 = 2 * SECOND_US;

/// What a record says for some time.
#[derive(Clone, Debug)]
pub struct Version {
    /// On the monotonic clock.
    since_us: u64,
    /// Until it was changed or deleted; `None`: it stands, unless its time is over.
    until_us: Option<u64>,
    /// Nobody is signed in where there is no user.
    pub user: Option<String>,
    pub rights: Rights,
    pub company: u64,
    /// When the key goes, on the monotonic clock.
    ends_us: u64,
    /// When it was touched, and when the key had gone otherwise.
    touched: Vec<(u64, u64)>,
    /// `cookie.expires`, on the wall clock.
    expires_us: Option<u64>,
}

/// A session. That there is none is no version.
#[derive(Clone, Debug)]
pub struct Session {
    /// Who has signed in.
    pub user: String,
    pub versions: Vec<Version>,
}

/// A session as somebody's; `None`: as anybody's.
#[derive(Clone, Copy, Debug)]
pub struct Whose<'a> {
    pub sid: &'a str,
    pub user: Option<&'a str>,
}

impl Whose<'_> {
    fn is_of(self, version: &Version) -> bool {
        match self.user {
            Some(user) => version.user.as_deref() == Some(user),
            None => version.user.is_some(),
        }
    }
}

/// What is known of the store, and of each session.
#[derive(Debug, Default)]
pub struct Store {
    pub sessions: BTreeMap<String, Session>,
    tickets: HashMap<String, (Secret, u64)>,
    /// When it was away, on the monotonic clock.
    aways: Vec<(u64, Option<u64>)>,
    /// When the machine slept, and could read nothing.
    sleeps: Vec<(u64, u64)>,
    /// Whether it fails only when it is away.
    pub is_reliable: bool,
    /// `auth.session.touch`.
    pub touches: bool,
    /// By how much the wall clock was set back, in all, and whether it was set at all.
    pub set_back_us: u64,
    pub was_set: bool,
}

impl Version {
    fn stands_at(&self, at_us: u64) -> bool {
        self.since_us <= at_us && self.until_us.is_none_or(|until| at_us < until) && at_us < self.ends_us
    }

    /// When the session ends by this, on the monotonic clock, at the latest; `offset_us`: the wall clock's lead.
    fn last_us(&self, store: &Store, offset_us: u64) -> u64 {
        // Where sessions are touched only the key says when they end.
        let expires_us = self.expires_us.filter(|_| !store.touches);
        let by_cookie = expires_us.map_or(u64::MAX, |expires| expires.saturating_sub(offset_us));
        // The server counts by its wall clock.
        (self.ends_us + store.set_back_us).min(by_cookie)
    }
}

impl Store {
    pub fn is_away(&self) -> bool {
        self.aways.last().is_some_and(|(_, until)| until.is_none())
    }

    pub fn go_away(&mut self, now_us: u64) {
        self.aways.push((now_us, None));
    }

    pub fn come_back(&mut self, now_us: u64) {
        if let Some((_, until)) = self.aways.last_mut() {
            until.get_or_insert(now_us);
        }
    }

    pub fn sleep(&mut self, from_us: u64, to_us: u64) {
        self.sleeps.push((from_us, to_us));
    }

    /// Somebody signs in, for so long.
    pub fn sign_in(&mut self, sid: &str, version: Version) {
        let user = version.user.clone().unwrap_or_default();
        self.sessions.insert(sid.to_owned(), Session { user, versions: vec![version] });
    }

    /// What a record says from now on.
    pub fn version(
        now_us: u64,
        user: &str,
        rights: Rights,
        company: u64,
        life_us: u64,
        expires_us: Option<u64>,
    ) -> Version {
        let user = (!user.is_empty()).then(|| user.to_owned());
        let ends_us = now_us + life_us;
        Version { since_us: now_us, until_us: None, user, rights, company, ends_us, touched: Vec::new(), expires_us }
    }

    /// The record says something else from now on.
    pub fn change(&mut self, sid: &str, now_us: u64, change: impl FnOnce(&mut Version)) {
        let Some(session) = self.sessions.get_mut(sid) else { return };
        let Some(last) = session.versions.last_mut().filter(|last| last.stands_at(now_us)) else { return };
        let mut next = Version { since_us: now_us, ..last.clone() };
        last.until_us = Some(now_us);
        change(&mut next);
        session.versions.push(next);
    }

    pub fn extend(&mut self, sid: &str, now_us: u64, life_us: u64, expires_us: Option<u64>) {
        self.change(sid, now_us, |version| {
            version.ends_us = now_us + life_us;
            version.touched.clear();
            if version.expires_us.is_some() {
                version.expires_us = expires_us;
            }
        });
    }

    /// The key is to live for so long from now on; what the record says stays. Whether there is such a key.
    pub fn touch(&mut self, sid: &str, now_us: u64, life_us: u64) -> bool {
        assert!(self.touches, "only where that is configured");
        assert_eq!(life_us, MAX_AGE_US, "by what the record says");
        let last = self.sessions.get_mut(sid).and_then(|session| session.versions.last_mut());
        let Some(last) = last.filter(|last| last.stands_at(now_us)) else { return false };
        // Nobody's life here is longer than what sessions are touched by.
        if last.ends_us < now_us + life_us {
            last.touched.push((now_us, last.ends_us));
            last.ends_us = now_us + life_us;
        }
        true
    }

    pub fn delete(&mut self, sid: &str, now_us: u64) {
        if let Some(last) = self.sessions.get_mut(sid).and_then(|session| session.versions.last_mut()) {
            last.until_us.get_or_insert(now_us);
        }
    }

    /// Whether a record stands now under which its first user is signed in.
    pub fn lives(&self, sid: &str, now_us: u64) -> bool {
        let user = self.sessions.get(sid).map(|session| session.user.as_str());
        user.is_some_and(|user| self.now(Whose { sid, user: Some(user) }, now_us).is_some())
    }

    fn now(&self, whose: Whose<'_>, now_us: u64) -> Option<&Version> {
        let last = self.sessions.get(whose.sid)?.versions.last().filter(|last| last.stands_at(now_us))?;
        whose.is_of(last).then_some(last)
    }

    // What a connection may rely on.

    /// Until when what was read at `read_us` may be gone by.
    fn known_until(&self, read_us: u64) -> u64 {
        let mut until = read_us + KNOWN_WITHIN_US;
        for (from, to) in &self.aways {
            let to = to.unwrap_or(u64::MAX);
            if *from < until && to > read_us {
                // While it is away, what was read last holds for the grace.
                until = until.max(to.min(from + GRACE_S * SECOND_US).saturating_add(KNOWN_WITHIN_US));
            }
        }
        for (from, to) in &self.sleeps {
            if *from < until && *to > read_us {
                until = until.max(to + KNOWN_WITHIN_US);
            }
        }
        until
    }

    fn versions<'a>(&'a self, whose: Whose<'a>, now_us: u64, offset_us: u64) -> impl Iterator<Item = &'a Version> {
        self.all_versions(whose).filter(move |version| {
            let by_time = version.last_us(self, offset_us).saturating_add(LATE_US);
            let by_change = version.until_us.map_or(u64::MAX, |until| self.known_until(until));
            version.since_us <= now_us && now_us <= by_time.min(by_change).min(self.graced_until())
        })
    }

    fn all_versions<'a>(&'a self, whose: Whose<'a>) -> impl Iterator<Item = &'a Version> {
        let session = self.sessions.get(whose.sid).into_iter();
        session.flat_map(|session| &session.versions).filter(move |version| whose.is_of(version))
    }

    /// Until when a session may go on while the store is away.
    fn graced_until(&self) -> u64 {
        match self.aways.last() {
            Some((from, None)) => {
                let end = from + GRACE_S * SECOND_US;
                let woken = self.sleeps.last().map_or(0, |(_, to)| *to);
                end.max(woken) + KNOWN_WITHIN_US
            }
            _ => u64::MAX,
        }
    }

    /// Whether a connection may still hang on that session.
    pub fn may_live(&self, whose: Whose<'_>, now_us: u64, offset_us: u64) -> bool {
        self.versions(whose, now_us, offset_us).next().is_some()
    }

    /// The rights that the session may have by its record, as the server knows it.
    pub fn rights(&self, whose: Whose<'_>, now_us: u64, offset_us: u64) -> Vec<Rights> {
        self.versions(whose, now_us, offset_us).map(|version| version.rights.clone()).collect()
    }

    /// The rights that its record has ever given.
    pub fn all_rights(&self, whose: Whose<'_>) -> Vec<Rights> {
        self.all_versions(whose).map(|version| version.rights.clone()).collect()
    }

    /// Whether it has ever been that user's.
    pub fn was_of(&self, whose: Whose<'_>) -> bool {
        self.all_versions(whose).next().is_some()
    }

    /// The companies that it may have.
    pub fn companies(&self, whose: Whose<'_>, now_us: u64, offset_us: u64) -> Vec<u64> {
        self.versions(whose, now_us, offset_us).map(|version| version.company).collect()
    }

    /// What the record has said for so long that every connection must know it by now.
    pub fn settled(&self, whose: Whose<'_>, now_us: u64) -> Option<&Version> {
        let version = self.now(whose, now_us)?;
        let up_since = match self.aways.last() {
            Some((_, until)) => (*until)?,
            None => 0,
        };
        let awake_since = self.sleeps.last().map_or(0, |(_, to)| *to);
        let known = version.since_us.max(up_since).max(awake_since) + KNOWN_WITHIN_US;
        (now_us > known).then_some(version)
    }

    /// Whether the session may be over for the server: it has been at some time, or the store was away for long.
    pub fn may_end(&self, whose: Whose<'_>, now_us: u64, offset_us: u64) -> bool {
        let Some(session) = self.sessions.get(whose.sid) else { return true };
        let over = |version: &Version| {
            // What it was extended by is known when it has been read again.
            let unknown = version.touched.iter().find(|(at, _)| self.known_until(*at) > now_us);
            let ends = unknown.map_or(u64::MAX, |(_, before)| *before).min(version.last_us(self, offset_us));
            !whose.is_of(version) || ends.saturating_sub(EARLY_US) <= now_us
        };
        let gone = session.versions.last().is_some_and(|last| last.until_us.is_some());
        let away = |(from, until): &(u64, Option<u64>)| until.unwrap_or(now_us) - from >= GRACE_S * SECOND_US / 2;
        self.was_set || gone || session.versions.iter().any(over) || self.aways.iter().any(away)
    }

    // How it answers.

    /// Whether a question that came at `asked_us` has no answer at `now_us`.
    pub fn fails(&self, dice: &mut Dice, asked_us: u64, now_us: u64) -> bool {
        let away = self.aways.iter().any(|(from, to)| *from <= now_us && to.is_none_or(|to| to > asked_us));
        // Whoever asks does not wait for ever, and the machine may have slept meanwhile.
        away || now_us > asked_us + TIMEOUT_US || (!self.is_reliable && dice.percent(2))
    }

    /// The answer to a question that came at `asked_us`, at `now_us`.
    pub fn answer(&mut self, dice: &mut Dice, lookup: &Lookup, asked_us: u64, now_us: u64) -> Found {
        let fails = self.fails(dice, asked_us, now_us);
        match lookup {
            Lookup::Sessions(_) if fails => Found::Unavailable,
            Lookup::Sessions(sids) => {
                // It was read at some time since it was asked for.
                let read_us = asked_us + dice.below(now_us - asked_us + 1);
                Found::Sessions(sids.iter().map(|sid| self.record(sid, read_us)).collect())
            }
            Lookup::KeepTicket { hash, record, life } => {
                let until_us = now_us + u64::try_from(life.as_micros()).expect("a ticket is short-lived");
                // Whether what was not answered was done is not known.
                if !fails || dice.percent(50) {
                    self.tickets.insert(hash.clone(), (record.clone(), until_us));
                }
                if fails { Found::Unavailable } else { Found::Kept }
            }
            Lookup::TakeTicket(hash) => {
                let taken = if !fails || dice.percent(50) { self.tickets.remove(hash) } else { None };
                match fails {
                    true => Found::Unavailable,
                    false => Found::Ticket(taken.filter(|(_, until_us)| *until_us > now_us).map(|(record, _)| record)),
                }
            }
            other => unreachable!("the store is not asked for {other:?}"),
        }
    }

    fn record(&self, sid: &Secret, read_us: u64) -> Option<SessionRecord> {
        let sid = String::from_utf8_lossy(sid.expose_secret()).into_owned();
        let versions = &self.sessions.get(&sid)?.versions;
        let version = versions.iter().find(|version| version.stands_at(read_us))?;
        let ttl = Duration::from_micros(version.ends_us - read_us);
        Some(SessionRecord { text: Secret::new(version.text()), ttl: Some(ttl) })
    }
}

impl Version {
    /// As express-session writes it.
    fn text(&self) -> String {
        let expires = self.expires_us.map(iso_date);
        let mut text = serde_json::json!({
            "cookie": { "originalMaxAge": MAX_AGE_US / 1_000, "expires": expires, "httpOnly": true, "path": "/" },
            "userRole": self.rights.roles,
            "permissions": self.rights.permissions,
            "companyId": self.company,
        });
        if let Some(user) = &self.user {
            text["userId"] = user.as_str().into();
        }
        text.to_string()
    }
}

/// As `JSON.stringify` writes a `Date`: the model's wall clock stays within a few days of its beginning.
fn iso_date(wall_us: u64) -> String {
    // 1,800,000,000 seconds are 2027-01-15T08:00:00Z.
    let since = wall_us / 1_000 - 1_799_971_200_000;
    let (day, ms) = (15 + since / 86_400_000, since % 86_400_000);
    let (seconds, ms) = (ms / 1_000, ms % 1_000);
    format!("2027-01-{day:02}T{:02}:{:02}:{:02}.{ms:03}Z", seconds / 3_600, seconds / 60 % 60, seconds % 60)
}
