//! Tickets: made for whoever presents a credential, kept until they are used, once.
//!
//! Source: protocol version 1, sections 1 (`POST /v1/tickets`), 2 and 6. A ticket is kept in one place, where it is used up: in
//! the store that processes share, where there is one and it says that it has it; else in the process's own table, under a
//! text that the store has never heard of and that names the process. So it is used once, whoever is cut from whom.
//! Memory: that table (`ticket_table`). Errors: [`Refusal`]. Not here: a ticket's text and record (`auth::ticket`).

use crate::auth::grant::{CredentialKind, Grant};
use crate::auth::ticket::{self, Keeper, TicketHash, TicketRecord};
use crate::codec::http::{Head, Response};
use crate::codec::message::ErrorCode;
use crate::connection::handshake::{Page, Refusal};
use crate::connection::{Phase, Reply};
use crate::ids::ConnectionKey;
use crate::limits::{LOOKUP_TIMEOUT, TICKET_LIFE};
use crate::secret::Secret;

use super::Shard;
use super::lookup::{Asked, Found, Looked, Lookup, Made, Purpose, Waiter};
use super::requests::Judged;
use super::ticket_table::Over;

fn unknown() -> Refusal {
    Refusal::new(ErrorCode::InvalidToken, "there is no such ticket, or it has been used").because("unknown_ticket")
}

fn elsewhere() -> Refusal {
    let detail = "the ticket is kept by another process alone: it was made while the store was away";
    Refusal::new(ErrorCode::SessionStoreUnavailable, detail).retry_after(2).because("session_store_unavailable")
}

fn refused(over: Over) -> Refusal {
    match over {
        Over::Process => Refusal::new(ErrorCode::Overloaded, "as many tickets as there may be").retry_after(5),
        Over::Subject => {
            let detail = "the subject has made as many tickets as it may at once";
            Refusal::new(ErrorCode::RateLimited, detail).retry_after(TICKET_LIFE.as_secs())
        }
    }
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
        let record = self.ticket_record(&grant);
        self.rights.release(grant);
        let record = match record {
            Ok(record) => record,
            Err(refusal) => return self.refuse(index, &refusal, reply),
        };
        match self.options.auth.store.then(|| record.to_text()).flatten() {
            Some(text) => self.share_ticket(index, record, text, reply),
            None => self.hand_out_own(index, record, reply),
        }
    }

    /// What a ticket for `grant` stands for; it is counted.
    fn ticket_record(&mut self, grant: &Grant) -> Result<TicketRecord, Refusal> {
        if grant.kind() == CredentialKind::Ticket {
            return Err(Refusal::new(ErrorCode::Forbidden, "a ticket makes no further ticket"));
        }
        self.ledger.tickets().count(self.asker(grant), self.now.at).map_err(refused)?;
        let ends = self.now.wall + TICKET_LIFE;
        Ok(TicketRecord { ends, grant: grant.to_record(self.session_id(grant)) })
    }

    fn new_ticket(&mut self, keeper: Option<Keeper>) -> (TicketHash, Secret) {
        let mut random = [0u8; 32];
        for half in random.chunks_exact_mut(16) {
            half.copy_from_slice(&self.rng.u128().to_le_bytes());
        }
        let ticket = match keeper {
            Some(keeper) => ticket::kept_alone(random, keeper),
            None => ticket::of_random(random),
        };
        (TicketHash::of(ticket.expose_secret()).expect("a ticket of ours is one"), ticket)
    }

    /// Keeps a ticket where other processes find it, before it is handed out.
    fn share_ticket(&mut self, index: u32, record: TicketRecord, text: Secret, reply: &Reply) {
        let Some(connection) = self.key_of(index) else { return };
        if self.may_look_up().is_err() {
            return self.hand_out_own(index, record, reply);
        }
        let (hash, ticket) = self.new_ticket(None);
        let lookup = Lookup::KeepTicket { hash: hash.to_string(), record: text, life: TICKET_LIFE };
        let ask = self.look_up_surely(lookup, Asked::Kept(connection, Box::new(Made { ticket, record })));
        let deadline = self.now.at + LOOKUP_TIMEOUT;
        if let Some(http) = self.http_mut(index) {
            http.phase = Phase::Asking { ask, reply: reply.clone() };
            http.deadline = deadline;
            self.arm(index);
        }
    }

    /// The store has kept a ticket, or not, or has not said: then nobody is told of that one, which may be there.
    pub(super) fn ticket_kept(&mut self, connection: ConnectionKey, ask: u64, made: Made, found: &Found) {
        let Some(index) = self.still(connection) else { return };
        let waits = |phase: &Phase| matches!(phase, Phase::Asking { ask: asked, .. } if *asked == ask);
        if !self.http_mut(index).is_some_and(|http| waits(&http.phase)) {
            return;
        }
        let reply = self.forget_exchange(index);
        match found {
            Found::Kept => self.hand_out(index, &made.ticket, &reply),
            _ => self.hand_out_own(index, made.record, &reply),
        }
    }

    /// Keeps a ticket in this process alone, and hands it out.
    fn hand_out_own(&mut self, index: u32, record: TicketRecord, reply: &Reply) {
        // Where there are other processes, they cannot tell it from one that never was.
        let keeper = Keeper { process: self.ledger.process(), ends: record.ends };
        let (hash, ticket) = self.new_ticket(self.options.auth.store.then_some(keeper));
        match self.ledger.tickets().keep(hash, record, self.now.at) {
            Ok(()) => self.hand_out(index, &ticket, reply),
            Err(over) => self.refuse(index, &refused(over), reply),
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
        if let Some(record) = self.ledger.tickets().take(hash, self.now.at) {
            return self.ticket_used(record, waiter);
        }
        if !self.options.auth.store {
            return Looked::Now(waiter, Err(unknown()));
        }
        if let Some(keeper) = Keeper::of(ticket.expose_secret()) {
            // Whoever says so of a ticket that never was learns nothing by it.
            let may_be = keeper.process != self.ledger.process() && keeper.ends > self.now.wall;
            return Looked::Now(waiter, Err(if may_be { elsewhere() } else { unknown() }));
        }
        if let Err(refusal) = self.may_look_up() {
            return Looked::Now(waiter, Err(refusal));
        }
        Looked::Later(self.look_up_surely(Lookup::TakeTicket(hash.to_string()), Asked::Ticket(waiter)))
    }

    /// The store has been asked for a ticket, which is thereby used up.
    pub(super) fn ticket_found(&mut self, waiter: Waiter, found: Found) -> Looked {
        let record = match found {
            Found::Ticket(Some(text)) => TicketRecord::parse(text.expose_secret()),
            Found::Ticket(None) => None,
            // It may be there, and whoever made it has it no more: only the store's word counts.
            _ => {
                let detail = "the store of tickets does not answer";
                let refusal = Refusal::new(ErrorCode::SessionStoreUnavailable, detail).retry_after(2);
                return Looked::Now(waiter, Err(refusal.because("session_store_unavailable")));
            }
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
            return self.ask_for_session(sid, waiter, Purpose::Ticket(record.grant.sub));
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
