//! Answers over HTTP: values, problems, and those who wait for them.
//!
//! Source: protocol version 1, section 1 («JSON representation», «HTTP»); RFC 9110, 9457, 7240.
//! Memory: an answer's head; a value is shared. Errors: [`Refusal`], written as a problem document.

use std::sync::Arc;
use std::time::Duration;

use crate::auth::grant::Grant;
use crate::codec::http::{Response, http_date};
use crate::codec::message::{CloseReason, ErrorCode};
use crate::codec::proof::Proof;
use crate::connection::handshake::Refusal;
use crate::connection::{BodyPurpose, Http, Phase, Reply, State};
use crate::frame::Signed;
use crate::ids::{ConnectionKey, Keeper};
use crate::metrics::{ConnectionKind, HandshakeResult};
use crate::stream::poll::{Status, StreamState, UpstreamCode};

use super::{Shard, StreamKey, direct};

/// Seconds after which whoever was told that there is no value may ask again, at least.
const UNAVAILABLE_S: u64 = 5;
/// What each answer about a stream or a credential says of itself (protocol section 1).
const VARY: &str = "Accept, Authorization, Cookie, Origin";
const EXPOSED: &str = "ETag, Retry-After, X-Restcast-State, X-Restcast-Hash, X-Restcast-Signature";

/// A held value, as an answer needs it.
struct Held {
    etag: String,
    value: Arc<[u8]>,
    stale: bool,
    topic: u32,
}

impl Shard {
    /// Adds what every answer carries, and writes it.
    pub(super) fn respond(&mut self, index: u32, response: Response, reply: &Reply) {
        let bytes = self.written(response, reply);
        self.send_answer(index, bytes, reply.keep_alive);
    }

    pub(super) fn written(&self, response: Response, reply: &Reply) -> Vec<u8> {
        let date = http_date(self.now.wall);
        let mut response =
            response.header("Date", &date).header("X-Content-Type-Options", "nosniff").header("Vary", VARY);
        if let Some(origin) = &reply.cors_origin {
            response = response
                .header("Access-Control-Allow-Origin", origin)
                .header("Access-Control-Allow-Credentials", "true")
                .header("Access-Control-Expose-Headers", EXPOSED);
        }
        let mut bytes = Vec::new();
        response.close(!reply.keep_alive).head_only(reply.head_only).write(&mut bytes);
        bytes
    }

    /// Sends a whole answer; afterwards the connection reads its next request, or ends.
    pub(super) fn send_answer(&mut self, index: u32, bytes: Vec<u8>, keep_alive: bool) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        connection.outbox().write(|out| out.extend_from_slice(&bytes));
        self.answered(index, keep_alive);
    }

    /// The answer stands in the outbox.
    pub(super) fn answered(&mut self, index: u32, keep_alive: bool) {
        let deadline = self.now.at + self.options.limits.keep_alive;
        let keep_alive = keep_alive && self.draining.is_none();
        self.make_ready(index);
        match self.connections.at_mut(index).map(|connection| &mut connection.state) {
            Some(State::Http(http)) if keep_alive => {
                http.phase = Phase::Head;
                http.deadline = deadline;
                self.arm(index);
            }
            Some(State::Http(_)) => self.finish_http(index),
            _ => {}
        }
    }

    /// Answers with a problem document.
    pub(super) fn refuse(&mut self, index: u32, refusal: &Refusal, reply: &Reply) {
        self.metrics.handshakes.of(HandshakeResult::of_code(refusal.code.as_str())).count();
        let response = problem(refusal);
        self.respond(index, response, reply);
    }

    /// The same, held back: the peer's address has failed too often.
    pub(super) fn refuse_later(&mut self, index: u32, refusal: &Refusal, reply: &Reply, delay: Duration) {
        self.metrics.handshakes.of(HandshakeResult::of_code(refusal.code.as_str())).count();
        let answer = self.written(problem(refusal), reply);
        let deadline = self.now.at + delay;
        let keep_alive = reply.keep_alive;
        if let Some(http) = self.http_mut(index) {
            http.phase = Phase::Delayed { answer, keep_alive };
            http.deadline = deadline;
            self.arm(index);
        }
    }

    pub(super) fn http_mut(&mut self, index: u32) -> Option<&mut Http> {
        match &mut self.connections.at_mut(index)?.state {
            State::Http(http) => Some(http),
            _ => None,
        }
    }

    /// A value is wanted: it is answered now, or waited for.
    pub(super) fn wait_for_value(
        &mut self,
        index: u32,
        key: &Arc<StreamKey>,
        known: Option<String>,
        preferred_s: Option<u64>,
        grant: Grant,
        reply: Reply,
    ) {
        let now = self.now.at;
        let (keeper, session) = (self.keeper(index, &grant, key), grant.session());
        let only = grant.only().map(|only| only.session);
        let held = match self.hold_stream(keeper, key, false) {
            Ok(held) => held,
            Err(refusal) => {
                self.rights.release(grant);
                return self.refuse(index, &refusal, &reply);
            }
        };
        let topic = self.watch(key, index, keeper.map(Keeper::holder), false);
        let Some(connection) = self.key_of(index) else { return };
        let (grant, since) = (Box::new(grant), self.now);
        let preferred_s = preferred_s.filter(|_| known.is_some());
        let cold_until = now + key.target.options.timeout;
        let deadline = preferred_s.map_or(cold_until, |wait| now + Duration::from_secs(wait));
        let Some(http) = self.http_mut(index) else { return };
        http.phase = Phase::Waiting { topic, held, known, preferred_s, cold_until, grant, since, reply };
        http.deadline = deadline;
        self.join_session(session, index);
        self.join_ephemeral(only, index);
        if let Some(topic) = self.topics.at_mut(topic) {
            topic.waiters.push(connection);
        }
        self.metrics.connections.of(ConnectionKind::JsonWait).rise();
        self.arm(index);
        self.answer_waiter(connection);
    }

    /// Something about a topic has changed: those who wait for it look again.
    pub(super) fn answer_waiters(&mut self, topic: u32) {
        let waiters = self.topics.at(topic).map(|topic| topic.waiters.clone()).unwrap_or_default();
        for waiter in waiters {
            self.answer_waiter(waiter);
        }
    }

    /// Gives one who waits what it waits for, if it is there.
    pub(super) fn answer_waiter(&mut self, waiter: ConnectionKey) {
        let (wall, leeway) = (self.now.wall, self.options.auth.jwt.leeway);
        let Some(index) = self.still(waiter) else { return };
        let Some(http) = self.http_mut(index) else { return };
        let Phase::Waiting { topic, known, preferred_s, grant, .. } = &http.phase else { return };
        if grant.end(leeway).is_some_and(|end| end <= wall) {
            return self.waited(index);
        }
        let (topic, known, preferred_s) = (*topic, known.clone(), *preferred_s);
        self.count_watching(index);
        let Some(found) = self.topics.at(topic) else { return };
        let failing = found.status.is_some_and(|status| status.state == StreamState::Failing);
        // A value from before polling began anew may be old: the first poll is waited for, unless the upstream has failed
        // and that poll is put off.
        let put_off = |status: Status| {
            let stopped = status.code == Some(UpstreamCode::Stopped) && status.retry_in.is_none();
            stopped || status.retry_in.is_some_and(|wait| !wait.is_zero())
        };
        let settled = found.fresh || found.status.is_some_and(put_off);
        match self.held(topic) {
            Some(held) if settled => {
                let same = known.as_deref().is_some_and(|known| lists_tag(known, &held.etag));
                if !same || preferred_s.is_none() {
                    self.answer_value(index, &held, same);
                }
            }
            None if settled && failing => self.unavailable(index),
            _ => {}
        }
    }

    fn held(&self, topic: u32) -> Option<Held> {
        let found = self.topics.at(topic)?;
        let history = found.history.as_ref()?;
        let value = Arc::clone(history.value()?);
        let etag = format!("\"{}-{}\"", history.epoch(), history.head()?);
        let stale = found.status.is_some_and(|status| status.state == StreamState::Stale);
        Some(Held { etag, value, stale, topic })
    }

    /// The fields that prove a value: its hash, and a signature of when and as what it was received, and of itself.
    fn proved(&self, held: &Held) -> Vec<(&'static str, String)> {
        let mut fields = Vec::new();
        let Some(topic) = self.topics.at(held.topic) else { return fields };
        let proof = &topic.key.target.options.proof;
        let history = topic.history.as_ref().filter(|_| *proof != Proof::default());
        let Some((history, newest)) = history.and_then(|history| Some((history, history.newest()?))) else {
            return fields;
        };
        if let Some(hash) = &newest.delta().hash {
            fields.push(("X-Restcast-Hash", hash.to_string()));
        }
        if let Some(Signed { signer, scope }) = topic.key.signed() {
            let (ts, kid) = (newest.delta().ts, signer.key_id());
            let before = format!("{ts}.{scope}.{}.{}-{}.", topic.key.name, history.epoch(), newest.seq());
            let signature = signer.sign(&[before.as_bytes(), &held.value]);
            fields.push(("X-Restcast-Signature", format!("ts={ts},scope={scope},kid={kid},v1={signature}")));
        }
        fields
    }

    fn answer_value(&mut self, index: u32, held: &Held, not_modified: bool) {
        if !self.judge_waiter_now(index) {
            return;
        }
        let preferred_s = match self.http_mut(index).map(|http| &http.phase) {
            Some(Phase::Waiting { preferred_s, .. }) => *preferred_s,
            _ => return,
        };
        let reply = self.forget_exchange(index);
        let mut response = Response::new(if not_modified { 304 } else { 200 })
            .header("ETag", &held.etag)
            .header("Cache-Control", "private, no-cache");
        if held.stale {
            response = response.header("X-Restcast-State", "stale");
        }
        if !not_modified {
            for (name, value) in self.proved(held) {
                response = response.header(name, &value);
            }
        }
        if let Some(wait) = preferred_s {
            response = response.header("Preference-Applied", &format!("wait={wait}"));
        }
        self.metrics.handshakes.of(HandshakeResult::Ok).count();
        if not_modified {
            self.respond(index, response, &reply);
            return;
        }
        let head = self.written(response.body_elsewhere("application/json", held.value.len()), &reply);
        let Some(connection) = self.connections.at_mut(index) else { return };
        let outbox = connection.outbox();
        outbox.write(|out| out.extend_from_slice(&head));
        if !reply.head_only {
            outbox.push_value(Arc::clone(&held.value));
        }
        self.answered(index, reply.keep_alive);
    }

    fn unavailable(&mut self, index: u32) {
        let topic = match self.http_mut(index).map(|http| &http.phase) {
            Some(Phase::Waiting { topic, .. }) => Some(*topic),
            _ => None,
        };
        let blocked = topic.is_some_and(|topic| self.is_blocked(topic));
        let status = topic.and_then(|topic| self.topics.at(topic)).and_then(|topic| topic.status);
        // Before the next poll there is nothing to be had.
        let wait = status.and_then(|status| status.retry_in).map_or(0, |wait| wait.as_millis().div_ceil(1_000));
        let wait_s = u64::try_from(wait).unwrap_or(u64::MAX).max(UNAVAILABLE_S);
        let reply = self.forget_exchange(index);
        if blocked {
            return self.refuse(index, &direct::blocked(), &reply);
        }
        let selects =
            topic.and_then(|topic| self.topics.at(topic)).is_some_and(|topic| topic.key.facet.select.is_some());
        let detail = match status.and_then(|status| status.code) {
            // What the upstream has given may be known to others, of whom this caller may be none.
            Some(UpstreamCode::TooLarge) if selects => {
                "UPSTREAM_TOO_LARGE: the select takes more work than there is for it, or the value is too large"
            }
            _ => "the upstream has given no value yet",
        };
        self.refuse(index, &Refusal::new(ErrorCode::StreamUnavailable, detail).retry_after(wait_s), &reply);
    }

    /// The time of one who waits is over.
    pub(super) fn waited(&mut self, index: u32) {
        let (now, leeway) = (self.now.at, self.options.auth.jwt.leeway);
        let Some(http) = self.http_mut(index) else { return };
        let Phase::Waiting { topic, known, cold_until, grant, .. } = &http.phase else { return };
        let (ends, session) = (grant.end(leeway), grant.session());
        let ends_session = super::sessions::expiry_of(grant) == CloseReason::StreamEnded;
        let (topic, known, cold_until) = (*topic, known.clone(), *cold_until);
        if ends.is_some_and(|ends| ends <= self.now.wall) {
            if ends_session {
                return self.end_watcher(index);
            }
            self.metrics.expiries.count();
            let reply = self.forget_exchange(index);
            let refusal = match session {
                Some(_) => Refusal::new(ErrorCode::SessionExpired, "the session has expired"),
                None => Refusal::new(ErrorCode::TokenExpired, "the credential has expired"),
            };
            return self.refuse(index, &refusal, &reply);
        }
        match self.held(topic) {
            Some(held) => {
                let same = known.as_deref().is_some_and(|known| lists_tag(known, &held.etag));
                self.answer_value(index, &held, same);
            }
            None if cold_until > now => {
                if let Some(http) = self.http_mut(index) {
                    http.deadline = cold_until;
                }
            }
            None => self.unavailable(index),
        }
    }

    /// One who waits cannot be given what it waits for.
    pub(super) fn refuse_waiter(&mut self, waiter: ConnectionKey, refusal: Refusal) {
        let Some(index) = self.still(waiter) else { return };
        let reply = self.forget_exchange(index);
        self.refuse(index, &refusal, &reply);
    }

    /// After a reload, or when key sets were fetched: whoever waits for a stream that was changed waits for what it is now, and
    /// is told where it was removed; where that closes connections, one whose key was removed is refused.
    pub(super) fn rejudge_waiters(&mut self) {
        let options = Arc::clone(&self.options);
        let close_on_key_removal = options.auth.jwt.close_on_key_removal;
        let waiters: Vec<(ConnectionKey, Arc<StreamKey>)> = self
            .topics
            .iter()
            .flat_map(|(_, topic)| topic.waiters.iter().map(|waiter| (*waiter, Arc::clone(&topic.key))))
            .collect();
        for (waiter, stream) in waiters {
            let key = match self.http_mut(waiter.index).map(|http| &http.phase) {
                Some(Phase::Waiting { grant, .. }) => grant.key(),
                _ => None,
            };
            if close_on_key_removal && key.is_some_and(|key| !self.verifier.has_key(key)) {
                let refusal = Refusal::new(ErrorCode::InvalidToken, "the key that signed the token was removed");
                self.refuse_waiter(waiter, refusal);
            } else if !options.catalog.is_current(&stream) {
                self.move_waiter(waiter, &stream);
            }
        }
    }

    /// Gives up what an HTTP connection waits for; how it was to be answered.
    pub(super) fn forget_exchange(&mut self, index: u32) -> Reply {
        let Some(key) = self.key_of(index) else { return Reply::default() };
        let Some(http) = self.http_mut(index) else { return Reply::default() };
        match std::mem::replace(&mut http.phase, Phase::Head) {
            Phase::Waiting { topic, held, reply, grant, .. } => {
                self.leave_session(grant.session(), index);
                self.leave_ephemeral(grant.only().map(|only| only.session), index);
                self.rights.release(*grant);
                if let Some(key) = self.topics.at(topic).map(|topic| Arc::clone(&topic.key)) {
                    self.release_stream(held, &key);
                }
                self.metrics.connections.of(ConnectionKind::JsonWait).fall();
                if let Some(topic) = self.topics.at_mut(topic) {
                    topic.waiters.retain(|waiter| *waiter != key);
                }
                self.unwatch(topic, index);
                reply
            }
            Phase::Asking { ask, reply } => {
                self.asks.remove(&ask);
                self.forget_lookup(ask);
                reply
            }
            Phase::Looking { ask, .. } => {
                self.forget_lookup(ask);
                Reply::default()
            }
            Phase::Body { reply, purpose, .. } => {
                self.forget_purpose(index, purpose);
                reply
            }
            Phase::Head | Phase::Delayed { .. } => Reply::default(),
        }
    }
}

impl Shard {
    /// A body is not read any more.
    pub(super) fn forget_purpose(&mut self, index: u32, purpose: BodyPurpose) {
        if let BodyPurpose::Direct { caller, .. } | BodyPurpose::Session { caller, .. } = purpose {
            self.leave_session(caller.grant.session(), index);
            self.rights.release(*caller.grant);
        }
    }
}

/// The problem document of a refusal.
fn problem(refusal: &Refusal) -> Response {
    let mut response =
        Response::problem(refusal.status, refusal.code.as_str(), &refusal.detail).header("Cache-Control", "no-store");
    if refusal.status == 401 {
        let challenge = match refusal.code {
            ErrorCode::MissingCredential => "Bearer",
            _ => "Bearer error=\"invalid_token\"",
        };
        response = response.header("WWW-Authenticate", challenge);
    }
    if let Some(allow) = refusal.allow {
        response = response.header("Allow", allow);
    }
    if refusal.status == 415 {
        response = response.header("Accept-Encoding", "identity");
    }
    if refusal.status == 426 {
        response = response.header("Sec-WebSocket-Version", "13").header("Upgrade", "websocket");
    }
    if let Some(seconds) = refusal.retry_after_s {
        response = response.header("Retry-After", &seconds.to_string());
    }
    response
}

/// Whether `If-None-Match` lists `etag`, which has neither comma nor escape; compared weakly (RFC 9110 section 13.1.2).
fn lists_tag(known: &str, etag: &str) -> bool {
    known.trim() == "*" || known.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag)
}

#[cfg(test)]
mod tests {
    use super::lists_tag;

    #[test]
    fn entity_tags_are_compared_weakly() {
        assert!(
            lists_tag("\"a-1\"", "\"a-1\"") && lists_tag("\"x\", W/\"a-1\"", "\"a-1\"") && lists_tag(" * ", "\"a-1\"")
        );
        assert!(!lists_tag("\"a-11\"", "\"a-1\"") && !lists_tag("a-1", "\"a-1\"") && !lists_tag("", "\"a-1\""));
    }
}
