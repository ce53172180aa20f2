//! Renewal of live SSE connections: `POST /v1/connections/{connection}/auth`, wherever the connection is: on this core, on
//! another of this process, or in another process that shares the Redis.
//!
//! Source: protocol version 1, sections 1 and 6. Memory: an entry for each request that waits for another core or process.
//! Errors: [`Refusal`]. Not here: the request's body (`requests`), what goes between processes (`auth::renewal`), how it
//! gets there (`runtime::redis`).
//!
//! The connection's name says where it is. The core that holds it judges the token, whoever brought it: its keys, its marks,
//! its count of refusals. Another process is brought the token sealed under the name's random bits.

use std::net::IpAddr;

use crate::auth::grant::Grant;
use crate::auth::renewal::{RenewalAnswer, RenewalAsk};
use crate::auth::sealed::{self, SALT_BYTES};
use crate::codec::http::Response;
use crate::codec::message::{self, ErrorCode};
use crate::connection::handshake::{Presented, Refusal};
use crate::connection::{Phase, Reply};
use crate::frame::Transport;
use crate::ids::ConnectionId;
use crate::limits;
use crate::metrics::AuthUpdateResult;
use crate::secret::Secret;

use super::ledger::Standing;
use super::lookup::{Asked, Asker, Authenticated, Found, Lookup, Order, PeerAsk, PeerRenewal, Waiter};
use super::requests::{ASK_TIMEOUT, FAILURE_DELAY, is_failure};
use super::{Mail, Output, Shard};

fn unknown() -> Refusal {
    Refusal::new(ErrorCode::UnknownConnection, "there is no such connection")
}

fn unanswered() -> Refusal {
    let detail = "the process that holds the connection does not answer";
    Refusal::new(ErrorCode::SessionStoreUnavailable, detail).retry_after(2)
}

impl Shard {
    /// The name of a connection with these bits, at that place.
    pub(super) fn name_of(&self, index: u32, random: u128) -> ConnectionId {
        ConnectionId { random, process: self.ledger.process(), core: self.core, index }
    }

    /// A request to renew `connection` has come, with its body: whoever holds the connection is asked.
    pub(super) fn ask_to_renew(
        &mut self,
        index: u32,
        connection: Option<ConnectionId>,
        token: Secret,
        addr: IpAddr,
        reply: Reply,
    ) {
        let Some(connection) = connection else { return self.refuse(index, &unknown(), &reply) };
        if connection.process != self.ledger.process() {
            return self.ask_peer_to_renew(index, connection, token, addr, reply);
        }
        if connection.core.0 >= self.cores {
            return self.refuse(index, &unknown(), &reply);
        }
        let (deadline, Some(key)) = (self.now.at + ASK_TIMEOUT, self.key_of(index)) else { return };
        self.ask_no += 1;
        let ask = self.ask_no;
        if let Some(http) = self.http_mut(index) {
            http.phase = Phase::Asking { ask, reply };
            http.deadline = deadline;
        }
        self.asks.insert(ask, key);
        let mail = Mail::Renew { connection, token, addr, from: self.core, ask };
        self.send(connection.core, mail);
    }

    /// The same where another process holds it, or did.
    fn ask_peer_to_renew(&mut self, index: u32, connection: ConnectionId, token: Secret, addr: IpAddr, reply: Reply) {
        if !self.options.auth.store {
            return self.refuse(index, &unknown(), &reply);
        }
        // What is no token would come back as such; what is too long for one does not travel.
        if token.len() > limits::TOKEN_BYTES_MAX {
            let refusal = Refusal::new(ErrorCode::InvalidToken, "the token is too long").because("too_large");
            return self.refuse_credential(index, &refusal, &reply, addr);
        }
        let Some(waiting) = self.key_of(index) else { return };
        let salt: [u8; SALT_BYTES] = self.rng.u128().to_le_bytes();
        let sealed = RenewalAsk { token, addr, at: self.now.wall }.seal(connection.random, salt);
        let ConnectionId { process, core, index: place, random } = connection;
        let asked = Asked::Renewal(PeerRenewal { waiting, addr, random, salt });
        match self.standing_allows(addr).and_then(|()| self.may_look_up()) {
            Err(refusal) => self.refuse(index, &refusal, &reply),
            Ok(()) => {
                let ask = self.look_up_surely(Lookup::Renew { process, core, index: place, sealed }, asked);
                let deadline = self.now.at + limits::LOOKUP_TIMEOUT;
                if let Some(http) = self.http_mut(index) {
                    http.phase = Phase::Asking { ask, reply };
                    http.deadline = deadline;
                    self.arm(index);
                }
            }
        }
    }

    /// The process that holds the connection has answered, or it cannot be said.
    pub(super) fn peer_has_renewed(&mut self, ask: u64, renewal: &PeerRenewal, found: Found) {
        let (outcome, mut late) = match found {
            Found::Renewed(None) => (Err(unknown()), false),
            Found::Renewed(Some(sealed)) => match RenewalAnswer::open(renewal.random, renewal.salt, &sealed) {
                Some(answer) => read_answer(answer),
                None => (Err(unanswered()), false),
            },
            _ => (Err(unanswered()), false),
        };
        if let Err(refusal) = &outcome
            && is_failure(refusal.code)
        {
            late |= self.count_failure(renewal.addr) != Standing::Good;
        }
        let Some(index) = self.still(renewal.waiting) else { return };
        let waits = |phase: &Phase| matches!(phase, Phase::Asking { ask: asked, .. } if *asked == ask);
        if self.http_mut(index).is_some_and(|http| waits(&http.phase)) {
            self.answer_renewal(index, outcome, late);
        }
    }

    /// Another core has answered.
    pub(super) fn renewed(&mut self, ask: u64, outcome: Result<Vec<u8>, Refusal>, late: bool) {
        if let Some(index) = self.asks.remove(&ask).and_then(|key| self.still(key)) {
            self.answer_renewal(index, outcome, late);
        }
    }

    fn answer_renewal(&mut self, index: u32, outcome: Result<Vec<u8>, Refusal>, late: bool) {
        let reply = self.forget_exchange(index);
        match outcome {
            Ok(body) => {
                let response = Response::new(200).header("Cache-Control", "no-store").body("application/json", body);
                self.respond(index, response, &reply);
            }
            Err(refusal) if late => self.refuse_later(index, &refusal, &reply, FAILURE_DELAY),
            Err(refusal) => self.refuse(index, &refusal, &reply),
        }
    }

    /// Another process asks to renew the connection at that place. Nobody who does not know its name can have sealed it.
    pub(super) fn peer_asks_to_renew(&mut self, index: u32, sealed: &[u8], ask: PeerAsk) {
        let open = self.connections.at(index).and_then(|connection| connection.open());
        let asked = open
            .filter(|open| open.transport == Transport::Sse)
            .map(|open| u128::from_ne_bytes(open.random))
            .and_then(|random| Some((random, sealed::salt(sealed)?, RenewalAsk::open(random, sealed)?)));
        let Some((random, salt, asked)) = asked else {
            return self.outputs.push_back(Output::Order(Order::Answer { to: ask, sealed: None }));
        };
        // An old one was kept by somebody, or a clock is wrong: whoever asks is not told that there is no such connection.
        // One that comes again would undo what came between, or have one refusal counted five times.
        if asked.is_of(self.now.wall) && self.heard.is_first(salt, self.now.at) {
            let asker = Asker::Peer { ask, salt, until: self.now.at + limits::PEER_RENEWAL_TIME };
            self.renew(self.name_of(index, random), &asked.token, asked.addr, asker);
        }
    }

    /// To this core: renew the credential of a live SSE connection.
    pub(super) fn renew(&mut self, id: ConnectionId, token: &Secret, addr: IpAddr, asker: Asker) {
        let outcome = match self.sse_connection(id).and_then(|_| self.standing_allows(addr)) {
            Err(refusal) => Err(refusal),
            Ok(()) => {
                let waiter = Waiter::Renewal { connection: id, addr, asker };
                match self.authenticate(Presented::token(token.clone()), waiter) {
                    Authenticated::Now(outcome) => return self.renewal_judged(id, addr, asker, outcome),
                    Authenticated::Later(_) => return,
                }
            }
        };
        self.tell_renewal(id, asker, outcome, false);
    }

    /// The new credential of a live SSE connection has been looked at.
    pub(super) fn renewal_judged(
        &mut self,
        id: ConnectionId,
        addr: IpAddr,
        asker: Asker,
        outcome: Result<Grant, Refusal>,
    ) {
        if let Asker::Peer { until, .. } = asker
            && self.now.at > until
        {
            if let Ok(grant) = outcome {
                self.rights.release(grant);
            }
            return self.tell_renewal(id, asker, Err(unanswered()), false);
        }
        let mut late = false;
        let outcome = self.sse_connection(id).and_then(|index| match outcome {
            Ok(grant) => {
                let mut body = Vec::new();
                self.regrant(index, grant, |_, _, expires, permissions| {
                    let permissions = permissions.iter().map(|permission| &**permission);
                    message::write_auth_ok(&mut body, None, expires, permissions);
                })
                .inspect_err(|_| self.count_refusal(index))?;
                Ok(body)
            }
            Err(refusal) => {
                self.metrics.auth_updates.of(AuthUpdateResult::Rejected).count();
                if is_failure(refusal.code) {
                    late = self.count_failure(addr) != Standing::Good;
                    self.count_refusal(index);
                }
                Err(refusal)
            }
        });
        self.tell_renewal(id, asker, outcome, late);
    }

    /// Tells whoever has asked for it what became of a renewal.
    fn tell_renewal(&mut self, id: ConnectionId, asker: Asker, outcome: Result<Vec<u8>, Refusal>, late: bool) {
        match asker {
            Asker::Core(from, ask) => self.send(from, Mail::Renewed { ask, outcome, late }),
            Asker::Peer { ask, salt, .. } => {
                let answer = written_answer(outcome, late);
                let sealed = answer.seal(id.random, salt, self.rng.u128().to_le_bytes());
                self.outputs.push_back(Output::Order(Order::Answer { to: ask, sealed: Some(sealed) }));
            }
        }
    }

    fn sse_connection(&self, id: ConnectionId) -> Result<u32, Refusal> {
        let open = self.connections.at(id.index).and_then(|connection| connection.open());
        let held = open.is_some_and(|open| open.random == id.random.to_ne_bytes() && open.transport == Transport::Sse);
        if held && id.core == self.core { Ok(id.index) } else { Err(unknown()) }
    }
}

fn written_answer(outcome: Result<Vec<u8>, Refusal>, late: bool) -> RenewalAnswer {
    match outcome {
        Ok(body) => RenewalAnswer {
            status: 200,
            code: None,
            text: String::from_utf8_lossy(&body).into_owned(),
            retry_after_s: None,
            late,
        },
        Err(refusal) => RenewalAnswer {
            status: refusal.status,
            code: Some(refusal.code.as_str().to_owned()),
            text: refusal.detail.into_owned(),
            retry_after_s: refusal.retry_after_s,
            late,
        },
    }
}

/// The answer of another process, and whether it is held back.
fn read_answer(answer: RenewalAnswer) -> (Result<Vec<u8>, Refusal>, bool) {
    let RenewalAnswer { status, code, text, retry_after_s, late } = answer;
    let code = code.and_then(|text| ErrorCode::ALL.iter().copied().find(|code| code.as_str() == text));
    let outcome = match (status, code) {
        (200, None) => Ok(text.into_bytes()),
        (400.., Some(code)) => {
            let mut refusal = Refusal::new(code, text).with_status(status);
            refusal.retry_after_s = retry_after_s;
            Err(refusal)
        }
        // A later version's, perhaps.
        _ => Err(unanswered()),
    };
    (outcome, late)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_another_process_is_the_answer_it_would_have_given() {
        let refusal = Refusal::new(ErrorCode::RateLimited, "too many").with_status(429).retry_after(60);
        for (outcome, late) in [(Ok(b"{\"a\":1}".to_vec()), false), (Err(refusal), true)] {
            assert_eq!(read_answer(written_answer(outcome.clone(), late)), (outcome, late));
        }
        let odd = |status, code: Option<&str>| RenewalAnswer {
            status,
            code: code.map(str::to_owned),
            text: String::new(),
            retry_after_s: None,
            late: false,
        };
        for odd in [odd(200, Some("FORBIDDEN")), odd(403, None), odd(403, Some("OF_A_LATER_VERSION")), odd(302, None)] {
            assert_eq!(read_answer(odd), (Err(unanswered()), false));
        }
    }
}
