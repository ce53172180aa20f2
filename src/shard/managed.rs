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
use crate::ids::{ConnectionKey, StreamId};

use super::{Options, Shard};

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

    /// Whoever waits for a value of a stream that was changed or deleted is told to ask again.
    fn move_waiters(&mut self, changed: &[StreamId]) {
        let options = Arc::clone(&self.options);
        let concerned = self.topics.iter().filter(|(_, topic)| changed.contains(&topic.key.target.options.id));
        let stale = concerned.filter(|(_, topic)| !options.catalog.is_current(&topic.key));
        let waiters: Vec<(ConnectionKey, StreamId)> = stale
            .flat_map(|(_, topic)| topic.waiters.iter().map(|waiter| (*waiter, topic.key.target.options.id.clone())))
            .collect();
        for (waiter, id) in waiters {
            let refusal = if options.catalog.contains(&id) {
                Refusal::new(ErrorCode::StreamUnavailable, "the stream was configured anew: ask again").retry_after(1)
            } else {
                Refusal::new(ErrorCode::StreamEnded, ErrorCode::StreamEnded.meaning())
            };
            self.refuse_waiter(waiter, refusal);
        }
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
