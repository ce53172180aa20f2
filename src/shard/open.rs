//! Connections that have a grant: what they are told, what they say, how their credential is renewed.
//!
//! Source: protocol version 1, sections 2 («First message»), 3 and 4. Memory: none besides the connection's.
//! Errors: a bad message is answered by an `error` frame and the connection stays; a broken frame ends it.

use crate::auth::grant::{CredentialKind, Grant, MaybeTime};
use crate::codec::deflate::Inflater;
use crate::codec::message::{
    self, AuthKind, ClientId, ClientMessage, CloseReason, ErrorCode, ErrorFrame, MessageError,
};
use crate::codec::ws::{self, Incoming, Opcode};
use crate::connection::handshake::{Presented, Refusal};
use crate::connection::subscriptions::Subscriptions;
use crate::connection::{FirstCredential, MessageRate, Open, State};
use crate::frame::{self, Encoding, Transport};
use crate::ids::ConnectionKey;
use crate::limits;
use crate::metrics::{AuthUpdateResult, HandshakeResult};
use crate::secret::Secret;
use crate::time::Instant;

use super::ledger::Standing;
use super::lookup::{Authenticated, Looked, Waiter};
use super::requests::{FAILURE_DELAY, is_failure};
use super::{Shard, Timer};

/// What `/echo` takes (protocol section 7).
const ECHO_LIMITS: ws::Limits = ws::Limits { message_bytes_max: 16 << 20, fragments_max: 65_536 };

/// A new credential of an open WebSocket that is refused, and is not told so yet: its address has failed too often.
#[derive(Debug)]
pub(super) struct LateUpdate {
    due: Instant,
    connection: ConnectionKey,
    /// What the answer echoes.
    id: Option<ClientId>,
    refusal: Refusal,
}

impl Shard {
    pub(super) fn message_limits(&self) -> ws::Limits {
        ws::Limits {
            message_bytes_max: self.options.limits.message_bytes_max as usize,
            fragments_max: limits::MESSAGE_FRAGMENTS_MAX,
        }
    }

    /// Opens a connection under `grant`, and welcomes it.
    pub(super) fn open(&mut self, index: u32, transport: Transport, grant: Grant, counted: bool, single: bool) {
        let heartbeat = self.options.connection.heartbeat;
        let random = self.rng.u128().to_ne_bytes();
        let now = self.now.at;
        let id = self.name_of(index, u128::from_ne_bytes(random));
        let kind = match grant.kind() {
            CredentialKind::Jwt => AuthKind::Jwt,
            CredentialKind::Session => AuthKind::Session,
            CredentialKind::ApiKey => AuthKind::ApiKey,
            CredentialKind::Ticket => AuthKind::Ticket,
            CredentialKind::Anonymous => AuthKind::Anonymous,
        };
        let (sub, expires, session) = (grant.sub().map(str::to_owned), grant.expires(), grant.session());
        let only = grant.only().map(|only| only.session);
        let Some(connection) = self.connections.at_mut(index) else { return };
        connection.state = State::Open(Open {
            random,
            grant,
            decoder: ws::Decoder::new(),
            subscriptions: Subscriptions::None,
            reauthenticate_at: MaybeTime::new(None),
            since: now,
            identified: self.now,
            heartbeat_at: now + heartbeat,
            rate: MessageRate::default(),
            transport,
            single,
            refusals: 0,
            updating: false,
            acting: 0,
            counted,
            opening: None,
        });
        self.join_session(session, index);
        self.join_ephemeral(only, index);
        self.metrics.handshakes.of(HandshakeResult::Ok).count();
        self.count_open(transport, true);
        self.plan_reauthenticate(index);
        let heartbeat_ms = u64::try_from(heartbeat.as_millis()).unwrap_or(u64::MAX);
        self.tell(index, "welcome", |out| {
            message::write_welcome(out, id, kind, sub.as_deref(), expires, heartbeat_ms);
        });
        self.arm(index);
    }

    /// Puts a control frame in the outbox of an open connection: `write` appends its JSON text, whose `type` is `kind`.
    pub(super) fn tell(&mut self, index: u32, kind: &str, write: impl FnOnce(&mut Vec<u8>)) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        let Some(transport) = connection.open().map(|open| open.transport) else { return };
        let mut text = Vec::new();
        write(&mut text);
        connection.outbox().write(|out| frame::write_control(transport, kind, &text, out));
        self.keep_order(index);
        self.make_ready(index);
    }

    /// What stands in an outbox goes before what the logs hold: the connection leaves the sweep until it has been sent.
    pub(super) fn keep_order(&mut self, index: u32) {
        let slots: Vec<_> = match self.connections.at(index).and_then(|connection| connection.open()) {
            Some(open) => open.subscriptions.iter().map(|(_, slot)| *slot).collect(),
            None => return,
        };
        for slot in slots {
            if slot.pending || slot.rated {
                continue;
            }
            let rendition = self.topics.at_mut(slot.topic).and_then(|t| t.renditions[usize::from(slot.kind)].as_mut());
            if let Some(rendition) = rendition {
                rendition.set_behind(slot.position, true);
            }
        }
    }

    /// Puts an `error` frame in the outbox of an open connection.
    pub(super) fn tell_error(
        &mut self,
        index: u32,
        code: ErrorCode,
        error: &str,
        id: Option<&ClientId>,
        stream: Option<&str>,
    ) {
        let frame = ErrorFrame { error, id, stream, ..ErrorFrame::of(code) };
        self.tell(index, "error", |out| message::write_error(out, &frame));
    }

    /// Bytes of a WebSocket.
    pub(super) fn websocket_bytes(&mut self, index: u32, bytes: &mut [u8]) {
        // What it inflates is looked at by the whole shard, so it is out of the shard meanwhile.
        let mut inflater = std::mem::take(&mut self.inflater);
        match self.connections.at(index).map(|connection| &connection.state) {
            Some(State::Open(_)) => self.messages(index, bytes, &mut inflater),
            Some(State::Unauthenticated(_)) => self.first_message(index, bytes, &mut inflater),
            Some(State::Echo(_)) => self.echo(index, bytes, &mut inflater),
            Some(State::Closing(_)) => self.closing_bytes(index, bytes, &mut inflater),
            Some(State::Http(_)) | None => {}
        }
        self.inflater = inflater;
    }

    fn messages(&mut self, index: u32, mut bytes: &mut [u8], inflater: &mut Inflater) {
        let message_limits = self.message_limits();
        let Some(connection) = self.connections.at_mut(index) else { return };
        let deflates = connection.deflates();
        let Some(open) = connection.open_mut() else { return };
        let mut decoder = std::mem::take(&mut open.decoder);
        loop {
            match decoder.next(&mut bytes, message_limits, deflates.then_some(&mut *inflater)) {
                Ok(Some(incoming)) => {
                    if !self.said(index, incoming) {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => return self.close_for_fault(index, error.into()),
            }
        }
        if let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) {
            open.decoder = decoder;
        }
    }

    /// One message of an open connection; whether it is still open.
    fn said(&mut self, index: u32, incoming: Incoming<'_>) -> bool {
        let now = self.now.at;
        let per_second = self.options.limits.messages_per_second;
        let Some(connection) = self.connections.at_mut(index) else { return false };
        let Some(open) = connection.open_mut() else { return false };
        if !open.rate.count(now, per_second) {
            self.close(index, CloseReason::RateLimited);
            return false;
        }
        // What is asked is judged by the grant of the moment; a connection that has lost it asks nothing more.
        if matches!(incoming, Incoming::Text(_)) && !self.judge_now(index) {
            return false;
        }
        match incoming {
            Incoming::Text(text) => match ClientMessage::parse(text) {
                Ok(ClientMessage::Other { kind, id }) if kind == "open" && self.is_opening(index) => {
                    self.asked_to_open(index, id.as_ref(), text);
                }
                Ok(ClientMessage::Other { kind, id }) => self.asked_to_act(index, &kind, id, text),
                Ok(message) => self.asked(index, message),
                Err(error) => self.tell(index, "error", |out| message::write_error(out, &ErrorFrame::from(&error))),
            },
            Incoming::Binary(_) => self.close_for_fault(index, CloseReason::UnsupportedData),
            Incoming::Ping(payload) => {
                let Some(connection) = self.connections.at_mut(index) else { return false };
                connection.outbox().write(|out| ws::write_pong(out, payload));
                self.keep_order(index);
                self.make_ready(index);
            }
            Incoming::Pong(_) => {}
            Incoming::Close(given) => self.answer_close(index, given),
        }
        self.connections.at(index).is_some_and(|connection| connection.open().is_some())
    }

    /// The peer closes: it gets its code back, and the connection ends.
    fn answer_close(&mut self, index: u32, given: Option<(u16, &str)>) {
        self.close_with_code(index, given.map(|(code, _)| code), "");
    }

    fn asked(&mut self, index: u32, message: ClientMessage) {
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return };
        let (single, anonymous) = (open.single, open.grant.kind() == CredentialKind::Anonymous);
        match message {
            ClientMessage::AuthUpdate { token, id } => self.auth_update(index, token.as_ref(), id.as_ref()),
            // A connection that opened as anonymous, because its stream lets it, may still say who it is.
            ClientMessage::Auth { token } if anonymous => self.auth_update(index, Some(&token), None),
            ClientMessage::Auth { .. } => {
                let reason = "auth is for a connection without a credential: send auth_update";
                self.bad_message(index, reason, None);
            }
            ClientMessage::Subscribe(asked) if single => {
                self.bad_message(index, "subscribe is for /v1/ws", asked.id);
            }
            ClientMessage::Subscribe(asked) => self.asked_to_subscribe(index, &asked),
            ClientMessage::Unsubscribe { id, .. } if single => {
                self.bad_message(index, "unsubscribe is for /v1/ws", id);
            }
            ClientMessage::Unsubscribe { stream, id } => self.asked_to_unsubscribe(index, &stream, id.as_ref()),
            ClientMessage::Other { .. } => {}
        }
    }

    fn bad_message(&mut self, index: u32, reason: &'static str, id: Option<ClientId>) {
        let error = MessageError::Bad { reason, id };
        self.tell(index, "error", |out| message::write_error(out, &ErrorFrame::from(&error)));
    }

    /// `auth_update` of a WebSocket.
    fn auth_update(&mut self, index: u32, token: Option<&Secret>, id: Option<&ClientId>) {
        let Some(connection) = self.key_of(index) else { return };
        let Some(client) = self.connections.at(index).map(|connection| connection.client) else { return };
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return };
        let rejected = |reason| Refusal::new(ErrorCode::AuthUpdateRejected, "").because(reason);
        let outcome = match token {
            _ if open.updating => Err(rejected("busy")),
            Some(_) if self.is_refused(client) => Err(rejected("rate_limited")),
            Some(token) => {
                let waiter = Waiter::Update { connection, id: id.cloned() };
                match self.authenticate(Presented::token(token.clone()), waiter) {
                    Authenticated::Now(outcome) => outcome,
                    Authenticated::Later(_) => {
                        if let Some(open) = self.connections.at_mut(index).and_then(|c| c.open_mut()) {
                            open.updating = true;
                        }
                        return;
                    }
                }
            }
            None => match open.grant.session() {
                None => Err(rejected("no_session")),
                Some(session) => {
                    let waiter = Waiter::Update { connection, id: id.cloned() };
                    match self.reread_mine(session, waiter) {
                        Looked::Now(_, outcome) => outcome,
                        Looked::Later(_) => {
                            if let Some(open) = self.connections.at_mut(index).and_then(|c| c.open_mut()) {
                                open.updating = true;
                            }
                            return;
                        }
                    }
                }
            },
        };
        self.update_judged(index, id, outcome);
    }

    /// The new credential of an open WebSocket has been looked at.
    pub(super) fn update_judged(&mut self, index: u32, id: Option<&ClientId>, outcome: Result<Grant, Refusal>) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        let client = connection.client;
        if connection.open().is_none() {
            return;
        }
        match outcome {
            Ok(grant) => match self.regrant(index, grant, |shard, index, expires, permissions| {
                shard.tell(index, "auth_ok", |out| {
                    message::write_auth_ok(out, id, expires, permissions.iter().map(|permission| &**permission));
                });
            }) {
                Ok(()) => {}
                Err(refusal) => {
                    self.tell_error(index, refusal.code, &refusal.detail, id, None);
                    self.count_refusal(index);
                }
            },
            Err(refusal) => {
                self.metrics.auth_updates.of(AuthUpdateResult::Rejected).count();
                let late = is_failure(refusal.code) && self.count_failure_of(client) != Standing::Good;
                if late {
                    self.reject_update_later(index, id.cloned(), &refusal);
                } else {
                    self.reject_update(index, id, &refusal);
                }
            }
        }
    }

    /// Tells an open WebSocket that its new credential is refused.
    fn reject_update(&mut self, index: u32, id: Option<&ClientId>, refusal: &Refusal) {
        let reason = Some(refusal.reason.unwrap_or("refused"));
        let frame = ErrorFrame { reason, id, ..ErrorFrame::of(ErrorCode::AuthUpdateRejected) };
        self.tell(index, "error", |out| message::write_error(out, &frame));
        // What nobody could say is no fault of the client's.
        if refusal.status != 503 {
            self.count_refusal(index);
        }
    }

    /// The same, held back as an answer over HTTP is: until then no other credential of the connection is looked at.
    fn reject_update_later(&mut self, index: u32, id: Option<ClientId>, refusal: &Refusal) {
        let Some(connection) = self.key_of(index) else { return };
        let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) else { return };
        open.updating = true;
        let due = self.now.at + FAILURE_DELAY;
        self.late_updates.push_back(LateUpdate { due, connection, id, refusal: refusal.clone() });
        self.set_timer(due, Timer::LateUpdates);
    }

    /// Refused credentials whose answers were held back until now.
    pub(super) fn late_updates_due(&mut self) {
        let now = self.now.at;
        while self.late_updates.front().is_some_and(|late| late.due <= now) {
            let Some(late) = self.late_updates.pop_front() else { return };
            let Some(index) = self.still(late.connection) else { continue };
            if let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) {
                open.updating = false;
                self.reject_update(index, late.id.as_ref(), &late.refusal);
            }
        }
    }

    pub(super) fn count_refusal(&mut self, index: u32) {
        let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) else { return };
        open.refusals += 1;
        if open.refusals >= limits::AUTH_UPDATES_REFUSED_MAX {
            self.close(index, CloseReason::AuthUpdateRejected);
        }
    }

    /// Puts a connection under a new grant of the same identity: it is confirmed by `confirm`, then every subscription is
    /// judged by it.
    ///
    /// # Errors
    /// `AUTH_SUBJECT_MISMATCH`, and the connection goes on under its old grant.
    pub(super) fn regrant(
        &mut self,
        index: u32,
        grant: Grant,
        confirm: impl FnOnce(&mut Shard, u32, Option<crate::time::WallTime>, &[Box<str>]),
    ) -> Result<(), Refusal> {
        if !self.judge_now(index) {
            // A logout that came before the new credential ends what it was to renew.
            self.rights.release(grant);
            return Err(Refusal::new(ErrorCode::UnknownConnection, "the connection has ended"));
        }
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return Ok(()) };
        // An anonymous connection is nobody's yet, so it may become somebody's; from then on it is theirs.
        let raised = open.grant.kind() == CredentialKind::Anonymous;
        if !raised && !open.grant.same_identity(&grant) {
            self.metrics.auth_updates.of(AuthUpdateResult::SubjectMismatch).count();
            let detail = "the new credential is another identity's";
            return Err(Refusal::new(ErrorCode::AuthSubjectMismatch, detail));
        }
        let counted = if raised { self.hold_subject(&grant)? } else { open.counted };
        let now = self.now;
        let shared = std::rc::Rc::clone(grant.rights());
        let expires = grant.expires();
        let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) else {
            return Ok(());
        };
        let (before, session) = (open.grant.session(), grant.session());
        // The same identity is good for the same session; nobody's was good for none.
        let only = grant.only().map(|only| only.session).filter(|_| raised);
        let old = std::mem::replace(&mut open.grant, grant);
        open.counted = counted;
        open.refusals = 0;
        if raised {
            open.identified = now;
        }
        self.leave_session(before, index);
        self.join_session(session, index);
        self.join_ephemeral(only, index);
        self.rights.release(old);
        self.metrics.auth_updates.of(AuthUpdateResult::Accepted).count();
        self.plan_reauthenticate(index);
        confirm(self, index, expires, &shared.permissions);
        self.rejudge_subscriptions(index);
        self.arm(index);
        Ok(())
    }

    /// Bytes of a WebSocket that has not said who it is.
    fn first_message(&mut self, index: u32, mut bytes: &mut [u8], inflater: &mut Inflater) {
        let message_limits = self.message_limits();
        let now = self.now.at;
        let per_second = self.options.limits.messages_per_second;
        loop {
            let Some(State::Unauthenticated(waiting)) = self.connections.at_mut(index).map(|c| &mut c.state) else {
                // It may be open now, or closing: what follows is its own.
                return match self.connections.at(index).map(|connection| &connection.state) {
                    Some(State::Open(_)) => self.messages(index, bytes, inflater),
                    Some(State::Closing(_)) => self.closing_bytes(index, bytes, inflater),
                    _ => {}
                };
            };
            let mut decoder = std::mem::take(&mut waiting.decoder);
            let deflates = waiting.encoding != Encoding::Plain;
            let incoming = match decoder.next(&mut bytes, message_limits, deflates.then_some(&mut *inflater)) {
                Ok(Some(incoming)) => incoming,
                Ok(None) => {
                    waiting.decoder = decoder;
                    return;
                }
                Err(error) => return self.close_for_fault(index, error.into()),
            };
            if !waiting.rate.count(now, per_second) {
                return self.close(index, CloseReason::RateLimited);
            }
            match incoming {
                // Only the credential is read before `welcome`.
                Incoming::Text(text) => {
                    if waiting.credential == FirstCredential::Awaited
                        && let Ok(ClientMessage::Auth { token }) = ClientMessage::parse(text)
                    {
                        self.authenticate_first(index, &token);
                    }
                }
                Incoming::Binary(_) => return self.close_for_fault(index, CloseReason::UnsupportedData),
                Incoming::Ping(payload) => {
                    if let Some(connection) = self.connections.at_mut(index) {
                        connection.outbox().write(|out| ws::write_pong(out, payload));
                        self.make_ready(index);
                    }
                }
                Incoming::Pong(_) => {}
                Incoming::Close(given) => return self.answer_close(index, given),
            }
            match self.connections.at_mut(index).map(|connection| &mut connection.state) {
                Some(State::Unauthenticated(waiting)) => waiting.decoder = decoder,
                Some(State::Open(open)) => open.decoder = decoder,
                _ => return,
            }
        }
    }

    /// A first message has brought a token.
    fn authenticate_first(&mut self, index: u32, token: &Secret) {
        let Some(connection) = self.key_of(index) else { return };
        let Some(State::Unauthenticated(waiting)) = self.connections.at_mut(index).map(|c| &mut c.state) else {
            return;
        };
        let addr = waiting.peer;
        let outcome = match self.standing_allows(addr) {
            Err(refusal) => Err(refusal),
            Ok(()) => match self.authenticate(Presented::token(token.clone()), Waiter::FirstMessage(connection)) {
                Authenticated::Now(outcome) => outcome,
                Authenticated::Later(_) => {
                    if let Some(State::Unauthenticated(waiting)) = self.connections.at_mut(index).map(|c| &mut c.state)
                    {
                        waiting.credential = FirstCredential::Looking;
                    }
                    return;
                }
            },
        };
        self.first_message_judged(index, outcome);
    }

    /// The credential of a first message has been looked at.
    pub(super) fn first_message_judged(&mut self, index: u32, outcome: Result<Grant, Refusal>) {
        let Some(State::Unauthenticated(waiting)) = self.connections.at_mut(index).map(|c| &mut c.state) else {
            return;
        };
        let (addr, encoding, request) = (waiting.peer, waiting.encoding, waiting.request.take());
        // Part of a message may have come meanwhile. Where the token came just now, whoever reads has the decoder.
        let decoder = std::mem::take(&mut waiting.decoder);
        let grant = match outcome {
            Ok(grant) => grant,
            Err(refusal) => {
                self.metrics.handshakes.of(HandshakeResult::of_code(refusal.code.as_str())).count();
                let late = is_failure(refusal.code) && self.count_failure(addr) != Standing::Good;
                let reason = match refusal.code {
                    ErrorCode::Overloaded | ErrorCode::SessionStoreUnavailable => CloseReason::Overloaded,
                    ErrorCode::LoggedOut => CloseReason::LoggedOut,
                    ErrorCode::TokenRevoked => CloseReason::TokenRevoked,
                    // Another credential would not help whoever's are not looked at.
                    ErrorCode::RateLimited => CloseReason::RateLimited,
                    _ => CloseReason::InvalidToken,
                };
                return if late { self.close_later(index, reason, decoder) } else { self.close(index, reason) };
            }
        };
        let key = match &request {
            None => None,
            Some(request) => match self.resolve_request(&grant, request) {
                Ok(key) => key,
                Err(refusal) => {
                    self.metrics.handshakes.of(HandshakeResult::of_code(refusal.code.as_str())).count();
                    let missing = matches!(refusal.code, ErrorCode::StreamNotFound | ErrorCode::NotFound);
                    let reason = if missing { CloseReason::NotFound } else { CloseReason::Forbidden };
                    return self.close(index, reason);
                }
            },
        };
        let counted = match self.hold_subject(&grant) {
            Ok(counted) => counted,
            Err(_) => return self.close(index, CloseReason::Overloaded),
        };
        self.open(index, Transport::WebSocket(encoding), grant, counted, request.is_some());
        if let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) {
            open.decoder = decoder;
        }
        match (key, request) {
            (Some(key), Some(request)) => self.open_single(index, &key, &request, None),
            (None, Some(request)) => self.await_opening(index, request),
            (_, None) => {}
        }
    }

    /// Closes a WebSocket whose first message has brought a wrong credential, held back as an answer over HTTP is.
    fn close_later(&mut self, index: u32, reason: CloseReason, decoder: ws::Decoder) {
        let deadline = self.now.at + FAILURE_DELAY;
        if let Some(State::Unauthenticated(waiting)) = self.connections.at_mut(index).map(|c| &mut c.state) {
            waiting.credential = FirstCredential::Refused(reason);
            (waiting.deadline, waiting.decoder) = (deadline, decoder);
            self.arm(index);
        }
    }

    /// Bytes of `/echo`: each message goes back as it came.
    fn echo(&mut self, index: u32, mut bytes: &mut [u8], inflater: &mut Inflater) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        let State::Echo(echo) = &mut connection.state else { return };
        let encoding = echo.encoding;
        let deflates = encoding != Encoding::Plain;
        let mut decoder = std::mem::take(&mut echo.decoder);
        loop {
            let incoming = match decoder.next(&mut bytes, ECHO_LIMITS, deflates.then_some(&mut *inflater)) {
                Ok(Some(incoming)) => incoming,
                Ok(None) => break,
                Err(error) => return self.close_for_fault(index, error.into()),
            };
            let (opcode, payload) = match incoming {
                Incoming::Text(text) => (Opcode::Text, text.as_bytes()),
                Incoming::Binary(data) => (Opcode::Binary, data),
                Incoming::Ping(payload) => (Opcode::Pong, payload),
                Incoming::Pong(_) => continue,
                Incoming::Close(given) => return self.answer_close(index, given),
            };
            // RFC 7692 section 6: control frames are never compressed.
            let encoding = if opcode == Opcode::Pong { Encoding::Plain } else { encoding };
            let Some(connection) = self.connections.at_mut(index) else { return };
            connection.outbox().write(|out| self.encoder.message(opcode, payload, encoding, out));
            self.make_ready(index);
        }
        if let Some(State::Echo(echo)) = self.connections.at_mut(index).map(|connection| &mut connection.state) {
            echo.decoder = decoder;
        }
    }
}
