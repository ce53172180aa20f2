//! What happens to credentials from outside: users and sessions are logged out, tokens revoked, rights changed; records of
//! sessions change, and the store goes away and comes back.

use std::sync::Arc;

use restcast::auth::control::{ControlEntry, Event, PERMISSION_UPDATE, TOKEN_REVOKED, USER_LOGGED_OUT};
use restcast::auth::marks::Concerned;
use restcast::ids::StreamId;
use restcast::shard::{EphemeralAsk, Found, Input, Lookup, Options, Order};
use serde_json::json;

use super::deeds::{ISSUERS, USERS};
use super::direct::SECRET_MARK;
use super::law::{Saying, User, What};
use super::managed::Done;
use super::store::{GRACE_S, TIMEOUT_US};
use super::world::{Asking, COMPANIES, SECOND_US, World};

/// How much later than the mark stands a core hears of it, at most.
const HEARING_US: u64 = 200_000;

/// What a core is to be told.
#[derive(Clone, Debug)]
pub enum News {
    /// What was said, by its place in the law; whom it concerns.
    Said(usize, Arc<[Concerned]>),
    /// That an API key was deleted, by its place in the law.
    Key(usize),
    /// Whether the store is there.
    Store(bool),
    /// What was done to a stream.
    Catalog(Arc<Options>, &'static str, Done),
    /// The configuration was read again.
    Reload(Arc<Options>, u64),
}

impl World {
    /// Somebody says something, by chance.
    pub fn decree(&mut self) {
        let said = &self.book.law.said;
        if !said.is_empty() && self.dice.percent(15) {
            // A stream of events that is replayed, or a message that came twice.
            let place = self.dice.below(said.len() as u64) as usize;
            return self.repeat(place);
        }
        if self.dice.percent(25) {
            let keys = (0..self.book.keys.len()).filter(|&key| !self.book.law.has_deleted(key, None));
            let keys: Vec<usize> = keys.collect();
            if !keys.is_empty() {
                let key = *self.dice.pick(&keys);
                self.decree_that(What::KeyDeleted { key });
            }
            return;
        }
        let issuer = if self.dice.percent(50) { *self.dice.pick(&ISSUERS) } else { None };
        let user = User { issuer, sub: format!("u{}", self.dice.below(USERS)) };
        let what = match self.dice.below(10) {
            0..2 => What::LoggedOut(user),
            2 => {
                let sids: Vec<&String> = self.book.store.sessions.keys().collect();
                if sids.is_empty() {
                    return;
                }
                What::SessionLoggedOut { sid: (*self.dice.pick(&sids)).clone() }
            }
            3..5 => {
                let tokens = self.live_clients().into_iter().map(|number| &self.clients[number].tokens[0]);
                let known: Vec<(String, u64)> =
                    tokens.filter_map(|token| Some((token.jti.clone()?, token.exp_us / SECOND_US + 1))).collect();
                if known.is_empty() {
                    return;
                }
                let (jti, exp_s) = self.dice.pick(&known).clone();
                What::Revoked { issuer, jti, exp_s: self.dice.percent(50).then_some(exp_s) }
            }
            5 => What::IssuedBefore { user, before_s: self.book.wall_us / SECOND_US - self.dice.below(30) },
            _ => {
                let rights = self.some_rights();
                let (roles, permissions) = match self.dice.below(4) {
                    0 => (Some(rights.roles), None),
                    1 => (None, Some(rights.permissions)),
                    _ => (Some(rights.roles), Some(rights.permissions)),
                };
                What::Rights { user, roles, permissions }
            }
        };
        self.decree_that(what);
    }

    /// It is said: the mark stands, and the cores hear of it one after the other.
    pub fn decree_that(&mut self, what: What) {
        // Events are dated in milliseconds; no two alike, for then it is chance which is the later one.
        let mut at_us = self.book.wall_us / 1_000 * 1_000;
        while self.book.law.said.iter().any(|saying| saying.at_us == at_us) {
            at_us += 1_000;
        }
        let place = self.book.law.said.len();
        let heard = vec![None; self.cores.len()];
        self.book.law.said.push(Saying { what, at_us, first_said: place, heard });
        self.publish(place);
    }

    /// The same, and every core hears of it now.
    pub fn decree_at_once(&mut self, what: What) {
        self.decree_that(what);
        self.hear_all();
    }

    /// Every core hears now of all there is to hear.
    pub fn hear_all(&mut self) {
        for core in 0..self.cores.len() {
            self.news[core].iter_mut().for_each(|(due, _)| *due = self.book.mono_us);
            self.hear(core);
        }
    }

    /// The same is said once more.
    pub fn repeat(&mut self, place: usize) {
        let heard = vec![None; self.cores.len()];
        let saying = Saying { heard, ..self.book.law.said[place].clone() };
        let place = self.book.law.said.len();
        self.book.law.said.push(saying);
        self.publish(place);
    }

    fn publish(&mut self, place: usize) {
        let Saying { what, at_us, .. } = self.book.law.said[place].clone();
        if let What::KeyDeleted { .. } = what {
            return self.tell_cores(&News::Key(place));
        }
        let user_of = |user: &User| json!({ "userId": user.sub, "iss": user.issuer });
        let (event, data) = match &what {
            What::LoggedOut(User { issuer: None, sub }) if place.is_multiple_of(2) => (USER_LOGGED_OUT, sub.clone()),
            What::LoggedOut(user) => (USER_LOGGED_OUT, user_of(user).to_string()),
            What::SessionLoggedOut { sid } => (USER_LOGGED_OUT, json!({ "sessionId": sid }).to_string()),
            What::Revoked { issuer, jti, exp_s } => {
                (TOKEN_REVOKED, json!({ "jti": jti, "iss": issuer, "exp": exp_s }).to_string())
            }
            What::IssuedBefore { user, before_s } => {
                let mut data = user_of(user);
                data["iat_before"] = (*before_s).into();
                (TOKEN_REVOKED, data.to_string())
            }
            What::KeyDeleted { .. } => unreachable!("that is no event of the control stream"),
            What::Rights { user, roles, permissions } => {
                let mut data = user_of(user);
                data["at"] = (at_us / 1_000).into();
                data["roles"] = roles.clone().into();
                data["permissions"] = permissions.clone().into();
                (PERMISSION_UPDATE, data.to_string())
            }
        };
        let entry = ControlEntry { event: event.to_owned(), data, at_ms: at_us / 1_000 };
        let now = self.now().wall;
        let events = Event::read(&entry, now).unwrap_or_else(|error| panic!("{error}: {entry:?}"));
        let concerned: Arc<[Concerned]> =
            events.iter().filter_map(|event| self.ledger.marks().take(event, now).concerned).collect();
        self.tell_cores(&News::Said(place, concerned));
    }

    /// Each core is told, sooner or later.
    pub fn tell_cores(&mut self, news: &News) {
        for core in 0..self.cores.len() {
            let delay_us = if self.dice.percent(30) { 0 } else { self.dice.below(HEARING_US) };
            let queue = &mut self.news[core];
            let due_us = (self.book.mono_us + delay_us).max(queue.back().map_or(0, |(due, _)| *due));
            queue.push_back((due_us, news.clone()));
        }
    }

    /// A core hears what is due; whether there was anything.
    pub fn hear(&mut self, core: usize) -> bool {
        let mut heard = false;
        while self.news[core].front().is_some_and(|(due, _)| *due <= self.book.mono_us) {
            let (_, news) = self.news[core].pop_front().expect("there is news");
            match news {
                News::Said(place, concerned) => {
                    self.book.law.hear(place, core, self.book.mono_us);
                    self.handle(core, Input::Control(concerned));
                }
                News::Key(place) => {
                    self.book.law.hear(place, core, self.book.mono_us);
                    let table = self.key_table(core);
                    self.handle(core, Input::ApiKeys(table));
                }
                News::Store(up) => self.handle(core, Input::StoreState { up }),
                News::Catalog(options, name, done) => {
                    self.book.managed.hear(core, self.book.mono_us, name, &done);
                    let changed = Arc::from([StreamId::new(name).expect("an id")]);
                    self.handle(core, Input::Catalog { options, changed });
                }
                News::Reload(options, variant) => {
                    self.book.direct.hear_reload(core, self.book.mono_us, variant);
                    self.handle(core, Input::Reload(options));
                }
            }
            heard = true;
        }
        heard
    }

    // The store.

    /// Something happens to a session, or to all.
    pub fn disturb_sessions(&mut self) {
        if self.dice.percent(20) {
            return if self.book.store.is_away() { self.store_returns() } else { self.store_leaves() };
        }
        let now_us = self.book.mono_us;
        let living: Vec<String> =
            self.book.store.sessions.keys().filter(|sid| self.book.store.lives(sid, now_us)).cloned().collect();
        if living.is_empty() {
            return;
        }
        let sid = self.dice.pick(&living).clone();
        match self.dice.below(10) {
            0 => self.book.store.delete(&sid, now_us),
            1 => self.book.store.change(&sid, now_us, |version| version.user = None),
            2 => self.book.store.change(&sid, now_us, |version| version.user = Some("somebody".to_owned())),
            3..6 => {
                let life_us = self.life_us();
                let expires_us = (self.book.wall_us + life_us) / 1_000 * 1_000;
                self.book.store.extend(&sid, now_us, life_us, Some(expires_us));
            }
            6 => {
                let company = self.dice.below(COMPANIES);
                self.book.store.change(&sid, now_us, |version| version.company = company);
            }
            _ => {
                let rights = self.some_rights();
                self.book.store.change(&sid, now_us, |version| version.rights = rights);
            }
        }
    }

    pub fn store_leaves(&mut self) {
        self.book.store.go_away(self.book.mono_us);
        self.tell_cores(&News::Store(false));
        // It may be longer than sessions are kept for.
        let most_us = if self.dice.percent(30) { 2 * GRACE_S } else { GRACE_S / 2 } * SECOND_US;
        self.store_returns_us = Some(self.book.mono_us + self.dice.below(most_us));
    }

    pub fn store_returns(&mut self) {
        self.book.store.come_back(self.book.mono_us);
        self.store_returns_us = None;
        self.tell_cores(&News::Store(true));
    }

    /// The store is asked something.
    pub fn put_to_store(&mut self, core: usize, mut asking: Asking) {
        let asked = &mut self.cores[core].asking;
        if let Lookup::Ephemeral(_) = asking.lookup {
            // What one core asks of them is answered in its order.
            let before = asked.iter().filter(|other| matches!(other.lookup, Lookup::Ephemeral(_)));
            asking.due_us = before.map(|other| other.due_us).chain([asking.due_us]).max().expect("its own");
        }
        asked.push(asking);
    }

    /// The answer to a question about ephemeral sessions.
    fn answer_of_ephemerals(&mut self, ask: EphemeralAsk, asked_us: u64) -> Found {
        let sealed = match &ask {
            EphemeralAsk::Make(make) => [Some(&make.record), make.named.as_ref().map(|(_, named)| named)],
            _ => [None; 2],
        };
        for text in sealed.into_iter().flatten().map(|sealed| String::from_utf8_lossy(sealed.expose_secret())) {
            let tells = self.book.direct.sessions.iter().any(|session| text.contains(&session.token));
            assert!(!tells && !text.contains(SECRET_MARK), "what stands in the store is sealed");
        }
        let fails = self.book.store.fails(&mut self.dice, asked_us, self.book.mono_us);
        // Whether what was not answered was done is not known.
        if fails && self.dice.percent(50) {
            return Found::Unavailable;
        }
        let now = self.now();
        let found = self.ephemerals.answer(ask, now);
        if fails { Found::Unavailable } else { Found::Ephemeral(found) }
    }

    /// When a question that is put now is answered.
    pub fn answered_at(&mut self) -> u64 {
        let most_us = match self.dice.below(20) {
            0 => TIMEOUT_US,
            1..5 => 300_000,
            _ => 5_000,
        };
        self.book.mono_us + self.dice.below(most_us).min(self.store_us_max)
    }

    /// The store answers a core what is due; whether there was anything.
    pub fn answer_lookups(&mut self, core: usize) -> bool {
        let now_us = self.book.mono_us;
        if self.store_returns_us.is_some_and(|at| at <= now_us) {
            self.store_returns();
        }
        let mut answered = false;
        while let Some(at) = self.cores[core].asking.iter().position(|asking| asking.due_us <= now_us) {
            let Asking { ask, lookup, asked_us, .. } = self.cores[core].asking.remove(at);
            let found = match lookup {
                Lookup::Ephemeral(ask) => self.answer_of_ephemerals(ask, asked_us),
                lookup => self.book.store.answer(&mut self.dice, &lookup, asked_us, now_us),
            };
            self.handle(core, Input::Found { ask, found });
            answered = true;
        }
        answered
    }

    /// The store is told something that needs no answer.
    pub fn order(&mut self, order: Order) {
        let (sid, life) = match order {
            Order::Touch { sid, life } => (sid, life),
            // The other processes have no watcher here.
            Order::Refresh(_) => return self.book.count("refresh told"),
            // Other processes are told.
            Order::Publish(entry) if entry.ended_ephemeral().is_some() => return,
            _ => unreachable!("events come from elsewhere, and nobody else asks"),
        };
        if self.book.store.is_away() {
            return;
        }
        let sid = String::from_utf8_lossy(sid.expose_secret()).into_owned();
        let life_us = u64::try_from(life.as_micros()).expect("a short life");
        if self.dice.below(100) < self.setup.loses_touches {
            self.book.count("touch lost");
        } else if self.book.store.touch(&sid, self.book.mono_us, life_us) {
            self.book.count("touch");
        }
    }
}
