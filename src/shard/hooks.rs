//! `POST /v1/hooks/{id}`: an upstream says that something has changed, and is polled at once.
//!
//! Source: protocol version 1, section 6. Memory: a mark for each hook of the last minutes, at most
//! [`limits::HOOKS_SEEN_MAX`] in the process. Errors: [`Refusal`]. Not here: what proves a hook (`auth::hook`), how often
//! it may have a poll begun (`stream::poll`).
//!
//! Who sends one proves it before anything else is said: of a stream that is not there, or has no hook, the answer is that of
//! a signature by nobody's secret.
//!
//! A hook says nothing but «look»: its body is signed and otherwise not read. However many come, a filled-in URL has one
//! poll under way and one after it, [`limits::REFRESH_INTERVAL`] apart. With Redis all processes hear of one that came to any.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use crate::auth::hook::{self, HookError, HookMark};
use crate::auth::sealed;
use crate::codec::http::{self, Head, Response};
use crate::codec::message::ErrorCode;
use crate::connection::handshake::Refusal;
use crate::connection::{BodyPurpose, Reply};
use crate::ids::{CoreId, StreamId};
use crate::limits::{self, HOOK_REPEAT, HOOK_WINDOW, HOOKS_SEEN_MAX};
use crate::metrics::HookResult;
use crate::time::Instant;

use super::lookup::Order;
use super::{Mail, Output, Shard};

/// The header that proves a hook.
const SIGNATURE: &str = "x-restcast-signature";

/// Hooks that have come.
#[derive(Debug, Default)]
pub(super) struct HooksSeen {
    /// When each first came.
    first: HashMap<(StreamId, HookMark), Instant>,
    /// The same in the order of their coming.
    order: VecDeque<(Instant, StreamId, HookMark)>,
}

impl HooksSeen {
    /// Whether a hook asks for a poll; otherwise it is a replay of one from before.
    pub(super) fn is_news(&mut self, id: &StreamId, mark: HookMark, now: Instant) -> bool {
        let is_over = |at: Instant| now.since(at) > HOOK_WINDOW * 2;
        while self.order.front().is_some_and(|(at, ..)| is_over(*at)) || self.order.len() >= HOOKS_SEEN_MAX {
            let Some((_, id, mark)) = self.order.pop_front() else { break };
            self.first.remove(&(id, mark));
        }
        match self.first.entry((id.clone(), mark)) {
            Entry::Occupied(first) => now.since(*first.get()) <= HOOK_REPEAT,
            Entry::Vacant(place) => {
                place.insert(now);
                self.order.push_back((now, id.clone(), mark));
                true
            }
        }
    }
}

impl Shard {
    /// A hook's head has come: its body is awaited, whether or not there is such a hook.
    pub(super) fn read_hook(&mut self, index: u32, head: &Head<'_>, id: &str, client: IpAddr, reply: Reply) {
        let id = http::percent_decode(id).and_then(|id| StreamId::new(&id));
        if let Err(refusal) = self.standing_allows(client) {
            return self.refuse_credential(index, &refusal, &reply, client);
        }
        let signature = match head.one(SIGNATURE) {
            Ok(Some(signature)) => signature.to_owned(),
            Ok(None) => {
                self.metrics.hooks.of(HookResult::Malformed).count();
                let refusal = Refusal::new(ErrorCode::MissingCredential, "X-Restcast-Signature is missing");
                return self.refuse(index, &refusal, &reply);
            }
            Err(error) => {
                self.metrics.hooks.of(HookResult::Malformed).count();
                return self.refuse(index, &Refusal::new(ErrorCode::BadRequest, error.to_string()), &reply);
            }
        };
        if signature.len() > limits::HOOK_HEADER_BYTES_MAX {
            self.metrics.hooks.of(HookResult::Malformed).count();
            let refusal = Refusal::new(ErrorCode::InvalidToken, HookError::Malformed.to_string());
            return self.refuse_credential(index, &refusal, &reply, client);
        }
        self.read_body_for(index, head, BodyPurpose::Hook { id, signature, client }, reply);
    }

    /// A hook has come, whole.
    pub(super) fn hook(
        &mut self,
        index: u32,
        id: Option<&StreamId>,
        signature: &str,
        body: &[u8],
        client: IpAddr,
        reply: &Reply,
    ) {
        let options = std::sync::Arc::clone(&self.options);
        let secrets = id.map(|id| options.catalog.hook_secrets(id)).unwrap_or_default();
        let verified = hook::verify(signature, body, &secrets, self.now.wall);
        let (hook, id) = match (verified, id) {
            (Ok(hook), Some(id)) => (hook, id),
            (verified, _) => {
                let error = verified.err().unwrap_or(HookError::Unsigned);
                let result = match error {
                    HookError::Malformed => HookResult::Malformed,
                    HookError::OutOfTime => HookResult::OutOfTime,
                    HookError::Unsigned if secrets.is_empty() => HookResult::Unknown,
                    HookError::Unsigned => HookResult::Unsigned,
                };
                self.metrics.hooks.of(result).count();
                let refusal = Refusal::new(ErrorCode::InvalidToken, error.to_string());
                return self.refuse_credential(index, &refusal, reply, client);
            }
        };
        let result = self.hooked(id, hook.mark);
        self.metrics.hooks.of(result).count();
        let news = result == HookResult::Poll;
        if news && options.auth.store {
            let sealed = hook.seal(self.now.wall, self.rng.u128().to_le_bytes());
            self.outputs.push_back(Output::Order(Order::Hook { id: id.clone(), sealed }));
        }
        let status = if news { 202 } else { 204 };
        self.respond(index, Response::new(status).header("Cache-Control", "no-store"), reply);
    }

    /// Has a stream polled on all cores, where its hook is no replay; what has become of the hook.
    fn hooked(&mut self, id: &StreamId, mark: HookMark) -> HookResult {
        if !self.ledger.is_news(id, mark, self.now.at) {
            return HookResult::Replayed;
        }
        if self.options.catalog.is_stopped(id) {
            return HookResult::Stopped;
        }
        for core in 0..self.cores {
            self.send(CoreId(core), Mail::RefreshAll { id: id.clone() });
        }
        HookResult::Poll
    }

    /// Another process says that it was sent a hook: this one polls too, and takes it for a replay where it comes here later.
    pub(super) fn peer_was_hooked(&mut self, id: &StreamId, sealed: &[u8]) {
        let mark = hook::open(sealed, &self.options.catalog.hook_secrets(id), self.now.wall);
        // What was said once has its effect once, however often somebody repeats it.
        let salt = sealed::salt(sealed);
        if let (Some(mark), Some(salt)) = (mark, salt)
            && self.heard.is_first(salt, self.now.at)
        {
            self.hooked(id, mark);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    const NOW: Instant = Instant::from_micros(1_000_000_000);

    fn mark(n: u64) -> HookMark {
        HookMark::from(u128::from(n).to_le_bytes())
    }

    #[test]
    fn the_same_hook_is_repeated_for_a_while_and_a_replay_afterwards() {
        let (mut seen, [a, b]) = (HooksSeen::default(), ["a", "b"].map(|id| StreamId::new(id).expect("an id")));
        let hook = mark(1);
        assert!(seen.is_news(&a, hook, NOW) && seen.is_news(&a, hook, NOW + HOOK_REPEAT));
        assert!(!seen.is_news(&a, hook, NOW + HOOK_REPEAT + Duration::from_micros(1)));
        assert!(seen.is_news(&b, hook, NOW + HOOK_WINDOW), "another stream's is another hook");
        assert!(seen.is_news(&a, mark(2), NOW + HOOK_WINDOW));
        assert!(!seen.is_news(&a, hook, NOW + HOOK_WINDOW * 2), "it may still be in its window");
        assert!(seen.is_news(&a, hook, NOW + HOOK_WINDOW * 2 + Duration::from_micros(1)), "the window is the bound");
        assert_eq!(seen.first.len(), seen.order.len());
    }

    #[test]
    fn no_more_hooks_are_kept_in_mind_than_there_may_be() {
        let (mut seen, id) = (HooksSeen::default(), StreamId::new("a").expect("an id"));
        for n in 0..2 * HOOKS_SEEN_MAX as u64 {
            assert!(seen.is_news(&id, mark(n), NOW));
        }
        assert!(seen.order.len() == HOOKS_SEEN_MAX && seen.first.len() == seen.order.len());
    }
}
