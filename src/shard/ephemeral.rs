//! Ephemeral sessions: made by whoever may describe a stream, opened by a token that is good for that stream alone.
//!
//! Source: protocol version 1, sections 1, 2 and 6. A session ends at its time, `direct.linger` after its last watcher has
//! left, when it is deleted, and no later than what its maker's credential hangs on: a logout, a revocation, an API key or a
//! session that is gone refuse its token and close its connections. Its token may be presented as long as it lives.
//! Memory: the table of the process (`ephemeral_table`); here the places of the connections that live by a session.
//! Errors: [`Refusal`]. Not here: which targets may be named (`direct`), what a token looks like (`auth::ephemeral`), what
//! processes share of sessions (`ephemeral_shared`).

use std::time::Duration;

use crate::auth::ephemeral;
use crate::auth::grant::{Grant, GrantRecord, Only};
use crate::auth::session::SessionMark;
use crate::codec::http::{Head, Response};
use crate::codec::message::{CloseReason, ErrorCode};
use crate::connection::handshake::{Page, Refusal, SeenAs};
use crate::connection::{Caller, Phase, Reply, State};
use crate::ids::{CoreId, EphemeralId};
use crate::secret::Secret;
use crate::stream::poll::{Status, StreamState};
use crate::time::WallTime;

use super::direct::described_in;
use super::ephemeral_table::{Due, Ephemeral, Joined, Left, Made, Over};
use super::lookup::{FaceAsked, Looked, Purpose, Waiter};
use super::requests::Judged;
use super::subscribe::write_status;
use super::{Mail, Shard, Timer};

pub(super) fn unknown() -> Refusal {
    Refusal::new(ErrorCode::InvalidToken, "there is no such session, or it has ended").because("unknown_session")
}

fn not_found() -> Refusal {
    Refusal::new(ErrorCode::NotFound, "there is no such session of yours, or it has ended")
}

pub(super) fn refused(over: Over) -> Refusal {
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

/// What is told of a session.
pub(super) struct Told<'s> {
    pub(super) id: EphemeralId,
    pub(super) stream: &'s str,
    pub(super) ends_at: WallTime,
}

/// A connection that lives by a session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Living {
    index: u32,
    /// Whether it is counted as a watcher: it has the stream.
    pub(super) watches: bool,
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
        let grant = match self.caller_now(index, caller) {
            Ok(grant) => grant,
            Err(refusal) => return self.refuse(index, &refusal, reply),
        };
        let new = described_in(body).and_then(|said| {
            let key = self.described(&grant, &said.request)?;
            let key = self.selected(key, said.select.as_deref(), ErrorCode::BadRequest)?;
            if said.dedupe_key.is_some() && grant.sub().is_none() {
                let detail = "dedupe_key needs a credential with a subject";
                return Err(Refusal::new(ErrorCode::BadRequest, detail));
            }
            let ttl_max = self.may_describe(&grant)?.session_ttl_max;
            let ttl = said.ttl_s.map_or(ttl_max, |seconds| Duration::from_secs(seconds).min(ttl_max));
            // Whoever has no subject is known by the credential.
            let holder = self.asker(&grant);
            let token = self.new_session_token();
            Ok(Ephemeral {
                id: ephemeral::id_of(token.expose_secret()).expect("a token of ours is one"),
                token,
                key,
                maker: grant.to_record(self.session_id(&grant)),
                holder,
                dedupe_key: said.dedupe_key.map(String::into_boxed_str),
                made: self.now.wall,
                ends: self.now.at + ttl,
                ends_at: self.now.wall + ttl,
                counted: None,
            })
        });
        self.rights.release(grant);
        match new {
            Ok(new) if self.options.auth.store => self.share_session(index, new, seen_as.clone(), false, reply.clone()),
            Ok(new) => self.make_own_session(index, new, seen_as, reply),
            Err(refusal) => self.refuse(index, &refusal, reply),
        }
    }

    fn new_session_token(&mut self) -> Secret {
        let mut random = [0u8; 32];
        for half in random.chunks_exact_mut(16) {
            half.copy_from_slice(&self.rng.u128().to_le_bytes());
        }
        ephemeral::token_of_random(random)
    }

    /// Makes a session that this process alone knows.
    pub(super) fn make_own_session(&mut self, index: u32, new: Ephemeral, seen_as: &SeenAs, reply: &Reply) {
        match self.make_session(new) {
            Ok((session, created)) => {
                let told = Told { id: session.id, stream: &session.key.name, ends_at: session.ends_at };
                self.hand_out_session(index, told, &session.token, created, seen_as, reply);
            }
            Err(refusal) => self.refuse(index, &refusal, reply),
        }
    }

    /// Tells whoever has made a session of it.
    pub(super) fn hand_out_session(
        &mut self,
        index: u32,
        session: Told<'_>,
        token: &Secret,
        created: bool,
        seen_as: &SeenAs,
        reply: &Reply,
    ) {
        let mut text = self.session_text(&session, seen_as);
        // A token's characters stand for themselves in JSON.
        let token = String::from_utf8_lossy(token.expose_secret());
        text.push_str(&format!(",\"token\":\"{token}\",\"created\":{created}}}\n"));
        let location = format!("/v1/sessions/{}", session.id);
        let response = Response::new(if created { 201 } else { 200 }).header("Cache-Control", "no-store");
        let response = response.header("Location", &location).body("application/json", text.into_bytes());
        self.respond(index, response, reply);
    }

    /// Makes a session, unless its maker has it already; whether it is new.
    fn make_session(&mut self, new: Ephemeral) -> Result<(Ephemeral, bool), Refusal> {
        // What its maker made before a logout is not what is asked for now, and counts no more.
        for old in self.ledger.ephemerals().of(new.holder) {
            if self.ledger.ephemerals().is_over(old.id, self.now, self.direct_linger())
                || self.maker_gone(&old.maker, old.made).is_some()
            {
                self.end_session_of(&old);
            }
        }
        let per_subject = self.options.catalog.direct().map_or(0, |direct| direct.sessions_per_subject);
        match self.ledger.ephemerals().make(&new, self.options.limits.streams, per_subject) {
            Ok(Made::New) => {
                self.set_timer(new.ends, Timer::Ephemeral { id: new.id });
                Ok((new, true))
            }
            Ok(Made::Same(old)) => Ok((*old, false)),
            Err(over) => Err(refused(over)),
        }
    }

    pub(super) fn direct_linger(&self) -> Duration {
        self.options.catalog.direct().map_or(Duration::ZERO, |direct| direct.linger)
    }

    /// All but the end of the object that tells of a session. Its texts need no escapes but the authority, which is checked.
    fn session_text(&self, session: &Told<'_>, seen_as: &SeenAs) -> String {
        let (scheme, authority) = match &self.options.connection.public_origin {
            Some(origin) => origin.split_once("://").unwrap_or(("https", origin)),
            None => (&*seen_as.scheme, &*seen_as.authority),
        };
        let authority: String =
            authority.chars().filter(|c| c.is_ascii_alphanumeric() || ".-_~:[]%!$&'()*+,;=".contains(*c)).collect();
        let (http, ws) = if scheme.eq_ignore_ascii_case("https") { ("https", "wss") } else { ("http", "ws") };
        let (id, name, ends) = (session.id, session.stream, session.ends_at.as_micros());
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
        let (Some(id), Some(asker)) = (id, record) else { return self.refuse(index, &not_found(), reply) };
        let found = self.ledger.ephemerals().find(id);
        if self.options.auth.store && found.as_ref().is_none_or(Ephemeral::is_shared) {
            let asked = FaceAsked { id, asker, seen_as: seen_as.clone(), end };
            return self.ask_for_face(index, asked, reply.clone());
        }
        let Some(session) = found.filter(|session| session.is_of(&asker)) else {
            return self.refuse(index, &not_found(), reply);
        };
        if end {
            self.end_session_of(&session);
            self.confirm_end(index, reply);
        } else {
            let told = Told { id, stream: &session.key.name, ends_at: session.ends_at };
            self.tell_session(index, Some(told), seen_as, reply);
        }
    }

    /// Tells whoever has made a session of it, without its token; `None`: there is none of theirs.
    pub(super) fn tell_session(&mut self, index: u32, session: Option<Told<'_>>, seen_as: &SeenAs, reply: &Reply) {
        let Some(session) = session else { return self.refuse(index, &not_found(), reply) };
        let text = self.session_text(&session, seen_as) + "}\n";
        let response =
            Response::new(200).header("Cache-Control", "no-store").body("application/json", text.into_bytes());
        self.respond(index, response, reply);
    }

    /// Tells whoever has ended a session that it is.
    pub(super) fn confirm_end(&mut self, index: u32, reply: &Reply) {
        self.respond(index, Response::new(204).header("Cache-Control", "no-store"), reply);
    }

    /// The token of a session is presented.
    pub(super) fn look_at_session_token(&mut self, token: &Secret, waiter: Waiter) -> Looked {
        let Some(id) = ephemeral::id_of(token.expose_secret()) else { return Looked::Now(waiter, Err(unknown())) };
        match self.ledger.ephemerals().find(id) {
            // What processes share is known here as long as connections live by it, for then its end is told.
            Some(session) if !session.is_shared() || self.ledger.ephemerals().is_watched(id) => {
                self.look_at_session(session, waiter)
            }
            _ if self.options.auth.store => self.take_up_session(id, token, waiter),
            _ => Looked::Now(waiter, Err(unknown())),
        }
    }

    /// What whoever presents the token of a session gets.
    pub(super) fn look_at_session(&mut self, session: Ephemeral, waiter: Waiter) -> Looked {
        if session.ends <= self.now.at || session.ends_at <= self.now.wall {
            return Looked::Now(waiter, Err(unknown()));
        }
        if let Some(refusal) = self.maker_gone(&session.maker, session.made) {
            self.end_session_of(&session);
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
        let only = Only { session: session.id, stream: Box::from(&*session.key.name), ends: session.ends_at };
        grant.limited(only, &mut self.rights)
    }

    /// Why a session is good no longer by what has been said of its maker.
    pub(super) fn maker_gone(&mut self, maker: &GrantRecord, made: WallTime) -> Option<Refusal> {
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
            return (ended || user.is_some_and(|at| made <= at)).then(logged_out);
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
    /// ends. It does not watch yet.
    pub(super) fn join_ephemeral(&mut self, id: Option<EphemeralId>, index: u32) {
        let Some(id) = id else { return };
        let is_there = self.ledger.ephemerals().enter(id);
        self.ephemeral_connections.entry(id).or_default().push(Living { index, watches: false });
        if !is_there {
            // At the end of the input: whoever opens it is not done yet.
            self.send(self.core, Mail::SessionEnded { id });
        }
    }

    /// Counts a connection that lives by a session as its watcher for as long as it has the stream: whoever was refused it,
    /// or has not asked for it, leaves nothing when they go.
    pub(super) fn count_watching(&mut self, index: u32) {
        // Whether it has asked for it, and whether it has it.
        let (only, asks, has) = match self.connections.at(index).map(|connection| &connection.state) {
            Some(State::Open(open)) => {
                let has = open.subscriptions.iter().any(|(_, slot)| !slot.pending);
                (open.grant.only(), !open.subscriptions.is_empty(), has)
            }
            Some(State::Http(http)) => match &http.phase {
                Phase::Waiting { grant, topic, .. } => {
                    (grant.only(), true, self.topics.at(*topic).is_some_and(|topic| topic.history.is_some()))
                }
                _ => return,
            },
            _ => return,
        };
        let Some(id) = only.map(|only| only.session) else { return };
        let mut living = self.ephemeral_connections.get_mut(&id).into_iter().flatten();
        let Some(living) = living.find(|living| living.index == index) else { return };
        // One that is moved to the stream under another configuration watches all the while.
        let watches = has || asks && living.watches;
        if std::mem::replace(&mut living.watches, watches) == watches {
            return;
        }
        if !watches {
            return self.stopped_watching(id);
        }
        match self.ledger.ephemerals().join(id) {
            Joined::Gone => self.send(self.core, Mail::SessionEnded { id }),
            Joined::First => self.hold_session(id),
            Joined::Another => {}
        }
        self.plan_to_keep_ephemerals();
    }

    fn stopped_watching(&mut self, id: EphemeralId) {
        let Left { last, set_timer } = self.ledger.ephemerals().leave(id, self.now.at);
        if set_timer {
            self.set_timer(self.now.at + self.direct_linger(), Timer::Ephemeral { id });
        }
        if last {
            self.let_go_of_session(id);
        }
    }

    /// It does no more.
    pub(super) fn leave_ephemeral(&mut self, id: Option<EphemeralId>, index: u32) {
        let Some(id) = id else { return };
        let Some(connections) = self.ephemeral_connections.get_mut(&id) else { return };
        let Some(at) = connections.iter().position(|living| living.index == index) else { return };
        let Living { watches, .. } = connections.swap_remove(at);
        if connections.is_empty() {
            self.ephemeral_connections.remove(&id);
        }
        if watches {
            self.stopped_watching(id);
        }
        if self.ledger.ephemerals().exit(id, self.now.at) {
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

    /// Ends a session, wherever it is known.
    pub(super) fn end_session_of(&mut self, session: &Ephemeral) {
        // Of the many who may find it out at once the first one says so.
        if self.ledger.ephemerals().find(session.id).is_some() {
            self.end_session_elsewhere(session);
        }
        self.end_session_here(session.id);
    }

    /// Ends a session in this process.
    pub(super) fn end_session_here(&mut self, id: EphemeralId) {
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
        for Living { index, .. } in self.ephemeral_connections.get(&id).cloned().unwrap_or_default() {
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
