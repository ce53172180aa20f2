//! The life of connections: how long a credential lasts, how it is renewed, and every way a connection ends.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::server::{
    ADMIN_KEY, Answer, DRIVERS, Heard, PATIENCE, Raw, SECRET, Server, Setup, Sse, Ws, bearer, eventually, is, mint,
    mint_by, now_s, now_us, outcome, run, token_of,
};
use support::{Reply, Upstream};
use tungstenite::Message;

const MS: Duration = Duration::from_millis(1);
/// What the contract allows between a credential's end and the connection's.
const END_MS: u64 = 250;
/// How late a test may hear of it on a busy machine.
const SLACK_MS: u64 = 2_000;

fn upstream() -> Upstream {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"[{"id":1}]"#);
    upstream
}

fn on_each_driver(test: impl Fn(Setup)) {
    for driver in DRIVERS {
        test(Setup::new().driver(driver));
    }
}

fn of(name: &'static str, value: &str) -> (&'static str, String) {
    (name, value.to_owned())
}

/// A token of `u1` with further claims.
fn claiming(claims: Value) -> String {
    let mut all = json!({ "sub": "u1", "exp": now_s() + 600 });
    all.as_object_mut().expect("an object").extend(claims.as_object().expect("an object").clone());
    mint(all)
}

/// Changes a value of the upstream again and again until it is dropped.
struct Ticking(Arc<AtomicBool>, Option<thread::JoinHandle<()>>);

impl Ticking {
    fn start(upstream: &Arc<Upstream>, path: &'static str) -> Ticking {
        let ended = Arc::new(AtomicBool::new(false));
        let (seen, upstream) = (Arc::clone(&ended), Arc::clone(upstream));
        let thread = thread::spawn(move || {
            let mut number = 0u64;
            while !seen.load(Ordering::Relaxed) {
                number += 1;
                upstream.set_json(path, &number.to_string());
                thread::sleep(10 * MS);
            }
        });
        Ticking(ended, Some(thread))
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        let _ = self.1.take().map(thread::JoinHandle::join);
    }
}

#[test]
fn a_stream_opens_on_both_drivers() {
    for driver in DRIVERS {
        let upstream = upstream();
        let server = Setup::new().driver(driver).stream("leads", &upstream.url("/leads"), "").start();
        assert_eq!(server.ready["driver"], driver);
        assert_eq!(server.ready["pid"], server.pid());
        let token = token_of("u1");
        let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
        let welcome = ws.next();
        assert_eq!((&welcome["type"], &welcome["heartbeat_ms"]), (&json!("welcome"), &json!(25_000)));
        assert!(welcome["connection"].as_str().is_some_and(|id| id.starts_with("c_")), "{welcome}");
        assert_eq!(ws.next()["data"], json!([{ "id": 1 }]));
        let mut sse = server.sse("/v1/streams/leads", &[bearer(&token)]);
        assert_eq!(sse.next().expect("an event").kind, "welcome");
        assert_eq!(sse.next_of("snapshot").data["data"], json!([{ "id": 1 }]));
        upstream.set_json("/leads", r#"[{"id":2}]"#);
        assert_eq!(ws.next()["seq"], 2);
        assert_eq!(sse.next().expect("an event").data["seq"], 2);
    }
}

// The end of a credential.

#[test]
fn a_connection_ends_with_its_token_and_not_before() {
    on_each_driver(|setup| {
        let upstream = Arc::new(upstream());
        let _ticking = Ticking::start(&upstream, "/leads");
        let server = setup.jwt("leeway = \"1s\"").stream("leads", &upstream.url("/leads"), "").start();
        let mut lates = Vec::new();
        let exp = now_s() + 3;
        let end_us = (exp + 1) * 1_000_000;
        let token = mint(json!({ "sub": "u1", "exp": exp }));
        let sockets: Vec<Ws> = (0..3).map(|_| server.ws("/v1/streams/leads", &[bearer(&token)])).collect();
        let events: Vec<Sse> = (0..3).map(|_| server.sse("/v1/streams/leads", &[bearer(&token)])).collect();
        thread::scope(|scope| {
            let sockets = sockets.into_iter().map(|mut ws| {
                scope.spawn(move || {
                    let (frames, close) = ws.until_close();
                    let late = now_us();
                    assert_eq!(close, (4001, "token_expired".to_owned()));
                    assert_eq!(ws.heard(), Heard::End);
                    (frames, late)
                })
            });
            let events = events.into_iter().map(|mut sse| {
                scope.spawn(move || {
                    let mut frames = Vec::new();
                    loop {
                        let event = sse.next().expect("a close event comes before the end");
                        if event.kind == "close" {
                            let late = now_us();
                            assert_eq!(event.data, json!({ "type": "close", "code": 4001, "reason": "token_expired" }));
                            assert_eq!(sse.next(), None, "the body ends");
                            return (frames, late);
                        }
                        frames.push(event.data);
                    }
                })
            });
            for reader in sockets.chain(events).collect::<Vec<_>>() {
                let (frames, closed_us) = reader.join().expect("a reader");
                assert_eq!(frames[0]["auth"]["expires_at"], exp * 1_000_000);
                assert!(closed_us >= end_us, "closed {} us early", end_us - closed_us);
                lates.push((closed_us - end_us) / 1_000);
                // Frames came to the last, and none that was seen by the poller after the end.
                let moments: Vec<u64> = frames.iter().skip(1).filter_map(|frame| frame["ts"].as_u64()).collect();
                let last = *moments.last().expect("stream frames");
                assert!(moments.len() > 10 && last > end_us - 1_000_000, "they ended early");
                assert!(last <= end_us + END_MS * 1_000, "a frame was started {} us after the end", last - end_us);
            }
        });
        assert!(lates.iter().all(|&late| late <= END_MS + SLACK_MS), "ms after the end: {lates:?}");
        assert!(lates.iter().any(|&late| late <= END_MS), "none in time, ms after the end: {lates:?}");
        assert!(server.metric(&["restcast_", "expir"]) >= 6.0, "{}", server.metrics());
        assert!(server.metric(&["closes", "token_expired"]) >= 6.0, "{}", server.metrics());
    });
}

#[test]
fn a_waiting_poll_ends_with_its_token() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let server = setup.jwt("leeway = \"1s\"").stream("leads", &upstream.url("/leads"), "").start();
        let exp = now_s() + 2;
        let token = mint(json!({ "sub": "u1", "exp": exp }));
        let etag = server.get("/v1/streams/leads", &[bearer(&token)]).header("etag").expect("an etag").to_owned();
        let headers = [bearer(&token), of("If-None-Match", &etag), of("Prefer", "wait=60")];
        let answer = server.get("/v1/streams/leads", &headers);
        assert!(now_us() >= (exp + 1) * 1_000_000, "before the end");
        assert_eq!(outcome(&answer), is(401, "TOKEN_EXPIRED"));
        assert!(now_us() <= (exp + 1) * 1_000_000 + (END_MS + SLACK_MS) * 1_000, "long after the end");
    });
}

#[test]
fn reauthenticate_comes_its_lead_before_the_end() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let setup = setup.auth("reauth_before = \"2s\"").stream("leads", &upstream.url("/leads"), "");
        let server = setup.start();
        let exp = now_s() + 6;
        let token = mint(json!({ "sub": "u1", "exp": exp }));
        let mut sockets: Vec<Ws> = (0..12).map(|_| server.ws("/v1/streams/leads", &[bearer(&token)])).collect();
        let mut sse = server.sse("/v1/streams/leads", &[bearer(&token)]);
        let left: Vec<u64> = sockets
            .iter_mut()
            .map(|ws| {
                let frame = ws.next_of("reauthenticate");
                assert_eq!(frame["expires_at"], exp * 1_000_000);
                frame["expires_in_ms"].as_u64().expect("milliseconds")
            })
            .collect();
        // 2 s before, earlier by up to 10 % of that.
        assert!(left.iter().all(|ms| (2_000 - SLACK_MS.min(1_500)..=2_200).contains(ms)), "{left:?}");
        let spread = left.iter().max().expect("some") - left.iter().min().expect("some");
        assert!(spread > 0, "they all come at once: {left:?}");
        assert_eq!(sse.next_of("reauthenticate").data["expires_at"], exp * 1_000_000);
        // Again after an update: half the remaining life before, where that is less than the lead.
        let ws = &mut sockets[0];
        let exp = now_s() + 3;
        ws.send(json!({ "type": "auth_update", "token": mint(json!({ "sub": "u1", "exp": exp })) }));
        assert_eq!(ws.next_of("auth_ok")["expires_at"], exp * 1_000_000);
        let frame = ws.next_of("reauthenticate");
        assert_eq!(frame["expires_at"], exp * 1_000_000);
        let left = frame["expires_in_ms"].as_u64().expect("milliseconds");
        assert!(left <= 1_650, "half of at most 3 s, and 10 %: {left}");
    });
}

#[test]
fn many_that_end_in_the_same_second_end_together() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let server = setup.jwt("leeway = \"0s\"").stream("leads", &upstream.url("/leads"), "").start();
        let exp = now_s() + 8;
        let token = mint(json!({ "sub": "u1", "exp": exp }));
        let mut sockets: Vec<Raw> = (0..400)
            .map(|no| {
                let mut raw = server.connect();
                let path = if no % 2 == 0 { "/v1/ws" } else { "/v1/streams/leads" };
                assert_eq!(raw.upgrade(path, &[bearer(&token)]).status, 101, "before the end");
                raw
            })
            .collect();
        for raw in &mut sockets {
            assert_eq!(raw.close_frame(), (4001, "token_expired".to_owned()));
        }
        let now = now_us();
        assert!(now >= exp * 1_000_000, "before the end");
        assert!(now <= exp * 1_000_000 + (END_MS + SLACK_MS) * 1_000, "{} us after", now - exp * 1_000_000);
        drop(sockets);
        eventually("none is left", || (server.metric(&["restcast_connections{", "\"ws\""]) == 0.0).then_some(()));
    });
}

/// A value that no socket takes at once, and that is never the same.
fn huge(no: u32) -> String {
    format!("\"{no}{}\"", "x".repeat(4 << 20))
}

/// A WebSocket whose peer reads nothing: the server has begun to send a frame, and cannot end it.
fn stuck(server: &Server, token: &str) -> Raw {
    let mut raw = server.connect();
    assert_eq!(raw.upgrade("/v1/streams/huge", &[bearer(token)]).status, 101);
    assert_eq!(raw.frame().1, 1, "welcome");
    assert!(raw.hears_within(PATIENCE), "a frame begins");
    raw
}

#[test]
fn a_frame_half_sent_is_finished_before_the_close() {
    on_each_driver(|setup| {
        let upstream = Upstream::start();
        upstream.set_json("/huge", &huge(0));
        let server = setup.jwt("leeway = \"0s\"").stream("huge", &upstream.url("/huge"), "").start();
        // The peer must read on within a second of the end, or it is reset: a busy machine may need more than one try.
        let finished = (1..=5u32).any(|no| {
            let exp = now_s() + 3;
            let mut raw = stuck(&server, &mint(json!({ "sub": "u1", "exp": exp })));
            upstream.set_json("/huge", &huge(no));
            eventually("it expires", || (server.metric(&["expir"]) >= f64::from(no)).then_some(()));
            let bytes = raw.rest();
            // A frame of 64 bits of length, then the close.
            assert_eq!(bytes[..2], [0x81, 127], "a text message");
            let length = u64::from_be_bytes(bytes[2..10].try_into().expect("eight"));
            let (snapshot, rest) =
                bytes[10..].split_at(bytes.len().min(usize::try_from(length).expect("small") + 10) - 10);
            let Ok(snapshot) = serde_json::from_slice::<Value>(snapshot) else { return false };
            assert_eq!(snapshot["type"], "snapshot");
            // `reauthenticate` waited behind it: no frame of the stream does.
            assert!(!rest.windows(9).any(|window| window == b"\"stream\":"), "another frame was begun");
            rest.ends_with(b"\x88\x0f\x0f\xa1token_expired")
        });
        assert!(finished, "a frame half sent is cut off");
    });
}

#[test]
fn who_reads_nothing_is_reset_a_second_after_its_end() {
    on_each_driver(|setup| {
        let upstream = Upstream::start();
        upstream.set_json("/huge", &huge(0));
        let mut server =
            setup.jwt("leeway = \"0s\"").server("drain = \"3s\"").stream("huge", &upstream.url("/huge"), "").start();
        let raw = stuck(&server, &mint(json!({ "sub": "u1", "exp": now_s() + 3 })));
        eventually("it expires", || (server.metric(&["expir"]) >= 1.0).then_some(()));
        let ended = Instant::now();
        eventually("its socket is reset", || raw.socket().take_error().expect("an option"));
        let took = ended.elapsed();
        assert!(took >= 500 * MS && took <= Duration::from_millis(1_000 + SLACK_MS), "{took:?}");
        assert_eq!(server.metric(&["closes", "token_expired"]), 1.0);
        drop(raw);
        // Nor does one hold up a drain.
        let _raw = stuck(&server, &token_of("u1"));
        let begun = Instant::now();
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0));
        assert!(
            begun.elapsed() < Duration::from_secs(3) + Duration::from_millis(2 * SLACK_MS),
            "{:?}",
            begun.elapsed()
        );
    });
}

#[test]
fn whoever_goes_in_whatever_way_leaves_nothing_behind() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let setup = setup.limits("connections = 8\nconnections_per_subject = 8\nconnections_per_address = 8");
        let server = setup.auth("first_message = \"60s\"").stream("leads", &upstream.url("/leads"), "").start();
        let token = token_of("u1");
        let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("procfs").count();
        let settled = |wanted: usize| eventually("descriptors settle", || (descriptors() <= wanted).then_some(()));
        // Takes what is taken once and kept: the connection to the upstream.
        let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
        ws.next_of("snapshot");
        let with_one = descriptors();
        let request = |path: &str, more: &str| {
            format!("GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n{more}\r\n").into_bytes()
        };
        let upgrade = |headers: &[(&str, String)]| {
            support::server::upgrade_request("/v1/streams/leads", server.listen, headers).into_bytes()
        };
        let ways: Vec<(&str, Vec<u8>)> = vec![
            ("nothing", vec![]),
            ("half a head", request("/healthz", "")[..20].to_vec()),
            (
                "half a body",
                b"POST /v1/connections/c_1/auth HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{".to_vec(),
            ),
            ("an answer", request("/healthz", "")),
            ("a value", request("/v1/streams/leads", "")),
            ("events", request("/v1/streams/leads", "Accept: text/event-stream\r\n")),
            ("a WebSocket", upgrade(&[bearer(&token)])),
            ("a WebSocket before its first message", upgrade(&[])),
            ("a bad frame", [upgrade(&[bearer(&token)]), b"\xff\xff".to_vec()].concat()),
            ("a refusal", request("/v1/streams/none", "")),
        ];
        for (way, bytes) in &ways {
            for reset in [false, true] {
                for _ in 0..8 {
                    // A place is free again, sooner or later.
                    eventually(way, || {
                        let mut raw = server.connect();
                        raw.try_send(bytes).ok()?;
                        if !bytes.is_empty() && !way.starts_with("half") && raw.head().status == 503 {
                            return None;
                        }
                        if reset {
                            socket2::SockRef::from(raw.socket()).set_linger(Some(Duration::ZERO)).expect("an option");
                        }
                        Some(())
                    });
                }
            }
        }
        settled(with_one);
        // All places are free again.
        let _seven: Vec<Ws> = (0..7).map(|_| server.ws("/v1/streams/leads", &[bearer(&token)])).collect();
        assert_eq!(server.metric(&["restcast_connections{", "\"ws\""]), 8.0);
        upstream.set_json("/leads", "[2]");
        assert_eq!(ws.next()["seq"], 2);
    });
}

// Renewal in band.

#[test]
fn an_update_keeps_the_subscription_and_extends_its_life() {
    on_each_driver(|setup| {
        let upstream = Arc::new(upstream());
        let setup = setup.jwt("leeway = \"0s\"").stream("leads", &upstream.url("/leads"), "");
        let server = setup.start();
        let exp = now_s() + 3;
        let mut ws = server.ws("/v1/streams/leads", &[bearer(&mint(json!({ "sub": "u1", "exp": exp })))]);
        let epoch = ws.next_of("snapshot")["epoch"].clone();
        let later = now_s() + 60;
        let token = mint(json!({ "sub": "u1", "exp": later, "permissions": ["a", "b"] }));
        ws.send(json!({ "type": "auth_update", "token": token, "id": 7 }));
        let expected =
            json!({ "type": "auth_ok", "id": 7, "expires_at": later * 1_000_000, "permissions": ["a", "b"] });
        assert_eq!(ws.next(), expected);
        ws.send(json!({ "type": "auth_update", "token": token }));
        let again = ws.next();
        assert_eq!((&again["type"], &again["id"]), (&json!("auth_ok"), &Value::Null));
        while now_us() < (exp + 1) * 1_000_000 {
            assert!(ws.is_quiet_for(100 * MS), "its first token's end is no news");
        }
        upstream.set_json("/leads", "[2]");
        let next = ws.next();
        assert_eq!((&next["epoch"], &next["seq"]), (&epoch, &json!(2)), "the sequence goes on");
    });
}

#[test]
fn one_tab_renews_and_the_others_go_on_under_the_old_token_and_may_renew_too() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let setup = setup.jwt("leeway = \"0s\"").stream("leads", &upstream.url("/leads"), "");
        let server = setup.start();
        let exp = now_s() + 5;
        let old = mint(json!({ "sub": "u1", "exp": exp }));
        let mut tabs: Vec<Ws> = (0..3).map(|_| server.ws("/v1/streams/leads", &[bearer(&old)])).collect();
        tabs.iter_mut().for_each(|tab| drop(tab.next_of("snapshot")));
        let new = mint(json!({ "sub": "u1", "exp": now_s() + 60 }));
        tabs[0].send(json!({ "type": "auth_update", "token": new }));
        assert_eq!(tabs[0].next()["type"], "auth_ok");
        upstream.set_json("/leads", "[2]");
        for tab in &mut tabs {
            assert_eq!(tab.next_of("snapshot")["seq"], 2, "what one tab did is no news to the others");
        }
        server.ws("/v1/streams/leads", &[bearer(&old)]).next_of("snapshot");
        // The same new token does for a second tab; the third lets the old one end.
        tabs[1].send(json!({ "type": "auth_update", "token": new }));
        assert_eq!(tabs[1].next_of("auth_ok")["type"], "auth_ok");
        assert_eq!(tabs[2].closed(), (4001, "token_expired".into()));
        assert!(now_us() >= exp * 1_000_000);
        upstream.set_json("/leads", "[3]");
        for tab in &mut tabs[..2] {
            assert_eq!(tab.next_of("snapshot")["seq"], 3);
        }
    });
}

#[test]
fn a_flood_of_updates_ends_its_own_connection_and_holds_up_nobody_else() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let setup = setup.cores(1).stream("leads", &upstream.url("/leads"), "");
        let server = setup.limits("messages_per_second = 50").start();
        let mut reader = server.ws("/v1/streams/leads", &[bearer(&token_of("reader"))]);
        reader.next_of("snapshot");
        let verified = || server.metric(&["restcast_token_verifications_total"]);
        let before = verified();
        let mut floods: Vec<Ws> =
            (0..10).map(|n| server.ws("/v1/streams/leads", &[bearer(&token_of(&format!("u{n}")))])).collect();
        for (n, flood) in floods.iter_mut().enumerate() {
            let good = token_of(&format!("u{n}"));
            for _ in 0..200 {
                flood.send(json!({ "type": "auth_update", "token": good }));
            }
        }
        upstream.set_json("/leads", "[2]");
        assert_eq!(reader.next_of("snapshot")["seq"], 2);
        for flood in &mut floods {
            assert_eq!(flood.closed(), (1008, "rate_limited".into()));
        }
        // One verification at the handshake and at most as many as messages are read of each; the same token is a hash.
        assert!(verified() - before <= 40.0, "{}", verified() - before);
    });
}

#[test]
fn an_update_that_ends_sooner_ends_sooner() {
    let upstream = upstream();
    let server = Setup::new().jwt("leeway = \"0s\"").stream("leads", &upstream.url("/leads"), "").start();
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&token_of("u1"))]);
    let exp = now_s() + 2;
    ws.send(json!({ "type": "auth_update", "token": mint(json!({ "sub": "u1", "exp": exp })) }));
    assert_eq!(ws.closed(), (4001, "token_expired".into()));
    assert!(now_us() >= exp * 1_000_000);
}

#[test]
fn an_update_must_name_the_same_subject() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let server = setup.stream("leads", &upstream.url("/leads"), "").start();
        let mut ws = server.ws("/v1/streams/leads", &[bearer(&token_of("u1"))]);
        ws.next_of("snapshot");
        let nobody = mint(json!({ "exp": now_s() + 60 }));
        for token in [token_of("u2"), token_of("U1"), nobody] {
            ws.send(json!({ "type": "auth_update", "token": token, "id": "x" }));
            let frame = ws.next();
            assert_eq!((&frame["type"], &frame["code"]), (&json!("error"), &json!("AUTH_SUBJECT_MISMATCH")));
            assert_eq!(frame["id"], "x");
        }
        upstream.set_json("/leads", "[2]");
        assert_eq!(ws.next()["seq"], 2, "it goes on under its old credential");
    });
}

#[test]
fn five_refused_updates_in_a_row_end_a_connection() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let server = setup.stream("leads", &upstream.url("/leads"), "").start();
        let mut ws = server.ws("/v1/ws", &[bearer(&token_of("u1"))]);
        ws.next_of("welcome");
        let expired = mint(json!({ "sub": "u1", "exp": now_s() - 60 }));
        let refused = |ws: &mut Ws, token: &str, reason: &str, id: u32| {
            ws.send(json!({ "type": "auth_update", "token": token, "id": id }));
            let frame = ws.next();
            assert_eq!((&frame["type"], &frame["code"]), (&json!("error"), &json!("AUTH_UPDATE_REJECTED")));
            assert_eq!((&frame["reason"], &frame["id"]), (&json!(reason), &json!(id)));
        };
        for round in 0..2 {
            for id in 0..4 {
                refused(&mut ws, &expired, "expired", id);
            }
            if round == 0 {
                ws.send(json!({ "type": "auth_update", "token": token_of("u1") }));
                assert_eq!(ws.next()["type"], "auth_ok", "the count begins anew");
            }
        }
        // Without a token a session would be read again; there is none.
        ws.send(json!({ "type": "auth_update" }));
        let (frames, close) = ws.until_close();
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0]["code"], "AUTH_UPDATE_REJECTED");
        assert_eq!(close, (4001, "auth_update_rejected".to_owned()));
    });
}

#[test]
fn rights_that_an_update_takes_away_end_what_they_gave() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let server = setup
            .stream("leads", &upstream.url("/leads"), "permissions = [\"leads.read\"]")
            .stream("prices", &upstream.url("/leads"), "permissions = [\"prices.read\"]")
            .stream("all", &upstream.url("/leads"), "")
            .start();
        let both = claiming(json!({ "permissions": ["leads.read", "prices.read"] }));
        let one = claiming(json!({ "permissions": ["prices.read"] }));
        let none = claiming(json!({}));
        // Of many, what is lost is told.
        let mut ws = server.ws("/v1/ws", &[bearer(&both)]);
        for stream in ["leads", "prices"] {
            ws.send(json!({ "type": "subscribe", "stream": stream }));
            ws.next_of("snapshot");
        }
        ws.send(json!({ "type": "auth_update", "token": one }));
        assert_eq!(ws.next()["permissions"], json!(["prices.read"]));
        assert_eq!(ws.next(), json!({ "type": "unsubscribed", "stream": "leads", "reason": "forbidden" }));
        upstream.set_json("/leads", "[2]");
        let next = ws.next();
        assert_eq!((&next["stream"], &next["seq"]), (&json!("prices"), &json!(2)));
        ws.send(json!({ "type": "subscribe", "stream": "leads", "id": 1 }));
        assert_eq!(ws.next()["code"], "INSUFFICIENT_PERMISSIONS");
        // With the last the connection ends.
        ws.send(json!({ "type": "auth_update", "token": none }));
        assert_eq!(ws.closed(), (4003, "forbidden".into()));
        // A connection without subscriptions has none to lose, whoever let go of them.
        let mut ws = server.ws("/v1/ws", &[bearer(&both)]);
        ws.send(json!({ "type": "subscribe", "stream": "leads" }));
        ws.next_of("snapshot");
        ws.send(json!({ "type": "unsubscribe", "stream": "leads" }));
        // Its poller may see the new value only now.
        let told = ws.next_of("unsubscribed");
        assert_eq!(told, json!({ "type": "unsubscribed", "stream": "leads", "reason": "requested" }));
        ws.send(json!({ "type": "auth_update", "token": none }));
        assert_eq!(ws.next()["type"], "auth_ok");
        ws.send(json!({ "type": "subscribe", "stream": "all" }));
        assert_eq!(ws.next()["type"], "subscribed");
        // One stream's own connection.
        let mut ws = server.ws("/v1/streams/leads", &[bearer(&both)]);
        ws.next_of("snapshot");
        ws.send(json!({ "type": "auth_update", "token": one }));
        let (frames, close) = ws.until_close();
        assert_eq!(close, (4003, "forbidden".to_owned()));
        assert_eq!(frames.len(), 1, "{frames:?}");
        assert_eq!(frames[0]["type"], "auth_ok");
    });
}

#[test]
fn changed_claims_move_a_subscription() {
    on_each_driver(|setup| {
        let upstream = Upstream::start();
        upstream.set_json("/c/1/leads", "[1]");
        upstream.set_json("/c/2/leads", "[2]");
        let server = setup.stream("mine", &upstream.url("/c/{claims.companyId}/leads"), "").start();
        let (one, two) = (claiming(json!({ "companyId": 1 })), claiming(json!({ "companyId": "2" })));
        for path in ["/v1/ws", "/v1/streams/mine"] {
            let mut ws = server.ws(path, &[bearer(&one)]);
            if path == "/v1/ws" {
                ws.send(json!({ "type": "subscribe", "stream": "mine" }));
            }
            let before = ws.next_of("snapshot");
            assert_eq!(before["stream"], "mine");
            assert_ne!(before["data"], json!([2]));
            ws.send(json!({ "type": "auth_update", "token": two }));
            assert_eq!(ws.next()["type"], "auth_ok");
            let after = ws.next();
            assert_eq!((&after["type"], &after["stream"]), (&json!("snapshot"), &json!("mine")), "{after}");
            assert_eq!(after["data"], json!([2]));
            assert_ne!(after["epoch"], before["epoch"]);
            // The old one is polled for a while yet, and says nothing more here.
            let seen = upstream.request_count();
            upstream.set_json("/c/1/leads", &format!("[\"one\",{seen}]"));
            upstream.wait_for_requests(seen + 10, PATIENCE);
            assert!(ws.is_quiet_for(100 * MS), "another company's value came");
            ws.send(json!({ "type": "auth_update", "token": two }));
            assert_eq!(ws.next()["type"], "auth_ok");
            assert!(ws.is_quiet_for(50 * MS), "the same claims move nothing");
            ws.send(json!({ "type": "auth_update", "token": claiming(json!({})) }));
            let (_, close) = ws.until_close();
            assert_eq!(close, (4003, "forbidden".to_owned()), "without the claim there is no stream");
        }
    });
}

// Renewal of event streams.

fn renew(server: &Server, connection: &str, token: &str) -> Answer {
    let body = json!({ "token": token }).to_string();
    let headers = [of("Content-Type", "application/json")];
    server.request("POST", &format!("/v1/connections/{connection}/auth"), &headers, &body)
}

#[test]
fn an_event_stream_is_renewed_by_post_whichever_core_it_is_on() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let server = setup
            .jwt("leeway = \"0s\"")
            .stream("leads", &upstream.url("/leads"), "")
            .stream("agents", &upstream.url("/leads"), "roles = [\"agent\"]")
            .start();
        let exp = now_s() + 4;
        let token = mint(json!({ "sub": "u1", "exp": exp }));
        let mut streams: Vec<(Sse, String)> = (0..8)
            .map(|_| {
                let mut sse = server.sse("/v1/streams/leads", &[bearer(&token)]);
                let welcome = sse.next().expect("an event");
                assert_eq!(welcome.kind, "welcome");
                sse.next_of("snapshot");
                (sse, welcome.data["connection"].as_str().expect("a name").to_owned())
            })
            .collect();
        let later = now_s() + 600;
        let renewed = mint(json!({ "sub": "u1", "exp": later, "permissions": ["p"] }));
        for (_, connection) in &streams {
            // A request may land on either core.
            for _ in 0..4 {
                let answer = renew(&server, connection, &renewed);
                assert_eq!(answer.status, 200, "{answer:?}");
                let ok = json!({ "type": "auth_ok", "expires_at": later * 1_000_000, "permissions": ["p"] });
                assert_eq!(answer.json(), ok);
            }
        }
        let (_, connection) = &streams[0];
        assert_eq!(outcome(&renew(&server, connection, "nonsense")), is(401, "INVALID_TOKEN"));
        let expired = mint(json!({ "sub": "u1", "exp": now_s() - 60 }));
        assert_eq!(outcome(&renew(&server, connection, &expired)), is(401, "TOKEN_EXPIRED"));
        assert_eq!(outcome(&renew(&server, connection, &token_of("u2"))), is(403, "AUTH_SUBJECT_MISMATCH"));
        let unknown = format!("{}0", &connection[..connection.len() - 1]);
        let unknown =
            if unknown == *connection { format!("{}1", &connection[..connection.len() - 1]) } else { unknown };
        for name in [unknown.as_str(), "c_", "nonsense", "c_00000000000000000000000000000000", "%00"] {
            assert_eq!(outcome(&renew(&server, name, &renewed)), is(404, "UNKNOWN_CONNECTION"), "{name}");
        }
        let mut ws = server.ws("/v1/ws", &[bearer(&token_of("u1"))]);
        let name = ws.next()["connection"].as_str().expect("a name").to_owned();
        assert_eq!(outcome(&renew(&server, &name, &renewed)), is(404, "UNKNOWN_CONNECTION"), "a WebSocket has frames");
        // They outlive their first token.
        while now_us() < exp * 1_000_000 + 500_000 {
            thread::sleep(20 * MS);
        }
        upstream.set_json("/leads", "[2]");
        for (sse, _) in &mut streams {
            loop {
                let event = sse.next().expect("it goes on");
                assert_ne!(event.kind, "close");
                if event.data["seq"] == 2 {
                    break;
                }
                assert_eq!(event.kind, "reauthenticate");
            }
        }
        // A new credential that does not select the stream ends it.
        let (mut sse, connection) = streams.pop().expect("eight");
        assert_eq!(renew(&server, &connection, &claiming(json!({ "streams": ["agents"] }))).status, 200);
        assert_eq!(sse.next_of("close").data["code"], 4003);
        assert_eq!(sse.next(), None);
        assert_eq!(outcome(&renew(&server, &connection, &renewed)), is(404, "UNKNOWN_CONNECTION"));
        // Five refusals in a row end it as well.
        let (mut sse, connection) = streams.pop().expect("seven");
        let others = token_of("u2");
        for (token, status) in [(&expired, 401), (&others, 403), (&expired, 401), (&others, 403), (&others, 403)] {
            assert_eq!(renew(&server, &connection, token).status, status);
        }
        let close = sse.next_of("close").data;
        assert_eq!((&close["code"], &close["reason"]), (&json!(4001), &json!("auth_update_rejected")));
    });
}

#[test]
fn failed_renewals_count_for_the_client_and_not_for_its_proxy() {
    let upstream = upstream();
    let server = Setup::new()
        .limits("auth_failures_per_minute = 2")
        .server("trusted_proxies = [\"127.0.0.0/8\"]")
        .stream("leads", &upstream.url("/leads"), "")
        .start();
    let mut sse = server.sse("/v1/streams/leads", &[bearer(&token_of("u1")), of("X-Forwarded-For", "192.0.2.1")]);
    let connection = sse.next().expect("an event").data["connection"].as_str().expect("a name").to_owned();
    let renew = |client: &str, connection: &str, token: &str| {
        let body = json!({ "token": token }).to_string();
        let path = format!("/v1/connections/{connection}/auth");
        server.request("POST", &path, &[of("X-Forwarded-For", client)], &body).status
    };
    // One client's own connection, so that five refusals do not end the other's.
    let mut other = server.sse("/v1/streams/leads", &[bearer(&token_of("u2")), of("X-Forwarded-For", "192.0.2.2")]);
    let others = other.next().expect("an event").data["connection"].as_str().expect("a name").to_owned();
    for _ in 0..4 {
        assert_eq!(renew("192.0.2.2", &others, "nonsense"), 401);
    }
    assert_eq!(renew("192.0.2.2", &others, "nonsense"), 429);
    assert_eq!(renew("192.0.2.1", &connection, &token_of("u1")), 200, "another client behind the same proxy");
}

// Heartbeats.

#[test]
fn a_silent_websocket_is_closed_and_one_that_answers_is_not() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let setup = setup.server("heartbeat = \"500ms\"").stream("leads", &upstream.url("/leads"), "");
        let server = setup.start();
        let mut answering = server.ws("/v1/streams/leads", &[bearer(&token_of("u1"))]);
        assert_eq!(answering.next()["heartbeat_ms"], 500);
        answering.next_of("snapshot");
        let begun = Instant::now();
        let mut silent = server.connect();
        assert_eq!(silent.upgrade("/v1/ws", &[bearer(&token_of("u1"))]).status, 101);
        let mut pings = 0;
        let close = thread::scope(|scope| {
            let close = scope.spawn(|| {
                loop {
                    match silent.frame() {
                        (_, 9, _) => pings += 1,
                        (_, 8, payload) => return payload,
                        _ => {}
                    }
                }
            });
            let mut answered = 0;
            while !close.is_finished() {
                if let Some(heard) = answering.heard_within(100 * MS) {
                    assert_eq!(heard, Heard::Ping);
                    answered += 1;
                }
            }
            // One that only sends is alive as well.
            assert!(answered >= 1, "a ping came");
            close.join().expect("a reader")
        });
        assert!(begun.elapsed() >= 1000 * MS, "closed after {:?}", begun.elapsed());
        assert!(pings >= 1, "it was asked");
        assert_eq!(close, [&1001u16.to_be_bytes()[..], b"heartbeat_timeout"].concat());
        assert_eq!(answering.heard(), Heard::Ping, "it lives on");
        let mut sse = server.sse("/v1/streams/leads", &[bearer(&token_of("u1"))]);
        sse.next_of("snapshot");
        for _ in 0..4 {
            sse.comment();
        }
    });
}

// Limits.

#[test]
fn connections_are_limited_in_all() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let server = setup.limits("connections = 3").stream("leads", &upstream.url("/leads"), "").start();
        let token = token_of("u1");
        let held: Vec<Ws> = (0..3).map(|_| server.ws("/v1/ws", &[bearer(&token)])).collect();
        let mut raw = server.connect();
        let answer = raw.answer();
        assert_eq!(outcome(&answer), is(503, "TOO_MANY_CONNECTIONS"));
        assert!(answer.header("retry-after").is_some() && raw.is_closed());
        assert_eq!(server.admin("GET", "/readyz", None).status, 200, "the admin listener has its own");
        drop(held);
        eventually("places are free", || {
            let mut raw = server.connect();
            raw.try_send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").ok()?;
            (raw.answer().status == 200).then_some(())
        });
    });
}

#[test]
fn connections_are_limited_by_subject() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let setup = setup.limits("connections_per_subject = 2").auth("first_message = \"30s\"");
        let server = setup.stream("leads", &upstream.url("/leads"), "allow_anonymous = true").start();
        let token = token_of("u1");
        let refused = |path: &str| {
            let answer = server.try_ws(path, &[bearer(&token)]).map(drop).expect_err("one too many");
            assert!(answer.header("retry-after").is_some());
            outcome(&answer)
        };
        let ws = server.ws("/v1/ws", &[bearer(&token)]);
        let sse = server.sse("/v1/streams/leads", &[bearer(&token)]);
        assert_eq!(refused("/v1/ws"), is(429, "TOO_MANY_CONNECTIONS"));
        assert_eq!(refused("/v1/streams/leads"), is(429, "TOO_MANY_CONNECTIONS"));
        let answer = server.get("/v1/streams/leads", &[bearer(&token), of("Accept", "text/event-stream")]);
        assert_eq!(outcome(&answer), is(429, "TOO_MANY_CONNECTIONS"));
        // Raised from anonymous it counts, too.
        let mut raised = server.ws("/v1/ws", &[]);
        raised.next_of("welcome");
        raised.send(json!({ "type": "auth_update", "token": token }));
        assert_eq!(raised.next()["code"], "TOO_MANY_CONNECTIONS");
        let _other = server.ws("/v1/ws", &[bearer(&token_of("u2"))]);
        drop((ws, sse));
        // A HEAD of events opens nothing.
        eventually("a HEAD holds no place", || {
            let events = [bearer(&token), of("Accept", "text/event-stream")];
            (0..3).all(|_| server.request("HEAD", "/v1/streams/leads", &events, "").status == 200).then_some(())
        });
        let _first = eventually("a place is free", || server.try_ws("/v1/ws", &[bearer(&token)]).ok());
        let _second = eventually("another is free", || server.try_ws("/v1/ws", &[bearer(&token)]).ok());
        assert_eq!(refused("/v1/ws"), is(429, "TOO_MANY_CONNECTIONS"));
    });
}

#[test]
fn subscriptions_are_limited_by_connection() {
    let upstream = upstream();
    let mut setup = Setup::new().limits("subscriptions_per_connection = 2");
    for id in ["a", "b", "c"] {
        setup = setup.stream(id, &upstream.url("/leads"), "");
    }
    let server = setup.start();
    let mut ws = server.ws("/v1/ws", &[bearer(&token_of("u1"))]);
    let mut asks = |kind: &str, stream: &str| {
        ws.send(json!({ "type": kind, "stream": stream, "id": stream }));
        loop {
            let frame = ws.next();
            if frame["id"] == *stream {
                return frame["code"].as_str().unwrap_or("").to_owned();
            }
        }
    };
    assert_eq!((asks("subscribe", "a"), asks("subscribe", "b")), (String::new(), String::new()));
    assert_eq!(asks("subscribe", "a"), "ALREADY_SUBSCRIBED");
    assert_eq!(asks("subscribe", "c"), "TOO_MANY_SUBSCRIPTIONS");
    assert_eq!(asks("unsubscribe", "a"), "");
    assert_eq!(asks("subscribe", "c"), "");
}

#[test]
fn streams_are_limited_by_subject_and_in_all() {
    on_each_driver(|setup| {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "[]");
        let url = format!("{}?r={{query.region}}", upstream.url("/leads"));
        let setup = setup.limits("streams_per_subject = 2\nstreams = 3").cores(1);
        let server = setup.stream("leads", &url, "params = [\"region\"]").start();
        let (u1, u2) = (token_of("u1"), token_of("u2"));
        let path = |region: &str| format!("/v1/streams/leads?region={region}");
        let mut first = server.ws(&path("a"), &[bearer(&u1)]);
        assert_eq!(first.next_of("snapshot")["stream"], "leads?region=a");
        let mut again = server.ws(&path("a"), &[bearer(&u1)]);
        again.next_of("snapshot");
        let mut many = server.ws("/v1/ws", &[bearer(&u1)]);
        many.send(json!({ "type": "subscribe", "stream": "leads?region=b" }));
        many.next_of("snapshot");
        many.send(json!({ "type": "subscribe", "stream": "leads?region=c", "id": 1 }));
        let frame = many.next_of("error");
        assert_eq!((&frame["code"], &frame["id"]), (&json!("TOO_MANY_STREAMS"), &json!(1)));
        // Another subject has its own count, up to what there is in all.
        let mut other = server.ws(&path("c"), &[bearer(&u2)]);
        other.next_of("snapshot");
        let mut over = server.ws("/v1/ws", &[bearer(&u2)]);
        over.send(json!({ "type": "subscribe", "stream": "leads?region=d", "id": 2 }));
        assert_eq!(over.next_of("error")["code"], "TOO_MANY_STREAMS");
        let answer = server.get(&path("e"), &[bearer(&u2)]);
        assert_eq!(answer.code(), "TOO_MANY_STREAMS");
        assert!(answer.status == 503 || answer.status == 429, "{answer:?}");
        assert!(answer.header("retry-after").is_some());
        // What nobody watches any more makes place.
        drop(other);
        eventually("a stream is let go of", || (server.get(&path("e"), &[bearer(&u2)]).status == 200).then_some(()));
    });
}

// Draining.

/// Connections of every kind, and what they get when the server goes.
fn drains(setup: Setup, begin: impl Fn(&Server)) {
    let upstream = upstream();
    let window_ms = 3_000;
    let setup = setup.server("drain = \"3s\"\necho = true").auth("first_message = \"10m\"");
    let mut server = setup.stream("leads", &upstream.url("/leads"), "").start();
    let token = token_of("u1");
    let mut sockets: Vec<Ws> = (0..6)
        .map(|_| {
            let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
            ws.next_of("snapshot");
            ws
        })
        .collect();
    let mut many = server.ws("/v1/ws", &[bearer(&token)]);
    many.next_of("welcome");
    sockets.push(many);
    let mut sse = server.sse("/v1/streams/leads", &[bearer(&token)]);
    sse.next_of("snapshot");
    let etag = server.get("/v1/streams/leads", &[bearer(&token)]).header("etag").expect("an etag").to_owned();
    let mut idle = server.connect();
    assert_eq!(idle.request("GET", "/healthz", &[], "").status, 200);
    let mut echo = server.ws("/echo", &[]);
    // One that has not said yet who it is.
    sockets.push(server.ws("/v1/ws", &[]));
    // Two that do not close when they are told to keep the process for a moment.
    let mut lingering = server.connect();
    assert_eq!(lingering.upgrade("/v1/ws", &[bearer(&token)]).status, 101);
    let mut poll = server.connect();
    let request = format!(
        "GET /v1/streams/leads HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nIf-None-Match: {etag}\r\n\
         Prefer: wait=60\r\n\r\n"
    );
    poll.send(request.as_bytes());
    eventually("the poll waits", || (server.metric(&["connections", "json_wait"]) >= 1.0).then_some(()));
    assert_eq!(server.admin("GET", "/readyz", None).status, 200);
    let begun = Instant::now();
    begin(&server);
    let not_ready = eventually("it is not ready", || {
        let answer = server.admin("GET", "/readyz", None);
        (answer.status != 200).then_some(answer)
    });
    assert_eq!(not_ready.status, 503);
    let answer = poll.answer();
    assert_eq!(outcome(&answer), is(503, "DRAINING"));
    assert!(answer.header("retry-after").is_some_and(|seconds| seconds.parse::<u32>().is_ok()));
    let mut waits = Vec::new();
    for mut ws in sockets {
        let (frames, close) = ws.until_close();
        assert_eq!(close, (1012, "draining".to_owned()));
        let last = frames.last().expect("reconnect");
        assert_eq!(last["type"], "reconnect", "{frames:?}");
        waits.push(last["after_ms"].as_u64().expect("milliseconds"));
    }
    let reconnect = sse.next_of("reconnect");
    let after_ms = reconnect.data["after_ms"].as_u64().expect("milliseconds");
    assert_eq!(sse.retry, Some(after_ms));
    waits.push(after_ms);
    assert_eq!(sse.next_of("close").data, json!({ "type": "close", "code": 1012, "reason": "draining" }));
    assert_eq!(sse.next(), None);
    assert!(waits.iter().all(|&wait| wait < window_ms), "{waits:?}");
    assert!(waits.iter().max() > waits.iter().min(), "all come back at once: {waits:?}");
    assert_eq!(echo.closed().0, 1012);
    assert!(idle.is_closed());
    assert_eq!(lingering.close_frame(), (1012, "draining".into()));
    assert!(std::net::TcpStream::connect(server.listen).is_err(), "the listener is closed");
    let status = server.wait();
    assert_eq!(status.code(), Some(0), "{status:?}");
    assert!(begun.elapsed() < Duration::from_millis(window_ms) + 10 * Duration::from_secs(1));
}

#[test]
fn sigterm_sends_everybody_away() {
    on_each_driver(|setup| drains(setup, |server| server.signal(Signal::TERM)));
}

#[test]
fn the_admin_sends_everybody_away() {
    drains(Setup::new(), |server| {
        let answer = server.admin("POST", "/admin/v1/drain", Some(ADMIN_KEY));
        assert!((200..300).contains(&answer.status), "{answer:?}");
    });
}

#[test]
fn a_process_without_connections_ends_at_once() {
    on_each_driver(|setup| {
        let mut server = setup.server("drain = \"1h\"").start();
        server.signal(Signal::INT);
        assert_eq!(server.wait().code(), Some(0));
    });
}

/// A server with a connection that does not let it go for a second.
fn lingering() -> (Server, Raw) {
    let server = Setup::new().server("drain = \"1h\"").start();
    let mut raw = server.connect();
    assert_eq!(raw.upgrade("/v1/ws", &[bearer(&token_of("u1"))]).status, 101);
    (server, raw)
}

#[test]
fn a_second_signal_ends_at_once() {
    let (mut server, _raw) = lingering();
    server.signal(Signal::TERM);
    server.wait_for_log("The process drains.", 1);
    server.signal(Signal::TERM);
    server.wait_for_log("a second time", 1);
    server.wait();
}

#[test]
fn a_signal_after_the_admins_drain_is_the_first() {
    let (mut server, mut raw) = lingering();
    assert!(server.admin("POST", "/admin/v1/drain", Some(ADMIN_KEY)).status < 300);
    server.wait_for_log("The process drains.", 1);
    server.signal(Signal::TERM);
    assert_eq!(raw.close_frame().0, 1012);
    assert_eq!(server.wait().code(), Some(0));
    assert_eq!(server.log_count("a second time"), 0, "{}", server.log_text());
}

// Reload.

/// A poll of `leads` that waits for a change.
fn waiting(server: &Server, token: &str) -> Raw {
    let etag = server.get("/v1/streams/leads", &[bearer(token)]).header("etag").expect("an etag").to_owned();
    let mut poll = server.connect();
    let request = format!(
        "GET /v1/streams/leads HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nIf-None-Match: {etag}\r\n\
         Prefer: wait=60\r\n\r\n"
    );
    poll.send(request.as_bytes());
    eventually("the poll waits", || (server.metric(&["connections", "json_wait"]) >= 1.0).then_some(()));
    poll
}

#[test]
fn a_reload_takes_keys_in_and_out() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let setup = setup.stream("leads", &upstream.url("/leads"), "");
        let server = setup.start();
        let other = "another secret of the tests, 32 bytes and more";
        let by_other = mint_by(json!({ "alg": "HS256", "kid": "k2" }), other, json!({ "exp": now_s() + 600 }));
        let old = token_of("u1");
        assert_eq!(server.get("/v1/streams/leads", &[bearer(&by_other)]).status, 401);
        let mut ws = server.ws("/v1/streams/leads", &[bearer(&old)]);
        let epoch = ws.next_of("snapshot")["epoch"].clone();
        server.reload(&setup.clone().key("k2", "HS256", other));
        eventually("the new key is known", || {
            (server.get("/v1/streams/leads", &[bearer(&by_other)]).status == 200).then_some(())
        });
        assert_eq!(server.get("/v1/streams/leads", &[bearer(&old)]).status, 200);
        let rotated = setup.clone().no_keys().key("k2", "HS256", other);
        server.reload(&rotated);
        eventually("the old key is gone", || {
            (server.get("/v1/streams/leads", &[bearer(&old)]).status == 401).then_some(())
        });
        // Whoever came by it stays, as long as nothing else is said.
        upstream.set_json("/leads", "[2]");
        let next = ws.next();
        assert_eq!((&next["epoch"], &next["seq"]), (&epoch, &json!(2)));
        server.reload(&rotated.clone().jwt("close_on_key_removal = true"));
        assert_eq!(ws.closed(), (4001, "key_removed".into()));
        let mut sse = server.sse("/v1/streams/leads", &[bearer(&by_other)]);
        sse.next_of("snapshot");
        let mut poll = waiting(&server, &by_other);
        server.reload(&setup.clone().jwt("close_on_key_removal = true"));
        assert_eq!(outcome(&poll.answer()), is(401, "INVALID_TOKEN"));
        let close = sse.next_of("close").data;
        assert_eq!((&close["code"], &close["reason"]), (&json!(4001), &json!("key_removed")));
        assert_eq!(sse.next(), None);
    });
}

#[test]
fn a_key_whose_secret_changes_is_another_key() {
    let upstream = upstream();
    let setup = Setup::new().jwt("close_on_key_removal = true").stream("leads", &upstream.url("/leads"), "");
    let server = setup.start();
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&token_of("u1"))]);
    ws.next_of("snapshot");
    // Nothing has changed.
    server.reload(&setup);
    upstream.set_json("/leads", "[2]");
    assert_eq!(ws.next()["seq"], 2);
    server.reload(&setup.clone().no_keys().key("k1", "HS256", "a new secret under the same old name"));
    assert_eq!(ws.closed(), (4001, "key_removed".into()));
}

#[test]
fn a_stream_that_a_reload_takes_out_ends_and_others_go_on() {
    on_each_driver(|setup| {
        let upstream = upstream();
        upstream.set_json("/prices", "[1]");
        let both = setup.stream("leads", &upstream.url("/leads"), "");
        let prices = upstream.url("/prices");
        let one = both.clone().no_streams().stream("prices", &prices, "");
        let both = both.stream("prices", &prices, "");
        let server = both.start();
        let token = token_of("u1");
        let mut single = server.ws("/v1/streams/leads", &[bearer(&token)]);
        single.next_of("snapshot");
        let mut sse = server.sse("/v1/streams/leads", &[bearer(&token)]);
        sse.next_of("snapshot");
        let mut stays = server.ws("/v1/streams/prices", &[bearer(&token)]);
        stays.next_of("snapshot");
        let mut many = server.ws("/v1/ws", &[bearer(&token)]);
        for stream in ["leads", "prices"] {
            many.send(json!({ "type": "subscribe", "stream": stream }));
            many.next_of("snapshot");
        }
        let mut only = server.ws("/v1/ws", &[bearer(&token)]);
        only.send(json!({ "type": "subscribe", "stream": "leads" }));
        only.next_of("snapshot");
        let mut poll = waiting(&server, &token);
        let begun = Instant::now();
        server.reload(&one);
        let (frames, close) = single.until_close();
        assert_eq!(close, (4004, "stream_ended".to_owned()));
        assert_eq!(frames.last().map(|frame| &frame["state"]), Some(&json!("ended")), "{frames:?}");
        let close = sse.next_of("close").data;
        assert_eq!((&close["code"], &close["reason"]), (&json!(4004), &json!("stream_ended")));
        let ended = json!({ "type": "unsubscribed", "stream": "leads", "reason": "stream_ended" });
        assert_eq!(many.next_of("stream_status")["state"], "ended");
        assert_eq!(many.next(), ended);
        // Losing a stream is not losing a right: the connection may ask for others.
        assert_eq!(only.next_of("unsubscribed"), ended);
        only.send(json!({ "type": "subscribe", "stream": "prices" }));
        assert_eq!(only.next()["type"], "subscribed");
        assert_eq!(poll.answer().code(), "STREAM_ENDED");
        assert!(begun.elapsed() < PATIENCE, "a poll is told at once");
        upstream.set_json("/prices", "[2]");
        assert_eq!((&stays.next()["seq"], &many.next()["seq"]), (&json!(2), &json!(2)), "others notice nothing");
        let answer = server.get("/v1/streams/leads", &[bearer(&token)]);
        assert_eq!(outcome(&answer), is(404, "STREAM_NOT_FOUND"));
        server.reload(&both);
        eventually("it is back", || (server.get("/v1/streams/leads", &[bearer(&token)]).status == 200).then_some(()));
    });
}

#[test]
fn a_reload_may_name_claims_that_live_tokens_have() {
    let upstream = upstream();
    upstream.set_json("/7/leads", "[7]");
    let plain = Setup::new().stream("leads", &upstream.url("/leads"), "");
    let by_company = Setup::new().stream("leads", &upstream.url("/{claims.companyId}/leads"), "");
    let server = plain.start();
    let token = mint(json!({ "sub": "u1", "exp": now_s() + 600, "companyId": 7 }));
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
    let before = ws.next_of("snapshot");
    server.reload(&by_company);
    let after = ws.next_of("snapshot");
    assert_eq!(after["data"], json!([7]));
    assert_ne!(before["epoch"], after["epoch"], "it is another sequence");
}

#[test]
fn a_drain_without_a_window_still_tells_everybody() {
    let upstream = upstream();
    let mut server = Setup::new().server("drain = \"0s\"").stream("leads", &upstream.url("/leads"), "").start();
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&token_of("u1"))]);
    ws.next_of("snapshot");
    server.signal(Signal::TERM);
    let (frames, close) = ws.until_close();
    assert_eq!((&frames.last().expect("a frame")["type"], close), (&json!("reconnect"), (1012, "draining".to_owned())));
    assert!(server.wait().success());
}

#[test]
fn rights_that_a_reload_takes_away_end_what_they_gave() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let prices = upstream.url("/leads");
        let closed = setup.clone().stream("leads", &upstream.url("/leads"), "roles = [\"agent\"]");
        let closed = closed.stream("prices", &prices, "");
        let setup = setup.stream("leads", &upstream.url("/leads"), "").stream("prices", &prices, "");
        let server = setup.start();
        let (plain, agent) = (token_of("u1"), claiming(json!({ "role": "agent" })));
        let mut refused = server.ws("/v1/streams/leads", &[bearer(&plain)]);
        refused.next_of("snapshot");
        let mut kept = server.ws("/v1/streams/leads", &[bearer(&agent)]);
        kept.next_of("snapshot");
        let mut many = server.ws("/v1/ws", &[bearer(&plain)]);
        for stream in ["leads", "prices"] {
            many.send(json!({ "type": "subscribe", "stream": stream }));
            many.next_of("snapshot");
        }
        server.reload(&closed);
        assert_eq!(refused.closed(), (4003, "forbidden".into()));
        assert_eq!(many.next(), json!({ "type": "unsubscribed", "stream": "leads", "reason": "forbidden" }));
        upstream.set_json("/leads", "[2]");
        eventually("the agent goes on", || (kept.next()["data"] == json!([2])).then_some(()));
    });
}

#[test]
fn a_bad_file_is_reported_and_the_old_one_stays() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let setup = setup.stream("leads", &upstream.url("/leads"), "");
        let server = setup.start();
        let token = token_of("u1");
        let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
        ws.next_of("snapshot");
        server.reload_text(&setup.text().replace("[limits]", "[limits]\nconections = 1\nkeep_alive = 7"));
        assert_eq!(server.log_count("was read again"), 0);
        let line = server.wait_for_log("The configuration is not taken", 1);
        assert!(server.log_text().contains("conections") && server.log_text().contains("connections"), "{line}");
        assert!(server.log_text().contains("keep_alive"), "every error at once: {}", server.log_text());
        upstream.set_json("/leads", "[2]");
        assert_eq!(ws.next()["seq"], 2);
        assert_eq!(server.get("/v1/streams/leads", &[bearer(&token)]).status, 200);
        // And a good one afterwards is taken.
        server.reload(&setup.clone().auth("query_token = false"));
        let path = format!("/v1/streams/leads?token={token}");
        eventually("it is taken", || (server.get(&path, &[]).status == 401).then_some(()));
    });
}

#[test]
fn limits_are_read_again() {
    let upstream = upstream();
    let setup = Setup::new().stream("leads", &upstream.url("/leads"), "");
    let server = setup.start();
    let token = token_of("u1");
    let _held: Vec<Ws> = (0..2).map(|_| server.ws("/v1/ws", &[bearer(&token)])).collect();
    let mut open = server.ws("/v1/ws", &[bearer(&token)]);
    open.next_of("welcome");
    server.reload(&setup.clone().limits("connections_per_subject = 1\nmessage_bytes_max = \"1KiB\""));
    eventually("the limit is in force", || {
        // Those from before were not counted: one more is the first.
        let first = server.try_ws("/v1/ws", &[bearer(&token)]);
        first.is_ok().then_some(())?;
        server.try_ws("/v1/ws", &[bearer(&token)]).err().map(|answer| assert_eq!(answer.status, 429))
    });
    open.send_message(Message::text(" ".repeat(2 << 10)));
    assert_eq!(open.closed().0, 1009, "a connection from before keeps the new limit");
}

// The process.

#[test]
fn a_port_that_is_taken_is_told_and_not_shared() {
    let server = Setup::new().start();
    let listen = format!("listen = \"{}\"", server.listen);
    let (status, out, err) = run(&["serve"], &Setup::new().server(&listen));
    assert!(!status.success() && out.is_empty(), "{out}");
    assert!(err.contains("in use"), "{err}");
    let (status, _, err) = run(&["serve"], &Setup::new().only_admin(&format!("# {}", server.admin)).server(&listen));
    assert!(!status.success() && err.lines().count() <= 2, "{err}");
    assert_eq!(server.get("/healthz", &[]).status, 200);
}

#[test]
fn plain_text_beyond_loopback_must_be_asked_for() {
    let beyond = Setup::new().server("listen = \"192.0.2.1:8080\"");
    let (status, _, err) = run(&["check"], &beyond);
    assert!(!status.success() && err.contains("plaintext"), "{err}");
    let (status, out, err) = run(&["check"], &beyond.clone().server("plaintext = true"));
    assert!(status.success() && out.contains("192.0.2.1:8080"), "{err}");
    let (status, _, err) = run(&["check"], &beyond.server("plaintext = true\necho = true"));
    assert!(!status.success() && err.contains("echo"), "{err}");
}

// The admin listener.

#[test]
fn the_admin_listener_asks_for_its_host_and_key() {
    let server = Setup::new().admin("names = [\"restcast.internal\"]").start();
    let hosted = |host: &str| {
        let mut raw = Raw::connect(server.admin);
        raw.request("GET", "/metrics", &[of("Host", host)], "").status
    };
    let port = server.admin.port();
    for host in
        [format!("127.0.0.1:{port}"), "127.0.0.1".into(), format!("localhost:{port}"), "RESTCAST.internal".into()]
    {
        assert_eq!(hosted(&host), 200, "{host}");
    }
    for host in ["evil.example", "restcast.internal.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "127.0.0.2"] {
        assert_eq!(hosted(host), 403, "{host}");
    }
    for path in ["/metrics", "/readyz"] {
        assert_eq!(server.admin("GET", path, None).status, 200);
        assert_eq!(server.admin("HEAD", path, None).status, 200);
        let answer = server.admin("POST", path, None);
        assert_eq!((answer.status, answer.header("allow")), (405, Some("GET, HEAD")));
    }
    for (key, status) in [(None, 401), (Some("wrong"), 401), (Some(&ADMIN_KEY[1..]), 401), (Some(ADMIN_KEY), 405)] {
        let answer = server.admin("GET", "/admin/v1/drain", key);
        assert_eq!(answer.status, status, "{key:?}");
        if status == 401 {
            assert!(answer.header("www-authenticate").is_some_and(|challenge| challenge.starts_with("Bearer")));
        }
    }
    assert_eq!(server.admin("GET", "/admin/v1/nothing", Some(ADMIN_KEY)).status, 404);
    assert_eq!(server.admin("GET", "/admin/v1/nothing", None).status, 401, "what there is is not for strangers");
    assert_eq!(server.admin("GET", "/nothing", None).status, 404);
    let mut raw = Raw::connect(server.admin);
    raw.send(b"GET /metrics HTTP/1.0\r\n\r\n");
    assert_eq!(raw.answer().status, 505);
    let without = Setup::new().only_admin("").start();
    for key in [None, Some(""), Some(ADMIN_KEY)] {
        assert_eq!(without.admin("POST", "/admin/v1/drain", key).status, 403, "{key:?}");
    }
    assert_eq!(without.get("/metrics", &[]).status, 404, "the public listener has none of it");
}

#[test]
fn the_metrics_count_what_happens() {
    on_each_driver(|setup| {
        let upstream = upstream();
        let server = setup.stream("leads", &upstream.url("/leads"), "").start();
        let token = token_of("u1");
        let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
        ws.next_of("snapshot");
        let _sse = server.sse("/v1/streams/leads", &[bearer(&token)]);
        assert_eq!(server.get("/v1/streams/leads", &[]).status, 401);
        assert_eq!(server.get("/v1/streams/none", &[bearer(&token)]).status, 404);
        upstream.set_json("/leads", "[2]");
        ws.next();
        ws.send(json!({ "type": "auth_update", "token": token }));
        ws.next_of("auth_ok");
        let page = server.metrics();
        for (parts, least) in [
            (["restcast_connections", "\"ws\""], 1.0),
            (["restcast_connections", "\"sse\""], 1.0),
            (["handshakes", "\"ok\""], 2.0),
            (["handshakes", "MISSING_CREDENTIAL"], 1.0),
            (["handshakes", "STREAM_NOT_FOUND"], 1.0),
            (["polls", "changed"], 2.0),
            (["deliveries", ""], 2.0),
            (["auth_updates", "accepted"], 1.0),
            (["loop", "count"], 1.0),
            (["lag", "count"], 1.0),
            (["conflations", ""], 0.0),
        ] {
            let lines: Vec<&str> = page
                .lines()
                .filter(|line| parts.iter().all(|part| line.contains(part)) && !line.starts_with('#'))
                .collect();
            assert!(!lines.is_empty(), "no metric has {parts:?}:\n{page}");
            let sum: f64 = lines.iter().filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum();
            assert!(sum >= least, "{parts:?} is {sum}:\n{}", lines.join("\n"));
        }
        // Every sample belongs to a metric that is explained.
        for line in page.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            let name = line.split(['{', ' ']).next().expect("a name");
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            let explained = |name: &str| page.contains(&format!("# TYPE {name} "));
            assert!(explained(name) || explained(base), "{line}");
        }
        ws.send_message(Message::Close(None));
        eventually("the close is counted", || (server.metric(&["closes", "by_client"]) >= 1.0).then_some(()));
        eventually("the connection is gone", || {
            (server.metric(&["restcast_connections{", "\"ws\""]) == 0.0).then_some(())
        });
    });
}

// Secrets.

#[test]
fn no_secret_comes_to_light() {
    let upstream = upstream();
    let hunters = |name: &str| format!("hunter2-{name}-with-32-bytes-and-more");
    let (jwt, admin, header, query) = (hunters("jwt"), hunters("admin"), hunters("header"), hunters("query"));
    let (password, body) = (hunters("password"), hunters("body"));
    let refusing = Upstream::start();
    let with_password = |upstream: &Upstream, path: &str| {
        format!("{}?key={query}", upstream.url(path)).replace("//", &format!("//user:{password}@"))
    };
    let headers = "headers = { \"X-Api-Key\" = \"env:HEADER_SECRET\" }\nbackoff_max = \"50ms\"";
    let with_header = |setup: Setup, id: &str, url: &str| setup.stream(id, url, headers);
    let mut setup = Setup::new().no_keys().key("k1", "HS256", &jwt).env("HEADER_SECRET", &header);
    setup = setup.only_admin(&format!("key = {admin:?}"));
    let urls = [
        ("good", with_password(&upstream, "/leads")),
        ("status", with_password(&refusing, "/status")),
        ("garbage", with_password(&refusing, "/garbage")),
        ("redirect", with_password(&refusing, "/redirect")),
        ("nowhere", format!("http://user:{password}@127.0.0.1:1/?key={query}")),
        ("nonsense", format!("http://user:{password}@does-not-exist.invalid/?key={query}")),
    ];
    for (id, url) in &urls {
        setup = with_header(setup, id, url);
    }
    refusing.set("/status", Reply::status(500).header("X-Secret", &body));
    refusing.set("/garbage", Reply::json(format!("{{\"secret\":{body}")));
    refusing.set("/redirect", Reply::status(302).header("Location", &format!("http://{body}.example/?key={query}")));
    for format in ["level = \"trace\"\nformat = \"json\"", "level = \"trace\""] {
        let setup = setup.clone().log(format);
        let server = setup.start();
        let mint = |claims: Value| mint_by(json!({ "alg": "HS256", "kid": "k1" }), &jwt, claims);
        let good = mint(json!({ "sub": "u1", "exp": now_s() + 600 }));
        let expired = mint(json!({ "sub": "u1", "exp": now_s() - 600 }));
        let forged = format!("{}x", &good[..good.len() - 1]);
        let mut seen = Vec::new();
        let mut note = |what: &str, text: String| seen.push((what.to_owned(), text));
        let tokens = [&good, &expired, &forged];
        for token in tokens {
            for path in ["good", "status", "garbage", "nowhere", "none", "good?format=xml", "%ff"] {
                let by_header = server.get(&format!("/v1/streams/{path}"), &[bearer(token)]);
                note("an answer", format!("{:?} {}", by_header.headers, by_header.text()));
                let join = if path.contains('?') { '&' } else { '?' };
                let by_query = server.get(&format!("/v1/streams/{path}{join}token={token}"), &[]);
                note("an answer", format!("{:?} {}", by_query.headers, by_query.text()));
                let twice = server.get(&format!("/v1/streams/{path}{join}token={token}&token={token}"), &[]);
                note("an answer", twice.text());
                let cookie = of("Cookie", &format!("restcast_token={token}"));
                let foreign = server.get(&format!("/v1/streams/{path}"), &[cookie, of("Origin", "http://x.example")]);
                note("an answer", foreign.text());
            }
            let protocols = of("Sec-WebSocket-Protocol", &format!("restcast.v1, jwt, {token}"));
            match server.try_ws("/v1/ws", &[protocols]) {
                Ok(mut ws) => {
                    note("an upgrade", format!("{:?}", ws.upgrade));
                    for (id, _) in &urls {
                        ws.send(json!({ "type": "subscribe", "stream": id }));
                    }
                    ws.send(json!({ "type": "auth_update", "token": expired }));
                    ws.send(json!({ "type": "auth_update", "token": forged, "id": 1 }));
                    ws.send(json!({ "type": "auth", "token": good }));
                    ws.send_message(Message::text(format!("{{\"token\":\"{good}\"")));
                    let until = Instant::now() + 500 * MS;
                    while Instant::now() < until {
                        if let Some(heard) = ws.heard_within(50 * MS) {
                            note("a frame", format!("{heard:?}"));
                        }
                    }
                }
                Err(answer) => note("an answer", format!("{:?} {}", answer.headers, answer.text())),
            }
            let mut raw = server.connect();
            raw.send(
                format!("GET /{token} HTTP/1.1\r\nAuthorization: Bearer {token}\r\nBad Header: {token}\r\n\r\n")
                    .as_bytes(),
            );
            note("an answer", raw.answer().text());
            let renewed = renew(&server, "c_none", token);
            note("an answer", renewed.text());
            let renewed = renew(&server, token, token);
            note("an answer", renewed.text());
        }
        for key in [admin.as_str(), "wrong", &good] {
            note("an admin answer", server.admin("GET", "/admin/v1/none", Some(key)).text());
        }
        for id in ["status", "garbage", "nowhere", "nonsense"] {
            server.wait_for_log(id, 1);
        }
        // A file whose errors stand beside its secrets.
        let broken = setup.text().replace("secret = ", "secrets = ").replace("backoff_max", "backof_max");
        server.reload_text(&broken);
        server.reload_text(&setup.text().replace("X-Api-Key", "X Api Key"));
        server.reload_text(&setup.text().replace("kid = \"k1\"", &format!("kid = \"k1\"\nalg = {jwt:?}")));
        server.reload_text(&setup.text().replace("?key=", "{claims.x?key="));
        assert_eq!(server.log_count("was read again"), 0, "{}", server.log_text());
        note("the metrics", server.metrics());
        for command in [&["check"][..], &["serve"]] {
            let file = if command == ["serve"] { setup.clone().limits("nonsense = 1") } else { setup.clone() };
            let (status, out, err) = run(command, &file);
            assert_eq!(status.success(), command == ["check"], "{out}{err}");
            assert!(out.contains("X-Api-Key") || command == ["serve"], "{out}");
            note("a command", out + &err);
        }
        note("the log", server.log_text());
        if format.contains("json") {
            for line in server.log_text().lines() {
                let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
                assert!(line["ts"].is_u64() && line["level"].is_string() && line["message"].is_string(), "{line}");
            }
        }
        let secrets = [&jwt, &admin, &header, &query, &password, &body, &good, &expired, &forged];
        let mut hidden = Vec::new();
        for secret in secrets {
            hidden.push(secret.as_str());
            // Neither a token's signature nor half a secret.
            hidden.push(&secret[secret.len() - 24..]);
        }
        for (what, text) in &seen {
            for secret in &hidden {
                assert!(!text.contains(secret), "{what} holds {secret}:\n{text}");
            }
        }
        let polled = upstream.requests();
        assert!(polled.iter().any(|request| request.header("x-api-key") == Some(header.as_str())), "it was used");
        assert!(polled.iter().any(|request| request.target.contains(&query)), "it was used");
    }
    assert_ne!(jwt, SECRET);
}
