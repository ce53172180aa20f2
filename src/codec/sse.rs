//! The event stream of SSE: events -> bytes, and for the `watch` command bytes -> events.
//!
//! Source: WHATWG HTML section 9.2 (server-sent events).
//! Memory: encoding appends to the caller's buffer; a [`Decoder`] holds one event, at most its `event_bytes_max`.
//! Errors: [`EventError`], the server's fault, from decoding only.
//! Not here: HTTP around the stream (`codec::http`), what the data means (`codec::message`, `frame`).

use std::io::Write;

use crate::ids::ResumePoint;

/// A comment, which clients skip: keeps the connection in use.
pub const HEARTBEAT: &[u8] = b":\n\n";

/// Appends an event named `event`, with `id` where it moves the stream.
///
/// `data` is UTF-8; restcast's is JSON without white space and so one line. Were it to hold line ends, each line becomes a
/// `data:` of its own, and the client joins them by `\n`. `event` must hold no line end: it is one of the frames' types.
pub fn write_event(out: &mut Vec<u8>, event: &str, id: Option<ResumePoint>, data: &[u8]) {
    assert!(!event.contains(['\r', '\n']), "an event's name is one of the frames' types");
    out.reserve(data.len() + event.len() + 64);
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(event.as_bytes());
    if let Some(id) = id {
        write!(out, "\nid: {id}").expect("a Vec takes every write");
    }
    for line in lines(data) {
        out.extend_from_slice(b"\ndata: ");
        out.extend_from_slice(line);
    }
    out.extend_from_slice(b"\n\n");
}

/// Appends the time a client is to wait before it reconnects, in milliseconds. It makes no event.
pub fn write_retry(out: &mut Vec<u8>, retry_ms: u64) {
    write!(out, "retry: {retry_ms}\n\n").expect("a Vec takes every write");
}

/// Appends a comment that clients skip.
pub fn write_heartbeat(out: &mut Vec<u8>) {
    out.extend_from_slice(HEARTBEAT);
}

/// The lines of `data`, which ends of any of the three kinds part: CR LF, LF and CR.
fn lines(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(data);
    std::iter::from_fn(move || {
        let all = rest?;
        let Some(end) = memchr::memchr2(b'\r', b'\n', all) else { return rest.take() };
        let (line, after) = all.split_at(end);
        rest = after.strip_prefix(b"\r\n").or_else(|| after.get(1..));
        Some(line)
    })
}

/// An event as a client sees it. It borrows from the decoder until the next call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Event<'a> {
    /// Its type; `message` where the stream names none.
    pub event: &'a str,
    /// The last `id` the stream gave, with this event or earlier; empty before the first.
    pub last_id: &'a str,
    /// Its data, lines joined by `\n`.
    pub data: &'a str,
}

/// How a server broke what a client is ready to take.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum EventError {
    /// A line or an event over the decoder's limit.
    #[error("an event is over {limit} bytes")]
    TooLarge {
        /// What is allowed.
        limit: usize,
    },
}

/// Reads an event stream that arrives in pieces.
#[derive(Debug)]
pub struct Decoder {
    event_bytes_max: usize,
    /// The line that is arriving.
    line: Vec<u8>,
    event: String,
    data: String,
    last_id: String,
    /// The `id` of the event that is arriving, where it has one.
    arriving_id: Option<String>,
    retry_ms: Option<u64>,
    /// Whether the first line, before which a byte order mark may stand, is over.
    past_first_line: bool,
    /// Whether the last byte was a CR: an LF that follows belongs to it.
    after_cr: bool,
    /// Whether the event was handed out and is to be cleared.
    handed_out: bool,
}

impl Decoder {
    /// A decoder before the stream's first byte, for events of at most `event_bytes_max` bytes of name, id, data and line.
    pub const fn new(event_bytes_max: usize) -> Decoder {
        Decoder {
            event_bytes_max,
            line: Vec::new(),
            event: String::new(),
            data: String::new(),
            last_id: String::new(),
            arriving_id: None,
            retry_ms: None,
            past_first_line: false,
            after_cr: false,
            handed_out: false,
        }
    }

    /// The next event in `input`, whose front is cut off as far as it was read; `None` when all of it was.
    pub fn next<'a>(&'a mut self, input: &mut &[u8]) -> Result<Option<Event<'a>>, EventError> {
        if std::mem::take(&mut self.handed_out) {
            self.event.clear();
            self.data.clear();
        }
        while !input.is_empty() {
            if std::mem::take(&mut self.after_cr)
                && let Some(rest) = input.strip_prefix(b"\n")
            {
                *input = rest;
                continue;
            }
            let end = memchr::memchr2(b'\r', b'\n', input);
            let (part, rest) = input.split_at(end.unwrap_or(input.len()));
            if self.line.len() + part.len() + self.held() > self.event_bytes_max {
                return Err(EventError::TooLarge { limit: self.event_bytes_max });
            }
            self.line.extend_from_slice(part);
            let Some((&ending, rest)) = rest.split_first() else {
                *input = rest;
                break;
            };
            *input = rest;
            self.after_cr = ending == b'\r';
            if self.end_line() {
                self.handed_out = true;
                let data = self.data.strip_suffix('\n').unwrap_or(&self.data);
                let event = if self.event.is_empty() { "message" } else { &self.event };
                return Ok(Some(Event { event, last_id: &self.last_id, data }));
            }
        }
        Ok(None)
    }

    /// The wait before a reconnect that the stream asked for last, in milliseconds.
    pub const fn retry_ms(&self) -> Option<u64> {
        self.retry_ms
    }

    /// The last `id` the stream gave, also by an event without data; empty before the first.
    pub fn last_id(&self) -> &str {
        &self.last_id
    }

    fn held(&self) -> usize {
        let ids = self.last_id.len() + self.arriving_id.as_ref().map_or(0, String::len);
        self.event.len() + self.data.len() + ids
    }

    /// Takes the line that is whole; says whether it ended an event that has data.
    fn end_line(&mut self) -> bool {
        let bytes = std::mem::take(&mut self.line);
        let mut bytes_read = bytes.as_slice();
        if !std::mem::replace(&mut self.past_first_line, true) {
            bytes_read = bytes_read.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes_read);
        }
        if bytes_read.is_empty() {
            // Whether there is data or not; of an event that is cut off the id is not taken.
            self.last_id = self.arriving_id.take().unwrap_or(std::mem::take(&mut self.last_id));
            let dispatched = !self.data.is_empty();
            if !dispatched {
                self.event.clear();
            }
            self.line = bytes;
            self.line.clear();
            return dispatched;
        }
        // A stream is UTF-8 by definition; what is not is replaced, as browsers do.
        let line = String::from_utf8_lossy(bytes_read);
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event),
            "data" => {
                self.data.push_str(value);
                self.data.push('\n');
            }
            "id" if !value.contains('\0') => self.arriving_id = Some(value.to_owned()),
            "retry" if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) => {
                // More than fits is as good as for ever.
                self.retry_ms = Some(value.parse().unwrap_or(u64::MAX));
            }
            // A comment (its field is empty), or a field no one defined.
            _ => {}
        }
        drop(line);
        self.line = bytes;
        self.line.clear();
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::{Epoch, Seq};

    type Heard = Vec<(String, String, String)>;

    fn hear(decoder: &mut Decoder, mut input: &[u8], heard: &mut Heard) -> Result<(), EventError> {
        while let Some(Event { event, last_id, data }) = decoder.next(&mut input)? {
            heard.push((event.to_owned(), last_id.to_owned(), data.to_owned()));
        }
        assert!(input.is_empty(), "all of the input is read before None");
        Ok(())
    }

    /// What a client hears, the same whole and byte by byte.
    fn check(bytes: &str, expected: &[(&str, &str, &str)]) {
        for size in [bytes.len().max(1), 1, 2, 3] {
            let (mut decoder, mut heard) = (Decoder::new(1000), Heard::new());
            for piece in bytes.as_bytes().chunks(size) {
                hear(&mut decoder, piece, &mut heard).expect("it is small");
            }
            let heard: Vec<_> = heard.iter().map(|(e, i, d)| (e.as_str(), i.as_str(), d.as_str())).collect();
            assert_eq!(heard, expected, "{bytes:?} in pieces of {size}");
        }
    }

    #[test]
    fn an_event_is_written_as_the_standard_has_it() {
        let id = ResumePoint { epoch: Epoch::from_random(0), seq: Seq(41) };
        let mut out = Vec::new();
        write_event(&mut out, "patch", Some(id), br#"{"type":"patch"}"#);
        write_event(&mut out, "close", None, b"{}");
        write_retry(&mut out, 1700);
        write_heartbeat(&mut out);
        let expected = "event: patch\nid: aaaaaaaaaaaaa-41\ndata: {\"type\":\"patch\"}\n\nevent: close\ndata: {}\n\nretry: 1700\n\n:\n\n";
        assert_eq!(String::from_utf8(out).expect("UTF-8"), expected);
        check(expected, &[("patch", "aaaaaaaaaaaaa-41", "{\"type\":\"patch\"}"), ("close", "aaaaaaaaaaaaa-41", "{}")]);
    }

    #[test]
    fn data_with_line_ends_is_one_event() {
        let mut out = Vec::new();
        write_event(&mut out, "x", None, b"a\nb\r\nc\rd\n");
        assert_eq!(out, b"event: x\ndata: a\ndata: b\ndata: c\ndata: d\ndata: \n\n");
        check(&String::from_utf8(out).expect("UTF-8"), &[("x", "", "a\nb\nc\nd\n")]);
    }

    #[test]
    fn the_standards_examples_are_heard() {
        check("data: YHOO\ndata: +2\ndata: 10\n\n", &[("message", "", "YHOO\n+2\n10")]);
        check(
            ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
            &[("message", "1", "first event"), ("message", "", "second event"), ("message", "", " third event")],
        );
        check("data\n\ndata\ndata\n\ndata:", &[("message", "", ""), ("message", "", "\n")]);
        check("data:test\n\ndata: test\n\n", &[("message", "", "test"), ("message", "", "test")]);
    }

    #[test]
    fn every_line_end_and_a_byte_order_mark_are_understood() {
        check(
            "\u{feff}data: a\r\n\r\ndata: b\r\rdata: c\n\n",
            &[("message", "", "a"), ("message", "", "b"), ("message", "", "c")],
        );
        // Only the stream's first line may begin with a mark: later it is a part of a field's name.
        check("\n\u{feff}data: a\n\ndata: b\n\n", &[("message", "", "b")]);
    }

    #[test]
    fn an_event_without_data_is_dropped_with_its_name() {
        check("event: a\n\ndata: b\n\n", &[("message", "", "b")]);
    }

    #[test]
    fn an_id_with_nul_and_a_retry_that_is_no_number_are_ignored() {
        check("id: 1\nid: 2\0\ndata: a\n\n", &[("message", "1", "a")]);
        let mut decoder = Decoder::new(100);
        hear(&mut decoder, b"retry: 5s\nretry:\n", &mut Vec::new()).expect("it is small");
        assert_eq!(decoder.retry_ms(), None);
        hear(&mut decoder, b"retry: 1700\nretry: x\n", &mut Vec::new()).expect("it is small");
        assert_eq!(decoder.retry_ms(), Some(1700));
    }

    #[test]
    fn a_retry_that_is_too_large_is_the_largest() {
        let mut decoder = Decoder::new(100);
        hear(&mut decoder, b"retry: 1700\nretry: 99999999999999999999999\n", &mut Vec::new()).expect("it is small");
        assert_eq!(decoder.retry_ms(), Some(u64::MAX));
    }

    #[test]
    fn an_id_counts_when_its_event_is_whole_whether_that_has_data_or_not() {
        let mut decoder = Decoder::new(100);
        let mut id_after = |piece: &[u8]| {
            hear(&mut decoder, piece, &mut Vec::new()).expect("it is small");
            decoder.last_id().to_owned()
        };
        assert_eq!(id_after(b"id: 1\ndata: a\n"), "");
        assert_eq!(id_after(b"\n"), "1");
        assert_eq!(id_after(b"id: 2\n"), "1", "what is cut off here is not gone on from");
        assert_eq!(id_after(b"\n"), "2");
        assert_eq!(id_after(b": a comment\n\ndata: b\n\n"), "2");
        assert_eq!(id_after(b"id\n\n"), "", "taken back");
    }

    #[test]
    fn an_event_has_at_most_its_bytes() {
        let too_large = Err(EventError::TooLarge { limit: 20 });
        let line = |bytes: usize| format!("data:{}\n\n", "x".repeat(bytes - 5));
        let hear_all = |bytes: &str| hear(&mut Decoder::new(20), bytes.as_bytes(), &mut Vec::new());
        assert_eq!(hear_all(&line(20)), Ok(()));
        assert_eq!(hear_all(&line(21)), too_large);
        // So it is with the lines of one event: 6 bytes held with their line end, 14 or 15 arriving.
        assert_eq!(hear_all(&format!("data:xxxxx\n{}", line(14))), Ok(()));
        assert_eq!(hear_all(&format!("data:xxxxx\n{}", line(15))), too_large);
        // A line that never ends is refused as it arrives.
        let mut decoder = Decoder::new(20);
        let refused = (0..100).position(|_| hear(&mut decoder, b"x", &mut Vec::new()).is_err());
        assert_eq!(refused, Some(20));
    }

    proptest! {
        #[test]
        fn what_is_written_is_heard_however_it_is_cut(
            events in prop::collection::vec(("[a-z_]{1,12}", any::<Option<u64>>(), "[^\r\n\u{feff}]{1,60}"), 1..5),
            size in 1usize..40,
        ) {
            let (mut bytes, mut expected, mut last_id) = (Vec::new(), Heard::new(), String::new());
            for (event, seq, data) in events {
                let id = seq.map(|seq| ResumePoint { epoch: Epoch::from_random(seq), seq: Seq(seq) });
                write_event(&mut bytes, &event, id, data.as_bytes());
                write_heartbeat(&mut bytes);
                last_id = id.map_or(last_id, |id| id.to_string());
                expected.push((event, last_id.clone(), data));
            }
            let (mut decoder, mut heard) = (Decoder::new(1000), Heard::new());
            for piece in bytes.chunks(size) {
                hear(&mut decoder, piece, &mut heard).expect("it is small");
            }
            prop_assert_eq!(heard, expected);
        }
    }
}
