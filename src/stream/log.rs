//! History of one sequence: its value, and the events that a returning client may have missed.
//!
//! Source: protocol version 1, section 3 («Sequences», «Resume», «Deltas»).
//! Memory: [`History::bytes`]: values and deltas, with [`EVENT_BYTES`] for each event; at most `events_max` events and
//! `bytes_max` bytes, except that the newest event stays whole. Over it the oldest values go first, because deltas are
//! small and resume most clients, then the oldest events. Texts are shared, never copied.
//! Cost: `publish` is amortised constant, `since` constant.
//! Errors: none: a place one cannot resume from is [`Resume::Snapshot`].
//! Not here: how events are framed and sent (`frame`, `shard`), how deltas are made (`diff`).

use std::collections::VecDeque;
use std::sync::Arc;

use crate::codec::message::Format;
use crate::codec::proof::ValueHash;
use crate::ids::{Epoch, ResumePoint, Seq};
use crate::time::WallTime;

/// What one event is taken to cost besides its texts: its place in the history and the heads of its shared parts.
pub const EVENT_BYTES: u64 = 128;

/// The bounds of one history.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bounds {
    /// Events kept; 0 is taken as 1, as the newest always stays.
    pub events_max: u32,
    /// Bytes of what is kept, the newest event aside.
    pub bytes_max: u64,
}

impl Bounds {
    /// Those of a configured stream.
    pub fn of(options: &super::Options) -> Bounds {
        Bounds { events_max: options.history, bytes_max: options.history_bytes }
    }
}

/// What an event changed.
#[derive(Debug)]
pub struct Delta {
    /// The event's place.
    pub seq: Seq,
    /// When the poller received the response in which it saw the change.
    pub ts: WallTime,
    /// The RFC 6902 patch from the value before; `None`: there was none, or the patch is not smaller than the value.
    pub patch: Option<Arc<[u8]>>,
    /// The RFC 7396 merge patch from the value before; `None`: as above, or merge cannot express the change.
    pub merge: Option<Arc<[u8]>>,
    /// The hash of the value as of it, where the stream tells it.
    pub hash: Option<Box<ValueHash>>,
}

/// One change of the value. Cloning shares its texts.
#[derive(Clone, Debug)]
pub struct Event {
    delta: Arc<Delta>,
    /// The value as of this event; dropped sooner than the event.
    value: Option<Arc<[u8]>>,
}

/// What is to be sent of an event: JSON text without insignificant white space.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Content<'a> {
    /// An RFC 6902 patch from the value before.
    Patch(&'a Arc<[u8]>),
    /// An RFC 7396 merge patch from the value before.
    Merge(&'a Arc<[u8]>),
    /// The value as of the event.
    Snapshot(&'a Arc<[u8]>),
}

impl Event {
    /// What it changed.
    pub fn delta(&self) -> &Arc<Delta> {
        &self.delta
    }

    /// Its place.
    pub fn seq(&self) -> Seq {
        self.delta.seq
    }

    /// The value as of it, while that is kept.
    pub fn value(&self) -> Option<&Arc<[u8]>> {
        self.value.as_ref()
    }

    /// What a subscriber of `kind` is sent of it. `None`: that would be the value, which is no longer kept.
    pub fn content(&self, kind: Format) -> Option<Content<'_>> {
        let delta = match kind {
            Format::Patch => self.delta.patch.as_ref().map(Content::Patch),
            Format::Merge => self.delta.merge.as_ref().map(Content::Merge),
            Format::Full => None,
        };
        delta.or(self.value.as_ref().map(Content::Snapshot))
    }

    fn value_bytes(&self) -> u64 {
        bytes_of(&self.value)
    }

    fn bytes(&self) -> u64 {
        EVENT_BYTES + bytes_of(&self.delta.patch) + bytes_of(&self.delta.merge) + self.value_bytes()
    }
}

/// What a client that names a [`ResumePoint`] is sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Resume {
    /// Nothing: it has the newest event, or there is none yet and it has seen none.
    UpToDate,
    /// Each event from `first` to `last`, the newest; each has its content in the format asked for.
    Events {
        /// The first event it has missed.
        first: Seq,
        /// The newest event.
        last: Seq,
    },
    /// The newest value, once there is one.
    Snapshot,
}

/// The newest events of one sequence, within its bounds.
#[derive(Clone, Debug)]
pub struct History {
    epoch: Epoch,
    bounds: Bounds,
    /// Without gaps; the last has its value.
    events: VecDeque<Event>,
    /// How many of the first events have lost their value; the others have theirs.
    valueless: usize,
    /// The last event that lost its value and has no patch: resuming by patches must start at or after it.
    patches_from: Seq,
    /// The same for merge patches.
    merges_from: Seq,
    bytes: u64,
}

impl History {
    /// A sequence without an event.
    pub fn new(epoch: Epoch, bounds: Bounds) -> History {
        History {
            epoch,
            bounds,
            events: VecDeque::new(),
            valueless: 0,
            patches_from: Seq(0),
            merges_from: Seq(0),
            bytes: 0,
        }
    }

    /// Adds the event that made `value`, as JSON text, the value; `patch` and `merge` lead to it from the value before and
    /// are dropped where there was none. Its place.
    pub fn publish(
        &mut self,
        ts: WallTime,
        value: Arc<[u8]>,
        patch: Option<Arc<[u8]>>,
        merge: Option<Arc<[u8]>>,
    ) -> Seq {
        self.publish_hashed(ts, value, patch, merge, None)
    }

    /// The same with the value's hash.
    pub fn publish_hashed(
        &mut self,
        ts: WallTime,
        value: Arc<[u8]>,
        patch: Option<Arc<[u8]>>,
        merge: Option<Arc<[u8]>>,
        hash: Option<Box<ValueHash>>,
    ) -> Seq {
        let before = self.head();
        let seq = before.unwrap_or_default().next();
        let (patch, merge) = if before.is_some() { (patch, merge) } else { (None, None) };
        let event = Event { delta: Arc::new(Delta { seq, ts, patch, merge, hash }), value: Some(value) };
        self.bytes += event.bytes();
        self.events.push_back(event);
        self.trim(self.bounds.bytes_max);
        seq
    }

    /// Adds an event that another history of the same sequence has published, value included: a copy on another core is
    /// kept up to date so. It must be the one after the head.
    pub fn adopt(&mut self, event: Event) {
        self.bytes += event.bytes();
        self.events.push_back(event);
        self.trim(self.bounds.bytes_max);
    }

    /// The life of the sequence.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The place of the newest event; `None` before the first.
    pub fn head(&self) -> Option<Seq> {
        self.newest().map(Event::seq)
    }

    /// The same, in its epoch.
    pub fn point(&self) -> Option<ResumePoint> {
        self.head().map(|seq| ResumePoint { epoch: self.epoch, seq })
    }

    /// The newest event.
    pub fn newest(&self) -> Option<&Event> {
        self.events.back()
    }

    /// The value as of the newest event.
    pub fn value(&self) -> Option<&Arc<[u8]>> {
        self.newest().and_then(Event::value)
    }

    /// The event at `seq`, where it is kept.
    pub fn event(&self, seq: Seq) -> Option<&Event> {
        let first = self.events.front()?.seq();
        self.events.get(usize::try_from(seq.0.checked_sub(first.0)?).ok()?)
    }

    /// The kept events from `first` on, the oldest first.
    pub fn events_from(&self, first: Seq) -> impl ExactSizeIterator<Item = &Event> {
        let oldest = self.events.front().map_or(first, Event::seq);
        let skipped = usize::try_from(first.0.saturating_sub(oldest.0)).unwrap_or(usize::MAX);
        self.events.range(skipped.min(self.events.len())..)
    }

    /// What a client that has everything up to `point` is to be sent in `kind`.
    pub fn since(&self, point: ResumePoint, kind: Format) -> Resume {
        let head = self.head().unwrap_or_default();
        if point.epoch != self.epoch || point.seq > head {
            return Resume::Snapshot;
        }
        if point.seq == head {
            return Resume::UpToDate;
        }
        let first = point.seq.next();
        let oldest_sendable = match kind {
            Format::Patch => self.seq_at(0).max(self.patches_from.next()),
            Format::Merge => self.seq_at(0).max(self.merges_from.next()),
            Format::Full => self.seq_at(self.valueless),
        };
        if first < oldest_sendable { Resume::Snapshot } else { Resume::Events { first, last: head } }
    }

    /// How many events are kept.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether there has been no event.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// What it counts for under `history_bytes_total`.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of the newest event: what [`History::trim_to`] leaves in any case.
    pub fn least_bytes(&self) -> u64 {
        self.events.back().map_or(0, Event::bytes)
    }

    /// Makes room for others (`history_bytes_total`): lets go of the oldest until `bytes_max` bytes or the newest event alone
    /// are left. The bytes freed. To free that too, drop the history: the sequence's next life has another epoch.
    pub fn trim_to(&mut self, bytes_max: u64) -> u64 {
        let before = self.bytes;
        self.trim(bytes_max.min(self.bounds.bytes_max));
        before - self.bytes
    }

    fn trim(&mut self, bytes_max: u64) {
        let events_max = usize::try_from(self.bounds.events_max.max(1)).unwrap_or(usize::MAX);
        while self.events.len() > events_max {
            self.drop_oldest();
        }
        while self.bytes > bytes_max && self.valueless + 1 < self.events.len() {
            self.drop_oldest_value();
        }
        while self.bytes > bytes_max && self.events.len() > 1 {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(event) = self.events.pop_front() {
            self.bytes -= event.bytes();
            self.valueless = self.valueless.saturating_sub(1);
        }
    }

    fn drop_oldest_value(&mut self) {
        let Some(event) = self.events.get_mut(self.valueless) else { return };
        self.bytes -= event.value_bytes();
        event.value = None;
        if event.delta.patch.is_none() {
            self.patches_from = event.seq();
        }
        if event.delta.merge.is_none() {
            self.merges_from = event.seq();
        }
        self.valueless += 1;
    }

    /// The place of the event at `index`; 0 where there is none.
    fn seq_at(&self, index: usize) -> Seq {
        self.events.get(index).map(Event::seq).unwrap_or_default()
    }
}

fn bytes_of(text: &Option<Arc<[u8]>>) -> u64 {
    text.as_ref().map_or(0, |text| text.len() as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EPOCH: Epoch = Epoch::from_random(7);
    const KINDS: [Format; 3] = [Format::Patch, Format::Merge, Format::Full];

    fn history(events_max: u32, bytes_max: u64) -> History {
        History::new(EPOCH, Bounds { events_max, bytes_max })
    }

    fn text(bytes: usize) -> Arc<[u8]> {
        vec![b'1'; bytes].into()
    }

    /// Publishes a value of `value` bytes with deltas of these sizes.
    fn publish(history: &mut History, value: usize, patch: Option<usize>, merge: Option<usize>) -> Seq {
        history.publish(WallTime::from_secs(9), text(value), patch.map(text), merge.map(text))
    }

    fn since(history: &History, seq: u64, kind: Format) -> Resume {
        history.since(ResumePoint { epoch: EPOCH, seq: Seq(seq) }, kind)
    }

    fn events(first: u64, last: u64) -> Resume {
        Resume::Events { first: Seq(first), last: Seq(last) }
    }

    #[test]
    fn a_client_resumes_with_exactly_what_it_missed() {
        let mut history = history(1024, 1 << 20);
        for _ in 0..3 {
            publish(&mut history, 100, Some(10), Some(5));
        }
        for kind in KINDS {
            assert_eq!(since(&history, 3, kind), Resume::UpToDate);
            assert_eq!(since(&history, 2, kind), events(3, 3));
            assert_eq!(since(&history, 0, kind), events(1, 3), "0 stands before the first event");
            assert_eq!(since(&history, 4, kind), Resume::Snapshot, "ahead");
            assert_eq!(since(&history, u64::MAX, kind), Resume::Snapshot, "far ahead");
            let foreign = ResumePoint { epoch: Epoch::from_random(8), seq: Seq(3) };
            assert_eq!(history.since(foreign, kind), Resume::Snapshot, "of another life");
        }
        let sent: Vec<_> =
            history.events_from(Seq(2)).map(|event| (event.seq(), event.content(Format::Merge))).collect();
        let merge = text(5);
        assert_eq!(sent, [(Seq(2), Some(Content::Merge(&merge))), (Seq(3), Some(Content::Merge(&merge)))]);
        assert_eq!(history.event(Seq(2)).map(Event::seq), Some(Seq(2)));
        assert!(history.event(Seq(0)).is_none() && history.event(Seq(4)).is_none());
        assert_eq!(history.events_from(Seq(4)).len(), 0);
    }

    #[test]
    fn before_the_first_event_there_is_nothing_to_send() {
        let history = history(1024, 1 << 20);
        assert_eq!((history.head(), history.value(), history.bytes()), (None, None, 0));
        assert_eq!(since(&history, 0, Format::Patch), Resume::UpToDate);
        assert_eq!(since(&history, 1, Format::Patch), Resume::Snapshot);
        assert_eq!(history.events_from(Seq(1)).len(), 0);
    }

    #[test]
    fn the_first_event_has_no_delta() {
        let mut history = history(1024, 1 << 20);
        assert_eq!(publish(&mut history, 100, Some(1), Some(1)), Seq(1));
        let event = history.newest().expect("published");
        assert!(matches!(event.content(Format::Patch), Some(Content::Snapshot(_))));
        assert_eq!(history.bytes(), EVENT_BYTES + 100);
    }

    #[test]
    fn events_are_kept_up_to_their_number() {
        for events_max in [0, 1, 2, 5] {
            let mut history = history(events_max, 1 << 20);
            for _ in 0..events_max.max(1) {
                publish(&mut history, 1, Some(1), None);
            }
            assert_eq!(since(&history, 0, Format::Full), events(1, u64::from(events_max.max(1))), "all of them");
            let head = publish(&mut history, 1, Some(1), None).0;
            assert_eq!(since(&history, 0, Format::Full), Resume::Snapshot, "one more, and the first is gone");
            let second = if events_max > 1 { events(2, head) } else { Resume::Snapshot };
            if head > 2 {
                assert_eq!(since(&history, 1, Format::Full), second);
            }
            assert_eq!(history.len(), events_max.max(1) as usize);
        }
    }

    #[test]
    fn over_the_bytes_old_values_go_before_any_event() {
        let full = 3 * (EVENT_BYTES + 1_000) + 2 * 15;
        for (bytes_max, full_from) in [(full, 0), (full - 1, 1)] {
            let mut history = history(1024, bytes_max);
            for _ in 0..3 {
                publish(&mut history, 1_000, Some(10), Some(5));
            }
            assert_eq!(since(&history, full_from, Format::Full), events(full_from + 1, 3));
            if full_from > 0 {
                assert_eq!(since(&history, 0, Format::Full), Resume::Snapshot);
                assert_eq!(since(&history, 0, Format::Patch), Resume::Snapshot, "the first is a snapshot");
            }
            assert_eq!(since(&history, 1, Format::Patch), events(2, 3));
            assert_eq!(history.len(), 3);
        }
    }

    #[test]
    fn an_event_without_a_delta_and_without_its_value_cannot_be_sent() {
        let mut history = history(1024, 5 * EVENT_BYTES + 1_000 + 50);
        publish(&mut history, 1_000, None, None);
        publish(&mut history, 1_000, Some(10), Some(5));
        publish(&mut history, 1_000, Some(10), None); // merge cannot express it
        publish(&mut history, 1_000, None, Some(5)); // a patch not smaller than the value
        publish(&mut history, 1_000, Some(10), Some(5));
        assert_eq!(history.len(), 5);
        assert_eq!(since(&history, 3, Format::Patch), Resume::Snapshot);
        assert_eq!(since(&history, 4, Format::Patch), events(5, 5));
        assert_eq!(since(&history, 2, Format::Merge), Resume::Snapshot);
        assert_eq!(since(&history, 3, Format::Merge), events(4, 5));
    }

    #[test]
    fn the_newest_event_stays_whole_whatever_its_size() {
        let mut history = history(1024, 100);
        for bytes in [10, 1_000_000] {
            publish(&mut history, bytes, Some(1), None);
            assert_eq!(history.value().map(|value| value.len()), Some(bytes));
            assert_eq!(history.len(), 1);
        }
        assert_eq!(history.trim_to(0), 0);
        assert_eq!((history.head(), history.len()), (Some(Seq(2)), 1));
        assert_eq!(since(&history, 1, Format::Patch), events(2, 2));
        assert_eq!(since(&history, 0, Format::Patch), Resume::Snapshot);
    }

    #[test]
    fn room_is_made_for_others() {
        let mut history = history(1024, 1 << 20);
        for _ in 0..10 {
            publish(&mut history, 1_000, Some(10), Some(10));
        }
        let before = history.bytes();
        assert_eq!(history.trim_to(before), 0);
        assert_eq!(history.trim_to(before - 1), 1_000, "one value");
        let freed = history.trim_to(3_000);
        assert_eq!(history.bytes(), before - 1_000 - freed);
        assert!(history.bytes() <= 3_000);
        assert_eq!(history.value().map(|value| value.len()), Some(1_000));
        assert_eq!(publish(&mut history, 1_000, Some(10), Some(10)), Seq(11), "the sequence goes on");
    }

    /// An event's place, and the bytes of its texts.
    struct NaiveEvent {
        seq: u64,
        value: Option<u64>,
        patch: Option<u64>,
        merge: Option<u64>,
    }

    /// The rules of the module's header, written without any bookkeeping.
    #[derive(Default)]
    struct Naive {
        events: VecDeque<NaiveEvent>,
        head: u64,
    }

    impl Naive {
        fn bytes(&self) -> u64 {
            let texts = self.events.iter().flat_map(|event| [event.value, event.patch, event.merge]).flatten();
            EVENT_BYTES * self.events.len() as u64 + texts.sum::<u64>()
        }

        fn trim(&mut self, bounds: Bounds, bytes_max: u64) {
            while self.events.len() > bounds.events_max.max(1) as usize {
                self.events.pop_front();
            }
            for index in 0..self.events.len().saturating_sub(1) {
                if self.bytes() > bytes_max {
                    self.events[index].value = None;
                }
            }
            while self.bytes() > bytes_max && self.events.len() > 1 {
                self.events.pop_front();
            }
        }

        fn since(&self, seq: u64, kind: Format) -> Resume {
            if seq == self.head {
                return Resume::UpToDate;
            }
            let sendable = |wanted: u64| {
                self.events.iter().any(|event| {
                    let delta = match kind {
                        Format::Patch => event.patch,
                        Format::Merge => event.merge,
                        Format::Full => None,
                    };
                    event.seq == wanted && (delta.is_some() || event.value.is_some())
                })
            };
            let all = seq < self.head && (seq + 1..=self.head).all(sendable);
            if all { events(seq + 1, self.head) } else { Resume::Snapshot }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Publish { value: usize, patch: Option<usize>, merge: Option<usize> },
        TrimTo { bytes: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let delta = || prop::option::weighted(0.8, 0..100usize);
        prop_oneof![
            9 => (0..1_000usize, delta(), delta())
                .prop_map(|(value, patch, merge)| Step::Publish { value, patch, merge }),
            1 => (0..10_000u64).prop_map(|bytes| Step::TrimTo { bytes }),
        ]
    }

    proptest! {
        #[test]
        fn it_does_what_the_naive_history_does(
            events_max in 0..20u32,
            bytes_max in 0..8_000u64,
            steps in prop::collection::vec(step(), 1..60),
        ) {
            let bounds = Bounds { events_max, bytes_max };
            let mut history = History::new(EPOCH, bounds);
            let mut naive = Naive::default();
            for step in steps {
                match step {
                    Step::Publish { value, patch, merge } => {
                        publish(&mut history, value, patch, merge);
                        let delta = |bytes: Option<usize>| bytes.filter(|_| naive.head > 0).map(|bytes| bytes as u64);
                        let (patch, merge) = (delta(patch), delta(merge));
                        let event = NaiveEvent { seq: naive.head + 1, value: Some(value as u64), patch, merge };
                        naive.events.push_back(event);
                        naive.head += 1;
                        naive.trim(bounds, bytes_max);
                    }
                    Step::TrimTo { bytes } => {
                        history.trim_to(bytes);
                        naive.trim(bounds, bytes.min(bytes_max));
                    }
                }
                prop_assert_eq!(history.bytes(), naive.bytes());
                prop_assert_eq!(history.len(), naive.events.len());
                prop_assert!(history.len() <= events_max.max(1) as usize);
                prop_assert!(history.bytes() <= bytes_max || history.len() == 1);
                prop_assert_eq!(history.head().unwrap_or_default(), Seq(naive.head));
                prop_assert_eq!(history.value().is_some(), naive.head > 0);
                for kind in KINDS {
                    for seq in 0..naive.head + 2 {
                        let resume = since(&history, seq, kind);
                        prop_assert_eq!(resume, naive.since(seq, kind), "{:?} since {}", kind, seq);
                        if let Resume::Events { first, last } = resume {
                            let sent: Vec<_> = history.events_from(first).collect();
                            prop_assert!(sent.iter().all(|event| event.content(kind).is_some()));
                            let seqs: Vec<_> = sent.iter().map(|event| event.seq().0).collect();
                            prop_assert_eq!(seqs, (first.0..=last.0).collect::<Vec<_>>());
                        }
                    }
                }
            }
        }
    }
}
