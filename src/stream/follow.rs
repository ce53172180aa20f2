//! Upstreams that speak a stream themselves: server-sent events or lines of JSON, each of which is the new value.
//!
//! Such a stream is polled like any other, except that a poll is answered by the next event, and waits for it: whatever comes
//! while nobody asks is kept as the newest alone. So an upstream that sends faster than `events_per_second` is conflated here,
//! and everything behind (comparison, events, history) is as for polls.
//! Source: WHATWG HTML section 9.2; NDJSON (ndjson-spec 1.0). Memory: one event that is arriving, at most `bytes_max`.
//! Errors: [`EventError`]. Not here: connections (`runtime::fetch::stream`), whether an event is JSON (`diff`).

use std::time::Duration;

use crate::codec::sse::{Decoder, EventError};

/// What a stream's upstream speaks, where that is a stream.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Following {
    /// How events are told apart.
    pub kind: Kind,
    /// Types of the events that are values; none: all are.
    pub events: Vec<String>,
    /// Least time from one value to the next; of those that come sooner the newest counts.
    pub gap: Duration,
    /// An upstream that sends nothing for so long, not even a comment, has gone.
    pub idle_timeout: Duration,
}

/// How events are told apart.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// `text/event-stream`.
    Sse,
    /// A line each.
    Ndjson,
}

impl Kind {
    /// What is asked for.
    pub const fn media_type(self) -> &'static str {
        match self {
            Kind::Sse => "text/event-stream",
            Kind::Ndjson => "application/x-ndjson",
        }
    }

    /// Whether an answer of this `Content-Type` is such a stream. Lines come under many names.
    pub fn is_spoken(self, content_type: Option<&[u8]>) -> bool {
        let essence = content_type.unwrap_or_default().split(|&byte| byte == b';').next().unwrap_or_default();
        self == Kind::Ndjson || essence.trim_ascii().eq_ignore_ascii_case(self.media_type().as_bytes())
    }
}

/// The newest of the values that came.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Newest {
    /// Its text; empty is never one.
    pub data: Vec<u8>,
    /// The id to go on from, where the stream has ids.
    pub id: Option<String>,
}

/// Reads an upstream's stream that arrives in pieces.
#[derive(Debug)]
pub struct Events {
    wanted: Vec<String>,
    bytes_max: usize,
    /// Events that have ended, wanted or not.
    ended: u64,
    reader: Reader,
}

#[derive(Debug)]
enum Reader {
    Sse(Decoder),
    Lines(Vec<u8>),
}

impl Events {
    /// A reader before the first byte, of events of at most `bytes_max` bytes.
    pub fn new(following: &Following, bytes_max: u64) -> Events {
        let bytes_max = usize::try_from(bytes_max).unwrap_or(usize::MAX);
        let reader = match following.kind {
            // Its bound is of all that it holds: the line that arrives too, and the name and id.
            Kind::Sse => Reader::Sse(Decoder::new(bytes_max)),
            Kind::Ndjson => Reader::Lines(Vec::new()),
        };
        Events { wanted: following.events.clone(), bytes_max, ended: 0, reader }
    }

    /// Reads on: the last value in `input`, if one ended there.
    ///
    /// # Errors
    /// [`EventError`] for an event over the bound.
    pub fn feed(&mut self, mut input: &[u8]) -> Result<Option<Newest>, EventError> {
        let mut newest = None;
        match &mut self.reader {
            Reader::Sse(decoder) => {
                while let Some(event) = decoder.next(&mut input)? {
                    self.ended += 1;
                    let wanted = self.wanted.is_empty() || self.wanted.iter().any(|name| name == event.event);
                    if wanted && !event.data.is_empty() {
                        newest = Some(Newest { data: event.data.as_bytes().to_vec(), id: None });
                    }
                }
                // What came behind the value may have moved it on.
                let id = Some(decoder.last_id()).filter(|id| !id.is_empty());
                if let Some(newest) = &mut newest {
                    newest.id = id.map(str::to_owned);
                }
            }
            Reader::Lines(line) => {
                while let Some(end) = input.iter().position(|&byte| byte == b'\n') {
                    let (part, rest) = input.split_at(end);
                    input = rest.get(1..).unwrap_or_default();
                    push(line, part, self.bytes_max)?;
                    // An empty line keeps the connection in use.
                    let whole = std::mem::take(line);
                    if !whole.trim_ascii().is_empty() {
                        self.ended += 1;
                        newest = Some(Newest { data: whole, id: None });
                    }
                }
                push(line, input, self.bytes_max)?;
            }
        }
        Ok(newest)
    }

    /// How many events have ended, wanted or not. Comments and empty lines are none.
    pub fn ended(&self) -> u64 {
        self.ended
    }

    /// The id to go on from by now, be it of an event that is no value; empty where there is none.
    pub fn last_id(&self) -> &str {
        match &self.reader {
            Reader::Sse(decoder) => decoder.last_id(),
            Reader::Lines(_) => "",
        }
    }

    /// How long the upstream wants to be left alone before it is asked again.
    pub fn retry(&self) -> Option<Duration> {
        match &self.reader {
            Reader::Sse(decoder) => decoder.retry_ms().map(Duration::from_millis),
            Reader::Lines(_) => None,
        }
    }
}

fn push(line: &mut Vec<u8>, part: &[u8], bytes_max: usize) -> Result<(), EventError> {
    if line.len().saturating_add(part.len()) > bytes_max {
        return Err(EventError::TooLarge { limit: bytes_max });
    }
    line.extend_from_slice(part);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn following(kind: Kind, events: &[&str]) -> Following {
        let events = events.iter().map(|name| (*name).to_owned()).collect();
        Following { kind, events, gap: Duration::from_millis(50), idle_timeout: Duration::from_secs(90) }
    }

    /// What is newest after each piece.
    fn heard(kind: Kind, events: &[&str], pieces: &[&str]) -> Vec<Option<(String, Option<String>)>> {
        let mut reader = Events::new(&following(kind, events), 40);
        let text = |newest: Newest| (String::from_utf8(newest.data).expect("UTF-8"), newest.id);
        pieces.iter().map(|piece| reader.feed(piece.as_bytes()).expect("it is small").map(text)).collect()
    }

    fn some(data: &str, id: Option<&str>) -> Option<(String, Option<String>)> {
        Some((data.to_owned(), id.map(str::to_owned)))
    }

    #[test]
    fn events_are_values_and_of_many_at_once_the_newest_counts() {
        let pieces = ["data: 1\n\nid: 7\nda", "ta: 2\n\n", ": nothing\n\n", "data: 3\n\ndata: [4,\ndata: 5]\n\n"];
        let expected = [some("1", None), some("2", Some("7")), None, some("[4,\n5]", Some("7"))];
        assert_eq!(heard(Kind::Sse, &[], &pieces), expected);
    }

    #[test]
    fn events_of_other_types_are_no_values() {
        let pieces = ["event: ping\ndata: {}\n\n", "event: update\ndata: 1\n\n", "data: 2\n\n"];
        assert_eq!(heard(Kind::Sse, &["update"], &pieces), [None, some("1", None), None]);
        assert_eq!(heard(Kind::Sse, &["message"], &pieces), [None, None, some("2", None)]);
    }

    #[test]
    fn ids_move_on_by_events_that_are_no_values() {
        let pieces = ["id: 1\nevent: a\ndata: 1\n\nid: 2\n\n", "event: b\nid: 3\ndata: x\n\n", "event: a\ndata: 2\n\n"];
        assert_eq!(heard(Kind::Sse, &["a"], &pieces), [some("1", Some("2")), None, some("2", Some("3"))]);
        let mut reader = Events::new(&following(Kind::Sse, &[]), 40);
        assert_eq!(reader.feed(b"id: 7\n\n"), Ok(None));
        assert_eq!(reader.last_id(), "7");
    }

    #[test]
    fn lines_are_values() {
        let pieces = ["{\"a\":1}\n{\"a\"", ":2}\r\n", "\n \n", "3\n4"];
        assert_eq!(
            heard(Kind::Ndjson, &[], &pieces),
            [some("{\"a\":1}", None), some("{\"a\":2}\r", None), None, some("3", None)]
        );
    }

    #[test]
    fn an_event_has_at_most_its_bytes() {
        for kind in [Kind::Sse, Kind::Ndjson] {
            let mut reader = Events::new(&following(kind, &[]), 40);
            assert!(reader.feed(&[b'1'; 40]).is_ok());
            assert_eq!(reader.feed(b"1"), Err(EventError::TooLarge { limit: 40 }), "{kind:?}");
        }
    }

    #[test]
    fn a_wish_to_be_left_alone_is_heard() {
        let mut reader = Events::new(&following(Kind::Sse, &[]), 40);
        assert_eq!(reader.retry(), None);
        reader.feed(b"retry: 1500\n\n").expect("it is small");
        assert_eq!(reader.retry(), Some(Duration::from_millis(1_500)));
    }

    #[test]
    fn an_event_stream_says_that_it_is_one() {
        for (content_type, is) in [
            (Some("text/event-stream"), true),
            (Some("Text/Event-Stream ; charset=utf-8"), true),
            (Some("text/html"), false),
            (Some("text/event-streams"), false),
            (None, false),
        ] {
            assert_eq!(Kind::Sse.is_spoken(content_type.map(str::as_bytes)), is, "{content_type:?}");
            assert!(Kind::Ndjson.is_spoken(content_type.map(str::as_bytes)));
        }
    }

    proptest! {
        #[test]
        fn however_it_is_cut_the_last_value_is_the_same(
            lines in prop::collection::vec("[a-z0-9]{1,8}", 1..6),
            size in 1usize..20,
        ) {
            let sse: String = lines.iter().map(|line| format!("data: {line}\n\n")).collect();
            let ndjson: String = lines.iter().map(|line| format!("{line}\n")).collect();
            for (kind, text) in [(Kind::Sse, sse), (Kind::Ndjson, ndjson)] {
                let mut reader = Events::new(&following(kind, &[]), 40);
                let pieces = text.as_bytes().chunks(size).filter_map(|piece| reader.feed(piece).expect("it is small"));
                let last = pieces.last().map(|newest| newest.data);
                prop_assert_eq!(last.as_deref(), lines.last().map(String::as_bytes));
            }
        }
    }
}
