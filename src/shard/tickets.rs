//! Tickets: made for whoever presents a credential, kept until they are used, once.
//!
//! Source: protocol version 1, sections 1 (`POST /v1/tickets`), 2 and 6. With a store that processes share, a ticket is kept
//! there as well, and there it is used up; the process's own table stands in while the store is away.
//! Memory: that table (`ticket_table`). Errors: [`Refusal`]. Not here: a ticket's text and record (`auth::ticket`).

use crate::auth::grant::{CredentialKind, Grant};
use crate::auth::ticket::{self, TicketHash, TicketRecord};
use crate::codec::http::{Head, Response};
use crate::codec::message::ErrorCode;
use crate::connection::handshake::{Page, Refusal};
use crate::connection::{Phase, Reply};
use crate::ids::ConnectionKey;
use crate::limits::{LOOKUP_TIMEOUT, TICKET_LIFE};
use crate::secret::Secret;

use super::Shard;
use super::lookup::{Asked, Found, Looked, Lookup, Purpose, Used, Waiter};
use super::requests::Judged;
use super::ticket_table::{Elsewhere, Over};

fn unknown() -> Refusal {
    Refusal::new(ErrorCode::InvalidToken, "there is no such ticket, or it has been used").because("unknown_ticket")
}

impl Shard {
    /// `POST /v1/tickets`.
    pub(super) fn make_ticket(
        &mut self,
        index: u32,
        head: &Head<'_>,
        page: &Page,
        addr: std::net::IpAddr,
        reply: &Reply,
    ) {
        let grant = match self.judge(index, head, page, addr, None, false) {
            Ok(Judged::Granted(grant)) => grant,
            Ok(Judged::FirstMessage | Judged::Later) => return,
            Err(refusal) => return self.refuse_credential(index, &refusal, reply, addr),
        };
        let made = self.new_ticket(&grant);
        self.rights.release(grant);
        match made {
            Err(refusal) => self.refuse(index, &refusal, reply),
            Ok((used, record)) => {
                let text = self.options.auth.store.then(|| record.to_text()).flatten();
                match text {
                    Some(text) => self.share_ticket(index, used, text, reply),
                    None => self.hand_out(index, &used.ticket, reply),
                }
            }
        }
    }

    /// Makes a ticket for `grant`, and keeps it here.
    fn new_ticket(&mut self, grant: &Grant) -> Result<(Used, TicketRecord), Refusal> {
        if grant.kind() == CredentialKind::Ticket {
            return Err(Refusal::new(ErrorCode::Forbidden, "a ticket makes no further ticket"));
        }
        let mut random = [0u8; 32];
        for half in random.chunks_exact_mut(16) {
            half.copy_from_slice(&self.rng.u128().to_le_bytes());
        }
        let ticket = ticket::of_random(random);
        let hash = TicketHash::of(ticket.expose_secret()).expect("a ticket of ours is one");
        let tickets = self.ledger.tickets();
        let ends = self.now.wall + TICKET_LIFE;
        let record = TicketRecord { maker: tickets.maker, ends, grant: grant.to_record(self.session_id(grant)) };
        match tickets.keep(hash, record.clone(), self.subject(grant), self.now.at) {
            Ok(()) => Ok((Used { hash, ticket }, record)),
            Err(Over::Process) => {
                Err(Refusal::new(ErrorCode::Overloaded, "as many tickets as there may be").retry_after(5))
            }
            Err(Over::Subject) => {
                let detail = "the subject has made as many tickets as it may at once";
                Err(Refusal::new(ErrorCode::RateLimited, detail).retry_after(TICKET_LIFE.as_secs()))
            }
        }
    }

    /// Keeps a ticket where other processes find it, before it is handed out.
    fn share_ticket(&mut self, index: u32, used: Used, text: Secret, reply: &Reply) {
        let Some(connection) = self.key_of(index) else { return };
        let lookup = Lookup::KeepTicket { hash: used.hash.to_string(), record: text, life: TICKET_LIFE };
        let ticket = used.ticket.clone();
        let Ok(ask) = self.look_up(lookup, Asked::Kept(connection, used)) else {
            return self.hand_out(index, &ticket, reply);
        };
        let deadline = self.now.at + LOOKUP_TIMEOUT;
        if let Some(http) = self.http_mut(index) {
            http.phase = Phase::Asking { ask, reply: reply.clone() };
            http.deadline = deadline;
            self.arm(index);
        }
    }

    /// The store has kept a ticket, or not.
    pub(super) fn ticket_kept(&mut self, connection: ConnectionKey, ask: u64, used: &Used, found: &Found) {
        let elsewhere = if matches!(found, Found::Kept) { Elsewhere::Kept } else { Elsewhere::Unsure };
        self.ledger.tickets().set_elsewhere(used.hash, elsewhere);
        let Some(index) = self.still(connection) else { return };
        let waits = |phase: &Phase| matches!(phase, Phase::Asking { ask: asked, .. } if *asked == ask);
        if self.http_mut(index).is_some_and(|http| waits(&http.phase)) {
            let reply = self.forget_exchange(index);
            self.hand_out(index, &used.ticket, &reply);
        }
    }

    fn hand_out(&mut self, index: u32, ticket: &Secret, reply: &Reply) {
        let text = String::from_utf8_lossy(ticket.expose_secret());
        // A ticket's characters stand for themselves in JSON.
        let body = format!("{{\"ticket\":\"{text}\",\"expires_in_s\":{}}}\n", TICKET_LIFE.as_secs());
        let response =
            Response::new(201).header("Cache-Control", "no-store").body("application/json", body.into_bytes());
        self.metrics.tickets_made.count();
        self.respond(index, response, reply);
    }

    /// A ticket is presented.
    pub(super) fn look_at_ticket(&mut self, ticket: &Secret, waiter: Waiter) -> Looked {
        let Some(hash) = TicketHash::of(ticket.expose_secret()) else { return Looked::Now(waiter, Err(unknown())) };
        let elsewhere = self.ledger.tickets().elsewhere(hash, self.now.at);
        if elsewhere == Some(Elsewhere::No) || !self.options.auth.store {
            return match self.ledger.tickets().take(hash, self.now.at) {
                Some(record) => self.ticket_used(record, waiter),
                None => Looked::Now(waiter, Err(unknown())),
            };
        }
        if let Err(refusal) = self.may_look_up() {
            return Looked::Now(waiter, Err(refusal));
        }
        let used = Used { hash, ticket: Secret::default() };
        Looked::Later(self.look_up_surely(Lookup::TakeTicket(hash.to_string()), Asked::Ticket(waiter, used)))
    }

    /// The store has been asked for a ticket, which is thereby used up.
    pub(super) fn ticket_found(&mut self, waiter: Waiter, used: Used, found: Found) -> Looked {
        let now = self.now.at;
        let tickets = self.ledger.tickets();
        let record = match found {
            Found::Ticket(Some(text)) => match TicketRecord::parse(text.expose_secret()) {
                // One of ours was here as well, unless it has been used while the store was away.
                Some(record) if record.maker == tickets.maker => tickets.take(used.hash, now),
                other => other,
            },
            // Used up by another, unless it never was there.
            Found::Ticket(None) if tickets.elsewhere(used.hash, now) != Some(Elsewhere::Unsure) => None,
            Found::Ticket(None) => tickets.take(used.hash, now),
            _ => match tickets.take(used.hash, now) {
                Some(record) => Some(record),
                None => {
                    let detail = "the store of tickets does not answer";
                    let refusal = Refusal::new(ErrorCode::SessionStoreUnavailable, detail).retry_after(2);
                    return Looked::Now(waiter, Err(refusal.because("session_store_unavailable")));
                }
            },
        };
        match record {
            Some(record) => self.ticket_used(record, waiter),
            None => Looked::Now(waiter, Err(unknown())),
        }
    }

    /// What a ticket that has just been used up grants.
    fn ticket_used(&mut self, record: TicketRecord, waiter: Waiter) -> Looked {
        if record.ends <= self.now.wall {
            return Looked::Now(waiter, Err(unknown()));
        }
        let jwt = &self.options.auth.jwt;
        if jwt.close_on_key_removal && record.grant.key.is_some_and(|key| !self.verifier.has_key(key)) {
            let detail = "the key that signed the ticket's token was removed";
            return Looked::Now(waiter, Err(Refusal::new(ErrorCode::InvalidToken, detail).because("unknown_kid")));
        }
        if let Some(mark) = &record.grant.api_key {
            let granted = self.api_key_ticket_grant(mark);
            if granted.is_ok() {
                self.metrics.tickets_used.count();
            }
            return Looked::Now(waiter, granted);
        }
        if let Some(sid) = record.grant.session.clone() {
            return self.ask_for_session(sid, waiter, Purpose::Ticket(Box::new(record.grant)));
        }
        let grant = Grant::of_record(record.grant, &mut self.rights);
        if grant.end(self.options.auth.jwt.leeway).is_some_and(|end| end <= self.now.wall) {
            self.rights.release(grant);
            let refusal = Refusal::new(ErrorCode::TokenExpired, "what the ticket was made for has expired");
            return Looked::Now(waiter, Err(refusal.because("expired")));
        }
        let outcome = self.judge_token(grant);
        if outcome.is_ok() {
            self.metrics.tickets_used.count();
        }
        Looked::Now(waiter, outcome)
    }
}
