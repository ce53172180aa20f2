//! What a shard holds, counted: how the simulator and fuzzers see that nothing leaks and every bound holds.
//!
//! Cost: a look at everything there is; never called while serving. Memory: none. Errors: none.

use super::Shard;

/// What one shard holds at one time.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Stats {
    /// Connections in any state.
    pub connections: usize,
    /// Streams that are, or lately were, watched on this core.
    pub topics: usize,
    /// Subscriptions and waiting requests on them.
    pub watchers: u64,
    /// Subscriptions that have their place in a log.
    pub readers: usize,
    /// Bytes of frames in logs.
    pub log_bytes: u64,
    /// Streams polled, or kept after polling, by this core.
    pub streams: usize,
    /// Bytes of frames that stalled readers alone hold.
    pub pinned_bytes: u64,
    /// The most bytes of answers that wait for one connection.
    pub control_bytes_max: usize,
    /// The most items, snapshots and the like, that wait for one connection.
    pub outbox_items_max: usize,
    /// Distinct rights in the table of grants.
    pub rights: usize,
    /// Timers besides those of connections.
    pub timers: usize,
    /// Questions put to other cores.
    pub asks: usize,
    /// Questions put to those outside of the cores.
    pub lookups: usize,
    /// Sessions that connections live by.
    pub sessions: usize,
}

impl Shard {
    /// Counts what this shard holds.
    pub fn stats(&self) -> Stats {
        let outboxes = || self.connections.iter().filter_map(|(_, connection)| connection.outbox.as_ref());
        let logs = || self.topics.iter().flat_map(|(_, topic)| topic.renditions.iter().flatten());
        Stats {
            connections: self.connections.len(),
            topics: self.topics.len(),
            watchers: self.topics.iter().map(|(_, topic)| u64::from(topic.watchers)).sum(),
            readers: logs().map(|log| log.subscribers.len() + log.rated.len()).sum(),
            log_bytes: logs().map(|log| log.bytes()).sum(),
            streams: self.streams.len(),
            pinned_bytes: self.meter.pinned.get(),
            control_bytes_max: outboxes().map(|outbox| outbox.control_bytes()).max().unwrap_or(0),
            outbox_items_max: outboxes().map(|outbox| outbox.items()).max().unwrap_or(0),
            rights: self.rights.len(),
            timers: self.timers.len(),
            asks: self.asks.len(),
            lookups: self.looked_up.len(),
            sessions: self.sessions.len(),
        }
    }
}
