//! What an upstream has said of one URL, that it is to be left alone for a while, outlives a change of the stream.
#![allow(clippy::disallowed_methods, reason = "tests measure how long things take")]

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use support::server::{PATIENCE, Server, Setup, Ws, bearer, eventually, streams, token_of};
use support::{Reply, Upstream};

fn make(server: &Server, body: &Value) {
    let answer = streams(server, "POST", "", body);
    assert_eq!(answer.status, 201, "{answer:?}");
}

fn put(server: &Server, body: &Value) {
    let answer = streams(server, "PUT", "/leads", body);
    assert_eq!(answer.status, 200, "{answer:?}");
}

/// A new watcher, which is told that the upstream wants to be left alone, and for how long still.
fn told(server: &Server) -> (Ws, Duration) {
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&token_of("u1"))]);
    let status = ws.next_of("stream_status");
    assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_RATE_LIMITED")), "{status}");
    (ws, Duration::from_millis(status["retry_in_ms"].as_u64().expect("when")))
}

fn unavailable(rest_s: u64) -> Reply {
    Reply::status(503).header("Retry-After", &rest_s.to_string())
}

#[test]
fn a_url_that_is_to_be_left_alone_is_when_its_stream_is_changed() {
    let upstream = Upstream::start();
    upstream.set("/a", unavailable(3600));
    let asked = || upstream.requests().iter().filter(|request| request.target == "/a").count();
    let server = Setup::new().start();
    let mut body = json!({ "id": "leads", "url": upstream.url("/a"), "interval": "20ms", "headers": { "X-Key": "k" } });
    make(&server, &body);
    let is_left = |left: Duration| assert!((3_000..=3_600).contains(&left.as_secs()), "{left:?}");
    let (mut first, left) = told(&server);
    is_left(left);
    assert_eq!(asked(), 1);
    body["interval"] = json!("30ms");
    put(&server, &body);
    let (mut second, left) = told(&server);
    is_left(left);
    assert_eq!(asked(), 1, "it was to be left alone");
    // And deleted and made again.
    assert_eq!(streams(&server, "DELETE", "/leads", &Value::Null).status, 204);
    assert_eq!((first.closed().0, second.closed().0), (4004, 4004));
    make(&server, &body);
    is_left(told(&server).1);
    assert_eq!(asked(), 1);
}

#[test]
fn a_url_that_was_to_be_left_alone_is_asked_again_when_that_is_over_though_its_stream_was_changed() {
    const REST: Duration = Duration::from_secs(4);
    let upstream = Upstream::start();
    upstream.set("/a", unavailable(REST.as_secs()));
    let server = Setup::new().start();
    let mut body = json!({ "id": "leads", "url": upstream.url("/a"), "interval": "20ms" });
    let begun = Instant::now();
    make(&server, &body);
    drop(told(&server));
    body["interval"] = json!("30ms");
    put(&server, &body);
    let (mut ws, left) = told(&server);
    assert!(left <= REST, "{left:?}");
    upstream.set_json("/a", "1");
    assert_eq!(ws.next_of("snapshot")["data"], json!(1));
    assert!(begun.elapsed() >= REST, "{:?}", begun.elapsed());
}

#[test]
fn another_url_and_another_credential_are_asked_at_once() {
    let upstream = Upstream::start();
    upstream.set("/a", Reply::status(503).header("Retry-After", "3600"));
    upstream.set_json("/b", "2");
    let setup = |url: &str, key: &str| {
        let lines = format!("interval = \"1h\"\nheaders = {{ \"X-Key\" = {key:?} }}");
        Setup::new().stream("leads", &upstream.url(url), &lines)
    };
    let server = setup("/a", "one").start();
    let (mut ws, _) = told(&server);
    let asked = || upstream.requests().iter().filter(|request| request.target == "/a").count();
    assert_eq!(asked(), 1);
    // A reload that changes the credential.
    server.reload(&setup("/a", "two"));
    eventually("it is asked", || (asked() == 2).then_some(()));
    // Back to the one that was told to wait: it waits.
    server.reload(&setup("/a", "one"));
    let left = eventually("it waits", || Some(told(&server).1).filter(|left| *left > Duration::from_secs(3_000)));
    assert!(left <= Duration::from_secs(3_600), "{left:?}");
    assert_eq!(asked(), 2);
    // Another URL.
    server.reload(&setup("/b", "one"));
    let begun = Instant::now();
    assert_eq!(ws.next_of("snapshot")["data"], json!(2));
    assert!(begun.elapsed() < PATIENCE);
}
