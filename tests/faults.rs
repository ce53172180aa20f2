//! Upstreams that fail, in every way that is known, against the built server: the last good value stays, the status says
//! so, nobody is closed, nothing else suffers, and all comes back by itself.

mod support;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use support::server::{Answer, DRIVERS, Heard, PATIENCE, Server, Setup, Ws, bearer, eventually, now_s, token_of};
use support::{Authority, Coding, Folder, Framing, Reply, Step, Upstream, self_signed};

/// Short time-outs, quick retries, a small cap: what a test can wait for.
const HASTY: &str = "interval = \"100ms\"\nbackoff_max = \"300ms\"\nconnect_timeout = \"2s\"\n\
                     first_byte_timeout = \"1s\"\ntimeout = \"2s\"\nresponse_bytes_max = \"256KiB\"\n";
/// What the server may hold at its worst in any test here, in KiB; a body that were taken whole would break it.
const MEMORY_KIB_MAX: u64 = 256 << 10;

/// A way to fail, and what it is called.
struct Fault {
    name: &'static str,
    reply: Reply,
    code: &'static str,
    status: Option<u16>,
}

fn faults() -> Vec<Fault> {
    let cut = |head: &str, last: Step| Reply::steps(vec![Step::Send(head.as_bytes().to_vec()), last]);
    let json = |text: &str| Reply::json(text);
    let second = Duration::from_secs(1);
    let plain: Vec<(&'static str, Reply, &'static str)> = vec![
        ("slow-first-byte", json("[1]").delay(60 * second), "UPSTREAM_TIMEOUT"),
        ("slow-body", json(&" ".repeat(4000)).drip(40, second / 5), "UPSTREAM_TIMEOUT"),
        ("silence", Reply::steps(vec![Step::Stall]), "UPSTREAM_TIMEOUT"),
        ("reset-at-once", Reply::steps(vec![Step::Reset]), "UPSTREAM_UNREACHABLE"),
        ("garbage", cut("\u{16}\u{3}\u{1} garbage\r\n\r\n", Step::Close), "UPSTREAM_PROTOCOL"),
        ("closed-at-once", Reply::steps(vec![Step::Close]), "UPSTREAM_PROTOCOL"),
        ("truncated", cut("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[1,2", Step::Close), "UPSTREAM_PROTOCOL"),
        ("reset-within", Reply::reset_within(10, 100), "UPSTREAM_PROTOCOL"),
        ("endless-headers", Reply::endless_headers(), "UPSTREAM_PROTOCOL"),
        ("partial", Reply::body("application/json", "[1]").with_status(206), "UPSTREAM_PROTOCOL"),
        ("html", Reply::body("text/html", "<!doctype html><p>It works!"), "UPSTREAM_BODY"),
        ("invalid-utf8", Reply::body("application/json", *b"[\"\xff\xfe\"]"), "UPSTREAM_BODY"),
        ("truncated-json", json("[1,2").framing(Framing::Close), "UPSTREAM_BODY"),
        ("two-values", json("[1] [2]"), "UPSTREAM_BODY"),
        ("duplicate-members", json(r#"{"a":1,"\u0061":2}"#), "UPSTREAM_BODY"),
        ("lone-surrogate", json(r#"["\ud800"]"#), "UPSTREAM_BODY"),
        ("depth-129", json(&nested(129)), "UPSTREAM_BODY"),
        ("empty", json(""), "UPSTREAM_BODY"),
        ("no-content", Reply::status(204), "UPSTREAM_BODY"),
        ("not-gzip", json("[1]").header("Content-Encoding", "gzip"), "UPSTREAM_BODY"),
        ("two-gibibytes", Reply::promise(2 << 30), "UPSTREAM_TOO_LARGE"),
        ("endless-chunks", Reply::endless_chunks(), "UPSTREAM_TOO_LARGE"),
        ("gzip-bomb", bomb(), "UPSTREAM_TOO_LARGE"),
        ("over-the-cap", json(&format!("\"{}\"", "x".repeat((256 << 10) - 1))), "UPSTREAM_TOO_LARGE"),
        ("unauthorized", Reply::status(401), "UPSTREAM_AUTH"),
        ("forbidden", Reply::status(403), "UPSTREAM_AUTH"),
        ("too-many-requests", Reply::status(429), "UPSTREAM_RATE_LIMITED"),
        ("unavailable-until", Reply::status(503).header("Retry-After", "0"), "UPSTREAM_RATE_LIMITED"),
        ("moved", Reply::status(301).header("Location", "/elsewhere"), "UPSTREAM_REDIRECT"),
        ("see-other", Reply::status(302).header("Location", "http://192.0.2.1/"), "UPSTREAM_REDIRECT"),
        ("permanent", Reply::status(308), "UPSTREAM_REDIRECT"),
    ];
    let statuses = [("not-found", 404), ("error", 500), ("bad-gateway", 502), ("unavailable", 503)];
    let plain = plain.into_iter().map(|(name, reply, code)| Fault { name, reply, code, status: None });
    let statuses = statuses.into_iter().map(|(name, status)| Fault {
        name,
        // An error page that happens to be JSON is no value.
        reply: Reply::json("[\"an error\"]").with_status(status),
        code: "UPSTREAM_STATUS",
        status: Some(status),
    });
    plain.chain(statuses).collect()
}

/// Arrays in arrays, so deep.
fn nested(depth: usize) -> String {
    format!("{}{}", "[".repeat(depth), "]".repeat(depth))
}

/// A gzip body of 400 MiB in some 400 KiB, more than the server may ever hold.
fn bomb() -> Reply {
    static MEMBER: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&vec![b' '; 4 << 20]).and_then(|()| encoder.finish()).expect("memory takes all")
    });
    Reply::body("application/json", MEMBER.repeat(100)).header("Content-Encoding", "gzip")
}

/// A watcher of one stream, and what it has been told.
struct Watcher {
    ws: Ws,
    value: Option<Value>,
    status: Value,
}

impl Watcher {
    fn of(server: &Server, stream: &str) -> Watcher {
        let path = format!("/v1/streams/{stream}?format=full");
        let mut ws = server.ws(&path, &[bearer(&token_of("u1"))]);
        assert_eq!(ws.next()["type"], "welcome");
        Watcher { ws, value: None, status: json!({ "state": "live" }) }
    }

    /// Reads on until `done`; a close, or anything but events and statuses, is a failure.
    fn until(&mut self, what: &str, done: impl Fn(&Watcher) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.ws.heard_within(left) {
                Some(Heard::Frame(frame)) if frame["type"] == "snapshot" => self.value = Some(frame["data"].clone()),
                Some(Heard::Frame(frame)) if frame["type"] == "stream_status" => self.status = frame,
                Some(Heard::Ping) => {}
                other => panic!("{what}: {other:?} after value {:?} and {}", self.value, self.status),
            }
        }
    }

    fn is(&self, state: &str) -> bool {
        self.status["state"] == state
    }
}

fn value_of(server: &Server, stream: &str) -> Answer {
    server.get(&format!("/v1/streams/{stream}"), &[bearer(&token_of("u1"))])
}

fn memory_kib_max(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("the process is there");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a high-water mark");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn assert_unharmed(server: &Server) {
    assert_eq!(server.metric(&["restcast_panics_total"]), 0.0);
    let memory = memory_kib_max(server);
    assert!(memory < MEMORY_KIB_MAX, "{memory} KiB at most");
}

#[test]
fn every_fault_leaves_the_last_good_value_says_so_and_heals() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let faults = faults();
        let mut setup = Setup::new().driver(driver);
        for Fault { name, .. } in &faults {
            upstream.set_json(&format!("/held/{name}"), r#"{"good":1}"#);
            setup = setup.stream(&format!("held-{name}"), &upstream.url(&format!("/held/{name}")), HASTY);
            setup = setup.stream(&format!("cold-{name}"), &upstream.url(&format!("/cold/{name}")), HASTY);
        }
        let server = setup.start();
        let mut held: BTreeMap<&str, Watcher> = BTreeMap::new();
        for Fault { name, .. } in &faults {
            let mut watcher = Watcher::of(&server, &format!("held-{name}"));
            watcher.until(name, |watcher| watcher.value == Some(json!({ "good": 1 })));
            held.insert(name, watcher);
        }
        for Fault { name, reply, .. } in &faults {
            upstream.set(&format!("/held/{name}"), reply.clone());
            upstream.set(&format!("/cold/{name}"), reply.clone());
        }
        let mut cold: BTreeMap<&str, Watcher> = BTreeMap::new();
        for Fault { name, .. } in &faults {
            cold.insert(name, Watcher::of(&server, &format!("cold-{name}")));
        }
        for Fault { name, code, status, .. } in &faults {
            let expected = status.map_or(Value::Null, Value::from);
            for (state, watcher) in [("stale", held.get_mut(name)), ("failing", cold.get_mut(name))] {
                let watcher = watcher.expect("a watcher for each fault");
                watcher.until(name, |watcher| watcher.is(state));
                let told = &watcher.status;
                assert_eq!((&told["code"], &told["status"]), (&json!(code), &expected), "{driver}, {name}: {told}");
                assert!(told["retry_in_ms"].is_u64() && told["ts"].is_u64(), "{name}: {told}");
            }
            assert_eq!(held[name].value, Some(json!({ "good": 1 })), "{name}");
            assert_eq!(cold[name].value, None, "{name}");
            let answer = value_of(&server, &format!("held-{name}"));
            assert_eq!((answer.status, answer.text().as_str()), (200, r#"{"good":1}"#), "{name}");
            assert_eq!(answer.header("x-restcast-state"), Some("stale"), "{name}");
            let answer = value_of(&server, &format!("cold-{name}"));
            assert_eq!((answer.status, answer.code().as_str()), (503, "STREAM_UNAVAILABLE"), "{name}");
            assert!(answer.header("retry-after").is_some(), "{name}");
        }
        for Fault { name, .. } in &faults {
            upstream.set_json(&format!("/held/{name}"), r#"{"good":2}"#);
            upstream.set_json(&format!("/cold/{name}"), r#"{"good":2}"#);
        }
        for (name, watcher) in held.iter_mut().chain(cold.iter_mut()) {
            watcher.until(name, |watcher| watcher.is("live") && watcher.value == Some(json!({ "good": 2 })));
            assert_eq!(watcher.status["code"], Value::Null, "{name}");
        }
        let answer = value_of(&server, "held-html");
        assert_eq!((answer.status, answer.header("x-restcast-state")), (200, None));
        assert_unharmed(&server);
    }
}

#[test]
fn what_is_just_allowed_is_a_value() {
    let upstream = Upstream::start();
    let largest = format!("\"{}\"", "x".repeat((256 << 10) - 2));
    upstream.set_json("/deep", &nested(128));
    upstream.set_json("/large", &largest);
    upstream.set("/deflate", Reply::json("[1]").coding(Coding::Deflate).framing(Framing::Chunked(1)));
    let mut setup = Setup::new();
    for name in ["deep", "large", "deflate"] {
        setup = setup.stream(name, &upstream.url(&format!("/{name}")), HASTY);
    }
    let server = setup.start();
    for (name, expected) in [("deep", nested(128)), ("large", largest), ("deflate", "[1]".to_owned())] {
        let answer = value_of(&server, name);
        assert_eq!(answer.status, 200, "{name}");
        assert!(answer.body == expected.as_bytes(), "{name}: {} bytes", answer.body.len());
    }
}

#[test]
fn an_upstream_that_goes_down_is_back_when_it_is_back() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let address = upstream.address();
        upstream.set_json("/leads", "[1]");
        let server = Setup::new().driver(driver).stream("leads", &upstream.url("/leads"), HASTY).start();
        let mut watcher = Watcher::of(&server, "leads");
        watcher.until("the first value", |watcher| watcher.value == Some(json!([1])));
        drop(upstream);
        watcher.until("down", |watcher| watcher.is("stale"));
        assert_eq!(watcher.status["code"], "UPSTREAM_UNREACHABLE");
        let again = Upstream::start_at(address);
        // Without a validator: the one it comes back with could be the one that is known.
        again.set("/leads", Reply::json("[2]"));
        watcher.until("up again", |watcher| watcher.is("live") && watcher.value == Some(json!([2])));
        assert_unharmed(&server);
    }
}

#[test]
fn a_name_that_does_not_resolve_says_so_quickly_and_holds_nobody_up() {
    let upstream = Upstream::start();
    upstream.set_json("/fast", "[1]");
    let mut setup = Setup::new().stream("fast", &upstream.url("/fast"), HASTY);
    for number in 0..20 {
        let url = format!("http://nobody-{number}.invalid/leads");
        setup = setup.stream(&format!("lost-{number}"), &url, HASTY);
    }
    let server = setup.start();
    let mut lost: Vec<Watcher> = (0..20).map(|number| Watcher::of(&server, &format!("lost-{number}"))).collect();
    let mut fast = Watcher::of(&server, "fast");
    fast.until("a value", |watcher| watcher.value == Some(json!([1])));
    for watcher in &mut lost {
        watcher.until("no name", |watcher| watcher.is("failing"));
        assert_eq!(watcher.status["code"], "UPSTREAM_DNS");
    }
    upstream.set_json("/fast", "[2]");
    fast.until("a value meanwhile", |watcher| watcher.value == Some(json!([2])));
    assert_unharmed(&server);
}

#[test]
fn a_connect_that_is_not_answered_is_a_time_out_and_holds_nobody_up() {
    // A listener whose queue is full lets a connect hang, as a firewall that drops packets would.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = silent.local_addr().expect("an address");
    socket2::SockRef::from(&silent).listen(0).expect("a shorter queue");
    let _fillers: Vec<_> = (0..3).map(|_| TcpStream::connect_timeout(&address, Duration::from_millis(50))).collect();
    let upstream = Upstream::start();
    upstream.set_json("/fast", "[1]");
    let hasty = HASTY.replace("connect_timeout = \"2s\"", "connect_timeout = \"300ms\"");
    let server = Setup::new()
        .stream("silent", &format!("http://{address}/"), &hasty)
        .stream("fast", &upstream.url("/fast"), HASTY)
        .start();
    let mut silent = Watcher::of(&server, "silent");
    let mut fast = Watcher::of(&server, "fast");
    fast.until("a value", |watcher| watcher.value == Some(json!([1])));
    silent.until("silence", |watcher| watcher.is("failing"));
    assert_eq!(silent.status["code"], "UPSTREAM_TIMEOUT");
}

/// The waits between the requests for `path`, from head to head.
fn waits(upstream: &Upstream, path: &str) -> Vec<Duration> {
    let requests = upstream.requests();
    let times: Vec<Instant> = requests.iter().filter(|seen| seen.target == path).map(|seen| seen.at).collect();
    times.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

#[test]
fn an_upstream_that_fails_is_asked_ever_less_often_and_no_watcher_makes_it_more() {
    let upstream = Upstream::start();
    upstream.set("/leads", Reply::status(500));
    let lines = "interval = \"100ms\"\nbackoff_max = \"60s\"\nlinger = \"1ms\"";
    let server = Setup::new().stream("leads", &upstream.url("/leads"), lines).start();
    let began = Instant::now();
    let mut coming_and_going = 0;
    // Watchers come and go: each is a first watcher, who would be served at once were the upstream well.
    while began.elapsed() < Duration::from_secs(6) {
        let mut watcher = Watcher::of(&server, "leads");
        watcher.until("failing", |watcher| watcher.is("failing"));
        coming_and_going += 1;
        thread::sleep(Duration::from_millis(20));
    }
    let waits = waits(&upstream, "/leads");
    assert!(waits.iter().all(|wait| *wait >= Duration::from_millis(95)), "never less than the interval: {waits:?}");
    // After n failures the wait is uniform up to 100 ms * 2^n: in 6 s there is room for some 6 of them, not for 60.
    assert!(waits.len() <= 20, "{} requests for {coming_and_going} watchers", waits.len());
    assert!(coming_and_going > waits.len());
}

/// `seconds` since the epoch as an HTTP date.
fn http_date(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let weekday = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"][usize::try_from(days % 7).expect("small")];
    let (mut year, mut day) = (1970, days);
    let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let name = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"][month];
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{weekday}, {:02} {name} {year} {hour:02}:{minute:02}:{second:02} GMT", day + 1)
}

#[test]
fn retry_after_is_obeyed_in_both_forms_whoever_comes() {
    assert_eq!(http_date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
    let upstream = Upstream::start();
    let lines = "interval = \"50ms\"\nbackoff_max = \"100ms\"\nlinger = \"1ms\"";
    let mut setup = Setup::new();
    for name in ["seconds", "date"] {
        // A 429 holds all who ask with the same key.
        let lines = format!("{lines}\nheaders = {{ \"X-Api-Key\" = {name:?} }}");
        setup = setup.stream(name, &upstream.url(&format!("/{name}")), &lines);
        upstream.set_json(&format!("/{name}"), "[1]");
    }
    let server = setup.start();
    upstream.once("/seconds", Reply::status(429).header("Retry-After", "2"));
    let date = http_date(now_s() + 4);
    upstream.once("/date", Reply::status(503).header("Retry-After", &date));
    let mut watchers = ["seconds", "date"].map(|name| Watcher::of(&server, name));
    for watcher in &mut watchers {
        watcher.until("told to wait", |watcher| watcher.is("failing"));
        assert_eq!(watcher.status["code"], "UPSTREAM_RATE_LIMITED");
        let wait = watcher.status["retry_in_ms"].as_u64().expect("a number");
        assert!((500..=4_000).contains(&wait), "{}", watcher.status);
    }
    // New watchers, the first of them included: the wait is the upstream's, not theirs to end.
    drop(watchers);
    let mut watchers = ["seconds", "date"].map(|name| Watcher::of(&server, name));
    for watcher in &mut watchers {
        watcher.until("well again", |watcher| watcher.is("live") && watcher.value == Some(json!([1])));
    }
    assert!(waits(&upstream, "/seconds")[0] >= Duration::from_millis(1_950), "{:?}", waits(&upstream, "/seconds"));
    // The date has whole seconds: 4 s after a second that had begun.
    assert!(waits(&upstream, "/date")[0] >= Duration::from_millis(2_500), "{:?}", waits(&upstream, "/date"));
}

#[test]
fn a_bomb_and_a_giant_on_other_streams_do_not_hold_up_a_fast_one() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/fast", "0");
        upstream.set("/bomb", bomb());
        upstream.set("/endless", Reply::endless_chunks());
        let giant = |round: u64| format!("[{}{round}]", "1234567,".repeat(1 << 17));
        upstream.set("/giant", Reply::json(giant(0)));
        let again = "interval = \"100ms\"\nbackoff_max = \"100ms\"\nresponse_bytes_max = \"2MiB\"";
        let server = Setup::new()
            .driver(driver)
            .cores(1)
            .stream("fast", &upstream.url("/fast"), "interval = \"20ms\"")
            .stream("bomb", &upstream.url("/bomb"), again)
            .stream("endless", &upstream.url("/endless"), again)
            .stream("giant", &upstream.url("/giant"), again)
            .start();
        let mut fast = Watcher::of(&server, "fast");
        let mut faulty = ["bomb", "endless"].map(|name| Watcher::of(&server, name));
        for watcher in &mut faulty {
            watcher.until("too large", |watcher| watcher.is("failing"));
            assert_eq!(watcher.status["code"], "UPSTREAM_TOO_LARGE");
        }
        let mut giants = Watcher::of(&server, "giant");
        giants.until("a giant", |watcher| watcher.value.is_some());
        let over = AtomicBool::new(false);
        let mut took = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                // Not for ever where the reader has panicked.
                let until = Instant::now() + Duration::from_secs(300);
                for round in 1.. {
                    if over.load(Ordering::Relaxed) || Instant::now() > until {
                        break;
                    }
                    upstream.set_json("/fast", &round.to_string());
                    if round % 50 == 0 {
                        upstream.set("/giant", Reply::json(giant(round)));
                    }
                    thread::sleep(Duration::from_millis(20));
                }
            });
            // A turn that inflated, parsed or compared one of them on the core would take longer than a second. On a busy
            // machine another one may, but not in each round.
            for _ in 0..5 {
                let mut gaps = Vec::new();
                let mut last = Instant::now();
                for _ in 0..200 {
                    assert_eq!(fast.ws.next()["type"], "snapshot");
                    gaps.push(last.elapsed());
                    last = Instant::now();
                }
                gaps.sort();
                took.push((gaps[gaps.len() * 99 / 100], gaps.pop()));
                if took.last().is_some_and(|(p99, _)| *p99 < Duration::from_secs(1)) {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        assert!(took.iter().any(|(p99, _)| *p99 < Duration::from_secs(1)), "{driver}: p99 and most {took:?}");
        let polls = upstream.requests().iter().filter(|seen| seen.target == "/bomb").count();
        assert!(polls >= 3, "the bomb went off {polls} times");
        assert_unharmed(&server);
    }
}

/// A followed upstream's answer that is gzip without an end: `first`, and then `padding` again and again, a thousandth as long.
fn endless_gzip(content_type: &str, first: &str, padding: &[u8]) -> Reply {
    let deflated = |bytes: &[u8]| {
        let mut out = Vec::with_capacity(bytes.len() / 100 + 4096);
        let mut deflate = flate2::Compress::new(flate2::Compression::best(), false);
        // What follows a full flush needs nothing of what stands before it, so that it can be sent any number of times.
        deflate.compress_vec(bytes, &mut out, flate2::FlushCompress::Full).expect("there is room");
        assert_eq!(deflate.total_in(), bytes.len() as u64);
        out
    };
    let piece = deflated(&padding.repeat((4 << 20) / padding.len()));
    assert!(piece.len() < 32 << 10, "{}", piece.len());
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Encoding: gzip\r\n\r\n");
    // RFC 1952 section 2.3: no name, no time, an unknown system.
    let gzip = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let begun = [head.as_bytes(), &gzip, &deflated(first.as_bytes())].concat();
    Reply::steps(vec![Step::Send(begun), Step::SendForever(piece)])
}

#[test]
fn a_followed_upstream_that_sends_bombs_does_not_hold_up_a_polled_one_and_is_given_up() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/fast", "0");
        upstream.set("/comments", endless_gzip("text/event-stream", "data: 1\n\n", b":\n"));
        upstream.set("/lines", endless_gzip("application/x-ndjson", "1\n", b"\n"));
        // Each is a value, so that there is no end to it.
        upstream.set("/events", endless_gzip("text/event-stream", "data: 1\n\n", b"data: 1\n\n"));
        let lines = |kind: &str| {
            format!("kind = {kind:?}\ninterval = \"100ms\"\nbackoff_max = \"100ms\"\nresponse_bytes_max = \"1MiB\"")
        };
        let server = Setup::new()
            .driver(driver)
            .cores(1)
            .stream("fast", &upstream.url("/fast"), "interval = \"20ms\"")
            .stream("comments", &upstream.url("/comments"), &lines("sse"))
            .stream("lines", &upstream.url("/lines"), &lines("ndjson"))
            .stream("events", &upstream.url("/events"), &lines("sse"))
            .start();
        let mut fast = Watcher::of(&server, "fast");
        fast.until("a value", |watcher| watcher.value.is_some());
        let mut events = Watcher::of(&server, "events");
        events.until("the value", |watcher| watcher.value == Some(json!(1)));
        for name in ["comments", "lines"] {
            let mut bomb = Watcher::of(&server, name);
            bomb.until("the value before the bomb", |watcher| watcher.value == Some(json!(1)));
            bomb.until("it is given up", |watcher| watcher.is("stale"));
            assert_eq!(bomb.status["code"], "UPSTREAM_TOO_LARGE", "{driver}: {name}");
        }
        let mut bombs = ["comments", "lines"].map(|name| Watcher::of(&server, name));
        let mut took = Vec::new();
        // A core that inflates one in a go takes seconds. On a busy machine others may, but not in each round.
        for round in 0..5 {
            let mut gaps = Vec::new();
            for change in 1..=40 {
                let value = round * 100 + change;
                let begun = Instant::now();
                upstream.set_json("/fast", &value.to_string());
                fast.until("the change", |watcher| watcher.value == Some(json!(value)));
                gaps.push(begun.elapsed());
            }
            gaps.sort();
            took.push((gaps[gaps.len() * 9 / 10], gaps.pop()));
            if took.last().is_some_and(|(p90, _)| *p90 < Duration::from_secs(1)) {
                break;
            }
        }
        assert!(took.iter().any(|(p90, _)| *p90 < Duration::from_secs(1)), "{driver}: p90 and most {took:?}");
        for bomb in &mut bombs {
            bomb.until("it goes on", |watcher| watcher.is("stale"));
        }
        let asked = |path: &str| upstream.requests().iter().filter(|seen| seen.target == path).count();
        assert!(asked("/comments") >= 2 && asked("/lines") >= 2, "they are tried again");
        assert_eq!(asked("/events"), 1, "what sends values is no bomb");
        assert_unharmed(&server);
    }
}

#[test]
fn a_followed_upstream_with_little_to_say_may_send_comments_for_as_long_as_it_likes() {
    // What it sends to stay connected is more in all than a value may have, one by one as such an upstream sends them.
    let said: Vec<&[u8]> = std::iter::repeat_n(b":\n\n".as_slice(), 2_000).chain([b"data: 2\n\n".as_slice()]).collect();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    for piece in &said {
        encoder.write_all(piece).and_then(|()| encoder.flush()).expect("memory takes all");
    }
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n";
    let upstream = Upstream::start();
    let plain = [format!("{head}\r\n").as_bytes(), &said.concat()].concat();
    let gzip = [format!("{head}Content-Encoding: gzip\r\n\r\n").as_bytes(), encoder.get_ref()].concat();
    let mut setup = Setup::new();
    for (name, bytes) in [("plain", plain), ("gzip", gzip)] {
        upstream.set(&format!("/{name}"), Reply::steps(vec![Step::Send(bytes), Step::Stall]));
        let lines = "kind = \"sse\"\nresponse_bytes_max = \"1KiB\"";
        setup = setup.stream(name, &upstream.url(&format!("/{name}")), lines);
    }
    let server = setup.start();
    for name in ["plain", "gzip"] {
        let mut watcher = Watcher::of(&server, name);
        watcher.until("the event behind them", |watcher| watcher.value == Some(json!(2)));
        assert!(watcher.is("live"), "{name}: {}", watcher.status);
    }
    assert_eq!(upstream.request_count(), 2);
}

#[test]
fn tls_upstreams_are_asked_by_name_and_address_over_one_connection() {
    for driver in DRIVERS {
        let (authority, folder) = (Authority::new(), Folder::new("faults"));
        let lines = format!("{HASTY}ca = {:?}", authority.write_pem(&folder));
        let upstream = Upstream::start_tls(&authority.identity(&["localhost", "127.0.0.1"]));
        upstream.set_json("/name", "[1]");
        upstream.set_json("/address", "[1]");
        let server = Setup::new()
            .driver(driver)
            .stream("name", &upstream.url_by_name("localhost", "/name"), &lines)
            .stream("address", &upstream.url("/address"), &lines)
            .start();
        let mut watchers = ["name", "address"].map(|name| Watcher::of(&server, name));
        for round in 1..4 {
            for (watcher, path) in watchers.iter_mut().zip(["/name", "/address"]) {
                upstream.set_json(path, &format!("[{round}]"));
                watcher.until("a value", |watcher| watcher.value == Some(json!([round])));
                assert!(watcher.is("live"), "{}", watcher.status);
            }
        }
        let requests = upstream.requests();
        let of = |path: &str| requests.iter().filter(|seen| seen.target == path).collect::<Vec<_>>();
        let (by_name, by_address) = (of("/name"), of("/address"));
        assert!(by_name.iter().all(|seen| seen.server_name.as_deref() == Some("localhost")));
        assert!(by_address.iter().all(|seen| seen.server_name.is_none()), "RFC 6066 3: an address is no server name");
        assert!(by_name.len() >= 3 && by_address.len() >= 3);
        let host = format!("localhost:{}", upstream.address().port());
        assert!(by_name.iter().all(|seen| seen.header("host") == Some(host.as_str())));
        assert_eq!(upstream.connection_count(), 2, "one connection for each origin, kept");
        eventually("validators go out and 304 comes back", || (upstream.not_modified_count() > 0).then_some(()));
    }
}

#[test]
fn certificates_that_should_not_be_trusted_are_upstream_tls() {
    let (authority, stranger, folder) = (Authority::new(), Authority::new(), Folder::new("faults"));
    let lines = format!("{HASTY}ca = {:?}", authority.write_pem(&folder));
    let identities = [
        ("wrong-name", authority.identity(&["example.com"])),
        ("expired", authority.expired(&["127.0.0.1"])),
        ("unknown-authority", stranger.identity(&["127.0.0.1"])),
        ("self-signed", self_signed(&["127.0.0.1"])),
    ];
    let mut setup = Setup::new();
    let mut upstreams = BTreeMap::new();
    for (name, identity) in &identities {
        let good = Upstream::start_tls(&authority.identity(&["127.0.0.1"]));
        let bad = Upstream::start_tls(identity);
        for upstream in [&good, &bad] {
            upstream.set_json("/leads", "[1]");
        }
        setup = setup.stream(&format!("held-{name}"), &good.url("/leads"), &lines);
        setup = setup.stream(&format!("cold-{name}"), &bad.url("/leads"), &lines);
        upstreams.insert(*name, (good, bad));
    }
    // The system's roots do not vouch for it either.
    setup = setup.stream("no-ca", &upstreams["expired"].0.url("/leads"), HASTY);
    let server = setup.start();
    let mut unvouched = Watcher::of(&server, "no-ca");
    unvouched.until("no ca", |watcher| watcher.is("failing"));
    assert_eq!(unvouched.status["code"], "UPSTREAM_TLS");
    for (name, identity) in &identities {
        let (good, bad) = upstreams.remove(name).expect("two upstreams");
        let mut held = Watcher::of(&server, &format!("held-{name}"));
        held.until(name, |watcher| watcher.value == Some(json!([1])));
        let mut cold = Watcher::of(&server, &format!("cold-{name}"));
        cold.until(name, |watcher| watcher.is("failing"));
        assert_eq!((&cold.status["code"], &cold.value), (&json!("UPSTREAM_TLS"), &None), "{name}");
        assert_eq!(bad.request_count(), 0, "{name}: nothing is said to whom nobody vouches for");
        let address = good.address();
        drop(good);
        let impostor = Upstream::start_tls_at(address, identity);
        impostor.set("/leads", Reply::json("[\"a lie\"]"));
        held.until(name, |watcher| watcher.status["code"] != "UPSTREAM_UNREACHABLE" && watcher.is("stale"));
        let mut late = Watcher::of(&server, &format!("held-{name}"));
        late.until(name, |watcher| watcher.status["code"] == "UPSTREAM_TLS" && watcher.value == Some(json!([1])));
        drop(impostor);
        let good = Upstream::start_tls_at(address, &authority.identity(&["127.0.0.1"]));
        good.set("/leads", Reply::json("[2]"));
        held.until(name, |watcher| watcher.is("live") && watcher.value == Some(json!([2])));
    }
    assert_unharmed(&server);
}

#[test]
fn a_request_carries_what_was_configured_and_secrets_stay_out_of_the_log() {
    let upstream = Upstream::start();
    upstream.set("/ask", Reply::json("[1]").etag("\"v1\""));
    upstream.set("/refuse?key=hunter2-query", Reply::status(500));
    let folder = Folder::new("faults");
    let lines = format!(
        "method = \"POST\"\nbody = '{{\"want\":\"all\"}}'\n         headers = {{ \"X-Env\" = \"env:FAULTS_SECRET\", \"X-File\" = \"file:{}\", \"X-Plain\" = \"plain\" }}",
        folder.put("secret", "hunter2-file\n")
    );
    let server = Setup::new()
        .env("FAULTS_SECRET", "hunter2-env")
        .stream("ask", &upstream.url("/ask"), &lines)
        .stream("refused", &upstream.url("/refuse?key=hunter2-query"), &lines)
        .start();
    let mut watcher = Watcher::of(&server, "ask");
    watcher.until("a value", |watcher| watcher.value == Some(json!([1])));
    let mut refused = Watcher::of(&server, "refused");
    refused.until("a failure", |watcher| watcher.is("failing"));
    let polled = || upstream.requests().into_iter().filter(|seen| seen.target == "/ask").collect::<Vec<_>>();
    let seen = eventually("three polls", || Some(polled()).filter(|seen| seen.len() >= 3));
    for request in seen {
        assert_eq!((request.method.as_str(), request.body.as_slice()), ("POST", &br#"{"want":"all"}"#[..]));
        let agent = request.header("user-agent").expect("a User-Agent");
        assert_eq!(agent.strip_prefix("restcast/").map(|version| version.split('.').count()), Some(3), "{agent}");
        assert_eq!(request.header("x-env"), Some("hunter2-env"));
        assert_eq!(request.header("x-file"), Some("hunter2-file"), "one newline at the end is no part of a secret");
        assert_eq!(request.header("x-plain"), Some("plain"));
        assert_eq!(request.header("if-none-match"), None, "RFC 9110 13.1.2: for POST it would mean another thing");
    }
    let told = format!("{}{}", server.log_text(), server.metrics());
    assert!(!told.contains("hunter2"), "a secret is told: {told}");
    assert!(refused.status["code"] == "UPSTREAM_STATUS" && !refused.status.to_string().contains("hunter2"));
}
