//! Resuming, rated and slow readers against the built server: nothing is lost, and nothing is queued without end.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::time::{Duration, Instant};

use serde_json::json;
use socket2::SockRef;

use support::server::{DRIVERS, Server, Setup, bearer, eventually, token_of};
use support::{Reply, Upstream};
use watcher::{Held, Over, Watcher, canonical, on_core, polled, polls_end};

const LEADS: &str = "/v1/streams/leads";
const FORMATS: [&str; 3] = ["patch", "merge", "full"];

/// A value that is long enough for a change of `n` to be a delta.
fn leads(n: u64) -> String {
    format!(r#"{{"n":{n},"rest":"{}"}}"#, "x".repeat(200))
}

fn of_leads(upstream: &Upstream, driver: &str, lines: &str) -> Server {
    upstream.set_json("/leads", &leads(1));
    Setup::new().driver(driver).stream("leads", &upstream.url("/leads"), lines).start()
}

/// Changes the value to those numbers in turn, each taken in before the next.
fn change(upstream: &Upstream, numbers: std::ops::RangeInclusive<u64>) {
    for n in numbers {
        upstream.set_json("/leads", &leads(n));
        polled(upstream, "/leads");
    }
}

/// Opens `leads` in `format` again after what is `held`: by `since` over a WebSocket, by `Last-Event-ID` over SSE.
fn again(server: &Server, over: Over, format: &str, held: &Held) -> Watcher {
    let point = format!("{}-{}", held.epoch, held.seq);
    let token = bearer(&token_of("u1"));
    let mut watcher = match over {
        Over::Ws => Watcher::open(server, over, &format!("{LEADS}?format={format}&since={point}"), &[token]),
        // `Last-Event-ID` beats `since`.
        Over::Sse => {
            let path = format!("{LEADS}?format={format}&since={}-1", held.epoch);
            Watcher::open(server, over, &path, &[token, ("Last-Event-ID", point)])
        }
    };
    watcher.resume("leads", held);
    watcher
}

/// Reads the first value, and goes away.
fn visit(server: &Server) -> Held {
    let mut watcher = Watcher::ws(server, LEADS);
    watcher.event();
    watcher.holding("leads").clone()
}

/// Waits until nobody is subscribed.
fn all_gone(server: &Server) {
    eventually("nobody is subscribed", || (server.metric(&["restcast_subscriptions"]) == 0.0).then_some(()));
}

// Resume.

#[test]
fn a_client_that_returns_gets_exactly_what_it_missed_in_every_format_on_every_core() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = of_leads(&upstream, driver, "");
        let held = visit(&server);
        all_gone(&server);
        change(&upstream, 2..=6);
        for over in [Over::Ws, Over::Sse] {
            for format in FORMATS {
                for core in 0..2 {
                    let mut watcher = on_core(&server, core, |server| again(server, over, format, &held));
                    let seqs: Vec<u64> = watcher.events_to(6).iter().map(|frame| frame.seq()).collect();
                    assert_eq!(seqs, [2, 3, 4, 5, 6], "{over:?} {format}");
                    assert_eq!(watcher.value("leads"), canonical(&leads(6)));
                    assert_eq!(watcher.holding("leads").epoch, held.epoch);
                }
            }
        }
    }
}

#[test]
fn what_is_resumed_is_byte_identical_to_what_was_sent_live() {
    let upstream = Upstream::start();
    let server = of_leads(&upstream, "auto", "");
    for over in [Over::Ws, Over::Sse] {
        for format in FORMATS {
            let mut live =
                Watcher::open(&server, over, &format!("{LEADS}?format={format}"), &[bearer(&token_of("u1"))]);
            let first = live.event();
            let held = live.holding("leads").clone();
            change(&upstream, first.seq() + 1..=first.seq() + 3);
            let sent = live.events_to(first.seq() + 3);
            assert_eq!(again(&server, over, format, &held).events_to(first.seq() + 3), sent);
        }
    }
}

#[test]
fn whoever_has_the_newest_gets_no_event() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = of_leads(&upstream, driver, "");
        let held = visit(&server);
        for (n, format) in FORMATS.into_iter().enumerate() {
            let n = n as u64;
            let mut watchers = [Over::Ws, Over::Sse].map(|over| {
                let mut held = held.clone();
                (held.seq, held.value) = (n + 1, leads(n + 1));
                again(&server, over, format, &held)
            });
            upstream.set_json("/leads", &leads(n + 2));
            for watcher in &mut watchers {
                assert_eq!(watcher.event().seq(), n + 2, "the next event is the first");
            }
        }
    }
}

#[test]
fn a_place_one_cannot_resume_from_is_answered_by_a_snapshot() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = of_leads(&upstream, driver, "");
        let epoch = visit(&server).epoch;
        change(&upstream, 2..=3);
        let token = bearer(&token_of("u1"));
        let ahead = format!("{epoch}-4");
        let foreign = format!("{}-2", "a".repeat(13));
        let huge = format!("{epoch}-99999999999999999999999");
        for point in
            [&*ahead, &foreign, &huge, "", "-", "nonsense", &epoch, &format!("{epoch}-"), &format!("{epoch}--1")]
        {
            let mut ws =
                Watcher::open(&server, Over::Ws, &format!("{LEADS}?since={point}"), std::slice::from_ref(&token));
            let mut sse =
                Watcher::open(&server, Over::Sse, LEADS, &[token.clone(), ("Last-Event-ID", point.to_owned())]);
            for watcher in [&mut ws, &mut sse] {
                let frame = watcher.event();
                assert_eq!((frame.kind(), frame.seq()), ("snapshot".into(), 3), "{point:?}");
            }
        }
        // `since` is not looked at where there is a `Last-Event-ID`, not even a bad one.
        let path = format!("{LEADS}?since={epoch}-2");
        let mut sse = Watcher::open(&server, Over::Sse, &path, &[token, ("Last-Event-ID", "x".into())]);
        assert_eq!(sse.event().kind(), "snapshot");
    }
}

#[test]
fn one_that_missed_more_than_the_history_holds_gets_a_snapshot() {
    let upstream = Upstream::start();
    let server = of_leads(&upstream, "auto", "history = 3");
    let held = visit(&server);
    change(&upstream, 2..=5);
    for over in [Over::Ws, Over::Sse] {
        for format in FORMATS {
            // The history is 3, 4, 5: who has 2 can go on, who has 1 cannot.
            let kept = Held { seq: 2, value: leads(2), ..held.clone() };
            let seqs: Vec<u64> = again(&server, over, format, &kept).events_to(5).iter().map(|f| f.seq()).collect();
            assert_eq!(seqs, [3, 4, 5], "{over:?} {format}");
            if over == Over::Ws || format == "full" {
                let path = format!("{LEADS}?format={format}&since={}-1", held.epoch);
                let frame = Watcher::ws(&server, &path).event();
                assert_eq!((frame.kind(), frame.seq()), ("snapshot".into(), 5), "{over:?} {format}");
            }
        }
    }
}

#[test]
fn a_history_of_few_bytes_keeps_the_deltas_longest() {
    let upstream = Upstream::start();
    // Five values of 200 bytes do not fit, their deltas do.
    let server = of_leads(&upstream, "auto", "history_bytes = 1500");
    let held = visit(&server);
    change(&upstream, 2..=5);
    let seqs: Vec<u64> =
        again(&server, Over::Ws, "patch", &held).events_to(5).iter().map(|frame| frame.seq()).collect();
    assert_eq!(seqs, [2, 3, 4, 5]);
    let path = format!("{LEADS}?format=full&since={}-1", held.epoch);
    assert_eq!(Watcher::ws(&server, &path).event().seq(), 5, "the values are gone: the newest");
}

#[test]
fn history_outlives_the_last_subscriber_and_the_end_of_polling() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = of_leads(&upstream, driver, "linger = \"10ms\"");
        let mut watcher = Watcher::ws(&server, LEADS);
        watcher.event();
        let held = watcher.holding("leads").clone();
        change(&upstream, 2..=4);
        drop(watcher);
        // Cores forget their copies of a history some seconds after its last watcher; its owner does not.
        polls_end(&upstream, "/leads", Duration::from_secs(6));
        for core in 0..2 {
            let mut back = on_core(&server, core, |server| again(server, Over::Ws, "patch", &held));
            assert_eq!(back.events_to(4).iter().map(|frame| frame.seq()).collect::<Vec<_>>(), [2, 3, 4]);
        }
        let mut back = again(&server, Over::Sse, "merge", &Held { seq: 4, value: leads(4), ..held });
        upstream.set_json("/leads", &leads(5));
        assert_eq!((back.event().kind(), back.value("leads")), ("merge".into(), canonical(&leads(5))));
    }
}

#[test]
fn subscriptions_of_one_connection_resume_each_from_its_own_place() {
    let upstream = Upstream::start();
    upstream.set_json("/other", "[1]");
    upstream.set_json("/leads", &leads(1));
    let server =
        Setup::new().stream("leads", &upstream.url("/leads"), "").stream("other", &upstream.url("/other"), "").start();
    let held = visit(&server);
    change(&upstream, 2..=4);
    let mut ws = Watcher::ws(&server, "/v1/ws");
    ws.resume("leads", &held);
    let since = format!("{}-1", held.epoch);
    ws.send(&json!({"type":"subscribe","stream":"leads","format":"merge","since":since,"id":1}).to_string());
    ws.next_of("subscribed");
    assert_eq!(ws.events_to(4).iter().map(|frame| frame.kind()).collect::<Vec<_>>(), ["merge"; 3]);
    // A place in another stream's sequence is none in this one's.
    ws.send(&json!({"type":"subscribe","stream":"other","since":since,"id":2}).to_string());
    ws.next_of("subscribed");
    let frame = ws.event();
    assert_eq!((frame.kind(), frame.stream()), ("snapshot".into(), "other".into()));
}

// Rated readers.

#[test]
fn a_rated_reader_gets_one_waiting_event_as_itself_and_several_as_a_snapshot() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = of_leads(&upstream, driver, "");
        let mut live = Watcher::ws(&server, LEADS);
        live.event();
        for over in [Over::Ws, Over::Sse] {
            // A machine may be too busy to be in time at any one time, but not each time.
            let in_time = (0..5).any(|_| is_rated_in_time(&upstream, &server, over, &mut live));
            assert!(in_time, "{driver} {over:?}: what may go at once waits");
        }
    }
}

/// Whether all came to a rated reader before what came next was due; panics if any of it came too early, or not as it should.
fn is_rated_in_time(upstream: &Upstream, server: &Server, over: Over, live: &mut Watcher) -> bool {
    const RATE: Duration = Duration::from_millis(2000);
    let head = live.holding("leads").seq;
    let mut change = |n: u64| {
        upstream.set_json("/leads", &leads(n));
        live.event();
    };
    let begun = Instant::now();
    let mut rated = Watcher::open(server, over, &format!("{LEADS}?max_rate_ms=2000"), &[bearer(&token_of("u1"))]);
    assert_eq!(rated.event().seq(), head);

    change(head + 1);
    let waiting = rated.event();
    assert_eq!((waiting.kind(), waiting.seq()), ("patch".into(), head + 1), "one is sent as itself");
    assert!(begun.elapsed() >= RATE, "{:?}", begun.elapsed());

    (head + 2..=head + 4).for_each(&mut change);
    if begun.elapsed() >= RATE * 2 {
        return false; // One of them may have been due before the last was there.
    }
    let waiting = rated.event();
    assert_eq!((waiting.kind(), waiting.seq()), ("snapshot".into(), head + 4), "several are sent as one");
    assert!(begun.elapsed() >= RATE * 2, "{:?}", begun.elapsed());

    // After a quiet while the next one need not wait.
    assert!(rated.is_quiet_for(RATE), "nothing waits");
    let begun = Instant::now();
    change(head + 5);
    let next = rated.event();
    assert_eq!((next.kind(), next.seq()), ("patch".into(), head + 5));
    begun.elapsed() < RATE / 2
}

#[test]
fn a_rated_reader_hears_of_a_failure_and_resumes() {
    let upstream = Upstream::start();
    let server = of_leads(&upstream, "auto", "backoff_max = \"20ms\"");
    let held = visit(&server);
    change(&upstream, 2..=2);
    // One was missed: it comes as itself, at once.
    let path = format!("{LEADS}?max_rate_ms=3600000&since={}-1", held.epoch);
    let mut rated = Watcher::ws(&server, &path);
    rated.resume("leads", &held);
    assert_eq!(rated.event().kind(), "patch");
    upstream.set("/leads", Reply::status(500));
    assert_eq!(rated.next_of("stream_status").json()["state"], "stale");
    upstream.set_json("/leads", &leads(3));
    assert_eq!(rated.next_of("stream_status").json()["state"], "live", "events wait, states do not");
    // Several were missed: one snapshot of the newest.
    let mut rated = Watcher::ws(&server, &path);
    let frame = rated.event();
    assert_eq!((frame.kind(), frame.seq()), ("snapshot".into(), 3));
}

// Slow readers.

/// A value of about 200 KB of which the `n`-th change touches half.
fn large(n: u64) -> String {
    let part = |place: u64| {
        let letter =
            char::from(b'a' + u8::try_from((if place.is_multiple_of(2) { n } else { 0 }) % 26).expect("small"));
        format!("\"{}\"", String::from(letter).repeat(10_000))
    };
    format!(r#"{{"n":{n},"parts":[{}]}}"#, (0..20).map(part).collect::<Vec<_>>().join(","))
}

fn of_large(upstream: &Upstream, driver: &str, limits: &str, lines: &str) -> Server {
    upstream.set_json("/leads", &large(1));
    Setup::new().driver(driver).cores(1).limits(limits).stream("leads", &upstream.url("/leads"), lines).start()
}

#[test]
fn a_reader_that_stops_is_conflated_when_it_reads_again_and_others_lose_nothing() {
    for driver in DRIVERS {
        for over in [Over::Ws, Over::Sse] {
            let upstream = Upstream::start();
            let server = of_large(&upstream, driver, "", "history_bytes = \"512KiB\"");
            let mut healthy = Watcher::ws(&server, LEADS);
            healthy.event();
            let mut slow = Watcher::narrow(&server, over, LEADS);
            slow.event();
            for n in 2..=30 {
                upstream.set_json("/leads", &large(n));
                let frame = healthy.event();
                assert_eq!((frame.kind(), frame.seq()), ("patch".into(), n));
            }
            // What its socket held, whole frames each of which follows on; then the newest in place of what it missed.
            // (Where the kernel took more after all, that may have happened twice.)
            let frames = slow.events_to(30);
            let mut before = 1;
            for frame in &frames {
                let (kind, seq) = (frame.kind(), frame.seq());
                assert!(
                    if kind == "patch" { seq == before + 1 } else { seq > before + 1 },
                    "{kind} {seq} after {before}"
                );
                before = seq;
            }
            assert!(frames.iter().any(|frame| frame.kind() == "snapshot"), "nothing was conflated");
            assert!(frames.len() < 20, "{} events were queued", frames.len());
            assert_eq!(slow.value("leads"), canonical(&large(30)));
            assert!(server.metric(&["restcast_conflations_total"]) >= 1.0);
            upstream.set_json("/leads", &large(31));
            for watcher in [&mut healthy, &mut slow] {
                let frame = watcher.event();
                assert_eq!((frame.kind(), frame.seq()), ("patch".into(), 31), "it goes on as before");
                assert_eq!(watcher.value("leads"), canonical(&large(31)));
            }
        }
    }
}

#[test]
fn a_socket_that_takes_nothing_is_closed_and_others_lose_nothing() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = of_large(&upstream, driver, "write_stall = \"1s\"", "history_bytes = \"512KiB\"");
        let mut healthy = Watcher::ws(&server, LEADS);
        healthy.event();
        let mut slow = Watcher::narrow(&server, Over::Ws, LEADS);
        slow.event();
        let mut n = 1;
        let begun = Instant::now();
        while server.metric(&["restcast_closes_total", "1013", "write_stall"]) < 1.0 {
            assert!(begun.elapsed() < support::server::PATIENCE, "it is never closed");
            n += 1;
            upstream.set_json("/leads", &large(n));
            assert_eq!(healthy.event().seq(), n);
        }
        assert!(begun.elapsed() >= Duration::from_secs(1));
        eventually("it is let go of", || (server.metric(&["restcast_subscriptions"]) == 1.0).then_some(()));
        upstream.set_json("/leads", &large(n + 1));
        assert_eq!(healthy.event().seq(), n + 1);
    }
}

#[test]
fn an_answer_to_a_slow_reader_is_not_cut_off_by_idle_times() {
    let upstream = Upstream::start();
    let value = format!("[\"{}\"]", "x".repeat(3 << 20));
    upstream.set_json("/leads", &value);
    let setup = Setup::new().limits("keep_alive = \"100ms\"").stream("leads", &upstream.url("/leads"), "");
    let server = setup.start();
    for connection in ["keep-alive", "close"] {
        let mut raw = server.connect();
        SockRef::from(raw.socket()).set_recv_buffer_size(64 << 10).expect("an option");
        let (name, token) = bearer(&token_of("u1"));
        let request = format!("GET {LEADS} HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n{name}: {token}\r\n\r\n");
        raw.send(request.as_bytes());
        let head = raw.head();
        assert_eq!(head.header("content-length"), Some(value.len().to_string().as_str()), "{head:?}");
        // Longer than `keep_alive` and the second of grace together, never stalled.
        let mut body = Vec::new();
        while body.len() < value.len() {
            std::thread::sleep(Duration::from_millis(20));
            body.extend(raw.take((value.len() - body.len()).min(24 << 10)));
        }
        assert!(body == value.as_bytes(), "{connection}");
        assert!(raw.is_closed(), "{connection}: then it ends");
    }
}

#[test]
fn the_end_of_an_answer_that_the_kernel_holds_reaches_a_slow_reader() {
    let upstream = Upstream::start();
    let value = format!("[\"{}\"]", "x".repeat(300 << 10));
    upstream.set_json("/leads", &value);
    let setup = Setup::new().limits("keep_alive = \"100ms\"").stream("leads", &upstream.url("/leads"), "");
    let server = setup.start();
    let (server, value) = (&server, &value);
    std::thread::scope(|scope| {
        for connection in ["keep-alive", "close"] {
            scope.spawn(move || {
                let mut raw = server.connect();
                SockRef::from(raw.socket()).set_recv_buffer_size(64 << 10).expect("an option");
                let (name, token) = bearer(&token_of("u1"));
                let request =
                    format!("GET {LEADS} HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n{name}: {token}\r\n\r\n");
                raw.send(request.as_bytes());
                raw.head();
                // The server is done with it long before the second of grace is over; the kernel is not.
                let mut body = Vec::new();
                while body.len() < value.len() {
                    std::thread::sleep(Duration::from_millis(150));
                    body.extend(raw.take((value.len() - body.len()).min(8 << 10)));
                }
                assert!(body == value.as_bytes(), "{connection}");
                assert!(raw.ends_in_order(), "{connection}: then it ends");
            });
        }
    });
}

#[test]
fn a_stalled_reader_that_reads_on_in_time_is_told_why_it_is_closed() {
    let upstream = Upstream::start();
    let server = of_large(&upstream, "auto", "write_stall = \"2s\"", "history_bytes = \"512KiB\"");
    // A second is all the time there is: a busy machine may miss it, but not again and again.
    assert!((0..5).any(|_| is_told_of_its_stall(&upstream, &server)), "nothing but resets");
}

/// Stalls, and reads on when the server has ended the subscription: whether there was a close frame before the reset.
fn is_told_of_its_stall(upstream: &Upstream, server: &Server) -> bool {
    let mut healthy = Watcher::ws(server, LEADS);
    let mut n = healthy.event().seq();
    let mut slow = Watcher::narrow(server, Over::Ws, LEADS);
    slow.event();
    for _ in 0..12 {
        n += 1;
        upstream.set_json("/leads", &large(n));
        healthy.event();
    }
    let subscribed = || server.metric(&["restcast_subscriptions"]);
    eventually("the stall is over", || (subscribed() == 1.0).then_some(()));
    let mut bytes = slow.raw().rest();
    drop(healthy);
    eventually("nobody is subscribed", || (subscribed() == 0.0).then_some(()));
    // Whole messages, to the end.
    loop {
        if bytes.len() < 4 {
            return false;
        }
        let (head, length) = match bytes[1] {
            127 if bytes.len() < 10 => return false,
            127 => (10, u64::from_be_bytes(bytes[2..10].try_into().expect("eight")) as usize),
            126 => (4, usize::from(u16::from_be_bytes([bytes[2], bytes[3]]))),
            length => (2, usize::from(length)),
        };
        if bytes.len() < head + length {
            return false;
        }
        let payload: Vec<u8> = bytes.drain(..head + length).skip(head).collect();
        if bytes.is_empty() && payload.len() < 126 {
            assert_eq!((u16::from_be_bytes([payload[0], payload[1]]), &payload[2..]), (1013, &b"write_stall"[..]));
            return true;
        }
        let frame: serde_json::Value = serde_json::from_slice(&payload).expect("a frame that has begun is finished");
        assert!(frame["seq"].is_u64(), "{frame}");
    }
}

#[test]
fn frames_that_only_stalled_readers_hold_are_bounded() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = of_large(&upstream, driver, "pinned_bytes = \"300KiB\"", "history_bytes = \"64KiB\"");
        let mut healthy = Watcher::ws(&server, LEADS);
        healthy.event();
        let mut stalled = Vec::new();
        let mut n = 1;
        let begun = Instant::now();
        // Each stalls in another event, of which it pins the frame.
        while server.metric(&["restcast_closes_total", "1013", "overloaded"]) < 1.0 {
            assert!(begun.elapsed() < support::server::PATIENCE, "pinned frames are not bounded");
            let mut slow = Watcher::narrow(&server, Over::Ws, LEADS);
            slow.event();
            stalled.push(slow);
            for _ in 0..8 {
                n += 1;
                upstream.set_json("/leads", &large(n));
                assert_eq!(healthy.event().seq(), n);
            }
            assert!(server.metric(&["restcast_pinned_bytes"]) <= f64::from(300 << 10), "within its bound");
        }
        assert!(stalled.len() >= 2, "one frame is within the bound");
        // The one that stalled first is gone: what its socket held, and then its end.
        stalled[0].raw().rest();
    }
}

#[test]
fn a_history_that_is_cut_for_want_of_room_is_cut_on_every_core() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", &large(1));
    let server = Setup::new()
        .limits("history_bytes_total = \"1MiB\"")
        .stream("leads", &upstream.url("/leads"), "history_bytes = \"16MiB\"")
        .start();
    let mut watchers = [0, 1].map(|core| on_core(&server, core, |server| Watcher::ws(server, LEADS)));
    for n in 1..=20 {
        upstream.set_json("/leads", &large(n));
        for watcher in &mut watchers {
            assert_eq!(watcher.event().seq(), n);
        }
    }
    let epoch = watchers[0].holding("leads").epoch.clone();
    // Half a MiB is a core's part: of twenty deltas of 100 KB each it holds a few, and so do the copies.
    for core in 0..2 {
        let path = format!("{LEADS}?since={epoch}-5");
        let frame = eventually("it is cut", || {
            let frame = on_core(&server, core, |server| Watcher::ws(server, &path)).next();
            (frame.kind() == "snapshot").then_some(frame)
        });
        assert_eq!((frame.seq(), frame.epoch()), (20, epoch.clone()));
        let held = Held { epoch: epoch.clone(), seq: 19, value: large(19) };
        let mut back = on_core(&server, core, |server| again(server, Over::Ws, "patch", &held));
        assert_eq!(back.event().kind(), "patch", "the newest stays");
    }
}

#[test]
fn the_histories_of_unwatched_streams_go_first() {
    let upstream = Upstream::start();
    for path in ["/a", "/b", "/c"] {
        upstream.set_json(path, &large(1));
    }
    let lines = "linger = \"10ms\"";
    let server = Setup::new()
        .cores(1)
        .limits("history_bytes_total = \"1MiB\"")
        .stream("a", &upstream.url("/a"), lines)
        .stream("b", &upstream.url("/b"), lines)
        .stream("c", &upstream.url("/c"), lines)
        .start();
    let first = |id: &str| Watcher::ws(&server, &format!("/v1/streams/{id}")).event();
    let (a, b) = (first("a"), first("b"));
    all_gone(&server);
    // A watched stream that grows takes the place of those that nobody watches, the longest unwatched first.
    let mut c = Watcher::ws(&server, "/v1/streams/c");
    c.event();
    for n in 2..=12 {
        upstream.set_json("/c", &large(n));
        assert_eq!(c.event().seq(), n);
        assert!(server.metric(&["restcast_history_bytes"]) <= f64::from(1 << 20), "within its bound");
    }
    drop(c);
    for (id, before) in [("a", &a), ("b", &b)] {
        let path = format!("/v1/streams/{id}?since={}", before.point());
        let frame = Watcher::ws(&server, &path).event();
        assert_eq!(frame.kind(), "snapshot", "it has been forgotten");
        assert_ne!(frame.epoch(), before.epoch(), "this is another life");
    }
}
