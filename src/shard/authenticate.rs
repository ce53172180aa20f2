//! Credentials looked at: what is presented becomes a grant, at once or when somebody outside has answered.
//!
//! Source: protocol version 1, section 2 («Carriers», «Hybrid», «Order of refusal»).
//! Memory: an entry for each credential that is being looked at, at most [`limits::LOOKUPS_MAX`]; besides them one for each
//! key that is being asked for, at most [`limits::KEY_LOOKUPS_MAX`], with the tokens that wait for it. Errors: [`Refusal`].
//! Not here: what is presented (`connection::handshake`), whether a token is good (`auth::jwt`), what becomes of who
//! presents it (`requests`, `open`).

use crate::auth::ephemeral;
use crate::auth::grant::Grant;
use crate::auth::jwt::LackedKey;
use crate::codec::message::ErrorCode;
use crate::connection::Phase;
use crate::connection::handshake::{Credential, Presented, Refusal};
use crate::ids::ConnectionKey;
use crate::limits;
use crate::secret::Secret;

use super::lookup::{Asked, Authenticated, Found, KeyQuestion, KeyWaiting, Looked, Lookup, Waiter};
use super::{Output, Shard};

fn full() -> Refusal {
    let detail = "too many credentials are being looked at";
    Refusal::new(ErrorCode::Overloaded, detail).with_status(503).retry_after(2)
}

impl Shard {
    /// Looks at what is presented, which is something. Limits come before this, and so does an address's standing.
    pub(super) fn authenticate(&mut self, presented: Presented, waiter: Waiter) -> Authenticated {
        match self.look_at(presented, waiter, true) {
            Looked::Now(_, outcome) => Authenticated::Now(outcome),
            Looked::Later(no) => Authenticated::Later(no),
        }
    }

    /// Protocol section 2, «Hybrid»: a token first; where there is none, or it does not verify, a session. Any other
    /// credential stands for itself. `may_ask`: whether a key that is not known may be asked for.
    fn look_at(&mut self, presented: Presented, waiter: Waiter, may_ask: bool) -> Looked {
        let refusal = match &presented.first {
            Some((Credential::Token(token), _)) if ephemeral::is_token(token.expose_secret()) => {
                return self.look_at_session_token(token, waiter);
            }
            Some((Credential::Token(token), _)) => match self.token_grant(token) {
                Ok(grant) => return Looked::Now(waiter, Ok(grant)),
                Err(refusal) => {
                    // The issuer's key set may have the key by now.
                    match self.verifier.lacks_key_of(token.expose_secret()).filter(|_| may_ask) {
                        None => refusal,
                        Some(lacked) => match self.may_ask_for_key(&lacked) {
                            Ok(()) => return Looked::Later(self.ask_for_key(lacked, waiter, presented)),
                            Err(full) => full,
                        },
                    }
                }
            },
            Some((Credential::Ticket(ticket), _)) => return self.look_at_ticket(ticket, waiter),
            Some((Credential::ApiKey(key), _)) => return Looked::Now(waiter, self.api_key_grant(key)),
            None => Refusal::new(ErrorCode::MissingCredential, "a credential is needed"),
        };
        match presented.session {
            Some(cookie) => self.look_at_cookie(&cookie, waiter),
            None => Looked::Now(waiter, Err(refusal)),
        }
    }

    /// What was looked at, after an answer: judged, or to be waited for under another number.
    fn looked_again(&mut self, request: Option<ConnectionKey>, looked: Looked) {
        match looked {
            Looked::Now(waiter, outcome) => self.judged(waiter, outcome),
            Looked::Later(no) => {
                if let Some(index) = request.and_then(|connection| self.still(connection))
                    && let Some(Phase::Looking { ask, .. }) = self.http_mut(index).map(|http| &mut http.phase)
                {
                    *ask = no;
                }
            }
        }
    }

    /// The grant of a token.
    pub(super) fn token_grant(&mut self, token: &Secret) -> Result<Grant, Refusal> {
        self.verify_token(token)
    }

    /// Whether somebody outside may be asked. Keys have a share of their own.
    pub(super) fn may_look_up(&self) -> Result<(), Refusal> {
        let others = self.looked_up.len().saturating_sub(self.keys_asked.len());
        if others < limits::LOOKUPS_MAX { Ok(()) } else { Err(full()) }
    }

    /// Whether that key may be asked for, or its answer waited for.
    fn may_ask_for_key(&self, lacked: &LackedKey) -> Result<(), Refusal> {
        let has_room = match self.keys_asked.get(lacked).and_then(|ask| self.looked_up.get(ask)) {
            Some(Asked::KeySet(question)) => question.waiting.len() < limits::LOOKUP_WAITERS_MAX,
            _ => self.keys_asked.len() < limits::KEY_LOOKUPS_MAX,
        };
        if has_room { Ok(()) } else { Err(full()) }
    }

    /// Asks for a key, where it is known that one may. Whoever comes while the same is being asked for shares the answer.
    fn ask_for_key(&mut self, lacked: LackedKey, waiter: Waiter, presented: Presented) -> u64 {
        self.ask_no += 1;
        let no = self.ask_no;
        let waiting = KeyWaiting { no, waiter, presented };
        match self.keys_asked.get(&lacked).and_then(|ask| self.looked_up.get_mut(ask)) {
            Some(Asked::KeySet(question)) => question.waiting.push(waiting),
            _ => self.put_key_question(lacked, vec![waiting]),
        }
        no
    }

    fn put_key_question(&mut self, lacked: LackedKey, waiting: Vec<KeyWaiting>) {
        let question = KeyQuestion { lacked: lacked.clone(), waiting };
        let ask = self.look_up_surely(Lookup::KeySet(lacked.issuer), Asked::KeySet(Box::new(question)));
        self.keys_asked.insert(lacked, ask);
    }

    /// What was unknown a moment ago may be known now; no token asks for it a second time.
    fn key_set_found(&mut self, question: KeyQuestion) {
        let KeyQuestion { lacked, mut waiting } = question;
        self.keys_asked.remove(&lacked);
        let rest = waiting.split_off(waiting.len().min(limits::KEY_WAITERS_PER_TURN));
        if !rest.is_empty() {
            // They are answered at once, in another turn.
            self.put_key_question(lacked, rest);
        }
        for KeyWaiting { no, waiter, presented } in waiting {
            if self.is_waited_for(no, &waiter) {
                let request = waiter.request();
                let looked = self.look_at(presented, waiter, false);
                self.looked_again(request, looked);
            }
        }
    }

    /// Asks somebody outside, where it is known that one may; `asked` says what is done with the answer.
    pub(super) fn look_up_surely(&mut self, lookup: Lookup, asked: Asked) -> u64 {
        self.ask_no += 1;
        self.looked_up.insert(self.ask_no, asked);
        self.outputs.push_back(Output::LookUp { ask: self.ask_no, lookup });
        self.ask_no
    }

    /// Somebody outside has answered.
    pub(super) fn found(&mut self, ask: u64, found: Found) {
        let Some(asked) = self.looked_up.remove(&ask) else { return };
        match asked {
            Asked::KeySet(question) => self.key_set_found(*question),
            Asked::Session(question) => self.session_found(ask, *question, found),
            Asked::Reread(reread) => self.sessions_reread(reread, found),
            Asked::Ticket(waiter) => {
                let request = waiter.request();
                let looked = self.ticket_found(waiter, found);
                self.looked_again(request, looked);
            }
            Asked::Kept(connection, made) => self.ticket_kept(connection, ask, *made, &found),
            Asked::Renewal(renewal) => self.peer_has_renewed(ask, &renewal, found),
            Asked::Shared(connection, sharing) => self.session_shared(connection, ask, *sharing, found),
            Asked::TakenUp(taking) => {
                for (request, looked) in self.session_taken_up(*taking, found) {
                    self.looked_again(request, looked);
                }
            }
            Asked::Face(connection, asked) => self.session_told(connection, ask, &asked, found),
            Asked::Ended(connection, id) => self.session_was_ended(connection, ask, id, &found),
            Asked::Held(held) => self.sessions_held(&held, &found),
            Asked::Left(id) => self.session_left(id),
            Asked::Told => {}
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
                    // That one is answered. Others that came meanwhile have been refused, and changed nothing of it.
                    if let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) {
                        open.updating = false;
                    }
                    self.update_judged(index, id.as_ref(), outcome);
                }
            }
            Waiter::Renewal { connection, addr, asker } => self.renewal_judged(connection, addr, asker, outcome),
        }
    }

    /// The answer to a question is not waited for any more: its waiter is gone.
    pub(super) fn forget_lookup(&mut self, ask: u64) {
        // Others may wait for a session's record or for a key as well, and what is read of a record is news for those who live
        // by it.
        let of_many = |asked: &Asked| {
            matches!(asked, Asked::KeySet(_) | Asked::Session(_) | Asked::Reread(_) | Asked::TakenUp(_))
        };
        if !self.looked_up.get(&ask).is_some_and(of_many) {
            self.looked_up.remove(&ask);
        }
    }
}
