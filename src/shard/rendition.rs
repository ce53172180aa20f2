//! The frames of one sequence in one format and transport, as bytes in a log that subscribers read with cursors.
//!
//! Source: the fan-out design in ARCHITECTURE.md («a log and cursors, no queues»).
//! Memory: frames until every subscriber has them (then none), at most `history_bytes`; 16 bytes a subscriber.
//! Errors: none. A cursor that fell off the log is told ([`At::Gone`]) and gets a snapshot.
//! Not here: sockets, and which connection a subscriber is.

use std::cell::{Cell, Ref, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use crate::frame::RenditionKind;
use crate::ids::Seq;
use crate::limits::CHUNK_BYTES;
use crate::time::Instant;

/// First position of a log: far from 0, so that older frames can be put in front.
const ORIGIN: u64 = 1 << 48;

/// A cursor before every log: its reader has fallen off.
const FALLEN: u64 = 0;
/// The same, where the reader has missed a change of the status as well.
const FALLEN_UNTOLD: u64 = 1;

/// Whether a reader at `cursor`, which has fallen off its log, has missed the status frame that ends at `status_end`.
pub(super) fn misses_status(cursor: u64, status_end: u64) -> bool {
    cursor == FALLEN_UNTOLD || cursor > FALLEN_UNTOLD && cursor < status_end
}

/// What the logs of a core hold together.
#[derive(Debug, Default)]
pub struct Meter {
    /// Bytes that only stalled readers still hold.
    pub pinned: Cell<u64>,
    /// Bytes that logs hold.
    pub logged: Cell<u64>,
    /// Past so many bytes in logs, each keeps only its newest chunk, and nobody's past is put in front of one.
    pub logged_max: Cell<u64>,
}

impl Meter {
    fn is_full(&self) -> bool {
        self.logged.get() > self.logged_max.get()
    }

    fn log(&self, bytes: u64) {
        self.logged.set(self.logged.get() + bytes);
    }

    fn unlog(&self, bytes: u64) {
        self.logged.set(self.logged.get() - bytes);
    }
}

/// Where frames begin in a chunk, each with its sequence number.
type Places = Vec<(usize, u64)>;

/// A contiguous piece of frames. Shared between its log and the connections that have sent a part of it.
#[derive(Debug)]
pub struct Block {
    bytes: RefCell<Vec<u8>>,
    retired: Cell<bool>,
    meter: Rc<Meter>,
}

impl Block {
    /// A block of `bytes`; `meter` counts those that only stalled readers still hold.
    pub fn new(bytes: Vec<u8>, meter: &Rc<Meter>) -> Rc<Block> {
        Rc::new(Block { bytes: RefCell::new(bytes), retired: Cell::new(false), meter: Rc::clone(meter) })
    }

    /// Its bytes.
    pub fn bytes(&self) -> Ref<'_, Vec<u8>> {
        self.bytes.borrow()
    }

    /// The log lets go of it: from now on it is there for those who hold it alone.
    fn retire(&self) {
        if !self.retired.replace(true) {
            let pinned = &self.meter.pinned;
            pinned.set(pinned.get() + self.bytes.borrow().len() as u64);
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.retired.get() {
            let pinned = &self.meter.pinned;
            pinned.set(pinned.get() - self.bytes.borrow().len() as u64);
        }
    }
}

#[derive(Debug)]
struct Chunk {
    start: u64,
    block: Rc<Block>,
}

#[derive(Clone, Copy, Debug)]
struct FrameAt {
    start: u64,
    /// 0 for a frame that is no event.
    seq: u64,
}

/// One subscriber that takes every frame: who it is and how far it has read.
#[derive(Clone, Copy, Debug)]
pub struct Subscriber {
    /// Its connection's place.
    pub connection: u32,
    /// Which of that connection's subscriptions it is.
    pub slot: u16,
    /// Whether its connection has other bytes to send first: the sweep passes it over and it catches up by itself.
    pub behind: bool,
    /// Where the next frame it has not been given starts.
    pub cursor: u64,
}

/// One subscriber that takes an event at most every so often.
#[derive(Clone, Copy, Debug)]
pub struct Rated {
    /// Its connection's place.
    pub connection: u32,
    /// Which of that connection's subscriptions it is.
    pub slot: u16,
    /// Where the next frame it has not been given starts.
    pub cursor: u64,
    /// Least time between two events.
    pub interval_ms: u32,
    /// When the next may go out.
    pub open_at: Instant,
    /// Whether a timer is set for that.
    pub armed: bool,
}

/// What stands at a cursor.
#[derive(Debug)]
pub enum At {
    /// Nothing yet: it has read everything.
    End,
    /// These bytes of this block, whole frames from the cursor on.
    Bytes(Rc<Block>, Range<usize>),
    /// The log no longer holds it.
    Gone,
}

/// What waits behind the cursor of a [`Rated`] subscriber.
#[derive(Debug)]
pub enum Waiting {
    /// No event.
    Nothing,
    /// One event, these bytes of this block.
    One(Rc<Block>, Range<usize>),
    /// More than one, or what is no longer kept.
    More,
}

/// A pass over the subscribers, in turns.
#[derive(Clone, Copy, Debug)]
pub struct Sweep {
    /// Whose turn it is.
    pub next: usize,
    /// How many are left.
    pub left: usize,
    /// When it began.
    pub begun: Instant,
}

/// The log of one rendition and those who read it.
#[derive(Debug)]
pub struct Rendition {
    kind: RenditionKind,
    chunks: VecDeque<Chunk>,
    frames: VecDeque<FrameAt>,
    end: u64,
    bytes: u64,
    keep_until: Option<Instant>,
    snapshot: Option<(Seq, Rc<Block>)>,
    meter: Rc<Meter>,
    /// Where the last status frame ends: who missed it is told the status again.
    pub status_end: u64,
    /// Those who take every frame.
    pub subscribers: Vec<Subscriber>,
    /// Those who take an event at most every so often.
    pub rated: Vec<Rated>,
    /// How many of `subscribers` are behind.
    pub behind: usize,
    /// The pass under way.
    pub sweep: Option<Sweep>,
    /// Whether it stands in the queue of renditions to be swept.
    pub queued: bool,
    /// Where the next pass starts, so that nobody is always last.
    pub rotation: u32,
    /// When the newest event not yet swept was received, for the lag metric.
    pub unswept_since: Option<Instant>,
}

impl Rendition {
    /// An empty log. `meter` counts, for the core, what logs and stalled readers hold.
    pub fn new(kind: RenditionKind, meter: &Rc<Meter>) -> Rendition {
        Rendition {
            kind,
            chunks: VecDeque::new(),
            frames: VecDeque::new(),
            end: ORIGIN,
            bytes: 0,
            keep_until: None,
            snapshot: None,
            meter: Rc::clone(meter),
            status_end: 0,
            subscribers: Vec::new(),
            rated: Vec::new(),
            behind: 0,
            sweep: None,
            queued: false,
            rotation: 0,
            unswept_since: None,
        }
    }

    /// How its frames are written.
    pub fn kind(&self) -> RenditionKind {
        self.kind
    }

    /// Whether nobody reads it.
    pub fn is_idle(&self) -> bool {
        self.subscribers.is_empty() && self.rated.is_empty()
    }

    /// Where the next frame will stand: the cursor of one who has read everything.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Bytes of frames it holds.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn start(&self) -> u64 {
        self.chunks.front().map_or(self.end, |chunk| chunk.start)
    }

    /// Appends one frame, which `write` puts at the end of the buffer it is given. `seq` is `None` for a frame that is
    /// no event. Keeps at most `bytes_max` bytes of older frames besides.
    pub fn append(&mut self, seq: Option<Seq>, bytes_max: u64, write: impl FnOnce(&mut Vec<u8>)) {
        let fits = self.chunks.back().is_some_and(|chunk| chunk.block.bytes.borrow().len() < CHUNK_BYTES / 2);
        if !fits {
            let block = Block::new(Vec::new(), &self.meter);
            self.chunks.push_back(Chunk { start: self.end, block });
        }
        let chunk = self.chunks.back().expect("a chunk was just pushed");
        let length = {
            let mut bytes = chunk.block.bytes.borrow_mut();
            let before = bytes.len();
            write(&mut bytes);
            (bytes.len() - before) as u64
        };
        self.frames.push_back(FrameAt { start: self.end, seq: seq.map_or(0, |seq| seq.0) });
        self.end += length;
        self.bytes += length;
        self.meter.log(length);
        let bytes_max = if self.meter.is_full() { 0 } else { bytes_max };
        if seq.is_none() {
            self.status_end = self.end;
            // Whoever has fallen off before will not come by this frame.
            for reader in self.subscribers.iter_mut().filter(|reader| reader.cursor == FALLEN) {
                reader.cursor = FALLEN_UNTOLD;
            }
        } else if let Some((_, snapshot)) = self.snapshot.take() {
            snapshot.retire();
        }
        while self.bytes > bytes_max && self.chunks.len() > 1 {
            self.drop_front();
        }
    }

    /// Puts the events before the log's first in front of it: `write` is called once for each of `seqs`, in order.
    /// They are kept until `keep_until` at least, for others who resume from about there.
    pub fn prepend(
        &mut self,
        seqs: impl Iterator<Item = Seq>,
        keep_until: Instant,
        mut write: impl FnMut(Seq, &mut Vec<u8>),
    ) {
        // What is put in front takes the positions of what was dropped there: whoever stands among those must not read it.
        let (start, status_end) = (self.start(), self.status_end);
        for reader in self.subscribers.iter_mut().filter(|reader| reader.cursor < start) {
            reader.cursor = if misses_status(reader.cursor, status_end) { FALLEN_UNTOLD } else { FALLEN };
        }
        for reader in self.rated.iter_mut().filter(|reader| reader.cursor < start) {
            reader.cursor = FALLEN;
        }
        let mut pieces: Vec<(Vec<u8>, Places)> = Vec::new();
        for seq in seqs {
            if pieces.last().is_none_or(|(bytes, _)| bytes.len() >= CHUNK_BYTES / 2) {
                pieces.push((Vec::new(), Vec::new()));
            }
            let (bytes, places) = pieces.last_mut().expect("a piece was just pushed");
            places.push((bytes.len(), seq.0));
            write(seq, bytes);
        }
        for (bytes, places) in pieces.into_iter().rev() {
            let start = self.start() - bytes.len() as u64;
            for &(place, seq) in places.iter().rev() {
                self.frames.push_front(FrameAt { start: start + place as u64, seq });
            }
            self.bytes += bytes.len() as u64;
            self.meter.log(bytes.len() as u64);
            self.chunks.push_front(Chunk { start, block: Block::new(bytes, &self.meter) });
        }
        self.keep_until = Some(keep_until);
    }

    /// Whether the core's logs have no room for anybody's past.
    pub fn is_full(&self) -> bool {
        self.meter.is_full()
    }

    /// The first event it holds.
    pub fn first_event(&self) -> Option<Seq> {
        self.frames.iter().find(|frame| frame.seq != 0).map(|frame| Seq(frame.seq))
    }

    /// Where event `seq` starts.
    pub fn position_of(&self, seq: Seq) -> Option<u64> {
        self.frames.iter().find(|frame| frame.seq == seq.0).map(|frame| frame.start)
    }

    /// What stands at `cursor`, up to the end of its chunk.
    pub fn at(&self, cursor: u64) -> At {
        if cursor >= self.end {
            return At::End;
        }
        if cursor < self.start() {
            return At::Gone;
        }
        let after = self.chunks.partition_point(|chunk| chunk.start <= cursor);
        let chunk = &self.chunks[after - 1];
        let from = usize::try_from(cursor - chunk.start).expect("a chunk is in memory");
        let to = chunk.block.bytes.borrow().len();
        At::Bytes(Rc::clone(&chunk.block), from..to)
    }

    /// The bytes at `cursor`, for the sweep's fast path: nothing is counted up.
    pub fn peek(&self, cursor: u64) -> Option<(Ref<'_, Vec<u8>>, usize)> {
        let chunk = self.chunks.back()?;
        if cursor < chunk.start || cursor >= self.end {
            return None;
        }
        Some((chunk.block.bytes(), usize::try_from(cursor - chunk.start).ok()?))
    }

    /// The end of the frame that holds the byte before `position`.
    pub fn frame_end(&self, position: u64) -> u64 {
        let after = self.frames.partition_point(|frame| frame.start < position);
        self.frames.get(after).map_or(self.end, |frame| frame.start)
    }

    /// The reader whose turn it is in the pass under way; `None` where the pass is over.
    pub fn next_in_sweep(&mut self) -> Option<usize> {
        let readers = self.subscribers.len();
        let sweep = self.sweep.as_mut().filter(|sweep| sweep.left > 0 && readers > 0)?;
        let next = if sweep.next < readers { sweep.next } else { 0 };
        sweep.next = next + 1;
        sweep.left -= 1;
        Some(next)
    }

    /// Takes a reader out of the sweep, or back into it.
    pub fn set_behind(&mut self, position: u32, behind: bool) {
        let Some(reader) = self.subscribers.get_mut(position as usize) else { return };
        if reader.behind != behind {
            reader.behind = behind;
            if behind { self.behind += 1 } else { self.behind -= 1 }
        }
    }

    /// How many frames lie between two cursors.
    pub fn frames_between(&self, from: u64, to: u64) -> usize {
        // Nearly always one frame, the last: look from the end.
        if self.frames.back().is_some_and(|last| last.start == from) && to == self.end {
            return 1;
        }
        let place = |at: u64| self.frames.partition_point(|frame| frame.start < at);
        place(to) - place(from)
    }

    /// What waits behind a rated subscriber's cursor.
    pub fn waiting(&self, cursor: u64) -> Waiting {
        if cursor < self.start() {
            return Waiting::More;
        }
        let first = self.frames.partition_point(|frame| frame.start < cursor);
        let mut events = self.frames.range(first..).filter(|frame| frame.seq != 0);
        let Some(event) = events.next() else { return Waiting::Nothing };
        if events.next().is_some() {
            return Waiting::More;
        }
        match self.at(event.start) {
            At::Bytes(block, range) => {
                let length =
                    usize::try_from(self.frame_end(event.start + 1) - event.start).expect("a frame is in memory");
                Waiting::One(block, range.start..range.start + length)
            }
            At::End | At::Gone => Waiting::More,
        }
    }

    /// The newest value as one frame, written by `write` at most once for each event.
    pub fn snapshot(&mut self, head: Seq, write: impl FnOnce(&mut Vec<u8>)) -> Rc<Block> {
        if let Some((seq, block)) = &self.snapshot
            && *seq == head
        {
            return Rc::clone(block);
        }
        let mut bytes = Vec::new();
        write(&mut bytes);
        let block = Block::new(bytes, &self.meter);
        if let Some((_, old)) = self.snapshot.replace((head, Rc::clone(&block))) {
            old.retire();
        }
        block
    }

    /// Lets go of all frames, where every subscriber has them and nobody is expected to resume. A buffer that nobody
    /// else holds is used again.
    pub fn trim(&mut self, now: Instant) {
        let unswept = self.queued || self.sweep.is_some();
        if unswept || self.behind > 0 || self.keep_until.is_some_and(|until| now < until) {
            return;
        }
        if self.rated.iter().any(|rated| rated.cursor < self.end) {
            return;
        }
        self.keep_until = None;
        while self.chunks.len() > 1 {
            self.drop_front();
        }
        let end = self.end;
        if let Some(chunk) = self.chunks.front_mut() {
            let small = chunk.block.bytes.borrow().capacity() <= 2 * CHUNK_BYTES;
            if Rc::strong_count(&chunk.block) == 1 && small {
                chunk.block.bytes.borrow_mut().clear();
                chunk.start = end;
            } else {
                chunk.block.retire();
                self.chunks.clear();
            }
        }
        self.frames.clear();
        if self.frames.capacity() > 256 {
            self.frames.shrink_to(16);
        }
        self.meter.unlog(std::mem::take(&mut self.bytes));
    }

    /// Forgets everything, and has every reader get a snapshot: what follows does not follow on what it has. `untold`:
    /// whether the status is another as well.
    pub fn restart(&mut self, untold: bool) {
        self.clear();
        let status_end = self.status_end;
        for reader in &mut self.subscribers {
            let untold = untold || misses_status(reader.cursor, status_end);
            reader.cursor = if untold { FALLEN_UNTOLD } else { FALLEN };
        }
        for reader in &mut self.rated {
            reader.cursor = FALLEN;
        }
    }

    fn clear(&mut self) {
        for chunk in self.chunks.drain(..) {
            chunk.block.retire();
        }
        if let Some((_, snapshot)) = self.snapshot.take() {
            snapshot.retire();
        }
        self.frames.clear();
        self.meter.unlog(std::mem::take(&mut self.bytes));
        self.keep_until = None;
    }

    fn drop_front(&mut self) {
        let Some(chunk) = self.chunks.pop_front() else { return };
        let length = chunk.block.bytes.borrow().len() as u64;
        self.bytes -= length;
        self.meter.unlog(length);
        chunk.block.retire();
        let start = self.start();
        while self.frames.front().is_some_and(|frame| frame.start < start) {
            self.frames.pop_front();
        }
    }
}

impl Drop for Rendition {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::message::Format;
    use crate::frame::{Encoding, Transport};

    fn log() -> (Rendition, Rc<Meter>) {
        let meter = Rc::new(Meter::default());
        meter.logged_max.set(1 << 30);
        let kind = RenditionKind { transport: Transport::WebSocket(Encoding::Plain), format: Format::Patch };
        (Rendition::new(kind, &meter), meter)
    }

    fn push(log: &mut Rendition, seq: u64, text: &str) {
        log.append(Some(Seq(seq)), 1 << 20, |out| out.extend_from_slice(text.as_bytes()));
    }

    fn read(log: &Rendition, cursor: u64) -> String {
        match log.at(cursor) {
            At::Bytes(block, range) => String::from_utf8(block.bytes()[range].to_vec()).unwrap(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn a_cursor_reads_what_was_appended_after_it() {
        let (mut log, _) = log();
        let start = log.end();
        push(&mut log, 1, "one");
        let middle = log.end();
        push(&mut log, 2, "two");
        assert_eq!(read(&log, start), "onetwo");
        assert_eq!(read(&log, middle), "two");
        assert_eq!(read(&log, log.end()), "End");
        assert_eq!((log.frames_between(start, log.end()), log.frames_between(middle, log.end())), (2, 1));
        assert_eq!(log.frame_end(start + 1), middle);
        assert_eq!(log.frame_end(middle), middle);
        assert_eq!(log.frame_end(middle + 2), log.end());
    }

    #[test]
    fn older_events_go_in_front_and_newer_cursors_stay() {
        let (mut log, _) = log();
        push(&mut log, 5, "five");
        let at_five = log.position_of(Seq(5)).unwrap();
        log.prepend((3..5).map(Seq), Instant::from_micros(9), |seq, out| out.extend(format!("<{seq}>").bytes()));
        assert_eq!(log.first_event(), Some(Seq(3)));
        assert_eq!(read(&log, at_five), "five");
        assert_eq!(read(&log, log.position_of(Seq(3)).unwrap()), "<3><4>");
        assert_eq!(read(&log, log.position_of(Seq(4)).unwrap()), "<4>");
    }

    #[test]
    fn a_trimmed_log_reuses_its_buffer_unless_someone_holds_it() {
        let (mut log, meter) = log();
        let start = log.end();
        push(&mut log, 1, "one");
        let At::Bytes(held, _) = log.at(start) else { panic!("the frame is there") };
        log.trim(Instant::from_micros(1));
        assert_eq!(meter.pinned.get(), 3, "a stalled reader alone holds it now");
        assert!(matches!(log.at(start), At::Gone | At::End));
        push(&mut log, 2, "two");
        assert_eq!(&held.bytes()[..], b"one", "what is held never changes");
        drop(held);
        assert_eq!(meter.pinned.get(), 0);
    }

    #[test]
    fn a_log_over_its_bound_drops_whole_chunks_from_the_front() {
        let (mut log, _) = log();
        let start = log.end();
        let big = "x".repeat(CHUNK_BYTES / 2);
        for seq in 1..=10 {
            log.append(Some(Seq(seq)), 3 * CHUNK_BYTES as u64 / 2, |out| out.extend_from_slice(big.as_bytes()));
        }
        assert!(matches!(log.at(start), At::Gone));
        assert_eq!(log.first_event(), Some(Seq(8)));
        assert!(log.bytes() <= 3 * CHUNK_BYTES as u64 / 2);
        assert_eq!(read(&log, log.position_of(Seq(10)).unwrap()), big);
    }

    #[test]
    fn logs_that_are_full_together_keep_their_newest_chunk_alone() {
        let (mut log, meter) = log();
        let big = "x".repeat(CHUNK_BYTES);
        for seq in 1..=3 {
            push(&mut log, seq, &big);
        }
        assert_eq!((log.first_event(), meter.logged.get()), (Some(Seq(1)), 3 * CHUNK_BYTES as u64));
        meter.logged_max.set(CHUNK_BYTES as u64);
        push(&mut log, 4, "four");
        assert_eq!((log.first_event(), meter.logged.get()), (Some(Seq(4)), 4));
        drop(log);
        assert_eq!((meter.logged.get(), meter.pinned.get()), (0, 0), "what is gone is not counted");
    }

    #[test]
    fn a_rated_reader_is_told_whether_one_event_or_more_wait() {
        let (mut log, _) = log();
        let start = log.end();
        assert!(matches!(log.waiting(start), Waiting::Nothing));
        log.append(None, 1 << 20, |out| out.extend_from_slice(b"status"));
        assert!(matches!(log.waiting(start), Waiting::Nothing));
        push(&mut log, 1, "one");
        let Waiting::One(block, range) = log.waiting(start) else { panic!("one waits") };
        assert_eq!(&block.bytes()[range], b"one");
        push(&mut log, 2, "two");
        assert!(matches!(log.waiting(start), Waiting::More));
    }

    #[test]
    fn whoever_fell_off_before_a_status_is_told_it() {
        let (mut log, _) = log();
        let end = log.end();
        log.subscribers.push(Subscriber { connection: 1, slot: 0, behind: true, cursor: end });
        log.restart(false);
        assert!(!misses_status(log.subscribers[0].cursor, log.status_end), "it has missed none yet");
        log.append(None, 1 << 20, |out| out.extend_from_slice(b"status"));
        assert!(matches!(log.at(log.subscribers[0].cursor), At::Gone));
        assert!(misses_status(log.subscribers[0].cursor, log.status_end));
    }
}
