//! What happens because time has passed: credentials end, heartbeats go out, silence and stalls are noticed.
//!
//! Source: protocol version 1, sections 3 («Heartbeat») and 5 («Expiry»). Memory: one wheel entry a connection. Errors:
//! none. Deadlines of credentials are wall time: each is anchored to the monotonic clock when it is set, and anew when
//! the wall clock is stepped.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use crate::auth::grant::MaybeTime;
use crate::auth::jwks::KeySets;
use crate::auth::jwt::Verifier;
use crate::codec::message::{self, CloseReason};
use crate::codec::ws;
use crate::connection::{FirstCredential, NEVER, Phase, State};
use crate::frame::Transport;
use crate::time::Instant;

use super::{Options, Shard, Timer, sessions};

/// Wheel entries looked at in one turn.
const DUE_PER_TURN: u32 = 4096;
/// How long `/echo` may be silent.
const ECHO_IDLE: Duration = Duration::from_secs(100);

impl Shard {
    pub(super) fn timeout(&mut self) {
        let now = self.now.at;
        while let Some(&Reverse((at, timer))) = self.timers.peek()
            && at <= now
        {
            self.timers.pop();
            match timer {
                Timer::Poll { index, generation } => self.poll_due(index, generation, at),
                Timer::Linger { index, generation } => self.linger_due(index, generation, at),
                Timer::Rated { connection, generation, slot } => self.rated_due(connection, generation, slot),
                Timer::Topic { index } => self.topic_due(index),
                Timer::Places { holder } => self.places_due(holder),
                Timer::Ephemeral { id } => self.ephemeral_due(id),
                Timer::KeepEphemerals => self.keep_ephemerals_due(),
                Timer::LateUpdates => self.late_updates_due(),
            }
        }
        let mut budget = DUE_PER_TURN;
        while let Some(index) = self.wheel.pop_due(now, &mut budget) {
            self.connection_due(index);
        }
        self.sessions_due();
        self.drain_due(now);
    }

    /// Sets the wheel for the earliest thing that a connection must be looked at for.
    pub(super) fn arm(&mut self, index: u32) {
        let now = self.now;
        let leeway = self.options.auth.jwt.leeway;
        let Some(connection) = self.connections.at(index) else { return };
        let mut deadline = match &connection.state {
            State::Http(http) => match &http.phase {
                Phase::Waiting { grant, .. } => {
                    grant.end(leeway).map_or(http.deadline, |end| http.deadline.min(now.instant_of(end)))
                }
                _ => http.deadline,
            },
            State::Unauthenticated(waiting) => waiting.deadline,
            State::Echo(_) => connection.heard + ECHO_IDLE,
            // Looked at again then: the stall clock is the bound of an answer.
            State::Closing(closing) if closing.answering => now.at + self.options.limits.write_stall,
            State::Closing(closing) => closing.deadline,
            State::Open(open) => {
                let end = open.grant.end(leeway).map_or(NEVER, |end| now.instant_of(end));
                let reauthenticate = open.reauthenticate_at.known().map_or(NEVER, |at| now.instant_of(at));
                let opening = open.opening.as_ref().map_or(NEVER, |opening| opening.deadline);
                end.min(reauthenticate).min(open.heartbeat_at).min(opening)
            }
        };
        // One that is ending ends at its deadline, whether its socket takes anything or not.
        if !matches!(&connection.state, State::Closing(closing) if !closing.answering)
            && let Some(since) = connection.outbox.as_ref().and_then(|outbox| outbox.stalled_since)
        {
            deadline = deadline.min(since + self.options.limits.write_stall);
        }
        self.wheel.set(index, deadline);
    }

    fn connection_due(&mut self, index: u32) {
        let now = self.now.at;
        let Some(connection) = self.connections.at_mut(index) else { return };
        let stalled = connection.outbox.as_ref().and_then(|outbox| outbox.stalled_since);
        match &mut connection.state {
            State::Closing(closing) => {
                let over = match closing.answering {
                    true => stalled.is_some_and(|since| since + self.options.limits.write_stall <= now),
                    false => closing.deadline <= now,
                };
                if over {
                    // What our side was ended behind is the kernel's to send: a reset would throw the end of an answer away.
                    let reset = !(closing.http && closing.finished);
                    self.remove(index, reset);
                    return;
                }
            }
            _ if stalled.is_some_and(|since| since + self.options.limits.write_stall <= now) => {
                self.close(index, CloseReason::WriteStall);
                return;
            }
            State::Http(http) => {
                let leeway = self.options.auth.jwt.leeway;
                let ended = match &http.phase {
                    Phase::Waiting { grant, .. } => grant.end(leeway).is_some_and(|end| end <= self.now.wall),
                    _ => false,
                };
                if http.deadline <= now || ended {
                    self.http_due(index);
                    return;
                }
            }
            State::Unauthenticated(waiting) => {
                if waiting.deadline <= now {
                    let reason = match waiting.credential {
                        FirstCredential::Refused(reason) => reason,
                        FirstCredential::Awaited | FirstCredential::Looking => CloseReason::AuthTimeout,
                    };
                    self.close(index, reason);
                    return;
                }
            }
            State::Echo(_) => {
                if connection.heard + ECHO_IDLE <= now {
                    self.close(index, CloseReason::HeartbeatTimeout);
                    return;
                }
            }
            State::Open(_) => {
                self.open_due(index);
            }
        }
        self.arm(index);
    }

    pub(super) fn open_due(&mut self, index: u32) {
        let now = self.now;
        let leeway = self.options.auth.jwt.leeway;
        let heartbeat = self.options.connection.heartbeat;
        let Some(connection) = self.connections.at_mut(index) else { return };
        let heard = connection.heard;
        let State::Open(open) = &mut connection.state else { return };
        if open.grant.end(leeway).is_some_and(|end| end <= now.wall) {
            let reason = sessions::expiry_of(&open.grant);
            if reason == CloseReason::StreamEnded {
                return self.end_watcher(index);
            }
            self.metrics.expiries.count();
            self.close(index, reason);
            return;
        }
        if open.opening.as_ref().is_some_and(|opening| opening.deadline <= now.at) {
            self.close(index, CloseReason::AuthTimeout);
            return;
        }
        if open.reauthenticate_at.known().is_some_and(|at| at <= now.wall) {
            open.reauthenticate_at = MaybeTime::new(None);
            if let Some(expires) = open.grant.expires() {
                let left = u64::try_from(expires.since(now.wall).as_millis()).unwrap_or(u64::MAX);
                self.metrics.reauthenticates.count();
                self.tell(index, "reauthenticate", |out| message::write_reauthenticate(out, expires, left));
            }
        }
        let Some(connection) = self.connections.at_mut(index) else { return };
        let State::Open(open) = &mut connection.state else { return };
        if open.heartbeat_at <= now.at {
            if open.transport != Transport::Sse && heard + heartbeat * 2 <= now.at {
                self.close(index, CloseReason::HeartbeatTimeout);
                return;
            }
            open.heartbeat_at = now.at + heartbeat;
            let transport = open.transport;
            // Also where other bytes wait: a peer that is never asked is never heard, and would be taken for dead. `limits.
            // write_stall` bounds how many heartbeats a socket can leave waiting.
            connection.outbox().write(|out| match transport {
                Transport::WebSocket(_) => ws::write_ping(out, b""),
                Transport::Sse => crate::codec::sse::write_heartbeat(out),
            });
            self.keep_order(index);
            self.make_ready(index);
        }
    }

    /// Looks at a connection again: its deadline is anchored to the clock as it is now, and after a reload its grant and
    /// subscriptions are judged by the new configuration.
    pub(super) fn recheck_connection(&mut self, index: u32) {
        let Some(connection) = self.connections.at(index) else { return };
        if let State::Open(open) = &connection.state {
            if self.rejudge {
                let removed = open.grant.key().is_some_and(|key| !self.verifier.has_key(key));
                if removed && self.options.auth.jwt.close_on_key_removal {
                    self.close(index, CloseReason::KeyRemoved);
                    return;
                }
                if !self.is_rejudged_later(&open.grant) {
                    self.rejudge_subscriptions(index);
                }
            }
            self.open_due(index);
        }
        self.arm(index);
    }

    /// Plans `reauthenticate` for a connection: lead before `exp`, the lesser of `auth.reauth_before` and half the
    /// remaining life, earlier by a random 0 to 10 % of it.
    pub(super) fn plan_reauthenticate(&mut self, index: u32) {
        let now = self.now;
        let before = self.options.auth.reauth_before;
        let tenth = self.rng.below(1_000_000);
        let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) else { return };
        // The token of an ephemeral session has no other that could take its place.
        let renewable = open.grant.only().is_none();
        let at = open.grant.expires().filter(|_| renewable).map(|expires| {
            let lead = before.min(expires.since(now.wall) / 2);
            let early = Duration::from_micros(u64::try_from(lead.as_micros()).unwrap_or(0) / 10 * tenth / 1_000_000);
            expires - lead - early
        });
        open.reauthenticate_at = MaybeTime::new(at);
    }

    /// The configuration was read again: what is live is judged by it, in turns.
    pub(super) fn reload(&mut self, options: Arc<Options>) {
        self.verifier = self.verifier.reconfigured(options.auth.jwt.clone());
        self.options = options;
        self.forget_tokens();
        self.share_bounds();
        self.reload_streams();
        self.sessions_reloaded();
        self.rejudge_waiters();
        self.recheck = Some(0);
        self.rejudge = true;
    }

    /// Key sets were fetched: tokens are judged by them from now on. Connections are looked at again where a key is in force
    /// no more and that is to end them.
    pub(super) fn trust_key_sets(&mut self, sets: Arc<KeySets>) {
        let jwt = self.options.auth.jwt.clone();
        let close_on_key_removal = jwt.close_on_key_removal;
        let before = std::mem::replace(&mut self.verifier, Verifier::with_key_sets(jwt, sets));
        if before.has_keys_beyond(&self.verifier) {
            // What was verified by a key that is gone is not remembered.
            self.forget_tokens();
            if close_on_key_removal {
                self.rejudge_waiters();
                self.recheck = Some(0);
                self.rejudge = true;
            }
        }
    }

    /// An HTTP connection's time is over.
    fn http_due(&mut self, index: u32) {
        let now: Instant = self.now.at;
        let Some(connection) = self.connections.at_mut(index) else { return };
        let answering = connection.outbox.as_ref().is_some_and(|outbox| !outbox.is_empty());
        let State::Http(http) = &mut connection.state else { return };
        match &mut http.phase {
            // Nobody idles whose answer is still on its way: the stall clock is its bound.
            Phase::Head if http.buffer.is_empty() && answering => {
                http.deadline = now + self.options.limits.keep_alive;
                self.arm(index);
            }
            Phase::Head if http.buffer.is_empty() => self.finish_http(index),
            Phase::Head | Phase::Body { .. } => self.request_timed_out(index),
            Phase::Waiting { .. } => self.waited(index),
            Phase::Asking { .. } | Phase::Looking { .. } => self.unanswered(index),
            Phase::Delayed { answer, keep_alive } => {
                let (answer, keep_alive) = (std::mem::take(answer), *keep_alive);
                http.phase = Phase::Head;
                http.deadline = now + self.options.limits.keep_alive;
                self.send_answer(index, answer, keep_alive);
            }
        }
    }
}
