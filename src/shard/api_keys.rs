//! API keys on one core: who presents one, and what becomes of connections whose key is deleted or changed.
//!
//! Source: protocol version 1, sections 2, 5 and 6. Memory: the table, shared by all cores; while connections are judged
//! by a new one, a place for each that it touches. Errors: [`Refusal`].
//! Not here: what a key is (`auth::api_key`), where keys are kept (`runtime::api_keys`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::auth::api_key::{ApiKey, ApiKeyError, ApiKeyMark, ApiKeys};
use crate::auth::grant::Grant;
use crate::codec::message::{CloseReason, ErrorCode};
use crate::connection::handshake::Refusal;
use crate::connection::{Phase, State};
use crate::ids::ConnectionKey;
use crate::metrics::ApiKeyResult;
use crate::secret::Secret;

use super::Shard;

/// What a key's rate is counted over.
const RATE_PERIOD: Duration = Duration::from_secs(60);

/// What has become of the API key that a grant hangs on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum KeyChange {
    /// Nothing.
    None,
    /// It gives other rights, or another end.
    Changed,
    /// It is gone, or its id is another key's.
    Revoked,
}

fn revoked() -> Refusal {
    Refusal::new(ErrorCode::TokenRevoked, "the API key was revoked").because("revoked")
}

impl Shard {
    /// The grant of an API key, counted for its rate.
    pub(super) fn api_key_grant(&mut self, presented: &Secret) -> Result<Grant, Refusal> {
        let keys = Arc::clone(&self.api_keys);
        let results = &self.metrics.api_key_handshakes;
        let key = keys.verify(presented, self.now.wall).map_err(|error| {
            let (result, code, reason) = match error {
                ApiKeyError::Unknown => (ApiKeyResult::Unknown, ErrorCode::InvalidToken, "unknown_api_key"),
                ApiKeyError::Expired => (ApiKeyResult::Expired, ErrorCode::TokenExpired, "expired"),
            };
            results.of(result).count();
            Refusal::new(code, error.to_string()).because(reason)
        })?;
        // Whoever does not have the key does not use up its rate.
        let holder = self.ledger.holder("api key", key.id.as_str());
        let counted = match key.rate {
            0 => Ok(()),
            rate => self.ledger.action(holder, rate, RATE_PERIOD, self.now.at),
        };
        counted.map_err(|wait| {
            results.of(ApiKeyResult::RateLimited).count();
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            let detail = "as many requests a minute with this API key as there may be";
            Refusal::new(ErrorCode::RateLimited, detail).with_status(429).retry_after(seconds.max(1))
        })?;
        results.of(ApiKeyResult::Ok).count();
        Ok(Grant::of_api_key(key, &mut self.rights))
    }

    /// The grant of a ticket that was made for an API key: what the key gives now.
    pub(super) fn api_key_ticket_grant(&mut self, mark: &ApiKeyMark) -> Result<Grant, Refusal> {
        let keys = Arc::clone(&self.api_keys);
        match keys.find_marked(mark) {
            None => Err(revoked()),
            Some(key) if key.expires.is_some_and(|expires| expires <= self.now.wall) => {
                Err(Refusal::new(ErrorCode::TokenExpired, ApiKeyError::Expired.to_string()).because("expired"))
            }
            Some(key) => Ok(Grant::of_api_key(key, &mut self.rights).by_ticket()),
        }
    }

    /// An API key's grant as the key gives it now.
    ///
    /// # Errors
    /// 401 where it is gone.
    pub(super) fn api_key_grant_now(&mut self, grant: Grant) -> Result<Grant, Refusal> {
        let keys = Arc::clone(&self.api_keys);
        let renewed = match grant.api_key().map(|held| (self.change_of(held), keys.find(&held.id))) {
            None | Some((KeyChange::None, _)) => return Ok(grant),
            Some((KeyChange::Changed, Some(now))) => Ok(grant.with_api_key(now, &mut self.rights)),
            Some((KeyChange::Changed | KeyChange::Revoked, _)) => Err(revoked()),
        };
        self.rights.release(grant);
        renewed
    }

    /// There are other API keys now: those who wait under one are judged at once, open connections in turns.
    pub(super) fn take_api_keys(&mut self, keys: Arc<ApiKeys>) {
        self.api_keys = keys;
        self.rekeyed.clear();
        let (mut waiters, mut open) = (Vec::new(), VecDeque::new());
        for (index, connection) in self.connections.iter() {
            let key = ConnectionKey { index, generation: connection.generation };
            match &connection.state {
                State::Open(it) if it.grant.api_key().is_some_and(|held| self.change_of(held) != KeyChange::None) => {
                    open.push_back(key);
                }
                State::Http(http) => {
                    if let Phase::Waiting { grant, .. } = &http.phase
                        && let Some(held) = grant.api_key()
                    {
                        waiters.push((key, self.change_of(held)));
                    }
                }
                _ => {}
            }
        }
        self.rekeyed = open;
        for (waiter, change) in waiters {
            match change {
                KeyChange::None => {}
                KeyChange::Changed => {
                    let detail = "the API key was changed: ask again";
                    self.refuse_waiter(waiter, Refusal::new(ErrorCode::StreamUnavailable, detail).retry_after(1));
                }
                KeyChange::Revoked => {
                    self.refuse_waiter(waiter, revoked());
                }
            }
        }
    }

    /// Judges an open connection by the API keys there are now.
    pub(super) fn judge_by_api_keys(&mut self, connection: ConnectionKey) {
        let Some(index) = self.still(connection) else { return };
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return };
        let Some(held) = open.grant.api_key() else { return };
        let keys = Arc::clone(&self.api_keys);
        match (self.change_of(held), keys.find(&held.id)) {
            (KeyChange::None, _) => {}
            (KeyChange::Changed, Some(now)) => {
                let grant = open.grant.with_api_key(now, &mut self.rights);
                let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) else {
                    return;
                };
                let old = std::mem::replace(&mut open.grant, grant);
                self.rights.release(old);
                self.plan_reauthenticate(index);
                self.rejudge_subscriptions(index);
                self.arm(index);
            }
            (KeyChange::Changed | KeyChange::Revoked, _) => self.close(index, CloseReason::ApiKeyRevoked),
        }
    }

    fn change_of(&self, held: &ApiKey) -> KeyChange {
        match self.api_keys.find(&held.id) {
            Some(now) if **now == *held => KeyChange::None,
            Some(now) if now.hash == held.hash => KeyChange::Changed,
            _ => KeyChange::Revoked,
        }
    }
}
