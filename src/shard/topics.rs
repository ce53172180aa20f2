//! A stream as a core with subscribers sees it: a copy of its history, and the logs its subscribers read.
//!
//! Source: the fan-out design in ARCHITECTURE.md. Memory: the history's events are shared with the owner core and all
//! others; logs as `shard::rendition` says. Errors: none. Not here: polling (`shard::owner`), sockets.

use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;

use crate::frame::{Body, EventFrame, RenditionKind};
use crate::ids::{ConnectionKey, Holder, ResumePoint, Seq};
use crate::stream::log::{Content, Event, History, Resume};
use crate::stream::poll::Status;
use crate::time::Instant;

use super::catalog::StreamKey;
use super::encoder::Encoder;
use super::rendition::{Block, Meter, Rendition};

/// One who waits for the topic to be attached before it can be given anything.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    /// Who.
    pub connection: ConnectionKey,
    /// Which of its subscriptions.
    pub slot: u16,
    /// Where to go on.
    pub since: Option<ResumePoint>,
}

/// A stream, on a core where someone watches it.
#[derive(Debug)]
pub struct Topic {
    /// What it is.
    pub key: Arc<StreamKey>,
    /// The copy of its history; `None` until the owner has answered.
    pub history: Option<History>,
    /// What the owner last said of the upstream.
    pub status: Option<Status>,
    /// Whether a poll has ended since the owner began to poll for us: a held value is then no older than that.
    pub fresh: bool,
    /// The logs, by kind.
    pub renditions: [Option<Box<Rendition>>; RenditionKind::COUNT],
    /// Those who wait for `history`.
    pub pending: Vec<Pending>,
    /// Subscriptions that were told of another stream that it is not live, and of this one nothing yet.
    pub untold: HashSet<(ConnectionKey, u16)>,
    /// HTTP requests that wait for a value.
    pub waiters: Vec<ConnectionKey>,
    /// Subscriptions and waiting requests: while there are some, the owner counts this core as watching.
    pub watchers: u32,
    /// When it was last given up.
    pub idle_since: Instant,
    /// Whether a timer is set to let go of it: however often it is given up, it has one.
    pub timed: bool,
    /// Of those who watch what is selected: the one who answers for the work of it, by the place of its connection.
    pub payer: Option<(u32, Holder)>,
    /// Whether one who watches was moved here from what the stream was before it was changed: no limit of streams refuses it.
    pub moved: bool,
}

impl Topic {
    /// A topic that has not been attached.
    pub fn new(key: Arc<StreamKey>, now: Instant) -> Topic {
        Topic {
            key,
            history: None,
            status: None,
            fresh: false,
            renditions: Default::default(),
            pending: Vec::new(),
            untold: HashSet::new(),
            waiters: Vec::new(),
            watchers: 0,
            idle_since: now,
            timed: false,
            payer: None,
            moved: false,
        }
    }

    /// The connections of those who watch it.
    pub fn watching(&self) -> impl Iterator<Item = u32> {
        let waiting = self.pending.iter().map(|pending| &pending.connection).chain(&self.waiters).map(|key| key.index);
        let readers = self.renditions.iter().flatten().flat_map(|rendition| {
            let rated = rendition.rated.iter().map(|rated| rated.connection);
            rendition.subscribers.iter().map(|subscriber| subscriber.connection).chain(rated)
        });
        readers.chain(waiting)
    }

    /// The log of that kind, made if there is none.
    pub fn rendition(&mut self, kind: RenditionKind, meter: &Rc<Meter>) -> &mut Rendition {
        self.renditions[kind.index()].get_or_insert_with(|| Box::new(Rendition::new(kind, meter)))
    }

    /// Appends `event`, which has just been published, to every log that is read, and lets go of those that are not.
    /// Calls `dirty` with the number of each kind that has something new.
    pub fn append(&mut self, event: &Event, encoder: &mut Encoder, dirty: &mut dyn FnMut(u8)) {
        let Some(history) = &self.history else { return };
        for slot in &mut self.renditions {
            let Some(rendition) = slot else { continue };
            if rendition.is_idle() {
                *slot = None;
                continue;
            }
            let kind = rendition.kind();
            rendition.append(Some(event.seq()), self.key.target.options.history_bytes, |out| {
                write_event(&self.key, history, event, kind, encoder, out);
            });
            dirty(kind.number());
        }
    }

    /// Appends a frame that is no event, written by `write`, to every log that is read.
    pub fn append_control(&mut self, write: &dyn Fn(RenditionKind, &mut Vec<u8>), dirty: &mut dyn FnMut(u8)) {
        for rendition in self.renditions.iter_mut().flatten() {
            let kind = rendition.kind();
            rendition.append(None, self.key.target.options.history_bytes, |out| write(kind, out));
            dirty(kind.number());
        }
    }

    /// Where a reader of that kind goes on who has seen everything up to `since`: the cursor, if it can go on.
    /// Puts the events it missed in front of the log where they are not there yet.
    pub fn resume(
        &mut self,
        kind: RenditionKind,
        since: ResumePoint,
        keep_until: Instant,
        meter: &Rc<Meter>,
        encoder: &mut Encoder,
    ) -> Option<u64> {
        self.rendition(kind, meter);
        let Topic { key, history, renditions, .. } = self;
        let history = history.as_ref()?;
        let rendition = renditions[kind.index()].as_mut()?;
        let from = match history.since(since, kind.format) {
            Resume::UpToDate => return Some(rendition.end()),
            Resume::Snapshot => return None,
            Resume::Events { first, .. } => first,
        };
        if rendition.position_of(from).is_none() {
            if rendition.is_full() {
                return None;
            }
            let first_kept = rendition.first_event().unwrap_or(history.head()?.next());
            let missed = (from.0..first_kept.0).map(Seq);
            rendition.prepend(missed, keep_until, |seq, out| {
                if let Some(event) = history.event(seq) {
                    write_event(key, history, event, kind, encoder, out);
                }
            });
        }
        rendition.position_of(from)
    }

    /// The newest value as a frame of that kind, if there is a value.
    pub fn snapshot(&mut self, kind: RenditionKind, meter: &Rc<Meter>, encoder: &mut Encoder) -> Option<Rc<Block>> {
        self.rendition(kind, meter);
        let Topic { key, history, renditions, .. } = self;
        let history = history.as_ref()?;
        let rendition = renditions[kind.index()].as_mut()?;
        let head = history.newest()?;
        let value = history.value()?;
        Some(rendition.snapshot(head.seq(), |out| {
            encoder.event(&frame(key, history, head, Body::Snapshot(value)), kind.transport, out);
        }))
    }
}

/// Writes an event of `history` as a frame of that kind: its delta where there is one, its value otherwise.
fn write_event(
    key: &StreamKey,
    history: &History,
    event: &Event,
    kind: RenditionKind,
    encoder: &mut Encoder,
    out: &mut Vec<u8>,
) {
    let body = match event.content(kind.format) {
        Some(Content::Patch(patch)) => Body::Patch(patch),
        Some(Content::Merge(merge)) => Body::Merge(merge),
        Some(Content::Snapshot(value)) => Body::Snapshot(value),
        None => return,
    };
    encoder.event(&frame(key, history, event, body), kind.transport, out);
}

fn frame<'a>(key: &'a StreamKey, history: &History, event: &'a Event, body: Body<'a>) -> EventFrame<'a> {
    EventFrame {
        name: &key.name,
        epoch: history.epoch(),
        seq: event.seq(),
        ts: event.delta().ts,
        body,
        hash: event.delta().hash.as_deref(),
        signed: key.signed(),
    }
}
