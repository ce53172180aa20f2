//! Streams against the built server: one poller for all, the three representations, what frames hold and in which order.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use support::server::{Answer, DRIVERS, Server, Setup, bearer, eventually, now_us, token_of};
use support::{Reply, Step, Upstream};
use watcher::{Frame, Over, Watcher, canonical, on_core, polled, polls_end, requests_for};

const LEADS: &str = "/v1/streams/leads";
const INTERVAL: Duration = Duration::from_millis(50);

fn get(server: &Server, path: &str, headers: &[(&str, &str)]) -> Answer {
    let mut all = vec![bearer(&token_of("u1"))];
    all.extend(headers.iter().map(|(name, value)| (*name, (*value).to_owned())));
    server.get(path, &all)
}

/// A value that is long enough for a change of `n` to be a delta.
fn leads(n: u32) -> String {
    format!(r#"{{"n":{n},"rest":"{}"}}"#, "x".repeat(200))
}

/// A server of the one stream `leads`.
fn of_leads(upstream: &Upstream, driver: &str, lines: &str) -> Server {
    Setup::new().driver(driver).stream("leads", &upstream.url("/leads"), lines).start()
}

// Polling.

#[test]
fn fifty_watchers_on_both_cores_cost_one_poller_and_get_the_same_bytes() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/leads", &leads(1));
        let server = of_leads(&upstream, driver, "interval = \"50ms\"");
        let mut sockets: Vec<Watcher> = (0..2).map(|core| on_core(&server, core, |s| Watcher::ws(s, LEADS))).collect();
        sockets.extend((2..25).map(|_| Watcher::ws(&server, LEADS)));
        let mut events: Vec<Watcher> = (0..2).map(|core| on_core(&server, core, |s| Watcher::sse(s, LEADS))).collect();
        events.extend((2..15).map(|_| Watcher::sse(&server, LEADS)));
        for watcher in sockets.iter_mut().chain(&mut events) {
            assert_eq!(watcher.event().seq(), 1);
        }
        let etag = get(&server, LEADS, &[]).header("etag").expect("an ETag").to_owned();
        std::thread::scope(|scope| {
            let waits: Vec<_> = (0..10)
                .map(|_| {
                    let (server, etag) = (&server, &*etag);
                    scope.spawn(move || get(server, LEADS, &[("If-None-Match", etag), ("Prefer", "wait=60")]))
                })
                .collect();
            eventually("all wait", || (server.metric(&["restcast_connections{", "json"]) >= 10.0).then_some(()));
            upstream.wait_for_requests(20, 2 * support::server::PATIENCE);
            upstream.set_json("/leads", &leads(2));
            for wait in waits {
                let answer = wait.join().expect("no panic");
                assert_eq!((answer.status, answer.text()), (200, leads(2)));
            }
        });
        let over_ws: Vec<Frame> = sockets.iter_mut().map(|watcher| watcher.event()).collect();
        let over_sse: Vec<Frame> = events.iter_mut().map(|watcher| watcher.event()).collect();
        assert_eq!((&*over_ws[0].kind(), over_ws[0].seq()), ("patch", 2));
        assert!(over_ws.iter().all(|frame| *frame == over_ws[0]), "{over_ws:?}");
        assert!(over_sse.iter().all(|frame| *frame == over_sse[0]), "{over_sse:?}");
        assert_eq!(over_ws[0].text, over_sse[0].text);

        let seen = upstream.requests();
        assert_eq!(upstream.connection_count(), 1, "one poller has one connection");
        let took = seen[seen.len() - 1].at - seen[0].at;
        let most = took.as_millis() / INTERVAL.as_millis() + 2;
        assert!(seen.len() as u128 <= most, "{} requests in {took:?}", seen.len());
    }
}

#[test]
fn polling_begins_with_the_first_watcher_and_ends_after_linger() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/leads", &leads(1));
        upstream.set_json("/warm", &leads(1));
        let server = Setup::new()
            .driver(driver)
            .stream("leads", &upstream.url("/leads"), "linger = \"600ms\"")
            .stream("warm", &upstream.url("/warm"), "linger = \"1ms\"\nkeep_warm = true")
            .start();
        polled(&upstream, "/warm");
        assert_eq!(requests_for(&upstream, "/leads").len(), 0, "nobody watches it");
        let mut first = Watcher::ws(&server, LEADS);
        let mut second = Watcher::sse(&server, LEADS);
        let mut warm = Watcher::ws(&server, "/v1/streams/warm");
        for watcher in [&mut first, &mut second, &mut warm] {
            watcher.event();
        }
        drop((first, warm));
        polled(&upstream, "/leads");
        polled(&upstream, "/leads");
        let left = Instant::now();
        drop(second);
        polls_end(&upstream, "/leads", Duration::from_millis(500));
        let last = requests_for(&upstream, "/leads").last().expect("it was polled").at;
        assert!(last >= left + Duration::from_millis(300), "it lingers, {:?}", last - left);
        assert!(last <= left + Duration::from_secs(3), "it ends, {:?}", last - left);
        polled(&upstream, "/warm");
        // What is gone from polling is still held: whoever comes gets it, and it is polled at once.
        let polls = requests_for(&upstream, "/leads").len();
        assert_eq!(Watcher::ws(&server, LEADS).event().seq(), 1);
        eventually("it is polled again", || (requests_for(&upstream, "/leads").len() > polls).then_some(()));
    }
}

#[test]
fn the_first_poll_is_at_once_whatever_the_interval() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", &leads(1));
    let server = of_leads(&upstream, "auto", "interval = \"1h\"\nlinger = \"1ms\"");
    let mut watcher = Watcher::ws(&server, LEADS);
    assert_eq!(watcher.event().seq(), 1);
    // A value from before may be old: JSON waits for the poll that comes with its own watching. Where polling still
    // lingers there is none to come, and so no second request either.
    drop(watcher);
    eventually("nobody watches", || (server.metric(&["restcast_subscriptions"]) == 0.0).then_some(()));
    upstream.set_json("/leads", &leads(2));
    let answer = eventually("polling is over, and begins again", || {
        let answer = get(&server, LEADS, &[]);
        assert!(answer.text() != leads(1) || upstream.request_count() == 1, "an old value while it is being polled");
        (answer.text() != leads(1)).then_some(answer)
    });
    assert_eq!(answer.text(), leads(2));
    assert_eq!(upstream.request_count(), 2);
}

#[test]
fn upstream_requests_are_conditional_and_304_is_no_event() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", &leads(1));
    let server = of_leads(&upstream, "auto", "");
    let mut watcher = Watcher::ws(&server, LEADS);
    watcher.event();
    polled(&upstream, "/leads");
    let seen = requests_for(&upstream, "/leads");
    assert_eq!(seen[0].header("if-none-match"), None);
    assert_eq!(seen[1].header("if-none-match"), Some("\"v1\""));
    assert!(upstream.not_modified_count() >= 1);
    upstream.set_json("/leads", &leads(2));
    assert_eq!(watcher.event().seq(), 2, "what was not modified made no event");
    polled(&upstream, "/leads");
    let seen = requests_for(&upstream, "/leads");
    assert_eq!(seen[seen.len() - 1].header("if-none-match"), Some("\"v2\""));
}

#[test]
fn the_same_value_in_another_form_is_no_event_but_another_spelling_of_a_number_is() {
    let upstream = Upstream::start();
    let server = of_leads(&upstream, "auto", "");
    upstream.set("/leads", Reply::json(r#"{"a":1.0,"b":[1E5,12345678901234567890,-0]}"#));
    let mut watcher = Watcher::ws(&server, LEADS);
    let first = watcher.event();
    assert_eq!(first.member("data"), r#"{"a":1.0,"b":[1E5,12345678901234567890,-0]}"#);
    for same in [
        r#"{"a":1.0,"b":[1E5,12345678901234567890,-0]}"#,
        " {\n  \"b\" : [1E5, 12345678901234567890, -0 ],\t\"a\" : 1.0 }\r\n",
        r#"{"\u0061":1.0,"b":[1E5,12345678901234567890,-0]}"#,
    ] {
        upstream.set("/leads", Reply::json(same));
        polled(&upstream, "/leads");
    }
    upstream.set("/leads", Reply::json(r#"{"a":1.00,"b":[1E5,12345678901234567890,-0]}"#));
    let next = watcher.event();
    assert_eq!(next.seq(), 2, "the same in another form is no event");
    assert_eq!(watcher.value("leads"), r#"{"a":1.00,"b":[1E5,12345678901234567890,-0]}"#);
    assert_eq!(canonical(&get(&server, LEADS, &[]).text()), watcher.value("leads"));
}

// JSON.

#[test]
fn the_json_representation_has_an_etag_that_names_the_event() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "{ \"a\" : 1E5, \"b\":[1.0] }");
        let server = of_leads(&upstream, driver, "");
        let answer = get(&server, LEADS, &[]);
        assert_eq!((answer.status, &*answer.text()), (200, r#"{"a":1E5,"b":[1.0]}"#));
        for (name, value) in [
            ("content-type", "application/json"),
            ("cache-control", "private, no-cache"),
            ("vary", "Accept, Authorization, Cookie, Origin"),
            ("x-content-type-options", "nosniff"),
        ] {
            assert_eq!(answer.header(name), Some(value), "{name}");
        }
        for absent in ["x-restcast-state", "preference-applied"] {
            assert_eq!(answer.header(absent), None, "{absent}");
        }
        let etag = answer.header("etag").expect("an ETag").to_owned();
        let mut watcher = Watcher::ws(&server, LEADS);
        assert_eq!(etag, format!("\"{}\"", watcher.event().point()));

        let head = server.request("HEAD", LEADS, &[bearer(&token_of("u1"))], "");
        assert_eq!((head.status, head.header("etag"), head.header("content-length")), (200, Some(&*etag), Some("19")));
        for same in [&*etag, &format!("W/{etag}"), &format!("\"x\", {etag}"), "*"] {
            let answer = get(&server, LEADS, &[("If-None-Match", same)]);
            assert_eq!((answer.status, answer.header("etag")), (304, Some(&*etag)), "{same}");
            assert_eq!(answer.header("cache-control"), Some("private, no-cache"));
        }
        // Without `If-None-Match` there is nothing to wait for.
        let answer = get(&server, LEADS, &[("Prefer", "wait=60")]);
        assert_eq!((answer.status, answer.header("preference-applied")), (200, None));
        let answer = get(&server, LEADS, &[("If-None-Match", "\"other-1\""), ("Prefer", "wait=60")]);
        assert_eq!(answer.status, 200);

        upstream.set_json("/leads", "[2]");
        let next = watcher.event();
        let answer = get(&server, LEADS, &[("If-None-Match", &etag)]);
        assert_eq!((answer.status, &*answer.text()), (200, "[2]"));
        assert_eq!(answer.header("etag"), Some(&*format!("\"{}\"", next.point())));
        assert_eq!((next.epoch(), next.seq()), (watcher.holding("leads").epoch.clone(), 2));
    }
}

#[test]
fn a_poll_that_prefers_to_wait_ends_with_the_change_or_its_time() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "[1]");
        let server = of_leads(&upstream, driver, "");
        let etag = get(&server, LEADS, &[]).header("etag").expect("an ETag").to_owned();
        let begun = Instant::now();
        let answer = get(&server, LEADS, &[("If-None-Match", &etag), ("Prefer", "wait=1")]);
        let took = begun.elapsed();
        assert_eq!((answer.status, answer.header("preference-applied")), (304, Some("wait=1")));
        assert_eq!(answer.header("etag"), Some(&*etag));
        assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(10), "{took:?}");

        let seen = std::thread::scope(|scope| {
            let waits = ["wait=30", "wait=100000", "respond-async, wait=\"30\""].map(|prefer| {
                let (server, etag) = (&server, &etag);
                scope.spawn(move || get(server, LEADS, &[("If-None-Match", etag), ("Prefer", prefer)]))
            });
            eventually("all wait", || (server.metric(&["restcast_connections{", "json"]) >= 3.0).then_some(()));
            polled(&upstream, "/leads");
            upstream.set_json("/leads", "[2]");
            waits.map(|wait| wait.join().expect("no panic"))
        });
        for (answer, applied) in seen.iter().zip(["wait=30", "wait=60", "wait=30"]) {
            assert_eq!((answer.status, &*answer.text()), (200, "[2]"));
            assert_eq!(answer.header("preference-applied"), Some(applied));
        }
        assert!(begun.elapsed() < Duration::from_secs(28), "the change ended them, not their time");
    }
}

#[test]
fn a_cold_stream_is_waited_for_and_a_failing_one_is_unavailable() {
    let upstream = Upstream::start();
    upstream.set("/slow", Reply::json("[1]").delay(Duration::from_millis(500)));
    upstream.set("/down", Reply::status(500));
    upstream.set("/stalled", Reply::steps(vec![Step::Stall]));
    let server = Setup::new()
        .stream("slow", &upstream.url("/slow"), "")
        .stream("down", &upstream.url("/down"), "interval = \"1h\"")
        .stream("stalled", &upstream.url("/stalled"), "timeout = \"1s\"\nfirst_byte_timeout = \"1s\"")
        .start();
    let begun = Instant::now();
    let answer = get(&server, "/v1/streams/slow", &[]);
    assert_eq!((answer.status, &*answer.text()), (200, "[1]"));
    assert!(begun.elapsed() >= Duration::from_millis(500));

    let answer = get(&server, "/v1/streams/down", &[]);
    assert_eq!((answer.status, &*answer.code()), (503, "STREAM_UNAVAILABLE"));
    let seconds: u64 = answer.header("retry-after").expect("Retry-After").parse().expect("seconds");
    assert!(seconds >= 1);

    let begun = Instant::now();
    let answer = get(&server, "/v1/streams/stalled", &[]);
    let took = begun.elapsed();
    assert_eq!((answer.status, &*answer.code()), (503, "STREAM_UNAVAILABLE"));
    assert!(answer.header("retry-after").is_some());
    assert!(took >= Duration::from_millis(900) && took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn a_held_value_whose_upstream_fails_is_stale_until_it_recovers() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[1]");
    let server = of_leads(&upstream, "auto", "backoff_max = \"50ms\"");
    let state = |answer: &Answer| answer.header("x-restcast-state").map(str::to_owned);
    assert_eq!(state(&get(&server, LEADS, &[])), None);
    upstream.set("/leads", Reply::status(500));
    let stale = eventually("it is stale", || Some(get(&server, LEADS, &[])).filter(|answer| state(answer).is_some()));
    assert_eq!((stale.status, &*stale.text(), state(&stale).as_deref()), (200, "[1]", Some("stale")));
    let etag = stale.header("etag").expect("an ETag").to_owned();
    let same = get(&server, LEADS, &[("If-None-Match", &etag)]);
    assert_eq!((same.status, state(&same).as_deref()), (304, Some("stale")));
    upstream.set_json("/leads", "[1]");
    let live = eventually("it is live", || Some(get(&server, LEADS, &[])).filter(|answer| state(answer).is_none()));
    assert_eq!(live.header("etag"), Some(&*etag), "the same value is the same event");
}

// Formats.

const TALES: [&str; 9] = [
    r#"{"id":1,"price":1.0,"big":12345678901234567890,"tags":["a","b"],"owner":{"name":"Ada","since":1E5},"note":"some text that makes the value long enough for deltas to be smaller than it"}"#,
    r#"{"id":1,"price":1.50,"big":12345678901234567890,"tags":["a","b"],"owner":{"name":"Ada","since":1E5},"note":"some text that makes the value long enough for deltas to be smaller than it"}"#,
    r#"{"id":1,"price":1.50,"big":12345678901234567891,"tags":["a","b","c"],"owner":{"name":"Ada","since":1E5},"note":"some text that makes the value long enough for deltas to be smaller than it"}"#,
    r#"{"id":1,"price":1.50,"big":12345678901234567891,"tags":["b","c"],"owner":{"name":"Ada","since":1E+5},"note":"some text that makes the value long enough for deltas to be smaller than it"}"#,
    r#"{"id":1,"price":null,"big":12345678901234567891,"tags":["b","c"],"owner":{"name":"Ada","since":1E+5},"note":"some text that makes the value long enough for deltas to be smaller than it"}"#,
    r#"{"id":1,"big":12345678901234567891,"tags":["b","c"],"owner":{"since":1E+5,"a/b~c":"\u00e9"},"note":"some text that makes the value long enough for deltas to be smaller than it"}"#,
    r#"[]"#,
    r#"[1e-7,{"x":[]},"",-0.0,null,true]"#,
    r#""just a string""#,
];

#[test]
fn applying_all_frames_of_any_format_yields_the_upstreams_value() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/leads", TALES[0]);
        let server = of_leads(&upstream, driver, "");
        let mut watchers: Vec<(&str, Watcher)> = Vec::new();
        for format in ["patch", "merge", "full"] {
            let path = format!("{LEADS}?format={format}");
            watchers.push((format, Watcher::ws(&server, &path)));
            watchers.push((format, Watcher::ws(&server, &path)));
            watchers.push((format, Watcher::sse(&server, &path)));
        }
        watchers.push(("patch", Watcher::ws(&server, LEADS)));
        let before = now_us();
        for (place, value) in TALES.into_iter().enumerate() {
            upstream.set_json("/leads", value);
            let seq = place as u64 + 1;
            let mut first: std::collections::HashMap<&str, String> = std::collections::HashMap::new();
            for (format, watcher) in &mut watchers {
                let frame = watcher.event();
                assert_eq!(frame.seq(), seq, "{format}");
                assert_eq!(watcher.value("leads"), canonical(value), "{format}: {}", frame.text);
                assert_eq!(&frame.text, first.entry(format).or_insert_with(|| frame.text.clone()), "the same bytes");
                let kind = frame.kind();
                let kinds: &[&str] = match (*format, seq) {
                    ("full", _) | (_, 1 | 7..) => &["snapshot"],
                    // Merge cannot say null.
                    ("merge", 5) => &["snapshot"],
                    (delta, _) => &[delta],
                };
                assert!(kinds.contains(&&*kind), "{format}, {seq}: {kind}");
                let ts = frame.json()["ts"].as_u64().expect("ts");
                assert!(seq == 1 || (before..=now_us()).contains(&ts), "{ts}");
            }
            let epochs: Vec<String> =
                watchers.iter().map(|(_, watcher)| watcher.holding("leads").epoch.clone()).collect();
            assert!(epochs.iter().all(|epoch| *epoch == epochs[0]), "formats share an epoch");
        }
    }
}

#[test]
fn ignored_members_travel_with_the_next_event_and_array_elements_are_matched_by_key() {
    let upstream = Upstream::start();
    let body = |stamp: u32, rows: &[(u32, &str)]| {
        let rows: Vec<String> = rows
            .iter()
            .map(|(id, name)| format!(r#"{{"id":{id},"name":"{name}","pad":"{}"}}"#, "p".repeat(80)))
            .collect();
        format!(r#"{{"generated_at":{stamp},"rows":[{}]}}"#, rows.join(","))
    };
    let first = body(1, &[(1, "Ada"), (2, "Bob"), (3, "Cyd"), (4, "Dan")]);
    upstream.set_json("/leads", &first);
    let server = of_leads(&upstream, "auto", "ignore = [\"/generated_at\"]\narray_key = \"id\"");
    let mut watcher = Watcher::ws(&server, LEADS);
    watcher.event();
    for stamp in 2..5 {
        upstream.set_json("/leads", &body(stamp, &[(1, "Ada"), (2, "Bob"), (3, "Cyd"), (4, "Dan")]));
        polled(&upstream, "/leads");
    }
    let held = get(&server, LEADS, &[]);
    assert_eq!(held.text(), first, "every representation holds the value as of its seq");
    assert_eq!(held.header("etag"), Some(&*format!("\"{}-1\"", watcher.holding("leads").epoch)));
    // The first row goes: matched by key, that is one removal, not a change of each that follows.
    let last = body(9, &[(2, "Bob"), (3, "Cyd"), (4, "Dan")]);
    upstream.set_json("/leads", &last);
    let frame = watcher.event();
    assert_eq!((frame.seq(), watcher.value("leads")), (2, canonical(&last)));
    assert_eq!(frame.kind(), "patch");
    let patch: Value = serde_json::from_str(&frame.member("patch")).expect("JSON");
    let operations: Vec<(&str, &str)> = patch
        .as_array()
        .expect("an array")
        .iter()
        .map(|operation| (operation["op"].as_str().expect("op"), operation["path"].as_str().expect("path")))
        .collect();
    assert!(operations.contains(&("remove", "/rows/0")) && operations.len() == 2, "{patch}");
    assert_eq!(get(&server, LEADS, &[]).text(), last);
}

#[test]
fn bodies_too_large_for_a_core_are_compared_elsewhere_and_stay_in_order() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let body = |n: u32| {
            let rows: Vec<String> = (0..4000)
                .map(|row| {
                    format!(r#"{{"row":{row},"n":{},"text":"{}"}}"#, if row % 50 == 0 { n } else { 0 }, "t".repeat(60))
                })
                .collect();
            format!(r#"{{"n":{n},"rows":[{}]}}"#, rows.join(","))
        };
        assert!(body(1).len() > 300 << 10, "large enough");
        upstream.set_json("/leads", &body(1));
        let server = of_leads(&upstream, driver, "");
        let mut patches = Watcher::ws(&server, LEADS);
        let mut values = Watcher::ws(&server, &format!("{LEADS}?format=full"));
        for n in 1..=5 {
            upstream.set_json("/leads", &body(n));
            let (delta, whole) = (patches.event(), values.event());
            assert_eq!((delta.seq(), whole.seq()), (u64::from(n), u64::from(n)));
            assert_eq!(patches.value("leads"), canonical(&body(n)));
            assert_eq!(whole.member("data"), body(n));
            assert_eq!(delta.kind(), if n == 1 { "snapshot" } else { "patch" });
        }
    }
}

// Order and status.

#[test]
fn what_comes_first_on_a_connection_of_one_stream() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "[1]");
        let server = of_leads(&upstream, driver, "backoff_max = \"50ms\"");
        // `Watcher` has read `welcome`.
        let mut early = Watcher::ws(&server, LEADS);
        assert_eq!(early.event().kind(), "snapshot");
        upstream.set("/leads", Reply::status(502));
        let status = early.next_of("stream_status");
        assert_stale(&status);
        for over in [Over::Ws, Over::Sse] {
            let mut late = Watcher::open(&server, over, LEADS, &[bearer(&token_of("u1"))]);
            let status = late.next_of("stream_status");
            assert_stale(&status);
            assert_eq!(status.id, None, "a status does not move the stream");
            assert_eq!(late.event().kind(), "snapshot");
            let mut many = Watcher::ws(&server, "/v1/ws");
            many.send(r#"{"type":"subscribe","stream":"leads"}"#);
            assert_eq!([0; 3].map(|_| many.next().kind()), ["subscribed", "stream_status", "snapshot"]);
            // Who resumes is told the state as well, and has nothing to be sent again.
            let path = format!("{LEADS}?since={}-1", late.holding("leads").epoch);
            let mut back = Watcher::open(&server, over, &path, &[bearer(&token_of("u1"))]);
            assert_stale(&back.next_of("stream_status"));
            upstream.set_json("/leads", "[1]");
            assert_eq!(back.next_of("stream_status").json()["state"], "live");
            for watcher in [&mut early, &mut late] {
                let live = watcher.next_of("stream_status");
                assert_eq!((&live.json()["state"], live.json().get("code")), (&json!("live"), None));
            }
            upstream.set("/leads", Reply::status(502));
            for watcher in [&mut early, &mut late] {
                assert_stale(&watcher.next_of("stream_status"));
            }
        }
    }
}

fn assert_stale(frame: &Frame) {
    let status = frame.json();
    assert_eq!(status["stream"], "leads");
    assert_eq!(
        (&status["state"], &status["code"], &status["status"]),
        (&json!("stale"), &json!("UPSTREAM_STATUS"), &json!(502))
    );
    assert!(status["retry_in_ms"].as_u64().is_some(), "{status}");
    assert!(status["ts"].as_u64().is_some(), "{status}");
}

#[test]
fn another_failure_in_the_same_state_is_no_change_of_state() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[1]");
    let server = of_leads(&upstream, "auto", "backoff_max = \"20ms\"");
    let mut watcher = Watcher::ws(&server, LEADS);
    watcher.event();
    upstream.set("/leads", Reply::status(500));
    assert_eq!(watcher.next_of("stream_status").json()["code"], "UPSTREAM_STATUS");
    upstream.set("/leads", Reply::json("{not json"));
    polled(&upstream, "/leads");
    // Who comes now is told the newest reason.
    assert_eq!(Watcher::ws(&server, LEADS).next_of("stream_status").json()["code"], "UPSTREAM_BODY");
    upstream.set_json("/leads", "[2]");
    let mut kinds: Vec<(String, Value)> =
        (0..2).map(|_| watcher.next()).map(|f| (f.kind(), f.json()["state"].clone())).collect();
    kinds.sort_by_key(|(kind, _)| kind.clone());
    assert_eq!(kinds, [("snapshot".to_owned(), Value::Null), ("stream_status".to_owned(), json!("live"))]);
}

#[test]
fn a_cold_stream_that_fails_is_failing_until_its_first_value() {
    let upstream = Upstream::start();
    upstream.set("/leads", Reply::status(503).header("Retry-After", "1"));
    let server = of_leads(&upstream, "auto", "backoff_max = \"20ms\"");
    let mut first = Watcher::ws(&server, LEADS);
    let status = first.next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_RATE_LIMITED")), "{status}");
    let wait = status["retry_in_ms"].as_u64().expect("retry_in_ms");
    assert!((500..=1000).contains(&wait), "Retry-After is kept: {wait}");
    let mut late = Watcher::sse(&server, LEADS);
    assert_eq!(late.next_of("stream_status").json()["state"], "failing");
    upstream.set_json("/leads", "[1]");
    for watcher in [&mut first, &mut late] {
        let frames = [watcher.next(), watcher.next()];
        let mut kinds = frames.each_ref().map(Frame::kind);
        kinds.sort();
        assert_eq!(kinds, ["snapshot", "stream_status"]);
    }
    let seen = requests_for(&upstream, "/leads");
    assert!(seen[1].at - seen[0].at >= Duration::from_secs(1), "nothing shortens Retry-After");
}

// Many streams on one connection.

fn two_streams(upstream: &Upstream, driver: &str) -> Server {
    upstream.set_json("/a", "[1]");
    upstream.set_json("/b", "[10]");
    upstream.set_json("/leads", "[\"eu\"]");
    Setup::new()
        .driver(driver)
        .stream("a", &upstream.url("/a"), "")
        .stream("b", &upstream.url("/b"), "")
        .stream("leads", &upstream.url("/leads?r={query.region}&s={query.size}"), "params = [\"region\", \"size\"]")
        .start()
}

#[test]
fn one_connection_subscribes_to_many_streams_and_leaves_them() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = two_streams(&upstream, driver);
        let mut ws = Watcher::ws(&server, "/v1/ws");
        for (stream, id) in [("a", "1"), ("b", r#""\u0061\/b""#)] {
            ws.send(&format!(r#"{{"type":"subscribe","stream":"{stream}","id":{id}}}"#));
            let told = ws.next();
            assert_eq!(told.text, format!(r#"{{"type":"subscribed","stream":"{stream}","id":{id}}}"#));
            let frame = ws.event();
            assert_eq!((frame.kind(), frame.stream()), ("snapshot".into(), stream.into()));
        }
        ws.send(r#"{"type":"subscribe","stream":"a","format":"full","id":1.50}"#);
        let refused = ws.next_of("error");
        assert_eq!((&refused.json()["code"], &refused.json()["stream"]), (&json!("ALREADY_SUBSCRIBED"), &json!("a")));
        assert_eq!(refused.member("id"), "1.50", "an id comes back as it was spelled");
        ws.send(r#"{"type":"subscribe","stream":"nowhere","id":"x"}"#);
        let refused = ws.next_of("error").json();
        assert_eq!((&refused["code"], &refused["id"]), (&json!("STREAM_NOT_FOUND"), &json!("x")));
        assert_eq!(refused["stream"], "nowhere");

        upstream.set_json("/a", "[2]");
        assert_eq!(ws.event_with("a", "[2]").seq(), 2);
        upstream.set_json("/b", "[20]");
        assert_eq!(ws.event_with("b", "[20]").seq(), 2);

        ws.send(r#"{"type":"unsubscribe","stream":"a","id":-7}"#);
        let told = ws.next_of("unsubscribed");
        assert_eq!(told.json(), json!({"type":"unsubscribed","stream":"a","reason":"requested","id":-7}));
        upstream.set_json("/a", "[3]");
        polled(&upstream, "/a");
        upstream.set_json("/b", "[30]");
        assert_eq!(ws.event().stream(), "b", "nothing more of what was left");
        ws.send(r#"{"type":"unsubscribe","stream":"a"}"#);
        assert_eq!(ws.next_of("error").json()["code"], "STREAM_NOT_FOUND");
        // What was left may be taken up again, where it was left.
        let since = format!("{}-2", ws.holding("a").epoch);
        ws.send(&format!(r#"{{"type":"subscribe","stream":"a","since":"{since}"}}"#));
        assert_eq!(ws.next().text, r#"{"type":"subscribed","stream":"a"}"#);
        assert_eq!((ws.event().seq(), ws.value("a")), (3, "[3]".into()));
    }
}

#[test]
fn giving_up_one_stream_repeats_nothing_of_another() {
    let upstream = Upstream::start();
    let server = two_streams(&upstream, "auto");
    // Known on both cores, so that a subscription begins at once.
    let _known: Vec<Watcher> = (0..2)
        .map(|core| on_core(&server, core, |s| Watcher::ws(s, "/v1/streams/a")))
        .map(|mut w| {
            w.event();
            w
        })
        .collect();
    let mut ws = Watcher::ws(&server, "/v1/ws");
    for b in [r#"{"type":"subscribe","stream":"b"}"#, r#"{"type":"subscribe","stream":"b","max_rate_ms":10}"#] {
        ws.send(b);
        ws.next_of("subscribed");
        let seq = ws.event().seq();
        // Both at once: the snapshot of the one has no time to leave.
        let both = [r#"{"type":"subscribe","stream":"a"}"#, r#"{"type":"unsubscribe","stream":"a"}"#]
            .map(|message| support::server::client_frame(false, 1, message.as_bytes()));
        ws.raw().send(&both.concat());
        ws.next_of("subscribed");
        ws.next_of("unsubscribed");
        upstream.set_json("/b", &format!("[{}]", seq + 100));
        assert_eq!(ws.event().seq(), seq + 1, "what was held of the other is not sent again");
        ws.send(r#"{"type":"unsubscribe","stream":"b"}"#);
        ws.next_of("unsubscribed");
        ws.forget("b");
    }
}

#[test]
fn streams_with_parameters_are_named_by_them() {
    let upstream = Upstream::start();
    let server = two_streams(&upstream, "auto");
    let mut ws = Watcher::ws(&server, "/v1/ws");
    // Sorted and encoded in one way, however they were asked for.
    for (asked, named) in [
        ("leads?size=2&region=eu", "leads?region=eu&size=2"),
        ("leads?region=%65u%2Fx&size=3", "leads?region=eu%2Fx&size=3"),
        ("leads?region=a%20b&size=%c3%a9", "leads?region=a%20b&size=%C3%A9"),
    ] {
        ws.send(&json!({"type":"subscribe","stream":asked}).to_string());
        assert_eq!(ws.next().json(), json!({"type":"subscribed","stream":named}));
        assert_eq!(ws.event().stream(), named);
    }
    ws.send(r#"{"type":"subscribe","stream":"leads?region=eu&size=2"}"#);
    assert_eq!(ws.next_of("error").json()["code"], "ALREADY_SUBSCRIBED");
    ws.send(r#"{"type":"unsubscribe","stream":"leads?size=2&region=%65u"}"#);
    assert_eq!(ws.next_of("unsubscribed").json()["stream"], "leads?region=eu&size=2");
    let targets: Vec<String> = upstream.requests().into_iter().map(|seen| seen.target).collect();
    for target in ["/leads?r=eu&s=2", "/leads?r=eu%2Fx&s=3", "/leads?r=a%20b&s=%C3%A9"] {
        assert!(targets.iter().any(|seen| seen == target), "{target} in {targets:?}");
    }
    // The same name on a connection of its own.
    let mut single = Watcher::sse(&server, "/v1/streams/leads?size=2&region=eu&other=1");
    assert_eq!(single.event().stream(), "leads?region=eu&size=2");
}
