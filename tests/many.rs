//! Many streams of one upstream against the built server: spread polls, and none is forgotten.
#![cfg(feature = "runtime")]
#![allow(clippy::disallowed_methods)]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;

use support::Upstream;
use support::server::{DRIVERS, PATIENCE, Server, Setup};
use watcher::Watcher;

const STREAMS: usize = 300;

fn setup(upstream: &Upstream, interval: &str) -> Setup {
    let mut setup = Setup::new().limits("subscriptions_per_connection = 100\nmessages_per_second = 1000");
    for n in 0..STREAMS {
        upstream.set_json(&format!("/s{n}"), &format!("[{n}]"));
        setup = setup.stream(&format!("s{n}"), &upstream.url(&format!("/s{n}")), &format!("interval = \"{interval}\""));
    }
    setup
}

/// Three connections that hold a hundred streams each, every first value read.
fn watch_all(server: &Server) -> Vec<Watcher> {
    (0..STREAMS)
        .step_by(100)
        .map(|first| {
            let mut ws = Watcher::ws(server, "/v1/ws");
            for n in first..first + 100 {
                ws.send(&json!({"type":"subscribe","stream":format!("s{n}"),"id":n}).to_string());
            }
            let mut known = 0;
            while known < 100 {
                let frame = ws.next();
                match &*frame.kind() {
                    "subscribed" => {}
                    "snapshot" => {
                        watcher::check_form(&frame);
                        assert_eq!(frame.member("data"), format!("[{}]", &frame.stream()[1..]));
                        known += 1;
                    }
                    _ => panic!("{}", frame.text),
                }
            }
            ws
        })
        .collect()
}

#[test]
fn three_hundred_streams_of_one_upstream_all_deliver() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = setup(&upstream, "500ms").driver(driver).start();
        let mut watchers = watch_all(&server);
        assert_eq!(server.metric(&["restcast_streams"]), STREAMS as f64);
        // One too many for a connection.
        watchers[0].send(r#"{"type":"subscribe","stream":"s299"}"#);
        assert_eq!(watchers[0].next_of("error").json()["code"], "TOO_MANY_SUBSCRIPTIONS");
        for n in 0..STREAMS {
            upstream.set_json(&format!("/s{n}"), &format!("[{n},2]"));
        }
        for watcher in &mut watchers {
            let mut seen: HashMap<String, String> = HashMap::new();
            for _ in 0..100 {
                let frame = watcher.next_of("snapshot");
                assert_eq!(frame.seq(), 2);
                seen.insert(frame.stream(), frame.member("data"));
            }
            assert_eq!(seen.len(), 100, "each of them once");
            assert!(seen.iter().all(|(stream, data)| *data == format!("[{},2]", &stream[1..])), "{seen:?}");
        }
    }
}

#[test]
fn polls_of_many_streams_are_spread_over_the_interval() {
    const INTERVAL: Duration = Duration::from_secs(3);
    const PARTS: usize = 10;
    let upstream = Upstream::start();
    let server = setup(&upstream, "3s").start();
    let _watchers = watch_all(&server);
    // The first polls are at once, and so together; those that follow keep to each stream's own phase.
    upstream.wait_for_requests(STREAMS * 4, PATIENCE);
    let mut polls: HashMap<String, Vec<std::time::Instant>> = HashMap::new();
    for seen in upstream.requests() {
        polls.entry(seen.target).or_default().push(seen.at);
    }
    assert_eq!(polls.len(), STREAMS);
    let begun = polls.values().map(|at| at[0]).min().expect("there are some");
    let mut parts = [0usize; PARTS];
    for at in polls.values() {
        assert!(at.len() >= 3, "each is polled as often as the others");
        let phase = (at[2] - begun).as_micros() % INTERVAL.as_micros();
        parts[usize::try_from(phase * PARTS as u128 / INTERVAL.as_micros()).expect("small")] += 1;
    }
    let most = parts.iter().max().expect("there are some");
    assert!(*most <= STREAMS * 4 / 10, "polls come in a heap: {parts:?}");
    assert!(parts.iter().filter(|&&part| part > 0).count() >= PARTS - 2, "the whole interval is used: {parts:?}");
}

#[test]
fn there_are_as_many_streams_as_the_limit_allows() {
    let upstream = Upstream::start();
    for name in ["a", "b", "c"] {
        upstream.set_json(&format!("/{name}"), "[1]");
    }
    let server = Setup::new()
        .cores(1)
        .limits("streams = 2")
        .stream("any", &upstream.url("/{query.name}"), "params = [\"name\"]\nlinger = \"1h\"")
        .start();
    let path = |name: &str| format!("/v1/streams/any?name={name}");
    let mut a = Watcher::ws(&server, &path("a"));
    let mut b = Watcher::sse(&server, &path("b"));
    a.event();
    b.event();
    let mut c = Watcher::ws(&server, "/v1/ws");
    c.send(r#"{"type":"subscribe","stream":"any?name=c"}"#);
    c.next_of("subscribed");
    assert_eq!(c.next_of("error").json()["code"], "TOO_MANY_STREAMS");
    let answer = server.get(&path("c"), &[support::server::bearer(&support::server::token_of("u1"))]);
    assert_eq!((answer.status, &*answer.code()), (503, "TOO_MANY_STREAMS"));
    assert!(answer.header("retry-after").is_some());
    // One that only lingers makes place.
    drop(b);
    let mut c = support::server::eventually("b is let go of", || {
        let mut c = Watcher::ws(&server, &path("c"));
        (c.next().kind() == "snapshot").then_some(c)
    });
    upstream.set_json("/c", "[2]");
    assert_eq!(c.next_of("snapshot").seq(), 2);
    upstream.set_json("/a", "[2]");
    assert_eq!(a.event().seq(), 2, "those that are watched stay");
}
