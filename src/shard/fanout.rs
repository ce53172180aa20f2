//! Delivery: what changed goes to every reader's socket, in bounded turns.
//!
//! Source: the fan-out design in ARCHITECTURE.md; protocol version 1, section 3 («Slow readers are conflated»).
//! Memory: none of its own: a reader is a cursor, a frame half sent pins its block. Errors: a socket that is gone is
//! let go of. A turn makes at most [`limits::SENDS_PER_TURN`] sends.

use std::rc::Rc;
use std::time::Duration;

use crate::codec::message::CloseReason;
use crate::connection::State;
use crate::connection::outbox::Shared;
use crate::connection::subscriptions::Slot;
use crate::frame::RenditionKind;
use crate::limits;
use crate::time::Now;

use super::rendition::{At, Block, Rendition, Subscriber, Sweep, Waiting, misses_status};
use super::{Output, Sent, Shard, Timer, Wire};

/// Least time between two sweeps of a core: what changes within it goes out together.
pub(super) const PUBLISH_TICK: Duration = Duration::from_millis(2);

/// Subscriptions of one connection that one send looks through for what it could take along.
const JOINT_SLOTS_MAX: u16 = 64;

/// How much further each pass begins than the one before it, of 2^32 for all readers: the golden ratio spreads the beginnings
/// evenly, however many readers there are.
const ROTATION_STEP: u32 = 0x9e37_79b9;

/// A rated subscriber is looked at again after this at the latest.
const RATED_TIMER_MAX: Duration = Duration::from_secs(5);

impl Shared for Block {
    fn with(&self, read: &mut dyn FnMut(&[u8])) {
        read(&self.bytes());
    }
}

/// What several logs hold for one connection, to be sent at once.
#[derive(Debug, Default)]
pub(super) struct Joint {
    /// At most a chunk, or what one log holds.
    bytes: Vec<u8>,
    /// Whose they are, in order: the subscription, and how many bytes.
    parts: Vec<(u16, Slot, usize)>,
}

/// What became of one connection's turn.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Flushed {
    /// It has everything.
    Done,
    /// Its socket takes no more now.
    Blocked,
    /// It is gone.
    Lost,
}

impl Shard {
    /// Sends what there is to send, at most [`limits::SENDS_PER_TURN`] sends of it. Whether something is left that
    /// could be sent at once.
    pub fn transmit(&mut self, now: Now, wire: &mut dyn Wire) -> bool {
        let more = self.transmit_turn(now, wire);
        // Connections have ended here too, and a session goes with its last one.
        self.drop_unused_sessions();
        more
    }

    fn transmit_turn(&mut self, now: Now, wire: &mut dyn Wire) -> bool {
        self.now = now;
        let mut budget = limits::SENDS_PER_TURN;
        self.control_turn();
        self.drain_turn();
        let unjudged = !self.rekeyed.is_empty() || !self.moved.is_empty();
        if self.recheck.is_some() || unjudged || self.passes.is_under_way() {
            // Until every connection has been looked at, nothing is sent: its credential may have ended.
            return true;
        }
        while budget > 0
            && let Some(index) = self.ready.pop_front()
        {
            if let Some(connection) = self.connections.at_mut(index) {
                connection.queued = false;
                if !connection.blocked {
                    self.flush(index, wire, &mut budget);
                }
            }
            budget = budget.saturating_sub(1);
        }
        let sweeping = self.dirty.front().is_some_and(|&(topic, kind)| self.is_sweeping(topic, kind));
        if !self.dirty.is_empty() && (sweeping || now.at.since(self.swept_at) >= PUBLISH_TICK) {
            if !sweeping {
                self.swept_at = now.at;
            }
            while budget > 0
                && let Some(&(topic, kind)) = self.dirty.front()
            {
                if self.sweep(topic, kind, wire, &mut budget) {
                    self.dirty.pop_front();
                }
            }
        }
        self.bound_pinned();
        self.turn_inbox();
        let unswept = self.dirty.front().is_some_and(|&(topic, kind)| self.is_sweeping(topic, kind));
        !self.ready.is_empty() || unswept || self.drains_now()
    }

    fn is_sweeping(&self, topic: u32, kind: u8) -> bool {
        let rendition = self.topics.at(topic).and_then(|topic| topic.renditions[usize::from(kind)].as_ref());
        rendition.is_some_and(|rendition| rendition.sweep.is_some())
    }

    /// Puts a rendition in the queue of those to be swept, if it is not there.
    pub(super) fn mark_dirty(&mut self, topic: u32, kind: u8) {
        let now = self.now.at;
        let Some(rendition) = self.topics.at_mut(topic).and_then(|t| t.renditions[usize::from(kind)].as_mut()) else {
            return;
        };
        rendition.unswept_since.get_or_insert(now);
        if !rendition.queued {
            rendition.queued = true;
            self.dirty.push_back((topic, kind));
        }
        let rated: Vec<u32> = rendition.rated.iter().map(|rated| rated.connection).collect();
        for connection in rated {
            self.make_ready(connection);
        }
    }

    /// Puts a connection in the queue of those to be flushed, if it is not there.
    pub(super) fn make_ready(&mut self, index: u32) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        if !connection.queued {
            connection.queued = true;
            self.ready.push_back(index);
        }
    }

    /// One turn of a pass over a rendition's readers; whether the pass is over.
    fn sweep(&mut self, topic: u32, kind: u8, wire: &mut dyn Wire, budget: &mut usize) -> bool {
        let now = self.now.at;
        let Some(rendition) = self.rendition(topic, kind) else { return true };
        if rendition.sweep.is_none() {
            let readers = rendition.subscribers.len();
            rendition.rotation = rendition.rotation.wrapping_add(ROTATION_STEP);
            let next = ((u64::from(rendition.rotation) * readers as u64) >> 32) as usize;
            rendition.sweep = Some(Sweep { next, left: readers, begun: now });
            if let Some(since) = rendition.unswept_since.take() {
                self.metrics.publish_lag.observe(now.since(since));
            }
        }
        // Where other renditions have news as well, a connection that reads several gets all of it in one send.
        if self.dirty.len() > 1 {
            self.sweep_jointly(topic, kind, wire, budget);
        } else {
            self.sweep_alone(topic, kind, wire, budget);
        }
        let Some(rendition) = self.rendition(topic, kind) else { return true };
        let over = rendition.sweep.is_none_or(|sweep| sweep.left == 0) || rendition.subscribers.is_empty();
        if !over {
            return false;
        }
        if let Some(sweep) = rendition.sweep.take() {
            self.metrics.fanout.observe(now.since(sweep.begun));
        }
        let Some(rendition) = self.rendition(topic, kind) else { return true };
        // What came during the pass has reached only some: another pass follows.
        let again = rendition.unswept_since.is_some();
        rendition.queued = again;
        if again {
            self.dirty.push_back((topic, kind));
        } else {
            rendition.trim(now);
        }
        true
    }

    fn rendition(&mut self, topic: u32, kind: u8) -> Option<&mut Rendition> {
        self.topics.at_mut(topic)?.renditions[usize::from(kind)].as_deref_mut()
    }

    /// Sends to each reader whose turn it is what this log holds for it.
    fn sweep_alone(&mut self, topic: u32, kind: u8, wire: &mut dyn Wire, budget: &mut usize) {
        let mut slow: Vec<(u32, u16)> = Vec::new();
        let (mut deliveries, mut bytes_sent) = (0u64, 0u64);
        let Some(rendition) = self.topics.at_mut(topic).and_then(|t| t.renditions[usize::from(kind)].as_mut()) else {
            return;
        };
        let end = rendition.end();
        while *budget > 0
            && let Some(next) = rendition.next_in_sweep()
        {
            let reader = rendition.subscribers[next];
            if reader.behind || reader.cursor >= end {
                continue;
            }
            // Only the newest chunk is sent from here; whoever is further behind catches up by itself.
            let sent = match rendition.peek(reader.cursor) {
                Some((bytes, from)) => match wire.send(reader.connection, &bytes[from..]) {
                    Sent::Bytes(count) => count,
                    Sent::Blocked | Sent::Lost => 0,
                },
                None => 0,
            };
            *budget -= 1;
            let reached = reader.cursor + sent as u64;
            bytes_sent += sent as u64;
            rendition.subscribers[next].cursor = reached;
            match reached == end {
                true => deliveries += rendition.frames_between(reader.cursor, end) as u64,
                false => {
                    // A short send: the frame that has begun is finished by `settle_begun`.
                    deliveries += rendition.frames_between(reader.cursor, rendition.frame_end(reached)) as u64;
                    rendition.set_behind(next as u32, true);
                    slow.push((reader.connection, reader.slot));
                }
            }
        }
        self.metrics.deliveries.add(deliveries);
        self.metrics.sent_bytes.add(bytes_sent);
        for (connection, slot) in slow {
            self.settle_begun(connection, slot);
            self.flush(connection, wire, budget);
        }
    }

    /// The same, where the logs of a connection's other subscriptions may have something for it: one send for all.
    fn sweep_jointly(&mut self, topic: u32, kind: u8, wire: &mut dyn Wire, budget: &mut usize) {
        while *budget > 0 {
            let Some(rendition) = self.rendition(topic, kind) else { return };
            let end = rendition.end();
            let Some(next) = rendition.next_in_sweep() else { return };
            let reader = rendition.subscribers[next];
            if !reader.behind && reader.cursor < end {
                *budget -= 1;
                self.send_jointly(reader.connection, reader.slot, wire, budget);
            }
        }
    }

    /// Sends what the logs hold for the subscriptions of one connection, that in `first` before the others.
    fn send_jointly(&mut self, index: u32, first: u16, wire: &mut dyn Wire, budget: &mut usize) {
        let mut joint = std::mem::take(&mut self.joint);
        self.gather(index, first, &mut joint);
        let sent = match joint.parts[..] {
            [] => Sent::Blocked,
            [(_, slot, _)] => match self.reader(slot).and_then(|(log, reader)| log.peek(reader.cursor)) {
                Some((bytes, from)) => wire.send(index, &bytes[from..]),
                None => Sent::Blocked,
            },
            _ => wire.send(index, &joint.bytes),
        };
        let mut left = if let Sent::Bytes(count) = sent { count } else { 0 };
        self.metrics.sent_bytes.add(left as u64);
        let mut begun = None;
        let mut whole = !joint.parts.is_empty();
        for &(no, slot, length) in &joint.parts {
            let taken = length.min(left);
            left -= taken;
            whole &= taken == length;
            let Some(rendition) = self.rendition(slot.topic, slot.kind) else { continue };
            let cursor = &mut rendition.subscribers[slot.position as usize].cursor;
            let from = *cursor;
            *cursor += taken as u64;
            let reached = *cursor;
            let frames = rendition.frames_between(from, rendition.frame_end(reached));
            if taken > 0 {
                self.metrics.deliveries.add(frames as u64);
                begun = Some(no);
            }
        }
        self.joint = joint;
        if !whole {
            // Its socket is full, or it is behind the newest chunk: it leaves the sweep and catches up by itself.
            self.keep_order(index);
            if let Some(no) = begun {
                self.settle_begun(index, no);
            }
            self.flush(index, wire, budget);
        }
    }

    /// The log that a subscription reads, and how far it has read.
    fn reader(&self, slot: Slot) -> Option<(&Rendition, Subscriber)> {
        let rendition = self.topics.at(slot.topic)?.renditions[usize::from(slot.kind)].as_deref()?;
        Some((rendition, *rendition.subscribers.get(slot.position as usize)?))
    }

    /// Puts together what the newest chunks hold for one connection; where that is of one log alone, it is not copied. Where
    /// the log of `first` does not lead up to its newest chunk, nothing.
    fn gather(&mut self, index: u32, first: u16, joint: &mut Joint) {
        joint.parts.clear();
        joint.bytes.clear();
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return };
        let slots = open.subscriptions.slots();
        let mut held = 0;
        for step in 0..slots.min(JOINT_SLOTS_MAX) {
            let no = (first + step) % slots;
            let Some(&slot) = open.subscriptions.at(no).filter(|slot| !slot.pending && !slot.rated) else { continue };
            let Some((log, reader)) = self.reader(slot).filter(|(_, reader)| !reader.behind) else { continue };
            let Some((bytes, from)) = log.peek(reader.cursor) else {
                if no == first {
                    return;
                }
                continue;
            };
            let length = bytes.len() - from;
            if held > 0 && held + length > limits::CHUNK_BYTES {
                continue;
            }
            if let [(_, alone, _)] = joint.parts[..] {
                // A second one: now the first is copied as well.
                let first = self.reader(alone).and_then(|(log, reader)| log.peek(reader.cursor));
                let Some((bytes, from)) = first else { return joint.parts.clear() };
                joint.bytes.extend_from_slice(&bytes[from..]);
            }
            if !joint.parts.is_empty() {
                joint.bytes.extend_from_slice(&bytes[from..]);
            }
            joint.parts.push((no, slot, length));
            held += length;
        }
    }

    /// After a short send the cursor stands within a frame: its rest goes to the outbox, first of all, and the cursor
    /// steps behind it.
    fn settle_begun(&mut self, index: u32, slot: u16) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        let Some(&entry) = connection.open().and_then(|open| open.subscriptions.at(slot)) else { return };
        let Some(topic) = self.topics.at_mut(entry.topic) else { return };
        let Some(rendition) = &mut topic.renditions[usize::from(entry.kind)] else { return };
        let cursor = rendition.subscribers[entry.position as usize].cursor;
        let frame_end = rendition.frame_end(cursor);
        if frame_end == cursor || matches!(rendition.at(cursor), At::End | At::Gone) {
            return;
        }
        if let At::Bytes(block, range) = rendition.at(cursor) {
            let length = usize::try_from(frame_end - cursor).expect("a frame is in memory");
            connection.outbox().push_rest(block, range.start..range.start + length, slot);
            rendition.subscribers[entry.position as usize].cursor = frame_end;
        }
    }

    /// Sends what one connection is to get, as far as its socket takes it.
    fn flush(&mut self, index: u32, wire: &mut dyn Wire, budget: &mut usize) {
        match self.flush_turn(index, wire, budget) {
            Flushed::Done => self.caught_up(index),
            Flushed::Blocked => self.blocked(index),
            Flushed::Lost => self.lose(index),
        }
    }

    fn flush_turn(&mut self, index: u32, wire: &mut dyn Wire, budget: &mut usize) -> Flushed {
        loop {
            self.say_farewell(index);
            // Answers, snapshots and the rest of a frame that has begun.
            loop {
                let Some(connection) = self.connections.at_mut(index) else { return Flushed::Done };
                let Some(outbox) = connection.outbox.as_mut().filter(|outbox| !outbox.is_empty()) else { break };
                if *budget == 0 {
                    self.make_ready(index);
                    return Flushed::Done;
                }
                // Behind an ending connection's last bytes its end follows at once, and both make one packet.
                let ends =
                    matches!(&connection.state, State::Closing(closing) if closing.peer_done && !closing.finished);
                let left = if ends { outbox.bytes() } else { 0 };
                let mut sent = Sent::Blocked;
                let mut empty = true;
                outbox.front(&mut self.joint.bytes, &mut |bytes| {
                    empty = bytes.is_empty();
                    if !empty {
                        let last = bytes.len() == left;
                        sent = if last { wire.send_last(index, bytes) } else { wire.send(index, bytes) };
                    }
                });
                *budget -= 1;
                match sent {
                    _ if empty => outbox.advance(0),
                    Sent::Bytes(count) => {
                        outbox.stalled_since = None;
                        outbox.advance(count);
                        self.metrics.sent_bytes.add(count as u64);
                    }
                    Sent::Blocked => return Flushed::Blocked,
                    Sent::Lost => return Flushed::Lost,
                }
            }
            // What the logs hold for it.
            let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else {
                return Flushed::Done;
            };
            let slots: Vec<(u16, Slot)> = open.subscriptions.iter().map(|(no, slot)| (no, *slot)).collect();
            let mut more = false;
            for (no, slot) in slots {
                if slot.pending {
                    continue;
                }
                let outcome = if slot.rated {
                    self.feed_rated(index, no, slot)
                } else {
                    self.feed(index, no, slot, wire, budget)
                };
                match outcome {
                    Fed::Nothing => {}
                    Fed::Queued => more = true,
                    Fed::Blocked => return Flushed::Blocked,
                    Fed::Lost => return Flushed::Lost,
                    Fed::Budget => {
                        self.make_ready(index);
                        return Flushed::Done;
                    }
                }
                if more {
                    break;
                }
            }
            if !more {
                return Flushed::Done;
            }
        }
    }

    /// Sends one subscription what its log holds.
    fn feed(&mut self, index: u32, no: u16, slot: Slot, wire: &mut dyn Wire, budget: &mut usize) -> Fed {
        loop {
            let Some(topic) = self.topics.at_mut(slot.topic) else { return Fed::Nothing };
            let Some(rendition) = &mut topic.renditions[usize::from(slot.kind)] else { return Fed::Nothing };
            let Some(reader) = rendition.subscribers.get(slot.position as usize).copied() else { return Fed::Nothing };
            match rendition.at(reader.cursor) {
                At::End => return Fed::Nothing,
                At::Gone => {
                    self.conflate(index, no, slot);
                    return Fed::Queued;
                }
                At::Bytes(block, range) => {
                    if *budget == 0 {
                        return Fed::Budget;
                    }
                    *budget -= 1;
                    let sent = wire.send(index, &block.bytes()[range]);
                    match sent {
                        Sent::Bytes(count) => {
                            let begun = reader.cursor + count as u64;
                            let frame_end = rendition.frame_end(begun);
                            let frames = rendition.frames_between(reader.cursor, frame_end) as u64;
                            rendition.subscribers[slot.position as usize].cursor = begun;
                            self.metrics.deliveries.add(frames);
                            self.metrics.sent_bytes.add(count as u64);
                            if let Some(outbox) = self.connections.at_mut(index).and_then(|c| c.outbox.as_mut()) {
                                outbox.stalled_since = None;
                            }
                            if frame_end > begun {
                                self.settle_begun(index, no);
                                return Fed::Queued;
                            }
                        }
                        Sent::Blocked => return Fed::Blocked,
                        Sent::Lost => return Fed::Lost,
                    }
                }
            }
        }
    }

    /// Gives a reader that fell off its log one snapshot of the newest, and the status if it missed a change of it.
    fn conflate(&mut self, index: u32, no: u16, slot: Slot) {
        let kind = RenditionKind::from_index(usize::from(slot.kind));
        let Some(topic) = self.topics.at_mut(slot.topic) else { return };
        let snapshot = topic.snapshot(kind, &self.meter, &mut self.encoder);
        let status = topic.status;
        let name = std::sync::Arc::clone(&topic.key.name);
        let Some(rendition) = &mut topic.renditions[usize::from(slot.kind)] else { return };
        let end = rendition.end();
        let reader = &mut rendition.subscribers[slot.position as usize];
        debug_assert_eq!((reader.connection, reader.slot), (index, no), "a slot names its reader");
        let missed_status = misses_status(reader.cursor, rendition.status_end);
        reader.cursor = end;
        self.metrics.conflations.count();
        if let Some(status) = status.filter(|_| missed_status) {
            let wall = self.now.wall;
            self.tell(index, "stream_status", |out| super::subscribe::write_status(out, &name, &status, wall));
        }
        if let (Some(block), Some(connection)) = (snapshot, self.connections.at_mut(index)) {
            let length = block.bytes().len();
            connection.outbox().push_frame(block, 0..length, no);
        }
    }

    /// Gives a rated subscription what waits for it, if its time has come; sets a timer if it has not.
    fn feed_rated(&mut self, index: u32, no: u16, slot: Slot) -> Fed {
        let now = self.now.at;
        let kind = RenditionKind::from_index(usize::from(slot.kind));
        let Some(topic) = self.topics.at_mut(slot.topic) else { return Fed::Nothing };
        let Some(rendition) = &mut topic.renditions[usize::from(slot.kind)] else { return Fed::Nothing };
        let end = rendition.end();
        let Some(reader) = rendition.rated.get(slot.position as usize).copied() else { return Fed::Nothing };
        let (block, range) = match rendition.waiting(reader.cursor) {
            Waiting::Nothing => {
                rendition.rated[slot.position as usize].cursor = end;
                return Fed::Nothing;
            }
            _ if now < reader.open_at => {
                if !reader.armed {
                    rendition.rated[slot.position as usize].armed = true;
                    let Some(key) = self.key_of(index) else { return Fed::Nothing };
                    let timer = Timer::Rated { connection: index, generation: key.generation, slot: no };
                    // One that is given up leaves its timer behind: not for longer than this.
                    self.set_timer(reader.open_at.min(now + RATED_TIMER_MAX), timer);
                }
                return Fed::Nothing;
            }
            Waiting::One(block, range) => (block, range),
            Waiting::More => {
                self.metrics.conflations.count();
                let Some(block) = topic.snapshot(kind, &self.meter, &mut self.encoder) else { return Fed::Nothing };
                let length = block.bytes().len();
                (block, 0..length)
            }
        };
        let Some(rendition) = topic.renditions[usize::from(slot.kind)].as_mut() else { return Fed::Nothing };
        let reader = &mut rendition.rated[slot.position as usize];
        reader.cursor = end;
        reader.open_at = now + Duration::from_millis(u64::from(reader.interval_ms));
        reader.armed = false;
        rendition.trim(now);
        self.metrics.deliveries.count();
        if let Some(connection) = self.connections.at_mut(index) {
            connection.outbox().push_frame(block as Rc<dyn Shared>, range, no);
        }
        Fed::Queued
    }

    /// A rated subscription's time has come.
    pub(super) fn rated_due(&mut self, index: u32, generation: u32, no: u16) {
        let Some(connection) = self.connections.at(index).filter(|c| c.generation == generation) else { return };
        let Some(&slot) = connection.open().and_then(|open| open.subscriptions.at(no)) else { return };
        let rendition = self.topics.at_mut(slot.topic).and_then(|t| t.renditions[usize::from(slot.kind)].as_mut());
        if let Some(reader) = rendition.and_then(|r| r.rated.get_mut(slot.position as usize)).filter(|_| slot.rated) {
            reader.armed = false;
        }
        self.make_ready(index);
    }

    /// The connection has everything: its readers go back into the sweep, and answers held up go on.
    fn caught_up(&mut self, index: u32) {
        let now = self.now.at;
        let Some(connection) = self.connections.at_mut(index) else { return };
        if connection.queued {
            return;
        }
        connection.outbox = None;
        let slots: Vec<Slot> = connection
            .open()
            .map(|open| open.subscriptions.iter().map(|(_, slot)| *slot).collect())
            .unwrap_or_default();
        for slot in slots {
            let Some(topic) = self.topics.at_mut(slot.topic) else { continue };
            let Some(rendition) = &mut topic.renditions[usize::from(slot.kind)] else { continue };
            if slot.pending || slot.rated {
                continue;
            }
            let reader = &mut rendition.subscribers[slot.position as usize];
            if reader.behind {
                reader.behind = false;
                rendition.behind -= 1;
                rendition.trim(now);
            }
        }
        self.all_sent(index);
    }

    /// The connection's socket is full: its readers leave the sweep until it takes more.
    fn blocked(&mut self, index: u32) {
        let now = self.now.at;
        let Some(connection) = self.connections.at_mut(index) else { return };
        connection.blocked = true;
        connection.outbox().stalled_since.get_or_insert(now);
        self.keep_order(index);
        self.arm(index);
    }

    /// A socket takes more.
    pub(super) fn writable(&mut self, index: u32) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        if connection.blocked {
            connection.blocked = false;
            self.make_ready(index);
        }
    }

    /// Keeps what only stalled readers hold within its bound: the longest stalled are closed.
    fn bound_pinned(&mut self) {
        let share = self.options.limits.pinned_bytes / u64::from(self.cores.max(1));
        self.metrics.pinned_bytes.set(self.meter.pinned.get());
        while self.meter.pinned.get() > share {
            let stalled = self.connections.iter().filter(|(_, connection)| connection.blocked);
            let longest = stalled
                .filter_map(|(index, connection)| Some((connection.outbox.as_ref()?.stalled_since?, index)))
                .min();
            let Some((_, index)) = longest else { return };
            // What it holds goes with it, the begun frame included: its socket would not take a close frame either.
            self.count_close(CloseReason::Overloaded);
            self.remove(index, true);
        }
    }

    /// Bytes of this connection that were left in its socket may be read now, unless enough of them wait already.
    pub(super) fn resume_reading(&mut self, index: u32) {
        if self.has_unserved(index) {
            // They are served first: each answer comes back here.
            return;
        }
        let Some(connection) = self.connections.at_mut(index) else { return };
        if connection.paused {
            connection.paused = false;
            self.outputs.push_back(Output::Resume { connection: index });
        }
    }
}

/// What became of one subscription's turn.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fed {
    /// It has everything.
    Nothing,
    /// Something stands in the outbox for it.
    Queued,
    /// The socket takes no more.
    Blocked,
    /// The connection is gone.
    Lost,
    /// The turn is over.
    Budget,
}
