//! What callers have polled and held: how often one of them can have upstreams asked, in whatever order they come and go,
//! and how much the streams that they describe may hold.
#![cfg(feature = "runtime")]

mod hall;
mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant as Clock};

use hall::{Conn, Hall, MS, SECOND};
use restcast::time::Instant;
use serde_json::{Value, json};

use support::server::{Server, Setup, bearer, eventually, token_of};
use support::{Reply, Upstream};

const DIRECT: &str = "[direct]\nallow_public = true\n";

fn setup(cores: u16, text: &str) -> hall::Setup {
    hall::Setup { text: text.to_owned(), cores, store: false, ..hall::Setup::new() }
}

fn authorization(token: &str) -> String {
    format!("Bearer {token}")
}

/// A GET and its answer: status, head and body.
fn get(hall: &mut Hall, core: usize, path: &str, token: &str) -> (u16, String) {
    let conn = hall.request(core, "GET", path, &[("Authorization", &authorization(token))]);
    let text = String::from_utf8_lossy(&hall.bytes(conn)).into_owned();
    hall.lose(conn);
    (text.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0), text)
}

fn open(hall: &mut Hall, core: usize, path: &str, token: &str) -> Conn {
    hall.upgrade(core, path, &[("Authorization", &authorization(token))])
}

fn direct(path: &str) -> String {
    format!("/v1/direct?url=https://api.example.com/{path}&interval_ms=500")
}

fn retry_after_s(text: &str) -> Option<u64> {
    let (_, rest) = text.split_once("Retry-After: ")?;
    rest.split("\r\n").next()?.parse().ok()
}

/// The most polls of any second.
fn most_in_a_second(hall: &Hall) -> usize {
    let times: Vec<Instant> = hall.polled.iter().map(|(at, _)| *at).collect();
    let until = |from: Instant| times.iter().filter(|&&at| from <= at && at < from + SECOND).count();
    times.iter().map(|&from| until(from)).max().unwrap_or(0)
}

/// When URLs that end so were polled.
fn polls_of(hall: &Hall, end: &str) -> Vec<Instant> {
    hall.polled.iter().filter(|(_, url)| url.ends_with(end)).map(|(at, _)| *at).collect()
}

/// Nothing is counted for anybody when all is over.
fn assert_all_is_given_back(hall: &mut Hall) {
    hall.pass(SECOND * 30);
    assert_eq!(hall.ledger.kept_streams(), (0, 0), "streams and places");
}

/// With eight places and an interval of 500 ms nobody has more than eight streams polled, each from 250 to 500 ms apart; and a
/// place that is given on is polled once more.
const PLACES: usize = 8;
const POLLS_IN_A_SECOND: usize = PLACES * 4;

/// What is asked for the how manieth time.
type Path = fn(usize) -> String;

#[test]
fn gets_of_one_stream_after_the_other_ask_no_more_than_watching_as_many_as_one_may() {
    let limits = format!("[limits]\nstreams_per_subject = {PLACES}\n");
    let shaped = "url = \"http://up/q?r={query.r}\"\nparams = [\"r\"]\ninterval = \"500ms\"\nlinger = \"10s\"";
    let mut with_params = setup(2, &limits);
    with_params.streams.push(("q".to_owned(), shaped.to_owned()));
    let kinds: [(hall::Setup, Path); 4] = [
        (setup(2, &format!("{limits}{DIRECT}")), |no| direct(&format!("d?{no}"))),
        (setup(1, &format!("{limits}{DIRECT}linger = \"0s\"\n")), |no| direct(&format!("d?{no}"))),
        (setup(1, &format!("{limits}{DIRECT}linger = \"100ms\"\n")), |no| direct(&format!("d?{}", no % 100))),
        (with_params, |no| format!("/v1/streams/q?r={no}")),
    ];
    for (setup, path) in kinds {
        let mut hall = Hall::new(&setup);
        let token = hall.token(json!({}));
        let (mut good, mut waits) = (0, 0);
        for no in 0..1_000 {
            let (status, text) = get(&mut hall, no % usize::from(setup.cores), &path(no), &token);
            match status {
                200 => good += 1,
                429 => {
                    assert!(text.contains("TOO_MANY_STREAMS"), "{text}");
                    assert_eq!(retry_after_s(&text), Some(1), "{text}");
                    waits += 1;
                }
                other => panic!("{other}: {text}"),
            }
            hall.pass(10 * MS);
        }
        let most = most_in_a_second(&hall);
        assert!(most <= POLLS_IN_A_SECOND, "{most} polls in a second, {good} answers: {}", path(0));
        assert!(
            good >= 9 * PLACES && waits > 0,
            "{good} answers, {waits} refusals: a place is free again after a second"
        );
        assert_all_is_given_back(&mut hall);
    }
}

#[test]
fn callers_without_a_subject_have_the_places_of_one() {
    let text = format!("[limits]\nstreams_per_subject = {PLACES}\n{DIRECT}");
    let mut hall = Hall::new(&setup(2, &text));
    for no in 0..200_u64 {
        let claims = json!({"jti": no.to_string(), "exp": hall::WALL_S + 3_600});
        let token = hall.token_of(claims);
        let (status, text) = get(&mut hall, 0, &direct(&format!("d?{no}")), &token);
        assert!(matches!(status, 200 | 429), "{text}");
        hall.pass(10 * MS);
    }
    let most = most_in_a_second(&hall);
    assert!((PLACES..=POLLS_IN_A_SECOND).contains(&most), "{most} polls in a second");
    // A subscription is given up under the credential that has come since.
    let token = |hall: &Hall, jti: &str| hall.token_of(json!({"jti": jti, "exp": hall::WALL_S + 3_600}));
    hall.pass(20 * SECOND);
    let first = token(&hall, "first");
    let conn = open(&mut hall, 0, &direct("watched"), &first);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    let second = token(&hall, "second");
    hall.message(conn, json!({"type": "auth_update", "token": second, "id": 1}));
    assert_eq!(hall.kinds(conn), ["auth_ok"]);
    hall.lose(conn);
    assert_all_is_given_back(&mut hall);
}

#[test]
fn a_place_is_held_for_the_intervals_that_an_operator_has_set() {
    // `interval_min` is all that a caller's own targets are asked, and so it is when the caller goes from one to the next.
    let text = format!("[limits]\nstreams_per_subject = 4\n{DIRECT}interval_min = \"5s\"\n");
    let mut hall = Hall::new(&setup(1, &text));
    let token = hall.token(json!({}));
    for no in 0..2_000 {
        get(&mut hall, 0, &direct(&format!("d?{no}")), &token);
        hall.pass(10 * MS);
    }
    let count = hall.polled.iter().filter(|(_, url)| url.contains("api.example.com")).count();
    // Four at once, and each of them once more within half an interval and one and a half.
    assert!((4 * 4..=4 * 4 * 3).contains(&count), "{count} polls in 20 s");
}

#[test]
fn subscribing_and_leaving_again_asks_no_more_either() {
    let text = format!("[limits]\nstreams_per_subject = {PLACES}\nmessages_per_second = 1000\n");
    let shaped = "url = \"http://up/q?r={query.r}\"\nparams = [\"r\"]\ninterval = \"500ms\"\nlinger = \"10s\"";
    let mut setup = setup(2, &text);
    setup.streams.push(("q".to_owned(), shaped.to_owned()));
    let mut hall = Hall::new(&setup);
    let token = hall.token(json!({}));
    let conn = open(&mut hall, 0, "/v1/ws", &token);
    hall.frames(conn);
    let mut refused = 0;
    for no in 0..500 {
        let stream = format!("q?r={no}");
        hall.message(conn, json!({"type": "subscribe", "stream": stream, "id": no}));
        refused += hall.frames(conn).iter().filter(|frame| frame["code"] == "TOO_MANY_STREAMS").count();
        hall.message(conn, json!({"type": "unsubscribe", "stream": stream}));
        hall.frames(conn);
        hall.pass(20 * MS);
    }
    let most = most_in_a_second(&hall);
    assert!(most <= POLLS_IN_A_SECOND && refused > 0, "{most} polls in a second, {refused} refused");
    hall.lose(conn);
    assert_all_is_given_back(&mut hall);
}

#[test]
fn whoever_goes_through_many_pages_is_refused_none_and_what_was_left_longest_ago_ends_at_once() {
    for cores in [1, 2] {
        let text = format!("[limits]\nstreams_per_subject = 4\n{DIRECT}linger = \"1h\"\n");
        let mut hall = Hall::new(&setup(cores, &text));
        let token = hall.token(json!({}));
        for no in 0..40 {
            let (status, text) = get(&mut hall, 0, &direct(&format!("page{no}.json")), &token);
            assert_eq!(status, 200, "page {no}: {text}");
            hall.pass(400 * MS);
            assert!(hall.ledger.kept_streams().0 <= 4);
        }
        // The fourth after it took its place, 1.6 s later.
        let first = polls_of(&hall, "page0.json");
        let (begun, ended) = (first.first().expect("a poll"), first.last().expect("a poll"));
        assert!(ended.since(*begun) <= 1_600 * MS, "polled on for {:?}", ended.since(*begun));
        assert!(first.len() >= 3, "and until then it was polled: {}", first.len());
        // Coming back to one that lingers takes no place, nor a poll.
        let before = hall.polled.len();
        for no in [36, 37, 38, 39, 36] {
            assert_eq!(get(&mut hall, 0, &direct(&format!("page{no}.json")), &token).0, 200);
        }
        assert_eq!(hall.polled.len(), before);
    }
}

#[test]
fn a_linger_of_nothing_makes_no_poll_of_each_get() {
    for (linger, every) in [("0s", 100 * MS), ("100ms", 300 * MS), ("0s", 700 * MS)] {
        let text = format!("{DIRECT}interval_min = \"5s\"\nlinger = \"{linger}\"\n");
        let mut hall = Hall::new(&setup(1, &text));
        let token = hall.token(json!({}));
        let begun = hall.now().at;
        let mut tags = Vec::new();
        while hall.now().at < begun + 20 * SECOND {
            let (status, text) = get(&mut hall, 0, &direct("d"), &token);
            assert_eq!(status, 200, "what is held is as good as if it had been polled on: {text}");
            tags.push(text.split_once("ETag: ").expect("an ETag").1.split("\r\n").next().expect("a line").to_owned());
            hall.pass(every);
        }
        let polls = polls_of(&hall, "/d");
        assert!((4..=5).contains(&polls.len()), "{} polls in 20 s, linger {linger}", polls.len());
        assert!(polls.windows(2).all(|two| two[1].since(two[0]) >= 5 * SECOND), "{polls:?}");
        let within = tags.iter().take_while(|tag| **tag == tags[0]).count();
        assert!(Duration::from_secs(4) <= every * u32::try_from(within).expect("few"), "its life is one: {within}");
        // It is held no longer than that: its request may have secrets.
        hall.pass(6 * SECOND);
        assert_eq!(hall.ledger.streams(), 0, "nobody watches another");
    }
}

#[test]
fn what_was_forgotten_to_make_room_is_polled_no_sooner_for_it() {
    // There is room for one of a caller's streams beside another's, so each takes the place of the one before.
    let text = format!("[limits]\nstreams = 2\n{DIRECT}interval_min = \"2s\"\n");
    let mut hall = Hall::new(&hall::Setup { streams: Vec::new(), ..setup(1, &text) });
    let [own, other] = ["u1", "u2"].map(|sub| hall.token(json!({"sub": sub})));
    let watcher = open(&mut hall, 0, &direct("watched"), &other);
    assert_eq!(hall.kinds(watcher), ["welcome", "snapshot"]);
    let begun = hall.now().at;
    while hall.now().at < begun + 20 * SECOND {
        for path in ["a", "b"] {
            let conn = hall.request(0, "GET", &direct(path), &[("Authorization", &authorization(&own))]);
            hall.pass(5 * MS);
            hall.lose(conn);
        }
    }
    for path in ["/a", "/b"] {
        let polls = polls_of(&hall, path);
        assert!(polls.windows(2).all(|two| two[1].since(two[0]) >= 2 * SECOND), "{path}: {polls:?}");
        assert!(polls.len() > 1, "{path} is polled: {polls:?}");
    }
}

#[test]
fn what_one_has_left_is_polled_on_for_others_who_have_left_it() {
    let text = format!("[limits]\nstreams_per_subject = 1\n{DIRECT}");
    let mut hall = Hall::new(&setup(2, &text));
    let [one, two] = ["u1", "u2"].map(|sub| hall.token(json!({"sub": sub})));
    assert_eq!(get(&mut hall, 0, &direct("shared"), &one).0, 200);
    assert_eq!(get(&mut hall, 1, &direct("shared"), &two).0, 200);
    hall.pass(SECOND * 2);
    assert_eq!(get(&mut hall, 0, &direct("other"), &one).0, 200);
    let left = hall.now().at;
    hall.pass(SECOND * 5);
    let polls = polls_of(&hall, "shared");
    assert!(polls.last().expect("polls").since(left) > SECOND * 4, "it goes on for u2");
    assert_eq!(get(&mut hall, 1, &direct("another"), &two).0, 200);
    let left = hall.now().at;
    hall.pass(SECOND * 5);
    assert!(polls_of(&hall, "shared").iter().all(|&at| at <= left), "nobody needs it any more");
    assert_all_is_given_back(&mut hall);
}

#[test]
fn whoever_is_moved_to_another_stream_takes_the_place_along() {
    let text = "[limits]\nstreams_per_subject = 1\n";
    let shaped = |interval: &str| {
        let lines = format!("url = \"http://up/{{claims.companyId}}\"\ninterval = \"{interval}\"\nlinger = \"10s\"");
        let mut setup = setup(2, text);
        setup.streams.push(("own".to_owned(), lines));
        setup
    };
    let mut hall = Hall::new(&shaped("5s"));
    let token = |hall: &Hall, company: &str| hall.token(json!({"companyId": company}));
    let first = token(&hall, "a");
    let conn = open(&mut hall, 0, "/v1/streams/own", &first);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    for company in ["b", "c", "a"] {
        let renewed = token(&hall, company);
        hall.message(conn, json!({"type": "auth_update", "token": renewed, "id": 1}));
        hall.pass(2 * SECOND);
        let kinds = hall.kinds(conn);
        assert_eq!(kinds[..2], ["auth_ok", "snapshot"], "{company}: {kinds:?}");
        assert!(hall.ledger.kept_streams().1 <= 1, "one place is all there is");
    }
    // By a reload too, for who watches and who waits.
    hall.reload(&shaped("6s"));
    hall.pass(2 * SECOND);
    assert_eq!(hall.kinds(conn), ["snapshot"]);
    let tag = "If-None-Match: *\r\nPrefer: wait=60\r\n";
    let other = hall.token(json!({"sub": "u2", "companyId": "a"}));
    let waiter = hall.connect(1);
    let head =
        format!("GET /v1/streams/own HTTP/1.1\r\nHost: live.example\r\nAuthorization: Bearer {other}\r\n{tag}\r\n");
    hall.say(waiter, head.as_bytes());
    assert!(hall.bytes(waiter).is_empty(), "it waits for a change");
    hall.reload(&shaped("7s"));
    hall.pass(2 * SECOND);
    assert_eq!(hall.kinds(conn), ["snapshot"]);
    assert!(String::from_utf8_lossy(&hall.bytes(waiter)).is_empty());
    hall.lose(conn);
    hall.lose(waiter);
    assert_all_is_given_back(&mut hall);
}

#[test]
fn parts_of_a_stream_that_is_polled_anyway_keep_no_place() {
    let mut hall = Hall::new(&setup(1, "[limits]\nstreams_per_subject = 1\n"));
    let token = hall.token(json!({}));
    for no in 0..20 {
        let (status, text) = get(&mut hall, 0, &format!("/v1/streams/leads?select=$[{no}]"), &token);
        assert_eq!(status, 200, "{text}");
        assert_eq!(get(&mut hall, 0, "/v1/streams/leads", &token).0, 200);
    }
    assert_eq!(hall.ledger.kept_streams(), (0, 0));
    assert_eq!(hall.polled.len(), 1);
}

const KIB: u64 = 1 << 10;

fn value_of(bytes: u64) -> String {
    format!("[\"{}\"]", "x".repeat(usize::try_from(bytes).expect("small") - 4))
}

#[test]
fn what_callers_streams_hold_is_bounded_and_takes_nothing_from_the_operators() {
    for cores in [1, 3] {
        let most = 4096 * KIB;
        let text = format!("[limits]\nhistory_bytes_total = \"4MiB\"\n{DIRECT}");
        let mut hall = Hall::new(&setup(cores, &text));
        for no in 0..40 {
            hall.bodies.insert(format!("/big{no}"), value_of(100 * KIB));
        }
        let [greedy, modest] = ["u1", "u2"].map(|sub| hall.token(json!({"sub": sub})));
        let small = open(&mut hall, 0, &direct("small"), &modest);
        let operators = open(&mut hall, 0, "/v1/streams/leads", &modest);
        hall.pass(10 * MS);
        assert_eq!(hall.kinds(small), ["welcome", "snapshot"]);
        assert_eq!(hall.kinds(operators), ["welcome", "snapshot"]);
        let mut refused = 0;
        let mut open_still = Vec::new();
        for no in 0..40 {
            let core = no % usize::from(cores);
            open_still.push(open(&mut hall, core, &direct(&format!("big{no}")), &greedy));
            hall.pass(100 * MS);
            let held = hall.ledger.direct_bytes();
            assert!(held <= most / 4, "{held} bytes");
            open_still.retain(|&conn| {
                let kinds = hall.kinds(conn);
                let ends = kinds.iter().any(|kind| kind == "1013 overloaded");
                assert!(!ends || kinds.iter().any(|kind| kind == "error"), "{kinds:?}");
                refused += usize::from(ends);
                !ends
            });
        }
        assert!(open_still.len() >= 4, "as many as there is room for go on: {}", open_still.len());
        assert!(refused >= 25, "{refused} were ended");
        // A GET says so as well.
        let asking = hall.request(0, "GET", &direct("big39"), &[("Authorization", &authorization(&greedy))]);
        hall.pass(SECOND);
        let text = String::from_utf8_lossy(&hall.bytes(asking)).chars().take(600).collect::<String>();
        let status = text.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
        assert!((status, text.contains("TOO_MANY_STREAMS")) == (503, true) || status == 200, "{status} {text}");
        assert!(hall.ledger.direct_bytes() <= most / 4);
        hall.pass(10 * SECOND);
        assert_eq!((hall.kinds(small), hall.kinds(operators)), (Vec::<String>::new(), Vec::new()), "these go on");
        assert_eq!(get(&mut hall, 0, &direct("small"), &modest).0, 200);
        for conn in open_still {
            hall.lose(conn);
        }
        hall.lose(small);
        hall.pass(60 * SECOND);
        assert_eq!(hall.ledger.direct_bytes(), 0, "nothing is counted of what is gone");
    }
}

/// Both drivers are in `tests/direct.rs`; here the clock is the machine's, and an upstream counts.
#[test]
fn many_gets_of_one_caller_are_not_many_times_as_many_requests() {
    let upstream = Upstream::start();
    upstream.judge_all(|_| Reply::json("1"));
    let server = Setup::new().direct(upstream.address(), "").limits("streams_per_subject = 4").start();
    let token = token_of("u1");
    let begun = Clock::now();
    let mut answers = BTreeMap::<u16, usize>::new();
    let escaped = |no: usize| upstream.url(&format!("/d%3F{no}"));
    for no in 0..300 {
        let path = format!("/v1/direct?url={}&interval_ms=500", escaped(no));
        *answers.entry(server.get(&path, &[bearer(&token)]).status).or_default() += 1;
    }
    assert_eq!(answers.keys().copied().collect::<Vec<_>>(), [200, 429], "{answers:?}");
    // Streams that were asked for first are polled on, if they were not let go of for others.
    upstream.wait_for_requests(4 * 6, Duration::from_secs(30));
    let seconds = usize::try_from(begun.elapsed().as_secs()).expect("few") + 1;
    let count = upstream.request_count();
    assert!(count <= 4 * 4 * seconds, "{count} requests in {seconds} s");
    let mut by_path = BTreeMap::<String, usize>::new();
    for request in upstream.requests() {
        *by_path.entry(request.target).or_default() += 1;
    }
    assert!(by_path.len() <= 4 * 2 * (seconds + 1), "{} streams: a place is given on after 500 ms", by_path.len());
    // Somebody else has places of their own.
    let path = format!("/v1/direct?url={}", escaped(1_000));
    assert_eq!(server.get(&path, &[bearer(&token_of("u2"))]).status, 200);
}

#[test]
fn a_response_to_a_callers_stream_is_bounded_in_size_and_time() {
    let upstream = Upstream::start();
    upstream.set_json("/fits", &value_of(64 * KIB));
    upstream.set_json("/over", &value_of(64 * KIB + 1));
    upstream.set("/slow", Reply::json("[1]").delay(Duration::from_secs(60)));
    let small = Setup::new().direct(upstream.address(), "response_bytes_max = \"64KiB\"").start();
    let short = Setup::new().direct(upstream.address(), "timeout = \"300ms\"").start();
    let token = token_of("u1");
    let direct = |path: &str| format!("/v1/direct?url={}", upstream.url(path));
    assert_eq!(small.get(&direct("/fits"), &[bearer(&token)]).status, 200);
    let session = |server: &Server, path: &str| {
        let body = json!({"url": upstream.url(path)}).to_string();
        let made = server.request("POST", "/v1/sessions", &[bearer(&token)], &body).json();
        let text = |name: &str| made[name].as_str().unwrap_or_else(|| panic!("{made}")).to_owned();
        server.ws(&format!("/v1/streams/{}", text("stream")), &[bearer(&text("token"))])
    };
    for (server, path, code) in [(&small, "/over", "UPSTREAM_TOO_LARGE"), (&short, "/slow", "UPSTREAM_TIMEOUT")] {
        let begun = Clock::now();
        let answer = server.get(&direct(path), &[bearer(&token)]);
        assert_eq!((answer.status, answer.code().as_str()), (503, "STREAM_UNAVAILABLE"), "{path}");
        assert!(begun.elapsed() < Duration::from_secs(14), "the default is longer");
        let told: Value = session(server, path).next_of("stream_status");
        assert_eq!((&told["state"], &told["code"]), (&json!("failing"), &json!(code)), "{path}");
    }
    // A reload that sets them otherwise holds for what there is.
    small.reload(&Setup::new().direct(upstream.address(), "response_bytes_max = \"65KiB\""));
    eventually("it fits now", || (small.get(&direct("/over"), &[bearer(&token)]).status == 200).then_some(()));
}
