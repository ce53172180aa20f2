//! What an action has changed is polled at once, here and by every other process that polls the same.
//!
//! Source: protocol version 1, section 6 «Actions». With Redis each filled-in stream is told of by its mark (`refresh_mark`), so
//! that streams that were filled in otherwise are left alone. It proves nothing: whoever may publish there can have a stream
//! polled, at most every [`limits::REFRESH_INTERVAL`], as they can by the control stream.
//! Memory: what goes out at once; what waits is bounded by who tells it (`runtime::redis`). Errors: none: what is lost is seen
//! with the next regular poll. Not here: which streams an action's caller may have changed (`actions`), polling (`owner`).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::ids::{CoreId, StreamId};

use super::lookup::Order;
use super::refresh_mark::{RefreshMark, Refreshed};
use super::{Mail, Output, Shard, StreamKey};

#[cfg(doc)]
use crate::limits;

impl Shard {
    /// Polls a stream at once, on the core that it belongs to, and has other processes do so.
    pub(super) fn refresh_everywhere(&mut self, key: Arc<StreamKey>) {
        let refreshed = || Refreshed { id: key.target.options.id.clone(), mark: key.mark() };
        if self.options.auth.store {
            self.outputs.push_back(Output::Order(Order::Refresh(refreshed())));
        }
        if !self.options.catalog.is_current(&key) {
            // It was configured anew meanwhile: what it is now may be another core's.
            let refreshed = refreshed();
            for core in 0..self.cores {
                self.send(CoreId(core), Mail::RefreshSame(refreshed.clone()));
            }
        }
        let owner = key.owner(self.cores);
        self.send(owner, Mail::Refresh { key });
    }

    /// Another process, or an action that was begun before they were configured anew, has changed what these show: they are
    /// polled at once, as far as this core polls them.
    pub(super) fn peer_has_refreshed(&mut self, refreshed: &[Refreshed]) {
        let mut marks: HashMap<&StreamId, HashSet<RefreshMark>> = HashMap::new();
        for one in refreshed {
            marks.entry(&one.id).or_default().insert(one.mark);
        }
        for (id, marks) in marks {
            self.refresh_those(id, |key| marks.contains(&key.mark()));
        }
    }
}
