//! What an owner of an upstream sees of the built server: how often it asks, and that it never asks once more than it may.
//! The upstreams speak TLS, count, and say in their answers what they take.
#![cfg(feature = "runtime")]
#![allow(clippy::disallowed_methods, reason = "tests measure how long things take")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use support::server::{PATIENCE, Setup, bearer, eventually, token_of};
use support::{Authority, Folder, Reply, Step, Upstream};
use watcher::{Watcher, polled, requests_for};

fn open(server: &support::server::Server, stream: &str) -> Watcher {
    Watcher::ws(server, &format!("/v1/streams/{stream}"))
}

/// Lets time pass while an upstream is asked or not.
fn watch_for(time: Duration) {
    std::thread::sleep(time);
}

// Freshness.

#[test]
fn what_is_fresh_is_not_asked_for_where_that_is_respected() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    let fresh = |n: u32| Reply::json(n.to_string()).header("Cache-Control", "max-age=62").header("Age", "60");
    upstream.set("/respected", fresh(1));
    upstream.set("/ignored", fresh(1));
    let server = Setup::new()
        .stream("respected", &upstream.url("/respected"), &format!("{ca}\nrespect_max_age = true"))
        .stream("ignored", &upstream.url("/ignored"), &ca)
        .start();
    let mut respected = open(&server, "respected");
    let mut ignored = open(&server, "ignored");
    assert_eq!((respected.event().seq(), ignored.event().seq()), (1, 1));
    upstream.set("/respected", fresh(2));
    respected.event_with("respected", "2");
    let asked = requests_for(&upstream, "/respected");
    let gaps: Vec<Duration> = asked.windows(2).map(|pair| pair[1].at - pair[0].at).collect();
    assert!(gaps.iter().all(|gap| *gap >= Duration::from_millis(1_900)), "{gaps:?}");
    assert!(requests_for(&upstream, "/ignored").len() >= 10, "the interval is 20 ms");
}

#[test]
fn a_value_that_is_fresh_or_that_nobody_may_poll_now_is_answered_at_once_after_a_while_without_watchers() {
    let upstream = Upstream::start();
    upstream.set("/fresh", Reply::json("1").header("Cache-Control", "max-age=3600"));
    upstream.set("/change", Reply::json("{}"));
    // Where the answer waited for a poll it would not come while this test has patience.
    let lines = "respect_max_age = true\nlinger = \"50ms\"\ntimeout = \"10m\"\nfirst_byte_timeout = \"10m\"";
    let server = Setup::new()
        .stream("fresh", &upstream.url("/fresh"), lines)
        .action("change", &upstream.url("/change"), "refresh = [\"fresh\"]")
        .start();
    let value = || server.get("/v1/streams/fresh", &[bearer(&token_of("u1"))]).text();
    assert_eq!(value(), "1");
    for _ in 0..2 {
        watch_for(Duration::from_millis(500));
        assert_eq!(value(), "1");
    }
    assert_eq!(requests_for(&upstream, "/fresh").len(), 1);
    // Whoever has changed it sees that, though nobody watched it just then.
    for n in ["2", "3"] {
        watch_for(Duration::from_millis(500));
        upstream.set("/fresh", Reply::json(n).header("Cache-Control", "max-age=3600"));
        let mut writer = server.ws("/v1/ws", &[bearer(&token_of("u1"))]);
        assert_eq!(writer.next()["type"], "welcome");
        writer.send(json!({"type": "change", "id": 1}));
        assert_eq!(writer.next()["type"], "action_result");
        assert_eq!(value(), n);
    }
}

// Budgets.

/// A fixed window, as most limiters have: so many requests in so long, told in the answers in one of the ways there are.
struct Window {
    limit: u64,
    length: Duration,
    begun: Instant,
    used: u64,
}

impl Window {
    fn answer(&mut self, way: &str) -> (Reply, bool) {
        if self.begun.elapsed() >= self.length {
            (self.begun, self.used) = (Instant::now(), 0);
        }
        self.used += 1;
        let over = self.used > self.limit;
        let reply = if over { Reply::status(429) } else { Reply::json(format!("{{\"n\":{}}}", self.used)) };
        let remaining = self.limit.saturating_sub(self.used).to_string();
        let left = self.length.saturating_sub(self.begun.elapsed());
        let seconds = left.as_millis().div_ceil(1_000).to_string();
        let ends = SystemTime::now() + left;
        let epoch = ends.duration_since(UNIX_EPOCH).expect("after 1970").as_millis().div_ceil(1_000).to_string();
        let reply = match way {
            "draft" => reply
                .header("RateLimit-Policy", &format!("\"all\";q={};w={}", self.limit, self.length.as_secs()))
                .header("RateLimit", &format!("\"all\";r={remaining};t={seconds}")),
            "triple" => reply
                .header("RateLimit-Limit", &self.limit.to_string())
                .header("RateLimit-Remaining", &remaining)
                .header("RateLimit-Reset", &seconds),
            "epoch" => reply.header("X-RateLimit-Remaining", &remaining).header("X-RateLimit-Reset", &epoch),
            _ => unreachable!("a way there is"),
        };
        (reply, over)
    }
}

#[test]
fn a_budget_is_shared_by_all_streams_of_its_credential_and_never_passed() {
    std::thread::scope(|scope| {
        for way in ["draft", "triple", "epoch"] {
            scope.spawn(move || {
                let (upstream, ca, _folder) = Upstream::start_trusted();
                let window = Window { limit: 8, length: Duration::from_secs(2), begun: Instant::now(), used: 0 };
                let window = Arc::new(Mutex::new(window));
                let overruns = Arc::new(AtomicUsize::new(0));
                let mut setup = Setup::new();
                for stream in ["a", "b", "c", "d"] {
                    let (window, overruns) = (Arc::clone(&window), Arc::clone(&overruns));
                    upstream.judge(&format!("/{stream}"), move |_| {
                        let (reply, over) = window.lock().expect("no panic").answer(way);
                        overruns.fetch_add(usize::from(over), Ordering::SeqCst);
                        reply
                    });
                    let lines = format!("{ca}\nheaders = {{ \"X-Api-Key\" = \"k1\" }}");
                    setup = setup.stream(stream, &upstream.url(&format!("/{stream}")), &lines);
                }
                let server = setup.start();
                // Of the first nobody knows anything; from its answer on everybody does.
                let mut watchers = vec![open(&server, "a")];
                watchers[0].event();
                watchers.extend(["b", "c", "d"].map(|stream| open(&server, stream)));
                let begun = Instant::now();
                upstream.wait_for_requests(28, 6 * PATIENCE);
                assert_eq!(overruns.load(Ordering::SeqCst), 0, "{way}");
                assert!(begun.elapsed() >= Duration::from_secs(4), "{way}: 28 of 8 in 2 s take four windows");
                for stream in ["a", "b", "c", "d"] {
                    let count = requests_for(&upstream, &format!("/{stream}")).len();
                    assert!(count >= 2, "{way}: {stream} was asked {count} times");
                }
            });
        }
    });
}

#[test]
fn another_credential_has_a_budget_of_its_own() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    upstream.set("/spent", Reply::json("1").header("RateLimit", "\"a\";r=0;t=600"));
    upstream.set("/free", Reply::json("1"));
    let key = |key: &str| format!("{ca}\nheaders = {{ \"X-Api-Key\" = {key:?} }}");
    let server = Setup::new()
        .stream("spent", &upstream.url("/spent"), &key("k1"))
        .stream("other", &upstream.url("/free?other"), &key("k1"))
        .stream("free", &upstream.url("/free"), &key("k2"))
        .start();
    let mut spent = open(&server, "spent");
    spent.event();
    let status = spent.next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("stale"), &json!("UPSTREAM_RATE_LIMITED")));
    assert!(status["retry_in_ms"].as_u64().is_some_and(|ms| (590_000..=602_000).contains(&ms)), "{status}");
    // A stream that nobody has polled yet is held back too, and says why.
    let mut other = open(&server, "other");
    let status = other.next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_RATE_LIMITED")));
    let mut free = open(&server, "free");
    free.event();
    for _ in 0..5 {
        polled(&upstream, "/free");
    }
    assert_eq!(requests_for(&upstream, "/spent").len(), 1);
    assert_eq!(requests_for(&upstream, "/free?other").len(), 0);
}

#[test]
fn too_many_requests_of_one_stream_hold_the_others_of_its_credential_and_a_503_does_not() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    upstream.set("/many", Reply::json("1"));
    upstream.set("/same", Reply::json("1"));
    upstream.set("/other", Reply::json("1"));
    upstream.set("/away", Reply::status(503).header("Retry-After", "600"));
    let key = |key: &str| format!("{ca}\nheaders = {{ \"X-Api-Key\" = {key:?} }}");
    let server = Setup::new()
        .stream("many", &upstream.url("/many"), &key("k1"))
        .stream("same", &upstream.url("/same"), &key("k1"))
        .stream("other", &upstream.url("/other"), &key("k2"))
        .stream("away", &upstream.url("/away"), &key("k2"))
        .start();
    let mut watchers = ["many", "same", "other"].map(|stream| open(&server, stream));
    watchers.iter_mut().for_each(|watcher| drop(watcher.event()));
    let status = open(&server, "away").next_of("stream_status").json();
    assert_eq!(status["code"], "UPSTREAM_RATE_LIMITED", "{status}");
    upstream.set("/many", Reply::status(429).header("Retry-After", "600"));
    for watcher in &mut watchers[..2] {
        let status = watcher.next_of("stream_status").json();
        assert_eq!((&status["state"], &status["code"]), (&json!("stale"), &json!("UPSTREAM_RATE_LIMITED")), "{status}");
        assert!(status["retry_in_ms"].as_u64().is_some_and(|ms| (590_000..=602_000).contains(&ms)), "{status}");
    }
    // What was under way when it was said has ended by now.
    let held = requests_for(&upstream, "/same").len();
    for _ in 0..10 {
        polled(&upstream, "/other");
    }
    assert_eq!(requests_for(&upstream, "/same").len(), held);
    assert_eq!((requests_for(&upstream, "/away").len(), requests_for(&upstream, "/many").len() > 1), (1, true));
}

// Rates.

#[test]
fn a_rate_is_kept_and_shared_evenly() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    let origin = upstream.url("");
    let mut setup = Setup::new();
    for stream in ["a", "b", "c"] {
        upstream.set_json(&format!("/{stream}"), "1");
        setup = setup.stream(stream, &upstream.url(&format!("/{stream}")), &ca);
    }
    // As a stream's lines, which come before others' tables.
    let setup =
        setup.action("unused", &upstream.url("/x"), &format!("[[upstream]]\norigin = {origin:?}\nrate = \"10/s\""));
    let server = setup.start();
    let _watchers = ["a", "b", "c"].map(|stream| open(&server, stream));
    upstream.wait_for_requests(37, 6 * PATIENCE);
    let seen = upstream.requests();
    let took = seen[36].at - seen[0].at;
    // The test's own threads may have been late for the first.
    assert!(took >= Duration::from_millis(3_000), "36 more at 10/s came in {took:?}");
    let counts = ["/a", "/b", "/c"].map(|path| seen[..37].iter().filter(|request| request.target == path).count());
    assert!(counts.iter().all(|count| (9..=16).contains(count)), "by turns: {counts:?}");
}

#[test]
fn actions_and_tokens_count_in_the_rate_of_their_upstream_and_go_before_polls() {
    let upstream = Upstream::start();
    for path in ["/a", "/b", "/c"] {
        upstream.set_json(path, "1");
    }
    upstream.set("/act", Reply::json("{}"));
    upstream.set_json("/token", r#"{"access_token":"t1","token_type":"Bearer","expires_in":3600}"#);
    let origin = upstream.url("");
    let oauth = format!(
        "[stream.auth]\nkind = \"oauth2\"\ntoken_url = {:?}\nclient_id = \"c\"\nclient_secret = \"s\"",
        upstream.url("/token")
    );
    let rate = format!("timeout = \"1s\"\n[[upstream]]\norigin = {origin:?}\nrate = \"4/s\"");
    let setup = ["/a", "/b"]
        .iter()
        .fold(Setup::new(), |setup, path| setup.stream(path.trim_start_matches('/'), &upstream.url(path), ""));
    let server = setup.stream("c", &upstream.url("/c"), &oauth).action("act", &upstream.url("/act"), &rate).start();
    let _watchers = ["a", "b", "c"].map(|stream| open(&server, stream));
    upstream.wait_for_requests(5, 6 * PATIENCE);
    let mut ws = server.ws("/v1/ws", &[bearer(&token_of("u1"))]);
    ws.next_of("welcome");
    // At 4/s a second has room for four, and the fifth that is asked for then would come too late.
    for id in 0..8 {
        ws.send(json!({ "type": "act", "id": id }));
    }
    let mut answers: Vec<Value> = (0..8).map(|_| ws.next()).collect();
    answers.sort_by_key(|answer| answer["id"].as_u64());
    let (done, refused): (Vec<Value>, Vec<Value>) = answers.into_iter().partition(|a| a["type"] == "action_result");
    assert!((3..=5).contains(&done.len()), "{done:?}");
    for answer in &refused {
        assert_eq!(
            (&answer["code"], &answer["reason"]),
            (&json!("ACTION_FAILED"), &json!("UPSTREAM_RATE_LIMITED")),
            "{answer}"
        );
    }
    assert_eq!(requests_for(&upstream, "/act").len(), done.len(), "what was refused was not sent");
    polled(&upstream, "/c");
    let seen = upstream.requests();
    let (first, last) = (seen.first().expect("one"), seen.last().expect("one"));
    let most = (last.at - first.at).as_millis() / 250 + 3;
    assert!(seen.len() as u128 <= most, "{} requests in {:?}", seen.len(), last.at - first.at);
    assert_eq!(requests_for(&upstream, "/token").len(), 1);
    assert!(seen.iter().any(|seen| seen.target == "/c" && seen.header("authorization") == Some("Bearer t1")));
}

// Windows and moving intervals.

#[test]
fn no_poll_is_made_in_a_window_without_one() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    upstream.set_json("/closed", "1");
    upstream.set_json("/open", "1");
    let server = Setup::new()
        .stream(
            "closed",
            &upstream.url("/closed"),
            &format!("{ca}\nkeep_warm = true\nwindows = [{{ from = \"00:00\", to = \"24:00\" }}]"),
        )
        .stream(
            "open",
            &upstream.url("/open"),
            &format!(
                "{ca}\ninterval = \"1h\"\nwindows = [{{ from = \"00:00\", to = \"24:00\", interval = \"20ms\" }}]"
            ),
        )
        .start();
    let _closed = open(&server, "closed");
    let mut watcher = open(&server, "open");
    watcher.event();
    for _ in 0..10 {
        polled(&upstream, "/open");
    }
    assert_eq!(requests_for(&upstream, "/closed").len(), 0);
}

#[test]
fn who_waits_while_a_window_is_closed_is_told_so_and_until_when() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    upstream.set_json("/closed", "1");
    // Closed now and for an hour at least, whatever time it is.
    let minute = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs() / 60 % 1440;
    let clock = |minute: u64| format!("{:02}:{:02}", minute % 1440 / 60, minute % 60);
    let (from, to) = (clock(minute + 1440 - 60), clock(minute + 70));
    let lines = format!("{ca}\nwindows = [{{ from = \"{from}\", to = \"{to}\" }}]");
    let server = Setup::new().stream("closed", &upstream.url("/closed"), &lines).start();
    let status = open(&server, "closed").next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("STOPPED")));
    let opens_in = 60_000 * 60..=60_000 * 70;
    assert!(status["retry_in_ms"].as_u64().is_some_and(|wait| opens_in.contains(&wait)), "{status}");
    let asked = Instant::now();
    let answer = server.get("/v1/streams/closed", &[support::server::bearer(&support::server::token_of("u1"))]);
    let retry_after: Option<u64> = answer.header("retry-after").and_then(|seconds| seconds.parse().ok());
    assert_eq!(answer.status, 503);
    assert!(retry_after.is_some_and(|seconds| (3_600..=4_200).contains(&seconds)), "{retry_after:?}");
    assert!(asked.elapsed() < Duration::from_secs(10), "not only when its `timeout` is over");
    assert_eq!(upstream.request_count(), 0);
}

#[test]
fn a_moving_interval_slows_down_while_nothing_changes() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    upstream.set_json("/leads", "0");
    let lines = format!("{ca}\ninterval = \"50ms\"\ninterval_max = \"1s\"");
    let server = Setup::new().stream("leads", &upstream.url("/leads"), &lines).start();
    let mut watcher = open(&server, "leads");
    watcher.event();
    upstream.wait_for_requests(10, 3 * PATIENCE);
    let gap = |seen: &[support::RequestSeen]| seen[seen.len() - 1].at - seen[seen.len() - 2].at;
    assert!(gap(&upstream.requests()) >= Duration::from_millis(700), "50 ms and half again, nine times");
    let mut n = 0;
    eventually("it is fast again", || {
        n += 1;
        upstream.set_json("/leads", &n.to_string());
        watcher.event_with("leads", &n.to_string());
        (gap(&upstream.requests()) <= Duration::from_millis(300)).then_some(())
    });
}

// Redirects.

#[test]
fn redirects_are_followed_where_that_is_allowed_and_secrets_stay_home() {
    let authority = Authority::new();
    let (home, away) = (
        Upstream::start_tls(&authority.identity(&["127.0.0.1"])),
        Upstream::start_tls(&authority.identity(&["127.0.0.1"])),
    );
    // Not the operator's word: another port of the same machine is a stranger's.
    let port = |url: &str| url.rsplit(':').next().and_then(|rest| rest.split('/').next()).expect("a port").to_owned();
    let (home_port, away_port) = (port(&home.url("/")), port(&away.url("/")));
    let folder = Folder::new("citizen");
    let ca = format!("ca = {:?}", authority.write_pem(&folder));
    let to = |status, place: &str| Reply::status(status).header("Location", place);
    home.set_json("/new", "\"home\"");
    away.set_json("/new", "\"away\"");
    home.set("/moved", to(301, "/new"));
    home.set("/there", to(302, &away.url("/new")));
    home.set("/a", to(307, "/b"));
    home.set("/b", to(307, "/a"));
    home.set("/long", to(302, "/moved"));
    home.set("/down", to(302, &away.url("/new").replacen("https", "http", 1)));
    home.set("/inward", to(302, "https://169.254.169.254/latest/meta-data"));
    home.set("/number", to(302, &format!("https://2130706433:{away_port}/new")));
    home.set("/user", to(302, &format!("https://user:pw@127.0.0.1:{home_port}/new")));
    home.set("/tab", to(302, "/n\tew"));
    home.set("/spelt", to(302, &format!("https://2130706433:{home_port}/new")));
    let lines = |max: u32| {
        format!(
            "{ca}\nredirects_max = {max}\nheaders = {{ Authorization = \"Bearer hunter2\" }}\nbackoff_max = \"100ms\""
        )
    };
    let mut setup = Setup::new();
    for (id, path, max) in [
        ("off", "/moved", 0),
        ("moved", "/moved", 1),
        ("there", "/there", 1),
        ("circle", "/a", 5),
        ("long", "/long", 1),
        ("down", "/down", 5),
        ("inward", "/inward", 5),
        ("number", "/number", 5),
        ("user", "/user", 5),
        ("tab", "/tab", 5),
        ("spelt", "/spelt", 5),
    ] {
        setup = setup.stream(id, &home.url(path), &lines(max));
    }
    let server = setup.start();
    for (id, code) in [
        ("off", "UPSTREAM_REDIRECT"),
        ("circle", "UPSTREAM_REDIRECT"),
        ("long", "UPSTREAM_REDIRECT"),
        ("down", "UPSTREAM_REDIRECT"),
        ("inward", "UPSTREAM_BLOCKED"),
        ("there", "UPSTREAM_BLOCKED"),
        ("number", "UPSTREAM_BLOCKED"),
        ("user", "UPSTREAM_BLOCKED"),
        ("tab", "UPSTREAM_BLOCKED"),
    ] {
        assert_eq!(open(&server, id).next_of("stream_status").json()["code"], code, "{id}");
    }
    let mut moved = open(&server, "moved");
    moved.event_with("moved", "\"home\"");
    let mut spelt = open(&server, "spelt");
    spelt.event_with("spelt", "\"home\"");
    assert!(away.requests().is_empty(), "{:?}", away.requests());
    assert!(home.requests().iter().all(|seen| seen.header("authorization") == Some("Bearer hunter2")));
    assert_eq!(server.log_count("has moved for good"), 1, "{}", server.log_text());
    assert!(!server.log_text().contains("hunter2"));
}

#[test]
fn a_value_behind_a_redirect_is_asked_for_conditionally_where_it_came_from() {
    let home = Upstream::start();
    let to = |place: &str| Reply::status(302).header("Location", place);
    let sent = |upstream: &Upstream, path: &str| {
        let of = |seen: support::RequestSeen| seen.header("if-none-match").map(str::to_owned);
        requests_for(upstream, path).into_iter().map(of).collect::<Vec<_>>()
    };
    home.set("/start", to("/one"));
    home.set("/one", Reply::json("1").etag("\"e1\""));
    home.set("/two", Reply::json("2").etag("\"e2\""));
    let server = Setup::new().stream("s", &home.url("/start"), "redirects_max = 2\nbackoff_max = \"100ms\"").start();
    let mut ws = open(&server, "s");
    ws.event_with("s", "1");
    for _ in 0..3 {
        polled(&home, "/one");
    }
    assert!(home.not_modified_count() >= 2);
    let asked = sent(&home, "/one");
    assert!(asked[0].is_none() && asked[1..].iter().all(|tag| tag.as_deref() == Some("\"e1\"")), "{asked:?}");
    assert!(sent(&home, "/start").iter().all(Option::is_none), "it is no value's tag there");
    // It leads elsewhere: the old tag is nothing to that place.
    home.set("/start", to("/two"));
    ws.event_with("s", "2");
    polled(&home, "/two");
    polled(&home, "/two");
    let asked = sent(&home, "/two");
    assert!(asked[0].is_none() && asked.iter().any(|tag| tag.as_deref() == Some("\"e2\"")), "{asked:?}");
    assert!(asked.iter().flatten().all(|tag| tag == "\"e2\""), "{asked:?}");
    // It leads nowhere any more.
    home.set("/start", Reply::json("3").etag("\"e1\""));
    ws.event_with("s", "3");
    polled(&home, "/start");
    polled(&home, "/start");
    assert!(sent(&home, "/start").iter().flatten().all(|tag| tag == "\"e1\""));
    // A place that answers a condition which was never put to it does not confirm the value of another.
    home.set("/start", to("/nothing"));
    home.set("/nothing", Reply::status(304));
    let status = ws.next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("stale"), &json!("UPSTREAM_PROTOCOL")), "{status}");
}

// Pages.

#[test]
fn pages_become_one_value_or_none() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    let page = |items: &str, next: &str| {
        Reply::json(items).header("Link", &format!("<{next}>; rel=\"next\"")).etag("\"same\"")
    };
    upstream.set("/p1", page("[1,2]", "/p2"));
    upstream.set("/p2", page(" [ ] ", &upstream.url("/p3")));
    upstream.set("/p3", Reply::json("[3]").header("Link", "</p1>; rel=\"first\""));
    upstream.set("/loop", page("[1]", "/loop"));
    upstream.set("/away", page("[1]", "https://localhost/p2"));
    upstream.set("/object", page("[1]", "/one"));
    upstream.set_json("/one", "{\"a\":1}");
    upstream.set("/huge", page("[1]", "/big"));
    upstream.set_json("/big", &format!("[\"{}\"]", "x".repeat(3_000)));
    let lines = |max: u32| format!("{ca}\npages_max = {max}\nresponse_bytes_max = \"2KiB\"\nbackoff_max = \"100ms\"");
    let mut setup = Setup::new();
    for (id, path, max) in [
        ("all", "/p1", 5),
        ("two", "/p1", 2),
        ("one", "/p1", 1),
        ("loop", "/loop", 5),
        ("away", "/away", 5),
        ("object", "/object", 5),
        ("huge", "/huge", 5),
    ] {
        setup = setup.stream(id, &upstream.url(path), &lines(max));
    }
    let server = setup.start();
    for (id, code) in [
        ("loop", "UPSTREAM_REDIRECT"),
        ("away", "UPSTREAM_REDIRECT"),
        ("object", "UPSTREAM_BODY"),
        ("huge", "UPSTREAM_TOO_LARGE"),
    ] {
        assert_eq!(open(&server, id).next_of("stream_status").json()["code"], code, "{id}");
    }
    open(&server, "one").event_with("one", "[1,2]");
    let mut two = open(&server, "two");
    two.event_with("two", "[1,2]");
    // That there is more is no secret, and is said once.
    for _ in 0..3 {
        polled(&upstream, "/p1");
    }
    let cut = "more pages than stream.pages_max";
    assert_eq!(server.log_count(cut), 1, "{}", server.log_text());
    let mut all = open(&server, "all");
    all.event_with("all", "[1,2,3]");
    // A change of a later page is seen though the first is as it was.
    upstream.set("/p3", Reply::json("[3,4]"));
    all.event_with("all", "[1,2,3,4]");
    // A page that cannot be had is no shorter list.
    upstream.set("/p2", Reply::status(500));
    let status: Value = all.next_of("stream_status").json();
    assert_eq!(
        (&status["state"], &status["code"], &status["status"]),
        (&json!("stale"), &json!("UPSTREAM_STATUS"), &json!(500))
    );
    assert_eq!(all.value("all"), "[1,2,3,4]");
    upstream.set("/p2", page("[9]", "/p3"));
    all.event_with("all", "[1,2,9,3,4]");
    let log = server.log_text();
    let line = log.lines().find(|line| line.contains(cut)).expect("it was said");
    assert!(line.contains("two") && server.log_count(cut) == 1, "{line}");
}

// The breaker.

#[test]
fn an_upstream_that_is_down_is_tried_by_one_request_at_a_time_and_then_comes_back_to_all() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    let mut setup = Setup::new();
    for n in 0..40 {
        upstream.set(&format!("/{n}"), Reply::status(502));
        setup = setup.stream(&format!("s{n}"), &upstream.url(&format!("/{n}")), &ca);
    }
    let server = setup.start();
    let mut watchers: Vec<Watcher> = (0..40).map(|n| open(&server, &format!("s{n}"))).collect();
    for watcher in &mut watchers {
        let status = watcher.next_of("stream_status").json();
        assert_eq!((&status["code"], &status["status"]), (&json!("UPSTREAM_STATUS"), &json!(502)), "{status}");
    }
    let before = upstream.request_count();
    watch_for(Duration::from_secs(3));
    let tried = upstream.request_count() - before;
    assert!(tried <= 4, "after 1, 2 and 4 s one each, not {tried}");
    for n in 0..40 {
        upstream.set_json(&format!("/{n}"), &n.to_string());
    }
    let deadline = Instant::now() + 6 * PATIENCE;
    for (n, watcher) in watchers.iter_mut().enumerate() {
        watcher.event_with(&format!("s{n}"), &n.to_string());
        assert!(Instant::now() < deadline);
    }
}

// Upstreams that speak a stream.

const SSE: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

fn chunk(text: &str) -> Step {
    Step::Send(format!("{:x}\r\n{text}\r\n", text.len()).into_bytes())
}

fn head(text: &str) -> Step {
    Step::Send(text.as_bytes().to_vec())
}

#[test]
fn an_event_stream_is_followed_gone_on_with_and_let_go() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    let pause = || Step::Pause(Duration::from_millis(300));
    upstream.once(
        "/ticks",
        Reply::steps(vec![
            head(SSE),
            chunk(": hello\nretry: 100\n\nid: 1\ndata: {\"n\":1}\n\n"),
            pause(),
            chunk("id: 2\nevent: tick\ndata: {\"n\":\ndata: 2}\n\nevent: ping\ndata: {}\n\n"),
            pause(),
            Step::Send(b"0\r\n\r\n".to_vec()),
            Step::Close,
        ]),
    );
    upstream
        .once("/ticks", Reply::steps(vec![head(SSE), pause(), chunk("id: 3\nevent: tick\ndata: 3\n\n"), Step::Stall]));
    upstream.set("/ticks", Reply::steps(vec![head(SSE), Step::Stall]));
    let lines = format!(
        "{ca}\nkind = \"sse\"\nevents = [\"message\", \"tick\"]\nlinger = \"300ms\"\nheaders = {{ Authorization = \"Bearer k\" }}"
    );
    let server = Setup::new().stream("ticks", &upstream.url("/ticks"), &lines).start();
    let mut watcher = open(&server, "ticks");
    watcher.event_with("ticks", "{\"n\":1}");
    watcher.event_with("ticks", "{\"n\":2}");
    let status = watcher.next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("stale"), &json!("UPSTREAM_UNREACHABLE")));
    assert_eq!(watcher.next_of("stream_status").json()["state"], "live", "it is reached again");
    watcher.event_with("ticks", "3");
    let seen = upstream.requests();
    let of = |name: &str| seen.iter().map(|request| request.header(name)).collect::<Vec<_>>();
    assert_eq!(of("accept"), [Some("text/event-stream"); 2]);
    assert_eq!(of("last-event-id"), [None, Some("2")]);
    assert_eq!(of("authorization"), [Some("Bearer k"); 2]);
    drop(watcher);
    upstream.wait_for_open_connections(0, PATIENCE);
    // Whoever returns gets what is held, and the upstream is asked to go on.
    let mut watcher = open(&server, "ticks");
    watcher.event_with("ticks", "3");
    upstream.wait_for_requests(3, PATIENCE);
    assert_eq!(upstream.requests()[2].header("last-event-id"), Some("3"));
}

#[test]
fn ids_that_cannot_be_sent_ids_without_values_and_retries_are_as_a_browser_has_them() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    let pause = || Step::Pause(Duration::from_millis(300));
    let end = || [Step::Send(b"0\r\n\r\n".to_vec()), Step::Close];
    let connection = |chunks: Vec<Step>| Reply::steps([vec![head(SSE)], chunks, end().to_vec()].concat());
    upstream.once("/ticks", connection(vec![chunk("id: a\u{1}b\ndata: 1\n\n"), pause()]));
    let moved = vec![chunk("id: 1\ndata: 2\n\n"), pause(), chunk("retry: 1500\nid: 2\n\n"), pause()];
    upstream.once("/ticks", connection(moved));
    upstream.set("/ticks", Reply::steps(vec![head(SSE), chunk("data: 3\n\n"), Step::Stall]));
    let lines = format!("{ca}\nkind = \"sse\"\nbackoff_max = \"100ms\"");
    let server = Setup::new().stream("ticks", &upstream.url("/ticks"), &lines).start();
    let mut watcher = open(&server, "ticks");
    // The value may come with the head of the answer, or behind it.
    let next = |watcher: &mut Watcher, member: &str, of: &Value| loop {
        let frame = watcher.next().json();
        if frame[member] == *of {
            break frame;
        }
    };
    assert_eq!(next(&mut watcher, "data", &json!(1))["seq"], 1);
    next(&mut watcher, "state", &json!("stale"));
    assert_eq!(next(&mut watcher, "data", &json!(2))["seq"], 2);
    let stale = next(&mut watcher, "state", &json!("stale"));
    let retry_in = stale["retry_in_ms"].as_u64().expect("it is tried again");
    assert!((1_000..=1_500).contains(&retry_in), "{stale}");
    assert_eq!(next(&mut watcher, "data", &json!(3))["seq"], 3);
    let seen = upstream.requests();
    let ids: Vec<_> = seen.iter().map(|request| request.header("last-event-id")).collect();
    assert_eq!(ids, [None, None, Some("2")]);
    assert!(seen[2].at - seen[1].at >= Duration::from_millis(1_500 + 500), "{:?}", seen[2].at - seen[1].at);
}

#[test]
fn events_that_come_too_fast_are_conflated_to_the_newest() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    let mut steps = vec![head(SSE)];
    for n in 0..=200 {
        steps.extend([chunk(&format!("data: {n}\n\n")), Step::Pause(Duration::from_millis(5))]);
    }
    steps.push(Step::Stall);
    upstream.set("/ticks", Reply::steps(steps));
    let lines = format!("{ca}\nkind = \"sse\"\nevents_per_second = 5");
    let server = Setup::new().stream("ticks", &upstream.url("/ticks"), &lines).start();
    let mut watcher = open(&server, "ticks");
    let begun = Instant::now();
    let last = watcher.event_with("ticks", "200").seq();
    let most = 2 + begun.elapsed().as_millis() as u64 / 190;
    assert!(last <= most, "{last} values in {:?}", begun.elapsed());
    assert_eq!(upstream.request_count(), 1);
}

#[test]
fn lines_of_json_are_followed_and_silence_is_an_end() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    let ndjson = SSE.replace("text/event-stream", "application/x-ndjson");
    upstream.once("/lines", Reply::steps(vec![head(&ndjson), chunk("{\"n\":1}\n{\"n\""), Step::Stall]));
    upstream.set("/lines", Reply::steps(vec![head(&ndjson), chunk("\n{\"n\":3}\r\n"), Step::Stall]));
    let lines = format!("{ca}\nkind = \"ndjson\"\nidle_timeout = \"500ms\"");
    let server = Setup::new().stream("lines", &upstream.url("/lines"), &lines).start();
    let mut watcher = open(&server, "lines");
    watcher.event_with("lines", "{\"n\":1}");
    let status = watcher.next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("stale"), &json!("UPSTREAM_TIMEOUT")));
    // The value may come with the head of the answer, or behind it.
    let frames = [watcher.next(), watcher.next()];
    let of = |kind: &str| frames.iter().find(|frame| frame.kind() == kind).unwrap_or_else(|| panic!("{frames:?}"));
    assert_eq!(of("stream_status").json()["state"], "live");
    assert_eq!(of("snapshot").json()["data"], json!({ "n": 3 }));
}

#[test]
fn what_is_no_stream_or_no_value_is_said() {
    let (upstream, ca, _folder) = Upstream::start_trusted();
    upstream.set_json("/json", "1");
    upstream.set("/denied", Reply::status(401));
    upstream
        .set("/huge", Reply::steps(vec![head(SSE), chunk(&format!("data: \"{}\n", "x".repeat(3_000))), Step::Stall]));
    let broken = [chunk("data: {\n\n"), Step::Pause(Duration::from_secs(1)), chunk("data: 7\n\n"), Step::Stall];
    upstream.set("/broken", Reply::steps([vec![head(SSE)], broken.to_vec()].concat()));
    let lines = format!("{ca}\nkind = \"sse\"\nresponse_bytes_max = \"2KiB\"");
    let mut setup = Setup::new();
    for id in ["json", "denied", "huge", "broken"] {
        setup = setup.stream(id, &upstream.url(&format!("/{id}")), &lines);
    }
    let server = setup.start();
    let mut watchers = ["json", "denied", "huge", "broken"].map(|id| open(&server, id));
    for (watcher, code) in
        watchers.iter_mut().zip(["UPSTREAM_BODY", "UPSTREAM_AUTH", "UPSTREAM_TOO_LARGE", "UPSTREAM_BODY"])
    {
        let status = watcher.next_of("stream_status").json();
        assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!(code)), "{status}");
    }
    let [_, _, _, broken] = &mut watchers;
    broken.event_with("broken", "7");
    assert_eq!(requests_for(&upstream, "/broken").len(), 1, "the connection was kept");
}
