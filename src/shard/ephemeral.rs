//! Ephemeral sessions: made by whoever may describe a stream, opened by a token that is good for that stream alone.
//!
//! Source: protocol version 1, sections 1, 2 and 6. A session ends at its time, `direct.linger` after its last watcher has
//! left, when it is deleted, and no later than what its maker's credential hangs on: a logout, a revocation, an API key or a
//! session that is gone refuse its token and close its connections. Its token may be presented as long as it lives.
//! Memory: the table of the process (`ephemeral_table`); here the places of the connections that live by a session.
//! Errors: [`Refusal`]. Not here: which targets may be named (`direct`), what a token looks like (`auth::ephemeral`).

use std::time::Duration;

use crate::auth::ephemeral::TokenHash;
use crate::auth::grant::{Grant, Only};
use crate::auth::session::SessionMark;
use crate::codec::http::{Head, Response};
use crate::codec::message::{CloseReason, ErrorCode};
use crate::connection::handshake::{Page, Refusal, SeenAs};
use crate::connection::{Caller, Phase, Reply, State};
use crate::ids::{CoreId, EphemeralId};
use crate::secret::Secret;
use crate::stream::poll::{Status, StreamState};

use super::ephemeral_table::{Due, Ephemeral, Made, Over};
use super::lookup::{Looked, Purpose, Waiter};
use super::requests::Judged;
use super::subscribe::write_status;
use super::{Mail, Shard, Timer};

fn unknown() -> Refusal {
    Refusal::new(ErrorCode::InvalidToken, "there is no such session, or it has ended").because("unknown_session")
}

fn refused(over: Over) -> Refusal {
    match over {
        Over::Process => {
            let detail = "the server holds as many sessions as it may";
            Refusal::new(ErrorCode::TooManyStreams, detail).with_status(503).retry_after(10)
        }
        Over::Subject => {
            let detail = "the subject has as many sessions as it may";
            Refusal::new(ErrorCode::TooManyStreams, detail).with_status(429).retry_after(10)
        }
    }
}

impl Shard {
    /// `POST /v1/sessions`: its body is whole.
    pub(super) fn session_body_read(
        &mut self,
        index: u32,
        body: &[u8],
        caller: Caller,
        seen_as: &SeenAs,
        reply: &Reply,
    ) {
        let said = self.described_in(body, &caller);
        let grant = self.take_caller(index, caller);
        let made = said.and_then(|said| {
            let key = self.described(&grant, &said.request)?;
            let key = self.selected(key, said.select.as_deref(), ErrorCode::BadRequest)?;
            if said.dedupe_key.is_some() && grant.sub().is_none() {
                let detail = "dedupe_key needs a credential with a subject";
                return Err(Refusal::new(ErrorCode::BadRequest, detail));
            }
            let ttl_max = self.may_describe(&grant)?.session_ttl_max;
            let ttl = said.ttl_s.map_or(ttl_max, |seconds| Duration::from_secs(seconds).min(ttl_max));
            // Those without a subject count together.
            let holder = self.subject(&grant).unwrap_or_else(|| self.ledger.holder("no subject", grant.issuer()));
            let new = Ephemeral {
                id: EphemeralId(self.rng.u128()),
                key,
                maker: grant.to_record(self.session_id(&grant)),
                holder,
                dedupe_key: said.dedupe_key.map(String::into_boxed_str),
                made: self.now.wall,
                ends: self.now.at + ttl,
                ends_at: self.now.wall + ttl,
            };
            self.make_session(new)
        });
        self.rights.release(grant);
        match made {
            Ok((session, created)) => {
                let token = self.ledger.direct_key().token(session.id);
                let mut text = self.session_text(&session, seen_as);
                // A token's characters stand for themselves in JSON.
                let token = String::from_utf8_lossy(token.expose_secret());
                text.push_str(&format!(",\"token\":\"{token}\",\"created\":{created}}}\n"));
                let location = format!("/v1/sessions/{}", session.id);
                let response = Response::new(if created { 201 } else { 200 }).header("Cache-Control", "no-store");
                let response = response.header("Location", &location).body("application/json", text.into_bytes());
                self.respond(index, response, reply);
            }
            Err(refusal) => self.refuse(index, &refusal, reply),
        }
    }

    /// Makes a session, unless its maker has it already; whether it is new.
    fn make_session(&mut self, new: Ephemeral) -> Result<(Ephemeral, bool), Refusal> {
        // What its maker made before a logout is not what is asked for now, and counts no more.
        for old in self.ledger.ephemerals().of(new.holder) {
            if self.ledger.ephemerals().is_over(old.id, self.now, self.direct_linger())
                || self.maker_gone(&old).is_some()
            {
                self.end_session_of(old.id);
            }
        }
        let token = self.ledger.direct_key().token(new.id);
        let hash = TokenHash::of(token.expose_secret()).expect("a token of ours is one");
        let per_subject = self.options.catalog.direct().map_or(0, |direct| direct.sessions_per_subject);
        match self.ledger.ephemerals().make(&new, hash, self.options.limits.streams, per_subject) {
            Ok(Made::New) => {
                self.set_timer(new.ends, Timer::Ephemeral { id: new.id });
                Ok((new, true))
            }
            Ok(Made::Same(old)) => Ok((*old, false)),
            Err(over) => Err(refused(over)),
        }
    }

    fn direct_linger(&self) -> Duration {
        self.options.catalog.direct().map_or(Duration::ZERO, |direct| direct.linger)
    }

    /// All but the end of the object that tells of a session. Its texts need no escapes but the authority, which is checked.
    fn session_text(&self, session: &Ephemeral, seen_as: &SeenAs) -> String {
        let (scheme, authority) = match &self.options.connection.public_origin {
            Some(origin) => origin.split_once("://").unwrap_or(("https", origin)),
            None => (&*seen_as.scheme, &*seen_as.authority),
        };
        let authority: String =
            authority.chars().filter(|c| c.is_ascii_alphanumeric() || ".-_~:[]%!$&'()*+,;=".contains(*c)).collect();
        let (http, ws) = if scheme.eq_ignore_ascii_case("https") { ("https", "wss") } else { ("http", "ws") };
        let (id, name, ends) = (session.id, &session.key.name, session.ends_at.as_micros());
        let path = format!("{authority}/v1/streams/{name}");
        format!(
            "{{\"id\":\"{id}\",\"stream\":\"{name}\",\"ws_url\":\"{ws}://{path}\",\"sse_url\":\"{http}://{path}\",\"expires_at\":{ends}"
        )
    }

    /// `GET /v1/sessions/{id}` and `DELETE`, by whoever has made it.
    #[expect(clippy::too_many_arguments, reason = "a request's parts, each borrowed from elsewhere")]
    pub(super) fn session_asked(
        &mut self,
        index: u32,
        head: &Head<'_>,
        page: &Page,
        addr: std::net::IpAddr,
        seen_as: &SeenAs,
        id: Option<EphemeralId>,
        end: bool,
        reply: &Reply,
    ) {
        let grant = match self.judge(index, head, page, addr, None, false) {
            Ok(Judged::Granted(grant)) => grant,
            Ok(Judged::FirstMessage | Judged::Later) => return,
            Err(refusal) => return self.refuse_credential(index, &refusal, reply, addr),
        };
        // A session's own token opens its stream, and does nothing else.
        let record = grant.only().is_none().then(|| grant.to_record(None));
        self.rights.release(grant);
        let found = id.and_then(|id| self.ledger.ephemerals().find(id));
        let mine = found.filter(|session| record.is_some_and(|record| session.is_of(&record)));
        let Some(session) = mine else {
            let refusal = Refusal::new(ErrorCode::NotFound, "there is no such session of yours, or it has ended");
            return self.refuse(index, &refusal, reply);
        };
        let response = if end {
            self.end_session_of(session.id);
            Response::new(204).header("Cache-Control", "no-store")
        } else {
            let text = self.session_text(&session, seen_as) + "}\n";
            Response::new(200).header("Cache-Control", "no-store").body("application/json", text.into_bytes())
        };
        self.respond(index, response, reply);
    }

    /// The token of a session is presented.
    pub(super) fn look_at_session_token(&mut self, token: &Secret, waiter: Waiter) -> Looked {
        let hash = TokenHash::of(token.expose_secret());
        let Some(session) = hash.and_then(|hash| self.ledger.ephemerals().by_token(hash)) else {
            return Looked::Now(waiter, Err(unknown()));
        };
        if session.ends <= self.now.at || session.ends_at <= self.now.wall {
            return Looked::Now(waiter, Err(unknown()));
        }
        if let Some(refusal) = self.maker_gone(&session) {
            self.end_session_of(session.id);
            return Looked::Now(waiter, Err(refusal));
        }
        if let Some(mark) = &session.maker.api_key {
            let granted = self.api_key_ticket_grant(mark);
            return Looked::Now(waiter, granted.map(|grant| self.limited(grant, &session)));
        }
        if let Some(sid) = session.maker.session.clone() {
            return self.ask_for_session(sid, waiter, Purpose::Ephemeral(Box::new(session)));
        }
        let grant = Grant::of_record(session.maker.clone(), &mut self.rights);
        let outcome = self.judge_token(grant).map(|grant| self.limited(grant, &session));
        Looked::Now(waiter, outcome)
    }

    /// What a maker's grant is worth as its session's.
    pub(super) fn limited(&mut self, grant: Grant, session: &Ephemeral) -> Grant {
        let only = Only { session: session.id, stream: Box::from(&*session.key.name) };
        grant.limited(only, session.ends_at, &mut self.rights)
    }

    /// Why a session is good no longer by what has been said of its maker.
    fn maker_gone(&mut self, session: &Ephemeral) -> Option<Refusal> {
        let maker = &session.maker;
        if let Some(mark) = &maker.api_key {
            let gone = Refusal::new(ErrorCode::TokenRevoked, "the API key was revoked").because("revoked");
            return self.api_keys.find_marked(mark).is_none().then_some(gone);
        }
        let logged_out = || Refusal::new(ErrorCode::LoggedOut, ErrorCode::LoggedOut.meaning()).because("logged_out");
        if let Some(sid) = &maker.session {
            let (marks, now) = (self.ledger.marks(), self.now.wall);
            let issuer = maker.rights.issuer.as_deref();
            let user = maker.sub.as_deref().and_then(|sub| marks.logged_out_at(issuer, sub, now));
            let ended = marks.judge_session(SessionMark::of(sid.expose_secret()), now).is_err();
            return (ended || user.is_some_and(|at| session.made <= at)).then(logged_out);
        }
        if maker.key.is_some_and(|key| self.options.auth.jwt.close_on_key_removal && !self.verifier.has_key(key)) {
            let detail = "the key that signed its maker's token was removed";
            return Some(Refusal::new(ErrorCode::InvalidToken, detail).because("unknown_kid"));
        }
        let grant = Grant::of_record(maker.clone(), &mut self.rights);
        match self.judge_token(grant) {
            Ok(grant) => {
                self.rights.release(grant);
                None
            }
            Err(refusal) => Some(refusal),
        }
    }

    /// A connection lives by the session that its grant is good for, if that is one. Where it has just ended, the connection
    /// ends.
    pub(super) fn join_ephemeral(&mut self, id: Option<EphemeralId>, index: u32) {
        let Some(id) = id else { return };
        let is_there = self.ledger.ephemerals().join(id);
        self.ephemeral_connections.entry(id).or_default().push(index);
        if !is_there {
            // At the end of the input: whoever opens it is not done yet.
            self.send(self.core, Mail::SessionEnded { id });
        }
    }

    /// It does no more.
    pub(super) fn leave_ephemeral(&mut self, id: Option<EphemeralId>, index: u32) {
        let Some(id) = id else { return };
        let Some(connections) = self.ephemeral_connections.get_mut(&id) else { return };
        let Some(at) = connections.iter().position(|connection| *connection == index) else { return };
        connections.swap_remove(at);
        if connections.is_empty() {
            self.ephemeral_connections.remove(&id);
        }
        if self.ledger.ephemerals().leave(id, self.now.at) {
            self.set_timer(self.now.at + self.direct_linger(), Timer::Ephemeral { id });
        }
    }

    /// A session may have outlived its time or its watchers.
    pub(super) fn ephemeral_due(&mut self, id: EphemeralId) {
        match self.ledger.ephemerals().timed(id, self.now, self.direct_linger()) {
            Due::Over => self.tell_session_ended(id),
            Due::At(at) => self.set_timer(at, Timer::Ephemeral { id }),
            Due::Watched => {}
        }
    }

    /// Ends a session.
    fn end_session_of(&mut self, id: EphemeralId) {
        self.ledger.ephemerals().remove(id);
        self.tell_session_ended(id);
    }

    fn tell_session_ended(&mut self, id: EphemeralId) {
        for core in 0..self.cores {
            self.send(CoreId(core), Mail::SessionEnded { id });
        }
    }

    /// A session has ended, and with it all that live by it.
    pub(super) fn session_ended(&mut self, id: EphemeralId) {
        for index in self.ephemeral_connections.get(&id).cloned().unwrap_or_default() {
            self.end_watcher(index);
        }
    }

    /// Ends a connection whose session has ended.
    pub(super) fn end_watcher(&mut self, index: u32) {
        match self.connections.at(index).map(|connection| &connection.state) {
            Some(State::Open(open)) => {
                let topics = open.subscriptions.iter().filter_map(|(_, slot)| self.topics.at(slot.topic));
                let names: Vec<_> = topics.map(|topic| topic.key.name.clone()).collect();
                let wall = self.now.wall;
                let status = Status { state: StreamState::Ended, code: None, status: None, retry_in: None };
                for name in names {
                    self.tell(index, "stream_status", |out| write_status(out, &name, &status, wall));
                }
                self.close(index, CloseReason::StreamEnded);
            }
            Some(State::Http(http)) if matches!(http.phase, Phase::Waiting { .. }) => {
                if let Some(waiter) = self.key_of(index) {
                    let refusal = Refusal::new(ErrorCode::StreamEnded, ErrorCode::StreamEnded.meaning());
                    self.refuse_waiter(waiter, refusal);
                }
            }
            _ => {}
        }
    }
}
