//! Streams that an administrator makes, changes, deletes, stops and starts while others are watched: what that means for
//! those who watch.
//!
//! Source: protocol version 1, sections 3 and 6. Memory: a key for each connection that is still to be looked at.
//! Errors: none; who watches is told. Not here: polling them (`owner`), what changes (`runtime::streams`).
//!
//! Only those who watch what has changed are looked at, in turns, like those whose API key was changed. A connection that
//! opens meanwhile goes by the new catalog from the start.

use std::collections::HashSet;
use std::sync::Arc;

use crate::codec::message::ErrorCode;
use crate::connection::handshake::Refusal;
use crate::connection::{Phase, State};
use crate::ids::{ConnectionKey, Keeper, StreamId};

use super::{Options, Shard, StreamKey};

impl Shard {
    /// Other streams hold from now on; all other options are as they were.
    pub(super) fn take_catalog(&mut self, options: Arc<Options>, changed: &[StreamId]) {
        let claims_before = std::mem::replace(&mut self.options, options);
        if claims_before.catalog.template_claims() != self.options.catalog.template_claims() {
            // Grants keep the claims that templates name: what was made before lacks those that are named now.
            self.forget_tokens();
            self.sessions_reloaded();
        }
        self.change_streams(changed);
        self.move_waiters(changed);
        let mut concerned: HashSet<u32> = HashSet::new();
        for (_, topic) in self.topics.iter().filter(|(_, topic)| changed.contains(&topic.key.target.options.id)) {
            if self.options.catalog.is_current(&topic.key) {
                continue;
            }
            concerned.extend(topic.pending.iter().map(|pending| pending.connection.index));
            for rendition in topic.renditions.iter().flatten() {
                concerned.extend(rendition.subscribers.iter().map(|reader| reader.connection));
                concerned.extend(rendition.rated.iter().map(|reader| reader.connection));
            }
        }
        let keys: Vec<ConnectionKey> = concerned.into_iter().filter_map(|index| self.key_of(index)).collect();
        self.moved.extend(keys);
        if self.moved.len() > self.connections.len() {
            // One change follows the other faster than turns do: all are looked at, once.
            self.moved.clear();
            self.recheck = Some(0);
            self.rejudge = true;
        }
    }

    /// Whoever waits for a value of a stream that was changed waits for what it is now; of one that was deleted, is told so.
    fn move_waiters(&mut self, changed: &[StreamId]) {
        let options = Arc::clone(&self.options);
        let concerned = self.topics.iter().filter(|(_, topic)| changed.contains(&topic.key.target.options.id));
        let stale = concerned.filter(|(_, topic)| !options.catalog.is_current(&topic.key));
        let waiters: Vec<(ConnectionKey, Arc<StreamKey>)> =
            stale.flat_map(|(_, topic)| topic.waiters.iter().map(|waiter| (*waiter, Arc::clone(&topic.key)))).collect();
        for (waiter, from) in waiters {
            self.move_waiter(waiter, &from);
        }
    }

    /// Has one who waits for a value of `from`, which is not what it was, wait for what its stream is now, until then as before.
    pub(super) fn move_waiter(&mut self, waiter: ConnectionKey, from: &Arc<StreamKey>) {
        let Some(index) = self.still(waiter) else { return };
        let Some(State::Http(http)) = self.connections.at(index).map(|connection| &connection.state) else { return };
        let Phase::Waiting { grant, topic: before, held, .. } = &http.phase else { return };
        let (before, held, keeper) = (*before, *held, self.keeper(index, grant, from));
        let to = match self.resolve_again(grant, from) {
            Ok(to) => to,
            Err(_) if self.has_ended(grant, from) => {
                let refusal = Refusal::new(ErrorCode::StreamEnded, ErrorCode::StreamEnded.meaning());
                return self.refuse_waiter(waiter, refusal);
            }
            // A grant has the claims that templates named when it was made: the next one has those that they name now.
            Err(refusal) if refusal.code == ErrorCode::ClaimMissing => {
                let detail = "the stream was configured anew: ask again";
                return self.refuse_waiter(waiter, Refusal::new(ErrorCode::StreamUnavailable, detail).retry_after(1));
            }
            Err(refusal) => return self.refuse_waiter(waiter, refusal),
        };
        self.release_stream(held, from);
        self.yield_place(held, from);
        let kept = self.hold_stream(keeper, &to, true);
        let topic = kept.is_ok().then(|| self.watch(&to, index, keeper.map(Keeper::holder), true));
        let now = self.now.at;
        if let Some(Phase::Waiting { topic: at, held, cold_until, .. }) =
            self.http_mut(index).map(|http| &mut http.phase)
        {
            *held = kept.as_ref().ok().copied().flatten();
            *at = topic.unwrap_or(before);
            // Who had a value waits for the first one of this stream as long as anybody who asks for it now.
            if *cold_until <= now {
                *cold_until = now + to.target.options.timeout;
            }
        }
        if let Err(refusal) = kept {
            return self.refuse_waiter(waiter, refusal);
        }
        if let Some(before) = self.topics.at_mut(before) {
            before.waiters.retain(|other| *other != waiter);
        }
        self.unwatch(before, index);
        if let Some(topic) = topic.and_then(|topic| self.topics.at_mut(topic)) {
            topic.waiters.push(waiter);
        }
        self.answer_waiter(waiter);
    }

    /// Moves a connection's subscriptions to what its streams are now, or ends them.
    pub(super) fn move_subscriptions(&mut self, connection: ConnectionKey) {
        let Some(index) = self.still(connection) else { return };
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return };
        if !self.is_rejudged_later(&open.grant) {
            self.rejudge_subscriptions(index);
            self.arm(index);
        }
    }
}
