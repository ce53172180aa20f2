//! Logouts, revocations and changed permissions, carried out on what is live: the connections they concern are found,
//! ended or told of their rights.
//!
//! Source: protocol version 1, sections 5 («Logout and permission events») and 6 («Control»).
//! Memory: who is concerned, at most [`limits::CONCERNED_MAX`] of them, until the connections have been looked through;
//! nothing for a connection. Errors: none. Not here: what an event says (`auth::control`), what it leaves behind
//! (`auth::marks`), where it was heard (`runtime`).
//!
//! A mark stands before its event comes here, so that whoever opens meanwhile is judged by it. What is done to a connection
//! is read off the marks; the event only says at whom to look. So the same event twice, or an old one, does no harm.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::auth::grant::{CredentialKind, Grant, Rights, TokenMark};
use crate::auth::marks::{Concerned, Revoked};
use crate::auth::session::SessionMark;
use crate::codec::message::{self, CloseReason, ErrorCode};
use crate::connection::handshake::Refusal;
use crate::connection::{Phase, State};
use crate::frame::Transport;
use crate::ids::ConnectionId;
use crate::limits;
use crate::secret::Secret;
use crate::time::{Instant, Now, WallTime};

use super::{Notice, Output, Shard};

/// Connections looked at in one turn: a look costs a hash of the subject.
const LOOKS_PER_TURN: u32 = 4096;
/// Connections of these that are ended or told something in one turn.
const ACTS_PER_TURN: u32 = 512;
/// Least time from one pass over very many connections to the next: what is heard within it is carried out together, so
/// that a storm of logouts leaves time for deliveries.
const PASS_INTERVAL: Duration = Duration::from_millis(25);

/// Which connections of a core are to be told of.
#[derive(Clone, Debug)]
pub struct ConnectionQuery {
    /// Of this user alone.
    pub sub: Option<String>,
    /// From this place on.
    pub first: u32,
    /// So many.
    pub limit: usize,
}

/// What a core tells of its connections in one turn.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Those that were found, in the order of their places.
    pub connections: Vec<ListedConnection>,
    /// Where to go on, unless all places have been looked at.
    pub next: Option<u32>,
}

/// A live connection, as an administrator sees it.
#[derive(Clone, Debug)]
pub struct ListedConnection {
    /// Its name.
    pub id: ConnectionId,
    /// Whose it is.
    pub sub: Option<String>,
    /// Who issued its credential.
    pub issuer: Option<String>,
    /// What its credential is.
    pub kind: &'static str,
    /// `ws` or `sse`.
    pub transport: &'static str,
    /// What it watches, the first [`limits::LISTED_STREAMS_MAX`] of it.
    pub streams: Vec<Arc<str>>,
    /// How many streams it watches.
    pub subscriptions: usize,
    /// When it was opened.
    pub since: WallTime,
    /// When its credential ends.
    pub expires_at: Option<WallTime>,
}

/// What is to be told to a user's connections.
#[derive(Debug, Default)]
struct Told {
    /// Their rights, even where they stay the same, whoever issued the token.
    everyone: bool,
    /// The same, for tokens of these issuers.
    issuers: Vec<Box<str>>,
}

/// At whom to look.
#[derive(Debug, Default)]
struct Group {
    users: HashMap<Box<str>, Told>,
    sessions: HashSet<SessionMark>,
    tokens: HashSet<TokenMark>,
    /// Entries in all of them.
    count: usize,
    /// More than are kept apart: all are looked at.
    everyone: bool,
}

impl Group {
    fn is_empty(&self) -> bool {
        self.count == 0 && !self.everyone
    }

    fn add(&mut self, concerned: &Concerned) {
        if self.count >= limits::CONCERNED_MAX {
            self.everyone = true;
            return;
        }
        self.count += 1;
        match concerned {
            Concerned::User { sub, news, issuer } => {
                let told = self.users.entry(sub.clone()).or_default();
                match issuer {
                    _ if !news => {}
                    None => told.everyone = true,
                    Some(issuer) if told.issuers.contains(issuer) => {}
                    Some(issuer) => told.issuers.push(issuer.clone()),
                }
            }
            Concerned::Session(session) => {
                self.sessions.insert(*session);
            }
            Concerned::Token(token) => {
                self.tokens.insert(*token);
            }
            Concerned::Everyone => self.everyone = true,
        }
    }

    /// Whether a connection under `grant` is to be looked at.
    fn concerns(&self, grant: &Grant, session: Option<SessionMark>) -> bool {
        self.everyone
            || grant.sub().is_some_and(|sub| self.users.contains_key(sub))
            || grant.token().is_some_and(|token| self.tokens.contains(&token))
            || session.is_some_and(|session| self.sessions.contains(&session))
    }

    /// Whether it is to be told of its rights even where they stay the same.
    fn has_news_for(&self, grant: &Grant) -> bool {
        let Some(told) = grant.sub().and_then(|sub| self.users.get(sub)) else { return false };
        told.everyone || grant.issuer().is_some_and(|issuer| told.issuers.iter().any(|one| **one == *issuer))
    }
}

/// Where a core is with what it was told.
#[derive(Debug, Default)]
pub(super) struct Passes {
    /// Who waits for a pass to begin.
    waiting: Group,
    /// Who is looked for now.
    under_way: Group,
    /// The next connection to be looked at.
    next: Option<u32>,
    begun_at: Option<Instant>,
}

impl Passes {
    /// Whether connections are being looked through: until that is over nothing is sent.
    pub(super) fn is_under_way(&self) -> bool {
        self.next.is_some()
    }
}

impl Shard {
    /// Marks were set: those whom they concern are to be looked for.
    pub(super) fn control(&mut self, concerned: &[Concerned]) {
        concerned.iter().for_each(|one| self.passes.waiting.add(one));
    }

    /// When a pass may begin, or go on.
    pub(super) fn pass_due(&self) -> Option<Instant> {
        if self.passes.is_under_way() {
            return Some(self.now.at);
        }
        if self.passes.waiting.is_empty() {
            return None;
        }
        // Few are looked through within a turn, at any time.
        let many = self.connections.places() > LOOKS_PER_TURN;
        let held_back = self.passes.begun_at.filter(|_| many).map(|begun| begun + PASS_INTERVAL);
        Some(held_back.map_or(self.now.at, |until| until.max(self.now.at)))
    }

    /// One turn of looking through the connections for those that are concerned. It comes before all else that could end
    /// them, for a logout is the most important cause.
    pub(super) fn control_turn(&mut self) {
        if self.pass_due().is_none_or(|due| due > self.now.at) {
            return;
        }
        let first = match self.passes.next {
            Some(next) => next,
            None => {
                self.passes.under_way = std::mem::take(&mut self.passes.waiting);
                self.passes.begun_at = Some(self.now.at);
                0
            }
        };
        let group = std::mem::take(&mut self.passes.under_way);
        let end = first.saturating_add(LOOKS_PER_TURN).min(self.connections.places());
        let (mut index, mut acts) = (first, 0);
        while index < end && acts < ACTS_PER_TURN {
            if self.is_concerned(index, &group) {
                self.judge_live(index, &group);
                acts += 1;
            }
            index += 1;
        }
        if index < self.connections.places() {
            self.passes.next = Some(index);
            self.passes.under_way = group;
        } else {
            self.passes.next = None;
        }
    }

    /// The open connections that `query` is about, in the order of their places: as many as a turn finds.
    pub fn list(&self, query: &ConnectionQuery) -> Listed {
        let places = self.connections.places();
        let end = query.first.saturating_add(limits::LIST_LOOKS_PER_TURN).min(places);
        let open = (query.first..end)
            .filter_map(|index| Some((index, self.connections.at(index)?.open()?)))
            .filter(|(_, open)| query.sub.is_none() || open.grant.sub() == query.sub.as_deref());
        let connections: Vec<ListedConnection> = open
            .take(query.limit)
            .map(|(index, open)| {
                let topics = open.subscriptions.iter().filter_map(|(_, slot)| self.topics.at(slot.topic));
                ListedConnection {
                    id: self.name_of(index, u128::from_ne_bytes(open.random)),
                    sub: open.grant.sub().map(str::to_owned),
                    issuer: open.grant.issuer().map(str::to_owned),
                    kind: open.grant.kind().as_str(),
                    transport: if open.transport == Transport::Sse { "sse" } else { "ws" },
                    streams: topics.map(|topic| Arc::clone(&topic.key.name)).take(limits::LISTED_STREAMS_MAX).collect(),
                    subscriptions: open.subscriptions.len(),
                    since: self.now.wall_of(open.since),
                    expires_at: open.grant.expires(),
                }
            })
            .collect();
        let stopped = match connections.last() {
            Some(last) if connections.len() >= query.limit => last.id.index + 1,
            _ => end,
        };
        Listed { connections, next: (stopped < places).then_some(stopped) }
    }

    fn is_concerned(&self, index: u32, group: &Group) -> bool {
        let grant = match self.connections.at(index).map(|connection| &connection.state) {
            Some(State::Open(open)) => &open.grant,
            Some(State::Http(http)) => match &http.phase {
                Phase::Waiting { grant, .. } => grant,
                _ => return false,
            },
            _ => return false,
        };
        group.concerns(grant, self.session_mark(grant))
    }

    /// Brings an open connection's grant up to date with all that has been said, before what it asks is judged by it: a mark
    /// stands before the pass that carries it out has come to the connection, and API keys change in turns too. Whether it is
    /// still open.
    pub(super) fn judge_now(&mut self, index: u32) -> bool {
        if !self.rekeyed.is_empty()
            && let Some(connection) = self.key_of(index)
        {
            self.judge_by_api_keys(connection);
        }
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return false };
        if self.ledger.marks().is_empty() {
            return true;
        }
        if let Err(revoked) = self.judge_marks(&open.grant, Some(open.identified)) {
            self.close(index, close_reason(revoked));
            return false;
        }
        // Whom there is news for is told by the pass, of a change already now: the right comes before what it is used for.
        let new = self.ledger.marks().rights_of(&open.grant, self.now.wall);
        if !new.is_none() {
            self.give_rights(index, new.permissions.as_deref(), new.roles.as_deref(), false);
        }
        self.connections.at(index).is_some_and(|connection| connection.open().is_some())
    }

    /// The same for one who waits for a value and is about to get it. Whether it still waits.
    pub(super) fn judge_waiter_now(&mut self, index: u32) -> bool {
        let waiting = |shard: &Shard| match shard.connections.at(index).map(|connection| &connection.state) {
            Some(State::Http(http)) => matches!(http.phase, Phase::Waiting { .. }),
            _ => false,
        };
        if !waiting(self) {
            return false;
        }
        if self.ledger.marks().is_empty() {
            return true;
        }
        let Some(State::Http(http)) = self.connections.at(index).map(|connection| &connection.state) else {
            return false;
        };
        let Phase::Waiting { grant, since, .. } = &http.phase else { return false };
        match self.judge_marks(grant, Some(*since)) {
            Err(revoked) => self.refuse_waiting(index, refusal(revoked)),
            Ok(()) => self.give_rights_to_waiting(index),
        }
        waiting(self)
    }

    /// Judges a live connection by the marks as they are now.
    fn judge_live(&mut self, index: u32, group: &Group) {
        let now = self.now.wall;
        match self.connections.at(index).map(|connection| &connection.state) {
            Some(State::Open(open)) => {
                if let Err(revoked) = self.judge_marks(&open.grant, Some(open.identified)) {
                    return self.close(index, close_reason(revoked));
                }
                if let Some(session) = self.session_mark(&open.grant) {
                    // Its record says what it may do, and may have been changed along with what was heard.
                    return self.reread_session(session);
                }
                let news = group.has_news_for(&open.grant);
                let new = self.ledger.marks().rights_of(&open.grant, now);
                self.give_rights(index, new.permissions.as_deref(), new.roles.as_deref(), news && !new.is_none());
            }
            Some(State::Http(http)) => {
                let Phase::Waiting { grant, since, .. } = &http.phase else { return };
                let session = self.session_mark(grant);
                match (self.judge_marks(grant, Some(*since)), session) {
                    (Err(revoked), _) => self.refuse_waiting(index, refusal(revoked)),
                    (Ok(()), Some(session)) => self.reread_session(session),
                    (Ok(()), None) => self.give_rights_to_waiting(index),
                }
            }
            _ => {}
        }
    }

    /// Whether a credential may go on by what was said of its user, its session or itself. `since`: since when
    /// its connection is its user's, where it is open; a session that comes later than its user's logout is judged by its record alone.
    fn judge_marks(&self, grant: &Grant, since: Option<Now>) -> Result<(), Revoked> {
        let (marks, now) = (self.ledger.marks(), self.now.wall);
        if marks.is_empty() {
            return Ok(());
        }
        if grant.is_of_token() {
            return marks.judge(grant, now);
        }
        // A user whose id is spelled like an API key's is not that key, nor one who came by a ticket of it.
        if !matches!(grant.kind(), CredentialKind::Session | CredentialKind::Ticket) || grant.api_key().is_some() {
            return Ok(());
        }
        if let Some(session) = self.session_mark(grant) {
            marks.judge_session(session, now)?;
        }
        let logged_out = grant.sub().and_then(|sub| marks.logged_out_at(grant.issuer(), sub, now));
        match (logged_out, since.map(|since| self.clock_steps.earliest_wall_of(self.now, since))) {
            // An event is dated to the millisecond.
            (Some(at), Some(since)) if since < at + Duration::from_millis(1) => Err(Revoked::LoggedOut),
            _ => Ok(()),
        }
    }

    /// Whether somebody who was judged at `since` may still do what was asked then.
    ///
    /// # Errors
    /// 401.
    pub(super) fn still_good(&self, grant: &Grant, since: Now) -> Result<(), Refusal> {
        if grant.end(self.options.auth.jwt.leeway).is_some_and(|end| end <= self.now.wall) {
            return Err(Refusal::new(ErrorCode::TokenExpired, "the credential has expired"));
        }
        self.judge_marks(grant, Some(since)).map_err(refusal)
    }

    /// Puts other permissions and roles in the place of a connection's, where they are given: it is told of them, then its
    /// subscriptions are judged by them. `tell`: it is told even where they are what it has.
    pub(super) fn give_rights(
        &mut self,
        index: u32,
        permissions: Option<&[Box<str>]>,
        roles: Option<&[Box<str>]>,
        tell: bool,
    ) {
        let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) else { return };
        let changed = open.grant.replace_rights(&mut self.rights, permissions, roles);
        if !changed && !tell {
            return;
        }
        let rights = Rc::clone(open.grant.rights());
        self.tell_rights(index, &rights);
        if changed {
            self.rejudge_subscriptions(index);
        }
    }

    /// Tells a connection of its rights.
    pub(super) fn tell_rights(&mut self, index: u32, rights: &Rights) {
        self.metrics.permission_updates.count();
        let (permissions, roles) = (rights.permissions.iter(), rights.roles.iter());
        self.tell(index, "permission_update", |out| {
            message::write_permission_update(out, permissions.map(|text| &**text), roles.map(|text| &**text));
        });
    }

    /// One who waits for a value may have other rights now.
    fn give_rights_to_waiting(&mut self, index: u32) {
        let now = self.now.wall;
        let Some(State::Http(http)) = self.connections.at_mut(index).map(|connection| &mut connection.state) else {
            return;
        };
        let Phase::Waiting { grant, .. } = &mut http.phase else { return };
        let new = self.ledger.marks().rights_of(grant, now);
        if grant.replace_rights(&mut self.rights, new.permissions.as_deref(), new.roles.as_deref()) {
            self.rejudge_waiter(index);
        }
    }

    /// Whoever waits for a value under rights that have changed: whether they still reach it.
    pub(super) fn rejudge_waiter(&mut self, index: u32) {
        let Some(State::Http(http)) = self.connections.at(index).map(|connection| &connection.state) else { return };
        let Phase::Waiting { grant, topic, .. } = &http.phase else { return };
        let Some(key) = self.topics.at(*topic).map(|topic| Arc::clone(&topic.key)) else { return };
        let refusal = match self.resolve_again(grant, &key) {
            Ok(same) if *same == *key => return,
            Ok(_) => {
                let detail = "what the caller may see has changed: ask again";
                Refusal::new(ErrorCode::StreamUnavailable, detail).retry_after(1)
            }
            Err(refusal) => refusal,
        };
        self.refuse_waiting(index, refusal);
    }

    fn refuse_waiting(&mut self, index: u32, refusal: Refusal) {
        if let Some(waiter) = self.key_of(index) {
            self.refuse_waiter(waiter, refusal);
        }
    }

    /// The grant of a verified token, with the rights that were given to its user since, or why it is good no longer.
    ///
    /// # Errors
    /// 401 `LOGGED_OUT`, `TOKEN_REVOKED`.
    pub(super) fn judge_token(&mut self, mut grant: Grant) -> Result<Grant, Refusal> {
        let (marks, now) = (self.ledger.marks(), self.now.wall);
        if let Err(revoked) = self.judge_marks(&grant, None) {
            self.rights.release(grant);
            return Err(refusal(revoked));
        }
        let new = marks.rights_of(&grant, now);
        grant.replace_rights(&mut self.rights, new.permissions.as_deref(), new.roles.as_deref());
        Ok(grant)
    }

    /// The grant of a token: remembered, or by verifying it.
    pub(super) fn verify_token(&mut self, token: &Secret) -> Result<Grant, Refusal> {
        let (now, token) = (self.now.wall, token.expose_secret());
        let (place, leeway) = (self.tokens.place(token), self.options.auth.jwt.leeway);
        if let Some(grant) = place.and_then(|place| self.tokens.find_at(place, now, leeway)) {
            self.metrics.token_cache_hits.count();
            return self.judge_token(grant);
        }
        let verified = self.verifier.verify(token, now).map_err(|error| {
            let code = if error.is_expired() { ErrorCode::TokenExpired } else { ErrorCode::InvalidToken };
            Refusal::new(code, error.to_string()).because(error.reason())
        })?;
        self.metrics.token_verifications.count();
        let grant = verified.into_grant(&mut self.rights, self.options.catalog.template_claims());
        if let Some(place) = place {
            self.tokens.keep_at(place, &grant, now, &mut self.rights);
        }
        if self.ledger.marks().warns_of(&grant, now) {
            self.outputs.push_back(Output::Notice(Notice::LongToken));
        }
        self.judge_token(grant)
    }

    /// Whether what a session's record said when it was asked for at `asked` still counts: nothing was said since.
    ///
    /// # Errors
    /// 401 `LOGGED_OUT`.
    pub(super) fn judge_session(&self, mark: SessionMark, user: Option<&str>, asked: WallTime) -> Result<(), Refusal> {
        let (marks, now) = (self.ledger.marks(), self.now.wall);
        marks.judge_session(mark, now).map_err(refusal)?;
        // An event is dated to the millisecond.
        let logged_out = user.and_then(|user| marks.logged_out_at(None, user, now));
        match logged_out {
            Some(at) if asked < at + Duration::from_millis(1) => Err(refusal(Revoked::LoggedOut)),
            _ => Ok(()),
        }
    }

    /// Forgets what tokens were verified: keys, or what is read of a token, have changed.
    pub(super) fn forget_tokens(&mut self) {
        self.tokens.clear(self.options.auth.token_cache, &mut self.rights);
    }
}

fn close_reason(revoked: Revoked) -> CloseReason {
    match revoked {
        Revoked::LoggedOut => CloseReason::LoggedOut,
        Revoked::Token => CloseReason::TokenRevoked,
    }
}

/// The refusal of a credential that was good once.
pub(super) fn refusal(revoked: Revoked) -> Refusal {
    match revoked {
        Revoked::LoggedOut => {
            Refusal::new(ErrorCode::LoggedOut, "the user has logged out since: sign in again").because("logged_out")
        }
        Revoked::Token => Refusal::new(ErrorCode::TokenRevoked, "the token was revoked").because("token_revoked"),
    }
}
