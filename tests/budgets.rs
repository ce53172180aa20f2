//! Rates and budgets of upstreams as the built server keeps them: who waits for whom, and who is told.
#![cfg(feature = "runtime")]
#![allow(clippy::disallowed_methods, reason = "tests measure how long things take")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::collections::HashSet;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::json;

use support::server::{ADMIN_KEY, PATIENCE, Server, Setup, bearer, eventually, token_of};
use support::{Folder, Reply, RequestSeen, Step, Upstream};
use watcher::{Over, Watcher, polled, requests_for};

fn open(server: &Server, stream: &str) -> Watcher {
    Watcher::ws(server, &format!("/v1/streams/{stream}"))
}

/// Lines that end a stream's and set the rate of its upstream.
fn rated(upstream: &Upstream, lines: &str, rate: &str) -> String {
    format!("{lines}\n[[upstream]]\norigin = {:?}\nrate = {rate:?}", upstream.url(""))
}

/// So many polls at most may have come in the time that these took, at one in `gap`.
fn assert_rate_kept(seen: &[RequestSeen], gap: Duration) {
    let times: Vec<Duration> = seen.iter().map(|one| one.at - seen[0].at).collect();
    // The upstream's threads may have been late for any request, which makes the time from that one to others too short. So
    // it is enough that one of the first was noted in time: from that one on, all others have to keep their distance.
    let keeps_it = |from: usize| {
        let mut later = (0..).zip(&times[from..]);
        later.all(|(count, at)| *at + gap / 2 >= times[from] + gap * count)
    };
    assert!((0..times.len().div_ceil(4)).any(keeps_it), "{times:?}");
}

// Rates.

#[test]
fn those_who_have_gone_hold_nobody_who_comes() {
    let upstream = Upstream::start();
    let mut setup = Setup::new();
    let streams: Vec<String> = (0..40).map(|n| format!("s{n}")).collect();
    for stream in &streams {
        upstream.set_json(&format!("/{stream}"), "1");
        setup = setup.stream(stream, &upstream.url(&format!("/{stream}")), "linger = \"100ms\"");
    }
    upstream.set_json("/z", "1");
    let server = setup.stream("z", &upstream.url("/z"), &rated(&upstream, "", "1/s")).start();
    let watchers: Vec<Watcher> = streams.iter().map(|stream| open(&server, stream)).collect();
    upstream.wait_for_requests(1, PATIENCE);
    drop(watchers);
    // When all have gone, nobody asks.
    let mut count = upstream.request_count();
    eventually("they have gone", || {
        std::thread::sleep(Duration::from_millis(1_500));
        let before = std::mem::replace(&mut count, upstream.request_count());
        (before == count).then_some(())
    });
    let asked = Instant::now();
    let _watcher = open(&server, "z");
    upstream.wait_for_requests(count + 1, PATIENCE);
    assert_eq!(requests_for(&upstream, "/z").len(), 1);
    assert!(
        asked.elapsed() < Duration::from_secs(20),
        "the forty had places for as many seconds: {:?}",
        asked.elapsed()
    );
    assert_rate_kept(&upstream.requests(), Duration::from_secs(1));
}

#[test]
fn a_rate_that_is_raised_by_a_reload_holds_for_those_who_wait() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    upstream.set_json("/b", "1");
    let setup = |rate| {
        let setup = Setup::new().stream("a", &upstream.url("/a"), "");
        setup.stream("b", &upstream.url("/b"), &rated(&upstream, "", rate))
    };
    let server = setup("1/h").start();
    let _watchers = ["a", "b"].map(|stream| open(&server, stream));
    upstream.wait_for_requests(1, PATIENCE);
    server.reload(&setup("10/s"));
    upstream.wait_for_requests(11, PATIENCE);
    polled(&upstream, "/a");
    polled(&upstream, "/b");
}

#[test]
fn whoever_waits_long_for_its_turn_says_so() {
    let upstream = Upstream::start();
    for path in ["/a", "/b", "/c"] {
        upstream.set_json(path, "1");
    }
    let lines = "timeout = \"2s\"\ninterval = \"1h\"";
    let setup = Setup::new().stream("a", &upstream.url("/a"), lines).stream("b", &upstream.url("/b"), lines);
    let patient = "timeout = \"10m\"\ninterval = \"1h\"";
    let server = setup.stream("c", &upstream.url("/c"), &rated(&upstream, patient, "4/m")).start();
    open(&server, "a").event();
    let mut second = Watcher::sse(&server, "/v1/streams/b");
    let status = second.next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_RATE_LIMITED")), "{status}");
    assert!(status["retry_in_ms"].as_u64().is_some_and(|ms| (5_000..=16_000).contains(&ms)), "{status}");
    // One that may take as long as that is just waiting.
    let mut third = open(&server, "c");
    assert!(third.is_quiet_for(Duration::from_secs(3)));
    assert_eq!(upstream.request_count(), 1);
}

#[test]
fn polls_that_get_no_token_take_nothing_of_the_rate() {
    let (upstream, issuer) = (Upstream::start(), Upstream::start());
    upstream.set_json("/good", "1");
    issuer.set("/token", Reply::status(500));
    let mut setup = Setup::new();
    for n in 0..8 {
        let auth = format!(
            "backoff_max = \"100ms\"\n[stream.auth]\nkind = \"oauth2\"\ntoken_url = {:?}\nclient_id = \"c\"\nclient_secret = \"s\"",
            issuer.url("/token")
        );
        setup = setup.stream(&format!("t{n}"), &upstream.url(&format!("/t{n}")), &auth);
    }
    let server = setup.stream("good", &upstream.url("/good"), &rated(&upstream, "", "5/s")).start();
    let _tokenless: Vec<Watcher> = (0..8).map(|n| open(&server, &format!("t{n}"))).collect();
    issuer.wait_for_requests(1, PATIENCE);
    let _good = open(&server, "good");
    upstream.wait_for_requests(1, PATIENCE);
    let begun = Instant::now();
    upstream.wait_for_requests(21, 6 * PATIENCE);
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(24), "20 at 5/s are 4 s, or 36 s where nine share it: {took:?}");
    let seen = upstream.requests();
    assert!(seen.iter().all(|seen| seen.target == "/good"), "nobody asks without a token");
    assert_rate_kept(&seen, Duration::from_millis(200));
}

#[test]
fn polls_that_wait_for_one_token_do_not_come_together() {
    let (upstream, issuer) = (Upstream::start(), Upstream::start());
    let token = r#"{"access_token":"t1","token_type":"Bearer","expires_in":3600}"#;
    issuer.set("/token", Reply::json(token).delay(Duration::from_secs(3)));
    let mut setup = Setup::new();
    for n in 0..6 {
        upstream.set_json(&format!("/t{n}"), "1");
        let auth = format!(
            "[stream.auth]\nkind = \"oauth2\"\ntoken_url = {:?}\nclient_id = \"c\"\nclient_secret = \"s\"",
            issuer.url("/token")
        );
        let lines = if n == 5 { rated(&upstream, &auth, "2/s") } else { auth };
        setup = setup.stream(&format!("t{n}"), &upstream.url(&format!("/t{n}")), &lines);
    }
    let server = setup.start();
    let _watchers: Vec<Watcher> = (0..6).map(|n| open(&server, &format!("t{n}"))).collect();
    upstream.wait_for_requests(8, 3 * PATIENCE);
    assert_rate_kept(&upstream.requests(), Duration::from_millis(500));
    assert_eq!(issuer.request_count(), 1);
}

#[test]
fn a_request_that_is_sent_again_counts_again() {
    let upstream = Upstream::start();
    let used = Mutex::new(HashSet::new());
    upstream.judge("/a", move |seen| {
        // It reads the second request of a connection and closes.
        if used.lock().expect("no panic").insert(seen.connection) {
            Reply::json("1")
        } else {
            Reply::steps(vec![Step::Close])
        }
    });
    let server = Setup::new().stream("a", &upstream.url("/a"), &rated(&upstream, "", "4/s")).start();
    let mut watcher = open(&server, "a");
    watcher.event();
    upstream.wait_for_requests(13, 3 * PATIENCE);
    let seen = upstream.requests();
    assert_rate_kept(&seen, Duration::from_millis(250));
    let connections: HashSet<usize> = seen.iter().map(|seen| seen.connection).collect();
    assert!(connections.len() < seen.len(), "connections are used again");
    assert!(watcher.is_quiet_for(Duration::from_secs(1)), "what is sent again is no failure");
}

// Budgets.

#[test]
fn the_spent_budget_of_one_resource_is_no_matter_of_another() {
    let upstream = Upstream::start();
    let named = |remaining: &str, resource: &str| {
        let reply = Reply::json("1").header("X-RateLimit-Limit", "30").header("X-RateLimit-Reset", "600");
        reply.header("X-RateLimit-Remaining", remaining).header("X-RateLimit-Resource", resource)
    };
    upstream.set("/core", named("29", "core"));
    upstream.set("/search", named("0", "search"));
    let key = "headers = { \"X-Api-Key\" = \"k1\" }";
    let setup = Setup::new().stream("core", &upstream.url("/core"), key);
    let server = setup.stream("search", &upstream.url("/search"), key).start();
    let mut core = open(&server, "core");
    core.event();
    let mut search = open(&server, "search");
    search.event();
    let status = search.next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("stale"), &json!("UPSTREAM_RATE_LIMITED")), "{status}");
    for _ in 0..10 {
        polled(&upstream, "/core");
    }
    assert_eq!(requests_for(&upstream, "/search").len(), 1);
    assert!(core.is_quiet_for(Duration::from_millis(100)), "it is live");
}

#[test]
fn a_reload_forgets_no_retry_after() {
    let upstream = Upstream::start();
    upstream.set("/a", Reply::status(429).header("Retry-After", "600"));
    upstream.set_json("/b", "1");
    let setup = |interval: &str| {
        let setup = Setup::new().stream("a", &upstream.url("/a"), &format!("interval = {interval:?}"));
        setup.stream("b", &upstream.url("/b"), "headers = { \"X-Api-Key\" = \"another\" }")
    };
    let server = setup("20ms").start();
    let mut watcher = open(&server, "a");
    let status = watcher.next_of("stream_status").json();
    assert_eq!(status["code"], "UPSTREAM_RATE_LIMITED");
    server.reload(&setup("30ms"));
    let _other = open(&server, "b");
    for _ in 0..20 {
        polled(&upstream, "/b");
    }
    assert_eq!(requests_for(&upstream, "/a").len(), 1, "it is another stream, and the same upstream");
}

#[test]
fn whoever_gets_another_key_leaves_the_budget_of_the_old_one() {
    let upstream = Upstream::start();
    for path in ["/a", "/b"] {
        upstream.judge(path, |seen| match seen.header("x-key") {
            Some("new") => Reply::json("2"),
            _ => Reply::json("1").header("RateLimit", "\"a\";r=0;t=3600"),
        });
    }
    let folder = Folder::new("budgets");
    let lines = format!("headers = {{ \"X-Key\" = \"file:{}\" }}", folder.put("key", "old"));
    let setup = Setup::new().stream("a", &upstream.url("/a"), &lines).stream("b", &upstream.url("/b"), &lines);
    let server = setup.start();
    let mut watcher = open(&server, "a");
    watcher.event_with("a", "1");
    watcher.next_of("stream_status");
    folder.put("key", "new");
    server.wait_for_log("The secret of an upstream was read again.", 1);
    // Somebody who comes asks with the new key at once; whoever was held by the old one's budget is not for ever.
    open(&server, "b").event_with("b", "2");
    assert_eq!(server.admin("POST", "/admin/v1/streams/a/refresh", Some(ADMIN_KEY)).status, 202);
    watcher.event_with("a", "2");
}

/// An upstream with so many requests in a window that never ends, and how many have come.
fn with_budget(upstream: &Upstream, of: u32) {
    let left = Mutex::new(of);
    upstream.judge_all(move |_| {
        let mut left = left.lock().expect("no panic");
        let reply = match left.checked_sub(1) {
            Some(rest) => {
                *left = rest;
                Reply::json("1")
            }
            None => Reply::status(429),
        };
        reply.header("X-RateLimit-Remaining", &left.to_string()).header("X-RateLimit-Reset", "3600")
    });
}

#[test]
fn streams_that_begin_together_ask_no_more_often_than_they_may() {
    let upstream = Upstream::start();
    with_budget(&upstream, 60);
    let lines = "keep_warm = true\ninterval = \"1h\"";
    let setup = (0..100).fold(Setup::new().cores(2), |setup, n| {
        setup.stream(&format!("s{n}"), &upstream.url(&format!("/s{n}")), lines)
    });
    let server = setup.start();
    upstream.wait_for_requests(40, PATIENCE);
    let mut count = 0;
    eventually("the others wait", || {
        std::thread::sleep(Duration::from_secs(1));
        let before = std::mem::replace(&mut count, upstream.request_count());
        (before == count).then_some(())
    });
    assert!(count <= 60, "{count} requests where 60 may be");
    drop(server);
}

#[test]
fn a_caller_whose_targets_fail_stops_no_stream_of_the_operator_and_of_no_other_caller() {
    let upstream = Upstream::start();
    upstream.set_json("/good", "1");
    let setup = Setup::new().stream("good", &upstream.url("/good"), "interval = \"100ms\"");
    let server = setup.direct(upstream.address(), "interval_min = \"50ms\"").start();
    let mut good = open(&server, "good");
    good.event();
    let mallory = [bearer(&token_of("mallory"))];
    let mut failing: Vec<Watcher> = (0..40)
        .map(|n| {
            let path = format!("/bad{n}");
            upstream.set(&path, Reply::status(500));
            let path = format!("/v1/direct?url={}&interval_ms=50", upstream.url(&path));
            Watcher::open(&server, Over::Sse, &path, &mallory)
        })
        .collect();
    // Whoever has not failed itself is told how others have: ten have failed by then.
    for watcher in &mut failing {
        assert_eq!(watcher.next_of("stream_status").json()["code"], "UPSTREAM_STATUS");
    }
    let mut tries = 0;
    eventually("whatever else this caller describes there is left alone", || {
        tries += 1;
        let path = format!("/odd{tries}");
        upstream.set(&path, Reply::status(501));
        let path = format!("/v1/direct?url={}", upstream.url(&path));
        let told = Watcher::open(&server, Over::Sse, &path, &mallory).next_of("stream_status").json();
        // Unless it is the one that tries the origin.
        (told["status"] == 500).then_some(())
    });
    let others = [bearer(&token_of("other"))];
    upstream.set_json("/fine", "7");
    let path = format!("/v1/direct?url={}", upstream.url("/fine"));
    assert_eq!(Watcher::open(&server, Over::Sse, &path, &others).event().json()["data"], 7);
    upstream.set("/no-more", Reply::status(429).header("Retry-After", "3600"));
    let path = format!("/v1/direct?url={}", upstream.url("/no-more"));
    let mut held = Watcher::open(&server, Over::Sse, &path, &others);
    assert_eq!(held.next_of("stream_status").json()["code"], "UPSTREAM_RATE_LIMITED");
    let before = requests_for(&upstream, "/good").len();
    eventually("it is polled on", || (requests_for(&upstream, "/good").len() >= before + 20).then_some(()));
    upstream.set_json("/good", "2");
    assert_eq!(good.event().json()["data"], 2, "and no status came before");
}
