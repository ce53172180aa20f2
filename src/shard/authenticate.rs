//! Credentials looked at: what is presented becomes a grant, at once or when somebody outside has answered.
//!
//! Source: protocol version 1, section 2 («Carriers», «Hybrid», «Order of refusal»).
//! Memory: an entry for each credential that is being looked at, at most [`limits::LOOKUPS_MAX`]. Errors: [`Refusal`].
//! Not here: what is presented (`connection::handshake`), whether a token is good (`auth::jwt`), what becomes of who
//! presents it (`requests`, `open`).

use std::net::IpAddr;
use std::time::Duration;

use crate::auth::grant::Grant;
use crate::codec::message::{ClientId, ErrorCode};
use crate::connection::handshake::{Credential, Presented, Refusal};
use crate::ids::{ConnectionId, ConnectionKey, CoreId};
use crate::limits;
use crate::secret::Secret;

use super::{Output, Shard};

/// A question to somebody outside of the cores: Redis, or whoever fetches key sets. Each is answered by
/// [`super::Input::Found`], within [`limits::LOOKUP_TIMEOUT`] of the shell's own.
#[derive(Clone, Debug)]
pub enum Lookup {
    /// The records of these sessions, by their ids.
    Sessions(Vec<Secret>),
    /// The record of a ticket, which is thereby used up; by the hash that it is kept under.
    TakeTicket(String),
    /// To keep a ticket's record under that hash for so long.
    KeepTicket {
        /// The hash of the ticket.
        hash: String,
        /// What it stands for.
        record: Secret,
        /// Its life.
        life: Duration,
    },
    /// To fetch anew the key set of that issuer, by its place in the configuration; where that was done a moment ago, nothing.
    KeySet(usize),
}

/// A session's record, as Redis holds it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionRecord {
    /// Its text.
    pub text: Secret,
    /// How long Redis keeps it; `None`: it has no end there.
    pub ttl: Option<Duration>,
}

/// The answer to a [`Lookup`].
#[derive(Clone, Debug)]
pub enum Found {
    /// To [`Lookup::Sessions`]: in the same order; `None`: there is no such session.
    Sessions(Vec<Option<SessionRecord>>),
    /// To [`Lookup::TakeTicket`]; `None`: there is no such ticket.
    Ticket(Option<Secret>),
    /// To [`Lookup::KeepTicket`]: it is kept.
    Kept,
    /// To [`Lookup::KeySet`]: what there is now is in force.
    KeySet,
    /// To any: it cannot be said now.
    Unavailable,
}

/// Who waits for a credential to be looked at.
#[derive(Debug)]
pub(super) enum Waiter {
    /// A request, whose head is kept meanwhile.
    Request(ConnectionKey),
    /// A WebSocket that has sent its first message.
    FirstMessage(ConnectionKey),
    /// An open WebSocket that has sent `auth_update`.
    Update {
        /// Which.
        connection: ConnectionKey,
        /// The id that the answer echoes.
        id: Option<ClientId>,
    },
    /// `POST /v1/connections/{connection}/auth` for a connection of this core.
    Renewal {
        /// Which.
        connection: ConnectionId,
        /// Whom a failure is counted for.
        addr: IpAddr,
        /// Who asks.
        from: CoreId,
        /// The number of the question.
        ask: u64,
    },
}

/// What is done with the answer to a [`Lookup`].
#[derive(Debug)]
pub(super) enum Asked {
    /// The token is looked at again, with the key set as it is then.
    KeySet(Waiter, Presented),
}

/// What became of looking at a credential.
pub(super) enum Authenticated {
    /// It is judged.
    Now(Result<Grant, Refusal>),
    /// Somebody outside was asked under this number; the waiter will be told.
    Later(u64),
}

impl Shard {
    /// Looks at what is presented, which is something. Limits come before this, and so does an address's standing.
    pub(super) fn authenticate(&mut self, presented: Presented, waiter: Waiter) -> Authenticated {
        let _ = waiter;
        Authenticated::Now(self.authenticate_at_once(presented))
    }

    /// The same without asking anybody.
    fn authenticate_at_once(&mut self, presented: Presented) -> Result<Grant, Refusal> {
        match &presented.first {
            Some((Credential::Token(token), _)) => self.token_grant(token),
            Some((Credential::Ticket(_), _)) => {
                Err(Refusal::new(ErrorCode::InvalidToken, "there is no such ticket").because("unknown_ticket"))
            }
            Some((Credential::ApiKey(key), _)) => self.api_key_grant(key),
            None => Err(Refusal::new(ErrorCode::MissingCredential, "a credential is needed")),
        }
    }

    /// The grant of a token.
    pub(super) fn token_grant(&mut self, token: &Secret) -> Result<Grant, Refusal> {
        match self.verifier.verify(token.expose_secret(), self.now.wall) {
            Ok(verified) => Ok(verified.into_grant(&mut self.rights, self.options.catalog.template_claims())),
            Err(error) => {
                let code = if error.is_expired() { ErrorCode::TokenExpired } else { ErrorCode::InvalidToken };
                Err(Refusal::new(code, error.to_string()).because(error.reason()))
            }
        }
    }

    /// Asks somebody outside; `asked` says what is done with the answer.
    pub(super) fn look_up(&mut self, lookup: Lookup, asked: Asked) -> Result<u64, Refusal> {
        if self.looked_up.len() >= limits::LOOKUPS_MAX {
            let detail = "too many credentials are being looked at";
            return Err(Refusal::new(ErrorCode::Overloaded, detail).with_status(503).retry_after(2));
        }
        self.ask_no += 1;
        self.looked_up.insert(self.ask_no, asked);
        self.outputs.push_back(Output::LookUp { ask: self.ask_no, lookup });
        Ok(self.ask_no)
    }

    /// Somebody outside has answered.
    pub(super) fn found(&mut self, ask: u64, found: Found) {
        let Some(asked) = self.looked_up.remove(&ask) else { return };
        match (asked, found) {
            (Asked::KeySet(waiter, presented), _) => {
                // What was unknown a moment ago may be known now; it is not asked for a second time.
                let outcome = self.authenticate_at_once(presented);
                self.judged(waiter, outcome);
            }
        }
    }

    /// Tells the one who waits what became of its credential.
    pub(super) fn judged(&mut self, waiter: Waiter, outcome: Result<Grant, Refusal>) {
        match waiter {
            Waiter::Request(connection) => self.request_judged(connection, outcome),
            Waiter::FirstMessage(connection) => {
                if let Some(index) = self.still(connection) {
                    self.first_message_judged(index, outcome);
                }
            }
            Waiter::Update { connection, id } => {
                if let Some(index) = self.still(connection) {
                    self.update_judged(index, id.as_ref(), outcome);
                }
            }
            Waiter::Renewal { connection, addr, from, ask } => {
                self.renewal_judged(connection, addr, from, ask, outcome);
            }
        }
    }

    /// The answer to a question is not waited for any more: its waiter is gone.
    pub(super) fn forget_lookup(&mut self, ask: u64) {
        self.looked_up.remove(&ask);
    }
}
