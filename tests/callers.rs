//! What callers describe themselves, where it goes wrong for them or somebody else: whose a session is, who watches it, when
//! it is said to end, what is told of a bad description and what may follow it.
#![cfg(feature = "runtime")]

mod hall;
mod support;

use std::rc::Rc;

use hall::{Conn, Hall, MS, SECOND, cookie};
use serde_json::{Value, json};

use support::Upstream;
use support::server::{ADMIN_KEY, Setup, bearer, token_of};

const TARGET: &str = "https://api.example.com/a";

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

/// A process by itself, and one that shares a store.
fn alone_and_sharing(lines: &str) -> [hall::Setup; 2] {
    let text = format!("[direct]\nallow_public = true\nlinger = \"5s\"\n{lines}");
    [false, true].map(|store| hall::Setup { text: text.clone(), cores: 2, store, ..hall::Setup::new() })
}

fn of(token: &str) -> (&'static str, String) {
    ("Authorization", format!("Bearer {token}"))
}

fn ask(hall: &mut Hall, method: &str, path: &str, by: &(&str, String), body: &str) -> (u16, Value) {
    let conn = hall.connect(0);
    let (name, value) = by;
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: live.example\r\n{name}: {value}\r\nContent-Length: {length}");
    hall.say(conn, format!("{head}\r\n\r\n{body}").as_bytes());
    hall.answered(conn)
}

fn make(hall: &mut Hall, by: &(&str, String), more: Value) -> Value {
    let mut said = json!({"url": TARGET});
    said.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let (status, session) = ask(hall, "POST", "/v1/sessions", by, &said.to_string());
    assert_eq!(status, 201, "{session}");
    session
}

fn open(hall: &mut Hall, core: usize, path: &str, token: &Value) -> Conn {
    let (name, value) = of(&text(token));
    hall.upgrade(core, path, &[(name, &value)])
}

fn watch(hall: &mut Hall, core: usize, session: &Value) -> Conn {
    open(hall, core, &format!("/v1/streams/{}", text(&session["stream"])), &session["token"])
}

/// Whether a session's token is good still.
fn lives(hall: &mut Hall, session: &Value) -> bool {
    let conn = open(hall, 1, "/v1/ws", &session["token"]);
    let lives = hall.bytes(conn).starts_with(b"HTTP/1.1 101");
    hall.lose(conn);
    lives
}

#[test]
fn who_is_refused_the_stream_of_a_session_does_not_end_it() {
    for setup in alone_and_sharing("[limits]\nstreams_per_subject = 2\n") {
        let mut hall = Hall::new(&setup);
        let by = of(&hall.token(json!({})));
        let session = make(&mut hall, &by, json!({}));
        let others = ["b", "c"].map(|path| {
            let path = format!("/v1/direct?url=https://api.example.com/{path}");
            let conn = hall.upgrade(0, &path, &[(by.0, &by.1)]);
            hall.pass(SECOND);
            assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
            conn
        });
        let refused = watch(&mut hall, 1, &session);
        assert_eq!(hall.kinds(refused), ["welcome", "error", "1013 overloaded"]);
        hall.pass(SECOND * 60);
        hall.lose(others[0]);
        let watcher = watch(&mut hall, 0, &session);
        assert_eq!(hall.kinds(watcher), ["welcome", "snapshot"], "it is there, as nobody has watched it");
        // Who has watched is waited for, and nobody else.
        hall.lose(watcher);
        hall.pass(SECOND * 5 + MS);
        assert!(!lives(&mut hall, &session));
    }
}

#[test]
fn who_opens_a_connection_and_subscribes_to_nothing_does_not_end_a_session() {
    for setup in alone_and_sharing("") {
        let mut hall = Hall::new(&setup);
        let by = of(&hall.token(json!({})));
        let session = make(&mut hall, &by, json!({}));
        assert!(lives(&mut hall, &session));
        hall.pass(SECOND * 60);
        let idle = open(&mut hall, 1, "/v1/ws", &session["token"]);
        hall.pass(SECOND * 60);
        assert_eq!(hall.kinds(idle), ["welcome"]);
        assert!(lives(&mut hall, &session));
        // Watching is counted from `subscribe` to `unsubscribe`.
        let stream = &session["stream"];
        hall.message(idle, json!({"type": "subscribe", "stream": stream}));
        assert_eq!(hall.kinds(idle), ["subscribed", "snapshot"]);
        hall.pass(SECOND * 60);
        assert!(hall.kinds(idle).is_empty() && lives(&mut hall, &session));
        hall.message(idle, json!({"type": "unsubscribe", "stream": stream}));
        assert_eq!(hall.kinds(idle), ["unsubscribed"]);
        hall.pass(SECOND * 4);
        hall.message(idle, json!({"type": "subscribe", "stream": stream}));
        hall.pass(SECOND * 4);
        assert_eq!(hall.kinds(idle), ["subscribed", "snapshot"]);
        hall.message(idle, json!({"type": "unsubscribe", "stream": stream}));
        hall.pass(SECOND * 5 + MS);
        assert!(!lives(&mut hall, &session));
        assert_eq!(hall.kinds(idle), ["unsubscribed", "4004 stream_ended"]);
    }
}

#[test]
fn a_get_that_no_stream_could_be_had_for_does_not_end_a_session() {
    for setup in alone_and_sharing("[limits]\nstreams_per_subject = 1\n") {
        let mut hall = Hall::new(&setup);
        let by = of(&hall.token(json!({})));
        let session = make(&mut hall, &by, json!({}));
        let other = hall.upgrade(0, "/v1/direct?url=https://api.example.com/b", &[(by.0, &by.1)]);
        assert_eq!(hall.kinds(other), ["welcome", "snapshot"]);
        let (own, path) = (of(&text(&session["token"])), format!("/v1/streams/{}", text(&session["stream"])));
        assert_eq!(ask(&mut hall, "GET", &path, &own, "").0, 429);
        hall.pass(SECOND * 60);
        hall.lose(other);
        assert_eq!(ask(&mut hall, "GET", &path, &own, "").0, 200);
        // One that was answered has watched.
        hall.pass(SECOND * 5 + MS);
        assert!(!lives(&mut hall, &session));
    }
}

#[test]
fn a_session_that_is_moved_while_it_is_watched_goes_on_without_any_linger() {
    // One of the cores has the stream, the other asks for it.
    for (setup, core) in alone_and_sharing("").iter().flat_map(|setup| [(setup, 0), (setup, 1)]) {
        let lines = |more: &str| hall::Setup { text: setup.text.replace("\"5s\"", "\"0s\"") + more, ..setup.clone() };
        let mut hall = Hall::new(&lines(""));
        let by = of(&hall.token(json!({})));
        let session = make(&mut hall, &by, json!({}));
        let watcher = watch(&mut hall, core, &session);
        assert_eq!(hall.kinds(watcher), ["welcome", "snapshot"]);
        for interval in 3..7 {
            hall.reload(&lines(&format!("interval_min = \"{interval}s\"\n")));
            hall.pass(SECOND * 60);
            assert_eq!(hall.kinds(watcher), ["snapshot"], "of another epoch");
        }
        hall.lose(watcher);
        hall.pass(MS);
        assert!(!lives(&mut hall, &session));
    }
}

#[test]
fn a_connection_that_watches_nothing_learns_late_that_its_session_has_ended_elsewhere() {
    let [_, setup] = alone_and_sharing("");
    let mut here = Hall::new(&setup);
    let mut there = Hall::new(&hall::Setup { seed: 90, ..setup });
    there.ephemerals = Rc::clone(&here.ephemerals);
    let by = of(&here.token(json!({})));
    let session = make(&mut here, &by, json!({}));
    let idle = open(&mut there, 0, "/v1/ws", &session["token"]);
    let watcher = watch(&mut here, 0, &session);
    for hall in [&mut here, &mut there] {
        hall.pass(SECOND * 600);
    }
    assert_eq!(
        (here.kinds(watcher), there.kinds(idle)),
        (vec!["welcome".into(), "snapshot".into()], vec!["welcome".into()])
    );
    here.lose(watcher);
    for hall in [&mut here, &mut there] {
        hall.pass(SECOND * 6);
    }
    there.message(idle, json!({"type": "subscribe", "stream": session["stream"]}));
    let kinds = there.kinds(idle);
    assert_eq!(kinds.last().map(String::as_str), Some("4004 stream_ended"), "{kinds:?}");
    assert!(!lives(&mut here, &session), "and it is not begun anew for that");
}

#[test]
fn callers_without_a_subject_have_sessions_of_their_own() {
    for setup in alone_and_sharing("sessions_per_subject = 2\n") {
        let mut hall = Hall::new(&setup);
        let exp = hall::WALL_S + 600;
        let claims = [
            json!({"exp": exp, "jti": "a"}),
            json!({"exp": exp, "jti": "b"}),
            json!({"exp": exp}),
            json!({"exp": exp, "n": 1}),
        ];
        let callers = claims.map(|claims| of(&hall.token_of(claims)));
        let sessions: Vec<_> = callers
            .iter()
            .map(|by| {
                let session = make(&mut hall, by, json!({}));
                make(&mut hall, by, json!({}));
                let (status, more) = ask(&mut hall, "POST", "/v1/sessions", by, &json!({"url": TARGET}).to_string());
                assert_eq!((status, &more["code"]), (429, &json!("TOO_MANY_STREAMS")));
                session
            })
            .collect();
        let path = |session: &Value| format!("/v1/sessions/{}", text(&session["id"]));
        for (place, session) in sessions.iter().enumerate() {
            for (caller, by) in callers.iter().enumerate().filter(|(caller, _)| *caller != place) {
                for method in ["GET", "DELETE"] {
                    let (status, _) = ask(&mut hall, method, &path(session), by, "");
                    assert_eq!(status, 404, "{method} of {place}'s by {caller}");
                }
            }
            let own = &callers[place];
            assert_eq!(ask(&mut hall, "GET", &path(session), own, "").1["stream"], session["stream"]);
            let watcher = watch(&mut hall, 0, session);
            assert_eq!(ask(&mut hall, "DELETE", &path(session), own, "").0, 204);
            assert_eq!(hall.kinds(watcher), ["welcome", "snapshot", "stream_status", "4004 stream_ended"]);
            make(&mut hall, own, json!({}));
        }
    }
}

#[test]
fn a_session_by_a_cookie_is_said_to_end_when_it_does() {
    for setup in alone_and_sharing("") {
        let mut hall = Hall::new(&setup);
        hall.put_session("s1", json!({"userId": "u1"}), Some(SECOND * 600));
        let by = ("Cookie", cookie("s1"));
        let [short, long] = [20, 3_000].map(|ttl_s| make(&mut hall, &by, json!({"ttl_s": ttl_s})));
        let [first, second] = [&short, &long].map(|session| watch(&mut hall, 1, session));
        assert_eq!(hall.frames(first)[0]["auth"]["expires_at"], short["expires_at"]);
        // The cookie's session ends before.
        let told = &hall.frames(second)[0]["auth"]["expires_at"];
        assert_eq!(told.as_u64().map(|at| at / 1_000_000), Some(hall::WALL_S + 600));
        hall.pass(SECOND * 20 + MS);
        assert_eq!(hall.kinds(first), ["stream_status", "4004 stream_ended"]);
        assert!(hall.kinds(second).is_empty());
        hall.pass(SECOND * 580 + MS);
        assert_eq!(hall.kinds(second), ["4001 session_expired"]);
    }
}

#[test]
fn a_session_by_an_api_key_is_said_to_end_when_it_does() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = Setup::new().direct(upstream.address(), "").start();
    let said = json!({"streams": ["direct:*"]}).to_string();
    let mut admin = support::server::Raw::connect(server.admin);
    let key = admin.request("POST", "/admin/v1/keys", &[bearer(ADMIN_KEY)], &said).json();
    let by = ("X-Api-Key", text(&key["key"]));
    let said = json!({"url": upstream.url("/a"), "ttl_s": 60});
    let session = server.request("POST", "/v1/sessions", &[by], &said.to_string()).json();
    let path = format!("/v1/streams/{}", text(&session["stream"]));
    let welcome = server.ws(&path, &[bearer(&text(&session["token"]))]).next();
    assert!(session["expires_at"].is_u64());
    assert_eq!(welcome["auth"]["expires_at"], session["expires_at"]);
}

#[test]
fn a_malformed_open_is_told_and_may_be_said_again() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "[1]");
    let server = Setup::new().direct(upstream.address(), "").start();
    let mut ws = server.ws("/v1/direct", &[bearer(&token_of("u1"))]);
    assert_eq!(ws.next()["type"], "welcome");
    let url = upstream.url("/a");
    for (id, more) in [
        json!({"select": "$["}),
        json!({"headers": {"a b": "1"}}),
        json!({"headers": {"a": "1", "A": "2"}}),
        json!({"headers": {"a": "1\r\nb: 2"}}),
        json!({"headers": {"a": "x".repeat(20_000)}}),
        json!({"method": "SEKRET"}),
        json!({"interval_ms": -1}),
    ]
    .into_iter()
    .enumerate()
    {
        let mut said = json!({"type": "open", "url": url, "id": id});
        said.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        ws.send(said);
        let told = ws.next();
        assert_eq!(
            (&told["type"], &told["code"], &told["id"]),
            (&json!("error"), &json!("BAD_MESSAGE"), &json!(id)),
            "{more}"
        );
    }
    assert_eq!(upstream.request_count(), 0);
    ws.send(
        json!({"type": "open", "url": url, "id": "n", "method": null, "headers": null, "body": null, "select": null,
                   "interval_ms": null, "format": null, "since": null, "max_rate_ms": null}),
    );
    assert_eq!(ws.next_of("snapshot")["data"], json!([1]));
    // What is blocked ends it.
    let mut ws = server.ws("/v1/direct", &[bearer(&token_of("u1"))]);
    ws.send(json!({"type": "open", "url": "http://10.0.0.1/", "select": "$[", "id": 1}));
    assert_eq!(ws.next_of("error")["code"], "TARGET_BLOCKED");
    assert_eq!(ws.closed(), (4003, "forbidden".into()));
}

#[test]
fn one_open_too_many_is_refused_by_its_id() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    upstream.set_json("/b", "1");
    let server = Setup::new().direct(upstream.address(), "").limits("streams_per_subject = 1").start();
    let open = |path: &str| {
        let mut ws = server.ws("/v1/direct", &[bearer(&token_of("u1"))]);
        ws.send(json!({"type": "open", "url": upstream.url(path), "id": 9}));
        ws
    };
    let mut held = open("/a");
    held.next_of("snapshot");
    let mut ws = open("/b");
    let told = ws.next_of("error");
    assert_eq!((&told["code"], &told["id"]), (&json!("TOO_MANY_STREAMS"), &json!(9)));
    assert_eq!(ws.closed(), (1013, "overloaded".into()));
}

#[test]
fn an_interval_of_nothing_is_raised_like_any_other_and_null_is_nothing() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "[1]");
    let server = Setup::new().direct(upstream.address(), "interval_min = \"300ms\"").start();
    let token = token_of("u1");
    let make = |more: Value| {
        let mut said = json!({"url": upstream.url("/a")});
        said.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let answer = server.request("POST", "/v1/sessions", &[bearer(&token)], &said.to_string());
        assert_eq!(answer.status, 201, "{said} {}", answer.text());
        answer.json()
    };
    let least = make(json!({"interval_ms": 300}));
    assert_eq!(make(json!({"interval_ms": 0}))["stream"], least["stream"], "the same is asked, as often");
    assert_ne!(make(json!({}))["stream"], least["stream"]);
    let nulls = json!({"method": null, "headers": null, "body": null, "interval_ms": null, "select": null, "dedupe_key": null, "ttl_s": null});
    assert_eq!(make(nulls.clone())["stream"], make(json!({}))["stream"]);
    let value = server.get(&format!("/v1/direct?url={}&interval_ms=0", upstream.url("/a")), &[bearer(&token)]);
    assert_eq!((value.status, value.json()), (200, json!([1])));
    let mut said = nulls;
    said["url"] = upstream.url("/a").into();
    let value = server.request("POST", "/v1/direct", &[bearer(&token)], &said.to_string());
    assert_eq!((value.status, value.json()), (200, json!([1])));
    for method in ["SEKRET", "DELETE", "PUT", "get"] {
        said["method"] = method.into();
        let refused = server.request("POST", "/v1/direct", &[bearer(&token)], &said.to_string());
        assert_eq!((refused.status, refused.code().as_str()), (400, "BAD_REQUEST"), "{method}");
    }
}
