//! permessage-deflate against the built server: what is agreed on, what is shared, what it saves, and what it must not cost.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::io::Write;
use std::time::Duration;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use serde_json::json;
use socket2::SockRef;

use support::Upstream;
use support::server::{Answer, DRIVERS, Raw, Server, Setup, bearer, client_frame, token_of};
use watcher::{Held, Over, Watcher, canonical, inflated, polled};

const LEADS: &str = "/v1/streams/leads";
const FORMATS: [&str; 3] = ["patch", "merge", "full"];
/// The parameters that every agreement has.
const ALWAYS: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

/// Rows that repeat themselves, as JSON does; `n` changes one of them.
fn leads(n: u64) -> String {
    let rows = (0..40).map(|id| {
        let price = if id == n % 40 { 1_000 + n } else { 100 + id };
        format!(r#"{{"id":{id},"symbol":"ACME-{id}","price":{price},"status":"open"}}"#)
    });
    format!(r#"{{"n":{n},"rows":[{}]}}"#, rows.collect::<Vec<_>>().join(","))
}

fn of_leads(upstream: &Upstream, driver: &str, lines: &str) -> Server {
    upstream.set_json("/leads", &leads(1));
    Setup::new().driver(driver).stream("leads", &upstream.url("/leads"), lines).start()
}

fn offer(params: &str) -> (&'static str, String) {
    ("Sec-WebSocket-Extensions", format!("permessage-deflate{params}"))
}

/// A watcher that takes deflated messages.
fn deflating(server: &Server, path: &str, params: &str) -> Watcher {
    let watcher = Watcher::open(server, Over::Ws, path, &[bearer(&token_of("u1")), offer(params)]);
    assert!(watcher.deflates(), "{:?}", watcher.opened);
    watcher
}

/// Changes the value to those numbers in turn, each taken in before the next.
fn change(upstream: &Upstream, numbers: std::ops::RangeInclusive<u64>) {
    for n in numbers {
        upstream.set_json("/leads", &leads(n));
        polled(upstream, "/leads");
    }
}

/// The payload of a message of a client's, deflated: ended by a flush, or by a final block (RFC 7692 section 7.2.3.4).
fn deflated(message: &[u8], ends: bool) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(message).expect("memory");
    if ends {
        let mut payload = encoder.finish().expect("memory");
        payload.push(0);
        return payload;
    }
    encoder.flush().expect("memory");
    let mut payload = encoder.get_ref().clone();
    payload.truncate(payload.len() - 4);
    payload
}

/// A frame of a client's with RSV1 set.
fn deflated_frame(more: bool, opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = client_frame(more, opcode, payload);
    frame[0] |= 0x40;
    frame
}

fn upgraded(server: &Server, path: &str, headers: &[(&str, String)]) -> (Raw, Answer) {
    let mut raw = server.connect();
    let answer = raw.upgrade(path, headers);
    (raw, answer)
}

// Agreeing.

#[test]
fn an_offer_is_answered_as_the_rfc_says() {
    let server = Setup::new().server("echo = true").start();
    for (lines, answer) in [
        (&["permessage-deflate"][..], Some("")),
        (&["permessage-deflate; client_max_window_bits"], Some("")),
        (&["permessage-deflate; client_max_window_bits=10; server_max_window_bits=\"10\""], Some("10")),
        (&["permessage-deflate; server_max_window_bits=9"], Some("9")),
        (&["permessage-deflate; server_max_window_bits=15"], Some("15")),
        (&["permessage-deflate; server_max_window_bits=8"], None),
        (&["permessage-deflate; server_max_window_bits=8, permessage-deflate"], Some("")),
        (&["permessage-deflate; server_max_window_bits=8", "permessage-deflate"], Some("")),
        (&["other; server_max_window_bits=10", " , permessage-deflate;server_max_window_bits=11 ,"], Some("11")),
        (&["permessage-deflate; unknown, permessage-deflate; server_no_context_takeover=1"], None),
        (&["permessage-deflate; client_max_window_bits; client_max_window_bits"], None),
        (&["x-webkit-deflate-frame"], None),
        (&[""], None),
        (&[], None),
    ] {
        let headers: Vec<_> = lines.iter().map(|line| ("Sec-WebSocket-Extensions", (*line).to_owned())).collect();
        let (mut raw, opened) = upgraded(&server, "/echo", &headers);
        let expected = answer.map(|bits| match bits {
            "" => ALWAYS.to_owned(),
            bits => format!("{ALWAYS}; server_max_window_bits={bits}"),
        });
        assert_eq!((opened.status, opened.header("sec-websocket-extensions")), (101, expected.as_deref()), "{lines:?}");
        // What was agreed on holds.
        raw.send(&deflated_frame(false, 1, &deflated(b"Hello", false)));
        match answer {
            Some(_) => assert_eq!(raw.frame(), (true, 1, b"Hello".to_vec())),
            None => assert_eq!(raw.close_frame().0, 1002, "RSV1 without an agreement"),
        }
    }
    for malformed in ["permessage-deflate;", "permessage-deflate; a=\"b", "permessage deflate", "; a"] {
        let (_, refused) = upgraded(&server, "/echo", &[("Sec-WebSocket-Extensions", malformed.to_owned())]);
        assert_eq!((refused.status, &*refused.code()), (400, "BAD_REQUEST"), "{malformed}");
    }
}

#[test]
fn where_it_is_switched_off_the_offer_is_passed_over() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", &leads(1));
    let setup = || Setup::new().stream("leads", &upstream.url("/leads"), "");
    let server = setup().server("permessage_deflate = false").start();
    let mut watcher = Watcher::open(&server, Over::Ws, LEADS, &[bearer(&token_of("u1")), offer("")]);
    assert!(!watcher.deflates());
    watcher.event();
    assert_eq!((watcher.deflated, watcher.value("leads")), (0, canonical(&leads(1))));
    // Switched on by a reload, it holds for those who come; who is there goes on as agreed.
    server.reload(&setup());
    deflating(&server, LEADS, "").event();
    change(&upstream, 2..=2);
    watcher.event_with("leads", &leads(2));
    assert_eq!(watcher.deflated, 0);
    watcher.raw().send(&deflated_frame(false, 1, &deflated(b"{}", false)));
    assert_eq!(watcher.raw().close_frame().0, 1002);
}

// Outward.

#[test]
fn every_format_comes_deflated_and_is_what_others_get_plain() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = of_leads(&upstream, driver, "array_key = \"id\"");
        for (at, format) in FORMATS.into_iter().enumerate() {
            let path = format!("{LEADS}?format={format}");
            let mut plain = Watcher::ws(&server, &path);
            let windows =
                ["", "; server_max_window_bits=15", "; server_max_window_bits=12", "; server_max_window_bits=9"];
            let mut others = windows.map(|params| deflating(&server, &path, params));
            let first = plain.event();
            for other in &mut others {
                assert_eq!(other.event(), first, "the snapshot, {format}");
                assert_eq!(other.deflated, 1);
                assert!(other.payload.len() < first.text.len() / 2, "{} {}", other.payload.len(), first.text.len());
            }
            let (from, to) = (at as u64 * 10 + 2, at as u64 * 10 + 5);
            for n in from..=to {
                change(&upstream, n..=n);
                let event = plain.event();
                assert_eq!(plain.value("leads"), canonical(&leads(n)));
                for other in &mut others {
                    assert_eq!(other.event(), event, "{format}");
                    assert!(other.payload.len() < event.text.len(), "{format}");
                }
                // Whoever has the same window has the same bytes, whichever core it is on.
                assert_eq!(others[0].payload, others[1].payload);
            }
            assert_eq!(plain.deflated, 0);
            assert!(others.iter().all(|other| other.deflated == 5), "the first, and four more");
        }
    }
}

#[test]
fn a_frame_is_deflated_once_however_many_get_it() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", &leads(1));
    let server = Setup::new().cores(1).stream("leads", &upstream.url("/leads"), "").start();
    let mut watchers: Vec<_> = (0..30).map(|_| deflating(&server, LEADS, "")).collect();
    watchers.iter_mut().for_each(|watcher| drop(watcher.event()));
    let frames = || server.metric(&["restcast_deflated_frames_total"]);
    assert_eq!(frames(), 1.0, "the first value of all who came, as an event or as a snapshot");
    change(&upstream, 2..=9);
    for watcher in &mut watchers {
        watcher.events_to(9);
    }
    assert_eq!(frames(), 9.0);
    let [from, to] = ["restcast_deflate_input_bytes_total", "restcast_deflate_output_bytes_total"]
        .map(|name| server.metric(&[name]));
    assert!(to > 0.0 && to < from, "{to} of {from}");
    // In each format a newcomer's snapshot is the same, and the one deflated for any.
    for format in FORMATS {
        let mut newcomer = deflating(&server, &format!("{LEADS}?format={format}"), "");
        assert_eq!(newcomer.event().kind(), "snapshot");
        assert_eq!(newcomer.deflated, 1);
    }
    assert_eq!(frames(), 10.0);
    // What waits for a plain reader is never deflated.
    Watcher::ws(&server, LEADS).event();
    assert_eq!(frames(), 10.0);
}

#[test]
fn small_frames_and_those_that_would_hold_the_core_come_as_they_are() {
    let upstream = Upstream::start();
    upstream.set_json("/small", "1");
    let large = |n: u64| format!(r#"{{"n":{n},"rows":"{}"}}"#, "row ".repeat((1 << 20) / 4));
    upstream.set_json("/large", &large(1));
    let setup = Setup::new().stream("small", &upstream.url("/small"), "");
    let server = setup.stream("large", &upstream.url("/large"), "").start();
    let mut watcher = deflating(&server, "/v1/streams/large?format=full", "");
    watcher.event();
    upstream.set_json("/large", &large(2));
    watcher.event();
    assert_eq!((watcher.deflated, watcher.value("large")), (0, canonical(&large(2))));
    // What is only this connection's, too: it is small, and shared by nobody.
    let mut many = deflating(&server, "/v1/ws", "");
    many.send(r#"{"type":"subscribe","stream":"small","id":1}"#);
    assert_eq!(many.next_of("subscribed").json()["id"], 1);
    many.event();
    many.send("][");
    many.next_of("error");
    many.send(&json!({ "type": "auth_update", "token": token_of("u1"), "id": 2 }).to_string());
    many.next_of("auth_ok");
}

#[test]
fn who_returns_gets_deflated_what_it_missed_as_it_was_sent_live() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = of_leads(&upstream, driver, "array_key = \"id\"");
        let mut last = 1;
        for format in FORMATS {
            for params in ["", "; server_max_window_bits=10"] {
                let mut live = deflating(&server, &format!("{LEADS}?format={format}"), params);
                let first = live.event();
                let held: Held = live.holding("leads").clone();
                change(&upstream, last + 1..=last + 3);
                last += 3;
                let sent: Vec<_> = (0..3).map(|_| (live.event(), live.payload.clone())).collect();
                let path = format!("{LEADS}?format={format}&since={}", first.point());
                let mut again = deflating(&server, &path, params);
                again.resume("leads", &held);
                for (frame, payload) in sent {
                    assert_eq!((again.event(), &again.payload), (frame, &payload), "{format}{params}");
                }
                assert_eq!(again.value("leads"), canonical(&leads(last)));
                assert_eq!(again.deflated, 3);
            }
        }
    }
}

#[test]
fn a_rated_reader_gets_one_deflated_snapshot_for_what_it_passed_over() {
    let upstream = Upstream::start();
    let server = of_leads(&upstream, "auto", "");
    let mut rated = deflating(&server, &format!("{LEADS}?max_rate_ms=4000"), "");
    rated.event();
    change(&upstream, 2..=5);
    let frame = rated.event_with("leads", &leads(5));
    assert_eq!((&*frame.kind(), rated.deflated), ("snapshot", 2));
}

#[test]
fn a_status_comes_among_deflated_frames() {
    let upstream = Upstream::start();
    let server = of_leads(&upstream, "auto", "backoff_max = \"50ms\"");
    let mut watcher = deflating(&server, LEADS, "");
    watcher.event();
    upstream.set("/leads", support::Reply::status(500));
    let status = watcher.next_of("stream_status");
    assert_eq!(status.json()["state"], "stale");
    upstream.set_json("/leads", &leads(2));
    // The value and the state come back with one poll.
    let frames = [watcher.next(), watcher.next()];
    let live = frames.iter().find(|frame| frame.kind() == "stream_status").expect("it is live again");
    assert_eq!(live.json()["state"], "live");
    watcher.follow(frames.iter().find(|frame| *frame != live).expect("the value"));
    assert_eq!((watcher.deflated, watcher.value("leads")), (2, canonical(&leads(2))));
}

/// Values that hardly get smaller, so that a stalled reader's socket fills: text of six bits a byte.
fn noise(n: u64) -> String {
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[(state >> 33) as usize % 64])
    };
    let text: String = (0..100_000).map(|_| next()).collect();
    format!(r#"{{"n":{n},"text":"{text}"}}"#)
}

#[test]
fn a_reader_of_deflated_frames_that_stops_is_conflated_and_others_lose_nothing() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", &noise(1));
    let lines = "history_bytes = \"300KiB\"";
    // However slow the machine is, nobody is taken for dead meanwhile.
    let setup = Setup::new().cores(1).limits("write_stall = \"600s\"").server("heartbeat = \"600s\"");
    let server = setup.stream("leads", &upstream.url("/leads"), lines).start();
    let mut reader = deflating(&server, LEADS, "");
    reader.event();
    let mut raw = server.connect();
    SockRef::from(raw.socket()).set_recv_buffer_size(32 << 10).expect("an option");
    assert_eq!(raw.upgrade(LEADS, &[bearer(&token_of("u2")), offer("")]).status, 101);
    // More than the sockets and the history hold: each is 75 KB deflated.
    let n = 100;
    for seq in 2..=n {
        upstream.set_json("/leads", &noise(seq));
        assert_eq!(reader.event().seq(), seq, "the other gets each of them");
        assert_eq!(reader.value("leads"), canonical(&noise(seq)));
    }
    assert_eq!(reader.deflated as u64, n);
    // Now it reads on: whole frames, each sequence number higher, and the newest at the end.
    let (mut last, mut snapshots, mut frames) = (0, 0, 0);
    while last < n {
        let (first, payload) = raw.frame_with_bits();
        if first & 0x0f != 1 {
            continue;
        }
        let text = if first & 0x40 == 0 { payload } else { inflated(&payload) };
        let frame: serde_json::Value = serde_json::from_slice(&text).expect("a frame is JSON");
        if let Some(seq) = frame["seq"].as_u64() {
            assert!(seq > last, "{seq} after {last}");
            (last, frames) = (seq, frames + 1);
            snapshots += u64::from(seq > 1 && frame["type"] == "snapshot");
            if frame["type"] == "snapshot" {
                let whole: serde_json::Value = serde_json::from_str(&noise(seq)).expect("JSON");
                assert!(frame["data"] == whole, "a snapshot is the value of its place");
            }
        }
    }
    assert!(snapshots >= 1 && frames < n, "{frames} frames, {snapshots} snapshots for {n} events");
    assert!(server.metric(&["restcast_conflations_total"]) >= 1.0);
}

// Inward.

#[test]
fn the_echo_is_compressed_and_the_same_at_every_size() {
    for driver in DRIVERS {
        let server = Setup::new().driver(driver).server("echo = true").start();
        for (params, largest) in [("", 1 << 20), ("; server_max_window_bits=9", 1 << 18)] {
            let (mut raw, _) = upgraded(&server, "/echo", &[offer(params)]);
            for len in [
                0,
                1,
                63,
                64,
                125,
                126,
                1_000,
                16_384,
                65_535,
                65_536,
                1 << 18,
                300_000,
                1 << 20,
                (1 << 20) + 1,
                3 << 20,
            ] {
                let text: Vec<u8> = br#"{"id":17,"status":"open"},"#.iter().copied().cycle().take(len).collect();
                for (opcode, ends) in [(1, false), (2, false), (1, true)] {
                    let payload = deflated(&text, ends);
                    let (front, back) = payload.split_at(payload.len() / 2);
                    if ends {
                        raw.send(&deflated_frame(true, opcode, front));
                        raw.send(&client_frame(false, 9, b"between"));
                        raw.send(&client_frame(false, 0, back));
                        assert_eq!(raw.frame(), (true, 10, b"between".to_vec()));
                    } else {
                        raw.send(&deflated_frame(false, opcode, &payload));
                    }
                    let (first, echo) = raw.frame_with_bits();
                    let compressed = (64..=largest).contains(&len);
                    assert_eq!(first, if compressed { 0xc0 } else { 0x80 } | opcode, "{len}");
                    let echo = if compressed { inflated(&echo) } else { echo };
                    assert!(echo == text, "{len} bytes come back as they went");
                }
                // What comes as it is comes back too.
                raw.send(&client_frame(false, 2, &text));
                let (first, echo) = raw.frame_with_bits();
                assert!(if first & 0x40 == 0 { echo } else { inflated(&echo) } == text);
            }
        }
    }
}

#[test]
fn messages_of_an_open_connection_may_be_compressed() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", &leads(1));
    let setup = Setup::new().auth("first_message = \"20s\"").stream("leads", &upstream.url("/leads"), "");
    let server = setup.start();
    // From the first message on, here in three pieces of one segment each with the next one begun behind it.
    let (mut raw, opened) = upgraded(&server, LEADS, &[offer("")]);
    assert_eq!(opened.header("sec-websocket-extensions"), Some(ALWAYS));
    let auth = deflated(json!({ "type": "auth", "token": token_of("u1") }).to_string().as_bytes(), false);
    let update =
        deflated(json!({ "type": "auth_update", "token": token_of("u1"), "id": 7 }).to_string().as_bytes(), true);
    let bytes = [deflated_frame(false, 1, &auth), deflated_frame(false, 1, &update)].concat();
    for piece in bytes.chunks(bytes.len() / 3 + 1) {
        raw.send(piece);
    }
    let mut kinds = Vec::new();
    let mut compressed = 0;
    while kinds.len() < 3 {
        let (first, payload) = raw.frame_with_bits();
        assert_eq!(first & 0xbf, 0x81);
        compressed += usize::from(first & 0x40 != 0);
        let text = if first & 0x40 == 0 { payload } else { inflated(&payload) };
        let frame: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        kinds.push(frame["type"].as_str().expect("a type").to_owned());
    }
    kinds.sort();
    assert_eq!((&*kinds.concat(), compressed), ("auth_oksnapshotwelcome", 1), "the snapshot alone is shared");
}

#[test]
fn a_bomb_closes_1009_and_takes_no_memory() {
    let upstream = Upstream::start();
    let server = of_leads(&upstream, "auto", "");
    let memory_kib_max = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("a process");
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a line");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number")
    };
    // 48 MiB of zeros in 48 KiB, which is within what a message may carry.
    let bomb = deflated(&vec![b'0'; 48 << 20], false);
    assert!(bomb.len() < 60 << 10, "{}", bomb.len());
    deflating(&server, LEADS, "").event();
    let before = memory_kib_max();
    for opcode in [1, 2] {
        for _ in 0..20 {
            let mut watcher = deflating(&server, LEADS, "");
            watcher.raw().send(&deflated_frame(false, opcode, &bomb));
            assert_eq!(watcher.raw().close_frame(), (1009, "message_too_big".into()));
        }
    }
    let grown = memory_kib_max() - before;
    assert!(grown < 8 << 10, "{grown} KiB for forty bombs");
    // At its limit a message is taken, one past it is not.
    let of = |len: usize| deflated_frame(false, 1, &deflated(&[b'x'].repeat(len), false));
    let mut watcher = deflating(&server, LEADS, "");
    watcher.event();
    watcher.raw().send(&of(64 << 10));
    assert_eq!(watcher.next_of("error").json()["code"], "BAD_MESSAGE");
    watcher.raw().send(&of((64 << 10) + 1));
    assert_eq!(watcher.raw().close_frame().0, 1009);
}

#[test]
fn compressed_nonsense_closes_with_its_code() {
    let server = Setup::new().server("echo = true").start();
    let hello = deflated(b"Hello", false);
    for (what, bytes, code) in [
        ("not deflated", deflated_frame(false, 2, b"not deflated"), 1007),
        ("cut", deflated_frame(false, 2, &hello[..3]), 1007),
        ("not UTF-8", deflated_frame(false, 1, &deflated(b"\xff\xfe", false)), 1007),
        ("a ping", deflated_frame(false, 9, b""), 1002),
        ("a close", deflated_frame(false, 8, b""), 1002),
        ("a continuation", [deflated_frame(true, 1, &hello), deflated_frame(false, 0, b"")].concat(), 1002),
        (
            "the continuation of a plain message",
            [client_frame(true, 1, b"a"), deflated_frame(false, 0, &hello)].concat(),
            1002,
        ),
    ] {
        let (mut raw, _) = upgraded(&server, "/echo", &[offer("")]);
        raw.send(&bytes);
        assert_eq!(raw.close_frame().0, code, "{what}");
        // It has spoiled the core's inflater for nobody.
        let (mut raw, _) = upgraded(&server, "/echo", &[offer("")]);
        raw.send(&deflated_frame(false, 1, &hello));
        assert_eq!(raw.frame(), (true, 1, b"Hello".to_vec()), "after {what}");
    }
}

#[test]
fn a_close_among_compressed_messages_is_answered() {
    let upstream = Upstream::start();
    let server = of_leads(&upstream, "auto", "");
    let mut watcher = deflating(&server, LEADS, "");
    watcher.event();
    // Its token ends; while the server waits for its close, messages of its own are on their way.
    let token = support::server::mint(json!({ "sub": "u1", "exp": support::server::now_s() - 3 }));
    let mut ending = Watcher::open(&server, Over::Ws, LEADS, &[bearer(&token), offer("")]);
    ending.event();
    let message = deflated_frame(false, 1, &deflated(br#"{"type":"nonsense"}"#, false));
    let (code, reason) = loop {
        let (first, payload) = ending.raw().frame_with_bits();
        if first & 0x0f == 8 {
            break (u16::from_be_bytes([payload[0], payload[1]]), String::from_utf8_lossy(&payload[2..]).into_owned());
        }
    };
    assert_eq!((code, &*reason), (4001, "token_expired"));
    ending.raw().send(&message);
    ending.raw().send(&client_frame(false, 8, &code.to_be_bytes()));
    assert!(ending.raw().is_closed(), "nothing follows a close frame");
    assert!(watcher.is_quiet_for(Duration::from_millis(100)), "another goes on as ever");
}
