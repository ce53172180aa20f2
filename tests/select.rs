//! `select` against the built server: what a caller chooses is a sequence of its own in every representation, over what their
//! view shows, and no caller makes a poll dear for the others.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::time::Duration;

use serde_json::json;

use support::Upstream;
use support::server::{Answer, DRIVERS, Server, Setup, bearer, eventually, mint, now_s, token_of};
use watcher::{Over, Watcher, on_core, polled};

const STREAM: &str = "/v1/streams/leads";

fn encoded(path: &str) -> String {
    path.bytes()
        .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect()
}

fn selecting(path: &str) -> String {
    format!("{STREAM}?select={}", encoded(path))
}

fn get(server: &Server, path: &str, headers: &[(&str, String)]) -> Answer {
    let mut all = vec![bearer(&token_of("u1"))];
    all.extend(headers.iter().cloned());
    server.get(path, &all)
}

fn rows(first: &str, hidden: u32) -> String {
    format!(
        r#"{{"rows":[{{"id":1.0,"name":"{first}","open":true}},{{"id":2E0,"name":"y","open":false}}],"hidden":{hidden}}}"#
    )
}

fn setup(upstream: &Upstream) -> Setup {
    upstream.set_json("/leads", &rows("x", 1));
    Setup::new().stream("leads", &upstream.url("/leads"), "")
}

#[test]
fn what_is_selected_is_a_sequence_of_its_own_in_every_representation_on_every_core() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = setup(&upstream).driver(driver).start();
        let names = ["$.rows[*].name", "$ ['rows'] [*] [\"name\"]"];
        let mut chosen = Vec::new();
        for core in 0..2 {
            for (over, path) in [(Over::Ws, names[0]), (Over::Sse, names[1])] {
                let path = selecting(path);
                chosen.push(on_core(&server, core, |server| {
                    Watcher::open(server, over, &path, &[bearer(&token_of("u1"))])
                }));
            }
        }
        let mut all = Watcher::ws(&server, STREAM);
        let whole = all.event();
        let firsts: Vec<_> = chosen.iter_mut().map(Watcher::event).collect();
        for first in &firsts {
            assert_eq!((first.stream(), first.member("data")), ("leads".into(), r#"["x","y"]"#.into()));
            assert_eq!(first.point(), firsts[0].point(), "one sequence, however its path is spelled");
            assert_ne!(first.epoch(), whole.epoch());
        }
        let answer = get(&server, &selecting(names[1]), &[]);
        let etag = format!("\"{}\"", firsts[0].point());
        assert_eq!((answer.text().as_str(), answer.header("etag")), (r#"["x","y"]"#, Some(&*etag)));
        let singular = [
            ("$.rows[0].id", "1.0"),
            ("$.rows[1].id", "2E0"),
            ("$.rows[9]", "null"),
            ("$..open", "[true,false]"),
            ("$.nope[*]", "[]"),
        ];
        for (path, value) in singular {
            assert_eq!(get(&server, &selecting(path), &[]).text(), value, "{path}");
        }
        assert_eq!(server.metric(&["restcast_streams"]), 1.0, "one stream is polled for all of them");
        // What does not show makes no event.
        for hidden in 2..5 {
            upstream.set_json("/leads", &rows("x", hidden));
            all.event();
        }
        let same = get(&server, &selecting(names[0]), &[("If-None-Match", etag)]);
        assert_eq!(same.status, 304);
        upstream.set_json("/leads", &rows("z", 5));
        for watcher in &mut chosen {
            let next = watcher.event();
            assert_eq!((next.seq(), watcher.value("leads")), (2, r#"["z","y"]"#.to_owned()));
        }
    }
}

#[test]
fn a_resume_goes_on_in_the_own_sequence_and_a_point_of_another_gets_a_snapshot() {
    let upstream = Upstream::start();
    let long = |name: &str| format!(r#"{{"rows":["{name}","{}"],"n":1}}"#, "p".repeat(200));
    upstream.set_json("/leads", &long("a"));
    let server = setup(&upstream).start();
    upstream.set_json("/leads", &long("a"));
    for over in [Over::Ws, Over::Sse] {
        upstream.set_json("/leads", &long("a"));
        let path = selecting("$.rows");
        let open = |path: &str| Watcher::open(&server, over, path, &[bearer(&token_of("u1"))]);
        let mut watcher = open(&path);
        let first = watcher.event_with("leads", &format!(r#"["a","{}"]"#, "p".repeat(200)));
        let held = watcher.holding("leads").clone();
        drop(watcher);
        upstream.set_json("/leads", &long("b"));
        polled(&upstream, "/leads");
        let mut back = open(&format!("{path}&since={}", first.point()));
        back.resume("leads", &held);
        let missed = back.event();
        assert_eq!((missed.kind(), missed.epoch()), ("patch".to_owned(), first.epoch()));
        let mut foreign = open(&format!("{}&since={}", selecting("$.rows[0]"), first.point()));
        assert_eq!(foreign.event().member("data"), "\"b\"");
    }
}

#[test]
fn a_select_is_evaluated_over_what_the_view_shows_and_moves_with_it() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"{"rows":[{"id":1,"ssn":"S1"},{"id":2,"ssn":"S2"}]}"#);
    let views = "[[stream.view]]\nroles = [\"agent\"]\npointers = [\"/rows/*/id\"]\n[[stream.view]]\nroles = [\"admin\"]\npointers = [\"\"]\n";
    let server = Setup::new().stream("leads", &upstream.url("/leads"), views).start();
    let of = |role: &str| mint(json!({"sub":"u1","roles":[role],"exp":now_s() + 600}));
    for (path, agents, admins) in [
        ("$..ssn", "[]", r#"["S1","S2"]"#),
        ("$.rows[?@.ssn=='S2'].id", "[]", "[2]"),
        ("$.rows[?count(@.*)>1].id", "[]", "[1,2]"),
        ("$.rows[0]", r#"{"id":1}"#, r#"{"id":1,"ssn":"S1"}"#),
    ] {
        for over in [Over::Ws, Over::Sse] {
            let mut watcher = Watcher::open(&server, over, &selecting(path), &[bearer(&of("agent"))]);
            let first = watcher.event();
            assert_eq!(first.member("data"), agents, "{path}");
            assert_eq!(server.get(&selecting(path), &[bearer(&of("agent"))]).text(), agents);
            if over == Over::Ws {
                watcher.send(&json!({"type":"auth_update","token":of("admin")}).to_string());
                watcher.next_of("auth_ok");
                let moved = watcher.next_of("snapshot");
                assert_eq!((moved.stream(), moved.member("data")), ("leads".into(), admins.into()), "{path}");
                assert_ne!(moved.epoch(), first.epoch());
            }
        }
    }
    assert!(!server.log_text().contains("ssn"), "what callers ask for is in no log");
}

#[test]
fn many_streams_on_one_connection_select_each_for_itself_and_a_name_is_held_once() {
    let upstream = Upstream::start();
    let server = setup(&upstream).stream("other", &upstream.url("/leads"), "").start();
    let mut many = Watcher::ws(&server, "/v1/ws");
    many.send(r#"{"type":"subscribe","stream":"leads","select":"$.rows[0].name","id":1}"#);
    assert_eq!(many.next_of("subscribed").json()["stream"], "leads");
    assert_eq!(many.event().member("data"), "\"x\"");
    many.send(r#"{"type":"subscribe","stream":"other","select":"$.hidden","format":"full","id":2}"#);
    many.next_of("subscribed");
    assert_eq!(many.event().member("data"), "1");
    many.send(r#"{"type":"subscribe","stream":"leads","select":"$.hidden","id":3}"#);
    let refused = many.next_of("error").json();
    assert_eq!((&refused["code"], &refused["id"]), (&json!("ALREADY_SUBSCRIBED"), &json!(3)));
    many.send(r#"{"type":"unsubscribe","stream":"leads","id":4}"#);
    many.next_of("unsubscribed");
    many.forget("leads");
    many.send(r#"{"type":"subscribe","stream":"leads","select":"$.hidden","id":5}"#);
    many.next_of("subscribed");
    assert_eq!(many.event().member("data"), "1");
    // A path that is none: the client learns where.
    many.send(r#"{"type":"unsubscribe","stream":"leads"}"#);
    many.next_of("unsubscribed");
    for (path, detail) in [("$.rows[", "byte 7"), ("rows", "byte 0"), ("$[?@.a=]", "byte 6")] {
        many.send(&json!({"type":"subscribe","stream":"leads","select":path,"id":6}).to_string());
        let refused = many.next_of("error").json();
        assert_eq!((&refused["code"], &refused["id"]), (&json!("BAD_MESSAGE"), &json!(6)));
        assert!(refused["error"].as_str().expect("a text").contains(detail), "{refused}");
    }
}

#[test]
fn what_is_no_path_is_refused_in_every_representation_after_who_asks_is_known() {
    let upstream = Upstream::start();
    let server = setup(&upstream).start();
    for path in ["$.rows[", "", "rows", &format!("$.{}", "a".repeat(1_100))] {
        let path = selecting(path);
        let mut refused = vec![get(&server, &path, &[])];
        for over in [Over::Ws, Over::Sse] {
            let opened = Watcher::try_open(&server, over, &path, &[bearer(&token_of("u1"))]);
            refused.push(opened.err().expect("it is refused"));
        }
        for answer in refused {
            assert_eq!((answer.status, &*answer.code()), (400, "BAD_REQUEST"), "{path}");
            assert!(answer.text().contains("byte "), "{}", answer.text());
        }
    }
    assert_eq!(server.get(&selecting("$["), &[]).status, 401, "strangers are not told of their paths");
    assert_eq!(get(&server, &selecting("$[").replace("leads", "nope"), &[]).status, 404);
    assert_eq!(get(&server, &format!("{}&select=%24", selecting("$")), &[]).status, 400);
}

#[test]
fn there_are_so_many_selects_of_a_stream_and_the_unwatched_make_place() {
    let upstream = Upstream::start();
    let server = setup(&upstream).limits("selects_per_stream = 2").start();
    let mut first = Watcher::ws(&server, &selecting("$.rows[0].name"));
    let mut second = Watcher::sse(&server, &selecting("$.hidden"));
    first.event();
    second.event();
    // One more is refused; those who were there, and who asks for what is there, are not touched.
    let refused = get(&server, &selecting("$.rows[1]"), &[]);
    assert_eq!((refused.status, &*refused.code()), (503, "TOO_MANY_STREAMS"));
    let mut third = Watcher::ws(&server, &selecting("$.rows[1]"));
    assert_eq!(third.next_of("error").json()["code"], "TOO_MANY_STREAMS");
    assert_eq!(third.raw().close_frame().0, 1013);
    assert_eq!(get(&server, &selecting("$['hidden']"), &[]).text(), "1");
    assert_eq!(get(&server, STREAM, &[]).status, 200);
    upstream.set_json("/leads", &rows("z", 2));
    assert_eq!(first.event().seq(), 2);
    assert_eq!(second.event().seq(), 2);
    // When one has gone its place is free.
    drop(second);
    eventually("there is place", || (get(&server, &selecting("$.rows[1].name"), &[]).text() == "\"y\"").then_some(()));
    assert_eq!(get(&server, &selecting("$.rows[1].id"), &[]).text(), "2E0");
    upstream.set_json("/leads", &rows("w", 2));
    assert_eq!(first.event().seq(), 3);
    // And where callers may not select, they may not.
    let none = setup(&upstream).limits("selects_per_stream = 0").start();
    assert_eq!(get(&none, &selecting("$"), &[]).status, 400);
}

#[test]
fn the_only_select_makes_place_for_another_while_its_stream_goes_on() {
    let upstream = Upstream::start();
    let server = setup(&upstream).limits("selects_per_stream = 1").start();
    for (path, value) in [("$.hidden", "1"), ("$.rows[0].name", "\"x\""), ("$.rows[1].id", "2E0"), ("$.hidden", "1")] {
        eventually("its place is free", || {
            let answer = get(&server, &selecting(path), &[]);
            (answer.status == 200).then(|| assert_eq!(answer.text(), value))
        });
    }
    assert_eq!(server.metric(&["restcast_streams"]), 1.0);
}

#[test]
fn a_subject_selects_so_many_at_once() {
    let upstream = Upstream::start();
    let server = setup(&upstream).limits("streams_per_subject = 2").start();
    let mut many = Watcher::ws(&server, "/v1/ws");
    many.send(r#"{"type":"subscribe","stream":"leads","select":"$.hidden"}"#);
    many.next_of("subscribed");
    let _second = Watcher::ws(&server, &selecting("$.rows"));
    let refused = get(&server, &selecting("$.rows[0]"), &[]);
    assert_eq!((refused.status, &*refused.code()), (429, "TOO_MANY_STREAMS"));
    assert_eq!(get(&server, &selecting("$.rows"), &[]).status, 200, "what they have is no other");
    assert_eq!(server.get(&selecting("$.rows[0]"), &[bearer(&token_of("u2"))]).status, 200);
}

#[test]
fn a_path_that_takes_too_much_is_its_callers_trouble_alone() {
    let upstream = Upstream::start();
    let large = |first: u32| format!("[{first},{}1]", "1,".repeat(20_000));
    upstream.set_json("/leads", &large(7));
    let server = Setup::new().stream("leads", &upstream.url("/leads"), "").start();
    let mut well = Watcher::ws(&server, &selecting("$[0]"));
    assert_eq!(well.event().member("data"), "7");
    let dear = ["$[?count($[*]) > @]", "$..[*,*,*,*,*,*,*,*]", "$[?count($..*) == @ || count($[*]) == @]"];
    let mut watchers: Vec<Watcher> = dear.iter().map(|path| Watcher::ws(&server, &selecting(path))).collect();
    for watcher in &mut watchers {
        let status = watcher.next_of("stream_status").json();
        assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_TOO_LARGE")));
    }
    let refused = get(&server, &selecting(dear[0]), &[]);
    assert_eq!((refused.status, &*refused.code()), (503, "STREAM_UNAVAILABLE"));
    for value in 8..12 {
        upstream.set_json("/leads", &large(value));
        assert_eq!(well.event().seq(), u64::from(value) - 6);
    }
    upstream.set_json("/leads", "[3]");
    assert_eq!(watchers[0].event().member("data"), "[]");
    assert_eq!(watchers[0].next_of("stream_status").json()["state"], "live");
    assert!(watchers[1].event().member("data").starts_with("[3,3"));
    assert!(!server.log_text().contains("count"), "callers do not fill the log");
    assert!(!well.is_quiet_for(Duration::from_secs(2)), "the last change");
}

/// Rows of which a [`dear`] path takes a good part of all the work that there is for selects of a value.
fn deep(first: u32) -> String {
    let row = |id: u32| json!({"id":id,"a":{"b":[1,2,3,{"c":id}]},"s":"a".repeat(50)});
    json!({"items":(first..first + 300).map(row).collect::<Vec<_>>(),"n":first}).to_string()
}

/// Each takes as much as the others.
fn dear(at: u32) -> String {
    selecting(&format!("$..*..*..*['c','n{at:03}']"))
}

fn as_user(user: &str) -> [(&'static str, String); 1] {
    [bearer(&token_of(user))]
}

/// Whether it gets a value, or is told that there is none.
fn is_served(watcher: &mut Watcher) -> bool {
    let first = watcher.next();
    let is_value = first.kind() == "snapshot";
    if is_value {
        watcher.follow(&first);
    }
    is_value
}

fn served(server: &Server, at: u32, user: &str) -> Option<Watcher> {
    let mut watcher = Watcher::open(server, Over::Ws, &dear(at), &as_user(user));
    is_served(&mut watcher).then_some(watcher)
}

#[test]
fn one_callers_dear_selects_are_refused_him_and_nobody_else() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", &deep(1));
    let open = "allow_anonymous = true";
    let server = Setup::new().stream("leads", &upstream.url("/leads"), open).start();
    let mut early = Watcher::open(&server, Over::Ws, &selecting("$.n"), &as_user("early"));
    assert_eq!(early.event().member("data"), "1");
    // One-shot requests and watchers that stay, of a subject and of somebody without a credential.
    let by: [&[(&str, String)]; 2] = [&as_user("greedy"), &[]];
    let mut stay = Vec::new();
    for credential in by {
        let asked: Vec<Answer> = (0..10).map(|at| server.get(&dear(at), credential)).collect();
        let refused: Vec<&Answer> = asked.iter().filter(|answer| answer.status != 200).collect();
        assert!((1..10).contains(&refused.len()), "{} of ten are refused", refused.len());
        for answer in refused {
            assert_eq!((answer.status, &*answer.code()), (503, "STREAM_UNAVAILABLE"));
            assert!(answer.text().contains("UPSTREAM_TOO_LARGE: the select takes more work"), "{}", answer.text());
        }
        stay.extend((10..20).map(|at| Watcher::open(&server, Over::Ws, &dear(at), credential)));
    }
    // Whoever asks for little is served at once, and whoever asks for as much as the greedy do too, while they stay.
    let cheap = |path: &str| server.get(&selecting(path), &as_user("late")).text();
    assert_eq!((cheap("$.items[2].id").as_str(), cheap("$.n").as_str()), ("3", "1"));
    assert_eq!(serde_json::from_str::<Vec<u32>>(&cheap("$.items[*].id")).expect("numbers").len(), 300);
    let mut late = Watcher::open(&server, Over::Sse, &selecting("$.items[0].id"), &as_user("late"));
    assert_eq!(late.event().member("data"), "1");
    for first in 2..6 {
        upstream.set_json("/leads", &deep(first));
        assert_eq!(early.event().member("data"), first.to_string());
        assert_eq!(late.event().member("data"), first.to_string());
        // Nobody watches this one: the core that is asked may hear of the change a moment later than the others.
        eventually("it is served", || (cheap("$.items[7].id") == (first + 7).to_string()).then_some(()));
    }
    drop(stay);
}

#[test]
fn who_was_refused_is_served_when_those_who_took_it_all_have_left() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", &deep(1));
    let server = Setup::new().stream("leads", &upstream.url("/leads"), "linger = \"1s\"").start();
    // As many as there may be, by several: each takes as much as the others.
    let mut all: Vec<Watcher> = Vec::new();
    for user in ["a", "b", "c"] {
        let from = 10 + 20 * all.len() as u32;
        all.extend((from..from + 20).map_while(|at| served(&server, at, user)));
    }
    let open = |at: u32, user: &str| Watcher::open(&server, Over::Ws, &dear(at), &as_user(user));
    let refused = |watcher: &mut Watcher| {
        let status = watcher.next_of("stream_status").json();
        assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_TOO_LARGE")));
    };
    let mut last = open(500, "last");
    refused(&mut last);
    // One more of those who take half of it: it is refused them whoever else leaves, until they leave something themselves.
    let mut more = open(501, "a");
    refused(&mut more);
    upstream.set_json("/leads", &deep(2));
    assert!(all.iter_mut().all(|watcher| watcher.event().seq() == 2), "those who were there go on");
    // Nothing changes but that they leave.
    drop(all);
    assert_eq!(last.event().kind(), "snapshot");
    assert_eq!(last.next_of("stream_status").json()["state"], "live");
    // What they took is forgotten with what lingers of it.
    assert_eq!(more.event().kind(), "snapshot");
}

#[test]
fn whoever_still_watches_pays_and_nobody_who_has_left() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", &deep(1));
    for core in 0..2 {
        let server = Setup::new().stream("leads", &upstream.url("/leads"), "linger = \"60s\"").start();
        let open = |at: u32, user: &str| {
            let mut watcher =
                on_core(&server, core, |server| Watcher::open(server, Over::Ws, &dear(at), &as_user(user)));
            is_served(&mut watcher).then_some(watcher)
        };
        let (leaves, stays) = (format!("leaves{core}"), format!("stays{core}"));
        let from = 10 + u32::from(core) * 40;
        let theirs: Vec<Watcher> = (from..from + 20).map_while(|at| open(at, &leaves)).collect();
        assert!(!theirs.is_empty() && theirs.len() < 20, "{}", theirs.len());
        let again: Vec<Watcher> =
            (from..).take(theirs.len()).map(|at| open(at, &stays).expect("it is there already")).collect();
        drop(theirs);
        eventually("whoever has left may select again", || {
            (server.get(&dear(from + 30), &as_user(&leaves)).status == 200).then_some(())
        });
        assert_eq!(server.get(&dear(from + 31), &as_user(&stays)).status, 503, "who stays pays for what he watches");
        drop(again);
    }
}

#[test]
fn one_caller_leaves_some_selects_to_others() {
    let upstream = Upstream::start();
    let server = setup(&upstream).limits("selects_per_stream = 8").start();
    let path = |at: usize| selecting(&format!("$.rows[{at}]"));
    let held: Vec<Watcher> = (0..6)
        .map(|at| {
            let mut watcher = Watcher::open(&server, Over::Ws, &path(at), &as_user("many"));
            watcher.event();
            watcher
        })
        .collect();
    let refused = server.get(&path(7), &as_user("many"));
    assert_eq!((refused.status, &*refused.code()), (503, "TOO_MANY_STREAMS"));
    assert_eq!(server.get(&path(0), &as_user("many")).status, 200, "what they have is no other");
    let _other = Watcher::open(&server, Over::Ws, &path(8), &as_user("other"));
    assert_eq!(server.get(&path(9), &as_user("other")).status, 200);
    drop(held);
}

#[test]
fn a_select_is_rated_like_any_other_sequence() {
    let upstream = Upstream::start();
    let server = setup(&upstream).start();
    let mut rated = Watcher::ws(&server, &format!("{}&max_rate_ms=600", selecting("$.hidden")));
    let mut all = Watcher::ws(&server, STREAM);
    rated.event();
    all.event();
    for hidden in 2..6 {
        upstream.set_json("/leads", &rows("x", hidden));
        all.event();
    }
    let next = rated.event();
    assert!(next.kind() == "snapshot" && next.seq() > 2, "more than one had come: {}", next.text);
}
