//! What a message says: its keys found without building a document, and remembered, since a broadcast is the same bytes for all.
//!
//! Source: RFC 8259 for the scan; the frames of restcast or of a peer, by configured paths.
//! Memory: [`CACHE_SLOTS`] payloads of at most [`CACHED_BYTES_MAX`], the names of streams and sequences once each.
//! Errors: none; what is not JSON has no keys. Not here: what the numbers mean for a connection (`account`).

use std::collections::HashMap;

/// Payloads remembered. A power of two.
const CACHE_SLOTS: usize = 256;
/// A longer payload is read anew each time.
const CACHED_BYTES_MAX: usize = 1 << 20;
/// Names of streams and sequences that are told apart; past it all share the last number.
const NAMES_MAX: usize = 1 << 22;

/// Where the numbers stand in a message: dotted paths of member names.
#[derive(Clone, Debug)]
pub struct Keys {
    /// The time of sending.
    pub time: String,
    /// Microseconds of one unit of it, as a fraction: numerator and denominator.
    pub unit: (u64, u64),
    /// The sequence number; none: events are not judged.
    pub seq: Option<String>,
    /// The stream's name; none: there is one.
    pub stream: Option<String>,
    /// The epoch; none: there is one.
    pub epoch: Option<String>,
    /// Shorter messages are no events.
    pub bytes_min: usize,
}

/// One change of a stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Event {
    /// Number of the stream's name.
    pub stream: u32,
    /// Number of the stream's and the epoch's name together.
    pub sequence: u32,
    /// Its place.
    pub seq: Option<u64>,
    /// What it builds on.
    pub base: Option<u64>,
    /// Whether it holds the whole value: it may jump forward.
    pub whole: bool,
    /// When it was sent, in microseconds since the Unix epoch.
    pub ts_us: Option<u64>,
}

/// What a message is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Meaning {
    /// A change of a stream.
    Event(Event),
    /// `welcome`.
    Welcome,
    /// `auth_ok`.
    AuthOk,
    /// `error`.
    Error,
    /// `close`, over SSE.
    Close,
    /// Anything else.
    Other,
}

/// Reads messages.
pub struct Reader {
    keys: Keys,
    paths: Vec<Vec<Vec<u8>>>,
    cache: Vec<Option<Remembered>>,
    streams: Names,
    sequences: Names,
}

struct Remembered {
    bytes: Vec<u8>,
    compressed: bool,
    meaning: Meaning,
}

// Places of the paths in `Reader::paths`.
const TYPE: usize = 0;
const BASE: usize = 1;
const TIME: usize = 2;
const SEQ: usize = 3;
const STREAM: usize = 4;
const EPOCH: usize = 5;
const PATHS: usize = 6;

impl Reader {
    /// One that has seen nothing.
    pub fn new(keys: Keys) -> Reader {
        let path = |key: &str| key.split('.').map(|part| part.as_bytes().to_vec()).collect::<Vec<_>>();
        // An empty path matches nothing.
        let optional = |key: &Option<String>| key.as_deref().map(path).unwrap_or_default();
        let paths = vec![
            path("type"),
            path("base"),
            path(&keys.time),
            optional(&keys.seq),
            optional(&keys.stream),
            optional(&keys.epoch),
        ];
        let cache = (0..CACHE_SLOTS).map(|_| None).collect();
        Reader { keys, paths, cache, streams: Names::default(), sequences: Names::default() }
    }

    /// What is remembered of `bytes`, which came deflated or not.
    pub fn recall(&self, bytes: &[u8], compressed: bool) -> Option<Meaning> {
        let known = self.cache[slot(bytes)].as_ref()?;
        (known.compressed == compressed && known.bytes == bytes).then_some(known.meaning)
    }

    /// What `text` says. Of an event it is remembered, under `bytes` as they were received.
    pub fn read(&mut self, bytes: &[u8], compressed: bool, text: &[u8]) -> Meaning {
        let meaning = self.meaning(text);
        if matches!(meaning, Meaning::Event(_)) && bytes.len() <= CACHED_BYTES_MAX {
            let place = &mut self.cache[slot(bytes)];
            let mut kept = place.take().map(|known| known.bytes).unwrap_or_default();
            kept.clear();
            kept.extend_from_slice(bytes);
            *place = Some(Remembered { bytes: kept, compressed, meaning });
        }
        meaning
    }

    /// Name of a sequence: stream and epoch, as the server spells them.
    pub fn sequence_name(&self, sequence: u32) -> &[u8] {
        self.sequences.name(sequence)
    }

    /// Name of a stream.
    pub fn stream_name(&self, stream: u32) -> &[u8] {
        self.streams.name(stream)
    }

    /// Number of a stream that was seen.
    pub fn stream(&self, name: &[u8]) -> Option<u32> {
        self.streams.numbers.get(name).copied()
    }

    /// Number of a sequence that was seen.
    pub fn sequence(&self, name: &[u8]) -> Option<u32> {
        self.sequences.numbers.get(name).copied()
    }

    fn meaning(&mut self, text: &[u8]) -> Meaning {
        let mut found = [None; PATHS];
        scan(text, &self.paths, &mut found);
        let kind = found[TYPE].map(unquoted);
        match kind {
            Some(b"welcome") => return Meaning::Welcome,
            Some(b"auth_ok") => return Meaning::AuthOk,
            Some(b"error") => return Meaning::Error,
            Some(b"close") => return Meaning::Close,
            Some(
                b"stream_status" | b"subscribed" | b"unsubscribed" | b"reauthenticate" | b"permission_update"
                | b"action_result" | b"reconnect",
            ) => return Meaning::Other,
            _ => {}
        }
        let (seq, time) = (found[SEQ].and_then(number), found[TIME].and_then(number));
        if seq.is_none() && time.is_none() || text.len() < self.keys.bytes_min {
            return Meaning::Other;
        }
        let (stream_name, epoch) =
            (found[STREAM].map(unquoted).unwrap_or_default(), found[EPOCH].map(unquoted).unwrap_or_default());
        let stream = self.streams.number(stream_name);
        let sequence = self.sequences.number(&[stream_name, b"\0", epoch].concat());
        let (numerator, denominator) = self.keys.unit;
        let ts_us = time.map(|time| (time * numerator as f64 / denominator as f64) as u64);
        let seq = seq.map(|seq| seq as u64);
        let base = found[BASE].and_then(number).map(|base| base as u64);
        Meaning::Event(Event { stream, sequence, seq, base, whole: kind == Some(b"snapshot"), ts_us })
    }
}

/// The slot of a payload: its length and words spread over it.
fn slot(bytes: &[u8]) -> usize {
    let mut hash = bytes.len() as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let step = (bytes.len() / 16).max(8);
    let mut at = 0;
    while let Some(word) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        hash = (hash ^ u64::from_le_bytes(*word)).wrapping_mul(0x2545_f491_4f6c_dd1d).rotate_left(29);
        at += step;
    }
    (hash >> 40) as usize % CACHE_SLOTS
}

#[derive(Default)]
struct Names {
    numbers: HashMap<Vec<u8>, u32>,
    names: Vec<Vec<u8>>,
}

impl Names {
    fn number(&mut self, name: &[u8]) -> u32 {
        if let Some(&number) = self.numbers.get(name) {
            return number;
        }
        if self.names.len() >= NAMES_MAX {
            return NAMES_MAX as u32 - 1;
        }
        let number = self.names.len() as u32;
        self.names.push(name.to_vec());
        self.numbers.insert(name.to_vec(), number);
        number
    }

    fn name(&self, number: u32) -> &[u8] {
        self.names.get(number as usize).map(Vec::as_slice).unwrap_or_default()
    }
}

/// A string's text, escapes as they are; anything else as it is.
pub fn unquoted(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")).unwrap_or(value)
}

/// A number, or a string that holds one.
fn number(value: &[u8]) -> Option<f64> {
    let number: f64 = std::str::from_utf8(unquoted(value)).ok()?.parse().ok()?;
    (number.is_finite() && number >= 0.0).then_some(number)
}

/// Finds the values at `paths` in an object, each as it is spelled; the first of a name counts.
/// It stops where all are found, so that the value that an event carries is seldom walked through.
fn scan<'t, const N: usize>(text: &'t [u8], paths: &[Vec<Vec<u8>>], found: &mut [Option<&'t [u8]>; N]) {
    let wanted = paths.iter().enumerate().filter(|(_, path)| !path.is_empty()).map(|(at, _)| at).collect::<Vec<_>>();
    let start = blank(text, 0);
    // What is not well formed ends the scan; what was found before it stands.
    let _ = object(text, start, 0, &wanted, paths, found);
}

/// Walks the object at `at`; returns the place behind it, or `None` where the text ends or all was found.
fn object<'t, const N: usize>(
    text: &'t [u8],
    at: usize,
    depth: usize,
    active: &[usize],
    paths: &[Vec<Vec<u8>>],
    found: &mut [Option<&'t [u8]>; N],
) -> Option<usize> {
    if text.get(at) != Some(&b'{') {
        return None;
    }
    let mut at = blank(text, at + 1);
    if text.get(at) == Some(&b'}') {
        return Some(at + 1);
    }
    loop {
        let name_end = string_end(text, at)?;
        let name = unquoted(&text[at..name_end]);
        at = blank(text, name_end);
        if text.get(at) != Some(&b':') {
            return None;
        }
        at = blank(text, at + 1);
        let matching = || active.iter().copied().filter(|&path| paths[path].get(depth).is_some_and(|key| key == name));
        let deeper: Vec<usize> = matching().filter(|&path| paths[path].len() > depth + 1).collect();
        let end = if !deeper.is_empty() && text.get(at) == Some(&b'{') {
            object(text, at, depth + 1, &deeper, paths, found)?
        } else {
            value_end(text, at)?
        };
        for path in matching().filter(|&path| paths[path].len() == depth + 1) {
            found[path].get_or_insert(&text[at..end]);
        }
        // A snapshot has no base to look for.
        let whole = found[TYPE] == Some(b"\"snapshot\"");
        let missing =
            |&(at, path): &(usize, &Vec<Vec<u8>>)| !path.is_empty() && found[at].is_none() && !(at == BASE && whole);
        if !paths.iter().enumerate().any(|entry| missing(&entry)) {
            return None;
        }
        at = blank(text, end);
        match text.get(at)? {
            b',' => at = blank(text, at + 1),
            b'}' => return Some(at + 1),
            _ => return None,
        }
    }
}

fn blank(text: &[u8], mut at: usize) -> usize {
    while matches!(text.get(at), Some(b' ' | b'\t' | b'\r' | b'\n')) {
        at += 1;
    }
    at
}

/// The place behind the string that starts at `at`.
fn string_end(text: &[u8], at: usize) -> Option<usize> {
    if text.get(at) != Some(&b'"') {
        return None;
    }
    let mut at = at + 1;
    loop {
        at += memchr::memchr2(b'"', b'\\', text.get(at..)?)?;
        if text[at] == b'"' {
            return Some(at + 1);
        }
        at += 2;
    }
}

/// The place behind the value that starts at `at`.
fn value_end(text: &[u8], at: usize) -> Option<usize> {
    match text.get(at)? {
        b'"' => string_end(text, at),
        b'{' | b'[' => {
            let (mut depth, mut at) = (0usize, at);
            loop {
                match text.get(at)? {
                    b'"' => {
                        at = string_end(text, at)?;
                        continue;
                    }
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => {
                        depth -= 1;
                        if depth == 0 {
                            return Some(at + 1);
                        }
                    }
                    _ => {}
                }
                at += 1;
            }
        }
        _ => {
            let rest = &text[at..];
            let length = rest.iter().position(|byte| b",}] \t\r\n".contains(byte)).unwrap_or(rest.len());
            (length > 0).then_some(at + length)
        }
    }
}

/// The member `name` of the object `text`, as it is spelled; for the rare frames that are not events.
pub fn member<'t>(text: &'t [u8], name: &str) -> Option<&'t [u8]> {
    let mut found = [None];
    let paths = [vec![name.as_bytes().to_vec()]];
    scan(text, &paths, &mut found);
    found[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader() -> Reader {
        let name = |name: &str| Some(name.to_owned());
        Reader::new(Keys {
            time: "ts".into(),
            unit: (1, 1),
            seq: name("seq"),
            stream: name("stream"),
            epoch: name("epoch"),
            bytes_min: 0,
        })
    }

    fn event(reader: &mut Reader, text: &str) -> Event {
        match reader.read(text.as_bytes(), false, text.as_bytes()) {
            Meaning::Event(event) => event,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn frames_of_restcast_are_read() {
        let mut reader = reader();
        let snapshot = event(
            &mut reader,
            r#"{"type":"snapshot","stream":"a","epoch":"e","seq":41,"ts":1700000000000001,"data":{"seq":9,"x":"}\""}}"#,
        );
        assert_eq!((snapshot.seq, snapshot.base, snapshot.whole), (Some(41), None, true));
        assert_eq!(snapshot.ts_us, Some(1_700_000_000_000_001));
        let patch = event(
            &mut reader,
            r#"{"type":"patch","stream":"a","epoch":"e","seq":42,"base":41,"ts":1,"patch":[{"base":7}]}"#,
        );
        assert_eq!((patch.seq, patch.base, patch.whole), (Some(42), Some(41), false));
        assert_eq!((patch.stream, patch.sequence), (snapshot.stream, snapshot.sequence));
        let other =
            event(&mut reader, r#"{"type":"patch","stream":"a","epoch":"f","seq":1,"base":0,"ts":1,"patch":[]}"#);
        assert_eq!(other.stream, patch.stream);
        assert_ne!(other.sequence, patch.sequence);
        let mut check = |text: &str, expected| assert_eq!(reader.read(b"", false, text.as_bytes()), expected, "{text}");
        check(r#"{"type":"welcome","connection":"c_1"}"#, Meaning::Welcome);
        check(r#"{"type":"stream_status","stream":"a","state":"stale","ts":5}"#, Meaning::Other);
        check(r#"{"type":"auth_ok","id":7}"#, Meaning::AuthOk);
        check(r#"{"type":"error","code":"BAD_MESSAGE"}"#, Meaning::Error);
        check(r#"{"type":"close","code":4001}"#, Meaning::Close);
        check("not json", Meaning::Other);
        check("", Meaning::Other);
        check(r#"{"type":"snap"#, Meaning::Other);
    }

    #[test]
    fn keys_of_a_peer_are_read_at_any_depth_and_in_its_unit() {
        let mut reader = Reader::new(Keys {
            time: "pub.data.sent".into(),
            unit: (1000, 1),
            seq: Some("pub.offset".into()),
            stream: Some("channel".into()),
            epoch: None,
            bytes_min: 20,
        });
        let found = event(
            &mut reader,
            r#" { "push" : 1, "channel":"c" , "pub" : { "data" : {"x":[1,{"sent":5}],"sent": 12.5 }, "offset" : "3"}}"#,
        );
        assert_eq!((found.seq, found.ts_us, found.whole), (Some(3), Some(12_500), false));
        let short = br#"{"pub":{"offset":3}}"#;
        assert!(matches!(reader.read(short, false, short), Meaning::Event(_)), "as long as the least");
        assert_eq!(reader.read(short, false, &short[..19]), Meaning::Other);
    }

    #[test]
    fn a_payload_is_recalled_only_when_every_byte_is_the_same() {
        let mut reader = reader();
        let text =
            format!(r#"{{"type":"snapshot","stream":"a","epoch":"e","seq":1,"ts":2,"data":"{}"}}"#, "x".repeat(999));
        assert_eq!(reader.recall(text.as_bytes(), false), None);
        let meaning = reader.read(text.as_bytes(), false, text.as_bytes());
        assert_eq!(reader.recall(text.as_bytes(), false), Some(meaning));
        assert_eq!(reader.recall(text.as_bytes(), true), None);
        for at in 0..text.len() {
            let mut other = text.clone().into_bytes();
            other[at] ^= 1;
            assert_eq!(reader.recall(&other, false), None, "byte {at} is another");
        }
        assert_eq!(reader.recall(&text.as_bytes()[..text.len() - 1], false), None);
    }

    #[test]
    fn text_that_is_cut_anywhere_never_breaks_the_scan() {
        let text = br#"{"a":{"b":[1,"\\\"",{}]},"type":"patch","seq":1,"ts":"x\"y","base":0,"stream":"s"}"#;
        for cut in 0..text.len() {
            let mut reader = reader();
            let _ = reader.read(b"", false, &text[..cut]);
            let _ = reader.read(b"", false, &text[cut..]);
        }
    }

    #[test]
    fn one_member_is_found_by_name() {
        let text = br#"{"type":"welcome","connection":"c_1","auth":{"expires_at":5}}"#;
        assert_eq!(member(text, "connection").map(unquoted), Some(&b"c_1"[..]));
        assert_eq!(member(text, "expires_at"), None);
        // A snapshot's own rule of what may be missing is for events.
        assert_eq!(member(br#"{"x":"y","code":"Z"}"#, "code").map(unquoted), Some(&b"Z"[..]));
    }
}
