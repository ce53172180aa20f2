//! Hooks: an upstream that can call has its change pushed at once.

mod support;

use std::time::{Duration, Instant};

use ring::hmac;
use serde_json::{Value, json};

use support::server::{Answer, DRIVERS, Server, Setup, eventually, now_s, streams, token_of, watching};
use support::{Folder, Gate, Reply, Upstream};

const SECRET: &str = "a secret that the upstream shares with us";

fn sign(secret: &str, t: u64, body: &str) -> String {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), format!("{t}.{body}").as_bytes());
    tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn signature(secret: &str, t: u64, body: &str) -> String {
    format!("t={t},v1={}", sign(secret, t, body))
}

fn hook(server: &Server, id: &str, signature: &str, body: &str) -> Answer {
    let headers = [("X-Restcast-Signature", signature.to_owned())];
    server.request("POST", &format!("/v1/hooks/{id}"), &headers, body)
}

fn setup(upstream: &Upstream, lines: &str) -> Setup {
    Setup::new().stream("slow", &upstream.url("/a"), &format!("interval = \"1h\"\nhook_secret = {SECRET:?}\n{lines}"))
}

#[test]
fn a_signed_hook_polls_at_once() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/a", "1");
        let server = setup(&upstream, "").driver(driver).start();
        let mut ws = watching(&server, &token_of("u1"), "/v1/streams/slow");
        for n in 2..6 {
            upstream.set_json("/a", &n.to_string());
            let body = format!("{{\"changed\":{n}}}");
            let answer = hook(&server, "slow", &signature(SECRET, now_s(), &body), &body);
            assert_eq!((answer.status, answer.body.len()), (202, 0), "{answer:?}");
            assert_eq!(ws.next_of("snapshot")["data"], json!(n));
        }
        // The body may be in chunks, or none; the id percent-encoded.
        upstream.set_json("/a", "7");
        assert_eq!(hook(&server, "%73low", &signature(SECRET, now_s(), ""), "").status, 202);
        assert_eq!(ws.next_of("snapshot")["data"], json!(7));
        assert!(!server.log_text().contains(SECRET));
    }
}

#[test]
fn a_hook_that_proves_nothing_polls_nothing_and_counts_as_a_failed_credential() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = setup(&upstream, "").stream("plain", &upstream.url("/b"), "").start();
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/slow");
    let polls = upstream.request_count();
    let good = signature(SECRET, now_s(), "x");
    for (wrong, body) in [
        (signature("another secret", now_s(), "x"), "x"),
        (good.clone(), "y"),
        (good.replace("v1=", "v2="), "x"),
        (good.replace("t=", "t=0"), "x"),
        (signature(SECRET, now_s() - 301, "x"), "x"),
        (signature(SECRET, now_s() + 310, "x"), "x"),
        ("nonsense".to_owned(), "x"),
        (format!("{good},{}", "x=".repeat(1_000)), "x"),
    ] {
        let answer = hook(&server, "slow", &wrong, body);
        assert_eq!((answer.status, answer.code()), (401, "INVALID_TOKEN".to_owned()), "{wrong}");
    }
    let none = server.request("POST", "/v1/hooks/slow", &[], "x");
    assert_eq!((none.status, none.code()), (401, "MISSING_CREDENTIAL".to_owned()));
    let twice = [("X-Restcast-Signature", good.clone()), ("X-Restcast-Signature", good.clone())];
    assert_eq!(server.request("POST", "/v1/hooks/slow", &twice, "x").status, 400);
    for id in ["plain", "nowhere", "a%20b", "%ff"] {
        let answer = hook(&server, id, &good, "x");
        assert_eq!((answer.status, answer.code()), (401, "INVALID_TOKEN".to_owned()), "{id}");
    }
    let answer = server.get("/v1/hooks/slow", &[]);
    assert_eq!((answer.status, answer.header("allow")), (405, Some("POST, OPTIONS")));
    assert_eq!(hook(&server, "slow", &good, &"x".repeat(100_000)).status, 413);
    assert!(ws.is_quiet_for(Duration::from_millis(200)));
    assert_eq!(upstream.request_count(), polls, "nothing was polled");
    for (result, count) in [("unsigned", 3), ("malformed", 4), ("out_of_time", 2), ("unknown", 4), ("ok", 0)] {
        let label = format!("result=\"{result}\"");
        assert_eq!(server.metric(&["restcast_hooks_total", &label]) as u64, count, "{result}");
    }
    assert_eq!(hook(&server, "slow", &good, "x").status, 202);

    let server = setup(&upstream, "").limits("auth_failures_per_minute = 3").start();
    let wrong = signature("another secret", now_s(), "x");
    let statuses: Vec<u16> = (0..8).map(|_| hook(&server, "slow", &wrong, "x").status).collect();
    assert_eq!((&statuses[..3], statuses[7]), (&[401; 3][..], 429), "{statuses:?}");
    assert_eq!(hook(&server, "slow", &signature(SECRET, now_s(), "x"), "x").status, 429, "nor is a good one looked at");
    let server = setup(&upstream, "").limits("auth_failures_per_minute = 3").start();
    let statuses: Vec<u16> = (0..8).map(|_| hook(&server, "nowhere", &wrong, "x").status).collect();
    assert_eq!((&statuses[..3], statuses[7]), (&[401; 3][..], 429), "who asks around counts as well: {statuses:?}");
}

#[test]
fn nobody_is_told_which_streams_there_are() {
    let upstream = Upstream::start();
    let server = setup(&upstream, "").stream("plain", &upstream.url("/b"), "").start();
    let good = signature(SECRET, now_s(), "x");
    // The answers are those of one that has a hook, whatever is sent.
    let asked = |id: &str, headers: &[(&str, String)], body: &str| {
        let answer = server.request("POST", &format!("/v1/hooks/{id}"), headers, body);
        let mut headers = answer.headers.clone();
        headers.retain(|(name, _)| !name.eq_ignore_ascii_case("date"));
        (answer.status, headers, answer.text())
    };
    let signed = |by: &str| ("X-Restcast-Signature", by.to_owned());
    let unsigned = signature("", now_s(), "x");
    for (headers, body) in [
        (vec![], "x"),
        (vec![signed(&signature("another secret", now_s(), "x"))], "x"),
        (vec![signed(&unsigned)], "x"),
        (vec![signed("nonsense")], "x"),
        (vec![signed(&"x=".repeat(1_000))], "x"),
        (vec![signed(&signature(SECRET, now_s() - 400, "x"))], "x"),
        (vec![signed(&good), signed(&good)], "x"),
        (vec![signed(&unsigned)], &*"x".repeat(100_000)),
    ] {
        let known = asked("slow", &headers, body);
        assert_ne!(known.0, 404);
        for id in ["plain", "nowhere", "a%20b", "%ff"] {
            assert_eq!(asked(id, &headers, body), known, "{id} {headers:?}");
        }
    }
}

#[test]
fn a_secret_in_a_file_that_is_replaced_verifies_the_next_hook() {
    let folder = Folder::new("hooks");
    let (old, new) = ("the old secret, in a file", "the new secret, in a file");
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let source = format!("file:{}", folder.put("secret", old));
    let server = Setup::new()
        .stream("slow", &upstream.url("/a"), &format!("interval = \"1h\"\nhook_secret = {source:?}"))
        .start();
    let body = json!({ "id": "made", "url": upstream.url("/a"), "interval": "1h", "hook_secret": [source, SECRET] });
    let made = streams(&server, "POST", "", &body);
    assert_eq!(made.status, 201, "{made:?}");
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/slow");
    let by = |id: &str, secret: &str, body: &str| hook(&server, id, &signature(secret, now_s(), body), body).status;
    for id in ["slow", "made"] {
        assert_eq!((by(id, old, "1"), by(id, new, "1")), (202, 401), "{id}");
    }
    folder.put("secret", new);
    for id in ["slow", "made"] {
        eventually("the new one is in force", || (by(id, new, "2") == 202).then_some(()));
        assert_eq!(by(id, old, "3"), 401, "{id}");
    }
    assert_eq!(by("made", SECRET, "4"), 202, "the other of the two is what it was");
    // Who watches has noticed nothing.
    assert!(ws.is_quiet_for(Duration::from_millis(200)));
    assert!(!server.log_text().contains(new) && !server.log_text().contains(old));
}

#[test]
fn secrets_rotate_without_a_hook_refused() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let (old, new) = ("the old secret of the hooks", "the new secret of the hooks");
    let of = |secrets: &str| {
        Setup::new().stream("slow", &upstream.url("/a"), &format!("interval = \"1h\"\nhook_secret = {secrets}"))
    };
    let server = of(&format!("{old:?}")).start();
    let by = |secret: &str, body: &str| hook(&server, "slow", &signature(secret, now_s(), body), body).status;
    assert_eq!((by(old, "1"), by(new, "1")), (202, 401));
    server.reload(&of(&format!("[{new:?}, {old:?}]")));
    eventually("both are in force", || (by(new, "2") == 202).then_some(()));
    assert_eq!(by(old, "3"), 202);
    let t = now_s();
    let both = format!("t={t},v1={},v1={}", sign(old, t, "4"), sign(new, t, "4"));
    assert_eq!(hook(&server, "slow", &both, "4").status, 202);
    server.reload(&of(&format!("{new:?}")));
    eventually("the old one is gone", || (by(old, "5") == 401).then_some(()));
    let t = now_s();
    let both = format!("t={t},v1={},v1={}", sign(old, t, "6"), sign(new, t, "6"));
    assert_eq!(hook(&server, "slow", &both, "6").status, 202);
}

#[test]
fn many_hooks_at_once_are_one_poll_under_way_and_one_after_it() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = setup(&upstream, "timeout = \"60s\"").start();
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/slow");
    let before = upstream.request_count();
    let gate = Gate::default();
    upstream.once("/a", Reply::json("2").behind(&gate));
    upstream.set_json("/a", "3");
    assert_eq!(hook(&server, "slow", &signature(SECRET, now_s(), "first"), "first").status, 202);
    upstream.wait_for_requests(before + 1, support::server::PATIENCE);
    for n in 0..100 {
        let body = n.to_string();
        assert_eq!(hook(&server, "slow", &signature(SECRET, now_s(), &body), &body).status, 202);
    }
    gate.open();
    assert_eq!(ws.next_of("snapshot")["data"], json!(2));
    assert_eq!(ws.next_of("snapshot")["data"], json!(3));
    assert!(ws.is_quiet_for(Duration::from_millis(500)));
    assert_eq!(upstream.request_count(), before + 2, "a hundred hooks came during one poll");

    // However many come afterwards, polls are a tenth of a second apart.
    let (begun, before) = (Instant::now(), upstream.request_count());
    let mut hooks = 0;
    while begun.elapsed() < Duration::from_secs(1) {
        let body = format!("then {hooks}");
        assert_eq!(hook(&server, "slow", &signature(SECRET, now_s(), &body), &body).status, 202);
        hooks += 1;
    }
    let polls = upstream.request_count() - before;
    let most = usize::try_from(begun.elapsed().as_millis() / 100).expect("small") + 2;
    assert!(polls <= most, "{polls} polls");
}

#[test]
fn a_stopped_stream_is_not_polled_by_a_hook() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = setup(&upstream, "").start();
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/slow");
    let order = |what: &str| {
        assert_eq!(streams(&server, "POST", &format!("/slow/{what}"), &Value::Null).status, 200);
    };
    order("stop");
    assert_eq!(ws.next_of("stream_status")["code"], "STOPPED");
    let before = upstream.request_count();
    assert_eq!(hook(&server, "slow", &signature(SECRET, now_s(), "x"), "x").status, 204);
    assert!(ws.is_quiet_for(Duration::from_millis(300)));
    assert_eq!(server.metric(&["restcast_hooks_total{result=\"stopped\"}"]) as u64, 1);
    assert_eq!(upstream.request_count(), before);
    order("start");
    assert_eq!(ws.next_of("stream_status")["state"], "live");
}

#[test]
fn a_stream_that_is_made_has_its_hook_at_once() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = Setup::new().start();
    let body = json!({ "id": "made", "url": upstream.url("/a"), "interval": "1h", "hook_secret": SECRET });
    assert_eq!(hook(&server, "made", &signature(SECRET, now_s(), ""), "").status, 401);
    assert_eq!(streams(&server, "POST", "", &body).status, 201);
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/made");
    upstream.set_json("/a", "2");
    assert_eq!(hook(&server, "made", &signature(SECRET, now_s(), ""), "").status, 202);
    assert_eq!(ws.next_of("snapshot")["data"], json!(2));
    assert_eq!(streams(&server, "DELETE", "/made", &Value::Null).status, 204);
    eventually("the hook is gone", || {
        (hook(&server, "made", &signature(SECRET, now_s(), ""), "").status == 401).then_some(())
    });
}
