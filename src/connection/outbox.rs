//! What waits for one connection's socket besides the log: answers, control frames, and the rest of a frame half sent.
//!
//! Memory: answers up to `limits::CONTROL_BYTES_MAX` (a connection over it is not read from) and shared blocks, each
//! bounded by a value's size; at most one snapshot and one begun frame a subscription. Errors: none.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use crate::time::Instant;

/// What waits is put together for one send up to so many bytes.
const JOINED_BYTES_MAX: usize = 16 << 10;

/// Bytes that many connections may hold at once, behind whatever keeps them.
pub trait Shared: std::fmt::Debug {
    /// Calls `read` with the bytes.
    fn with(&self, read: &mut dyn FnMut(&[u8]));
}

#[derive(Debug)]
enum Item {
    /// Bytes of this connection alone.
    Own(Vec<u8>),
    /// A frame of a log or a snapshot, which others may hold too, for one of the connection's subscriptions.
    Frame(Rc<dyn Shared>, Range<usize>, u16),
    /// A value as the body of an answer.
    Value(Arc<[u8]>),
}

/// The queue before a socket.
#[derive(Debug, Default)]
pub struct Outbox {
    items: VecDeque<Item>,
    /// How much of the first item has been sent.
    sent: usize,
    /// Whether the first item is the rest of a frame that has begun to leave.
    begun: bool,
    control: usize,
    /// Since when the socket has taken nothing.
    pub stalled_since: Option<Instant>,
}

impl Outbox {
    /// Bytes of this connection alone that wait.
    pub fn control_bytes(&self) -> usize {
        self.control
    }

    /// How many items wait: runs of answers, frames, values.
    pub fn items(&self) -> usize {
        self.items.len()
    }

    /// How many bytes wait.
    pub fn bytes(&self) -> usize {
        self.items.iter().map(Item::len).sum::<usize>() - self.sent
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Appends bytes of this connection, by `write`.
    pub fn write(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        if !matches!(self.items.back(), Some(Item::Own(_))) {
            self.items.push_back(Item::Own(Vec::new()));
        }
        let Some(Item::Own(bytes)) = self.items.back_mut() else { return };
        let before = bytes.len();
        write(bytes);
        self.control += bytes.len() - before;
    }

    /// Appends part of a shared block, for the subscription in `slot`.
    pub fn push_frame(&mut self, block: Rc<dyn Shared>, range: Range<usize>, slot: u16) {
        self.items.push_back(Item::Frame(block, range, slot));
    }

    /// Puts the rest of a frame half sent before everything else.
    pub fn push_rest(&mut self, block: Rc<dyn Shared>, range: Range<usize>, slot: u16) {
        debug_assert!(self.sent == 0, "only one item is ever half sent");
        self.items.push_front(Item::Frame(block, range, slot));
        self.begun = true;
    }

    /// Appends a value.
    pub fn push_value(&mut self, value: Arc<[u8]>) {
        self.items.push_back(Item::Value(value));
    }

    /// Takes out every stream frame of which no byte has been sent.
    pub fn drop_unsent_frames(&mut self) {
        self.retain_frames(|_| false);
    }

    /// The same for one subscription; what waits for others stays.
    pub fn drop_unsent_frames_of(&mut self, slot: u16) {
        self.retain_frames(|of| of != slot);
    }

    fn retain_frames(&mut self, stays: impl Fn(u16) -> bool) {
        let begun = self.begun || self.sent > 0;
        let mut first = true;
        self.items.retain(|item| match item {
            _ if std::mem::take(&mut first) && begun => true,
            Item::Frame(_, _, slot) => stays(*slot),
            _ => true,
        });
    }

    /// Calls `read` with the bytes that come next; not at all where nothing waits. Where small items follow each other
    /// they come as one piece, put together in `scratch`.
    pub fn front(&self, scratch: &mut Vec<u8>, read: &mut dyn FnMut(&[u8])) {
        let Some(first) = self.items.front() else { return };
        if self.items.len() == 1 || first.len() - self.sent >= JOINED_BYTES_MAX {
            return first.with(self.sent, read);
        }
        scratch.clear();
        let mut sent = self.sent;
        for item in &self.items {
            item.with(sent, &mut |bytes| {
                let room = JOINED_BYTES_MAX - scratch.len();
                scratch.extend_from_slice(&bytes[..bytes.len().min(room)]);
            });
            sent = 0;
            if scratch.len() == JOINED_BYTES_MAX {
                break;
            }
        }
        read(scratch);
    }

    /// Notes that `count` of those bytes have been sent.
    pub fn advance(&mut self, mut count: usize) {
        while let Some(first) = self.items.front() {
            let left = first.len() - self.sent;
            if count < left {
                self.sent += count;
                return;
            }
            count -= left;
            if let Some(Item::Own(bytes)) = self.items.pop_front() {
                self.control -= bytes.len();
            }
            self.sent = 0;
            self.begun = false;
        }
    }
}

impl Item {
    fn len(&self) -> usize {
        match self {
            Item::Own(bytes) => bytes.len(),
            Item::Value(bytes) => bytes.len(),
            Item::Frame(_, range, _) => range.len(),
        }
    }

    /// Calls `read` with its bytes from `from` on.
    fn with(&self, from: usize, read: &mut dyn FnMut(&[u8])) {
        match self {
            Item::Own(bytes) => read(bytes.get(from..).unwrap_or_default()),
            Item::Value(bytes) => read(bytes.get(from..).unwrap_or_default()),
            Item::Frame(block, range, _) => {
                let range = range.start + from..range.end;
                block.with(&mut |bytes| read(bytes.get(range.clone()).unwrap_or_default()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fixed(&'static [u8]);

    impl Shared for Fixed {
        fn with(&self, read: &mut dyn FnMut(&[u8])) {
            read(self.0);
        }
    }

    fn drain(outbox: &mut Outbox, step: usize) -> String {
        let (mut all, mut scratch) = (Vec::new(), Vec::new());
        while !outbox.is_empty() {
            let mut taken = 0;
            outbox.front(&mut scratch, &mut |bytes| {
                taken = bytes.len().min(step);
                all.extend_from_slice(&bytes[..taken]);
            });
            outbox.advance(taken);
        }
        String::from_utf8(all).unwrap()
    }

    #[test]
    fn what_goes_in_comes_out_in_order_at_any_step() {
        for step in (1..8).chain([20]) {
            let mut outbox = Outbox::default();
            outbox.write(|out| out.extend_from_slice(b"head"));
            outbox.push_frame(Rc::new(Fixed(b"..frame..")), 2..7, 0);
            outbox.push_value(Arc::from(&b"value"[..]));
            outbox.write(|out| out.extend_from_slice(b"ta"));
            outbox.write(|out| out.extend_from_slice(b"il"));
            assert_eq!((outbox.control_bytes(), outbox.bytes()), (8, 18));
            outbox.advance(0);
            assert_eq!(outbox.bytes(), 18);
            assert_eq!(drain(&mut outbox, step), "headframevaluetail");
            assert_eq!(outbox.control_bytes(), 0);
        }
    }

    #[test]
    fn small_items_are_one_piece_and_large_ones_go_from_where_they_stand() {
        let mut outbox = Outbox::default();
        outbox.write(|out| out.extend_from_slice(b"head"));
        outbox.push_value(Arc::from(vec![7; 3 * JOINED_BYTES_MAX]));
        outbox.write(|out| out.extend_from_slice(b"tail"));
        let mut pieces = Vec::new();
        while !outbox.is_empty() {
            let mut taken = 0;
            outbox.front(&mut Vec::new(), &mut |bytes| taken = bytes.len());
            pieces.push(taken);
            outbox.advance(taken);
        }
        // The head with as much of the value as goes with it, the value as it stands, the tail.
        assert_eq!(pieces, [JOINED_BYTES_MAX, 2 * JOINED_BYTES_MAX + 4, 4]);
    }

    #[test]
    fn a_begun_frame_is_finished_and_later_ones_are_dropped() {
        let mut outbox = Outbox::default();
        outbox.push_frame(Rc::new(Fixed(b"first")), 0..5, 0);
        outbox.push_frame(Rc::new(Fixed(b"second")), 0..6, 0);
        outbox.advance(2);
        outbox.drop_unsent_frames();
        outbox.write(|out| out.extend_from_slice(b"close"));
        assert_eq!(drain(&mut outbox, 3), "rstclose");
    }

    #[test]
    fn the_rest_of_a_frame_goes_first_and_counts_as_begun() {
        let mut outbox = Outbox::default();
        outbox.write(|out| out.extend_from_slice(b"pong"));
        outbox.push_rest(Rc::new(Fixed(b"frame")), 2..5, 0);
        outbox.push_frame(Rc::new(Fixed(b"later")), 0..5, 0);
        outbox.drop_unsent_frames();
        assert_eq!(drain(&mut outbox, 2), "amepong");
    }

    #[test]
    fn giving_up_one_subscription_leaves_what_waits_for_the_others() {
        let mut outbox = Outbox::default();
        outbox.push_frame(Rc::new(Fixed(b"begun")), 0..5, 3);
        outbox.push_frame(Rc::new(Fixed(b"gone")), 0..4, 3);
        outbox.push_frame(Rc::new(Fixed(b"kept")), 0..4, 4);
        outbox.advance(1);
        outbox.drop_unsent_frames_of(3);
        assert_eq!(drain(&mut outbox, 2), "egunkept");
    }
}
