//! A stream that is stopped, reloaded or changed is one and the same to its upstream: it has one request at a time of it.
#![cfg(feature = "runtime")]
#![allow(clippy::disallowed_methods, reason = "tests measure how long things take")]

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use support::server::{PATIENCE, Server, Setup, Ws, bearer, eventually, streams, token_of};
use support::{Reply, Upstream};

/// How long the upstream takes for each answer.
const SLOW: Duration = Duration::from_secs(3);
/// Less than that, for the threads that note when a request came.
const APART: Duration = Duration::from_millis(2_900);
const ROUNDS: u32 = 20;

fn watch(server: &Server, stream: &str) -> Ws {
    let mut ws = server.ws(&format!("/v1/streams/{stream}"), &[bearer(&token_of("u1"))]);
    assert_eq!(ws.next()["type"], "welcome");
    ws
}

/// When there were requests for `path`.
fn asked(upstream: &Upstream, path: &str) -> Vec<Instant> {
    upstream.requests().iter().filter(|seen| seen.target == path).map(|seen| seen.at).collect()
}

/// The value in the next snapshot that `is` it, however many others come before.
fn until(ws: &mut Ws, is: &Value) {
    let deadline = Instant::now() + PATIENCE;
    while ws.next_of("snapshot")["data"] != *is {
        assert!(Instant::now() < deadline, "{is} never comes");
    }
}

#[test]
fn a_slow_upstream_has_one_request_at_a_time_of_a_stream_that_is_stopped_reloaded_and_changed() {
    let upstream = Upstream::start();
    let url = |path: &str| upstream.url(path);
    let paths = ["/stopped", "/reloaded", "/changed", "/made"];
    for path in paths {
        upstream.set(path, Reply::json("\"slow\"").delay(SLOW));
    }
    let setup = |backoff_s: u32| {
        let lines = format!("interval = \"200ms\"\nbackoff_max = \"{backoff_s}s\"");
        Setup::new().stream("stopped", &url("/stopped"), "interval = \"200ms\"").stream(
            "reloaded",
            &url("/reloaded"),
            &lines,
        )
    };
    let server = setup(60).start();
    let body = |id: &str, round: u32| json!({ "id": id, "url": url(&format!("/{id}")), "interval": "200ms", "ignore": [format!("/{round}")] });
    for id in ["changed", "made"] {
        assert_eq!(streams(&server, "POST", "", &body(id, 0)).status, 201);
    }
    let mut watchers = ["stopped", "reloaded", "changed"].map(|stream| watch(&server, stream));
    let mut made = watch(&server, "made");
    eventually("each is asked", || paths.iter().all(|path| !asked(&upstream, path).is_empty()).then_some(()));
    for round in 1..=ROUNDS {
        assert_eq!(streams(&server, "POST", "/stopped/stop", &Value::Null).status, 200);
        assert_eq!(streams(&server, "POST", "/stopped/start", &Value::Null).status, 200);
        server.reload(&setup(60 + round));
        assert_eq!(streams(&server, "PUT", "/changed", &body("changed", round)).status, 200);
        assert_eq!(streams(&server, "DELETE", "/made", &Value::Null).status, 204);
        assert_eq!(made.closed(), (4004, "stream_ended".to_owned()));
        assert_eq!(streams(&server, "POST", "", &body("made", round)).status, 201);
        made = watch(&server, "made");
    }
    // It goes on, and what is told then is the upstream's value of then.
    let before = paths.map(|path| asked(&upstream, path).len());
    for (path, before) in paths.iter().zip(before) {
        eventually("another request", || (asked(&upstream, path).len() > before).then_some(()));
        upstream.set_json(path, "\"quick\"");
    }
    for ws in watchers.iter_mut().chain([&mut made]) {
        until(ws, &json!("quick"));
    }
    for path in paths {
        // The first two at least were answered slowly.
        let gaps: Vec<Duration> = asked(&upstream, path).windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().take(2).all(|gap| *gap >= APART), "{path}: {gaps:?}");
    }
}

#[test]
fn changes_of_a_stream_come_to_its_upstream_once_a_second_at_most() {
    let upstream = Upstream::start();
    upstream.set_json("/changed", "1");
    upstream.set_json("/started", "1");
    let server = Setup::new().stream("started", &upstream.url("/started"), "interval = \"1h\"").start();
    let body = |round: u32| json!({ "id": "changed", "url": upstream.url("/changed"), "interval": "1h", "ignore": [format!("/{round}")] });
    assert_eq!(streams(&server, "POST", "", &body(0)).status, 201);
    let mut watchers = ["changed", "started"].map(|stream| watch(&server, stream));
    watchers.iter_mut().for_each(|ws| assert_eq!(ws.next_of("snapshot")["data"], 1));
    for round in 1..=ROUNDS {
        if round == ROUNDS {
            ["/changed", "/started"].iter().for_each(|path| upstream.set_json(path, "2"));
        }
        assert_eq!(streams(&server, "PUT", "/changed", &body(round)).status, 200);
        assert_eq!(streams(&server, "POST", "/started/stop", &Value::Null).status, 200);
        assert_eq!(streams(&server, "POST", "/started/start", &Value::Null).status, 200);
    }
    // And then it is asked, and no hour later: those who watch are shown what it is now.
    for (path, ws) in ["/changed", "/started"].into_iter().zip(&mut watchers) {
        until(ws, &json!(2));
        let seen = asked(&upstream, path);
        let gaps: Vec<Duration> = seen.windows(2).map(|pair| pair[1] - pair[0]).collect();
        // Less than a second, for the threads that note when a request came.
        assert!(gaps.iter().all(|gap| *gap >= Duration::from_millis(500)), "{path}: {gaps:?}");
    }
}

#[test]
fn a_stream_that_was_evicted_keeps_to_what_its_upstream_has_asked_for() {
    let upstream = Upstream::start();
    let count = 8;
    for n in 0..count {
        // A gateway says so with any status.
        let status = [500, 502, 503, 504, 404, 403, 401, 429][n];
        upstream.set(&format!("/q{n}"), Reply::status(status).header("Retry-After", "120"));
    }
    upstream.set_json("/well", "1");
    let mut setup = Setup::new().limits("streams = 3").stream("well", &upstream.url("/well"), "linger = \"1ms\"");
    for n in 0..count {
        // With keys of their own, or a 429 would hold all of them.
        let lines = format!("interval = \"50ms\"\nlinger = \"1ms\"\nheaders = {{ \"X-Key\" = \"k{n}\" }}");
        setup = setup.stream(&format!("q{n}"), &upstream.url(&format!("/q{n}")), &lines);
    }
    let server = setup.start();
    // Those before may be lingering yet, all of them on another core.
    let get = |path: &str| {
        eventually("there is place", || {
            let answer = server.get(path, &[bearer(&token_of("u1"))]);
            (answer.status == 200 || answer.code() != "TOO_MANY_STREAMS").then_some(answer)
        })
    };
    for _ in 0..3 {
        for n in 0..count {
            let answer = get(&format!("/v1/streams/q{n}"));
            assert_eq!(answer.status, 503, "{n}: {answer:?}");
            let wait: u64 = answer.header("retry-after").expect("when").parse().expect("seconds");
            assert!((60..=121).contains(&wait), "{n}: {wait}, {answer:?}");
        }
        assert_eq!(get("/v1/streams/well").status, 200);
    }
    for n in 0..count {
        assert_eq!(asked(&upstream, &format!("/q{n}")).len(), 1, "/q{n}");
    }
}
