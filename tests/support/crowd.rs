//! Very many watchers of one stream in one thread: WebSockets and event streams, in every format, deflated or not, on a
//! stream's own path or on `/v1/ws`. Each is read byte by byte and holds what it was sent, exactly.
//!
//! A frame is applied once for all who held the same before and got the same bytes: what that makes is the same, too.

// Each test crate uses its own part of this.
#![allow(dead_code, unreachable_pub, reason = "each test crate uses its own part of this")]

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use serde_json::Value;

use crate::support::server::{PATIENCE, Server, bearer, client_frame, token_of, upgrade_request};
use crate::watcher::{Frame, Held, canonical, inflated};

/// How a member watches; they take turns in this order.
const WAYS: [Way; 8] = [
    Way { over: Over::Ws, format: "patch", deflate: false },
    Way { over: Over::Sse, format: "patch", deflate: false },
    Way { over: Over::Ws, format: "merge", deflate: true },
    Way { over: Over::Sse, format: "merge", deflate: false },
    Way { over: Over::Ws, format: "full", deflate: false },
    Way { over: Over::Sse, format: "full", deflate: false },
    Way { over: Over::Many, format: "patch", deflate: false },
    Way { over: Over::Ws, format: "patch", deflate: true },
];
const DEFLATE: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
/// Events asked of the kernel at once.
const EVENTS: usize = 512;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Over {
    Ws,
    Sse,
    /// `/v1/ws`, and a subscription.
    Many,
}

#[derive(Clone, Copy, Debug)]
struct Way {
    over: Over,
    format: &'static str,
    deflate: bool,
}

/// What each event led to, by what was held before.
type Memo = HashMap<String, Vec<(Option<Rc<Held>>, Rc<Held>)>>;

/// Many watchers of one stream.
pub struct Crowd {
    epoll: OwnedFd,
    stream: String,
    members: Vec<Member>,
    /// What events lead to, from what was held before.
    memo: Memo,
    /// What is going on, for whoever reads of a failure.
    pub during: String,
}

struct Member {
    socket: TcpStream,
    way: Way,
    inbox: Vec<u8>,
    is_open: bool,
    held: Option<Rc<Held>>,
    state: String,
    /// Statuses and events so far.
    frames: u64,
    /// Whether it has been told of a failure since that was last forgotten.
    was_told: bool,
}

impl Crowd {
    /// `count` watchers of `stream`, all of them opened; none has read anything yet.
    pub fn open(server: &Server, stream: &str, count: usize) -> Crowd {
        let epoll = epoll::create(CreateFlags::CLOEXEC).expect("a descriptor");
        let credential = bearer(&token_of("crowd"));
        let members: Vec<Member> = (0..count).map(|n| Member::open(server, stream, n, &credential)).collect();
        for (n, member) in members.iter().enumerate() {
            epoll::add(&epoll, &member.socket, EventData::new_u64(n as u64), EventFlags::IN).expect("it is added");
        }
        let during = "opening".to_owned();
        Crowd { epoll, stream: stream.to_owned(), members, memo: HashMap::new(), during }
    }

    /// Reads what comes until `done` of each member.
    fn until(&mut self, what: &str, done: impl Fn(&Member) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !self.members.iter().all(&done) {
            self.read(Duration::from_millis(20));
            if Instant::now() >= until {
                let late: Vec<&Member> = self.members.iter().filter(|member| !done(member)).collect();
                let Member { way, held, state, frames, .. } = late[0];
                panic!("{}: {} are not {what}; one is {way:?} {state} {frames} {held:?}", self.during, late.len());
            }
        }
    }

    /// Reads until all hold this value, exactly, and have been told of no failure since.
    pub fn until_all_hold(&mut self, value: &str) {
        let wanted = canonical(value);
        let begun = Instant::now();
        loop {
            // Few values are held by all of them together.
            let mut known: Vec<(Rc<Held>, bool)> = Vec::new();
            let mut missing = 0;
            for member in &self.members {
                let holds = member.held.as_ref().is_some_and(|held| {
                    let found = known.iter().find(|(other, _)| Rc::ptr_eq(other, held)).map(|(_, is)| *is);
                    found.unwrap_or_else(|| {
                        let is = canonical(&held.value) == wanted;
                        known.push((Rc::clone(held), is));
                        is
                    })
                });
                missing += usize::from(!holds || member.state != "live");
            }
            if missing == 0 {
                self.memo.clear();
                return;
            }
            let held: Vec<&Held> = known.iter().map(|(held, _)| &**held).collect();
            assert!(begun.elapsed() < PATIENCE, "{}: {missing} do not hold {wanted}: {held:?}", self.during);
            self.read(Duration::from_millis(20));
        }
    }

    /// Reads until all have been told of this state.
    pub fn until_all_are(&mut self, state: &str) {
        self.until(state, |member| member.state == state);
    }

    /// Nobody has been told of a failure yet.
    pub fn forget_failures(&mut self) {
        self.members.iter_mut().for_each(|member| member.was_told = false);
    }

    /// Reads until each has been told of a failure, be it over by now.
    pub fn until_all_are_told(&mut self) {
        self.until("told of it", |member| member.was_told);
    }

    /// What is held by all of them: one value, in as many copies as there are sequences of events that led to it.
    pub fn value(&self) -> String {
        let values: Vec<String> = self.distinct().iter().map(|held| canonical(&held.value)).collect();
        assert!(values.windows(2).all(|pair| pair[0] == pair[1]), "{}: they hold {values:?}", self.during);
        values[0].clone()
    }

    fn distinct(&self) -> Vec<Rc<Held>> {
        let mut all: Vec<Rc<Held>> = Vec::new();
        for member in &self.members {
            let held = member.held.as_ref().expect("each holds a value");
            if !all.iter().any(|other| Rc::ptr_eq(other, held)) {
                all.push(Rc::clone(held));
            }
        }
        all
    }

    /// Reads whatever is there, and waits for it at most so long. An end of a connection is a failure.
    pub fn read(&mut self, patience: Duration) {
        let mut events = Vec::with_capacity(EVENTS);
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(patience.subsec_nanos()) };
        epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&wait)).expect("epoll");
        for event in &events {
            let n = usize::try_from(event.data.u64()).expect("a place");
            let Crowd { members, memo, stream, during, .. } = self;
            members[n].read(stream, memo).unwrap_or_else(|why| panic!("{during}: watcher {n} {why}"));
        }
    }
}

impl Member {
    fn open(server: &Server, stream: &str, n: usize, credential: &(&'static str, String)) -> Member {
        let way = WAYS[n % WAYS.len()];
        let mut socket = TcpStream::connect(server.listen).expect("it accepts");
        let mut headers = vec![credential.clone()];
        if way.deflate {
            headers.push(("Sec-WebSocket-Extensions", DEFLATE.to_owned()));
        }
        let path = format!("/v1/streams/{stream}?format={}", way.format);
        let request = match way.over {
            Over::Ws => upgrade_request(&path, server.listen, &headers),
            Over::Many => upgrade_request("/v1/ws", server.listen, &headers),
            Over::Sse => format!(
                "GET {path} HTTP/1.1\r\nHost: {}\r\nAccept: text/event-stream\r\n{}: {}\r\n\r\n",
                server.listen, credential.0, credential.1
            ),
        };
        socket.write_all(request.as_bytes()).expect("the server reads");
        socket.set_nonblocking(true).expect("an option");
        Member {
            socket,
            way,
            inbox: Vec::new(),
            is_open: false,
            held: None,
            state: "live".into(),
            frames: 0,
            was_told: false,
        }
    }

    fn read(&mut self, stream: &str, memo: &mut Memo) -> Result<(), String> {
        let mut chunk = [0; 32 << 10];
        match self.socket.read(&mut chunk) {
            Ok(0) => return Err("was let go of".into()),
            Ok(count) => self.inbox.extend_from_slice(&chunk[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(()),
            Err(error) => return Err(format!("was cut off: {error}")),
        }
        if !self.is_open && !self.take_head(stream)? {
            return Ok(());
        }
        while let Some(frame) = if self.way.over == Over::Sse { self.next_event()? } else { self.next_message()? } {
            self.hear(frame, memo)?;
        }
        Ok(())
    }

    fn send(&mut self, opcode: u8, payload: &[u8]) -> Result<(), String> {
        // What a watcher says is little, and the server reads it.
        self.socket.write_all(&client_frame(false, opcode, payload)).map_err(|error| format!("cannot speak: {error}"))
    }

    fn take_head(&mut self, stream: &str) -> Result<bool, String> {
        let Some(end) = self.inbox.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(false) };
        let head: Vec<u8> = self.inbox.drain(..end + 4).collect();
        let head = String::from_utf8(head).expect("a head is text");
        let wanted = if self.way.over == Over::Sse { "HTTP/1.1 200 " } else { "HTTP/1.1 101 " };
        if !head.starts_with(wanted) {
            return Err(format!("was answered {head}"));
        }
        self.is_open = true;
        if self.way.over == Over::Many {
            let format = self.way.format;
            let text = format!(r#"{{"type":"subscribe","stream":"{stream}","format":"{format}","id":1}}"#);
            self.send(1, text.as_bytes())?;
        }
        Ok(true)
    }

    fn next_message(&mut self) -> Result<Option<Frame>, String> {
        loop {
            let inbox = &self.inbox;
            let Some([first, second]) = inbox.first_chunk::<2>() else { return Ok(None) };
            let (length, start) = match second {
                126 => match inbox.get(2..4) {
                    Some(bytes) => (u64::from(u16::from_be_bytes(bytes.try_into().expect("two"))), 4),
                    None => return Ok(None),
                },
                127 => match inbox.get(2..10) {
                    Some(bytes) => (u64::from_be_bytes(bytes.try_into().expect("eight")), 10),
                    None => return Ok(None),
                },
                length => (u64::from(*length), 2),
            };
            let end = start + usize::try_from(length).expect("it fits");
            let Some(payload) = inbox.get(start..end).map(<[u8]>::to_vec) else { return Ok(None) };
            let (deflated, opcode) = (first & 0x40 != 0, first & 0x0f);
            self.inbox.drain(..end);
            match opcode {
                1 => {
                    assert!(self.way.deflate || !deflated, "RSV1 without an agreement");
                    let text = if deflated { inflated(&payload) } else { payload };
                    let text = String::from_utf8(text).expect("a text message is UTF-8");
                    return Ok(Some(Frame { text, event: None, id: None }));
                }
                9 => self.send(10, &payload)?,
                _ => return Err(format!("was sent opcode {opcode}: {}", String::from_utf8_lossy(&payload))),
            }
        }
    }

    fn next_event(&mut self) -> Result<Option<Frame>, String> {
        loop {
            let Some(end) = self.inbox.windows(2).position(|window| window == b"\n\n") else { return Ok(None) };
            let event: Vec<u8> = self.inbox.drain(..end + 2).collect();
            let event = String::from_utf8(event).expect("UTF-8");
            let mut frame = Frame { text: String::new(), event: None, id: None };
            for line in event.lines() {
                match line.split_once(": ") {
                    _ if line.is_empty() || line.starts_with(':') => {}
                    Some(("event", name)) => frame.event = Some(name.to_owned()),
                    Some(("id", id)) => frame.id = Some(id.to_owned()),
                    Some(("data", data)) => frame.text.push_str(data),
                    Some(("retry", _)) => {}
                    _ => return Err(format!("was sent {line:?}, which is no line of an event stream")),
                }
            }
            if !frame.text.is_empty() {
                return Ok(Some(frame));
            }
        }
    }

    fn hear(&mut self, frame: Frame, memo: &mut Memo) -> Result<(), String> {
        let kind = frame.text.strip_prefix("{\"type\":\"").and_then(|rest| rest.split('"').next()).unwrap_or_default();
        match kind {
            "welcome" | "subscribed" => return Ok(()),
            "stream_status" => {
                let status: Value = serde_json::from_str(&frame.text).expect("a frame is JSON");
                self.state = status["state"].as_str().expect("a state").to_owned();
                self.was_told |= self.state != "live";
            }
            "snapshot" | "patch" | "merge" => {
                if self.way.over == Over::Sse {
                    assert_eq!(frame.event.as_deref(), Some(kind), "`type` is the `event:` name");
                    assert_eq!(frame.id.as_deref(), Some(&*frame.point()), "an event's id is where it stands");
                }
                self.held = Some(after(self.held.take(), frame, memo));
            }
            _ => return Err(format!("was sent {}", frame.text)),
        }
        self.frames += 1;
        Ok(())
    }
}

/// What is held after an event, worked out once for all to whom the same happens.
fn after(before: Option<Rc<Held>>, frame: Frame, memo: &mut Memo) -> Rc<Held> {
    let same = |held: &Option<Rc<Held>>| match (held, &before) {
        (Some(one), Some(other)) => Rc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    };
    let known = memo.get(&frame.text).and_then(|all| all.iter().find(|(held, _)| same(held)));
    if let Some((_, after)) = known {
        return Rc::clone(after);
    }
    let is_snapshot = frame.kind() == "snapshot";
    let there = |held: &Held| is_snapshot && (held.epoch == frame.epoch()) && held.seq == frame.seq();
    let after = match &before {
        // Whoever was moved to another sequence and back begins where it is now.
        Some(held) if there(held) => {
            assert_eq!(canonical(&held.value), canonical(&frame.member("data")), "one place, one value");
            Rc::clone(held)
        }
        _ => {
            let after = Held::after(before.as_deref(), &frame);
            // Those who came to the same by another way hold the same from here on.
            let other = memo.values().flatten().map(|(_, other)| other).find(|other| ***other == after);
            other.map_or_else(|| Rc::new(after), Rc::clone)
        }
    };
    memo.entry(frame.text).or_default().push((before, Rc::clone(&after)));
    after
}
