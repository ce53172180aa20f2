//! A watcher as the tests of streams use it: every frame as its bytes came, over WebSocket or SSE, checked against the
//! contract's form and followed, so that what a client holds after each frame is known to the last digit.
//!
//! Deltas are applied by `restcast::stream::apply`, which is checked against other code where it stands.

// Each test crate uses its own part of this.
#![allow(dead_code, unreachable_pub, reason = "each test crate uses its own part of this")]

use std::collections::HashMap;
use std::io::Read;
use std::time::{Duration, Instant};

use restcast::codec::json::{Document, Kind, Node};
use restcast::ids::ConnectionId;
use restcast::stream::apply::{apply_merge, apply_patch};
use serde_json::Value;
use socket2::SockRef;

use crate::support::server::{Answer, PATIENCE, Raw, Server, bearer, eventually, token_of};
use crate::support::{RequestSeen, Upstream};

/// One frame of the server's.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// The JSON object, byte for byte.
    pub text: String,
    /// Over SSE: `event:`.
    pub event: Option<String>,
    /// Over SSE: `id:`.
    pub id: Option<String>,
}

impl Frame {
    /// Its members, numbers as `serde_json` reads them.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// Its `type`.
    pub fn kind(&self) -> String {
        self.json()["type"].as_str().expect("a type").to_owned()
    }

    /// Its `stream`.
    pub fn stream(&self) -> String {
        self.json()["stream"].as_str().unwrap_or_else(|| panic!("no stream in {}", self.text)).to_owned()
    }

    /// Its `seq`.
    pub fn seq(&self) -> u64 {
        self.json()["seq"].as_u64().unwrap_or_else(|| panic!("no seq in {}", self.text))
    }

    /// Its `epoch`.
    pub fn epoch(&self) -> String {
        self.json()["epoch"].as_str().unwrap_or_else(|| panic!("no epoch in {}", self.text)).to_owned()
    }

    /// Where a client that has applied it would resume: `<epoch>-<seq>`.
    pub fn point(&self) -> String {
        format!("{}-{}", self.epoch(), self.seq())
    }

    /// A member as it is spelled.
    pub fn member(&self, name: &str) -> String {
        let document = Document::parse(self.text.as_bytes()).expect("a frame is JSON");
        let member = document.root().member(name).unwrap_or_else(|| panic!("no {name} in {}", self.text));
        String::from_utf8(member.raw().to_vec()).expect("UTF-8")
    }
}

/// What a client holds of a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    pub epoch: String,
    pub seq: u64,
    pub value: String,
}

impl Held {
    /// What is held after an event: panics unless that has the contract's form and follows on what was held before.
    pub fn after(before: Option<&Held>, frame: &Frame) -> Held {
        check_form(frame);
        let (seq, epoch) = (frame.seq(), frame.epoch());
        let value = match &*frame.kind() {
            "snapshot" => {
                if let Some(before) = before {
                    assert!(before.epoch != epoch || before.seq < seq, "{seq} after {}", before.seq);
                }
                frame.member("data")
            }
            kind => {
                let before = before.unwrap_or_else(|| panic!("a delta before any value: {}", frame.text));
                assert_eq!((&*before.epoch, before.seq + 1), (&*epoch, seq), "a delta follows on what is held");
                let delta = frame.member(kind);
                let apply = if kind == "patch" { apply_patch } else { apply_merge };
                let after = apply(before.value.as_bytes(), delta.as_bytes());
                let after = after.unwrap_or_else(|error| panic!("{error}: {delta}"));
                assert!(delta.len() < after.len(), "a delta that is not smaller than the value");
                String::from_utf8(after).expect("UTF-8")
            }
        };
        Held { epoch, seq, value }
    }
}

/// A client that follows streams.
pub struct Watcher {
    raw: Raw,
    is_sse: bool,
    /// The answer that opened it.
    pub opened: Answer,
    /// Its `welcome`.
    pub welcome: Frame,
    /// How many messages came deflated.
    pub deflated: usize,
    /// The payload of the last WebSocket message, as it came.
    pub payload: Vec<u8>,
    /// What is held of each stream.
    pub held: HashMap<String, Held>,
}

/// How a [`Watcher`] is connected.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Over {
    Ws,
    Sse,
}

impl Watcher {
    /// Opens `path` over a WebSocket as subject `u1`.
    pub fn ws(server: &Server, path: &str) -> Watcher {
        Watcher::open(server, Over::Ws, path, &[bearer(&token_of("u1"))])
    }

    /// Opens `path` over SSE as subject `u1`.
    pub fn sse(server: &Server, path: &str) -> Watcher {
        Watcher::open(server, Over::Sse, path, &[bearer(&token_of("u1"))])
    }

    /// Opens `path`, and reads `welcome`.
    pub fn open(server: &Server, over: Over, path: &str, headers: &[(&str, String)]) -> Watcher {
        Watcher::try_open(server, over, path, headers).unwrap_or_else(|answer| panic!("{path}: {answer:?}"))
    }

    /// The same with a socket that holds little, and does not learn to hold more.
    pub fn narrow(server: &Server, over: Over, path: &str) -> Watcher {
        let raw = server.connect();
        SockRef::from(raw.socket()).set_recv_buffer_size(128 << 10).expect("an option");
        let opened = Watcher::open_on(raw, server, over, path, &[bearer(&token_of("u1"))]);
        opened.unwrap_or_else(|answer| panic!("{path}: {answer:?}"))
    }

    /// Opens `path`, or why not.
    pub fn try_open(server: &Server, over: Over, path: &str, headers: &[(&str, String)]) -> Result<Watcher, Answer> {
        Watcher::open_on(server.connect(), server, over, path, headers)
    }

    fn open_on(
        mut raw: Raw,
        server: &Server,
        over: Over,
        path: &str,
        headers: &[(&str, String)],
    ) -> Result<Watcher, Answer> {
        let opened = match over {
            Over::Ws => {
                let answer = raw.upgrade(path, headers);
                if answer.status != 101 {
                    return Err(answer);
                }
                answer
            }
            Over::Sse => {
                let mut request =
                    format!("GET {path} HTTP/1.1\r\nHost: {}\r\nAccept: text/event-stream\r\n", server.listen);
                for (name, value) in headers {
                    request.push_str(&format!("{name}: {value}\r\n"));
                }
                raw.send(format!("{request}\r\n").as_bytes());
                let mut answer = raw.head();
                if answer.status != 200 {
                    let length = answer.header("content-length").and_then(|length| length.parse().ok());
                    answer.body = raw.take(length.expect("a refusal has a body"));
                    return Err(answer);
                }
                answer
            }
        };
        let nothing = Frame { text: String::new(), event: None, id: None };
        let mut watcher = Watcher {
            raw,
            is_sse: over == Over::Sse,
            opened,
            welcome: nothing,
            deflated: 0,
            payload: Vec::new(),
            held: HashMap::new(),
        };
        watcher.welcome = watcher.next();
        assert_eq!(watcher.welcome.kind(), "welcome", "{:?}", watcher.welcome);
        Ok(watcher)
    }

    /// The core it has come to.
    pub fn core(&self) -> u16 {
        let id = self.welcome.json()["connection"].as_str().and_then(ConnectionId::parse);
        id.expect("welcome names the connection").core.0
    }

    /// Whether permessage-deflate was agreed on.
    pub fn deflates(&self) -> bool {
        self.opened.header("sec-websocket-extensions").is_some()
    }

    /// Sends a message of the protocol.
    pub fn send(&mut self, message: &str) {
        self.raw.send(&crate::support::server::client_frame(false, 1, message.as_bytes()));
    }

    /// The next frame of the protocol; heartbeats are passed over.
    pub fn next(&mut self) -> Frame {
        if self.is_sse {
            return self.next_sse();
        }
        let until = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < until, "nothing came but heartbeats");
            let (first, payload) = self.raw.frame_with_bits();
            assert_eq!(first & 0xb0, 0x80, "the server sends its messages whole");
            let (deflated, opcode) = (first & 0x40 != 0, first & 0x0f);
            assert!(!deflated || (opcode == 1 && self.deflates()), "RSV1 without an agreement, or on another frame");
            match opcode {
                1 => {
                    self.deflated += usize::from(deflated);
                    let text = if deflated { inflated(&payload) } else { payload.clone() };
                    self.payload = payload;
                    let text = String::from_utf8(text).expect("a text message is UTF-8");
                    return Frame { text, event: None, id: None };
                }
                9 => self.raw.send(&crate::support::server::client_frame(false, 10, &payload)),
                _ => panic!("a frame was awaited, not opcode {opcode}: {payload:?}"),
            }
        }
    }

    fn next_sse(&mut self) -> Frame {
        let mut frame = Frame { text: String::new(), event: None, id: None };
        let until = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < until, "nothing came but heartbeats");
            let line = self.line();
            match line.split_once(": ") {
                _ if line.is_empty() && !frame.text.is_empty() => {
                    let event = frame.event.clone().expect("each event is named");
                    assert_eq!(event, frame.kind(), "`type` is the `event:` name");
                    return frame;
                }
                _ if line.is_empty() || line.starts_with(':') => {}
                Some(("event", name)) => frame.event = Some(name.to_owned()),
                Some(("id", id)) => frame.id = Some(id.to_owned()),
                Some(("data", data)) => {
                    assert!(frame.text.is_empty(), "a frame is one data line");
                    frame.text = data.to_owned();
                }
                Some(("retry", _)) => {}
                _ => panic!("{line:?} is no line of an event stream"),
            }
        }
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        loop {
            match self.raw.take(1)[0] {
                b'\n' => return String::from_utf8(line).expect("UTF-8"),
                byte => line.push(byte),
            }
        }
    }

    /// The next frame, which must be of that type.
    pub fn next_of(&mut self, kind: &str) -> Frame {
        let frame = self.next();
        assert_eq!(frame.kind(), kind, "{}", frame.text);
        frame
    }

    /// The next frame, which must be an event in the contract's form that follows on what is held.
    pub fn event(&mut self) -> Frame {
        let frame = self.next();
        self.follow(&frame);
        frame
    }

    /// Events until the one with that `seq`, all of them.
    pub fn events_to(&mut self, seq: u64) -> Vec<Frame> {
        let mut all = vec![self.event()];
        while all[all.len() - 1].seq() < seq {
            all.push(self.event());
        }
        all
    }

    /// Events until `stream` has this value; the last of them.
    pub fn event_with(&mut self, stream: &str, value: &str) -> Frame {
        loop {
            let frame = self.event();
            if frame.stream() == stream && self.value(stream) == canonical(value) {
                return frame;
            }
        }
    }

    /// What is held of `stream`, its members sorted and its numbers as they were spelled.
    pub fn value(&self, stream: &str) -> String {
        canonical(&self.holding(stream).value)
    }

    /// What is held of `stream`.
    pub fn holding(&self, stream: &str) -> &Held {
        self.held.get(stream).unwrap_or_else(|| panic!("nothing is held of {stream}"))
    }

    /// Says what was held before this connection was made: the events that come are to follow on it.
    pub fn resume(&mut self, stream: &str, held: &Held) {
        self.held.insert(stream.to_owned(), held.clone());
    }

    /// Takes in an event: panics unless it has the contract's form and follows on what is held.
    pub fn follow(&mut self, frame: &Frame) {
        if self.is_sse {
            assert_eq!(frame.id.as_deref(), Some(&*frame.point()), "an event's id is where it stands");
        }
        let stream = frame.stream();
        let after = Held::after(self.held.get(&stream), frame);
        self.held.insert(stream, after);
    }

    /// Forgets what is held of `stream`: it is subscribed to anew, and may begin anywhere.
    pub fn forget(&mut self, stream: &str) {
        self.held.remove(stream);
    }

    /// Whether nothing comes within `time`.
    pub fn is_quiet_for(&mut self, time: Duration) -> bool {
        !self.raw.hears_within(time)
    }

    /// The connection, byte by byte.
    pub fn raw(&mut self) -> &mut Raw {
        &mut self.raw
    }
}

/// A deflated message of the server's (RFC 7692 section 7.2.2), which refers to none before it.
pub fn inflated(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let whole = [payload, &[0x00, 0x00, 0xff, 0xff, 0x01, 0x00, 0x00, 0xff, 0xff]].concat();
    flate2::read::DeflateDecoder::new(&whole[..]).read_to_end(&mut out).expect("a message is deflated");
    out
}

/// Panics unless an event has exactly the members of the contract, in its order and without white space.
pub fn check_form(frame: &Frame) {
    let json = frame.json();
    let kind = frame.kind();
    let (name, epoch, seq) = (&json["stream"], &json["epoch"], frame.seq());
    let (base, member) = match &*kind {
        "snapshot" => (String::new(), "data"),
        "patch" | "merge" => (format!("\"base\":{},", seq - 1), &*kind),
        _ => panic!("an event was awaited: {}", frame.text),
    };
    let value = frame.member(member);
    let ts = json["ts"].as_u64().expect("ts is an integer");
    // What proves a frame, where its stream is configured to: always in this order, the signature last.
    let proof: String = ["hash", "scope", "kid", "sig"]
        .iter()
        .filter(|name| !json[name].is_null())
        .map(|name| format!(",\"{name}\":{}", json[name]))
        .collect();
    let whole = format!(
        r#"{{"type":"{kind}","stream":{name},"epoch":{epoch},"seq":{seq},{base}"ts":{ts},"{member}":{value}{proof}}}"#
    );
    assert_eq!(frame.text, whole);
    assert_eq!(frame.text.as_bytes(), &minified(&frame.text)[..], "no insignificant white space");
}

fn minified(text: &str) -> Vec<u8> {
    Document::parse(text.as_bytes()).expect("JSON").text().to_vec()
}

/// A JSON text with its members sorted and without white space; numbers and strings stay as they are spelled.
pub fn canonical(text: &str) -> String {
    fn write(node: Node<'_>, out: &mut String) {
        match node.kind() {
            Kind::Array => {
                out.push('[');
                for (place, element) in node.elements().enumerate() {
                    if place > 0 {
                        out.push(',');
                    }
                    write(element, out);
                }
                out.push(']');
            }
            Kind::Object => {
                let mut members: Vec<_> = node.members().collect();
                members.sort_by_key(|member| member.name.raw().to_vec());
                out.push('{');
                for (place, member) in members.iter().enumerate() {
                    if place > 0 {
                        out.push(',');
                    }
                    out.push_str(std::str::from_utf8(member.name.raw()).expect("UTF-8"));
                    out.push(':');
                    write(member.value, out);
                }
                out.push('}');
            }
            _ => out.push_str(std::str::from_utf8(node.raw()).expect("UTF-8")),
        }
    }
    let document = Document::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{error}: {text}"));
    let mut out = String::new();
    write(document.root(), &mut out);
    out
}

/// The requests for `target`, path and query as they were sent.
pub fn requests_for(upstream: &Upstream, target: &str) -> Vec<RequestSeen> {
    upstream.requests().into_iter().filter(|seen| seen.target == target).collect()
}

/// Waits until what the upstream says of `target` now has been polled and taken in. The first poll from now on may have
/// been given its answer before; the second was not, and it has ended when the third begins.
pub fn polled(upstream: &Upstream, target: &str) {
    let before = requests_for(upstream, target).len();
    eventually("three more polls", || (requests_for(upstream, target).len() >= before + 3).then_some(()));
}

/// Waits until `target` has not been polled for `time`; how many polls there have been.
pub fn polls_end(upstream: &Upstream, target: &str, time: Duration) -> usize {
    eventually("polling ends", || {
        let seen = requests_for(upstream, target);
        let last = seen.last().map(|seen| seen.at.elapsed());
        last.is_some_and(|since| since > time).then_some(seen.len())
    })
}

/// Opens watchers until one is on that core.
pub fn on_core(server: &Server, core: u16, open: impl Fn(&Server) -> Watcher) -> Watcher {
    let begun = Instant::now();
    loop {
        let watcher = open(server);
        if watcher.core() == core {
            return watcher;
        }
        assert!(begun.elapsed() < PATIENCE, "the kernel gives core {core} no connection");
    }
}
