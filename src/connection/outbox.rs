//! What waits for one connection's socket besides the log: answers, control frames, and the rest of a frame half sent.
//!
//! Memory: answers up to `limits::CONTROL_BYTES_MAX` (a connection over it is not read from) and shared blocks, each
//! bounded by a value's size; at most one snapshot and one begun frame a subscription. Errors: none.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use crate::time::Instant;

/// Bytes that many connections may hold at once, behind whatever keeps them.
pub trait Shared: std::fmt::Debug {
    /// Calls `read` with the bytes.
    fn with(&self, read: &mut dyn FnMut(&[u8]));
}

#[derive(Debug)]
enum Item {
    /// Bytes of this connection alone.
    Own(Vec<u8>),
    /// A frame of a log or a snapshot, which others may hold too, for one subscription.
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
    pub fn push_frame(&mut self, slot: u16, block: Rc<dyn Shared>, range: Range<usize>) {
        self.items.push_back(Item::Frame(block, range, slot));
    }

    /// Puts the rest of a frame half sent before everything else.
    pub fn push_rest(&mut self, slot: u16, block: Rc<dyn Shared>, range: Range<usize>) {
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
        self.drop_unsent(|_| true);
    }

    /// Takes out the frames of one subscription of which no byte has been sent.
    pub fn drop_unsent_of(&mut self, slot: u16) {
        self.drop_unsent(|of| of == slot);
    }

    fn drop_unsent(&mut self, drops: impl Fn(u16) -> bool) {
        let mut begun = self.begun || self.sent > 0;
        self.items
            .retain(|item| std::mem::take(&mut begun) || !matches!(item, Item::Frame(_, _, slot) if drops(*slot)));
    }

    /// Calls `read` with the bytes that come next; not at all where nothing waits.
    pub fn front(&self, read: &mut dyn FnMut(&[u8])) {
        match self.items.front() {
            Some(Item::Own(bytes)) => read(bytes.get(self.sent..).unwrap_or_default()),
            Some(Item::Value(bytes)) => read(bytes.get(self.sent..).unwrap_or_default()),
            Some(Item::Frame(block, range, _)) => {
                let range = range.start + self.sent..range.end;
                block.with(&mut |bytes| read(bytes.get(range.clone()).unwrap_or_default()));
            }
            None => {}
        }
    }

    /// Notes that `count` of those bytes have been sent.
    pub fn advance(&mut self, count: usize) {
        self.sent += count;
        let length = match self.items.front() {
            Some(Item::Own(bytes)) => bytes.len(),
            Some(Item::Value(bytes)) => bytes.len(),
            Some(Item::Frame(_, range, _)) => range.len(),
            None => 0,
        };
        if self.sent >= length {
            if let Some(Item::Own(bytes)) = self.items.pop_front() {
                self.control -= bytes.len();
            }
            self.sent = 0;
            self.begun = false;
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
        let mut all = Vec::new();
        while !outbox.is_empty() {
            let mut taken = 0;
            outbox.front(&mut |bytes| {
                taken = bytes.len().min(step);
                all.extend_from_slice(&bytes[..taken]);
            });
            outbox.advance(taken);
        }
        String::from_utf8(all).unwrap()
    }

    #[test]
    fn what_goes_in_comes_out_in_order_at_any_step() {
        for step in 1..8 {
            let mut outbox = Outbox::default();
            outbox.write(|out| out.extend_from_slice(b"head"));
            outbox.push_frame(0, Rc::new(Fixed(b"..frame..")), 2..7);
            outbox.push_value(Arc::from(&b"value"[..]));
            outbox.write(|out| out.extend_from_slice(b"ta"));
            outbox.write(|out| out.extend_from_slice(b"il"));
            assert_eq!(outbox.control_bytes(), 8);
            assert_eq!(drain(&mut outbox, step), "headframevaluetail");
            assert_eq!(outbox.control_bytes(), 0);
        }
    }

    #[test]
    fn a_begun_frame_is_finished_and_later_ones_are_dropped() {
        let mut outbox = Outbox::default();
        outbox.push_frame(0, Rc::new(Fixed(b"first")), 0..5);
        outbox.push_frame(0, Rc::new(Fixed(b"second")), 0..6);
        outbox.advance(2);
        outbox.drop_unsent_frames();
        outbox.write(|out| out.extend_from_slice(b"close"));
        assert_eq!(drain(&mut outbox, 3), "rstclose");
    }

    #[test]
    fn the_rest_of_a_frame_goes_first_and_counts_as_begun() {
        let mut outbox = Outbox::default();
        outbox.write(|out| out.extend_from_slice(b"pong"));
        outbox.push_rest(0, Rc::new(Fixed(b"frame")), 2..5);
        outbox.push_frame(0, Rc::new(Fixed(b"later")), 0..5);
        outbox.drop_unsent_frames();
        assert_eq!(drain(&mut outbox, 2), "amepong");
    }

    #[test]
    fn one_subscription_ends_without_taking_anothers_frames() {
        let mut outbox = Outbox::default();
        outbox.push_frame(1, Rc::new(Fixed(b"one,")), 0..4);
        outbox.push_frame(2, Rc::new(Fixed(b"two,")), 0..4);
        outbox.push_frame(1, Rc::new(Fixed(b"more")), 0..4);
        outbox.drop_unsent_of(1);
        assert_eq!(drain(&mut outbox, 3), "two,");
    }
}
