//! Many streams of one upstream against the built server: spread polls, and none is forgotten.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use support::Upstream;
use support::server::{DRIVERS, PATIENCE, Server, Setup};
use watcher::{Over, Watcher};

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

/// A value of about 100 KB of which each `n` makes half another.
fn large(n: u64) -> String {
    let part = |place: u64| {
        let letter =
            char::from(b'a' + u8::try_from((if place.is_multiple_of(2) { n } else { 0 }) % 26).expect("small"));
        format!("\"{}\"", String::from(letter).repeat(5_000))
    };
    format!(r#"{{"n":{n},"parts":[{}]}}"#, (0..20).map(part).collect::<Vec<_>>().join(","))
}

/// Does something when it is dropped, by a panic too.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn a_slow_reader_that_comes_and_goes_among_large_streams_gets_whole_frames_that_follow_on() {
    const LARGE: usize = 8;
    for (driver, seed) in DRIVERS.into_iter().zip([7u64, 8]) {
        let upstream = Upstream::start();
        let mut setup = Setup::new().limits("messages_per_second = 1000");
        for n in 0..LARGE {
            upstream.set_json(&format!("/s{n}"), &large(0));
            let lines = "interval = \"30ms\"\nhistory_bytes = \"256KiB\"";
            setup = setup.stream(&format!("s{n}"), &upstream.url(&format!("/s{n}")), lines);
        }
        let server = setup.driver(driver).start();
        let mut ws = Watcher::narrow(&server, Over::Ws, "/v1/ws");
        let mut random = seed;
        let mut below = move |limit: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % limit
        };
        let mut wanted = [false; LARGE];
        let mut holds = [false; LARGE];
        let toggle = |ws: &mut Watcher, n: usize, wanted: &mut [bool], below: &mut dyn FnMut(u64) -> u64| {
            let stream = format!("s{n}");
            wanted[n] = !wanted[n];
            if !wanted[n] {
                return ws.send(&json!({"type":"unsubscribe","stream":stream}).to_string());
            }
            let format = ["patch", "merge", "full"][usize::try_from(below(3)).expect("small")];
            let rate = [0, 0, 0, 50][usize::try_from(below(4)).expect("small")];
            let since = (below(3) == 0).then(|| ws.held.get(&stream)).flatten();
            let since = since.map(|held| format!("{}-{}", held.epoch, held.seq));
            let mut message = json!({"type":"subscribe","stream":stream,"format":format,"max_rate_ms":rate});
            match since {
                Some(since) => message["since"] = since.into(),
                // It may begin anywhere, but not before what is asked for now.
                None => ws.forget(&stream),
            }
            ws.send(&message.to_string());
        };
        for n in 0..LARGE {
            toggle(&mut ws, n, &mut wanted, &mut below);
        }
        let take = |ws: &mut Watcher, holds: &mut [bool]| {
            let frame = ws.next();
            let n: usize = frame.stream()[1..].parse().expect("a number");
            match &*frame.kind() {
                "subscribed" => holds[n] = true,
                "unsubscribed" => holds[n] = false,
                _ => {
                    assert!(holds[n], "a frame of a stream that is not held: {}", &frame.text[..100]);
                    ws.follow(&frame);
                }
            }
        };
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Whatever goes wrong here ends the thread as well.
            let over = OnDrop(|| done.store(true, Ordering::Relaxed));
            let last = scope.spawn(|| {
                let mut n = 0;
                while !done.load(Ordering::Relaxed) {
                    n += 1;
                    for stream in 0..LARGE {
                        upstream.set_json(&format!("/s{stream}"), &large(n));
                    }
                    std::thread::sleep(Duration::from_millis(40));
                }
                n
            });
            for turn in 1..=400 {
                take(&mut ws, &mut holds);
                if turn % 7 == 0 {
                    // Only what has been answered is asked about again, and half of them stay.
                    let few = wanted.iter().filter(|wanted| **wanted).count() <= LARGE / 2;
                    let n = usize::try_from(below(LARGE as u64)).expect("small");
                    if holds[n] == wanted[n] && !(few && wanted[n]) {
                        toggle(&mut ws, n, &mut wanted, &mut below);
                    }
                }
                if turn % 40 == 0 {
                    std::thread::sleep(Duration::from_millis(300));
                }
            }
            drop(over);
            let last = watcher::canonical(&large(last.join().expect("no panic")));
            for n in 0..LARGE {
                while holds[n] != wanted[n] {
                    take(&mut ws, &mut holds);
                }
                if !wanted[n] {
                    ws.forget(&format!("s{n}"));
                    toggle(&mut ws, n, &mut wanted, &mut below);
                }
            }
            let is_last = |ws: &Watcher, n: usize| {
                ws.held.get(&format!("s{n}")).is_some_and(|held| watcher::canonical(&held.value) == last)
            };
            while (0..LARGE).any(|n| !holds[n] || !is_last(&ws, n)) {
                take(&mut ws, &mut holds);
            }
            assert!(server.metric(&["restcast_conflations_total"]) >= 1.0, "it was never slow");
            assert_eq!(server.metric(&["restcast_panics_total"]), 0.0);
        });
    }
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

#[test]
fn streams_that_nobody_has_watched_for_a_while_do_not_count() {
    let upstream = Upstream::start();
    let names = ["a", "b", "c", "d", "e", "f"];
    let url = upstream.url("/{query.name}");
    let server =
        Setup::new().cores(2).limits("streams = 1").stream("any", &url, "params = [\"name\"]\nlinger = \"0s\"").start();
    let token = support::server::bearer(&support::server::token_of("u1"));
    // Whichever core each of them belongs to, the one before it has made place.
    for name in names {
        upstream.set_json(&format!("/{name}"), "[1]");
        support::server::eventually("there is room", || {
            let answer = server.get(&format!("/v1/streams/any?name={name}"), std::slice::from_ref(&token));
            (answer.status == 200).then_some(())
        });
    }
}

#[test]
fn two_processes_share_a_port_when_both_are_told_to() {
    let upstream = Upstream::start();
    upstream.set_json("/s", "[1]");
    let setup = |listen: &str| {
        Setup::new().server(&format!("share_port = true\nlisten = \"{listen}\"")).stream(
            "s",
            &upstream.url("/s"),
            "interval = \"50ms\"",
        )
    };
    let first = setup("127.0.0.1:0").start();
    let second = setup(&first.listen.to_string()).start();
    assert_eq!(first.listen, second.listen);
    // The kernel spreads connections by their ports: a hundred of them do not all go to one of two processes.
    let watchers: Vec<Watcher> = (0..100).map(|_| Watcher::ws(&first, "/v1/streams/s")).collect();
    let held = |server: &Server| server.metric(&["restcast_connections{", "transport=\"ws\""]);
    assert!(held(&first) > 0.0 && held(&second) > 0.0, "{} and {}", held(&first), held(&second));
    drop(watchers);
}
