//! The sessions that a core's connections live by: which connection hangs on which, when its record is read again, and what
//! becomes of them when it says something else.
//!
//! Source: protocol version 1, sections 2 («Session»), 4 and 5. A record is read at the handshake and every
//! `auth.session.reread`, once more shortly before its end, at once where something says that it has changed; what is due
//! about the same time is asked for together. While the store cannot be read, sessions go on for `auth.session.grace`.
//! Memory: an entry for each session with a connection on this core, however many tabs share it; questions as in
//! `authenticate`. Errors: [`Refusal`]. Not here: what a record means (`auth::session`), the store (`runtime`).

use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Duration;

use crate::auth::grant::{CredentialKind, Grant, SessionNo};
use crate::auth::marks::Revoked;
use crate::auth::session::{Record, SessionMark};
use crate::codec::message::{CloseReason, ErrorCode};
use crate::connection::handshake::{Refusal, SessionCookie};
use crate::connection::{Phase, State};
use crate::ids::ConnectionKey;
use crate::limits::{LOOKUP_TIMEOUT, LOOKUP_WAITERS_MAX, SESSIONS_PER_LOOKUP, SESSIONS_PER_TURN};
use crate::secret::Secret;
use crate::time::{Instant, Now, WallTime};

use super::lookup::{Asked, Found, Looked, Lookup, Order, Purpose, Question, Reread, SessionRecord, Waiter, Waiting};
use super::slab::Slab;
use super::{Output, Shard};

/// Sessions that are due within this are asked for together.
const TICK: Duration = Duration::from_millis(200);
/// How long before its known end a session's record is looked at once more: it may have been extended.
const LAST_LOOK: Duration = Duration::from_secs(1);
/// And what must be left of it for another look.
const LAST_LEFT: Duration = Duration::from_millis(200);
/// How soon a record that could not be read is tried again, at the latest.
const RETRY: Duration = Duration::from_secs(5);
/// How soon a record is read again after news of its user that is dated ahead of this clock, at the latest.
const NEWS_REREAD_INTERVAL: Duration = Duration::from_secs(1);
/// Two readings of one end that are no further apart are the same: how long a key lives is told with the time the answer took.
const SAME_END: Duration = Duration::from_secs(1);

/// The sessions of one core.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    places: Slab<Session>,
    place_of: HashMap<SessionMark, u32>,
    /// When each is to be looked at.
    due: BTreeSet<(Instant, u32)>,
    /// Those that may have no connection any more.
    unused: Vec<u32>,
    /// The number of the question that is out for a session's record.
    asked: HashMap<SessionMark, u64>,
    /// Since when the store is away, where that was told.
    away_since: Option<Instant>,
}

#[derive(Debug)]
struct Session {
    sid: Secret,
    mark: SessionMark,
    /// What its record grants.
    grant: Grant,
    /// When it is looked at next; `None`: it has ended.
    due: Option<Instant>,
    /// Since when its record could not be read: since the first question that had no answer was put.
    failing_since: Option<Instant>,
    /// Whether its connections are to be judged by the present configuration as soon as the record has been read by it.
    rejudge: bool,
    /// Its connections: open ones, and those that wait for a value.
    connections: Vec<u32>,
}

impl Sessions {
    /// When something is to be done.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    fn set_due(&mut self, place: u32, at: Option<Instant>) {
        let Some(session) = self.places.at_mut(place) else { return };
        if let Some(before) = std::mem::replace(&mut session.due, at) {
            self.due.remove(&(before, place));
        }
        if let Some(at) = at {
            self.due.insert((at, place));
        }
    }

    fn all(&self) -> Vec<u32> {
        self.places.iter().map(|(place, _)| place).collect()
    }
}

/// What a record has turned out to be.
enum Verdict {
    /// It is somebody's.
    Good(Box<Record>, Option<Duration>),
    /// There is no such session, or nobody's.
    Gone(Refusal),
    /// It cannot be said.
    Unknown,
}

fn unavailable() -> Refusal {
    let detail = "the store of sessions does not answer";
    Refusal::new(ErrorCode::SessionStoreUnavailable, detail).because("session_store_unavailable").retry_after(2)
}

fn ended(detail: impl Into<std::borrow::Cow<'static, str>>) -> Refusal {
    Refusal::new(ErrorCode::SessionExpired, detail).because("session_expired")
}

impl Shard {
    /// A session's cookie is presented.
    pub(super) fn look_at_cookie(&mut self, cookie: &SessionCookie, waiter: Waiter) -> Looked {
        let Some(options) = &self.options.auth.session else {
            return Looked::Now(waiter, Err(ended("this server knows no sessions")));
        };
        let SessionCookie::Value(cookie) = cookie else {
            let detail = "the session's cookie appears twice, or is no text";
            return Looked::Now(waiter, Err(Refusal::new(ErrorCode::BadRequest, detail)));
        };
        match options.secrets.session_id(cookie.expose_secret()) {
            Ok(sid) => self.ask_for_session(sid, waiter, Purpose::Cookie),
            Err(error) => {
                let refusal = Refusal::new(ErrorCode::InvalidToken, error.to_string()).because(error.reason());
                Looked::Now(waiter, Err(refusal))
            }
        }
    }

    /// A connection asks for its session to be read again.
    pub(super) fn reread_mine(&mut self, session: SessionNo, waiter: Waiter) -> Looked {
        match self.sessions.places.at(session.place()).map(|session| session.sid.clone()) {
            Some(sid) => self.ask_for_session(sid, waiter, Purpose::Update),
            None => Looked::Now(waiter, Err(ended("the session has ended"))),
        }
    }

    /// Asks for a session's record. Who comes while the same is being asked shares the answer.
    pub(super) fn ask_for_session(&mut self, sid: Secret, waiter: Waiter, purpose: Purpose) -> Looked {
        if self.options.auth.session.is_none() {
            return Looked::Now(waiter, Err(ended("this server knows no sessions")));
        }
        let mark = SessionMark::of(sid.expose_secret());
        if let Some(ask) = self.sessions.asked.get(&mark)
            && let Some(Asked::Session(question)) = self.looked_up.get_mut(ask)
        {
            if question.waiting.len() + question.later.len() >= LOOKUP_WAITERS_MAX {
                let detail = "too many requests wait for this session";
                return Looked::Now(waiter, Err(Refusal::new(ErrorCode::Overloaded, detail).retry_after(2)));
            }
            self.ask_no += 1;
            question.later.push(Waiting { no: self.ask_no, waiter, purpose });
            return Looked::Later(self.ask_no);
        }
        if let Err(refusal) = self.may_look_up() {
            return Looked::Now(waiter, Err(refusal));
        }
        let no = self.ask_no + 1;
        self.put_question(sid, mark, vec![Waiting { no, waiter, purpose }]);
        Looked::Later(no)
    }

    fn put_question(&mut self, sid: Secret, mark: SessionMark, waiting: Vec<Waiting>) {
        let question = Question { sid: sid.clone(), mark, asked: self.now, waiting, later: Vec::new() };
        let ask = self.look_up_surely(Lookup::Sessions(vec![sid]), Asked::Session(Box::new(question)));
        self.sessions.asked.insert(mark, ask);
    }

    /// The answer to a question about one session.
    pub(super) fn session_found(&mut self, ask: u64, question: Question, found: Found) {
        let Question { sid, mark, asked, mut waiting, later } = question;
        if self.sessions.asked.get(&mark) == Some(&ask) {
            self.sessions.asked.remove(&mark);
        }
        let record = match found {
            Found::Sessions(mut records) if records.len() == 1 => Ok(records.pop().flatten()),
            _ => Err(()),
        };
        match self.verdict(asked, record) {
            Verdict::Good(record, ttl) => {
                waiting.extend(later);
                let renewing: Vec<u32> = waiting.iter().filter_map(Waiting::renews).collect();
                let place = self.take_record(sid, mark, asked, *record, ttl, &renewing);
                let user = self.sessions.places.at(place).and_then(|session| session.grant.sub()).map(str::to_owned);
                let said = self.judge_session(mark, user.as_deref(), self.steps.earliest_wall_of(asked, self.now));
                for Waiting { no, waiter, purpose } in waiting {
                    let said = said.clone().map_err(|refusal| refused_as(&purpose, &refusal));
                    let outcome = said.and_then(|()| self.granted_by(place, purpose));
                    self.judged_if_waited_for(no, waiter, outcome);
                }
                if let Some(user) = user {
                    self.reread_after_news(place, &user, asked);
                }
            }
            Verdict::Gone(refusal) => {
                for Waiting { no, waiter, purpose } in waiting {
                    self.judged_if_waited_for(no, waiter, Err(refused_as(&purpose, &refusal)));
                }
                if let Some(&place) = self.sessions.place_of.get(&mark) {
                    self.end_session(place);
                }
                if !later.is_empty() {
                    // They may have been signed in since.
                    self.put_question(sid, mark, later);
                }
            }
            Verdict::Unknown => {
                waiting.extend(later);
                if let Some(&place) = self.sessions.place_of.get(&mark) {
                    self.session_unread(place, asked.at);
                }
                for Waiting { no, waiter, purpose } in waiting {
                    self.judged_if_waited_for(no, waiter, Err(refused_as(&purpose, &unavailable())));
                }
            }
        }
    }

    /// Reads a session's record once more where something was said of its user's rights since it was asked for at `asked`: it
    /// may have been read before what the news is about, and who has come by it is not among those who were told.
    fn reread_after_news(&mut self, place: u32, user: &str, asked: Now) {
        let Some(said) = self.ledger.marks().rights_said_at(user, self.now.wall) else { return };
        // An event is dated to the millisecond.
        let after = said + Duration::from_millis(1);
        if self.steps.earliest_wall_of(asked, self.now) < after {
            let Some(due) = self.sessions.places.at(place).and_then(|session| session.due) else { return };
            let soon = self.now.at + after.since(self.now.wall).min(NEWS_REREAD_INTERVAL);
            self.sessions.set_due(place, Some(due.min(soon)));
        }
    }

    /// What a session that was just read grants to whoever asked.
    fn granted_by(&mut self, place: u32, purpose: Purpose) -> Result<Grant, Refusal> {
        let Some(session) = self.sessions.places.at(place) else { return Err(ended("the session has ended")) };
        match purpose {
            Purpose::Cookie | Purpose::Update => Ok(session.grant.clone()),
            Purpose::Ticket(sub) if sub.as_deref() == session.grant.sub() => Ok(session.grant.clone().by_ticket()),
            Purpose::Ephemeral(made) if made.maker.sub.as_deref() == session.grant.sub() => {
                let grant = session.grant.clone();
                Ok(self.limited(grant, &made))
            }
            Purpose::Ticket(_) | Purpose::Ephemeral(_) => Err(ended("the session is another user's now")),
        }
    }

    fn verdict(&self, asked: Now, record: Result<Option<SessionRecord>, ()>) -> Verdict {
        let Some(options) = &self.options.auth.session else {
            return Verdict::Gone(ended("this server knows no sessions"));
        };
        let SessionRecord { text, ttl } = match record {
            Ok(Some(record)) => record,
            Ok(None) => return Verdict::Gone(ended("there is no such session")),
            Err(()) => {
                self.metrics.session_read_failures.count();
                return Verdict::Unknown;
            }
        };
        self.metrics.session_reads.count();
        match Record::parse(text.expose_secret(), options, self.options.catalog.template_claims()) {
            Ok(record)
                if record
                    .ends(self.now.wall_of(asked.at), ttl, options.touch)
                    .is_some_and(|ends| ends <= self.now.wall) =>
            {
                Verdict::Gone(ended("the session has expired"))
            }
            Ok(record) => Verdict::Good(Box::new(record), ttl),
            Err(error) => Verdict::Gone(ended(error.to_string())),
        }
    }

    /// Takes in a record that was read: the session's place. Connections in `renewing` are told by whoever asked for them.
    fn take_record(
        &mut self,
        sid: Secret,
        mark: SessionMark,
        asked: Now,
        record: Record,
        ttl: Option<Duration>,
        renewing: &[u32],
    ) -> u32 {
        let touch = self.options.auth.session.as_ref().is_some_and(|options| options.touch);
        // A life is counted by the store's clock: ours may have been set since it was asked.
        let ends = record.ends(self.now.wall_of(asked.at), ttl, touch);
        // Who has logged out keeps no session alive by trying.
        if let Some(life) = record.touched_life(ttl).filter(|_| touch)
            && self.ledger.marks().judge_session(mark, self.now.wall).is_ok()
        {
            self.outputs.push_back(Output::Order(Order::Touch { sid: sid.clone(), life }));
        }
        let rights = self.rights.intern(record.rights);
        let known = self.sessions.place_of.get(&mark).copied();
        let same_user =
            known.and_then(|place| self.sessions.places.at(place)).map(|s| s.grant.sub() == Some(&*record.user));
        let place = match (known, same_user) {
            (Some(place), Some(true)) => {
                self.renew_session(place, ends, rights, renewing);
                place
            }
            (Some(place), _) => {
                // Whoever was signed in before is not any more.
                self.end_session(place);
                self.insert_session(sid, mark, &record.user, ends, rights)
            }
            (None, _) => self.insert_session(sid, mark, &record.user, ends, rights),
        };
        if let Some(session) = self.sessions.places.at_mut(place) {
            session.failing_since = None;
        }
        self.plan_reread(place);
        place
    }

    fn insert_session(
        &mut self,
        sid: Secret,
        mark: SessionMark,
        user: &str,
        ends: Option<WallTime>,
        rights: Rc<crate::auth::grant::Rights>,
    ) -> u32 {
        let sessions = &mut self.sessions;
        // Its number is known only when it has its place, and nobody asks for it before.
        let grant = Grant::of_session(user, ends, Rc::clone(&rights), SessionNo::at(0));
        let connections = Vec::new();
        let session = Session { sid, mark, grant, due: None, failing_since: None, rejudge: false, connections };
        let place = sessions.places.insert(session);
        if let Some(session) = sessions.places.at_mut(place) {
            session.grant = Grant::of_session(user, ends, rights, SessionNo::at(place));
        }
        sessions.place_of.insert(mark, place);
        // Until a connection hangs on it.
        sessions.unused.push(place);
        self.metrics.sessions.rise();
        place
    }

    /// When a session that was just read is read again.
    fn plan_reread(&mut self, place: u32) {
        let Some(options) = &self.options.auth.session else { return };
        // Spread, so that those who came together do not stay together.
        let tenth = u32::try_from(self.rng.below(1_000)).unwrap_or(0);
        let regular = self.now.at + (options.reread - options.reread / 10 * tenth / 1_000);
        let Some(session) = self.sessions.places.at(place) else { return };
        if session.due.is_some_and(|due| due <= self.now.at) {
            // Something has been heard since the question was put.
            return;
        }
        let left = session.grant.expires().map(|ends| ends.since(self.now.wall));
        let at = left
            .and_then(|left| last_look(left, options.touch))
            .map_or(regular, |look| regular.min(self.now.at + look));
        self.sessions.set_due(place, Some(at));
    }

    /// A session's record, which was asked for at `asked`, could not be read.
    fn session_unread(&mut self, place: u32, asked: Instant) {
        let Some(options) = &self.options.auth.session else { return };
        let (grace, retry) = (options.grace, options.reread.min(RETRY));
        let tenth = u32::try_from(self.rng.below(1_000)).unwrap_or(0);
        let retry = self.now.at + (retry - retry / 10 * tenth / 1_000);
        let since = self.sessions.away_since.map_or(asked, |away| away.min(asked));
        let Some(session) = self.sessions.places.at_mut(place) else { return };
        let since = *session.failing_since.get_or_insert(since);
        let rejudge = std::mem::take(&mut session.rejudge);
        let connections = if rejudge { session.connections.clone() } else { Vec::new() };
        self.sessions.set_due(place, Some(retry.min(since + grace)));
        for index in connections {
            self.rejudge_subscriptions(index);
        }
    }

    /// What a session's record says now holds for each of its connections.
    fn renew_session(
        &mut self,
        place: u32,
        ends: Option<WallTime>,
        rights: Rc<crate::auth::grant::Rights>,
        renewing: &[u32],
    ) {
        let Some(session) = self.sessions.places.at_mut(place) else { return };
        let ends = match (session.grant.expires(), ends) {
            (Some(before), Some(now)) if before.since(now).max(now.since(before)) < SAME_END => Some(before.min(now)),
            (_, ends) => ends,
        };
        let rejudge = std::mem::take(&mut session.rejudge);
        let renewed = session.grant.renewed(ends, Rc::clone(&rights), &mut self.rights);
        let before = std::mem::replace(&mut session.grant, renewed);
        let moved = before.expires() != ends;
        let changed = before.rights() != &rights;
        if moved || changed || rejudge {
            for index in session.connections.clone() {
                if !renewing.contains(&index) {
                    self.renew_connection(index, place, moved, changed, rejudge);
                }
            }
        }
        self.rights.release(before);
    }

    /// What the session that a grant hangs on gives now, where it hangs on one whose record has not gone.
    pub(super) fn renew_by_session(&mut self, grant: &mut Grant) {
        let session = grant.session().and_then(|session| self.sessions.places.at(session.place()));
        let Some(Session { grant: now, .. }) = session else { return };
        let renewed = grant.renewed(now.expires(), Rc::clone(now.rights()), &mut self.rights);
        self.rights.release(std::mem::replace(grant, renewed));
    }

    fn renew_connection(&mut self, index: u32, place: u32, moved: bool, changed: bool, rejudge: bool) {
        let Some(session) = self.sessions.places.at(place) else { return };
        let grant = session.grant.clone();
        match self.connections.at_mut(index).map(|connection| &mut connection.state) {
            Some(State::Open(open)) => {
                let renewed = open.grant.renewed(grant.expires(), Rc::clone(grant.rights()), &mut self.rights);
                let before = std::mem::replace(&mut open.grant, renewed);
                if moved {
                    self.plan_reauthenticate(index);
                }
                let (old, new) = (before.rights(), grant.rights());
                if old.permissions != new.permissions || old.roles != new.roles {
                    self.tell_rights(index, new);
                }
                self.rights.release(before);
                if changed || rejudge {
                    self.rejudge_subscriptions(index);
                }
            }
            Some(State::Http(http)) => {
                if let Phase::Waiting { grant: held, .. } = &mut http.phase {
                    let renewed = held.renewed(grant.expires(), Rc::clone(grant.rights()), &mut self.rights);
                    self.rights.release(std::mem::replace(held, renewed));
                    if changed {
                        self.rejudge_waiter(index);
                    }
                }
            }
            _ => {}
        }
        self.rights.release(grant);
        self.arm(index);
    }

    /// A session is over: so is each connection that hangs on it.
    fn end_session(&mut self, place: u32) {
        self.sessions.set_due(place, None);
        let Some(session) = self.sessions.places.at_mut(place) else { return };
        let (mark, connections) = (session.mark, session.connections.clone());
        if self.sessions.place_of.get(&mark) == Some(&place) {
            self.sessions.place_of.remove(&mark);
        }
        self.sessions.unused.push(place);
        for index in connections {
            // The application may have deleted it because of a logout that was heard before this was seen.
            let logged_out = self.is_logged_out(index);
            match self.connections.at(index).map(|connection| &connection.state) {
                Some(State::Http(_)) => {
                    if let Some(waiter) = self.key_of(index) {
                        let refusal = match logged_out {
                            true => super::control::refusal(Revoked::LoggedOut),
                            false => ended("the session has ended"),
                        };
                        self.refuse_waiter(waiter, refusal);
                    }
                }
                _ if logged_out => self.close(index, CloseReason::LoggedOut),
                _ => self.close(index, CloseReason::SessionExpired),
            }
        }
    }

    /// A connection hangs on its grant's session, where that has one.
    pub(super) fn join_session(&mut self, session: Option<SessionNo>, index: u32) {
        let session = session.and_then(|session| self.sessions.places.at_mut(session.place()));
        if let Some(session) = session
            && !session.connections.contains(&index)
        {
            session.connections.push(index);
        }
    }

    /// It does no more.
    pub(super) fn leave_session(&mut self, session: Option<SessionNo>, index: u32) {
        let Some(place) = session.map(SessionNo::place) else { return };
        let Some(session) = self.sessions.places.at_mut(place) else { return };
        if let Some(at) = session.connections.iter().position(|connection| *connection == index) {
            session.connections.swap_remove(at);
        }
        if session.connections.is_empty() {
            self.sessions.unused.push(place);
        }
    }

    /// Lets go of sessions without a connection. Within one input places stay what they are, so this comes at its end.
    pub(super) fn drop_unused_sessions(&mut self) {
        while let Some(place) = self.sessions.unused.pop() {
            let used = |session: &Session| !session.connections.is_empty();
            if self.sessions.places.at(place).is_none_or(used) {
                continue;
            }
            self.sessions.set_due(place, None);
            if let Some(session) = self.sessions.places.remove(place) {
                if self.sessions.place_of.get(&session.mark) == Some(&place) {
                    self.sessions.place_of.remove(&session.mark);
                }
                self.rights.release(session.grant);
                self.metrics.sessions.fall();
            }
        }
    }

    /// Looks after the sessions that are due, in a bounded turn: what is left is due at once.
    pub(super) fn sessions_due(&mut self) {
        let now = self.now.at;
        if self.sessions.next_timeout().is_none_or(|at| at > now) {
            return;
        }
        let grace = self.options.auth.session.as_ref().map_or(Duration::ZERO, |options| options.grace);
        let mut sids = Vec::new();
        let mut asked = Vec::new();
        let about_now = self.sessions.due.range(..=(now + TICK, u32::MAX));
        let about_now: Vec<(Instant, u32)> = about_now.take(SESSIONS_PER_TURN).copied().collect();
        for (at, place) in about_now {
            let Some(session) = self.sessions.places.at(place) else {
                self.sessions.set_due(place, None);
                continue;
            };
            let graced = session.failing_since.map(|since| since + grace);
            if graced.is_some_and(|end| end <= now) {
                self.end_session(place);
                continue;
            }
            // Its end is all that it is due for.
            if at > now && graced == Some(at) {
                continue;
            }
            // The answer says when next. That one always comes is the store's word; the timeout is for where it does not keep
            // it. The end of the grace waits for no answer.
            let next = now + LOOKUP_TIMEOUT;
            let (sid, mark) = (session.sid.clone(), session.mark);
            self.sessions.set_due(place, Some(graced.map_or(next, |end| end.min(next))));
            sids.push(sid);
            asked.push((place, mark));
            if asked.len() == SESSIONS_PER_LOOKUP {
                self.reread(std::mem::take(&mut sids), std::mem::take(&mut asked));
            }
        }
        if !asked.is_empty() {
            self.reread(sids, asked);
        }
    }

    fn reread(&mut self, sids: Vec<Secret>, sessions: Vec<(u32, SessionMark)>) {
        if self.may_look_up().is_err() {
            for (place, _) in sessions {
                self.session_unread(place, self.now.at);
            }
            return;
        }
        self.look_up_surely(Lookup::Sessions(sids), Asked::Reread(Reread { asked: self.now, sessions }));
    }

    /// The records of sessions that were looked at again.
    pub(super) fn sessions_reread(&mut self, reread: Reread, found: Found) {
        let Reread { asked, sessions } = reread;
        let mut records = match found {
            Found::Sessions(records) if records.len() == sessions.len() => Some(records.into_iter()),
            _ => None,
        };
        for (place, mark) in sessions {
            let record = records.as_mut().map_or(Err(()), |records| Ok(records.next().flatten()));
            // Its place may be another's by now.
            let Some(session) = self.sessions.places.at(place).filter(|session| session.mark == mark) else { continue };
            let sid = session.sid.clone();
            if self.sessions.place_of.get(&mark) != Some(&place) {
                continue;
            }
            match self.verdict(asked, record) {
                Verdict::Good(record, ttl) => {
                    self.take_record(sid, mark, asked, *record, ttl, &[]);
                }
                Verdict::Gone(_) => self.end_session(place),
                Verdict::Unknown => self.session_unread(place, asked.at),
            }
        }
    }

    /// The store has gone away, or is there again.
    pub(super) fn store_state(&mut self, up: bool) {
        let now = self.now.at;
        let grace = self.options.auth.session.as_ref().map_or(Duration::ZERO, |options| options.grace);
        if up {
            self.sessions.away_since = None;
            return self.reread_all();
        }
        let since = *self.sessions.away_since.get_or_insert(now);
        for place in self.sessions.all() {
            let Some(session) = self.sessions.places.at_mut(place) else { continue };
            let ends = *session.failing_since.get_or_insert(since) + grace;
            if let Some(due) = session.due {
                self.sessions.set_due(place, Some(due.min(ends)));
            }
        }
    }

    /// Each session is read again, as soon as turns allow.
    pub(super) fn reread_all(&mut self) {
        for place in self.sessions.all() {
            self.reread_soon(place);
        }
    }

    /// That session is read again at once.
    pub(super) fn reread_session(&mut self, mark: SessionMark) {
        if let Some(&place) = self.sessions.place_of.get(&mark) {
            self.reread_soon(place);
        }
    }

    fn reread_soon(&mut self, place: u32) {
        // One that is being asked for now may have been answered before what has happened: it is asked for once more. One
        // that has ended has no place by its mark, and is asked for never.
        let Some(mark) = self.sessions.places.at(place).map(|session| session.mark) else { return };
        if self.sessions.place_of.get(&mark) == Some(&place) {
            self.sessions.set_due(place, Some(self.now.at));
        }
    }

    /// The configuration was read again: records are read by it, and then connections are judged by what they say.
    pub(super) fn sessions_reloaded(&mut self) {
        let known = self.options.auth.session.is_some();
        for place in self.sessions.all() {
            if known {
                if let Some(session) = self.sessions.places.at_mut(place) {
                    session.rejudge = true;
                }
                self.reread_soon(place);
            } else {
                self.end_session(place);
            }
        }
    }

    /// Whether a connection under that grant is judged by the new configuration when its session has been read by it.
    pub(super) fn is_rejudged_later(&self, grant: &Grant) -> bool {
        let session = grant.session().and_then(|session| self.sessions.places.at(session.place()));
        session.is_some_and(|session| session.rejudge)
    }

    /// The mark of the session that a grant hangs on.
    pub(super) fn session_mark(&self, grant: &Grant) -> Option<SessionMark> {
        self.sessions.places.at(grant.session()?.place()).map(|session| session.mark)
    }

    /// The id of the session that a grant hangs on.
    pub(super) fn session_id(&self, grant: &Grant) -> Option<Secret> {
        self.sessions.places.at(grant.session()?.place()).map(|session| session.sid.clone())
    }

    /// A request is told only what it still waits for: the answer may be to an earlier one of the same connection.
    fn judged_if_waited_for(&mut self, no: u64, waiter: Waiter, outcome: Result<Grant, Refusal>) {
        if self.is_waited_for(no, &waiter) {
            self.judged(waiter, outcome);
        }
    }

    /// Whether a waiter still waits under that number, as far as it can be told.
    pub(super) fn is_waited_for(&mut self, no: u64, waiter: &Waiter) -> bool {
        let Waiter::Request(ConnectionKey { index, .. }) = *waiter else { return true };
        matches!(self.http_mut(index).map(|http| &http.phase), Some(Phase::Looking { ask, .. }) if *ask == no)
    }
}

/// When a record is looked at before an end that is known: what was extended late is seen too, by ever shorter steps; what is
/// touched is not left until the last moment. `None`: it ends too soon for that.
fn last_look(left: Duration, touch: bool) -> Option<Duration> {
    if left < LAST_LEFT {
        None
    } else if left > LAST_LOOK * 2 && !touch {
        Some(left - LAST_LOOK)
    } else {
        Some(left / 2)
    }
}

/// A refusal as it is told: nothing was presented by one that asked for its session to be read, so nothing was wrong with it.
fn refused_as(purpose: &Purpose, refusal: &Refusal) -> Refusal {
    match purpose {
        Purpose::Update => Refusal { code: ErrorCode::AuthUpdateRejected, ..refusal.clone() },
        Purpose::Cookie | Purpose::Ticket(_) | Purpose::Ephemeral(_) => refusal.clone(),
    }
}

/// What a connection's credential was when it ends by its time.
pub(super) fn expiry_of(grant: &Grant) -> CloseReason {
    match grant.kind() {
        _ if grant.only().is_some_and(|only| grant.expires() == Some(only.ends)) => CloseReason::StreamEnded,
        CredentialKind::Session | CredentialKind::Ticket if grant.session().is_some() => CloseReason::SessionExpired,
        _ if grant.api_key().is_some() => CloseReason::ApiKeyExpired,
        _ => CloseReason::TokenExpired,
    }
}
