//! How connections end: the last frame, our end of the socket, the peer's, or a reset.
//!
//! Source: protocol version 1, section 5; RFC 6455 section 7. Memory: none. Errors: none: every path ends.

use crate::codec::deflate::Inflater;
use crate::codec::message::{self, CloseReason, ErrorCode};
use crate::codec::ws;
use crate::connection::handshake::Refusal;
use crate::connection::{Closing, Farewell, Phase, State};
use crate::frame::{self, Transport};
use crate::ids::ConnectionKey;
use crate::limits;
use crate::metrics::{Close, ConnectionKind};
use crate::time::Instant;

use super::{Draining, Output, Shard};

/// Connections told to go, or judged anew, in one turn.
const CONNECTIONS_PER_TURN: u32 = 256;

/// Why a connection is not served at all: what the shell sends before it closes the socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CannedAnswer {
    /// 503: as many connections as there may be.
    TooManyConnections,
    /// 429: as many from that address as there may be.
    TooManyFromAddress,
    /// 503: the process is to end.
    Draining,
}

impl CannedAnswer {
    /// The whole answer.
    pub fn bytes(self) -> Vec<u8> {
        let (status, code, detail, seconds) = match self {
            CannedAnswer::TooManyConnections => {
                (503, ErrorCode::TooManyConnections, "the server holds as many connections as it may", "5")
            }
            CannedAnswer::TooManyFromAddress => {
                (429, ErrorCode::TooManyConnections, "as many connections from this address as there may be", "5")
            }
            CannedAnswer::Draining => (503, ErrorCode::Draining, "the server is about to end", "2"),
        };
        let mut out = Vec::new();
        let answer = crate::codec::http::Response::problem(status, code.as_str(), detail);
        answer.header("Retry-After", seconds).close(true).write(&mut out);
        out
    }
}

impl Shard {
    /// Ends a connection for `reason`: from now on it gets no stream frame of which nothing has left yet. Where it is
    /// ending already, the more important cause is told, as long as none has been.
    pub(super) fn close(&mut self, index: u32, reason: CloseReason) {
        let deadline = self.now.at + limits::CLOSE_GRACE;
        let farewell = match self.connections.at_mut(index).map(|connection| &mut connection.state) {
            None => return,
            Some(State::Closing(closing)) => {
                if closing.farewell != Farewell::Said && closing.cause.is_some_and(|old| reason.rank() < old.rank()) {
                    closing.cause = Some(reason);
                }
                return;
            }
            Some(State::Http(_)) => {
                self.end_http(index, reason);
                return;
            }
            Some(State::Open(open)) if open.transport == Transport::Sse => Farewell::CloseEvent,
            Some(State::Open(_) | State::Unauthenticated(_) | State::Echo(_)) => Farewell::CloseFrame,
        };
        self.leave(index);
        let Some(connection) = self.connections.at_mut(index) else { return };
        if let Some(outbox) = &mut connection.outbox {
            outbox.drop_unsent_frames();
        }
        let deflate = connection.deflates();
        let decoder = match &mut connection.state {
            State::Open(open) => std::mem::take(&mut open.decoder),
            State::Unauthenticated(open) => std::mem::take(&mut open.decoder),
            State::Echo(echo) => std::mem::take(&mut echo.decoder),
            State::Http(_) | State::Closing(_) => ws::Decoder::new(),
        };
        let cause = Some(reason);
        let closing = Closing {
            deadline,
            http: false,
            cause,
            farewell,
            decoder,
            deflate,
            answering: false,
            finished: false,
            peer_done: false,
        };
        let left = std::mem::replace(&mut connection.state, State::Closing(Box::new(closing)));
        self.release_rights(left);
        self.make_ready(index);
        self.arm(index);
    }

    pub(super) fn count_close(&self, reason: CloseReason) {
        self.metrics.closes.of(Close::of(reason.code(), reason.reason())).count();
    }

    pub(super) fn count_open(&self, transport: Transport, rise: bool) {
        let kind = match transport {
            Transport::WebSocket(_) => ConnectionKind::WebSocket,
            Transport::Sse => ConnectionKind::Sse,
        };
        let gauge = self.metrics.connections.of(kind);
        if rise { gauge.rise() } else { gauge.fall() }
    }

    /// Gives back what an open connection held besides its place.
    fn leave(&mut self, index: u32) {
        self.unsubscribe_all(index);
        self.release_subject(index);
        if let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) {
            let (transport, session) = (open.transport, open.grant.session());
            let only = open.grant.only().map(|only| only.session);
            self.leave_session(session, index);
            self.leave_ephemeral(only, index);
            self.count_open(transport, false);
        }
    }

    /// Gives back what a connection's grant shared with others.
    fn release_rights(&mut self, left: State) {
        if let State::Open(open) = left {
            self.rights.release(open.grant);
        }
    }

    /// Ends a WebSocket whose peer does not keep to RFC 6455. Nothing it sends is read any more (section 7.1.7), so no close
    /// frame is awaited: it may have sent its own already, a bad one.
    pub(super) fn close_for_fault(&mut self, index: u32, reason: CloseReason) {
        self.close_with_code(index, Some(reason.code()), reason.reason());
    }

    /// Ends a WebSocket by `code`, for a fault of the peer's or to answer its close: its end of the socket is all that is
    /// waited for.
    pub(super) fn close_with_code(&mut self, index: u32, code: Option<u16>, reason: &str) {
        let deadline = self.now.at + limits::CLOSE_GRACE;
        if let Some(State::Closing(_) | State::Http(_)) | None = self.connections.at(index).map(|c| &c.state) {
            return;
        }
        self.leave(index);
        self.metrics.closes.of(Close::of(code.unwrap_or(1000), reason)).count();
        let Some(connection) = self.connections.at_mut(index) else { return };
        let outbox = connection.outbox();
        outbox.drop_unsent_frames();
        outbox.write(|out| match code {
            Some(code) => ws::write_close(out, code, reason),
            None => ws::write_close_without_code(out),
        });
        let farewell = Farewell::Said;
        let decoder = ws::Decoder::new();
        let closing = Closing {
            deadline,
            http: false,
            cause: None,
            farewell,
            decoder,
            deflate: false,
            answering: false,
            finished: false,
            peer_done: true,
        };
        let left = std::mem::replace(&mut connection.state, State::Closing(Box::new(closing)));
        self.release_rights(left);
        self.make_ready(index);
        self.arm(index);
    }

    /// After an answer that is the connection's last.
    pub(super) fn finish_http(&mut self, index: u32) {
        let deadline = self.now.at + limits::CLOSE_GRACE;
        let Some(connection) = self.connections.at_mut(index) else { return };
        let answering = connection.outbox.as_ref().is_some_and(|outbox| !outbox.is_empty());
        let closing = Closing {
            deadline,
            http: true,
            cause: None,
            farewell: Farewell::Said,
            decoder: ws::Decoder::new(),
            deflate: false,
            answering,
            finished: false,
            peer_done: true,
        };
        connection.state = State::Closing(Box::new(closing));
        self.resume_reading(index);
        self.make_ready(index);
        self.arm(index);
    }

    /// Ends a connection that speaks HTTP: one that waits gets an answer.
    fn end_http(&mut self, index: u32, reason: CloseReason) {
        let Some(State::Http(http)) = self.connections.at_mut(index).map(|connection| &mut connection.state) else {
            return;
        };
        if matches!(http.phase, Phase::Head) && http.buffer.is_empty() {
            self.finish_http(index);
            return;
        }
        let code = match reason {
            CloseReason::Draining => ErrorCode::Draining,
            CloseReason::Forbidden => ErrorCode::Forbidden,
            CloseReason::StreamEnded | CloseReason::NotFound => ErrorCode::StreamEnded,
            CloseReason::TokenExpired | CloseReason::ApiKeyExpired => ErrorCode::TokenExpired,
            CloseReason::SessionExpired => ErrorCode::SessionExpired,
            CloseReason::LoggedOut => ErrorCode::LoggedOut,
            CloseReason::TokenRevoked | CloseReason::ApiKeyRevoked => ErrorCode::TokenRevoked,
            CloseReason::KeyRemoved | CloseReason::InvalidToken => ErrorCode::InvalidToken,
            _ => ErrorCode::Overloaded,
        };
        let mut refusal = Refusal::new(code, code.meaning());
        if refusal.status == 503 {
            refusal = refusal.retry_after(2);
        }
        let mut reply = self.forget_exchange(index);
        reply.keep_alive = false;
        self.refuse(index, &refusal, &reply);
    }

    /// Writes the close frame or event of an ending connection, if it is still to be written.
    pub(super) fn say_farewell(&mut self, index: u32) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        let State::Closing(closing) = &mut connection.state else { return };
        let (Some(reason), farewell) = (closing.cause, closing.farewell) else { return };
        closing.farewell = Farewell::Said;
        match farewell {
            Farewell::Said => return,
            Farewell::CloseFrame => {
                connection.outbox().write(|out| ws::write_close(out, reason.code(), reason.reason()));
            }
            Farewell::CloseEvent => {
                // Nothing more is awaited of an SSE peer than its end of the socket.
                closing.peer_done = true;
                let mut text = Vec::new();
                message::write_close(&mut text, reason);
                connection.outbox().write(|out| frame::write_control(Transport::Sse, "close", &text, out));
            }
        }
        self.count_close(reason);
    }

    /// Everything a connection was to get has been sent.
    pub(super) fn all_sent(&mut self, index: u32) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        match &mut connection.state {
            State::Closing(closing) if closing.peer_done && !closing.finished => {
                closing.finished = true;
                if std::mem::take(&mut closing.answering) {
                    closing.deadline = self.now.at + limits::CLOSE_GRACE;
                }
                let over = connection.peer_ended;
                self.outputs.push_back(Output::Finish { connection: index });
                if over {
                    return self.remove(index, false);
                }
                self.arm(index);
            }
            State::Http(_) => self.serve_http(index),
            _ => {}
        }
        self.resume_reading(index);
    }

    /// Bytes from the peer of an ending connection: only its close frame is looked for.
    pub(super) fn closing_bytes(&mut self, index: u32, mut bytes: &mut [u8], inflater: &mut Inflater) {
        let message_limits = self.message_limits();
        let Some(State::Closing(closing)) = self.connections.at_mut(index).map(|connection| &mut connection.state)
        else {
            return;
        };
        if closing.peer_done {
            return;
        }
        loop {
            let inflater = closing.deflate.then_some(&mut *inflater);
            match closing.decoder.next(&mut bytes, message_limits, inflater) {
                Ok(Some(ws::Incoming::Close(_))) | Err(_) => break,
                Ok(Some(_)) => {}
                Ok(None) => return,
            }
        }
        closing.peer_done = true;
        self.make_ready(index);
    }

    /// The peer will send nothing more.
    pub(super) fn peer_finished(&mut self, index: u32) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        connection.peer_ended = true;
        match &mut connection.state {
            State::Http(http) => match &mut http.phase {
                Phase::Head => self.finish_http(index),
                // RFC 9112 9.6: who ends its side may still read. The answer is the last; a mere change is not waited for.
                Phase::Waiting { preferred_s: None, reply, .. } | Phase::Asking { reply, .. } => {
                    reply.keep_alive = false
                }
                Phase::Delayed { keep_alive, .. } => *keep_alive = false,
                // The request is carried out when its credential has been looked at, and knows by then.
                Phase::Looking { .. } => {}
                Phase::Waiting { .. } | Phase::Body { .. } => self.remove(index, false),
            },
            State::Closing(closing) => {
                closing.peer_done = true;
                if closing.finished {
                    self.remove(index, false);
                } else {
                    self.make_ready(index);
                }
            }
            // A WebSocket without a close frame, an event stream whose reader went away.
            _ => {
                self.metrics.closes.of(Close::Gone).count();
                self.remove(index, false);
            }
        }
    }

    /// A connection is gone.
    pub(super) fn lose(&mut self, index: u32) {
        if self.connections.at(index).is_some_and(|c| !matches!(c.state, State::Closing(_) | State::Http(_))) {
            self.metrics.closes.of(Close::Gone).count();
        }
        self.remove(index, true);
    }

    /// Takes a connection out of the table. Its readers go first, so that nothing can be sent to whoever gets its
    /// descriptor next.
    pub(super) fn remove(&mut self, index: u32, reset: bool) {
        self.leave(index);
        drop(self.forget_exchange(index));
        let Some(connection) = self.connections.remove(index) else { return };
        if let State::Closing(closing) = &connection.state
            && closing.farewell != Farewell::Said
            && let Some(reason) = closing.cause
        {
            // Its socket took nothing any more, not even that; it was closed for this reason all the same.
            self.count_close(reason);
        }
        self.wheel.clear(index);
        self.ledger.close_connection();
        if let Some(holder) = connection.address {
            self.ledger.release_connection(holder, self.now.at);
        }
        self.release_rights(connection.state);
        self.outputs.push_back(Output::Close { connection: index, reset });
        if self.draining.is_some() {
            self.tell_drained();
        }
    }

    /// The process is to end: connections are told in bounded turns.
    pub(super) fn begin_drain(&mut self) {
        if self.draining.is_none() {
            // Even where nobody is given time to reconnect, everybody is told.
            let until = self.now.at + self.options.connection.drain.max(limits::CLOSE_GRACE);
            self.draining = Some(Draining { next: 0, until, told: false });
            self.tell_drained();
        }
    }

    /// Actions that were begun are waited for as long as there is time, for what they change has been asked for.
    pub(super) fn tell_drained(&mut self) {
        let now = self.now.at;
        if let Some(draining) = &mut self.draining
            && self.connections.is_empty()
            && (self.acting.is_empty() || draining.until <= now)
            && !draining.told
        {
            draining.told = true;
            self.outputs.push_back(Output::Drained);
        }
    }

    /// Whether connections are still to be told to go, or to be judged anew.
    pub(super) fn drains_now(&self) -> bool {
        let told = self.draining.is_some_and(|draining| draining.next < self.connections.places());
        told || self.recheck.is_some() || !self.rekeyed.is_empty() || !self.moved.is_empty()
    }

    /// Whether no new connection is to be served.
    pub fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    /// When the drain's time is over, if there is one.
    pub fn drains_until(&self) -> Option<Instant> {
        self.draining.map(|draining| draining.until)
    }

    /// One turn of telling connections to go, and of looking at their deadlines and rights again.
    pub(super) fn drain_turn(&mut self) {
        if let Some(next) = self.recheck {
            let end = next.saturating_add(CONNECTIONS_PER_TURN).min(self.connections.places());
            for index in next..end {
                self.recheck_connection(index);
            }
            self.recheck = (end < self.connections.places()).then_some(end);
            self.rejudge &= self.recheck.is_some();
        }
        for _ in 0..CONNECTIONS_PER_TURN {
            let Some(key) = self.rekeyed.pop_front() else { break };
            self.judge_by_api_keys(key);
        }
        for _ in 0..CONNECTIONS_PER_TURN {
            let Some(key) = self.moved.pop_front() else { break };
            self.move_subscriptions(key);
        }
        let Some(draining) = self.draining else { return };
        let end = draining.next.saturating_add(CONNECTIONS_PER_TURN).min(self.connections.places());
        for index in draining.next..end {
            self.send_away(index);
        }
        if let Some(draining) = &mut self.draining {
            draining.next = draining.next.max(end);
        }
    }

    fn send_away(&mut self, index: u32) {
        let window_ms = u64::try_from(self.options.connection.drain.as_millis()).unwrap_or(u64::MAX);
        let after_ms = self.rng.below(window_ms);
        let Some(connection) = self.connections.at_mut(index) else { return };
        if let State::Open(open) = &connection.state {
            if open.transport == Transport::Sse {
                connection.outbox().write(|out| crate::codec::sse::write_retry(out, after_ms));
            }
            self.tell(index, "reconnect", |out| message::write_reconnect(out, after_ms));
        } else if let State::Unauthenticated(_) = &connection.state {
            // It has not been welcomed, but is to come back like the others.
            let mut text = Vec::new();
            message::write_reconnect(&mut text, after_ms);
            connection.outbox().write(|out| ws::write_text(out, &text));
        }
        self.close(index, CloseReason::Draining);
    }

    /// The window of a drain is over: whoever is left is reset.
    pub(super) fn drain_due(&mut self, now: Instant) {
        if self.draining.is_some_and(|draining| draining.until <= now && !draining.told) {
            for index in 0..self.connections.places() {
                self.remove(index, true);
            }
            self.tell_drained();
        }
    }

    /// The connection at `index`, if it is still the one of that key.
    pub(super) fn still(&self, key: ConnectionKey) -> Option<u32> {
        self.is_live(key).then_some(key.index)
    }
}
